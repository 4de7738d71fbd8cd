"""Stages: the parts of one run that differ in resolution, crops, loss, rates or memory (docs/STAGES.md).

    train:
      stages:
        - {name: low, epochs: 100, data: {scale: 0.5, patch: [16, 48, 48]}}
        - {name: full, steps: 4000, data: {scale: 1, patch: [32, 96, 96]}, optim: {lr: 2e-4}}

A stage is a function of the step: `Stage.cfg` is the config with its overrides, and those of the stages
before it, applied, and the loop goes by that one. Network, moments, averages, codebook and loss scale know
nothing of stages and just go on. What a stage begins anew is in edges.py. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import data
from losses import LossConfig
from training.config import (
    LogConfig,
    MemoryConfig,
    OptimConfig,
    TrainConfig,
    changed,
    config_from,
    convert,
)
from training.facts import open_data, told_by
from training.order import crops_of_step, steps_per_epoch
from training.spellings import key_advice
from training.task import Task
from volumes.config import DataConfig
from volumes.files import DataError, brief, one_line

# Fields of DataConfig that say where a crop lies and what is done to it; the volumes stay as they are.
OF_CROPS = ("patch", "crops_per_volume", "zoom", "flip", "jitter", "workers", "pin_memory")
# Those that make other volumes of the same files, each with a cache of its own.
OF_GRID = ("spacing", "resize", "scale")


def all_but(section: type, *names: str) -> tuple[str, ...]:
    return tuple(f.name for f in dataclasses.fields(section) if f.name not in names)


# Section -> what a stage may override. All else is of the whole run: networks, optimizer, seed, which files
# are held out, what an intensity means.
MAY_CHANGE = {
    "data": (*OF_CROPS, *OF_GRID, "foreground"),
    "loss": all_but(LossConfig, "background", "perceptual_features", "disc_channels", "disc_layers",
                    "disc_strides", "disc_norm"),
    "optim": all_but(OptimConfig, "optimizer"),
    "train": ("batch", "accum", "amp", "stage", "val_every", "val_crops", "val_whole", "save_every",
              "patience", "min_delta", "metric", "nan_limit", "latent_crops"),
    "memory": all_but(MemoryConfig, "tile_parallel", "expandable_segments", "max_split_size_mb"),
    "log": all_but(LogConfig, "tensorboard", "wandb", "wandb_project"),
}
LENGTHS = ("steps", "epochs")
OWN = ("name", *LENGTHS, "until")


# -------------------------------------------------------------------------------- the config of each stage

def stage_configs(cfg: TrainConfig) -> dict[str, TrainConfig]:
    """Name of each stage -> its config: without stages, its own length in train.steps and train.epochs.

    A run without train.stages is one stage without a name, whose config is the run's. Raises ValueError that
    names the stage and the key.
    """
    if not cfg.train.stages:
        return {"": cfg}
    if cfg.train.epochs is not None:
        raise ValueError("train.epochs: with train.stages each stage has epochs of its own; train.steps is "
                         "the most that all of them take together")
    no_length = {"steps": None, "epochs": None}
    found, before = {}, changed(cfg, train={"stages": (), **no_length})
    for number, asked in enumerate(cfg.train.stages, 1):
        name = asked.get("name", number)
        name = name if isinstance(name, str) else brief(name)
        where = f"train.stages, stage {one_line(name, 40)}"
        if not re.fullmatch(r"[A-Za-z0-9-]{1,40}", name) or name in found:
            raise ValueError(f"{where}: its name is part of a file's name; use letters, digits and -, and a "
                             "name that no other stage has")
        check_keys(asked, where)
        sections = {key: value for key, value in asked.items() if key in MAY_CHANGE and value is not None}
        try:
            before = config_from(sections, before, where)
            lengths = {key: convert(asked.get(key), int | None, key) for key in LENGTHS}
            if not any(lengths.values()):
                raise ValueError("needs steps or epochs, the most that it takes")
            now = changed(before, train=lengths)
            # Without train.patience it waits as many validations as the plateau schedule does.
            if asked.get("until", "end") == "plateau" and not now.train.patience:
                now = changed(now, train={"patience": now.optim.plateau_patience})
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).removeprefix(f'{where}: ')}") from None
        if now.train.stage == 1 and any(each.train.stage != 1 for each in found.values()):
            raise ValueError(f"{where}: train.stage 1 trains the codebook alone, before all else; name it "
                             "first")
        found[name] = now
    return found


def check_keys(asked: Mapping[str, Any], where: str) -> None:
    """Raises ValueError for a key that a stage has not, and for a field that is of the whole run."""
    for key, fields in asked.items():
        if key in OWN:
            continue
        if key not in MAY_CHANGE:
            whole = [f.name for f in dataclasses.fields(TrainConfig)]
            if key in whole:
                raise ValueError(f"{where}: {key} cannot change between stages; set it for the whole run")
            raise ValueError(f"{where}: unknown key {one_line(key)}"
                             f"{key_advice(str(key), '', MAY_CHANGE, OWN)}")
        # Unknown fields, and sections that hold none, are config_from's to tell.
        known = [f.name for f in dataclasses.fields(getattr(TrainConfig(), key))]
        for name in fields if isinstance(fields, dict) else ():
            if key == "train" and name in LENGTHS:
                raise ValueError(f"{where}: train.{name}: write {name} beside the stage's name")
            if name in known and name not in MAY_CHANGE[key]:
                raise ValueError(f"{where}: {key}.{name} cannot change between stages; set it for the whole "
                                 "run")
    if asked.get("until", "end") not in ("end", "plateau"):
        raise ValueError(f"{where}: until must be end or plateau, got {brief(asked['until'])}")


def without(cfg: TrainConfig, flags: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """The config whose stages leave alone what flags say ({section: {field: value}}), and which fields.

    Flags beat stages as they beat the rest of a file.
    """
    beaten: list[str] = []
    stages = []
    for asked in cfg.train.stages:
        kept = dict(asked)
        for section, fields in flags.items():
            if section not in MAY_CHANGE or not isinstance(kept.get(section), dict):
                continue
            both = [name for name in kept[section] if name in fields]
            beaten += [f"{section}.{name}" for name in both]
            kept[section] = {name: value for name, value in kept[section].items() if name not in both}
        stages.append(kept)
    return changed(cfg, train={"stages": tuple(stages)}), list(dict.fromkeys(beaten))


# -------------------------------------------------------------------------------- the stages of a run

@dataclass(frozen=True)
class Stage:
    """A part of a run. Of a run without train.stages the only one, whose name is empty.

    Steps and crops are numbered through the run, so that no two stages draw the same crops or noise.
    """
    name: str
    cfg: TrainConfig                          # of this stage alone; train.stages is empty
    dataset: data.Data
    global_batch: int = 0                     # crops an optimizer step, over all ranks
    first: int = 0                            # its first step
    first_crop: int = 0                       # of that step
    steps: int = 0                            # planned: what schedule and warm-up go by
    end: int = 0                              # the step that it ends before; less than planned where it was
                                              # stopped early or train.steps ends the run

    @property
    def epoch_length(self) -> int:
        return len(self.dataset.train) * self.cfg.data.crops_per_volume

    @property
    def per_epoch(self) -> int:
        """Optimizer steps."""
        return steps_per_epoch(self.epoch_length, self.global_batch)

    def crops_of(self, step: int) -> range:
        start = self.first, self.first_crop
        return crops_of_step(step, self.epoch_length, self.global_batch, start)

    def epoch_of(self, step: int) -> int:
        return self.crops_of(max(step, self.first)).start // self.epoch_length


def open_stages(cfg: TrainConfig, task: Task, say: Callable[[str], None],
                known: dict | None = None) -> tuple[TrainConfig, list[Stage]]:
    """The run's config with all that the data say, and its stages, whose place in the run is not known yet.

    The volumes of every stage are prepared here, so that a full disk or a crop that does not fit is told
    before the first step. Raises DataError or ValueError.
    """
    said: set[str] = set()

    def once(text: str) -> None:
        if text not in said:
            said.add(text)
            say(text)

    # First the first stage. What the data say of its config goes into the run's, for all.
    (name, asked), *_ = stage_configs(cfg).items()
    check_grid(cfg, name, asked)
    found, dataset = open_data(asked, task, once, known)
    opened = [Stage(name, found, dataset)]
    cfg = with_differences(cfg, asked, found)

    # Then the others. Stages that differ in their crops alone share the voxels.
    for name, asked in list(stage_configs(cfg).items())[1:]:
        check_grid(cfg, name, asked)
        before = opened[-1].dataset
        if same_voxels(asked.data, before.cfg):
            asked = changed(asked, data={"ignore_label": before.cfg.ignore_label})
            dataset = dataclasses.replace(before, cfg=asked.data, patch=asked.data.patch)
            found = told_by(dataset, asked, task)
        else:
            found, dataset = open_data(asked, task, once, known)
        opened.append(Stage(name, found, dataset))
    return cfg, opened


def check_grid(cfg: TrainConfig, name: str, asked: TrainConfig) -> None:
    """Synthetic volumes are made on one grid: a stage on another would be the same one in silence."""
    for field in OF_GRID:
        value = getattr(asked.data, field)
        if cfg.data.path is None and value != getattr(cfg.data, field) and value != "random":
            raise DataError(f"train.stages, stage {name}: data.{field} has no effect on synthetic volumes; "
                            "name real ones with --data")


def with_differences(cfg: TrainConfig, before: TrainConfig, after: TrainConfig) -> TrainConfig:
    """cfg with every field in which `after` differs from `before`."""
    changes = {}
    for section in dataclasses.fields(cfg):
        old, new = getattr(before, section.name), getattr(after, section.name)
        if dataclasses.is_dataclass(new):
            names = [f.name for f in dataclasses.fields(new) if getattr(old, f.name) != getattr(new, f.name)]
            changes[section.name] = {name: getattr(new, name) for name in names}
    return changed(cfg, **changes)


def same_voxels(a: DataConfig, b: DataConfig) -> bool:
    return dataclasses.replace(a, **{name: getattr(b, name) for name in OF_CROPS}) == b


def planned(cfg: TrainConfig, opened: Sequence[Stage], global_batch: int,
            edges: Sequence[int]) -> list[Stage]:
    """The stages with their places in the run.

    global_batch: of a step of train.batch and train.accum, from which each stage's follows. edges: the steps
    at which stages have ended so far. Stages that train.steps leaves no step are left out.
    """
    limit = cfg.train.steps if cfg.train.stages else None
    found: list[Stage] = []
    step = crop = 0
    for number, stage in enumerate(opened):
        own = stage.cfg.train
        batch = global_batch * own.batch * own.accum // (cfg.train.batch * cfg.train.accum)
        stage = dataclasses.replace(stage, global_batch=batch, first=step, first_crop=crop)
        stage = dataclasses.replace(stage, steps=total_steps(stage.cfg, stage.per_epoch))
        end = step + stage.steps
        if number < len(edges):
            end = edges[number]
        elif limit is not None:
            end = min(end, max(limit, step))
        if number > len(edges) and end == step:
            break
        before = (opened[number - 1].cfg, found[-1].cfg) if found else None
        stage = dataclasses.replace(stage, end=end, cfg=with_starts(stage.cfg, step, before))
        found.append(stage)
        if end > step:
            step, crop = end, stage.crops_of(end - 1).stop
    return found


def with_starts(cfg: TrainConfig, first: int, before: tuple[TrainConfig, TrainConfig] | None) -> TrainConfig:
    """loss.disc_start and loss.perceptual_start as steps of the run.

    As they are given they count from the stage that first weighs the term. before: the config of the stage
    before, as given and with its starts as steps of the run.
    """
    starts = {}
    for weight, start in (("adv_weight", "disc_start"), ("perceptual_weight", "perceptual_start")):
        if not getattr(cfg.loss, weight):
            continue
        zero = first
        if before is not None and getattr(before[0].loss, weight):
            zero = getattr(before[1].loss, start) - getattr(before[0].loss, start)
        starts[start] = zero + getattr(cfg.loss, start)
    return changed(cfg, loss=starts)


def total_steps(cfg: TrainConfig, per_epoch: int) -> int:
    """train.steps or train.epochs, whichever ends first; none given: 50 on synthetic volumes, else 2000."""
    limits = [cfg.train.steps, cfg.train.epochs and cfg.train.epochs * per_epoch]
    return min((n for n in limits if n), default=50 if cfg.data.path is None else 2000)


def with_dial(cfg: TrainConfig, opened: Sequence[Stage], number: int, dial: MemoryConfig) -> TrainConfig:
    """The run's config with the dial of stage `number` as it is turned now; the other stages keep theirs.

    A run that is resumed inside of that stage begins with it.
    """
    if not cfg.train.stages:
        return dataclasses.replace(cfg, memory=dial)
    stages, before = [], cfg.memory
    for place, (asked, stage) in enumerate(zip(cfg.train.stages, opened)):
        wanted = dial if place == number else stage.cfg.memory
        names = [f.name for f in dataclasses.fields(wanted)]
        fields = {name: getattr(wanted, name) for name in names
                  if getattr(wanted, name) != getattr(before, name)}
        asked = {key: value for key, value in asked.items() if key != "memory"}
        stages.append(asked | {"memory": fields} if fields else asked)
        before = wanted
    return changed(cfg, train={"stages": tuple(stages)})
