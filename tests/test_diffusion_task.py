"""Task `diffusion` through the house: its loss by hand, statistics, runs that are killed, resumed, shared."""
import dataclasses
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import diffusion
import memtest
import peaks
from latent_files import write_latent, write_set
from runs import (
    CPU,
    ROOT,
    RunsOut,
    assert_equal_runs,
    load,
    load_config,
    make_step,
    new_state,
    resume,
    rows,
)
from tasks import TASKS
from tasks import diffusion as task
from train import main
from training import conditions, fit, ready
from training.order import MicroBatch
from training.step import train_step
from training.task import of

NET = ["--task", "diffusion", "--unet.channels", "8,16", "--unet.time_channels", "16", "--patch", "4,8,8",
       "--unet.norm_groups", "4", "--diffusion.steps", "2", "--device", "cpu", "--batch", "2",
       "--train.val_crops", "2", "--log.sample_every", "0", "--data.crops_per_volume", "3"]
TOLD = ["--unet.vector_channels", "8"]


def run(folder, *flags, out):
    return main([*NET, "--data", str(folder), *flags, "--out", str(out)])


def test_the_loss_is_that_of_normalised_latents_by_their_own_draws():
    """By hand: (z - mean) / std, mixed with noise at t, v = eps - x; the network begins at 0."""
    cfg = load_config([*NET, *TOLD, "--diffusion.cond_drop", "0"])
    state = new_state(cfg)
    state.latent = {"mean": torch.tensor([1.0, 2, 3, 4]), "std": torch.tensor([2.0, 1, 4, 0.5])}
    image, label = torch.randn(2, 4, 4, 8, 8), torch.randn(2, 8)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    found = task.objective(cfg, state, state.forward, MicroBatch(image, [], [], label), generators)
    squares = []
    for number, seed in enumerate((5, 6)):
        generator = torch.Generator().manual_seed(seed)
        torch.rand(2, generator=generator, dtype=torch.float64)
        eps = torch.randn(4, 4, 8, 8, generator=generator)
        mean, std = (state.latent[name].view(4, 1, 1, 1) for name in ("mean", "std"))
        squares.append((eps - (image[number] - mean) / std).square().mean())
    assert abs(float(found.terms["loss"].detach() - sum(squares) / 2)) < 1e-5


def test_mean_and_std_are_numpys_over_the_whole_set(tmp_path):
    """Of training latents alone, whatever their sizes, also far from 0; and they ship with the weights."""
    rng = np.random.default_rng(0)
    for number in range(4):
        scale = np.array([1, 2, 3, 4]).reshape(4, 1, 1, 1)
        latent = 1e4 + rng.standard_normal((1, 4, 4 + number, 8, 8)) * scale
        write_latent(tmp_path / f"z/c{number}_latent.npz", latent)
    out = tmp_path / "r"
    assert run(tmp_path / "z", "--steps", "1", out=out) == 0
    names = load(out / "best.pt")["data"]["training"]
    assert len(names) == 3
    arrays = [np.load(tmp_path / f"z/{name}_latent.npz")["latent"][0].astype(np.float64) for name in names]
    flat = np.concatenate([array.reshape(4, -1) for array in arrays], 1)
    for file in ("best.pt", "last.pt"):
        known = load(out / file)["latent"]
        assert np.allclose(known["mean"], flat.mean(1), rtol=1e-6)
        assert np.allclose(known["std"], flat.std(1), rtol=1e-5)
    # a run that starts from these weights keeps what they were trained with
    write_set(tmp_path / "other")
    flags = ["--steps", "1", "--init", str(out)]
    assert run(tmp_path / "other", *flags, out=tmp_path / "tuned") == 0
    assert torch.equal(load(tmp_path / "tuned/best.pt")["latent"]["mean"], known["mean"])


def test_validation_is_at_fixed_levels(tmp_path, capsys):
    """Eight of them, rising in noise; the mean is the loss; what is explained is 0 for linear knowledge."""
    write_set(tmp_path / "z", kind="ct")
    out = tmp_path / "r"
    assert run(tmp_path / "z", "--steps", "30", "--train.val_every", "15", "--optim.lr", "1e-2", out=out) == 0
    said = capsys.readouterr().out
    assert "diffusion.shift auto is 0.2 " in said and "cache of the prepared" not in said
    first, *_, last = rows(out, "val")
    levels = [first[f"level_{k}"] for k in range(1, 9)]
    # the network begins at 0, so every level has the mean square of eps - x, about 2
    assert max(levels) - min(levels) < 1e-6 and abs(levels[0] - 2) < 0.3
    assert first["loss"] == pytest.approx(sum(levels) / 8, rel=1e-6)
    cfg = diffusion.DiffusionConfig()
    shift = (4 * 8 * 8 / 32**3) ** (1 / 3)
    times = [shift * u / (1 + (shift - 1) * u) for u in np.arange(0.5, 8) / 8]
    linear = [diffusion.linear_loss(cfg, diffusion.Level(1 - t, t, t)) for t in times]
    by_hand = np.mean([1 - level / each for level, each in zip(levels, linear)])
    assert first["explained"] == pytest.approx(by_hand, abs=1e-3) and last["explained"] > first["explained"]
    # what is validated, shipped and so sampled from is the average, by default
    best, end = load(out / "best.pt"), load(out / "last.pt")
    assert best["config"]["train"]["ema"] == [task.EMA] and best["step"] == 30
    assert all(torch.equal(best["model"][name], end["ema"][0][name]) for name in best["model"])
    assert any(not torch.equal(best["model"][name], end["model"][name]) for name in best["model"])


def test_conditions_reach_the_network_and_are_dropped(tmp_path):
    cfg = load_config([*NET, *TOLD])
    state, seen = new_state(cfg), []
    image, label = torch.randn(64, 4, 4, 8, 8), torch.arange(1, 65.0)[:, None].expand(64, 8)

    class Spy(torch.nn.Module):
        def forward(self, x, t, vector, hint):
            seen.append(vector)
            return state.model(x, t, vector)
    cfg = dataclasses.replace(cfg, diffusion=dataclasses.replace(cfg.diffusion, cond_drop=0.3))
    generators = [torch.Generator().manual_seed(seed) for seed in range(64)]
    task.objective(cfg, state, Spy(), MicroBatch(image, [], [], label), generators)
    (vector,) = seen
    wanted = []
    for seed in range(64):
        wanted.append(float(torch.rand(2, generator=torch.Generator().manual_seed(seed),
                                       dtype=torch.float64)[1]) < 0.3)
    assert [not row.any() for row in vector] == wanted and 8 < sum(wanted) < 32
    assert all(torch.equal(row, told) for row, told, gone in zip(vector, label, wanted) if not gone)


CONCAT = [*TOLD, "--unet.in_channels", "6", "--unet.out_channels", "4", "--cond.concat", "x",
          "--cond.concat_channels", "2", "--unet.zero_head", "false"]


def micro(count, seed=0):
    """`count` crops of a latent and one beside, with conditions; crop k is the same in any micro-batch."""
    image, label = torch.empty(count, 6, 4, 8, 8), torch.empty(count, 8)
    for number in range(count):
        generator = torch.Generator().manual_seed(seed + number)
        image[number] = torch.randn(6, 4, 8, 8, generator=generator)
        label[number] = torch.randn(8, generator=generator)
    return MicroBatch(image, list(range(seed, seed + count)), [0] * count, label)


def step_of(batches, *flags, dtype=None):
    """One optimizer step from the same start -> (result, all weights)."""
    cfg = load_config([*NET, *CONCAT, "--optim.optimizer", "sgd", "--optim.lr", "1", "--optim.warmup", "0",
                       *flags])
    state = new_state(cfg)
    state.latent = {"mean": torch.zeros(4), "std": torch.ones(4)}
    state.amp_dtype = dtype
    result = train_step(cfg, state, batches)
    return result, torch.cat([p.detach().flatten() for p in state.model.parameters()])


def test_accumulated_micro_batches_are_one_batch():
    """Noise, level and lost conditions belong to a crop's place in the step, however the step is cut."""
    whole, weights = step_of([micro(4)])
    for parts in ([micro(2), micro(2, 2)], [micro(1, k) for k in range(4)]):
        result, found = step_of(parts, "--accum", str(len(parts)))
        assert abs(float(result.terms["loss"] - whole.terms["loss"])) < 1e-5
        assert (found - weights).abs().max() < 1e-5 * weights.abs().max()


def test_an_autocast_step_stays_near_float32():
    """bf16 on the CPU stands in for CUDA's: the loss is float32, the update finite and near."""
    exact, weights = step_of([micro(4)])
    with torch.backends.mkldnn.flags(enabled=False):             # tiny bf16 kernels: docs/LOG.md
        near, rough = step_of([micro(4)], dtype=torch.bfloat16)
    assert near.updated and near.terms["loss"].dtype == torch.float32
    assert abs(float(near.terms["loss"] / exact.terms["loss"]) - 1) < 0.02
    apart = (rough - weights).norm() / (weights - step_of([micro(4)], "--optim.lr", "1e-9")[1]).norm()
    assert 0 < apart < 0.1, apart


@pytest.mark.slow
def test_stopped_and_resumed_it_is_the_run_that_was_left_alone(tmp_path):
    write_set(tmp_path / "z", kind="ct")
    flags = [*NET, "--data", str(tmp_path / "z"), "--steps", "30", "--train.save_every", "2", "--accum", "2",
             "--train.val_every", "7", "--log.sample_every", "8", "--log.every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main([*flags, "--out", str(whole)]) == 0
    process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *flags, "--out", str(cut)],
                               stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 9/"):
            process.kill()
            break
    assert process.wait(60) == -signal.SIGKILL
    assert resume(cut) == 0
    assert_equal_runs(whole, cut)
    assert list((whole / "samples").glob("*.png")) and list((whole / "samples").glob("*_sample.nii.gz"))


def test_out_of_memory_turns_the_dial_and_repeats_the_step(tmp_path, monkeypatch, capsys):
    import train
    write_set(tmp_path / "z")
    again = []

    def short_of_memory(cfg, state, batches):
        again.append(state.dial.mode)
        if len(again) == 1:
            with RunsOut([5]):
                return train_step(cfg, state, batches)
        return train_step(cfg, state, batches)
    flags = ["--steps", "2", "--train.ema", "0.5"]
    assert run(tmp_path / "z", *flags, out=tmp_path / "whole") == 0
    monkeypatch.setattr(train, "train_step", short_of_memory)
    assert run(tmp_path / "z", *flags, out=tmp_path / "r") == 0
    assert again == ["none", "checkpoint", "checkpoint"]
    # the step that was repeated is the step that it would have been
    for name in ("model", "ema"):
        one, other = (load(tmp_path / folder / "last.pt")[name] for folder in ("whole", "r"))
        one, other = (part[0] if name == "ema" else part for part in (one, other))
        assert max(float((one[key] - other[key]).abs().max()) for key in one) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("beside", ["", "concat", "control"])
def test_a_prediction_is_what_a_step_takes(beside, capsys):
    """Also of a ControlNet, which copies the denoiser: the copy once could not be predicted."""
    flags = [*NET, *TOLD]
    if beside:
        flags += [f"--cond.{beside}", "x"]
    flags += {"concat": CONCAT, "control": ["--init", "x", "--cond.stride", "2,4,4"]}.get(beside, [])
    cfg = load_config(flags)
    predicted = fit.predicted(cfg, of(TASKS, cfg), CPU).bytes
    assert predicted == peaks.count(lambda device: make_step(cfg, device)).bytes > 0
    assert memtest.main([*flags, "--resolution", "4,8,8"]) == 0
    assert "AMP, checkpointed" in capsys.readouterr().out


def test_a_control_changes_nothing_before_its_first_step_and_then_learns(tmp_path, capsys):
    """Label maps beside a frozen denoiser; its copy of the encoder begins as the trained one."""
    write_set(tmp_path / "z", 3)
    base = tmp_path / "base"
    assert run(tmp_path / "z", "--steps", "30", "--optim.lr", "1e-2", out=base) == 0
    assert load(base / "best.pt")["step"] == 30
    (tmp_path / "labels").mkdir()
    for number in range(3):
        label = np.random.default_rng(number).integers(0, 9, (32, 32, 8)).astype(np.float32)
        np.save(tmp_path / f"labels/case{number}.npy", label)
    out = tmp_path / "control"
    flags = ["--init", str(base), "--cond.control", str(tmp_path / "labels"), "--steps", "2", "--seed", "1"]
    assert run(tmp_path / "z", *flags, out=out) == 0
    said = capsys.readouterr().out
    assert "begins as a copy of the denoiser's" in said
    (line,) = [line for line in said.splitlines() if "left as new" in line]
    assert line.count(";") == 4 and line.endswith(" more") and len(line) < 300     # of some 60 weights
    theirs, ours = load(base / "best.pt")["model"], load(out / "last.pt")["model"]
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    # the first validation is of the base as it was shipped: the ControlNet adds 0
    again = tmp_path / "again"
    assert run(tmp_path / "z", "--init", str(base), "--steps", "1", "--seed", "1", out=again) == 0
    assert rows(out, "val")[0]["loss"] == rows(again, "val")[0]["loss"]
    assert all(float(ours[name].abs().sum()) > 0 for name in ours if name.startswith("beside.outputs."))
    copied = [name for name in theirs if name.startswith("encoder.")]
    apart = [float((ours[f"beside.encoder.{name}"] - theirs[name]).abs().max()) for name in copied]
    assert max(apart) < 0.01                                     # of two steps, not of another start


def halves(axis, side):
    """A label map (8, 16, 16), 1 in one half along an axis; and its share of 1 by elements of a latent."""
    label = np.zeros((8, 16, 16), np.float32)
    label.swapaxes(0, axis)[label.shape[axis] // 2:] = 1
    label = label if side else 1 - label
    return label, label.reshape(4, 2, 4, 4, 4, 4).mean((1, 3, 5))


@pytest.mark.slow
def test_a_control_net_learns_to_follow_label_maps(tmp_path):
    """Latents are 1 where the map is 1, and -1 elsewhere. The denoiser alone makes any half; with the map of
    one, from the same noise, its ControlNet raises that one.
    """
    rng = np.random.default_rng(0)
    (tmp_path / "labels").mkdir()
    for number in range(16):
        label, share = halves(number % 3, number // 3 % 2)
        latent = 0.3 * rng.standard_normal((1, 2, 4, 4, 4)) + 2 * share - 1
        write_latent(tmp_path / f"z/case{number}_latent.npz", latent)
        np.save(tmp_path / f"labels/case{number}.npy", label.T)
    flags = ["--unet.channels", "16,32", "--unet.norm_groups", "1", "--patch", "4,4,4", "--batch", "8",
             "--data.crops_per_volume", "8", "--diffusion.shift", "2", "--diffusion.steps", "4",
             "--optim.lr", "2e-3", "--train.ema", "0.9"]
    assert run(tmp_path / "z", *flags, "--steps", "60", out=tmp_path / "base") == 0
    beside = ["--init", str(tmp_path / "base"), "--cond.control", str(tmp_path / "labels")]
    assert run(tmp_path / "z", *flags, *beside, "--steps", "120", out=tmp_path / "control") == 0

    found = ready.load(tmp_path / "control", TASKS, device="cpu")
    noise, raised = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(5)), []
    told = torch.zeros(1, found.cfg.unet.vector_channels)
    for axis in range(3):
        for side in range(2):
            label, share = halves(axis, side)
            cond = {"vector": told, "hint": torch.from_numpy(label)[None, None]}
            x = diffusion.sample(found.cfg.diffusion, task.denoise(found), noise, cond)[0]
            inside = torch.from_numpy(share).expand(2, 4, 4, 4) == 1
            raised.append(float(x[inside].mean() - x[~inside].mean()))
    assert min(raised) > 0.3, raised


@pytest.mark.slow
def test_class_and_latent_beside_are_followed(tmp_path):
    """The latent beside says which half differs, the class in which direction; guidance drives it further."""
    rng = np.random.default_rng(0)
    for number in range(24):
        share = halves(number % 3, number // 3 % 2)[1]
        kind, sign = ("up", 1) if number // 6 % 2 else ("down", -1)
        latent = 0.3 * rng.standard_normal((1, 2, 4, 4, 4)) + sign * (2 * share - 1)
        write_latent(tmp_path / f"z/case{number}_latent.npz", latent, kind=kind)
        write_latent(tmp_path / f"beside/case{number}_latent.npz", share[None, None], weights="b" * 16)
    flags = ["--unet.channels", "16,32", "--unet.norm_groups", "1", "--patch", "4,4,4", "--batch", "8",
             "--data.crops_per_volume", "8", "--diffusion.shift", "2", "--diffusion.steps", "4",
             "--optim.lr", "3e-3", "--train.ema", "0.9", "--cond.concat", str(tmp_path / "beside")]
    assert run(tmp_path / "z", *flags, "--steps", "300", out=tmp_path / "r") == 0
    found = ready.load(tmp_path / "r", TASKS, device="cpu")
    noise = torch.randn(1, 2, 4, 4, 4, generator=torch.Generator().manual_seed(5))
    moved = {1.0: [], 2.0: []}
    for guidance, into in moved.items():
        cfg = dataclasses.replace(found.cfg.diffusion, guidance=guidance)
        for number in range(12):
            share = torch.from_numpy(halves(number % 3, number // 3 % 2)[1])
            kind, sign = ("up", 1) if number >= 6 else ("down", -1)
            vector = conditions.vector(found.cfg.cond, (2.5, 2, 1.5), (8, 16, 16), kind, None)
            cond = {"vector": torch.from_numpy(vector)[None], "concat": share[None, None]}
            none = {name: torch.zeros_like(value) for name, value in cond.items()}
            x = diffusion.sample(cfg, task.denoise(found), noise, cond, none)[0]
            inside = share.expand(2, 4, 4, 4) == 1
            into.append(sign * float(x[inside].mean() - x[~inside].mean()))
    assert min(moved[1.0]) > 0.3, (min(moved[1.0]), np.mean(moved[1.0]))
    assert np.mean(moved[2.0]) > np.mean(moved[1.0]), moved


def test_what_cannot_be_meant_is_told_in_one_line(tmp_path, capsys):
    write_set(tmp_path / "z")
    write_set(tmp_path / "other", weights="a" * 16)
    assert run(tmp_path / "z", "--steps", "1", out=tmp_path / "r") == 0
    capsys.readouterr()
    for flags, words in (
        (["--task", "diffusion"], "name their folder with --data"),
        (["--task", "diffusion", "--cond.control", "x"], "--init"),
        (["--resume", str(tmp_path / "r"), "--data", str(tmp_path / "other")], "another autoencoder"),
        ([*NET, "--init", str(tmp_path / "r"), "--data", str(tmp_path / "other")], "another autoencoder"),
    ):
        assert main([*flags, *([] if "--resume" in flags else ["--out", str(tmp_path / "no")])]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
