"""What the parts of the training loop share. Version 0.3 (2026-11)."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import data
from training import ranks
from training.config import TrainConfig, to_yaml
from training.log import Log
from training.memory import with_recovery
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
