"""Latent files: what lies between `predict.py encode` and `predict.py decode`.

An .npz of numbers and one JSON text, no pickles:
    latent        (T, Z, d, h, w) float32; of a network with a codebook it is
    index         (T, d, h, w), the indices of codes
    affine        (4, 4), of the RAS grid that was encoded
    size          (3,), D, H, W of that grid
    scale_factor  of the latent; nan where the run has not measured it
    low, high     (T, C), the intensities that are -1 and 1 to the network
    about         JSON: modality, bottleneck, fingerprint of the weights, how the source lay on disk;
                  what training a diffusion asks for: spacing in mm, and the source's name, class, region,
                  patient and fold where they are known, and which augmented variant of it this is

Augmentation comes before encoding: variant 0 is the source, and variant k > 0 a flipped or rescaled one, a
function of (seed, name, k).

Shapes: T volumes of a 4-D file, C channels, D H W depth height width, Z latent channels, d h w of the latent.
Version 0.4 (2026-11).
"""
from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from training.cases import Case
from training.console import line_of
from training.ready import Ready
from volumes.config import DataConfig
from volumes.entries import Entry
from volumes.files import DataError, sizes, write_atomic
from volumes.find import Item
from volumes.intensities import Intensity
from volumes.own import LATENT
from volumes.seeds import seeded
from volumes.volume import Origin, spacing_of

ENDING = LATENT                                                  # of what `encode` writes
NUMBERS = {"size": "iu", "affine": "f", "low": "f", "high": "f"}  # in every file, and of which kinds


class LatentKind(NamedTuple):
    """What a network makes of a volume."""
    name: str                                                    # of its bottleneck: kl | vq | fsq
    codes: int | None                                            # how many; None: there is no codebook
    shape: Callable[[Sequence[int]], tuple[int, ...]]            # (D, H, W) -> (Z, d, h, w), or (d, h, w)


class Subject(NamedTuple):
    """What is known of a source beside its voxels; it is kept in `about`."""
    source: str                                                  # its name below the data's root
    kind: str | None = None                                      # the datalist's class
    region: str | None = None                                    # the datalist's region
    patient: str | None = None
    fold: int | None = None
    variant: int = 0                                             # 0: as it is; else augmented


class Latents(NamedTuple):
    """What lies between `encode` and `decode`."""
    arrays: list[np.ndarray]                                     # T times (Z, d, h, w), or indices (d, h, w)
    intensities: list[Intensity]
    affine: np.ndarray                                           # of the network's grid
    size: tuple[int, int, int]                                   # D, H, W of that grid
    fingerprint: str                                             # of the weights that encoded it
    origin: Origin
    subject: Subject = Subject("")


def of_case(case: Case, arrays: list[np.ndarray], ready: Ready, subject: Subject) -> Latents:
    """arrays: what the task's `encode` made of each volume."""
    intensities = [intensity for _, intensity in case.volumes]
    size = case.arrays[0].shape[1:]
    return Latents(arrays, intensities, case.affine, size, ready.fingerprint, case.origin, subject)


# -------------------------------------------------------------------------------- augmented variants

def with_variants(items: Sequence[Item], count: int, cfg: DataConfig) -> list[tuple[Item, Subject]]:
    """Each item `count` times, variant k > 0 under the name NAME_v001 and so on.

    Raises ValueError where neither flips nor contrast would make the variants differ.
    """
    if count > 1 and cfg.flip == "none" and not cfg.jitter:
        raise ValueError(f"--variants {count}: nothing varies; add --data.flip or --data.jitter")
    found = []
    for item in items:
        known = Subject(item.known_as, item.kind, item.region, item.patient, item.fold)
        for k in range(count):
            named = item._replace(name=f"{item.known_as}_v{k:03d}") if k else item
            found.append((named, known._replace(variant=k)))
    return found


def augmented(case: Case, subject: Subject, cfg: DataConfig, seed: int) -> Case:
    """The case flipped and rescaled as the section `data` says, by the draws of its variant; 0: as it is.

    All volumes of a series are changed alike.
    """
    if not subject.variant:
        return case
    draw = seeded(seed, f"variant of {subject.source}", subject.variant).random(8)
    # Whole volumes are neither zoomed nor turned: their grid stays.
    cfg = dataclasses.replace(cfg, spacing="original", turn="none")
    volumes = []
    for array, intensity in case.volumes:
        entry = Entry("", None, array.shape, case.spacing, case.affine, intensity, array)
        more = seeded(seed, f"more of {subject.source}", subject.variant)
        changed, _ = data.augmented_crop(entry, array.shape[1:], draw, more, cfg, None)
        volumes.append((changed, intensity))
    return case._replace(volumes=volumes)


# -------------------------------------------------------------------------------- files


def write(path: Path, latents: Latents, ready: Ready, sampled: bool = False) -> None:
    """sampled: the arrays are samples of the posterior, not its mean."""
    kind = ready.task.latent_kind(ready)
    stack = np.stack(latents.arrays)
    if kind.codes is not None:
        stack = stack.astype(np.min_scalar_type(kind.codes - 1))
    about = {"version": 1, "modality": latents.intensities[0].modality, "bottleneck": kind.name,
             "sampled": sampled, "weights": latents.fingerprint,
             "origin": dataclasses.asdict(latents.origin), "spacing": list(spacing_of(latents.affine)),
             "stride": stride_of(kind), **latents.subject._asdict()}
    content = {
        "latent" if kind.codes is None else "index": stack,
        "affine": latents.affine,
        "size": np.array(latents.size),
        "scale_factor": np.float64(ready.facts["latent"].get("scale_factor", math.nan)),
        "low": np.array([intensity.low for intensity in latents.intensities]),
        "high": np.array([intensity.high for intensity in latents.intensities]),
        "about": np.array(json.dumps(about)),
    }
    # Latents of numbers hardly shrink, and lie plain so that training maps them; indices do shrink.
    save = np.savez if kind.codes is None else np.savez_compressed
    write_atomic(path, lambda file: save(file, **content))


def stride_of(kind: LatentKind) -> list[int]:
    """Voxels D,H,W of a latent's element."""
    far = 2**12
    return [round(far / n) for n in kind.shape((far, far, far))[-3:]]


def read(path: Path, ready: Ready) -> Latents:
    """Raises DataError, one line, for what `encode` did not write or another kind of network encoded."""
    kind, channels = ready.task.latent_kind(ready), ready.task.channels(ready.cfg)
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            origin, modality, fingerprint = origin_in(about), str(about["modality"]), str(about["weights"])
            for name, kinds in NUMBERS.items():
                if content[name].dtype.kind not in kinds or not np.isfinite(content[name]).all():
                    raise ValueError(f"its {name} is not of finite numbers")
            size, affine = tuple(int(n) for n in content["size"]), content["affine"].reshape(4, 4)
            low, high = content["low"], content["high"]
            if not low.shape == high.shape == (len(low), channels) or not len(low):
                raise ValueError(f"its low and high are not of {channels} channels")
            stack = content["latent" if "latent" in content else "index"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:                                   # damaged bytes may raise anything at all
        what = f"{type(error).__name__}: {line_of(error)[:120]}"
        raise DataError(f"{path}: is no latent of predict.py encode ({what})") from error

    # What can be read may still be of another network.
    wanted = (len(low), *kind.shape(size))
    if stack.shape != wanted or stack.dtype.kind not in ("f" if kind.codes is None else "iu"):
        raise DataError(f"{path}: holds {about.get('bottleneck')} latents {stack.dtype} {stack.shape}, this "
                        f"checkpoint ({kind.name}) makes {wanted} of {sizes(size)}; decode it with the "
                        f"checkpoint that encoded it")
    if kind.codes is not None:
        stack = stack.astype(np.int64)
        if stack.min() < 0 or stack.max() >= kind.codes:
            raise DataError(f"{path}: holds code {stack.max()}, the codebook has {kind.codes}; decode it "
                            f"with the checkpoint that encoded it")
    elif not np.isfinite(stack).all():
        raise DataError(f"{path}: holds NaN or infinite latents; encode its source again")
    intensities = [Intensity(modality, tuple(lows), tuple(highs)) for lows, highs in zip(low, high)]
    return Latents(list(stack), intensities, affine, size, fingerprint, origin)


def origin_in(about: dict) -> Origin:
    """How the source lay on disk. KeyError, TypeError and the like where the text does not say so."""
    values = dict(about["origin"])
    for name in ("shape", "size"):
        values[name] = tuple(values[name])
    values["affine"] = tuple(tuple(row) for row in values["affine"])
    values["blank"] = tuple(tuple(row) for row in values.get("blank", ()))  # none in older latents
    np.dtype(values["dtype"])                                    # TypeError where it names none
    return Origin(**values)


def ending_of_source(path: Path) -> str:
    """Of the file that a latent decodes to. What is wrong with a latent, `read` tells when its turn comes."""
    try:
        with np.load(path, allow_pickle=False) as content:
            return origin_in(json.loads(str(content["about"]))).kind
    except Exception:                                            # damaged bytes may raise anything at all
        return ".nii.gz"
