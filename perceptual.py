"""Perceptual distance of volumes by 3D features that need no download, and their self-supervised training. Needs torch and nothing else.

    loss = loss + 0.1 * PerceptualLoss3d(FeatureNet3d())(recon, x)

Losses are computed in float32 or wider, also under autocast. Perceptual and adversarial terms take sub-crops of the samples (`crop_starts`,
`sub_crop`), which bound their memory.

Shapes: B batch, C channels, D H W depth height width. Intensities are in [-1, 1].
Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

DEGRADATIONS = ("blur", "block", "noise")                        # in the order in which `degrade` applies them
MAX_BLUR, MAX_BLOCK, MAX_NOISE = 2.0, 4, 0.1                     # sigma in voxels, edge in voxels, standard deviation (100 HU of 2000)
FEATURE_VOXELS = 1 << 18                                         # seen by the feature network at a time; fewer are slow on a CPU


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


# ------------------------------------------------------------------------------------------------------- training of the features


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


def _gaussian(length: int, dtype: torch.dtype, device: torch.device, sigma: float = 1.5) -> Tensor:  # same as losses._gaussian
    x = torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2
    window = torch.exp(-x.square() / (2 * sigma ** 2))
    return window / window.sum()


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


# ---------------------------------------------------------------------------------------------------------------------- sub-crops


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


# ------------------------------------------------------------------------------------------------------------------------ helpers


def check_pair(name: str, recon: Tensor, target: Tensor) -> None:  # same as losses.check_pair
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), got {tuple(recon.shape)} and {tuple(target.shape)}")


def wide(x: Tensor) -> Tensor:  # same as losses.wide
    """x in float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
