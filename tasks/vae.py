"""Task `vae`: an autoencoder, with or without a codebook, a perceptual term and a discriminator.

loss = recon + kl_weight KL (arXiv:1312.6114, Eq. 10), or recon + the codebook's terms (arXiv:1711.00937,
Eq. 3), and what the section `loss` adds: structure, perceptual, adversarial terms (arXiv:2012.09841). What
training/task.py asks of a task stands here; a name that is not here is filled in there.

Shapes: B batch, C channels, D H W depth height width, Z latent channels, d h w of the latent, K codes.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

import adversarial
import data
import losses
import perceptual
import vae3d
from losses import LossConfig
from training import checkpoints, ranks, views
from training.adversary import disc_rate
from training.cases import Case
from training.config import TrainConfig
from training.devices import on_device, to_device
from training.evaluation import MOST_PSNR, compared
from training.forward import forward
from training.latents import LatentKind
from training.log import codebook_use
from training.order import MicroBatch, ramp, seed_of
from training.plan import for_volumes, set_dial
from training.ready import Ready, run_network
from training.run import Run, recovered, stop_if_signalled
from training.signals import RunStopped
from training.state import State
from training.task import Objective, Picture, Scored, of_codebook_stage
from training.validation import load_best
from vae3d import VAE3D, VAEConfig
from volumes.config import DataConfig
from weights import LAYOUTS

PRESETS = vae3d.PRESETS
# A run from a foreign file names its layout as preset. The config of the network itself stands in the run's
# config.yaml, so that here the defaults do.
FILE_PRESETS = {layout: VAEConfig() for layout in LAYOUTS}
METRICS = {"psnr": True, "ssim": True, "l1": False, "loss": False}
OPTIMIZER = "muon"


# -------------------------------------------------------------------------------- the config and the networks

def sections(preset: VAEConfig) -> dict:
    return {"vae": preset}


def check(cfg: TrainConfig) -> None:
    if cfg.train.precision == "master16" and cfg.train.amp:
        raise ValueError("train.precision=master16 is for --task vae, without --amp: its weights have 16 "
                         "bits already")
    if cfg.train.stage == 1 and (cfg.loss.adv_weight or cfg.loss.perceptual_weight):
        raise ValueError("train.stage 1 trains the codebook alone; set loss.adv_weight and "
                         "loss.perceptual_weight to 0")


def resolve(cfg: TrainConfig, dataset: data.Data) -> TrainConfig:
    """Raises ValueError where the network of a foreign file is for another number of channels."""
    if cfg.preset in FILE_PRESETS and cfg.vae.in_channels != dataset.channels:
        raise ValueError(f"--init: channels of the {cfg.preset} network: {cfg.vae.in_channels}, of the "
                         f"data: {dataset.channels}; use --data.select_channel N, or --vae.in_channels "
                         f"{dataset.channels} for new first and last layers")
    return cfg


def build(cfg: TrainConfig) -> VAE3D:
    """Raises ValueError for a stage without a codebook. In stage 1 the codebook alone learns."""
    return of_codebook_stage(VAE3D(cfg.vae), cfg.train.stage, "vae")


def helpers(cfg: TrainConfig, device: torch.device, features: dict | None) -> dict:
    """The networks that judge reconstructions, under the names that State has for them.

    features: the feature network of a resumed run, which wins over the file that the config names.
    """
    found = {}
    if cfg.loss.adv_weight:
        disc = on_device(build_discriminator(cfg), device)
        # The betas of VQGAN (arXiv:2012.09841).
        optimizer = torch.optim.Adam(disc.parameters(), disc_rate(cfg), betas=(0.5, 0.9), fused=True)
        found |= {"disc": disc, "disc_optimizer": optimizer}
    if cfg.loss.lecam_weight:
        found["lecam"] = adversarial.LeCam().to(device)
    if cfg.loss.perceptual_weight:
        found["perceptual"] = on_device(build_perceptual(cfg, features), device)
    return found


def build_discriminator(cfg: TrainConfig) -> adversarial.PatchDiscriminator3d:
    """Raises ValueError when the crops that it sees are too small for it."""
    loss = cfg.loss
    disc = adversarial.PatchDiscriminator3d(
        cfg.vae.in_channels, loss.disc_channels, loss.disc_layers, loss.disc_strides, loss.disc_norm
    )
    seen = disc.least_size
    if cfg.data.patch:
        seen = [min(n, c) for n, c in zip(cfg.data.patch, loss.crop or cfg.data.patch)]
    if any(n < least for n, least in zip(seen, disc.least_size)):
        raise ValueError(f"the discriminator sees crops of {','.join(map(str, seen))} (--patch, loss.crop), "
                         f"but {loss.disc_layers} layers of loss.disc_strides {loss.disc_strides} need "
                         f"{','.join(map(str, disc.least_size))}; give strides of 1 to the short axis, or "
                         "fewer loss.disc_layers")
    return disc


def build_perceptual(cfg: TrainConfig, content: dict | None) -> perceptual.PerceptualLoss3d:
    """loss.perceptual_features as a frozen network; content: of such a file, instead.

    ValueError for a bad file.
    """
    if cfg.loss.perceptual_features == "random":
        return perceptual.PerceptualLoss3d(perceptual.FeatureNet3d())
    content = content or checkpoints.load(cfg.loss.perceptual_features, "vae3d.features")
    try:
        return perceptual.PerceptualLoss3d(perceptual.FeatureNet3d.from_checkpoint(content))
    except ValueError as error:
        raise ValueError(f"{cfg.loss.perceptual_features}: {error}") from None


# -------------------------------------------------------------------------------- training and validation

def last_start(cfg: TrainConfig) -> int:
    """The step at which the last of the terms sets in."""
    adv = cfg.loss.disc_start if cfg.loss.adv_weight else 0
    features = cfg.loss.perceptual_start if cfg.loss.perceptual_weight else 0
    return max(adv, features)


def given(
    cfg: TrainConfig, state: State, micro: MicroBatch, generators: Sequence[torch.Generator]
) -> tuple[Tensor, ...]:
    """The noise (B, Z, d, h, w) of a sampled latent, as the network would draw it."""
    shape = (cfg.vae.z_channels, *state.model.latent_size(micro.image.shape[2:]))
    dtype = torch.promote_types(micro.image.dtype, torch.float32)
    return (torch.stack([torch.randn(shape, generator=g, dtype=dtype) for g in generators]),)


def objective(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """What a training step lowers. The perceptual term sets in slowly.

    The adversarial terms are added by adversary.py, from the crops that come with the objective.
    """
    warmed = ramp(state.step, cfg.loss.perceptual_start, cfg.loss.perceptual_warmup)
    weight = cfg.loss.perceptual_weight * warmed
    return reconstruct_and_compare(cfg, state, network, micro, generators, weight)


def criterion(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """The same with all terms in full, so that validations compare."""
    return reconstruct_and_compare(cfg, state, network, micro, generators, cfg.loss.perceptual_weight)


def reconstruct_and_compare(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
    perceptual_weight: float,
) -> Objective:
    """generators: one for each sample of the micro-batch, for its latent noise and its sub-crop."""
    noise = micro.given[0] if micro.given else generators
    out = forward(state, network, micro.image, noise)

    # First what the networks that judge will see: the same sub-crop of image and reconstruction, so that
    # their memory is bounded.
    crops = ()
    if state.disc is not None or state.perceptual is not None:
        starts = perceptual.crop_starts(micro.image.shape, cfg.loss.crop, generators)
        crops = tuple(perceptual.sub_crop(x, starts, cfg.loss.crop) for x in (micro.image, out.recon))

    # Then the terms: first those that need no other network, then the perceptual one.
    terms = reconstruction_terms(cfg.loss, out, micro.image)
    if perceptual_weight:
        real, fake = crops
        terms["perceptual"] = state.perceptual(fake, real)
        terms["loss"] = terms["loss"] + perceptual_weight * terms["perceptual"]
    return Objective(out, terms, crops)


def reconstruction_terms(
    cfg: LossConfig, out: vae3d.VAEOutput | vae3d.VQOutput, image: Tensor
) -> dict[str, Tensor]:
    """The terms that need no other network, and `loss`, their weighted sum."""
    # loss = recon + kl_weight KL + structure_weight structure; with a codebook vq in the place of KL.
    weighting = cfg.channel_weights, cfg.foreground_weight, cfg.background
    recon = losses.reconstruction_loss(out.recon, image, cfg.recon, *weighting)
    terms = {"loss": recon, cfg.recon: recon}
    if isinstance(out, vae3d.VQOutput):
        # Its two parts have been weighted by the quantizer.
        terms["vq"] = out.vq_loss
        terms["loss"] = terms["loss"] + out.vq_loss
    else:
        terms["kl"] = losses.kl_loss(out.mu, out.logvar)
        terms["loss"] = terms["loss"] + cfg.kl_weight * terms["kl"]
    if cfg.structure_weight:
        terms["structure"] = losses.structure_loss(out.recon, image, *weighting)
        terms["loss"] = terms["loss"] + cfg.structure_weight * terms["structure"]
    return terms


def metrics(
    cfg: TrainConfig, out: vae3d.VAEOutput | vae3d.VQOutput, micro: MicroBatch, crop: data.Crop
) -> dict[str, Tensor]:
    """psnr, ssim, (unweighted) l1, and iou of occupied voxels for voxel grids. A perfect crop has
    MOST_PSNR, so that it does not make the mean infinite.
    """
    x = micro.image
    found = {
        "psnr": losses.psnr(out.recon, x).clamp(max=MOST_PSNR),
        "ssim": losses.ssim(out.recon, x),
        "l1": losses.reconstruction_loss(out.recon, x, "l1"),
    }
    if crop.entry.intensity.modality == "voxel":
        found["iou"] = losses.occupancy_iou(out.recon, x, cfg.loss.background)
    return found


def counts(
    cfg: TrainConfig, out: vae3d.VAEOutput | vae3d.VQOutput, micro: MicroBatch, dataset: data.Data
) -> dict[str, Tensor]:
    """Of one crop: the gradient energies of reconstruction and image, (2,)."""
    return {"energy": losses.gradient_energy(out.recon, micro.image).cpu().double()}


def figures(sums: dict[str, Tensor]) -> dict[str, float]:
    """sharpness, the ratio of the sums over all held-out crops: the mean of the crops' ratios would be that
    of the flattest one.
    """
    recon, target = sums["energy"].tolist()
    return {"sharpness": recon / target if target else math.nan}


def picture(cfg: TrainConfig, crop: data.Crop, out: vae3d.VAEOutput | vae3d.VQOutput) -> Picture:
    """The crop, its reconstruction, and the error, with the figures of this crop."""
    recon, intensity = out.recon[0].float().cpu(), crop.entry.intensity
    is_picture = intensity.modality == "picture" and crop.image.shape[1] == 1
    window = views.window_limits(cfg.log.window, cfg.data.window, intensity)
    shown = views.of_reconstruction(crop.image, recon, crop.entry.spacing, intensity, window, is_picture)
    pair = recon[None], crop.image[None]
    figures = f"PSNR {float(losses.psnr(*pair)):.2f} dB, SSIM {float(losses.ssim(*pair)):.4f}"
    if intensity.modality == "ct":
        # A distance of 2 is the whole range.
        hu = float((recon - crop.image).abs().mean()) / 2 * (intensity.high[0] - intensity.low[0])
        figures += f", mean error {hu:.1f} HU"
    if intensity.modality == "voxel":
        figures += f", IoU of occupied voxels {float(losses.occupancy_iou(*pair, cfg.loss.background)):.4f}"
    return Picture(shown.sheet(), recon.numpy(), "recon", shown.note() | {"figures": figures})


# -------------------------------------------------------------------------------- start and end of a run

@torch.no_grad()
def start(run: Run) -> None:
    """The codebook's first codes, from the latents of training crops, as vae.codebook_init says."""
    vae, cfg = run.state.model, run.cfg
    if cfg.vae.bottleneck != "vq" or cfg.vae.codebook_init == "uniform":
        return

    # First the latents of some crops, as rows (N, Z). Every rank computes all of them.
    rows = []
    for index in range(min(len(run.crops), cfg.train.latent_crops)):
        stop_if_signalled(run)
        x = to_device(run.crops[index][0][None], run.device)
        z = recovered(run, x.shape, lambda x=x: ranks.agreed(forward(run.state, vae.latent, x)))
        rows.append(z.movedim(1, -1).flatten(0, 3))

    # Then the codes, the same in the averages. per_step: latents that an optimizer step will have.
    per_step = len(rows[0]) * run.stage.global_batch
    generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "codebook"))
    vae.quantizer.fit(torch.cat(rows), cfg.vae.codebook_init, generator, per_step=per_step)
    for ema in run.state.emas:
        ema.quantizer.load_state_dict(vae.quantizer.state_dict())


def finish(run: Run) -> None:
    """Measure the latent of the weights that ship and store it in both checkpoints."""
    cfg, state = run.cfg, run.state
    try:
        best = load_best(run)
    except ValueError as error:
        raise RunStopped(f"{error}; --resume {run.out} makes it anew") from None
    # Only the first rank is here, so it has all tiles to itself.
    vae = on_device(VAE3D(cfg.vae), run.device)
    set_dial(vae, dataclasses.replace(state.dial, tile_parallel=False))
    vae.load_state_dict(best["model"])
    state.latent = best["latent"] = latent_statistics(run, vae.eval())
    checkpoints.save(run.out / "best.pt", best)


@torch.no_grad()
def latent_statistics(run: Run, vae: VAE3D) -> dict:
    """Mean and std (Z,) of the latent mean, or of the codes, over training crops; scale factor.

    The scale factor is 1 / std, with the std over all channels together (arXiv:2112.10752, App. G).
    """
    count, total, squares = 0, 0, 0                              # of positions; sums (Z,) over them
    for index in range(min(len(run.crops), run.cfg.train.latent_crops)):
        # Of several ranks the first is here alone, and must not end without the others.
        if ranks.world() == 1:
            stop_if_signalled(run)
        x = to_device(run.crops[index][0][None], run.device)
        mu = forward(run.state, vae.encode, x)[0].cpu().double()  # MPS has no float64
        count = count + mu[0, 0].numel()
        total = total + mu.sum((0, 2, 3, 4))
        squares = squares + mu.square().sum((0, 2, 3, 4))

    # std^2 = E[mu^2] - E[mu]^2, for each channel and over all of them.
    mean = total / count
    std = (squares / count - mean.square()).clamp_min(0).sqrt()
    whole = (squares.sum() / count / len(mean) - mean.mean().square()).clamp_min(1e-12).sqrt()
    return {"mean": mean.float().cpu(), "std": std.float().cpu(), "scale_factor": float(1 / whole)}


# -------------------------------------------------------------------------------- use of a checkpoint

def describe(cfg: TrainConfig) -> str:
    return f"autoencoder ({cfg.vae.bottleneck})"


def prepare(ready: Ready, options: argparse.Namespace, cfg: DataConfig) -> None:
    """Exact tiles, as --tile and --memory say. ValueError for --sample where there is no noise."""
    if getattr(options, "sample", False):
        check_has_noise(ready)
    for_volumes(ready.model, options.tile, options.memory)


def check_has_noise(ready: Ready) -> None:
    if ready.model.quantizer is not None:
        raise ValueError(f"--sample: vae.bottleneck is {ready.model.cfg.bottleneck}, whose codes have no "
                         f"noise; leave the flag out")


def encode(ready: Ready, array: np.ndarray, generator: torch.Generator | None = None,
           tick: Callable | None = None) -> np.ndarray:
    """(C, D, H, W) normalised -> the latent mean (Z, d, h, w) float32, or indices of codes (d, h, w) int64.

    generator: a sample of the posterior instead of its mean. Raises ValueError for a network with a codebook.
    """
    if generator is not None:
        check_has_noise(ready)
    vae = ready.model
    vae.progress = tick
    found = run_network(ready, vae.encode, array)
    if vae.quantizer is not None:
        return found.index[0].cpu().numpy()
    z = found.mu
    if generator is not None:
        z = vae3d.sample_posterior(*found, generator)
    return z[0].float().contiguous().cpu().numpy()


def decode(ready: Ready, latent: np.ndarray, size: Sequence[int], tick: Callable | None = None) -> np.ndarray:
    """What `encode` gave -> (C, D, H, W) float32. size: the D, H, W that went in.

    Raises ValueError where the result is not finite.
    """
    vae = ready.model
    vae.progress = tick

    def work(z: Tensor) -> Tensor:
        if vae.quantizer is None:
            return vae.decode(z, size)
        return vae.decode_indices(z, size)
    recon = run_network(ready, work, latent)[0].float().contiguous().cpu().numpy()

    # One nan makes least and most nan; looking at these two takes no copy of the volume.
    if not (np.isfinite(recon.min()) and np.isfinite(recon.max())):
        remedy = "" if ready.amp_dtype is None else "; leave --amp out"
        raise ValueError(f"the reconstruction is not finite{remedy}")
    return recon


def reconstruct(ready: Ready, array: np.ndarray, tick: Callable | None = None) -> np.ndarray:
    """(C, D, H, W) normalised -> the same shape; the very bits of `decode` after `encode`."""
    latent = encode(ready, array, tick=tick)
    return decode(ready, latent, array.shape[1:], tick)


def latent_kind(ready: Ready) -> LatentKind:
    """What `encode` gives: indices of codes, (d, h, w), or a latent of Z channels, (Z, d, h, w)."""
    vae = ready.model
    if vae.quantizer is not None:
        return LatentKind(vae.cfg.bottleneck, vae.quantizer.num_codes, vae.latent_size)
    return LatentKind(vae.cfg.bottleneck, None, lambda size: (vae.cfg.z_channels, *vae.latent_size(size)))


def evaluate(ready: Ready, case: Case, number: int, options: argparse.Namespace,
             tick: Callable | None) -> Scored:
    """Of one whole volume: figures of its reconstruction, the size of its latent, and which codes it uses."""
    # First the reconstruction and its figures.
    volume, intensity = case.volumes[number]
    started = time.monotonic()
    latent = encode(ready, volume, tick=tick)
    recon = decode(ready, latent, volume.shape[1:], tick)
    seconds = time.monotonic() - started
    scores, sums = compared(recon, volume, intensity, ready.device)

    # Then how small the latent is: its bits beside the source's voxels, and beside the bits that the source
    # has on disk for each of its volumes. A latent of numbers is counted with 32 bits each and with 16.
    codes = latent_kind(ready).codes
    bits = {"": 32, "_16": 16} if codes is None else {"": math.log2(codes)}
    voxels = math.prod(case.origin.size)
    source_bits = case.origin.bits / (len(case.volumes) + len(case.origin.blank))
    for kind, each in bits.items():
        scores[f"bits_per_voxel{kind}"] = latent.size * each / voxels
        scores[f"compression{kind}"] = source_bits / (latent.size * each)
    if codes is None:
        return Scored(scores, recon, seconds, sums)

    # Then which codes are used, of this volume, and to be added up over all.
    usage = torch.bincount(torch.from_numpy(latent).flatten(), minlength=codes)
    return Scored(scores | codebook_use(usage), recon, seconds, sums | {"usage": usage})


def pooled(sums: dict[str, Tensor]) -> dict[str, float]:
    """Which codes are used by all volumes together."""
    return codebook_use(sums["usage"]) if "usage" in sums else {}
