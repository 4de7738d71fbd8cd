"""training/memory.py: out of memory at any point turns the dial, and changes no result."""
import dataclasses

import pytest
import torch

import train
import training.validation
from runs import (
    EVERYTHING,
    SEG,
    RunsOut,
    load_config,
    micro_batches,
    rows,
    run,
    snapshot,
    tiny_state,
)
from tasks import vae
from training.memory import with_recovery
from training.signals import RunStopped
from training.step import train_step

# Muon gives every kernel a step of one size, also one whose gradient is rounding: there two runs that agree
# to rounding come apart.
ADAMW = {"optim__optimizer": "adamw"}


def operations_of_a_step(**fields):
    cfg, state = tiny_state(**ADAMW | fields)
    train_step(cfg, state, micro_batches([1, 1]))
    with RunsOut([]) as mode:
        train_step(cfg, state, micro_batches([1, 1]))
    return mode.count


def recovering_step(cfg, state, crops, at, notes):
    """One step that runs out of memory at its operation `at`, if any, and recovers."""
    with RunsOut([at] if at else []):
        return with_recovery(cfg, state, crops[0].image.shape, notes.append,
                             lambda: train_step(cfg, state, crops))


def values_of(*modules):
    return [value for module in modules for value in snapshot(module).values()]


def farthest(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a, b))


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 0.2, 0.45, 0.6, 0.85, 0.97])
def test_out_of_memory_at_any_point_of_the_step_changes_no_result(share):
    """Forward, backward, the second micro-batch, clipping, the optimizer: the same update as without it, to
    rounding.
    """
    notes, results = [], []
    for at in (None, max(1, round(share * operations_of_a_step()))):
        cfg, state = tiny_state(optim__grad_clip=0.1, **ADAMW)
        train_step(cfg, state, micro_batches([2, 1], seed=5))    # so that the optimizer has moments to keep
        result = recovering_step(cfg, state, micro_batches([1, 1]), at, notes)
        results.append((result, [p.detach().clone() for p in state.model.parameters()], state.dial))
    assert len(notes) == 1 and "none -> checkpoint" in notes[0] and results[1][2].mode == "checkpoint"
    assert abs(float(results[0][0].terms["loss"] - results[1][0].terms["loss"])) < 1e-6
    assert farthest(results[0][1], results[1][1]) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_out_of_memory_with_discriminator_and_codebook_changes_no_result(share):
    """The codebook and the discriminator count the repeated step once."""
    notes, results = [], []
    for at in (None, round(share * operations_of_a_step(**EVERYTHING))):
        cfg, state = tiny_state(**EVERYTHING, **ADAMW)
        train_step(cfg, state, micro_batches([2, 1], seed=5))
        recovering_step(cfg, state, micro_batches([1, 1]), at, notes)
        results.append(values_of(state.model, state.disc, state.lecam))
    assert len(notes) == 1
    assert farthest(*results) < 1e-5


@pytest.mark.slow
def test_batch_norm_statistics_count_a_repeated_step_once():
    """Running statistics move in the forward pass, before anyone knows how the step ends."""
    results, notes = [], []
    for at in (None, 150):
        cfg, state = tiny_state(task="seg", unet__norm="batch", unet__channels="4,8")
        crops = [m._replace(label=(m.image[:, 0] > 0).long()) for m in micro_batches([1, 1])]
        recovering_step(cfg, state, crops, at, notes)
        results.append(state.model.state_dict())
    assert len(notes) == 1
    counted = {int(v) for name, v in results[1].items() if name.endswith("num_batches_tracked")}
    assert counted == {2}
    assert farthest(results[0].values(), results[1].values()) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.93, 0.96, 0.999])
def test_out_of_memory_inside_the_update_stops_or_changes_nothing(share):
    """An update of which a part is written cannot be repeated."""
    cfg, state = tiny_state(**EVERYTHING, **ADAMW)
    with RunsOut([]) as mode:
        train_step(cfg, state, micro_batches([1, 1]))
    results = []
    for at in (None, round(share * mode.count)):
        cfg, state = tiny_state(**EVERYTHING, **ADAMW)
        try:
            recovering_step(cfg, state, micro_batches([1, 1]), at, [])
        except RunStopped as stop:
            assert "while the weights were being updated" in str(stop)
            return
        results.append(values_of(state.model, state.disc, state.lecam))
    assert farthest(*results) < 1e-5


def test_the_loss_scale_survives_a_repeated_step():
    """It had been found over many steps; a new one would begin at 65536 and overflow again."""
    cfg, state = tiny_state(**ADAMW)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=50)
    notes = []
    recovering_step(cfg, state, micro_batches([1, 1]), 100, notes)
    assert len(notes) == 1
    assert state.scaler.get_scale() == 512 and state.scaler.get_growth_interval() == 50
    assert state.scaler.state_dict()["_growth_tracker"] == 1     # the step counts once


@pytest.mark.slow
def test_recovery_goes_down_the_whole_dial_and_then_says_what_to_do():
    cfg, state = tiny_state(**ADAMW)
    crops, notes = micro_batches([1]), []

    def always_short():
        with RunsOut([1]):
            train_step(cfg, state, crops)
    with pytest.raises(RunStopped, match="--patch"):
        with_recovery(cfg, state, (1, 1, 64, 64, 64), notes.append, always_short)
    assert "none -> checkpoint" in notes[0] and "checkpoint -> tile" in notes[1] and len(notes) > 3
    assert all("-> tile" in text for text in notes[1:])


def test_other_errors_are_no_reason_to_turn_the_dial():
    cfg, state = tiny_state(**ADAMW)
    with pytest.raises(RuntimeError, match="shape"):
        with_recovery(cfg, state, (1, 1, 4, 8, 8), print, lambda: torch.zeros(2).view(3))
    state.dial = dataclasses.replace(state.dial, recover=False)
    with pytest.raises(torch.OutOfMemoryError), RunsOut([1]):
        with_recovery(cfg, state, (1, 1, 4, 8, 8), print, lambda: torch.zeros(2))


# ---------------------------------------------------------------------------------------- in a whole run

@pytest.mark.slow
def test_a_run_that_runs_out_of_memory_goes_on(tmp_path, monkeypatch):
    """Epoch, optimizer and effective batch are kept, the change is logged and in config.yaml, and the
    resolution is never touched; once it was halved.
    """
    flags = ["--steps", "5", "--accum", "2", "--train.val_every", "2"]
    assert run(*flags, out=tmp_path / "whole") == 0
    raised = []

    def short_of_memory(cfg, state, batches):
        if state.step == 2 and state.dial.mode != "tile":
            raised.append(state.dial.mode)
            with RunsOut([40]):
                return train_step(cfg, state, batches)
        return train_step(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(*flags, out=tmp_path / "short") == 0
    assert raised == ["none", "checkpoint"]
    a, b = rows(tmp_path / "whole", "train"), rows(tmp_path / "short", "train")
    assert [(r["step"], r["epoch"], r["lr"]) for r in a] == [(r["step"], r["epoch"], r["lr"]) for r in b]
    assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(a, b))
    changes = rows(tmp_path / "short", "memory")
    assert [c["step"] for c in changes] == [2, 2] and "checkpoint -> tile" in changes[1]["change"]
    saved = load_config(["--config", str(tmp_path / "short/config.yaml")])
    assert saved.memory.mode == "tile" and saved.data.patch == (4, 8, 8)
    assert (saved.train.batch, saved.train.accum) == (1, 2)


@pytest.mark.slow
def test_a_validation_that_runs_out_of_memory_does_not_turn_the_dial_of_training(tmp_path, monkeypatch):
    """Whole volumes may need tiles where the crops of a step do not: the steps stay as fast as they were.
    The next validation begins where the last one came to, and the figures are the same.
    """
    flags = ["--steps", "3", "--train.val_every", "1", "--train.val_whole", "--log.sample_every", "1"]
    assert run(*flags, out=tmp_path / "whole") == 0
    criterion, picture, modes, tried = vae.criterion, training.validation.forward, [], []

    def short_of_memory(cfg, state, *rest):
        tried.append(state.dial.mode)
        with RunsOut([20] if state.dial.mode == "none" else []):
            return criterion(cfg, state, *rest)

    def short_for_a_picture(state, *rest):
        with RunsOut([20] if state.dial.mode == "none" else []):
            return picture(state, *rest)

    def step(cfg, state, batches):
        modes.append(state.dial.mode)
        return train_step(cfg, state, batches)
    monkeypatch.setattr(vae, "criterion", short_of_memory)
    monkeypatch.setattr(training.validation, "forward", short_for_a_picture)
    monkeypatch.setattr(train, "train_step", step)
    assert run(*flags, out=tmp_path / "short") == 0
    assert modes == ["none"] * 3 and tried[0] == "none" and set(tried[1:]) == {"checkpoint"}
    assert len(rows(tmp_path / "short", "memory")) == 1
    saved = torch.load(tmp_path / "short/last.pt", weights_only=True)["config"]["memory"]["mode"]
    written = load_config(["--config", str(tmp_path / "short/config.yaml")]).memory.mode
    assert saved == written == "none"
    for a, b in zip(rows(tmp_path / "whole", "val"), rows(tmp_path / "short", "val")):
        assert abs(a["loss"] - b["loss"]) < 1e-5 and abs(a["psnr"] - b["psnr"]) < 1e-3


def test_segmentation_recovers_from_out_of_memory(tmp_path, monkeypatch):
    def short_of_memory(cfg, state, batches):
        if state.step == 1 and state.dial.mode == "none":
            with RunsOut([60]):
                return train_step(cfg, state, batches)
        return train_step(cfg, state, batches)
    flags = [*SEG, "--steps", "3"]
    assert run(*flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(*flags, out=tmp_path / "short") == 0
    assert ["none -> checkpoint" in r["change"] for r in rows(tmp_path / "short", "memory")] == [True]
    a, b = rows(tmp_path / "whole", "train"), rows(tmp_path / "short", "train")
    assert all(abs(x["loss"] - y["loss"]) < 1e-4 for x, y in zip(a, b))


def test_the_choice_of_auto_is_kept_with_the_run(tmp_path):
    """On CUDA it depends on the free memory, and a resumed run must add up the same tiles."""
    assert run("--steps", "1", "--memory.mode", "tile", out=tmp_path / "r") == 0
    config = torch.load(tmp_path / "r/last.pt", weights_only=True)["config"]["memory"]
    assert config["mode"] == "tile" and len(config["tile"]) == 3 and config["stretch"] != "auto"
