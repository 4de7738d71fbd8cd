"""volumes/own.py: what this project wrote itself is no data."""
import json
from pathlib import Path

import numpy as np
import pytest

import train
from predictions import use
from volume_files import ct_like, one_line, save
from volumes.find import list_items
from volumes.own import is_latent, is_run_folder, results_of


def names(folder: Path) -> tuple[set[str], list[str]]:
    said: list[str] = []
    lists = list_items(folder, say=said.append)
    return {item.name for item in lists["training"]}, [line for line in said if "left out what" in line]


@pytest.fixture
def three(tmp_path) -> Path:
    for number in range(3):
        save(tmp_path / "in" / f"p{number}.nii.gz", ct_like((16, 14, 12), number))
    return tmp_path / "in"


THREE = {"p0", "p1", "p2"}


@pytest.mark.parametrize(("marks", "is_run"), [
    (("config.yaml", "log.jsonl"), True), (("last.pt", "config.yaml"), True), (("best.pt", "last.pt"), True),
    (("config.yaml",), False), (("best.pt", "report.html"), False), (("config.yml", "log.json"), False),
])
def test_a_run_folder_has_two_of_its_files(marks, is_run, three):
    assert is_run_folder(marks) == is_run
    save(three / "runs" / "x" / "samples" / "step_000004_recon.nii.gz", ct_like((16, 14, 12)))
    for mark in marks:
        (three / "runs" / "x" / mark).write_bytes(b"")
    found, lines = names(three)
    assert (found == THREE) == is_run
    assert bool(lines) == is_run
    if is_run:
        one_line(ValueError(lines[0]), "1 run folder (runs/x)")
    assert len(names(three / "runs" / "x" / "samples")[0]) == 1, "a folder that is named itself is used"


def test_the_data_folder_may_be_the_run_folder(three):
    for mark in ("config.yaml", "last.pt"):
        (three / mark).write_bytes(b"")
    save(three / "samples" / "step_000004_recon.nii.gz", ct_like((16, 14, 12)))
    assert names(three)[0] == THREE


def test_results_and_latents(three):
    out = three / "out"
    save(out / "p0.nii.gz", ct_like((16, 14, 12)))
    save(out / "deep" / "p1.nii.gz", ct_like((16, 14, 12)))
    save(out / "of_a_user.nii.gz", ct_like((16, 14, 12)))
    rows = [{"output": "p0.nii.gz"}, {"output": "deep/p1.nii.gz"}, {"output": 5}, [1]]
    (out / ".predict.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"output": "cut')
    zero = np.zeros(1)
    np.savez(three / "p0_latent.npz", latent=zero, about=np.array(""), low=zero, high=zero)
    np.savez(three / "users_latent.npz", volume=np.zeros((4, 4, 4), np.float32))
    found, (line,) = names(three)
    assert found == {*THREE, "out/of_a_user", "users_latent"}
    one_line(ValueError(line), "2 results of predict.py (out/deep/p1.nii.gz, out/p0.nii.gz)",
             "1 latent (p0_latent.npz)")
    assert len(results_of(out)) == 4 and not results_of(three)
    assert is_latent(three / "p0_latent.npz") and not is_latent(three / "users_latent.npz")
    assert names(out)[0] == {"p0", "deep/p1", "of_a_user"}, "a folder that is named itself is used"


def test_linked_results_are_known_too(three):
    save(three.parent / "elsewhere" / "p0.nii.gz", ct_like((16, 14, 12)))
    (three.parent / "elsewhere" / ".predict.jsonl").write_text(json.dumps({"output": "p0.nii.gz"}))
    (three / "linked").symlink_to(three.parent / "elsewhere")
    assert names(three)[0] == THREE


def test_predictions_into_the_data_folder_are_no_data(three, runs):
    for command in ("reconstruct", "encode"):
        assert use(command, runs("kl"), "--input", three, "--output", three / command) == 0
    found, (line,) = names(three)
    assert found == THREE
    one_line(ValueError(line), "3 results of predict.py", "3 latents")


@pytest.mark.slow
def test_runs_in_the_data_folder_train_on_the_same_files(three, monkeypatch, capsys):
    monkeypatch.chdir(three)
    words = ["--vae.base_channels", "4", "--patch", "8,8,8", "--train.val_crops", "1", "--batch", "1",
             "--train.latent_crops", "1", "--log.sample_every", "2", "--device", "cpu",
             "--data.cache_dir", str(three.parent / "cache")]
    for _ in range(2):
        assert train.main(["--data", ".", "--steps", "2", *words]) == 0
    first, _ = sorted(Path("runs").iterdir())
    assert list(first.rglob("*.nii.gz")), "there is something to leave out"
    capsys.readouterr()
    assert train.main(["--resume", str(first), "--steps", "4"]) == 0
    text = capsys.readouterr().out
    assert "in 3 files" in text and "2 run folders" in text and "not bit for bit" not in text
