"""What a file of a volume holds, what is asked of its reader, and how it lay on disk; checks that all
readers share.

C channels, D H W depth height width, T volumes of a 4-D file. Version 1.0.
"""
import math
from dataclasses import dataclass
from typing import NamedTuple

import nibabel as nib
import numpy as np

from volumes.files import DataError, brief


class Volume(NamedTuple):
    """Voxels and their place in the world."""
    array: np.ndarray                    # (C, D, H, W) float32 as stored, not normalised
    spacing: tuple[float, float, float]  # mm, D H W
    affine: np.ndarray                   # (4, 4) of the RAS grid: X, Y, Z -> mm


class Note(NamedTuple):
    """What a user should know of a file that is used all the same."""
    kind: str  # notes of one kind are told in one line, of the first file
    text: str  # goes on after the file's name


class Source(NamedTuple):
    """A file that has been read."""
    volume: Volume
    is_series: bool   # its 4th axis is that of an image (data.four_d), not the channels of an array
    dtype: str        # as stored
    orientation: str  # axis codes on disk such as LPS; "-" where the format has none
    notes: tuple[Note, ...] = ()
    step: float = 0.0  # between neighbouring values, of whole numbers that are stored with a scale


class Request(NamedTuple):
    """What a reader is asked for."""
    volume: int | None = None        # of a 4-D image: this one alone, from 0
    channel_axis: int | None = None  # of 4-D arrays, see DataConfig
    max_gib: float = 8.0             # what a file may declare; nothing larger is allocated
    label: bool = False              # read as class numbers, not as intensities


@dataclass(frozen=True)
class Origin:
    """How a source lay on disk: what it takes to write a result onto its grid.

    Plain values, kept in latents as JSON.
    """
    kind: str                                   # .nii.gz | .npy | .npz | .png: ending of what goes out
    shape: tuple[int, ...]                      # as stored
    dtype: str                                  # as stored
    size: tuple[int, int, int]                  # D, H, W of the source in RAS
    key: str = "volume"                         # .npz: name of the array
    channel_axis: int | None = None             # .npy, .npz of 4 axes
    header: str = ""                            # image: NIfTI-1 header, hexadecimal
    affine: tuple[tuple[float, ...], ...] = ()  # image: of the axes as stored
    slope: float = 1.0                          # image: value = slope * stored + inter
    inter: float = 0.0
    blank: tuple[tuple[int, float], ...] = ()  # volumes of a 4-D image that are left out: number, and the
                                               # one value of their voxels

    @property
    def bits(self) -> int:
        """Of the voxels on disk, uncompressed."""
        return 8 * np.dtype(self.dtype).itemsize * math.prod(self.shape)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """mm (D, H, W) of an affine (X, Y, Z -> mm)."""
    x, y, z = nib.affines.voxel_sizes(affine)
    return float(z), float(y), float(x)


def distance(a: Volume, b: Volume) -> float:
    """The largest distance (mm) between the places that two volumes of one size give to a corner voxel."""
    last = [n - 1 for n in a.array.shape[:0:-1]]  # x y z
    corners = [(*(end if bits >> axis & 1 else 0 for axis, end in enumerate(last)), 1) for bits in range(8)]
    apart = (np.array(corners) @ (a.affine - b.affine).T)[:, :3]
    return float(np.linalg.norm(apart, axis=1).max())


def to_ras(array: np.ndarray, affine: np.ndarray) -> Volume:
    """(X, Y, Z, T), axes as stored, with the affine of these -> the volume in the closest RAS axes."""
    turn = nib.io_orientation(affine)
    affine = affine @ nib.orientations.inv_ornt_aff(turn, array.shape[:3])
    array = nib.apply_orientation(array, turn).transpose(3, 2, 1, 0)              # (T, D, H, W)
    return Volume(np.ascontiguousarray(array, dtype=np.float32), spacing_of(affine), affine)


def in_axes_of(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(C, D, H, W) in RAS -> (X, Y, Z, C), the axes of a source whose affine is given."""
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.io_orientation(affine))
    return nib.apply_orientation(array.transpose(3, 2, 1, 0), back)


def plain_origin(kind: str, path: object, source: Source, channel_axis: int | None) -> Origin:
    """The origin of a format that is written as it was read, (C, D, H, W)."""
    return Origin(kind, source.volume.array.shape, source.dtype, source.volume.array.shape[1:])


def in_source_shape(array: np.ndarray, channels: int, origin: Origin) -> np.ndarray:
    """An array in the source's order of axes -> the source's shape, which may lack axes of length 1.

    A result with another number of channels than the source (one of them, or labels) cannot have it; a single
    channel then has no axis `channels`.
    """
    if array.size == math.prod(origin.shape):
        return array.reshape(origin.shape)
    if array.shape[channels] == 1:
        return array.squeeze(channels)
    return array


# -------------------------------------------------------------------------- checks that readers share
def check_size(shape: tuple[int, ...], itemsize: int, max_gib: float, available: int | None = None) -> None:
    """Refuse a declared shape before it costs memory.

    itemsize: bytes of a stored voxel. available: the most voxel bytes that the file can hold, where known.
    """
    count, named = math.prod(shape), brief(shape)
    if min(shape, default=1) < 1:
        raise DataError(f"declares shape {named}, which holds no voxels")
    if count * max(4, itemsize) > max_gib * 2**30:
        gib = math.inf
        if count < 2**64:  # else the product may be too long a number for a float
            gib = count * max(4, itemsize) / 2**30
        raise DataError(f"declares shape {named}, {gib:.3g} GiB, more than data.max_gib={max_gib:g}; "
                        "raise that if the file is what it says")
    if available is not None and count * itemsize > available:
        raise DataError(f"declares {count * itemsize} bytes of voxels (shape {named}) but can hold no more "
                        f"than {max(0, available)}; it is truncated or its header is damaged")


NOT_REAL = {  # numpy's kinds of types that are no voxels
    "c": "complex values; store magnitude and phase as two real channels",
    "V": "RGB or structured voxels; store one number per voxel and channel",
    "O": "pickled objects; store plain numbers",
}


def check_dtype(dtype: np.dtype) -> None:
    """Real numbers and booleans pass."""
    if dtype.kind not in "fiub":
        raise DataError(f"holds {NOT_REAL.get(dtype.kind, f'voxels of type {dtype}')}")


def check_finite(array: np.ndarray, nan: str) -> None:
    """NaN policy of an array (C, D, H, W), in place. Infinite voxels, and values beyond float32, count too.

    nan: "zero" replaces them by 0, "keep" leaves them; else they are refused, and where it is "error" the
    line names that way out.
    """
    if nan == "keep" or np.isfinite(array).all():
        return
    bad = ~np.isfinite(array)
    if nan == "zero":
        array[bad] = 0
        return
    nans, total = int(np.isnan(array).sum()), int(bad.sum())
    what = " and ".join(f"{n} {name}" for n, name in ((nans, "NaN"), (total - nans, "infinite")) if n)
    plural = "s" if total > 1 else ""
    first = tuple(int(i) for i in np.unravel_index(bad.argmax(), bad.shape))
    channel = f" of volume or channel {first[0]}" if len(array) > 1 else ""
    way_out = " or set data.nan=zero" if nan == "error" else ""
    raise DataError(f"{what} voxel{plural}, first at {first[1:]} (D,H,W){channel}; repair the file{way_out}")
