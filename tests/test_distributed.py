"""Many processes against one: parallel.py, what train.py makes of it, the shared cache, config/slurm.sh. Real gloo processes on the CPU."""
import contextlib
import fcntl
import io
import json
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
from processes import free_port

import data
import parallel
import quantize
import train

ROOT = Path(__file__).parents[1]
TINY = ["--vae.base_channels", "4", "--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8",
        "--data.crops_per_volume", "3", "--train.val_crops", "3", "--train.latent_crops", "2", "--device", "cpu", "--log.sample_every", "0",
        "--log.samples", "1", "--batch", "1"]  # 9 crops an epoch: its last window is short of every global batch below


def session(flags, out, double=False, spoil=None):
    """train.main in this process -> (exit code, stdout, stderr). spoil: changes train for the time, and is told the rank."""
    rank, stdout, stderr = int(os.environ.get("RANK", 0)), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        if double:
            original = train.to_device
            patch.setattr(train, "to_device", lambda image, device: original(image.double(), device))
            torch.set_default_dtype(torch.float64)
        try:
            if spoil is not None:
                spoil(patch, rank)
            code = train.main([*(TINY if "--resume" not in flags else []), *flags, *(["--out", str(out)] if out else [])])
        finally:
            torch.set_default_dtype(torch.float32)
    return code, stdout.getvalue(), stderr.getvalue()


def rows(out, split):
    return [row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["split"] == split]


def weights(out):
    last = torch.load(out / "last.pt", weights_only=True)
    modules = {"model": last["model"], "disc": last["disc"], **{f"ema{k}": ema for k, ema in enumerate(last["ema"])}}
    return {f"{part} {name}": value for part, module in modules.items() for name, value in (module or {}).items()}


def assert_same_run(a, b, tolerance=1e-6, skip=()):
    skip = {"seconds", "voxels_per_second", "peak_gib", *skip}
    for split in ("train", "val"):
        ours, theirs = rows(a, split), rows(b, split)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for x, y in zip(ours, theirs):
            assert x.keys() - skip == y.keys() - skip
            far = {k: (x[k], y[k]) for k in x.keys() - skip if x[k] != y[k] and not abs(x[k] - y[k]) <= tolerance * max(1, abs(y[k]))}
            assert not far, f"{split} row of step {x['step']}: {far}"
    ours, theirs = weights(a), weights(b)
    far = {k: float((ours[k].double() - theirs[k].double()).abs().max()) for k in theirs}
    assert ours.keys() == theirs.keys() and max(far.values()) <= tolerance, {k: v for k, v in far.items() if v > tolerance}


# -------------------------------------------------------------------------------------------------------- two processes against one

GAN = ["--loss.adv_weight", "0.3", "--loss.disc_channels", "4", "--loss.disc_layers", "1", "--loss.disc_strides", "1,2,2",
       "--loss.disc_start", "3"]
VQ = ["--vae.bottleneck", "vq", "--vae.num_codes", "16", "--train.ema", "0.9"]
EVERYTHING = [*GAN, *VQ, "--loss.lecam_weight", "0.1", "--loss.r1_weight", "1", "--loss.feature_matching_weight", "0.5",
              "--loss.adaptive_weight", "--optim.clip_percentile", "90", "--optim.clip_window", "3", "--loss.perceptual_weight", "0.1"]
SHORT = ["--steps", "20", "--train.val_every", "10", "--train.save_every", "20"]


@pytest.mark.parametrize("flags,accum", [([], 1), (GAN, 3), (VQ, 3), ([*GAN, *VQ], 1), (EVERYTHING, 3),
                                         (["--memory.mode", "tile", "--memory.tile", "4,8,8"], 3)],
                         ids=["kl", "kl gan 3", "vq 3", "vq gan", "everything 3", "tile 3"])
def test_two_ranks_equal_one_process_with_the_same_global_batch(pool, tmp_path, flags, accum):
    """20 AdamW steps in float64, short windows, validation and early-stopping counters among them. 1e-6; found: 1e-12."""
    flags = [*flags, *SHORT]
    assert session([*flags, "--accum", str(2 * accum)], tmp_path / "one", double=True)[0] == 0
    ended = pool(2, session, [*flags, "--accum", str(accum), "--log.ddp_check", "4"], tmp_path / "two", True)
    assert [code for code, *_ in ended] == [0, 0] and ended[1][1:] == ("", "") and "2 ranks" in ended[0][1]
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert [math.isclose(r["voxels_per_second"] * r["seconds"], 256 * n, rel_tol=0.05) for r, n in
            zip(rows(tmp_path / "two", "train"), [2 * accum] * (9 // (2 * accum)))] == [True] * (9 // (2 * accum))


SHARED = ["--memory.mode", "tile", "--memory.tile", "4,4,8", "--memory.stretch", "2", "--memory.tile_parallel"]


def test_ranks_that_share_the_tiles_equal_one_process_with_the_same_batch(pool, tmp_path):
    """The global batch stays batch x accum, whatever the number of ranks."""
    flags = [*VQ, *GAN, "--steps", "6", "--train.val_every", "3", "--accum", "2", "--memory.mode", "tile", "--memory.tile", "4,4,8"]
    assert session(flags, tmp_path / "one", double=True)[0] == 0
    ended = pool(2, session, [*flags, *SHARED, "--log.ddp_check", "1"], tmp_path / "two", True)
    assert [code for code, *_ in ended] == [0, 0] and "6 steps of 2 crops on 2 ranks" in ended[0][1] and ended[1][1:] == ("", "")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_out_of_memory_on_one_of_the_ranks_that_share_tiles_turns_the_dial_of_all(pool, tmp_path):
    flags = [*SHARED, "--steps", "3", "--train.val_every", "3", "--patch", "8,16,16"]
    assert {code for code, *_ in pool(2, session, flags, tmp_path / "whole", True)} == {0}
    ended = pool(2, session, [*flags, "--memory.tile", "8,16,16"], tmp_path / "short", True, runs_out_once)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert [row["change"].split(":")[0] for row in rows(tmp_path / "short", "memory")] == ["step 2"]
    assert_same_run(tmp_path / "whole", tmp_path / "short")


def runs_out_once(patch, rank):
    original, raised = train.objective, []

    def objective(cfg, state, *rest):
        if rank == 1 and state.step == 1 and not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return original(cfg, state, *rest)
    patch.setattr(train, "objective", objective)


def test_adamw_in_float32_stays_within_rounding(pool, tmp_path):
    assert session([*GAN, *SHORT, "--accum", "2"], tmp_path / "one")[0] == 0
    assert {code for code, *_ in pool(2, session, [*GAN, *SHORT], tmp_path / "two")} == {0}
    pairs = list(zip(rows(tmp_path / "one", "train"), rows(tmp_path / "two", "train")))
    assert len(pairs) == 20 and max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-4


def test_two_ranks_segment_and_validate_like_one(pool, tmp_path):
    """Whole volumes of Dice, their counts added up over the ranks; 2 of 5 volumes are held out, 1 for each rank."""
    flags = ["--task", "seg", "--unet.channels", "4,8", "--patch", "8,16,16", "--data.synthetic_count", "5", "--data.val_fraction", "0.4",
             "--train.val_whole", "--steps", "4", "--train.val_every", "4"]
    assert session([*flags, "--accum", "2"], tmp_path / "one", double=True)[0] == 0
    assert {code for code, *_ in pool(2, session, flags, tmp_path / "two", True)} == {0}
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_resuming_on_other_numbers_of_ranks_is_the_same_run(pool, tmp_path):
    """2 ranks, then 1, then 3: the global batch of 4 is kept, and with it the order of the data."""
    flags = [*GAN, *VQ, "--optim.schedule", "constant", "--optim.warmup", "0", "--train.val_every", "4"]
    assert session([*flags, "--accum", "4", "--steps", "12"], tmp_path / "whole", double=True)[0] == 0
    out = tmp_path / "parts"
    assert {code for code, *_ in pool(2, session, [*flags, "--accum", "2", "--steps", "4"], out, True)} == {0}
    assert session(["--resume", str(out), "--steps", "8"], None, double=True)[0] == 0
    ended = pool(3, session, ["--resume", str(out), "--steps", "12"], None, True)
    assert {code for code, *_ in ended} == {0} and "12 steps of 4 crops on 3 ranks" in ended[0][1]
    assert_same_run(tmp_path / "whole", out, skip=("codebook_usage", "perplexity"))  # also counted where a run ends
    ended = pool(2, session, ["--resume", str(out), "--steps", "13", "--accum", "3"], None)
    assert "4 crops a step -> 6 (batch 1 x accum 3 x ranks 2)" in ended[0][1] and ended[1][1] == ""


# --------------------------------------------------------------------------------------------------------------- they end together

def runs_out(patch, rank):
    """Rank 1 runs out of memory in step 2, rank 0 then in the second validation."""
    original, raised = train.objective, []

    def objective(cfg, state, *rest):
        at = (state.step, rest[-1] is None, cfg.memory.mode)
        if at in ([(1, False, "none")] if rank == 1 else [(4, True, "checkpoint")]) and at not in raised:
            raised.append(at)
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return original(cfg, state, *rest)
    patch.setattr(train, "objective", objective)


def test_out_of_memory_on_one_rank_turns_the_dial_of_all_and_changes_no_result(pool, tmp_path):
    flags = [*VQ, "--steps", "6", "--train.val_every", "4", "--accum", "2"]
    assert {code for code, *_ in pool(2, session, flags, tmp_path / "whole", True)} == {0}
    assert {code for code, *_ in pool(2, session, [*flags, "--log.ddp_check", "1"], tmp_path / "short", True, runs_out)} == {0}
    changes = [(row["step"], row["change"]) for row in rows(tmp_path / "short", "memory")]
    assert len(changes) == 2 and changes[0][0] == 1 and "none -> checkpoint" in changes[0][1] and "checkpoint -> tile" in changes[1][1]
    assert_same_run(tmp_path / "whole", tmp_path / "short")


def poisoned(patch, rank):
    """Rank 1 begins with other weights, and one of its crops in step 2 has a NaN."""
    new_state, original = train.new_state, train.train_step

    def unlike(*arguments):
        state = new_state(*arguments)
        with torch.no_grad():
            next(state.model.parameters()).add_(rank)
        return state

    def train_step(cfg, state, batches):
        if rank == 1 and state.step == 1:
            batches[0].image[0, 0, 0, 0, 0] = math.nan
        return original(cfg, state, batches)
    patch.setattr(train, "new_state", unlike)
    patch.setattr(train, "train_step", train_step)


def test_ranks_begin_alike_and_skip_a_non_finite_step_together(pool, tmp_path):
    flags = [*GAN, *VQ, "--loss.disc_start", "0", "--steps", "4", "--log.ddp_check", "1"]
    assert {code for code, *_ in pool(2, session, flags, tmp_path / "a", False, poisoned)} == {0}
    assert [row.get("skipped", False) for row in rows(tmp_path / "a", "train")] == [False, True, False, False]
    ended = pool(2, session, [*flags, "--train.nan_limit", "1"], tmp_path / "b", False, poisoned)
    assert {code for code, *_ in ended} == {1}
    told_once(ended, "train.py: rank .* non-finite steps in a row .*")
    images = torch.load(tmp_path / "b/nan_step_000002.pt", weights_only=True)["images"]
    assert [bool(image.isnan().any()) for image in images] == [False, True]


def test_running_statistics_are_the_same_on_all_ranks(pool, tmp_path):
    """Batch norm, also where a rank has no micro-batch: ddp_check compares them."""
    flags = ["--task", "seg", "--unet.channels", "4,8", "--unet.norm", "batch", "--patch", "8,16,16", "--steps", "5",
             "--log.ddp_check", "1"]
    assert {code for code, *_ in pool(2, session, flags, tmp_path / "a")} == {0}


def breaks(patch, rank):
    original = train.train_step

    def train_step(cfg, state, batches):
        if rank == 1 and state.step == 2:
            raise data.DataError("scan7.npy: the disk is gone")
        return original(cfg, state, batches)
    patch.setattr(train, "train_step", train_step)


def drifts(patch, rank):
    original = train.train_step

    def train_step(cfg, state, batches):
        if rank == 1 and state.step == 2:
            with torch.no_grad():
                weight = next(state.model.decoder.parameters())
                weight[(0,) * weight.dim()].nextafter_(torch.tensor(9.0))
        return original(cfg, state, batches)
    patch.setattr(train, "train_step", train_step)


def told_once(ended, says):
    errors = "".join(err for *_, err in ended)
    assert errors.count("\n") == 1 and re.fullmatch(says, errors.strip()), errors


def test_an_error_on_one_rank_ends_all_with_one_line(pool, tmp_path):
    ended = pool(2, session, ["--steps", "9"], tmp_path / "a", False, breaks)
    assert {code for code, *_ in ended} == {2}
    told_once(ended, r"train.py: rank 1 on \S+: scan7.npy: the disk is gone")
    ended = pool(2, session, ["--steps", "9", "--log.ddp_check", "4"], tmp_path / "b", False, drifts)
    assert {code for code, *_ in ended} == {1}
    told_once(ended, r"train.py: rank \d on \S+: step 4: model decoder\S+ is not the same on rank 1 as on rank 0 .*")
    assert len(rows(tmp_path / "b", "train")) == 4 and torch.load(tmp_path / "b/last.pt", weights_only=True)["step"] == 0


def test_usage_errors_are_told_once_and_a_dry_run_prints_once(pool, tmp_path):
    for flags, says in (["--bogus", "1"], "train.py: rank 0.*--bogus.*"), (["--resume", str(tmp_path)], "train.py: rank 0.*no such.*"):
        ended = pool(2, session, flags, None)
        assert {code for code, *_ in ended} == {2}
        told_once(ended, says)
    ended = pool(2, session, ["--dry-run"], tmp_path / "a")
    assert {code for code, *_ in ended} == {0} and ended[0][1].count("predicted peak") == 1 and ended[1][1:] == ("", "")
    assert not list(tmp_path.iterdir())


def signals_itself(number, guilty, patch, rank):
    """Rank `guilty` sends itself a signal in step 4."""
    original = train.train_step

    def train_step(cfg, state, batches):
        if rank == guilty and state.step == 3:
            os.kill(os.getpid(), number)
        return original(cfg, state, batches)
    patch.setattr(train, "train_step", train_step)


def test_a_signal_to_one_rank_stops_all_at_the_same_step_with_the_state_saved(pool, tmp_path):
    ended = pool(2, session, ["--steps", "9"], tmp_path / "a", False, partial(signals_itself, signal.SIGUSR1, 1))
    assert {code for code, *_ in ended} == {138} and torch.load(tmp_path / "a/last.pt", weights_only=True)["step"] == 4
    assert f"torchrun --nproc_per_node 2 train.py --resume {tmp_path / 'a'}" in ended[0][1] and ended[1][1:] == ("", "")


# --------------------------------------------------------------------------------------------------------------------- the pieces

@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_are_stretches_that_cover_all(monkeypatch, count, ranks):
    monkeypatch.setattr(parallel, "world", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        shares.append(list(parallel.shared(count)))
    assert [k for share in shares for k in share] == list(range(count)) and max(map(len, shares)) == -(-count // ranks)
    assert len(shares[0]) == max(map(len, shares))              # the first rank has work wherever one has


def pieces():
    """Rank 1 has no gradient of `a`, no rank one of `c`; `b` is 16-bit."""
    with parallel.started(int(os.environ["RANK"]), 2):
        a, b, c = torch.zeros(2, 3, 1, 2, 1).to(memory_format=torch.channels_last_3d), torch.zeros(4, dtype=torch.half), torch.zeros(2)
        for p in (a, b, c):
            p.requires_grad_()
        if parallel.first():
            a.grad = torch.empty_like(a).copy_(torch.arange(12.0).view(a.shape))
        b.grad = torch.full((4,), 1.5 + parallel.rank(), dtype=torch.half)
        gradients = parallel.Gradients([a, b, c])
        gradients.add_up()
        terms = parallel.summed({"loss": torch.tensor(2.0)} if parallel.first() else {}, torch.device("cpu"))
        statistics = torch.tensor([1.0, 3.0]) + 2 * parallel.rank()
        parallel.average([statistics])
        order = torch.tensor([1.0, 2.0]) if parallel.first() else torch.tensor([2.0, 1.0])
        return (a.grad.tolist(), a.grad.stride() == a.stride(), b.grad.tolist(), c.grad, terms, statistics.tolist(),
                parallel.difference({"same": torch.tensor([math.nan]), "codebook": order}))


def test_sums_fill_in_for_ranks_without_micro_batches(pool):
    for grad_a, layout, grad_b, grad_c, terms, statistics, different in pool(2, pieces):
        assert grad_a == torch.arange(12.0).view(2, 3, 1, 2, 1).tolist() and layout and grad_b == [4.0] * 4 and grad_c is None
        assert terms == {"loss": 2.0} and statistics == [2.0, 4.0] and different == "codebook is not the same on rank 1 as on rank 0"


LEAVES = """
import os, parallel
with parallel.started(int(os.environ["RANK"]), 2):
    import torch._dynamo                                         # as the first optimizer does
    parallel.barrier()
print([name for name in (open(f"/proc/self/task/{t}/comm").read() for t in os.listdir("/proc/self/task")) if "gloo" in name])
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find threads")
def test_the_group_and_its_threads_end_with_it_and_not_with_the_interpreter():
    variables = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, "-c", LEAVES], cwd=ROOT, env=variables | {"RANK": str(rank)}, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE) for rank in range(2)]
    assert [rank.communicate(timeout=120)[0] for rank in ranks] == ["[]\n"] * 2


def restarted():
    """Two updates of a codebook after which every code starts anew, in 5 samples of which this rank has its share."""
    with parallel.started(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))):
        torch.manual_seed(0)
        quantizer = quantize.VectorQuantizer(16, 2, restart=9.0).double()
        for step in range(2):
            z, places = torch.randn(5, 2, 3, 4, 5, dtype=torch.float64), parallel.shared(5)
            quantizer.quantize_volume(z[places.start:places.stop], [torch.Generator().manual_seed(100 * step + place) for place in places])
            quantizer.update(torch.Generator().manual_seed(step))
        return quantizer.state_dict()


def test_codes_start_anew_from_the_same_latents_on_any_number_of_ranks(pool):
    one = restarted()
    for ranks in (2, 3):
        for other in pool(ranks, restarted):
            assert max(float((one[name] - other[name]).abs().max()) for name in one) < 1e-12


def counting(patch, rank):
    original = data.load

    def load(item, cfg):
        with open(os.environ["COUNT"], "a") as file:
            file.write(f"{rank} {item.path.name}\n")
        time.sleep(0.3)                                          # as long as a volume takes: the other rank comes by meanwhile
        return original(item, cfg)
    patch.setattr(data, "load", load)


def in_folder(folder, flags):
    os.environ |= {"COUNT": f"{folder}/count.txt", "XDG_CACHE_HOME": f"{folder}/cache"}
    return session(["--data", f"{folder}/DATA", "--dry-run", *flags], None, False, counting)


def test_ranks_share_the_building_of_the_cache(pool, tmp_path):
    (tmp_path / "DATA").mkdir()
    for n in range(4):
        np.save(tmp_path / f"DATA/v{n}.npy", np.random.default_rng(n).random((8, 8, 8), dtype=np.float32))
    assert {code for code, *_ in pool(2, in_folder, tmp_path, [])} == {0}
    built = [line.split() for line in (tmp_path / "count.txt").read_text().splitlines()]
    assert sorted(name for _, name in built) == [f"v{n}.npy" for n in range(4)] and {rank for rank, _ in built} == {"0", "1"}
    assert not list((tmp_path / "cache/vae3d").glob(".*"))


def test_a_builder_that_dies_is_not_waited_for(tmp_path):
    record, held = tmp_path / "scan.json", tmp_path / ".scan.lock"
    holder = subprocess.Popen([sys.executable, "-c", f"import fcntl, time; f = open({str(held)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
                                                     "print(flush=True); time.sleep(60)"], stdout=subprocess.PIPE)
    holder.stdout.readline()
    with data._one_at_a_time(record, wait=False) as mine:
        assert not mine
    holder.kill()
    holder.wait()
    with data._one_at_a_time(record, wait=True) as mine, open(held) as file:
        assert mine
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not held.exists()


# ------------------------------------------------------------------------------------------------------------------------ torchrun

needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc to find torchrun's processes")


def torchrun(*flags):
    return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(ROOT / "train.py"), *TINY, *flags],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


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
    process = torchrun("--steps", "100000", "--train.save_every", "5", "--log.every", "1", "--out", str(tmp_path / "a"))
    until(process.stdout, "step 6/")
    os.kill(max(children(process.pid)), signal.SIGKILL)
    started = time.monotonic()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and time.monotonic() - started < 60
    assert output.count("train.py: rank 0 on ") == 1 and "another rank is gone" in output and "/train.py\", line" not in output
    assert f"torchrun --nproc_per_node 2 train.py --resume {tmp_path / 'a'}" in output
    step = torch.load(tmp_path / "a/last.pt", weights_only=True)["step"]
    assert step >= 5 and session(["--resume", str(tmp_path / "a"), "--steps", str(step + 2)], None)[0] == 0


STUBS = {"srun": 'exec "$@"\n',
         "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"\n',
         "scontrol": 'echo "$@" >> "$REQUESTS"\n'}


@needs_proc
def test_slurm_script_saves_and_requeues_before_the_end_of_its_time_and_goes_on(tmp_path):
    """With stubs of srun and scontrol, and real torchrun: USR1 to the script, as --signal=B:USR1 sends it, then the script once more."""
    script = ROOT / "config/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0 and re.search("^#SBATCH --signal=B:USR1@", script.read_text(), re.M)
    (tmp_path / "bin").mkdir()
    for name, body in STUBS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}")
        (tmp_path / "bin" / name).chmod(0o755)
    out, requests = tmp_path / "run", tmp_path / "requests"
    variables = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711", "SLURM_NNODES": "1",
                              "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(ROOT), "REQUESTS": str(requests), "LOGLEVEL": "ERROR"}

    def submit(*flags):
        return subprocess.Popen(["bash", script, *flags], env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert submit("--steps", "3").wait() == 2 and not requests.exists()             # without --out
    process = submit(*TINY, "--steps", "100000", "--log.every", "1", "--workers", "1", "--out", str(out))
    until(process.stdout, "step 4/")
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert "stopped by SIGUSR1 at step" in output and process.returncode == 0 and requests.read_text() == "requeue 4711\n", output
    step = torch.load(out / "last.pt", weights_only=True)["step"]
    assert step >= 4
    process = submit(*TINY, "--steps", "100000", "--out", str(out), "--log.every", "1")
    output = "".join(until(process.stdout, f"step {step + 1}/"))
    for number in (*children(process.pid), process.pid):         # as scancel does: the script waits for the tasks and requeues nothing
        os.kill(number, signal.SIGTERM)
    output += process.communicate(timeout=60)[0]
    assert "stopped by SIGTERM at step" in output and process.returncode == 1 and requests.read_text() == "requeue 4711\n", output


def test_a_killed_rank_ends_the_others_without_torchrun_too(pool, tmp_path):
    """The last test of the pool: it loses a process."""
    pool.begin(3, session, ["--steps", "9", "--train.save_every", "2"], tmp_path / "a", False,
               partial(signals_itself, signal.SIGKILL, 2))
    started = time.monotonic()
    ended = pool.end([0, 1], 60)
    assert time.monotonic() - started < 60 and {code for code, *_ in ended} == {1}
    told_once(ended, r"train.py: rank \d on \S+: another rank is gone or does not answer; go on with: .*--resume .*")
    assert session(["--resume", str(tmp_path / "a"), "--steps", "3"], None)[0] == 0
