"""Predicts, counts and measures the peak memory of a training step that is handed to it, and plans what fits. Needs torch and nothing else.

    peak = predict(make_step)                     # make_step(device) builds everything and returns step(), e.g. train.make_step
    print(peak.bytes / GIB, peak.activations)     # no GPU, nothing computed: 1024^3 takes seconds
    python memtest.py --preset high_res --resolution 512,512,512 --budget 24

How: the real step runs once on fake tensors (torch's FakeTensorMode: shapes without data) as on a CUDA device with bf16, and the storages
that live at the same time are added up, rounded to the 512 bytes of CUDA's allocator. `count` does the same with real steps on the CPU.
A prediction leaves out what no tensor of the step owns: the CUDA context (0.3-0.6 GiB), workspaces and layout copies inside kernels
(cuDNN), and fragmentation (up to 1 MiB a block, and whatever the allocator cannot reuse). The planner keeps 10 % free for them.

Sizes are D,H,W. Memory is in bytes inside, in GiB (2^30 bytes) wherever it is shown.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

GIB = 2 ** 30
SPARE = 0.1                                                      # share of a budget that a plan leaves to what predictions leave out
LEFT_OUT = ("Predictions count tensors: the CUDA context (0.3-0.6 GiB), cuDNN workspaces and other memory inside kernels, and\n"
            "fragmentation come on top.")
MakeStep = Callable[[torch.device], Callable[[], object]]        # builds networks, optimizer, batch on a device; the result runs a step


# ------------------------------------------------------------------------------------------------------------------- live storages

@dataclass(frozen=True)
class Peak:
    """The most bytes alive at one moment of the steps, and what they were."""
    bytes: int
    parameters: int                                              # of every network whose optimizer made a step
    gradients: int                                               # theirs
    optimizer: int                                               # states, such as AdamW's two moments
    activations: int                                             # the rest: batch, activations, temporaries, networks that are not trained
    first_step: int                                              # peak of the first step alone, before the optimizer has states


class LiveStorages(TorchDispatchMode):
    """While the mode is on, logs each storage of one kind of device that operators allocate, and when it is freed.

    A storage counts once however many tensors and views share it. Temporaries inside an operator's kernel are not seen.
    """
    def __init__(self, device_type: str):
        super().__init__()
        self.device_type, self.block = device_type, 512 if device_type == "cuda" else 1  # CUDA's caching allocator rounds up
        self.events: list[tuple[int, int]] = []                  # (number of the storage, bytes allocated or, negative, freed)
        self.alive: dict[int, tuple[int, weakref.ref]] = {}      # id of a storage -> its number and the callback that sees it go
        self.kinds: dict[int, str] = {}                          # number -> field of Peak, for those that optimizers hold

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.see(tensor)
        return out

    def see(self, tensor: Tensor) -> int | None:
        """The number of the tensor's storage, which joins the log when it is new; None on another kind of device."""
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()                       # the same object for every view, until the last of them dies
        key = id(storage)
        if key not in self.alive:
            number, size = len(self.events), -(-storage.nbytes() // self.block) * self.block

            def gone(_):
                del self.alive[key]
                self.events.append((number, -size))

            self.alive[key] = number, weakref.ref(storage, gone)
            self.events.append((number, size))
        return self.alive[key][0]

    def see_optimizer(self, optimizer: Optimizer, *_) -> None:
        """Optimizer hook: notes which storages are parameters, gradients and states."""
        held = [(p, "parameters") for group in optimizer.param_groups for p in group["params"]]
        held += [(p.grad, "gradients") for p, _ in held if p.grad is not None]
        held += [(value, "optimizer") for state in optimizer.state.values() for value in tensors_in(list(state.values()))]
        self.kinds.update((self.see(tensor), kind) for tensor, kind in held)

    def peak(self, start: int = 0, stop: int | None = None, steady: bool = False) -> tuple[int, Counter]:
        """Largest sum of live bytes after any of events[start:stop], and its parts by kind.

        steady: as if the optimizer states, which the first step leaves behind, had been there before it.
        """
        events = self.events[:stop]
        if steady:
            states = [event for event in events if self.kinds.get(event[0]) == "optimizer"]
            events = states + [event for event in events if self.kinds.get(event[0]) != "optimizer"]
            start += sum(number >= start for number, _ in states)
        totals = list(accumulate(size for _, size in events))
        at = max(range(max(start - 1, 0), len(events)), key=totals.__getitem__, default=None)
        parts = Counter()
        for number, size in events[:0 if at is None else at + 1]:
            parts[self.kinds.get(number, "activations")] += size
        return sum(parts.values()), parts


def tensors_in(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


def peak_of_steps(make_step: MakeStep, device: torch.device, steps: int) -> Peak:
    """Peak of the steps, building not included. With one step its optimizer's states, which it leaves behind, count from its start."""
    with LiveStorages(device.type) as log, contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(log.see_optimizer).remove)
        step, starts = make_step(device), []
        for _ in range(steps):
            gc.collect()                                         # reference cycles of the last step are no memory of this one
            starts.append(len(log.events))
            step()
        most, parts = log.peak(starts[0], steady=steps == 1)
        first, _ = log.peak(starts[0], starts[1] if steps > 1 else None)
    return Peak(most, *(parts[kind] for kind in ("parameters", "gradients", "optimizer", "activations")), first)


def count(make_step: MakeStep) -> Peak:
    """Of two real steps on the CPU, to check predictions against: memory that kernels allocate inside is not seen."""
    return peak_of_steps(make_step, torch.device("cpu"), 2)


def predict(make_step: MakeStep, device: torch.device | str = "cuda") -> Peak:
    """Of any step but the first on `device` (cuda: simulated with bf16, needs no GPU; cpu); nothing is computed or allocated.

    Gradients are taken to be freed or reused by the next step. Raises RuntimeError where this torch build cannot simulate CUDA, or the step
    does what depends on data that are not there.
    """
    with simulated(torch.device(device)) as simulated_device:
        return peak_of_steps(make_step, simulated_device, 1)


# ------------------------------------------------------------------------------------------------------- simulated device (private API)

PLAIN = {                                                        # most of a step; detach also because FakeTensorMode's leaves a weak
                                                                 # reference to parameters, with which Module.to() refuses a second move
    *(getattr(torch.ops.aten, name).default for name in (
        "convolution", "convolution_backward", "silu", "silu_backward", "slice_backward", "detach", "_to_copy", "copy_", "abs", "sign",
        "sum")),
    *(getattr(torch.ops.aten, name).Tensor for name in ("slice", "add", "add_", "sub", "mul", "mul_", "div")),
}


class FakeDevice(FakeTensorMode):
    """FakeTensorMode that a whole training step passes through: scalars can be read, modules moved, CUDA needs no CUDA build.

    stand_in: the device that C++ takes fake CUDA tensors for. Without a CUDA build autograd asks the accelerator for streams and ends the
    process; it does not for XLA, and XLA tensors follow CUDA's autocast list. Python sees `cuda` throughout.
    """
    def __init__(self, stand_in: torch.device | None):
        super().__init__()
        self.stand_in = stand_in

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func is torch.ops.prim.device.default and self.stand_in and args[0].fake_device.type == "cuda":
            return self.stand_in
        if self.stand_in and kwargs.get("device") == self.stand_in:  # C++ asks for a tensor beside another one
            kwargs = {**kwargs, "device": torch.device("cuda:0")}
        inputs = list(tensors_in(args)) if func in PLAIN and "device" not in kwargs else []
        if inputs and all(isinstance(t, FakeTensor) and t.fake_device == inputs[0].fake_device and t.constant is None for t in inputs):
            device = inputs[0].fake_device                       # (constant: a scalar whose value FakeTensorMode follows)
            with in_kernel_invocation_manager(self):             # the meta kernel itself: 5 times faster than by way of FakeTensorMode
                out = func(*args, **kwargs)
            if isinstance(out, tuple):
                return tuple(t if t is None else FakeTensor(self, t, device) for t in out)
            return out if isinstance(out, FakeTensor) else FakeTensor(self, out, device)
        try:
            return super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            if func is aten._local_scalar_dense.default:         # item(): nothing overflows, and what is checked is true
                return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
            raise


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False) -> Tensor:
    """What scaled_dot_product_attention takes on CUDA: flash for 16 bits, memory-efficient otherwise; never the N x N matrix."""
    if q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


@contextlib.contextmanager
def simulated(device: torch.device) -> Iterator[torch.device]:
    """Everything inside runs on fake tensors; yields the device to build on. All that leans on torch's private parts is in this section."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))   # the step seeds itself; the caller's generator goes on as it was
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stand_in = None
        if device.type == "cuda":
            stack.enter_context(mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False))
            stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
            library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
            for key in ("CUDA", "AutogradCUDA"):
                library.impl("scaled_dot_product_attention", fused_attention, key)
            if not torch.backends.cuda.is_built():
                stand_in = stand_in_for_cuda()
                library.impl("silu_backward", lambda grad, _: torch.empty_like(grad), "CUDA")  # exists: else it is 4 composite operators
        stack.enter_context(FakeDevice(stand_in))
        yield torch.device("cuda:0") if device.type == "cuda" else device


def stand_in_for_cuda() -> torch.device:
    """XLA, with the do-nothing device guard of `meta` where no real one is registered. Raises RuntimeError where libc10 hides the table."""
    name = {"darwin": "libc10.dylib", "win32": "c10.dll"}.get(sys.platform, "libc10.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        raise RuntimeError("this CPU-only build of torch cannot simulate CUDA on this system; install a CUDA build (no GPU needed), or "
                           "predict with --device cpu") from None
    xla, meta = 9, 14                                            # c10::DeviceType
    guards[xla] = guards[xla] or guards[meta]
    return torch.device("xla:0")


# --------------------------------------------------------------------------------------------------------------------- measurement

class Measured(NamedTuple):
    allocated: int                                               # bytes: torch.cuda.max_memory_allocated; on the CPU those of `count`
    reserved: int | None                                         # bytes that the allocator took from the card; None on the CPU
    seconds: float                                               # median of a step


def measure(make_step: MakeStep, device: torch.device, repeats: int = 5) -> Measured:
    """Runs the step for real: two steps to warm up (kernels chosen, optimizer states there), then the median time of `repeats`."""
    cuda = device.type == "cuda"
    allocated = None if cuda else count(make_step).bytes
    step, seconds = make_step(device), []
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)               # the building is no part of the step
    for _ in range(2 + repeats):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    if not cuda:
        return Measured(allocated, None, median(seconds[2:]))
    return Measured(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), median(seconds[2:]))


def environment_warnings() -> list[str]:
    """What is wrong with this machine's torch for large volumes, one line each; empty where nothing is, or where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    found = [cudnn_warning(torch.__version__, torch.backends.cudnn.version())]
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})  # what the running allocator does, whatever the environment says
    if not settings.get("expandable_segments", False):
        found.append("expandable_segments is not active: a long run fragments the card's memory; set PYTORCH_CUDA_ALLOC_CONF="
                     "expandable_segments:True before Python starts")
    return [text for text in found if text]


def cudnn_warning(torch_version: str, cudnn_version: int | None) -> str | None:
    """torch 2.9.x runs bf16 conv3d through a fallback that takes several times the memory with cuDNN < 9.15 (91500)."""
    if torch_version.split(".")[:2] == ["2", "9"] and (cudnn_version or 0) < 91500:
        return (f"torch {torch_version} with cuDNN {cudnn_version} takes far more memory than predicted for conv3d in bf16; upgrade torch, "
                f"or pip install 'nvidia-cudnn-cu12>=9.15'")
    return None


# ------------------------------------------------------------------------------------------------------------------------- planner

MOST_WORK = 2.0                                                  # tile plans that take longer, over a checkpointed step, are not considered
Size = tuple[int, int, int]
MakeStepFor = Callable[[Size, dict], MakeStep]                   # (D,H,W of the volume, fields of section `memory`) -> its step


class Plan(NamedTuple):
    """What `plan` found: the settings that fit, or, where none does, the least hungry ones."""
    memory: dict                                                 # fields of section `memory`
    bytes: int                                                   # their predicted peak
    limit: int                                                   # bytes that a prediction may reach: the budget less SPARE
    tried: list[tuple[dict, int]]                                # every setting that was predicted, with its peak

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


def tile_plans(vae, size: Size, batch: int, dtype: torch.dtype) -> list:
    """vae3d.TilePlan by rising work, none above MOST_WORK, of `vae` (a vae3d.VAE3D, on any device) for volumes of `size`."""
    plans = vae.memory("tile").tile_plans(size, batch, dtype)
    return [p for p in plans if p.work <= MOST_WORK] or plans[:1]


def memory_settings(vae, size: Size, batch: int, dtype: torch.dtype, limit: float = math.inf) -> list[dict]:
    """Candidates for `plan`, by rising recomputation: none, checkpoint, then tile plans.

    dtype: of the activations. Of the tile plans those whose own estimate is within `limit` bytes, or the one of least memory.
    """
    plans = tile_plans(vae, size, batch, dtype)
    within = [p for p in plans if p.peak_bytes <= limit] or plans[-1:]
    return [{"mode": "none"}, {"mode": "checkpoint"}, *(tile_memory(p) for p in within)]


def tile_memory(plan) -> dict:
    return {"mode": "tile", "tile": plan.tile, "stretch": plan.stretch}


def plan(make_step_for: MakeStepFor, size: Size, budget: float, candidates: Sequence[dict], device: torch.device | str = "cuda") -> Plan:
    """The first of `candidates` (cheapest first) whose step at `size` is predicted to leave SPARE of `budget` (bytes) free."""
    limit, tried = int(budget * (1 - SPARE)), []
    for memory in candidates:
        tried.append((memory, predict(make_step_for(size, memory), device).bytes))
        if tried[-1][1] <= limit:
            return Plan(*tried[-1], limit, tried)
    return Plan(*min(tried, key=lambda row: row[1]), limit, tried)


def largest(peak_of: Callable[[Size], int], shape: Sequence[float], unit: int, limit: int,
            estimate: Callable[[Size], float] = lambda size: 1000 * math.prod(size), close: float = 0.0) -> tuple[Size, int] | None:
    """The largest volume in the proportions of `shape` whose peak_of(size), in bytes, is at most `limit`, with that peak; None: none is.

    Each axis is the multiple of `unit` next to its proportion. peak_of takes seconds, so the next size to ask it for is the largest that
    fits by the cheap `estimate`, corrected by the ratio of the two at the last size; every third is the middle of the bracket. A peak
    between 1 - close and 1 times the limit ends the search.
    """
    low, high, ratio, tries, fitting = 0, None, 1.0, 0, None     # longest axis in units: `low` fits, `high` does not

    def size_of(k: int) -> Size:
        return tuple(max(1, round(k * n / max(shape))) * unit for n in shape)

    while high is None or high - low > 1:
        a, b = low, high or max(4, 2 * low)
        while high is None and b <= 8 * max(low, 4) and ratio * estimate(size_of(b)) <= limit:
            a, b = b, 2 * b
        while b - a > 1:
            middle = (a + b) // 2
            a, b = (middle, b) if ratio * estimate(size_of(middle)) <= limit else (a, middle)
        k, tries = max(a, low + 1), tries + 1
        if high is not None and tries % 3 == 0:
            k = (low + high) // 2
        peak = peak_of(size_of(k))
        ratio = peak / estimate(size_of(k))
        if peak <= limit:
            low, fitting = k, (size_of(k), peak)
            if peak > limit * (1 - close):
                break
        else:
            high = k
    return fitting


# --------------------------------------------------------------------------------------------------------------------------- table

@dataclass
class Row:
    """One setting. The fields are the keys of --json, up to `fits`."""
    preset: str
    resolution: Size
    batch: int
    amp: bool
    mode: str
    tile: Size | str | None                                      # memory.tile or auto; None in other modes
    params: int                                                  # of the autoencoder
    predicted_gib: float | None = None
    measured_gib: float | None = None                            # allocated
    step_seconds: float | None = None
    fits: bool | None = None
    reserved_gib: float | None = None
    error: str | None = None                                     # why there is no prediction, or no measurement

    def to_json(self) -> dict:
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in ("reserved_gib", "error")}

    @property
    def label(self) -> str:
        return f"{'AMP' if self.amp else 'fp32'} {self.mode}" + (f" {size_text(self.tile)}" if self.tile else "")


def change(cfg, sections: dict[str, dict]):
    """The dataclass `cfg` with some fields of its sections replaced."""
    return dataclasses.replace(cfg, **{name: dataclasses.replace(getattr(cfg, name), **fields) for name, fields in sections.items()})


def size_text(size) -> str:
    return ",".join(map(str, size)) if isinstance(size, (tuple, list)) else str(size)


def memory_text(memory: dict) -> str:
    return memory["mode"] + (f" {size_text(memory['tile'])}, stretches {memory['stretch']}" if memory["mode"] == "tile" else "")


def gib_text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 0.1 else f"{value:.2f}"


def fill(row: Row, make_step: MakeStep, device: str, measured: bool) -> Row:
    """Predict the row and, when asked, run it. A step that fails makes a row that says so: the others are worth having.

    make_step takes `rehearsal` besides, as train.make_step does.
    """
    for quantity in ("prediction", "measurement")[:1 + measured]:
        try:
            if quantity == "prediction":
                row.predicted_gib = predict(functools.partial(make_step, rehearsal=True), device).bytes / GIB
            else:
                allocated, reserved, row.step_seconds = measure(make_step, torch.device(device))
                row.measured_gib, row.reserved_gib = allocated / GIB, reserved and reserved / GIB
        except Exception as error:  # whatever the step may raise; the row carries it
            text = " ".join(str(error).split())
            row.error = f"no {quantity}: {type(error).__name__}{': ' + text[:300] if text else ''}"
    return row


def in_process(arguments: Sequence[str]) -> dict:
    """`memtest.py --one ARGUMENTS` in a fresh process -> its row, so that an out-of-memory or a crash there does not spoil the next."""
    done = subprocess.run([sys.executable, __file__, "--one", *arguments], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"preset"')]
    if lines:
        return json.loads(lines[-1])
    said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
    return {"error": f"process ended with {done.returncode}: {said[:300]}"}


def print_table(rows: Sequence[Row], file=None) -> None:
    first = rows[0].predicted_gib
    head = ["setting", "batch", "predicted GiB", "against row 1", "measured GiB", "ratio", "reserved GiB", "s/step", "fits"]
    body = []
    for row in rows:
        against = "-" if not first or row.predicted_gib is None else f"{100 * (row.predicted_gib / first - 1):+.0f} %"
        ratio = "-" if not row.measured_gib or row.predicted_gib is None else f"{row.predicted_gib / row.measured_gib:.3f}"
        seconds = "-" if row.step_seconds is None else f"{row.step_seconds:.3f}"
        fits = "-" if row.fits is None else "yes" if row.fits else "no"
        body.append([row.label, str(row.batch), gib_text(row.predicted_gib), against, gib_text(row.measured_gib), ratio,
                     gib_text(row.reserved_gib), seconds, fits])
    used = [i for i in range(len(head)) if i < 4 or any(line[i] != "-" for line in body)]
    widths = [max(len(line[i]) for line in [head, *body]) for i in range(len(head))]
    for line, row in zip([head, *body], [None, *rows]):
        text = "  ".join(line[i].rjust(widths[i]) if i else line[i].ljust(widths[i]) for i in used)
        print(text + (f"  {row.error}" if row and row.error else ""), file=file)


# ------------------------------------------------------------------------------------------------------------------------- picture

GLYPHS = {                                                       # 5x7 dots: a byte per column, lowest bit on top
    " ": "0000000000", "+": "08083e0808", ",": "0050300000", "-": "0808080808", ".": "0060600000", "/": "2010080402", ":": "0036360000",
    "%": "2313086462", "_": "4040404040", "(": "001c224100", ")": "0041221c00", "=": "1414141414", "?": "0201510906",
    "0": "3e5149453e", "1": "00427f4000", "2": "4261514946", "3": "2141454b31", "4": "1814127f10", "5": "2745454539", "6": "3c4a494930",
    "7": "0171090503", "8": "3649494936", "9": "064949291e", "A": "7e1111117e", "B": "7f49494936", "C": "3e41414122", "D": "7f4141221c",
    "E": "7f49494941", "F": "7f09090901", "G": "3e4149497a", "H": "7f0808087f", "I": "00417f4100", "J": "2040413f01", "K": "7f08142241",
    "L": "7f40404040", "M": "7f020c027f", "N": "7f0408107f", "O": "3e4141413e", "P": "7f09090906", "Q": "3e4151215e", "R": "7f09192946",
    "S": "4649494931", "T": "01017f0101", "U": "3f4040403f", "V": "1f2040201f", "W": "3f4038403f", "X": "6314081463", "Y": "0708700807",
    "Z": "6151494543",
}


def draw_text(image: Tensor, text: str, y: int, x: int, scale: int = 2) -> None:
    """Writes `text` in capitals into (height, width, 3) uint8 with its upper left corner at (y, x); a character takes 7 x 6 dots."""
    for i, character in enumerate(text.upper()):
        columns = torch.tensor(list(bytes.fromhex(GLYPHS.get(character, GLYPHS["?"]))))
        dots = (columns[None, :] >> torch.arange(7)[:, None] & 1).bool()  # (7, 5)
        dots = dots.repeat_interleave(scale, 0).repeat_interleave(scale, 1)
        image[y:y + 7 * scale, x + 6 * scale * i:x + 6 * scale * i + 5 * scale][dots] = 32


def draw_table(rows: Sequence[Row], title: str) -> Tensor:
    """Bars of the predicted peaks (blue) over the measured ones (orange), each with its label and GiB -> (height, width, 3) uint8."""
    labels = [f"{row.label} x{row.batch}" for row in rows]
    left, bars, line = 12 * max(map(len, labels)) + 24, 520, 44
    image = torch.full((line * (len(rows) + 1), max(left + bars + 150, 12 * len(title) + 24), 3), 255, dtype=torch.uint8)
    draw_text(image, title, 14, 12)
    most = max([value for row in rows for value in (row.predicted_gib, row.measured_gib) if value], default=1.0)
    for i, (row, label) in enumerate(zip(rows, labels), 1):
        draw_text(image, label, line * i + 10, 12)
        thick = 14 if row.measured_gib else 30
        for value, y, colour in ((row.predicted_gib, line * i, (86, 140, 200)), (row.measured_gib, line * i + 16, (230, 150, 70))):
            if value:
                width = max(1, round(bars * value / most))
                image[y:y + thick, left:left + width] = torch.tensor(colour, dtype=torch.uint8)
                draw_text(image, f"{gib_text(value)} GIB", y + (thick - 14) // 2, left + width + 8)
        if row.predicted_gib is None:
            draw_text(image, "no prediction", line * i + 10, left)
    return image


# -------------------------------------------------------------------------------------------------------------------- command line

def build_parser(parser_class) -> argparse.ArgumentParser:
    parser = parser_class(prog="memtest.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                          description="Peak memory of a training step: predicted without a GPU, measured on one.\n" + LEFT_OUT,
                          epilog="Besides: every flag of train.py (--preset, --batch, --vae.norm group ...; see train.py --help).\n"
                                 "Device: cuda, present or not, unless --device cpu.")
    parser.add_argument("--resolution", metavar="D,H,W", help="the volume (train.py's --patch) [64,256,256]")
    parser.add_argument("--budget", metavar="GIB", nargs="?", const="card", help="plan what fits; without a number: the card's free memory")
    parser.add_argument("--measure", action=argparse.BooleanOptionalAction, help="run each row for real [when there is a GPU]; with "
                        "--device cpu its live storages are counted")
    parser.add_argument("--one", action="store_true", help="no table: only the row of the flags given, as a JSON line")
    for kind, what in (("json", "the rows"), ("png", "a bar picture of the rows"), ("yaml", "the plan, for train.py --config")):
        parser.add_argument(f"--{kind}", metavar="FILE", help=f"write {what}")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 a row has no prediction or nothing fits, 2 cannot start."""
    import pictures  # only here: the functions above work in a folder without them
    import train

    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        own, flags = build_parser(train.Parser).parse_known_args(argv)
        named = {flag.split("=")[0] for flag in flags}
        if own.resolution or not named & {"--config", "--patch", "--data.patch"}:
            flags = [*flags, "--patch", own.resolution or "64,256,256"]
        if not named & {"--config", "--batch", "--train.batch"}:
            flags = [*flags, "--batch", "1"]
        cfg = train.load_config(flags)
        cfg.memory.tile_parallel = False                         # a rank's peak is that of one process, and other modes are tried
        if cfg.train.device not in ("auto", "cpu") and not cfg.train.device.startswith("cuda"):
            raise ValueError(f"--device must be cuda or cpu, got {cfg.train.device}: nothing is known about its allocator")
        device = "cuda" if cfg.train.device == "auto" else cfg.train.device
        on_card = device != "cpu" and torch.cuda.is_available()
        measured = on_card if own.measure is None else own.measure
        if measured and device != "cpu" and not on_card:
            raise ValueError("--measure needs a GPU, and torch sees none; leave it out, or add --device cpu")
        budget = budget_bytes(own.budget, device, on_card)
        for path in (own.json, own.png, own.yaml):
            if path and not Path(path).absolute().parent.is_dir():
                raise ValueError(f"{path}: no such folder {Path(path).absolute().parent}; make it first")
    except (ValueError, train.DataError) as error:
        print(f"memtest.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if measured and on_card:                                     # the run's own kernels and allocator, here and in every row's process
        train.set_backend(cfg)
    if own.one:
        row = fill(new_row(train, cfg), functools.partial(train.make_step, cfg), device, measured)
        print(json.dumps(dataclasses.asdict(row)))
        return 0 if row.predicted_gib is not None else 1
    rows = table(train, cfg, device, measured, budget)
    title = f"{cfg.preset} {size_text(cfg.data.patch)}, {rows[0].params / 1e6:.2f} M parameters, one step on {device}"
    print(title)
    print_table(rows)
    print(LEFT_OUT)
    for text in environment_warnings():
        print(f"warning: {text}")
    if own.json:
        Path(own.json).write_text(json.dumps([row.to_json() for row in rows], indent=1) + "\n")
    if own.png:
        Path(own.png).write_bytes(pictures.png(draw_table(rows, title)))
    planned = own.budget is None or print_plan(train, cfg, argv, budget, device, own.yaml)
    return 0 if planned and all(row.predicted_gib is not None for row in rows) else 1


def budget_bytes(text: str | None, device: str, on_card: bool) -> float | None:
    """--budget in bytes: a number of GiB, or what the card has free; None without either."""
    if text not in (None, "card"):
        try:
            if 0 < float(text) < math.inf:
                return float(text) * GIB
        except ValueError:
            pass
        raise ValueError(f"--budget must be a number of GiB above 0, got {text!r}")
    if on_card:                                                  # asked in another process: a context here would take what the rows need
        code = f"import torch; print(torch.cuda.mem_get_info({device!r})[0])"
        return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    if text == "card":
        raise ValueError("--budget needs a number here, since torch sees no GPU whose free memory it could take: --budget 24")
    return None


def new_row(train, cfg) -> Row:
    with torch.device("meta"):
        params = sum(p.numel() for p in train.build_network(cfg).parameters())
    return Row(cfg.preset, cfg.data.patch, cfg.train.batch, cfg.train.amp, cfg.memory.mode,
               (cfg.memory.tile or "auto") if cfg.memory.mode == "tile" else None, params)


def table(train, cfg, device: str, measured: bool, budget: float | None) -> list[Row]:
    """fp32, AMP, then AMP with every further mode of the dial; and AMP again with twice the batch."""
    rows = []
    for amp, mode, times in [(False, "none", 1), *((True, mode, n) for n in (1, 2) for mode in train.memory_modes(cfg))]:
        chosen = change(cfg, {"train": {"amp": amp, "batch": times * cfg.train.batch}, "memory": {"mode": mode}})
        row = new_row(train, chosen)
        if measured:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "row.yaml")
                path.write_text(train.to_yaml(chosen))
                row = dataclasses.replace(row, **in_process(["--config", str(path), "--device", device, "--measure"]))
        else:
            fill(row, functools.partial(train.make_step, chosen), device, False)
        if budget and row.predicted_gib is not None:
            row.fits = row.predicted_gib * GIB <= budget * (1 - SPARE)
        rows.append(row)
    return rows


def print_plan(train, cfg, argv: Sequence[str], budget: float, device: str, yaml: str | None) -> bool:
    """Say what fits into `budget` bytes and with which settings, in bf16 AMP unless a flag speaks of amp; False: nothing does."""
    if not {flag.split("=")[0] for flag in argv} & {"--amp", "--train.amp"}:
        cfg = change(cfg, {"train": {"amp": True}})
    with torch.device("meta"):
        vae = train.VAE3D(cfg.vae)
    dtype, limit = torch.bfloat16 if cfg.train.amp else torch.float32, int(budget * (1 - SPARE))

    def make_step_for(size: Size, memory: dict) -> MakeStep:
        chosen = change(cfg, {"data": {"patch": size}, "memory": memory})
        return functools.partial(train.make_step, chosen, rehearsal=True)

    @functools.cache
    def leanest(size: Size):
        return tile_plans(vae, size, cfg.train.batch, dtype)[-1]

    def peak_of(size: Size) -> int:
        return predict(make_step_for(size, tile_memory(leanest(size))), device).bytes

    size, unit = cfg.data.patch, math.lcm(16, *cfg.vae.total_stride)
    print(f"\nBudget {budget / GIB:.2f} GiB, {100 * SPARE:.0f} % of it kept free, {'bf16 AMP' if cfg.train.amp else 'fp32'}, "
          f"batch {cfg.train.batch}; at most {MOST_WORK:.0f} times the time of a checkpointed step; "
          f"the largest to 3 % of their edges:")
    smaller = None
    for name, shape in (("largest cube", (1, 1, 1)), (f"largest in the proportions of {size_text(size)}", size)):
        found = largest(peak_of, shape, unit, limit, lambda size: 20 * cfg.train.batch * math.prod(size), close=0.1)
        smaller = found if found else smaller
        print(f"  {name}: " + (f"{size_text(found[0])}, {memory_text(tile_memory(leanest(found[0])))}: {found[1] / GIB:.2f} GiB" if found
                               else "none"))
    chosen = plan(make_step_for, size, budget, memory_settings(vae, size, cfg.train.batch, dtype, limit), device)
    if not chosen.fits:
        print(f"  {size_text(size)} does not fit: the least is {chosen.bytes / GIB:.2f} GiB ({memory_text(chosen.memory)}), "
              f"{(chosen.bytes - limit) / GIB:.2f} GiB too much. It would with --budget {chosen.bytes / (1 - SPARE) / GIB:.2f}"
              + (f", or as {size_text(smaller[0])}" if smaller else ""))
        return False
    print(f"  {size_text(size)} fits with memory.mode {memory_text(chosen.memory)}: {chosen.bytes / GIB:.2f} GiB")
    text = settings_yaml(train, change(cfg, {"memory": chosen.memory}))
    print(text, end="")
    if yaml:
        Path(yaml).write_text(text)
    return True


def settings_yaml(train, cfg) -> str:
    """What differs from the preset's defaults, as YAML that train.py --config takes (values are written as JSON, which YAML includes)."""
    preset = ["--preset", cfg.preset] if cfg.preset in train.TASKS["vae"] else []                # not that of a foreign train.init
    ours, defaults = train.config_dict(cfg), train.config_dict(train.load_config(preset))
    lines = [f"preset: {cfg.preset}"]
    for section, fields in ours.items():
        changed = {k: v for k, v in fields.items() if v != defaults[section][k] or (section, k) in SAID} if isinstance(fields, dict) else {}
        lines += [f"{section}: {json.dumps(changed)}"] if changed else []
    return "\n".join(lines) + "\n"


SAID = {("data", "patch"), ("train", "amp"), ("train", "batch"), ("memory", "mode")}  # in a plan's YAML also where they are the default


if __name__ == "__main__":
    sys.exit(main())
