"""Train a 3D VAE, VQ-VAE or U-Net with one command.

    python train.py --preset ultra_lightweight --amp --accum 8      # no data named: synthetic volumes
    python train.py --data FOLDER --patch 32,96,96 --steps 2000 --out runs/ct
    python train.py --resume runs/ct                                # goes on bit for bit
    python train.py --task seg --data FOLDER                        # a U-Net on image/label pairs
    python train.py --task features --data FOLDER                   # for loss.perceptual_features
    torchrun --nproc_per_node 4 train.py --data FOLDER              # 4 GPUs: batch x accum x 4 crops a step

This is the one place that wires configuration, data, networks, step, checkpoints and logs: from the top the
command, the run, the loop. What is trained is a task's (tasks/), one step is training/step.py's.

Shapes: B batch, C channels, D H W depth height width. Intensities in [-1, 1], so PSNR and SSIM have data
range 2. Memory is in GiB. Version 0.3 (2026-11).
"""
from __future__ import annotations

import os

# Before torch loads. Threads that wait now sleep: on a shared core steps were 5 times slower without.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import signal

if __name__ == "__main__":
    # Until main() catches Ctrl-C, it ends the process without a traceback out of an import.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import errno
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from tasks import TASKS
from training import checkpoints, edges, ranks
from training.adversary import disc_rate
from training.capacity import dry_run_text
from training.config import TrainConfig, changed, config_dict
from training.console import line_of, tell
from training.devices import gpu_use, peak_gib, pick_device, set_backend
from training.facts import facts_of, is_same_training
from training.fit import check_memory
from training.flags import build_parser, load_config
from training.folder import open_folder, run_folder, save_last
from training.foreign import explained
from training.log import Log, codebook_use, log_histograms, open_sinks
from training.opening import conclude, introduce
from training.order import MicroBatch, learning_rate, step_batches
from training.resume import full_weights, keep_global_batch, restore, resumed_config, start_from
from training.run import Run, recovered, save_config, stopped_early
from training.run_page import keep_page
from training.signals import SIGNALS, RunStopped, Stopped, caught_signals, stopped_by_signals
from training.stages import Stage, open_stages, planned
from training.state import State, tensors_of
from training.step import train_step
from training.task import Task, of
from training.validation import check_best, save_samples, validation, weights_to_ship
from volumes.files import DataError, StoreError

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2


# -------------------------------------------------------------------------------- the command

def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 cannot start, 1 stopped by an error with the state kept.

    After SIGINT, SIGTERM and SIGUSR1: 130, 143, 138.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    numbers = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    given = [os.environ.get(name, alone) for name, alone in numbers.items()]
    try:
        if not all(value.isdecimal() for value in given):
            raise ranks.CannotStart(f"RANK, WORLD_SIZE, LOCAL_RANK are {', '.join(given)}: numbers that "
                                    "torchrun sets; unset them")
        with ranks.started(*map(int, given)):
            return command(argv)
    except ranks.CannotStart as error:
        print(f"train.py: {line_of(error)}", file=sys.stderr)
        return EXIT_USAGE


def command(argv: Sequence[str]) -> int:
    """main() on one rank, with each way in which a run may end as a line and its exit code."""
    try:
        with stopped_by_signals():
            return start(argv)
    except Stopped as stop:
        number = stop.args[0]
        tell(f"stopped by {signal.Signals(number).name} before there was anything new to save; the same "
             "command begins again")
        return SIGNALS[number]
    except ranks.Elsewhere:
        return ranks.exit_code(EXIT_ERROR)
    except (RunStopped, StoreError) as error:
        return told(line_of(error), EXIT_ERROR)
    except OSError as error:
        return told(disk_text(error, None), EXIT_ERROR)
    except (ValueError, DataError) as error:
        return told(explained(error), EXIT_USAGE)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            return told(f"{line_of(error)}; out of memory? go on with --resume and fewer --workers, 0 for "
                        "none", EXIT_ERROR)
        if not ranks.is_lost(error):
            raise
        return told(lost_text(error, None), EXIT_ERROR)


def start(argv: Sequence[str]) -> int:
    """From the flags to a run.

    The first rank reads and chooses. What it found goes to the others, which need the data and no more.
    """
    # First what is asked for: flags, and where a run is resumed its config.
    options = ranks.together(lambda: vars(build_parser(TASKS).parse_args(argv)))
    dry = options.get("dry_run", False)
    # What a dry run prints is a config file.
    say = say_as_comment if dry else tell
    resumed, base, out = None, None, None
    if "resume" in options:
        resumed = ranks.from_rank(0, lambda: checkpoints.load_resumed(Path(options["resume"]), say))
        out = resumed.path.parent
        base = resumed_config(resumed.content, resumed.path)
    cfg = ranks.from_rank(0, lambda: load_config(argv, TASKS, base, say))
    task = of(TASKS, cfg)
    out = out or ranks.from_rank(0, lambda: run_folder(cfg))
    cfg = changed(cfg, train={"out": str(out)})

    with endings_of(out):
        # Then the device: a card that is not here can be predicted for.
        ranks.alike(cfg.memory.tile_parallel)
        for text in set_backend(cfg):
            say(text)
        if dry and cfg.train.device.startswith("cuda"):
            device = torch.device(cfg.train.device)
        else:
            device = ranks.together(lambda: pick_device(cfg.train.device))
        if device.type == "cuda" and ranks.world() > 1:
            torch.cuda.set_device(device)

        # Then the data of every stage, and what they say of the config, which nothing changes from here on.
        known = resumed and resumed.content["data"]
        cfg, opened = ranks.together(lambda: open_stages(cfg, task, say, known))
        every = ranks.of_every_rank([tuple(facts_of(opened[0].dataset)["training"])])
        seen = [len(names) for names in dict.fromkeys(every)]
        if len(seen) > 1:
            raise DataError(f"{cfg.data.path}: the ranks see different training volumes "
                            f"({', '.join(map(str, seen))} of them); give every machine the same data")
        if resumed is not None:
            keep_global_batch(cfg, base, resumed.content, say)
        if "fit" in options:
            budget = options["fit"]
            section = ranks.from_rank(0, lambda: edges.fit_largest(opened, task, device, budget, say))
            cfg, opened = edges.with_memory(cfg, opened, section)

        # Then the run, or what it would be.
        if not dry:
            ranks.together(lambda: [check_memory(stage.cfg, task, device) for stage in opened])
            return train(cfg, task, device, opened, out, resumed)
        if ranks.first():
            def peaks_on(kind: torch.device) -> list[str]:
                return edges.peaks_of(opened, task, kind)
            print(dry_run_text(cfg, task, TASKS, device, "verbose" in options, peaks_on), end="")
        return EXIT_DONE


def say_as_comment(text: str) -> None:
    tell(f"# {text}")


@contextlib.contextmanager
def endings_of(out: Path) -> Iterator[None]:
    """What a disk or a lost rank does to the run in folder `out` leaves as RunStopped.

    Its message says how to go on.
    """
    try:
        yield
    except OSError as error:
        raise RunStopped(disk_text(error, out)) from None
    except RuntimeError as error:
        if not ranks.is_lost(error):
            raise
        raise RunStopped(lost_text(error, out)) from None


def told(text: str, code: int) -> int:
    """The exit code of all ranks. The first of them that has something to tell tells it, in one line."""
    if not ranks.speaks(code):
        return ranks.exit_code(code)
    print(f"train.py: {ranks.place()}{text}", file=sys.stderr)
    return code


def disk_text(error: OSError, out: Path | None) -> str:
    """An OSError as a line: the file, what is wrong, what to do."""
    if error.errno == errno.ENOENT and out is not None and not out.is_dir():
        return f"{out}: the run folder is gone, and the state with it; start the run again"
    remedies = {
        errno.ENOSPC: "free some space",
        errno.EDQUOT: "free some space or have the quota raised",
        errno.EFBIG: "raise the limit on a file's size",
        errno.EROFS: "make it writable",
        errno.EACCES: "make it writable",
        errno.EPERM: "make it writable",
    }
    has_state = out is not None and any((out / name).is_file() for name in ("last.pt", "last.prev.pt"))
    after = f"go on with: {resume_command(out)}" if has_state else "start the run again"
    where, what = error.filename or "disk or network", error.strerror or line_of(error)
    return f"{where}: {what}; {remedies.get(error.errno, 'see to it')}, then {after}"


def lost_text(error: RuntimeError, out: Path | None) -> str:
    """A collective that failed, as a line."""
    # gloo knows no more than that a rank is gone, but NCCL's message may be about the card.
    why = "" if "gloo" in str(error) else f" ({line_of(error)[:160]})"
    text = f"another rank is gone or does not answer{why}"
    if out is not None and (out / "last.pt").exists():
        text += f"; go on with: {resume_command(out)}"
    return text


def resume_command(out: Path) -> str:
    """What goes on with the run, on as many processes as now."""
    each = ranks.on_this_machine()
    nodes = f"--nnodes {ranks.world() // each} " if ranks.world() > each else ""
    launcher = "python" if ranks.world() == 1 else f"torchrun {nodes}--nproc_per_node {each}"
    return f"{launcher} train.py --resume {shlex.quote(str(out))}"


# -------------------------------------------------------------------------------- the run

def train(cfg: TrainConfig, task: Task, device: torch.device, opened: Sequence[Stage], out: Path,
          resumed: checkpoints.Resumed | None = None) -> int:
    """Run from step 0 or from a checkpoint to the end, an early stop or a signal; returns the exit code.

    Raises DataError or ValueError when the run cannot start, RunStopped or OSError when it cannot go on.
    """
    # First the state: as at step 0, as in the checkpoint, or from weights that are there.
    checkpoint = resumed.content if resumed is not None else None
    codebook_stage = opened[0].cfg.train.stage
    if codebook_stage and cfg.train.init is None and checkpoint is None:
        raise ValueError(f"train.stage {codebook_stage} goes on from a trained autoencoder; name its run "
                         "folder or checkpoint with --init")
    state = edges.begin(cfg, opened, task, device, checkpoint)
    # What a rank finds of its CPU's bf16 may differ from what the first one finds.
    state.amp_dtype = ranks.from_rank(0, lambda: state.amp_dtype)
    if checkpoint is not None:
        restore(state, checkpoint, resumed.path)
    # Only now, since a checkpoint says how many crops a step has, and which stages have ended.
    stages = planned(cfg, opened, state.global_batch, state.edges)
    stage = stages[len(state.edges)]
    # A resumed run may be over already, or have other data than it began with.
    if checkpoint is not None:
        is_over = state.step >= stage.end or stopped_early(stage.cfg, state)
        if state.finished and is_over and stage is stages[-1]:
            print(f"{out}: finished at step {state.step}; nothing to do")
            return EXIT_DONE
        if not is_same_training(checkpoint["data"], stage.dataset):
            print(f"{out}: the training volumes are not those that the run began with, so it goes on, but "
                  "not bit for bit")
        state.finished = False
    # A new run may start from weights. Its codebook is new, unless they hold one.
    started_from, has_codebook = [], checkpoint is not None
    if cfg.train.init is not None and checkpoint is None:
        source, hints = Path(cfg.train.init), cfg.train.init_hints
        started_from, has_codebook = ranks.from_rank(0, lambda: start_from(state, source, hints))
        if codebook_stage == 2 and not has_codebook:
            raise ValueError(f"train.stage 2 goes on from stage 1, but {cfg.train.init} holds no codebook "
                             f"of vae.num_codes={cfg.vae.num_codes}; run --train.stage 1 first")
    # What the dials leave to `auto` is chosen here, for the whole run.
    opened, plans = edges.settle_dials(opened, state)
    stages = planned(cfg, opened, state.global_batch, state.edges)

    # Then the run folder: its lock and the log are closed however the run ends.
    with contextlib.ExitStack() as closing:
        ranks.together(lambda: open_folder(cfg, out, resumed, closing) if ranks.first() else None)
        names, number = [each.name for each in opened], len(state.edges)
        memory_of = "" if device.type == "cuda" else " of this process"
        log = Log(cfg, out, stages[-1].end, state.step, open_sinks(cfg, out), state.validated, memory_of,
                  behind=names[:number], ahead=names[number + 1:])
        closing.enter_context(contextlib.closing(log))
        run = Run(cfg, opened, stages, state, device, out, log)
        edges.attach(run)
        save_config(run)
        introduce(run, started_from, plans)

        # Then the loop, and a last barrier: torchrun ends the other ranks as soon as one has left, so none
        # leaves before all is saved.
        with caught_signals() as run.received:
            stopped_by = loop(run, has_codebook, resumed is not None)
            # The files are closed in here, where a signal to this rank does not stop it any more.
            closing.close()
            ranks.barrier()
    if state.finished:
        return EXIT_DONE if conclude(run) else EXIT_ERROR
    tell(f"stopped by {signal.Signals(stopped_by).name} at step {state.step}, state saved; go on with: "
         f"{resume_command(out)}")
    return SIGNALS[stopped_by]


# -------------------------------------------------------------------------------- the loop

def loop(run: Run, has_codebook: bool, is_resumed: bool) -> int:
    """Steps, and what is due between them. Returns the signal that stopped it, 0 for none."""
    state = run.state
    # First what a run begins with. Stopped in here, it has nothing to save.
    if not has_codebook:
        state.task.start(run)
    ranks.take_from_first(tensors_of(state))

    try:
        # Then what is due before a step: at step 0, and what a stopped run left undone.
        replaced = is_resumed and state.best is not None and check_best(run)
        if (settle(run) or replaced) and ranks.first():
            save_last(run)

        # Then stage after stage; without train.stages there is one.
        while True:
            stopped_by = steps_of_stage(run)
            if stopped_by or not edges.next_stage(run):
                return stopped_by
            settle(run)
            if ranks.first():
                save_last(run)
    # Stopped within settle() or check_best(): the state says what is undone.
    except Stopped as stop:
        if ranks.first():
            save_last(run, keep=False)
        return stop.args[0]


def steps_of_stage(run: Run) -> int:
    """Step after step, to the end of the stage or a signal, which is returned.

    A signal to one rank ends all of them after the same step.
    """
    cfg, state, stage = run.cfg, run.state, run.stage
    steps, start = range(state.step, state.step if run.over else stage.end), (stage.first, stage.first_crop)
    for step, micro_batches in step_batches(cfg, run.crops, steps, run.device, stage.global_batch, start):
        train_and_log(run, step, micro_batches)
        if cfg.log.ddp_check and state.step % cfg.log.ddp_check == 0:
            compare_ranks(state)
        settle(run)
        stopped_by = int(ranks.largest(run.received[0] if run.received else 0))
        if ranks.first() and (state.finished or stopped_by or state.step % cfg.train.save_every == 0):
            save_last(run)
        if run.over or stopped_by:
            return stopped_by
    return 0


def train_and_log(run: Run, step: int, micro_batches: list[MicroBatch]) -> None:
    """One optimizer step and its row; stops the run after train.nan_limit non-finite ones in a row."""
    cfg, state, stage, log = run.cfg, run.state, run.stage, run.log
    # First the step, with recovery from out of memory around it.
    started = time.monotonic()
    rate = learning_rate(cfg.optim, step - stage.first, stage.steps, state.plateau[1])
    set_rates(cfg, state, rate)
    window = stage.crops_of(step)
    crops = len(window)
    shape = (min(crops, cfg.train.batch), run.dataset.channels, *run.dataset.patch)
    result = recovered(run, shape, lambda: train_step(cfg, state, micro_batches))
    if state.graphs is not None and (news := state.graphs.news(cfg, state)):
        log.say(news)
    terms = {name: float(term) for name, term in result.terms.items()}
    seconds = time.monotonic() - started
    state.step = step + 1

    # Then the row: terms, rate, speed and memory; and what only some steps have.
    voxels = crops * math.prod(run.dataset.patch)
    row = {"step": state.step, "epoch": stage.epoch_of(step), "split": "train", **terms, "lr": rate}
    row |= {"grad_norm": float(result.norm), "seconds": round(seconds, 4)}
    row |= {"voxels_per_second": round(voxels / seconds)}
    row |= {"peak_gib": round(ranks.largest(peak_gib(run.device)), 4), **gpu_use(run.device)}
    if result.updated:
        state.bad_steps = 0
    else:
        row |= {"skipped": True, "files": files_of(run, micro_batches)}
        note_bad_step(run, terms["loss"], row["files"])
    if state.usage is not None and (window.stop % stage.epoch_length == 0 or state.step == stage.end):
        row |= codebook_use(state.usage)
        state.usage.zero_()
    log.row(row)
    if log.sinks and cfg.log.histogram_every and state.step % cfg.log.histogram_every == 0:
        log_histograms(log, state)
    if state.bad_steps >= cfg.train.nan_limit:
        stop_with_reproducer(run, step, row["files"], micro_batches)


def set_rates(cfg: TrainConfig, state: State, rate: float) -> None:
    """The discriminator's rate follows the same schedule, in proportion to its own highest rate."""
    for settings in state.optimizer.param_groups:
        settings["lr"] = rate
    if state.disc_optimizer is None:
        return
    disc = rate * disc_rate(cfg) / cfg.optim.lr if cfg.optim.lr else 0.0
    for settings in state.disc_optimizer.param_groups:
        settings["lr"] = disc


def files_of(run: Run, micro_batches: Sequence[MicroBatch]) -> list[str]:
    """The files whose crops all ranks have in these micro-batches; synthetic volumes by their names."""
    volumes = ranks.gathered([v for m in micro_batches for v in m.volumes])
    return sorted({str(run.dataset.train[v].path or run.dataset.train[v].name) for v in volumes})


def note_bad_step(run: Run, loss: float, files: Sequence[str]) -> None:
    """Count a step without update, and tell it.

    An overflow of 16 bits does not count: the loss scale falls and the run goes on. But at a scale of 1 and
    below it cannot be that.
    """
    state, scale = run.state, 0.0
    if state.masters is not None:
        scale = 2.0 ** state.masters.log_scale
    elif state.scaler.is_enabled():
        scale = state.scaler.get_scale()
    what = "fp16 overflow"
    if scale <= 1 or not math.isfinite(loss):
        what = "loss or gradient is not finite"
        state.bad_steps += 1
    run.log.say(f"step {state.step}: {what}, no update; crops of {', '.join(files)}")


def stop_with_reproducer(run: Run, step: int, files: Sequence[str],
                         micro_batches: Sequence[MicroBatch]) -> None:
    """Keep what it takes to see the failure again, and end the run."""
    state = run.state
    path = run.out / f"nan_step_{state.step:06d}.pt"
    images = ranks.gathered([m.image.cpu() for m in micro_batches])
    if ranks.first():
        content = {"kind": "vae3d.nan", "version": 1, "config": config_dict(run.settings), "step": step}
        checkpoints.save(path, content | {"files": files, "model": full_weights(state), "images": images})
    raise RunStopped(f"{state.bad_steps} non-finite steps in a row (train.nan_limit); weights and crops of "
                     f"the last one are in {path}; try a lower --optim.lr, or look at the files that "
                     "log.jsonl names")


def settle(run: Run) -> bool:
    """Do what is due at this step and not done yet; returns whether anything was.

    Stopped leaves it between two crops. The state then says what is undone, and a run that is resumed from
    it does that first.
    """
    cfg, state = run.cfg, run.state
    before, stage = (state.validated, state.sampled, state.finished), run.stage
    # First a validation, which may end the stage early.
    is_due = state.step % cfg.train.val_every == 0 or state.step == stage.first or state.step >= stage.end
    if is_due and state.validated < state.step:
        validation(run, stage.epoch_of(state.step - 1))
        state.validated = state.step
    # Then, at the end of a stage, the task's last measurements.
    at_end = state.step >= stage.end or stopped_early(cfg, state)
    if at_end and ranks.first():
        finish(run)
    # Then pictures.
    is_due = at_end or (cfg.log.sample_every and state.step % cfg.log.sample_every == 0)
    if is_due and state.sampled < state.step:
        save_samples(run)
        state.sampled = state.step
    run.over, state.finished = at_end, at_end and run.is_last_stage
    if before != (state.validated, state.sampled, state.finished):
        keep_page(run)
    return before != (state.validated, state.sampled, state.finished)


def finish(run: Run) -> None:
    """What the task measures at the end; and the averages beyond the first, beside best.pt."""
    run.state.task.finish(run)
    for ema, rate in list(zip(run.state.emas, run.cfg.train.ema))[1:]:
        # The latent has been measured for best.pt alone.
        checkpoints.save(run.out / f"ema_{rate}.pt", weights_to_ship(run, ema) | {"latent": None})


def compare_ranks(state: State) -> None:
    """Raises RunStopped where the ranks have drifted apart, from where each would train another network."""
    found = ranks.difference(tensors_of(state))
    if found is not None:
        raise RunStopped(f"step {state.step}: {found} (log.ddp_check); go on from last.pt, on machines with "
                         f"the same GPUs and the same torch")


if __name__ == "__main__":
    sys.exit(main())
