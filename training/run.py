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
from training.memory import turn_dial, with_recovery
from training.plan import dial_text
from training.signals import Stopped
from training.stages import Stage, with_dial
from training.state import State
from volumes.files import write_atomic


@dataclass
class Run:
    """What the parts of the loop share. What it does at this moment is its stage's."""
    whole: TrainConfig                        # of all stages: what the user asked for, and what the data say
    opened: list[Stage]                       # all that it names
    stages: list[Stage]                       # with their places in the run (stages.planned)
    state: State
    device: torch.device
    out: Path
    log: Log
    crops: data.Crops | None = None           # of the stage, as held_out (edges.attach)
    held_out: Sequence[data.Crop] = ()
    over: bool = False                        # the stage is done, as settle() found
    received: list[int] = field(default_factory=list)  # signals
    # The dial of training, and the one that validations came to beside it.
    beside: tuple[MemoryConfig, MemoryConfig] | None = None

    @property
    def number(self) -> int:
        """Of the stage, from 0."""
        return len(self.state.edges)

    @property
    def stage(self) -> Stage:
        return self.stages[self.number]

    @property
    def cfg(self) -> TrainConfig:
        """Of the stage."""
        return self.stage.cfg

    @property
    def dataset(self) -> data.Data:
        return self.stage.dataset

    @property
    def is_last_stage(self) -> bool:
        return self.number == len(self.stages) - 1

    @property
    def total(self) -> int:
        """Optimizer steps of all stages."""
        return self.stages[-1].end

    @property
    def settings(self) -> TrainConfig:
        """The config of all stages with the dial as it is turned now: what is saved."""
        return with_dial(self.whole, self.opened, self.number, self.state.dial)

    @property
    def shipped_settings(self) -> TrainConfig:
        """The config of this stage alone, as weights are shipped with it."""
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
