"""diffusion.py: formulas of each kind, schedules, the sampler against the exact answer for normal data and
against MONAI, guidance, and what is learned.

The right values are worked out here, apart from the code. For x ~ N(.7, .5^2) the best network is known, and
so is the end of the exact path of a noise: m + s (x_T - a m) / sqrt(a^2 s^2 + b^2).
"""
import dataclasses
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import diffusion
from diffusion import DiffusionConfig, Level
from pieces import run_alone

MEAN, STD = 0.7, 0.5
KINDS = [dict(kind="edm"), dict(kind="rflow"), dict(kind="ddpm", prediction="v"),
         dict(kind="ddpm", prediction="eps")]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def uniform(n, seed=0, dtype=torch.float64):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def posterior(a, b, x_t):
    """E[x | x_t] and E[eps | x_t] for x ~ N(MEAN, STD^2)."""
    var = a * a * STD**2 + b * b
    return MEAN + a * STD**2 / var * (x_t - a * MEAN), b / var * (x_t - a * MEAN)


def exact_network(cfg, level_of):
    """The best network for that data, from the papers' definitions of what it is asked for."""
    def network(x, t):
        a, b = level_of(t)
        x_t = x
        if cfg.kind == "edm":
            x_t = x * (b * b + cfg.sigma_data**2) ** 0.5
        data, eps = posterior(a, b, x_t)
        if cfg.kind == "edm":
            r2 = b * b + cfg.sigma_data**2
            return (data - cfg.sigma_data**2 / r2 * x_t) / (b * cfg.sigma_data / r2**0.5)
        if cfg.kind == "rflow":
            return eps - data
        return eps if cfg.prediction == "eps" else a * eps - b * data
    return network


def abar(dtype=torch.float64):
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=dtype) ** 2
    return (1 - betas).cumprod(0)


def level_of(kind):
    """What the network is told -> (a, b), by the definition of each kind."""
    def edm(t):
        return torch.ones_like(t), (4 * t).exp()

    def rflow(t):
        return 1 - t, t

    def ddpm(t):
        kept = abar()[(1000 * t).round().long()]
        return kept.sqrt(), (1 - kept).sqrt()
    return {"edm": edm, "rflow": rflow, "ddpm": ddpm}[kind]


def exact(cfg):
    """The best network for samples of one number, at the levels that the kind defines."""
    return exact_network(cfg, lambda t: tuple(part[:, None] for part in level_of(cfg.kind)(t)))


# ----------------------------------------------------------------------------------------- formulas, levels

def test_the_network_sees_and_is_asked_what_the_papers_say():
    """The loss is 0 for a network that gives the paper's target, the target's square for one that gives 0."""
    x, eps, u = normal(5, 2, 3), normal(5, 2, 3, seed=1), uniform(5)
    for fields in KINDS:
        for sigma_data in (0.5, 1.0):
            cfg, seen = DiffusionConfig(**fields, shift=None, sigma_data=sigma_data), []

            def network(given, t, cfg=cfg, seen=seen, sd=sigma_data):
                a, b = (v[:, None, None] for v in level_of(cfg.kind)(t))
                x_t = a * x + b * eps
                seen.append((given, x_t))
                if cfg.kind == "edm":        # Table 1: c_in, c_skip, c_out
                    assert (given - x_t / (b**2 + sd**2).sqrt()).abs().max() < 1e-12
                    return (x - sd**2 / (b**2 + sd**2) * x_t) / (b * sd / (b**2 + sd**2).sqrt())
                assert (given - x_t).abs().max() < 1e-12
                if cfg.kind == "rflow":
                    return eps - x
                return eps if cfg.prediction == "eps" else a * eps - b * x

            loss = diffusion.loss(cfg, network, x, eps, u)
            assert loss.shape == (5,) and loss.max() < 1e-20, (fields, loss)
            target = network(seen[0][0], diffusion.levels(cfg, u, (3,)).t)
            for kind, want in (("mse", target.square()), ("l1", target.abs())):
                loss = diffusion.loss(replace(cfg, loss=kind), lambda x, t: 0 * x, x, eps, u)
                assert (loss - want.mean((1, 2))).abs().max() < 1e-12


def test_levels_are_those_of_the_papers():
    u = uniform(200_000, dtype=torch.float32)
    edm = diffusion.levels(DiffusionConfig(kind="edm"), u)
    ln_sigma = edm.b.log()
    assert edm.b.dtype == torch.float64 and (edm.a == 1).all() and (edm.t - ln_sigma / 4).abs().max() < 1e-14
    assert abs(ln_sigma.mean() + 0.5) < 0.01 and abs(ln_sigma.std() - 1.2) < 0.01
    # the paper's -1.2 belongs to data of standard deviation 0.5
    assert DiffusionConfig().p_mean == pytest.approx(-1.2 + math.log(1 / 0.5), abs=0.01)

    flat = diffusion.levels(DiffusionConfig(shift=1.0), u)
    assert (flat.t - u).abs().max() < 1e-7 and torch.equal(flat.a, 1 - flat.t) and torch.equal(flat.b, flat.t)
    logit = diffusion.levels(DiffusionConfig(shift=1.0, time_sampling="logit_normal", time_mean=0.3,
                                             time_std=1.4), u)
    odds = (logit.t / (1 - logit.t)).log()
    assert abs(odds.mean() - 0.3) < 0.02 and abs(odds.std() - 1.4) < 0.02

    cfg = DiffusionConfig(kind="ddpm")
    ddpm = diffusion.levels(cfg, u)
    steps = (ddpm.t * 1000).round().long()
    assert steps.min() == 0 and steps.max() == 999
    assert (ddpm.a.square() - abar()[steps]).abs().max() < 1e-12
    assert (ddpm.a.square() + ddpm.b.square() - 1).abs().max() < 1e-12


def test_levels_rise_with_u_and_both_ends_are_finite():
    u = torch.tensor([0.0, 1e-9, 0.1, 0.5, 0.9, 1 - 1e-9, 1.0])
    for fields in [*KINDS, dict(time_sampling="logit_normal")]:
        level = diffusion.levels(DiffusionConfig(**fields), u, (8, 8, 8))
        assert all(part.isfinite().all() for part in level)
        assert (level.b.diff() >= 0).all() and (level.b > 0).all() and level.b[4] > level.b[2]


@pytest.mark.parametrize("fields", KINDS)
def test_what_is_taken_apart_adds_up_to_the_input(fields):
    cfg = DiffusionConfig(**fields)
    level = diffusion.levels(cfg, uniform(6))
    x_t = normal(6, 4, seed=2)
    found = diffusion.denoise(cfg, lambda x, t: (3 * x).sin(), x_t, level)
    again = level.a[:, None] * found.x + level.b[:, None] * found.eps
    assert (again - x_t).abs().max() < 1e-10


def test_every_kind_denoises_alike_with_the_exact_network():
    """At the same b / a all kinds know the same of x, whatever they ask their network for."""
    sigma = 0.8
    found = []
    for fields in KINDS:
        cfg = DiffusionConfig(**fields)
        scale = {"edm": 1.0, "rflow": 1 / (1 + sigma), "ddpm": 1 / math.sqrt(1 + sigma**2)}[cfg.kind]
        a, b = scale, scale * sigma
        network = exact_network(cfg, lambda t, a=a, b=b: (a, b))
        x_t = scale * (MEAN + 1.3 * torch.arange(5, dtype=torch.float64))[:, None]
        found.append(diffusion.denoise(cfg, network, x_t, Level(a, b, 0.5)).x)
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-12


@pytest.mark.parametrize("fields", KINDS)
def test_the_linear_loss_is_that_of_the_best_network_for_normal_data(fields):
    cfg = DiffusionConfig(**fields)
    for place in (0.1, 0.5, 0.9):
        u = torch.full((200_000,), place, dtype=torch.float64)
        level = diffusion.levels(cfg, u)
        a, b = level.a[0], level.b[0]

        def best(given, t, cfg=cfg, a=a, b=b):   # x ~ N(0, 1)
            x_t = given * (1 + b * b) ** 0.5 if cfg.kind == "edm" else given
            data, eps = a / (a * a + b * b) * x_t, b / (a * a + b * b) * x_t
            if cfg.kind == "edm":
                return (data - x_t / (1 + b * b)) * (1 + b * b) ** 0.5 / b
            if cfg.kind == "rflow":
                return eps - data
            return eps if cfg.prediction == "eps" else a * eps - b * data
        loss = diffusion.loss(cfg, best, normal(len(u), 1), normal(len(u), 1, seed=1), u).mean()
        assert loss.item() == pytest.approx(float(diffusion.linear_loss(cfg, level)[0]), rel=0.02)
        if cfg.kind == "edm":
            assert abs(diffusion.linear_loss(cfg, level)[0] - 1) < 1e-12


@pytest.mark.parametrize("dtype, want", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32),
                                         (torch.float32, torch.float32), (torch.float64, torch.float64)])
def test_the_loss_is_float32_or_wider(dtype, want):
    seen = []

    def network(x, t):
        seen.append((x.dtype, t.dtype))
        return x.to(torch.bfloat16)
    x = normal(3, 1, 4, 4, 4).to(dtype)
    loss = diffusion.loss(DiffusionConfig(), network, x, normal(3, 1, 4, 4, 4).to(dtype), uniform(3))
    assert loss.dtype == want and seen == [(want, want)]


# ---------------------------------------------------------------------------------------- schedule and shift

def test_time_steps_add_up_exactly():
    for steps in (1, 7, 30, 50, 1000):
        for size in ((32, 32, 32), (64, 64, 32), (128, 128, 128)):
            plan = diffusion.schedule(DiffusionConfig(steps=steps), size)
            assert len(plan) == steps + 1 and (plan[0].t, plan[-1].t) == (1, 0)
            walked = sum(now.t - then.t for now, then in zip(plan, plan[1:]))
            assert abs(walked - 1) <= 1e-12
    for fields in KINDS:
        for steps in (1, 2, 18):
            plan = diffusion.schedule(DiffusionConfig(**fields, steps=steps))
            assert (plan[-1].a, plan[-1].b) == (1, 0) and len(plan) == steps + 1
            ratios = [level.b / max(level.a, 1e-30) for level in plan]
            assert ratios == sorted(ratios, reverse=True) and len({*ratios}) == steps + 1


def test_karras_schedule():
    """arXiv:2206.00364, Eq. 5."""
    plan = diffusion.schedule(DiffusionConfig(kind="edm", steps=5, rho=3.0, sigma_min=0.1, sigma_max=10.0))
    want = [(10 ** (1 / 3) + i / 4 * (0.1 ** (1 / 3) - 10 ** (1 / 3))) ** 3 for i in range(5)]
    assert [level.b for level in plan[:-1]] == pytest.approx(want, rel=1e-12)
    assert [level.t for level in plan[:-1]] == pytest.approx([math.log(b) / 4 for b in want], rel=1e-12)


def test_shift():
    cfg = DiffusionConfig()
    assert diffusion.resolution_shift(cfg, (32, 32, 32)) == 1
    assert diffusion.resolution_shift(cfg, (128, 128, 128)) == pytest.approx(4)
    assert diffusion.resolution_shift(cfg, (64, 64, 32)) == pytest.approx(1.5874, rel=1e-4)
    assert diffusion.resolution_shift(replace(cfg, base_size=(16, 16, 16)), (32, 32, 32)) == pytest.approx(2)
    assert diffusion.resolution_shift(replace(cfg, shift=3.0), (64, 64, 64)) == 3
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    moved = diffusion.shifted(t, 4.0)
    assert torch.equal(diffusion.shifted(t, 1.0), t) and (moved.diff() > 0).all()
    assert moved[0] == 0 and moved[-1] == 1
    assert (diffusion.shifted(moved, 1 / 4) - t).abs().max() < 1e-15
    # b / a is what it multiplies
    odds, before = moved[1:-1] / (1 - moved[1:-1]), t[1:-1] / (1 - t[1:-1])
    assert (odds / before - 4).abs().max() < 1e-12
    # training and sampling agree: the schedule's times are those of evenly spread u
    plan = diffusion.schedule(replace(cfg, steps=10), (64, 48, 80))
    u = torch.tensor([1 - i / 10 for i in range(1, 10)], dtype=torch.float64)
    trained = diffusion.levels(cfg, u, (64, 48, 80)).t
    assert trained.tolist() == pytest.approx([level.t for level in plan[1:-1]], abs=1e-15)


def test_zero_terminal_snr():
    """arXiv:2305.08891: with these betas the last level is not pure noise."""
    cfg = DiffusionConfig(kind="ddpm")
    assert diffusion.ddpm_levels(cfg)[-1] ** 2 == pytest.approx(1.42e-4, rel=0.01)
    a = diffusion.ddpm_levels(replace(cfg, zero_terminal_snr=True))
    assert a[-1] == 0 and a[0] == pytest.approx(diffusion.ddpm_levels(cfg)[0], abs=1e-15)
    # Algorithm 1, line by line
    roots = abar().sqrt()
    want = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    assert (torch.tensor(a, dtype=torch.float64) - want).abs().max() < 1e-12
    # the mean of the data is lost at the start by as much as a knows of it, and not with a = 0
    noise, means = normal(4096, 1), []
    noise = torch.cat([noise, -noise])
    for zero in (False, True):
        cfg = replace(cfg, zero_terminal_snr=zero, steps=200)
        known = torch.tensor(diffusion.ddpm_levels(cfg), dtype=torch.float64)

        def level(t, known=known):
            kept = known[(1000 * t).round().long()]
            return kept[:, None], (1 - kept**2).sqrt()[:, None]
        means.append(diffusion.sample(cfg, exact_network(cfg, level), noise).mean().item())
    assert means[0] == pytest.approx(MEAN - STD * 0.0119 * MEAN, abs=5e-4)
    assert means[1] == pytest.approx(MEAN, abs=1e-6)


# ---------------------------------------------------------------------- the sampler against the exact answer

def worst(**fields):
    """The largest error over 4,096 noises: what becomes of them against the exact end of the path."""
    cfg = DiffusionConfig(**{"shift": 1.0, "prediction": "v", **fields})
    noise = normal(4096, 1)
    if cfg.kind != "rflow":
        cfg = replace(cfg, shift=None)
    found = diffusion.sample(cfg, exact(cfg), noise)
    first = diffusion.schedule(cfg)[0]
    a, b = first.a, first.b
    start = math.sqrt(a * a * cfg.sigma_data**2 + b * b) * noise
    return (found - (MEAN + STD * (start - a * MEAN) / math.sqrt(a * a * STD**2 + b * b))).abs().max().item()


TABLE = [   # kind, solver, shift, steps -> largest error, of a script that has no code of ours
    ("edm", "euler", 1, {9: 0.535, 18: 0.273, 36: 0.139, 72: 0.0697}),
    ("edm", "heun", 1, {9: 0.494, 18: 0.0982, 36: 0.0217, 72: 0.00510}),
    ("edm", "heun_u", 1, {9: 0.494, 18: 0.0982, 36: 0.0217, 72: 0.00510}),
    ("rflow", "euler", 1, {10: 0.245, 30: 0.0854, 60: 0.0432, 120: 0.0217}),
    ("rflow", "euler", 3, {10: 0.462, 30: 0.165, 60: 0.0843, 120: 0.0426}),
    ("rflow", "heun", 1, {10: 6.09e-3, 30: 8.42e-4, 60: 2.21e-4, 120: 5.64e-5}),
    ("rflow", "heun_u", 1, {10: 9.42e-3, 30: 1.80e-3, 60: 5.14e-4}),
    ("ddpm", "euler", 1, {10: 0.514, 50: 0.130, 250: 0.0326}),
    ("ddpm", "heun", 1, {10: 0.0576, 50: 1.39e-3, 250: 5.11e-3}),
    ("ddpm", "heun_u", 1, {10: 0.152, 50: 1.54e-3, 250: 4.99e-3}),
]


@pytest.mark.parametrize("kind, solver, shift, errors", TABLE)
def test_errors_are_those_of_the_table(kind, solver, shift, errors):
    for steps, want in errors.items():
        found = worst(kind=kind, solver=solver, shift=float(shift), steps=steps)
        assert found == pytest.approx(want, rel=0.01), (steps, found)


def test_orders_of_convergence():
    for kind, solver, steps, least in [("edm", "heun", 36, 1.9), ("rflow", "heun", 60, 1.9),
                                       ("edm", "euler", 72, 0.9), ("rflow", "euler", 60, 0.9),
                                       ("rflow", "heun_u", 120, 1.85)]:
        coarse = worst(kind=kind, solver=solver, steps=steps)
        fine = worst(kind=kind, solver=solver, steps=2 * steps)
        assert math.log2(coarse / fine) >= least, (kind, solver, math.log2(coarse / fine))


@pytest.mark.parametrize("solver", ["heun", "heun_u"])
def test_order_of_ddpm_without_its_last_step(solver):
    """The step from the first training level to the data has a length that no number of steps changes, so the
    order shows where that one is taken for granted: the exact path up to there, and that step."""
    def error(steps):
        cfg = DiffusionConfig(kind="ddpm", solver=solver, steps=steps, train_steps=1000)
        noise = normal(512, 1)
        found = diffusion.sample(cfg, exact(cfg), noise)
        plan = diffusion.schedule(cfg)
        (a, b, _), (a1, b1, _) = plan[0], plan[-2]
        z = (noise - a * MEAN) / math.sqrt(a * a * STD**2 + b * b)
        last = a1 * MEAN + z * math.sqrt(a1 * a1 * STD**2 + b1 * b1)
        return (found - posterior(a1, b1, last)[0]).abs().max().item()
    # 333 and 999 divide 999, so that no step is rounded
    order = math.log(error(334) / error(1000)) / math.log(3)
    assert order >= 1.9, order


def test_one_update_is_the_textbooks():
    """Euler in sigma, Euler in t and DDIM, each in its own words."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 3, generator=generator, dtype=torch.float64)

    def network(x, t):
        return (x @ weight + t[:, None]).sin()
    noise = normal(4, 3)
    for steps in (1, 5, 9):
        # arXiv:2206.00364, Algorithm 1 without its second half
        cfg = DiffusionConfig(kind="edm", solver="euler", steps=steps)
        plan = [level.b for level in diffusion.schedule(cfg)]
        x = math.sqrt(plan[0] ** 2 + 1) * noise
        for now, then in zip(plan, plan[1:]):
            t = torch.full((4,), math.log(now) / 4, dtype=torch.float64)
            data = x / (now**2 + 1) + now / math.sqrt(now**2 + 1) * network(x / math.sqrt(now**2 + 1), t)
            x = x + (then - now) * (x - data) / now
        assert (diffusion.sample(cfg, network, noise) - x).abs().max() <= 1e-12
        # dx / dt = v
        cfg = DiffusionConfig(solver="euler", steps=steps, shift=3.0)
        plan = [3 * (1 - i / steps) / (1 + 2 * (1 - i / steps)) for i in range(steps + 1)]
        x = noise
        for now, then in zip(plan, plan[1:]):
            x = x + (then - now) * network(x, torch.full((4,), now, dtype=torch.float64))
        assert (diffusion.sample(cfg, network, noise) - x).abs().max() <= 1e-12
        # arXiv:2010.02502, Eq. 12 with sigma 0
        cfg = DiffusionConfig(kind="ddpm", prediction="eps", solver="euler", steps=steps)
        places = torch.linspace(999, 0, steps, dtype=torch.float64).round().long().tolist()
        kept = [*abar()[places].tolist(), 1.0]
        x = noise
        for place, now, then in zip(places, kept, kept[1:]):
            eps = network(x, torch.full((4,), place / 1000, dtype=torch.float64))
            data = (x - math.sqrt(1 - now) * eps) / math.sqrt(now)
            x = math.sqrt(then) * data + math.sqrt(1 - then) * eps
        assert ((diffusion.sample(cfg, network, noise) - x).abs() / x.abs().max()).max() <= 1e-12


def test_nothing_is_clipped():
    cfg = DiffusionConfig(kind="ddpm", steps=250)
    found = diffusion.sample(cfg, exact(cfg), normal(20_000, 1))
    assert found.std().item() == pytest.approx(STD, abs=0.01) and found.max() > 1.5 and found.min() < -0.5


@pytest.mark.parametrize("fields", [*KINDS, dict(kind="edm", solver="heun"), dict(solver="heun_u")])
def test_a_sample_depends_on_its_noise_alone(fields):
    """In float32, alone, in another place, in another batch."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.SiLU(), nn.Conv3d(8, 2, 3, padding=1))
    cfg, seen = DiffusionConfig(**{"steps": 4, **fields}), []

    def called(x, t):
        seen.append(t)
        return network(x) + t.view(-1, 1, 1, 1, 1)
    noises = [normal(1, 2, 6, 6, 6, seed=i, dtype=torch.float32) for i in range(5)]
    whole = diffusion.sample(cfg, called, torch.cat(noises))
    for i in (0, 3):
        alone = diffusion.sample(cfg, called, noises[i])
        assert (alone - whole[i:i + 1]).abs().max() < 1e-5 * whole.abs().max()
    pair = diffusion.sample(cfg, called, torch.cat([noises[3], noises[0]]))
    assert (pair - whole[[3, 0]]).abs().max() < 1e-5 * whole.abs().max()
    assert whole.dtype == torch.float32 and all(t.isfinite().all() for t in seen)
    state = torch.get_rng_state()
    diffusion.sample(cfg, called, noises[0])
    assert torch.equal(state, torch.get_rng_state())


# ------------------------------------------------------------------------------------------------- guidance

class Called(nn.Module):
    """A network with a condition that notes how it was asked."""
    def __init__(self):
        super().__init__()
        self.asked = []

    def forward(self, x, t, label):
        self.asked.append((float(t[0]), float(label[0])))
        return (x + label.view(-1, 1)).tanh() * (1 + t[:, None])


def test_guidance():
    noise, cond, uncond = normal(3, 2), dict(label=torch.ones(3)), dict(label=torch.zeros(3))
    for fields in KINDS:
        cfg, network = DiffusionConfig(**fields, steps=5), Called()
        plain = diffusion.sample(cfg, network, noise, cond)
        without = diffusion.sample(cfg, network, noise, uncond)
        network.asked.clear()
        # w = 1 is conditional and w = 0 unconditional to the bit, and each asks once
        assert torch.equal(diffusion.sample(replace(cfg, guidance=1.0), network, noise, cond, uncond), plain)
        assert {label for _, label in network.asked} == {1.0}
        network.asked.clear()
        found = diffusion.sample(replace(cfg, guidance=0.0), network, noise, cond, uncond)
        assert torch.equal(found, without)
        assert {label for _, label in network.asked} == {0.0}
        # D = D_u + w (D_c - D_u)
        level = Level(0.6, 0.8, 0.3)
        both = [diffusion.denoise(cfg, network, noise, level, c) for c in (uncond, cond)]
        mixed = diffusion.denoise(cfg, network, noise, level, cond, uncond, 2.5)
        for u, c, found in zip(*both, mixed):
            assert (found - (u + 2.5 * (c - u))).abs().max() < 1e-12


def test_guidance_is_float32_for_a_network_in_bfloat16():
    def network(x, t, label):
        return (x + label.view(-1, 1)).to(torch.bfloat16)
    x, cfg = normal(3, 2, dtype=torch.float32), DiffusionConfig()
    cond, uncond = dict(label=torch.ones(3)), dict(label=torch.zeros(3))
    low, high = (network(x, None, **c).float() for c in (uncond, cond))
    found = diffusion.denoise(cfg, network, x, Level(0.5, 0.5, 0.5), cond, uncond, 3.3)
    assert (found.x - (x - 0.5 * (low + 3.3 * (high - low)))).abs().max() < 1e-5


def test_guidance_interval():
    cfg = DiffusionConfig(steps=8, shift=1.0, solver="euler", guidance=2.0, guidance_interval=(0.2, 1.0))
    network, cond, uncond = Called(), dict(label=torch.ones(3)), dict(label=torch.zeros(3))
    diffusion.sample(cfg, network, normal(3, 2), cond, uncond)
    guided = {t for t, label in network.asked if label == 0}
    assert guided == {0.25, 0.375, 0.5}          # b / a = t / (1 - t) is 1/3, 0.6 and 1; 1/7 and 5/3 are not
    assert [t for t, label in network.asked if label == 1] == [1 - i / 8 for i in range(8)]


def test_conditions_are_dropped_for_a_share():
    cfg = DiffusionConfig(cond_drop=0.25)
    cond = dict(label=torch.arange(8), image=normal(8, 1, 2, 2, 2))
    none = dict(label=torch.zeros(8, dtype=torch.long), image=torch.zeros(8, 1, 2, 2, 2, dtype=torch.float64))
    found = diffusion.drop_conditions(cfg, torch.tensor([.1, .3, .2, .9, .25, .5, .24, .6]), cond, none)
    kept = [1, 3, 4, 5, 7]
    assert found["label"].tolist() == [0, 1, 0, 3, 4, 5, 0, 7] and found["label"].dtype == torch.long
    assert torch.equal(found["image"][kept], cond["image"][kept]) and (found["image"][[0, 2, 6]] == 0).all()
    share = diffusion.drop_conditions(cfg, uniform(10_000), dict(label=torch.ones(10_000)),
                                      dict(label=torch.zeros(10_000)))["label"].mean()
    assert abs(share - 0.75) < 0.02


# ---------------------------------------------------------------------------------------------------- MONAI

SIZES = [(32, 32, 32), (64, 64, 32), (128, 128, 128)]


def monai():
    return pytest.importorskip("monai.networks.schedulers", reason="compares with MONAI's schedulers")


def their_rflow(steps, size):
    scheduler = monai().RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True,
                                       sample_method="uniform", base_img_size_numel=32**3, spatial_dim=3)
    scheduler.set_timesteps(steps, input_img_size_numel=math.prod(size))
    return scheduler


def test_rflow_is_monais_with_its_rounding_undone():
    """Their sign is x - eps. Their times are float16, and the next one is cut to whole thousandths: with
    exact times, and the next one given by the length of a step, both walk the same way."""
    network, noise = nn.Linear(3, 3).double(), normal(2, 3)
    for size in SIZES[1:]:
        scheduler = their_rflow(30, size)
        cfg = DiffusionConfig(solver="euler", steps=30, shift=(math.prod(size) / 32**3) ** (1 / 3))
        ours = [level.t for level in diffusion.schedule(cfg)]
        theirs = scheduler.timesteps.double() / 1000
        assert theirs.tolist() == pytest.approx(ours[:-1], abs=3e-4)        # float16 near 1000: steps of 0.5
        x = noise
        for now, then in zip(ours, ours[1:]):
            v = network(x) - now
            # dt is 1 / steps where no next time is given; so of one step of this length
            scheduler.num_inference_steps = 1
            whole, _ = scheduler.step(-v, 1000 * now, x, None)
            x = x + (whole - x) * (now - then)
        found = diffusion.sample(cfg, lambda x, t: network(x) - t[:, None], noise)
        assert (found - x).abs().max() < 1e-5
    x, eps = normal(2, 1, 2, 2, 2), normal(2, 1, 2, 2, 2, seed=1)
    mixed = scheduler.add_noise(x, eps, torch.tensor([300.0, 700.0]))
    t = torch.tensor([0.3, 0.7], dtype=torch.float64).view(2, 1, 1, 1, 1)
    assert (mixed - ((1 - t) * x + t * eps)).abs().max() < 1e-6


def test_monais_rflow_walks_too_far():
    for steps, size, want in [(30, SIZES[0], 1.0102), (30, SIZES[1], 1.0098), (30, SIZES[2], 1.0087),
                              (50, SIZES[1], 1.0131), (50, SIZES[2], 1.0138)]:
        scheduler, x = their_rflow(steps, size), torch.zeros(1, dtype=torch.float64)
        assert scheduler.timesteps.dtype == torch.float16
        times = [*scheduler.timesteps, torch.tensor(0.0)]
        for now, then in zip(times, times[1:]):
            x, _ = scheduler.step(torch.ones(1, dtype=torch.float64), now, x, then)
        assert x.item() == pytest.approx(want, abs=1e-4), (steps, size, x.item())


def test_monais_rflow_never_uses_its_transform_scale():
    schedulers = monai()
    times = []
    for scale in (1.0, 1.4):
        scheduler = schedulers.RFlowScheduler(use_discrete_timesteps=False, use_timestep_transform=True,
                                              transform_scale=scale)
        scheduler.set_timesteps(10, input_img_size_numel=64**3)
        times.append(scheduler.timesteps.tolist())
    assert times[0] == times[1]


def test_levels_targets_and_denoising_are_monais_ddpm():
    schedulers = monai()
    fields = dict(num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195,
                  clip_sample=False)
    kept = schedulers.DDPMScheduler(**fields).alphas_cumprod
    ours = torch.tensor(diffusion.ddpm_levels(DiffusionConfig(kind="ddpm")))
    assert (ours.square() - kept).abs().max() < 1e-5
    x, eps, u = normal(4, 2, 3), normal(4, 2, 3, seed=1), torch.tensor([0.0005, 0.3005, 0.7005, 0.9995])
    steps = (u * 1000).long()
    for prediction, theirs in (("eps", "epsilon"), ("v", "v_prediction")):
        cfg = DiffusionConfig(kind="ddpm", prediction=prediction)
        scheduler = schedulers.DDPMScheduler(prediction_type=theirs, **fields)
        seen = []

        def network(x_t, t, seen=seen):
            seen.append(x_t)
            return torch.zeros_like(x_t)
        loss = diffusion.loss(cfg, network, x, eps, u)
        noisy = scheduler.add_noise(x, eps, steps)
        target = eps if prediction == "eps" else scheduler.get_velocity(x, eps, steps)
        assert (seen[0] - noisy).abs().max() < 1e-5
        assert (loss - target.square().mean((1, 2))).abs().max() < 1e-5
        for i, step in enumerate(steps.tolist()[:3]):
            answer = normal(1, 2, 3, seed=2)
            _, data = scheduler.step(answer, step, noisy[i:i + 1])
            level = Level(*(part[i:i + 1] for part in diffusion.levels(cfg, u)))
            found = diffusion.denoise(cfg, lambda x, t, answer=answer: answer, noisy[i:i + 1], level)
            assert (found.x - data).abs().max() < 1e-5


@pytest.mark.parametrize("prediction, theirs", [("eps", "epsilon"), ("v", "v_prediction")])
def test_euler_is_monais_ddim_with_the_next_step_put_right(prediction, theirs):
    """Their times go from 999 to 0 evenly, but each step ends at now - 1000 // steps (MONAI, pull request
    8623): with the number of steps that makes this the next time, both are the same."""
    scheduler = monai().DDIMScheduler(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195,
                                      clip_sample=False, prediction_type=theirs)
    cfg = DiffusionConfig(kind="ddpm", prediction=prediction, solver="euler", steps=28)
    scheduler.set_timesteps(28)
    times = scheduler.timesteps.tolist()
    assert times == [round(1000 * level.t) for level in diffusion.schedule(cfg)[:-1]]
    noise, weight = normal(2, 3), normal(3, 3, seed=1)

    def network(x, t):
        return (x @ weight).sin() + t[:, None]

    def walk(right):
        x = noise
        for i, now in enumerate(times):
            then = times[i + 1] if i + 1 < len(times) else -1
            if right:
                scheduler.num_inference_steps = 1000 / (now - then)   # 1000 // this is the way to `then`
                while now - 1000 // scheduler.num_inference_steps != then:
                    scheduler.num_inference_steps -= 1e-6
            x, _ = scheduler.step(network(x, torch.full((2,), now / 1000)), now, x)
            if right:
                scheduler.num_inference_steps = 28
        return x
    scheduler.alphas_cumprod = Indexed(scheduler.alphas_cumprod)
    found = diffusion.sample(cfg, network, noise)
    assert (found - walk(True)).abs().max() < 1e-5 * found.abs().max()
    assert (found - walk(False)).abs().max() > 1e-3 * found.abs().max()


class Indexed:
    """A table whose index may be a whole number in floating point."""
    def __init__(self, table):
        self.table = table

    def __getitem__(self, index):
        return self.table[int(index)]


def test_monais_default_clips_what_is_outside_of_one():
    scheduler = monai().DDIMScheduler(schedule="scaled_linear_beta", beta_start=0.0015, beta_end=0.0195)
    scheduler.set_timesteps(250)
    x = normal(4096, 1)
    for now in scheduler.timesteps.tolist():
        kept = abar()[now]
        x, _ = scheduler.step(posterior(kept.sqrt(), (1 - kept).sqrt(), x)[1], now, x)
    assert x.std().item() < 0.4 and x.max() <= 1 + 1e-6            # of 0.5


# ---------------------------------------------------------------------------------------------- it learns

class Mlp(nn.Module):
    """36 thousand parameters: a place in the plane and a time -> a vector."""
    def __init__(self, width=128, waves=8):
        super().__init__()
        self.register_buffer("rates", math.pi / 2 * torch.arange(1, waves + 1))
        layers = [nn.Linear(3 + 2 * waves, width), nn.SiLU()]
        layers += [nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x, t):
        phase = t[:, None] * self.rates
        return self.layers(torch.cat([x, t[:, None], phase.sin(), phase.cos()], 1))


MODE_STD = 0.1


def ring(n, generator):
    """Eight modes on a circle, together of mean 0 and standard deviation 1 along each axis."""
    angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
    middle = math.sqrt(2 * (1 - MODE_STD**2)) * torch.stack([angle.cos(), angle.sin()], 1)
    return middle + MODE_STD * torch.randn(n, 2, generator=generator)


def energy(a, b):
    """2 E|a - b| - E|a - a'| - E|b - b'|."""
    return (2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean()).item()


def learn_the_ring(cfg, batch, steps, lr):
    torch.manual_seed(0)
    network, generator = Mlp(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        x, eps = ring(batch, generator), torch.randn(batch, 2, generator=generator)
        loss = diffusion.loss(cfg, network, x, eps, torch.rand(batch, generator=generator)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    real = ring(4096, generator)
    found = diffusion.sample(cfg, network, torch.randn(4096, 2, generator=generator))
    turn = (torch.atan2(found[:, 1], found[:, 0]) / (math.pi / 4)).round().long() % 8
    least = turn.bincount(minlength=8).min().item() / len(found)
    return energy(found, real), least


def test_rflow_learns_a_ring_of_eight_modes():
    distance, least = learn_the_ring(DiffusionConfig(steps=30, solver="euler"), 256, 800, 5e-3)
    assert distance <= 8e-3 and least >= 0.06, (distance, least)


@pytest.mark.slow
def test_edm_learns_a_ring_of_eight_modes():
    """With batches of 256 it stays at the linear network's loss for long; 2,048 leave it."""
    distance, least = learn_the_ring(DiffusionConfig(kind="edm"), 2048, 1200, 2e-3)
    assert distance <= 8e-3 and least >= 0.06, (distance, least)


# ------------------------------------------------------------------------------------------------ the config

CHANGES = [
    dict(kind="edm"), dict(kind="ddpm"), dict(loss="l1"), dict(steps=3), dict(solver="euler"),
    dict(solver="heun_u"), dict(guidance=2.0), dict(guidance=2.0, guidance_interval=(0.1, 0.9)),
    dict(time_sampling="logit_normal"), dict(time_sampling="logit_normal", time_mean=1.0),
    dict(time_sampling="logit_normal", time_std=2.0), dict(shift=2.0), dict(base_size=(8, 8, 8)),
    dict(cond_drop=0.9),
    dict(kind="edm", sigma_data=0.5), dict(kind="edm", p_mean=0.1), dict(kind="edm", p_std=0.5),
    dict(kind="edm", rho=3.0), dict(kind="edm", sigma_min=0.1), dict(kind="edm", sigma_max=20.0),
    dict(kind="ddpm", prediction="eps"), dict(kind="ddpm", train_steps=500),
    dict(kind="ddpm", beta_start=0.001), dict(kind="ddpm", beta_end=0.01),
    dict(kind="ddpm", zero_terminal_snr=True),
]


def mark(cfg):
    """Numbers that depend on every field."""
    def network(x, t, label):
        return (x + label.view(-1, 1, 1, 1, 1)).tanh() + t.view(-1, 1, 1, 1, 1)
    x, cond, none = normal(4, 1, 4, 4, 4), dict(label=torch.ones(4)), dict(label=torch.zeros(4))
    kept = diffusion.drop_conditions(cfg, torch.tensor([0.05, 0.3, 0.5, 0.7]), cond, none)
    loss = diffusion.loss(cfg, network, x, normal(4, 1, 4, 4, 4, seed=1), uniform(4), kept)
    return (*loss.tolist(), *diffusion.sample(cfg, network, x, cond, none).flatten().tolist())


def test_every_field_changes_something():
    marks = {}
    for change in [dict(), *CHANGES]:
        cfg = DiffusionConfig(**change)
        assert mark(cfg) == mark(cfg)
        marks[mark(cfg)] = change
    assert len(marks) == 1 + len(CHANGES)
    fields = {f.name for f in dataclasses.fields(DiffusionConfig)}
    assert {name for change in CHANGES for name in change} == fields


@pytest.mark.parametrize("fields, message", [
    (dict(kind="flow"), "diffusion.kind must be one of edm, rflow, ddpm, got 'flow'"),
    (dict(prediction="x"), "diffusion.prediction must be one of v, eps"),
    (dict(loss="huber"), "diffusion.loss must be"), (dict(solver="rk4"), "diffusion.solver must be"),
    (dict(time_sampling="cosine"), "diffusion.time_sampling must be"),
    (dict(sigma_data=0.0), "diffusion.sigma_data must be above 0, got 0"),
    (dict(p_std=-1.0), "diffusion.p_std must be above 0"),
    (dict(shift=0.0), "diffusion.shift must be above 0"),
    (dict(p_mean=math.nan), "diffusion.p_mean must be finite"),
    (dict(steps=0), "diffusion.steps must be at least 1, got 0"),
    (dict(sigma_max=0.001), "diffusion.sigma_max must be above diffusion.sigma_min=0.002, got 0.001"),
    (dict(beta_end=0.001), "diffusion.beta_end must be below 1"),
    (dict(beta_end=1.0), "diffusion.beta_end must be below 1"),
    (dict(cond_drop=1.5), "diffusion.cond_drop is a share"),
    (dict(base_size=(8, 8)), "diffusion.base_size is three"),
    (dict(guidance_interval=(2.0, 1.0)), "diffusion.guidance_interval is lowest,highest"),
    (dict(kind="ddpm", steps=2000), "diffusion.steps is at most diffusion.train_steps=1000, got 2000"),
    (dict(zero_terminal_snr=True, prediction="eps"), "diffusion.prediction must be v with"),
])
def test_bad_values_are_told_in_one_line(fields, message):
    with pytest.raises(ValueError, match=message) as found:
        DiffusionConfig(**fields)
    assert "\n" not in str(found.value)


def test_bad_calls_are_told_in_one_line():
    cfg, x = DiffusionConfig(), normal(2, 3)
    for call, message in [
        (lambda: diffusion.loss(cfg, None, x, x[:1], uniform(2)), "eps has the shape of x"),
        (lambda: diffusion.loss(cfg, None, x, x, uniform(1)), r"u is \(2,\)"),
        (lambda: diffusion.loss(cfg, lambda x, t: x[:, :1], x, x, uniform(2)), "must give the shape"),
        (lambda: diffusion.sample(replace(cfg, guidance=2.0), None, x), "diffusion.guidance=2.0 needs"),
    ]:
        with pytest.raises(ValueError, match=message) as found:
            call()
        assert "\n" not in str(found.value)


def test_works_copied_alone(tmp_path):
    run_alone(tmp_path, ["diffusion.py"], """
import torch, diffusion
cfg = diffusion.DiffusionConfig(kind="edm", steps=3)
x = torch.randn(2, 1, 4, 4, 4)
assert diffusion.loss(cfg, lambda x, t: x, x, torch.randn_like(x), torch.rand(2)).shape == (2,)
assert diffusion.sample(cfg, lambda x, t: x, x).shape == x.shape
assert not {"unet", "numpy", "monai"} & set(sys.modules) - {"numpy"}""")
