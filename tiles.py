"""Exact tiled execution: a run of local layers tile by tile, forward and backward, on one rank or several. Needs torch alone."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# ------------------------------------------------------------------------------------------------ Exact tiled execution
# A stretch is a run of local layers. It is unrolled into operations; from the operations' own attributes, interval
# arithmetic tells which input a tile of the output needs (`pull`), axis by axis; `Tiled` runs a stretch tile by tile,
# keeps its input alone, and computes each tile again in backward. A tile reads exactly its receptive field, zeros stand
# where the volume ends and nowhere else, so each voxel comes out as the untiled layers make it. Like checkpointing
# (arXiv:1604.06174) in time, but in space too; the halo is the receptive-field arithmetic of distill.pub/2019/computing-receptive-fields.
# The ranks of a process group may share the tiles: whatever a pass over the tiles adds up, or writes, is then summed over them.

class Fork(NamedTuple):
    """Remember the tensor here for the Join that closes the residual branch."""


class Join(NamedTuple):
    """Add skip(remembered tensor)."""
    skip: nn.Module


Op = nn.Module | Fork | Join
LOCAL = (nn.Conv3d, nn.ConvTranspose3d, nn.Upsample, nn.ConstantPad3d, nn.SiLU)  # GroupNorm: given its statistics


def unroll(layer: nn.Module) -> list[Op] | None:
    """A layer as its operations in order; None when an output voxel may depend on the whole volume (attention, kinds not known here)."""
    from vae3d import ChannelNorm, GroupNorm, ResBlock3d
    if isinstance(layer, ResBlock3d):
        branch = nn.Sequential(layer.norm1, layer.act, layer.conv1, layer.norm2, layer.act, layer.conv2)
        return [Fork(), *unroll(branch), Join(layer.skip)]
    if isinstance(layer, nn.Sequential):
        parts = [unroll(child) for child in layer]
        return None if None in parts else sum(parts, [])
    if isinstance(layer, nn.Identity):
        return []
    return [layer] if isinstance(layer, (*LOCAL, ChannelNorm, GroupNorm)) else None


class Cut(NamedTuple):
    """One operation of one tile along one axis: zeros added at the volume's ends, then outputs [crop, crop + length) are kept."""
    pad: tuple[int, int]                                         # convolution: both sides by the first; transposed: (0, output_padding)
    crop: int
    length: int


class Span(NamedTuple):
    """One tile along one axis. Equal cuts and lengths mean equal work, wherever the tile lies."""
    source: tuple[int, int]                                      # interval read from the stretch's input
    target: tuple[int, int]                                      # interval written to its output; these partition the output
    cuts: tuple[Cut, ...]                                        # one an operation


def out_size(op: Op, axis: int, n: int) -> int:
    """Length of an operation's output along one axis, from its input's."""
    if isinstance(op, nn.Conv3d):
        return (n + 2 * op.padding[axis] - op.dilation[axis] * (op.kernel_size[axis] - 1) - 1) // op.stride[axis] + 1
    if isinstance(op, nn.ConvTranspose3d):
        return ((n - 1) * op.stride[axis] - 2 * op.padding[axis] + op.dilation[axis] * (op.kernel_size[axis] - 1)
                + op.output_padding[axis] + 1)
    if isinstance(op, nn.Upsample):
        return n * int(op.scale_factor[axis])
    return n + sum(pads(op, axis)) if isinstance(op, nn.ConstantPad3d) else n


def pads(op: nn.ConstantPad3d, axis: int) -> tuple[int, int]:
    return op.padding[4 - 2 * axis], op.padding[5 - 2 * axis]    # F.pad counts from the last axis


def pull(op: Op, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Input interval [start, stop) from which `op` makes its outputs [lo, hi) on an axis of n inputs, and how."""
    if isinstance(op, nn.Conv3d):
        stride, padding = op.stride[axis], op.padding[axis]
        start, stop = lo * stride - padding, (hi - 1) * stride - padding + op.dilation[axis] * (op.kernel_size[axis] - 1) + 1
        if start >= 0 and stop <= n:                             # inside the volume: no zeros, no waste
            return start, stop, Cut((0, 0), 0, hi - lo)
        start = max(0, start) // stride * stride                 # the padded convolution's outputs count from a multiple of the stride
        return start, min(n, stop), Cut((padding, padding), lo - start // stride, hi - lo)
    if isinstance(op, nn.ConvTranspose3d):                       # input i feeds outputs i * stride - padding + [0, reach]
        stride, padding, reach = op.stride[axis], op.padding[axis], op.dilation[axis] * (op.kernel_size[axis] - 1)
        start, stop = max(0, -(-(lo + padding - reach) // stride)), min(n, (hi - 1 + padding) // stride + 1)
        missing = max(0, hi - ((stop - 1) * stride - padding + reach + 1))
        return start, stop, Cut((0, missing), lo - (start * stride - padding), hi - lo)
    if isinstance(op, nn.Upsample):
        factor = int(op.scale_factor[axis])
        if op.mode == "nearest":
            return lo // factor, -(-hi // factor), Cut((0, 0), lo % factor, hi - lo)
        start = max(0, (2 * lo + 1 - factor) // (2 * factor))    # linear: output i lies at input (i + 1/2) / factor - 1/2
        stop = min(n, -(-(2 * hi - 1 - factor) // (2 * factor)) + 1)
        return start, stop, Cut((0, 0), lo - start * factor, hi - lo)
    if isinstance(op, nn.ConstantPad3d):
        before, _ = pads(op, axis)
        start, stop = max(0, lo - before), min(n, hi - before)
        return start, stop, Cut((start - lo + before, hi - before - stop), 0, hi - lo)
    return lo, hi, Cut((0, 0), 0, hi - lo)


def rates(ops: Sequence[Op], axis: int) -> list[int]:
    """Voxels per unit along one axis before each operation and after the last. A unit is as long as the stretch's strides need it."""
    found = [prod(op.stride[axis] for op in ops if isinstance(op, nn.Conv3d))]
    for op in ops:
        down = op.stride[axis] if isinstance(op, nn.Conv3d) else 1
        up = op.stride[axis] if isinstance(op, nn.ConvTranspose3d) else int(op.scale_factor[axis]) if isinstance(op, nn.Upsample) else 1
        found.append(found[-1] // down * up)
    return found


def spans(ops: Sequence[Op], axis: int, n: int, step: int, end: int) -> list[Span]:
    """Tiles of `step` units along an axis of n inputs, through ops[:end]: their targets partition what ops[:end] give."""
    rate, sizes = rates(ops, axis), [n]
    for op in ops[:end]:
        sizes.append(out_size(op, axis, sizes[-1]))
    edges = [e for e in range(0, -(-n // rate[0]) * rate[end], step * rate[end]) if e < sizes[-1]] + [sizes[-1]]
    found = []
    for target in zip(edges, edges[1:]):
        (lo, hi), cuts, branches = target, [], []
        for i in reversed(range(end)):
            if isinstance(ops[i], Fork) and branches:            # both branches read here; none is open if ops[:end] ends in a block
                join, skip = branches.pop()
                cut = Cut((0, 0), lo, hi - lo)
                lo, hi = min(lo, skip[0]), max(hi, skip[1])
                cuts[join] = cuts[join]._replace(crop=skip[0] - lo)
                cuts.append(cut._replace(crop=cut.crop - lo))
            else:
                if isinstance(ops[i], Join):
                    branches.append((len(cuts), (lo, hi)))
                lo, hi, cut = pull(ops[i], axis, lo, hi, sizes[i])
                cuts.append(cut)
        found.append(Span((lo, hi), target, tuple(reversed(cuts))))
    return found


class Stretch(NamedTuple):
    """Operations to run in tiles of `step` units (D, H, W); `tick` is told the share of the forward pass that is done."""
    ops: tuple[Op, ...]
    step: tuple[int, int, int]
    tick: Callable[[float], None] | None = None
    group: torch.distributed.ProcessGroup | None = None          # ranks that share the tiles; None: this process has them all

    def tiles(self, x: Tensor, end: int | None = None) -> Iterator[tuple[Span, Span, Span]]:
        """This rank's tiles through ops[:end]. On fake tensors (memory prediction) one of each kind: its repeats cost the same.

        The largest are dealt out first, so that no rank has more than another by more than the largest tile.
        """
        end = len(self.ops) if end is None else end
        axes = [spans(self.ops, axis, x.shape[2 + axis], self.step[axis], end) for axis in range(3)]
        if isinstance(x, torch._subclasses.FakeTensor):
            axes = [list({(s.source[1] - s.source[0], s.cuts): s for s in axis}.values()) for axis in axes]
        if self.group is None:
            return product(*axes)
        by_size = sorted(product(*axes), key=lambda tile: -prod(s.source[1] - s.source[0] for s in tile))
        return iter(by_size[self.group.rank()::self.group.size()])

    def size(self, x: Tensor, end: int | None = None) -> list[int]:
        """(D, H, W) of what ops[:end] give for x."""
        size = list(x.shape[2:])
        for op in self.ops[:end]:
            size = [out_size(op, axis, n) for axis, n in enumerate(size)]
        return size

    def blank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the stretch's output, in channels_last_3d where x or a weight is, as convolutions give it; the same on every rank."""
        convs, last = [op for op in self.ops if isinstance(op, (nn.Conv3d, nn.ConvTranspose3d))], torch.channels_last_3d
        found = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, *(op.weight for op in convs)))
        shape = x.shape[0], convs[-1].out_channels if convs else x.shape[1], *self.size(x)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=last if found else torch.contiguous_format).zero_()

    def norms(self) -> list[int]:
        from vae3d import GroupNorm
        return [i for i, op in enumerate(self.ops) if isinstance(op, GroupNorm)]

    def parameters(self) -> list[nn.Parameter]:
        return [p for op in self.ops for m in (op, getattr(op, "skip", None)) if isinstance(m, nn.Module) for p in m.parameters()]


def window(x: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """View of (B, C, D, H, W) on an interval per axis."""
    for axis, (lo, hi) in enumerate(intervals):
        if (lo, hi) != (0, x.shape[2 + axis]):
            x = x.narrow(2 + axis, lo, hi - lo)
    return x


def run_tile(stretch: Stretch, tile: tuple[Span, Span, Span], x: Tensor, weights: dict, stats: dict) -> Tensor:
    """One tile through its operations: x is the window `source` of the input, the result the window `target` of the output.

    weights: parameter -> tensor to use for it. stats: index of a GroupNorm -> mean and variance (B, groups) of the whole volume.
    """
    from vae3d import ChannelNorm, GroupNorm
    remembered = []
    for i, (op, *cuts) in enumerate(zip(stretch.ops, *(span.cuts for span in tile))):
        crops = [(c.crop, c.crop + c.length) for c in cuts]
        if isinstance(op, Fork):
            remembered.append(x)
        elif isinstance(op, Join):
            skip = window(remembered.pop(), crops)
            if isinstance(op.skip, nn.Conv3d):
                skip = F.conv3d(skip, weights[op.skip.weight], weights.get(op.skip.bias))
            x = skip + x
            continue
        elif isinstance(op, nn.Conv3d):
            x = F.conv3d(x, weights[op.weight], weights.get(op.bias), op.stride, [c.pad[0] for c in cuts], op.dilation, op.groups)
        elif isinstance(op, nn.ConvTranspose3d):
            more = [c.pad[1] for c in cuts]
            x = F.conv_transpose3d(x, weights[op.weight], weights.get(op.bias), op.stride, 0, more, op.groups, op.dilation)
        elif isinstance(op, nn.ConstantPad3d):
            x = F.pad(x, [p for c in reversed(cuts) for p in c.pad], value=op.value)
        elif isinstance(op, GroupNorm):
            x = op.normalise(x, *stats[i], weights[op.weight], weights[op.bias])
        elif isinstance(op, ChannelNorm):
            x = op.normalise(x, weights[op.weight], weights[op.bias])
        else:
            x = op(x)
        x = window(x, crops)
    return x


@contextmanager
def together(group: torch.distributed.ProcessGroup | None, like: Tensor) -> Iterator[None]:
    """For what the ranks of a group do apart, before they meet in a collective: if it fails on one rank, it raises on all of them.

    The others would wait for ever. They raise torch.OutOfMemoryError where memory was short, so that all can turn the dial together, else
    RuntimeError. Costs one all_reduce of 4 bytes, on the device of `like`. May be nested: a failure is told once.
    """
    if group is None:
        yield
        return
    dist, told = torch.distributed, like.new_zeros((), dtype=torch.int32)                        # later there may be no room for it
    try:
        yield
    except Exception as error:
        if not getattr(error, "told", False):
            error.told = True
            dist.all_reduce(told.fill_((1 if is_out_of_memory(error) else 2) * group.size() + group.rank()), dist.ReduceOp.MAX, group)
        raise
    dist.all_reduce(told, dist.ReduceOp.MAX, group)
    kind, rank = divmod(int(told), group.size())
    if kind:
        error = (torch.OutOfMemoryError(f"out of memory on rank {rank} of those that share the tiles") if kind == 1 else
                 RuntimeError(f"rank {rank} of those that share the tiles failed; its own message says why"))
        error.told = True
        raise error


def is_out_of_memory(error: Exception) -> bool:
    """CUDA's error, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def add_up(t: Tensor, group: torch.distributed.ProcessGroup | None) -> None:
    """t becomes the sum over the ranks, the same bits on each (torch promises that of all_reduce). Dense, its layout the same on all."""
    if group is not None:
        torch.distributed.all_reduce(t.as_strided((t.numel(),), (1,)), group=group)


def volume_statistics(parts: Iterator[Tensor], groups: int, group: torch.distributed.ProcessGroup | None = None,
                      zero: Tensor | int = 0, voxels: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups) of a volume that comes in tiles (B, C, d, h, w), merged stably (Chan et al. 1979), float32 or wider.

    With a group, `parts` are this rank's, perhaps none; zero: (B, C) in the result's type; voxels: of the whole volume, a channel.
    """
    count, mean, spread = 0, zero, zero                          # of each channel: (B, C); spread: sum of squared deviations
    with together(group, zero):
        for part in parts:
            n = part[0, 0].numel()
            var, centre = torch.var_mean(part.to(torch.promote_types(part.dtype, torch.float32)), (2, 3, 4), correction=0)
            apart = centre - mean
            spread = spread + var * n + apart.square() * (count * n / (count + n))
            mean, count = mean + apart * (n / (count + n)), count + n
    if group is not None:                                        # the mean first, then the deviations from it
        whole = mean * (count / voxels)
        add_up(whole, group)
        spread = spread + (mean - whole).square() * count
        add_up(spread, group)
        mean, count = whole, voxels
    mean, var = mean.unflatten(1, (groups, -1)), (spread / count).unflatten(1, (groups, -1))
    return mean.mean(2), var.mean(2) + mean.var(2, correction=0)


def activation_dtype(x: Tensor) -> torch.dtype:
    """What convolutions give for x here: autocast's type (it leaves float64 alone), else x's own."""
    lowered = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype


def statistics_gradient(x: Tensor, target: object, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, voxels: int) -> Tensor:
    """Gradient of a tile x (B, C, d, h, w) through mean and variance (B, groups) of a volume of `voxels` a channel."""
    width = x.shape[1] // mean.shape[1]
    m, gm, gv = (t.repeat_interleave(width, 1)[..., None, None, None] for t in (mean, grad_mean, grad_var))
    return ((gm + 2 * gv * (x - m)) / (width * voxels)).to(x.dtype)


class Tiled(torch.autograd.Function):
    """Run a stretch tile by tile. Kept for backward: its input, and mean and variance of each GroupNorm.

    GroupNorm's statistics are inputs of the tile's function. Forward gathers them in order, with one pass per norm over the
    operations before it. Backward goes over the whole stretch once, which gives the gradient of every statistic too; then, for
    the last norm first, a pass over the operations before it carries that gradient to the input, to the parameters and to
    earlier statistics: d mean / d x = 1 / n, d var / d x = 2 (x - mean) / n. Parameters are inputs of this function, so their
    gradients take autograd's ordinary way (DDP's hooks, accumulation). Inside, autocast is off and its casts are explicit, once a pass.

    With a group each rank runs its own tiles and ends with what one process alone has, the same bits on all ranks: the output and the
    gradients of input, parameters and statistics are sums over the ranks. Every rank must make the same calls with the same values.
    """
    @staticmethod
    def forward(ctx, stretch: Stretch, x: Tensor, *parameters: Tensor) -> Tensor:
        device, cast, dtype, group = x.device.type, torch.is_autocast_enabled(x.device.type), activation_dtype(x), stretch.group
        kept = []
        weights = {p: value.to(dtype) if cast else value for p, value in zip(stretch.parameters(), parameters)}
        stats = {}
        with torch.autocast(device, enabled=False):
            def read(tile):
                return window(x, [s.source for s in tile]).to(dtype)

            for i in stretch.norms():
                parts = (run_tile(stretch, tile, read(tile), weights, stats) for tile in stretch.tiles(x, i))
                zero = x.new_zeros(x.shape[0], stretch.ops[i].num_channels, dtype=torch.promote_types(dtype, torch.float32))
                stats[i] = volume_statistics(parts, stretch.ops[i].num_groups, group, zero, prod(stretch.size(x, i)))
                kept += stats[i]
            tiles = list(stretch.tiles(x))
            with together(group, x):
                out = stretch.blank(x, dtype)
                for number, tile in enumerate(tiles, 1):
                    window(out, [s.target for s in tile]).copy_(run_tile(stretch, tile, read(tile), weights, stats))
                    if stretch.tick is not None:
                        stretch.tick(number / len(tiles))
            add_up(out, group)                                   # zeros but for this rank's tiles, so nothing is rounded
        ctx.stretch, ctx.cast, ctx.dtype = stretch, cast, dtype
        ctx.save_for_backward(x, *kept, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        stretch, norms, group = ctx.stretch, ctx.stretch.norms(), ctx.stretch.group
        with together(group, grad_out):
            x, *rest = ctx.saved_tensors
            kept, values, needed = rest[:2 * len(norms)], rest[2 * len(norms):], ctx.needs_input_grad[2:]
            stats = {i: [t.detach().requires_grad_() for t in kept[2 * k:2 * k + 2]] for k, i in enumerate(norms)}
            weights = {p: (v.detach().to(ctx.dtype) if ctx.cast else v.detach()).requires_grad_(n)
                       for p, v, n in zip(stretch.parameters(), values, needed)}
            inputs = [w for w in weights.values() if w.requires_grad] + [s for pair in stats.values() for s in pair]
            sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in inputs]
            wider = torch.promote_types(x.dtype, torch.float32) if norms else x.dtype  # a norm's gradients nearly cancel: summed unrounded
            grad_x = torch.zeros_like(x, dtype=wider) if ctx.needs_input_grad[1] else None

        def one_pass(end, grad_of):
            """Recompute ops[:end] a tile at a time; add what `grad_of` its output gives to `sums` and `grad_x`."""
            for tile in stretch.tiles(x, end):
                source = [s.source for s in tile]
                part = window(x, source).detach().to(ctx.dtype).requires_grad_(grad_x is not None)
                with torch.enable_grad():
                    y = run_tile(stretch, tile, part, weights, stats)
                if y.requires_grad:
                    wanted = inputs if grad_x is None else [*inputs, part]
                    grads = torch.autograd.grad(y, wanted, grad_of(y.detach(), [s.target for s in tile]), allow_unused=True)
                    for total, grad in zip(sums, grads):
                        if grad is not None:
                            total += grad
                    if grad_x is not None:
                        window(grad_x, source).add_(grads[-1])   # halos overlap: add

        with torch.autocast(x.device.type, enabled=False):
            with together(group, grad_out):
                one_pass(len(stretch.ops), lambda y, target: window(grad_out, target))
            for k, i in reversed(list(enumerate(norms))):
                at = len(sums) + 2 * (k - len(norms))            # the last sums are the gradients of mean and variance
                grads = sums[at:at + 2]
                for each in grads:                               # whole: every pass that adds to them is over
                    add_up(each, group)
                mean, voxels = stats[i][0].detach(), prod(stretch.size(x, i))
                with together(group, grad_out):
                    one_pass(i, partial(statistics_gradient, mean=mean, grad_mean=grads[0], grad_var=grads[1], voxels=voxels))
        for each in sums[:len(sums) - 2 * len(norms)] + ([] if grad_x is None else [grad_x]):
            add_up(each, group)
        found = iter(sums)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return None, grad_x, *(next(found).to(v.dtype) if n else None for v, n in zip(values, needed))


def run_tiled(layers: Sequence[nn.Module], step: tuple[int, int, int], x: Tensor, tick: Callable[[float], None] | None = None,
              group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """nn.Sequential(*layers)(x) in tiles of `step` units, without keeping what is between; shared among the ranks of a group."""
    stretch = Stretch(tuple(unroll(nn.Sequential(*layers))), step, tick, group)
    return Tiled.apply(stretch, x, *stretch.parameters())
