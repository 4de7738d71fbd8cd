"""report.html of a run: curves, pictures, figures, command, data and config, from the files of its folder.

Nothing of it is kept in memory, so that a resumed run goes on with the same page, and `predict.py report`
makes it anew, of several runs with one set of curves. Version 0.1 (2026-11).
"""
from __future__ import annotations

import json
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

import pictures
from training import ranks, report, views
from training.console import line_of
from training.evaluation import cell, heading
from training.run import Run
from volumes.files import DataError, sizes, write_atomic

NAME, COMMANDS = "report.html", "commands.jsonl"
STRIP = 8                                     # pictures of the same slice over the training
# Of a row, what is no loss term and no figure.
OTHER = ("step", "epoch", "split", "lr", "grad_norm", "seconds", "voxels_per_second", "peak_gib", "skipped",
         "files", "gpu_percent", "gpu_reserved_gib")
FIRST = ("psnr", "ssim", "l1", "dice", "iou", "explained")     # figures, in this order, before the terms
MOST_CLASSES = 8                              # whose Dice is drawn, and stands in the table
SPEEDS = ("lr", "peak_gib", "voxels_per_second")
LINEAR = ("psnr", "ssim", "dice", "iou", "explained", "sharpness", "codebook_usage", "perplexity")


# -------------------------------------------------------------------------------- while a run goes on

def note_command(run: Run) -> None:
    """A row of commands.jsonl: what started this process, on what. First rank."""
    if not ranks.first():
        return
    dataset = run.dataset
    source = run.cfg.data.path or f"synthetic {run.cfg.data.synthetic}"
    row = {
        "step": run.state.step,
        "command": shlex.join(["python", *sys.argv]),
        "data": f"{source}; training volumes: {len(dataset.train)}, held out: {len(dataset.val)}, channels: "
                f"{dataset.channels}, crops of {sizes(dataset.patch)}",
        "device": f"{run.device}, processes: {ranks.world()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, numpy {np.__version__}",
    }
    with open(run.out / COMMANDS, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_page(run: Run) -> None:
    """report.html as of now, by the first rank. Whatever goes wrong is one line and ends no run."""
    if not ranks.first():
        return
    try:
        write_page([run.out], run.out / NAME)
    except Exception as error:                                   # told, whatever it is
        run.log.say(f"{run.out / NAME}: not written ({line_of(error)}); the run goes on")


# -------------------------------------------------------------------------------- the page

def write_page(folders: Sequence[Path], path: Path) -> None:
    """The page of one run or of several, written whole. Raises DataError where a folder is no run."""
    content = run_page(folders).encode()
    write_atomic(path, lambda file: file.write(content))


def run_page(folders: Sequence[Path]) -> str:
    """The page's HTML."""
    # First the rows of each run, under the part of its path that tells it from the others.
    logs = {name: read_rows(folder / "log.jsonl") for name, folder in zip(short_names(folders), folders)}
    for folder, rows in zip(folders, logs.values()):
        if not rows:
            raise DataError(f"{folder}: no rows in its log.jsonl; name run folders of train.py")
    body = ["<h2>Curves</h2>", curves_of(logs, memory_words(folders))]

    # Then pictures, the last validation, and what each run was told, run by run.
    for (name, rows), folder in zip(logs.items(), folders):
        title = f": {report.text(name)}" if len(folders) > 1 else ""
        body += pictures_of(folder, title)
        found = last_validation(rows)
        if found:
            names = figure_names([found])
            classes = classes_of(names)
            # Many classes would make a table wider than any page.
            if len(classes) > MOST_CLASSES:
                names = [name for name in names if name not in classes]
            else:
                classes = []
            table = report.table(["", *map(heading, names)], [[f"step {found['step']}",
                                                               *(cell(found, key) for key in names)]])
            body.append(f"<h2>Last validation{title}</h2>{table}")
            words = [f'<span class="key">{heading(key)}: {cell(found, key)}</span>' for key in classes]
            body.append(f"<p>{' &ensp; '.join(words)}</p>" if words else "")
        body.append(settings_of(folder, title))

    first = next(iter(logs.values()))
    headline = f"Run {report.text(folders[0])}"
    if len(folders) > 1:
        headline = f"{len(folders)} runs side by side"
    notes = [f"<p>Written {time.strftime('%Y-%m-%d %H:%M')}; a page that needs nothing beside it.</p>"]
    cards = cards_of(first, memory_words(folders)) if len(folders) == 1 else []
    return report.page(report.text(folders[0]), headline, notes, cards, "\n".join(body))


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path where that tells them apart, else all of it."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def read_rows(path: Path) -> list[dict]:
    """Rows of a file of JSON lines; one that was cut is left out, and a file that is not there has none."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                rows.append(row)
    return rows


def last_validation(rows: Sequence[dict]) -> dict | None:
    return next((row for row in reversed(rows) if row.get("split") == "val"), None)


def figure_names(rows: Iterable[dict]) -> list[str]:
    """Keys of figures and loss terms, the figures first. The name of a stage is none."""
    found = {key: None for row in rows for key, value in row.items()
             if key not in OTHER and not isinstance(value, str)}
    return [key for key in FIRST if key in found] + [key for key in found if key not in FIRST]


def memory_words(folders: Sequence[Path]) -> str:
    """What the figure of memory is: on a CPU it is that of the whole process."""
    devices = [row.get("device", "") for folder in folders for row in read_rows(folder / COMMANDS)]
    on_cpu = bool(devices) and all(str(device).startswith("cpu") for device in devices)
    return "peak memory of the process" if on_cpu else "peak memory"


def cards_of(rows: Sequence[dict], memory: str) -> list[tuple[str, str]]:
    """How far the run is, its best figure, its memory, by the name that is given."""
    steps = [row for row in rows if row.get("split") in ("train", "val")]
    if not steps:
        return []
    cards = [(str(steps[-1]["step"]), "steps so far")]
    validations = [row for row in rows if row.get("split") == "val"]
    for name in ("psnr", "ssim", "dice", "iou", "explained"):
        known = [row for row in validations if row.get(name) is not None]
        if known:
            best = max(known, key=lambda row: row[name])
            cards.append((cell(best, name), f"best {heading(name)}, step {best['step']}"))
    peaks = [row["peak_gib"] for row in steps if row.get("peak_gib") is not None]
    if peaks:
        cards.append((f"{max(peaks):.2f} GiB", memory))
    bad = sum(bool(row.get("skipped")) for row in rows)
    if bad:
        cards.append((str(bad), "steps without update"))
    return cards


# -------------------------------------------------------------------------------- curves

def curves_of(logs: dict[str, list[dict]], memory: str) -> str:
    """A drawing for each figure and term; of one run training and validation, of several a curve each.

    memory: what the figure of memory is called.
    """
    every = [row for rows in logs.values() for row in rows if row.get("split") in ("train", "val")]
    names = figure_names(every)
    classes = classes_of(names)
    drawings = []
    # Of several runs each has its colour in all drawings, fainter for the training.
    looks = {}
    for number, run in enumerate(logs if len(logs) > 1 else ()):
        looks |= {f"{run} training": (number, 0.5), f"{run} validation": (number, 1.0)}
    for name in [*(name for name in names if name not in classes), *SPEEDS]:
        series = {}
        for run, rows in logs.items():
            for split, words in (("train", "training"), ("val", "validation")):
                points = points_of(rows, split, name)
                is_known = any(y is not None for _, y in points)
                if is_known and not (name in SPEEDS and split == "val"):
                    series[words if len(logs) == 1 else f"{run} {words}"] = points
        if series:
            drawings.append(drawn(name, series, memory, looks))
    if classes:
        few, title = worst_and_best(classes, every)
        of_class = {f"{run} {name}" if len(logs) > 1 else name.replace("dice_", "class "):
                    points_of(rows, "val", name) for run, rows in logs.items() for name in few}
        drawings.insert(1, pictures.curves(of_class, title))
    return f'<div class="curves">{"".join(drawings)}</div>'


def classes_of(names: Iterable[str]) -> list[str]:
    return [name for name in names if re.fullmatch(r"dice_\d+", name)]


def worst_and_best(classes: Sequence[str], rows: Sequence[dict]) -> tuple[list[str], str]:
    """All classes where they are few, else as many of the worst and of the best at the end; and a title."""
    if len(classes) <= MOST_CLASSES:
        return list(classes), "Dice of each class"
    last = last_validation(rows) or {}
    half = MOST_CLASSES // 2
    order = sorted(classes, key=lambda name: last.get(name) or 0.0)
    chosen = {*order[:half], *order[-half:]}
    few = [name for name in classes if name in chosen]
    return few, f"Dice, the {half} worst and {half} best of {len(classes)} classes"


def drawn(name: str, series: dict[str, list], memory: str, looks: dict) -> str:
    titles = {
        "lr": "learning rate", "peak_gib": f"{memory} so far (GiB)",
        "voxels_per_second": "voxels a second", "psnr": "PSNR (dB)",
        "sharpness": "sharpness (gradient energy; 1: the input's)", "codebook_usage": "share of codes used",
    }
    is_log = name not in LINEAR and name not in SPEEDS
    return pictures.curves(series, titles.get(name, heading(name)), is_log, looks=looks)


def points_of(rows: Sequence[dict], split: str, name: str) -> list[tuple[float, float | None]]:
    found = []
    for row in rows:
        value = row.get(name, "absent")
        if row.get("split") == split and (value is None or isinstance(value, (int, float))):
            found.append((row["step"], value))
    return found


# -------------------------------------------------------------------------------- pictures

def pictures_of(folder: Path, title: str) -> list[str]:
    """The held-out volumes, as they are now and over the training."""
    # First the files of each volume, in the order of their steps.
    files: dict[str, list[tuple[int, Path]]] = {}
    for path in sorted((folder / "samples").glob("step_*.png")):
        matched = re.fullmatch(r"step_(\d+)_(.+)\.png", path.name)
        if matched:
            files.setdefault(matched[2], []).append((int(matched[1]), path))

    # Then of each the last one whole, and a panel of some of them.
    parts = []
    for stem, steps in files.items():
        found = read_views(steps[-1][1])
        if found is None:
            continue
        shown, note = found
        lines = [f'<p class="file">{report.text(note.get("name", stem))}, step {steps[-1][0]}</p>',
                 f"<p>{report.text(note.get('figures', ''))}</p>"]
        lines += [report.views_html(shown), strip_of(sorted(steps))]
        parts.append(f"<section>{''.join(lines)}</section>")
    return [f"<h2>Held-out crops{title}</h2>", *parts] if parts else []


def read_views(path: Path) -> tuple[views.Views, dict] | None:
    """A sample with its note; None where it has none, as those of an earlier version."""
    try:
        image, text = pictures.read_png(path.read_bytes())
        note = json.loads(text)
        return views.from_sheet(image, note), note
    except (OSError, ValueError, KeyError, TypeError):
        return None


def strip_of(steps: Sequence[tuple[int, Path]]) -> str:
    """The same slice, as the network gave it back at up to STRIP steps, the first and the last among them."""
    chosen = steps
    if len(steps) > STRIP:
        chosen = [steps[round(k * (len(steps) - 1) / (STRIP - 1))] for k in range(STRIP)]
    columns = {}
    for step, path in chosen:
        found = read_views(path)
        if found is not None:
            shown = found[0].columns
            kind = "Reconstruction" if "Reconstruction" in shown else "Found"
            columns[f"step {step}"] = shown[kind][:1]
    if len(columns) < 2:
        return ""
    width = min(1.0, (len(columns) + 0.5) / 6)                   # few pictures are not larger than many
    return f"<h4>The first of these over the training</h4>{report.slices_table(columns, [''], width)}"


# -------------------------------------------------------------------------------- words

def settings_of(folder: Path, title: str) -> str:
    """Command, data, versions and config."""
    rows = [(f"command, from step {row.get('step')}", row.get("command", ""))
            for row in read_rows(folder / COMMANDS)]
    last: dict = next(iter(reversed(read_rows(folder / COMMANDS))), {})
    rows += [(key, last[key]) for key in ("data", "device", "versions") if key in last]
    table = report.table(["", ""], [[report.text(key), code(value)] for key, value in rows]) if rows else ""
    config = folder / "config.yaml"
    text = config.read_text(encoding="utf-8", errors="replace") if config.is_file() else ""
    lines = "\n".join(report.text(line) for line in text.splitlines())
    return (f'<h2>Command, data and config{title}</h2><div class="words">{table}</div>'
            f"<details><summary>config.yaml</summary><pre>{lines}</pre></details>")


def code(value: object) -> str:
    """Words that no line ends within: a browser would break a line behind the dashes of a flag."""
    words = [f'<span class="key">{report.text(word)}</span>' for word in str(value).split(" ")]
    return f"<code>{' '.join(words)}</code>"
