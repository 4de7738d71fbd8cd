"""training/order.py: learning rate, crops and noise of a step are functions of its number alone."""
import math
import os
import subprocess
import sys

import pytest
import torch

import data
from runs import CPU, ROOT, TINY, load_config, rows, run
from training.config import OptimConfig
from training.order import crops_of_step, learning_rate, step_batches, steps_per_epoch


@pytest.mark.parametrize("schedule", [
    "cosine", "cosine_restarts", "constant", "exponential", "step", "plateau"])
@pytest.mark.parametrize("total", [1, 2, 5, 100])
def test_learning_rate_follows_its_formula(schedule, total):
    """For runs of one and two epochs too, in which it once did not fall; it is never 0 before the end and
    never above lr.
    """
    o = OptimConfig(schedule=schedule, lr=2.0, warmup=0.1, warmup_least=0)
    warm = int(0.1 * total)
    for step in range(total):
        t = (step - warm) / max(1, total - warm)
        period = 4 * t - int(4 * t)
        wanted = {"cosine": 1 + math.cos(math.pi * t), "cosine_restarts": 1 + math.cos(math.pi * period),
                  "constant": 2.0, "exponential": 2 * 0.1 ** t, "step": 2 * 0.1 ** int(3 * t),
                  "plateau": 2 * 0.5}[schedule]
        if step < warm:
            wanted = 2.0 * (step + 1) / warm
        assert abs(learning_rate(o, step, total, plateau_factor=0.5) - wanted) < 1e-9
        assert 0 < wanted <= 2.0


@pytest.mark.parametrize("total,warm", [(1, 20), (12, 20), (25, 20), (400, 20), (1000, 50)])
def test_the_warm_up_has_a_least_length(total, warm):
    """Of a share of .05: its steps, but not fewer than 20, also in a run that is shorter; none without."""
    o = OptimConfig(lr=2.0, warmup=0.05, warmup_least=20)
    rates = [learning_rate(o, step, total) for step in range(total)]
    for step, rate in enumerate(rates[:warm]):
        assert abs(rate - 2.0 * (step + 1) / warm) < 1e-12
    assert max(rates) == rates[min(total, warm) - 1] and all(rate > 0 for rate in rates)
    assert learning_rate(OptimConfig(lr=2.0, warmup=0, warmup_least=20), 0, total) == 2.0


@pytest.mark.parametrize("epochs", [1, 2])
def test_logged_rates_are_the_formula(tmp_path, epochs):
    assert run("--epochs", str(epochs), "--accum", "2", out=tmp_path / "r") == 0
    logged, total = rows(tmp_path / "r", "train"), epochs * 5
    assert len(logged) == total                                  # 3 volumes x 3 crops: 4 steps of 2, one of 1
    o = load_config(TINY).optim
    assert [r["lr"] for r in logged] == [learning_rate(o, i, total) for i in range(total)]
    assert [r["epoch"] for r in logged] == [i // 5 for i in range(total)]


@pytest.mark.parametrize("length,batch", [(9, 2), (9, 4), (5, 8), (8, 8), (7, 1)])
def test_the_crops_of_steps_cover_each_epoch_exactly(length, batch):
    """Nothing is dropped, and nothing is carried over the end of an epoch."""
    per_epoch = steps_per_epoch(length, batch)
    taken = [list(crops_of_step(step, length, batch)) for step in range(3 * per_epoch)]
    assert [i for numbers in taken for i in numbers] == list(range(3 * length))
    assert all(len({i // length for i in numbers}) == 1 for numbers in taken)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_step_alone(workers):
    cfg = load_config([*TINY, "--batch", "2", "--accum", "2", "--workers", str(workers)])
    crops = data.Crops(data.open_data(cfg.data, 0, say=lambda _: None), 0)
    whole = dict(step_batches(cfg, crops, range(0, 6), CPU, 4))
    late = dict(step_batches(cfg, crops, range(4, 6), CPU, 4))
    for step in late:
        for a, b in zip(whole[step], late[step], strict=True):
            assert torch.equal(a.image, b.image) and a.volumes == b.volumes and a.seeds == b.seeds


def test_noise_is_another_one_in_each_step_and_for_each_crop():
    cfg = load_config([*TINY, "--batch", "2", "--accum", "2"])
    crops = data.Crops(data.open_data(cfg.data, 0, say=lambda _: None), 0)
    seeds = []
    for _, micro_batches in step_batches(cfg, crops, range(0, 6), CPU, 4):
        seeds += [seed for micro in micro_batches for seed in micro.seeds]
    # 9 crops an epoch: steps of 4, 4 and 1, twice.
    assert len(seeds) == 18 and len(set(seeds)) == 18


STARTS = """
import multiprocessing, os, sys
import train

if __name__ == "__main__":
    methods = ["spawn", "forkserver"]
    if "RANK" in os.environ:                     # each rank by another
        methods = [methods[int(os.environ["RANK"])]]
    for method in methods:
        multiprocessing.set_start_method(method, force=True)
        out = method if len(methods) == 2 else "ranks"
        code = train.main([*sys.argv[2:], "--out", f"{sys.argv[1]}/{out}"])
        if code:
            sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_begin_by_every_start_method_with_and_without_ranks(ranks, tmp_path):
    """Python 3.14 has forkserver on Linux, macOS spawn: what a worker is given is pickled. A lambda once
    ended every run of several ranks there. By fork they begin in test_batches_are_a_function_of_step_alone.
    """
    script = tmp_path / "start.py"
    script.write_text(STARTS)
    words = [sys.executable, str(script)]
    if ranks > 1:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                 "--nproc_per_node", str(ranks), str(script)]
    words += [str(tmp_path), *TINY, "--steps", "2", "--workers", "1", "--train.val_crops", "1"]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-2000:]
    for out in ("spawn", "forkserver") if ranks == 1 else ("ranks",):
        assert [row["step"] for row in rows(tmp_path / out, "train")] == [1, 2]
