"""The part of bench/gpu.py about points: a convolution, and steps of the sparse autoencoder.

On a CPU, which may be busy with other work, `cpu_ms` is the processor time of one run after another; there
the guide's network, which takes minutes, is left out. Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator

import torch

import peaks
import sparse_conv
from tasks import TASKS
from training import fit
from training.task import of

# Predicted over measured peak may be so far from 1.
TOLERANCE = 0.1


def rows(options: argparse.Namespace, points: Callable, settings: Callable,
         timed: Callable) -> Iterator[dict]:
    """options: device, cuda, tiny; the others are functions of bench/gpu.py."""
    count, width, edge = (2_000, 16, 32) if options.tiny else (100_000, 64, 128)
    code, bits = points(edge, count).to(options.device), sparse_conv.bits_for(edge)
    dtype = torch.bfloat16 if options.cuda else None
    yield {"what": "table of neighbours", "points": count} | timed(
        options, lambda device: lambda: sparse_conv.neighbours(code, bits))

    def convolution(device: torch.device) -> Callable[[], None]:
        conv, table = sparse_conv.SubMConv3d(width, width).to(device), sparse_conv.neighbours(code, bits)
        x = torch.randn(count, width, device=device, requires_grad=True)

        def once() -> None:
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                out = conv(x, table)
            out.float().square().sum().backward()
        return once
    row = {"what": "forward and backward", "points": count, "channels": width}
    yield row | timed(options, convolution) | processor_time(options, convolution)

    # Whole steps, and whether their peaks are the predicted ones.
    steps = [("sparse_light", count, edge, "none")]
    if options.cuda and not options.tiny:
        steps += [("sparse_light", 500_000, 256, mode) for mode in ("none", "tile")]
        steps += [("sparse_512", 500_000, 256, mode) for mode in ("none", "checkpoint", "tile")]
    for preset, number, side, mode in steps:
        tile = {"memory_tile": "64,64,64"} if mode == "tile" else {}
        cfg = settings(options, task="sparse", preset=preset, data_max_points=number, batch=1,
                       patch=f"{side},{side},{side}", memory_mode=mode, **tile)
        task = of(TASKS, cfg)

        def step(device: torch.device, cfg=cfg, task=task) -> Callable:
            return fit.make_step(cfg, task, device)
        row = {"what": "a step", "preset": preset, "points": number, "mode": mode}
        row |= timed(options, step) | processor_time(options, step)
        predicted = fit.predicted(cfg, task, options.device).bytes / peaks.GIB
        yield row | {"predicted_gib": round(predicted, 4),
                     "right": abs(predicted / row["peak_gib"] - 1) <= TOLERANCE}


def processor_time(options: argparse.Namespace, make: peaks.MakeStep) -> dict:
    if options.cuda:
        return {}
    run = make(options.device)
    run()
    before = time.process_time()
    run()
    return {"cpu_ms": round(1000 * (time.process_time() - before), 1)}
