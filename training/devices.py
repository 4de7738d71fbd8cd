"""The device of a run: which one, in which precision, with which settings, and what it has used. Version 0.3
(2026-11).
"""
from __future__ import annotations

import contextlib
import functools
import os
import resource
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from training import ranks
from training.config import TrainConfig


def pick_device(name: str) -> torch.device:
    """Raises ValueError when the device does not exist here. Under torchrun each rank of a machine has a GPU
    of its own.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"train.device must be auto, cuda, cuda:N, mps or cpu, got {name!r}") from None
    found = {"cuda": torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count(),
             "mps": torch.backends.mps.is_available(), "cpu": True}.get(device.type, False)
    if device.type == "cuda" and device.index is None and ranks.world() > 1:
        device = torch.device("cuda", ranks.local_rank())
        found = found and device.index < torch.cuda.device_count()
    if not found:
        raise ValueError(f"train.device={name}: torch {torch.__version__} sees no such device here; use "
                         f"--device cpu, or install a torch build for the card")
    return device


def pick_precision(amp: bool, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype (None: float32) and why. A CUDA device that is only simulated counts as one with
    bf16.
    """
    if not amp:
        return None, "float32"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16")):
            return None, "float32: --amp is off, this CPU has no native bf16"
        if not cpu_bf16_is_right():
            return None, "float32: --amp is off, bf16 convolutions give wrong gradients on this CPU"
        return torch.bfloat16, "bf16 autocast"
    if (
        device.type == "cuda"
        and torch.cuda.is_available()
        and not torch.cuda.is_bf16_supported(including_emulation=False)
    ):
        return torch.float16, "fp16 autocast with a GradScaler: the card has no native bf16"
    return (
        (torch.bfloat16, "bf16 autocast")
        if device.type == "cuda"
        else (torch.float16, "fp16 autocast with a GradScaler")
    )


@functools.cache
def cpu_bf16_is_right() -> bool:
    """False where oneDNN's bf16 weight gradient of a 3x3x3 convolution is not the true one.

    With torch 2.13 on a CPU with avx512_bf16 it holds memory that nobody wrote wherever the depth is 2.
    """
    with _disable_current_modes(), torch.inference_mode(False):  # memtest.py may be simulating a step
        for channels in (16, 32, 64):
            generator = torch.Generator().manual_seed(channels)
            x, grad = (torch.randn(1, channels, 2, 8, 8, generator=generator) for _ in range(2))
            found = []
            for dtype in (torch.float32, torch.bfloat16):
                # Freed at once, so that memory that is read unwritten shows.
                torch.full((3 * 27 * channels ** 2,), 1e30)
                weight = torch.zeros(channels, channels, 3, 3, 3, dtype=dtype, requires_grad=True)
                with torch.enable_grad():
                    F.conv3d(x.to(dtype), weight, padding=1).backward(grad.to(dtype))
                found.append(weight.grad.float())
            if not (found[0] - found[1]).abs().max() < 0.05 * found[0].abs().max():  # not <: NaN too
                return False
    return True


def on_device(module: torch.nn.Module, device: torch.device) -> Any:
    """In channels_last_3d, except on MPS, which has none."""
    return (
        module.to(device)
        if device.type == "mps"
        else module.to(device).to(memory_format=torch.channels_last_3d)
    )


def to_device(image: Tensor, device: torch.device) -> Tensor:
    image = image.to(device, non_blocking=True)
    return image if device.type == "mps" else image.contiguous(memory_format=torch.channels_last_3d)


def set_backend(cfg: TrainConfig) -> list[str]:
    """Process-wide settings, before CUDA starts; returns what to say about them."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = (
        cfg.train.deterministic,
        not cfg.train.deterministic,
    )
    if not torch.cuda.is_available() or cfg.train.device == "cpu":
        return []
    wanted = [f"expandable_segments:{cfg.memory.expandable_segments}"]
    wanted += [f"max_split_size_mb:{cfg.memory.max_split_size_mb}"] if cfg.memory.max_split_size_mb else []
    if torch.cuda.is_initialized():
        return [f"CUDA allocator: already started, {','.join(wanted)} not applied"]
    name = "PYTORCH_CUDA_ALLOC_CONF"
    if name in os.environ:
        return [f"CUDA allocator: {name}={os.environ[name]} from the environment is kept"]
    os.environ[name] = ",".join(wanted)
    return [f"CUDA allocator: {os.environ[name]}"]


def gpu_use(device: torch.device) -> dict[str, float]:
    """Memory that CUDA's allocator holds and, where NVIDIA's library is installed, the share of time in which
    the card was busy.
    """
    if device.type != "cuda":
        return {}
    use = {"gpu_reserved_gib": round(torch.cuda.memory_reserved(device) / 2 ** 30, 4)}
    # The library may be missing (pip install nvidia-ml-py), not fit the driver, or not know the card's MIG
    # slice; it raises errors of its own for that. A value for the log is no reason to end a run.
    with contextlib.suppress(Exception):
        use["gpu_percent"] = torch.cuda.utilization(device)
    return use


def peak_gib(device: torch.device) -> float:
    """Peak of this process so far: CUDA's allocator, or the resident memory on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
