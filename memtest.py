"""The peak memory of a training step: a table of predictions and measurements, and a plan of what fits.

    python memtest.py --preset high_res --resolution 512,512,512 --budget 24

peaks.py predicts, counts and measures a step; this is the command that says which steps, and shows what came
out. Sizes are D,H,W. Memory is in bytes inside, in GiB (2^30 bytes) wherever it is shown.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import peaks
import pictures
from peaks import GIB, LEFT_OUT, SPARE, MakeStep, Size
from tasks import TASKS
from training import capacity, facts, fit
from training.config import TrainConfig, changed, to_yaml
from training.console import clear_line
from training.devices import set_backend
from training.fit import memory_text, size_text
from training.flags import Parser, load_config
from training.flags import build_parser as train_parser
from training.plan import NO_BUDGET, Budget, budget_of, modes_of, network_of, of_card, settled_config
from training.spellings import spelled
from training.task import Task, of
from volumes.boxes import most_points
from volumes.files import DataError

CARDS = (8, 12, 24)          # GiB of cards; the table says into which of them a setting fits


# -------------------------------------------------------------------------------- a row of the table

@dataclass
class Row:
    """One setting. The fields are the keys of --json, up to `fits`."""
    preset: str
    resolution: Size
    batch: int
    amp: bool
    mode: str
    tile: Size | str | None                   # of a network whose tiles are not planned: auto; None in other
                                              # modes
    params: int                               # of the network that is trained
    predicted_gib: float | None = None
    measured_gib: float | None = None         # allocated
    step_seconds: float | None = None
    fits: bool | None = None
    reserved_gib: float | None = None         # what the allocator took from the card, more than allocated
    error: str | None = None                  # why there is no prediction, or no measurement

    def to_json(self) -> dict:
        row = dataclasses.asdict(self)
        del row["reserved_gib"], row["error"]
        return row

    @property
    def label(self) -> str:
        """Precision and mode in words."""
        words = {"none": "all kept", "checkpoint": "checkpointed", "tile": "tiled"}
        text = f"{precision_text(self.amp)}, {words[self.mode]}"
        if self.tile and self.tile != "auto":
            text += f" by {size_text(self.tile)}"
        return text


def precision_text(amp: bool) -> str:
    return "bf16 AMP" if amp else "float32"


def new_row(cfg: TrainConfig, task: Task) -> Row:
    """The row of a config, with nothing predicted or measured yet."""
    params = sum(p.numel() for p in network_of(cfg, task).parameters())
    tile = None
    if cfg.memory.mode == "tile":
        tile = cfg.memory.tile or "auto"
    return Row(cfg.preset, cfg.data.patch, cfg.train.batch, cfg.train.amp, cfg.memory.mode, tile, params)


def fill(row: Row, make_step: MakeStep, device: str, measured: bool) -> Row:
    """Predict the row and, when asked, run it.

    A step that fails makes a row that says so: the other rows are worth having. So does one that CUDA's
    kernels do not take.
    """
    try:
        peak = peaks.predict(make_step, device)
        row.predicted_gib = peak.bytes / GIB
        if peaks.is_too_large(peak, device):
            row.fits = False
            row.error = f"fails: a tensor of {peak.largest:,} elements, and CUDA's kernels take 2^31"
            return row
    except Exception as error:
        row.error = failure_text("prediction", error)

    if not measured:
        return row
    try:
        allocated, reserved, row.step_seconds = peaks.measure(make_step, torch.device(device))
        row.measured_gib = allocated / GIB
        row.reserved_gib = reserved / GIB if reserved else reserved
    except Exception as error:
        row.error = failure_text("measurement", error)
    return row


def failure_text(quantity: str, error: Exception) -> str:
    """Whatever a step may raise, in one line."""
    text = " ".join(str(error).split())
    what = type(error).__name__
    if text:
        what += f": {text[:300]}"
    return f"no {quantity}: {what}"


def in_process(arguments: Sequence[str]) -> dict:
    """`memtest.py --one ARGUMENTS` in a fresh process -> its row.

    So an out-of-memory or a crash there does not spoil the next row.
    """
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"preset"')]
    if lines:
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"error": f"process ended with {done.returncode}: {said[:300]}"}


# -------------------------------------------------------------------------------- the table

def table(cfg: TrainConfig, task: Task, device: str, measured: bool, budget: float | None,
          planned: Budget) -> list[Row]:
    """fp32, AMP, then AMP with every further mode of the dial; and AMP again with twice the batch.

    budget: in bytes, which `fits` is about; planned: what tiles are chosen for. Rows that are measured run in
    processes of their own.
    """
    modes = modes_of(network_of(cfg, task))
    settings = [(False, "none", 1)]                              # amp, mode, times the batch
    for times in (1, 2):
        settings += [(True, mode, times) for mode in modes]

    rows = []
    for number, (amp, mode, times) in enumerate(settings, 1):
        tell_progress(f"row {number} of {len(settings)} ...")
        batch = times * cfg.train.batch
        chosen = changed(cfg, train={"amp": amp, "batch": batch}, memory={"mode": mode})
        chosen, _ = settled_config(chosen, task, device, planned)
        row = new_row(chosen, task)
        if measured:
            row = dataclasses.replace(row, **measured_row(chosen, device))
        else:
            fill(row, lambda d, chosen=chosen: fit.make_step(chosen, task, d, rehearsal=True), device, False)
        if budget and row.predicted_gib is not None and row.fits is None:
            row.fits = row.predicted_gib * GIB <= budget * (1 - SPARE)
        rows.append(row)
    clear_line()
    return rows


def measured_row(cfg: TrainConfig, device: str) -> dict:
    """What another process finds for this config, which it reads from a file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "row.yaml")
        path.write_text(to_yaml(cfg))
        return in_process(["--config", str(path), "--device", device, "--measure"])


def gib_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def cells_of(row: Row, first: float | None) -> dict[str, str]:
    """Heading -> what the table shows of a row. first: the prediction of row 1, in GiB."""
    against, ratio, seconds, fits = "-", "-", "-", "-"
    if first and row.predicted_gib is not None:
        against = f"{100 * (row.predicted_gib / first - 1):+.0f} %"
    if row.measured_gib and row.predicted_gib is not None:
        ratio = f"{row.predicted_gib / row.measured_gib:.3f}"
    if row.step_seconds is not None:
        seconds = f"{row.step_seconds:.3f}"
    if row.fits is not None:
        fits = "yes" if row.fits else "no"
    cards = "-"
    if row.predicted_gib is not None:
        cards = " ".join(str(gib) for gib in CARDS if row.predicted_gib <= gib * (1 - SPARE)) or "none"
    return {
        "setting": row.label,
        "batch": str(row.batch),
        "predicted GiB": gib_text(row.predicted_gib),
        "against row 1": against,
        "measured GiB": gib_text(row.measured_gib),
        "ratio": ratio,
        "reserved GiB": gib_text(row.reserved_gib),
        "s/step": seconds,
        "fits": fits,
        "cards of GiB": cards,
    }


def print_table(rows: Sequence[Row], file=None) -> None:
    """The first four columns always, the others where a row has something there."""
    cells = [cells_of(row, rows[0].predicted_gib) for row in rows]
    shown = []
    for number, name in enumerate(cells[0]):
        if number < 4 or any(line[name] != "-" for line in cells):
            shown.append(name)
    widths = {name: max(len(name), *(len(line[name]) for line in cells)) for name in shown}

    def print_line(line: dict[str, str], error: str | None) -> None:
        # The settings to the left, the numbers to the right.
        first, *others = shown
        parts = [line[first].ljust(widths[first])]
        parts += [line[name].rjust(widths[name]) for name in others]
        if error:
            parts.append(error)
        print("  ".join(parts), file=file)

    print_line({name: name for name in shown}, None)
    for row, line in zip(rows, cells):
        print_line(line, row.error)


def picture(rows: Sequence[Row], title: str) -> str:
    """Bars of the predicted and of the measured peaks beside CARDS, as the text of an SVG file."""
    labels = [f"{row.label}, batch {row.batch}" for row in rows]
    series = {
        "predicted": [row.predicted_gib for row in rows],
        "measured": [row.measured_gib for row in rows],
    }
    marks = {f"{gib} GiB": (gib * (1 - SPARE), gib) for gib in CARDS}
    axis = f"GiB; dashed: cards, grey: the {100 * SPARE:.0f} % of them to keep free"
    return pictures.bars(labels, series, title, "GiB", "no prediction", marks, axis)


# -------------------------------------------------------------------------------- the plan

def print_plan(cfg: TrainConfig, task: Task, budget: float, device: str, yaml: str | None) -> bool:
    """Say whether cfg's volume fits into `budget` bytes and with which settings, then what the largest are.

    yaml: the file that the answer's settings are written to. False: not even the leanest fits.
    """
    # First the answer for the volume that was asked for, with the command for it.
    size, gib = size_text(cfg.data.patch), f"{budget / GIB:.4g} GiB"
    tell_progress(f"looking at {size} ...")
    found = capacity.answer(cfg, task, budget, device)
    chosen = changed(cfg, memory=found.memory)
    peak = f"{found.bytes / GIB:.2f} GiB with {100 * SPARE:.0f} % to spare"
    clear_line()
    if not found.fits:
        too_much = found.bytes / GIB - budget * (1 - SPARE) / GIB
        print(f"{size} does not fit {gib}: the least is {found.bytes / GIB:.2f} GiB "
              f"({memory_text(found.memory)}), {too_much:.2f} GiB too much")
    elif found.memory["mode"] == "none":
        print(f"{size} fits {gib} as it is: {peak}")
    else:
        print(f"{size} fits {gib} with memory mode {memory_text(found.memory)}: {peak}")
    if found.fits:
        print(f"  {capacity.command(chosen, task, TASKS)}", flush=True)

    # Then the largest volumes, with the settings that take least.
    smaller, per_voxel = None, capacity.PER_VOXEL
    shapes = {"largest cube": (1, 1, 1), f"largest in the proportions of {size}": cfg.data.patch}
    if task.POINTS:
        # Their number counts, and not the volume.
        print("the largest volume is not searched for: data.max_points bounds what a crop takes")
        shapes = {}
    for name, shape in shapes.items():
        best = capacity.largest(cfg, task, budget, device, shape, tell_progress, per_voxel)
        clear_line()
        if best is None:
            print(f"{name}: none")
            continue
        per_voxel = best.bytes / math.prod(best.size) / cfg.train.batch
        smaller = best.size
        print(f"{name}: {size_text(best.size)}, {best.bytes / GIB:.2f} GiB, {memory_text(best.memory)}")
        there = changed(cfg, data={"patch": best.size}, memory=best.memory)
        print(f"  {capacity.command(there, task, TASKS)}", flush=True)
    print(f"({precision_text(cfg.train.amp)}, batch {cfg.train.batch}; the largest to 3 % of their edges, in "
          f"at most {capacity.MOST_WORK:.0f} times the time of a checkpointed step)")

    # Then what would do instead, or the answer as a file for train.py --config.
    if not found.fits:
        remedy = f"It would with --budget {found.bytes / (1 - SPARE) / GIB:.2f}"
        print(f"{remedy}, or as {size_text(smaller)}" if smaller else remedy)
        return False
    text = capacity.settings_yaml(chosen, task, TASKS)
    print(f"as YAML:\n{text}", end="")
    if yaml:
        Path(yaml).write_text(text)
    return True


def tell_progress(text: str) -> None:
    """A line that the next one takes the place of; nothing in a pipe."""
    if sys.stdout.isatty():
        print(f"\r\x1b[K{text}", end="", flush=True)


# -------------------------------------------------------------------------------- the command line

def build_parser(parser_class) -> argparse.ArgumentParser:
    """The flags of this command alone; all others are train.py's."""
    parser = parser_class(
        prog="memtest.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Peak memory of a training step: predicted without a GPU, measured on one.\n" + LEFT_OUT,
        epilog="Besides: every flag of train.py (--preset, --batch, --vae.norm group ...; "
        "see train.py --help-all).\n"
        "Of points: as many as --data.max_points says, or as the densest crop of --data holds.\n"
        "Device: cuda, present or not, unless --device cpu.",
    )
    add = parser.add_argument
    add("--resolution", metavar="D,H,W", help="the volume (train.py's --patch) [64,256,256]")
    add("--budget", metavar="GIB", nargs="?", const="card",
        help="plan what fits; without a number: the card's free memory")
    add("--measure", action=argparse.BooleanOptionalAction,
        help="run each row for real [when there is a GPU]; with --device cpu its live storages are counted")
    add("--one", action="store_true", help="no table: only the row of the flags given, as a JSON line")
    add("--json", metavar="FILE", help="write the rows")
    add("--svg", metavar="FILE", help="write a bar picture of the rows")
    add("--yaml", metavar="FILE", help="write the plan, for train.py --config")
    return parser


def given_flags(argv: Sequence[str]) -> set[str]:
    """The names in a command line, without their values: --batch of --batch=2."""
    return {word.split("=")[0] for word in argv}


@dataclass
class Asked:
    """What a command line asks for."""
    own: argparse.Namespace                   # the flags of this command
    cfg: TrainConfig
    device: str                               # cuda, present or not, or cpu
    measured: bool                            # whether steps are run, not only predicted
    budget: float | None                      # bytes
    planned: Budget                           # what `auto` chooses tiles for


def asked_for(argv: Sequence[str]) -> Asked:
    """Raises ValueError or DataError, in one line, for what cannot be done."""
    # First the config: of one crop of 64,256,256, where neither a flag nor a file says otherwise.
    own, flags = build_parser(Parser).parse_known_args(argv)
    flags = spelled(flags, train_parser(TASKS)._option_string_actions)
    given = given_flags(flags)
    if own.resolution or not given & {"--config", "--patch", "--data.patch"}:
        flags = [*flags, "--patch", own.resolution or "64,256,256"]
    if not given & {"--config", "--batch", "--train.batch"}:
        flags = [*flags, "--batch", "1"]
    cfg = load_config(flags, TASKS)
    # Off: a rank's peak is that of one process, and modes without tiles are tried too.
    cfg = changed(cfg, memory={"tile_parallel": False})
    if of(TASKS, cfg).POINTS and cfg.data.path is not None:
        cfg = densest(cfg)

    # Then the device, and whether it can be measured.
    device = cfg.train.device
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        raise ValueError(f"--device must be cuda or cpu, got {device}: nothing is known about its allocator")
    if device == "auto":
        device = "cuda"
    on_card = device != "cpu" and torch.cuda.is_available()
    measured = on_card if own.measure is None else own.measure
    if measured and device != "cpu" and not on_card:
        raise ValueError("--measure needs a GPU, and torch sees none; leave it out, or add --device cpu")

    # Then the budget, and the files to write.
    budget = budget_bytes(own.budget, device, on_card)
    for path in (own.json, own.svg, own.yaml):
        if path and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: no such folder {Path(path).absolute().parent}; make it first")
    whose = "the card has free" if own.budget in (None, "card") else "--budget gives"
    planned = budget_of(cfg.memory, device, NO_BUDGET if budget is None else of_card(budget, whose))
    return Asked(own, cfg, device, measured, budget, planned)


def densest(cfg: TrainConfig) -> TrainConfig:
    """The config with as many points in a crop as the densest box of its data set has."""
    cfg, found = facts.open_data(cfg, of(TASKS, cfg), tell_progress)
    most = most_points([*found.train, *found.val], found.patch)
    return changed(cfg, data={"max_points": min(most, cfg.data.max_points or most)})


def budget_bytes(text: str | None, device: str, on_card: bool) -> float | None:
    """--budget in bytes: a number of GiB, or what the card has free; None without either.

    Without the flag the card's free memory is the budget, where there is a card.
    """
    if text not in (None, "card"):
        try:
            if 0 < float(text) < math.inf:
                return float(text) * GIB
        except ValueError:
            pass
        raise ValueError(f"--budget must be a number of GiB above 0, got {text!r}")
    # Asked in another process: a CUDA context in this one would take memory that the rows need.
    if on_card:
        code = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
        words = [sys.executable, "-c", code]
        return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    if text == "card":
        raise ValueError("--budget needs a number here, since torch sees no GPU whose free memory it could "
                         "take: --budget 24")
    return None


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a row has no prediction or nothing fits, 2 cannot start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = asked_for(argv)
    except (ValueError, DataError) as error:
        print(f"memtest.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    own, cfg, device = asked.own, asked.cfg, asked.device

    # The kernels and the allocator of a run, here and in every row's process.
    if asked.measured and device != "cpu":
        set_backend(cfg)
    task = of(TASKS, cfg)
    if own.one:
        cfg, _ = settled_config(cfg, task, device, asked.planned)
        row = fill(new_row(cfg, task), lambda d: fit.make_step(cfg, task, d), device, asked.measured)
        print(json.dumps(dataclasses.asdict(row)))
        return 0 if row.predicted_gib is not None else 1

    # First the answer, where there is a budget: in bf16 AMP, unless a flag speaks of amp.
    is_planned = True
    if own.budget is not None:
        planned = cfg
        if not given_flags(argv) & {"--amp", "--train.amp"}:
            planned = changed(cfg, train={"amp": True})
        is_planned = print_plan(planned, task, asked.budget, device, own.yaml)
        print()

    # Then the table, on the console and as files.
    rows = table(cfg, task, device, asked.measured, asked.budget, asked.planned)
    millions = rows[0].params / 1e6
    title = f"{cfg.preset} {size_text(cfg.data.patch)}, {millions:.2f} M parameters, one step on {device}"
    print(title)
    print_table(rows)
    if any(row.mode == "tile" for row in rows):
        print(f"Tiles are planned for {asked.planned.why}.")
    print(LEFT_OUT)
    for text in peaks.environment_warnings():
        print(f"warning: {text}")
    if own.json:
        Path(own.json).write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if own.svg:
        Path(own.svg).write_text(picture(rows, title))
    is_predicted = all(row.predicted_gib is not None for row in rows)
    return 0 if is_planned and is_predicted else 1


if __name__ == "__main__":
    sys.exit(main())
