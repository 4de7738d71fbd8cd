"""What tiles.py needs to know of layers: a table, a row for each kind of local layer. Needs torch and
lean_norm.py.

A layer is local where an output voxel depends on an interval of input voxels along each axis, and on no
others. From the rows, interval arithmetic tells which input a tile of the output needs, through any run of
such layers. A layer of your own is one more row. Where output i is made of inputs i, i + 1 and i + 2 along
each axis:

    LOCAL[Blur] = Local(size=lambda op, axis, n: n - 2,
                        pull=lambda op, axis, lo, hi, n: (lo, hi + 2, keep(hi - lo)))

and where 2 x 2 x 2 voxels are folded into channels (pixel unshuffle):

    LOCAL[Unshuffle] = Local(rate=lambda op, axis: (1, 2), channels=lambda op, channels: 8 * channels)

Follows: receptive-field arithmetic, as in distill.pub/2019/computing-receptive-fields.

Shapes: B batch, C channels, D H W depth height width; axis 0, 1, 2 is D, H, W. An interval [lo, hi) counts
voxels along one axis. A unit is the least length that all strides of a run of layers divide; tiles are
whole units. Version 0.5 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lean_norm import normalised

# ---------------------------------------------------------------------------------------- The table of layers

class Fork(NamedTuple):
    """Remember the tensor here for the Join that closes the residual branch."""


class Join(NamedTuple):
    """Add skip(remembered tensor), `skip` being a pointwise layer or nn.Identity."""
    skip: nn.Module


class UpConv(NamedTuple):
    """Nearest upsampling and the 3x3x3 convolution behind it, run as one transposed convolution."""
    scale: tuple[int, int, int]
    conv: nn.Conv3d


Op = nn.Module | Fork | Join | UpConv
Pads = Sequence[tuple[int, int]]                 # of a tile along D, H, W: the Cut's `pad`
Values = dict[str, Tensor]                       # parameter's name in the layer -> tensor to compute with


class Cut(NamedTuple):
    """One operation of a tile along one axis: run with `pad`, then outputs [crop, crop + length) are kept."""
    pad: tuple[int, int]                         # zeros before and after, as the kind's `run` takes them
    crop: int
    length: int


def keep(length: int) -> Cut:
    """No padding, and all outputs are kept."""
    return Cut((0, 0), 0, length)


def same_rate(op: Op, axis: int) -> tuple[int, int]:
    return 1, 1


def size_by_rate(op: Op, axis: int, n: int) -> int:
    up, down = row(op).rate(op, axis)
    return n // down * up


def pull_blocks(op: Op, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Each `down` inputs make `up` outputs, and no others: pointwise, nearest upsampling, pixel shuffle."""
    up, down = row(op).rate(op, axis)
    first, last = lo // up, -(-hi // up)         # blocks
    return first * down, last * down, Cut((0, 0), lo - first * up, hi - lo)


def run_module(op: nn.Module, x: Tensor, pads: Pads, values: Values) -> Tensor:
    """The layer's own forward, with `values` for its parameters."""
    return torch.func.functional_call(op, values, (x,)) if values else op(x)


@dataclass(frozen=True)
class Local:
    """A row of the table: how one kind of layer acts along each axis. The defaults: a pointwise one.

    A layer that consists of others has `parts` alone. For the others the defaults of `size` and `pull`
    follow from `rate`: right for every layer that makes each block of inputs into a block of outputs, in
    either direction.
    """
    # layer -> those that it consists of, in order; a residual branch stands between Fork() and Join(skip)
    parts: Callable[[nn.Module], Sequence[Op]] | None = None
    # op, axis -> (up, down): `up` voxels come out for `down` that go in, borders apart
    rate: Callable[[Op, int], tuple[int, int]] = same_rate
    # op, axis, n -> number of outputs of n inputs
    size: Callable[[Op, int, int], int] = size_by_rate
    # op, axis, lo, hi, n -> (start, stop, Cut): which of n inputs make the outputs [lo, hi), and how
    pull: Callable[[Op, int, int, int, int], tuple[int, int, Cut]] = pull_blocks
    # op, inputs [start, stop), `pad` of the Cuts, parameters by name -> outputs, before they are cropped
    run: Callable[[nn.Module, Tensor, Pads, Values], Tensor] = run_module
    # op, channels of the input -> channels of the output
    channels: Callable[[Op, int], int] = lambda op, channels: channels
    # op -> multiply-adds for an output element, for the cost model; what only reads and writes has none
    taps: Callable[[Op], float] = lambda op: 0.0
    # op -> number of channel groups whose mean and variance (B, groups) over the whole volume `run` finds
    # in values
    groups: Callable[[Op], int] | None = None


def reach(op: nn.Module, axis: int) -> int:
    """Distance from the first to the last input of a kernel."""
    return op.dilation[axis] * (op.kernel_size[axis] - 1)


def conv_size(op: nn.Conv3d, axis: int, n: int) -> int:
    return (n + 2 * op.padding[axis] - reach(op, axis) - 1) // op.stride[axis] + 1


def conv_pull(op: nn.Conv3d, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Output i reads inputs i * stride - padding + [0, reach]."""
    stride, padding = op.stride[axis], op.padding[axis]
    start = lo * stride - padding
    stop = (hi - 1) * stride - padding + reach(op, axis) + 1
    if start >= 0 and stop <= n:                 # inside the volume: no zeros, no waste
        return start, stop, keep(hi - lo)
    # At a border the layer's own zeros are added at both ends, and outputs that they should not reach are
    # cropped. The padded convolution's outputs count from a multiple of the stride.
    start = max(0, start) // stride * stride
    return start, min(n, stop), Cut((padding, padding), lo - start // stride, hi - lo)


def conv_run(op: nn.Conv3d, x: Tensor, pads: Pads, values: Values) -> Tensor:
    padding = [both for both, _ in pads]
    return F.conv3d(x, values["weight"], values.get("bias"), op.stride, padding, op.dilation, op.groups)


def transposed_size(op: nn.ConvTranspose3d, axis: int, n: int) -> int:
    return (n - 1) * op.stride[axis] - 2 * op.padding[axis] + reach(op, axis) + op.output_padding[axis] + 1


def transposed_pull(op: nn.ConvTranspose3d, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Input i feeds outputs i * stride - padding + [0, reach]."""
    stride, padding = op.stride[axis], op.padding[axis]
    start = max(0, -(-(lo + padding - reach(op, axis)) // stride))
    stop = min(n, (hi - 1 + padding) // stride + 1)
    end = (stop - 1) * stride - padding + reach(op, axis) + 1
    missing = max(0, hi - end)                   # outputs that no input feeds: output_padding
    return start, stop, Cut((0, missing), lo - (start * stride - padding), hi - lo)


def transposed_run(op: nn.ConvTranspose3d, x: Tensor, pads: Pads, values: Values) -> Tensor:
    more = [missing for _, missing in pads]
    weight, bias = values["weight"], values.get("bias")
    return F.conv_transpose3d(x, weight, bias, op.stride, 0, more, op.groups, op.dilation)


def upsample_pull(op: nn.Upsample, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Linear: output i lies at input (i + 1/2) / factor - 1/2, between two voxels."""
    if op.mode == "nearest":
        return pull_blocks(op, axis, lo, hi, n)
    factor = int(op.scale_factor[axis])
    start = max(0, (2 * lo + 1 - factor) // (2 * factor))
    stop = min(n, -(-(2 * hi - 1 - factor) // (2 * factor)) + 1)
    return start, stop, Cut((0, 0), lo - start * factor, hi - lo)


def up_conv_pull(op: UpConv, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Input i feeds outputs i * s - 1 ... i * s + s: a transposed kernel of s + 2, padded by 1."""
    s = op.scale[axis]
    start, stop = max(0, -(-lo // s) - 1), min(n, hi // s + 1)
    return start, stop, Cut((0, 0), lo - (start * s - 1), hi - lo)


def up_conv_run(op: UpConv, x: Tensor, pads: Pads, values: Values) -> Tensor:
    return F.conv_transpose3d(x, folded_kernel(values["weight"], op.scale), values.get("bias"), op.scale)


def folded_kernel(weight: Tensor, scale: Sequence[int]) -> Tensor:  # same as lean_conv.folded_kernel
    """(O, I, 3, 3, 3) behind nearest upsampling by s -> (I, O, s0 + 2, s1 + 2, s2 + 2), transposed, stride s.

    An input voxel becomes s equal ones, and each of their outputs takes the taps that meet them: by 2,
    (w0, w1, w2) -> (w2, w1 + w2, w0 + w1, w0). Tap t adds to places 2 - t ... 1 - t + s.
    """
    for axis, s in enumerate(scale, 2):
        places = weight.new_zeros(s + 2, 3)
        for tap in range(3):
            places[2 - tap:2 - tap + s, tap] = 1
        weight = torch.tensordot(weight, places, dims=([axis], [1])).movedim(-1, axis)
    return weight.transpose(0, 1)


def folds(up: nn.Module, conv: nn.Module) -> bool:  # same as lean_conv.folds
    """Whether these two layers are nearest upsampling and a 3x3x3 convolution that keeps the size."""
    if type(up) is not nn.Upsample or up.mode != "nearest" or type(conv) is not nn.Conv3d:
        return False
    plain = conv.kernel_size == (3, 3, 3) and conv.padding == conv.stride == conv.dilation == (1, 1, 1)
    return plain and conv.groups == 1 and conv.padding_mode == "zeros"


def pads_of(op: nn.ConstantPad3d, axis: int) -> tuple[int, int]:
    return op.padding[4 - 2 * axis], op.padding[5 - 2 * axis]    # F.pad counts from the last axis


def pad_pull(op: nn.ConstantPad3d, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    before, _ = pads_of(op, axis)
    start, stop = max(0, lo - before), min(n, hi - before)
    return start, stop, Cut((start - lo + before, hi - before - stop), 0, hi - lo)


def pad_run(op: nn.ConstantPad3d, x: Tensor, pads: Pads, values: Values) -> Tensor:
    return F.pad(x, [n for ends in reversed(pads) for n in ends], value=op.value)


def norm_run(op: nn.GroupNorm, x: Tensor, pads: Pads, values: Values) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias (arXiv:1803.08494, Eq. 1)."""
    return normalised(x, values["mean"], values["var"], values["weight"], values["bias"], op.eps)


def out_channels(op: nn.Module, channels: int) -> int:
    return op.out_channels


def weights_per_channel(op: nn.Module) -> float:
    return op.weight.numel() / op.out_channels


# A subclass goes by the row of its nearest parent. A layer without a row may see the whole volume, and is
# never tiled.
LOCAL: dict[type, Local] = {
    nn.Sequential: Local(parts=list),
    nn.Identity: Local(parts=lambda layer: []),
    Fork: Local(),
    Join: Local(),
    nn.SiLU: Local(),
    nn.Conv3d: Local(
        rate=lambda op, axis: (1, op.stride[axis]),
        size=conv_size, pull=conv_pull, run=conv_run, channels=out_channels, taps=weights_per_channel),
    nn.ConvTranspose3d: Local(
        rate=lambda op, axis: (op.stride[axis], 1),
        size=transposed_size, pull=transposed_pull, run=transposed_run, channels=out_channels,
        taps=weights_per_channel),
    nn.Upsample: Local(
        rate=lambda op, axis: (int(op.scale_factor[axis]), 1),
        pull=upsample_pull),
    UpConv: Local(
        rate=lambda op, axis: (op.scale[axis], 1),
        pull=up_conv_pull, run=up_conv_run, channels=lambda op, channels: op.conv.out_channels,
        taps=lambda op: op.conv.in_channels * prod((s + 2) / s for s in op.scale)),
    nn.ConstantPad3d: Local(
        size=lambda op, axis, n: n + sum(pads_of(op, axis)),
        pull=pad_pull, run=pad_run),
    nn.GroupNorm: Local(run=norm_run, groups=lambda op: op.num_groups),
}


def row(op: Op) -> Local | None:
    """The row of an operation's kind; None where the table has none."""
    return next((LOCAL[kind] for kind in type(op).__mro__ if kind in LOCAL), None)


def unroll(layer: Op) -> list[Op] | None:
    """A layer as its operations in order; None when it, or a part of it, has no row in the table."""
    found = row(layer)
    if found is None:
        return None
    if found.parts is None:
        return [layer]
    ops: list[Op] = []
    for part in found.parts(layer):
        inner = unroll(part)
        if inner is None:
            return None
        if ops and len(inner) == 1 and folds(ops[-1], inner[0]):
            inner = [UpConv(tuple(map(int, ops.pop().scale_factor)), inner[0])]
        ops += inner
    return ops


def module_of(op: Op) -> nn.Module:
    """The layer of an operation: what has its parameters."""
    if isinstance(op, Join):
        return op.skip
    if isinstance(op, UpConv):
        return op.conv
    return op if isinstance(op, nn.Module) else nn.Identity()


# -------------------------------------------------------------------------- Which input a tile's output needs

class Span(NamedTuple):
    """One tile along one axis. Equal cuts and lengths mean equal work, wherever the tile lies."""
    source: tuple[int, int]                      # interval read from the stretch's input
    target: tuple[int, int]                      # interval written to its output; these partition the output
    cuts: tuple[Cut, ...]                        # one an operation

    @property
    def length(self) -> int:
        """Voxels read."""
        return self.source[1] - self.source[0]



def rates(ops: Sequence[Op], axis: int) -> list[int]:
    """Voxels per unit along one axis before each operation and after the last."""
    ups, downs = zip(*(row(op).rate(op, axis) for op in ops)) if ops else ((), ())
    found = [prod(downs)]
    for up, down in zip(ups, downs):
        found.append(found[-1] // down * up)
    return found


def sizes_along(ops: Sequence[Op], axis: int, n: int) -> list[int]:
    """Voxels along one axis before each operation and after the last, for n at first."""
    found = [n]
    for op in ops:
        found.append(row(op).size(op, axis, found[-1]))
    return found


def spans(ops: Sequence[Op], axis: int, n: int, tile_units: int, end: int) -> list[Span]:
    """Tiles of `tile_units` along an axis of n inputs, through ops[:end]: targets partition what
    ops[:end] give.
    """
    rate, sizes = rates(ops, axis), sizes_along(ops[:end], axis, n)
    units = -(-n // rate[0])
    last = sizes[-1]
    edges = [e for e in range(0, units * rate[end], tile_units * rate[end]) if e < last] + [last]
    return [span_of(ops[:end], axis, sizes, target) for target in zip(edges, edges[1:])]


def span_of(ops: Sequence[Op], axis: int, sizes: Sequence[int], target: tuple[int, int]) -> Span:
    """From the output back to the input: what each operation needs, and where in its output that lies."""
    lo, hi = target
    cuts: list[Cut] = []                         # of the last operation first
    branches: list[tuple[int, tuple[int, int]]] = []             # open: place of the Join's cut, interval
    for i in reversed(range(len(ops))):
        if isinstance(ops[i], Fork) and branches:                # none is open where `ops` end inside a block
            # Both ways read here, so what is read is the union of their intervals; each crops its own
            # part.
            join, skip = branches.pop()
            start, stop = min(lo, skip[0]), max(hi, skip[1])
            cuts[join] = cuts[join]._replace(crop=skip[0] - start)
            cuts.append(Cut((0, 0), lo - start, hi - lo))
            lo, hi = start, stop
        else:
            if isinstance(ops[i], Join):
                branches.append((len(cuts), (lo, hi)))
            lo, hi, cut = row(ops[i]).pull(ops[i], axis, lo, hi, sizes[i])
            cuts.append(cut)
    return Span((lo, hi), target, tuple(reversed(cuts)))
