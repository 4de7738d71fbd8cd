"""Losses and image metrics for networks on volumes. Needs torch and nothing else.

    loss = reconstruction_loss(recon, x, "l1") + 1e-6 * kl_loss(mu, logvar) + 0.1 * structure_loss(recon, x)
    loss, ce, dice_loss = segmentation_loss(logits, label)
    psnr(recon, x, data_range=2), ssim(recon, x, data_range=2), sharpness(recon, x)

Losses are computed in float32 or wider, also under autocast. The terms on whole volumes (reconstruction, structure, segmentation) work
slab by slab, so that no full-size float32 copy of a 16-bit volume exists: the only full-size tensor that they add is a gradient, in the
dtype of the input.

Shapes: B batch, C channels, D H W depth height width, Z latent channels, K classes. Intensities are in [-1, 1], so data_range is 2.
Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

RECONSTRUCTION = {"l1": (1.0, 0.0), "mse": (0.0, 1.0), "l1_l2": (0.5, 0.5)}  # shares of |difference| and of its square
ADVERSARIAL = ("hinge", "lsgan", "bce")
DISC_NORMS = ("none", "group", "instance", "spectral")
OCCUPIED = 0.05                                                  # further than this from the background: 50 HU of the default CT range
SLAB_VOXELS = 1 << 21                                            # elements widened to float32 at a time: 8 MiB a temporary


@dataclass
class LossConfig:
    """The training criterion: reconstruction + structure + perceptual + adversarial terms, and KL or codebook; or cross-entropy + Dice."""
    recon: str = "l1"                                            # l1 | mse | l1_l2 (half and half)
    kl_weight: float = 1e-6                                      # KL is a mean over latent elements, so it holds for any crop size
    channel_weights: tuple[float, ...] | None = None             # one factor per channel of the data; none: all 1
    foreground_weight: float = 1.0                               # factor for voxels that are not background (sparse volumes: 10 to 100)
    background: float = -1.0                                     # intensity of empty voxels; train.py sets it from the data
    structure_weight: float = 0.0                                # 3D Sobel edges, L1; same channel and foreground weights
    perceptual_weight: float = 0.0                               # distance of multi-scale 3D features; 0: no feature network is built
    perceptual_features: str = "random"                          # random (seeded, the same in every process) | file of --task features
    perceptual_start: int = 0                                    # optimizer step at which the term sets in
    perceptual_warmup: int = 0                                   # steps over which its weight rises linearly from there
    adv_weight: float = 0.0                                      # PatchGAN generator term; 0: no discriminator, and no term of it either
    adv_loss: str = "hinge"                                      # hinge | lsgan | bce
    disc_start: int = 0                                          # optimizer step at which discriminator and adversarial term set in
    disc_warmup: int = 0                                         # steps over which adv_weight rises linearly from there
    disc_channels: int = 32                                      # of the first layer; doubled by each one after it
    disc_layers: int = 3                                         # downsampling layers; 3 see 70^3 patches at stride 2 (pix2pix's 70x70)
    disc_strides: tuple[int, int, int] | tuple[tuple[int, int, int], ...] = (2, 2, 2)  # one for all downsampling layers, or one for each
    disc_norm: str = "none"                                      # none | group | instance | spectral
    disc_lr: float | None = None                                 # none: optim.lr
    feature_matching_weight: float = 0.0                         # L1 between the discriminator's features (arXiv:1711.11585: 10)
    r1_weight: float = 0.0                                       # gamma of arXiv:1801.04406, Eq. 9 (there 10)
    r1_every: int = 16                                           # lazy regularisation: each so many steps, times so many (arXiv:1912.04958)
    lecam_weight: float = 0.0                                    # arXiv:2104.03310, against overfitting of the discriminator to few volumes
    adaptive_weight: bool = False                                # scale adv_weight by the last layer's gradient ratio (arXiv:2012.09841)
    crop: tuple[int, int, int] | None = (32, 64, 64)             # sub-crop of each sample that the perceptual and adversarial terms see,
                                                                 # in every memory mode alike; none: all of it
    dice_share: float = 0.5                                      # of Dice in the segmentation loss; the rest is cross-entropy
    class_weights: tuple[float, ...] | None = None               # cross-entropy factor per class (binary: background, foreground); none: 1

    def __post_init__(self):
        for name, choices in (("recon", tuple(RECONSTRUCTION)), ("adv_loss", ADVERSARIAL), ("disc_norm", DISC_NORMS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"loss.{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("kl_weight", "structure_weight", "perceptual_weight", "perceptual_start", "perceptual_warmup", "adv_weight",
                     "disc_start", "disc_warmup", "feature_matching_weight", "r1_weight", "lecam_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"loss.{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("disc_channels", "disc_layers", "r1_every"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"loss.{name} must be 1 or more, got {getattr(self, name)}")
        if not self.foreground_weight > 0:
            raise ValueError(f"loss.foreground_weight must be positive, got {self.foreground_weight}")
        if self.disc_lr is not None and not self.disc_lr > 0:
            raise ValueError(f"loss.disc_lr must be positive, or none for optim.lr, got {self.disc_lr}")
        if not 0 <= self.dice_share <= 1:
            raise ValueError(f"loss.dice_share must be from 0 (cross-entropy alone) to 1 (Dice alone), got {self.dice_share}")
        if self.crop is not None:
            self.crop = tuple(self.crop)
            if len(self.crop) != 3 or min(self.crop) < 1:
                raise ValueError(f"loss.crop needs three sizes D,H,W of 1 or more, got {self.crop}")
        self.disc_strides = tuple(tuple(s) if isinstance(s, (tuple, list)) else s for s in self.disc_strides)
        layer_strides(self.disc_strides, self.disc_layers, "loss.disc_strides")
        if self.perceptual_features in ("", "none"):
            raise ValueError("loss.perceptual_features must be random or a file; loss.perceptual_weight=0 switches the term off")
        for name, what in (("channel_weights", "channel"), ("class_weights", "class")):
            if getattr(self, name) is not None:
                setattr(self, name, tuple(getattr(self, name)))
                if not getattr(self, name) or not min(getattr(self, name)) >= 0:
                    raise ValueError(f"loss.{name} needs one factor of 0 or more per {what}, got {getattr(self, name)}")


def layer_strides(strides: Sequence, layers: int, name: str) -> tuple[tuple[int, int, int], ...]:
    """One (D, H, W) triple for each of `layers`, from one for all or one for each. Raises ValueError that says which are allowed."""
    given = (strides,) if all(isinstance(s, int) for s in strides) else strides
    given = tuple(tuple(s) for s in given)
    if any(len(s) != 3 or min(s) < 1 for s in given) or len(given) not in (1, layers):
        raise ValueError(f"{name} needs one D,H,W triple of 1 or more, or one for each of the {layers} layers, got {strides}")
    return given * layers if len(given) == 1 else given


def reconstruction_loss(recon: Tensor, target: Tensor, kind: str = "l1", channel_weights: Sequence[float] | None = None,
                        foreground_weight: float = 1.0, background: float = -1.0) -> Tensor:
    """Mean over elements of weight * |recon - target|, its square, or half of each.

    recon, target (B, C, D, H, W) -> () float32 or wider. The weight is the channel's factor, times foreground_weight at voxels where
    any channel of the target is further than 0.05 from `background` (50 HU of the default CT range). Weights are factors:
    the mean is not divided by them, so that micro-batches add up to a batch. The gradient reaches recon only.
    Raises ValueError for an unknown kind, shapes that differ, or a wrong number of channel weights.
    """
    if kind not in RECONSTRUCTION:
        raise ValueError(f"reconstruction loss must be one of {', '.join(RECONSTRUCTION)}, got {kind!r}")
    check_pair("reconstruction_loss", recon, target)
    check_channel_weights(recon, channel_weights)
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
        foreground = ((target - background).abs() > OCCUPIED).any(dim=1, keepdim=True)
        weight = weight * torch.where(foreground, foreground_weight, 1.0)
    return recon.to(dtype) - target, weight


def slabs(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut (B, C, D, H, W) along B and D into parts of about SLAB_VOXELS elements."""
    depth = max(1, SLAB_VOXELS // max(1, x[0, :, 0].numel()))
    for b in range(x.shape[0]):
        for d in range(0, x.shape[2], depth):
            yield slice(b, b + 1), slice(None), slice(d, d + depth)


def structure_loss(recon: Tensor, target: Tensor, channel_weights: Sequence[float] | None = None, foreground_weight: float = 1.0,
                   background: float = -1.0) -> Tensor:
    """Mean over elements and the three axes of weight * |S(recon) - S(target)|, S the 3D Sobel gradient (Sobel & Feldman 1968).

    recon, target (B, C, D, H, W) -> () float32 or wider. The stencil [1, 2, 1] x [1, 2, 1] x [-1, 0, 1] is divided by 32, so a ramp that
    rises 1 a voxel has gradient 1; volumes are continued by their border voxels, so every size works. Weights as in reconstruction_loss.
    Memory: recon, target and the gradient; temporaries are of slabs. The gradient reaches recon only. Raises ValueError as there.
    """
    check_pair("structure_loss", recon, target)
    check_channel_weights(recon, channel_weights)
    return _Structure.apply(recon, target, channel_weights, foreground_weight, background)


class _Structure(torch.autograd.Function):
    """S is linear, so |S(recon) - S(target)| = |S(recon - target)|; both passes go by slabs, with a halo of one or two slices."""
    @staticmethod
    def forward(ctx, recon, target, *weighting):
        ctx.save_for_backward(recon, target)
        ctx.weighting = weighting
        total = torch.zeros((), dtype=torch.promote_types(recon.dtype, torch.float32), device=recon.device)
        for part in slabs(recon):
            total += _structure_sum(recon, target, part, 0, weighting)[0]
        return total / (3 * recon.numel())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        recon, target = ctx.saved_tensors
        grad = torch.empty_like(recon)
        for part in slabs(recon):                                # a slice's gradient comes from the positions of its neighbours too
            with torch.enable_grad():
                total, difference, offset = _structure_sum(recon, target, part, 1, ctx.weighting)
                slope, = torch.autograd.grad(total, difference)
            depth = grad[part].shape[2]
            grad[part] = slope[:, :, offset:offset + depth] * (grad_loss / (3 * recon.numel()))
        return grad, None, None, None, None


def _structure_sum(recon: Tensor, target: Tensor, part: tuple[slice, ...], reach: int, weighting) -> tuple[Tensor, Tensor, int]:
    """Sum of weight * |Sobel of the difference| over the slices of `part` and `reach` more on either side.

    Also the difference that it was computed from (a leaf when gradients are on) and the place in it of the part's first slice.
    """
    depth = recon.shape[2]
    first, last = max(0, part[2].start - reach), min(depth, part[2].stop + reach)       # positions
    low, high = max(0, first - 1), min(depth, last + 1)                                 # slices that the stencil reads
    read = part[0], part[1], slice(low, high)
    difference, weight = weighted_difference(recon[read].detach(), target[read].detach(), *weighting)
    difference.requires_grad_(torch.is_grad_enabled())
    weight = weight.expand_as(difference)[:, :, first - low:last - low]
    ends = (low == first, high == last)                                                 # true borders: nothing was read beyond them
    total = sum((weight * g.abs()).sum() for g in sobel(difference, ends))
    return total, difference, part[2].start - low


def sobel(x: Tensor, pad_depth: tuple[bool, bool] = (True, True)) -> list[Tensor]:
    """Sobel gradients of x (B, C, D, H, W) along D, H and W, each of the same shape (or 1 shorter in D at each end that is not padded).

    One that rises 1 a voxel has gradient 1. Borders are repeated by hand: the backward of replicate padding is not deterministic on CUDA.
    """
    for axis, ends in ((2, pad_depth), (3, (True, True)), (4, (True, True))):
        x = torch.cat([x.narrow(axis, 0, 1)] * ends[0] + [x] + [x.narrow(axis, -1, 1)] * ends[1], axis)

    def taps(t: Tensor, axis: int) -> tuple[Tensor, Tensor, Tensor]:
        n = t.shape[axis] - 2
        return t.narrow(axis, 0, n), t.narrow(axis, 1, n), t.narrow(axis, 2, n)

    def smooth(t: Tensor, axis: int) -> Tensor:
        before, here, after = taps(t, axis)
        return (before + 2 * here + after) / 4

    def slope(t: Tensor, axis: int) -> Tensor:
        before, _, after = taps(t, axis)
        return (after - before) / 2

    across = smooth(x, 2)
    return [smooth(smooth(slope(x, 2), 3), 4), smooth(slope(across, 3), 4), slope(smooth(across, 3), 4)]


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


@torch.no_grad()
def sharpness(recon: Tensor, target: Tensor) -> Tensor:
    """Gradient energy of recon over that of target: 1 as sharp as the input, below 1 blurrier, above noisier; not finite for a flat target.

    recon, target (B, C, D, H, W) -> () float32 or wider. The energy is the sum of squared forward differences along D, H and W.
    """
    check_pair("sharpness", recon, target)
    dtype = torch.promote_types(recon.dtype, torch.float32)
    energy = torch.zeros(2, dtype=dtype, device=recon.device)
    for part in slabs(recon):
        read = part[0], part[1], slice(part[2].start, part[2].stop + 1)         # the next slab's first slice ends the last difference
        for i, x in enumerate((recon[read].to(dtype), target[read].to(dtype))):
            energy[i] += x.diff(dim=2).square().sum()
            own = x[:, :, :part[2].stop - part[2].start]
            energy[i] += own.diff(dim=3).square().sum() + own.diff(dim=4).square().sum()
    return energy[0] / energy[1]


@torch.no_grad()
def occupancy_iou(recon: Tensor, target: Tensor, background: float = -1.0, threshold: float = OCCUPIED) -> Tensor:
    """Intersection over union of the occupied voxels; 1 when neither has one.

    recon, target (B, C, D, H, W) -> () float32. A voxel is occupied where any channel is further than threshold from background.
    """
    check_pair("occupancy_iou", recon, target)
    counts = torch.zeros(2, dtype=torch.float64 if recon.device.type == "cpu" else torch.float32, device=recon.device)
    for part in slabs(recon):
        a, b = (((x[part].float() - background).abs() > threshold).any(dim=1) for x in (recon, target))
        counts += torch.stack([(a & b).sum(), (a | b).sum()])
    return torch.where(counts[1] > 0, counts[0] / counts[1].clamp(min=1), 1.0).float()


def check_pair(name: str, recon: Tensor, target: Tensor) -> None:
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), got {tuple(recon.shape)} and {tuple(target.shape)}")


def check_channel_weights(recon: Tensor, channel_weights: Sequence[float] | None) -> None:
    if channel_weights is not None and len(channel_weights) != recon.shape[1]:
        raise ValueError(f"loss.channel_weights has {len(channel_weights)} factors, the data has {recon.shape[1]} channels; "
                         f"give one for each")


def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ------------------------------------------------------------------------------------------------------------------- segmentation


class SegmentationLoss(NamedTuple):
    loss: Tensor                                                 # () (1 - dice_share) * ce + dice_share * dice_loss
    ce: Tensor
    dice_loss: Tensor


def segmentation_loss(logits: Tensor, label: Tensor, dice_share: float = 0.5, class_weights: Sequence[float] | None = None,
                      ignore_index: int | None = None) -> SegmentationLoss:
    """Cross-entropy + soft Dice, the pair of nnU-Net (arXiv:1809.10486, Sec. 2.3).

    logits (B, K, D, H, W), label (B, D, H, W) int64 in [0, K) -> three () of float32 or wider. K = 1 is binary: label in {0, 1}, a sigmoid,
    Dice of the foreground. Voxels of ignore_index count nowhere; a sample of nothing else gives 0, and zero gradients.
    Cross-entropy: mean over the sample's voxels, times the label's class weight; weights are factors, the mean is not divided by them.
    Dice: 1 - 2 |p y| / (|p| + |y|), the mean over the classes that the sample's label has; one that it lacks is left to the cross-entropy
    (its Dice is 0 whatever the prediction). Both are means over samples, so micro-batches add up to a batch.
    Memory: logits, label and the gradient of logits; temporaries are of slabs. Raises ValueError for shapes or types that do not fit.
    """
    if logits.dim() != 5 or label.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(f"segmentation_loss: needs logits (B, K, D, H, W) and label (B, D, H, W), got {tuple(logits.shape)} and "
                         f"{tuple(label.shape)}")
    if label.dtype != torch.int64:
        raise ValueError(f"segmentation_loss: label must be int64, got {label.dtype}; convert it with .long()")
    classes = max(2, logits.shape[1])
    if class_weights is not None and len(class_weights) != classes:
        raise ValueError(f"loss.class_weights has {len(class_weights)} factors, the labels have {classes} classes; give one for each")
    weights = torch.ones(classes) if class_weights is None else torch.tensor(class_weights)
    weights = weights.to(logits.device, torch.promote_types(logits.dtype, torch.float32))
    ce, dice_loss = _Segmentation.apply(logits, label, weights, ignore_index)
    return SegmentationLoss((1 - dice_share) * ce + dice_share * dice_loss, ce, dice_loss)


class _Segmentation(torch.autograd.Function):
    """Keeps logits and label; the softmax is made again in the backward, slab by slab (plain autograd keeps it twice, in float32)."""
    @staticmethod
    def forward(ctx, logits, label, weights, ignore_index):
        b, k = logits.shape[0], len(weights)
        ce, voxels = weights.new_zeros(b), weights.new_zeros(b)
        hit, guessed, actual = (weights.new_zeros(b, k) for _ in range(3))
        for part in slabs(logits):
            i = part[0].start
            logp, hot, valid = log_probabilities(logits[part], label[part[0], part[2]], k, ignore_index)
            p = logp.exp() * valid
            ce[i] -= (hot * logp * weights.view(1, -1, 1, 1, 1)).sum()
            voxels[i] += valid.sum()
            hit[i] += (p * hot).sum(dim=(0, 2, 3, 4))
            guessed[i] += p.sum(dim=(0, 2, 3, 4))
            actual[i] += hot.sum(dim=(0, 2, 3, 4))
        share = (actual > 0).to(weights.dtype)                   # (B, K): a class's share in its sample's Dice and in the batch's
        if logits.shape[1] == 1:
            share[:, 0] = 0
        share /= share.sum(dim=1, keepdim=True).clamp(min=1) * b
        voxels, sizes = voxels.clamp(min=1) * b, (guessed + actual).clamp(min=1e-12)
        ctx.save_for_backward(logits, label, weights, voxels, share, hit, sizes)
        ctx.ignore_index = ignore_index
        return (ce / voxels).sum(), (share * (1 - 2 * hit / sizes)).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ce, grad_dice):
        logits, label, weights, voxels, share, hit, sizes = ctx.saved_tensors
        slope_hit, slope_size = -2 * share / sizes * grad_dice, 2 * share * hit / sizes.square() * grad_dice      # (B, K)
        grad = torch.empty_like(logits)
        for part in slabs(logits):
            logp, hot, valid = log_probabilities(logits[part], label[part[0], part[2]], len(weights), ctx.ignore_index)
            p = logp.exp()
            weight = (hot * weights.view(1, -1, 1, 1, 1)).sum(dim=1, keepdim=True)             # 0 where ignored
            a, c = (s[part[0]][:, :, None, None, None] for s in (slope_hit, slope_size))
            dp = a * hot + c * valid                                                           # d dice_loss / d p
            slope = p * (dp - (p * dp).sum(dim=1, keepdim=True)) + (p - hot) * weight * (grad_ce / voxels[part[0]])
            grad[part] = slope[:, -logits.shape[1]:]                                           # binary: the foreground's logit
        return grad, None, None, None


def log_probabilities(logits: Tensor, label: Tensor, classes: int, ignore_index: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax (B, K, d, h, w), one-hot labels of the same shape, 0 where ignored, and (B, 1, d, h, w) 1 where not. Binary: K = 2."""
    logits = wide(logits)
    if logits.shape[1] < classes:
        logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
    label = label[:, None]
    valid = torch.ones_like(label, dtype=torch.bool) if ignore_index is None else label != ignore_index
    hot = torch.zeros_like(logits).scatter_(1, label.where(valid, 0), 1) * valid
    return logits.log_softmax(dim=1), hot, valid.to(logits.dtype)


@torch.no_grad()
def dice_scores(prediction: Tensor, label: Tensor, classes: int, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Voxels in both and voxels in either counted twice, per class, (classes,) int64 each: add them up over volumes, then `dice`.

    prediction, label (B, D, H, W) of integers. Voxels whose label is ignore_index count nowhere.
    """
    if prediction.shape != label.shape:
        raise ValueError(f"dice_scores: prediction and label differ in shape: {tuple(prediction.shape)} and {tuple(label.shape)}")
    intersections, sizes = torch.zeros(2, classes, dtype=torch.int64, device=label.device)
    for p, y in zip(prediction.flatten().split(SLAB_VOXELS), label.flatten().split(SLAB_VOXELS)):
        valid = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
        for k in range(classes):
            a, b = (p == k) & valid, (y == k) & valid
            intersections[k] += (a & b).sum()
            sizes[k] += a.sum() + b.sum()
    return intersections, sizes


def dice(intersections: Tensor, sizes: Tensor) -> Tensor:
    """2 |A B| / (|A| + |B|) per class (classes,) float32; nan for a class that neither prediction nor label has."""
    return (2 * intersections / sizes).float()
