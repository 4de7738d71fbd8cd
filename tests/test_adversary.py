"""training/adversary.py: a discriminator beside the network, each with the gradients of its own loss."""
import copy
import math

import pytest
import torch

import adversarial
import losses
from runs import GAN, gradients, micro_batches, run, same, snapshot, tiny_state
from training.step import train_step


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("sizes", [[2], [1, 1], [2, 1]])
@pytest.mark.parametrize("kind", ["hinge", "lsgan", "bce"])
def test_discriminator_gradients_are_those_of_its_own_loss_alone(kind, sizes, amp):
    """Those of the generator's loss were once left in it; and the autoencoder's are those of its own."""
    # Without oneDNN under amp: its emulated bf16 gives NaN now and then (docs/LOG.md).
    with torch.backends.mkldnn.flags(enabled=not amp):
        cfg, state = tiny_state(**GAN, loss__adv_loss=kind, loss__feature_matching_weight=0.5,
                                optim__grad_clip=0, optim__optimizer="sgd")
        state.amp_dtype = torch.bfloat16 if amp else None
        disc, vae = copy.deepcopy(state.disc), copy.deepcopy(state.model)
        train_step(cfg, state, micro_batches(sizes))
        critic = own = 0
        for image, seeds, *_ in micro_batches(sizes):
            share = len(image) / sum(sizes)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                recon, mu, logvar = vae(image, [torch.Generator().manual_seed(seed) for seed in seeds])
                real, fake = disc(image)[0], disc(recon.detach())[0]
                critic = critic + share * adversarial.discriminator_loss(real, fake, kind)
            judge = copy.deepcopy(state.disc).requires_grad_(False)
            judge.load_state_dict(disc.state_dict())
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                logits, features = judge(recon)
                loss = losses.reconstruction_loss(recon, image)
                loss = loss + cfg.loss.kl_weight * losses.kl_loss(mu, logvar)
                loss = loss + 0.3 * adversarial.generator_loss(logits, kind)
                loss = loss + 0.5 * adversarial.feature_matching_loss(judge(image)[1], features)
                own = own + share * loss
        critic.backward()
        own.backward()
    for found, wanted in ((state.disc, disc), (state.model, vae)):
        a, b = gradients(found), gradients(wanted)
        far = float((a - b).norm() / b.norm())
        assert b.norm() > 0 and far <= (1e-2 if amp else 1e-5), far


def disc_gradients(**fields):
    """Gradients of discriminator and network after a step."""
    cfg, state = tiny_state(**GAN, loss__r1_every=1, **fields)
    train_step(cfg, state, micro_batches([1, 1]))
    return gradients(state.disc), gradients(state.model)


def test_the_weight_of_r1_is_not_clipped_away():
    """g(w) = g(0) + w g(R1): optim.grad_clip is the network's alone. It once clipped both, and r1_weight 1
    and 10 gave the same step.
    """
    none, one, ten = (disc_gradients(loss__r1_weight=w, optim__grad_clip=1e-3)[0] for w in (0, 100, 1000))
    assert one.norm() > 1 and (one - none).norm() > 0.1
    torch.testing.assert_close(ten - none, 10 * (one - none), rtol=1e-3, atol=1e-3 * float(one.abs().max()))


def test_the_discriminators_own_limit_clips_it_and_nothing_else():
    disc, model = disc_gradients(optim__grad_clip=1e-3)
    clipped, same_model = disc_gradients(optim__grad_clip=1e-3, loss__disc_grad_clip=0.01)
    assert disc.norm() > 0.02 and abs(float(clipped.norm()) - 0.01) < 1e-5
    torch.testing.assert_close(clipped, disc * (0.01 / disc.norm()), rtol=1e-3, atol=1e-7)
    assert torch.equal(model, same_model) and abs(float(model.norm()) - 1e-3) < 1e-6


def test_two_optimizers_share_a_gradient_scaler():
    """An overflow in the discriminator alone skips both, and halves the scale."""
    cfg, state = tiny_state(**GAN)
    state.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    assert train_step(cfg, state, micro_batches([1])).updated
    parts = (state.model, state.disc)
    before = [snapshot(part) for part in parts]
    hook = state.disc.logits.weight.register_hook(lambda grad: grad * math.inf)
    assert not train_step(cfg, state, micro_batches([1])).updated and state.scaler.get_scale() == 512
    hook.remove()
    assert all(same(a, part.state_dict()) for a, part in zip(before, parts))
    assert train_step(cfg, state, micro_batches([1])).updated


def test_too_small_crops_for_the_discriminator_are_one_line(tmp_path, capsys):
    assert run("--loss.adv_weight", "0.1", out=tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert "the discriminator sees crops of 4,8,8" in error and error.count("\n") == 1
