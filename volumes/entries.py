"""A volume that is ready to be cropped: normalised voxels in a memory-mapped file, or an array; and its
labels.

A crop reads its own rows and nothing else. Shapes: C channels, D H W depth height width. Version 1.1.
"""
import functools
from dataclasses import dataclass

import numpy as np

from volumes.files import StoreError, one_line, show
from volumes.intensities import Intensity
from volumes.surfaces import STEPS
from volumes.volume import Note

Region = tuple[slice, slice, slice]  # of D, H, W


@dataclass(frozen=True)
class Entry:
    """One volume that is ready to be cropped.

    `store` is the file of its normalised voxels, or the array itself.
    """
    name: str                            # unique: that of its file below the data's root, without its
                                         # ending, and _t003 of a file of several volumes
    path: str | None                     # source file; None: synthetic
    shape: tuple[int, int, int, int]     # (C, D, H, W)
    spacing: tuple[float, float, float]  # mm, D H W, of the grid it is kept in
    affine: np.ndarray                   # (4, 4), of that grid
    intensity: Intensity
    store: str | np.ndarray
    guessed: bool = False                # the modality was guessed
    points: str | np.ndarray | None = None  # (K, P, 3), D H W of P foreground voxels of each of K
                                            # classes, or a file of them
    tokens: str | np.ndarray | None = None  # (d+1, h+1, w+1), points of the tokens before each corner
                                            # (surfaces.summed), or a file of it; with data.points
    label: str | np.ndarray | None = None  # file of its labels (D, H, W), or the array itself, as
                                           # stored; None: data.labels is off
    label_path: str | None = None        # source file of the labels
    label_ids: tuple[int, ...] = ()      # values that occur in that file, ascending
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ...; None: as classes
    ignore_label: int | None = None
    file: str = ""                       # the name of its file, which all volumes of a 4-D file share
    volume: int | None = None            # its number, where the file has several
    digest: str = ""                     # of the file's bytes
    patient: str | None = None           # whose file it is: of a datalist's keys, else found (splits.py)
    fold: int | None = None              # of a datalist's keys
    notes: tuple[Note, ...] = ()         # what a user should know of its file

    def read(self, region: Region | None = None) -> np.ndarray:
        """Normalised voxels, float32, a copy: the whole (C, D, H, W) or a region, of which alone is read."""
        array = self.store
        if isinstance(array, str):
            array = mapped(array, self.shape)
        found = np.array(array if region is None else array[(slice(None), *region)])
        # Distances lie in bytes, as 127ths.
        return found / np.float32(STEPS) if found.dtype == np.int8 else found

    def read_label(self, region: Region | None = None) -> np.ndarray:
        """Class numbers (D, H, W) int64, whole or of a region; `ignore_label` where the file says so."""
        array = self.label
        if isinstance(array, str):
            array = mapped(array, self.shape[1:])
        if region is not None:
            array = array[region]
        if self.label_values is None:
            return array.astype(np.int64)
        return class_table(self.label_values, self.ignore_label)[array.astype(np.uint16)]


Groups = list[list[Entry]]  # of many files: the volumes of each


@functools.lru_cache(maxsize=16)
def class_table(label_values: tuple[int, ...], ignore_label: int | None) -> np.ndarray:
    """Class of every stored value, at its last 16 bits."""
    table = np.zeros(2**16, dtype=np.int64)
    table[np.array(label_values)] = np.arange(len(label_values))
    if ignore_label is not None:
        table[ignore_label & 0xffff] = ignore_label
    return table


@functools.lru_cache(maxsize=256)  # each map holds a file descriptor, of which a process usually has 1024
def open_array(file: str) -> np.ndarray:
    return np.load(file, mmap_mode="r", allow_pickle=False)


def mapped(file: str, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """A file of the cache, which must have `shape` where that is given.

    Raises StoreError where it went away or was cut: touching a map beyond its file's end kills the process.
    """
    try:
        array = open_array(file)
        if array.base.size() >= len(array.base) and array.shape == (shape or array.shape):
            return array
        what = "it was cut or overwritten"
    except (OSError, ValueError, EOFError) as error:
        what = getattr(error, "strerror", None) or one_line(error)
    raise StoreError(f"{show(file)}: the cache changed under the run ({what}); let no other program touch "
                     f"it; the next start rebuilds it")
