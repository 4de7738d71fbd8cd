"""Will it fit? The real training step of a config, predicted without a GPU, and the cheapest memory settings
within a budget.

The step is built from a config alone, on random crops, and handed to peaks.py. train.py (--dry-run, --fit)
and memtest.py ask here. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from unittest import mock

import torch

import losses
import peaks
from training import devices, ranks
from training.config import MemoryConfig, TrainConfig, changed, convert
from training.console import line_of
from training.devices import pick_precision, to_device
from training.memory import begin, modes_of
from training.order import MicroBatch
from training.step import StepResult, train_step
from training.task import Task

# Bytes that no step takes for a voxel of its crops; attention without a fused kernel is what comes near.
MOST_PER_VOXEL = 100_000
# Tile plans that take longer, over a checkpointed step, are not considered.
MOST_WORK = 2.0
CUBES = (128, 64, 32, 16, 8)                  # edges of tiles for a network of points, voxels


def make_step(cfg: TrainConfig, task: Task, device: torch.device | str,
              rehearsal: bool = False) -> Callable[[], StepResult]:
    """A closure that runs the real train_step on random crops; the call itself builds the networks.

    rehearsal: on tensors without data, for a prediction (see vae3d.VAE3D.memory).
    """
    device = torch.device(device)
    state = begin(cfg, task, device, rehearsal=rehearsal)
    # A step with all that the run will have: the last term has set in, and R1 is due.
    state.step = -(-task.last_start(cfg) // cfg.loss.r1_every) * cfg.loss.r1_every
    batch, size, micro_batches = cfg.train.batch, cfg.data.patch, []
    for _ in range(cfg.train.accum):
        if task.stand_in is not None:
            image = task.stand_in(cfg, state.model, device, rehearsal)
        else:
            image = to_device(torch.randn(batch, task.channels(cfg), *size), device)
        label = torch.zeros(batch, *size, dtype=torch.int64, device=device) if task.LABELS else None
        micro_batches.append(MicroBatch(image, list(range(batch)), [0] * batch, label))
    if not rehearsal:
        return lambda: train_step(cfg, state, micro_batches)

    def step() -> StepResult:
        with mock.patch.object(losses, "slabs", few_slabs):
            return train_step(cfg, state, micro_batches)
    return step


def few_slabs(x: torch.Tensor, every: Callable = losses.slabs) -> Iterator[tuple[slice, ...]]:
    """The first three slabs that a loss works in: the others take as much memory as the second one, and of a
    volume of 768^3 there are hundreds."""
    return islice(every(x), 3)


def predicted(cfg: TrainConfig, task: Task, device: torch.device | str) -> peaks.Peak:
    """Of a step of this config. Raises RuntimeError where it cannot be simulated."""
    return peaks.predict(lambda d: make_step(cfg, task, d, rehearsal=True), device)


def predicted_peak(cfg: TrainConfig, task: Task, device: torch.device) -> str:
    """The same as a line; needs no such device."""
    try:
        peak = predicted(cfg, task, device)
    except RuntimeError as error:
        return f"predicted peak: none, {line_of(error)}"
    left_out = f"; {' '.join(peaks.LEFT_OUT.split())}" if device.type == "cuda" else ", without kernels' own"
    return f"predicted peak of a step on {device.type}: {peak.bytes / peaks.GIB:.2f} GiB{left_out}"


def check_memory(cfg: TrainConfig, task: Task, device: torch.device) -> None:
    """Raises ValueError where a step on a CPU is predicted to take more than the machine has.

    There the system would end the process in the middle of a step, without a word. Steps that are small for
    this memory are not predicted, which would take a second or two.
    """
    limit = devices.machine_memory() / ranks.on_this_machine()
    if device.type != "cpu" or MOST_PER_VOXEL * cfg.train.batch * math.prod(cfg.data.patch) < limit:
        return
    try:
        peak = predicted(cfg, task, device).bytes
    except RuntimeError:                      # a step that cannot be simulated is tried
        return
    if peak > limit:
        each = f" for each of {ranks.on_this_machine()} processes" if ranks.on_this_machine() > 1 else ""
        raise ValueError(f"a step at {size_text(cfg.data.patch)}, batch {cfg.train.batch}, memory mode "
                         f"{cfg.memory.mode} is predicted to take {peak / peaks.GIB:.2f} GiB, and this "
                         f"machine has {limit / peaks.GIB:.2f}{each}; use --fit {limit / peaks.GIB:.2f}, a "
                         "smaller --patch or a smaller --batch")


def network_of(cfg: TrainConfig, task: Task) -> torch.nn.Module:
    """Without weights, to count or to plan."""
    with torch.device("meta"):
        return task.build(cfg)


def tile_plans(network: torch.nn.Module, size: Sequence[int], batch: int, dtype: torch.dtype) -> list:
    """TilePlan by rising work, none above MOST_WORK, for volumes of `size`."""
    plans = network.memory("tile").tiling().plans(size, batch, dtype)
    return [p for p in plans if p.work <= MOST_WORK] or plans[:1]


def memory_settings(network: torch.nn.Module, size: Sequence[int], batch: int, dtype: torch.dtype,
                    limit: float = math.inf) -> list[dict]:
    """Candidates for peaks.plan as fields of section `memory`, by rising recomputation: none, checkpoint,
    then tile plans.

    dtype: of the activations. Of the tile plans those whose own estimate is within `limit` bytes, or the one
    of least memory."""
    found = [{"mode": mode} for mode in modes_of(network) if mode != "tile"]
    if "tile" in modes_of(network) and not hasattr(network, "tiling"):
        # Points have no estimate of their own: cubes by falling size, each of which is predicted.
        found += [{"mode": "tile", "tile": (edge, edge, edge)} for edge in CUBES if edge < max(size)]
    elif "tile" in modes_of(network):
        plans = tile_plans(network, size, batch, dtype)
        found += [tile_memory(p) for p in plans if p.peak_bytes <= limit] or [tile_memory(plans[-1])]
    return found


def tile_memory(plan) -> dict:
    return {"mode": "tile", "tile": plan.tile, "stretch": plan.stretch}


def size_text(size) -> str:
    return ",".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)


def memory_text(memory: dict) -> str:
    if memory["mode"] != "tile":
        return memory["mode"]
    stretch = f", stretches {memory['stretch']}" if "stretch" in memory else ""
    return f"tile {size_text(memory['tile'])}{stretch}"


def fit(cfg: TrainConfig, task: Task, device: torch.device, budget: str,
        say: Callable[[str], None]) -> MemoryConfig:
    """The cheapest memory settings whose predicted peak leaves 10 % of `budget` (GiB, or `free`) unused.
    ValueError where none does.
    """
    if budget == "free":
        if device.type != "cuda" or not torch.cuda.is_available():
            raise ValueError("--fit needs a number of GiB where there is no GPU whose free memory it could "
                             "take: --fit 16")
        limit = float(torch.cuda.mem_get_info(device)[0])
    else:
        limit = convert(budget, float, "--fit") * peaks.GIB
    dtype = pick_precision(cfg.train.amp, device, network_of(cfg, task))[0] or torch.float32
    if cfg.train.precision == "master16":
        dtype = torch.float16
    size = cfg.data.patch
    candidates = memory_settings(network_of(cfg, task), size, cfg.train.batch, dtype, limit)
    if cfg.memory.tile_parallel:
        candidates = [memory for memory in candidates if memory["mode"] == "tile"]

    def step_with(size: Sequence[int], memory: dict) -> Callable:
        chosen = changed(cfg, data={"patch": size}, memory=memory)
        return lambda d: make_step(chosen, task, d, rehearsal=True)
    plan = peaks.plan(step_with, size, limit, candidates, device)
    text = (f"{plan.bytes / peaks.GIB:.2f} GiB predicted at {size_text(size)}, "
            f"{limit / peaks.GIB:.2f} given, 10 % kept free")
    if not plan.fits:
        raise ValueError(f"--fit: nothing fits: the least is {memory_text(plan.memory)}, {text}; use a "
                         f"smaller --patch or --batch, or --fit {plan.bytes / 0.9 / peaks.GIB:.2f}")
    say(f"--fit: memory mode {memory_text(plan.memory)}: {text}")
    return dataclasses.replace(cfg.memory, **plan.memory)
