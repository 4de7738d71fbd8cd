"""Headers that are a little wrong, or in another unit or order: read right, and told in a line."""
import struct

import nibabel as nib
import numpy as np
import pytest
from nibabel.externals.netcdf import netcdf_file

from volume_files import ct_like, one_line, said_and_data, save
from volumes import formats
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.find import Item
from volumes.loading import load
from volumes.results import write_result
from volumes.volume import Request

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])


def read(path):
    return formats.read_source(path, Request())


def in_rows(array: np.ndarray) -> np.ndarray:
    """(X, Y, Z) -> (1, D, H, W)."""
    return array.transpose(2, 1, 0)[None]


def comes_back(path, tmp_path) -> nib.Nifti1Image:
    """What is written when a network returns its input."""
    loaded = load(Item(path), DataConfig(modality="ct", hu_range=(-1100, 1100)))
    origin = formats.origin_of(path, loaded.source, None)
    write_result(tmp_path / "back.nii.gz", loaded.volumes, loaded.affine, origin)
    return nib.load(tmp_path / "back.nii.gz")


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_that_would_begin_inside_of_the_header(kind, tmp_path):
    array = ct_like((7, 8, 9))
    content = bytearray(kind(array, AFFINE).to_bytes())
    place = 108 if kind is nib.Nifti1Image else 168
    content[place:place + (4 if kind is nib.Nifti1Image else 8)] = b"\0" * (4 if place == 108 else 8)
    path = tmp_path / "a.nii"
    path.write_bytes(content)
    source = read(path)
    assert np.array_equal(source.volume.array, in_rows(array))
    one_line(ValueError(source.notes[0].text), "at byte 0", "read from byte")
    back = comes_back(path, tmp_path)
    assert np.array_equal(np.asarray(back.dataobj), array) and np.allclose(back.affine, AFFINE)


def test_a_pair_of_files_begins_at_byte_0(tmp_path):
    array = ct_like((7, 8, 9))
    nib.save(nib.Nifti1Pair(array, AFFINE), tmp_path / "a.hdr")
    source = read(tmp_path / "a.hdr")
    assert np.array_equal(source.volume.array, in_rows(array)) and not source.notes


@pytest.mark.parametrize(("unit", "stored", "mm", "words"), [
    ("meter", 1e-3, 1.0, "in metres: voxels up to 2 mm"),
    ("micron", 500.0, 0.5, "in microns: voxels up to 1 mm"),
    ("meter", 1.0, 1.0, "2 metres wide, which is taken for mm"),
    ("mm", 1.0, 1.0, None),
    ("unknown", 1.0, 1.0, None),
])
def test_units_of_the_header(unit, stored, mm, words, tmp_path):
    array = ct_like((7, 8, 9))
    image = nib.Nifti1Image(array, np.diag([stored, stored, 2 * stored, 1]))
    image.header.set_xyzt_units(unit)
    path = tmp_path / "a.nii.gz"
    nib.save(image, path)
    source = read(path)
    np.testing.assert_allclose(source.volume.spacing, (2 * mm, mm, mm), rtol=1e-5)
    assert [words in note.text for note in source.notes] == ([True] if words else [])
    back = comes_back(path, tmp_path)
    np.testing.assert_allclose(back.affine, image.affine)
    assert back.header.get_xyzt_units()[0] == unit, "what is written is in the source's unit"
    resampled = load(Item(path), DataConfig(modality="ct", spacing=f"{mm},{mm},{mm}"))
    assert resampled.volumes[0][0].shape == (1, 18, 8, 7)


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image, nib.Nifti1Pair])
@pytest.mark.parametrize("excess", [2e-6, 1e-4])
def test_a_quaternion_that_is_a_little_too_long(kind, excess, tmp_path):
    array = ct_like((7, 8, 9))
    image = kind(array, np.diag([-1.0, -1.5, 2.0, 1]))
    image.set_qform(image.affine, 1)
    image.set_sform(None, 0)
    path = tmp_path / ("a.hdr" if kind is nib.Nifti1Pair else "a.nii")
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    place, form = (368, "<d") if kind is nib.Nifti2Image else (264, "<f")
    struct.pack_into(form, content, place, 1 + excess)          # quatern_d
    path.write_bytes(content)
    with pytest.raises(ValueError, match="w2"):
        nib.load(path)
    source = read(path)
    assert np.array_equal(source.volume.array, in_rows(array[::-1, ::-1])) and len(source.notes) == 1
    np.testing.assert_allclose(source.volume.spacing, (2, 1.5, 1), rtol=1e-6)
    back = comes_back(path, tmp_path)
    assert np.array_equal(np.asarray(back.dataobj), array)
    np.testing.assert_allclose(back.affine, image.affine, atol=1e-5)


def test_a_quaternion_that_is_no_rotation_is_refused(tmp_path):
    image = nib.Nifti1Image(ct_like((7, 8, 9)), AFFINE)
    image.set_qform(AFFINE, 1)
    image.set_sform(None, 0)
    image.header["quatern_d"] = 1.1
    (tmp_path / "a.nii").write_bytes(image.header.binaryblock + bytes(4 + 2 * 7 * 8 * 9))
    with pytest.raises(DataError) as error:
        read(tmp_path / "a.nii")
    one_line(error, "a.nii", "w2 should be positive")


def minc(path, array: np.ndarray, names: tuple[str, ...]):
    """MINC-1 with these dimensions, steps of 3, 2 and 1 mm along z, y and x."""
    steps = {"zspace": 3.0, "yspace": 2.0, "xspace": 1.0, "time": 1.5}
    with netcdf_file(str(path), "w") as file:
        for name, length in zip(names, array.shape):
            file.createDimension(name, length)
            dim = file.createVariable(name, "i", ())
            dim.spacing, dim.step, dim.start = b"regular__", steps[name], 0.0
        voxels = file.createVariable("image", "h", names)
        voxels.signtype, voxels.valid_range = b"signed__", np.array([-32768.0, 32767.0])
        voxels[:] = array
        for name, value in (("image-max", 32767.0), ("image-min", -32768.0)):
            limit = file.createVariable(name, "d", ())
            limit[()] = value
    return path


@pytest.mark.parametrize(
    "names",
    [
        ("time", "zspace", "yspace", "xspace"),
        ("zspace", "time", "yspace", "xspace"),
        ("zspace", "yspace", "xspace", "time"),
    ],
)
def test_minc_says_which_axis_is_time(names, tmp_path):
    rng = np.random.default_rng(0)
    series = rng.integers(-900, 900, (3, 6, 5, 4)).astype(np.int16)                # T, D, H, W
    order = [("time", "zspace", "yspace", "xspace").index(name) for name in names]
    path = minc(tmp_path / "a.mnc", series.transpose(order), names)
    source = read(path)
    np.testing.assert_allclose(source.volume.array, series, atol=0.01)
    assert source.is_series and source.volume.spacing == (3, 2, 1)
    one = formats.read_volume(path, volume=2)
    np.testing.assert_allclose(one.array, series[2:], atol=0.01)
    back = comes_back(path, tmp_path)
    assert back.shape[3] == 3
    np.testing.assert_allclose(read(tmp_path / "back.nii.gz").volume.array, series, atol=0.02)


def test_labels_with_a_scale_that_misses_whole_numbers(tmp_path):
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, (9, 10, 11))
    header = nib.Nifti1Header()
    header.set_data_dtype("uint8")
    (tmp_path / "in").mkdir()
    save(tmp_path / "in" / "a_image.nii.gz", label.astype(np.float32))
    nib.save(nib.Nifti1Image(label.astype(float), np.eye(4), header), tmp_path / "in" / "a_label.nii.gz")
    _, opened = said_and_data(tmp_path / "in", tmp_path)
    assert opened.classes == 3
    assert np.array_equal(opened.train[0].read_label(), label.transpose(2, 1, 0))


def test_a_resampling_that_leaves_one_voxel_is_told(tmp_path):
    path = save(tmp_path / "a.nii.gz", ct_like((20, 24, 28)))
    for fields, words in (({"spacing": "1,40,40"}, ("24 voxels of 1 mm along H and 20 voxels",)),
                          ({"resize": (1, 24, 20)}, ("28 voxels of 1 mm along D become one", "data.resize"))):
        said, _ = said_and_data(path, tmp_path, modality="ct", labels=False, patch=None, **fields)
        (line,) = [line for line in said if "become one" in line]
        one_line(ValueError(line), "a.nii.gz", *words)
    said, _ = said_and_data(path, tmp_path, modality="ct", labels=False, patch=None, spacing="2,2,2")
    assert not [line for line in said if "become one" in line]


@pytest.mark.parametrize("other, told", [((3, 3, 3), True), ((1, 1.5, 2.001), False)])
def test_an_sform_and_a_qform_of_other_voxel_sizes_are_told(other, told, tmp_path):
    image = nib.Nifti1Image(ct_like((7, 8, 9)), AFFINE)
    image.set_sform(AFFINE, 1)
    image.set_qform(np.diag([*other, 1.0]), 1)
    nib.save(image, tmp_path / "a.nii.gz")
    source = read(tmp_path / "a.nii.gz")
    assert source.volume.spacing == (2.0, 1.5, 1.0)
    words = ["its sform has voxels of 1 x 1.5 x 2, its qform of 3 x 3 x 3 (x,y,z); the sform is taken"]
    assert [note.text for note in source.notes] == words * told
