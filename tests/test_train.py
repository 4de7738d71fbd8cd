"""train.py: configuration, the step against its definition, bit-exact resume, and the defects that concern training."""
import ast
import contextlib
import copy
import dataclasses
import errno
import gc
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoints
import data
import losses
import predict
import quantize
import train
import vae3d
from train import MicroBatch, OptimConfig, TrainConfig

ROOT = Path(__file__).parents[1]
TINY = ["--vae.base_channels", "4", "--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8",
        "--data.crops_per_volume", "3", "--train.val_crops", "2", "--train.latent_crops", "2", "--device", "cpu", "--log.sample_every", "0",
        "--batch", "1"]


def run(*flags, out):
    return train.main([*TINY, *flags, "--out", str(out)])


def rows(out, split=None):
    parsed = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [row for row in parsed if split in (None, row["split"])]


def weights(out, name="last.pt"):
    return torch.load(out / name, weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ----------------------------------------------------------------------------------------------------------- one step, by its definition

def tiny_state(**changes):
    cfg = train.load_config([*TINY, *(part for k, v in changes.items() for part in (f"--{k.replace('__', '.')}", str(v)))])
    return cfg, train.new_state(cfg, torch.device("cpu"))


def micro_batches(sizes, dtype=torch.float32, seed=0, size=(4, 8, 8)):
    g, result, place = torch.Generator().manual_seed(seed), [], 0
    for n in sizes:
        seeds = [100 + place + i for i in range(n)]
        result.append(MicroBatch(torch.rand(n, 1, *size, generator=g, dtype=dtype) * 2 - 1, seeds, [0] * n))
        place += n
    return result


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [4, 2], [5, 1], [1, 1, 1, 3]])
def test_micro_batches_equal_one_batch_for_a_tail_of_any_length(sizes):
    """DEFECTS 7. Float64 and SGD, so that the update is linear in the gradient."""
    results = []
    for split in ([6], sizes):
        cfg, state = tiny_state(optim__optimizer="sgd", optim__grad_clip=0)
        doubled(state)
        result = train.train_step(cfg, state, micro_batches(split, torch.float64))
        results.append((torch.cat([p.detach().flatten() for p in state.model.parameters()]), result.terms["loss"]))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-12
    assert abs(results[0][1] - results[1][1]) < 1e-12


def test_step_equals_the_slow_version():
    """One AdamW step written out with plain torch: loss, clipping and update."""
    cfg, state = tiny_state(optim__grad_clip=0.01, loss__kl_weight=0.1)
    reference = vae3d.VAE3D(cfg.vae)
    reference.load_state_dict(state.model.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    result = train.train_step(cfg, state, micro_batches([2, 1]))
    total = 0
    for image, seeds, *_ in micro_batches([2, 1]):
        recon, mu, logvar = reference(image, [torch.Generator().manual_seed(seed) for seed in seeds])
        total = total + ((recon - image).abs().mean() - 0.1 * 0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()) * len(image) / 3
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()
    for p in reference.parameters():
        p.grad *= 0.01 / (norm + 1e-6)
    optimizer.step()
    assert abs(float(result.norm - norm)) < 1e-5 and norm > 0.01 and abs(float((result.terms["loss"] - total).detach())) < 1e-6
    assert max(float((a - b).detach().abs().max()) for a, b in zip(reference.parameters(), state.model.parameters())) < 1e-6


def test_clipping_happens_after_unscaling():
    """DEFECTS 8: a loss scale of 65536 must change neither the norm that is compared with the threshold nor the update."""
    results = []
    for scaled in (False, True):
        cfg, state = tiny_state(optim__optimizer="sgd", optim__grad_clip=0.01)
        if scaled:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        result = train.train_step(cfg, state, micro_batches([1, 1]))
        results.append((result.norm, torch.cat([p.detach().flatten() for p in state.model.parameters()])))
    assert abs(float(results[0][0] / results[1][0]) - 1) < 1e-5 and results[0][0] > 0.01
    assert (results[0][1] - results[1][1]).abs().max() < 1e-7


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_micro_batch_leaves_the_weights_as_they_were(poison):
    """DEFECTS 10: also in the middle of an accumulation window."""
    cfg, state = tiny_state(train__ema=0.9)
    before, before_ema = [{k: v.clone() for k, v in m.state_dict().items()} for m in (state.model, state.emas[0])]
    window = micro_batches([1, 1, 1])
    window[1].image[0, 0, 0, 0, 0] = poison
    result = train.train_step(cfg, state, window)
    assert not result.updated and same(before, state.model.state_dict()) and same(before_ema, state.emas[0].state_dict())
    assert train.train_step(cfg, state, micro_batches([1])).updated


def test_autocast_step_stays_close_to_float32():
    """bf16 autocast on the CPU stands in for CUDA's: KL and losses are float32, the update is finite and near.

    Without oneDNN: on CPUs that lack bf16, its channels_last_3d kernels for tiny sizes read memory that nobody wrote (docs/LOG.md).
    train.py uses bf16 on a CPU only where it is native.
    """
    results = []
    for dtype in (None, torch.bfloat16):
        cfg, state = tiny_state()
        state.amp_dtype = dtype
        with torch.backends.mkldnn.flags(enabled=False):
            results.append(train.train_step(cfg, state, micro_batches([2])))
    assert all(t.dtype == torch.float32 for t in results[1].terms.values())
    assert abs(float(results[0].terms["loss"] / results[1].terms["loss"]) - 1) < 0.02 and results[1].updated


def test_ema_follows_its_formula():
    cfg, state = tiny_state(train__ema=0.5)
    before = [p.clone() for p in state.emas[0].parameters()]
    state.step = 100                                             # past the rise of the decay
    train.train_step(cfg, state, micro_batches([1]))
    for old, new, live in zip(before, state.emas[0].parameters(), state.model.parameters()):
        assert (new - (0.5 * old + 0.5 * live)).abs().max() < 1e-6


# ------------------------------------------------------------------------------------------------------------- schedules and data order

@pytest.mark.parametrize("schedule", ["cosine", "cosine_restarts", "constant", "exponential", "step", "plateau"])
@pytest.mark.parametrize("total", [1, 2, 5, 100])
def test_learning_rate_follows_its_formula(schedule, total):
    """DEFECTS 8: for runs of one and two epochs too; the rate falls, is never 0 before the end and never above lr."""
    o = OptimConfig(schedule=schedule, lr=2.0, warmup=0.1)
    warm = int(0.1 * total)
    for step in range(total):
        t = (step - warm) / max(1, total - warm)
        want = {"cosine": 1 + math.cos(math.pi * t), "cosine_restarts": 1 + math.cos(math.pi * (4 * t - int(4 * t))), "constant": 2.0,
                "exponential": 2 * 0.1 ** t, "step": 2 * 0.1 ** int(3 * t), "plateau": 2 * 0.5}[schedule]
        want = 2.0 * (step + 1) / warm if step < warm else want
        assert abs(train.learning_rate(o, step, total, plateau_factor=0.5) - want) < 1e-9
        assert 0 < want <= 2.0


@pytest.mark.parametrize("epochs", [1, 2])
def test_logged_rates_are_the_formula(tmp_path, epochs):
    assert run("--epochs", str(epochs), "--accum", "2", out=tmp_path / "r") == 0
    logged = rows(tmp_path / "r", "train")
    assert len(logged) == epochs * 5                             # 3 training volumes x 3 crops = 9: four windows of 2 and one of 1
    o = OptimConfig()
    assert [r["lr"] for r in logged] == [train.learning_rate(o, i, epochs * 5) for i in range(epochs * 5)]
    assert [r["epoch"] for r in logged] == [i // 5 for i in range(epochs * 5)]


def test_plateau_counts_validations():
    cfg = train.load_config([*TINY, "--optim.schedule", "plateau", "--optim.plateau_patience", "2", "--optim.gamma", "0.5"])
    state = types.SimpleNamespace(step=1, best=None, best_loss=math.inf, bad_validations=0, plateau=(math.inf, 1.0, 0))
    factors = []
    for loss in (1.0, 0.9, 0.95, 0.95, 0.8, 0.9, 0.9, 0.9, 0.9):
        train.update_best(cfg, state, {"psnr": 0.0, "loss": loss})
        factors.append(state.plateau[1])
    assert factors == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.125]


@pytest.mark.parametrize("length,batch", [(9, 2), (9, 4), (5, 8), (8, 8), (7, 1)])
def test_windows_cover_each_epoch_exactly(length, batch):
    per_epoch = train.steps_per_epoch(length, batch)
    taken = [list(train.window_of(step, length, batch)) for step in range(3 * per_epoch)]
    assert [i for window in taken for i in window] == list(range(3 * length))       # nothing dropped, nothing carried over an edge
    assert all(len({i // length for i in window}) == 1 for window in taken)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_step_alone(workers):
    cfg = train.load_config([*TINY, "--batch", "2", "--accum", "2", "--workers", str(workers)])
    crops = data.Crops(data.open_data(cfg.data, 0, say=lambda _: None), 0)
    whole = dict(train.step_batches(cfg, crops, range(0, 6), torch.device("cpu"), 4))
    late = dict(train.step_batches(cfg, crops, range(4, 6), torch.device("cpu"), 4))
    for step in late:
        for a, b in zip(whole[step], late[step], strict=True):
            assert torch.equal(a.image, b.image) and a.volumes == b.volumes and a.seeds == b.seeds


# --------------------------------------------------------------------------------------------------------------------- resume and files

def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *TINY, *flags]


def test_kill_and_resume_equals_uninterrupted(tmp_path):
    """DEFECTS 15: kill -9 at a random step; final weights, optimizer and log equal those of the run left alone, to the bit."""
    flags = ["--steps", "40", "--accum", "2", "--train.save_every", "3", "--train.val_every", "7", "--train.ema", "0.9", "--log.every", "1"]
    assert run(*flags, out=tmp_path / "whole") == 0
    process = subprocess.Popen(command(*flags, "--out", str(tmp_path / "cut")), stdout=subprocess.PIPE, text=True)
    at = random.randint(4, 30)
    for line in process.stdout:
        if line.startswith(f"step {at}/"):
            process.kill()
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL and 0 < torch.load(tmp_path / "cut/last.pt", weights_only=True)["step"] <= at
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert (tmp_path / "whole/last.pt").read_bytes() == (tmp_path / "cut/last.pt").read_bytes(), f"killed at step {at}"
    assert (tmp_path / "whole/best.pt").read_bytes() == (tmp_path / "cut/best.pt").read_bytes(), f"killed at step {at}"
    timeless = [[{k: v for k, v in r.items() if k not in ("seconds", "voxels_per_second", "peak_gib")} for r in rows(tmp_path / name)]
                for name in ("whole", "cut")]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signals_save_the_state_and_name_the_command(tmp_path, number, code, capsys, monkeypatch):
    flags = ["--steps", "6", "--train.val_every", "2"]
    assert run(*flags, out=tmp_path / "whole") == 0
    original = train.train_step

    def signalled(cfg, state, batches):
        if state.step == 2:
            os.kill(os.getpid(), number)
        return original(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", signalled)
    assert run(*flags, out=tmp_path / "cut") == code
    assert f"--resume {tmp_path / 'cut'}" in capsys.readouterr().out
    monkeypatch.setattr(train, "train_step", original)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert (tmp_path / "whole/last.pt").read_bytes() == (tmp_path / "cut/last.pt").read_bytes()


def test_resuming_a_finished_run_leaves_it_as_it_is_and_more_steps_go_on(tmp_path, capsys):
    out = tmp_path / "r"
    assert run("--steps", "2", out=out) == 0
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert train.main(["--resume", str(out)]) == 0 and train.main(["--resume", str(out / "last.pt")]) == 0
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert "nothing to do" in capsys.readouterr().out
    assert train.main(["--resume", str(out), "--steps", "4"]) == 0 and [r["step"] for r in rows(out, "train")] == [1, 2, 3, 4]


def test_an_existing_run_is_never_overwritten(tmp_path, capsys):
    assert run("--steps", "1", out=tmp_path / "r") == 0
    before = (tmp_path / "r/last.pt").read_bytes()
    assert run("--steps", "3", out=tmp_path / "r") == 2
    assert "--resume" in capsys.readouterr().err and (tmp_path / "r/last.pt").read_bytes() == before


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for want in ("ultra_lightweight", "ultra_lightweight-2"):
        assert train.main([*TINY, "--steps", "1"]) == 0 and (tmp_path / "runs" / want / "best.pt").is_file()


def test_checkpoint_of_another_network_is_an_error(tmp_path, capsys):
    """DEFECTS 15: nothing is loaded half, and a file that holds none of the keys is no success."""
    assert run("--steps", "1", out=tmp_path / "r") == 0
    content = torch.load(tmp_path / "r/last.pt", weights_only=True)
    content["model"] = {f"module.{k}": v for k, v in content["model"].items()}
    torch.save(content, tmp_path / "r/last.pt")
    assert train.main(["--resume", str(tmp_path / "r"), "--steps", "2"]) == 2
    assert "missing" in capsys.readouterr().err


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_crafted_pickle_is_refused(tmp_path, capsys, monkeypatch):
    """DEFECTS 17."""
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "vae3d.train", "model": Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Evil()))
    Path("cut.pt").write_bytes(Path("evil.pt").read_bytes()[:200])
    Path("empty.pt").write_bytes(b"")
    for name in ("evil.pt", "raw.pt", "cut.pt", "empty.pt", "absent.pt"):
        assert train.main(["--resume", name]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and "Traceback" not in error
    assert not Path("executed").exists()


def test_every_load_is_weights_only():
    """DEFECTS 17."""
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and k.value.value is True for k in node.keywords), f"{path}:{node.lineno}"


def test_keep_older_checkpoints(tmp_path):
    assert run("--steps", "6", "--train.save_every", "1", "--train.keep", "2", out=tmp_path / "r") == 0
    assert sorted(p.name for p in (tmp_path / "r").glob("step_*.pt")) == ["step_000005.pt", "step_000006.pt"]


def test_kept_checkpoints_survive_a_kill_between_write_and_removal_and_no_other_file_goes(tmp_path, monkeypatch):
    flags, original = ["--steps", "6", "--train.save_every", "1", "--train.keep", "2"], checkpoints.place
    assert run(*flags, out=tmp_path / "whole") == 0
    (tmp_path / "cut").mkdir()
    for name in ("step_best.pt", "step_000001_mine.pt", "my.tmp"):
        (tmp_path / "cut" / name).write_text("a user's")
    for at in (3, 6):                                            # killed before last.pt is the new file; 6: the last one

        def killed(source, target, at=at):
            if source.name == f"step_{at:06d}.pt":
                (tmp_path / "cut/last.next.pt").write_text("half written")
                raise KeyboardInterrupt
            original(source, target)
        monkeypatch.setattr(checkpoints, "place", killed)
        with pytest.raises(KeyboardInterrupt):
            train.main(["--resume", str(tmp_path / "cut")]) if at > 3 else run(*flags, out=tmp_path / "cut")
        assert load(tmp_path / "cut/last.pt")["step"] == at - 1
    monkeypatch.setattr(checkpoints, "place", original)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    found = [{path.name for path in (tmp_path / name).iterdir()} for name in ("whole", "cut")]
    assert found[1] - found[0] == {"step_best.pt", "step_000001_mine.pt", "my.tmp"} and found[0] < found[1]
    assert_equal_runs(tmp_path / "whole", tmp_path / "cut")
    assert {"step_000005.pt", "step_000006.pt"} == {path.name for path in (tmp_path / "whole").glob("step_*")}


def load(path):
    return checkpoints.load(path, "vae3d.train", "vae3d.weights")


def assert_equal_runs(a, b, names=("last.pt", "best.pt")):
    for name in names:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    times = ("seconds", "voxels_per_second", "peak_gib")
    timeless = [[{k: v for k, v in r.items() if k not in times} for r in rows(out)] for out in (a, b)]
    assert timeless[0] == timeless[1]


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def test_a_loss_scale_is_taken_over_only_where_both_runs_have_one(tmp_path):
    """A run of a card with bf16 goes on on one without, and the reverse: fp16's GradScaler begins anew, or is left out."""
    assert run("--steps", "2", out=tmp_path / "r") == 0
    content = load(tmp_path / "r/last.pt")
    state = train.new_state(train.config_from(content["config"], train.TrainConfig(), "last.pt"), torch.device("cpu"))
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train.restore(state, content, tmp_path / "r/last.pt")        # {}: nothing to take over
    assert state.scaler.get_scale() == 8.0 and state.step == 2
    train.restore(state, content | {"scaler": state.scaler.state_dict() | {"scale": 2.0}}, tmp_path / "r/last.pt")
    assert state.scaler.get_scale() == 2.0
    state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    train.restore(state, content | {"scaler": torch.amp.GradScaler("cpu").state_dict()}, tmp_path / "r/last.pt")


def test_a_damaged_last_falls_back_to_the_one_before_and_a_damaged_best_is_made_anew(tmp_path, capsys, monkeypatch):
    flags, whole, out = ["--steps", "6", "--train.save_every", "2", "--train.val_every", "3"], tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0 and run(*flags, out=out) == 0
    flip(out / "last.pt")
    capsys.readouterr()
    assert train.main(["--resume", str(out)]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "last.prev.pt" in line]
    assert len(said) == 1 and "checksum" in said[0] and "step 4" in said[0]
    assert_equal_runs(whole, out)
    assert load(out / "last.prev.pt")["step"] == 4               # what was damaged did not take its place
    flip(out / "best.pt")
    assert predict.main(["reconstruct", "--checkpoint", str(out), "--input", "x", "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "checksum" in error and "best.pt" in error and error.count("\n") == 1
    assert train.main(["--resume", str(out), "--steps", "8"]) == 0 and "take its place" in capsys.readouterr().out
    best = load(out / "best.pt")
    assert best["metrics"]["psnr"] == max(r["psnr"] for r in rows(out, "val") if r["step"] >= 6) and best["latent"] is not None
    for name in ("last.pt", "last.prev.pt"):
        flip(out / name)
    assert train.main(["--resume", str(out)]) == 2 and capsys.readouterr().err.count("\n") == 1


def test_going_back_to_an_older_checkpoint_takes_the_later_ones_back(tmp_path, monkeypatch):
    flags = ["--steps", "6", "--train.save_every", "2", "--train.keep", "3"]
    assert run(*flags, out=tmp_path / "whole") == 0 and run(*flags, out=tmp_path / "r") == 0

    def killed(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        train.main(["--resume", str(tmp_path / "r/step_000002.pt")])
    assert load(tmp_path / "r/last.pt")["step"] == 2 and train.main(["--resume", str(tmp_path / "r")]) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "r", ["last.pt", "best.pt", "step_000002.pt", "step_000004.pt", "step_000006.pt"])


def test_signals_between_the_crops_of_validation_codebook_latents_and_pictures(tmp_path, monkeypatch, capsys):
    """At every place where a part of the loop can be left: the resumed run does that part again, and is never finished too early."""
    flags = ["--steps", "2", "--train.val_every", "2", "--vae.bottleneck", "vq", "--vae.num_codes", "8", "--train.keep", "1",
             "--train.save_every", "1", "--train.ema", "0.9,0.5"]
    calls, original, at = [], train.stop_if_signalled, None

    def killed(*_):
        raise KeyboardInterrupt

    def counted(running):
        calls.append(sys._getframe(1).f_code.co_name)
        if len(calls) - 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        original(running)
    monkeypatch.setattr(train, "stop_if_signalled", counted)
    assert run(*flags, out=tmp_path / "whole") == 0
    places = list(calls)
    assert places == ["start_codebook"] * 2 + ["validate"] * 4 + ["latent_statistics"] * 2 + ["save_samples"]
    names = ["last.pt", "best.pt", "ema_0.5.pt", "step_000002.pt", *(str(p.relative_to(tmp_path / "whole")) for p in
             (tmp_path / "whole/samples").iterdir())]
    for at, place in enumerate(places):
        calls.clear()
        out = tmp_path / str(at)
        assert run(*flags, out=out) == 143, place
        assert capsys.readouterr().out.splitlines()[-1].startswith("stopped by SIGTERM")
        if place != "start_codebook":
            assert not load(out / "last.pt")["finished"], place
        again = ["--resume", str(out)] if place != "start_codebook" else [*TINY, *flags, "--out", str(out)]
        at = None
        if place == "validate":                                  # and killed once it has done it, before that is saved
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train, "save_last", killed)
                train.main(again)
        assert train.main(again) == 0, place
        assert_equal_runs(tmp_path / "whole", out, names)


def test_a_signal_before_the_loop_is_one_line(tmp_path, monkeypatch, capsys):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    monkeypatch.setattr(data, "open_data", signalled)
    before = signal.getsignal(signal.SIGINT)
    assert run("--steps", "1", out=tmp_path / "r") == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("stopped by SIGINT") and captured.err == "" and not (tmp_path / "r").exists()
    assert signal.getsignal(signal.SIGINT) is before


def started(out, *flags):
    """The real command in a process group of its own, once its loop has begun."""
    process = subprocess.Popen(command(*flags, "--out", str(out)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    next(line for line in process.stdout if line.startswith("step 0/"))
    return process


def test_signals_to_workers_and_to_the_reader_of_the_output_harm_nothing(tmp_path):
    process = started(tmp_path / "r", "--steps", "9", "--accum", "200", "--data.crops_per_volume", "1000", "--data.workers", "2",
                      "--log.every", "1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while children.is_file() and len(children.read_text().split()) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    process.stdout.close()                                       # as `tee` does, which gets the signal too
    for number in (signal.SIGINT, signal.SIGTERM):               # the second: from torchrun, or a batch system that signals each process
        os.killpg(process.pid, number)
    assert process.wait(60) == 130 and process.stderr.read() == ""
    assert load(tmp_path / "r/last.pt")["step"] == 1


def test_a_second_signal_ends_at_once(tmp_path):
    process = started(tmp_path / "r", "--steps", "2", "--accum", "100000", "--data.crops_per_volume", "10000")  # a long step
    for number in (signal.SIGTERM, signal.SIGINT):               # a batch system's twin signals are one
        process.send_signal(number)
    assert "after the step at hand" in process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(train.SECOND_SIGNAL + 0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    error = process.stderr.read()
    assert "again" in error and error.count("\n") == 1 and load(tmp_path / "r/last.pt")["step"] == 0


@pytest.mark.parametrize("name", ["best.pt", "last.next.pt", "log.jsonl", "config.yaml", ".png", ".nii.gz", "folder"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_last_state(name, tmp_path, monkeypatch, capsys):
    flags, out = ["--steps", "4", "--train.save_every", "1", "--train.val_every", "2", "--log.sample_every", "2"], tmp_path / "r"
    assert run(*flags, out=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        replace, step = os.replace, train.train_and_log

        def full(source, target):
            if armed and str(target).endswith(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        def spoilt(running, number, micro_batches):
            if number == 1:
                armed.append(1)
                running.log.file = open("/dev/full", "a") if name == "log.jsonl" else running.log.file
                if name == "config.yaml":                        # written again when the memory dial turns
                    train.save_config(running)
                if name == "folder":
                    shutil.rmtree(out)
            step(running, number, micro_batches)
        armed = []
        patch.setattr(os, "replace", full)
        patch.setattr(train, "train_and_log", spoilt)
        assert run(*flags, out=out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    if name == "folder":
        assert f"{out}: the run folder is gone" in error
        return
    assert name in error and "No space left" in error and "free some space" in error and f"--resume {out}" in error
    assert not list(out.rglob("*.tmp")) and load(out / "last.pt")["step"] == (3 if name == "best.pt" else 1)
    assert train.main(["--resume", str(out)]) == 0
    assert_equal_runs(tmp_path / "whole", out)


def test_a_disk_that_is_really_full(tmp_path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        flags, step = ["--steps", "4", "--train.save_every", "1"], train.train_and_log
        assert run(*flags, out=tmp_path / "whole") == 0

        def filled(running, number, micro_batches):
            if number == 2:
                with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
                    while file.write(bytes(4096)):
                        pass
                os.truncate(disk / "other", (disk / "other").stat().st_size - 40 * 1024)  # room for a part of it
            step(running, number, micro_batches)
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_and_log", filled)
            assert run(*flags, out=disk / "r") == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "No space left" in error and "last.next.pt" in error
        assert {p.name for p in (disk / "r").iterdir()} == {".lock", "best.pt", "config.yaml", "last.pt", "last.prev.pt", "log.jsonl"}
        (disk / "other").unlink()
        gc.collect()                                             # the log, open as far as the error's traceback goes
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        assert train.main(["--resume", str(disk / "r")]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Read-only" in error and "make it writable" in error
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        assert train.main(["--resume", str(disk / "r")]) == 0
        assert_equal_runs(tmp_path / "whole", disk / "r")
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_is_one_processs(tmp_path, capsys):
    assert run("--steps", "2", out=tmp_path / "r") == 0
    hold = "import fcntl, sys, time; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); time.sleep(99)"
    process = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / "r/.lock")], stdout=subprocess.PIPE)
    process.stdout.readline()
    before = (tmp_path / "r/log.jsonl").read_bytes()
    assert train.main(["--resume", str(tmp_path / "r"), "--steps", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".lock" in error and (tmp_path / "r/log.jsonl").read_bytes() == before
    process.kill()
    process.wait()
    assert train.main(["--resume", str(tmp_path / "r"), "--steps", "3"]) == 0


def test_soak_in_short():
    """tests/soak.py: ends at random moments, real processes."""
    done = subprocess.run([sys.executable, str(ROOT / "tests/soak.py"), "--kills", "6", "--steps", "9", "--commands", "0"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and "all resumed and equal" in done.stdout, done.stdout + done.stderr


def test_latent_statistics_are_stored(tmp_path):
    assert run("--steps", "2", out=tmp_path / "r") == 0
    cfg = train.load_config(TINY)
    crops = data.Crops(data.open_data(cfg.data, 0, say=lambda _: None), 0)
    best = torch.load(tmp_path / "r/best.pt", weights_only=True)
    vae = vae3d.VAE3D(cfg.vae).eval()
    vae.load_state_dict(best["model"])
    with torch.no_grad():
        mu = torch.cat([vae.encode(crops[i][0][None]).mu for i in range(2)])
    assert (best["latent"]["mean"] - mu.mean((0, 2, 3, 4))).abs().max() < 1e-5
    assert (best["latent"]["std"] - mu.transpose(0, 1).flatten(1).std(1, correction=0)).abs().max() < 1e-5
    assert abs(best["latent"]["scale_factor"] * float(mu.std(correction=0)) - 1) < 1e-4


# ------------------------------------------------------------------------------------------- validation, early stopping, non-finite steps

def test_log_rows_have_their_keys_and_best_is_the_best_validation(tmp_path):
    out = tmp_path / "r"
    assert run("--steps", "6", "--train.val_every", "2", "--log.sample_every", "3", out=out) == 0
    validations, steps = rows(out, "val"), rows(out, "train")
    assert [r["step"] for r in validations] == [0, 2, 4, 6] and [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    for row in rows(out):
        assert {"step", "epoch", "split", "loss", "l1", "kl", "lr", "seconds", "voxels_per_second", "peak_gib"} <= row.keys()
    assert all({"psnr", "ssim", "l1"} <= r.keys() for r in validations)
    best = torch.load(out / "best.pt", weights_only=True)
    assert best["metrics"]["psnr"] == max(r["psnr"] for r in validations)
    assert len(list((out / "samples").glob("step_000003_*.png"))) == len(list((out / "samples").glob("step_000003_*_recon.nii.gz"))) == 1
    assert list((out / "samples").glob("step_000006_*.png"))


def scripted_validation(monkeypatch, values):
    values = iter(values)
    monkeypatch.setattr(train, "validate", lambda _: ({"loss": 1.0, "l1": 1.0, "kl": 0.0, "ssim": 0.0, "psnr": next(values)}, 1))


def test_early_stopping_keeps_and_ships_the_best_weights(tmp_path, monkeypatch):
    """DEFECTS 16: stop, checkpoint, and `best` by the validation metric."""
    out = tmp_path / "r"
    scripted_validation(monkeypatch, [1, 2, 5, 4, 5.05, 3])
    assert run("--steps", "9", "--train.val_every", "1", "--train.patience", "2", "--train.min_delta", "0.1", "--train.save_every", "99",
               out=out) == 0
    last, best = (torch.load(out / name, weights_only=True) for name in ("last.pt", "best.pt"))
    assert last["step"] == 4 and last["finished"]                # 5 at step 2; 4 and 5.05 are no gain of 0.1
    assert best["step"] == 4 and best["metrics"]["psnr"] == 5.05
    assert train.main(["--resume", str(out)]) == 0 and torch.load(out / "last.pt", weights_only=True)["step"] == 4


def test_metric_where_less_is_better():
    cfg = train.load_config([*TINY, "--train.metric", "l1"])
    state = types.SimpleNamespace(step=1, best=None, best_loss=math.inf, bad_validations=0, plateau=(math.inf, 1.0, 0))
    assert [train.update_best(cfg, state, {"l1": v, "loss": v}) for v in (3.0, 2.0, 2.5, math.nan, 1.0)] == [True, True, False, False, True]


def test_one_held_out_crop_is_enough(tmp_path):
    """DEFECTS 16: a validation set smaller than a batch is validated all the same."""
    assert run("--steps", "1", "--batch", "4", "--train.val_crops", "1", out=tmp_path / "a") == 0
    assert run("--steps", "1", "--batch", "4", "--train.val_whole", out=tmp_path / "b") == 0
    psnr = [[r["psnr"] for r in rows(tmp_path / name, "val")] for name in "ab"]
    assert all(map(math.isfinite, psnr[0] + psnr[1])) and psnr[0] != psnr[1]


def test_non_finite_steps_are_logged_with_their_files_and_stop_the_run(tmp_path, monkeypatch, capsys):
    """DEFECTS 10."""
    original = data.Crops.__getitem__

    def poisoned(self, index):
        image, number = original(self, index)
        return (image * math.nan if index >= 2 else image), number
    monkeypatch.setattr(data.Crops, "__getitem__", poisoned)
    out = tmp_path / "r"
    assert run("--steps", "9", "--train.nan_limit", "3", "--train.save_every", "1", out=out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nan_step_000005.pt" in error
    skipped = [r for r in rows(out, "train") if r.get("skipped")]
    assert [r["step"] for r in skipped] == [3, 4, 5] and all(r["files"] and r["loss"] is None for r in skipped)
    reproducer = torch.load(out / "nan_step_000005.pt", weights_only=True)
    assert torch.isnan(reproducer["images"][0]).all() and reproducer["files"] == skipped[-1]["files"]
    assert all(torch.isfinite(v).all() for v in weights(out).values())

# ------------------------------------------------------------------------------------------------------------------------ out of memory

class RunsOut(TorchDispatchMode):
    """Raises OutOfMemoryError at the n-th operation, once for each entry of `at`."""
    def __init__(self, at):
        super().__init__()
        self.at, self.count = list(at), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        if self.at and self.count == self.at[0]:
            self.at.pop(0)
            self.count = 0
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
        return func(*args, **(kwargs or {}))


def operations_of_a_step():
    cfg, state = tiny_state()
    train.train_step(cfg, state, micro_batches([1, 1]))
    with RunsOut([]) as mode:
        train.train_step(cfg, state, micro_batches([1, 1]))
    return mode.count


@pytest.mark.parametrize("share", [0.01, 0.2, 0.45, 0.6, 0.85, 0.97])
def test_out_of_memory_at_any_point_of_the_step_changes_no_result(share):
    """DEFECTS 12: forward, backward, the second micro-batch, clipping, the optimizer: the same update as without it, to rounding."""
    notes, results = [], []
    for at in ([], [max(1, round(share * operations_of_a_step()))]):
        cfg, state = tiny_state(optim__grad_clip=0.1)
        train.train_step(cfg, state, micro_batches([2, 1], seed=5))                 # so that the optimizer has moments to keep
        window = micro_batches([1, 1])
        with RunsOut(at):
            result = train.with_recovery(cfg, state, window[0].image.shape, notes.append,
                                         lambda c=cfg, s=state, w=window: train.train_step(c, s, w))
        results.append((result, [p.detach().clone() for p in state.model.parameters()], cfg))
    assert len(notes) == 1 and "none -> checkpoint" in notes[0] and results[1][2].memory.mode == "checkpoint"
    assert abs(float(results[0][0].terms["loss"] - results[1][0].terms["loss"])) < 1e-6
    assert max(float((a - b).abs().max()) for a, b in zip(results[0][1], results[1][1])) < 1e-6


def test_recovery_goes_down_the_whole_dial_and_then_says_what_to_do():
    cfg, state = tiny_state()
    window, notes = micro_batches([1]), []

    def always_short():
        with RunsOut([1]):
            train.train_step(cfg, state, window)
    with pytest.raises(train.RunStopped, match="--patch"):
        train.with_recovery(cfg, state, (1, 1, 64, 64, 64), notes.append, always_short)
    assert "none -> checkpoint" in notes[0] and "checkpoint -> tile" in notes[1] and len(notes) > 3
    assert all("-> tile" in text for text in notes[1:])


def test_a_run_that_runs_out_of_memory_goes_on(tmp_path, monkeypatch, capsys):
    """DEFECTS 12: epoch, optimizer and effective batch are kept, the change is logged and in config.yaml, resolution is never touched."""
    flags = ["--steps", "5", "--accum", "2", "--train.val_every", "2"]
    assert run(*flags, out=tmp_path / "whole") == 0
    original, raised = train.train_step, []

    def short_of_memory(cfg, state, batches):
        if state.step == 2 and cfg.memory.mode != "tile":
            raised.append(cfg.memory.mode)
            with RunsOut([40]):
                return original(cfg, state, batches)
        return original(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(*flags, out=tmp_path / "short") == 0
    assert raised == ["none", "checkpoint"]
    a, b = rows(tmp_path / "whole", "train"), rows(tmp_path / "short", "train")
    assert [(r["step"], r["epoch"], r["lr"]) for r in a] == [(r["step"], r["epoch"], r["lr"]) for r in b]
    assert all(abs(x["loss"] - y["loss"]) < 1e-5 for x, y in zip(a, b))
    changes = rows(tmp_path / "short", "memory")
    assert [c["step"] for c in changes] == [2, 2] and "checkpoint -> tile" in changes[1]["change"]
    saved = train.load_config(["--config", str(tmp_path / "short/config.yaml")])
    assert saved.memory.mode == "tile" and saved.data.patch == (4, 8, 8) and (saved.train.batch, saved.train.accum) == (1, 2)


def test_the_choice_of_auto_is_kept_with_the_run(tmp_path):
    """On CUDA it depends on the free memory, and a resumed run must add up the same tiles."""
    assert run("--steps", "1", "--memory.mode", "tile", out=tmp_path / "r") == 0
    config = torch.load(tmp_path / "r/last.pt", weights_only=True)["config"]["memory"]
    assert config["mode"] == "tile" and len(config["tile"]) == 3 and config["stretch"] != "auto"


def test_other_errors_are_no_reason_to_turn_the_dial():
    cfg, state = tiny_state()
    with pytest.raises(RuntimeError, match="shape"):
        train.with_recovery(cfg, state, (1, 1, 4, 8, 8), print, lambda: torch.zeros(2).view(3))
    cfg.memory.recover = False
    with pytest.raises(torch.OutOfMemoryError), RunsOut([1]):
        train.with_recovery(cfg, state, (1, 1, 4, 8, 8), print, lambda: torch.zeros(2))


# -------------------------------------------------------------------------------------- discriminator, codebook, further terms of the step

GAN = dict(loss__adv_weight=0.3, loss__disc_channels=4, loss__disc_layers=1, loss__disc_strides="1,2,2")
EVERYTHING = dict(**GAN, loss__perceptual_weight=0.1, loss__structure_weight=0.1, loss__lecam_weight=0.1, loss__r1_weight=1.0,
                  loss__feature_matching_weight=0.5, loss__crop="4,7,6", train__ema="0.9,0.99", optim__clip_percentile=90,
                  optim__clip_window=3, vae__bottleneck="vq", vae__num_codes=16)


def flags_of(changes):
    return [part for k, v in changes.items() for part in (f"--{k.replace('__', '.')}", str(v))]


def doubled(state):
    """The whole state in float64."""
    for module in (state.model, state.disc, state.perceptual, state.lecam, *state.emas):
        if module is not None:
            module.double()
    for optimizer in filter(None, (state.optimizer, state.disc_optimizer)):
        for moments in optimizer.state.values():
            moments.update({k: v.double() for k, v in moments.items() if k != "step"})
    return state


def gradients(module):
    return torch.cat([p.grad.flatten() for p in module.parameters()])


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("sizes", [[2], [1, 1], [2, 1]])
@pytest.mark.parametrize("kind", ["hinge", "lsgan", "bce"])
def test_discriminator_gradients_are_those_of_its_own_loss_alone(kind, sizes, amp):
    """DEFECTS 6, and the autoencoder's are those of its own."""
    with torch.backends.mkldnn.flags(enabled=not amp):           # oneDNN's emulated bf16 gives NaN now and then (docs/LOG.md)
        cfg, state = tiny_state(**GAN, loss__adv_loss=kind, loss__feature_matching_weight=0.5, optim__grad_clip=0, optim__optimizer="sgd")
        state.amp_dtype = torch.bfloat16 if amp else None
        disc, vae = copy.deepcopy(state.disc), copy.deepcopy(state.model)
        train.train_step(cfg, state, micro_batches(sizes))
        critic = own = 0
        for image, seeds, *_ in micro_batches(sizes):
            share = len(image) / sum(sizes)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                recon, mu, logvar = vae(image, [torch.Generator().manual_seed(seed) for seed in seeds])
                real, fake = disc(image)[0], disc(recon.detach())[0]
                critic = critic + share * losses.discriminator_loss(real, fake, kind)
            judge = copy.deepcopy(state.disc).requires_grad_(False)
            judge.load_state_dict(disc.state_dict())
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                logits, features = judge(recon)
                own = own + share * (losses.reconstruction_loss(recon, image) + cfg.loss.kl_weight * losses.kl_loss(mu, logvar)
                                     + 0.3 * losses.generator_loss(logits, kind)
                                     + 0.5 * losses.feature_matching_loss(judge(image)[1], features))
        critic.backward()
        own.backward()
    for found, wanted in ((state.disc, disc), (state.model, vae)):
        a, b = gradients(found), gradients(wanted)
        assert (a - b).norm() <= (1e-2 if amp else 1e-5) * b.norm() and b.norm() > 0, float((a - b).norm() / b.norm())


@pytest.mark.parametrize("split", [[1, 1, 1], [2, 1]])
def test_micro_batches_equal_one_batch_with_discriminator_and_codebook(split):
    results = []
    for sizes in ([3], split):
        cfg, state = tiny_state(**EVERYTHING, optim__optimizer="sgd", vae__codebook_restart=0.5)
        doubled(state)
        for seed in range(2):
            train.train_step(cfg, state, micro_batches(sizes, torch.float64, seed))
            state.step += 1
        results.append([p.detach().clone() for m in (state.model, state.disc, state.lecam, *state.emas) for p in m.state_dict().values()])
        results[-1].append(state.usage)
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-7, float((a - b).abs().max())    # the discriminator's Adam divides by small numbers


@pytest.mark.parametrize("mode", [["checkpoint"], ["tile", "2,4,4"]])
def test_every_memory_mode_gives_the_same_step_with_all_terms(mode):
    results = []
    for setting in (["none"], mode):
        cfg, state = tiny_state(**EVERYTHING, loss__adaptive_weight="true", optim__optimizer="sgd")
        doubled(state)
        train.turn_dial(cfg, state, dataclasses.replace(cfg.memory, mode=setting[0], tile=train.convert(
            setting[1], tuple[int, int, int], "tile") if setting[1:] else None))
        result = train.train_step(cfg, state, micro_batches([2, 1], torch.float64))
        results.append([*result.terms.values(), result.norm, *(p.detach() for p in state.model.parameters())])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max()), float((a - b).abs().max())


def test_terms_set_in_at_their_step_and_warm_up():
    changes = dict(**GAN, loss__disc_start=2, loss__disc_warmup=4, loss__perceptual_weight=0.1, loss__perceptual_start=1,
                   loss__perceptual_warmup=2, optim__lr=0)
    cfg, state = tiny_state(**changes)
    before, seen = {k: v.clone() for k, v in state.disc.state_dict().items()}, []
    for step in range(6):
        state.step = step
        if step == 2:
            assert same(before, state.disc.state_dict())
        terms = train.train_step(cfg, state, micro_batches([1])).terms
        rest = terms["loss"] - terms["l1"] - 1e-6 * terms["kl"]
        rest -= 0.1 * min(1, step / 2) * terms.get("perceptual", 0) + 0.3 * min(1, (step - 1) / 4) * terms.get("adv", 0)
        seen.append(({"adv", "disc", "perceptual"} & terms.keys(), float(rest)))
    assert [len(names) for names, _ in seen] == [0, 1, 3, 3, 3, 3] and all(abs(left) < 1e-6 for _, left in seen), seen


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_micro_batch_leaves_discriminator_codebook_and_averages(poison):
    """DEFECTS 10."""
    cfg, state = tiny_state(**EVERYTHING)
    train.train_step(cfg, state, micro_batches([1, 1]))
    parts = (state.model, state.disc, state.lecam, *state.emas)
    before, norms, usage = [{k: v.clone() for k, v in m.state_dict().items()} for m in parts], list(state.norms), state.usage.clone()
    window = micro_batches([1, 1, 1])
    window[1].image[0, 0, 0, 0, 0] = poison
    assert not train.train_step(cfg, state, window).updated
    assert all(same(a, m.state_dict()) for a, m in zip(before, parts)) and state.norms == norms and torch.equal(usage, state.usage)
    assert train.train_step(cfg, state, micro_batches([1])).updated


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_out_of_memory_with_discriminator_and_codebook_changes_no_result(share):
    """DEFECTS 12, 13: the codebook and the discriminator count the repeated step once."""
    notes, results = [], []
    cfg, state = tiny_state(**EVERYTHING)
    train.train_step(cfg, state, micro_batches([1, 1]))
    with RunsOut([]) as mode:
        train.train_step(cfg, state, micro_batches([1, 1]))
    for at in ([], [round(share * mode.count)]):
        cfg, state = tiny_state(**EVERYTHING)
        train.train_step(cfg, state, micro_batches([2, 1], seed=5))
        window = micro_batches([1, 1])
        with RunsOut(at):
            train.with_recovery(cfg, state, window[0].image.shape, notes.append,
                                lambda c=cfg, s=state, w=window: train.train_step(c, s, w))
        results.append([p.detach().clone() for m in (state.model, state.disc, state.lecam) for p in m.state_dict().values()])
    assert len(notes) == 1
    assert max(float((a - b).abs().max()) for a, b in zip(*results)) < 1e-5


def test_batch_norm_statistics_survive_nan_and_count_a_repeated_step_once():
    """DEFECTS 10, 12: running statistics move in the forward pass, before anyone knows how the step ends."""
    def seg_state():
        cfg, state = tiny_state(task="seg", unet__norm="batch", unet__channels="4,8")
        return cfg, state, [m._replace(label=(m.image[:, 0] > 0).long()) for m in micro_batches([1, 1])]
    cfg, state, window = seg_state()
    before = {k: v.clone() for k, v in state.model.state_dict().items()}
    window[0].image[0, 0, 0, 0, 0] = math.nan
    assert not train.train_step(cfg, state, window).updated and same(before, state.model.state_dict())
    results, notes = [], []
    for at in ([], [150]):
        cfg, state, window = seg_state()
        with RunsOut(at):
            train.with_recovery(cfg, state, window[0].image.shape, notes.append, lambda c=cfg, s=state, w=window: train.train_step(c, s, w))
        results.append(state.model.state_dict())
    assert len(notes) == 1 and {int(v) for k, v in results[1].items() if k.endswith("num_batches_tracked")} == {2}
    assert max(float((a.double() - b.double()).abs().max()) for a, b in zip(*(r.values() for r in results))) < 1e-5


@pytest.mark.parametrize("share", [0.93, 0.96, 0.999])
def test_out_of_memory_inside_the_update_stops_or_changes_nothing(share):
    """DEFECTS 12: an update of which a part is written cannot be repeated."""
    cfg, state = tiny_state(**EVERYTHING)
    with RunsOut([]) as mode:
        train.train_step(cfg, state, micro_batches([1, 1]))
    results = []
    for at in ([], [round(share * mode.count)]):
        cfg, state = tiny_state(**EVERYTHING)
        window = micro_batches([1, 1])
        try:
            with RunsOut(at):
                train.with_recovery(cfg, state, window[0].image.shape, lambda text: None,
                                    lambda c=cfg, s=state, w=window: train.train_step(c, s, w))
        except train.RunStopped as stop:
            assert "while the weights were being updated" in str(stop)
            return
        results.append([p.detach().clone() for m in (state.model, state.disc, state.lecam) for p in m.state_dict().values()])
    assert max(float((a - b).abs().max()) for a, b in zip(*results)) < 1e-5


def test_stage_1_with_a_gradient_scaler_and_nothing_to_scale():
    cfg, state = tiny_state(vae__bottleneck="vq", vae__num_codes=8, train__stage=1)
    state.scaler = torch.amp.GradScaler("cpu")
    codes = state.model.quantizer.codebook.clone()
    assert train.train_step(cfg, state, micro_batches([1, 1])).updated and not torch.equal(codes, state.model.quantizer.codebook)


def test_two_optimizers_share_a_gradient_scaler():
    """An overflow in the discriminator alone skips both, and halves the scale."""
    cfg, state = tiny_state(**GAN)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert train.train_step(cfg, state, micro_batches([1])).updated
    parts = (state.model, state.disc)
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in parts]
    hook = state.disc.logits.weight.register_hook(lambda grad: grad * math.inf)
    assert not train.train_step(cfg, state, micro_batches([1])).updated and state.scaler.get_scale() == 512
    hook.remove()
    assert all(same(a, m.state_dict()) for a, m in zip(before, parts)) and train.train_step(cfg, state, micro_batches([1])).updated


def test_master16_keeps_a_learned_codebook():
    cfg, state = tiny_state(train__precision="master16", vae__bottleneck="vq", vae__num_codes=8, vae__codebook_update="gradient",
                            vae__codebook_restart=0)
    state.model.quantizer.fit(torch.randn(64, 4) + 3, "kmeans", torch.Generator().manual_seed(0))
    fitted = state.model.quantizer.codebook.detach().clone()
    assert torch.equal(train.full_weights(state)["quantizer.codebook"], fitted)
    train.train_step(cfg, state, micro_batches([1]))
    assert 0 < (state.model.quantizer.codebook - fitted).detach().abs().max() < 0.1


def test_a_codebook_from_data_is_kept_by_the_first_steps():
    """Its averages begin where they will be: a code that two crops do not use is not dead."""
    torch.manual_seed(0)
    rows = torch.randn(20_000, 2)
    vq = quantize.VectorQuantizer(128, 2).train()
    vq.fit(rows, "kmeans", torch.Generator().manual_seed(0), per_step=500)
    def error():
        return float((rows - vq.codebook[quantize.nearest(rows, vq.codebook)[0]]).square().mean())
    start = error()
    for step in range(3):
        part = rows[500 * step:500 * step + 500]
        vq.quantize_volume(part.T.reshape(1, 2, 500, 1, 1), torch.Generator().manual_seed(step))
        vq.update(torch.Generator().manual_seed(step))
        assert error() < 1.15 * start


def test_scales_that_fall_below_one_are_no_overflow(tmp_path, monkeypatch):
    """A gradient that is never finite stops a 16-bit run too."""
    original = train.new_state

    def poisoned(*args):
        state = original(*args)
        state.log_scale = 2.0
        next(state.model.parameters()).register_hook(lambda grad: grad * math.nan)
        return state
    monkeypatch.setattr(train, "new_state", poisoned)
    assert run("--train.precision", "master16", "--steps", "20", "--train.nan_limit", "3", out=tmp_path / "r") == 1
    assert [r["step"] for r in rows(tmp_path / "r", "train")] == [1, 2, 3, 4]  # scales 4, 2, 1, 1/2: the first is taken for an overflow


def test_init_needs_more_than_biases_and_stage_1_needs_all(tmp_path, capsys):
    vq = ["--vae.bottleneck", "vq", "--vae.num_codes", "16"]
    assert run("--vae.base_channels", "8", "--steps", "1", out=tmp_path / "wide") == 0
    for flags in ([], [*vq, "--train.stage", "1"]):
        assert run("--init", str(tmp_path / "wide"), *flags, out=tmp_path / "no") == 2
        assert "fit" in capsys.readouterr().err
    narrow = ["--vae.z_channels", "2", "--vae.base_channels", "8", "--steps", "1"]
    assert run(*narrow, "--init", str(tmp_path / "wide"), out=tmp_path / "z") == 0
    assert "the mean's part" not in capsys.readouterr().out      # two Gaussian heads of other widths share no half


def test_validation_has_every_term_from_the_start_and_best_waits_for_them(tmp_path):
    flags = [*flags_of(GAN), "--loss.perceptual_weight", "0.1", "--loss.perceptual_start", "3", "--loss.disc_start", "4", "--steps", "6",
             "--train.val_every", "1", "--optim.lr", "1e-6"]
    assert run(*flags, out=tmp_path / "r") == 0
    assert all("perceptual" in r and r["loss"] > r["l1"] + 0.05 * r["perceptual"] for r in rows(tmp_path / "r", "val"))
    assert torch.load(tmp_path / "r/best.pt", weights_only=True)["step"] >= 4


def test_features_of_a_file_go_with_the_run(tmp_path):
    content = losses.FeatureNet3d(seed=7).to_checkpoint()
    torch.save(content, tmp_path / "features.pt")
    flags = ["--loss.perceptual_weight", "0.5", "--loss.perceptual_features", str(tmp_path / "features.pt"), "--optim.schedule", "constant",
             "--optim.warmup", "0"]
    assert run(*flags, "--steps", "4", out=tmp_path / "whole") == 0
    assert run(*flags, "--steps", "2", out=tmp_path / "cut") == 0
    (tmp_path / "features.pt").unlink()
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "4"]) == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_run_that_died_before_its_first_state_can_start_again(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"step": 0, "split": "val"}\n')
    assert run("--steps", "1", out=tmp_path / "r") == 0 and len(rows(tmp_path / "r", "val")) == 2


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, capsys):
    assert run("--steps", "1", out=tmp_path / "r") == 0
    content = torch.load(tmp_path / "r/last.pt", weights_only=True)
    torch.save(content | {"version": 1}, tmp_path / "r/last.pt")
    assert train.main(["--resume", str(tmp_path / "r")]) == 2
    assert "of version 1, this code reads 3" in capsys.readouterr().err
    assert train.main(["--resume", str(tmp_path / "r"), "--init", "x"]) == 2


def test_resume_is_exact_with_everything_on(tmp_path, monkeypatch):
    """Kill in the middle of an epoch: codes, usage, clipping norms, averages, discriminator and LeCam anchors go on to the bit."""
    flags = [*flags_of(EVERYTHING), "--steps", "11", "--accum", "2", "--train.save_every", "4", "--train.val_every", "3"]
    assert run(*flags, out=tmp_path / "whole") == 0
    original = train.train_step

    def killed(cfg, state, batches):
        if state.step == 6:
            raise KeyboardInterrupt
        return original(cfg, state, batches)
    monkeypatch.setattr(train, "train_step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, out=tmp_path / "cut")
    monkeypatch.setattr(train, "train_step", original)
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    for name in ("last.pt", "best.pt", "ema_0.99.pt"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    use = [[(r["step"], r["codebook_usage"], r["perplexity"]) for r in rows(tmp_path / n, "train") if "perplexity" in r]
           for n in ("whole", "cut")]
    assert use[0] == use[1] and len(use[0]) > 1 and use[0][-1][0] == 11


def test_codebook_use_is_counted_over_an_epoch():
    use = train.codebook_use(torch.tensor([2, 2, 0, 4]))
    assert use["codebook_usage"] == 0.75
    assert use["perplexity"] == pytest.approx(2 ** (2 * 0.25 * 2 + 0.5 * 1))
    assert train.codebook_use(torch.full((512,), 3))["perplexity"] == pytest.approx(512)


def test_adaptive_clipping_follows_the_percentile_of_the_last_norms():
    o = OptimConfig(grad_clip=2.0, clip_percentile=95, clip_window=5)
    assert train.clip_threshold(o, [0.1] * 4) == 2.0
    norms = [0.5, 0.1, 0.2, 0.3, 0.4]
    assert train.clip_threshold(o, norms) == pytest.approx(0.48)
    assert train.clip_threshold(o, [9.0] * 5) == 2.0 and train.clip_threshold(OptimConfig(grad_clip=0), norms) == math.inf
    cfg, state = tiny_state(optim__grad_clip=1e9, optim__clip_percentile=50, optim__clip_window=3, optim__optimizer="sgd", optim__lr=0)
    seen = []
    for seed in range(5):
        threshold = train.clip_threshold(cfg.optim, state.norms)
        result = train.train_step(cfg, state, micro_batches([1], seed=seed))
        seen.append(float(result.norm))
        assert float(gradients(state.model).norm()) == pytest.approx(min(seen[-1], threshold), rel=1e-4)
    assert state.norms == seen[-3:]


def test_several_averages_follow_their_rates():
    cfg, state = tiny_state(train__ema="0.5,0.05")
    start = [p.detach().clone() for p in state.model.parameters()]
    train.train_step(cfg, state, micro_batches([1]))
    for ema, decay in zip(state.emas, (0.1, 0.05)):              # the first is held to (1 + step) / (10 + step) at the start
        for old, new, live in zip(start, ema.parameters(), state.model.parameters()):
            torch.testing.assert_close(new, decay * old + (1 - decay) * live)


def test_master16_steps_like_float32_and_skips_overflows(tmp_path):
    plain, halved = tiny_state(), tiny_state(train__precision="master16")
    for seed in range(3):
        results = [train.train_step(*pair, micro_batches([1, 1], seed=seed)) for pair in (plain, halved)]
    assert abs(float(results[0].terms["loss"] - results[1].terms["loss"])) < 5e-3
    assert abs(float(results[0].norm / results[1].norm) - 1) < 0.03
    state = halved[1]
    assert {p.dtype for p in state.model.parameters()} == {torch.float16} and state.log_scale == pytest.approx(16.003)
    before = [m.detach().clone() for m in state.masters]
    state.log_scale = 40.0
    assert not train.train_step(*halved, micro_batches([1])).updated and state.log_scale == 39.0
    assert all(torch.equal(a, b) for a, b in zip(before, state.masters))
    flags = ["--train.precision", "master16", "--train.save_every", "2"]
    assert run(*flags, "--steps", "4", out=tmp_path / "whole") == 0
    assert {v.dtype for v in weights(tmp_path / "whole").values()} == {torch.float32}
    assert run(*flags, "--steps", "2", "--optim.schedule", "constant", "--optim.warmup", "0", out=tmp_path / "cut") == 0
    assert train.main(["--resume", str(tmp_path / "cut"), "--steps", "4"]) == 0
    assert run(*flags, "--steps", "4", "--optim.schedule", "constant", "--optim.warmup", "0", out=tmp_path / "straight") == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "straight"))


def test_stages_of_a_codebook(tmp_path, capsys):
    """KL -> stage 1 trains the codebook alone -> stage 2 trains all; what does not fit is said, key by key."""
    vq = ["--vae.bottleneck", "vq", "--vae.num_codes", "16", "--steps", "3"]
    assert run("--steps", "2", out=tmp_path / "kl") == 0
    assert run(*vq, "--init", str(tmp_path / "kl"), "--train.stage", "1", out=tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert "3 missing there, left as new: quantizer.code_count; quantizer.code_sum; quantizer.codebook" in said
    assert "2 of another shape: encoder.head.conv.bias (8,) -> (4,) (the mean's part taken)" in said
    kl, one = weights(tmp_path / "kl", "best.pt"), weights(tmp_path / "one")
    assert all(torch.equal(one[k], kl[k][:len(one[k])]) for k in kl)
    assert run(*vq, "--init", str(tmp_path / "one"), "--train.stage", "2", out=tmp_path / "two") == 0
    two, first = weights(tmp_path / "two"), rows(tmp_path / "two", "val")[0]
    assert all(not torch.equal(one[k], two[k]) for k in one)
    best_of_one = max(rows(tmp_path / "one", "val"), key=lambda r: r["psnr"])
    assert first["psnr"] == best_of_one["psnr"], "stage 2 does not begin where stage 1 ended"
    kl = str(tmp_path / "kl")
    for flags, says in ((["--train.stage", "1", *vq], "--init"), (["--train.stage", "1", "--init", kl], "bottleneck vq"),
                        (["--train.stage", "2", "--init", kl, *vq], "--train.stage 1 first"),
                        (["--init", str(tmp_path / "absent")], "no such checkpoint")):
        assert run(*flags, out=tmp_path / "no") == 2
        assert says in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_init_that_matches_nothing_is_an_error(tmp_path, capsys):
    """DEFECTS 15."""
    assert run("--task", "seg", "--steps", "1", out=tmp_path / "seg") == 0
    assert run("--init", str(tmp_path / "seg"), out=tmp_path / "vae") == 2
    error = capsys.readouterr().err
    assert "none of its" in error and error.count("\n") == 1


def test_a_learned_codebook_trains_in_stage_1(tmp_path):
    assert run("--steps", "1", out=tmp_path / "kl") == 0
    assert run("--vae.bottleneck", "vq", "--vae.num_codes", "16", "--vae.codebook_update", "gradient", "--vae.codebook_restart", "0",
               "--steps", "3", "--init", str(tmp_path / "kl"), "--train.stage", "1", out=tmp_path / "one") == 0
    vq = [r["vq"] for r in rows(tmp_path / "one", "val")]
    assert vq[-1] < vq[0]


@pytest.mark.parametrize("change", [
    dict(recon="mse"), dict(kl_weight=0.5), dict(channel_weights="2"), dict(foreground_weight=5), dict(foreground_weight=5, background=1),
    dict(structure_weight=1),
    dict(perceptual_weight=1), dict(perceptual_weight=1, crop="2,4,4"), dict(adv_weight=0.1), dict(adv_weight=0.1, adv_loss="lsgan"),
    dict(adv_weight=0.1, disc_channels=8), dict(adv_weight=0.1, disc_strides="1,1,1"),
    dict(adv_weight=0.1, disc_strides="1,1,1", disc_layers=2), dict(adv_weight=0.1, disc_norm="group"),
    dict(adv_weight=0.1, disc_lr=1.0), dict(adv_weight=0.1, feature_matching_weight=1), dict(adv_weight=0.1, r1_weight=1),
    dict(adv_weight=0.1, r1_weight=1, r1_every=2), dict(adv_weight=0.1, lecam_weight=1), dict(adv_weight=0.1, adaptive_weight="true"),
    dict(adv_weight=0.1, disc_start=1), dict(adv_weight=0.1, disc_warmup=9), dict(perceptual_weight=1, perceptual_start=1),
    dict(perceptual_weight=1, perceptual_warmup=9)], ids=str)
def test_every_field_of_the_loss_changes_the_step(change):
    """DEFECTS 1. What a field needs to act stands before it."""
    def after(fields):
        fields = {"disc_layers": 1, "disc_channels": 4, "disc_strides": "1,2,2", **fields}
        cfg, state = tiny_state(data__patch="6,8,8", **{f"loss__{k}": v for k, v in fields.items()})
        for seed in range(2):
            train.train_step(cfg, state, micro_batches([1, 1], seed=seed, size=(6, 8, 8)))
            state.step += 1
        return [round(float(v.detach().double().sum()), 9) for m in (state.model, state.disc) if m is not None for v in m.parameters()]
    *needed, _ = change
    assert after(change) != after({k: change[k] for k in needed})


def test_fields_of_the_loss_are_all_tested():
    marks = test_every_field_of_the_loss_changes_the_step.pytestmark[0].args[1]
    seg = {"dice_share", "class_weights"}        # test_segmentation_fields_reach_the_loss
    files = {"perceptual_features"}                              # test_features_are_trained_and_used
    assert {f.name for f in dataclasses.fields(train.LossConfig)} == {key for change in marks for key in change} | seg | files


def test_features_are_trained_and_used(tmp_path, capsys):
    """`--task features` learns to tell how a crop was degraded; its best.pt serves as loss.perceptual_features."""
    flags = ["--task", "features", "--patch", "8,16,16", "--steps", "60", "--train.val_every", "60", "--batch", "4", "--optim.lr", "3e-3"]
    assert run(*flags, out=tmp_path / "features") == 0
    explained = [r["explained"] for r in rows(tmp_path / "features", "val")]
    assert explained[-1] > explained[0]
    best = tmp_path / "features/best.pt"
    use = ["--loss.perceptual_weight", "1", "--steps", "2"]
    assert run(*use, "--loss.perceptual_features", str(best), out=tmp_path / "file") == 0
    assert run(*use, out=tmp_path / "random") == 0
    terms = [[r["perceptual"] for r in rows(tmp_path / name, "train")] for name in ("file", "random")]
    assert terms[0][0] != terms[1][0] and all(math.isfinite(v) for v in terms[0] + terms[1])
    assert run("--task", "features", "--memory.mode", "tile", out=tmp_path / "no") == 2
    capsys.readouterr()
    assert run(*use, "--loss.perceptual_features", str(tmp_path / "file/last.pt"), out=tmp_path / "no") == 2
    assert "--task features writes one" in capsys.readouterr().err


def test_too_small_crops_for_the_discriminator_are_one_line(tmp_path, capsys):
    assert run("--loss.adv_weight", "0.1", out=tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert "the discriminator sees crops of 4,8,8" in error and error.count("\n") == 1


# ----------------------------------------------------------------------------------------------------------------------- segmentation

SEG = ["--task", "seg", "--unet.channels", "4,8", "--patch", "8,16,16", "--optim.lr", "1e-2"]


def test_segmentation_learns_validates_and_resumes_to_the_bit(tmp_path):
    flags = [*SEG, "--steps", "30", "--train.val_every", "10", "--train.save_every", "7", "--log.sample_every", "30",
             "--log.every", "1"]
    assert run(*flags, out=tmp_path / "whole") == 0
    val = rows(tmp_path / "whole", "val")
    assert val[-1]["dice"] > val[0]["dice"] + 0.05 and {"dice_1", "loss", "ce", "dice_loss"} <= val[-1].keys()
    assert list((tmp_path / "whole/samples").glob("*_pred.nii.gz")) and list((tmp_path / "whole/samples").glob("*.png"))
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *TINY, *flags, "--out", str(tmp_path / "cut")],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 12/"):
            process.kill()
            break
    process.wait()
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    assert (tmp_path / "whole/last.pt").read_bytes() == (tmp_path / "cut/last.pt").read_bytes()


def test_segmentation_recovers_from_out_of_memory(tmp_path, monkeypatch):
    original = train.train_step

    def short_of_memory(cfg, state, batches):
        if state.step == 1 and cfg.memory.mode == "none":
            with RunsOut([60]):
                return original(cfg, state, batches)
        return original(cfg, state, batches)
    flags = [*SEG, "--steps", "3"]
    assert run(*flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(*flags, out=tmp_path / "short") == 0
    assert ["none -> checkpoint" in r["change"] for r in rows(tmp_path / "short", "memory")] == [True]
    a, b = rows(tmp_path / "whole", "train"), rows(tmp_path / "short", "train")
    assert all(abs(x["loss"] - y["loss"]) < 1e-4 for x, y in zip(a, b))


@pytest.mark.parametrize("flags", [["--loss.dice_share", "1"], ["--loss.class_weights", "1,5,1,1"], ["--data.ignore_label", "0"],
                                   ["--unet.deep_supervision", "1", "--unet.channels", "4,8,8"]], ids=" ".join)
def test_segmentation_fields_reach_the_loss(flags, tmp_path):
    first = []
    for number, extra in enumerate(([], flags)):
        assert run(*SEG, "--steps", "1", *extra, out=tmp_path / str(number)) == 0
        first.append(rows(tmp_path / str(number), "train")[0]["loss"])
    assert first[0] != first[1]


def test_validation_and_prediction_agree_on_volumes_below_and_above_the_crop(tmp_path):
    """GroupNorm takes its statistics over all that it is given, so both must give the network what training gave it."""
    for size in ("5,8,9", "12,24,20"):
        out = tmp_path / size
        assert run(*SEG, "--data.synthetic_size", size, "--steps", "20", "--train.val_whole", "--train.val_every", "20", out=out) == 0
        checkpoint = predict.load_network(out / "last.pt", device="cpu")
        cfg = train.load_config(["--config", str(out / "config.yaml")])
        dataset = data.open_data(dataclasses.replace(cfg.data, labels=True), 0, lambda text: None)
        counts = 0
        for crop in data.WholeVolumes(dataset):
            found = predict.segment_volume(checkpoint, crop.image.numpy(), background=crop.entry.intensity.background)
            counts = counts + torch.stack(losses.dice_scores(torch.from_numpy(found)[None].long(), crop.label[None], dataset.classes))
        scores = losses.dice(*counts)
        last = rows(out, "val")[-1]
        assert all(abs(float(scores[int(k[5:])]) - v) < 1e-6 for k, v in last.items() if k.startswith("dice_") and k != "dice_loss")


def test_dice_that_ties_or_is_undefined_is_decided_by_the_loss():
    cfg = train.load_config([*TINY, "--task", "seg"])
    state = types.SimpleNamespace(step=1, best=None, best_loss=math.inf, bad_validations=0, plateau=(math.inf, 1.0, 0))
    results = [train.update_best(cfg, state, {"dice": d, "loss": v}) for d, v in
               ((math.nan, 3.0), (math.nan, 2.0), (math.nan, 2.5), (0.0, 9.0), (0.0, 1.0), (math.nan, 0.5), (0.1, 5.0))]
    assert results == [True, True, False, True, True, False, True]


def test_deep_supervision_below_the_stride_sees_the_label_that_the_network_saw(tmp_path):
    cfg = train.load_config([*TINY, "--task", "seg", "--unet.channels", "4,8,8,8", "--unet.deep_supervision", "1", "--patch", "4,16,16"])
    seen = []
    label = torch.arange(4).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    out = train.unet.UNetOutput(torch.zeros(1, 2, 4, 16, 16), (torch.zeros(1, 2, 4, 8, 8),))
    original = losses.segmentation_loss
    losses.segmentation_loss = lambda logits, y, *options: seen.append(y) or original(logits, y.clamp(0, 1), *options)
    try:
        train.segmentation_terms(cfg, out, label)
    finally:
        losses.segmentation_loss = original
    assert seen[1][0, :, 0, 0].tolist() == [0, 2, 3, 3]          # 0 1 2 3 3 3 3 3, every other one


@pytest.mark.parametrize("flags,says", [(["--memory.mode", "tile"], "has no exact tiles"), (["--loss.class_weights", "1,2"], "classes"),
                                        (["--preset", "high_res"], "unet3d"), (["--train.metric", "psnr"], "dice")])
def test_bad_segmentation_settings_are_one_line(flags, says, tmp_path, capsys):
    assert run(*SEG, *flags, out=tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


# ------------------------------------------------------------------------------------------------------------------- fit and dry run

def test_dry_run_prints_a_config_and_a_peak_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--dry-run", "--device", "cuda"]) == 0     # a card that is not here
    text = capsys.readouterr().out
    assert "predicted peak of a step on cuda" in text.splitlines()[-1] and not list(tmp_path.iterdir())
    (tmp_path / "c.yaml").write_text(text)
    assert train.load_config(["--config", "c.yaml"]).vae.base_channels == 4


def test_fit_takes_the_cheapest_settings_that_fit(capsys):
    cfg = train.load_config(["--patch", "32,64,64", "--batch", "1"])
    device = torch.device("cpu")
    peaks = {}
    for mode in ("none", "checkpoint"):
        cfg.memory.mode = mode
        peaks[mode] = train.memtest.predict(lambda d: train.make_step(cfg, d), device).bytes / 2 ** 30 / 0.9
    assert train.fit(cfg, device, f"{peaks['none'] + 0.01}", print).mode == "none"
    assert train.fit(cfg, device, f"{peaks['none'] - 0.01}", print).mode == "checkpoint"
    assert train.fit(cfg, device, f"{peaks['checkpoint'] * 0.8}", print).mode == "tile"
    with pytest.raises(ValueError, match="nothing fits: the least is tile"):
        train.fit(cfg, device, "0.001", print)
    with pytest.raises(ValueError, match="--fit 16"):
        train.fit(cfg, device, "free", print)


# -------------------------------------------------------------------------------------------------------------------------- configuration

def test_later_beats_earlier(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: base\nvae: {num_res_blocks: 3}\noptim: {lr: 1e-4, weight_decay: 2e-2}\n"
                                     "data: {patch: [8, 16, 24]}\n")
    cfg = train.load_config(["--config", str(tmp_path / "c.yaml"), "--optim.lr", "5e-4", "--vae.strides", "1,1,2;2,2,1", "--amp",
                             "--accum=8"])
    assert cfg.vae.base_channels == 32 and cfg.vae.num_res_blocks == 3 and cfg.vae.strides == ((1, 1, 2), (2, 2, 1))
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.data.patch, cfg.train.amp, cfg.train.accum) == (5e-4, 2e-2, (8, 16, 24), True, 8)
    (tmp_path / "again.yaml").write_text(train.to_yaml(cfg))
    assert train.load_config(["--config", str(tmp_path / "again.yaml")]) == cfg


@pytest.mark.parametrize("flags,says", [
    (["--presett", "base"], "did you mean --preset?"), (["--preset", "huge"], "got 'huge'"), (["--steps", "x"], "must be a whole"),
    (["--optim.learning_rate", "1"], "unknown flag --optim.learning_rate"), (["--steps", "1.5"], "'1.5'"), (["--patch", "8,8"], "D,H,W"),
    (["--vae.norm", "batch"], "none, group, layer"), (["--vae.strides", "2,2,2"], "one D,H,W triple between levels"),
    (["--config", "absent.yaml"], "absent.yaml"), (["--device", "tpu"], "tpu"), (["--data", "absent/folder"], "absent/folder"),
    (["--train.ema", "1"], "decays below 1"), (["--steps", "0"], "at least 1"), (["--log.tensorboard"], "pip install tensorboard"),
    (["--optim.lr", "nan"], "got nan"), (["--loss.channel_weights", "1,2"], "2 factors, the data has 1"), (["stray"], "stray")])
def test_bad_usage_is_one_line_and_exit_2(flags, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert train.main([*TINY, *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


@pytest.mark.parametrize("text,says", [("optim: {lrr: 1}", "did you mean optim.lr?"), ("optm: {lr: 1}", "did you mean optim?"),
                                       ("- 1", "sections"), ("train: 5", "field: value"), ("train: {amp: maybe}", "true or false"),
                                       ("a: [", "YAML"), ("train: {steps: [1, 2]}", "whole number")])
def test_bad_yaml_is_one_line(text, says, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=None) as error:
        train.load_config(["--config", str(tmp_path / "c.yaml")])
    assert says in str(error.value)


def test_every_config_and_preset_loads_builds_and_takes_a_step():
    """DEFECTS 1. Sizes are cut, the networks are as they are."""
    files = sorted((ROOT / "config").glob("*.yaml"))
    assert files
    presets = [["--task", task, "--preset", name] for task, names in train.TASKS.items() for name in names]
    for argv in [["--config", str(f)] for f in files] + presets:
        cfg = train.load_config([*argv, "--patch", "8,24,24", "--batch", "1", "--accum", "1", "--device", "cpu"])
        result = train.make_step(cfg, "cpu")()
        assert result.updated, argv


def test_every_field_is_read_somewhere():
    """DEFECTS 1: a field nobody reads is a bug."""
    read = {node.attr for path in ROOT.glob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    for section in dataclasses.fields(TrainConfig):
        if dataclasses.is_dataclass(section.default_factory):
            for f in dataclasses.fields(section.default_factory):
                assert f.name in read, f"{section.name}.{f.name} is read nowhere"


def test_every_flag_has_a_comment_for_its_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0 and "--optim.lr" in capsys.readouterr().out
    for section in train.SECTIONS:
        comments = train.field_comments(section.default_factory)
        missing = [f.name for f in dataclasses.fields(section.default_factory) if not comments.get(f.name)]
        assert not missing, f"{section.name}: {missing} have no comment beside them"


def test_every_flag_value_round_trips_through_its_type():
    """convert() accepts what str() of a default gives, for every field of every section."""
    for section in train.SECTIONS:
        hints = typing.get_type_hints(section.default_factory)
        for f in dataclasses.fields(section.default_factory):
            default = getattr(section.default_factory(), f.name)
            assert train.convert(json.loads(json.dumps(default)), hints[f.name], f.name) == default


# --------------------------------------------------------------------------------------------- backend settings, pictures, other services

def test_allocator_settings_come_before_cuda_or_are_said_to_be_late(monkeypatch):
    """DEFECTS 14."""
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = train.load_config(["--memory.max_split_size_mb", "128"])
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert "not applied" in train.set_backend(cfg)[0] and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert "is kept" in train.set_backend(cfg)[0]
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    train.set_backend(cfg)
    assert os.environ.pop("PYTORCH_CUDA_ALLOC_CONF") == "expandable_segments:True,max_split_size_mb:128"


def test_wait_policy_is_set_before_torch_loads():
    code = "import os; os.environ.pop('OMP_WAIT_POLICY', None); import train; print(os.environ['OMP_WAIT_POLICY'])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout.strip() == "PASSIVE"
    source = (ROOT / "train.py").read_text()
    assert source.index("OMP_WAIT_POLICY") < source.index("import torch")


def test_amp_without_native_bf16_says_so(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert train.pick_precision(True, torch.device("cpu")) == (None, "float32: --amp is off, this CPU has no native bf16")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    monkeypatch.setattr(train, "cpu_bf16_is_right", lambda: False)
    assert train.pick_precision(True, torch.device("cpu")) == (
        None, "float32: --amp is off, bf16 convolutions give wrong gradients on this CPU")
    monkeypatch.setattr(train, "cpu_bf16_is_right", lambda: True)
    assert train.pick_precision(True, torch.device("cpu"))[0] is torch.bfloat16
    assert train.pick_precision(True, torch.device("cuda"))[0] is torch.bfloat16


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
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert run("--steps", "2", "--log.tensorboard", "--log.wandb", "--log.histogram_every", "1", out=tmp_path / "r") == 0
    for wanted in [("add_scalar", "train/loss"), ("add_scalar", "train/lr"), ("add_scalar", "val/psnr"), ("close", None), ("finish", None),
                   ("wandb", "train/loss"), ("wandb", "val/psnr")]:
        assert wanted in seen, wanted
    kinds = {(kind, (name or "").split("/")[0]) for kind, name in seen}
    assert {("add_image", "samples"), ("add_histogram", "weights"), ("add_histogram", "gradients"), ("wandb", "samples"),
            ("wandb", "weights"), ("wandb", "gradients")} <= kinds


def test_output_when_piped_is_plain_lines(tmp_path):
    out = subprocess.run(command("--steps", "3", "--log.every", "1", "--out", str(tmp_path / "r")), capture_output=True, text=True)
    assert out.returncode == 0 and "\r" not in out.stdout and "\x1b" not in out.stdout and out.stderr == ""
    assert [line.split()[1] for line in out.stdout.splitlines() if line.startswith("step") and "lr" in line] == ["1/3", "2/3", "3/3"]


# -------------------------------------------------------------------------------------------------------------------- rooms of the house

ALLOWED = {"vae3d": {"torch", "quantize", "tile_plans", "local_layers", "lean_conv"}, "quantize": {"torch"},
           "lean_conv": {"torch"}, "local_layers": {"torch"}, "tiles": {"torch", "local_layers"},
           "tile_plans": {"torch", "tiles", "local_layers"},
           "unet": {"torch"}, "losses": {"torch"}, "data": {"torch", "numpy", "nibabel", "PIL"},  # PIL: optional
           "weights": {"torch", "vae3d"}, "memtest": {"torch", "train", "pictures"}, "parallel": {"torch"}, "pictures": {"torch"},
           "checkpoints": {"torch", "data", "tiles", "weights"}}


def test_import_table():
    """DESIGN.md: the rooms never import one another, nor train; memtest imports train and pictures inside main only."""
    for name, extra in ALLOWED.items():
        path = ROOT / f"{name}.py"
        if not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) else []
            for module in modules:
                assert module.split(".")[0] in extra | sys.stdlib_module_names, f"{name}.py:{node.lineno} imports {module}"


def test_finishing_takes_its_time_once(tmp_path):
    """The whole tiny run, files and all, takes seconds: the loop waits for nothing."""
    start = time.monotonic()
    assert run("--steps", "5", out=tmp_path / "r") == 0
    names = {".lock", "best.pt", "config.yaml", "last.pt", "last.prev.pt", "log.jsonl", "samples"}
    assert {p.name for p in (tmp_path / "r").iterdir()} == names
    assert time.monotonic() - start < 60
