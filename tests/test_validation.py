"""training/validation.py: what is measured, which weights are the best, when a run stops early."""
import dataclasses
import math
import types

import pytest
import torch

import data
import losses
from runs import GAN, SEG, TINY, flags_of, load_config, resume, rows, run
from tasks import TASKS, seg
from training import ready
from training.task import of
from training.validation import update_best


def at_step_1(cfg):
    """What update_best looks at in a state."""
    return types.SimpleNamespace(task=of(TASKS, cfg), step=1, best=None, best_loss=math.inf,
                                 reference=None, bad_validations=0, plateau=(math.inf, 1.0, 0))


def scripted_validation(monkeypatch, values):
    values = iter(values)

    def validate(_):
        return {"loss": 1.0, "l1": 1.0, "kl": 0.0, "ssim": 0.0, "psnr": next(values)}, 1
    monkeypatch.setattr("training.validation.validate", validate)


def test_plateau_counts_validations():
    cfg = load_config([*TINY, "--optim.schedule", "plateau", "--optim.plateau_patience", "2",
                       "--optim.gamma", "0.5"])
    state, factors = at_step_1(cfg), []
    for loss in (1.0, 0.9, 0.95, 0.95, 0.8, 0.9, 0.9, 0.9, 0.9):
        update_best(cfg, state, {"psnr": 0.0, "loss": loss})
        factors.append(state.plateau[1])
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


def test_metric_where_less_is_better():
    cfg = load_config([*TINY, "--train.metric", "l1"])
    state = at_step_1(cfg)
    values = (3.0, 2.0, 2.5, math.nan, 1.0)
    results = [update_best(cfg, state, {"l1": value, "loss": value}) for value in values]
    assert results == [True, True, False, False, True]


def test_dice_that_ties_or_is_undefined_is_decided_by_the_loss():
    cfg = load_config([*TINY, "--task", "seg"])
    state, undefined = at_step_1(cfg), math.nan
    results = [update_best(cfg, state, {"dice": dice, "loss": loss}) for dice, loss in (
        (undefined, 3.0), (undefined, 2.0), (undefined, 2.5), (0.0, 9.0), (0.0, 1.0), (undefined, 0.5),
        (0.1, 5.0))]
    assert results == [True, True, False, True, True, False, True]


def test_early_stopping_keeps_and_ships_the_best_weights(tmp_path, monkeypatch):
    """It stops, saves, and `best` goes by the validation metric; once the last weights were shipped."""
    out = tmp_path / "r"
    scripted_validation(monkeypatch, [1, 2, 5, 4, 5.05, 3])
    assert run("--steps", "9", "--train.val_every", "1", "--train.patience", "2", "--train.min_delta", "0.1",
               "--train.save_every", "99", out=out) == 0
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last["step"] == 4 and last["finished"]                # 5 at step 2; 4 and 5.05 are no gain of 0.1
    assert best["step"] == 4 and best["metrics"]["psnr"] == 5.05
    assert resume(out) == 0 and torch.load(out / "last.pt", weights_only=True)["step"] == 4


@pytest.mark.parametrize("sign, metric", [(1, "psnr"), (-1, "l1")])
@pytest.mark.parametrize("values, waited", [
    # A gain of just min_delta is none; small ones add up, since the reference stays.
    ([1.0, 1.25, 1.5, 1.625, 1.75, 1.875], [0, 1, 0, 1, 2, 0]),
    ([1.0, 0.5, 1.125, 1.25, 1.25], [0, 1, 2, 3, 4]),
    ([1.0, 1.125, 1.25, 1.375, 1.5], [0, 1, 2, 0, 1]),
])
def test_early_stopping_waits_as_keras_and_lightning_do(values, waited, sign, metric):
    """Their rule, by hand: current - min_delta > reference; then the reference is the current value."""
    cfg = load_config([*TINY, "--train.metric", metric, "--train.min_delta", "0.25"])
    state, found, reference, wanted, wait = at_step_1(cfg), [], -math.inf, [], 0
    for value in values:
        update_best(cfg, state, {metric: sign * value, "loss": 1.0})
        found.append(state.bad_validations)
        wait += 1
        if value - 0.25 > reference:
            reference, wait = value, 0
        wanted.append(wait)
    assert found == waited == wanted
    assert state.best == sign * max(values)                      # best.pt takes every gain


@pytest.mark.slow
def test_the_average_is_what_is_validated_and_shipped(tmp_path):
    """best.pt holds the first average, and its figures are those of the average."""
    assert run("--steps", "3", "--train.ema", "0.9", "--optim.lr", "1e-2", "--optim.warmup", "0",
               "--optim.optimizer", "adamw", out=tmp_path / "r") == 0
    last, best = (torch.load(tmp_path / "r" / name, weights_only=True) for name in ("last.pt", "best.pt"))
    network = ready.load(tmp_path / "r/best.pt", TASKS, device="cpu").model
    average = last["ema"][0]
    assert best["step"] == 3 and best["model"].keys() == average.keys()
    assert all(torch.equal(best["model"][name], average[name]) for name in average)
    assert any(not torch.equal(last["model"][name], average[name]) for name in average)
    cfg = load_config(["--config", str(tmp_path / "r/config.yaml")])
    dataset = data.open_data(cfg.data, 0, lambda text: None)
    errors = []
    for crop in data.val_crops(dataset, cfg.train.seed, cfg.train.val_crops):
        x = crop.image[None]
        recon = network.decode(network.encode(x).mu, x.shape[2:]).detach()
        errors.append(float((recon - x).abs().mean()))
    assert abs(sum(errors) / len(errors) - rows(tmp_path / "r", "val")[-1]["l1"]) < 1e-4


def test_one_held_out_crop_is_enough(tmp_path):
    """A validation set smaller than a batch is validated all the same; it was once left out."""
    flags = ["--steps", "1", "--batch", "4"]
    assert run(*flags, "--train.val_crops", "1", out=tmp_path / "a") == 0
    assert run(*flags, "--train.val_whole", out=tmp_path / "b") == 0
    psnr = [[r["psnr"] for r in rows(tmp_path / name, "val")] for name in "ab"]
    assert all(map(math.isfinite, psnr[0] + psnr[1])) and psnr[0] != psnr[1]


def test_validation_has_every_term_from_the_start_and_best_waits_for_them(tmp_path):
    flags = [*flags_of(GAN), "--loss.perceptual_weight", "0.1", "--loss.perceptual_start", "3",
             "--loss.disc_start", "4", "--steps", "6", "--train.val_every", "1", "--optim.lr", "1e-6"]
    assert run(*flags, out=tmp_path / "r") == 0
    for row in rows(tmp_path / "r", "val"):
        assert "perceptual" in row and row["loss"] > row["l1"] + 0.05 * row["perceptual"]
    assert torch.load(tmp_path / "r/best.pt", weights_only=True)["step"] >= 4


@pytest.mark.parametrize("size", ["5,8,9", "12,24,20"], ids=["below the crop", "above the crop"])
def test_validation_and_prediction_agree_on_whole_volumes(size, tmp_path):
    """GroupNorm takes its statistics over all that it is given, so both must give the network what training
    gave it.
    """
    out = tmp_path / "r"
    assert run(*SEG, "--data.synthetic_size", size, "--steps", "20", "--train.val_whole",
               "--train.val_every", "20", out=out) == 0
    network = ready.load(out / "last.pt", TASKS, device="cpu")
    cfg = load_config(["--config", str(out / "config.yaml")])
    dataset = data.open_data(dataclasses.replace(cfg.data, labels=True), 0, lambda text: None)
    counts = 0
    for crop in data.WholeVolumes(dataset):
        found = seg.segment(network, crop.image.numpy(), background=crop.entry.intensity.background)
        found = torch.from_numpy(found)[None].long()
        counts = counts + torch.stack(losses.dice_scores(found, crop.label[None], dataset.classes))
    scores, last = losses.dice(*counts), rows(out, "val")[-1]
    by_class = {int(name[5:]): value for name, value in last.items()
                if name.startswith("dice_") and name != "dice_loss"}
    assert by_class
    assert all(abs(float(scores[k]) - value) < 1e-6 for k, value in by_class.items())
