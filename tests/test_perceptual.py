"""perceptual.py: features that are the same everywhere, the distance, degradations and their training."""
import io
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

import perceptual
from adversarial import adaptive_weight
from losses import sharpness
from perceptual import FeatureNet3d, FeatureTrainer, PerceptualLoss3d, crop_starts, degrade, sub_crop
from pieces import ROOT, assert_copies, generators, pair, run_alone, saved_bytes

# -------------------------------------------------------------------------------------------------- sub-crops

def test_sub_crops():
    x = torch.arange(3 * 2 * 6 * 7 * 8.0).view(3, 2, 6, 7, 8).requires_grad_()
    starts = crop_starts(x.shape, (4, 9, 3), generators(3))
    assert starts == crop_starts(x.shape, (4, 9, 3), generators(3)) and len(set(starts)) > 1
    # the same in any batch
    assert starts[1] == crop_starts((1, *x.shape[1:]), (4, 9, 3), generators(1, seed=1))[0]
    cut = sub_crop(x, starts, (4, 9, 3))
    assert cut.shape == (3, 2, 4, 7, 3)
    for i, (d, h, w) in enumerate(starts):
        assert h == 0 and torch.equal(cut[i], x[i, :, d:d + 4, :, w:w + 3])
    cut.sum().backward()
    assert x.grad.sum() == cut.numel() and torch.equal(
        sub_crop(x.grad, starts, (4, 9, 3)), torch.ones_like(cut)
    )
    assert sub_crop(x, crop_starts(x.shape, None, generators(3)), None) is x
    seen = {crop_starts((1, 1, 6, 1, 1), (4, 1, 1), generators(1, s))[0][0] for s in range(50)}
    assert seen == {0, 1, 2}                                     # every position, the last one too
    with pytest.raises(ValueError, match="2 for 3 samples"):
        crop_starts(x.shape, None, generators(2))


# ------------------------------------------------------------------------------------------- perceptual terms

def textured(shape=(1, 1, 16, 20, 18), seed=0):
    """Smooth anatomy with edges and fine texture, in [-1, 1]."""
    g = torch.Generator().manual_seed(seed)
    smooth = perceptual.blur(torch.randn(shape, generator=g), 2.0)
    return (
        torch.where(smooth > 0, 0.4, -0.6) + 0.1 * perceptual.blur(torch.randn(shape, generator=g), 0.6)
    ).clamp(-1, 1)


@pytest.mark.slow
def test_random_features_are_the_same_in_every_process():
    """Other global seed, other hash seed, other process: the same value to the last bit."""
    code = (
        "import sys, torch, perceptual; torch.manual_seed(int(sys.argv[1])); torch.rand(int(sys.argv[1])); "
        "x = torch.linspace(-1, 1, 2 * 9 * 10 * 11).sin().view(1, 2, 9, 10, 11); "
        "print(perceptual.PerceptualLoss3d(perceptual.FeatureNet3d())(x, x.square()).item().hex())"
    )
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
    rows = net.scales[1][0].weight.flatten(1).double()  # orthogonal, with He's gain for LeakyReLU 0.2
    assert (rows @ rows.T - torch.eye(32) * 2 / 1.04).abs().max() < 1e-6
    assert (
        net.scales[0][0].weight.mean(dim=(1, 2, 3, 4)).abs().max() < 1e-7
        and FeatureNet3d((30,)).scales[0][0].weight.isfinite().all()
    )


def test_perceptual_properties():
    loss, x = PerceptualLoss3d(FeatureNet3d()), textured()
    assert loss(x, x) == 0
    with torch.no_grad():
        blurred = [float(loss(perceptual.blur(x, s), x)) for s in (0.5, 0.75, 1.0, 1.5, 2.0)]
        assert blurred == sorted(blurred) and blurred[0] > 0.01, blurred
        error = (perceptual.blur(x, 1.0) - x).square().mean().sqrt()
        # of equal L2: a blur is seen, an intensity offset hardly
        assert blurred[2] > 3 * float(loss(x + error, x))
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
    # the island is float32
    assert value.dtype == torch.float32 and abs((value - loss(recon, target)).item()) < 1e-6


def test_degrade_is_a_function_of_the_generators():
    x = textured((6, 2, 7, 8, 9))
    out, amount = degrade(x, generators(6))
    again, same = degrade(x, generators(6))
    assert torch.equal(out, again) and torch.equal(amount, same) and out.shape == x.shape
    alone, one = degrade(x[4:5], generators(1, seed=4))          # the same in any batch
    assert torch.equal(alone[0], out[4]) and torch.equal(one[0], amount[4])
    assert amount.shape == (6, 3) and amount.min() == 0 and amount.max() <= 1
    seen = torch.cat([degrade(x[:1, :1, :2, :2, :2], generators(1, s))[1] for s in range(2000)]).double()
    expected = [1 / 6 - 1 / 16, 4 / 27, 1 / 6 - 1 / 16]  # the variances that FeatureTrainer divides by
    assert (seen.var(dim=0) - torch.tensor(expected)).abs().max() < 0.01 and set(
        seen[:, 1].mul(3).round().tolist()
    ) == {0, 1, 2, 3}
    assert degrade(x.bfloat16(), generators(6))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("sigma", [0.8, 1.5, 2.0])
def test_blur_is_a_gaussian_of_that_width(sigma):
    """A point becomes one whose variance along each axis is sigma^2, cut at 3 sigma: 2.5 % less at most."""
    x = torch.zeros(1, 1, 21, 21, 21)
    x[..., 10, 10, 10] = 1
    out = perceptual.blur(x, sigma)[0, 0]
    assert abs(float(out.sum()) - 1) < 1e-5
    place = torch.arange(21.0) - 10
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        variance = float((out.sum(others) * place.square()).sum())
        assert 0.975 * sigma ** 2 < variance < 1.005 * sigma ** 2, variance


def test_each_degradation_does_what_it_says():
    x = textured((1, 1, 9, 10, 11))
    seen = set()
    for s in range(40):
        out, amount = degrade(x, generators(1, s))
        if (amount > 0).sum() == 1:
            name = perceptual.DEGRADATIONS[int(amount.argmax())]
            seen.add(name)
            if name == "noise":
                assert abs(float((out - x).std()) - 0.1 * float(amount.max())) < 0.01
            elif name == "block":
                edge = 1 + int((amount.max() * 3).round())
                assert torch.allclose(out[0, 0, :edge, :edge, :edge], x[0, 0, :edge, :edge, :edge].mean())
                # the cut cube at the border
                assert torch.allclose(out[0, 0, 8 - 8 % edge:, 0, 0], out[0, 0, -1, 0, 0])
            else:
                assert float(sharpness(out, x)) < 1
        elif amount.max() == 0:
            assert torch.equal(out, x)
    assert seen == set(perceptual.DEGRADATIONS)


@pytest.mark.slow
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
    two = trainer(x.repeat(1, 2, 1, 1, 1), degraded.repeat(1, 2, 1, 1, 1), amount)  # channels are samples
    assert abs((two.loss - trainer(x, degraded, amount).loss).item()) < 1e-6
    with torch.no_grad():  # a constant guess of the means of what is drawn explains nothing
        for head in trainer.heads:
            head[2].weight.zero_()
            head[2].bias.copy_(torch.tensor([1 / 4, 1 / 3, 1 / 4]))
        crop, many = (
            x[:1, :, :2, :2, :2],
            [degrade(x[:1, :, :2, :2, :2], generators(1, s)) for s in range(1000)],
        )
        scores = trainer(
            crop.expand(1000, -1, -1, -1, -1),
            torch.cat([d for d, _ in many]),
            torch.cat([a for _, a in many]),
        )
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
    for change, message in [
        ({"kind": "vae3d.vae"}, "kind must be vae3d.features, got vae3d.vae"),
        ({"version": 2}, "version 2"),
        ({"config": {"channels": [8, 8]}}, "weights do not fit"),
        ({"config": {}}, "needs config with channels"),
        ({"model": {}}, "weights do not fit"),
        ({"model": None}, "needs config"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            FeatureNet3d.from_checkpoint({**content, **change})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="got list"):
        FeatureNet3d.from_checkpoint([])


def test_copies_are_those_of_losses():
    assert assert_copies("perceptual.py") == 3


@pytest.mark.slow
def test_works_copied_alone(tmp_path):
    said = run_alone(tmp_path, ["perceptual.py"], """
import torch, perceptual
x = torch.zeros(1, 1, 12, 12, 12)
crop = perceptual.sub_crop(x, perceptual.crop_starts(x.shape, (8, 8, 8), [torch.Generator()]), (8, 8, 8))
print(float(perceptual.PerceptualLoss3d(perceptual.FeatureNet3d((2,)))(crop, crop)))
assert not {"losses", "adversarial", "train"} & set(sys.modules)""")
    assert said.split() == ["0.0"], said
