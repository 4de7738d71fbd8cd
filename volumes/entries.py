"""A volume that is ready to be cropped: its voxels lie in memory or in a memory-mapped file of the cache.

A crop reads its own rows and nothing else. C channels, D H W depth height width. Version 1.0.
"""
import functools
from dataclasses import dataclass

import numpy as np

from volumes.config import MAX_CLASSES, DataConfig
from volumes.files import DataError, StoreError, one_line, show
from volumes.intensities import Intensity


@dataclass(frozen=True)
class Entry:
    """One volume that is ready to be cropped. `store` is the file of its normalised voxels, or the array itself."""
    name: str                            # short, unique, fit for logs and file names
    path: str | None                     # source file; None: synthetic
    shape: tuple[int, int, int, int]     # (C, D, H, W)
    spacing: tuple[float, float, float]  # mm, D H W, of the grid it is kept in
    affine: np.ndarray                   # (4, 4), of that grid
    intensity: Intensity
    store: str | np.ndarray
    guessed: bool = False                # the modality was guessed
    points: str | np.ndarray | None = None  # (K, P, 3), D H W of P foreground voxels of each of K classes, or a file of them
    label: str | np.ndarray | None = None  # file of its labels (D, H, W), or the array itself, as stored; None: data.labels is off
    label_path: str | None = None        # source file of the labels
    label_ids: tuple[int, ...] = ()      # values that occur in that file, ascending
    label_values: tuple[int, ...] | None = None  # the stored values of class 0, 1, ...; None: stored as classes
    ignore_label: int | None = None

    def read(self, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Normalised voxels, float32, a copy: the whole (C, D, H, W) or a region (slices of D, H, W), of which alone is read."""
        array = mapped(self.store, self.shape) if isinstance(self.store, str) else self.store
        return np.array(array if region is None else array[(slice(None), *region)])

    def read_label(self, region: tuple[slice, slice, slice] | None = None) -> np.ndarray:
        """Class numbers (D, H, W) int64, whole or of a region; `ignore_label` where the file says so."""
        array = mapped(self.label, self.shape[1:]) if isinstance(self.label, str) else self.label
        array = array if region is None else array[region]
        if self.label_values is None:
            return array.astype(np.int64)
        return class_table(self.label_values, self.ignore_label)[array.astype(np.uint16)]


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
    """A file of the cache. Raises StoreError where it went away or was cut: touching a map beyond its file's end kills the process."""
    try:
        array = open_array(file)
        if array.base.size() >= len(array.base) and array.shape == (shape or array.shape):
            return array
        what = "it was cut or overwritten"
    except (OSError, ValueError, EOFError) as error:
        what = getattr(error, "strerror", None) or one_line(error)
    raise StoreError(f"{show(file)}: the cache changed under the run ({what}); let no other program touch it; the next start rebuilds it")


def check_labels(entry: Entry, classes: int | None, cfg: DataConfig) -> None:
    """Raises DataError when a label lies outside of [0, classes), or MAX_CLASSES while classes are not known."""
    ids = [value for value in entry.label_ids if value != cfg.ignore_label]
    if ids and (ids[0] < 0 or ids[-1] >= (classes or MAX_CLASSES)):
        what = f"with {classes} classes they lie in 0 to {classes - 1}" if classes else f"they lie in 0 to {MAX_CLASSES - 1}"
        raise DataError(f"{show(entry.label_path or entry.name)}: labels from {ids[0]} to {ids[-1]}; {what}: set data.classes, "
                        "data.ignore_label or data.label_values, or repair the file")
