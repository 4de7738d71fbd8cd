"""Volumes from disk, or synthetic ones, checked, normalised, cached, and cropped at random.

    python data.py PATH...      # check data before training: a row per file, one line per refused file

A folder, a file or a JSON datalist goes in (`open_data`); out come entries whose voxels lie normalised in memory-mapped
files, so that a crop reads its own rows and nothing else, and `Crops`, a dataset in which item i is a function of (seed, i).

Segmentation (`data.labels`): a label goes with each image, by a datalist's {image, label}, the same name in `images/` and `labels/` (or
`imgs/` and `masks/`), `X_image` beside `X_label`, or `vol` and `seg` in one .npz. It lies on its image's grid, follows it through every
change (nearest voxel), and comes as class numbers, int64. Without `data.labels` the labels of pairs are left out.

Axes. Arrays here are (C, D, H, W). A spatial image (X, Y, Z) is reoriented to the closest RAS axes and transposed: D, H, W are
Z, Y, X. The spatial axes of .npy and .npz are x, y, z likewise, 1 mm; their channel axis is `data.channel_axis`. Sizes and
spacing (mm) are D, H, W everywhere. An image of 2 axes, or of 1 slice, is a volume whose third extent is 1, wherever that axis
lies after reorientation. The 4th axis of an image holds separate volumes, or channels (`data.four_d`). A picture (PNG, JPEG, BMP,
TIFF) is a volume of 1 slice, its rows H from the top.

Intensities are in [-1, 1]. CT: HU clipped to a window. MR (and any other positive scale, such as PET): 0.5-99.5 percentile of the
foreground, per channel, clipped below only. Voxel grids (radar, LiDAR): divided by the largest magnitude per channel, 0 stays 0.
Pictures: the range of their type, 0 to 255 or 65535.

Shape legend: C channels, D H W depth height width, T volumes of a 4-D file.
Needs torch, numpy and nibabel; pictures Pillow. Works copied alone. Version 1.1.
"""
import argparse
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
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
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")  # read by Pillow
FORMATS = f"{' '.join(SPATIAL)} (also .gz), .npy, .npz, {' '.join(PICTURES)}"
DENSE_KEYS = ("volume", "voxel", "vol")  # of an .npz, in this order
LABEL_KEYS = ("seg", "label", "labels", "mask")
IMAGE_FOLDERS, LABEL_FOLDERS = ("images", "imgs", "imagestr"), ("labels", "masks", "labelstr")  # side by side in one folder
LABEL_SUFFIX = re.compile("_(label|mask|seg)$")  # X_label goes with X_image or X, in lower case
POINTS = 4096        # places kept to put a foreground crop at: of each volume, or of each class of it
CONTRAST = 0.05      # normalised; an image voxel further than this from the background is foreground
MAX_DATALIST = 2**28  # bytes; some million files
MAX_HEADER = 2**24   # bytes: extensions in front of the voxels, and what may follow them in a compressed file
MAX_CLASSES = 1024   # of a label map: class ids lie below
GUESSED_CHANNELS = 8  # an outer axis of a 4-D array is taken for channels up to this length (the networks are tested with 1-8)
WINDOWS = {name: (level - width / 2, level + width / 2) for name, width, level in
           (("lung", 1500, -600), ("bone", 1500, 300), ("soft_tissue", 400, 50), ("brain", 80, 35))}  # HU, low and high
MODALITIES = {"ct": "ct", "mr": "mr", "mri": "mr", "voxel": "voxel", "radar": "voxel", "lidar": "voxel",
              "picture": "picture"}  # name -> rule


class DataError(ValueError):
    """A file, folder or datalist that cannot be used: one line that names it, says what was found and what to do."""


class PillowError(DataError):
    """A picture, and no Pillow to read it: no fault of the file, and the end of the run."""


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
    modality: str = "auto"                   # auto (by the values) | ct | mr | voxel (or radar) | picture; a datalist's `class` wins
    window: str = "none"                     # CT: none (hu_range) | lung | bone | soft_tissue | brain
    hu_range: tuple[float, float] = (-1000.0, 1000.0)  # CT without window: HU mapped to -1 and 1; air to dense bone
    percentiles: tuple[float, float] = (0.5, 99.5)  # MR: mapped to -1 and 1; MAISI: 0,99.5 of all
    percentiles_of: str = "foreground"       # MR: foreground (voxels above 0) | all (MAISI)
    voxel_scale: tuple[float, ...] | None = None  # voxel: magnitude mapped to 1, one per channel; None: each volume's largest
    spacing: str = "original"                # original | random (zoom of every crop) | mm as D,H,W such as 3,1,1
    zoom: tuple[float, float] = (0.8, 1.25)  # spacing random: smallest and largest magnification, drawn log-uniformly
    resize: tuple[int, int, int] | None = None  # voxels; whole volumes are resampled to this grid; wins over a spacing in mm
    scale: float = 1.0                       # shrinks H and W by this factor, after a spacing in mm; resize wins
    four_d: str = "volumes"                  # 4th axis of an image: volumes (separate; split by file all the same) | channels
    nan: str = "error"                       # NaN and infinite voxels: error (the file is refused) | zero
    channel_axis: int | None = None          # of 4-D .npy and .npz; None: the shorter of the last and the first axis, up to 8
    select_channel: int | None = None        # use this channel alone, from 0
    labels: bool = False                     # image/label pairs, for segmentation; train.py sets it for its task
    classes: int | None = None               # labels lie below; None: the training set's largest + 1, at least 2
    ignore_label: int | None = None          # a label that may lie beyond the classes: voxels that the loss leaves out
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ..., all others are 0; None: as stored (pictures: in order)
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
                              ("four_d", ("volumes", "channels")), ("nan", ("error", "zero")),
                              ("percentiles_of", ("foreground", "all"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"data.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name in ("patch", "resize", "synthetic_size"):
            size = getattr(self, name)
            if size is not None and (len(size) != 3 or any(int(n) != n or n < 1 for n in size)):
                raise ValueError(f"data.{name} is {size}; give three whole numbers of voxels D,H,W, each at least 1")
        for name, least in (("synthetic_count", 1), ("crops_per_volume", 1), ("workers", 0), ("select_channel", 0),
                            ("classes", 2)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"data.{name} is {getattr(self, name)}; use {least} or more")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction is {self.val_fraction}; use a share of the files in [0, 1)")
        if not 0 < self.scale <= 1:
            raise ValueError(f"data.scale is {self.scale}; use a factor in (0, 1], such as 0.5")
        if self.classes is not None and self.classes > MAX_CLASSES:
            raise ValueError(f"data.classes is {self.classes}; use {MAX_CLASSES} at most")
        if self.ignore_label is not None and not -2**15 <= self.ignore_label < 2**15:
            raise ValueError(f"data.ignore_label is {self.ignore_label}; use a number that fits in 16 bits, such as 255 or -1")
        if (values := self.label_values) is not None and (
                len(set(values)) != len(values) or not 2 <= len(values) <= MAX_CLASSES or not all(0 <= value < 2**15 for value in values)):
            raise ValueError(f"data.label_values is {values}; give the stored value of each class once, background first, such as 0,255")
        if values is not None and self.classes not in (None, len(values)):
            raise ValueError(f"data.label_values is {values}, {len(values)} classes, but data.classes is {self.classes}; leave one out")
        if not 0 <= self.foreground <= 1:
            raise ValueError(f"data.foreground is {self.foreground}; use a share of the crops in [0, 1], such as 0.5")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"data.jitter is {self.jitter}; use a factor in [0, 1), such as 0.1")
        if len(self.hu_range) != 2 or not -math.inf < self.hu_range[0] < self.hu_range[1] < math.inf:
            raise ValueError(f"data.hu_range is {self.hu_range}; give two HU values, the lower first")
        if len(self.percentiles) != 2 or not 0 <= self.percentiles[0] < self.percentiles[1] <= 100:
            raise ValueError(f"data.percentiles is {self.percentiles}; give two numbers from 0 to 100, the lower first")
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
    """One file of a data set. `kind` is the datalist's `class`, as written there. `label` may be the file itself: an .npz of both."""
    path: Path
    kind: str | None = None
    label: Path | None = None
    fault: str | None = None  # why it is refused before it is read: an image without label, a label without image


def list_items(path: str | os.PathLike, labels: bool = False, say: Callable[[str], object] = lambda line: None) -> dict[str, list[Item]]:
    """Folder, file or JSON datalist -> {"training": [...], "validation": [...], "testing": [...]}, each file once.

    A folder is searched recursively, links followed, hidden names skipped; the files are sorted by their path and are all
    `training`. A datalist has those three keys (Decathlon's `test` is `testing`), each a list of {image, label?, class?} or of
    plain paths, relative to the JSON. Raises DataError when there is nothing at `path` or the datalist is malformed.

    labels: each image comes with its label; what has no partner has a `fault`. Otherwise the labels of pairs are left out. So are, with or
    without, pictures in a folder that holds volumes, unless they are pairs; `say` gets a line about what was left out.
    """
    path = Path(os.path.expanduser(path))
    lists = {"training": [], "validation": [], "testing": []}
    if os.path.isdir(path):
        lists["training"] = _pair(path, list(_walk(path)), labels, say)
    elif path.suffix.lower() == ".json" and os.path.isfile(path):
        lists = _read_datalist(path, labels)
    elif os.path.exists(path):
        lists["training"] = [_with_label_beside(path) if labels else Item(path)]
    else:
        raise DataError(f"{show(path)}: no such file or folder; give a folder, a volume or a JSON datalist")
    for name, items in lists.items():
        once: dict[str, Item] = {}
        for item in items:
            once.setdefault(os.path.realpath(item.path), item)  # a link to a file is that file: else it could be on both sides of the split
        lists[name] = list(once.values())
    return lists


def _walk(root: Path) -> Iterator[Path]:
    """Files under `root` that look like volumes, sorted; of a pair such as .hdr/.img the header alone. Link loops end."""
    def fail(error: OSError):
        raise DataError(f"{show(error.filename)}: {error.strerror}; make the folder readable or move it out of the data")

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
            if kind in (*SPATIAL, ".npy", ".npz", ".bin", *PICTURES) and not name.startswith(".") and not is_second:
                found.append(Path(folder, name))
    return iter(sorted(file for file in found if os.path.isfile(file) or not os.path.exists(file)))  # no pipes; broken links stay


NO_LABEL = "has no label: no file of its name in labels/ or masks/, no X_label beside it, no `seg` in an .npz, none in a datalist"
NO_IMAGE = "a label without its image; put the image beside it, or name the pair in a datalist, {\"image\": ..., \"label\": ...}"


def _pair(root: Path, files: list[Path], labels: bool, say: Callable[[str], object]) -> list[Item]:
    """Files of a folder -> items, see `list_items`."""
    pictures = {file for file in files if _suffix(file)[0] in PICTURES}
    mixed = any(_suffix(file)[0] not in (*PICTURES, ".bin") for file in files)
    if mixed and not labels:
        files = [file for file in files if file not in pictures]
    label_of, image_of, in_folder = _match(root, files)
    if labels:
        ignored = {file for file in pictures if mixed and label_of.get(file) is None and image_of.get(file) is None}
        items = [Item(file, None, label_of.get(file) or _own_label(file), NO_IMAGE if file in image_of else None)
                 for file in files if file not in ignored and image_of.get(file) is None]
        items = [item if item.label or item.fault else item._replace(fault=NO_LABEL) for item in items]
    else:
        ignored = pictures if mixed else set()
        with_pairs = {label.parent for label, image in image_of.items() if image is not None}
        left = [label for label in image_of if label in in_folder or label.parent in with_pairs]
        if left:
            say(f"data: left out {_some(left, 'label file')}: the labels of pairs serve segmentation only")
        items = [Item(file) for file in files if file not in set(left)]
    if ignored:
        say(f"data: left out {_some(sorted(ignored), 'picture')} among volumes; give pictures a folder of their own to use them")
    return items


def _some(files: Sequence[Path], what: str) -> str:
    return f"{len(files)} {what}{'s' * (len(files) > 1)} ({', '.join(show(file.name) for file in files[:3])}{', ...' * (len(files) > 3)})"


def _match(root: Path, files: Sequence[Path]) -> tuple[dict[Path, Path | None], dict[Path, Path | None], set[Path]]:
    """{image: its label or None}, {label: its image or None}, and the labels that a folder such as labels/ makes labels."""
    homes, places = {}, {}
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        level = next((i for i in reversed(range(len(folders))) if folders[i].lower() in IMAGE_FOLDERS + LABEL_FOLDERS), None)
        if level is not None:
            role = folders[level].lower() in LABEL_FOLDERS
            homes.setdefault(folders[:level], set()).add(role)
            places[file] = folders[:level], folders[level + 1:], role
    images: dict[tuple, list[Path]] = {}
    names: dict[Path, list[tuple]] = {}
    for file in files:
        stem = file.name[:len(file.name) - len("".join(_suffix(file.name)))].lower()
        base = LABEL_SUFFIX.sub("", stem)
        home, below, role = places.get(file, ((), (), False))
        in_home = file in places and len(homes[home]) == 2
        place = (home, below) if in_home else (None, file.parent)
        if in_home and role:
            names[file] = [(*place, name) for name in (stem, base, f"{stem}_image", f"{base}_image")]
        elif not in_home and base != stem and _own_label(file) is None:
            names[file] = [(*place, name) for name in (f"{base}_image", base)]
        else:
            images.setdefault((*place, stem), []).append(file)
    label_of: dict[Path, Path | None] = {file: None for group in images.values() for file in group}
    image_of: dict[Path, Path | None] = dict.fromkeys(names)
    for rank in range(4):                                      # an equal name goes before a name with an ending
        for label, keys in names.items():
            free = [file for file in images.get(keys[rank], ()) if label_of[file] is None] if rank < len(keys) else []
            if free and image_of[label] is None:
                label_of[free[0]], image_of[label] = label, free[0]
    return label_of, image_of, {label for label, keys in names.items() if keys[0][0] is not None}


def _own_label(path: Path) -> Path | None:
    """The file itself if it is an .npz of an image and its label (or none that can be opened: reading it says why)."""
    if _suffix(path)[0] != ".npz" or not os.path.isfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # a damaged archive may raise anything
        return path
    return path if keys & set(LABEL_KEYS) and keys & set(DENSE_KEYS) else None


def _with_label_beside(path: Path) -> Item:
    """One image and the label that a folder's pairing would give it."""
    file = Path(os.path.abspath(path))
    root = file.parent.parent if file.parent.name.lower() in IMAGE_FOLDERS else file.parent
    try:
        folders = [file.parent] + [folder for folder in root.iterdir() if folder.name.lower() in LABEL_FOLDERS and folder.is_dir()]
        files = sorted({other for folder in folders for other in folder.iterdir()
                        if _suffix(other)[0] in (*SPATIAL, ".npy", ".npz", *PICTURES) and other.is_file()} | {file})
    except OSError:  # a folder that may be entered, not listed
        files = [file]
    label_of, image_of, _ = _match(root, files)
    label = label_of.get(file) or _own_label(file)
    return Item(path, None, label, None if label else NO_IMAGE if file in image_of else NO_LABEL)


def _suffix(name: str | os.PathLike) -> tuple[str, str]:
    """('.nii', '.gz') of 'a.NII.gz': the kind of file and its compression, lower case; ('.npy', '') of 'a.npy'."""
    stem, last = os.path.splitext(os.path.basename(name).lower())
    return (os.path.splitext(stem)[1], last) if last in COMPRESSED else (last, "")


def _read_datalist(path: Path, labels: bool) -> dict[str, list[Item]]:
    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(found := dict(pairs)) != len(pairs):              # json keeps the last one and says nothing
            raise ValueError(f"{len(pairs) - len(found)} keys of {brief(sorted(found)[:8])} stand there twice")
        return found

    try:
        if (size := os.path.getsize(path)) > MAX_DATALIST:
            raise ValueError(f"{size} bytes; a datalist has {MAX_DATALIST} at most")
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{show(path)}: not a readable JSON file ({one_line(error)})") from None
    if not isinstance(content, dict) or not isinstance(content.get("training"), list):
        raise DataError(f"{show(path)}: a datalist needs a list `training` of {{image, label?, class?}}, found "
                        f"{brief(sorted(content)[:8]) if isinstance(content, dict) else type(content).__name__}")
    lists = {}
    for name, keys in (("training", ("training",)), ("validation", ("validation",)), ("testing", ("testing", "test"))):
        entries = next((content[key] for key in keys if key in content), None) or []
        if not isinstance(entries, list):
            raise DataError(f"{show(path)}: `{name}` is a {type(entries).__name__}; make it a list of {{image, label?, class?}}")
        lists[name] = [_datalist_item(path, name, number, entry, labels) for number, entry in enumerate(entries)]
    return lists


def _datalist_item(path: Path, name: str, number: int, entry: object, labels: bool) -> Item:
    image, kind = (entry.get("image"), entry.get("class")) if isinstance(entry, dict) else (entry, None)
    if not _is_name(image):
        raise DataError(f"{show(path)}: {name}[{number}] is {brief(entry)}; make it {{\"image\": path}} or a path")
    if kind is not None and not isinstance(kind, (str, int)):
        raise DataError(f"{show(path)}: {name}[{number}] has the class {brief(kind)}; make it a text such as ct")
    file, label = path.parent / os.path.expanduser(image), entry.get("label") if labels and isinstance(entry, dict) else None
    if label is not None and not _is_name(label):
        raise DataError(f"{show(path)}: {name}[{number}] has the label {brief(label)}; make it a path")
    label = path.parent / os.path.expanduser(label) if label else _own_label(file) if labels else None
    return Item(file, None if kind is None else str(kind), label, NO_LABEL if labels and label is None else None)


def _is_name(value: object) -> bool:
    """A text that may be a path: JSON can hold halves of characters, which no file system takes."""
    return isinstance(value, str) and 0 < len(value) <= 4096 and "\0" not in value and not re.search("[\ud800-\udc7f\udd00-\udfff]", value)


def _stem(path: Path) -> str:
    """Name without its volume extension, printable and fit for a file name."""
    name = path.name[:len(path.name) - len("".join(_suffix(path.name)))] or path.name
    return re.sub(r"[^\w.-]", "_", name)


def show(path: str | os.PathLike) -> str:
    """A path as one printable line, whatever bytes its name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def one_line(message: object, limit: int = 200) -> str:
    text = show(" ".join(str(message).split()))
    return text if len(text) <= limit else text[:limit - 3] + "..."


def brief(value: object, limit: int = 80) -> str:
    """A value as one short line, also one that is nested too deep, or too long a number, to be written out."""
    try:
        return one_line(repr(value), limit)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


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


def _read(path: Path, volume: int | None, nan: str, channel_axis: int | None, max_gib: float, label: bool = False) -> Source:
    try:
        _check_is_file(path)
        with quiet(), np.errstate(all="ignore"):
            kind = _suffix(path)[0]
            if kind == ".bin":
                raise DataError("raw .bin rows carry no shape; turn the points into a voxel grid (.npy or .npz) first")
            if kind in (".npy", ".npz"):
                source = _read_array(path, channel_axis, max_gib, label)
            else:
                source = _read_picture(path, max_gib, label) if kind in PICTURES else _read_image(path, volume, max_gib)
        _check_finite(source.volume.array, nan)
        return source
    except DataError as error:
        raise type(error)(f"{show(path)}: {error}") from None
    except Exception as error:  # a decoder that meets damaged or hostile bytes may raise anything at all; the cause stays chained
        raise DataError(f"{show(path)}: cannot be read ({type(error).__name__}: {one_line(error)}); "
                        "repair the file or take it out of the data") from error


def _check_is_file(path: Path) -> None:
    if not os.path.isfile(path):
        raise DataError("not a regular file" if os.path.exists(path) else "no such file, or no permission to see it")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
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
    count, named = math.prod(shape), brief(shape)
    if min(shape, default=1) < 1:
        raise DataError(f"declares shape {named}, which holds no voxels")
    if count * max(4, itemsize) > max_gib * 2**30:
        gib = count * max(4, itemsize) / 2**30 if count < 2**64 else math.inf
        raise DataError(f"declares shape {named}, {gib:.3g} GiB, more than data.max_gib={max_gib:g}; "
                        "raise that if the file is what it says")
    if available is not None and count * itemsize > available:
        raise DataError(f"declares {count * itemsize} bytes of voxels (shape {named}) but can hold no more than {max(0, available)}; "
                        "it is truncated or its header is damaged")


def _check_dtype(dtype: np.dtype) -> None:
    if dtype.kind not in "fiub":
        what = {"c": "complex values; store magnitude and phase as two real channels", "V": "RGB or structured voxels; store one number "
                "per voxel and channel", "O": "pickled objects; store plain numbers"}.get(dtype.kind, f"voxels of type {dtype}")
        raise DataError(f"holds {what}")


def _read_image(path: Path, volume: int | None, max_gib: float) -> Source:
    """Everything that nibabel takes for a spatial image."""
    for half, *_ in _stamp(path):
        _check_is_file(Path(half))
        _check_extensions(half)
    image = nib.load(path, mmap=False)  # a file that shrinks while it is mapped would kill the process
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
    offset = max(0, int(getattr(image.dataobj, "offset", 0)))
    if offset > max_gib * 2**30:
        raise DataError(f"its voxels begin at byte {offset}; repair the header")
    _check_size(shape, dtype.itemsize, max_gib, available if available is None else available - offset)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0:
        raise DataError(f"its affine {affine[:3].round(3).tolist()} is singular or not finite; repair the header")

    series = shape[3] if kept == 4 else 1
    if volume is not None and not 0 <= volume < series:
        raise DataError(f"has {series} volumes, number {volume} was asked for; count from 0")
    with contextlib.ExitStack() as stack:
        if packed and hasattr(image.dataobj, "file_like"):
            stream = image.dataobj.file_like = stack.enter_context(nib.openers.ImageOpener(stored))
        stored_axes = image.dataobj[..., volume] if kept == 4 and volume is not None else np.asarray(image.dataobj)
        if packed and hasattr(image.dataobj, "file_like"):
            _read_to_end(stream)
    array = stored_axes.reshape(*shape[:3], *(1,) * (3 - len(shape)), -1)           # (X, Y, Z, T), axes as stored
    to_ras = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(to_ras, array.shape[:3])
    array = nib.apply_orientation(array, to_ras).transpose(3, 2, 1, 0)              # (T, D, H, W)
    return Source(Volume(np.ascontiguousarray(array, dtype=np.float32), _spacing(affine), affine), kept == 4, str(dtype),
                  "".join(nib.aff2axcodes(image.affine)))


def _check_extensions(path: str) -> None:
    """Refuse what stands between a NIfTI header and its voxels and is not as long as it says: nibabel reads that whole, so that a small
    .gz could fill the memory."""
    with nib.openers.ImageOpener(path) as stream:
        head = stream.read(544)
        kind, start = (nib.Nifti2Header, 544) if nib.Nifti2Header.may_contain_header(head) else (nib.Nifti1Header, 352)
        if not kind.may_contain_header(head) or not any(head[start - 4:start - 3]):
            return
        content = head + stream.read(MAX_HEADER)
    if len(content) < MAX_HEADER:
        return
    header = kind(head[:start - 4], check=False)
    end = float(header["vox_offset"]) if _suffix(path)[0] == ".nii" else math.inf  # of a pair they reach to the header's end
    order = "little" if header.endianness == "<" else "big"
    while start + 16 <= end <= MAX_HEADER:
        size = int.from_bytes(content[start:start + 4], order)
        if not 8 <= size <= end - start:
            break
        start += size
    if not start <= end < start + 16:
        raise DataError(f"its header extensions do not end where its voxels begin, or exceed {MAX_HEADER} bytes; repair the header")


def _read_to_end(stream) -> None:
    """What follows the voxels in a compressed file: its checksum is looked at only there. Raises what the decoder raises."""
    left = MAX_HEADER
    while part := stream.read(2**20):
        left -= len(part)
        if left < 0:
            raise DataError(f"goes on for more than {MAX_HEADER} bytes after its voxels; its header is damaged, or it is a bomb")


def _read_picture(path: Path, max_gib: float, label: bool) -> Source:
    """A picture as (C, 1, H, W): 1 channel when it is grey, else 3, alpha dropped; of a label its grey values or palette numbers."""
    try:
        from PIL import Image
    except ImportError:
        raise PillowError("pictures are read with Pillow, which is not installed: python -m pip install pillow") from None
    with Image.open(path, formats=("PNG", "JPEG", "BMP", "TIFF", "GIF")) as picture:  # no format that runs another program
        mode, bands = picture.mode, len(picture.getbands())
        _check_size((1, picture.height, picture.width, bands), 1, max_gib)
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's JPEG with a preview
            raise DataError(f"holds {picture.n_frames} frames; store one picture per file")
        grey = mode in ("1", "L", "LA") or mode == "I" or mode.startswith("I;16")
        if mode == "F":
            raise DataError("holds floating-point pixels; store it as .npy or NIfTI")
        if label and mode in ("P", "PA"):
            array = _palette_values(np.asarray(picture if mode == "P" else picture.getchannel("P")), picture.getpalette("RGB"))
        elif grey:
            array = np.asarray(picture.convert("L") if mode in ("1", "LA") and not label else picture)
        else:
            array = np.asarray(picture.convert("RGB"))
        array = array.astype(np.uint8) if array.dtype == bool else array
    array = array[..., None] if array.ndim == 2 else array[..., :1] if mode == "LA" else array  # (H, W, C)
    if array.dtype.kind != "u" or array.dtype.itemsize > 1:
        if array.min() < 0 or array.max() > 65535:
            raise DataError(f"holds pixels from {array.min()} to {array.max()}; store what is no 8 or 16 bit picture as .npy or NIfTI")
        array = array.astype(np.uint16)
    if label and array.shape[-1] > 1:
        if (array != array[..., :1]).any():
            raise DataError("a colour picture as label; store one class number per pixel, as grey or palette values")
        array = array[..., :1]
    volume = np.ascontiguousarray(array.transpose(2, 0, 1)[:, None], dtype=np.float32)
    return Source(Volume(volume, (1.0, 1.0, 1.0), np.eye(4)), False, str(array.dtype), "-")


def _palette_values(index: np.ndarray, palette: Sequence[int]) -> np.ndarray:
    """Label values of palette numbers (H, W): their greys where the palette is a grey one (GIF numbers black and white 0 and 1, PNG 0 and
    255), else the numbers themselves."""
    colours = np.array(palette, dtype=np.uint8).reshape(-1, 3)
    used = np.unique(index)
    is_grey = (colours == colours[:, :1]).all() and used[-1] < len(colours) and len(np.unique(colours[used, 0])) == len(used)
    return colours[:, 0][index] if is_grey else index


def _read_array(path: Path, channel_axis: int | None, max_gib: float, label: bool) -> Source:
    """A .npy, or an .npz that is dense (volume, voxel, vol or the only array) or sparse (shape, coords, features); of a label seg first."""
    if path.suffix.lower() == ".npy":
        with open(path, "rb") as stream:
            array = _read_npy(stream, os.path.getsize(path), max_gib, channel_axis)
            dtype = array.dtype
    else:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            if len(members) < len(archive.infolist()):
                raise DataError("two of its arrays have one name; save it anew")

            def member(key: str, dense: bool) -> np.ndarray:
                if members[key].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise DataError("is compressed in a way that numpy does not write; save it with numpy.savez_compressed")
                with archive.open(members[key]) as stream:
                    return _read_npy(stream, members[key].file_size, max_gib, channel_axis, dense)
            keys = [key for key in (LABEL_KEYS if label else ()) + DENSE_KEYS if key in members] or list(members)[:len(members) == 1]
            key = keys[0] if keys else None
            if key is None and {"shape", "coords", "features"} <= set(members):
                shape, coords, features = (member(key, False) for key in ("shape", "coords", "features"))
                array, dtype = _densify(shape, coords, features, max_gib), features.dtype
            elif key is None:
                found = ", ".join(one_line(key, 40) for key in sorted(members)[:8]) or "none"
                raise DataError(f"its arrays are {found}; name one volume, voxel or vol, or store shape, coords and features")
            else:
                array = member(key, True)
                dtype = array.dtype
    return Source(Volume(np.ascontiguousarray(array, dtype=np.float32), (1.0, 1.0, 1.0), np.eye(4)), False, str(dtype), "-")


def _read_npy(stream, available: int, max_gib: float, channel_axis: int | None, dense: bool = True) -> np.ndarray:
    """One array in numpy's format, its header checked before its data is allocated; a dense volume comes as (C, D, H, W)."""
    version = np.lib.format.read_magic(stream)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise DataError(f".npy format version {version}; save the array with a plain number type")
    length = stream.read(2 * version[0])
    if int.from_bytes(length, "little") > 10_000:                # numpy's own limit, which it looks at when it has read them all
        raise DataError(f"declares a header of {int.from_bytes(length, 'little')} bytes; repair the file")
    shape, fortran, dtype = reader(io.BytesIO(length + stream.read(int.from_bytes(length, "little"))))
    if dense:
        _check_dtype(dtype)
        if len(shape) not in (3, 4):
            what = "a table (points?); turn it into a voxel grid first" if len(shape) == 2 else "volumes have 3 axes, or 4 with channels"
            raise DataError(f"{len(shape)}-dimensional array, shape {brief(shape)}: {what}")
        axis = _channel_axis(shape, channel_axis) if len(shape) == 4 else None
    if dtype.kind in "OcV":
        _check_dtype(dtype)
    _check_size(shape, dtype.itemsize, max_gib, available)
    data = stream.read(math.prod(shape) * dtype.itemsize)
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise DataError(f"ends after {len(data)} bytes of an array of shape {shape}; it is truncated")
    if stream.read(1):                                           # at the end of a member zipfile compares its checksum
        raise DataError("goes on after its array; store one array in a file")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    if dense:
        array = (array[None] if axis is None else np.moveaxis(array, axis, 0)).transpose(0, 3, 2, 1)  # (C, D, H, W)
    return array


def _channel_axis(shape: tuple[int, ...], channel_axis: int | None) -> int:
    if channel_axis is None:
        channel_axis = 0 if shape[0] < shape[-1] else -1
        if shape[channel_axis] > GUESSED_CHANNELS:
            raise DataError(f"4-dimensional array, shape {brief(shape)}: neither the last nor the first axis is as short as "
                            f"{GUESSED_CHANNELS} channels (a time series?); set data.channel_axis")
    if not -4 <= channel_axis < 4:
        raise DataError(f"4-dimensional array, shape {brief(shape)}, has no axis data.channel_axis={channel_axis}; use -4 to 3")
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
                    f"{f' of volume or channel {first[0]}' if len(array) > 1 else ''}; repair the file"
                    f"{' or set data.nan=zero' * (nan == 'error')}")


# ---------------------------------------------------------------------------------------------------- intensities and grids
class Intensity(NamedTuple):
    """How stored values were mapped: per channel, `low` went to -1 and `high` to 1. Undone by `denormalise`."""
    modality: str  # ct | mr | voxel | picture
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
              voxel_scale: tuple[float, ...] | None = None, picture_max: float = 255.0,
              percentiles: tuple[float, float] = (0.5, 99.5), percentiles_of: str = "foreground") -> tuple[np.ndarray, Intensity]:
    """(C, D, H, W) as stored -> (C, D, H, W) float32 in about [-1, 1], and the map that `denormalise` undoes.

    ct: hu_range to [-1, 1], clipped. mr: `percentiles` of the voxels above 0 (or of all), clipped at -1 but not above. voxel: divided by
    voxel_scale, or by the largest magnitude of the channel, so that 0 stays 0. picture: 0 to picture_max, clipped.
    Raises DataError for a volume that is constant (unless it is a voxel grid, which may be empty) or whose values float32 cannot scale.
    """
    modality = guess_modality(array) if modality == "auto" else MODALITIES[modality]
    if modality != "voxel" and all(channel.min() == channel.max() for channel in array):
        raise DataError(f"every voxel is {array.flat[0]:g}: nothing to learn from; take the file out of the data")
    if modality == "ct":
        limits = [tuple(map(float, hu_range))] * len(array)
    elif modality == "picture":
        limits = [(0.0, float(picture_max))] * len(array)
    elif modality == "mr":
        limits = [_percentiles(channel, percentiles, percentiles_of) for channel in array]
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
                np.clip(result, -1, None if modality == "mr" else 1, out=result)
    if not (np.isfinite(out.min()) and np.isfinite(out.max())):
        raise DataError(f"values from {array.min():.3g} to {array.max():.3g} cannot be scaled in float32; repair the file")
    return out, Intensity(modality, tuple(low for low, _ in limits), tuple(high for _, high in limits))


def _percentiles(channel: np.ndarray, wanted: tuple[float, float], of: str) -> tuple[float, float]:
    """Two percentiles of all voxels, or of the foreground: those above 0, or above the least where none is."""
    least = float(channel.min())
    foreground = channel if of == "all" else channel[channel > 0] if channel.max() > 0 else channel[channel > least]
    if not foreground.size:
        return least, least + 1.0  # one empty channel of several
    low, high = (float(value) for value in np.percentile(foreground, wanted))
    return (low, high) if high > low else (least, high) if high > least else (least, least + 1.0)


def denormalise(array: np.ndarray, intensity: Intensity) -> np.ndarray:
    """(C, D, H, W) in [-1, 1] -> the scale of the file: HU come back as HU. What `normalise` clipped stays clipped."""
    low, high = (np.asarray(values, dtype=np.float64).reshape(-1, 1, 1, 1) for values in (intensity.low, intensity.high))
    return (array * ((high - low) / 2) + (high + low) / 2).astype(np.float32)


def write_nifti(path: str | os.PathLike, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (C, D, H, W) as NIfTI, atomically: axes x, y, z and, for several channels, a fourth. The name ends in .nii or .nii.gz."""
    with quiet():                                                # an affine beyond float32 is no news
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


def resample_label(label: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) -> size, the nearest voxel of the same field of view, so that it lies where `resample` puts the image."""
    for axis, (old, new) in enumerate(zip(label.shape, size)):
        if old != new:
            label = label.take((2 * np.arange(new) + 1) * old // (2 * new), axis)
    return np.ascontiguousarray(label)


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
    label: str | np.ndarray | None = None  # file of its labels (D, H, W), or the array itself, as stored; None: data.labels is off
    label_path: str | None = None        # source file of the labels
    label_ids: tuple[int, ...] = ()      # values that occur in that file, ascending
    label_values: tuple[int, ...] | None = None  # the stored values of class 0, 1, ...; None: stored as classes
    ignore_label: int | None = None

    def read(self, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Normalised voxels, float32, a copy: the whole (C, D, H, W) or a region (slices of D, H, W), of which alone is read."""
        array = _mapped(self.store, self.shape) if isinstance(self.store, str) else self.store
        return np.array(array if region is None else array[(slice(None), *region)])

    def read_label(self, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Class numbers (D, H, W) int64, whole or of a region; `ignore_label` where the file says so."""
        array = _mapped(self.label, self.shape[1:]) if isinstance(self.label, str) else self.label
        array = array if region is None else array[region]
        if self.label_values is None:
            return array.astype(np.int64)
        return _class_table(self.label_values, self.ignore_label)[array.astype(np.uint16)]


@functools.lru_cache(maxsize=16)
def _class_table(label_values: tuple[int, ...], ignore_label: int | None) -> np.ndarray:
    """Class of every stored value, at its last 16 bits."""
    table = np.zeros(2**16, dtype=np.int64)
    table[np.array(label_values)] = np.arange(len(label_values))
    if ignore_label is not None:
        table[ignore_label & 0xffff] = ignore_label
    return table


def foreground_points(entry: Entry) -> np.ndarray:
    """Places of foreground voxels, (K, P, 3) int32 in D, H, W: P <= POINTS spread evenly over the volume's.

    With labels: of each of the K classes above 0 that occur; else K is 1. It is 0 where there is no foreground. A function
    of the voxels alone. Reads the volume in slabs, twice: memory is bounded whatever its size.
    """
    depth = max(1, 2**22 // math.prod(entry.shape[2:]))
    slabs = [slice(d, min(d + depth, entry.shape[1])) for d in range(0, entry.shape[1], depth)]

    def voxels_by_class(slab: slice) -> tuple[np.ndarray, np.ndarray]:
        """Class of each foreground voxel of the slab and its flat place, sorted by both."""
        region = (slab, slice(None), slice(None))
        if entry.label is None:
            classes = np.abs(entry.read(region) - np.float32(entry.intensity.background)).max(0) > CONTRAST
        else:
            classes = entry.read_label(region)
            classes[(classes == entry.ignore_label) | (classes < 0)] = 0
        classes = classes.astype(np.int16)  # sorted by radix
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
    meaning = "" if entry.label is None else "-" + hashlib.sha256(repr((entry.label_values, entry.ignore_label)).encode()).hexdigest()[:8]
    file = Path(f"{entry.store.removesuffix('.npy')}-points{meaning}.npy")
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


def _mapped(file: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A file of the cache. Raises StoreError where it went away or was cut: touching a map beyond its file's end kills the process."""
    try:
        array = _open_array(file)
        if array.base.size() >= len(array.base) and array.shape == (shape or array.shape):
            return array
        what = "it was cut or overwritten"
    except (OSError, ValueError, EOFError) as error:
        what = getattr(error, "strerror", None) or one_line(error)
    raise StoreError(f"{show(file)}: the cache changed under the run ({what}); let no other program touch it; the next start rebuilds it")


class Loaded(NamedTuple):
    """A file through the whole pipeline, before anything is written."""
    volumes: list[tuple[np.ndarray, Intensity]]  # one, or T; each (C, D, H, W)
    spacing: tuple[float, float, float]
    affine: np.ndarray
    guessed: bool
    source: Source
    labels: list[np.ndarray]                     # (D, H, W) uint8 or int16, for each volume or one for all; none without cfg.labels
    label_ids: tuple[int, ...]                   # values that occur in them, before they are resampled


def load(item: Item, cfg: DataConfig) -> Loaded:
    """Read, select, split into volumes, normalise, resample. Raises DataError naming the file."""
    _check_pair(item, cfg)
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
        if named == "auto" and _suffix(item.path)[0] in PICTURES:
            named = "picture"
        modality = guess_modality(array) if named == "auto" else MODALITIES[named]
        if modality == "picture" and np.dtype(source.dtype).kind not in "iu":
            raise DataError(f"holds {source.dtype}; modality picture is for whole numbers, whose type gives the range")
        picture_max = float(np.iinfo(source.dtype).max) if modality == "picture" else 255.0
        done = [_finish(Volume(volume, spacing, affine), modality, cfg, picture_max) for volume in volumes]
    except DataError as error:
        raise DataError(f"{show(item.path)}: {error}") from None
    grid = done[0][2]
    labels, ids = _load_labels(item, source, len(volumes), done[0][0].shape[1:], cfg) if cfg.labels else ([], ())
    return Loaded([(array, intensity) for array, intensity, _ in done], _spacing(grid), grid, named == "auto", source, labels, ids)


def _check_pair(item: Item, cfg: DataConfig) -> None:
    if item.fault or cfg.labels and item.label is None:
        raise DataError(f"{show(item.path)}: {item.fault or NO_LABEL}")


def _load_labels(item: Item, image: Source, count: int, size: tuple[int, ...], cfg: DataConfig) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Labels of an image's volumes at the image's final size, and the values in them. Raises DataError naming the label's file."""
    source = _read(item.label, None, "error for labels", None, cfg.max_gib, label=True)
    try:
        (array, _, affine), (voxels, spacing, image_affine), name = source.volume, image.volume, show(item.path.name)
        if array.shape[1:] != voxels.shape[1:]:
            raise DataError(f"its grid is {_sizes(array.shape[1:])} voxels (D,H,W), that of its image {name} {_sizes(voxels.shape[1:])}; "
                            "resample the label onto its image's grid")
        if (source.orientation == "-") != (image.orientation == "-"):
            raise DataError(f"one of it and its image {name} has no orientation; store both in one format")
        corners = np.array([(*(n - 1 if bit >> axis & 1 else 0 for axis, n in enumerate(array.shape[:0:-1])), 1) for bit in range(8)])
        distance = np.linalg.norm((corners @ (affine - image_affine).T)[:, :3], axis=1).max()
        if distance > 0.1 * min(spacing):
            raise DataError(f"lies up to {distance:.3g} mm away from its image {name}: their affines differ; resample the label onto its "
                            "image's grid")
        if len(array) != 1 and not (len(array) == count and source.is_series and image.is_series):
            raise DataError(f"has {len(array)} volumes or channels, its image {name} {count} volume{'s' * (count > 1)}; store one class "
                            "number per voxel")
        whole = np.rint(array)
        if (bad := np.abs(array - whole) > 1e-4).any():
            first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
            raise DataError(f"{int(bad.sum())} labels are no whole numbers, first {array[first]:g} at {first[1:]} (D,H,W); "
                            "labels are class numbers, resampled to the nearest voxel")
        low, high = int(whole.min()), int(whole.max())
        if low < -2**15 or high >= 2**15:
            raise DataError(f"labels from {low} to {high}; use class numbers that fit in 16 bits")
        whole = whole.astype(np.uint8 if low >= 0 and high < 256 else np.int16)
        counts = sum(np.bincount(part.reshape(-1).view(f"u{part.itemsize}"), minlength=256**part.itemsize) for part in _slabs(whole))
        ids = np.flatnonzero(counts).astype(np.uint16).astype(whole.dtype).tolist()
        if len(ids) > MAX_CLASSES:
            raise DataError(f"holds {len(ids)} different values, from {low} to {high}, more than {MAX_CLASSES} classes: is it an image?")
        return [resample_label(volume, size) for volume in whole], tuple(sorted(ids))
    except DataError as error:
        raise DataError(f"{show(item.label)}: {error}") from None


def _slabs(array: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous parts of about 2^22 voxels of (T, D, H, W)."""
    flat = array.reshape(-1)
    return (flat[i:i + 2**22] for i in range(0, len(flat), 2**22))


def _check_labels(entry: Entry, classes: int | None, cfg: DataConfig) -> None:
    """Raises DataError when a label lies outside of [0, classes), or MAX_CLASSES while classes are not known."""
    ids = [value for value in entry.label_ids if value != cfg.ignore_label]
    if ids and (ids[0] < 0 or ids[-1] >= (classes or MAX_CLASSES)):
        what = f"with {classes} classes they lie in 0 to {classes - 1}" if classes else f"they lie in 0 to {MAX_CLASSES - 1}"
        raise DataError(f"{show(entry.label_path or entry.name)}: labels from {ids[0]} to {ids[-1]}; {what}: set data.classes, "
                        "data.ignore_label or data.label_values, or repair the file")


def _finish(volume: Volume, modality: str, cfg: DataConfig, picture_max: float = 255.0) -> tuple[np.ndarray, Intensity, np.ndarray]:
    """Normalise, then resample to cfg.resize or cfg.spacing: clipped first, so that padding and metal do not bleed into tissue."""
    array, intensity = normalise(volume.array, modality, cfg.hu_limits(), cfg.voxel_scale, picture_max, cfg.percentiles, cfg.percentiles_of)
    mm, size, affine = cfg.spacing_mm(), cfg.resize, volume.affine
    if size is None and mm is not None:
        size = tuple(max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], volume.spacing, mm))
    if cfg.resize is None and cfg.scale != 1:
        d, h, w = size or array.shape[1:]
        size = (d, max(1, round(h * cfg.scale)), max(1, round(w * cfg.scale)))
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
        raise DataError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); set data.cache_dir to a folder that can be "
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


def _cached(item: Item, cfg: DataConfig, folder: Path, wait: bool = True) -> list[Entry]:
    """Entries of one file, from the cache or after building it. Where several processes want it, one builds and the others wait, or get
    none without `wait`."""
    _check_pair(item, cfg)
    files, stamp = [item.path, *([item.label] if cfg.labels else [])], []
    for file in files:
        try:
            _check_is_file(file)
            stamp.append(_stamp(file))
        except (DataError, OSError) as error:
            raise DataError(f"{show(file)}: {error}") from None
    settings = (cfg.modality, item.kind, cfg.hu_limits(), cfg.voxel_scale, cfg.spacing_mm(), cfg.resize, cfg.four_d, cfg.nan,
                cfg.channel_axis, cfg.select_channel)
    key = [CACHE_VERSION, stamp[0], settings]  # what is off is not in it, so that a cache from before it came in still serves
    key += [["scale", cfg.scale]] * (cfg.scale != 1) + [["labels", stamp[1:]]] * cfg.labels
    percentiles = cfg.percentiles, cfg.percentiles_of
    key += [["percentiles", percentiles]] * (percentiles != (DataConfig.percentiles, DataConfig.percentiles_of))
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    record = folder / f"{_stem(item.path)[:40]}-{key}.json"
    entries = _from_cache(record, item)
    if entries is None:
        with _one_at_a_time(record, wait) as mine:
            entries = (_from_cache(record, item) or _build(item, cfg, record, files, stamp)) if mine else []
    return entries


def _build(item: Item, cfg: DataConfig, record: Path, files: Sequence[Path], stamp: Sequence) -> list[Entry]:
    """Read the volumes of one file and write them to the cache, unless it changed since it had `stamp`."""
    folder, loaded = record.parent, load(item, cfg)
    if [_stamp(file) for file in files] != stamp:
        raise DataError(f"{show(item.path)}: changed while it was being read; start again when it is complete")
    volumes = []
    try:
        for number, (array, intensity) in enumerate(loaded.volumes):
            size = _write(record.with_name(f"{record.stem}-{number}.npy"), functools.partial(np.save, arr=array))
            volumes.append({"shape": array.shape, "intensity": intensity, "bytes": size})
        content = {"source": str(item.path), "spacing": loaded.spacing, "affine": loaded.affine.tolist(), "guessed": loaded.guessed,
                   "volumes": volumes}
        if cfg.labels:
            sizes = [_write(record.with_name(f"{record.stem}-label{number}.npy"), functools.partial(np.save, arr=array))
                     for number, array in enumerate(loaded.labels)]
            content |= {"labels": sizes, "label_ids": loaded.label_ids}
        _write(record, lambda stream: stream.write(json.dumps(content).encode()))  # last: its presence says that the arrays are there
    except OSError as error:
        raise _cache_error(folder, error) from None
    entries = _from_cache(record, item)
    if entries is None:
        raise CacheError(f"{show(record)}: the cache vanished while it was written; let no other program clean {show(folder)}")
    return entries


@contextlib.contextmanager
def _one_at_a_time(record: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that dies with its process; False where another has it and this one does not `wait`.

    Where there are no locks (system, disk) two may build the same content, and the last one's stays.
    """
    path = record.with_name(f".{record.stem}.lock")
    with contextlib.ExitStack() as stack:
        try:
            import fcntl
            file = stack.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(path.unlink, missing_ok=True)
        except BlockingIOError:
            yield False
            return
        except (OSError, ImportError):
            pass
        yield True


class CacheError(DataError):
    """The cache cannot be written: no fault of the volume at hand, and the end of the run."""


class StoreError(DataError):
    """Voxels in the cache that were there at the start and are there no more: the end of the run."""


def _cache_error(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); free some space or set data.cache_dir to "
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
        entries, sizes = [], content.get("labels", [])
        labels = [str(record.with_name(f"{record.stem}-label{number}.npy")) for number in range(len(sizes))]
        if [os.path.getsize(file) for file in labels] != sizes:
            return None
        for number, volume in enumerate(content["volumes"]):
            file = str(record.with_name(f"{record.stem}-{number}.npy"))
            modality, low, high = volume["intensity"]
            if os.path.getsize(file) != volume["bytes"]:
                return None
            suffix = f"_t{number:03d}" if len(content["volumes"]) > 1 else ""
            entries.append(Entry(_stem(item.path) + suffix, str(item.path), tuple(volume["shape"]), tuple(content["spacing"]),
                                 np.array(content["affine"]), Intensity(modality, tuple(low), tuple(high)), file, content["guessed"]))
            if labels:
                entries[-1] = dataclasses.replace(entries[-1], label=labels[min(number, len(labels) - 1)], label_path=str(item.label),
                                                  label_ids=tuple(content["label_ids"]))
        return entries or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
    classes: int = 0             # of the labels; 0 without data.labels
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ...; None: as stored. Keep it to read more data alike


def open_data(cfg: DataConfig, seed: int, say: Callable[[str], object] = print, processes: int = 1) -> Data:
    """Find the volumes, build or reuse their cache, split them by file, seeded. `say` gets what a user should know, a line each.
    processes: how many do the same at this moment; they share the building.

    Raises DataError when nothing usable is left, when the cache cannot be written, or, with cfg.strict, for the first refused file.
    """
    classes, label_values = 0, None
    if cfg.path is None:
        training, held_out = [[entry] for entry in synthetic_entries(cfg, seed)], []
        say(f"data: {len(training)} synthetic {cfg.synthetic} volumes of {_sizes(training[0][0].shape[1:])} voxels, seed {seed}; "
            "--data names real ones")
    else:
        training, held_out = _open_files(cfg, say, processes)
    if cfg.labels:
        training, held_out, classes, label_values = _settle_classes(training, held_out, cfg, say)
    if not held_out and len(training) > 1:
        count = min(len(training) - 1, max(1, round(cfg.val_fraction * len(training))))
        order = _rng(seed, "split").permutation(len(training)).tolist()
        held_out = [training[i] for i in sorted(order[:count])]
        training = [training[i] for i in sorted(order[count:])]
    elif not held_out:
        held_out = training
        say(f"data: one usable file only, {show(training[0][0].path or training[0][0].name)}: it serves for training and validation, "
            "so validation says nothing about other volumes")
    shared = {entry.path for group in training for entry in group if entry.path} & {entry.path for group in held_out for entry in group}
    if shared and held_out is not training:
        say(f"data: {len(shared)} files are in both training and validation, {show(min(shared))} for one; validation is no test of them")
    files = len(training), len(held_out)
    train, val = ([entry for group in groups for entry in group] for groups in (training, held_out))
    taken: dict[str, str | None] = {}
    train, val = ([_with_unique_name(entry, taken) for entry in entries] for entries in (train, val))
    if cfg.foreground:
        train, val = ([_with_points(entry) for entry in entries] for entries in (train, val))
    pictures = all(entry.intensity.modality == "picture" for entry in train)
    patch = cfg.patch or _default_patch(train, (16, 48, 48) if cfg.path is None else (32, 256, 256) if pictures else (32, 64, 64))
    say(f"data: {len(train)} training volumes ({files[0]} files), {len(val)} held out ({files[1]}), {train[0].shape[0]} "
        f"channel{'s' * (train[0].shape[0] > 1)}, crops of {_sizes(patch)}"
        f"{f', {classes} classes' * cfg.labels}")
    return Data(train, val, train[0].shape[0], patch, train[0].intensity.background, cfg, classes, label_values)


def _settle_classes(training: list[list[Entry]], held_out: list[list[Entry]], cfg: DataConfig, say: Callable[[str], object],
                    ) -> tuple[list[list[Entry]], list[list[Entry]], int, tuple[int, ...] | None]:
    """The number of classes and what stored values they have, set in every entry; held-out files with other labels are refused.

    Values are classes as they are stored, except of pictures (masks of 0 and 255): where these are not 0, 1, ... in the training set, they
    are numbered in their order.
    """
    ids = sorted({value for group in training for entry in group for value in entry.label_ids} - {cfg.ignore_label})
    largest, values = max(ids, default=0), cfg.label_values
    pictures = all(entry.label_path and _suffix(entry.label_path)[0] in PICTURES for group in training for entry in group)
    if values is None and pictures and ids != list(range(len(ids))) and largest >= (cfg.classes or 0):
        values = tuple(ids) if len(ids) > 1 else (0, *ids)
        if len(values) > 64 or len(values) > (cfg.classes or 64):
            raise DataError(f"{show(cfg.path)}: the label pictures hold {len(values)} different values, {_sizes(values[:5])}, ..., "
                            f"{values[-1]}{f', and data.classes={cfg.classes}' * bool(cfg.classes)} (saved as JPEG, smoothed?); "
                            "save masks as PNG with one value per class, or set data.label_values")
        say(f"data: the label pictures hold the values {_sizes(values)}: classes 0 to {len(values) - 1} (data.label_values names others)")
    classes = max(2, cfg.classes or (len(values) if values else largest + 1))
    if values and cfg.ignore_label in range(len(values)) and values[cfg.ignore_label] != cfg.ignore_label:
        raise DataError(f"{show(cfg.path or 'synthetic')}: data.ignore_label={cfg.ignore_label} is also the class of the stored value "
                        f"{values[cfg.ignore_label]}; choose a data.ignore_label of {classes} or more")

    def usable(group: list[Entry]) -> bool:
        try:
            if values is None:
                _check_labels(group[0], classes, cfg)
            elif cfg.label_values is None and (others := set(group[0].label_ids) - {*values, cfg.ignore_label}):
                raise DataError(f"{show(group[0].label_path)}: labels {_sizes(sorted(others)[:8])} besides the training set's "
                                f"{_sizes(values[:8])}; repair the file or set data.label_values")
            return True
        except DataError as error:
            if cfg.strict:
                raise DataError(f"{error} (data.strict)") from None
            say(f"data: refused {error}")
            return False
    listed = bool(held_out)
    training, held_out = ([[dataclasses.replace(entry, label_values=values, ignore_label=cfg.ignore_label) for entry in group]
                           for group in groups if usable(group)] for groups in (training, held_out))
    if not training:
        raise DataError(f"{show(cfg.path or 'synthetic')}: no training volume has labels below data.classes={classes}; set data.classes")
    if listed and not held_out:
        say("data: no usable volume in the `validation` list; some of the training files are held out instead")
    return training, held_out, classes, values


def _open_files(cfg: DataConfig, say: Callable[[str], object], processes: int) -> tuple[list[list[Entry]], list[list[Entry]]]:
    """Groups of entries, a group per file: training and held-out ones (the latter empty without a `validation` list)."""
    lists = list_items(cfg.path, cfg.labels, say)
    items = [(name, item) for name in ("training", "validation") for item in lists[name]]
    if not items:
        raise DataError(f"{show(cfg.path)}: no volumes found; looked for {FORMATS}")
    folder, groups, refused, channels, start = cache_folder(cfg), {"training": [], "validation": []}, 0, None, time.monotonic()
    for _, item in items if processes > 1 else ():               # leave out those that another one is at; refusals are told below
        with contextlib.suppress(DataError):
            _cached(item, cfg, folder, wait=False)
    for number, (name, item) in enumerate(items):
        if time.monotonic() - start > 20:
            say(f"data: {number} of {len(items)} files read; their cache in {show(folder)} makes the next start quick")
            start = time.monotonic()
        try:
            entries = _cached(item, cfg, folder)
            if cfg.labels and cfg.label_values is None and _suffix(item.label)[0] not in PICTURES:
                _check_labels(entries[0], cfg.classes, cfg)
            channels = channels or entries[0].shape[0]
            _check_channels(item, entries[0].shape[0], channels)
        except (CacheError, PillowError):
            raise
        except DataError as error:
            if cfg.strict:
                raise DataError(f"{error} (data.strict)") from None
            say(f"data: refused {error}")
            refused += 1
            continue
        groups[name].append(entries)
        if item.kind is not None and item.kind.lower() not in MODALITIES:
            say(f"data: {show(item.path)}: class {one_line(item.kind, 40)!r} names no intensity rule ({', '.join(MODALITIES)}); "
                f"took {entries[0].intensity.modality}")
    if not groups["training"]:
        raise DataError(f"{show(cfg.path)}: no usable training volume among {len(lists['training'])}, {refused} refused; "
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
        raise DataError(f"{show(item.path)}: {found} channel{'s' * (found > 1)}, the first accepted volume has {expected}; "
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

    item -> image (C, D, H, W) float32 of size data.patch, number of its volume in data.train; with labels image, label (D, H, W) int64,
    number. A crop that reaches beyond its volume is padded with background, its label with 0. Item i belongs to epoch i // len; within an
    epoch every volume comes exactly crops_per_volume times, in an order of its own.
    """
    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.data.train) * self.data.cfg.crops_per_volume

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | tuple[torch.Tensor, torch.Tensor, int]:
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
        image, label = _augmented_crop(entry, self.data.patch, draw, cfg, point)
        return (torch.from_numpy(image), number) if label is None else (torch.from_numpy(image), torch.from_numpy(label), number)


class Crop(NamedTuple):
    """A held-out image with its place in the world."""
    image: torch.Tensor                  # (C, D, H, W) float32, normalised
    entry: Entry                         # the volume that it comes from
    affine: np.ndarray                   # (4, 4), of the crop's grid
    label: torch.Tensor | None = None    # (D, H, W) int64, with data.labels


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
        image, label = _crop(entry, data.patch, starts)
        affine = entry.affine @ nib.affines.from_matvec(np.eye(3), (w, h, d))  # affines are in x, y, z
        crops.append(Crop(torch.from_numpy(image), entry, affine, None if label is None else torch.from_numpy(label)))
    return crops


class WholeVolumes:
    """The held-out volumes as Crops, each read when its turn comes."""
    def __init__(self, data: Data):
        self.entries = data.val

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Crop:
        entry = self.entries[number]
        return Crop(torch.from_numpy(entry.read()), entry, entry.affine,
                    None if entry.label is None else torch.from_numpy(entry.read_label()))


def _point(entry: Entry, draw: Sequence[float]) -> tuple[int, ...] | None:
    """A foreground voxel D, H, W chosen by two numbers in [0, 1): class, then place; None where the volume has none."""
    points = _mapped(entry.points) if isinstance(entry.points, str) else entry.points
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


def _crop(entry: Entry, size: tuple[int, ...], starts: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """A crop (C, *size) and its label (*size); where the volume is smaller, the rest is its background, of class 0."""
    region = tuple(slice(max(start, 0), min(start + want, n)) for start, want, n in zip(starts, size, entry.shape[1:]))
    voxels, label = entry.read(region), None if entry.label is None else entry.read_label(region)
    if voxels.shape[1:] == tuple(size):
        return voxels, label
    padded = np.full((len(voxels), *size), entry.intensity.background, dtype=np.float32)
    inside = tuple(slice(max(-start, 0), max(-start, 0) + n) for start, n in zip(starts, voxels.shape[1:]))
    padded[(slice(None), *inside)] = voxels
    if label is not None:
        voxels, label = label, np.zeros(size, dtype=np.int64)
        label[inside] = voxels
    return padded, label


def _augmented_crop(entry: Entry, patch: tuple[int, int, int], draw: np.ndarray, cfg: DataConfig,
                    point: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """draw (8,) in [0, 1): place (3), zoom, flips (3), contrast: an option that is off moves none of the others."""
    size = patch
    if cfg.spacing == "random":
        low, high = map(math.log, cfg.zoom)
        size = tuple(max(1, round(n / math.exp(low + draw[3] * (high - low)))) if n > 1 else 1 for n in patch)  # a picture stays flat
    crop, label = _crop(entry, size, _starts(entry, size, draw[:3], point))
    if size != patch:
        crop = F.interpolate(torch.from_numpy(crop)[None], size=patch, mode="trilinear")[0].numpy()
        label = None if label is None else resample_label(label, patch)
    if cfg.flip != "none":
        axes = [axis for axis, name in ((1, "D"), (2, "H"), (3, "W")) if name in cfg.flip.upper() and draw[3 + axis] < 0.5]
        crop = np.ascontiguousarray(np.flip(crop, axes))
        label = None if label is None else np.ascontiguousarray(np.flip(label, [axis - 1 for axis in axes]))
    if cfg.jitter:
        background = entry.intensity.background
        crop = (crop - background) * np.float32(1 + cfg.jitter * (2 * draw[7] - 1)) + np.float32(background)
        crop = crop.clip(-1, 1) if entry.intensity.modality in ("ct", "picture") else crop
    return crop, label


# ---------------------------------------------------------------------------------------------------------- synthetic volumes
def synthetic_entries(cfg: DataConfig, seed: int) -> list[Entry]:
    """cfg.synthetic_count volumes in memory, number i a function of (seed, i); normalised and resampled as files are."""
    entries = []
    for number in range(cfg.synthetic_count):
        volume, label = _synthetic_pair(cfg.synthetic, seed, number, cfg.synthetic_size)
        modality = {"ct": "ct", "radar": "voxel"}[cfg.synthetic] if cfg.modality == "auto" else cfg.modality
        keep = slice(None) if cfg.select_channel is None else slice(cfg.select_channel, cfg.select_channel + 1)
        if not len(volume.array[keep]):
            raise DataError(f"synthetic {cfg.synthetic} volumes have {len(volume.array)} channels, data.select_channel="
                            f"{cfg.select_channel} counts from 0; choose another")
        array, intensity, affine = _finish(volume._replace(array=volume.array[keep]), MODALITIES[modality], cfg)
        entry = Entry(f"synthetic_{cfg.synthetic}_{number:03d}", None, array.shape, _spacing(affine), affine, intensity, array)
        if cfg.labels:
            ids = tuple(range(3 if cfg.synthetic == "radar" else 4))
            entry = dataclasses.replace(entry, label=resample_label(label, array.shape[1:]), label_ids=ids)
        entries.append(entry)
    return entries


def synthetic_volume(kind: str, seed: int, number: int, size: tuple[int, int, int]) -> Volume:
    """Volume `number` of a seed. ct: (1, D, H, W) in HU; radar: (4, D, H, W) occupancy, power (dB), velocity and its variance."""
    return _synthetic_pair(kind, seed, number, size)[0]


def _synthetic_pair(kind: str, seed: int, number: int, size: tuple[int, int, int]) -> tuple[Volume, np.ndarray]:
    """The volume and its labels (D, H, W) uint8: see _phantom and _radar_scene."""
    rng = _rng(seed, f"synthetic {kind}", number)
    array, label = _phantom(rng, size) if kind == "ct" else _radar_scene(rng, size)
    extent = (320.0, 320.0, 320.0) if kind == "ct" else (12.0, 48.0, 48.0)  # mm; a radar grid is in metres, as arrays on disk carry no unit
    spacing = tuple(length / n for length, n in zip(extent, size))
    return Volume(array, spacing, np.diag([*spacing[::-1], 1.0])), label


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


def _phantom(rng: np.random.Generator, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A trunk in HU, (1, D, H, W): body of fat and muscle, lungs with vessels and airways, heart, liver, kidneys, spine, ribs, couch.

    Labels: 0 air outside and couch, 1 soft tissue, 2 lungs, airways and gas, 3 bone.
    """
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
    label = np.zeros(size, dtype=np.uint8)
    skin = body < 1
    label[skin] = 1
    hu[skin] = (-100 + 15 * middle)[skin]
    muscle = body < vary(0.80, 0.05)
    hu[muscle] = (50 + 22 * middle + 12 * fine)[muscle]

    top = vary(0.1, 1.0)                                                   # the lungs' lower end; the belly is below
    lungs = ((ellipsoid(0.65, 0.05, -0.40, 0.85, 0.42, 0.27) < 1) | (ellipsoid(0.65, 0.05, 0.42, 0.85, 0.42, 0.26) < 1)) & (z > top - 0.3)
    lungs &= body < 0.62
    hu[lungs] = (-840 + 40 * large + 25 * middle)[lungs]
    label[lungs] = 2
    for side in (-1, 1):
        vessels = np.zeros(size, dtype=bool)
        for _ in range(3):
            root, heading = (rng.uniform(0.2, 0.9), 0.05, side * 0.16), (rng.normal(), rng.normal(), 2 * side)
            vessels |= _tree(rng, size, root, heading, 2.2 * scale, 4, 0.3)
        airways = _tree(rng, size, (0.95, 0.05, 0.02 * side), (-1, 0, side * 0.8), 2.8 * scale, 3, 0.28)
        hu[vessels & lungs] = 40
        hu[airways & muscle] = -980
        label[vessels & lungs], label[airways & muscle] = 1, 2

    def organ(mask: np.ndarray, value: float) -> np.ndarray:
        mask = mask & muscle
        hu[mask] = (value + 14 * middle + 10 * large + 8 * fine)[mask]
        label[mask] = 1
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
    label[gut] = np.where(large > 0.5, 2, 1)[gut]

    angle, period = np.arctan2(y, x), vary(14, 0.2)
    ribs = (np.abs(body - 0.70) < 0.05) & (np.sin(period * z + 2.5 * np.abs(np.cos(angle)) + rng.uniform(0, 6)) > 0.45) & (z > top - 0.6)
    hu[ribs] = (550 + 200 * middle)[ribs]
    label[ribs] = 3
    spine = ((y + 0.42) / 0.13)**2 + ((x - rng.normal(0, 0.01)) / 0.13)**2
    disc = np.sin(period * z) < -0.8
    hu[(spine < 1) & ~disc] = (650 + 90 * middle)[(spine < 1) & ~disc]
    marrow = (spine < 0.62) & (np.sin(period * z) > -0.6)
    hu[marrow] = (230 + 90 * fine + 40 * middle)[marrow]
    hu[(spine < 1) & disc] = 80
    label[(spine < 1) & ~disc], label[(spine < 1) & disc] = 3, 1
    label[marrow] = 3
    arch = np.broadcast_to(((y + 0.62) / 0.10)**2 + (x / 0.035)**2 < 1, size) & (np.sin(period * z) > 0)
    hu[arch] = 500
    label[arch] = 3
    canal = np.broadcast_to(((y + 0.585) / 0.04)**2 + (x / 0.05)**2 < 1, size)
    hu[canal] = 20
    label[canal] = 1
    aorta = ((y + 0.22 - 0.03 * np.sin(3 * z)) / 0.065)**2 + ((x + 0.12) / 0.065)**2 < 1
    hu[aorta & muscle] = vary(260, 0.3)
    label[aorta & muscle] = 1
    for axis in range(3):                                                  # the scanner's point spread
        if size[axis] > 2:
            hu = 0.8 * hu + 0.1 * (np.roll(hu, 1, axis) + np.roll(hu, -1, axis))
    return (hu + 12 * rng.standard_normal(size, dtype=np.float32))[None], label


def _radar_scene(rng: np.random.Generator, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A street, (4, D, H, W): ground clutter, walls, poles and moving boxes; a few per cent of the voxels are occupied, the rest 0.

    Labels: 0 empty, 1 what stands, 2 cars.
    """
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32).reshape(shape) for n, shape in zip(size, ((-1, 1, 1), (-1, 1), (-1,))))
    hit, velocity, cars = np.zeros(size, dtype=bool), np.zeros(size, dtype=np.float32), np.zeros(size, dtype=bool)
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
        hit, cars = (hit & ~inside) | (inside & ~core), cars | inside
        velocity = np.where(inside, (rng.uniform(-15, 15) - ego) * np.cos(bearing + turn), velocity)
    distance = np.sqrt((x + 1.2)**2 + y**2)
    power = 24 - 7 * distance + 2.5 * _texture(rng, size, 4) + 0 * z
    variance = np.abs(0.3 * _texture(rng, size, 2)) + 0.02 * np.abs(velocity)
    return np.stack([hit, hit * power, hit * velocity, hit * variance]).astype(np.float32), (hit * (1 + cars)).astype(np.uint8)


# -------------------------------------------------------------------------------------------------------------- command line
def check(paths: list[str]) -> int:
    """Print a row per file of each path, as training with the defaults would see it, a line per refused one. 1 if there is one, else 0."""
    cfg, refused, total, pairs = DataConfig(), 0, 0, {}
    found = [[item for items in list_items(path, say=print).values() for item in items] for path in paths]
    for path in paths:
        with contextlib.suppress(DataError):  # a datalist whose labels are malformed still names images
            listed = [item for items in list_items(path, labels=True).values() for item in items]
            pairs |= {item.path: item for item in listed if item.label and not item.fault}
    for path, items in zip(paths, found):
        if not items:
            raise DataError(f"{show(path)}: no volumes found; looked for {FORMATS}")
    width = max(len(show(item.path)) for items in found for item in items)
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
                print(f"{show(item.path)}  refused: {str(error).removeprefix(show(item.path) + ': ')}", flush=True)
                continue
            verdict, stored = "ok", loaded.source.volume.array
            if item.path in pairs:
                try:
                    labels, ids = _load_labels(pairs[item.path], loaded.source, len(loaded.volumes), array.shape[1:], cfg)
                    verdict = f"ok, {len(ids)} labels {ids[0]} .. {ids[-1]}"
                except DataError as error:
                    refused += 1
                    verdict = f"ok, its label is refused: {error}"
            many = f" x{len(loaded.volumes)} volumes" if len(loaded.volumes) > 1 else f" x{len(array)} channels" if len(array) > 1 else ""
            print(row.format(show(item.path), _sizes(array.shape[1:]) + many, ",".join(f"{mm:.3g}" for mm in loaded.spacing),
                             loaded.source.orientation, loaded.source.dtype, f"{stored.min():.5g} .. {stored.max():.5g}",
                             intensity.modality, verdict), flush=True)
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
