"""Many files: going on after an interruption, and failures told at the end."""
import os
import signal

import numpy as np
import torch

import predict
from predictions import ct_file, use
from tasks import vae
from volumes import files


def test_interrupted_folder_goes_on_and_a_failure_is_told_at_the_end(tmp_path, runs, capsys):
    folder = tmp_path / "in"
    for i in range(3):
        ct_file(folder / f"{i}.nii.gz", seed=i)
    (folder / "1.nii.gz").write_bytes(b"no NIfTI")
    ct_file(folder / "other" / "2.nii.gz", seed=9)               # the same name again
    command = ["reconstruct", "--checkpoint", str(runs("kl")), "--input", str(folder), "--output",
               str(folder / "out")]
    capsys.readouterr()
    assert predict.main(command) == 1
    captured = capsys.readouterr()
    def written():
        return sorted(str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*.nii.gz"))
    assert written() == ["0.nii.gz", "2.nii.gz", "other/2.nii.gz"]
    assert captured.err.count("\n") == 2 and "1.nii.gz" in captured.err and "1 of 4 failed" in captured.err
    ct_file(folder / "1.nii.gz", seed=1)
    (folder / "out" / "2.nii.gz").unlink()
    before = {name: (folder / "out" / name).stat().st_mtime_ns for name in written()}
    assert predict.main(command) == 0
    text = capsys.readouterr().out
    assert "2 of 4 outputs are there" in text and "skipped" in text and "[2/2]" in text
    assert len(written()) == 4
    assert all((folder / "out" / name).stat().st_mtime_ns == time for name, time in before.items())
    assert predict.main([*command, "--overwrite"]) == 0
    assert all((folder / "out" / name).stat().st_mtime_ns != time for name, time in before.items())


def test_a_signal_stops_at_once_and_leaves_nothing_half_written(tmp_path, runs, monkeypatch, capsys):
    for i in range(2):
        ct_file(tmp_path / "in" / f"{i}.nii.gz", seed=i)
    write = files.write_atomic

    def interrupted(path, content):
        def before_the_end(file):
            content(file)
            if path.name == "1.nii.gz":
                os.kill(os.getpid(), signal.SIGTERM)
        write(path, before_the_end)
    monkeypatch.setattr(files, "write_atomic", interrupted)
    assert use("reconstruct", runs("kl"), "--input", tmp_path / "in", "--output", tmp_path / "out") == 143
    # What was begun and what is done stands beside it.
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [".predict.jsonl", "0.nii.gz"]
    assert "the same command" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_out_of_memory_is_one_files_failure(tmp_path, runs, monkeypatch, capsys):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(vae, "reconstruct", full)
    path = ct_file(tmp_path / "a.nii.gz")
    assert use("reconstruct", runs("kl"), "--input", path, "--output", tmp_path / "o") == 1
    assert "--tile" in capsys.readouterr().err


def test_files_that_do_not_fit_the_network_are_told_in_one_line(tmp_path, runs, capsys):
    np.save(tmp_path / "two.npy", np.random.default_rng(0).standard_normal((6, 6, 6, 2)))
    path = ct_file(tmp_path / "a.nii.gz")
    assert use("encode", runs("kl"), "--input", path, "--output", tmp_path / "z") == 0
    (tmp_path / "z" / "b_latent.npz").write_bytes(b"PK no archive")
    runs("vq")
    capsys.readouterr()
    assert use("reconstruct", runs("kl"), "--input", tmp_path / "two.npy", "--output", tmp_path / "o") == 1
    assert "2 channels, the checkpoint takes 1" in capsys.readouterr().err.splitlines()[0]
    assert use("reconstruct", runs("kl"), "--input", tmp_path / "two.npy", "--output", tmp_path / "o",
               "--data.select_channel", "0") == 0
    capsys.readouterr()
    assert use("decode", runs("vq"), "--input", tmp_path / "z", "--output", tmp_path / "d") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and "holds kl latents" in lines[0] and "is no latent" in lines[1]
    assert lines[2].endswith("2 of 2 failed")


def test_done_means_of_this_input_and_of_this_checkpoint(tmp_path, runs, capsys):
    """Another patient's file of that name, or another checkpoint's, is not taken for the result."""
    for n, patient in enumerate("ab"):
        ct_file(tmp_path / patient / "ct.nii.gz", seed=n)
    out = tmp_path / "out"

    def reconstruct(patient, *words, run="kl"):
        capsys.readouterr()
        path = tmp_path / patient / "ct.nii.gz"
        return use("reconstruct", runs(run), "--input", path, "--output", out, *words)

    def names():
        return sorted(path.name for path in out.glob("*.nii.gz"))
    assert reconstruct("a") == 0 and names() == ["ct.nii.gz"]
    first = (out / "ct.nii.gz").read_bytes()
    # The other patient's result stands beside it, once.
    assert reconstruct("b") == 0 and names() == ["ct-2.nii.gz", "ct.nii.gz"]
    assert reconstruct("b") == 0 and "skipped" in capsys.readouterr().out
    assert (out / "ct.nii.gz").read_bytes() == first != (out / "ct-2.nii.gz").read_bytes()
    assert reconstruct("a") == 0 and "skipped" in capsys.readouterr().out
    # Another checkpoint, an input that has changed, and a file that nobody knows.
    assert reconstruct("a", run="vq") == 0 and "of another checkpoint" in capsys.readouterr().out
    assert (out / "ct.nii.gz").read_bytes() != first and len(names()) == 2
    assert reconstruct("a") == 0 and (out / "ct.nii.gz").read_bytes() == first
    ct_file(tmp_path / "a" / "ct.nii.gz", seed=7)
    assert reconstruct("a") == 0 and "has changed" in capsys.readouterr().out
    (out / ".predict.jsonl").unlink()
    before = (out / "ct.nii.gz").read_bytes()
    assert reconstruct("b") == 1 and "--overwrite" in capsys.readouterr().err
    assert (out / "ct.nii.gz").read_bytes() == before
    assert reconstruct("b", "--overwrite") == 0
