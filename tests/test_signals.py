"""training/signals.py: SIGINT, SIGTERM and SIGUSR1 end a run with its state saved, whatever it was doing."""
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
import train
from runs import TINY, assert_equal_runs, command, load, resume, run
from training.run import stop_if_signalled
from training.signals import SECOND_SIGNAL
from training.step import train_step

pytestmark = pytest.mark.slow


SIX = ["--steps", "6", "--train.val_every", "2"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    assert run(*SIX, out=out) == 0
    return out


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_signals_save_the_state_and_name_the_command(
        undisturbed, tmp_path, number, code, capsys, monkeypatch):
    cut = tmp_path / "cut"

    def signalled(cfg, state, batches):
        if state.step == 2:
            os.kill(os.getpid(), number)
        return train_step(cfg, state, batches)
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", signalled)
        assert run(*SIX, out=cut) == code
    assert f"--resume {cut}" in capsys.readouterr().out
    assert resume(cut) == 0
    assert (undisturbed / "last.pt").read_bytes() == (cut / "last.pt").read_bytes()


def test_signals_between_the_crops_of_validation_codebook_latents_and_pictures(tmp_path, monkeypatch, capsys):
    """At every place where a part of the loop can be left: the resumed run does that part again, and is
    never finished too early.
    """
    flags = ["--steps", "2", "--train.val_every", "2", "--vae.bottleneck", "vq", "--vae.num_codes", "8",
             "--train.keep", "1", "--train.save_every", "1", "--train.ema", "0.9,0.5"]
    whole, calls, at = tmp_path / "whole", [], None

    def killed(*_):
        raise KeyboardInterrupt

    def counted(running):
        calls.append(sys._getframe(1).f_code.co_name)
        if len(calls) - 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        stop_if_signalled(running)
    for room in ("tasks.vae", "training.validation"):
        monkeypatch.setattr(f"{room}.stop_if_signalled", counted)
    assert run(*flags, out=whole) == 0
    places = list(calls)
    codebook = "start"                                           # of tasks/vae.py: the first codes
    assert places == [codebook] * 2 + ["validate"] * 4 + ["latent_statistics"] * 2 + ["save_samples"]
    names = ["last.pt", "best.pt", "ema_0.5.pt", "step_000002.pt"]
    names += [str(path.relative_to(whole)) for path in (whole / "samples").iterdir()]
    for at, place in enumerate(places):
        calls.clear()
        out = tmp_path / str(at)
        assert run(*flags, out=out) == 143, place
        assert capsys.readouterr().out.splitlines()[-1].startswith("stopped by SIGTERM")
        if place == codebook:                                    # before there was a state
            again = [*TINY, *flags, "--out", str(out)]
        else:
            again = ["--resume", str(out)]
            assert not load(out / "last.pt")["finished"], place
        at = None
        if place == "validate":                                  # and killed after it, before it is saved
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(train, "save_last", killed)
                train.main(again)
        assert train.main(again) == 0, place
        assert_equal_runs(whole, out, names)


def test_a_signal_before_the_loop_is_one_line(tmp_path, monkeypatch, capsys):
    def signalled(*_):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
    monkeypatch.setattr(data, "open_data", signalled)
    before = signal.getsignal(signal.SIGINT)
    assert run("--steps", "1", out=tmp_path / "r") == 130
    captured = capsys.readouterr()
    assert captured.out.startswith("stopped by SIGINT") and captured.err == ""
    assert not (tmp_path / "r").exists()
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------- the real command

def started(out, *flags):
    """The command in a process group of its own, once its loop has begun."""
    process = subprocess.Popen(command(*flags, "--out", str(out)), stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    next(line for line in process.stdout if line.startswith("step 0/"))
    return process


def test_signals_to_workers_and_to_the_reader_of_the_output_harm_nothing(tmp_path):
    process = started(tmp_path / "r", "--steps", "9", "--accum", "100", "--data.crops_per_volume", "1000",
                      "--data.workers", "2", "--log.every", "1")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while children.is_file() and len(children.read_text().split()) < 2:
        time.sleep(0.01)
    time.sleep(0.2)
    process.stdout.close()                                       # as `tee` does, which gets the signal too
    # The second is from torchrun, or from a batch system that signals each process.
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(process.pid, number)
    assert process.wait(60) == 130 and process.stderr.read() == ""
    assert load(tmp_path / "r/last.pt")["step"] == 1


def test_a_second_signal_ends_at_once(tmp_path):
    a_long_step = ["--steps", "2", "--accum", "100000", "--data.crops_per_volume", "10000"]
    process = started(tmp_path / "r", *a_long_step)
    for number in (signal.SIGTERM, signal.SIGINT):               # a batch system's twin signals are one
        process.send_signal(number)
    assert "after the step at hand" in process.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(SECOND_SIGNAL + 0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    error = process.stderr.read()
    assert "again" in error and error.count("\n") == 1
    assert load(tmp_path / "r/last.pt")["step"] == 0


def test_soak_in_short():
    """tests/soak.py: ends at random moments, real processes."""
    soak = Path(__file__).with_name("soak.py")
    words = [sys.executable, str(soak), "--kills", "4", "--steps", "6", "--commands", "0"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "all resumed and equal" in done.stdout, done.stdout + done.stderr
