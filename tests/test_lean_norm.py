"""lean_norm.py: GroupNorm by batch norm's kernels against F.group_norm, in tiles too, and its memory on CUDA.

Without a card the kernels are plain torch, so what is tested is what stands between them.
"""
import pytest
import torch
import torch.nn.functional as F

import lean_norm
import peaks
import unet
from networks import build, objective
from vae3d import GroupNorm


@pytest.fixture
def forced(monkeypatch):
    """The path of CUDA, whatever the device."""
    monkeypatch.setattr(lean_norm, "by_batch_norm", lambda x: True)
    monkeypatch.setattr("tiles.by_batch_norm", lambda x: True)


def gradients(function, *tensors):
    """What it gives, and the gradients of a sum that differs from voxel to voxel."""
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad((y * weights + y.square()).sum(), leaves)]


def largest_difference(found, wanted):
    return max(float((a - b).abs().max()) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("batch, channels, groups", [(1, 4, 2), (3, 6, 3), (2, 5, 5), (2, 4, 1)])
@pytest.mark.parametrize("last", [True, False], ids=["channels_last", "contiguous"])
def test_values_and_gradients_are_those_of_group_norm(forced, batch, channels, groups, last):
    torch.manual_seed(0)
    x = torch.randn(batch, channels, 3, 5, 4, dtype=torch.float64) * 2 + 1
    if last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    weight, bias = torch.randn(2, channels, dtype=torch.float64)
    weight[0] = 0                                                # which the kernel cannot divide by
    found = gradients(lambda *t: lean_norm.group_norm(t[0], groups, *t[1:], 1e-6), x, weight, bias)
    wanted = gradients(lambda *t: F.group_norm(t[0], groups, *t[1:], 1e-6), x, weight, bias)
    # weights and biases have sums of up to 180 terms of up to 100
    assert largest_difference(found, wanted) < 1e-12 * float(wanted[2].abs().max().clamp(min=1)), (
        largest_difference(found, wanted))


def test_with_given_statistics_everything_has_its_gradient(forced, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, 5, 4, dtype=torch.float64)
    mean, var = torch.randn(2, 2, dtype=torch.float64), torch.rand(2, 2, dtype=torch.float64) + 0.5
    weight, bias = torch.randn(2, 4, dtype=torch.float64)
    found = gradients(lambda *t: lean_norm.normalised(*t, 1e-6), x, mean, var, weight, bias)
    monkeypatch.setattr(lean_norm, "by_batch_norm", lambda x: False)
    wanted = gradients(lambda *t: lean_norm.normalised(*t, 1e-6), x, mean, var, weight, bias)
    assert largest_difference(found, wanted) < 1e-12
    assert torch.autograd.gradcheck(lambda *t: lean_norm.WholeNorm.apply(t[0], 2, *t[1:], 1e-3), (
        x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()))


@pytest.mark.parametrize("setting", [("none",), ("checkpoint",), ("tile", (4, 8, 4), "2")],
                         ids=lambda s: s[0])
def test_a_network_is_the_same_by_either_in_every_mode(forced, monkeypatch, setting):
    x = torch.randn(2, 1, 9, 12, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def step():
        vae = build(torch.float64, norm="group").memory(*setting).eval()
        out = vae(x)
        objective(out).backward()
        return [out.recon.detach(), *(p.grad for p in vae.parameters())]
    found = step()
    monkeypatch.setattr(lean_norm, "by_batch_norm", lambda x: False)
    monkeypatch.setattr("tiles.by_batch_norm", lambda x: False)
    assert largest_difference(found, step()) < 1e-12


def test_sixteen_bits_keep_their_type_and_are_as_near_as_group_norm(forced):
    torch.manual_seed(0)
    x = torch.randn(1, 8, 6, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    norm = GroupNorm(2, 8)
    wide = F.group_norm(x.float(), 2, norm.weight, norm.bias, norm.eps)
    y = norm(x)
    assert y.dtype == torch.bfloat16 and float((y - wide).detach().abs().max()) < 0.02


def test_the_path_is_for_large_volumes_of_cuda_in_channels_last():
    small, large = torch.empty(1, 8, 4, 8, 8), torch.empty(1, 8, 32, 64, 64)
    assert not any(map(lean_norm.by_batch_norm, (small, large)))
    with peaks.simulated(torch.device("cuda")) as device:
        small, large = (torch.empty(t.shape, device=device) for t in (small, large))
        last = torch.channels_last_3d
        assert not any(map(lean_norm.by_batch_norm, (small, large, small.contiguous(memory_format=last))))
        assert lean_norm.by_batch_norm(large.contiguous(memory_format=last))


def predicted_bytes(batch):
    """Of GroupNorm of 16 channels at batch x 32,64,64 in bf16, over the bytes of one such tensor."""
    def make_step(device):
        x = torch.randn(batch, 16, 32, 64, 64, device=device, dtype=torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last_3d).requires_grad_()
        norm, grad = unet.GroupNorm(8, 16).to(device), torch.empty_like(x)

        def step():
            assert lean_norm.by_batch_norm(x)
            norm(x).backward(grad)
        return step
    return peaks.predict(make_step).bytes / (batch * 16 * 32 * 64 * 64 * 2)


def test_memory_on_cuda_is_that_of_tensors_in_one_layout():
    """x, its norm, and the gradients of both."""
    assert predicted_bytes(1) <= 4.01, predicted_bytes(1)
    assert predicted_bytes(2) <= 4.51, predicted_bytes(2)        # one sample more, on its way
