"""What last.pt holds, how a run goes on from it, and how a new one starts from weights that are there.
Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import data
from training import checkpoints, ranks
from training.config import TrainConfig, config_dict
from training.facts import facts_of
from training.foreign import load_foreign
from training.state import State

COUNTERS = (
    "step",
    "best",
    "best_loss",
    "bad_validations",
    "bad_steps",
    "finished",
    "latent",
    "usage",
    "norms",
    "log_scale",
    "global_batch",
    "validated",
    "sampled",
)              # for last.pt


def checkpoint_of(cfg: TrainConfig, state: State, dataset: data.Data) -> dict:
    """The content of last.pt: tensors and plain values only, and nothing that differs between two runs of the
    same command.
    """
    parts = {
        name: getattr(state, name) and getattr(state, name).state_dict()
        for name in ("disc", "disc_optimizer", "lecam")
    }
    if state.perceptual is not None:
        parts["features"] = state.perceptual.features.to_checkpoint()
    return {
        "kind": "vae3d.train",
        "version": checkpoints.VERSIONS["vae3d.train"],
        "config": shared_config(cfg),
        "data": facts_of(dataset),
        "model": full_weights(state),
        "ema": [ema.state_dict() for ema in state.emas],
        **parts,
        "optimizer": state.optimizer.state_dict(),
        "scaler": state.scaler.state_dict(),
        "plateau": list(state.plateau),
        **{name: getattr(state, name) for name in COUNTERS},
    }


def shared_config(cfg: TrainConfig) -> dict:
    """As plain values, without the folder that the run lies in."""
    config = config_dict(cfg)
    config["train"].pop("out")
    return config


def full_weights(state: State) -> dict[str, Tensor]:
    """The network's state dict, in float32 also where it trains in 16 bits."""
    weights = state.model.state_dict()
    if state.masters is not None:
        weights |= state.masters.full()
    return weights


def restore(state: State, checkpoint: dict, path: Path) -> None:
    """Put a checkpoint into a new state of the same config. Raises ValueError naming the keys that do not
    fit.
    """
    if len(checkpoint["ema"]) != len(state.emas):
        raise ValueError(f"{path}: holds {len(checkpoint['ema'])} averages, train.ema asks for "
                         f"{len(state.emas)}; leave --train.ema out")
    modules = [(state.model, "model", checkpoint["model"]), (state.disc, "disc", checkpoint["disc"]),
               (state.lecam, "lecam", checkpoint["lecam"])]
    modules += [(ema, "ema", weights) for ema, weights in zip(state.emas, checkpoint["ema"])]
    for module, name, weights in modules:
        if module is not None:
            check_keys(module.state_dict(), weights, f"{path} ({name})")
            module.load_state_dict(weights)
    if state.masters is not None:
        state.masters.load(checkpoint["model"])
    for optimizer, name in ((state.optimizer, "optimizer"), (state.disc_optimizer, "disc_optimizer")):
        if optimizer is not None:
            ours, theirs = optimizer.state_dict(), checkpoint[name] or {"state": None}
            if not checkpoints.is_like(theirs["state"], ours["state"]):
                raise ValueError(f"{path} ({name}): its moments are not those of {type(optimizer).__name__} "
                                 f"for this network; use the config that made it")
            groups = [
                group | {"lr": their["lr"]}
                for group, their in zip(ours["param_groups"], theirs["param_groups"])
            ]
            optimizer.load_state_dict({"state": theirs["state"], "param_groups": groups})
    possible = {
        "usage": checkpoints.is_like(checkpoint["usage"], state.usage),
        "step": checkpoint["step"] >= 0,
        "plateau": checkpoints.is_like(checkpoint["plateau"], state.plateau)
        and 0 < checkpoint["plateau"][1] <= 1,
        "global_batch": checkpoint["global_batch"] > 0,
        "log_scale": abs(checkpoint["log_scale"]) <= 127,
    }
    if wrong := [name for name, fits in possible.items() if not fits]:
        raise ValueError(f"{path} ({wrong[0]}): does not fit this run, found "
                         f"{data.brief(checkpoint[wrong[0]])}; use the config that made it")
    # Else it was of use then and is not now, or the reverse.
    if checkpoints.is_like(checkpoint["scaler"], state.scaler.state_dict()):
        state.scaler.load_state_dict(checkpoint["scaler"])
    for name in COUNTERS:
        value = checkpoint[name]
        setattr(state, name, value.to(state.device) if isinstance(value, Tensor) else value)
    state.plateau = tuple(checkpoint["plateau"])


def check_keys(ours: dict[str, Tensor], theirs: dict[str, Tensor] | None, source: str) -> None:
    theirs = theirs or {}
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    reshaped = sorted(k for k in ours.keys() & theirs.keys() if not checkpoints.is_like(theirs[k], ours[k]))
    if missing or unexpected or reshaped:
        raise ValueError(f"{source}: does not fit this network: missing {missing[:5]}, unexpected "
                         f"{unexpected[:5]}, of another shape {reshaped[:5]} ({len(missing)}, "
                         f"{len(unexpected)}, {len(reshaped)} in all); use the config that made it")


def start_from(state: State, path: Path, hints: str | None = None) -> tuple[list[str], bool]:
    """Put the weights of a run folder, a checkpoint of ours or a foreign file into a new state, as far as
    they fit.

    Returns what to say about it, a line each, and whether a codebook was among them. The averages start from
    the same weights. Between a Gaussian head (mean and log-variance) and one for codes the mean is what they
    share. Raises ValueError when no weight fits (biases fit by chance), or, frozen where they are not
    trained, when some of them do not."""
    path = next((path / name for name in ("best.pt", "last.pt") if (path / name).is_file()), path)
    foreign = load_foreign(path, hints, "--train.init_hints")
    content = (
        {"model": foreign.weights}
        if foreign
        else checkpoints.load(path, "vae3d.weights", "vae3d.train", "vae3d.features")
    )
    theirs = (
        content["ema"][0] if content.get("kind") == "vae3d.train" and content["ema"] else content["model"]
    )
    ours = full_weights(state)
    fits, reshaped = {}, []
    section = content.get("config", {}).get("vae")
    gaussian = [getattr(getattr(state.model, "cfg", None), "bottleneck", None) == "kl",
                not isinstance(section, dict) or section.get("bottleneck", "kl") == "kl"]
    for name in sorted(ours.keys() & theirs.keys()):
        new, old = ours[name], theirs[name]
        if checkpoints.is_like(old, new):
            fits[name] = old
            continue
        change = f"{name} {tuple(old.shape)} -> {tuple(new.shape)}"
        shared = min(len(new), len(old)) if new.dim() and old.dim() else 0
        heads = name.startswith(("encoder.head.conv.", "encoder.quant_conv.")) and gaussian[0] != gaussian[1]
        if heads and new.shape[1:] == old.shape[1:] and max(len(new), len(old)) == 2 * shared:
            fits[name] = torch.cat([old[:shared].to(new), new[shared:]])
            change += " (the mean's part taken)"
        else:
            change += " (left as new)"
        reshaped.append(change)
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    frozen = [name for name, p in state.model.named_parameters() if not p.requires_grad and name not in fits]
    if frozen:
        raise ValueError(f"--init {path}: {len(frozen)} weights that stay as they are do not fit, such as "
                         f"{frozen[0]}; use the preset and the section `vae` that made it")
    if not any(weight.dim() > 1 and not name.startswith("quantizer.") for name, weight in fits.items()):
        raise ValueError(f"--init {path}: none of its {len(theirs)} weights fits this network, such as "
                         f"{', '.join((unexpected + reshaped)[:2])}; use the preset and the section `vae` "
                         "that made it")
    for model in (state.model, *state.emas):
        model.load_state_dict(ours | fits)
    if state.masters is not None:
        state.masters.load(ours | fits)
    lines = [f"init: {len(fits)} of {len(ours)} weights from {path}"]
    if foreign:
        low, high = state.model.cfg.intensity_range
        lines.append(f"init: a {foreign.layout} network; it is given {low:g} to {high:g} for the data's -1 "
                     "to 1 (vae.intensity_range)")
    lines += [
        f"init: {len(names)} {what}: {'; '.join(names)}"
        for what, names in (
            ("missing there, left as new", missing),
            ("unexpected, not used", unexpected),
            ("of another shape", reshaped),
        )
        if names
    ]
    return lines, "quantizer.codebook" in fits


def keep_global_batch(
    cfg: TrainConfig, base: TrainConfig, checkpoint: dict, say: Callable[[str], None]
) -> None:
    """A run goes on with the crops an optimizer step that it began with, and so their order, on any number of
    ranks, unless it is told another batch or accum: then with batch x accum x ranks.
    """
    # Absent: of one process, by an older version.
    before = checkpoint.setdefault("global_batch", base.train.batch * base.train.accum)
    if (cfg.train.batch, cfg.train.accum) != (base.train.batch, base.train.accum):
        checkpoint["global_batch"] = now = cfg.train.batch * cfg.train.accum * ranks.workers()
        if now != before:
            say(f"{before} crops a step -> {now} (batch {cfg.train.batch} x accum {cfg.train.accum} x ranks "
                f"{ranks.workers()}): from here on the order of the data is another")
