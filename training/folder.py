"""The run folder: who has it, and which files are written there when. Version 0.3 (2026-11)."""
from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path

from training import checkpoints
from training.config import TrainConfig
from training.resume import checkpoint_of
from training.run import Run
from volumes.files import bare_name


def run_folder(cfg: TrainConfig) -> Path:
    """The folder of a new run. Raises ValueError when train.out is given and holds a run already."""
    if cfg.train.out is not None:
        out = Path(cfg.train.out)
        if any((out / name).exists() for name in ("last.pt", "last.prev.pt")):
            raise ValueError(f"--out {out} already holds a run; go on with --resume {out}, or name another "
                             "folder")
        return out
    what = "synthetic" if cfg.data.path is None else bare_name(Path(cfg.data.path).resolve().name) or "data"
    name = f"{what}_{time.strftime('%Y-%m-%d')}"
    names = (f"{name}{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 10_000))])
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def open_folder(
    cfg: TrainConfig, out: Path, resumed: checkpoints.Resumed | None, opened: contextlib.ExitStack
) -> None:
    """Take the run folder until `opened` is closed, and clear it of what a killed run left. ValueError where
    another process has it.
    """
    out.mkdir(parents=True, exist_ok=True)
    opened.enter_context(checkpoints.lock_folder(out))
    checkpoints.remove_temporaries(out)
    if resumed is None:
        # The run of another process may have come and gone by now.
        run_folder(cfg)
        # Of a run that was killed before it had a state.
        (out / "log.jsonl").unlink(missing_ok=True)
    elif checkpoints.stamp(resumed.path) != resumed.stamp:
        raise ValueError(f"{resumed.path}: was replaced by another process while this one began; give the "
                         "same command again")
    # What comes after it is taken back, so that a kill goes on from here too;.
    elif resumed.path.name != "last.pt":
        checkpoints.copy(resumed.path, out / "last.pt")          # no link: damage to one leaves the other


def save_last(run: Run, keep: bool = True) -> None:
    """last.pt; the one before it becomes last.prev.pt, and train.keep of those that were due stay as
    step_XXXXXX.pt.

    Each file is whole before another goes, so that a kill or a full disk at any moment leaves a good one and
    its name."""
    cfg, step, last = run.cfg.train, run.state.step, run.out / "last.pt"
    keep = keep and cfg.keep > 0 and (step % cfg.save_every == 0 or run.state.finished)
    new = run.out / (f"step_{step:06d}.pt" if keep else "last.next.pt")
    checkpoints.save(new, checkpoint_of(run.settings, run.state, run.dataset))
    # Files of later steps are of a run that was taken back; they stay.
    if keep:
        kept = sorted(
            (int(path.stem[5:]), path)
            for path in run.out.glob("step_*.pt")
            if re.fullmatch(r"step_\d{6,}", path.stem)
        )
        for _, old in [row for row in kept if row[0] <= step][:-cfg.keep]:
            old.unlink(missing_ok=True)
    if last.exists():
        checkpoints.place(last, run.out / "last.prev.pt")
    if keep:
        checkpoints.place(new, last)
    else:
        os.replace(new, last)
