"""training/run_page.py and training/opening.py: the page of a run from its files, and how a run ends."""
import json
import re

import pytest

import pictures
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
    # A run has one colour in every drawing, the training fainter.
    for name, colour in zip("ab", pictures.COLOURS):
        for split, faint in (("training", True), ("validation", False)):
            boxes = re.findall(rf'(?:<g opacity="0.5">)?<rect [^\n]*\n<text [^>]*>{name} {split}', both)
            assert boxes and all(colour in box and ("<g" in box) == faint for box in boxes), (name, split)
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


def test_many_classes_are_drawn_by_the_worst_and_the_best_and_listed_below_the_table(tmp_path):
    scores = {f"dice_{k}": 1 - k / 100 for k in range(1, 31)}
    write_log(tmp_path / "a", [{"step": s, "split": "val", "dice": 0.5, **scores} for s in (0, 1)])
    page = run_page.run_page([tmp_path / "a"])
    drawing = next(svg for svg in page.split("<svg")[1:] if "4 worst and 4 best of 30 classes" in svg)
    named = re.findall(r"class (\d+)<", drawing)
    assert named == ["1", "2", "3", "4", "27", "28", "29", "30"]
    assert "<th>Dice 17</th>" not in page and "Dice 17: 0.8300" in page and "<th>Dice</th>" in page


def test_memory_is_named_as_the_process_s_on_a_cpu_alone(tmp_path):
    write_log(tmp_path / "a", [{"step": 1, "split": "train", "loss": 1.0, "peak_gib": 1.5}])
    for device, words in (("cpu, processes: 1", "peak memory of the process"), ("cuda:0", "peak memory")):
        row = {"step": 0, "command": "python train.py --train.val_every 2", "device": device}
        (tmp_path / "a" / "commands.jsonl").write_text(json.dumps(row) + "\n")
        page = run_page.run_page([tmp_path / "a"])
        assert f"<span>{words}</span>" in page and f"{words} so far (GiB)" in page
    # No line of the page ends within a flag.
    assert '<span class="key">--train.val_every</span>' in page
