"""Stand-in until volumes/ has these: where a source lay on disk, and writing back onto its grid."""
from __future__ import annotations

import gzip
import math
import typing
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

import data
from data import DataError, Intensity
from training import checkpoints


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
