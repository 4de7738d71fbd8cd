"""losses.py against slow obvious versions, MONAI's SSIM, gradcheck, and the defects that concern losses."""
import math
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import LossConfig, kl_loss, psnr, reconstruction_loss, ssim

ROOT = Path(__file__).parents[1]


def pair(shape=(2, 3, 5, 6, 7), dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=dtype), torch.randn(shape, generator=g, dtype=dtype)


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

    class Largest(TorchDispatchMode):
        float32 = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                self.float32 = max(self.float32, out.numel())
            return out

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


def test_every_loss_field_changes_the_loss():
    """DEFECTS 1: a field that changes nothing is a bug; kl_weight is seen in test_train.py."""
    x, y = pair((1, 2, 4, 4, 4))
    y[:, :, 0] = 0                                               # background of a sparse grid
    plain = reconstruction_loss(x, y)
    changed = {"recon": reconstruction_loss(x, y, "mse"), "channel_weights": reconstruction_loss(x, y, "l1", (1.0, 2.0)),
               "foreground_weight": reconstruction_loss(x, y, "l1", None, 3.0),
               "background": reconstruction_loss(x, y, "l1", None, 3.0, 0.0)}
    assert all(float(v) != float(plain) for v in changed.values()) and changed["background"] != changed["foreground_weight"]
    assert {f.name for f in fields(LossConfig)} == set(changed) | {"kl_weight"}


def test_works_copied_alone(tmp_path):
    shutil.copy(ROOT / "losses.py", tmp_path)
    code = ("import sys; sys.path.insert(0, '.'); import torch, losses; x = torch.zeros(1, 1, 12, 12, 12); "
            "print(float(losses.reconstruction_loss(x, x + 1)), float(losses.ssim(x, x)))")
    out = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert out.stdout.split() == ["1.0", "1.0"], out.stderr
