"""Figures of samples against ones worked out here: pairs in a loop, normal sets, copies, histograms."""
import numpy as np
import pytest
import torch

from perceptual import FeatureNet3d
from training import sample_figures
from training.sample_figures import BINS


def test_kid_is_the_unbiased_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((5, 3)), rng.standard_normal((4, 3)) + 1
    def k(a, b):
        return (a @ b / 3 + 1) ** 3
    wanted = np.mean([k(x[i], x[j]) for i in range(5) for j in range(5) if i != j])
    wanted += np.mean([k(y[i], y[j]) for i in range(4) for j in range(4) if i != j])
    wanted -= 2 * np.mean([k(a, b) for a in x for b in y])
    assert sample_figures.kid(x, y) == pytest.approx(wanted, abs=1e-12)


def test_kid_of_one_law_is_around_0_and_like_real_against_real():
    rng = np.random.default_rng(1)
    real, same = rng.standard_normal((120, 20)), rng.standard_normal((60, 20))
    found = sample_figures.kid_beside_real(same, real)
    assert found["subset"] == 60 and found["real"]["low"] < found["samples"]["mean"] < found["real"]["high"]
    shifted = sample_figures.kid_beside_real(same + 1, real)
    assert shifted["samples"]["low"] > 10 * found["real"]["high"] > 0
    # the unit of a feature does not count, nor a feature that never changes
    units = np.concatenate([np.full((1, 1), 1e3), 10.0 ** np.arange(-3, 16.0)[None]], 1)
    again = sample_figures.kid_beside_real((same + 1) * units, real * units)
    assert again["value"] == pytest.approx(shifted["value"], rel=1e-6)


def test_frechet_distance_of_normal_sets():
    """Against scipy's root of a matrix, and its closed form for normal laws; the noise of few is shrunk."""
    linalg = pytest.importorskip("scipy.linalg", reason="its matrix root is the reference")
    rng = np.random.default_rng(3)
    mixing = np.diag([1.0, 2, 0.5, 1.5]) + 0.3 * rng.standard_normal((4, 4))
    x, y = rng.standard_normal((4000, 4)) @ mixing, 2 * rng.standard_normal((4000, 4)) + 1
    s_x, s_y = sample_figures.shrunk_covariance(x), sample_figures.shrunk_covariance(y)
    wanted = np.square(x.mean(0) - y.mean(0)).sum()
    wanted += np.trace(s_x + s_y - 2 * linalg.sqrtm(s_x @ s_y).real)
    assert sample_figures.frechet(x, y) == pytest.approx(wanted, abs=1e-9)
    axes = np.sqrt(np.linalg.eigvalsh(mixing.T @ mixing))        # of normal laws N(0, M^T M) and N(1, 4)
    assert sample_figures.frechet(x, y) == pytest.approx(4 + np.square(axes - 2).sum(), rel=0.05)
    # many volumes: the plain covariance; few of an even law: nearly all of the unevenness is noise
    assert np.allclose(s_x, np.cov(x.T, bias=True), atol=0.01)
    few = sample_figures.shrunk_covariance(rng.standard_normal((30, 20)))
    plain = rng.standard_normal((30, 20))
    assert np.linalg.cond(few) < 4 < np.linalg.cond(np.cov(plain.T))
    # only where there are more than twice as many volumes as features, of the halves too
    assert sample_figures.frechet_beside_real(x[:8], y) == {}
    assert set(sample_figures.frechet_beside_real(x[:9], y[:16])) == {"value"}
    found = sample_figures.frechet_beside_real(y[:100], y[100:])
    assert abs(found["real"]) < 0.02 and abs(found["value"]) < 0.2


def test_copies_are_found_and_new_ones_are_not():
    rng = np.random.default_rng(2)
    training, new, fresh = (rng.standard_normal((60, 30)) for _ in range(3))
    copied = training[:20] + 1e-3 * rng.standard_normal((20, 30))
    reference = sample_figures.nearest(new, training)
    by_hand = np.sqrt(np.square(new[:, None] - training[None]).mean(2))
    assert np.allclose(reference.distance, by_hand.min(1)) and (reference.index == by_hand.argmin(1)).all()
    assert np.allclose(reference.ratio, np.sort(by_hand, 1)[:, 0] / np.sort(by_hand, 1)[:, 1])
    found = sample_figures.memorisation(sample_figures.nearest(copied, training), reference)
    assert found["auc"] == 1 and found["suspicious"] == 1
    assert (sample_figures.nearest(copied, training).index == np.arange(20)).all()
    found = sample_figures.memorisation(sample_figures.nearest(fresh, training), reference)
    assert abs(found["auc"] - 0.5) < 0.12 and found["suspicious"] < 0.1
    alone = sample_figures.nearest(training, training, leave_one_out=True)
    assert (alone.distance > 0.1).all()


def test_traits_of_a_volume_and_tissue_of_two_sets():
    """Half air, half 50 HU against all 50 HU: shares by hand, W1 half of 1050 HU, energy of one step."""
    half, full = np.full((1, 8, 8, 8), 0.05, np.float32), np.full((1, 8, 8, 8), 0.05, np.float32)
    half[:, :4] = -1
    network = FeatureNet3d()
    a, b = (sample_figures.traits(name, x, network, (8, 8, 8)) for name, x in (("a", half), ("b", full)))
    assert a.features.shape == (2 * (16 + 32 + 64),) and a.middle.shape == (1, 1, 8, 8, 8)
    assert a.energy == pytest.approx(1.05**2 / 7, rel=1e-5) and b.energy == 0
    found = sample_figures.tissue([a], [b], -1000, 1000, True)
    assert found["histogram_w1"] == pytest.approx(525, abs=2000 / BINS)
    assert found["tissues"]["air"] == {"samples": 0.5, "real": 0} and found["tissues"]["bone"]["real"] == 0
    assert found["tissues"]["soft"] == {"samples": 0.5, "real": 1}


def test_equal_samples_are_not_diverse():
    x = [torch.randn(1, 1, 12, 12, 12) for _ in range(4)]
    assert sample_figures.pairwise_ms_ssim([x[0]] * 4) == pytest.approx(1, abs=1e-5)
    assert sample_figures.pairwise_ms_ssim(x) < 0.2 and np.isnan(sample_figures.pairwise_ms_ssim(x[:1]))
