"""A file through the whole pipeline: read, channels selected, split into volumes, normalised, resampled;
its labels.

What the voxels become is asked of VoxelSettings alone, of which the cache's key is made. Labels lie on
their image's grid, follow it through every change (nearest voxel), and come as whole numbers, as stored.

Shapes: C channels, D H W depth height width, T volumes of a 4-D file. Version 1.1.
"""
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from volumes import formats
from volumes.config import MAX_CLASSES, MODALITIES, DataConfig, VoxelSettings
from volumes.files import DataError, show, sizes
from volumes.find import NO_LABEL, Item
from volumes.grids import resample, resample_label
from volumes.intensities import Intensity, denormalise, fill, guess_modality, normalise, notes_of
from volumes.layouts import joined
from volumes.surfaces import surface_points
from volumes.volume import Note, Request, Source, Volume, check_size, distance, spacing_of

FAR = 0.1       # of the smallest spacing: a label may lie so far from its image
WHOLE = 1e-4    # labels may be so far from whole numbers,
SURELY = 0.25   # and so far where whole numbers stand for them by a scale that misses them


class Loaded(NamedTuple):
    """A file through the whole pipeline, before anything is written."""
    volumes: list[tuple[np.ndarray, Intensity]]  # one, or T; each (C, D, H, W)
    spacing: tuple[float, float, float]
    affine: np.ndarray
    guessed: bool                                # the modality was
    source: Source
    labels: list[np.ndarray]                     # (D, H, W) uint8 or int16, for each volume or one for all;
                                                 # none without data.labels
    label_ids: tuple[int, ...]                   # values that occur in them, before they are resampled
    notes: tuple[Note, ...] = ()                 # what a user should know of the file
    numbers: tuple[int, ...] = ()                # of its volumes, where the file has several
    blank: tuple[tuple[int, float], ...] = ()    # those that are left out: number, value of all voxels


def load(item: Item, cfg: DataConfig) -> Loaded:
    """Read, select, split into volumes, normalise, resample. Raises DataError naming the file."""
    check_pair(item, cfg)
    settings = cfg.voxel_settings(item.kind)
    nan = "keep" if settings.nan == "zero" else settings.nan
    request = Request(None, settings.channel_axis, cfg.max_gib)
    source = formats.read_source(item.path, request, nan)
    if item.more:
        source = joined(item.more, source, request, nan)
    try:
        # First what is measured, and the background in place of NaN.
        stored, named = source.volume.array, modality_named(item, settings)
        bad = None
        if nan == "keep" and not np.isfinite(stored).all():
            bad = ~np.isfinite(stored)
        if named != "auto":
            modality = MODALITIES[named]
        elif bad is None or bad.all():
            modality = guess_modality(stored)
        else:
            modality = guess_modality(stored[~bad])
        if bad is not None:
            fill(stored, bad, modality)

        # Then each volume of it.
        volumes = split_volumes(source, settings)
        count = len(volumes)
        numbers, blank = blank_ones(volumes, modality)
        volumes = [volumes[number] for number in numbers]
        picture_max = 255.0
        if modality == "picture":
            if np.dtype(source.dtype).kind not in "iu":
                raise DataError(f"holds {source.dtype}; modality picture is for whole numbers, whose type "
                                f"gives the range")
            picture_max = float(np.iinfo(source.dtype).max)
        done, notes = [], [*source.notes, *left_out(blank, count)]
        for array in volumes:
            volume = source.volume._replace(array=array)
            done.append(finish(volume, modality, settings, cfg.max_gib, picture_max))
            notes += notes_of(array, done[-1][1])
        notes += thin_axes(source.volume.array.shape[1:], done[0][0].shape[1:], source.volume.spacing)
    except DataError as error:
        raise DataError(f"{show(item.path)}: {error}") from None
    voxels, _, affine = done[0]
    labels, ids = [], ()
    if cfg.labels:
        labels, ids = load_labels(item, source, count, voxels.shape[1:], cfg.max_gib)
        if len(labels) > 1:
            labels = [labels[number] for number in numbers]
    pairs = [(array, intensity) for array, intensity, _ in done]
    return Loaded(pairs, spacing_of(affine), affine, named == "auto", source, labels, ids,
                  one_of_each(notes), numbers if count > 1 else (), blank)


def blank_ones(volumes: Sequence[np.ndarray],
               modality: str) -> tuple[tuple[int, ...], tuple[tuple[int, float], ...]]:
    """Numbers of the volumes that hold more than one value; number and value of the others.

    A voxel grid may be empty. Where all are blank none is left out: the file is refused.
    """
    blank = tuple((number, float(volume.flat[0])) for number, volume in enumerate(volumes)
                  if modality != "voxel" and volume.min() == volume.max())
    if len(blank) == len(volumes):
        blank = ()
    without = {number for number, _ in blank}
    return tuple(number for number in range(len(volumes)) if number not in without), blank


def left_out(blank: Sequence[tuple[int, float]], count: int) -> list[Note]:
    """A note on the volumes, of `count`, that hold nothing to learn from."""
    if not blank:
        return []
    numbers = ", ".join(str(number) for number, _ in blank[:8])
    more = ", ..." if len(blank) > 8 else ""
    plural = "s" if len(blank) > 1 else ""
    return [Note("blank", f"left out {len(blank)} of its {count} volumes, number{plural} {numbers}{more} "
                          f"(from 0): one value in every voxel, such as {blank[0][1]:g}")]


def thin_axes(old: Sequence[int], new: Sequence[int], spacing: Sequence[float]) -> list[Note]:
    """A note where a resampling leaves one voxel of several on an axis. Sizes and spacing (mm): D, H, W."""
    thin = [axis for axis in range(3) if new[axis] == 1 < old[axis]]
    if not thin:
        return []
    lost = " and ".join(f"{old[axis]} voxels of {spacing[axis]:.3g} mm along {'DHW'[axis]}" for axis in thin)
    return [Note("thin", f"its {lost} become one by resampling; see data.spacing, data.resize and data.scale "
                         f"(sizes and mm are D,H,W), and the unit of its header")]


def one_of_each(notes: Sequence[Note]) -> tuple[Note, ...]:
    """The first note of each kind: a series of 200 volumes says once what holds for all of them."""
    first: dict[str, Note] = {}
    for note in notes:
        first.setdefault(note.kind, note)
    return tuple(first.values())


def check_pair(item: Item, cfg: DataConfig) -> None:
    """Raises DataError for an image without its label, or the reverse."""
    if item.fault or cfg.labels and item.label is None:
        raise DataError(f"{show(item.path)}: {item.fault or NO_LABEL}")


def split_volumes(source: Source, settings: VoxelSettings) -> list[np.ndarray]:
    """The volumes (C, D, H, W) of a file, with the channel that is asked for or with all."""
    array = source.volume.array
    volumes = [array]
    if source.is_series and settings.four_d == "volumes":
        volumes = list(array[:, None])
    channel = settings.select_channel
    if channel is None:
        return volumes
    channels = len(volumes[0])
    if channel >= channels:
        plural = "s" if channels > 1 else ""
        raise DataError(f"has {channels} channel{plural}, data.select_channel={channel} counts from 0; "
                        f"choose another")
    return [volume[channel:channel + 1] for volume in volumes]


def modality_named(item: Item, settings: VoxelSettings) -> str:
    """A name of MODALITIES, by the datalist, the config or the format, in this order; or auto."""
    kind = (settings.kind or "").lower()
    if kind in MODALITIES:
        return kind
    if settings.modality == "auto" and formats.is_picture(item.path):
        return "picture"
    return settings.modality


def finish(volume: Volume, modality: str, settings: VoxelSettings, max_gib: float,
           picture_max: float = 255.0) -> tuple[np.ndarray, Intensity, np.ndarray]:
    """Normalise, then resample to `resize` or the spacing. Returns voxels, their intensity, their affine.

    Clipped first, so that padding and metal do not bleed into tissue. With a surface distances from it take
    the place of the intensities, last of all.
    """
    surface = settings.surface
    if surface is not None and modality not in ("ct", "voxel"):
        raise DataError(f"data.surface is a level in HU, and the file is taken for {modality}; set "
                        f"data.modality=ct, or leave the file out")
    array, intensity = normalise(volume.array, modality, settings.hu_limits, settings.voxel_scale,
                                 picture_max, *settings.percentiles)
    mm, size, affine = settings.spacing_mm, settings.resize, volume.affine
    if size is None and mm is not None:
        size = tuple(max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], volume.spacing, mm))
    if settings.resize is None and settings.scale != 1:
        d, h, w = size or array.shape[1:]
        size = (d, max(1, round(h * settings.scale)), max(1, round(w * settings.scale)))
    if size is not None and tuple(size) != array.shape[1:]:
        check_size((len(array), *size), 4, max_gib)
        array, affine = resample(array, affine, tuple(size))
    if surface is not None and modality == "ct":
        array = surface_points(denormalise(array, intensity), spacing_of(affine), surface)
        limits = (surface.band,) * len(array)
        intensity = Intensity("surface", tuple(-limit for limit in limits), limits)
    return array, intensity, affine


# ---------------------------------------------------------------------------------------------- labels
def load_labels(item: Item, image: Source, count: int, size: tuple[int, ...],
                max_gib: float) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Labels of an image's volumes at the image's final size, and the values in them.

    count: of the image's volumes. Raises DataError naming the label's file.
    """
    source = formats.read_source(item.label, Request(max_gib=max_gib, label=True), "error for labels")
    try:
        check_grid(source, image, show(item.path.name))
        array = source.volume.array
        is_one_each = len(array) == count and source.is_series and image.is_series
        if len(array) != 1 and not is_one_each:
            plural = "s" if count > 1 else ""
            raise DataError(f"has {len(array)} volumes or channels, its image {show(item.path.name)} {count} "
                            f"volume{plural}; store one class number per voxel")
        whole = whole_numbers(array, source.step)
        ids = values_in(whole)
        if len(ids) > MAX_CLASSES:
            raise DataError(f"holds {len(ids)} different values, from {whole.min()} to {whole.max()}, more "
                            f"than {MAX_CLASSES} classes: is it an image?")
        return [resample_label(volume, size) for volume in whole], ids
    except DataError as error:
        raise DataError(f"{show(item.label)}: {error}") from None


def check_grid(source: Source, image: Source, name: str) -> None:
    """Raises DataError when a label does not lie on the grid of its image, whose name is `name`."""
    shape, wanted = source.volume.array.shape[1:], image.volume.array.shape[1:]
    if shape != wanted:
        raise DataError(f"its grid is {sizes(shape)} voxels (D,H,W), that of its image {name} "
                        f"{sizes(wanted)}; resample the label onto its image's grid")
    if (source.orientation == "-") != (image.orientation == "-"):
        raise DataError(f"one of it and its image {name} has no orientation; store both in one format")
    apart = distance(source.volume, image.volume)
    if apart > FAR * min(image.volume.spacing):
        raise DataError(f"lies up to {apart:.3g} mm away from its image {name}: their affines differ; "
                        f"resample the label onto its image's grid")


def whole_numbers(array: np.ndarray, step: float = 0.0) -> np.ndarray:
    """Labels (T, D, H, W) float32 -> uint8 or int16.

    step: between the values that their file can hold, of which each label lies at the nearest.
    """
    whole = np.rint(array)
    bad = np.abs(array - whole) > max(WHOLE, min(0.51 * step, SURELY))
    if bad.any():
        first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
        raise DataError(f"{int(bad.sum())} labels are no whole numbers, first {array[first]:g} at "
                        f"{first[1:]} (D,H,W); labels are class numbers, resampled to the nearest voxel")
    low, high = int(whole.min()), int(whole.max())
    if low < -2**15 or high >= 2**15:
        raise DataError(f"labels from {low} to {high}; use class numbers that fit in 16 bits")
    return whole.astype(np.uint8 if low >= 0 and high < 256 else np.int16)


def values_in(whole: np.ndarray) -> tuple[int, ...]:
    """The values that occur, ascending."""
    bits = 256**whole.itemsize
    counts = sum(np.bincount(part.view(f"u{part.itemsize}"), minlength=bits) for part in slabs_of(whole))
    return tuple(sorted(np.flatnonzero(counts).astype(np.uint16).astype(whole.dtype).tolist()))


def slabs_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous parts of about 2^22 voxels, flat: a count of all at once would take 8 bytes a voxel."""
    flat = array.reshape(-1)
    return (flat[i:i + 2**22] for i in range(0, len(flat), 2**22))
