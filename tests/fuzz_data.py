"""Hostile files through data.py's readers, train.py's configuration and its checkpoints.

    python tests/fuzz_data.py                                  # 5,000 mutated files a format, some minutes
    python tests/fuzz_data.py --format nii.gz npz --count 300 --seed 7
    python tests/fuzz_data.py --format npz --seed 7 --case 41  # one case again, here; its files are kept

A case is a function of (seed, format, number). It must end as a volume (finite, and what an independent
reading of the file finds) or a config, or in one line that names the file: no other exception, no warning, no
second line, nothing on standard error, within SECONDS and MEMORY. Cases run in child processes, hundreds in
each, so that a crash or a hang costs one child and is known by its number. test_fuzz.py runs a few of each.
Exit code 1 when a case failed.
"""
import argparse
import contextlib
import functools
import gzip
import io
import json
import math
import os
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import data  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
import training.config  # noqa: E402
import training.console  # noqa: E402
from data import open_data  # noqa: E402
from fuzz_configs import make_json, make_pt, make_run, make_yaml  # noqa: E402
from fuzz_sitk import make_sitk  # noqa: E402
from fuzz_volumes import make_nii, make_nii_gz, make_npy, make_npz, make_pair  # noqa: E402
from training import checkpoints  # noqa: E402
from volumes import format_sitk  # noqa: E402
from volumes.config import DataConfig  # noqa: E402
from volumes.files import DataError, show, split_ending  # noqa: E402
from volumes.format_arrays import DENSE_KEYS  # noqa: E402
from volumes.volume import spacing_of  # noqa: E402

MAX_GIB = 1 / 32      # data.max_gib of every case
MEMORY = 200          # MiB that a case may take on top: six times what max_gib lets a volume have as float32
SECONDS = 5.0         # of the processor that a case may take; most take milliseconds
HANG = 120.0          # seconds without an answer after which a child is ended, its start included:
                      # a busy machine is no hang
BATCH = 500           # cases of one child
NAMES = (
    "a", "b c", "größe", "名前", "it's", "tab\there", "two\nlines", "a.b", "-x", "x" * 100, "%s{0}$HOME",
    "\udcff")


class Failed(AssertionError):
    """What a case did that it must not."""


# --------------------------------------------------------------------------------------------------- verdicts
def check_line(error: BaseException | str, *names: str, limit: int = 1500) -> None:
    text = str(error)
    if not text.isprintable() or not text.strip() or len(text) > limit:
        raise Failed(f"not one short printable line: {text[:2000]!r}")
    if names and not any(name in text for name in names):
        raise Failed(f"does not name {names[0]!r}: {text!r}")
    if "MemoryError" in text and "(MemoryError: )" not in text:
        raise Failed(f"ran out of memory: {text!r}")


def judge_volume(path: Path, rng: random.Random) -> str:
    shown = tuple(show(other) for other in (path, *path.parent.glob("*")))
    try:
        volume = data.read_volume(path, max_gib=MAX_GIB)
    except DataError as error:
        check_line(error, *shown)
        outcome = "refused"
    else:
        outcome = "accepted"
        if (
            not np.isfinite(volume.array).all()
            or volume.array.dtype != np.float32
            or volume.array.ndim != 4
            or not volume.array.size
        ):
            raise Failed(
                f"accepted {volume.array.dtype} {volume.array.shape}, finite: "
                f"{np.isfinite(volume.array).all()}"
            )
        sizes = all(0 < mm < math.inf for mm in volume.spacing)
        if not (sizes and np.isfinite(volume.affine).all() and np.linalg.det(volume.affine[:3, :3])):
            raise Failed(f"accepted spacing {volume.spacing}, affine {volume.affine.tolist()}")
        if np.abs(np.array(spacing_of(volume.affine)) / volume.spacing - 1).max() > 1e-6:
            raise Failed(f"spacing {volume.spacing} is not that of the affine {volume.affine.tolist()}")
        expected = reference(path)
        if expected is not None:
            found = np.sort(volume.array, None)
            expected = np.sort(expected.astype(np.float32), None)
            if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5):
                raise Failed(
                    f"accepted values {found[:3]} .. {found[-3:]} ({len(found)}), in the file are "
                    f"{expected[:3]} .. {expected[-3:]} ({len(expected)})")
    out, err = io.StringIO(), io.StringIO()
    config = functools.partial(DataConfig, max_gib=MAX_GIB)
    with (
        unittest.mock.patch.object(data, "DataConfig", config),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        code = data.main(["--", str(path)])
    lines = out.getvalue().splitlines()
    if not os.path.isfile(path) and code == 2 and not lines:     # the half of a pair that is not there
        check_line(err.getvalue().removesuffix("\n"), *shown)
        return outcome
    if (
        code not in (0, 1)
        or err.getvalue()
        or len(lines) != 3
        or not all(line.isprintable() for line in lines)
    ):
        raise Failed(f"data.py ended with {code}: {lines} {err.getvalue()!r}")
    if code == 0 and (
        outcome == "refused" or any(word in lines[1].split(show(path))[-1].split() for word in ("nan", "inf"))
    ):
        raise Failed(f"data.py took it: {lines[1]!r}")
    return outcome


def reference(path: Path) -> np.ndarray | None:
    """The voxels by another way of reading; None where there is none."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if split_ending(path)[0] not in (".nii", ".hdr", ".img", ".npy", ".npz"):
            return None                                          # what SimpleITK reads
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:               # np.load wants the file to begin with it
                names = {member.removesuffix(".npy"): member for member in archive.namelist()}
                keys = [key for key in DENSE_KEYS if key in names] or list(names)[:len(names) == 1]
                return (
                    np.lib.format.read_array(archive.open(names[keys[0]]), allow_pickle=False) if keys
                    else None)
        stem = path.name.lower().removesuffix(".gz")
        other = {".hdr": ".img", ".img": ".hdr"}.get(stem[-4:])
        halves = [
            file for file in path.parent.iterdir()
            if other and file.name.lower().startswith(stem[:-4] + other)]
        second = halves[0] if halves else path
        header_file, voxel_file = (second, path) if stem.endswith(".img") else (path, second)
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(header_file, "rb") as stream:
            return nifti_voxels(stream.read(544), lambda: opener(voxel_file, "rb"), header_file == voxel_file)


NIFTI_TYPES = {
    2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def nifti_voxels(head: bytes, voxel_file: Callable, in_one: bool) -> np.ndarray | None:
    """NIfTI-1 and NIfTI-2 by the standard's table of offsets. in_one: one file, whatever its magic says."""
    for order in "<>":
        if struct.unpack(order + "i", head[:4])[0] == 540:
            dims, kind = struct.unpack(order + "8q", head[16:80]), struct.unpack(order + "h", head[12:14])[0]
            offset, slope, inter = (
                struct.unpack(order + "q", head[168:176])[0], *struct.unpack(order + "2d", head[176:192]))
            break
    else:
        if head[344:348] not in (b"n+1\0", b"ni1\0"):
            return None                                          # Analyze and others
        order = "<" if 1 <= struct.unpack("<h", head[40:42])[0] <= 7 else ">"
        dims, kind = struct.unpack(order + "8h", head[40:56]), struct.unpack(order + "h", head[70:72])[0]
        offset, slope, inter = struct.unpack(order + "3f", head[108:120])
    if kind not in NIFTI_TYPES or not 1 <= dims[0] <= 7:
        return None
    # In one file voxels cannot begin inside of the header: what says so is read from its end on, with a line.
    if in_one and head[344:347] == b"n+1":
        offset = max(offset, 352)
    if in_one and head[4:7] == b"n+2":
        offset = max(offset, 544)
    count, dtype = math.prod(dims[1:1 + dims[0]]), np.dtype(order + NIFTI_TYPES[kind])
    with voxel_file() as stream:
        stream.seek(int(offset))
        array = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return array if slope == 0 or not math.isfinite(slope) else array * np.float64(slope) + inter


def judge_json(path: Path, rng: random.Random) -> str:
    said: list[str] = []
    cfg = DataConfig(
        path=str(path), cache_dir=str(path.parent.parent / "cache"), max_gib=MAX_GIB, patch=(4, 4, 4),
        labels=rng.random() < 0.4, strict=rng.random() < 0.1, foreground=rng.choice((0.0, 0.5)))
    shown = (
        show(path), *(show(other) for other in (path.parent.parent / "volumes").glob("*")), show(path.parent),
        os.path.expanduser("~"), "/dev/")
    try:
        opened = open_data(cfg, 0, said.append)
    except DataError as error:
        check_line(error, *shown, limit=6000)                    # a path in the list may be long
        outcome = "refused"
    else:
        outcome = "accepted"
        for image, *_ in (data.Crops(opened, 0)[0], data.val_crops(opened, 0, 1)[0]):
            if image.shape[1:] != (4, 4, 4) or not torch.isfinite(image).all():
                raise Failed(f"crop {tuple(image.shape)}, finite: {bool(torch.isfinite(image).all())}")
    for line in said:
        check_line(line, limit=6000)
    return outcome


def judge_yaml(path: Path, rng: random.Random) -> str:
    try:
        cfg = runs.load_config(["--config", str(path)])
    except ValueError as error:
        check_line(training.console.line_of(error))                        # as main prints it
        return "refused"
    again = path.with_name("again.yaml")
    again.write_text(training.config.to_yaml(cfg), encoding="utf-8")
    if repr(runs.load_config(["--config", str(again)])) != repr(cfg):
        raise Failed("the resolved config is another one when it is read again")
    return "accepted"


def judge_pt(path: Path, rng: random.Random) -> str:
    try:
        content = checkpoints.load(path, "vae3d.train", "vae3d.weights")
    except ValueError as error:
        check_line(training.console.line_of(error), training.console.line_of(path))
        outcome = "refused"
    else:
        outcome = "accepted"
        if content.get("kind") not in checkpoints.VERSIONS:
            raise Failed(f"accepted kind {content.get('kind')!r}")
    if Path("executed").exists():
        raise Failed("it ran code")
    return outcome


def judge_run(path: Path, rng: random.Random) -> str:
    """train.py goes on from it by a step, or says in a line why not; or that damaged weights made the loss
    something that is not finite, which is the last line of a run and exit code 1.
    """
    errors, said = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(said):
        code = train.main(["--resume", str(path), "--steps", "3"])
    is_told = code == 1 and "not finite at the end" in (said.getvalue().splitlines() or [""])[-1]
    if (code == 0 or is_told) and not errors.getvalue():
        outcome = "accepted"
    elif code in (1, 2) and errors.getvalue().count("\n") == 1:
        check_line(errors.getvalue().removesuffix("\n"))
        outcome = "refused"
    else:
        raise Failed(f"code {code}, stderr {errors.getvalue()[:2000]!r}")
    return outcome


class Format(NamedTuple):
    make: Callable[[random.Random, Path, str], Path]
    judge: Callable[[Path, random.Random], str]


FORMATS = {
    "nii": Format(make_nii, judge_volume), "nii.gz": Format(make_nii_gz, judge_volume),
    "pair": Format(make_pair, judge_volume), "npy": Format(make_npy, judge_volume),
    "npz": Format(make_npz, judge_volume), "json": Format(make_json, judge_json),
    "yaml": Format(make_yaml, judge_yaml), "pt": Format(make_pt, judge_pt),
    "run": Format(make_run, judge_run), "sitk": Format(make_sitk, judge_volume)}


class Result(NamedTuple):
    number: int
    outcome: str          # accepted | refused | the failure
    seconds: float
    mib: float            # that the case took on top of what the process had


def status(field: str) -> float:
    """MiB of this process, from /proc (Linux)."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(field)) / 1024


def run_case(name: str, seed: int, number: int, folder: Path) -> Result:
    """Make and judge one case below `folder`, which keeps its files when it fails."""
    rng = random.Random(f"{seed} {name} {number}")
    place = folder / "case"
    place.mkdir(parents=True, exist_ok=True)
    linux = os.access("/proc/self/clear_refs", os.W_OK)
    try:
        path = FORMATS[name].make(rng, place, rng.choice(NAMES))
    except Exception:
        return Result(number, f"FAILED to make the file: {traceback.format_exc()}", 0.0, 0.0)
    if linux:
        Path("/proc/self/clear_refs").write_text("5")            # the peak begins anew
    before, start = status("VmRSS") if linux else 0.0, time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = FORMATS[name].judge(path, rng)
        if caught:
            raise Failed(f"warned: {caught[0].message}")
    except Failed as error:
        outcome = f"FAILED {error}"
    except Exception:
        outcome = f"FAILED {traceback.format_exc()}"
    seconds, mib = time.process_time() - start, status("VmHWM") - before if linux else 0.0
    if not outcome.startswith("FAILED") and seconds > SECONDS:
        outcome = f"FAILED took {seconds:.1f} s"
    if not outcome.startswith("FAILED") and mib > MEMORY:
        outcome = f"FAILED took {mib:.0f} MiB"
    if not outcome.startswith("FAILED"):
        shutil.rmtree(place)
    return Result(number, outcome, seconds, mib)


# -------------------------------------------------------------------------------------------------- processes
def child(name: str, seed: int, numbers: range) -> None:
    """Cases of one process, a line of JSON each. What goes to standard error counts as a failure."""
    # A bomb that goes off ends here, not in the machine.
    limit = int(status("VmSize") * 2**20) + 2**32
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as sink:
        os.chdir(folder)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        for number in numbers:
            result, noise = run_case(name, seed, number, Path(folder)), os.fstat(2).st_size
            if noise:
                result = result._replace(outcome=f"FAILED printed {os.pread(2, 2000, 0)!r}")
                os.ftruncate(2, 0)
            print(json.dumps(result), file=out, flush=True)


def campaign(name: str, seed: int, count: int) -> tuple[list[Result], int]:
    """All cases of a format in as many children as it takes, and their number. A child that ends or hangs
    costs its case alone.
    """
    results: list[Result] = []
    children = 0
    while len(results) < count:
        numbers = range(len(results), min(count, len(results) + BATCH))
        command = [
            sys.executable, __file__, "--format", name, "--seed", str(seed), "--child",
            f"{numbers.start}:{numbers.stop}"]
        process, children = (
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), children + 1)
        buffer, why = b"", ""
        while True:
            ready = select.select([process.stdout], [], [], HANG)[0]
            part = os.read(process.stdout.fileno(), 2**16) if ready else b""
            if not part:
                why = "ended" if ready else f"gave no answer for {HANG:g} s and"
                break
            *lines, buffer = (buffer + part).split(b"\n")
            results += [Result(*json.loads(line)) for line in lines]
        if not ready:
            process.kill()
        stderr = process.communicate()[1].decode(errors="replace")
        if len(results) < numbers.stop:
            results.append(
                Result(
                    len(results), f"FAILED the process {why} with {process.returncode}: {stderr[-500:]}", 0.0,
                    0.0))
        for result in results[numbers.start:]:
            if result.outcome.startswith("FAILED"):
                print(f"{name} --seed {seed} --case {result.number}: {result.outcome.strip()}", flush=True)
    return results, children


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--format", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME",
        help=" | ".join(FORMATS) + " [all]")
    parser.add_argument("--count", type=int, default=5000, help="cases of each format [5000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, here, and keep its files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.format[0], options.seed, range(*map(int, options.child.split(":"))))
        return 0
    if options.case is not None:
        folder = Path(tempfile.mkdtemp())
        with unittest.mock.patch.object(Path, "unlink"), contextlib.chdir(folder):
            result = run_case(options.format[0], options.seed, options.case, folder)
        print(f"{result.outcome}\n{result.seconds:.2f} s, {result.mib:.0f} MiB; files in {folder}")
        return int(result.outcome.startswith("FAILED"))
    failed = 0
    print("format    cases accepted  refused failed processes  seconds  slowest most MiB")
    for name in options.format:
        if name == "sitk" and not format_sitk.is_installed():
            print(f"{name:8} left out: SimpleITK is not installed")
            continue
        start = time.monotonic()
        results, children = campaign(name, options.seed, options.count)
        counts = Counter(result.outcome.split()[0] for result in results)
        failed += counts["FAILED"]
        print(
            f"{name:8} {len(results):6} {counts['accepted']:8} {counts['refused']:8} {counts['FAILED']:6} "
            f"{children:9} {time.monotonic() - start:8.0f} {max(r.seconds for r in results):8.2f} "
            f"{max(r.mib for r in results):8.0f}",
            flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
