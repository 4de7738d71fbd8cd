"""Samples of a denoiser as files: noise -> latent -> volume, by `predict.py sample`.

Sample i is a function of (checkpoint, autoencoder, flags, seed, i) alone: its noise has a generator of its
own, and each is made by itself, so that a run of three begins with the one of a run of one. The latent is
decoded by the autoencoder that encoded the training set, in exact tiles, and written in HU (or the median
scale of the training volumes) with an affine of the spacing.

Shapes: Z latent channels, d h w of a latent, D H W of a volume, V numbers of the conditions.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import diffusion
from diffusion import DiffusionConfig
from training import conditions
from training.config import CondConfig, convert
from training.devices import to_device
from training.latent_data import header_of, mapped
from training.order import seed_of
from training.plan import BUDGET
from training.ready import Ready
from volumes import formats
from volumes.files import DataError, naming, short_digest, write_atomic
from volumes.format_nibabel import write_nifti
from volumes.intensities import Intensity, denormalise
from volumes.volume import Request

ENDING = ".nii.gz"


class Wanted(NamedTuple):
    """What the flags of `sample` ask for."""
    size: tuple[int, int, int]                # voxels D,H,W
    spacing: tuple[float, float, float]       # mm D,H,W
    diffusion: DiffusionConfig                # the run's, with --steps, --solver and --guidance
    vector: np.ndarray                        # (V,)
    concat: np.ndarray | None                 # (Zc, d, h, w), of the latent file named by --concat
    hint: np.ndarray | None                   # (D, H, W), the label map of --control


# -------------------------------------------------------------------------------- what is asked for

def add_flags(add: Callable) -> None:
    """The flags of `sample`. add: argparse's add_argument."""
    add("--vae", required=True, metavar="FILE_OR_RUN", help="the autoencoder that encoded the training set")
    add("--output", required=True, metavar="FOLDER", help="sample_0000.nii.gz ...; those there are kept")
    add("--size", metavar="D,H,W", help="voxels [those that the training crops stand for]")
    add("--spacing", metavar="D,H,W", help="mm [of the first training volume]")
    add("--class", dest="kind", metavar="NAME", help="one of the training set's classes [none]")
    add("--region", metavar="TOP-BOTTOM", help="such as chest or chest-abdomen [none]")
    add("--concat", metavar="FILE", help="latent file that stands beside (cond.concat)")
    add("--control", metavar="FILE", help="label map on the volume's grid (cond.control)")
    add("--count", type=int, default=1, metavar="N", help="of samples [1]")
    add("--first", type=int, default=0, metavar="I", help="number of the first sample [0]")
    add("--seed", type=int, default=0, metavar="N", help="sample i depends on it and i alone [0]")
    add("--steps", type=int, metavar="N", help="of the sampler [diffusion.steps of the run]")
    add("--solver", metavar="NAME", help="euler | heun | heun_u [of the run]")
    add("--guidance", type=float, metavar="W", help="1: conditional, more: guided [of the run]")
    add("--overwrite", action="store_true", help="make samples that are there anew")
    add("--tile", default="auto", metavar="D,H,W", help="voxels a tile of decoding; auto | none [auto]")
    add("--memory", type=float, default=BUDGET, metavar="GIB", help=f"budget of such a tile [{BUDGET:g}]")


def wanted(options: argparse.Namespace, denoiser: Ready, vae: Ready) -> Wanted:
    """Raises ValueError, one line, for what the two networks cannot do or were not trained for."""
    cond, cfg = denoiser.cfg.cond, denoiser.cfg.diffusion
    # First that the two belong together.
    if vae.fingerprint != cond.autoencoder:
        raise ValueError(f"--vae {options.vae}: another autoencoder ({vae.fingerprint}) than the one whose "
                         f"latents were trained on ({cond.autoencoder}); name that one")
    if not denoiser.facts["latent"]:
        raise ValueError(f"{denoiser.path}: knows no mean and std of its latents; train on")

    # Then the volume.
    stride = np.array(cond.stride)
    size = tuple(int(n) for n in np.array(denoiser.cfg.data.patch) * stride)
    if options.size is not None:
        size = convert(options.size, tuple[int, int, int], "--size")
        if min(size) < 1:
            raise ValueError(f"--size needs three sizes of 1 or more, got {options.size}")
    spacing = cond.mm
    if options.spacing is not None:
        spacing = convert(options.spacing, tuple[float, float, float], "--spacing")
        if not min(spacing) > 0:
            raise ValueError(f"--spacing needs three mm above 0, got {options.spacing}")
    told = conditions.vector(cond, spacing, size, options.kind, options.region)

    # Then how it is sampled, and what stands beside it.
    changes = {"steps": options.steps, "solver": options.solver, "guidance": options.guidance}
    cfg = dataclasses.replace(cfg, **{name: value for name, value in changes.items() if value is not None})
    if cfg.guidance != 1 and not cfg.cond_drop:
        raise ValueError(f"--guidance {cfg.guidance:g}: the run never trained without conditions "
                         f"(diffusion.cond_drop 0); leave the flag out")
    concat, hint = None, None
    latent_size = vae.task.latent_kind(vae).shape(size)[1:]
    if (options.concat is None) != (not cond.concat_channels):
        needs = "needs" if cond.concat_channels else "takes no"
        raise ValueError(f"{denoiser.path}: {needs} --concat, the latent that stands beside")
    if options.concat is not None:
        concat = latent_beside(Path(options.concat), cond, latent_size)
    if (options.control is None) != (cond.control is None):
        needs = "takes no" if cond.control is None else "needs"
        raise ValueError(f"{denoiser.path}: {needs} --control, a label map on the grid of the volume")
    if options.control is not None:
        hint = label_of(Path(options.control), size)
    return Wanted(size, spacing, cfg, told, concat, hint)


def latent_beside(path: Path, cond: CondConfig, size: tuple[int, ...]) -> np.ndarray:
    """(Zc, d, h, w). DataError where it is of another autoencoder or size."""
    about = header_of(path)
    if about["weights"] != cond.concat_autoencoder:
        raise DataError(f"{path}: latents of another autoencoder ({about['weights']}) than those trained "
                        f"beside ({cond.concat_autoencoder})")
    if about["shape"][1:] != (cond.concat_channels, *size):
        raise DataError(f"{path}: a latent of {about['shape'][1:]}, needed is "
                        f"{(cond.concat_channels, *size)}")
    return np.array(mapped(str(path))[0], dtype=np.float32)


def label_of(path: Path, size: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) of a label map's file. DataError where it has another size."""
    label = formats.read_source(path, Request(label=True), "error for labels").volume.array[0]
    if label.shape != tuple(size):
        raise DataError(f"{path}: a label map of {label.shape}, --size is {size}")
    return label


# -------------------------------------------------------------------------------- samples

def noise_of(seed: int, number: int, shape: tuple[int, ...]) -> Tensor:
    """Normal noise (1, Z, d, h, w), a function of (seed, number) alone, made on the CPU."""
    generator = torch.Generator().manual_seed(seed_of(seed, "diffusion sample", number))
    return torch.randn((1, *shape), generator=generator)


@torch.no_grad()
def latent_sample(denoiser: Ready, want: Wanted, shape: tuple[int, ...], seed: int, number: int,
                  tick: Callable) -> np.ndarray:
    """Sample `number` (Z, d, h, w) in the units of the autoencoder. shape: Z, d, h, w.

    Raises ValueError where it is not finite.
    """
    device, cond, ask = denoiser.device, {}, denoiser.task.denoise(denoiser)
    x = to_device(noise_of(seed, number, shape), device)
    if denoiser.cfg.unet.vector_channels:
        cond["vector"] = torch.from_numpy(want.vector)[None].to(device)
    if want.concat is not None:
        cond["concat"] = torch.from_numpy(want.concat)[None].to(device)
    if want.hint is not None:
        cond["hint"] = torch.from_numpy(want.hint)[None, None].to(device)
    none = {name: torch.zeros_like(value) for name, value in cond.items()}
    with torch.autocast(device.type, denoiser.amp_dtype, enabled=denoiser.amp_dtype is not None):
        found = diffusion.sample(want.diffusion, ask, x, cond, none, tick)
    known = denoiser.facts["latent"]
    mean, std = (known[name].view(-1, 1, 1, 1).cpu().double() for name in ("mean", "std"))
    found = found[0].cpu().double() * std + mean
    if not torch.isfinite(found).all():
        raise ValueError("the sample is not finite; leave --amp out, or train on")
    return found.float().contiguous().numpy()


def write_sample(path: Path, volume: np.ndarray, want: Wanted, cond: CondConfig) -> None:
    """Network intensities (C, D, H, W) -> NIfTI: int16 HU of CT, else float32; affine of the spacing in RAS.

    The volume's middle lies at 0,0,0 mm.
    """
    out = denormalise(volume, Intensity(cond.modality, cond.low, cond.high)).astype(np.float32)
    if cond.modality == "ct":
        out = np.rint(out).astype(np.int16)
    affine = np.diag([*want.spacing[::-1], 1.0])
    affine[:3, 3] = [-(n - 1) / 2 * mm for n, mm in zip(want.size[::-1], want.spacing[::-1])]
    with naming(path):
        write_nifti(path, out, affine)


def made_by(options: argparse.Namespace, denoiser: Ready, want: Wanted) -> str:
    """Text that differs where a sample would."""
    arrays = [None if a is None else short_digest(repr(a.tobytes())) for a in (want.concat, want.hint)]
    return short_digest(repr((denoiser.fingerprint, denoiser.cfg.cond.autoencoder, options.seed, want.size,
                              want.spacing, want.diffusion, want.vector.tolist(), arrays, options.amp)))


def sample(options: argparse.Namespace, denoiser: Ready, vae: Ready,
           show: Callable[[Path], Callable]) -> None:
    """--count samples from --first on. What is there of the same flags is skipped.

    show: a path -> a function that is told (done, of how many, what).
    """
    want = wanted(options, denoiser, vae)
    shape = vae.task.latent_kind(vae).shape(want.size)
    folder = Path(options.output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    made, record = made_by(options, denoiser, want), folder / ".made_by"
    if record.is_file() and record.read_text() != made and any(folder.glob(f"sample_*{ENDING}")):
        if not options.overwrite:
            raise ValueError(f"--output {folder}: holds samples of other flags or checkpoints; --overwrite "
                             f"replaces them, or choose another folder")
        for old in folder.glob(f"sample_*{ENDING}"):
            old.unlink()
    write_atomic(record, lambda file: file.write(made.encode()))

    for number in range(options.first, options.first + options.count):
        path = folder / f"sample_{number:04d}{ENDING}"
        if path.exists() and not options.overwrite:
            print(f"{path}: is there, skipped", flush=True)
            continue
        started = time.monotonic()
        latent = latent_sample(denoiser, want, shape, options.seed, number, show(path))
        sampled = time.monotonic()
        volume = vae.task.decode(vae, latent, want.size, show(path))
        decoded = time.monotonic()
        write_sample(path, volume, want, denoiser.cfg.cond)
        print(f"{path}: sampled in {sampled - started:.1f} s, decoded in {decoded - sampled:.1f} s, written "
              f"in {time.monotonic() - decoded:.1f} s", flush=True)
