"""What a denoiser is told of a volume besides its noise: numbers of a fixed order, one vector a sample.

    spacing  1, log2 of mm along D, H, W              size  1, log2 of voxels / 128 along D, H, W
    region   4 numbers of the top, 4 of the bottom    class  one number a class, 1 where it is that class
The first number of a part says that it is known, so that zeros everywhere mean nothing is known: that is
what a sample trained without conditions sees (arXiv:2207.12598), and row 0 of an embedding elsewhere. The
regions are MAISI's four, from the top of the body down.

Shapes: V numbers of a vector, D H W depth height width. Version 0.1 (2026-11).
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from training.config import CondConfig
from training.spellings import closest

REGIONS = ("head", "chest", "abdomen", "pelvis")
SAME_REGION = {"head_neck": "head", "neck": "head", "thorax": "chest", "lung": "chest", "lower": "pelvis"}
SIZE = 128                                                       # voxels of an edge whose number is 0


def width(cond: CondConfig) -> int:
    """V, the numbers of a vector."""
    parts = 4 * cond.spacing + 4 * cond.size + 2 * len(REGIONS) * cond.region
    return parts + len(cond.classes) * cond.by_class


def vector(cond: CondConfig, spacing: Sequence[float] | None, size: Sequence[int] | None, kind: str | None,
           region: str | None) -> np.ndarray:
    """The vector (V,) float32. What is None, or a class or region that is not known, has zeros.

    spacing: mm D,H,W. size: voxels D,H,W of the volume, not of its latent. Raises ValueError for a class or a
    region that there is not.
    """
    found: list[float] = []
    for wanted, values, unit in ((cond.spacing, spacing, 1), (cond.size, size, SIZE)):
        if wanted and values is None:
            found += [0.0] * 4
        elif wanted:
            found += [1.0, *(math.log2(value / unit) for value in values)]
    if cond.region:
        ends = [None, None] if region is None else ends_of(region)
        found += [float(end == name) for end in ends for name in REGIONS]
    if cond.by_class:
        if kind is not None and kind not in cond.classes:
            raise ValueError(f"class {kind!r} is none that was trained on"
                             f"{closest(kind, cond.classes, '') if cond.classes else ''}")
        found += [float(kind == name) for name in cond.classes]
    return np.array(found, dtype=np.float32)


def ends_of(region: str) -> list[str]:
    """`chest-abdomen`, or `chest` for both ends -> the regions of the top and of the bottom slice."""
    names = [part.strip().lower() for part in region.split("-")]
    names = [SAME_REGION.get(name, name) for name in names]
    if not 1 <= len(names) <= 2 or not set(names) <= set(REGIONS):
        raise ValueError(f"region {region!r} is none of {', '.join(REGIONS)}, nor two of them as TOP-BOTTOM")
    return [names[0], names[-1]]
