"""volumes/find.py: folders and datalists, and which label goes with which image."""
import json
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data import Crops, open_data, val_crops
from volume_files import config, ct_like, one_line, pair_like, quiet, said_and_data, save
from volumes.files import DataError
from volumes.find import Item, list_items


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
    names = [item.path.name for item in list_items(root)["training"]]
    assert names == ["pair.hdr", "points.bin", "ü space.nii", "again.nii.gz", "broken.nii", "two.NII"], (
        "each file once, sorted"
    )
    with pytest.raises(DataError) as error:
        list_items(tmp_path / "absent")
    one_line(error, "absent", "no such file or folder")


def test_datalists(folder, tmp_path):
    def lists(content: object, name: str = "list.json") -> dict[str, list[Item]]:
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
        return list_items(folder / name)

    found = lists(
        {
            "name": "Task",
            "numTraining": 2,
            "training": [{"image": "./case0.nii.gz", "label": "./l.nii.gz"}, "case1.nii.gz"],
            "test": ["./case2.nii.gz"],
        }
    )  # Decathlon
    assert [[item.path.name for item in items] for items in found.values()] == [
        ["case0.nii.gz", "case1.nii.gz"],
        [],
        ["case2.nii.gz"],
    ]
    found = lists(
        {
            "training": [{"image": str(folder / "case0.nii.gz"), "class": "CT"}],
            "validation": ["case1.nii.gz", "case2.nii.gz"],
        }
    )
    assert found["training"][0].kind == "CT"
    opened = open_data(config(folder / "list.json", tmp_path), 0, quiet)
    assert [entry.name for entry in opened.train] == ["case0"] and [entry.name for entry in opened.val] == [
        "case1",
        "case2",
    ]
    for content in (
        "{",
        "[" * 100_000,
        "[1]",
        "3",
        {"training": 5},
        {"training": [5]},
        {"training": [{"label": "x"}]},
        {"validation": []},
        {"training": [{"image": ["a", 5]}]},
        {"training": [{"image": []}]},
        {"training": [""]},
        {"training": ["a\0b"]},
        {"training": [], "testing": "x"},
        "\xff\xfe",
    ):
        with pytest.raises(DataError) as error:
            lists(content, "bad.json")
        one_line(error, "bad.json")


def test_pairs_in_every_form(tmp_path):
    image, label = pair_like((9, 10, 11))
    root = tmp_path / "in"
    names = {
        "images/a.nii.gz": "labels/a.nii.gz",
        "images/deep/b.nii": "labels/deep/b_seg.nii.gz",
        "imgs/c.nii.gz": "masks/c_mask.nii.gz",
        "c/images/x_image.nii": "c/labels/x_label.nii",
        "d/X_image.nii.gz": "d/X_label.nii.gz",
        "d/Y.nii.gz": "d/Y_seg.nii.gz",
        "e/Q_IMAGE.nii.gz": "e/Q_Label.nii.gz",
    }
    for number, (a, b) in enumerate(names.items()):
        save(root / a, image + 0, np.diag([1, 1, 1 + number, 1.0]))
        save(root / b, label, np.diag([1, 1, 1 + number, 1.0]))
    np.savez(root / "both_seg.npz", vol=image, seg=label.astype(np.float64))
    np.save(root / "f_image.npy", image)
    np.save(root / "f_label.npy", label)
    items = list_items(root, labels=True)["training"]
    found = {str(item.path.relative_to(root)): str(item.label.relative_to(root)) for item in items}
    assert found == {**names, "both_seg.npz": "both_seg.npz", "f_image.npy": "f_label.npy"} and not any(
        item.fault for item in items
    )
    said, opened = said_and_data(root, tmp_path)
    assert (
        len(opened.train) + len(opened.val) == 9
        and opened.classes == 4
        and not any("refused" in line for line in said)
    )
    expected = label.transpose(2, 1, 0)
    for entry in opened.train + opened.val:
        assert np.array_equal(entry.read_label(), expected) and entry.read_label().dtype == np.int64, (
            entry.name
        )
        assert np.load(entry.label, mmap_mode="r").dtype == np.uint8 and entry.label_ids == (0, 1, 2, 3)
    # A file by itself finds its label.
    for name in ("d/X_image.nii.gz", "both_seg.npz", "images/a.nii.gz", "d/Y.nii.gz"):
        (item,) = list_items(root / name, labels=True)["training"]
        assert item.label.name == Path(found[name]).name and not item.fault
    (root / "list.json").write_text(
        json.dumps({"training": [{"image": "d/X_image.nii.gz", "label": "labels/a.nii.gz"}, "both_seg.npz"]})
    )
    items = list_items(root / "list.json", labels=True)["training"]
    assert [str(item.label.relative_to(root)) for item in items] == ["labels/a.nii.gz", "both_seg.npz"]


def test_files_without_a_partner_are_a_line_each_and_the_others_train(tmp_path):
    image, label = pair_like((9, 10, 11))
    root = tmp_path / "in"
    for name in ("d/X_image", "d/Z_image", "images/a", "images/b"):
        save(root / f"{name}.nii.gz", image)
    for name in ("d/X_label", "d/torso_3mm_label", "labels/a", "labels/c"):
        save(root / f"{name}.nii.gz", label)
    said, opened = said_and_data(root, tmp_path)
    assert {entry.name for entry in opened.train + opened.val} == {"d/X_image", "images/a"}
    refused = [line for line in said if line.startswith("data: refused")]
    assert len(refused) == 4 and all("\n" not in line for line in refused)
    for name, word in (
        ("Z_image", "no label"),
        ("b", "no label"),
        ("torso_3mm_label", "without its image"),
        ("c", "without its image"),
    ):
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
    assert {e.name for e in opened.train + opened.val} == {
        "d/X_image", "images/a", "images/b", "alone_label", "d/vol_and_seg"
    }
    assert opened.classes == 0 and all(e.label is None for e in opened.train)
    assert [line for line in said if "left out 4 label files" in line]
    assert len(Crops(opened, 0)[0]) == 2 and val_crops(opened, 0, 1)[0].label is None
    plain = open_data(config(root / "d" / "X_image.nii.gz", tmp_path, modality="voxel"), 0, quiet)
    assert plain.train[0].store in {entry.store for entry in opened.train + opened.val}, (
        "the same cache with and without pairs around"
    )


def test_ignored_files_are_counted_by_kind(tmp_path):
    save(tmp_path / "in" / "a.nii.gz", np.ones((3, 3, 3), np.float32))
    nib.save(nib.Nifti1Pair(np.ones((3, 3, 3), np.float32), np.eye(4)), tmp_path / "in" / "b.hdr")
    names = ["x1.TXT", "x2.txt", "deep/x3.txt", "c.json", "d.csv.gz", "README", ".hidden", ".git/config"]
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"")
    said: list[str] = []
    assert [item.name for item in list_items(tmp_path / "in", say=said.append)["training"]] == ["a", "b"]
    assert said == ["data: ignored: 3 .txt, 1 without an ending, 1 .csv.gz, 1 .json"]
    for number in range(20):
        (tmp_path / "in" / f"y.k{number:02d}").write_bytes(b"")
    said.clear()
    list_items(tmp_path / "in", say=said.append)
    assert said[0].count(",") == 12 and said[0].endswith("12 of other kinds")   # 4 + 20 kinds, 12 are named
    said.clear()
    list_items(tmp_path / "in" / "a.nii.gz", say=said.append)
    assert not said


def test_a_segmentation_beside_one_image_is_its_label(tmp_path):
    """As KiTS has them; with two images beside it nobody knows whose it is, and it is an image as before."""
    for name in ("a/imaging", "a/segmentation", "b/imaging", "b/segmentation", "c/t1", "c/t2", "c/seg"):
        save(tmp_path / f"{name}.nii.gz", ct_like((5, 6, 7)))
    items = list_items(tmp_path, True)["training"]
    pairs = {item.name: item.label and item.label.name for item in items if item.fault is None}
    assert pairs == {f"{case}/imaging": "segmentation.nii.gz" for case in "ab"}
    said: list[str] = []
    names = [item.name for item in list_items(tmp_path, False, said.append)["training"]]
    assert names == ["a/imaging", "b/imaging", "c/seg", "c/t1", "c/t2"]
    assert sum("left out 2 label files" in line for line in said) == 1


def test_a_list_that_is_no_json_is_told(tmp_path):
    for name in ("list.txt", "list.csv"):
        (tmp_path / name).write_text("a.nii.gz\nb.nii.gz\n")
        with pytest.raises(DataError) as error:
            list_items(tmp_path / name)
        one_line(error, name, "neither a volume nor a datalist", '{"training": [')
