"""Out of memory: the dial, and how a step survives it.

The dial is the section `memory` of the config. Mode none keeps what backward needs, checkpoint computes
blocks again, tile computes exact tiles. All give the same result, so the dial may be turned in the middle of
a run. The config keeps what the user asked for; State.dial is what holds now.

How a run survives: `with_recovery` is around whatever may run out of memory (a step, a validation crop). When
it does, on any rank,

    1. the failed work is left, so that nothing keeps its tensors alive,
    2. the dial is turned by one notch: none -> checkpoint -> tile -> a tile that is predicted to take at most
       4/5 of the memory,
    3. the change is told (console, log.jsonl, config.yaml),
    4. what the failed work had begun is dropped: gradients, collected latents, the loss scaler's marks,
    5. the same work is done again, with the same crops and the same noise.

Optimizer, batch and resolution are never touched. All ranks turn their dials together. Where the dial has no
notch left, or the weights were being written, the run stops in one line, with its last checkpoint as it is.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import dataclasses
import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch

import tiles
from training import graphs, ranks
from training.config import MemoryConfig, TrainConfig
from training.signals import RunStopped
from training.state import State, new_state, quantizer_of
from training.task import Task

# The share of the memory taken now that the next, smaller tile may take.
SMALLER = 0.8
MODES = ("none", "checkpoint", "tile")


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


def begin(
    cfg: TrainConfig, task: Task, device: torch.device, features: dict | None = None, rehearsal: bool = False
) -> State:
    """state.new_state with the config's dial put on its networks."""
    state = new_state(cfg, task, device, features)
    state.graphs = graphs.of(cfg, device, rehearsal)
    turn_dial(state, cfg.memory, rehearsal)
    return state


def turn_dial(state: State, dial: MemoryConfig, rehearsal: bool = False) -> None:
    """Put the dial on all networks of a run."""
    state.dial = dial
    if state.graphs is not None:
        state.graphs.forget()
    for network in (state.model, *state.emas):
        set_dial(network, dial, rehearsal)


def settled(cfg: TrainConfig, state: State, dial: MemoryConfig, shape: Sequence[int]) -> MemoryConfig:
    """The dial with what it leaves to `auto` chosen for good.

    On CUDA the choice depends on the free memory, on which a resumed run must not depend.
    shape: (b, C, D, H, W) of what the network is given.
    """
    if dial.mode != "tile" or (dial.tile is not None and dial.stretch != "auto"):
        return dial
    if not hasattr(state.model, "tiling"):
        return dial
    planner = set_dial(state.task.build(cfg), dial)
    plan = planner.tiling().plan(shape[2:], shape[0], state.activations, state.device)
    return dataclasses.replace(dial, tile=plan.tile, stretch=plan.stretch)


def next_dial(cfg: TrainConfig, state: State, shape: Sequence[int]) -> MemoryConfig | None:
    """The dial turned by one notch; None where there is none left."""
    dial, modes = state.dial, modes_of(state.model)
    if dial.mode == "none" and "checkpoint" in modes:
        return dataclasses.replace(dial, mode="checkpoint")
    if "tile" not in modes:
        return None
    free = dataclasses.replace(dial, mode="tile", tile=None, stretch="auto")
    if dial.mode == "checkpoint":
        return settled(cfg, state, free, shape)

    # In tiles already: half their edge, or the plan of least work among those that are predicted to take
    # clearly less.
    batch, size = shape[0], shape[2:]
    if not hasattr(state.model, "tiling"):
        tile = state.model.softer()
        return None if tile is None else dataclasses.replace(dial, tile=tile)
    now = state.model.tiling().plan(size, batch, state.activations, state.device).peak_bytes
    plans = set_dial(state.task.build(cfg), free).tiling().plans(size, batch, state.activations)
    smaller = [plan for plan in plans if plan.peak_bytes <= SMALLER * now]
    if not smaller:
        return None
    return dataclasses.replace(free, tile=smaller[0].tile, stretch=smaller[0].stretch)


def dial_text(dial: MemoryConfig) -> str:
    if dial.mode != "tile":
        return dial.mode
    tile = "auto" if dial.tile is None else ",".join(map(str, dial.tile))
    return f"tile {tile}, stretch {dial.stretch}"


# -------------------------------------------------------------------------------- recovery

def with_recovery(
    cfg: TrainConfig, state: State, shape: Sequence[int], note: Callable[[str], None], work: Callable[[], Any]
) -> Any:
    """work(), and after an out-of-memory the same again with the dial turned by one notch.

    shape: (b, C, D, H, W) of what the network is given. `note` is told of each change. Raises RunStopped
    when there is no notch left.

    The ranks turn the dial together, so each must call this alike, and `work` must end with ranks.agreed, or
    have it inside. With memory.tile_parallel it is tiles.together that carries one rank's failure to the
    others.
    """
    while True:
        scaler = state.scaler.state_dict()
        try:
            with shared_failure(state):
                return work()
        # torch.OutOfMemoryError is a RuntimeError; the CPU's allocator raises a plain one.
        except RuntimeError as error:
            if not state.dial.recover or not tiles.is_out_of_memory(error):
                raise
            if state.updating:
                raise RunStopped("out of memory while the weights were being updated, at "
                                 f"{dial_text(state.dial)}; go on from last.pt, with the next "
                                 "--memory.mode") from None
            where = ranks.ran_out(error)

        # What follows stands outside of the except clause, where the traceback would keep the tensors of the
        # failed step alive. First turn the dial, by the free memory of the rank that ran out, and tell it.
        softer = ranks.chosen(where, lambda: next_dial(cfg, state, shape))
        if softer is None:
            raise RunStopped(f"out of memory at {dial_text(state.dial)}, the last step of the dial; use a "
                             f"smaller --patch or --batch (more --accum keeps the effective batch)")
        change = f"{dial_text(state.dial)} -> {dial_text(softer)}"
        turn_dial(state, softer)
        note(f"step {state.step + 1}: out of memory, memory dial {change}; the step is repeated")

        # Then drop what the failed work had begun. The loss scaler is made anew, in the state from before:
        # the old one may have marked gradients as unscaled already.
        for holder in (state.optimizer, state.disc_optimizer, state.model):
            if holder is not None:
                holder.zero_grad(set_to_none=True)
        if quantizer_of(state.model) is not None:
            state.model.quantizer.collected = []
        fresh = torch.amp.GradScaler(state.device.type, enabled=state.scaler.is_enabled())
        fresh.load_state_dict(scaler)
        state.scaler = fresh
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def shared_failure(state: State) -> contextlib.AbstractContextManager:
    """With memory.tile_parallel what fails on one rank inside raises on all."""
    return tiles.together(getattr(state.model, "group", None), next(state.model.parameters()))
