"""Task `features`: a feature network for the perceptual loss, trained on one's own volumes without labels.

It learns to tell what was done to a crop (noise, blur, loss of resolution), as perceptual.FeatureTrainer
says. Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import perceptual
from training.config import TrainConfig
from training.forward import forward
from training.order import MicroBatch
from training.state import State
from training.task import Objective

METRICS = {"explained": True, "loss": False}


def title(cfg: TrainConfig) -> str:
    return "feature network"


def build(cfg: TrainConfig) -> perceptual.FeatureTrainer:
    return perceptual.FeatureTrainer(perceptual.FeatureNet3d(seed=cfg.train.seed))


def check(cfg: TrainConfig) -> None:
    if cfg.train.precision == "master16":
        raise ValueError("train.precision=master16 is for --task vae, without --amp: its weights have 16 "
                         "bits already")


def objective(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """What was done to each crop, and how much of it the network explains."""
    out = forward(state, network, micro.image, *perceptual.degrade(micro.image, generators))
    return Objective(out, {"loss": out.loss, "explained": out.explained.mean()})


def ship(model: perceptual.FeatureTrainer) -> dict:
    return model.features.to_checkpoint()
