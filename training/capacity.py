"""What fits into a budget of memory: the answer for one volume, the largest ones, and the commands for them.

memtest.py asks here and prints. Memory is in bytes. Version 0.1 (2026-11).
"""
from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import NamedTuple

import torch

import peaks
from peaks import SPARE, MakeStep, Size
from training import fit
from training.config import TrainConfig, changed, config_dict, to_yaml
from training.flags import load_config
from training.plan import activations_of, candidates, network_of
from training.task import Task

# In the settings of a plan these stand also where they are the default.
SAID = {("data", "patch"), ("train", "amp"), ("train", "batch"), ("memory", "mode")}
PER_VOXEL = 16               # bytes of a step in the leanest tiles, about; where the search begins
MOST_WORK = 2.0              # of the largest volume's tiles, over a checkpointed step


class Fit(NamedTuple):
    """A volume with the settings that it was predicted with."""
    size: Size
    memory: dict
    bytes: int
    fits: bool


def step_for(cfg: TrainConfig, task: Task, size: Size, memory: dict) -> MakeStep:
    chosen = changed(cfg, data={"patch": size}, memory=memory)
    return lambda d: fit.make_step(chosen, task, d, rehearsal=True)


def answer(cfg: TrainConfig, task: Task, budget: float, device: str) -> Fit:
    """The cheapest settings with which cfg's volume fits, or, where none do, those that take least."""
    network, size, limit = network_of(cfg, task), cfg.data.patch, int(budget * (1 - SPARE))
    dtype = activations_of(cfg, torch.device(device), network)
    settings = candidates(network, size, cfg.train.batch, dtype, limit)
    found = peaks.plan(functools.partial(step_for, cfg, task), size, budget, settings, device)
    return Fit(size, found.memory, found.bytes, found.fits)


def largest(cfg: TrainConfig, task: Task, budget: float, device: str, shape: Size,
            tell: Callable[[str], None], per_voxel: float = PER_VOXEL) -> Fit | None:
    """The largest volume in the proportions of `shape` that fits, to 3 % of its edges, in the leanest way.

    tell: hears which size is looked at. per_voxel: of the last search, so that this one begins near its end.
    """
    network, batch = network_of(cfg, task), cfg.train.batch
    dtype = activations_of(cfg, torch.device(device), network)

    @functools.cache
    def leanest(size: Size) -> dict:
        return candidates(network, size, batch, dtype, most_work=MOST_WORK)[-1]

    def peak_of(size: Size) -> int:
        tell(f"looking for the largest volume: {fit.size_text(size)} ...")
        return peaks.predict(step_for(cfg, task, size, leanest(size)), device).bytes

    def least_bytes(size: Size) -> float:
        return per_voxel * batch * math.prod(size)

    unit = math.lcm(16, *stride_of(network))                     # edges are multiples of it
    found = peaks.largest(peak_of, shape, unit, int(budget * (1 - SPARE)), least_bytes, close=0.1)
    if not found:
        return None
    size, peak = found
    return Fit(size, leanest(size), peak, True)


def stride_of(network: torch.nn.Module) -> tuple[int, int, int]:
    """To whose multiples a network pads; 1 for one that has no levels."""
    return getattr(getattr(network, "cfg", None), "total_stride", (1, 1, 1))


def dry_run_text(cfg: TrainConfig, task: Task, tasks: Mapping[str, ModuleType], device: torch.device,
                 verbose: bool, peaks_on: Callable[[torch.device], list[str]]) -> str:
    """What `train.py --dry-run` prints, a config file: the peak, then what differs from the defaults.

    The peak is that on a card and on this machine's device, as comments. verbose: the whole config.
    peaks_on: the lines about the peak on a device (edges.peaks_of).
    """
    kinds = dict.fromkeys([torch.device("cuda").type, device.type])
    lines = [f"# {text}" for kind in kinds for text in peaks_on(torch.device(kind))]
    if verbose:
        return "\n".join([*lines, to_yaml(cfg)])
    settings = settings_yaml(cfg, task, tasks)
    return "\n".join([*lines, "# what differs from the defaults; --verbose has all", settings])


# -------------------------------------------------------------------------------- as YAML and as a command

def differences(cfg: TrainConfig, task: Task, tasks: Mapping[str, ModuleType], said=frozenset()) -> dict:
    """Section -> the fields that differ from the preset's defaults, or are in `said`, with their values."""
    words = ["--task", task.name]
    # The preset of a foreign train.init is none that a flag may name.
    if cfg.preset in task.PRESETS:
        words += ["--preset", cfg.preset]
    defaults = config_dict(load_config(words, tasks))
    found = {}
    for section, fields in config_dict(cfg).items():
        if not isinstance(fields, dict):
            continue
        for name, value in fields.items():
            if value != defaults[section][name] or (section, name) in said:
                found.setdefault(section, {})[name] = value
    return found


def settings_yaml(cfg: TrainConfig, task: Task, tasks: Mapping[str, ModuleType], said=frozenset(SAID)) -> str:
    """What differs from the preset's defaults, as YAML that train.py --config takes.

    Values are written as JSON, which YAML includes.
    """
    lines = []
    if task.name != TrainConfig.task:
        lines.append(f"task: {task.name}")
    lines.append(f"preset: {cfg.preset}")
    lines += [f"{section}: {json.dumps(fields)}"
              for section, fields in differences(cfg, task, tasks, said).items()]
    return "\n".join(lines) + "\n"


def command(cfg: TrainConfig, task: Task, tasks: Mapping[str, ModuleType]) -> str:
    """The same as a train.py command, to paste; its data are to be named."""
    short = {"data.patch": "patch", "train.amp": "amp", "train.batch": "batch"}
    words = ["python train.py"]
    if cfg.data.path is None:
        words.append("--data FOLDER")
    if task.name != TrainConfig.task:
        words.append(f"--task {task.name}")
    words.append(f"--preset {cfg.preset}")
    for section, fields in differences(cfg, task, tasks, SAID).items():
        for name, value in fields.items():
            flag = short.get(f"{section}.{name}", f"{section}.{name}")
            if value is True:
                words.append(f"--{flag}")
            elif (section, name, value) not in (("train", "amp", False), ("memory", "mode", "none")):
                words.append(f"--{flag} {flag_text(value)}")
    return " ".join(words)


def flag_text(value: object) -> str:
    """A value of a config as a flag takes it: 64,256,256, or "1,2,2;2,2,2" in quotes."""
    if isinstance(value, list):
        if value and isinstance(value[0], list):
            return '"' + ";".join(map(flag_text, value)) + '"'
        return ",".join(map(str, value))
    return str(value)
