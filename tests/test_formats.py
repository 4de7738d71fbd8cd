"""volumes/formats.py and its rows: every file is read right or refused in one line."""
import gzip
import os
import struct
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data import Crops, WholeVolumes, open_data, read_volume, val_crops
from volume_files import REAL, needs_real, one_line, save
from volumes import formats
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.find import Item
from volumes.format_nibabel import write_nifti
from volumes.loading import load
from volumes.results import write_result
from volumes.volume import Source, Volume


def world_values(path: Path) -> dict[tuple[float, ...], float]:
    """Slow, obvious reference: {place in mm: stored value}, voxel by voxel."""
    image = nib.load(path)
    values, affine = np.asarray(image.dataobj), image.affine
    return {
        tuple(np.round(affine @ (*index, 1), 3)[:3]): float(values[index])
        for index in np.ndindex(values.shape)
    }


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
        assert np.array_equal(volume.array, volumes[0].array), (
            f"maximum difference {abs(volume.array - volumes[0].array).max()}"
        )
        np.testing.assert_allclose(volume.affine, volumes[0].affine, atol=1e-3)
        np.testing.assert_allclose(volume.spacing, volumes[0].spacing, rtol=1e-5)


SHAPES = {  # (C, D, H, W) by the README of the data: shape turned to Z, Y, X
    "big_endian_float.nii": (1, 22, 26, 21),
    "big_endian_int16.nii": (1, 25, 41, 33),
    "big_endian_zstat.nii.gz": (1, 21, 64, 64),
    "ct_angio_clipped_uint8.nii.gz": (1, 154, 242, 256),
    "dwi_65vol_tiny.nii": (65, 10, 10, 10),
    "epi_4d_oblique.nii.gz": (2, 24, 96, 128),
    "float64_2d.nii": (1, 1, 8, 8),
    "float64_oblique.nii.gz": (1, 24, 58, 58),
    "freesurfer.mgz": (2, 3, 4, 5),
    "functional_4d_scl.nii": (20, 3, 21, 17),
    "gantry_shear_affine.nii.gz": (1, 54, 422, 306),
    "int8_4d_big_endian.nii.gz": (10, 91, 109, 91),
    "label_4d.nii.gz": (3, 60, 96, 96),
    "little_endian_zstat.nii.gz": (1, 21, 64, 64),
    "nifti2.nii.gz": (2, 12, 20, 32),
    "pair_big_endian.hdr": (1, 10, 64, 64),
    "pair_big_endian.img": (1, 10, 64, 64),
    "single_slice.nii.gz": (1, 192, 192, 1),
    "singleton_depth_4d.nii.gz": (3, 1, 256, 256),
    "tiny_7x5x3.nii.gz": (1, 3, 5, 7),
    "tiny_anisotropic.nii.gz": (1, 7, 5, 4),
    "trailing_dim_zero_pixdim.nii.gz": (1, 151, 191, 161),
    **{
        f"orient_{codes}.nii.gz": (1, 67, 79, 64)
        for codes in ("RAS", "AIL", "ASL", "SPR", "LPS", "PIR", "RSA", "IRP")
    },
    **{
        f"tiny27_{kind}.nii": (1, 3, 3, 3)
        for kind in ("float64", "int16", "int64", "int8", "uint32", "uint8")
    },
}


REFUSED = {
    "rgb24_tiny.nii": "RGB",
    "rgb24_volume.nii.gz": "RGB",
    "complex64_2d.nii": "complex",
    "cifti_dconn.nii": "no spatial image",
    "vector_field_5d.nii.gz": "5-dimensional",
    "nan_slices.nii": "153 NaN voxels, first at (0, 0, 0)",
    "inf_and_nan.nii.gz": "633 infinite voxels",
    "invalid/not_nifti.nii": "cannot be read",
    "invalid/bad_datatype.nii": "-9510",
}


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
    for shape, expected in (
        ((5, 6, 1), (1, 1, 6, 5)),
        ((1, 5, 6), (1, 6, 5, 1)),
        ((5, 6), (1, 1, 6, 5)),
        ((5, 6, 7, 1), (1, 7, 6, 5)),
    ):
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
    np.savez(
        tmp_path / "sparse.npz",
        shape=np.array([7, 6, 5, 4]),
        coords=coords.astype(np.int32),
        features=features,
    )
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
    words = {
        "table.npy": "a table",
        "complex.npy": "complex",
        "series.npy": "data.channel_axis",
        "objects.npy": "objects",
        "five.npy": "5-dimensional",
        "text.npy": "type <U1",
        "nothing.npy": "no voxels",
        "two.npz": "a, b",
        "outside.npz": "outside",
        "uneven.npz": "features (2, 2)",
        "channels.npz": "3 channels",
        "huge.npz": "data.max_gib",
        "points.bin": ".bin",
    }
    for name, word in words.items():
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name, word)


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
    for name, word in (
        ("a.nii", "data.max_gib"),
        ("a.nii.gz", "data.max_gib"),
        ("b.nii", "truncated"),
        ("b.nii.gz", "truncated"),
        ("c.npy", "c.npy"),
        ("c.npz", "c.npz"),
    ):
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


def test_write_nifti_puts_a_crop_where_it_was(tmp_path):
    """A held-out crop, written and read again, lies on the voxels of the volume that it was cut from."""
    rng = np.random.default_rng(0)
    affine = np.array([[2.0, 0, 0, -10], [0, 3, 0, 5], [0, 0, 4, 7], [0, 0, 0, 1]])
    for n in range(2):
        nib.save(
            nib.Nifti1Image((rng.random((9, 10, 11)) * 100).astype(np.float32), affine),
            tmp_path / f"v{n}.nii.gz",
        )
    cfg = DataConfig(path=str(tmp_path), patch=(4, 5, 6), modality="mr", cache_dir=str(tmp_path / "cache"))
    opened = open_data(cfg, 0, say=lambda _: None)
    crop = val_crops(opened, 0, 1)[0]
    write_nifti(tmp_path / "out.nii.gz", crop.image.numpy(), crop.affine)
    back = read_volume(tmp_path / "out.nii.gz")
    assert np.array_equal(back.array, crop.image.numpy()) and back.spacing == (4, 3, 2)
    x, y, z = np.round(np.linalg.inv(affine) @ back.affine[:, 3]).astype(int)[:3]
    assert np.array_equal(crop.entry.read()[:, z:z + 4, y:y + 5, x:x + 6], back.array)
    whole = list(WholeVolumes(opened))
    assert [c.image.shape for c in whole] == [(1, 11, 10, 9)] and np.array_equal(
        whole[0].affine, opened.val[0].affine
    )


def raw_read(path, request):
    """A made-up format: three sizes as int32, then voxels as uint8."""
    content = path.read_bytes()
    voxels = np.frombuffer(content[12:], np.uint8).reshape(1, *np.frombuffer(content[:12], np.int32))
    return Source(Volume(voxels.astype(np.float32), (1.0, 1.0, 1.0), np.eye(4)), False, "uint8", "-")


def raw_write(file, array, origin, slope, inter):
    file.write(np.array(array.shape[1:], np.int32).tobytes() + array.astype(np.uint8).tobytes())


def test_a_format_of_ones_own_is_one_row_of_the_table(tmp_path, monkeypatch):
    """Found, read, cached, cropped, and written back on its own grid: by a row from outside."""
    row = formats.Format((".raw8",), raw_read, raw_write)
    monkeypatch.setattr(formats, "TABLE", [*formats.TABLE, row])
    rng = np.random.default_rng(0)
    for n in range(3):
        with open(tmp_path / f"v{n}.raw8", "wb") as file:
            raw_write(file, rng.integers(0, 256, (1, 6, 8, 10)), None, 1, 0)
    cfg = DataConfig(path=str(tmp_path), modality="mr", patch=(4, 4, 4), cache_dir=str(tmp_path / "cache"))
    found = open_data(cfg, 0, lambda line: None)
    assert len(found.train) == 2 and Crops(found, 0)[0][0].shape == (1, 4, 4, 4)
    assert ".raw8" in formats.known_endings()

    source = tmp_path / "v2.raw8"
    loaded = load(Item(source), cfg)
    out = tmp_path / f"out{formats.ending_out(source)}"
    write_result(out, loaded.volumes, loaded.affine, formats.origin_of(source, loaded.source, None))
    low = np.asarray(loaded.volumes[0][1].low)                   # what lies below the percentile was clipped
    wanted = np.maximum(read_volume(source).array, np.rint(low))
    assert np.abs(read_volume(out).array - wanted).max() <= 1
