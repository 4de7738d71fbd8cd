"""Where a crop of points lies: the largest box of tokens that holds no more than so many.

Tokens are cells of 8^3 voxels. Sizes and places are D, H, W, in voxels. Version 1.0.
"""
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from volumes.cache import with_tokens
from volumes.config import DataConfig
from volumes.entries import Entry, mapped
from volumes.files import DataError, Say, show
from volumes.loading import Loaded
from volumes.seeds import seeded
from volumes.surfaces import PAYS_BELOW, TOKEN, choose_box, points_in, token_counts

TRIES = 50    # places that are tried for a box with data.min_points
BOX = 64      # voxels on an edge, where neither data.patch nor data.max_points says


def with_boxes(train: list[Entry], val: list[Entry], cfg: DataConfig,
               say: Say) -> tuple[list[Entry], list[Entry], tuple[int, int, int]]:
    """Entries that know where their points are, and the size that no crop exceeds.

    Raises DataError for a volume with fewer points than data.min_points.
    """
    train, val = [with_tokens(entry) for entry in train], [with_tokens(entry) for entry in val]
    for entry in (*train, *val):
        found = points_of(entry)
        if found < cfg.min_points:
            raise DataError(f"{show(entry.path or entry.name)}: {found} points, data.min_points is "
                            f"{cfg.min_points}; set data.surface to another level, or take the file out")
    tell_points(train, say)
    return train, val, largest_box(train, cfg)


def sums_of(entry: Entry) -> np.ndarray:
    """Sums of points over tokens (surfaces.summed)."""
    return mapped(entry.tokens) if isinstance(entry.tokens, str) else entry.tokens


def points_of(entry: Entry) -> int:
    return int(sums_of(entry)[-1, -1, -1])


def largest_box(entries: Sequence[Entry], cfg: DataConfig) -> tuple[int, int, int]:
    """The size that no crop exceeds, voxels, whole tokens: data.patch, or with data.max_points the largest
    volume, else BOX.
    """
    longest = [max(entry.shape[axis] for entry in entries) for axis in (1, 2, 3)]
    wanted = cfg.patch or (longest if cfg.max_points else [min(BOX, n) for n in longest])
    return tuple(-(-n // TOKEN) * TOKEN for n in wanted)


def most_points(entries: Sequence[Entry], largest: Sequence[int]) -> int:
    """Points of the densest box of the size `largest` (voxels, whole tokens), wherever it may lie."""
    most = 0
    for entry in entries:
        counts = sums_of(entry)
        for axis, voxels in enumerate(largest):
            length = counts.shape[axis]
            side = min(length - 1, voxels // TOKEN)
            # The sums before the end of each box less those before its begin, axis by axis.
            counts = counts.take(range(side, length), axis) - counts.take(range(length - side), axis)
        most = max(most, int(counts.max()))
    return most


def box_of(entry: Entry, largest: Sequence[int], cfg: DataConfig,
           *seed) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """First voxel and size of the crop that is a function of `seed` alone: at least data.min_points where
    TRIES places have one, at most data.max_points, in whole tokens, at most `largest` (voxels).
    """
    total, most = sums_of(entry), [n // TOKEN for n in largest]
    source, best = seeded(*seed), (-1, None)
    for _ in range(TRIES):
        first, end = choose_box(total, most, cfg.max_points, source.random(3))
        found = points_in(total, first, end)
        best = max(best, (found, (first, end)), key=lambda pair: pair[0])
        if found >= cfg.min_points:
            break
    first, end = best[1]
    return tuple(n * TOKEN for n in first), tuple((b - a) * TOKEN for a, b in zip(first, end))


def together(crops: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """For a DataLoader: boxes (C, D, H, W) of several sizes -> (B, C, D, H, W), and the numbers of their
    volumes. What is added at the end of an axis is 0, no point.
    """
    images, numbers = zip(*crops)
    size = [max(lengths) for lengths in zip(*(image.shape for image in images))]
    batch = torch.zeros(len(images), *size)
    for place, image in zip(batch, images):
        place[tuple(slice(n) for n in image.shape)] = image
    return batch, torch.tensor(numbers)


def points_told(loaded: Loaded, cfg: DataConfig) -> list[str]:
    """For `python data.py`: points, tokens and fill of each volume of a file; none without data.surface."""
    if cfg.surface == "none":
        return []
    told = []
    for array, _ in loaded.volumes:
        counts = token_counts(array)
        points, fill = int(counts.sum()), counts.sum() / array[0].size
        few = f", fewer than data.min_points={cfg.min_points}" if points < cfg.min_points else ""
        told.append(f"{points:,} points in {np.count_nonzero(counts):,} tokens, fill {fill:.1%}"
                    f"{few}{warning(fill)}")
    return told


def tell_points(entries: Sequence[Entry], say: Say) -> None:
    """A line: points, tokens, fill of a data set, and whether a sparse network pays."""
    points = sum(points_of(entry) for entry in entries)
    voxels = sum(int(np.prod(entry.shape[1:], dtype=np.int64)) for entry in entries)
    tokens = sum(tokens_of(sums_of(entry)) for entry in entries)
    fill = points / voxels
    say(f"data: {points:,} points in {tokens:,} tokens, {points / max(tokens, 1):.0f} a token of 512; "
        f"{fill:.1%} of the voxels{warning(fill)}")


def warning(fill: float) -> str:
    if fill <= PAYS_BELOW:
        return ""
    return (f": above {PAYS_BELOW:.0%} a dense network (--task vae) is no slower; a smaller data.band or "
            f"another data.surface makes fewer points")


def tokens_of(total: np.ndarray) -> int:
    """How many tokens hold a point, from the sums over all."""
    counts = np.diff(np.diff(np.diff(total, axis=0), axis=1), axis=2)
    return int(np.count_nonzero(counts))
