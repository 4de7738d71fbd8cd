"""One piece of work for each of many files: which files, where their results go, and what goes wrong, told at the end.

A result is written whole or not at all, and what is there is skipped, so an interrupted folder goes on with the same
command. Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
from data import DataError
from tiles import is_out_of_memory
from training import latents
from training.console import clear_line, line_of, short_number

PROGRAM = "predict.py"                                           # whose files these are, in front of its lines on stderr


class Job(NamedTuple):
    item: data.Item
    output: Path


# ------------------------------------------------------------------------------------------------ which files

def list_inputs(paths: Sequence[str], labels: bool = False, split: str = "all", output: str | None = None) -> list[data.Item]:
    """Files, folders and datalists -> items, each once. Raises DataError when there are none.

    Of a folder, latents are left out, and so is an output folder inside of it: what a first run wrote is no input of the next.
    """
    found: dict[str, data.Item] = {}
    for path in paths:
        is_folder = os.path.isdir(path)
        own = Path(os.path.realpath(output)) if output and is_folder else None
        inside = own is not None and Path(os.path.realpath(path)) in own.parents
        for name, items in data.list_items(path, labels, print).items():
            if split not in ("all", name):
                continue
            for item in items:
                real = os.path.realpath(item.path)
                is_latent = is_folder and real.endswith(latents.ENDING)
                is_result = inside and own in Path(real).parents
                if not is_latent and not is_result:
                    found.setdefault(real, item)
    if not found:
        where = "" if split == "all" else f" in the list {split}"
        raise DataError(f"{', '.join(paths)}: no volumes found{where}; looked for {data.FORMATS}")
    return list(found.values())


def list_latents(paths: Sequence[str]) -> list[data.Item]:
    """Latent files, folders of them and datalists -> items."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            found += [data.Item(file) for file in sorted(Path(path).rglob("*" + latents.ENDING))]
        else:
            found += [item for items in data.list_items(path).values() for item in items]
    if not found:
        raise DataError(f"{', '.join(paths)}: no *{latents.ENDING} files; predict.py encode writes them")
    return found


def kind_of(path: Path) -> str:
    """The ending of a result: arrays and pictures keep theirs, what nibabel reads goes out as NIfTI."""
    kind = data._suffix(path)[0]
    if kind in (".npy", ".npz"):
        return kind
    return ".png" if kind in data.PICTURES else ".nii.gz"


def make_jobs(items: Sequence[data.Item], inputs: Sequence[str], output: str, ending: Callable[[Path], str]) -> list[Job]:
    """Each item with the file that is made of it: its stem, in the subfolder that it has in an input folder, numbered where
    two share one.

    ValueError when that would replace an input.
    """
    folder, taken, jobs = Path(os.path.expanduser(output)), set(), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be made a folder ({error.strerror})") from None
    roots = [Path(os.path.realpath(path)) for path in inputs if os.path.isdir(path)]
    sources = {os.path.realpath(file) for item in items for file in (item.path, item.label) if file}
    for item in items:
        stem, end, number = data._stem(item.path), ending(item.path), 2
        stem = stem.removesuffix("_latent") if item.path.name.endswith(latents.ENDING) else stem
        parent = Path(os.path.realpath(item.path)).parent
        within = next((parent.relative_to(root) for root in roots if parent.is_relative_to(root)), Path())
        name = within / (stem + end)
        while name in taken:
            name, number = within / f"{stem}-{number}{end}", number + 1
        taken.add(name)
        if os.path.realpath(folder / name) in sources:
            raise ValueError(f"--output {folder}: {name} there is one of the inputs and would be overwritten; choose another "
                             f"folder")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        jobs.append(Job(item, folder / name))
    return jobs


# ------------------------------------------------------------------------------------------------ the work, and what goes wrong

def run_jobs(jobs: Sequence[Job], work: Callable[[Job], str], overwrite: bool) -> bool:
    """work(job) -> what to say of it, for each job whose output is not there. Failures are told at the end.

    Returns whether all went well.
    """
    open_jobs = [job for job in jobs if overwrite or not job.output.exists()]
    if done := len(jobs) - len(open_jobs):
        example = next(job.output for job in jobs if job not in open_jobs)
        print(f"{done} of {len(jobs)} outputs are there, such as {example}: skipped (--overwrite makes them anew)", flush=True)
    failed = []
    for number, job in enumerate(open_jobs, 1):
        started = time.monotonic()
        with failures_in(failed, job.item.path):
            name = f"[{number}/{len(open_jobs)}] {data.show(job.item.path)}"
            if sys.stdout.isatty():
                print(f"{name} ...", end="", flush=True)
            text = work(job)
            clear_line()
            print(f"{name}: {text}, {time.monotonic() - started:.1f} s", flush=True)
    return tell_failures(failed, len(open_jobs))


@contextlib.contextmanager
def failures_in(failed: list[dict], path: Path) -> Iterator[None]:
    """What is wrong with one file, or too large of it, goes to `failed`, and the others go on."""
    try:
        yield
    except DataError as error:
        failed.append({"file": str(path), "error": line_of(error)})
    except (ValueError, OSError) as error:
        failed.append({"file": str(path), "error": f"{path}: {line_of(error)}"})
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        failed.append({"file": str(path), "error": f"{path}: out of memory; use a smaller --tile, --memory or --window, or "
                                                   f"--device cpu"})
    if failed and failed[-1]["file"] == str(path):
        clear_line()
        print(f"{data.show(path)}: failed, see the end", flush=True)


def tell_failures(failed: Sequence[dict], total: int) -> bool:
    """A line for each on stderr. Returns whether there are none."""
    for row in failed:
        print(f"{PROGRAM}: {data.show(row['error'])}", file=sys.stderr)
    if failed:
        print(f"{PROGRAM}: {len(failed)} of {total} failed", file=sys.stderr)
    return not failed


# ------------------------------------------------------------------------------------------------ what is said meanwhile

def show_progress(path: Path) -> Callable[..., None]:
    """A line on the terminal that says how far a long volume is; nothing in a pipe."""
    shown = time.monotonic()

    def tick(done: float, total: int, part: str = "windows") -> None:
        nonlocal shown
        if sys.stdout.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{data.show(path.name)}: {part} {100 * done / total:.0f} %\x1b[K", end="", flush=True)
    return tick


def speed(volumes: Sequence[np.ndarray], started: float) -> str:
    """Size and voxels a second since `started`."""
    voxels, seconds = sum(volume[0].size for volume in volumes), time.monotonic() - started
    many = f"{len(volumes)} x " if len(volumes) > 1 else ""
    return f"{many}{data._sizes(volumes[0].shape[1:])}, {short_number(voxels / max(seconds, 1e-9))} voxels/s"
