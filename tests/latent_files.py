"""Latent files as predict.py encode writes them, of numbers that a test chooses."""
import json
from pathlib import Path

import numpy as np


def write_latent(path: Path, latent: np.ndarray, size=None, stride=(2, 4, 4), save=np.savez, **about) -> Path:
    """latent (T, Z, d, h, w). size: of the volume; spacing 2.5, 2, 1.5 mm."""
    path.parent.mkdir(parents=True, exist_ok=True)
    size = size or [n * s for n, s in zip(latent.shape[2:], stride)]
    words = {"version": 1, "modality": "ct", "bottleneck": "kl", "sampled": False, "weights": "0" * 16,
             "spacing": [2.5, 2.0, 1.5], "stride": list(stride), "kind": None, "region": None, "fold": None,
             "patient": None, "variant": 0, "source": path.name.removesuffix("_latent.npz"), "origin": {}}
    save(path, latent=latent.astype(np.float32), affine=np.diag([1.5, 2.0, 2.5, 1.0]), size=np.array(size),
         scale_factor=np.float64(1.0), low=np.full((len(latent), 1), -1000.0),
         high=np.full((len(latent), 1), 1000.0), about=np.array(json.dumps(words | about)))
    return path


def write_set(folder: Path, count: int = 6, shape=(4, 4, 8, 8), seed: int = 0, **about) -> Path:
    """`count` latents of random numbers with a mean and a std of their own a channel."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        latent = rng.standard_normal((1, *shape)) * np.arange(1, 1 + shape[0])[:, None, None, None] + 0.5
        write_latent(folder / f"case{number}_latent.npz", latent, **about)
    return folder
