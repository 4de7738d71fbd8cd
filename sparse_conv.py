"""Points of a voxel grid in Z-order, and submanifold convolution on them. Needs torch alone.

    code = encode_coords(coords, sample, bits)   # (N,) int64; sort it, and the features with it
    table = neighbours(code, bits)               # (N, 27) int32
    y = SubMConv3d(16, 32)(x, table)             # x (N, 16) -> y (N, 32), on the same points

A point is one int64 code: the number of its sample, and below it the bits of its coordinates d, h, w in turn
(Morton 1966). Codes in ascending order follow a Z-curve, which makes the rest short:
- the eight children of a point are `code << 3 | place`, its parent is `code >> 3`, and the children of
  ordered parents are ordered;
- a neighbour is found by one binary search;
- a cube whose edge is a power of two is one stretch of consecutive points.

Submanifold convolution (Graham, Engelcke and van der Maaten, arXiv:1711.10275, Sec. 3) computes a convolution
at the points that exist, and takes everything else for zero. Here it gathers the neighbours of some thousand
points at a time and multiplies once: no rulebook, no atomic additions, the same bits in every run.

Shapes: N points, M parents, C channels in, O channels out.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK = 2 ** 22                      # numbers that are gathered at a time: 16 MiB of float32
MAX_BITS = 20                        # of a coordinate: 3 x 20 of them and those of the sample fit int64
OFFSETS = [(d, h, w) for d in (-1, 0, 1) for h in (-1, 0, 1) for w in (-1, 0, 1)]  # as a 3x3x3 kernel lies


# -------------------------------------------------------------------------------- codes

def spread(x: Tensor) -> Tensor:
    """(N,) int64 of at most 21 bits -> the same bits at every third place."""
    x = (x | x << 32) & 0x1F00000000FFFF
    x = (x | x << 16) & 0x1F0000FF0000FF
    x = (x | x << 8) & 0x100F00F00F00F00F
    x = (x | x << 4) & 0x10C30C30C30C30C3
    return (x | x << 2) & 0x1249249249249249


def gathered(x: Tensor) -> Tensor:
    """The inverse of `spread`: every third bit of (N,) int64."""
    x = x & 0x1249249249249249
    x = (x | x >> 2) & 0x10C30C30C30C30C3
    x = (x | x >> 4) & 0x100F00F00F00F00F
    x = (x | x >> 8) & 0x1F0000FF0000FF
    x = (x | x >> 16) & 0x1F00000000FFFF
    return (x | x >> 32) & 0x1FFFFF


def bits_for(length: int) -> int:
    """Bits of a coordinate in [0, length). ValueError where a code would not hold them."""
    bits = max(1, math.ceil(math.log2(max(length, 2))))
    if bits > MAX_BITS:
        raise ValueError(f"a grid of {length} voxels along one axis: Z-order codes hold {2 ** MAX_BITS}; "
                         f"cut the volume")
    return bits


def encode_coords(coords: Tensor, sample: Tensor | int, bits: int) -> Tensor:
    """coords (N, 3) integers d, h, w in [0, 2^bits), sample (N,) or one number -> code (N,) int64."""
    d, h, w = coords.long().unbind(1)
    place = spread(d) << 2 | spread(h) << 1 | spread(w)
    return sample * (1 << 3 * bits) + place


def coords_of(code: Tensor, bits: int) -> Tensor:
    """code (N,) -> coords (N, 3) int64."""
    place = code & ((1 << 3 * bits) - 1)
    return torch.stack([gathered(place >> 2), gathered(place >> 1), gathered(place)], 1)


def sample_of(code: Tensor, bits: int) -> Tensor:
    """code (N,) -> number of the sample (N,) int64."""
    return code >> 3 * bits


# -------------------------------------------------------------------------------- neighbours and parents

def neighbours(code: Tensor, bits: int) -> Tensor:
    """code (N,) ascending -> (N, 27) int32: the point at each offset of a 3x3x3 kernel, or N for none.

    13 binary searches: if j lies at an offset from i, then i lies at the opposite offset from j.
    """
    count = len(code)
    rows = torch.arange(count, device=code.device, dtype=torch.int32)
    table = torch.full((count, 27), count, dtype=torch.int32, device=code.device)
    table[:, 13] = rows
    if not count:
        return table

    # The bits of each coordinate, and of the coordinates one below and one above; outside of the grid there
    # is nothing, and the code of such a place would be that of a point elsewhere.
    top = (1 << bits) - 1
    coords = coords_of(code, bits)
    base = sample_of(code, bits) << 3 * bits
    shifted = []
    for axis in range(3):
        x = coords[:, axis]
        moved = {}
        for step in (-1, 0, 1):
            inside = (x + step >= 0) & (x + step <= top)
            moved[step] = spread((x + step).clamp(0, top)) << 2 - axis, inside
        shifted.append(moved)

    for k, (d, h, w) in enumerate(OFFSETS[14:], start=14):
        (code_d, in_d), (code_h, in_h), (code_w, in_w) = shifted[0][d], shifted[1][h], shifted[2][w]
        wanted = base | code_d | code_h | code_w
        found = torch.searchsorted(code, wanted).clamp_max(count - 1)
        there = (code[found] == wanted) & in_d & in_h & in_w
        table[:, k] = torch.where(there, found, count).int()
        table[found[there], 26 - k] = rows[there]
    return table


class Family(NamedTuple):
    """The points of a level and their parents, the points of the level of half the resolution."""
    parent: Tensor                   # (M,) int64, codes of the parents, ascending
    children: Tensor                 # (M, 8) int32: which point is the child at each place, N for none
    slot: Tensor                     # (N,) int64: 8 x parent's row + place of each point


def family(code: Tensor) -> Family:
    """code (N,) ascending -> its parents, whose coordinates are those of the points halved."""
    parent, row = torch.unique_consecutive(code >> 3, return_inverse=True)
    slot = row * 8 + (code & 7)
    children = torch.full((len(parent) * 8,), len(code), dtype=torch.int32, device=code.device)
    children[slot] = torch.arange(len(code), dtype=torch.int32, device=code.device)
    return Family(parent, children.view(-1, 8), slot)


def children_of(code: Tensor, exists: Tensor) -> Tensor:
    """code (M,) ascending and exists (M, 8) bool -> codes (N,) of the children that exist, ascending."""
    places = torch.arange(8, device=code.device)
    return (code[:, None] << 3 | places)[exists]


# -------------------------------------------------------------------------------- moving rows

def with_nothing(x: Tensor) -> Tensor:
    """x (N, C) -> (N + 1, C): row N, which tables name where there is no point, is zero."""
    return torch.cat([x, x.new_zeros(1, x.shape[1])])


class Take(torch.autograd.Function):
    """Rows of x, each of which is taken at most once, so that the gradient is a gather as well.

    y[i] = x[there[i]], zero where there[i] = N;  dx[j] = dy[back[j]], zero where back[j] = len(y).
    """
    @staticmethod
    def forward(ctx, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return with_nothing(x)[there]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        back, = ctx.saved_tensors
        return with_nothing(grad)[back], None, None


def take(x: Tensor, there: Tensor, back: Tensor) -> Tensor:
    """x (N, C), there (K,), back (N,) -> (K, C); see `Take`."""
    return Take.apply(x, there, back)


# -------------------------------------------------------------------------------- convolution

def chunk_of(channels: int) -> int:
    """Points whose neighbours are gathered at a time."""
    return max(1, CHUNK // (27 * channels))


def gather_rows(x: Tensor, table: Tensor) -> Tensor:
    """x (N + 1, C) and some rows of a table (n, 27) -> (n, 27 C)."""
    return x.index_select(0, table.flatten()).view(len(table), 27 * x.shape[1])


class SubmanifoldConv(torch.autograd.Function):
    """y[i] = sum_k a(x[table[i, k]]) W_k + b, with a the identity, or SiLU where `activate` says so.

    With 26 - k the offset opposite to k, a point i is the neighbour at 26 - k of its neighbour at k. So
    dx[i] = sum_k dy[table[i, k]] W_(26-k)^T is a gather too, and dW_k = sum_i x[table[i, k]]^T dy[i].
    Only x and W are kept for backward, and SiLU computed again; of the gathered rows CHUNK numbers exist at a
    time.
    """
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, table: Tensor,
                activate: bool = False) -> Tensor:
        ctx.save_for_backward(x, weight, table)
        ctx.has_bias, ctx.activate = bias is not None, activate
        kernel = weight.flatten(2).permute(2, 1, 0).flatten(0, 1)        # (27 C, O)
        padded = with_nothing(F.silu(x) if activate else x)
        y = x.new_empty(len(x), len(weight))
        chunk = chunk_of(x.shape[1])
        for rows, out in zip(table.split(chunk), y.split(chunk)):
            torch.mm(gather_rows(padded, rows), kernel, out=out)
            if bias is not None:
                out += bias
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, table = ctx.saved_tensors
        grad = grad.contiguous()
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad
        grad_x = grad_weight = grad_bias = None

        # First the input's: the same sum over neighbours, with the kernel turned round.
        if need_x:
            turned = weight.flatten(2).flip(2).permute(2, 0, 1).flatten(0, 1)   # (27 O, C)
            padded = with_nothing(grad)
            grad_x = torch.empty_like(x)
            chunk = chunk_of(grad.shape[1])
            for rows, out in zip(table.split(chunk), grad_x.split(chunk)):
                torch.mm(gather_rows(padded, rows), turned, out=out)
            if ctx.activate:
                # d silu(x) / dx = s (1 + x (1 - s)), with s = sigmoid(x).
                s = x.sigmoid()
                grad_x *= s * (1 + x * (1 - s))

        # Then the kernel's, added up over the chunks in float32 or wider.
        if need_weight:
            wide = torch.promote_types(weight.dtype, torch.float32)
            total = torch.zeros(27 * x.shape[1], grad.shape[1], dtype=wide, device=x.device)   # (27 C, O)
            padded = with_nothing(F.silu(x) if ctx.activate else x)
            chunk = chunk_of(x.shape[1])
            for rows, part in zip(table.split(chunk), grad.split(chunk)):
                total += gather_rows(padded, rows).T @ part
            kernel = total.view(27, x.shape[1], grad.shape[1]).permute(2, 1, 0)
            grad_weight = kernel.reshape(weight.shape).to(weight.dtype)
        if need_bias and ctx.has_bias:
            grad_bias = grad.sum(0, dtype=torch.promote_types(grad.dtype, torch.float32)).to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None


class SubMConv3d(nn.Conv3d):
    """Submanifold convolution 3x3x3 with the parameters of the dense one: on a full grid the two are equal.

    x (N, C), table (N, 27) of `neighbours` -> (N, O).
    """
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor, table: Tensor, activate: bool = False) -> Tensor:
        """activate: SiLU before the convolution, of which nothing is kept."""
        weight, bias = self.weight, self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
        return SubmanifoldConv.apply(x, weight, bias, table, activate)
