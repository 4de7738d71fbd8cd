"""volumes/cache.py: a cache that can be trusted."""
import multiprocessing
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data import open_data, read_volume
from volume_files import config, ct_like, one_line, pair_like, quiet, said_and_data, save
from volumes import formats
from volumes.cache import cache_folder
from volumes.config import DataConfig
from volumes.entries import open_array
from volumes.files import DataError
from volumes.intensities import denormalise


def test_crop_equals_the_slice_of_the_normalised_volume(opened):
    for entry in opened.train + opened.val:
        source = read_volume(entry.path).array
        whole = entry.read()
        np.testing.assert_allclose(whole, source.clip(-1000, 1000) / 1000, atol=1e-6)
        assert whole.dtype == np.float32 and whole.flags.writeable
        region = (slice(1, 5), slice(2, 6), slice(0, 3))
        assert np.array_equal(entry.read(region), whole[:, 1:5, 2:6, 0:3])
        np.testing.assert_allclose(denormalise(whole, entry.intensity), source, atol=1e-3)


def test_second_start_decodes_nothing(folder, tmp_path, monkeypatch):
    first = open_data(config(folder, tmp_path), 0, quiet)
    monkeypatch.setattr(formats, "read_source", lambda *_: pytest.fail("decoded again"))
    second = open_data(config(folder, tmp_path), 0, quiet)
    for a, b in zip(first.train + first.val, second.train + second.val):
        assert (a.name, a.store, a.intensity, a.shape, a.spacing) == (
            b.name,
            b.store,
            b.intensity,
            b.shape,
            b.spacing,
        )
        assert np.array_equal(a.affine, b.affine)


def test_changed_file_or_setting_makes_a_new_cache(folder, tmp_path):
    cfg = config(folder / "case0.nii.gz", tmp_path)
    before = open_data(cfg, 0, quiet).train[0]
    changed = ct_like((20, 24, 12), 77)
    save(folder / "case0.nii.gz", changed, np.diag([1.0, 1.5, 2.0, 1]))
    after = open_data(cfg, 0, quiet).train[0]
    assert after.store != before.store
    np.testing.assert_allclose(
        after.read()[0], changed.transpose(2, 1, 0).clip(-1000, 1000) / 1000, atol=1e-6
    )
    stat = os.stat(folder / "case0.nii.gz")
    os.utime(folder / "case0.nii.gz", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    stores = {after.store, open_data(cfg, 0, quiet).train[0].store}
    for fields in (
        {"window": "lung"},
        {"hu_range": (-500.0, 500.0)},
        {"modality": "mr"},
        {"spacing": "2,2,2"},
        {"resize": (8, 8, 8)},
        {"nan": "zero"},
        {"select_channel": 0},
    ):
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
    for damage in (
        lambda: record.write_text("{"),
        lambda: record.write_text("[]"),
        lambda: Path(entry.store).unlink(),
        lambda: os.truncate(entry.store, 200),
    ):
        damage()
        open_array.cache_clear()
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
    assert cache_folder(DataConfig()) == tmp_path / "xdg" / "vae3d"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(DataConfig()) == tmp_path / "home" / ".cache" / "vae3d"


def test_what_a_killed_process_left_is_removed_after_a_day(folder, tmp_path):
    (tmp_path / "cache").mkdir()
    old, young, other = (
        tmp_path / "cache" / name
        for name in (f".a.npy.{'0' * 32}.tmp", f".b.npy.{'1' * 32}.tmp", ".mine.tmp")
    )
    for file in (old, young, other):
        file.write_bytes(b"half")
    for file in (old, other):
        os.utime(file, (1, 1))
    open_data(config(folder, tmp_path), 0, quiet)
    assert not old.exists() and young.exists() and other.exists()


def test_label_cache_follows_the_label(tmp_path, monkeypatch):
    image, label = pair_like((9, 10, 11))
    save(tmp_path / "in" / "a_image.nii.gz", image)
    save(tmp_path / "in" / "a_label.nii.gz", label)
    _, first = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    with monkeypatch.context() as patch:
        patch.setattr(formats, "read_source", lambda *_, **__: pytest.fail("decoded again"))
        _, again = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    assert again.train[0].label == first.train[0].label and again.train[0].points == first.train[0].points
    os.truncate(first.train[0].label, 150)
    open_array.cache_clear()
    mended = said_and_data(tmp_path / "in", tmp_path)[1].train[0]
    assert np.array_equal(mended.read_label(), label.transpose(2, 1, 0)), "a damaged one is made again"
    save(tmp_path / "in" / "a_label.nii.gz", label // 2)
    _, changed = said_and_data(tmp_path / "in", tmp_path, foreground=1)
    assert changed.train[0].label != first.train[0].label and changed.classes == 2
