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
import muon
import peaks
from training import devices, ranks
from training.config import MemoryConfig, TrainConfig, changed, convert
from training.console import line_of
from training.devices import to_device
from training.memory import begin
from training.order import MicroBatch
from training.plan import activations_of, candidates, network_of, settled_config
from training.step import StepResult, train_step
from training.task import Task

# Of Muon in a rehearsal, where five are most of a step's time: the second holds all that later ones hold.
FEW_ITERATIONS = 2
# Bytes that no step takes for a voxel of its crops; attention without a fused kernel is what comes near.
MOST_PER_VOXEL = 100_000


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
        few_iterations = mock.patch.object(muon, "ITERATIONS", FEW_ITERATIONS)
        with mock.patch.object(losses, "slabs", few_slabs), few_iterations:
            return train_step(cfg, state, micro_batches)
    return step


def few_slabs(x: torch.Tensor, every: Callable = losses.slabs) -> Iterator[tuple[slice, ...]]:
    """The first three slabs that a loss works in: the others take as much memory as the second one, and of a
    volume of 768^3 there are hundreds."""
    return islice(every(x), 3)


def predicted(cfg: TrainConfig, task: Task, device: torch.device | str) -> peaks.Peak:
    """Of a step of this config, in the tiles that a run on such a device would choose.

    Raises RuntimeError where it cannot be simulated, ValueError where no tiles will do.
    """
    cfg, _ = settled_config(cfg, task, device)
    return peaks.predict(lambda d: make_step(cfg, task, d, rehearsal=True), device)


def predicted_peak(cfg: TrainConfig, task: Task, device: torch.device) -> str:
    """The same as a line; needs no such device."""
    try:
        peak = predicted(cfg, task, device)
    except (RuntimeError, ValueError) as error:
        return f"predicted peak: none, {line_of(error)}"
    if peaks.is_too_large(peak, device):
        return (f"no step on {device.type}: a tensor of {peak.largest:,} elements, and its kernels fail "
                "beyond 2^31; use --memory.mode tile, a smaller --patch or a smaller --batch")
    return f"predicted peak of a step on {device.type}: {peak.bytes / peaks.GIB:.2f} GiB{left_out(device)}"


def left_out(device: torch.device) -> str:
    """What a prediction for such a device does not count, as the end of a line."""
    return f". {' '.join(peaks.LEFT_OUT.split())}" if device.type == "cuda" else ", without kernels' own"


def check_memory(cfg: TrainConfig, task: Task, device: torch.device) -> None:
    """Raises ValueError where a step cannot be: on a CPU one of more memory than the machine has, on a card
    one with a tensor of more than 2^31 elements.

    There the system would end the process in the middle of a step, without a word, and here CUDA's kernels
    fail, or are wrong without a word. Steps that are small for this are not predicted, which would take a
    second or two.
    """
    limit = devices.machine_memory() / ranks.on_this_machine()
    voxels = cfg.train.batch * math.prod(cfg.data.patch)
    if device.type == "cpu":
        is_small = MOST_PER_VOXEL * voxels < limit
    else:
        is_small = widest_of(network_of(cfg, task)) * voxels <= peaks.MOST_ELEMENTS
    if is_small or device.type not in ("cpu", "cuda"):
        return
    try:
        peak = predicted(cfg, task, device)
    except RuntimeError:                      # a step that cannot be simulated is tried
        return
    step = f"a step at {size_text(cfg.data.patch)}, batch {cfg.train.batch}, memory mode {cfg.memory.mode}"
    if device.type == "cpu" and peak.bytes > limit:
        each = f" for each of {ranks.on_this_machine()} processes" if ranks.on_this_machine() > 1 else ""
        raise ValueError(f"{step} is predicted to take {peak.bytes / peaks.GIB:.2f} GiB, and this machine "
                         f"has {limit / peaks.GIB:.2f}{each}; use --fit {limit / peaks.GIB:.2f}, a smaller "
                         "--patch or a smaller --batch")
    if peaks.is_too_large(peak, device):
        raise ValueError(f"{step} has a tensor of {peak.largest:,} elements, and CUDA's kernels fail beyond "
                         "2^31; use --memory.mode tile, a smaller --patch or a smaller --batch")


def widest_of(network: torch.nn.Module) -> int:
    """The most channels that any of its layers has."""
    return max((max(p.shape[:2]) for p in network.parameters() if p.dim() > 1), default=1)


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
    network, size = network_of(cfg, task), cfg.data.patch
    dtype = activations_of(cfg, device, network)
    found = candidates(network, size, cfg.train.batch, dtype, limit * (1 - peaks.SPARE))
    if cfg.memory.tile_parallel:
        found = [memory for memory in found if memory["mode"] == "tile"]

    def step_with(size: Sequence[int], memory: dict) -> Callable:
        chosen = changed(cfg, data={"patch": size}, memory=memory)
        return lambda d: make_step(chosen, task, d, rehearsal=True)
    plan = peaks.plan(step_with, size, limit, found, device)
    text = (f"{plan.bytes / peaks.GIB:.2f} GiB predicted at {size_text(size)}, "
            f"{limit / peaks.GIB:.2f} given, 10 % kept free")
    if not plan.fits:
        raise ValueError(f"--fit: nothing fits: the least is {memory_text(plan.memory)}, {text}; use a "
                         f"smaller --patch or --batch, or --fit {plan.bytes / 0.9 / peaks.GIB:.2f}")
    say(f"--fit: memory mode {memory_text(plan.memory)}: {text}")
    return dataclasses.replace(cfg.memory, **plan.memory)
