"""The state of a run: networks, optimizers, averages and counters, as at step 0. Version 0.3 (2026-11)."""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import adversarial
import muon
import perceptual
from training import ranks
from training.config import MemoryConfig, TrainConfig
from training.devices import on_device, pick_precision
from training.master16 import FIRST_LOG_SCALE, Master16
from training.task import Task


@dataclass
class State:
    """All that changes during a run; `last.pt` holds it."""
    task: Task
    model: torch.nn.Module                    # the task's network
    forward: Callable                         # model, or its compiled form
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    amp_dtype: torch.dtype | None             # None: no autocast
    emas: list[torch.nn.Module]               # one per train.ema
    masters: Master16 | None                  # of 16-bit weights
    dial: MemoryConfig                        # of this moment; cfg.memory is what the user asked for
    perceptual: perceptual.PerceptualLoss3d | None = None
    disc: adversarial.PatchDiscriminator3d | None = None
    disc_optimizer: torch.optim.Optimizer | None = None
    lecam: adversarial.LeCam | None = None
    step: int = 0                             # optimizer steps done
    best: float | None = None                 # best value of train.metric so far
    best_loss: float = math.inf               # of that validation: decides where the metric ties
    reference: float | None = None            # value of train.metric that early stopping compares with
    bad_validations: int = 0                  # since the reference was set
    plateau: tuple[float, float, int] = (math.inf, 1.0, 0)  # best loss, factor of the rate, validations since
                                                            # the best
    bad_steps: int = 0                        # non-finite steps in a row
    finished: bool = False
    validated: int = -1                       # step of the last whole validation
    sampled: int = 0                          # step of the last whole set of pictures
    latent: dict | None = None                # mean, std (Z,), scale_factor
    usage: Tensor | None = None               # (K,) int64: choices of each code in this epoch
    norms: list[float] = field(default_factory=list)  # the last finite gradient norms before clipping
    global_batch: int = 0                     # crops an optimizer step of train.batch x train.accum, over all
                                              # ranks; a stage of another batch has as many more
    edges: list[int] = field(default_factory=list)  # steps at which the stages before this one ended
    graphs: Any = None                        # graphs.Graphs of train.cuda_graph
    updating: bool = False                    # between the first and the last write of an update

    @property
    def shipped(self) -> torch.nn.Module:
        """The weights that are validated and that a user would ship."""
        return self.emas[0] if self.emas else self.model

    @property
    def weights(self) -> list[Tensor]:
        """What the optimizer moves, in float32."""
        return self.masters.weights if self.masters is not None else list(self.model.parameters())

    @property
    def log_scale(self) -> float:
        """Of the loss of 16-bit weights; without them what a first step would begin with."""
        return self.masters.log_scale if self.masters is not None else FIRST_LOG_SCALE

    @log_scale.setter
    def log_scale(self, value: float) -> None:
        if self.masters is not None:
            self.masters.log_scale = value

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def activations(self) -> torch.dtype:
        """What the network computes in."""
        if self.masters is not None:
            return torch.float16
        return self.amp_dtype or torch.float32


def new_state(cfg: TrainConfig, task: Task, device: torch.device, features: dict | None = None) -> State:
    """Networks and optimizers as at step 0, a function of the config alone.

    features: content of the feature network of the run to resume, which takes the place of the file's. The
    dial is as the config says, and not yet put on the networks (memory.turn_dial)."""
    # First the network; its averages start as copies of it.
    torch.manual_seed(cfg.train.seed)
    model = on_device(task.build(cfg), device)
    emas = []
    for _ in cfg.train.ema:
        emas.append(on_device(task.build(cfg).requires_grad_(False), device))
        emas[-1].load_state_dict(model.state_dict())

    # Then what moves it, and the networks that judge it.
    masters = Master16(model) if cfg.train.precision == "master16" else None
    optimizer = make_optimizer(cfg, model, masters.weights if masters is not None else None)
    allocate_moments(optimizer)
    amp_dtype, _ = pick_precision(cfg.train.amp, device, model)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype is torch.float16)
    helpers = task.helpers(cfg, device, features)
    if helpers.get("disc_optimizer") is not None:
        allocate_moments(helpers["disc_optimizer"])

    forward = torch.compile(model) if cfg.train.compile else model
    state = State(task, model, forward, optimizer, scaler, amp_dtype, emas, masters, cfg.memory, **helpers)
    state.global_batch = cfg.train.batch * cfg.train.accum * ranks.workers()
    if quantizer_of(model):
        state.usage = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
    return state


def make_optimizer(
    cfg: TrainConfig, model: torch.nn.Module, masters: list[Tensor] | None = None
) -> torch.optim.Optimizer:
    """masters: what is moved in place of model.parameters(), in their order."""
    o = cfg.optim
    if o.optimizer == "muon":
        return muon.Muon(muon.groups_of(model, masters), o.lr, o.weight_decay)
    weights = list(model.parameters()) if masters is None else masters
    if o.optimizer == "adamw":
        return torch.optim.AdamW(weights, o.lr, weight_decay=o.weight_decay, fused=True)
    if o.optimizer == "adam":
        return torch.optim.Adam(weights, o.lr, weight_decay=o.weight_decay, fused=True)
    return torch.optim.SGD(weights, o.lr, momentum=0.9, weight_decay=o.weight_decay, fused=True)


def allocate_moments(optimizer: torch.optim.Optimizer) -> None:
    """What the first step would allocate: out of memory there, half of the weights would have moved already.
    """
    # Muon has them from its start.
    if isinstance(optimizer, muon.Muon):
        return
    for group in optimizer.param_groups:
        for p in (p for p in group["params"] if p.requires_grad and p not in optimizer.state):
            if isinstance(optimizer, torch.optim.SGD):
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
            else:
                optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device),
                                      "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


def quantizer_of(model: torch.nn.Module) -> torch.nn.Module | None:
    return getattr(model, "quantizer", None)


def running_statistics(model: torch.nn.Module) -> list[Tensor]:
    """What a forward pass moves: all buffers but the codebook's."""
    return [b for name, b in model.named_buffers() if not name.startswith("quantizer.")]


def tensors_of(state: State) -> dict[str, Tensor]:
    """All that must be the same on every rank, by name."""
    modules = {"model": state.model, "disc": state.disc, "lecam": state.lecam, "features": state.perceptual}
    modules |= {f"ema {k}": ema for k, ema in enumerate(state.emas)}
    masters = state.masters.weights if state.masters is not None else ()
    named = {f"master {k}": master for k, master in enumerate(masters)}
    for part, module in modules.items():
        if module is not None:
            named |= {f"{part} {name}": tensor for name, tensor in module.state_dict().items()}
    return named
