"""A step of small crops as CUDA graphs: its kernels recorded once, and launched together from then on.

A small step is mostly launching: `fast` on crops of 32,64,64 took 14 ms, of which kernels took 3 (one H200).
A recorded piece of work runs the same kernels on the same memory each time. So nothing in it may be drawn,
read or decided by the host, and all that changes from step to step lies in tensors that stay:

    set       crops, labels, what the task takes from the host (Task.given), the micro-batch's share of the
              step, the loss scale, the clipping limit, the rates
    replayed  1. forward, loss and backward of a micro-batch   -> gradients and terms, added up
              2. norm and clipping                             -> the norm
              3. the optimizer's step                          -> the weights

Between 2 and 3 the host looks whether all is finite, as in every step (step.py), and what else a step does is
as it is there. The first time a piece runs ordinarily, since libraries choose their kernels then; the second
time it is recorded. Micro-batches of another shape, as the last of an epoch, run ordinarily through the
same tensors. Where a step cannot be replayed, the run goes on without and says why, once.

The activations of a recorded micro-batch keep their memory for the whole run: that of a validation comes on
top. Follows: docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs. Version 0.1 (2026-11).
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import tiles
from training import ranks
from training.config import TrainConfig
from training.console import line_of
from training.order import MicroBatch
from training.state import State

Work = Callable[[], None]


# -------------------------------------------------------------------------------- recording

class Recorded:
    """Some work on a CUDA device: run the first time, recorded the second time, replayed ever after.

    stream: beside the ordinary one, as recording wants it. pool: the memory of all recordings of a run, which
    they can share because they are replayed one after another and leave nothing in it.
    """
    def __init__(self, work: Work, stream: torch.cuda.Stream, pool: tuple[int, int]):
        self.work, self.stream, self.pool = work, stream, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.is_warm = False

    def __call__(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.is_warm:
            # Only this thread's mistakes count: the DataLoader's pins memory meanwhile.
            graph, how = torch.cuda.CUDAGraph(), {"capture_error_mode": "thread_local"}
            with torch.cuda.graph(graph, self.pool, self.stream, **how):
                self.work()
            graph.replay()
            self.graph = graph
        else:
            ordinary = torch.cuda.current_stream(self.stream.device)
            self.stream.wait_stream(ordinary)
            with torch.cuda.stream(self.stream):
                self.work()
            ordinary.wait_stream(self.stream)
            self.is_warm = True


# -------------------------------------------------------------------------------- what stays

@dataclass
class Slot:
    """The tensors through which micro-batches of one shape come and their terms go."""
    image: Tensor                             # (b, C, D, H, W)
    label: Tensor | None
    given: tuple[Tensor, ...]                 # Task.given of the micro-batch, on the device
    share: Tensor                             # (): of the step's crops
    scale: Tensor                             # (): of the loss, for gradients of 16 bits; else 1
    terms: dict[str, Tensor] = field(default_factory=dict)  # each (), times share, summed over micro-batches


class Graphs:
    """The recorded pieces of a run's step, and the tensors that they read and write.

    A State holds it where train.cuda_graph asks for graphs; a step asks `reason` whether it can use them.
    recording False: the same steps through the same tensors, but nothing is recorded. So they can be tested
    and predicted without a CUDA device. dtype: of the loss.
    """
    def __init__(self, device: torch.device, recording: bool = True, dtype: torch.dtype = torch.float32):
        self.device, self.recording, self.dtype = device, recording, dtype
        if recording and device.type == "cuda":
            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.threshold, self.norm = self.number(), self.number()
        self.rates: list[Tensor] = []         # one for each group of the optimizer
        self.failed: str | None = None        # why recording failed
        self.told: str | None = None          # the last reason that was said
        self.forget()

    def number(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros((), dtype=dtype or self.dtype, device=self.device)

    def forget(self) -> None:
        """Drop what was recorded: the networks, or what they keep, have changed."""
        self.slots: dict[tuple, Slot] = {}
        self.pieces: dict[tuple | str, Recorded] = {}

    def reason(self, cfg: TrainConfig, state: State) -> str | None:
        """Why a step of this state cannot be replayed; None: it can."""
        reasons = {
            f"CUDA graphs are of CUDA devices, this run is on {self.device.type}":
                self.recording and self.device.type != "cuda",
            "several ranks add up their gradients through the host": ranks.world() > 1,
            "torch.compile has graphs of its own": cfg.train.compile,
            "train.precision master16 moves its gradients": state.masters is not None,
            f"memory mode {state.dial.mode} plans on the host": state.dial.mode != "none",
            "a discriminator or perceptual term sees crops of its own": bool(state.disc or state.perceptual),
            "a codebook collects and counts": state.usage is not None,
            f"--task {state.task.name} draws on the host": state.task.given is None,
        }
        return self.failed or next((text for text, holds in reasons.items() if holds), None)

    def news(self, cfg: TrainConfig, state: State) -> str | None:
        """A line for the user, where a reason against graphs is new."""
        reason = self.reason(cfg, state)
        is_new, self.told = reason not in (None, self.told), reason or self.told
        return f"train.cuda_graph: {reason}; steps run without" if is_new else None

    def run(self, name: tuple | str, work: Work) -> None:
        """`work` by its recording. Where that fails the work is done all the same."""
        if not self.recording or self.failed:
            work()
            return
        if name not in self.pieces:
            self.pieces[name] = Recorded(work, self.stream, self.pool)
        piece = self.pieces[name]
        was_warm = piece.is_warm
        try:
            piece()
        except RuntimeError as error:
            # What went well before does not fail by itself.
            if not was_warm or tiles.is_out_of_memory(error):
                raise
            self.failed = f"a step cannot be recorded ({line_of(error)[:160]})"
            self.pieces.clear()
            work()

    # ---------------------------------------------------------------------------- 1. gradients

    def accumulate(self, cfg: TrainConfig, state: State, micro_batches: Sequence[MicroBatch]
                   ) -> dict[str, Tensor]:
        """step.accumulate: gradients added to the parameters'; the terms, each the mean over the crops."""
        # First from zero, in the gradients of the last step: the recorded work adds to these very tensors.
        state.optimizer.zero_grad(set_to_none=False)
        for slot in self.slots.values():
            for term in slot.terms.values():
                term.zero_()

        # Then each micro-batch through the tensors of its shape.
        total = sum(len(m.image) for m in micro_batches)
        for micro in micro_batches:
            given = state.task.given(cfg, state, micro, micro.generators())
            key = tuple((x.shape, x.dtype) for x in (micro.image, micro.label, *given) if x is not None)
            if key not in self.slots:
                self.slots[key] = self.new_slot(micro, given)
            slot = self.slots[key]
            fill(slot, micro, given)
            slot.share.fill_(len(micro.image) / (micro.crops_in_step or total))
            slot.scale.copy_(state.scaler.scale(torch.ones_like(slot.scale)))
            work = self.gradients_of(cfg, state, slot)
            if len(micro.image) == cfg.train.batch:
                self.run(key, work)
            else:
                work()

        # Then the terms of all shapes.
        sums: dict[str, Tensor] = {}
        for slot in self.slots.values():
            for name, term in slot.terms.items():
                sums[name] = sums.get(name, 0) + term
        return sums

    def new_slot(self, micro: MicroBatch, given: Sequence[Tensor]) -> Slot:
        """Tensors of the same shapes, dtypes and memory formats, on the device."""
        image, *given = (torch.empty_like(x, device=self.device) for x in (micro.image, *given))
        label = None if micro.label is None else torch.empty_like(micro.label, device=self.device)
        return Slot(image, label, tuple(given), self.number(), self.number())

    def gradients_of(self, cfg: TrainConfig, state: State, slot: Slot) -> Work:
        """Forward, loss and backward of what is in the slot, which nothing but the slot goes into."""
        def work() -> None:
            micro = MicroBatch(slot.image, [], [], slot.label, given=slot.given)
            # The network's output is dropped before backward, as in step.accumulate.
            terms = state.task.objective(cfg, state, state.forward, micro, ()).terms
            (terms["loss"] * slot.share * slot.scale).backward()
            for name, term in terms.items():
                if name not in slot.terms:
                    slot.terms[name] = self.number()
                slot.terms[name].add_(term.detach() * slot.share)
        return work

    # ---------------------------------------------------------------------------- 2. norm, 3. update

    def clipped_norm(self, weights: Sequence[Tensor], threshold: float) -> Tensor:
        """clip_grad_norm_: the norm of all gradients, (), which are then clipped to `threshold`."""
        def work() -> None:
            grads = [p.grad for p in weights if p.grad is not None]
            self.norm.copy_(torch.nn.utils.get_total_norm(grads))
            factor = (self.norm + 1e-6).reciprocal() * self.threshold
            torch._foreach_mul_(grads, factor.clamp(max=1.0))
        self.threshold.fill_(threshold)
        self.run("norm", work)
        return self.norm

    def move(self, optimizer: torch.optim.Optimizer) -> None:
        """optimizer.step(), by rates that lie on the device; on a simulated one by numbers, as its kernels
        need.
        """
        is_simulated = not self.recording and self.device.type != "cpu"

        def work() -> None:
            with rates_of(optimizer, () if is_simulated else self.rates):
                optimizer.step()
        # On a CPU the kernels read a rate as float64, so that it is that of the ordinary step.
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self.rates = self.rates or [self.number(dtype) for _ in optimizer.param_groups]
        for rate, group in zip(self.rates, optimizer.param_groups):
            rate.fill_(group["lr"])
        self.run("update", work)


def fill(slot: Slot, micro: MicroBatch, given: Sequence[Tensor]) -> None:
    slot.image.copy_(micro.image)
    if slot.label is not None:
        slot.label.copy_(micro.label, non_blocking=True)
    for static, value in zip(slot.given, given):
        static.copy_(value, non_blocking=True)


@contextlib.contextmanager
def rates_of(optimizer: torch.optim.Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """The optimizer with its rates as tensors, which a recording reads anew each time it is replayed.

    Its own numbers come back afterwards, so that checkpoints hold numbers.
    """
    before = [dict(group) for group in optimizer.param_groups]
    recording = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
    try:
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = recording
        yield
    finally:
        for group, old in zip(optimizer.param_groups, before):
            group |= {name: old[name] for name in ("lr", "capturable") if name in old}


def of(cfg: TrainConfig, device: torch.device, rehearsal: bool = False) -> Graphs | None:
    """The graphs of a run; None without train.cuda_graph, whose auto is off until it was measured on a card.

    rehearsal: of a prediction, whose tensors have no data.
    """
    return Graphs(device, recording=not rehearsal) if cfg.train.cuda_graph else None
