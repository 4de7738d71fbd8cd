"""vae3d.py: the network, its config, and what the dial keeps."""
import dataclasses
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lean_conv
import local_layers
import quantize
import tiles
import vae3d
from networks import (
    CODEBOOK_FIELDS,
    assert_same,
    build,
    count,
    objective,
    relative,
)
from pieces import Largest, run_alone
from vae3d import PRESETS, VAE3D, Attention3d, ResBlock3d, VAEConfig


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ the network

COUNTS = {
    "ultra_lightweight": (694_748, 693_180),
    "lightweight": (2_717_676, 2_714_604),
    "base": (7_652_588, 7_647_532),
    "standard": (40_847_052, 40_833_356),
    "high_res": (1_927_292, 1_924_764),
    "fast": (660_232, 659_336), "sharp": (2_485_736, 2_483_944), "thick": (632_568, 631_672),
}


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


@pytest.mark.parametrize(
    "fields",
    [
        dict(num_res_blocks=0),
        dict(num_res_blocks=0, channel_mult=(1, 2, 3)),
        dict(base_channels=48, norm="group", norm_groups=32),
        dict(base_channels=20, norm="group", norm_groups=32),
        dict(base_channels=7, norm="group", norm_groups=32),
        dict(attention=True),
        dict(channel_mult=(1,), strides=()),
        dict(channel_mult=(1, 1), strides=((1, 1, 1),)),
        *(dict(in_channels=c) for c in range(1, 9)),
    ],
)
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
    assert (
        out.mu.shape[2:]
        == vae.latent_size(size)
        == tuple(-(-n // s) for n, s in zip(size, vae.cfg.total_stride))
    )


def test_resblock_equals_an_obvious_one():
    block = ResBlock3d(4, 6, "group", 2).double()
    x = torch.randn(2, 4, 3, 5, 4, dtype=torch.float64)
    norm = [lambda t, n=n: F.group_norm(t, 2, n.weight, n.bias, 1e-6) for n in (block.norm1, block.norm2)]

    def silu(t):
        return t / (1 + (-t).exp())

    h = F.conv3d(silu(norm[0](x)), block.conv1.weight, block.conv1.bias, padding=1)
    h = F.conv3d(silu(norm[1](h)), block.conv2.weight, block.conv2.bias, padding=1)
    want = (
        h
        + torch.einsum("oi,bidhw->bodhw", block.skip.weight[:, :, 0, 0, 0], x)
        + block.skip.bias[:, None, None, None]
    )
    torch.testing.assert_close(block(x), want, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(block, (x[:1, :, :2, :2, :2].clone().requires_grad_(),))


def test_attention_equals_an_obvious_one_and_uses_sdpa(monkeypatch):
    attention = Attention3d(8, "none", head_channels=4).double()
    x, calls = torch.randn(2, 8, 2, 3, 2, dtype=torch.float64), []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or sdpa(*a, **k))
    got = attention(x)
    assert calls == [1]
    # (B, N, C).
    rows = F.layer_norm(x.flatten(2).transpose(1, 2), (8,), attention.norm.weight, attention.norm.bias, 1e-6)
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
    # Sum of squares minus squared mean would lose the variance in float32.
    far = torch.randn(1, 2, 8, 8, 8) + 1e4
    _, var = tiles.volume_statistics(iter(far.split(1, dim=2)), 2)
    torch.testing.assert_close(var.double(), far.double().var((2, 3, 4), correction=0), rtol=1e-3, atol=0)


@pytest.mark.slow
def test_gradcheck_of_the_network():
    vae = build(
        base_channels=2, channel_mult=(1, 1), strides=((1, 2, 2),), num_res_blocks=0, z_channels=1
    ).eval()
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
    torch.testing.assert_close(
        vae(x[1:], [torch.Generator().manual_seed(1)]).recon, one_each[1:], rtol=1e-5, atol=1e-6
    )
    assert not torch.equal(vae(x).recon, vae(x).recon)
    vae.eval()
    assert torch.equal(vae(x).recon, vae(x).recon)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VAE3D(VAEConfig())(torch.zeros(1, 2, 4, 4, 4)), "make vae.in_channels"),
        (lambda: VAE3D(VAEConfig())(torch.zeros(1, 4, 4, 4)), r"got \(1, 4, 4, 4\)"),
        (lambda: VAE3D.from_preset("basic"), "choose one of ultra_lightweight"),
        (lambda: VAEConfig(strides=((2, 2, 2),)), "one D,H,W triple between levels"),
        (lambda: VAEConfig(strides=((2, 2, 2), (0, 1, 1))), "three positive integers"),
        (lambda: VAEConfig(base_channels=0), "vae.base_channels must be at least 1"),
        (lambda: VAEConfig(channel_mult=()), "one positive entry a level"),
        (lambda: VAEConfig(norm="batch"), "vae.norm must be one of none, group, layer"),
        (lambda: VAEConfig(bottleneck="vqvae"), "vae.bottleneck must be one of kl, vq, fsq"),
        (
            lambda: VAEConfig(bottleneck="fsq", fsq_levels=(8, 5)),
            "one number of 2 or more for each of vae.z_channels=4",
        ),
        (
            lambda: VAEConfig(intensity_range=(1, 0)),
            "vae.intensity_range needs two numbers, the lower first, such as 0,1",
        ),
        (lambda: VAEConfig(norm_eps=0.0), "vae.norm_eps must be above 0"),
        (
            lambda: VAEConfig(blocks_per_level=(1, 1)),
            "vae.blocks_per_level needs one entry for each of 3 levels",
        ),
        (
            lambda: VAEConfig(attention_levels=(True,)),
            "vae.attention_levels needs one entry for each of 3 levels",
        ),
        (
            lambda: VAEConfig(num_res_blocks=0, decoder_extra_blocks=0),
            "make it 1, or vae.num_res_blocks at least 1",
        ),
        (
            lambda: VAEConfig(encoder_middle="yes"),
            "vae.encoder_middle must be one of none, blocks, attention",
        ),
        (
            lambda: VAEConfig(upsample="bilinear"),
            "vae.upsample must be one of nearest, trilinear, transposed, transposed3",
        ),
        (lambda: VAEConfig(up_strides=((2, 2, 2), (2, 2, 2))), "vae.up_strides must undo vae.strides"),
        (
            lambda: quantize.VectorQuantizer(8, 4).quantize_volume(torch.zeros(1, 3, 2, 2, 2)),
            "codes of 4 numbers, got z with 3 channels",
        ),
        (
            lambda: quantize.FiniteScalarQuantizer((8, 5)).quantize_volume(torch.zeros(1, 3, 2, 2, 2)),
            "2 levels, got z with 3 channels",
        ),
        (lambda: VAE3D(VAEConfig()).memory("tiles"), "one of none, checkpoint, tile"),
        (lambda: VAE3D(VAEConfig()).memory("tile", (64, 64)), "three positive integers"),
        (lambda: VAE3D(VAEConfig()).memory("tile", (64, 64, 0)), "three positive integers"),
        (lambda: VAE3D(VAEConfig()).memory("tile", stretch="top"), "auto or levels a stretch such as"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "change",
    [
        dict(in_channels=2),
        dict(base_channels=8),
        dict(channel_mult=(1, 2, 3)),
        dict(num_res_blocks=0),
        dict(strides=((2, 2, 2), (2, 2, 2))),
        dict(z_channels=3),
        dict(norm="layer"),
        dict(attention=True),
        dict(norm="group", norm_groups=4),
        dict(attention=True, head_channels=2),
        dict(bottleneck="vq"),
        dict(bottleneck="fsq", fsq_levels=(5, 3)),
        dict(norm="group", norm_eps=0.1),
        dict(blocks_per_level=(1, 2, 1)),
        dict(unshuffle=(1, 2, 2)),
        dict(decoder_extra_blocks=2),
        dict(attention_levels=(False, True, False)),
        dict(encoder_middle="none"),
        dict(decoder_middle="attention"),
        dict(down_padding="end"),
        dict(upsample="trilinear"),
        dict(upsample="transposed"),
        dict(upsample="transposed3"),
        dict(head_act=False),
        dict(up_strides=((2, 2, 2), (1, 2, 2))),
        dict(up_narrows=True),
        dict(quant_conv="split"),
        dict(quant_conv="joint"),
        dict(post_quant_conv=True),
        dict(intensity_range=(0.0, 1.0)),
    ],
    ids=str,
)
def test_every_config_field_changes_something(change):
    reference = {
        key: value
        for key, value in (("norm", "group"), ("attention", True))
        if key in change and len(change) > 1
    }

    def picture(**fields):
        vae = build(torch.float32, **fields).eval()
        x = (
            torch.linspace(-1, 1, 4 * 8 * 8)
            .view(1, 1, 4, 8, 8)
            .expand(1, vae.cfg.in_channels, 4, 8, 8)
            .contiguous()
        )
        out = vae(x)
        return (
            [tuple(p.shape) for p in vae.parameters()],
            tuple(out[1].shape),
            round(out.recon.double().sum().item(), 6),
        )

    assert picture(**reference) != picture(**{**reference, **change})


def test_fields_are_all_tested():
    marks = test_every_config_field_changes_something.pytestmark[0].args[1]
    assert {f.name for f in dataclasses.fields(VAEConfig)} == {
        key for change in (*marks, *CODEBOOK_FIELDS) for key in change
    }


@pytest.mark.parametrize("mode", vae3d.MEMORY_MODES)
def test_intensity_range_is_a_map_before_and_after_the_same_network(mode):
    """The definition: [0, 3] inside, by hand; latent, reconstruction, decoded latent and gradients; zeros are
    padded inside.
    """
    vae = build(torch.float64, intensity_range=(0.0, 3.0)).memory(mode, (4, 8, 4) if mode == "tile" else None)
    plain = build(torch.float64)
    plain.load_state_dict(vae.state_dict())
    x = torch.rand(1, 1, 5, 9, 8, dtype=torch.float64) * 2 - 1
    z = torch.randn(1, vae.cfg.z_channels, 3, 3, 2, dtype=torch.float64)
    for network in (vae, plain):
        network.eval()
    out, want = vae(x), plain((x + 1) * 1.5)
    assert torch.allclose(out.mu, want.mu, atol=1e-12), (out.mu - want.mu).abs().max()
    assert torch.allclose(out.recon, want.recon / 1.5 - 1, atol=1e-12), (
        (out.recon - want.recon / 1.5 + 1).abs().max()
    )
    assert torch.allclose(vae.decode(z), plain.decode(z) / 1.5 - 1, atol=1e-12)
    out.recon.square().mean().backward()
    (want.recon / 1.5 - 1).square().mean().backward()
    for (name, a), b in zip(vae.named_parameters(), plain.parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-12), (name, (a.grad - b.grad).abs().max())


ALONE = """
import sys
import torch
import vae3d

torch.manual_seed(2)
x = torch.randn(1, 1, 5, 8, 8)

def step(*setting, **fields):
    torch.manual_seed(0)
    vae = vae3d.VAE3D(vae3d.VAEConfig(base_channels=4, **fields)).memory(*setting)
    out = vae(x, torch.Generator().manual_seed(1))
    out.recon.square().mean().backward()
    return out.recon.double().sum().item(), vae.encoder[0].weight.grad.double().sum().item()

def refused(*setting, **fields):
    try:
        step(*setting, **fields)
    except ImportError as error:
        return str(error)
"""
BESIDE = ["quantize.py", "tile_plans.py", "tiles.py", "local_layers.py", "lean_norm.py", "lean_conv.py"]


@pytest.mark.slow
def test_alone_it_is_the_kl_autoencoder_and_names_the_files_to_copy(tmp_path):
    (tmp_path / "alone").mkdir()
    said = run_alone(tmp_path / "alone", ["vae3d.py"], ALONE + """
print(*step("none"), *step("checkpoint"))
print(refused("none", bottleneck="vq"))
print(refused("none", bottleneck="fsq", z_channels=2, fsq_levels=(5, 4)))
print(refused("tile", (4, 4, 4)))
assert not {"monai", "yaml", "numpy.testing"} & set(sys.modules)
""").splitlines()
    assert said[1] == said[2] == "vae.bottleneck vq and fsq need quantize.py; copy it beside vae3d.py"
    assert said[3] == ("memory mode tile needs local_layers.py; copy tile_plans.py, tiles.py, "
                       "local_layers.py and lean_norm.py beside vae3d.py")
    (tmp_path / "all").mkdir()
    beside = run_alone(tmp_path / "all", ["vae3d.py", *BESIDE], ALONE + """
print(*step("none"), *step("checkpoint"))
print(step("none", bottleneck="vq"), step("tile", (4, 4, 4)))
""").splitlines()
    for lines in (said, beside):
        assert [float(n) for n in lines[0].split()] == pytest.approx(
            [float(n) for n in said[0].split()], rel=5e-5      # 1.5e-5 on one machine: kernels of their own
        )


@pytest.mark.slow
@pytest.mark.parametrize("missing, needs", [("tiles.py", "tiles.py"), ("tile_plans.py", "tile_plans.py"),
                                            ("lean_norm.py", "lean_norm.py")])
def test_a_missing_file_of_the_tiles_is_named(tmp_path, missing, needs):
    said = run_alone(tmp_path, ["vae3d.py", *(f for f in BESIDE if f != missing)],
                     ALONE + 'print(refused("tile", (4, 4, 4)))')
    assert f"needs {needs}; copy" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    "files, code",
    [
        (["quantize.py"], "import quantize, torch; quantize.VectorQuantizer(8, 2)(torch.randn(5, 2))"),
        (
            ["lean_conv.py"],
            "import lean_conv, torch; lean_conv.lean(torch.nn.Conv3d(1, 2, 3), torch.randn(1, 1, 4, 4, 4))",
        ),
        (
            ["tiles.py", "local_layers.py", "lean_norm.py"],
            "import tiles, torch; "
            "tiles.run_tiled([torch.nn.Conv3d(1, 2, 3)], (2, 2, 2), torch.randn(1, 1, 5, 4, 4))",
        ),
        (
            ["tile_plans.py", "tiles.py", "local_layers.py", "lean_norm.py"],
            "import tile_plans, torch; conv = torch.nn.Conv3d(1, "
            "1, 3); "
            "sides = (tile_plans.Side([conv], 1, (1, 1, 1)),); "
            "tile_plans.TileMode(tile_plans.Network(sides, 28), (2, 2, 2))",
        ),
    ],
    ids=lambda v: v[0] if isinstance(v, list) else "",
)
def test_engines_work_copied_alone(tmp_path, files, code):
    run_alone(tmp_path, files, code)


# ------------------------------------------------------------------------------------------------ checkpoint

def saved_bytes(run) -> int:
    """Bytes that autograd keeps between forward and backward."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        out = run()
    assert out is not None
    return sum(t.untyped_storage().nbytes() for t in storages.values() if not isinstance(t, nn.Parameter))


@pytest.mark.parametrize(
    "fields", [dict(norm="group"), dict(attention=True), dict(num_res_blocks=0, norm="layer")], ids=str
)
def test_checkpoint_equals_none(fields):
    assert torch.is_grad_enabled()
    assert_same(build(**fields), torch.randn(1, 1, 5, 8, 8, dtype=torch.float64), ("checkpoint",))


def test_saved_bytes_fall_along_the_dial():
    vae, x = build(torch.float32, base_channels=8), torch.randn(1, 1, 16, 16, 16)
    none, checkpointed, top, both = (saved_bytes(lambda s=s: vae.memory(*s)(x)) for s in (
        ("none",), ("checkpoint",), ("tile", (8, 8, 8), "1"), ("tile", (8, 8, 8), "2+1")))
    assert checkpointed < 0.8 * none and top < 0.5 * checkpointed and both < 0.5 * top, (
        none,
        checkpointed,
        top,
        both,
    )


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "norm, upsample", [("none", "nearest"), ("group", "trilinear"), ("layer", "nearest")]
)
def test_what_precedes_a_convolution_is_not_kept_and_the_bits_are_those_of_plain_autograd(
    norm, upsample, amp, monkeypatch
):
    monkeypatch.setattr(lean_conv, "slow_on_cpu", lambda x: False)
    vae, found = build(torch.float32, norm=norm, norm_groups=2, upsample=upsample, up_narrows=True), []
    vae.encoder.level0_block0.norm1.requires_grad_(False)
    vae.decoder.head.conv.weight.requires_grad_(False)
    for function in (
        vae3d.lean,
        lambda conv, x, *before: conv(lean_conv.prepared(nn.Sequential(*before), x)),
    ):
        monkeypatch.setattr(vae3d, "lean", function)
        x = torch.randn(1, 1, 5, 8, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()

        def forward(x=x):
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                return vae(x, torch.Generator().manual_seed(1))
        out, wanted = forward(), [x, *(p for p in vae.parameters() if p.requires_grad)]
        found.append(
            (
                [
                    out.recon,
                    *torch.autograd.grad(
                        out.recon.float().square().mean() + out.mu.mean() + out.logvar.mean(), wanted
                    ),
                ],
                saved_bytes(forward),
            )
        )
    (ours, kept), (plain, kept_by_autograd) = found
    if upsample == "nearest":                                    # folded into its convolution: to rounding
        assert relative(plain[0], ours[0]) < (0.05 if amp else 1e-5)
        assert amp or max(relative(a, b) for a, b in zip(plain, ours)) < 1e-4
    else:
        assert all(torch.equal(a, b) for a, b in zip(ours, plain))
    assert kept < 0.7 * kept_by_autograd, (kept, kept_by_autograd)


@pytest.mark.parametrize("wide", [False, True], ids=["folded", "repeated"])
@pytest.mark.parametrize("scale", [(1, 2, 2), (2, 2, 2), (3, 1, 4)])
def test_upsampling_and_its_convolution_as_one_equal_the_two(scale, wide, monkeypatch):
    """Outputs and all gradients to 1e-12 in float64, untiled and in tiles, with the same state dict."""
    up = vae3d.Upsample3d(3, 2, scale).double()
    x = torch.randn(2, 3, 5, 4, 7, dtype=torch.float64, requires_grad=True)
    larger = F.interpolate(x, scale_factor=scale, mode="nearest")
    plain = F.conv3d(larger, up.conv.weight, up.conv.bias, padding=1)
    build().memory("tile")                                       # brings the rows of our own layers
    runs = {"whole": up, "tiles": partial(tiles.run_tiled, [up], (2, 3, 2))}
    if wide:
        runs = {"repeated": lambda x: lean_conv.lean(up.conv, x, lean_conv.Repeat(scale))}
    weight = torch.randn_like(plain)
    want = [plain, *torch.autograd.grad((plain * weight).sum(), [x, *up.parameters()])]
    for name, run in runs.items():
        y = run(x)
        found = [y, *torch.autograd.grad((y * weight).sum(), [x, *up.parameters()])]
        assert max(relative(a, b) for a, b in zip(want, found)) <= 1e-12, name
    assert [*up.state_dict()] == ["conv.weight", "conv.bias"]


@pytest.mark.parametrize("block", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
def test_voxels_become_channels_and_back(block):
    """Channel c * n + place holds the voxel of that place in its block; written out voxel by voxel."""
    n = block[0] * block[1] * block[2]
    x = torch.randn(2, 3, *(2 * s for s in block))
    y = vae3d.Shuffle3d(block)(x)
    assert y.shape == (2, 3 * n, 2, 2, 2)
    for place in range(n):
        d, h, w = place // (block[1] * block[2]), place // block[2] % block[1], place % block[2]
        assert torch.equal(y[:, place::n], x[:, :, d::block[0], h::block[1], w::block[2]])
    assert torch.equal(vae3d.Shuffle3d(block, back=True)(y), x)


def test_the_voxels_of_a_block_begin_equal():
    """So no grid of dots shows in a short run; the bias too."""
    vae = VAE3D.from_preset("fast")
    x = torch.rand(1, 1, 8, 8, 8)
    blocks = vae3d.Shuffle3d((2, 2, 2))(vae.eval()(x).recon)
    assert (blocks - blocks[:, :1]).abs().max() < 1e-6 < blocks.std()


def test_the_upsampled_tensor_does_not_exist():
    up = vae3d.Upsample3d(8, 4, (2, 2, 2))
    x = torch.randn(1, 8, 8, 8, 8)
    with Largest() as seen:
        up(x)
    assert seen.float32 == 4 * 16 ** 3                           # the output; upsampled: twice that


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN")
@pytest.mark.parametrize("training", [True, False], ids=["step", "no gradient"])
def test_one_small_float32_crop_on_a_cpu_takes_onednn(training, monkeypatch):
    vae, x, real = build(torch.float32, base_channels=8), torch.randn(1, 1, 5, 8, 6), lean_conv.slow_on_cpu

    def run(layout, kernel):
        answers = []
        monkeypatch.setattr(lean_conv, "slow_on_cpu", lambda x: answers.append(kernel(x)) or answers[-1])
        with torch.set_grad_enabled(training):
            out = vae.to(memory_format=layout)(
                x.contiguous(memory_format=layout), torch.Generator().manual_seed(1)
            )
        grads = (
            torch.autograd.grad(out.recon.square().mean() + out.mu.mean(), list(vae.parameters()))
            if training
            else ()
        )
        return [out.recon, *grads], set(answers)
    plain, answers = run(torch.contiguous_format, lambda x: False)
    assert answers == {False}
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        found, answers = run(layout, real)
        assert answers == {True}
        for a, b in zip(found, plain):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())), float(
                (a - b).abs().max()
            )


def test_a_norm_changed_between_forward_and_backward_is_an_error():
    vae = build(torch.float32, norm="group", norm_groups=2)
    out = vae(torch.randn(1, 1, 4, 8, 8)).recon.square().mean()
    with torch.no_grad():
        vae.encoder.level0_block0.norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_up_convolutions_that_narrow():
    wide, narrow = (
        build(torch.float32, base_channels=8),
        build(torch.float32, base_channels=8, up_narrows=True),
    )
    assert narrow.decoder.level1_up.conv.out_channels == 8 and wide.decoder.level1_up.conv.out_channels == 16
    assert narrow(torch.randn(1, 1, 4, 8, 8)).recon.shape == (1, 1, 4, 8, 8)
    # No block is needed to change the width.
    build(torch.float32, num_res_blocks=0, decoder_extra_blocks=0, up_narrows=True)


def test_every_layer_is_checkpointed_that_keeps_more_than_its_input(monkeypatch):
    seen = []
    monkeypatch.setattr(vae3d, "checkpoint", lambda layer, x, *more, **kwargs: seen.append(layer) or layer(x))
    vae, x = (
        build(torch.float32, attention=True, down_padding="end").memory("checkpoint"),
        torch.randn(1, 1, 8, 8, 8),
    )
    vae(x)
    for layer in (*vae.encoder, *vae.decoder):
        if layer not in seen:
            channels = next(
                m.in_channels for m in layer.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))
            )
            y = torch.randn(1, channels, 8, 8, 8, requires_grad=True)
            kept = saved_bytes(lambda layer=layer, y=y: layer(y))
            if isinstance(layer, vae3d.Upsample3d):              # a folded kernel besides, of any volume
                kept -= lean_conv.folded_kernel(layer.conv.weight, (2, 2, 2)).nbytes + 144
            assert kept <= y.untyped_storage().nbytes(), layer
    assert {type(layer).__name__ for layer in seen} == {"ResBlock3d", "Attention3d", "Sequential"}


@pytest.mark.parametrize("preset", ["fast", "thick"])
def test_an_untrained_front_end_leaves_no_grid(preset):
    """The share of a reconstruction's energy at period 2 along D, H, W.

    Where sub-voxels differ, as PyTorch starts a convolution, it is 14 to 31 %.
    """
    torch.manual_seed(0)
    vae = VAE3D.from_preset(preset).eval()
    x = torch.nn.functional.interpolate(torch.rand(1, 1, 4, 6, 6) * 2 - 1, (16, 24, 24), mode="trilinear")
    folded = [axis for axis, block in zip((2, 3, 4), vae.cfg.unshuffle) if block == 2]

    def share() -> float:
        recon = vae(x).recon.detach().double()
        energy = (recon - recon.mean()).square().sum()
        # By hand: the coefficient of +1, -1, +1 ... along an axis, for every line of voxels along it.
        found = []
        for axis in folded:
            signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(recon.shape[axis] // 2)
            lines = recon.movedim(axis, -1) @ signs
            found.append(float(lines.square().sum() / len(signs) / energy))
        return max(found)
    assert share() < 1e-12
    torch.nn.init.kaiming_uniform_(vae.decoder.head.conv.weight, a=5 ** 0.5)
    assert share() > 0.01
