"""Blank volumes of a 4-D file: left out by their number, said, and given back as they were."""
import json

import nibabel as nib
import numpy as np
import pytest
import torch

from data import open_data
from predictions import use
from volume_files import config, one_line, save
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.find import Item
from volumes.loading import load


def series(blank: dict[int, int], count: int = 5, shape=(9, 10, 11)) -> np.ndarray:
    """Whole numbers (X, Y, Z, T) from 1 on, each volume larger than the one before; one value where blank."""
    array = np.random.default_rng(0).integers(1, 100, (*shape, count)) + 100 * np.arange(count)
    for number, value in blank.items():
        array[..., number] = value
    return array.astype(np.int16)


def test_blank_volumes_are_left_out_by_their_number(tmp_path):
    array = series({1: 0, 4: 7})
    path = save(tmp_path / "a.nii.gz", array)
    for _ in range(2):                                           # read, then from the cache
        said: list[str] = []
        opened = open_data(config(path, tmp_path, modality="mr"), 0, said.append)
        entries = {entry.volume: entry for entry in opened.train + opened.val}
        assert sorted(entries) == [0, 2, 3]
        assert [entries[k].name for k in sorted(entries)] == ["a_t000", "a_t002", "a_t003"]
        for k, entry in entries.items():                         # a voxel's rank tells which volume it is
            brightest = np.unravel_index(entry.read()[0].argmax(), (11, 10, 9))[::-1]
            assert array[(*brightest, k)] == array[..., k].max()
        (line,) = [line for line in said if "left out" in line]
        one_line(ValueError(line), "a.nii.gz", "2 of its 5 volumes", "numbers 1, 4")


def test_one_volume_that_is_left_of_two_keeps_its_number(tmp_path):
    path = save(tmp_path / "a.nii.gz", series({0: 3}, 2))
    loaded = load(Item(path), DataConfig())
    assert loaded.numbers == (1,) and loaded.blank == ((0, 3.0),) and len(loaded.volumes) == 1
    opened = open_data(config(path, tmp_path), 0, lambda line: None)
    assert opened.train[0].name == "a_t001" and opened.train[0].volume == 1


def test_a_file_of_blank_volumes_alone_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", series({0: 0, 1: 3}, 2))
    with pytest.raises(DataError, match="nothing to learn from"):
        load(Item(path), DataConfig())
    save(path, np.zeros((9, 10, 11, 3), np.int16))
    assert len(load(Item(path), DataConfig(modality="voxel")).volumes) == 3, "a voxel grid may be empty"


def test_labels_of_blank_volumes_go_with_them(tmp_path):
    label = np.random.default_rng(1).integers(0, 3, (9, 10, 11, 4)).astype(np.uint8)
    save(tmp_path / "in" / "images" / "a.nii.gz", series({2: 0}, 4))
    save(tmp_path / "in" / "labels" / "a.nii.gz", label)
    opened = open_data(config(tmp_path / "in", tmp_path, labels=True, modality="mr"), 0, lambda line: None)
    for entry in opened.train + opened.val:
        assert np.array_equal(entry.read_label(), label[..., entry.volume].transpose(2, 1, 0))
    assert {entry.volume for entry in opened.train + opened.val} == {0, 1, 3}


def test_a_record_from_before_has_all_volumes(tmp_path):
    path = save(tmp_path / "a.nii.gz", series({}, 3))
    open_data(config(path, tmp_path), 0, lambda line: None)
    (record,) = (tmp_path / "cache").glob("*.json")
    content = json.loads(record.read_bytes())
    assert content.pop("numbers") == [0, 1, 2]
    record.write_text(json.dumps(content))
    opened = open_data(config(path, tmp_path), 0, lambda line: None)
    assert {entry.name for entry in opened.train + opened.val} == {"a_t000", "a_t001", "a_t002"}


def test_predictions_give_blank_volumes_back(tmp_path, runs):
    array = series({1: 0, 2: 30}, 4, (12, 12, 8)) * 2 - 800
    path = save(tmp_path / "a.nii.gz", array)
    for command, name in (("reconstruct", "kl"), ("encode", "kl"), ("segment", "seg")):
        assert use(command, runs(name), "--input", path, "--output", tmp_path / command) == 0
    assert use("decode", runs("kl"), "--input", tmp_path / "encode", "--output", tmp_path / "decode") == 0
    found = np.asarray(nib.load(tmp_path / "reconstruct" / "a.nii.gz").dataobj)
    assert found.shape == array.shape and np.array_equal(found[..., 1:3], array[..., 1:3])
    assert found[..., 0].std() > 0 and found[..., 3].std() > 0
    assert np.array_equal(np.asarray(nib.load(tmp_path / "decode" / "a.nii.gz").dataobj), found)
    labels = np.asarray(nib.load(tmp_path / "segment" / "a.nii.gz").dataobj)
    assert labels.shape == array.shape and not labels[..., 1:3].any()
    assert use("evaluate", runs("kl"), "--data", path, "--json", tmp_path / "e.json") == 0
    rows = json.loads((tmp_path / "e.json").read_text())["volumes"]
    assert [row["volume"] for row in rows] == [0, 3]
    # 4 volumes of 16 bits a voxel lie on disk, whichever of them are used.
    latent = np.load(tmp_path / "encode" / "a_latent.npz")["latent"]
    assert latent.shape[0] == 2
    np.testing.assert_allclose(rows[0]["compression"], 12 * 12 * 8 * 16 / (latent[0].size * 32), rtol=1e-6)
    assert torch.isfinite(torch.tensor(rows[0]["psnr"]))
