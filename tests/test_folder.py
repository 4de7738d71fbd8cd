"""training/folder.py: a run folder is one process's, is never overwritten, and survives kills, full disks
and damage.
"""
import contextlib
import errno
import gc
import os
import shutil
import subprocess
import sys

import pytest

import predict
import train
from runs import TINY, assert_equal_runs, load, resume, rows, run
from training import checkpoints
from training.run import save_config


def flip(path, place=0.5):
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 4
    path.write_bytes(content)


def killed(*_):
    raise KeyboardInterrupt


# -------------------------------------------------------------------------------------------- which folder

def test_an_existing_run_is_never_overwritten(tmp_path, capsys):
    assert run("--steps", "1", out=tmp_path / "r") == 0
    before = (tmp_path / "r/last.pt").read_bytes()
    assert run("--steps", "3", out=tmp_path / "r") == 2
    assert "--resume" in capsys.readouterr().err and (tmp_path / "r/last.pt").read_bytes() == before


def test_default_folders_are_numbered(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("training.folder.time.strftime", lambda how: "2026-01-02")
    for name in ("synthetic_2026-01-02", "synthetic_2026-01-02-2"):
        assert train.main([*TINY, "--steps", "1"]) == 0 and (tmp_path / "runs" / name / "best.pt").is_file()


def test_a_run_that_died_before_its_first_state_can_start_again(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/log.jsonl").write_text('{"step": 0, "split": "val"}\n')
    assert run("--steps", "1", out=tmp_path / "r") == 0 and len(rows(tmp_path / "r", "val")) == 2


HOLDS_A_LOCK = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(99)
"""


def test_a_folder_is_one_processs(tmp_path, capsys):
    out = tmp_path / "r"
    assert run("--steps", "2", out=out) == 0
    words = [sys.executable, "-c", HOLDS_A_LOCK, str(out / ".lock")]
    holder = subprocess.Popen(words, stdout=subprocess.PIPE)
    holder.stdout.readline()
    before = (out / "log.jsonl").read_bytes()
    assert resume(out, "--steps", "3") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and ".lock" in error and (out / "log.jsonl").read_bytes() == before
    holder.kill()
    holder.wait()
    assert resume(out, "--steps", "3") == 0


# ------------------------------------------------------------------------------ kept and older checkpoints

def test_keep_older_checkpoints(tmp_path):
    assert run("--steps", "6", "--train.save_every", "1", "--train.keep", "2", out=tmp_path / "r") == 0
    found = sorted(path.name for path in (tmp_path / "r").glob("step_*.pt"))
    assert found == ["step_000005.pt", "step_000006.pt"]


@pytest.mark.slow
def test_kept_checkpoints_survive_a_kill_between_write_and_removal_and_no_other_file_goes(
        tmp_path, monkeypatch):
    flags = ["--steps", "6", "--train.save_every", "1", "--train.keep", "2"]
    whole, cut, place = tmp_path / "whole", tmp_path / "cut", checkpoints.place
    assert run(*flags, out=whole) == 0
    mine = {"step_best.pt", "step_000001_mine.pt", "my.tmp"}
    cut.mkdir()
    for name in mine:
        (cut / name).write_text("a user's")
    for at in (3, 6):                                            # killed before last.pt is the new file

        def killed_at(source, target, at=at):
            if source.name == f"step_{at:06d}.pt":
                (cut / "last.next.pt").write_text("half written")
                raise KeyboardInterrupt
            place(source, target)
        monkeypatch.setattr(checkpoints, "place", killed_at)
        with pytest.raises(KeyboardInterrupt):
            if at == 3:
                run(*flags, out=cut)
            else:
                resume(cut)
        assert load(cut / "last.pt")["step"] == at - 1
    monkeypatch.setattr(checkpoints, "place", place)
    assert resume(cut) == 0
    found = [{path.name for path in out.iterdir()} for out in (whole, cut)]
    assert found[1] - found[0] == mine and found[0] < found[1]
    assert_equal_runs(whole, cut)
    assert {"step_000005.pt", "step_000006.pt"} == {path.name for path in whole.glob("step_*")}


@pytest.mark.slow
def test_going_back_to_an_older_checkpoint_takes_the_later_ones_back(tmp_path, monkeypatch):
    flags = ["--steps", "6", "--train.save_every", "2", "--train.keep", "3"]
    whole, out = tmp_path / "whole", tmp_path / "r"
    assert run(*flags, out=whole) == 0 and run(*flags, out=out) == 0
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_step", killed)
        resume(out / "step_000002.pt")
    assert load(out / "last.pt")["step"] == 2 and resume(out) == 0
    kept = ["step_000002.pt", "step_000004.pt", "step_000006.pt"]
    assert_equal_runs(whole, out, ["last.pt", "best.pt", *kept])


@pytest.mark.slow
def test_a_damaged_last_falls_back_to_the_one_before_and_a_damaged_best_is_made_anew(tmp_path, capsys):
    flags = ["--steps", "6", "--train.save_every", "2", "--train.val_every", "3"]
    whole, out = tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0 and run(*flags, out=out) == 0
    flip(out / "last.pt")
    capsys.readouterr()
    assert resume(out) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "last.prev.pt" in line]
    assert len(said) == 1 and "checksum" in said[0] and "step 4" in said[0]
    assert_equal_runs(whole, out)
    assert load(out / "last.prev.pt")["step"] == 4               # what was damaged did not take its place

    flip(out / "best.pt")
    assert predict.main(["reconstruct", "--checkpoint", str(out), "--input", "x",
                         "--output", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert "checksum" in error and "best.pt" in error and error.count("\n") == 1
    assert resume(out, "--steps", "8") == 0 and "take its place" in capsys.readouterr().out
    best = load(out / "best.pt")
    assert best["metrics"]["psnr"] == max(r["psnr"] for r in rows(out, "val") if r["step"] >= 6)
    assert best["latent"] is not None

    for name in ("last.pt", "last.prev.pt"):
        flip(out / name)
    assert resume(out) == 2 and capsys.readouterr().err.count("\n") == 1


# ---------------------------------------------------------------------------------------------- full disks

@pytest.mark.slow
@pytest.mark.parametrize("name", [
    "best.pt", "last.next.pt", "log.jsonl", "config.yaml", "folder"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_from_its_last_state(name, tmp_path, monkeypatch, capsys):
    flags = ["--steps", "4", "--train.save_every", "1", "--train.val_every", "2", "--log.sample_every", "2"]
    whole, out = tmp_path / "whole", tmp_path / "r"
    assert run(*flags, out=whole) == 0
    with monkeypatch.context() as patch:
        replace, step, armed = os.replace, train.train_and_log, []

        def full(source, target):
            if armed and str(target).endswith(name):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        def spoilt(running, number, micro_batches):
            if number == 1:
                armed.append(True)
                if name == "log.jsonl":
                    running.log.file = open("/dev/full", "a")
                if name == "config.yaml":                        # written again when the memory dial turns
                    save_config(running)
                if name == "folder":
                    shutil.rmtree(out)
            step(running, number, micro_batches)
        patch.setattr(os, "replace", full)
        patch.setattr(train, "train_and_log", spoilt)
        assert run(*flags, out=out) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    if name == "folder":
        assert f"{out}: the run folder is gone" in error
        return
    assert name in error and "No space left" in error and "free some space" in error
    assert f"--resume {out}" in error
    assert not list(out.rglob("*.tmp")) and load(out / "last.pt")["step"] == (3 if name == "best.pt" else 1)
    assert resume(out) == 0
    assert_equal_runs(whole, out)


def mount(*words):
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


def fill(disk):
    """All but room for a part of a checkpoint."""
    with contextlib.suppress(OSError), open(disk / "other", "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    os.truncate(disk / "other", (disk / "other").stat().st_size - 40 * 1024)


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path, monkeypatch, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or not mount("-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)):
        pytest.skip("mounting a small tmpfs needs root")
    try:
        flags, out, step = ["--steps", "4", "--train.save_every", "1"], disk / "r", train.train_and_log
        assert run(*flags, out=tmp_path / "whole") == 0

        def filled(running, number, micro_batches):
            if number == 2:
                fill(disk)
            step(running, number, micro_batches)
        with monkeypatch.context() as patch:
            patch.setattr(train, "train_and_log", filled)
            assert run(*flags, out=out) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "No space left" in error and "last.next.pt" in error
        assert {path.name for path in out.iterdir()} == {
            ".lock", "best.pt", "commands.jsonl", "config.yaml", "last.pt", "last.prev.pt", "log.jsonl",
            "report.html"}
        (disk / "other").unlink()
        gc.collect()                                             # the log, held open by the error's traceback
        assert mount("-o", "remount,ro", str(disk))
        assert resume(out) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "Read-only" in error and "make it writable" in error
        assert mount("-o", "remount,rw", str(disk))
        assert resume(out) == 0
        assert_equal_runs(tmp_path / "whole", out)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
