"""The dial of memory: what a network has of it, and what it leaves to `auto`, chosen.

The choice is one function, TileMode.plan (tile_plans.py) of network, size, batch, precision and budget. Who
asks stands here, and asks by `settled`: a run, before its first step; a prediction (dry run, memtest); --fit,
whose tiles are tried in the order of the same plans; a run out of memory. predict.py has the function itself
asked for each volume (`for_volumes`). Budgets are one function too, `budget_of`:

    1. memory.budget, or the budget of a command that plans for a card,
    2. else, on a card, what it has free, less a tenth,
    3. else none: the least memory whose step takes at most 1.4 times as long as a checkpointed one.

No tensor of more than 2^31 elements is planned; `check_elements` looks at the modes without a plan.
Sizes are D,H,W. Memory is in bytes, in GiB where it is shown. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

import tile_plans
from peaks import GIB, SPARE
from training import ranks
from training.config import MemoryConfig, TrainConfig
from training.devices import pick_precision
from training.task import Task

MODES = ("none", "checkpoint", "tile")
CUBES = (128, 64, 32, 16, 8)                  # edges of tiles for a network of points, voxels
BUDGET = 4.0                                  # GiB for which tiles of whole volumes are chosen in use, the
                                              # same whoever chooses


# -------------------------------------------------------------------------------- the dial

def modes_of(network: torch.nn.Module) -> tuple[str, ...]:
    """The settings of the dial that a network has.

    Exact tiles where it can plan them, checkpoints where it has a dial at all.
    """
    if hasattr(network, "tiling") or hasattr(network, "softer"):
        return MODES
    if hasattr(network, "memory"):
        return MODES[:2]
    return MODES[:1]


def set_dial(network: torch.nn.Module, dial: MemoryConfig, rehearsal: bool = False) -> torch.nn.Module:
    """Put the dial on a network. Raises ValueError for a mode that it does not have.

    rehearsal: for memory prediction, see vae3d.VAE3D.memory.
    With memory.tile_parallel every rank takes the same micro-batches with the same noise (the global batch
    is batch x accum), and backward() leaves the whole gradients on each, so that a step adds up neither
    gradients nor terms over the ranks.
    """
    modes = modes_of(network)
    if len(modes) == 1 and dial.mode != "none":
        raise ValueError(f"memory.mode={dial.mode}: this network has no memory dial; leave it at none")
    if len(modes) == 1:
        return network
    if "tile" not in modes:
        return network.memory(dial.mode)
    if not hasattr(network, "tiling"):
        return network.memory(dial.mode, dial.tile, dial.tiles)
    dist, group = torch.distributed, None
    if dial.tile_parallel and dist.is_available() and dist.is_initialized():
        group = dist.group.WORLD
    return network.memory(dial.mode, dial.tile, dial.stretch, dial.budget, group, rehearsal)


def dial_text(dial: MemoryConfig) -> str:
    if dial.mode != "tile":
        return dial.mode
    return f"tile {tile_text(dial.tile)}, stretch {dial.stretch}"


def tile_text(tile: Sequence[int] | None) -> str:
    return "auto" if tile is None else ",".join(map(str, tile))


# -------------------------------------------------------------------------------- budgets

class Budget(NamedTuple):
    """What a step may take, and why."""
    bytes: float | None                       # None: no budget
    why: str


NO_BUDGET = Budget(None, f"the least memory at {tile_plans.WORK_BOUND:g} times the time of a checkpointed "
                         "step")


def budget_of(dial: MemoryConfig, device: torch.device | str, given: Budget | None = None) -> Budget:
    """For a step on `device`, which may be a card that is not here.

    given: of a command that plans for a card; memory.budget comes before it. With memory.tile_parallel all
    ranks must call this, and the least that one of their cards has free decides.
    """
    if dial.budget is not None:
        return Budget(dial.budget * GIB, f"memory.budget {dial.budget:g} GiB")
    if given is not None:
        return given
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        return NO_BUDGET
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return of_card(-ranks.largest(-float(free)) if dial.tile_parallel else float(free), "the card has free")


def of_card(memory: float, whose: str) -> Budget:
    """Of so many bytes a tenth stays free, for what predictions leave out."""
    return Budget(memory * (1 - SPARE), f"{memory * (1 - SPARE) / GIB:.2f} GiB, {100 * (1 - SPARE):.0f} % of "
                                        f"what {whose}")


# -------------------------------------------------------------------------------- what auto comes to

class Settled(NamedTuple):
    """A dial with nothing left to `auto`, and a line about the choice; None where nothing was left."""
    dial: MemoryConfig
    text: str | None


def is_open(dial: MemoryConfig) -> bool:
    """Whether the dial leaves tiles to `auto`."""
    return dial.mode == "tile" and (dial.tile is None or dial.stretch == "auto")


def settled(network: torch.nn.Module, dial: MemoryConfig, size: Sequence[int], batch: int, dtype: torch.dtype,
            budget: Budget = NO_BUDGET) -> Settled:
    """The dial with what it leaves to `auto` chosen for good, by TileMode.plan within `budget`.

    network: of the run, without weights will do; its own dial is turned. dtype: of the activations. With a
    tile that is given the plan of least memory is taken, whatever the budget. Raises ValueError where every
    plan has a tensor of more than 2^31 elements.
    """
    if not is_open(dial) or not hasattr(network, "tiling"):
        return Settled(dial, None)
    # A tile that is given is not measured by the card: what is asked for is less memory.
    why, within = budget.why, dial.budget
    if dial.tile is None and budget.bytes is not None:
        within = budget.bytes / GIB
    elif dial.tile is not None and within is None:
        why = "the least memory with this tile"
    planner = set_dial(network, dataclasses.replace(dial, budget=within))
    plan = planner.tiling().plan(size, batch, dtype)
    found = dataclasses.replace(dial, tile=plan.tile, stretch=plan.stretch)
    return Settled(found, f"{dial_text(dial)} -> {dial_text(found)}: planned for {why}; about "
                          f"{plan.peak_bytes / GIB:.2f} GiB, {plan.work:.2f} times a checkpointed step")


def settled_config(cfg: TrainConfig, task: Task, device: torch.device | str,
                   given: Budget | None = None) -> tuple[TrainConfig, str | None]:
    """The same of a config, for its own crops on `device`; and the line about it."""
    if not is_open(cfg.memory):
        return cfg, None
    network = network_of(cfg, task)
    dtype = activations_of(cfg, torch.device(device), network)
    found = settled(network, cfg.memory, cfg.data.patch, cfg.train.batch, dtype,
                    budget_of(cfg.memory, device, given))
    return dataclasses.replace(cfg, memory=found.dial), found.text


def for_volumes(network: torch.nn.Module, tile: Sequence[int] | str = "auto", budget: float = BUDGET
                ) -> torch.nn.Module:
    """A network in use takes exact tiles. tile: D,H,W, `auto` or `none`; budget: GiB, for `auto`.

    TileMode.plan chooses anew for each size of a volume. It counts a training step, more than inference
    takes. Its choice depends on nothing of the machine, so that every run, and `decode` after `encode`,
    computes the same bits.
    """
    if tile == "none":
        return set_dial(network, MemoryConfig())
    if tile == "auto":
        return set_dial(network, MemoryConfig("tile", budget=budget))
    return set_dial(network, MemoryConfig("tile", tile))


def tiles_used(network: torch.nn.Module) -> str:
    """The tiles that a network in use took last, as the end of a line; "" where it took none."""
    plan = getattr(getattr(network, "tile_mode", None), "used", None)
    return "" if plan is None else f", tiles of {tile_text(plan.tile)}"


def network_of(cfg: TrainConfig, task: Task) -> torch.nn.Module:
    """Without weights, to count or to plan."""
    with torch.device("meta"):
        return task.build(cfg)


def activations_of(cfg: TrainConfig, device: torch.device, network: torch.nn.Module) -> torch.dtype:
    """What the network of a run computes in."""
    if cfg.train.precision == "master16":
        return torch.float16
    return pick_precision(cfg.train.amp, device, network)[0] or torch.float32


# -------------------------------------------------------------------------------- settings to choose from

def candidates(network: torch.nn.Module, size: Sequence[int], batch: int, dtype: torch.dtype,
               limit: float = math.inf, most_work: float = math.inf) -> list[dict]:
    """Fields of section `memory` for peaks.plan, by rising recomputation: none, checkpoint, then tile plans.

    The first of the tile plans is what `auto` comes to for a budget of `limit` bytes; the others, of more
    work, are for a step that takes more than the plan's estimate. Where none is within the limit: the one of
    least memory. most_work: over a checkpointed step's; plans above it are left out.
    """
    modes = modes_of(network)
    found = [{"mode": mode} for mode in modes if mode != "tile"]
    if "tile" in modes and not hasattr(network, "tiling"):
        # Points have no estimate of their own: cubes by falling size, each of which is predicted.
        found += [{"mode": "tile", "tile": (edge, edge, edge)} for edge in CUBES if edge < max(size)]
    elif "tile" in modes:
        plans = tile_plans_of(network, size, batch, dtype)
        plans = [plan for plan in plans if plan.work <= most_work] or plans[:1]
        fitting = [plan for plan in plans if plan.peak_bytes <= limit] or plans[-1:]
        found += [{"mode": "tile", "tile": plan.tile, "stretch": plan.stretch} for plan in fitting]
    return found


def tile_plans_of(network: torch.nn.Module, size: Sequence[int], batch: int, dtype: torch.dtype
                  ) -> list[tile_plans.TilePlan]:
    """All plans by rising work; [] where each has a tensor that is too large."""
    try:
        return set_dial(network, MemoryConfig("tile")).tiling().plans(size, batch, dtype)
    except ValueError:
        return []


def smaller(network: torch.nn.Module, dial: MemoryConfig, size: Sequence[int], batch: int, dtype: torch.dtype,
            share: float) -> MemoryConfig | None:
    """Of a dial in tiles the plan of least work that is estimated to take at most `share` of what it takes;
    None where there is none.
    """
    now = set_dial(network, dial).tiling().plan(size, batch, dtype).peak_bytes
    for plan in tile_plans_of(network, size, batch, dtype):
        if plan.peak_bytes <= share * now:
            return dataclasses.replace(dial, tile=plan.tile, stretch=plan.stretch)
    return None
