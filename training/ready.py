"""A checkpoint that is ready to be used: the network on its device, and what its run knew about the data.

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

import data
from training import checkpoints
from training.config import TrainConfig, config_from
from training.devices import on_device, pick_device, pick_precision, to_device
from training.foreign import load_foreign
from training.resume import check_keys
from training.task import Task, serving, task_of


class Ready(NamedTuple):
    """A network that is ready to be used, and what its run knew about the data."""
    path: Path
    cfg: TrainConfig
    task: Task
    model: nn.Module                                             # eval mode, on its device
    facts: dict                                                  # step (None: made elsewhere), latent, data: the
                                                                 # file without its weights
    amp_dtype: torch.dtype | None                                # of autocast; None: float32
    precision: str                                               # the same in words
    fingerprint: str                                             # of the weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load(path: str | Path, tasks: Mapping[str, ModuleType], needs: Sequence[str] = (), device: str = "auto",
         amp: bool = False, hints: str | None = None) -> Ready:
    """The network of a run folder (best.pt, else last.pt), a checkpoint file or a foreign autoencoder.

    tasks: the table of tasks/. needs: names of training.task.Task, of which its task must have one. hints: what a foreign
    file cannot say (foreign.load_foreign). Raises ValueError, one line, for anything else.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("best.pt", "last.pt") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: holds neither best.pt nor last.pt; name a run folder of train.py or a checkpoint")
        path = found[0]

    # First what the file says: weights, config, facts about the data.
    able = serving(tasks, needs)
    takes_foreign = [name for name, task in able.items() if task.FILE_PRESETS]
    foreign = load_foreign(path, hints, "--hints") if takes_foreign else None
    if foreign:
        weights, facts = foreign.weights, {"latent": {}, "data": {}, "step": None}
        cfg = TrainConfig(takes_foreign[0], foreign.layout, vae=foreign.vae)
    else:
        content = checkpoints.load(path, "vae3d.weights", "vae3d.train")
        weights = content["ema"][0] if content.get("ema") else content["model"]
        cfg = config_from(content["config"], TrainConfig(), str(path))
        facts = {"latent": content["latent"] or {}, "data": content["data"], "step": content["step"]}
        if hints is not None:
            raise ValueError(f"{path}: a checkpoint of train.py, which says all that --hints could; leave the flag out")
    task = task_of(cfg, able, path)

    # Then the network.
    where = pick_device(device)
    model = task.build(cfg)
    check_keys(model.state_dict(), weights, str(path))
    model.load_state_dict(weights)
    digest = hashlib.sha256(repr(cfg.vae).encode() if foreign else b"")  # hints change results too
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.contiguous().numpy().tobytes())
    model = on_device(model, where).eval().requires_grad_(False)
    amp_dtype, precision = pick_precision(amp, where)
    return Ready(path, cfg, task, model, facts, amp_dtype, precision, digest.hexdigest()[:16])


def data_config(ready: Ready, labels: bool = False, **changes) -> data.DataConfig:
    """How the training run prepared its volumes; changes: fields of it that are not None."""
    cfg, facts = ready.cfg.data, ready.facts["data"]
    modality = cfg.modality
    if modality == "auto":
        modality = facts.get("modality", "voxel" if ready.cfg.loss.background == 0 else "auto")
    values = facts.get("label_values", cfg.label_values)
    known = {"modality": modality, "labels": labels, "strict": False,
             "spacing": "original" if cfg.spacing == "random" else cfg.spacing,
             "label_values": None if values is None else tuple(values)}
    return dataclasses.replace(cfg, **known | {name: value for name, value in changes.items() if value is not None})


@torch.no_grad()
def run_network(ready: Ready, work: Callable[[Tensor], Tensor], array: np.ndarray | Tensor) -> Tensor:
    """work(batch of one), in the checkpoint's precision and on its device."""
    device = ready.device
    x = torch.as_tensor(array)[None]
    x = to_device(x, device) if x.dim() == 5 else x.to(device)   # indices have no channels
    with torch.autocast(device.type, ready.amp_dtype, enabled=ready.amp_dtype is not None):
        return work(x)


def describe(ready: Ready) -> str:
    """The network in one line."""
    cfg = ready.cfg
    low, high = cfg.vae.intensity_range
    known = f"for intensities of {low:g} to {high:g}" if ready.facts["step"] is None else f"step {ready.facts['step']}"
    parameters = sum(p.numel() for p in ready.model.parameters())
    return (f"{ready.path}: {ready.task.describe(cfg)} {cfg.preset}, {parameters:,} parameters, {known}; {ready.device}, "
            f"{ready.precision.removesuffix(' with a GradScaler')}")
