"""Attention among the points of a set, in windows: five ways to cut them, one way to compute.

Needs torch, and sparse_conv.py beside it.

    cut = windows(code, bits, "swin", size=8, turn=0)       # which points attend to one another
    h = Block(width=512, heads=8)(h, cut, coords)            # h (N, C) -> (N, C)

Ways to cut, `turn` being the number of the block, for those that alternate:
    full            every point of a sample
    swin            cubes of size^3; moved by half a cube in odd blocks (arXiv:2103.14030, Sec. 3.2)
    shift_window    `size` points in a row along a Z-curve; the grid moved by half a window in odd blocks
    shift_sequence  the same along one curve, the cuts moved by half a window in odd blocks
    shift_order     the curve itself changes: Z, Z with its axes exchanged, Hilbert, Hilbert exchanged
                    (Point Transformer V3, arXiv:2312.10035, Sec. 4.2)

Along a curve n points make ceil(n / size) windows of equal length, give or take one: none is filled up with
points of another, and none wraps round from the end to the beginning.
Windows of similar length form one batch: each is padded to the next power of two and its padding masked, so
scaled_dot_product_attention runs a few times whatever the number of windows.

Shapes: N points, C channels, h heads, L points of a padded window.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_conv import coords_of, encode_coords, sample_of, take

MODES = ("full", "swin", "shift_window", "shift_sequence", "shift_order")
TURNS = {"full": 1, "swin": 2, "shift_window": 2, "shift_sequence": 2, "shift_order": 4}  # different cuts
LEAST = 16                           # points that a window is padded to at least


class Batch(NamedTuple):
    """Windows that are computed at once."""
    count: int
    length: int                      # L, padding included
    mask: Tensor | None              # (count, 1, 1, L) bool: which are points; None: all are


class Windows(NamedTuple):
    """Who attends to whom."""
    there: Tensor                    # (K,) int64: the points of all windows one after another, N for padding
    back: Tensor                     # (N,) int64: where each point lies in `there`
    batches: tuple[Batch, ...]       # K is the sum of count x length


# -------------------------------------------------------------------------------- cutting

def windows(code: Tensor, bits: int, mode: str, size: int = 8, turn: int = 0) -> Windows:
    """code (N,) ascending -> the windows of a block.

    size: points on an edge of a cube (swin), points in a window (shift_*). turn: number of the block.
    Raises ValueError for a mode that there is not.
    """
    if mode not in MODES:
        raise ValueError(f"attention={mode}; choose one of {', '.join(MODES)}")
    sample = sample_of(code, bits)
    turn = turn % TURNS[mode]
    if mode == "full":
        return from_groups(sample)
    if mode == "swin":
        cube = (coords_of(code, bits) + turn * (size // 2)).div(size, rounding_mode="floor")
        return from_groups(encode_coords(cube, sample, bits))    # cubes have smaller coordinates than points

    # The rank of each point along the curve of its own sample, and how many points that has.
    order = curve(code, bits, mode, size, turn).argsort(stable=True)
    _, counts = torch.unique_consecutive(sample, return_counts=True)
    number = torch.repeat_interleave(torch.arange(len(counts), device=code.device), counts)
    first = counts.cumsum(0) - counts
    rank = torch.empty_like(code)
    rank[order] = torch.arange(len(code), device=code.device) - first[number]

    # rank r of n points goes to window floor(r k / n) of k = ceil(n / size); half a window later in odd
    # blocks of shift_sequence, which makes one window more.
    pieces = (counts + size - 1) // size
    late = counts if mode == "shift_sequence" and turn else torch.zeros_like(counts)
    window = (2 * rank * pieces[number] + late[number]) // (2 * counts[number])
    return from_groups(number * (len(code) + 1) + window)


def curve(code: Tensor, bits: int, mode: str, size: int, turn: int) -> Tensor:
    """(N,) int64 that ascend along the curve that is cut into windows, sample by sample."""
    if mode == "shift_sequence" or turn == 0:
        return code
    coords, sample = coords_of(code, bits), sample_of(code, bits)
    if mode == "shift_window":
        # Half the edge of a full cube of that many points. The moved grid needs one bit more.
        half = max(1, round(size ** (1 / 3) / 2))
        return encode_coords(coords + half, sample, bits + 1)
    if turn % 2:
        coords = coords.flip(1)
    return encode_coords(coords, sample, bits) if turn < 2 else hilbert(coords, sample, bits)


def hilbert(coords: Tensor, sample: Tensor, bits: int) -> Tensor:
    """coords (N, 3) -> (N,) int64 along a Hilbert curve: neighbours in order are neighbours in space.

    Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707 (2004), AxestoTranspose.
    """
    x = list(coords.long().unbind(1))
    # Undo the rotations and reflections of each level, from the coarsest to the finest.
    for level in reversed(range(1, bits)):
        low = (1 << level) - 1
        for axis in range(3):
            upper = (x[axis] >> level & 1).bool()
            exchange = (x[0] ^ x[axis]) & low
            x[0] = x[0] ^ torch.where(upper, low, exchange)
            if axis:
                x[axis] = x[axis] ^ torch.where(upper, 0, exchange)
    # Gray code.
    x[1] = x[1] ^ x[0]
    x[2] = x[2] ^ x[1]
    flips = torch.zeros_like(x[0])
    for level in reversed(range(1, bits)):
        flips = torch.where((x[2] >> level & 1).bool(), flips ^ ((1 << level) - 1), flips)
    return encode_coords(torch.stack([axis ^ flips for axis in x], 1), sample, bits)


def from_groups(group: Tensor) -> Windows:
    """group (N,) int64, equal for points of one window -> Windows."""
    count = len(group)
    order = group.argsort(stable=True)
    _, lengths = torch.unique_consecutive(group[order], return_counts=True)
    first = lengths.cumsum(0) - lengths
    # The next power of two, in integers: 17..32 -> 32.
    padded = torch.full_like(lengths, LEAST)
    while bool((padded < lengths).any()):
        padded = torch.where(padded < lengths, 2 * padded, padded)

    there, batches = [], []
    for length in padded.unique().tolist():
        which = (padded == length).nonzero()[:, 0]
        length = min(length, int(lengths[which].max()))          # no padding that no window needs
        place = torch.arange(length, device=group.device)
        is_point = place < lengths[which, None]                  # (count, L)
        rows = order[(first[which, None] + place).clamp_max(count - 1)]
        there.append(torch.where(is_point, rows, count).flatten())
        mask = None if bool(is_point.all()) else is_point[:, None, None]
        batches.append(Batch(len(which), length, mask))
    there = torch.cat(there) if there else group
    back = torch.empty_like(group)
    is_point = there < count
    back[there[is_point]] = is_point.nonzero()[:, 0]
    return Windows(there, back, tuple(batches))


# -------------------------------------------------------------------------------- where a point is

def sine_positions(coords: Tensor, width: int) -> Tensor:
    """coords (N, 3) -> (N, width) float32: sines and cosines of floor(width / 6) frequencies an axis, then
    zeros (arXiv:1706.03762, Sec. 3.5, with 10,000^(-i / frequencies)).
    """
    count = width // 6
    steps = torch.arange(count, device=coords.device, dtype=torch.float32)
    frequency = 10000.0 ** (-steps / max(count, 1))
    angle = coords.float()[:, :, None] * frequency                # (N, 3, F)
    waves = torch.cat([angle.sin(), angle.cos()], 2).flatten(1)
    return F.pad(waves, (0, width - waves.shape[1]))


def rotations(coords: Tensor, head: int) -> tuple[Tensor, Tensor]:
    """coords (N, 3) -> cosines and sines (N, 1, pairs) for `rotate`: floor(head / 6) frequencies an axis
    (rotary positions, arXiv:2104.09864, Sec. 3.2.2).
    """
    count = head // 6
    steps = torch.arange(count, device=coords.device, dtype=torch.float32)
    frequency = 10000.0 ** (-steps / max(count, 1))
    angle = (coords.float()[:, :, None] * frequency).flatten(1)[:, None]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (N, h, head): its pairs of numbers turned by their angles; numbers beyond the last pair stay."""
    cos, sin = turn
    pairs = cos.shape[-1]
    a, b, rest = x[..., :pairs], x[..., pairs:2 * pairs], x[..., 2 * pairs:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1).to(x.dtype)


# -------------------------------------------------------------------------------- layers

class Attention(nn.Module):
    """Multi-head self-attention in windows (arXiv:1706.03762, Sec. 3.2).

    x (N, C), windows, coords (N, 3) -> (N, C). positions: ape (none in here: they are added to the network's
    input) | rope. qk_norm: queries and keys divided by their root mean square per head, in float32, times a
    learned gain (arXiv:2302.05442, Sec. 2).
    """
    def __init__(self, width: int, heads: int, positions: str = "ape", qk_norm: bool = False):
        super().__init__()
        self.heads, self.head = heads, width // heads
        self.rope = positions == "rope"
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.q_norm = nn.RMSNorm(self.head) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head) if qk_norm else None

    def forward(self, x: Tensor, cut: Windows, coords: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(len(x), 3, self.heads, self.head).unbind(1)   # each (N, h, head)
        if self.q_norm is not None:
            with torch.autocast(x.device.type, enabled=False):
                q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        if self.rope:
            turn = rotations(coords, self.head)
            q, k = rotate(q, turn), rotate(k, turn)
        return self.out(attend(q, k, v, cut))


def attend(q: Tensor, k: Tensor, v: Tensor, cut: Windows) -> Tensor:
    """q, k, v (N, h, head) -> (N, h head): softmax(q k^T / sqrt(head)) v within each window."""
    count, heads, head = q.shape
    if not count:
        return v.flatten(1)
    rows = take(torch.stack([q, k, v], 1).flatten(1), cut.there, cut.back)       # (K, 3 h head)
    found, start = [], 0
    for number, length, mask in cut.batches:
        part = rows[start:start + number * length].view(number, length, 3, heads, head)
        one_q, one_k, one_v = part.permute(2, 0, 3, 1, 4).unbind(0)              # each (windows, h, L, head)
        out = F.scaled_dot_product_attention(one_q, one_k, one_v, attn_mask=mask)
        found.append(out.transpose(1, 2).reshape(number * length, heads * head))
        start += number * length
    return take(torch.cat(found), cut.back, cut.there)


class Block(nn.Module):
    """Transformer block, norm first: x + attention(norm(x)), then x + mlp(norm(x)); x (N, C)."""
    def __init__(self, width: int, heads: int, mlp_ratio: float = 4, positions: str = "ape",
                 qk_norm: bool = False):
        super().__init__()
        hidden = int(width * mlp_ratio)
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attention = Attention(width, heads, positions, qk_norm)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))

    def forward(self, x: Tensor, cut: Windows, coords: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cut, coords)
        return x + self.mlp(self.norm2(x))
