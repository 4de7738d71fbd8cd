"""A checkpoint that is ready to be used: the network on its device, and what its run knew about the data.

A task's functions for predict.py (training/task.py) are given a Ready and run its network by `run_network`.

Shapes: C channels, D H W depth height width, Z latent channels, d h w of the latent. Version 0.3 (2026-11).
"""
from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from training import checkpoints
from training.config import TrainConfig, config_from
from training.devices import on_device, pick_device, pick_precision, to_device
from training.foreign import load_foreign
from training.resume import check_keys
from training.stages import stage_configs
from training.task import Task, serving, task_of
from volumes.config import DataConfig


class Ready(NamedTuple):
    """A network that is ready to be used, and what its run knew about the data."""
    path: Path
    cfg: TrainConfig
    task: Task
    model: nn.Module                                             # eval mode, on its device
    facts: dict                                                  # of the file: step (None: made elsewhere),
                                                                 # latent, data (checkpoints.Facts)
    amp_dtype: torch.dtype | None                                # of autocast; None: float32
    precision: str                                               # the same in words
    fingerprint: str                                             # of the weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def classes(self) -> int:
        """That labels have: as the task says of its network, else as in the training labels."""
        if self.task.classes is None:
            return self.facts["data"]["classes"]
        return self.task.classes(self.cfg)


def load(path: str | Path, tasks: Mapping[str, ModuleType], needs: Sequence[str] = (), device: str = "auto",
         amp: bool = False, hints: str | None = None) -> Ready:
    """The network of a run folder (best.pt, else last.pt), a checkpoint, or an autoencoder made elsewhere.

    tasks: the table of tasks/. needs: names of training.task.Task, of which the network's task must have one;
    none: any task will do. hints: what a foreign file cannot say (foreign.load_foreign). Raises ValueError,
    one line, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: holds neither best.pt nor last.pt; name a run folder of train.py or a "
                             f"checkpoint")
        path = found[0]

    # First what the file says: weights, config, facts about the data. A foreign file knows no facts.
    able = serving(tasks, needs)
    foreign_task = next((name for name, task in able.items() if task.FILE_PRESETS), None)
    foreign = load_foreign(path, hints, "--hints") if foreign_task else None
    if foreign:
        cfg = TrainConfig(foreign_task, foreign.layout, vae=foreign.vae)
        weights = foreign.weights
        facts = {"latent": {}, "data": {}, "step": None}
    else:
        content = checkpoints.load(path, "vae3d.weights", "vae3d.train")
        cfg = config_from(content["config"], TrainConfig(), str(path))
        # Of a run with stages: the one that it is in.
        stages = list(stage_configs(cfg).values())
        cfg = stages[min(len(content.get("edges", ())), len(stages) - 1)]
        weights = content["ema"][0] if content.get("ema") else content["model"]
        facts = {"latent": content["latent"] or {}, "data": content["data"], "step": content["step"]}
        if hints is not None:
            raise ValueError(f"{path}: a checkpoint of train.py, which says all that --hints could; leave "
                             f"the flag out")
    task = task_of(cfg, able, path)

    # Then the network with these weights, on its device.
    where = pick_device(device)
    model = task.build(cfg)
    check_keys(model.state_dict(), weights, str(path))
    model.load_state_dict(weights)
    fingerprint = fingerprint_of(model, repr(cfg.vae) if foreign else "")  # hints change results too
    model = on_device(model, where).eval().requires_grad_(False)
    amp_dtype, precision = pick_precision(amp, where, model)
    return Ready(path, cfg, task, model, facts, amp_dtype, precision, fingerprint)


def fingerprint_of(model: nn.Module, more: str = "") -> str:
    """16 hexadecimal digits that differ where any weight on the CPU, or the text beside them, does."""
    digest = hashlib.sha256(more.encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def data_config(ready: Ready, labels: bool = False, **changes) -> DataConfig:
    """How the run prepared its volumes. labels: that they are wanted; changes: fields that are not None."""
    cfg, facts = ready.cfg.data, ready.facts["data"]
    modality = cfg.modality
    if modality == "auto":
        unknown = "voxel" if ready.cfg.loss.background == 0 else "auto"  # of a file older than its facts
        modality = facts.get("modality", unknown)
    spacing = "original" if cfg.spacing == "random" else cfg.spacing
    values = facts.get("label_values", cfg.label_values)
    values = None if values is None else tuple(values)
    known = {"modality": modality, "spacing": spacing, "label_values": values,
             "labels": labels, "strict": False}
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(cfg, **known | given)


@torch.no_grad()
def run_network(ready: Ready, work: Callable[[Tensor], Tensor], array: np.ndarray | Tensor) -> Tensor:
    """work(a batch of one), in the checkpoint's precision and on its device.

    array (C, D, H, W), a latent (Z, d, h, w), or indices of codes (d, h, w).
    """
    x = torch.as_tensor(array)[None]
    has_channels = x.dim() == 5                                  # indices have none, nor a memory format
    x = to_device(x, ready.device) if has_channels else x.to(ready.device)
    with torch.autocast(ready.device.type, ready.amp_dtype, enabled=ready.amp_dtype is not None):
        return work(x)


def describe(ready: Ready) -> str:
    """The network in one line."""
    cfg, step = ready.cfg, ready.facts["step"]
    parameters = sum(p.numel() for p in ready.model.parameters())
    known = f"step {step}"
    if step is None:
        low, high = cfg.vae.intensity_range
        known = f"for intensities of {low:g} to {high:g}"
    precision = ready.precision.removesuffix(" with a GradScaler")  # which is for training
    return (f"{ready.path}: {ready.task.describe(cfg)} {cfg.preset}, {parameters:,} parameters, {known}; "
            f"{ready.device}, {precision}")
