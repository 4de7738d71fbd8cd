"""training/step.py: one optimizer step against its definition, in every split, mode and bad case."""
import dataclasses
import math
import weakref

import pytest
import torch

import losses
import vae3d
from runs import (
    EVERYTHING,
    GAN,
    doubled,
    flat,
    gradients,
    micro_batches,
    same,
    snapshot,
    tiny_state,
)
from training.config import OptimConfig, convert
from training.memory import turn_dial
from training.step import clip_threshold, train_step

# -------------------------------------------------------------------------- one network, by its definition

@pytest.mark.parametrize("sizes", [[1] * 6, [2, 2, 2], [4, 2], [5, 1], [1, 1, 1, 3]])
def test_micro_batches_equal_one_batch_for_a_tail_of_any_length(sizes):
    """A short tail once counted as much as a whole micro-batch. Float64 and SGD, so that the update is
    linear in the gradient.
    """
    results = []
    for split in ([6], sizes):
        cfg, state = tiny_state(optim__optimizer="sgd", optim__grad_clip=0)
        doubled(state)
        result = train_step(cfg, state, micro_batches(split, torch.float64))
        results.append((flat(state.model), result.terms["loss"]))
    assert (results[0][0] - results[1][0]).abs().max() < 1e-12
    assert abs(results[0][1] - results[1][1]) < 1e-12


def test_step_equals_the_slow_version():
    """One AdamW step written out with plain torch: loss, clipping and update."""
    cfg, state = tiny_state(optim__optimizer="adamw", optim__grad_clip=0.01, loss__kl_weight=0.1)
    reference = vae3d.VAE3D(cfg.vae)
    reference.load_state_dict(state.model.state_dict())
    optimizer = torch.optim.AdamW(reference.parameters(), cfg.optim.lr, weight_decay=cfg.optim.weight_decay)
    result = train_step(cfg, state, micro_batches([2, 1]))
    total = 0
    for image, seeds, *_ in micro_batches([2, 1]):
        recon, mu, logvar = reference(image, [torch.Generator().manual_seed(seed) for seed in seeds])
        l1 = (recon - image).abs().mean()
        kl = -0.5 * (1 + logvar - mu ** 2 - logvar.exp()).mean()
        total = total + (l1 + 0.1 * kl) * len(image) / 3
    total.backward()
    norm = gradients(reference).norm()
    for p in reference.parameters():
        p.grad *= 0.01 / (norm + 1e-6)
    optimizer.step()
    assert abs(float(result.norm - norm)) < 1e-5 and norm > 0.01
    assert abs(float((result.terms["loss"] - total).detach())) < 1e-6
    assert (flat(reference) - flat(state.model)).abs().max() < 1e-6


def test_clipping_happens_after_unscaling():
    """A loss scale of 65536 must change neither the norm that is compared with the threshold nor the
    update; it once scaled both.
    """
    results = []
    for scaled in (False, True):
        cfg, state = tiny_state(optim__optimizer="sgd", optim__grad_clip=0.01)
        if scaled:
            state.scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        result = train_step(cfg, state, micro_batches([1, 1]))
        results.append((result.norm, flat(state.model)))
    assert abs(float(results[0][0] / results[1][0]) - 1) < 1e-5 and results[0][0] > 0.01
    assert (results[0][1] - results[1][1]).abs().max() < 1e-7


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_micro_batch_leaves_the_weights_as_they_were(poison):
    """Also in the middle of an accumulated step."""
    cfg, state = tiny_state(train__ema=0.9)
    before, before_ema = snapshot(state.model), snapshot(state.emas[0])
    crops = micro_batches([1, 1, 1])
    crops[1].image[0, 0, 0, 0, 0] = poison
    result = train_step(cfg, state, crops)
    assert not result.updated and same(before, state.model.state_dict())
    assert same(before_ema, state.emas[0].state_dict())
    assert train_step(cfg, state, micro_batches([1])).updated


def test_autocast_step_stays_close_to_float32():
    """bf16 autocast on the CPU stands in for CUDA's: KL and losses are float32, the update is finite, near.

    Without oneDNN: on CPUs that lack bf16, its channels_last_3d kernels for tiny sizes read memory that
    nobody wrote (docs/LOG.md). train.py uses bf16 on a CPU only where it is native.
    """
    results = []
    for dtype in (None, torch.bfloat16):
        cfg, state = tiny_state()
        state.amp_dtype = dtype
        with torch.backends.mkldnn.flags(enabled=False):
            results.append(train_step(cfg, state, micro_batches([2])))
    assert all(term.dtype == torch.float32 for term in results[1].terms.values())
    assert abs(float(results[0].terms["loss"] / results[1].terms["loss"]) - 1) < 0.02 and results[1].updated


def test_ema_follows_its_formula():
    cfg, state = tiny_state(train__ema=0.5)
    before = [p.clone() for p in state.emas[0].parameters()]
    state.step = 100                                             # past the rise of the decay
    train_step(cfg, state, micro_batches([1]))
    for old, new, live in zip(before, state.emas[0].parameters(), state.model.parameters()):
        assert (new - (0.5 * old + 0.5 * live)).abs().max() < 1e-6


@pytest.mark.parametrize("fields", [
    {"vae__bottleneck": "vq", "vae__num_codes": 8},
    {"task": "seg", "unet__norm": "batch", "unet__channels": "4,8"},
], ids=["codebook", "batch norm"])
def test_an_average_has_the_codebook_and_the_running_statistics_of_the_network(fields):
    """They are averages already; those of the start would not fit the weights."""
    cfg, state = tiny_state(**fields, train__ema=0.5)
    start = [buffer.clone() for buffer in state.model.buffers()]
    crops = [m._replace(label=(m.image[:, 0] > 0).long()) for m in micro_batches([1])]
    train_step(cfg, state, crops)
    live, shipped = list(state.model.buffers()), list(state.emas[0].buffers())
    assert any(not torch.equal(a, b) for a, b in zip(start, live))
    assert len(live) == len(shipped) and all(torch.equal(a, b) for a, b in zip(live, shipped))


def test_several_averages_follow_their_rates():
    cfg, state = tiny_state(train__ema="0.5,0.05")
    start = [p.detach().clone() for p in state.model.parameters()]
    train_step(cfg, state, micro_batches([1]))
    # The first is held to (1 + step) / (10 + step) at the start.
    for ema, decay in zip(state.emas, (0.1, 0.05)):
        for old, new, live in zip(start, ema.parameters(), state.model.parameters()):
            torch.testing.assert_close(new, decay * old + (1 - decay) * live)


def test_adaptive_clipping_follows_the_percentile_of_the_last_norms():
    o = OptimConfig(grad_clip=2.0, clip_percentile=95, clip_window=5)
    assert clip_threshold(o, [0.1] * 4) == 2.0
    norms = [0.5, 0.1, 0.2, 0.3, 0.4]
    assert clip_threshold(o, norms) == pytest.approx(0.48)
    assert clip_threshold(o, [9.0] * 5) == 2.0
    assert clip_threshold(OptimConfig(grad_clip=0), norms) == math.inf
    cfg, state = tiny_state(optim__grad_clip=1e9, optim__clip_percentile=50, optim__clip_window=3,
                            optim__optimizer="sgd", optim__lr=0)
    seen = []
    for seed in range(5):
        threshold = clip_threshold(cfg.optim, state.norms)
        result = train_step(cfg, state, micro_batches([1], seed=seed))
        seen.append(float(result.norm))
        assert float(gradients(state.model).norm()) == pytest.approx(min(seen[-1], threshold), rel=1e-4)
    assert state.norms == seen[-3:]


def test_stage_1_with_a_gradient_scaler_and_nothing_to_scale():
    cfg, state = tiny_state(vae__bottleneck="vq", vae__num_codes=8, train__stage=1)
    state.scaler = torch.amp.GradScaler("cpu")
    codes = state.model.quantizer.codebook.clone()
    assert train_step(cfg, state, micro_batches([1, 1])).updated
    assert not torch.equal(codes, state.model.quantizer.codebook)


def test_batch_norm_statistics_survive_a_nan():
    """Running statistics move in the forward pass, before anyone knows how the step ends."""
    cfg, state = tiny_state(task="seg", unet__norm="batch", unet__channels="4,8")
    crops = [m._replace(label=(m.image[:, 0] > 0).long()) for m in micro_batches([1, 1])]
    before = snapshot(state.model)
    crops[0].image[0, 0, 0, 0, 0] = math.nan
    assert not train_step(cfg, state, crops).updated and same(before, state.model.state_dict())


# ----------------------------------------------------------------- with discriminator, codebook, all terms

@pytest.mark.parametrize("split", [[1, 1, 1], [2, 1]])
def test_micro_batches_equal_one_batch_with_discriminator_and_codebook(split):
    results = []
    for sizes in ([3], split):
        cfg, state = tiny_state(**EVERYTHING, optim__optimizer="sgd", vae__codebook_restart=0.5)
        doubled(state)
        for seed in range(2):
            train_step(cfg, state, micro_batches(sizes, torch.float64, seed))
            state.step += 1
        parts = (state.model, state.disc, state.lecam, *state.emas)
        results.append([value for part in parts for value in snapshot(part).values()])
        results[-1].append(state.usage)
    # 1e-7: the discriminator's Adam divides by small numbers.
    for a, b in zip(*results):
        assert (a - b).abs().max() < 1e-7, float((a - b).abs().max())


@pytest.mark.parametrize("mode", [["checkpoint"], ["tile", "2,4,4"]])
def test_every_memory_mode_gives_the_same_step_with_all_terms(mode):
    results = []
    for name, *tile in (["none"], mode):
        cfg, state = tiny_state(**EVERYTHING, loss__adaptive_weight="true", optim__optimizer="sgd")
        doubled(state)
        size = convert(tile[0], tuple[int, int, int], "tile") if tile else None
        turn_dial(state, dataclasses.replace(cfg.memory, mode=name, tile=size))
        result = train_step(cfg, state, micro_batches([2, 1], torch.float64))
        results.append([*result.terms.values(), result.norm, *(p.detach() for p in state.model.parameters())])
    for a, b in zip(*results):
        assert (a - b).abs().max() <= 1e-9 * max(1, b.abs().max()), float((a - b).abs().max())


def test_terms_set_in_at_their_step_and_warm_up():
    cfg, state = tiny_state(**GAN, loss__disc_start=2, loss__disc_warmup=4, loss__perceptual_weight=0.1,
                            loss__perceptual_start=1, loss__perceptual_warmup=2, optim__lr=0)
    before, seen = snapshot(state.disc), []
    for step in range(6):
        state.step = step
        if step == 2:
            assert same(before, state.disc.state_dict())
        terms = train_step(cfg, state, micro_batches([1])).terms
        rest = terms["loss"] - terms["l1"] - 1e-6 * terms["kl"]
        rest -= 0.1 * min(1, step / 2) * terms.get("perceptual", 0)
        rest -= 0.3 * min(1, (step - 1) / 4) * terms.get("adv", 0)
        seen.append(({"adv", "disc", "perceptual"} & terms.keys(), float(rest)))
    assert [len(names) for names, _ in seen] == [0, 1, 3, 3, 3, 3]
    assert all(abs(left) < 1e-6 for _, left in seen), seen


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_nan_micro_batch_leaves_discriminator_codebook_and_averages(poison):
    """A step that is not finite changes nothing that a run keeps; the next one does."""
    cfg, state = tiny_state(**EVERYTHING)
    train_step(cfg, state, micro_batches([1, 1]))
    parts = (state.model, state.disc, state.lecam, *state.emas)
    before, norms, usage = [snapshot(part) for part in parts], list(state.norms), state.usage.clone()
    crops = micro_batches([1, 1, 1])
    crops[1].image[0, 0, 0, 0, 0] = poison
    assert not train_step(cfg, state, crops).updated
    assert all(same(a, part.state_dict()) for a, part in zip(before, parts))
    assert state.norms == norms and torch.equal(usage, state.usage)
    assert train_step(cfg, state, micro_batches([1])).updated


@pytest.mark.parametrize("change", [
    {"recon": "mse"},
    {"kl_weight": 0.5},
    {"channel_weights": "2"},
    {"foreground_weight": 5},
    {"foreground_weight": 5, "background": 1},
    {"structure_weight": 1},
    {"perceptual_weight": 1},
    {"perceptual_weight": 1, "crop": "2,4,4"},
    {"perceptual_weight": 1, "perceptual_start": 1},
    {"perceptual_weight": 1, "perceptual_warmup": 9},
    {"adv_weight": 0.1},
    {"adv_weight": 0.1, "adv_loss": "lsgan"},
    {"adv_weight": 0.1, "adaptive_weight": "true"},
    {"adv_weight": 0.1, "disc_start": 1},
    {"adv_weight": 0.1, "disc_warmup": 9},
    {"adv_weight": 0.1, "disc_channels": 8},
    {"adv_weight": 0.1, "disc_strides": "1,1,1"},
    {"adv_weight": 0.1, "disc_strides": "1,1,1", "disc_layers": 2},
    {"adv_weight": 0.1, "disc_norm": "group"},
    {"adv_weight": 0.1, "disc_lr": 1.0},
    {"adv_weight": 0.1, "disc_grad_clip": 1e-4},
    {"adv_weight": 0.1, "feature_matching_weight": 1},
    {"adv_weight": 0.1, "r1_weight": 1},
    {"adv_weight": 0.1, "r1_weight": 1, "r1_every": 2},
    {"adv_weight": 0.1, "lecam_weight": 1},
], ids=str)
def test_every_field_of_the_loss_changes_the_step(change):
    """A field that changes nothing is a bug. What a field needs to act stands before it."""
    def after(fields):
        fields = {"disc_layers": 1, "disc_channels": 4, "disc_strides": "1,2,2", **fields}
        cfg, state = tiny_state(data__patch="6,8,8", **{f"loss__{k}": v for k, v in fields.items()})
        for seed in range(2):
            train_step(cfg, state, micro_batches([1, 1], seed=seed, size=(6, 8, 8)))
            state.step += 1
        networks = [network for network in (state.model, state.disc) if network is not None]
        return [round(float(p.detach().double().sum()), 9) for m in networks for p in m.parameters()]
    *needed, _ = change
    assert after(change) != after({name: change[name] for name in needed})


def test_fields_of_the_loss_are_all_tested():
    changes = test_every_field_of_the_loss_changes_the_step.pytestmark[0].args[1]
    seg = {"dice_share", "class_weights"}                        # test_segmentation_fields_reach_the_loss
    files = {"perceptual_features"}                              # test_features_are_trained_and_used
    found = {key for change in changes for key in change}
    assert {f.name for f in dataclasses.fields(losses.LossConfig)} == found | seg | files


def test_backward_runs_without_the_reconstruction(monkeypatch):
    """It is as large as its volume, and no layer's gradient needs it: 2 of 10 GiB at 1024^3 in tiles."""
    kept, alive = [], []
    original = losses.reconstruction_loss

    def noted(recon, *rest):
        kept[:] = [weakref.ref(recon)]
        return original(recon, *rest)
    monkeypatch.setattr(losses, "reconstruction_loss", noted)
    cfg, state = tiny_state()
    state.model.decoder[0].weight.register_hook(lambda gradient: alive.append(kept[0]()))
    train_step(cfg, state, micro_batches([1]))
    assert alive == [None]
