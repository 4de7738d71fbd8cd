"""What last.pt holds, how a run goes on from it, and how a new one starts from weights that are there.

Two ways in: `restore` puts all of a checkpoint back, so that the run goes on to the bit, and refuses what
does not fit; `start_from` takes the weights that fit, and says which did not. Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import data
from training import checkpoints, ranks
from training.config import TrainConfig, changed, config_dict, config_from
from training.facts import facts_of
from training.foreign import load_foreign
from training.state import State
from volumes.files import brief

NAMED = 4                                     # weights that a line of --init names at most
# Fields of State that last.pt holds under their own name.
COUNTERS = (
    "step",
    "best",
    "best_loss",
    "reference",
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
    "edges",
)


# -------------------------------------------------------------------------------- what last.pt holds

def checkpoint_of(cfg: TrainConfig, state: State, dataset: data.Data) -> dict:
    """The content of last.pt: tensors and plain values only.

    It holds nothing that differs between two runs of the same command.
    """
    content = {
        "kind": "vae3d.train",
        "version": checkpoints.VERSIONS["vae3d.train"],
        "config": shared_config(cfg),
        "data": facts_of(dataset),
        "model": full_weights(state),
        "ema": [ema.state_dict() for ema in state.emas],
    }
    # None where the run has no such part.
    for name in ("disc", "disc_optimizer", "lecam"):
        part = getattr(state, name)
        content[name] = part and part.state_dict()
    if state.perceptual is not None:
        content["features"] = state.perceptual.features.to_checkpoint()
    content["optimizer"] = state.optimizer.state_dict()
    content["scaler"] = state.scaler.state_dict()
    content["plateau"] = list(state.plateau)
    for name in COUNTERS:
        content[name] = getattr(state, name)
    return content


def resumed_config(checkpoint: dict, path: Path) -> TrainConfig:
    """The config of a run that goes on; what its version had no field for is as it was then.

    One from before data.patient held out files, whosever they were; one from before optim.warmup_least warmed
    up over its share of the run alone, and the first ones had AdamW.
    """
    before = {
        "data": {"patient": "file"},
        "optim": {"optimizer": "adamw", "lr": 5e-4, "warmup_least": 0},
    }
    base = TrainConfig()
    for section, fields in before.items():
        named = checkpoint["config"].get(section, {})
        base = changed(base, **{section: {k: v for k, v in fields.items() if k not in named}})
    return config_from(checkpoint["config"], base, str(path))


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


# -------------------------------------------------------------------------------- going on to the bit

def restore(state: State, checkpoint: dict, path: Path) -> None:
    """Put a checkpoint into a new state of the same config.

    path: of the checkpoint, for errors. Raises ValueError that names what does not fit.
    """
    # First the weights of all networks.
    if len(checkpoint["ema"]) != len(state.emas):
        raise ValueError(f"{path}: holds {len(checkpoint['ema'])} averages, train.ema asks for "
                         f"{len(state.emas)}; leave --train.ema out")
    modules = [
        (state.model, "model", checkpoint["model"]),
        (state.disc, "disc", checkpoint["disc"]),
        (state.lecam, "lecam", checkpoint["lecam"]),
    ]
    for ema, weights in zip(state.emas, checkpoint["ema"]):
        modules.append((ema, "ema", weights))
    for module, name, weights in modules:
        if module is not None:
            check_keys(module.state_dict(), weights, f"{path} ({name})")
            module.load_state_dict(weights)
    if state.masters is not None:
        state.masters.load(checkpoint["model"])

    # Then the moments of the optimizers.
    for name in ("optimizer", "disc_optimizer"):
        optimizer = getattr(state, name)
        if optimizer is not None:
            restore_optimizer(optimizer, checkpoint[name], f"{path} ({name})")

    # Then all that counts steps and validations.
    check_counters(state, checkpoint, path)
    # The scaler's state has another form where one of the two runs has no use for a scaler: then none.
    if checkpoints.is_like(checkpoint["scaler"], state.scaler.state_dict()):
        state.scaler.load_state_dict(checkpoint["scaler"])
    # A checkpoint of an older version has no reference of early stopping: there it was the best value.
    checkpoint.setdefault("reference", checkpoint["best"])
    for name in COUNTERS:
        value = checkpoint[name]
        if isinstance(value, Tensor):
            value = value.to(state.device)
        setattr(state, name, value)
    state.plateau = tuple(checkpoint["plateau"])


def restore_optimizer(optimizer: torch.optim.Optimizer, theirs: dict | None, source: str) -> None:
    """Moments and rates of the checkpoint; all other settings are the config's."""
    ours = optimizer.state_dict()
    theirs = theirs or {"state": None}
    if not checkpoints.is_like(theirs["state"], ours["state"]):
        raise ValueError(f"{source}: its moments are not those of {type(optimizer).__name__} for this "
                         "network; use the config that made it")
    settings = []
    for our, their in zip(ours["param_groups"], theirs["param_groups"]):
        settings.append(our | {"lr": their["lr"]})
    optimizer.load_state_dict({"state": theirs["state"], "param_groups": settings})


def check_counters(state: State, checkpoint: dict, path: Path) -> None:
    """Raises ValueError that names the first of those that cannot be of this run."""
    # A checkpoint of an older version knows no stages.
    plateau, edges = checkpoint["plateau"], checkpoint.setdefault("edges", [])
    possible = {
        "usage": checkpoints.is_like(checkpoint["usage"], state.usage),
        "step": checkpoint["step"] >= 0,
        "plateau": checkpoints.is_like(plateau, state.plateau) and 0 < plateau[1] <= 1,
        "global_batch": checkpoint["global_batch"] > 0,
        "log_scale": abs(checkpoint["log_scale"]) <= 127,
        "edges": edges == sorted(edges) and all(0 < edge <= checkpoint["step"] for edge in edges),
    }
    for name, fits in possible.items():
        if not fits:
            raise ValueError(f"{path} ({name}): does not fit this run, found "
                             f"{brief(checkpoint[name])}; use the config that made it")


def check_keys(ours: dict[str, Tensor], theirs: dict[str, Tensor] | None, source: str) -> None:
    """Raises ValueError that names the weights which are missing, unexpected or of another shape."""
    theirs = theirs or {}
    missing = sorted(ours.keys() - theirs.keys())
    unexpected = sorted(theirs.keys() - ours.keys())
    both = ours.keys() & theirs.keys()
    reshaped = sorted(name for name in both if not checkpoints.is_like(theirs[name], ours[name]))
    if missing or unexpected or reshaped:
        raise ValueError(f"{source}: does not fit this network: missing {missing[:5]}, unexpected "
                         f"{unexpected[:5]}, of another shape {reshaped[:5]} ({len(missing)}, "
                         f"{len(unexpected)}, {len(reshaped)} in all); use the config that made it")


def keep_global_batch(
    cfg: TrainConfig, base: TrainConfig, checkpoint: dict, say: Callable[[str], None]
) -> None:
    """Decide how many crops an optimizer step of a resumed run has, in the checkpoint.

    A run goes on with as many as it began with, and so with the same order of the data, on any number of
    ranks. Only where it is told another batch or accum, it is batch x accum x ranks from here on.
    base: the config that the run began with.
    """
    # A checkpoint of an older version does not say; such a run had one process.
    before = checkpoint.setdefault("global_batch", base.train.batch * base.train.accum)
    if (cfg.train.batch, cfg.train.accum) == (base.train.batch, base.train.accum):
        return
    now = cfg.train.batch * cfg.train.accum * ranks.workers()
    checkpoint["global_batch"] = now
    if now != before:
        say(f"{before} crops a step -> {now} (batch {cfg.train.batch} x accum {cfg.train.accum} x ranks "
            f"{ranks.workers()}): from here on the order of the data is another")


# -------------------------------------------------------------------------------- starting from weights

def start_from(state: State, path: Path, hints: str | None = None) -> tuple[list[str], bool]:
    """Put the weights of a run folder, a checkpoint of ours or a foreign file into a new state.

    Weights that do not fit stay new; the averages start from the same weights. hints: see foreign.py.
    Returns what to say about it, a line each, and whether a codebook was among them. Raises ValueError
    when no weight fits (biases fit by chance), or when a weight that is not trained does not.
    """
    # First their weights: of a run in progress the average, where it has one.
    for name in ("best.pt", "last.pt"):
        if (path / name).is_file():
            path = path / name
            break
    foreign = load_foreign(path, hints, "--train.init_hints")
    if foreign is not None:
        content = {"model": foreign.weights}
    else:
        content = checkpoints.load(path, "vae3d.weights", "vae3d.train", "vae3d.features")
    theirs = content["model"]
    if content.get("kind") == "vae3d.train" and content["ema"]:
        theirs = content["ema"][0]

    # Then those that fit, by their names and shapes.
    ours = full_weights(state)
    missing = sorted(ours.keys() - theirs.keys())
    unexpected = sorted(theirs.keys() - ours.keys())
    other_head = is_gaussian(state.model) != was_gaussian(content)
    fits, reshaped = fitting(ours, theirs, other_head)

    # Then whether that is enough.
    trained = {name: p.requires_grad for name, p in state.model.named_parameters()}
    frozen = [name for name, is_trained in trained.items() if not is_trained and name not in fits]
    if frozen:
        raise ValueError(f"--init {path}: {len(frozen)} weights that stay as they are do not fit, such as "
                         f"{frozen[0]}; use the preset and the section `vae` that made it")
    kernels = [name for name, weight in fits.items() if weight.dim() > 1]
    if all(name.startswith("quantizer.") for name in kernels):
        raise ValueError(f"--init {path}: none of its {len(theirs)} weights fits this network, such as "
                         f"{', '.join((unexpected + reshaped)[:2])}; use the preset and the section `vae` "
                         "that made it")

    # Then they are put in.
    for model in (state.model, *state.emas):
        model.load_state_dict(ours | fits)
    if state.masters is not None:
        state.masters.load(ours | fits)

    # And last, what to say.
    lines = [f"init: {len(fits)} of {len(ours)} weights from {path}"]
    if foreign is not None:
        low, high = state.model.cfg.intensity_range
        lines.append(f"init: a {foreign.layout} network; it is given {low:g} to {high:g} for the data's -1 "
                     "to 1 (vae.intensity_range)")
    left_out = {
        "missing there, left as new": missing,
        "unexpected, not used": unexpected,
        "of another shape": reshaped,
    }
    for what, names in left_out.items():
        if names:
            more = f"; and {len(names) - NAMED} more" if len(names) > NAMED else ""
            lines.append(f"init: {len(names)} {what}: {'; '.join(names[:NAMED])}{more}")
    return lines, any(name.startswith("quantizer.") and name.endswith("codebook") for name in fits)


def fitting(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor],
            other_head: bool) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Those of their weights that ours take, by name and shape, and a line for each of another shape.

    other_head: one encoder ends in mean and log-variance, the other in codes; of its last layers the mean's
    part is taken.
    """
    fits, reshaped = {}, []
    for name in sorted(ours.keys() & theirs.keys()):
        new, old = ours[name], theirs[name]
        if checkpoints.is_like(old, new):
            fits[name] = old
            continue
        change = f"{name} {tuple(old.shape)} -> {tuple(new.shape)}"
        mean = None
        if other_head and name.startswith(("encoder.head.conv.", "encoder.quant_conv.")):
            mean = with_their_mean(new, old)
        if mean is not None:
            fits[name] = mean
            reshaped.append(f"{change} (the mean's part taken)")
        else:
            reshaped.append(f"{change} (left as new)")
    return fits, reshaped


def is_gaussian(network: torch.nn.Module) -> bool:
    """Whether an autoencoder's encoder gives mean and log-variance; with a codebook it gives codes."""
    return getattr(getattr(network, "cfg", None), "bottleneck", None) == "kl"


def was_gaussian(content: dict) -> bool:
    """The same of what a checkpoint holds. A foreign file has no section `vae`, and is."""
    section = content.get("config", {}).get("vae")
    return not isinstance(section, dict) or section.get("bottleneck", "kl") == "kl"


def with_their_mean(new: Tensor, old: Tensor) -> Tensor | None:
    """A weight of the encoder's head, of which one is Gaussian and the other one for codes.

    A Gaussian head has twice the channels: mean, then log-variance. The mean is what the two heads share,
    so it is taken from `old`; the rest, if any, stays as in `new`. None where the shapes are others.
    """
    if not (new.dim() and old.dim()) or new.shape[1:] != old.shape[1:]:
        return None
    shared = min(len(new), len(old))
    if max(len(new), len(old)) != 2 * shared:
        return None
    return torch.cat([old[:shared].to(new), new[shared:]])
