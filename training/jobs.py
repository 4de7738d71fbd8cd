"""One piece of work for each of many files: which files, where the results go, and what went wrong.

A result is written whole or not at all, and what this checkpoint made of this input already is skipped
(training/record.py), so an interrupted folder goes on with the same command. A file that fails does not stop
the others: failures are told at the end. Version 0.4 (2026-11).
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

from tiles import is_out_of_memory
from training import latents, record
from training.console import clear_line, line_of, short_number
from training.record import Record
from volumes import formats
from volumes.files import DataError, name_below, show, sizes
from volumes.find import Item, list_items

PROGRAM = "predict.py"                                           # in front of its lines on stderr


class Job(NamedTuple):
    item: Item                                              # the source
    output: Path
    name: str = ""                                          # of the output, in its folder
    record: Record | None = None                            # of that folder

    @property
    def is_done(self) -> bool:
        """Whether the output is there, of this input and this checkpoint."""
        if not self.output.exists():
            return False
        return self.record is None or self.record.is_done(self.name, self.item)

    @property
    def is_unknown(self) -> bool:
        """Whether a file is there of which nobody knows what made it."""
        return self.record is not None and self.output.exists() and self.name not in self.record.rows


# -------------------------------------------------------------------------------- which files

def list_inputs(paths: Sequence[str], labels: bool = False, split: str = "all",
                output: str | None = None) -> list[Item]:
    """Files, folders and datalists -> items, each once. Raises DataError when there are none.

    labels: items with their labels. split: a list of a datalist, or all. Of a folder, the output
    folder is left out where it lies inside: what a first run wrote is no input of the next.
    """
    found: dict[str, Item] = {}
    results = None if output is None else Path(os.path.realpath(output))
    for path in paths:
        is_folder = os.path.isdir(path)
        has_results = is_folder and results is not None and Path(os.path.realpath(path)) in results.parents
        for name, items in list_items(path, labels, print).items():
            if split not in ("all", name):
                continue
            for item in items:
                real = os.path.realpath(item.path)
                is_result = has_results and results in Path(real).parents
                if not is_result:
                    found.setdefault(real, item)
    if not found:
        where = "" if split == "all" else f" in the list {split}"
        raise DataError(f"{', '.join(paths)}: no volumes found{where}; looked for {formats.known_endings()}")
    return list(found.values())


def list_latents(paths: Sequence[str]) -> list[Item]:
    """Latent files, folders of them and datalists -> items. Raises DataError when there are none."""
    found = []
    for path in paths:
        if os.path.isdir(path):
            files = sorted(Path(path).rglob(f"*{latents.ENDING}"))
            found += [Item(file, name=name_below(Path(path), file)) for file in files]
        else:
            for items in list_items(path).values():
                found += items
    if not found:
        raise DataError(f"{', '.join(paths)}: no *{latents.ENDING} files; predict.py encode writes them")
    return found


def make_jobs(items: Sequence[Item], output: str, ending: Callable[[Path], str],
              made_by: str = "") -> list[Job]:
    """Each item with the file that is made of it, in the folder `output`, which is made with its subfolders.

    A result has its source's name, with the folders that are part of it, and a number where two would share
    one, or where the file of that name is of another input. ending: of the result, by the path of the source.
    made_by: text that differs where results would. Raises ValueError when a result would replace an input.
    """
    folder = Path(os.path.expanduser(output))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: cannot be made a folder ({error.strerror})") from None
    known = Record(folder, made_by)
    sources = {os.path.realpath(file) for item in items for file in (item.path, item.label) if file}
    taken, jobs = set(), []
    for item in items:
        # First the name: folders, stem, ending, and a number where it is taken.
        stem, end = item.known_as, ending(item.path)
        if item.path.name.endswith(latents.ENDING):
            stem = stem.removesuffix("_latent")
        name, number = f"{stem}{end}", 2
        while name in taken or known.is_of_another_input(name, item):
            name, number = f"{stem}-{number}{end}", number + 1
        taken.add(name)

        # Then its place.
        path = folder / name
        if os.path.realpath(path) in sources:
            raise ValueError(f"--output {folder}: {name} there is one of the inputs and would be "
                             f"overwritten; choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        jobs.append(Job(item, path, name, known))
    return jobs


# -------------------------------------------------------------------------------- the work

def run_jobs(jobs: Sequence[Job], work: Callable[[Job], str], overwrite: bool) -> bool:
    """work(job) -> what to say, for each job that is not done. Returns whether all went well."""
    # First what is there already, and of what.
    done, todo, failed = [], [], []
    for job in jobs:
        (done if not overwrite and job.is_done else todo).append(job)
    if done:
        what = f"{len(done)} of {len(jobs)} outputs are there, such as {done[0].output}"
        print(f"{what}: skipped (--overwrite makes them anew)", flush=True)
    if not overwrite:
        stale = [job.output for job in todo if job.output.exists() and not job.is_unknown]
        if stale:
            print(f"{len(stale)} of {len(jobs)} outputs are there, such as {stale[0]}, but of another "
                  f"checkpoint, other flags or an input that has changed: made anew", flush=True)

    # Then the work.
    for number, job in enumerate(todo, 1):
        started = time.monotonic()
        with failures_in(failed, job.item.path):
            name = f"[{number}/{len(todo)}] {show(job.item.path)}"
            if sys.stdout.isatty():
                print(f"{name} ...", end="", flush=True)
            if job.is_unknown and not overwrite:
                raise DataError(f"{job.output}: is there, and {record.NAME} beside it does not say what made "
                                f"it; --overwrite replaces it, or choose another --output")
            if job.record is not None:
                job.record.digest(job.item)                      # of the input as it is read now
            text = work(job)
            if job.record is not None and job.output.exists():
                job.record.write(job.name, job.item)
            clear_line()
            print(f"{name}: {text}, {time.monotonic() - started:.1f} s", flush=True)
    return tell_failures(failed, len(todo))


@contextlib.contextmanager
def failures_in(failed: list[dict], path: Path) -> Iterator[None]:
    """What is wrong with one file, or too large of it, goes to `failed`, and the others go on."""
    try:
        yield
        return
    except DataError as error:                                   # names the file itself
        text = line_of(error)
    except (ValueError, OSError) as error:
        text = f"{path}: {line_of(error)}"
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        text = f"{path}: out of memory; use a smaller --tile, --memory or --window, or --device cpu"
    failed.append({"file": str(path), "error": text})
    clear_line()
    print(f"{show(path)}: failed, see the end", flush=True)


def tell_failures(failed: Sequence[dict], total: int) -> bool:
    """A line for each on stderr. Returns whether there are none."""
    for row in failed:
        print(f"{PROGRAM}: {show(row['error'])}", file=sys.stderr)
    if failed:
        print(f"{PROGRAM}: {len(failed)} of {total} failed", file=sys.stderr)
    return not failed


# -------------------------------------------------------------------------------- what is said meanwhile

def show_progress(path: Path) -> Callable[..., None]:
    """A function that is told (done, of how many, what) and says on the terminal how far a long volume is."""
    shown = time.monotonic()

    def tick(done: float, total: int, part: str = "windows") -> None:
        nonlocal shown
        if sys.stdout.isatty() and time.monotonic() - shown > 0.5:
            shown = time.monotonic()
            print(f"\r{show(path.name)}: {part} {100 * done / total:.0f} %\x1b[K", end="", flush=True)
    return tick


def speed(volumes: Sequence[np.ndarray], started: float) -> str:
    """How many of which size, and voxels a second since `started`. volumes (C, D, H, W)."""
    seconds = max(time.monotonic() - started, 1e-9)
    voxels = sum(volume[0].size for volume in volumes)
    many = f"{len(volumes)} x " if len(volumes) > 1 else ""
    return f"{many}{sizes(volumes[0].shape[1:])}, {short_number(voxels / seconds)} voxels/s"
