"""Whether convolutions in bf16 are right on this CPU, and how fast; run as a program.

    echo '[[16, 16, [1, 3, 3], [1, 1, 1], [0, 1, 1], [1, 1, 1], 1]]' | python training/bf16_probe.py

A list of convolutions goes in as JSON: channels in and out, kernel, stride, padding, dilation, groups. Out
comes, as JSON, the largest error of any of them, of outputs and gradients, and the seconds that all take,
forward and backward, in float32 and in bf16.

In a process of its own, since on some CPUs oneDNN's bf16 kernels for 1x3x3 hardly end. Version 0.1 (2026-11).
"""
import json
import math
import sys
import time

import torch
import torch.nn.functional as F
from torch import Tensor

MOST_PRODUCTS = 2e8          # of one convolution: a tenth of a second on a slow core
REPEATS = 3                  # of which the fastest counts


def size_of(channels: int, out: int, kernel: list[int], padding: list[int], dilation: list[int],
            groups: int) -> list[int]:
    """D, H, W of an input that is as large as the work allows, from 8 to 48 voxels wide.

    2 voxels deep where the kernel has a depth: there torch 2.13 has given wrong gradients.
    """
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation)]
    deep = max(2, reach[0] - 2 * padding[0]) if kernel[0] > 1 else 1
    each = channels * out / groups * kernel[0] * kernel[1] * kernel[2] * deep
    wide = max(8, min(48, int((MOST_PRODUCTS / each) ** 0.5)))
    return [deep, max(wide, reach[1]), max(wide, reach[2])]


def passes(x: Tensor, weight: Tensor, options: dict) -> tuple[list[Tensor], float]:
    """Output and both gradients of one convolution in float32, and the seconds that they took."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    # Freed at once, so that a kernel that reads memory which nobody wrote shows.
    torch.full((3 * weight.numel(),), 1e30)
    started = time.perf_counter()
    out = F.conv3d(x, weight, **options)
    out.backward(torch.ones_like(out))
    seconds = time.perf_counter() - started
    return [part.detach().float() for part in (out, x.grad, weight.grad)], seconds


def probe(convolutions: list) -> dict[str, float]:
    """The worst error, as a share of the largest value, and seconds of all in float32 and in bf16."""
    worst, seconds = 0.0, {torch.float32: 0.0, torch.bfloat16: 0.0}
    for number, (channels, out, kernel, stride, padding, dilation, groups) in enumerate(convolutions):
        generator = torch.Generator().manual_seed(number)
        options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        size = size_of(channels, out, kernel, padding, dilation, groups)
        x = torch.randn(1, channels, *size, generator=generator)
        weight = torch.randn(out, channels // groups, *kernel, generator=generator)
        found = {}
        for dtype in seconds:
            least = math.inf
            for _ in range(REPEATS):
                image = x.to(dtype).contiguous(memory_format=torch.channels_last_3d)
                found[dtype], taken = passes(image, weight.to(dtype), options)
                least = min(least, taken)
            seconds[dtype] += least
        for a, b in zip(found[torch.float32], found[torch.bfloat16]):
            error = float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
            if math.isnan(error):
                error = math.inf
            worst = max(worst, error)
    return {"error": worst, "float32": seconds[torch.float32], "bf16": seconds[torch.bfloat16]}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(json.dumps(probe(json.load(sys.stdin))))
