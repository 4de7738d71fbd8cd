"""3D convolutional variational autoencoder for volumes (CT, MR and other voxel grids). Needs torch alone.

    vae = VAE3D.from_preset("ultra_lightweight", in_channels=1)
    recon, mu, logvar = vae(x)                   # x (B, 1, D, H, W) in [-1, 1], any size
    vae.memory("tile", (64, 64, 64))             # none | checkpoint | tile, all with the same result
    vae = VAE3D.from_preset("ultra_lightweight", bottleneck="vq", num_codes=512)
    recon, vq_loss, index = vae(x)               # add vq_loss to the loss
    vae.quantizer.update()                       # once after each optimizer.step()
    vae.decode_indices(index, x.shape[2:])

This file alone gives the KL autoencoder. Beside it quantize.py gives codebooks (bottleneck vq, fsq),
tile_plans.py, tiles.py, local_layers.py, lean_norm.py (GroupNorm on CUDA) mode tile; lean_conv.py keeps less.
Follows: VAE (arXiv:1312.6114), residual autoencoder of latent diffusion (arXiv:2112.10752, App. E.3) in 3D.
Deviations: presets without normalisation (docs/LOG.md), a stride per level and axis, nearest upsampling.
Shapes: B batch, C channels, D H W depth height width, Z latent channels, d h w latent size, K codes.
Version 0.5 (2026-11).
"""
from __future__ import annotations

import dataclasses
import functools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import gcd, inf, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MEMORY_MODES = ("none", "checkpoint", "tile")
UPSAMPLES, MIDDLES = ("nearest", "trilinear", "transposed", "transposed3"), ("none", "blocks", "attention")
LOGVAR_RANGE = (-30.0, 20.0)                     # exp() of it stays finite in float32 and float16
Stride = tuple[int, int, int]                    # voxels along D, H, W
Generators = torch.Generator | Sequence[torch.Generator] | Tensor | None


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Everything that fixes the network; two equal configs have equal parameter names and shapes."""
    in_channels: int = 1                         # C of input and reconstruction; train.py: from the data
    base_channels: int = 16                      # width of level l is base_channels * channel_mult[l]
    channel_mult: tuple[int, ...] = (1, 2, 2)    # one entry a level, highest resolution first
    num_res_blocks: int = 1                      # per encoder level (decoder: one more); 0 saves memory
    strides: tuple[Stride, ...] = ((1, 2, 2), (2, 2, 2))   # between levels; thick slices keep depth at first
    unshuffle: Stride = (1, 1, 1)                # voxels that become channels in front, and back behind
    z_channels: int = 4                          # Z, as in latent diffusion's f8d4 and MAISI
    norm: str = "none"                           # none | group | layer (over channels, per voxel)
    norm_groups: int = 32                        # group: at most so many; the largest that divides the width
    attention: bool = False                      # at the lowest level: after its blocks, in both middles
    head_channels: int = 64                      # of an attention head; gcd with the width, if it must be
    bottleneck: str = "kl"                       # kl (Gaussian) | vq (codebook) | fsq (grid of fsq_levels)
    num_codes: int = 512                         # vq: K; a code has z_channels numbers
    codebook_update: str = "ema"                 # vq: ema (of the latents that chose a code) | gradient
    codebook_decay: float = 0.95                 # vq: of the averages (docs/LOG.md; the paper: 0.99)
    codebook_init: str = "kmeans"                # vq: kmeans | samples (both of first latents) | uniform
    codebook_cosine: bool = False                # vq: codes on the unit sphere (arXiv:2110.04627)
    codebook_restart: float = 0.25               # vq: codes used less than this of an equal share start anew
    lambda_vq: float = 1.0                       # vq: weight of |sg[z] - e|^2, for codebook_update gradient
    lambda_commitment: float = 0.25              # vq: weight of |z - sg[e]|^2, the paper's beta
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)   # fsq: values of each latent channel; 1,000 codes
    # What networks made elsewhere do otherwise (weights.py converts them); the defaults are ours.
    norm_eps: float = 1e-6                       # of every norm, as in latent diffusion; PyTorch: 1e-5
    blocks_per_level: tuple[int, ...] = ()       # encoder blocks of each level; (): num_res_blocks each
    decoder_extra_blocks: int = 1                # blocks a level that the decoder has more; MONAI: 0
    attention_levels: tuple[bool, ...] = ()      # levels with attention after each block (MONAI)
    encoder_middle: str = "blocks"               # none | blocks (vae.attention: that too) | attention
    decoder_middle: str = "blocks"               # the same
    down_padding: str = "both"                   # of down-convolutions: both ends | end
    upsample: str = "nearest"                    # nearest | trilinear | transposed | transposed3 (Upsample3d)
    up_narrows: bool = False                     # up-convolutions change the width, not the block behind
    up_strides: tuple[Stride, ...] = ()          # of the decoder, highest resolution first; (): as strides
    head_act: bool = True                        # SiLU before the last convolution of each side
    quant_conv: str = "none"                     # 1x1x1 behind the encoder: none | split (Z) | joint (2Z)
    post_quant_conv: bool = False                # 1x1x1 convolution before the decoder
    intensity_range: tuple[float, float] = (-1.0, 1.0)     # what -1 and 1 are inside; MONAI: 0,1

    def __post_init__(self):
        for name, value in list(vars(self).items()):             # lists, as YAML has them, become tuples
            if isinstance(value, (list, tuple)):
                value = tuple(tuple(v) if isinstance(v, list) else v for v in value)
                object.__setattr__(self, name, value)
        check_config(self)

    @property
    def widths(self) -> tuple[int, ...]:         # channels of each level, highest resolution first
        return tuple(self.base_channels * m for m in self.channel_mult)

    @property
    def blocks(self) -> tuple[int, ...]:         # residual blocks of each encoder level
        return self.blocks_per_level or (self.num_res_blocks,) * len(self.channel_mult)

    @property
    def normed(self) -> tuple[str, int, float]:  # the norm of every layer, as make_norm takes it
        return self.norm, self.norm_groups, self.norm_eps

    @property
    def intensity_map(self) -> tuple[float, float]:              # scale and shift from [-1, 1]
        return tuple((self.intensity_range[1] + sign * self.intensity_range[0]) / 2 for sign in (-1, 1))

    @property
    def total_stride(self) -> Stride:            # voxels per latent element
        return tuple(prod(s[axis] for s in (self.unshuffle, *self.strides)) for axis in range(3))


LEAST = {"in_channels": 1, "base_channels": 1, "num_res_blocks": 0, "z_channels": 1, "norm_groups": 1,
         "head_channels": 1, "num_codes": 2, "codebook_restart": 0, "lambda_vq": 0, "lambda_commitment": 0,
         "decoder_extra_blocks": 0}
CHOICES = {"norm": ("none", "group", "layer"), "bottleneck": ("kl", "vq", "fsq"), "encoder_middle": MIDDLES,
           "codebook_update": ("ema", "gradient"), "codebook_init": ("kmeans", "samples", "uniform"),
           "decoder_middle": MIDDLES, "down_padding": ("both", "end"), "upsample": UPSAMPLES,
           "quant_conv": ("none", "split", "joint")}


def check_config(cfg: VAEConfig) -> None:
    """Raises ValueError, which says what is wrong, for a config that no network can have."""
    def require(fine: bool, text: str) -> None:
        if not fine:
            raise ValueError(text)
    values, levels, mult = vars(cfg), len(cfg.channel_mult), cfg.channel_mult
    for name, least in LEAST.items():
        require(values[name] >= least, f"vae.{name} must be at least {least}, got {values[name]}")
    for name, allowed in CHOICES.items():
        listed = ", ".join(allowed)
        require(values[name] in allowed, f"vae.{name} must be one of {listed}, got {values[name]!r}")
    require(0 <= cfg.codebook_decay < 1, f"vae.codebook_decay is a decay in [0, 1), got {cfg.codebook_decay}")
    grid = len(cfg.fsq_levels) == cfg.z_channels and min(cfg.fsq_levels) >= 2
    require(grid or cfg.bottleneck != "fsq",
            f"vae.fsq_levels needs one number of 2 or more for each of vae.z_channels={cfg.z_channels}, "
            f"got {cfg.fsq_levels}")
    require(levels > 0 and min(mult) >= 1, f"vae.channel_mult needs one positive entry a level, got {mult}")
    require(len(cfg.strides) == levels - 1,
            f"vae.strides needs one D,H,W triple between levels: {levels - 1} for channel_mult={mult}, "
            f"got {len(cfg.strides)}: {cfg.strides}")
    for name in ("strides", "up_strides", "unshuffle"):
        triples = (cfg.unshuffle,) if name == "unshuffle" else values[name]
        require(all(len(s) == 3 and min(s) >= 1 for s in triples),
                f"vae.{name}: each is three positive integers (D, H, W), got {values[name]}")
    down, up = ([prod(axis) for axis in zip(*strides)] for strides in (cfg.strides, cfg.up_strides))
    require(not cfg.up_strides or len(cfg.up_strides) == levels - 1 and up == down, f"vae.up_strides must "
            f"undo vae.strides={cfg.strides}: as many, the same product an axis; got {cfg.up_strides}")
    for name in ("blocks_per_level", "attention_levels"):
        require(len(values[name]) in (0, levels),
                f"vae.{name} needs one entry for each of {levels} levels, got {values[name]}")
    ends = cfg.intensity_range
    require(len(ends) == 2 and -inf < ends[0] < ends[1] < inf,
            f"vae.intensity_range needs two numbers, the lower first, such as 0,1; got {ends}")
    require(cfg.norm_eps > 0, f"vae.norm_eps must be above 0, got {cfg.norm_eps}")
    require(min(cfg.blocks_per_level, default=0) >= 0, f"vae.blocks_per_level needs 0 or more, got "
                                                       f"{cfg.blocks_per_level}")
    for here, above, blocks in zip(mult, mult[1:], cfg.blocks):
        require(cfg.up_narrows or above == here or blocks + cfg.decoder_extra_blocks > 0,
                "vae.decoder_extra_blocks=0 leaves a level of the decoder without a block to change the "
                "width; make it 1, or vae.num_res_blocks at least 1, or set vae.up_narrows")


PRESETS = {
    "ultra_lightweight": VAEConfig(),
    "lightweight": VAEConfig(base_channels=24, channel_mult=(1, 2, 3)),
    "base": VAEConfig(base_channels=32, channel_mult=(1, 2, 4)),
    "standard": VAEConfig(base_channels=64, channel_mult=(1, 2, 4), num_res_blocks=2, attention=True),
    "high_res": VAEConfig(channel_mult=(1, 2, 4), strides=((2, 2, 2), (2, 2, 2))),
    # With a pixel front end: 0.62 M parameters; sharp 2.40 M; thick, for slices far apart, 0.61 M.
    "fast": VAEConfig(base_channels=32, channel_mult=(1, 2), strides=((2, 2, 2),), unshuffle=(2, 2, 2),
                      decoder_extra_blocks=0, encoder_middle="none", decoder_middle="none", up_narrows=True),
}
PRESETS["sharp"] = dataclasses.replace(PRESETS["fast"], base_channels=64)
PRESETS["thick"] = dataclasses.replace(PRESETS["fast"], unshuffle=(1, 2, 2))


class Posterior(NamedTuple):                     # diagonal Gaussian over the latent
    mu: Tensor                                   # (B, Z, d, h, w) float32
    logvar: Tensor                               # (B, Z, d, h, w) float32, within LOGVAR_RANGE


class VAEOutput(NamedTuple):
    recon: Tensor                                # (B, C, D, H, W), the input's size
    mu: Tensor                                   # (B, Z, d, h, w) float32
    logvar: Tensor                               # (B, Z, d, h, w) float32


class VQOutput(NamedTuple):
    recon: Tensor                                # (B, C, D, H, W), the input's size
    vq_loss: Tensor                              # () float32, weighted, ready to be added
    index: Tensor                                # (B, d, h, w) int64 in [0, K)


# ------------------------------------------------------------------------------------------------ Autoencoder
class VAE3D(nn.Module):
    """x (B, C, D, H, W) in [-1, 1] -> VAEOutput, or VQOutput where the config asks for codes.

    Any D, H, W >= 1: the border is repeated up to the stride's multiple, and the reconstruction cropped back.
    Raises ValueError when x is not 5D or its channels are not cfg.in_channels.
    """
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = build_encoder(cfg)
        self.decoder = build_decoder(cfg)
        self.quantizer: nn.Module | None = None if cfg.bottleneck == "kl" else build_quantizer(cfg)
        self.progress: Callable[[float, int, str], None] | None = None   # told layers done, all, side
        initialise(self)
        self.memory("none")

    @classmethod
    def from_preset(cls, name: str, **changes) -> VAE3D:
        """Build PRESETS[name] with some fields changed: VAE3D.from_preset("base", in_channels=4)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(dataclasses.replace(PRESETS[name], **changes))

    def forward(self, x: Tensor, generator: Generators = None) -> VAEOutput | VQOutput:
        """Reconstruct x: through a sampled latent in training mode, its mean in eval mode, or its codes.

        generator: source of the latent noise (kl) or of replacements for dead codes (vq), one for the batch
        or one per sample (on the CPU: every device draws the same), or the noise (kl); None: torch's global.
        """
        if self.quantizer is not None:
            z_q, *rest = self.encode(x, generator)
            return VQOutput(self.decode(z_q, x.shape[2:]), *rest)
        mu, logvar = self.encode(x)
        z = sample_posterior(mu, logvar, generator) if self.training else mu
        return VAEOutput(self.decode(z, x.shape[2:]), mu, logvar)

    def encode(self, x: Tensor, generator: Generators = None) -> NamedTuple:
        """x (B, C, D, H, W) -> Posterior of the latent, or its Codes (quantize.py), float32 or wider."""
        z = self.latent(x)
        if self.quantizer is not None:
            return self.quantizer.quantize_volume(z, generator)
        mu, logvar = z.chunk(2, dim=1)
        return Posterior(mu, logvar.clamp(*LOGVAR_RANGE))

    def latent(self, x: Tensor) -> Tensor:
        """The encoder's output, float32 or wider: (B, 2Z, d, h, w), or (B, Z, d, h, w) to be quantised."""
        if x.dim() != 5 or x.shape[1] != self.cfg.in_channels:
            raise ValueError(f"VAE3D: built for (B, {self.cfg.in_channels}, D, H, W), got {tuple(x.shape)}; "
                             f"make vae.in_channels the number of channels of the data")
        x = pad_to_multiple(x, self.cfg.total_stride)
        if self.cfg.intensity_map != (1, 0):     # not in the weights: zero padding is 0 of the inner range
            scale, shift = self.cfg.intensity_map
            x = x.mul(scale).add_(shift)
        z = self._run(self.encoder, x, x.shape[2:])
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """z (B, Z, d, h, w) -> (B, C, D, H, W), cropped to `size`, the (D, H, W) that was encoded."""
        recon = self._run(self.decoder, z, [n * s for n, s in zip(z.shape[2:], self.cfg.total_stride)])
        if self.cfg.intensity_map != (1, 0):
            scale, shift = self.cfg.intensity_map
            recon = recon.sub_(shift).div_(scale)                # in place: no convolution keeps its output
        return recon if size is None else recon[..., :size[0], :size[1], :size[2]]

    def decode_indices(self, index: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Codes (B, d, h, w) as `encode` gave them -> (B, C, D, H, W). ValueError without a codebook."""
        if self.quantizer is None:
            raise ValueError("decode_indices: vae.bottleneck is kl, without codes; use decode, or vq or fsq")
        return self.decode(self.quantizer.lookup_volume(index), size)

    def latent_size(self, size: Sequence[int]) -> tuple[int, int, int]:  # (D, H, W) of an input -> (d, h, w)
        return tuple(-(-n // s) for n, s in zip(size, self.cfg.total_stride))

    def memory(self, mode: str, tile: Sequence[int] | str | None = None, stretch: str = "auto",
               budget: float | None = None, group: torch.distributed.ProcessGroup | None = None,
               rehearsal: bool = False) -> VAE3D:
        """Set the memory dial and return self; at any time. Peak memory and time change, never the result.

        none: what precedes a convolution is computed again in backward, the rest is kept. checkpoint: of each
        layer the input alone is kept (arXiv:1604.06174). tile: stretches of layers run tile by tile, exactly,
        and keep their input alone; others are checkpointed. The rest is for tile: see tile_plans.TileMode.
        Raises ValueError for what these cannot be, ImportError where the files of mode tile are missing.
        """
        if mode not in MEMORY_MODES:
            raise ValueError(f"memory mode must be one of {', '.join(MEMORY_MODES)}, got {mode!r}")
        settings = tile, stretch, budget, group, rehearsal
        self.memory_mode, self.tile_mode = mode, make_tile_mode(self, *settings) if mode == "tile" else None
        if self.quantizer is not None:           # ranks that share tiles have collected the same latents
            self.quantizer.gather = self.group is None
        return self

    @property
    def group(self) -> torch.distributed.ProcessGroup | None:    # ranks that share the tiles
        return self.tile_mode.group if self.tile_mode else None

    @property
    def last_weight(self) -> nn.Parameter:       # loss.adaptive_weight compares the terms' gradients here
        return self.decoder.head.conv.weight

    def tiling(self) -> object:                  # the TileMode (tile_plans.py): what it would do for a size
        return self.tile_mode or make_tile_mode(self)

    def _run(self, layers: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
        """x through `layers` as the dial says; size: (D, H, W) of the volume that x is or stands for."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(next(layers.parameters()).dtype)            # 16-bit weights take float32 volumes too
        if self.tile_mode is None:
            return functools.reduce(lambda x, layer: self._run_layer(layer, x), layers, x)
        side, name = (1, "decoder") if layers is self.decoder else (0, "encoder")

        def tell(done: float) -> None:
            self.progress(done, len(layers), name)
        return self.tile_mode.run(side, x, size, self._run_layer, tell if self.progress else None)

    def _run_layer(self, layer: nn.Module, x: Tensor) -> Tensor:
        """One layer that is not tiled: as it is, or checkpointed where it would keep more than its input."""
        if self.memory_mode == "none" or isinstance(layer, KEEP_THEIR_INPUT) or not torch.is_grad_enabled():
            return layer(x)
        # What comes last in a block, torch's checkpoint does not compute again; Lean would.
        last = (plain,) if isinstance(layer, ResBlock3d) else ()
        return checkpoint(layer, x, *last, use_reentrant=False, preserve_rng_state=False)


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Repeat the far border of (B, C, D, H, W) until D, H, W are multiples of `multiple`."""
    d, h, w = ((-n) % m for n, m in zip(x.shape[2:], multiple))
    return F.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x


def sample_posterior(mu: Tensor, logvar: Tensor, generator: Generators = None) -> Tensor:
    """z = mu + exp(logvar / 2) * noise (arXiv:1312.6114, Eq. 10), in mu's dtype; each (B, Z, d, h, w)."""
    if (noise := generator) is None or isinstance(generator, torch.Generator):
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
    elif not isinstance(generator, Tensor):
        noise = torch.stack([torch.randn(mu.shape[1:], generator=g, dtype=mu.dtype) for g in generator])
    with torch.autocast(mu.device.type, enabled=False):          # float32 island: exp overflows in float16
        return mu + (0.5 * logvar).exp() * noise.to(mu.device, non_blocking=True)


# ------------------------------------------------------------ Doors: files that are opened when a config asks
def build_quantizer(cfg: VAEConfig) -> nn.Module:
    """The codebook of quantize.py. Raises ImportError where the file is not there."""
    try:
        import quantize
    except ModuleNotFoundError:
        raise ImportError("vae.bottleneck vq and fsq need quantize.py; copy it beside vae3d.py") from None
    return quantize.from_config(cfg)


def make_tile_mode(vae: VAE3D, *settings) -> object:
    """The TileMode of tile_plans.py, told of our layers. ImportError where a file of it is not there."""
    try:
        import local_layers
        import tile_plans
    except ModuleNotFoundError as missing:
        raise ImportError(f"memory mode tile needs {missing.name}.py; copy tile_plans.py, tiles.py, "
                          f"local_layers.py and lean_norm.py beside vae3d.py") from None
    local_layers.LOCAL.setdefault(ChannelNorm, local_layers.Local())
    local_layers.LOCAL.setdefault(Shuffle3d, local_layers.Local(
        rate=lambda op, axis: (op.block[axis], 1) if op.back else (1, op.block[axis]),
        channels=lambda op, width: width // prod(op.block) if op.back else width * prod(op.block)))
    local_layers.LOCAL.setdefault(ResBlock3d, local_layers.Local(parts=lambda block: [
        local_layers.Fork(), block.norm1, block.act, block.conv1, block.norm2, block.act, block.conv2,
        local_layers.Join(block.skip)]))
    sides = (tile_plans.Side(vae.encoder, vae.cfg.in_channels, (1, 1, 1)),
             tile_plans.Side(vae.decoder, vae.cfg.z_channels, vae.cfg.total_stride))
    parameters = sum(p.numel() for p in vae.parameters())
    return tile_plans.TileMode(tile_plans.Network(sides, parameters), *settings)


# ---------------------------------------------------------------------------------------- Encoder and decoder
def build_encoder(cfg: VAEConfig) -> nn.Sequential:
    """Layers in their order: (B, C, D, H, W) -> (B, 2Z, d, h, w), mean and log-variance; Z for codes."""
    widths = cfg.widths
    out = 2 * cfg.z_channels if cfg.bottleneck == "kl" else cfg.z_channels
    layers = OrderedDict()
    if prod(cfg.unshuffle) > 1:
        layers["unshuffle"] = Shuffle3d(cfg.unshuffle)
    layers["conv_in"] = nn.Conv3d(cfg.in_channels * prod(cfg.unshuffle), widths[0], 3, padding=1)
    for level, width in enumerate(widths):
        add_level(layers, cfg, level, widths[max(level - 1, 0)], cfg.blocks[level])
        if level < len(cfg.strides):
            # Before a level without blocks, which would change the width, the down-convolution does.
            after = width if cfg.blocks[level + 1] else widths[level + 1]
            layers[f"level{level}_down"] = make_down(width, after, cfg.strides[level], cfg.down_padding)
    add_middle(layers, cfg, cfg.encoder_middle)
    head_out = cfg.z_channels if cfg.quant_conv == "split" else out
    layers["head"] = Head(widths[-1], head_out, *cfg.normed, cfg.head_act)
    if cfg.quant_conv != "none":
        layers["quant_conv"] = nn.Conv3d(head_out, out, 1)
    return nn.Sequential(layers)


def build_decoder(cfg: VAEConfig) -> nn.Sequential:
    """Layers in their order: (B, Z, d, h, w) -> (B, C, D, H, W)."""
    widths, strides, layers = cfg.widths, cfg.up_strides or cfg.strides, OrderedDict()
    if cfg.post_quant_conv:
        layers["post_quant_conv"] = nn.Conv3d(cfg.z_channels, cfg.z_channels, 1)
    layers["conv_in"] = nn.Conv3d(cfg.z_channels, widths[-1], 3, padding=1)
    add_middle(layers, cfg, cfg.decoder_middle)
    before = widths[-1]
    for level in reversed(range(len(widths))):
        add_level(layers, cfg, level, before, cfg.blocks[level] + cfg.decoder_extra_blocks)
        if level > 0:
            before = widths[level - 1] if cfg.up_narrows else widths[level]
            layers[f"level{level}_up"] = Upsample3d(widths[level], before, strides[level - 1], cfg.upsample)
    layers["head"] = Head(widths[0], cfg.in_channels * prod(cfg.unshuffle), *cfg.normed, cfg.head_act)
    if prod(cfg.unshuffle) > 1:
        layers["shuffle"] = Shuffle3d(cfg.unshuffle, back=True)
    return nn.Sequential(layers)


def add_level(layers: OrderedDict, cfg: VAEConfig, level: int, before: int, blocks: int) -> None:
    """The residual blocks of a level, the first from width `before`, and its attention."""
    width = cfg.widths[level]
    for block in range(blocks):
        layers[f"level{level}_block{block}"] = ResBlock3d(before if block == 0 else width, width, *cfg.normed)
        if cfg.attention_levels and cfg.attention_levels[level]:
            layers[f"level{level}_attention{block}"] = Attention3d(width, *cfg.normed, cfg.head_channels)
    if cfg.attention and level == len(cfg.widths) - 1:
        layers[f"level{level}_attention"] = Attention3d(width, *cfg.normed, cfg.head_channels)


def add_middle(layers: OrderedDict, cfg: VAEConfig, middle: str) -> None:
    """Two residual blocks at the lowest level, with attention between them, as the config asks."""
    if middle != "none":
        width = cfg.widths[-1]
        layers["mid_block0"] = ResBlock3d(width, width, *cfg.normed)
        if cfg.attention or middle == "attention":
            layers["mid_attention"] = Attention3d(width, *cfg.normed, cfg.head_channels)
        layers["mid_block1"] = ResBlock3d(width, width, *cfg.normed)


@torch.no_grad()
def initialise(vae: VAE3D) -> None:
    """Start with a path on which the volume's signal reaches the reconstruction with its variance kept.

    PyTorch's default divides its scale by sqrt(3) at each convolution, and SiLU by 2 before each head: mu is
    3 % of the volume's scale, under noise of scale 1. Here the straight path keeps the scale, noise starts at
    exp(-3), and residual branches keep the default, which makes them small (docs/LOG.md: +3.7 dB).
    """
    gain = 3 ** 0.5
    for layer in (*vae.encoder, *vae.decoder):
        conv = getattr(layer, "conv", None)      # of the layers between levels, and of the heads
        if isinstance(layer, nn.Conv3d):
            layer.weight.mul_(gain)
        elif isinstance(conv, nn.ConvTranspose3d):
            conv.weight.mul_((3 * prod(conv.stride)) ** 0.5)     # an output has 1 / stride of the taps
        elif conv is not None:                   # a head's undoes the SiLU before it, too
            conv.weight.mul_(2 * gain if isinstance(layer, Head) and vae.cfg.head_act else gain)
        elif isinstance(layer, ResBlock3d) and isinstance(layer.skip, nn.Conv3d):
            layer.skip.weight.mul_(gain)
    # Voxels of a block start equal, so that none stand out as dots (ICNR, arXiv:1707.02937).
    head, block = vae.decoder.head.conv, prod(vae.cfg.unshuffle)
    for p in (head.weight, head.bias):
        p.copy_(p[::block].repeat_interleave(block, 0))
    last, z = getattr(vae.encoder, "quant_conv", vae.encoder.head.conv), vae.cfg.z_channels
    last.weight[z:].mul_(0.03)                   # logvar (kl): nearly constant at first
    last.bias[z:].fill_(-6.0)


# ----------------------------------------------------------------------------------------------------- Blocks
try:
    from lean_norm import group_norm
except ModuleNotFoundError:
    group_norm = F.group_norm
try:
    from lean_conv import lean, plain
except ModuleNotFoundError:
    def plain(conv: nn.Module, x: Tensor, *before: nn.Module) -> Tensor:
        """conv(before(x)), with before(x) in x.dtype also under autocast."""
        with torch.autocast(x.device.type, enabled=False):
            x = nn.Sequential(*before)(x)
        return conv(x)

    lean = plain


class ResBlock3d(nn.Module):
    """Pre-activation residual block (arXiv:1603.05027): x + twice (norm, SiLU, 3x3x3 convolution).

    x (B, C_in, D, H, W) -> (B, C_out, D, H, W). The skip is a 1x1x1 convolution where the width changes.
    """
    def __init__(self, in_channels: int, out_channels: int, norm: str = "none", norm_groups: int = 32,
                 norm_eps: float = 1e-6):
        super().__init__()
        self.act = nn.SiLU()
        self.norm1 = make_norm(norm, in_channels, norm_groups, norm_eps)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels, norm_groups, norm_eps)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, last: Callable[..., Tensor] | None = None) -> Tensor:
        h = lean(self.conv1, x, self.norm1, self.act)            # `last` runs the second one instead
        return self.skip(x) + (last or lean)(self.conv2, h, self.norm2, self.act)


class Upsample3d(nn.Sequential):
    """Interpolation by an integer factor per axis, then a 3x3x3 convolution: D, H, W -> D*s0, H*s1, W*s2.

    mode: nearest | trilinear | one transposed convolution: transposed (kernel: stride) | transposed3.
    """
    def __init__(self, in_channels: int, out_channels: int, stride: Stride, mode: str = "nearest"):
        if mode == "transposed":
            layers = OrderedDict(conv=nn.ConvTranspose3d(in_channels, out_channels, stride, stride))
        elif mode == "transposed3":
            ends = tuple(s - 1 for s in stride)
            layers = OrderedDict(conv=nn.ConvTranspose3d(in_channels, out_channels, 3, stride, 1, ends))
        else:
            layers = OrderedDict(up=nn.Upsample(scale_factor=tuple(stride), mode=mode),
                                 conv=nn.Conv3d(in_channels, out_channels, 3, padding=1))
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        return lean(self.conv, x, *list(self)[:-1])


def make_down(in_channels: int, out_channels: int, stride: Stride, padding: str = "both") -> nn.Module:
    """The strided 3x3x3 convolution between levels. padding `end`: at stride 2 one zero, at the far end."""
    if padding == "both":
        return nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
    ends = []
    for zeros in (max(3 - s, 0) for s in reversed(stride)):      # nn.ConstantPad3d counts from the last axis
        ends += [zeros // 2, zeros - zeros // 2]
    conv = nn.Conv3d(in_channels, out_channels, 3, stride)
    return nn.Sequential(OrderedDict(pad=nn.ConstantPad3d(ends, 0.0), conv=conv))


class Shuffle3d(nn.Module):
    """Blocks of s voxels become channels and back: (B, C, D, H, W) <-> (B, C s0 s1 s2, D/s0, H/s1, W/s2)."""
    def __init__(self, block: Stride, back: bool = False):
        super().__init__()
        self.block, self.back = block, back

    def forward(self, x: Tensor) -> Tensor:
        if self.back:
            x = x.unflatten(1, (-1, *self.block)).permute(0, 1, 5, 2, 6, 3, 7, 4)
            return x.flatten(6).flatten(4, 5).flatten(2, 3)
        for axis in (4, 3, 2):
            x = x.unflatten(axis, (-1, self.block[axis - 2]))    # at last (B, C, d, s0, h, s1, w, s2)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).permute(0, 4, 1, 2, 3)   # in channels_last


class Attention3d(nn.Module):
    """Self-attention over all voxels of a level: x (B, C, D, H, W) -> the same shape, residual.

    scaled_dot_product_attention never holds the N x N matrix (74 GiB against 5.7 at 64,256,256 elsewhere).
    With norm `none` the queries are normalised all the same: their scale decides how sharp the softmax is.
    """
    def __init__(self, channels: int, norm: str = "none", norm_groups: int = 32, norm_eps: float = 1e-6,
                 head_channels: int = 64):
        super().__init__()
        self.heads = channels // gcd(channels, head_channels)
        self.norm = make_norm("layer" if norm == "none" else norm, channels, norm_groups, norm_eps)
        self.qkv = nn.Conv3d(channels, 3 * channels, 1)
        self.proj = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                # each (B, heads, D*H*W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


class Head(nn.Sequential):
    """Norm, SiLU (unless `act` is off) and the 3x3x3 convolution that ends encoder and decoder."""
    def __init__(self, in_channels: int, out_channels: int, norm: str, norm_groups: int,
                 norm_eps: float = 1e-6, act: bool = True):
        super().__init__(OrderedDict(
            norm=make_norm(norm, in_channels, norm_groups, norm_eps), act=nn.SiLU() if act else nn.Identity(),
            conv=nn.Conv3d(in_channels, out_channels, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return lean(self.conv, x, self.norm, self.act)


KEEP_THEIR_INPUT = (nn.Conv3d, Shuffle3d) + (() if lean is plain else (Upsample3d, Head))


class GroupNorm(nn.GroupNorm):
    """GroupNorm (arXiv:1803.08494) that keeps x.dtype also under autocast; statistics are float32 or wider.

    CUDA's autocast would widen x to float32 and keep both copies: +26 % of a step's peak at (16,32,64).
    """
    def forward(self, x: Tensor) -> Tensor:
        # 16 bits on a CPU: in channels_last this backward takes ten times as long as both copies.
        copied = x.device.type == "cpu" and x.dtype.itemsize == 2 and x.stride(1) == 1
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            y = group_norm(x.contiguous() if copied else x, self.num_groups, weight, bias, self.eps)
            return y.contiguous(memory_format=torch.channels_last_3d) if copied else y


class ChannelNorm(nn.LayerNorm):
    """LayerNorm (arXiv:1607.06450) over the channels of each voxel of x (B, C, D, H, W)."""
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.movedim(1, -1)              # (B, D, H, W, C), contiguous in channels_last_3d
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def make_norm(norm: str, channels: int, groups: int, eps: float = 1e-6) -> nn.Module:
    """The normalisation of one width; `group`: in the most groups up to `groups` that divide it."""
    if norm == "none":
        return nn.Identity()
    if norm == "layer":
        return ChannelNorm(channels, eps=eps)
    return GroupNorm(max(g for g in range(1, groups + 1) if channels % g == 0), channels, eps=eps)
