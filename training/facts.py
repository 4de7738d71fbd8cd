"""What the data say: put into the config once, before anything is built, and kept in the checkpoint. Version
0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable

import data
from training import ranks
from training.config import TrainConfig, changed
from training.task import Task


def open_data(cfg: TrainConfig, task: Task, say: Callable[[str], None]) -> tuple[TrainConfig, data.Data]:
    """The data of the run, and the config with all that follows from them. Raises DataError, or ValueError
    where weights do not fit.
    """
    cfg = changed(cfg, data={"labels": task.LABELS})
    dataset = data.open_data(cfg.data, cfg.train.seed, say, ranks.world())
    cfg = task.resolve(cfg, dataset)
    cfg = changed(
        cfg,
        vae={"in_channels": dataset.channels},
        loss={"background": dataset.background},
        data={"patch": dataset.patch},
    )
    if cfg.loss.channel_weights is not None and len(cfg.loss.channel_weights) != dataset.channels:
        raise ValueError(f"loss.channel_weights has {len(cfg.loss.channel_weights)} factors, the data has "
                         f"{dataset.channels} channels; give one for each")
    return cfg, dataset


def facts_of(dataset: data.Data) -> dict:
    """What predict.py must know about the data to prepare others alike, and the names of the training
    volumes.
    """
    entry, modalities = dataset.train[0], {entry.intensity.modality for entry in dataset.train}
    values = dataset.label_values
    return {
        "modality": modalities.pop() if len(modalities) == 1 else "auto",
        "channels": dataset.channels,
        "classes": dataset.classes,
        "label_values": None if values is None else list(values),
        "background": dataset.background,
        "spacing": list(entry.spacing),
        "training": [entry.name for entry in dataset.train],
    }
