"""The JSON of the sparse VQ-VAE guide (models, dataset, trainer) as a config of ours, key by key.

    python train.py --config ct_vqvae_stage1.json --data FOLDER

`translated` gives the sections of the config, and for each key a line that says what became of it: a field of
ours, or why it has no meaning here. A key that the guide does not have is named too, and left out.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from volumes.files import one_line
from volumes.surfaces import TOKEN

PARTS = ("models", "dataset", "trainer")
RESOLUTION = 512                              # of dataset.args, where it is not given
STEPS = 100_000                               # the guide's default of max_steps

# Key of models.vqvae.args -> field of section `sparse`.
NETWORK = {
    "model_channels": "model_channels", "latent_channels": "z_channels", "num_blocks": "num_blocks",
    "num_embeddings": "num_codes", "num_heads": "num_heads", "num_head_channels": "head_channels",
    "mlp_ratio": "mlp_ratio", "attn_mode": "attention", "window_size": "window", "pe_mode": "positions",
    "qk_rms_norm": "qk_norm",
}
# Key of trainer.args -> section and field.
TRAINER = {
    "max_steps": ("train", "steps"), "max_epoch": ("train", "epochs"), "num_workers": ("data", "workers"),
    "loss_type": ("loss", "recon"), "lambda_vq": ("sparse", "lambda_vq"),
    "lambda_commitment": ("sparse", "lambda_commitment"), "ema_rate": ("train", "ema"),
    "i_print": ("log", "every"), "i_sample": ("log", "sample_every"), "i_save": ("train", "save_every"),
    "i_ddpcheck": ("log", "ddp_check"),
}
DATASET = {"window_type": "window", "min_points": "min_points", "max_points": "max_points"}
# Keys without a field, and why.
REASONS = {
    "models.resolution": f"tokens are cells of {TOKEN}^3 voxels of any volume; nothing has to be a cube",
    "models.representation_config": "it is stored there and never read",
    "dataset.cache_data": "volumes lie memory-mapped in a cache, always: each crop reads its own rows",
    "dataset.precompute_sparse": "distances are computed once, into the cache, always",
    "trainer.fp16_scale_growth": "the loss scale of 16-bit weights grows by that rate as it is",
    "trainer.i_log": "log.jsonl has a row of every step",
}
SCHEDULERS = {"CosineAnnealingLR": "cosine", "ExponentialLR": "exponential", "StepLR": "step"}
FOLDERS = ("roots", "data_dir", "data_root", "path")


def is_guide(values: dict) -> bool:
    """Whether a config file has the guide's parts instead of sections of ours."""
    return any(name in values for name in PARTS)


class Translation:
    """Sections of ours, filled key by key, and what is said of each key."""
    def __init__(self):
        self.sections: dict[str, Any] = {"task": "sparse", "preset": "sparse_512"}
        self.lines: list[str] = []

    def put(self, key: str, section: str, field: str, value: Any, why: str = "") -> None:
        self.sections.setdefault(section, {})[field] = value
        shown = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        self.lines.append(f"{key} -> {section}.{field} {shown}{'; ' if why else ''}{why}")

    def leave(self, key: str, why: str) -> None:
        self.lines.append(f"{key}: no meaning here, {why}")


def translated(values: dict, source: str, say: Callable[[str], None]) -> dict:
    """The file's content -> sections of a config. Each line goes to `say`.

    Raises ValueError where a part does not have the guide's form.
    """
    found = Translation()
    network = arguments(values, "models", source)
    dataset = arguments(values, "dataset", source)
    trainer = arguments(values, "trainer", source)
    for name in values.keys() - set(PARTS):
        found.leave(one_line(name, 40), "the guide has no such part")
    # The guide has one codebook, which learns by gradient: so lambda_vq and, in stage 1, the rate matter.
    found.sections["sparse"] = {"codebooks": 1, "codebook_update": "gradient"}
    found.lines.append("the guide's codebook: sparse.codebooks 1, sparse.codebook_update gradient")
    steps = int(trainer.get("max_steps") or STEPS)
    of_network(network, int(dataset.get("resolution") or RESOLUTION), found)
    of_dataset(dataset, found)
    of_batches(trainer, found)
    of_stage(trainer, found)
    of_precision(network, trainer, found)
    of_optimizer(trainer, steps, found)
    for key, (section, field) in TRAINER.items():
        if trainer.get(key) is not None:
            found.put(f"trainer.{key}", section, field, trainer[key])
    if trainer.get("disable_snapshot"):
        found.put("trainer.disable_snapshot", "log", "sample_every", 0)
    tell_rest(network, dataset, trainer, found)
    for line in found.lines:
        say(f"{source}: {line}")
    return found.sections


def arguments(values: dict, part: str, source: str) -> dict:
    """The `args` of a part; of models those of its first network. {} where it is not given."""
    inner = values.get(part) or {}
    if part == "models" and isinstance(inner, dict) and "args" not in inner and inner:
        inner = next(iter(inner.values()))
    found = inner.get("args", {}) if isinstance(inner, dict) else None
    if not isinstance(found, dict):
        raise ValueError(f"{source}: {part} must hold `args`, a table of values, as the guide has it")
    return found


def of_network(network: dict, resolution: int, found: Translation) -> None:
    for key, field in NETWORK.items():
        if network.get(key) is not None:
            found.put(f"models.{key}", "sparse", field, network[key])
    if network.get("use_checkpoint"):
        found.put("models.use_checkpoint", "memory", "mode", "checkpoint")
    # Chunks of the decoder are tiles here: exact, and no voxel comes twice.
    chunks = int(network.get("chunk_size") or 1)
    if chunks > 1:
        edge = max(TOKEN, resolution // chunks)
        found.put("models.chunk_size", "memory", "mode", "tile", "exact tiles, computed again in backward")
        found.put("models.chunk_size", "memory", "tile", [edge] * 3, f"{resolution} / {chunks} voxels")


def of_dataset(dataset: dict, found: Translation) -> None:
    for key, field in DATASET.items():
        if dataset.get(key) is not None:
            found.put(f"dataset.{key}", "data", field, dataset[key])
    found.put("dataset.window_type", "data", "surface", "auto",
              "the surface at the window's level: inside of a window lies most of a scan")
    if dataset.get("resolution"):
        found.put("dataset.resolution", "data", "patch", [int(dataset["resolution"])] * 3,
                  "no crop is larger; a volume is not resized")
    for key in FOLDERS:
        folder = dataset.get(key)
        if isinstance(folder, str) and os.path.exists(folder):
            found.put(f"dataset.{key}", "data", "path", folder)


def of_batches(trainer: dict, found: Translation) -> None:
    """A batch in `batch_split` parts is so many micro-batches."""
    if trainer.get("batch_size_per_gpu") is None:
        return
    size, split = int(trainer["batch_size_per_gpu"]), int(trainer.get("batch_split") or 1)
    micro = max(1, size // split)
    found.put("trainer.batch_size_per_gpu", "train", "batch", micro)
    found.put("trainer.batch_split", "train", "accum", max(1, size // micro),
              f"{size} crops a step" if size >= split else f"{size} crops cannot be split in {split}")


def of_stage(trainer: dict, found: Translation) -> None:
    stage, path = trainer.get("training_stage"), trainer.get("pretrained_vae_path")
    is_there = isinstance(path, str) and os.path.exists(path)
    if is_there:
        found.put("trainer.pretrained_vae_path", "train", "init", path)
    elif path is not None:
        found.leave("trainer.pretrained_vae_path", f"there is no {one_line(path, 80)}; --init names a run of "
                                                   f"ours")
    if stage is None:
        return
    if is_there:
        found.put("trainer.training_stage", "train", "stage", int(stage))
    else:
        found.put("trainer.training_stage", "train", "stage", 0,
                  "without weights to start from all is trained; add --init RUN --train.stage "
                  f"{int(stage)}")


def of_precision(network: dict, trainer: dict, found: Translation) -> None:
    mode = trainer.get("fp16_mode")
    if mode == "inflat_all":
        found.put("trainer.fp16_mode", "train", "precision", "master16")
    elif mode == "amp" or network.get("use_fp16"):
        found.put("trainer.fp16_mode" if mode else "models.use_fp16", "train", "amp", True)


def of_optimizer(trainer: dict, steps: int, found: Translation) -> None:
    """Optimizer, schedule and clipping, each {"name": ..., "args": {...}}."""
    optimizer, schedule, clip = (trainer.get(name) for name in ("optimizer", "lr_scheduler", "grad_clip"))
    given = optimizer.get("args", {}) if isinstance(optimizer, dict) else {}
    if isinstance(optimizer, dict):
        found.put("trainer.optimizer.name", "optim", "optimizer", str(optimizer.get("name", "AdamW")).lower())
    rate = given.get("lr", trainer.get("lr"))
    if rate is not None:
        found.put("trainer.lr", "optim", "lr", rate)
    if given.get("weight_decay") is not None:
        found.put("trainer.optimizer.args.weight_decay", "optim", "weight_decay", given["weight_decay"])

    if isinstance(schedule, dict):
        name, args = schedule.get("name"), schedule.get("args", {})
        ours = SCHEDULERS.get(name, "constant")
        found.put("trainer.lr_scheduler.name", "optim", "schedule", ours)
        if ours == "cosine" and args.get("eta_min") is not None:
            found.put("trainer.lr_scheduler.args.eta_min", "optim", "lr_min", args["eta_min"])
        if args.get("T_max") not in (None, steps):
            found.leave("trainer.lr_scheduler.args.T_max", f"the schedule spans the run, {steps} steps")
        if ours == "exponential" and args.get("gamma") is not None:
            whole = max(float(args["gamma"]) ** steps, 1e-12)
            found.put("trainer.lr_scheduler.args.gamma", "optim", "gamma", whole,
                      f"{args['gamma']} a step over {steps} steps")

    if isinstance(clip, dict):
        args = clip.get("args", {})
        for key, field in (("max_norm", "grad_clip"), ("clip_percentile", "clip_percentile")):
            if args.get(key) is not None:
                found.put(f"trainer.grad_clip.args.{key}", "optim", field, args[key])
    elif clip is not None:
        found.put("trainer.grad_clip", "optim", "grad_clip", clip)


def tell_rest(network: dict, dataset: dict, trainer: dict, found: Translation) -> None:
    """Keys that became nothing: named with the reason."""
    said = {line.split(" ")[0].rstrip(":") for line in found.lines}
    for part, values in (("models", network), ("dataset", dataset), ("trainer", trainer)):
        for key, value in values.items():
            name = f"{part}.{key}"
            if any(each == name or each.startswith(name + ".") for each in said):
                continue
            if name in REASONS:
                found.leave(name, REASONS[name])
            elif value is None or value is False or value == 1:
                found.leave(name, f"{one_line(value, 20)} is how it is here")
            else:
                found.leave(name, "the guide does not have it")
