"""Where the foreground of a volume lies, so that crops can be placed to hold some of it.

Shapes: K classes, P places of each, C channels, D H W depth height width. Version 1.1.
"""
import math
from collections.abc import Sequence

import numpy as np

from volumes.config import MAX_CLASSES
from volumes.entries import Entry, mapped
from volumes.seeds import seeded

POINTS = 4096     # places kept to put a foreground crop at: of each volume, or of each class of it
CONTRAST = 0.05   # normalised; an image voxel further than this from the background is foreground
SLAB = 2**22      # voxels that are looked at at once


def foreground_points(entry: Entry) -> np.ndarray:
    """Places of foreground voxels, (K, P, 3) int32 in D, H, W: P <= POINTS spread evenly over the volume's.

    With labels: of each of the K classes above 0 that occur; else K is 1. It is 0 where there is no
    foreground. A function of the voxels alone. Reads the volume in slabs, twice: memory is bounded whatever
    its size.
    """
    # First how many voxels each class has.
    depth = max(1, SLAB // math.prod(entry.shape[2:]))
    slabs = [slice(d, min(d + depth, entry.shape[1])) for d in range(0, entry.shape[1], depth)]
    counts = np.zeros(MAX_CLASSES, dtype=np.int64)
    for slab in slabs:
        counts += np.bincount(voxels_by_class(entry, slab)[0], minlength=MAX_CLASSES)
    present = np.flatnonzero(counts)
    length = min(POINTS, int(counts.max()))

    # Then which of them are kept: voxel r of n, one in each n-th of the class, so every voxel is as likely
    # as another.
    strata = np.arange(length)
    ranks = []
    for c in present:
        at = (strata + seeded(0, "points", int(c)).random(length)) * (counts[c] / length)
        ranks.append(np.minimum(at, counts[c] - 1).astype(np.int64))

    # Then where these lie.
    points = np.empty((len(present), length, 3), dtype=np.int32)
    seen = np.zeros(MAX_CLASSES, dtype=np.int64)
    for slab in slabs:
        classes, places = voxels_by_class(entry, slab)
        for k, c in enumerate(present):
            first, last = np.searchsorted(classes, (c, c + 1))
            here = (ranks[k] >= seen[c]) & (ranks[k] < seen[c] + last - first)
            chosen = places[first + ranks[k][here] - seen[c]]
            d, h, w = np.unravel_index(chosen, (slab.stop - slab.start, *entry.shape[2:]))
            points[k, here] = np.stack([d + slab.start, h, w], -1)
            seen[c] += last - first
    return points


def voxels_by_class(entry: Entry, slab: slice) -> tuple[np.ndarray, np.ndarray]:
    """Class of each foreground voxel of the slices D of a slab and its flat place there, sorted by both."""
    region = (slab, slice(None), slice(None))
    if entry.label is None:
        background = np.float32(entry.intensity.background)
        classes = np.abs(entry.read(region) - background).max(0) > CONTRAST
    else:
        classes = entry.read_label(region)
        classes[(classes == entry.ignore_label) | (classes < 0)] = 0
    classes = classes.astype(np.int16)  # sorted by radix
    places = np.flatnonzero(classes)
    classes = classes.reshape(-1)[places]
    order = np.argsort(classes, kind="stable")
    return classes[order], places[order]


def choose_point(entry: Entry, draw: Sequence[float]) -> tuple[int, ...] | None:
    """A foreground voxel D, H, W by two numbers in [0, 1), class, then place; None where there is none."""
    points = entry.points
    if isinstance(points, str):
        points = mapped(points)
    if not len(points):
        return None
    k, p = (int(u * n) for u, n in zip(draw, points.shape))
    return tuple(points[k, p].tolist())
