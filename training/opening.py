"""What a run says first and last. Version 0.1 (2026-11)."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch

import peaks
from training import ranks
from training.console import shown, tell, unit_of
from training.devices import pick_precision
from training.edges import stage_text
from training.plan import dial_text
from training.run import Run
from training.run_page import NAME, note_command, read_rows
from training.task import metric_of
from volumes.cache import cache_folder
from volumes.files import show
from volumes.splits import patient_of
from volumes.told import counted

MOSTLY = 0.5                                  # share of a crop that is padding; more is told


def introduce(run: Run, started_from: Sequence[str], plans: Sequence[str] = ()) -> None:
    """The first lines: what is trained, where, on what. plans: what memory.tile auto came to."""
    cfg, state, log = run.cfg, run.state, run.log
    disc = ""
    if state.disc is not None:
        disc = f"discriminator {count(state.disc):,}, "
    precision = pick_precision(cfg.train.amp, run.device, state.model)[1]
    if state.masters is not None:
        precision = "16-bit weights, float32 masters"
    log.say(f"{state.task.title(cfg)}: {count(state.model):,} parameters, {disc}memory mode "
            f"{dial_text(state.dial)}; {run.device}, {precision}")
    for text in started_from:
        log.say(text)
    for text in plans:
        log.say(f"memory: {text}")
        log.write({"step": run.state.step, "split": "memory", "change": text})
    patients = len({patient_of([entry]) for entry in run.dataset.val})
    if not cfg.train.val_whole and len(run.held_out) < patients:
        log.say(f"validation looks at {len(run.held_out)} of {patients} held-out patients; raise "
                "--train.val_crops to see all of them")
    if run.device.type == "cuda":
        for text in peaks.environment_warnings():
            log.say(f"warning: {text}")
    if not cfg.data.points:                   # whose boxes are placed on points
        tell_padding(run)
    if cfg.data.path is not None and run.dataset.cached:
        log.say(f"cache of the prepared volumes: {show(cache_folder(cfg.data))} (data.cache_dir)")
    of_ranks = f" on {ranks.world()} ranks" if ranks.world() > 1 else ""
    where = f"run folder {run.out} (curves and pictures: its {NAME})"
    if run.stage.name:
        names = ", ".join(f"{stage.name} to {stage.end}" for stage in run.stages)
        log.say(f"{run.total} steps in {len(run.stages)} stages{of_ranks}: {names}; {where}")
        log.say(stage_text(run))
    else:
        log.say(f"{counted(run.total, 'step')} of {counted(run.stage.global_batch, 'crop')}{of_ranks}, "
                f"{run.stage.per_epoch} an epoch; {where}")
    note_command(run)


def count(network: torch.nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def tell_padding(run: Run) -> None:
    """Once, where the middle training volume fills less than half of its crop."""
    shares = []
    for entry in run.dataset.train:
        filled = [min(n, want) / want for n, want in zip(entry.shape[1:], run.dataset.patch)]
        shares.append(1 - math.prod(filled))
    padded = sum(share > MOSTLY for share in shares)
    if 2 * padded > len(shares):
        patch = ",".join(map(str, run.dataset.patch))
        middle = sorted(shares)[len(shares) // 2]
        run.log.say(f"crops of {patch} are mostly padding: {middle:.0%} of one of the middle volume; a "
                    "smaller --patch sees as much and is faster")


def conclude(run: Run) -> bool:
    """The last line of a finished run. Returns whether its last loss is finite."""
    cfg, state, out = run.cfg, run.state, run.out
    name = metric_of(cfg, state.task)
    best = f"best {name} {shown(state.best)}{unit_of(name)}"
    if state.best is None:
        best = f"no validation had a finite {name}"
    elif step_of_best(run) == 0:
        best += " at step 0 (the untrained network)"
    # What there is, by names: the folder's path is said once.
    places = ["best.pt (weights)"] if (out / "best.pt").is_file() else []
    if (out / "samples").is_dir():
        places.append("samples (pictures)")
    where = f"in {out}: {', '.join([*places, f'{NAME} (curves)'])}"

    def ends_finite() -> bool:
        rows = [row for row in read_rows(out / "log.jsonl") if row.get("split") in ("train", "val")]
        return not rows or rows[-1].get("loss") is not None
    # Other ranks have no log of their own; the first one's says how it ended.
    is_finite = ranks.from_rank(0, ends_finite)
    word = "done" if is_finite else "ended"
    tell(f"{word} at step {state.step}: {best}; {where}")
    if not is_finite:
        tell("the loss is not finite at the end, so the last weights are of no use; try a lower --optim.lr, "
             "and look at the files that log.jsonl names")
    return is_finite


def step_of_best(run: Run) -> int | None:
    """Of the last validation that has the best figure; None where log.jsonl does not have it."""
    name = metric_of(run.cfg, run.state.task)
    steps = [row["step"] for row in read_rows(run.out / "log.jsonl")
             if row.get("split") == "val" and row.get(name) == run.state.best]
    return steps[0] if steps else None
