"""training/graphs.py without a CUDA device: a step through tensors that stay is the ordinary one to the bit,
and what would be recorded takes nothing from the host. Recording itself needs a card (bench/gpu.py).
"""
import pytest
import torch

import peaks
from runs import (
    CPU,
    SEG,
    TINY,
    doubled,
    flags_of,
    load_config,
    make_step,
    micro_batches,
    new_state,
    same,
    snapshot,
)
from test_waits import Waits, aten
from training import graphs, memory
from training.step import train_step

STEPS = {
    "muon": {},
    "adamw": {"optim__optimizer": "adamw", "train__ema": "0.9"},
    "adam": {"optim__optimizer": "adam", "optim__clip_percentile": 50, "optim__clip_window": 2},
    "sgd": {"optim__optimizer": "sgd", "loss__structure_weight": 0.1},
}


def state_of(replayed, dtype=torch.float32, **fields):
    cfg = load_config([*TINY, *flags_of({"train__batch": 2, "optim__grad_clip": 0.05} | fields)])
    state = new_state(cfg)
    state.graphs = graphs.Graphs(CPU, recording=False, dtype=dtype) if replayed else None
    return cfg, state


@pytest.mark.parametrize("fields", STEPS.values(), ids=STEPS)
def test_the_step_through_tensors_that_stay_equals_the_ordinary_one(fields):
    """Five steps at changing rates, the last micro-batch shorter than the others, one step not finite."""
    results = []
    for replayed in (False, True):
        cfg, state = state_of(replayed, **fields)
        found = {}
        for step in range(5):
            for group in state.optimizer.param_groups:
                group["lr"] = 1e-3 / 3 ** step
            batches = micro_batches([2, 2] if step == 2 else [2, 2, 1], seed=step)
            if step == 3:
                batches[0].image[0, 0, 0, 0, 0] = float("nan")
            result = train_step(cfg, state, batches)
            assert result.updated == (step != 3)
            found |= {f"{name} {step}": torch.as_tensor(x) for name, x in result.terms.items() if step != 3}
            found |= {f"norm {step}": result.norm} if step != 3 else {}
            state.step += 1
        for k, network in enumerate((state.model, *state.emas)):
            found |= {f"{k} {name}": tensor for name, tensor in snapshot(network).items()}
        results.append(found)
        # What a checkpoint holds are numbers, as ever.
        assert all(type(group["lr"]) is float for group in state.optimizer.param_groups)
    assert same(*results)


def test_in_float64_too():
    results = []
    for replayed in (False, True):
        cfg, state = state_of(replayed, torch.float64, optim__optimizer="sgd")
        train_step(cfg, doubled(state), micro_batches([2, 1], torch.float64))
        results.append(snapshot(state.model))
    assert same(*results)


def test_the_gradients_stay_where_they_are():
    """A recorded backward adds to these very tensors."""
    cfg, state = state_of(True)
    train_step(cfg, state, micro_batches([2]))
    before = [p.grad for p in state.model.parameters()]
    train_step(cfg, state, micro_batches([2], seed=1))
    assert all(p.grad is grad for p, grad in zip(state.model.parameters(), before))


def test_reasons_against_are_said_once():
    cfg, state = state_of(True)
    assert state.graphs.news(cfg, state) is None
    memory.turn_dial(state, memory.next_dial(cfg, state, (2, 1, 4, 8, 8)))
    assert "memory mode checkpoint" in state.graphs.news(cfg, state)
    assert state.graphs.news(cfg, state) is None
    train_step(cfg, state, micro_batches([2]))
    assert not state.graphs.slots


@pytest.mark.parametrize("fields, words", [
    ({"vae__bottleneck": "vq", "vae__num_codes": 16}, "codebook"),
    ({"vae__bottleneck": "fsq", "vae__fsq_levels": "8,5,5,5"}, "codebook"),
    ({"loss__perceptual_weight": 0.1}, "crops of its own"),
    ({"train__precision": "master16"}, "master16"),
])
def test_what_cannot_be_replayed_runs_as_ever(fields, words):
    cfg, state = state_of(True, **fields)
    assert words in state.graphs.reason(cfg, state)
    assert train_step(cfg, state, micro_batches([2])).updated


def test_on_a_cpu_there_is_a_line_and_no_graph():
    cfg = load_config([*TINY, "--train.cuda_graph", "true"])
    state = new_state(cfg)
    assert "this run is on cpu" in state.graphs.news(cfg, state)
    assert train_step(cfg, state, micro_batches([1])).updated and not state.graphs.slots
    assert new_state(load_config(TINY)).graphs is None


class Unrecordable:
    """As graphs.Recorded on a device that takes no recordings: the first call runs, the second one fails."""
    made = 0

    def __init__(self, work, stream, pool):
        self.work, self.is_warm = work, False

    def __call__(self):
        if self.is_warm:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        self.work()
        self.is_warm = True


def recording(state, monkeypatch, recorded):
    """The graphs of a state on the CPU, made to believe that they can record there by `recorded`."""
    monkeypatch.setattr(graphs, "Recorded", recorded)
    state.graphs.recording, state.graphs.stream, state.graphs.pool = True, None, None
    state.graphs.reason = lambda cfg, state: state.graphs.failed or (
        "memory mode" if state.dial.mode != "none" else None)


def test_a_step_that_cannot_be_recorded_is_done_all_the_same(monkeypatch):
    """Of three steps the second one fails to be recorded and runs, the third one is an ordinary one."""
    results = []
    for replayed in (False, True):
        cfg, state = state_of(replayed)
        if replayed:
            recording(state, monkeypatch, Unrecordable)
        for step in range(3):
            train_step(cfg, state, micro_batches([2], seed=step))
        results.append(snapshot(state.model))
    assert "cannot be recorded (CUDA error" in state.graphs.failed
    assert same(*results)


class Full(Unrecordable):
    def __call__(self):
        if self.is_warm:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (simulated)")
        super().__call__()


def test_out_of_memory_while_recording_is_recovered(monkeypatch):
    cfg, state = state_of(True)
    recording(state, monkeypatch, Full)
    train_step(cfg, state, micro_batches([2]))
    told = []
    result = memory.with_recovery(cfg, state, (2, 1, 4, 8, 8), told.append,
                                  lambda: train_step(cfg, state, micro_batches([2], seed=1)))
    assert result.updated and "none -> checkpoint" in told[0] and not state.graphs.slots


class FromTheHost(Waits):
    """Every operator that crosses between host and device or draws numbers: no recording may hold one."""
    def is_wait(self, func, args, kwargs):
        if func in (aten._to_copy.default, aten.copy_.default):
            there = torch.device(kwargs.get("device") or args[0].device).type
            other = args[0 if func is aten._to_copy.default else 1].device.type
            return (there == "cpu") != (other == "cpu")
        draws = any(word in str(func) for word in ("rand", "bernoulli", "normal_", "dropout"))
        return draws or super().is_wait(func, args, kwargs)


RECORDED = {
    "kl": ["--batch", "2"],
    "adamw, bf16": ["--optim.optimizer", "adamw", "--amp"],
    "fast": ["--preset", "fast", "--vae.base_channels", "8", "--loss.channel_weights", "1.5"],
    "seg": [*SEG],
    "diffusion": ["--task", "diffusion", "--unet.channels", "8,16", "--unet.time_channels", "16",
                  "--unet.norm_groups", "4", "--unet.vector_channels", "8"],
}


@pytest.mark.parametrize("words", RECORDED.values(), ids=RECORDED)
def test_what_is_recorded_takes_nothing_from_the_host(words, monkeypatch):
    """On the simulated CUDA device of peaks.py, in the second step, which is the one that is recorded."""
    counted, names = FromTheHost(), []

    def run(self, name, work):
        names.append(name if isinstance(name, str) else "gradients")
        with counted:
            work()
    cfg = load_config([*TINY, *words, "--train.cuda_graph", "true"])
    with peaks.simulated(torch.device("cuda")) as device:
        step = make_step(cfg, device, rehearsal=True)
        step()
        monkeypatch.setattr(graphs.Graphs, "run", run)
        step()
    assert names == ["gradients", "norm", "update"] and counted.found == []


def test_the_count_sees_noise_that_is_drawn_within():
    """Without Task.given the task draws for itself."""
    cfg, counted = load_config(TINY), FromTheHost()
    with peaks.simulated(torch.device("cuda")) as device:
        step = make_step(cfg, device, rehearsal=True)
        with counted:
            step()
    assert any("randn" in found or "_to_copy" in found for found in counted.found)
