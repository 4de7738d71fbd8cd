"""A volume of any size through a network that sees one window: windows that overlap, and the weighted mean of
what they say. Needs torch alone; the network is passed in.

    slabs = window_logits(unet, x, (64, 128, 128))          # x (1, C, D, H, W) -> (K, slab, H, W) along D

Follows: nnU-Net (doi:10.1038/s41592-020-01008-z). Deviation: sums are kept for one window's depth, not for
the volume. Shapes: C channels, K classes, D H W depth height width of the volume, d h w of a window.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import ceil

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(size: int, window: int, overlap: float) -> list[int]:
    """First voxels of evenly spread windows that cover an axis and share at least about `overlap` of it."""
    count = 1
    if window < size:
        count += ceil((size - window) / max(1, window * (1 - overlap)))
    return sorted({round(i * (size - window) / max(1, count - 1)) for i in range(count)})


def window_weight(window: Sequence[int]) -> Tensor:
    """Gaussian of sigma = window / 8, (D, H, W), as in nnU-Net: a window knows least about its border."""
    distances = [(torch.arange(n) - (n - 1) / 2) / (n / 8) for n in window]      # in sigmas
    d, h, w = (torch.exp(-0.5 * distance.square()) for distance in distances)
    return d[:, None, None] * h[:, None] * w


def window_logits(network: Callable[[Tensor], Tensor], x: Tensor, window: Sequence[int], overlap: float = 0.5,
                  background: float = 0.0,
                  tick: Callable[[int, int], None] = lambda done, total: None) -> Iterator[Tensor]:
    """A whole volume x (1, C, D, H, W) through windows that overlap -> its logits, slab after slab along D.

    network: (1, C, d, h, w) -> logits (1, K, d, h, w). Slabs are (K, slab, H, W) float32 on the CPU. A
    U-Net sees, and normalises by, all that it is given, so windows are as large as its training's crops. A
    voxel's logits are the mean over the windows that hold it, weighted by `window_weight`; sums are kept for
    one window's depth. A volume of a window's size is one plain forward pass; a shorter axis is filled up
    with `background` on both sides, as a crop is. tick is told of windows done, and of how many.
    """
    size = x.shape[2:]
    short = [max(0, w - n) for w, n in zip(window, size)]
    if any(short):
        # fill up, segment that, cut the filling off again
        lead = [n // 2 for n in short]
        margins = [p for axis in (2, 1, 0) for p in (lead[axis], short[axis] - lead[axis])]
        x = F.pad(x, margins, value=background)
        inner = [slice(a, n - (b - a)) for a, b, n in zip(lead, short, x.shape[2:])]
        depth = inner[0] if short[0] else slice(None)      # a filled depth is one window long: one slab
        for slab in window_logits(network, x, window, overlap, background, tick):
            yield slab[:, depth, inner[1], inner[2]]
        return
    rows, columns, places = ([*window_starts(n, w, overlap)] for n, w in zip(size, window))
    total, done = len(rows) * len(columns) * len(places), 0

    def logits_at(d: int, h: int, w: int) -> Tensor:
        part = x[:, :, d:d + window[0], h:h + window[1], w:w + window[2]]
        return network(part.contiguous())[0].float().cpu()

    if total == 1:
        yield logits_at(0, 0, 0)
        tick(1, 1)
        return
    weight, sums = window_weight(window), None             # sums of weight * logits, and of weight
    mass = torch.zeros(window[0], *size[1:])
    for d, following in zip(rows, [*rows[1:], size[0]]):
        for h in columns:
            for w in places:
                logits = logits_at(d, h, w)
                if sums is None:
                    sums = torch.zeros(len(logits), *mass.shape)
                sums[:, :, h:h + window[1], w:w + window[2]] += logits.mul_(weight)
                mass[:, h:h + window[1], w:w + window[2]] += weight
                done += 1
                tick(done, total)
        # no later window reaches the slices before `following`; the rest moves to the front
        ready = following - d
        yield sums[:, :ready] / mass[:ready]
        for kept in (sums.movedim(1, 0), mass):
            kept[:window[0] - ready] = kept[ready:].clone()
            kept[window[0] - ready:] = 0
