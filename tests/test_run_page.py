"""training/run_page.py and training/opening.py: the page of a run from its files, and how a run ends."""
import json
import re

import pytest

import predict
from runs import load, resume, run
from training import run_page
from training.log import fitted
from volumes.files import DataError


def write_log(folder, rows):
    folder.mkdir()
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "spl')


def test_the_page_of_a_log_holds_its_curves_and_of_two_runs_both(tmp_path):
    for name, psnr in (("a", 20.0), ("b", 30.0)):
        write_log(tmp_path / name, [
            {"step": 0, "split": "val", "psnr": psnr, "loss": 0.5, "dice_1": 0.3, "dice_2": 0.1},
            {"step": 1, "split": "train", "loss": 0.4, "lr": 1e-3, "peak_gib": 1.5, "voxels_per_second": 9,
             "gpu_percent": 90, "gpu_reserved_gib": 2.0},
            {"step": 2, "split": "train", "loss": None, "lr": 1e-3, "peak_gib": 2.5, "skipped": True},
            {"step": 2, "split": "val", "psnr": psnr + 1, "loss": 0.3, "dice_1": 0.4}])
    page = run_page.run_page([tmp_path / "a"])
    for words in ("21.00 dB", "best PSNR, step 2", "2.50 GiB", "learning rate", "Dice of each class",
                  "class 1", "steps without update"):
        assert words in page, words
    assert page.count("<svg") == 6 and not re.search(r"<script|<link|@import|src=.http", page)
    both = run_page.run_page([tmp_path / "a", tmp_path / "b"])
    assert both.count("<svg") == 6 and "a validation" in both and "b validation" in both
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="no rows in its log.jsonl"):
        run_page.run_page([tmp_path / "none"])


def test_a_line_of_the_terminal_is_fitted_to_its_width():
    parts = [(0, "step 1/9"), (4, "kl 1.5"), (2, "1.00 GiB"), (0, "0:01 left")]
    assert fitted(parts, 40) == "step 1/9  kl 1.5  1.00 GiB  0:01 left"
    assert fitted(parts, 36) == "step 1/9  1.00 GiB  0:01 left" and fitted(parts, 20) == "step 1/9  0:01 left"
    assert fitted(parts, 5) == "step "


@pytest.mark.slow
def test_a_run_keeps_its_page_and_predict_writes_it_anew(tmp_path, capsys, monkeypatch):
    out = tmp_path / "r"
    flags = ["--train.val_every", "1", "--log.sample_every", "1", "--train.save_every", "1"]
    assert run("--steps", "2", *flags, out=out) == 0
    page = (out / "report.html").read_text()
    assert page.count("<img") == 2 * (9 + 2) or page.count("<img") == 9 + 2
    assert all(words in page for words in ("Reconstruction", "step 2", "config.yaml", "torch", "axial"))
    (out / "report.html").unlink()
    assert resume(out, "--steps", "3") == 0 and "step 3" in (out / "report.html").read_text()
    assert predict.main(["report", str(out), "--output", str(tmp_path / "p.html")]) == 0
    assert (tmp_path / "p.html").read_text().count("<svg") == page.count("<svg")
    assert predict.main(["report", str(tmp_path)]) == 2

    # What goes wrong with the page ends no run.
    def broken(*_):
        raise IndexError("no such row")
    monkeypatch.setattr(run_page, "write_page", broken)
    capsys.readouterr()
    assert run("--steps", "1", out=tmp_path / "q") == 0
    assert "not written" in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_ends_in_nan_says_so_and_that_its_best_is_the_untrained_network(tmp_path, capsys):
    out = tmp_path / "r"
    assert run("--steps", "2", "--optim.lr", "1e30", "--optim.grad_clip", "0", "--optim.warmup", "0",
               "--train.val_every", "2", out=out) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "not finite at the end" in lines[-1] and "at step 0 (the untrained network)" in lines[-2]
    assert load(out / "best.pt")["step"] == 0
