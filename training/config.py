"""The configuration of a run: one dataclass per section, from defaults, YAML and text to values and back.

A field is a key of the YAML and a flag of the command line: `kl_weight` of section `loss` is
`loss: {kl_weight: ...}` and `--loss.kl_weight`. The comment beside a field is the help of its flag.
Sections `vae`, `unet`, `diffusion`, `loss` and `data` are declared by the rooms that read them.

A config is what the user asked for, and is never changed: what the data says is put into a new one
(a task's `resolve`), and the memory dial of the moment belongs to the state. Version 0.3 (2026-11).
"""
from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

import vae3d
from diffusion import DiffusionConfig
from losses import LossConfig
from sparse import SparseConfig
from training.console import line_of
from training.spellings import key_advice
from unet import UNetConfig
from vae3d import VAEConfig
from volumes.config import WINDOWS, DataConfig
from volumes.files import brief, one_line

MAX_CONFIG = 2**17                            # bytes; PyYAML reads some 10^5 a second
HIGHEST_RATE = {"muon": 1e-3, "adamw": 5e-4, "adam": 5e-4, "sgd": 5e-4}
SCHEDULES = ("cosine", "cosine_restarts", "constant", "exponential", "step", "plateau")


# -------------------------------------------------------------------------------- sections

@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule. Defaults: what learned fastest on CT crops (docs/LOG.md)."""
    optimizer: str | None = None              # muon (muon.py) | adamw | adam | sgd (momentum 0.9); auto: muon
                                              # for new networks of --task vae, else adamw (docs/LOG.md)
    lr: float | None = None                   # the highest rate, after warm-up; auto: 1e-3 of muon, 5e-4 of
                                              # all others (docs/LOG.md)
    weight_decay: float = 0.01                # decoupled for adamw, L2 for the others
    schedule: str = "cosine"                  # cosine | cosine_restarts | constant |
                                              # exponential | step | plateau
    warmup: float = 0.05                      # share of the run in which the rate rises linearly from 0;
                                              # 0: none
    warmup_least: int = 10                    # it rises over at least so many steps, also where the run is
                                              # shorter
    lr_min: float = 0.0                       # the cosine schedules end here
    restarts: int = 4                         # cosine_restarts: number of equal periods
    gamma: float = 0.1                        # exponential: factor over the whole run;
                                              # step, plateau: factor of one drop
    drops: int = 3                            # step: number of equal parts of the run, a drop between them
    plateau_patience: int = 5                 # plateau: validations without improvement before a drop
    grad_clip: float = 1.0                    # largest norm of the network's whole gradient; 0: no clipping
    clip_percentile: float = 0.0              # adaptive clipping: at this percentile of the last norms,
                                              # but never above grad_clip; 0: off
    clip_window: int = 1000                   # finite norms that it is taken of; with fewer, grad_clip holds

    def __post_init__(self):
        one_of("optim.optimizer", self.optimizer, (None, "muon", "adamw", "adam", "sgd"))
        if self.lr is not None:
            at_least("optim", self, lr=0)
        one_of("optim.schedule", self.schedule, SCHEDULES)
        at_least("optim", self, weight_decay=0, warmup=0, warmup_least=0, lr_min=0)
        at_least("optim", self, restarts=1, drops=1)
        at_least("optim", self, plateau_patience=1, grad_clip=0, clip_percentile=0, clip_window=1)
        if self.clip_percentile > 100:
            raise ValueError(f"optim.clip_percentile is a percentile up to 100, got {self.clip_percentile}")
        if not 0 < self.gamma <= 1:
            raise ValueError(f"optim.gamma is a factor in (0, 1], got {self.gamma}")
        if self.warmup >= 1:
            raise ValueError(f"optim.warmup is a share of the run below 1, got {self.warmup}")


@dataclass(frozen=True)
class RunConfig:
    """Section `train`: length, precision, validation, checkpoints."""
    out: str | None = None                    # run folder; none: runs/NAME_DATE, the data's name and
                                              # today, or the next free runs/NAME_DATE-N
    init: str | None = None                   # what to start from: a run folder, a checkpoint, or an
                                              # autoencoder made elsewhere (weights.py)
    init_hints: str | None = None             # what a file made elsewhere cannot say (weights.py's hints):
                                              # norm_num_groups=8,... and / or the JSON or YAML file of
                                              # its constructor's arguments
    stage: int = 0                            # 1: train the codebook alone (needs init); 2: train all,
                                              # going on from stage 1; 0: train all
    seed: int = 0                             # of weights, split, crops and noise
    device: str = "auto"                      # auto (first of cuda, mps, cpu) | cuda | cuda:1 | mps | cpu
    amp: bool = False                         # bf16 where the device has it, else fp16 with a GradScaler
    precision: str = "float32"                # of the weights: float32 | master16 (fp16 weights with
                                              # float32 masters and a loss scale)
    batch: int = 2                            # crops a micro-batch; of small crops on a CPU, a batch of 1
                                              # takes 7 times longer a voxel
    accum: int = 1                            # micro-batches an optimizer step of a rank
    steps: int | None = None                  # optimizer steps; with epochs too, whichever ends first
    epochs: int | None = None                 # passes of data.crops_per_volume crops of every volume
    stages: tuple[dict, ...] = ()             # parts of the run with fields of their own, in a YAML file
                                              # (docs/STAGES.md); train.steps is then the most of them all
    val_every: int = 50                       # steps between validations; others at step 0 and at the end
    val_crops: int = 8                        # fixed seeded crops over all held-out volumes
    val_whole: bool = False                   # validate on whole held-out volumes instead
    save_every: int = 50                      # steps between writes of last.pt; there is one at the end too
    keep: int = 0                             # how many older last.pt are kept, as step_XXXXXX.pt
    ema: tuple[float, ...] = ()               # decays of averaged weights; the first is validated and shipped
    patience: int = 0                         # early stopping: validations without improvement; 0: off
    min_delta: float = 0.0                    # early stopping: only a larger improvement counts
    metric: str = "auto"                      # what best.pt and early stopping look at: psnr | ssim | l1 |
                                              # loss | dice | explained ...; auto: the task's first
                                              # (psnr, dice, explained)
    nan_limit: int = 5                        # non-finite steps in a row that stop the run
    latent_crops: int = 32                    # training crops by which the latent's mean and std are measured
    compile: bool = False                     # torch.compile the network
    cuda_graph: bool | None = None            # replay a step as CUDA graphs, for small crops on a GPU
                                              # (training/graphs.py); auto: off
    deterministic: bool = True                # cuDNN's deterministic kernels, so that a resumed run on
                                              # CUDA is exact too

    def __post_init__(self):
        one_of("train.precision", self.precision, ("float32", "master16"))
        one_of("train.stage", self.stage, (0, 1, 2))
        at_least("train", self, batch=1, accum=1, val_every=1, val_crops=1, save_every=1, keep=0)
        at_least("train", self, patience=0, min_delta=0, nan_limit=1, latent_crops=1)
        for name in ("steps", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"train.{name} must be at least 1, got {value}")

        # A decay of 0 says "no average", as in `--train.ema 0`.
        object.__setattr__(self, "ema", tuple(rate for rate in self.ema if rate != 0))
        if not all(0 < rate < 1 for rate in self.ema):
            raise ValueError(f"train.ema holds decays below 1, 0 for none, got {self.ema}")


@dataclass(frozen=True)
class CondConfig:
    """Section `cond`: what a denoiser is told of a latent, and what is known of the latents.

    The fields from `autoencoder` on are what the data say; they are filled in and kept with the run.
    """
    spacing: bool = True                      # the voxels' mm
    size: bool = True                         # the volume's voxels, of which a latent may be a crop
    region: bool = False                      # the part of the body (a datalist's `region`, by encode)
    by_class: bool = True                     # a datalist's `class`, by encode
    classes: tuple[str, ...] = ()             # their names; none given: those of the data
    concat: str | None = None                 # folder of latents that stand beside the noised ones, such as
                                              # sparse radar for dense; pairs have one name
    control: str | None = None                # folder of label maps on the volumes' grids, for a ControlNet
                                              # beside the frozen denoiser of train.init
    control_width: int = 32                   # channels that take label maps to the latents' grid, the first
                                              # at full size: 8 for label maps of 512^3
    vae: str | None = None                    # autoencoder (run or checkpoint) that decodes pictures of
                                              # samples; none: the latent's first channel is shown
    autoencoder: str | None = None            # digest of the weights that encoded the latents
    concat_channels: int = 0                  # of `concat`
    concat_autoencoder: str | None = None     # digest of the weights that encoded `concat`
    stride: tuple[int, int, int] = (4, 4, 4)  # voxels D,H,W of a latent's element
    mm: tuple[float, float, float] = (1.0, 1.0, 1.0)  # spacing of the first training volume
    modality: str = "ct"                      # of the volumes
    low: tuple[float, ...] = ()               # intensity that is -1, a channel: the median of the volumes'
    high: tuple[float, ...] = ()              # intensity that is 1

    def __post_init__(self):
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"cond.classes names one twice: {', '.join(self.classes)}")
        if self.control_width < 1:
            raise ValueError(f"cond.control_width must be at least 1, got {self.control_width}")


@dataclass(frozen=True)
class MemoryConfig:
    """The memory dial (vae3d.VAE3D.memory) and the CUDA allocator."""
    mode: str = "none"                        # none | checkpoint | tile
    tile: tuple[int, int, int] | None = None  # tile: D,H,W, voxels of the input; auto: by a cost model
    tile_parallel: bool = False               # tile: the ranks share the tiles of the same volumes,
                                              # instead of the batch
    stretch: str = "auto"                     # tile: how many levels each tiled stretch has, from the
                                              # finest down, such as 2+1; auto: chosen
    tiles: int | None = None                  # tile, task sparse: so many random tiles of the decoder a step,
                                              # weighted so that the loss is the same on average
    budget: float | None = None               # tile: GiB that a step may take; none: what the card has free
    recover: bool = True                      # after out of memory, turn the dial and repeat the step
    expandable_segments: bool = True          # CUDA allocator: less fragmentation
    max_split_size_mb: int = 0                # CUDA allocator: largest block that is split; 0: no limit

    def __post_init__(self):
        one_of("memory.mode", self.mode, vae3d.MEMORY_MODES)
        if self.tiles is not None and self.tiles < 1:
            raise ValueError(f"memory.tiles must be at least 1, got {self.tiles}")
        # Recovery needs no such check: it leads to tile and never away from it.
        if self.tile_parallel and self.mode != "tile":
            raise ValueError("memory.tile_parallel shares tiles among ranks, but memory.mode is "
                             f"{self.mode}, which has none; add --memory.mode tile")
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"memory.budget is a number of GiB above 0, got {self.budget}")
        if self.max_split_size_mb and self.max_split_size_mb <= 20:
            raise ValueError("memory.max_split_size_mb must be 0 or above 20 (the allocator's smallest), "
                             f"got {self.max_split_size_mb}")


@dataclass(frozen=True)
class LogConfig:
    """What is told while a run goes on, and how often."""
    every: int = 10                           # steps between console lines; log.jsonl has every step
    sample_every: int = 100                   # steps between pictures; 0: never; some are made at the end
                                              # in any case
    samples: int = 2                          # held-out volumes of which pictures are made
    window: str = "auto"                      # in which pictures show a CT: lung | bone | soft_tissue |
                                              # brain; none: as the network sees it; auto: soft_tissue,
                                              # but none where data.window is given
    histogram_every: int = 100                # steps between histograms for tensorboard and wandb;
                                              # 0: never
    tensorboard: bool = False                 # write OUT/tensorboard (pip install tensorboard)
    wandb: bool = False                       # log to Weights & Biases (pip install wandb)
    wandb_project: str = "vae3d"              # project at Weights & Biases
    ddp_check: int = 100                      # steps between comparisons of all weights across the ranks;
                                              # 0: never

    def __post_init__(self):
        one_of("log.window", self.window, ("auto", "none", *WINDOWS))
        at_least("log", self, every=1, sample_every=0, samples=1, histogram_every=0, ddp_check=0)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on; saved as config.yaml and inside every checkpoint."""
    task: str = "vae"                         # vae | seg (U-Net, image/label pairs) |
                                              # features (a network for the perceptual loss) |
                                              # sparse (points near a surface) |
                                              # diffusion (a denoiser of latents)
    preset: str = "ultra_lightweight"         # where section `vae` (vae3d.PRESETS) or `unet`
                                              # (unet.PRESETS) starts from
    vae: VAEConfig = field(default_factory=VAEConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    cond: CondConfig = field(default_factory=CondConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: RunConfig = field(default_factory=RunConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    log: LogConfig = field(default_factory=LogConfig)
SECTIONS = [f for f in dataclasses.fields(TrainConfig) if f.default_factory is not dataclasses.MISSING]


def one_of(name: str, value, choices: Sequence) -> None:
    """Raises ValueError where the value is none of the choices."""
    if value not in choices:
        known = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ValueError(f"{name} must be one of {known}, got {brief(value, 200)}")


def at_least(section: str, config, **bounds: float) -> None:
    """Raises ValueError where a field lies below its bound."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        # `not value >= bound` rather than `value < bound`: NaN fails it too.
        if not value >= bound:
            raise ValueError(f"{section}.{name} must be at least {bound}, got {value}")


def with_optimizer(cfg: TrainConfig, of_task: str) -> TrainConfig:
    """The config with what optim.optimizer and optim.lr leave to `auto` resolved.

    of_task: the optimizer for new networks of the task. Weights that are there are fine-tuned by AdamW.
    """
    name = cfg.optim.optimizer
    if name is None:
        name = of_task if cfg.train.init is None else "adamw"
    rate = HIGHEST_RATE[name] if cfg.optim.lr is None else cfg.optim.lr
    return changed(cfg, optim={"optimizer": name, "lr": rate})


# -------------------------------------------------------------------------------- from text

def convert(value: Any, hint: Any, name: str) -> Any:
    """A value from YAML or a flag -> the field's type, which `hint` is.

    "1e-4" -> 1e-4, "16,64,64" -> (16, 64, 64), 96 -> (96, 96, 96), "1,2,2;2,2,2" -> two triples.
    Raises ValueError that names the field and what it must be.
    """
    origin = typing.get_origin(hint)
    if isinstance(value, str) and "\0" in value:
        raise ValueError(f"{name} must be free of NUL, got {brief(value, 200)}")
    if origin in (typing.Union, types.UnionType):
        return convert_to_one_of(value, typing.get_args(hint), name)
    if origin is tuple:
        return convert_to_tuple(value, typing.get_args(hint), name)
    return convert_to_single(value, hint, name)


def convert_to_one_of(value: Any, choices: Sequence, name: str) -> Any:
    """For a field that may have several types, X | Y | None: the first that takes the value."""
    if value is None:
        return None
    if isinstance(value, str) and value.lower() in ("none", "null", "auto", ""):
        return None

    errors = []
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return convert(value, choice, name)
        except ValueError as error:
            errors.append(error)
    raise errors[0]


def convert_to_tuple(value: Any, parts: Sequence, name: str) -> tuple:
    """parts: the types of a tuple's values; (X, ...) for any number of X. Tuples of tuples take `;`."""
    if isinstance(value, str):
        separator = ";" if typing.get_origin(parts[0]) is tuple else ","
        value = [part for part in value.strip("()[] ").split(separator) if part.strip()]
    if not isinstance(value, (list, tuple)):
        value = [value]
    # One number for a cube.
    if list(parts) == [int] * 3 and len(value) == 1:
        value = value * 3
    if parts[-1] is not Ellipsis and len(value) != len(parts):
        order = " (D,H,W)" if len(parts) == 3 else ""
        raise ValueError(f"{name} needs {len(parts)} values{order}, got {brief(value, 200)}")
    return tuple(convert(part, parts[0], name) for part in value)


def convert_to_single(value: Any, kind: type, name: str) -> Any:
    """kind: bool, int, float, str, or dict, which training/stages.py looks into."""
    if kind is dict:
        if isinstance(value, dict):
            return value
        raise ValueError(f"{name} holds stages such as {{name: low, epochs: 100, data: {{scale: 0.5}}}} in a "
                         f"YAML file, got {brief(value, 200)}")
    if kind is bool:
        known = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if str(value).lower() in known:
            return known[str(value).lower()]
    elif not isinstance(value, bool) and isinstance(value, (int, float, str)):
        # A value that changes on its way is refused, such as 1.5 for a whole number.
        try:
            if kind is str or kind(value) == float(value):
                return kind(value)
        except (ValueError, OverflowError):
            pass
        # NaN comes here because it does not equal itself.
        if kind is float and str(value).lower() == "nan":
            raise ValueError(f"{name} must be a number, got nan")
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[kind]
    raise ValueError(f"{name} must be {wanted}, got {brief(value, 200)}")


def config_from(values: dict, base: TrainConfig, source: str) -> TrainConfig:
    """`base` with {section: {field: value}} put over it.

    source: where the values were found, for errors. Raises ValueError for an unknown key, naming the one
    that it means here or is most like it.
    """
    result = {}
    fields_of = {f.name: [each.name for each in dataclasses.fields(f.default_factory)] for f in SECTIONS}
    for key, value in values.items():
        if key in ("task", "preset"):
            result[key] = convert(value, str, f"{source}: {key}")
            continue

        # All other keys are sections, which hold fields.
        if key not in [f.name for f in SECTIONS]:
            near = key_advice(str(key), "", fields_of, ("task", "preset"))
            raise ValueError(f"{source}: unknown key {one_line(key)}{near}")
        if value is None:                                        # a section without any line
            continue
        if not isinstance(value, dict):
            raise ValueError(f"{source}: section {key} must hold `field: value` lines, got "
                             f"{brief(value, 200)}")

        current = getattr(base, key)
        hints = typing.get_type_hints(type(current))
        for name in value:
            if name not in hints:
                near = key_advice(str(name), key, fields_of)
                raise ValueError(f"{source}: unknown key {key}.{one_line(name)}{near}")
        fields = {name: convert(v, hints[name], f"{key}.{name}") for name, v in value.items()}
        result[key] = dataclasses.replace(current, **fields)
    return dataclasses.replace(base, **result)


# -------------------------------------------------------------------------------- YAML

class ConfigLoader(yaml.SafeLoader):
    """SafeLoader that refuses two things which it would take in silence.

    A key that stands twice: the second would win. And an alias of more than a single value: aliases of
    aliases multiply, to a billion values in 500 bytes.
    """
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            alias = self.peek_event()
            # An anchor that is not there is no single value either: `parent` takes its place.
            if not isinstance(self.anchors.get(alias.anchor, parent), yaml.ScalarNode):
                raise yaml.YAMLError(f"*{alias.anchor} in line {alias.start_mark.line + 1} is no single "
                                     "value; write it out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise yaml.YAMLError(f"the key {brief(twice, 200)} stands twice in one section")
        return super().construct_mapping(node, deep)


def read_yaml(path: str) -> dict:
    """The sections of a config file; {} of an empty one. Raises ValueError in one line."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError("not a regular file")
        size = os.path.getsize(path)
        if size > MAX_CONFIG:
            raise ValueError(f"{size} bytes, a config has {MAX_CONFIG} at most")
        values = yaml.load(Path(path).read_text(encoding="utf-8-sig"), ConfigLoader)
    # PyYAML raises IndexError, KeyError, AttributeError and RecursionError too, depending on the tag.
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as YAML: {line_of(error)}") from None
    values = values or {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: must hold sections such as `data:` and `train:`, got "
                         f"{type(values).__name__}")
    return values


def config_dict(cfg: TrainConfig) -> dict:
    """Plain nested dict for YAML and checkpoints; tuples become lists."""
    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        return value
    return plain(dataclasses.asdict(cfg))


def to_yaml(cfg: TrainConfig) -> str:
    return yaml.safe_dump(config_dict(cfg), sort_keys=False, default_flow_style=None, width=120)


def changed(cfg: TrainConfig, **sections: dict[str, Any]) -> TrainConfig:
    """A config with some fields of its sections replaced: changed(cfg, data={"patch": (32, 64, 64)})."""
    new = {}
    for name, fields in sections.items():
        new[name] = dataclasses.replace(getattr(cfg, name), **fields)
    return dataclasses.replace(cfg, **new)
