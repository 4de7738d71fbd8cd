"""MetaImage, NRRD and series of DICOM through SimpleITK, where it is installed: read, and written back.

SimpleITK's world is LPS (x to the patient's left, y to the back), ours RAS: the first two rows of the affine
change their sign. A 4th axis holds T volumes, components of a voxel are channels. A series of DICOM is read
from any of its files and is known by its folder; it is read only, and what is made of it goes out as .nii.gz
on the RAS grid. SimpleITK is asked for only where there is such a file. Version 1.0.
"""
import contextlib
import functools
import os
import re
import struct
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np

from volumes.files import DataError, PackageError, one_line, split_ending
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

META, NRRD, DICOM = (".mha", ".mhd"), (".nrrd", ".nhdr"), (".dcm",)
IO = {**dict.fromkeys(META, "MetaImageIO"), **dict.fromkeys(NRRD, "NrrdImageIO")}
INSTALL = "python -m pip install SimpleITK"
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # to RAS, and back
DATA_FILE = re.compile(rb"^\s*(?:ElementDataFile\s*=|data ?file:)\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)
SHORT = (b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FL", b"FD", b"IS", b"LO", b"LT", b"PN", b"SH",
         b"SL", b"SS", b"ST", b"TM", b"UI", b"UL", b"US")  # kinds of DICOM whose length has 2 bytes, and 4
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT",
        b"UV")
UNDEFINED = 0xFFFFFFFF                # a length of DICOM: to the delimiter
ONE_AT_A_TIME = threading.RLock()  # a series is listed while it is read
UNEVEN = 0.01   # of the distance between slices: what others may differ by in silence


def is_installed() -> bool:
    try:
        import SimpleITK  # noqa: F401
    except ImportError:
        return False
    return True


def library():
    try:
        import SimpleITK
    except ImportError:
        raise PackageError(f"is read through SimpleITK, which is not installed: {INSTALL}") from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)  # what matters of them is a note of ours
    return SimpleITK


def in_utf8(path: str | os.PathLike) -> str:
    """A path as SimpleITK takes it: with other bytes in it ITK ends the whole process."""
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError("its name, or that of a folder above it, is not UTF-8, as SimpleITK needs it; rename "
                        "it") from None
    return name


def is_dicom(path: str | os.PathLike) -> bool:
    """By its ending; or, without one or with one of digits as UIDs have, by the four letters at byte 128."""
    ending = os.path.splitext(os.fspath(path))[1].lower()
    if ending in DICOM:
        return True
    if ending and not ending[1:].isdigit():
        return False
    try:
        if not os.path.isfile(path):  # no waiting at a pipe
            return False
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------- reading
@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """MetaIO, NrrdIO and GDCM write to the process's standard error themselves, whatever the display of
    warnings is set to: meanwhile that goes nowhere. One thread at a time, so that each finds the true one.
    """
    with ONE_AT_A_TIME:
        try:
            kept = os.dup(2)
        except OSError:  # there is none
            yield
            return
        try:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextlib.contextmanager
def errors_of_itk() -> Iterator[None]:
    """What SimpleITK raises, without the places in its own source that it names, and what it prints."""
    try:
        with silenced():
            yield
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # MetaIO ends with the system's reason even where there is none.
        told = [line for line in lines if line != "Reason: Success"] or lines
        why = re.sub(r"^.*ERROR: \w+\(0x[0-9a-f]+\): ", "", told[-1])
        raise DataError(f"SimpleITK cannot read it ({one_line(why, 120)}); repair the file or take it out of "
                        f"the data") from error


@errors_of_itk()
def read_file(path: Path, request: Request) -> Source:
    """A .mha, .mhd, .nrrd or .nhdr as (C, D, H, W)."""
    sitk = library()
    check_counts(path)
    reader = sitk.ImageFileReader()
    reader.SetImageIO(IO[split_ending(path)[0]])
    reader.SetFileName(in_utf8(path))
    reader.ReadImageInformation()
    check_header(sitk, reader, request)
    return as_source(sitk, reader.Execute(), request, [])


@errors_of_itk()
def read_series(path: Path, request: Request) -> Source:
    """The series of DICOM that a file belongs to, as (1, D, H, W) or with the channels of a colour image."""
    sitk = library()
    names = [in_utf8(name) for name in parts_of_series(path)]
    for name in names:
        check_lengths(name)
    first = sitk.ImageFileReader()
    first.SetImageIO("GDCMImageIO")
    first.SetFileName(names[0])
    first.ReadImageInformation()
    check_header(sitk, first, request, len(names))
    if len(names) == 1:
        return as_source(sitk, first.Execute(), request, [])
    reader = sitk.ImageSeriesReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileNames(names)
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    return as_source(sitk, image, request, uneven(reader, image, len(names)))


def check_counts(path: Path) -> None:
    """A .mha's numbers of axes and of channels, which MetaIO believes before it looks: absurd ones end the
    process.
    """
    with open(path, "rb") as stream:
        head = stream.read(2**16)
    for name, most in ((b"NDims", 10), (b"ElementNumberOfChannels", 2**16)):
        for match in re.finditer(rb"^\s*" + name + rb"\s*[=:]\s*(.{0,40})", head, re.MULTILINE):
            value = match.group(1).strip()
            if not (value.isdigit() and 1 <= int(value) <= most):
                found = one_line(value.decode("latin-1"), 40)
                raise DataError(f"its header says {name.decode()} = {found}; numbers from 1 to {most} are "
                                f"possible: repair it or take it out of the data")


def check_lengths(path: str) -> None:
    """The lengths that the elements of a DICOM file declare (PS3.5, 7.1), since GDCM takes the memory for one
    before it looks whether the file goes on so far.
    """
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        if stream.read(132)[128:] != b"DICM":
            stream.seek(0)
        order, is_explicit, is_meta, syntax, is_encapsulated = "<", True, True, b"", False
        while len(head := stream.read(8)) == 8:
            # First how the rest of the file is written, which the meta elements of group 2 say.
            if is_meta and head[:2] != b"\2\0":
                is_meta, is_explicit = False, syntax != b"1.2.840.10008.1.2"
                if syntax == b"1.2.840.10008.1.2.2":
                    order = ">"
                if syntax == b"1.2.840.10008.1.2.1.99":  # compressed as a whole
                    return
            # Then the length: of 2 bytes behind a kind of two letters, of 4 behind some and behind none.
            tag = struct.unpack(order + "HH", head[:4])
            has_kind = is_explicit and tag[0] != 0xFFFE and head[4:6] in SHORT + LONG
            length = struct.unpack(order + ("H" if has_kind else "I"), head[6 if has_kind else 4:])[0]
            if has_kind and head[4:6] in LONG:
                length = int.from_bytes(stream.read(4), "little" if order == "<" else "big")
            left = size - stream.tell()
            if length != UNDEFINED and length > left:
                raise DataError(f"damaged: its element ({tag[0]:04x},{tag[1]:04x}) says that it has {length} "
                                f"bytes, and the file has {max(0, left)} more; copy it anew or take it out "
                                f"of the data")
            # Last to the next one. Sequences and their items are entered, but for the pieces of a picture.
            if length == UNDEFINED:
                is_encapsulated = tag == (0x7FE0, 0x10)
            elif head[4:6] == b"SQ" or (tag[0] == 0xFFFE and not is_encapsulated):
                pass
            elif tag == (2, 0x10):
                syntax = stream.read(length).strip(b"\0 ")
            else:
                stream.seek(length, 1)


def check_header(sitk, reader, request: Request, count: int = 1) -> None:
    """What a header declares, before any voxel is read. count: of the files that are like it."""
    dtype = dtype_of(sitk, reader.GetPixelID())
    check_dtype(dtype)
    shape = (*reader.GetSize(), reader.GetNumberOfComponents())
    if not 2 <= len(shape) - 1 <= 4:
        raise DataError(f"{len(shape) - 1}-dimensional; volumes have 2 to 4 axes")
    check_size((*shape, count), dtype.itemsize, request.max_gib)


def dtype_of(sitk, pixel: int) -> np.dtype:
    """numpy's type of SimpleITK's number for one, or for vectors of it."""
    name = sitk.GetPixelIDValueAsString(pixel).lower()
    kind = "c" if "complex" in name else "f" if "float" in name else "u" if "unsigned" in name else "i"
    bits = int(re.search(r"(\d+)[- ]bit", name).group(1))
    return np.dtype(f"{kind}{(2 if kind == 'c' else 1) * bits // 8}")


def as_source(sitk, image, request: Request, notes: Sequence[Note]) -> Source:
    """An image with its voxels -> (C, D, H, W) in RAS."""
    array, affine = sitk.GetArrayViewFromImage(image), affine_of(image)
    axes, has_channels = image.GetDimension(), image.GetNumberOfComponentsPerPixel() > 1
    if axes == 4 and has_channels:
        raise DataError("4-dimensional with several components a voxel; store one or the other")
    if not has_channels:
        array = array[..., None] if axes < 4 else np.moveaxis(array, 0, -1)  # (Z, Y, X, T)
    array = array.reshape(*(1,) * (4 - array.ndim), *array.shape)
    array = array.transpose(2, 1, 0, 3)                                      # (X, Y, Z, C or T), as stored
    is_series = axes == 4
    if request.volume is not None:
        count = array.shape[3] if is_series else 1
        if not 0 <= request.volume < count:
            raise DataError(f"has {count} volumes, number {request.volume} was asked for; count from 0")
        if is_series:
            array = array[..., request.volume:request.volume + 1]
    orientation = "".join(nib.aff2axcodes(affine))
    return Source(to_ras(array, affine), is_series, str(array.dtype), orientation, tuple(notes))


def affine_of(image) -> np.ndarray:
    """X, Y, Z as stored -> mm in RAS, of an image or a reader that has its header. DataError where it is
    singular.
    """
    axes = image.GetDimension()
    direction = np.array(image.GetDirection()).reshape(axes, axes)
    spacing, origin = np.array(image.GetSpacing()), np.array(image.GetOrigin())
    affine, n = np.eye(4), min(axes, 3)
    affine[:n, :n] = (direction * spacing)[:n, :n]
    affine[:n, 3] = origin[:n]
    if not np.isfinite(affine).all() or not abs(np.linalg.det(affine[:3, :3])) > 0:
        raise DataError(f"its directions and spacing {affine[:3].round(3).tolist()} are singular or not "
                        f"finite; repair the header")
    return LPS @ affine


def uneven(reader, image, count: int) -> list[Note]:
    """A note where the slices of a series do not lie evenly, as where some are missing."""
    try:
        places = np.array([[float(x) for x in reader.GetMetaData(k, "0020|0032").split("\\")]
                           for k in range(count)])
    except (RuntimeError, ValueError):  # a series without positions
        return []
    normal = np.array(image.GetDirection()).reshape(3, 3)[:, 2]
    steps = np.abs(np.diff(places @ normal))
    middle = float(np.median(steps))
    if np.abs(steps - middle).max(initial=0) <= UNEVEN * middle:
        return []
    return [Note("uneven", f"its slices lie {steps.min():.4g} to {steps.max():.4g} mm apart (are some "
                           f"missing?); read as if it were {image.GetSpacing()[2]:.4g} mm everywhere")]


# ---------------------------------------------------------------------------------------------- files
def parts_of_file(path: Path) -> list[str]:
    """A header, and the file that it names for its voxels."""
    found = [str(path)]
    if split_ending(path)[0] in (".mhd", ".nhdr"):
        with open(path, "rb") as stream:
            match = DATA_FILE.search(stream.read(2**16))
        name = os.fsdecode(match.group(1)) if match else ""
        beside = os.path.join(os.path.dirname(path), name)
        if name and "\0" not in name and os.path.isfile(beside):
            found.append(beside)
    return found


def parts_of_series(path: str | os.PathLike) -> list[str]:
    """All files of the series that a file of DICOM belongs to, in the order of their slices."""
    real = os.path.abspath(path)
    if not is_installed():  # reading says so
        return [real]
    for names in series_in(os.path.dirname(real)):
        if real in names:
            return names
    return [real]


def series_in(folder: str) -> list[list[str]]:
    """The series of DICOM in a folder, each a list of files in the order of their slices. None where ITK
    cannot open it.
    """
    try:
        in_utf8(folder)
    except DataError:
        return []
    return series_at(os.path.abspath(folder), os.stat(folder).st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def series_at(folder: str, _: int) -> list[list[str]]:
    """_: when the folder changed, so that what came into it since is seen."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file()]
    whole = [name for name in names if is_whole(os.path.join(folder, name))]
    if len(whole) == len(names):
        try:
            return listed(folder)
        except RuntimeError:  # because of one of them
            pass
    # GDCM reads whatever lies in a folder, and a damaged file would cost all of it: it is shown the others.
    return listed_of(folder, [name for name in whole if is_listed(folder, name)])


def listed(folder: str) -> list[list[str]]:
    reader = library().ImageSeriesReader
    with silenced():
        return [list(reader.GetGDCMSeriesFileNames(folder, name)) for name in reader.GetGDCMSeriesIDs(folder)]


def listed_of(folder: str, names: Sequence[str]) -> list[list[str]]:
    """Of some files of a folder, by links to them."""
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            os.symlink(os.path.join(folder, name), os.path.join(place, name))
        return [[os.path.join(folder, os.path.basename(name)) for name in series] for series in listed(place)]


def is_listed(folder: str, name: str) -> bool:
    try:
        listed_of(folder, [name])
        return True
    except RuntimeError:
        return False


def is_whole(path: str) -> bool:
    """Whether GDCM can be shown a file."""
    try:
        if is_dicom(path):
            check_lengths(path)
        return True
    except (DataError, OSError):
        return False


# ---------------------------------------------------------------------------------------------- writing
@errors_of_itk()
def file_origin(kind: str, path: Path, source: Source, channel_axis: int | None) -> Origin:
    """Of a file that has been read already, from its header."""
    sitk = library()
    reader = sitk.ImageFileReader()
    reader.SetImageIO(IO[split_ending(path)[0]])
    reader.SetFileName(in_utf8(path))
    reader.ReadImageInformation()
    shape = (*reader.GetSize(), 1)[:max(3, reader.GetDimension())]
    channels = None
    if reader.GetNumberOfComponents() > 1:
        shape, channels = (*shape, reader.GetNumberOfComponents()), -1
    affine = tuple(tuple(map(float, row)) for row in affine_of(reader))
    return Origin(kind, shape, source.dtype, source.volume.array.shape[1:], affine=affine,
                  channel_axis=channels)


def series_origin(kind: str, path: Path, source: Source, channel_axis: int | None) -> Origin:
    """Of a series of DICOM: NIfTI on its RAS grid."""
    array, affine = source.volume.array, source.volume.affine
    shape = array.shape[:0:-1] if len(array) == 1 else (*array.shape[:0:-1], len(array))
    header = nib.Nifti1Image(np.zeros((1, 1, 1), np.uint8), affine).header
    return Origin(kind, shape, source.dtype, array.shape[1:], header=header.binaryblock.hex(),
                  affine=tuple(tuple(map(float, row)) for row in affine))


def write_meta(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    write_through(file, array, origin, ".mha")


def write_nrrd(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    write_through(file, array, origin, ".nrrd")


def write_through(file: BinaryIO, array: np.ndarray, origin: Origin, ending: str) -> None:
    """(C, D, H, W) with the axes, their direction and the affine of the source; channels as components of a
    voxel, volumes along a 4th axis.
    """
    sitk, affine = library(), LPS @ np.array(origin.affine)
    stored = in_source_shape(in_axes_of(array, np.array(origin.affine)), -1, origin)
    if stored.dtype == bool:
        stored = stored.astype(np.uint8)
    stored = stored.reshape(*stored.shape, *(1,) * (3 - stored.ndim))
    spacing = np.linalg.norm(affine[:3, :3], axis=0)

    def placed(array: np.ndarray, is_vector: bool = False):
        order = (2, 1, 0, 3) if is_vector else (2, 1, 0)
        image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(order)), isVector=is_vector)
        image.SetSpacing(spacing.tolist())
        image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
        image.SetOrigin(affine[:3, 3].tolist())
        return image
    if stored.ndim == 3:
        image = placed(stored)
    elif origin.channel_axis is None:
        image = sitk.JoinSeries([placed(stored[..., number]) for number in range(stored.shape[3])])
    else:
        image = placed(stored, True)
    with tempfile.TemporaryDirectory() as folder:
        name = os.path.join(folder, "a" + ending)
        sitk.WriteImage(image, name, useCompression=True)
        with open(name, "rb") as stream:
            file.write(stream.read())
