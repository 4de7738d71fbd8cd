"""train.py: the command and the loop from end to end."""
import math
import time

import pytest
import torch

import data
import train
from runs import GAN, rows, run, tiny_state, weights


def test_non_finite_steps_are_logged_with_their_files_and_stop_the_run(tmp_path, monkeypatch, capsys):
    """No NaN reaches the weights, and the run ends with what reproduces it; once it went on for good."""
    original = data.Crops.__getitem__

    def poisoned(self, index):
        image, number = original(self, index)
        if index >= 2:
            image = image * math.nan
        return image, number
    monkeypatch.setattr(data.Crops, "__getitem__", poisoned)
    out = tmp_path / "r"
    assert run("--steps", "9", "--train.nan_limit", "3", "--train.save_every", "1", out=out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nan_step_000005.pt" in error
    skipped = [r for r in rows(out, "train") if r.get("skipped")]
    assert [r["step"] for r in skipped] == [3, 4, 5]
    assert all(r["files"][0].startswith("synthetic") and r["loss"] is None for r in skipped)
    reproducer = torch.load(out / "nan_step_000005.pt", weights_only=True)
    assert torch.isnan(reproducer["images"][0]).all() and reproducer["files"] == skipped[-1]["files"]
    assert all(torch.isfinite(value).all() for value in weights(out).values())


def test_finishing_takes_its_time_once(tmp_path):
    """The whole tiny run, files and all, takes seconds: the loop waits for nothing."""
    start = time.monotonic()
    assert run("--steps", "5", out=tmp_path / "r") == 0
    names = {".lock", "best.pt", "config.yaml", "last.pt", "last.prev.pt", "log.jsonl", "samples",
             "report.html", "commands.jsonl"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == names
    assert time.monotonic() - start < 60


def test_the_discriminators_rate_follows_the_schedule():
    """Half of the highest rate for the network is half of the highest one for the discriminator."""
    cfg, state = tiny_state(**GAN, optim__lr=2e-3, loss__disc_lr=4e-4)
    train.set_rates(cfg, state, 1e-3)
    assert {group["lr"] for group in state.optimizer.param_groups} == {1e-3}
    assert [group["lr"] for group in state.disc_optimizer.param_groups] == [pytest.approx(2e-4)]
    train.set_rates(cfg, state, 0.0)
    assert [group["lr"] for group in state.disc_optimizer.param_groups] == [0.0]
