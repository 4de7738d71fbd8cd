"""losses.py against slow obvious versions, MONAI's SSIM and gradcheck; faults that other losses had."""
import math
from dataclasses import fields

import pytest
import torch
from torch.autograd import gradcheck

import losses
import perceptual
from adversarial import PatchDiscriminator3d, generator_loss
from losses import (
    LossConfig,
    dice,
    dice_scores,
    kl_loss,
    occupancy_iou,
    psnr,
    reconstruction_loss,
    segmentation_loss,
    sharpness,
    ssim,
    structure_loss,
)
from pieces import Largest, pair, run_alone, saved_bytes

# -------------------------------------------------------------------------------- reconstruction, KL, metrics

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
@pytest.mark.parametrize(
    "options", [{}, {"channel_weights": (1.0, 0.0, 3.0)}, {"foreground_weight": 5.0, "background": 0.0}]
)
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
    assert torch.autograd.gradcheck(
        lambda r: 3 * reconstruction_loss(r, target, kind, (1.0, 2.0), 4.0, 0.0), (recon,)
    )


@pytest.mark.parametrize(
    "kind,reference", [("l1", torch.nn.functional.l1_loss), ("mse", torch.nn.functional.mse_loss)]
)
def test_reconstruction_parity_with_torch(kind, reference):
    recon, target = pair(dtype=torch.float32)
    ours, theirs = recon.clone().requires_grad_(), recon.clone().requires_grad_()
    a, b = reconstruction_loss(ours, target, kind), reference(theirs, target)
    a.backward(), b.backward()
    assert abs((a - b).item()) < 1e-6 and (ours.grad - theirs.grad).abs().max() < 1e-8


def test_reconstruction_of_half_precision_makes_no_full_size_float32(monkeypatch):
    """The loss side keeps pace with a network that runs in 16 bits.

    The largest tensor made in forward and backward is the 16-bit gradient.
    """
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
    """1 / numel is below fp16's smallest number for a large volume; the scaled gradient must come out all
    the same."""
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
    """A sum over the latent would grow with the crop, so that no weight held for two sizes."""
    mu, logvar = pair((1, 4, 4, 4, 4))
    big = [t.repeat(1, 1, 2, 2, 2) for t in (mu, logvar)]
    assert abs(float(kl_loss(mu, logvar) - kl_loss(*big))) < 1e-12
    x, y = pair((1, 1, 8, 8, 8))
    assert (
        abs(
            float(
                reconstruction_loss(x, y)
                - reconstruction_loss(x.repeat(1, 1, 2, 2, 2), y.repeat(1, 1, 2, 2, 2))
            )
        )
        < 1e-12
    )


def test_kl_stays_finite_in_half_precision():
    """exp(20) and the square of 300 overflow in fp16; the island is float32."""
    mu, logvar = (
        torch.full((1, 1, 2, 2, 2), 300.0, dtype=torch.float16),
        torch.full((1, 1, 2, 2, 2), 20.0, dtype=torch.float16),
    )
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
    assert torch.isfinite(ssim(x[..., :2, :5, :1], y[..., :2, :5, :1]))  # axes shorter than the window


def test_ssim_equals_monai():
    metrics = pytest.importorskip("monai.metrics.regression", reason="monai is a development dependency")
    x, y = (t.sigmoid() * 2 - 1 for t in pair((2, 1, 16, 15, 14), torch.float64))
    reference = metrics.SSIMMetric(spatial_dims=3, data_range=2.0)(x, y).mean()
    assert abs(float(ssim(x, y, 2.0)) - float(reference)) < 1e-6


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_metrics_are_of_float32_under_autocast(kind):
    """A smooth pair, whose variances are small beside their means: SSIM in bf16 is off in its first digit."""
    target = torch.linspace(0.5, 0.6, 12).expand(1, 1, 12, 12, 12).to(getattr(torch, kind))
    recon = (target.float() + 0.01 * pair((1, 1, 12, 12, 12), torch.float32)[0]).to(target.dtype)
    for metric in (psnr, ssim, sharpness, occupancy_iou):
        wanted = metric(recon.double(), target.double())
        with torch.autocast("cpu", torch.bfloat16):
            found = metric(recon, target)
        assert found.dtype == torch.float32 and abs(float(found / wanted) - 1) < 2e-3, metric.__name__


def test_errors_say_what_is_wrong():
    x, y = pair((1, 1, 4, 4, 4))
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4, 4\) and \(1, 1, 4, 4, 3\)"):
        reconstruction_loss(x, y[..., :3])
    with pytest.raises(ValueError, match="2 factors, the data has 1 channels"):
        reconstruction_loss(x, y, "l1", (1.0, 2.0))
    with pytest.raises(ValueError, match="l1, mse, l1_l2, got 'l3'"):
        LossConfig(recon="l3")


# ---------------------------------------------------------------------------- structure, sharpness, occupancy

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
@pytest.mark.parametrize(
    "options", [{}, {"channel_weights": (0.5, 3.0), "foreground_weight": 5.0, "background": 0.0}]
)
def test_structure_equals_the_obvious_version(shape, options, monkeypatch):
    recon, target = pair(shape)
    target[:, :, 1:] = 0
    options = {k: v[:shape[1]] if k == "channel_weights" else v for k, v in options.items()}
    for slab in (1, 25, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert (
            abs(float(structure_loss(recon, target, **options)) - slow_structure(recon, target, **options))
            < 1e-12
        )


def test_structure_of_a_ramp_is_its_slope():
    ramp = 0.25 * torch.arange(8.0).view(1, 1, 1, 8, 1).expand(1, 1, 5, 8, 6)
    gradients = losses.sobel(ramp)
    assert torch.equal(gradients[1][..., 1:-1, :], torch.full((1, 1, 5, 6, 6), 0.25))
    assert gradients[0].abs().max() == gradients[2].abs().max() == 0


@pytest.mark.slow
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
    # slabs of 2 slices: 4 more as halo, 22 x 22 with borders
    assert seen.float32 <= 4000 < recon.numel(), seen.float32
    assert recon.grad.dtype == torch.bfloat16


def test_sharpness(monkeypatch):
    x, y = pair((2, 2, 7, 6, 5))
    energy = [sum(t.diff(dim=axis).square().sum() for axis in (2, 3, 4)) for t in (x, y)]
    for slab in (1, 100, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert abs(float(sharpness(x, y) - energy[0] / energy[1])) < 1e-12
    values = [float(sharpness(perceptual.blur(x, s), x)) for s in (0.0, 0.5, 1.0, 2.0)]
    assert values[0] == 1 and values == sorted(values, reverse=True)
    assert not torch.isfinite(sharpness(x, torch.zeros_like(x)))


def test_occupancy_iou_by_hand(monkeypatch):
    recon, target = torch.full((2, 2, 3, 4, 5), -1.0), torch.full((2, 2, 3, 4, 5), -1.0)
    # 6 occupied voxels, in one channel or the other
    target[0, 0, 0, 0, :4], target[1, 1, 2, 0, :2] = 0.5, -0.9
    recon[0, 1, 0, 0, 1:5], recon[1, 0, 0] = 0.2, -0.96  # 4 of them, 3 shared; -0.96 is not far enough
    for slab in (1, 1 << 21):
        monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
        assert abs(float(occupancy_iou(recon, target, -1.0)) - 3 / 7) < 1e-7
    assert occupancy_iou(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2, 2, 2), 0.0) == 1
    assert occupancy_iou(recon, target, -1.0, threshold=3.0) == 1


# ----------------------------------------------------------------------------------------------- segmentation

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


@pytest.mark.parametrize(
    "k,options",
    [
        (3, {}),
        (1, {}),
        (3, {"class_weights": (1.0, 0.0, 2.5)}),
        (1, {"class_weights": (1.0, 4.0)}),
        (4, {"ignore_index": 255, "class_weights": (1.0, 2.0, 3.0, 4.0)}),
        (1, {"ignore_index": -1}),
    ],
)
@pytest.mark.parametrize("slab", [1, 1 << 21])
def test_segmentation_equals_the_obvious_version(k, options, slab, monkeypatch):
    monkeypatch.setattr(losses, "SLAB_VOXELS", slab)
    logits, label = seg_pair(k)
    if "ignore_index" in options:
        label[0, 1], label[1, 0, 0, 0] = options["ignore_index"], options["ignore_index"]
    label[1][label[1] == max(k, 2) - 1] = 0  # a class that the second sample lacks
    ce, dice_loss = slow_segmentation(
        logits, label, options.get("class_weights"), options.get("ignore_index")
    )
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
    logits, label = (
        torch.randn(1, 4, 20, 10, 10).bfloat16().requires_grad_(),
        torch.randint(0, 4, (1, 20, 10, 10)),
    )
    assert (
        saved_bytes(lambda: segmentation_loss(logits, label)) < 2 * logits.numel() + 8 * label.numel() + 1000
    )
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
    with pytest.raises(RuntimeError, match="out of bounds"):  # a label that no class has never counts as none
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


# ----------------------------------------------------------------------------------------------- config, file

def test_every_loss_field_changes_the_loss():
    """A field that changes nothing is a bug; those that only train.py reads are seen in
    test_step.py.
    """
    x, y = pair((1, 2, 4, 4, 4))
    y[:, :, 0] = 0                                               # background of a sparse grid
    plain = reconstruction_loss(x, y)
    changed = {
        "recon": reconstruction_loss(x, y, "mse"),
        "channel_weights": reconstruction_loss(x, y, "l1", (1.0, 2.0)),
        "foreground_weight": reconstruction_loss(x, y, "l1", None, 3.0),
        "background": reconstruction_loss(x, y, "l1", None, 3.0, 0.0),
    }
    assert (
        all(float(v) != float(plain) for v in changed.values())
        and changed["background"] != changed["foreground_weight"]
    )

    logits, label = seg_pair(3)
    plain = segmentation_loss(logits, label).loss
    seg = {
        "dice_share": segmentation_loss(logits, label, 0.1).loss,
        "class_weights": segmentation_loss(logits, label, 0.5, (1, 2, 3)).loss,
    }
    assert all(v.item() != plain.item() for v in seg.values())

    disc = {
        "disc_channels": PatchDiscriminator3d(1, 8),
        "disc_layers": PatchDiscriminator3d(1, 4, 2),
        "disc_strides": PatchDiscriminator3d(1, 4, strides=(1, 2, 2)),
        "disc_norm": PatchDiscriminator3d(1, 4, norm="group"),
    }
    shapes = {name: (str(d), d.least_size) for name, d in (disc | {"": PatchDiscriminator3d(1, 4)}).items()}
    assert len(set(shapes.values())) == 5
    assert len({generator_loss(logits, kind).item() for kind in losses.ADVERSARIAL}) == 3         # adv_loss
    in_train = {
        "kl_weight",
        "structure_weight",
        "perceptual_weight",
        "perceptual_features",
        "perceptual_start",
        "perceptual_warmup",
        "adv_weight",
        "disc_start",
        "disc_warmup",
        "disc_lr",
        "disc_grad_clip",
        "feature_matching_weight",
        "r1_weight",
        "r1_every",
        "lecam_weight",
        "adaptive_weight",
        "crop",
    }
    assert {f.name for f in fields(LossConfig)} == set(changed) | set(seg) | set(disc) | {
        "adv_loss"
    } | in_train


@pytest.mark.parametrize(
    "options,message",
    [
        ({"adv_loss": "wgan"}, "loss.adv_loss must be one of hinge, lsgan, bce, got 'wgan'"),
        ({"disc_norm": "batch"}, "loss.disc_norm"),
        ({"adv_weight": -1.0}, "loss.adv_weight must be 0 or more"),
        ({"perceptual_weight": math.nan}, "loss.perceptual_weight"),
        ({"disc_layers": 0}, "loss.disc_layers must be 1 or more"),
        ({"r1_every": 0}, "loss.r1_every"),
        ({"disc_lr": 0.0}, "loss.disc_lr"),
        ({"disc_grad_clip": -1.0}, "loss.disc_grad_clip must be 0 or more"),
        ({"dice_share": 1.5}, "loss.dice_share must be from 0"),
        ({"crop": (0, 8, 8)}, "loss.crop"),
        ({"crop": (8, 8)}, "loss.crop"),
        ({"disc_strides": (2, 2)}, "loss.disc_strides needs one D,H,W triple"),
        ({"class_weights": ()}, "loss.class_weights"),
        ({"disc_strides": ((1, 2, 2), (2, 2, 2))}, "each of the 3 layers"),
        ({"perceptual_features": ""}, "loss.perceptual_features"),
        ({"channel_weights": (-1.0,)}, "loss.channel_weights"),
    ],
)
def test_config_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**options)


def test_config_takes_lists():
    cfg = LossConfig(disc_strides=[[1, 2, 2], [2, 2, 2], [2, 2, 2]], crop=[8, 8, 8], class_weights=[1.0, 2.0])
    assert (
        cfg.disc_strides == ((1, 2, 2), (2, 2, 2), (2, 2, 2))
        and cfg.crop == (8, 8, 8)
        and cfg.class_weights == (1.0, 2.0)
    )
    assert (
        PatchDiscriminator3d(1, 4, 3, cfg.disc_strides).least_size[0]
        < PatchDiscriminator3d(1, 4).least_size[0]
    )


@pytest.mark.slow
def test_works_copied_alone(tmp_path):
    said = run_alone(tmp_path, ["losses.py"], """
import torch, losses
x = torch.zeros(1, 1, 12, 12, 12)
losses.segmentation_loss(x, x[:, 0].long())
print(float(losses.reconstruction_loss(x, x + 1)), float(losses.ssim(x, x)))
assert not {"adversarial", "perceptual", "train"} & set(sys.modules)""")
    assert said.split() == ["1.0", "1.0"], said
