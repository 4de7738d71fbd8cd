"""checkpoints.py: damage is found, errors of the disk are told by name. Kills, fallbacks and locks of runs: test_train.py, soak.py."""
import errno
import io
import os
import random

import pytest
import torch

import checkpoints


def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path):
    version, path, rng, found = checkpoints.VERSIONS["vae3d.train"], tmp_path / "x.pt", random.Random(0), 0
    content = {"kind": "vae3d.train", "version": version, "model": {"a": torch.arange(40.0), "b": torch.ones(3)}}
    checkpoints.save(path, content)
    good = path.read_bytes()
    for _ in range(1500):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            read = checkpoints.load(path, "vae3d.train")
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert all(torch.equal(read["model"][k], v) for k, v in content["model"].items()) and read.keys() == content.keys()
    assert found > 300, found                                    # the rest: padding, dates
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="cut short"):
        checkpoints.load(path, "vae3d.train")


def test_the_disks_error_is_told_where_torch_fails_on_top_of_it(tmp_path, monkeypatch):
    (tmp_path / "x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device.*x.pt"):
        checkpoints.save(tmp_path / "x.pt", {"a": torch.zeros(2_000_000)})
    assert not list(tmp_path.iterdir())

    class Full(io.RawIOBase):                                    # closing it raises nothing, so torch's own error would be left
        room = 100

        def write(self, part):
            self.room -= len(part)
            if self.room < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return len(part)
    monkeypatch.setattr(checkpoints, "write_atomic", lambda path, write: write(Full()))
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(tmp_path / "x.pt", {"a": torch.zeros(1000)})


def test_a_link_a_copy_and_what_a_killed_run_left(tmp_path, monkeypatch):
    a, b, c = (tmp_path / name for name in ("last.pt", "last.prev.pt", "best.pt"))
    a.write_bytes(b"1")
    b.write_bytes(b"0")
    checkpoints.place(a, b)
    checkpoints.place(a, b)                                      # one file already
    checkpoints.copy(a, c)
    assert a.samefile(b) and not a.samefile(c) and c.read_bytes() == b"1"

    def without_links(*_):
        raise OSError(errno.EPERM, "Operation not permitted")
    monkeypatch.setattr(os, "link", without_links)
    c.write_bytes(b"2")
    checkpoints.place(c, b)
    assert b.read_bytes() == b"2" and not c.samefile(b) and a.read_bytes() == b"1"
    (tmp_path / "samples").mkdir()
    left = ["last.next.pt", "step_000004.pt.tmp", "log.jsonl.tmp", "ema_0.999.pt.tmp", "samples/.step_000002_scan.nii.gz.tmp"]
    for name in [*left, "mine.tmp", "step.pt"]:
        (tmp_path / name).touch()
    checkpoints.remove_temporaries(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == {
        "last.pt", "last.prev.pt", "best.pt", "mine.tmp", "step.pt"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    checkpoints.save(path, {"a": 1})

    def broken(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write_atomic(path, broken)
    assert checkpoints.read(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_equal_contents_are_equal_bytes(tmp_path):
    """Whatever objects they share: a resumed run has built its own."""
    name = "".join(["we", "ights"])
    for file, content in (("a.pt", {"weights": (1, 2), "x": ["weights"]}), ("b.pt", {name: [1, 2], "x": ["".join(["weight", "s"])]})):
        checkpoints.save(tmp_path / file, content)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
