"""Random crops of a data set, and the command that checks one before training.

    python data.py PATH...      # a row per file, one line per refused file

A folder, a file or a JSON datalist goes in (volumes/dataset.py); out comes `Crops`, a dataset in which item i is a function of
(seed, i). Files are found, read, normalised and cached by the rooms of volumes/.

Axes. Arrays here are (C, D, H, W). A spatial image (X, Y, Z) is reoriented to the closest RAS axes and transposed: D, H, W are
Z, Y, X. The spatial axes of .npy and .npz are x, y, z likewise, 1 mm; their channel axis is `data.channel_axis`. Sizes and
spacing (mm) are D, H, W everywhere. An image of 2 axes, or of 1 slice, is a volume whose third extent is 1, wherever that axis
lies after reorientation. The 4th axis of an image holds separate volumes, or channels (`data.four_d`). A picture (PNG, JPEG, BMP,
TIFF) is a volume of 1 slice, its rows H from the top. Intensities are in [-1, 1] (volumes/intensities.py).

Shape legend: C channels, D H W depth height width, T volumes of a 4-D file. Version 2.0.
"""
import argparse
import contextlib
import math
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as F

from volumes.config import DataConfig
from volumes.dataset import Data, check_channels
from volumes.entries import Entry, mapped
from volumes.files import DataError, show, sizes
from volumes.find import list_items
from volumes.formats import known_endings
from volumes.formats import read_volume as read_volume  # data.read_volume: for those who want one volume
from volumes.grids import resample_label
from volumes.load import load, load_labels
from volumes.seeds import seeded


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
            self.order = seeded(self.seed, "order", epoch).permutation(len(self)) % len(self.data.train)
            self.epoch = epoch
        number = int(self.order[place])
        entry, cfg, point = self.data.train[number], self.data.cfg, None
        draw = seeded(self.seed, "crop", index).random(8)
        if cfg.foreground:  # draws of their own: the others stay where they are
            share, *which = seeded(self.seed, "foreground", index).random(3)
            point = point_in(entry, which) if share < cfg.foreground else None
        image, label = augmented_crop(entry, self.data.patch, draw, cfg, point)
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
    order = seeded(seed, "val order").permutation(len(data.val))
    crops = []
    for k in range(count):
        entry, draw = data.val[order[k % len(order)]], seeded(seed, "val", k).random(3)
        point = point_in(entry, seeded(seed, "val foreground", k).random(2)) if data.cfg.foreground else None
        d, h, w = starts = starts_of(entry, data.patch, draw, point)
        image, label = crop_at(entry, data.patch, starts)
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


def point_in(entry: Entry, draw: Sequence[float]) -> tuple[int, ...] | None:
    """A foreground voxel D, H, W chosen by two numbers in [0, 1): class, then place; None where the volume has none."""
    points = mapped(entry.points) if isinstance(entry.points, str) else entry.points
    return tuple(points[int(draw[0] * points.shape[0]), int(draw[1] * points.shape[1])].tolist()) if len(points) else None


def starts_of(entry: Entry, size: tuple[int, ...], draw: np.ndarray, point: tuple[int, ...] | None = None) -> list[int]:
    """First voxel of a crop at a place given by three numbers in [0, 1); below 0 where the volume is smaller and lies centred in it.

    point: a voxel that the crop must hold; then the numbers choose among the places where it does.
    """
    starts = []
    for axis, (u, n, want) in enumerate(zip(draw, entry.shape[1:], size)):
        low, high = (0, n - want) if point is None else (max(0, point[axis] - want + 1), min(point[axis], n - want))
        starts.append(low + int(u * (high - low + 1)) if n >= want else -((want - n) // 2))
    return starts


def crop_at(entry: Entry, size: tuple[int, ...], starts: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
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


def augmented_crop(entry: Entry, patch: tuple[int, int, int], draw: np.ndarray, cfg: DataConfig,
                    point: tuple[int, ...] | None = None) -> tuple[np.ndarray, np.ndarray | None]:
    """draw (8,) in [0, 1): place (3), zoom, flips (3), contrast: an option that is off moves none of the others."""
    size = patch
    if cfg.spacing == "random":
        low, high = map(math.log, cfg.zoom)
        size = tuple(max(1, round(n / math.exp(low + draw[3] * (high - low)))) if n > 1 else 1 for n in patch)  # a picture stays flat
    crop, label = crop_at(entry, size, starts_of(entry, size, draw[:3], point))
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
            raise DataError(f"{show(path)}: no volumes found; looked for {known_endings()}")
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
                check_channels(item, len(array), channels)
            except DataError as error:
                refused += 1
                print(f"{show(item.path)}  refused: {str(error).removeprefix(show(item.path) + ': ')}", flush=True)
                continue
            verdict, stored = "ok", loaded.source.volume.array
            if item.path in pairs:
                try:
                    labels, ids = load_labels(pairs[item.path], loaded.source, len(loaded.volumes), array.shape[1:], cfg)
                    verdict = f"ok, {len(ids)} labels {ids[0]} .. {ids[-1]}"
                except DataError as error:
                    refused += 1
                    verdict = f"ok, its label is refused: {error}"
            many = f" x{len(loaded.volumes)} volumes" if len(loaded.volumes) > 1 else f" x{len(array)} channels" if len(array) > 1 else ""
            print(row.format(show(item.path), sizes(array.shape[1:]) + many, ",".join(f"{mm:.3g}" for mm in loaded.spacing),
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
