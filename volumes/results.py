"""What a network made of a file, written as the file is: on its grid, in its scale and in its type of
numbers.

Intensities in [-1, 1] on the network's grid go in. Shapes: C channels, D H W, T volumes of a 4-D file.
Version 1.1.
"""
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from volumes.formats import write_volume
from volumes.grids import resample
from volumes.intensities import Intensity, denormalise
from volumes.volume import Origin


def write_result(path: Path, volumes: Sequence[tuple[np.ndarray, Intensity]], affine: np.ndarray,
                 origin: Origin) -> None:
    """Network intensities -> a file like its source: intensities, number type, grid.

    Distances from a surface are fractions of a voxel: they are float32, whatever the source holds.
    """
    values = to_source_grid(volumes, affine, origin)
    if is_distance(volumes):
        write_volume(path, values, origin)
        return
    stored = in_stored_type(values, origin)
    if stored.dtype.kind in "iu":
        write_volume(path, stored, origin, origin.slope, origin.inter)
    else:
        write_volume(path, stored, origin)


def write_mask(path: Path, volumes: Sequence[tuple[np.ndarray, Intensity]], affine: np.ndarray,
               origin: Origin) -> None:
    """Distances on the network's grid -> a file on its source's, uint8: 1 inside of the surface, 0 outside.

    The side of a voxel is told after resampling, so that edges follow the distance. Raises ValueError where
    the volumes are no distances.
    """
    if not is_distance(volumes):
        raise ValueError("a mask is the inside of a surface, and these volumes are intensities")
    inside = (to_source_grid(volumes, affine, origin) < 0).astype(np.uint8)
    for number, _ in origin.blank:
        inside[number] = 0
    write_volume(path, inside, origin)


def is_distance(volumes: Sequence[tuple[np.ndarray, Intensity]]) -> bool:
    """Whether the volumes are distances from a surface (surfaces.py)."""
    return volumes[0][1].modality == "surface"


def to_source_grid(volumes: Sequence[tuple[np.ndarray, Intensity]], affine: np.ndarray,
                   origin: Origin) -> np.ndarray:
    """Network intensities -> the file's scale and grid.

    T times (C, D, H, W) on the network's grid, whose affine is given -> (T * C, D, H, W) float32, and the
    blank volumes that were left out, as they were.
    """
    blank = dict(origin.blank)
    count = sum(len(volume) for volume, _ in volumes) + len(blank)
    out = np.empty((count, *origin.size), dtype=np.float32)
    for number, value in blank.items():
        out[number] = value
    at = 0
    for volume, intensity in volumes:
        while at in blank:
            at += 1
        if volume.shape[1:] != origin.size:
            volume, _ = resample(volume, affine, origin.size)
        for d in range(origin.size[0]):  # slice by slice: denormalise works in float64
            out[at:at + len(volume), d:d + 1] = denormalise(volume[:, d:d + 1], intensity)
        at += len(volume)
    return out


def with_blank(labels: Sequence[np.ndarray], origin: Origin) -> np.ndarray:
    """Labels (D, H, W) of the volumes that were used -> (T, D, H, W) of all, blank ones of class 0."""
    found = list(labels)
    for number, _ in origin.blank:
        found.insert(number, np.zeros_like(found[0]))
    return np.stack(found)


def in_stored_type(array: np.ndarray, origin: Origin) -> np.ndarray:
    """Values -> what stands for them on disk: rounded and clipped to a whole type, else float32."""
    dtype = np.dtype(origin.dtype)
    if dtype.kind not in "iub":
        return array
    low, high = 0.0, 1.0
    if dtype.kind != "b":
        low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
        if int(high) > np.iinfo(dtype).max:  # 2^63 - 1 is no float64
            high = float(np.nextafter(high, 0))
    out = np.empty(array.shape, dtype.newbyteorder("="))
    for d in range(array.shape[1]):
        # stored = (value - inter) / slope
        stored = (array[:, d].astype(np.float64) - origin.inter) / origin.slope
        out[:, d] = np.clip(np.rint(stored), low, high)
    return out
