"""What a sparse network has to know of a set of points besides their values, worked out once a batch.

    tables = tables_of(code, size, samples=2)          # levels, families, neighbours
    tables = with_cuts(tables, "swin", window=8)       # and who attends to whom
    tables = with_tiles(tables, edge=8, halo=4)        # and the tiles of mode "tile"

Level 0 are the points, level 3 the tokens: cells of 8x8x8 voxels that hold a point. All that depends on where
points are happens here, so that the network itself is products and gathers of known sizes: its memory can be
predicted on tensors without data.

A tile is a cube of `edge` tokens, a power of two, and so at each level one stretch of consecutive points. It
is computed with the tokens around it, up to `halo` away, of which it needs the values and not the results.

Shapes: N points (N_l at level l), T tokens.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_attention import TURNS, Windows, windows
from sparse_conv import Family, bits_for, children_of, coords_of, encode_coords, family, neighbours, sample_of

LEVELS = 3                           # halvings from points to tokens
TOKEN = 1 << LEVELS                  # voxels on an edge of a token
VOLUME = TOKEN ** 3                  # voxels of a token


class Tile(NamedTuple):
    """A cube of tokens and what lies around it: of each level, from the points to the tokens, R stretches of
    consecutive rows. The rows themselves are made where they are used: all tiles' together would take more
    memory than the points.
    """
    first: tuple[Tensor, ...]        # (R,) int64, where each stretch begins
    length: tuple[Tensor, ...]       # (R,) int64, at least 1
    counts: tuple[int, ...]          # n_l, their sum
    own: tuple[tuple[int, int], ...]  # first and end, among them, of those that the tile is responsible for

    def rows(self, level: int) -> Tensor:
        """(n_l,) int64, ascending."""
        first, length, count = self.first[level], self.length[level], self.counts[level]
        jump = first - (length.cumsum(0) - length)               # row - its number among the tile's
        jump = torch.repeat_interleave(jump, length, output_size=count)
        return jump + torch.arange(count, device=first.device)


class Tables(NamedTuple):
    """A set of points, sample after sample in Z-order."""
    size: tuple[int, int, int]       # of the grid, voxels D H W
    bits: int                        # of a coordinate of level 0
    samples: int
    code: tuple[Tensor, ...]         # of each level: (N_l,) int64 ascending
    families: tuple[Family, ...]     # of level 0 in 1, of 1 in 2, of 2 in 3
    neighbours: tuple[Tensor, ...]   # of each level: (N_l, 27) int32
    place: Tensor                    # (N_0,) int64: 512 x token + place of a point among its voxels
    coords: Tensor                   # (T, 3) int64, of the tokens
    per_sample: tuple[int, ...]      # tokens of each sample
    cuts: tuple[Windows, ...] = ()   # of attention, for blocks in turn
    encoder_tiles: tuple[Tile, ...] = ()
    decoder_tiles: tuple[Tile, ...] = ()
    tile_weight: float = 1.0         # all tiles / those in decoder_tiles

    @property
    def points(self) -> int:
        return len(self.code[0])

    @property
    def tokens(self) -> int:
        return len(self.code[-1])


# -------------------------------------------------------------------------------- a set of points

def sorted_points(coords: Tensor, sample: Tensor | int, feats: Tensor,
                  size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """coords (N, 3) in any order, feats (N, C) -> code (N,) ascending, feats in that order.

    Raises ValueError where a point lies outside of the grid, or two at one place.
    """
    limit = torch.as_tensor(tuple(size), device=coords.device)
    outside = ((coords < 0) | (coords >= limit)).any(1)
    if bool(outside.any()):
        where = coords[outside][0].tolist()
        raise ValueError(f"points: {int(outside.sum())} of {len(coords)} lie outside of the grid "
                         f"{','.join(map(str, size))}, the first at {where}")
    code, order = encode_coords(coords, sample, grid_bits(size)).sort()
    if len(code) > 1 and bool((code[1:] == code[:-1]).any()):
        raise ValueError("points: two lie at the same voxel; keep one of them")
    return code, feats[order]


def grid_bits(size: Sequence[int]) -> int:
    """Bits of a coordinate; enough for a token."""
    return max(bits_for(max(size)), LEVELS)


def tables_of(code: Tensor, size: Sequence[int], samples: int = 1) -> Tables:
    """code (N,) ascending, of points in a grid of `size` -> Tables without cuts and tiles."""
    bits = grid_bits(size)
    codes, families = [code], []
    for _ in range(LEVELS):
        families.append(family(codes[-1]))
        codes.append(families[-1].parent)
    around = tuple(neighbours(c, bits - level) for level, c in enumerate(codes))

    # The token of a point: its parent's parent's parent. Its place: the last three octal digits of its code.
    token = torch.arange(len(codes[-1]), device=codes[0].device)
    for kin in reversed(families):
        token = token[kin.slot // 8]
    place = token * VOLUME + (codes[0] & (VOLUME - 1))
    token_bits = bits - LEVELS
    of_sample = sample_of(codes[-1], token_bits)
    per_sample = torch.bincount(of_sample, minlength=samples).tolist()
    return Tables(tuple(size), bits, samples, tuple(codes), tuple(families), around, place,
                  coords_of(codes[-1], token_bits), tuple(per_sample))


def with_cuts(tables: Tables, mode: str, window: int) -> Tables:
    """The same with the windows of attention."""
    code, bits = tables.code[-1], tables.bits - LEVELS
    return tables._replace(cuts=tuple(windows(code, bits, mode, window, turn) for turn in range(TURNS[mode])))


def grown(code: Tensor, exists: Tensor, bits: int) -> tuple[Family, Tensor, Tensor]:
    """code (M,) of a level of `bits` and which of its children exist (M, 8) -> their family, their codes
    (N,), their neighbours (N, 27). Every point has to have a child.
    """
    below = children_of(code, exists)
    return family(below), below, neighbours(below, bits + 1)


# -------------------------------------------------------------------------------- tiles

def halo_of(convolutions: Sequence[int], decoder: bool) -> int:
    """Tokens around a tile on which its results depend.

    convolutions: how many of them follow one another at each level, from the points (0) to the tokens (3);
    a convolution looks one point to each side. Worked out for the tile [0, T) at its lower end, from the
    results back to the tokens that are needed.
    """
    if decoder:
        # Results are points from 0 on. From the finest level up: a parent of point x is floor(x / 2).
        low = 0
        for count in convolutions[:-1]:
            low = (low - count) // 2
        return -(low - convolutions[-1])
    # Results are tokens from 0 on. From the coarsest level down: the first child of point x is 2 x, and the
    # halo is rounded up to whole tokens.
    low = 0
    for count in reversed(convolutions[1:]):
        low = 2 * (low - count)
    low = (low - convolutions[0]) // TOKEN
    return -low


def with_tiles(tables: Tables, edge: int, encoder_halo: int, decoder_halo: int, pick: int | None = None,
               generator: torch.Generator | None = None) -> Tables:
    """The same with tiles of `edge` tokens, a power of two.

    pick: only so many of the decoder's tiles, drawn at random; `tile_weight` makes up for the others.
    Raises ValueError where edge is no power of two.
    """
    if edge < 1 or edge & (edge - 1):
        raise ValueError(f"a tile of {edge} tokens ({edge * TOKEN} voxels); take a power of two")
    if not tables.tokens:
        return tables
    # A tile as large as the grid ends with its sample, whose number stands above the coordinates.
    code, level = tables.code[-1], min(edge.bit_length() - 1, tables.bits - LEVELS)
    starts = (torch.unique_consecutive(code >> 3 * level, return_counts=True)[1]).cumsum(0).tolist()
    ranges = list(zip([0, *starts[:-1]], starts))
    encoder = tuple(tile_of(tables, first, end, edge, encoder_halo) for first, end in ranges)
    weight = 1.0
    if pick is not None and pick < len(ranges):
        weight = len(ranges) / pick
        chosen = torch.randperm(len(ranges), generator=generator)[:pick].sort().values.tolist()
        ranges = [ranges[number] for number in chosen]
    decoder = tuple(tile_of(tables, first, end, edge, decoder_halo) for first, end in ranges)
    return tables._replace(encoder_tiles=encoder, decoder_tiles=decoder, tile_weight=weight)


def tile_of(tables: Tables, first: int, end: int, edge: int, halo: int) -> Tile:
    """The tile whose own tokens are the rows first to end, within `halo` tokens of which lies the rest."""
    # First the tokens: those of the same sample whose distance from the cube along every axis is within halo.
    token_bits = tables.bits - LEVELS
    sample = sample_of(tables.code[-1], token_bits)
    corner = tables.coords[first] // edge * edge
    near = (tables.coords >= corner - halo) & (tables.coords < corner + edge + halo)
    inside = near.all(1) & (sample == sample[first])

    # First and end of each stretch of them. The tile's own tokens, the rows first to end, lie in one.
    edges = torch.nonzero(torch.diff(inside.long(), prepend=inside.new_zeros(1).long(),
                                     append=inside.new_zeros(1).long()))[:, 0]
    bounds = torch.cat([edges, edges.new_tensor([first, end])])

    # Then at each level the rows that belong to these: children of consecutive parents are consecutive.
    starts, lengths, counts, own = [], [], [], []
    for kin in (None, *reversed(tables.families)):
        if kin is not None:
            bounds = torch.searchsorted(kin.slot, bounds * 8)
        low, high = bounds[:-2:2], bounds[1:-2:2]
        length = high - low
        # Rows of the tile before its own: the stretches before theirs, and what of theirs comes before.
        mine, mine_end = bounds[-2:].tolist()
        before = int(((bounds[-2] - low).clamp_min(0).minimum(length)).sum())
        starts.append(low.clone())
        lengths.append(length)
        counts.append(int(length.sum()))
        own.append((before, before + mine_end - mine))
    return Tile(*(tuple(reversed(each)) for each in (starts, lengths, counts, own)))


def restricted(tables: Tables, tile: Tile, levels: Sequence[int]) -> Tables:
    """The tables of a tile's points alone, from gathers in the whole ones: of known sizes.

    levels: those of which neighbours are wanted; of the others the table is empty.
    """
    every = [tile.rows(level) for level in range(LEVELS + 1)]
    codes = [code[rows] for code, rows in zip(tables.code, every)]
    number = []                      # of each level: the row among the tile's points, n_l for those outside
    for code, rows in zip(tables.code, every):
        new = torch.full((len(code) + 1,), len(rows), dtype=torch.int32, device=code.device)
        mine = torch.arange(len(rows), dtype=torch.int32, device=code.device)
        number.append(new.index_copy_(0, rows, mine))

    def renamed(table: Tensor, rows: Tensor, new: Tensor) -> Tensor:
        some = table.index_select(0, rows)
        return new.index_select(0, some.flatten()).view(some.shape)
    around = [table[:0] for table in tables.neighbours]
    for level in levels:
        around[level] = renamed(tables.neighbours[level], every[level], number[level])
    families = []
    for level, kin in enumerate(tables.families):
        slot = kin.slot[every[level]]
        slot = number[level + 1][slot // 8] * 8 + slot % 8
        children = renamed(kin.children, every[level + 1], number[level])
        families.append(Family(codes[level + 1], children, slot))
    place = tables.place[every[0]]
    place = number[-1][place // VOLUME].long() * VOLUME + place % VOLUME
    return tables._replace(code=tuple(codes), families=tuple(families), neighbours=tuple(around), place=place,
                           coords=tables.coords[every[-1]], cuts=(), encoder_tiles=(), decoder_tiles=())
