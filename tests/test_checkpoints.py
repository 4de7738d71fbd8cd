"""training/checkpoints.py: damage is found, errors of the disk are told by name. Kills, fallbacks and locks
of whole runs: test_folder.py, test_resume.py, soak.py.
"""
import ast
import errno
import io
import math
import os
import random
import re
import zipfile
from typing import Any, TypedDict

import pytest
import torch

from test_imports import files
from training import checkpoints
from volumes.files import write_atomic


def test_every_load_is_weights_only():
    """No torch.load runs code from a file; one once did."""
    found = 0
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                options = {keyword.arg: keyword.value for keyword in node.keywords}
                safe = options.get("weights_only")
                assert isinstance(safe, ast.Constant) and safe.value is True, f"{path}:{node.lineno}"
                found += 1
    assert found


@pytest.mark.slow
def test_any_flipped_bit_is_found_or_changes_nothing(tmp_path):
    path, rng, found = tmp_path / "x.pt", random.Random(0), 0
    model = {"a": torch.arange(40.0), "b": torch.ones(3)}
    content = {"kind": "vae3d.train", "version": checkpoints.VERSIONS["vae3d.train"], "model": model}
    checkpoints.save(path, content)
    good = path.read_bytes()
    for _ in range(1500):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try:
            read = checkpoints.read(path)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
        else:
            assert all(torch.equal(read["model"][name], value) for name, value in model.items())
            assert read.keys() == content.keys()
    assert found > 300, found                                    # the rest: padding, dates
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(ValueError, match="cut short"):
        checkpoints.read(path)


def test_a_compressed_checkpoint_is_refused(tmp_path):
    """A gigabyte of zeros packs into a megabyte: what is read must be as large as the file says."""
    plain, packed = tmp_path / "plain.pt", tmp_path / "packed.pt"
    content = {"kind": "vae3d.train", "version": checkpoints.VERSIONS["vae3d.train"], "x": torch.zeros(999)}
    checkpoints.save(plain, content)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    assert torch.load(packed, weights_only=True)["x"].shape == (999,)   # torch would take it
    with pytest.raises(ValueError, match="packed.pt.*compressed"):
        checkpoints.read(packed)


class Inner(TypedDict):
    weights: dict[str, torch.Tensor]
    rate: float | None


@pytest.mark.parametrize("kind, right, wrong", [
    (int, [3, -2**70], [True, 3.0, "3", None]),
    (float, [3, 0.5, math.nan], [True, "x"]),
    (bool, [True], [1, None]),
    (str, ["x"], [b"x", 1]),
    (float | None, [None, 1], ["x", [1.0]]),
    (list[int], [[], [1, 2]], [(1, 2), [1.5], [[1]], {}]),
    (dict[str, int], [{}, {"a": 1}], [{1: 1}, {"a": "b"}, []]),
    (Any, [None, 3], []),
    (torch.Tensor, [torch.zeros(2), torch.tensor(1), torch.zeros(0)],
     [0, [0.0], torch.zeros(2).to_sparse(), torch.zeros(2, device="meta"),
      torch.zeros(2, dtype=torch.complex64)]),
    (Inner, [{"weights": {"a": torch.zeros(1)}, "rate": None}, {"weights": {}, "rate": 1, "more": 2}],
     [{"weights": {}}, {"weights": {"a": 1}, "rate": None}, {"weights": {}, "rate": "x"}, []]),
])
def test_types_of_what_a_file_holds(kind, right, wrong):
    assert [checkpoints.is_a(value, kind) for value in right] == [True for _ in right]
    assert [checkpoints.is_a(value, kind) for value in wrong] == [False for _ in wrong]


@pytest.mark.parametrize("ours, right, wrong", [
    (1, [2, 2.5], [True, None, "1"]),
    (True, [False], [1, None]),
    (None, [None], [0, False]),
    ("a", ["b"], [1]),
    ((1, 2.0), [[3, 4], (1, 2)], [[1], [1, 2, 3], [1, "x"], 1]),
    ({"a": 1}, [{"a": 2}], [{}, {"a": 1, "b": 2}, {"b": 1}, [1]]),
    (torch.zeros(2, 3), [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.half)],
     [torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.int64), 0.0,
      torch.zeros(2, 3, device="meta")]),
    (torch.zeros(2, dtype=torch.int64), [torch.ones(2, dtype=torch.int64)],
     [torch.ones(2, dtype=torch.int8), torch.ones(2)]),
])
def test_structure_like_ours(ours, right, wrong):
    assert [checkpoints.is_like(value, ours) for value in right] == [True for _ in right]
    assert [checkpoints.is_like(value, ours) for value in wrong] == [False for _ in wrong]


def test_the_disks_error_is_told_where_torch_fails_on_top_of_it(tmp_path):
    (tmp_path / "x.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device.*x.pt"):
        checkpoints.save(tmp_path / "x.pt", {"a": torch.zeros(2_000_000)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), RuntimeError("DataLoader worker (pid 3) is killed")])
def test_the_first_error_is_told_where_torch_fails_to_close_its_archive(error, tmp_path, monkeypatch):
    """As on a disk that raises nothing at closing; torch raises the death of a DataLoader worker wherever the
    process is at that moment.
    """
    class Full(io.RawIOBase):
        room = 100

        def write(self, part):
            self.room -= len(part)
            if self.room < 0:
                raise error
            return len(part)
    monkeypatch.setattr(checkpoints, "write_atomic", lambda path, write: write(Full()))
    with pytest.raises(type(error), match=re.escape(str(error))):
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
    left = ["last.next.pt", "step_000004.pt.tmp", "log.jsonl.tmp", "ema_0.999.pt.tmp",
            "samples/.step_000002_scan.nii.gz.tmp"]
    for name in [*left, "mine.tmp", "step.pt"]:
        (tmp_path / name).touch()
    checkpoints.remove_temporaries(tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"last.pt", "last.prev.pt", "best.pt", "mine.tmp", "step.pt"}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.pt"
    checkpoints.save(path, {"a": 1})

    def broken(file):
        file.write(b"half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, broken)
    assert checkpoints.read(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_equal_contents_are_equal_bytes(tmp_path):
    """Whatever objects they share: a resumed run has built its own."""
    name, again = "".join(["we", "ights"]), "".join(["weight", "s"])
    checkpoints.save(tmp_path / "a.pt", {"weights": (1, 2), "x": ["weights"]})
    checkpoints.save(tmp_path / "b.pt", {name: [1, 2], "x": [again]})
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()
