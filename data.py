"""Volumes from disk, or synthetic ones, checked, normalised, cached, and cropped at random.

    python data.py PATH...      # check data before training: a row per file, one line per refused file

A folder, a file or a JSON datalist goes in (`open_data`); out come entries whose voxels lie normalised in memory-mapped
files, so that a crop reads its own rows and nothing else, and `Crops`, a dataset in which item i is a function of (seed, i).

Axes. Arrays here are (C, D, H, W). A spatial image (X, Y, Z) is reoriented to the closest RAS axes and transposed: D, H, W are
Z, Y, X. The spatial axes of .npy and .npz are x, y, z likewise, 1 mm; their channel axis is `data.channel_axis`. Sizes and
spacing (mm) are D, H, W everywhere. An image of 2 axes, or of 1 slice, is a volume whose third extent is 1, wherever that axis
lies after reorientation. The 4th axis of an image holds separate volumes, or channels (`data.four_d`).

Intensities are in [-1, 1]. CT: HU clipped to a window. MR (and any other positive scale, such as PET): 0.5-99.5 percentile of the
foreground, per channel, clipped below only. Voxel grids (radar, LiDAR): divided by the largest magnitude per channel, 0 stays 0.

Shape legend: C channels, D H W depth height width, T volumes of a 4-D file.
Needs torch, numpy and nibabel. Works copied alone. Version 1.0.
"""
import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
import uuid
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

CACHE_VERSION = 1  # raise it whenever the cached voxels of the same file and settings would come out different
SPATIAL = (".nii", ".hdr", ".img", ".mgh", ".mgz", ".mnc", ".par", ".rec", ".head", ".brik")  # what nibabel reads as a spatial image
PARTNER = {".img": ".hdr", ".rec": ".par", ".brik": ".head"}  # voxels -> header of a volume that lies in two files
COMPRESSED = (".gz", ".bz2", ".zst")
DENSE_KEYS = ("volume", "voxel", "vol")  # of an .npz, in this order
POINTS = 4096        # places kept to put a foreground crop at: of each volume, or of each class of it
CONTRAST = 0.05      # normalised; an image voxel further than this from the background is foreground
MAX_CLASSES = 1024   # of a label map: class ids lie below
GUESSED_CHANNELS = 8  # an outer axis of a 4-D array is taken for channels up to this length (the networks are tested with 1-8)
WINDOWS = {name: (level - width / 2, level + width / 2) for name, width, level in
           (("lung", 1500, -600), ("bone", 1500, 300), ("soft_tissue", 400, 50), ("brain", 80, 35))}  # HU, low and high
MODALITIES = {"ct": "ct", "mr": "mr", "mri": "mr", "voxel": "voxel", "radar": "voxel", "lidar": "voxel"}  # name -> rule


class DataError(ValueError):
    """A file, folder or datalist that cannot be used: one line that names it, says what was found and what to do."""


# ------------------------------------------------------------------------------------------------------------ configuration
@dataclass
class DataConfig:
    """Section `data` of the config. Sizes and spacing are D,H,W. Raises ValueError for values that cannot be meant."""
    path: str | None = None                  # folder (searched recursively), file or JSON datalist; None: synthetic volumes
    synthetic: str = "ct"                    # ct (phantoms with organs, bones, vessels, airways) | radar (sparse, 4 channels)
    synthetic_count: int = 12                # volumes; 12 of 48,96,96 take 3 s on a slow core
    synthetic_size: tuple[int, int, int] = (48, 96, 96)  # voxels
    patch: tuple[int, int, int] | None = None  # crop, voxels; None: 32,64,64 (synthetic 16,48,48), less where the middle volume is smaller
    val_fraction: float = 0.2                # of the files, at least one; a datalist's `validation` list wins
    crops_per_volume: int = 4                # an epoch is this many crops of every training volume
    modality: str = "auto"                   # auto (guessed from the values) | ct | mr | voxel (or radar); a datalist's `class` wins
    window: str = "none"                     # CT: none (hu_range) | lung | bone | soft_tissue | brain
    hu_range: tuple[float, float] = (-1000.0, 1000.0)  # CT without window: HU mapped to -1 and 1; air to dense bone
    voxel_scale: tuple[float, ...] | None = None  # voxel: magnitude mapped to 1, one per channel; None: each volume's largest
    spacing: str = "original"                # original | random (zoom of every crop) | mm as D,H,W such as 3,1,1
    zoom: tuple[float, float] = (0.8, 1.25)  # spacing random: smallest and largest magnification, drawn log-uniformly
    resize: tuple[int, int, int] | None = None  # voxels; whole volumes are resampled to this grid; wins over a spacing in mm
    four_d: str = "volumes"                  # 4th axis of an image: volumes (separate; split by file all the same) | channels
    nan: str = "error"                       # NaN and infinite voxels: error (the file is refused) | zero
    channel_axis: int | None = None          # of 4-D .npy and .npz; None: the shorter of the last and the first axis, up to 8
    select_channel: int | None = None        # use this channel alone, from 0
    flip: str = "none"                       # none, or axes flipped at random, such as W or DHW
    foreground: float = 0.0                  # share of crops that are placed to hold a voxel that is not background (with labels: of a
                                             # class drawn evenly among the volume's); above 0 every validation crop holds one
    jitter: float = 0.0                      # contrast times a factor in [1 - jitter, 1 + jitter]; the background stays where it is
    strict: bool = False                     # a refused file is an error instead of a line
    cache_dir: str | None = None             # None: $XDG_CACHE_HOME/vae3d, else ~/.cache/vae3d; may be deleted when nothing trains
    max_gib: float = 8.0                     # GiB as float32 that one file may declare; checked before memory is taken
    workers: int = 0                         # DataLoader processes; 0 is enough where a step takes longer than its crops (~1 ms each)
    pin_memory: bool = True                  # page-locked batches for faster copies; of use with CUDA only

    def __post_init__(self):
        if not isinstance(self.spacing, str):  # a YAML list or a tuple
            self.spacing = ",".join(f"{value:g}" for value in self.spacing)
        for name, allowed in (("synthetic", ("ct", "radar")), ("modality", ("auto", *MODALITIES)), ("window", ("none", *WINDOWS)),
                              ("four_d", ("volumes", "channels")), ("nan", ("error", "zero"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name in ("patch", "resize", "synthetic_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or any(int(n) != n or n < 1 for n in size)):
                raise ValueError(f"data.{name} is {size}; give three whole numbers of voxels D,H,W, each at least 1")
        for name, least in (("synthetic_count", 1), ("crops_per_volume", 1), ("workers", 0), ("select_channel", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; use {least} or more")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; use a share of the files in [0, 1)")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"data.foreground is {self.foreground}; use a share of the crops in [0, 1], such as 0.5")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"data.jitter is {self.jitter}; use a factor in [0, 1), such as 0.1")
        if len(self.hu_range) != 2 or not -math.inf < self.hu_range[0] < self.hu_range[1] < math.inf:
            raise ValueError(f"data.hu_range is {self.hu_range}; give two HU values, the lower first")
        if len(self.zoom) != 2 or not 0 < self.zoom[0] <= self.zoom[1] < math.inf:
            raise ValueError(f"data.zoom is {self.zoom}; give two factors above 0, the smaller first")
        if self.voxel_scale is not None and not all(0 < scale < math.inf for scale in self.voxel_scale):
            raise ValueError(f"data.voxel_scale is {self.voxel_scale}; give a magnitude above 0 for each channel")
        if not 0 < self.max_gib < math.inf:
            raise ValueError(f"data.max_gib is {self.max_gib}; use a number of GiB above 0")
        if self.flip != "none" and not (self.flip and set(self.flip.upper()) <= set("DHW")):
            raise ValueError(f"data.flip is {self.flip!r}; use none, or letters of DHW")
        self.spacing_mm()

    def spacing_mm(self) -> tuple[float, ...] | None:
        """The fixed spacing in mm (D, H, W), or None for `original` and `random`."""
        if self.spacing in ("original", "random"):
            return None
        try:
            mm = tuple(float(value) for value in self.spacing.strip("[]() ").split(","))
        except ValueError:
            mm = ()
        if len(mm) != 3 or not all(0 < value < math.inf for value in mm):
            raise ValueError(f"data.spacing is {self.spacing!r}; use original, random, or three sizes in mm D,H,W such as 3,1,1")
        return mm

    def hu_limits(self) -> tuple[float, float]:
        return self.hu_range if self.window == "none" else WINDOWS[self.window]


# -------------------------------------------------------------------------------------------------------- finding the files
class Item(NamedTuple):
    """One file of a data set. `kind` is the datalist's `class`, as written there."""
    path: Path
    kind: str | None = None


def list_items(path: str | os.PathLike) -> dict[str, list[Item]]:
    """Folder, file or JSON datalist -> {"training": [...], "validation": [...], "testing": [...]}, each file once.

    A folder is searched recursively, links followed, hidden names skipped; the files are sorted by their path and are all
    `training`. A datalist has those three keys (Decathlon's `test` is `testing`), each a list of {image, label?, class?} or of
    plain paths, relative to the JSON. Raises DataError when there is nothing at `path` or the datalist is malformed.
    """
    path = Path(os.path.expanduser(path))
    lists = {"training": [], "validation": [], "testing": []}
    if os.path.isdir(path):
        lists["training"] = [Item(file) for file in _walk(path)]
    elif path.suffix.lower() == ".json" and os.path.isfile(path):
        lists = _read_datalist(path)
    elif os.path.exists(path):
        lists["training"] = [Item(path)]
    else:
        raise DataError(f"{_show(path)}: no such file or folder; give a folder, a volume or a JSON datalist")
    for name, items in lists.items():
        once: dict[str, Item] = {}
        for item in items:
            once.setdefault(os.path.realpath(item.path), item)  # a link to a file is that file: else it could be on both sides of the split
        lists[name] = list(once.values())
    return lists


def _walk(root: Path) -> Iterator[Path]:
    """Files under `root` that look like volumes, sorted; of a pair such as .hdr/.img the header alone. Link loops end."""
    def fail(error: OSError):
        raise DataError(f"{_show(error.filename)}: {error.strerror}; make the folder readable or move it out of the data")

    found, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=fail):
        if (real := os.path.realpath(folder)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        lower = {name.lower() for name in files}
        for name in files:
            kind, tail = _suffix(name)
            stem = name[:len(name) - len(kind + tail)].lower()
            is_second = kind in PARTNER and any(stem + PARTNER[kind] + end in lower for end in ("", *COMPRESSED))
            if kind in (*SPATIAL, ".npy", ".npz", ".bin") and not name.startswith(".") and not is_second:
                found.append(Path(folder, name))
    return iter(sorted(file for file in found if os.path.isfile(file) or not os.path.exists(file)))  # no pipes; broken links stay


def _suffix(name: str | os.PathLike) -> tuple[str, str]:
    """('.nii', '.gz') of 'a.NII.gz': the kind of file and its compression, lower case; ('.npy', '') of 'a.npy'."""
    stem, last = os.path.splitext(os.path.basename(name).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def _read_datalist(path: Path) -> dict[str, list[Item]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{_show(path)}: not a readable JSON file ({_one_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"{_show(path)}: a datalist needs a list `training` of {{image, label?, class?}}, found "
                        f"{sorted(content)[:8] if isinstance(content, dict) else type(content).__name__}")
    lists = {}
    for name, keys in (("training", ("training",)), ("validation", ("validation",)), ("testing", ("testing", "test"))):
        entries = next((content[key] for key in keys if key in content), None) or []
        if not isinstance(entries, list):
            raise DataError(f"{_show(path)}: `{name}` is a {type(entries).__name__}; make it a list of {{image, label?, class?}}")
        lists[name] = [_datalist_item(path, name, number, entry) for number, entry in enumerate(entries)]
    return lists


def _datalist_item(path: Path, name: str, number: int, entry: object) -> Item:
    image, kind = (entry.get("image"), entry.get("class")) if isinstance(entry, dict) else (entry, None)
    if not isinstance(image, str) or not image or "\0" in image:
        raise DataError(f"{_show(path)}: {name}[{number}] is {_one_line(repr(entry), 80)}; make it {{\"image\": path}} or a path")
    return Item(path.parent / os.path.expanduser(image), None if kind is None else str(kind))


def _stem(path: Path) -> str:
    """Name without its volume extension, printable and fit for a file name."""
    name = path.name[:len(path.name) - len("".join(_suffix(path.name)))] or path.name
    return re.sub(r"[^\w.-]", "_", name)


def _show(path: str | os.PathLike) -> str:
    """A path as one printable line, whatever bytes its name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def _one_line(message: object, limit: int = 200) -> str:
    text = _show(" ".join(str(message).split()))
    return text if len(text) <= limit else text[:limit - 3] + "..."


# -------------------------------------------------------------------------------------------------------- reading one volume
class Volume(NamedTuple):
    """array (C, D, H, W) float32 as stored, not normalised; spacing mm (D, H, W); affine (4, 4) of the RAS grid (X, Y, Z -> mm)."""
    array: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray


class Source(NamedTuple):
    """A decoded file: the volume, what its 4th axis is (four_d of an image, False for the channels of an array), how it was stored."""
    volume: Volume
    is_series: bool
    dtype: str
    orientation: str  # axis codes on disk such as LPS; '-' where the format has none


def read_volume(path: str | os.PathLike, *, volume: int | None = None, nan: str = "error", channel_axis: int | None = None,
                max_gib: float = 8.0) -> Volume:
    """Read one file whole. The 4th axis of an image comes as channels; `volume` picks one of it (then C is 1).

    nan: "error" refuses NaN and infinite voxels, "zero" replaces them. channel_axis: of 4-D arrays, see DataConfig.
    Raises DataError, one line that names the file, for whatever is wrong with it; nothing larger than max_gib is allocated.
    """
    return _read(Path(path), volume, nan, channel_axis, max_gib).volume


def _read(path: Path, volume: int | None, nan: str, channel_axis: int | None, max_gib: float) -> Source:
    try:
        _check_is_file(path)
        with _quiet(), np.errstate(all="ignore"):
            kind = _suffix(path)[0]
            if kind == ".bin":
                raise DataError("raw .bin rows carry no shape; turn the points into a voxel grid (.npy or .npz) first")
            source = _read_array(path, channel_axis, max_gib) if kind in (".npy", ".npz") else _read_image(path, volume, max_gib)
        _check_finite(source.volume.array, nan)
        return source
    except DataError as error:
        raise DataError(f"{_show(path)}: {error}") from None
    except Exception as error:  # a decoder that meets damaged or hostile bytes may raise anything at all; the cause stays chained
        raise DataError(f"{_show(path)}: cannot be read ({type(error).__name__}: {_one_line(error)}); "
                        "repair the file or take it out of the data") from error


def _check_is_file(path: Path) -> None:
    if not os.path.isfile(path):
        raise DataError("not a regular file" if os.path.exists(path) else "no such file, or no permission to see it")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """nibabel logs and warns about headers that it then reads or refuses; the one line that matters is ours."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_size(shape: tuple[int, ...], itemsize: int, max_gib: float, available: int | None = None) -> None:
    """Refuse a declared shape before it costs memory. available: the most voxel bytes that the file can hold, where known."""
    count = math.prod(shape)
    if min(shape, default=1) < 1:
        raise DataError(f"declares shape {shape}, which holds no voxels")
    if count * max(4, itemsize) > max_gib * 2**30:
        raise DataError(f"declares shape {shape}, {count * max(4, itemsize) / 2**30:.3g} GiB, more than data.max_gib={max_gib:g}; "
                        "raise that if the file is what it says")
    if available is not None and count * itemsize > available:
        raise DataError(f"declares {count * itemsize} bytes of voxels (shape {shape}) but can hold no more than {available}; "
                        "it is truncated or its header is damaged")


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "fiub":
        what = {"c": "complex values; store magnitude and phase as two real channels", "V": "RGB or structured voxels; store one number "
                "per voxel and channel", "O": "pickled objects; store plain numbers"}.get(dtype.kind, f"voxels of type {dtype}")
        raise DataError(f"holds {what}")


def _read_image(path: Path, volume: int | None, max_gib: float) -> Source:
    """Everything that nibabel takes for a spatial image."""
    image = nib.load(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise DataError(f"{type(image).__name__} is no spatial image (no voxel grid in mm)")
    shape, dtype = tuple(int(n) for n in image.shape), np.dtype(image.get_data_dtype())
    _check_dtype(dtype)
    if len(shape) < 2:
        raise DataError(f"one-dimensional, shape {shape}; volumes have 2 to 4 axes")
    kept = max([3] + [axis + 1 for axis, n in enumerate(shape) if n != 1])  # axes left without trailing ones
    if kept > 4:
        raise DataError(f"{kept}-dimensional, shape {shape} (a vector field?); volumes have 2 to 4 axes")
    stored = image.file_map["image"].filename
    size = os.path.getsize(stored) if stored else None
    packed = _suffix(stored)[1] or (".gz" if str(stored).lower().endswith(".mgz") else "")
    available = None if size is None or packed in (".bz2", ".zst") else size * 1032 if packed == ".gz" else size  # deflate's best: 1032
    _check_size(shape, dtype.itemsize, max_gib, available)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0:
        raise DataError(f"its affine {affine[:3].round(3).tolist()} is singular or not finite; repair the header")

    series = shape[3] if kept == 4 else 1
    if volume is not None and not 0 <= volume < series:
        raise DataError(f"has {series} volumes, number {volume} was asked for; count from 0")
    stored_axes = image.dataobj[..., volume] if kept == 4 and volume is not None else np.asarray(image.dataobj)
    array = stored_axes.reshape(*shape[:3], *(1,) * (3 - len(shape)), -1)           # (X, Y, Z, T), axes as stored
    to_ras = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(to_ras, array.shape[:3])
    array = nib.apply_orientation(array, to_ras).transpose(3, 2, 1, 0)              # (T, D, H, W)
    return Source(Volume(np.ascontiguousarray(array, dtype=np.float32), _spacing(affine), affine), kept == 4, str(dtype),
                  "".join(nib.aff2axcodes(image.affine)))


def _read_array(path: Path, channel_axis: int | None, max_gib: float) -> Source:
    """A .npy, or an .npz that is dense (volume, voxel, vol or the only array) or sparse (shape, coords, features)."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as stream:
            array = _read_npy(stream, os.path.getsize(path), max_gib, channel_axis)
            dtype = array.dtype
    else:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}

            def member(key: str, dense: bool) -> np.ndarray:
                with archive.open(members[key]) as stream:
                    return _read_npy(stream, members[key].file_size, max_gib, channel_axis, dense)
            key = next((key for key in DENSE_KEYS if key in members), next(iter(members)) if len(members) == 1 else None)
            if key is None and {"shape", "coords", "features"} <= set(members):
                shape, coords, features = (member(key, False) for key in ("shape", "coords", "features"))
                array, dtype = _densify(shape, coords, features, max_gib), features.dtype
            elif key is None:
                found = ", ".join(_one_line(key, 40) for key in sorted(members)[:8]) or "none"
                raise DataError(f"its arrays are {found}; name one volume, voxel or vol, or store shape, coords and features")
            else:
                array = member(key, True)
                dtype = array.dtype
    return Source(Volume(np.ascontiguousarray(array, dtype=np.float32), (1.0, 1.0, 1.0), np.eye(4)), False, str(dtype), "-")


def _read_npy(stream, available: int, max_gib: float, channel_axis: int | None, dense: bool = True) -> np.ndarray:
    """One array in numpy's format, its header checked before its data is allocated; a dense volume comes as (C, D, H, W)."""
    version = np.lib.format.read_magic(stream)
    header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if header is None:
        raise DataError(f".npy format version {version}; save the array with a plain number type")
    shape, fortran, dtype = header(stream)
    if dense:
        _check_dtype(dtype)
        if len(shape) not in (3, 4):
            what = "a table (points?); turn it into a voxel grid first" if len(shape) == 2 else "volumes have 3 axes, or 4 with channels"
            raise DataError(f"{len(shape)}-dimensional array, shape {shape}: {what}")
        axis = _channel_axis(shape, channel_axis) if len(shape) == 4 else None
    if dtype.kind in "OcV":
        _check_dtype(dtype)
    _check_size(shape, dtype.itemsize, max_gib, available)
    data = stream.read(math.prod(shape) * dtype.itemsize)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"ends after {len(data)} bytes of an array of shape {shape}; it is truncated")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    if dense:
        array = (array[None] if axis is None else np.moveaxis(array, axis, 0)).transpose(0, 3, 2, 1)  # (C, D, H, W)
    return array


def _channel_axis(shape: tuple[int, ...], channel_axis: int | None) -> int:
    if channel_axis is None:
        channel_axis = 0 if shape[0] < shape[-1] else -1
        if shape[channel_axis] > GUESSED_CHANNELS:
            raise DataError(f"4-dimensional array, shape {shape}: neither the last nor the first axis is as short as "
                            f"{GUESSED_CHANNELS} channels (a time series?); set data.channel_axis")
    if not -4 <= channel_axis < 4:
        raise DataError(f"4-dimensional array, shape {shape}, has no axis data.channel_axis={channel_axis}; use -4 to 3")
    return channel_axis


def _densify(shape: np.ndarray, coords: np.ndarray, features: np.ndarray, max_gib: float) -> np.ndarray:
    """shape (3,) or (4,) = x, y, z[, C], coords (N, 3), features (N, C) or (N,) -> (C, D, H, W) float32."""
    _check_dtype(features.dtype)
    features = features[:, None] if features.ndim == 1 else features
    whole = shape.dtype.kind in "iu" and coords.dtype.kind in "iu"
    if not whole or shape.shape not in ((3,), (4,)) or coords.ndim != 2 or coords.shape[1] != 3 or features.shape[:-1] != coords.shape[:1]:
        raise DataError(f"sparse grid with shape {shape.shape} {shape.dtype}, coords {coords.shape} {coords.dtype}, features "
                        f"{features.shape}; needs shape (3,) or (4,) and coords (N, 3), whole numbers, and features (N, C)")
    if len(shape) == 4 and shape[3] != features.shape[1]:
        raise DataError(f"sparse grid declares {shape[3]} channels, its features have {features.shape[1]}")
    grid = tuple(int(n) for n in shape[:3])
    _check_size((*grid, features.shape[1]), 4, max_gib)
    if len(coords) and ((coords < 0) | (coords >= np.array(grid))).any():
        raise DataError(f"sparse grid of {grid} has coords from {coords.min(0).tolist()} to {coords.max(0).tolist()}, outside of it")
    x, y, z = coords.T
    dense = np.zeros((features.shape[1], *grid[::-1]), dtype=np.float32)
    dense[:, z, y, x] = features.T
    return dense


def _check_finite(array: np.ndarray, nan: str) -> None:
    """NaN policy, in place. Infinite voxels, and values beyond float32, count too."""
    if np.isfinite(array).all():
        return
    bad = ~np.isfinite(array)
    if nan == "zero":
        array[bad] = 0
        return
    nans, total = int(np.isnan(array).sum()), int(bad.sum())
    what = " and ".join(f"{n} {name}" for n, name in ((nans, "NaN"), (total - nans, "infinite")) if n)
    first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
    raise DataError(f"{what} voxel{'s' * (total > 1)}, first at {first[1:]} (D,H,W)"
                    f"{f' of volume or channel {first[0]}' if len(array) > 1 else ''}; repair the file or set data.nan=zero")


# ---------------------------------------------------------------------------------------------------- intensities and grids
class Intensity(NamedTuple):
    """How stored values were mapped: per channel, `low` went to -1 and `high` to 1. Undone by `denormalise`."""
    modality: str  # ct | mr | voxel
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def background(self) -> float:
        """Normalised value of nothing: air, or an empty voxel."""
        return 0.0 if self.modality == "voxel" else -1.0


def guess_modality(array: np.ndarray) -> str:
    """Stored values -> "ct", "mr" or "voxel", from some 10^6 of them.

    voxel: 95 % are exactly 0, not all of them. ct: at least 0.5 % lie where air and lung do (-1250 to -400 HU), what is below is one
    padding value (scanners write -1500, -2000, -3024), and hardly anything is above 5000. Everything else is mr.
    """
    values = array.reshape(-1)[::max(1, array.size // 2**20) | 1]
    if values.min() < values.max() and np.mean(values == 0) >= 0.95:
        return "voxel"
    below = values[values < -1250]
    is_padding = len(below) < 1e-3 * len(values) or np.mean(below == below.min()) > 0.9
    has_air = np.mean((values >= -1250) & (values <= -400)) > 5e-3
    return "ct" if is_padding and has_air and np.mean(values > 5000) < 1e-3 else "mr"


def normalise(array: np.ndarray, modality: str = "auto", hu_range: tuple[float, float] = (-1000.0, 1000.0),
              voxel_scale: tuple[float, ...] | None = None) -> tuple[np.ndarray, Intensity]:
    """(C, D, H, W) as stored -> (C, D, H, W) float32 in about [-1, 1], and the map that `denormalise` undoes.

    ct: hu_range to [-1, 1], clipped. mr: 0.5-99.5 percentile of the voxels above 0, clipped at -1 but not above. voxel: divided by
    voxel_scale, or by the largest magnitude of the channel, so that 0 stays 0. Raises DataError for a volume that is constant (unless
    it is a voxel grid, which may be empty) or whose values float32 cannot scale.
    """
    modality = guess_modality(array) if modality == "auto" else MODALITIES[modality]
    if modality != "voxel" and all(channel.min() == channel.max() for channel in array):
        raise DataError(f"every voxel is {array.flat[0]:g}: nothing to learn from; take the file out of the data")
    if modality == "ct":
        limits = [tuple(map(float, hu_range))] * len(array)
    elif modality == "mr":
        limits = [_percentiles(channel) for channel in array]
    else:
        scales = voxel_scale or [float(np.abs(channel).max()) or 1.0 for channel in array]
        if len(scales) != len(array):
            raise DataError(f"has {len(array)} channels, data.voxel_scale has {len(scales)}; give one per channel")
        limits = [(-float(scale), float(scale)) for scale in scales]
    out = np.empty(array.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for channel, result, (low, high) in zip(array, out, limits):
            np.subtract(channel, (high + low) / 2, out=result, casting="same_kind")
            result /= (high - low) / 2
            if modality != "voxel":
                np.clip(result, -1, 1 if modality == "ct" else None, out=result)
    if not (np.isfinite(out.min()) and np.isfinite(out.max())):
        raise DataError(f"values from {array.min():.3g} to {array.max():.3g} cannot be scaled in float32; repair the file")
    return out, Intensity(modality, tuple(low for low, _ in limits), tuple(high for _, high in limits))


def _percentiles(channel: np.ndarray) -> tuple[float, float]:
    """0.5 and 99.5 percentile of the foreground: the voxels above 0, or above the least where none is."""
    least = float(channel.min())
    foreground = channel[channel > 0] if channel.max() > 0 else channel[channel > least]
    if not foreground.size:
        return least, least + 1.0  # one empty channel of several
    low, high = (float(value) for value in np.percentile(foreground, (0.5, 99.5)))
    return (low, high) if high > low else (least, high) if high > least else (least, least + 1.0)


def denormalise(array: np.ndarray, intensity: Intensity) -> np.ndarray:
    """(C, D, H, W) in [-1, 1] -> the scale of the file: HU come back as HU. What `normalise` clipped stays clipped."""
    low, high = (np.asarray(values, dtype=np.float64).reshape(-1, 1, 1, 1) for values in (intensity.low, intensity.high))
    return (array * ((high - low) / 2) + (high + low) / 2).astype(np.float32)


def write_nifti(path: str | os.PathLike, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (C, D, H, W) as NIfTI, atomically: axes x, y, z and, for several channels, a fourth. The name ends in .nii or .nii.gz."""
    image = nib.Nifti1Image(np.squeeze(array.transpose(3, 2, 1, 0), -1) if len(array) == 1 else array.transpose(3, 2, 1, 0), affine)
    content = image.to_bytes()
    content = gzip.compress(content, 4, mtime=0) if str(path).endswith(".gz") else content
    _write(Path(path), lambda file: file.write(content))


def resample(array: np.ndarray, affine: np.ndarray, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """(C, D, H, W) and its affine -> (C, *size) over the same field of view and the affine of the new grid.

    Linear, with a wider kernel where an axis shrinks so that nothing aliases. The outer faces of the volume stay where they are.
    """
    old = array.shape[1:]
    x = torch.from_numpy(array)
    if tuple(size[1:]) != old[1:]:
        x = F.interpolate(x, size=tuple(size[1:]), mode="bilinear", antialias=True)              # (C, D, H', W')
    if size[0] != old[0]:
        x = x.reshape(len(array), 1, old[0], -1)                                                 # (C, 1, D, H'W')
        x = F.interpolate(x, size=(size[0], x.shape[-1]), mode="bilinear", antialias=True)
    step = np.array([old[axis] / size[axis] for axis in (2, 1, 0)])                              # old voxels per new one, x y z
    to_old = np.diag([*step, 1.0])
    to_old[:3, 3] = (step - 1) / 2                                                               # voxel 0's centre, from the common face
    return np.ascontiguousarray(x.reshape(len(array), *size).numpy()), affine @ to_old


# ---------------------------------------------------------------------------------------------------------- entries and cache
@dataclass(frozen=True)
class Entry:
    """One volume that is ready to be cropped. `store` is the file of its normalised voxels, or the array itself."""
    name: str                            # short, unique, fit for logs and file names
    path: str | None                     # source file; None: synthetic
    shape: tuple[int, int, int, int]     # (C, D, H, W)
    spacing: tuple[float, float, float]  # mm, D H W, of the grid it is kept in
    affine: np.ndarray                   # (4, 4), of that grid
    intensity: Intensity
    store: str | np.ndarray
    guessed: bool = False                # the modality was guessed
    points: str | np.ndarray | None = None  # (K, P, 3), D H W of P foreground voxels of each of K classes, or a file of them

    def read(self, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Normalised voxels, float32, a copy: the whole (C, D, H, W) or a region (slices of D, H, W), of which alone is read."""
        array = _open_array(self.store) if isinstance(self.store, str) else self.store
        return np.array(array if region is None else array[(slice(None), *region)])


def foreground_points(entry: Entry) -> np.ndarray:
    """Places of foreground voxels, (K, P, 3) int32 in D, H, W: P <= POINTS spread evenly over the volume's.

    K is 0 where there is none. A function of the voxels alone. Reads the volume in slabs, twice: memory is bounded whatever its size.
    """
    depth = max(1, 2**22 // math.prod(entry.shape[2:]))
    slabs = [slice(d, min(d + depth, entry.shape[1])) for d in range(0, entry.shape[1], depth)]

    def voxels_by_class(slab: slice) -> tuple[np.ndarray, np.ndarray]:
        """Class of each foreground voxel of the slab and its flat place, sorted by both."""
        region = (slab, slice(None), slice(None))
        distance = np.abs(entry.read(region) - np.float32(entry.intensity.background)).max(0)
        classes = (distance > CONTRAST).astype(np.int16)  # sorted by radix
        places = np.flatnonzero(classes)
        classes = classes.reshape(-1)[places]
        order = np.argsort(classes, kind="stable")
        return classes[order], places[order]

    counts = sum((np.bincount(voxels_by_class(slab)[0], minlength=MAX_CLASSES) for slab in slabs), np.zeros(MAX_CLASSES, dtype=np.int64))
    present = np.flatnonzero(counts)
    length = min(POINTS, int(counts.max()))
    points = np.empty((len(present), length, 3), dtype=np.int32)
    strata = np.arange(length)                       # rank r of n: one in each n-th of the class, so every voxel is as likely as another
    ranks = [np.minimum((strata + _rng(0, "points", int(c)).random(length)) * (counts[c] / length), counts[c] - 1).astype(np.int64)
             for c in present]
    seen = np.zeros(MAX_CLASSES, dtype=np.int64)
    for slab in slabs:
        classes, places = voxels_by_class(slab)
        for k, c in enumerate(present):
            first, last = np.searchsorted(classes, (c, c + 1))
            here = (ranks[k] >= seen[c]) & (ranks[k] < seen[c] + last - first)
            d, h, w = np.unravel_index(places[first + ranks[k][here] - seen[c]], (slab.stop - slab.start, *entry.shape[2:]))
            points[k, here] = np.stack([d + slab.start, h, w], -1)
            seen[c] += last - first
    return points


def _with_points(entry: Entry) -> Entry:
    """The entry with its foreground places, which lie beside its voxels in the cache, made once."""
    if not isinstance(entry.store, str):
        return dataclasses.replace(entry, points=foreground_points(entry))
    file = Path(f"{entry.store.removesuffix('.npy')}-points.npy")
    try:
        np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or damaged
        points = foreground_points(entry)
        try:
            _write(file, functools.partial(np.save, arr=points))
        except OSError as error:
            raise _cache_error(file.parent, error) from None
    return dataclasses.replace(entry, points=str(file))


@functools.lru_cache(maxsize=256)  # each map holds a file descriptor, of which a process usually has 1024
def _open_array(file: str) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


class Loaded(NamedTuple):
    """A file through the whole pipeline, before anything is written."""
    volumes: list[tuple[np.ndarray, Intensity]]  # one, or T; each (C, D, H, W)
    spacing: tuple[float, float, float]
    affine: np.ndarray
    guessed: bool
    source: Source


def load(item: Item, cfg: DataConfig) -> Loaded:
    """Read, select, split into volumes, normalise, resample. Raises DataError naming the file."""
    source = _read(item.path, None, cfg.nan, cfg.channel_axis, cfg.max_gib)
    array, spacing, affine = source.volume
    try:
        volumes = list(array[:, None]) if source.is_series and cfg.four_d == "volumes" else [array]
        if cfg.select_channel is not None:
            if cfg.select_channel >= len(volumes[0]):
                raise DataError(f"has {len(volumes[0])} channel{'s' * (len(volumes[0]) > 1)}, data.select_channel={cfg.select_channel} "
                                "counts from 0; choose another")
            volumes = [volume[cfg.select_channel:cfg.select_channel + 1] for volume in volumes]
        named = (item.kind or "").lower() if (item.kind or "").lower() in MODALITIES else cfg.modality
        modality = guess_modality(array) if named == "auto" else MODALITIES[named]
        done = [_finish(Volume(volume, spacing, affine), modality, cfg) for volume in volumes]
    except DataError as error:
        raise DataError(f"{_show(item.path)}: {error}") from None
    grid = done[0][2]
    return Loaded([(array, intensity) for array, intensity, _ in done], _spacing(grid), grid, named == "auto", source)


def _finish(volume: Volume, modality: str, cfg: DataConfig) -> tuple[np.ndarray, Intensity, np.ndarray]:
    """Normalise, then resample to cfg.resize or cfg.spacing: clipped first, so that padding and metal do not bleed into tissue."""
    array, intensity = normalise(volume.array, modality, cfg.hu_limits(), cfg.voxel_scale)
    mm, size, affine = cfg.spacing_mm(), cfg.resize, volume.affine
    if size is None and mm is not None:
        size = tuple(max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], volume.spacing, mm))
    if size is not None and tuple(size) != array.shape[1:]:
        _check_size((len(array), *size), 4, cfg.max_gib)
        array, affine = resample(array, affine, tuple(size))
    return array, intensity, affine


def _spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """mm (D, H, W) of an affine (X, Y, Z -> mm)."""
    x, y, z = nib.affines.voxel_sizes(affine)
    return float(z), float(y), float(x)


def cache_folder(cfg: DataConfig) -> Path:
    """data.cache_dir, else vae3d under XDG_CACHE_HOME or ~/.cache; made if need be. Raises DataError where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.path.expanduser(cfg.cache_dir)) if cfg.cache_dir else Path(base, "vae3d")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{_show(folder)}: cannot write the cache ({error.strerror or error}); set data.cache_dir to a folder that can be "
                        "written") from None
    for file in folder.glob(".*.tmp"):  # a process that was killed while it wrote; one that still writes is younger than a day
        with contextlib.suppress(OSError):
            if re.fullmatch(r"\..+\.[0-9a-f]{32}\.tmp", file.name) and time.time() - file.stat().st_mtime > 86400:
                file.unlink()
    return folder


def _stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of the file, and of its other half where the voxels lie apart from their header."""
    kind, tail = _suffix(path)
    halves = {**PARTNER, **{header: voxels for voxels, header in PARTNER.items()}}
    stem = str(path)[:len(str(path)) - len(kind + tail)]
    others = [stem + end + more for end in (halves[kind], halves[kind].upper()) for more in ("", *COMPRESSED)] if kind in halves else []
    return [(os.path.realpath(file), os.stat(file).st_size, os.stat(file).st_mtime_ns) for file in (str(path), *others)
            if os.path.exists(file)]


def _cached(item: Item, cfg: DataConfig, folder: Path) -> list[Entry]:
    """Entries of one file, from the cache or after building it. Two processes may build the same one: the content is the same."""
    try:
        _check_is_file(item.path)
        stamp = _stamp(item.path)
    except (DataError, OSError) as error:
        raise DataError(f"{_show(item.path)}: {error}") from None
    settings = (cfg.modality, item.kind, cfg.hu_limits(), cfg.voxel_scale, cfg.spacing_mm(), cfg.resize, cfg.four_d, cfg.nan,
                cfg.channel_axis, cfg.select_channel)
    key = hashlib.sha256(json.dumps([CACHE_VERSION, stamp, settings]).encode()).hexdigest()[:24]
    record = folder / f"{_stem(item.path)[:40]}-{key}.json"
    entries = _from_cache(record, item)
    if entries is not None:
        return entries
    loaded = load(item, cfg)
    if _stamp(item.path) != stamp:
        raise DataError(f"{_show(item.path)}: changed while it was being read; start again when it is complete")
    volumes = []
    try:
        for number, (array, intensity) in enumerate(loaded.volumes):
            size = _write(record.with_name(f"{record.stem}-{number}.npy"), functools.partial(np.save, arr=array))
            volumes.append({"shape": array.shape, "intensity": intensity, "bytes": size})
        content = {"source": str(item.path), "spacing": loaded.spacing, "affine": loaded.affine.tolist(), "guessed": loaded.guessed,
                   "volumes": volumes}
        _write(record, lambda stream: stream.write(json.dumps(content).encode()))  # last: its presence says that the arrays are there
    except OSError as error:
        raise _cache_error(folder, error) from None
    entries = _from_cache(record, item)
    if entries is None:
        raise CacheError(f"{_show(record)}: the cache vanished while it was written; let no other program clean {_show(folder)}")
    return entries


class CacheError(DataError):
    """The cache cannot be written: no fault of the volume at hand, and the end of the run."""


def _cache_error(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"{_show(folder)}: cannot write the cache ({error.strerror or error}); free some space or set data.cache_dir to "
                      "another disk")


def _write(path: Path, write: Callable) -> int:
    """Atomic: readers see the whole file or none. Returns its bytes."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # not mkstemp: others may read what the umask lets them
    try:
        with open(temporary, "xb") as stream:
            write(stream)
        size = os.path.getsize(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return size


def _from_cache(record: Path, item: Item) -> list[Entry] | None:
    """Entries of a cache record; None where it is absent, damaged or of arrays that are not whole."""
    try:
        content = json.loads(record.read_bytes())
        entries = []
        for number, volume in enumerate(content["volumes"]):
            file = str(record.with_name(f"{record.stem}-{number}.npy"))
            modality, low, high = volume["intensity"]
            if os.path.getsize(file) != volume["bytes"]:
                return None
            suffix = f"_t{number:03d}" if len(content["volumes"]) > 1 else ""
            entries.append(Entry(_stem(item.path) + suffix, str(item.path), tuple(volume["shape"]), tuple(content["spacing"]),
                                 np.array(content["affine"]), Intensity(modality, tuple(low), tuple(high)), file, content["guessed"]))
        return entries or None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ------------------------------------------------------------------------------------------------------------- the data set
@dataclass
class Data:
    """What `open_data` found. train and val share no file, unless there is only one."""
    train: list[Entry]
    val: list[Entry]
    channels: int
    patch: tuple[int, int, int]  # crop, D H W
    background: float            # of the first training volume; a crop is padded with its own volume's
    cfg: DataConfig


def open_data(cfg: DataConfig, seed: int, say: Callable[[str], object] = print) -> Data:
    """Find the volumes, build or reuse their cache, split them by file, seeded. `say` gets what a user should know, a line each.

    Raises DataError when nothing usable is left, when the cache cannot be written, or, with cfg.strict, for the first refused file.
    """
    if cfg.path is None:
        training, held_out = [[entry] for entry in synthetic_entries(cfg, seed)], []
        say(f"data: {len(training)} synthetic {cfg.synthetic} volumes of {_sizes(training[0][0].shape[1:])} voxels, seed {seed}; "
            "--data names real ones")
    else:
        training, held_out = _open_files(cfg, say)
    if not held_out and len(training) > 1:
        count = min(len(training) - 1, max(1, round(cfg.val_fraction * len(training))))
        order = _rng(seed, "split").permutation(len(training)).tolist()
        held_out = [training[i] for i in sorted(order[:count])]
        training = [training[i] for i in sorted(order[count:])]
    elif not held_out:
        held_out = training
        say(f"data: one usable file only, {_show(training[0][0].path or training[0][0].name)}: it serves for training and validation, "
            "so validation says nothing about other volumes")
    shared = {entry.path for group in training for entry in group if entry.path} & {entry.path for group in held_out for entry in group}
    if shared and held_out is not training:
        say(f"data: {len(shared)} files are in both training and validation, {_show(min(shared))} for one; validation is no test of them")
    files = len(training), len(held_out)
    train, val = ([entry for group in groups for entry in group] for groups in (training, held_out))
    taken: dict[str, str | None] = {}
    train, val = ([_with_unique_name(entry, taken) for entry in entries] for entries in (train, val))
    if cfg.foreground:
        train, val = ([_with_points(entry) for entry in entries] for entries in (train, val))
    patch = cfg.patch or _default_patch(train, (16, 48, 48) if cfg.path is None else (32, 64, 64))
    say(f"data: {len(train)} training volumes ({files[0]} files), {len(val)} held out ({files[1]}), {train[0].shape[0]} "
        f"channel{'s' * (train[0].shape[0] > 1)}, crops of {_sizes(patch)}")
    return Data(train, val, train[0].shape[0], patch, train[0].intensity.background, cfg)


def _open_files(cfg: DataConfig, say: Callable[[str], object]) -> tuple[list[list[Entry]], list[list[Entry]]]:
    """Groups of entries, a group per file: training and held-out ones (the latter empty without a `validation` list)."""
    lists = list_items(cfg.path)
    items = [(name, item) for name in ("training", "validation") for item in lists[name]]
    if not items:
        raise DataError(f"{_show(cfg.path)}: no volumes found; looked for {' '.join(SPATIAL)} (also .gz), .npy, .npz")
    folder, groups, refused, channels, start = cache_folder(cfg), {"training": [], "validation": []}, 0, None, time.monotonic()
    for number, (name, item) in enumerate(items):
        if time.monotonic() - start > 20:
            say(f"data: {number} of {len(items)} files read; their cache in {_show(folder)} makes the next start quick")
            start = time.monotonic()
        try:
            entries = _cached(item, cfg, folder)
            channels = channels or entries[0].shape[0]
            _check_channels(item, entries[0].shape[0], channels)
        except CacheError:
            raise
        except DataError as error:
            if cfg.strict:
                raise DataError(f"{error} (data.strict)") from None
            say(f"data: refused {error}")
            refused += 1
            continue
        groups[name].append(entries)
        if item.kind is not None and item.kind.lower() not in MODALITIES:
            say(f"data: {_show(item.path)}: class {_one_line(item.kind, 40)!r} names no intensity rule ({', '.join(MODALITIES)}); "
                f"took {entries[0].intensity.modality}")
    if not groups["training"]:
        raise DataError(f"{_show(cfg.path)}: no usable training volume among {len(lists['training'])}, {refused} refused; "
                        f"see the lines above or run python data.py on it")
    if lists["validation"] and not groups["validation"]:
        say("data: no usable volume in the `validation` list; some of the training files are held out instead")
    if refused:
        say(f"data: {refused} of {len(items)} files refused, going on with the others; --data.strict makes that an error")
    guesses: dict[str, list[Entry]] = {}
    for entry in (group[0] for part in groups.values() for group in part):
        if entry.guessed:
            guesses.setdefault(entry.intensity.modality, []).append(entry)
    for modality, entries in guesses.items():
        names = f"{', '.join(entry.name for entry in entries[:4])}{', ...' * (len(entries) > 4)}"
        say(f"data: guessed {modality} from the values of {len(entries)} file{'s' * (len(entries) > 1)} ({names}); "
            "data.modality or a datalist's class says it")
    return groups["training"], groups["validation"]


def _check_channels(item: Item, found: int, expected: int) -> None:
    if found != expected:
        raise DataError(f"{_show(item.path)}: {found} channel{'s' * (found > 1)}, the first accepted volume has {expected}; "
                        "use data.select_channel to pick one of each, or another folder")


def _with_unique_name(entry: Entry, taken: dict[str, str | None]) -> Entry:
    """Two files may share a name in different folders: the second becomes NAME-2. The same volume keeps its name."""
    name, number = entry.name, 2
    while taken.setdefault(name, f"{entry.path}/{entry.name}") != f"{entry.path}/{entry.name}":
        name, number = f"{entry.name}-{number}", number + 1
    return dataclasses.replace(entry, name=name)


def _default_patch(entries: list[Entry], most: tuple[int, int, int]) -> tuple[int, int, int]:
    """`most`, or the extent of the middle volume, rounded down to a multiple of 4, where that is less."""
    middle = [sorted(entry.shape[axis] for entry in entries)[len(entries) // 2] for axis in (1, 2, 3)]
    return tuple(min(limit, n if n < 4 else n // 4 * 4) for limit, n in zip(most, middle))


def _sizes(size: tuple[int, ...]) -> str:
    return ",".join(map(str, size))


# --------------------------------------------------------------------------------------------------------------------- crops
def _rng(seed: int, purpose: str, number: int = 0) -> np.random.Generator:
    """A generator of its own for every (seed, purpose, number)."""
    return np.random.Generator(np.random.PCG64([seed & 2**64 - 1, int.from_bytes(purpose.encode(), "big"), number]))


class Crops(torch.utils.data.Dataset):
    """Random crops of the training volumes. Item i, for any i >= 0, is a function of (seed, i) alone.

    item -> image (C, D, H, W) float32 of size data.patch, number of its volume in data.train. Item i belongs to epoch i // len; within an
    epoch every volume comes exactly crops_per_volume times, in an order of its own.
    """
    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.data.train) * self.data.cfg.crops_per_volume

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        epoch, place = divmod(index, len(self))
        if epoch != self.epoch:
            self.order = _rng(self.seed, "order", epoch).permutation(len(self)) % len(self.data.train)
            self.epoch = epoch
        number = int(self.order[place])
        entry, cfg, point = self.data.train[number], self.data.cfg, None
        draw = _rng(self.seed, "crop", index).random(8)
        if cfg.foreground:  # draws of their own: the others stay where they are
            share, *which = _rng(self.seed, "foreground", index).random(3)
            point = _point(entry, which) if share < cfg.foreground else None
        return torch.from_numpy(_augmented_crop(entry, self.data.patch, draw, cfg, point)), number


class Crop(NamedTuple):
    """A held-out image with its place in the world."""
    image: torch.Tensor                  # (C, D, H, W) float32, normalised
    entry: Entry                         # the volume that it comes from
    affine: np.ndarray                   # (4, 4), of the crop's grid


def val_crops(data: Data, seed: int, count: int) -> list[Crop]:
    """`count` fixed crops of size data.patch of the held-out volumes, each in turn, never augmented; crop k is a function of (seed, k).

    With data.foreground above 0 each of them holds foreground, if its volume has any.
    """
    order = _rng(seed, "val order").permutation(len(data.val))
    crops = []
    for k in range(count):
        entry, draw = data.val[order[k % len(order)]], _rng(seed, "val", k).random(3)
        point = _point(entry, _rng(seed, "val foreground", k).random(2)) if data.cfg.foreground else None
        d, h, w = starts = _starts(entry, data.patch, draw, point)
        image = torch.from_numpy(_crop(entry, data.patch, starts))
        crops.append(Crop(image, entry, entry.affine @ nib.affines.from_matvec(np.eye(3), (w, h, d))))  # affines are in x, y, z
    return crops


class WholeVolumes:
    """The held-out volumes as Crops, each read when its turn comes."""
    def __init__(self, data: Data):
        self.entries = data.val

    def __iter__(self) -> Iterator[Crop]:
        return (Crop(torch.from_numpy(entry.read()), entry, entry.affine) for entry in self.entries)


def _point(entry: Entry, draw: Sequence[float]) -> tuple[int, ...] | None:
    """A foreground voxel D, H, W chosen by two numbers in [0, 1): class, then place; None where the volume has none."""
    points = _open_array(entry.points) if isinstance(entry.points, str) else entry.points
    return tuple(points[int(draw[0] * points.shape[0]), int(draw[1] * points.shape[1])].tolist()) if len(points) else None


def _starts(entry: Entry, size: tuple[int, ...], draw: np.ndarray, point: tuple[int, ...] | None = None) -> list[int]:
    """First voxel of a crop at a place given by three numbers in [0, 1); below 0 where the volume is smaller and lies centred in it.

    point: a voxel that the crop must hold; then the numbers choose among the places where it does.
    """
    starts = []
    for axis, (u, n, want) in enumerate(zip(draw, entry.shape[1:], size)):
        low, high = (0, n - want) if point is None else (max(0, point[axis] - want + 1), min(point[axis], n - want))
        starts.append(low + int(u * (high - low + 1)) if n >= want else -((want - n) // 2))
    return starts


def _crop(entry: Entry, size: tuple[int, ...], starts: list[int]) -> np.ndarray:
    """A crop (C, *size); where the volume is smaller, the rest is its background."""
    region = tuple(slice(max(start, 0), min(start + want, n)) for start, want, n in zip(starts, size, entry.shape[1:]))
    voxels = entry.read(region)
    if voxels.shape[1:] == tuple(size):
        return voxels
    padded = np.full((len(voxels), *size), entry.intensity.background, dtype=np.float32)
    inside = tuple(slice(max(-start, 0), max(-start, 0) + n) for start, n in zip(starts, voxels.shape[1:]))
    padded[(slice(None), *inside)] = voxels
    return padded


def _augmented_crop(entry: Entry, patch: tuple[int, int, int], draw: np.ndarray, cfg: DataConfig,
                    point: tuple[int, ...] | None = None) -> np.ndarray:
    """draw (8,) in [0, 1): place (3), zoom, flips (3), contrast: an option that is off moves none of the others."""
    size = patch
    if cfg.spacing == "random":
        low, high = map(math.log, cfg.zoom)
        size = tuple(max(1, round(n / math.exp(low + draw[3] * (high - low)))) if n > 1 else 1 for n in patch)  # a picture stays flat
    crop = _crop(entry, size, _starts(entry, size, draw[:3], point))
    if size != patch:
        crop = F.interpolate(torch.from_numpy(crop)[None], size=patch, mode="trilinear")[0].numpy()
    if cfg.flip != "none":
        axes = [axis for axis, name in ((1, "D"), (2, "H"), (3, "W")) if name in cfg.flip.upper() and draw[3 + axis] < 0.5]
        crop = np.ascontiguousarray(np.flip(crop, axes))
    if cfg.jitter:
        background = entry.intensity.background
        crop = (crop - background) * np.float32(1 + cfg.jitter * (2 * draw[7] - 1)) + np.float32(background)
        crop = crop.clip(-1, 1) if entry.intensity.modality == "ct" else crop
    return crop


# ---------------------------------------------------------------------------------------------------------- synthetic volumes
def synthetic_entries(cfg: DataConfig, seed: int) -> list[Entry]:
    """cfg.synthetic_count volumes in memory, number i a function of (seed, i); normalised and resampled as files are."""
    entries = []
    for number in range(cfg.synthetic_count):
        volume = synthetic_volume(cfg.synthetic, seed, number, cfg.synthetic_size)
        modality = {"ct": "ct", "radar": "voxel"}[cfg.synthetic] if cfg.modality == "auto" else cfg.modality
        keep = slice(None) if cfg.select_channel is None else slice(cfg.select_channel, cfg.select_channel + 1)
        if not len(volume.array[keep]):
            raise DataError(f"synthetic {cfg.synthetic} volumes have {len(volume.array)} channels, data.select_channel="
                            f"{cfg.select_channel} counts from 0; choose another")
        array, intensity, affine = _finish(volume._replace(array=volume.array[keep]), MODALITIES[modality], cfg)
        entries.append(Entry(f"synthetic_{cfg.synthetic}_{number:03d}", None, array.shape, _spacing(affine), affine, intensity, array))
    return entries


def synthetic_volume(kind: str, seed: int, number: int, size: tuple[int, int, int]) -> Volume:
    """Volume `number` of a seed. ct: (1, D, H, W) in HU; radar: (4, D, H, W) occupancy, power (dB), velocity and its variance."""
    rng = _rng(seed, f"synthetic {kind}", number)
    array = _phantom(rng, size)[None] if kind == "ct" else _radar_scene(rng, size)
    extent = (320.0, 320.0, 320.0) if kind == "ct" else (12.0, 48.0, 48.0)  # mm; a radar grid is in metres, as arrays on disk carry no unit
    spacing = tuple(length / n for length, n in zip(extent, size))
    return Volume(array, spacing, np.diag([*spacing[::-1], 1.0]))


def _texture(rng: np.random.Generator, size: tuple[int, int, int], grain: float) -> np.ndarray:
    """Smooth noise of unit variance or a little less; grain: voxels per bump."""
    coarse = torch.from_numpy(rng.standard_normal([max(2, math.ceil(n / grain)) for n in size], dtype=np.float32))
    return F.interpolate(coarse[None, None], size=size, mode="trilinear")[0, 0].numpy()


def _tree(rng: np.random.Generator, size: tuple[int, int, int], root: tuple[float, ...], direction: tuple[float, ...], radius: float,
          branches: int, length: float) -> np.ndarray:
    """Branching tubes (vessels, airways) as a mask (D, H, W). Root and length in half extents, radius in voxels; it thins out."""
    mask, half = np.zeros(size, dtype=bool), np.array(size) / 2
    stack = [(np.array(root), np.array(direction, dtype=float), radius, branches)]
    while stack:
        place, heading, r, left = stack.pop()
        for _ in range(max(2, int(length * half.min() / max(r, 1)))):
            heading += 0.25 * rng.standard_normal(3)
            heading /= np.linalg.norm(heading)
            place = place + heading * max(r, 1) / half
            centre = (place + 1) * half - 0.5
            box = tuple(slice(max(0, int(c - r)), max(0, int(c + r) + 2)) for c in centre)
            z, y, x = (np.arange(s.start, min(s.stop, n)) - c for s, n, c in zip(box, size, centre))
            mask[box] |= z[:, None, None]**2 + y[:, None]**2 + x**2 <= r * r
        if left:
            for _ in range(2):
                stack.append((place, heading + 0.8 * rng.standard_normal(3), r * 0.78, left - 1))
    return mask


def _phantom(rng: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """A trunk in HU, (D, H, W): body of fat and muscle, lungs with vessels and airways, heart, liver, kidneys, spine, ribs, couch."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32).reshape(shape) for n, shape in zip(size, ((-1, 1, 1), (-1, 1), (-1,))))
    scale = min(size[1:]) / 96  # voxels per voxel of the default size: tubes keep their share of the picture

    def vary(value: float, share: float = 0.12) -> float:
        return value * float(rng.uniform(1 - share, 1 + share))

    def ellipsoid(cz: float, cy: float, cx: float, rz: float, ry: float, rx: float) -> np.ndarray:  # < 1 inside
        cz, cy, cx = (c + float(rng.normal(0, 0.03)) for c in (cz, cy, cx))
        return ((z - cz) / vary(rz))**2 + ((y - cy) / vary(ry))**2 + ((x - cx) / vary(rx))**2

    fine, middle, large = (_texture(rng, size, grain) for grain in (1.5, 5 * scale, 16 * scale))
    hu = np.full(size, -1000, dtype=np.float32)
    body = (y / vary(0.68, 0.06))**2 + (x / vary(0.88, 0.06))**2 + 0.06 * np.sin(vary(3, 0.5) * z + rng.uniform(0, 6)) + 0.05 * large
    couch = np.abs(y + 0.88 - 0.12 * x**2) < 0.025                         # y grows towards the front
    hu[np.broadcast_to(couch & (np.abs(x) < 0.8), size)] = vary(-300)
    skin = body < 1
    hu[skin] = (-100 + 15 * middle)[skin]
    muscle = body < vary(0.80, 0.05)
    hu[muscle] = (50 + 22 * middle + 12 * fine)[muscle]

    top = vary(0.1, 1.0)                                                   # the lungs' lower end; the belly is below
    lungs = ((ellipsoid(0.65, 0.05, -0.40, 0.85, 0.42, 0.27) < 1) | (ellipsoid(0.65, 0.05, 0.42, 0.85, 0.42, 0.26) < 1)) & (z > top - 0.3)
    lungs &= body < 0.62
    hu[lungs] = (-840 + 40 * large + 25 * middle)[lungs]
    for side in (-1, 1):
        vessels = np.zeros(size, dtype=bool)
        for _ in range(3):
            root, heading = (rng.uniform(0.2, 0.9), 0.05, side * 0.16), (rng.normal(), rng.normal(), 2 * side)
            vessels |= _tree(rng, size, root, heading, 2.2 * scale, 4, 0.3)
        airways = _tree(rng, size, (0.95, 0.05, 0.02 * side), (-1, 0, side * 0.8), 2.8 * scale, 3, 0.28)
        hu[vessels & lungs] = 40
        hu[airways & muscle] = -980

    def organ(mask: np.ndarray, value: float) -> np.ndarray:
        mask = mask & muscle
        hu[mask] = (value + 14 * middle + 10 * large + 8 * fine)[mask]
        return mask

    shape = ellipsoid(top + 0.15, 0.18, -0.10, 0.36, 0.30, 0.27)
    organ(shape < 1, 60)
    organ(shape < 0.45, vary(210, 0.3))                                    # blood with contrast
    liver = organ((ellipsoid(top - 0.55, 0.10, 0.34, 0.45, 0.42, 0.42) + 0.15 * large < 1) & ~lungs, vary(105))
    tree = _tree(rng, size, (top - 0.5, 0.0, 0.15), (rng.normal(), 0.3, 1), 2.2 * scale, 4, 0.22)
    hu[tree & liver] = vary(180)
    for _ in range(rng.integers(0, 4)):                                    # lesions
        cz, cy, cx = top - 0.55 + rng.normal(0, 0.2), 0.1 + rng.normal(0, 0.15), 0.34 + rng.normal(0, 0.15)
        hu[(ellipsoid(cz, cy, cx, 0.1, 0.08, 0.08) < 1) & liver] = vary(40)
    for side in (-1, 1):
        kidney = ellipsoid(top - 0.75, -0.28, side * 0.36, 0.24, 0.13, 0.10)
        organ(kidney < 1, vary(170))
        organ(kidney < 0.3, 20)
    gut = _tree(rng, size, (top - 0.9, 0.2, -0.3), (-0.2, 0.2, 1), 4.5 * scale, 2, 0.5) & muscle & ~liver & (z < top - 0.1)
    hu[gut] = (30 + 60 * large)[gut]
    hu[gut & (large > 0.5)] = -900                                         # gas

    angle, period = np.arctan2(y, x), vary(14, 0.2)
    ribs = (np.abs(body - 0.70) < 0.05) & (np.sin(period * z + 2.5 * np.abs(np.cos(angle)) + rng.uniform(0, 6)) > 0.45) & (z > top - 0.6)
    hu[ribs] = (550 + 200 * middle)[ribs]
    spine = ((y + 0.42) / 0.13)**2 + ((x - rng.normal(0, 0.01)) / 0.13)**2
    disc = np.sin(period * z) < -0.8
    hu[(spine < 1) & ~disc] = (650 + 90 * middle)[(spine < 1) & ~disc]
    marrow = (spine < 0.62) & (np.sin(period * z) > -0.6)
    hu[marrow] = (230 + 90 * fine + 40 * middle)[marrow]
    hu[(spine < 1) & disc] = 80
    arch = np.broadcast_to(((y + 0.62) / 0.10)**2 + (x / 0.035)**2 < 1, size) & (np.sin(period * z) > 0)
    hu[arch] = 500
    canal = np.broadcast_to(((y + 0.585) / 0.04)**2 + (x / 0.05)**2 < 1, size)
    hu[canal] = 20
    aorta = ((y + 0.22 - 0.03 * np.sin(3 * z)) / 0.065)**2 + ((x + 0.12) / 0.065)**2 < 1
    hu[aorta & muscle] = vary(260, 0.3)
    for axis in range(3):                                                  # the scanner's point spread
        if size[axis] > 2:
            hu = 0.8 * hu + 0.1 * (np.roll(hu, 1, axis) + np.roll(hu, -1, axis))
    return hu + 12 * rng.standard_normal(size, dtype=np.float32)


def _radar_scene(rng: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """A street, (4, D, H, W): ground clutter, walls, poles and moving boxes; a few per cent of the voxels are occupied, the rest 0."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32).reshape(shape) for n, shape in zip(size, ((-1, 1, 1), (-1, 1), (-1,))))
    hit, velocity = np.zeros(size, dtype=bool), np.zeros(size, dtype=np.float32)
    thick = [2.5 / n for n in size]
    bearing = np.arctan2(y, x + 1.2)
    ego = float(rng.uniform(0, 15))
    hit |= (z < -0.9 + thick[0]) & (_texture(rng, size, 3) > 0.9)
    for _ in range(rng.integers(2, 5)):                                    # walls along and across the street
        slope, offset, height = rng.normal(0, 0.25), rng.uniform(-0.9, 0.9), rng.uniform(-0.3, 0.8)
        line = np.abs(y - offset - slope * x) if rng.random() < 0.7 else np.abs(x - offset - slope * y)
        hit |= (line < max(thick[1:]) / 2) & (z < height) & (_texture(rng, size, 4) > 0.1)
    for _ in range(rng.integers(3, 9)):                                    # poles
        cy, cx = rng.uniform(-0.9, 0.9, 2)
        hit |= ((y - cy)**2 + (x - cx)**2 < max(thick[1:])**2) & (z < rng.uniform(-0.2, 0.9))
    velocity += -ego * np.cos(bearing)
    for _ in range(rng.integers(4, 10)):                                   # cars: the faces of boxes, each with its own speed
        cy, cx, ry, rx, rz = *rng.uniform(-0.85, 0.85, 2), rng.uniform(0.05, 0.1), rng.uniform(0.1, 0.22), rng.uniform(0.15, 0.4)
        turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.1)
        u, v = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn), (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        inside = (np.abs(u) < rx) & (np.abs(v) < ry) & (z < -0.9 + rz)
        core = (np.abs(u) < rx - thick[2]) & (np.abs(v) < ry - thick[1]) & (z < -0.9 + rz - thick[0])
        hit = (hit & ~inside) | (inside & ~core)
        velocity = np.where(inside, (rng.uniform(-15, 15) - ego) * np.cos(bearing + turn), velocity)
    distance = np.sqrt((x + 1.2)**2 + y**2)
    power = 24 - 7 * distance + 2.5 * _texture(rng, size, 4) + 0 * z
    variance = np.abs(0.3 * _texture(rng, size, 2)) + 0.02 * np.abs(velocity)
    return np.stack([hit, hit * power, hit * velocity, hit * variance]).astype(np.float32)


# -------------------------------------------------------------------------------------------------------------- command line
def check(paths: list[str]) -> int:
    """Print a row per file of each path, as training with the defaults would see it, a line per refused one. 1 if there is one, else 0."""
    cfg, refused, total = DataConfig(), 0, 0
    found = [[item for items in list_items(path).values() for item in items] for path in paths]
    for path, items in zip(paths, found):
        if not items:
            raise DataError(f"{_show(path)}: no volumes found; looked for {' '.join(SPATIAL)} (also .gz), .npy, .npz")
    width = max(len(_show(item.path)) for items in found for item in items)
    row = f"{{:{width}}}  {{:22}}  {{:16}}  {{:6}}  {{:8}}  {{:20}}  {{:8}}  {{}}"
    print(row.format("file", "shape D,H,W", "spacing mm", "orient", "dtype", "range", "modality", "verdict"))
    for items in found:
        channels = None
        for item in items:
            total += 1
            try:
                loaded = load(item, cfg)
                array, intensity = loaded.volumes[0]
                channels = channels or len(array)
                _check_channels(item, len(array), channels)
            except DataError as error:
                refused += 1
                print(f"{_show(item.path)}  refused: {str(error).removeprefix(_show(item.path) + ': ')}", flush=True)
                continue
            stored = loaded.source.volume.array
            many = f" x{len(loaded.volumes)} volumes" if len(loaded.volumes) > 1 else f" x{len(array)} channels" if len(array) > 1 else ""
            print(row.format(_show(item.path), _sizes(array.shape[1:]) + many, ",".join(f"{mm:.3g}" for mm in loaded.spacing),
                             loaded.source.orientation, loaded.source.dtype, f"{stored.min():.5g} .. {stored.max():.5g}",
                             intensity.modality, "ok"), flush=True)
    print(f"{total} files, {total - refused} usable, {refused} refused")
    return 1 if refused else 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="data.py", description="Check data before training: a row per file, a line per refused file. "
                                     "Exit code 0: all usable, 1: some refused, 2: nothing to check.")
    parser.add_argument("path", nargs="+", metavar="PATH", help="folder, file or JSON datalist")
    paths = parser.parse_args(argv).path
    try:
        return check(paths)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader went away: data.py DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
