"""Which stretches, which tiles: a cost model made of the same spans as the tiles themselves. Needs torch and tiles.py."""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from tiles import Fork, Op, out_size, rates, spans, unroll


class Segment(NamedTuple):
    """layers[start:stop] of the encoder or decoder."""
    start: int
    stop: int
    step: tuple[int, int, int] | None                            # of a tiled stretch: units a tile; None: one checkpointed layer


class TilePlan(NamedTuple):
    """A setting of the dial, memory("tile", plan.tile, plan.stretch), and what it is expected to cost."""
    tile: tuple[int, int, int]                                   # (D, H, W) in voxels of the input
    stretch: str                                                 # levels a stretch, highest resolution first: "1", "2", "2+1"
    work: float                                                  # time of a training step over the checkpointed one's
    peak_bytes: int                                              # of a training step: weights, gradients, AdamW's moments, activations
    segments: tuple[tuple[Segment, ...], tuple[Segment, ...]]    # what to do with the layers of encoder and decoder


class Piece(NamedTuple):
    """layers[start:stop]: local ones to run as a stretch, or a single one to checkpoint (group None)."""
    start: int
    stop: int
    group: int | None                                            # which stretch of the setting
    ops: tuple[Op, ...] | None
    size: tuple[int, int, int]                                   # (D, H, W) of its input
    after: tuple[int, int, int]                                  # of its output
    held: tuple[int, int]                                        # elements of its input and of its output


class Tiling(NamedTuple):
    """What a piece costs in tiles of `step` units."""
    work: float                                                  # a quarter of a step's multiply-adds, halos and passes for norms included
    elements: float                                              # activations alive while one tile's gradient is computed
    step: tuple[int, int, int] | None


TILE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)                     # tiles along an axis that `auto` tries
LEAST_TILE = 8                                                   # voxels of a piece's finest grid; below, nearly all is halo
WORK_BOUND = 1.4                                                 # without a budget: the least memory within this much time
MOVE_COST = 32                                                   # multiply-adds that reading and writing one element is worth


def levels(layers: Sequence[nn.Module]) -> list[int]:
    """Level of each layer by the finer of its two grids, 0 the finest: a down-convolution goes with what precedes it."""
    before, finest = (prod(rates(flatten(layers), axis)[0] for axis in range(3))), []
    for layer in layers:
        ops, after = flatten([layer]), before
        for axis in range(3):
            rate = rates(ops, axis)
            after = after * rate[-1] // rate[0]
        finest.append(max(before, after))
        before = after
    return [sorted(set(finest), reverse=True).index(f) for f in finest]


def flatten(layers: Sequence[nn.Module]) -> tuple[Op, ...]:
    """Operations of the local ones among `layers`."""
    return tuple(op for layer in layers for op in unroll(layer) or ())


def channels_in(layers: nn.Module) -> int:
    return next(m.in_channels for m in layers.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)))


def pieces(layers: nn.Sequential, size: Sequence[int], groups: Sequence[int]) -> list[Piece]:
    """Cut the layers: groups[0] levels from the finest make a stretch, the next groups[1] another ...; the rest is checkpointed."""
    group_of = [g for g, count in enumerate(groups) for _ in range(count)]
    found: list[Piece] = []
    for i, (layer, level) in enumerate(zip(layers, levels(layers))):
        ops = unroll(layer)
        group = group_of[level] if ops is not None and level < len(group_of) else None
        after, width = size, [m.out_channels for m in layer.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))][-1]
        for op in ops or ():
            after = tuple(out_size(op, axis, n) for axis, n in enumerate(after))
        held = channels_in(layer) * prod(size), width * prod(after)
        if found and group is not None and found[-1].group == group:
            last = found.pop()
            found.append(last._replace(stop=i + 1, ops=(*last.ops, *ops), after=after, held=(last.held[0], held[1])))
        else:
            found.append(Piece(i, i + 1, group, None if ops is None else tuple(ops), tuple(size), tuple(after), held))
        size = after
    return found


def units(piece: Piece) -> list[int]:
    return [-(-n // rates(piece.ops, axis)[0]) for axis, n in enumerate(piece.size)]


def tiling(piece: Piece, step: tuple[int, int, int] | None, ranks: int = 1) -> Tiling:
    """Cost of a piece in tiles of `step` units, shared by so many ranks, or whole, as checkpointing runs it, where step is None."""
    from vae3d import GroupNorm
    if piece.ops is None:                                        # attention: its convolutions, q k^T and the product with v, flash
        voxels = prod(piece.size)
        return Tiling(piece.held[0] * (4 * piece.held[0] // voxels + 2 * voxels), 10 * piece.held[0], None)
    found = [spans(piece.ops, axis, n, step[axis] if step else n, len(piece.ops)) for axis, n in enumerate(piece.size)]
    lengths = [list(zip(*([cut.length for cut in span.cuts] for span in axis))) for axis in found]  # per axis, operation, tile
    norms = [i for i, op in enumerate(piece.ops) if step and isinstance(op, GroupNorm)]
    width, work, alive = piece.held[0] // prod(piece.size), 0.0, []
    for i, op in enumerate(piece.ops):
        taps = 0.0
        if isinstance(op, (nn.Conv3d, nn.ConvTranspose3d)):
            width, taps = op.out_channels, op.weight.numel() / op.out_channels
            done = work                                          # before the last convolution, when the loop is over
        passes = 1 + sum(i < norm for norm in norms)
        voxels, largest = prod(sum(axis[i]) for axis in lengths), prod(max(axis[i]) for axis in lengths)  # tiles are products of spans
        work += passes * voxels * width * (taps + MOVE_COST)
        alive.append(0 if isinstance(op, Fork) else width * largest)
    if step is None:                                             # of forward, again, backward twice as long, torch's checkpoint
        work -= (work - done) / 4                                # leaves out again what nothing is kept of: from the last convolution on
    else:
        tiles = prod(map(len, found))
        work *= -(-tiles // ranks) / tiles                       # of the rank that has most
    return Tiling(work, sum(alive) + 2 * max(alive), step)


def cheapest(costs: Sequence[Tiling], limit: float) -> Tiling:
    """Least work within `limit` elements; where nothing fits, the fewest elements."""
    return min((c for c in costs if c.elements <= limit), default=min(costs, key=lambda c: c.elements), key=lambda c: c.work)


def pareto(found: list, work, memory) -> list:
    """Those that nothing else beats in both, by rising work."""
    kept: list = []
    for item in sorted(found, key=lambda item: (work(item), memory(item))):
        if not kept or memory(item) < memory(kept[-1]):
            kept.append(item)
    return kept


def steps_of(piece: Piece, tile: Sequence[int]) -> tuple[int, ...]:
    """Units of a tile that is at most so many voxels of the piece's finer grid, all tiles as equal as units allow."""
    steps = []
    for axis, n in enumerate(units(piece)):
        count = -(-n // max(1, tile[axis] // max(rates(piece.ops, axis))))
        steps.append(-(-n // count))
    return tuple(steps)


def tile_ladder(fine: Sequence[int]) -> list[tuple[int, int, int]]:
    """Tiles that `auto` tries on a grid, from the whole of it down; each cuts the longest axis of the one before, for the least halo."""
    counts = [[n for n in TILE_COUNTS if n == 1 or size >= n * LEAST_TILE] for size in fine]
    at, found = [0, 0, 0], []
    while True:
        tile = tuple(-(-size // each[i]) for size, each, i in zip(fine, counts, at))
        found.append(tile)
        open_axes = [axis for axis in range(3) if at[axis] + 1 < len(counts[axis])]
        if not open_axes:
            return found
        at[max(open_axes, key=lambda axis: tile[axis])] += 1


def make_plans(sides: Sequence[nn.Sequential], sizes: Sequence[tuple[int, int, int]], batch_bytes: int, weights: int,
               tile: Sequence[int] | None, stretches: Sequence[str], ranks: int = 1) -> list[TilePlan]:
    """Every setting of the dial worth having, by rising work and falling peak.

    sides, sizes: encoder and decoder, (D, H, W) of their inputs. batch_bytes: of one activation over the batch. weights: their number.
    The tile is that of the stretches that reach the volume's own resolution. A stretch of lower levels takes the tile of least work
    that needs no more memory than theirs: no two are computed at once, so the largest decides.
    """
    tables: dict = {}                                            # the same piece occurs in several settings

    def cost(piece: Piece, step: tuple[int, int, int] | None) -> Tiling:
        key = piece.size, piece.held, piece.ops, step
        if key not in tables:
            tables[key] = tiling(piece, step, ranks)
        return tables[key]

    base = sum(cost(piece, None).work for side, size in zip(sides, sizes) for piece in pieces(side, size, ()))
    found = []
    for stretch in stretches:
        parts = [pieces(side, size, [int(n) for n in stretch.split("+")]) for side, size in zip(sides, sizes)]
        order = [piece for side in parts for piece in side]
        tiled = [piece for piece in order if piece.group is not None]
        top = [piece for piece in tiled if sizes[0] in (piece.size, piece.after)]
        lower = {id(piece): [cost(piece, steps_of(piece, t)) for t in tile_ladder([max(pair) for pair in zip(piece.size, piece.after)])]
                 for piece in tiled if piece not in top}
        for choice in [tuple(tile)] if tile else tile_ladder(sizes[0]):
            costs = {id(piece): cost(piece, steps_of(piece, choice) if piece in top else None) for piece in order if id(piece) not in lower}
            limit = max(costs[id(piece)].elements for piece in top)
            costs.update((key, cheapest(each, limit)) for key, each in lower.items())
            peak, kept, recon = 0.0, 0, order[-1].held[1]
            for piece in order:                                  # its backward: inputs up to here, reconstruction, two gradients
                kept += piece.held[0]
                peak = max(peak, kept + recon + sum(piece.held) + costs[id(piece)].elements)
            segments = tuple(tuple(Segment(p.start, p.stop, costs[id(p)].step) for p in side) for side in parts)
            work = sum(each.work for each in costs.values()) / base
            found.append(TilePlan(choice, stretch, work, int(peak * batch_bytes) + 16 * weights, segments))
    return pareto(found, lambda plan: plan.work, lambda plan: plan.peak_bytes)


def compositions(total: int) -> list[str]:
    """Every way to make stretches of the levels from the finest down: 2 -> "1", "1+1", "2"."""
    found = {1: ["1"]}
    for n in range(2, total + 1):
        found[n] = [str(n)] + [f"{first}+{rest}" for first in range(1, n) for rest in found[n - first]]
    return [each for n in range(1, total + 1) for each in found[n]]
