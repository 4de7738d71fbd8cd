#!/usr/bin/env python3
"""Golden runs: does the code at hand compute what other code computed on this machine, to the bit?

    python tests/golden.py write FOLDER       # before a change: run everything, keep what came out in FOLDER
    python tests/golden.py compare FOLDER     # after it: run everything again, name what differs

`write` makes FOLDER/golden.json; `compare` exits with 1 where something differs.

Five trainings of 8 steps (a KL autoencoder in tiles, a codebook, a GAN with perceptual term, a U-Net, a
feature network), each by one and by two processes; then predict.py and memtest.py. Kept are log.jsonl without
times and memory, every tensor and plain value of last.pt and best.pt, and what predict.py and memtest.py
write. Floating-point results depend on processor and torch, so the folder is of use on the machine that wrote
it, and is not part of the repository.
"""
from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from processes import free_port

ROOT = Path(__file__).parents[1]
COMMON = ["--steps", "8", "--batch", "1", "--accum", "2", "--seed", "3", "--device", "cpu",
          "--data.synthetic_count", "4", "--data.synthetic_size", "12,32,32", "--data.crops_per_volume", "5",
          "--patch", "8,16,16", "--train.val_every", "4", "--train.val_crops", "2",
          "--train.latent_crops", "2", "--train.save_every", "4", "--log.sample_every", "0"]
SMALL = ["--vae.base_channels", "4"]
RUNS = {
    "vae": [*SMALL, "--memory.mode", "tile", "--memory.tile", "8,8,8", "--train.ema", "0.9",
            "--vae.norm", "group", "--loss.structure_weight", "0.1"],
    "vq": [*SMALL, "--vae.bottleneck", "vq", "--vae.num_codes", "16", "--memory.mode", "checkpoint",
           "--train.precision", "master16", "--optim.clip_percentile", "50", "--optim.clip_window", "3"],
    "gan": [*SMALL, "--loss.adv_weight", "0.1", "--loss.disc_channels", "4", "--loss.disc_layers", "1",
            "--loss.disc_start", "2", "--loss.lecam_weight", "0.1", "--loss.feature_matching_weight", "0.1",
            "--loss.perceptual_weight", "0.1", "--loss.adaptive_weight", "true", "--loss.r1_weight", "0.1",
            "--loss.r1_every", "2", "--loss.crop", "8,16,16"],
    "seg": ["--task", "seg", "--unet.channels", "4,8,8", "--unet.norm", "batch",
            "--unet.deep_supervision", "1"],
    "features": ["--task", "features"],
}
NOT_COMPARED = {"seconds", "voxels_per_second", "peak_gib", "peak_bytes", "step_seconds"}


def start(words: list[str], folder: Path, rank: int = 0, world: int = 1, port: int = 0) -> subprocess.Popen:
    """One process of ours in `folder`, as torchrun would start it."""
    variables = {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if world > 1:
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                      "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def finish(name: str, processes: list[subprocess.Popen]) -> None:
    for process in processes:
        said, _ = process.communicate(timeout=600)
        if process.returncode:
            raise SystemExit(f"golden: {name} ended with {process.returncode}: {said[-2000:]}")


def plain(value: Any) -> Any:
    """A value of a checkpoint as JSON: a tensor by its type, shape and a digest of its bits."""
    if isinstance(value, torch.Tensor):
        bits = ""
        if value.numel():
            content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            bits = hashlib.sha256(content).hexdigest()[:16]
        return f"{value.dtype} {tuple(value.shape)} {bits}"
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value if isinstance(value, (int, str, bool, type(None))) else repr(value)


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_times(item) for key, item in value.items() if key not in NOT_COMPARED}
    return [without_times(item) for item in value] if isinstance(value, list) else value


def train(name: str, flags: list[str], folder: Path, world: int) -> dict:
    """What a run of `world` processes leaves behind."""
    port = free_port()
    words = ["train.py", *COMMON, *flags, "--out", f"{name}{world}"]
    finish(f"{name} on {world}", [start(words, folder, rank, world, port) for rank in range(world)])
    out = folder / f"{name}{world}"
    rows = [without_times(json.loads(line)) for line in (out / "log.jsonl").read_text().splitlines()]
    checkpoints = {file.name: plain(torch.load(file, weights_only=True)) for file in sorted(out.glob("*.pt"))}
    return {"log": rows, **checkpoints}


def volumes(folder: Path) -> None:
    """Three CT-like files with oblique affines in folder/data/images, with labels in folder/data/labels."""
    rng = np.random.default_rng(5)
    affine = np.array([
        [0.0, 2.0, 0.1, 3.0],
        [-1.0, 0.0, 0.0, 5.0],
        [0.0, 0.1, 3.0, 7.0],
        [0.0, 0.0, 0.0, 1.0],
    ])
    for kind in ("images", "labels"):
        (folder / "data" / kind).mkdir(parents=True)
    for n in range(3):
        values = (rng.random((21, 18, 13 + n)) * 2000 - 1000).astype(np.int16)
        for kind, stored in (("images", values), ("labels", (values > 300).astype(np.uint8))):
            nib.save(nib.Nifti1Image(stored, affine), folder / "data" / kind / f"scan{n}.nii.gz")


def content(path: Path) -> Any:
    """What a written file holds, whatever the moment it was written at."""
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".npz":
        found = {}
        with np.load(path) as arrays:
            for key in arrays:
                is_number = arrays[key].dtype.kind in "iuf"
                found[key] = plain(torch.from_numpy(arrays[key])) if is_number else str(arrays[key])
        return found
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return hashlib.sha256(raw).hexdigest()[:16]


def use(folder: Path) -> dict:
    """What predict.py makes of the runs, and what memtest.py predicts."""
    volumes(folder)
    images = ["--input", "data/images"]
    commands = {
        "reconstruct": ["--checkpoint", "vae1", *images, "--output", "recon"],
        "encode": ["--checkpoint", "vq1", *images, "--output", "latents"],
        "decode": ["--checkpoint", "vq1", "--input", "latents", "--output", "decoded"],
        "segment": ["--checkpoint", "seg1", *images, "--output", "found", "--window", "8,16,16"],
        "evaluate": ["--checkpoint", "vae1", "--data", "data/images", "--json", "vae.json"],
        "evaluate codes": ["--checkpoint", "vq1", "--data", "data/images", "--json", "vq.json"],
    }
    for name, words in commands.items():
        words = ["predict.py", name.split()[0], *words, "--device", "cpu"]
        finish(name, [start(words, folder)])
    words = ["memtest.py", *SMALL, "--resolution", "16,48,48", "--json", "memtest.json", "--budget", "0.1"]
    finish("memtest", [start(words, folder)])
    kept = [folder / name for name in ("vae.json", "vq.json", "memtest.json")]
    for name in ("recon", "latents", "decoded", "found"):
        # Not .predict.jsonl: it has digests of inputs, whose gzip headers hold the time.
        kept += sorted(path for path in (folder / name).rglob("*.*") if not path.name.startswith("."))
    return {str(path.relative_to(folder)): content(path) for path in kept}


def differences(old: Any, new: Any, place: str) -> Iterator[str]:
    """A line for each value that is not the same."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            where = f"{place} / {key}"
            if key not in old or key not in new:
                yield f"{where}: only {'now' if key not in old else 'before'}"
            else:
                yield from differences(old[key], new[key], where)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (a, b) in enumerate(zip(old, new)):
            yield from differences(a, b, f"{place}[{number}]")
    elif old != new:
        yield f"{place}: {str(old)[:120]} -> {str(new)[:120]}"


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] not in ("write", "compare"):
        print(__doc__, file=sys.stderr)
        return 2
    command, kept = argv[0], Path(argv[1]) / "golden.json"
    if command == "compare" and not kept.is_file():
        print(f"golden: {kept} is not there; `write` makes it with the code to compare with", file=sys.stderr)
        return 2
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run, flags in RUNS.items():
            for world in (1, 2):
                found[f"{run} on {world}"] = train(run, flags, folder, world)
                print(f"golden: {run} on {world}", flush=True)
        found["predict.py and memtest.py"] = use(folder)
    found = json.loads(json.dumps(found))                        # NaN and infinities as they are kept
    if command == "write":
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(found, indent=1))
        print(f"golden: written to {kept}")
        return 0
    lines = list(differences(json.loads(kept.read_text()), found, "golden"))
    for line in lines[:40]:
        print(line)
    print(f"golden: {len(lines)} differences" if lines else "golden: all the same, to the bit")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
