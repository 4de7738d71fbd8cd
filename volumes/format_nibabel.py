"""Everything that nibabel takes for a spatial image, read; NIfTI-1, written back on the grid of its source.

A spatial image (X, Y, Z) is reoriented to the closest RAS axes and transposed: D, H, W are Z, Y, X. An
image of 2 axes, or of 1 slice, is a volume whose third extent is 1, wherever that axis lies after
reorientation. The 4th axis holds T volumes. What is written has the source's axes, their direction and its
affine. Version 1.0.
"""
import contextlib
import gzip
import math
import os
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from volumes import files
from volumes.files import DataError, check_is_file, halves, quiet, split_ending
from volumes.volume import (
    Note,
    Origin,
    Request,
    Source,
    check_dtype,
    check_size,
    in_axes_of,
    in_source_shape,
    to_ras,
)

ENDINGS = (".nii", ".hdr", ".img", ".mgh", ".mgz", ".mnc", ".par", ".rec", ".head", ".brik")
# Of a volume that lies in two files: ending of its voxels -> of its header.
HEADER_OF = {".img": ".hdr", ".rec": ".par", ".brik": ".head"}
MAX_HEADER = 2**24  # bytes: extensions in front of the voxels, and what may follow them in a compressed file
FORMS_APART = 0.01   # of a voxel's size: what sform and qform may differ by in silence
QUATERNION = 1e-3  # what the squared length of a rotation's quaternion may exceed 1 by
UNITS = {1: ("metres", 1e3), 3: ("microns", 1e-3)}  # of the affine, by NIfTI's code; mm has 2
MOST_MM = 100.0  # the widest voxel that a header is believed: one of 1 metre is one of 1 mm
MOST_DEFLATED = 1032  # bytes that one byte of a .gz can stand for


# ---------------------------------------------------------------------------------------------- reading
def read_image(path: Path, request: Request) -> Source:
    """An image as (T, D, H, W), whole or one volume of it."""
    # Before nibabel opens them: it would wait at a pipe, and reads extensions of any length.
    for half in halves(path, HEADER_OF):
        check_is_file(Path(half))
        check_extensions(half)
    image, notes = open_image(path)
    if not isinstance(image, nib.spatialimages.SpatialImage):
        raise DataError(f"{type(image).__name__} is no spatial image (no voxel grid in mm)")

    # The header: what it declares is looked at before any voxel is read.
    shape, dtype = shape_of(image), np.dtype(image.get_data_dtype())
    check_dtype(dtype)
    axes = count_axes(shape)
    stored = image.file_map["image"].filename
    packed = packing_of(stored)
    room = room_for_voxels(image, stored, packed, request.max_gib)
    check_size(shape, dtype.itemsize, request.max_gib, room)
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0:
        raise DataError(f"its affine {affine[:3].round(3).tolist()} is singular or not finite; repair the "
                        f"header")
    tell_two_places(image, notes)
    affine[:3] *= to_mm(image, notes)
    count = shape[3] if axes == 4 else 1
    if request.volume is not None and not 0 <= request.volume < count:
        raise DataError(f"has {count} volumes, number {request.volume} was asked for; count from 0")

    # The voxels, to RAS, and transposed.
    array = read_voxels(image, stored, packed, request.volume if axes == 4 else None)
    step = abs(float(image.dataobj.slope)) if has_one_scale(image) and dtype.kind in "iu" else 0.0
    array = array.reshape(*shape[:3], *(1,) * (3 - len(shape)), -1)        # (X, Y, Z, T), axes as stored
    orientation = "".join(nib.aff2axcodes(image.affine))
    return Source(to_ras(array, affine), axes == 4, str(dtype), orientation, tuple(notes), step)


def open_image(path: Path) -> tuple[nib.spatialimages.SpatialImage, list[Note]]:
    """An image whose voxels are not read yet, with repairs of its header, and what was repaired."""
    notes: list[Note] = []
    # Not mapped: a file that shrinks while it is mapped would kill the process.
    try:
        image = nib.load(path, mmap=False)
    except ValueError as error:
        if "w2 should be positive" not in str(error):
            raise
        image = with_unit_quaternion(path, error)
        notes.append(Note("quaternion", "its header's quaternion is a little longer than 1; taken as a "
                                        "rotation, of length 1"))
    # A NIfTI in one file whose voxels would begin inside of its header.
    if isinstance(image, nib.Nifti1Image) and image.dataobj.offset < image.header.single_vox_offset:
        proxy, first = image.dataobj, image.header.single_vox_offset
        notes.append(Note("vox_offset", f"its header lets the voxels begin at byte {proxy.offset}, inside of "
                                        f"the header; read from byte {first} on"))
        spec = proxy.shape, proxy.dtype, first, proxy.slope, proxy.inter
        image = rebuilt(image, type(image), image.header,
                        nib.arrayproxy.ArrayProxy(proxy.file_like, spec, mmap=False))
    return image, notes


def rebuilt(image: nib.Nifti1Pair, kind: type[nib.Nifti1Pair], header: nib.Nifti1Header,
            proxy: nib.arrayproxy.ArrayProxy) -> nib.Nifti1Pair:
    """The image of the same files with another header and another way to its voxels."""
    new = kind(proxy, image.affine, header)
    new.file_map = image.file_map
    return new


def with_unit_quaternion(path: Path, error: ValueError) -> nib.Nifti1Pair:
    """A NIfTI whose quaternion is longer than 1 by what single precision and printing lose.

    Raises `error` where it is longer than that.
    """
    for kind in (nib.Nifti1Image, nib.Nifti1Pair, nib.Nifti2Image, nib.Nifti2Pair):
        if not kind.path_maybe_image(str(path))[0]:
            continue
        head = type("Header", (kind.header_class,), {"quaternion_threshold": QUATERNION})
        try:
            image = type("Image", (kind,), {"header_class": head}).from_filename(str(path), mmap=False)
        except ValueError:
            break
        header = kind.header_class(image.header.binaryblock, image.header.endianness, check=False)
        unit = image.header.get_qform_quaternion()
        unit /= np.linalg.norm(unit)
        header["quatern_b"], header["quatern_c"], header["quatern_d"] = unit[1:] * (1 - 1e-7)
        return rebuilt(image, kind, header, image.dataobj)
    raise error


def tell_two_places(image: nib.spatialimages.SpatialImage, notes: list[Note]) -> None:
    """A note where a NIfTI's two transforms have voxels of other sizes: not all programs read the same."""
    if not isinstance(image.header, nib.Nifti1Header):
        return
    header = image.header
    if not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return
    found = nib.affines.voxel_sizes(header.get_sform()), np.abs(header["pixdim"][1:4].astype(np.float64))
    if np.isfinite(found).all() and not np.allclose(*found, rtol=FORMS_APART):
        sizes = [" x ".join(f"{mm:.4g}" for mm in each) for each in found]
        notes.append(Note("forms", f"its sform has voxels of {sizes[0]}, its qform of {sizes[1]} (x,y,z); "
                                   f"the sform is taken"))


def to_mm(image: nib.spatialimages.SpatialImage, notes: list[Note]) -> float:
    """mm in the unit of an image's affine; a unit that is no mm is noted."""
    if not isinstance(image.header, nib.Nifti1Header):
        return 1.0
    unit = UNITS.get(int(image.header["xyzt_units"]) & 7)
    if unit is None:
        return 1.0
    name, factor = unit
    size = max(nib.affines.voxel_sizes(image.affine))
    if size * factor > MOST_MM:
        notes.append(Note("unit", f"its header gives its voxels as {size:g} {name} wide, which is taken for "
                                  f"mm; repair xyzt_units"))
        return 1.0
    notes.append(Note("unit", f"its header is in {name}: voxels up to {size * factor:g} mm wide"))
    return factor


def series_axis(image: nib.spatialimages.SpatialImage) -> int:
    """The axis of the volumes of a 4-D image: the last, but of MINC, whose dimensions have names, any."""
    names = getattr(getattr(image.dataobj, "minc_file", None), "_dim_names", ())
    others = [axis for axis, name in enumerate(names) if not name.endswith("space")]
    return others[0] if len(names) == 4 and len(others) == 1 else 3


def shape_of(image: nib.spatialimages.SpatialImage) -> tuple[int, ...]:
    """The shape of an image, the axis of its volumes last."""
    shape = [int(n) for n in image.shape]
    if len(shape) == 4:
        shape.append(shape.pop(series_axis(image)))
    return tuple(shape)


def has_one_scale(image: nib.spatialimages.SpatialImage) -> bool:
    """Whether value = slope * stored + inter holds for the whole image: other formats scale by slice."""
    return type(image.dataobj) is nib.arrayproxy.ArrayProxy


def count_axes(shape: tuple[int, ...]) -> int:
    """3 or 4: axes of a shape without those of length 1 at its end. Raises DataError for other numbers."""
    if len(shape) < 2:
        raise DataError(f"one-dimensional, shape {shape}; volumes have 2 to 4 axes")
    axes = max([3] + [axis + 1 for axis, n in enumerate(shape) if n != 1])
    if axes > 4:
        raise DataError(f"{axes}-dimensional, shape {shape} (a vector field?); volumes have 2 to 4 axes")
    return axes


def packing_of(stored: str | None) -> str:
    """The compression of a file of voxels; a .mgz is a .gz by another name."""
    if str(stored).lower().endswith(".mgz"):
        return ".gz"
    return split_ending(stored)[1]


def room_for_voxels(image: nib.spatialimages.SpatialImage, stored: str | None, packed: str,
                    max_gib: float) -> int | None:
    """The most voxel bytes that the file can hold; None where its size does not say."""
    offset = max(0, int(getattr(image.dataobj, "offset", 0)))
    if offset > max_gib * 2**30:
        raise DataError(f"its voxels begin at byte {offset}; repair the header")
    if not stored or packed in (".bz2", ".zst"):
        return None
    size = os.path.getsize(stored)
    if packed == ".gz":
        size *= MOST_DEFLATED
    return size - offset


def read_voxels(image: nib.spatialimages.SpatialImage, stored: str, packed: str,
                volume: int | None) -> np.ndarray:
    """The array as stored, scaled, the axis of its volumes last; or one volume of it.

    Of a compressed file everything is read, to its checksum.
    """
    is_stream = bool(packed) and hasattr(image.dataobj, "file_like")
    with contextlib.ExitStack() as stack:
        if is_stream:
            stream = image.dataobj.file_like = stack.enter_context(nib.openers.ImageOpener(stored))
        axis = series_axis(image)
        if volume is not None:
            array = image.dataobj[(slice(None),) * axis + (volume,)]
        else:
            array = np.asarray(image.dataobj)
            if array.ndim == 4:
                array = np.moveaxis(array, axis, 3)
        if is_stream:
            read_to_end(stream)
    return array


def check_extensions(path: str) -> None:
    """Refuse extensions between a NIfTI header and its voxels that are not as long as they say.

    nibabel reads them whole, so that a small .gz could fill the memory.
    """
    with nib.openers.ImageOpener(path) as stream:
        head = stream.read(544)
        kind, start = nib.Nifti1Header, 352
        if nib.Nifti2Header.may_contain_header(head):
            kind, start = nib.Nifti2Header, 544
        if not kind.may_contain_header(head) or not any(head[start - 4:start - 3]):
            return
        content = head + stream.read(MAX_HEADER)
    if len(content) < MAX_HEADER:
        return
    header = kind(head[:start - 4], check=False)
    end = math.inf  # of a pair they reach to the header's end
    if split_ending(path)[0] == ".nii":
        end = float(header["vox_offset"])
    order = "little" if header.endianness == "<" else "big"
    while start + 16 <= end <= MAX_HEADER:
        size = int.from_bytes(content[start:start + 4], order)
        if not 8 <= size <= end - start:
            break
        start += size
    if not start <= end < start + 16:
        raise DataError(f"its header extensions do not end where its voxels begin, or exceed {MAX_HEADER} "
                        f"bytes; repair the header")


def read_to_end(stream) -> None:
    """What follows the voxels in a compressed file: its checksum is looked at only there.

    Raises what the decoder raises.
    """
    left = MAX_HEADER
    while part := stream.read(2**20):
        left -= len(part)
        if left < 0:
            raise DataError(f"goes on for more than {MAX_HEADER} bytes after its voxels; its header is "
                            f"damaged, or it is a bomb")


# ---------------------------------------------------------------------------------------------- writing
def image_origin(kind: str, path: Path, source: Source, channel_axis: int | None) -> Origin:
    """Of an image that has been read already, from its header."""
    with quiet():
        image, _ = open_image(path)
    header = nib.Nifti1Header.from_header(image.header, check=False).as_byteswapped("<")
    dtype, slope, inter = "float32", 1.0, 0.0
    if has_one_scale(image):
        dtype, slope, inter = source.dtype, float(image.dataobj.slope), float(image.dataobj.inter)
    affine = tuple(tuple(map(float, row)) for row in image.affine)
    return Origin(kind, shape_of(image), dtype, source.volume.array.shape[1:],
                  header=header.binaryblock.hex(), affine=affine, slope=slope, inter=inter)


def write_image(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    """(C, D, H, W) as .nii.gz with the header of its source: its axes, their direction, its affine."""
    stored = in_axes_of(array, np.array(origin.affine))                      # (X, Y, Z, C), axes as stored
    stored = np.ascontiguousarray(in_source_shape(stored, -1, origin))
    header = nib.Nifti1Header(bytes.fromhex(origin.header), check=False)
    header.set_data_shape(stored.shape)
    header.set_data_dtype(stored.dtype)
    header["cal_min"] = header["cal_max"] = 0  # the display range of other values
    with quiet():
        image = nib.Nifti1Image(stored, np.array(origin.affine), header, dtype=stored.dtype)
    image.header.set_slope_inter(slope, inter)
    with gzip.GzipFile("", "wb", 4, file, mtime=0) as packed:
        image.to_stream(packed)


def write_nifti(path: str | os.PathLike, array: np.ndarray, affine: np.ndarray) -> None:
    """Write (C, D, H, W) as NIfTI, atomically: axes x, y, z and, for several channels, a fourth.

    The name ends in .nii or .nii.gz.
    """
    stored = array.transpose(3, 2, 1, 0)
    if len(array) == 1:
        stored = np.squeeze(stored, -1)
    with quiet():                                                # an affine beyond float32 is no news
        content = nib.Nifti1Image(stored, affine).to_bytes()
    if str(path).endswith(".gz"):
        content = gzip.compress(content, 4, mtime=0)
    files.write_atomic(Path(path), lambda file: file.write(content))
