"""GroupNorm by the kernels of batch norm, on CUDA in channels_last. Needs torch alone.

    y = group_norm(x, groups, weight, bias, eps)     # F.group_norm to rounding, gradients too
    y = normalised(x, mean, var, weight, bias, eps)  # a tile, with statistics of its whole volume

CUDA's own GroupNorm knows no channels_last: it copies x to the other layout and makes an output in that, so
that what follows copies it back. Batch norm's kernels know it. They work channel by channel, so the few
numbers of each channel are merged into those of its group between one kernel and the next.

Follows: GroupNorm (arXiv:1803.08494). vae3d.py, unet.py, local_layers.py and tiles.py use this file where it
lies beside them. Shapes: B batch, C channels, G groups, D H W depth height width. Version 0.1 (2026-11).
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LEAST_ELEMENTS = 1 << 20


def by_batch_norm(x: Tensor) -> bool:
    """Whether x (B, C, D, H, W) is normalised by batch norm's kernels: decided here and nowhere else.

    Measured on an H200, bf16, forward and backward in ms, F.group_norm -> batch norm's kernels: 16 channels
    in 8 groups at 64,256,256: 10.9 -> 1.46 (GiB on top .75 -> .50); 64 channels at 32,128,128: 4.5 -> .84.
    So .13 ns an element is saved. It takes some 20 launches of 5 us a sample more, which LEAST_ELEMENTS pay
    for: that is reckoned, not measured. A compiler makes its own kernels; contiguous volumes are what
    F.group_norm is for.
    """
    if x.device.type != "cuda" or x.dim() != 5 or torch.compiler.is_compiling():
        return False
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    return last and x[0].numel() >= LEAST_ELEMENTS


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, mean and var of each sample's groups; in x.dtype."""
    if not by_batch_norm(x):
        return F.group_norm(x, groups, weight, bias, eps)
    return WholeNorm.apply(x, groups, weight, bias, eps)


def normalised(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """The same with mean and var (B, G) that are given, and have gradients of their own.

    As scale * x + shift, where batch norm's kernels are not used.
    """
    width = x.shape[1] // mean.shape[1]
    mean, inv = (t.repeat_interleave(width, 1) for t in (mean, (var + eps).rsqrt()))             # (B, C)
    if by_batch_norm(x):
        return GivenNorm.apply(x, mean, inv, weight, bias)
    scale = inv * weight
    shift = bias - mean * scale
    return torch.addcmul(shift[..., None, None, None], x, scale[..., None, None, None]).to(x.dtype)


def channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Variance and mean (B, C) of each channel of each sample, float32 or wider."""
    if by_batch_norm(x):
        mean, var = zip(*(channel_moments(x[b:b + 1]) for b in range(len(x))))
        return torch.stack(var), torch.stack(mean)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.var_mean(wide, (2, 3, 4), correction=0)


# --------------------------------------------------------------------------------------- With their gradients

class WholeNorm(torch.autograd.Function):
    """GroupNorm of whole volumes; x alone is kept, with two numbers a channel."""
    @staticmethod
    def forward(ctx, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        # First the moments of each channel, then of the groups: var = mean of variances + variance of means.
        var, mean = (t.unflatten(1, (groups, -1)) for t in channel_statistics(x))                # (B, G, C/G)
        var = var.mean(2) + mean.var(2, correction=0)
        width = x.shape[1] // groups
        mean = mean.mean(2).repeat_interleave(width, 1)
        inv = (var + eps).rsqrt().repeat_interleave(width, 1)
        ctx.groups = groups
        ctx.save_for_backward(x, mean, inv, weight)
        return applied(x, mean, inv, weight.to(mean.dtype), bias.to(mean.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inv, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        total, moment = channel_sums(grad, x, mean, inv)                                         # (B, C) each

        # With g = w dy, h = (x - mean) inv and m the mean over a group:
        #   dx = inv (g - m(g) - h m(g h)) = inv w (dy - m(g) / w - (x - mean) inv m(g h) / w).
        # Batch norm's kernel has the latter form. A weight of 0 becomes one that is 0 beside any other.
        w = weight.to(mean.dtype)
        width, count = x.shape[1] // ctx.groups, x[0, 0].numel()
        means = [(w * t).unflatten(1, (ctx.groups, -1)).mean(2) / count for t in (total, moment * inv)]
        means = [m.repeat_interleave(width, 1) for m in means]
        safe = torch.where(w.abs() < TINY, TINY, w)
        shift, slope = means[0] / safe, means[1] / (safe * inv)

        def part(b: int) -> Tensor:
            return gradient_of(grad[b:b + 1], x[b:b + 1], mean[b], inv[b], safe, shift[b], slope[b])
        dx = None
        if ctx.needs_input_grad[0] and len(x) == 1:
            dx = part(0)
        elif ctx.needs_input_grad[0]:            # the kernel knows no place to write to
            dx = torch.empty_like(grad)
            for b in range(len(x)):
                dx[b:b + 1].copy_(part(b))
        return dx, None, (moment * inv).sum(0).to(weight.dtype), total.sum(0).to(weight.dtype), None


TINY = 1e-12         # a weight below this counts as 0: the kernel divides by it


class GivenNorm(torch.autograd.Function):
    """(x - mean) inv weight + bias, mean and inv (B, C) given; x alone is kept of the large tensors."""
    @staticmethod
    def forward(ctx, x: Tensor, mean: Tensor, inv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, inv, weight)
        return applied(x, mean, inv, weight.to(mean.dtype), bias.to(mean.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, inv, weight = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last_3d)
        total, moment = channel_sums(grad, x, mean, inv)
        w, zero = weight.to(mean.dtype), torch.zeros_like(mean)
        dx = applied(grad, zero, inv, w, zero[0]) if ctx.needs_input_grad[0] else None
        # y = (x - mean) inv w + bias, so d mean = -inv w sum dy, and d inv = w sum dy (x - mean).
        d_weight, d_bias = (moment * inv).sum(0).to(weight.dtype), total.sum(0).to(weight.dtype)
        return dx, -inv * w * total, w * moment, d_weight, d_bias


def applied(x: Tensor, mean: Tensor, inv: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(x - mean) inv weight + bias in x.dtype; mean and inv (B, C), weight and bias (C,)."""
    y = torch.empty_like(x)
    for b in range(len(x)):
        apply_sample(x[b:b + 1], mean[b], inv[b], weight, bias, y[b:b + 1])
    return y


def channel_sums(grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of dy and of dy (x - mean) over each channel of each sample: (B, C) each."""
    pairs = [sums_of(grad[b:b + 1], x[b:b + 1], mean[b], inv[b]) for b in range(len(x))]
    total, moment = zip(*pairs)
    return torch.stack(total), torch.stack(moment)


def sloped(x: Tensor, mean: Tensor, slope: Tensor, shift: Tensor) -> Tensor:
    """(x - mean) slope + shift in x.dtype, (B, C) each; in batch norm's kernels."""
    y, one = torch.empty_like(x), torch.ones_like(mean[0])
    for b in range(len(x)):
        apply_sample(x[b:b + 1], mean[b], slope[b], one, shift[b], y[b:b + 1])
    return y


# ------------------------------------------------------------------------------------- Private parts of torch

# Batch norm's kernels, which nn.SyncBatchNorm calls. Each takes one sample (1, C, D, H, W) and vectors (C,)
# of float32 or wider. They are CUDA's alone: elsewhere, where tests try the sums above, plain torch stands
# for them. A torch without them raises AttributeError here; then let by_batch_norm return False.

def channel_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,)."""
    return torch.batch_norm_update_stats(x, None, None, 0.0)


def apply_sample(x: Tensor, mean: Tensor, inv: Tensor, weight: Tensor, bias: Tensor, out: Tensor) -> None:
    """(x - mean) inv weight + bias into `out`."""
    if x.device.type == "cuda":
        torch.batch_norm_elemt(x, weight, bias, mean, inv, 0.0, out=out)
    else:
        scale, mean, bias = (t[:, None, None, None] for t in (inv * weight, mean, bias))
        out.copy_((x - mean) * scale + bias)


def sums_of(grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor) -> tuple[Tensor, Tensor]:
    """The sums (C,) of dy and of dy (x - mean)."""
    if x.device.type == "cuda":
        return torch.batch_norm_backward_reduce(grad, x, mean, inv, None, True, False, False)[:2]
    grad = grad.to(mean.dtype)
    return grad.sum((0, 2, 3, 4)), (grad * (x - mean[:, None, None, None])).sum((0, 2, 3, 4))


def gradient_of(grad: Tensor, x: Tensor, mean: Tensor, inv: Tensor, weight: Tensor, total: Tensor,
                moment: Tensor) -> Tensor:
    """(dy - total - (x - mean) inv^2 moment) inv weight."""
    if x.device.type == "cuda":
        one = torch.ones(1, dtype=torch.int32, device=x.device)  # the sums' count: they are means already
        return torch.batch_norm_backward_elemt(grad, x, mean, inv, weight, total, moment, one)
    mean, inv, weight, total, moment = (t[:, None, None, None] for t in (mean, inv, weight, total, moment))
    return ((grad - total - (x - mean) * inv.square() * moment) * inv * weight).to(x.dtype)
