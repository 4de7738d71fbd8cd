"""The device of a run: which one, in which precision, with which settings, and what it has used. Version 0.3
(2026-11).
"""
from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training import ranks
from training.config import TrainConfig

PROBE_SECONDS = 60           # for bf16_probe.py, which takes some 5 where bf16 is fast


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


def pick_precision(
    amp: bool, device: torch.device, network: torch.nn.Module
) -> tuple[torch.dtype | None, str]:
    """The autocast dtype for a network (None: float32) and why.

    A CUDA device that is only simulated counts as one with bf16. On a CPU the network's convolutions are
    tried, since some are wrong or slow there.
    """
    if not amp:
        return None, "float32"
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if not (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16")):
            return None, "float32: --amp is off, this CPU has no native bf16"
        wrong = what_is_wrong_with_bf16(convolutions_of(network))
        if wrong is not None:
            return None, f"float32: --amp is off, {wrong}"
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


def convolutions_of(network: torch.nn.Module) -> tuple:
    """Each kind of convolution in a network once, as bf16_probe.py takes them."""
    found = {}
    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv3d) and not isinstance(layer.padding, str):
            kind = (layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,
                    layer.dilation, layer.groups)
            found[kind] = None
    return tuple(found)


@functools.cache
def what_is_wrong_with_bf16(convolutions: tuple) -> str | None:
    """Why these convolutions should not be bf16 on this CPU; None: they are right and not slower.

    Tried in a process of its own: with torch 2.13 some kernels hardly end on CPUs with avx512_bf16 and
    amx_bf16, and others give gradients made of memory that nobody wrote.
    """
    words = [sys.executable, str(Path(__file__).with_name("bf16_probe.py")), str(torch.get_num_threads())]
    try:
        done = subprocess.run(words, input=json.dumps(convolutions), capture_output=True, text=True,
                              timeout=PROBE_SECONDS)
    except subprocess.TimeoutExpired:
        return f"bf16 convolutions of this network hardly end on this CPU (tried for {PROBE_SECONDS} s)"
    if done.returncode != 0:
        return "bf16 convolutions of this network fail on this CPU"
    found = json.loads(done.stdout)
    if not found["error"] < 0.05:
        return "bf16 convolutions give wrong results or gradients on this CPU"
    if found["bf16"] > found["float32"]:
        times = found["bf16"] / found["float32"]
        return f"bf16 convolutions of this network take {times:.1f} times as long as float32 on this CPU"
    return None


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


def machine_memory() -> float:
    """Bytes that the processes of this machine may take: what is built in, or a container's limit below it.

    inf where the system does not say.
    """
    limits = [math.inf]
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        # Without a limit the first says "max", which is no number, the second one beyond any machine.
        with contextlib.suppress(OSError, ValueError):
            limits.append(int(Path(name).read_text()))
    return min(limits)


def peak_gib(device: torch.device) -> float:
    """Peak of this process so far: CUDA's allocator, or the resident memory on other devices."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
