"""Convolutions that keep less for backward, and take less time for one small sample on a CPU. Needs torch
alone.

    y = lean(conv, x, norm, act)                 # conv(act(norm(x))); of it all, x alone is kept for backward

Nearest upsampling and the convolution behind it are one transposed convolution, the same to rounding.
What else precedes a convolution (norm, SiLU) is cheap, and runs again in backward. Plain autograd
keeps its output for the convolution, and what lies between besides. The bits are the same.
vae3d.py uses this file where it lies beside it, and plain autograd where it does not.

Follows: recomputation (arXiv:1604.06174), within one operation.

Shapes: B batch, C channels, D H W depth height width; x (B, C, D, H, W).
Version 0.5 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def lean(conv: nn.Module, x: Tensor, *before: nn.Module) -> Tensor:
    """conv(before(x)), by Lean where gradients are wanted and it can be had.

    A compiler does the like by itself, and knows no more than plain modules; DataParallel's replicas have
    tensors for parameters.
    """
    if len(before) == 1 and folds(before[0], conv) and not has_hooks(conv):
        scale = tuple(map(int, before[0].scale_factor))
        if x.device.type != "cuda" or conv.in_channels <= WIDE:
            return up_convolve(conv, x, scale)
        before = (Repeat(scale),)
    layers = nn.Sequential(*before)
    if torch.compiler.is_compiling() or type(conv) is not nn.Conv3d or is_replica(conv):
        return conv(prepared(layers, x))
    if not torch.is_grad_enabled():
        return convolve(conv, prepared(layers, x))
    return Lean.apply(conv, layers, x, conv.weight, conv.bias, *layers.parameters())


def plain(conv: nn.Module, x: Tensor, *before: nn.Module) -> Tensor:
    """conv(before(x)) as autograd does it."""
    return convolve(conv, prepared(nn.Sequential(*before), x))


# --------------------------------------------------------------- Nearest upsampling and a convolution, as one

WIDE = 32        # on CUDA: with more channels repeated voxels take less time than a folded kernel


def up_convolve(conv: nn.Conv3d, x: Tensor, scale: tuple[int, int, int]) -> Tensor:
    """conv(nearest upsampling of x by `scale`) to rounding, without the upsampled tensor.

    8 multiply-adds an output and input channel instead of 27, where all axes double.
    """
    with torch.autocast(x.device.type, enabled=False):           # sums of weights stay in their own type
        kernel = folded_kernel(conv.weight, scale)
    return F.conv_transpose3d(x, kernel, conv.bias, scale, padding=1)


def folded_kernel(weight: Tensor, scale: Sequence[int]) -> Tensor:
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


def folds(up: nn.Module, conv: nn.Module) -> bool:
    """Whether these two layers are nearest upsampling and a 3x3x3 convolution that keeps the size."""
    if type(up) is not nn.Upsample or up.mode != "nearest" or type(conv) is not nn.Conv3d:
        return False
    plain = conv.kernel_size == (3, 3, 3) and conv.padding == conv.stride == conv.dilation == (1, 1, 1)
    return plain and conv.groups == 1 and conv.padding_mode == "zeros"


class Repeat(nn.Module):
    """Nearest upsampling that keeps channels_last, for which CUDA's own kernel has no form."""
    def __init__(self, scale: tuple[int, int, int]):
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        (b, c, d, h, w), (s0, s1, s2) = x.shape, self.scale
        rows = x.permute(0, 2, 3, 4, 1)[:, :, None, :, None, :, None]
        rows = rows.expand(b, d, s0, h, s1, w, s2, c).reshape(b, d * s0, h * s1, w * s2, c)
        return rows.permute(0, 4, 1, 2, 3)


# ------------------------------------------------------------------------- A convolution that keeps its input

class Lean(torch.autograd.Function):
    """conv(before(x)), of which x alone is kept: `before` (norm, SiLU, upsampling) runs again in backward.

    Plain autograd keeps its output for the convolution besides, and what lies between. The bits are the same
    as without. Parameters are inputs, so that their gradients take autograd's ordinary way.
    """
    @staticmethod
    def forward(ctx, conv: nn.Conv3d, before: nn.Sequential, x: Tensor, weight: Tensor, bias: Tensor | None,
                *parameters: Tensor) -> Tensor:
        ctx.conv, ctx.before = conv, before
        ctx.save_for_backward(x, weight, *parameters)
        return convolve(conv, prepared(before, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        conv, (x, weight, *parameters) = ctx.conv, ctx.saved_tensors
        _, _, x_needed, weight_needed, bias_needed, *needed = ctx.needs_input_grad

        # First h = before(x) again, as a graph of its own that ends in leaves.
        x = x.detach().requires_grad_(x_needed)
        parameters = [p.detach().requires_grad_(wanted) for p, wanted in zip(parameters, needed)]
        names = [name for name, _ in ctx.before.named_parameters()]
        with torch.enable_grad():
            h = prepared(ctx.before, x, dict(zip(names, parameters)))
        edge = torch.autograd.graph.get_gradient_edge(h) if h.requires_grad else None
        dtype, h = h.dtype, h.detach().to(grad.dtype)

        # Then y = weight * h + bias: the gradients of h (where before's graph wants it), weight and bias.
        wanted = edge is not None, weight_needed, bias_needed
        grad_h, grad_weight, grad_bias = convolution_gradients(conv, grad, h, weight.to(grad.dtype), wanted)
        del h                                    # not needed for the gradient of SiLU, which looks at x

        # Last grad_h through `before`, to x and the parameters.
        found = {}
        if edge is not None:
            leaves = [t for t in (x, *parameters) if t.requires_grad]
            found = dict(zip(map(id, leaves), torch.autograd.grad(edge, leaves, grad_h.to(dtype))))
        grads = [g if g is None else g.to(weight.dtype) for g in (grad_weight, grad_bias)]
        return None, None, found.get(id(x)), *grads, *(found.get(id(p)) for p in parameters)


def prepared(before: nn.Module, x: Tensor, parameters: dict[str, Tensor] | None = None) -> Tensor:
    """before(x) in x.dtype, with other parameters if given: CUDA's autocast would widen nearest
    upsampling.
    """
    with torch.autocast(x.device.type, enabled=False):
        if parameters:
            return torch.func.functional_call(before, parameters, (x,))
        return before(x)


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by oneDNN also where PyTorch would not choose it."""
    if not slow_on_cpu(x) or has_hooks(conv):
        return conv(x)
    dense = conv(x.to_mkldnn()).to_dense()
    return dense.contiguous(memory_format=torch.channels_last_3d) if x.stride(1) == 1 else dense


def slow_on_cpu(x: Tensor) -> bool:
    """PyTorch leaves one small float32 sample to an im2col kernel (use_mkldnn in Convolution.cpp).

    oneDNN's takes a fifth of its time. Not where a mode watches the operators (fake tensors, memory
    counting): oneDNN's tensors have no storage to look at. So no memory figure has its reordered copies of
    these tensors.
    """
    if x.device.type != "cpu" or x.dtype is not torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    small = len(x) == 1 and prod(x.shape[1:4]) <= 20480
    return small and onednn_is_free()


# ------------------------------------------------------------------------------------- Private parts of torch

# What each stands in for, and what happens in a version of torch that lacks it.

def convolution_gradients(conv: nn.Conv3d, grad: Tensor, h: Tensor, weight: Tensor,
                          wanted: tuple[bool, bool, bool]) -> list[Tensor | None]:
    """Gradients of input, weight and bias. torch.nn.grad has them one by one, each with a pass of its own."""
    pair = (grad.to_mkldnn(), h.to_mkldnn()) if slow_on_cpu(h) else (grad, h)
    bias = None if conv.bias is None else [conv.out_channels]
    found = torch.ops.aten.convolution_backward(
        *pair, weight, bias, conv.stride, conv.padding, conv.dilation, False, (0, 0, 0), conv.groups, wanted)
    return [g.to_dense() if g is not None and g.is_mkldnn else g for g in found]


def onednn_is_free() -> bool:
    """oneDNN is on, and no TorchDispatchMode looks at operators. Where torch cannot say: its own kernel,
    slower.
    """
    enabled = getattr(torch._C, "_get_mkldnn_enabled", None)
    modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
    return enabled is not None and modes is not None and enabled() and not modes()


def has_hooks(module: nn.Module) -> bool:
    """Forward hooks, which see tensors of the ordinary layout. Modules have had these since torch 0.1."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_replica(module: nn.Module) -> bool:
    """Made by nn.DataParallel. Where the mark is missing: taken for an ordinary module."""
    return getattr(module, "_is_replica", False)
