"""How samples compare with real volumes: KID, diversity, copies of training cases, tissue.

Numbers in, numbers out; training/sample_report.py reads the files and shows them.

KID is the unbiased squared maximum mean discrepancy with k(x, y) = (x y / d + 1)^3 (arXiv:1801.01401, Eqs. 3
and 4), here of features over the root of the real ones' mean square, which gives all one unit. A sample is a
copy where it lies nearer to a training case than new patients do (arXiv:2301.13188 and 2402.01054 in kind).

Shapes: N volumes, F features; a trait is of one volume. Version 0.1 (2026-11).
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metrics

COARSE, MIDDLE = 16, 64                       # edges of reduced volumes: for distances, for MS-SSIM
BINS = 200                                    # of the histogram of [-1, 1]
DRAWS = 200                                   # of subsets, for intervals
PAIRS = 60                                    # of which MS-SSIM is averaged
TISSUES = {"air": (-math.inf, -900.0), "lung": (-900.0, -500.0), "fat": (-150.0, -30.0),
           "soft": (-30.0, 100.0), "bone": (150.0, math.inf)}    # HU


class Traits(NamedTuple):
    """What is kept of one volume, so that the volumes need not stay."""
    name: str
    features: np.ndarray                      # (F,) float64
    coarse: np.ndarray                        # (COARSE^3 C,) float64
    middle: Tensor                            # (1, C, d, h, w), at most MIDDLE voxels an edge
    histogram: np.ndarray                     # (BINS,) shares of [-1, 1], ends included
    energy: float                             # mean squared difference of neighbours


@torch.no_grad()
def traits(name: str, volume: np.ndarray, network: nn.Module, middle: Sequence[int]) -> Traits:
    """volume (C, D, H, W) normalised. middle: the size that all are reduced to for MS-SSIM."""
    x = torch.from_numpy(volume)[None].float()
    pooled = []
    for level in network(x):                                     # (C, c, d, h, w)
        rows = level.flatten(2).cpu().double()
        pooled += [rows.mean(2).flatten(), rows.std(2, unbiased=False).flatten()]
    # A grid that does not divide the size takes voxels twice at its borders, all volumes alike.
    coarse = F.adaptive_avg_pool3d(x, COARSE).flatten().cpu().double().numpy()
    reduced = F.adaptive_avg_pool3d(x, tuple(middle))
    counts, _ = np.histogram(np.clip(volume, -1, 1), BINS, (-1, 1))
    energy = sum(float(x.diff(dim=axis).square().mean()) for axis in (2, 3, 4) if x.shape[axis] > 1)
    return Traits(name, torch.cat(pooled).numpy(), coarse, reduced, counts / counts.sum(), energy)


# -------------------------------------------------------------------------------- KID

def kid(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased MMD^2 of two sets of features (N, F), (M, F), each of at least two."""
    n, m = len(x), len(y)
    every = kernel(np.concatenate([x, y]))
    return of_kernel(every, np.arange(n), np.arange(n, n + m))


def kernel(x: np.ndarray) -> np.ndarray:
    return (x @ x.T / x.shape[1] + 1) ** 3


def of_kernel(every: np.ndarray, a: np.ndarray, b: np.ndarray) -> float:
    """Eq. 4 over rows a and b of a kernel matrix: no pair of a row with itself."""
    n, m = len(a), len(b)
    aa, bb, ab = every[np.ix_(a, a)], every[np.ix_(b, b)], every[np.ix_(a, b)]
    same_a = (aa.sum() - np.trace(aa)) / (n * (n - 1))
    same_b = (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(same_a + same_b - 2 * ab.mean())


def kid_beside_real(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> dict:
    """KID of all samples against all real ones; and the mean and the 2.5 and 97.5 percentiles over subsets of
    equal size, beside those of disjoint halves of the real ones. Features (N, F) and (M, F).
    """
    # Not by the standard deviation: a feature that hardly varies among real volumes would count for all.
    scale = np.sqrt(np.square(real).mean(0))
    every = kernel(np.concatenate([samples, real]) / np.where(scale > 0, scale, 1.0))
    n, m = len(samples), len(real)
    result = {"value": of_kernel(every, np.arange(n), np.arange(n, n + m))}
    size = min(n, m // 2)
    result["subset"] = size
    if size < 2:
        return result
    rng, made, halves = np.random.default_rng(seed), [], []
    for _ in range(DRAWS):
        chosen = rng.choice(n, size, replace=False)
        order = n + rng.permutation(m)
        made.append(of_kernel(every, chosen, order[:size]))
        halves.append(of_kernel(every, order[:size], order[size:2 * size]))
    return result | {"samples": spread(made), "real": spread(halves)}


def frechet_beside_real(samples: np.ndarray, real: np.ndarray, seed: int = 0) -> dict:
    """Frechet distance (arXiv:1706.08500, Eq. 6) of all samples to all real ones, and of two halves of the
    real ones, of features as in KID. Empty where there are not more than 2 F of each, since the distance is
    mostly chance then; so `real` needs more than 2 F a half.
    """
    n, m, f = len(samples), len(real), samples.shape[1]
    if min(n, m) <= 2 * f:
        return {}
    scale = np.sqrt(np.square(real).mean(0))
    scale = np.where(scale > 0, scale, 1.0)
    samples, real = samples / scale, real / scale
    found = {"value": frechet(samples, real)}
    if m // 2 > 2 * f:
        order = np.random.default_rng(seed).permutation(m)
        found["real"] = frechet(real[order[:m // 2]], real[order[m // 2:2 * (m // 2)]])
    return found


def frechet(x: np.ndarray, y: np.ndarray) -> float:
    """|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), of shrunk covariances, in float64."""
    s_x, s_y = shrunk_covariance(x), shrunk_covariance(y)
    # The roots of the eigenvalues of S_x S_y are those of the symmetric S_x^(1/2) S_y S_x^(1/2).
    values, vectors = np.linalg.eigh(s_x)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    both = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ s_y @ root), 0)).sum()
    apart = np.square(x.mean(0) - y.mean(0)).sum()
    return float(apart + np.trace(s_x) + np.trace(s_y) - 2 * both)


def shrunk_covariance(x: np.ndarray) -> np.ndarray:
    """(N, F) -> (F, F): the covariance drawn towards a multiple of the unit matrix, by its share of noise
    (Ledoit and Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices").
    """
    n, f = x.shape
    x = x - x.mean(0)
    covariance = x.T @ x / n
    target = np.trace(covariance) / f * np.eye(f)
    apart = np.square(covariance - target).sum()
    # The mean of |x_k x_k^T - S|^2, over n: how far a covariance of n volumes is from the true one.
    noise = (np.square(np.square(x).sum(1)).mean() - np.square(covariance).sum()) / n
    share = min(noise / apart, 1.0) if apart > 0 else 0.0
    return share * target + (1 - share) * covariance


def spread(values: Sequence[float]) -> dict:
    low, high = np.percentile(values, (2.5, 97.5))
    return {"mean": float(np.mean(values)), "low": float(low), "high": float(high)}


# -------------------------------------------------------------------------------- diversity

def pairwise_ms_ssim(volumes: Sequence[Tensor], seed: int = 0) -> float:
    """The mean MS-SSIM (metrics.ms_ssim, 3D) of PAIRS pairs of different ones, at most.

    The less it is, the more they differ from one another; nan of fewer than two.
    """
    pairs = list(itertools.combinations(range(len(volumes)), 2))
    if not pairs:
        return math.nan
    order = np.random.default_rng(seed).permutation(len(pairs))[:PAIRS]
    found = [float(metrics.ms_ssim(volumes[pairs[k][0]], volumes[pairs[k][1]])) for k in order]
    return sum(found) / len(found)


# -------------------------------------------------------------------------------- copies

class Nearest(NamedTuple):
    distance: np.ndarray                      # (N,), to the nearest training case: root of mean squares
    ratio: np.ndarray                         # (N,), to that of the second nearest
    index: np.ndarray                         # (N,), which one


def nearest(x: np.ndarray, training: np.ndarray, leave_one_out: bool = False) -> Nearest:
    """x (N, V), training (M, V). leave_one_out: x are the training cases, none its own nearest."""
    far = np.sqrt(np.stack([np.square(training - row).mean(1) for row in x]))
    if leave_one_out:
        np.fill_diagonal(far, np.inf)
    order = np.argsort(far, 1, kind="stable")
    first = np.take_along_axis(far, order, 1)[:, :2]
    ratio = first[:, 0] / np.maximum(first[:, -1], 1e-12)
    return Nearest(first[:, 0], ratio, order[:, 0])


def memorisation(samples: Nearest, new: Nearest) -> dict:
    """auc: the chance that a sample is nearer to its training case than a new case to its own; .5 is alike,
    1 is copies. suspicious: share of samples whose ratio of distances lies below the 1st percentile of the
    new cases'.
    """
    below = (samples.distance[:, None] < new.distance[None]).mean()
    equal = (samples.distance[:, None] == new.distance[None]).mean()
    bound = np.percentile(new.ratio, 1)
    return {"auc": float(below + equal / 2), "suspicious": float((samples.ratio < bound).mean()),
            "median_distance": float(np.median(samples.distance)),
            "median_distance_of_new": float(np.median(new.distance))}


# -------------------------------------------------------------------------------- tissue

def tissue(samples: Sequence[Traits], real: Sequence[Traits], low: float, high: float, is_ct: bool) -> dict:
    """histogram_w1: the first Wasserstein distance of the mean histograms, in stored units (HU). gradient
    energy of samples / that of real ones. Of CT the share of each tissue's voxels, of samples and real ones.

    low, high: stored values that are -1 and 1.
    """
    made, true = (np.mean([each.histogram for each in some], 0) for some in (samples, real))
    width = (high - low) / BINS
    found = {
        "histogram_w1": float(np.abs(np.cumsum(made - true)).sum() * width),
        "gradient_energy": ratio_of([each.energy for each in samples], [each.energy for each in real]),
    }
    if is_ct:
        middles = low + (np.arange(BINS) + 0.5) * width
        found["tissues"] = {}
        for name, (least, most) in TISSUES.items():
            inside = (middles >= least) & (middles < most)
            found["tissues"][name] = {"samples": float(made[inside].sum()), "real": float(true[inside].sum())}
    return found


def ratio_of(a: Sequence[float], b: Sequence[float]) -> float:
    return sum(a) / len(a) / max(sum(b) / len(b), 1e-12)
