"""A folder of latent files as a data set: what data.py is to volumes, for a denoiser of latents.

`predict.py encode` wrote the files (latents.py). They lie plain in their .npz, so that a crop of one is
mapped and nothing else is read. All are of one autoencoder. An entry's voxels are its latent as it was
stored, not normalised; behind its channels stand those of the pair in `cond.concat`, and behind these the
label map of `cond.control`, folded into as many channels as a latent's element has voxels (`fold`), so that a
crop takes all three at one place. Its label is the vector of its conditions (conditions.py).

Shapes: Z latent channels, d h w of the latent, D H W of the volume, V numbers of the conditions.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import functools
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data
from training import conditions, latents
from training.config import CondConfig, TrainConfig
from training.console import line_of
from volumes import formats
from volumes.entries import Entry, Region
from volumes.files import DataError, Say, digest_of, name_below, show, sizes
from volumes.find import list_items
from volumes.intensities import Intensity
from volumes.splits import split, tell_shared, with_patients
from volumes.volume import Request, spacing_of

# Fields of section `data` that change voxels, and so come before encoding.
VOXEL_FIELDS = {"flip": "none", "jitter": 0.0, "foreground": 0.0}


@dataclass(frozen=True)
class LatentEntry(Entry):
    """One latent. `label` is the vector of its conditions."""
    number: int = 0                           # in its file
    variant: int = 0                          # 0: not augmented
    concat: str | None = None                 # file of the latent beside it
    control: str | None = None                # file of its label map
    stride: tuple[int, int, int] = (1, 1, 1)  # voxels of a latent's element

    def read(self, region: Region | None = None) -> np.ndarray:
        """(Z ..., d, h, w) float32 as stored: the latent, the one beside it, its label map folded."""
        region = region or (slice(None),) * 3
        parts = [mapped(self.path)[self.number]]
        if self.concat is not None:
            parts.append(mapped(self.concat)[min(self.number, len(mapped(self.concat)) - 1)])
        if self.control is not None:
            parts.append(folded_label(self.control, self.stride, self.shape[1:]))
        return np.concatenate([part[(slice(None), *region)] for part in parts]).astype(np.float32)

    def read_label(self, region: Region | None = None) -> np.ndarray:
        """The conditions (V,), the same wherever a crop lies."""
        return np.array(self.label)


@dataclass
class LatentData(data.Data):
    """A data set of latents, and what is known of them."""
    cond: CondConfig = dataclasses.field(default_factory=CondConfig)


class Header(dict):
    """What a latent file says of itself: the JSON of `about`, and size, affine, low, high, shape."""


# -------------------------------------------------------------------------------- files

def header_of(path: Path) -> Header:
    """Raises DataError, one line, for what `encode` did not write."""
    try:
        with np.load(path, allow_pickle=False) as content:
            about = Header(json.loads(str(content["about"])))
            about["size"] = tuple(int(n) for n in content["size"])
            about["affine"] = content["affine"].reshape(4, 4).astype(np.float64)
            about["low"], about["high"] = content["low"], content["high"]
            is_of_codes = "index" in content
        if not is_of_codes:
            about["shape"] = mapped(str(path)).shape
            about["source"], about["weights"] = str(about["source"]), str(about["weights"])
            about["stride"] = tuple(int(n) for n in about["stride"])
            about["patient"], about["fold"] = about.get("patient"), about.get("fold")
    except FileNotFoundError:
        raise DataError(f"{show(path)}: no such file") from None
    except KeyError as error:
        raise DataError(f"{show(path)}: says no {error}: of an older predict.py encode; encode its source "
                        f"again") from None
    except Exception as error:                                   # damaged bytes may raise anything at all
        raise DataError(f"{show(path)}: is no latent of predict.py encode ({line_of(error)[:120]})") from None
    if is_of_codes:
        raise DataError(f"{show(path)}: holds indices of codes; a denoiser needs latents of numbers "
                        f"(vae.bottleneck kl)")
    if about.get("sampled"):
        raise DataError(f"{show(path)}: holds samples of the posterior, whose noise a denoiser would learn; "
                        f"encode without --sample")
    return about


@functools.lru_cache(maxsize=256)
def mapped(path: str) -> np.ndarray:
    """The array `latent` (T, Z, d, h, w) of a file, mapped where it lies plain."""
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("latent.npy")
        if member.compress_type != zipfile.ZIP_STORED:
            return np.load(path, allow_pickle=False)["latent"]
    with open(path, "rb") as file:
        # a member is a header of 30 bytes, its name, something more, and then the .npy file
        file.seek(member.header_offset + 26)
        name, more = np.frombuffer(file.read(4), "<u2")
        file.seek(member.header_offset + 30 + int(name) + int(more))
        version = np.lib.format.read_magic(file)
        read_header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, dtype = read_header(file)
        return np.memmap(path, dtype, "r", file.tell(), shape)


@functools.lru_cache(maxsize=64)
def folded_label(path: str, stride: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    """A label map (D, H, W) of a file -> (s0 s1 s2, d, h, w) float32 on the grid of a latent."""
    source = formats.read_source(Path(path), Request(label=True), "error for labels")
    return fold(source.volume.array[0], stride, size)


def fold(label: np.ndarray, stride: tuple[int, int, int], size: tuple[int, int, int]) -> np.ndarray:
    """(D, H, W) -> (s0 s1 s2, d, h, w): each element's voxels as channels; zeros beyond the volume's end."""
    d, h, w = size
    s0, s1, s2 = stride
    whole = np.zeros((d * s0, h * s1, w * s2), dtype=np.float32)
    inside = tuple(slice(0, min(n, m)) for n, m in zip(label.shape, whole.shape))
    whole[inside] = label[inside]
    parts = whole.reshape(d, s0, h, s1, w, s2).transpose(1, 3, 5, 0, 2, 4)
    return parts.reshape(s0 * s1 * s2, d, h, w)


# -------------------------------------------------------------------------------- the data set

def open_latents(cfg: TrainConfig, say: Say) -> LatentData:
    """Raises DataError, one line, where the folder holds no latents, those of several autoencoders or of
    another one than the run began with, or where pairs lack.
    """
    if cfg.data.path is None:
        raise DataError("--task diffusion trains on latents; name their folder with --data (predict.py "
                        "encode writes them)")
    for name, default in VOXEL_FIELDS.items():
        if getattr(cfg.data, name) != default:
            raise DataError(f"data.{name} changes voxels, which comes before encoding; leave it out, and see "
                            f"predict.py encode --variants")
    # First what each file says, and whether all are of one kind.
    root = Path(cfg.data.path).expanduser()
    paths = sorted(root.rglob(f"*{latents.ENDING}")) if root.is_dir() else [root]
    if not paths:
        raise DataError(f"{show(root)}: no *{latents.ENDING} files; predict.py encode writes them")
    headers = {path: header_of(path) for path in paths}
    cond = cond_of(cfg.cond, headers)
    beside = {}
    if cond.concat is not None:
        beside = pairs_in(Path(cond.concat), root, paths)
        cond = with_concat(cond, beside, headers)
    labels = {}
    if cond.control is not None:
        labels = {item.known_as: str(item.path) for item in list_items(cond.control)["training"]}

    # Then entries: a group for each source, with its volumes and their augmented variants.
    groups: dict[str, list[Entry]] = {}
    for path, about in headers.items():
        control = None
        if cond.control is not None:
            control = labels.get(about["source"]) or labels.get(about["source"].rsplit("/", 1)[-1])
            if control is None or about["variant"]:
                why = "has no label map in" if control is None else "is augmented, unlike its label map in"
                raise DataError(f"{show(path)}: {why} cond.control={cond.control}")
        for number in range(about["shape"][0]):
            entry = entry_of(root, path, number, about, cond, beside.get(path), control)
            groups.setdefault(about["source"], []).append(entry)
    files = list(groups.values())

    # Then the split, of whole patients; validation sees no augmented ones.
    files, _ = with_patients(files, [], cfg.data, say)
    training, held_out = split(files, cfg.data, cfg.train.seed, say)
    if held_out is not training:
        tell_shared(training, held_out, any(group[0].fold is not None for group in files), say)
    train = [entry for group in training for entry in group]
    val = [entry for group in held_out for entry in group if not entry.variant]
    patch = patch_of(cfg, train + val)
    if cfg.data.patch is None:
        tell_smallest(patch, train + val, say)
    say(f"data: latents of {len(train)} training volumes, {len(val)} held out, {train[0].shape[0]} channels, "
        f"crops of {sizes(patch)}, conditions: {conditions.width(cond)} numbers")
    return LatentData(train, val, train[0].shape[0], patch, 0.0, cfg.data, cached=False,
                      cond=cond)


def cond_of(cond: CondConfig, headers: dict[Path, Header]) -> CondConfig:
    """The section with what the files say of themselves."""
    (first, known), *_ = headers.items()
    for path, about in headers.items():
        if about["weights"] != (cond.autoencoder or known["weights"]):
            of = "those of this run" if cond.autoencoder else f"those of {show(first.name)}"
            raise DataError(f"{show(path)}: latents of another autoencoder ({about['weights']}) than {of} "
                            f"({cond.autoencoder or known['weights']}); encode all with one")
        if about["shape"][1] != known["shape"][1]:
            raise DataError(f"{show(path)}: {about['shape'][1]} channels, {show(first.name)} has "
                            f"{known['shape'][1]}")
    kinds = {about["kind"] for about in headers.values() if about.get("kind")}
    classes = cond.classes or tuple(sorted(kinds))
    if cond.autoencoder is not None:                             # of a run that goes on, or of --init
        return dataclasses.replace(cond, classes=classes)
    low = np.median(np.concatenate([about["low"] for about in headers.values()]), axis=0)
    high = np.median(np.concatenate([about["high"] for about in headers.values()]), axis=0)
    return dataclasses.replace(
        cond, classes=classes, autoencoder=known["weights"], stride=known["stride"],
        mm=spacing_of(known["affine"]), modality=str(known["modality"]), low=tuple(low.tolist()),
        high=tuple(high.tolist()),
    )


def pairs_in(folder: Path, root: Path, paths: list[Path]) -> dict[Path, str]:
    """Path of a latent -> the file of the same name below another folder."""
    base = root if root.is_dir() else root.parent
    found = {path: folder.expanduser() / path.relative_to(base) for path in paths}
    lacking = [path for path, pair in found.items() if not pair.is_file()]
    if lacking:
        raise DataError(f"{show(lacking[0])}: has no pair of its name in cond.concat={folder} "
                        f"({len(lacking)} of {len(paths)} lack one)")
    return {path: str(pair) for path, pair in found.items()}


def with_concat(cond: CondConfig, beside: dict[Path, str], headers: dict[Path, Header]) -> CondConfig:
    """The section with the channels of the latents beside. DataError where a pair has other sizes."""
    autoencoder = cond.concat_autoencoder
    for path, pair in beside.items():
        about = header_of(Path(pair))
        autoencoder = autoencoder or about["weights"]
        if about["shape"][2:] != headers[path]["shape"][2:]:
            raise DataError(f"{show(pair)}: a latent of {sizes(about['shape'][2:])}, the one that it stands "
                            f"beside is {sizes(headers[path]['shape'][2:])}")
        if about["weights"] != autoencoder:
            raise DataError(f"{show(pair)}: latents of another autoencoder ({about['weights']}) than those "
                            f"beside the others ({autoencoder}); encode all with one")
    return dataclasses.replace(cond, concat_channels=about["shape"][1], concat_autoencoder=autoencoder)


def entry_of(root: Path, path: Path, number: int, about: Header, cond: CondConfig, concat: str | None,
             control: str | None) -> LatentEntry:
    """Volume `number` of a file."""
    try:
        told = conditions.vector(cond, about["spacing"], about["size"], about.get("kind"),
                                 about.get("region"))
    except ValueError as error:
        raise DataError(f"{show(path)}: {error}; cond.region and cond.by_class turn them off") from None
    name = path.name.removesuffix(latents.ENDING)
    if root.is_dir():
        name = name_below(root, path).removesuffix("_latent")
    if about["shape"][0] > 1:
        name += f"_t{number:03d}"
    channels = about["shape"][1] + cond.concat_channels
    if control is not None:
        channels += math.prod(cond.stride)
    affine = about["affine"] @ coarser(cond.stride)
    intensity = Intensity(str(about["modality"]), tuple(about["low"][number]), tuple(about["high"][number]))
    return LatentEntry(
        name, str(path), (channels, *about["shape"][2:]), spacing_of(affine), affine, intensity, str(path),
        label=told, file=about["source"], volume=number if about["shape"][0] > 1 else None,
        digest=digest_of([path]), patient=about["patient"], fold=about["fold"], number=number,
        variant=int(about["variant"]), concat=concat, control=control, stride=cond.stride,
    )


def coarser(stride: tuple[int, int, int]) -> np.ndarray:
    """X, Y, Z of a latent's elements -> those of the voxels, of which each lies in the middle of its own."""
    x, y, z = stride[::-1]
    scale = np.diag([x, y, z, 1.0]).astype(np.float64)
    scale[:3, 3] = (np.array([x, y, z]) - 1) / 2
    return scale


def tell_smallest(patch: tuple[int, int, int], entries: list[LatentEntry], say: Say) -> None:
    """Names latents that keep all crops below half of what most have along an axis, as a thin slab does."""
    for axis, least in zip((1, 2, 3), patch):
        edges = sorted(entry.shape[axis] for entry in entries)
        usual = edges[len(edges) // 2]
        if 2 * least < usual:
            thin = [entry for entry in entries if 2 * entry.shape[axis] < usual and not entry.variant]
            names = sorted(show(entry.name) for entry in thin)
            more = f" and {len(names) - 2} more" if len(names) > 2 else ""
            say(f"data: crops have {least} elements along {' DHW'[axis]}, where most latents have {usual}, "
                f"for {', '.join(names[:2])}{more}; without those they would be larger")


def patch_of(cfg: TrainConfig, entries: list[LatentEntry]) -> tuple[int, int, int]:
    """data.patch, else the largest that lies in every latent: a latent cannot be padded."""
    least = tuple(min(entry.shape[axis] for entry in entries) for axis in (1, 2, 3))
    if cfg.data.patch is None:
        return least
    if any(n > m for n, m in zip(cfg.data.patch, least)):
        raise DataError(f"data.patch={sizes(cfg.data.patch)} is counted in elements of latents, of which the "
                        f"smallest has {sizes(least)} along D,H,W; leave it out, or use less")
    return cfg.data.patch
