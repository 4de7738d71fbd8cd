"""losses.py against slow obvious versions, MONAI's SSIM, gradcheck, and the defects that concern losses."""
import io
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    FeatureNet3d,
    FeatureTrainer,
    LeCam,
    LossConfig,
    PatchDiscriminator3d,
    PerceptualLoss3d,
    adaptive_weight,
    crop_starts,
    degrade,
    dice,
    dice_scores,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    kl_loss,
    occupancy_iou,
    psnr,
    r1_penalty,
    reconstruction_loss,
    segmentation_loss,
    sharpness,
    ssim,
    structure_loss,
    sub_crop,
)

ROOT = Path(__file__).parents[1]


def pair(shape=(2, 3, 5, 6, 7), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


class Largest(TorchDispatchMode):
    """Elements of the largest float32 tensor that an operation returned."""
    float32 = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
            self.float32 = max(self.float32, out.numel())
        return out


def saved_bytes(function):
    """Bytes of the distinct storages that autograd keeps for the backward of function()."""
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(kept.values())


def generators(n, seed=0):
    return [torch.Generator().manual_seed(seed + i) for i in range(n)]


def slow_loss(recon, target, kind, channel_weights=None, foreground_weight=1.0, background=-1.0):
    """One element at a time, as the docstring says."""
    total = 0.0
    for b in range(recon.shape[0]):
        for c in range(recon.shape[1]):
            for at in torch.cartesian_prod(*(torch.arange(n) for n in recon.shape[2:])).tolist():
                d = float(recon[b, c][tuple(at)] - target[b, c][tuple(at)])
                error = {"l1": abs(d), "mse": d * d, "l1_l2": (abs(d) + d * d) / 2}[kind]
                weight = 1.0 if channel_weights is None else channel_weights[c]
                if any(abs(float(v) - background) > 0.05 for v in target[(b, slice(None), *at)]):
                    weight *= foreground_weight
                total += weight * error
    return total / recon.numel()


@pytest.mark.parametrize("kind", losses.RECONSTRUCTION)
@pytest.mark.parametrize("options", [{}, {"channel_weights": (1.0, 0.0, 3.0)}, {"foreground_weight": 5.0, "background": 0.0}])
def test_reconstruction_equals_the_obvious_version(kind, options, monkeypatch):
    recon, target = pair((2, 3, 3, 4, 2))
    target[:, :, 1:] = 0                                         # some background voxels
    for slab in (1, 10, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        got = reconstruction_loss(recon, target, kind, **options)
        assert abs(float(got) - slow_loss(recon, target, kind, **options)) < 1e-12


@pytest.mark.parametrize("kind", losses.RECONSTRUCTION)
def test_reconstruction_gradcheck(kind, monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", 40)
    recon, target = pair((2, 2, 3, 4, 2))
    recon.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda r: 3 * reconstruction_loss(r, target, kind, (1.0, 2.0), 4.0, 0.0), (recon,))


@pytest.mark.parametrize("kind,reference", [("l1", torch.nn.functional.l1_loss), ("mse", torch.nn.functional.mse_loss)])
def test_reconstruction_parity_with_torch(kind, reference):
    recon, target = pair(dtype=torch.float32)
    ours, theirs = recon.clone().requires_grad_(), recon.clone().requires_grad_()
    a, b = reconstruction_loss(ours, target, kind), reference(theirs, target)
    a.backward(), b.backward()
    assert abs((a - b).item()) < 1e-6 and (ours.grad - theirs.grad).abs().max() < 1e-8


def test_reconstruction_of_half_precision_makes_no_full_size_float32(monkeypatch):
    """DEFECTS: the loss side keeps pace. The largest tensor made in forward and backward is the 16-bit gradient."""
    monkeypatch.setattr(losses, "SLAB_VOXELS", 1000)
    recon, target = (t.to(torch.bfloat16) for t in pair((1, 1, 40, 20, 20), torch.float32))
    recon.requires_grad_(True)

    with Largest() as seen:
        reconstruction_loss(recon, target).backward()
    assert seen.float32 <= 1200 < recon.numel()
    assert recon.grad.dtype == torch.bfloat16


def test_micro_batches_add_up_with_weights():
    recon, target = pair((4, 2, 4, 4, 4))
    whole = reconstruction_loss(recon, target, "l1", (1.0, 2.0), 3.0)
    parts = [reconstruction_loss(recon[i:i + 1], target[i:i + 1], "l1", (1.0, 2.0), 3.0) for i in range(4)]
    assert abs(float(whole - sum(parts) / 4)) < 1e-12


def test_fp16_gradient_does_not_underflow_under_loss_scaling():
    """1 / numel is below fp16's smallest number for a large volume; the scaled gradient must come out all the same."""
    recon = torch.zeros(1, 1, 300, 300, 300, dtype=torch.float16, requires_grad=True)
    loss = reconstruction_loss(recon, torch.ones_like(recon), "l1")
    (loss * 65536.0).backward()
    assert recon.grad.min() == recon.grad.max() < 0
    assert abs(float(recon.grad.flatten()[0]) + 65536 / recon.numel()) < 3e-5


def test_kl_is_a_mean_and_equals_torch_distributions():
    mu, logvar = pair((2, 4, 3, 4, 5))
    q = torch.distributions.Normal(mu, (0.5 * logvar).exp())
    reference = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).mean()
    assert abs(float(kl_loss(mu, logvar) - reference)) < 1e-12


def test_kl_per_voxel_is_the_same_for_a_crop_and_a_volume_tiled_from_it():
    """DEFECTS 9."""
    mu, logvar = pair((1, 4, 4, 4, 4))
    big = [t.repeat(1, 1, 2, 2, 2) for t in (mu, logvar)]
    assert abs(float(kl_loss(mu, logvar) - kl_loss(*big))) < 1e-12
    x, y = pair((1, 1, 8, 8, 8))
    assert abs(float(reconstruction_loss(x, y) - reconstruction_loss(x.repeat(1, 1, 2, 2, 2), y.repeat(1, 1, 2, 2, 2)))) < 1e-12


def test_kl_stays_finite_in_half_precision():
    """DEFECTS 10: exp(20) and the square of 300 overflow in fp16; the island is float32."""
    mu, logvar = torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16), torch.full((1, 1, 2, 2, 2), 20.0, dtype=torch.float16)
    value = kl_loss(mu, logvar)
    assert value.dtype == torch.float32 and torch.isfinite(value)
    with torch.autocast("cpu", torch.bfloat16):
        assert abs(float(kl_loss(mu, logvar) / value) - 1) < 1e-6


def test_psnr_by_hand():
    target = torch.zeros(1, 1, 4, 4, 4)
    assert abs(float(psnr(target + 0.1, target, 2.0)) - 10 * math.log10(4 / 0.01)) < 1e-4
    assert psnr(target, target) == math.inf


def test_ssim_properties(monkeypatch):
    x, y = pair((1, 2, 20, 14, 13))
    assert abs(float(ssim(x, x)) - 1) < 1e-12
    whole = ssim(x, y)
    monkeypatch.setattr(losses, "SLAB_VOXELS", 800)              # slabs of 2 slices
    assert abs(float(ssim(x, y) - whole)) < 1e-12
    assert torch.isfinite(ssim(x[..., :2, :5, :1], y[..., :2, :5, :1]))          # axes shorter than the window


def test_ssim_equals_monai():
    metrics = pytest.importorskip("monai.metrics.regression", reason="monai is a development dependency")
    x, y = (t.sigmoid() * 2 - 1 for t in pair((2, 1, 16, 15, 14), torch.float64))
    reference = metrics.SSIMMetric(spatial_dims=3, data_range=2.0)(x, y).mean()
    assert abs(float(ssim(x, y, 2.0)) - float(reference)) < 1e-6


def test_errors_say_what_is_wrong():
    x, y = pair((1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 4\) and \(1, 1, 4, 4, 3\)"):
        reconstruction_loss(x, y[..., :3])
    with pytest.raises(ValueError, match="2 factors, the data has 1 channels"):
        reconstruction_loss(x, y, "l1", (1.0, 2.0))
    with pytest.raises(ValueError, match="l1, mse, l1_l2, got 'l3'"):
        LossConfig(recon="l3")


# ---- structure, sharpness, occupancy

def slow_structure(recon, target, channel_weights=None, foreground_weight=1.0, background=-1.0):
    """One position at a time: the 27 taps of each of the three kernels, borders clamped."""
    tap, edge, total = [1, 2, 1], [-1, 0, 1], 0.0
    size = recon.shape[2:]
    for b, c, *at in torch.cartesian_prod(*(torch.arange(n) for n in recon.shape)).tolist():
        weight = 1.0 if channel_weights is None else channel_weights[c]
        if any(abs(float(v) - background) > 0.05 for v in target[(b, slice(None), *at)]):
            weight *= foreground_weight
        for axis in range(3):
            g = 0.0
            for offset in torch.cartesian_prod(*[torch.arange(3)] * 3).tolist():
                place = tuple(min(max(p + o - 1, 0), n - 1) for p, o, n in zip(at, offset, size))
                k = math.prod(edge[o] if i == axis else tap[o] for i, o in enumerate(offset)) / 32
                g += k * float(recon[b, c][place] - target[b, c][place])
            total += weight * abs(g)
    return total / (3 * recon.numel())


@pytest.mark.parametrize("shape", [(2, 2, 4, 3, 2), (1, 1, 1, 4, 3), (1, 1, 2, 1, 1)])
@pytest.mark.parametrize("options", [{}, {"channel_weights": (0.5, 3.0), "foreground_weight": 5.0, "background": 0.0}])
def test_structure_equals_the_obvious_version(shape, options, monkeypatch):
    recon, target = pair(shape)
    target[:, :, 1:] = 0
    options = {k: v[:shape[1]] if k == "channel_weights" else v for k, v in options.items()}
    for slab in (1, 25, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert abs(float(structure_loss(recon, target, **options)) - slow_structure(recon, target, **options)) < 1e-12


def test_structure_of_a_ramp_is_its_slope():
    ramp = 0.25 * torch.arange(8.0).view(1, 1, 1, 8, 1).expand(1, 1, 5, 8, 6)
    gradients = losses.sobel(ramp)
    assert torch.equal(gradients[1][..., 1:-1, :], torch.full((1, 1, 5, 6, 6), 0.25))
    assert gradients[0].abs().max() == gradients[2].abs().max() == 0


@pytest.mark.parametrize("shape", [(2, 2, 5, 4, 3), (1, 1, 1, 3, 2)])
@pytest.mark.parametrize("slab", [1, 30, 1 << 21])
def test_structure_gradcheck(shape, slab, monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
    recon, target = pair(shape)
    recon.requires_grad_(True)
    assert gradcheck(lambda r: 3 * structure_loss(r, target, (1.0, 2.0)[:shape[1]], 4.0, 0.0), (recon,))


def test_structure_keeps_its_inputs_and_widens_slabs_only(monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", 1000)
    recon, target = (t.to(torch.bfloat16) for t in pair((1, 1, 40, 20, 20), torch.float32))
    recon.requires_grad_(True)
    assert saved_bytes(lambda: structure_loss(recon, target)) == 2 * 2 * recon.numel()
    with Largest() as seen:
        structure_loss(recon, target, None, 2.0).backward()
    assert seen.float32 <= 4000 < recon.numel(), seen.float32    # slabs of 2 slices: 4 more as halo, 22 x 22 with borders
    assert recon.grad.dtype == torch.bfloat16


def test_sharpness(monkeypatch):
    x, y = pair((2, 2, 7, 6, 5))
    energy = [sum(t.diff(dim=axis).square().sum() for axis in (2, 3, 4)) for t in (x, y)]
    for slab in (1, 100, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert abs(float(sharpness(x, y) - energy[0] / energy[1])) < 1e-12
    values = [float(sharpness(losses.blur(x, s), x)) for s in (0.0, 0.5, 1.0, 2.0)]
    assert values[0] == 1 and values == sorted(values, reverse=True)
    assert not torch.isfinite(sharpness(x, torch.zeros_like(x)))


def test_occupancy_iou_by_hand(monkeypatch):
    recon, target = torch.full((2, 2, 3, 4, 5), -1.0), torch.full((2, 2, 3, 4, 5), -1.0)
    target[0, 0, 0, 0, :4], target[1, 1, 2, 0, :2] = 0.5, -0.9   # 6 occupied voxels, in one channel or the other
    recon[0, 1, 0, 0, 1:5], recon[1, 0, 0] = 0.2, -0.96          # 4 of them, 3 shared; -0.96 is not far enough
    for slab in (1, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert abs(float(occupancy_iou(recon, target, -1.0)) - 3 / 7) < 1e-7
    assert occupancy_iou(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), 0.0) == 1
    assert occupancy_iou(recon, target, -1.0, threshold=3.0) == 1


# ---- discriminator

@pytest.mark.parametrize("norm,count", [("none", 2_771_425), ("spectral", 2_771_425), ("group", 2_771_873), ("instance", 2_771_873)])
def test_discriminator_parameter_count(norm, count):
    assert sum(p.numel() for p in PatchDiscriminator3d(1, 32, 3, norm=norm).parameters()) == count


@pytest.mark.parametrize("norm,theirs", [("group", {"norm": ("group", {"num_groups": 32})}), ("none", {"norm": None, "bias": True}),
                                         ("instance", {"norm": ("instance", {"affine": True})})])
def test_discriminator_equals_monai(norm, theirs):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is a development dependency")
    if norm != "none":                                           # the count that the docstring names is that of their default, batch norm
        assert sum(p.numel() for p in nets.PatchDiscriminator(3, 32, 1).parameters()) == 2_771_873
    ours, reference = PatchDiscriminator3d(1, norm=norm), nets.PatchDiscriminator(3, 32, 1, **theirs)
    with torch.no_grad():
        for a, b in zip(ours.parameters(), reference.parameters()):
            assert a.shape == b.shape
            b.copy_(a + 0.01 * torch.randn_like(a))
            a.copy_(b)
        x = torch.randn(2, 1, 26, 24, 33)
        logits, features = ours(x)
        *expected, last = reference(x)
    assert len(features) == len(expected) == 4
    for a, b in zip([*features, logits], [*expected, last]):
        assert (a - b).abs().max() < 1e-5, (a - b).abs().max()


@pytest.mark.parametrize("options", [{}, {"strides": (1, 2, 2)}, {"layers": 2, "strides": ((1, 2, 2), (2, 2, 1))}, {"kernel": 3},
                                     {"layers": 1, "kernel": (1, 4, 4)}, {"layers": 4, "kernel": 3, "norm": "spectral"}])
def test_discriminator_takes_every_size_from_the_least_on(options):
    disc = PatchDiscriminator3d(2, 4, **options)
    least = disc.least_size
    logits, features = disc(torch.randn(1, 2, *least))
    assert logits.shape[1] == 1 and min(logits.shape) > 0 and len(features) == options.get("layers", 3) + 1
    assert disc(torch.randn(1, 2, *(n + 1 for n in least)))[0].isfinite().all()
    for axis in range(3):
        size = [n - (i == axis) for i, n in enumerate(least)]
        if min(size) > 0:
            with pytest.raises(ValueError, match=f"need at least {','.join(map(str, least))}"):
                disc(torch.randn(1, 2, *size))


def test_discriminator_errors():
    with pytest.raises(ValueError, match=r"needs \(B, 2, D, H, W\)"):
        PatchDiscriminator3d(2, 4)(torch.randn(1, 1, 24, 24, 24))
    with pytest.raises(ValueError, match="none, group, instance, spectral, got 'batch'"):
        PatchDiscriminator3d(1, norm="batch")
    with pytest.raises(ValueError, match="each of the 3 layers"):
        PatchDiscriminator3d(1, strides=((1, 2, 2), (2, 2, 2)))
    with pytest.raises(ValueError, match="map of one voxel"):    # its normalised value would be 0, whatever the input
        PatchDiscriminator3d(1, 4, norm="instance", kernel=3)(torch.randn(1, 1, 1, 1, 1))
    assert PatchDiscriminator3d(1, 4, norm="group", kernel=3)(torch.randn(1, 1, 1, 1, 1))[0].isfinite().all()


def test_spectral_norm_is_exact_and_keeps_no_state():
    torch.manual_seed(0)
    conv = losses.SpectralConv3d(3, 5, 2).double()
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    out = conv(x)
    weight = conv.weight.detach().clone().requires_grad_()       # the obvious version: divide by torch's 2-norm
    expected = F.conv3d(x, weight / torch.linalg.matrix_norm(weight.flatten(1), 2), conv.bias)
    g = torch.randn_like(out)
    out.backward(g), expected.backward(g)
    assert (out - expected).abs().max() < 1e-12 and (conv.weight.grad - weight.grad).abs().max() < 1e-12
    assert torch.equal(conv(x), out) and set(before) == {"weight", "bias"}
    assert all(torch.equal(before[k], v) for k, v in conv.state_dict().items())


def test_discriminator_batch_of_samples_is_its_samples():
    """No norm ties samples together, so micro-batches add up to a batch."""
    for norm in losses.DISC_NORMS:
        disc, x = PatchDiscriminator3d(1, 4, 1, norm=norm).double(), torch.randn(2, 1, 8, 8, 8, dtype=torch.float64)
        whole, parts = disc(x)[0], torch.cat([disc(x[:1])[0], disc(x[1:])[0]])
        assert (whole - parts).abs().max() < 1e-12, norm


# ---- adversarial terms

@pytest.mark.parametrize("kind,generator,discriminator", [
    ("hinge", -(0.5 - 2) / 2, ((0.5 + 0) / 2 + (1.5 + 0) / 2) / 2),
    ("lsgan", ((0.5 - 1) ** 2 + (-2 - 1) ** 2) / 4, (((0.5 - 1) ** 2 + (3 - 1) ** 2) / 2 + (0.5 ** 2 + 2 ** 2) / 2) / 2),
    ("bce", -(math.log(1 / (1 + math.exp(-0.5))) + math.log(1 / (1 + math.exp(2)))) / 2,
     -sum(math.log(1 / (1 + math.exp(-v))) for v in (0.5, 3, -0.5, 2)) / 4)])
def test_adversarial_losses_by_hand(kind, generator, discriminator):
    real, fake = torch.tensor([0.5, 3.0]).view(1, 1, 1, 1, 2), torch.tensor([0.5, -2.0]).view(1, 1, 1, 1, 2)
    assert abs(float(generator_loss(fake, kind)) - generator) < 1e-6
    assert abs(float(discriminator_loss(real, fake, kind)) - discriminator) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half = generator_loss(fake.bfloat16(), kind), discriminator_loss(real.bfloat16(), fake.bfloat16(), kind)
    assert all(v.dtype == torch.float32 for v in half)
    assert abs(float(half[0]) - generator) < 1e-6 and abs(float(half[1]) - discriminator) < 1e-6


def test_adversarial_losses_stay_finite_in_half_precision():
    """DEFECTS 10: the square of 300 overflows fp16, and so does exp(300)."""
    logits = torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16)
    for kind in losses.ADVERSARIAL:
        assert torch.isfinite(generator_loss(-logits, kind)) and torch.isfinite(discriminator_loss(-logits, logits, kind))
    with pytest.raises(ValueError, match="hinge, lsgan, bce, got 'wgan'"):
        generator_loss(logits, "wgan")


def test_feature_matching_by_hand():
    real = [torch.zeros(1, 2, 2, 2, 2, requires_grad=True), torch.ones(1, 1, 1, 1, 2, requires_grad=True)]
    fake = [torch.full((1, 2, 2, 2, 2), 0.5, requires_grad=True), torch.full((1, 1, 1, 1, 2), -1.0, requires_grad=True)]
    loss = feature_matching_loss(real, fake)
    loss.backward()
    assert abs(loss.item() - (0.5 + 2.0) / 2) < 1e-6
    assert all(r.grad is None for r in real)
    assert torch.allclose(fake[0].grad, torch.full((1, 2, 2, 2, 2), 1 / 32)) and torch.allclose(fake[1].grad, torch.tensor(-0.25))
    with pytest.raises(ValueError, match="got 2 and 1"):
        feature_matching_loss(real, fake[:1])


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    """One patch: Eq. 9 as it stands. Many patches that do not overlap: the same, so crop size and batch do not change the term."""
    weight = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    for shape in [(1, 2, 3, 3, 3), (4, 2, 3, 3, 3), (2, 2, 9, 6, 12)]:
        real = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        penalty = r1_penalty(F.conv3d(real, weight, stride=3), real)
        slope, = torch.autograd.grad(penalty, weight)
        assert abs((penalty - weight.square().sum() / 2).item()) < 1e-12
        assert (slope - weight).abs().max() < 1e-12              # differentiable: d (|w|^2 / 2) / dw = w


def test_r1_of_a_network_equals_differences():
    torch.manual_seed(0)
    disc = nn.Sequential(nn.Conv3d(1, 2, 2), nn.Tanh(), nn.Conv3d(2, 1, 2)).double()
    real = torch.randn(2, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    jacobian, step = torch.zeros(real.numel(), dtype=torch.float64), 1e-5
    with torch.no_grad():
        for i in range(real.numel()):
            bump = torch.zeros(real.numel(), dtype=torch.float64).index_fill(0, torch.tensor(i), step).view_as(real)
            jacobian[i] = (disc(real + bump).sum() - disc(real - bump).sum()) / (2 * step)
    assert abs((r1_penalty(disc(real), real) - jacobian.square().sum() / 4).item()) < 1e-8      # one logit per sample
    assert gradcheck(lambda w: r1_penalty(F.conv3d(F.conv3d(real, w).tanh(), w), real), (disc[0].weight[:1].detach().requires_grad_(),))


def test_r1_through_every_norm_and_its_errors():
    for norm in losses.DISC_NORMS:
        disc, real = PatchDiscriminator3d(1, 4, 1, norm=norm), torch.randn(2, 1, 8, 8, 8, requires_grad=True)
        r1_penalty(disc(real)[0], real).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for n, p in disc.named_parameters() if n.endswith("0.weight"))
    with pytest.raises(ValueError, match="float32 logits, got torch.bfloat16"):
        r1_penalty(disc(real)[0].bfloat16(), real)
    with pytest.raises(ValueError, match="requires_grad_"):
        r1_penalty(disc(real.detach())[0], real.detach())


def test_lecam_equals_its_formula():
    lecam, g = LeCam(decay=0.9), torch.Generator().manual_seed(0)
    real, fake = [torch.randn(5, 2, 1, 2, 2, 2, generator=g) for _ in range(2)]
    assert lecam(real[0], fake[0]) == 0                          # no anchor yet
    anchors = None
    for r, f in zip(real, fake):
        state = {k: v.clone() for k, v in lecam.state_dict().items()}
        lecam(r, f), lecam(r, f)                                 # forward leaves the anchors: a repeated step is the same step
        assert all(torch.equal(v, state[k]) for k, v in lecam.state_dict().items())
        lecam.update(r, f)
        means = float(r.mean()), float(f.mean())
        anchors = means if anchors is None else tuple(0.9 * a + 0.1 * m for a, m in zip(anchors, means))
    expected = (real[0] - anchors[1]).square().mean() + (fake[0] - anchors[0]).square().mean()
    assert abs(float(lecam(real[0], fake[0]) - expected)) < 1e-6
    again = LeCam(decay=0.9)
    again.load_state_dict(lecam.state_dict())
    assert torch.equal(again(real[0], fake[0]), lecam(real[0], fake[0]))
    halves = LeCam(0.9), LeCam(0.9)                              # the means of micro-batches do as well as the logits
    halves[0].update(real[0], fake[0]), halves[1].update(real[0].mean(), torch.stack([fake[0][:1].mean(), fake[0][1:].mean()]))
    assert abs(float(halves[0].anchor_fake - halves[1].anchor_fake)) < 1e-7


def test_adaptive_weight_against_explicit_gradients():
    w = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    recon, adv = (w @ x - y).square().sum(), (w @ x).sum()
    expected = (2 * (w @ x - y) @ x.T).norm() / ((torch.ones(3, 5, dtype=torch.float64) @ x.T).norm() + 1e-6)
    expected, got = expected.item(), adaptive_weight(recon, adv, w)
    assert abs(float(got - expected)) < 1e-9 and not got.requires_grad and w.grad is None
    assert abs(float(adaptive_weight(recon, adv, w, scale=1024.0) - expected)) < 1e-9
    assert adaptive_weight(recon, adv, w, limit=0.1) == 0.1
    assert adaptive_weight(recon, adv * 0, w) == 1e4
    (recon + got * adv).backward()                               # the graphs are still there


def test_adaptive_weight_survives_small_half_precision_gradients():
    w = torch.ones(4, 4, dtype=torch.float16, requires_grad=True)
    x, g = torch.rand(4, 4, dtype=torch.float16), torch.ones(4, 4, dtype=torch.float16)
    losses_ = [((w @ x) * g).float().sum() * s for s in (2e-8, 1e-8)]      # gradients below fp16's smallest number
    assert abs(float(adaptive_weight(*losses_, w, scale=2.0 ** 20)) - 2 * 1e-8 / 1e-6) < 2.0  # finite; the 1e-6 of Eq. 7 bounds it
    assert float(adaptive_weight(*losses_, w)) == 0


# ---- sub-crops

def test_sub_crops():
    x = torch.arange(3 * 2 * 6 * 7 * 8.0).view(3, 2, 6, 7, 8).requires_grad_()
    starts = crop_starts(x.shape, (4, 9, 3), generators(3))
    assert starts == crop_starts(x.shape, (4, 9, 3), generators(3)) and len(set(starts)) > 1
    assert starts[1] == crop_starts((1, *x.shape[1:]), (4, 9, 3), generators(1, seed=1))[0]      # the same in any batch
    cut = sub_crop(x, starts, (4, 9, 3))
    assert cut.shape == (3, 2, 4, 7, 3)
    for i, (d, h, w) in enumerate(starts):
        assert h == 0 and torch.equal(cut[i], x[i, :, d:d + 4, :, w:w + 3])
    cut.sum().backward()
    assert x.grad.sum() == cut.numel() and torch.equal(sub_crop(x.grad, starts, (4, 9, 3)), torch.ones_like(cut))
    assert sub_crop(x, crop_starts(x.shape, None, generators(3)), None) is x
    seen = {crop_starts((1, 1, 6, 1, 1), (4, 1, 1), generators(1, s))[0][0] for s in range(50)}
    assert seen == {0, 1, 2}                                     # every position, the last one too
    with pytest.raises(ValueError, match="2 for 3 samples"):
        crop_starts(x.shape, None, generators(2))


# ---- perceptual terms

def textured(shape=(1, 1, 16, 20, 18), seed=0):
    """Smooth anatomy with edges and fine texture, in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    smooth = losses.blur(torch.randn(shape, generator=g), 2.0)
    return (torch.where(smooth > 0, 0.4, -0.6) + 0.1 * losses.blur(torch.randn(shape, generator=g), 0.6)).clamp(-1, 1)


def test_random_features_are_the_same_in_every_process():
    """DEFECTS 18. Other global seed, other hash seed, other process: the same value to the last bit."""
    code = ("import sys, torch, losses; torch.manual_seed(int(sys.argv[1])); torch.rand(int(sys.argv[1])); "
            "x = torch.linspace(-1, 1, 2 * 9 * 10 * 11).sin().view(1, 2, 9, 10, 11); "
            "print(losses.PerceptualLoss3d(losses.FeatureNet3d())(x, x.square()).item().hex())")
    values = set()
    for seed in ("1", "77"):
        out = subprocess.run([sys.executable, "-c", code, seed], cwd=ROOT, capture_output=True, text=True,
                             env={**os.environ, "PYTHONHASHSEED": seed})
        values.add(out.stdout.strip() or out.stderr)
    assert len(values) == 1 and float.fromhex(values.pop()) > 0
    a, b, c = FeatureNet3d((4, 8)), FeatureNet3d((4, 8)), FeatureNet3d((4, 8), seed=1)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.scales[0][0].weight, c.scales[0][0].weight)


def test_perceptual_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    x = torch.zeros(1, 1, 4, 4, 4, requires_grad=True)
    PerceptualLoss3d(FeatureNet3d((4, 8)))(x, x.detach() + 1).backward()
    degrade(x.detach(), generators(1))
    assert torch.equal(torch.get_rng_state(), before)


def test_feature_net_shapes_and_weights():
    net = FeatureNet3d((16, 32, 64))
    shapes = [tuple(f.shape) for f in net(torch.randn(2, 3, 5, 6, 1))]
    assert shapes == [(6, 16, 5, 6, 1), (6, 32, 3, 3, 1), (6, 64, 2, 2, 1)]
    rows = net.scales[1][0].weight.flatten(1).double()           # orthogonal, with He's gain for LeakyReLU 0.2
    assert (rows @ rows.T - torch.eye(32) * 2 / 1.04).abs().max() < 1e-6
    assert net.scales[0][0].weight.mean(dim=(1, 2, 3, 4)).abs().max() < 1e-7 and FeatureNet3d((30,)).scales[0][0].weight.isfinite().all()


def test_perceptual_properties():
    loss, x = PerceptualLoss3d(FeatureNet3d()), textured()
    assert loss(x, x) == 0
    with torch.no_grad():
        blurred = [float(loss(losses.blur(x, s), x)) for s in (0.5, 0.75, 1.0, 1.5, 2.0)]
        assert blurred == sorted(blurred) and blurred[0] > 0.01, blurred
        error = (losses.blur(x, 1.0) - x).square().mean().sqrt()
        assert blurred[2] > 3 * float(loss(x + error, x))        # of equal L2: a blur is seen, an intensity offset hardly
    a, b = (t.sigmoid() for t in pair((2, 3, 6, 5, 4), torch.float32))
    parts = torch.stack([loss(a[i:i + 1, c:c + 1], b[i:i + 1, c:c + 1]) for i in range(2) for c in range(3)])
    assert abs(float(loss(a, b) - parts.mean())) < 1e-6          # channels and samples count alike


def test_perceptual_gradients():
    loss = PerceptualLoss3d(FeatureNet3d((3, 4)).double())
    recon, target = pair((1, 2, 4, 3, 3))
    recon.requires_grad_(True), target.requires_grad_(True)
    assert gradcheck(lambda r: loss(r, target.detach()), (recon,))
    value = loss(recon, target)
    adaptive_weight(value, (recon ** 2).sum(), recon)            # a second pass through the recomputed graph
    value.backward()
    assert target.grad is None and all(p.grad is None for p in loss.parameters())
    assert not any(p.requires_grad for p in loss.parameters()) and not loss.train().features.training


def test_perceptual_formula():
    net, (x, y) = FeatureNet3d((3, 4)), pair((1, 1, 5, 4, 3), torch.float32)
    expected = 0.0
    for a, b in zip(net(x), net(y)):
        a, b = (f / (f.square().sum(1, keepdim=True) + 1e-4).sqrt() for f in (a, b))
        expected += (a - b).square().sum(1).mean() / 2
    assert abs((PerceptualLoss3d(net)(x, y) - expected).item()) < 1e-6


def test_perceptual_keeps_its_inputs_only():
    loss = PerceptualLoss3d(FeatureNet3d())
    recon, target = (t.to(torch.bfloat16) for t in pair((2, 2, 8, 8, 8), torch.float32))
    recon.requires_grad_(True)
    weights = sum(p.numel() * 4 for p in loss.parameters())
    assert saved_bytes(lambda: loss(recon, target)) <= weights + 4 * recon.numel() + 1000
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(recon, target)
    assert value.dtype == torch.float32 and abs((value - loss(recon, target)).item()) < 1e-6        # the island is float32


def test_degrade_is_a_function_of_the_generators():
    x = textured((6, 2, 7, 8, 9))
    out, amount = degrade(x, generators(6))
    again, same = degrade(x, generators(6))
    assert torch.equal(out, again) and torch.equal(amount, same) and out.shape == x.shape
    alone, one = degrade(x[4:5], generators(1, seed=4))          # the same in any batch
    assert torch.equal(alone[0], out[4]) and torch.equal(one[0], amount[4])
    assert amount.shape == (6, 3) and amount.min() == 0 and amount.max() <= 1
    seen = torch.cat([degrade(x[:1, :1, :2, :2, :2], generators(1, s))[1] for s in range(2000)]).double()
    expected = [1 / 6 - 1 / 16, 4 / 27, 1 / 6 - 1 / 16]          # the variances that FeatureTrainer divides by
    assert (seen.var(dim=0) - torch.tensor(expected)).abs().max() < 0.01 and set(seen[:, 1].mul(3).round().tolist()) == {0, 1, 2, 3}
    assert degrade(x.bfloat16(), generators(6))[0].dtype == torch.bfloat16


def test_each_degradation_does_what_it_says():
    x = textured((1, 1, 9, 10, 11))
    seen = set()
    for s in range(40):
        out, amount = degrade(x, generators(1, s))
        if (amount > 0).sum() == 1:
            name = losses.DEGRADATIONS[int(amount.argmax())]
            seen.add(name)
            if name == "noise":
                assert abs(float((out - x).std()) - 0.1 * float(amount.max())) < 0.01
            elif name == "block":
                edge = 1 + int((amount.max() * 3).round())
                assert torch.allclose(out[0, 0, :edge, :edge, :edge], x[0, 0, :edge, :edge, :edge].mean())
                assert torch.allclose(out[0, 0, 8 - 8 % edge:, 0, 0], out[0, 0, -1, 0, 0])       # the cut cube at the border
            else:
                assert float(sharpness(out, x)) < 1
        elif amount.max() == 0:
            assert torch.equal(out, x)
    assert seen == set(losses.DEGRADATIONS)


def test_feature_trainer_learns_and_its_file_comes_back():
    torch.manual_seed(0)
    trainer = FeatureTrainer(FeatureNet3d((8, 16)))
    optim, x = torch.optim.Adam(trainer.parameters(), 3e-3), textured((16, 1, 8, 8, 8))
    degraded, amount = degrade(x, generators(16))
    first = None
    for _ in range(60):
        scores = trainer(x, degraded, amount)
        first = first or float(scores.loss.detach())
        optim.zero_grad()
        scores.loss.backward()
        optim.step()
    assert scores.loss.item() < first / 2 and scores.explained.min() > 0.3, (first, scores)
    two = trainer(x.repeat(1, 2, 1, 1, 1), degraded.repeat(1, 2, 1, 1, 1), amount)               # channels are samples
    assert abs((two.loss - trainer(x, degraded, amount).loss).item()) < 1e-6
    with torch.no_grad():                                        # a constant guess of the means of what is drawn explains nothing
        for head in trainer.heads:
            head[2].weight.zero_()
            head[2].bias.copy_(torch.tensor([1 / 4, 1 / 3, 1 / 4]))
        crop, many = x[:1, :, :2, :2, :2], [degrade(x[:1, :, :2, :2, :2], generators(1, s)) for s in range(1000)]
        scores = trainer(crop.expand(1000, -1, -1, -1, -1), torch.cat([d for d, _ in many]), torch.cat([a for _, a in many]))
    assert scores.explained.abs().max() < 0.1, scores.explained

    file = io.BytesIO()
    torch.save(trainer.features.to_checkpoint(), file)
    file.seek(0)
    content = torch.load(file, weights_only=True)
    loaded = FeatureNet3d.from_checkpoint(content)
    assert loaded.channels == (8, 16)
    assert all(torch.equal(a, b) for a, b in zip(loaded(x), trainer.features(x)))
    random = PerceptualLoss3d(FeatureNet3d((8, 16)))
    assert PerceptualLoss3d(loaded)(x, degraded) != random(x, degraded)
    for change, message in [({"kind": "vae3d.vae"}, "kind must be vae3d.features, got vae3d.vae"), ({"version": 2}, "version 2"),
                            ({"config": {"channels": [8, 8]}}, "weights do not fit"), ({"config": {}}, "needs config with channels"),
                            ({"model": {}}, "weights do not fit"), ({"model": None}, "needs config")]:
        with pytest.raises(ValueError, match=message) as error:
            FeatureNet3d.from_checkpoint({**content, **change})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got list"):
        FeatureNet3d.from_checkpoint([])


# ---- segmentation

def slow_segmentation(logits, label, class_weights, ignore_index):
    """Plain autograd, sample by sample, class by class; two logits (0, z) for a binary one."""
    binary = logits.shape[1] == 1
    logits = torch.cat([torch.zeros_like(logits), logits], 1) if binary else logits
    ces, dices = [], []
    for z, y in zip(logits, label):
        keep = torch.ones_like(y, dtype=torch.bool) if ignore_index is None else y != ignore_index
        z, y = z[:, keep], y[keep]                               # (K, n), (n,)
        if not len(y):
            ces.append(z.sum()), dices.append(z.sum())
            continue
        logp = z.log_softmax(0)
        weight = torch.ones(len(z)) if class_weights is None else torch.tensor(class_weights)
        ces.append(sum(-logp[k, i] * weight[k] for i, k in enumerate(y.tolist())) / len(y))
        p, seen = logp.exp(), [k for k in range(binary, len(z)) if (y == k).any()]
        own = [1 - 2 * p[k][y == k].sum() / (p[k].sum() + (y == k).sum()) for k in seen]
        dices.append(torch.stack(own).mean() if own else 0 * z.sum())
    return torch.stack(ces).mean(), torch.stack(dices).mean()


def seg_pair(k, shape=(2, 3, 2, 4), seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], k, *shape[1:], generator=g, dtype=torch.float64)
    label = torch.randint(0, max(k, 2), shape, generator=g)
    label[0, 0] = 0
    return logits.requires_grad_(), label


@pytest.mark.parametrize("k,options", [(3, {}), (1, {}), (3, {"class_weights": (1.0, 0.0, 2.5)}), (1, {"class_weights": (1.0, 4.0)}),
                                       (4, {"ignore_index": 255, "class_weights": (1.0, 2.0, 3.0, 4.0)}), (1, {"ignore_index": -1})])
@pytest.mark.parametrize("slab", [1, 1 << 21])
def test_segmentation_equals_the_obvious_version(k, options, slab, monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
    logits, label = seg_pair(k)
    if "ignore_index" in options:
        label[0, 1], label[1, 0, 0, 0] = options["ignore_index"], options["ignore_index"]
    label[1][label[1] == max(k, 2) - 1] = 0                      # a class that the second sample lacks
    ce, dice_loss = slow_segmentation(logits, label, options.get("class_weights"), options.get("ignore_index"))
    got = segmentation_loss(logits, label, 0.3, **options)
    for a, b in ((got.ce, ce), (got.dice_loss, dice_loss), (got.loss, 0.7 * ce + 0.3 * dice_loss)):
        assert abs((a - b).item()) < 1e-12
    ours, = torch.autograd.grad(got.loss, logits)
    theirs, = torch.autograd.grad(0.7 * ce + 0.3 * dice_loss, logits)
    assert (ours - theirs).abs().max() < 1e-12, (ours - theirs).abs().max()
    assert gradcheck(lambda z: segmentation_loss(z, label, 0.3, **options)[1:], (logits,))


@pytest.mark.parametrize("k", [1, 3])
def test_segmentation_equals_monai(k):
    """All classes in every sample and weights of 1: there the definitions coincide."""
    monai = pytest.importorskip("monai.losses", reason="monai is a development dependency")
    logits, label = (t.detach() for t in seg_pair(k, (2, 4, 5, 6)))
    kind = {"sigmoid": True} if k == 1 else {"softmax": True, "to_onehot_y": True}
    reference = monai.DiceCELoss(**kind, smooth_nr=0.0, smooth_dr=0.0, lambda_ce=0.4, lambda_dice=0.6)
    expected = reference(logits, label[:, None].double() if k == 1 else label[:, None])
    assert abs(float(segmentation_loss(logits, label, 0.6).loss - expected)) < 1e-6


@pytest.mark.parametrize("k", [1, 3])
def test_segmentation_of_nothing_is_zero(k):
    logits, label = seg_pair(k)
    got = segmentation_loss(logits, torch.full_like(label, -1), ignore_index=-1)
    got.loss.backward()
    assert got.loss == 0 and torch.equal(logits.grad, torch.zeros_like(logits))
    label[0] = -1                                                # one sample of nothing, the other as it was
    both, one = (segmentation_loss(logits[i:], label[i:], ignore_index=-1).loss for i in (0, 1))
    assert abs((both - one / 2).item()) < 1e-12


def test_segmentation_micro_batches_add_up_and_16_bits_do():
    logits, label = seg_pair(3, (4, 3, 4, 5))
    whole = segmentation_loss(logits, label, 0.5, (1.0, 2.0, 3.0), 2)
    parts = [segmentation_loss(logits[i:i + 1], label[i:i + 1], 0.5, (1.0, 2.0, 3.0), 2) for i in range(4)]
    assert all(abs((w - sum(p) / 4).item()) < 1e-12 for w, p in zip(whole, zip(*parts)))
    half = (20 * logits.detach()).half().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got = segmentation_loss(half, label)
    (got.loss * 1024).backward()
    assert got.loss.dtype == torch.float32 and half.grad.dtype == torch.float16 and half.grad.isfinite().all()
    assert abs((got.loss - segmentation_loss(half.double(), label).loss).item()) < 1e-5


def test_segmentation_keeps_logits_and_label(monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", 2000)
    logits, label = torch.randn(1, 4, 20, 10, 10).bfloat16().requires_grad_(), torch.randint(0, 4, (1, 20, 10, 10))
    assert saved_bytes(lambda: segmentation_loss(logits, label)) < 2 * logits.numel() + 8 * label.numel() + 1000
    with Largest() as seen:
        segmentation_loss(logits, label).loss.backward()
    assert seen.float32 <= 2000 < logits.numel() and logits.grad.dtype == torch.bfloat16


def test_segmentation_errors():
    logits, label = seg_pair(3)
    with pytest.raises(ValueError, match=r"\(2, 3, 3, 2, 4\) and \(2, 3, 2\)"):
        segmentation_loss(logits, label[..., 0])
    with pytest.raises(ValueError, match="int64, got torch.int32"):
        segmentation_loss(logits, label.int())
    with pytest.raises(ValueError, match="2 factors, the labels have 3 classes"):
        segmentation_loss(logits, label, class_weights=(1.0, 2.0))
    with pytest.raises(RuntimeError, match="out of bounds"):     # a label that no class has never counts as none
        segmentation_loss(logits, label + 2)


def test_dice_scores_add_up_over_volumes(monkeypatch):
    label = torch.tensor([0, 0, 1, 1, 1, 3, 9, 9]).view(1, 2, 2, 2)
    prediction = torch.tensor([0, 1, 1, 1, 0, 3, 1, 3]).view(1, 2, 2, 2)
    for slab in (3, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        inter, sizes = dice_scores(prediction, label, 4, ignore_index=9)
        assert inter.tolist() == [1, 2, 0, 1] and sizes.tolist() == [4, 6, 0, 2]
    values = dice(inter, sizes)
    assert torch.isnan(values[2]) and values[[0, 1, 3]].tolist() == pytest.approx([0.5, 2 / 3, 1.0])
    more = dice_scores(torch.full_like(label, 2), torch.zeros_like(label), 4)
    assert dice(inter + more[0], sizes + more[1]).tolist() == pytest.approx([2 / 12, 2 / 3, 0.0, 1.0])
    with pytest.raises(ValueError, match="differ in shape"):
        dice_scores(prediction, label[..., 0], 4)


# ---- config

def test_every_loss_field_changes_the_loss():
    """DEFECTS 1: a field that changes nothing is a bug; those that only train.py reads are seen in test_train.py."""
    x, y = pair((1, 2, 4, 4, 4))
    y[:, :, 0] = 0                                               # background of a sparse grid
    plain = reconstruction_loss(x, y)
    changed = {"recon": reconstruction_loss(x, y, "mse"), "channel_weights": reconstruction_loss(x, y, "l1", (1.0, 2.0)),
               "foreground_weight": reconstruction_loss(x, y, "l1", None, 3.0),
               "background": reconstruction_loss(x, y, "l1", None, 3.0, 0.0)}
    assert all(float(v) != float(plain) for v in changed.values()) and changed["background"] != changed["foreground_weight"]

    logits, label = seg_pair(3)
    plain = segmentation_loss(logits, label).loss
    seg = {"dice_share": segmentation_loss(logits, label, 0.1).loss, "class_weights": segmentation_loss(logits, label, 0.5, (1, 2, 3)).loss}
    assert all(v.item() != plain.item() for v in seg.values())

    disc = {"disc_channels": PatchDiscriminator3d(1, 8), "disc_layers": PatchDiscriminator3d(1, 4, 2),
            "disc_strides": PatchDiscriminator3d(1, 4, strides=(1, 2, 2)), "disc_norm": PatchDiscriminator3d(1, 4, norm="group")}
    shapes = {name: (str(d), d.least_size) for name, d in (disc | {"": PatchDiscriminator3d(1, 4)}).items()}
    assert len(set(shapes.values())) == 5
    assert len({generator_loss(logits, kind).item() for kind in losses.ADVERSARIAL}) == 3         # adv_loss
    in_train = {"kl_weight", "structure_weight", "perceptual_weight", "perceptual_features",
                "perceptual_start", "perceptual_warmup", "adv_weight", "disc_start", "disc_warmup", "disc_lr", "feature_matching_weight",
                "r1_weight", "r1_every", "lecam_weight", "adaptive_weight", "crop"}
    assert {f.name for f in fields(LossConfig)} == set(changed) | set(seg) | set(disc) | {"adv_loss"} | in_train


@pytest.mark.parametrize("options,message", [
    ({"adv_loss": "wgan"}, "loss.adv_loss must be one of hinge, lsgan, bce, got 'wgan'"), ({"disc_norm": "batch"}, "loss.disc_norm"),
    ({"adv_weight": -1.0}, "loss.adv_weight must be 0 or more"), ({"perceptual_weight": math.nan}, "loss.perceptual_weight"),
    ({"disc_layers": 0}, "loss.disc_layers must be 1 or more"), ({"r1_every": 0}, "loss.r1_every"), ({"disc_lr": 0.0}, "loss.disc_lr"),
    ({"dice_share": 1.5}, "loss.dice_share must be from 0"), ({"crop": (0, 8, 8)}, "loss.crop"), ({"crop": (8, 8)}, "loss.crop"),
    ({"disc_strides": (2, 2)}, "loss.disc_strides needs one D,H,W triple"), ({"class_weights": ()}, "loss.class_weights"),
    ({"disc_strides": ((1, 2, 2), (2, 2, 2))}, "each of the 3 layers"), ({"perceptual_features": ""}, "loss.perceptual_features"),
    ({"channel_weights": (-1.0,)}, "loss.channel_weights")])
def test_config_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_config_takes_lists():
    cfg = LossConfig(disc_strides=[[1, 2, 2], [2, 2, 2], [2, 2, 2]], crop=[8, 8, 8], class_weights=[1.0, 2.0])
    assert cfg.disc_strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2)) and cfg.crop == (8, 8, 8) and cfg.class_weights == (1.0, 2.0)
    assert PatchDiscriminator3d(1, 4, 3, cfg.disc_strides).least_size[0] < PatchDiscriminator3d(1, 4).least_size[0]


def test_works_copied_alone(tmp_path):
    shutil.copy(ROOT / "losses.py", tmp_path)
    code = ("import sys; sys.path.insert(0, '.'); import torch, losses; x = torch.zeros(1, 1, 12, 12, 12); "
            "losses.PatchDiscriminator3d(1, 2, 1)(x), losses.segmentation_loss(x, x[:, 0].long()); "
            "print(float(losses.reconstruction_loss(x, x + 1)), float(losses.ssim(x, x)), "
            "float(losses.PerceptualLoss3d(losses.FeatureNet3d((2,)))(x, x)))")
    out = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == ["1.0", "1.0", "0.0"], out.stderr
