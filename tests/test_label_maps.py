"""Labels from disk to crop: volumes/loading.py and volumes/classes.py."""
import json
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

from data import Crops, Data, WholeVolumes, open_data, val_crops
from volume_files import REAL, config, matches, needs_real, one_line, pair_like, said_and_data, save
from volumes.files import DataError


@pytest.mark.parametrize(("make", "words"), [
    (lambda label: label + np.float32(0.5) * (label == 2), ("no whole numbers, first",)),
    (lambda label: label.astype(np.int16) - 1, ("labels from -1 to 2", "data.ignore_label")),
    (lambda label: np.where(label == 1, np.nan, label).astype(np.float32), ("NaN",)),
    (lambda label: label.astype(np.int32) * 40000, ("labels from 0 to 120000",)),
    (lambda label: label[:-1], ("its grid is 11,10,8", "9")),
    (lambda label: np.stack([label] * 2, -1), ("2 volumes",)),
    (lambda label: np.arange(label.size).reshape(label.shape).astype(np.int16) * 30, ("labels from",)),
])
def test_bad_labels_are_one_line(make, words, tmp_path):
    image, label = pair_like((9, 10, 11))
    save(tmp_path / "in" / "good_image.nii.gz", image)
    save(
        tmp_path / "in" / "good_label.nii.gz", label.astype(np.float32)
    )  # float files of whole numbers are fine
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
    (tmp_path / "list.json").write_text(
        json.dumps({"training": [{"image": "a_image.nii", "label": "l.npy"}]})
    )
    assert "no orientation" in refusal()


def test_label_in_another_axis_order_lies_on_its_image(tmp_path):
    image, label = pair_like((9, 10, 11))
    affine = np.diag([1.0, 2.0, 3.0, 1])
    save(tmp_path / "in" / "a_image.nii.gz", image, affine)
    turned = nib.Nifti1Image(label, affine).as_reoriented(
        nib.orientations.axcodes2ornt(("S", "L", "P"), (("L", "R"), ("P", "A"), ("I", "S")))
    )
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

    def opened(**fields) -> Data:
        return said_and_data(tmp_path / "in", tmp_path, **fields)[1]

    plain = opened()
    assert plain.classes == 4 and plain.label_values == (0, 7, 40, 255)
    assert np.array_equal(plain.train[0].read_label(), expected)
    assert opened(ignore_label=255).label_values == (0, 7, 40)
    as_stored = opened(classes=256)
    assert as_stored.classes == 256 and as_stored.label_values is None
    assert as_stored.train[0].read_label().max() == 255
    for fields, labels, classes in (
        ({"label_values": (0, 7, 40, 255)}, (0, 1, 2, 3), 4),
        ({"label_values": (0, 40)}, (0, 0, 1, 0), 2),
        ({"label_values": (0, 40, 7), "ignore_label": 255}, (0, 2, 1, 255), 3),
        ({"classes": 41, "ignore_label": 255}, (0, 7, 40, 255), 41),
    ):
        got = opened(**fields)
        assert got.classes == classes and got.train[0].label == plain.train[0].label, (
            "the cache holds what is stored"
        )
        assert np.array_equal(got.train[0].read_label(), np.array(labels)[expected]), fields
        region = (slice(2, 5), slice(0, 4), slice(3, 9))
        assert np.array_equal(got.train[0].read_label(region), np.array(labels)[expected][region])
        assert Crops(got, 0)[0][1].max() <= max(labels)
    for fields, word in (
        ({"classes": 41}, "no training volume has labels below data.classes=41"),
        ({"label_values": (0, 7), "ignore_label": 1}, "data.ignore_label=1"),
    ):
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


@pytest.mark.parametrize("kind", [".nii.gz", ".npy", ".npz", ".mgz", "both.npz", ".hdr"])
@pytest.mark.parametrize("values", [(0, 255), (0, 5, 20), (0, 1000, 3000), (7, 9)])
def test_gaps_are_closed_in_every_format(kind, values, tmp_path):
    rng = np.random.default_rng(0)
    root = tmp_path / "in"
    stored = [rng.choice(values, (9, 10, 11)).astype(np.int16) for _ in range(3)]
    for number, label in enumerate(stored):
        (root / "images").mkdir(parents=True, exist_ok=True)
        (root / "labels").mkdir(exist_ok=True)
        image = label.astype(np.float32)
        if kind == "both.npz":
            np.savez(root / f"{number}.npz", vol=image, seg=label)
        for folder, array in (("images", image), ("labels", label)):
            path = root / folder / f"{number}{kind}"
            if kind == ".npy":
                np.save(path, array)
            elif kind == ".npz":
                np.savez(path, vol=array)
            elif kind == ".mgz":
                nib.save(nib.MGHImage(array, np.eye(4)), path)
            elif kind == ".hdr":
                nib.save(nib.Nifti1Pair(array, np.eye(4)), path)
            elif kind == ".nii.gz":
                save(path, array)
    wanted = sorted({0, *values})
    for fields in ({}, {"classes": len(wanted)}):
        said, opened = said_and_data(root, tmp_path, **fields)
        assert opened.classes == len(wanted) and opened.label_values == tuple(wanted)
        (line,) = [line for line in said if "the labels hold the values" in line]
        one_line(ValueError(line), ",".join(map(str, wanted)), f"classes 0 to {len(wanted) - 1}")
        assert not [line for line in said if "refused" in line]
        assert ("takes them as they are" in line) == (max(values) < 1024), "a number that may be given"
        for entry in opened.train + opened.val:
            whole = stored[int(entry.name[-1])].transpose(2, 1, 0)
            assert np.array_equal(entry.read_label(), np.searchsorted(wanted, whole))


def test_numbers_without_gaps_are_classes_in_silence(tmp_path):
    image, label = pair_like((9, 10, 11))
    save(tmp_path / "in" / "a_image.nii.gz", image)
    save(tmp_path / "in" / "a_label.nii.gz", label)
    said, opened = said_and_data(tmp_path / "in", tmp_path)
    assert opened.label_values is None and not [line for line in said if "hold the values" in line]
    save(tmp_path / "in" / "a_label.nii.gz", label + 1)                          # no background at all
    _, opened = said_and_data(tmp_path / "in", tmp_path)
    assert opened.label_values is None and opened.classes == 5


def test_what_a_held_out_file_has_between_the_training_sets_values(tmp_path):
    image, label = pair_like((9, 10, 11))
    for name, values in (("a", (0, 0, 4, 9)), ("b", (0, 2, 4, 9)), ("c", (0, 2, 4, 11))):
        save(tmp_path / f"{name}_image.nii.gz", image)
        save(tmp_path / f"{name}_label.nii.gz", np.array(values, np.uint8)[label])
    pairs = [{"image": f"{name}_image.nii.gz", "label": f"{name}_label.nii.gz"} for name in "abc"]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs[:1], "validation": pairs[1:]}))
    said, opened = said_and_data(tmp_path / "list.json", tmp_path)
    assert opened.label_values == (0, 2, 4, 9) and [entry.name for entry in opened.val] == ["b_image"]
    assert any("refused" in line and "c_label" in line and "11" in line for line in said)


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
    assert len(opened.train) == len(opened.val) == 1 and any(
        "no usable volume in the `validation` list" in line for line in said
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"flip": "DHW"},
        {"spacing": "random", "zoom": (1.0, 1.0)},
        {"flip": "DHW", "foreground": 0.5},
        {"patch": (14, 6, 20)},
        {"jitter": 0.0, "spacing": "1,1,1"},
    ],
)
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
    for crop in val_crops(opened, 0, 6) + list(WholeVolumes(opened)):
        assert matches(crop.image, crop.label)
    again = Crops(opened, 0)
    assert all(torch.equal(a, b) for i in (7, 3) for a, b in zip(crops[i][:2], again[i][:2]))
    loader = torch.utils.data.DataLoader(crops, batch_size=3, num_workers=0)
    image, label, number = next(iter(loader))
    assert label.shape == (3, *opened.patch) and number.shape == (3,)


def test_zoomed_and_resampled_labels_lie_where_the_image_does(tmp_path):
    """A large ball: where the resampled image is clear of the edge, the label is what it says. Jitter leaves
    labels alone.
    """
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 44, 48)), indexing="ij")
    ball = (((x - 19)**2 + (y - 25)**2 + (z - 20)**2) < 12**2).astype(np.uint8)
    save(tmp_path / "in" / "a_image.nii.gz", ball.astype(np.float32))
    save(tmp_path / "in" / "a_label.nii.gz", ball)
    for fields in (
        {"spacing": "random", "zoom": (0.5, 0.8)},
        {"spacing": "random", "zoom": (1.2, 2.0), "flip": "HW"},
        {"spacing": "2,1.5,0.7"},
        {"resize": (24, 61, 37)},
        {"scale": 0.5},
        {"jitter": 0.3},
    ):
        _, opened = said_and_data(tmp_path / "in", tmp_path, patch=(24, 24, 24), foreground=1, **fields)
        crops, clear, both = Crops(opened, 0), 0.0, 0
        for i in range(8):
            image, label, _ = crops[i]
            sure = (image[0] < 0.05) | (
                image[0] > (0.69 if "jitter" in fields else 0.95)
            )  # the nearest voxel weighs 1/8 or so
            assert ((image[0] > 0.5).long() == label)[sure].all(), fields
            assert ((image[0] > 0.5).long() != label).float().mean() < 0.03, fields
            clear, both = clear + sure.float().mean() / 8, both + (label.unique().numel() == 2)
        assert clear > 0.8 and both > 2, "the test sees no edge"


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
    assert sums == {
        f"{name}_image_t00{t}": 0 if (name, t) == ("each", 1) else total
        for name in ("one", "each")
        for t in range(3)
    }
    _, opened = said_and_data(
        tmp_path / "in" / "one_image.nii.gz", tmp_path, four_d="channels", select_channel=1
    )
    assert opened.train[0].shape == (1, 10, 9, 8) and int(opened.train[0].read_label().sum()) == total


@needs_real
def test_real_pairs(tmp_path):
    said, opened = said_and_data(REAL / "seg", tmp_path, modality="auto", foreground=0.7, patch=(16, 24, 24))
    assert len(opened.train) + len(opened.val) == 7 and opened.classes == 78
    orphans = [line for line in said if line.startswith("data: refused")]
    assert len(orphans) == 3 and all("label without its image" in line for line in orphans)
    crops = Crops(opened, 0)
    labelled = [bool(crops[i][1].any()) for i in range(24)]
    values = np.array(opened.label_values)
    assert sum(labelled) > 12 and all(crop.label.any() for crop in val_crops(opened, 0, 6))
    for entry in opened.train + opened.val:                    # foreground of the body is not air
        source = nib.load(entry.label_path) if entry.label_path.endswith("gz") else None
        if source is not None:
            assert (
                np.bincount(values[entry.read_label()].ravel()).tolist()
                == np.bincount(np.asarray(source.dataobj).ravel()).tolist()
            ), entry.name
    pairs = [
        {
            "image": str(REAL / "ct" / "torso_3mm.nii.gz"),
            "label": str(REAL / "seg" / "torso_3mm_label.nii.gz"),
        }
    ]
    (tmp_path / "list.json").write_text(json.dumps({"training": pairs}))
    _, opened = said_and_data(tmp_path / "list.json", tmp_path, modality="auto")
    image, label = opened.train[0].read()[0], opened.train[0].read_label()
    source = np.asarray(nib.load(REAL / "seg" / "torso_3mm_label.nii.gz").dataobj)
    assert opened.label_values == tuple(np.unique(source))
    assert image[label > 0].mean() > image[label == 0].mean() + 0.2
    said, opened = said_and_data(REAL / "seg", tmp_path, modality="auto", labels=False)
    assert len(opened.train) + len(opened.val) == 7 and any("left out 9 label files" in line for line in said)


def test_a_flip_of_left_and_right_is_told_where_labels_may_have_sides(tmp_path):
    for number, classes in enumerate((4, 2)):
        image, label = pair_like((9, 10, 11), classes=classes)
        save(tmp_path / str(number) / "a_image.nii.gz", image)
        save(tmp_path / str(number) / "a_label.nii.gz", label)
    for folder, flip, is_told in (("0", "W", True), ("0", "dhw", True), ("0", "DH", False),
                                  ("0", "none", False), ("1", "W", False)):
        said, _ = said_and_data(tmp_path / folder, tmp_path, flip=flip)
        lines = [line for line in said if "exchanges left and right in 4 classes" in line]
        assert len(lines) == is_told, (folder, flip)
    said, _ = said_and_data(tmp_path / "0", tmp_path, flip="W", labels=False)
    assert not [line for line in said if "exchanges" in line]


def test_the_experiment_on_ct_keeps_left_and_right():
    content = yaml.safe_load((Path(__file__).resolve().parents[1] / "config" / "seg_ct.yaml").read_text())
    assert "W" not in str(content["data"].get("flip", "none")).upper()
