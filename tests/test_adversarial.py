"""adversarial.py against values by hand, MONAI's discriminator and numerical gradients."""
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import gradcheck

import adversarial
import losses
from adversarial import (
    LeCam,
    PatchDiscriminator3d,
    adaptive_weight,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    r1_penalty,
)
from pieces import assert_copies, pair, run_alone

# ---------------------------------------------------------------------------------------------- discriminator

@pytest.mark.parametrize(
    "norm,count",
    [("none", 2_771_425), ("spectral", 2_771_425), ("group", 2_771_873), ("instance", 2_771_873)],
)
def test_discriminator_parameter_count(norm, count):
    assert sum(p.numel() for p in PatchDiscriminator3d(1, 32, 3, norm=norm).parameters()) == count


@pytest.mark.parametrize("norm", ["none", "group", "spectral"])
def test_weights_begin_as_he_has_it_for_leaky_relu(norm):
    """std = sqrt(2 / (1 + .2^2) / fan in) (arXiv:1502.01852, Eq. 15), fan in = channels x 4^3."""
    torch.manual_seed(0)
    network = PatchDiscriminator3d(1, 32, 2, norm=norm)
    for width, block in zip((32, 64), network.hidden[1:]):
        weight = block[0].weight.detach()
        wanted = math.sqrt(2 / 1.04 / (width * 64))
        assert weight[0].numel() == width * 64 and abs(float(weight.std()) / wanted - 1) < 0.02


@pytest.mark.parametrize(
    "norm,theirs",
    [
        ("group", {"norm": ("group", {"num_groups": 32})}),
        ("none", {"norm": None, "bias": True}),
        ("instance", {"norm": ("instance", {"affine": True})}),
    ],
)
def test_discriminator_equals_monai(norm, theirs):
    nets = pytest.importorskip("monai.networks.nets", reason="monai is a development dependency")
    if norm != "none":  # the count that the docstring names is that of their default, batch norm
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"strides": (1, 2, 2)},
        {"layers": 2, "strides": ((1, 2, 2), (2, 2, 1))},
        {"kernel": 3},
        {"layers": 1, "kernel": (1, 4, 4)},
        {"layers": 4, "kernel": 3, "norm": "spectral"},
    ],
)
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
    # its normalised value would be 0, whatever the input
    with pytest.raises(ValueError, match="map of one voxel"):
        PatchDiscriminator3d(1, 4, norm="instance", kernel=3)(torch.randn(1, 1, 1, 1, 1))
    assert PatchDiscriminator3d(1, 4, norm="group", kernel=3)(torch.randn(1, 1, 1, 1, 1))[0].isfinite().all()


def test_spectral_norm_is_exact_and_keeps_no_state():
    torch.manual_seed(0)
    conv = adversarial.SpectralConv3d(3, 5, 2).double()
    x = torch.randn(2, 3, 4, 4, 4, dtype=torch.float64)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    out = conv(x)
    weight = conv.weight.detach().clone().requires_grad_()  # the obvious version: divide by torch's 2-norm
    expected = F.conv3d(x, weight / torch.linalg.matrix_norm(weight.flatten(1), 2), conv.bias)
    g = torch.randn_like(out)
    out.backward(g), expected.backward(g)
    assert (out - expected).abs().max() < 1e-12 and (conv.weight.grad - weight.grad).abs().max() < 1e-12
    assert torch.equal(conv(x), out) and set(before) == {"weight", "bias"}
    assert all(torch.equal(before[k], v) for k, v in conv.state_dict().items())


def test_discriminator_batch_of_samples_is_its_samples():
    """No norm ties samples together, so micro-batches add up to a batch."""
    for norm in adversarial.DISC_NORMS:
        disc, x = (
            PatchDiscriminator3d(1, 4, 1, norm=norm).double(),
            torch.randn(2, 1, 8, 8, 8, dtype=torch.float64),
        )
        whole, parts = disc(x)[0], torch.cat([disc(x[:1])[0], disc(x[1:])[0]])
        assert (whole - parts).abs().max() < 1e-12, norm


@pytest.mark.parametrize(
    "kind,generator,discriminator",
    [
        ("hinge", -(0.5 - 2) / 2, ((0.5 + 0) / 2 + (1.5 + 0) / 2) / 2),
        (
            "lsgan",
            ((0.5 - 1) ** 2 + (-2 - 1) ** 2) / 4,
            (((0.5 - 1) ** 2 + (3 - 1) ** 2) / 2 + (0.5**2 + 2**2) / 2) / 2,
        ),
        (
            "bce",
            -(math.log(1 / (1 + math.exp(-0.5))) + math.log(1 / (1 + math.exp(2)))) / 2,
            -sum(math.log(1 / (1 + math.exp(-v))) for v in (0.5, 3, -0.5, 2)) / 4,
        ),
    ],
)
def test_adversarial_losses_by_hand(kind, generator, discriminator):
    real, fake = torch.tensor([0.5, 3.0]).view(1, 1, 1, 1, 2), torch.tensor([0.5, -2.0]).view(1, 1, 1, 1, 2)
    assert abs(float(generator_loss(fake, kind)) - generator) < 1e-6
    assert abs(float(discriminator_loss(real, fake, kind)) - discriminator) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        half = (
            generator_loss(fake.bfloat16(), kind),
            discriminator_loss(real.bfloat16(), fake.bfloat16(), kind),
        )
    assert all(v.dtype == torch.float32 for v in half)
    assert abs(float(half[0]) - generator) < 1e-6 and abs(float(half[1]) - discriminator) < 1e-6


def test_adversarial_losses_stay_finite_in_half_precision():
    """The square of 300 overflows fp16, and so does exp(300)."""
    logits = torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16)
    for kind in adversarial.ADVERSARIAL:
        assert torch.isfinite(generator_loss(-logits, kind)) and torch.isfinite(
            discriminator_loss(-logits, logits, kind)
        )
    with pytest.raises(ValueError, match="hinge, lsgan, bce, got 'wgan'"):
        generator_loss(logits, "wgan")


def test_feature_matching_by_hand():
    real = [torch.zeros(1, 2, 2, 2, 2, requires_grad=True), torch.ones(1, 1, 1, 1, 2, requires_grad=True)]
    fake = [
        torch.full((1, 2, 2, 2, 2), 0.5, requires_grad=True),
        torch.full((1, 1, 1, 1, 2), -1.0, requires_grad=True),
    ]
    loss = feature_matching_loss(real, fake)
    loss.backward()
    assert abs(loss.item() - (0.5 + 2.0) / 2) < 1e-6
    assert all(r.grad is None for r in real)
    assert torch.allclose(fake[0].grad, torch.full((1, 2, 2, 2, 2), 1 / 32)) and torch.allclose(
        fake[1].grad, torch.tensor(-0.25)
    )
    with pytest.raises(ValueError, match="got 2 and 1"):
        feature_matching_loss(real, fake[:1])


def test_r1_of_a_linear_discriminator_is_its_squared_weight():
    """One patch: Eq.

    9 as it stands. Many patches that do not overlap: the same, so crop size and batch do not change the
    term.
    """
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
            bump = (
                torch.zeros(real.numel(), dtype=torch.float64)
                .index_fill(0, torch.tensor(i), step)
                .view_as(real)
            )
            jacobian[i] = (disc(real + bump).sum() - disc(real - bump).sum()) / (2 * step)
    # one logit per sample
    assert abs((r1_penalty(disc(real), real) - jacobian.square().sum() / 4).item()) < 1e-8
    assert gradcheck(
        lambda w: r1_penalty(F.conv3d(F.conv3d(real, w).tanh(), w), real),
        (disc[0].weight[:1].detach().requires_grad_(),),
    )


def test_r1_through_every_norm_and_its_errors():
    for norm in adversarial.DISC_NORMS:
        disc, real = PatchDiscriminator3d(1, 4, 1, norm=norm), torch.randn(2, 1, 8, 8, 8, requires_grad=True)
        r1_penalty(disc(real)[0], real).backward()
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for n, p in disc.named_parameters()
            if n.endswith("0.weight")
        )
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
        lecam(r, f), lecam(r, f)  # forward leaves the anchors: a repeated step is the same step
        assert all(torch.equal(v, state[k]) for k, v in lecam.state_dict().items())
        lecam.update(r, f)
        means = float(r.mean()), float(f.mean())
        anchors = means if anchors is None else tuple(0.9 * a + 0.1 * m for a, m in zip(anchors, means))
    expected = (real[0] - anchors[1]).square().mean() + (fake[0] - anchors[0]).square().mean()
    assert abs(float(lecam(real[0], fake[0]) - expected)) < 1e-6
    again = LeCam(decay=0.9)
    again.load_state_dict(lecam.state_dict())
    assert torch.equal(again(real[0], fake[0]), lecam(real[0], fake[0]))
    halves = LeCam(0.9), LeCam(0.9)  # the means of micro-batches do as well as the logits
    (
        halves[0].update(real[0], fake[0]),
        halves[1].update(real[0].mean(), torch.stack([fake[0][:1].mean(), fake[0][1:].mean()])),
    )
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
    # gradients below fp16's smallest number
    losses_ = [((w @ x) * g).float().sum() * s for s in (2e-8, 1e-8)]
    # finite; the 1e-6 of Eq. 7 bounds it
    assert abs(float(adaptive_weight(*losses_, w, scale=2.0 ** 20)) - 2 * 1e-8 / 1e-6) < 2.0
    assert float(adaptive_weight(*losses_, w)) == 0


@pytest.mark.parametrize("kind", ["none", "float16"])
def test_feature_matching_is_the_reconstruction_loss_of_each_layer(kind, monkeypatch):
    """Value and gradient, to the bit, whatever the slabs: adversarial.py has a copy of what it needs of
    losses.py."""
    dtype = torch.float32 if kind == "none" else torch.float16
    real, fake = (t.to(dtype) for t in pair((2, 3, 5, 6, 7), torch.float32))
    for slab in (1, 100, 1 << 21):
        monkeypatch.setattr(adversarial, "SLAB_VOXELS", slab)
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        ours, theirs = fake.clone().requires_grad_(), fake.clone().requires_grad_()
        a, b = feature_matching_loss([real], [ours]), losses.reconstruction_loss(theirs, real, "l1")
        (1000 * a).backward(), (1000 * b).backward()
        assert torch.equal(a, b) and torch.equal(ours.grad, theirs.grad) and ours.grad.dtype == dtype
    with pytest.raises(ValueError, match="feature_matching_loss: needs two tensors of one shape"):
        feature_matching_loss([real], [fake[:1]])


def test_copies_are_those_of_losses():
    assert assert_copies("adversarial.py") == 6


@pytest.mark.slow
def test_works_copied_alone(tmp_path):
    said = run_alone(tmp_path, ["adversarial.py"], """
import torch, adversarial
x = torch.zeros(1, 1, 12, 12, 12, requires_grad=True)
logits, features = adversarial.PatchDiscriminator3d(1, 2, 1)(x)
adversarial.feature_matching_loss(features, features).backward()
print(float(adversarial.discriminator_loss(logits, logits)), adversarial.LeCam()(logits, logits).item())
assert not {"losses", "perceptual", "train"} & set(sys.modules)""")
    assert said.split() == ["1.0", "0.0"], said
