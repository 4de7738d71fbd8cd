"""training/log.py: rows of log.jsonl, the console's lines, TensorBoard and Weights & Biases."""
import math
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

from runs import command, rows, run, tiny_state
from training.log import codebook_use, log_histograms


def test_log_rows_have_their_keys_and_best_is_the_best_validation(tmp_path):
    out = tmp_path / "r"
    assert run("--steps", "6", "--train.val_every", "2", "--log.sample_every", "3", out=out) == 0
    validations, steps = rows(out, "val"), rows(out, "train")
    assert [r["step"] for r in validations] == [0, 2, 4, 6]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    wanted = {"step", "epoch", "split", "loss", "l1", "kl", "lr", "seconds", "voxels_per_second", "peak_gib"}
    for row in rows(out):
        assert wanted <= row.keys()
    assert all({"psnr", "ssim", "l1"} <= r.keys() for r in validations)
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["metrics"]["psnr"] == max(r["psnr"] for r in validations)
    samples = out / "samples"
    assert len(list(samples.glob("step_000003_*.png"))) == 1
    assert len(list(samples.glob("step_000003_*_recon.nii.gz"))) == 1
    assert list(samples.glob("step_000006_*.png"))


def test_codebook_use_is_counted_over_an_epoch():
    use = codebook_use(torch.tensor([2, 2, 0, 4]))
    assert use["codebook_usage"] == 0.75
    assert use["perplexity"] == pytest.approx(2 ** (2 * 0.25 * 2 + 0.5 * 1))
    assert codebook_use(torch.full((512,), 3))["perplexity"] == pytest.approx(512)


def test_tensorboard_and_wandb_receive_scalars_pictures_and_histograms(tmp_path, monkeypatch):
    """Stubs stand in for both services."""
    seen = []

    class Writer:
        def __init__(self, folder):
            seen.append(("folder", folder))

        def __getattr__(self, name):
            return lambda *a, **k: seen.append((name, a[0] if a else None))

    class Run(Writer):
        def __init__(self):
            pass

        def log(self, values, step):
            seen.extend(("wandb", name) for name in values)
    wandb = types.SimpleNamespace(init=lambda **k: Run(), Image=lambda a: a, Histogram=lambda a: a)
    tensorboard = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run("--steps", "2", "--log.tensorboard", "--log.wandb", "--log.histogram_every", "1",
               out=tmp_path / "r") == 0
    for wanted in [("add_scalar", "train/loss"), ("add_scalar", "train/lr"), ("add_scalar", "val/psnr"),
                   ("close", None), ("finish", None), ("wandb", "train/loss"), ("wandb", "val/psnr")]:
        assert wanted in seen, wanted
    kinds = {(kind, (name or "").split("/")[0]) for kind, name in seen}
    assert {("add_image", "samples"), ("add_histogram", "weights"), ("add_histogram", "gradients"),
            ("wandb", "samples"), ("wandb", "weights"), ("wandb", "gradients")} <= kinds


def test_histograms_are_of_finite_values():
    """numpy's histogram, which TensorBoard calls, raises for the gradients of a step that was not finite."""
    cfg, state = tiny_state()
    for number, parameter in enumerate(state.model.parameters()):
        parameter.grad = torch.ones_like(parameter)
        if parameter.numel() > 1:
            parameter.grad[(0,) * parameter.dim()] = math.nan
        if number == 0:
            parameter.grad.fill_(math.inf)
    seen = {}

    def histogram(name, values, step):
        np.histogram(values.numpy())
        seen[name] = values
    log_histograms(types.SimpleNamespace(sinks=[types.SimpleNamespace(histogram=histogram)]), state)
    names = [name for name, _ in state.model.named_parameters()]
    assert seen.keys() == {f"weights/{name}" for name in names} | {f"gradients/{name}" for name in names[1:]}


@pytest.mark.slow
def test_output_when_piped_is_plain_lines(tmp_path):
    words = command("--steps", "3", "--log.every", "1", "--out", str(tmp_path / "r"))
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "\r" not in done.stdout and "\x1b" not in done.stdout
    steps = [line for line in done.stdout.splitlines() if line.startswith("step") and "lr" in line]
    assert [line.split()[1] for line in steps] == ["1/3", "2/3", "3/3"]
