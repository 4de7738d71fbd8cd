"""metrics.py: surfaces against MONAI and by hand, MS-SSIM against one written anew."""
import math
import warnings

import pytest
import torch

import metrics
from pieces import assert_copies, run_alone


def ball(size, centre, radius, spacing=(1, 1, 1)):
    axes = [(torch.arange(n) - c) * mm for n, c, mm in zip(size, centre, spacing)]
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    return d**2 + h**2 + w**2 <= radius**2


def random_labels(seed, size, classes=4):
    """Blobs of each class, some of them at the border, with single voxels here and there."""
    rng = torch.Generator().manual_seed(seed)
    label = torch.zeros(size, dtype=torch.int64)
    for k in range(1, classes):
        centre = [float(torch.rand((), generator=rng)) * n for n in size]
        label[ball(size, centre, 2 + 4 * float(torch.rand((), generator=rng)))] = k
    noise = torch.rand(size, generator=rng)
    label[noise < 0.01] = 1
    return label


@pytest.mark.parametrize("seed, size", [(0, (12, 17, 15)), (1, (9, 20, 22)), (2, (15, 6, 31)),
                                        (3, (5, 5, 5))])
def test_hd95_and_surface_dice_equal_monai(seed, size):
    pytest.importorskip("scipy")                                 # MONAI erodes masks with it
    monai = pytest.importorskip("monai.metrics")
    spacing = tuple((0.5 + 2.5 * torch.rand(3, generator=torch.Generator().manual_seed(seed))).tolist())
    found, label = random_labels(seed, size), random_labels(seed + 100, size)
    scores = metrics.surface_scores(found, label, 4, spacing, tolerance=2.0, background=True)
    hot = [torch.nn.functional.one_hot(x, 4).movedim(-1, 0)[None] for x in (found, label)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95 = monai.compute_hausdorff_distance(*hot, include_background=True, percentile=95, spacing=spacing)
        share = monai.compute_surface_dice(*hot, [2.0] * 4, include_background=True, spacing=spacing)
    # MONAI has nan, by inf - inf, for a class that one of the two lacks; here it is infinite.
    one_sided = [bool((found == k).any()) != bool((label == k).any()) for k in range(4)]
    assert scores.hd95.isinf().tolist() == one_sided and not hd95[0].isfinite()[one_sided].any()
    hd95[0, one_sided] = math.inf
    for ours, theirs in ((scores.hd95, hd95[0]), (scores.surface_dice, share[0])):
        assert torch.allclose(ours.float(), theirs, atol=1e-4, rtol=0, equal_nan=True), (ours, theirs)


def test_nearest_equals_every_pair():
    """All distances, of masks with lines that hold nothing, against the whole table of pairs."""
    rng = torch.Generator().manual_seed(0)
    for share, size in ((0.002, (20, 23, 31)), (0.05, (7, 40, 9)), (0.5, (6, 6, 6))):
        a, b = (torch.rand(size, generator=rng) < share for _ in range(2))
        a[0, 0, 0] = b[-1, -1, -1] = True
        spacing = (3.0, 0.7, 1.1)
        pairs = [mask.nonzero().double() * torch.tensor(spacing).double() for mask in (a, b)]
        wanted = (pairs[0][:, None] - pairs[1][None]).square().sum(-1).sqrt().amin(1)
        assert (metrics.nearest(a, b, spacing) - wanted).abs().max() < 1e-4


def test_by_hand():
    """Two cubes of 3 voxels, one shifted by two along D, at 1.5 mm."""
    found, label = torch.zeros(2, 9, 7, 7, dtype=torch.int64)
    found[1:4, 2:5, 2:5], label[3:6, 2:5, 2:5] = 1, 1
    scores = metrics.surface_scores(found, label, 3, (1.5, 1, 1), tolerance=3.0)
    # A cube of 27 voxels has a surface of 26. Of the first one 9 voxels lie 3 mm from the other, 8 of the
    # middle plane 1.5 mm and its last plane 0 (8 of 9: the other's first plane is a face, so all 9).
    a, _ = metrics.surface_distances(found == 1, label == 1, (1.5, 1, 1))
    assert sorted(a.tolist()) == [0.0] * 9 + [1.5] * 8 + [3.0] * 9
    assert scores.hd95[1] == 3 and scores.total.tolist()[1] == 52 and scores.surface_dice[1] == 1
    tight = metrics.surface_scores(found, label, 3, (1.5, 1, 1), tolerance=1.5)
    assert tight.within[1] == 34 and math.isclose(tight.surface_dice[1], 34 / 52)
    # neither of them has class 2
    assert math.isnan(scores.hd95[2]) and math.isnan(scores.surface_dice[2]) and scores.total[2] == 0


def test_missed_ignored_and_flat():
    label = torch.zeros(4, 8, 8, dtype=torch.int64)
    label[1:3, 2:5, 2:5] = 1
    missed = metrics.surface_scores(torch.zeros_like(label), label, 2, (1, 1, 1))
    assert missed.hd95[1] == math.inf and missed.surface_dice[1] == 0
    # what differs lies where nobody has looked
    found, unsure = label.clone(), label.clone()
    found[0], unsure[0] = 1, 255
    assert metrics.surface_scores(found, unsure, 2, (1, 1, 1), ignore_index=255).hd95[1] == 0
    # of a picture the contour counts, not every pixel
    square = torch.zeros(1, 8, 8, dtype=torch.int64)
    square[0, 2:6, 2:6] = 1
    assert metrics.surface_scores(square, square, 2, (1, 1, 1)).total[1] == 2 * 12
    with pytest.raises(ValueError, match="one shape"):
        metrics.surface_scores(label, square, 2, (1, 1, 1))
    with pytest.raises(ValueError, match="in mm above 0"):
        metrics.surface_scores(label, label, 2, (1, 0, 1))


def independent_ms_ssim(x, y, data_range):
    """One pair (D, H, W), float64, window by window: sums over unfolded windows, means of pairs by slices."""
    weights, parts = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333], []
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    for _ in weights:
        window = torch.ones((), dtype=torch.float64)
        for n in x.shape:
            length = min(11, n if n % 2 else n - 1)
            g = torch.exp(-(torch.arange(length).double() - length // 2) ** 2 / 4.5)
            window = window[..., None] * (g / g.sum())
        a, b = (v.unfold(0, window.shape[0], 1).unfold(1, window.shape[1], 1).unfold(2, window.shape[2], 1)
                for v in (x, y))
        mean_a, mean_b = ((v * window).sum((3, 4, 5)) for v in (a, b))
        centred = a - mean_a[..., None, None, None], b - mean_b[..., None, None, None]
        var_a, var_b = ((v**2 * window).sum((3, 4, 5)) for v in centred)
        cov = (centred[0] * centred[1] * window).sum((3, 4, 5))
        cs = (2 * cov + c2) / (var_a + var_b + c2)
        light = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
        parts.append((float(cs.mean()), float((cs * light).mean())))
        halved = [axis for axis in range(3) if x.shape[axis] // 2 >= 11]
        if not halved:
            break
        for axis in halved:
            pairs = x.shape[axis] // 2
            x, y = (v.narrow(axis, 0, 2 * pairs).unflatten(axis, (pairs, 2)).mean(axis + 1) for v in (x, y))
    used = weights[:len(parts)]
    result = parts[-1][1] ** (used[-1] / sum(used))
    for (cs, _), weight in zip(parts[:-1], used):
        result *= max(cs, 0) ** (weight / sum(used))
    return result


@pytest.mark.parametrize("size", [(13, 25, 47), (8, 22, 23), (1, 44, 30), (12, 12, 12)], ids=str)
def test_ms_ssim_equals_one_written_anew(size):
    rng = torch.Generator().manual_seed(1)
    target = torch.rand(2, 2, *size, generator=rng, dtype=torch.float64) * 2 - 1
    target = torch.nn.functional.avg_pool3d(target, (1, 3, 3), 1, (0, 1, 1))
    recon = target + 0.2 * torch.randn(target.shape, generator=rng, dtype=torch.float64)
    wanted = [independent_ms_ssim(recon[b, c], target[b, c], 2.0) for b in range(2) for c in range(2)]
    assert abs(float(metrics.ms_ssim(recon, target)) - sum(wanted) / 4) < 1e-9
    assert abs(float(metrics.ms_ssim(recon.float(), target.float())) - sum(wanted) / 4) < 1e-4
    assert metrics.ms_ssim(target, target) == pytest.approx(1) and sum(wanted) / 4 < 0.95


def test_ms_ssim_in_slabs(monkeypatch):
    rng = torch.Generator().manual_seed(2)
    x, y = torch.rand(2, 1, 1, 30, 24, 24, generator=rng)
    whole = metrics.ms_ssim(x, y)
    monkeypatch.setattr(metrics, "SLAB_VOXELS", 24 * 24 * 3)
    assert abs(float(metrics.ms_ssim(x, y) - whole)) < 1e-5


def test_quantile():
    assert metrics.quantile(torch.tensor([3.0, 1.0, 2.0]), 0.95) == pytest.approx(2.9)
    assert metrics.quantile(torch.tensor([1.0, math.inf, math.inf]), 0.95) == math.inf


def test_works_copied_alone(tmp_path):
    assert_copies("metrics.py")
    said = run_alone(tmp_path, ["metrics.py"], """
import torch, metrics
a = torch.zeros(3, 5, 5, dtype=torch.int64)
a[1, 2, 2] = 1
print(float(metrics.surface_scores(a, a, 2, (1, 1, 1)).hd95[1]))""")
    assert said.split() == ["0.0"]
