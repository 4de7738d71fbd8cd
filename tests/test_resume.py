"""training/resume.py: a run goes on to the bit, or starts from weights that are there; what does not fit is
an error.
"""
import os
import pickle
import random
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import perceptual
import train
from runs import (
    CODES,
    CPU,
    EVERYTHING,
    assert_equal_runs,
    command,
    flags_of,
    load,
    load_config,
    new_state,
    resume,
    rows,
    run,
    same,
    weights,
)
from training.config import TrainConfig, config_dict, config_from
from training.resume import restore, resumed_config
from training.step import train_step

# ------------------------------------------------------------------------------------- going on to the bit

@pytest.mark.slow
def test_kill_and_resume_equals_uninterrupted(tmp_path):
    """kill -9 at a random step; final weights, optimizer and log equal those of the run left alone, to the
    bit.
    """
    flags = ["--steps", "24", "--accum", "2", "--train.save_every", "3", "--train.val_every", "7",
             "--train.ema", "0.9", "--log.every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0
    process = subprocess.Popen(command(*flags, "--out", str(cut)), stdout=subprocess.PIPE, text=True)
    at = random.randint(4, 20)
    for line in process.stdout:
        if line.startswith(f"step {at}/"):
            process.kill()
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL
    assert 0 < torch.load(cut / "last.pt", weights_only=True)["step"] <= at
    assert resume(cut) == 0
    print(f"killed at step {at}")                                # shown where the next line fails
    assert_equal_runs(whole, cut)


@pytest.mark.slow
def test_resume_is_exact_with_everything_on(tmp_path, monkeypatch):
    """Kill in the middle of an epoch: codes, usage, clipping norms, averages, discriminator and LeCam
    anchors go on to the bit.
    """
    flags = [*flags_of(EVERYTHING), "--steps", "11", "--accum", "2", "--train.save_every", "4",
             "--train.val_every", "3"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0

    def killed(cfg, state, batches):
        if state.step == 6:
            raise KeyboardInterrupt
        return train_step(cfg, state, batches)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        run(*flags, out=cut)
    assert resume(cut) == 0
    for name in ("last.pt", "best.pt", "ema_0.99.pt"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes(), name
    keys, use = ("step", "codebook_usage", "perplexity"), []
    for out in (whole, cut):
        use.append([[r[key] for key in keys] for r in rows(out, "train") if "perplexity" in r])
    assert use[0] == use[1] and len(use[0]) > 1 and use[0][-1][0] == 11


def test_resuming_a_finished_run_leaves_it_as_it_is_and_more_steps_go_on(tmp_path, capsys):
    out = tmp_path / "r"

    def files():
        return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.rglob("*") if p.is_file()}
    assert run("--steps", "2", out=out) == 0
    before = files()
    assert resume(out) == 0 and resume(out / "last.pt") == 0
    assert before == files()
    assert "nothing to do" in capsys.readouterr().out
    assert resume(out, "--steps", "4") == 0 and [r["step"] for r in rows(out, "train")] == [1, 2, 3, 4]


@pytest.mark.slow
def test_features_of_a_file_go_with_the_run(tmp_path):
    """The file is gone when the run is resumed."""
    file = tmp_path / "features.pt"
    torch.save(perceptual.FeatureNet3d(seed=7).to_checkpoint(), file)
    flags = ["--loss.perceptual_weight", "0.5", "--loss.perceptual_features", str(file),
             "--optim.schedule", "constant", "--optim.warmup", "0"]
    assert run(*flags, "--steps", "4", out=tmp_path / "whole") == 0
    assert run(*flags, "--steps", "2", out=tmp_path / "cut") == 0
    file.unlink()
    assert resume(tmp_path / "cut", "--steps", "4") == 0
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_a_loss_scale_is_taken_over_only_where_both_runs_have_one(tmp_path):
    """A run of a card with bf16 goes on on one without, and the reverse: fp16's GradScaler begins anew, or
    is left out.
    """
    assert run("--steps", "2", out=tmp_path / "r") == 0
    path = tmp_path / "r/last.pt"
    content = load(path)
    state = new_state(config_from(content["config"], TrainConfig(), "last.pt"), CPU)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    restore(state, content, path)                                # {}: nothing to take over
    assert state.scaler.get_scale() == 8.0 and state.step == 2
    restore(state, content | {"scaler": state.scaler.state_dict() | {"scale": 2.0}}, path)
    assert state.scaler.get_scale() == 2.0
    state.scaler = torch.amp.GradScaler("cpu", enabled=False)
    restore(state, content | {"scaler": torch.amp.GradScaler("cpu").state_dict()}, path)


# --------------------------------------------------------------------------------------- what does not fit

def test_checkpoint_of_another_network_is_an_error(tmp_path, capsys):
    """Nothing is loaded half, and a file that holds none of the keys is no success; once it was one."""
    assert run("--steps", "1", out=tmp_path / "r") == 0
    content = torch.load(tmp_path / "r/last.pt", weights_only=True)
    content["model"] = {f"module.{name}": value for name, value in content["model"].items()}
    torch.save(content, tmp_path / "r/last.pt")
    assert resume(tmp_path / "r", "--steps", "2") == 2
    assert "missing" in capsys.readouterr().err


def test_a_checkpoint_of_another_version_is_one_line(tmp_path, capsys):
    assert run("--steps", "1", out=tmp_path / "r") == 0
    content = torch.load(tmp_path / "r/last.pt", weights_only=True)
    torch.save(content | {"version": 1}, tmp_path / "r/last.pt")
    assert resume(tmp_path / "r") == 2
    assert "of version 1, this code reads 3" in capsys.readouterr().err
    assert resume(tmp_path / "r", "--init", "x") == 2


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_crafted_pickle_is_refused(tmp_path, capsys, monkeypatch):
    """No file that is given to --resume runs code; files once were unpickled as they came."""
    monkeypatch.chdir(tmp_path)
    torch.save({"kind": "vae3d.train", "model": Evil()}, "evil.pt")
    Path("raw.pt").write_bytes(pickle.dumps(Evil()))
    Path("cut.pt").write_bytes(Path("evil.pt").read_bytes()[:200])
    Path("empty.pt").write_bytes(b"")
    for name in ("evil.pt", "raw.pt", "cut.pt", "empty.pt", "absent.pt"):
        assert resume(name) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1 and "Traceback" not in error
    assert not Path("executed").exists()


# ----------------------------------------------------------------------------------- starting from weights

def test_init_that_matches_nothing_is_an_error(tmp_path, capsys):
    """A start without a single weight of the file was once reported as a success."""
    assert run("--task", "seg", "--steps", "1", out=tmp_path / "seg") == 0
    assert run("--init", str(tmp_path / "seg"), out=tmp_path / "vae") == 2
    error = capsys.readouterr().err
    assert "none of its" in error and error.count("\n") == 1


def test_init_needs_more_than_biases_and_stage_1_needs_all(tmp_path, capsys):
    wide = ["--init", str(tmp_path / "wide")]
    assert run("--vae.base_channels", "8", "--steps", "1", out=tmp_path / "wide") == 0
    for flags in ([], [*CODES, "--train.stage", "1"]):
        assert run(*wide, *flags, out=tmp_path / "no") == 2
        assert "fit" in capsys.readouterr().err
    narrow = ["--vae.z_channels", "2", "--vae.base_channels", "8", "--steps", "1"]
    assert run(*narrow, *wide, out=tmp_path / "z") == 0
    # Two Gaussian heads of other widths share no half.
    assert "the mean's part" not in capsys.readouterr().out


@pytest.mark.slow
def test_stages_of_a_codebook(tmp_path, capsys):
    """KL -> stage 1 trains the codebook alone -> stage 2 trains all; what does not fit is said, by key."""
    vq = [*CODES, "--steps", "3", "--optim.warmup", "0"]
    assert run("--steps", "2", out=tmp_path / "kl") == 0
    assert run(*vq, "--init", str(tmp_path / "kl"), "--train.stage", "1", out=tmp_path / "one") == 0
    said = capsys.readouterr().out
    assert ("3 missing there, left as new: "
            "quantizer.code_count; quantizer.code_sum; quantizer.codebook") in said
    assert "2 of another shape: encoder.head.conv.bias (8,) -> (4,) (the mean's part taken)" in said
    kl, one = weights(tmp_path / "kl", "best.pt"), weights(tmp_path / "one")
    assert all(torch.equal(one[name], value[:len(one[name])]) for name, value in kl.items())
    assert run(*vq, "--init", str(tmp_path / "one"), "--train.stage", "2", out=tmp_path / "two") == 0
    two, first = weights(tmp_path / "two"), rows(tmp_path / "two", "val")[0]
    assert all(not torch.equal(one[name], two[name]) for name in one)
    best_of_one = max(rows(tmp_path / "one", "val"), key=lambda r: r["psnr"])
    assert first["psnr"] == best_of_one["psnr"], "stage 2 does not begin where stage 1 ended"
    kl = str(tmp_path / "kl")
    for flags, says in (
        (["--train.stage", "1", *vq], "--init"),
        (["--train.stage", "1", "--init", kl], "bottleneck vq"),
        (["--train.stage", "2", "--init", kl, *vq], "--train.stage 1 first"),
        (["--init", str(tmp_path / "absent")], "no such checkpoint"),
    ):
        assert run(*flags, out=tmp_path / "no") == 2
        assert says in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_learned_codebook_trains_in_stage_1(tmp_path):
    assert run("--steps", "1", out=tmp_path / "kl") == 0
    flags = [*CODES, "--vae.codebook_update", "gradient", "--vae.codebook_restart", "0", "--steps", "3"]
    assert run(*flags, "--init", str(tmp_path / "kl"), "--train.stage", "1", out=tmp_path / "one") == 0
    vq = [r["vq"] for r in rows(tmp_path / "one", "val")]
    assert vq[-1] < vq[0]


def test_a_checkpoint_from_before_early_stopping_had_a_reference_goes_on(tmp_path):
    """Its reference is the best value, as it was then; one that is no number is told."""
    out = tmp_path / "r"
    assert run("--steps", "2", "--train.val_every", "1", out=out) == 0
    content = torch.load(out / "last.pt", weights_only=True)
    assert content["reference"] == content["best"]
    cfg = config_from(content["config"], TrainConfig(), "")
    state = new_state(cfg)
    del content["reference"]
    restore(state, content, out / "last.pt")
    assert state.reference == content["best"]
    torch.save(content | {"reference": "x"}, out / "last.pt")
    with pytest.raises(ValueError, match="its reference is not what train.py writes"):
        load(out / "last.pt")


def test_a_run_from_before_patients_goes_on_with_its_own_split():
    config = config_dict(load_config([]))
    assert resumed_config({"config": config}, Path("last.pt")).data.patient == "auto"
    del config["data"]["patient"]
    assert resumed_config({"config": config}, Path("last.pt")).data.patient == "file"


def test_a_run_from_before_muon_goes_on_with_what_it_had():
    config = config_dict(load_config(["--optim.optimizer", "adam", "--optim.warmup_least", "7"]))
    assert resumed_config({"config": config}, Path("last.pt")).optim.optimizer == "adam"
    assert resumed_config({"config": config}, Path("last.pt")).optim.warmup_least == 7
    del config["optim"]["warmup_least"], config["optim"]["optimizer"]
    resumed = resumed_config({"config": config}, Path("last.pt")).optim
    assert (resumed.optimizer, resumed.warmup_least) == ("adamw", 0)
    del config["optim"]
    assert resumed_config({"config": config}, Path("last.pt")).optim.optimizer == "adamw"
