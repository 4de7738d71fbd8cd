"""Use a checkpoint: reconstruct, encode, decode and segment whole volumes of any size, sample new ones, and
evaluate the network on them.

    python predict.py reconstruct --checkpoint runs/ct/best.pt --input scan.nii.gz --output out/
    python predict.py encode      --checkpoint runs/ct --input FOLDER --output latents/
    python predict.py decode      --checkpoint runs/ct --input latents/ --output out/
    python predict.py segment     --checkpoint runs/seg --input scan.nii.gz --output out/ --viz
    python predict.py sample      --checkpoint runs/ldm --vae runs/ct --count 4 --output samples/
    python predict.py evaluate    --checkpoint runs/ct --data FOLDER --json out.json --report out.html
    python predict.py report      runs/a runs/b --output both.html    # curves and pictures of runs

`encode` writes the latent mean, or the indices of codes; `decode` after it equals `reconstruct`, to the bit.

The checkpoint alone says how a volume is prepared. What goes out lies on the source's grid: its affine, its
order of axes, its number type and its intensity scale, so HU come back as HU. An autoencoder runs by the
exact tiles of vae3d.py: no blending, no seams. A U-Net's receptive field is the whole volume, so it runs on
windows that overlap (nnU-Net, doi:10.1038/s41592-020-01008-z). Outputs are written whole or not at all. What
is there already is skipped, so an interrupted folder goes on with the same command.

The file reads top to bottom: the commands, what they share, the command line. What a network makes of a
volume is its task's (tasks/); training/ has a checkpoint ready to use, files on their way in and out, figures
and the report.

Shapes: C channels, D H W depth height width, T volumes of a 4-D file, K classes. Intensities in [-1, 1];
memory is in GiB. Version 0.3 (2026-11).
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")              # before torch loads; train.py says why

import argparse
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

import pictures
from tasks import TASKS
from training import evaluation, jobs, latents, report, run_page, sample_report, sampling, views
from training.cases import Case, label_of, read_case
from training.config import convert
from training.console import clear_line
from training.flags import Parser, field_comments
from training.foreign import explained
from training.jobs import Job
from training.order import seed_of
from training.plan import BUDGET, tiles_used
from training.ready import Ready, data_config, describe, load
from training.signals import SIGNALS, Stopped, stopped_by_signals
from volumes import formats
from volumes.config import DataConfig
from volumes.files import DataError, bare_name, short_digest, show, write_atomic
from volumes.grids import resample_label
from volumes.results import with_blank, write_mask, write_result

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
MOST_CLASSES = 12                                                # whose share of the voxels is printed

# Flags, besides those of `data`, with which a result is another one.
FLAGS_OF_RESULTS = ("amp", "sample", "seed", "window", "overlap", "mask_threshold", "viz",
                    "mask")

# Fields of the section `data` that a file may ask for, or that a foreign checkpoint does not know.
DATA_FLAGS = ("modality", "nan", "max_gib", "channel_axis", "select_channel", "four_d",
              "window", "hu_range", "percentiles", "percentiles_of", "voxel_scale", "spacing")

AUGMENTATIONS = ("flip", "jitter")                               # of the variants that `encode` makes


# -------------------------------------------------------------------------------- the commands
# Each opens the checkpoint, does its work for each of its files, and returns whether all went well.

def reconstruct(options: argparse.Namespace) -> bool:
    """Volumes -> what the network gives back of them, in files like their sources."""
    ready, cfg = open_checkpoint(options, "reconstruct")
    write = writer(options, cfg)

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), jobs.show_progress(job.item.path)
        started = time.monotonic()
        results = []
        for volume, intensity in case.volumes:
            recon = ready.task.reconstruct(ready, volume, tick)
            results.append((recon, intensity))
        speed = jobs.speed(case.arrays, started)
        write(job.output, results, case.affine, case.origin)
        return f"{speed}{tiles_used(ready.model)} -> {job.output}"

    items = jobs.list_inputs(options.input, output=options.output)
    todo = jobs.make_jobs(items, options.output, formats.ending_out, made_by(options, ready, cfg))
    return jobs.run_jobs(todo, work, options.overwrite)


def writer(options: argparse.Namespace, cfg: DataConfig) -> Callable:
    """What writes a result: write_result or, with --mask, write_mask.

    Raises ValueError where the checkpoint knows no surface.
    """
    if not options.mask:
        return write_result
    if cfg.surface == "none":
        raise ValueError("--mask: the inside of a surface; this checkpoint was trained without data.surface")
    return write_mask


def encode(options: argparse.Namespace) -> bool:
    """Volumes -> latent files (training/latents.py)."""
    ready, cfg = open_checkpoint(options, "encode")
    if not ready.facts["latent"] and ready.task.latent_kind(ready).codes is None:
        why = "not from train.py" if ready.facts["step"] is None else "its run has not finished"
        print(f"{ready.path}: {why}, so the latent's scale factor is not known (nan)")
    variants = latents.with_variants(jobs.list_inputs(options.input, output=options.output),
                                     options.variants, cfg)
    subjects = {(item.path, item.known_as): subject for item, subject in variants}

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), jobs.show_progress(job.item.path)
        subject = subjects[job.item.path, job.item.known_as]
        case = latents.augmented(case, subject, cfg, options.seed)
        started = time.monotonic()
        arrays = []
        for number, volume in enumerate(case.arrays):
            generator = None
            if options.sample:                                   # the same noise each time for this file
                seed = seed_of(options.seed, "sample", f"{job.item.known_as}{latents.ENDING}", number)
                generator = torch.Generator().manual_seed(seed)
            arrays.append(ready.task.encode(ready, volume, generator, tick))
        speed = jobs.speed(case.arrays, started)
        found = latents.of_case(case, arrays, ready, subject)
        latents.write(job.output, found, ready, options.sample)
        return f"{speed}{tiles_used(ready.model)} -> {job.output}"

    items = [item for item, _ in variants]
    todo = jobs.make_jobs(items, options.output, lambda path: latents.ENDING, made_by(options, ready, cfg))
    return jobs.run_jobs(todo, work, options.overwrite)


def decode(options: argparse.Namespace) -> bool:
    """Latent files -> volumes, in files like the sources that were encoded."""
    ready, cfg = open_checkpoint(options, "decode")
    write = writer(options, cfg)

    def work(job: Job) -> str:
        found, tick = latents.read(job.item.path, ready), jobs.show_progress(job.item.path)
        if found.fingerprint != ready.fingerprint:
            print(f"{show(job.item.path)}: was encoded with other weights than {ready.path}")
        started = time.monotonic()
        volumes = [ready.task.decode(ready, array, found.size, tick) for array in found.arrays]
        speed = jobs.speed(volumes, started)
        results = list(zip(volumes, found.intensities))
        write(job.output, results, found.affine, found.origin)
        return f"{speed}{tiles_used(ready.model)} -> {job.output}"

    items = jobs.list_latents(options.input)
    todo = jobs.make_jobs(items, options.output, latents.ending_of_source, made_by(options, ready, cfg))
    return jobs.run_jobs(todo, work, options.overwrite)


def segment(options: argparse.Namespace) -> bool:
    """Volumes -> labels on their sources' grid, and on request pictures of them."""
    if options.output is None and (options.viz or not options.no_save):
        raise ValueError("--output FOLDER is needed, unless --no-save is given without --viz")
    ready, cfg = open_checkpoint(options, "segment")
    values = cfg.label_values                                    # that stand for the classes on disk
    if values is None:
        values = range(ready.classes)
    values = np.array(values)

    def work(job: Job) -> str:
        case, tick = read_case(job.item, ready, cfg), jobs.show_progress(job.item.path)
        started = time.monotonic()
        found = []
        for volume, intensity in case.volumes:
            classes = ready.task.segment(ready, volume, options.window, options.overlap, intensity.background,
                                         options.mask_threshold, case.origin.size, tick)
            found.append(classes)
        text = jobs.speed(case.arrays, started)

        # The labels go last: their presence says that the job is done.
        if options.viz:
            save_overlay(viz_path(job.output), case, found[0])
        if not options.no_save:
            stored = values[with_blank(found, case.origin)]
            labels = stored.astype(np.uint8 if values.max() < 256 else np.int16)
            formats.write_label(job.output, labels, case.origin)
        text += f"; {shares_text(found, values, ready.facts['data'].get('class_names'))}"
        return text if options.no_save else f"{text} -> {job.output}"

    items = jobs.list_inputs(options.input, output=options.output)
    if options.output is None:
        todo = [Job(item, Path()) for item in items]
    else:
        todo = jobs.make_jobs(items, options.output, formats.ending_out, made_by(options, ready, cfg))
    return jobs.run_jobs(todo, work, options.overwrite or options.no_save)


def save_overlay(path: Path, case: Case, found: np.ndarray) -> None:
    """Slices of the first volume beside the same slices with a colour for each class. found (D, H, W)."""
    volume, intensity = case.volumes[0]
    found = torch.from_numpy(resample_label(found, volume.shape[1:]))
    shown = views.of_labels(torch.from_numpy(volume), {"Found": found}, case.spacing, intensity,
                            is_picture=case.is_picture)
    write_atomic(path, lambda file: file.write(pictures.png(shown.sheet())))


def viz_path(output: Path) -> Path:
    return output.with_name(bare_name(output.name) + "_viz.png")


def shares_text(found: Sequence[np.ndarray], values: np.ndarray, names: Sequence[str] | None = None) -> str:
    """The largest classes with their share of all voxels, in the order of their numbers.

    values: on disk; names: of the classes.
    """
    shares = np.bincount(np.stack(found).reshape(-1), minlength=len(values)) / sum(f.size for f in found)
    by_size = 1 + np.argsort(-shares[1:], kind="stable")         # class 0 is the background
    largest = sorted(k for k in by_size[:MOST_CLASSES] if shares[k])
    if not largest:
        return "no foreground"
    called = [str(value) for value in values]
    if names is not None and len(names) == len(values):
        called = [f"{value} {name}" for value, name in zip(values, names)]
    text = "share of label " + ", ".join(f"{called[k]}: {100 * shares[k]:.3g} %" for k in largest)
    more = int(np.count_nonzero(shares[1:])) - len(largest)
    return f"{text} and {more} smaller" if more else text


def evaluate(options: argparse.Namespace) -> bool:
    """A data set -> figures of each volume and of all: a table, and on request JSON and a page.

    With --samples figures of these beside the data set (training/sample_report.py).
    """
    # First the network and the files.
    for path in (options.json, options.report):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: its folder does not exist; make it first")
    if options.samples:
        ready = load(options.checkpoint, TASKS, ("denoise",), "cpu") if options.checkpoint else None
        cfg = sample_report.prepared_like(ready, data_changes(options))
        return sample_report.evaluate_samples(options, ready, cfg)
    if options.checkpoint is None:
        raise ValueError("--checkpoint is needed: the network to evaluate; without one --samples FOLDER")
    ready, cfg = open_checkpoint(options, "evaluate", "reconstruct")
    score = ready.task.evaluate or evaluation.score_reconstruction
    is_held_out = options.split == "held-out"
    items = jobs.list_inputs([options.data], ready.task.LABELS, "all" if is_held_out else options.split)
    items = evaluation.chosen(items, ready, is_held_out)
    if ready.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ready.device)

    # Then a row for each volume, and its part of the report in a file: there may be thousands of them.
    rows, failed, totals = [], [], evaluation.Totals()
    with tempfile.TemporaryDirectory() as folder:
        for number, item in enumerate(items, 1):
            with jobs.failures_in(failed, item.path):
                case = read_case(item, ready, cfg)
                for t, volume in enumerate(case.arrays):
                    scored = score(ready, case, t, options, jobs.show_progress(item.path))
                    totals.add(volume, scored)
                    rows.append(evaluation.row_of(item, case, t, scored))
                    if options.report:
                        part = report.figure(rows[-1], views_of(case, t, scored.found, cfg))
                        part_file(folder, len(rows) - 1).write_text(part, encoding="utf-8")
                    clear_line()
                    which = f" volume {case.numbers[t]}" if case.numbers else ""
                    name = f"[{number}/{len(items)}] {show(item.path)}{which}"
                    print(f"{name}: {evaluation.row_text(rows[-1])}{tiles_used(ready.model)}", flush=True)

        # Then all of them together: a table, the figures as JSON, a page with the worst, median and best.
        result = evaluation.summary(ready, rows, failed, totals)
        evaluation.print_table(result)
        if options.json:
            text = json.dumps(evaluation.finite(result), indent=1) + "\n"
            write_atomic(Path(options.json), lambda file: file.write(text.encode()))
        if options.report and rows:
            chosen = evaluation.worst_median_best(rows, *evaluation.ranked_by(ready, rows))
            parts = {name: part_file(folder, row).read_text(encoding="utf-8") for name, row in chosen.items()}
            page = report.evaluation_page(ready, result, parts, options.data)
            write_atomic(Path(options.report), lambda file: file.write(page.encode()))
    return jobs.tell_failures(failed, len(items))


def part_file(folder: str, number: int) -> Path:
    return Path(folder, f"{number}.html")


def views_of(case: Case, number: int, found: np.ndarray, cfg: DataConfig) -> views.Views:
    """Pictures of one volume, of its label where it has one, and of what the network made of it."""
    (volume, intensity), found = case.volumes[number], torch.from_numpy(found)
    window = views.window_limits("auto", cfg.window, intensity)
    rest = case.spacing, intensity, window, case.is_picture
    if case.labels:
        pair = {"Label": torch.from_numpy(label_of(case, number)), "Found": found}
        return views.of_labels(torch.from_numpy(volume), pair, *rest)
    return views.of_reconstruction(torch.from_numpy(volume), found, *rest)


def report_runs(options: argparse.Namespace) -> bool:
    """Run folders -> report.html, of several runs with one set of curves."""
    folders = [Path(name) for name in options.runs]
    output = Path(options.output or folders[0] / run_page.NAME)
    if options.output is None and len(folders) > 1:
        output = Path(run_page.NAME)                             # the page of the first run stays its own
    run_page.write_page(folders, output)
    print(f"report of {len(folders)} run{'s' if len(folders) > 1 else ''} -> {output}")
    return True


def sample(options: argparse.Namespace) -> bool:
    """Noise -> volumes, by a denoiser of latents and their autoencoder (training/sampling.py)."""
    denoiser, _ = open_checkpoint(options, "denoise")
    vae = load(options.vae, TASKS, ("decode",), options.device, options.amp)
    vae.task.prepare(vae, options, data_config(vae))
    print(describe(vae), flush=True)
    sampling.sample(options, denoiser, vae, jobs.show_progress)
    return True


# -------------------------------------------------------------------------------- what they share

def open_checkpoint(options: argparse.Namespace, *needs: str) -> tuple[Ready, DataConfig]:
    """The network with the command's flags put on it, and how its volumes are prepared.

    needs: names of training.task.Task, of which the network's task must have one. Raises ValueError for a
    network of another task, and for flags that do not fit it.
    """
    hints = getattr(options, "hints", None)
    ready = load(options.checkpoint, TASKS, needs, options.device, options.amp, hints)
    with_labels = options.command == "evaluate" and ready.task.LABELS
    cfg = data_config(ready, with_labels, **data_changes(options))
    ready.task.prepare(ready, options, cfg)
    print(describe(ready), flush=True)
    if ready.facts["step"] == 0:
        print(f"{ready.path}: weights of step 0, the untrained network: no later validation of its run was "
              "better", flush=True)
    return ready, cfg


def made_by(options: argparse.Namespace, ready: Ready, cfg: DataConfig) -> str:
    """Text that differs where a command's results for one file would."""
    flags = [getattr(options, name, None) for name in FLAGS_OF_RESULTS]
    prepared = cfg.voxel_settings(), cfg.label_values
    if getattr(options, "variants", 1) > 1:
        prepared = *prepared, cfg.flip, cfg.jitter
    return short_digest(repr((options.command, ready.fingerprint, flags, prepared)))


def data_changes(options: argparse.Namespace) -> dict:
    """The fields of the section `data` that flags give."""
    hints = typing.get_type_hints(DataConfig)
    changes = {}
    for field in (*DATA_FLAGS, *AUGMENTATIONS, "label_values"):
        value = getattr(options, f"data_{field}", None)
        if value is not None:
            changes[field] = convert(value, hints[field], f"--data.{field}")
    return changes


# -------------------------------------------------------------------------------- command line

COMMANDS = {
    "reconstruct": (reconstruct, "volumes through the autoencoder and back, on their own grid and scale"),
    "encode": (encode, f"volumes -> STEM{latents.ENDING}: the latent mean, or the indices of codes"),
    "decode": (decode, f"STEM{latents.ENDING} -> volumes; equals reconstruct to the bit"),
    "segment": (segment, "volumes -> class numbers on their own grid"),
    "sample": (sample, "volumes out of noise, by a denoiser of latents and their autoencoder"),
    "report": (report_runs, "curves and pictures of runs, side by side, as one page"),
    "evaluate": (evaluate, "figures over a data set: a table, JSON, a page of pictures"),
}


def build_parser() -> Parser:
    parser = Parser(prog="predict.py", description=__doc__.split("\n\n")[0], allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)
    for name, (_, text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=text, description=text[0].upper() + text[1:] + ".", allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=120))
        add_flags(name, command.add_argument)
        command.set_defaults(parser=command)
    return parser


def add_flags(command: str, add: Callable) -> None:
    """The flags of one command. add: argparse's add_argument."""
    if command == "report":
        add("runs", nargs="+", metavar="RUN", help="run folders of train.py")
        add("--output", metavar="FILE", help="[RUN/report.html; of several runs report.html here]")
        return
    of_autoencoder = command not in ("segment", "sample")
    of_unet = command in ("segment", "evaluate")

    # The network.
    foreign = "; or an autoencoder's state dict of MONAI, MAISI ... (weights.py)" if of_autoencoder else ""
    add("--checkpoint", required=command != "evaluate", metavar="FILE_OR_RUN",
        help=f"best.pt, last.pt or a run folder{foreign}")
    if of_autoencoder:
        add("--hints", metavar="HINTS",
            help="what such a file cannot say: norm_num_groups=32,intensity_range=0,1 and / or the JSON or "
                 "YAML file of its constructor's arguments")

    # The files.
    if command == "sample":
        sampling.add_flags(add)
    elif command == "evaluate":
        add("--data", required=True, metavar="PATH", help="folder, file or datalist; with labels for a U-Net")
        add("--split", choices=("all", "held-out", "training", "validation", "testing"), default="all",
            help="held-out: files that the run did not train on; else a list of a datalist [all]")
        add("--samples", metavar="FOLDER",
            help="volumes of `sample`, compared with --data; --checkpoint: their denoiser, which knows its "
                 "training cases")
        add("--features", metavar="FILE_OR_RUN", help="of --samples: a run of --task features [random ones]")
        add("--tolerance", type=number_between("--tolerance", -1e-9, math.inf), default=2.0, metavar="MM",
            help="surfaces that lie no further apart count as equal for surface Dice [2]")
        add("--json", metavar="FILE", help="write the figures")
        add("--report", metavar="FILE",
            help="write a page with the worst, median and best volume, self-contained HTML")
    else:
        add("--input", required=True, nargs="+", metavar="PATH", help="files, folders or datalists")
        add("--output", required=command != "segment", metavar="FOLDER",
            help="results keep their source's name and folders")
        add("--overwrite", action="store_true",
            help="make outputs that are there anew instead of skipping them")

    # How the network runs.
    if of_autoencoder:
        add("--tile", default="auto", metavar="D,H,W",
            help="voxels a tile; auto: chosen within --memory; none: whole volumes")
        add("--memory", type=number_between("--memory", 0, math.inf), default=BUDGET, metavar="GIB",
            help=f"budget for which tile auto chooses, counted as for training: inference takes less "
                 f"[{BUDGET:g}]")
    if command in ("reconstruct", "decode"):
        add("--mask", action="store_true",
            help="of distances from a surface (--task sparse): 1 inside, 0 outside, instead of the distances")
    if command == "encode":
        add("--sample", action="store_true", help="a sample of the latent instead of its mean (kl)")
        add("--variants", type=whole_number("--variants"), default=1, metavar="K",
            help="latents of each volume: itself, and K - 1 augmented ones by data.flip and data.jitter [1]")
        add("--seed", type=int, default=0, metavar="N", help="of --sample and --variants [0]")
    if of_unet:
        add("--window", metavar="D,H,W", help="voxels a window of a U-Net [the crops that it was trained on]")
        add("--overlap", type=number_between("--overlap", -1e-9, 1), default=0.5, metavar="SHARE",
            help="of neighbouring windows [0.5]")
        add("--mask-threshold", type=number_between("--mask-threshold", 0, 1), metavar="P",
            help="two classes: foreground where its probability is above P [0.5]")
    if command == "segment":
        add("--viz", action="store_true",
            help="write STEM_viz.png: slices beside slices with a colour per class")
        add("--no-save", action="store_true", help="write no labels")
    add("--device", default="auto", metavar="NAME", help="auto | cuda | cuda:1 | mps | cpu [auto]")
    add("--amp", action="store_true", help="16-bit autocast: faster, no longer exact")

    # How the volumes are prepared, where that is not as the run prepared its own.
    comments = field_comments(DataConfig)
    fields = (*DATA_FLAGS, "label_values") if of_unet else DATA_FLAGS
    if command == "encode":
        fields = (*DATA_FLAGS, *AUGMENTATIONS)
    if command == "sample":                                      # which prepares no volumes
        fields = ()
    for field in fields:
        text = comments.get(field, "").replace("%", "%%")
        add(f"--data.{field}", dest=f"data_{field}", metavar=field.upper(), help=f"{text} [as in training]")


def number_between(flag: str, low: float, high: float) -> Callable[[str], float]:
    """For argparse: a number strictly between the two."""
    def parse(text: str) -> float:
        try:
            value = convert(text, float, flag)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if not low < value < high:
            raise argparse.ArgumentTypeError(f"must lie between {max(low, 0):g} and {high:g}, got {text}")
        return value
    return parse


def whole_number(flag: str) -> Callable[[str], int]:
    """For argparse: a whole number of at least 1."""
    def parse(text: str) -> int:
        try:
            value = convert(text, int, flag)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if value < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
        return value
    return parse


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises ValueError, one line, for flags that no command has or that cannot be meant."""
    options, unknown = build_parser().parse_known_args(None if argv is None else list(argv))
    if unknown:                                                  # the command's parser knows the closest flag
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    sizes = tuple[int, int, int] | None
    if getattr(options, "tile", "auto") not in ("auto", "none"):
        options.tile = convert(options.tile, sizes, "--tile")
    if getattr(options, "window", None) is not None:
        options.window = convert(options.window, sizes, "--window")
        if options.window is not None and min(options.window) < 1:
            raise ValueError(f"--window needs three sizes of 1 or more, got {options.window}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 cannot start, 1 some inputs were refused, 130 / 143 / 138 after a signal."""
    try:
        with stopped_by_signals():
            torch.backends.cudnn.deterministic = True            # decode repeats what reconstruct does
            torch.backends.cudnn.benchmark = False
            options = parse(argv)
            command, _ = COMMANDS[options.command]
            return EXIT_DONE if command(options) else EXIT_ERROR
    except Stopped as stop:
        number = stop.args[0]
        clear_line()
        print(f"stopped by {signal.Signals(number).name}; what is written is whole, and the same command "
              f"goes on from there")
        return SIGNALS[number]
    except (ValueError, DataError) as error:
        print(f"predict.py: {show(explained(error))}", file=sys.stderr)
        return EXIT_USAGE
    except OSError as error:
        print(f"predict.py: {show(explained(error))}", file=sys.stderr)
        return EXIT_ERROR


if __name__ == "__main__":
    sys.exit(main())
