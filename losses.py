"""Losses and image metrics for networks on volumes. Needs torch and nothing else.

    loss = reconstruction_loss(recon, x, "l1") + 1e-6 * kl_loss(mu, logvar) + 0.1 * structure_loss(recon, x)
    loss, ce, dice_loss = segmentation_loss(logits, label)
    psnr(recon, x, data_range=2), ssim(recon, x, data_range=2), sharpness(recon, x)

Losses are computed in float32 or wider, also under autocast. Reconstruction, structure and segmentation
work slab by slab: no full-size float32 copy of a 16-bit volume exists, only a gradient in its dtype.
Shapes: B batch, C channels, D H W depth height width, Z latent channels, K classes.
Intensities are in [-1, 1], so data_range is 2. Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RECONSTRUCTION = {"l1": (1.0, 0.0), "mse": (0.0, 1.0), "l1_l2": (0.5, 0.5)}  # shares of |d| and of d^2
ADVERSARIAL = ("hinge", "lsgan", "bce")
DISC_NORMS = ("none", "group", "instance", "spectral")
OCCUPIED = 0.05              # distance of an occupied voxel from the background: 50 HU of the default CT
SLAB_VOXELS = 1 << 21        # elements widened to float32 at a time: 8 MiB a temporary


@dataclass(frozen=True)
class LossConfig:
    """The training criterion: reconstruction, KL or codebook, further terms; or cross-entropy and Dice."""
    recon: str = "l1"                           # l1 | mse | l1_l2 (half and half)
    kl_weight: float = 1e-6                     # of a mean over latent elements: right for any crop size
    channel_weights: tuple[float, ...] | None = None  # one factor per channel of the data; none: all 1
    foreground_weight: float = 1.0              # factor for occupied voxels (sparse volumes: 10 to 100)
    background: float = -1.0                    # intensity of empty voxels; train.py sets it from the data
    structure_weight: float = 0.0               # 3D Sobel edges, L1; same channel and foreground weights
    # perceptual.py: the distance of multi-scale 3D features
    perceptual_weight: float = 0.0              # 0: no feature network is built
    perceptual_features: str = "random"         # random (seeded, one for all) | file of --task features
    perceptual_start: int = 0                   # optimizer step at which the term sets in
    perceptual_warmup: int = 0                  # steps over which its weight rises linearly from there
    # adversarial.py: a PatchGAN
    adv_weight: float = 0.0                     # generator term; 0: no discriminator at all
    adv_loss: str = "hinge"                     # hinge | lsgan | bce
    disc_start: int = 0                         # optimizer step at which the discriminator sets in
    disc_warmup: int = 0                        # steps over which adv_weight rises linearly from there
    disc_channels: int = 32                     # of the first layer; doubled by each one after it
    disc_layers: int = 3                        # downsampling layers; 3 of stride 2 see 70^3 voxels
    disc_strides: tuple[int, int, int] | tuple[tuple[int, int, int], ...] = (2, 2, 2)  # of all, or of each
    disc_norm: str = "none"                     # none | group | instance | spectral
    disc_lr: float | None = None                # none: optim.lr, of muon half of it
    disc_grad_clip: float = 0.0                 # largest norm of its own gradient; 0: no clipping
    feature_matching_weight: float = 0.0        # L1 of the discriminator's features (arXiv:1711.11585: 10)
    r1_weight: float = 0.0                      # gamma of arXiv:1801.04406, Eq. 9 (there 10)
    r1_every: int = 16                          # every so many steps, times so many (arXiv:1912.04958)
    lecam_weight: float = 0.0                   # arXiv:2104.03310, against overfitting to few volumes
    adaptive_weight: bool = False               # scale adv_weight by gradient norms (arXiv:2012.09841)
    crop: tuple[int, int, int] | None = (32, 64, 64)  # what both of these terms see; none: all
    # segmentation
    dice_share: float = 0.5                     # of Dice; the rest is cross-entropy
    class_weights: tuple[float, ...] | None = None  # factor per class, background first; none: 1

    def __post_init__(self):
        choices = {"recon": tuple(RECONSTRUCTION), "adv_loss": ADVERSARIAL, "disc_norm": DISC_NORMS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"loss.{name} must be one of {', '.join(known)}, got {vars(self)[name]!r}")
        # `not x >= 0` rather than `x < 0`: NaN fails it too
        least = {name: 0 for name in (
            "kl_weight", "structure_weight", "perceptual_weight", "perceptual_start", "perceptual_warmup",
            "adv_weight", "disc_start", "disc_warmup", "disc_grad_clip", "feature_matching_weight",
            "r1_weight", "lecam_weight")}
        for name, bound in (least | {"disc_channels": 1, "disc_layers": 1, "r1_every": 1}).items():
            if not getattr(self, name) >= bound:
                raise ValueError(f"loss.{name} must be {bound} or more, got {getattr(self, name)}")
        if not self.foreground_weight > 0:
            raise ValueError(f"loss.foreground_weight must be positive, got {self.foreground_weight}")
        if self.disc_lr is not None and not self.disc_lr > 0:
            raise ValueError(f"loss.disc_lr must be positive, or none (by optim.lr), got {self.disc_lr}")
        if not 0 <= self.dice_share <= 1:
            raise ValueError(f"loss.dice_share must be from 0 (cross-entropy alone) to 1 (Dice alone), got "
                             f"{self.dice_share}")
        if self.perceptual_features in ("", "none"):
            raise ValueError("loss.perceptual_features must be random or a file; "
                             "loss.perceptual_weight=0 switches the term off")
        # lists, as YAML has them, become tuples; object's own __setattr__: the instance is frozen
        if self.crop is not None:
            object.__setattr__(self, "crop", tuple(self.crop))
            if len(self.crop) != 3 or min(self.crop) < 1:
                raise ValueError(f"loss.crop needs three sizes D,H,W of 1 or more, got {self.crop}")
        strides = tuple(tuple(s) if isinstance(s, (tuple, list)) else s for s in self.disc_strides)
        object.__setattr__(self, "disc_strides", strides)
        layer_strides(self.disc_strides, self.disc_layers, "loss.disc_strides")
        for name, what in (("channel_weights", "channel"), ("class_weights", "class")):
            if getattr(self, name) is None:
                continue
            factors = tuple(getattr(self, name))
            object.__setattr__(self, name, factors)
            if not factors or not min(factors) >= 0:
                raise ValueError(f"loss.{name} needs one factor of 0 or more per {what}, got {factors}")


def layer_strides(strides: Sequence, layers: int, name: str) -> tuple[tuple[int, int, int], ...]:
    """One (D, H, W) triple for each of `layers`, from one for all or one for each; ValueError for others."""
    given = (strides,) if all(isinstance(s, int) for s in strides) else strides
    given = tuple(tuple(s) for s in given)
    if any(len(s) != 3 or min(s) < 1 for s in given) or len(given) not in (1, layers):
        raise ValueError(f"{name} needs one D,H,W triple of 1 or more, or one for each of the {layers} "
                         f"layers, got {strides}")
    return given * layers if len(given) == 1 else given


def reconstruction_loss(recon: Tensor, target: Tensor, kind: str = "l1",
                        channel_weights: Sequence[float] | None = None,
                        foreground_weight: float = 1.0, background: float = -1.0) -> Tensor:
    """Mean over elements of weight * |recon - target|, its square, or half of each.

    recon, target (B, C, D, H, W) -> () float32 or wider, with a gradient for recon alone. The weight is the
    channel's factor, times foreground_weight where a channel of target is further than 0.05 from background.
    It does not divide the mean, so that micro-batches add up to a batch. ValueError for what does not fit.
    """
    if kind not in RECONSTRUCTION:
        raise ValueError(f"reconstruction loss must be one of {', '.join(RECONSTRUCTION)}, got {kind!r}")
    check_pair("reconstruction_loss", recon, target)
    weighting = channel_factors(recon, channel_weights), foreground_weight, background
    return _Reconstruction.apply(recon, target, RECONSTRUCTION[kind], weighting)


class _Reconstruction(torch.autograd.Function):
    """L = mean of w (a |d| + b d^2), d = recon - target, shares a and b.

    Keeps recon and target alone; plain autograd keeps d, sign and product besides, 12 bytes a voxel.
    """
    @staticmethod
    def forward(ctx, recon, target, shares, weighting):
        ctx.save_for_backward(recon, target)
        ctx.shares, ctx.weighting = shares, weighting
        total = recon.new_zeros((), dtype=torch.promote_types(recon.dtype, torch.float32))
        for part in slabs(recon):
            difference, weight = weighted_difference(recon[part], target[part], *weighting)
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
            # dL / d recon = w (a sign(d) + 2 b d) / numel, which underflows in 16 bits before the loss scale
            slope = ctx.shares[0] * difference.sign() + 2 * ctx.shares[1] * difference
            grad[part] = slope * (weight * (grad_loss / recon.numel()))
        return grad, None, None, None


def weighted_difference(recon: Tensor, target: Tensor, weight: Tensor, foreground_weight: float,
                        background: float) -> tuple[Tensor, Tensor]:
    """recon - target in float32 or wider, and each element's weight, which broadcasts to it."""
    dtype = torch.promote_types(recon.dtype, torch.float32)
    target = target.to(dtype)
    if foreground_weight != 1:
        foreground = ((target - background).abs() > OCCUPIED).any(dim=1, keepdim=True)
        weight = weight * torch.where(foreground, foreground_weight, 1.0)
    return recon.to(dtype) - target, weight


def slabs(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut (B, C, D, H, W) along B and D into parts of about SLAB_VOXELS elements."""
    depth = max(1, SLAB_VOXELS // max(1, x[0, :, 0].numel()))
    for b in range(x.shape[0]):
        for d in range(0, x.shape[2], depth):
            yield slice(b, b + 1), slice(None), slice(d, d + depth)


def structure_loss(recon: Tensor, target: Tensor, channel_weights: Sequence[float] | None = None,
                   foreground_weight: float = 1.0, background: float = -1.0) -> Tensor:
    """Mean over elements and axes of weight * |S(recon) - S(target)|, S the 3D Sobel gradient.

    recon, target (B, C, D, H, W) -> () float32 or wider. The stencil [1, 2, 1] x [1, 2, 1] x [-1, 0, 1] / 32
    (Sobel & Feldman 1968) makes a ramp's gradient its slope. Otherwise as reconstruction_loss.
    """
    check_pair("structure_loss", recon, target)
    weighting = channel_factors(recon, channel_weights), foreground_weight, background
    return _Structure.apply(recon, target, weighting)


class _Structure(torch.autograd.Function):
    """S is linear: |S(recon) - S(target)| = |S(recon - target)|. Slabs have a halo of one or two slices."""
    @staticmethod
    def forward(ctx, recon, target, weighting):
        ctx.save_for_backward(recon, target)
        ctx.weighting = weighting
        total = recon.new_zeros((), dtype=torch.promote_types(recon.dtype, torch.float32))
        for part in slabs(recon):
            total += _structure_sum(recon, target, part, 0, weighting)[0]
        return total / (3 * recon.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        recon, target = ctx.saved_tensors
        grad = torch.empty_like(recon)
        for part in slabs(recon):
            # a slice's gradient comes from the positions of its neighbours too: reach one slice further
            with torch.enable_grad():
                total, difference, offset = _structure_sum(recon, target, part, 1, ctx.weighting)
                slope, = torch.autograd.grad(total, difference)
            own = slope[:, :, offset:offset + grad[part].shape[2]]
            grad[part] = own * (grad_loss / (3 * recon.numel()))
        return grad, None, None


def _structure_sum(recon: Tensor, target: Tensor, part: tuple[slice, ...], reach: int,
                   weighting) -> tuple[Tensor, Tensor, int]:
    """Weighted sum of |Sobel| over `part` and `reach` slices more; the difference, the part's place in it."""
    depth = recon.shape[2]
    # the sum is over positions first to last, for which the stencil reads slices low to high
    first, last = max(0, part[2].start - reach), min(depth, part[2].stop + reach)
    low, high = max(0, first - 1), min(depth, last + 1)
    read = part[0], part[1], slice(low, high)
    difference, weight = weighted_difference(recon[read].detach(), target[read].detach(), *weighting)
    difference.requires_grad_(torch.is_grad_enabled())
    weight = weight.expand_as(difference)[:, :, first - low:last - low]
    # an end at which nothing further was read is the volume's true border, and is padded
    ends = (low == first, high == last)
    total = sum((weight * g.abs()).sum() for g in sobel(difference, ends))
    return total, difference, part[2].start - low


def sobel(x: Tensor, pad_depth: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """Sobel gradients of x (B, C, D, H, W) along D, H and W, 1 shorter in D at an end without padding."""
    # borders are repeated by hand: the backward of replicate padding is not deterministic on CUDA
    for axis, ends in ((2, pad_depth), (3, (True, True)), (4, (True, True))):
        parts = [x]
        if ends[0]:
            parts.insert(0, x.narrow(axis, 0, 1))
        if ends[1]:
            parts.append(x.narrow(axis, -1, 1))
        x = torch.cat(parts, axis)

    def taps(t: Tensor, axis: int) -> list[Tensor]:
        return [t.narrow(axis, first, t.shape[axis] - 2) for first in range(3)]

    def smooth(t: Tensor, axis: int) -> Tensor:
        before, here, after = taps(t, axis)
        return (before + 2 * here + after) / 4

    def slope(t: Tensor, axis: int) -> Tensor:
        before, _, after = taps(t, axis)
        return (after - before) / 2

    # the stencil is separable: a slope along one axis, smoothing along the two others
    across = smooth(x, 2)
    return [smooth(smooth(slope(x, 2), 3), 4), smooth(slope(across, 3), 4), slope(smooth(across, 3), 4)]


def kl_loss(mu: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats (arXiv:1312.6114, App. B), the mean over latent elements.

    mu, logvar (B, Z, d, h, w) -> () float32 or wider.
    """
    with torch.autocast(mu.device.type, enabled=False):    # exp and the square overflow in float16
        mu, logvar = wide(mu), wide(logvar)
        # 1/2 (mu^2 + sigma^2 - 1 - log sigma^2)
        return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()


def psnr(recon: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """10 log10(data_range^2 / MSE) in dB, over all elements; (B, C, D, H, W) -> () float32 or wider."""
    return 10 * torch.log10(data_range ** 2 / reconstruction_loss(recon, target, "mse"))


def ssim(recon: Tensor, target: Tensor, data_range: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004, Eq. 13): 11^3 Gaussian kernel, sigma 1.5, K1 0.01, K2 0.03.

    recon, target (B, C, D, H, W) -> () float32 or wider, the mean where the whole kernel lies inside.
    Along an axis shorter than 11 voxels the kernel is the longest odd length that fits.
    """
    check_pair("ssim", recon, target)
    dtype, size = torch.promote_types(recon.dtype, torch.float32), recon.shape[2:]
    kernels = [_gaussian(min(11, n - 1 + n % 2), dtype, recon.device) for n in size]
    out_size = [n - kernel.numel() + 1 for n, kernel in zip(size, kernels)]
    halo = kernels[0].numel() - 1                # slices that a position reads besides its own
    depth = max(1, SLAB_VOXELS // max(1, recon[0, :, 0].numel()))
    total = recon.new_zeros((), dtype=dtype)
    for b in range(recon.shape[0]):
        for d in range(0, out_size[0], depth):
            part = slice(b, b + 1), slice(None), slice(d, min(d + depth, out_size[0]) + halo)
            total += _ssim_map(recon[part].to(dtype), target[part].to(dtype), kernels, data_range).sum()
    return total / (recon.shape[0] * recon.shape[1] * out_size[0] * out_size[1] * out_size[2])


def _ssim_map(x: Tensor, y: Tensor, kernels: list[Tensor], data_range: float) -> Tensor:
    """SSIM at each position of the kernel: x, y (1, C, D, H, W) -> (C, 1, D', H', W')."""
    moments = torch.cat([x, y, x * x, y * y, x * y], dim=1).movedim(1, 0)   # (5C, 1, D, H, W)
    for axis, kernel in enumerate(kernels, 2):
        with torch.autocast(x.device.type, enabled=False):  # variances are differences: 16 bits lose them
            moments = F.conv3d(moments, kernel.view([-1 if i == axis else 1 for i in range(5)]))
    mx, my, xx, yy, xy = moments.split(x.shape[1])
    # Eq. 13: (2 mx my + c1) (2 cov + c2) / ((mx^2 + my^2 + c1) (vx + vy + c2))
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    vx, vy, cov = xx - mx * mx, yy - my * my, xy - mx * my
    return (2 * mx * my + c1) * (2 * cov + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))


def _gaussian(length: int, dtype: torch.dtype, device: torch.device, sigma: float = 1.5) -> Tensor:
    """A Gaussian kernel (length,) whose elements add up to 1."""
    x = torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2
    kernel = torch.exp(-x.square() / (2 * sigma ** 2))
    return kernel / kernel.sum()


def sharpness(recon: Tensor, target: Tensor) -> Tensor:
    """() gradient energy of recon over that of target: below 1 is blurrier; not finite for a flat target."""
    return torch.divide(*gradient_energy(recon, target))


@torch.no_grad()
def gradient_energy(recon: Tensor, target: Tensor) -> Tensor:
    """Sums of squared forward differences of recon and of target, both (B, C, D, H, W) -> (2,)."""
    check_pair("gradient_energy", recon, target)
    energy = recon.new_zeros(2, dtype=torch.promote_types(recon.dtype, torch.float32))
    for part in slabs(recon):
        # the next slab's first slice ends the last difference along D
        read = part[0], part[1], slice(part[2].start, part[2].stop + 1)
        for i, x in enumerate((recon[read].to(energy.dtype), target[read].to(energy.dtype))):
            own = x[:, :, :part[2].stop - part[2].start]
            energy[i] += x.diff(dim=2).square().sum()
            energy[i] += own.diff(dim=3).square().sum() + own.diff(dim=4).square().sum()
    return energy


@torch.no_grad()
def occupancy_iou(recon: Tensor, target: Tensor, background: float = -1.0,
                  threshold: float = OCCUPIED) -> Tensor:
    """Intersection over union of the voxels where any channel is further than threshold from background.

    recon, target (B, C, D, H, W) -> () float32; 1 where neither has such a voxel.
    """
    check_pair("occupancy_iou", recon, target)
    dtype = torch.float64 if recon.device.type == "cpu" else torch.float32   # not every GPU has float64
    both, either = torch.zeros(2, dtype=dtype, device=recon.device)
    for part in slabs(recon):
        a, b = (((x[part].float() - background).abs() > threshold).any(dim=1) for x in (recon, target))
        both += (a & b).sum()
        either += (a | b).sum()
    return torch.where(either > 0, both / either.clamp(min=1), 1.0).float()


# --------------------------------------------------------------------------------------------- segmentation

class SegmentationLoss(NamedTuple):
    loss: Tensor            # () (1 - dice_share) * ce + dice_share * dice_loss
    ce: Tensor
    dice_loss: Tensor


def segmentation_loss(logits: Tensor, label: Tensor, dice_share: float = 0.5,
                      class_weights: Sequence[float] | None = None,
                      ignore_index: int | None = None) -> SegmentationLoss:
    """Cross-entropy and soft Dice, the pair of nnU-Net (arXiv:1809.10486, Sec. 2.3).

    logits (B, K, D, H, W), label (B, D, H, W) int64 in [0, K) -> three () of float32 or wider. K = 1 is
    binary: label in {0, 1}, a sigmoid, Dice of the foreground. Voxels of ignore_index count nowhere; a sample
    of nothing else gives 0. Cross-entropy: mean over the sample's voxels of the label's class weight times
    -log p. Dice: mean over the classes that the sample's label has; that of others is 0 in any case.
    Both are means over samples, so that micro-batches add up to a batch. ValueError for what does not fit.
    """
    if logits.dim() != 5 or label.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"segmentation_loss: needs logits (B, K, D, H, W) and label (B, D, H, W), "
                         f"got {tuple(logits.shape)} and {tuple(label.shape)}")
    if label.dtype != torch.int64:
        raise ValueError(f"segmentation_loss: label must be int64, got {label.dtype}; use label.long()")
    classes = max(2, logits.shape[1])
    if class_weights is not None and len(class_weights) != classes:
        raise ValueError(f"loss.class_weights has {len(class_weights)} factors, the labels have {classes} "
                         f"classes; give one for each")
    weights = logits.new_ones(classes, dtype=torch.promote_types(logits.dtype, torch.float32))
    if class_weights is not None:
        weights = torch.tensor(class_weights).to(weights, non_blocking=True)
    ce, dice_loss = _Segmentation.apply(logits, label, weights, ignore_index)
    return SegmentationLoss((1 - dice_share) * ce + dice_share * dice_loss, ce, dice_loss)


class _Segmentation(torch.autograd.Function):
    """With p the softmax, y the one-hot label, w_y its weight, of each sample's n voxels and class k:

        CE = -sum w_y log p_y / n                       Dice_k = 2 H_k / S_k
        H_k = sum of p_k y_k over the voxels            S_k = sum of p_k + y_k

    Keeps logits and label; backward makes the softmax again, slab by slab (autograd keeps it, twice).
    """
    @staticmethod
    def forward(ctx, logits, label, weights, ignore_index):
        b, k = logits.shape[0], len(weights)
        # first the sums of each sample, and of each of its classes
        ce, voxels = weights.new_zeros(b), weights.new_zeros(b)
        hits, guessed, actual = (weights.new_zeros(b, k) for _ in range(3))
        for part in slabs(logits):
            i = part[0].start
            logp, hot, valid = log_probabilities(logits[part], label[part[0], part[2]], k, ignore_index)
            p = logp.exp() * valid
            ce[i] -= (hot * logp * weights.view(1, -1, 1, 1, 1)).sum()
            voxels[i] += valid.sum()
            hits[i] += (p * hot).sum(dim=(0, 2, 3, 4))
            guessed[i] += p.sum(dim=(0, 2, 3, 4))
            actual[i] += hot.sum(dim=(0, 2, 3, 4))
        # then a class's share in the mean: over the classes that its sample has, and over the samples
        share = (actual > 0).to(weights.dtype)   # (B, K)
        if logits.shape[1] == 1:
            share[:, 0] = 0                      # binary: the foreground alone
        share /= share.sum(dim=1, keepdim=True).clamp(min=1) * b
        voxels = voxels.clamp(min=1) * b
        sizes = (guessed + actual).clamp(min=1e-12)
        ctx.save_for_backward(logits, label, weights, voxels, share, hits, sizes)
        ctx.ignore_index = ignore_index
        return (ce / voxels).sum(), (share * (1 - 2 * hits / sizes)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce, grad_dice):
        logits, label, weights, voxels, share, hits, sizes = ctx.saved_tensors
        # d(1 - Dice_k) / d p_k = -2 y_k / S_k + 2 H_k / S_k^2, with the class's share in the mean
        slope_hit = -2 * share / sizes * grad_dice                      # (B, K)
        slope_size = 2 * share * hits / sizes.square() * grad_dice
        grad = torch.empty_like(logits)
        for part in slabs(logits):
            ones = label[part[0], part[2]]
            logp, hot, valid = log_probabilities(logits[part], ones, len(weights), ctx.ignore_index)
            p = logp.exp()
            weight = (hot * weights.view(1, -1, 1, 1, 1)).sum(dim=1, keepdim=True)   # w_y; 0 where ignored
            a, c = (s[part[0]][:, :, None, None, None] for s in (slope_hit, slope_size))
            dp = a * hot + c * valid
            # through the softmax: p_k (dp_k - sum_j p_j dp_j); d CE / d logit_k: w_y (p_k - y_k) / n
            slope_dice = p * (dp - (p * dp).sum(dim=1, keepdim=True))
            slope_ce = (p - hot) * weight * (grad_ce / voxels[part[0]])
            grad[part] = (slope_dice + slope_ce)[:, -logits.shape[1]:]  # binary: the foreground's logit
        return grad, None, None, None


def log_probabilities(logits: Tensor, label: Tensor, classes: int,
                      ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax; one-hot label, 0 where ignored, both (B, K, d, h, w); (B, 1, d, h, w) 1 where not."""
    logits = wide(logits)
    if logits.shape[1] < classes:                # binary: a logit of 0 for the background
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    label = label[:, None]
    valid = torch.ones_like(label, dtype=torch.bool) if ignore_index is None else label != ignore_index
    hot = torch.zeros_like(logits).scatter_(1, label.where(valid, 0), 1) * valid
    return logits.log_softmax(dim=1), hot, valid.to(logits.dtype)


@torch.no_grad()
def dice_scores(prediction: Tensor, label: Tensor, classes: int,
                ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """|A B| and |A| + |B| of each class, two (classes,) int64: add them up over volumes, then call `dice`.

    prediction, label (B, D, H, W) of integers. Voxels whose label is ignore_index count nowhere.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"dice_scores: prediction and label differ in shape: "
                         f"{tuple(prediction.shape)} and {tuple(label.shape)}")
    intersections, sizes = torch.zeros(2, classes, dtype=torch.int64, device=label.device)
    for p, y in zip(prediction.flatten().split(SLAB_VOXELS), label.flatten().split(SLAB_VOXELS)):
        valid = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
        for k in range(classes):
            a, b = (p == k) & valid, (y == k) & valid
            intersections[k] += (a & b).sum()
            sizes[k] += a.sum() + b.sum()
    return intersections, sizes


def dice(intersections: Tensor, sizes: Tensor) -> Tensor:
    """2 |A B| / (|A| + |B|) per class (classes,) float32; nan for a class that neither of the two has."""
    return (2 * intersections / sizes).float()


def check_pair(name: str, recon: Tensor, target: Tensor) -> None:
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), "
                         f"got {tuple(recon.shape)} and {tuple(target.shape)}")


def channel_factors(recon: Tensor, channel_weights: Sequence[float] | None) -> Tensor:
    """One factor per channel of recon (B, C, D, H, W) as (1, C, 1, 1, 1); a 1 for none. Float32 or wider."""
    if channel_weights is not None and len(channel_weights) != recon.shape[1]:
        raise ValueError(f"loss.channel_weights has {len(channel_weights)} factors, the data has "
                         f"{recon.shape[1]} channels; give one for each")
    dtype = torch.promote_types(recon.dtype, torch.float32)
    factors = (1.0,) if channel_weights is None else channel_weights   # filled in: a copy would wait
    return torch.cat([recon.new_full((1, 1, 1, 1, 1), f, dtype=dtype) for f in factors], dim=1)


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
