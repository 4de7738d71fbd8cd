"""What a small denoiser learns: single balls of 16^3 voxels, of the right radii, and one latent by heart.

Training balls have a radius of U(3, 7) and lie anywhere inside. What a sample is, is measured here: one piece
of voxels above 0 that share faces, and nearly the ball of its volume. docs/LOG.md has what other settings do.
"""
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import diffusion
from diffusion import DiffusionConfig
from muon import Muon, groups_of
from unet import UNet, UNetConfig

EDGE = 16
PLACES = torch.stack(torch.meshgrid(*[torch.arange(EDGE) + 0.5] * 3, indexing="ij"))    # (3, D, H, W)


def balls(count, generator):
    """(count, 1, D, H, W): 1 inside, -1 outside, in between within a voxel of the surface."""
    radius = 3 + 4 * torch.rand(count, generator=generator)
    room = EDGE - 2 * radius[:, None]
    middle = radius[:, None] + torch.rand(count, 3, generator=generator) * room
    distance = (PLACES - middle.view(count, 3, 1, 1, 1)).square().sum(1).sqrt()
    return (radius.view(count, 1, 1, 1) - distance).clamp(-1, 1)[:, None]


def radii(volumes):
    """Of the balls that have as many voxels above 0."""
    voxels = (volumes > 0).sum((1, 2, 3, 4)).double()
    return (3 * voxels / (4 * math.pi)).pow(1 / 3).numpy()


def is_a_ball(volume):
    """volume (1, D, H, W): one piece, at most a fifth of whose voxels lie elsewhere than the ball's."""
    inside = volume[0] > 0
    if not inside.any():
        return False
    piece, before = torch.zeros_like(inside), -1
    piece[tuple(inside.nonzero()[0])] = True
    while piece.sum() > before:
        before, grown = piece.sum(), piece.clone()
        for axis in range(3):
            grown.narrow(axis, 1, EDGE - 1).logical_or_(piece.narrow(axis, 0, EDGE - 1))
            grown.narrow(axis, 0, EDGE - 1).logical_or_(piece.narrow(axis, 1, EDGE - 1))
        piece = grown & inside
    if (inside & ~piece).any():
        return False
    middle = PLACES[:, inside].mean(1).view(3, 1, 1, 1)
    ball = (PLACES - middle).square().sum(0).sqrt() < radii(volume[None])[0]
    return bool((inside != ball).sum() < 0.2 * inside.sum())


def kolmogorov_smirnov(a, b):
    """The largest distance of two samples' shares at or below a value."""
    at = np.sort(np.concatenate([a, b]))
    below = [np.searchsorted(np.sort(each), at, "right") / len(each) for each in (a, b)]
    return np.abs(below[0] - below[1]).max()


def test_what_is_measured():
    volumes = balls(50, torch.Generator().manual_seed(0))
    assert all(is_a_ball(volume) for volume in volumes)
    assert not is_a_ball(torch.minimum(volumes[0], -volumes[0])) and not is_a_ball(volumes[0] - 2)
    two = volumes[0].clone()
    two[0, 0, 0, 0] = two[0, -1, -1, -1] = 1
    assert not is_a_ball(two)
    block = -torch.ones(1, EDGE, EDGE, EDGE)
    block[0, 2:14, 2:14, 7:9] = 1
    assert not is_a_ball(block)
    known = 3 + 4 * torch.rand(50, generator=torch.Generator().manual_seed(0)).numpy()
    assert np.abs(radii(volumes) - known).max() < 0.1
    assert kolmogorov_smirnov(known, known) == 0 and kolmogorov_smirnov(known, known + 5) == 1
    assert kolmogorov_smirnov(np.arange(4.0), np.arange(4.0) + 1) == 0.25


def learned(cfg, channels, widths, draw, steps, generator, lr=3e-3, batch=8):
    """A small denoiser's averaged weights after `steps` of Muon, as a function of (x, t). draw gives a batch.

    One group of channels in group norm: a norm over each channel alone takes away the mean over a volume,
    which is what tells a radius where there is much noise.
    """
    torch.manual_seed(0)
    network = UNet(UNetConfig(channels, channels, widths, num_convs=1, residual=True, downsampling="conv",
                              norm_groups=1, act="silu", time_channels=64, attention_levels=1,
                              zero_head=True))
    average = copy.deepcopy(network).eval()
    optimizer = Muon(groups_of(network), lr=lr)
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 10) * (1 + math.cos(math.pi * step / steps)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = draw()
        eps = torch.randn(x.shape, generator=generator)
        # one level of each eighth, so that no step has little noise alone
        u = (torch.randperm(batch, generator=generator) + torch.rand(batch, generator=generator)) / batch
        loss = diffusion.loss(cfg, lambda x, t: network(x, t).logits, x, eps, u).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay = min(0.97, (1 + step) / (10 + step))
        with torch.no_grad():
            for kept, live in zip(average.parameters(), network.parameters()):
                kept.lerp_(live, 1 - decay)
    return lambda x, t: average(x, t).logits


@pytest.mark.slow
def test_a_denoiser_makes_single_balls_of_the_right_radii():
    """At least 90 % single balls, and a Kolmogorov-Smirnov distance of the radii of at most .15. A radius is
    decided in much noise, hence the shift.
    """
    generator = torch.Generator().manual_seed(0)
    real = balls(4096, generator)
    mean, std = real.mean(), real.std()
    cfg = DiffusionConfig(shift=6.0, steps=8)

    def draw():
        return (balls(8, generator) - mean) / std
    network = learned(cfg, 1, (16, 32, 64), draw, 330, generator)
    noise = torch.randn(128, 1, EDGE, EDGE, EDGE, generator=generator)
    found = torch.cat([diffusion.sample(cfg, network, part) for part in noise.split(32)]) * std + mean
    single = np.mean([is_a_ball(volume) for volume in found])
    distance = kolmogorov_smirnov(radii(found), radii(real))
    assert single >= 0.9 and distance <= 0.15, (single, distance)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [
    dict(shift=2.0), dict(kind="edm", p_mean=0.5, p_std=1.5), dict(kind="ddpm")
], ids=["rflow", "edm", "ddpm"])
def test_one_latent_is_learnt_by_heart(fields):
    """Every noise ends at it: 30 dB of its range at least; found: 34 to 40."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 4, 3, 3, 3, generator=generator)
    latent = nn.functional.interpolate(coarse, (8, 8, 8), mode="trilinear", align_corners=True)
    latent = (latent - latent.mean((2, 3, 4), True)) / latent.std((2, 3, 4), keepdim=True)
    cfg = DiffusionConfig(steps=12, **fields)
    network = learned(cfg, 4, (32, 64), lambda: latent.expand(8, -1, -1, -1, -1), 120, generator)
    found = diffusion.sample(cfg, network, torch.randn(4, 4, 8, 8, 8, generator=generator))
    error = (found - latent).square().mean((1, 2, 3, 4))
    decibels = 10 * ((latent.max() - latent.min()).square() / error).log10()
    assert decibels.min() >= 30, decibels
