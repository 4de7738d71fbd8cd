"""A task that no room knows, toy_task.py, goes through all of the house: trained, validated, killed and
resumed, predicted by memtest.py, used by predict.py.
"""
import json
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import memtest
import peaks
import predict
import toy_task
import train
from runs import (
    CPU,
    ROOT,
    TINY,
    RunsOut,
    assert_equal_runs,
    load_config,
    make_step,
    micro_batches,
    new_state,
    resume,
    rows,
    run,
)
from tasks import TASKS
from training import fit
from training.step import train_step
from training.task import of

TOY = ["--task", "toy", "--optim.lr", "3e-2"]


@pytest.fixture(autouse=True)
def in_the_table(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", toy_task)


def test_it_is_at_most_40_lines():
    assert len(Path(toy_task.__file__).read_text().splitlines()) <= 40


def test_a_step_gives_it_the_gradient_of_its_own_loss():
    cfg = load_config([*TINY, *TOY, "--optim.grad_clip", "0", "--optim.optimizer", "sgd"])
    state = new_state(cfg)
    plain = toy_task.build(cfg)
    plain.load_state_dict(state.model.state_dict())
    train_step(cfg, state, micro_batches([2, 1]))
    image = torch.cat([micro.image for micro in micro_batches([2, 1])])
    (plain(image) - image).abs().mean().backward()
    for a, b in zip(state.model.parameters(), plain.parameters()):
        assert (a.grad - b.grad).abs().max() < 1e-6


def test_it_trains_and_validates_by_its_own_figure(tmp_path, capsys):
    out = tmp_path / "r"
    assert run(*TOY, "--steps", "20", "--train.val_every", "5", "--train.ema", "0.5", out=out) == 0
    val = rows(out, "val")
    assert [row["step"] for row in val] == [0, 5, 10, 15, 20] and val[-1]["l1"] < 0.5 * val[0]["l1"]
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["metrics"]["l1"] == min(row["l1"] for row in val)
    assert best["config"]["task"] == "toy" and set(best["model"]) == {"conv.weight", "conv.bias"}
    assert "best l1" in capsys.readouterr().out


COMMAND = """
import sys
import toy_task
import train
from tasks import TASKS
TASKS["toy"] = toy_task
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_run_that_was_left_alone(tmp_path):
    flags = [*TOY, "--steps", "30", "--train.save_every", "2", "--train.val_every", "7", "--accum", "2",
             "--train.ema", "0.9", "--log.every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0
    paths = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
    words = [sys.executable, "-c", paths + COMMAND, *TINY, *flags, "--out", str(cut)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 9/"):
            process.kill()
            break
    assert process.wait(60) == -signal.SIGKILL
    assert resume(cut) == 0
    assert_equal_runs(whole, cut)


def test_out_of_memory_ends_in_one_line_where_a_network_has_no_dial(tmp_path, monkeypatch, capsys):
    def short_of_memory(cfg, state, batches):
        with RunsOut([5]):
            return train_step(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(*TOY, "--steps", "3", out=tmp_path / "r") == 1
    error = capsys.readouterr().err
    assert "out of memory at none, the last step of the dial" in error and error.count("\n") == 1
    assert run(*TOY, "--memory.mode", "checkpoint", out=tmp_path / "no") == 2
    error = capsys.readouterr().err
    assert "has no memory dial" in error and "feature" not in error and error.count("\n") == 1


@pytest.mark.slow
def test_memtest_predicts_what_a_step_takes(tmp_path, capsys):
    cfg = load_config([*TINY, *TOY])
    predicted = fit.predicted(cfg, of(TASKS, cfg), CPU).bytes
    assert predicted == peaks.count(lambda device: make_step(cfg, device)).bytes > 0
    found = tmp_path / "memtest.json"
    assert memtest.main([*TINY, *TOY, "--json", str(found), "--budget", "1"]) == 0
    result = json.loads(found.read_text())
    assert {row["mode"] for row in result} == {"none"}
    assert result[0]["predicted_gib"] == pytest.approx(predicted / peaks.GIB, abs=1e-4)
    assert "task: toy" in capsys.readouterr().out


def test_predict_uses_its_checkpoint(tmp_path, capsys):
    """What it writes back is what the network makes of the volume; evaluated by the task's own figure."""
    out, source = tmp_path / "r", tmp_path / "in/a.nii.gz"
    assert run(*TOY, "--steps", "40", "--train.val_every", "40", out=out) == 0
    source.parent.mkdir()
    values = np.random.default_rng(0).integers(-1000, 1001, (12, 10, 8)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, np.eye(4)), source)
    use = ["--checkpoint", str(out), "--device", "cpu"]
    assert predict.main(["reconstruct", *use, "--input", str(source), "--output", str(tmp_path / "o")]) == 0
    written = nib.load(tmp_path / "o/a.nii.gz")
    network = toy_task.build(load_config(["--config", str(out / "config.yaml")]))
    network.load_state_dict(torch.load(out / "best.pt", weights_only=True)["model"])
    x = torch.from_numpy(values.T.astype(np.float32) / 1000)[None, None]
    with torch.no_grad():
        wanted = network(x)[0, 0].numpy().T * 1000
    assert written.shape == values.shape and np.abs(np.asarray(written.dataobj) - wanted).max() <= 1
    found = tmp_path / "e.json"
    assert predict.main(["evaluate", *use, "--data", str(source.parent), "--json", str(found)]) == 0
    l1 = np.abs(wanted / 1000 - values / 1000).mean()
    assert json.loads(found.read_text())["volumes"][0]["l1"] == pytest.approx(l1, rel=1e-3)
    capsys.readouterr()
    assert predict.main(["segment", *use, "--input", str(source), "--output", str(tmp_path / "s")]) == 2
    error = capsys.readouterr().err
    assert "--task toy" in error and error.count("\n") == 1
