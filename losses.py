"""Losses, image metrics, a PatchGAN discriminator and offline perceptual features for networks on volumes. Needs torch and nothing else.

    loss = reconstruction_loss(recon, x, "l1") + 1e-6 * kl_loss(mu, logvar) + 0.1 * PerceptualLoss3d(FeatureNet3d())(recon, x)
    logits_fake, _ = PatchDiscriminator3d(in_channels=1)(recon);  loss = loss + 0.05 * generator_loss(logits_fake, "hinge")
    loss, ce, dice_loss = segmentation_loss(logits, label)
    psnr(recon, x, data_range=2), ssim(recon, x, data_range=2), sharpness(recon, x)

Losses are computed in float32 or wider, also under autocast. The terms on whole volumes (reconstruction, structure, segmentation) work
slab by slab, so that no full-size float32 copy of a 16-bit volume exists: the only full-size tensor that they add is a gradient, in the
dtype of the input. The perceptual and adversarial terms take sub-crops (`crop_starts`, `sub_crop`), which bound their memory.

Shapes: B batch, C channels, D H W depth height width, Z latent channels, K classes. Intensities are in [-1, 1], so data_range is 2.
Version 0.2 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

RECONSTRUCTION = {"l1": (1.0, 0.0), "mse": (0.0, 1.0), "l1_l2": (0.5, 0.5)}  # shares of |difference| and of its square
ADVERSARIAL = ("hinge", "lsgan", "bce")
DISC_NORMS = ("none", "group", "instance", "spectral")
DEGRADATIONS = ("blur", "block", "noise")                        # in the order in which `degrade` applies them
MAX_BLUR, MAX_BLOCK, MAX_NOISE = 2.0, 4, 0.1                     # sigma in voxels, edge in voxels, standard deviation (100 HU of 2000)
OCCUPIED = 0.05                                                  # further than this from the background: 50 HU of the default CT range
FEATURE_VOXELS = 1 << 18                                         # seen by the feature network at a time; fewer are slow on a CPU
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


# ---------------------------------------------------------------------------------------------------------------- discriminator


class PatchDiscriminator3d(nn.Module):
    """PatchGAN discriminator (pix2pix, arXiv:1611.07004, Sec. 3.2): one logit per overlapping patch, with features for matching.

    x (B, C, D, H, W) -> logits (B, 1, d, h, w), features: the activations of each hidden layer, highest resolution first.
    `layers` downsampling convolutions with `strides` (D, H, W), one triple for all or one for each, then one of stride 1 and the logits;
    width doubles with every layer; LeakyReLU 0.2; zero padding of (kernel - 1) // 2, so an even kernel loses a voxel at stride 1.
    norm, on all hidden layers but the first: none; group (up to 32 groups); instance; spectral (every convolution, arXiv:1802.05957).
    No BatchNorm: its statistics would tie the samples of a micro-batch together and differ with accumulation and with ranks.
    Layout of MONAI's PatchDiscriminator; 1 channel, channels=32, layers=3 has its 2,771,873 parameters with norm group or instance
    (scale and shift, convolutions without bias), 2,771,425 with none or spectral (biases instead).
    Deviation: He initialisation, not N(0, 0.02), because without normalisation the signal would depend on the width.
    Raises ValueError for a wrong channel count and for inputs below `least_size`, of which no logit would be left (24^3 by default).
    """
    def __init__(self, in_channels: int, channels: int = 32, layers: int = 3, strides: Sequence = (2, 2, 2), norm: str = "none",
                 kernel: int | tuple[int, int, int] = 4):
        super().__init__()
        if norm not in DISC_NORMS:
            raise ValueError(f"PatchDiscriminator3d: norm must be one of {', '.join(DISC_NORMS)}, got {norm!r}")
        self.in_channels, self.norm = in_channels, norm
        self.kernel = (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)
        self.strides = (*layer_strides(strides, layers, "PatchDiscriminator3d: strides"), (1, 1, 1), (1, 1, 1))
        padding, conv = tuple((k - 1) // 2 for k in self.kernel), SpectralConv3d if norm == "spectral" else nn.Conv3d
        widths = [in_channels, *(channels * 2 ** i for i in range(layers + 1))]
        self.hidden = nn.ModuleList()
        for i, (width, out, stride) in enumerate(zip(widths, widths[1:], self.strides)):
            normed = i > 0 and norm in ("group", "instance")
            block = [conv(width, out, self.kernel, stride, padding, bias=not normed)]
            if normed:                                           # instance norm: a group per channel; group norm: 2 channels at least
                groups = max(g for g in range(1, min(32, out // 2) + 1) if out % g == 0)
                block.append(nn.GroupNorm(out if norm == "instance" else groups, out))
            self.hidden.append(nn.Sequential(*block, nn.LeakyReLU(0.2)))
        self.logits = conv(widths[-1], 1, self.kernel, 1, padding)
        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        least = [1, 1, 1]
        for stride in reversed(self.strides):
            least = [max(1, (n - 1) * s + k - 2 * p) for n, s, k, p in zip(least, stride, self.kernel, padding)]
        self.least_size = tuple(least)                           # (D, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"PatchDiscriminator3d: needs (B, {self.in_channels}, D, H, W), got {tuple(x.shape)}")
        if any(n < least for n, least in zip(x.shape[2:], self.least_size)):
            raise ValueError(f"PatchDiscriminator3d: the input is {','.join(map(str, x.shape[2:]))}, but {len(self.hidden) - 1} layers of "
                             f"strides {self.strides[:-2]} need at least {','.join(map(str, self.least_size))}; use larger crops, "
                             f"fewer loss.disc_layers or loss.disc_strides of 1 on the short axis")
        features = []
        for block in self.hidden:
            x = block[0](x)
            if self.norm == "instance" and len(block) == 3 and x[0, 0].numel() == 1:
                raise ValueError("PatchDiscriminator3d: instance norm of a map of one voxel is 0 whatever the input; use larger crops, "
                                 "fewer loss.disc_layers or another loss.disc_norm")
            x = block[1:](x)
            features.append(x)
        return self.logits(x), features


class SpectralConv3d(nn.Conv3d):
    """Convolution whose weight, as a (out, in * kernel) matrix, is divided by its largest singular value (arXiv:1802.05957, Eqs. 8-12).

    Deviation: the singular vectors come from the eigenvectors of the small (out, out) Gram matrix in each forward, not from a power
    iteration kept in a buffer: exact, and no state moves, so repeated, accumulated and resumed steps are the same step.
    """
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            matrix = wide(self.weight).flatten(1)
            with torch.no_grad():
                u = torch.linalg.eigh(matrix @ matrix.T)[1][:, -1]
                v = F.normalize(u @ matrix, dim=0)
            weight = self.weight / (u @ matrix @ v).to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)


def layer_strides(strides: Sequence, layers: int, name: str) -> tuple[tuple[int, int, int], ...]:
    """One (D, H, W) triple for each of `layers`, from one for all or one for each. Raises ValueError that says which are allowed."""
    given = (strides,) if all(isinstance(s, int) for s in strides) else strides
    given = tuple(tuple(s) for s in given)
    if any(len(s) != 3 or min(s) < 1 for s in given) or len(given) not in (1, layers):
        raise ValueError(f"{name} needs one D,H,W triple of 1 or more, or one for each of the {layers} layers, got {strides}")
    return given * layers if len(given) == 1 else given


# ------------------------------------------------------------------------------------------------------------ adversarial terms


def generator_loss(logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the autoencoder minimises: logits (B, 1, d, h, w) of reconstructions -> () float32 or wider, mean over patches.

    hinge -E[f] (arXiv:1705.02894); lsgan 1/2 E[(f - 1)^2] (arXiv:1611.04076, Eq. 9); bce -E[log sigmoid(f)], the non-saturating loss
    (arXiv:1406.2661). Raises ValueError for another kind.
    """
    check_adversarial(kind)
    fake = wide(logits_fake)
    with torch.autocast(fake.device.type, enabled=False):
        if kind == "hinge":
            return -fake.mean()
        return (fake - 1).square().mean() / 2 if kind == "lsgan" else F.softplus(-fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimises, half of it on each side: logits (B, 1, d, h, w) -> () float32 or wider.

    hinge 1/2 E[max(0, 1 - r)] + 1/2 E[max(0, 1 + f)]; lsgan 1/2 E[(r - 1)^2] + 1/2 E[f^2] (arXiv:1611.04076, Eq. 9);
    bce -1/2 E[log sigmoid(r)] - 1/2 E[log(1 - sigmoid(f))]. The halves of hinge and bce are VQGAN's. Raises ValueError for another kind.
    """
    check_adversarial(kind)
    real, fake = wide(logits_real), wide(logits_fake)
    with torch.autocast(real.device.type, enabled=False):
        if kind == "hinge":
            return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        if kind == "lsgan":
            return ((real - 1).square().mean() + fake.square().mean()) / 2
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def check_adversarial(kind: str) -> None:
    if kind not in ADVERSARIAL:
        raise ValueError(f"adversarial loss must be one of {', '.join(ADVERSARIAL)}, got {kind!r}")


def feature_matching_loss(features_real: Sequence[Tensor], features_fake: Sequence[Tensor]) -> Tensor:
    """Mean over the discriminator's layers of the mean |difference| (pix2pixHD, arXiv:1711.11585, Eq. 4, which sums over layers).

    Lists of (B, C_i, d, h, w) -> () float32 or wider. The gradient reaches features_fake only. Raises ValueError when they do not match.
    """
    if len(features_real) != len(features_fake) or not features_real:
        raise ValueError(f"feature_matching_loss: needs as many real as fake features, got {len(features_real)} and {len(features_fake)}")
    return sum(reconstruction_loss(f, r.detach(), "l1") for r, f in zip(features_real, features_fake)) / len(features_real)


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """1/2 E[|dD/dx|^2] at real samples (arXiv:1801.04406, Eq. 9, without gamma), the mean over samples and patches.

    logits_real (B, 1, d, h, w) computed from real (B, C, D, H, W), which requires grad -> () float32 or wider, differentiable.
    The gradient is that of the sum over patches, its square is summed over elements and divided by B * d * h * w: for one patch this is
    the paper's formula, and it stays the same when a volume is tiled from crops. A mean over the logits would fall with the volume.
    Raises ValueError for logits of 16 bits (run the discriminator outside autocast: the squares underflow) or a real without gradient.
    """
    if not real.requires_grad:
        raise ValueError("r1_penalty: real does not require grad; call real.requires_grad_() before the discriminator sees it")
    if logits_real.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"r1_penalty: needs float32 logits, got {logits_real.dtype}; run the discriminator with autocast off here")
    with torch.autocast(real.device.type, enabled=False):
        grad, = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
        return wide(grad).square().sum() / (2 * logits_real.numel())


class LeCam(nn.Module):
    """LeCam regulariser of the discriminator (arXiv:2104.03310): E[(r - anchor_fake)^2] + E[(f - anchor_real)^2].

    forward(logits_real, logits_fake) -> () float32 or wider, 0 before the first update; it never changes the anchors.
    update(logits_real, logits_fake): the anchors, moving averages of the mean logits, take one step. Call it once per optimizer step with
    the logits (or their means, of any shape) of the whole step, after it succeeded: a repeated or skipped step then leaves no trace.
    The first update sets the anchors, so they need no correction for their start. Anchors are buffers, saved in the state dict.
    """
    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("anchor_real", torch.zeros(()))
        self.register_buffer("anchor_fake", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        step = torch.where(self.updates == 0, 1.0, 1 - self.decay)
        for anchor, logits in ((self.anchor_real, logits_real), (self.anchor_fake, logits_fake)):
            anchor += step * (logits.to(anchor.dtype).mean() - anchor)
        self.updates += 1

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        real, fake = wide(logits_real), wide(logits_fake)
        with torch.autocast(real.device.type, enabled=False):
            penalty = (real - self.anchor_fake).square().mean() + (fake - self.anchor_real).square().mean()
            return penalty * (self.updates > 0)


def adaptive_weight(recon_loss: Tensor, adv_loss: Tensor, last_layer: Tensor, limit: float = 1e4, scale: float = 1.0) -> Tensor:
    """|d recon_loss / d last_layer| / (|d adv_loss / d last_layer| + 1e-6), at most `limit` (VQGAN, arXiv:2012.09841, Eq. 7).

    Two () losses and the weight of the decoder's last layer, or any tensor that both depend on -> () float32 or wider, without gradient.
    The graphs are kept for the backward that follows. `scale`: the GradScaler's, so that 16-bit gradients do not underflow; it cancels.
    """
    norms = []
    for loss in (recon_loss, adv_loss):
        grad, = torch.autograd.grad(loss * scale, last_layer, retain_graph=True)
        norms.append(wide(grad).norm() / scale)
    ratio = (norms[0] / (norms[1] + 1e-6)).clamp(0, limit).detach()
    return torch.where(ratio.isfinite(), ratio, 0)               # 16-bit gradients overflow: the backward will tell


# ------------------------------------------------------------------------------------------------------------------- sub-crops


def crop_starts(shape: Sequence[int], size: Sequence[int] | None, generators: Sequence[torch.Generator]) -> list[tuple[int, int, int]]:
    """A random sub-crop's first voxel (D, H, W) for each sample of a batch of `shape` (B, C, D, H, W), from its own CPU generator.

    size None, or as long as the volume or longer: that axis is whole and starts at 0. Each generator gives three numbers in every case.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"crop_starts: needs one generator per sample, got {len(generators)} for {shape[0]} samples")
    rooms = [max(0, n - s) for n, s in zip(shape[2:], size or shape[2:])]
    draws = [[u.item() for u in torch.rand(3, generator=g, dtype=torch.float64)] for g in generators]  # item(): memtest.py fakes it
    return [tuple(int(u * (room + 1)) for u, room in zip(draw, rooms)) for draw in draws]


def sub_crop(x: Tensor, starts: Sequence[tuple[int, int, int]], size: Sequence[int] | None) -> Tensor:
    """x (B, C, D, H, W) cut at each sample's start -> (B, C, *size), an axis shorter than size stays whole. Differentiable.

    Give reconstruction and target the same starts. x itself is returned when nothing is cut.
    """
    size = [min(n, s) for n, s in zip(x.shape[2:], size or x.shape[2:])]
    if list(x.shape[2:]) == size:
        return x
    return torch.stack([sample[(slice(None), *(slice(a, a + n) for a, n in zip(start, size)))] for sample, start in zip(x, starts)])


# ------------------------------------------------------------------------------------------------------------- perceptual terms


class PerceptualLoss3d(nn.Module):
    """Distance of deep features, LPIPS (arXiv:1801.03924, Eq. 1) in 3D, without its learnt channel weights.

    recon, target (B, C, D, H, W) -> () float32 or wider: features at each position are scaled to unit length over channels; the squared
    difference is summed over channels and averaged over space, then over scales, channels and samples. From 0 to 4.
    `features`: any network (N, 1, D, H, W) -> list of (N, c_i, d_i, h_i, w_i); it sees each channel of the data as a sample, so one
    serves any number of channels. It is frozen, and the gradient reaches recon only. Random features do nearly as well as trained ones in
    dense prediction (arXiv:2103.10571). Memory: FEATURE_VOXELS, or one channel of one sample, at a time, recomputed in the backward.
    `eps` is added to the length: regions whose features are weaker count less (LPIPS: 1e-10, which lets the noise of flat air count as much
    as anatomy).
    """
    def __init__(self, features: nn.Module, eps: float = 1e-2):
        super().__init__()
        self.features, self.eps = features.eval().requires_grad_(False), eps

    def train(self, mode: bool = True) -> PerceptualLoss3d:
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        check_pair("PerceptualLoss3d", recon, target)
        total = torch.zeros((), dtype=torch.promote_types(recon.dtype, torch.float32), device=recon.device)
        with torch.autocast(recon.device.type, enabled=False):
            xs, ys = (v.flatten(0, 1)[:, None].split(max(1, FEATURE_VOXELS // recon[0, 0].numel())) for v in (recon, target.detach()))
            for x, y in zip(xs, ys):
                total = total + len(x) * checkpoint(self.distance, x, y, use_reentrant=False, preserve_rng_state=False)
        return total / (recon.shape[0] * recon.shape[1])

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (N, 1, D, H, W) -> (): the mean over scales and positions."""
        with torch.no_grad():
            reference = [unit(f, self.eps) for f in self.features(wide(y))]
        found = self.features(wide(x))
        return sum((unit(f, self.eps) - r).square().sum(1).mean() for f, r in zip(found, reference)) / len(reference)


def unit(f: Tensor, eps: float) -> Tensor:
    """Features (N, C, d, h, w) scaled to length 1 over channels; the root is taken of |f|^2 + eps^2, smooth at 0."""
    return f * (f.square().sum(1, keepdim=True) + eps ** 2).rsqrt()


class FeatureNet3d(nn.Module):
    """Small multi-scale 3D convolutional feature network for PerceptualLoss3d and its self-supervised training.

    x (B, C, D, H, W) -> list of (B * C, channels[i], D / 2^i, H / 2^i, W / 2^i), sizes rounded up: each channel is a sample, so the same
    weights serve any data. Per scale two 3^3 convolutions with LeakyReLU 0.2, the first of stride 2 from the second scale on (average
    pooling has no deterministic backward on CUDA). Any size works.
    Weights are orthogonal from a private generator: the same `seed` gives the same features in every process, and the global state is
    neither read nor moved. The filters of the first convolution have mean 0, so features see texture and edges, and no intensity offset.
    """
    def __init__(self, channels: Sequence[int] = (16, 32, 64), seed: int = 0):
        super().__init__()
        self.channels = tuple(channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"FeatureNet3d: channels needs a width of 1 or more for each scale, got {self.channels}")
        generator = torch.Generator().manual_seed(seed)
        self.scales = nn.ModuleList()
        for i, (width, out) in enumerate(zip((1, *self.channels), self.channels)):
            convs = [seeded_conv(width, out, 1 if i == 0 else 2, generator), seeded_conv(out, out, 1, generator)]
            self.scales.append(nn.Sequential(convs[0], nn.LeakyReLU(0.2), convs[1], nn.LeakyReLU(0.2)))
        first = self.scales[0][0].weight
        with torch.no_grad():
            first -= first.mean(dim=(1, 2, 3, 4), keepdim=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = x.flatten(0, 1)[:, None], []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return features

    def to_checkpoint(self) -> dict:
        """What `--task features` saves: kind, version, config and weights, loadable with weights_only=True."""
        return {"kind": "vae3d.features", "version": 1, "config": {"channels": list(self.channels)},
                "model": {k: v.detach().cpu().clone() for k, v in self.state_dict().items()}}

    @classmethod
    def from_checkpoint(cls, content: dict) -> FeatureNet3d:
        """The network that to_checkpoint described. Raises ValueError, in one line, for another kind, version or set of weights."""
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
        if kind != "vae3d.features":
            raise ValueError(f"feature file: kind must be vae3d.features, got {kind}; train.py --task features writes one")
        if content.get("version") != 1:
            raise ValueError(f"feature file: version {content.get('version')} is unknown, this file reads version 1")
        missing = [key for key in ("config", "model") if not isinstance(content.get(key), dict)]
        if missing or set(content["config"]) != {"channels"}:
            raise ValueError(f"feature file: needs config with channels, and model with weights, got the keys {sorted(content)}")
        channels, weights = content["config"]["channels"], content["model"]
        if not isinstance(channels, (list, tuple)) or not set(channels) <= {len(w) for w in weights.values() if w.dim()}:
            raise ValueError(f"feature file: its weights do not fit channels={channels}; write it again with train.py --task features")
        network = cls(channels)
        wanted = network.state_dict()
        wrong = sorted(set(wanted) ^ set(weights)) or [k for k in wanted if wanted[k].shape != weights[k].shape]
        if wrong:
            raise ValueError(f"feature file: {len(wrong)} weights do not fit channels={list(network.channels)}, first {wrong[0]}; "
                             f"write it again with train.py --task features")
        network.load_state_dict(weights)
        return network


def seeded_conv(in_channels: int, out_channels: int, stride: int, generator: torch.Generator) -> nn.Conv3d:
    """A 3^3 convolution with orthogonal weights (arXiv:1312.6120) from `generator`, scaled as He's for LeakyReLU 0.2, and bias 0."""
    conv = nn.utils.skip_init(nn.Conv3d, in_channels, out_channels, 3, stride, 1)
    rows = torch.randn(out_channels, in_channels * 27, generator=generator, dtype=torch.float64)
    tall = rows.T if rows.shape[0] < rows.shape[1] else rows
    q, r = torch.linalg.qr(tall)
    q = (q * r.diagonal().sign()).T if rows.shape[0] < rows.shape[1] else q * r.diagonal().sign()
    with torch.no_grad():                                        # rows of length 1 keep the variance; LeakyReLU takes 0.52 of it
        conv.weight.copy_((q * (2 / 1.04) ** 0.5).view_as(conv.weight))
        conv.bias.zero_()
    return conv


@torch.no_grad()
def degrade(x: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """x (B, C, D, H, W) -> x blurred, blocked and made noisy, the same shape; and how much (B, 3) in [0, 1], in the order of DEGRADATIONS.

    Each fault is there with probability 1/2, alike in all channels of a sample: Gaussian blur (sigma 0 to MAX_BLUR voxels), means over
    cubes (2 to MAX_BLOCK voxels), Gaussian noise (standard deviation 0 to MAX_NOISE). All chance comes from the sample's own CPU generator,
    so a sample is degraded alike on any device and in any batch.
    """
    if len(generators) != x.shape[0]:
        raise ValueError(f"degrade: needs one generator per sample, got {len(generators)} for {x.shape[0]} samples")
    out, parameters = [], []
    for sample, g in zip(wide(x), generators):                   # (C, D, H, W)
        chance, amount = torch.rand(2, 3, generator=g)
        noise = torch.randn(sample.shape, generator=g).to(sample)
        block = 2 + int(amount[1] * (MAX_BLOCK - 1))
        amount[1] = (block - 1) / (MAX_BLOCK - 1)
        amount = amount * (chance < 0.5)
        sample = blur(sample[None], MAX_BLUR * float(amount[0]))[0]
        sample = blocks(sample, block) if amount[1] > 0 else sample
        out.append(sample + MAX_NOISE * float(amount[2]) * noise)
        parameters.append(amount)
    return torch.stack(out).to(x.dtype), torch.stack(parameters).to(x.device)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of x (B, C, D, H, W) by sigma voxels, windows of 3 sigma, borders repeated."""
    if sigma <= 0:
        return x
    window, shape = _gaussian(2 * int(3 * sigma + 1) + 1, x.dtype, x.device, sigma), x.shape
    x, reach = x.flatten(0, 1)[:, None], window.numel() // 2
    for axis in (2, 3, 4):
        place = torch.arange(-reach, x.shape[axis] + reach, device=x.device).clamp(0, x.shape[axis] - 1)
        x = F.conv3d(x.index_select(axis, place), window.view([-1 if i == axis else 1 for i in range(5)]))
    return x.view(shape)


def blocks(x: Tensor, edge: int) -> Tensor:
    """x (C, D, H, W) with each cube of `edge` voxels, cut at the far borders, replaced by its mean."""
    means = F.avg_pool3d(x, [min(edge, n) for n in x.shape[1:]], ceil_mode=True)
    for axis in (1, 2, 3):
        means = means.repeat_interleave(edge, axis).narrow(axis, 0, x.shape[axis])
    return means


class FeatureScores(NamedTuple):
    loss: Tensor                                                 # () mean squared error of the guesses, mean over scales
    explained: Tensor                                            # (3,) share of each fault's variance explained, sample by sample


class FeatureTrainer(nn.Module):
    """Self-supervised training of FeatureNet3d: tell from the features of a crop and of its degraded copy what was done to it.

    forward(x, degraded (B, C, D, H, W), parameters (B, 3)), the last two from `degrade(x)` -> FeatureScores(loss, explained).
    Why this objective: the faults of a reconstruction are blur, blocks and noise, and features that tell these apart must look at the fine
    texture that the perceptual term is there to keep; no labels are needed (known degradations, siamese: RankIQA, arXiv:1707.08347). The
    heads, 1^3 convolutions averaged over space, read |difference of features of unit length|, just what PerceptualLoss3d squares. From the
    degraded crop alone scanner and resolution hide the fault: on held-out CT that explained 0.19, 0.02 and 0.74 of the variance of blur,
    blocks and noise after 700 steps of 8 crops of 16^3; the pair explained 0.40, 0.72 and 0.84 after 400.
    explained is 1 - error / variance of the parameters as they are drawn: 0 for a constant guess, 1 for a perfect one, and comparable
    between batches of any size. Save `trainer.features.to_checkpoint()`; the heads are thrown away.
    """
    def __init__(self, features: FeatureNet3d, eps: float = 1e-2, width: int = 32):
        super().__init__()
        self.features, self.eps = features, eps
        self.heads = nn.ModuleList(nn.Sequential(nn.Conv3d(c, width, 1), nn.LeakyReLU(0.2), nn.Conv3d(width, len(DEGRADATIONS), 1))
                                   for c in features.channels)

    def forward(self, x: Tensor, degraded: Tensor, parameters: Tensor) -> FeatureScores:
        check_pair("FeatureTrainer", degraded, x)
        target, guesses = parameters.repeat_interleave(x.shape[1], dim=0), []                 # (B * C, 3)
        for a, b, head in zip(self.features(x), self.features(degraded), self.heads):
            change = (unit(wide(a), self.eps) - unit(wide(b), self.eps)).abs() * a.shape[1] ** 0.5      # of order 1 for any width
            guesses.append(wide(head(change)).mean(dim=(2, 3, 4)))
        guesses = torch.stack(guesses)                                                        # (scales, B * C, 3)
        steps = MAX_BLOCK - 1                                    # half of them are 0, the others uniform in [0, 1] or {1 .. steps} / steps
        square = (steps + 1) * (2 * steps + 1) / (6 * steps ** 2) / 2
        variance = target.new_tensor([1 / 6 - 1 / 16, square - ((steps + 1) / (4 * steps)) ** 2, 1 / 6 - 1 / 16])
        error = (guesses.detach().mean(dim=0) - target).square().mean(dim=0)
        return FeatureScores((guesses - target).square().mean(), 1 - error / variance)


# ----------------------------------------------------------------------------------------------------------------- segmentation


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
