"""A scan as the voxels near a surface, each with its signed distance: what the sparse autoencoder learns.

inside = the voxels above a level (or within a window) of HU. The distance of a voxel is that to the nearest
voxel of the other side, less half a voxel, so that the surface lies between the two; it is negative inside.
It is exact within the band and unknown beyond: separable min-plus convolution with truncated parabolas
(Felzenszwalb and Huttenlocher 2012, doi:10.4086/toc.2012.v008a019), r steps to either side on each axis.

Distances are in voxels, a step along each axis counting 1, divided by the band: [-1, 1]. With `data.metric
mm` they are true ones, in units of the finest axis: then a step across a thick slice may lie beyond the band,
and the surface have holes there. A voxel outside of the band is 0, which no distance is: 0 is "no point", as
in a radar grid. They are cached in 1 byte, as 127ths.

Arrays are (C, D, H, W): C channels, D H W depth height width. Version 1.0.
"""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from volumes.files import DataError

SLAB = 32                # slices at a time: memory beside the result is that of a few slabs
STEPS = 127              # of a distance in one byte
TOKEN = 8                # voxels on an edge of a token; same as sparse_tables.TOKEN
# HU at which `data.surface auto` puts the surface, by the name of the window.
LEVELS = {"none": -500.0, "lung": -500.0, "bone": 300.0, "soft_tissue": -150.0, "brain": 0.0}
# A sparse convolution took 11.5 us a point on one core, a dense one 1.75 us a voxel: above this share of the
# voxels the dense one is no slower. (It takes more memory all the same.)
PAYS_BELOW = 0.15


class Surface(NamedTuple):
    """What makes points of a scan, part of VoxelSettings."""
    low: float           # HU; inside lies above it,
    high: float          # and not above this one
    band: float          # to either side, in units of the metric
    smooth: float        # sigma of a Gaussian before the level, voxels; 0: none
    metric: str = "voxels"  # voxels (a step along each axis is 1) | mm (in units of the finest axis)
    more: tuple[float, ...] = ()  # HU of further surfaces, each a channel; inside lies above it


def smoothed(array: np.ndarray, sigma: float) -> np.ndarray:
    """(D, H, W) float32 after a Gaussian of `sigma` voxels, cut at 3 sigma; the border is repeated."""
    if sigma == 0:
        return array
    reach = math.ceil(3 * sigma)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in range(3):
        length = array.shape[axis]
        padded = np.pad(array, [(reach, reach) if a == axis else (0, 0) for a in range(3)], mode="edge")
        array = np.zeros_like(array)
        for k, weight in enumerate(weights):
            array += weight * along(padded, axis, k, k + length)
    return array


def along(array: np.ndarray, axis: int, first: int, end: int) -> np.ndarray:
    """array[first:end] on an axis."""
    return array[tuple(slice(first, end) if a == axis else slice(None) for a in range(array.ndim))]


def signed_distance(inside: np.ndarray, spacing: Sequence[float], band: float) -> np.ndarray:
    """inside (D, H, W) bool, spacing D H W -> (D, H, W) float32: distance / band where that lies in [-1, 1],
    else 0. All 0 where there is no surface.

    Memory beside the result follows SLAB, not the volume.
    """
    # Steps to look to either side on each axis: as far as a voxel within the band can be from the other side.
    finest = min(spacing)
    steps = [mm / finest for mm in spacing]
    most = band + 0.5
    reach = [math.floor(most / step + 1e-9) for step in steps]
    out = np.zeros(inside.shape, dtype=np.float32)
    for first in range(0, len(inside), SLAB):
        end = min(first + SLAB, len(inside))
        low, high = max(0, first - reach[0]), min(len(inside), end + reach[0])
        part, kept = inside[low:high], slice(first - low, end - low)
        for side, sign in ((part, -1), (~part, 1)):
            distance = np.sqrt(squared_distance(side, steps, reach, most)[kept].astype(np.float32)) - 0.5
            near = side[kept] & (distance <= band + 1e-6)
            out[first:end][near] = sign * distance[near] / band
    return out


def squared_distance(side: np.ndarray, steps: Sequence[float], reach: Sequence[int],
                     most: float) -> np.ndarray:
    """Squared distance of each voxel of `side` to the nearest one that is not of it, where that is at most
    `most`^2, else more.

    steps: size of a voxel on each axis in units of the result. d = min over k of d(x + k) + (k step)^2, axis
    after axis. In bytes where all distances are whole numbers that fit.
    """
    largest = max(reach)
    is_whole = all(step == 1 for step in steps) and 2 * largest ** 2 < 255 and most ** 2 < 255 - largest ** 2
    dtype = np.uint8 if is_whole else np.float32
    far = 255 - largest ** 2 if is_whole else np.float32(2 * most ** 2 + 1)
    found = np.where(side, dtype(far), dtype(0))
    for axis in range(3):
        before = found.copy()
        length = found.shape[axis]
        for k in range(1, min(reach[axis], length - 1) + 1):
            more = dtype((k * steps[axis]) ** 2)
            for here, there in ((slice(k, length), slice(0, length - k)),
                                (slice(0, length - k), slice(k, length))):
                target = along(found, axis, here.start, here.stop)
                source = along(before, axis, there.start, there.stop)
                np.minimum(target, source + more, out=target)
    return found


def surface_points(array: np.ndarray, spacing: Sequence[float], surface: Surface) -> np.ndarray:
    """HU (C, D, H, W) float32 -> distances (C L, D, H, W) of L surfaces in each channel.

    A voxel near one of several surfaces is a point of all: its distance from those beyond the band is -1 or
    1. Raises DataError where no voxel is near a surface.
    """
    bounds = [(surface.low, surface.high), *((low, math.inf) for low in surface.more)]
    found = np.empty((len(array) * len(bounds), *array.shape[1:]), dtype=np.float32)
    steps = spacing if surface.metric == "mm" else (1.0, 1.0, 1.0)
    sides = []
    for number, channel in enumerate(array):
        hu = smoothed(channel, surface.smooth)
        for place, (low, high) in enumerate(bounds, number * len(bounds)):
            sides.append((hu > low) & (hu <= high))
            found[place] = signed_distance(sides[-1], steps, surface.band)
    if len(found) > 1:
        is_point = (found != 0).any(0)
        for distance, inside in zip(found, sides):
            beyond = is_point & (distance == 0)
            distance[beyond] = np.where(inside[beyond], -1, 1)
    if not found.any():
        raise DataError(f"no surface at {surface.low:g} HU: all voxels lie on one side of it; set "
                        f"data.surface to another level")
    return found


def filled(distance: np.ndarray) -> np.ndarray:
    """Distances (C, D, H, W), 0 for "no point" -> the same with -1 deep inside and 1 far outside.

    Beyond the band the side is that of the nearest point to either hand along each axis, by majority of six
    votes; where no axis meets a point it is outside.
    """
    votes = np.zeros(distance.shape, dtype=np.int8)
    for axis in range(1, distance.ndim):
        for flipped in (False, True):
            line = np.moveaxis(np.flip(distance, axis) if flipped else distance, axis, -1)
            # The place of the last point at or before each voxel of a line; -1 before the first.
            place = np.where(line != 0, np.arange(line.shape[-1]), -1)
            place = np.maximum.accumulate(place, -1)
            side = np.sign(np.take_along_axis(line, np.maximum(place, 0), -1)) * (place >= 0)
            side = np.moveaxis(side.astype(np.int8), -1, axis)
            votes += np.flip(side, axis) if flipped else side
    return np.where(distance != 0, distance, np.where(votes < 0, np.float32(-1), np.float32(1)))


def as_bytes(distance: np.ndarray) -> np.ndarray:
    """[-1, 1] float32 -> int8 in 127ths. No distance becomes 0 unless it is."""
    steps = np.rint(distance * STEPS)
    tiny = (steps == 0) & (distance != 0)
    steps[tiny] = np.sign(distance[tiny])
    return steps.astype(np.int8)


def token_counts(grid: np.ndarray) -> np.ndarray:
    """A grid (C, D, H, W) of any type -> (d, h, w) int32: points in each token, the cells of 8^3 voxels.

    A point is a voxel of which a channel is not 0. The last tokens may reach beyond the grid.
    """
    is_point = (grid != 0).any(0)
    widths = [(0, -n % TOKEN) for n in is_point.shape]
    padded = np.pad(is_point, widths)
    d, h, w = (n // TOKEN for n in padded.shape)
    return padded.reshape(d, TOKEN, h, TOKEN, w, TOKEN).sum((1, 3, 5), dtype=np.int32)


# -------------------------------------------------------------------------------- boxes
def summed(counts: np.ndarray) -> np.ndarray:
    """(d, h, w) -> (d+1, h+1, w+1) int64 sums over all cells before a corner (Crow 1984)."""
    total = np.pad(counts.astype(np.int64), [(1, 0)] * 3)
    for axis in range(3):
        total = total.cumsum(axis)
    return total


def points_in(total: np.ndarray, first: Sequence[int], end: Sequence[int]) -> int:
    """Points in the box of tokens [first, end), by inclusion and exclusion of the corners of `summed`."""
    (d0, h0, w0), (d1, h1, w1) = first, end
    upper = total[d1, h1, w1] - total[d1, h0, w1] - total[d1, h1, w0] + total[d1, h0, w0]
    lower = total[d0, h1, w1] - total[d0, h0, w1] - total[d0, h1, w0] + total[d0, h0, w0]
    return int(upper - lower)


def choose_box(total: np.ndarray, most_tokens: Sequence[int], max_points: int | None,
               draw: Sequence[float]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A box of tokens [first, end) of at most `most_tokens` a side, and the largest of its shape and place
    that holds no more than max_points (at least one token). draw: three numbers in [0, 1), its place.

    Points are never drawn singly: a surface of which a tenth is left at random has no neighbours.
    """
    grid = [n - 1 for n in total.shape]
    whole = [min(n, most) for n, most in zip(grid, most_tokens)]
    first = [int(u * (n - size + 1)) for u, n, size in zip(draw, grid, whole)]

    def shrunk(share: float) -> tuple[tuple[int, ...], tuple[int, ...]]:
        # About a token of the box, drawn by the same numbers, so that smaller boxes lie in larger ones.
        sides = [max(1, math.floor(size * share + 1e-9)) for size in whole]
        start = [at + int(u * (size - side + 1))
                 for at, u, size, side in zip(first, draw[::-1], whole, sides)]
        return tuple(start), tuple(a + b for a, b in zip(start, sides))
    if max_points is None:
        return shrunk(1.0)
    # The shares at which a side loses a token, largest first; the first that holds few enough.
    shares = sorted({k / size for size in whole for k in range(1, size + 1)}, reverse=True)
    for share in shares:
        box = shrunk(share)
        if points_in(total, *box) <= max_points:
            return box
    return shrunk(0.0)
