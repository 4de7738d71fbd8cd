"""tiles.py, tile_plans.py, local_layers.py: tiled execution equals the untiled one, and what it saves."""
import dataclasses
import gc
import random
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import local_layers
import tile_plans
import tiles
import vae3d
from local_layers import Cut
from networks import (
    assert_same,
    build,
    count,
    objective,
    outputs_and_gradients,
    peak,
    relative,
)
from pieces import assert_copies
from tiles import Stretch
from vae3d import PRESETS, VAE3D, Attention3d, ResBlock3d


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------ tile:
# equality

NORMED = ["none", "layer", "group"]


def prod3(size):
    return size[0] * size[1] * size[2]


@pytest.mark.parametrize("norm", NORMED)
@pytest.mark.parametrize(
    "size, tile, stretch",
    [
        ((13, 10, 9), (8, 8, 4), "2+1"),
        ((15, 4, 6), (7, 7, 7), "3"),
        ((5, 6, 7), (64, 64, 64), "2+1"),
        ((8, 8, 8), (4, 4, 4), "1+1"),
        ((16, 4, 8), (4, 99, 99), "2"),
        ((8, 16, 4), (99, 8, 99), "1+1+1"),
        ((4, 5, 16), (99, 4, 8), "1+2"),
        ((7, 9, 12), (8, 4, 8), "1"),
    ],
)
def test_tiled_equals_untiled_float64(norm, size, tile, stretch):
    vae = build(norm=norm, strides=((2, 2, 2), (2, 2, 2)), num_res_blocks=0 if norm == "group" else 1)
    assert_same(vae, torch.randn(1, 1, *size, dtype=torch.float64), ("tile", tile, stretch))


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMED)
@pytest.mark.parametrize("size, tile, stretch", [
    ((37, 50, 41), (24, 32, 24), "2"), ((64, 64, 64), (32, 64, 64), "1"), ((30, 30, 30), (7, 15, 30), "1+1"),
    ((30, 9, 11), (7, 7, 7), "2")])
def test_tiled_equals_untiled_float32(norm, size, tile, stretch):
    """Width 16, as in the presets, where `layer` divides by the deviation over channels: for fewer it is tiny
    somewhere.
    """
    width = 16 if norm == "layer" else 4
    vae = build(
        torch.float32,
        base_channels=width,
        channel_mult=(1, 1),
        strides=((2, 2, 2),),
        num_res_blocks=0,
        norm=norm,
    )
    assert_same(vae, torch.randn(1, 1, *size), ("tile", tile, stretch), 1e-5, 1e-4)


@pytest.mark.parametrize("norm", ["none", "group"])
def test_tiled_equals_untiled_37_50_41_float64(norm):
    vae = build(
        base_channels=2, channel_mult=(1, 1), strides=((2, 2, 2),), num_res_blocks=0, norm=norm, norm_groups=1
    )
    assert_same(vae, torch.randn(1, 1, 37, 50, 41, dtype=torch.float64), ("tile", (20, 26, 64), "1"))


@pytest.mark.parametrize(
    "strides",
    [((1, 2, 2), (2, 2, 2)), ((3, 1, 2), (1, 4, 1)), ((1, 1, 1), (2, 1, 5)), ((2, 3, 1), (1, 1, 1))],
)
def test_strides_per_axis(strides):
    for stretch in ("1", "3", "1+1+1"):
        vae = build(strides=strides, norm="layer", num_res_blocks=0)
        assert_same(
            vae, torch.randn(1, 1, 6, 7, 9, dtype=torch.float64), ("tile", (3, 4, 5), stretch), 1e-9, 1e-9
        )


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
    plan = vae.tiling().plan((6, 12, 8), 1, torch.float64)
    for layers, segments in zip((vae.encoder, vae.decoder), plan.segments):
        assert [i for s in segments for i in range(s.start, s.stop)] == list(range(len(layers)))
        for s in segments:
            assert (s.tile_units is None) == any(
                isinstance(layer, Attention3d) for layer in layers[s.start : s.stop]
            )


@pytest.mark.parametrize("seed", range(24))
def test_random_configs(seed):
    """Property: for networks, sizes, tiles and stretches drawn at random, tiled equals untiled, float64."""
    r = random.Random(seed)
    levels = r.randint(1, 3)
    vae = build(
        in_channels=r.randint(1, 3),
        base_channels=r.choice([2, 3, 4]),
        channel_mult=[r.randint(1, 2) for _ in range(levels)],
        strides=[[r.randint(1, 3) for _ in range(3)] for _ in range(levels - 1)],
        num_res_blocks=r.randint(0, 1),
        norm=r.choice(NORMED),
        attention=r.random() < 0.2,
    )
    size, tile = [r.randint(1, 14) for _ in range(3)], [r.randint(2, 12) for _ in range(3)]
    x = torch.randn(r.randint(1, 2), vae.cfg.in_channels, *size, dtype=torch.float64)
    assert_same(vae, x, ("tile", tile, r.choice(tile_plans.compositions(3))), 1e-9, 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("upsample", vae3d.UPSAMPLES)
@pytest.mark.parametrize(
    "fields",
    [
        dict(
            strides=((2, 2, 2), (2, 2, 2)),
            norm="group",
            quant_conv="split",
            post_quant_conv=True,
            encoder_middle="none",
            decoder_extra_blocks=0,
        ),
        dict(
            strides=((3, 1, 2), (1, 4, 2)),
            up_strides=((1, 4, 2), (3, 1, 2)),
            quant_conv="joint",
            attention_levels=(False, False, True),
        ),
    ],
    ids=("monai", "other strides up"),
)
def test_networks_of_others_tiled(upsample, fields):
    vae = build(upsample=upsample, down_padding="end", head_act=False, **fields)
    for tile, stretch in (((4, 4, 4), "2"), ((8, 4, 4), "1+1")):
        assert_same(vae, torch.randn(1, 1, 11, 10, 9, dtype=torch.float64), ("tile", tile, stretch))


def strided_layers():
    """Kinds of layers that other networks have: (name, layers, size)."""
    conv, transposed = (
        partial(nn.Conv3d, dtype=torch.float64),
        partial(nn.ConvTranspose3d, dtype=torch.float64),
    )
    one, two = (vae3d.make_norm("group", 2, groups).double() for groups in (1, 2))
    return [
        (
            "asymmetric padding",
            [
                conv(2, 2, 3, 1, 1),
                nn.ConstantPad3d((0, 1, 0, 1, 0, 1), 0.0),
                conv(2, 3, 3, 2),
                conv(3, 2, 3, 1, 1),
            ],
            (8, 9, 13),
        ),
        ("pointwise", [conv(2, 3, 1), nn.SiLU(), conv(3, 2, 3, padding=1), conv(2, 1, 1)], (5, 6, 7)),
        ("patchify", [conv(2, 3, 2, 2), conv(3, 3, 3, padding=1), transposed(3, 2, 2, 2)], (7, 8, 12)),
        (
            "transposed",
            [
                conv(2, 2, 3, padding=1),
                transposed(2, 3, 3, (2, 1, 3), 1, (1, 0, 2)),
                conv(3, 2, 3, padding=1),
            ],
            (4, 7, 5),
        ),
        ("odd stride", [conv(2, 2, 3, 2, 1), conv(2, 2, 3, 2, 1)], (11, 13, 7)),
        (
            "dilated, wide",
            [conv(2, 2, 3, padding=2, dilation=2), conv(2, 2, 5, padding=1, groups=2)],
            (9, 8, 11),
        ),
        ("strided, wide", [conv(2, 2, 5, 3, 2), conv(2, 2, (1, 3, 5), padding=(0, 1, 2))], (16, 17, 18)),
        (
            "linear",
            [
                nn.Upsample(scale_factor=(2, 1, 3), mode="trilinear"),
                conv(2, 2, 3, padding=1),
                nn.Upsample(scale_factor=(1, 4, 2), mode="trilinear"),
            ],
            (4, 5, 6),
        ),
        ("norm first", [one, conv(2, 2, 3, padding=1), two], (6, 5, 7)),
    ]


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
    for name, a, b in zip(
        names, torch.autograd.grad(want, inputs, weight), torch.autograd.grad(got, inputs, weight)
    ):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


class Blur(nn.Module):
    """Output i is the mean of inputs i, i + 1, i + 2 along each axis; two voxels shorter. Made up."""
    def forward(self, x):
        for axis in (2, 3, 4):
            n = x.shape[axis] - 2
            x = (x.narrow(axis, 0, n) + x.narrow(axis, 1, n) + x.narrow(axis, 2, n)) / 3
        return x


class Fold(nn.Module):
    """2 x 2 x 2 voxels become 8 channels. Made up: pixel unshuffle."""
    def forward(self, x):
        b, c, d, h, w = x.shape
        x = x.view(b, c, d // 2, 2, h // 2, 2, w // 2, 2)
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, 8 * c, d // 2, h // 2, w // 2)


class Unfold(nn.Module):
    """And back."""
    def forward(self, x):
        b, c, d, h, w = x.shape
        x = x.view(b, c // 8, 2, 2, 2, d, h, w)
        return x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, c // 8, 2 * d, 2 * h, 2 * w)


class Gain(nn.Module):
    """A parameter for each channel. Made up: pointwise."""
    def __init__(self, channels):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(channels, 1, 1, 1, dtype=torch.float64))

    def forward(self, x):
        return torch.sin(x * self.gain)


MADE_UP = {
    Blur: local_layers.Local(size=lambda op, axis, n: n - 2,
                             pull=lambda op, axis, lo, hi, n: (lo, hi + 2, local_layers.keep(hi - lo))),
    Fold: local_layers.Local(rate=lambda op, axis: (1, 2), channels=lambda op, channels: 8 * channels),
    Unfold: local_layers.Local(rate=lambda op, axis: (2, 1), channels=lambda op, channels: channels // 8),
    Gain: local_layers.Local(),
}


@pytest.mark.parametrize(
    "size, tile_units", [((12, 10, 14), (2, 2, 2)), ((16, 8, 22), (3, 5, 1)), ((8, 8, 8), (9, 9, 9))]
)
def test_a_layer_of_ones_own_is_one_row_of_the_table(size, tile_units, monkeypatch):
    """Rows from outside: values, gradients, the plans' sizes and the refusal without a row."""
    layers = [
        nn.Conv3d(2, 3, 3, padding=1),
        Fold(),
        Gain(24),
        nn.Conv3d(24, 16, 3, padding=1),
        Unfold(),
        Blur(),
        nn.Conv3d(2, 2, 3, padding=1),
    ]
    network = nn.Sequential(*layers).double()
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="Fold has no row in local_layers.LOCAL"):
        tiles.run_tiled(layers, tile_units, x)
    for kind, row in MADE_UP.items():
        monkeypatch.setitem(local_layers.LOCAL, kind, row)

    found = []
    for run in (network, partial(tiles.run_tiled, layers, tile_units)):
        y = run(x)
        ramp = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view_as(y)
        found.append([y, *torch.autograd.grad((y.square() * ramp).sum(), [x, *network.parameters()])])
    assert max(relative(a, b) for a, b in zip(*found)) <= 1e-12

    sides = (tile_plans.Side(layers, 2, (1, 1, 1)),)
    mode = tile_plans.TileMode(tile_plans.Network(sides, 0), (4, 4, 4), "1")
    plan = mode.plan(size, 2, torch.float64)
    assert any(segment.tile_units for segment in plan.segments[0])
    assert relative(found[0][0], mode.run(0, x, size, whole=lambda layer, x: layer(x))) <= 1e-12


@pytest.mark.parametrize("norm", ["none", "group"])
def test_gradcheck_of_a_stretch(norm):
    build().memory("tile")                                       # brings the rows of our own layers
    layers = [ResBlock3d(2, 3, norm, 1).double(), nn.Conv3d(3, 2, 3, 2, 1, dtype=torch.float64)]
    x = torch.randn(1, 2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    parameters = [p for layer in layers for p in layer.parameters()]
    for p in parameters[2:] if norm == "none" else parameters[4:]:
        # Numbers of evaluations; the rest is covered by equality.
        p.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda x, *_: tiles.run_tiled(layers, (1, 1, 1), x), (x, *parameters), fast_mode=True
    )
    assert torch.autograd.gradcheck(lambda x: tiles.run_tiled(layers, (1, 1, 1), x), (x,))


# ------------------------------------------------------------------------------------------------ tile:
# circumstances

TILE = ("tile", (4, 8, 4), "2+1")


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMED)
def test_autocast_bfloat16(norm):
    """Both modes round at the same places; they differ by what bf16 rounds of sums in another order."""
    vae, x = build(torch.float32, base_channels=8, norm=norm), torch.randn(1, 1, 8, 16, 12)
    exact, exact_grads = outputs_and_gradients(vae, x, ("none",))
    errors = {}
    for setting in [("none",), TILE]:
        out, grads = outputs_and_gradients(vae, x, setting, torch.autocast("cpu", torch.bfloat16))
        assert out[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in grads.values())
        errors[setting] = (
            [relative(a, b) for a, b in zip(exact, out)],
            [relative(exact_grads[name], grads[name]) for name in grads],
        )
    for plain, tiled in zip(errors["none",], errors[TILE]):      # no further from float32 than plain autocast
        found = max(plain), max(tiled), sum(plain), sum(tiled)
        # The sum over all weights is up to 1.22 times the plain one, on a machine without bf16 of its own.
        assert max(tiled) <= 1.5 * max(plain) + 1e-3 and sum(tiled) <= 1.3 * sum(plain) + 1e-3, found


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
    for view in (
        x.to(memory_format=torch.channels_last_3d),
        spaced,
        x.transpose(3, 4).contiguous().transpose(3, 4),
    ):
        torch.testing.assert_close(vae(view).recon, want, rtol=1e-10, atol=1e-10)
    last = build(torch.float32, in_channels=3).to(memory_format=torch.channels_last_3d).memory(*TILE)
    recon = last(x.float().to(memory_format=torch.channels_last_3d)).recon
    assert recon.is_contiguous(memory_format=torch.channels_last_3d)


def test_hooks_of_parameters_fire_once():
    """DDP hangs its all-reduce on a parameter's accumulation; it must run once a backward, not once a tile.
    """
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
    torch.save(
        {name: p.grad for name, p in vae.named_parameters()}, folder / f"{torch.distributed.get_rank()}.pt"
    )
    # Before its group: else it joins the group's threads while it has the GIL,.
    del parallel
    # For which they may be waiting (torch 2.13: docs/LOG.md).
    gc.collect()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_distributed_data_parallel(pool, tmp_path):
    vae, x = ddp_case()
    _, want = outputs_and_gradients(vae, x, ("none",))
    pool(2, ddp_gradients_of_rank, tmp_path)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert max(relative(want[name], found[name]) for name, _ in vae.named_parameters()) < 1e-10


def test_offloaded_and_changed_tensors():
    """What is saved goes through autograd's own store: hooks may move it, and changing a weight in between is
    an error.
    """
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


# ------------------------------------------------------------------------------------------------ tile:
# memory and planning

@pytest.mark.slow
def test_live_bytes_fall_with_the_tile_and_hardly_grow_with_the_volume():
    vae = build(torch.float32, base_channels=8, channel_mult=(1, 1), strides=((2, 2, 2),), num_res_blocks=0)
    large, short, long = (64, 32, 32), (64, 16, 16), (128, 16, 16)   # short and long: interior tiles in both
    none, checkpointed, two, four = (peak(vae, s, large) for s in (
        ("none",), ("checkpoint",), ("tile", (32, 32, 32), "2"), ("tile", (16, 16, 16), "2")))
    assert checkpointed < 0.95 * none and two < 0.9 * checkpointed and four < 0.6 * two, (
        none,
        checkpointed,
        two,
        four,
    )
    grown, plain = ((peak(vae, s, long) - peak(vae, s, short)) / (prod3(long) - prod3(short))
                    for s in (("tile", (16, 16, 16), "2"), ("none",)))
    # Float32: x, recon and its gradient 12, latent and its gradients the rest.
    assert grown <= 20 < 200 < plain, (grown, plain)
    untiled, tiled = (peak(vae, s, large, training=False) for s in (("none",), ("tile", (16, 16, 16), "2")))
    assert tiled < 0.7 * untiled, (untiled, tiled)


def test_plans_trade_work_for_memory_and_are_settings_of_the_dial():
    vae = VAE3D.from_preset("high_res").memory("tile")
    plans = vae.tiling().plans((93, 96, 96))
    assert len(plans) > 5 and all(
        a.work < b.work and a.peak_bytes > b.peak_bytes for a, b in zip(plans, plans[1:])
    )
    assert 1 < plans[0].work < 1.2
    for plan in plans[::4]:
        again = VAE3D.from_preset("high_res").memory("tile", plan.tile, plan.stretch)
        assert again.tiling().plan((96, 96, 96), 1, torch.float32) == plan
    budget = plans[3].peak_bytes / 2 ** 30
    assert vae.memory("tile", budget=budget).tiling().plan((96, 96, 96), 1, torch.float32) == plans[3]
    assert vae.memory("tile", budget=1e-9).tiling().plan((96, 96, 96), 1, torch.float32) == plans[-1]
    # Without a budget: the least memory of what takes at most 1.4 times as long.
    assert any(1.4 < plan.work < 4 for plan in plans)
    within = [plan for plan in vae.tiling().plans((96, 96, 96)) if plan.work <= 1.4]
    assert vae.memory("tile").tiling().plan((96, 96, 96), 1, torch.float32) == within[-1]
    grouped = VAE3D.from_preset("high_res", norm="group").memory("tile", (32, 32, 32), "1")
    plain = vae.memory("tile", (32, 32, 32), "1")
    # A pass more for each norm.
    assert grouped.tiling().plans((96, 96, 96))[0].work > 1.5 * plain.tiling().plans((96, 96, 96))[0].work


@pytest.mark.slow
def test_estimate_is_near_the_counted_peak():
    vae = build(torch.float32, base_channels=8, channel_mult=(1, 2), strides=((2, 2, 2),))
    for setting in [("tile", (16, 32, 24), "1"), ("tile", (16, 16, 24), "2"), ("tile", (8, 16, 24), "1+1")]:
        counted = peak(vae, setting, (32, 32, 24)) + 16 * count(vae)
        ratio = vae.tiling().plan((32, 32, 24), 1, torch.float32).peak_bytes / counted
        assert 0.75 < ratio < 1.33, (setting, ratio)


def test_fake_tensors_run_the_largest_tile_alone():
    """Memory prediction: a volume of any size takes as many operations as two of its tiles."""
    ran = []
    with FakeTensorMode():
        vae = VAE3D.from_preset("high_res", num_res_blocks=0).memory(
            "tile", (64, 512, 128), "1", rehearsal=True
        )
        x = torch.empty(1, 1, 1024, 512, 512, dtype=torch.bfloat16)
        original, tiles.run_tile = tiles.run_tile, lambda *args: ran.append(1) or original(*args)
        try:
            with torch.autocast("cpu", torch.bfloat16):
                out = vae(x)
            out.recon.backward(out.recon)
        finally:
            tiles.run_tile = original
    assert out.recon.shape == x.shape and all(p.grad is not None for p in vae.parameters())
    # Sides, forward and backward, twice; of 1 x 4 x 16 tiles.
    assert len(ran) <= 2 * 2 * 2, len(ran)


@pytest.mark.parametrize("broken", ["halo", "overlap", "statistics"])
def test_these_tests_notice_a_broken_engine(broken, monkeypatch):
    """One voxel of halo too few, halos that overwrite instead of adding, statistics of a tile: each must
    show.
    """
    if broken == "halo":
        conv = local_layers.LOCAL[nn.Conv3d]

        def pull(op, axis, lo, hi, n):
            start, stop, cut = conv.pull(op, axis, lo, hi, n)
            if op.stride[axis] == 1 and stop < n:
                return start, stop - 1, Cut((1, 1), cut.crop if any(cut.pad) else 1, cut.length)
            return start, stop, cut

        monkeypatch.setitem(local_layers.LOCAL, nn.Conv3d, dataclasses.replace(conv, pull=pull))
    elif broken == "overlap":
        monkeypatch.setattr(
            Stretch, "tiles", lambda self, x, end=None, whole=Stretch.tiles: list(whole(self, x, end))[1:]
        )
    else:
        whole_statistics = tiles.volume_statistics
        monkeypatch.setattr(
            tiles, "volume_statistics", lambda parts, *rest: whole_statistics(iter(list(parts)[:1]), *rest)
        )
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
        assert (
            len(shares) >= 8
            and shares == sorted(shares)
            and 0 < shares[0]
            and {t for _, t, n in seen if n == part} == {len(layers)}
        )


@pytest.mark.parametrize("fields", [
    dict(unshuffle=(2, 2, 2)), dict(unshuffle=(1, 2, 2), norm="group"),
    dict(unshuffle=(2, 1, 3), in_channels=3), dict(unshuffle=(2, 2, 2), bottleneck="vq", num_codes=16),
    dict(unshuffle=(2, 2, 2), up_narrows=True)], ids=str)
@pytest.mark.parametrize("setting", [("checkpoint",), ("tile", (8, 8, 8), "1"), ("tile", (8, 16, 8), "2+1")])
def test_a_pixel_front_end_is_exact_in_tiles(fields, setting):
    """For sizes that no stride divides; the plain form is written out by hand in test_vae3d.py."""
    found, x = [], torch.randn(1, fields.get("in_channels", 1), 13, 18, 21, dtype=torch.float64)
    for dial in (("none",), setting):
        vae = build(**fields).memory(*dial)
        out = vae(x, torch.Generator().manual_seed(1))
        loss = out.recon.square().mean() + out[1].mean()
        parameters = [*vae.encoder.parameters(), *vae.decoder.parameters()]
        found.append([out.recon, *torch.autograd.grad(loss, parameters)])
    assert max(relative(a, b) for a, b in zip(*found)) <= 1e-12


def test_copies_are_the_same():
    assert assert_copies("local_layers.py") == 2
