"""Perceptual distance of volumes by 3D features that need no download, and their training. Needs torch alone.

    loss = loss + 0.1 * PerceptualLoss3d(FeatureNet3d())(recon, x)             # random features: a good start

    starts = crop_starts(x.shape, (32, 64, 64), generators)                    # bounds the memory of such
    terms loss = loss + 0.1 * distance(*(sub_crop(v, starts, (32, 64, 64)) for v in (recon, x)))

    trainer = FeatureTrainer(FeatureNet3d())                                   # features of one's own data
    loss = trainer(x, *degrade(x, generators)).loss

Follows: LPIPS (arXiv:1801.03924), random features (arXiv:2103.10571), orthogonal weights (arXiv:1312.6120),
known degradations (RankIQA, arXiv:1707.08347). Losses are computed in float32 or wider, also under autocast.

Shapes: B batch, C channels, D H W depth height width, N = B * C. Intensities are in [-1, 1].
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

DEGRADATIONS = ("blur", "block", "noise")    # in the order in which `degrade` applies them
MAX_BLUR = 2.0               # sigma of a Gaussian, in voxels
MAX_BLOCK = 4                # edge of a cube, in voxels
MAX_NOISE = 0.1              # standard deviation: 100 HU of a range of 2000
FEATURE_VOXELS = 1 << 18     # seen by the feature network at a time; fewer are slow on a CPU


class PerceptualLoss3d(nn.Module):
    """Distance of deep features, LPIPS (arXiv:1801.03924, Eq. 1) in 3D, without its learnt channel weights.

    recon, target (B, C, D, H, W) -> () float32 or wider, from 0 to 4: features at each position are scaled
    to unit length over channels; the squared difference is summed over channels and averaged over space,
    then over scales, channels and samples. `features`: any network (N, 1, D, H, W) -> list of (N, c_i, d_i,
    h_i, w_i). It sees each channel of the data as a sample, so one serves any number of channels. It is
    frozen, and the gradient reaches recon only. Random features do nearly as well as trained ones in dense
    prediction (arXiv:2103.10571). `eps` is added to the length: regions whose features are weaker count
    less (LPIPS has 1e-10, which lets the noise of flat air count as much as anatomy). Memory:
    FEATURE_VOXELS, or one channel of one sample, at a time, recomputed in the backward.
    """
    def __init__(self, features: nn.Module, eps: float = 1e-2):
        super().__init__()
        self.features = features.eval().requires_grad_(False)
        self.eps = eps

    def train(self, mode: bool = True) -> PerceptualLoss3d:
        super().train(mode)
        self.features.eval()
        return self

    def forward(self, recon: Tensor, target: Tensor) -> Tensor:
        check_pair("PerceptualLoss3d", recon, target)
        total = recon.new_zeros((), dtype=torch.promote_types(recon.dtype, torch.float32))
        count = max(1, FEATURE_VOXELS // recon[0, 0].numel())        # samples at a time
        with torch.autocast(recon.device.type, enabled=False):
            xs, ys = (v.flatten(0, 1)[:, None].split(count) for v in (recon, target.detach()))
            for x, y in zip(xs, ys):
                mean = checkpoint(self.distance, x, y, use_reentrant=False, preserve_rng_state=False)
                total = total + len(x) * mean
        return total / (recon.shape[0] * recon.shape[1])

    def distance(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (N, 1, D, H, W) -> (): the mean over scales and positions."""
        with torch.no_grad():
            wanted = [unit(f, self.eps) for f in self.features(wide(y))]
        found = [unit(f, self.eps) for f in self.features(wide(x))]
        # Eq. 1 with w = 1: mean over positions of sum over channels of (f_x - f_y)^2
        return sum((a - b).square().sum(1).mean() for a, b in zip(found, wanted)) / len(wanted)


def unit(f: Tensor, eps: float) -> Tensor:
    """Features (N, C, d, h, w) scaled to length 1 over channels, the length sqrt(|f|^2 + eps^2)."""
    return f * (f.square().sum(1, keepdim=True) + eps ** 2).rsqrt()


class FeatureNet3d(nn.Module):
    """Small multi-scale 3D convolutional feature network for PerceptualLoss3d.

    x (B, C, D, H, W) -> list of (B * C, channels[i], D / 2^i, H / 2^i, W / 2^i), sizes rounded up: each
    channel is a sample, so the same weights serve any data. Per scale there are two 3^3 convolutions with
    LeakyReLU 0.2, the first of stride 2 from the second scale on (average pooling has no deterministic
    backward on CUDA). Any size works. Weights are orthogonal from a private generator: the same `seed`
    gives the same features in every process, and the global state is neither read nor moved. The filters of
    the first convolution have mean 0, so that features see texture and edges, and no intensity offset.
    """
    def __init__(self, channels: Sequence[int] = (16, 32, 64), seed: int = 0):
        super().__init__()
        self.channels = tuple(channels)
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"FeatureNet3d: channels needs a width of 1 or more for each scale, "
                             f"got {self.channels}")
        generator = torch.Generator().manual_seed(seed)
        self.scales = nn.ModuleList()
        for i, (width, out) in enumerate(zip((1, *self.channels), self.channels)):
            first = seeded_conv(width, out, 1 if i == 0 else 2, generator)
            second = seeded_conv(out, out, 1, generator)
            self.scales.append(nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2)))
        filters = self.scales[0][0].weight
        with torch.no_grad():
            filters -= filters.mean(dim=(1, 2, 3, 4), keepdim=True)

    def forward(self, x: Tensor) -> list[Tensor]:
        x, features = x.flatten(0, 1)[:, None], []
        for scale in self.scales:
            x = scale(x)
            features.append(x)
        return features

    def to_checkpoint(self) -> dict:
        """What `--task features` saves: kind, version, config, weights; loadable with weights_only=True."""
        weights = {k: v.detach().cpu().clone() for k, v in self.state_dict().items()}
        config = {"channels": list(self.channels)}
        return {"kind": "vae3d.features", "version": 1, "config": config, "model": weights}

    @classmethod
    def from_checkpoint(cls, content: dict) -> FeatureNet3d:
        """The network that to_checkpoint described.

        Raises ValueError, in one line, for another kind, version or set of weights.
        """
        # first what the file says it is
        kind = content.get("kind") if isinstance(content, dict) else type(content).__name__
        if kind != "vae3d.features":
            raise ValueError(f"feature file: kind must be vae3d.features, got {kind}; "
                             f"train.py --task features writes one")
        if content.get("version") != 1:
            raise ValueError(f"feature file: version {content.get('version')} is unknown, "
                             f"this file reads version 1")
        missing = [key for key in ("config", "model") if not isinstance(content.get(key), dict)]
        if missing or set(content["config"]) != {"channels"}:
            raise ValueError(f"feature file: needs config with channels, and model with weights, "
                             f"got the keys {sorted(content)}")

        # then whether the widths occur in the weights at all, before a network of these widths is built
        channels, weights = content["config"]["channels"], content["model"]
        lengths = {len(w) for w in weights.values() if w.dim()}
        if not isinstance(channels, (list, tuple)) or not set(channels) <= lengths:
            raise ValueError(f"feature file: its weights do not fit channels={channels}; "
                             f"write it again with train.py --task features")
        network = cls(channels)
        wanted = network.state_dict()
        wrong = sorted(set(wanted) ^ set(weights))
        if not wrong:
            wrong = [k for k in wanted if wanted[k].shape != weights[k].shape]
        if wrong:
            raise ValueError(f"feature file: {len(wrong)} weights do not fit "
                             f"channels={list(network.channels)}, first {wrong[0]}; "
                             f"write it again with train.py --task features")
        network.load_state_dict(weights)
        return network


def seeded_conv(in_channels: int, out_channels: int, stride: int, generator: torch.Generator) -> nn.Conv3d:
    """A 3^3 convolution with orthogonal weights (arXiv:1312.6120) from `generator`, and bias 0.

    Rows of length 1 keep the variance, of which LeakyReLU 0.2 takes 0.52: the gain is He's, sqrt(2 / 1.04).
    """
    conv = nn.utils.skip_init(nn.Conv3d, in_channels, out_channels, 3, stride, 1)
    # Where the generator is, as conv is: not where a network is built without weights (torch.device("meta"))
    rows = torch.randn(out_channels, in_channels * 27, generator=generator, dtype=torch.float64,
                       device=generator.device)
    # QR makes the columns of a tall matrix orthogonal: a wide one is transposed before and after
    is_wide = rows.shape[0] < rows.shape[1]
    q, r = torch.linalg.qr(rows.T if is_wide else rows)
    q = q * r.diagonal().sign()                                      # unique, whatever LAPACK does
    if is_wide:
        q = q.T
    with torch.no_grad():
        conv.weight.copy_((q * (2 / 1.04) ** 0.5).view_as(conv.weight))
        conv.bias.zero_()
    return conv


# -------------------------------------------------------------------------------------- training of features


@torch.no_grad()
def degrade(x: Tensor, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor]:
    """x (B, C, D, H, W) -> x blurred, blocked and made noisy; and how much, (B, 3) in [0, 1].

    The amounts are in the order of DEGRADATIONS. Each fault is there with probability 1/2, alike in all
    channels of a sample: Gaussian blur (sigma 0 to MAX_BLUR voxels), means over cubes (2 to MAX_BLOCK
    voxels), Gaussian noise (standard deviation 0 to MAX_NOISE). All chance comes from the sample's own CPU
    generator, so that a sample is degraded alike on any device and in any batch.
    """
    if len(generators) != x.shape[0]:
        raise ValueError(f"degrade: needs one generator per sample, "
                         f"got {len(generators)} for {x.shape[0]} samples")
    out, parameters = [], []
    for sample, g in zip(wide(x), generators):                       # (C, D, H, W)
        # first all numbers are drawn, whichever faults there will be
        chance, amount = torch.rand(2, 3, generator=g)
        noise = torch.randn(sample.shape, generator=g).to(sample)
        edge = 2 + int(amount[1] * (MAX_BLOCK - 1))
        amount[1] = (edge - 1) / (MAX_BLOCK - 1)
        amount = amount * (chance < 0.5)
        # then the faults, one upon the other
        sample = blur(sample[None], MAX_BLUR * float(amount[0]))[0]
        if amount[1] > 0:
            sample = blocks(sample, edge)
        out.append(sample + MAX_NOISE * float(amount[2]) * noise)
        parameters.append(amount)
    return torch.stack(out).to(x.dtype), torch.stack(parameters).to(x.device)


def blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of x (B, C, D, H, W) by sigma voxels; the kernel reaches 3 sigma, borders repeat."""
    if sigma <= 0:
        return x
    shape = x.shape
    kernel = _gaussian(2 * int(3 * sigma + 1) + 1, x.dtype, x.device, sigma)
    reach = kernel.numel() // 2
    x = x.flatten(0, 1)[:, None]                                     # (B * C, 1, D, H, W)
    for axis in (2, 3, 4):
        place = torch.arange(-reach, x.shape[axis] + reach, device=x.device).clamp(0, x.shape[axis] - 1)
        along = kernel.view([-1 if i == axis else 1 for i in range(5)])
        x = F.conv3d(x.index_select(axis, place), along)
    return x.view(shape)


def blocks(x: Tensor, edge: int) -> Tensor:
    """x (C, D, H, W) with each cube of `edge` voxels, cut at the far borders, replaced by its mean."""
    means = F.avg_pool3d(x, [min(edge, n) for n in x.shape[1:]], ceil_mode=True)
    for axis in (1, 2, 3):
        means = means.repeat_interleave(edge, axis).narrow(axis, 0, x.shape[axis])
    return means


# same as losses._gaussian
def _gaussian(length: int, dtype: torch.dtype, device: torch.device, sigma: float = 1.5) -> Tensor:
    """A Gaussian kernel (length,) whose elements add up to 1."""
    x = torch.arange(length, dtype=dtype, device=device) - (length - 1) / 2
    kernel = torch.exp(-x.square() / (2 * sigma ** 2))
    return kernel / kernel.sum()


class FeatureScores(NamedTuple):
    loss: Tensor             # () mean squared error of the guesses, mean over scales
    explained: Tensor        # (3,) share of each fault's variance that is explained, sample by sample


class FeatureTrainer(nn.Module):
    """Self-supervised training of FeatureNet3d: tell from features what was done to a copy of a crop.

    forward(x, degraded (B, C, D, H, W), parameters (B, 3)), the last two from `degrade(x)`, ->
    FeatureScores. Why this objective: the faults of a reconstruction are blur, blocks and noise, and
    features that tell these apart must look at the fine texture that the perceptual term is there to keep;
    no labels are needed (known degradations, siamese: RankIQA, arXiv:1707.08347). The heads, 1^3
    convolutions averaged over space, read |difference of features of unit length|, just what
    PerceptualLoss3d squares. From the degraded crop alone scanner and resolution hide the fault: on
    held-out CT that explained 0.19, 0.02 and 0.74 of the variance of blur, blocks and noise after 700 steps
    of 8 crops of 16^3; the pair explained 0.40, 0.72 and 0.84 after 400. explained is 1 - error / variance
    of the parameters as they are drawn: 0 for a constant guess, 1 for a perfect one, and comparable between
    batches of any size. Save `trainer.features.to_checkpoint()`; the heads are thrown away.
    """
    def __init__(self, features: FeatureNet3d, eps: float = 1e-2, width: int = 32):
        super().__init__()
        self.features, self.eps = features, eps
        self.heads = nn.ModuleList()
        for c in features.channels:
            layers = nn.Conv3d(c, width, 1), nn.LeakyReLU(0.2), nn.Conv3d(width, len(DEGRADATIONS), 1)
            self.heads.append(nn.Sequential(*layers))

    def forward(self, x: Tensor, degraded: Tensor, parameters: Tensor) -> FeatureScores:
        check_pair("FeatureTrainer", degraded, x)
        # a guess of each scale
        guesses = []
        for a, b, head in zip(self.features(x), self.features(degraded), self.heads):
            change = (unit(wide(a), self.eps) - unit(wide(b), self.eps)).abs()
            change = change * a.shape[1] ** 0.5                      # of order 1 for any width
            guesses.append(wide(head(change)).mean(dim=(2, 3, 4)))
        guesses = torch.stack(guesses)                               # (scales, B * C, 3)
        target = parameters.repeat_interleave(x.shape[1], dim=0)     # (B * C, 3)

        # the variance of what is drawn: half of it is 0, the rest uniform in [0, 1], for which it is
        # 1/6 - 1/16, or in {1 .. n} / n for cubes: mean square (n + 1) (2 n + 1) / (6 n^2) / 2 less mean^2
        n = MAX_BLOCK - 1
        mean_square = (n + 1) * (2 * n + 1) / (6 * n ** 2) / 2
        uniform = 1 / 6 - 1 / 16
        variance = target.new_tensor([uniform, mean_square - ((n + 1) / (4 * n)) ** 2, uniform])
        error = (guesses.detach().mean(dim=0) - target).square().mean(dim=0)
        return FeatureScores((guesses - target).square().mean(), 1 - error / variance)


# ------------------------------------------------------------------------------------------------- sub-crops


def crop_starts(shape: Sequence[int], size: Sequence[int] | None,
                generators: Sequence[torch.Generator]) -> list[tuple[int, int, int]]:
    """First voxel (D, H, W) of a random sub-crop of each sample of a batch of `shape` (B, C, D, H, W).

    size None, or as long as the volume or longer: that axis is whole and starts at 0. Each sample's own CPU
    generator gives three numbers in every case.
    """
    if len(generators) != shape[0]:
        raise ValueError(f"crop_starts: needs one generator per sample, "
                         f"got {len(generators)} for {shape[0]} samples")
    rooms = [max(0, n - s) for n, s in zip(shape[2:], size or shape[2:])]
    starts = []
    for g in generators:
        # item() rather than tolist(): a step on fake tensors can read the former
        draws = [u.item() for u in torch.rand(3, generator=g, dtype=torch.float64)]
        starts.append(tuple(int(u * (room + 1)) for u, room in zip(draws, rooms)))
    return starts


def sub_crop(x: Tensor, starts: Sequence[tuple[int, int, int]], size: Sequence[int] | None) -> Tensor:
    """x (B, C, D, H, W) cut at each sample's start -> (B, C, *size), an axis shorter than size stays whole.

    Differentiable. Give reconstruction and target the same starts. x itself is returned when nothing is cut.
    """
    size = [min(n, s) for n, s in zip(x.shape[2:], size or x.shape[2:])]
    if list(x.shape[2:]) == size:
        return x
    cut = []
    for sample, start in zip(x, starts):
        d, h, w = (slice(a, a + n) for a, n in zip(start, size))
        cut.append(sample[:, d, h, w])
    return torch.stack(cut)


# --------------------------------------------------------------------------------------------------- helpers


# same as losses.check_pair
def check_pair(name: str, recon: Tensor, target: Tensor) -> None:
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), "
                         f"got {tuple(recon.shape)} and {tuple(target.shape)}")


# same as losses.wide
def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
