"""The peak memory of a training step: a table of predictions and measurements, a plan of what fits, a
picture.

    python memtest.py --preset high_res --resolution 512,512,512 --budget 24

peaks.py predicts, counts and measures; this is its command line.
Sizes are D,H,W. Memory is in bytes inside, in GiB (2^30 bytes) wherever it is shown.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
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
from data import DataError
from peaks import GIB, LEFT_OUT, SPARE, MakeStep, Size
from tasks import TASKS
from training import fit
from training.config import TrainConfig, changed, config_dict, to_yaml
from training.devices import set_backend
from training.fit import memory_settings, memory_text, network_of, size_text
from training.flags import Parser, load_config
from training.memory import modes_of
from training.task import Task, of

# ------------------------------------------------------------------------------------------------
# table

@dataclass
class Row:
    """One setting. The fields are the keys of --json, up to `fits`."""
    preset: str
    resolution: Size
    batch: int
    amp: bool
    mode: str
    tile: Size | str | None                   # memory.tile or auto; None in other modes
    params: int                               # of the autoencoder
    predicted_gib: float | None = None
    measured_gib: float | None = None         # allocated
    step_seconds: float | None = None
    fits: bool | None = None
    reserved_gib: float | None = None
    error: str | None = None                  # why there is no prediction, or no measurement

    def to_json(self) -> dict:
        return {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in ("reserved_gib", "error")
        }

    @property
    def label(self) -> str:
        return f"{'AMP' if self.amp else 'fp32'} {self.mode}" + (
            f" {size_text(self.tile)}" if self.tile else ""
        )


def gib_text(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def fill(row: Row, make_step: MakeStep, device: str, measured: bool) -> Row:
    """Predict the row and, when asked, run it. A step that fails makes a row that says so: the others are
    worth having.
    """
    for quantity in ("prediction", "measurement")[:1 + measured]:
        try:
            if quantity == "prediction":
                row.predicted_gib = peaks.predict(make_step, device).bytes / GIB
            else:
                found = peaks.measure(make_step, torch.device(device))
                allocated, reserved, row.step_seconds = found
                row.measured_gib, row.reserved_gib = allocated / GIB, reserved and reserved / GIB
        except Exception as error:  # whatever the step may raise; the row carries it
            text = " ".join(str(error).split())
            row.error = f"no {quantity}: {type(error).__name__}{': ' + text[:300] if text else ''}"
    return row


def in_process(arguments: Sequence[str]) -> dict:
    """`memtest.py --one ARGUMENTS` in a fresh process -> its row, so that an out-of-memory or a crash there
    does not spoil the next.
    """
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"preset"')]
    if lines:
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"error": f"process ended with {done.returncode}: {said[:300]}"}


def print_table(rows: Sequence[Row], file=None) -> None:
    first = rows[0].predicted_gib
    head = [
        "setting",
        "batch",
        "predicted GiB",
        "against row 1",
        "measured GiB",
        "ratio",
        "reserved GiB",
        "s/step",
        "fits",
    ]
    body = []
    for row in rows:
        against = (
            "-"
            if not first or row.predicted_gib is None
            else f"{100 * (row.predicted_gib / first - 1):+.0f} %"
        )
        ratio = (
            "-"
            if not row.measured_gib or row.predicted_gib is None
            else f"{row.predicted_gib / row.measured_gib:.3f}"
        )
        seconds = "-" if row.step_seconds is None else f"{row.step_seconds:.3f}"
        fits = "-" if row.fits is None else "yes" if row.fits else "no"
        body.append(
            [
                row.label,
                str(row.batch),
                gib_text(row.predicted_gib),
                against,
                gib_text(row.measured_gib),
                ratio,
                gib_text(row.reserved_gib),
                seconds,
                fits,
            ]
        )
    used = [i for i in range(len(head)) if i < 4 or any(line[i] != "-" for line in body)]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line, row in zip([head, *body], [None, *rows]):
        text = "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in used)
        print(text + (f"  {row.error}" if row and row.error else ""), file=file)


# ------------------------------------------------------------------------------------------------ picture

def picture(rows: Sequence[Row], title: str) -> str:
    """Bars of the predicted and of the measured peaks, as the text of an SVG file."""
    labels = [f"{row.label} x{row.batch}" for row in rows]
    series = {
        "predicted": [row.predicted_gib for row in rows],
        "measured": [row.measured_gib for row in rows],
    }
    return pictures.bars(labels, series, title, "GiB", missing="no prediction")


# ------------------------------------------------------------------------------------------------
# command line

def build_parser(parser_class) -> argparse.ArgumentParser:
    parser = parser_class(
        prog="memtest.py",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Peak memory of a training step: predicted without a GPU, measured on one.\n" + LEFT_OUT,
        epilog="Besides: every flag of train.py (--preset, --batch, --vae.norm group ...; "
        "see train.py --help).\nDevice: cuda, present or not, unless --device cpu.",
    )
    parser.add_argument("--resolution", metavar="D,H,W", help="the volume (train.py's --patch) [64,256,256]")
    parser.add_argument("--budget", metavar="GIB", nargs="?", const="card", help="plan what fits; without a "
                                                                                 "number: the card's free "
                                                                                 "memory")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, help="run each row for real "
                                                                                 "[when there is a GPU]; "
                                                                                 "with "
                        "--device cpu its live storages are counted")
    parser.add_argument("--one", action="store_true", help="no table: only the row of the flags given, as a "
                                                           "JSON line")
    for kind, what in (
        ("json", "the rows"),
        ("svg", "a bar picture of the rows"),
        ("yaml", "the plan, for train.py --config"),
    ):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write {what}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a row has no prediction or nothing fits, 2 cannot start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        own, flags = build_parser(Parser).parse_known_args(argv)
        named = {flag.split("=")[0] for flag in flags}
        if own.resolution or not named & {"--config", "--patch", "--data.patch"}:
            flags = [*flags, "--patch", own.resolution or "64,256,256"]
        if not named & {"--config", "--batch", "--train.batch"}:
            flags = [*flags, "--batch", "1"]
        # A rank's peak is that of one process, and other modes are tried.
        cfg = changed(load_config(flags, TASKS), memory={"tile_parallel": False})
        if cfg.train.device not in ("auto", "cpu") and not cfg.train.device.startswith("cuda"):
            raise ValueError(f"--device must be cuda or cpu, got {cfg.train.device}: nothing is known about "
                             "its allocator")
        device = "cuda" if cfg.train.device == "auto" else cfg.train.device
        on_card = device != "cpu" and torch.cuda.is_available()
        measured = on_card if own.measure is None else own.measure
        if measured and device != "cpu" and not on_card:
            raise ValueError("--measure needs a GPU, and torch sees none; leave it out, or add --device cpu")
        budget = budget_bytes(own.budget, device, on_card)
        for path in (own.json, own.svg, own.yaml):
            if path and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{path}: no such folder {Path(path).absolute().parent}; make it first")
    except (ValueError, DataError) as error:
        print(f"memtest.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    # The run's own kernels and allocator, here and in every row's process.
    if measured and on_card:
        set_backend(cfg)
    task = of(TASKS, cfg)
    if own.one:
        row = fill(new_row(cfg, task), lambda d: fit.make_step(cfg, task, d), device, measured)
        print(json.dumps(dataclasses.asdict(row)))
        return 0 if row.predicted_gib is not None else 1
    rows = table(cfg, task, device, measured, budget)
    millions = rows[0].params / 1e6
    title = f"{cfg.preset} {size_text(cfg.data.patch)}, {millions:.2f} M parameters, one step on {device}"
    print(title)
    print_table(rows)
    print(LEFT_OUT)
    for text in peaks.environment_warnings():
        print(f"warning: {text}")
    if own.json:
        Path(own.json).write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if own.svg:
        Path(own.svg).write_text(picture(rows, title))
    planned = own.budget is None or print_plan(cfg, task, argv, budget, device, own.yaml)
    return 0 if planned and all(row.predicted_gib is not None for row in rows) else 1


def budget_bytes(text: str | None, device: str, on_card: bool) -> float | None:
    """--budget in bytes: a number of GiB, or what the card has free; None without either."""
    if text not in (None, "card"):
        try:
            if 0 < float(text) < math.inf:
                return float(text) * GIB
        except ValueError:
            pass
        raise ValueError(f"--budget must be a number of GiB above 0, got {text!r}")
    # Asked in another process: a context here would take what the rows need.
    if on_card:
        code = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
        return float(
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        )
    if text == "card":
        raise ValueError("--budget needs a number here, since torch sees no GPU whose free memory it could "
                         "take: --budget 24")
    return None


def new_row(cfg: TrainConfig, task: Task) -> Row:
    params = sum(p.numel() for p in network_of(cfg, task).parameters())
    tile = None
    if cfg.memory.mode == "tile":
        tile = cfg.memory.tile or "auto"
    return Row(cfg.preset, cfg.data.patch, cfg.train.batch, cfg.train.amp, cfg.memory.mode, tile, params)


def table(cfg: TrainConfig, task: Task, device: str, measured: bool, budget: float | None) -> list[Row]:
    """fp32, AMP, then AMP with every further mode of the dial; and AMP again with twice the batch."""
    rows = []
    modes = modes_of(network_of(cfg, task))
    for amp, mode, times in [(False, "none", 1), *((True, mode, n) for n in (1, 2) for mode in modes)]:
        batch = times * cfg.train.batch
        chosen = changed(cfg, train={"amp": amp, "batch": batch}, memory={"mode": mode})
        row = new_row(chosen, task)
        if measured:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "row.yaml")
                path.write_text(to_yaml(chosen))
                words = ["--config", str(path), "--device", device, "--measure"]
                row = dataclasses.replace(row, **in_process(words))
        else:
            fill(row, lambda d, chosen=chosen: fit.make_step(chosen, task, d, rehearsal=True), device, False)
        if budget and row.predicted_gib is not None:
            row.fits = row.predicted_gib * GIB <= budget * (1 - SPARE)
        rows.append(row)
    return rows


def print_plan(cfg: TrainConfig, task: Task, argv: Sequence[str], budget: float, device: str,
               yaml: str | None) -> bool:
    """Say what fits into `budget` bytes and with which settings, in bf16 AMP unless a flag speaks of amp;
    False: nothing does.
    """
    if not {flag.split("=")[0] for flag in argv} & {"--amp", "--train.amp"}:
        cfg = changed(cfg, train={"amp": True})
    network, batch = network_of(cfg, task), cfg.train.batch
    dtype, limit = torch.bfloat16 if cfg.train.amp else torch.float32, int(budget * (1 - SPARE))

    def make_step_for(size: Size, memory: dict) -> MakeStep:
        chosen = changed(cfg, data={"patch": size}, memory=memory)
        return lambda d: fit.make_step(chosen, task, d, rehearsal=True)

    @functools.cache
    def leanest(size: Size) -> dict:
        return memory_settings(network, size, batch, dtype)[-1]

    def peak_of(size: Size) -> int:
        return peaks.predict(make_step_for(size, leanest(size)), device).bytes

    size, unit = cfg.data.patch, math.lcm(16, *stride_of(network))
    print(f"\nBudget {budget / GIB:.2f} GiB, {100 * SPARE:.0f} % of it kept free, "
          f"{'bf16 AMP' if cfg.train.amp else 'fp32'}, batch {batch}; at most {fit.MOST_WORK:.0f} times the "
          f"time of a checkpointed step; the largest to 3 % of their edges:")
    smaller = None
    for name, shape in (
        ("largest cube", (1, 1, 1)),
        (f"largest in the proportions of {size_text(size)}", size),
    ):
        found = peaks.largest(
            peak_of, shape, unit, limit, lambda size: 20 * batch * math.prod(size), close=0.1
        )
        smaller = found if found else smaller
        if found is None:
            print(f"  {name}: none")
        else:
            settings = memory_text(leanest(found[0]))
            print(f"  {name}: {size_text(found[0])}, {settings}: {found[1] / GIB:.2f} GiB")
    candidates = memory_settings(network, size, batch, dtype, limit)
    chosen = peaks.plan(make_step_for, size, budget, candidates, device)
    if not chosen.fits:
        print(f"  {size_text(size)} does not fit: the least is {chosen.bytes / GIB:.2f} GiB "
              f"({memory_text(chosen.memory)}), {(chosen.bytes - limit) / GIB:.2f} GiB too much. It would "
              f"with --budget {chosen.bytes / (1 - SPARE) / GIB:.2f}"
              + (f", or as {size_text(smaller[0])}" if smaller else ""))
        return False
    print(f"  {size_text(size)} fits with memory.mode {memory_text(chosen.memory)}: "
          f"{chosen.bytes / GIB:.2f} GiB")
    text = settings_yaml(changed(cfg, memory=chosen.memory), task)
    print(text, end="")
    if yaml:
        Path(yaml).write_text(text)
    return True


def stride_of(network: torch.nn.Module) -> tuple[int, int, int]:
    """To whose multiples a network pads; 1 for one that has no levels."""
    return getattr(getattr(network, "cfg", None), "total_stride", (1, 1, 1))


def settings_yaml(cfg: TrainConfig, task: Task) -> str:
    """What differs from the preset's defaults, as YAML that train.py --config takes (values are written as
    JSON, which YAML includes).
    """
    words = ["--task", task.name]
    if cfg.preset in task.PRESETS:                               # not that of a foreign train.init
        words += ["--preset", cfg.preset]
    ours, defaults = config_dict(cfg), config_dict(load_config(words, TASKS))
    lines = [f"preset: {cfg.preset}"]
    if task.name != TrainConfig.task:
        lines.insert(0, f"task: {task.name}")
    for section, fields in ours.items():
        if not isinstance(fields, dict):
            continue
        said = {k: v for k, v in fields.items() if v != defaults[section][k] or (section, k) in SAID}
        if said:
            lines.append(f"{section}: {json.dumps(said)}")
    return "\n".join(lines) + "\n"


# In a plan's YAML also where they are the default.
SAID = {("data", "patch"), ("train", "amp"), ("train", "batch"), ("memory", "mode")}


if __name__ == "__main__":
    sys.exit(main())
