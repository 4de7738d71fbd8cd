"""volumes/grids.py: resampled volumes and labels lie where they lay."""
import nibabel as nib
import numpy as np

from data import open_data, read_volume
from volume_files import config, quiet
from volumes.grids import resample, resample_label


def test_resampling_keeps_places_and_means(tmp_path):
    """A ramp over mm stays the same ramp over mm: grid and affine agree. Linear data makes linear
    interpolation exact inside.
    """
    affine = nib.affines.from_matvec(np.diag([1.0, 1.5, 2.0]), (10, -20, 30))
    x, y, z = np.meshgrid(np.arange(16), np.arange(20), np.arange(12), indexing="ij")
    mm = np.stack([x, y, z, np.ones_like(x)], -1) @ affine.T
    array = (mm[..., 0] + 2 * mm[..., 1] - 3 * mm[..., 2]).astype(np.float32).transpose(2, 1, 0)[None]
    for size in ((24, 40, 32), (6, 10, 8), (12, 30, 8), (5, 20, 16), (12, 7, 11)):
        out, grid = resample(array, affine, size)
        assert out.shape == (1, *size)
        z, y, x = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
        mm = np.stack([x, y, z, np.ones_like(x)], -1) @ grid.T
        inside = tuple(slice(max(2, n // 5), -max(2, n // 5)) for n in size)
        difference = np.abs(out[0] - (mm[..., 0] + 2 * mm[..., 1] - 3 * mm[..., 2]))[inside].max()
        whole = all(new >= old or old % new == 0 for old, new in zip((12, 20, 16), size))
        # A widened kernel cut at odd places: 1 % of a step of the new grid.
        limit = 1e-3 if whole else 0.01 * 2 * 1.5 * 20 / size[1]
        assert difference < limit, f"{size}: maximum difference {difference}"
        corners = [affine @ (-0.5, -0.5, -0.5, 1), affine @ (15.5, 19.5, 11.5, 1)]
        new = [grid @ (-0.5, -0.5, -0.5, 1), grid @ (size[2] - 0.5, size[1] - 0.5, size[0] - 0.5, 1)]
        np.testing.assert_allclose(new, corners, atol=1e-9)
    noise = np.random.default_rng(0).standard_normal((1, 32, 32, 32), dtype=np.float32)
    for size, limit in (((8, 8, 8), 0.1), ((8, 32, 32), 0.5), ((32, 8, 8), 0.25)):
        spread = resample(noise, np.eye(4), size)[0].std()  # without the wider kernel: 0.35, 0.71 and 0.5
        assert spread < limit, f"{size}: noise of 1 comes out as {spread}, so it is aliased"


def test_spacing_and_resize_reach_the_cache(folder, tmp_path):
    fixed = open_data(config(folder, tmp_path, spacing="1,1.5,2"), 0, quiet)
    for entry in fixed.train + fixed.val:
        array, spacing, _ = read_volume(entry.path)
        assert entry.shape[1:] == tuple(
            max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], spacing, (1, 1.5, 2))
        )
        np.testing.assert_allclose(entry.spacing, (1, 1.5, 2), rtol=0.1)
        np.testing.assert_allclose(
            np.multiply(entry.shape[1:], entry.spacing), np.multiply(array.shape[1:], spacing), rtol=1e-6
        )
        np.testing.assert_allclose(nib.affines.voxel_sizes(entry.affine)[::-1], entry.spacing, rtol=1e-6)
    resized = open_data(config(folder, tmp_path, resize=(8, 9, 10)), 0, quiet)
    assert {entry.read().shape for entry in resized.train + resized.val} == {(1, 8, 9, 10)}


def test_resampled_labels_against_a_slow_loop():
    rng = np.random.default_rng(0)
    for old, new in ((7, 3), (3, 7), (10, 5), (5, 5), (4, 9), (1, 4)):
        label = rng.integers(0, 9, (old, 3, 2)).astype(np.int16)
        expected = np.stack([label[min(old - 1, int((i + 0.5) * old / new))] for i in range(new)])
        assert np.array_equal(resample_label(label, (new, 3, 2)), expected)
