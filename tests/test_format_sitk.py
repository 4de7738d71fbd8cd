"""MetaImage, NRRD and DICOM: the same voxels at the same places as nibabel reads them from a NIfTI."""
import locale
import os
import random
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from fuzz_sitk import dicom
from predictions import ct_file, oriented, use
from volume_files import config, ct_like, one_line, quiet, save
from volumes import formats
from volumes.config import DataConfig
from volumes.files import DataError, PackageError, show
from volumes.find import Item, list_items
from volumes.loading import load
from volumes.results import write_result
from volumes.volume import Request


def sitk():
    return pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")


def copied(path: Path, ending: str) -> Path:
    """A NIfTI that nibabel wrote, written anew by SimpleITK alone."""
    out = path.with_name(path.name.split(".")[0] + ending)
    sitk().WriteImage(sitk().ReadImage(str(path)), str(out))
    return out


def series_of(image, folder: Path, names: str = "{:03d}.dcm", uid: str = "1.2.3", skip=()) -> list[Path]:
    """An image of whole numbers as DICOM, a file for each slice, the last slice first."""
    folder.mkdir(parents=True, exist_ok=True)
    writer, paths, d = sitk().ImageFileWriter(), [], image.GetDirection()
    writer.KeepOriginalImageUIDOn()
    before = locale.setlocale(locale.LC_CTYPE)
    for k in range(image.GetDepth()):
        if k in skip:
            continue
        part = image[:, :, k]
        cosines = "\\".join(f"{d[i]:.9f}" for i in (0, 3, 6, 1, 4, 7))
        place = "\\".join(f"{x:.9f}" for x in image.TransformIndexToPhysicalPoint((0, 0, k)))
        for key, value in {"0008|0060": "CT", "0020|000e": uid, "0020|000d": "1.2", "0020|0037": cosines,
                           "0020|0032": place, "0020|0013": str(k), "0008|0018": f"{uid}.{k}",
                           "0028|0030": "\\".join(f"{s:.9f}" for s in part.GetSpacing()[::-1]),
                           "0018|0050": f"{image.GetSpacing()[2]:.9f}"}.items():
            part.SetMetaData(key, value)
        paths.append(folder / names.format(image.GetDepth() - k))
        writer.SetFileName(f"{paths[-1]}.dcm")
        writer.SetImageIO("GDCMImageIO")
        writer.Execute(part)
        Path(f"{paths[-1]}.dcm").rename(paths[-1])
    # The writer leaves the process in the locale C, where text files open as ASCII.
    locale.setlocale(locale.LC_CTYPE, before)
    return paths


@pytest.mark.parametrize("ending", [".mha", ".mhd", ".nrrd", ".nhdr"])
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SLA", "PIR"])
def test_voxels_lie_where_nibabel_has_them(ending, codes, tmp_path):
    affine, _ = oriented(codes, shear=0)
    path = ct_file(tmp_path / "a.nii.gz", codes)
    image = nib.load(path)
    save(path, np.asarray(image.dataobj), affine)                # ITK takes no sheared axes
    other = copied(path, ending)
    a, b = (formats.read_source(each, Request()) for each in (path, other))
    assert np.array_equal(a.volume.array, b.volume.array) and (b.orientation, b.dtype) == (codes, "int16")
    np.testing.assert_allclose(b.volume.affine, a.volume.affine, atol=1e-4)
    np.testing.assert_allclose(b.volume.spacing, a.volume.spacing, rtol=1e-5)
    # What a network gives back unchanged is the file again, for SimpleITK too.
    loaded = load(Item(other), DataConfig(modality="ct", hu_range=(-1100, 1100)))
    out = tmp_path / f"back{formats.ending_out(other)}"
    write_result(out, loaded.volumes, loaded.affine, formats.origin_of(other, loaded.source, None))
    one, two = (sitk().ReadImage(str(each)) for each in (other, out))
    assert np.array_equal(sitk().GetArrayFromImage(one), sitk().GetArrayFromImage(two))
    for name in ("GetOrigin", "GetSpacing", "GetDirection", "GetPixelIDValue"):
        np.testing.assert_allclose(getattr(two, name)(), getattr(one, name)(), atol=1e-4)


def test_volumes_channels_and_pictures(tmp_path):
    rng = np.random.default_rng(0)
    series = rng.integers(0, 900, (3, 6, 5, 4)).astype(np.int16)                  # T, D, H, W
    for name, image in (("t", sitk().GetImageFromArray(series, isVector=False)),
                        ("c", sitk().GetImageFromArray(np.moveaxis(series, 0, -1), isVector=True)),
                        ("flat", sitk().GetImageFromArray(series[0, 0]))):
        for ending in (".mha", ".nrrd"):
            path = tmp_path / f"{name}{ending}"
            sitk().WriteImage(image, str(path))
            source = formats.read_source(path, Request())
            wanted = series[:1, :1] if name == "flat" else series
            assert np.array_equal(source.volume.array[:, :, ::-1, ::-1], wanted), "LPS to RAS turns H and W"
            assert source.is_series == (name == "t")
            loaded = load(Item(path), DataConfig(modality="mr", percentiles=(0, 100)))
            out = tmp_path / f"back{ending}"
            write_result(out, loaded.volumes, loaded.affine, formats.origin_of(path, loaded.source, None))
            back = sitk().ReadImage(str(out))
            found = sitk().GetArrayFromImage(back).reshape(sitk().GetArrayFromImage(image).shape)
            np.testing.assert_allclose(found, sitk().GetArrayFromImage(image), atol=1)
    last = formats.read_volume(tmp_path / "t.mha", volume=2).array
    assert np.array_equal(last[:, :, ::-1, ::-1], series[2:])


@pytest.mark.parametrize("names", ["{:03d}.dcm", "IM{:03d}", "1.2.840.{}"])
def test_a_series_of_dicom(names, tmp_path):
    affine, _ = oriented("LPS", shear=0)
    path = save(tmp_path / "a.nii.gz", ct_like((9, 14, 11)), affine)
    root = tmp_path / "in"
    series_of(sitk().ReadImage(str(path)), root / "pat1" / "ct", names)
    image = sitk().ReadImage(str(path))
    series_of(image, root / "pat2", names, "1.2.4")
    series_of(image + 5, root / "pat2", "b" + names, "1.2.5")
    said: list[str] = []
    locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
    items = list_items(root, say=said.append)["training"]
    assert {item.name for item in items} == {"pat1/ct", "pat2/series_1", "pat2/series_2"}
    wanted = formats.read_volume(path)
    for item in items:
        assert len(item.files) == 11
        found = formats.read_volume(item.path)
        assert np.array_equal(found.array - found.array.min(), wanted.array - wanted.array.min()), item.name
        np.testing.assert_allclose(found.affine, wanted.affine, atol=1e-3)
    assert len({item.path for item in items}) == len(items)
    # Reading leaves the process's locale alone: in C text files open as ASCII.
    assert locale.setlocale(locale.LC_CTYPE) == "C.UTF-8"


def test_results_of_dicom_are_nifti(tmp_path, runs):
    affine, _ = oriented("LPS", shear=0)
    path = save(tmp_path / "a.nii.gz", ct_like((12, 12, 8)), affine)
    series_of(sitk().ReadImage(str(path)), tmp_path / "in" / "pat1")
    assert use("reconstruct", runs("kl"), "--input", tmp_path / "in", "--output", tmp_path / "out") == 0
    back = formats.read_volume(tmp_path / "out" / "pat1.nii.gz")
    np.testing.assert_allclose(back.affine, formats.read_volume(path).affine, atol=1e-3)
    assert back.array.shape == (1, 8, 12, 12)


def test_missing_slices_are_told(tmp_path):
    image = sitk().ReadImage(str(save(tmp_path / "a.nii.gz", ct_like((9, 14, 11)), np.diag([1, 1, 2, 1]))))
    first, *_ = series_of(image, tmp_path / "in", skip=(4,))
    (note,) = formats.read_source(first, Request()).notes
    one_line(ValueError(note.text), "2 to 4 mm apart", "missing")


def test_damaged_ones_are_refused_in_a_line(tmp_path, capfd):
    sitk()
    for name in ("a.mha", "b.nrrd", "c.dcm", "d.mhd", "e.nhdr"):
        (tmp_path / name).write_bytes(b"x" * 400)
    assert len(list_items(tmp_path)["training"]) == 5
    image = sitk().GetImageFromArray(np.zeros((3, 4, 5), np.complex64))
    sitk().WriteImage(image, str(tmp_path / "f.nrrd"))
    (tmp_path / "g.mha").write_text("ObjectType = Image\nNDims = 3\nDimSize = 99999 99999 9\n"
                                    "ElementType = MET_SHORT\nElementDataFile = LOCAL\n")
    words = {"f.nrrd": "complex", "g.mha": "data.max_gib"}
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(DataError) as error:
            formats.read_volume(path)
        one_line(error, path.name, words.get(path.name, ""))
    # ITK's own libraries write to the process's standard error, past Python's.
    assert capfd.readouterr() == ("", "")
    os.write(2, b"and then it is back")
    assert capfd.readouterr().err == "and then it is back"


def test_the_voxels_beside_a_header_are_part_of_the_file(tmp_path):
    path = copied(save(tmp_path / "a.nii.gz", ct_like((4, 5, 6))), ".mhd")
    names = {Path(name).name for name, *_ in formats.stamp(path)}
    assert len(names) == 2 and "a.mhd" in names
    assert len(Item(path).files) == 2


def test_without_the_package_one_line_counts_the_files(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "SimpleITK", None)          # import fails
    save(tmp_path / "a.nii.gz", ct_like((8, 10, 12)))
    for name in ("a.mha", "b.nrrd", "c.dcm", "d.dcm"):
        (tmp_path / name).write_bytes(b"x" * 400)
    (tmp_path / "IM1").write_bytes(b"\0" * 128 + b"DICM" + b"x" * 99)
    said: list[str] = []
    assert [item.name for item in list_items(tmp_path, say=said.append)["training"]] == ["a"]
    (line,) = said
    one_line(ValueError(line), "left out 5 files", ".dcm .mha .nrrd", "python -m pip install SimpleITK")
    for name in ("a.mha", "c.dcm", "IM1"):
        with pytest.raises(PackageError) as error:
            formats.read_volume(tmp_path / name)
        one_line(error, name, "python -m pip install SimpleITK")


def test_they_train(tmp_path):
    from data import open_data
    for number in range(3):
        copied(save(tmp_path / "x" / f"{number}.nii.gz", ct_like((12, 12, 8), number)), ".mha").rename(
            tmp_path / f"{number}.mha")
    for path in (tmp_path / "x").iterdir():
        path.unlink()
    opened = open_data(config(tmp_path, tmp_path, modality="ct"), 0, quiet)
    assert {entry.name for entry in opened.train + opened.val} == {"0", "1", "2"}


def test_names_and_numbers_at_which_itk_ends_the_process_are_refused_before(tmp_path):
    sitk()
    whole = copied(save(tmp_path / "a.nii.gz", ct_like((4, 5, 6))), ".mha").read_bytes()
    for name, old, new, words in (
            ("\udcff.mha", b"", b"", "not UTF-8"),
            ("axes.mha", b"NDims = 3", b"NDims = 2147483648", "NDims = 2147483648"),
            ("none.mha", b"NDims = 3", b"NDims = x", "NDims = x")):
        path = tmp_path / name
        path.write_bytes(whole.replace(old, new, 1) if old else whole)
        with pytest.raises(DataError) as error:
            formats.read_volume(path)
        one_line(error, show(path), words)


def test_a_damaged_slice_costs_itself_and_not_its_folder(tmp_path):
    """Made by hand. GDCM allocates what an element says that it has, and gives up the folder where one file
    is none.
    """
    sitk()
    rng = random.Random(0)
    for number in range(4):
        (tmp_path / f"{number}.dcm").write_bytes(dicom(rng, number, 5, 6))
    (tmp_path / "long.dcm").write_bytes(dicom(rng, 9, 5, 6) + b"\x99\x99\x01\0ab\xff\xf0" + b"x" * 50)
    (tmp_path / "kind.dcm").write_bytes(dicom(rng, 8, 5, 6).replace(b"\x28\0\x10\0US", b"\x28\0\x10\0UI"))
    items = list_items(tmp_path)["training"]
    assert sorted(Path(item.path).name for item in items) == ["0.dcm", "kind.dcm", "long.dcm"]
    assert formats.read_volume(tmp_path / "0.dcm").array.shape == (1, 4, 5, 6)
    for name, words in (("long.dcm", f"(9999,0001) says that it has {0xF0FF6261} bytes"),
                        ("kind.dcm", "repair")):
        with pytest.raises(DataError) as error:
            formats.read_volume(tmp_path / name)
        one_line(error, name, words)
