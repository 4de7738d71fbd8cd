"""Use a checkpoint: reconstruct, encode, decode and segment whole volumes of any size, and evaluate the network on them.

    python predict.py reconstruct --checkpoint runs/ct/best.pt --input scan.nii.gz --output out/
    python predict.py encode      --checkpoint runs/ct --input FOLDER --output latents/        # the latent mean, or indices of codes
    python predict.py decode      --checkpoint runs/ct --input latents/ --output out/          # equals reconstruct, to the bit
    python predict.py segment     --checkpoint runs/seg --input scan.nii.gz --output out/ --viz
    python predict.py evaluate    --checkpoint runs/ct --data FOLDER --json out.json --report out.html

The checkpoint alone says how a volume is prepared. What goes out lies on the source's grid: its affine, its order of axes, its number type
and its intensity scale, so HU come back as HU. An autoencoder runs by the exact tiles of vae3d.py: no blending, no seams. A U-Net's
receptive field is the whole volume, so it runs on windows that overlap (nnU-Net, doi:10.1038/s41592-020-01008-z).
Outputs are written whole or not at all; what is there already is skipped, so an interrupted folder goes on with the same command.

Shapes: C channels, D H W depth height width, Z latent channels, d h w latent depth height width, T volumes of a 4-D file, K classes.
Intensities in [-1, 1]; memory is in GiB. Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import gzip
import hashlib
import html
import json
import math
import os
import re
import signal
import sys
import tempfile
import time
import typing
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import train                                                     # first: it sets what must be set before torch loads  # isort: skip
import nibabel as nib
import numpy as np
import torch
from torch import Tensor

import checkpoints
import data
import losses
import pictures
import unet
import vae3d
from data import DataError, Intensity
from train import EXIT_DONE, EXIT_ERROR, EXIT_USAGE, TrainConfig
from unet import UNet
from vae3d import VAE3D

BUDGET = 4.0                                                     # GiB for which tiles are chosen; fixed, so that every run chooses alike
MOST_CLASSES = 12                                                # that are printed with their share of the voxels
LATENT = "_latent.npz"                                           # ending of what `encode` writes
DATA_FLAGS = ("modality", "nan", "max_gib", "channel_axis", "select_channel", "four_d")  # of section `data`, where a file asks for them
DATA_FLAGS += ("window", "hu_range", "percentiles", "percentiles_of", "voxel_scale", "spacing")  # what a foreign checkpoint does not know


# ------------------------------------------------------------------------------------------------------------------ the checkpoint

class Checkpoint(NamedTuple):
    """A network that is ready to be used, and what its run knew about the data."""
    path: Path
    cfg: TrainConfig
    model: VAE3D | UNet                                          # eval mode, on its device
    facts: dict                                                  # step (None: made elsewhere), latent, data: the file without its weights
    amp_dtype: torch.dtype | None                                # of autocast; None: float32
    precision: str                                               # the same in words
    fingerprint: str                                             # of the weights


def load_network(path: str | Path, tasks: Sequence[str] = ("vae", "seg"), device: str = "auto", amp: bool = False,
                 hints: str | None = None) -> Checkpoint:
    """The network of a run folder (best.pt, else last.pt), a checkpoint file or a foreign autoencoder, for which `hints` are
    (train.load_foreign). Raises ValueError, one line, for anything else."""
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: holds neither best.pt nor last.pt; name a run folder of train.py or a checkpoint")
        path = found[0]
    foreign = train.load_foreign(path, hints, "--hints") if "vae" in tasks else None
    if foreign:
        weights, facts = foreign.weights, {"latent": {}, "data": {}, "step": None}
        cfg = TrainConfig("vae", foreign.layout, vae=foreign.vae)
    else:
        content = checkpoints.load(path, "vae3d.weights", "vae3d.train")
        weights = content["ema"][0] if content.get("ema") else content["model"]
        cfg = train.config_from(content["config"], TrainConfig(), str(path))
        facts = {"latent": content["latent"] or {}, "data": content["data"], "step": content["step"]}
        if hints is not None:
            raise ValueError(f"{path}: a checkpoint of train.py, which says all that --hints could; leave the flag out")
    if cfg.task not in tasks:
        raise ValueError(f"{path}: a network for --task {cfg.task}; this command needs one for {' or '.join(tasks)}")
    where = train.pick_device(device)
    model = train.build_network(cfg)
    train.check_keys(model.state_dict(), weights, str(path))
    model.load_state_dict(weights)
    digest = hashlib.sha256(repr(cfg.vae).encode() if foreign else b"")                          # hints change results too
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    model = train.on_device(model, where).eval().requires_grad_(False)
    return Checkpoint(path, cfg, model, facts, *train.pick_precision(amp, where), digest.hexdigest()[:16])


def data_config(checkpoint: Checkpoint, labels: bool = False, **changes) -> data.DataConfig:
    """How the training run prepared its volumes; changes: fields of it that are not None."""
    cfg, facts = checkpoint.cfg.data, checkpoint.facts["data"]
    modality = facts.get("modality", "voxel" if checkpoint.cfg.loss.background == 0 else "auto") if cfg.modality == "auto" else cfg.modality
    values = facts.get("label_values", cfg.label_values)
    known = {"modality": modality, "labels": labels, "strict": False, "spacing": "original" if cfg.spacing == "random" else cfg.spacing,
             "label_values": None if values is None else tuple(values)}
    return dataclasses.replace(cfg, **known | {name: value for name, value in changes.items() if value is not None})


# ------------------------------------------------------------------------------------------------- volumes: the network on arrays

def set_tiles(vae: VAE3D, tile: Sequence[int] | str = "auto", budget: float | None = BUDGET) -> VAE3D:
    """Exact tiles for whole volumes: D,H,W, `auto` for the cheapest that the planner counts within `budget` GiB, or `none`.

    The planner counts a training step, more than inference takes. Its choice depends on the volume's size alone, so that every run, and
    `decode` after `encode`, computes the same bits.
    """
    if tile == "none":
        return vae.memory("none")
    return vae.memory("tile", tile, budget=budget if tile == "auto" else None)


@torch.no_grad()
def run_network(checkpoint: Checkpoint, work: Callable[[Tensor], Tensor], array: np.ndarray | Tensor) -> Tensor:
    """work(batch of one), in the checkpoint's precision and on its device."""
    device = next(checkpoint.model.parameters()).device
    x = torch.as_tensor(array)[None]
    x = train.to_device(x, device) if x.dim() == 5 else x.to(device)                             # indices have no channels
    with torch.autocast(device.type, checkpoint.amp_dtype, enabled=checkpoint.amp_dtype is not None):
        return work(x)


def encode_volume(checkpoint: Checkpoint, array: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
    """(C, D, H, W) normalised -> the latent mean (Z, d, h, w) float32, or the indices of its codes (d, h, w) int64.

    generator: a sample of the posterior instead of its mean. Raises ValueError for one with a codebook.
    """
    vae = checkpoint.model
    if generator is not None and vae.quantizer is not None:
        raise ValueError(f"--sample: vae.bottleneck is {vae.cfg.bottleneck}, whose codes have no noise; leave the flag out")
    found = run_network(checkpoint, vae.encode, array)
    if vae.quantizer is not None:
        return found.index[0].cpu().numpy()
    z = found.mu if generator is None else vae3d.sample_posterior(*found, generator)
    return z[0].float().contiguous().cpu().numpy()


def decode_volume(checkpoint: Checkpoint, latent: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """What `encode_volume` gave, and the (D, H, W) that went in -> (C, D, H, W) float32. ValueError where that is not finite."""
    vae = checkpoint.model
    decode = vae.decode if vae.quantizer is None else vae.decode_indices
    recon = run_network(checkpoint, lambda z: decode(z, size), latent)[0].float().contiguous().cpu().numpy()
    if not (np.isfinite(recon.min()) and np.isfinite(recon.max())):  # a nan makes both of them nan; no copy of the volume
        raise ValueError("the reconstruction is not finite" + "; leave --amp out" * (checkpoint.amp_dtype is not None))
    return recon


def reconstruct_volume(checkpoint: Checkpoint, array: np.ndarray) -> np.ndarray:
    """(C, D, H, W) normalised -> its reconstruction, the same shape; the very bits of decode_volume(encode_volume(array))."""
    return decode_volume(checkpoint, encode_volume(checkpoint, array), array.shape[1:])


def window_logits(checkpoint: Checkpoint, array: np.ndarray, window: Sequence[int], overlap: float = 0.5, background: float = -1.0,
                  tick: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Tensor]:
    """unet.window_logits of (C, D, H, W) normalised, in the checkpoint's precision: logits (K, slab, H, W) float32 on the CPU."""
    return unet.window_logits(lambda x: run_network(checkpoint, lambda y: checkpoint.model(y).logits, x[0]), torch.from_numpy(array)[None],
                              window, overlap, background, tick)


def class_scores(logits: Tensor, threshold: float | None) -> Tensor:
    """Logits (K, ...) -> scores whose argmax is the class. One logit, or two with a threshold: class 1 above that probability."""
    if len(logits) == 1:
        logits = torch.cat([torch.zeros_like(logits), logits])
    if threshold is None:
        return logits
    if len(logits) != 2:
        raise ValueError(f"--mask-threshold: the network has {len(logits)} classes, a threshold decides between two; leave the flag out")
    return torch.stack([logits[0] + math.log(threshold / (1 - threshold)), logits[1]])


def segment_volume(checkpoint: Checkpoint, array: np.ndarray, window: Sequence[int] | None = None, overlap: float = 0.5,
                   background: float = -1.0, threshold: float | None = None, size: Sequence[int] | None = None,
                   tick: Callable[[int, int], None] = lambda done, total: None) -> np.ndarray:
    """(C, D, H, W) normalised -> classes (D, H, W) int16; see `window_logits`. window: None: the run's crops; background: the volume's.

    size: of a grid over the same field of view that the classes are wanted on; then the scores are resampled, linearly.
    """
    slabs = window_logits(checkpoint, array, window or checkpoint.cfg.data.patch, overlap, background, tick)
    if size is None or tuple(size) == array.shape[1:]:
        return np.concatenate([class_scores(slab, threshold).argmax(0).to(torch.int16).numpy() for slab in slabs])
    scores = torch.cat([class_scores(slab, threshold) for slab in slabs], 1)
    best, found = None, np.zeros(size, dtype=np.int16)
    for k in range(len(scores)):                                 # one class at a time: the source's grid is often the finer one
        score = data.resample(scores[k:k + 1].numpy(), np.eye(4), tuple(size))[0][0]
        better = np.zeros(size, dtype=bool) if best is None else score > best
        found[better] = k
        best = score if best is None else np.where(better, score, best)
    return found


# ----------------------------------------------------------------------------------------- files: from the source's grid and back

@dataclass(frozen=True)
class Origin:
    """How a source lay on disk: what it takes to write a result onto its grid. Plain values, kept in latents as JSON."""
    kind: str                                                    # .nii.gz | .npy | .npz | .png: what goes out
    shape: tuple[int, ...]                                       # as stored
    dtype: str                                                   # as stored
    size: tuple[int, int, int]                                   # D, H, W of the source in RAS
    key: str = "volume"                                          # .npz: name of the array
    channel_axis: int | None = None                              # .npy, .npz of 4 axes
    header: str = ""                                             # image: NIfTI-1 header, hexadecimal
    affine: tuple[tuple[float, ...], ...] = ()                   # image: of the axes as stored
    slope: float = 1.0                                           # image: value = slope * stored + inter
    inter: float = 0.0

    @property
    def bits(self) -> int:
        """Of the voxels on disk, uncompressed."""
        return 8 * np.dtype(self.dtype).itemsize * math.prod(self.shape)


class Case(NamedTuple):
    """A file, prepared as the checkpoint's run prepared its own."""
    volumes: list[tuple[np.ndarray, Intensity]]                  # each (C, D, H, W); T of a series
    affine: np.ndarray                                           # of the network's grid
    spacing: tuple[float, float, float]
    labels: list[np.ndarray]                                     # (D, H, W) of the network's grid, class numbers
    origin: Origin


def read_case(item: data.Item, checkpoint: Checkpoint, cfg: data.DataConfig) -> Case:
    """Raises DataError, one line that names the file, for one that cannot be read or does not fit the network."""
    loaded = data.load(item, cfg)
    if loaded.guessed and cfg.modality == "auto":
        clear_line()
        print(f"{data.show(item.path)}: taken for {loaded.volumes[0][1].modality} by its values; --data.modality says otherwise")
    wanted = checkpoint.model.cfg.in_channels
    if (found := len(loaded.volumes[0][0])) != wanted:
        raise DataError(f"{item.path}: {found} channel{'s' * (found > 1)}, the checkpoint takes {wanted}; use --data.select_channel or "
                        f"--data.four_d, or a checkpoint for such files")
    labels = [classes_of_labels(label, item, checkpoint, cfg) for label in loaded.labels]
    return Case(loaded.volumes, loaded.affine, loaded.spacing, labels, origin_of(item.path, loaded.source, cfg))


def classes_of_labels(label: np.ndarray, item: data.Item, checkpoint: Checkpoint, cfg: data.DataConfig) -> np.ndarray:
    """Stored values (D, H, W) -> class numbers int64; the ignored value stays. Raises DataError for a value that is no class."""
    ignore, classes = checkpoint.cfg.data.ignore_label, max(2, checkpoint.cfg.unet.out_channels)
    found = label.astype(np.int64)
    if cfg.label_values is not None:
        if checkpoint.cfg.data.label_values is None:             # not the user's choice: what the training labels held
            unknown = np.setdiff1d(np.unique(label), [*cfg.label_values, *([] if ignore is None else [ignore])])
            if len(unknown):
                raise DataError(f"{item.label}: holds the label {unknown[0]:g}, the training labels held {list(cfg.label_values)}; give "
                                f"the stored value of each class, background first, as --data.label_values")
        found = np.zeros_like(found)
        for k, value in enumerate(cfg.label_values):
            found[label == value] = k
    if ignore is not None:
        found[label == ignore] = ignore
    wrong = np.setdiff1d(np.unique(found), [*range(classes), *([] if ignore is None else [ignore])])
    if len(wrong):
        raise DataError(f"{item.label}: holds the label {wrong[0]}, the checkpoint's classes are 0 to {classes - 1}; give the stored value "
                        f"of each class, background first, as --data.label_values")
    return found


def origin_of(path: Path, source: data.Source, cfg: data.DataConfig) -> Origin:
    """Of a file that has been read already, from its header."""
    kind, size = data._suffix(path)[0], source.volume.array.shape[1:]
    if kind in data.PICTURES:
        return Origin(".png", source.volume.array.shape, source.dtype, size)
    if kind in (".npy", ".npz"):
        shape, key = stored_array(path, kind)
        if shape is None:                                        # a sparse grid comes back dense
            array = source.volume.array
            return Origin(kind, (*array.shape[:0:-1], len(array)), source.dtype, size, key, -1)
        axis = data._channel_axis(shape, cfg.channel_axis) if len(shape) == 4 else None
        return Origin(kind, shape, source.dtype, size, key, axis)
    with data.quiet():
        image = nib.load(path)
    header = nib.Nifti1Header.from_header(image.header, check=False).as_byteswapped("<")
    is_plain = type(image.dataobj) is nib.arrayproxy.ArrayProxy  # others scale by slice: their values are no integers of one scale
    dtype, slope, inter = (source.dtype, float(image.dataobj.slope), float(image.dataobj.inter)) if is_plain else ("float32", 1.0, 0.0)
    return Origin(".nii.gz", tuple(map(int, image.shape)), dtype, size, header=header.binaryblock.hex(),
                  affine=tuple(tuple(map(float, row)) for row in image.affine), slope=slope, inter=inter)


def stored_array(path: Path, kind: str) -> tuple[tuple[int, ...] | None, str]:
    """Shape of a .npy, or of the volume of an .npz with its name; no shape for a sparse one. Only headers are read."""
    def header(stream) -> tuple[int, ...]:
        version = np.lib.format.read_magic(stream)
        return {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version](stream)[0]
    if kind == ".npy":
        with open(path, "rb") as stream:
            return header(stream), ""
    with zipfile.ZipFile(path) as archive:
        names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        keys = [key for key in data.DENSE_KEYS if key in names] or list(names)[:len(names) == 1]
        if not keys:
            return None, data.DENSE_KEYS[0]
        with archive.open(names[keys[0]]) as stream:
            return header(stream), keys[0]


def to_source_grid(volumes: Sequence[tuple[np.ndarray, Intensity]], affine: np.ndarray, origin: Origin) -> np.ndarray:
    """Network intensities, T times (C, D, H, W) on the network's grid -> the file's scale and grid, (T * C, D, H, W) float32."""
    out = np.empty((sum(len(volume) for volume, _ in volumes), *origin.size), dtype=np.float32)
    at = 0
    for volume, intensity in volumes:
        if volume.shape[1:] != origin.size:
            volume, _ = data.resample(volume, affine, origin.size)
        for d in range(origin.size[0]):                          # slice by slice: denormalise works in float64
            out[at:at + len(volume), d:d + 1] = data.denormalise(volume[:, d:d + 1], intensity)
        at += len(volume)
    return out


def in_stored_type(array: np.ndarray, origin: Origin) -> np.ndarray:
    """Values -> what stands for them on disk: whole numbers rounded and clipped to their type, everything else float32."""
    dtype = np.dtype(origin.dtype)
    if dtype.kind not in "iub":
        return array
    low, high = (0.0, 1.0) if dtype.kind == "b" else (float(np.iinfo(dtype).min), float(np.iinfo(dtype).max))
    if dtype.kind != "b" and int(high) > np.iinfo(dtype).max:    # 2^63 - 1 is no float64
        high = float(np.nextafter(high, 0))
    out = np.empty(array.shape, dtype.newbyteorder("="))
    for d in range(array.shape[1]):
        out[:, d] = np.clip(np.rint((array[:, d].astype(np.float64) - origin.inter) / origin.slope), low, high)
    return out


def in_stored_axes(array: np.ndarray, origin: Origin) -> np.ndarray:
    """(C, D, H, W) -> the source's order and direction of axes, and its shape where the number of channels is the source's."""
    if origin.kind == ".png":
        return array[0, 0] if len(array) == 1 else array[:, 0].transpose(1, 2, 0)                # (H, W) or (H, W, C)
    if origin.kind == ".nii.gz":
        x = array.transpose(3, 2, 1, 0)                                                          # (X, Y, Z, T), RAS
        back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(np.array(origin.affine)))
        x, channels = nib.apply_orientation(x, back), -1
    else:
        x = array.transpose(0, 3, 2, 1)                                                          # (C, X, Y, Z)
        channels = -1 if origin.channel_axis is None else origin.channel_axis
        x = np.moveaxis(x, 0, channels)
    if x.size == math.prod(origin.shape):
        return x.reshape(origin.shape)
    return x.squeeze(channels) if len(array) == 1 else x         # other channels than the source's: one of them, or labels


def write_volume(path: Path, array: np.ndarray, origin: Origin, slope: float = 1.0, inter: float = 0.0) -> None:
    """(C, D, H, W) in the type that is wanted on disk -> a file on the source's grid, whole or not at all."""
    stored = np.ascontiguousarray(in_stored_axes(array, origin))

    def write(file: typing.BinaryIO) -> None:
        if origin.kind == ".npy":
            np.save(file, stored)
        elif origin.kind == ".npz":
            np.savez_compressed(file, **{origin.key: stored})
        elif origin.kind == ".png":
            try:
                from PIL import Image
            except ImportError:
                raise DataError(f"{path}: pictures are written with Pillow: python -m pip install pillow") from None
            Image.fromarray(stored if stored.dtype == np.uint8 else stored.astype(np.uint16)).save(file, "PNG")
        else:
            header = nib.Nifti1Header(bytes.fromhex(origin.header), check=False)
            header.set_data_shape(stored.shape)
            header.set_data_dtype(stored.dtype)
            header["cal_min"] = header["cal_max"] = 0            # the display range of other values
            with data.quiet():
                image = nib.Nifti1Image(stored, np.array(origin.affine), header, dtype=stored.dtype)
            image.header.set_slope_inter(slope, inter)
            with gzip.GzipFile("", "wb", 4, file, mtime=0) as packed:
                image.to_stream(packed)
    save(path, write)


def write_result(path: Path, volumes: Sequence[tuple[np.ndarray, Intensity]], affine: np.ndarray, origin: Origin) -> None:
    """Network intensities -> a file like its source: intensities, number type, grid."""
    stored = in_stored_type(to_source_grid(volumes, affine, origin), origin)
    is_whole = stored.dtype.kind in "iu"
    write_volume(path, stored, origin, origin.slope if is_whole else 1.0, origin.inter if is_whole else 0.0)


def save(path: Path, write: Callable[[typing.BinaryIO], object]) -> None:
    """Atomically; nothing is left behind when it fails or is stopped."""
    try:
        checkpoints.write_atomic(path, write)
    except BaseException:
        path.with_name(path.name + ".tmp").unlink(missing_ok=True)
        raise


# -------------------------------------------------------------------------------------------------------------------- latent files

class Latents(NamedTuple):
    """What lies between `encode` and `decode`."""
    arrays: list[np.ndarray]                                     # T times (Z, d, h, w) float32, or (d, h, w) of indices
    intensities: list[Intensity]
    affine: np.ndarray                                           # of the network's grid
    size: tuple[int, int, int]                                   # D, H, W of that grid
    fingerprint: str                                             # of the weights that encoded it
    origin: Origin


def write_latents(path: Path, latents: Latents, checkpoint: Checkpoint, sampled: bool = False) -> None:
    """An .npz of numbers and one JSON text; no pickles.

    latent (T, Z, d, h, w) float32, or index (T, d, h, w); affine (4, 4) of the RAS grid of `size` (D, H, W) voxels that was encoded;
    scale_factor (nan when the run has not measured it); low, high (T, C): intensities of -1 and 1; about: the rest.
    """
    vae = checkpoint.model
    stack = np.stack(latents.arrays)
    if vae.quantizer is not None:
        stack = stack.astype(np.min_scalar_type(vae.quantizer.num_codes - 1))
    about = {"version": 1, "modality": latents.intensities[0].modality, "bottleneck": vae.cfg.bottleneck, "sampled": sampled,
             "weights": latents.fingerprint, "origin": dataclasses.asdict(latents.origin)}
    content = {"latent" if vae.quantizer is None else "index": stack, "affine": latents.affine, "size": np.array(latents.size),
               "scale_factor": np.float64(checkpoint.facts["latent"].get("scale_factor", math.nan)),
               "low": np.array([i.low for i in latents.intensities]), "high": np.array([i.high for i in latents.intensities]),
               "about": np.array(json.dumps(about))}
    save(path, lambda file: np.savez_compressed(file, **content))


def latent_origin(about: dict) -> Origin:
    values = dict(about["origin"])
    values |= {"shape": tuple(values["shape"]), "size": tuple(values["size"]), "affine": tuple(map(tuple, values["affine"]))}
    np.dtype(values["dtype"])                                    # TypeError where it names none
    return Origin(**values)


def read_latents(path: Path, vae: VAE3D) -> Latents:
    """Raises DataError, one line, for a file that `encode` did not write or that another kind of network did."""
    try:
        with np.load(path, allow_pickle=False) as content:
            about = json.loads(str(content["about"]))
            origin, fingerprint = latent_origin(about), str(about["weights"])
            for name, kinds in (("size", "iu"), ("affine", "f"), ("low", "f"), ("high", "f")):
                if content[name].dtype.kind not in kinds or not np.isfinite(content[name]).all():
                    raise ValueError(f"its {name} is not of finite numbers")
            size, affine = tuple(int(n) for n in content["size"]), content["affine"].reshape(4, 4)
            if not content["low"].shape == content["high"].shape == (len(content["low"]), vae.cfg.in_channels) or not len(content["low"]):
                raise ValueError(f"its low and high are not of {vae.cfg.in_channels} channels")
            intensities = [Intensity(str(about["modality"]), tuple(low), tuple(high)) for low, high in zip(content["low"], content["high"])]
            stack = content["latent" if "latent" in content else "index"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except Exception as error:                                   # damaged bytes may raise anything at all; the cause stays chained
        raise DataError(f"{path}: is no latent of predict.py encode ({type(error).__name__}: {train.line_of(error)[:120]})") from error
    z, cfg = vae.latent_size(size), vae.cfg
    wanted = (len(intensities), cfg.z_channels, *z) if vae.quantizer is None else (len(intensities), *z)
    if stack.shape != wanted or stack.dtype.kind not in ("f" if vae.quantizer is None else "iu"):
        raise DataError(f"{path}: holds {about.get('bottleneck')} latents {stack.dtype} {stack.shape}, this checkpoint "
                        f"({cfg.bottleneck}) makes {wanted} of {data._sizes(size)}; decode it with the checkpoint that encoded it")
    if vae.quantizer is not None:
        stack = stack.astype(np.int64)
        if stack.min() < 0 or stack.max() >= vae.quantizer.num_codes:
            raise DataError(f"{path}: holds code {stack.max()}, the codebook has {vae.quantizer.num_codes}; decode it with the checkpoint "
                            f"that encoded it")
    elif not np.isfinite(stack).all():
        raise DataError(f"{path}: holds NaN or infinite latents; encode its source again")
    return Latents(list(stack), intensities, affine, size, fingerprint, origin)


# ------------------------------------------------------------------------------------------------------------------- many files

class Job(NamedTuple):
    item: data.Item
    output: Path


def list_inputs(paths: Sequence[str], labels: bool = False, split: str = "all", output: str | None = None) -> list[data.Item]:
    """Files, folders and datalists -> items, each once. Raises DataError when there are none.

    Of a folder, latents are left out, and so is an output folder inside of it: what a first run wrote is no input of the next.
    """
    found: dict[str, data.Item] = {}
    for path in paths:
        own = output and os.path.isdir(path) and Path(os.path.realpath(output))
        inside = own and Path(os.path.realpath(path)) in own.parents
        for name, items in data.list_items(path, labels, print).items():
            for item in items if split in ("all", name) else ():
                real = os.path.realpath(item.path)
                if not (os.path.isdir(path) and real.endswith(LATENT)) and not (inside and own in Path(real).parents):
                    found.setdefault(real, item)
    if not found:
        raise DataError(f"{', '.join(paths)}: no volumes found{f' in the list {split}' * (split != 'all')}; looked for {data.FORMATS}")
    return list(found.values())


def list_latents(paths: Sequence[str]) -> list[data.Item]:
    """Latent files, folders of them and datalists -> items."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += [data.Item(file) for file in sorted(Path(path).rglob("*" + LATENT))]
        else:
            found += [item for items in data.list_items(path).values() for item in items]
    if not found:
        raise DataError(f"{', '.join(paths)}: no *{LATENT} files; predict.py encode writes them")
    return found


def kind_of(path: Path) -> str:
    """The ending of a result: arrays and pictures keep theirs, what nibabel reads goes out as NIfTI."""
    kind = data._suffix(path)[0]
    return kind if kind in (".npy", ".npz") else ".png" if kind in data.PICTURES else ".nii.gz"


def make_jobs(items: Sequence[data.Item], inputs: Sequence[str], output: str, ending: Callable[[Path], str]) -> list[Job]:
    """Each item with the file that is made of it: its stem, in the subfolder that it has in an input folder, numbered where two share one.

    ValueError when that would replace an input.
    """
    folder, taken, jobs = Path(os.path.expanduser(output)), set(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be made a folder ({error.strerror})") from None
    roots = [Path(os.path.realpath(path)) for path in inputs if os.path.isdir(path)]
    sources = {os.path.realpath(file) for item in items for file in (item.path, item.label) if file}
    for item in items:
        stem, end, number = data._stem(item.path), ending(item.path), 2
        stem = stem.removesuffix("_latent") if item.path.name.endswith(LATENT) else stem
        parent = Path(os.path.realpath(item.path)).parent
        within = next((parent.relative_to(root) for root in roots if parent.is_relative_to(root)), Path())
        name = within / (stem + end)
        while name in taken:
            name, number = within / f"{stem}-{number}{end}", number + 1
        taken.add(name)
        if os.path.realpath(folder / name) in sources:
            raise ValueError(f"--output {folder}: {name} there is one of the inputs and would be overwritten; choose another folder")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jobs.append(Job(item, folder / name))
    return jobs


def run_jobs(jobs: Sequence[Job], work: Callable[[Job], str], overwrite: bool) -> int:
    """work(job) -> what to say of it, for each job whose output is not there. Failures are told at the end. Returns the exit code."""
    open_jobs = [job for job in jobs if overwrite or not job.output.exists()]
    if done := len(jobs) - len(open_jobs):
        example = next(job.output for job in jobs if job not in open_jobs)
        print(f"{done} of {len(jobs)} outputs are there, such as {example}: skipped (--overwrite makes them anew)", flush=True)
    failed = []
    for number, job in enumerate(open_jobs, 1):
        started = time.monotonic()
        with failures_in(failed, job.item.path):
            if sys.stdout.isatty():
                print(f"[{number}/{len(open_jobs)}] {data.show(job.item.path)} ...", end="", flush=True)
            text = work(job)
            clear_line()
            print(f"[{number}/{len(open_jobs)}] {data.show(job.item.path)}: {text}, {time.monotonic() - started:.1f} s", flush=True)
    return tell_failures(failed, len(open_jobs))


@contextlib.contextmanager
def failures_in(failed: list[dict], path: Path) -> Iterator[None]:
    """What is wrong with one file, or too large of it, goes to `failed`, and the others go on."""
    try:
        yield
    except DataError as error:
        failed.append({"file": str(path), "error": train.line_of(error)})
    except (ValueError, OSError) as error:
        failed.append({"file": str(path), "error": f"{path}: {train.line_of(error)}"})
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not train.is_out_of_memory(error):
            raise
        failed.append({"file": str(path), "error": f"{path}: out of memory; use a smaller --tile, --memory or --window, or --device cpu"})
    if failed and failed[-1]["file"] == str(path):
        clear_line()
        print(f"{data.show(path)}: failed, see the end", flush=True)


def tell_failures(failed: Sequence[dict], total: int) -> int:
    for row in failed:
        print(f"predict.py: {data.show(row['error'])}", file=sys.stderr)
    if failed:
        print(f"predict.py: {len(failed)} of {total} failed", file=sys.stderr)
    return EXIT_ERROR if failed else EXIT_DONE


def show_progress(path: Path) -> Callable[..., None]:
    """A line on the terminal that says how far a long volume is; nothing in a pipe."""
    shown = [time.monotonic()]

    def tick(done: float, total: int, part: str = "windows") -> None:
        if sys.stdout.isatty() and time.monotonic() - shown[0] > 0.5:
            shown[0] = time.monotonic()
            print(f"\r{data.show(path.name)}: {part} {100 * done / total:.0f} %\x1b[K", end="", flush=True)
    return tick


def clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\x1b[K", end="")


def speed(volumes: Sequence[np.ndarray], started: float) -> str:
    """Size and voxels a second since `started`."""
    voxels, seconds = sum(volume[0].size for volume in volumes), time.monotonic() - started
    many = f"{len(volumes)} x " * (len(volumes) > 1)
    return f"{many}{data._sizes(volumes[0].shape[1:])}, {short_number(voxels / max(seconds, 1e-9))} voxels/s"


# ------------------------------------------------------------------------------------------------------------------ the commands

def open_unet(checkpoint: Checkpoint, options: argparse.Namespace, labels: bool = False) -> tuple[data.DataConfig, np.ndarray]:
    """How its volumes are prepared, and the stored value of each class. Raises ValueError for flags that do not fit its classes."""
    cfg, classes = data_config(checkpoint, labels, **data_changes(options)), max(2, checkpoint.cfg.unet.out_channels)
    if options.mask_threshold is not None and classes != 2:
        raise ValueError(f"--mask-threshold: the network has {classes} classes, a threshold decides between two; leave the flag out")
    values = range(classes) if cfg.label_values is None else cfg.label_values
    if len(values) != classes:
        raise ValueError(f"--data.label_values: {len(values)} values, the network has {classes} classes; give one for each")
    return cfg, np.array(values)


def open_vae(options: argparse.Namespace) -> tuple[Checkpoint, data.DataConfig]:
    checkpoint = load_network(options.checkpoint, ("vae",), options.device, options.amp, options.hints)
    set_tiles(checkpoint.model, options.tile, options.memory)
    print(describe(checkpoint), flush=True)
    return checkpoint, data_config(checkpoint, **data_changes(options))


def describe(checkpoint: Checkpoint) -> str:
    cfg, model = checkpoint.cfg, checkpoint.model
    kind = f"autoencoder ({cfg.vae.bottleneck})" if cfg.task == "vae" else f"U-Net of {max(2, cfg.unet.out_channels)} classes"
    low, high = cfg.vae.intensity_range
    known = f"step {checkpoint.facts['step']}" if checkpoint.facts["step"] is not None else f"for intensities of {low:g} to {high:g}"
    return (f"{checkpoint.path}: {kind} {cfg.preset}, {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{known}; {next(model.parameters()).device}, {checkpoint.precision.removesuffix(' with a GradScaler')}")


def reconstruct(options: argparse.Namespace) -> int:
    checkpoint, cfg = open_vae(options)

    def work(job: Job) -> str:
        case = read_case(job.item, checkpoint, cfg)
        started, volumes = time.monotonic(), [volume for volume, _ in case.volumes]
        checkpoint.model.progress = show_progress(job.item.path)
        results = [(reconstruct_volume(checkpoint, volume), intensity) for volume, intensity in case.volumes]
        text = speed(volumes, started)
        write_result(job.output, results, case.affine, case.origin)
        return f"{text} -> {job.output}"
    jobs = make_jobs(list_inputs(options.input, output=options.output), options.input, options.output, kind_of)
    return run_jobs(jobs, work, options.overwrite)


def encode(options: argparse.Namespace) -> int:
    checkpoint, cfg = open_vae(options)
    if options.sample and checkpoint.model.quantizer is not None:
        raise ValueError(f"--sample: vae.bottleneck is {checkpoint.cfg.vae.bottleneck}, whose codes have no noise; leave the flag out")
    if not checkpoint.facts["latent"] and checkpoint.model.quantizer is None:
        why = "its run has not finished" if checkpoint.facts["step"] is not None else "not from train.py"
        print(f"{checkpoint.path}: {why}, so the latent's scale factor is not known (nan)")

    def work(job: Job) -> str:
        case = read_case(job.item, checkpoint, cfg)
        started, volumes, arrays = time.monotonic(), [volume for volume, _ in case.volumes], []
        checkpoint.model.progress = show_progress(job.item.path)
        for number, volume in enumerate(volumes):
            seed = train.seed_of(options.seed, "sample", job.output.name, number)
            generator = torch.Generator().manual_seed(seed) if options.sample else None
            arrays.append(encode_volume(checkpoint, volume, generator))
        text = speed(volumes, started)
        latents = Latents(arrays, [i for _, i in case.volumes], case.affine, volumes[0].shape[1:], checkpoint.fingerprint, case.origin)
        write_latents(job.output, latents, checkpoint, options.sample)
        return f"{text} -> {job.output}"
    jobs = make_jobs(list_inputs(options.input, output=options.output), options.input, options.output, lambda path: LATENT)
    return run_jobs(jobs, work, options.overwrite)


def decode(options: argparse.Namespace) -> int:
    checkpoint, _ = open_vae(options)

    def ending(path: Path) -> str:
        with contextlib.suppress(Exception), np.load(path, allow_pickle=False) as content:  # told by read_latents when its turn comes
            return latent_origin(json.loads(str(content["about"]))).kind
        return ".nii.gz"

    def work(job: Job) -> str:
        latents = read_latents(job.item.path, checkpoint.model)
        if latents.fingerprint != checkpoint.fingerprint:
            print(f"{data.show(job.item.path)}: was encoded with other weights than {checkpoint.path}")
        started, checkpoint.model.progress = time.monotonic(), show_progress(job.item.path)
        volumes = [decode_volume(checkpoint, array, latents.size) for array in latents.arrays]
        text = speed(volumes, started)
        write_result(job.output, list(zip(volumes, latents.intensities)), latents.affine, latents.origin)
        return f"{text} -> {job.output}"
    return run_jobs(make_jobs(list_latents(options.input), options.input, options.output, ending), work, options.overwrite)


def segment(options: argparse.Namespace) -> int:
    checkpoint = load_network(options.checkpoint, ("seg",), options.device, options.amp)
    cfg, values = open_unet(checkpoint, options)
    if options.output is None and (options.viz or not options.no_save):
        raise ValueError("--output FOLDER is needed, unless --no-save is given without --viz")
    print(describe(checkpoint), flush=True)

    def work(job: Job) -> str:
        case = read_case(job.item, checkpoint, cfg)
        started, volumes, found = time.monotonic(), [volume for volume, _ in case.volumes], []
        for volume, intensity in case.volumes:
            found.append(segment_volume(checkpoint, volume, options.window, options.overlap, intensity.background, options.mask_threshold,
                                        case.origin.size, show_progress(job.item.path)))
        text = speed(volumes, started)
        if options.viz:
            plain = data.resample_label(found[0], volumes[0].shape[1:])
            picture = pictures.label_comparison(torch.from_numpy(volumes[0]), [torch.from_numpy(plain)], case.spacing,
                                                case.origin.kind == ".png")
            save(viz_path(job.output), lambda file: file.write(pictures.png(picture)))
        if not options.no_save:                                  # last: its presence says that the job is done
            labels = values[np.stack(found)].astype(np.uint8 if values.max() < 256 else np.int16)
            write_volume(job.output, labels, dataclasses.replace(case.origin, key=data.LABEL_KEYS[0]))
        shares = np.bincount(np.stack(found).reshape(-1), minlength=len(values)) / sum(f.size for f in found)
        largest = sorted(k for k in 1 + np.argsort(-shares[1:], kind="stable")[:MOST_CLASSES] if shares[k])
        more = int(np.count_nonzero(shares[1:])) - len(largest)
        text += "; " + (", ".join(f"{values[k]}: {100 * shares[k]:.3g} %" for k in largest) or "no foreground")
        text += f" and {more} smaller" * (more > 0)
        return text + f" -> {job.output}" * (not options.no_save)
    items = list_inputs(options.input, output=options.output)
    jobs = [Job(item, Path()) for item in items] if options.output is None else make_jobs(items, options.input, options.output,
                                                                                                       kind_of)
    return run_jobs(jobs, work, options.overwrite or options.no_save)


def viz_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix("".join(data._suffix(output))) + "_viz.png")


# -------------------------------------------------------------------------------------------------------------------- evaluation

def evaluate(options: argparse.Namespace) -> int:
    checkpoint = load_network(options.checkpoint, ("vae", "seg"), options.device, options.amp, options.hints)
    is_seg = checkpoint.cfg.task == "seg"
    if is_seg:
        cfg, _ = open_unet(checkpoint, options, labels=True)
    else:
        cfg = data_config(checkpoint, **data_changes(options))
        set_tiles(checkpoint.model, options.tile, options.memory)
    for path in (options.json, options.report):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist; make it first")
    print(describe(checkpoint), flush=True)
    items = list_inputs([options.data], is_seg, "all" if options.split == "held-out" else options.split)
    if options.split == "held-out":
        items = held_out(items, checkpoint)
    device = next(checkpoint.model.parameters()).device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rows, failed, totals = [], [], Totals()
    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(items, 1):
            with failures_in(failed, item.path):
                case = read_case(item, checkpoint, cfg)
                for t, (volume, intensity) in enumerate(case.volumes):
                    row = {"file": str(item.path)} | ({"volume": t} if len(case.volumes) > 1 else {})
                    if is_seg:
                        label = case.labels[min(t, len(case.labels) - 1)]
                        scores, shown = evaluate_labels(checkpoint, volume, intensity.background, label, options, totals,
                                                        show_progress(item.path))
                    else:
                        checkpoint.model.progress = show_progress(item.path)
                        scores, shown = evaluate_volume(checkpoint, volume, intensity, case.origin, len(case.volumes), totals)
                    rows.append(row | {"shape": list(volume.shape[1:])} | scores)
                    if options.report:
                        truth, is_picture = label if is_seg else None, case.origin.kind == ".png"
                        panels = report_panels(volume, shown, truth, intensity, case.spacing, is_picture)
                        Path(folder, f"{len(rows) - 1}.html").write_text(report_figure(rows[-1], panels), encoding="utf-8")
                    clear_line()
                    which = f" volume {t}" * (len(case.volumes) > 1)
                    print(f"[{number}/{len(items)}] {data.show(item.path)}{which}: {row_text(rows[-1])}", flush=True)
        result = summary(checkpoint, rows, failed, totals, device)
        print_table(result)
        if options.json:
            text = json.dumps(finite(result), indent=1) + "\n"
            save(Path(options.json), lambda file: file.write(text.encode()))
        if options.report and rows:
            chosen = worst_median_best(rows, "dice" if is_seg else "psnr")
            figures = {name: Path(folder, f"{index}.html").read_text(encoding="utf-8") for name, index in chosen.items()}
            page = report_page(checkpoint, result, figures, options.data)
            save(Path(options.report), lambda file: file.write(page.encode()))
    return tell_failures(failed, len(items))


def held_out(items: Sequence[data.Item], checkpoint: Checkpoint) -> list[data.Item]:
    """Those that the run did not train on, told by their names. Raises ValueError when there are none, or the checkpoint has no names."""
    names = checkpoint.facts["data"].get("training")
    if names is None:
        raise ValueError(f"--split held-out: {checkpoint.path} does not name its training files; leave the flag out")
    trained = {re.sub(r"_t\d{3,}$", "", name) for name in names} | set(names)                   # volume 3 of a 4-D X is X_t003
    left = [item for item in items if data._stem(item.path) not in trained]
    if not left:
        raise ValueError(f"--split held-out: all of {len(items)} files were trained on; leave the flag out")
    return left


@dataclass
class Totals:
    """Over all volumes."""
    voxels: int = 0
    seconds: float = 0.0
    usage: Tensor | int = 0                                      # (K,): choices of each code
    counts: Tensor | int = 0                                     # (2, K): see losses.dice_scores


def evaluate_volume(checkpoint: Checkpoint, volume: np.ndarray, intensity: Intensity, origin: Origin, count: int,
                    totals: Totals) -> tuple[dict, np.ndarray]:
    """Figures of one whole volume (C, D, H, W), and its reconstruction. count: volumes that share the source's voxels."""
    vae, started = checkpoint.model, time.monotonic()
    latent = encode_volume(checkpoint, volume)
    recon = decode_volume(checkpoint, latent, volume.shape[1:])
    seconds = time.monotonic() - started
    device = next(vae.parameters()).device
    a, b = (torch.from_numpy(array)[None].to(device) for array in (recon, volume))
    scores = fidelity(a, b) | {"sharpness": float(losses.sharpness(a, b))}
    if intensity.modality == "voxel":
        scores["iou"] = float(losses.occupancy_iou(a, b, intensity.background))
    if len(volume) > 1:
        scores["channels"] = [fidelity(a[:, c:c + 1], b[:, c:c + 1]) for c in range(len(volume))]
    voxels, source_bits = math.prod(origin.size), origin.bits / count
    for bits, name in ((32, ""), (16, "_16")) if vae.quantizer is None else ((math.log2(vae.quantizer.num_codes), ""),):
        scores[f"bits_per_voxel{name}"] = latent.size * bits / voxels
        scores[f"compression{name}"] = source_bits / (latent.size * bits)
    if vae.quantizer is not None:
        usage = torch.bincount(torch.from_numpy(latent).flatten(), minlength=vae.quantizer.num_codes)
        totals.usage = totals.usage + usage
        scores |= train.codebook_use(usage)
    totals.voxels, totals.seconds = totals.voxels + volume[0].size, totals.seconds + seconds
    return scores | {"seconds": seconds, "voxels_per_second": volume[0].size / seconds}, recon


def fidelity(recon: Tensor, target: Tensor) -> dict[str, float]:
    """(1, C, D, H, W) of normalised intensities, data range 2."""
    return {"psnr": float(losses.psnr(recon, target)), "ssim": float(losses.ssim(recon, target)),
            "l1": float(losses.reconstruction_loss(recon, target, "l1"))}


def evaluate_labels(checkpoint: Checkpoint, volume: np.ndarray, background: float, label: np.ndarray, options: argparse.Namespace,
                    totals: Totals, tick: Callable[[int, int], None]) -> tuple[dict, np.ndarray]:
    """Dice of one whole volume on the network's grid, per class but 0 that occurs, and the classes found (D, H, W)."""
    started, classes = time.monotonic(), max(2, checkpoint.cfg.unet.out_channels)
    threshold = options.mask_threshold
    found = segment_volume(checkpoint, volume, options.window, options.overlap, background, threshold, tick=tick)
    seconds = time.monotonic() - started
    counts = torch.stack(losses.dice_scores(torch.from_numpy(found)[None].long(), torch.from_numpy(label)[None], classes,
                                            checkpoint.cfg.data.ignore_label))
    totals.counts = totals.counts + counts
    totals.voxels, totals.seconds = totals.voxels + volume[0].size, totals.seconds + seconds
    return dice_row(counts) | {"seconds": seconds, "voxels_per_second": volume[0].size / seconds}, found


def dice_row(counts: Tensor) -> dict[str, float]:
    scores = losses.dice(*counts)[1:]
    return {"dice": float(scores.nanmean())} | {f"dice_{k}": float(score) for k, score in enumerate(scores, 1)}


def summary(checkpoint: Checkpoint, rows: list[dict], failed: list[dict], totals: Totals, device: torch.device) -> dict:
    """The content of --json. mean: over volumes, finite figures alone; pooled (seg): from all voxels together."""
    left_out = ("file", "volume", "shape", "channels", "seconds", "voxels_per_second", "codebook_usage", "perplexity")
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in left_out]
    mean = {name: average([row[name] for row in rows if name in row]) for name in names}
    if rows and "channels" in rows[0]:
        mean["channels"] = [{name: average([row["channels"][c][name] for row in rows]) for name in ("psnr", "ssim", "l1")}
                            for c in range(len(rows[0]["channels"]))]
    result = {"volumes": rows, "mean": mean, "peak_gib": train.peak_gib(device),
              "voxels_per_second": totals.voxels / totals.seconds if totals.seconds else None}
    if isinstance(totals.usage, Tensor):
        result |= train.codebook_use(totals.usage)
    if isinstance(totals.counts, Tensor):
        result["pooled"] = dice_row(totals.counts)
    return result | {"failed": failed}


def average(values: Sequence[float]) -> float:
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def finite(value):
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


COLUMNS = {"psnr": ("PSNR", "{:.2f} dB"), "ssim": ("SSIM", "{:.4f}"), "l1": ("L1", "{:.4f}"), "sharpness": ("sharpness", "{:.3f}"),
           "iou": ("IoU", "{:.4f}"), "dice": ("Dice", "{:.4f}"), "bits_per_voxel": ("bits/voxel", "{:.3f}"),
           "compression": ("ratio", "{:.1f}"), "bits_per_voxel_16": ("bits/voxel, 16-bit", "{:.3f}"),
           "compression_16": ("ratio, 16-bit", "{:.1f}"),
           "codebook_usage": ("codes used", "{:.1%}"), "perplexity": ("perplexity", "{:.1f}")}  # key -> heading and format


def column(name: str) -> tuple[str, str]:
    return COLUMNS.get(name, (name.replace("dice_", "Dice "), "{:.4f}"))


def cell(row: dict, name: str) -> str:
    value = row.get(name)
    return "-" if value is None or not math.isfinite(value) else column(name)[1].format(value)


def columns_of(result: dict) -> list[str]:
    extra = [name for name in ("codebook_usage", "perplexity") if name in result]
    return [name for name in result["mean"] if name != "channels"] + extra


def row_text(row: dict) -> str:
    names = [name for name in ("psnr", "ssim", "l1", "iou", "dice") if name in row]
    return (f"{data._sizes(row['shape'])}, {row['seconds']:.1f} s, {short_number(row['voxels_per_second'])} voxels/s, "
            + ", ".join(f"{column(name)[0]} {cell(row, name)}" for name in names))


def short_number(value: float) -> str:
    """232000 -> 232 k."""
    power = max(0, min(3, int(math.log10(max(value, 1)) // 3)))
    return f"{value / 1000 ** power:.3g} {('', 'k', 'M', 'G')[power]}".strip()


def print_table(result: dict) -> None:
    """Means and totals, as lines that fit a terminal."""
    names = columns_of(result)
    width = max([len("all volumes"), *(len(column(name)[0]) for name in names)])
    rows, mean = result["volumes"], result["mean"] | {k: result[k] for k in ("codebook_usage", "perplexity") if k in result}
    print(f"\n{'':{width}}  {'mean':>12}  {'least':>12}  {'most':>12}" + f"  {'pooled':>12}" * ("pooled" in result))
    for name in names:
        known = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        least, most = (cell(pick(known, key=lambda row: row[name]), name) if known else "-" for pick in (min, max))
        print(f"{column(name)[0]:{width}}  {cell(mean, name):>12}  {least:>12}  {most:>12}"
              + (f"  {cell(result['pooled'], name):>12}" if "pooled" in result else ""))
    for c, row in enumerate(mean.get("channels", ())):
        print(f"{f'channel {c}':{width}}  " + ", ".join(f"{column(name)[0]} {cell(row, name)}" for name in row))
    pace = result["voxels_per_second"]
    print(f"{len(rows)} volumes{f', {short_number(pace)} voxels/s' if pace else ''}, peak {result['peak_gib']:.2f} GiB"
          + (f", {len(result['failed'])} files failed" if result["failed"] else ""))


# -------------------------------------------------------------------------------------------------------------------- the report

def worst_median_best(rows: Sequence[dict], name: str) -> dict[str, int]:
    """Up to three row numbers by rising score; equal ones are not repeated."""
    order = sorted(range(len(rows)), key=lambda i: rows[i][name] if not math.isnan(rows[i][name]) else -math.inf)
    if len(order) == 1:
        return {"The only": order[0]}
    return {"Worst": order[0]} | ({"Median": order[(len(order) - 1) // 2]} if len(order) > 2 else {}) | {"Best": order[-1]}


def report_panels(volume: np.ndarray, shown: np.ndarray, label: np.ndarray | None, intensity: Intensity, spacing: Sequence[float],
                  is_picture: bool) -> dict[str, list[Tensor]]:
    """Heading -> three orthogonal slices: input, reconstruction, error; or input, label, found."""
    x, y = torch.from_numpy(volume[0]), torch.from_numpy(shown if label is not None else shown[0])
    if label is None:
        weight = (x - intensity.background).abs()
        columns = {"Input": ([x], pictures.grey), "Reconstruction": ([y], pictures.grey), "Error": ([y, x], pictures.error)}
    else:
        truth = torch.from_numpy(label)
        weight = ((truth > 0) | (y > 0)).float()
        columns = {"Input": ([x], pictures.grey), "Label": ([x, truth], pictures.coloured), "Found": ([x, y], pictures.coloured)}
    return {name: pictures.slices(volumes, weight, spacing, colour, is_picture) for name, (volumes, colour) in columns.items()}


def report_figure(row: dict, panels: dict[str, list[Tensor]]) -> str:
    """Heading and slices of one volume, the pictures inside."""
    def picture(image: Tensor, text: str) -> str:
        content = base64.b64encode(pictures.png(image.round().to(torch.uint8))).decode()
        return f'<td><img alt="{text}" src="data:image/png;base64,{content}"></td>'
    file = html.escape(data.show(Path(row["file"]).name)) + (f", volume {row['volume']}" if "volume" in row else "")
    figures = " &middot; ".join(f"{column(name)[0]} {cell(row, name)}" for name in ("psnr", "ssim", "l1", "iou", "dice") if name in row)
    names = ("axial", "coronal", "sagittal") if len(next(iter(panels.values()))) > 1 else ("",)
    body = "".join(f"<tr><th>{name}</th>" + "".join(picture(images[i], f"{kind}, {name}") for kind, images in panels.items()) + "</tr>"
                   for i, name in enumerate(names))
    heads = "".join(f"<th>{kind}</th>" for kind in panels)
    return (f'<p class="file">{file}</p><p>{figures} &middot; {" &times; ".join(map(str, row["shape"]))} voxels</p>'
            f'<table class="slices"><tr><th></th>{heads}</tr>{body}</table>')


STYLE = """
:root{--ink:#1c2430;--soft:#5b6675;--line:#dfe4ea;--back:#f5f7f9;--card:#fff;--accent:#0b6bcb}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1180px;margin:0 auto;padding:28px 24px 60px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:34px 0 12px}p{margin:0 0 6px;color:var(--soft)}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(125px,1fr));gap:12px;margin-top:20px}
.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.card b{display:block;font-size:22px;font-variant-numeric:tabular-nums;white-space:nowrap}.card span{color:var(--soft);font-size:13px}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:16px 18px;margin-bottom:18px}
section h3{margin:0;font-size:16px;color:var(--accent)}.file{color:var(--ink);font-weight:600;overflow-wrap:anywhere}
.wide{overflow-x:auto;padding:0}
.figures{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
.figures th,.figures td{padding:6px 12px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
.figures th:first-child,.figures td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:180px}
.figures thead th{background:#eef1f5}.figures .mean td{font-weight:600;background:#f8fafc}
.slices{width:100%;table-layout:fixed;border-spacing:6px}.slices th{font-weight:500;color:var(--soft);font-size:13px}
.slices th:first-child{width:68px;text-align:left}
.slices td{background:#000;text-align:center;vertical-align:middle;border-radius:4px;padding:0}
.slices img{display:block;margin:auto;width:100%;max-height:340px;object-fit:contain}
.bar{display:inline-block;width:160px;height:10px;background:linear-gradient(90deg,#000,#f00 50%,#ff0);vertical-align:middle;margin:0 6px}
.bad{color:#a4262c}
"""


def report_page(checkpoint: Checkpoint, result: dict, figures: dict[str, str], source: str) -> str:
    """One HTML page that needs nothing beside it: figures, the chosen volumes, a row per volume."""
    is_seg, mean, names = checkpoint.cfg.task == "seg", result["mean"], columns_of(result)
    totals = mean | {name: result[name] for name in ("codebook_usage", "perplexity") if name in result}
    cards = [(cell(totals, name), ("mean " if name in mean else "") + column(name)[0]) for name in names if not name.endswith("_16")][:8]
    cards += [(short_number(result["voxels_per_second"]), "voxels/s"), (f"{result['peak_gib']:.2f} GiB", "peak memory")]

    def line(name: str, row: dict, kind: str = "") -> str:
        return f"<tr{kind}><td>{name}</td>" + "".join(f"<td>{cell(row, key)}</td>" for key in names) + "</tr>"
    rows = [line(f"mean of {len(result['volumes'])}", totals, ' class="mean"')]
    rows += [line("all voxels together", result["pooled"], ' class="mean"')] if "pooled" in result else []
    rows += [line(html.escape(data.show(row["file"])) + (f", volume {row['volume']}" if "volume" in row else ""), row)
             for row in result["volumes"]]
    channels = "".join(f"<tr><td>channel {c}</td>" + "".join(f"<td>{cell(row, name)}</td>" for name in row) + "</tr>"
                       for c, row in enumerate(mean.get("channels", ())))
    channels = channels and (f'<h2>Means per channel</h2><section class="wide"><table class="figures"><thead><tr><th></th><th>PSNR</th>'
                             f"<th>SSIM</th><th>L1</th></tr></thead>{channels}</table></section>")
    failed = "".join(f'<p class="bad">{html.escape(data.show(row["error"]))}</p>' for row in result["failed"])
    legend = ("A colour for each class; 0 is left as it is." if is_seg else
              'Grey from -1 to 1; error 0 <span class="bar"></span> 0.5 and more, of the intensity range [-1, 1]. First channel.')
    parts = "".join(f"<section><h3>{name}</h3>{figure}</section>" for name, figure in figures.items())
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(checkpoint.cfg.preset)}: evaluation</title><style>{STYLE}</style></head><body><main>
<h1>{"Segmentation" if is_seg else "Reconstruction"} of {len(result["volumes"])} volumes</h1>
<p>{html.escape(data.show(describe(checkpoint)))}</p><p>Data: {html.escape(data.show(source))}</p>{failed}
<div class="cards">{"".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)}</div>
<h2>{" and ".join(", ".join(figures).rsplit(", ", 1)).capitalize()} volume by {"Dice" if is_seg else "PSNR"}</h2><p>{legend}</p>
{parts}{channels}
<h2>Every volume</h2>
<section class="wide"><table class="figures"><thead><tr><th>file</th>{"".join(f"<th>{column(name)[0]}</th>" for name in names)}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></section>
</main></body></html>
"""


# ------------------------------------------------------------------------------------------------------------------ command line

COMMANDS = {"reconstruct": (reconstruct, "volumes through the autoencoder and back, on their own grid and scale"),
            "encode": (encode, f"volumes -> STEM{LATENT}: the latent mean, or the indices of codes"),
            "decode": (decode, f"STEM{LATENT} -> volumes; equals reconstruct to the bit"),
            "segment": (segment, "volumes -> class numbers on their own grid"),
            "evaluate": (evaluate, "figures over a data set: a table, JSON, a page of pictures")}


def build_parser() -> train.Parser:
    parser = train.Parser(prog="predict.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=train.Parser)
    for name, (_, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                                  formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120))
        add = sub.add_argument
        add("--checkpoint", required=True, metavar="FILE_OR_RUN", help="best.pt, last.pt or a run folder" + (
            "; or an autoencoder's state dict of MONAI, MAISI ... (weights.py)" if name != "segment" else ""))
        if name != "segment":
            add("--hints", metavar="HINTS", help="what such a file cannot say: norm_num_groups=32,intensity_range=0,1 and / or the JSON or "
                "YAML file of its constructor's arguments")
        if name == "evaluate":
            add("--data", required=True, metavar="PATH", help="folder, file or datalist; with labels for a U-Net")
            add("--split", choices=("all", "held-out", "training", "validation", "testing"), default="all",
                help="held-out: files that the run did not train on; else a list of a datalist [all]")
            add("--json", metavar="FILE", help="write the figures")
            add("--report", metavar="FILE", help="write a page with the worst, median and best volume, self-contained HTML")
        else:
            add("--input", required=True, nargs="+", metavar="PATH", help="files, folders or datalists")
            add("--output", required=name != "segment", metavar="FOLDER", help="results keep their source's stem")
            add("--overwrite", action="store_true", help="make outputs that are there anew instead of skipping them")
        if name != "segment":
            add("--tile", default="auto", metavar="D,H,W", help="voxels a tile; auto: chosen within --memory; none: whole volumes")
            add("--memory", type=number("--memory", 0, math.inf), default=BUDGET, metavar="GIB",
                help=f"budget for which tile auto chooses, counted as for training: inference takes less [{BUDGET:g}]")
        if name == "encode":
            add("--sample", action="store_true", help="a sample of the latent instead of its mean (kl)")
            add("--seed", type=int, default=0, metavar="N", help="of --sample [0]")
        if name in ("segment", "evaluate"):
            add("--window", metavar="D,H,W", help="voxels a window of a U-Net [the crops that it was trained on]")
            add("--overlap", type=number("--overlap", -1e-9, 1), default=0.5, metavar="SHARE", help="of neighbouring windows [0.5]")
            add("--mask-threshold", type=number("--mask-threshold", 0, 1), metavar="P",
                help="two classes: foreground where its probability is above P [0.5]")
        if name == "segment":
            add("--viz", action="store_true", help="write STEM_viz.png: slices beside slices with a colour per class")
            add("--no-save", action="store_true", help="write no labels")
        add("--device", default="auto", metavar="NAME", help="auto | cuda | cuda:1 | mps | cpu [auto]")
        add("--amp", action="store_true", help="16-bit autocast: faster, no longer exact")
        hints = train.field_comments(data.DataConfig)
        for field in DATA_FLAGS + ("label_values",) * (name in ("segment", "evaluate")):
            add(f"--data.{field}", dest=f"data_{field}", metavar=field.upper(),
                help=hints.get(field, "").replace("%", "%%") + " [as in training]")
        sub.set_defaults(parser=sub)
    return parser


def number(flag: str, low: float, high: float) -> Callable[[str], float]:
    """A number strictly between low and high."""
    def parse(text: str) -> float:
        try:
            value = train.convert(text, float, flag)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must lie between {max(low, 0):g} and {high:g}, got {text}")
        return value
    return parse


def data_changes(options: argparse.Namespace) -> dict:
    hints = typing.get_type_hints(data.DataConfig)
    given = {field: getattr(options, f"data_{field}", None) for field in (*DATA_FLAGS, "label_values")}
    return {field: train.convert(value, hints[field], f"--data.{field}") for field, value in given.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 cannot start, 1 some inputs were refused, 130 / 143 / 138 after a signal."""
    try:
        with train.stopped_by_signals():
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # decode repeats what reconstruct does
            options, unknown = build_parser().parse_known_args(None if argv is None else list(argv))
            if unknown:                                          # the command's own parser knows which flag is the closest
                options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            sizes = tuple[int, int, int] | None
            if getattr(options, "tile", "auto") not in ("auto", "none"):
                options.tile = train.convert(options.tile, sizes, "--tile")
            if getattr(options, "window", None) is not None:
                options.window = train.convert(options.window, sizes, "--window")
            if min(*(getattr(options, "window", None) or (1,)), 1) < 1:
                raise ValueError(f"--window needs three sizes of 1 or more, got {options.window}")
            return COMMANDS[options.command][0](options)
    except train.Stopped as stop:
        number = stop.args[0]
        clear_line()
        print(f"stopped by {signal.Signals(number).name}; what is written is whole, and the same command goes on from there")
        return train.SIGNALS[number]
    except (ValueError, DataError) as error:
        print(f"predict.py: {data.show(train.line_of(error))}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"predict.py: {data.show(train.line_of(error))}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
