"""Losses and image metrics for 3D autoencoders on volumes. Needs torch and nothing else.

    loss = reconstruction_loss(recon, x, "l1") + 1e-6 * kl_loss(mu, logvar)
    psnr(recon, x, data_range=2), ssim(recon, x, data_range=2)

Everything is computed in float32 or wider, slab by slab, so that no full-size float32 copy of a 16-bit volume exists: the only full-size
tensor that a reconstruction loss adds is its gradient, in the dtype of the reconstruction.

Shapes: B batch, C channels, D H W depth height width, Z latent channels. Intensities are in [-1, 1], so data_range is 2.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RECONSTRUCTION = {"l1": (1.0, 0.0), "mse": (0.0, 1.0), "l1_l2": (0.5, 0.5)}  # shares of |difference| and of its square
SLAB_VOXELS = 1 << 21                                            # elements widened to float32 at a time: 8 MiB a temporary


@dataclass
class LossConfig:
    """The training criterion: reconstruction + kl_weight * KL."""
    recon: str = "l1"                                            # l1 | mse | l1_l2 (half and half)
    kl_weight: float = 1e-6                                      # KL is a mean over latent elements, so it holds for any crop size
    channel_weights: tuple[float, ...] | None = None             # one factor per channel of the data; none: all 1
    foreground_weight: float = 1.0                               # factor for voxels that are not background (sparse volumes: 10 to 100)
    background: float = -1.0                                     # intensity of empty voxels; train.py sets it from the data

    def __post_init__(self):
        if self.recon not in RECONSTRUCTION:
            raise ValueError(f"loss.recon must be one of {', '.join(RECONSTRUCTION)}, got {self.recon!r}")
        if not self.kl_weight >= 0:
            raise ValueError(f"loss.kl_weight must be 0 or more, got {self.kl_weight}")
        if not self.foreground_weight > 0:
            raise ValueError(f"loss.foreground_weight must be positive, got {self.foreground_weight}")
        if self.channel_weights is not None:
            self.channel_weights = tuple(self.channel_weights)
            if not self.channel_weights or min(self.channel_weights) < 0:
                raise ValueError(f"loss.channel_weights needs one factor of 0 or more per channel, got {self.channel_weights}")


def reconstruction_loss(recon: Tensor, target: Tensor, kind: str = "l1", channel_weights: Sequence[float] | None = None,
                        foreground_weight: float = 1.0, background: float = -1.0) -> Tensor:
    """Mean over elements of weight * |recon - target|, its square, or half of each.

    recon, target (B, C, D, H, W) -> () float32 or wider. The weight is the channel's factor, times foreground_weight at voxels where
    any channel of the target is further than 0.05 from `background` (25 HU of the default CT range are 0.025). Weights are factors:
    the mean is not divided by them, so that micro-batches add up to a batch. The gradient reaches recon only.
    Raises ValueError for an unknown kind, shapes that differ, or a wrong number of channel weights.
    """
    if kind not in RECONSTRUCTION:
        raise ValueError(f"reconstruction loss must be one of {', '.join(RECONSTRUCTION)}, got {kind!r}")
    check_pair("reconstruction_loss", recon, target)
    if channel_weights is not None and len(channel_weights) != recon.shape[1]:
        raise ValueError(f"loss.channel_weights has {len(channel_weights)} factors, the data has {recon.shape[1]} channels; "
                         f"give one for each")
    return _Reconstruction.apply(recon, target, RECONSTRUCTION[kind], channel_weights, foreground_weight, background)


class _Reconstruction(torch.autograd.Function):
    """Keeps recon and target, which live anyway, and nothing else; backward writes the gradient slab by slab in recon's dtype.

    Plain autograd keeps float32 difference, sign and product besides: 12 bytes a voxel more.
    """
    @staticmethod
    def forward(ctx, recon, target, shares, channel_weights, foreground_weight, background):
        ctx.save_for_backward(recon, target)
        ctx.shares, ctx.weighting = shares, (channel_weights, foreground_weight, background)
        total = torch.zeros((), dtype=torch.promote_types(recon.dtype, torch.float32), device=recon.device)
        for part in slabs(recon):
            difference, weight = weighted_difference(recon[part], target[part], *ctx.weighting)
            error = shares[0] * difference.abs() + shares[1] * difference.square()
            total += (error * weight).sum()
        return total / recon.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        recon, target = ctx.saved_tensors
        grad = torch.empty_like(recon)
        for part in slabs(recon):
            difference, weight = weighted_difference(recon[part], target[part], *ctx.weighting)
            slope = ctx.shares[0] * difference.sign() + 2 * ctx.shares[1] * difference
            grad[part] = slope * (weight * (grad_loss / recon.numel()))
        return grad, None, None, None, None, None


def weighted_difference(recon: Tensor, target: Tensor, channel_weights: Sequence[float] | None, foreground_weight: float,
                        background: float) -> tuple[Tensor, Tensor]:
    """recon - target in float32 or wider, and the weight of each element as a broadcastable tensor."""
    dtype = torch.promote_types(recon.dtype, torch.float32)
    target = target.to(dtype)
    weight = torch.ones((), dtype=dtype, device=recon.device)
    if channel_weights is not None:
        weight = torch.tensor(channel_weights, dtype=dtype, device=recon.device).view(1, -1, 1, 1, 1)
    if foreground_weight != 1:
        foreground = ((target - background).abs() > 0.05).any(dim=1, keepdim=True)
        weight = weight * torch.where(foreground, foreground_weight, 1.0)
    return recon.to(dtype) - target, weight


def slabs(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut (B, C, D, H, W) along B and D into parts of about SLAB_VOXELS elements."""
    depth = max(1, SLAB_VOXELS // max(1, x[0, :, 0].numel()))
    for b in range(x.shape[0]):
        for d in range(0, x.shape[2], depth):
            yield slice(b, b + 1), slice(None), slice(d, d + depth)


def kl_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), the mean over latent elements (arXiv:1312.6114, App. B, which sums).

    mu, logvar (B, Z, d, h, w) -> () float32 or wider, in nats per latent element: the same for a crop and for a whole volume.
    """
    with torch.autocast(mu.device.type, enabled=False):          # float32 island: exp and the square overflow in float16
        dtype = torch.promote_types(mu.dtype, torch.float32)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


def psnr(recon: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio in dB over all elements: 10 log10(data_range^2 / MSE); (B, C, D, H, W) -> () float32 or wider."""
    return 10 * torch.log10(data_range ** 2 / reconstruction_loss(recon, target, "mse"))


def ssim(recon: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13) with an 11^3 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03.

    recon, target (B, C, D, H, W) -> () float32 or wider: the mean over the positions at which the window lies inside the volume.
    Along an axis shorter than 11 voxels the window is the longest odd length that fits.
    """
    check_pair("ssim", recon, target)
    dtype, size = torch.promote_types(recon.dtype, torch.float32), recon.shape[2:]
    windows = [_gaussian(min(11, n - 1 + n % 2), dtype, recon.device) for n in size]
    out_depth, reach = size[0] - windows[0].numel() + 1, windows[0].numel() - 1
    step = max(1, SLAB_VOXELS // max(1, recon[0, :, 0].numel()))
    total = torch.zeros((), dtype=dtype, device=recon.device)
    for b in range(recon.shape[0]):
        for d in range(0, out_depth, step):
            part = slice(b, b + 1), slice(None), slice(d, min(d + step, out_depth) + reach)
            total += _ssim_map(recon[part].to(dtype), target[part].to(dtype), windows, data_range).sum()
    positions = recon.shape[0] * recon.shape[1] * out_depth
    for n, window in zip(size[1:], windows[1:]):
        positions *= n - window.numel() + 1
    return total / positions


def _ssim_map(x: Tensor, y: Tensor, windows: list[Tensor], data_range: float) -> Tensor:
    """SSIM at each position of the window: x, y (1, C, D, H, W) -> (5C, 1, ...) folded back to (C, 1, D', H', W')."""
    c = x.shape[1]
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1).movedim(1, 0)      # (5C, 1, D, H, W): each channel is a sample
    for axis, window in enumerate(windows):                                    # the Gaussian is separable
        shape = [1, 1, 1, 1, 1]
        shape[2 + axis] = -1
        moments = F.conv3d(moments, window.view(shape))
    mx, my, xx, yy, xy = moments.split(c)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def _gaussian(length: int, dtype: torch.dtype, device: torch.device, sigma: float = 1.5) -> Tensor:
    x = torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2
    window = torch.exp(-x.square() / (2 * sigma ** 2))
    return window / window.sum()


def check_pair(name: str, recon: Tensor, target: Tensor) -> None:
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), got {tuple(recon.shape)} and {tuple(target.shape)}")
