"""What a training crop may be turned and changed by: quarter turns, gamma, a bias field, blur, a coarser
resolution, noise.

    x = turn(x, (1, 2), 3)                                    # three quarter turns in the plane of H and W
    x = change_intensities(x, Strengths(gamma=(0.7, 1.5), noise=0.05), seed=0, background=-1.0)

Which changes: those of nnU-Net (doi:10.1038/s41592-020-01008-z, Supplementary Note 4) and of MAISI's random
augmentation (NV-Generate-CTMR), whose Gibbs noise, a cut in k-space, is the blur here. What is drawn is a
function of the seed. Intensities never touch labels, turns move both exactly.

Shapes: C channels, D H W depth height width. Intensities as in data.py: what is background, -1 or 0, and the
scale's end, 1, are kept by gamma; a bias field and contrast keep the background.
Needs torch and nothing else. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

DEGREE = 3                       # of the bias field's polynomials; MONAI's RandBiasField has the same
CHANGES = ("bias_field", "gamma", "blur", "low_resolution", "noise")   # in the order that they are made in


# --------------------------------------------------------------------------------------------------- turns

def choose_turn(planes: str, size: Sequence[int], first: float, second: float) -> tuple[tuple[int, int], int]:
    """A plane (two of the axes 0, 1, 2 of D, H, W) and a number of quarter turns in it, 0 to 3.

    planes: `none`, or letters of axes: HW for turns in plane, DHW for those in all three planes.
    size: D, H, W of the crop. An axis of one voxel, as pictures have, takes no part. first, second: draws
    in [0, 1).
    """
    axes = [axis for axis, name in enumerate("DHW") if name in planes.upper() and size[axis] > 1]
    if planes == "none" or len(axes) < 2:
        return (1, 2), 0
    pairs = [(a, b) for a in axes for b in axes if a < b]
    return pairs[int(first * len(pairs))], int(second * 4)


def size_before(size: Sequence[int], plane: tuple[int, int], quarters: int) -> tuple[int, ...]:
    """D, H, W of what becomes `size` by the turn: an odd number of quarters swaps the plane's two extents."""
    size = list(size)
    if quarters % 2:
        a, b = plane
        size[a], size[b] = size[b], size[a]
    return tuple(size)


def turn(x: Tensor, plane: tuple[int, int], quarters: int) -> Tensor:
    """(..., D, H, W) turned in a plane of the last three axes, from its first axis to its second; exact.

    Without a turn anything is as it was, also what has no such axes.
    """
    if quarters % 4 == 0:
        return x
    return torch.rot90(x, quarters, [axis - 3 for axis in plane]).contiguous()


# --------------------------------------------------------------------------------------------- intensities

@dataclass(frozen=True)
class Strengths:
    """How far each change may go; by default nowhere. A config that has these fields goes in as `of(cfg)`."""
    gamma: tuple[float, float] = (1.0, 1.0)  # least and largest exponent, drawn log-uniformly
    noise: float = 0.0                       # largest standard deviation of Gaussian noise, of [-1, 1]
    blur: float = 0.0                        # largest standard deviation of a Gaussian blur, voxels
    low_resolution: float = 1.0              # largest size of a voxel, in voxels of the crop
    bias_field: float = 0.0                  # largest coefficient of the bias field's logarithm
    augment_share: float = 1.0               # of the crops that each change is made to

    @classmethod
    def of(cls, cfg: object) -> Strengths:
        return cls(**{field.name: getattr(cfg, field.name) for field in dataclasses.fields(cls)})

    @property
    def is_on(self) -> bool:
        changes = self.gamma != (1.0, 1.0) or self.low_resolution > 1
        return self.augment_share > 0 and (changes or max(self.noise, self.blur, self.bias_field) > 0)


def change_intensities(x: Tensor, strengths: Strengths, seed: int,
                       background: float = -1.0) -> Tensor:
    """x (C, D, H, W) -> the same shape, not clipped. All channels are changed alike, noise apart.

    Each change has draws of its own, so that one that is off moves none of the others. Voxels that are
    exactly background, such as padding, stay so but for blur and coarser voxels, which reach into them.
    """
    generator = torch.Generator().manual_seed(seed)
    # First all draws: whether and how far for each change, then the field's coefficients. Noise comes last.
    draws = dict(zip(CHANGES, torch.rand(len(CHANGES), 2, generator=generator).tolist()))
    coefficients = torch.rand(len(field_degrees()), generator=generator) * 2 - 1
    amount = {}
    for name, (whether, how_far) in draws.items():
        amount[name] = how_far if whether < strengths.augment_share else None

    # Then the changes, in the order in which a scanner makes them: noise is not blurred.
    if amount["bias_field"] is not None and strengths.bias_field > 0:
        field = bias_field(x.shape[1:], coefficients * strengths.bias_field)
        x = (x - background) * field + background
    if amount["gamma"] is not None and strengths.gamma != (1.0, 1.0):
        low, high = map(math.log, strengths.gamma)
        x = apply_gamma(x, math.exp(low + amount["gamma"] * (high - low)), background)
    if amount["blur"] is not None and strengths.blur > 0:
        x = blurred(x, amount["blur"] * strengths.blur)
    if amount["low_resolution"] is not None and strengths.low_resolution > 1:
        x = coarser(x, 1 + amount["low_resolution"] * (strengths.low_resolution - 1))
    if amount["noise"] is not None and strengths.noise > 0:
        noise = torch.randn(x.shape, generator=generator) * (amount["noise"] * strengths.noise)
        x = torch.where(x == background, x, x + noise)
    return x


def apply_gamma(x: Tensor, gamma: float, background: float) -> Tensor:
    """sign(v) |v|^gamma of v = (x - background) / (1 - background), and back: keeps background and 1."""
    span = 1 - background
    v = (x - background) / span
    return v.sign() * v.abs() ** gamma * span + background


def field_degrees() -> list[tuple[int, int, int]]:
    """Degrees along D, H, W of the bias field's terms; the constant is left out, since it is contrast."""
    upto = range(DEGREE + 1)
    return [(i, j, k) for i in upto for j in upto for k in upto if 1 <= i + j + k <= DEGREE]


def bias_field(size: Sequence[int], coefficients: Tensor) -> Tensor:
    """exp(sum c_ijk P_i(d) P_j(h) P_k(w)), of Legendre polynomials P over [-1, 1] along each axis.

    -> (D, H, W). A smooth field, as a receiver coil's (Van Leemput et al. 1999). coefficients: one for each
    of field_degrees().
    """
    polynomials = []
    for n in size:
        t = torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1)
        terms = [torch.ones(n), t]
        for m in range(2, DEGREE + 1):               # m P_m = (2 m - 1) t P_(m-1) - (m - 1) P_(m-2)
            terms.append(((2 * m - 1) * t * terms[-1] - (m - 1) * terms[-2]) / m)
        polynomials.append(torch.stack(terms))       # (DEGREE + 1, n)
    table = torch.zeros([DEGREE + 1] * 3)
    for (i, j, k), value in zip(field_degrees(), coefficients.tolist()):
        table[i, j, k] = value
    d, h, w = polynomials
    return torch.einsum("ijk,id,jh,kw->dhw", table, d, h, w).exp()


def blurred(x: Tensor, sigma: float) -> Tensor:
    """Gaussian of sigma voxels along each axis, cut at 3 sigma; beyond the border the last voxel goes on."""
    reach = math.ceil(3 * sigma)
    if reach == 0:
        return x
    at = torch.arange(-reach, reach + 1, dtype=x.dtype)
    kernel = torch.exp(-at.square() / (2 * sigma ** 2))
    kernel = kernel / kernel.sum()
    x = x[:, None]                                   # (C, 1, D, H, W)
    for axis in range(2, 5):
        if x.shape[axis] == 1:
            continue
        pad = [0] * 6
        pad[2 * (4 - axis):2 * (4 - axis) + 2] = [reach, reach]
        shape = [-1 if i == axis else 1 for i in range(5)]
        x = F.conv3d(F.pad(x, pad, mode="replicate"), kernel.view(shape))
    return x[:, 0]


def coarser(x: Tensor, factor: float) -> Tensor:
    """As a scan of voxels `factor` times as large: means over them, then linear between them."""
    size = [max(1, round(n / factor)) for n in x.shape[1:]]
    small = F.interpolate(x[None], size, mode="area")
    return F.interpolate(small, x.shape[1:], mode="trilinear", align_corners=False)[0]
