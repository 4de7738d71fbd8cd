"""volumes/layouts.py: nnU-Net's folders, and images of several files."""
import json

import nibabel as nib
import numpy as np
import pytest

import predict
import train
from data import Crops, open_data
from predictions import TINY
from tasks import TASKS
from training.config import TrainConfig, changed
from training.facts import facts_of
from training.facts import open_data as run_data
from training.task import named
from volume_files import config, ct_like, one_line, save
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.find import list_items
from volumes.layouts import declared_labels
from volumes.loading import load

SHAPE = (10, 12, 8)


@pytest.fixture
def nnunet(tmp_path):
    """Two cases of two channels and one to test, as version 2 has them."""
    root = tmp_path / "nnunet"
    for n, case in enumerate(("X_000", "X_001")):
        for k in range(2):
            save(root / "imagesTr" / f"{case}_{k:04d}.nii.gz", abs(ct_like(SHAPE, 10 * n + k)))
        label = np.random.default_rng(n).integers(0, 3, SHAPE).astype(np.uint8)
        save(root / "labelsTr" / f"{case}.nii.gz", label)
    for k in range(2):
        save(root / "imagesTs" / f"Y_{k:04d}.nii.gz", abs(ct_like(SHAPE, 50 + k)))
    (root / "dataset.json").write_text(json.dumps(
        {"channel_names": {"0": "T1", "1": "T2"}, "labels": {"background": 0, "a": 1, "b": 2},
         "numTraining": 2, "file_ending": ".nii.gz"}))
    return root


@pytest.mark.parametrize("place", ["", "dataset.json"])
def test_a_folder_of_nnunet_is_cases_of_channels(nnunet, tmp_path, place):
    said = []
    lists = list_items(nnunet / place, True, said.append)
    assert [item.name for item in lists["training"]] == ["imagesTr/X_000", "imagesTr/X_001"]
    assert [item.name for item in lists["testing"]] == ["imagesTs/Y"]
    assert "2 cases of 2 channels" in said[0]
    opened = open_data(config(nnunet / place, tmp_path, labels=True), 0, said.append)
    assert opened.channels == 2 and opened.classes == 3 and len(opened.train) + len(opened.val) == 2
    image, label, _ = Crops(opened, 0)[0]
    assert len(image) == 2 and label.shape == image.shape[1:]
    plain = open_data(config(nnunet / place, tmp_path), 0, said.append)
    assert plain.channels == 2 and {e.name for e in plain.train + plain.val} == {"imagesTr/X_000",
                                                                                 "imagesTr/X_001"}


def test_version_1_names_cases_without_their_channels(nnunet, tmp_path):
    rows = [{"image": f"./imagesTr/X_00{n}.nii.gz", "label": f"./labelsTr/X_00{n}.nii.gz"} for n in range(2)]
    (nnunet / "dataset.json").write_text(json.dumps(
        {"modality": {"0": "T1", "1": "T2"}, "labels": {"0": "background", "1": "a"}, "training": rows,
         "test": ["./imagesTs/Y.nii.gz"]}))
    opened = open_data(config(nnunet / "dataset.json", tmp_path, labels=True), 0, print)
    assert opened.channels == 2 and opened.classes == 3


def test_channels_are_the_files_in_their_order(nnunet, tmp_path):
    item = list_items(nnunet)["training"][1]
    array = load(item, DataConfig(modality="voxel", voxel_scale=(1000.0,) * 2)).volumes[0][0]
    for k in range(2):
        alone = list_items(nnunet / "imagesTr" / f"X_001_000{k}.nii.gz")["training"][0]
        expected = load(alone, DataConfig(modality="voxel", voxel_scale=(1000.0,))).volumes[0][0]
        assert np.array_equal(array[k], expected[0])
    # The cache knows both files: one that changes is read again.
    opened = open_data(config(nnunet, tmp_path), 0, print)
    before = {entry.name: entry.read() for entry in opened.train + opened.val}
    save(nnunet / "imagesTr" / "X_001_0001.nii.gz", abs(ct_like(SHAPE, 99)))
    opened = open_data(config(nnunet, tmp_path), 0, print)
    after = {entry.name: entry.read() for entry in opened.train + opened.val}
    assert np.array_equal(before["imagesTr/X_000"], after["imagesTr/X_000"])
    assert not np.array_equal(before["imagesTr/X_001"][1], after["imagesTr/X_001"][1])


def test_a_channel_that_is_missing_or_of_another_grid_is_told(nnunet, tmp_path):
    (nnunet / "imagesTr" / "X_000_0001.nii.gz").unlink()
    said = []
    open_data(config(nnunet, tmp_path), 0, said.append)
    assert sum("refused" in line and "_0001" in line for line in said) == 1
    save(nnunet / "imagesTr" / "X_000_0001.nii.gz", ct_like((10, 12, 7)))
    save(nnunet / "imagesTr" / "X_001_0001.nii.gz", ct_like(SHAPE), np.diag([1, 1, 1.5, 1]))
    for item, word in zip(list_items(nnunet)["training"], ("grid is 7,12,10", "affines differ")):
        with pytest.raises(DataError) as error:
            load(item, DataConfig())
        one_line(error, "_0001.nii.gz", word)


def test_a_channel_that_lies_apart_at_two_corners_only_is_told(nnunet):
    """Sheared by 1 mm so that the first and the last voxel stay where they are, others do not."""
    affine = np.eye(4)
    affine[0, :2] += 1 / (SHAPE[0] - 1), -1 / (SHAPE[1] - 1)
    save(nnunet / "imagesTr" / "X_000_0001.nii.gz", ct_like(SHAPE), affine)
    with pytest.raises(DataError, match="lies up to 1 mm away .* affines differ"):
        load(list_items(nnunet)["training"][0], DataConfig())


def test_numbered_cases_are_no_channels(tmp_path):
    for n in range(3):
        save(tmp_path / "d" / "imagesTr" / f"case_{n:04d}.nii.gz", ct_like(SHAPE, n))
        save(tmp_path / "d" / "labelsTr" / f"case_{n:04d}.nii.gz", ct_like(SHAPE, n) * 0)
    items = list_items(tmp_path / "d", True)["training"]
    assert len(items) == 3 and not any(item.more or item.fault for item in items)


def test_a_list_of_files_is_one_image_and_goes_through_predict(nnunet, tmp_path):
    rows = [{"image": [f"nnunet/imagesTr/{case}_000{k}.nii.gz" for k in range(2)]}
            for case in ("X_000", "X_001")]
    (tmp_path / "list.json").write_text(json.dumps({"training": rows}))
    words = [*TINY, "--vae.base_channels", "4", "--train.steps", "1", "--data", str(tmp_path / "list.json")]
    assert train.main([*words, "--data.cache_dir", str(tmp_path / "c"), "--out", str(tmp_path / "run")]) == 0
    argv = ["reconstruct", "--checkpoint", str(tmp_path / "run"), "--device", "cpu", "--output"]
    assert predict.main([*argv, str(tmp_path / "o"), "--input", str(nnunet / "imagesTs")]) == 0
    assert nib.load(tmp_path / "o" / "Y.nii.gz").shape == (*SHAPE, 2)


@pytest.mark.parametrize("labels", [
    {"background": 0, "liver": 1, "tumour": 2, "ignore": 3},                     # version 2
    {"0": "background", "1": "liver", "2": "tumour", "3": "ignore"},             # version 1
])
@pytest.mark.parametrize("place", ["", "imagesTr"])
def test_labels_of_dataset_json_have_names_and_an_ignored_one(labels, place, nnunet, tmp_path):
    content = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels}
    (nnunet / "dataset.json").write_text(json.dumps(content))
    label = np.zeros(SHAPE, np.uint8)
    label[2:4], label[6:] = 1, 3                                 # no tumour
    for path in (nnunet / "labelsTr").iterdir():
        save(path, label)
    said: list[str] = []
    fields = {"path": str(nnunet / place), "cache_dir": str(tmp_path / "cache"), "patch": (4, 4, 4)}
    cfg = changed(TrainConfig(task="seg", preset="unet_light"), data=fields)
    cfg, dataset = run_data(cfg, named(TASKS, "seg"), said.append)
    assert dataset.classes == 3 and dataset.class_names == ("background", "liver", "tumour")
    assert cfg.data.ignore_label == dataset.cfg.ignore_label == 3, "where the loss looks"
    assert set(np.unique(dataset.train[0].read_label())) == {0, 1, 3}
    assert facts_of(dataset)["class_names"] == ["background", "liver", "tumour"]
    assert sum("0 background, 1 liver, 2 tumour" in line for line in said) == 1
    assert sum("`ignore` label: 3" in line for line in said) == 1
    shares = predict.shares_text([label % 3], np.arange(3), dataset.class_names)
    assert shares == "share of label 1 liver: 20 %", shares


def test_regions_of_dataset_json_are_told_and_their_values_are_classes(nnunet, tmp_path):
    """BraTS as nnU-Net has it: the tumour is 1, 2 and 3, its core 2 and 3. No file has a 3."""
    labels = {"background": 0, "tumour": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
    (nnunet / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "regions_class_order": [1, 2, 3]}))
    label = np.zeros(SHAPE, np.uint8)
    label[2:4], label[6:] = 1, 2
    for path in (nnunet / "labelsTr").iterdir():
        save(path, label)
    said: list[str] = []
    fields = {"path": str(nnunet), "cache_dir": str(tmp_path / "cache"), "patch": (4, 4, 4)}
    cfg = changed(TrainConfig(task="seg", preset="unet_light"), data=fields)
    _, dataset = run_data(cfg, named(TASKS, "seg"), said.append)
    assert dataset.classes == 4 and dataset.class_names == ("background", "1", "2", "enhancing")
    (line,) = (line for line in said if "regions" in line)
    assert "(tumour = 1 + 2 + 3; core = 2 + 3)" in line and "each stored value is a class" in line


def test_what_is_no_class_of_dataset_json(tmp_path):
    odd = {"whole": [1, "2"], "none": [], "a": True, "b": -1, "c": 10**9, "5": 6}
    for content in ({"labels": odd}, {"labels": [1]}, {}):
        (tmp_path / "dataset.json").write_text(json.dumps(content))
        found = declared_labels(tmp_path)
        assert found.names == ({6: "5"} if "5" in content.get("labels", ()) else {}) and found.ignored is None
