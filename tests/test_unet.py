"""unet.py: sizes and counts, parity with the common 2D U-Net, slices, the memory dial, conditioning,
errors."""
import copy
import dataclasses
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import unet
from pieces import ROOT, run_alone, source
from unet import (
    PRESETS,
    Attention3d,
    ConvBlock,
    GroupNorm,
    TimeEmbedding,
    UNet,
    UNetConfig,
)
from unet_weights import from_pytorch_unet

TINY = dict(channels=(4, 6, 8), norm_groups=2)
FLAT = dict(kernels=((1, 3, 3),), strides=((1, 2, 2),))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(dtype=torch.float64, **fields) -> UNet:
    """A small network whose norms' weights and statistics are not the initial ones and zeros."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**TINY, **fields})).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
        for name, b in net.named_buffers():
            if b.is_floating_point():
                b.add_(torch.rand_like(b) if name.endswith("var") else 0.1 * torch.randn_like(b))
    return net


def volume(*shape, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def objective(out) -> torch.Tensor:
    """Depends on every output, with a gradient that differs from voxel to voxel."""
    return sum(
        (o.square() * torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).view_as(o)).mean()
        for o in (out.logits, *out.deep)
    )


def difference(a, b) -> float:
    return (a - b).abs().max().item()


# ---------------------------------------------------------------------- counts and parity with the 2D network

class Pair(nn.Module):
    """Twice (3x3 convolution without bias, batch norm, ReLU), under the names of the common 2D network."""
    def __init__(self, before: int, after: int, between: int):
        super().__init__()
        self.double_conv = nn.Sequential(
            nn.Conv2d(before, between, 3, padding=1, bias=False),
            nn.BatchNorm2d(between),
            nn.ReLU(),
            nn.Conv2d(between, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )

    def forward(self, x):
        return self.double_conv(x)


class Lower(nn.Module):
    def __init__(self, before: int, after: int):
        super().__init__()
        self.maxpool_conv = nn.Sequential(nn.MaxPool2d(2), Pair(before, after, after))

    def forward(self, x):
        return self.maxpool_conv(x)


class Higher(nn.Module):
    def __init__(self, joined: int, after: int, bilinear: bool):
        super().__init__()
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True) if bilinear else \
            nn.ConvTranspose2d(joined, joined // 2, 2, stride=2)
        self.conv = Pair(joined, after, joined // 2 if bilinear else after)

    def forward(self, x, skip):
        x = self.up(x)
        rows, columns = skip.shape[2] - x.shape[2], skip.shape[3] - x.shape[3]
        x = F.pad(x, [columns // 2, columns - columns // 2, rows // 2, rows - rows // 2])
        return self.conv(torch.cat([skip, x], 1))


class Reference2d(nn.Module):
    """The common 2D U-Net, `w` channels at the top (64 in the original), with random weights and
    statistics."""
    def __init__(self, channels: int, classes: int, bilinear: bool, w: int = 64):
        super().__init__()
        f = 2 if bilinear else 1
        self.inc = Pair(channels, w, w)
        self.down1, self.down2 = Lower(w, 2 * w), Lower(2 * w, 4 * w)
        self.down3, self.down4 = Lower(4 * w, 8 * w), Lower(8 * w, 16 * w // f)
        self.up1, self.up2 = Higher(16 * w, 8 * w // f, bilinear), Higher(8 * w, 4 * w // f, bilinear)
        self.up3, self.up4 = Higher(4 * w, 2 * w // f, bilinear), Higher(2 * w, w, bilinear)
        self.outc = nn.Module()
        self.outc.conv = nn.Conv2d(w, classes, 1)
        for name, b in self.named_buffers():
            if b.is_floating_point():
                b.copy_(0.5 + torch.rand_like(b) if name.endswith("var") else 0.3 * torch.randn_like(b))

    def forward(self, x):
        x1 = self.inc(x)
        x2 = self.down1(x1)
        x3 = self.down2(x2)
        x4 = self.down3(x3)
        x = self.up1(self.down4(x4), x4)
        x = self.up4(self.up3(self.up2(x, x3), x2), x1)
        return self.outc.conv(x)


@pytest.mark.parametrize("bilinear, want", [(False, 31_037_698), (True, 17_263_042)])
def test_parameter_counts_of_the_2d_network(bilinear, want):
    upsampling = "interpolate" if bilinear else "transposed"
    with torch.device("meta"):
        ours, reference = UNet.from_preset("unet2d", upsampling=upsampling), Reference2d(3, 2, bilinear)
    assert ours.cfg.channels == (64, 128, 256, 512, 1024) and (
        ours.cfg.in_channels,
        ours.cfg.out_channels,
    ) == (3, 2)
    assert count(ours) == count(reference) == want


@pytest.mark.parametrize("name, want", [("unet3d", 1_401_282), ("unet_light", 201_210)])
def test_parameter_counts_of_presets(name, want):
    assert count(UNet.from_preset(name)) == want


@pytest.mark.parametrize("bilinear", [False, True])
@pytest.mark.parametrize("channels, classes", [(3, 2), (1, 4)])
def test_same_output_as_the_2d_network(bilinear, channels, classes):
    reference = Reference2d(channels, classes, bilinear, w=8).eval()
    cfg, weights = from_pytorch_unet({**reference.state_dict(), "mask_values": [0, 255]})
    assert (cfg.in_channels, cfg.out_channels, cfg.channels) == (channels, classes, (8, 16, 32, 64, 128))
    net = UNet(cfg)
    net.load_state_dict(weights)
    net.eval()
    for size in ((32, 48), (37, 51), (16, 31), (63, 17)):         # odd at one level or at several
        x = volume(2, channels, *size, dtype=torch.float32)
        with torch.no_grad():
            want, got = reference(x), net(x[:, :, None]).logits[:, :, 0]
        assert want.std() > 0.01
        assert difference(got, want) < 1e-5, (size, difference(got, want))
    # in training: batch statistics, and the same update of the running ones
    x = volume(2, channels, 33, 35, dtype=torch.float32)
    net.train(), reference.train()
    # 18 norms amplify rounding; seen: 2e-6
    assert difference(net(x[:, :, None]).logits[:, :, 0], reference(x)) < 1e-4
    after = from_pytorch_unet(reference.state_dict())[1]
    assert max(difference(after[k], b) for k, b in net.state_dict().items()) < 1e-4


def test_same_output_as_the_2d_network_at_its_own_width():
    reference = Reference2d(3, 2, False).eval()
    cfg, weights = from_pytorch_unet(reference.state_dict())
    assert cfg == PRESETS["unet2d"]
    net = UNet(cfg).eval()
    net.load_state_dict(weights)
    x = volume(1, 3, 33, 47, dtype=torch.float32)
    with torch.no_grad():
        assert difference(net(x[:, :, None]).logits[:, :, 0], reference(x)) < 1e-5


def test_foreign_weights_that_do_not_fit_are_named():
    good = Reference2d(1, 2, True, w=4).state_dict()
    assert from_pytorch_unet(good)[0].upsampling == "interpolate"

    def error(change: dict, without: str = "") -> str:
        with pytest.raises(ValueError) as found:
            from_pytorch_unet({k: v for k, v in {**good, **change}.items() if k != without})
        assert "\n" not in str(found.value)
        return str(found.value)

    assert "missing up2.conv.double_conv.1.running_mean" in error({}, "up2.conv.double_conv.1.running_mean")
    assert "unexpected down5.weight" in error({"down5.weight": torch.zeros(1)})
    assert "unexpected inc.double_conv.0.bias" in error({"inc.double_conv.0.bias": torch.zeros(4)})
    assert "up3.conv.double_conv.0.weight is [8, 16, 5, 5], expected [8, 16, 3, 3]" in error(
        {"up3.conv.double_conv.0.weight": torch.zeros(8, 16, 5, 5)})
    assert "outc.conv.bias is [7], expected [2]" in error({"outc.conv.bias": torch.zeros(7)})
    assert "inc.double_conv.0.weight" in error({}, "inc.double_conv.0.weight")
    assert "up2.up.weight" in error({"up2.up.weight": torch.zeros(2, 2, 2, 2)})
    assert "inc.double_conv.0.weight" in error({"inc.double_conv.0.weight": "text"})
    with pytest.raises(ValueError, match="not the state dict of a Pytorch-UNet"):
        from_pytorch_unet(UNet(UNetConfig()).state_dict())


# -------------------------------------------------------------------------------------- sizes, slices, blocks

@pytest.mark.parametrize("seed", range(30))
def test_any_config_gives_the_input_size(seed):
    pick = random.Random(seed)
    levels = pick.randint(1, 4)
    steps = [[pick.choice((1, 2, 3) if levels < 4 else (1, 2)) for _ in range(3)] for _ in range(levels - 1)]
    kernels = [[pick.choice((1, 3, 5)) for _ in range(3)] for _ in range(pick.choice((1, levels)))]
    cfg = UNetConfig(
        in_channels=pick.randint(1, 3),
        out_channels=pick.randint(1, 4),
        channels=[pick.randint(1, 9) for _ in range(levels)],
        kernels=kernels,
        strides=steps[: pick.choice((1, levels))],
        num_convs=pick.randint(1, 3),
        downsampling=pick.choice(unet.DOWNSAMPLINGS),
        upsampling=pick.choice(unet.UPSAMPLINGS),
        norm=pick.choice(("none", "batch", "group")),
        norm_groups=pick.randint(1, 4),
        act=pick.choice(unet.ACTS),
        deep_supervision=pick.randint(0, max(levels - 2, 0)),
        time_channels=pick.choice((0, 6)),
        attention=pick.random() < 0.5,
        head_channels=4,
    )
    net = UNet(cfg).memory(pick.choice(unet.MEMORY_MODES))
    for size in ([pick.randint(1, 13) for _ in range(3)], [pick.randint(5, 20) for _ in range(3)]):
        x, t = torch.randn(2, cfg.in_channels, *size), torch.rand(2) if cfg.time_channels else None
        try:
            out = net(x, t)
        except ValueError as error:  # the one refusal: a group of one channel on a grid of one voxel
            assert cfg.norm == "group" and "more than one voxel" in str(error)
            continue
        assert out.logits.shape == (2, cfg.out_channels, *size) and len(out.deep) == cfg.deep_supervision
        objective(out).backward()
        assert all(torch.isfinite(p.grad).all() for p in net.parameters())
        assert net.eval()(x, t).logits.shape == out.logits.shape
        net.train()


@pytest.mark.parametrize("size", [(1, 1, 1), (1, 16, 1), (2, 3, 5), (7, 9, 11)])
def test_default_config_takes_any_size(size):
    net = UNet(UNetConfig())
    for mode in (True, False):
        assert net.train(mode)(volume(1, 1, *size, dtype=torch.float32)).logits.shape == (1, 2, *size)


@pytest.mark.parametrize(
    "fields",
    [
        dict(norm="batch"),
        dict(norm="none"),
        dict(norm="batch", time_channels=4, num_convs=1),
        dict(norm="batch", upsampling="interpolate", downsampling="conv"),
    ],
)
def test_2d_kernels_run_slice_by_slice(fields):
    net = build(**FLAT, **fields).eval()
    x, t = (
        volume(2, 1, 5, 13, 10),
        torch.tensor([0.1, 0.7], dtype=torch.float64) if "time_channels" in fields else None,
    )
    whole = net(x, t).logits
    for d in range(5):
        assert difference(net(x[:, :, d:d + 1], t).logits, whole[:, :, d:d + 1]) < 1e-12
    assert difference(net(x[:, :, [3, 1]], t).logits, whole[:, :, [3, 1]]) < 1e-12


def test_3d_kernels_do_not_run_slice_by_slice():
    for fields in (dict(strides=((1, 2, 2),)), dict(kernels=((1, 3, 3),))):
        net, x = build(norm="none", **fields).eval(), volume(1, 1, 5, 12, 12)
        assert difference(net(x[:, :, 2:3]).logits, net(x).logits[:, :, 2:3]) > 1e-4


def test_conv_block_equals_an_obvious_one():
    block, x, e = (
        ConvBlock(3, 4, (1, 3, 5), "group", 2, "leaky_relu", 6).double(),
        volume(2, 3, 4, 5, 6),
        volume(2, 6),
    )
    h = F.conv3d(x, block.conv.weight, padding=(0, 1, 2)).view(2, 2, 2, -1)
    h = (h - h.mean((2, 3), keepdim=True)) / (h.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    scale, shift = (e @ block.time.weight.T + block.time.bias).view(2, 2, 4, 1, 1, 1).unbind(1)
    h = h.view(2, 4, 4, 5, 6) * (1 + scale) + shift
    assert difference(block(x, e), torch.where(h > 0, h, 0.01 * h)) < 1e-12


def test_norms():
    x = volume(2, 6, 3, 4, 5)
    assert difference(unet.make_norm("instance", 6, 2).double()(x), nn.InstanceNorm3d(6)(x)) < 1e-12
    assert difference(unet.make_norm("batch", 6, 2).double()(x), nn.BatchNorm3d(6).double()(x)) == 0
    assert [unet.make_norm("group", c, 8).num_groups for c in (1, 7, 12, 16, 48, 20, 11)] == [
        1,
        7,
        6,
        8,
        8,
        5,
        1,
    ]
    with torch.autocast("cpu", torch.bfloat16):
        assert GroupNorm(2, 6)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("norm", unet.NORMS)
@pytest.mark.parametrize("mode", unet.MEMORY_MODES)
def test_autocast(norm, mode):
    net, x = (
        build(torch.float32, norm=norm, time_channels=4, attention=True),
        volume(2, 1, 9, 8, 8, dtype=torch.float32),
    )
    t, seen = torch.tensor([0.2, 0.9]), set()
    want = net(x, t).logits
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
        for m in net.modules()
        if isinstance(m, ConvBlock)
    ]
    with torch.autocast("cpu", torch.bfloat16):
        out = net.memory(mode)(x, t)
        loss = objective(unet.UNetOutput(out.logits.float(), ()))
    loss.backward()
    assert len(hooks) == 10 and seen == {torch.bfloat16}  # no norm, scale or joining widens the stream
    assert out.logits.dtype == torch.bfloat16
    assert difference(out.logits.float(), want) < 0.1 * want.abs().max()
    assert all(p.grad.dtype == torch.float32 and torch.isfinite(p.grad).all() for p in net.parameters())


@pytest.mark.parametrize("fields", [dict(), dict(norm="batch", upsampling="interpolate", downsampling="conv"),
                                    dict(norm="instance", time_channels=4, attention=True, act="silu")])
def test_channels_last_gives_the_same_and_stays(fields):
    net, x = build(torch.float32, **fields), volume(2, 1, 9, 8, 7, dtype=torch.float32)
    t = torch.rand(2) if "time_channels" in fields else None
    want, layouts = net(x, t).logits, []
    net = copy.deepcopy(net).to(memory_format=torch.channels_last_3d)
    for m in net.modules():
        if isinstance(m, ConvBlock):
            m.register_forward_hook(
                lambda m, i, o: layouts.append(o.is_contiguous(memory_format=torch.channels_last_3d))
            )
    assert difference(net(x.contiguous(memory_format=torch.channels_last_3d), t).logits, want) < 1e-5
    assert len(layouts) == 10 and all(layouts)


def test_initial_signal_reaches_the_logits_without_norm():
    net = UNet(UNetConfig(norm="none", channels=(8, 16, 32, 64)))
    spread = net(volume(1, 1, 16, 16, 16, dtype=torch.float32)).logits.std((0, 2, 3, 4))
    # seen: 0.1 and 0.25; with torch's own start 0.006 and 0.01
    assert 0.05 < spread.min() and spread.max() < 5, spread


# -------------------------------------------------------------------------- attention, time, deep supervision

def test_attention_equals_an_obvious_one_and_uses_sdpa(monkeypatch):
    block, x = Attention3d(12, head_channels=8).double(), volume(2, 12, 2, 3, 2)
    rows = F.layer_norm(x.flatten(2).transpose(1, 2), (12,), eps=1e-6)  # (B, N, C)
    q, k, v = (
        (rows @ block.qkv.weight.view(36, 12).T + block.qkv.bias).view(2, -1, 3, 3, 4).permute(2, 0, 3, 1, 4)
    )
    h = ((q @ k.transpose(-1, -2)) / 4 ** 0.5).softmax(-1) @ v
    h = h.transpose(1, 2).reshape(2, -1, 12) @ block.proj.weight.view(12, 12).T + block.proj.bias
    assert difference(block(x), x + h.transpose(1, 2).view_as(x)) < 1e-12
    calls, sdpa = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(a[0].shape) or sdpa(*a))
    build(attention=True, head_channels=4)(volume(1, 1, 8, 12, 4))
    assert calls == [(1, 2, 6, 4)]  # once, at the lowest level: 2x3x1 voxels, 2 heads of 4


def test_attention_sees_the_whole_volume():
    x = volume(1, 1, 4, 4, 96)
    far = x.clone()
    far[..., -1] += 1
    local, wide = (build(norm="none", attention=on) for on in (False, True))
    assert difference(local(far).logits[..., 0], local(x).logits[..., 0]) == 0
    assert difference(wide(far).logits[..., 0], wide(x).logits[..., 0]) > 1e-9


def test_time_embedding():
    net, x = build(time_channels=8), volume(1, 1, 8, 8, 8).expand(3, -1, -1, -1, -1)
    t = torch.tensor([0.1, 0.5, 0.101], dtype=torch.float64, requires_grad=True)
    out = net(x, t).logits
    assert difference(out[0], out[1]) > 1e-3 and difference(out[0], out[2]) > 1e-5  # same volume, other time
    for i in range(3):  # per sample: the others' times change nothing
        assert difference(net(x[:1], t[i:i + 1]).logits[0], out[i]) < 1e-12
    gradient, = torch.autograd.grad(out[1].square().mean(), t)
    assert gradient[1] != 0 and gradient[0] == gradient[2] == 0
    for name, p in net.named_parameters():
        if "time" in name:
            assert torch.autograd.grad(net(x, t).logits.square().mean(), p)[0].abs().max() > 0, name
    assert torch.autograd.gradcheck(
        TimeEmbedding(4).double(), torch.tensor([0.2, -1.1], dtype=torch.float64, requires_grad=True)
    )


def test_time_embedding_is_float32_inside():
    embedding = TimeEmbedding(6)
    angles = (
        1000
        * torch.tensor([0.999], dtype=torch.float64)[:, None]
        * torch.tensor([1, 1e-2, 1e-4], dtype=torch.float64)
    )
    want = embedding.double().mlp(torch.cat([angles.sin(), angles.cos()], 1))
    with torch.autocast("cpu", torch.bfloat16):
        got = embedding.float()(torch.tensor([0.999]))
    assert difference(got.double(), want) < 0.01                  # of bfloat16's matrix products alone


@pytest.mark.parametrize("upsampling", unet.UPSAMPLINGS)
def test_deep_supervision(upsampling):
    net = build(
        channels=(4, 6, 8, 10),
        deep_supervision=2,
        upsampling=upsampling,
        strides=((1, 2, 2), (2, 2, 2), (2, 2, 2)),
    )
    x = volume(2, 1, 9, 17, 30)
    out = net(x)
    assert [tuple(o.shape) for o in (out.logits, *out.deep)] == [
        (2, 2, 9, 17, 30),
        (2, 2, 9, 8, 15),
        (2, 2, 4, 4, 7),
    ]
    assert net.eval()(x).deep == () and difference(net(x).logits, out.logits) == 0
    out.deep[1].square().mean().backward()  # trains what lies below it, and nothing above
    assert net.deep_heads[1].weight.grad.abs().max() > 0 and net.decoder[2][0].up is not None
    assert all(
        p.grad is None
        for p in (*net.decoder[0].parameters(), *net.decoder[1].parameters(), *net.head.parameters())
    )
    assert all(p.grad is not None for p in (*net.decoder[2].parameters(), *net.encoder.parameters()))
    assert build().train()(x).deep == ()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        dict(norm="none", act="silu"),
        dict(norm="group", act="silu", time_channels=2, attention=True),
        dict(norm="batch", act="silu", downsampling="conv", upsampling="interpolate"),
        dict(norm="instance", act="silu", channels=(2, 2, 3), deep_supervision=1),
    ],
)
@pytest.mark.parametrize("mode", unet.MEMORY_MODES)
def test_gradcheck(fields, mode):
    net = build(**{**dict(channels=(2, 3), out_channels=1), **fields}).memory(mode)
    x, t = volume(2, 1, *((2, 4, 3) if len(net.cfg.channels) == 2 else (4, 4, 8))).requires_grad_(), None
    if net.time is not None:
        t = torch.tensor([0.3, 0.4], dtype=torch.float64, requires_grad=True)
    parameters = [
        p
        for p in (
            net.encoder[0][0].conv.weight,
            net.decoder[0][0].up.weight if fields.get("upsampling") is None else None,
            net.head.bias,
        )
        if p is not None
    ]

    def run(x, t, *parameters):
        out = net(x, t)
        return out.logits, *out.deep

    assert torch.autograd.gradcheck(run, (x, t, *parameters), atol=1e-5)


# -------------------------------------------------------------------------------------------- the memory dial

DIAL = [
    dict(),
    dict(norm="none"),
    dict(norm="instance", act="leaky_relu"),
    dict(norm="batch", upsampling="interpolate"),
    dict(norm="batch", downsampling="conv", act="silu", num_convs=1),
    dict(norm="batch", time_channels=4, attention=True),
    dict(channels=(4, 6, 8, 6), deep_supervision=2, norm="batch", **FLAT),
]


def step(net: UNet, mode: str, x, t=None):
    net.memory(mode).zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    out = net(x, t)
    objective(out).backward()
    return [o.detach() for o in (out.logits, *out.deep)], {
        "input": x.grad,
        **{name: p.grad for name, p in net.named_parameters()},
    }


@pytest.mark.parametrize("fields", DIAL)
def test_checkpoint_equals_none(fields):
    x, t = (
        volume(2, 1, 9, 10, 8),
        torch.tensor([0.3, 0.8], dtype=torch.float64) if "time_channels" in fields else None,
    )
    plain, saving = build(**fields), build(**fields)
    for _ in range(2):  # the second step starts from the first's running statistics
        outs, grads = step(plain, "none", x, t)
        outs2, grads2 = step(saving, "checkpoint", x, t)
        assert all(torch.equal(a, b) for a, b in zip(outs, outs2))
        assert grads.keys() == grads2.keys() and all(g is not None for g in grads.values())
        for name in grads:
            assert difference(grads[name], grads2[name]) <= 1e-13 * max(grads[name].abs().max(), 1e-3), name
        for name, buffer in plain.state_dict().items():
            assert torch.equal(buffer, saving.state_dict()[name]), name
    if fields.get("norm") == "batch":
        assert plain.encoder[0][0].norm.num_batches_tracked == 2


def test_batch_statistics_move_once_under_accumulation_retained_graphs_and_errors():
    x = volume(2, 1, 8, 8, 8)
    plain, saving = build(norm="batch"), build(norm="batch").memory("checkpoint")
    for net in (plain, saving):
        first, second = net(x), net(2 * x)  # two graphs alive at once, the first one backward twice
        objective(first).backward(retain_graph=True)
        objective(first).backward()
        objective(second).backward()
    norm, calls = saving.decoder[0][1].norm, []
    out = saving(x)
    norm.register_forward_pre_hook(
        lambda m, i: calls.append(1) or (_ for _ in ()).throw(RuntimeError("out of memory"))
    )
    # in the recomputation: the buffers come back all the same
    with pytest.raises(RuntimeError, match="out of memory"):
        objective(out).backward()
    plain(x)
    assert calls == [1]
    assert all(torch.equal(buffer, saving.state_dict()[name]) for name, buffer in plain.state_dict().items())
    assert saving.state_dict()["decoder.0.1.norm.running_mean"].data_ptr() == norm.running_mean.data_ptr()


def test_checkpoint_in_eval_mode_uses_running_statistics():
    plain, saving, x = build(norm="batch").eval(), build(norm="batch").eval(), volume(1, 1, 8, 8, 8)
    (out, *_), grads = step(plain, "none", x)
    (out2, *_), grads2 = step(saving, "checkpoint", x)
    assert torch.equal(out, out2) and all(torch.equal(grads[k], grads2[k]) for k in grads)
    assert all(torch.equal(buffer, saving.state_dict()[name]) for name, buffer in plain.state_dict().items())
    assert saving.encoder[0][0].norm.num_batches_tracked == 0


def saved_bytes(net: UNet, x: torch.Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, the weights not counted."""
    storages = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.setdefault(t.untyped_storage()._cdata, t) is None or t, lambda t: t
    ):
        out = net(x)
    assert out is not None
    weights = {p.untyped_storage()._cdata for p in net.parameters()}
    return sum(t.untyped_storage().nbytes() for key, t in storages.items() if key not in weights)


@pytest.mark.parametrize("name", PRESETS)
def test_checkpoint_saves_fewer_bytes(name):
    fields = dict(channels=(8, 16, 32, 64, 128)) if name == "unet2d" else {}
    net = UNet.from_preset(name, in_channels=1, **fields)
    x = volume(1, 1, 4 if name == "unet2d" else 16, 48, 48, dtype=torch.float32)
    none, saving = (saved_bytes(net.memory(mode), x) for mode in unet.MEMORY_MODES)
    assert saving < none / 2, (saving, none)                     # seen: 0.38 and 0.39


@pytest.mark.parametrize("mode", unet.MEMORY_MODES)
def test_a_step_runs_on_fake_tensors(mode):
    """So that memory can be predicted without running it."""
    with FakeTensorMode():
        net = UNet(
            UNetConfig(
                norm="batch", channels=(16, 32, 64), time_channels=8, attention=True, deep_supervision=1
            )
        ).memory(mode)
        out = net(torch.randn(2, 1, 255, 256, 256), torch.rand(2))
        sum(o.square().mean() for o in (out.logits, *out.deep)).backward()
    assert out.logits.shape == (2, 2, 255, 256, 256) and out.deep[0].shape == (2, 2, 127, 128, 128)
    assert net.encoder[0][0].conv.weight.grad.shape == (16, 1, 3, 3, 3)


def test_every_block_is_checkpointed(monkeypatch):
    seen, real = [], unet.checkpoint
    monkeypatch.setattr(unet, "checkpoint", lambda block, *a, **k: seen.append(block) or real(block, *a, **k))
    net = build(attention=True).memory("checkpoint")
    net(volume(1, 1, 8, 8, 8))
    assert seen == [
        *net.encoder[0],
        *net.encoder[1],
        *net.encoder[2],
        net.attention,
        *net.decoder[1],
        *net.decoder[0],
    ]
    with torch.no_grad():
        net(volume(1, 1, 8, 8, 8))
    assert len(seen) == 11                                       # nothing to save without gradients


# -------------------------------------------------------------------------------------- config, presets, file

@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_takes_a_step_that_lowers_the_loss(name):
    net = UNet.from_preset(name)
    assert net.cfg == PRESETS[name] and dataclasses.is_dataclass(net.cfg)
    x = volume(1, net.cfg.in_channels, 2 if name == "unet2d" else 8, 16, 16, dtype=torch.float32)
    label = (x.mean(1) > 0).long()
    opt, losses = torch.optim.SGD(net.parameters(), 0.01), []
    for _ in range(2):
        loss = F.cross_entropy(net(x).logits, label)
        opt.zero_grad()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[1] < losses[0], losses


def test_one_volume_overfits():
    net, x = UNet(UNetConfig(channels=(8, 16, 32))), volume(1, 1, 12, 13, 14, dtype=torch.float32)
    label = (F.avg_pool3d(x, 3, 1, 1) > 0.1).long()[:, 0]
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(60):
        opt.zero_grad()
        F.cross_entropy(net(x).logits, label).backward()
        opt.step()
    found = net.eval()(x).logits.argmax(1)
    dice = 2 * (found & label).sum() / (found.sum() + label.sum())
    assert dice > 0.95, dice.item()


CHANGES = [
    dict(in_channels=2),
    dict(out_channels=3),
    dict(channels=(4, 6, 10)),
    dict(kernels=((1, 3, 3),)),
    dict(strides=((1, 2, 2),)),
    dict(num_convs=1),
    dict(downsampling="conv"),
    dict(upsampling="interpolate"),
    dict(norm="none"),
    dict(norm="batch"),
    dict(norm="instance"),
    dict(norm_groups=1),
    dict(act="silu"),
    dict(act="leaky_relu"),
    dict(deep_supervision=1),
    dict(time_channels=4),
    dict(attention=True),
    dict(attention_levels=2),
    dict(residual=True),
    dict(zero_head=True),
]


@pytest.mark.parametrize("change", [*CHANGES, dict(head_channels=2)], ids=lambda change: str(change))
def test_every_config_field_changes_something(change):
    base = dict(attention=True) if "head_channels" in change else {}

    def mark(**fields):
        net = build(**base, **fields)
        out = net(volume(1, net.cfg.in_channels, 9, 8, 7), torch.ones(1) if net.time is not None else None)
        return out.logits.shape, len(out.deep), count(net), out.logits.detach().sum().item()

    assert mark() == mark() != mark(**change)


def test_fields_are_all_tested_and_plain():
    assert {f.name for f in dataclasses.fields(UNetConfig)} == {
        key for change in CHANGES for key in change
    } | {"head_channels", "vector_channels"}                     # vector_channels: tests/test_denoiser.py
    assert {f.type for f in dataclasses.fields(UNetConfig)} <= {
        "int",
        "str",
        "bool",
        "tuple[int, ...]",
        "tuple[tuple[int, int, int], ...]",
    }
    lists = UNetConfig(channels=[4, 8], kernels=[[3, 3, 3], [1, 3, 3]], strides=[[2, 2, 2]])
    assert (
        lists == UNetConfig(channels=(4, 8), kernels=((3, 3, 3), (1, 3, 3)), strides=((2, 2, 2),))
        and hash(lists) is not None
    )
    assert lists.total_stride == (2, 2, 2) and UNetConfig(strides=((1, 2, 2),)).total_stride == (1, 8, 8)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: UNetConfig(channels=()), "unet.channels needs one positive width"),
        (lambda: UNetConfig(channels=(4, 0)), "unet.channels needs one positive width"),
        (lambda: UNetConfig(channels=16), "unet.channels must be a tuple"),
        (
            lambda: UNetConfig(kernels=(3, 3, 3)),
            r"unet.kernels entries are three positive integers .* got \(3, 3, 3\)",
        ),
        (lambda: UNetConfig(kernels=((2, 3, 3),)), "unet.kernels must be odd"),
        (lambda: UNetConfig(kernels=((3, 3, 3),) * 3), "needs one D,H,W triple for all or 4 for channels"),
        (lambda: UNetConfig(strides=((2, 2, 2),) * 4), "needs one D,H,W triple for all or 3 for channels"),
        (lambda: UNetConfig(strides=((2, 2),)), "unet.strides entries are three positive integers"),
        (lambda: UNetConfig(strides=((0, 2, 2),)), "unet.strides entries are three positive integers"),
        (
            lambda: UNetConfig(norm="layer"),
            "unet.norm must be one of none, batch, group, instance, got 'layer'",
        ),
        (lambda: UNetConfig(act="tanh"), "unet.act must be one of"),
        (lambda: UNetConfig(upsampling="bilinear"), "unet.upsampling must be one of transposed, interpolate"),
        (lambda: UNetConfig(downsampling="stride"), "unet.downsampling must be one of pool, conv"),
        (lambda: UNetConfig(deep_supervision=3), "at most 2 with 4 levels"),
        (lambda: UNetConfig(time_channels=5), "unet.time_channels must be even"),
        (lambda: UNetConfig(num_convs=0), "unet.num_convs must be at least 1"),
        (lambda: UNetConfig(out_channels=0), "unet.out_channels must be at least 1"),
        (lambda: UNet.from_preset("unet4d"), "unknown preset 'unet4d'; choose one of unet3d"),
        (
            lambda: build().memory("tile"),
            "one of none, checkpoint, got 'tile'; its lowest level sees the whole volume",
        ),
        (
            lambda: build()(volume(1, 2, 4, 4, 4)),
            r"built for \(B, 1, D, H, W\), got \(1, 2, 4, 4, 4\); make unet.in_channels",
        ),
        (lambda: build()(volume(1, 1, 4, 4)), "built for"),
        (lambda: build()(volume(1, 1, 4, 0, 4)), "built for"),
        (lambda: build(time_channels=4)(volume(2, 1, 4, 4, 4)), "unet.time_channels=4, got t=none"),
        (lambda: build()(volume(2, 1, 4, 4, 4), torch.zeros(2)), r"unet.time_channels=0, got t=\(2,\)"),
        (
            lambda: build(time_channels=4)(volume(2, 1, 4, 4, 4), torch.zeros(1)),
            r"one scalar per sample, \(2,\) for this batch; got \(1,\)",
        ),
        (
            lambda: build(norm="batch")(volume(1, 1, 4, 4, 4)),
            r"batch norm in training needs more than one value .* \(1, 8, 1, 1, 1\)",
        ),
        (
            lambda: build(norm="instance").eval()(volume(2, 1, 4, 4, 4)),
            r"more than one voxel, got a level of shape \(2, 8, 1, 1, 1\)",
        ),
        (lambda: build(norm="group", norm_groups=8)(volume(2, 1, 4, 4, 4)), "unet.norm_groups below 8"),
    ],
)
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as found:
        call()
    assert "\n" not in str(found.value)


def test_batch_norm_on_one_voxel_works_in_eval_mode_and_with_two_samples():
    net = build(norm="batch")
    assert net(volume(2, 1, 4, 4, 4)).logits.shape == (2, 2, 4, 4, 4)
    assert net.eval()(volume(1, 1, 1, 1, 1)).logits.shape == (1, 2, 1, 1, 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("norm", unet.NORMS)
def test_cuda_autocast_keeps_the_type_and_checkpoint_lowers_the_peak(norm):
    net, x = UNet(UNetConfig(norm=norm)).cuda(), torch.randn(1, 1, 64, 64, 64, device="cuda")
    outs, peaks, seen = [], [], set()
    for m in net.modules():
        if isinstance(m, ConvBlock):
            m.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
    for mode in unet.MEMORY_MODES:
        torch.cuda.reset_peak_memory_stats()
        with torch.autocast("cuda", torch.bfloat16):
            out = net.memory(mode)(x).logits
        out.float().square().mean().backward()
        outs.append(out.detach().float())
        peaks.append(torch.cuda.max_memory_allocated())
    assert seen == {torch.bfloat16} and peaks[1] < peaks[0]
    assert difference(*outs) < 1e-2, difference(*outs)


@pytest.mark.slow
def test_compiled_in_checkpoint_mode_moves_batch_statistics_once():
    plain, saving, x = build(norm="batch"), build(norm="batch"), volume(2, 1, 4, 8, 8)
    compiled = torch.compile(saving.memory("checkpoint"), backend="aot_eager", fullgraph=True)
    (want, *_), grads = step(plain, "none", x)
    saving.zero_grad(set_to_none=True)
    out = compiled(x)
    objective(out).backward()
    assert difference(out.logits, want) < 1e-12
    assert max(difference(p.grad, grads[name]) for name, p in saving.named_parameters()) < 1e-10
    assert max(difference(b, saving.state_dict()[name]) for name, b in plain.state_dict().items()) < 1e-12


@pytest.mark.parametrize("path", ["GroupNorm.forward", "ChannelNorm", "Attention3d.forward"])
def test_copies_are_the_same_as_in_vae3d(path):
    assert source("unet.py", path) == source("vae3d.py", path)
    assert f"# same as vae3d.{path.removesuffix('.forward')}" in (ROOT / "unet.py").read_text()


@pytest.mark.slow
def test_works_copied_alone(tmp_path):
    run_alone(tmp_path, ["unet.py"], """
import torch, unet
net = unet.UNet(unet.UNetConfig(channels=(4, 8), time_channels=4, attention=True)).memory("checkpoint")
x = torch.randn(2, 1, 5, 8, 8)
net(x, torch.rand(2)).logits.square().mean().backward()
assert net(x, torch.rand(2)).logits.shape == (2, 2, 5, 8, 8)
assert not {"vae3d", "train", "yaml", "nibabel"} & set(sys.modules)""")
