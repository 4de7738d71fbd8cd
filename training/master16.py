"""Weights of 16 bits that learn through float32 copies, with a loss scale of their own (mixed precision,
arXiv:1710.03740).

The network computes in float16; the optimizer moves float32 masters, and each update copies them back. Small
gradients vanish in float16, so the loss is multiplied by 2 ** log_scale before backward, and the masters'
gradients are divided by it. The scale doubles over 1,000 good steps and halves after a step that was not
finite. Codes of a codebook stay float32, since 16 bits lose half of them. Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

FIRST_LOG_SCALE = 16.0
# Of log_scale after a good and after a bad step.
RISE, FALL = 1e-3, 1.0


class Master16:
    """Turns `model` into float16 and holds its float32 masters, in the order of model.parameters().

    An optimizer is made over `weights`. A step is: scale(loss).backward(), take_gradients(),
    optimizer.step(), give_weights(), then adapt()."""
    def __init__(self, model: nn.Module):
        self.model, self.log_scale = model, FIRST_LOG_SCALE
        full = [p.detach().clone().requires_grad_(p.requires_grad) for p in model.parameters()]
        for name, part in model.named_children():
            if name != "quantizer":
                part.to(torch.float16)
        self.weights: list[Tensor] = [
            master if p.dtype is torch.float16 else p for master, p in zip(full, model.parameters())
        ]

    def inputs(self, values: Iterable) -> list:
        """What the network is given, in its own precision."""
        return [x.half() if isinstance(x, Tensor) and x.is_floating_point() else x for x in values]

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 2.0 ** self.log_scale

    def take_gradients(self) -> None:
        """The network's gradients become the masters', in true units."""
        for master, p in zip(self.weights, self.model.parameters()):
            grad, p.grad = p.grad, None
            master.grad = None if grad is None else grad.float() * 2.0 ** -self.log_scale

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Gradients of another network, whose loss was scaled too."""
        for p in parameters:
            p.grad *= 2.0 ** -self.log_scale

    @torch.no_grad()
    def give_weights(self) -> None:
        """The masters, rounded, become the network's weights."""
        torch._foreach_copy_([p.detach() for p in self.model.parameters()], self.weights)

    def adapt(self, updated: bool) -> None:
        """Move the loss scale after a step."""
        self.log_scale += RISE if updated else -FALL

    def full(self) -> dict[str, Tensor]:
        """The masters by the names of the network's state dict."""
        return {
            name: master.detach() for (name, _), master in zip(self.model.named_parameters(), self.weights)
        }

    def load(self, weights: dict[str, Tensor]) -> None:
        """Put float32 weights, by their names, into the masters."""
        for (name, _), master in zip(self.model.named_parameters(), self.weights):
            master.data.copy_(weights[name])
