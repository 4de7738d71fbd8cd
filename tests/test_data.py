"""data.py: every file read right or refused in one line, crops that are functions of (seed, index), a cache that can be trusted."""
import dataclasses
import gzip
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import data
from data import Crops, DataConfig, DataError, Item, open_data, read_volume

ROOT = Path(__file__).resolve().parent.parent
REAL = Path(os.environ.get("VAE3D_TEST_DATA", ROOT.parent / "shared" / "data"))
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real test data at {REAL}")


def quiet(_: str) -> None:
    pass


def ct_like(shape: tuple[int, int, int], seed: int = 0) -> np.ndarray:
    """Whole HU (X, Y, Z): air around, tissue inside, every voxel different enough to tell places apart."""
    rng = np.random.default_rng(seed)
    array = rng.integers(-1000, 900, shape).astype(np.int16)
    array[:2] = -1000
    return array


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


@pytest.fixture
def folder(tmp_path):
    """Five CT-like volumes of different sizes, the smallest of which is below the patch."""
    for number, shape in enumerate(((20, 24, 12), (22, 20, 16), (6, 30, 14), (24, 24, 24), (18, 19, 13))):
        save(tmp_path / "in" / f"case{number}.nii.gz", ct_like(shape, number), np.diag([1.0, 1.5, 2.0, 1]))
    return tmp_path / "in"


@pytest.fixture
def opened(folder, tmp_path):
    return open_data(config(folder, tmp_path), 3, quiet)


def config(path: Path | str | None, tmp_path: Path, **fields) -> DataConfig:
    return DataConfig(**{"path": path and str(path), "cache_dir": str(tmp_path / "cache"), "patch": (8, 10, 12), **fields})


def one_line(error: pytest.ExceptionInfo | BaseException, *words: str) -> str:
    text = str(getattr(error, "value", error))
    assert "\n" not in text and len(text) < 500, text
    for word in words:
        assert word in text, f"{word!r} is missing in: {text}"
    return text


# ------------------------------------------------------------------------------------------------------ axes, affines, reading
def world_values(path: Path) -> dict[tuple[float, ...], float]:
    """Slow, obvious reference: {place in mm: stored value}, voxel by voxel."""
    image = nib.load(path)
    values, affine = np.asarray(image.dataobj), image.affine
    return {tuple(np.round(affine @ (*index, 1), 3)[:3]): float(values[index]) for index in np.ndindex(values.shape)}


@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIL", "SPR", "PIR", "IRP"])
@pytest.mark.parametrize("oblique", [False, True])
def test_every_voxel_stays_at_its_place_in_the_world(codes, oblique, tmp_path):
    rng = np.random.default_rng(1)
    turn = nib.orientations.axcodes2ornt(codes)
    affine = nib.orientations.inv_ornt_aff(turn, (3, 4, 5)) @ np.diag([1.0, 2.0, 3.5, 1])
    if oblique:
        tilt = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0.15, -0.1), (5, -3, 8))
        affine = tilt @ affine
    path = save(tmp_path / "a.nii.gz", rng.standard_normal((3, 4, 5)).astype(np.float32), affine)
    volume = read_volume(path)
    assert nib.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.array.dtype == np.float32 and volume.array.flags.c_contiguous
    found = {tuple(np.round(volume.affine @ (x, y, z, 1), 3)[:3]): float(volume.array[0, z, y, x])
             for z, y, x in np.ndindex(volume.array.shape[1:])}
    expected = world_values(path)
    assert found == expected, f"{len(set(found.items()) ^ set(expected.items()))} voxels differ"
    lengths = [np.linalg.norm(volume.affine[:3, axis]) for axis in (2, 1, 0)]
    np.testing.assert_allclose(volume.spacing, lengths, rtol=1e-6)


@needs_real
def test_eight_axis_orders_of_one_head_are_one_array():
    volumes = [read_volume(path) for path in sorted((REAL / "odd").glob("orient_*.nii.gz"))]
    assert len(volumes) == 8
    for volume in volumes[1:]:
        assert np.array_equal(volume.array, volumes[0].array), f"maximum difference {abs(volume.array - volumes[0].array).max()}"
        np.testing.assert_allclose(volume.affine, volumes[0].affine, atol=1e-3)
        np.testing.assert_allclose(volume.spacing, volumes[0].spacing, rtol=1e-5)


SHAPES = {  # (C, D, H, W) by the README of the data: shape turned to Z, Y, X
    "big_endian_float.nii": (1, 22, 26, 21), "big_endian_int16.nii": (1, 25, 41, 33), "big_endian_zstat.nii.gz": (1, 21, 64, 64),
    "ct_angio_clipped_uint8.nii.gz": (1, 154, 242, 256), "dwi_65vol_tiny.nii": (65, 10, 10, 10), "epi_4d_oblique.nii.gz": (2, 24, 96, 128),
    "float64_2d.nii": (1, 1, 8, 8), "float64_oblique.nii.gz": (1, 24, 58, 58), "freesurfer.mgz": (2, 3, 4, 5),
    "functional_4d_scl.nii": (20, 3, 21, 17), "gantry_shear_affine.nii.gz": (1, 54, 422, 306),
    "int8_4d_big_endian.nii.gz": (10, 91, 109, 91), "label_4d.nii.gz": (3, 60, 96, 96),
    "little_endian_zstat.nii.gz": (1, 21, 64, 64), "nifti2.nii.gz": (2, 12, 20, 32),
    "pair_big_endian.hdr": (1, 10, 64, 64), "pair_big_endian.img": (1, 10, 64, 64), "single_slice.nii.gz": (1, 192, 192, 1),
    "singleton_depth_4d.nii.gz": (3, 1, 256, 256), "tiny_7x5x3.nii.gz": (1, 3, 5, 7), "tiny_anisotropic.nii.gz": (1, 7, 5, 4),
    "trailing_dim_zero_pixdim.nii.gz": (1, 151, 191, 161), **{f"orient_{codes}.nii.gz": (1, 67, 79, 64) for codes in
                                                              ("RAS", "AIL", "ASL", "SPR", "LPS", "PIR", "RSA", "IRP")},
    **{f"tiny27_{kind}.nii": (1, 3, 3, 3) for kind in ("float64", "int16", "int64", "int8", "uint32", "uint8")}}
REFUSED = {"rgb24_tiny.nii": "RGB", "rgb24_volume.nii.gz": "RGB", "complex64_2d.nii": "complex", "cifti_dconn.nii": "no spatial image",
           "vector_field_5d.nii.gz": "5-dimensional", "nan_slices.nii": "153 NaN voxels, first at (0, 0, 0)",
           "inf_and_nan.nii.gz": "633 infinite voxels", "invalid/not_nifti.nii": "cannot be read", "invalid/bad_datatype.nii": "-9510"}


@needs_real
def test_every_odd_file_is_read_right_or_refused_in_one_line(capfd):
    files = [path for path in sorted((REAL / "odd").rglob("*")) if path.is_file()]
    names = {str(path.relative_to(REAL / "odd")) for path in files}
    assert names == set(SHAPES) | set(REFUSED)
    for name in sorted(names):
        path = REAL / "odd" / name
        if name in REFUSED:
            with pytest.raises(DataError) as error:
                read_volume(path)
            one_line(error, str(path), REFUSED[name])
            continue
        volume = read_volume(path)
        assert volume.array.shape == SHAPES[name], name
        assert np.isfinite(volume.array).all() and all(mm > 0 for mm in volume.spacing)
        image = nib.load(path)
        if len(image.shape) > 2:  # nibabel's own reorientation, an independent path to the same grid
            canonical = nib.as_closest_canonical(image)
            expected = np.asarray(canonical.dataobj).reshape(*canonical.shape[:3], -1).transpose(3, 2, 1, 0)
            np.testing.assert_array_equal(volume.array, expected.astype(np.float32), err_msg=name)
            np.testing.assert_allclose(volume.affine, canonical.affine, atol=1e-4, err_msg=name)
    assert capfd.readouterr() == ("", ""), "nibabel's own messages reach the terminal"


@needs_real
def test_nan_zero_reads_what_nan_error_refuses():
    for name, count in (("nan_slices.nii", 153), ("inf_and_nan.nii.gz", 633)):
        volume = read_volume(REAL / "odd" / name, nan="zero")
        stored = np.asarray(nib.load(REAL / "odd" / name).dataobj)
        assert np.isfinite(volume.array).all()
        assert (volume.array == 0).sum() == count + (stored == 0).sum()


def test_nan_message_names_counts_and_first_voxel(tmp_path):
    array = np.ones((4, 5, 6), np.float32)
    array[2, 3, 4] = np.nan                                    # x, y, z
    array[3, 3, 4] = np.inf
    path = save(tmp_path / "sub-07.nii.gz", array)
    with pytest.raises(DataError) as error:
        read_volume(path)
    one_line(error, str(path), "1 NaN and 1 infinite voxels, first at (4, 3, 2)", "data.nan=zero")
    assert read_volume(path, nan="zero").array[0, 4, 3, 2] == 0


def test_slices_and_planes_keep_their_axis(tmp_path):
    for shape, expected in (((5, 6, 1), (1, 1, 6, 5)), ((1, 5, 6), (1, 6, 5, 1)), ((5, 6), (1, 1, 6, 5)), ((5, 6, 7, 1), (1, 7, 6, 5))):
        assert read_volume(save(tmp_path / "a.nii", np.zeros(shape, np.int16))).array.shape == expected
    for shape, word in (((9,), "one-dimensional"), ((3, 3, 3, 2, 2), "5-dimensional")):
        with pytest.raises(DataError) as error:
            read_volume(save(tmp_path / "b.nii", np.zeros(shape, np.int16)))
        one_line(error, "b.nii", word)


def test_one_volume_of_a_series(tmp_path):
    series = np.arange(2 * 3 * 4 * 5, dtype=np.int16).reshape(2, 3, 4, 5)
    path = save(tmp_path / "a.nii.gz", series, np.diag([-1.0, 1, 1, 1]))
    whole = read_volume(path)
    assert whole.array.shape == (5, 4, 3, 2)
    for number in range(5):
        assert np.array_equal(read_volume(path, volume=number).array, whole.array[number:number + 1])
    with pytest.raises(DataError) as error:
        read_volume(path, volume=5)
    one_line(error, "a.nii.gz", "5 volumes")


# -------------------------------------------------------------------------------------------------------------- .npy and .npz
def test_arrays_dense_and_sparse_hold_the_same_grid(tmp_path):
    rng = np.random.default_rng(0)
    dense = np.zeros((7, 6, 5, 4), np.float32)                 # x, y, z, channel
    coords = np.unique(rng.integers(0, (7, 6, 5), (20, 3)), axis=0)
    features = rng.standard_normal((len(coords), 4)).astype(np.float32)
    dense[tuple(coords.T)] = features
    np.save(tmp_path / "last.npy", dense)
    np.save(tmp_path / "first.npy", np.asfortranarray(np.moveaxis(dense, -1, 0)))
    np.savez_compressed(tmp_path / "voxel.npz", voxel=dense, other=np.zeros(3))
    np.savez(tmp_path / "only.npz", anything=dense)
    np.savez(tmp_path / "sparse.npz", shape=np.array([7, 6, 5, 4]), coords=coords.astype(np.int32), features=features)
    np.savez(tmp_path / "vol.npz", vol=dense[..., 0].astype(np.float64), seg=np.ones((7, 6, 5)))
    expected = dense.transpose(3, 2, 1, 0)                     # C, D, H, W = channel, z, y, x
    for name in ("last.npy", "first.npy", "voxel.npz", "only.npz", "sparse.npz"):
        volume = read_volume(tmp_path / name)
        assert volume.array.dtype == np.float32 and np.array_equal(volume.array, expected), name
        assert volume.spacing == (1, 1, 1) and np.array_equal(volume.affine, np.eye(4))
    assert np.array_equal(read_volume(tmp_path / "vol.npz").array, expected[:1])
    assert read_volume(tmp_path / "last.npy", channel_axis=1).array.shape == (6, 4, 5, 7)


def test_arrays_that_are_no_volumes_are_refused_in_a_line(tmp_path):
    def npy(name: str, array: np.ndarray) -> None:
        np.save(tmp_path / name, array, allow_pickle=True)

    npy("table.npy", np.zeros((100, 8), np.float32))
    npy("complex.npy", np.zeros((3, 3, 3), np.complex64))
    npy("series.npy", np.zeros((60, 10, 32, 32), np.uint8))
    npy("objects.npy", np.array([{}], dtype=object))
    npy("five.npy", np.zeros((2, 2, 2, 2, 2), np.float32))
    npy("text.npy", np.full((2, 2, 2), "a"))
    npy("nothing.npy", np.zeros((0, 3, 3), np.float32))
    np.savez(tmp_path / "two.npz", a=np.zeros((3, 3, 3)), b=np.zeros((3, 3, 3)))
    grid = {"shape": np.array([4, 4, 4]), "coords": np.array([[0, 0, 4]]), "features": np.ones((1, 2))}
    np.savez(tmp_path / "outside.npz", **grid)
    np.savez(tmp_path / "uneven.npz", **{**grid, "features": np.ones((2, 2))})
    np.savez(tmp_path / "channels.npz", **{**grid, "shape": np.array([4, 4, 5, 3])})
    np.savez(tmp_path / "huge.npz", **{**grid, "shape": np.array([2**40, 2**40, 2**40])})
    (tmp_path / "points.bin").write_bytes(bytes(64))
    words = {"table.npy": "a table", "complex.npy": "complex", "series.npy": "data.channel_axis", "objects.npy": "objects",
             "five.npy": "5-dimensional", "text.npy": "type <U1", "nothing.npy": "no voxels", "two.npz": "a, b", "outside.npz": "outside",
             "uneven.npz": "features (2, 2)", "channels.npz": "3 channels", "huge.npz": "data.max_gib", "points.bin": ".bin"}
    for name, word in words.items():
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name, word)


# ------------------------------------------------------------------------------------------------------------------ intensities
def test_ct_windows():
    hu = np.array([-3024, -1350, -1000, -600, -5, 0, 75, 150, 1000, 3000], np.float32).reshape(1, 1, 1, -1)
    for window, (width, level) in {"lung": (1500, -600), "bone": (1500, 300), "soft_tissue": (400, 50), "brain": (80, 35)}.items():
        cfg = DataConfig(window=window)
        out, _ = data.normalise(hu, "ct", cfg.hu_limits())
        np.testing.assert_allclose(out, ((hu - level) / (width / 2)).clip(-1, 1), atol=1e-6)
    out, intensity = data.normalise(hu, "ct", DataConfig().hu_limits())
    np.testing.assert_allclose(out, hu.clip(-1000, 1000) / 1000, atol=1e-7)
    np.testing.assert_allclose(data.denormalise(out, intensity), hu.clip(-1000, 1000), atol=1e-3)
    assert intensity.background == -1
    assert DataConfig(hu_range=(-100, 300)).hu_limits() == (-100, 300)


def test_mr_percentiles_are_chosen(folder_of_one_mr, tmp_path):
    """As MAISI's scripts: least value and 99.5 percentile of all voxels to both ends, nothing clipped; the cache tells the two apart."""
    path, array = folder_of_one_mr
    low, high = array.min(), np.percentile(array, 99.5)
    maisi = dict(percentiles=(0.0, 99.5), percentiles_of="all")
    out, intensity = data.normalise(array[None], "mr", **maisi)
    np.testing.assert_allclose((out[0] + 1) / 2, (array - low) / (high - low), atol=1e-6)
    np.testing.assert_allclose(data.denormalise(out, intensity)[0], array, rtol=1e-5, atol=1e-3)
    cfg = dict(path=str(path), modality="mr", val_fraction=0.0, patch=(4, 4, 4), cache_dir=str(tmp_path / "cache"))
    highs = [data.open_data(DataConfig(**cfg, **more), 0, print).train[0].intensity.high[0] for more in ({}, maisi, {})]
    assert highs[1] == pytest.approx(high) and highs[0] == highs[2] == pytest.approx(np.percentile(array[array > 0], 99.5)) != highs[1]
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
    array = np.where(rng.random((2, 10, 20, 30)) < 0.4, 0, rng.gamma(2, 100, (2, 10, 20, 30))).astype(np.float32)
    array[1] *= 7
    out, intensity = data.normalise(array, "mr")
    for channel, result in zip(array, out):
        low, high = np.percentile(channel[channel > 0], (0.5, 99.5))
        expected = np.maximum(2 * (channel - low) / (high - low) - 1, -1)
        np.testing.assert_allclose(result, expected, atol=1e-5)
    assert out.max() > 1.0 and out.min() == -1, "clipped below only"
    back = data.denormalise(out, intensity)
    inside = out > -1
    np.testing.assert_allclose(back[inside], array[inside], rtol=1e-4)
    mask = (array > 0).astype(np.float32)                      # two values only: the percentiles coincide
    assert set(np.unique(data.normalise(mask, "mr")[0])) == {-1, 1}


def test_voxel_grids_keep_zero_at_zero():
    array = np.zeros((3, 4, 5, 6), np.float32)
    array[0, 1, 1, 1], array[1, 2, 2, 2], array[1, 0, 0, 0] = 4, -20, 10
    out, intensity = data.normalise(array, "radar")
    assert intensity.background == 0 and ((out == 0) == (array == 0)).all()
    assert out[0, 1, 1, 1] == 1 and out[1, 2, 2, 2] == -1 and out[1, 0, 0, 0] == 0.5
    np.testing.assert_allclose(data.denormalise(out, intensity), array, rtol=1e-6)
    assert data.normalise(array, "voxel", voxel_scale=(8, 10, 1))[0][1, 2, 2, 2] == -2
    assert not data.normalise(array * 0, "voxel")[0].any(), "an empty frame is a frame"
    with pytest.raises(DataError):
        data.normalise(array, "voxel", voxel_scale=(1, 2))


def test_constant_and_unscalable_volumes_are_refused():
    for modality in ("auto", "ct", "mr"):
        with pytest.raises(DataError, match="every voxel is 0"):
            data.normalise(np.zeros((1, 3, 3, 3), np.float32), modality)
    array = np.full((1, 3, 3, 3), -3.4e38, np.float32)
    array[0, 0] = 3.4e38
    with pytest.raises(DataError, match="float32"):
        data.normalise(array, "voxel", voxel_scale=(1e-3,))


@needs_real
def test_modality_is_guessed_from_the_values():
    expected = {"ct/*.nii.gz": "ct", "mr/*.nii.gz": "mr", "radar/*voxel_[ds]*": "voxel", "seg/*ct_image*": "ct", "seg/brain*": "mr",
                "seg/ct_body_image*": "ct", "seg/*pet_image*": "mr", "seg/cord_t2_image*": "mr", "odd/gantry*": "ct", "odd/orient*": "mr",
                "odd/singleton_depth*": "mr", "odd/*zstat*": "mr"}
    for pattern, modality in expected.items():
        files = sorted(REAL.glob(pattern))
        assert files, pattern
        for path in files:
            assert data.guess_modality(read_volume(path).array) == modality, path.name


# --------------------------------------------------------------------------------------------------------------------- grids
def test_resampling_keeps_places_and_means(tmp_path):
    """A ramp over mm stays the same ramp over mm: grid and affine agree. Linear data makes linear interpolation exact inside."""
    affine = nib.affines.from_matvec(np.diag([1.0, 1.5, 2.0]), (10, -20, 30))
    x, y, z = np.meshgrid(np.arange(16), np.arange(20), np.arange(12), indexing="ij")
    mm = np.stack([x, y, z, np.ones_like(x)], -1) @ affine.T
    array = (mm[..., 0] + 2 * mm[..., 1] - 3 * mm[..., 2]).astype(np.float32).transpose(2, 1, 0)[None]
    for size in ((24, 40, 32), (6, 10, 8), (12, 30, 8), (5, 20, 16), (12, 7, 11)):
        out, grid = data.resample(array, affine, size)
        assert out.shape == (1, *size)
        z, y, x = np.meshgrid(*(np.arange(n) for n in size), indexing="ij")
        mm = np.stack([x, y, z, np.ones_like(x)], -1) @ grid.T
        inside = tuple(slice(max(2, n // 5), -max(2, n // 5)) for n in size)
        difference = np.abs(out[0] - (mm[..., 0] + 2 * mm[..., 1] - 3 * mm[..., 2]))[inside].max()
        whole = all(new >= old or old % new == 0 for old, new in zip((12, 20, 16), size))
        limit = 1e-3 if whole else 0.01 * 2 * 1.5 * 20 / size[1]  # a widened kernel cut at odd places: 1 % of a step of the new grid
        assert difference < limit, f"{size}: maximum difference {difference}"
        corners = [affine @ (-0.5, -0.5, -0.5, 1), affine @ (15.5, 19.5, 11.5, 1)]
        new = [grid @ (-0.5, -0.5, -0.5, 1), grid @ (size[2] - 0.5, size[1] - 0.5, size[0] - 0.5, 1)]
        np.testing.assert_allclose(new, corners, atol=1e-9)
    noise = np.random.default_rng(0).standard_normal((1, 32, 32, 32), dtype=np.float32)
    for size, limit in (((8, 8, 8), 0.1), ((8, 32, 32), 0.5), ((32, 8, 8), 0.25)):
        spread = data.resample(noise, np.eye(4), size)[0].std()  # without the wider kernel: 0.35, 0.71 and 0.5
        assert spread < limit, f"{size}: noise of 1 comes out as {spread}, so it is aliased"


def test_spacing_and_resize_reach_the_cache(folder, tmp_path):
    fixed = open_data(config(folder, tmp_path, spacing="1,1.5,2"), 0, quiet)
    for entry in fixed.train + fixed.val:
        array, spacing, _ = read_volume(entry.path)
        assert entry.shape[1:] == tuple(max(1, round(n * old / new)) for n, old, new in zip(array.shape[1:], spacing, (1, 1.5, 2)))
        np.testing.assert_allclose(entry.spacing, (1, 1.5, 2), rtol=0.1)
        np.testing.assert_allclose(np.multiply(entry.shape[1:], entry.spacing), np.multiply(array.shape[1:], spacing), rtol=1e-6)
        np.testing.assert_allclose(nib.affines.voxel_sizes(entry.affine)[::-1], entry.spacing, rtol=1e-6)
    resized = open_data(config(folder, tmp_path, resize=(8, 9, 10)), 0, quiet)
    assert {entry.read().shape for entry in resized.train + resized.val} == {(1, 8, 9, 10)}


# ------------------------------------------------------------------------------------------------------------ files and splits
def test_folder_is_searched_once_and_safely(tmp_path):
    root = tmp_path / "root"
    for name in ("b/one.nii.gz", "b/two.NII", "a/pair.img", ".hidden/x.nii", "a/.y.nii", "a/ü space.nii"):
        save(tmp_path / "made.nii", ct_like((4, 4, 4)))
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    (root / "a/pair.hdr").write_bytes(b"")
    (root / "a/notes.txt").write_text("no volume")
    (root / "a/points.bin").write_bytes(b"")
    (root / "b/loop").symlink_to(root)
    (root / "b/again.nii.gz").symlink_to(root / "b/one.nii.gz")
    (root / "b/broken.nii").symlink_to(root / "nowhere")
    os.mkfifo(root / "b/pipe.nii")
    names = [item.path.name for item in data.list_items(root)["training"]]
    assert names == ["pair.hdr", "points.bin", "ü space.nii", "again.nii.gz", "broken.nii", "two.NII"], "each file once, sorted"
    with pytest.raises(DataError) as error:
        data.list_items(tmp_path / "absent")
    one_line(error, "absent", "no such file or folder")


def test_datalists(folder, tmp_path):
    def lists(content: object, name: str = "list.json") -> dict[str, list[Item]]:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return data.list_items(folder / name)

    found = lists({"name": "Task", "numTraining": 2, "training": [{"image": "./case0.nii.gz", "label": "./l.nii.gz"}, "case1.nii.gz"],
                   "test": ["./case2.nii.gz"]})                # Decathlon
    assert [[item.path.name for item in items] for items in found.values()] == [["case0.nii.gz", "case1.nii.gz"], [], ["case2.nii.gz"]]
    found = lists({"training": [{"image": str(folder / "case0.nii.gz"), "class": "CT"}], "validation": ["case1.nii.gz", "case2.nii.gz"]})
    assert found["training"][0].kind == "CT"
    opened = open_data(config(folder / "list.json", tmp_path), 0, quiet)
    assert [entry.name for entry in opened.train] == ["case0"] and [entry.name for entry in opened.val] == ["case1", "case2"]
    for content in ("{", "[" * 100_000, "[1]", "3", {"training": 5}, {"training": [5]}, {"training": [{"label": "x"}]}, {"validation": []},
                    {"training": [{"image": ["a", "b"]}]}, {"training": [""]}, {"training": ["a\0b"]}, {"training": [], "testing": "x"},
                    "\xff\xfe"):
        with pytest.raises(DataError) as error:
            lists(content, "bad.json")
        one_line(error, "bad.json")


def test_split_is_by_file_seeded_and_complete(tmp_path):
    for number in range(6):
        series = np.stack([ct_like((8, 8, 8), 10 * number + t) for t in range(3)], -1) if number % 2 else ct_like((8, 8, 8), number)
        save(tmp_path / "in" / f"{number}.nii.gz", series)
    splits = {}
    for seed in range(8):
        opened = open_data(config(tmp_path / "in", tmp_path, val_fraction=0.4), seed, quiet)
        train, val = ({entry.path for entry in entries} for entries in (opened.train, opened.val))
        assert not train & val and len(train | val) == 6 and len(val) == 2, "all volumes of a 4-D file on one side"
        assert len(opened.train) + len(opened.val) == 12
        names = [entry.name for entry in opened.train + opened.val]
        assert len(set(names)) == 12 and {"1_t000", "1_t002", "2"} <= set(names)
        splits[seed] = sorted(val)
        again = open_data(config(tmp_path / "in", tmp_path, val_fraction=0.4), seed, quiet)
        assert [e.name for e in again.train] == [e.name for e in opened.train]
    assert len({tuple(val) for val in splits.values()}) > 1, "the seed does not matter"
    channels = open_data(config(tmp_path / "in" / "1.nii.gz", tmp_path, four_d="channels"), 0, quiet)
    assert channels.channels == 3 and channels.train == channels.val
    picked = open_data(config(tmp_path / "in" / "1.nii.gz", tmp_path, four_d="channels", select_channel=2), 0, quiet)
    assert np.array_equal(picked.train[0].read(), channels.train[0].read()[2:])


def test_one_file_serves_for_both_and_says_so(folder, tmp_path):
    said = []
    opened = open_data(config(folder / "case0.nii.gz", tmp_path), 0, said.append)
    assert opened.train == opened.val and any("training and validation" in line for line in said)
    assert any("guessed ct" in line for line in said)


def test_names_are_unique_and_fit_for_files(tmp_path):
    for name in ("a/img.nii.gz", "b/img.nii.gz", "c/im:g é.nii"):
        save(tmp_path / "in" / name, ct_like((6, 6, 6), len(name)))
    opened = open_data(config(tmp_path / "in", tmp_path), 0, quiet)
    assert sorted(entry.name for entry in opened.train + opened.val) == ["im_g_é", "img", "img-2"]


def test_one_bad_file_among_good_ones(folder, tmp_path):
    (folder / "broken.nii.gz").write_bytes((folder / "case0.nii.gz").read_bytes()[:900])
    np.save(folder / "zz_two_channels.npy", np.random.default_rng(0).random((9, 9, 9, 2)))
    said = []
    opened = open_data(config(folder, tmp_path), 0, said.append)
    assert len(opened.train) + len(opened.val) == 5
    refused = [line for line in said if line.startswith("data: refused")]
    assert len(refused) == 2 and "broken.nii.gz" in refused[0] and "2 channels, the first accepted volume has 1" in refused[1]
    with pytest.raises(DataError) as error:
        open_data(config(folder, tmp_path, strict=True), 0, quiet)
    one_line(error, "broken.nii.gz", "strict")
    with pytest.raises(DataError) as error:
        open_data(config(folder / "broken.nii.gz", tmp_path), 0, quiet)
    one_line(error, "broken.nii.gz", "no usable")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        open_data(config(tmp_path / "empty", tmp_path), 0, quiet)
    one_line(error, "no volumes found")


def test_class_beats_modality_beats_the_guess(folder, tmp_path):
    items = [{"image": "case0.nii.gz", "class": "MRI"}, {"image": "case1.nii.gz"}, {"image": "case3.nii.gz", "class": "liver"}]
    (folder / "list.json").write_text(json.dumps({"training": items, "validation": ["case4.nii.gz"]}))
    said = []
    opened = open_data(config(folder / "list.json", tmp_path), 0, said.append)
    assert [entry.intensity.modality for entry in opened.train] == ["mr", "ct", "ct"]
    assert any("'liver' names no intensity rule" in line for line in said)
    opened = open_data(config(folder / "list.json", tmp_path, modality="voxel"), 0, quiet)
    assert [entry.intensity.modality for entry in opened.train] == ["mr", "voxel", "voxel"]
    assert open_data(config(folder / "case1.nii.gz", tmp_path, modality="radar"), 0, quiet).background == 0


@needs_real
def test_radar_folder_trains_on_its_grids(tmp_path):
    said = []
    names = ("fmcw_cube_complex.npz", "radhar_boxing_points.npy", "radhar_boxing_voxel_4d.npz", "tj4d_070070.bin",
             "tj4d_070070_voxel_dense.npz", "tj4d_070070_voxel_small.npy")
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(REAL / "radar" / name, tmp_path / "in" / name)
    opened = open_data(config(tmp_path / "in", tmp_path), 0, said.append)
    assert opened.channels == 4 and opened.background == 0
    assert {entry.name for entry in opened.train + opened.val} == {"tj4d_070070_voxel_dense", "tj4d_070070_voxel_small"}
    assert sum(line.startswith("data: refused") for line in said) == 4


# --------------------------------------------------------------------------------------------------------------------- cache
def test_crop_equals_the_slice_of_the_normalised_volume(opened):
    for entry in opened.train + opened.val:
        source = read_volume(entry.path).array
        whole = entry.read()
        np.testing.assert_allclose(whole, source.clip(-1000, 1000) / 1000, atol=1e-6)
        assert whole.dtype == np.float32 and whole.flags.writeable
        region = (slice(1, 5), slice(2, 6), slice(0, 3))
        assert np.array_equal(entry.read(region), whole[:, 1:5, 2:6, 0:3])
        np.testing.assert_allclose(data.denormalise(whole, entry.intensity), source, atol=1e-3)


def test_second_start_decodes_nothing(folder, tmp_path, monkeypatch):
    first = open_data(config(folder, tmp_path), 0, quiet)
    monkeypatch.setattr(data, "_read", lambda *_: pytest.fail("decoded again"))
    second = open_data(config(folder, tmp_path), 0, quiet)
    for a, b in zip(first.train + first.val, second.train + second.val):
        assert (a.name, a.store, a.intensity, a.shape, a.spacing) == (b.name, b.store, b.intensity, b.shape, b.spacing)
        assert np.array_equal(a.affine, b.affine)


def test_changed_file_or_setting_makes_a_new_cache(folder, tmp_path):
    cfg = config(folder / "case0.nii.gz", tmp_path)
    before = open_data(cfg, 0, quiet).train[0]
    changed = ct_like((20, 24, 12), 77)
    save(folder / "case0.nii.gz", changed, np.diag([1.0, 1.5, 2.0, 1]))
    after = open_data(cfg, 0, quiet).train[0]
    assert after.store != before.store
    np.testing.assert_allclose(after.read()[0], changed.transpose(2, 1, 0).clip(-1000, 1000) / 1000, atol=1e-6)
    stat = os.stat(folder / "case0.nii.gz")
    os.utime(folder / "case0.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    stores = {after.store, open_data(cfg, 0, quiet).train[0].store}
    for fields in ({"window": "lung"}, {"hu_range": (-500.0, 500.0)}, {"modality": "mr"}, {"spacing": "2,2,2"}, {"resize": (8, 8, 8)},
                   {"nan": "zero"}, {"select_channel": 0}):
        stores.add(open_data(config(folder / "case0.nii.gz", tmp_path, **fields), 0, quiet).train[0].store)
    assert len(stores) == 9


def test_header_and_voxels_of_a_pair_both_count(tmp_path):
    nib.save(nib.Nifti1Pair(ct_like((6, 6, 6)), np.eye(4)), tmp_path / "in.img")
    cfg = config(tmp_path / "in.hdr", tmp_path)
    before = open_data(cfg, 0, quiet).train[0]
    os.utime(tmp_path / "in.img", ns=(1, 1))
    assert open_data(cfg, 0, quiet).train[0].store != before.store


def test_damaged_cache_is_rebuilt(folder, tmp_path):
    cfg = config(folder / "case0.nii.gz", tmp_path)
    entry = open_data(cfg, 0, quiet).train[0]
    expected, record = entry.read(), next((tmp_path / "cache").glob("*.json"))
    for damage in (lambda: record.write_text("{"), lambda: record.write_text("[]"), lambda: Path(entry.store).unlink(),
                   lambda: os.truncate(entry.store, 200)):
        damage()
        data._open_array.cache_clear()
        assert np.array_equal(open_data(cfg, 0, quiet).train[0].read(), expected)
    assert not list((tmp_path / "cache").glob(".*.tmp")), "a temporary file was left"


def build(arguments: tuple[str, str]) -> list[bytes]:
    opened = open_data(DataConfig(path=arguments[0], cache_dir=arguments[1], patch=(8, 8, 8)), 0, quiet)
    return [entry.read().tobytes() for entry in opened.train + opened.val]


def test_two_processes_build_the_same_cache(folder, tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        results = pool.map(build, [(str(folder), str(tmp_path / "cache"))] * 3, chunksize=1)
    assert results[0] == results[1] == results[2] == build((str(folder), str(tmp_path / "other")))
    names = os.listdir(tmp_path / "cache")
    assert len(names) == 10 and not any(name.endswith(".tmp") for name in names)


def test_cache_that_cannot_be_written_is_one_line(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError) as error:
        open_data(config(folder, tmp_path, cache_dir=str(tmp_path / "file" / "cache")), 0, quiet)
    one_line(error, "cannot write the cache", "data.cache_dir")

    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(np, "save", full)
    with pytest.raises(DataError) as error:
        open_data(config(folder, tmp_path), 0, quiet)
    one_line(error, "No space left", "data.cache_dir")
    assert os.listdir(tmp_path / "cache") == []


def test_default_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert data.cache_folder(DataConfig()) == tmp_path / "xdg" / "vae3d"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert data.cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "vae3d"


# --------------------------------------------------------------------------------------------------------------------- crops
def same_items(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and m == n for (x, m), (y, n) in zip(a, b, strict=True))


def test_an_item_is_a_function_of_seed_and_index(folder, tmp_path):
    cfg = config(folder, tmp_path, flip="DHW", jitter=0.2, spacing="random")
    opened = open_data(cfg, 3, quiet)
    indices = list(range(45))
    expected = [Crops(opened, 5)[i] for i in indices]
    assert same_items(expected, [Crops(open_data(cfg, 3, quiet), 5)[i] for i in indices])
    crops, shuffled = Crops(opened, 5), random.Random(0).sample(indices, len(indices))
    items = {i: crops[i] for i in shuffled}
    assert same_items(expected, [items[i] for i in indices]), "the order of access matters"
    assert not same_items(expected, [Crops(opened, 6)[i] for i in indices])
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Crops(opened, 5), sampler=indices, batch_size=None, num_workers=workers)
        assert same_items(expected, list(loader)), f"{workers} workers"
    assert len({image.numpy().tobytes() for image, _ in expected}) == len(expected)
    assert all(image.shape == (1, 8, 10, 12) and image.dtype == torch.float32 for image, _ in expected)


def test_an_epoch_covers_every_volume_exactly(opened):
    crops = Crops(opened, 0)
    assert len(crops) == len(opened.train) * opened.cfg.crops_per_volume
    epochs = [[crops[epoch * len(crops) + i][1] for i in range(len(crops))] for epoch in range(3)]
    for epoch in epochs:
        assert np.bincount(epoch).tolist() == [opened.cfg.crops_per_volume] * len(opened.train)
    assert epochs[0] != epochs[1] != epochs[2]


def test_crops_are_regions_of_their_volume_and_reach_both_ends(tmp_path):
    array = np.arange(9 * 8 * 7, dtype=np.float32).reshape(9, 8, 7)       # every value tells its place
    save(tmp_path / "a.nii", array)
    opened = open_data(config(tmp_path / "a.nii", tmp_path, patch=(4, 4, 4), modality="voxel", crops_per_volume=300), 0, quiet)
    crops, starts = Crops(opened, 1), set()
    whole = opened.train[0].read()[0]
    for i in range(300):
        crop = crops[i][0][0].numpy()
        place = tuple(int(v[0]) for v in np.where(whole == crop[0, 0, 0]))
        assert np.array_equal(crop, whole[tuple(slice(p, p + 4) for p in place)])
        starts.add(place)
    for axis, last in enumerate((3, 4, 5)):                    # D, H, W = 7, 8, 9
        assert {place[axis] for place in starts} == set(range(last + 1))


def test_small_volumes_lie_centred_in_their_background(tmp_path):
    array = ct_like((5, 4, 6), 2)                              # X, Y, Z
    save(tmp_path / "a.nii", array)
    opened = open_data(config(tmp_path / "a.nii", tmp_path, patch=(8, 9, 10), modality="ct"), 0, quiet)
    crop = Crops(opened, 0)[0][0][0].numpy()
    expected = np.full((8, 9, 10), -1, np.float32)
    expected[1:7, 2:6, 2:7] = opened.train[0].read()[0]
    assert np.array_equal(crop, expected)


def test_augmentations_change_only_what_they_say(folder, tmp_path):
    def crops(**fields) -> list[np.ndarray]:
        return [Crops(open_data(config(folder, tmp_path, **fields), 0, quiet), 0)[i][0].numpy() for i in range(24)]

    plain, flipped, jittered, zoomed = crops(), crops(flip="W"), crops(jitter=0.3), crops(spacing="random", zoom=(0.5, 0.7))
    changed = [not np.array_equal(a, b) for a, b in zip(plain, flipped)]
    assert 0 < sum(changed) < 24 and all(np.array_equal(a[..., ::-1], b) for a, b, c in zip(plain, flipped, changed) if c)
    for a, b in zip(plain, jittered):
        factors = ((b + 1)[a > -1] / (a + 1)[a > -1])[b[a > -1] < 1]
        assert 0.69 < factors.min() and factors.max() < 1.31 and np.ptp(factors) < 1e-2 and ((b == -1) | (a > -1)).all()
    assert len({round(float(b.mean()), 4) for b in jittered}) > 20
    assert not any(np.array_equal(a, b) for a, b in zip(plain, zoomed)) and {b.shape for b in zoomed} == {(1, 8, 10, 12)}


def test_validation_crops_are_fixed_and_spread(folder, tmp_path):
    cfg = config(folder, tmp_path, val_fraction=0.5, flip="DHW", jitter=0.3, spacing="random")
    opened = open_data(cfg, 0, quiet)
    few, many = data.val_crops(opened, 4, 3), data.val_crops(opened, 4, 8)
    assert all(torch.equal(a.image, b.image) and a.entry is b.entry for a, b in zip(few, many))
    assert {crop.entry.name for crop in many} == {entry.name for entry in opened.val}
    for crop in many:                                          # never augmented: the affine says where in the volume it lies
        start = np.round(np.linalg.inv(crop.entry.affine) @ crop.affine[:, 3])[:3].astype(int)[::-1]
        whole = crop.entry.read()[0]
        box = tuple(slice(max(0, s), min(s + n, m)) for s, n, m in zip(start, opened.patch, whole.shape))
        inside = tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, start))
        assert np.array_equal(crop.image[0].numpy()[inside], whole[box])
        assert (crop.image == -1).sum() >= crop.image.numel() - whole[box].size


def digest(arrays: list[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def test_crops_of_a_seed_are_those_of_version_1(folder, tmp_path):
    """Recorded before foreground crops, labels and pictures came in; IEEE operations voxel by voxel, so the same on any machine."""
    for fields, expected in (({}, "93d8ec7bf8418041"), ({"flip": "DHW", "jitter": 0.2}, "4f0ba9bf5faf76e0")):
        opened = open_data(config(folder, tmp_path, **fields), 3, quiet)
        crops = Crops(opened, 5)
        images = [crops[i][0].numpy() for i in range(40)] + [crop.image.numpy() for crop in data.val_crops(opened, 5, 6)]
        assert digest(images) == expected, fields
    for kind, sums in (("ct", (-24561.74, -25629.18)), ("radar", (5194.166, 5227.592))):
        opened = open_data(DataConfig(synthetic=kind, synthetic_count=3, synthetic_size=(24, 48, 40)), 0, quiet)
        np.testing.assert_allclose([entry.read().sum(dtype=np.float64) for entry in opened.train], sums, rtol=1e-5)


def sparse_grid(path: Path, seed: int, size: int = 40, points: int = 6) -> None:
    """A radar frame (2 channels) of which 99.99 % is empty: what lies in it lies close together."""
    rng = np.random.default_rng(seed)
    grid = np.zeros((size, size, size, 2), np.float32)
    place = rng.integers(0, size - 4, 3)
    grid[tuple((place + rng.integers(0, 4, (points, 3))).T)] = (1, 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, grid)


def test_foreground_crops_of_sparse_grids(tmp_path):
    for number in range(4):
        sparse_grid(tmp_path / "in" / f"{number}.npy", number)

    def crops(foreground: float) -> tuple[list[torch.Tensor], data.Data]:
        opened = open_data(config(tmp_path / "in", tmp_path, foreground=foreground, patch=(8, 8, 8), modality="radar"), 0, quiet)
        dataset = Crops(opened, 1)
        return [dataset[i][0] for i in range(200)], opened

    (never, plain), (half, _), (always, opened) = (crops(share) for share in (0.0, 0.5, 1.0))
    shares = [sum(bool(crop.any()) for crop in images) / 200 for images in (never, half, always)]
    assert shares[0] < 0.1 and 0.4 < shares[1] < 0.65 and shares[2] == 1, shares
    assert not all(crop.image.any() for crop in data.val_crops(plain, 0, 8))
    assert all(crop.image.any() for crop in data.val_crops(opened, 0, 8)), "an empty validation crop"
    places = np.array([np.argwhere(crop.numpy()[0])[0] for crop in always])
    assert places.min() == 0 and places.max() == 7, "the foreground lies anywhere in the crop"
    shuffled = Crops(opened, 1)
    assert all(torch.equal(shuffled[i][0], always[i]) for i in random.Random(0).sample(range(200), 30)), "a function of (seed, index)"


def test_crops_that_are_not_placed_stay_where_they_were(folder, tmp_path):
    never, some = (Crops(open_data(config(folder, tmp_path, foreground=share, flip="DHW", jitter=0.1), 0, quiet), 0)
                   for share in (0.0, 0.3))
    same = sum(torch.equal(never[i][0], some[i][0]) for i in range(100))
    assert 60 <= same <= 85, f"{same} of 100"


def test_foreground_places_are_bounded_even_and_kept(tmp_path, monkeypatch):
    array = np.zeros((30, 31, 32), np.float32)
    array[5:25, 3, 4], array[0, 0, 0] = 1, 0.04                # the second is too faint to count
    np.save(tmp_path / "a.npy", array)
    cfg = config(tmp_path / "a.npy", tmp_path, foreground=1, modality="voxel")
    entry = open_data(cfg, 0, quiet).train[0]
    assert sorted(map(tuple, np.load(entry.points)[0])) == [(4, 3, x) for x in range(5, 25)], "each voxel once, D H W"
    monkeypatch.setattr(data, "foreground_points", lambda *_: pytest.fail("made again"))
    assert open_data(cfg, 0, quiet).train[0].points == entry.points
    monkeypatch.undo()
    os.truncate(entry.points, 50)
    assert np.load(open_data(cfg, 0, quiet).train[0].points).shape == (1, 20, 3), "a damaged one is made again"
    dense = data.Entry("dense", None, (1, 20, 50, 60), (1, 1, 1), np.eye(4), data.Intensity("voxel", (-1,), (1,)),
                       np.ones((1, 20, 50, 60), np.float32))
    points = data.foreground_points(dense)
    assert points.shape == (1, data.POINTS, 3) and len(np.unique(points[0], axis=0)) > 0.99 * data.POINTS
    np.testing.assert_allclose(points[0].mean(0), (9.5, 24.5, 29.5), atol=0.6)
    empty = dataclasses.replace(dense, store=dense.store * 0)
    assert data._point(dataclasses.replace(empty, points=data.foreground_points(empty)), (0.5, 0.5)) is None


def test_foreground_places_do_not_depend_on_the_slabs(monkeypatch):
    rng = np.random.default_rng(0)
    array = (rng.random((1, 12, 9, 10)) < 0.3).astype(np.float32)
    entry = data.Entry("a", None, array.shape, (1, 1, 1), np.eye(4), data.Intensity("voxel", (-1,), (1,)), array)
    whole = data.foreground_points(entry)
    monkeypatch.setattr(data.math, "prod", lambda *_: 2**21)   # slabs of 2
    assert np.array_equal(data.foreground_points(entry), whole)


@needs_real
def test_held_out_crops_of_real_radar_are_not_empty(tmp_path):
    content = {"training": [str(REAL / "radar" / "tj4d_070070_voxel_dense.npz")], "validation": [
        str(REAL / "radar" / f"tj4d_0700{n}_voxel_sparse.npz") for n in (80, 90)]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    opened = open_data(config(tmp_path / "list.json", tmp_path, foreground=0.5, patch=(16, 16, 16)), 0, quiet)
    filled = [bool(crop.image.any()) for crop in data.val_crops(opened, 0, 12)]
    assert all(filled), f"{12 - sum(filled)} of 12 are empty"


def test_what_a_killed_process_left_is_removed_after_a_day(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    old, young, other = (tmp_path / "cache" / name for name in (f".a.npy.{'0' * 32}.tmp", f".b.npy.{'1' * 32}.tmp", ".mine.tmp"))
    for file in (old, young, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (1, 1))
    open_data(config(folder, tmp_path), 0, quiet)
    assert not old.exists() and young.exists() and other.exists()


# ------------------------------------------------------------------------------------------------------- image/label pairs
def pair_like(shape: tuple[int, int, int], seed: int = 0, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """An image (X, Y, Z), radar-like, that equals its label: whatever is done to one must be done to the other."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, shape).astype(np.uint8)
    return label.astype(np.float32), label


def matches(image: torch.Tensor, label: torch.Tensor, largest: int = 3) -> bool:
    return label.dtype == torch.int64 and torch.equal((image[0] * largest).round().long(), label)


def said_and_data(path: Path, tmp_path: Path, **fields) -> tuple[list[str], data.Data]:
    said: list[str] = []
    fields = {"labels": True, "modality": "voxel", **fields}
    return said, open_data(config(path, tmp_path, **fields), 0, said.append)


def test_pairs_in_every_form(tmp_path):
    image, label = pair_like((9, 10, 11))
    root = tmp_path / "in"
    names = {"images/a.nii.gz": "labels/a.nii.gz", "images/deep/b.nii": "labels/deep/b_seg.nii.gz", "imgs/c.nii.gz": "masks/c_mask.nii.gz",
             "c/images/x_image.nii": "c/labels/x_label.nii", "d/X_image.nii.gz": "d/X_label.nii.gz", "d/Y.nii.gz": "d/Y_seg.nii.gz",
             "e/Q_IMAGE.nii.gz": "e/Q_Label.nii.gz"}
    for number, (a, b) in enumerate(names.items()):
        save(root / a, image + 0, np.diag([1, 1, 1 + number, 1.0]))
        save(root / b, label, np.diag([1, 1, 1 + number, 1.0]))
    np.savez(root / "both_seg.npz", vol=image, seg=label.astype(np.float64))
    np.save(root / "f_image.npy", image)
    np.save(root / "f_label.npy", label)
    items = data.list_items(root, labels=True)["training"]
    found = {str(item.path.relative_to(root)): str(item.label.relative_to(root)) for item in items}
    assert found == {**names, "both_seg.npz": "both_seg.npz", "f_image.npy": "f_label.npy"} and not any(item.fault for item in items)
    said, opened = said_and_data(root, tmp_path)
    assert len(opened.train) + len(opened.val) == 9 and opened.classes == 4 and not any("refused" in line for line in said)
    expected = label.transpose(2, 1, 0)
    for entry in opened.train + opened.val:
        assert np.array_equal(entry.read_label(), expected) and entry.read_label().dtype == np.int64, entry.name
        assert np.load(entry.label, mmap_mode="r").dtype == np.uint8 and entry.label_ids == (0, 1, 2, 3)
    for name in ("d/X_image.nii.gz", "both_seg.npz", "images/a.nii.gz", "d/Y.nii.gz"):  # a file by itself finds its label
        (item,) = data.list_items(root / name, labels=True)["training"]
        assert item.label.name == Path(found[name]).name and not item.fault
    (root / "list.json").write_text(json.dumps({"training": [{"image": "d/X_image.nii.gz", "label": "labels/a.nii.gz"}, "both_seg.npz"]}))
    items = data.list_items(root / "list.json", labels=True)["training"]
    assert [str(item.label.relative_to(root)) for item in items] == ["labels/a.nii.gz", "both_seg.npz"]


def test_files_without_a_partner_are_a_line_each_and_the_others_train(tmp_path):
    image, label = pair_like((9, 10, 11))
    root = tmp_path / "in"
    for name in ("d/X_image", "d/Z_image", "images/a", "images/b"):
        save(root / f"{name}.nii.gz", image)
    for name in ("d/X_label", "d/torso_3mm_label", "labels/a", "labels/c"):
        save(root / f"{name}.nii.gz", label)
    said, opened = said_and_data(root, tmp_path)
    assert {entry.name for entry in opened.train + opened.val} == {"X_image", "a"}
    refused = [line for line in said if line.startswith("data: refused")]
    assert len(refused) == 4 and all("\n" not in line for line in refused)
    for name, word in (("Z_image", "no label"), ("b", "no label"), ("torso_3mm_label", "without its image"), ("c", "without its image")):
        assert sum(f"/{name}.nii.gz" in line and word in line for line in refused) == 1, name
    with pytest.raises(DataError) as error:
        said_and_data(root, tmp_path, strict=True)
    one_line(error, "strict")
    (root / "list.json").write_text(json.dumps({"training": ["d/X_image.nii.gz"]}))
    for path in (root / "list.json", root / "d" / "Z_image.nii.gz", root / "d" / "torso_3mm_label.nii.gz"):
        with pytest.raises(DataError) as error:
            said_and_data(path, tmp_path)
        one_line(error, "no usable training volume")
    (root / "list.json").write_text(json.dumps({"training": [{"image": "d/X_image.nii.gz", "label": 5}]}))
    with pytest.raises(DataError) as error:
        said_and_data(root / "list.json", tmp_path)
    one_line(error, "training[0]", "label 5")


def test_labels_of_pairs_do_not_train_a_vae(tmp_path):
    image, label = pair_like((9, 10, 11))
    root = tmp_path / "in"
    for name in ("d/X_image", "images/a", "images/b", "alone_label"):
        save(root / f"{name}.nii.gz", image)
    for name in ("d/X_label", "d/other_label", "labels/a", "labels/c"):
        save(root / f"{name}.nii.gz", label)
    np.savez(root / "d" / "vol_and_seg.npz", vol=image, seg=label)
    said, opened = said_and_data(root, tmp_path, labels=False)
    assert {e.name for e in opened.train + opened.val} == {"X_image", "a", "b", "alone_label", "vol_and_seg"}
    assert opened.classes == 0 and all(e.label is None for e in opened.train)
    assert [line for line in said if "left out 4 label files" in line]
    assert len(Crops(opened, 0)[0]) == 2 and data.val_crops(opened, 0, 1)[0].label is None
    plain = open_data(config(root / "d" / "X_image.nii.gz", tmp_path, modality="voxel"), 0, quiet)
    assert plain.train[0].store in {entry.store for entry in opened.train + opened.val}, "the same cache with and without pairs around"


@pytest.mark.parametrize(("make", "words"), [
    (lambda label: label + np.float32(0.5) * (label == 2), ("no whole numbers, first",)),
    (lambda label: label.astype(np.int16) - 1, ("labels from -1 to 2", "data.ignore_label")),
    (lambda label: label.astype(np.int16) * 1000, ("labels from 0 to 3000", "data.label_values")),
    (lambda label: np.where(label == 1, np.nan, label).astype(np.float32), ("NaN",)),
    (lambda label: label.astype(np.int32) * 40000, ("labels from 0 to 120000",)),
    (lambda label: label[:-1], ("its grid is 11,10,8", "9")),
    (lambda label: np.stack([label] * 2, -1), ("2 volumes",)),
    (lambda label: np.arange(label.size).reshape(label.shape).astype(np.int16) * 30, ("labels from",)),
])
def test_bad_labels_are_one_line(make, words, tmp_path):
    image, label = pair_like((9, 10, 11))
    save(tmp_path / "in" / "good_image.nii.gz", image)
    save(tmp_path / "in" / "good_label.nii.gz", label.astype(np.float32))  # float files of whole numbers are fine
    save(tmp_path / "in" / "bad_image.nii.gz", image)
    save(tmp_path / "in" / "bad_label.nii.gz", make(label))
    said, opened = said_and_data(tmp_path / "in", tmp_path)
    assert [entry.name for entry in opened.train] == ["good_image"]
    (line,) = [line for line in said if line.startswith("data: refused")]
    one_line(ValueError(line), "bad_label.nii.gz", *words)
    assert "data.nan" not in line


def test_label_that_is_an_image_or_absent_or_hostile(tmp_path):
    image, label = pair_like((20, 20, 11))
    save(tmp_path / "a_image.nii", image)
    content = {"training": [{"image": "a_image.nii", "label": "l.nii"}]}
    (tmp_path / "list.json").write_text(json.dumps(content))

    def refusal() -> str:
        said: list[str] = []
        with pytest.raises(DataError, match="no usable"):
            open_data(config(tmp_path / "list.json", tmp_path, labels=True), 0, said.append)
        return next(line for line in said if "refused" in line)

    assert "l.nii: no such file" in refusal()
    save(tmp_path / "l.nii", np.arange(image.size, dtype=np.int16).reshape(image.shape))
    assert "holds 4400 different values" in refusal() and "l.nii" in refusal()
    header = bytearray(save(tmp_path / "l.nii", label).read_bytes())
    header[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    (tmp_path / "l.nii").write_bytes(header)
    assert "data.max_gib" in refusal() and "l.nii" in refusal()
    save(tmp_path / "l.nii", label, np.diag([1, 1, 1.3, 1]))
    assert "mm away from its image a_image.nii" in refusal()
    np.save(tmp_path / "l.npy", label)
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "a_image.nii", "label": "l.npy"}]}))
    assert "no orientation" in refusal()


def test_label_in_another_axis_order_lies_on_its_image(tmp_path):
    image, label = pair_like((9, 10, 11))
    affine = np.diag([1.0, 2.0, 3.0, 1])
    save(tmp_path / "in" / "a_image.nii.gz", image, affine)
    turned = nib.Nifti1Image(label, affine).as_reoriented(nib.orientations.axcodes2ornt(("S", "L", "P"),
                                                                                         (("L", "R"), ("P", "A"), ("I", "S"))))
    assert turned.shape != label.shape
    turned.affine[:3, 3] += 0.02                               # headers round
    nib.save(nib.Nifti1Image(np.asarray(turned.dataobj), turned.affine), tmp_path / "in" / "a_label.nii.gz")
    _, opened = said_and_data(tmp_path / "in", tmp_path)
    assert np.array_equal(opened.train[0].read_label(), label.transpose(2, 1, 0))


def test_classes_ignored_label_and_label_values(tmp_path):
    image, label = pair_like((9, 10, 11))
    stored = np.array([0, 7, 40, 255], np.uint8)[label]
    save(tmp_path / "in" / "a_image.nii.gz", image)
    save(tmp_path / "in" / "a_label.nii.gz", stored)
    expected = label.transpose(2, 1, 0).astype(np.int64)

    def opened(**fields) -> data.Data:
        return said_and_data(tmp_path / "in", tmp_path, **fields)[1]

    plain = opened()
    assert plain.classes == 256 and plain.label_values is None and plain.train[0].read_label().max() == 255
    assert opened(ignore_label=255).classes == 41
    for fields, labels, classes in (({"label_values": (0, 7, 40, 255)}, (0, 1, 2, 3), 4), ({"label_values": (0, 40)}, (0, 0, 1, 0), 2),
                                    ({"label_values": (0, 40, 7), "ignore_label": 255}, (0, 2, 1, 255), 3),
                                    ({"classes": 41, "ignore_label": 255}, (0, 7, 40, 255), 41)):
        got = opened(**fields)
        assert got.classes == classes and got.train[0].label == plain.train[0].label, "the cache holds what is stored"
        assert np.array_equal(got.train[0].read_label(), np.array(labels)[expected]), fields
        region = (slice(2, 5), slice(0, 4), slice(3, 9))
        assert np.array_equal(got.train[0].read_label(region), np.array(labels)[expected][region])
        assert Crops(got, 0)[0][1].max() <= max(labels)
    for fields, word in (({"classes": 41}, "no usable"), ({"label_values": (0, 7), "ignore_label": 1}, "data.ignore_label=1")):
        with pytest.raises(DataError) as error:
            opened(**fields)
        one_line(error, word)
    save(tmp_path / "in" / "a_label.nii.gz", label.astype(np.int16) - 1)
    got = opened(ignore_label=-1)
    assert got.classes == 3 and np.array_equal(got.train[0].read_label(), expected - 1)
    one = opened(ignore_label=-1, foreground=1.0).train[0]
    assert len(np.load(one.points)) == 2, "neither background nor what is ignored is foreground"
    save(tmp_path / "in" / "a_label.nii.gz", label)
    for ignored, classes in ((None, {1, 2, 3}), (2, {1, 3})):
        entry = opened(ignore_label=ignored, foreground=1.0).train[0]
        d, h, w = np.load(entry.points).reshape(-1, 3).T
        assert set(entry.read_label()[d, h, w]) == classes
    save(tmp_path / "in" / "a_label.nii.gz", label * 0)
    assert opened().classes == 2, "two at least"


def test_held_out_labels_beyond_the_training_set_are_refused(tmp_path):
    image, label = pair_like((9, 10, 11))
    for name, largest in (("a", 2), ("b", 3), ("c", 1)):
        save(tmp_path / f"{name}_image.nii.gz", image)
        save(tmp_path / f"{name}_label.nii.gz", np.minimum(label, largest))
    pairs = [{"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz"} for name in "abc"]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs[:1], "validation": pairs[1:]}))
    said, opened = said_and_data(tmp_path / "list.json", tmp_path)
    assert opened.classes == 3 and [entry.name for entry in opened.val] == ["c_image"]
    assert any("refused" in line and "b_label" in line and "from 0 to 3" in line for line in said)
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs[::2], "validation": pairs[1:2]}))
    said, opened = said_and_data(tmp_path / "list.json", tmp_path)
    assert len(opened.train) == len(opened.val) == 1 and any("no usable volume in the `validation` list" in line for line in said)


@pytest.mark.parametrize("fields", [{}, {"flip": "DHW"}, {"spacing": "random", "zoom": (1.0, 1.0)}, {"flip": "DHW", "foreground": 0.5},
                                    {"patch": (14, 6, 20)}, {"jitter": 0.0, "spacing": "1,1,1"}])
def test_label_goes_through_the_same_changes_as_its_image(fields, tmp_path):
    for number, shape in enumerate(((13, 14, 15), (20, 9, 12), (16, 16, 16))):
        image, label = pair_like(shape, number)
        save(tmp_path / "in" / f"{number}_image.nii.gz", image)
        save(tmp_path / "in" / f"{number}_label.nii.gz", label)
    _, opened = said_and_data(tmp_path / "in", tmp_path, **fields)
    crops = Crops(opened, 0)
    for i in range(20):
        image, label, number = crops[i]
        assert image.shape[1:] == label.shape == opened.patch and matches(image, label), f"item {i}"
        assert number in range(len(opened.train)) and label.is_contiguous()
    for crop in data.val_crops(opened, 0, 6) + list(data.WholeVolumes(opened)):
        assert matches(crop.image, crop.label)
    again = Crops(opened, 0)
    assert all(torch.equal(a, b) for i in (7, 3) for a, b in zip(crops[i][:2], again[i][:2]))
    loader = torch.utils.data.DataLoader(crops, batch_size=3, num_workers=0)
    image, label, number = next(iter(loader))
    assert label.shape == (3, *opened.patch) and number.shape == (3,)


def test_zoomed_and_resampled_labels_lie_where_the_image_does(tmp_path):
    """A large ball: where the resampled image is clear of the edge, the label is what it says. Jitter leaves labels alone."""
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 44, 48)), indexing="ij")
    ball = (((x - 19)**2 + (y - 25)**2 + (z - 20)**2) < 12**2).astype(np.uint8)
    save(tmp_path / "in" / "a_image.nii.gz", ball.astype(np.float32))
    save(tmp_path / "in" / "a_label.nii.gz", ball)
    for fields in ({"spacing": "random", "zoom": (0.5, 0.8)}, {"spacing": "random", "zoom": (1.2, 2.0), "flip": "HW"},
                   {"spacing": "2,1.5,0.7"}, {"resize": (24, 61, 37)}, {"scale": 0.5}, {"jitter": 0.3}):
        _, opened = said_and_data(tmp_path / "in", tmp_path, patch=(24, 24, 24), foreground=1, **fields)
        crops, clear, both = Crops(opened, 0), 0.0, 0
        for i in range(8):
            image, label, _ = crops[i]
            sure = (image[0] < 0.05) | (image[0] > (0.69 if "jitter" in fields else 0.95))  # the nearest voxel weighs 1/8 or so
            assert ((image[0] > 0.5).long() == label)[sure].all(), fields
            assert ((image[0] > 0.5).long() != label).float().mean() < 0.03, fields
            clear, both = clear + sure.float().mean() / 8, both + (label.unique().numel() == 2)
        assert clear > 0.8 and both > 2, "the test sees no edge"


def test_resampled_labels_against_a_slow_loop():
    rng = np.random.default_rng(0)
    for old, new in ((7, 3), (3, 7), (10, 5), (5, 5), (4, 9), (1, 4)):
        label = rng.integers(0, 9, (old, 3, 2)).astype(np.int16)
        expected = np.stack([label[min(old - 1, int((i + 0.5) * old / new))] for i in range(new)])
        assert np.array_equal(data.resample_label(label, (new, 3, 2)), expected)


def test_foreground_crops_see_rare_classes(tmp_path):
    label = np.zeros((40, 40, 40), np.uint8)
    label[:20], label[30, 31, 32] = 1, 2                       # half of the volume, and one voxel
    save(tmp_path / "in" / "a_image.nii.gz", np.random.default_rng(0).random(label.shape).astype(np.float32))
    save(tmp_path / "in" / "a_label.nii.gz", label)
    rare = {}
    for share in (0.0, 0.6, 1.0):
        _, opened = said_and_data(tmp_path / "in", tmp_path, foreground=share, patch=(6, 6, 6), crops_per_volume=300)
        crops = Crops(opened, 0)
        rare[share] = sum(bool((crops[i][1] == 2).any()) for i in range(300)) / 300
    assert rare[0.0] < 0.03 and abs(rare[0.6] - 0.3) < 0.08 and abs(rare[1.0] - 0.5) < 0.08, rare
    assert all((crop.label > 0).any() for crop in data.val_crops(opened, 0, 10))


def test_labels_of_a_series(tmp_path):
    image, label = pair_like((8, 9, 10))
    series = np.stack([image, image, image], -1)
    save(tmp_path / "in" / "one_image.nii.gz", series)
    save(tmp_path / "in" / "one_label.nii.gz", label)
    save(tmp_path / "in" / "each_image.nii.gz", series)
    save(tmp_path / "in" / "each_label.nii.gz", np.stack([label, label * 0, label], -1))
    _, opened = said_and_data(tmp_path / "in", tmp_path)
    sums = {entry.name: int(entry.read_label().sum()) for entry in opened.train + opened.val}
    total = int(label.sum())
    assert sums == {f"{name}_image_t00{t}": 0 if (name, t) == ("each", 1) else total for name in ("one", "each") for t in range(3)}
    _, opened = said_and_data(tmp_path / "in" / "one_image.nii.gz", tmp_path, four_d="channels", select_channel=1)
    assert opened.train[0].shape == (1, 10, 9, 8) and int(opened.train[0].read_label().sum()) == total


def test_label_cache_follows_the_label(tmp_path, monkeypatch):
    image, label = pair_like((9, 10, 11))
    save(tmp_path / "in" / "a_image.nii.gz", image)
    save(tmp_path / "in" / "a_label.nii.gz", label)
    _, first = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    with monkeypatch.context() as patch:
        patch.setattr(data, "_read", lambda *_, **__: pytest.fail("decoded again"))
        _, again = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    assert again.train[0].label == first.train[0].label and again.train[0].points == first.train[0].points
    os.truncate(first.train[0].label, 150)
    data._open_array.cache_clear()
    mended = said_and_data(tmp_path / "in", tmp_path)[1].train[0]
    assert np.array_equal(mended.read_label(), label.transpose(2, 1, 0)), "a damaged one is made again"
    save(tmp_path / "in" / "a_label.nii.gz", label // 2)
    _, changed = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    assert changed.train[0].label != first.train[0].label and changed.classes == 2


def test_synthetic_volumes_have_labels():
    for kind, classes in (("ct", 4), ("radar", 3)):
        fields = {"synthetic": kind, "synthetic_count": 3, "synthetic_size": (24, 48, 40)}
        plain, opened = (open_data(DataConfig(**fields, labels=on, foreground=0.5 * on), 0, quiet) for on in (False, True))
        assert (plain.classes, opened.classes) == (0, classes)
        for a, b in zip(plain.train + plain.val, opened.train + opened.val):
            image, label = b.read(), b.read_label()
            assert np.array_equal(a.read(), image) and set(np.unique(label)) == set(range(classes))
            if kind == "ct":                                   # the means are those of what the labels name
                means = [float(image[0][label == c].mean()) for c in range(4)]
                assert means[0] < -0.9 and -0.1 < means[1] < 0.15 and -0.95 < means[2] < -0.5 and 0.25 < means[3] < 0.9, means
            else:
                assert np.array_equal(label > 0, image[0] > 0)
        image, label, _ = Crops(opened, 0)[0]
        assert label.shape == opened.patch == image.shape[1:]
    small = open_data(DataConfig(synthetic_count=2, synthetic_size=(16, 16, 16), resize=(8, 9, 10), labels=True), 0, quiet)
    assert small.train[0].read_label().shape == (8, 9, 10)


@needs_real
def test_real_pairs(tmp_path):
    said, opened = said_and_data(REAL / "seg", tmp_path, modality="auto", foreground=0.7, patch=(16, 24, 24))
    assert len(opened.train) + len(opened.val) == 7 and opened.classes == 256
    orphans = [line for line in said if line.startswith("data: refused")]
    assert len(orphans) == 3 and all("label without its image" in line for line in orphans)
    crops = Crops(opened, 0)
    labelled = [bool(crops[i][1].any()) for i in range(24)]
    assert sum(labelled) > 12 and all(crop.label.any() for crop in data.val_crops(opened, 0, 6))
    for entry in opened.train + opened.val:                    # foreground of the body is not air
        source = nib.load(entry.label_path) if entry.label_path.endswith("gz") else None
        if source is not None:
            assert np.bincount(entry.read_label().ravel()).tolist() == np.bincount(np.asarray(source.dataobj).ravel()).tolist(), entry.name
    pairs = [{"image": str(REAL / "ct" / "torso_3mm.nii.gz"), "label": str(REAL / "seg" / "torso_3mm_label.nii.gz")}]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs}))
    _, opened = said_and_data(tmp_path / "list.json", tmp_path, modality="auto")
    image, label = opened.train[0].read()[0], opened.train[0].read_label()
    assert opened.classes == 118 and image[label > 0].mean() > image[label == 0].mean() + 0.2
    said, opened = said_and_data(REAL / "seg", tmp_path, modality="auto", labels=False)
    assert len(opened.train) + len(opened.val) == 7 and any("left out 9 label files" in line for line in said)


# ------------------------------------------------------------------------------------------------------------------ pictures
@pytest.fixture
def pictures(tmp_path):
    """imgs/ and masks/ as the common 2D set-up has them: JPEG-like colour images, masks of 0 and 255."""
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for folder in ("imgs", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((30 + number, 40), np.uint8)
        mask[5:20, 8:30] = 255
        colour = np.stack([mask, mask // 2, rng.integers(0, 256, mask.shape).astype(np.uint8)], -1)
        image_module.fromarray(colour).save(tmp_path / "in" / "imgs" / f"p{number}.png")
        picture = image_module.fromarray(mask)
        if number == 1:                                        # palette values, an ending of its own
            picture = image_module.fromarray((mask > 0).astype(np.uint8) * 255).convert("P", palette=0)
        picture.save(tmp_path / "in" / "masks" / f"p{number}{'_mask.gif' if number == 2 else '.png'}")
    return tmp_path / "in"


def test_pictures_are_read_as_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    grey, colour = rng.integers(0, 256, (5, 7)).astype(np.uint8), rng.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    deep = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
    alpha = np.concatenate([colour, colour[..., :1]], -1)
    for name, array, expected in (("g.png", grey, grey[None]), ("c.png", colour, colour.transpose(2, 0, 1)), ("d.png", deep, deep[None]),
                                  ("c.bmp", colour, colour.transpose(2, 0, 1)), ("c.tif", colour, colour.transpose(2, 0, 1)),
                                  ("a.png", alpha, colour.transpose(2, 0, 1)), ("b.png", grey > 99, (grey > 99)[None] * 255)):
        image.fromarray(array).save(tmp_path / name)
        volume = read_volume(tmp_path / name)
        assert volume.array.dtype == np.float32 and np.array_equal(volume.array[:, 0], expected), name
        assert volume.spacing == (1, 1, 1) and np.array_equal(volume.affine, np.eye(4))
        item = data.load(Item(tmp_path / name), DataConfig())
        top = 65535 if name == "d.png" else 255
        normal, intensity = item.volumes[0]
        np.testing.assert_allclose(normal[:, 0], expected / top * 2 - 1, atol=1e-6)
        assert (intensity.modality, intensity.background, item.guessed) == ("picture", -1, False)
        np.testing.assert_allclose(data.denormalise(normal, intensity), volume.array, atol=0.01)
    smooth = np.broadcast_to(np.arange(0, 160, 5, dtype=np.uint8)[:, None, None], (32, 24, 3)).copy()
    image.fromarray(smooth).save(tmp_path / "c.jpg", quality=95)
    assert abs(read_volume(tmp_path / "c.jpg").array[:, 0] - smooth.transpose(2, 0, 1)).max() < 4
    (tmp_path / "broken.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    image.fromarray(grey).save(tmp_path / "two.tif", save_all=True, append_images=[image.fromarray(grey)])
    image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    for name, word in (("broken.png", "cannot be read"), ("text.png", "cannot be read"), ("two.tif", "2 frames"), ("f.tif", "floating")):
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name, word)
    with pytest.raises(DataError, match="data.max_gib"):
        read_volume(tmp_path / "c.png", max_gib=1e-7)


def test_picture_pairs_train(pictures, tmp_path):
    said, opened = said_and_data(pictures, tmp_path, modality="auto", patch=None, foreground=0.5)
    assert len(opened.train) + len(opened.val) == 4 and (opened.channels, opened.classes, opened.background) == (3, 2, -1)
    assert opened.label_values == (0, 255) and any("values 0,255" in line for line in said), said
    assert opened.patch == (1, 28, 40), "as large as the pictures, in multiples of 4"
    for entry in opened.train + opened.val:
        image, label = entry.read(), entry.read_label()
        assert image.shape[1] == 1 and np.array_equal(label, (image[0] > 0).astype(np.int64)), entry.name
    image, label, _ = Crops(opened, 0)[0]
    assert image.shape == (3, *opened.patch) and label.shape == opened.patch and set(label.unique().tolist()) <= {0, 1}
    _, again = said_and_data(pictures, tmp_path, modality="auto", label_values=opened.label_values)
    assert again.classes == 2 and np.array_equal(again.train[0].read_label(), opened.train[0].read_label())
    _, only = said_and_data(pictures, tmp_path, modality="auto", labels=False)
    assert {entry.name for entry in only.train + only.val} == {"p0", "p1", "p2", "p3"}, "masks do not train a VAE"
    zoomed = said_and_data(pictures, tmp_path, modality="auto", patch=(1, 12, 12), spacing="random", zoom=(0.4, 0.5))[1]
    for i in range(4):
        image, label, _ = Crops(zoomed, 0)[i]
        sure = image[0].abs() > 0.99
        assert ((image[0] > 0).long() == label)[sure].all() and sure.float().mean() > 0.5


def test_palette_masks(tmp_path):
    image = pytest.importorskip("PIL.Image")
    index = np.array([[0, 7], [7, 0]], np.uint8)
    for name, palette, expected in (("voc.png", [0, 0, 0, 128, 0, 0, *[0, 128, 0] * 5, 128, 128, 128], (0, 7)),  # class 7 of VOC is grey
                                    ("grey.png", [v for n in range(8) for v in (36 * n,) * 3], (0, 252)), ("black.png", [0] * 24, (0, 7))):
        picture = image.fromarray(index)
        picture.putpalette(palette)
        picture.save(tmp_path / name)
        found = data._read(tmp_path / name, None, "error", None, 1.0, label=True).volume.array
        assert found.shape == (1, 1, 2, 2) and tuple(np.unique(found)) == expected, name
        assert len(read_volume(tmp_path / name).array) == 3, "as an image it is its colours"


def test_scale_shrinks_image_and_label(pictures, tmp_path):
    _, opened = said_and_data(pictures, tmp_path, modality="auto", scale=0.5, patch=(1, 8, 8))
    for entry in opened.train + opened.val:
        assert entry.shape[1:] == entry.read_label().shape and entry.shape[1] == 1 and entry.shape[3] == 20
        assert entry.shape[2] in (15, 16) and set(np.unique(entry.read_label())) == {0, 1}
        np.testing.assert_allclose(entry.spacing[2], 2)
    save(tmp_path / "vol" / "v.nii.gz", ct_like((20, 24, 12)), np.diag([1, 1, 3, 1.0]))
    half = open_data(config(tmp_path / "vol", tmp_path, scale=0.25), 0, quiet).train[0]
    assert half.shape == (1, 12, 6, 5) and half.spacing == (3, 4, 4)
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5), 0, quiet).train[0].shape == (1, 12, 12, 10)
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5, spacing="1,1,1"), 0, quiet).train[0].shape == (1, 36, 12, 10)
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5, resize=(5, 6, 7)), 0, quiet).train[0].shape == (1, 5, 6, 7)


def test_masks_that_are_no_masks(pictures, tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(pictures / "masks" / "p0.png")
    said, opened = said_and_data(pictures, tmp_path, modality="auto")
    assert len(opened.train) + len(opened.val) == 3 and any("p0.png" in line and "colour picture as label" in line for line in said)
    noise = rng.integers(0, 256, (30, 40, 1)).astype(np.uint8)  # grey, stored as colours
    image.fromarray(np.repeat(noise, 3, -1)).save(pictures / "masks" / "p0.png")
    with pytest.raises(DataError) as error:
        said_and_data(pictures, tmp_path, modality="auto")
    one_line(error, "different values", "PNG")
    image.fromarray(np.zeros((30, 40), np.uint8) + np.arange(40, dtype=np.uint8) % 3).save(pictures / "masks" / "p0.png")
    said, opened = said_and_data(pictures, tmp_path, modality="auto")
    assert opened.label_values == (0, 1, 2, 255) and opened.classes == 4
    said, opened = said_and_data(pictures, tmp_path, modality="auto", ignore_label=255)
    assert opened.label_values is None and opened.classes == 3, "0, 1, 2 and what is ignored are classes as they are"
    with pytest.raises(DataError) as error:
        said_and_data(pictures, tmp_path, modality="auto", classes=3)
    one_line(error, "data.classes=3")


def test_pictures_among_volumes_are_no_data(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number in range(2):
        save(tmp_path / "in" / f"v{number}_image.nii.gz", *pair_like((9, 9, 9))[:1])
        save(tmp_path / "in" / f"v{number}_label.nii.gz", pair_like((9, 9, 9))[1])
    (tmp_path / "in" / "samples").mkdir()
    for name in ("samples/step_1.png", "page.jpg"):
        image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in" / name)
    for labels in (False, True):
        said, opened = said_and_data(tmp_path / "in", tmp_path, labels=labels)
        assert {entry.name for entry in opened.train + opened.val} == {"v0_image", "v1_image"}
        assert sum("left out 2 pictures (page.jpg, step_1.png)" in line for line in said) == 1 and not any("refused" in x for x in said)


def test_without_pillow_the_error_names_it(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)              # import fails
    for call in (lambda: read_volume(pictures / "imgs" / "p0.png"), lambda: said_and_data(pictures, tmp_path),
                 lambda: said_and_data(pictures / "imgs", tmp_path, labels=False)):
        with pytest.raises(DataError) as error:
            call()
        one_line(error, "p0.png", "python -m pip install pillow")


# ----------------------------------------------------------------------------------------------------------------- synthetic
@pytest.mark.parametrize(("kind", "channels", "background"), [("ct", 1, -1), ("radar", 4, 0)])
def test_synthetic_volumes(kind, channels, background):
    cfg = DataConfig(synthetic=kind, synthetic_count=3, synthetic_size=(24, 48, 40))
    first, again, other = (open_data(cfg, seed, quiet) for seed in (0, 0, 1))
    assert (first.channels, first.background, len(first.train), len(first.val)) == (channels, background, 2, 1)
    assert first.patch == (16, 48, 40)
    images = [entry.read() for entry in first.train + first.val]
    assert all(np.array_equal(image, entry.read()) for image, entry in zip(images, again.train + again.val))
    assert not any(np.array_equal(image, entry.read()) for image in images for entry in other.train + other.val)
    for image in images:
        assert image.shape == (channels, 24, 48, 40) and np.isfinite(image).all() and -1 <= image.min() and image.max() <= 1
        if kind == "radar":
            assert 0.005 < (image[0] != 0).mean() < 0.1 and not image[:, image[0] == 0].any()
        else:                                                  # air, lung or fat, tissue, bone
            assert all(((image > low) & (image < high)).mean() > 0.003 for low, high in ((-1, -0.9), (-0.9, -0.5), (0, 0.15), (0.35, 1)))
    resized = open_data(DataConfig(synthetic=kind, synthetic_count=2, synthetic_size=(16, 16, 16), resize=(8, 9, 10)), 0, quiet)
    assert resized.train[0].shape == (channels, 8, 9, 10)


# ------------------------------------------------------------------------------------------------------------ hostile input
def test_declared_size_is_checked_before_memory_is_taken(tmp_path):
    path = save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.int16))
    header = bytearray(path.read_bytes())
    header[42:48] = struct.pack("<3h", 30000, 30000, 30000)
    path.write_bytes(header)
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(header))
    header[42:48] = struct.pack("<3h", 400, 400, 400)
    (tmp_path / "b.nii").write_bytes(header)
    (tmp_path / "b.nii.gz").write_bytes(gzip.compress(header))
    np.save(tmp_path / "c.npy", np.zeros((2, 2, 2), np.float32))
    bomb = (tmp_path / "c.npy").read_bytes().replace(b"(2, 2, 2)", b"(9999, 9999, 9999)")
    (tmp_path / "c.npy").write_bytes(bomb)
    with zipfile.ZipFile(tmp_path / "c.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("vol.npy", bomb)
    for name, word in (("a.nii", "data.max_gib"), ("a.nii.gz", "data.max_gib"), ("b.nii", "truncated"), ("b.nii.gz", "truncated"),
                       ("c.npy", "c.npy"), ("c.npz", "c.npz")):
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name, word)
    with pytest.raises(DataError, match="data.max_gib=1e-06"):
        read_volume(save(tmp_path / "d.nii", np.zeros((20, 20, 20), np.int16)), max_gib=1e-6)


def test_files_that_are_no_files(tmp_path):
    (tmp_path / "empty.nii").write_bytes(b"")
    (tmp_path / "empty.npz").write_bytes(b"")
    (tmp_path / "dir.nii").mkdir()
    os.mkfifo(tmp_path / "pipe.nii")
    header = b"{'descr': '|O', 'fortran_order': False, 'shape': (1, 1, 1), }".ljust(117) + b"\n"
    (tmp_path / "evil.npy").write_bytes(b"\x93NUMPY\x01\x00v\x00" + header + b"cos\nsystem\n(S'exit 1'\ntR.")
    flat = bytearray(save(tmp_path / "flat.nii", np.ones((3, 3, 3), np.int16)).read_bytes())
    flat[280:328] = struct.pack("<12f", 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0)   # sform: z has no extent
    (tmp_path / "flat.nii").write_bytes(flat)
    for name in ("empty.nii", "empty.npz", "dir.nii", "pipe.nii", "absent.nii", "evil.npy", "flat.nii"):
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name)


# ------------------------------------------------------------------------------------------------------ config, command line
@pytest.mark.parametrize("fields", [{"patch": (0, 8, 8)}, {"patch": (8, 8)}, {"synthetic": "pet"}, {"window": "liver"}, {"modality": "x"},
                                    {"val_fraction": 1.0}, {"spacing": "1,2"}, {"spacing": "fine"}, {"spacing": "1,0,1"}, {"flip": "X"},
                                    {"jitter": -0.1}, {"hu_range": (5, 5)}, {"zoom": (2, 1)}, {"nan": "ignore"}, {"four_d": "time"},
                                    {"crops_per_volume": 0}, {"workers": -1}, {"voxel_scale": (0.0,)}, {"max_gib": 0},
                                    {"resize": (1, 2, 0)}, {"foreground": 1.5}, {"scale": 0.0}, {"scale": 2.0},
                                    {"classes": 1}, {"label_values": (0, 0)}, {"label_values": (0, -4)}, {"ignore_label": 10**6},
                                    {"label_values": (0, 1), "classes": 3}])
def test_config_names_the_field_that_is_wrong(fields):
    with pytest.raises(ValueError, match=f"data.{next(iter(fields))} is .*; "):
        DataConfig(**fields)


def test_spacing_forms():
    assert DataConfig(spacing="3, 1,1").spacing_mm() == DataConfig(spacing=[3, 1, 1]).spacing_mm() == (3, 1, 1)
    assert DataConfig(spacing="[3, 1, 1]").spacing_mm() == (3, 1, 1) and DataConfig().spacing_mm() is None


def run(capfd, *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error of `python data.py ...`, in this process: importing torch takes seconds."""
    try:
        code = data.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    return code, out.splitlines(), err


def test_command_line(folder, tmp_path, capfd):
    code, rows, err = run(capfd, folder)
    assert (code, len(rows), err) == (0, 7, "")
    assert all(word in rows[1] for word in ("12,24,20", "2,1.5,1", "RAS", "int16", "ct", "-1000 .. 899", "ok"))
    os.rename(folder / "case0.nii.gz", folder / "a\nb.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"not gzip")
    np.save(folder / "two.npy", np.random.default_rng(0).random((9, 9, 9, 2)))
    code, rows, err = run(capfd, folder)
    assert (code, len(rows), err) == (1, 9, "")
    assert sum("refused: " in row for row in rows) == 2 and r"a\nb.nii.gz" in rows[1]
    (tmp_path / "empty").mkdir()
    for arguments in ((), (tmp_path / "absent",), (folder, tmp_path / "absent"), (tmp_path / "empty",)):
        code, rows, err = run(capfd, *arguments)
        assert code == 2 and rows == [] and err and "Traceback" not in err
    done = subprocess.run([sys.executable, "data.py", folder], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr == "" and len(done.stdout.splitlines()) == 9


@needs_real
def test_command_line_on_pairs(capfd, tmp_path):
    code, rows, err = run(capfd, REAL / "seg")
    assert (code, err, len(rows)) == (0, "", 10) and "left out 9 label files" in rows[0]
    assert sum("ok, 2 labels 0 .. 1" in row for row in rows) == 4 and any("ok, 32 labels 0 .. 117" in row for row in rows)
    image, label = pair_like((9, 9, 9))
    save(tmp_path / "a_image.nii.gz", image)
    save(tmp_path / "a_label.nii.gz", label + 0.5)
    code, rows, err = run(capfd, tmp_path)
    assert code == 1 and err == "" and "its label is refused" in rows[2] and "no whole numbers" in rows[2]


@needs_real
def test_command_line_on_the_odd_files(capfd):
    code, rows, err = run(capfd, REAL / "odd")
    assert code == 1 and err == "" and len(rows) == 46
    assert sum(row.rstrip().endswith("  ok") for row in rows) == 34 and sum("  refused: " in row for row in rows) == 10


def test_works_copied_alone(tmp_path):
    shutil.copy(ROOT / "data.py", tmp_path / "data.py")
    script = ("import data; d = data.open_data(data.DataConfig(synthetic_count=2, synthetic_size=(8, 16, 16)), 0); "
              "print(data.Crops(d, 0)[0][0].shape)")
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0 and "torch.Size([1, 8, 16, 16])" in done.stdout, done.stderr


def test_write_nifti_puts_a_crop_where_it_was(tmp_path):
    """A held-out crop, written and read again, lies on the voxels of the volume that it was cut from."""
    rng = np.random.default_rng(0)
    affine = np.array([[2.0, 0, 0, -10], [0, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])
    for n in range(2):
        nib.save(nib.Nifti1Image((rng.random((9, 10, 11)) * 100).astype(np.float32), affine), tmp_path / f"v{n}.nii.gz")
    cfg = data.DataConfig(path=str(tmp_path), patch=(4, 5, 6), modality="mr", cache_dir=str(tmp_path / "cache"))
    opened = data.open_data(cfg, 0, say=lambda _: None)
    crop = data.val_crops(opened, 0, 1)[0]
    data.write_nifti(tmp_path / "out.nii.gz", crop.image.numpy(), crop.affine)
    back = data.read_volume(tmp_path / "out.nii.gz")
    assert np.array_equal(back.array, crop.image.numpy()) and back.spacing == (4, 3, 2)
    x, y, z = np.round(np.linalg.inv(affine) @ back.affine[:, 3]).astype(int)[:3]
    assert np.array_equal(crop.entry.read()[:, z:z + 4, y:y + 5, x:x + 6], back.array)
    whole = list(data.WholeVolumes(opened))
    assert [c.image.shape for c in whole] == [(1, 11, 10, 9)] and np.array_equal(whole[0].affine, opened.val[0].affine)
