"""Exact tiled execution: any run of local layers, tile by tile, forward and backward. Needs torch,
local_layers.py and lean_norm.py, and nothing else.

    layers = [nn.Conv3d(1, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 1, 3, padding=1)]
    y = run_tiled(layers, (32, 32, 32), x)       # nn.Sequential(*layers)(x) to rounding, gradients too

A run of local layers is called a stretch. `Tiled` runs it tile by tile, keeps its input alone, and computes
each tile again in backward. A tile reads exactly its receptive field, and zeros stand where the volume ends
and nowhere else, so each voxel comes out as the untiled layers make it: there are no seams.
The ranks of a process group may share the tiles: whatever a pass over the tiles adds up, or writes, is then
summed over the ranks. What the engine knows of layers is the table in local_layers.py, and nothing more.

Follows: recomputation in backward as in checkpointing (arXiv:1604.06174), but in space too; statistics of a
volume merged from its tiles' as by Chan et al. 1979.

Shapes: B batch, C channels, D H W depth height width, d h w those of a tile. Tiles are whole units
(local_layers.py). Version 0.5 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lean_norm import by_batch_norm, channel_statistics, sloped
from local_layers import Fork, Join, Op, Span, module_of, row, sizes_along, spans, unroll

Tile = tuple[Span, Span, Span]
Group = "torch.distributed.ProcessGroup | None"  # ranks that share the tiles; None: this process has them all


# ------------------------------------------------------------------------------------ A stretch and its tiles

class Stretch(NamedTuple):
    """Operations to run in tiles of so many units (D, H, W)."""
    ops: tuple[Op, ...]
    tile_units: tuple[int, int, int]
    tick: Callable[[float], None] | None = None  # told the share of the forward pass that is done
    group: Group = None
    rehearsal: bool = False                      # the largest tile alone runs, for predicting memory

    def tiles(self, x: Tensor, end: int | None = None) -> Iterator[Tile]:
        """This rank's tiles through ops[:end]; in a rehearsal the one that reads most, twice: what is left of
        a tile, such as gradients of weights, is there when the next one runs.

        The largest are dealt out first, so that no rank has more than another by more than the largest
        tile.
        """
        end = len(self.ops) if end is None else end
        axes = [spans(self.ops, axis, x.shape[2 + axis], self.tile_units[axis], end) for axis in range(3)]
        if self.rehearsal:
            return iter([tuple(max(axis, key=lambda span: span.length) for axis in axes)] * 2)
        if self.group is None:
            return product(*axes)
        by_size = sorted(product(*axes), key=lambda tile: -prod(s.length for s in tile))
        return iter(by_size[self.group.rank()::self.group.size()])

    def size(self, x: Tensor, end: int | None = None) -> list[int]:
        """(D, H, W) of what ops[:end] give for x."""
        return [sizes_along(self.ops[:end], axis, x.shape[2 + axis])[-1] for axis in range(3)]

    def channels(self, x: Tensor, end: int | None = None) -> int:
        """Channels of what ops[:end] give for x."""
        width = x.shape[1]
        for op in self.ops[:end]:
            width = row(op).channels(op, width)
        return width

    def blank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the output, in channels_last_3d where x or a weight is, as convolutions give it.

        The same on every rank.
        """
        last = torch.channels_last_3d
        layouts = [x, *(p for p in self.parameters() if p.dim() == 5)]
        if any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in layouts):
            layout = last
        else:
            layout = torch.contiguous_format
        shape = x.shape[0], self.channels(x), *self.size(x)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=layout).zero_()

    def norms(self) -> list[int]:
        """Places of the operations that need statistics of the whole volume."""
        return [i for i, op in enumerate(self.ops) if row(op).groups is not None]

    def parameters(self) -> list[nn.Parameter]:
        return [p for op in self.ops for p in module_of(op).parameters()]


# --------------------------------------------------------------------------------------------------- One tile

def region(x: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """View of (B, C, D, H, W) on an interval per axis."""
    for axis, (lo, hi) in enumerate(intervals):
        if (lo, hi) != (0, x.shape[2 + axis]):
            x = x.narrow(2 + axis, lo, hi - lo)
    return x


Weights = dict[nn.Parameter, Tensor]             # parameter -> tensor to compute with
Statistics = dict[int, Sequence[Tensor]]         # place of a norm -> mean, variance (B, groups) of the volume


def run_tile(stretch: Stretch, tile: Tile, x: Tensor, weights: Weights, stats: Statistics) -> Tensor:
    """One tile through its operations: x is the region `source` of the input, the result is that of
    `target`.
    """
    remembered = []
    for i, (op, *cuts) in enumerate(zip(stretch.ops, *(span.cuts for span in tile))):
        crops = [(cut.crop, cut.crop + cut.length) for cut in cuts]
        if isinstance(op, Join):
            skip = region(remembered.pop(), crops)
            x = run_pointwise(op.skip, skip, weights) + x
            continue
        if isinstance(op, Fork):
            remembered.append(x)
        else:
            values = values_of(op, weights)
            if i in stats:
                values["mean"], values["var"] = stats[i]
            x = row(op).run(op, x, [cut.pad for cut in cuts], values)
        x = region(x, crops)
    return x


def values_of(op: Op, weights: Weights) -> dict[str, Tensor]:
    """Parameter's name in the layer -> tensor to compute with."""
    return {name: weights[p] for name, p in module_of(op).named_parameters()}


def run_pointwise(layer: nn.Module, x: Tensor, weights: Weights) -> Tensor:
    """A layer that needs no neighbours: the way around a residual branch."""
    for op in unroll(layer):
        x = row(op).run(op, x, [(0, 0)] * 3, values_of(op, weights))
    return x


# --------------------------------------------------------------------------------------------- Ranks together

@contextmanager
def together(group: Group, like: Tensor) -> Iterator[None]:
    """For what the ranks of a group do apart, before they meet: if it fails on one, it raises on all of
    them.

    The others would wait for ever. They raise torch.OutOfMemoryError where memory was short, so that all
    can turn the dial together, else RuntimeError. Costs one all_reduce of 4 bytes, on the device of
    `like`. May be nested: a failure is told once.
    """
    if group is None:
        yield
        return
    dist = torch.distributed
    told = like.new_zeros((), dtype=torch.int32)                 # now: later there may be no room for it
    try:
        yield
    except Exception as error:
        if not getattr(error, "told", False):
            error.told = True
            kind = 1 if is_out_of_memory(error) else 2
            dist.all_reduce(told.fill_(kind * group.size() + group.rank()), dist.ReduceOp.MAX, group)
        raise
    dist.all_reduce(told, dist.ReduceOp.MAX, group)
    kind, rank = divmod(int(told), group.size())
    if not kind:
        return
    if kind == 1:
        error = torch.OutOfMemoryError(f"out of memory on rank {rank} of those that share the tiles")
    else:
        error = RuntimeError(f"rank {rank} of those that share the tiles failed; its own message says why")
    error.told = True
    raise error


def is_out_of_memory(error: Exception) -> bool:
    """CUDA's error, or the CPU allocator's, which is a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def add_up(t: Tensor, group: Group) -> None:
    """t becomes the sum over the ranks, the same bits on each (torch promises that of all_reduce).

    t must be dense, its layout the same on all ranks.
    """
    if group is not None:
        torch.distributed.all_reduce(t.as_strided((t.numel(),), (1,)), group=group)


# ----------------------------------------------------------------------------- Statistics of the whole volume

def volume_statistics(parts: Iterator[Tensor], groups: int, group: Group = None, zero: Tensor | int = 0,
                      voxels: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups) of a volume that comes in tiles (B, C, d, h, w), float32 or wider.

    With a group, `parts` are this rank's, perhaps none; zero: (B, C) in the result's type; voxels: of the
    whole volume, a channel.
    """
    # First each channel: (B, C). Two sets of n_a and n_b numbers, b minus a apart in their means, merge
    # stably (Chan et al. 1979):
    #   mean = mean_a + apart n_b / (n_a + n_b),  spread = spread_a + spread_b + apart^2 n_a n_b / (n_a +
    # n_b), spread being the sum of squared deviations.
    count, mean, spread = 0, zero, zero
    with together(group, zero):
        for part in parts:
            n = part[0, 0].numel()
            var, centre = channel_statistics(part)
            apart = centre - mean
            spread = spread + var * n + apart.square() * (count * n / (count + n))
            mean, count = mean + apart * (n / (count + n)), count + n
    # Then over the ranks: the mean first, so that the deviations are from it.
    if group is not None:
        whole = mean * (count / voxels)
        add_up(whole, group)
        spread = spread + (mean - whole).square() * count
        add_up(spread, group)
        mean, count = whole, voxels
    # Last over the channels of a group: var = mean of variances + variance of means.
    mean, var = mean.unflatten(1, (groups, -1)), (spread / count).unflatten(1, (groups, -1))
    return mean.mean(2), var.mean(2) + mean.var(2, correction=0)


def statistics_gradient(x: Tensor, target: object, mean: Tensor, grad_mean: Tensor, grad_var: Tensor,
                        voxels: int) -> Tensor:
    """Gradient of a tile x (B, C, d, h, w) through mean and variance (B, groups) of `voxels` a channel.

    d mean / d x = 1 / n, d var / d x = 2 (x - mean) / n, with n the numbers of a group.
    """
    width = x.shape[1] // mean.shape[1]
    m, gm, gv = (t.repeat_interleave(width, 1) for t in (mean, grad_mean, grad_var))
    if by_batch_norm(x):
        return sloped(x, m, 2 * gv / (width * voxels), gm / (width * voxels))
    m, gm, gv = (t[..., None, None, None] for t in (m, gm, gv))
    return ((gm + 2 * gv * (x - m)) / (width * voxels)).to(x.dtype)


# --------------------------------------------------------------------------------------- Forward and backward

def activation_dtype(x: Tensor) -> torch.dtype:
    """What convolutions give for x here: autocast's type (it leaves float64 alone), else x's own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


class Tiled(torch.autograd.Function):
    """Run a stretch tile by tile. Kept for backward: its input, and mean and variance of each norm.

    The norms' statistics are inputs of the tile's function. Parameters are inputs of this function, so
    their gradients take autograd's ordinary way (DDP's hooks, accumulation). Inside, autocast is off and
    its casts are explicit, once a pass.

    With a group each rank runs its own tiles and ends with what one process alone has, the same bits on
    all ranks: the output and the gradients of input, parameters and statistics are sums over the ranks.
    Every rank must make the same calls with the same values.
    """
    @staticmethod
    def forward(ctx, stretch: Stretch, x: Tensor, *parameters: Tensor) -> Tensor:
        group = stretch.group
        cast, dtype = torch.is_autocast_enabled(x.device.type), activation_dtype(x)
        wide = torch.promote_types(dtype, torch.float32)
        weights = dict(zip(stretch.parameters(), [p.to(dtype) if cast else p for p in parameters]))
        stats: Statistics = {}

        def run(tile: Tile) -> Tensor:
            return run_tile(stretch, tile, region(x, [s.source for s in tile]).to(dtype), weights, stats)

        with torch.autocast(x.device.type, enabled=False):
            # First the norms' statistics in order: a pass for each, over the operations before it.
            for i in stretch.norms():
                parts = (run(tile) for tile in stretch.tiles(x, i))
                zero = x.new_zeros(x.shape[0], stretch.channels(x, i), dtype=wide)
                groups = row(stretch.ops[i]).groups(stretch.ops[i])
                stats[i] = volume_statistics(parts, groups, group, zero, prod(stretch.size(x, i)))

            # Then the output, each tile into its place. The places of other ranks stay zero, so their sum
            # rounds nothing.
            tiles = list(stretch.tiles(x))
            with together(group, x):
                out = stretch.blank(x, dtype)
                for number, tile in enumerate(tiles, 1):
                    region(out, [s.target for s in tile]).copy_(run(tile))
                    if stretch.tick is not None:
                        stretch.tick(number / len(tiles))
            add_up(out, group)
        ctx.stretch, ctx.cast, ctx.dtype = stretch, cast, dtype
        ctx.save_for_backward(x, *(t for pair in stats.values() for t in pair), *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        stretch, norms, group = ctx.stretch, ctx.stretch.norms(), ctx.stretch.group
        x_needed, needed = ctx.needs_input_grad[1], ctx.needs_input_grad[2:]

        # First the inputs of a tile's function as leaves of its graph, and room for the sums of their
        # gradients.
        with together(group, grad_out):
            x, *rest = ctx.saved_tensors
            kept, parameters = rest[:2 * len(norms)], rest[2 * len(norms):]
            stats = {}
            for k, i in enumerate(norms):
                stats[i] = [t.detach().requires_grad_() for t in kept[2 * k:2 * k + 2]]
            weights = {}
            for p, value, wanted in zip(stretch.parameters(), parameters, needed):
                value = value.detach().to(ctx.dtype) if ctx.cast else value.detach()
                weights[p] = value.requires_grad_(wanted)
            leaves = [w for w in weights.values() if w.requires_grad]
            leaves += [t for pair in stats.values() for t in pair]
            sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in leaves]
            grad_x = None
            if x_needed:                         # a norm's gradients nearly cancel: they are summed unrounded
                wide = torch.promote_types(x.dtype, torch.float32) if norms else x.dtype
                grad_x = torch.zeros_like(x, dtype=wide)

        def one_pass(end: int, grad_of: Callable[[Tensor, list], Tensor]) -> None:
            """Recompute ops[:end] a tile at a time; add what `grad_of` its output gives to `sums` and
            `grad_x`.
            """
            for tile in stretch.tiles(x, end):
                source, target = [s.source for s in tile], [s.target for s in tile]
                part = region(x, source).detach().to(ctx.dtype).requires_grad_(x_needed)
                with torch.enable_grad():
                    y = run_tile(stretch, tile, part, weights, stats)
                if not y.requires_grad:
                    continue
                wanted = [*leaves, part] if x_needed else leaves
                grads = torch.autograd.grad(y, wanted, grad_of(y.detach(), target), allow_unused=True)
                for total, grad in zip(sums, grads):
                    if grad is not None:
                        total += grad
                if x_needed:
                    region(grad_x, source).add_(grads[-1])       # halos overlap: add

        with torch.autocast(x.device.type, enabled=False):
            # Then one pass over the whole stretch, which gives the gradient of every statistic too.
            with together(group, grad_out):
                one_pass(len(stretch.ops), lambda y, target: region(grad_out, target))

            # Then, for the last norm first, a pass over the operations before it: it carries the gradient
            # of mean and variance to the input, to the parameters and to earlier statistics. Every pass
            # that adds to them is over.
            for k, i in reversed(list(enumerate(norms))):
                at = len(sums) - 2 * (len(norms) - k)            # the statistics' sums stand last
                grad_mean, grad_var = sums[at:at + 2]
                add_up(grad_mean, group)
                add_up(grad_var, group)
                through = partial(statistics_gradient, mean=stats[i][0].detach(), grad_mean=grad_mean,
                                  grad_var=grad_var, voxels=prod(stretch.size(x, i)))
                with together(group, grad_out):
                    one_pass(i, through)

        # Last the sums over the ranks, in the types of what they are gradients of.
        sums = sums[:len(sums) - 2 * len(norms)]
        for total in sums:
            add_up(total, group)
        if x_needed:
            add_up(grad_x, group)
            grad_x = grad_x.to(x.dtype)
        found = iter(sums)
        grads = [next(found).to(p.dtype) if wanted else None for p, wanted in zip(parameters, needed)]
        return None, grad_x, *grads


def run_tiled(layers: Sequence[nn.Module], tile_units: tuple[int, int, int], x: Tensor,
              tick: Callable[[float], None] | None = None, group: Group = None,
              rehearsal: bool = False) -> Tensor:
    """nn.Sequential(*layers)(x) in tiles of `tile_units` (D, H, W), without keeping what is between.

    tick: told the share of the forward pass that is done, after each tile. group: the ranks that share
    the tiles. rehearsal: the largest tile alone runs, for predicting memory on tensors without data; the
    rest of the output is 0. Raises ValueError where a layer has no row in LOCAL.
    """
    ops = []
    for layer in layers:
        parts = unroll(layer)
        if parts is None:
            raise ValueError(f"run_tiled: {type(layer).__name__} has no row in local_layers.LOCAL, so an "
                             f"output may depend on the whole volume; leave it out, or add a row")
        ops += parts
    stretch = Stretch(tuple(ops), tile_units, tick, group, rehearsal)
    return Tiled.apply(stretch, x, *stretch.parameters())
