"""A network in the run's precision, and the loss in the scale that goes with it. Version 0.1 (2026-11)."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from training.state import State


def forward(state: State, network: Callable, *inputs) -> Any:
    """network(*inputs): under autocast where the run has it, with 16-bit inputs where the weights have 16
    bits.
    """
    if state.masters is not None and (network is state.model or network is state.forward):
        inputs = state.masters.inputs(inputs)
    with torch.autocast(inputs[0].device.type, state.amp_dtype, enabled=state.amp_dtype is not None):
        return network(*inputs)


def scaled(state: State, loss: Tensor) -> Tensor:
    """The loss times the scale that keeps small gradients from vanishing in 16 bits; 1 in float32 and bf16.
    """
    if state.masters is not None:
        return state.masters.scale(loss)
    return state.scaler.scale(loss)
