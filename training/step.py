"""One optimizer step: forward, loss and backward of each micro-batch, then one update of everything.

The task says what the loss is (its `objective`); a discriminator, where there is one, adds its terms
(adversary.py). With train.cuda_graph its heavy parts are replayed (graphs.py). Which crops come in, and the
random numbers, are given (order.py). Recovery from out of memory is around this (memory.py).
Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training import adversary, memory, ranks
from training.config import OptimConfig, TrainConfig
from training.forward import scaled
from training.order import MicroBatch, seed_of
from training.state import State, quantizer_of, running_statistics


class StepResult(NamedTuple):
    terms: dict[str, Tensor]                  # each () on the CPU, the mean over the step's crops
    norm: Tensor                              # () on the CPU, of the gradient before clipping
    updated: bool                             # False: something was not finite, the weights are as before


def train_step(cfg: TrainConfig, state: State, micro_batches: Sequence[MicroBatch]) -> StepResult:
    """One update of the network, and of the discriminator where there is one.

    Peak memory is one micro-batch's: no graph outlives its backward(). Each micro-batch counts by its number
    of crops, so that k of them equal one batch, also where the last one is short. (loss.adaptive_weight is
    the exception: it is a ratio that each micro-batch has of its own.)

    Weights, codebook and averages change only after all is known to be finite. What the forward pass moves,
    the running statistics of batch norm, is put back where the step fails.
    """
    with statistics_put_back(state.model) as failed:
        gan = adversary.is_judging(cfg, state)
        replayed = state.graphs is not None and state.graphs.reason(cfg, state) is None
        optimizers = [state.optimizer]
        if gan:
            optimizers.append(state.disc_optimizer)

        # First the gradients: every micro-batch adds its own, and the ranks add up theirs.
        if replayed:
            terms, usage = state.graphs.accumulate(cfg, state, micro_batches), None
        else:
            forget_gradients(state, optimizers)
            terms, usage = accumulate(cfg, state, micro_batches, gan)
        terms = reduced(state, gan, terms, usage)

        # Then their norm, in true units and clipped, and whether anything is not finite. Loss and norm are
        # both looked at: the gradient of |NaN| is zero, so the norm alone would miss it.
        unscale(state, optimizers)
        clip = state.graphs.clipped_norm if replayed else torch.nn.utils.clip_grad_norm_
        norm = clip(state.weights, clip_threshold(cfg.optim, state.norms))
        total = norm + terms["loss"]
        if gan:
            # Its own limit: clipped at the network's, every weight of R1 would give the same step.
            threshold = cfg.loss.disc_grad_clip or math.inf
            disc_norm = torch.nn.utils.clip_grad_norm_(state.disc.parameters(), threshold)
            total = total + terms["disc"] + disc_norm
        # Here the host waits for the device, and nowhere else in a step: what the log needs comes along.
        *values, norm, total = on_host([*terms.values(), norm, total])
        updated = bool(torch.isfinite(total))

        # Then the update, of everything or of nothing.
        if updated:
            move_weights(state, optimizers, replayed)
            update_the_rest(cfg, state, gan, terms, usage, float(norm))

        # Last the scales of 16 bits: lower after a step that was not finite.
        if state.masters is not None:
            state.masters.adapt(updated)
        if any(has_gradients(optimizer) for optimizer in optimizers):
            state.scaler.update()
        state.updating = False
        failed.value = not updated
    return StepResult(dict(zip(terms, values)), norm, updated)


# -------------------------------------------------------------------------------- gradients

def forget_gradients(state: State, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Drop all gradients, and what a step that ran out of memory had begun."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    # The optimizer of 16-bit weights holds their float32 masters, not the weights themselves.
    state.model.zero_grad(set_to_none=True)
    if quantizer_of(state.model) is not None:
        state.model.quantizer.collected = []


def accumulate(
    cfg: TrainConfig, state: State, micro_batches: Sequence[MicroBatch], gan: bool
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Add the gradients of all micro-batches to those of the parameters.

    Returns the terms, each the mean over the crops, and how often each code was chosen, (K,).
    """
    total = sum(len(m.image) for m in micro_batches)
    sums: dict[str, Tensor] = {}
    usage = None if state.usage is None else torch.zeros_like(state.usage)
    for micro in micro_batches:
        share = len(micro.image) / (micro.crops_in_step or total)
        generators = micro.generators()

        # First the network's loss and its gradient. There is none where a codebook learns by averages alone.
        out, terms, crops = state.task.objective(cfg, state, state.forward, micro, generators)
        # Of the output backward needs no more than the graph has: a reconstruction is as large as its volume.
        index = None if usage is None else out.index
        del out
        if gan:
            adversary.generator_terms(cfg, state, crops, terms)
        if terms["loss"].requires_grad:
            scaled(state, terms["loss"] * share).backward()

        # Then the discriminator's, on crops through which no gradient reaches the network.
        if gan:
            crops = [crop.detach() for crop in crops]
            critic = adversary.discriminator_terms(cfg, state, crops)
            scaled(state, critic["disc"] * share).backward()
            terms |= critic

        # Then the sums for the log. They stay on the device: reading them would wait for it each time.
        if usage is not None:
            index = state.model.quantizer.numbered(index).flatten()
            chosen = torch.zeros_like(usage).scatter_add_(0, index, torch.ones_like(index))
            usage = usage + chosen
        for name, term in terms.items():
            sums[name] = sums.get(name, 0) + term.detach() * share
        # The next forward must not find this graph alive.
        del terms, crops
    return sums, usage


def reduced(state: State, gan: bool, terms: dict[str, Tensor], usage: Tensor | None) -> dict[str, Tensor]:
    """Add up over the ranks, once all of them have theirs: gradients and codebook usage in place, and terms.

    Each rank then clips, decides and updates by the same numbers. Only what a forward pass moves is each
    rank's own, and averaged in the update: the running statistics of batch norm, the vectors of spectral
    norm.
    """
    if ranks.workers() == 1:
        # With memory.tile_parallel every rank has the whole gradients already, but none may update before
        # all have got so far: here a failure of one is raised on all.
        with memory.shared_failure(state):
            pass
        state.updating = ranks.world() > 1
        return terms

    # The rows are made before the ranks agree: a rank may still run out of memory by them.
    parameters = list(state.model.parameters())
    if gan:
        parameters += state.disc.parameters()
    gradients = ranks.Gradients(parameters)
    ranks.agreed()
    # From here on a rank that runs out of memory cannot have the others repeat the step.
    state.updating = True
    gradients.add_up()
    if usage is not None:
        ranks.add_up(usage)
    return ranks.summed(terms, state.device)


def has_gradients(optimizer: torch.optim.Optimizer) -> bool:
    for settings in optimizer.param_groups:
        if any(p.grad is not None for p in settings["params"]):
            return True
    return False


def unscale(state: State, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Bring all gradients to true units, which the limits of clipping are in."""
    if state.masters is not None:
        state.masters.take_gradients()
        if len(optimizers) > 1:
            state.masters.unscale(state.disc.parameters())
    for optimizer in optimizers:
        if has_gradients(optimizer):
            state.scaler.unscale_(optimizer)


def on_host(numbers: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """() tensors on the CPU, by one copy from the device. Of different dtypes they take the widest."""
    # The norm is on the CPU where there was no gradient at all.
    device = numbers[-1].device
    return torch.stack([n.to(device, non_blocking=True) for n in numbers]).cpu().unbind()


def clip_threshold(o: OptimConfig, norms: Sequence[float]) -> float:
    """optim.grad_clip, or the percentile of the last norms where that is lower.

    The percentile counts once there are optim.clip_window norms.
    """
    fixed = o.grad_clip or math.inf
    if not o.clip_percentile or len(norms) < o.clip_window:
        return fixed
    last = torch.tensor(norms, dtype=torch.float64)
    return min(fixed, float(last.quantile(o.clip_percentile / 100)))


# -------------------------------------------------------------------------------- update

def move_weights(state: State, optimizers: Sequence[torch.optim.Optimizer], replayed: bool) -> None:
    """From the first weight on the step cannot be repeated. The gradients are unscaled and finite:
    scaler.step() would only read that from the device once more.
    """
    for optimizer in optimizers:
        if has_gradients(optimizer):
            if replayed:
                state.graphs.move(optimizer)
            else:
                optimizer.step()
            state.updating = True
    if state.masters is not None:
        state.masters.give_weights()


def update_the_rest(
    cfg: TrainConfig,
    state: State,
    gan: bool,
    terms: dict[str, Tensor],
    usage: Tensor | None,
    norm: float,
) -> None:
    """What follows the weights: running statistics, codebook, averages."""
    # First what the forward passes moved, and the codebook, by the latents that they collected.
    ranks.average(running_statistics(state.model))
    if gan:
        ranks.average(running_statistics(state.disc))
    if usage is not None:
        generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "codebook", state.step))
        state.model.quantizer.update(generator)
        state.usage += usage
    if state.lecam is not None and gan:
        state.lecam.update(terms["logits_real"], terms["logits_fake"])

    # Then the averages of the weights, whose decay rises with the step so that the start is forgotten:
    # min(decay, (1 + step) / (10 + step)).
    for ema, decay in zip(state.emas, cfg.train.ema):
        update_ema(ema, state, min(decay, (1 + state.step) / (10 + state.step)))
    if cfg.optim.clip_percentile:
        state.norms = [*state.norms, norm][-cfg.optim.clip_window:]


class Outcome:
    """Of what is tried: failed until it says otherwise."""
    value = True


@contextlib.contextmanager
def statistics_put_back(model: torch.nn.Module) -> Iterator[Outcome]:
    """Restore the network's buffers, but for the codebook's, where the step fails.

    It fails by an exception, or where the Outcome that is handed out says so.
    """
    buffers = running_statistics(model)
    before, failed = [b.clone() for b in buffers], Outcome()
    try:
        yield failed
    finally:
        if failed.value:
            for buffer, value in zip(buffers, before):
                buffer.copy_(value)


# -------------------------------------------------------------------------------- private calls of torch

@torch.no_grad()
def update_ema(ema: torch.nn.Module, state: State, decay: float) -> None:
    """ema = decay * ema + (1 - decay) * weights; buffers (codebooks, running statistics) are copied.

    One kernel for all parameters. A torch without this call raises AttributeError here; then write

        for old, new in zip(ema.parameters(), state.weights):
            old.lerp_(new.detach(), 1 - decay)
    """
    torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in state.weights], 1 - decay)
    for old, new in zip(ema.buffers(), state.model.buffers()):
        old.copy_(new)
