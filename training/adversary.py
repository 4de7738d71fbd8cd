"""What a discriminator adds to a step: its terms in the network's criterion, and its own criterion.

VQGAN (arXiv:2012.09841): the network is judged by a discriminator that learns beside it. The discriminator's
gradients are those of its own criterion alone: it is frozen while the network's are computed, and sees
detached crops while its own are. Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import adversarial
from training.config import TrainConfig
from training.forward import forward, scaled
from training.order import ramp
from training.state import State


def is_judging(cfg: TrainConfig, state: State) -> bool:
    return state.disc is not None and state.step >= cfg.loss.disc_start


def disc_rate(cfg: TrainConfig) -> float:
    """The discriminator's highest learning rate. It has Adam, for which muon's rates are twice too high."""
    if cfg.loss.disc_lr is not None:
        return cfg.loss.disc_lr
    return cfg.optim.lr / 2 if cfg.optim.optimizer == "muon" else cfg.optim.lr


def judge(state: State, crop: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits and features, in the run's precision; the discriminator's weights are float32 also where the
    network's are not.
    """
    return forward(state, state.disc, crop if state.masters is None else crop.float())


def generator_terms(
    cfg: TrainConfig, state: State, crops: Sequence[Tensor], terms: dict[str, Tensor]
) -> None:
    """Add what the discriminator says of the reconstruction to terms["loss"]; it is left without gradients
    itself.

    loss + w adv_weight adv, w the ramp after disc_start; with loss.adaptive_weight times |d loss| / |d adv|
    at the last layer (VQGAN, Eq. 7)."""
    loss, (real, fake) = cfg.loss, crops
    state.disc.requires_grad_(False)
    logits, features = judge(state, fake)
    terms["adv"] = adversarial.generator_loss(logits, loss.adv_loss)
    weight = loss.adv_weight * ramp(state.step, loss.disc_start, loss.disc_warmup)
    if loss.adaptive_weight:
        scale = float(scaled(state, torch.ones((), device=fake.device)))
        last = state.model.last_weight
        terms["adaptive_weight"] = adversarial.adaptive_weight(terms["loss"], terms["adv"], last, scale=scale)
        weight = weight * terms["adaptive_weight"]
    terms["loss"] = terms["loss"] + weight * terms["adv"]

    # Feature matching (arXiv:1711.11585, Eq. 4): the features of the reconstruction should be the image's.
    if loss.feature_matching_weight:
        with torch.no_grad():
            features_real = judge(state, real)[1]
        terms["feature_matching"] = adversarial.feature_matching_loss(features_real, features)
        terms["loss"] = terms["loss"] + loss.feature_matching_weight * terms["feature_matching"]
    state.disc.requires_grad_(True)


def discriminator_terms(cfg: TrainConfig, state: State, crops: Sequence[Tensor]) -> dict[str, Tensor]:
    """The discriminator's own criterion `disc` on detached crops, and the mean logits."""
    loss, (real, fake) = cfg.loss, crops
    logits_real, logits_fake = judge(state, real)[0], judge(state, fake)[0]
    total = adversarial.discriminator_loss(logits_real, logits_fake, loss.adv_loss)
    if state.lecam is not None:
        total = total + loss.lecam_weight * state.lecam(logits_real, logits_fake)

    # R1 (arXiv:1801.04406) at every r1_every-th step, weighted for all of them; in float32, since squares of
    # 16-bit gradients underflow.
    if loss.r1_weight and state.step % loss.r1_every == 0:
        real = adversarial.wide(real).detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):
            total = total + loss.r1_every * loss.r1_weight * adversarial.r1_penalty(state.disc(real)[0], real)
    return {
        "disc": total,
        "logits_real": logits_real.float().mean(),
        "logits_fake": logits_fake.float().mean(),
    }
