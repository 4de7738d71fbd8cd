"""A few cases of every format of fuzz_data.py, and what it found, each by itself: hostile files end in one
line, exit code 1 or 2.
"""
import gzip
import os
import signal
import struct
import time
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml

import data
import fuzz_configs
import fuzz_data
import fuzz_volumes
import runs
import train
import training.config
from data import open_data, read_volume
from training import checkpoints
from volumes.config import DataConfig
from volumes.entries import open_array
from volumes.files import DataError
from volumes.find import list_items

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name, count", [
    ("nii", 120), ("nii.gz", 100), ("pair", 100), ("npy", 100), ("npz", 100), ("json", 60), ("yaml", 25),
    ("pt", 60), ("run", 40), ("sitk", 100)])
def test_mutated_files_end_as_they_should(name, count, tmp_path, monkeypatch):
    if name == "sitk":
        pytest.importorskip("SimpleITK", reason="SimpleITK is not installed")
    monkeypatch.chdir(tmp_path)
    results = [fuzz_data.run_case(name, 11, number, tmp_path) for number in range(count)]
    failed = [
        f"--format {name} --seed 11 --case {r.number}: {r.outcome}" for r in results
        if r.outcome.startswith("FAILED")]
    assert not failed, "\n".join(failed)
    assert {result.outcome for result in results} == {"accepted", "refused"}


def refused(work, *words: str) -> str:
    with pytest.raises(ValueError) as error:
        work()
    text = str(error.value)
    assert text.isprintable() and len(text) < 600 and all(word in text for word in words), text
    return text


def array(shape=(6, 7, 8), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 900, shape).astype(np.int16)


def image(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array(seed=seed), np.eye(4)), path)
    return path


# ---------------------------------------------------------------------------------------------------- volumes
def test_checksum_of_a_gzip_is_looked_at(tmp_path):
    """nibabel stops reading at the last voxel, in front of the checksum: a bit that flipped in the voxels
    went by unseen.
    """
    content = gzip.decompress(image(tmp_path / "a.nii.gz").read_bytes())
    # Not compressed: a flipped bit is a flipped voxel.
    stored = bytearray(gzip.compress(content, 0))
    stored[-40] ^= 4
    (tmp_path / "a.nii.gz").write_bytes(stored)
    refused(lambda: read_volume(tmp_path / "a.nii.gz"), "a.nii.gz", "CRC")
    # several members are one stream
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    assert np.array_equal(read_volume(tmp_path / "a.nii.gz").array[0].T, array())


@pytest.mark.parametrize(
    "where", ["behind the voxels", "an extension", "in front of the voxels", "an extension of the pair"])
def test_gzip_bombs_are_refused_before_they_fill_the_memory(where, tmp_path):
    content, size = bytearray(gzip.decompress(image(tmp_path / "a.nii.gz").read_bytes())), 348
    name = "a.nii.gz"
    if where.startswith("an extension"):
        content[size:] = b"\1\0\0\0" + struct.pack("<2i", 2**31 - 16, 6)
    if where == "an extension of the pair":
        nib.save(nib.Nifti1Pair(array(), np.eye(4)), tmp_path / "p.img")
        content[344:348], name = b"ni1\0", "p.img"
        (tmp_path / "p.hdr").unlink()
    if where == "in front of the voxels":
        content[108:112] = struct.pack("<f", 2.0**31)
    (tmp_path / name.replace(".img", ".hdr.gz")).write_bytes(fuzz_volumes.gzip_bomb(bytes(content), 400))
    if name == "p.img":                                          # nibabel wants both or none packed
        (tmp_path / "p.img.gz").write_bytes(gzip.compress((tmp_path / "p.img").read_bytes()))
        (tmp_path / "p.img").unlink()
        name = "p.img.gz"
    Path("/proc/self/clear_refs").write_text("5")
    before, start = fuzz_data.status("VmRSS"), time.monotonic()
    refused(lambda: read_volume(tmp_path / name, max_gib=1.0), name)
    assert fuzz_data.status("VmHWM") - before < 150 and time.monotonic() - start < 20


def test_archives_that_lie(tmp_path):
    good = fuzz_volumes.as_npy(array())
    path = tmp_path / "a.npz"

    def write(*members: tuple[str, bytes], packing: int = zipfile.ZIP_STORED) -> None:
        with zipfile.ZipFile(path, "w", packing) as archive:
            for name, content in members:
                archive.writestr(name, content)

    write(("vol.npy", good))
    path.write_bytes(path.read_bytes().replace(array()[2, 3].tobytes(), array()[2, 3][::-1].tobytes()))
    refused(lambda: read_volume(path), "a.npz", "CRC")
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    flipped = good[:-1] + bytes([good[-1] ^ 1])
    content = bytearray(
        fuzz_volumes.one_member("vol.npy", deflate.compress(flipped) + deflate.flush(), len(good)))
    # The checksum of the content before it changed.
    for place in (14, content.find(b"PK\1\2") + 16):
        content[place:place + 4] = struct.pack("<I", zlib.crc32(good))
    path.write_bytes(content)
    refused(lambda: read_volume(path), "a.npz", "CRC")
    with pytest.warns(UserWarning, match="Duplicate"):
        write(("vol.npy", good), ("vol.npy", fuzz_volumes.as_npy(array(seed=1))))
    refused(lambda: read_volume(path), "a.npz", "one name")
    write(("vol.npy", good), packing=zipfile.ZIP_LZMA)           # may ask for a dictionary of 4 GiB
    refused(lambda: read_volume(path), "a.npz", "savez_compressed")
    write(("vol.npy", good + b"more"))
    refused(lambda: read_volume(path), "a.npz", "goes on after its array")
    # a header of 4 GiB, which numpy would read before it refuses it
    start = b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1)
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = deflate.compress(start) + deflate.flush(zlib.Z_FULL_FLUSH) + fuzz_volumes.zeros(400)
    path.write_bytes(fuzz_volumes.one_member("vol.npy", body, 2**32 - 2))
    Path("/proc/self/clear_refs").write_text("5")
    before = fuzz_data.status("VmRSS")
    refused(lambda: read_volume(path), "a.npz", "header of 4294967295 bytes")
    assert fuzz_data.status("VmHWM") - before < 100


def test_half_of_a_pair_that_would_hang(tmp_path):
    nib.save(nib.Nifti1Pair(array(), np.eye(4)), tmp_path / "p.img")
    (tmp_path / "p.img").unlink()
    os.mkfifo(tmp_path / "p.img")
    refused(lambda: read_volume(tmp_path / "p.hdr"), "p.hdr", "not a regular file")


def test_paths_that_are_odd(tmp_path):
    """Spaces, other scripts, line ends, bytes that are no text; loops of links; folders, pipes and empty
    files named like volumes.
    """
    place = tmp_path / "ein Ordner, 名前"
    names = ("a b.nii.gz", "größe.nii.gz", "two\nlines.nii.gz", "\udcff.nii.gz", "名.nii.gz")
    for seed, name in enumerate(names):
        os.rename(image(place / "x.nii.gz", seed), place / name)
    (place / "loop").symlink_to(place)
    (place / "self.nii.gz").symlink_to("self.nii.gz")
    (place / "folder.nii.gz").mkdir()
    (place / "empty.nii.gz").write_bytes(b"")
    os.mkfifo(place / "pipe.nii.gz")
    if os.geteuid():
        image(place / "secret.nii.gz", 9).chmod(0)
    said: list[str] = []
    opened = open_data(
        DataConfig(path=str(place), cache_dir=str(tmp_path / "cache"), patch=(4, 4, 4)), 0, said.append)
    lines = [line for line in said if "data: refused" in line]
    assert len(opened.train + opened.val) == len(names) and all(line.isprintable() for line in said)
    assert len(lines) == 2 + bool(os.geteuid())
    assert "self.nii.gz" in "".join(lines) and "empty.nii.gz" in "".join(lines)
    for entry in opened.train + opened.val:
        assert np.isfinite(entry.read()).all() and entry.name.isprintable()
        assert not {"", ".", ".."} & set(entry.name.split("/"))


def test_datalists_that_lie(tmp_path):
    path = tmp_path / "d.json"
    image(tmp_path / "a.nii.gz")
    cases = (
        ('{"training": [], "training": ["a.nii.gz"]}', "1 keys of ['training'] stand there twice"),
        ('{"training": ["\\ud800.nii"]}', "training[0] is '\\ud800.nii'"),
        ('{"training": ["' + "x" * 5000 + '"]}', "training[0] is"),
        ('{"training": [{"image": "a.nii.gz", "class": [1]}]}', "has the class [1]"),
        ('{"training": [{"image": ' + "[" * 900 + "]" * 900 + "}]}", "training[0] is"))
    for text, word in cases:
        path.write_text(text)
        refused(lambda: list_items(path), "d.json", word)
    path.write_bytes(b"\xef\xbb\xbf" + b'{"training": ["a.nii.gz"]}')  # as Windows editors write it
    assert [item.path.name for item in list_items(path)["training"]] == ["a.nii.gz"]


# ------------------------------------------------------------------------ a cache that changes, a dead worker
@pytest.fixture
def cached(tmp_path):
    """Flags of a short run on two files, its cache folder, and what opens the data."""
    for seed in range(2):
        image(tmp_path / "in" / f"v{seed}.nii.gz", seed)
    flags = [
        "--vae.base_channels", "4", "--data", str(tmp_path / "in"), "--data.cache_dir",
        str(tmp_path / "cache"), "--patch", "4,4,4", "--batch", "1", "--train.val_crops", "1",
        "--train.latent_crops", "1", "--device", "cpu", "--log.sample_every", "0", "--steps", "400",
        "--train.save_every", "1", "--train.val_every", "400", "--out", str(tmp_path / "run")]
    yield flags, tmp_path / "cache"
    open_array.cache_clear()


def disturbed(monkeypatch, flags: list[str], deed) -> int:
    """Exit code of a run in which `deed(children)` happens after its third step."""
    step = train.train_and_log

    def after(run, number, batches):
        if number == 3:
            deed([int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()])
        step(run, number, batches)
    monkeypatch.setattr(train, "train_and_log", after)
    return train.main(flags)


@pytest.mark.parametrize(
    "damage, workers", [("cut", "0"), ("cut", "1"), ("another shape", "0"), ("vanished", "0")])
def test_cache_that_changes_under_a_run_ends_it_in_a_line(cached, damage, workers, monkeypatch, capsys):
    flags, cache = cached

    def deed(_) -> None:
        for file in cache.glob("*.npy"):
            if damage == "cut":
                os.truncate(file, 200)
            else:
                file.unlink()
                open_array.cache_clear()
            if damage == "another shape":
                np.save(file, np.zeros((1, 2, 2, 2), np.float32))
    assert disturbed(monkeypatch, [*flags, "--workers", workers], deed) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error, error
    assert "the cache changed under the run" in error and ".npy" in error, error
    assert checkpoints.load(cache.parent / "run/last.pt", "vae3d.train")["step"] >= 3
    open_array.cache_clear()
    opened = open_data(runs.load_config(flags).data, 0, lambda _: None)  # the next start rebuilds it
    assert all(
        np.isfinite(entry.read()).all() and entry.read().shape == entry.shape for entry in opened.train)


def test_nan_written_over_the_cache_stops_the_run_by_name(cached, monkeypatch, capsys):
    flags, cache = cached

    def deed(_) -> None:
        for file in cache.glob("*.npy"):
            np.load(file, mmap_mode="r+")[:] = np.nan
    assert disturbed(monkeypatch, flags, deed) == 1
    out, error = capsys.readouterr()
    assert error.count("\n") == 1 and "non-finite steps in a row" in error
    assert "no update; crops of" in out and ".nii.gz" in out


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_worker_that_dies_ends_the_run_in_a_line(cached, number, monkeypatch, capsys):
    """By which signal is only said where the notice of its death comes before the missed crop."""
    flags, cache = cached

    def deed(children: list[int]) -> None:
        workers = [
            pid for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
        os.kill(workers[-1], number)
    assert disturbed(monkeypatch, [*flags, "--workers", "1"], deed) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "DataLoader worker (pid" in error and "--resume" in error, error
    assert checkpoints.load(cache.parent / "run/last.pt", "vae3d.train")["step"] >= 3


# ------------------------------------------------------------------------------------ configs and checkpoints
@pytest.mark.parametrize("text, words", [
    ("null: 3", "unknown key None"), ("2001-01-01: {}", "unknown key 2001-01-01"),
    ("__class__: {}", "unknown key __class__"), ("data: {1: 2}", "unknown key data.1"),
    ("data: {ptch: 1}", "did you mean data.patch"),
    ("data: {path: a}\ndata: {path: b}", "'data' stands twice"),
    ("data: {zoom: 0x" + "f" * 5000 + "}", "data.zoom"),
    ("train: {steps: 0x" + "f" * 5000 + "}", "train.steps"), ("train: {steps: 2001-99-99}", "month"),
    ("train: {steps: !!int ''}", "c.yaml"), ("train: {steps: !!bool maybe}", "c.yaml"),
    ("train: {steps: !!timestamp x}", "c.yaml"),
    ("data: {path: 'a\\0'}".replace("'", '"'), "data.path must be free of NUL"),
    ("data: " + "[" * 1500, "c.yaml"), ("&a [*a]", "write it out"),
    ("x: " + "y" * 200_000, "200003 bytes"), ("- a", "got list"), ("\0", "c.yaml")])
def test_configs_that_are_none(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    refused(lambda: runs.load_config(["--config", str(tmp_path / "c.yaml")]), words)


@pytest.mark.parametrize("merge", [False, True])
def test_a_billion_laughs(merge, tmp_path):
    lines = ["a0: &a0 {k: v}" if merge else "a0: &a0 [lol]"]
    for i in range(1, 12):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{many}]}}" if merge else f"a{i}: &a{i} [{many}]")
    (tmp_path / "c.yaml").write_text("\n".join(lines) + "\ndata: {patch: *a11}\n")
    start = time.monotonic()
    refused(lambda: runs.load_config(["--config", str(tmp_path / "c.yaml")]), "c.yaml", "write it out")
    assert time.monotonic() - start < 10
    (tmp_path / "c.yaml").write_text("train: {steps: &n 7, val_every: *n}")  # one value is no bomb
    assert runs.load_config(["--config", str(tmp_path / "c.yaml")]).train.val_every == 7


def test_pipes_and_bombs_in_place_of_configs_and_checkpoints(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    ours = {"kind": "vae3d.train", "version": checkpoints.VERSIONS["vae3d.train"], "model": {}}
    torch.save({**ours, "config": {}, "x": fuzz_configs.Evil()}, "evil.pt")
    bomb = fuzz_volumes.one_member("archive/data.pkl", fuzz_volumes.zeros(400), 400 * 2**20)
    Path("bomb.pt").write_bytes(bomb)
    torch.save(ours, "bare.pt")
    cases = (
        (("--config", "pipe"), "not a regular file"), (("--resume", "pipe"), "not a regular file"),
        (("--config", "/dev/zero"), "not a regular"), (("--resume", "bomb.pt"), "compressed"),
        (("--resume", "bare.pt"), "holds no config"), (("--resume", "evil.pt"), "refused"),
        (("--data", "pipe"), "pipe: no usable"), (("--data", "/dev/zero"), "/dev/zero: no usable"),
        (("--init", "evil.pt"), "evil.pt: refused"), (("--init", "bomb.pt"), "compressed"),
        (("--init", "pipe"), "not a regular file"),
        (("--loss.perceptual_weight", "1", "--loss.perceptual_features", "evil.pt"), "evil.pt: refused"))
    for flags, word in cases:
        small = ["--data.synthetic_count", "2", "--data.synthetic_size", "8,8,8", "--device", "cpu"]
        if "--resume" in flags:
            small = []
        else:
            small += ["--out", "run"]
        assert train.main([*flags, *small]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and word in error, (flags, error)
    assert not Path("executed").exists() and not Path("run").exists()


def test_aliases_never_come_from_our_own_configs(tmp_path):
    (tmp_path / "c.yaml").write_text(
        training.config.to_yaml(runs.load_config(["--patch", "8,8,8", "--memory.tile", "8,8,8"])))
    read = yaml.load((tmp_path / "c.yaml").read_text(), training.config.ConfigLoader)
    assert read["data"]["patch"] == [8, 8, 8]
    with pytest.raises(DataError):
        data.read_volume(tmp_path / "c.yaml")
