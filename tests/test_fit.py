"""training/fit.py: the predicted peak of a dry run, and the settings that --fit chooses."""
import os

import pytest
import torch

import losses
import muon
import peaks
import train
from runs import CPU, TINY, load_config
from tasks import TASKS
from training import devices, ranks
from training import fit as fit_room
from training.config import changed
from training.fit import check_memory, fit, predicted
from training.task import of


@pytest.mark.slow
def test_dry_run_prints_a_config_and_a_peak_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--dry-run", "--device", "cuda"]) == 0     # a card that is not here
    text = capsys.readouterr().out
    told = [line for line in text.splitlines() if not line.startswith("# data: ")]
    assert told[0].startswith("# predicted peak of a step on cuda") and not list(tmp_path.iterdir())
    # What differs, and no other field: not the defaults of the loss.
    assert "kl_weight" not in text and "base_channels" in text and len(told) < 12
    (tmp_path / "c.yaml").write_text(text)
    short = load_config(["--config", "c.yaml"])
    assert short.vae.base_channels == 4

    # All of it is the same config; on a CPU there are two peaks, the card's first.
    assert train.main([*TINY, "--dry-run", "--verbose", "--device", "cuda"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "all.yaml").write_text(text)
    assert "kl_weight" in text and load_config(["--config", "all.yaml"]) == short
    assert train.main([*TINY, "--dry-run"]) == 0
    peaks = [line for line in capsys.readouterr().out.splitlines() if "predicted peak" in line]
    assert ["on cuda" in peaks[0], "on cpu" in peaks[1], len(peaks)] == [True, True, 2]


def test_a_rehearsal_of_slabs_leaves_the_peak_as_it_is(monkeypatch):
    """Three of eight slabs of a loss take what all of them do."""
    monkeypatch.setattr(losses, "SLAB_VOXELS", 4 * 32 * 32)
    cfg = load_config(["--patch", "32,32,32", "--batch", "1", "--loss.structure_weight", "0.1"])
    few = predicted(cfg, of(TASKS, cfg), CPU).bytes
    monkeypatch.setattr(fit_room, "few_slabs", losses.slabs)
    assert few == pytest.approx(predicted(cfg, of(TASKS, cfg), CPU).bytes, rel=0.002)


@pytest.mark.parametrize("shape", [(2, 16, 16), (2, 16, 400)])
def test_a_rehearsal_of_few_iterations_of_muon_leaves_the_peak_as_it_is(shape, monkeypatch):
    """To the byte. In the first iteration less is alive, so a rehearsal of one would not do."""
    found, matrices = {}, torch.randn(shape)
    for iterations in (muon.ITERATIONS, fit_room.FEW_ITERATIONS, 1):
        monkeypatch.setattr(muon, "ITERATIONS", iterations)
        found[iterations] = peaks.count(lambda device: lambda: muon.orthogonalise(matrices)).bytes
    assert found[fit_room.FEW_ITERATIONS] == found[5] and (shape[2] > 16 or found[1] < found[5]), found


@pytest.mark.slow
def test_fit_takes_the_cheapest_settings_that_fit():
    cfg = load_config(["--patch", "32,64,64", "--batch", "1"])
    task, needs = of(TASKS, cfg), {}
    for mode in ("none", "checkpoint"):
        peak = predicted(changed(cfg, memory={"mode": mode}), task, CPU)
        needs[mode] = peak.bytes / 2 ** 30 / 0.9
    assert fit(cfg, task, CPU, f"{needs['none'] + 0.01}", print).mode == "none"
    assert fit(cfg, task, CPU, f"{needs['none'] - 0.01}", print).mode == "checkpoint"
    assert fit(cfg, task, CPU, f"{needs['checkpoint'] * 0.8}", print).mode == "tile"
    with pytest.raises(ValueError, match="nothing fits: the least is tile"):
        fit(cfg, task, CPU, "0.001", print)
    with pytest.raises(ValueError, match="--fit 16"):
        fit(cfg, task, CPU, "free", print)


@pytest.mark.slow
def test_a_step_larger_than_the_machine_is_refused_in_a_line(tmp_path, capsys, monkeypatch):
    """Before the first step, with what it would take; not where it fits, or on a card."""
    cfg = load_config(TINY)
    task = of(TASKS, cfg)
    needed = predicted(cfg, task, CPU).bytes
    out = tmp_path / "r"
    monkeypatch.setattr(devices, "machine_memory", lambda: needed - 1)
    assert train.main([*TINY, "--steps", "1", "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and not out.exists()
    assert f"batch 1, memory mode none is predicted to take {needed / 2 ** 30:.2f} GiB" in said[0]
    check_memory(cfg, task, torch.device("cuda"))
    monkeypatch.setattr(ranks, "on_this_machine", lambda: 2)
    monkeypatch.setattr(devices, "machine_memory", lambda: 2 * needed - 2)
    with pytest.raises(ValueError, match="for each of 2 processes"):
        check_memory(cfg, task, CPU)
    monkeypatch.setattr(devices, "machine_memory", lambda: 2 * needed)
    check_memory(cfg, task, CPU)


def test_the_machines_memory_is_what_the_system_says(tmp_path, monkeypatch):
    """A container's limit counts where it is lower; `max` is none."""
    built_in = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2 ** 20 < devices.machine_memory() <= built_in
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(devices, "Path", lambda name: limit)
    for text, wanted in (("max\n", built_in), ("12345\n", 12345), (str(2 ** 70), built_in)):
        limit.write_text(text)
        assert devices.machine_memory() == wanted
