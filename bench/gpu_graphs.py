"""Of bench/gpu.py: steps with train.cuda_graph beside ordinary ones: how long they take, do they agree?

    python bench/gpu.py --only graphs

Twelve steps of `fast` on the same crops, of two micro-batches each: the first runs the work, the second one
records it, the others replay it. Version 0.1 (2026-11).
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tasks import TASKS
from training import devices
from training.config import TrainConfig
from training.memory import begin
from training.order import MicroBatch
from training.step import train_step
from training.task import of

STEPS, WARM = 12, 4
SIZES = [("32,64,64", 1), ("32,64,64", 8), ("96,96,96", 1)]      # of crops, and how many a micro-batch


def rows(device: torch.device, tiny: bool, settings: Callable[..., TrainConfig]) -> Iterator[dict]:
    """settings(**fields) -> a config for this machine. On a CPU the steps go through the same tensors, but
    nothing is recorded. `weights`, `norm`: relative difference of the two after the last step.
    """
    for size, batch in [("8,16,16", 2)] if tiny else SIZES:
        seconds, weights, norms, failed = {}, {}, {}, None
        for name, on in (("ordinary", False), ("graphs", True)):
            cfg = settings(preset="fast", patch=size, batch=batch, train_cuda_graph=on)
            seconds[name], weights[name], norms[name], failed = some_steps(cfg, device)
        row = {"size": size, "batch": batch}
        row |= {f"{name}_ms": round(1000 * value, 2) for name, value in seconds.items()}
        yield row | {"ratio": round(seconds["graphs"] / seconds["ordinary"], 3), "not_recorded": failed,
                     "weights": difference(weights), "norm": difference(norms)}


def some_steps(cfg: TrainConfig, device: torch.device) -> tuple[float, Tensor, Tensor, str | None]:
    """Median seconds of a warm step; weights, norm of the last gradient, why nothing was recorded."""
    state = begin(cfg, of(TASKS, cfg), device)
    if state.graphs is not None and device.type != "cuda":
        state.graphs.recording = False
    torch.manual_seed(0)
    shape, seeds = (cfg.train.batch, 1, *cfg.data.patch), list(range(cfg.train.batch))
    crops = [devices.to_device(torch.randn(shape), device) for _ in range(2)]
    micro_batches, spent = [MicroBatch(crop, seeds, [0] * len(seeds)) for crop in crops], []
    for _ in range(STEPS):
        started = time.perf_counter()
        norm = train_step(cfg, state, micro_batches).norm        # a step ends by waiting for the device
        spent.append(time.perf_counter() - started)
        state.step += 1
    found = torch.cat([p.detach().flatten().cpu() for p in state.model.parameters()])
    return statistics.median(spent[WARM:]), found, norm, state.graphs and state.graphs.failed


def difference(pair: dict[str, Tensor]) -> float:
    ordinary, replayed = pair["ordinary"].double(), pair["graphs"].double()
    return float((replayed - ordinary).norm() / ordinary.norm())
