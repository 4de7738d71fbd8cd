"""The table of formats: a file is read, and a result written, by the row that its ending names.

A new format is one row: its endings, a reader and a writer. Finding files, the cache, predict.py and the
messages that name the formats all look here. Version 1.0.
"""
import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from volumes import files, format_arrays, format_nibabel, format_pictures, format_sitk
from volumes.files import DataError, check_is_file, one_line, quiet, show, split_ending
from volumes.volume import Origin, Request, Source, Volume, check_finite, plain_origin

NO_SHAPE = ".bin"  # raw rows of points: found, so that they are refused by name


class Format(NamedTuple):
    """A row of the table. What has a default need not be given."""
    endings: tuple[str, ...]                                # lower case, without compression
    read: Callable[[Path, Request], Source]                 # may raise anything for a damaged file
    write: Callable[[BinaryIO, np.ndarray, Origin, float, float], None]  # (C, D, H, W), origin, slope, inter
    goes_out: str = ""                                      # of what is written; "": the first of `endings`
    origin: Callable[[str, Path, Source, int | None], Origin] = plain_origin  # for `write`
    is_picture: bool = False                                # 1 slice; intensities over the range of its type
    header_of: Mapping[str, str] = {}                       # ending of voxels -> of a header apart
    holds_label: Callable[[Path], bool] = lambda path: False  # whether a file is an image and its label
    note: str = ""                                          # for the message that names the formats
    parts: Callable[[Path], list[str]] | None = None        # all files of one; None: it, or its halves
    is_series: bool = False                                 # many files in a folder, by which they are named
    is_installed: Callable[[], bool] = lambda: True         # whether its package is, without which all are
    install: str = ""                                       # left out, and the command that installs it

    @property
    def kind(self) -> str:
        """Ending of what is written."""
        return self.goes_out or self.endings[0]


THROUGH_SITK = {"is_installed": format_sitk.is_installed, "install": format_sitk.INSTALL}
TABLE = [  # the first row takes what no other one does
    Format(format_nibabel.ENDINGS, format_nibabel.read_image, format_nibabel.write_image, ".nii.gz",
           format_nibabel.image_origin, header_of=format_nibabel.HEADER_OF, note=" (also .gz)"),
    Format((".npy",), format_arrays.read_npy, format_arrays.write_npy, origin=format_arrays.array_origin),
    Format((".npz",), format_arrays.read_npz, format_arrays.write_npz, origin=format_arrays.array_origin,
           holds_label=format_arrays.holds_label),
    Format(format_pictures.ENDINGS, format_pictures.read_picture, format_pictures.write_png, is_picture=True),
    Format(format_sitk.META, format_sitk.read_file, format_sitk.write_meta, origin=format_sitk.file_origin,
           parts=format_sitk.parts_of_file, **THROUGH_SITK),
    Format(format_sitk.NRRD, format_sitk.read_file, format_sitk.write_nrrd, origin=format_sitk.file_origin,
           parts=format_sitk.parts_of_file, **THROUGH_SITK),
    Format(format_sitk.DICOM, format_sitk.read_series, format_nibabel.write_image, ".nii.gz",
           format_sitk.series_origin, note=" (folders of them)", parts=format_sitk.parts_of_series,
           is_series=True, **THROUGH_SITK),
]


def format_of(path: str | os.PathLike) -> Format:
    """The row of a file, by its ending; of DICOM, which may have none, by what it begins with."""
    return row_of(path) or TABLE[0]


def row_of(path: str | os.PathLike) -> Format | None:
    kind = split_ending(path)[0]
    for row in TABLE:
        if kind in row.endings or row.endings is format_sitk.DICOM and format_sitk.is_dicom(path):
            return row
    return None


def is_volume(path: str | os.PathLike) -> bool:
    """Whether a file is of a format, by its ending (of DICOM see `format_of`)."""
    return row_of(path) is not None


def parts_of(path: Path) -> list[str]:
    """All files that the voxels of one come from: two where they lie apart from their header, or a series."""
    row = format_of(path)
    if row.parts is not None:
        return row.parts(path)
    return files.halves(path, row.header_of)


def is_picture(path: str | os.PathLike) -> bool:
    return format_of(path).is_picture


def known_endings() -> str:
    """All endings, for messages."""
    return ", ".join(" ".join(row.endings) + row.note for row in TABLE)


def stamp(path: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of each file that the voxels of one come from."""
    stamps = []
    for file in parts_of(path):
        stat = os.stat(file)
        stamps.append((os.path.realpath(file), stat.st_size, stat.st_mtime_ns))
    return stamps


# ---------------------------------------------------------------------------------------------- reading
def read_volume(path: str | os.PathLike, *, volume: int | None = None, nan: str = "error",
                channel_axis: int | None = None, max_gib: float = 8.0) -> Volume:
    """Read one file whole. The 4th axis of an image comes as channels; `volume` picks one of it (then C is
    1).

    nan: "error" refuses NaN and infinite voxels, "zero" replaces them. channel_axis: of 4-D arrays, see
    DataConfig. Raises DataError, one line that names the file, for whatever is wrong with it; nothing
    larger than max_gib is allocated.
    """
    return read_source(Path(path), Request(volume, channel_axis, max_gib), nan).volume


def read_source(path: Path, request: Request, nan: str = "error") -> Source:
    """As `read_volume`, with what the file says about itself."""
    try:
        check_is_file(path)
        if split_ending(path)[0] == NO_SHAPE:
            raise DataError("raw .bin rows carry no shape; turn the points into a voxel grid (.npy or .npz) "
                            "first")
        with quiet(), np.errstate(all="ignore"):
            source = format_of(path).read(path, request)
        check_finite(source.volume.array, nan)
        return source
    except DataError as error:
        raise type(error)(f"{show(path)}: {error}") from None
    except Exception as error:  # a decoder that meets damaged or hostile bytes may raise anything
        raise DataError(f"{show(path)}: cannot be read ({type(error).__name__}: {one_line(error)}); "
                        "repair the file or take it out of the data") from error


# ---------------------------------------------------------------------------------------------- writing
def origin_of(path: Path, source: Source, channel_axis: int | None) -> Origin:
    """How a file that has been read lies on disk, from its header. channel_axis: as it was read with."""
    row = format_of(path)
    return row.origin(row.kind, path, source, channel_axis)


def ending_out(path: str | os.PathLike) -> str:
    """Ending of what is written for a source."""
    return format_of(path).kind


def write_volume(path: Path, array: np.ndarray, origin: Origin, slope: float = 1.0,
                 inter: float = 0.0) -> None:
    """(C, D, H, W) in the type that is wanted on disk -> a file on the source's grid, whole or not at all.

    slope, inter: value = slope * stored + inter, kept where the format has a place for it.
    """
    row = next((row for row in TABLE if row.kind == origin.kind), TABLE[0])
    try:
        files.write_atomic(path, lambda file: row.write(file, array, origin, slope, inter))
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def write_label(path: Path, array: np.ndarray, origin: Origin) -> None:
    """Class numbers (T, D, H, W) -> a file on the grid of the image that they belong to."""
    write_volume(path, array, dataclasses.replace(origin, key=format_arrays.LABEL_KEYS[0]))
