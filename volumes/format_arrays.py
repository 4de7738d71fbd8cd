"""numpy's .npy and .npz: dense volumes, and sparse ones of coordinates and features; read, and written back.

The spatial axes are x, y, z, 1 mm; of 4 axes one holds the channels (`data.channel_axis`). An .npz is dense
(an array named volume, voxel or vol, or its only one) or sparse (shape, coords, features), and may hold its
label beside it (seg, label, labels, mask). Every header is checked before its data is allocated. Version
1.0.
"""
import io
import math
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np

from volumes.files import DataError, brief, one_line, split_ending
from volumes.volume import Origin, Request, Source, Volume, check_dtype, check_size, in_source_shape

DENSE_KEYS = ("volume", "voxel", "vol")  # of an .npz, in this order
# Of sparse ones: grid, places, values. The second are those of the sparse VQ-VAE guide's data sets.
SPARSE_KEYS = (("shape", "coords", "features"), ("resolution", "sparse_index", "sparse_sdf"))
LABEL_KEYS = ("seg", "label", "labels", "mask")
GUESSED_CHANNELS = 8  # an outer axis of a 4-D array is taken for channels up to this length
MAX_NPY_HEADER = 10_000  # bytes; numpy's own limit, which it looks at when it has read them all
READ_HEADER = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


# ---------------------------------------------------------------------------------------------- reading
def read_npy(path: Path, request: Request) -> Source:
    """A .npy as (C, D, H, W)."""
    if path.suffix.lower() != ".npy":  # compressed as a whole: a.npy.gz
        return read_npz(path, request)
    with open(path, "rb") as stream:
        array = read_dense(stream, os.path.getsize(path), request)
    return as_source(array, array.dtype)


def read_npz(path: Path, request: Request) -> Source:
    """An .npz as (C, D, H, W); of a label its label first."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        if len(members) < len(archive.infolist()):
            raise DataError("two of its arrays have one name; save it anew")
        key = dense_key(members, LABEL_KEYS + DENSE_KEYS if request.label else DENSE_KEYS)
        if key is not None:
            with open_member(archive, members[key]) as stream:
                array = read_dense(stream, members[key].file_size, request)
            return as_source(array, array.dtype)
        names = next((keys for keys in SPARSE_KEYS if set(keys) <= set(members)), None)
        if names is None:
            found = ", ".join(one_line(key, 40) for key in sorted(members)[:8]) or "none"
            raise DataError(f"its arrays are {found}; name one volume, voxel or vol, or store shape, coords "
                            f"and features")
        parts = []
        for key in names:
            with open_member(archive, members[key]) as stream:
                parts.append(read_plain(stream, members[key].file_size, request.max_gib))
    shape, coords, features = parts
    if names[0] == "resolution":
        # The grid is a cube, the values are one a point, and 0 is a value: nearly 0 stands for it.
        shape, features = np.full(3, int(np.max(shape))), features.reshape(len(features), -1)
        features = np.where(features == 0, np.float32(1e-6), features.astype(np.float32))
        coords = coords.reshape(len(coords), -1)[:, -3:]
    return as_source(densify(shape, coords, features, request.max_gib), features.dtype)


def as_source(array: np.ndarray, dtype: np.dtype) -> Source:
    """(C, D, H, W) of any real type, and the type on disk."""
    volume = Volume(np.ascontiguousarray(array, dtype=np.float32), (1.0, 1.0, 1.0), np.eye(4))
    return Source(volume, False, str(dtype), "-")


def dense_key(members: dict[str, zipfile.ZipInfo], keys: tuple[str, ...]) -> str | None:
    """The array of an .npz that is the volume: the first of `keys`, or the only one there is."""
    for key in keys:
        if key in members:
            return key
    if len(members) == 1:
        return next(iter(members))
    return None


def open_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> zipfile.ZipExtFile:
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError("is compressed in a way that numpy does not write; save it with "
                        "numpy.savez_compressed")
    return archive.open(info)


def read_header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether the first axis is the fastest, and type of an array in numpy's format."""
    version = np.lib.format.read_magic(stream)
    if version not in READ_HEADER:
        raise DataError(f".npy format version {version}; save the array with a plain number type")
    length = stream.read(2 * version[0])
    if int.from_bytes(length, "little") > MAX_NPY_HEADER:
        raise DataError(f"declares a header of {int.from_bytes(length, 'little')} bytes; repair the file")
    return READ_HEADER[version](io.BytesIO(length + stream.read(int.from_bytes(length, "little"))))


def read_dense(stream: BinaryIO, available: int, request: Request) -> np.ndarray:
    """An array of 3 axes, or of 4 with channels, as (C, D, H, W)."""
    shape, fortran, dtype = read_header(stream)
    check_dtype(dtype)
    if len(shape) not in (3, 4):
        what = "volumes have 3 axes, or 4 with channels"
        if len(shape) == 2:
            what = "a table (points?); turn it into a voxel grid first"
        raise DataError(f"{len(shape)}-dimensional array, shape {brief(shape)}: {what}")
    axis = channel_axis_of(shape, request.channel_axis)
    array = read_data(stream, available, request.max_gib, shape, fortran, dtype)
    if axis is None:
        array = array[None]
    else:
        array = np.moveaxis(array, axis, 0)
    return array.transpose(0, 3, 2, 1)                           # (C, D, H, W)


def read_plain(stream: BinaryIO, available: int, max_gib: float) -> np.ndarray:
    """An array of numbers of any shape, as it is stored."""
    shape, fortran, dtype = read_header(stream)
    if dtype.kind in "OcV":
        check_dtype(dtype)
    return read_data(stream, available, max_gib, shape, fortran, dtype)


def read_data(stream: BinaryIO, available: int, max_gib: float, shape: tuple[int, ...], fortran: bool,
              dtype: np.dtype) -> np.ndarray:
    """What follows a header: exactly as much as it declares."""
    check_size(shape, dtype.itemsize, max_gib, available)
    length = math.prod(shape) * dtype.itemsize
    data = stream.read(length)
    if len(data) != length:
        raise DataError(f"ends after {len(data)} bytes of an array of shape {shape}; it is truncated")
    if stream.read(1):                            # at the end of a member zipfile compares its checksum
        raise DataError("goes on after its array; store one array in a file")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def channel_axis_of(shape: tuple[int, ...], channel_axis: int | None) -> int | None:
    """The axis of the channels, which an array of 3 axes does not have.

    Unless it is named it is the shorter one of the last and the first.
    """
    if len(shape) != 4:
        return None
    if channel_axis is None:
        channel_axis = 0 if shape[0] < shape[-1] else -1
        if shape[channel_axis] > GUESSED_CHANNELS:
            raise DataError(f"4-dimensional array, shape {brief(shape)}: neither the last nor the first "
                            f"axis is as short as {GUESSED_CHANNELS} channels (a time series?); set "
                            f"data.channel_axis")
    if not -4 <= channel_axis < 4:
        raise DataError(f"4-dimensional array, shape {brief(shape)}, has no axis "
                        f"data.channel_axis={channel_axis}; use -4 to 3")
    return channel_axis


def densify(shape: np.ndarray, coords: np.ndarray, features: np.ndarray, max_gib: float) -> np.ndarray:
    """A sparse grid -> (C, D, H, W) float32.

    shape (3,) or (4,) = x, y, z[, C]; coords (N, 3) whole numbers; features (N, C), or (N,) of one channel.
    """
    check_dtype(features.dtype)
    if features.ndim == 1:
        features = features[:, None]
    is_whole = shape.dtype.kind in "iu" and coords.dtype.kind in "iu"
    is_table = coords.ndim == 2 and coords.shape[1] == 3 and features.shape[:-1] == coords.shape[:1]
    if not is_whole or shape.shape not in ((3,), (4,)) or not is_table:
        raise DataError(f"sparse grid with shape {shape.shape} {shape.dtype}, coords {coords.shape} "
                        f"{coords.dtype}, features {features.shape}; needs shape (3,) or (4,) and coords "
                        f"(N, 3), whole numbers, and features (N, C)")
    if len(shape) == 4 and shape[3] != features.shape[1]:
        raise DataError(f"sparse grid declares {shape[3]} channels, its features have {features.shape[1]}")
    grid = tuple(int(n) for n in shape[:3])
    check_size((*grid, features.shape[1]), 4, max_gib)
    if len(coords) and ((coords < 0) | (coords >= np.array(grid))).any():
        raise DataError(f"sparse grid of {grid} has coords from {coords.min(0).tolist()} to "
                        f"{coords.max(0).tolist()}, outside of it")
    x, y, z = coords.T
    dense = np.zeros((features.shape[1], *grid[::-1]), dtype=np.float32)
    dense[:, z, y, x] = features.T
    return dense


def holds_label(path: Path) -> bool:
    """Whether an .npz is an image and its label.

    True also of one that cannot be opened: reading it says why.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            keys = {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # a damaged archive may raise anything
        return True
    return bool(keys & set(LABEL_KEYS) and keys & set(DENSE_KEYS))


# ---------------------------------------------------------------------------------------------- writing
def array_origin(kind: str, path: Path, source: Source, channel_axis: int | None) -> Origin:
    """Of an array that has been read already, from its header."""
    shape, key = stored_array(path)
    size = source.volume.array.shape[1:]
    if shape is None:                             # a sparse grid comes back dense, channels last
        array = source.volume.array
        return Origin(kind, (*array.shape[:0:-1], len(array)), source.dtype, size, key, -1)
    return Origin(kind, shape, source.dtype, size, key, channel_axis_of(shape, channel_axis))


def stored_array(path: Path) -> tuple[tuple[int, ...] | None, str]:
    """Shape of a .npy, or of the volume of an .npz with its name; no shape for a sparse one.

    Only headers are read.
    """
    if split_ending(path)[0] == ".npy":
        with open(path, "rb") as stream:
            return read_header(stream)[0], ""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        key = dense_key(members, DENSE_KEYS)
        if key is None:
            return None, DENSE_KEYS[0]
        with archive.open(members[key]) as stream:
            return read_header(stream)[0], key


def write_npy(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    np.save(file, in_stored_axes(array, origin))


def write_npz(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    np.savez_compressed(file, **{origin.key: in_stored_axes(array, origin)})


def in_stored_axes(array: np.ndarray, origin: Origin) -> np.ndarray:
    """(C, D, H, W) -> x, y, z and the channels where the source has them."""
    channels = -1 if origin.channel_axis is None else origin.channel_axis
    stored = np.moveaxis(array.transpose(0, 3, 2, 1), 0, channels)
    return np.ascontiguousarray(in_source_shape(stored, channels, origin))
