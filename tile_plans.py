"""Tiles for a whole network: every setting of tiled execution worth having, what it costs, and how to run it.
Needs torch, tiles.py, local_layers.py and lean_norm.py, and nothing else.

    sides = Side(encoder, 1, (1, 1, 1)), Side(decoder, 4, (4, 4, 4))
    mode = TileMode(Network(sides, parameters=10**6), budget=8)  # GiB
    z = mode.run(0, x, size=x.shape[2:], whole=lambda layer, x: layer(x))

A network is lists of layers (its sides). The levels of its resolution pyramid are gathered into stretches,
runs of local layers that are tiled together; what is left is run whole and checkpointed. The cost model
counts multiply-adds and live elements over the same spans as the tiles themselves, halos and passes for norms
included. It is made for planning: its peak is an estimate, mostly too high, by up to 45 %. What `auto`
comes to is TileMode.plan, a function of network, size, batch, precision and budget alone.

Shapes: sizes are (D, H, W) in voxels. A unit is the least length that all strides of a stretch divide.
Version 0.5 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from local_layers import Fork, Op, rates, row, sizes_along, spans, unroll
from tiles import Group, activation_dtype, run_tiled

Size = tuple[int, int, int]
TILE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)     # tiles along an axis that are tried
LEAST_TILE = 8                                   # voxels of a piece's finest grid; below, nearly all is halo
WORK_BOUND = 1.4                                 # without a budget: the least memory within this much time
MOVE_COST = 32                                   # multiply-adds that reading and writing one element is worth
MOST_ELEMENTS = 2 ** 31                          # of a tensor: beyond it CUDA's kernels fail, or are wrong
LATENT_COPIES = 9                                # float32 tensors like the one between two sides: mean and
                                                 # log-variance, noise, sample, their gradients


class Side(NamedTuple):
    """A list of layers that run one after the other."""
    layers: nn.Sequential
    channels: int                                # of its input
    stride: Size                                 # voxels of the network's input per voxel of its own


class Network(NamedTuple):
    sides: tuple[Side, ...]                      # the first takes the network's input
    parameters: int                              # their number, for the weights' share of the memory


class Segment(NamedTuple):
    """layers[start:stop] of a side."""
    start: int
    stop: int
    tile_units: Size | None                      # of a tile; None: one layer, run whole


class TilePlan(NamedTuple):
    """A setting of the dial, memory("tile", plan.tile, plan.stretch), and what it is expected to cost."""
    tile: Size                                   # in voxels of the input
    stretch: str                                 # levels a stretch, highest resolution first: "1", "2", "2+1"
    work: float                                  # time of a training step over the checkpointed one's
    peak_bytes: int                              # of such a step: weights, gradients, AdamW, activations
    largest: int                                 # elements of the largest tensor
    segments: tuple[tuple[Segment, ...], ...]    # what to do with the layers of each side


# ---------------------------------------------------------------------------------------- A network in pieces

class Piece(NamedTuple):
    """layers[start:stop] of a side: local ones to run as a stretch, or a single one to run whole."""
    start: int
    stop: int
    stretch_number: int | None                   # which stretch of the setting; None: run whole
    ops: tuple[Op, ...] | None                   # None: not local, such as attention
    size: Size                                   # of its input
    after: Size                                  # of its output
    held: tuple[int, int]                        # elements of its input and of its output


def flatten(layers: Sequence[nn.Module]) -> tuple[Op, ...]:
    """Operations of the local ones among `layers`."""
    return tuple(op for layer in layers for op in unroll(layer) or ())


def levels(layers: Sequence[nn.Module]) -> list[int]:
    """Level of each layer by the finer of its two grids, 0 the finest: a down-convolution goes with what is
    before. What only moves voxels (pixel unshuffle) goes with its coarser one: it is no level of its own.
    """
    before = prod(rates(flatten(layers), axis)[0] for axis in range(3))
    finest = []
    for layer in layers:
        ops, after = flatten([layer]), before
        for axis in range(3):
            rate = rates(ops, axis)
            after = after * rate[-1] // rate[0]
        moves = not any(row(op).taps(op) for op in ops)
        finest.append(min(before, after) if moves else max(before, after))
        before = after
    order = sorted(set(finest), reverse=True)
    return [order.index(f) for f in finest]


def pieces(layers: nn.Sequential, size: Size, channels: int, stretches: Sequence[int]) -> list[Piece]:
    """Cut a side into pieces: stretches[0] levels from the finest make a stretch, the next stretches[1]
    another ...

    size, channels: of the side's input.
    """
    number_of = [number for number, count in enumerate(stretches) for _ in range(count)]  # of each level
    found: list[Piece] = []
    size = tuple(size)
    for i, (layer, level) in enumerate(zip(layers, levels(layers))):
        # First what goes in and what comes out; a layer that is not local changes neither size nor
        # channels.
        ops, after, width = unroll(layer), size, channels
        for op in ops or ():
            width = row(op).channels(op, width)
        if ops is not None:
            after = tuple(sizes_along(ops, axis, n)[-1] for axis, n in enumerate(size))
        number = None
        if ops is not None and level < len(number_of):
            number = number_of[level]
        held = channels * prod(size), width * prod(after)

        # Then it goes on with the piece before, where both are of the same stretch.
        last = found[-1] if found else None
        if last is not None and number is not None and last.stretch_number == number:
            held = last.held[0], held[1]
            found[-1] = last._replace(stop=i + 1, ops=(*last.ops, *ops), after=after, held=held)
        else:
            found.append(Piece(i, i + 1, number, None if ops is None else tuple(ops), size, after, held))
        size, channels = after, width
    return found


def length_in_units(piece: Piece) -> list[int]:
    return [-(-n // rates(piece.ops, axis)[0]) for axis, n in enumerate(piece.size)]


def units_of(piece: Piece, tile: Sequence[int]) -> Size:
    """Units of a tile that is at most so many voxels of the piece's finer grid, all tiles as equal as units
    allow.
    """
    found = []
    for axis, n in enumerate(length_in_units(piece)):
        count = -(-n // max(1, tile[axis] // max(rates(piece.ops, axis))))
        found.append(-(-n // count))
    return tuple(found)


def compositions(total: int) -> list[str]:
    """Every way to make stretches of the levels from the finest down: 2 -> "1", "1+1", "2"."""
    found = {1: ["1"]}
    for n in range(2, total + 1):
        found[n] = [str(n)] + [f"{first}+{rest}" for first in range(1, n) for rest in found[n - first]]
    return [each for n in range(1, total + 1) for each in found[n]]


# ----------------------------------------------------------------------------------------- What a piece costs

class Tiling(NamedTuple):
    """What a piece costs in tiles of `tile_units`, or whole where that is None."""
    work: float                                  # a quarter of a step's multiply-adds, halos included
    elements: float                              # activations alive while one tile's gradient is computed
    largest: float                               # elements of the largest of them
    tile_units: Size | None


def attention_cost(piece: Piece) -> Tiling:
    """Of a layer that sees the whole volume: its convolutions, q k^T and the product with v, by a flash
    kernel.
    """
    elements, voxels = piece.held[0], prod(piece.size)
    work = elements * (4 * elements // voxels + 2 * voxels)
    return Tiling(work, 10 * elements, 3 * elements, None)       # q, k, v are one tensor


def tiling(piece: Piece, tile_units: Size | None, ranks: int = 1) -> Tiling:
    """Cost of a piece in tiles of `tile_units`, shared by so many ranks; None: whole, as checkpointing runs
    it.
    """
    if piece.ops is None:
        return attention_cost(piece)
    # First the tiles: spans along each axis, of which they are products, and from them the length of each
    # operation's output in each tile; and the longest along each axis before it is cropped, at both ends.
    found = []
    for axis, n in enumerate(piece.size):
        found.append(spans(piece.ops, axis, n, tile_units[axis] if tile_units else n, len(piece.ops)))
    lengths = [list(zip(*([cut.length for cut in span.cuts] for span in axis))) for axis in found]
    longest = []
    for axis in found:
        longest.append([max(2 * cut.crop + cut.length for cut in cuts)
                        for cuts in zip(*(span.cuts for span in axis))])
    norms = []                                   # each takes a pass of its own over the operations before it
    if tile_units:
        norms = [i for i, op in enumerate(piece.ops) if row(op).groups is not None]

    # Then the operations: work over all tiles, memory of the largest one.
    channels = piece.held[0] // prod(piece.size)
    work, before_last, alive, entire = 0.0, 0.0, [], 0
    for i, op in enumerate(piece.ops):
        channels, taps = row(op).channels(op, channels), row(op).taps(op)
        if taps:
            before_last = work                   # when the loop is over: before the last convolution
        passes = 1 + sum(i < norm for norm in norms)
        voxels = prod(sum(axis[i]) for axis in lengths)
        largest = prod(max(axis[i]) for axis in lengths)
        work += passes * voxels * channels * (taps + MOVE_COST)
        alive.append(0 if isinstance(op, Fork) else channels * largest)
        entire = max(entire, channels * prod(axis[i] for axis in longest))

    if tile_units is None:
        entire = max(alive, default=0)           # whole, nothing is cropped
        # Of forward, again, and backward twice as long, torch's checkpoint leaves out again what nothing is
        # kept of: from the last convolution on.
        work -= (work - before_last) / 4
    else:
        tiles = prod(map(len, found))
        work *= -(-tiles // ranks) / tiles       # of the rank that has most
    return Tiling(work, sum(alive) + 2 * max(alive, default=0), entire, tile_units)


def cheapest(costs: Sequence[Tiling], limit: float) -> Tiling:
    """Least work within `limit` elements; where nothing fits, the fewest elements."""
    fit = [cost for cost in costs if cost.elements <= limit]
    if not fit:
        return min(costs, key=lambda cost: cost.elements)
    return min(fit, key=lambda cost: cost.work)


# ------------------------------------------------------------------------------------------------------ Plans

def tile_ladder(size: Sequence[int]) -> list[Size]:
    """Tiles to try on a grid, from the whole of it down; each cuts the longest axis of the one before:
    least halo.
    """
    counts = [[n for n in TILE_COUNTS if n == 1 or length >= n * LEAST_TILE] for length in size]
    at, found = [0, 0, 0], []
    while True:
        tile = tuple(-(-length // each[i]) for length, each, i in zip(size, counts, at))
        found.append(tile)
        open_axes = [axis for axis in range(3) if at[axis] + 1 < len(counts[axis])]
        if not open_axes:
            return found
        at[max(open_axes, key=lambda axis: tile[axis])] += 1


def make_plans(network: Network, size: Sequence[int], batch: int, itemsize: int,
               tile: Sequence[int] | None = None, stretches: Sequence[str] = (),
               ranks: int = 1) -> list[TilePlan]:
    """Every setting of the dial worth having, by rising work and falling peak.

    size: of the network's input. itemsize: bytes of an activation. tile: None for every one worth trying.
    stretches: to try, such as "2+1"; (): all. ranks: that share the tiles.
    The tile is that of the stretches that reach the volume's own resolution. A stretch of lower levels
    takes the tile of least work that needs no more memory than theirs: no two are computed at once, so the
    largest decides. Raises ValueError where every setting has a tensor of more than MOST_ELEMENTS.
    """
    tables: dict = {}                            # the same piece occurs in several settings

    def cost(piece: Piece, tile_units: Size | None) -> Tiling:
        key = piece.size, piece.held, piece.ops, tile_units
        if key not in tables:
            tables[key] = tiling(piece, tile_units, ranks)
        return tables[key]

    def cut(stretch: Sequence[int]) -> list[list[Piece]]:
        found = []
        for side in network.sides:
            own_size = tuple(n // s for n, s in zip(size, side.stride))
            found.append(pieces(side.layers, own_size, side.channels, stretch))
        return found

    size = tuple(size)
    stretches = stretches or compositions(max(levels(network.sides[0].layers)) + 1)
    base = sum(cost(piece, None).work for side in cut(()) for piece in side)
    found = []
    for stretch in stretches:
        parts = cut([int(n) for n in stretch.split("+")])
        order = [piece for side in parts for piece in side]
        tiled = [piece for piece in order if piece.stretch_number is not None]
        top = [piece for piece in tiled if size in (piece.size, piece.after)]
        lower = {}                               # stretches of lower levels: id -> every tile's cost
        for piece in tiled:
            if piece not in top:
                finer = [max(pair) for pair in zip(piece.size, piece.after)]
                lower[id(piece)] = [cost(piece, units_of(piece, t)) for t in tile_ladder(finer)]
        for choice in [tuple(tile)] if tile else tile_ladder(size):
            costs = {}
            for piece in order:
                if id(piece) not in lower:
                    costs[id(piece)] = cost(piece, units_of(piece, choice) if piece in top else None)
            limit = max(costs[id(piece)].elements for piece in top)
            costs |= {key: cheapest(each, limit) for key, each in lower.items()}
            segments = []
            for side in parts:
                segments.append(tuple(Segment(p.start, p.stop, costs[id(p)].tile_units) for p in side))
            work = sum(each.work for each in costs.values()) / base
            peak = batch * peak_of_sample(parts, costs, itemsize)
            state = 16 * network.parameters      # bytes: float32 weight, gradient, AdamW's two moments
            largest = batch * max(max(*piece.held, costs[id(piece)].largest) for piece in order)
            found.append(TilePlan(choice, stretch, work, int(peak) + state, int(largest), tuple(segments)))
    possible = [plan for plan in found if plan.largest <= MOST_ELEMENTS]
    if not possible:
        least = min(plan.largest for plan in found)
        remedy = "a smaller tile" if tile else "smaller volumes or a smaller batch"
        raise ValueError(f"memory mode tile: at {','.join(map(str, size))}, batch {batch} no tiles keep "
                         f"every tensor within 2^31 elements, beyond which CUDA's kernels fail; the least "
                         f"is {least:,}; take {remedy}")
    return pareto(possible)


def peak_of_sample(sides: Sequence[Sequence[Piece]], costs: dict[int, Tiling], itemsize: int) -> float:
    """Most bytes alive in the backward of a sample: the inputs of pieces, two gradients, one tile.

    Before the last piece's backward the network's output and its gradient are alive, and no tile.
    """
    peak, kept, output = 0.0, 0.0, sides[-1][-1].held[1] * itemsize
    for number, side in enumerate(sides):
        for piece in side:
            before, after = (n * itemsize for n in piece.held)
            gradients = before + after
            if piece is side[0] and number == 0:
                before, gradients = piece.held[0] * max(4, itemsize), after     # a volume, in float32
            elif piece is side[0]:
                before = LATENT_COPIES * piece.held[0] * max(4, itemsize)
            kept += before
            peak = max(peak, kept + gradients + costs[id(piece)].elements * itemsize)
    return max(peak, kept + 2 * output)


def pareto(plans: Sequence[TilePlan]) -> list[TilePlan]:
    """Those that nothing else beats in both work and memory, by rising work."""
    kept: list[TilePlan] = []
    for plan in sorted(plans, key=lambda plan: (plan.work, plan.peak_bytes)):
        if not kept or plan.peak_bytes < kept[-1].peak_bytes:
            kept.append(plan)
    return kept


def choose(plans: Sequence[TilePlan], budget: float | None, least_memory: bool = False) -> TilePlan:
    """Of plans that rise in work and fall in memory, the first whose peak is within `budget` bytes; else
    the last.

    Without a budget the one of least memory whose work is within WORK_BOUND, or whatever its work if
    `least_memory`.
    """
    if budget is not None:
        fit = [plan for plan in plans if plan.peak_bytes <= budget]
        return fit[0] if fit else plans[-1]
    if least_memory:
        return plans[-1]
    bound = WORK_BOUND * min(1.0, plans[0].work)                 # below 1 where ranks share the work
    fit = [plan for plan in plans if plan.work <= bound]
    return fit[-1] if fit else plans[-1]


# --------------------------------------------------------------------------------------------------- The mode

class TileMode:
    """The tile mode of a network: which tiles it takes, chosen once for each size, and how it runs in them.

    tile: (D, H, W) in voxels of the input, at most; rounded down to the stretch's stride; an axis longer than
    the volume's is not cut (slabs). "auto" or None: chosen. Stretches of lower levels find their own tile
    within the same memory.
    stretch: levels a stretch, from the highest resolution down, the same for all sides: "1" tiles the top
    level, "2" the two upper ones together, "2+1" those and then the next apart, "3" three as one; levels that
    are not named are run whole, as are layers that are not local, such as attention. "auto": chosen.
    budget: GiB that a whole training step may take. What is left to "auto" is the plan of least recomputation
    whose estimated peak fits, or the one of least memory where none does. Without a budget: with a tile
    given, the least memory; else the least memory whose step takes at most WORK_BOUND times as long as a
    checkpointed one. No plan has a tensor of more than MOST_ELEMENTS. What a card has free is for the caller
    to find out: the plan is the same on every machine.
    group: the ranks of this process group share the tiles of the same volume, in forward, backward and
    inference; None: this process alone. Layers outside of stretches run on every rank alike, and a rank
    beyond the number of tiles idles, so what is left to "auto" counts the ranks. Every rank must have the
    same weights and settings and make the same calls in the same order with the same values: input,
    requires_grad, backward; a rank that does not leaves the others waiting. Each then ends with the same
    output and the same whole gradients, bit for bit where kernels are deterministic: a step must not sum or
    average them over the ranks again. Where the tiles of one rank fail, all raise (tiles.together). A copy of
    this object has no group. rehearsal: for predicting memory on tensors without data: the largest tile runs
    twice, and no other; ranks take no part.
    Raises ValueError for a tile that is not three positive integers, a stretch that is not such a sum, or a
    group that this process does not belong to.
    """
    def __init__(self, network: Network, tile: Sequence[int] | str | None = None, stretch: str = "auto",
                 budget: float | None = None, group: Group = None, rehearsal: bool = False):
        tile = None if tile is None or tile == "auto" else tuple(tile)
        if tile is not None and (len(tile) != 3 or not all(isinstance(n, int) and n > 0 for n in tile)):
            raise ValueError(f"memory tile must be three positive integers D,H,W in voxels of the input, or "
                             f"auto; got {tile}")
        stretch = str(stretch)
        if stretch != "auto" and not all(n.isdecimal() and int(n) > 0 for n in stretch.split("+")):
            raise ValueError(f"memory stretch must be auto or levels a stretch such as 1, 2 or 2+1; "
                             f"got {stretch!r}")
        if group is not None and not isinstance(group, getattr(torch.distributed, "ProcessGroup", ())):
            raise ValueError(f"memory group must be a process group of torch.distributed that this process "
                             f"belongs to, got {group!r}")
        self.network = network
        self.tile, self.stretch, self.budget, self.rehearsal = tile, stretch, budget, rehearsal
        self.group = group if group is not None and group.size() > 1 else None
        self.chosen: dict[tuple, TilePlan] = {}  # by size, batch and dtype
        self.used: TilePlan | None = None        # the last one that something was run by

    def __getstate__(self) -> dict:
        return self.__dict__ | {"group": None}   # for copy and pickle, which know no process groups

    def plans(self, size: Sequence[int], batch: int = 1,
              dtype: torch.dtype = torch.float32) -> list[TilePlan]:
        """By rising work and falling peak, for inputs of `size`, rounded up to what the strides need.

        dtype: of the activations; bfloat16 under AMP.
        """
        strides = zip(*(side.stride for side in self.network.sides))
        size = tuple(-(-n // lcm(*each)) * lcm(*each) for n, each in zip(size, strides))
        stretches = () if self.stretch == "auto" else (self.stretch,)
        ranks = 1 if self.group is None else self.group.size()
        return make_plans(self.network, size, batch, dtype.itemsize, self.tile, stretches, ranks)

    def plan(self, size: Sequence[int], batch: int, dtype: torch.dtype) -> TilePlan:
        """The one that is used for such an input: what `auto` comes to, and nothing else decides it."""
        key = tuple(size), batch, dtype
        if key not in self.chosen:
            budget = None if self.budget is None else self.budget * 2 ** 30
            plans = self.plans(size, batch, dtype)
            self.chosen[key] = choose(plans, budget, least_memory=self.tile is not None)
        return self.chosen[key]

    def run(self, side: int, x: Tensor, size: Sequence[int], whole: Callable[[nn.Module, Tensor], Tensor],
            tell: Callable[[float], None] | None = None) -> Tensor:
        """x through the layers of a side: stretches in tiles, each layer outside of them by whole(layer, x).

        size: of the network's input that x is or stands for. tell: told the layers done, after each tile.
        """
        group = None if self.rehearsal else self.group
        plan = self.used = self.plan(size, len(x), activation_dtype(x))
        layers = self.network.sides[side].layers
        for start, stop, tile_units in plan.segments[side]:
            if tile_units is None:
                x = whole(layers[start], x)
                continue

            def tick(share: float, start: int = start, stop: int = stop) -> None:
                tell(start + share * (stop - start))

            told = None if tell is None else tick
            x = run_tiled(layers[start:stop], tile_units, x, told, group, self.rehearsal)
        return x
