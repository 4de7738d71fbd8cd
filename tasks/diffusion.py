"""Task `diffusion`: a denoiser of latents (diffusion.py) on what `predict.py encode` wrote.

loss = the mean of |F - target|^2 over elements, of latents that are normalised by the mean and std of each
channel over the whole training set (float64; kept in the checkpoint), at one random noise level a sample.
Validation asks for the same at fixed levels with fixed noise. Conditions: spacing, size, region and class as
one vector (training/conditions.py), a latent beside the noised one (`cond.concat`), and a label map through a
ControlNet beside the frozen denoiser that train.init names (`cond.control`, arXiv:2302.05543).

Shapes: B batch, Z latent channels, d h w of a latent, V numbers of the conditions. Version 0.1 (2026-11).
"""
from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import data
import diffusion
import pictures
import unet
from control import ControlNet, bit_planes
from tasks import vae as autoencoder
from training import checkpoints, conditions, latent_data
from training.config import RunConfig, TrainConfig, changed
from training.devices import to_device
from training.forward import forward
from training.latent_data import LatentData
from training.order import MicroBatch, seed_of
from training.plan import for_volumes
from training.ready import Ready, load
from training.run import Run, stop_if_signalled
from training.state import State
from training.task import Objective, Picture
from unet import UNet, UNetConfig
from volumes.files import DataError, Say, sizes

PRESETS = unet.DENOISERS
METRICS = {"loss": False, "explained": True}
LEVELS = 8                                    # fixed noise levels of a validation
PLANES = 8                                    # of a label map, so 256 classes
EMA = 0.999                                   # of the weights that are sampled from, unless train.ema differs


class Denoiser(UNet):
    """unet.UNet, and where it is given label maps a ControlNet of its own, beside which it is frozen.

    x (B, Z ..., d, h, w), t (B,), vector (B, V) or None, hint (B, PLANES, D, H, W) or None -> UNetOutput.
    """
    def __init__(self, cfg: UNetConfig, hint_stride: Sequence[int] | None = None, hint_width: int = 32):
        super().__init__(cfg)
        self.beside = None
        if hint_stride is not None:
            self.requires_grad_(False)
            self.beside = ControlNet(self, PLANES, halvings(hint_stride), hint_width)

    def memory(self, mode: str) -> Denoiser:
        super().memory(mode)
        if getattr(self, "beside", None) is not None:
            self.beside.encoder.memory(mode)
        return self

    def forward(self, x: Tensor, t: Tensor, vector: Tensor | None = None,
                hint: Tensor | None = None) -> unet.UNetOutput:
        control = None if hint is None else self.beside(x, t, hint, vector)
        return super().forward(x, t, vector, control)


def halvings(stride: Sequence[int]) -> list[tuple[int, ...]]:
    """A stride such as 2,4,4 as steps of at most 2: (2,2,2), (1,2,2). An odd one is taken at once."""
    steps, left = [], list(stride)
    while max(left) > 1:
        step = [2 if n % 2 == 0 else n for n in left]
        steps.append(tuple(step))
        left = [n // s for n, s in zip(left, step)]
    return steps


# -------------------------------------------------------------------------------- the config, the data

def sections(preset: UNetConfig) -> dict:
    return {"unet": preset, "train": RunConfig(ema=(EMA,))}


def check(cfg: TrainConfig) -> None:
    if cfg.train.precision == "master16":
        raise ValueError("train.precision=master16 is for --task vae, without --amp: its weights have 16 "
                         "bits already")
    if cfg.train.val_whole:
        raise ValueError("train.val_whole: latents are validated in crops of data.patch; leave it out")
    if cfg.cond.control is not None and cfg.train.init is None:
        raise ValueError("cond.control trains a ControlNet beside a denoiser that is there; name its run "
                         "with --init")


def dataset(cfg: TrainConfig, say: Say) -> LatentData:
    """The latents. What a denoiser in train.init knows of its latents holds for these too."""
    if cfg.train.init is not None and cfg.cond.autoencoder is None:
        theirs = checkpoint_of(cfg.train.init)["config"].get("cond", {})
        if theirs.get("autoencoder") is None:
            raise DataError(f"--init {cfg.train.init}: is no denoiser of --task diffusion")
        kept = {name: theirs[name] for name in ("classes", "autoencoder", "stride", "mm", "modality", "low",
                                                "high")}
        kept = {name: tuple(v) if isinstance(v, list) else v for name, v in kept.items()}
        cfg = changed(cfg, cond=kept)
    found = latent_data.open_latents(cfg, say)
    shift = diffusion.resolution_shift(cfg.diffusion, found.patch)
    if cfg.diffusion.kind == "rflow" and cfg.diffusion.shift is None and shift < 1:
        say(f"diffusion.shift auto is {shift:.2g} for latents of {sizes(found.patch)}, below the 1 of "
            f"{sizes(cfg.diffusion.base_size)}: most steps have little noise; docs/DIFFUSION.md says what "
            f"--diffusion.shift 2 changes")
    return found


def checkpoint_of(path: str) -> dict:
    """Of a run folder or a file."""
    found = Path(path)
    for name in ("best.pt", "last.pt"):
        if (found / name).is_file():
            found = found / name
            break
    return checkpoints.load(found, "vae3d.weights", "vae3d.train")


def resolve(cfg: TrainConfig, dataset: LatentData) -> TrainConfig:
    """The widths of input, output and conditions, and what the latents say of themselves."""
    cond = dataset.cond
    folded = math.prod(cond.stride) if cond.control is not None else 0
    z = dataset.channels - cond.concat_channels - folded
    cfg = dataclasses.replace(cfg, cond=cond)
    return changed(cfg, unet={"in_channels": z + cond.concat_channels, "out_channels": z,
                              "vector_channels": conditions.width(cond)})


def channels(cfg: TrainConfig) -> int:
    """Of what a crop holds: the latent, the one beside it, the folded label map."""
    folded = math.prod(cfg.cond.stride) if cfg.cond.control is not None else 0
    return cfg.unet.in_channels + folded


def build(cfg: TrainConfig) -> Denoiser:
    if cfg.cond.control is None:
        return Denoiser(cfg.unet)
    return Denoiser(cfg.unet, cfg.cond.stride, cfg.cond.control_width)


def describe(cfg: TrainConfig) -> str:
    weights = f"averaged weights ({cfg.train.ema[0]:g})" if cfg.train.ema else "weights as trained"
    return f"denoiser ({cfg.diffusion.kind}, {weights})"


# -------------------------------------------------------------------------------- before the first step

def start(run: Run) -> None:
    """Mean and std of the training latents; the ControlNet's copy of the denoiser's encoder."""
    state, cfg = run.state, run.cfg
    if cfg.train.init is not None:
        state.latent = checkpoint_of(cfg.train.init)["latent"]   # what its denoiser was trained with
    else:
        state.latent = statistics(run)
    if cfg.cond.control is not None:
        run.log.say("cond.control: the ControlNet's encoder begins as a copy of the denoiser's, which stays "
                    "as it is")
        for network in (state.model, *state.emas):
            wanted = network.beside.encoder.state_dict()
            theirs = network.state_dict()
            network.beside.encoder.load_state_dict({name: theirs[name] for name in wanted})


def statistics(run: Run) -> dict:
    """Mean and std (Z,) over every element of every training latent, in float64; scale factor, 1 / std.

    Independent of order and batch. Every rank finds the same.
    """
    z = run.cfg.unet.out_channels
    count, total, squares, shift = 0, np.zeros(z), np.zeros(z), None
    for entry in run.dataset.train:
        stop_if_signalled(run)
        latent = latent_data.mapped(entry.path)[entry.number].astype(np.float64).reshape(z, -1)
        # The first latent's mean is taken off all, so that no large squares hide a small variance.
        if shift is None:
            shift = latent.mean(1)
        latent = latent - shift[:, None]
        count += latent.shape[1]
        total += latent.sum(1)
        squares += np.square(latent).sum(1)
    offset = total / count
    variance = squares / count - np.square(offset)
    mean, std = shift + offset, np.sqrt(np.maximum(variance, 1e-12))
    whole = math.sqrt(float(variance.mean() + mean.var()))       # over all channels together
    return {"mean": torch.from_numpy(mean).float(), "std": torch.from_numpy(std).float(),
            "scale_factor": 1 / max(whole, 1e-6)}


# -------------------------------------------------------------------------------- training and validation

def given(
    cfg: TrainConfig, state: State, micro: MicroBatch, generators: Sequence[torch.Generator]
) -> tuple[Tensor, ...]:
    """Noise (B, Z, d, h, w), its level and whether the conditions are dropped (2, B), both in [0, 1), and
    mean and std (Z,) of the latents.
    """
    draws = [torch.rand(2, generator=g, dtype=torch.float64) for g in generators]
    x = micro.image[:, :cfg.unet.out_channels]
    dtype = torch.promote_types(x.dtype, torch.float32)
    known = () if state.latent is None else (state.latent["mean"], state.latent["std"])
    return (noise_of(x, generators), torch.stack(draws, 1).to(dtype), *(value.to(x.dtype) for value in known))


def objective(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """One noise level a sample. Noise, level and the loss of its conditions are draws of its own generator.
    """
    device = micro.image.device
    if micro.given is None:
        taken = [value.to(device, non_blocking=True) for value in given(cfg, state, micro, generators)]
        micro = micro._replace(given=tuple(taken))
    eps, (u, dropped), *known = micro.given
    x, cond = prepared(cfg, dict(zip(("mean", "std"), known)), micro.image, micro.label)
    none = {name: torch.zeros_like(value) for name, value in cond.items()}
    cond = diffusion.drop_conditions(cfg.diffusion, dropped, cond, none)
    found = diffusion.loss(cfg.diffusion, caller(state, network), x, eps, u, cond)
    return Objective(None, {"loss": found.mean()})


def criterion(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """The loss at LEVELS fixed noise levels, from little noise to much, with fixed noise and all conditions.

    explained: 1 - loss / what the best linear denoiser of independent normal numbers has, the mean over the
    levels; 0 is no better than knowing mean and std.
    """
    x, cond = prepared(cfg, state.latent, micro.image, micro.label)
    eps, terms, explained = noise_of(x, generators), {}, 0.0
    for k in range(LEVELS):
        u = torch.full((len(x),), (k + 0.5) / LEVELS, device=x.device)
        found = diffusion.loss(cfg.diffusion, caller(state, network), x, eps, u, cond).mean()
        level = diffusion.levels(cfg.diffusion, u[:1].cpu(), x.shape[2:])
        linear = float(diffusion.linear_loss(cfg.diffusion, level))
        terms[f"level_{k + 1}"] = found
        explained = explained + (1 - found / linear) / LEVELS
    return Objective(None, {"loss": sum(terms.values()) / LEVELS, "explained": explained, **terms})


def prepared(cfg: TrainConfig, known: dict | None, image: Tensor,
             label: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
    """A crop's channels -> the normalised latent (B, Z, d, h, w), and the conditions by name."""
    z, beside = cfg.unet.out_channels, cfg.cond.concat_channels
    x, cond = normalised(known, image[:, :z]), {}
    if cfg.unet.vector_channels:
        if label is None:                                        # of a rehearsal
            label = torch.zeros(len(x), cfg.unet.vector_channels, device=x.device)
        cond["vector"] = label.to(x.device, x.dtype, non_blocking=True)
    if beside:
        cond["concat"] = scaled_concat(image[:, z:z + beside])
    if cfg.cond.control is not None:
        cond["hint"] = bit_planes(unfold(image[:, z + beside:], cfg.cond.stride), PLANES).to(x.dtype)
    return x, cond


def normalised(known: dict | None, z: Tensor) -> Tensor:
    """(z - mean) / std of each channel; as it is in a rehearsal of memory, which knows neither."""
    if not known:
        return z
    mean, std = (known[name].to(z.device, z.dtype, non_blocking=True) for name in ("mean", "std"))
    return (z - mean.view(1, -1, 1, 1, 1)) / std.view(1, -1, 1, 1, 1)


def restored(known: dict, x: Tensor) -> Tensor:
    """The inverse of `normalised`."""
    mean, std = (known[name].to(x.device, x.dtype).view(1, -1, 1, 1, 1) for name in ("mean", "std"))
    return x * std + mean


def scaled_concat(z: Tensor) -> Tensor:
    """The latent beside, to about unit size by each sample's own largest root of mean squares."""
    size = z.square().mean((1, 2, 3, 4), keepdim=True).sqrt().clamp_min(1e-6)
    return z / size


def unfold(folded: Tensor, stride: Sequence[int]) -> Tensor:
    """latent_data.fold's inverse: (B, s0 s1 s2, d, h, w) -> (B, 1, d s0, h s1, w s2)."""
    b, _, d, h, w = folded.shape
    s0, s1, s2 = stride
    parts = folded.reshape(b, s0, s1, s2, d, h, w).permute(0, 4, 1, 5, 2, 6, 3)
    return parts.reshape(b, 1, d * s0, h * s1, w * s2)


def noise_of(x: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Normal noise in the shape of x, each sample's by its own generator, the same on every device."""
    eps = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
    return to_device(eps.to(x.dtype), x.device)


def caller(state: State, network: Callable) -> diffusion.Network:
    """The network as diffusion.py calls it, in the run's precision."""
    return asked(lambda *inputs: forward(state, network, *inputs))


def asked(run: Callable) -> diffusion.Network:
    """run(x, t, vector, hint) -> UNetOutput, as a function of conditions by name."""
    def ask(x: Tensor, t: Tensor, vector: Tensor | None = None, concat: Tensor | None = None,
            hint: Tensor | None = None) -> Tensor:
        if concat is not None:
            x = torch.cat([x, concat], 1)
        return run(x, t, vector, hint).logits
    return ask


def denoise(ready: Ready) -> diffusion.Network:
    """The network of a checkpoint. concat: a latent as it was encoded; hint: a label map (B, 1, D, H, W)."""
    ask = asked(ready.model)

    def prepared_first(x: Tensor, t: Tensor, vector: Tensor | None = None, concat: Tensor | None = None,
                       hint: Tensor | None = None) -> Tensor:
        if concat is not None:
            concat = scaled_concat(concat)
        if hint is not None:
            whole = latent_data.fold(hint[0, 0].cpu().numpy(), ready.cfg.cond.stride, x.shape[2:])
            label = unfold(torch.from_numpy(whole)[None], ready.cfg.cond.stride)
            hint = bit_planes(label, PLANES).to(x.device, x.dtype)
        return ask(x, t, vector, concat, hint)
    return prepared_first


# -------------------------------------------------------------------------------- pictures

def sample(cfg: TrainConfig, state: State, network: Callable, crop: data.Crop) -> tuple[Tensor, Tensor, bool]:
    """Of a held-out crop: what it shows, and a sample under its conditions, both (C, D, H, W); and whether
    they are decoded. Its noise is the same each time.
    """
    image, label = to_device(crop.image[None], state.device), crop.label[None]
    x, cond = prepared(cfg, state.latent, image, label)
    generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "picture", crop.entry.name))
    none = {name: torch.zeros_like(value) for name, value in cond.items()}
    found = diffusion.sample(cfg.diffusion, caller(state, network), noise_of(x, [generator]), cond, none)
    if cfg.cond.vae is None:
        return x[0, :1].float().cpu() / 3, found[0, :1].float().cpu() / 3, False
    ready = decoder(cfg.cond.vae, cfg.cond.autoencoder, str(state.device))
    size = [n * s for n, s in zip(x.shape[2:], cfg.cond.stride)]
    both = [restored(state.latent, each)[0].float().cpu().numpy() for each in (x, found)]
    real, made = (torch.from_numpy(autoencoder.decode(ready, each, size)) for each in both)
    return real, made, True


@functools.lru_cache(maxsize=1)
def decoder(path: str, digest: str | None, device: str) -> Ready:
    """The autoencoder, with exact tiles. ValueError where it is not the one that encoded the latents."""
    ready = load(path, {"vae": autoencoder}, ("decode",), device)
    check_decoder(ready, digest)
    for_volumes(ready.model)
    return ready


def check_decoder(ready: Ready, digest: str | None) -> None:
    if ready.fingerprint != digest:
        raise ValueError(f"{ready.path}: another autoencoder ({ready.fingerprint}) than the one whose "
                         f"latents were trained on ({digest}); name that one")


def picture(cfg: TrainConfig, crop: data.Crop, out: tuple[Tensor, Tensor, bool]) -> Picture:
    """Slices of the crop and of a sample under its conditions."""
    real, made, is_decoded = out
    spacing, affine = crop.entry.spacing, crop.affine
    if is_decoded:
        spacing = tuple(mm / s for mm, s in zip(spacing, cfg.cond.stride))
        affine = affine @ np.linalg.inv(latent_data.coarser(cfg.cond.stride))
    columns = [pictures.slices([each[0]], F.relu(each[0] + 1), spacing, pictures.grey)
               for each in (real, made)]
    return Picture(pictures.sheet(columns), made.numpy(), "sample", affine=affine)
