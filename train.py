"""Train a 3D VAE, VQ-VAE or U-Net with one command: the one place that wires configuration, data, networks, step, loop, checkpoints, logs.

    python train.py --preset ultra_lightweight --amp --accum 8          # no data named: built-in synthetic volumes
    python train.py --data FOLDER --patch 32,96,96 --steps 2000 --out runs/ct
    python train.py --resume runs/ct                                    # goes on bit for bit
    python train.py --task seg --data FOLDER                            # a U-Net on image/label pairs
    python train.py --task features --data FOLDER                       # a feature network for loss.perceptual_features
    torchrun --nproc_per_node 4 train.py --data FOLDER                  # on 4 GPUs: the batch of a step is batch x accum x 4

It reads top to bottom: configuration, state, step, validation, run folder, loop, command line.
Shapes: B batch, C channels, D H W depth height width. Intensities in [-1, 1], so PSNR and SSIM have data range 2. Memory is in GiB.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")              # before torch loads: on a shared core steps were 5 times slower without

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)                 # until main catches it: no traceback out of an import

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import inspect
import json
import math
import multiprocessing
import re
import resource
import shlex
import sys
import threading
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

import checkpoints
import data
import losses
import memtest
import parallel
import pictures
import unet
import vae3d
from data import DataConfig, DataError
from losses import LossConfig
from tiles import is_out_of_memory, together
from unet import UNet, UNetConfig
from vae3d import VAE3D, VAEConfig
from weights import BLOCKS, LAYOUTS, HintError, is_foreign, turn_axes
from weights import convert as convert_foreign

EXIT_DONE, EXIT_ERROR, EXIT_USAGE = 0, 1, 2
MAX_CONFIG = 2**17                                               # bytes; PyYAML reads some 10^5 a second
COUNTERS = ("step", "best", "best_loss", "bad_validations", "bad_steps", "finished", "latent", "usage", "norms", "log_scale",
            "global_batch", "validated", "sampled")              # for last.pt
TASKS = {"vae": vae3d.PRESETS, "seg": unet.PRESETS, "features": {}}  # task -> its presets; features has one network
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 138}
SECOND_SIGNAL = 1.0                                              # seconds; what comes sooner is the same one: `timeout` sends it twice


# ---------------------------------------------------------------------------------------------------------------- configuration

@dataclass
class OptimConfig:
    """Optimizer and learning-rate schedule. Defaults: what learned fastest on CT crops (docs/LOG.md)."""
    optimizer: str = "adamw"                                     # adamw | adam | sgd (momentum 0.9)
    lr: float = 5e-4                                             # the highest rate, after warm-up (docs/LOG.md)
    weight_decay: float = 0.01                                   # decoupled for adamw, L2 for the others
    schedule: str = "cosine"                                     # cosine | cosine_restarts | constant | exponential | step | plateau
    warmup: float = 0.05                                         # share of the run in which the rate rises linearly from 0
    lr_min: float = 0.0                                          # the cosine schedules end here
    restarts: int = 4                                            # cosine_restarts: number of equal periods
    gamma: float = 0.1                                           # exponential: factor over the whole run; step, plateau: factor a drop
    drops: int = 3                                               # step: number of equal stretches of the run, a drop between them
    plateau_patience: int = 5                                    # plateau: validations without improvement before a drop
    grad_clip: float = 1.0                                       # largest norm of the whole gradient, after unscaling; 0: no clipping
    clip_percentile: float = 0.0                                 # adaptive: this percentile of the last norms, at most grad_clip; 0: off
    clip_window: int = 1000                                      # finite norms that it looks back on; grad_clip until it has them

    def __post_init__(self):
        one_of("optim.optimizer", self.optimizer, ("adamw", "adam", "sgd"))
        one_of("optim.schedule", self.schedule, ("cosine", "cosine_restarts", "constant", "exponential", "step", "plateau"))
        at_least("optim", self, lr=0, weight_decay=0, warmup=0, lr_min=0, restarts=1, drops=1, plateau_patience=1, grad_clip=0,
                 clip_percentile=0, clip_window=1)
        if self.clip_percentile > 100:
            raise ValueError(f"optim.clip_percentile is a percentile up to 100, got {self.clip_percentile}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optim.gamma is a factor in (0, 1], got {self.gamma}")
        if self.warmup >= 1:
            raise ValueError(f"optim.warmup is a share of the run below 1, got {self.warmup}")


@dataclass
class RunConfig:
    """Section `train`: length, precision, validation, checkpoints."""
    out: str | None = None                                       # run folder; none: runs/PRESET, or the next free runs/PRESET-N
    init: str | None = None                                      # run folder, checkpoint or foreign autoencoder (weights.py) to start from
    init_hints: str | None = None                                # what a foreign file cannot say, weights.py's hints: norm_num_groups=8,...
                                                                 # and / or the JSON or YAML file of its constructor's arguments
    stage: int = 0                                               # 1: the codebook alone (needs init); 2: all, on from stage 1; 0: all
    seed: int = 0                                                # weights, split, crops, noise
    device: str = "auto"                                         # auto (cuda, mps, cpu in that order) | cuda | cuda:1 | mps | cpu
    amp: bool = False                                            # bf16 where the device has it, else fp16 with a GradScaler
    precision: str = "float32"                                   # of the weights: float32 | master16 (fp16, float32 masters, loss scale)
    batch: int = 2                                               # crops a micro-batch; small crops on a CPU: 1 is 7 times slower a voxel
    accum: int = 1                                               # micro-batches an optimizer step of a rank
    steps: int | None = None                                     # optimizer steps; with epochs too, whichever ends first
    epochs: int | None = None                                    # passes of data.crops_per_volume crops of every volume
    val_every: int = 50                                          # steps between validations; there is one at step 0 and at the end too
    val_crops: int = 8                                           # fixed seeded crops over all held-out volumes
    val_whole: bool = False                                      # validate on whole held-out volumes instead
    save_every: int = 50                                         # steps between writes of last.pt; there is one at the end too
    keep: int = 0                                                # older last.pt kept, as step_XXXXXX.pt
    ema: tuple[float, ...] = ()                                  # decays of averages of the weights; the first is validated and shipped
    patience: int = 0                                            # early stopping: validations without improvement; 0: off
    min_delta: float = 0.0                                       # improvement that counts
    metric: str = "auto"                                         # what best.pt and early stopping look at: psnr | ssim | l1 | loss | dice |
                                                                 # explained; auto: psnr (vae), dice (seg), explained (features)
    nan_limit: int = 5                                           # non-finite steps in a row that stop the run
    latent_crops: int = 32                                       # training crops over which the latent's mean and std are measured
    compile: bool = False                                        # torch.compile the network
    deterministic: bool = True                                   # cuDNN's deterministic kernels, so that a resumed run on CUDA is exact too

    def __post_init__(self):
        one_of("train.metric", self.metric, ("auto", *HIGHER_IS_BETTER))
        one_of("train.precision", self.precision, ("float32", "master16"))
        one_of("train.stage", self.stage, (0, 1, 2))
        at_least("train", self, batch=1, accum=1, val_every=1, val_crops=1, save_every=1, keep=0, patience=0, min_delta=0, nan_limit=1,
                 latent_crops=1)
        for name in ("steps", "epochs"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        self.ema = tuple(rate for rate in self.ema if rate != 0)
        if not all(0 < rate < 1 for rate in self.ema):
            raise ValueError(f"train.ema holds decays below 1, 0 for none, got {self.ema}")


@dataclass
class MemoryConfig:
    """The memory dial (vae3d.VAE3D.memory) and the CUDA allocator."""
    mode: str = "none"                                           # none | checkpoint | tile
    tile: tuple[int, int, int] | None = None                     # tile: D,H,W in voxels of the input; auto: chosen by a cost model
    tile_parallel: bool = False                                  # tile: the ranks share the tiles of the same volumes, instead of the batch
    stretch: str = "auto"                                        # tile: levels a stretch from the finest down, such as 2+1; auto: chosen
    budget: float | None = None                                  # tile: GiB that a step may take; none: what the card has free
    recover: bool = True                                         # out of memory: turn the dial one step and repeat the optimizer step
    expandable_segments: bool = True                             # CUDA allocator: less fragmentation
    max_split_size_mb: int = 0                                   # CUDA allocator: largest block that is split; 0: no limit

    def __post_init__(self):
        one_of("memory.mode", self.mode, vae3d.MEMORY_MODES)
        if self.tile_parallel and self.mode != "tile":           # recovery leads to tile and never away from it
            raise ValueError(f"memory.tile_parallel shares tiles among ranks, but memory.mode is {self.mode}, which has none; "
                             f"add --memory.mode tile")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"memory.budget is a number of GiB above 0, got {self.budget}")
        if self.max_split_size_mb and self.max_split_size_mb <= 20:
            raise ValueError(f"memory.max_split_size_mb must be 0 or above 20 (the allocator's smallest), got {self.max_split_size_mb}")


@dataclass
class LogConfig:
    every: int = 10                                              # steps between console lines; log.jsonl has every step
    sample_every: int = 100                                      # steps between pictures; 0: never; there is one at the end too
    samples: int = 2                                             # held-out volumes of which pictures are made
    histogram_every: int = 100                                   # steps between histograms for tensorboard and wandb; 0: never
    tensorboard: bool = False                                    # write OUT/tensorboard (pip install tensorboard)
    wandb: bool = False                                          # log to Weights & Biases (pip install wandb)
    wandb_project: str = "vae3d"                                 # its project
    ddp_check: int = 100                                         # steps between comparisons of all weights across the ranks; 0: never

    def __post_init__(self):
        at_least("log", self, every=1, sample_every=0, samples=1, histogram_every=0, ddp_check=0)


@dataclass
class TrainConfig:
    """Everything that a run depends on; saved as config.yaml and inside every checkpoint."""
    task: str = "vae"                                            # vae | seg (U-Net, image/label pairs) | features (for the perceptual loss)
    preset: str = "ultra_lightweight"                            # start of section `vae` (vae3d.PRESETS) or `unet` (unet.PRESETS)
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    log: LogConfig = field(default_factory=LogConfig)


SECTIONS = [f for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING]
SHORT_FLAGS = {"--data": "data.path", "--patch": "data.patch", "--workers": "data.workers"} | {
    f"--{name}": f"train.{name}" for name in ("out", "init", "amp", "accum", "batch", "steps", "epochs", "seed", "device", "compile")}
HIGHER_IS_BETTER = {"psnr": True, "ssim": True, "l1": False, "loss": False, "dice": True, "explained": True}


def metric_of(cfg: TrainConfig) -> str:
    """train.metric, with `auto` resolved by the task."""
    return {"vae": "psnr", "seg": "dice", "features": "explained"}[cfg.task] if cfg.train.metric == "auto" else cfg.train.metric


def one_of(name: str, value, choices: Sequence) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {data.brief(value, 200)}")


def at_least(section: str, config, **bounds: float) -> None:
    for name, bound in bounds.items():
        if not getattr(config, name) >= bound:
            raise ValueError(f"{section}.{name} must be at least {bound}, got {getattr(config, name)}")


def convert(value: Any, hint: Any, name: str) -> Any:
    """A value from YAML or a flag -> the field's type: "1e-4" -> 1e-4, "16,64,64" -> (16, 64, 64), "1,2,2;2,2,2" -> two triples."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must be free of NUL, got {data.brief(value, 200)}")
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() in ("none", "null", "auto", "")):
            return None
        errors = []
        for choice in (a for a in args if a is not type(None)):
            try:
                return convert(value, choice, name)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if origin is tuple:
        nested = typing.get_origin(args[0]) is tuple
        if isinstance(value, str):
            value = [part for part in value.strip("()[] ").split(";" if nested else ",") if part.strip()]
        if not isinstance(value, (list, tuple)):
            value = [value]
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise ValueError(f"{name} needs {len(args)} values{' (D,H,W)' if len(args) == 3 else ''}, got {data.brief(value, 200)}")
        return tuple(convert(part, args[0], name) for part in value)
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[hint]
    if hint is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in known:
            return known[str(value).lower()]
    elif not isinstance(value, bool) and isinstance(value, (int, float, str)):
        try:
            if hint is str or hint(value) == float(value):
                return hint(value)
        except (ValueError, OverflowError):
            pass
        if hint is float and str(value).lower() == "nan":
            raise ValueError(f"{name} must be a number, got nan")
    raise ValueError(f"{name} must be {kind}, got {data.brief(value, 200)}")


def config_from(values: dict, base: TrainConfig, source: str) -> TrainConfig:
    """`base` with {section: {field: value}} put over it. Raises ValueError for an unknown key, naming the closest one."""
    result = {}
    for key, value in values.items():
        current = getattr(base, key) if key in [f.name for f in SECTIONS] else None
        if key in ("task", "preset"):
            result[key] = convert(value, str, f"{source}: {key}")
            continue
        if not dataclasses.is_dataclass(current):
            known = [f.name for f in dataclasses.fields(base)]
            raise ValueError(f"{source}: unknown key {data.one_line(key)}{closest(str(key), known, '')}")
        if value is None:
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{source}: section {key} must hold `field: value` lines, got {data.brief(value, 200)}")
        hints = typing.get_type_hints(type(current))
        for name in value:
            if name not in hints:
                raise ValueError(f"{source}: unknown key {key}.{data.one_line(name)}{closest(str(name), hints, key + '.')}")
        result[key] = dataclasses.replace(current, **{name: convert(v, hints[name], f"{key}.{name}") for name, v in value.items()})
    one_of(f"{source}: task", result.get("task", base.task), TASKS)
    return dataclasses.replace(base, **result)


def closest(word: str, words, prefix: str) -> str:
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(map(str, words))}"


def load_config(argv: Sequence[str], base: TrainConfig | None = None) -> TrainConfig:
    """Defaults, preset, YAML file, flags: later beats earlier. `base` (a checkpoint's config) takes the place of the first two; where
    train.init is a foreign file, what it says of section `vae` that of the preset.

    Raises ValueError with one line: which flag or key, what was found, what to do.
    """
    options = vars(build_parser().parse_args(list(argv)))
    flags: dict = {}
    for name, value in options.items():
        section, _, key = name.rpartition(".")
        if name not in COMMANDS:
            (flags.setdefault(section, {}) if section else flags)[key] = value
    from_file = read_yaml(options["config"]) if options.get("config") else {}
    if base is None:
        task = flags.get("task", from_file.get("task", TrainConfig.task))
        one_of("task", task, tuple(TASKS))
        presets = TASKS[task] or {TrainConfig.preset: None}
        preset = flags.get("preset", from_file.get("preset", next(iter(presets))))
        if foreign := foreign_init(flags, from_file, task):
            preset, presets = foreign.layout, {foreign.layout: foreign.vae}
            from_file.pop("preset", None)                        # the file's network stands in its place
        elif task == "vae" and "preset" not in flags and preset in LAYOUTS:  # config.yaml of such a run, all in it
            presets = {preset: VAEConfig()}
        one_of("preset", preset, tuple(presets))
        base = {"vae": lambda: TrainConfig(task, preset, vae=presets[preset]), "features": lambda: TrainConfig(task, preset),
                "seg": lambda: TrainConfig(task, preset, unet=presets[preset], data=DataConfig(foreground=0.33))}[task]()  # as nnU-Net's
    elif "train.init" in options or "train.init_hints" in options:
        raise ValueError("--init and --resume exclude one another: a resumed run goes on with its own weights")
    for name in ("task", "preset"):
        wanted = flags.get(name, from_file.get(name, getattr(base, name)))
        if wanted != getattr(base, name):
            raise ValueError(f"{name} {wanted}: the run to resume was built with {getattr(base, name)}; leave it out")
    cfg = config_from(flags, config_from(from_file, base, str(options.get("config"))), "command line")
    if cfg.train.precision == "master16" and (cfg.train.amp or cfg.task != "vae"):
        raise ValueError("train.precision=master16 is for --task vae, without --amp: its weights have 16 bits already")
    if cfg.train.stage == 1 and (cfg.loss.adv_weight or cfg.loss.perceptual_weight):
        raise ValueError("train.stage 1 trains the codebook alone; set loss.adv_weight and loss.perceptual_weight to 0")
    return cfg


def foreign_init(flags: dict, from_file: dict, task: str) -> Foreign | None:
    """The network of train.init where another library made it. ValueError where flags deny it."""
    section = from_file.get("train") if isinstance(from_file.get("train"), dict) else {}
    given = {name: {**section, **flags.get("train", {})}.get(name) for name in ("init", "init_hints")}
    init, hints = (convert(value, str | None, f"train.{name}") for name, value in given.items())
    foreign = load_foreign(init, hints, "--train.init_hints") if init is not None else None
    if foreign is None:
        if "init_hints" in flags.get("train", {}):
            raise ValueError("--train.init_hints are about a foreign file, and " + (
                f"--init {init} is none: its checkpoint says it all; leave them out" if init else "there is no --init"))
    elif task != "vae":
        raise ValueError(f"--init {init}: is an autoencoder (layout {foreign.layout}), for --task vae, not {task}")
    elif "preset" in flags:
        raise ValueError(f"--init {init}: says itself what the network is; leave --preset out (single fields: --vae.FIELD)")
    return foreign


class Foreign(NamedTuple):
    """An autoencoder of another library, converted."""
    layout: str                                                  # of weights.LAYOUTS
    vae: VAEConfig
    weights: dict[str, Tensor]


def load_foreign(path: str | Path, hints: str | None, flag: str) -> Foreign | None:
    """What weights.py makes of a file; None for a folder, an absent file and what is not foreign. flag: with which the hints were given.

    intensity_range is what the layout's own scripts use unless a hint says otherwise: [0, 1] for MONAI's, else [-1, 1]; and so are the
    axes: MONAI reads volumes as x,y,z, so that its kernels are turned round. ValueError in one line.
    """
    content = checkpoints.read(path) if Path(path).is_file() else None
    layout = is_foreign(content)
    if layout is None:
        return None
    named, several = read_hints(hints, flag)
    named.setdefault("intensity_range", (0.0, 1.0) if layout in BLOCKS else VAEConfig.intensity_range)
    axes = named.pop("axes", "xyz" if layout in BLOCKS else "zyx")
    one_of(f"{flag}: axes", axes, ("xyz", "zyx"))
    errors = []
    for arguments in several:                                    # a MAISI config describes two autoencoders: the one that fits
        try:
            vae, state = convert_foreign(content, **{**arguments, **named})
            return Foreign(layout, vae, turn_axes(state) if axes == "xyz" else state)
        except HintError as error:
            errors.append(f"{path}: {error} ({flag} NAME=VALUE,NAME=VALUE,... or the original's CONFIG.json)")
        except (ValueError, TypeError) as error:                 # TypeError: of strides that are no lists, and the like
            errors.append(f"{path}: {line_of(error)}" + f" (given {flag} {hints})" * isinstance(error, TypeError))
    raise ValueError(errors[0])


def read_hints(text: str | None, flag: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """"FILE,NAME=VALUE,NAME=VALUE" -> the named values, read as YAML; and the arguments of each autoencoder in FILE, [{}] without one."""
    named, several = {}, [{}]
    for part in re.split(r",(?=\s*\w+\s*=)", text) if text else ():
        name, is_named, value = part.partition("=")
        if Path(part).is_file():
            several = autoencoder_arguments(part)
        elif not is_named:
            raise ValueError(f"{flag}: {part} is neither NAME=VALUE nor a file")
        elif name.strip() in named or not value.strip():
            raise ValueError(f"{flag}: {name.strip()} is given {'twice' if value.strip() else 'without a value'}")
        else:
            try:
                named[name.strip()] = with_numbers(yaml.safe_load(value if "[" in value or "," not in value else f"[{value.strip('() ')}]"))
            except yaml.YAMLError as error:
                raise ValueError(f"{flag}: {part} cannot be read: {line_of(error)}") from None
    for arguments in several:
        for name, value in arguments.items():
            if isinstance(value, str) and value[:1] in ("@", "$") and name not in named:
                raise ValueError(f"{flag}: the file says {name}: {value!r}, which is not evaluated here; add {name}=VALUE")
    return named, several


def with_numbers(value: Any) -> Any:
    """YAML reads 1e-6 as a text."""
    if isinstance(value, list):
        return [with_numbers(part) for part in value]
    with contextlib.suppress(ValueError):
        return float(value) if isinstance(value, str) else value
    return value


def autoencoder_arguments(path: str) -> list[dict[str, Any]]:
    """Constructor arguments of each autoencoder in a JSON or YAML file such as a MONAI bundle's, "@name" put in. ValueError without any."""
    try:                                                         # JSON may be indented by tabs, YAML not
        content = json.loads(Path(path).read_text(encoding="utf-8")) if path.endswith(".json") else read_yaml(path)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read: {line_of(error)}") from None

    def entries(value: Any) -> Iterator[dict]:
        if isinstance(value, dict) and value.keys() & {"latent_channels", "latent_dim"} and value.keys() & {
                "channels", "num_channels", "block_out_channels", "base_channels"}:
            yield value
        for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            yield from entries(part)

    def resolved(value: Any) -> Any:
        found = content
        for name in re.split("[#:]+", value[1:]) if isinstance(value, str) and value.startswith("@") else ():
            found = found.get(name) if isinstance(found, dict) else None
        return with_numbers(value if found is content or found is None else found)
    found = [{name: resolved(value) for name, value in entry.items() if not name.startswith("_")} for entry in entries(content)]
    if not found:
        raise ValueError(f"{path}: describes no autoencoder; looked for latent_channels beside channels or num_channels")
    return found


class ConfigLoader(yaml.SafeLoader):
    """SafeLoader that refuses what it would take in silence: a key twice, and aliases that multiply (a billion values in 500 bytes)."""
    def compose_node(self, parent, index):
        alias = self.peek_event() if self.check_event(yaml.AliasEvent) else None
        if alias is not None and not isinstance(self.anchors.get(alias.anchor, parent), yaml.ScalarNode):
            raise yaml.YAMLError(f"*{alias.anchor} in line {alias.start_mark.line + 1} is no single value; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            raise yaml.YAMLError(f"the key {data.brief(max(names, key=names.count), 200)} stands twice in one section")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """Raises ValueError in one line."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        if (size := os.path.getsize(path)) > MAX_CONFIG:
            raise ValueError(f"{size} bytes, a config has {MAX_CONFIG} at most")
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), ConfigLoader)
    except Exception as error:  # PyYAML raises IndexError, KeyError, AttributeError and RecursionError too, by the tag
        raise ValueError(f"{path}: cannot be read as YAML: {line_of(error)}") from None
    if not isinstance(values or {}, dict):
        raise ValueError(f"{path}: must hold sections such as `data:` and `train:`, got {type(values).__name__}")
    return values or {}


def line_of(error: object) -> str:
    """Its message as one line; of what a DataLoader's worker raised, the last line of its traceback, which is the message."""
    text = str(error)
    if "in DataLoader worker process" in text:
        text = text.rstrip().splitlines()[-1].partition(": ")[2]
    return data.one_line(text, 1000) or type(error).__name__


class Parser(argparse.ArgumentParser):
    """argparse with house errors: one line that names the closest flag."""
    def error(self, message: str) -> typing.NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
        if unknown.startswith("-") and message.startswith("unrecognized"):
            message = f"unknown flag {unknown}{closest(unknown, self._option_string_actions, '')[:300]}"
        raise ValueError(message)


COMMANDS = ("config", "resume", "dry_run", "fit")


def build_parser() -> Parser:
    """The flags of DESIGN.md; those of the sections come from the dataclasses, their help from the comments beside the fields."""
    parser = Parser(prog="train.py", description=__doc__.split("\n\n")[0], allow_abbrev=False, argument_default=argparse.SUPPRESS,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=140))
    parser.add_argument("--config", metavar="YAML", help="experiment file, see config/")
    parser.add_argument("--resume", metavar="RUN_OR_FILE", help="go on with a run; config, data and out come from it")
    parser.add_argument("--dry-run", action="store_true", dest="dry_run",
                        help="print the resolved config and the predicted peak, then stop")
    parser.add_argument("--fit", metavar="GIB", nargs="?", const="free",
                        help="choose the cheapest memory settings that fit; without a number: into the card's free memory")
    short = {path: flag for flag, path in SHORT_FLAGS.items()}
    parser.add_argument("--task", metavar="NAME", help=" | ".join(TASKS) + " [vae]")
    presets = "; ".join(f"{task}: {' | '.join(names)}" for task, names in TASKS.items() if names)
    parser.add_argument("--preset", metavar="NAME", help=presets)
    for section in SECTIONS:
        group = parser.add_argument_group(f"section {section.name}")
        cls = section.default_factory
        comments, hints = field_comments(cls), typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            path = f"{section.name}.{f.name}"
            names = [short[path]] if path in short else []
            names += [f"--{path}"]
            options = {"nargs": "?", "const": "true"} if hints[f.name] is bool else {}
            text = comments.get(f.name, "") + ("" if f.default is dataclasses.MISSING else f" [{f.default}]")
            group.add_argument(*names, dest=path, metavar=f.name.upper(), help=text.replace("%", "%%"), **options)
    return parser


@functools.cache                                                 # 0.4 s for all sections: inspect parses a module for each
def field_comments(cls) -> dict[str, str]:
    """Field name -> the comment beside it in the source."""
    try:
        lines = inspect.getsource(cls).splitlines()
    except OSError:
        return {}
    return {line.split(":")[0].strip(): line.partition("# ")[2] for line in lines if ":" in line and "# " in line}


def config_dict(cfg: TrainConfig) -> dict:
    """Plain nested dict for YAML and checkpoints; tuples become lists."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
    return plain(dataclasses.asdict(cfg))


def to_yaml(cfg: TrainConfig) -> str:
    return yaml.safe_dump(config_dict(cfg), sort_keys=False, default_flow_style=None, width=120)


# ------------------------------------------------------------------------------------------------------------------------ state

@dataclass
class State:
    """All that changes during a run; `last.pt` holds it."""
    model: torch.nn.Module                                       # VAE3D, UNet or losses.FeatureTrainer
    forward: Callable                                            # model, or its compiled form
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype | None                                # None: no autocast
    emas: list[torch.nn.Module]                                  # one per train.ema
    masters: list[Tensor] | None                                 # float32 copies of 16-bit weights
    perceptual: losses.PerceptualLoss3d | None
    disc: losses.PatchDiscriminator3d | None
    disc_optimizer: torch.optim.Optimizer | None
    lecam: losses.LeCam | None
    step: int = 0                                                # optimizer steps done
    best: float | None = None                                    # best value of train.metric so far
    best_loss: float = math.inf                                  # of that validation: decides where the metric ties
    bad_validations: int = 0                                     # since the best, for early stopping
    plateau: tuple[float, float, int] = (math.inf, 1.0, 0)       # best loss, factor of the rate, validations since the best
    bad_steps: int = 0                                           # non-finite steps in a row
    finished: bool = False
    validated: int = -1                                          # step of the last whole validation
    sampled: int = 0                                             # step of the last whole set of pictures
    latent: dict | None = None                                   # mean, std (Z,), scale_factor
    usage: Tensor | None = None                                  # (K,) int64: choices of each code in this epoch
    norms: list[float] = field(default_factory=list)             # the last finite gradient norms before clipping
    log_scale: float = 16.0                                      # master16: the loss is multiplied by 2 to this power
    global_batch: int = 0                                        # crops an optimizer step, over all ranks
    updating: bool = False                                       # between the first and the last write of an update

    @property
    def shipped(self) -> torch.nn.Module:
        """The weights that are validated and that a user would ship."""
        return self.emas[0] if self.emas else self.model

    @property
    def weights(self) -> list[Tensor]:
        """What the optimizer moves, in float32."""
        return self.masters if self.masters is not None else list(self.model.parameters())


def pick_device(name: str) -> torch.device:
    """Raises ValueError when the device does not exist here. Under torchrun each rank of a machine has a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device must be auto, cuda, cuda:N, mps or cpu, got {name!r}") from None
    found = {"cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
             "mps": torch.backends.mps.is_available(), "cpu": True}.get(device.type, False)
    if device.type == "cuda" and device.index is None and parallel.world() > 1:
        device = torch.device("cuda", parallel.local_rank())
        found = found and device.index < torch.cuda.device_count()
    if not found:
        raise ValueError(f"train.device={name}: torch {torch.__version__} sees no such device here; use --device cpu, or install a torch "
                         f"build for the card")
    return device


def pick_precision(amp: bool, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype (None: float32) and why. A CUDA device that is only simulated counts as one with bf16."""
    if not amp:
        return None, "float32"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16")):
            return None, "float32: --amp is off, this CPU has no native bf16"
        if not cpu_bf16_is_right():
            return None, "float32: --amp is off, bf16 convolutions give wrong gradients on this CPU"
        return torch.bfloat16, "bf16 autocast"
    if device.type == "cuda" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16, "fp16 autocast with a GradScaler: the card has no native bf16"
    return (torch.bfloat16, "bf16 autocast") if device.type == "cuda" else (torch.float16, "fp16 autocast with a GradScaler")


@functools.cache
def cpu_bf16_is_right() -> bool:
    """False where oneDNN's bf16 weight gradient of a 3x3x3 convolution is not the true one.

    With torch 2.13 on a CPU with avx512_bf16 it holds memory that nobody wrote wherever the depth is 2.
    """
    with _disable_current_modes(), torch.inference_mode(False):  # memtest.py may be simulating a step
        for channels in (16, 32, 64):
            generator = torch.Generator().manual_seed(channels)
            x, grad = (torch.randn(1, channels, 2, 8, 8, generator=generator) for _ in range(2))
            found = []
            for dtype in (torch.float32, torch.bfloat16):
                torch.full((3 * 27 * channels ** 2,), 1e30)      # freed at once, so that memory that is read unwritten shows
                weight = torch.zeros(channels, channels, 3, 3, 3, dtype=dtype, requires_grad=True)
                with torch.enable_grad():
                    F.conv3d(x.to(dtype), weight, padding=1).backward(grad.to(dtype))
                found.append(weight.grad.float())
            if not (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max():  # not <: NaN too
                return False
    return True


def new_state(cfg: TrainConfig, device: torch.device, features: dict | None = None) -> State:
    """Networks and optimizers as at step 0, a function of the config alone; features: those of the run to resume, not the file's."""
    torch.manual_seed(cfg.train.seed)
    model = on_device(build_network(cfg), device)
    if cfg.train.stage == 1:
        model.encoder.requires_grad_(False)
        model.decoder.requires_grad_(False)
    emas = []
    for _ in cfg.train.ema:
        emas.append(on_device(build_network(cfg).requires_grad_(False), device))
        emas[-1].load_state_dict(model.state_dict())
    masters = None
    if cfg.train.precision == "master16":
        full = [p.detach().clone().requires_grad_(p.requires_grad) for p in model.parameters()]
        for name, part in model.named_children():
            if name != "quantizer":                              # codes stay float32: 16 bits lose half of them
                part.to(torch.float16)
        masters = [master if p.dtype is torch.float16 else p for master, p in zip(full, model.parameters())]
    amp_dtype, _ = pick_precision(cfg.train.amp, device)
    o, weights = cfg.optim, masters or list(model.parameters())
    optimizer = {
        "adamw": lambda: torch.optim.AdamW(weights, o.lr, weight_decay=o.weight_decay, fused=True),
        "adam": lambda: torch.optim.Adam(weights, o.lr, weight_decay=o.weight_decay, fused=True),
        "sgd": lambda: torch.optim.SGD(weights, o.lr, momentum=0.9, weight_decay=o.weight_decay, fused=True),
    }[o.optimizer]()
    disc, disc_optimizer = None, None
    if cfg.task == "vae" and cfg.loss.adv_weight:
        disc = on_device(build_discriminator(cfg), device)
        disc_optimizer = torch.optim.Adam(disc.parameters(), disc_rate(cfg), betas=(0.5, 0.9), fused=True)  # as VQGAN's
    state = State(model, torch.compile(model) if cfg.train.compile else model, optimizer,
                  torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16), amp_dtype, emas, masters,
                  build_perceptual(cfg, device, features), disc, disc_optimizer,
                  losses.LeCam().to(device) if cfg.loss.lecam_weight else None,
                  global_batch=cfg.train.batch * cfg.train.accum * parallel.workers())
    for each in (optimizer, disc_optimizer):
        if each is not None:
            allocate_moments(each)
    if quantizer_of(model):
        state.usage = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
    turn_dial(cfg, state, cfg.memory)
    return state


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would allocate: out of memory there, half of the weights would have moved already."""
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if p.requires_grad):
            if isinstance(optimizer, torch.optim.SGD):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            else:
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def build_network(cfg: TrainConfig) -> torch.nn.Module:
    """The network of the task. Raises ValueError for a stage without a codebook."""
    if cfg.task == "seg":
        return UNet(cfg.unet)
    if cfg.task == "features":
        return losses.FeatureTrainer(losses.FeatureNet3d(seed=cfg.train.seed))
    if cfg.train.stage and cfg.vae.bottleneck != "vq":
        raise ValueError(f"train.stage {cfg.train.stage} trains a codebook, but vae.bottleneck is {cfg.vae.bottleneck}; "
                         f"add --vae.bottleneck vq")
    return VAE3D(cfg.vae)


def build_discriminator(cfg: TrainConfig) -> losses.PatchDiscriminator3d:
    """Raises ValueError when the crops that it sees are too small for it."""
    loss = cfg.loss
    disc = losses.PatchDiscriminator3d(cfg.vae.in_channels, loss.disc_channels, loss.disc_layers, loss.disc_strides, loss.disc_norm)
    seen = [min(n, c) for n, c in zip(cfg.data.patch, loss.crop or cfg.data.patch)] if cfg.data.patch else disc.least_size
    if any(n < least for n, least in zip(seen, disc.least_size)):
        raise ValueError(f"the discriminator sees crops of {','.join(map(str, seen))} (--patch, loss.crop), but {loss.disc_layers} layers "
                         f"of loss.disc_strides {loss.disc_strides} need {','.join(map(str, disc.least_size))}; give strides of 1 to the "
                         f"short axis, or fewer loss.disc_layers")
    return disc


def build_perceptual(cfg: TrainConfig, device: torch.device, content: dict | None) -> losses.PerceptualLoss3d | None:
    """loss.perceptual_features (or `content` of such a file) as a frozen network, None where the weight is 0. ValueError for a bad file."""
    if cfg.task != "vae" or not cfg.loss.perceptual_weight:
        return None
    if cfg.loss.perceptual_features == "random":
        features = losses.FeatureNet3d()
    else:
        content = content or checkpoints.load(cfg.loss.perceptual_features, "vae3d.features")
        try:
            features = losses.FeatureNet3d.from_checkpoint(content)
        except ValueError as error:
            raise ValueError(f"{cfg.loss.perceptual_features}: {error}") from None
    return on_device(losses.PerceptualLoss3d(features), device)


def on_device(module: torch.nn.Module, device: torch.device) -> Any:
    """In channels_last_3d, except on MPS, which has none."""
    return module.to(device) if device.type == "mps" else module.to(device).to(memory_format=torch.channels_last_3d)


def quantizer_of(model: torch.nn.Module) -> torch.nn.Module | None:
    return getattr(model, "quantizer", None)


def running_statistics(model: torch.nn.Module) -> list[Tensor]:
    """What a forward pass moves: all buffers but the codebook's."""
    return [b for name, b in model.named_buffers() if not name.startswith("quantizer.")]


def tensors_of(state: State) -> dict[str, Tensor]:
    """All that must be the same on every rank, by name."""
    modules = {"model": state.model, "disc": state.disc, "lecam": state.lecam, "features": state.perceptual}
    modules |= {f"ema {k}": ema for k, ema in enumerate(state.emas)}
    named = {f"master {k}": master for k, master in enumerate(state.masters or ())}
    for part, module in modules.items():
        named |= {f"{part} {name}": tensor for name, tensor in (module.state_dict() if module is not None else {}).items()}
    return named


def disc_rate(cfg: TrainConfig) -> float:
    return cfg.optim.lr if cfg.loss.disc_lr is None else cfg.loss.disc_lr


def set_dial(model: torch.nn.Module, memory: MemoryConfig, rehearsal: bool = False) -> Any:
    """Raises ValueError for a mode that the network does not have.

    memory.tile_parallel: every rank takes the same micro-batches with the same noise (the global batch is batch x accum), and backward()
    leaves the whole gradients on each, so a step reduces neither gradients nor terms over the ranks.
    """
    if isinstance(model, VAE3D):
        dist = torch.distributed
        group = dist.group.WORLD if memory.tile_parallel and dist.is_available() and dist.is_initialized() else None
        return model.memory(memory.mode, memory.tile, memory.stretch, memory.budget, group, rehearsal)
    if isinstance(model, UNet):
        return model.memory(memory.mode)
    if memory.mode != "none":
        raise ValueError(f"memory.mode={memory.mode}: the feature network is small and has no memory dial; leave it at none")
    return model


# ------------------------------------------------------------------------------------------------------------------------- step

class MicroBatch(NamedTuple):
    image: Tensor                                                # (b, C, D, H, W) in [-1, 1]
    seeds: list[int]                                             # one per sample, of its random numbers
    volumes: list[int]                                           # where the crops come from
    label: Tensor | None = None                                  # (b, D, H, W) int64, for segmentation
    window: int | None = None                                    # crops in the whole window; none: those of the micro-batches at hand


class StepResult(NamedTuple):
    terms: dict[str, Tensor]                                     # each () on the device, the mean over the window
    norm: Tensor                                                 # of the gradient before clipping
    updated: bool                                                # False: something was not finite, the weights are as before


def train_step(cfg: TrainConfig, state: State, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """One update of the network, and of the discriminator where there is one. Peak memory is one micro-batch's: no graph outlives its
    backward().

    Each micro-batch counts by its number of crops, so that k of them equal one batch, also for a short tail (loss.adaptive_weight is the
    exception: a ratio of each micro-batch's own). Weights, codebook and averages change only after all is known to be finite; what the
    forward pass moves, the running statistics of batch norm, is put back where the step fails.
    """
    with statistics_put_back(state.model) as failed:
        result = try_step(cfg, state, micro_batches)
        failed[0] = not result.updated
    return result


@contextlib.contextmanager
def statistics_put_back(model: torch.nn.Module) -> Iterator[list[bool]]:
    """Restore the network's buffers (not the codebook's) after an exception, or where the list that is given says so."""
    buffers = running_statistics(model)
    before, failed = [b.clone() for b in buffers], [True]
    try:
        yield failed
    finally:
        if failed[0]:
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


def try_step(cfg: TrainConfig, state: State, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """train_step, without putting anything back."""
    total, quantizer = sum(len(m.image) for m in micro_batches), quantizer_of(state.model)
    gan = state.disc is not None and state.step >= cfg.loss.disc_start
    optimizers = [state.optimizer, *([state.disc_optimizer] if gan else [])]
    sums: dict[str, Tensor] = {}
    usage = 0 if state.usage is None else torch.zeros_like(state.usage)
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    state.model.zero_grad(set_to_none=True)                      # 16-bit weights are not the optimizer's own
    if quantizer is not None:
        quantizer.collected = []                                 # what a step that ran out of memory had collected
    for micro in micro_batches:
        share = len(micro.image) / (micro.window or total)
        generators = [torch.Generator().manual_seed(seed) for seed in micro.seeds]  # made here: a repeated step draws the same noise
        out, terms, crops = objective(cfg, state, state.forward, micro, generators, state.step)
        if gan:
            generator_terms(cfg, state, crops, terms)
        if terms["loss"].requires_grad:                          # not where a codebook learns by averages alone
            scaled(state, terms["loss"] * share).backward()
        if gan:
            crops = [crop.detach() for crop in crops]
            critic = discriminator_terms(cfg, state, crops)
            scaled(state, critic["disc"] * share).backward()
            terms |= critic
        if quantizer is not None:
            usage = usage + torch.zeros_like(state.usage).scatter_add_(0, out.index.flatten(), torch.ones_like(out.index).flatten())
        for name, term in terms.items():                         # stays on the device: no sync per micro-batch
            sums[name] = sums.get(name, 0) + term.detach() * share
        del out, terms, crops                                    # the next forward must not find this graph alive
    sums = reduced(state, [state.model, *([state.disc] if gan else [])], sums, usage)
    norm = unscaled_norm(state, optimizers, clip_threshold(cfg.optim, state.norms))
    finite = norm + sums["loss"]                                 # both: |NaN| has a zero gradient, so the norm alone misses it
    if gan:
        finite = finite + sums["disc"] + torch.nn.utils.clip_grad_norm_(state.disc.parameters(), cfg.optim.grad_clip or math.inf)
    updated = bool(torch.isfinite(finite))
    if updated:
        for optimizer in optimizers:
            if has_gradients(optimizer):
                state.scaler.step(optimizer)
                state.updating = True
        if state.masters is not None:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in state.model.parameters()], state.masters)
        parallel.average(running_statistics(state.model) + (running_statistics(state.disc) if gan else []))
        if quantizer is not None:
            quantizer.update(torch.Generator().manual_seed(seed_of(cfg.train.seed, "codebook", state.step)))
            state.usage += usage
        if state.lecam is not None and gan:
            state.lecam.update(sums["logits_real"], sums["logits_fake"])
        for ema, decay in zip(state.emas, cfg.train.ema):
            update_ema(ema, state, min(decay, (1 + state.step) / (10 + state.step)))
        if cfg.optim.clip_percentile:
            state.norms = [*state.norms, float(norm)][-cfg.optim.clip_window:]
    if state.masters is not None:
        state.log_scale += 1e-3 if updated else -1.0             # doubles in 1,000 steps, halves at once
    if any(has_gradients(optimizer) for optimizer in optimizers):
        state.scaler.update()
    state.updating = False
    return StepResult(sums, norm, updated)


def reduced(state: State, models: Sequence[torch.nn.Module], sums: dict[str, Tensor], usage: Tensor | int) -> dict[str, Tensor]:
    """Gradients and codebook usage (in place) and terms, added up over the ranks, once all of them have theirs.

    Each rank then clips, decides and updates by the same numbers. Alone on each rank, and averaged, are only what a forward pass moves:
    the running statistics of batch norm, the vectors of spectral norm.
    """
    if parallel.workers() == 1:
        with shared_failure(state):                              # tile_parallel: no rank updates before all have their gradients
            pass
        state.updating = parallel.world() > 1
        return sums
    gradients = parallel.Gradients([p for model in models for p in model.parameters()])
    parallel.agreed()
    state.updating = True                                        # a rank that runs out of memory now cannot have the others repeat
    gradients.add_up()
    if state.usage is not None:
        parallel.add_up(usage)
    return parallel.summed(sums, next(state.model.parameters()).device)


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    return any(p.grad is not None for group in optimizer.param_groups for p in group["params"])


def scaled(state: State, loss: Tensor) -> Tensor:
    return state.scaler.scale(loss) if state.masters is None else loss * 2.0 ** state.log_scale


def unscaled_norm(state: State, optimizers: Sequence[torch.optim.Optimizer], threshold: float) -> Tensor:
    """Gradients in true units, since the threshold is; those of the network clipped. Returns their norm before that."""
    if state.masters is not None:
        for master, p in zip(state.masters, state.model.parameters()):
            grad, p.grad = p.grad, None
            master.grad = None if grad is None else grad.float() * 2.0 ** -state.log_scale
        for p in state.disc.parameters() if len(optimizers) > 1 else ():
            p.grad *= 2.0 ** -state.log_scale
    for optimizer in optimizers:
        if has_gradients(optimizer):
            state.scaler.unscale_(optimizer)
    return torch.nn.utils.clip_grad_norm_(state.weights, threshold)


def clip_threshold(o: OptimConfig, norms: Sequence[float]) -> float:
    """optim.grad_clip, or the percentile of the last norms where that is lower and there are enough of them."""
    fixed = o.grad_clip or math.inf
    if not o.clip_percentile or len(norms) < o.clip_window:
        return fixed
    return min(fixed, float(torch.tensor(norms, dtype=torch.float64).quantile(o.clip_percentile / 100)))


def objective(cfg: TrainConfig, state: State, network: Callable, micro: MicroBatch, generators: Sequence[torch.Generator],
              step: int | None) -> tuple[Any, dict[str, Tensor], list[Tensor]]:
    """The network's output; the terms of its criterion by name, each () float32 or wider, `loss` their weighted sum; and for the
    discriminator the sub-crops of image and reconstruction. step: for warm-ups; None: all terms in full, so that validations compare."""
    if cfg.task == "seg":
        out = forward(state, network, micro.image) if step is not None else segmented(cfg, state, network, micro.image)
        return out, segmentation_terms(cfg, out, micro.label.to(out.logits.device)), []
    if cfg.task == "features":
        out = forward(state, network, micro.image, *losses.degrade(micro.image, generators))
        return out, {"loss": out.loss, "explained": out.explained.mean()}, []
    out = forward(state, network, micro.image, generators)
    crops = []
    if state.disc is not None or state.perceptual is not None:
        starts = losses.crop_starts(micro.image.shape, cfg.loss.crop, generators)
        crops = [losses.sub_crop(x, starts, cfg.loss.crop) for x in (micro.image, out.recon)]
    return out, reconstruction_terms(cfg.loss, state, out, micro.image, crops, step), crops


def reconstruction_terms(cfg: LossConfig, state: State, out: vae3d.VAEOutput | vae3d.VQOutput, image: Tensor,
                         crops: Sequence[Tensor], step: int | None) -> dict[str, Tensor]:
    weighting = cfg.channel_weights, cfg.foreground_weight, cfg.background
    terms = {cfg.recon: losses.reconstruction_loss(out.recon, image, cfg.recon, *weighting)}
    loss = terms[cfg.recon]
    if isinstance(out, vae3d.VQOutput):
        terms["vq"] = out.vq_loss
        loss = loss + out.vq_loss
    else:
        terms["kl"] = losses.kl_loss(out.mu, out.logvar)
        loss = loss + cfg.kl_weight * terms["kl"]
    if cfg.structure_weight:
        terms["structure"] = losses.structure_loss(out.recon, image, *weighting)
        loss = loss + cfg.structure_weight * terms["structure"]
    weight = cfg.perceptual_weight * (1 if step is None else ramp(step, cfg.perceptual_start, cfg.perceptual_warmup))
    if weight:
        real, fake = crops
        terms["perceptual"] = state.perceptual(fake, real)
        loss = loss + weight * terms["perceptual"]
    return {"loss": loss, **terms}


def ramp(step: int, start: int, warmup: int) -> float:
    """0 before `start`, then rising linearly to 1 over `warmup` steps."""
    return 0.0 if step < start else min(1.0, (step - start + 1) / max(1, warmup))


def judge(state: State, crop: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The discriminator in the run's precision; its own weights are float32 also where the autoencoder's are not."""
    return forward(state, state.disc, crop if state.masters is None else crop.float())


def generator_terms(cfg: TrainConfig, state: State, crops: Sequence[Tensor], terms: dict[str, Tensor]) -> None:
    """Add what the discriminator says of the reconstruction to terms["loss"]; the discriminator is left without gradients (DEFECTS 6)."""
    loss, (real, fake) = cfg.loss, crops
    state.disc.requires_grad_(False)
    logits, features = judge(state, fake)
    terms["adv"] = losses.generator_loss(logits, loss.adv_loss)
    weight = loss.adv_weight * ramp(state.step, loss.disc_start, loss.disc_warmup)
    if loss.adaptive_weight:
        terms["adaptive_weight"] = losses.adaptive_weight(terms["loss"], terms["adv"], state.model.decoder.head.conv.weight,
                                                          scale=float(scaled(state, torch.ones((), device=fake.device))))
        weight = weight * terms["adaptive_weight"]
    terms["loss"] = terms["loss"] + weight * terms["adv"]
    if loss.feature_matching_weight:
        with torch.no_grad():
            features_real = judge(state, real)[1]
        terms["feature_matching"] = losses.feature_matching_loss(features_real, features)
        terms["loss"] = terms["loss"] + loss.feature_matching_weight * terms["feature_matching"]
    state.disc.requires_grad_(True)


def discriminator_terms(cfg: TrainConfig, state: State, crops: Sequence[Tensor]) -> dict[str, Tensor]:
    """The discriminator's own criterion `disc` on detached crops, and the mean logits."""
    loss, (real, fake) = cfg.loss, crops
    logits_real, logits_fake = judge(state, real)[0], judge(state, fake)[0]
    total = losses.discriminator_loss(logits_real, logits_fake, loss.adv_loss)
    if state.lecam is not None:
        total = total + loss.lecam_weight * state.lecam(logits_real, logits_fake)
    if loss.r1_weight and state.step % loss.r1_every == 0:
        real = losses.wide(real).detach().requires_grad_()
        with torch.autocast(real.device.type, enabled=False):    # squares of 16-bit gradients underflow
            total = total + loss.r1_every * loss.r1_weight * losses.r1_penalty(state.disc(real)[0], real)
    return {"disc": total, "logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()}


def segmented(cfg: TrainConfig, state: State, network: Callable, image: Tensor) -> unet.UNetOutput:
    """A crop in one pass, a whole volume in windows of the crop's size, as predict.py does; those logits are on the CPU."""
    if tuple(image.shape[2:]) == tuple(cfg.data.patch):
        return forward(state, network, image)
    slabs = unet.window_logits(lambda x: forward(state, network, x).logits, image, cfg.data.patch, background=cfg.loss.background)
    return unet.UNetOutput(torch.cat(list(slabs), 1)[None], ())


def segmentation_terms(cfg: TrainConfig, out: unet.UNetOutput, label: Tensor) -> dict[str, Tensor]:
    """Cross-entropy and Dice; with deep supervision also at the lower levels, each with half the weight of the one above (nnU-Net)."""
    options = cfg.loss.dice_share, cfg.loss.class_weights, cfg.data.ignore_label
    loss, ce, dice_loss = losses.segmentation_loss(out.logits, label, *options)
    weights = [0.5 ** (level + 1) for level in range(len(out.deep))]
    if out.deep:                                                 # on an axis below the stride the U-Net repeats the border; so here
        least = [s if n < s else 1 for n, s in zip(label.shape[1:], cfg.unet.total_stride)]
        label = vae3d.pad_to_multiple(label[:, None].float(), least)[:, 0]
    for logits, weight in zip(out.deep, weights):
        small = F.interpolate(label[:, None].float(), logits.shape[2:], mode="nearest")[:, 0].long()
        loss = loss + weight * losses.segmentation_loss(logits, small, *options).loss
    return {"loss": loss / (1 + sum(weights)), "ce": ce, "dice_loss": dice_loss}


def with_recovery(cfg: TrainConfig, state: State, shape: Sequence[int], note: Callable[[str], None], work: Callable[[], Any]) -> Any:
    """work(), and after an out-of-memory the same again one step further down the dial; optimizer, batch and resolution stay.

    shape: (b, C, D, H, W) of what the network is given. `note` is told of each change. Raises RunStopped when there is no step left.
    The ranks turn the dial together, so each must call this alike, and `work` must end with parallel.agreed, or have it inside; with
    memory.tile_parallel it is tiles.together that carries one rank's failure to the others.
    """
    while True:
        scaler = state.scaler.state_dict()
        try:
            with shared_failure(state):
                return work()
        except RuntimeError as error:                            # torch.OutOfMemoryError is one; the CPU's allocator raises it plain
            if not cfg.memory.recover or not is_out_of_memory(error):
                raise
            if state.updating:
                raise RunStopped(f"out of memory while the weights were being updated, at {dial_text(cfg.memory)}; go on from last.pt, "
                                 f"with the next --memory.mode") from None
            where = parallel.ran_out(error)
        # outside of the except clause: its traceback would keep the failed step's tensors alive
        softer = parallel.chosen(where, lambda: next_dial(cfg.memory, state, shape))  # by that rank's free memory
        if softer is None:
            raise RunStopped(f"out of memory at {dial_text(cfg.memory)}, the last step of the dial; use a smaller --patch or --batch "
                             f"(more --accum keeps the effective batch)")
        change = f"{dial_text(cfg.memory)} -> {dial_text(softer)}"
        turn_dial(cfg, state, softer)
        note(f"step {state.step + 1}: out of memory, memory dial {change}; the step is repeated")
        for holder in (state.optimizer, state.disc_optimizer, state.model):
            if holder is not None:
                holder.zero_grad(set_to_none=True)
        if quantizer_of(state.model) is not None:
            state.model.quantizer.collected = []
        fresh = torch.amp.GradScaler(state.scaler._device, enabled=state.scaler.is_enabled())
        fresh.load_state_dict(scaler)                            # the old one may hold gradients that it has unscaled already
        state.scaler = fresh
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shared_failure(state: State) -> contextlib.AbstractContextManager:
    """With memory.tile_parallel what fails on one rank inside raises on all."""
    return together(getattr(state.model, "group", None), next(state.model.parameters()))


def turn_dial(cfg: TrainConfig, state: State, memory: MemoryConfig) -> None:
    cfg.memory = memory
    for model in (state.model, *state.emas):
        set_dial(model, memory)


def next_dial(memory: MemoryConfig, state: State, shape: Sequence[int]) -> MemoryConfig | None:
    """none -> checkpoint -> tile -> a tile that is predicted to take at most 4/5 of the memory; None at the end."""
    if memory.mode == "none" and isinstance(state.model, (VAE3D, UNet)):
        return dataclasses.replace(memory, mode="checkpoint")
    if not isinstance(state.model, VAE3D):                       # no other network has exact tiles
        return None
    free = dataclasses.replace(memory, mode="tile", tile=None, stretch="auto")
    if memory.mode == "checkpoint":
        return settled(free, state, shape)
    batch, size, dtype = shape[0], shape[2:], activations(state)
    now = state.model.tile_plan(size, batch, dtype, next(state.model.parameters()).device).peak_bytes
    plans = set_dial(VAE3D(state.model.cfg), free).tile_plans(size, batch, dtype)
    smaller = [plan for plan in plans if plan.peak_bytes <= 0.8 * now]
    return dataclasses.replace(free, tile=smaller[0].tile, stretch=smaller[0].stretch) if smaller else None


def settled(memory: MemoryConfig, state: State, shape: Sequence[int]) -> MemoryConfig:
    """The dial with what it leaves to `auto` chosen for good: on CUDA the choice depends on the free memory, and a resumed run must not."""
    if memory.mode != "tile" or memory.tile is not None and memory.stretch != "auto":
        return memory
    planner = set_dial(VAE3D(state.model.cfg), memory)
    plan = planner.tile_plan(shape[2:], shape[0], activations(state), next(state.model.parameters()).device)
    return dataclasses.replace(memory, tile=plan.tile, stretch=plan.stretch)


def dial_text(memory: MemoryConfig) -> str:
    if memory.mode != "tile":
        return memory.mode
    return f"tile {'auto' if memory.tile is None else ','.join(map(str, memory.tile))}, stretch {memory.stretch}"


def activations(state: State) -> torch.dtype:
    return torch.float16 if state.masters is not None else state.amp_dtype or torch.float32


def forward(state: State, network: Callable, *inputs) -> Any:
    """network(*inputs) in the run's precision."""
    if (network is state.model or network is state.forward) and state.masters is not None:
        inputs = [x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.autocast(inputs[0].device.type, state.amp_dtype, enabled=state.amp_dtype is not None):
        return network(*inputs)


@torch.no_grad()
def update_ema(ema: torch.nn.Module, state: State, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * weights; buffers (codebooks, running statistics) as they are.

    The decay rises with the step, so that the start is forgotten.
    """
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in state.weights], 1 - decay)
    for old, new in zip(ema.buffers(), state.model.buffers()):
        old.copy_(new)


def learning_rate(o: OptimConfig, step: int, total: int, plateau_factor: float = 1.0) -> float:
    """The rate of step `step` in [0, total): linear warm-up to o.lr, then the schedule as a function of the part t in [0, 1) done.

    cosine: lr_min + (lr - lr_min)(1 + cos pi t)/2 (arXiv:1608.03983, Eq. 5; restarts: of each period); exponential: lr gamma^t;
    step: lr gamma^floor(drops t); plateau: lr times the factor that the validations gave.
    """
    warm = int(o.warmup * total)
    if step < warm:
        return o.lr * (step + 1) / warm
    t = (step - warm) / max(1, total - warm)
    if o.schedule in ("cosine", "cosine_restarts"):
        t = t * o.restarts % 1 if o.schedule == "cosine_restarts" else t
        return o.lr_min + (o.lr - o.lr_min) * (1 + math.cos(math.pi * t)) / 2
    return o.lr * {"constant": 1.0, "exponential": o.gamma ** t, "step": o.gamma ** int(o.drops * t), "plateau": plateau_factor}[o.schedule]


def seed_of(*parts) -> int:
    """A 63-bit seed that is a function of its arguments alone, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def window_of(step: int, epoch_length: int, global_batch: int) -> range:
    """The crops of optimizer step `step`, numbered through the run: windows of global_batch, the last of an epoch as short as it is."""
    per_epoch = steps_per_epoch(epoch_length, global_batch)
    epoch, place = divmod(step, per_epoch)
    first = epoch * epoch_length + place * global_batch
    return range(first, min(first + global_batch, (epoch + 1) * epoch_length))


def steps_per_epoch(epoch_length: int, global_batch: int) -> int:
    return -(-epoch_length // global_batch)


def micro_windows(window: range, batch: int) -> list[range]:
    """This rank's share of the micro-batches that a window is cut into. It may be none of a short one."""
    return [window[batch * i:batch * (i + 1)] for i in parallel.shared(-(-len(window) // batch))]


def step_batches(cfg: TrainConfig, crops: data.Crops, steps: range, device: torch.device,
                 global_batch: int) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this rank's micro-batches on the device) for each step. Crops and noise are functions of (seed, step, place in the window)."""
    def shares() -> Iterator[tuple[range, list[range]]]:
        windows = (window_of(step, len(crops), global_batch) for step in steps)
        return ((window, micro_windows(window, cfg.train.batch)) for window in windows)
    loader = torch.utils.data.DataLoader(
        crops, batch_sampler=[list(part) for _, parts in shares() for part in parts], num_workers=cfg.data.workers,
        pin_memory=cfg.data.pin_memory and device.type == "cuda",
        worker_init_fn=(lambda _: os.setpgid(0, 0)) if parallel.world() > 1 else None)  # torchrun's signals reach a rank's whole group
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)   # for the workers, who inherit it: Ctrl-C and batch systems signal all of a
    try:                                                         # process group, and the run would end by the loss of its workers
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for step, (window, parts) in zip(steps, shares()):
        micro_batches = []
        for part in parts:
            image, *label, volumes = next(batches)
            seeds = [seed_of(cfg.train.seed, "noise", step, number - window.start) for number in part]
            micro_batches.append(MicroBatch(to_device(image, device), seeds, volumes.tolist(), *(x.to(device) for x in label),
                                            window=len(window)))
        yield step, micro_batches


def to_device(image: Tensor, device: torch.device) -> Tensor:
    image = image.to(device, non_blocking=True)
    return image if device.type == "mps" else image.contiguous(memory_format=torch.channels_last_3d)


def make_step(cfg: TrainConfig, device: torch.device | str, rehearsal: bool = False) -> Callable[[], StepResult]:
    """A closure that runs the real train_step on one window of random crops, for memtest.py; the call itself builds the networks.

    rehearsal: for memtest.predict, on tensors without data (VAE3D.memory).
    """
    device = torch.device(device)
    state = new_state(cfg, device)
    set_dial(state.model, cfg.memory, rehearsal)
    last = max(cfg.loss.disc_start, cfg.loss.perceptual_start)
    state.step = -(-last // cfg.loss.r1_every) * cfg.loss.r1_every  # a step with all that the run will have
    batch, size, micro_batches = cfg.train.batch, cfg.data.patch, []
    channels = cfg.unet.in_channels if cfg.task == "seg" else cfg.vae.in_channels
    for _ in range(cfg.train.accum):
        label = torch.zeros(batch, *size, dtype=torch.int64, device=device) if cfg.task == "seg" else None
        micro_batches.append(MicroBatch(to_device(torch.randn(batch, channels, *size), device), list(range(batch)), [0] * batch, label))
    return lambda: train_step(cfg, state, micro_batches)


def update_best(cfg: TrainConfig, state: State, metrics: dict[str, float]) -> bool:
    """Count a validation for best.pt, early stopping and the plateau schedule; True when it is the best so far."""
    name = metric_of(cfg)
    if name not in metrics:
        raise ValueError(f"train.metric={name} is none of the metrics of --task {cfg.task}: {', '.join(metrics)}")
    value, loss = metrics[name], metrics["loss"]
    if not math.isfinite(value):                                 # such as the Dice of held-out labels without a class
        value = -math.inf if HIGHER_IS_BETTER[name] else math.inf
    gain = 0.0 if state.best in (None, value) else (value - state.best) * (1 if HIGHER_IS_BETTER[name] else -1)
    early = cfg.task == "vae" and state.step <= max(cfg.loss.disc_start * bool(cfg.loss.adv_weight),
                                                    cfg.loss.perceptual_start * bool(cfg.loss.perceptual_weight))
    first, tie = early or state.best is None, gain == 0 and loss < state.best_loss  # until all terms have set in the last is the best
    better = math.isfinite(loss) and (first or gain > 0 or tie)
    state.bad_validations = 0 if better and (first or gain > cfg.train.min_delta) else state.bad_validations + 1
    if better:
        state.best, state.best_loss = value, loss
    lowest, factor, waited = state.plateau
    if metrics["loss"] < lowest:
        lowest, waited = metrics["loss"], 0
    elif waited + 1 >= cfg.optim.plateau_patience:
        factor, waited = factor * cfg.optim.gamma, 0
    else:
        waited += 1
    state.plateau = (lowest, factor, waited)
    return better


# ------------------------------------------------------------------------------------------------------------------- run folder

class RunStopped(RuntimeError):
    """The run cannot go on; its state is kept. The message is one line."""


def run_folder(cfg: TrainConfig) -> Path:
    """The folder of a new run. Raises ValueError when train.out is given and holds a run already."""
    if cfg.train.out is not None:
        out = Path(cfg.train.out)
        if any((out / name).exists() for name in ("last.pt", "last.prev.pt")):
            raise ValueError(f"--out {out} already holds a run; go on with --resume {out}, or name another folder")
        return out
    names = (f"{cfg.preset}{suffix}" for suffix in ["", *(f"-{n}" for n in range(2, 10_000))])
    return next(path for path in (Path("runs") / name for name in names) if not path.exists())


def checkpoint_of(cfg: TrainConfig, state: State, dataset: data.Data) -> dict:
    """The content of last.pt: tensors and plain values only, and nothing that differs between two runs of the same command."""
    parts = {name: getattr(state, name) and getattr(state, name).state_dict() for name in ("disc", "disc_optimizer", "lecam")}
    if state.perceptual is not None:
        parts["features"] = state.perceptual.features.to_checkpoint()
    return {"kind": "vae3d.train", "version": checkpoints.VERSIONS["vae3d.train"], "config": shared_config(cfg), "data": facts_of(dataset),
            "model": full_weights(state), "ema": [ema.state_dict() for ema in state.emas], **parts,
            "optimizer": state.optimizer.state_dict(), "scaler": state.scaler.state_dict(), "plateau": list(state.plateau),
            **{name: getattr(state, name) for name in COUNTERS}}


def shared_config(cfg: TrainConfig) -> dict:
    """As plain values, without the folder that the run lies in."""
    config = config_dict(cfg)
    config["train"].pop("out")
    return config


def full_weights(state: State) -> dict[str, Tensor]:
    """The network's state dict, in float32 also where it trains in 16 bits."""
    weights = state.model.state_dict()
    if state.masters is not None:
        weights |= {name: master.detach() for (name, _), master in zip(state.model.named_parameters(), state.masters)}
    return weights


def start_from(state: State, path: Path, hints: str | None = None) -> tuple[list[str], bool]:
    """Put the weights of a run folder, a checkpoint of ours or a foreign file into a new state, as far as they fit.

    Returns what to say about it, a line each, and whether a codebook was among them. The averages start from the same weights. Between a
    Gaussian head (mean and log-variance) and one for codes the mean is what they share. Raises ValueError when no weight fits (biases fit
    by chance), or, frozen where they are not trained, when some of them do not.
    """
    path = next((path / name for name in ("best.pt", "last.pt") if (path / name).is_file()), path)
    foreign = load_foreign(path, hints, "--train.init_hints")
    content = {"model": foreign.weights} if foreign else checkpoints.load(path, "vae3d.weights", "vae3d.train", "vae3d.features")
    theirs = content["ema"][0] if content.get("kind") == "vae3d.train" and content["ema"] else content["model"]
    ours = full_weights(state)
    fits, reshaped = {}, []
    section = content.get("config", {}).get("vae")
    gaussian = [isinstance(state.model, VAE3D) and state.model.cfg.bottleneck == "kl",
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
        raise ValueError(f"--init {path}: {len(frozen)} weights that stay as they are do not fit, such as {frozen[0]}; "
                         f"use the preset and the section `vae` that made it")
    if not any(weight.dim() > 1 and not name.startswith("quantizer.") for name, weight in fits.items()):
        raise ValueError(f"--init {path}: none of its {len(theirs)} weights fits this network, such as "
                         f"{', '.join((unexpected + reshaped)[:2])}; use the preset and the section `vae` that made it")
    for model in (state.model, *state.emas):
        model.load_state_dict(ours | fits)
    if state.masters is not None:
        for (name, _), master in zip(state.model.named_parameters(), state.masters):
            master.data.copy_((ours | fits)[name])
    lines = [f"init: {len(fits)} of {len(ours)} weights from {path}"]
    if foreign:
        low, high = state.model.cfg.intensity_range
        lines.append(f"init: a {foreign.layout} network; it is given {low:g} to {high:g} for the data's -1 to 1 (vae.intensity_range)")
    lines += [f"init: {len(names)} {what}: {'; '.join(names)}" for what, names in
              (("missing there, left as new", missing), ("unexpected, not used", unexpected), ("of another shape", reshaped)) if names]
    return lines, "quantizer.codebook" in fits


def restore(state: State, checkpoint: dict, path: Path) -> None:
    """Put a checkpoint into a new state of the same config. Raises ValueError naming the keys that do not fit."""
    if len(checkpoint["ema"]) != len(state.emas):
        raise ValueError(f"{path}: holds {len(checkpoint['ema'])} averages, train.ema asks for {len(state.emas)}; leave --train.ema out")
    modules = [(state.model, "model", checkpoint["model"]), (state.disc, "disc", checkpoint["disc"]),
               (state.lecam, "lecam", checkpoint["lecam"])]
    modules += [(ema, "ema", weights) for ema, weights in zip(state.emas, checkpoint["ema"])]
    for module, name, weights in modules:
        if module is not None:
            check_keys(module.state_dict(), weights, f"{path} ({name})")
            module.load_state_dict(weights)
    if state.masters is not None:
        for (name, _), master in zip(state.model.named_parameters(), state.masters):
            master.data.copy_(checkpoint["model"][name])
    for optimizer, name in ((state.optimizer, "optimizer"), (state.disc_optimizer, "disc_optimizer")):
        if optimizer is not None:
            ours, theirs = optimizer.state_dict(), checkpoint[name] or {"state": None}
            if not checkpoints.is_like(theirs["state"], ours["state"]):
                raise ValueError(f"{path} ({name}): its moments are not those of {type(optimizer).__name__} for this network; use the "
                                 f"config that made it")
            groups = [group | {"lr": their["lr"]} for group, their in zip(ours["param_groups"], theirs["param_groups"])]
            optimizer.load_state_dict({"state": theirs["state"], "param_groups": groups})
    possible = {"usage": checkpoints.is_like(checkpoint["usage"], state.usage), "step": checkpoint["step"] >= 0,
                "plateau": checkpoints.is_like(checkpoint["plateau"], state.plateau) and 0 < checkpoint["plateau"][1] <= 1,
                "global_batch": checkpoint["global_batch"] > 0, "log_scale": abs(checkpoint["log_scale"]) <= 127}
    if wrong := [name for name, fits in possible.items() if not fits]:
        raise ValueError(f"{path} ({wrong[0]}): does not fit this run, found {data.brief(checkpoint[wrong[0]])}; use the config that made "
                         f"it")
    if checkpoints.is_like(checkpoint["scaler"], state.scaler.state_dict()):  # else it was of use then and is not now, or the reverse
        state.scaler.load_state_dict(checkpoint["scaler"])
    device = next(state.model.parameters()).device
    for name in COUNTERS:
        value = checkpoint[name]
        setattr(state, name, value.to(device) if isinstance(value, Tensor) else value)
    state.plateau = tuple(checkpoint["plateau"])


def check_keys(ours: dict[str, Tensor], theirs: dict[str, Tensor] | None, source: str) -> None:
    theirs = theirs or {}
    missing, unexpected = sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    reshaped = sorted(k for k in ours.keys() & theirs.keys() if not checkpoints.is_like(theirs[k], ours[k]))
    if missing or unexpected or reshaped:
        raise ValueError(f"{source}: does not fit this network: missing {missing[:5]}, unexpected {unexpected[:5]}, of another shape "
                         f"{reshaped[:5]} ({len(missing)}, {len(unexpected)}, {len(reshaped)} in all); use the config that made it")


VAL_SHOWN = ("psnr", "ssim", "l1", "iou", "sharpness", "dice", "explained", "loss")
TERMS_SHOWN = ("loss", *losses.RECONSTRUCTION, "kl", "vq", "structure", "perceptual", "adv", "disc", "ce", "dice_loss", "explained",
               "codebook_usage", "perplexity")


class Log:
    """log.jsonl, the console and, on request, TensorBoard and Weights & Biases; on other ranks than the first, nothing."""
    def __init__(self, cfg: TrainConfig, out: Path, total: int, start: int, sinks: list, validated: int = -1):
        self.cfg, self.path, self.total, self.start, self.started = cfg, out / "log.jsonl", total, start, time.monotonic()
        self.live, self.sinks = sys.stdout.isatty(), sinks
        if self.path.exists() and parallel.first():              # rows after the checkpoint belong to steps that are taken again
            rows = [line for line in self.path.read_text().splitlines() if is_before(line, start, validated)]
            checkpoints.write_atomic(self.path, lambda file: file.write("".join(row + "\n" for row in rows).encode()))
        self.file = open(self.path if parallel.first() else os.devnull, "a", encoding="utf-8")

    def write(self, row: dict) -> None:
        """Append to log.jsonl alone."""
        with checkpoints.naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()

    def row(self, row: dict) -> None:
        """Append to log.jsonl (non-finite numbers as null) and to the sinks, and print."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.write(row)
        for sink in self.sinks:
            sink.scalars({f"{row['split']}/{k}": v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}, row["step"])
        step = row["step"]
        if row["split"] == "val":
            self.say(f"step {step}/{self.total}  validation  " + "  ".join(
                f"{name} {shown(row[name])}{' dB' * (name == 'psnr')}" for name in VAL_SHOWN if name in row))
        elif self.live or step % self.cfg.log.every == 0 or step == self.total or "skipped" in row:
            left = (time.monotonic() - self.started) / max(1, step - self.start) * (self.total - step)
            terms = "  ".join(f"{k} {shown(row[k])}" for k in TERMS_SHOWN if k in row)
            line = (f"step {step}/{self.total}  {terms}  lr {row['lr']:.1e}  {row['voxels_per_second']:.2g} voxels/s  "
                    f"{row['peak_gib']:.2f} GiB  {int(left // 60)}:{int(left % 60):02d} left")
            tell(f"\r{line}\x1b[K" if self.live else line, end="" if self.live else "\n")

    def say(self, text: str) -> None:
        tell(f"\r\x1b[K{text}" if self.live else text)

    def close(self) -> None:
        try:
            with checkpoints.naming(self.path):                  # what a full disk did not take is tried once more
                self.file.close()
        finally:
            for sink in self.sinks:
                sink.close()


def tell(text: str, end: str = "\n") -> None:
    """To the console. A reader that is gone (Ctrl-C ends the `tee` behind it too) stops no run: log.jsonl has it all."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")


def is_before(line: str, step: int, validated: int) -> bool:
    try:
        row = json.loads(line)
        return row["step"] <= (validated if row.get("split") == "val" else step)
    except (ValueError, KeyError, TypeError, AttributeError):    # the last line of a killed run may be cut short
        return False


def shown(value: float | None) -> str:
    return "nan" if value is None else f"{value:.4g}"


def open_sinks(cfg: TrainConfig, out: Path) -> list:
    """TensorBoard and W&B when asked for, on the first rank. Raises ValueError with the pip command when one is not installed."""
    sinks = []
    if not parallel.first():
        return sinks
    if cfg.log.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("log.tensorboard: TensorBoard is not installed; python -m pip install tensorboard") from None
        sinks.append(TensorBoardSink(SummaryWriter(str(out / "tensorboard"))))
    if cfg.log.wandb:
        try:
            import wandb
        except ImportError:
            raise ValueError("log.wandb: Weights & Biases is not installed; python -m pip install wandb") from None
        sinks.append(WandbSink(wandb, wandb.init(project=cfg.log.wandb_project, dir=str(out), config=config_dict(cfg), name=out.name)))
    return sinks


class TensorBoardSink:
    def __init__(self, writer):
        self.writer = writer

    def scalars(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self.writer.add_image(name, image, step, dataformats="HWC")

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.writer.add_histogram(name, values, step)

    def close(self) -> None:
        self.writer.close()


class WandbSink:
    def __init__(self, wandb, run):
        self.wandb, self.run = wandb, run

    def scalars(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def picture(self, name: str, image: Tensor, step: int) -> None:
        self.run.log({name: self.wandb.Image(image.numpy())}, step=step)

    def histogram(self, name: str, values: Tensor, step: int) -> None:
        self.run.log({name: self.wandb.Histogram(values.numpy())}, step=step)

    def close(self) -> None:
        self.run.finish()


def log_histograms(log: Log, state: State) -> None:
    """Weights and their last gradients, to the sinks that take them."""
    for sink in log.sinks:
        for name, parameter in state.model.named_parameters():
            sink.histogram(f"weights/{name}", parameter.detach().float().cpu(), state.step)
            if parameter.grad is not None:
                sink.histogram(f"gradients/{name}", parameter.grad.float().cpu(), state.step)


def gpu_use(device: torch.device) -> dict[str, float]:
    """Memory that CUDA's allocator holds and, where NVIDIA's library is installed, the share of time in which the card was busy."""
    if device.type != "cuda":
        return {}
    use = {"gpu_reserved_gib": round(torch.cuda.memory_reserved(device) / 2 ** 30, 4)}
    with contextlib.suppress(ModuleNotFoundError):               # pip install nvidia-ml-py
        use["gpu_percent"] = torch.cuda.utilization(device)
    return use


def peak_gib(device: torch.device) -> float:
    """Peak of this process so far: CUDA's allocator, or the resident memory on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


# ------------------------------------------------------------------------------------------------------------------------- loop

@dataclass
class Run:
    """What the parts of the loop share."""
    cfg: TrainConfig
    state: State
    device: torch.device
    dataset: data.Data
    crops: data.Crops
    held_out: Sequence[data.Crop]
    out: Path
    log: Log
    total: int                                                   # optimizer steps
    per_epoch: int                                               # of them
    received: list[int] = field(default_factory=list)            # signals


def open_data(cfg: TrainConfig, say: Callable[[str], None]) -> data.Data:
    """The data of the run; the fields of cfg that follow from them are set. Raises DataError, or ValueError where weights do not fit."""
    cfg.data = dataclasses.replace(cfg.data, labels=cfg.task == "seg")
    dataset = data.open_data(cfg.data, cfg.train.seed, say, parallel.world())
    cfg.vae = dataclasses.replace(cfg.vae, in_channels=dataset.channels)
    if cfg.task == "seg":
        binary = cfg.unet.out_channels == 1 and dataset.classes == 2
        if cfg.unet.out_channels not in (UNetConfig.out_channels, dataset.classes) and not binary:
            raise ValueError(f"unet.out_channels={cfg.unet.out_channels}, but the data has {dataset.classes} classes; leave it out, or set "
                             f"data.classes")
        cfg.unet = dataclasses.replace(cfg.unet, in_channels=dataset.channels, out_channels=1 if binary else dataset.classes)
        if cfg.loss.class_weights is not None and len(cfg.loss.class_weights) != dataset.classes:
            raise ValueError(f"loss.class_weights has {len(cfg.loss.class_weights)} factors, the data has {dataset.classes} classes; "
                             f"give one for each")
    cfg.loss.background, cfg.data.patch = dataset.background, dataset.patch
    if cfg.loss.channel_weights is not None and len(cfg.loss.channel_weights) != dataset.channels:
        raise ValueError(f"loss.channel_weights has {len(cfg.loss.channel_weights)} factors, the data has {dataset.channels} channels; "
                         f"give one for each")
    return dataset


def predicted_peak(cfg: TrainConfig, device: torch.device) -> str:
    """What memtest.py predicts for a step of this config on `device`, as a line; needs no such device."""
    try:
        peak = memtest.predict(lambda d: make_step(cfg, d, rehearsal=True), device)
    except RuntimeError as error:
        return f"predicted peak: none, {line_of(error)}"
    return f"predicted peak of a step on {device.type}: {peak.bytes / memtest.GIB:.2f} GiB; {' '.join(memtest.LEFT_OUT.split())}"


def fit(cfg: TrainConfig, device: torch.device, budget: str, say: Callable[[str], None]) -> MemoryConfig:
    """The cheapest memory settings whose predicted peak leaves 10 % of `budget` (GiB, or `free`) unused. ValueError where none does."""
    if budget == "free":
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError("--fit needs a number of GiB where there is no GPU whose free memory it could take: --fit 16")
        limit = float(torch.cuda.mem_get_info(device)[0])
    else:
        limit = convert(budget, float, "--fit") * memtest.GIB
    dtype = torch.float16 if cfg.train.precision == "master16" else pick_precision(cfg.train.amp, device)[0] or torch.float32
    size = cfg.data.patch
    candidates = [{"mode": mode} for mode in memory_modes(cfg)]
    if cfg.task == "vae":
        with torch.device("meta"):
            candidates = memtest.memory_settings(VAE3D(cfg.vae), size, cfg.train.batch, dtype, limit)
    if cfg.memory.tile_parallel:
        candidates = [memory for memory in candidates if memory["mode"] == "tile"]

    def step_with(size: Sequence[int], memory: dict) -> Callable:
        changed = memtest.change(cfg, {"data": {"patch": size}, "memory": memory})
        return lambda d: make_step(changed, d, rehearsal=True)
    plan = memtest.plan(step_with, size, limit, candidates, device)
    text = f"{plan.bytes / memtest.GIB:.2f} GiB predicted at {','.join(map(str, size))}, {limit / memtest.GIB:.2f} given, 10 % kept free"
    if not plan.fits:
        raise ValueError(f"--fit: nothing fits: the least is {memtest.memory_text(plan.memory)}, {text}; use a smaller --patch or --batch, "
                         f"or --fit {plan.bytes / 0.9 / memtest.GIB:.2f}")
    say(f"--fit: memory mode {memtest.memory_text(plan.memory)}: {text}")
    return dataclasses.replace(cfg.memory, **plan.memory)


def memory_modes(cfg: TrainConfig) -> tuple[str, ...]:
    """Settings of the dial that the task's network has."""
    return {"vae": vae3d.MEMORY_MODES, "seg": unet.MEMORY_MODES, "features": ("none",)}[cfg.task]


def train(cfg: TrainConfig, dataset: data.Data, out: Path, resumed: checkpoints.Resumed | None = None) -> int:
    """Run from step 0 or from a checkpoint to the end, an early stop or a signal; returns the exit code.

    Raises DataError or ValueError when the run cannot start, RunStopped or OSError when it cannot go on.
    """
    checkpoint = resumed and resumed.content
    if cfg.train.stage and cfg.train.init is None and checkpoint is None:
        raise ValueError(f"train.stage {cfg.train.stage} goes on from a trained autoencoder; name its run folder or checkpoint with --init")
    device = pick_device(cfg.train.device)
    crops = data.Crops(dataset, cfg.train.seed)
    state = new_state(cfg, device, checkpoint and checkpoint.get("features"))
    if checkpoint is not None:
        restore(state, checkpoint, resumed.path)
    per_epoch = steps_per_epoch(len(crops), state.global_batch)
    total = total_steps(cfg, per_epoch)
    if checkpoint is not None:
        if state.finished and (state.step >= total or stopped_early(cfg, state)):
            print(f"{out}: finished at step {state.step}; nothing to do")
            return EXIT_DONE
        if checkpoint["data"]["training"] != facts_of(dataset)["training"]:
            print(f"{out}: the training volumes are not those that the run began with, so it goes on, but not bit for bit")
        state.finished = False
    started_from, has_codebook = [], checkpoint is not None
    if cfg.train.init is not None and checkpoint is None:
        started_from, has_codebook = parallel.from_rank(0, lambda: start_from(state, Path(cfg.train.init), cfg.train.init_hints))
        if cfg.train.stage == 2 and not has_codebook:
            raise ValueError(f"train.stage 2 goes on from stage 1, but {cfg.train.init} holds no codebook of vae.num_codes="
                             f"{cfg.vae.num_codes}; run --train.stage 1 first")
    shape = (cfg.train.batch, dataset.channels, *dataset.patch)
    turn_dial(cfg, state, parallel.chosen(0, lambda: settled(cfg.memory, state, shape)))
    with contextlib.ExitStack() as opened:                       # the lock of the run folder, the log: closed however the run ends
        parallel.together(lambda: open_folder(cfg, out, resumed, opened) if parallel.first() else None)
        log = opened.enter_context(contextlib.closing(Log(cfg, out, total, state.step, open_sinks(cfg, out), state.validated)))
        held_out = data.WholeVolumes(dataset) if cfg.train.val_whole else data.val_crops(dataset, cfg.train.seed, cfg.train.val_crops)
        run = Run(cfg, state, device, dataset, crops, held_out, out, log, total, per_epoch)
        save_config(run)
        names = {"vae": cfg.preset, "seg": cfg.preset, "features": "feature network"}
        log.say(f"{names[cfg.task]}: {sum(p.numel() for p in state.model.parameters()):,} parameters, "
                + (f"discriminator {sum(p.numel() for p in state.disc.parameters()):,}, " if state.disc is not None else "")
                + f"memory mode {dial_text(cfg.memory)}; {device}, "
                + ("16-bit weights, float32 masters" if state.masters is not None else pick_precision(cfg.train.amp, device)[1]))
        for text in started_from:
            log.say(text)
        for text in memtest.environment_warnings() if device.type == "cuda" else []:
            log.say(f"warning: {text}")
        ranks = f" on {parallel.world()} ranks" * (parallel.world() > 1)
        log.say(f"{total} steps of {state.global_batch} crops{ranks}, {per_epoch} an epoch; run folder {out}")
        stopped_by = 0
        with caught_signals() as run.received:
            if not has_codebook:
                start_codebook(run)
            parallel.take_from_first(tensors_of(state))
            try:
                replaced = checkpoint is not None and state.best is not None and check_best(run)
                if (settle(run) or replaced) and parallel.first():   # at step 0, and what a stopped run left undone
                    save_last(run)
                steps = range(state.step, state.step if state.finished else total)
                for step, micro_batches in step_batches(cfg, crops, steps, device, state.global_batch):
                    train_and_log(run, step, micro_batches)
                    if cfg.log.ddp_check and state.step % cfg.log.ddp_check == 0:
                        compare_ranks(state)
                    settle(run)
                    stopped_by = int(parallel.largest(run.received[0] if run.received else 0))  # one rank's ends all after the same step
                    if parallel.first() and (state.finished or stopped_by or state.step % cfg.train.save_every == 0):
                        save_last(run)
                    if state.finished or stopped_by:
                        break
            except Stopped as stop:
                stopped_by = stop.args[0]
                if parallel.first():
                    save_last(run, keep=False)
            opened.close()                                       # here: a signal to this rank must not stop it any more
            parallel.barrier()                                   # torchrun ends the others as soon as one has left: not before it is saved
    if state.finished:
        tell(f"done at step {state.step}: best {metric_of(cfg)} {shown(state.best)}; weights in {out / 'best.pt'}, "
             f"pictures in {out / 'samples'}")
        return EXIT_DONE
    tell(f"stopped by {signal.Signals(stopped_by).name} at step {state.step}, state saved; go on with: {resume_command(out)}")
    return SIGNALS[stopped_by]


def open_folder(cfg: TrainConfig, out: Path, resumed: checkpoints.Resumed | None, opened: contextlib.ExitStack) -> None:
    """Take the run folder until `opened` is closed, and clear it of what a killed run left. ValueError where another process has it."""
    out.mkdir(parents=True, exist_ok=True)
    opened.enter_context(checkpoints.lock_folder(out))
    checkpoints.remove_temporaries(out)
    if resumed is None:
        run_folder(cfg)                                          # the run of another process may have come and gone by now
        (out / "log.jsonl").unlink(missing_ok=True)              # of a run that was killed before it had a state
    elif checkpoints.stamp(resumed.path) != resumed.stamp:
        raise ValueError(f"{resumed.path}: was replaced by another process while this one began; give the same command again")
    elif resumed.path.name != "last.pt":                         # what comes after it is taken back, so that a kill goes on from here too;
        checkpoints.copy(resumed.path, out / "last.pt")          # no link: damage to one leaves the other


def compare_ranks(state: State) -> None:
    """Raises RunStopped where weights, averages or codebooks have drifted apart: from there on each rank would train another network."""
    found = parallel.difference(tensors_of(state))
    if found is not None:
        raise RunStopped(f"step {state.step}: {found} (log.ddp_check); go on from last.pt, on machines with the same GPUs and the "
                         f"same torch")


def settle(run: Run) -> bool:
    """What is due at this step and not done yet: validation, the end's measurements, pictures. Returns whether anything was.

    Stopped leaves it between two crops; the state then says what is undone, and a run that is resumed from it does that first.
    """
    cfg, state = run.cfg, run.state
    before = state.validated, state.sampled, state.finished
    if (state.step % cfg.train.val_every == 0 or state.step >= run.total) and state.validated < state.step:
        validation(run, max(0, state.step - 1) // run.per_epoch)
        state.validated = state.step
    at_end = state.step >= run.total or stopped_early(cfg, state)
    if at_end and parallel.first():
        finish(run)
    if (at_end or cfg.log.sample_every and state.step % cfg.log.sample_every == 0) and state.sampled < state.step:
        save_samples(run)
        state.sampled = state.step
    state.finished = at_end
    return before != (state.validated, state.sampled, state.finished)


def stop_if_signalled(run: Run) -> None:
    """Between two crops of what can be begun again. Raises Stopped, on all ranks alike, so each must call it equally often."""
    number = int(parallel.largest(run.received[0] if run.received else 0))
    if number:
        raise Stopped(number)


def total_steps(cfg: TrainConfig, per_epoch: int) -> int:
    """train.steps or train.epochs, whichever ends first; none given: 50 on synthetic volumes, else 2000."""
    limits = [cfg.train.steps, cfg.train.epochs and cfg.train.epochs * per_epoch]
    return min((n for n in limits if n), default=50 if cfg.data.path is None else 2000)


def stopped_early(cfg: TrainConfig, state: State) -> bool:
    return 0 < cfg.train.patience <= state.bad_validations


def save_config(run: Run) -> None:
    if parallel.first():
        checkpoints.write_atomic(run.out / "config.yaml", lambda file: file.write(to_yaml(run.cfg).encode()))


def recovered(run: Run, shape: Sequence[int], work: Callable[[], Any]) -> Any:
    """work(), with recovery from out-of-memory; each change of the dial goes to the console, log.jsonl and config.yaml."""
    def note(text: str) -> None:
        run.log.say(text)
        run.log.write({"step": run.state.step, "split": "memory", "change": text})
        save_config(run)
    return with_recovery(run.cfg, run.state, shape, note, work)


def train_and_log(run: Run, step: int, micro_batches: list[MicroBatch]) -> None:
    """One optimizer step and its row; stops the run after train.nan_limit non-finite ones in a row."""
    cfg, state, log = run.cfg, run.state, run.log
    started, rate = time.monotonic(), learning_rate(cfg.optim, step, run.total, state.plateau[1])
    for group in state.optimizer.param_groups:
        group["lr"] = rate
    for group in state.disc_optimizer.param_groups if state.disc_optimizer is not None else ():
        group["lr"] = rate * disc_rate(cfg) / cfg.optim.lr if cfg.optim.lr else 0.0
    crops = len(window_of(step, len(run.crops), state.global_batch))
    shape = (min(crops, cfg.train.batch), run.dataset.channels, *run.dataset.patch)
    result = recovered(run, shape, lambda: train_step(cfg, state, micro_batches))
    terms = {name: float(term) for name, term in result.terms.items()}
    seconds = time.monotonic() - started
    state.step = step + 1
    voxels = crops * math.prod(run.dataset.patch)
    row = {"step": state.step, "epoch": step // run.per_epoch, "split": "train", **terms, "lr": rate, "grad_norm": float(result.norm),
           "seconds": round(seconds, 4), "voxels_per_second": round(voxels / seconds),
           "peak_gib": round(parallel.largest(peak_gib(run.device)), 4), **gpu_use(run.device)}
    if result.updated:
        state.bad_steps = 0
    else:
        files = sorted({str(run.dataset.train[v].path) for v in parallel.gathered([v for m in micro_batches for v in m.volumes])})
        row |= {"skipped": True, "files": files}
        scale = 2.0 ** state.log_scale if state.masters is not None else state.scaler.get_scale() if state.scaler.is_enabled() else 0.0
        overflow = scale > 1 and math.isfinite(terms["loss"])    # the scale falls, the run goes on; below 1 it is no overflow
        state.bad_steps += not overflow
        what = "fp16 overflow" if overflow else "loss or gradient is not finite"
        log.say(f"step {state.step}: {what}, no update; crops of {', '.join(files)}")
    if state.usage is not None and (state.step % run.per_epoch == 0 or state.step == run.total):
        row |= codebook_use(state.usage)
        state.usage.zero_()
    log.row(row)
    if log.sinks and cfg.log.histogram_every and state.step % cfg.log.histogram_every == 0:
        log_histograms(log, state)
    if state.bad_steps >= cfg.train.nan_limit:
        path, images = run.out / f"nan_step_{state.step:06d}.pt", parallel.gathered([m.image.cpu() for m in micro_batches])
        if parallel.first():
            checkpoints.save(path, {"kind": "vae3d.nan", "version": 1, "config": config_dict(cfg), "step": step, "files": files,
                                    "model": full_weights(state), "images": images})
        raise RunStopped(f"{state.bad_steps} non-finite steps in a row (train.nan_limit); weights and crops of the last one are in {path}; "
                         f"try a lower --optim.lr, or look at the files that log.jsonl names")


def codebook_use(usage: Tensor) -> dict[str, float]:
    """Share of the codes chosen at least once, and perplexity exp(entropy) of the choices: 1 to K."""
    share = usage.double() / usage.sum().clamp_min(1)
    entropy = -(share * share.clamp_min(1e-300).log()).sum()
    return {"codebook_usage": float((usage > 0).double().mean()), "perplexity": float(entropy.exp())}


@torch.no_grad()
def start_codebook(run: Run) -> None:
    """The codebook's first codes, from the latents of training crops, as vae.codebook_init says."""
    vae, cfg = run.state.model, run.cfg
    if cfg.task != "vae" or cfg.vae.bottleneck != "vq" or cfg.vae.codebook_init == "uniform":
        return
    rows = []
    for index in range(min(len(run.crops), cfg.train.latent_crops)):
        stop_if_signalled(run)
        x = to_device(run.crops[index][0][None], run.device)
        z = recovered(run, x.shape, lambda x=x: parallel.agreed(forward(run.state, vae.latent, x)))
        rows.append(z.movedim(1, -1).flatten(0, 3))
    per_step = len(rows[0]) * run.state.global_batch
    vae.quantizer.fit(torch.cat(rows), cfg.vae.codebook_init, torch.Generator().manual_seed(seed_of(cfg.train.seed, "codebook")),
                      per_step=per_step)
    for ema in run.state.emas:
        ema.quantizer.load_state_dict(vae.quantizer.state_dict())


@torch.no_grad()
def validate(run: Run) -> tuple[dict[str, float], int]:
    """Means over held-out crops or volumes of the criterion's terms and of the task's metrics, without noise; and the voxels seen.

    vae: psnr, ssim, (unweighted) l1, sharpness (gradient energy, reconstruction over input), and iou of occupied voxels for voxel grids.
    seg: dice, the mean over the classes but 0 of the held-out labels, from all their voxels together, and dice_1, dice_2 ...
    """
    cfg, model, rows, voxels = run.cfg, run.state.shipped.eval(), [], 0
    counts, labelled = 0, torch.zeros(run.dataset.classes, dtype=torch.bool)
    mine = parallel.shared(len(run.held_out))
    for turn in range(-(-len(run.held_out) // parallel.workers())):
        stop_if_signalled(run)
        if turn >= len(mine):                                    # the others are at their last one
            recovered(run, (1, run.dataset.channels, *run.dataset.patch), parallel.agreed)
            continue
        number = mine[turn]
        crop = run.held_out[number]
        x = to_device(crop.image[None], run.device)
        micro = MicroBatch(x, [], [], None if crop.label is None else crop.label[None].to(run.device))
        def work(micro=micro, number=number):
            generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "validation", number))
            return parallel.agreed(objective(cfg, run.state, model, micro, [generator], None)[:2])
        out, terms = recovered(run, x.shape, work)
        if cfg.task == "vae":
            terms |= {"psnr": losses.psnr(out.recon, x), "ssim": losses.ssim(out.recon, x),
                      "l1": losses.reconstruction_loss(out.recon, x, "l1"), "sharpness": losses.sharpness(out.recon, x)}
            if crop.entry.intensity.modality == "voxel":
                terms["iou"] = losses.occupancy_iou(out.recon, x, cfg.loss.background)
        if cfg.task == "seg":
            found = predicted_classes(out.logits).cpu()
            counts = counts + torch.stack(losses.dice_scores(found, micro.label.cpu(), run.dataset.classes, cfg.data.ignore_label))
            present = micro.label.unique().cpu()
            labelled[present[(present >= 0) & (present < len(labelled)) & (present != cfg.data.ignore_label)]] = True
        rows.append({name: float(term) for name, term in terms.items()})
        voxels += x[0, 0].numel()
    run.state.shipped.train()
    rows, voxels = parallel.gathered(rows), sum(parallel.gathered([voxels]))
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    if cfg.task == "seg":
        labelled = torch.stack(parallel.gathered([labelled])).any(0)
        scores, labelled[0] = losses.dice(*sum(parallel.gathered([counts]))), False
        metrics["dice"] = float(scores[labelled].mean())         # nan where the held-out labels hold no class
        metrics |= {f"dice_{k}": float(scores[k]) for k in labelled.nonzero()[:, 0].tolist()}
    return metrics, voxels


def predicted_classes(logits: Tensor) -> Tensor:
    """(B, K, D, H, W) -> (B, D, H, W) int64; one logit: foreground where its sigmoid is above 1/2."""
    return (logits[:, 0] > 0).long() if logits.shape[1] == 1 else logits.argmax(1)


def validation(run: Run, epoch: int) -> None:
    """A `val` row; best.pt when it is the best so far."""
    started, state = time.monotonic(), run.state
    metrics, voxels = validate(run)
    seconds = time.monotonic() - started
    run.log.row({"step": state.step, "epoch": epoch, "split": "val", **metrics, "lr": state.optimizer.param_groups[0]["lr"],
                 "seconds": round(seconds, 4), "voxels_per_second": round(voxels / seconds),
                 "peak_gib": round(parallel.largest(peak_gib(run.device)), 4)})
    if update_best(run.cfg, state, metrics):
        save_best(run, metrics)


def save_best(run: Run, metrics: dict[str, float]) -> None:
    if parallel.first():
        checkpoints.save(run.out / "best.pt", weights_to_ship(run, run.state.shipped) | {"metrics": metrics})


def load_best(run: Run) -> dict:
    return checkpoints.load(run.out / "best.pt", "vae3d.weights", "vae3d.features")


def check_best(run: Run) -> bool:
    """For a resumed run: where best.pt cannot be read, or is of a step that the run no longer reaches, the weights at hand replace it.

    Returns whether they did.
    """
    def look() -> str | None:
        try:
            return None if load_best(run)["step"] <= run.total else f"{run.out / 'best.pt'}: is of a later step than {run.total}"
        except ValueError as error:
            return str(error)
    wrong = parallel.from_rank(0, look)
    if wrong is not None:
        metrics, _ = validate(run)
        value = metrics[metric_of(run.cfg)]
        run.state.best, run.state.best_loss = value if math.isfinite(value) else None, metrics["loss"]
        save_best(run, metrics)
        run.log.say(f"{wrong}; the weights of step {run.state.step} take its place, {metric_of(run.cfg)} {shown(run.state.best)}")
    return wrong is not None


def weights_to_ship(run: Run, model: torch.nn.Module) -> dict:
    """The content of best.pt: what predict.py and --init need, and nothing else."""
    if run.cfg.task == "features":
        return model.features.to_checkpoint() | {"step": run.state.step}
    return {"kind": "vae3d.weights", "version": 1, "config": shared_config(run.cfg), "step": run.state.step, "latent": run.state.latent,
            "data": facts_of(run.dataset), "model": full_weights(run.state) if model is run.state.model else model.state_dict()}


def facts_of(dataset: data.Data) -> dict:
    """What predict.py must know about the data to prepare others alike, and the names of the training volumes."""
    entry, modalities = dataset.train[0], {entry.intensity.modality for entry in dataset.train}
    return {"modality": modalities.pop() if len(modalities) == 1 else "auto", "channels": dataset.channels, "classes": dataset.classes,
            "label_values": dataset.label_values and list(dataset.label_values), "background": dataset.background,
            "spacing": list(entry.spacing), "training": [entry.name for entry in dataset.train]}


def finish(run: Run) -> None:
    """Measure the latent of the weights that ship and store it in both checkpoints; write the other averages beside best.pt."""
    cfg, state = run.cfg, run.state
    if cfg.task == "vae":
        try:
            best = load_best(run)
        except ValueError as error:
            raise RunStopped(f"{error}; --resume {run.out} makes it anew") from None
        vae = set_dial(on_device(VAE3D(cfg.vae), run.device), dataclasses.replace(cfg.memory, tile_parallel=False))  # one rank alone
        vae.load_state_dict(best["model"])
        state.latent = best["latent"] = latent_statistics(run, vae.eval())
        checkpoints.save(run.out / "best.pt", best)
    for ema, rate in list(zip(state.emas, cfg.train.ema))[1:]:
        checkpoints.save(run.out / f"ema_{rate}.pt", weights_to_ship(run, ema) | {"latent": None})  # measured for best.pt alone


@torch.no_grad()
def latent_statistics(run: Run, vae: VAE3D) -> dict:
    """Mean and std (Z,) of the latent mean, or of the codes, over training crops; scale factor 1 / std (arXiv:2112.10752, App. G)."""
    count, total, squares = 0, 0, 0
    for index in range(min(len(run.crops), run.cfg.train.latent_crops)):
        if parallel.world() == 1:                                # of several ranks the first is here alone
            stop_if_signalled(run)
        x = to_device(run.crops[index][0][None], run.device)
        mu = forward(run.state, vae.encode, x)[0].double()
        count, total, squares = count + mu[0, 0].numel(), total + mu.sum((0, 2, 3, 4)), squares + mu.square().sum((0, 2, 3, 4))
    mean = total / count
    whole = (squares.sum() / count / len(mean) - mean.mean().square()).clamp_min(1e-12).sqrt()
    return {"mean": mean.float().cpu(), "std": (squares / count - mean.square()).clamp_min(0).sqrt().float().cpu(),
            "scale_factor": float(1 / whole)}


def save_last(run: Run, keep: bool = True) -> None:
    """last.pt; the one before it becomes last.prev.pt, and train.keep of those that were due stay as step_XXXXXX.pt.

    Each file is whole before another goes, so that a kill or a full disk at any moment leaves a good one and its name.
    """
    cfg, step, last = run.cfg.train, run.state.step, run.out / "last.pt"
    keep = keep and cfg.keep > 0 and (step % cfg.save_every == 0 or run.state.finished)
    new = run.out / (f"step_{step:06d}.pt" if keep else "last.next.pt")
    checkpoints.save(new, checkpoint_of(run.cfg, run.state, run.dataset))
    if keep:                                                     # files of later steps are of a run that was taken back; they stay
        kept = sorted((int(path.stem[5:]), path) for path in run.out.glob("step_*.pt") if re.fullmatch(r"step_\d{6,}", path.stem))
        for _, old in [row for row in kept if row[0] <= step][:-cfg.keep]:
            old.unlink(missing_ok=True)
    if last.exists():
        checkpoints.place(last, run.out / "last.prev.pt")
    (checkpoints.place if keep else os.replace)(new, last)


@torch.no_grad()
def save_samples(run: Run) -> None:
    """OUT/samples/step_XXXXXX_NAME.png and _recon.nii.gz (seg: _pred.nii.gz) of the first crop of up to log.samples held-out volumes."""
    cfg, done = run.cfg, set()
    if cfg.task == "features":                                   # nothing to look at
        return
    model, folder = run.state.shipped.eval(), run.out / "samples"
    if parallel.first():
        folder.mkdir(exist_ok=True)
    for crop in run.held_out:
        name = crop.entry.name
        if name in done or len(done) == cfg.log.samples:
            continue
        done.add(name)
        stop_if_signalled(run)
        x = to_device(crop.image[None], run.device)
        is_picture = crop.entry.intensity.modality == "picture" and crop.image.shape[1] == 1
        network = segmented if cfg.task == "seg" else lambda cfg, *inputs: forward(*inputs)
        out = recovered(run, x.shape, lambda x=x, network=network: parallel.agreed(network(cfg, run.state, model, x)))
        if not parallel.first():
            continue
        if cfg.task == "seg":
            found, kind = predicted_classes(out.logits).cpu().to(torch.int16), "pred"
            label = torch.where(crop.label == cfg.data.ignore_label, 0, crop.label) if cfg.data.ignore_label is not None else crop.label
            picture = pictures.label_comparison(crop.image, [label, found[0]], crop.entry.spacing, is_picture)
        else:
            found, kind = out.recon[0].float().cpu(), "recon"
            picture = pictures.comparison(crop.image, found, crop.entry.spacing, cfg.loss.background, is_picture)
        stem = f"step_{run.state.step:06d}_{name}"
        checkpoints.write_atomic(folder / f"{stem}.png", lambda file, picture=picture: file.write(pictures.png(picture)))
        with checkpoints.naming(folder / f"{stem}_{kind}.nii.gz"):
            data.write_nifti(folder / f"{stem}_{kind}.nii.gz", found.numpy(), crop.affine)
        for sink in run.log.sinks:
            sink.picture(f"samples/{name}", picture, run.state.step)
    model.train()


class Stopped(BaseException):
    """By a signal, whose number it holds."""


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGUSR1 raise Stopped, at once: for what writes files whole or not at all. A second one, after SECOND_SIGNAL
    seconds, ends the process without a word.
    """
    first: list[float] = []

    def stop(number, _):
        if not first:
            first.append(time.monotonic())
            raise Stopped(number)
        if time.monotonic() - first[0] >= SECOND_SIGNAL:
            os._exit(SIGNALS[number])
    try:
        before = {number: signal.signal(number, stop) for number in SIGNALS}
    except ValueError:                                           # not the main thread: nobody signals it
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """A list that receives SIGINT, SIGTERM and SIGUSR1, so that the loop ends after the step at hand. A second one, after SECOND_SIGNAL
    seconds, ends the process at once.

    A thread waits for that one: handlers run in the main thread, between Python's instructions, so not in the middle of a backward().
    """
    received: list[int] = []
    read, write = os.pipe()
    os.set_blocking(write, False)

    def watch() -> None:
        first = None
        while number := os.read(read, 1)[0]:
            if number not in SIGNALS:                            # SIGCHLD of a DataLoader worker
                continue
            name = signal.Signals(number).name
            if first is None:
                first = time.monotonic()
                tell(f"{name}: ending after the step at hand{', with the state saved' * (parallel.world() == 1)}; another one ends at once")
            elif time.monotonic() - first >= SECOND_SIGNAL:
                for worker in multiprocessing.active_children():  # they would tell how they lost this process
                    worker.kill()
                with contextlib.suppress(OSError):
                    os.write(2, f"train.py: {name} again: ended at once, the last checkpoint stays as it is\n".encode())
                os._exit(SIGNALS[number])
    try:
        before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in SIGNALS}
    except ValueError:                                           # not the main thread: nobody signals it
        before = {}
    watcher = threading.Thread(target=watch, daemon=True)
    if before:
        woken = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        watcher.start()
    try:
        yield received
    finally:
        if before:
            signal.set_wakeup_fd(woken)
            os.write(write, b"\0")                               # the end: workers may hold this pipe too, so closing it is none
            watcher.join()
        os.close(read)
        os.close(write)
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------------------------------------------- command line

def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 2 cannot start, 1 stopped by an error with the state kept, 130 / 143 / 138 after a signal."""
    argv = list(sys.argv[1:] if argv is None else argv)
    given = [os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))]
    try:
        if not all(value.isdecimal() for value in given):
            raise parallel.CannotStart(f"RANK, WORLD_SIZE, LOCAL_RANK are {', '.join(given)}: numbers that torchrun sets; unset them")
        with parallel.started(*map(int, given)):
            return command(argv)
    except parallel.CannotStart as error:
        print(f"train.py: {line_of(error)}", file=sys.stderr)
        return EXIT_USAGE


def command(argv: Sequence[str]) -> int:
    """main() on one rank. The first one reads and chooses; what it found goes to the others, which need the data and no more."""
    out = None
    try:
        with stopped_by_signals():
            options = parallel.together(lambda: vars(build_parser().parse_args(argv)))
            dry = options.get("dry_run", False)
            say = (lambda text: tell(f"# {text}")) if dry else tell  # a dry run's output is a config file
            resumed, base = None, None
            if "resume" in options:
                resumed = parallel.from_rank(0, lambda: checkpoints.load_resumed(Path(options["resume"]), say))
                out, base = resumed.path.parent, config_from(resumed.content["config"], TrainConfig(), str(resumed.path))
            cfg = parallel.from_rank(0, lambda: load_config(argv, base))
            out = out or parallel.from_rank(0, lambda: run_folder(cfg))
            cfg.train.out = str(out)
            parallel.alike(cfg.memory.tile_parallel)
            for text in set_backend(cfg):
                say(text)
            simulated = dry and cfg.train.device.startswith("cuda")  # a card that is not here can be predicted for
            device = torch.device(cfg.train.device) if simulated else parallel.together(lambda: pick_device(cfg.train.device))
            if device.type == "cuda" and parallel.world() > 1:
                torch.cuda.set_device(device)
            channels = cfg.vae.in_channels
            dataset = parallel.together(lambda: open_data(cfg, say))
            if resumed is None and cfg.preset in LAYOUTS and channels != dataset.channels:
                raise ValueError(f"--init: channels of the {cfg.preset} network: {channels}, of the data: {dataset.channels}; use "
                                 f"--data.select_channel N, or --vae.in_channels {dataset.channels} for new first and last layers")
            seen = [len(names) for names in dict.fromkeys(map(tuple, parallel.of_every_rank([facts_of(dataset)["training"]])))]
            if len(seen) > 1:
                raise DataError(f"{cfg.data.path}: the ranks see different training volumes ({', '.join(map(str, seen))} of them); give "
                                f"every machine the same data")
            if resumed is not None:
                keep_global_batch(cfg, base, resumed.content, say)
            if "fit" in options:
                cfg.memory = parallel.from_rank(0, lambda: fit(cfg, device, options["fit"], say))
            if dry:
                print(to_yaml(cfg), end="")
                if parallel.first():
                    say(predicted_peak(cfg, device))
                return EXIT_DONE
            return train(cfg, dataset, out, resumed)
    except Stopped as stop:
        number = stop.args[0]
        tell(f"stopped by {signal.Signals(number).name} before there was anything new to save; the same command begins again")
        return SIGNALS[number]
    except parallel.Elsewhere:
        return parallel.exit_code(EXIT_ERROR)
    except (RunStopped, data.StoreError) as error:
        return told(line_of(error), EXIT_ERROR)
    except OSError as error:
        return told(disk_text(error, out), EXIT_ERROR)
    except (ValueError, DataError) as error:
        return told(line_of(error), EXIT_USAGE)
    except RuntimeError as error:
        if "DataLoader worker (pid" in str(error):
            return told(f"{line_of(error)}; out of memory? go on with --resume and fewer --workers, 0 for none", EXIT_ERROR)
        if not parallel.is_lost(error):
            raise
        saved = out is not None and (out / "last.pt").exists()
        why = "" if "gloo" in str(error) else f" ({line_of(error)[:160]})"  # gloo knows no more; NCCL's may be about the card
        return told(f"another rank is gone or does not answer{why}" + f"; go on with: {resume_command(out)}" * saved, EXIT_ERROR)


def told(text: str, code: int) -> int:
    """The exit code of all ranks; the first of those that have something to tell tells it, in one line."""
    if not parallel.speaks(code):
        return parallel.exit_code(code)
    print(f"train.py: {parallel.place()}{text}", file=sys.stderr)
    return code


def resume_command(out: Path) -> str:
    """For as many processes again."""
    each = int(os.environ.get("LOCAL_WORLD_SIZE", parallel.world()))
    nodes = f"--nnodes {parallel.world() // each} " if parallel.world() > each else ""
    launcher = "python" if parallel.world() == 1 else f"torchrun {nodes}--nproc_per_node {each}"
    return f"{launcher} train.py --resume {shlex.quote(str(out))}"


def keep_global_batch(cfg: TrainConfig, base: TrainConfig, checkpoint: dict, say: Callable[[str], None]) -> None:
    """A run goes on with the crops an optimizer step that it began with, and so their order, on any number of ranks, unless it is told
    another batch or accum: then with batch x accum x ranks."""
    before = checkpoint.setdefault("global_batch", base.train.batch * base.train.accum)  # absent: of one process, by an older version
    if (cfg.train.batch, cfg.train.accum) != (base.train.batch, base.train.accum):
        checkpoint["global_batch"] = now = cfg.train.batch * cfg.train.accum * parallel.workers()
        if now != before:
            say(f"{before} crops a step -> {now} (batch {cfg.train.batch} x accum {cfg.train.accum} x ranks {parallel.workers()}): from "
                f"here on the order of the data is another")


def disk_text(error: OSError, out: Path | None) -> str:
    """An OSError as a line: the file, what is wrong, what to do."""
    state = any((out / name).is_file() for name in ("last.pt", "last.prev.pt")) if out else False
    if error.errno == errno.ENOENT and out is not None and not out.is_dir():
        return f"{out}: the run folder is gone, and the state with it; start the run again"
    remedy = {errno.ENOSPC: "free some space", errno.EDQUOT: "free some space or have the quota raised",
              errno.EFBIG: "raise the limit on a file's size", errno.EROFS: "make it writable", errno.EACCES: "make it writable",
              errno.EPERM: "make it writable"}.get(error.errno, "see to it")
    after = f"go on with: {resume_command(out)}" if state else "start the run again"
    return f"{error.filename or 'disk or network'}: {error.strerror or line_of(error)}; {remedy}, then {after}"


def set_backend(cfg: TrainConfig) -> list[str]:
    """Process-wide settings, before CUDA starts; returns what to say about them."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cfg.train.deterministic, not cfg.train.deterministic
    if not torch.cuda.is_available() or cfg.train.device == "cpu":
        return []
    wanted = [f"expandable_segments:{cfg.memory.expandable_segments}"]
    wanted += [f"max_split_size_mb:{cfg.memory.max_split_size_mb}"] if cfg.memory.max_split_size_mb else []
    if torch.cuda.is_initialized():
        return [f"CUDA allocator: already started, {','.join(wanted)} not applied"]
    name = "PYTORCH_CUDA_ALLOC_CONF"
    if name in os.environ:
        return [f"CUDA allocator: {name}={os.environ[name]} from the environment is kept"]
    os.environ[name] = ",".join(wanted)
    return [f"CUDA allocator: {os.environ[name]}"]


if __name__ == "__main__":
    sys.exit(main())
