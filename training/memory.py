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
from training.plan import budget_of, dial_text, modes_of, network_of, set_dial, settled, smaller
from training.signals import RunStopped
from training.state import State, new_state, quantizer_of
from training.task import Task

# The share of the memory taken now that the next, smaller tile may take.
SMALLER = 0.8


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


def next_dial(cfg: TrainConfig, state: State, shape: Sequence[int]) -> MemoryConfig | None:
    """The dial turned by one notch; None where there is none left.

    shape: (b, C, D, H, W) of what the network is given.
    """
    dial, modes = state.dial, modes_of(state.model)
    if dial.mode == "none" and "checkpoint" in modes:
        return dataclasses.replace(dial, mode="checkpoint")
    if "tile" not in modes:
        return None
    size, batch, network = shape[2:], shape[0], network_of(cfg, state.task)
    if dial.mode == "checkpoint":
        free = dataclasses.replace(dial, mode="tile", tile=None, stretch="auto")
        budget = budget_of(free, state.device)
        return settled(network, free, size, batch, state.activations, budget).dial

    # In tiles already: half their edge, or the plan of least work among those that are predicted to take
    # clearly less.
    if not hasattr(state.model, "tiling"):
        tile = state.model.softer()
        return None if tile is None else dataclasses.replace(dial, tile=tile)
    return smaller(network, dial, size, batch, state.activations, SMALLER)


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
