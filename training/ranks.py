"""The processes of one run, as torchrun starts them: how they begin, agree, add up, and end together.

There is no DistributedDataParallel here. It reduces in the backward pass of one module, but a step has two
networks, several backward passes, recomputed and tiled ones, and micro-batches that only count together.
So gradients are added up once an optimizer step, after the last backward: accumulation costs no
communication, and any way of computing a gradient works. Each micro-batch is weighted by its share of all
crops of the step, so that the sum over the ranks is the gradient that one process would have. The price is
one more copy of the gradients for a moment, and no communication during the backward pass.

Small messages go over gloo between the CPUs, which notice at once when a rank is gone; tensors on a GPU go
over NCCL. With one process nothing here does anything. Needs torch alone. Version 0.1 (2026-11).
"""
from __future__ import annotations

import contextlib
import datetime
import importlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

# The longest that a rank waits for another, such as for that one's part of the cache.
TIMEOUT = datetime.timedelta(minutes=30)
# Seconds that the first rank waits for the others at the end.
LEAVING = 5.0
Value = TypeVar("Value")
# What this process knows of itself, while there are several: `local`, its number on its machine; `store`,
# where the processes leave words; `alike`, see below; `store_lost`, that the store's process is gone.
_here: dict = {}


class CannotStart(RuntimeError):
    """The processes do not find each other."""


class Elsewhere(RuntimeError):
    """Another rank has failed and says why; this one ends without a word, with exit_code()."""


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another rank ran out of memory, so that this one turns its dial too."""
    def __init__(self, ranks: list[int]):
        super().__init__(f"out of memory on rank {ranks[0]}")
        self.ranks = ranks


# -------------------------------------------------------------------------------- begin and end

@contextlib.contextmanager
def started(number: int, of: int, local: int = 0) -> Iterator[None]:
    """Process `number` of `of`, the `local`-th of its machine. Only the first prints.

    MASTER_ADDR and MASTER_PORT of the environment say where the processes meet. Raises CannotStart.

    At the end SIGTERM is ignored: torchrun sends it to the others as soon as one process has left, and they
    are leaving already. Without torchrun the first process is host to the store, in which the others look
    who speaks, so it leaves last, unless one of them is gone.
    """
    if of == 1:
        yield
        return

    # First the processes meet. The module is imported before: the first optimizer would import it later,
    # and what its functions take as defaults then would keep the process group alive.
    importlib.import_module("torch.distributed.nn")
    backend = "cpu:gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, *_ = next(iter(dist.rendezvous("env://", number, of, timeout=TIMEOUT)))
        meeting = dist.PrefixStore("ranks", store)
        dist.init_process_group(backend, store=meeting, rank=number, world_size=of, timeout=TIMEOUT)
    except (ValueError, RuntimeError) as error:
        lines = str(error).splitlines() or [""]
        raise CannotStart(f"the {of} processes do not meet: {lines[0]}; start them with torchrun, or unset "
                          "WORLD_SIZE for one process") from None
    _here.update(local=local, store=dist.PrefixStore("words", store))

    # Then the work, with the standard output of the first process alone.
    try:
        with open(os.devnull, "w") as nowhere:
            with contextlib.redirect_stdout(sys.stdout if first() else nowhere):
                yield

    # Then they part. Whoever still waits for this process notices that the process group is gone.
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()
        # Under torchrun its agent is host to the store, and nobody has to wait.
        if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and not _here.get("store_lost"):
            leave_last(number, of)
        _here.clear()


def leave_last(number: int, of: int) -> None:
    """The first process waits for the others, at most LEAVING seconds: it may not know that one is gone."""
    store, until = _here["store"], time.monotonic() + LEAVING
    with contextlib.suppress(RuntimeError):
        if store.add("left", 1) == of:
            store.set("all left", "")
        # Asked again and again, since store.wait() prints when its time is up.
        while number == 0 and not store.check(["all left"]) and time.monotonic() < until:
            time.sleep(0.02)


# -------------------------------------------------------------------------------- who is who

def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if _here else 1


def alike(yes: bool) -> None:
    """From here on all ranks do the same work, on the same crops.

    Nothing is shared out, gathered or added up then, but the ranks still end together. This is for
    memory.tile_parallel, which shares what is inside that work (vae3d.py), with its own agreements.
    """
    if _here:
        _here["alike"] = yes


def workers() -> int:
    """Ranks among which the crops are shared."""
    return 1 if _here.get("alike") else world()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if _here else 0


def local_rank() -> int:
    """Place among the processes of this machine: the GPU to take."""
    return _here.get("local", 0)


def on_this_machine() -> int:
    """Number of processes here, as torchrun says."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world())) if world() > 1 else 1


def first() -> bool:
    """True in the process that writes and prints."""
    return rank() == 0


# -------------------------------------------------------------------------------- one error, one line

def place() -> str:
    """Who is speaking, for the start of an error's line; nothing where there is one process."""
    return f"rank {rank()} on {socket.gethostname()}: " if world() > 1 else ""


def speaks(code: int) -> bool:
    """True in the first process that has an error to tell. All ranks then end with its code.

    However many notice that something is wrong, the user reads one line.
    """
    if world() == 1:
        return True
    try:
        if _here["store"].add("speakers", 1) > 1:
            return False
        _here["store"].set("code", str(code))
    # The store is gone with the process that was host to it, so this one cannot know of others.
    except RuntimeError:
        _here["store_lost"] = True
    return True


def exit_code(default: int) -> int:
    """The code of the rank that told its error, once it has; default: where none does within 30 s."""
    try:
        _here["store"].wait(["code"], datetime.timedelta(seconds=30))
        return int(_here["store"].get("code"))
    except RuntimeError:
        return default


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone, or does not answer."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


# -------------------------------------------------------------------------------- agree

def shared(count: int) -> range:
    """Which of `count` pieces are this rank's.

    They lie side by side, so that what is gathered in the order of the ranks is in the order of the pieces.
    """
    if workers() == 1:
        return range(count)
    # Of R ranks, rank r takes the pieces from ceil(count r / R) up to ceil(count (r + 1) / R).
    begin = -(-count * rank() // world())
    end = -(-count * (rank() + 1) // world())
    return range(begin, end)


def together(work: Callable[[], Value]) -> Value:
    """work() on every rank.

    Where it fails on some of them, the lowest of these raises its error and all others raise Elsewhere.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as caught:
        if world() == 1:
            raise
        error = caught
    failed = _ranks_with(error is not None)
    if failed and failed[0] == rank():
        raise error
    if failed:
        raise Elsewhere()
    return value


def from_rank(source: int, work: Callable[[], Value]) -> Value:
    """work() of one rank, on all of them.

    Where it fails, that rank raises its error and all others raise Elsewhere.
    """
    if world() == 1:
        return work()
    box = [together(lambda: work() if rank() == source else None)]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def chosen(source: int, work: Callable[[], Value]) -> Value:
    """from_rank(); but where all ranks do the same work, and agree inside it, every rank's own work()."""
    return together(work) if _here.get("alike") else from_rank(source, work)


def agreed(value: Value = None) -> Value:
    """`value`, once every rank has got so far.

    Raises OutOfMemoryElsewhere where one of the ranks calls ran_out() instead.
    """
    short = _ranks_with(False) if workers() > 1 else []
    if short:
        raise OutOfMemoryElsewhere(short)
    return value


def ran_out(error: RuntimeError) -> int:
    """Tell the others of an out-of-memory, unless they told this rank. Returns the lowest rank that had it.
    """
    if isinstance(error, OutOfMemoryElsewhere):
        return error.ranks[0]
    short = _ranks_with(True)
    return short[0] if short else 0


def _ranks_with(something: bool) -> list[int]:
    """The ranks that call this with True, once all have called it; [] of one process."""
    if world() == 1:
        return []
    marks = torch.zeros(world(), dtype=torch.uint8)
    marks[rank()] = something
    dist.all_reduce(marks)
    return marks.nonzero()[:, 0].tolist()


def barrier() -> None:
    """Returns once every rank has come here."""
    _ranks_with(False)


# -------------------------------------------------------------------------------- add up

def largest(value: float) -> float:
    """The largest value of any rank."""
    if world() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def gathered(rows: list) -> list:
    """The plain values of all ranks that had a share of the work, in the order of the ranks."""
    return rows if workers() == 1 else of_every_rank(rows)


def of_every_rank(rows: list) -> list:
    """The same, also where all ranks do the same work."""
    if world() == 1:
        return rows
    every: list = [None] * world()
    dist.all_gather_object(every, rows)
    return [row for part in every for row in part]


def summed(terms: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Scalars by name, added up in the order of the ranks.

    A rank without micro-batches has no terms and receives those of the others.
    """
    if workers() == 1:
        return terms
    mine = []
    if terms:
        mine.append((list(terms), torch.stack(list(terms.values())).cpu()))
    every = gathered(mine)
    names, total = every[0][0], sum(values for _, values in every)
    return dict(zip(names, total.to(device)))


def add_up(counts: Tensor) -> Tensor:
    """The sum over the ranks, in place."""
    if workers() > 1:
        dist.all_reduce(counts)
    return counts


def average(buffers: Sequence[Tensor]) -> None:
    """In place: floating-point buffers become their mean over the ranks, counters their largest."""
    if workers() == 1:
        return
    for buffer in buffers:
        box = buffer.contiguous()
        if box.is_floating_point():
            dist.all_reduce(box, dist.ReduceOp.SUM)
            box = box / world()
        else:
            dist.all_reduce(box, dist.ReduceOp.MAX)
        buffer.copy_(box)


class Gradients:
    """The gradients of some parameters, to be added up over the ranks by one all-reduce for each dtype.

    All gradients of a dtype stand in one row, and behind them one number for each parameter: 1 where this
    rank has a gradient of it, so after the sum how many ranks have one. A rank without micro-batches
    contributes zeros, and a parameter without gradient on all ranks has none afterwards.

    Made before the ranks agree, since it takes memory, of which a rank may run out.
    """
    def __init__(self, parameters: Sequence[Tensor]):
        self.rows: list[tuple[list[Tensor], Tensor]] = []
        trained = []
        if workers() > 1:
            trained = [p for p in parameters if p.requires_grad]
        for dtype in dict.fromkeys(p.dtype for p in trained):
            same_type = [p for p in trained if p.dtype is dtype]
            length = sum(p.numel() for p in same_type) + len(same_type)
            row = torch.zeros(length, dtype=dtype, device=same_type[0].device)
            pieces, counts = self.split(same_type, row)
            have = [k for k, p in enumerate(same_type) if p.grad is not None]
            if have:
                copy_all([pieces[k] for k in have], [same_type[k].grad for k in have])
                counts[have] = 1
            self.rows.append((same_type, row))

    @staticmethod
    def split(parameters: Sequence[Tensor], row: Tensor) -> tuple[list[Tensor], Tensor]:
        """Views of a row: a piece in the shape of each parameter, and the counts (parameters,)."""
        lengths = [p.numel() for p in parameters]
        *pieces, counts = row.split([*lengths, len(parameters)])
        return [piece.view(p.shape) for piece, p in zip(pieces, parameters)], counts

    def add_up(self) -> None:
        """The sum over the ranks, into the gradients of the parameters."""
        for parameters, row in self.rows:
            dist.all_reduce(row)
            pieces, counts = self.split(parameters, row)
            have = [k for k, p in enumerate(parameters) if p.grad is not None]
            if have:
                copy_all([parameters[k].grad for k in have], [pieces[k] for k in have])

            # A gradient that only other ranks have. Reading the counts waits for the device, so they are
            # read only where one may be missing.
            if len(have) == len(parameters):
                continue
            for p, piece, count in zip(parameters, pieces, counts.tolist()):
                if p.grad is None and count:
                    # In the layout of p, as fused optimizers take for granted.
                    p.grad = torch.empty_like(p).copy_(piece)


# -------------------------------------------------------------------------------- be the same

@torch.no_grad()
def take_from_first(tensors: dict[str, Tensor]) -> None:
    """Every rank's tensors become those of rank 0."""
    if world() == 1:
        return
    for tensor in tensors.values():
        box = tensor.detach().contiguous()
        dist.broadcast(box, 0)
        tensor.copy_(box)


@torch.no_grad()
def difference(tensors: dict[str, Tensor]) -> str | None:
    """The first of the tensors that is not the same to the bit on all ranks, and where it differs.

    Every rank is compared with rank 0, by a sum over each tensor. None: all are the same.
    """
    if world() == 1 or not tensors:
        return None
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()]).cpu()
    every = torch.stack(of_every_rank([sums]))                   # (ranks, tensors)
    for name, column in zip(tensors, every.T):
        others = (column != column[0]).nonzero()[:, 0].tolist()
        if others:
            return f"{name} is not the same on rank {', '.join(map(str, others))} as on rank 0"
    return None


def checksum(tensor: Tensor) -> Tensor:
    """() int64 of the bits of a tensor and of their places.

    Of the bits: NaN equals itself, and -0 is not 0. Of their places: rows that changed places are seen.
    """
    whole: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    row = tensor.detach().view(whole[tensor.element_size()]).flatten().long()
    # sum over i of i times the i-th number, modulo 2^64
    return (row * torch.arange(1, len(row) + 1, device=row.device)).sum()


# -------------------------------------------------------------------------------- private calls of torch

def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """One kernel for many small copies. A torch without this call raises AttributeError here; then write

        for target, source in zip(targets, sources):
            target.copy_(source)
    """
    torch._foreach_copy_(targets, sources)
