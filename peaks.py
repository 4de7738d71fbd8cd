"""Peak memory of a step that is handed to it: predicted, counted, measured; what fits. Needs torch alone.

    peak = predict(make_step)                     # make_step(device) builds everything and returns step()
    print(peak.bytes / GIB, peak.activations)     # no GPU, nothing computed: 1024^3 takes seconds
    plan(make_step_for, (512, 512, 512), 24 * GIB, candidates)

How: the real step runs once on fake tensors (torch's FakeTensorMode: shapes without data) as on a CUDA
device with bf16, and the storages that live at the same time are added up, rounded to the 512 bytes of
CUDA's allocator. `count` does the same with real steps on the CPU. What CUDA's kernels take inside is added
by a model of them (`workspace`), fitted to measurements. A prediction leaves out the CUDA context
(0.3-0.6 GiB) and fragmentation (up to 1 MiB a block, and whatever the allocator cannot reuse). The planner
keeps 10 % free for them.

Sizes are D,H,W. Memory is in bytes inside, in GiB (2^30 bytes) wherever it is shown.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import sys
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
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

GIB = 2 ** 30
SPARE = 0.1                  # share of a budget that a plan leaves to what predictions leave out
MOST_ELEMENTS = 2 ** 31      # of a tensor: beyond it CUDA's kernels fail, or are wrong without a word
LEFT_OUT = ("Predictions count tensors and, by a model fitted to an H200, the workspaces of convolutions: "
            "the CUDA context (0.3-0.6 GiB)\nand fragmentation come on top.")
Size = tuple[int, int, int]
MakeStep = Callable[[torch.device], Callable[[], object]]   # builds all on a device; the result runs a step
MakeStepFor = Callable[[Size, dict], MakeStep]              # (volume's D,H,W, memory settings) -> its step


# -------------------------------------------------------------------------------------- counted and predicted

@dataclass(frozen=True)
class Peak:
    """The most bytes alive at one moment of the steps, and what they were."""
    bytes: int
    parameters: int          # of every network whose optimizer made a step
    gradients: int           # theirs
    optimizer: int           # states, such as AdamW's two moments
    activations: int         # the rest: batch, activations, temporaries, networks that are not trained
    workspaces: int          # inside kernels, as `workspace` models them
    first_step: int          # peak of the first step alone, before the optimizer has states
    largest: int             # elements of the largest tensor of the steps


def peak_of_steps(make_step: MakeStep, device: torch.device, steps: int) -> Peak:
    """Peak of the steps, building not included.

    With one step its optimizer's states, which it leaves behind, count from its start.
    """
    with LiveStorages(device.type) as log, contextlib.ExitStack() as stack:
        stack.callback(register_optimizer_step_post_hook(log.see_optimizer).remove)
        step, starts = make_step(device), []
        for _ in range(steps):
            gc.collect()                         # reference cycles of the last step are no memory of this one
            starts.append(len(log.events))
            step()
        most, parts = log.peak(starts[0], steady=steps == 1)
        first, _ = log.peak(starts[0], starts[1] if steps > 1 else None)
    kinds = ("parameters", "gradients", "optimizer", "activations", "workspaces")
    return Peak(most, *(parts[kind] for kind in kinds), first, log.largest)


def count(make_step: MakeStep) -> Peak:
    """Of two real steps on the CPU, to check predictions against.

    Memory that kernels allocate inside is not seen.
    """
    return peak_of_steps(make_step, torch.device("cpu"), 2)


def predict(make_step: MakeStep, device: torch.device | str = "cuda") -> Peak:
    """Of any step but the first on `device`; nothing is computed or allocated.

    cuda is simulated with bf16 and needs no GPU; cpu is the other choice. Gradients are taken to be freed or
    reused by the next step. Raises RuntimeError where this torch build cannot simulate CUDA, or the step does
    what depends on data that are not there.
    """
    with simulated(torch.device(device)) as simulated_device:
        return peak_of_steps(make_step, simulated_device, 1)


# ---------------------------------------------------------------------- inside CUDA's kernels: a fitted model
#
# No tensor of a step owns what follows, and torch says nothing about it. What was measured is the peak of 22
# steps on one H200 (torch 2.11, cuDNN 9.19); docs/MEMORY.md has each of them beside its prediction. The two
# constants were fitted to them, and are right where they were: networks in channels_last_3d.

# A float32 convolution's backward copies its input and the gradient of its output into another layout. This
# times their bytes is what .74 to .76 GiB of three steps at 64,256,256 come to.
FLOAT32_COPIES = 1
# 16-bit convolutions take channels by this many: volumes with fewer are copied and filled up with zeros.
# 64 MiB for one channel at 64,256,256, which is what `fast` took above its tensors.
CHANNELS_AT_ONCE = 8


def workspace(name: str, args: Sequence, out: object) -> int:
    """Bytes that the CUDA kernel of an operator takes beside its results, and gives back when it ends.

    name: of the operator, such as aten.convolution.default; args, out: what it was given and gives. 0 for
    operators without a row here, and for convolutions that are not in channels_last_3d.
    """
    if name == "aten.upsample_nearest3d.default":                # knows no channels_last: copies its result
        return bytes_of(out) if in_channels_last(out) else 0
    if name == "aten.upsample_nearest3d_backward.default":       # and here its input
        return bytes_of(args[0]) if in_channels_last(args[0]) else 0
    if name == "aten.convolution.default":
        x, weight, y = args[0], args[1], out
        read = [x]
    elif name == "aten.convolution_backward.default":
        y, x, weight = args[:3]
        read = [x, y]
    else:
        return 0
    if x.dim() != 5 or not (in_channels_last(x) or in_channels_last(weight)):
        return 0
    # What is in another layout, or a part of a larger tensor, is copied before the kernel is called.
    copies = [t for t in read if not t.is_contiguous(memory_format=torch.channels_last_3d)]
    total = sum(bytes_of(t) for t in copies)
    if x.dtype is torch.float32 and len(read) == 2:
        return total + FLOAT32_COPIES * (bytes_of(x) + bytes_of(y))
    if x.dtype.itemsize == 2:
        total += max(filled_up(x), filled_up(y))
    return total


def bytes_of(t: Tensor) -> int:
    return t.numel() * t.dtype.itemsize


def filled_up(t: Tensor) -> int:
    """Bytes of (B, C, D, H, W) with channels filled up to a multiple of CHANNELS_AT_ONCE; 0: they are one."""
    channels = -(-t.shape[1] // CHANNELS_AT_ONCE) * CHANNELS_AT_ONCE
    return 0 if channels == t.shape[1] else bytes_of(t) // t.shape[1] * channels


def in_channels_last(t: Tensor) -> bool:
    """Whether (B, C, D, H, W), or a part of one, is laid out with its channels side by side."""
    return t.dim() == 5 and t.stride(1) == 1 and t.stride(4) >= t.shape[1]


# ----------------------------------------------------------------------------------------------- measurement

class Measured(NamedTuple):
    allocated: int           # bytes: torch.cuda.max_memory_allocated; on the CPU those of `count`
    reserved: int | None     # bytes that the allocator took from the card; None on the CPU
    seconds: float           # median of a step


def measure(make_step: MakeStep, device: torch.device, repeats: int = 5) -> Measured:
    """Runs the step for real: two steps to warm up, then the median time of `repeats`.

    After these two, kernels are chosen and the optimizer's states are there.
    """
    cuda = device.type == "cuda"
    allocated = None if cuda else count(make_step).bytes
    step, seconds = make_step(device), []
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)   # the building is no part of the step
    for _ in range(2 + repeats):
        start = time.perf_counter()
        step()
        if cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    typical = median(seconds[2:])
    if not cuda:
        return Measured(allocated, None, typical)
    return Measured(torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device), typical)


def environment_warnings() -> list[str]:
    """What is wrong with this machine's torch for large volumes, a line each; [] where there is no GPU."""
    if not torch.cuda.is_available():
        return []
    found = []
    about_cudnn = cudnn_warning(torch.__version__, torch.backends.cudnn.version())
    if about_cudnn:
        found.append(about_cudnn)
    if not expandable_segments():
        found.append("expandable_segments is not active: a long run fragments the card's memory; set "
                     "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True before Python starts")
    return found


def cudnn_warning(torch_version: str, cudnn_version: int | None) -> str | None:
    """torch 2.9.x with cuDNN < 9.15 runs bf16 conv3d by a fallback that takes several times the memory."""
    is_affected = torch_version.split(".")[:2] == ["2", "9"]
    if is_affected and (cudnn_version or 0) < 91500:
        return (f"torch {torch_version} with cuDNN {cudnn_version} takes far more memory than predicted for "
                f"conv3d in bf16; upgrade torch, or pip install 'nvidia-cudnn-cu12>=9.15'")
    return None


# --------------------------------------------------------------------------------------------------- planner

def is_too_large(peak: Peak, device: torch.device | str) -> bool:
    """Whether the step has a tensor that CUDA's kernels do not take."""
    return torch.device(device).type == "cuda" and peak.largest > MOST_ELEMENTS


class Plan(NamedTuple):
    """What `plan` found: the settings that fit, or, where none does, the least hungry ones."""
    memory: dict                                 # the candidate
    bytes: int                                   # its predicted peak
    limit: int                                   # what a prediction may reach: the budget less SPARE
    tried: list[tuple[dict, int]]                # every candidate that was predicted, with its peak

    @property
    def fits(self) -> bool:
        return self.bytes <= self.limit


def plan(make_step_for: MakeStepFor, size: Size, budget: float, candidates: Sequence[dict],
         device: torch.device | str = "cuda") -> Plan:
    """The first candidate, cheapest first, whose step is predicted to leave SPARE of `budget` (bytes) free.

    A candidate is whatever make_step_for(size, candidate) takes, a dict of memory settings. size is D,H,W.
    One with a tensor that CUDA's kernels do not take is left out; ValueError where all are.
    """
    limit, tried, too_large = int(budget * (1 - SPARE)), [], 0
    for memory in candidates:
        peak = predict(make_step_for(size, memory), device)
        if is_too_large(peak, device):
            too_large = peak.largest
            continue
        tried.append((memory, peak.bytes))
        if peak.bytes <= limit:
            return Plan(memory, peak.bytes, limit, tried)
    if not tried:
        raise ValueError(f"every setting has a tensor of more than 2^31 elements, the last {too_large:,}, "
                         "beyond which CUDA's kernels fail; take smaller volumes or a smaller batch")
    least = min(tried, key=lambda row: row[1])
    return Plan(*least, limit, tried)


def largest(peak_of: Callable[[Size], int], shape: Sequence[float], unit: int, limit: int,
            estimate: Callable[[Size], float] = lambda size: 1000 * math.prod(size),
            close: float = 0.0) -> tuple[Size, int] | None:
    """The largest volume in the proportions of `shape` whose peak_of(size), in bytes, is at most `limit`.

    With that peak; None where no volume fits. Each axis is the multiple of `unit` next to its proportion.
    peak_of takes seconds, so the next size to ask it for is the largest that fits by the cheap `estimate`,
    corrected by the ratio of the two at the last size; every third is the middle of the bracket. A peak
    between 1 - close and 1 times the limit ends the search.
    """
    # the longest axis in units: `low` fits, `high` does not
    low, high = 0, None
    ratio, tries, fitting = 1.0, 0, None

    def size_of(k: int) -> Size:
        return tuple(max(1, round(k * n / max(shape))) * unit for n in shape)

    def seems_to_fit(k: int) -> bool:
        return ratio * estimate(size_of(k)) <= limit

    while high is None or high - low > 1:
        # first the largest that seems to fit, between a and b: b is doubled while nothing bounds it
        a, b = low, high or max(4, 2 * low)
        while high is None and b <= 32 * max(low, 4) and seems_to_fit(b):
            a, b = b, 2 * b
        while b - a > 1:
            middle = (a + b) // 2
            if seems_to_fit(middle):
                a = middle
            else:
                b = middle
        # then its true peak, which moves one end of the bracket
        k, tries = max(a, low + 1), tries + 1
        if high is not None and tries % 3 == 0:
            k = (low + high) // 2
        peak = peak_of(size_of(k))
        ratio = peak / estimate(size_of(k))
        if peak > limit:
            high = k
            continue
        low, fitting = k, (size_of(k), peak)
        if peak > limit * (1 - close):
            break
    return fitting


# ------------------------------------------------------------------------------------- private parts of torch
#
# All that leans on parts of torch that it does not promise stands from here to the end, and no other line
# of this file would have to follow a change of them. They replace, for the time of one count or prediction:
# - what an operator returns is seen on its way (TorchDispatchMode), to log storages;   - every tensor by a
# fake one without data (FakeTensorMode), also where CUDA is not built or not there;   -
# torch.cuda.amp.common.amp_definitely_not_available and torch.cuda.is_bf16_supported, which ask for a GPU;
# - aten's scaled_dot_product_attention on CUDA by the kernel that a GPU would take, and silu_backward,
# which a     CPU-only build composes of four kernels, by one;   - in a CPU-only build the empty device
# guard of XLA by that of `meta`: the one change that stays. Where a name of the two imports is missing,
# importing this file fails and says which. Where the table of device guards is missing,
# predict(device="cuda") raises RuntimeError; for the CPU neither table nor patches are needed.
# - batch norm's single kernels, which have no form without data, by the shapes that they return (BATCH_NORM);
# - results of convolutions and of nearest upsampling by ones in the layout that CUDA gives them.

from torch._subclasses.fake_tensor import (  # noqa: E402
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes  # noqa: E402


class LiveStorages(TorchDispatchMode):
    """While the mode is on, logs each storage of one kind of device that operators allocate, and its end.

    A storage counts once however many tensors and views share it. Temporaries inside an operator's kernel are
    not seen.
    """
    def __init__(self, device_type: str):
        super().__init__()
        self.device_type = device_type
        self.block = 512 if device_type == "cuda" else 1        # CUDA's caching allocator rounds up
        # what happened: (number of the storage, bytes allocated or, negative, freed)
        self.events: list[tuple[int, int]] = []
        # id of a storage -> its number, and the callback that sees it go
        self.alive: dict[int, tuple[int, weakref.ref]] = {}
        # number -> field of Peak, for those that optimizers hold and for workspaces
        self.kinds: dict[int, str] = {}
        self.largest = 0                                        # elements

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out):
            self.see(tensor)
            self.largest = max(self.largest, tensor.numel())
        # A workspace is there beside the results, for the time of the kernel.
        inside = workspace(str(func), args, out) if self.device_type == "cuda" else 0
        if inside:
            number = len(self.events)
            self.kinds[number] = "workspaces"
            self.events += [(number, inside), (number, -inside)]
        return out

    def see(self, tensor: Tensor) -> int | None:
        """The number of the tensor's storage, which joins the log when it is new.

        None where the tensor is on another kind of device.
        """
        if tensor.device.type != self.device_type:
            return None
        storage = tensor.untyped_storage()       # the same object for every view, until the last of them dies
        key = id(storage)
        if key not in self.alive:
            number = len(self.events)
            size = -(-storage.nbytes() // self.block) * self.block

            def gone(_):
                del self.alive[key]
                self.events.append((number, -size))

            self.alive[key] = number, weakref.ref(storage, gone)
            self.events.append((number, size))
        return self.alive[key][0]

    def see_optimizer(self, optimizer: Optimizer, *_) -> None:
        """Optimizer hook: notes which storages are parameters, gradients and states."""
        held = []
        for section in optimizer.param_groups:
            for p in section["params"]:
                held.append((p, "parameters"))
                if p.grad is not None:
                    held.append((p.grad, "gradients"))
        for state in optimizer.state.values():
            held += [(value, "optimizer") for value in tensors_in(list(state.values()))]
        self.kinds.update((self.see(tensor), kind) for tensor, kind in held)

    def peak(self, start: int = 0, stop: int | None = None, steady: bool = False) -> tuple[int, Counter]:
        """Largest sum of live bytes after any of events[start:stop], and its parts by kind.

        steady: as if the optimizer states, which the first step leaves behind, had been there before it.
        """
        events = self.events[:stop]
        if steady:
            states = [event for event in events if self.kinds.get(event[0]) == "optimizer"]
            others = [event for event in events if self.kinds.get(event[0]) != "optimizer"]
            events = states + others
            start += sum(number >= start for number, _ in states)
        totals = list(accumulate(size for _, size in events))
        at = max(range(max(start - 1, 0), len(events)), key=totals.__getitem__, default=None)
        if at is None:
            return 0, Counter()
        parts = Counter()
        for number, size in events[:at + 1]:
            parts[self.kinds.get(number, "activations")] += size
        return sum(parts.values()), parts


def real_tensors() -> contextlib.AbstractContextManager:
    """For what a prediction has to compute with data: no mode is on inside."""
    return _disable_current_modes()


def tensors_in(value) -> Iterator[Tensor]:
    """The tensors of a tensor, or of tuples and lists within one another."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)


_BY_META_KERNEL = {
    # Most calls of a step are to these. Their meta kernels are called at once, 5 times faster than by way
    # of FakeTensorMode. detach is here because FakeTensorMode's leaves a weak reference to parameters, with
    # which Module.to() refuses a second move.
    *(getattr(torch.ops.aten, name).default for name in (
        "convolution", "convolution_backward", "silu", "silu_backward", "slice_backward", "detach",
        "_to_copy", "copy_", "abs", "sign", "sum")),
    *(getattr(torch.ops.aten, name).Tensor for name in (
        "slice", "add", "add_", "sub", "mul", "mul_", "div")),
}


class FakeDevice(FakeTensorMode):
    """FakeTensorMode that a whole training step passes through: scalars can be read, and modules moved.

    stand_in: the device that C++ takes fake CUDA tensors for. Without a CUDA build autograd asks the
    accelerator for streams and ends the process; it does not for XLA, and XLA tensors follow CUDA's autocast
    list. Python sees `cuda` throughout.
    """
    def __init__(self, stand_in: torch.device | None):
        super().__init__()
        self.stand_in = stand_in

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # C++ asks where a tensor is, and for a tensor beside another one: it hears, and names, the stand-in
        if self.stand_in:
            if func is torch.ops.prim.device.default and args[0].fake_device.type == "cuda":
                return self.stand_in
            if kwargs.get("device") == self.stand_in:
                kwargs = {**kwargs, "device": torch.device("cuda:0")}
        device = self.device_for_meta_kernel(func, args, kwargs)
        if device is not None:
            with in_kernel_invocation_manager(self):
                out = func(*args, **kwargs)
            if isinstance(out, tuple):
                return tuple(t if t is None else FakeTensor(self, t, device) for t in out)
            out = out if isinstance(out, FakeTensor) else FakeTensor(self, out, device)
            return self.in_layout_of_cuda(func, args, out)
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs)
        except DataDependentOutputException:
            if func is torch.ops.aten._local_scalar_dense.default:
                return item_of(args[0].dtype)
            raise
        return self.in_layout_of_cuda(func, args, out)

    def in_layout_of_cuda(self, func, args, out):
        """The result in channels_last_3d where CUDA gives it so, and torch without data does not.

        Convolutions: where input or weight is. Nearest upsampling: where its input is.
        """
        aten = torch.ops.aten
        if func is aten.convolution.default:
            like = args[:2]
        elif func in (aten.upsample_nearest3d.default, aten.upsample_nearest3d_backward.default):
            like = args[:1]
        else:
            return out
        if out.dim() != 5 or out.fake_device.type != "cuda" or not any(map(in_channels_last, like)):
            return out
        with in_kernel_invocation_manager(self):
            last = torch.channels_last_3d
            out_last = torch.empty(out.shape, dtype=out.dtype, device="meta", memory_format=last)
        return FakeTensor(self, out_last, out.fake_device)

    def device_for_meta_kernel(self, func, args, kwargs) -> torch.device | None:
        """The device of the result where the meta kernel will do: all inputs are fake and on one device."""
        if func not in _BY_META_KERNEL or "device" in kwargs:
            return None
        inputs = list(tensors_in(args))
        if not inputs or not all(isinstance(t, FakeTensor) for t in inputs):
            return None
        # `constant` is a scalar whose value FakeTensorMode follows
        device = inputs[0].fake_device
        plain = all(t.fake_device == device and t.constant is None for t in inputs)
        return device if plain else None


def item_of(dtype: torch.dtype) -> bool | float | int:
    """What item() of a fake tensor reads: nothing overflows, and what is checked is true."""
    if dtype == torch.bool:
        return True
    return 0.0 if dtype.is_floating_point else 0


def fused_attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                    enable_gqa=False) -> Tensor:
    """What scaled_dot_product_attention takes on CUDA; neither holds the N x N matrix.

    Flash for 16 bits without a mask, memory-efficient otherwise.
    """
    aten = torch.ops.aten
    if q.dtype in (torch.float16, torch.bfloat16) and attn_mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout_p, is_causal, scale=scale)[0]
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def channel_vectors(x: Tensor, number: int) -> tuple[Tensor, ...]:
    """So many (C,) of float32 or wider, for x (B, C, ...)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(x.new_empty(x.shape[1], dtype=wide) for _ in range(number))


# What batch norm's CUDA kernels return, of which torch has no form without data (lean_norm.py calls them).
BATCH_NORM = {
    "batch_norm_update_stats": lambda x, *_: channel_vectors(x, 2),
    "batch_norm_elemt.out": lambda x, *_, out: out,
    "batch_norm_backward_reduce": lambda grad, x, *_: (*channel_vectors(x, 2), None, None),
    "batch_norm_backward_elemt": lambda grad, x, *_: torch.empty_like(x),
}


@contextlib.contextmanager
def simulated(device: torch.device) -> Iterator[torch.device]:
    """Everything inside runs on fake tensors; yields the device to build on."""
    with contextlib.ExitStack() as stack:
        # the step seeds itself; the caller's generator goes on as it was
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        if device.type != "cuda":
            stack.enter_context(FakeDevice(None))
            yield device
            return
        absent = "torch.cuda.amp.common.amp_definitely_not_available"
        stack.enter_context(mock.patch(absent, lambda: False))
        stack.enter_context(mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True))
        library = stack.enter_context(torch.library._scoped_library("aten", "IMPL"))
        for name, stand_in in BATCH_NORM.items():
            library.impl(name, stand_in, "Meta")
        for key in ("CUDA", "AutogradCUDA"):
            library.impl("scaled_dot_product_attention", fused_attention, key)
        stand_in = None
        if not torch.backends.cuda.is_built():
            stand_in = stand_in_for_cuda()
            library.impl("silu_backward", lambda grad, _: torch.empty_like(grad), "CUDA")
        stack.enter_context(FakeDevice(stand_in))
        yield torch.device("cuda:0")


def stand_in_for_cuda() -> torch.device:
    """XLA, with the do-nothing device guard of `meta` where no real one is registered.

    Raises RuntimeError where libc10 hides the table of guards.
    """
    name = {"darwin": "libc10.dylib", "win32": "c10.dll"}.get(sys.platform, "libc10.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        guards = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    except (OSError, ValueError):
        raise RuntimeError("this CPU-only build of torch cannot simulate CUDA on this system; install a CUDA "
                           "build (no GPU needed), or predict with --device cpu") from None
    xla, meta = 9, 14                            # c10::DeviceType
    guards[xla] = guards[xla] or guards[meta]
    return torch.device("xla:0")


def expandable_segments() -> bool:
    """Whether the running CUDA allocator has them, whatever the environment says; False if torch hides it."""
    settings = torch.cuda.memory._snapshot().get("allocator_settings", {})
    return settings.get("expandable_segments", False)
