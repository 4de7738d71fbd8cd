"""What a run does when: the crops, the random numbers and the learning rate of each optimizer step, functions
of its number alone.

Version 0.3 (2026-11).
"""
from __future__ import annotations

import hashlib
import math
import os
import signal
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import data
from training import ranks
from training.config import OptimConfig, TrainConfig
from training.devices import to_device
from training.signals import SIGNALS
from volumes.boxes import together


class MicroBatch(NamedTuple):
    image: Tensor                             # (b, C, D, H, W) in [-1, 1]
    seeds: list[int]                          # one per sample, of its random numbers
    volumes: list[int]                        # where the crops come from
    label: Tensor | None = None               # what goes with them: (b, D, H, W) int64 for segmentation,
                                              # (b, V) conditions for a denoiser
    crops_in_step: int | None = None          # of all ranks; none: those of the micro-batches at hand
    given: tuple[Tensor, ...] | None = None   # Task.given of it, where the device has that already

    def generators(self) -> list[torch.Generator]:
        """One a sample, made anew by each call, so that a repeated step draws the same noise."""
        return [torch.Generator().manual_seed(seed) for seed in self.seeds]


def learning_rate(o: OptimConfig, step: int, total: int, plateau_factor: float = 1.0) -> float:
    """The rate of step `step` in [0, total): linear warm-up to o.lr, then the schedule as a function of the
    part t in [0, 1) done.

    cosine: lr_min + (lr - lr_min)(1 + cos pi t)/2 (arXiv:1608.03983, Eq. 5; restarts: of each period);
    exponential: lr gamma^t; step: lr gamma^floor(drops t); plateau: lr times the factor that the validations
    gave."""
    warm = warmup_steps(o, total)
    if step < warm:
        return o.lr * (step + 1) / warm
    t = (step - warm) / max(1, total - warm)
    if o.schedule in ("cosine", "cosine_restarts"):
        t = t * o.restarts % 1 if o.schedule == "cosine_restarts" else t
        return o.lr_min + (o.lr - o.lr_min) * (1 + math.cos(math.pi * t)) / 2
    return (
        o.lr
        * {
            "constant": 1.0,
            "exponential": o.gamma**t,
            "step": o.gamma ** int(o.drops * t),
            "plateau": plateau_factor,
        }[o.schedule]
    )


def warmup_steps(o: OptimConfig, total: int) -> int:
    """optim.warmup of the run and at least optim.warmup_least steps, also where the run ends before."""
    return max(int(o.warmup * total), o.warmup_least) if o.warmup else 0


def seed_of(*parts) -> int:
    """A 63-bit seed that is a function of its arguments alone, the same in every process."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def crops_of_step(step: int, epoch_length: int, global_batch: int, start: tuple[int, int] = (0, 0)) -> range:
    """The crops of optimizer step `step`, numbered through the run: windows of global_batch, the last of an
    epoch as short as it is.

    start: a step and the first of its crops, from which on windows have this size (training/stages.py).
    """
    # Where windows of this size begin within an epoch, first what is left of it ...
    step, first = step - start[0], start[1]
    epoch, taken = divmod(first, epoch_length)
    left = steps_per_epoch(epoch_length - taken, global_batch)
    place = step
    # ... and then whole epochs.
    if step >= left:
        more, place = divmod(step - left, steps_per_epoch(epoch_length, global_batch))
        epoch += 1 + more
        first = epoch * epoch_length
    first += place * global_batch
    return range(first, min(first + global_batch, (epoch + 1) * epoch_length))


def steps_per_epoch(epoch_length: int, global_batch: int) -> int:
    return -(-epoch_length // global_batch)


def micro_windows(window: range, batch: int) -> list[range]:
    """This rank's share of the micro-batches that a window is cut into. It may be none of a short one."""
    return [window[batch * i:batch * (i + 1)] for i in ranks.shared(-(-len(window) // batch))]


def step_batches(cfg: TrainConfig, crops: data.Crops, steps: range, device: torch.device,
                 global_batch: int, start: tuple[int, int] = (0, 0)
                 ) -> Iterator[tuple[int, list[MicroBatch]]]:
    """(step, this rank's micro-batches on the device) for each step. Crops and noise are functions of (seed,
    step, place in the window). start: see crops_of_step.
    """
    def shares() -> Iterator[tuple[range, list[range]]]:
        windows = (crops_of_step(step, len(crops), global_batch, start) for step in steps)
        return ((window, micro_windows(window, cfg.train.batch)) for window in windows)
    loader = torch.utils.data.DataLoader(
        crops,
        batch_sampler=[list(part) for _, parts in shares() for part in parts],
        collate_fn=together if cfg.data.points else None,
        num_workers=cfg.data.workers,
        pin_memory=cfg.data.pin_memory and device.type == "cuda",
        # Torchrun's signals reach a rank's whole group.
        worker_init_fn=leave_the_group if ranks.world() > 1 else None,
    )
    # For the workers, who inherit it: Ctrl-C and batch systems signal all of a.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    # Process group, and the run would end by the loss of its workers.
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    for step, (window, parts) in zip(steps, shares()):
        micro_batches = []
        for part in parts:
            image, *label, volumes = next(batches)
            seeds = [seed_of(cfg.train.seed, "noise", step, number - window.start) for number in part]
            micro_batches.append(
                MicroBatch(
                    placed(cfg, image, device),
                    seeds,
                    volumes.tolist(),
                    *(x.to(device, non_blocking=True) for x in label),
                    crops_in_step=len(window),
                )
            )
        yield step, micro_batches


def placed(cfg: TrainConfig, image: Tensor, device: torch.device) -> Tensor:
    """Crops (B, C, D, H, W) on the device. Those of points stay on the CPU: the task takes their points to
    the device, which are some per cent of the voxels.
    """
    return image if cfg.data.points else to_device(image, device)


def leave_the_group(_: int) -> None:
    """In a worker of the DataLoader. A function of the module, since spawn and forkserver pickle it."""
    os.setpgid(0, 0)


def ramp(step: int, start: int, warmup: int) -> float:
    """0 before `start`, then rising linearly to 1 over `warmup` steps."""
    return 0.0 if step < start else min(1.0, (step - start + 1) / max(1, warmup))
