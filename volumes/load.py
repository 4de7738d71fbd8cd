"""A file through the whole pipeline, before anything is written: read, split into volumes, normalised, resampled.

Its label lies on its image's grid, follows it through every change (nearest voxel), and is kept as it is stored.
C channels, D H W depth height width, T volumes of a 4-D file. Version 1.0.
"""
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from volumes.config import MAX_CLASSES, MODALITIES, DataConfig
from volumes.files import DataError, show, sizes
from volumes.find import NO_LABEL, Item
from volumes.formats import is_picture, read_source
from volumes.grids import resample, resample_label
from volumes.intensities import Intensity, guess_modality, normalise
from volumes.volume import Request, Source, Volume, check_size, spacing_of


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
    check_pair(item, cfg)
    source = read_source(item.path, Request(None, cfg.channel_axis, cfg.max_gib), cfg.nan)
    array, spacing, affine = source.volume
    try:
        volumes = list(array[:, None]) if source.is_series and cfg.four_d == "volumes" else [array]
        if cfg.select_channel is not None:
            if cfg.select_channel >= len(volumes[0]):
                raise DataError(f"has {len(volumes[0])} channel{'s' * (len(volumes[0]) > 1)}, data.select_channel={cfg.select_channel} "
                                "counts from 0; choose another")
            volumes = [volume[cfg.select_channel:cfg.select_channel + 1] for volume in volumes]
        named = (item.kind or "").lower() if (item.kind or "").lower() in MODALITIES else cfg.modality
        if named == "auto" and is_picture(item.path):
            named = "picture"
        modality = guess_modality(array) if named == "auto" else MODALITIES[named]
        if modality == "picture" and np.dtype(source.dtype).kind not in "iu":
            raise DataError(f"holds {source.dtype}; modality picture is for whole numbers, whose type gives the range")
        picture_max = float(np.iinfo(source.dtype).max) if modality == "picture" else 255.0
        done = [finish(Volume(volume, spacing, affine), modality, cfg, picture_max) for volume in volumes]
    except DataError as error:
        raise DataError(f"{show(item.path)}: {error}") from None
    grid = done[0][2]
    labels, ids = load_labels(item, source, len(volumes), done[0][0].shape[1:], cfg) if cfg.labels else ([], ())
    return Loaded([(array, intensity) for array, intensity, _ in done], spacing_of(grid), grid, named == "auto", source, labels, ids)


def check_pair(item: Item, cfg: DataConfig) -> None:
    if item.fault or cfg.labels and item.label is None:
        raise DataError(f"{show(item.path)}: {item.fault or NO_LABEL}")


def load_labels(item: Item, image: Source, count: int, size: tuple[int, ...], cfg: DataConfig) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Labels of an image's volumes at the image's final size, and the values in them. Raises DataError naming the label's file."""
    source = read_source(item.label, Request(max_gib=cfg.max_gib, label=True), "error for labels")
    try:
        (array, _, affine), (voxels, spacing, image_affine), name = source.volume, image.volume, show(item.path.name)
        if array.shape[1:] != voxels.shape[1:]:
            raise DataError(f"its grid is {sizes(array.shape[1:])} voxels (D,H,W), that of its image {name} {sizes(voxels.shape[1:])}; "
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
        counts = sum(np.bincount(part.reshape(-1).view(f"u{part.itemsize}"), minlength=256**part.itemsize) for part in slabs_of(whole))
        ids = np.flatnonzero(counts).astype(np.uint16).astype(whole.dtype).tolist()
        if len(ids) > MAX_CLASSES:
            raise DataError(f"holds {len(ids)} different values, from {low} to {high}, more than {MAX_CLASSES} classes: is it an image?")
        return [resample_label(volume, size) for volume in whole], tuple(sorted(ids))
    except DataError as error:
        raise DataError(f"{show(item.label)}: {error}") from None


def slabs_of(array: np.ndarray) -> Iterator[np.ndarray]:
    """Contiguous parts of about 2^22 voxels of (T, D, H, W)."""
    flat = array.reshape(-1)
    return (flat[i:i + 2**22] for i in range(0, len(flat), 2**22))


def finish(volume: Volume, modality: str, cfg: DataConfig, picture_max: float = 255.0) -> tuple[np.ndarray, Intensity, np.ndarray]:
    """Normalise, then resample to cfg.resize or cfg.spacing: clipped first, so that padding and metal do not bleed into tissue."""
    array, intensity = normalise(volume.array, modality, cfg.hu_limits(), cfg.voxel_scale, picture_max, cfg.percentiles, cfg.percentiles_of)
    mm, size, affine = cfg.spacing_mm(), cfg.resize, volume.affine
    if size is None and mm is not None:
        size = tuple(max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], volume.spacing, mm))
    if cfg.resize is None and cfg.scale != 1:
        d, h, w = size or array.shape[1:]
        size = (d, max(1, round(h * cfg.scale)), max(1, round(w * cfg.scale)))
    if size is not None and tuple(size) != array.shape[1:]:
        check_size((len(array), *size), 4, cfg.max_gib)
        array, affine = resample(array, affine, tuple(size))
    return array, intensity, affine
