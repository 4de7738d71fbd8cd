"""What predict.py writes lies on its source's grid and scale, for every kind of file."""
import dataclasses
import gzip
import re
import struct
import types

import nibabel as nib
import numpy as np
import pytest

from predictions import REAL, ct_file, needs_real, oriented, same_grid, use
from training.cases import read_case
from training.jobs import make_jobs
from volumes.config import DataConfig
from volumes.find import Item
from volumes.formats import ending_out
from volumes.intensities import Intensity, denormalise
from volumes.loading import load
from volumes.results import in_stored_type, to_source_grid, write_mask, write_result
from volumes.volume import Origin


def reader(channels):
    """As much of a ready checkpoint as reading a file asks for."""
    return types.SimpleNamespace(cfg=None, task=types.SimpleNamespace(channels=lambda cfg: channels))


def through_files(path, out, modality="ct", **fields):
    """Read as predict.py does and write back as it does, with the identity in place of the network."""
    cfg = DataConfig(modality=modality, **fields)
    channels = load(Item(path), cfg).volumes[0][0].shape[0]
    ready = reader(channels)
    case = read_case(Item(path), ready, cfg)
    out.mkdir(exist_ok=True)
    job, = make_jobs([Item(path)], str(out), ending_out)
    write_result(job.output, case.volumes, case.affine, case.origin)
    return job.output


@pytest.mark.parametrize("codes", ["RAS", "LPS", "AIL", "SPR", "PIR", "IRP", "ASL", "RSA"])
def test_hu_come_back_as_hu_in_the_files_own_axes(tmp_path, codes):
    """Shape, affine and every voxel, exactly, with the identity as network."""
    path = ct_file(tmp_path / "in" / "scan.nii.gz", codes)
    a, b = same_grid(path, through_files(path, tmp_path / "out"))
    assert (a == b).all(), f"largest difference {np.abs(a - b).max()}"


def test_a_scale_in_the_header_comes_back(tmp_path):
    """HU = 2.5 x stored - 100: the written file has the same stored numbers, slope and intercept, and so the
    same HU.
    """
    stored = np.random.default_rng(0).integers(-350, 440, (9, 8, 7)).astype(np.int16)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(2.5, -100)
    path = tmp_path / "in.nii.gz"
    nib.save(image, path)
    # nibabel scales what it is given, so the numbers are put in as they are.
    raw = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<2f", raw, 112, 2.5, -100)                 # scl_slope, scl_inter
    raw[352:] = stored.tobytes(order="F")
    path.write_bytes(gzip.compress(raw))

    out = nib.load(through_files(path, tmp_path / "out"))
    assert (out.dataobj.slope, out.dataobj.inter) == (2.5, -100)
    assert (out.dataobj.get_unscaled() == stored).all()
    assert np.abs(out.get_fdata() - (2.5 * stored.astype(float) - 100)).max() < 1e-3


@needs_real
@pytest.mark.parametrize("name", sorted(p.name for p in (REAL / "odd").glob("orient_*")) or ["orient"])
def test_orientations_of_real_files_survive(tmp_path, name):
    """uint8 with a scale: the stored numbers come back. As `voxel`, which clips nothing."""
    a, b = same_grid(REAL / "odd" / name, through_files(REAL / "odd" / name, tmp_path / "out", "voxel"))
    assert (a == b).all(), f"largest difference {np.abs(a - b).max()}"


@needs_real
def test_hu_of_a_real_ct_survive(tmp_path):
    """512 x 512, stored with a scale: HU within the default range to half a stored step, what lies beyond
    clipped to it.
    """
    source = REAL / "ct" / "abdomen_5mm_slab.nii.gz"
    a, b = same_grid(source, through_files(source, tmp_path / "out"))
    difference = np.abs(a.clip(-1000, 1000) - b).max()
    assert difference <= 0.5 * nib.load(source).dataobj.slope + 1e-3, difference


ODD = ["big_endian_int16.nii", "float64_oblique.nii.gz", "single_slice.nii.gz", "singleton_depth_4d.nii.gz",
       "tiny27_int64.nii", "tiny27_uint32.nii", "nifti2.nii.gz", "trailing_dim_zero_pixdim.nii.gz",
       "functional_4d_scl.nii", "pair_big_endian.hdr"]


@needs_real
@pytest.mark.parametrize("name", ODD)
def test_odd_files_come_back_on_their_grid(tmp_path, name, caplog):
    """4-D, flat, big-endian, scaled, NIfTI-2 and .hdr/.img sources; floats come back as float32. nibabel has
    nothing to say.
    """
    source = REAL / "odd" / name
    out = through_files(source, tmp_path / "out", "voxel")
    assert not caplog.records
    a, b = nib.load(source), nib.load(out)
    assert out.name == re.sub(r"\.(nii|hdr)(\.gz)?$", "", name) + ".nii.gz" and a.shape == b.shape
    assert np.allclose(a.affine, b.affine, atol=1e-4), np.abs(a.affine - b.affine).max()
    wanted = a.get_data_dtype().newbyteorder("=")
    assert b.get_data_dtype() == (wanted if wanted.kind in "iu" else np.float32)
    x, y = np.asarray(a.dataobj, dtype=np.float64), np.asarray(b.dataobj, dtype=np.float64)
    assert np.abs(x - y).max() <= 1e-6 * np.abs(x).max(), np.abs(x - y).max()


@pytest.mark.parametrize("field, value", [(254, 7), (252, -32767), (80, -2.0), (84, 1e30), (296, 3e38)])
def test_headers_that_nibabel_complains_of_pass_without_a_word(tmp_path, runs, capfd, caplog, field, value):
    """sform_code, qform_code, pixdim, an affine; each makes nibabel log or numpy warn where nobody stops
    them.
    """
    path = ct_file(tmp_path / "in" / "a.nii", "RAS")
    content = bytearray(path.read_bytes())
    struct.pack_into("<h" if field > 250 and field < 280 else "<f", content, field, value)
    path.write_bytes(content)
    capfd.readouterr()
    assert use("reconstruct", runs("kl"), "--input", path, "--output", tmp_path / "o") == 0
    assert capfd.readouterr().err == "" and not caplog.records


def test_whole_numbers_are_rounded_and_clipped_to_their_type(tmp_path):
    path = ct_file(tmp_path / "in" / "scan.nii", dtype=np.int16)
    ready = reader(1)
    origin = read_case(Item(path), ready, DataConfig(modality="ct")).origin
    values = np.full((1, 11, 14, 9), 0.6, dtype=np.float32)
    values[0, 0, 0, :4] = (1e9, -1e9, -0.6, 32767.4)
    assert in_stored_type(values, origin)[0, 0, 0, :5].tolist() == [32767, -32768, -1, 32767, 1]
    for dtype in ("int64", "uint64", "uint8"):
        stored = in_stored_type(np.array([-1e30, 1e30], dtype=np.float32).reshape(1, 1, 1, 2),
                                        Origin(".npy", (2, 1, 1), dtype, (1, 1, 2))).flatten()
        assert stored[0] == np.iinfo(dtype).min
        assert stored[1] >= np.iinfo(dtype).max // 2 + 1         # the largest that float64 can name


@pytest.mark.parametrize("shape, axis", [
    ((6, 7, 8), None), ((3, 6, 7, 8), None), ((6, 7, 8, 3), None), ((6, 3, 7, 8), 1)])
@pytest.mark.parametrize("kind", [".npy", ".npz"])
def test_arrays_come_back_in_their_shape(tmp_path, shape, axis, kind):
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    path = tmp_path / f"grid{kind}"
    np.save(path, array) if kind == ".npy" else np.savez(path, voxel=array)
    out = through_files(path, tmp_path / "out", "voxel", channel_axis=axis)
    found = np.load(out) if kind == ".npy" else np.load(out)["voxel"]
    assert out.name == path.name and found.dtype == np.float32 and np.abs(found - array).max() < 1e-6
    if len(shape) == 4:
        one = through_files(path, tmp_path / "one", "voxel", channel_axis=axis, select_channel=1)
        found = np.load(one) if kind == ".npy" else np.load(one)["voxel"]
        channels = {(3, 6, 7, 8): 0, (6, 7, 8, 3): 3, (6, 3, 7, 8): 1}[shape]
        assert np.abs(found - np.take(array, 1, channels)).max() < 1e-6


def test_sparse_grid_comes_back_dense(tmp_path):
    np.savez(tmp_path / "s.npz", shape=np.array([4, 5, 6]), coords=np.array([[1, 2, 3], [0, 4, 5]]),
             features=np.array([[1.0, 2.0], [3.0, 4.0]], dtype=np.float32))
    found = np.load(through_files(tmp_path / "s.npz", tmp_path / "out", "voxel"))["volume"]
    assert found.shape == (4, 5, 6, 2) and found[1, 2, 3].tolist() == [1, 2]
    assert found[0, 4, 5].tolist() == [3, 4] and found.sum() == 10


def test_resampled_volume_goes_back_to_the_sources_grid(tmp_path):
    """Smooth values survive a coarser grid in between, where they were."""
    affine, shape = oriented("LPS", (24, 20, 16), 0)
    z = np.indices(shape).sum(0) * 10.0 - 300
    path = tmp_path / "in.nii.gz"
    nib.save(nib.Nifti1Image(z.astype(np.int16), affine), path)
    a, b = same_grid(path, through_files(path, tmp_path / "out", spacing="5,4,3"))
    assert np.abs(a - b)[3:-3, 3:-3, 3:-3].max() <= 2 and np.abs(a - b).max() <= 40


def test_picture_comes_back_as_png(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    image.fromarray(picture).save(tmp_path / "photo.bmp")
    out = through_files(tmp_path / "photo.bmp", tmp_path / "out", "picture")
    assert out.name == "photo.png" and (np.asarray(image.open(out)) == picture).all()


def test_denormalised_values_are_those_of_data():
    volume = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5)).astype(np.float32)
    intensity = Intensity("mr", (0.0, 10.0), (5.0, 400.0))
    origin = Origin(".npy", (5, 4, 3, 2), "float32", (3, 4, 5))
    assert np.array_equal(to_source_grid([(volume, intensity)], np.eye(4), origin),
                          denormalise(volume, intensity))


def ball_file(path, kind=np.int16):
    """Tissue of 40 HU in air, 30x28x26 voxels as stored (x, y, z), whose axes are turned."""
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (30, 28, 26)], indexing="ij"), -1)
    hu = np.where(np.linalg.norm(grid - (14, 13, 11.5), axis=-1) < 8, 40, -1000).astype(kind)
    affine = np.array([[-2.0, 0, 0, 5], [0, 0, 1.5, -7], [0, 3.0, 0, 2], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(hu, affine), path)
    return hu, affine


def test_distances_of_a_source_of_whole_numbers_are_fractions(tmp_path):
    """int16 on disk; half a voxel on either side of the surface stays half a voxel."""
    hu, affine = ball_file(tmp_path / "ball.nii.gz")
    found = nib.load(through_files(tmp_path / "ball.nii.gz", tmp_path / "out", surface="-500", smooth=0.0))
    values = found.get_fdata()
    assert found.get_data_dtype() == np.float32 and np.allclose(found.affine, affine)
    assert np.array_equal(values < 0, hu > -500)
    # Beside a voxel of the other side along an axis the distance is 1/2.
    beside = (hu[1:] > -500) != (hu[:-1] > -500)
    assert np.allclose(np.abs(values[1:][beside]), .5) and np.allclose(np.abs(values[:-1][beside]), .5)


def test_a_mask_is_the_inside_on_the_sources_grid(tmp_path):
    hu, affine = ball_file(tmp_path / "ball.nii.gz")
    item = Item(tmp_path / "ball.nii.gz")
    case = read_case(item, reader(1), DataConfig(modality="ct", surface="-500", smooth=0.0))
    write_mask(tmp_path / "m.nii.gz", case.volumes, case.affine, case.origin)
    found = nib.load(tmp_path / "m.nii.gz")
    assert found.get_data_dtype() == np.uint8 and np.allclose(found.affine, affine)
    assert np.array_equal(found.get_fdata(), hu > -500)

    # From a grid of half as many voxels across: the sides of nearly all voxels come back.
    case = read_case(item, reader(1), DataConfig(modality="ct", surface="-500", smooth=0.0, scale=.5))
    write_mask(tmp_path / "m.nii.gz", case.volumes, case.affine, case.origin)
    coarse = nib.load(tmp_path / "m.nii.gz").get_fdata()
    inside = hu > -500
    assert coarse.shape == hu.shape
    assert 2 * (coarse * inside).sum() / (coarse.sum() + inside.sum()) > .9

    case = read_case(item, reader(1), DataConfig(modality="ct"))
    with pytest.raises(ValueError, match="these volumes are intensities"):
        write_mask(tmp_path / "m.nii.gz", case.volumes, case.affine, case.origin)


def test_the_mask_of_a_blank_volume_is_empty(tmp_path):
    distance = np.full((1, 2, 2, 2), -.5, dtype=np.float32)
    intensity = Intensity("surface", (-2.0,), (2.0,))
    hu = np.arange(16, dtype=np.int16).reshape(2, 2, 2, 2)
    nib.save(nib.Nifti1Image(hu, np.eye(4)), tmp_path / "two.nii.gz")
    case = read_case(Item(tmp_path / "two.nii.gz"), reader(1), DataConfig(modality="ct"))
    origin = dataclasses.replace(case.origin, blank=((0, -1000.0),))
    write_mask(tmp_path / "m.nii.gz", [(distance, intensity)], np.eye(4), origin)
    found = nib.load(tmp_path / "m.nii.gz").get_fdata()
    assert not found[..., 0].any() and found[..., 1].all()
