"""volumes/intensities.py: windows, percentiles, voxel grids, and what is guessed."""
import nibabel as nib
import numpy as np
import pytest

from data import open_data, read_volume
from volume_files import REAL, needs_real
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.intensities import denormalise, guess_modality, normalise


def test_ct_windows():
    hu = np.array([-3024, -1350, -1000, -600, -5, 0, 75, 150, 1000, 3000], np.float32).reshape(1, 1, 1, -1)
    for window, (width, level) in {
        "lung": (1500, -600),
        "bone": (1500, 300),
        "soft_tissue": (400, 50),
        "brain": (80, 35),
    }.items():
        cfg = DataConfig(window=window)
        out, _ = normalise(hu, "ct", cfg.hu_limits())
        np.testing.assert_allclose(out, ((hu - level) / (width / 2)).clip(-1, 1), atol=1e-6)
    out, intensity = normalise(hu, "ct", DataConfig().hu_limits())
    np.testing.assert_allclose(out, hu.clip(-1000, 1000) / 1000, atol=1e-7)
    np.testing.assert_allclose(denormalise(out, intensity), hu.clip(-1000, 1000), atol=1e-3)
    assert intensity.background == -1
    assert DataConfig(hu_range=(-100, 300)).hu_limits() == (-100, 300)


def test_mr_percentiles_are_chosen(folder_of_one_mr, tmp_path):
    """As MAISI's scripts: least value and 99.5 percentile of all voxels to both ends, nothing clipped; the
    cache tells the two apart.
    """
    path, array = folder_of_one_mr
    low, high = array.min(), np.percentile(array, 99.5)
    maisi = dict(percentiles=(0.0, 99.5), percentiles_of="all")
    out, intensity = normalise(array[None], "mr", **maisi)
    np.testing.assert_allclose((out[0] + 1) / 2, (array - low) / (high - low), atol=1e-6)
    np.testing.assert_allclose(denormalise(out, intensity)[0], array, rtol=1e-5, atol=1e-3)
    cfg = dict(
        path=str(path), modality="mr", val_fraction=0.0, patch=(4, 4, 4), cache_dir=str(tmp_path / "cache")
    )
    highs = [
        open_data(DataConfig(**cfg, **more), 0, print).train[0].intensity.high[0] for more in ({}, maisi, {})
    ]
    assert (
        highs[1] == pytest.approx(high)
        and highs[0] == highs[2] == pytest.approx(np.percentile(array[array > 0], 99.5)) != highs[1]
    )
    for bad in ((99.5, 0.5), (0.0, 101.0)):
        with pytest.raises(ValueError, match="data.percentiles is .* from 0 to 100"):
            DataConfig(percentiles=bad)


@pytest.fixture
def folder_of_one_mr(tmp_path):
    rng = np.random.default_rng(0)
    array = np.where(rng.random((6, 8, 10)) < 0.4, 0, rng.gamma(2, 100, (6, 8, 10))).astype(np.float32)
    (tmp_path / "mr").mkdir()
    nib.save(nib.Nifti1Image(array.transpose(2, 1, 0), np.eye(4)), tmp_path / "mr" / "a.nii.gz")
    return tmp_path / "mr", array


def test_mr_percentiles_of_the_foreground():
    rng = np.random.default_rng(0)
    array = np.where(rng.random((2, 10, 20, 30)) < 0.4, 0, rng.gamma(2, 100, (2, 10, 20, 30))).astype(
        np.float32
    )
    array[1] *= 7
    out, intensity = normalise(array, "mr")
    for channel, result in zip(array, out):
        low, high = np.percentile(channel[channel > 0], (0.5, 99.5))
        expected = np.maximum(2 * (channel - low) / (high - low) - 1, -1)
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert out.max() > 1.0 and out.min() == -1, "clipped below only"
    back = denormalise(out, intensity)
    inside = out > -1
    np.testing.assert_allclose(back[inside], array[inside], rtol=1e-4)
    mask = (array > 0).astype(np.float32)                      # two values only: the percentiles coincide
    assert set(np.unique(normalise(mask, "mr")[0])) == {-1, 1}


def test_voxel_grids_keep_zero_at_zero():
    array = np.zeros((3, 4, 5, 6), np.float32)
    array[0, 1, 1, 1], array[1, 2, 2, 2], array[1, 0, 0, 0] = 4, -20, 10
    out, intensity = normalise(array, "radar")
    assert intensity.background == 0 and ((out == 0) == (array == 0)).all()
    assert out[0, 1, 1, 1] == 1 and out[1, 2, 2, 2] == -1 and out[1, 0, 0, 0] == 0.5
    np.testing.assert_allclose(denormalise(out, intensity), array, rtol=1e-6)
    assert normalise(array, "voxel", voxel_scale=(8, 10, 1))[0][1, 2, 2, 2] == -2
    assert not normalise(array * 0, "voxel")[0].any(), "an empty frame is a frame"
    with pytest.raises(DataError):
        normalise(array, "voxel", voxel_scale=(1, 2))


def test_constant_and_unscalable_volumes_are_refused():
    for modality in ("auto", "ct", "mr"):
        with pytest.raises(DataError, match="every voxel is 0"):
            normalise(np.zeros((1, 3, 3, 3), np.float32), modality)
    array = np.full((1, 3, 3, 3), -3.4e38, np.float32)
    array[0, 0] = 3.4e38
    with pytest.raises(DataError, match="float32"):
        normalise(array, "voxel", voxel_scale=(1e-3,))


@needs_real
def test_modality_is_guessed_from_the_values():
    expected = {
        "ct/*.nii.gz": "ct",
        "mr/*.nii.gz": "mr",
        "radar/*voxel_[ds]*": "voxel",
        "seg/*ct_image*": "ct",
        "seg/brain*": "mr",
        "seg/ct_body_image*": "ct",
        "seg/*pet_image*": "mr",
        "seg/cord_t2_image*": "mr",
        "odd/gantry*": "ct",
        "odd/orient*": "mr",
        "odd/singleton_depth*": "mr",
        "odd/*zstat*": "mr",
    }
    for pattern, modality in expected.items():
        files = sorted(REAL.glob(pattern))
        assert files, pattern
        for path in files:
            assert guess_modality(read_volume(path).array) == modality, path.name
