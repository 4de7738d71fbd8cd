"""Muon: orthogonalised momentum for the kernels of a network, AdamW for all else. Needs torch alone.

    optimizer = Muon(groups_of(network), lr=1e-3)

A kernel's step has singular values near 1 times the rate, whatever its gradient is, so that no first step
can throw a network off, and one rate serves narrow and wide networks. In float32 or wider inside; kernels of
equal shape go through one batched product; nothing is read back from the device, so that a step can be
captured in a CUDA graph (give the rate as a tensor then).

Follows: Muon (K. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; arXiv:2502.16982), AdamW
(arXiv:1711.05101). Deviations: one factor for every shape instead of one by the shape, which wants another
rate for wide networks; float32 instead of bfloat16; the iteration runs on the small Gram matrix.
Shapes: O the first axis of a weight, R the product of all others, S = min(O, R), M matrices of equal shape.
Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

# Of the odd polynomial a x + b x^3 + c x^5 (Jordan's choice): iterated, it takes (0, 1] steeply to near 1.
COEFFICIENTS = (3.4445, -4.775, 2.0315)
ITERATIONS = 5
# Between these end the singular values that were at least 0.005 of the matrix's Frobenius norm; smaller ones
# end between 0 and 1.21. The iteration is not meant to reach 1: what it leaves does no harm, and one that
# converges takes longer.
LOW, HIGH = 0.68, 1.16
MOST_ELEMENTS = 2**22                             # of one batched product: 16 MiB a temporary in float32
KERNELS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
           nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def groups_of(network: nn.Module, masters: Sequence[Tensor] | None = None) -> list[dict[str, Any]]:
    """A network's parameters for Muon: weights of convolutions and linear layers, and all others.

    First and last layers are kernels like the rest. Codebooks and embeddings are not: their rows are looked
    up one by one, and a row that nobody chose must not move. masters: what is moved in place of the
    parameters, in their order.
    """
    found = {id(layer.weight) for layer in network.modules() if isinstance(layer, KERNELS)}
    kernels, others = [], []
    parameters = list(network.parameters())
    for p, moved in zip(parameters, parameters if masters is None else masters):
        (kernels if id(p) in found else others).append(moved)
    return [{"params": kernels, "orthogonal": True}, {"params": others, "orthogonal": False}]


def orthogonalise(matrices: Tensor) -> Tensor:
    """(M, O, R) -> (M, O, R): the same singular vectors, singular values between LOW and HIGH.

    In the matrices' dtype, which should be float32 or wider. Zero stays zero. Newton-Schulz: X = X / |X|,
    then five times X = (a + b A + c A A) X with A = X X^T. All these factors are polynomials of the first A,
    so they are multiplied as S x S matrices, and X is multiplied once.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalise(matrices.mT).mT
    a, b, c = COEFFICIENTS
    norm = matrices.flatten(1).norm(dim=1).clamp_min(1e-20)
    x = matrices / norm[:, None, None]
    gram = x @ x.mT                                                   # (M, S, S)
    identity = torch.eye(gram.shape[1], dtype=x.dtype, device=x.device)
    product = identity
    for _ in range(ITERATIONS):
        factor = a * identity + b * gram + c * (gram @ gram)
        product = factor @ product
        gram = factor @ gram @ factor
    return product @ x


class Muon(torch.optim.Optimizer):
    """Optimizer of two kinds of parameter groups, which `orthogonal` tells apart; of one rate.

    orthogonal True (weights of two axes and more, as matrices (O, R), g the gradient; m = 0 at first):
        m = momentum m + (1 - momentum) g;  u = momentum m + (1 - momentum) g;
        w = (1 - lr weight_decay) w - lr scale orthogonalise(u)
    orthogonal False: torch's fused AdamW with lr, betas, eps, weight_decay.
    A parameter without a gradient stays as it is. The moments are there from the start, so that no step runs
    out of memory for them. Raises ValueError for a rate below 0 and an orthogonal weight of fewer axes.
    """
    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        scale: float = 8.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ):
        if not 0 <= float(lr):
            raise ValueError(f"Muon: lr must be at least 0, got {lr}")
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "scale": scale,
                    "betas": betas, "eps": eps, "orthogonal": True}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for p in group["params"]:
            if group["orthogonal"] and p.dim() < 2:
                raise ValueError(f"Muon: an orthogonal weight needs two axes or more, got {tuple(p.shape)}; "
                                 "put it into a group with orthogonal False")
            if not p.requires_grad:
                continue
            if group["orthogonal"]:
                self.state[p] = {"momentum": torch.zeros_like(p)}
            else:
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                 "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            if not group["orthogonal"]:
                self.step_adamw(group, moved)
                continue
            for same in batches_of_equal_shape(moved):
                with torch.autocast(same[0].device.type, enabled=False):
                    self.step_kernels(group, same)
        return loss

    def step_kernels(self, group: dict[str, Any], kernels: list[Tensor]) -> None:
        """Move kernels of one shape, dtype and device."""
        lr, momentum = group["lr"], group["momentum"]
        updates = []
        for p in kernels:
            m = self.state[p]["momentum"]
            m.mul_(momentum).add_(p.grad, alpha=1 - momentum)
            u = (m * momentum).add_(p.grad, alpha=1 - momentum)
            updates.append(u.to(torch.promote_types(u.dtype, torch.float32)).flatten(1))
        stack = torch.stack(updates)                                  # (M, O, R)
        del updates, u
        stack = orthogonalise(stack).mul_(lr * group["scale"])
        for p, update in zip(kernels, stack):
            p.mul_(1 - lr * group["weight_decay"]).sub_(update.view(p.shape))

    def step_adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        if not parameters:
            return
        moments = [self.state[p] for p in parameters]
        first, second, steps = ([m[name] for m in moments] for name in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            parameters, [p.grad for p in parameters], first, second, [], steps, fused=True, amsgrad=False,
            beta1=beta1, beta2=beta2, lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )


def batches_of_equal_shape(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Parameters of one shape, dtype and device together, of at most MOST_ELEMENTS in all, or one alone."""
    found: dict[tuple, list[Tensor]] = {}
    for p in parameters:
        found.setdefault((p.shape, p.dtype, p.device), []).append(p)
    batches = []
    for same in found.values():
        many = max(1, MOST_ELEMENTS // max(1, same[0].numel()))
        batches += [same[i:i + many] for i in range(0, len(same), many)]
    return batches
