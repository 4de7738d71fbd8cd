"""volumes/splits.py: whose files are whose, who is held out, folds, and turns of validation crops."""
import json

import numpy as np
import pytest

from data import open_data, val_crops
from volume_files import config, ct_like, one_line, save
from volumes.config import DataConfig
from volumes.entries import Entry
from volumes.files import DataError
from volumes.intensities import Intensity
from volumes.splits import in_turn, patients_of, split


def entry(file, patient=None, volume=None, fold=None):
    name = file if volume is None else f"{file}_t{volume:03d}"
    return Entry(name, f"/data/{file}.nii.gz", (1, 4, 4, 4), (1, 1, 1), np.eye(4),
                 Intensity("ct", (-1000.0,), (1000.0,)), "store", file=file, volume=volume,
                 patient=patient, fold=fold)


def found(names, **fields):
    patients, how = patients_of([entry(name) for name in names], DataConfig(**fields))
    return patients, how


@pytest.mark.parametrize("names, expected, how", [
    ([f"p{p}/{kind}" for p in range(6) for kind in ("t1", "t2", "flair", "t1ce")],
     [f"p{p}" for p in range(6) for _ in range(4)], "folders"),
    ([f"{grade}/B_{n}/B_{n}_{kind}" for n, grade in enumerate(("HGG", "LGG", "HGG"))
      for kind in ("t1", "t2")],
     [f"{grade}/B_{n}" for n, grade in enumerate(("HGG", "LGG", "HGG")) for _ in range(2)], "folders"),
    ([f"s{s}/ct" for s in range(5)], [f"s{s}" for s in range(5)], "folders"),
    ([f"p{p}/ses-{s}/t1" for p in range(3) for s in range(2)],
     ["p0", "p0", "p1", "p1", "p2", "p2"], "folders"),
    ([f"p{p}/201{p}-0{s}-03/x{s}" for p in range(3) for s in range(2)],
     ["p0", "p0", "p1", "p1", "p2", "p2"], "folders"),
    ([f"sub-0{p}/ses-1/anat/sub-0{p}_T{k}w" for p in range(3) for k in (1, 2)],
     [f"sub-0{p}" for p in range(3) for _ in range(2)], "BIDS"),
    (["sub-1_T1w", "sub-1_T2w", "sub-2_T1w"], ["sub-1", "sub-1", "sub-2"], "BIDS"),
    (["a", "b", "c"], ["a", "b", "c"], "each file a patient of its own"),
    ([f"images/c{n}" for n in range(4)], [f"images/c{n}" for n in range(4)],
     "each file a patient of its own"),
    (["site1/a", "site1/pat_t001", "site2/a", "site2/b", "site2/d"],
     ["site1/a", "site1/pat_t001", "site2/a", "site2/b", "site2/d"], "each file a patient of its own"),
    ([f"{kind}/s{n:02d}" for kind in ("t1", "t2") for n in range(5)],
     [f"name s{n:02d}" for _ in range(2) for n in range(5)], "names that repeat"),
    (["smith/ct", "jones/ct", "li/ct"], ["smith", "jones", "li"], "folders"),
    (["smith/x/ct", "jones/x/ct"], ["smith/x", "jones/x"], "folders"),
    (["smith/t1", "smith/t2", "jones/t1", "jones/t2"], ["smith", "smith", "jones", "jones"], "folders"),
    (["t1/p", "t2/p"], ["name p", "name p"], "names that repeat"),
    (["axial/a", "axial/b", "coronal/a", "coronal/b"], ["name a", "name b"] * 2, "names that repeat"),
])
def test_auto_finds_patients(names, expected, how):
    patients, said = found(names)
    assert patients == expected and how in said


def test_patients_by_file_folder_and_expression():
    names = ["a/x1_t1", "a/x1_t2", "b/x2_t1"]
    assert found(names, patient="file")[0] == names
    assert found(names, patient="folder")[0] == ["a", "a", "b"]
    assert found(names, patient="(x[0-9])")[0] == ["x1", "x1", "x2"]
    assert found(names, patient=r"(x\d)_t\d\.nii")[0] == ["x1", "x1", "x2"]
    with pytest.raises(DataError) as error:
        found([*names, "other"], patient="(x[0-9])")
    one_line(error, "1 of 4", "other", "data.patient")
    for wrong in ("x[0-9]", "(a)(b)", "(", "FILE"):
        with pytest.raises(ValueError, match="data.patient is"):
            DataConfig(patient=wrong)


def test_whole_patients_are_held_out_and_it_is_said(tmp_path):
    for p in range(6):
        for k, kind in enumerate(("t1", "t2", "flair", "t1ce")):
            save(tmp_path / "in" / f"p{p}" / f"{kind}.nii.gz", ct_like((8, 8, 8), 10 * p + k))
    said = []
    opened = open_data(config(tmp_path / "in", tmp_path), 0, said.append)
    train, val = ({each.patient for each in entries} for entries in (opened.train, opened.val))
    assert not train & val and len(train | val) == 6 and len(val) == 1 and len(opened.val) == 4
    assert sum("6 patients in 24 files: by their folders" in line for line in said) == 1
    # The same patients whatever the run's seed, where data.split_seed is given.
    for seed in range(4):
        again = open_data(config(tmp_path / "in", tmp_path, split_seed=0), seed, said.append)
        assert [each.name for each in again.val] == [each.name for each in opened.val]
    # Every patient is held out in one of the folds.
    folds = [open_data(config(tmp_path / "in", tmp_path, fold=f"{k}/4"), 0, said.append) for k in range(4)]
    held_out = [{each.patient for each in fold.val} for fold in folds]
    assert set.union(*held_out) == train | val and sum(map(len, held_out)) == 6
    for fold in folds:
        assert not {each.patient for each in fold.train} & {each.patient for each in fold.val}
    with pytest.raises(DataError) as error:
        open_data(config(tmp_path / "in", tmp_path, fold="0/7"), 0, said.append)
    one_line(error, "data.fold=0/7", "6 patients")
    for wrong in ("5/5", "1/1", "x", "-1/3", "1/"):
        with pytest.raises(ValueError, match="data.fold is"):
            DataConfig(fold=wrong)


def test_keys_of_a_datalist_say_patient_and_fold(tmp_path):
    rows = []
    for n in range(6):
        save(tmp_path / f"f{n}.nii.gz", ct_like((8, 8, 8), n))
        rows.append({"image": f"f{n}.nii.gz", "case_id": n // 2, "fold": n // 2})
    (tmp_path / "list.json").write_text(json.dumps({"training": rows}))

    def held_out(**fields):
        opened = open_data(config(tmp_path / "list.json", tmp_path, **fields), 0, said.append)
        return [each.file for each in opened.val]
    said = []
    assert held_out() == ["f0", "f1"] and held_out(fold="2") == held_out(fold="2/3") == ["f4", "f5"]
    assert any("3 patients in 6 files: by the datalist's keys" in line for line in said)
    assert any("fold 0 of the datalist's 3" in line for line in said)
    assert not any("both" in line for line in said)
    for wrong in ("3", "0/4"):
        with pytest.raises(DataError) as error:
            held_out(fold=wrong)
        one_line(error, f"data.fold={wrong}", "0, 1, 2")
    # Patients of a validation list that are trained on are told.
    for row in rows:
        row.pop("fold")
    (tmp_path / "list.json").write_text(json.dumps({"training": rows[:5], "validation": rows[5:]}))
    said.clear()
    assert held_out() == ["f5"] and any("1 patient is in both" in line for line in said)
    with pytest.raises(DataError) as error:
        held_out(fold="0/2")
    one_line(error, "`validation` list", "data.fold=0/2")
    (tmp_path / "list.json").write_text(json.dumps({"training": [{"image": "f0.nii.gz", "fold": "a"}]}))
    with pytest.raises(DataError) as error:
        held_out()
    one_line(error, "training[0]", "fold 'a'")


def test_one_file_under_two_spellings_is_told(tmp_path):
    folder = tmp_path / "both"
    array = ct_like((8, 8, 8), 1)
    save(folder / "p0.nii.gz", array)
    save(folder / "p0.nii", array)
    save(folder / "p1.nii.gz", ct_like((8, 8, 8), 2))
    (folder / "link.nii.gz").symlink_to(folder / "p1.nii.gz")
    (folder / "copy.nii.gz").write_bytes((folder / "p1.nii.gz").read_bytes())
    for spelling, trained in (("../both/p0.nii.gz", "p0.nii.gz"), ("p0.nii", "p0.nii.gz"),
                              ("link.nii.gz", "p1.nii.gz"), ("copy.nii.gz", "p1.nii.gz")):
        (folder / "list.json").write_text(json.dumps({"training": [trained], "validation": [spelling]}))
        said = []
        open_data(config(folder / "list.json", tmp_path), 0, said.append)
        assert sum("1 file is in both training and validation" in line for line in said) == 1, spelling
    # In a folder they are one patient's.
    opened = open_data(config(folder, tmp_path, val_fraction=0.5), 0, said.append)
    sides = [{each.file for each in entries} for entries in (opened.train, opened.val)]
    assert ("p0" in sides[0]) != ("p0" in sides[1])


def test_one_patient_alone_is_split_by_file_and_that_is_said():
    said = []
    groups = [[entry(f"p/{k}", "p")] for k in range(5)]
    training, held_out = split(groups, DataConfig(), 0, said.append)
    assert len(training) == 4 and len(held_out) == 1 and "one patient only" in said[0]


def test_validation_crops_are_spread_over_patients_and_a_series_counts_as_one(tmp_path):
    save(tmp_path / "in" / "four.nii.gz", np.stack([ct_like((8, 8, 8), t) for t in range(20)], -1))
    for n in range(4):
        save(tmp_path / "in" / f"c{n}.nii.gz", ct_like((8, 8, 8), 100 + n))
    (tmp_path / "in" / "list.json").write_text(json.dumps(
        {"training": ["c0.nii.gz"], "validation": ["four.nii.gz", "c1.nii.gz", "c2.nii.gz", "c3.nii.gz"]}))
    opened = open_data(config(tmp_path / "in" / "list.json", tmp_path), 0, print)
    crops = val_crops(opened, 0, 8)
    assert sorted(crop.entry.file for crop in crops) == ["c1", "c1", "c2", "c2", "c3", "c3", "four", "four"]
    assert len({crop.entry.name for crop in crops if crop.entry.file == "four"}) == 2
    # Of several files of a patient each has its turn, and so has each volume.
    entries = [entry("a/x", "a", t) for t in range(3)] + [entry("a/y", "a"), entry("b/x", "b")]
    chosen = in_turn(entries, 0, 12)
    assert [each.patient for each in chosen].count("a") == 6
    assert [each.name for each in chosen].count("a/y") == 3
    assert {each.name for each in chosen if each.file == "a/x"} == {f"a/x_t00{t}" for t in range(3)}
