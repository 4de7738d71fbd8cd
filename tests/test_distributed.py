"""Many processes against one: training/ranks.py, what train.py makes of it, the shared cache,
config/slurm.sh. Real gloo processes on the CPU.
"""
import contextlib
import fcntl
import functools
import io
import math
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import quantize
import tasks.diffusion
import tasks.sparse
import tasks.vae
import train
from latent_files import write_set
from processes import free_port
from runs import CODES, CPU, ROOT, TIMES, load, rows
from runs import TINY as TINY_OF_ONE
from training import memory, ranks
from training.devices import to_device
from training.step import train_step
from volumes import cache
from volumes.files import DataError

pytestmark = pytest.mark.slow

# 9 crops an epoch: its last step is short of every global batch below.
TINY = [*TINY_OF_ONE, "--train.val_crops", "3", "--log.samples", "1"]


def session(flags, out, double=False, spoil=None):
    """train.main in this process -> (exit code, stdout, stderr). spoil: changes train for the time, and is
    told the rank.
    """
    rank, stdout, stderr = int(os.environ.get("RANK", 0)), io.StringIO(), io.StringIO()
    words = list(flags)
    if "--resume" not in flags and "--config" not in flags:
        words = [*TINY, *flags]
    if out:
        words += ["--out", str(out)]
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        stack.enter_context(contextlib.redirect_stdout(stdout))
        stack.enter_context(contextlib.redirect_stderr(stderr))
        if double:
            for room in ("training.order", "tasks.vae", "tasks.diffusion"):
                patch.setattr(f"{room}.to_device", lambda image, device: to_device(image.double(), device))
            points_of = tasks.sparse.points_of
            patch.setattr("tasks.sparse.points_of", lambda image, device: doubled(points_of(image, device)))
            torch.set_default_dtype(torch.float64)
        try:
            if spoil is not None:
                spoil(patch, rank)
            code = train.main(words)
        finally:
            torch.set_default_dtype(torch.float32)
    return code, stdout.getvalue(), stderr.getvalue()


def doubled(points):
    return tasks.sparse.PointBatch(points.code, points.feats.double(), *points[2:])


def codes_of(ended):
    return {code for code, *_ in ended}


def weights(out):
    last = torch.load(out / "last.pt", weights_only=True)
    modules = {"model": last["model"], "disc": last["disc"] or {}}
    modules |= {f"ema{k}": ema for k, ema in enumerate(last["ema"])}
    return {f"{part} {name}": value for part, module in modules.items() for name, value in module.items()}


def is_near(a, b, tolerance):
    return a == b or abs(a - b) <= tolerance * max(1, abs(b))


def assert_same_run(a, b, tolerance=1e-6, skip=()):
    skip = {*TIMES, *skip}
    for split in ("train", "val"):
        ours, theirs = rows(a, split), rows(b, split)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for x, y in zip(ours, theirs):
            names = x.keys() - skip
            assert names == y.keys() - skip
            far = {name: (x[name], y[name]) for name in names if not is_near(x[name], y[name], tolerance)}
            assert not far, f"{split} row of step {x['step']}: {far}"
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    far = {name: float((ours[name].double() - theirs[name].double()).abs().max()) for name in theirs}
    assert max(far.values()) <= tolerance, {name: v for name, v in far.items() if v > tolerance}


# ------------------------------------------------------------------------------ two processes against one

GAN = ["--loss.adv_weight", "0.3", "--loss.disc_channels", "4", "--loss.disc_layers", "1",
       "--loss.disc_strides", "1,2,2", "--loss.disc_start", "3"]
VQ = [*CODES, "--train.ema", "0.9"]
EVERYTHING = [*GAN, *VQ, "--loss.lecam_weight", "0.1", "--loss.r1_weight", "1",
              "--loss.feature_matching_weight", "0.5", "--loss.adaptive_weight", "--optim.clip_percentile",
              "90", "--optim.clip_window", "3", "--loss.perceptual_weight", "0.1"]
SHORT = ["--steps", "20", "--train.val_every", "10", "--train.save_every", "20"]


@pytest.mark.parametrize("flags,accum", [
    ([], 1), (GAN, 3), (VQ, 3), ([*GAN, *VQ], 1), (EVERYTHING, 3),
    (["--memory.mode", "tile", "--memory.tile", "4,8,8"], 3),
], ids=["kl", "kl gan 3", "vq 3", "vq gan", "everything 3", "tile 3"])
def test_two_ranks_equal_one_process_with_the_same_global_batch(pool, tmp_path, flags, accum):
    """20 AdamW steps in float64, short steps, validation and early-stopping counters among them. 1e-6;
    found: 1e-12.
    """
    flags, both = [*flags, *SHORT], 2 * accum
    assert session([*flags, "--accum", str(both)], tmp_path / "one", double=True)[0] == 0
    flags = [*flags, "--accum", str(accum), "--log.ddp_check", "4"]
    ended = pool(2, session, flags, tmp_path / "two", True)
    assert [code for code, *_ in ended] == [0, 0]
    assert ended[1][1:] == ("", "") and "2 ranks" in ended[0][1]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    whole_steps = rows(tmp_path / "two", "train")[:9 // both]    # of the first epoch
    assert len(whole_steps) == 9 // both
    for row in whole_steps:
        voxels = row["voxels_per_second"] * row["seconds"]
        assert math.isclose(voxels, 256 * both, rel_tol=0.05)


POINTS = ["--task", "sparse", "--preset", "sparse_light", "--sparse.model_channels", "32",
          "--sparse.head_channels", "8", "--sparse.num_blocks", "1", "--sparse.num_codes", "8",
          "--sparse.codebooks", "2", "--data.synthetic", "radar", "--data.surface", "none",
          "--data.min_points", "1", "--data.synthetic_size", "16,32,32", "--patch", "8,16,16",
          "--optim.optimizer", "adamw"]


@pytest.mark.parametrize("flags", [
    ["--train.ema", "0.9", "--optim.clip_percentile", "90", "--optim.clip_window", "3"],
    ["--sparse.bottleneck", "kl", "--memory.mode", "tile", "--memory.tile", "8,8,8"]],
    ids=["vq averaged clipped", "kl tile"])
def test_ranks_of_points_equal_one_process(pool, tmp_path, flags):
    """Crops of a rank have other numbers of points than those of the other: each crop counts alike."""
    flags = [*POINTS, *flags, "--steps", "4", "--train.val_every", "2", "--train.save_every", "4"]
    assert session([*flags, "--accum", "4"], tmp_path / "one", double=True)[0] == 0
    ended = pool(2, session, [*flags, "--accum", "2", "--log.ddp_check", "4"], tmp_path / "two", True)
    assert codes_of(ended) == {0}, ended
    assert_same_run(tmp_path / "one", tmp_path / "two")


TILE = ["--memory.mode", "tile", "--memory.tile", "4,4,8"]
SHARED = [*TILE, "--memory.stretch", "2", "--memory.tile_parallel"]


def test_ranks_that_share_the_tiles_equal_one_process_with_the_same_batch(pool, tmp_path):
    """The global batch stays batch x accum, whatever the number of ranks."""
    flags = [*VQ, *GAN, *TILE, "--steps", "6", "--train.val_every", "3", "--accum", "2"]
    assert session(flags, tmp_path / "one", double=True)[0] == 0
    ended = pool(2, session, [*flags, *SHARED, "--log.ddp_check", "1"], tmp_path / "two", True)
    assert [code for code, *_ in ended] == [0, 0]
    assert "6 steps of 2 crops on 2 ranks" in ended[0][1] and ended[1][1:] == ("", "")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def runs_out_once(patch, rank):
    original, raised = tasks.vae.objective, []

    def objective(cfg, state, *rest):
        if rank == 1 and state.step == 1 and not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return original(cfg, state, *rest)
    patch.setattr(tasks.vae, "objective", objective)


def test_out_of_memory_on_one_of_the_ranks_that_share_tiles_turns_the_dial_of_all(pool, tmp_path):
    flags = [*SHARED, "--steps", "3", "--train.val_every", "3", "--patch", "8,16,16"]
    assert codes_of(pool(2, session, flags, tmp_path / "whole", True)) == {0}
    larger = [*flags, "--memory.tile", "8,16,16"]
    ended = pool(2, session, larger, tmp_path / "short", True, runs_out_once)
    assert [code for code, *_ in ended] == [0, 0], ended
    changes = [row["change"].split(":")[0] for row in rows(tmp_path / "short", "memory")]
    assert changes == ["step 2"]
    assert_same_run(tmp_path / "whole", tmp_path / "short")


def test_stages_on_two_ranks_equal_one_process_and_go_on_with_three(pool, tmp_path):
    """The second stage has crops, batch and a discriminator of its own; within it the ranks become three."""
    plain = [w for flag, value in zip(TINY[::2], TINY[1::2]) if flag not in ("--patch", "--batch")
             for w in (flag, value)]
    flags = [*plain, *GAN[2:8], "--train.ema", "0.9", "--train.val_every", "4"]
    for name, accum in (("one", 2), ("two", 1)):
        (tmp_path / f"{name}.yaml").write_text(
            "data: {patch: [4, 8, 8]}\n"
            f"train: {{batch: 1, accum: {accum}, stages: [{{name: low, steps: 5}}, {{name: fine, steps: 5, "
            "train: {batch: 2}, data: {patch: [8, 8, 8]}, loss: {adv_weight: 0.3, disc_start: 1}}]}\n")
    one, two = tmp_path / "one", tmp_path / "two"
    assert session([*flags, "--config", f"{one}.yaml", "--steps", "7"], one, double=True)[0] == 0
    assert session(["--resume", str(one), "--steps", "10"], None, double=True)[0] == 0
    ended = pool(2, session, [*flags, "--config", f"{two}.yaml", "--steps", "7"], two, True)
    assert codes_of(ended) == {0}, ended
    ended = pool(3, session, ["--resume", str(two), "--steps", "10"], None, True)
    assert codes_of(ended) == {0}, ended
    assert [row["stage"] for row in rows(two, "train")] == ["low"] * 5 + ["fine"] * 5
    assert "adv" in rows(two, "train")[-1]
    assert_same_run(one, two)


def test_adamw_in_float32_stays_within_rounding(pool, tmp_path):
    assert session([*GAN, *SHORT, "--accum", "2"], tmp_path / "one")[0] == 0
    assert codes_of(pool(2, session, [*GAN, *SHORT], tmp_path / "two")) == {0}
    pairs = list(zip(rows(tmp_path / "one", "train"), rows(tmp_path / "two", "train")))
    assert len(pairs) == 20 and max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-4


def test_two_ranks_segment_and_validate_like_one(pool, tmp_path):
    """Whole volumes of Dice, their counts added up over the ranks; 2 of 5 volumes are held out, 1 for each
    rank.
    """
    flags = ["--task", "seg", "--unet.channels", "4,8", "--patch", "8,16,16", "--data.synthetic_count", "5",
             "--data.val_fraction", "0.4", "--train.val_whole", "--steps", "4", "--train.val_every", "4"]
    assert session([*flags, "--accum", "2"], tmp_path / "one", double=True)[0] == 0
    assert codes_of(pool(2, session, flags, tmp_path / "two", True)) == {0}
    assert_same_run(tmp_path / "one", tmp_path / "two")


DENOISER = ["--task", "diffusion", "--unet.channels", "8,16", "--unet.time_channels", "16",
            "--unet.norm_groups", "4", "--patch", "4,4,4", "--diffusion.steps", "2",
            "--data.crops_per_volume", "3", "--train.ema", "0.5,0.9", "--data.val_fraction", "0.4"]


@pytest.mark.parametrize("beside", ["concat", "control"])
def test_two_ranks_denoise_like_one(pool, tmp_path, beside):
    """Noise, level and lost conditions are a crop's own wherever it is trained on; mean and std of latents
    are those of the whole set on each rank; a frozen denoiser has no gradients to share.
    """
    write_set(tmp_path / "z", kind="ct")
    write_set(tmp_path / "beside", seed=1, weights="b" * 16)
    base = [*DENOISER, "--data", str(tmp_path / "z")]
    flags = [*base, "--cond.concat", str(tmp_path / "beside")]
    if beside == "control":
        (tmp_path / "labels").mkdir()
        for number in range(6):
            label = np.random.default_rng(number).integers(0, 9, (32, 32, 8)).astype(np.float32)
            np.save(tmp_path / f"labels/case{number}.npy", label)
        assert session([*base, "--steps", "2"], tmp_path / "base")[0] == 0
        flags = [*base, "--init", str(tmp_path / "base"), "--cond.control", str(tmp_path / "labels")]
    flags += ["--steps", "8", "--train.val_every", "4", "--train.save_every", "8"]
    assert session([*flags, "--accum", "6"], tmp_path / "one", double=True)[0] == 0
    ended = pool(2, session, [*flags, "--accum", "3", "--log.ddp_check", "4"], tmp_path / "two", True)
    assert codes_of(ended) == {0} and ended[1][1:] == ("", "")
    assert_same_run(tmp_path / "one", tmp_path / "two")
    known = [torch.load(tmp_path / name / "last.pt", weights_only=True)["latent"] for name in ("one", "two")]
    assert torch.equal(known[0]["mean"], known[1]["mean"]) and torch.equal(known[0]["std"], known[1]["std"])


def test_resuming_on_other_numbers_of_ranks_is_the_same_run(pool, tmp_path):
    """2 ranks, then 1, then 3: the global batch of 4 is kept, and with it the order of the data."""
    flags = [*GAN, *VQ, "--optim.schedule", "constant", "--optim.warmup", "0", "--train.val_every", "4"]
    assert session([*flags, "--accum", "4", "--steps", "12"], tmp_path / "whole", double=True)[0] == 0
    out = tmp_path / "parts"
    assert codes_of(pool(2, session, [*flags, "--accum", "2", "--steps", "4"], out, True)) == {0}
    assert session(["--resume", str(out), "--steps", "8"], None, double=True)[0] == 0
    ended = pool(3, session, ["--resume", str(out), "--steps", "12"], None, True)
    assert codes_of(ended) == {0} and "12 steps of 4 crops on 3 ranks" in ended[0][1]
    at_each_end = ("codebook_usage", "perplexity")               # also counted where a run ends
    assert_same_run(tmp_path / "whole", out, skip=at_each_end)
    ended = pool(2, session, ["--resume", str(out), "--steps", "13", "--accum", "3"], None)
    assert "4 crops a step -> 6 (batch 1 x accum 3 x ranks 2)" in ended[0][1] and ended[1][1] == ""


# --------------------------------------------------------------------------------------- they end together

def runs_out(patch, rank):
    """Rank 1 runs out of memory in step 2, rank 0 then in the second validation."""
    originals, raised = (tasks.vae.objective, tasks.vae.criterion), []
    where = (4, True, "checkpoint")
    if rank == 1:
        where = (1, False, "none")

    def tried(is_validation, cfg, state, *rest):
        if (state.step, is_validation, state.dial.mode) == where and not raised:
            raised.append(where)
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return originals[is_validation](cfg, state, *rest)
    patch.setattr(tasks.vae, "objective", functools.partial(tried, False))
    patch.setattr(tasks.vae, "criterion", functools.partial(tried, True))


def test_out_of_memory_on_one_rank_turns_the_dial_of_all_and_changes_no_result(pool, tmp_path):
    flags = [*VQ, "--steps", "6", "--train.val_every", "4", "--accum", "2"]
    assert codes_of(pool(2, session, flags, tmp_path / "whole", True)) == {0}
    checked = [*flags, "--log.ddp_check", "1"]
    assert codes_of(pool(2, session, checked, tmp_path / "short", True, runs_out)) == {0}
    changes = [(row["step"], row["change"]) for row in rows(tmp_path / "short", "memory")]
    assert len(changes) == 2 and changes[0][0] == 1
    assert "none -> checkpoint" in changes[0][1] and "checkpoint -> tile" in changes[1][1]
    assert_same_run(tmp_path / "whole", tmp_path / "short")


def poisoned(patch, rank):
    """Rank 1 begins with other weights, and one of its crops in step 2 has a NaN."""
    begin = memory.begin

    def unlike(*arguments):
        state = begin(*arguments)
        with torch.no_grad():
            next(state.model.parameters()).add_(rank)
        return state

    def with_nan(cfg, state, batches):
        if rank == 1 and state.step == 1:
            batches[0].image[0, 0, 0, 0, 0] = math.nan
        return train_step(cfg, state, batches)
    patch.setattr(memory, "begin", unlike)
    patch.setattr(train, "train_step", with_nan)


def test_ranks_begin_alike_and_skip_a_non_finite_step_together(pool, tmp_path):
    flags = [*GAN, *VQ, "--loss.disc_start", "0", "--steps", "4", "--log.ddp_check", "1"]
    assert codes_of(pool(2, session, flags, tmp_path / "a", False, poisoned)) == {0}
    skipped = [row.get("skipped", False) for row in rows(tmp_path / "a", "train")]
    assert skipped == [False, True, False, False]
    ended = pool(2, session, [*flags, "--train.nan_limit", "1"], tmp_path / "b", False, poisoned)
    assert codes_of(ended) == {1}
    told_once(ended, "train.py: rank .* non-finite steps in a row .*")
    images = torch.load(tmp_path / "b/nan_step_000002.pt", weights_only=True)["images"]
    assert [bool(image.isnan().any()) for image in images] == [False, True]


def test_running_statistics_are_the_same_on_all_ranks(pool, tmp_path):
    """Batch norm, also where a rank has no micro-batch: ddp_check compares them."""
    flags = ["--task", "seg", "--unet.channels", "4,8", "--unet.norm", "batch", "--patch", "8,16,16",
             "--steps", "5", "--log.ddp_check", "1"]
    assert codes_of(pool(2, session, flags, tmp_path / "a")) == {0}


def breaks(patch, rank):
    def broken(cfg, state, batches):
        if rank == 1 and state.step == 2:
            raise DataError("scan7.npy: the disk is gone")
        return train_step(cfg, state, batches)
    patch.setattr(train, "train_step", broken)


def drifts(patch, rank):
    def drifting(cfg, state, batches):
        if rank == 1 and state.step == 2:
            with torch.no_grad():
                weight = next(state.model.decoder.parameters())
                weight[(0,) * weight.dim()].nextafter_(torch.tensor(9.0))
        return train_step(cfg, state, batches)
    patch.setattr(train, "train_step", drifting)


def told_once(ended, says):
    errors = "".join(err for *_, err in ended)
    assert errors.count("\n") == 1 and re.fullmatch(says, errors.strip()), errors


def test_an_error_on_one_rank_ends_all_with_one_line(pool, tmp_path):
    ended = pool(2, session, ["--steps", "9"], tmp_path / "a", False, breaks)
    assert codes_of(ended) == {2}
    told_once(ended, r"train.py: rank 1 on \S+: scan7.npy: the disk is gone")
    ended = pool(2, session, ["--steps", "9", "--log.ddp_check", "4"], tmp_path / "b", False, drifts)
    assert codes_of(ended) == {1}
    told_once(ended, r"train.py: rank \d on \S+: "
                     r"step 4: model decoder\S+ is not the same on rank 1 as on rank 0 .*")
    assert len(rows(tmp_path / "b", "train")) == 4 and load(tmp_path / "b/last.pt")["step"] == 0


def test_usage_errors_are_told_once_and_a_dry_run_prints_once(pool, tmp_path):
    for flags, says in ((["--bogus", "1"], "train.py: rank 0.*--bogus.*"),
                        (["--resume", str(tmp_path)], "train.py: rank 0.*no such.*")):
        ended = pool(2, session, flags, None)
        assert codes_of(ended) == {2}
        told_once(ended, says)
    ended = pool(2, session, ["--dry-run"], tmp_path / "a")
    assert codes_of(ended) == {0}
    assert ended[0][1].count("# predicted peak") == 2, ended[0][1]
    assert ended[1][1:] == ("", "")
    assert not list(tmp_path.iterdir())


def signals_itself(number, guilty, patch, rank):
    """Rank `guilty` sends itself a signal in step 4."""
    def signalled(cfg, state, batches):
        if rank == guilty and state.step == 3:
            os.kill(os.getpid(), number)
        return train_step(cfg, state, batches)
    patch.setattr(train, "train_step", signalled)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_the_state_saved(pool, tmp_path):
    signalled = partial(signals_itself, signal.SIGUSR1, 1)
    ended = pool(2, session, ["--steps", "9"], tmp_path / "a", False, signalled)
    assert codes_of(ended) == {138} and load(tmp_path / "a/last.pt")["step"] == 4
    assert f"torchrun --nproc_per_node 2 train.py --resume {tmp_path / 'a'}" in ended[0][1]
    assert ended[1][1:] == ("", "")


# ----------------------------------------------------------------------------------------------- the pieces

def pieces():
    """Rank 1 has no gradient of `a`, no rank one of `c`; `b` is 16-bit."""
    with ranks.started(int(os.environ["RANK"]), 2):
        a = torch.zeros(2, 3, 1, 2, 1).to(memory_format=torch.channels_last_3d)
        b, c = torch.zeros(4, dtype=torch.half), torch.zeros(2)
        for p in (a, b, c):
            p.requires_grad_()
        terms, order = {}, torch.tensor([2.0, 1.0])
        if ranks.first():
            a.grad = torch.empty_like(a).copy_(torch.arange(12.0).view(a.shape))
            terms, order = {"loss": torch.tensor(2.0)}, torch.tensor([1.0, 2.0])
        b.grad = torch.full((4,), 1.5 + ranks.rank(), dtype=torch.half)
        gradients = ranks.Gradients([a, b, c])
        gradients.add_up()
        terms = ranks.summed(terms, CPU)
        statistics = torch.tensor([1.0, 3.0]) + 2 * ranks.rank()
        ranks.average([statistics])
        different = ranks.difference({"same": torch.tensor([math.nan]), "codebook": order})
        return (a.grad.tolist(), a.grad.stride() == a.stride(), b.grad.tolist(), c.grad, terms,
                statistics.tolist(), different)


def test_sums_fill_in_for_ranks_without_micro_batches(pool):
    for grad_a, layout, grad_b, grad_c, terms, statistics, different in pool(2, pieces):
        assert grad_a == torch.arange(12.0).view(2, 3, 1, 2, 1).tolist() and layout
        assert grad_b == [4.0] * 4 and grad_c is None
        assert terms == {"loss": 2.0} and statistics == [2.0, 4.0]
        assert different == "codebook is not the same on rank 1 as on rank 0"


LEAVES = """
import os
from training import ranks
with ranks.started(int(os.environ["RANK"]), 2):
    import torch._dynamo                                         # as the first optimizer does
    ranks.barrier()
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
print([name for name in names if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find threads")
def test_the_group_and_its_threads_end_with_it_and_not_with_the_interpreter():
    variables = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = []
    for rank in range(2):
        processes.append(subprocess.Popen(
            [sys.executable, "-c", LEAVES], cwd=ROOT, env=variables | {"RANK": str(rank)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    assert [process.communicate(timeout=120)[0] for process in processes] == ["[]\n"] * 2


def restarted():
    """Two updates of a codebook after which every code starts anew, in 5 samples of which this rank has its
    share.
    """
    with ranks.started(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))):
        torch.manual_seed(0)
        quantizer = quantize.VectorQuantizer(16, 2, restart=9.0).double()
        for step in range(2):
            z, places = torch.randn(5, 2, 3, 4, 5, dtype=torch.float64), ranks.shared(5)
            generators = [torch.Generator().manual_seed(100 * step + place) for place in places]
            quantizer.quantize_volume(z[places.start:places.stop], generators)
            quantizer.update(torch.Generator().manual_seed(step))
        return quantizer.state_dict()


def test_codes_start_anew_from_the_same_latents_on_any_number_of_ranks(pool):
    one = restarted()
    for world in (2, 3):
        for other in pool(world, restarted):
            assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-12


def counting(patch, rank):
    original = cache.load

    def load_and_count(item, cfg):
        with open(os.environ["COUNT"], "a") as file:
            file.write(f"{rank} {item.path.name}\n")
        time.sleep(0.3)                                          # as a volume takes: the other rank comes by
        return original(item, cfg)
    patch.setattr(cache, "load", load_and_count)


def in_folder(folder, flags):
    os.environ |= {"COUNT": f"{folder}/count.txt", "XDG_CACHE_HOME": f"{folder}/cache"}
    return session(["--data", f"{folder}/DATA", "--dry-run", *flags], None, False, counting)


def test_ranks_share_the_building_of_the_cache(pool, tmp_path):
    (tmp_path / "DATA").mkdir()
    for n in range(4):
        volume = np.random.default_rng(n).random((8, 8, 8), dtype=np.float32)
        np.save(tmp_path / f"DATA/v{n}.npy", volume)
    assert codes_of(pool(2, in_folder, tmp_path, [])) == {0}
    built = [line.split() for line in (tmp_path / "count.txt").read_text().splitlines()]
    assert sorted(name for _, name in built) == [f"v{n}.npy" for n in range(4)]
    assert {rank for rank, _ in built} == {"0", "1"}
    assert not list((tmp_path / "cache/vae3d").glob(".*"))


HOLDS_A_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print(flush=True)
time.sleep(60)
"""


def test_a_builder_that_dies_is_not_waited_for(tmp_path):
    record, held = tmp_path / "scan.json", tmp_path / ".scan.lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS_A_LOCK, str(held)], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with cache.one_at_a_time(record, wait=False) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with cache.one_at_a_time(record, wait=True) as mine, open(held) as file:
        assert mine
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not held.exists()


# ------------------------------------------------------------------------------------------------- torchrun

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(),
                                reason="needs /proc to find torchrun's processes")


def torchrun(*flags):
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py")]
    return subprocess.Popen([*words, *TINY, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True)


def until(stream, start):
    lines = []
    for line in stream:
        lines.append(line)
        if line.startswith(start):
            return lines
    raise AssertionError("".join(lines))


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@needs_proc
def test_a_killed_rank_under_torchrun_ends_the_run_and_it_resumes(tmp_path):
    out = tmp_path / "a"
    process = torchrun("--steps", "100000", "--train.save_every", "5", "--log.every", "1", "--out", str(out))
    until(process.stdout, "step 6/")
    os.kill(max(children(process.pid)), signal.SIGKILL)
    started = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - started < 60
    assert output.count("train.py: rank 0 on ") == 1 and "another rank is gone" in output
    assert "/train.py\", line" not in output
    assert f"torchrun --nproc_per_node 2 train.py --resume {out}" in output
    step = load(out / "last.pt")["step"]
    assert step >= 5 and session(["--resume", str(out), "--steps", str(step + 2)], None)[0] == 0


STUBS = {"srun": 'exec "$@"\n',
         "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
         "scontrol": 'echo "$@" >> "$REQUESTS"\n'}


@needs_proc
def test_slurm_script_saves_and_requeues_before_the_end_of_its_time_and_goes_on(tmp_path):
    """With stubs of srun and scontrol, and real torchrun: USR1 to the script, as --signal=B:USR1 sends it,
    then the script once more.
    """
    script = ROOT / "config/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert re.search("^#SBATCH --signal=B:USR1@", script.read_text(), re.M)
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    out, requests = tmp_path / "run", tmp_path / "requests"
    variables = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT), "REQUESTS": str(requests),
        "LOGLEVEL": "ERROR"}

    def submit(*flags):
        return subprocess.Popen(["bash", script, *flags], env=variables, stdout=subprocess.PIPE,
                                stderr=subprocess.STDOUT, text=True)
    long = [*TINY, "--steps", "100000", "--log.every", "1", "--out", str(out)]
    assert submit("--steps", "3").wait() == 2 and not requests.exists()             # without --out
    process = submit(*long, "--workers", "1")
    until(process.stdout, "step 4/")
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "stopped by SIGUSR1 at step" in output and process.returncode == 0, output
    assert requests.read_text() == "requeue 4711\n", output
    step = load(out / "last.pt")["step"]
    assert step >= 4

    # As scancel does: the script waits for the tasks and requeues nothing.
    process = submit(*long)
    output = "".join(until(process.stdout, f"step {step + 1}/"))
    for number in (*children(process.pid), process.pid):
        os.kill(number, signal.SIGTERM)
    output += process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM at step" in output and process.returncode == 1, output
    assert requests.read_text() == "requeue 4711\n", output


def test_a_killed_rank_ends_the_others_without_torchrun_too(pool, tmp_path):
    """The pool loses a process here, and begins anew after it."""
    pool.begin(3, session, ["--steps", "9", "--train.save_every", "2"], tmp_path / "a", False,
               partial(signals_itself, signal.SIGKILL, 2))
    started = time.monotonic()
    ended = pool.end([0, 1], 60)
    assert time.monotonic() - started < 60 and codes_of(ended) == {1}
    told_once(ended, r"train.py: rank \d on \S+: another rank is gone or does not answer; "
                     r"go on with: .*--resume .*")
    assert session(["--resume", str(tmp_path / "a"), "--steps", "3"], None)[0] == 0
    pool.close()
