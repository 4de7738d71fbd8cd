"""A data set, from disk or synthetic, and random crops of its volumes.

    python data.py PATH...      # check data before training: a row per file, one line per refused file;
                                # with --data.surface auto its points too, and whether they pay

A folder, a file or a JSON datalist goes in (`open_data`); out come entries whose voxels lie normalised in
memory-mapped files, so that a crop reads its own rows and nothing else, and `Crops`, a dataset in which
item i is a function of (seed, i). The files themselves are the business of volumes/: finding, reading,
normalising, caching.

Segmentation (`data.labels`): a label goes with each image (volumes/find.py says how). It lies on its
image's grid, follows it through every change (nearest voxel), and comes as class numbers, int64. Without
`data.labels` the labels of pairs are left out.

Axes. Arrays here are (C, D, H, W). A spatial image (X, Y, Z) is reoriented to the closest RAS axes and
transposed: D, H, W are Z, Y, X. The spatial axes of .npy and .npz are x, y, z likewise, 1 mm; their channel
axis is `data.channel_axis`. Sizes and spacing (mm) are D, H, W everywhere. An image of 2 axes, or of 1
slice, is a volume whose third extent is 1, wherever that axis lies after reorientation. The 4th axis of an
image holds separate volumes, or channels (`data.four_d`). A picture (PNG, JPEG, BMP, TIFF) is a volume of 1
slice, its rows H from the top.

Intensities are in [-1, 1] (volumes/intensities.py). CT: HU clipped to a range. MR: percentiles of the
foreground. Voxel grids (radar, LiDAR): divided by the largest magnitude, 0 stays 0. Pictures: the range of
their type.

Shape legend: C channels, D H W depth height width, T volumes of a 4-D file.
Needs torch, numpy, nibabel, and augment.py beside it; pictures Pillow; MetaImage, NRRD and DICOM SimpleITK.
Version 1.4.
"""
import argparse
import contextlib
import dataclasses
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import torch

import augment
from volumes import formats
from volumes.boxes import box_of, points_told, with_boxes
from volumes.cache import cache_folder, cached_entries, with_points
from volumes.classes import check_labels, class_names, settle_classes, tell_regions, with_ignored
from volumes.config import MODALITIES, DataConfig
from volumes.entries import Entry, Groups
from volumes.files import CacheError, DataError, PackageError, Say, one_line, refuse, show, sizes, unique_name
from volumes.find import Item, list_items
from volumes.formats import read_volume  # noqa: F401 (the README promises data.read_volume)
from volumes.grids import resample, resample_label
from volumes.layouts import declared_labels
from volumes.loading import Loaded, load, load_labels
from volumes.points import choose_point
from volumes.seeds import seeded
from volumes.splits import NONE_HELD_OUT, in_turn, split, tell_shared, with_patients
from volumes.synthetic import synthetic_entries
from volumes.told import counted, tell_guesses, tell_notes, tell_scales

# The largest crop where data.patch is not given, voxels D H W.
PATCH, PATCH_OF_SYNTHETIC, PATCH_OF_PICTURES = (32, 64, 64), (16, 48, 48), (32, 256, 256)
CLIPPED = {"ct": (-1, 1), "picture": (-1, 1), "mr": (-1, math.inf)}   # as volumes/intensities.py does
PATIENCE = 20   # seconds between lines that say how many files are read


# ------------------------------------------------------------------------------------------ the data set
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
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ...; None: as stored.
                                                 # Keep it to read more data alike
    class_names: tuple[str, ...] = ()            # of dataset.json; empty: not known
    cached: bool = True                          # whether prepared volumes lie in data.cache_dir


def open_data(cfg: DataConfig, seed: int, say: Say = print, processes: int = 1) -> Data:
    """Find the volumes, build or reuse their cache, split them by patient, seeded (volumes/splits.py).

    say: gets what a user should know, a line each. processes: how many do the same at this moment; they
    share the building. Raises DataError when nothing usable is left, when the cache cannot be written, or,
    with cfg.strict, for the first refused file.
    """
    # First the volumes, file by file, and what their labels mean.
    declared = declared_labels(None if cfg.path is None else Path(cfg.path))
    if cfg.labels:
        cfg = with_ignored(cfg, declared.ignored, say)
        tell_regions(declared.regions, say)
    classes, label_values, names = 0, None, ()
    if cfg.path is None:
        training, held_out = [[entry] for entry in synthetic_entries(cfg, seed)], []
        size = sizes(training[0][0].shape[1:])
        say(f"data: {len(training)} synthetic {cfg.synthetic} volumes of {size} voxels, seed {seed}; --data "
            f"names real ones")
    else:
        training, held_out = open_files(cfg, say, processes)
    if cfg.labels:
        training, held_out, classes, label_values = settle_classes(training, held_out, cfg, say,
                                                                   declared.count)
        names = class_names(declared.names, classes, label_values, say)

    # Then the split, of whole patients.
    if cfg.path is not None:
        training, held_out = with_patients(training, held_out, cfg, say)
    is_listed = bool(held_out) or any(group[0].fold is not None for group in training)
    if held_out and cfg.fold is not None:
        raise DataError(f"{show(cfg.path)}: has a `validation` list, and data.fold={cfg.fold} names files to "
                        f"hold out too; leave one of them out")
    if not held_out:
        training, held_out = split(training, cfg, seed, say)
    if held_out is not training:
        tell_shared(training, held_out, is_listed, say)
    taken: dict[str, str | None] = {}
    train = [with_unique_name(entry, taken) for group in training for entry in group]
    val = [with_unique_name(entry, taken) for group in held_out for entry in group]

    # Then what crops need.
    if cfg.foreground:
        train = [with_points(entry) for entry in train]
        val = [with_points(entry) for entry in val]
    patch = cfg.patch or default_patch(train, is_synthetic=cfg.path is None)
    if cfg.points:
        train, val, patch = with_boxes(train, val, cfg, say)
    channels = train[0].shape[0]
    with_classes = f", {classes} classes" if cfg.labels else ""
    # Files may have several volumes each.
    files = f" of {counted(len(training), 'file')}" if len(training) != len(train) else ""
    others = f" of {counted(len(held_out), 'file')}" if len(held_out) != len(val) else ""
    say(f"data: {counted(len(train), 'training volume')}{files}, {len(val)} held out{others}, "
        f"{counted(channels, 'channel')}, crops of {sizes(patch)}{with_classes}")
    return Data(train, val, channels, patch, train[0].intensity.background, cfg, classes, label_values, names)


def open_files(cfg: DataConfig, say: Say, processes: int) -> tuple[Groups, Groups]:
    """Training and held-out files, a group of entries each (the latter empty without a `validation` list)."""
    lists = list_items(cfg.path, cfg.labels, say)
    items = [(name, item) for name in ("training", "validation") for item in lists[name]]
    if not items:
        raise DataError(f"{show(cfg.path)}: no volumes found; looked for {formats.known_endings()}")
    folder, start = cache_folder(cfg), time.monotonic()
    # Several processes each build what none of the others is at. What is refused is told below.
    if processes > 1:
        for _, item in items:
            with contextlib.suppress(DataError):
                cached_entries(item, cfg, folder, wait=False)

    # Then all of them, in order.
    groups, refused, channels = {"training": [], "validation": []}, 0, None
    for number, (name, item) in enumerate(items):
        if time.monotonic() - start > PATIENCE:
            say(f"data: {number} of {len(items)} files read; their cache in {show(folder)} makes the next "
                f"start quick")
            start = time.monotonic()
        try:
            entries = cached_entries(item, cfg, folder)
            if cfg.labels and cfg.label_values is None and not formats.is_picture(item.label):
                check_labels(entries[0], None, cfg)
            found = entries[0].shape[0]
            channels = channels or found
            check_channels(item, found, channels)
        except (CacheError, PackageError):
            raise
        except DataError as error:
            refuse(error, cfg.strict, say)
            refused += 1
            continue
        groups[name].append(entries)
        if item.kind is not None and item.kind.lower() not in MODALITIES:
            kind, taken = one_line(item.kind, 40), entries[0].intensity.modality
            say(f"data: {show(item.path)}: class {kind!r} names no intensity rule "
                f"({', '.join(MODALITIES)}); took {taken}")

    # Then what a user should know of them all.
    if not groups["training"]:
        raise DataError(f"{show(cfg.path)}: no usable training volume among {len(lists['training'])}, "
                        f"{refused} refused; see the lines above or run python data.py on it")
    if lists["validation"] and not groups["validation"]:
        say(NONE_HELD_OUT)
    if refused:
        say(f"data: {refused} of {len(items)} files refused, going on with the others; --data.strict makes "
            f"that an error")
    firsts = [group[0] for part in groups.values() for group in part]
    tell_guesses(firsts, say)
    tell_notes(firsts, say)
    if cfg.voxel_scale is None:
        tell_scales([entry for part in groups.values() for group in part for entry in group], say)
    return groups["training"], groups["validation"]


def check_channels(item: Item, found: int, expected: int) -> None:
    if found != expected:
        plural = "s" if found > 1 else ""
        raise DataError(f"{show(item.path)}: {found} channel{plural}, the first accepted volume has "
                        f"{expected}; use data.select_channel to pick one of each, or another folder")


def with_unique_name(entry: Entry, taken: dict[str, str | None]) -> Entry:
    """Two files may share a name, such as a.nii and a.npy: the second becomes NAME-2.

    The same volume keeps its name.
    """
    volume = f"{entry.path}/{entry.name}"
    return dataclasses.replace(entry, name=unique_name(entry.name, volume, taken))


def default_patch(entries: list[Entry], is_synthetic: bool) -> tuple[int, int, int]:
    """The largest crop, or where that is less the extent of the middle volume, a multiple of 4."""
    most = PATCH
    if is_synthetic:
        most = PATCH_OF_SYNTHETIC
    elif all(entry.intensity.modality == "picture" for entry in entries):
        most = PATCH_OF_PICTURES
    patch = []
    for axis, limit in enumerate(most, 1):
        middle = sorted(entry.shape[axis] for entry in entries)[len(entries) // 2]
        if middle >= 4:
            middle = middle // 4 * 4
        patch.append(min(limit, middle))
    return tuple(patch)


# ------------------------------------------------------------------------------------------------- crops
class Crops(torch.utils.data.Dataset):
    """Random crops of the training volumes. Item i, for any i >= 0, is a function of (seed, i) alone.

    item -> image (C, D, H, W) float32 of size data.patch, number of its volume in data.train; with labels
    image, label (D, H, W) int64, number. A crop that reaches beyond its volume is padded with background,
    its label with 0. Item i belongs to epoch i // len; within an epoch every volume comes exactly
    crops_per_volume times, in an order of its own.
    """
    def __init__(self, data: Data, seed: int):
        self.data, self.seed = data, seed
        self.epoch, self.order = -1, np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.data.train) * self.data.cfg.crops_per_volume

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | tuple[torch.Tensor, torch.Tensor, int]:
        # Which volume: an order of each epoch's own.
        epoch, place = divmod(index, len(self))
        if epoch != self.epoch:
            self.order = seeded(self.seed, "order", epoch).permutation(len(self)) % len(self.data.train)
            self.epoch = epoch
        number = int(self.order[place])
        entry, cfg = self.data.train[number], self.data.cfg

        # Which place in it. A foreground voxel has draws of its own, so that the others stay where they are.
        draw, point = seeded(self.seed, "crop", index).random(8), None
        if cfg.foreground:
            share, *which = seeded(self.seed, "foreground", index).random(3)
            if share < cfg.foreground:
                point = choose_point(entry, which)
        box = box_of(entry, self.data.patch, cfg, self.seed, "box", index) if cfg.points else None
        more = seeded(self.seed, "augment", index)
        image, label = augmented_crop(entry, self.data.patch, draw, more, cfg, point, box)
        if label is None:
            return torch.from_numpy(image), number
        return torch.from_numpy(image), torch.from_numpy(label), number


class Crop(NamedTuple):
    """A held-out image with its place in the world."""
    image: torch.Tensor                  # (C, D, H, W) float32, normalised
    entry: Entry                         # the volume that it comes from
    affine: np.ndarray                   # (4, 4), of the crop's grid
    label: torch.Tensor | None = None    # (D, H, W) int64, with data.labels


def val_crops(data: Data, seed: int, count: int) -> list[Crop]:
    """`count` fixed crops of size data.patch of the held-out patients, each in turn, never augmented.

    Crop k is a function of (seed, k). With data.foreground above 0 each of them holds foreground, if its
    volume has any.
    """
    crops = []
    for k, entry in enumerate(in_turn(data.val, seed, count)):
        draw, point = seeded(seed, "val", k).random(3), None
        if data.cfg.foreground:
            point = choose_point(entry, seeded(seed, "val foreground", k).random(2))
        starts, size = starts_of(entry, data.patch, draw, point), data.patch
        if data.cfg.points:
            starts, size = box_of(entry, data.patch, data.cfg, seed, "val box", k)
        image, label = cut(entry, size, starts)
        affine = entry.affine @ nib.affines.from_matvec(np.eye(3), starts[::-1])  # affines are in x, y, z
        label = None if label is None else torch.from_numpy(label)
        crops.append(Crop(torch.from_numpy(image), entry, affine, label))
    return crops


class WholeVolumes:
    """The held-out volumes as Crops, each read when its turn comes."""
    def __init__(self, data: Data):
        self.entries = data.val

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, number: int) -> Crop:
        entry = self.entries[number]
        label = None if entry.label is None else torch.from_numpy(entry.read_label())
        return Crop(torch.from_numpy(entry.read()), entry, entry.affine, label)


def starts_of(entry: Entry, size: tuple[int, ...], draw: np.ndarray,
              point: tuple[int, ...] | None = None) -> list[int]:
    """First voxel D, H, W of a crop at a place given by three numbers in [0, 1).

    Below 0 where the volume is smaller and lies centred in it. point: a voxel that the crop must hold; then
    the numbers choose among the places where it does.
    """
    starts = []
    for axis, (u, n, want) in enumerate(zip(draw, entry.shape[1:], size)):
        if n < want:
            starts.append(-((want - n) // 2))
            continue
        low, high = 0, n - want
        if point is not None:
            low, high = max(0, point[axis] - want + 1), min(point[axis], n - want)
        starts.append(low + int(u * (high - low + 1)))
    return starts


def cut(entry: Entry, size: tuple[int, ...], starts: list[int]) -> tuple[np.ndarray, np.ndarray | None]:
    """A crop (C, *size) and its label (*size), or None.

    Where the volume is smaller, the rest is its background, of class 0.
    """
    region = tuple(slice(max(start, 0), min(start + want, n))
                   for start, want, n in zip(starts, size, entry.shape[1:]))
    voxels = entry.read(region)
    label = None if entry.label is None else entry.read_label(region)
    if voxels.shape[1:] == tuple(size):
        return voxels, label
    inside = tuple(slice(max(-start, 0), max(-start, 0) + n) for start, n in zip(starts, voxels.shape[1:]))
    padded = np.full((len(voxels), *size), entry.intensity.background, dtype=np.float32)
    padded[(slice(None), *inside)] = voxels
    if label is None:
        return padded, None
    padded_label = np.zeros(size, dtype=np.int64)
    padded_label[inside] = label
    return padded, padded_label


def augmented_crop(
    entry: Entry, patch: tuple[int, int, int], draw: np.ndarray, more: np.random.Generator, cfg: DataConfig,
    point: tuple[int, ...] | None, box: tuple | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """A crop (C, *patch) and its label, or None, with what the config asks for.

    draw (8,) in [0, 1): place (3), zoom, flips (3), contrast: an option that is off moves none of the others.
    more: what the changes of augment.py are drawn from. box: first voxel and size of a crop of points, which
    is neither zoomed nor changed in its values.
    """
    # The crop before its turn, of another size where it is zoomed; a picture stays flat.
    plane, quarters = augment.choose_turn(cfg.turn, patch, *more.random(2))
    size = patch = augment.size_before(patch, plane, quarters)
    if cfg.spacing == "random":
        low, high = map(math.log, cfg.zoom)
        zoom = math.exp(low + draw[3] * (high - low))
        size = tuple(max(1, round(n / zoom)) if n > 1 else 1 for n in patch)
    starts, size = box or (starts_of(entry, size, draw[:3], point), size)
    crop, label = cut(entry, size, starts)
    if size != patch and box is None:
        # Where it shrinks with a wider kernel, as a coarser scan has it: without, noise and lines alias.
        crop, _ = resample(crop, np.eye(4), patch)
        label = None if label is None else resample_label(label, patch)
    # The turn, and flips.
    crop = augment.turn(torch.from_numpy(crop), plane, quarters).numpy()
    label = None if label is None else augment.turn(torch.from_numpy(label), plane, quarters).numpy()
    if cfg.flip != "none":
        flipped = [axis for axis, name in enumerate("DHW", 1)
                   if name in cfg.flip.upper() and draw[3 + axis] < 0.5]
        crop = np.ascontiguousarray(np.flip(crop, flipped))
        if label is not None:
            label = np.ascontiguousarray(np.flip(label, [axis - 1 for axis in flipped]))
    # Contrast, around the background, and other changes of intensities.
    background = entry.intensity.background
    if cfg.jitter:
        crop = (crop - background) * np.float32(1 + cfg.jitter * (2 * draw[7] - 1)) + np.float32(background)
    strengths = augment.Strengths.of(cfg)
    if strengths.is_on and box is None:
        seed = int(more.integers(2**63))
        crop = augment.change_intensities(torch.from_numpy(crop), strengths, seed, background).numpy()
    if cfg.jitter or strengths.is_on:
        crop = crop.clip(*CLIPPED.get(entry.intensity.modality, (-math.inf, math.inf)))
    return crop, label


# ------------------------------------------------------------------------------------------ command line
OF_POINTS = ("surface", "window", "band", "smooth", "metric", "min_points")  # flags of `python data.py`
COLUMNS = "{:{width}}  {:22}  {:16}  {:6}  {:8}  {:20}  {:8}  {}"


def check(paths: list[str], cfg: DataConfig) -> int:
    """Print a row per file of each path, as training with the config would see it, a line per refused one.

    Returns 1 if there is a refused one, else 0.
    """
    refused, total, pairs = 0, 0, {}
    found = [[item for items in list_items(path, say=print).values() for item in items] for path in paths]
    for path in paths:
        with contextlib.suppress(DataError):  # a datalist whose labels are malformed still names images
            listed = [item for items in list_items(path, labels=True).values() for item in items]
            pairs |= {item.path: item for item in listed if item.label and not item.fault}
    for path, items in zip(paths, found):
        if not items:
            raise DataError(f"{show(path)}: no volumes found; looked for {formats.known_endings()}")
    width = max(len(show(item.path)) for items in found for item in items)
    print(COLUMNS.format("file", "shape D,H,W", "spacing mm", "orient", "dtype", "range", "modality",
                         "verdict", width=width))
    for items in found:
        channels = None
        for item in items:
            total += 1
            try:
                loaded = load(item, cfg)
                here = len(loaded.volumes[0][0])
                channels = channels or here
                check_channels(item, here, channels)
            except DataError as error:
                refused += 1
                why = str(error).removeprefix(show(item.path) + ": ")
                print(f"{show(item.path)}  refused: {why}", flush=True)
                continue
            verdict = "ok"
            if item.path in pairs:
                try:
                    verdict = label_verdict(pairs[item.path], loaded, cfg)
                except DataError as error:
                    refused += 1
                    verdict = f"ok, its label is refused: {error}"
            verdict = "; ".join([verdict, *(note.text for note in loaded.notes), *points_told(loaded, cfg)])
            print(COLUMNS.format(show(item.path), *described(loaded), verdict, width=width), flush=True)
    print(f"{total} files, {total - refused} usable, {refused} refused")
    return 1 if refused else 0


def label_verdict(pair: Item, loaded: Loaded, cfg: DataConfig) -> str:
    """Which values the label of a file holds. Raises DataError where it cannot be used."""
    size = loaded.volumes[0][0].shape[1:]
    _, ids = load_labels(pair, loaded.source, len(loaded.volumes), size, cfg.max_gib)
    return f"ok, {len(ids)} labels {ids[0]} .. {ids[-1]}"


def described(loaded: Loaded) -> tuple[str, ...]:
    """Shape, spacing, orientation, type, range and modality of a file."""
    array, intensity = loaded.volumes[0]
    source, stored = loaded.source, loaded.source.volume.array
    many = ""
    if len(loaded.volumes) > 1:
        many = f" x{len(loaded.volumes)} volumes"
    elif len(array) > 1:
        many = f" x{len(array)} channels"
    spacing = ",".join(f"{mm:.3g}" for mm in loaded.spacing)
    return (sizes(array.shape[1:]) + many, spacing, source.orientation, source.dtype,
            f"{stored.min():.5g} .. {stored.max():.5g}", intensity.rule)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="data.py", description="Check data before training: a row per file, a line per refused file. "
                                    "Exit code 0: all usable, 1: some refused, 2: nothing to check.")
    parser.add_argument("path", nargs="+", metavar="PATH", help="folder, file or JSON datalist")
    for field in dataclasses.fields(DataConfig()):
        if field.name in OF_POINTS:
            parser.add_argument(f"--data.{field.name}", type=type(field.default), default=field.default,
                                metavar=field.name.upper(), help=f"as for train.py --task sparse "
                                                                 f"[{field.default}]")
    flags = vars(parser.parse_args(argv))
    paths = flags.pop("path")
    try:
        return check(paths, DataConfig(**{name.removeprefix("data."): v for name, v in flags.items()}))
    except ValueError as error:  # a DataError is one
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader went away: data.py DIR | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
