"""unet.py as a denoiser, and control.py: blocks, attention a level, conditions, control, the memory dial."""
import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import diffusion
import unet
from control import Controlled, ControlNet, bit_planes, level_widths
from pieces import ROOT, run_alone
from unet import DENOISERS, PRESETS, ResidualBlock, UNet, UNetConfig

TINY = dict(channels=(4, 6, 8), norm_groups=2, num_convs=1, residual=True, downsampling="conv", act="silu",
            time_channels=8, in_channels=2, out_channels=2)


def build(dtype=torch.float64, **fields) -> UNet:
    """A small denoiser; what starts at zero is not zero any more."""
    torch.manual_seed(0)
    net = UNet(UNetConfig(**{**TINY, **fields})).to(dtype)
    return stirred(net)


def stirred(net: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return net


def inputs(batch=2, size=(8, 9, 10), channels=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator, dtype=dtype)
    return x, torch.rand(batch, generator=generator, dtype=dtype)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ------------------------------------------------------------------------------------------ blocks, presets

@pytest.mark.parametrize("name, want", [("denoiser_light", 6_507_012), ("denoiser", 25_455_108)])
def test_presets_have_the_stated_size_and_begin_at_zero(name, want):
    with torch.device("meta"):
        assert count(UNet.from_preset(name)) == want
    assert not PRESETS.keys() & DENOISERS.keys()           # a segmentation has no time
    if name == "denoiser_light":
        net, (x, t) = UNet.from_preset(name), inputs(1, (8, 8, 8), 4, torch.float32)
        out = net(x, t).logits
        assert out.shape == x.shape and out.abs().max() == 0
        stirred(net)
        assert net(x, t).logits.abs().max() > 0.01


def test_residual_block_equals_an_obvious_one():
    block = stirred(ResidualBlock(4, 6, (1, 3, 3), "group", 2, "silu", 8).double())
    x, embedding = inputs(channels=4)[0], torch.randn(2, 8, dtype=torch.float64)

    def normalised(h, norm, channels):
        rows = h.reshape(2, 2, -1)
        rows = (rows - rows.mean(2, keepdim=True)) / (rows.var(2, keepdim=True, correction=0) + 1e-5).sqrt()
        shape = (1, channels, 1, 1, 1)
        return rows.view(h.shape) * norm.weight.view(shape) + norm.bias.view(shape)

    def convolved(h, conv):
        return nn.functional.conv3d(h, conv.weight, conv.bias, padding=(0, 1, 1))

    h = normalised(x, block.norm, 4)
    h = convolved(h * h.sigmoid(), block.block.conv)
    both = (embedding @ block.block.time.weight.T + block.block.time.bias)[..., None, None, None]
    h = normalised(h, block.block.norm, 6) * (1 + both[:, :6]) + both[:, 6:]
    h = convolved(h * h.sigmoid(), block.conv)
    want = h + nn.functional.conv3d(x, block.shortcut.weight, block.shortcut.bias)
    assert (block(x, embedding) - want).abs().max() < 1e-12


@pytest.mark.parametrize("norm", unet.NORMS)
@pytest.mark.parametrize("act", unet.ACTS)
def test_a_residual_block_begins_as_its_shortcut_and_leaves_its_input_alone(norm, act):
    block, (x, _) = ResidualBlock(2, 2, norm=norm, act=act).double(), inputs()
    before = x.clone()
    assert torch.equal(block(x), before) and torch.equal(x, before)


def test_amplitude_of_the_input_is_seen():
    """A norm before the first convolution would take it: x and 2 x would look the same."""
    net, (x, t) = build(norm="instance"), inputs()
    nn.init.zeros_(net.stem.bias)
    assert (net.stem(2 * x) - net.stem(x)).abs().max() > 0.1
    assert (net(2 * x, t).logits - net(x, t).logits).abs().max() > 1e-3


@pytest.mark.parametrize("fields", [
    dict(), dict(attention_levels=2), dict(attention_levels=3), dict(upsampling="interpolate"),
    dict(num_convs=2, norm="batch"), dict(norm="none", act="relu"), dict(vector_channels=3),
    dict(residual=False, attention_levels=2), dict(channels=(4,), attention_levels=1),
])
def test_checkpoint_equals_none(fields):
    net, (x, t) = build(**fields), inputs()
    vector = torch.randn(2, 3, dtype=torch.float64) if "vector_channels" in fields else None
    found = []
    for mode in unet.MEMORY_MODES:
        net.memory(mode).zero_grad()
        out = net(x, t, vector).logits
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in net.parameters())])
    assert out.shape == x.shape
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12


def test_attention_levels():
    one, same = build(attention_levels=1), build(attention=True)
    assert one.state_dict().keys() == same.state_dict().keys()
    x, t = inputs()
    assert torch.equal(one(x, t).logits, same(x, t).logits)
    two = build(attention_levels=2)
    assert [*two.down_attention] == [*two.up_attention] == ["1"] and two.attention is not None
    assert {*build(attention_levels=3).up_attention} == {"0", "1"}
    # each of them has a part in the output
    for part in (two.attention, two.down_attention["1"], two.up_attention["1"]):
        before = two(x, t).logits
        with torch.no_grad():
            part.proj.weight.mul_(2)
        assert (two(x, t).logits - before).abs().max() > 1e-6


def test_vector_conditions():
    net, (x, t) = build(vector_channels=3), inputs()
    vector = torch.randn(2, 3, dtype=torch.float64)
    first = net(x, t, vector).logits
    changed = vector.clone()
    changed[1] += 1
    second = net(x, t, changed).logits
    assert torch.equal(first[0], second[0]) and (first[1] - second[1]).abs().max() > 1e-4
    # it is added to the embedding
    hidden = vector @ net.vector[0].weight.T + net.vector[0].bias
    added = (hidden * hidden.sigmoid()) @ net.vector[2].weight.T + net.vector[2].bias
    assert (net.encode(x, t, vector)[1] - (net.time(t) + added)).abs().max() < 1e-12


@pytest.mark.parametrize("kind", diffusion.KINDS)
def test_training_and_sampling_run_on_fake_tensors(kind):
    """So that memtest.py can predict their memory: nothing looks at a value."""
    cfg = diffusion.DiffusionConfig(kind=kind, steps=2, guidance=2.0, guidance_interval=(0.1, 50.0))
    with FakeTensorMode():
        net = UNet(UNetConfig(**TINY, vector_channels=3))

        def network(x, t, vector):
            return net(x, t, vector).logits
        x = torch.empty(2, 2, 8, 8, 8)
        cond, none = dict(vector=torch.ones(2, 3)), dict(vector=torch.zeros(2, 3))
        kept = diffusion.drop_conditions(cfg, torch.rand(2), cond, none)
        diffusion.loss(cfg, network, x, torch.randn_like(x), torch.rand(2), kept).mean().backward()
        assert net.stem.weight.grad.shape == net.stem.weight.shape
        assert diffusion.sample(cfg, network, x, cond, none).shape == x.shape


@pytest.mark.parametrize("call, message", [
    (lambda: UNetConfig(vector_channels=3), "unet.vector_channels is added to the time embedding"),
    (lambda: UNetConfig(attention_levels=5), "unet.attention_levels is at most 4"),
    (lambda: build(vector_channels=3)(*inputs()), r"vector must be \(2, 3\) .*, got None"),
    (lambda: build(vector_channels=3)(*inputs(), torch.ones(1, 3)), r"be \(2, 3\) .*got \(1, 3\)"),
    (lambda: build()(*inputs(), torch.ones(2, 3)), r"vector must be None .*got \(2, 3\)"),
    (lambda: build()(*inputs(), control=[]), "a tensor a level, 3; got 0"),
    (lambda: bit_planes(torch.zeros(1, 2, 4, 4, 4)), r"\(B, 1, D, H, W\), got \(1, 2, 4, 4, 4\)"),
    (lambda: ControlNet(build(), 8).double()(*inputs(), torch.zeros(2, 8, 8, 9, 9).double()),
     r"the strides take the hint .* to \(8, 9, 9\), while the input is \(2, 2, 8, 9, 10\)"),
])
def test_errors_say_what_to_do(call, message):
    with pytest.raises(ValueError, match=message) as found:
        call()
    assert "\n" not in str(found.value)


# -------------------------------------------------------------------------------------------------- control

def test_bit_planes():
    label = torch.arange(256).view(1, 1, 4, 8, 8)
    planes = bit_planes(label)
    assert planes.shape == (1, 8, 4, 8, 8) and planes.dtype == torch.float32
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128]).view(1, 8, 1, 1, 1)
    assert torch.equal((planes * weights).sum(1, keepdim=True).long(), label)


BASES = [
    dict(), dict(attention_levels=2, vector_channels=3), dict(upsampling="interpolate", residual=False),
    dict(channels=(4,)), dict(strides=((1, 2, 2),)),
]


@pytest.mark.parametrize("fields", BASES)
def test_a_control_net_changes_nothing_at_first_and_all_of_it_learns(fields):
    base, (x, t) = build(**fields), inputs()
    vector = torch.randn(2, 3, dtype=torch.float64) if "vector_channels" in fields else None
    hint = torch.rand(2, 8, 16, 18, 20, dtype=torch.float64)
    want = base(x, t, vector).logits
    control = ControlNet(base, 8, ((2, 2, 2),), hint_width=4).double()
    net = Controlled(base.requires_grad_(False), control)
    got = net(x, t, hint, vector).logits
    assert (got - want).abs().max().item() == 0.0

    # after one step of all that starts at zero, everything has a gradient and the hint a say
    optimizer = torch.optim.Adam(control.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        net(x, t, hint, vector).logits.square().mean().backward()
        optimizer.step()
    without = [name for name, p in control.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not without
    assert all(p.grad is None for p in base.parameters())
    with torch.no_grad():
        assert torch.equal(base(x, t, vector).logits, want.detach())
        first = net(x, t, hint, vector).logits
        assert (first - net(x, t, 1 - hint, vector).logits).abs().max() > 1e-6


def test_control_is_added_at_each_level():
    net, (x, t) = build(), inputs()
    levels, _ = net.encode(x, t)
    assert [level.shape[1] for level in levels] == level_widths(net) == [4, 6, 8]
    zero = [torch.zeros_like(level) for level in levels]
    assert torch.equal(net(x, t, control=zero).logits, net(x, t).logits)
    for number, level in enumerate(levels):
        one = copy.copy(zero)
        one[number] = torch.ones_like(level)
        assert (net(x, t, control=one).logits - net(x, t).logits).abs().max() > 1e-5


def test_the_copy_is_apart_and_has_no_way_up():
    base = build(attention_levels=2)
    control = ControlNet(base, 1, hint_width=4)
    kept = {name for name, _ in control.encoder.named_parameters()}
    assert kept == {n for n, _ in base.named_parameters() if not n.startswith(("decoder", "head", "up_att"))}
    shared = {p.data_ptr() for p in base.parameters()} & {p.data_ptr() for p in control.parameters()}
    assert not shared and len(base.decoder) == 2
    frozen = ControlNet(base.requires_grad_(False), 1, hint_width=4)
    assert all(p.requires_grad for p in frozen.parameters())


def test_control_in_checkpoint_mode():
    base, (x, t) = build(attention_levels=2).requires_grad_(False), inputs()
    net = Controlled(base, stirred(ControlNet(base, 1, hint_width=4).double()))
    hint, found = torch.rand(2, 1, 8, 9, 10, dtype=torch.float64), []
    for mode in unet.MEMORY_MODES:
        net.memory(mode).zero_grad()
        net(x, t, hint).logits.square().mean().backward()
        found.append([p.grad for p in net.control.parameters()])
    for a, b in zip(*found):
        assert (a - b).abs().max() < 1e-12


def test_control_works_copied_beside_unet(tmp_path):
    run_alone(tmp_path, ["unet.py", "control.py"], """
import torch, unet, control
base = unet.UNet.from_preset("denoiser_light", channels=(8, 16))
net = control.Controlled(base, control.ControlNet(base, 8, ((2, 2, 2),)))
label = torch.randint(256, (1, 1, 8, 8, 8))
assert net(torch.randn(1, 4, 4, 4, 4), torch.rand(1), control.bit_planes(label)).logits.abs().max() == 0""")
    assert "import unet" not in (ROOT / "control.py").read_text()
