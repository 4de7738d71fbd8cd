"""training/edges.py: what goes on over the edge between two stages, to the bit, and what begins anew."""
import json
import random
import re
import shutil
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import train
from runs import (
    CODES,
    CPU,
    ROOT,
    STAGED,
    RunsOut,
    assert_equal_runs,
    flags_of,
    load,
    load_config,
    new_state,
    resume,
    rows,
    timeless,
)
from tasks import TASKS
from training import checkpoints, edges, fit, ready
from training.order import learning_rate
from training.stages import stage_configs
from training.step import train_step
from training.task import of

JUDGED = {"perceptual_weight": 0.1, "adv_weight": 0.3, "lecam_weight": 0.1, "disc_start": 1, "disc_warmup": 2}
# 9 crops an epoch: 5 steps of 1, then steps of 4 (4, 4, 4, 2), then of 2.
THREE = [
    {"name": "low", "steps": 5, "loss": {"perceptual_weight": 0}, "optim": {"lr": 1e-2}},
    {"name": "full", "steps": 4, "data": {"patch": "8,16,16"}, "train": {"batch": 2, "accum": 2},
     "memory": {"mode": "checkpoint"}},
    {"name": "fine", "epochs": 1, "loss": JUDGED, "train": {"accum": 1, "val_every": 2},
     "optim": {"weight_decay": 0.1, "schedule": "constant"}},
]
EVERYTHING = [*CODES, *flags_of({
    "loss__disc_channels": 4, "loss__disc_layers": 1, "loss__disc_strides": "1,2,2", "loss__crop": "4,7,6",
    "train__ema": "0.9,0.99", "optim__clip_percentile": 90, "optim__clip_window": 3})]
FIRST = {"train": {"batch": 1, "val_every": 3, "save_every": 1}, "data": {"patch": "4,8,8"},
         "log": {"every": 1}}


def staged(folder, stages, *words, **sections):
    """The words of a run with these stages."""
    path = folder / "stages.yaml"
    content = {name: dict(fields) for name, fields in (FIRST | sections).items()}
    content["train"] = FIRST["train"] | sections.get("train", {}) | {"stages": json.loads(json.dumps(stages))}
    path.write_text(yaml.safe_dump(content))
    return [*STAGED, "--config", str(path), *words]


def run(words, out):
    return train.main([*words, "--out", str(out)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three stages that nobody disturbs: its words and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    words = staged(folder, THREE, *EVERYTHING)
    assert run(words, folder / "run") == 0
    return words, folder / "run"


FILES = ("last.pt", "best.pt", "best_low.pt", "best_full.pt", "ema_0.99.pt")


# ------------------------------------------------------------------------------------------- to the bit

def test_a_run_of_three_stages(whole):
    """One log, one folder: every row says its stage, every stage has its schedule and its best weights."""
    _, out = whole
    found = rows(out, "train")
    assert [row["stage"] for row in found] == ["low"] * 5 + ["full"] * 4 + ["fine"] * 5
    assert [row["step"] for row in found] == list(range(1, 15))
    assert [row["epoch"] for row in found] == [0] * 6 + [1] * 3 + [2] * 5
    assert ["adv" in row for row in found] == [False] * 10 + [True] * 4            # disc_start 1 of the stage
    assert ["perceptual" in row for row in found] == [False] * 9 + [True] * 5
    low = load_config(staged(out.parent, THREE)).optim
    assert [row["lr"] for row in found[:5]] == [10 * learning_rate(low, step, 5) for step in range(5)]
    # Its own warm-up, of ten steps at least.
    assert [row["lr"] for row in found[9:]] == pytest.approx([0.001 * (k + 1) for k in range(5)])

    # A validation ends each stage and another one begins it.
    val = [(row["step"], row["stage"]) for row in rows(out, "val")]
    assert val == [(0, "low"), (3, "low"), (5, "low"), (5, "full"), (6, "full"), (9, "full"), (9, "fine"),
                   (10, "fine"), (12, "fine"), (14, "fine")]
    last, weights = load(out / "last.pt"), [load(out / name) for name in FILES[1:4]]
    assert last["edges"] == [5, 9] and last["finished"] and last["disc"] is not None
    # Muon's kernels count no steps; what AdamW moves does.
    counted = {int(state["step"]) for state in last["optimizer"]["state"].values() if "step" in state}
    assert counted == {14} and last["disc_optimizer"]["state"][0]["step"] == 4
    assert last["optimizer"]["param_groups"][0]["weight_decay"] == 0.1
    assert [w["stage"] for w in weights] == ["fine", "low", "full"]
    assert [w["config"]["data"]["patch"] for w in weights] == [[8, 16, 16], [4, 8, 8], [8, 16, 16]]
    assert all(w["latent"] is not None and w["config"]["train"]["stages"] == [] for w in weights)
    again = stage_configs(load_config(["--config", str(out / "config.yaml")]))
    assert [each.memory.mode for each in again.values()] == ["none", "checkpoint", "checkpoint"]


class Killer:
    """Interrupts the n-th call of what a run does between its beginning and its end."""
    WATCHED = [(train, "train_step"), (train, "validation"), (train, "save_samples"), (train, "save_last"),
               (checkpoints, "save"), (checkpoints, "copy"), (edges, "enter")]

    def __init__(self, patch, at=None):
        self.calls, self.at = [], at
        for room, name in self.WATCHED:
            patch.setattr(room, name, self.watched(name, getattr(room, name)))

    def watched(self, name, function):
        def call(*arguments, **more):
            self.calls.append(name)
            if len(self.calls) == self.at:
                raise KeyboardInterrupt
            return function(*arguments, **more)
        return call


def same_config(a, b):
    return (a / "config.yaml").read_text().replace(str(a), "") == (
        b / "config.yaml").read_text().replace(str(b), "")


@pytest.mark.slow
@pytest.mark.parametrize("before,end,places", [(4, 7, range(-4, 6)), (8, 11, range(5))],
                         ids=["low to full", "full to fine"])
def test_killed_anywhere_around_an_edge_and_resumed_is_the_same_run(
        whole, tmp_path, monkeypatch, before, end, places):
    """Between any two things that are done at an edge; from the state before it to two steps after it."""
    words, out, folder = [*whole[0], "--steps", str(end)], tmp_path / "whole", tmp_path / "run"
    with monkeypatch.context() as patch:
        killer = Killer(patch)
        assert run(words, out) == 0
    step = [n for n, name in enumerate(killer.calls, 1) if name == "train_step"][before]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Killer(patch, step)
        run(words, folder)
    assert load(folder / "last.pt")["step"] == before
    folder.rename(tmp_path / "before")

    # The calls from there on are those of the whole run.
    calls = killer.calls[step - 1:]
    edge = calls.index("enter") + 1
    assert edge > 4 and len(calls) > edge + 6
    for n in (edge + place for place in places):
        shutil.copytree(tmp_path / "before", folder)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            Killer(patch, n)
            resume(folder)
        assert resume(folder) == 0
        print(f"killed before call {n}, {calls[max(0, n - 4):n + 1]}")   # shown where the next line fails
        assert_equal_runs(out, folder, [name for name in FILES if (out / name).exists()])
        assert same_config(out, folder)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_kill_9_in_every_stage(whole, tmp_path):
    """At a random step of each, one after the other."""
    words, out = whole
    folder, ends = tmp_path / "run", []
    for low, high in ((1, 5), (6, 9), (10, 13)):
        at = random.randint(low, high)
        arguments = [*words, "--out", str(folder)]
        if (folder / "last.pt").exists():                        # absent: killed before its first state
            arguments = ["--resume", str(folder)]
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *arguments],
                                   stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith(f"step {at}/"):
                process.kill()
                break
        ends.append((at, process.wait()))
    print(f"killed at steps {ends}")
    assert [code for _, code in ends] == [-signal.SIGKILL] * 3
    assert resume(folder) == 0
    assert_equal_runs(out, folder, FILES)
    assert same_config(out, folder)


def checkpoints_equal(a, b):
    """Trees of plain values and tensors, to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(checkpoints_equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(checkpoints_equal, a, b))
    return a == b


def test_one_stage_is_a_run_without_stages_to_the_bit(tmp_path):
    fields = {"loss": {"perceptual_weight": 0.1, "perceptual_warmup": 3}, "optim": {"lr": 1e-2}}
    plain = {"train": {"steps": 5, "stages": []}}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = [*STAGED, "--config", str(tmp_path / "a.yaml")]
    sections = FIRST | {"train": FIRST["train"] | {"steps": 5, "ema": 0.9}}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(sections | fields))
    assert run(plain, tmp_path / "a/run") == 0
    only = staged(tmp_path / "b", [{"name": "only", "steps": 5} | fields], train={"ema": 0.9})
    assert run(only, tmp_path / "b/run") == 0
    for name in ("last.pt", "best.pt", "last.prev.pt"):
        a, b = ({key: value for key, value in load(tmp_path / each / "run" / name).items()
                 if key not in ("config", "stage")} for each in "ab")
        assert checkpoints_equal(a, b), name
    log = timeless(tmp_path / "b/run")
    assert {row.pop("stage") for row in log} == {"only"} and log == timeless(tmp_path / "a/run")


def test_two_equal_stages_with_a_flat_schedule_are_one_run(tmp_path):
    """The edge lies within an epoch, and between steps of which one is short of crops."""
    flat = {"optim": {"schedule": "constant", "warmup": 0, "lr": 1e-2}, "train": {"batch": 2, "ema": 0.9}}
    for name, stages in (("one", [{"steps": 13}]), ("two", [{"steps": 6}, {"steps": 7}])):
        (tmp_path / name).mkdir()
        assert run(staged(tmp_path / name, stages, **flat), tmp_path / name / "run") == 0
    one, two = (load(tmp_path / name / "run/last.pt") for name in ("one", "two"))
    for part in ("model", "ema", "optimizer", "step"):
        assert checkpoints_equal(one[part], two[part]), part
    losses = [[(row["step"], row["epoch"], row["loss"]) for row in rows(tmp_path / name / "run", "train")]
              for name in ("one", "two")]
    assert losses[0] == losses[1]


def test_early_stopping_ends_its_stage_alone(tmp_path, monkeypatch):
    """By hand: after 5, two validations without gain end the first stage at step 2. The second begins with 3,
    and with 4 steps of its own.
    """
    values = iter([5, 4, 4, 3, 1, 2, 2, 2, 1])

    def validate(_):
        return {"loss": 1.0, "l1": 1.0, "kl": 0.0, "ssim": 0.0, "psnr": next(values)}, 1
    monkeypatch.setattr("training.validation.validate", validate)
    stages = [{"name": "a", "steps": 90, "until": "plateau"}, {"name": "b", "steps": 4}]
    words = staged(tmp_path, stages, train={"val_every": 1}, optim={"plateau_patience": 2})
    assert run(words, tmp_path / "run") == 0
    last, out = load(tmp_path / "run/last.pt"), tmp_path / "run"
    assert last["edges"] == [2] and last["step"] == 6 and last["finished"]
    assert load(out / "best_a.pt")["metrics"]["psnr"] == 5 and load(out / "best.pt")["metrics"]["psnr"] == 3
    rates = [row["lr"] for row in rows(out, "train")]
    wanted = load_config(words).optim
    assert rates == [learning_rate(wanted, step, 90) for step in (0, 1)] + [
        learning_rate(wanted, step, 4) for step in range(4)]


# ------------------------------------------------------------------------------------------- before the start

def volumes(folder):
    """Three CT volumes of 16 x 24 x 24 voxels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n in range(3):
        values = (rng.random((24, 24, 16)) * 2000 - 1000).astype(np.int16)
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"scan{n}.nii.gz")
    return str(folder)


HALF = [{"name": "low", "steps": 2, "data": {"scale": 0.5, "patch": "4,8,8"}},
        {"name": "full", "steps": 2, "data": {"scale": 1, "patch": "8,16,16"}}]


def test_every_stage_is_cached_before_the_first_step_and_keeps_its_grid(tmp_path, monkeypatch):
    cache = {"cache_dir": str(tmp_path / "c")}
    words = staged(tmp_path, HALF, "--data", volumes(tmp_path / "in"), data=cache)
    records = []

    def watched(*arguments, step=train.train_step):
        records.append(len(list((tmp_path / "c").glob("*.json"))))
        return step(*arguments)
    monkeypatch.setattr(train, "train_step", watched)
    assert run(words, tmp_path / "run") == 0
    assert records == [6, 6, 6, 6]                               # three files on two grids
    spacings = [load(tmp_path / "run" / name)["data"]["spacing"] for name in ("best_low.pt", "best.pt")]
    assert spacings == [[1, 2, 2], [1, 1, 1]]
    kept = [ready.load(tmp_path / "run" / name, TASKS, device="cpu") for name in ("best_low.pt", "last.pt")]
    assert [ready.data_config(each).scale for each in kept] == [0.5, 1]
    assert [row["stage"] for row in rows(tmp_path / "run", "val")] == ["low"] * 2 + ["full"] * 3


def test_what_a_later_stage_lacks_is_told_before_the_first_step(tmp_path, capsys):
    stages = [{"name": "a", "steps": 1}, {"name": "b", "steps": 1, "loss": {"adv_weight": 0.1}}]
    assert run(staged(tmp_path, stages, "--loss.disc_layers", "5"), tmp_path / "run") == 2
    assert "the discriminator sees crops of 4,8,8" in capsys.readouterr().err
    stages[1]["loss"] = {"perceptual_weight": 0.1}
    words = staged(tmp_path, stages, "--loss.perceptual_features", str(tmp_path / "absent.pt"))
    assert run(words, tmp_path / "run") == 2
    assert "absent.pt: no such checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


PATCHES = [{"name": "small", "steps": 1, "data": {"patch": "4,8,8"}},
           {"name": "large", "steps": 1, "data": {"patch": "8,32,32"}},
           {"name": "last", "steps": 1, "data": {"patch": "4,16,16"}}]


@pytest.mark.slow
def test_a_dry_run_tells_each_stage_and_the_largest(tmp_path, capsys):
    words = staged(tmp_path, PATCHES, "--dry-run")
    assert train.main(words) == 0
    said = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("# ")]
    found = {}
    for each in stage_configs(load_config(words)).items():
        cfg = each[1]
        found[each[0]] = fit.predicted(cfg, of(TASKS, cfg), CPU).bytes / 2**30
        assert f"stage {each[0]}: {found[each[0]]:.2f} GiB" in said
    assert max(found, key=found.get) == "large"
    peak = f"predicted peak of a step on cpu: {found['large']:.2f} GiB, in stage large, without"
    assert any(line.startswith(peak) for line in said)


@pytest.mark.slow
def test_fit_looks_at_the_largest_stage(tmp_path, capsys):
    """It finds what it finds for a run of that stage's crops, and puts it in the place of all dials."""
    stages = [PATCHES[0] | {"memory": {"mode": "checkpoint"}}, *PATCHES[1:]]
    (tmp_path / "a").mkdir()
    answers = []
    alone = [*STAGED, "--patch", "8,32,32", "--batch", "1"]
    for words in (staged(tmp_path / "a", stages), alone):
        assert train.main([*words, "--fit", "0.002", "--dry-run"]) == 0
        text = capsys.readouterr().out
        answers.append([line for line in text.splitlines() if "--fit: memory mode" in line])
        if words is not alone:
            assert "# --fit: stage large takes the most" in text
            (tmp_path / "b.yaml").write_text(text)
    assert answers[0] == answers[1] and "tile" in answers[0][0]
    found = stage_configs(load_config(["--config", str(tmp_path / "b.yaml")])).values()
    assert {each.memory.mode for each in found} == {"tile"} and len({each.memory for each in found}) == 1


# ------------------------------------------------------------------------------------------- what goes along

@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_dial_turned_by_recovery_goes_on_with_a_resumed_run(tmp_path, monkeypatch, at):
    """Out of memory in one of three stages. The second asks for a dial of its own."""
    stages = [{"name": "a", "steps": 3}, {"name": "b", "steps": 3, "memory": {"mode": "checkpoint"}},
              {"name": "c", "steps": 3, "data": {"patch": "8,16,16"}}]
    words = staged(tmp_path, stages, train={"save_every": 1})
    ends = []
    for name, stop in (("whole", None), ("cut", 3 * at + 2)):
        def step(cfg, state, batches, stop=stop, take=train_step):
            if state.step == stop:
                raise KeyboardInterrupt
            return take(cfg, state, batches)

        shorts = [3 * at + 1]

        def short(cfg, state, batches, step=step, shorts=shorts):
            if state.step in shorts:
                shorts.remove(state.step)
                with RunsOut([50]):
                    return step(cfg, state, batches)
            return step(cfg, state, batches)
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_step", short)
            if stop is None:
                assert run(words, tmp_path / name) == 0
            else:
                with pytest.raises(KeyboardInterrupt):
                    run(words, tmp_path / name)
        if stop is not None:
            assert resume(tmp_path / name) == 0
        saved = stage_configs(load_config(["--config", str(tmp_path / name / "config.yaml")]))
        ends.append([each.memory.mode for each in saved.values()])
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut", ("last.pt", "best.pt", "best_a.pt", "best_b.pt"))
    turned = [["checkpoint", "checkpoint", "checkpoint"], ["none", "tile", "checkpoint"],
              ["none", "checkpoint", "tile"]][at]
    assert ends == [turned, turned]


def test_codebook_alone_and_then_all_in_one_run(tmp_path):
    """What config/ct_vqvae_stage1.yaml and 2 do in two; killed in the second stage."""
    assert run([*STAGED, "--patch", "4,8,8", "--batch", "1", "--steps", "1"], tmp_path / "vae") == 0
    stages = [{"name": "codes", "steps": 2, "train": {"stage": 1}},
              {"name": "all", "steps": 2, "train": {"stage": 2}}]
    words = staged(tmp_path, stages, *CODES, "--init", str(tmp_path / "vae"), train={"save_every": 1})
    for name, most in (("whole", "4"), ("cut", "3")):
        assert run([*words, "--steps", most], tmp_path / name) == 0
    assert resume(tmp_path / "cut", "--steps", "4") == 0
    assert checkpoints_equal(*(load(tmp_path / name / "last.pt")["optimizer"] for name in ("whole", "cut")))
    vae, codes, both = (load(tmp_path / name)["model"] for name in (
        "vae/best.pt", "whole/best_codes.pt", "whole/last.pt"))
    frozen = [name for name in codes if name.startswith("decoder.")]
    assert all(torch.equal(vae[name], codes[name]) for name in frozen)
    assert any(not torch.equal(both[name], codes[name]) for name in frozen)


def test_precision_codebook_and_judges_of_a_stage(tmp_path, monkeypatch):
    """edges.enter alone: a loss scale goes on, what is frozen is freed, moments that are there stay."""
    words = staged(tmp_path, [{"name": "codes", "steps": 1, "train": {"stage": 1}},
                              {"name": "all", "steps": 1, "train": {"stage": 2, "amp": True},
                               "loss": {"adv_weight": 0.1}}], *EVERYTHING, "--init", "x")
    first, second = stage_configs(load_config(words)).values()
    state = new_state(first)
    assert not any(p.requires_grad for p in state.model.encoder.parameters())
    moments = {id(p): state.optimizer.state[p] for p in state.optimizer.state}
    half = {True: torch.float16, False: None}
    monkeypatch.setattr(edges, "pick_precision", lambda amp, device, model: (half[amp], ""))
    edges.enter(state, second, 1)
    assert all(p.requires_grad and p in state.optimizer.state for p in state.model.encoder.parameters())
    assert all(state.optimizer.state[p] is moments[id(p)] for p in state.optimizer.state if id(p) in moments)
    assert state.amp_dtype is torch.float16 and state.scaler.is_enabled() and state.disc is not None
    scaler, disc = state.scaler, state.disc
    edges.enter(state, second, 2)
    assert state.scaler is scaler and state.disc is disc
    edges.enter(state, first, 3)
    assert state.disc is None and state.disc_optimizer is None and not state.scaler.is_enabled()


# ------------------------------------------------------------------------------------------- docs/STAGES.md

def test_the_stages_of_the_page_are_read(tmp_path):
    page = (ROOT / "docs/STAGES.md").read_text()
    (tmp_path / "page.yaml").write_text(re.findall(r"```yaml\n(.*?)```", page, re.S)[0])
    found = stage_configs(load_config(["--config", str(tmp_path / "page.yaml")]))
    assert list(found) == ["low", "full", "fine"] and found["fine"].train.patience == 5
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        assert (ROOT / "docs" / target).exists(), target
