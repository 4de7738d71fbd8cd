"""How often one optimizer step waits for its device, counted without one: on the simulated CUDA device of
peaks.py, where a copy between host and device is an operator like others.

What no operator shows is not counted: waits inside a kernel or its library, of the allocator, and of
collectives (more than one rank reads its terms and agrees through the host).
"""
import traceback
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import peaks
from runs import CODES, EVERYTHING, GAN, ROOT, SEG, TINY, flags_of, load_config, make_step

aten = torch.ops.aten
# The results of these have as many elements as the data say, so that the host has to ask.
OF_UNKNOWN_SIZE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default,
                   aten.unique_dim.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor}


class Waits(TorchDispatchMode):
    """Lists each operator for which the host waits for a CUDA device, with the line of ours that called it.

    A copy to the device waits as well, unless it is non_blocking: it is queued behind what the device has to
    do, and the host waits for its end.
    """
    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.is_wait(func, args, kwargs):
            ours = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
            ours = [f for f in ours if Path(f.filename).name not in ("test_waits.py", "peaks.py")]
            place = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "test"
            self.found.append(f"{func} in {place}")
        return func(*args, **kwargs)

    def is_wait(self, func, args: tuple, kwargs: dict) -> bool:
        on_device = any(t.device.type == "cuda" for t in peaks.tensors_in(args))
        if func is aten._local_scalar_dense.default or func in OF_UNKNOWN_SIZE:
            return on_device
        if func is aten.index.Tensor:
            return on_device and any(t.dtype == torch.bool for t in peaks.tensors_in(args[1]))
        if func is aten._to_copy.default:
            # The simulated device is called `xla` where autocast, in C++, names it.
            there, here = torch.device(kwargs.get("device") or args[0].device).type, args[0].device.type
            is_between = (there == "cpu") != (here == "cpu")
            return is_between and (there == "cpu" or not kwargs.get("non_blocking"))
        if func is aten.copy_.default:
            there, here = args[0].device.type, args[1].device.type
            is_quick = len(args) > 2 and args[2] or kwargs.get("non_blocking")
            return there != here and (there == "cpu" or not is_quick)
        return False


def waits_of_a_step(*words: str) -> list[str]:
    """Of the second step of a run, so that what only the first one does is not counted."""
    cfg = load_config([*TINY, *words])
    with peaks.simulated(torch.device("cuda")) as device:
        step = make_step(cfg, device, rehearsal=True)
        step()
        with Waits() as waits:
            result = step()
            # The log's row: every term and the norm are with the host already.
            for number in (*result.terms.values(), result.norm):
                float(number)
    return waits.found


CASES = {
    "vae": ["--loss.channel_weights", "1.5", "--loss.structure_weight", "0.1", "--batch", "2"],
    "adamw": ["--optim.optimizer", "adamw", "--train.ema", "0.9", "--accum", "2"],
    "bf16": ["--amp"],
    "master16": ["--train.precision", "master16"],
    "vq": [*CODES, "--accum", "2"],
    "fsq": ["--vae.bottleneck", "fsq", "--vae.fsq_levels", "8,5,5,5"],
    "gan": [*flags_of(GAN), "--loss.adaptive_weight", "true", "--accum", "2"],
    "everything": [*flags_of(EVERYTHING), "--loss.adaptive_weight", "true"],
    "diffusion": ["--task", "diffusion", "--unet.channels", "8,16", "--unet.time_channels", "16",
                  "--unet.norm_groups", "4", "--unet.vector_channels", "8"],
    "seg": [*SEG, "--loss.class_weights", "1,2"],
}


@pytest.mark.parametrize("words", [
    pytest.param(words, id=name, marks=[] if name in ("adamw", "bf16", "fsq") else pytest.mark.slow)
    for name, words in CASES.items()
])
def test_a_step_waits_for_its_device_once(words):
    """Channel weights once were copied in each slab, FSQ's levels in each forward, the adaptive weight read
    the loss scale, dead codes were asked for and drawn on the host, and the log read term by term.
    """
    assert waits_of_a_step(*words) == ["aten._to_copy.default in step.py:on_host"]


@pytest.mark.slow
def test_fp16_with_a_loss_scaler_waits_once(monkeypatch):
    """GradScaler.step() reads whether gradients were finite, once more for each optimizer."""
    monkeypatch.setattr("training.state.pick_precision", lambda *_: (torch.float16, "fp16"))
    gan = [*flags_of(GAN), "--loss.adaptive_weight", "true"]
    assert waits_of_a_step(*gan) == ["aten._to_copy.default in step.py:on_host"]


WAITING = {
    "item": lambda x: x.sum().item(),
    "question": lambda x: bool((x > 0).any()),
    "to the host": lambda x: x.cpu(),
    "to the host, in place": lambda x: torch.zeros(2, 3, device="cpu").copy_(x),
    "from the host": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "from the host, moved": lambda x: torch.zeros(2, device="cpu").to(x.device),
}


@pytest.mark.parametrize("body", WAITING.values(), ids=WAITING)
def test_the_count_sees_what_waits(body):
    with peaks.simulated(torch.device("cuda")) as device:
        x = torch.ones(2, 3, device=device)
        with Waits() as waits:
            body(x)
    assert len(waits.found) == 1


def test_the_count_leaves_out_what_does_not_wait():
    with peaks.simulated(torch.device("cuda")) as device:
        x, host = torch.ones(2, 3, device=device), torch.zeros(2, 3)
        with Waits() as waits:
            torch.where(x > 0, x.double(), 0.0)
            x.copy_(host.to(device, non_blocking=True))
            x.copy_(host, non_blocking=True)
            float(host.sum())
    assert waits.found == []
