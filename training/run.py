"""What the parts of the training loop share. Version 0.3 (2026-11)."""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import data
from training import ranks
from training.config import MemoryConfig, TrainConfig, to_yaml
from training.log import Log
from training.memory import dial_text, turn_dial, with_recovery
from training.signals import Stopped
from training.state import State
from volumes.files import write_atomic


@dataclass
class Run:
    """What the parts of the loop share."""
    cfg: TrainConfig
    state: State
    device: torch.device
    dataset: data.Data
    crops: data.Crops
    held_out: Sequence[data.Crop]
    out: Path
    log: Log
    total: int                                # optimizer steps
    per_epoch: int                            # of them
    received: list[int] = field(default_factory=list)  # signals
    # The dial of training, and the one that validations came to beside it.
    beside: tuple[MemoryConfig, MemoryConfig] | None = None

    @property
    def settings(self) -> TrainConfig:
        """The config with the dial as it is turned now: what is saved."""
        return dataclasses.replace(self.cfg, memory=self.state.dial)


def save_config(run: Run) -> None:
    if ranks.first():
        text = to_yaml(run.settings)
        write_atomic(run.out / "config.yaml", lambda file: file.write(text.encode()))


def stop_if_signalled(run: Run) -> None:
    """Between two crops of what can be begun again. Raises Stopped, on all ranks alike, so each must call it
    equally often.
    """
    number = int(ranks.largest(run.received[0] if run.received else 0))
    if number:
        raise Stopped(number)


def total_steps(cfg: TrainConfig, per_epoch: int) -> int:
    """train.steps or train.epochs, whichever ends first; none given: 50 on synthetic volumes, else 2000."""
    limits = [cfg.train.steps, cfg.train.epochs and cfg.train.epochs * per_epoch]
    return min((n for n in limits if n), default=50 if cfg.data.path is None else 2000)


def stopped_early(cfg: TrainConfig, state: State) -> bool:
    return 0 < cfg.train.patience <= state.bad_validations


def recovered(run: Run, shape: Sequence[int], work: Callable[[], Any]) -> Any:
    """work(), with recovery from out-of-memory; each change of the dial goes to the console, log.jsonl and
    config.yaml.
    """
    def note(text: str) -> None:
        run.log.say(text)
        run.log.write({"step": run.state.step, "split": "memory", "change": text})
        save_config(run)
    return with_recovery(run.cfg, run.state, shape, note, work)


@contextlib.contextmanager
def dial_of_training_kept(run: Run) -> Iterator[None]:
    """For validations and pictures, which may need more memory than a step: what they do to the dial is
    undone after them, and is where the next one begins.
    """
    state, training = run.state, run.state.dial
    if run.beside is not None and run.beside[0] == training:
        turn_dial(state, run.beside[1])
    before = state.dial
    try:
        yield
    finally:
        found = state.dial
        if found != training:
            turn_dial(state, training)
        if found != before:
            run.beside = training, found
            run.log.say(f"step {state.step}: that was not a training step, which stays at "
                        f"{dial_text(training)}")
            save_config(run)
