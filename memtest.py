"""The peak memory of a training step: a table of predictions and measurements, a plan of what fits, a picture.

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
import train
from peaks import GIB, LEFT_OUT, SPARE, MakeStep, Size
from train import change, memory_text, size_text

# --------------------------------------------------------------------------------------------------------------------------- table

@dataclass
class Row:
    """One setting. The fields are the keys of --json, up to `fits`."""
    preset: str
    resolution: Size
    batch: int
    amp: bool
    mode: str
    tile: Size | str | None                                      # memory.tile or auto; None in other modes
    params: int                                                  # of the autoencoder
    predicted_gib: float | None = None
    measured_gib: float | None = None                            # allocated
    step_seconds: float | None = None
    fits: bool | None = None
    reserved_gib: float | None = None
    error: str | None = None                                     # why there is no prediction, or no measurement

    def to_json(self) -> dict:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("reserved_gib", "error")}

    @property
    def label(self) -> str:
        return f"{'AMP' if self.amp else 'fp32'} {self.mode}" + (f" {size_text(self.tile)}" if self.tile else "")


def gib_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def fill(row: Row, make_step: MakeStep, device: str, measured: bool) -> Row:
    """Predict the row and, when asked, run it. A step that fails makes a row that says so: the others are worth having."""
    for quantity in ("prediction", "measurement")[:1 + measured]:
        try:
            if quantity == "prediction":
                row.predicted_gib = peaks.predict(make_step, device).bytes / GIB
            else:
                allocated, reserved, row.step_seconds = peaks.measure(make_step, torch.device(device))
                row.measured_gib, row.reserved_gib = allocated / GIB, reserved and reserved / GIB
        except Exception as error:  # whatever the step may raise; the row carries it
            text = " ".join(str(error).split())
            row.error = f"no {quantity}: {type(error).__name__}{': ' + text[:300] if text else ''}"
    return row


def in_process(arguments: Sequence[str]) -> dict:
    """`memtest.py --one ARGUMENTS` in a fresh process -> its row, so that an out-of-memory or a crash there does not spoil the next."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"preset"')]
    if lines:
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"error": f"process ended with {done.returncode}: {said[:300]}"}


def print_table(rows: Sequence[Row], file=None) -> None:
    first = rows[0].predicted_gib
    head = ["setting", "batch", "predicted GiB", "against row 1", "measured GiB", "ratio", "reserved GiB", "s/step", "fits"]
    body = []
    for row in rows:
        against = "-" if not first or row.predicted_gib is None else f"{100 * (row.predicted_gib / first - 1):+.0f} %"
        ratio = "-" if not row.measured_gib or row.predicted_gib is None else f"{row.predicted_gib / row.measured_gib:.3f}"
        seconds = "-" if row.step_seconds is None else f"{row.step_seconds:.3f}"
        fits = "-" if row.fits is None else "yes" if row.fits else "no"
        body.append([row.label, str(row.batch), gib_text(row.predicted_gib), against, gib_text(row.measured_gib), ratio,
                     gib_text(row.reserved_gib), seconds, fits])
    used = [i for i in range(len(head)) if i < 4 or any(line[i] != "-" for line in body)]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line, row in zip([head, *body], [None, *rows]):
        text = "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in used)
        print(text + (f"  {row.error}" if row and row.error else ""), file=file)


# ------------------------------------------------------------------------------------------------ picture

def picture(rows: Sequence[Row], title: str) -> str:
    """Bars of the predicted and of the measured peaks, as the text of an SVG file."""
    labels = [f"{row.label} x{row.batch}" for row in rows]
    series = {"predicted": [row.predicted_gib for row in rows], "measured": [row.measured_gib for row in rows]}
    return pictures.bars(labels, series, title, "GiB", missing="no prediction")


# -------------------------------------------------------------------------------------------------------------------- command line

def build_parser(parser_class) -> argparse.ArgumentParser:
    parser = parser_class(prog="memtest.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                          description="Peak memory of a training step: predicted without a GPU, measured on one.\n" + LEFT_OUT,
                          epilog="Besides: every flag of train.py (--preset, --batch, --vae.norm group ...; see train.py --help).\n"
                                 "Device: cuda, present or not, unless --device cpu.")
    parser.add_argument("--resolution", metavar="D,H,W", help="the volume (train.py's --patch) [64,256,256]")
    parser.add_argument("--budget", metavar="GIB", nargs="?", const="card", help="plan what fits; without a number: the card's free memory")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, help="run each row for real [when there is a GPU]; with "
                        "--device cpu its live storages are counted")
    parser.add_argument("--one", action="store_true", help="no table: only the row of the flags given, as a JSON line")
    for kind, what in (("json", "the rows"), ("svg", "a bar picture of the rows"), ("yaml", "the plan, for train.py --config")):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write {what}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a row has no prediction or nothing fits, 2 cannot start."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        own, flags = build_parser(train.Parser).parse_known_args(argv)
        named = {flag.split("=")[0] for flag in flags}
        if own.resolution or not named & {"--config", "--patch", "--data.patch"}:
            flags = [*flags, "--patch", own.resolution or "64,256,256"]
        if not named & {"--config", "--batch", "--train.batch"}:
            flags = [*flags, "--batch", "1"]
        cfg = train.load_config(flags)
        cfg.memory.tile_parallel = False                         # a rank's peak is that of one process, and other modes are tried
        if cfg.train.device not in ("auto", "cpu") and not cfg.train.device.startswith("cuda"):
            raise ValueError(f"--device must be cuda or cpu, got {cfg.train.device}: nothing is known about its allocator")
        device = "cuda" if cfg.train.device == "auto" else cfg.train.device
        on_card = device != "cpu" and torch.cuda.is_available()
        measured = on_card if own.measure is None else own.measure
        if measured and device != "cpu" and not on_card:
            raise ValueError("--measure needs a GPU, and torch sees none; leave it out, or add --device cpu")
        budget = budget_bytes(own.budget, device, on_card)
        for path in (own.json, own.svg, own.yaml):
            if path and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{path}: no such folder {Path(path).absolute().parent}; make it first")
    except (ValueError, train.DataError) as error:
        print(f"memtest.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if measured and on_card:                                     # the run's own kernels and allocator, here and in every row's process
        train.set_backend(cfg)
    if own.one:
        row = fill(new_row(cfg), lambda d: train.make_step(cfg, d), device, measured)
        print(json.dumps(dataclasses.asdict(row)))
        return 0 if row.predicted_gib is not None else 1
    rows = table(cfg, device, measured, budget)
    title = f"{cfg.preset} {size_text(cfg.data.patch)}, {rows[0].params / 1e6:.2f} M parameters, one step on {device}"
    print(title)
    print_table(rows)
    print(LEFT_OUT)
    for text in peaks.environment_warnings():
        print(f"warning: {text}")
    if own.json:
        Path(own.json).write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if own.svg:
        Path(own.svg).write_text(picture(rows, title))
    planned = own.budget is None or print_plan(cfg, argv, budget, device, own.yaml)
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
    if on_card:                                                  # asked in another process: a context here would take what the rows need
        code = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    if text == "card":
        raise ValueError("--budget needs a number here, since torch sees no GPU whose free memory it could take: --budget 24")
    return None


def new_row(cfg) -> Row:
    with torch.device("meta"):
        params = sum(p.numel() for p in train.build_network(cfg).parameters())
    return Row(cfg.preset, cfg.data.patch, cfg.train.batch, cfg.train.amp, cfg.memory.mode,
               (cfg.memory.tile or "auto") if cfg.memory.mode == "tile" else None, params)


def table(cfg, device: str, measured: bool, budget: float | None) -> list[Row]:
    """fp32, AMP, then AMP with every further mode of the dial; and AMP again with twice the batch."""
    rows = []
    for amp, mode, times in [(False, "none", 1), *((True, mode, n) for n in (1, 2) for mode in train.memory_modes(cfg))]:
        chosen = change(cfg, {"train": {"amp": amp, "batch": times * cfg.train.batch}, "memory": {"mode": mode}})
        row = new_row(chosen)
        if measured:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "row.yaml")
                path.write_text(train.to_yaml(chosen))
                row = dataclasses.replace(row, **in_process(["--config", str(path), "--device", device, "--measure"]))
        else:
            fill(row, lambda d, chosen=chosen: train.make_step(chosen, d), device, False)
        if budget and row.predicted_gib is not None:
            row.fits = row.predicted_gib * GIB <= budget * (1 - SPARE)
        rows.append(row)
    return rows


def print_plan(cfg, argv: Sequence[str], budget: float, device: str, yaml: str | None) -> bool:
    """Say what fits into `budget` bytes and with which settings, in bf16 AMP unless a flag speaks of amp; False: nothing does."""
    if not {flag.split("=")[0] for flag in argv} & {"--amp", "--train.amp"}:
        cfg = change(cfg, {"train": {"amp": True}})
    with torch.device("meta"):
        vae = train.VAE3D(cfg.vae)
    dtype, limit = torch.bfloat16 if cfg.train.amp else torch.float32, int(budget * (1 - SPARE))

    def make_step_for(size: Size, memory: dict) -> MakeStep:
        chosen = change(cfg, {"data": {"patch": size}, "memory": memory})
        return lambda d: train.make_step(chosen, d)

    @functools.cache
    def leanest(size: Size):
        return train.tile_plans(vae, size, cfg.train.batch, dtype)[-1]

    def peak_of(size: Size) -> int:
        return peaks.predict(make_step_for(size, train.tile_memory(leanest(size))), device).bytes

    size, unit = cfg.data.patch, math.lcm(16, *cfg.vae.total_stride)
    print(f"\nBudget {budget / GIB:.2f} GiB, {100 * SPARE:.0f} % of it kept free, {'bf16 AMP' if cfg.train.amp else 'fp32'}, "
          f"batch {cfg.train.batch}; at most {train.MOST_WORK:.0f} times the time of a checkpointed step; "
          f"the largest to 3 % of their edges:")
    smaller = None
    for name, shape in (("largest cube", (1, 1, 1)), (f"largest in the proportions of {size_text(size)}", size)):
        found = peaks.largest(peak_of, shape, unit, limit, lambda size: 20 * cfg.train.batch * math.prod(size), close=0.1)
        smaller = found if found else smaller
        if found is None:
            print(f"  {name}: none")
        else:
            settings = memory_text(train.tile_memory(leanest(found[0])))
            print(f"  {name}: {size_text(found[0])}, {settings}: {found[1] / GIB:.2f} GiB")
    chosen = peaks.plan(make_step_for, size, budget, train.memory_settings(vae, size, cfg.train.batch, dtype, limit), device)
    if not chosen.fits:
        print(f"  {size_text(size)} does not fit: the least is {chosen.bytes / GIB:.2f} GiB ({memory_text(chosen.memory)}), "
              f"{(chosen.bytes - limit) / GIB:.2f} GiB too much. It would with --budget {chosen.bytes / (1 - SPARE) / GIB:.2f}"
              + (f", or as {size_text(smaller[0])}" if smaller else ""))
        return False
    print(f"  {size_text(size)} fits with memory.mode {memory_text(chosen.memory)}: {chosen.bytes / GIB:.2f} GiB")
    text = settings_yaml(change(cfg, {"memory": chosen.memory}))
    print(text, end="")
    if yaml:
        Path(yaml).write_text(text)
    return True


def settings_yaml(cfg) -> str:
    """What differs from the preset's defaults, as YAML that train.py --config takes (values are written as JSON, which YAML includes)."""
    preset = ["--preset", cfg.preset] if cfg.preset in train.TASKS["vae"] else []                # not that of a foreign train.init
    ours, defaults = train.config_dict(cfg), train.config_dict(train.load_config(preset))
    lines = [f"preset: {cfg.preset}"]
    for section, fields in ours.items():
        changed = {k: v for k, v in fields.items() if v != defaults[section][k] or (section, k) in SAID} if isinstance(fields, dict) else {}
        lines += [f"{section}: {json.dumps(changed)}"] if changed else []
    return "\n".join(lines) + "\n"


SAID = {("data", "patch"), ("train", "amp"), ("train", "batch"), ("memory", "mode")}  # in a plan's YAML also where they are the default


if __name__ == "__main__":
    sys.exit(main())
