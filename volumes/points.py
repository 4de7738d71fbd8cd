"""Where the foreground of a volume lies, so that crops can be placed to hold some.

D H W depth height width. Version 1.0.
"""
import dataclasses
import functools
import hashlib
import math
from pathlib import Path

import numpy as np

from volumes.cache import cache_error
from volumes.config import MAX_CLASSES
from volumes.entries import Entry
from volumes.files import write_atomic
from volumes.seeds import seeded

POINTS = 4096        # places kept to put a foreground crop at: of each volume, or of each class of it
CONTRAST = 0.05      # normalised; an image voxel further than this from the background is foreground


def foreground_points(entry: Entry) -> np.ndarray:
    """Places of foreground voxels, (K, P, 3) int32 in D, H, W: P <= POINTS spread evenly over the volume's.

    With labels: of each of the K classes above 0 that occur; else K is 1. It is 0 where there is no foreground. A function
    of the voxels alone. Reads the volume in slabs, twice: memory is bounded whatever its size.
    """
    depth = max(1, 2**22 // math.prod(entry.shape[2:]))
    slabs = [slice(d, min(d + depth, entry.shape[1])) for d in range(0, entry.shape[1], depth)]

    def voxels_by_class(slab: slice) -> tuple[np.ndarray, np.ndarray]:
        """Class of each foreground voxel of the slab and its flat place, sorted by both."""
        region = (slab, slice(None), slice(None))
        if entry.label is None:
            classes = np.abs(entry.read(region) - np.float32(entry.intensity.background)).max(0) > CONTRAST
        else:
            classes = entry.read_label(region)
            classes[(classes == entry.ignore_label) | (classes < 0)] = 0
        classes = classes.astype(np.int16)  # sorted by radix
        places = np.flatnonzero(classes)
        classes = classes.reshape(-1)[places]
        order = np.argsort(classes, kind="stable")
        return classes[order], places[order]

    counts = sum((np.bincount(voxels_by_class(slab)[0], minlength=MAX_CLASSES) for slab in slabs), np.zeros(MAX_CLASSES, dtype=np.int64))
    present = np.flatnonzero(counts)
    length = min(POINTS, int(counts.max()))
    points = np.empty((len(present), length, 3), dtype=np.int32)
    strata = np.arange(length)                       # rank r of n: one in each n-th of the class, so every voxel is as likely as another
    ranks = [np.minimum((strata + seeded(0, "points", int(c)).random(length)) * (counts[c] / length), counts[c] - 1).astype(np.int64)
             for c in present]
    seen = np.zeros(MAX_CLASSES, dtype=np.int64)
    for slab in slabs:
        classes, places = voxels_by_class(slab)
        for k, c in enumerate(present):
            first, last = np.searchsorted(classes, (c, c + 1))
            here = (ranks[k] >= seen[c]) & (ranks[k] < seen[c] + last - first)
            d, h, w = np.unravel_index(places[first + ranks[k][here] - seen[c]], (slab.stop - slab.start, *entry.shape[2:]))
            points[k, here] = np.stack([d + slab.start, h, w], -1)
            seen[c] += last - first
    return points


def with_points(entry: Entry) -> Entry:
    """The entry with its foreground places, which lie beside its voxels in the cache, made once."""
    if not isinstance(entry.store, str):
        return dataclasses.replace(entry, points=foreground_points(entry))
    meaning = "" if entry.label is None else "-" + hashlib.sha256(repr((entry.label_values, entry.ignore_label)).encode()).hexdigest()[:8]
    file = Path(f"{entry.store.removesuffix('.npy')}-points{meaning}.npy")
    try:
        np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or damaged
        points = foreground_points(entry)
        try:
            write_atomic(file, functools.partial(np.save, arr=points), shared=True)
        except OSError as error:
            raise cache_error(file.parent, error) from None
    return dataclasses.replace(entry, points=str(file))
