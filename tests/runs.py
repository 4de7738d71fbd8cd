"""Small runs and states, for the tests of training."""
from __future__ import annotations

from collections.abc import Sequence

import torch

from tasks import TASKS
from training import fit, flags, memory
from training.config import TrainConfig
from training.state import State
from training.task import of


def load_config(argv: Sequence[str], base: TrainConfig | None = None) -> TrainConfig:
    return flags.load_config(argv, TASKS, base)


def new_state(cfg: TrainConfig, device: torch.device, features: dict | None = None) -> State:
    """As at step 0, with the dial of the config."""
    return memory.begin(cfg, of(TASKS, cfg), device, features)


def make_step(cfg: TrainConfig, device: torch.device, rehearsal: bool = False):
    return fit.make_step(cfg, of(TASKS, cfg), device, rehearsal)


def build_network(cfg: TrainConfig) -> torch.nn.Module:
    return of(TASKS, cfg).build(cfg)
