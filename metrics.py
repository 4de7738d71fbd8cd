"""What segmentations and reconstructions are measured by, beside Dice and SSIM: distances of surfaces in mm,
structural similarity over scales.

    scores = surface_scores(found, label, classes=4, spacing=(3.0, 0.8, 0.8), tolerance=2.0)
    scores.hd95, scores.surface_dice          # (4,) each, one figure a class
    ms_ssim(recon, target)                    # () in [0, 1]

Papers: Hausdorff distance at a percentile (Huttenlocher et al. 1993; 95 % as in the BraTS challenge); surface
Dice at a tolerance (Nikolov et al., arXiv:1809.04430, on surface voxels); exact Euclidean distances axis by
axis (Felzenszwalb and Huttenlocher 2012); MS-SSIM (Wang et al. 2003, Eq. 7). Surface figures equal those of
MONAI 1.6 (compute_hausdorff_distance with percentile 95, compute_surface_dice without subvoxels).

Shapes: B batch, C channels, K classes, D H W depth height width; spacing is mm, same order.
Needs torch and nothing else. Version 0.1 (2026-11).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_SAMPLES = 512               # surface voxels by which the search for the nearest one is bounded
SLAB_VOXELS = 2**22              # voxels that are filtered at a time
# Of MS-SSIM's five scales, the finest first (Wang et al. 2003, Section 3.2).
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
KERNEL = 11                      # voxels of SSIM's Gaussian window along an axis


# ------------------------------------------------------------------------------------------------ surfaces

class SurfaceScores(NamedTuple):
    """One figure a class, (K,) float64 each.

    A class that neither of the two volumes has is nan in both figures. One that only one of them has is
    infinite in hd95 and 0 in surface_dice: it was missed, or made up.
    """
    hd95: Tensor                 # mm: the larger of the two directions' 95th percentiles
    surface_dice: Tensor         # share of both surfaces' voxels that lie within the tolerance of the other
    within: Tensor               # what it is made of: surface voxels within the tolerance, of both ...
    total: Tensor                # ... and all of them; add both up over volumes to pool the share


@torch.no_grad()
def surface_scores(found: Tensor, label: Tensor, classes: int, spacing: Sequence[float],
                   tolerance: float = 2.0, ignore_index: int | None = None,
                   percentile: float = 95.0, background: bool = False) -> SurfaceScores:
    """Distances between the surfaces of each class in found and in label, both (D, H, W) of integers.

    spacing, tolerance: mm. Voxels whose label is ignore_index belong to no class in either of the two.
    background: class 0 too, which else counts as one that is not there.
    Raises ValueError for shapes that differ, and for a spacing or tolerance that cannot be meant.
    """
    if found.shape != label.shape or found.dim() != 3:
        raise ValueError(f"surface_scores: needs two volumes of one shape (D, H, W), got "
                         f"{tuple(found.shape)} and {tuple(label.shape)}")
    if len(spacing) != 3 or not all(0 < mm < math.inf for mm in spacing):
        raise ValueError(f"surface_scores: spacing is three sizes in mm above 0, got {tuple(spacing)}")
    if not tolerance >= 0:
        raise ValueError(f"surface_scores: tolerance is a number of mm of 0 or more, got {tolerance}")
    hd95 = torch.full((classes,), math.nan, dtype=torch.float64)
    within, total = torch.zeros(2, classes, dtype=torch.int64)
    valid = None if ignore_index is None else label != ignore_index

    for k in range(0 if background else 1, classes):
        masks = [volume == k for volume in (found, label)]
        if valid is not None:
            masks = [mask & valid for mask in masks]
        directions = surface_distances(*masks, spacing)
        reach = tolerance * (1 + 1e-5)               # a distance equal to it is within, whatever its rounding
        within[k] = sum(int((d <= reach).sum()) for d in directions)
        total[k] = sum(len(d) for d in directions)
        if total[k]:
            hd95[k] = max(quantile(d, percentile / 100) for d in directions if len(d))
    return SurfaceScores(hd95, within.cpu().double() / total.cpu(), within, total)


def surface_distances(a: Tensor, b: Tensor, spacing: Sequence[float]) -> tuple[Tensor, Tensor]:
    """mm from each surface voxel of mask a to the nearest of b's, and from each of b's to a's; (n,) float32.

    a, b (D, H, W) bool. Infinite where the other mask is empty; no numbers where the mask itself is.
    """
    # Both surfaces lie in the box around the two masks, and so do the nearest voxels.
    box = []
    for axis in range(3):
        others = [other for other in range(3) if other != axis]
        taken = (a | b).amax(others).nonzero()
        if not len(taken):
            return torch.zeros(0), torch.zeros(0)
        box.append(slice(int(taken[0]), int(taken[-1]) + 1))
    # Where an axis of the volume has one voxel, the volume is a picture, whose contours count.
    flat = [n == 1 for n in a.shape]
    edges_a, edges_b = (surface(mask[tuple(box)], flat) for mask in (a, b))
    return nearest(edges_a, edges_b, spacing), nearest(edges_b, edges_a, spacing)


def surface(mask: Tensor, flat: Sequence[bool] = (False, False, False)) -> Tensor:
    """Voxels of a mask (D, H, W) with one of their 6 neighbours outside of it; so is all beyond the border.

    flat: axes along which a voxel has no neighbours.
    """
    padded = F.pad(mask, (1, 1, 1, 1, 1, 1))
    inside = mask.clone()
    for axis in range(3):
        if flat[axis]:
            continue
        for shift in (0, 2):
            at = [slice(1, -1)] * 3
            at[axis] = slice(shift, shift + mask.shape[axis])
            inside &= padded[tuple(at)]
    return mask & ~inside


def nearest(queries: Tensor, targets: Tensor, spacing: Sequence[float]) -> Tensor:
    """mm from each voxel of queries to the nearest of targets, both (D, H, W) bool -> (n,) float32, exact.

    In the order of queries.nonzero(). The squared distance is a sum over the axes, so the nearest voxel of a
    line, of a plane and of the volume follow from one another: f(x) = min_y f'(y) + |x - y|^2 along one axis.
    """
    at = queries.nonzero()                           # (n, 3)
    if not len(at) or not targets.any():
        return torch.full((len(at),), math.inf, device=queries.device)
    mm = torch.tensor(spacing, dtype=torch.float32, device=queries.device)

    # First a bound that no query's distance exceeds: some of the targets are at most so far away.
    some = targets.nonzero()
    some = some[:: max(1, len(some) // MOST_SAMPLES)]
    bound = 0.0
    exact = "donot_use_mm_for_euclid_dist"
    for part in at.split(2**14):
        distances = torch.cdist(part * mm, some * mm, compute_mode=exact)
        bound = max(bound, float(distances.amin(1).max()))
    bound = (bound * 1.001) ** 2 + 1e-6

    # Then along W: the last target on the left and the first one on the right of each voxel. Of the lines
    # those with targets count, and of their voxels those next to which there are queries.
    d, h, w = at.unbind(1)
    depths, rows = (slice(int(x.min()), int(x.max()) + 1) for x in targets.nonzero().unbind(1)[:2])
    low_h, high_h, low_w, high_w = int(h.min()), int(h.max()) + 1, int(w.min()), int(w.max()) + 1
    place = torch.arange(targets.shape[2], dtype=torch.float32, device=targets.device)
    lines = targets[depths, rows]
    left = place.where(lines, -math.inf).cummax(2).values[:, :, low_w:high_w]
    right = place.where(lines, math.inf).flip(2).cummin(2).values.flip(2)[:, :, low_w:high_w]
    place = place[low_w:high_w]
    lines = (torch.minimum(place - left, right - place) * mm[2]).square()

    # Then along H, of each row the voxels that lie no further from it than the bound.
    plane = torch.full((len(lines), high_h - low_h, high_w - low_w), math.inf, device=targets.device)
    reach = int(bound ** 0.5 / spacing[1]) + 1
    for row in range(rows.start, rows.stop):
        first, last = max(low_h, row - reach), min(high_h, row + reach + 1)
        if first >= last:
            continue
        away = ((torch.arange(first, last, device=mm.device) - row) * mm[1]).square()
        part = plane[:, first - low_h:last - low_h]
        torch.minimum(part, lines[:, row - rows.start, None] + away[:, None], out=part)

    # Then along D, for the queries alone.
    best = torch.full((len(at),), math.inf, device=targets.device)
    h, w = h - low_h, w - low_w
    for number, depth in enumerate(range(depths.start, depths.stop)):
        best = torch.minimum(best, plane[number, h, w] + ((d - depth) * mm[0]).square())
    return best.sqrt()


def quantile(values: Tensor, share: float) -> float:
    """Linear between the two values around it, as torch.quantile, which takes 16 million values at most."""
    ordered = values.cpu().double().sort().values
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    a, b = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
    return a if a == b else a + (place - low) * (b - a)


# ------------------------------------------------------------------------------------------------ MS-SSIM

@torch.no_grad()
def ms_ssim(recon: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity over scales (Wang et al. 2003, Eq. 7) in three dimensions.

    recon, target (B, C, D, H, W) -> () float32 or wider in [0, 1], the mean over B and C. With cs_j the mean
    of contrast times structure at scale j and S the mean SSIM of the coarsest: prod_j cs_j^w_j S^w_M, each
    clamped at 0. Deviation, for volumes with fewer voxels than five scales need (160 along each axis): the
    next scale averages pairs along every axis of which at least 11 voxels are left, and there is none where
    no axis has; the weights of those that there are add up to 1. Along an axis shorter than 11 voxels the
    window is the longest odd length that fits.
    """
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"ms_ssim: needs two tensors of one shape (B, C, D, H, W), got "
                         f"{tuple(recon.shape)} and {tuple(target.shape)}")
    dtype = torch.promote_types(recon.dtype, torch.float32)
    pairs = torch.stack([recon, target], 2).to(dtype).flatten(0, 1)      # (B C, 2, D, H, W)
    found = []                                                           # a scale: (B C, 2), cs and SSIM
    while True:
        found.append(torch.stack([similarity(pair, data_range) for pair in pairs]))
        factor = [2 if n // 2 >= KERNEL else 1 for n in pairs.shape[2:]]
        if len(found) == len(SCALE_WEIGHTS) or max(factor) == 1:
            break
        pairs = F.avg_pool3d(pairs, factor)
    weights = torch.tensor(SCALE_WEIGHTS[:len(found)], dtype=dtype, device=recon.device)
    weights = weights / weights.sum()
    parts = torch.stack([cs for cs, _ in (scale.unbind(1) for scale in found)])  # (scales, B C)
    parts[-1] = found[-1][:, 1]
    return (parts.clamp_min(0) ** weights[:, None]).prod(0).mean()


def similarity(pair: Tensor, data_range: float) -> Tensor:
    """pair (2, D, H, W) -> (2,): the means of contrast times structure, and of SSIM, where the whole window
    lies inside; in slabs along D."""
    size = pair.shape[1:]
    kernels = [_gaussian(min(KERNEL, n - 1 + n % 2), pair.dtype, pair.device) for n in size]
    halo = kernels[0].numel() - 1
    depth, slices = size[0] - halo, max(1, SLAB_VOXELS // max(1, pair[0, 0].numel()))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    sums, count = pair.new_zeros(2), 0
    for start in range(0, depth, slices):
        x, y = pair[:, start:min(start + slices, depth) + halo]
        moments = torch.stack([x, y, x * x, y * y, x * y])[:, None]      # (5, 1, D, H, W)
        with torch.autocast(x.device.type, enabled=False):               # variances are differences
            for axis, kernel in enumerate(kernels, 2):
                moments = F.conv3d(moments, kernel.view([-1 if i == axis else 1 for i in range(5)]))
        mx, my, xx, yy, xy = moments.unbind(0)
        cs = (2 * (xy - mx * my) + c2) / (xx - mx * mx + yy - my * my + c2)
        luminance = (2 * mx * my + c1) / (mx * mx + my * my + c1)
        sums += torch.stack([cs.sum(), (luminance * cs).sum()])
        count += cs.numel()
    return sums / count


# same as losses._gaussian
def _gaussian(length: int, dtype: torch.dtype, device: torch.device, sigma: float = 1.5) -> Tensor:
    """A Gaussian kernel (length,) whose elements add up to 1."""
    x = torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2
    kernel = torch.exp(-x.square() / (2 * sigma ** 2))
    return kernel / kernel.sum()
