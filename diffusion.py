"""Diffusion with any network: noise levels, training targets and samplers of three kinds. Needs torch alone.

    cfg = DiffusionConfig(kind="rflow")
    loss = diffusion.loss(cfg, network, x, eps, u).mean()      # x data, eps normal noise, u uniform (B,)
    x = diffusion.sample(cfg, network, noise)                  # normal noise -> data

Every kind mixes data and noise to x_t = a x + b eps, and asks the network for one mixture of the two:
    edm     a = 1, b = sigma           (x - c_skip x_t) / c_out   Karras et al. 2022, arXiv:2206.00364
    rflow   a = 1 - t, b = t           v = eps - x                arXiv:2209.03003, 2403.03206, 2508.05772
    ddpm    a = sqrt(abar), a^2 + b^2 = 1    eps, or v = a eps - b x    arXiv:2006.11239, 2202.00512
Whatever it is asked for, its answer gives the data D and the noise eps_hat in x_t = a D + b eps_hat, and one
sampler serves all: x' = a' D + b' eps_hat is DDIM (arXiv:2010.02502, Eq. 12 without noise), Euler's step of
edm in sigma and Euler's step of rflow in t.

The network is a callable: network(x (B, C, D, H, W) or any (B, ...), t (B,), **conditions) -> the shape of
x. It sees t = ln(sigma) / 4 (edm), t (rflow), step / 1000 (ddpm). Nothing here draws random numbers: u, eps
and noise are arguments, so that a sample depends on what it was given and not on its neighbours.

Data is expected with mean 0 and standard deviation `sigma_data`, and is never clipped.
Shapes: B batch; levels are (B,) in float64, or Python's floats where all samples share one.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("edm", "rflow", "ddpm")
PREDICTIONS = ("v", "eps")
TIME_SAMPLINGS = ("uniform", "logit_normal")
LOSSES = ("mse", "l1")
SOLVERS = ("euler", "heun", "heun_u")
Network = Callable[..., Tensor]
Conditions = Mapping[str, Tensor]


@dataclass(frozen=True)
class DiffusionConfig:
    """What a network is trained for, and how it is sampled from."""
    kind: str = "rflow"                # edm | rflow | ddpm
    loss: str = "mse"                  # mse | l1 (MAISI's; its minimum is a median, so samples are biased)
    cond_drop: float = 0.1             # share of samples trained without conditions (arXiv:2207.12598)
    # edm
    sigma_data: float = 1.0            # standard deviation of the data; the paper's images have 0.5
    p_mean: float = -0.5               # mean of ln sigma in training: the paper's -1.2 + ln(sigma_data / 0.5)
    p_std: float = 1.2                 # its standard deviation (the paper, Table 1)
    sigma_min: float = 0.002           # of sampling, the last level above 0 (Table 1)
    sigma_max: float = 80.0            # of sampling, the first level (Table 1)
    rho: float = 7.0                   # 1: even steps in sigma; more: shorter ones near 0 (Eq. 5)
    # rflow
    time_sampling: str = "uniform"     # of t in training: uniform | logit_normal (arXiv:2403.03206, Eq. 19)
    time_mean: float = 0.0             # logit_normal: mean of ln(t / (1 - t))
    time_std: float = 1.0              # logit_normal: its standard deviation
    shift: float | None = None         # factor of b / a for large volumes (arXiv:2508.05772); 1: none;
                                       # auto: edge of the volume / edge of base_size
    base_size: tuple[int, int, int] = (32, 32, 32)    # D,H,W of latents that need no shift (MAISI)
    # ddpm
    prediction: str = "v"              # v | eps
    train_steps: int = 1000            # noise levels in training (arXiv:2006.11239)
    beta_start: float = 0.0015         # of the scaled linear schedule: the roots of beta rise evenly (MAISI)
    beta_end: float = 0.0195           # its end; with these a is still 0.0119 at the last level
    zero_terminal_snr: bool = False    # make that 0 (arXiv:2305.08891, Algorithm 1); needs prediction v
    # sampling
    steps: int = 18                    # from noise to data (arXiv:2206.00364, small images); heun asks the
                                       # network twice a step
    solver: str = "heun"               # euler (DDIM) | heun (second order) | heun_u (the same in x / a)
    guidance: float = 1.0              # w in F_u + w (F_c - F_u); 1: conditional, 0: unconditional
    guidance_interval: tuple[float, float] | None = None  # lowest, highest b / a that is guided
                                       # (arXiv:2404.07724); none: all

    def __post_init__(self):
        known = {"kind": KINDS, "prediction": PREDICTIONS, "time_sampling": TIME_SAMPLINGS,
                 "loss": LOSSES, "solver": SOLVERS}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"diffusion.{name} must be one of {', '.join(choices)}, got {value!r}")
        for name in ("sigma_data", "p_std", "sigma_min", "rho", "time_std", "beta_start", "shift"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"diffusion.{name} must be above 0, got {value}")
        for name in ("p_mean", "time_mean", "guidance"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"diffusion.{name} must be finite, got {getattr(self, name)}")
        for name in ("steps", "train_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"diffusion.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.cond_drop <= 1:
            raise ValueError(f"diffusion.cond_drop is a share from 0 to 1, got {self.cond_drop}")
        if not self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(f"diffusion.sigma_max must be above diffusion.sigma_min={self.sigma_min}, "
                             f"got {self.sigma_max}")
        if not self.beta_start <= self.beta_end < 1:
            raise ValueError(f"diffusion.beta_end must be below 1 and no less than diffusion.beta_start="
                             f"{self.beta_start}, got {self.beta_end}")
        if len(self.base_size) != 3 or min(self.base_size) < 1:
            raise ValueError(f"diffusion.base_size is three positive sizes D,H,W, got {self.base_size}")
        object.__setattr__(self, "base_size", tuple(self.base_size))
        if self.kind == "ddpm" and self.steps > self.train_steps:
            raise ValueError(f"diffusion.steps is at most diffusion.train_steps={self.train_steps}, "
                             f"got {self.steps}")
        if self.zero_terminal_snr and self.prediction != "v":
            raise ValueError("diffusion.prediction must be v with diffusion.zero_terminal_snr: the last "
                             "level is pure noise, from which eps says nothing about the data, got eps")
        if self.guidance_interval is not None:
            object.__setattr__(self, "guidance_interval", tuple(self.guidance_interval))
            low, high = self.guidance_interval
            if not 0 <= low < high < math.inf:
                raise ValueError(f"diffusion.guidance_interval is lowest,highest of b / a, got {low},{high}")


class Level(NamedTuple):
    """A noise level: x_t = a x + b eps, of which the network is told t."""
    a: Tensor | float    # (B,) float64, or one for all samples
    b: Tensor | float
    t: Tensor | float


class Denoised(NamedTuple):
    x: Tensor            # D, the expected data
    eps: Tensor          # eps_hat, the noise in it: x_t = a D + b eps_hat


class Mixture(NamedTuple):
    """How a kind uses its network F at a level; F sees input * x_t."""
    input: Tensor | float
    target_x: Tensor | float         # F is asked for target_x * x + target_eps * eps
    target_eps: Tensor | float
    x_from_noisy: Tensor | float     # D = x_from_noisy * x_t + x_from_net * F
    x_from_net: Tensor | float
    eps_from_noisy: Tensor | float   # eps_hat = eps_from_noisy * x_t + eps_from_net * F
    eps_from_net: Tensor | float


# -------------------------------------------------------------------------------------------- noise levels

def resolution_shift(cfg: DiffusionConfig, size: Sequence[int]) -> float:
    """The factor of b / a for a volume (D, H, W): the larger it is, the more noise hides as much of it.

    auto: the cube root of its voxels over those of base_size (arXiv:2508.05772); 1 for data without space.
    """
    if cfg.shift is not None:
        return cfg.shift
    if not size:
        return 1.0
    return (math.prod(size) / math.prod(cfg.base_size)) ** (1 / 3)


@lru_cache(maxsize=16)
def ddpm_levels(cfg: DiffusionConfig) -> tuple[float, ...]:
    """a = sqrt(abar) of every training step; b = sqrt(1 - a^2)."""
    first, last = math.sqrt(cfg.beta_start), math.sqrt(cfg.beta_end)
    a, levels = 1.0, []
    for step in range(cfg.train_steps):
        share = step / max(1, cfg.train_steps - 1)
        beta = (first + share * (last - first)) ** 2
        a *= math.sqrt(1 - beta)
        levels.append(a)
    # arXiv:2305.08891, Algorithm 1: the last becomes 0, the first stays
    if cfg.zero_terminal_snr and cfg.train_steps > 1:
        scale = levels[0] / (levels[0] - levels[-1])
        levels = [(a - levels[-1]) * scale for a in levels]
    return tuple(levels)


def levels(cfg: DiffusionConfig, u: Tensor, size: Sequence[int] = ()) -> Level:
    """The training levels of u (B,), uniform in [0, 1), for volumes of (D, H, W) -> Level of (B,) float64.

    They rise with u, so that a fixed grid of u shows the loss from little noise to much.
    """
    u = u.to(torch.float64).clamp(2**-25, 1 - 2**-25)    # 0 has no logarithm; 2^-24 is float32's step
    if cfg.kind == "edm":
        ln_sigma = cfg.p_mean + cfg.p_std * torch.special.ndtri(u)    # ln sigma ~ N(p_mean, p_std^2)
        return Level(torch.ones_like(u), ln_sigma.exp(), ln_sigma / 4)
    if cfg.kind == "rflow":
        t = u
        if cfg.time_sampling == "logit_normal":
            t = (cfg.time_mean + cfg.time_std * torch.special.ndtri(u)).sigmoid()
        t = shifted(t, resolution_shift(cfg, size))
        return Level(1 - t, t, t)
    step = (u * cfg.train_steps).long()
    a = torch.tensor(ddpm_levels(cfg), dtype=torch.float64, device=u.device)[step]
    return Level(a, (1 - a.square()).sqrt(), step / cfg.train_steps)


def shifted(t: Tensor | float, shift: float) -> Tensor | float:
    """t / (1 - t) times shift: t' = s t / (1 + (s - 1) t); 0 and 1 stay, and 1 / s is the inverse."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(cfg: DiffusionConfig, size: Sequence[int] = ()) -> list[Level]:
    """The levels of sampling, cfg.steps + 1 of Python's floats (float64), from noise to data.

    The last has a = 1 and b = 0; only rflow shows it to the network. The differences of rflow's t add up to
    1 because nothing is rounded; training and sampling share the shift.
    """
    n, found = cfg.steps, []
    if cfg.kind == "edm":
        high, low = cfg.sigma_max ** (1 / cfg.rho), cfg.sigma_min ** (1 / cfg.rho)
        for i in range(n):
            # Eq. 5: even steps in sigma^(1 / rho)
            sigma = (high + i / max(1, n - 1) * (low - high)) ** cfg.rho
            found.append(Level(1.0, sigma, math.log(sigma) / 4))
        return [*found, Level(1.0, 0.0, -math.inf)]
    if cfg.kind == "rflow":
        shift = resolution_shift(cfg, size)
        for i in range(n + 1):
            t = shifted(1 - i / n, shift)
            found.append(Level(1 - t, t, t))
        return found
    for i in range(n):
        # from the last training step to the first, both included
        step = round((cfg.train_steps - 1) * (1 - i / max(1, n - 1)))
        a = ddpm_levels(cfg)[step]
        found.append(Level(a, math.sqrt(1 - a * a), step / cfg.train_steps))
    return [*found, Level(1.0, 0.0, 0.0)]


# ------------------------------------------------------------------------------------ network and objective

def mixture(cfg: DiffusionConfig, level: Level) -> Mixture:
    """The numbers of a level. Written so that none is a difference of near equals, nor infinite at b = 0."""
    a, b = level.a, level.b
    if cfg.kind == "edm":
        # c_in = 1 / r, c_skip = s^2 / r^2, c_out = b s / r with s = sigma_data, r^2 = b^2 + s^2 (Table 1);
        # F = (x - c_skip x_t) / c_out, and eps_hat = (x_t - D) / b
        s = cfg.sigma_data
        r = (b * b + s * s) ** 0.5
        return Mixture(1 / r, b / (s * r), -s / r, s * s / r**2, b * s / r, b / r**2, -s / r)
    if cfg.kind == "rflow":
        # F = eps - x, so that x = x_t - b F and eps = x_t + a F
        return Mixture(1.0, -1.0, 1.0, 1.0, -b, 1.0, a)
    if cfg.prediction == "eps":
        # x = (x_t - b F) / a
        return Mixture(1.0, 0.0, 1.0, 1 / a, -b / a, 0.0, 1.0)
    # F = a eps - b x (arXiv:2202.00512): x = a x_t - b F and eps = b x_t + a F
    return Mixture(1.0, -b, a, a, -b, b, a)


def loss(cfg: DiffusionConfig, network: Network, x: Tensor, eps: Tensor, u: Tensor,
         cond: Conditions | None = None) -> Tensor:
    """The training loss of each sample: x, eps (B, ...), u (B,) -> (B,) float32 or wider, not weighted.

    The mean over elements of |F - target|^2 (or its root). With edm this is the paper's loss, Eq. 8 with
    lambda = 1 / c_out^2: its target has variance 1 at every level.
    """
    if eps.shape != x.shape or u.shape != x.shape[:1]:
        raise ValueError(f"diffusion.loss: eps has the shape of x, {tuple(x.shape)}, and u is ({len(x)},); "
                         f"got {tuple(eps.shape)} and {tuple(u.shape)}")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    eps = eps.to(x.dtype)
    level = levels(cfg, u, x.shape[2:])
    mix = mixture(cfg, level)

    noisy = wide(level.a, x) * x + wide(level.b, x) * eps
    found = ask(network, noisy, level, mix, cond)
    target = wide(mix.target_x, x) * x + wide(mix.target_eps, x) * eps
    error = (found - target).flatten(1)
    if cfg.loss == "l1":
        return error.abs().mean(1)
    return error.square().mean(1)


def linear_loss(cfg: DiffusionConfig, level: Level) -> Tensor | float:
    """The mse of the best network that takes the data for independent normal numbers, at a level.

    1 - loss / linear_loss is what a network knows beyond that; with edm it is 1 - loss.
    """
    mix, var = mixture(cfg, level), cfg.sigma_data**2
    posterior = var * level.b**2 / (level.a**2 * var + level.b**2)
    return posterior / mix.x_from_net**2


def denoise(cfg: DiffusionConfig, network: Network, x_t: Tensor, level: Level, cond: Conditions | None = None,
            uncond: Conditions | None = None, guidance: float = 1.0) -> Denoised:
    """What the network takes x_t (B, ...) apart into: data and noise, each (B, ...).

    guidance w: F_u + w (F_c - F_u), classifier-free (arXiv:2207.12598, their w + 1). At w = 1 `uncond` and
    at w = 0 `cond` is not asked. Raises ValueError when w needs an `uncond` that is not given.
    """
    if guidance != 1 and uncond is None:
        raise ValueError(f"diffusion.guidance={guidance} needs the conditions that mean none; give uncond, "
                         f"or set diffusion.guidance to 1")
    mix = mixture(cfg, level)
    if guidance == 1:
        found = ask(network, x_t, level, mix, cond)
    else:
        found = ask(network, x_t, level, mix, uncond)
    if guidance not in (0, 1):
        with_cond = ask(network, x_t, level, mix, cond)
        found = found + guidance * (with_cond - found)
    x = wide(mix.x_from_noisy, x_t) * x_t + wide(mix.x_from_net, x_t) * found
    eps = wide(mix.eps_from_noisy, x_t) * x_t + wide(mix.eps_from_net, x_t) * found
    return Denoised(x, eps)


def ask(network: Network, x_t: Tensor, level: Level, mix: Mixture, cond: Conditions | None) -> Tensor:
    """The network's answer F in the dtype of x_t, float32 or wider whatever its own is."""
    t = torch.as_tensor(level.t, dtype=x_t.dtype, device=x_t.device).expand(len(x_t))
    found = network(wide(mix.input, x_t) * x_t, t, **(cond or {}))
    if found.shape != x_t.shape:
        raise ValueError(f"diffusion: the network must give the shape that it is given, {tuple(x_t.shape)}, "
                         f"got {tuple(found.shape)}")
    return found.to(x_t.dtype)


def wide(number: Tensor | float, x: Tensor) -> Tensor | float:
    """(B,) -> (B, 1, ...) on the device and in the dtype of x; a float stays one."""
    if not isinstance(number, Tensor):
        return number
    return number.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))


def drop_conditions(cfg: DiffusionConfig, u: Tensor, cond: Conditions,
                    uncond: Conditions) -> dict[str, Tensor]:
    """`cond`, and `uncond` in its place where u (B,) < cfg.cond_drop; entries are (B, ...).

    u is uniform in [0, 1) and another draw than the one of `loss`.
    """
    chosen = {}
    for name, value in cond.items():
        is_dropped = (u < cfg.cond_drop).view(-1, *[1] * (value.dim() - 1)).to(value.device)
        chosen[name] = torch.where(is_dropped, uncond[name], value)
    return chosen


# ------------------------------------------------------------------------------------------------- sampling

@torch.no_grad()
def sample(cfg: DiffusionConfig, network: Network, noise: Tensor, cond: Conditions | None = None,
           uncond: Conditions | None = None,
           tick: Callable[[int, int], None] = lambda done, total: None) -> Tensor:
    """Normal noise (B, ...) -> data (B, ...) in float32 or wider, by cfg.steps steps of cfg.solver.

    Solves dx = D da + eps_hat db from the first level to the last. euler: x' = a' D + b' eps_hat. heun, the
    trapezoidal rule: x' = x + (a' - a) (D + D') / 2 + (b' - b) (eps_hat + eps_hat') / 2, where D' and
    eps_hat' are the network's at the point that euler reaches; in edm that is the paper's Algorithm 1.
    heun_u: the same for u = x / a in l = b / a, u' = u + (l' - l) (eps_hat + eps_hat') / 2; first order where
    a = 0. tick is told of steps done, and of how many.
    """
    plan = schedule(cfg, noise.shape[2:])
    x = noise.to(torch.promote_types(noise.dtype, torch.float32))
    # the spread that training saw there; where a > 0 this is all that is known of the data (its mean is 0)
    first = plan[0]
    x = math.sqrt(first.a**2 * cfg.sigma_data**2 + first.b**2) * x
    for i, (now, then) in enumerate(zip(plan, plan[1:])):
        weight = guidance_at(cfg, now)
        here = denoise(cfg, network, x, now, cond, uncond, weight)
        reached = then.a * here.x + then.b * here.eps
        if is_second_order(cfg, now, then):
            there = denoise(cfg, network, reached, then, cond, uncond, guidance_at(cfg, then))
            eps = (here.eps + there.eps) / 2
            if cfg.solver == "heun_u":
                reached = then.a * (x / now.a + (then.b / then.a - now.b / now.a) * eps)
            else:
                data = (here.x + there.x) / 2
                reached = x + (then.a - now.a) * data + (then.b - now.b) * eps
        x = reached
        tick(i + 1, cfg.steps)
    return x


def is_second_order(cfg: DiffusionConfig, now: Level, then: Level) -> bool:
    """Whether the network can be asked again at the end of a step."""
    if cfg.solver == "euler":
        return False
    if cfg.solver == "heun_u":
        return now.a > 0 and then.b > 0
    # at b = 0 neither ln(sigma) nor a step of ddpm exists, while rflow's t = 0 is a time as any other
    return then.b > 0 or cfg.kind == "rflow"


def guidance_at(cfg: DiffusionConfig, level: Level) -> float:
    """cfg.guidance inside the interval of b / a, 1 (conditional) outside (arXiv:2404.07724, Eq. 6)."""
    if cfg.guidance_interval is None:
        return cfg.guidance
    low, high = cfg.guidance_interval
    is_inside = low * level.a < level.b <= high * level.a    # b / a is infinite at rflow's first level
    return cfg.guidance if is_inside else 1.0
