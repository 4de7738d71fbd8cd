"""The processes of one run, as torchrun starts them: how they begin, agree, add up, and end together.

No DistributedDataParallel: it reduces in the backward pass of one module, and here a step has two networks,
several backward passes, recomputed and tiled ones, and micro-batches that only count together. So gradients
are added up once an optimizer step, after the last backward: accumulation costs no communication, and any way
of computing a gradient works. Each micro-batch is weighted by its share of the whole window, so that the sum
over the ranks is the gradient that one process would have. The price: one more copy of the gradients for a
moment, and no communication during the backward pass.

Small words go over gloo between the CPUs, on which a rank that is gone is noticed at once; tensors on a GPU
go over NCCL. With one process nothing here does anything. Needs torch alone. Version 0.1 (2026-11).
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

# That a rank waits for another, such as for its part of the cache.
TIMEOUT = datetime.timedelta(minutes=30)
# Seconds that the first rank waits for the others at the end.
LEAVING = 5.0
Value = TypeVar("Value")
_here: dict = {}                                                 # of this process: local rank, store


class CannotStart(RuntimeError):
    """The processes do not find each other."""


class Elsewhere(RuntimeError):
    """Another rank has failed and says why; this one ends without a word, with exit_code()."""


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another rank ran out of memory, so that this one turns its dial too."""
    def __init__(self, ranks: list[int]):
        super().__init__(f"out of memory on rank {ranks[0]}")
        self.ranks = ranks


# ------------------------------------------------------------------ begin and end

@contextlib.contextmanager
def started(number: int, of: int, local: int = 0) -> Iterator[None]:
    """Process `number` of `of`, the `local`-th of its machine; MASTER_ADDR and MASTER_PORT say where they
    meet. Only the first prints.

    At the end SIGTERM is ignored: torchrun sends it to the others as soon as one process has left, and they
    are leaving already. Without torchrun the first process is host to the store, in which the others look who
    speaks: it leaves last, unless one of them is gone."""
    if of == 1:
        yield
        return
    # Later, by the first optimizer, its defaults would keep the group alive.
    importlib.import_module("torch.distributed.nn")
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "cpu:gloo"
    try:
        store, *_ = next(iter(dist.rendezvous("env://", number, of, timeout=TIMEOUT)))
        dist.init_process_group(
            backend, store=dist.PrefixStore("ranks", store), rank=number, world_size=of, timeout=TIMEOUT
        )
    except (ValueError, RuntimeError) as error:
        raise CannotStart(
            f"the {of} processes do not meet: {(str(error).splitlines() or [''])[0]}; start "
            f"them with torchrun, or unset WORLD_SIZE for one process"
        ) from None
    _here.update(local=local, store=dist.PrefixStore("words", store))
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(sys.stdout if first() else nowhere):
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        dist.destroy_process_group()                             # who still waits for this one notices
        # Else torchrun's agent is its host.
        if "TORCHELASTIC_USE_AGENT_STORE" not in os.environ and not _here.get("store_lost"):
            leave_last(number, of)
        _here.clear()


def leave_last(number: int, of: int) -> None:
    """The first process waits for the others, whom it may not know to be gone, at most LEAVING seconds."""
    store, until = _here["store"], time.monotonic() + LEAVING
    with contextlib.suppress(RuntimeError):
        if store.add("left", 1) == of:
            store.set("all left", "")
        while number == 0 and not store.check(["all left"]) and time.monotonic() < until:
            time.sleep(0.02)                                     # store.wait() prints when its time is up


def world() -> int:
    return dist.get_world_size() if _here else 1


def alike(yes: bool) -> None:
    """From here on all ranks do the same work, on the same crops: nothing is shared out, gathered or added
    up, but they end together.

    For memory.tile_parallel, which shares what is inside that work (vae3d.py), with its own agreements.
    """
    if _here:
        _here["alike"] = yes


def workers() -> int:
    """Ranks among which the crops are shared."""
    return 1 if _here.get("alike") else world()


def rank() -> int:
    return dist.get_rank() if _here else 0


def local_rank() -> int:
    """Place among the processes of this machine: the GPU to take."""
    return _here.get("local", 0)


def first() -> bool:
    """True in the process that writes and prints."""
    return rank() == 0


def place() -> str:
    """Who is speaking, for an error's line."""
    return f"rank {rank()} on {socket.gethostname()}: " if world() > 1 else ""


def speaks(code: int) -> bool:
    """True in the first process that has an error to tell, which all will end with: one line, however many
    notice.
    """
    if world() == 1:
        return True
    try:
        if _here["store"].add("speakers", 1) > 1:
            return False
        _here["store"].set("code", str(code))
    except RuntimeError:                                         # it is gone with its process
        _here["store_lost"] = True
    return True


def exit_code(default: int) -> int:
    """That of the rank which told its error, once it has."""
    try:
        _here["store"].wait(["code"], datetime.timedelta(seconds=30))
        return int(_here["store"].get("code"))
    except RuntimeError:
        return default


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed since another rank has gone, or does not answer."""
    return world() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error))


# ----------------------------------------------------------------------------------------------- agree

def shared(count: int) -> range:
    """Which of `count` pieces are this rank's: a stretch of them, so that what is gathered in the order of
    the ranks is in theirs.
    """
    if workers() == 1:
        return range(count)
    return range(-(-count * rank() // world()), -(-count * (rank() + 1) // world()))


def together(work: Callable[[], Value]) -> Value:
    """work() on every rank. Where it fails on any of them, the lowest of these raises its error and all
    others Elsewhere.
    """
    value, error = None, None
    try:
        value = work()
    except Exception as caught:
        if world() == 1:
            raise
        error = caught
    failed = _ranks_with(error is not None)
    if failed:
        raise error if failed[0] == rank() else Elsewhere()
    return value


def from_rank(source: int, work: Callable[[], Value]) -> Value:
    """work() of one rank, on all of them. Where it fails, that rank raises its error and all others
    Elsewhere.
    """
    if world() == 1:
        return work()
    box = [together(lambda: work() if rank() == source else None)]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def chosen(source: int, work: Callable[[], Value]) -> Value:
    """from_rank(), but of every rank for itself where all do the same work and `work` itself has the ranks
    agree.
    """
    return together(work) if _here.get("alike") else from_rank(source, work)


def agreed(value: Value = None) -> Value:
    """`value`, once every rank has got so far. Raises OutOfMemoryElsewhere where one of them calls ran_out()
    instead.
    """
    short = _ranks_with(False) if workers() > 1 else []
    if short:
        raise OutOfMemoryElsewhere(short)
    return value


def ran_out(error: RuntimeError) -> int:
    """Tell the others of an out-of-memory, unless they told this rank; returns the lowest rank that had it.
    """
    return (error.ranks if isinstance(error, OutOfMemoryElsewhere) else _ranks_with(True) or [0])[0]


def _ranks_with(something: bool) -> list[int]:
    if world() == 1:
        return []
    marks = torch.zeros(world(), dtype=torch.uint8)
    marks[rank()] = something
    dist.all_reduce(marks)
    return marks.nonzero()[:, 0].tolist()


def barrier() -> None:
    _ranks_with(False)


# ----------------------------------------------------------------------------------------------- add up

def largest(value: float) -> float:
    if world() == 1:
        return value
    box = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return box.item()


def gathered(rows: list) -> list:
    """The plain values of all ranks that had a share of the work, in their order."""
    return rows if workers() == 1 else of_every_rank(rows)


def of_every_rank(rows: list) -> list:
    if world() == 1:
        return rows
    every: list = [None] * world()
    dist.all_gather_object(every, rows)
    return [row for part in every for row in part]


def summed(terms: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Scalars by name, added up in the order of the ranks; a rank without micro-batches has none and receives
    them.
    """
    if workers() == 1:
        return terms
    every = gathered([(list(terms), torch.stack(list(terms.values())).cpu())] if terms else [])
    return dict(zip(every[0][0], sum(values for _, values in every).to(device)))


def add_up(counts: Tensor) -> Tensor:
    """In place."""
    if workers() > 1:
        dist.all_reduce(counts)
    return counts


def average(buffers: Sequence[Tensor]) -> None:
    """Floating ones become their mean; counters their largest."""
    for buffer in buffers if workers() > 1 else ():
        box = buffer.contiguous()
        dist.all_reduce(box, dist.ReduceOp.SUM if box.is_floating_point() else dist.ReduceOp.MAX)
        buffer.copy_(box / world() if box.is_floating_point() else box)


class Gradients:
    """The gradients of some parameters in one row a dtype, to be added up by one all-reduce each.

    Made before the ranks agree, since it takes memory. Behind the gradients the row counts the ranks that
    have each of them: one without micro-batches contributes zeros, and a parameter without gradient on all
    ranks has none afterwards."""
    def __init__(self, parameters: Sequence[Tensor]):
        self.rows: list[tuple[list[Tensor], Tensor]] = []
        trained = [p for p in parameters if p.requires_grad] if workers() > 1 else []
        for dtype in dict.fromkeys(p.dtype for p in trained):
            group = [p for p in trained if p.dtype is dtype]
            row = torch.zeros(sum(p.numel() for p in group) + len(group), dtype=dtype, device=group[0].device)
            *pieces, there = self.pieces(group, row)
            have = [k for k, p in enumerate(group) if p.grad is not None]
            if have:
                torch._foreach_copy_([pieces[k] for k in have], [group[k].grad for k in have])
                there[have] = 1
            self.rows.append((group, row))

    @staticmethod
    def pieces(group: Sequence[Tensor], row: Tensor) -> list[Tensor]:
        *pieces, there = row.split([*(p.numel() for p in group), len(group)])
        return [*(piece.view(p.shape) for piece, p in zip(pieces, group)), there]

    def add_up(self) -> None:
        for group, row in self.rows:
            dist.all_reduce(row)
            *pieces, there = self.pieces(group, row)
            have = [k for k, p in enumerate(group) if p.grad is not None]
            if have:
                torch._foreach_copy_([group[k].grad for k in have], [pieces[k] for k in have])
            if len(have) < len(group):                           # only then look, which waits for the device
                for p, piece, count in zip(group, pieces, there.tolist()):
                    if p.grad is None and count:
                        # In the layout of p, as fused optimizers take for granted.
                        p.grad = torch.empty_like(p).copy_(piece)


# ----------------------------------------------------------------------------------------------- be the same

@torch.no_grad()
def take_from_first(tensors: dict[str, Tensor]) -> None:
    """Every rank's become those of rank 0."""
    for tensor in tensors.values() if world() > 1 else ():
        box = tensor.detach().contiguous()
        dist.broadcast(box, 0)
        tensor.copy_(box)


@torch.no_grad()
def difference(tensors: dict[str, Tensor]) -> str | None:
    """The first of the tensors that is not the same to the bit on all ranks, and where it differs from rank
    0's.
    """
    if world() == 1 or not tensors:
        return None
    sums = torch.stack([checksum(tensor) for tensor in tensors.values()]).cpu()
    every = torch.stack(of_every_rank([sums]))                        # (ranks, tensors)
    for name, column in zip(tensors, every.T):
        others = (column != column[0]).nonzero()[:, 0].tolist()
        if others:
            return f"{name} is not the same on rank {', '.join(map(str, others))} as on rank 0"
    return None


def checksum(tensor: Tensor) -> Tensor:
    """() int64 of the bits and their places: NaN equals itself, -0 is not 0, and rows that changed places are
    seen.
    """
    whole: dict[int, Any] = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    row = tensor.detach().view(whole[tensor.element_size()]).flatten().long()
    return (row * torch.arange(1, len(row) + 1, device=row.device)).sum()
