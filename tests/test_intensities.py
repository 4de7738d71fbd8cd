"""volumes/intensities.py: windows, percentiles, voxel grids, and what is guessed."""
import nibabel as nib
import numpy as np
import pytest

from data import open_data, read_volume
from volume_files import REAL, ct_like, needs_real, one_line, said_and_data, save
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.intensities import denormalise, guess_modality, normalise, notes_of


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


def z_scores(shape=(20, 24, 28)):
    """A block of z-scores in a background of 0, float32 (1, D, H, W)."""
    array = np.zeros((1, *shape), np.float32)
    array[0, 3:17, 4:20, 4:24] = np.random.default_rng(0).normal(size=(14, 16, 20))
    return array


def test_values_below_the_background_are_kept():
    """Z-scores, phase and maps of t values are no MR: 0 stays 0 and nothing is clipped."""
    rng = np.random.default_rng(1)
    field = rng.normal(0, 40, (1, 20, 24, 28)).astype(np.float32)
    phase = rng.integers(-4096, 4095, (1, 9, 20, 20)).astype(np.float32)
    for array in (z_scores(), field, phase):
        assert guess_modality(array) == "signed"
        out, intensity = normalise(array)
        scale = np.percentile(np.abs(array[array != 0]), 99.5)
        np.testing.assert_allclose(out, array / scale, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(denormalise(out, intensity), array, rtol=1e-5, atol=1e-5)
        assert intensity.background == 0 and not notes_of(array, intensity)
    assert normalise(field, "signed", percentiles=(0, 100))[1].high[0] == pytest.approx(np.abs(field).max())


def test_a_background_at_the_least_value_stays_the_background():
    """Z-scores of a whole volume and arrays in [-1, 1] have their background at the least value."""
    rng = np.random.default_rng(0)
    brain = np.where(rng.random((1, 20, 24, 28)) < 0.5, 0, rng.gamma(4, 100, (1, 20, 24, 28)))
    for array in ((brain - brain.mean()) / brain.std(), brain / brain.max() * 2 - 1):
        array = array.astype(np.float32)
        assert guess_modality(array) == "mr"
        out, intensity = normalise(array)
        inside = array > array.min()
        low = np.percentile(array[inside], 0.5)
        assert intensity.low[0] == pytest.approx(low) and intensity.background == -1 == out.min()
        assert np.mean(out[inside] == -1) < 0.01 and not notes_of(array, intensity)


def test_ringing_below_zero_is_no_signed_data():
    array = np.random.default_rng(0).gamma(4, 100, (1, 20, 24, 28)).astype(np.float32)
    array[0, :10] = np.random.default_rng(1).normal(0, 3, (10, 24, 28))
    assert guess_modality(array) == "mr"
    (note,) = notes_of(array, normalise(array)[1])
    one_line(ValueError(note.text), "25% of the voxels", "are clipped", "data.modality=signed")


def test_ct_with_several_paddings_is_ct():
    """Two scanners' paddings, stitched; and distinct values below air, which are none."""
    array = ct_like((20, 24, 28)).astype(np.float32)
    array[:3], array[-3:], array[:, :2] = -2000, -3024, -1500
    assert guess_modality(array) == "ct"
    array[:3] = np.random.default_rng(0).integers(-4000, -1300, (3, 24, 28))
    assert guess_modality(array) != "ct"


def test_ct_without_air_loses_nothing_in_silence():
    """A crop inside of the body is not known as CT by its values; named, what is clipped is told."""
    soft = np.random.default_rng(0).normal(40, 60, (1, 20, 24, 28)).round().astype(np.float32)
    out, intensity = normalise(soft)
    lost = np.mean(np.abs(denormalise(out, intensity) - soft) > 0.1)
    assert lost < 0.01 and not notes_of(soft, intensity)
    windowed = soft.clip(-20, 100)                              # saved in a window: air is the least value
    out, intensity = normalise(windowed)
    assert np.mean(np.abs(denormalise(out, intensity) - windowed)[windowed > -20] > 0.1) < 0.01
    (note,) = notes_of(soft, normalise(soft, "ct", (-20, 100))[1])
    one_line(ValueError(note.text), "31% of the voxels", "-20 to 100 HU", "data.hu_range")
    assert not notes_of(soft, normalise(soft, "ct")[1])


def test_an_outlier_is_told_and_the_lines_are_one_for_all_files(tmp_path):
    array = np.random.default_rng(0).gamma(4, 100, (20, 24, 28)).astype(np.float32)
    array[4, 5, 6] = 1e9
    for name in "abc":
        save(tmp_path / "in" / f"{name}.nii.gz", array)
    for _ in ("built", "from the cache"):
        said, _ = said_and_data(tmp_path / "in", tmp_path, modality="auto", labels=False)
        (line,) = [line for line in said if "largest value" in line]
        one_line(ValueError(line), "a.nii.gz", "1e+09 at (6, 5, 4)", "repair the file", "2 more files")
    grid = np.zeros((1, 20, 24, 28), np.float32)
    grid[0, 3:6] = 2
    assert not notes_of(grid, normalise(grid, "voxel")[1])
    grid[0, 3, 3, 3] = -1e9
    assert [note.kind for note in notes_of(grid, normalise(grid, "voxel")[1])] == ["outlier"]
    assert not notes_of(grid, normalise(grid, "ct")[1]), "a CT is clipped"


@pytest.mark.parametrize("modality", ["ct", "auto"])
def test_nan_of_a_ct_is_air(modality, tmp_path):
    """Under data.nan=zero: 0 HU would be water. Where most of it is NaN too."""
    array = ct_like((20, 24, 28)).astype(np.float32)
    array[:19] = np.nan
    array[19, 0, 0] = np.inf
    save(tmp_path / "in" / "a.nii.gz", array)
    _, opened = said_and_data(tmp_path / "in", tmp_path, modality=modality, labels=False, nan="zero")
    out = opened.train[0].read()[0]
    assert opened.train[0].intensity.modality == "ct"
    assert (out[:, :, :19] == -1).all() and out[0, 0, 19] == -1 and (out[:, :, 19] > -1).mean() > 0.9


def test_nan_of_other_data_is_their_background(tmp_path):
    mr = np.random.default_rng(0).gamma(4, 100, (20, 24, 28)).astype(np.float32)
    for name, array, expected in (("mr", mr, -1), ("floor", np.maximum(mr - 300, -100), -1),
                                  ("signed", mr - 400, 0)):
        array[3:5] = np.nan
        path = save(tmp_path / f"{name}.nii.gz", array)
        _, opened = said_and_data(path, tmp_path, modality="auto", labels=False, nan="zero")
        assert (opened.train[0].read()[0][:, :, 3:5] == expected).all(), name


def test_voxel_grids_with_a_scale_each_are_told(tmp_path):
    grid = np.zeros((20, 24, 28), np.float32)
    grid[3:6, 3, :] = 1
    for name, factor in (("a", 2), ("b", 10), ("c", 4)):
        save(tmp_path / "in" / f"{name}.nii.gz", grid * factor)
    said, _ = said_and_data(tmp_path / "in", tmp_path, labels=False)
    (line,) = [line for line in said if "its own scale" in line]
    one_line(ValueError(line), "each of 3 voxel grids", "from 2 to 10", "data.voxel_scale 10 is one")
    said, opened = said_and_data(tmp_path / "in", tmp_path, labels=False, voxel_scale=(10.0,))
    assert not [line for line in said if "scale" in line] and opened.train[0].intensity.high == (10,)


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
        "odd/singleton_depth*": "signed",
        "odd/*zstat*": "signed",
    }
    for pattern, modality in expected.items():
        files = sorted(REAL.glob(pattern))
        assert files, pattern
        for path in files:
            assert guess_modality(read_volume(path).array) == modality, path.name
