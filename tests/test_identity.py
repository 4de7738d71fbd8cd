"""A file is its path below the data's root, wherever it is named, and what it holds."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import predict
import train
from predictions import TINY, ct_file, use
from training.facts import Trained, is_same_training
from volume_files import config, ct_like, quiet, save
from volumes.find import Item, list_items

SMALL = [*TINY, "--vae.base_channels", "4", "--train.steps", "1"]


def trained(tmp_path: Path, folder: Path) -> Path:
    out = tmp_path / "run"
    assert train.main([*SMALL, "--data", str(folder), "--data.cache_dir", str(tmp_path / "cache"),
                       "--out", str(out)]) == 0
    return out


def evaluated(tmp_path: Path, run: Path, folder: Path, split: str = "held-out") -> set[str]:
    argv = ["evaluate", "--checkpoint", str(run), "--data", str(folder), "--split", split, "--device", "cpu"]
    assert predict.main([*argv, "--json", str(tmp_path / "e.json")]) == 0
    return {row["name"] for row in json.loads((tmp_path / "e.json").read_text())["volumes"]}


def test_a_file_of_a_folder_for_each_case_is_known_by_its_folder(tmp_path, capsys):
    folder = tmp_path / "data"
    for n in range(4):
        ct_file(folder / f"s{n}" / "ct.nii.gz", seed=n)
    run = trained(tmp_path, folder)
    facts = torch.load(run / "best.pt", weights_only=True)["data"]
    left = {f"s{n}/ct" for n in range(4)} - set(facts["training"])
    assert len(facts["training"]) == 3 and len(left) == 1
    assert evaluated(tmp_path, run, folder) == left
    assert "trained on 3 of 4 files" in capsys.readouterr().out
    # Named by another folder, or moved, they are the same files.
    name, = left
    inside = folder / facts["training"][0].split("/")[0]
    argv = ["evaluate", "--checkpoint", str(run), "--split", "held-out", "--device", "cpu", "--data"]
    assert predict.main([*argv, str(inside)]) == 2
    folder.rename(tmp_path / "moved")
    assert evaluated(tmp_path, run, tmp_path / "moved") == left
    # Pictures are of that file.
    pictures = [path.name for path in (run / "samples").glob("*.png")]
    assert pictures and all(f"_{name.replace('/', '_')}." in picture for picture in pictures)


def test_another_folders_file_of_that_name_was_not_trained_on(tmp_path, capsys):
    for number, name in enumerate(("a", "pat_t001")):
        ct_file(tmp_path / "site1" / f"{name}.nii.gz", seed=number)
    for number, name in enumerate(("a", "b", "pat")):
        ct_file(tmp_path / "site2" / f"{name}.nii.gz", seed=10 + number)
    run = trained(tmp_path, tmp_path / "site1")
    assert evaluated(tmp_path, run, tmp_path / "site2") == {"a", "b", "pat"}
    assert "trained on 0 of 3 files" in capsys.readouterr().out
    assert evaluated(tmp_path, run, tmp_path / "site1", "all") == {"a", "pat_t001"}
    assert "trained on 1 of 2 files" in capsys.readouterr().out


def test_a_checkpoint_with_bare_names_still_serves_and_says_what_it_cannot(tmp_path, capsys):
    folder = tmp_path / "data"
    for n in range(3):
        ct_file(folder / f"s{n}" / f"ct{n}.nii.gz", seed=n)
    run = trained(tmp_path, folder)
    content = torch.load(run / "best.pt", weights_only=True)
    names = content["data"].pop("files") and content["data"]["training"]
    content["data"]["training"] = [name.split("/")[1] for name in names]
    torch.save(content, tmp_path / "old.pt")
    left = {f"s{n}/ct{n}" for n in range(3)} - set(names)
    assert evaluated(tmp_path, tmp_path / "old.pt", folder) == left
    assert "bare names" in capsys.readouterr().out


def test_bare_names_of_an_older_checkpoint_are_compared_as_they_were(tmp_path):
    for n in range(3):
        save(tmp_path / "in" / f"s{n}" / "ct.nii.gz", ct_like((8, 8, 8), n))
    dataset = data.open_data(config(tmp_path / "in", tmp_path), 0, quiet)
    assert is_same_training({"training": ["ct", "ct-2"]}, dataset)
    assert not is_same_training({"training": ["ct", "other"]}, dataset)


def test_a_time_point_is_a_number_of_a_file_and_no_ending_of_a_name(tmp_path):
    save(tmp_path / "in" / "x" / "four.nii.gz", np.stack([ct_like((8, 8, 8), t) for t in range(3)], -1))
    save(tmp_path / "in" / "pat_t001.nii.gz", ct_like((8, 8, 8), 9))
    dataset = data.open_data(config(tmp_path / "in", tmp_path), 0, quiet)
    entries = sorted(dataset.train + dataset.val, key=lambda entry: entry.name)
    assert [(entry.name, entry.file, entry.volume) for entry in entries] == [
        ("pat_t001", "pat_t001", None),
        ("x/four_t000", "x/four", 0), ("x/four_t001", "x/four", 1), ("x/four_t002", "x/four", 2),
    ]


def test_files_of_a_datalist_are_named_below_the_folder_that_holds_them(tmp_path):
    for name in ("p0/ct", "p1/ct"):
        save(tmp_path / "data" / f"{name}.nii.gz", ct_like((8, 8, 8)))
    files = [str(tmp_path / "data" / f"p{n}" / "ct.nii.gz") for n in range(2)]
    (tmp_path / "lists").mkdir()
    for place in ("data/list.json", "lists/list.json"):
        (tmp_path / place).write_text(json.dumps({"training": files}))
        assert [item.name for item in list_items(tmp_path / place)["training"]] == ["p0/ct", "p1/ct"]


def test_an_older_checkpoint_names_volumes_by_whose_file_they_are_known():
    """It has bare names alone, and X_t003 for volume 3 of the 4-D file X."""
    trained = Trained({"training": ["scan_t000", "scan_t001", "other"]})
    names = ("scan", "other", "third", "scan_t")
    found = [name for name in names if Item(Path("in", f"{name}.nii.gz")) in trained]
    assert found == ["scan", "other"]


@pytest.mark.parametrize("letter", ["c", "\u00e9", "\u6f22"])                  # 1, 2 and 3 bytes each
def test_long_names_are_cut_and_stay_apart(letter, tmp_path):
    long = letter * (240 // len(letter.encode()))
    for folder, stem in ((long, f"{long}1"), (long, f"{long}2"), (long + "2", f"{long}1"), ("x", "y" * 180)):
        assert len(os.fsencode(f"{stem}.npy")) > 180
        (tmp_path / "in" / folder).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "in" / folder / f"{stem}.npy", ct_like((9, 8, 8)))
    items = list_items(tmp_path / "in")["training"]
    names = [item.name for item in items]
    assert len(set(names)) == 4 and f"x/{'y' * 180}" in names, "up to 180 bytes nothing is cut"
    assert all(len(part.encode()) <= 180 for name in names for part in name.split("/"))
    assert names == [item.name for item in list_items(tmp_path / "in")["training"]]
    opened = data.open_data(config(tmp_path / "in", tmp_path, modality="ct"), 0, quiet)
    assert len(opened.train + opened.val) == 4
    alone = [Item(item.path).known_as for item in items]
    assert all(len(name.encode()) <= 180 for name in alone) and len(set(alone)) == 3


def pictured(tmp_path, *words: str) -> Path:
    """The run folder of one step on tmp_path/in, with pictures at its end."""
    out = tmp_path / "run"
    argv = [*SMALL, "--log.sample_every", "1", "--patch", "8,8,8", "--out", str(out)]
    argv += ["--data", str(tmp_path / "in"), "--data.cache_dir", str(tmp_path / "cache")]
    assert train.main([*argv, *words]) == 0
    return out


def test_names_of_250_bytes_train_and_come_back(tmp_path, runs, capsys):
    for letter in "ab":
        save(tmp_path / "in" / ("d" * 200) / (letter * 247 + ".nii.gz"), ct_like((12, 12, 8)))
    out = pictured(tmp_path)
    assert len(list((out / "samples").glob("step_000001_*"))) == 2
    assert "no picture" not in capsys.readouterr().out
    for command in ("reconstruct", "encode"):
        assert use(command, runs("kl"), "--input", tmp_path / "in", "--output", tmp_path / command) == 0
        assert len([path for path in (tmp_path / command).rglob("*") if path.name[0] in "ab"]) == 2


def test_a_picture_that_fails_is_a_line(tmp_path, monkeypatch, capsys):
    calls = []

    def fails(path, array, affine):
        calls.append(path)
        raise OSError(28, "No space left on device")
    monkeypatch.setattr("training.validation.write_nifti", fails)
    save(tmp_path / "in" / "a.nii.gz", ct_like((12, 12, 8)))
    pictured(tmp_path)
    lines = [line for line in capsys.readouterr().out.splitlines() if "no picture of a" in line]
    assert len(calls) == len(lines) == 1 and all("No space left" in line for line in lines)


def test_samples_of_two_folders_do_not_replace_each_other(tmp_path):
    for name in ("a/b", "a_b", "c"):
        save(tmp_path / "in" / f"{name}.nii.gz", ct_like((12, 12, 8)))
    pairs = {"training": ["in/c.nii.gz"], "validation": ["in/a/b.nii.gz", "in/a_b.nii.gz"]}
    (tmp_path / "list.json").write_text(json.dumps(pairs))
    out = pictured(tmp_path, "--data", str(tmp_path / "list.json"), "--train.val_whole", "true")
    assert {path.name for path in (out / "samples").glob("*1_*.png")} == {
        "step_000001_in_a_b.png", "step_000001_in_a_b-2.png"}
