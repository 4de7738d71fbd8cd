"""Use a checkpoint: reconstruct, encode, decode and segment whole volumes of any size, and evaluate the network on them.

    python predict.py reconstruct --checkpoint runs/ct/best.pt --input scan.nii.gz --output out/
    python predict.py encode      --checkpoint runs/ct --input FOLDER --output latents/   # the latent mean, or indices of codes
    python predict.py decode      --checkpoint runs/ct --input latents/ --output out/     # equals reconstruct, to the bit
    python predict.py segment     --checkpoint runs/seg --input scan.nii.gz --output out/ --viz
    python predict.py evaluate    --checkpoint runs/ct --data FOLDER --json out.json --report out.html

The checkpoint alone says how a volume is prepared. What goes out lies on the source's grid: its affine, its order of axes, its number type
and its intensity scale, so HU come back as HU. An autoencoder runs by the exact tiles of vae3d.py: no blending, no seams. A U-Net's
receptive field is the whole volume, so it runs on windows that overlap (nnU-Net, doi:10.1038/s41592-020-01008-z).
Outputs are written whole or not at all; what is there already is skipped, so an interrupted folder goes on with the same command.

It reads top to bottom: the commands, their parts, the command line. What a network makes of a volume is its task's (tasks/).
Shapes: C channels, D H W depth height width, Z latent channels, d h w latent depth height width, T volumes of a 4-D file, K classes.
Intensities in [-1, 1]; memory is in GiB. Version 0.3 (2026-11).
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")              # before torch loads: see train.py

import argparse
import dataclasses
import json
import math
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

import data
import pictures
from data import DataError
from standin_origin import save, write_result, write_volume
from tasks import TASKS
from tasks.vae import BUDGET
from training import latents, report
from training.cases import Case, label_of, read_case
from training.config import convert
from training.console import clear_line
from training.evaluation import (
    Totals,
    finite,
    held_out,
    print_table,
    ranked_by,
    row_of,
    row_text,
    score_reconstruction,
    summary,
    worst_median_best,
)
from training.flags import Parser, field_comments
from training.foreign import explained
from training.jobs import Job, failures_in, kind_of, list_inputs, list_latents, make_jobs, run_jobs, show_progress, speed, tell_failures
from training.order import seed_of
from training.ready import Ready, data_config, describe, load
from training.signals import SIGNALS, Stopped, stopped_by_signals

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
MOST_CLASSES = 12                                                # that are printed with their share of the voxels
DATA_FLAGS = ("modality", "nan", "max_gib", "channel_axis", "select_channel", "four_d")  # of section `data`, where a file asks for them
DATA_FLAGS += ("window", "hu_range", "percentiles", "percentiles_of", "voxel_scale", "spacing")  # what a foreign checkpoint does not know


# ------------------------------------------------------------------------------------------------ the commands

def reconstruct(options: argparse.Namespace) -> bool:
    ready, cfg = open_checkpoint(options, "reconstruct")

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), show_progress(job.item.path)
        started, volumes = time.monotonic(), [volume for volume, _ in case.volumes]
        results = [(ready.task.reconstruct(ready, volume, tick), intensity) for volume, intensity in case.volumes]
        text = speed(volumes, started)
        write_result(job.output, results, case.affine, case.origin)
        return f"{text} -> {job.output}"
    jobs = make_jobs(list_inputs(options.input, output=options.output), options.input, options.output, kind_of)
    return run_jobs(jobs, work, options.overwrite)


def encode(options: argparse.Namespace) -> bool:
    ready, cfg = open_checkpoint(options, "encode")
    if not ready.facts["latent"] and ready.task.latent_kind(ready).codes is None:
        why = "not from train.py" if ready.facts["step"] is None else "its run has not finished"
        print(f"{ready.path}: {why}, so the latent's scale factor is not known (nan)")

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), show_progress(job.item.path)
        started, volumes, arrays = time.monotonic(), [volume for volume, _ in case.volumes], []
        for number, volume in enumerate(volumes):
            generator = None
            if options.sample:
                generator = torch.Generator().manual_seed(seed_of(options.seed, "sample", job.output.name, number))
            arrays.append(ready.task.encode(ready, volume, generator, tick))
        text = speed(volumes, started)
        intensities, size = [intensity for _, intensity in case.volumes], volumes[0].shape[1:]
        found = latents.Latents(arrays, intensities, case.affine, size, ready.fingerprint, case.origin)
        latents.write(job.output, found, ready, options.sample)
        return f"{text} -> {job.output}"
    items = list_inputs(options.input, output=options.output)
    return run_jobs(make_jobs(items, options.input, options.output, lambda path: latents.ENDING), work, options.overwrite)


def decode(options: argparse.Namespace) -> bool:
    ready, _ = open_checkpoint(options, "decode")

    def work(job: Job) -> str:
        found, tick = latents.read(job.item.path, ready), show_progress(job.item.path)
        if found.fingerprint != ready.fingerprint:
            print(f"{data.show(job.item.path)}: was encoded with other weights than {ready.path}")
        started = time.monotonic()
        volumes = [ready.task.decode(ready, array, found.size, tick) for array in found.arrays]
        text = speed(volumes, started)
        write_result(job.output, list(zip(volumes, found.intensities)), found.affine, found.origin)
        return f"{text} -> {job.output}"
    jobs = make_jobs(list_latents(options.input), options.input, options.output, latents.ending_of_result)
    return run_jobs(jobs, work, options.overwrite)


def segment(options: argparse.Namespace) -> bool:
    if options.output is None and (options.viz or not options.no_save):
        raise ValueError("--output FOLDER is needed, unless --no-save is given without --viz")
    ready, cfg = open_checkpoint(options, "segment")
    count = ready.task.classes(ready.cfg)
    values = np.array(range(count) if cfg.label_values is None else cfg.label_values)  # on disk, of each class

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), show_progress(job.item.path)
        started, volumes, found = time.monotonic(), [volume for volume, _ in case.volumes], []
        for volume, intensity in case.volumes:
            found.append(ready.task.segment(ready, volume, options.window, options.overlap, intensity.background,
                                            options.mask_threshold, case.origin.size, tick))
        text = speed(volumes, started)
        if options.viz:
            save_overlay(viz_path(job.output), volumes[0], found[0], case)
        if not options.no_save:                                  # last: its presence says that the job is done
            labels = values[np.stack(found)].astype(np.uint8 if values.max() < 256 else np.int16)
            write_volume(job.output, labels, dataclasses.replace(case.origin, key=data.LABEL_KEYS[0]))
        text += f"; {shares_text(found, values)}"
        return text if options.no_save else f"{text} -> {job.output}"
    items = list_inputs(options.input, output=options.output)
    if options.output is None:
        jobs = [Job(item, Path()) for item in items]
    else:
        jobs = make_jobs(items, options.input, options.output, kind_of)
    return run_jobs(jobs, work, options.overwrite or options.no_save)


def save_overlay(path: Path, volume: np.ndarray, found: np.ndarray, case: Case) -> None:
    """Slices beside slices with a colour for each class."""
    found = data.resample_label(found, volume.shape[1:])
    picture = pictures.label_comparison(torch.from_numpy(volume), [torch.from_numpy(found)], case.spacing, case.origin.kind == ".png")
    save(path, lambda file: file.write(pictures.png(picture)))


def viz_path(output: Path) -> Path:
    return output.with_name(output.name.removesuffix("".join(data._suffix(output))) + "_viz.png")


def shares_text(found: Sequence[np.ndarray], values: np.ndarray) -> str:
    """The largest classes with their share of the voxels, by number."""
    shares = np.bincount(np.stack(found).reshape(-1), minlength=len(values)) / sum(f.size for f in found)
    largest = 1 + np.argsort(-shares[1:], kind="stable")[:MOST_CLASSES]
    largest = sorted(k for k in largest if shares[k])
    text = ", ".join(f"{values[k]}: {100 * shares[k]:.3g} %" for k in largest) or "no foreground"
    more = int(np.count_nonzero(shares[1:])) - len(largest)
    return f"{text} and {more} smaller" if more else text


def evaluate(options: argparse.Namespace) -> bool:
    # First the network and the files.
    for path in (options.json, options.report):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist; make it first")
    ready, cfg = open_checkpoint(options, "evaluate", "reconstruct")
    score = ready.task.evaluate or score_reconstruction
    items = list_inputs([options.data], ready.task.LABELS, "all" if options.split == "held-out" else options.split)
    if options.split == "held-out":
        items = held_out(items, ready)
    if ready.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ready.device)

    # Then a row for each volume, and its part of the report in a file: there may be thousands.
    rows, failed, totals = [], [], Totals()
    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(items, 1):
            with failures_in(failed, item.path):
                case = read_case(item, ready, cfg)
                several = len(case.volumes) > 1
                for t, (volume, _) in enumerate(case.volumes):
                    scored = score(ready, case, t, options, show_progress(item.path))
                    name = {"file": str(item.path), "volume": t} if several else {"file": str(item.path)}
                    rows.append(row_of(name, volume, scored))
                    totals.add(volume, scored)
                    if options.report:
                        part = report.figure(rows[-1], slices_of(case, t, scored.found))
                        Path(folder, f"{len(rows) - 1}.html").write_text(part, encoding="utf-8")
                    clear_line()
                    which = f" volume {t}" if several else ""
                    print(f"[{number}/{len(items)}] {data.show(item.path)}{which}: {row_text(rows[-1])}", flush=True)

        # Then all of them together.
        result = summary(ready, rows, failed, totals)
        print_table(result)
        if options.json:
            text = json.dumps(finite(result), indent=1) + "\n"
            save(Path(options.json), lambda file: file.write(text.encode()))
        if options.report and rows:
            chosen = worst_median_best(rows, *ranked_by(ready, rows))
            parts = {name: Path(folder, f"{index}.html").read_text(encoding="utf-8") for name, index in chosen.items()}
            page = report.evaluation_page(ready, result, parts, options.data)
            save(Path(options.report), lambda file: file.write(page.encode()))
    return tell_failures(failed, len(items))


def slices_of(case: Case, number: int, found: np.ndarray) -> dict:
    volume, intensity = case.volumes[number]
    label = label_of(case, number) if case.labels else None
    return report.slices_of(volume, found, label, intensity, case.spacing, case.origin.kind == ".png")


def open_checkpoint(options: argparse.Namespace, *needs: str) -> tuple[Ready, data.DataConfig]:
    """The network, with the command's flags put on it, and how its volumes are prepared.

    needs: what the command asks of a task, one of training.task.Task's. Raises ValueError for flags that do not fit.
    """
    ready = load(options.checkpoint, TASKS, needs, options.device, options.amp, getattr(options, "hints", None))
    labels = ready.task.LABELS and "evaluate" in needs
    cfg = data_config(ready, labels, **data_changes(options))
    ready.task.prepare(ready, options, cfg)
    print(describe(ready), flush=True)
    return ready, cfg


# ------------------------------------------------------------------------------------------------ command line

COMMANDS = {"reconstruct": (reconstruct, "volumes through the autoencoder and back, on their own grid and scale"),
            "encode": (encode, f"volumes -> STEM{latents.ENDING}: the latent mean, or the indices of codes"),
            "decode": (decode, f"STEM{latents.ENDING} -> volumes; equals reconstruct to the bit"),
            "segment": (segment, "volumes -> class numbers on their own grid"),
            "evaluate": (evaluate, "figures over a data set: a table, JSON, a page of pictures")}


def build_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (_, text) in COMMANDS.items():
        sub = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
                                  formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120))
        add = sub.add_argument
        add("--checkpoint", required=True, metavar="FILE_OR_RUN", help="best.pt, last.pt or a run folder" + (
            "; or an autoencoder's state dict of MONAI, MAISI ... (weights.py)" if name != "segment" else ""))
        if name != "segment":
            add("--hints", metavar="HINTS", help="what such a file cannot say: norm_num_groups=32,intensity_range=0,1 and / or the JSON or "
                "YAML file of its constructor's arguments")
        if name == "evaluate":
            add("--data", required=True, metavar="PATH", help="folder, file or datalist; with labels for a U-Net")
            add("--split", choices=("all", "held-out", "training", "validation", "testing"), default="all",
                help="held-out: files that the run did not train on; else a list of a datalist [all]")
            add("--json", metavar="FILE", help="write the figures")
            add("--report", metavar="FILE", help="write a page with the worst, median and best volume, self-contained HTML")
        else:
            add("--input", required=True, nargs="+", metavar="PATH", help="files, folders or datalists")
            add("--output", required=name != "segment", metavar="FOLDER", help="results keep their source's stem")
            add("--overwrite", action="store_true", help="make outputs that are there anew instead of skipping them")
        if name != "segment":
            add("--tile", default="auto", metavar="D,H,W", help="voxels a tile; auto: chosen within --memory; none: whole volumes")
            add("--memory", type=number("--memory", 0, math.inf), default=BUDGET, metavar="GIB",
                help=f"budget for which tile auto chooses, counted as for training: inference takes less [{BUDGET:g}]")
        if name == "encode":
            add("--sample", action="store_true", help="a sample of the latent instead of its mean (kl)")
            add("--seed", type=int, default=0, metavar="N", help="of --sample [0]")
        if name in ("segment", "evaluate"):
            add("--window", metavar="D,H,W", help="voxels a window of a U-Net [the crops that it was trained on]")
            add("--overlap", type=number("--overlap", -1e-9, 1), default=0.5, metavar="SHARE", help="of neighbouring windows [0.5]")
            add("--mask-threshold", type=number("--mask-threshold", 0, 1), metavar="P",
                help="two classes: foreground where its probability is above P [0.5]")
        if name == "segment":
            add("--viz", action="store_true", help="write STEM_viz.png: slices beside slices with a colour per class")
            add("--no-save", action="store_true", help="write no labels")
        add("--device", default="auto", metavar="NAME", help="auto | cuda | cuda:1 | mps | cpu [auto]")
        add("--amp", action="store_true", help="16-bit autocast: faster, no longer exact")
        hints = field_comments(data.DataConfig)
        for field in DATA_FLAGS + ("label_values",) * (name in ("segment", "evaluate")):
            add(f"--data.{field}", dest=f"data_{field}", metavar=field.upper(),
                help=hints.get(field, "").replace("%", "%%") + " [as in training]")
        sub.set_defaults(parser=sub)
    return parser


def number(flag: str, low: float, high: float) -> Callable[[str], float]:
    """A number strictly between low and high."""
    def parse(text: str) -> float:
        try:
            value = convert(text, float, flag)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must lie between {max(low, 0):g} and {high:g}, got {text}")
        return value
    return parse


def data_changes(options: argparse.Namespace) -> dict:
    hints = typing.get_type_hints(data.DataConfig)
    given = {field: getattr(options, f"data_{field}", None) for field in (*DATA_FLAGS, "label_values")}
    return {field: convert(value, hints[field], f"--data.{field}") for field, value in given.items() if value is not None}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 cannot start, 1 some inputs were refused, 130 / 143 / 138 after a signal."""
    try:
        with stopped_by_signals():
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False  # decode repeats what reconstruct does
            options, unknown = build_parser().parse_known_args(None if argv is None else list(argv))
            if unknown:                                          # the command's own parser knows which flag is the closest
                options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
            sizes = tuple[int, int, int] | None
            if getattr(options, "tile", "auto") not in ("auto", "none"):
                options.tile = convert(options.tile, sizes, "--tile")
            if getattr(options, "window", None) is not None:
                options.window = convert(options.window, sizes, "--window")
            if min(*(getattr(options, "window", None) or (1,)), 1) < 1:
                raise ValueError(f"--window needs three sizes of 1 or more, got {options.window}")
            return EXIT_DONE if COMMANDS[options.command][0](options) else EXIT_ERROR
    except Stopped as stop:
        number = stop.args[0]
        clear_line()
        print(f"stopped by {signal.Signals(number).name}; what is written is whole, and the same command goes on from there")
        return SIGNALS[number]
    except (ValueError, DataError) as error:
        print(f"predict.py: {data.show(explained(error))}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"predict.py: {data.show(explained(error))}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
