"""training/plan.py: what memory.tile auto comes to, the same for a run, a prediction, --fit and memtest."""
import dataclasses
import json

import pytest
import torch

import memtest
import peaks
import tile_plans
import train
from peaks import GIB
from runs import CPU, TINY, load_config, rows, run
from tasks import TASKS
from training import edges, fit, plan, ranks
from training.config import MemoryConfig, changed
from training.memory import begin
from training.stages import Stage
from training.task import of

PATCH = ["--preset", "ultra_lightweight", "--patch", "64,128,128", "--batch", "1", "--memory.mode", "tile"]
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


def network(preset="ultra_lightweight", **fields):
    cfg = load_config(["--preset", preset])
    return plan.network_of(changed(cfg, vae=fields) if fields else cfg, of(TASKS, cfg))


def by_hand(cfg, budget, dtype):
    """The first plan by rising work that is within so many bytes; without: the last within 1.4."""
    plans = plan.network_of(cfg, of(TASKS, cfg)).memory("tile").tiling().plans(
        cfg.data.patch, cfg.train.batch, dtype)
    if budget is None:
        return [each for each in plans if each.work <= 1.4][-1]
    return next(each for each in plans if each.peak_bytes <= budget)


# -------------------------------------------------------------------------------- one function

@NO_GPU
@pytest.mark.slow
@pytest.mark.parametrize("flags, budget", [([], None), (["--memory.budget", "0.5"], 0.5 * GIB)])
def test_a_run_a_prediction_and_memtest_choose_the_same_tiles(monkeypatch, capsys, flags, budget):
    cfg = load_config([*PATCH, *flags, "--device", "cpu"])
    task = of(TASKS, cfg)
    expected = by_hand(cfg, budget, torch.float32)

    # A run, as it settles its dial before the first step.
    stage = Stage("", cfg, dataset=Opened(cfg.data.patch))
    (found,), lines = edges.settle_dials([stage], begin(cfg, task, CPU))
    assert (found.cfg.memory.tile, found.cfg.memory.stretch) == (expected.tile, expected.stretch)
    tile = ",".join(map(str, expected.tile))
    assert len(lines) == 1 and f"tile {tile}, stretch {expected.stretch}" in lines[0]
    assert ("memory.budget 0.5 GiB" if budget else "1.4 times the time") in lines[0]

    # A dry run's prediction, and memtest's row.
    seen = []

    def nothing(cfg, *rest, **more):
        seen.append(cfg.memory)
        return lambda: None
    monkeypatch.setattr(fit, "make_step", nothing)
    fit.predicted(cfg, task, CPU)
    memtest.main(["--one", *PATCH, *flags, "--device", "cpu", "--no-measure"])
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(dial.tile, dial.stretch) for dial in seen] == [(expected.tile, expected.stretch)] * 2
    assert tuple(row["tile"]) == expected.tile


class Opened:
    """Of a data set, what settling asks for."""
    channels = 1

    def __init__(self, patch):
        self.patch = patch


def test_fit_tries_first_what_auto_comes_to():
    """For a budget of the same bytes: --fit keeps a tenth free, so 1 GiB there is memory.budget .9."""
    size, limit = (64, 128, 128), 0.3 * GIB
    found = plan.candidates(network(), size, 1, torch.bfloat16, limit)
    dial = MemoryConfig("tile", budget=0.3)
    auto = plan.settled(network(), dial, size, 1, torch.bfloat16, plan.budget_of(dial, "cpu")).dial
    assert [each["mode"] for each in found[:3]] == ["none", "checkpoint", "tile"]
    assert (found[2]["tile"], found[2]["stretch"]) == (auto.tile, auto.stretch)
    # Then less and less memory, and where nothing fits the least.
    least = plan.candidates(network(), size, 1, torch.bfloat16, 1.0)
    assert len(found) > 4 and len(least) == 3 and least[2] == found[-1]
    # Bounded in work: fewer, and none of more.
    bounded = plan.candidates(network(), size, 1, torch.bfloat16, most_work=1.5)
    plans = network().memory("tile").tiling().plans(size, 1, torch.bfloat16)
    assert [each.tile for each in plans if each.work <= 1.5] == [each["tile"] for each in bounded[2:]]


def test_fit_keeps_a_tenth_of_its_budget_free(monkeypatch):
    seen = []

    def noted(network, size, batch, dtype, limit):
        seen.append(limit)
        return [{"mode": "none"}]
    monkeypatch.setattr(fit, "candidates", noted)
    cfg = load_config(TINY)
    fit.fit(cfg, of(TASKS, cfg), CPU, "2", seen.append)
    assert seen[0] == pytest.approx(1.8 * GIB)


def test_points_are_offered_cubes_and_others_what_they_have():
    points = load_config(["--task", "sparse"])
    found = plan.candidates(plan.network_of(points, of(TASKS, points)), (64, 32, 32), 1, torch.float32)
    assert [each["tile"][0] for each in found if each["mode"] == "tile"] == [32, 16, 8]
    seg = load_config(["--task", "seg"])
    found = plan.candidates(plan.network_of(seg, of(TASKS, seg)), (64, 32, 32), 1, torch.float32)
    assert found == [{"mode": "none"}, {"mode": "checkpoint"}]


def test_what_is_chosen_is_left_alone():
    given = MemoryConfig("tile", (32, 32, 32), stretch="1")
    for dial in (given, MemoryConfig(), MemoryConfig("checkpoint")):
        assert plan.settled(network(), dial, (64, 64, 64), 1, torch.float32) == (dial, None)
    # A tile alone: the stretches of least memory, on every card.
    half = dataclasses.replace(given, stretch="auto")
    found = plan.settled(network(), half, (64, 64, 64), 1, torch.float32, plan.Budget(1e15, ""))
    least = network().memory("tile", (32, 32, 32)).tiling().plans((64, 64, 64))[-1]
    assert found.dial.tile == (32, 32, 32) and found.dial.stretch == least.stretch
    assert "least memory with this tile" in found.text


def test_the_budget_is_given_or_what_the_card_has_free_less_a_tenth(monkeypatch):
    auto, card = MemoryConfig("tile"), torch.device("cuda")
    given = plan.Budget(5.0, "five bytes")
    assert plan.budget_of(dataclasses.replace(auto, budget=2.0), card, given).bytes == 2 * GIB
    assert plan.budget_of(auto, card, given) == given
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert plan.budget_of(auto, card) == plan.budget_of(auto, CPU) == plan.NO_BUDGET
    # On a card what this process holds counts as free: it will be used again.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10 * GIB)
    found = plan.budget_of(auto, card)
    assert found.bytes == pytest.approx(36 * GIB) and "36.00 GiB, 90 % of what the card has free" in found.why
    assert plan.budget_of(auto, CPU) == plan.NO_BUDGET
    # Of ranks that share tiles the least counts.
    monkeypatch.setattr(ranks, "largest", lambda value: max(value, -20.0 * GIB))
    shared = dataclasses.replace(auto, tile_parallel=True)
    assert plan.budget_of(shared, card).bytes == pytest.approx(18 * GIB)


@NO_GPU
def test_memtest_says_what_it_planned_for(monkeypatch, capsys):
    monkeypatch.setattr(peaks, "predict", lambda make_step, device: Peak)
    seen = {}
    for name, words in (("none", []), ("8", ["--budget", "8"])):
        monkeypatch.setattr(memtest, "print_plan", lambda *arguments: True)
        assert memtest.main(["--preset", "fast", "--resolution", "256,512,512", *words]) == 0
        said = capsys.readouterr().out
        seen[name] = [line for line in said.splitlines() if "tiled by" in line and " 1 " in line][0]
        wanted = "7.20 GiB, 90 % of what --budget gives" if words else "least memory at 1.4 times the time"
        assert "Tiles are planned for " in said and wanted in said, said
    cfg = load_config(["--preset", "fast", "--patch", "256,512,512", "--batch", "1", "--amp"])
    for name, budget in (("none", None), ("8", 7.2 * GIB)):
        tile = ",".join(map(str, by_hand(cfg, budget, torch.bfloat16).tile))
        assert f"bf16 AMP, tiled by {tile} " in seen[name], (seen, tile)
    assert seen["none"] != seen["8"]


class Peak:
    """Of a step that nobody predicts here."""
    bytes, largest = GIB, 1


def test_the_choice_is_told_and_logged(tmp_path, capsys):
    assert run("--steps", "1", "--memory.mode", "tile", out=tmp_path / "r") == 0
    said = capsys.readouterr().out.splitlines()
    said = [line for line in said if "tile auto, stretch auto -> tile" in line]
    logged = rows(tmp_path / "r", "memory")
    assert len(said) == len(logged) == 1 and logged[0]["change"] in said[0]
    assert "1.4 times the time" in said[0] and logged[0]["step"] == 0
    # A run that goes on has it chosen, and says nothing.
    assert train.main(["--resume", str(tmp_path / "r"), "--steps", "2"]) == 0
    assert "-> tile" not in capsys.readouterr().out and len(rows(tmp_path / "r", "memory")) == 1


# -------------------------------------------------------------------------------- no more than 2^31 elements

@pytest.mark.parametrize("preset, size, batch", [
    ("high_res", (512, 512, 512), 1),
    pytest.param("high_res", (512, 512, 512), 2, marks=pytest.mark.slow),
    pytest.param("fast", (1024, 1024, 1024), 1, marks=pytest.mark.slow),
    pytest.param("ultra_lightweight", (256, 1024, 1024), 1, marks=pytest.mark.slow),
])
def test_no_plan_has_a_tensor_beyond_2_to_the_31_elements(preset, size, batch):
    """32 channels of 512^3 are twice as many: such a grid is cut, whatever fits."""
    plans = network(preset).memory("tile").tiling().plans(size, batch, torch.bfloat16)
    assert plans and all(each.largest <= 2 ** 31 for each in plans)
    # The plan of least work for any memory at all is cut too.
    found = plan.settled(network(preset), MemoryConfig("tile"), size, batch, torch.bfloat16,
                         plan.Budget(1e15, "any"))
    assert found.dial.tile == plans[0].tile != size


@pytest.mark.slow
def test_the_planner_knows_the_largest_tensor():
    cfg = load_config(["--preset", "high_res", "--patch", "32,64,64", "--batch", "2", "--amp",
                       "--optim.optimizer", "adamw"])            # Muon has weights of a kind in one tensor
    plans = network("high_res").memory("tile").tiling().plans((32, 64, 64), 2, torch.bfloat16)
    for each in plans[::max(1, len(plans) // 3)]:
        memory = {"mode": "tile", "tile": each.tile, "stretch": each.stretch}
        found = fit.predicted(changed(cfg, memory=memory), of(TASKS, cfg), "cuda").largest
        assert found <= each.largest <= 1.3 * found, (each.largest, found)


def test_a_volume_beyond_it_is_said_in_a_line():
    with pytest.raises(ValueError, match=r"1408,1408,1408, batch 1 no tiles keep every tensor within 2\^31"):
        plan.settled(network("fast"), MemoryConfig("tile"), (1408, 1408, 1408), 1, torch.bfloat16)
    assert plan.candidates(network("fast"), (1408,) * 3, 1, torch.bfloat16)[-1] == {"mode": "checkpoint"}
    with pytest.raises(ValueError, match="beyond which CUDA's kernels fail"):
        peaks.plan(lambda size, memory: None, (8, 8, 8), GIB, [])


@pytest.mark.slow
def test_mode_none_says_so_before_it_fails(monkeypatch):
    """512^3 with 32 channels, 2^32 elements, as CUDA refused it; with 16, which are 2^31, it runs."""
    def checked(size, *flags):
        cfg = load_config(["--preset", "high_res", "--patch", size, "--batch", "1", "--amp", *flags])
        fit.check_memory(cfg, of(TASKS, cfg), torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for mode in ("none", "checkpoint"):
        said = (f"a step at 512,512,512, batch 1, memory mode {mode} has a tensor of 4,294,967,296 elements, "
                "and CUDA's kernels fail beyond 2.31; use --memory.mode tile, a smaller --patch")
        with pytest.raises(ValueError, match=said):
            checked("512,512,512", "--memory.mode", mode)
    large = load_config(["--preset", "high_res", "--patch", "512,512,512", "--batch", "1", "--amp"])
    line = fit.predicted_peak(large, of(TASKS, large), torch.device("cuda"))
    assert line.startswith("no step on cuda: a tensor of 4,294,967,296 elements") and "\n" not in line
    with pytest.raises(ValueError, match="memory mode tile: at 512,512,512, .*; take a smaller tile"):
        checked("512,512,512", "--memory.mode", "tile", "--memory.tile", "512,512,512")
    checked("512,512,512", "--vae.up_narrows", "true")
    checked("512,512,512", "--memory.mode", "tile")
    # What is small by its widest layer alone is not predicted.
    monkeypatch.setattr(fit, "predicted", None)
    checked("64,128,128")


def test_a_candidate_with_such_a_tensor_is_passed_over():
    def make_step_for(size, memory):
        return lambda device: lambda: torch.empty(memory["elements"], dtype=torch.bool, device=device)
    both = [{"elements": 2 ** 31 + 1}, {"elements": 2 ** 31}]
    found = peaks.plan(make_step_for, (1, 1, 1), 100 * GIB, both)
    assert found.memory == {"elements": 2 ** 31} and len(found.tried) == 1
    with pytest.raises(ValueError, match="the last 2,147,483,649"):
        peaks.plan(make_step_for, (1, 1, 1), 100 * GIB, both[:1])
    # A CPU takes it.
    found = peaks.plan(make_step_for, (1, 1, 1), 100 * GIB, both, "cpu")
    assert found.memory == both[0] and tile_plans.MOST_ELEMENTS == peaks.MOST_ELEMENTS


def test_memtest_shows_a_row_that_would_fail():
    cfg = load_config(["--preset", "fast"])
    row = memtest.new_row(cfg, of(TASKS, cfg))
    row = memtest.fill(row, lambda device: lambda: torch.empty(2 ** 31 + 1, dtype=torch.bool, device=device),
                       "cuda", False)
    assert row.fits is False and "2,147,483,649 elements" in row.error
    assert row.predicted_gib == pytest.approx(2)


# -------------------------------------------------------------------------------- a whole command

@NO_GPU
@pytest.mark.slow
def test_a_dry_run_predicts_the_tiles_of_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seen = []
    original = fit.make_step

    def noted(cfg, *rest, **more):
        seen.append(cfg.memory.tile)
        return original(cfg, *rest, **more)
    monkeypatch.setattr(fit, "make_step", noted)
    assert train.main([*TINY, "--memory.mode", "tile", "--dry-run"]) == 0
    capsys.readouterr()
    assert train.main([*TINY, "--memory.mode", "tile", "--steps", "1", "--out", "r"]) == 0
    kept = torch.load("r/last.pt", weights_only=True)["config"]["memory"]["tile"]
    assert seen and set(seen) == {tuple(kept)}
