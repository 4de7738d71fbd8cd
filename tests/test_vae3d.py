"""vae3d.py: the network, the memory dial, and above all that tiled execution equals the untiled one."""
import dataclasses
import gc
import random
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lean_conv
import local_layers
import quantize
import tile_plans
import tiles
import vae3d
from local_layers import Cut
from tiles import Stretch
from vae3d import PRESETS, VAE3D, Attention3d, ResBlock3d, VAEConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(base_channels=4, channel_mult=(1, 2, 2), norm_groups=2, z_channels=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(dtype=torch.float64, **fields) -> VAE3D:
    """A small network whose weights are all at work (initialise() makes logvar nearly constant)."""
    torch.manual_seed(0)
    vae = VAE3D(VAEConfig(**{**TINY, **fields})).to(dtype)
    with torch.no_grad():
        for p in vae.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return vae


def objective(out) -> torch.Tensor:
    """Depends on every output, with a gradient that differs from voxel to voxel."""
    ramp = torch.linspace(0.5, 1.5, out.recon.numel(), dtype=out.recon.dtype).view_as(out.recon)
    return (out.recon.square() * ramp).mean() + 0.1 * out.mu.square().mean() + 0.1 * out.logvar.square().mean()


def outputs_and_gradients(vae: VAE3D, x: torch.Tensor, setting: tuple, wrap=None, input_grad=True):
    vae.memory(*setting)
    vae.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_(input_grad)
    if wrap:
        with wrap:
            out = vae(x, torch.Generator().manual_seed(1))
    else:
        out = vae(x, torch.Generator().manual_seed(1))
    objective(out).backward()
    return [t.detach() for t in out], {"input": x.grad, **{name: p.grad for name, p in vae.named_parameters()}}


def relative(a, b) -> float:
    if a is None or b is None:
        return 0.0 if a is b else float("inf")
    return ((a - b).abs().max() / a.abs().max().clamp_min(1e-30)).item()


def assert_same(vae, x, setting, forward=1e-10, backward=1e-10, wrap=None, input_grad=True):
    """The result under `setting` equals that of plain autograd; tolerances relative to the largest value of each tensor."""
    out, grads = outputs_and_gradients(vae, x, ("none",), wrap, input_grad)
    got, got_grads = outputs_and_gradients(vae, x, setting, wrap, input_grad)
    worst = max(relative(a, b) for a, b in zip(out, got))
    assert worst <= forward, f"{setting}: outputs differ by {worst:.2e} of their scale"
    assert grads.keys() == got_grads.keys()
    errors = {name: relative(grads[name], got_grads[name]) for name in grads}
    worst = max(errors, key=errors.get)
    assert errors[worst] <= backward, f"{setting}: gradient of {worst} differs by {errors[worst]:.2e}"


# ------------------------------------------------------------------------------------------------ the network

COUNTS = {"ultra_lightweight": (694_748, 693_180), "lightweight": (2_717_676, 2_714_604), "base": (7_652_588, 7_647_532),
          "standard": (40_847_052, 40_833_356), "high_res": (1_927_292, 1_924_764), "fast": (643_612, 642_652)}


def count(vae) -> int:
    return sum(p.numel() for p in vae.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_counts(name):
    grouped, plain = COUNTS[name]
    assert count(VAE3D.from_preset(name, in_channels=4, norm="group")) == grouped
    assert count(VAE3D.from_preset(name, in_channels=4)) == plain


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step(name):
    vae = VAE3D.from_preset(name, in_channels=2)
    x = torch.randn(1, 2, 4, 8, 8)
    opt = torch.optim.AdamW(vae.parameters(), 1e-3)
    before = [p.detach().clone() for p in vae.parameters()]
    objective(vae(x)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
    opt.step()
    assert all((p != b).any() for p, b in zip(vae.parameters(), before))


@pytest.mark.parametrize("fields", [
    dict(num_res_blocks=0), dict(num_res_blocks=0, channel_mult=(1, 2, 3)), dict(base_channels=48, norm="group", norm_groups=32),
    dict(base_channels=20, norm="group", norm_groups=32), dict(base_channels=7, norm="group", norm_groups=32),
    dict(attention=True), dict(channel_mult=(1,), strides=()), dict(channel_mult=(1, 1), strides=((1, 1, 1),)),
    *(dict(in_channels=c) for c in range(1, 9))])
def test_any_shape_of_network(fields):
    vae = build(torch.float32, **fields)
    x = torch.randn(1, vae.cfg.in_channels, 4, 8, 8)
    for setting in [("none",), ("checkpoint",), ("tile", (4, 4, 4))]:
        vae.memory(*setting)
        assert vae(x).recon.shape == x.shape


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 7, 3), (155, 6, 5), (2, 1, 19)])
@pytest.mark.parametrize("strides", [((1, 2, 2), (2, 2, 2)), ((2, 2, 2), (2, 2, 2)), ((3, 1, 2), (1, 4, 1))])
def test_output_has_the_input_size(size, strides):
    vae = build(torch.float32, strides=strides)
    x = torch.randn(1, 1, *size)
    out = vae(x)
    assert out.recon.shape == x.shape
    assert out.mu.shape[2:] == vae.latent_size(size) == tuple(-(-n // s) for n, s in zip(size, vae.cfg.total_stride))


def test_resblock_equals_an_obvious_one():
    block = ResBlock3d(4, 6, "group", 2).double()
    x = torch.randn(2, 4, 3, 5, 4, dtype=torch.float64)
    norm = [lambda t, n=n: F.group_norm(t, 2, n.weight, n.bias, 1e-6) for n in (block.norm1, block.norm2)]

    def silu(t):
        return t / (1 + (-t).exp())

    h = F.conv3d(silu(norm[0](x)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv3d(silu(norm[1](h)), block.conv2.weight, block.conv2.bias, padding=1)
    want = h + torch.einsum("oi,bidhw->bodhw", block.skip.weight[:, :, 0, 0, 0], x) + block.skip.bias[:, None, None, None]
    torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(block, (x[:1, :, :2, :2, :2].clone().requires_grad_(),))


def test_attention_equals_an_obvious_one_and_uses_sdpa(monkeypatch):
    attention = Attention3d(8, "none", head_channels=4).double()
    x, calls = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64), []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    got = attention(x)
    assert calls == [1]
    rows = F.layer_norm(x.flatten(2).transpose(1, 2), (8,), attention.norm.weight, attention.norm.bias, 1e-6)       # (B, N, C)
    q, k, v = (rows @ attention.qkv.weight[:, :, 0, 0, 0].T + attention.qkv.bias).split(8, dim=2)
    heads = []
    for h in range(2):
        part = slice(4 * h, 4 * h + 4)
        heads.append((q[..., part] @ k[..., part].transpose(1, 2) / 4 ** 0.5).softmax(-1) @ v[..., part])
    out = torch.cat(heads, 2) @ attention.proj.weight[:, :, 0, 0, 0].T + attention.proj.bias
    torch.testing.assert_close(got, x + out.transpose(1, 2).view_as(x), rtol=1e-12, atol=1e-12)


def test_group_norm_equals_torchs_and_keeps_the_type():
    ours, theirs = vae3d.make_norm("group", 12, 4), nn.GroupNorm(4, 12, eps=1e-6)
    x = torch.randn(2, 12, 3, 4, 5) * 3 + 5
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    mean, var = tiles.volume_statistics(iter(x.split(2, dim=4)), 4)
    values = {"mean": mean, "var": var, **dict(ours.named_parameters())}
    torch.testing.assert_close(local_layers.norm_run(ours, x, (), values), theirs(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == torch.bfloat16
    far = torch.randn(1, 2, 8, 8, 8) + 1e4                       # sum of squares minus squared mean would lose the variance in float32
    _, var = tiles.volume_statistics(iter(far.split(1, dim=2)), 2)
    torch.testing.assert_close(var.double(), far.double().var((2, 3, 4), correction=0), rtol=1e-3, atol=0)


def test_gradcheck_of_the_network():
    vae = build(base_channels=2, channel_mult=(1, 1), strides=((1, 2, 2),), num_res_blocks=0, z_channels=1).eval()
    x = torch.randn(1, 1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    for setting in [("none",), ("checkpoint",), ("tile", (1, 2, 2), "2"), ("tile", (1, 2, 2), "1")]:
        vae.memory(*setting)
        assert torch.autograd.gradcheck(lambda x: tuple(vae(x)), (x,))


def test_noise_is_the_same_in_every_mode_and_eval_draws_none():
    vae, x = build(torch.float32), torch.randn(2, 1, 4, 8, 8)
    outs = [vae.memory(*setting)(x, torch.Generator().manual_seed(3)).recon
            for setting in [("none",), ("checkpoint",), ("tile", (4, 4, 4))]]
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-6)
    one_each = vae(x, [torch.Generator().manual_seed(i) for i in range(2)]).recon
    torch.testing.assert_close(vae(x[1:], [torch.Generator().manual_seed(1)]).recon, one_each[1:], rtol=1e-5, atol=1e-6)
    assert not torch.equal(vae(x).recon, vae(x).recon)
    vae.eval()
    assert torch.equal(vae(x).recon, vae(x).recon)


@pytest.mark.parametrize("call, message", [
    (lambda: VAE3D(VAEConfig())(torch.zeros(1, 2, 4, 4, 4)), "make vae.in_channels"),
    (lambda: VAE3D(VAEConfig())(torch.zeros(1, 4, 4, 4)), r"got \(1, 4, 4, 4\)"),
    (lambda: VAE3D.from_preset("basic"), "choose one of ultra_lightweight"),
    (lambda: VAEConfig(strides=((2, 2, 2),)), "one D,H,W triple between levels"),
    (lambda: VAEConfig(strides=((2, 2, 2), (0, 1, 1))), "three positive integers"),
    (lambda: VAEConfig(base_channels=0), "vae.base_channels must be at least 1"),
    (lambda: VAEConfig(channel_mult=()), "one positive entry a level"),
    (lambda: VAEConfig(norm="batch"), "vae.norm must be one of none, group, layer"),
    (lambda: VAEConfig(bottleneck="vqvae"), "vae.bottleneck must be one of kl, vq, fsq"),
    (lambda: VAEConfig(bottleneck="fsq", fsq_levels=(8, 5)), "one number of 2 or more for each of vae.z_channels=4"),
    (lambda: VAEConfig(intensity_range=(1, 0)), "vae.intensity_range needs two numbers, the lower first, such as 0,1"),
    (lambda: VAEConfig(norm_eps=0.0), "vae.norm_eps must be above 0"),
    (lambda: VAEConfig(blocks_per_level=(1, 1)), "vae.blocks_per_level needs one entry for each of 3 levels"),
    (lambda: VAEConfig(attention_levels=(True,)), "vae.attention_levels needs one entry for each of 3 levels"),
    (lambda: VAEConfig(num_res_blocks=0, decoder_extra_blocks=0), "make it 1, or vae.num_res_blocks at least 1"),
    (lambda: VAEConfig(encoder_middle="yes"), "vae.encoder_middle must be one of none, blocks, attention"),
    (lambda: VAEConfig(upsample="bilinear"), "vae.upsample must be one of nearest, trilinear, transposed, transposed3"),
    (lambda: VAEConfig(up_strides=((2, 2, 2), (2, 2, 2))), "vae.up_strides must undo vae.strides"),
    (lambda: quantize.VectorQuantizer(8, 4).quantize_volume(torch.zeros(1, 3, 2, 2, 2)), "codes of 4 numbers, got z with 3 channels"),
    (lambda: quantize.FiniteScalarQuantizer((8, 5)).quantize_volume(torch.zeros(1, 3, 2, 2, 2)), "2 levels, got z with 3 channels"),
    (lambda: VAE3D(VAEConfig()).memory("tiles"), "one of none, checkpoint, tile"),
    (lambda: VAE3D(VAEConfig()).memory("tile", (64, 64)), "three positive integers"),
    (lambda: VAE3D(VAEConfig()).memory("tile", (64, 64, 0)), "three positive integers"),
    (lambda: VAE3D(VAEConfig()).memory("tile", stretch="top"), "auto or levels a stretch such as"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("change", [
    dict(in_channels=2), dict(base_channels=8), dict(channel_mult=(1, 2, 3)), dict(num_res_blocks=0), dict(strides=((2, 2, 2), (2, 2, 2))),
    dict(z_channels=3), dict(norm="layer"), dict(attention=True), dict(norm="group", norm_groups=4),
    dict(attention=True, head_channels=2), dict(bottleneck="vq"), dict(bottleneck="fsq", fsq_levels=(5, 3)),
    dict(norm="group", norm_eps=0.1), dict(blocks_per_level=(1, 2, 1)), dict(decoder_extra_blocks=2),
    dict(attention_levels=(False, True, False)), dict(encoder_middle="none"), dict(decoder_middle="attention"), dict(down_padding="end"),
    dict(upsample="trilinear"), dict(upsample="transposed"), dict(upsample="transposed3"), dict(head_act=False),
    dict(up_strides=((2, 2, 2), (1, 2, 2))), dict(up_narrows=True), dict(quant_conv="split"), dict(quant_conv="joint"),
    dict(post_quant_conv=True), dict(intensity_range=(0.0, 1.0))], ids=str)
def test_every_config_field_changes_something(change):
    reference = {key: value for key, value in (("norm", "group"), ("attention", True)) if key in change and len(change) > 1}

    def picture(**fields):
        vae = build(torch.float32, **fields).eval()
        x = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 1, 4, 8, 8).expand(1, vae.cfg.in_channels, 4, 8, 8).contiguous()
        out = vae(x)
        return [tuple(p.shape) for p in vae.parameters()], tuple(out[1].shape), round(out.recon.double().sum().item(), 6)

    assert picture(**reference) != picture(**{**reference, **change})


def test_fields_are_all_tested():
    marks = test_every_config_field_changes_something.pytestmark[0].args[1]
    assert {f.name for f in dataclasses.fields(VAEConfig)} == {key for change in (*marks, *CODEBOOK_FIELDS) for key in change}


@pytest.mark.parametrize("mode", vae3d.MEMORY_MODES)
def test_intensity_range_is_a_map_before_and_after_the_same_network(mode):
    """The definition: [0, 3] inside, by hand; latent, reconstruction, decoded latent and gradients; zeros are padded inside."""
    vae = build(torch.float64, intensity_range=(0.0, 3.0)).memory(mode, (4, 8, 4) if mode == "tile" else None)
    plain = build(torch.float64)
    plain.load_state_dict(vae.state_dict())
    x = torch.rand(1, 1, 5, 9, 8, dtype=torch.float64) * 2 - 1
    z = torch.randn(1, vae.cfg.z_channels, 3, 3, 2, dtype=torch.float64)
    for network in (vae, plain):
        network.eval()
    out, want = vae(x), plain((x + 1) * 1.5)
    assert torch.allclose(out.mu, want.mu, atol=1e-12), (out.mu - want.mu).abs().max()
    assert torch.allclose(out.recon, want.recon / 1.5 - 1, atol=1e-12), (out.recon - want.recon / 1.5 + 1).abs().max()
    assert torch.allclose(vae.decode(z), plain.decode(z) / 1.5 - 1, atol=1e-12)
    out.recon.square().mean().backward()
    (want.recon / 1.5 - 1).square().mean().backward()
    for (name, a), b in zip(vae.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), (name, (a.grad - b.grad).abs().max())


def test_works_copied_alone(tmp_path):
    for name in ("vae3d.py", "tiles.py", "tile_plans.py", "local_layers.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    code = ("import sys, torch, vae3d; vae = vae3d.VAE3D(vae3d.VAEConfig(base_channels=4)).memory('tile', (4, 4, 4));"
            "x = torch.randn(1, 1, 5, 8, 8); vae(x).recon.square().mean().backward();"
            "assert vae(x).recon.shape == x.shape and 'monai' not in sys.modules and 'yaml' not in sys.modules")
    subprocess.run([sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {code}"], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------------ checkpoint

def saved_bytes(run) -> int:
    """Bytes that autograd keeps between forward and backward."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: storages.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t):
        out = run()
    assert out is not None
    return sum(t.untyped_storage().nbytes() for t in storages.values() if not isinstance(t, nn.Parameter))


@pytest.mark.parametrize("fields", [dict(norm="group"), dict(attention=True), dict(num_res_blocks=0, norm="layer")], ids=str)
def test_checkpoint_equals_none(fields):
    assert torch.is_grad_enabled()
    assert_same(build(**fields), torch.randn(1, 1, 5, 8, 8, dtype=torch.float64), ("checkpoint",))


def test_saved_bytes_fall_along_the_dial():
    vae, x = build(torch.float32, base_channels=8), torch.randn(1, 1, 16, 16, 16)
    none, checkpointed, top, both = (saved_bytes(lambda s=s: vae.memory(*s)(x)) for s in (
        ("none",), ("checkpoint",), ("tile", (8, 8, 8), "1"), ("tile", (8, 8, 8), "2+1")))
    assert checkpointed < 0.8 * none and top < 0.5 * checkpointed and both < 0.5 * top, (none, checkpointed, top, both)


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("norm, upsample", [("none", "nearest"), ("group", "trilinear"), ("layer", "nearest")])
def test_what_precedes_a_convolution_is_not_kept_and_the_bits_are_those_of_plain_autograd(norm, upsample, amp, monkeypatch):
    monkeypatch.setattr(lean_conv, "slow_on_cpu", lambda x: False)
    vae, found = build(torch.float32, norm=norm, norm_groups=2, upsample=upsample, up_narrows=True), []
    vae.encoder.level0_block0.norm1.requires_grad_(False)
    vae.decoder.head.conv.weight.requires_grad_(False)
    for function in (vae3d.lean, lambda conv, x, *before: conv(lean_conv.prepared(nn.Sequential(*before), x))):
        monkeypatch.setattr(vae3d, "lean", function)
        x = torch.randn(1, 1, 5, 8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def forward(x=x):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                return vae(x, torch.Generator().manual_seed(1))
        out, wanted = forward(), [x, *(p for p in vae.parameters() if p.requires_grad)]
        found.append(([out.recon, *torch.autograd.grad(out.recon.float().square().mean() + out.mu.mean() + out.logvar.mean(), wanted)],
                      saved_bytes(forward)))
    (ours, kept), (plain, kept_by_autograd) = found
    assert all(torch.equal(a, b) for a, b in zip(ours, plain)), max(float((a - b).abs().max()) for a, b in zip(ours, plain))
    assert kept < 0.7 * kept_by_autograd, (kept, kept_by_autograd)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["step", "no gradient"])
def test_one_small_float32_crop_on_a_cpu_takes_onednn(training, monkeypatch):
    vae, x, real = build(torch.float32, base_channels=8), torch.randn(1, 1, 5, 8, 6), lean_conv.slow_on_cpu

    def run(layout, kernel):
        answers = []
        monkeypatch.setattr(lean_conv, "slow_on_cpu", lambda x: answers.append(kernel(x)) or answers[-1])
        with torch.set_grad_enabled(training):
            out = vae.to(memory_format=layout)(x.contiguous(memory_format=layout), torch.Generator().manual_seed(1))
        grads = torch.autograd.grad(out.recon.square().mean() + out.mu.mean(), list(vae.parameters())) if training else ()
        return [out.recon, *grads], set(answers)
    plain, answers = run(torch.contiguous_format, lambda x: False)
    assert answers == {False}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        found, answers = run(layout, real)
        assert answers == {True}
        for a, b in zip(found, plain):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())), float((a - b).abs().max())


def test_a_norm_changed_between_forward_and_backward_is_an_error():
    vae = build(torch.float32, norm="group", norm_groups=2)
    out = vae(torch.randn(1, 1, 4, 8, 8)).recon.square().mean()
    with torch.no_grad():
        vae.encoder.level0_block0.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_up_convolutions_that_narrow():
    wide, narrow = build(torch.float32, base_channels=8), build(torch.float32, base_channels=8, up_narrows=True)
    assert narrow.decoder.level1_up.conv.out_channels == 8 and wide.decoder.level1_up.conv.out_channels == 16
    assert narrow(torch.randn(1, 1, 4, 8, 8)).recon.shape == (1, 1, 4, 8, 8)
    build(torch.float32, num_res_blocks=0, decoder_extra_blocks=0, up_narrows=True)  # no block is needed to change the width


def test_every_layer_is_checkpointed_that_keeps_more_than_its_input(monkeypatch):
    seen = []
    monkeypatch.setattr(vae3d, "checkpoint", lambda layer, x, *more, **kwargs: seen.append(layer) or layer(x))
    vae, x = build(torch.float32, attention=True, down_padding="end").memory("checkpoint"), torch.randn(1, 1, 8, 8, 8)
    vae(x)
    for layer in (*vae.encoder, *vae.decoder):
        if layer not in seen:
            channels = next(m.in_channels for m in layer.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)))
            y = torch.randn(1, channels, 8, 8, 8, requires_grad=True)
            assert saved_bytes(lambda layer=layer, y=y: layer(y)) <= y.untyped_storage().nbytes(), layer
    assert {type(layer).__name__ for layer in seen} == {"ResBlock3d", "Attention3d", "Sequential"}


# ------------------------------------------------------------------------------------------------ tile: equality

NORMED = ["none", "layer", "group"]


def prod3(size):
    return size[0] * size[1] * size[2]


@pytest.mark.parametrize("norm", NORMED)
@pytest.mark.parametrize("size, tile, stretch", [
    ((13, 10, 9), (8, 8, 4), "2+1"), ((15, 4, 6), (7, 7, 7), "3"), ((5, 6, 7), (64, 64, 64), "2+1"), ((8, 8, 8), (4, 4, 4), "1+1"),
    ((16, 4, 8), (4, 99, 99), "2"), ((8, 16, 4), (99, 8, 99), "1+1+1"), ((4, 5, 16), (99, 4, 8), "1+2"), ((7, 9, 12), (8, 4, 8), "1")])
def test_tiled_equals_untiled_float64(norm, size, tile, stretch):
    vae = build(norm=norm, strides=((2, 2, 2), (2, 2, 2)), num_res_blocks=0 if norm == "group" else 1)
    assert_same(vae, torch.randn(1, 1, *size, dtype=torch.float64), ("tile", tile, stretch))


@pytest.mark.parametrize("norm", NORMED)
@pytest.mark.parametrize("size, tile, stretch", [
    ((37, 50, 41), (24, 32, 24), "2"), ((64, 64, 64), (32, 64, 64), "1"), ((30, 30, 30), (7, 15, 30), "1+1"),
    ((30, 9, 11), (7, 7, 7), "2")])
def test_tiled_equals_untiled_float32(norm, size, tile, stretch):
    """Width 16, as in the presets, where `layer` divides by the deviation over channels: for fewer it is tiny somewhere."""
    width = 16 if norm == "layer" else 4
    vae = build(torch.float32, base_channels=width, channel_mult=(1, 1), strides=((2, 2, 2),), num_res_blocks=0, norm=norm)
    assert_same(vae, torch.randn(1, 1, *size), ("tile", tile, stretch), 1e-5, 1e-4)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_tiled_equals_untiled_37_50_41_float64(norm):
    vae = build(base_channels=2, channel_mult=(1, 1), strides=((2, 2, 2),), num_res_blocks=0, norm=norm, norm_groups=1)
    assert_same(vae, torch.randn(1, 1, 37, 50, 41, dtype=torch.float64), ("tile", (20, 26, 64), "1"))


@pytest.mark.parametrize("strides", [((1, 2, 2), (2, 2, 2)), ((3, 1, 2), (1, 4, 1)), ((1, 1, 1), (2, 1, 5)), ((2, 3, 1), (1, 1, 1))])
def test_strides_per_axis(strides):
    for stretch in ("1", "3", "1+1+1"):
        vae = build(strides=strides, norm="layer", num_res_blocks=0)
        assert_same(vae, torch.randn(1, 1, 6, 7, 9, dtype=torch.float64), ("tile", (3, 4, 5), stretch), 1e-9, 1e-9)


@pytest.mark.parametrize("channels", range(1, 9))
def test_channels(channels):
    vae = build(in_channels=channels, channel_mult=(1, 2), strides=((1, 2, 2),))
    assert_same(vae, torch.randn(1, channels, 5, 8, 6, dtype=torch.float64), ("tile", (2, 4, 4), "2"))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_tiled(name):
    vae = VAE3D(dataclasses.replace(PRESETS[name], base_channels=PRESETS[name].base_channels // 8)).double()
    assert_same(vae, torch.randn(1, 1, 6, 18, 14, dtype=torch.float64), ("tile", (4, 8, 8)))


def test_attention_is_never_tiled():
    vae = build(attention=True, norm="group")
    assert_same(vae, torch.randn(1, 1, 6, 12, 8, dtype=torch.float64), ("tile", (4, 4, 4), "2+1"))
    plan = vae.tile_plan((6, 12, 8), 1, torch.float64)
    for layers, segments in zip((vae.encoder, vae.decoder), plan.segments):
        assert [i for s in segments for i in range(s.start, s.stop)] == list(range(len(layers)))
        for s in segments:
            assert (s.tile_units is None) == any(isinstance(layer, Attention3d) for layer in layers[s.start:s.stop])


@pytest.mark.parametrize("seed", range(24))
def test_random_configs(seed):
    """Property: for networks, sizes, tiles and stretches drawn at random, tiled equals untiled, float64."""
    r = random.Random(seed)
    levels = r.randint(1, 3)
    vae = build(in_channels=r.randint(1, 3), base_channels=r.choice([2, 3, 4]), channel_mult=[r.randint(1, 2) for _ in range(levels)],
                strides=[[r.randint(1, 3) for _ in range(3)] for _ in range(levels - 1)], num_res_blocks=r.randint(0, 1),
                norm=r.choice(NORMED), attention=r.random() < 0.2)
    size, tile = [r.randint(1, 14) for _ in range(3)], [r.randint(2, 12) for _ in range(3)]
    x = torch.randn(r.randint(1, 2), vae.cfg.in_channels, *size, dtype=torch.float64)
    assert_same(vae, x, ("tile", tile, r.choice(tile_plans.compositions(3))), 1e-9, 1e-9)


@pytest.mark.parametrize("upsample", vae3d.UPSAMPLES)
@pytest.mark.parametrize("fields", [
    dict(strides=((2, 2, 2), (2, 2, 2)), norm="group", quant_conv="split", post_quant_conv=True, encoder_middle="none",
         decoder_extra_blocks=0),
    dict(strides=((3, 1, 2), (1, 4, 2)), up_strides=((1, 4, 2), (3, 1, 2)), quant_conv="joint",
         attention_levels=(False, False, True))], ids=("monai", "other strides up"))
def test_networks_of_others_tiled(upsample, fields):
    vae = build(upsample=upsample, down_padding="end", head_act=False, **fields)
    for tile, stretch in (((4, 4, 4), "2"), ((8, 4, 4), "1+1")):
        assert_same(vae, torch.randn(1, 1, 11, 10, 9, dtype=torch.float64), ("tile", tile, stretch))


def strided_layers():
    """Kinds of layers that other networks have: (name, layers, size)."""
    conv, transposed = partial(nn.Conv3d, dtype=torch.float64), partial(nn.ConvTranspose3d, dtype=torch.float64)
    one, two = (vae3d.make_norm("group", 2, groups).double() for groups in (1, 2))
    return [("asymmetric padding", [conv(2, 2, 3, 1, 1), nn.ConstantPad3d((0, 1, 0, 1, 0, 1), 0.0), conv(2, 3, 3, 2), conv(3, 2, 3, 1, 1)],
             (8, 9, 13)),
            ("pointwise", [conv(2, 3, 1), nn.SiLU(), conv(3, 2, 3, padding=1), conv(2, 1, 1)], (5, 6, 7)),
            ("patchify", [conv(2, 3, 2, 2), conv(3, 3, 3, padding=1), transposed(3, 2, 2, 2)], (7, 8, 12)),
            ("transposed", [conv(2, 2, 3, padding=1), transposed(2, 3, 3, (2, 1, 3), 1, (1, 0, 2)), conv(3, 2, 3, padding=1)], (4, 7, 5)),
            ("odd stride", [conv(2, 2, 3, 2, 1), conv(2, 2, 3, 2, 1)], (11, 13, 7)),
            ("dilated, wide", [conv(2, 2, 3, padding=2, dilation=2), conv(2, 2, 5, padding=1, groups=2)], (9, 8, 11)),
            ("strided, wide", [conv(2, 2, 5, 3, 2), conv(2, 2, (1, 3, 5), padding=(0, 1, 2))], (16, 17, 18)),
            ("linear", [nn.Upsample(scale_factor=(2, 1, 3), mode="trilinear"), conv(2, 2, 3, padding=1),
                        nn.Upsample(scale_factor=(1, 4, 2), mode="trilinear")], (4, 5, 6)),
            ("norm first", [one, conv(2, 2, 3, padding=1), two], (6, 5, 7))]


@pytest.mark.parametrize("case", range(9), ids=[name for name, _, _ in strided_layers()])
@pytest.mark.parametrize("step", [(1, 1, 1), (2, 3, 1), (1, 99, 2)])
def test_other_kinds_of_layers(case, step):
    """The halo comes from the layers' own attributes: any local ones, any sizes."""
    _, layers, size = strided_layers()[case]
    whole = nn.Sequential(*layers)
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    want = whole(x)
    got = tiles.run_tiled(layers, step, x)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    weight = torch.randn_like(want)
    inputs = [x, *whole.parameters()]
    names = ["input", *dict(whole.named_parameters())]
    for name, a, b in zip(names, torch.autograd.grad(want, inputs, weight), torch.autograd.grad(got, inputs, weight)):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("norm", ["none", "group"])
def test_gradcheck_of_a_stretch(norm):
    build().memory("tile")                                       # brings the rows of our own layers
    layers = [ResBlock3d(2, 3, norm, 1).double(), nn.Conv3d(3, 2, 3, 2, 1, dtype=torch.float64)]
    x = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters[2:] if norm == "none" else parameters[4:]:
        p.requires_grad_(False)                                  # numbers of evaluations; the rest is covered by equality
    assert torch.autograd.gradcheck(lambda x, *_: tiles.run_tiled(layers, (1, 1, 1), x), (x, *parameters), fast_mode=True)
    assert torch.autograd.gradcheck(lambda x: tiles.run_tiled(layers, (1, 1, 1), x), (x,))


# ------------------------------------------------------------------------------------------------ tile: circumstances

TILE = ("tile", (4, 8, 4), "2+1")


@pytest.mark.parametrize("norm", NORMED)
def test_autocast_bfloat16(norm):
    """Both modes round at the same places; they differ by what bf16 rounds of sums in another order."""
    vae, x = build(torch.float32, base_channels=8, norm=norm), torch.randn(1, 1, 8, 16, 12)
    exact, exact_grads = outputs_and_gradients(vae, x, ("none",))
    errors = {}
    for setting in [("none",), TILE]:
        out, grads = outputs_and_gradients(vae, x, setting, torch.autocast("cpu", torch.bfloat16))
        assert out[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads.values())
        errors[setting] = [relative(a, b) for a, b in zip(exact, out)], [relative(exact_grads[name], grads[name]) for name in grads]
    for plain, tiled in zip(errors["none",], errors[TILE]):      # no further from float32 than plain autocast
        found = max(plain), max(tiled), sum(plain), sum(tiled)
        assert max(tiled) <= 1.5 * max(plain) + 1e-3 and sum(tiled) <= 1.2 * sum(plain) + 1e-3, found


def test_no_grad_and_inference_mode():
    vae, x = build(norm="group").eval(), torch.randn(1, 1, 9, 12, 10, dtype=torch.float64)
    want = vae(x).recon.detach()
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard:
            got = vae.memory(*TILE)(x).recon
        assert not got.requires_grad
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_gradient_of_the_input_only_and_of_parameters_only():
    vae, x = build(norm="group", num_res_blocks=0), torch.randn(1, 1, 6, 8, 4, dtype=torch.float64)
    assert_same(vae, x, TILE, input_grad=False)
    vae.requires_grad_(False)
    assert_same(vae, x, TILE)
    for i, p in enumerate(vae.parameters()):                     # some frozen
        p.requires_grad_(i % 3 == 0)
    assert_same(vae, x, TILE, input_grad=False)
    vae.requires_grad_(False)
    vae.decoder[-1].requires_grad_(True)                         # the last layer alone
    assert_same(vae, x, TILE, input_grad=False)


def test_accumulation_scaler_and_setting_the_dial_between_micro_batches():
    vae = build()
    volumes = torch.randn(4, 1, 6, 8, 8, dtype=torch.float64).split(1)
    settings = [("none",), ("checkpoint",), TILE, ("tile", (2, 4, 4), "1")]
    sums = []
    for each in (settings[:1] * 4, settings):
        vae.zero_grad(set_to_none=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 8)
        for x, setting in zip(volumes, each):
            scaler.scale(objective(vae.memory(*setting)(x, torch.Generator().manual_seed(1))) / 4).backward()
        opt = torch.optim.SGD(vae.parameters(), 0.0)
        scaler.unscale_(opt)
        sums.append([p.grad for p in vae.parameters()])
    assert max(map(relative, *sums)) < 1e-10


def test_batch_layouts_and_views():
    vae = build(norm="group", in_channels=3, num_res_blocks=0)
    x = torch.randn(2, 3, 4, 12, 8, dtype=torch.float64)
    assert_same(vae, x, TILE)
    want = vae.memory("none").eval()(x).recon
    vae.memory(*TILE)
    spaced = torch.zeros(2, 6, 4, 12, 16, dtype=torch.float64)[:, ::2, :, :, ::2]
    spaced.copy_(x)
    for view in (x.to(memory_format=torch.channels_last_3d), spaced, x.transpose(3, 4).contiguous().transpose(3, 4)):
        torch.testing.assert_close(vae(view).recon, want, rtol=1e-10, atol=1e-10)
    last = build(torch.float32, in_channels=3).to(memory_format=torch.channels_last_3d).memory(*TILE)
    recon = last(x.float().to(memory_format=torch.channels_last_3d)).recon
    assert recon.is_contiguous(memory_format=torch.channels_last_3d)


def test_hooks_of_parameters_fire_once():
    """DDP hangs its all-reduce on a parameter's accumulation; it must run once a backward, not once a tile."""
    vae, calls = build(), []
    for name, p in vae.named_parameters():
        p.register_hook(lambda g, name=name: calls.append(name))
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
    objective(vae.memory(*TILE)(torch.randn(1, 1, 8, 8, 8, dtype=torch.float64))).backward()
    assert sorted(calls) == sorted(2 * [name for name, _ in vae.named_parameters()])


def ddp_case():
    return build(norm="group", num_res_blocks=0), torch.randn(1, 1, 4, 8, 8, dtype=torch.float64)


def ddp_gradients_of_rank(folder: Path) -> None:
    """One of two processes, both with the same sample."""
    torch.distributed.init_process_group("gloo")
    vae, x = ddp_case()
    parallel = nn.parallel.DistributedDataParallel(vae.memory(*TILE))
    objective(parallel(x, torch.Generator().manual_seed(1))).backward()
    torch.save({name: p.grad for name, p in vae.named_parameters()}, folder / f"{torch.distributed.get_rank()}.pt")
    del parallel                                                 # before its group: else it joins the group's threads while it has the GIL,
    gc.collect()                                                 # for which they may be waiting (torch 2.13: docs/LOG.md)
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(pool, tmp_path):
    vae, x = ddp_case()
    _, want = outputs_and_gradients(vae, x, ("none",))
    pool(2, ddp_gradients_of_rank, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert max(relative(want[name], found[name]) for name, _ in vae.named_parameters()) < 1e-10


def test_offloaded_and_changed_tensors():
    """What is saved goes through autograd's own store: hooks may move it, and changing a weight in between is an error."""
    vae, x = build(), torch.randn(1, 1, 8, 8, 8, dtype=torch.float64)
    assert_same(vae, x, TILE, wrap=torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t))
    loss = objective(vae.memory(*TILE)(x))
    with torch.no_grad():
        vae.encoder[0].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decode_and_encode_alone():
    vae, z = build(norm="group"), torch.randn(1, 2, 3, 4, 5, dtype=torch.float64)
    want = vae.decode(z, (5, 13, 18))
    assert want.shape == (1, 1, 5, 13, 18)
    vae.memory(*TILE)
    torch.testing.assert_close(vae.decode(z, (5, 13, 18)), want, rtol=1e-10, atol=1e-10)
    x = torch.randn(1, 1, 5, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(vae.encode(x).mu, vae.memory("none").encode(x).mu, rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------------------------------------ tile: memory and planning

class Live(TorchDispatchMode):
    """Counts the bytes of tensor storages that are alive; `peak` is the most there were."""
    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in self.sizes:
                self.sizes[key] = t.untyped_storage().nbytes()
                self.now += self.sizes[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(t.untyped_storage(), self.free, key)
        return out

    def free(self, key):
        self.now -= self.sizes.pop(key)


def peak(vae, setting, size, training=True) -> int:
    x = torch.zeros(1, 1, *size)
    vae.memory(*setting)
    vae.zero_grad(set_to_none=True)
    with Live() as live, torch.set_grad_enabled(training):
        out = vae(x)
        if training:
            out.recon.backward(out.recon.detach())
    return live.peak


def test_live_bytes_fall_with_the_tile_and_hardly_grow_with_the_volume():
    vae = build(torch.float32, base_channels=8, channel_mult=(1, 1), strides=((2, 2, 2),), num_res_blocks=0)
    large, short, long = (64, 32, 32), (64, 16, 16), (128, 16, 16)   # short and long: interior tiles in both
    none, checkpointed, two, four = (peak(vae, s, large) for s in (
        ("none",), ("checkpoint",), ("tile", (32, 32, 32), "2"), ("tile", (16, 16, 16), "2")))
    assert checkpointed < 0.95 * none and two < 0.9 * checkpointed and four < 0.6 * two, (none, checkpointed, two, four)
    grown, plain = ((peak(vae, s, long) - peak(vae, s, short)) / (prod3(long) - prod3(short))
                    for s in (("tile", (16, 16, 16), "2"), ("none",)))
    assert grown <= 20 < 200 < plain, (grown, plain)             # float32: x, recon and its gradient 12, latent and its gradients the rest
    untiled, tiled = (peak(vae, s, large, training=False) for s in (("none",), ("tile", (16, 16, 16), "2")))
    assert tiled < 0.7 * untiled, (untiled, tiled)


def test_plans_trade_work_for_memory_and_are_settings_of_the_dial():
    vae = VAE3D.from_preset("high_res").memory("tile")
    plans = vae.tile_plans((93, 96, 96))
    assert len(plans) > 5 and all(a.work < b.work and a.peak_bytes > b.peak_bytes for a, b in zip(plans, plans[1:]))
    assert 1 < plans[0].work < 1.2
    for plan in plans[::4]:
        again = VAE3D.from_preset("high_res").memory("tile", plan.tile, plan.stretch)
        assert again.tile_plan((96, 96, 96), 1, torch.float32) == plan
    budget = plans[3].peak_bytes / 2 ** 30
    assert vae.memory("tile", budget=budget).tile_plan((96, 96, 96), 1, torch.float32) == plans[3]
    assert vae.memory("tile", budget=1e-9).tile_plan((96, 96, 96), 1, torch.float32) == plans[-1]
    assert vae.memory("tile").tile_plan((96, 96, 96), 1, torch.float32).work <= tile_plans.WORK_BOUND
    grouped = VAE3D.from_preset("high_res", norm="group").memory("tile", (32, 32, 32), "1")
    plain = vae.memory("tile", (32, 32, 32), "1")
    assert grouped.tile_plans((96, 96, 96))[0].work > 1.5 * plain.tile_plans((96, 96, 96))[0].work  # a pass more for each norm


def test_estimate_is_near_the_counted_peak():
    vae = build(torch.float32, base_channels=8, channel_mult=(1, 2), strides=((2, 2, 2),))
    for setting in [("tile", (16, 32, 24), "1"), ("tile", (16, 16, 24), "2"), ("tile", (8, 16, 24), "1+1")]:
        counted = peak(vae, setting, (32, 32, 24)) + 16 * count(vae)
        ratio = vae.tile_plan((32, 32, 24), 1, torch.float32).peak_bytes / counted
        assert 0.75 < ratio < 1.33, (setting, ratio)


def test_fake_tensors_run_each_kind_of_tile_once():
    """Memory prediction: a volume of any size takes as many operations as there are kinds of tiles."""
    ran = []
    with FakeTensorMode():
        vae = VAE3D.from_preset("high_res", num_res_blocks=0).memory("tile", (64, 1024, 128), "1", rehearsal=True)
        x = torch.empty(1, 1, 1024, 1024, 1024, dtype=torch.bfloat16)
        original, tiles.run_tile = tiles.run_tile, lambda *args: ran.append(1) or original(*args)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                out = vae(x)
            out.recon.backward(out.recon)
        finally:
            tiles.run_tile = original
    assert out.recon.shape == x.shape and all(p.grad is not None for p in vae.parameters())
    assert len(ran) <= 2 * 2 * 4 * 4, len(ran)                   # sides, forward and backward, kinds along D and W; 2 x 2 x 128 tiles


@pytest.mark.parametrize("broken", ["halo", "overlap", "statistics"])
def test_these_tests_notice_a_broken_engine(broken, monkeypatch):
    """One voxel of halo too few, halos that overwrite instead of adding, statistics of a tile: each must show."""
    if broken == "halo":
        conv = local_layers.LOCAL[nn.Conv3d]

        def pull(op, axis, lo, hi, n):
            start, stop, cut = conv.pull(op, axis, lo, hi, n)
            if op.stride[axis] == 1 and stop < n:
                return start, stop - 1, Cut((1, 1), cut.crop if any(cut.pad) else 1, cut.length)
            return start, stop, cut

        monkeypatch.setitem(local_layers.LOCAL, nn.Conv3d, dataclasses.replace(conv, pull=pull))
    elif broken == "overlap":
        monkeypatch.setattr(Stretch, "tiles", lambda self, x, end=None, whole=Stretch.tiles: list(whole(self, x, end))[1:])
    else:
        whole_statistics = tiles.volume_statistics
        monkeypatch.setattr(tiles, "volume_statistics", lambda parts, *rest: whole_statistics(iter(list(parts)[:1]), *rest))
    vae = build(norm="group" if broken == "statistics" else "none")
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(vae, torch.randn(1, 1, 8, 16, 8, dtype=torch.float64), ("tile", (4, 8, 8), "1"))


def test_progress_is_told_tile_by_tile():
    vae, seen = build(torch.float32).memory("tile", (4, 8, 8), "1"), []
    vae.progress = lambda *told: seen.append(told)
    with torch.no_grad():
        vae(torch.randn(1, 1, 8, 16, 16))
    for part, layers in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        shares = [done / total for done, total, name in seen if name == part]
        assert len(shares) >= 8 and shares == sorted(shares) and 0 < shares[0] and {t for _, t, n in seen if n == part} == {len(layers)}


# ------------------------------------------------------------------------------------------------------------------ codebooks

def quantizer(num_codes=16, code_dim=3, dtype=torch.float32, **options) -> quantize.VectorQuantizer:
    torch.manual_seed(1)
    vq = quantize.VectorQuantizer(num_codes, code_dim, **options).to(dtype)
    with torch.no_grad():
        vq.codebook.copy_(vq.on_sphere(torch.randn_like(vq.codebook)))
        vq.code_sum.copy_(vq.codebook)
    return vq


def slow_index(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([(row - codes).square().sum(1).argmin() for row in rows])


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_is_the_papers_formula_term_by_term(cosine):
    """arXiv:1711.00937, Eq. 3, with its stop-gradients written out; the gradient of a later loss goes straight through."""
    vq = quantizer(dtype=torch.float64, update="gradient", lambda_vq=0.7, lambda_commitment=0.3, cosine=cosine)
    z = torch.randn(2, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)
    codes = vq.quantize_volume(z)
    (codes.vq_loss + (codes.z_q * weight).sum()).backward()

    z2, e = z.detach().clone().requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    x, book = (F.normalize(z2, dim=1), F.normalize(e, dim=1)) if cosine else (z2, e)
    index = slow_index(x.detach().movedim(1, -1).reshape(-1, 3), book.detach())
    code = book[index].view(2, 2, 3, 2, 3).movedim(-1, 1)
    loss = 0.7 * (x.detach() - code).square().mean() + 0.3 * (x - code.detach()).square().mean()
    (loss + (x * weight).sum()).backward()
    assert torch.equal(codes.index.flatten(), index) and torch.equal(codes.z_q, code)
    torch.testing.assert_close(codes.vq_loss, loss)
    torch.testing.assert_close(z.grad, z2.grad)
    torch.testing.assert_close(vq.codebook.grad, e.grad)


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_agrees_with_vector_quantize_pytorch(cosine):
    """The same indices, and the same codebook after three EMA updates."""
    reference = pytest.importorskip("vector_quantize_pytorch")
    vq = quantizer(64, 4, cosine=cosine, decay=0.8, restart=0.0).train()
    theirs = reference.VectorQuantize(4, codebook_size=64, decay=0.8, use_cosine_sim=cosine, threshold_ema_dead_code=0, kmeans_init=False)
    book = theirs._codebook
    book.embed.data.copy_(vq.codebook[None])
    book.embed_avg.data.copy_(vq.code_sum[None])
    book.cluster_size.data.copy_(vq.code_count[None])
    theirs.train()
    for step in range(3):
        z = torch.randn(2, 4, 3, 5, 4)
        index = theirs(z.movedim(1, -1).flatten(1, 3))[1]
        codes = vq.quantize_volume(z)
        vq.update()
        assert torch.equal(codes.index.flatten(), index.flatten()), step
        difference = (vq.codebook - book.embed[0]).abs().max().item()
        assert difference < 1e-5, difference


def test_search_equals_argmin_and_is_chunked(monkeypatch):
    rows, codes = torch.randn(700, 4, dtype=torch.float64), torch.randn(90, 4, dtype=torch.float64)
    whole = quantize.nearest(rows, codes, statistics=True)
    assert torch.equal(whole[0], slow_index(rows, codes))
    assert torch.equal(whole[1], torch.bincount(whole[0], minlength=90).double())
    torch.testing.assert_close(whole[2], torch.zeros_like(codes).index_add_(0, whole[0], rows))
    monkeypatch.setattr(quantize, "SEARCH_ELEMENTS", 90 * 33)
    for a, b in zip(quantize.nearest(rows, codes, statistics=True), whole):
        torch.testing.assert_close(a, b)


def test_search_of_a_radar_volume_stays_within_a_quarter_gib():
    """408,576 latents x 8,192 codes: peak above inputs and outputs, on fake tensors (the same storages as real ones)."""
    from peaks import LiveStorages
    with FakeTensorMode():
        counter = LiveStorages("cpu")
        rows, codes = torch.empty(408_576, 4), torch.empty(8192, 4)
        with counter:
            found = quantize.nearest(rows, codes, statistics=True)
            outputs = sum(t.untyped_storage().nbytes() for t in found)
        peak = counter.peak()[0]
    assert 2 ** 26 < peak - outputs <= 0.25 * 2 ** 30, (peak - outputs) / 2 ** 30


def test_micro_batches_and_repeated_forwards_move_the_codebook_as_one_batch():
    z = torch.randn(4, 3, 2, 3, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    states = []
    for parts in ([4], [1, 3], [2, 2]):
        vq = quantizer(restart=0.5).train()
        for g, seed in zip(generators, range(4)):
            g.manual_seed(seed)
        at = 0
        for n in parts:
            vq.quantize_volume(z[at:at + n], generators[at:at + n])
            at += n
        vq.update(torch.Generator().manual_seed(5))
        states.append(vq.state_dict())
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, msg=name)
    vq = quantizer()
    before = vq.codebook.clone()
    vq.eval().quantize_volume(z)
    vq.update()
    assert torch.equal(vq.codebook, before), "an evaluation moved the codebook"


def test_dead_codes_revive():
    """DEFECTS 11: 13 of 8192 codes in use. All latents lie far from a codebook that starts in one corner."""
    torch.manual_seed(0)
    with_restart, without = quantizer(64, 2), quantizer(64, 2, restart=0.0)
    for vq in (with_restart, without):
        vq.codebook.mul_(0.01).sub_(5)
        vq.code_sum.copy_(vq.codebook)
        for step in range(150):
            z = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(step))
            vq.quantize_volume(z, torch.Generator().manual_seed(step))
            vq.update(torch.Generator().manual_seed(step))
    z = torch.randn(1, 2, 16, 16, 16)
    used = [len(vq.eval().quantize_volume(z).index.unique()) for vq in (with_restart, without)]
    assert used[0] >= 60 and used[1] < 20, used


@pytest.mark.parametrize("how", ["kmeans", "samples"])
def test_codebook_starts_from_data(how):
    centres = torch.tensor([[-3.0, 0], [3, 0], [0, 4], [0, -4]])
    rows = centres.repeat(100, 1) + 0.1 * torch.randn(400, 2)
    vq = quantizer(4, 2)
    vq.fit(rows, how, torch.Generator().manual_seed(0))
    assert (rows[:, None] - vq.codebook).norm(dim=-1).min(0).values.max() < 0.2          # a code is where data are
    if how == "kmeans":
        assert torch.cdist(centres, vq.codebook).min(1).values.max() < 0.1


def test_codes_keep_float32_under_autocast():
    vq = quantizer(512, 4)
    z = torch.randn(1, 4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes = vq.quantize_volume(z)
    assert codes.z_q.dtype == torch.float32 and torch.equal(codes.index, vq.quantize_volume(z).index)
    assert torch.equal(vq.quantize_volume(z.bfloat16()).index, vq.quantize_volume(z.bfloat16().float()).index)


def test_fsq_is_the_papers_formula_and_every_code_is_reached():
    """arXiv:2309.15505: values of each channel are the levels, evenly spaced; index <-> code is a bijection."""
    for levels in ((8, 5, 5, 5), (4, 3), (2, 7)):
        fsq = quantize.FiniteScalarQuantizer(levels)
        z = (4 * torch.randn(1, len(levels), 20, 20, 20, dtype=torch.float64)).requires_grad_()
        codes = fsq.quantize_volume(z)
        for channel, n in enumerate(levels):
            assert len(codes.z_q[:, channel].unique()) == n
        every = torch.arange(fsq.num_codes).view(1, -1, 1, 1)
        points = fsq.lookup_volume(every)
        assert len({tuple(p.tolist()) for p in points[0, :, :, 0, 0].T}) == fsq.num_codes and points.abs().max() <= 1
        assert torch.equal(fsq.lookup_volume(codes.index), codes.z_q.float())
        codes.z_q.sum().backward()
        for channel, n in enumerate(levels):                     # the gradient is that of the bounding function
            half, offset = (n - 1) * (1 + 1e-3) / 2, 0.5 if n % 2 == 0 else 0.0
            shifted = z[:, channel].detach() + torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
            torch.testing.assert_close(z.grad[:, channel], (1 - shifted.tanh() ** 2) * half / (n // 2))


@pytest.mark.parametrize("fields", [dict(bottleneck="vq", num_codes=32), dict(bottleneck="vq", num_codes=32, codebook_cosine=True),
                                    dict(bottleneck="fsq", fsq_levels=(5, 4))], ids=str)
def test_network_with_codes(fields):
    vae = build(torch.float32, **fields)
    x = torch.randn(2, 1, 5, 9, 12)
    recon, vq_loss, index = vae(x, [torch.Generator().manual_seed(i) for i in range(2)])
    assert recon.shape == x.shape and vq_loss.shape == () and index.shape == (2, *vae.latent_size(x.shape[2:]))
    (recon.square().mean() + vq_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())
    z_q, vq_loss, index = vae.eval().encode(x)
    assert torch.equal(vae.decode_indices(index, x.shape[2:]), vae.decode(z_q, x.shape[2:]))
    assert torch.equal(vae.decode_indices(index, x.shape[2:]), vae(x).recon)
    vae.memory("tile", (4, 4, 4))
    torch.testing.assert_close(vae.encode(x).z_q, z_q)
    with pytest.raises(ValueError, match="vae.bottleneck is kl"):
        build().decode_indices(index)


@pytest.mark.parametrize("fields", [dict(bottleneck="vq", num_codes=32), dict(bottleneck="fsq", fsq_levels=(5, 4))], ids=str)
def test_tiles_are_exact_through_a_codebook(fields):
    x, results = torch.randn(1, 1, 11, 14, 13, dtype=torch.float64), []
    for setting in (("none",), ("checkpoint",), ("tile", (4, 8, 4), "2"), ("tile", (4, 8, 4), "1+1")):
        vae = build(**fields).memory(*setting)
        out = vae(x, torch.Generator().manual_seed(1))
        (out.recon.square().mean() + out.vq_loss).backward()
        results.append((out, [p.grad for p in vae.encoder.parameters()] + [p.grad for p in vae.decoder.parameters()]))
    for out, gradients in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-8, atol=1e-9)


def test_learned_codebook_and_other_fields_change_something():
    """The fields of the codebook act in training: the codebook after one step differs for each of them."""
    def codebook(**fields):
        vae = build(torch.float32, **{"bottleneck": "vq", "num_codes": 8, "codebook_update": "ema", **fields}).train()
        rows = vae.latent(torch.linspace(-1, 1, 8 * 16 * 16).view(1, 1, 8, 16, 16).sin()).detach().movedim(1, -1).flatten(0, 3)
        if vae.cfg.codebook_init != "uniform":
            vae.quantizer.fit(rows, vae.cfg.codebook_init, torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
        for step in range(3):
            out = vae(torch.linspace(-1, 1, 8 * 16 * 16).view(1, 1, 8, 16, 16).sin(), torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (out.recon.square().mean() + out.vq_loss).backward()
            optimizer.step()
            vae.quantizer.update(torch.Generator().manual_seed(step))
        return [round(v, 6) for v in vae.quantizer.codebook.detach().flatten().tolist()]

    plain = codebook()
    for change in CODEBOOK_FIELDS:
        before = codebook(codebook_update="gradient") if change == dict(codebook_update="gradient", lambda_vq=3.0) else plain
        assert codebook(**change) != before, change


CODEBOOK_FIELDS = [dict(num_codes=6), dict(codebook_update="gradient"), dict(codebook_update="gradient", lambda_vq=3.0),
                   dict(codebook_decay=0.5), dict(codebook_init="samples"), dict(codebook_cosine=True), dict(codebook_restart=0.9),
                   dict(lambda_commitment=2.0)]


def codebook_of_rank(folder: Path) -> None:
    """One of two processes, each with half of the batch; it saves what came out."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    vq = quantizer(16, 3, torch.float64, restart=0.5).train()
    for step in range(3):
        z = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        vq.quantize_volume(z[2 * rank:2 * rank + 2], [torch.Generator().manual_seed(10 * step + 2 * rank + i) for i in range(2)])
        vq.update(torch.Generator().manual_seed(step))
    torch.save(vq.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_codebook_is_the_same_on_two_processes_as_on_one(pool, tmp_path):
    pool(2, codebook_of_rank, tmp_path)
    vq = quantizer(16, 3, torch.float64, restart=0.5).train()
    for step in range(3):
        z = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        vq.quantize_volume(z, [torch.Generator().manual_seed(10 * step + i) for i in range(4)])
        vq.update(torch.Generator().manual_seed(step))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in vq.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value)
