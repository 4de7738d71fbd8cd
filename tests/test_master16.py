"""training/master16.py: 16-bit weights that learn through float32 masters, and their loss scale."""
import math

import pytest
import torch

from runs import micro_batches, resume, rows, run, same, tiny_state, weights
from training import memory
from training.resume import full_weights
from training.step import train_step


@pytest.mark.slow
def test_master16_steps_like_float32_and_skips_overflows(tmp_path):
    plain, halved = tiny_state(), tiny_state(train__precision="master16")
    for seed in range(3):
        a, b = (train_step(*pair, micro_batches([1, 1], seed=seed)) for pair in (plain, halved))
    assert abs(float(a.terms["loss"] - b.terms["loss"])) < 5e-3
    assert abs(float(a.norm / b.norm) - 1) < 0.03
    state = halved[1]
    assert {p.dtype for p in state.model.parameters()} == {torch.float16}
    assert state.log_scale == pytest.approx(16.003)
    before = [master.detach().clone() for master in state.masters.weights]
    state.log_scale = 40.0
    assert not train_step(*halved, micro_batches([1])).updated and state.log_scale == 39.0
    assert all(torch.equal(a, b) for a, b in zip(before, state.masters.weights))

    # Through a checkpoint: float32 in the file, and the run that is resumed is the run that was not.
    flags = ["--train.precision", "master16", "--train.save_every", "2"]
    level = ["--optim.schedule", "constant", "--optim.warmup", "0"]
    assert run(*flags, "--steps", "4", out=tmp_path / "whole") == 0
    assert {value.dtype for value in weights(tmp_path / "whole").values()} == {torch.float32}
    assert run(*flags, *level, "--steps", "2", out=tmp_path / "cut") == 0
    assert resume(tmp_path / "cut", "--steps", "4") == 0
    assert run(*flags, *level, "--steps", "4", out=tmp_path / "straight") == 0
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "straight"))


def test_master16_keeps_a_learned_codebook():
    cfg, state = tiny_state(train__precision="master16", vae__bottleneck="vq", vae__num_codes=8,
                            vae__codebook_update="gradient", vae__codebook_restart=0)
    state.model.quantizer.fit(torch.randn(64, 4) + 3, "kmeans", torch.Generator().manual_seed(0))
    fitted = state.model.quantizer.codebook.detach().clone()
    assert torch.equal(full_weights(state)["quantizer.codebook"], fitted)
    train_step(cfg, state, micro_batches([1]))
    assert 0 < (state.model.quantizer.codebook - fitted).detach().abs().max() < 0.1


def test_scales_that_fall_below_one_are_no_overflow(tmp_path, monkeypatch):
    """A gradient that is never finite stops a 16-bit run too."""
    original = memory.begin

    def poisoned(*args):
        state = original(*args)
        state.log_scale = 2.0
        next(state.model.parameters()).register_hook(lambda grad: grad * math.nan)
        return state
    monkeypatch.setattr(memory, "begin", poisoned)
    flags = ["--train.precision", "master16", "--steps", "20", "--train.nan_limit", "3"]
    assert run(*flags, out=tmp_path / "r") == 1
    # The scales are 4, 2, 1, 1/2: the first step is taken for an overflow and does not count.
    assert [r["step"] for r in rows(tmp_path / "r", "train")] == [1, 2, 3, 4]
