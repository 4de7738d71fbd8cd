"""What the rest of the program asks of a task, and what a task may leave out.

A task is one module in tasks/: what is trained (an autoencoder, a U-Net, a denoiser ...). Training,
validation, memory prediction and predict.py know a task by the names below alone, and never ask which one it
is. The table of all tasks is tasks.TASKS. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor, nn

from training.config import TrainConfig, one_of


class Objective(NamedTuple):
    """What one micro-batch gives."""
    out: Any                                  # the network's output
    terms: dict[str, Tensor]                  # each () float32 or wider; `loss` is their weighted sum
    crops: tuple[Tensor, ...] = ()            # image and reconstruction as a discriminator sees them; ():
                                              # none does


class Picture(NamedTuple):
    """What one held-out crop looks like."""
    image: Tensor                             # (height, width, 3) uint8
    volume: Any                               # (C, D, H, W) array, written as NIfTI beside it
    kind: str                                 # the end of that file's name: recon | pred | sample
    note: dict = {}                           # what the pixels mean: views.Views.note, and `figures`, text
    affine: Any = None                        # (4, 4) of that volume's grid; None: the crop's


class Scored(NamedTuple):
    """What predict.py learns of one whole volume."""
    figures: dict[str, Any]                   # name -> number; channels: such a dict for each
    found: Any                                # reconstruction (C, D, H, W) or classes (D, H, W)
    seconds: float                            # that the network took
    sums: dict[str, Tensor]                   # to be added up over all volumes, for `pooled`


def nothing(*_) -> None:
    """For what a task has no need of."""


def no_helpers(*_) -> dict:
    return {}


def as_it_is(cfg: TrainConfig, *_) -> TrainConfig:
    return cfg


@dataclass(frozen=True)
class Task:
    """A task with everything that its module leaves out filled in. The module has to have the first four."""
    name: str                                 # of --task
    METRICS: dict[str, bool]                  # validation's figures -> higher is better; the first is
                                              # train.metric's auto
    build: Callable[[TrainConfig], nn.Module]  # (cfg) -> the network. ValueError for a config that cannot be
                                               # meant
    objective: Callable[..., Objective]       # (cfg, state, network, micro, generators): what a training step
                                              # lowers

    # The config.
    PRESETS: dict[str, Any] = field(default_factory=dict)  # name -> config of the network; {}: there is one
                                                           # network
    FILE_PRESETS: dict[str, Any] = field(default_factory=dict)  # names that only a file may use: networks
                                                                # made elsewhere
    sections: Callable[[Any], dict[str, Any]] = no_helpers  # (preset) -> sections of the config that start
                                                            # otherwise
    check: Callable[[TrainConfig], None] = nothing  # ValueError for fields that do not go together
    OPTIMIZER: str = "adamw"                  # what optim.optimizer's auto is for a new network
    LABELS: bool = False                      # the data are image/label pairs
    POINTS: bool = False                      # crops are boxes of tokens, 0 where there is no point, and
                                              # stay on the CPU
    stand_in: Callable | None = None          # (cfg, network, device, rehearsal) -> what takes the place of
                                              # crops in a prediction; None: random ones
    dataset: Callable[..., Any] | None = None  # (cfg, say) -> data.Data; None: volumes, by data.open_data
    resolve: Callable[..., TrainConfig] = as_it_is  # (cfg, dataset) -> cfg with what the data say
    channels: Callable[[TrainConfig], int] = lambda cfg: cfg.vae.in_channels
                                              # of the network's input
    title: Callable[[TrainConfig], str] = lambda cfg: cfg.preset  # of the network, for the console

    # Training.
    helpers: Callable[..., dict[str, Any]] = no_helpers  # (cfg, device, features) -> State's disc, lecam,
                                                         # perceptual ...
    start: Callable[..., None] = nothing      # (run): before the first step of a run that has no state yet
    given: Callable | None = None             # (cfg, state, micro, generators) -> tensors: all that
                                              # `objective` takes from the host beside crops and labels, if
                                              # micro.given has it not; None: steps cannot be replayed
    last_start: Callable[[TrainConfig], int] = lambda cfg: 0  # step from which all terms are there

    # Validation.
    criterion: Callable[..., Objective] | None = None  # as objective, all terms in full; None: objective
    metrics: Callable[..., dict] = no_helpers  # (cfg, out, micro, crop) -> figures of a crop, beside the
                                               # terms
    counts: Callable[..., dict[str, Tensor]] = no_helpers  # (cfg, out, micro, dataset) -> tensors that are
                                                           # added up over the crops
    figures: Callable[[dict[str, Tensor]], dict] = no_helpers  # (their sums) -> figures
    output: Callable[..., Any] | None = None  # (cfg, state, network, x): of a whole crop; None: network(x)
    sample: Callable[..., Any] | None = None  # (cfg, state, network, crop): what `picture` shows of a crop;
                                              # None: `output`
    picture: Callable[..., Picture] | None = None  # (cfg, crop, out); None: there is nothing to look at

    # What is shipped.
    ship: Callable[..., dict] | None = None   # (network) -> content of best.pt; None: its weights and the
                                              # config
    finish: Callable[..., None] = nothing     # (run): measurements at the end of a run

    # predict.py, the use of a checkpoint. `ready` is training.ready.Ready, arrays are (C, D, H, W)
    # normalised, `tick` is told of progress. None: the command is for other tasks.
    describe: Callable[[TrainConfig], str] = lambda cfg: "network"  # kind of network, for the console
    prepare: Callable[..., None] = nothing    # (ready, options, data config): put flags on the network;
                                              # ValueError for those that do not fit
    reconstruct: Callable | None = None       # (ready, array, tick) -> array
    encode: Callable | None = None            # (ready, array, generator, tick) -> latent
    decode: Callable | None = None            # (ready, latent, size, tick) -> array
    denoise: Callable | None = None           # (ready) -> the network as diffusion.py calls it, of conditions
                                              # `vector`, `concat` and `hint` as they lie on disk
    latent_kind: Callable | None = None       # (ready) -> latents.LatentKind, of `encode`
    classes: Callable[[TrainConfig], int] | None = None  # how many `segment` tells apart; None: as many as
                                                         # the training labels have
    segment: Callable | None = None           # (ready, array, window, overlap, background, threshold, size,
                                              # tick) -> classes (D, H, W)
    evaluate: Callable | None = None          # (ready, case, number, options, tick) -> Scored; None:
                                              # `reconstruct` is compared with its input
    pooled: Callable[[dict], dict] = no_helpers  # (sums of Scored.sums) -> figures over all volumes


def named(tasks: Mapping[str, ModuleType], name: str, source: str = "") -> Task:
    """The task of that name. Raises ValueError for one that is not in the table; source: where the name was
    found.
    """
    one_of(f"{source}: task" if source else "task", name, tuple(tasks))
    module = tasks[name]
    given = {
        f.name: getattr(module, f.name)
        for f in dataclasses.fields(Task)
        if hasattr(module, f.name) and f.name != "name"
    }
    return Task(name, **given)


def of(tasks: Mapping[str, ModuleType], cfg: TrainConfig, source: str = "") -> Task:
    """The task of a config."""
    return named(tasks, cfg.task, source)


def of_codebook_stage(network: nn.Module, stage: int, section: str) -> nn.Module:
    """A network with a codebook for train.stage: in stage 1 all else is frozen.

    Raises ValueError for a stage of a network without one. section: its section of the config.
    """
    bottleneck = network.cfg.bottleneck
    if stage and bottleneck != "vq":
        raise ValueError(f"train.stage {stage} trains a codebook, but {section}.bottleneck is {bottleneck}; "
                         f"add --{section}.bottleneck vq")
    if stage == 1:
        network.requires_grad_(False)
        network.quantizer.requires_grad_(True)
    return network


def metric_of(cfg: TrainConfig, task: Task) -> str:
    """train.metric, with `auto` resolved by the task."""
    return next(iter(task.METRICS)) if cfg.train.metric == "auto" else cfg.train.metric


def serving(tasks: Mapping[str, ModuleType], needs: Sequence[str]) -> dict[str, Task]:
    """The tasks that have at least one of the names in `needs`; all of them where it is empty."""
    every = {name: named(tasks, name) for name in tasks}
    if not needs:
        return every
    return {name: task for name, task in every.items() if any(getattr(task, need) for need in needs)}


def task_of(cfg: TrainConfig, able: Mapping[str, Task], source: object) -> Task:
    """The task of a checkpoint. Raises ValueError where it is none of `able`; source: the checkpoint."""
    if cfg.task not in able:
        raise ValueError(f"{source}: a network for --task {cfg.task}; this command needs one for "
                         f"{' or '.join(able)}")
    return able[cfg.task]
