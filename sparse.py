"""Sparse VQ-VAE: an autoencoder of point sets, such as the voxels near a surface with their signed distance.

    vae = SparseVAE.from_preset("sparse_light")
    code, feats = sorted_points(coords, sample, feats, size)     # coords (N, 3) d h w, feats (N, C)
    tables = vae.tables(code, size, samples)
    out = vae(feats, tables)                                     # recon (N, C), occupancy, vq_loss, index
    code, index = vae.tokenize(feats, tables)                    # all that has to be stored
    points, recon = vae.decode(code, vae.lookup(index), size)    # needs nothing else

Encoder: points are pooled three times, eight children into one; attention among the tokens of 8^3 voxels that
are left. Decoder: attention, then each token is divided into the children that exist. Which do is learnt
(eight logits a parent, as XCube has it, arXiv:2312.03806): true ones while training, logit > 0 in `decode`.
Beside both runs a linear path, from the values of a token's voxels to its latent and back, which begins as
their principal components: without it the sign of a distance does not pass the latent.

Follows TRELLIS (arXiv:2412.01506) and Direct3D-S2 (arXiv:2505.17412) in the shape of the network. Deviations:
children are put side by side instead of averaged, and divided instead of copied; absent ones are pruned; no
normalisation over points, so that tiles are exact.

Needs torch, and beside it sparse_conv.py, sparse_attention.py, sparse_tables.py; quantize.py for a codebook.
Shapes: N points, T tokens, C channels of a point, Z numbers of a latent, K codes, Q codebooks.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparse_tables
from sparse_attention import MODES, Block, sine_positions
from sparse_conv import SubMConv3d, take
from sparse_tables import LEVELS, TOKEN, VOLUME, Tables, grown, halo_of, restricted, sorted_points, tables_of

__all__ = ["SparseConfig", "SparseVAE", "sorted_points"]
MEMORY = ("none", "checkpoint", "tile")
START = 0.1                          # of the deep path's last layers, so that the linear path leads at first
ENCODER_CONVOLUTIONS = (0, 2, 2, 2)  # one after another at each level, points first
DECODER_CONVOLUTIONS = (1, 1, 1, 0)
ENCODER_TABLES = tuple(level for level, count in enumerate(ENCODER_CONVOLUTIONS) if count)
DECODER_TABLES = tuple(level for level, count in enumerate(DECODER_CONVOLUTIONS) if count)


@dataclass(frozen=True)
class SparseConfig:
    in_channels: int = 1             # C, numbers of a point
    model_channels: int = 128        # of a token; points have 1/16 of it
    z_channels: int = 16             # Z
    num_blocks: int = 4              # transformer blocks of the encoder, and of the decoder
    num_heads: int | None = None     # None: as many as head_channels gives
    head_channels: int = 32          # of a head, where num_heads is not given
    mlp_ratio: float = 4.0           # hidden / model channels in a block
    attention: str = "swin"          # full | swin | shift_window | shift_sequence | shift_order
    window: int = 8                  # swin: tokens on an edge of a cube; shift_*: tokens in a window
    positions: str = "ape"           # ape (sines added to the input) | rope (queries and keys are turned)
    qk_norm: bool = False            # queries and keys of root mean square 1
    norm: str = "layer"              # before each convolution: layer (per point) | none
    input_band: float = 1.0          # the encoder is shown values up to this magnitude; the decoder owes all
    bottleneck: str = "vq"           # vq | fsq | kl
    num_codes: int = 512             # K
    codebooks: int = 4               # Q, residual ones; 1: a plain codebook
    codebook_update: str = "ema"     # ema | gradient, as in quantize.VectorQuantizer; so are the next ones
    codebook_decay: float = 0.95     # ema: of the codes' running means
    codebook_cosine: bool = False    # compare latents and codes on the unit sphere
    codebook_restart: float = 0.25   # codes used less than this part of an equal share start anew
    codebook_init: str = "kmeans"    # kmeans | samples | uniform, from the first latents
    lambda_vq: float = 1.0           # gradient: weight of the codes' distance from their latents
    lambda_commitment: float = 0.25  # of the latents' distance from their codes
    fsq_levels: tuple[int, ...] = ()  # of each latent channel, for bottleneck fsq
    occupancy_weight: float = 1.0    # of the cross-entropy of existing children, mean over the levels

    def __post_init__(self):
        if self.fsq_levels and self.bottleneck == "fsq":
            object.__setattr__(self, "z_channels", len(self.fsq_levels))
        choices = {"attention": MODES, "norm": ("layer", "none"), "positions": ("ape", "rope"),
                   "bottleneck": ("vq", "fsq", "kl")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"sparse.{name}={getattr(self, name)}; choose one of {', '.join(known)}")
        if self.model_channels % 16:
            raise ValueError(f"sparse.model_channels={self.model_channels}; take a multiple of 16")
        if self.num_heads is None and self.model_channels % self.head_channels:
            raise ValueError(f"sparse.model_channels={self.model_channels} is no multiple of "
                             f"sparse.head_channels={self.head_channels}")
        if self.num_heads is not None and self.model_channels % self.num_heads:
            raise ValueError(f"sparse.model_channels={self.model_channels} is no multiple of "
                             f"sparse.num_heads={self.num_heads}")
        if self.bottleneck == "fsq" and not self.fsq_levels:
            raise ValueError("sparse.bottleneck fsq needs sparse.fsq_levels, such as 8,5,5,5")

    @property
    def heads(self) -> int:
        return self.num_heads or self.model_channels // self.head_channels


PRESETS = {
    # The size of the guide's network, 63 M parameters.
    "sparse_512": SparseConfig(model_channels=512, num_blocks=8, head_channels=64, num_codes=8192),
    "sparse_light": SparseConfig(),
}


class SparseVQOutput(NamedTuple):
    recon: Tensor                    # (N, C); of mode "tile" with `pick`: of the drawn tiles, see `rows`
    occupancy: tuple[Tensor, ...]    # logits (N_l, 8) of levels 3, 2, 1: which children exist
    rows: tuple[Tensor, ...]         # rows of the above: of points, then of levels 3, 2, 1; (): all
    vq_loss: Tensor                  # ()
    index: Tensor                    # (T, Q) int64, or (T,) of one codebook


class SparseKLOutput(NamedTuple):
    recon: Tensor
    occupancy: tuple[Tensor, ...]
    rows: tuple[Tensor, ...]
    mu: Tensor                       # (T, Z)
    logvar: Tensor                   # (T, Z) in [-30, 20]


# -------------------------------------------------------------------------------- the network

class SparseVAE(nn.Module):
    """cfg -> the autoencoder. See the module's first lines for its use.

    The dial `memory`, whose settings are `modes`: none; checkpoint computes every stage again in backward;
    tile runs encoder and decoder in exact tiles, whose results are those of the whole to rounding.
    """
    modes = MEMORY

    def __init__(self, cfg: SparseConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        # The linear path: values of a token's voxels and which of them are there -> latent -> values.
        self.lin_in = nn.Linear(VOLUME * (cfg.in_channels + 1), cfg.z_channels)
        self.lin_out = nn.Linear(cfg.z_channels, VOLUME * cfg.in_channels)
        # What `start_linear` found, which is not trained: for the figure that training has to beat.
        count = VOLUME * cfg.in_channels
        self.register_buffer("components", torch.zeros(count, cfg.z_channels))
        self.quantizer = None
        if cfg.bottleneck != "kl":
            self.quantizer = quantizer(cfg)
        self.memory("none")

    @classmethod
    def from_preset(cls, name: str, **changes) -> SparseVAE:
        if name not in PRESETS:
            raise ValueError(f"no preset {name}; there are {', '.join(PRESETS)}")
        return cls(SparseConfig(**vars(PRESETS[name]) | changes))

    def memory(self, mode: str, tile: Sequence[int] | None = None, pick: int | None = None) -> SparseVAE:
        """Set the dial. tile: voxels on an edge (the least of D, H, W counts), rounded down to a power of two
        of at least a token; None: 64. pick: only so many tiles of the decoder in a training step, drawn anew
        each time, with weights that keep the loss unbiased. The tables say it: build them after the dial.
        """
        if mode not in MEMORY:
            raise ValueError(f"memory.mode={mode}; choose one of {', '.join(MEMORY)}")
        self.mode, self.pick = mode, pick
        tokens = max(1, min(tile or (64,)) // TOKEN)
        self.tile_tokens = 1 << tokens.bit_length() - 1
        return self

    def softer(self) -> tuple[int, int, int] | None:
        """A tile of half the edge, voxels; None where it is a token already."""
        if self.tile_tokens == 1:
            return None
        return (self.tile_tokens // 2 * TOKEN,) * 3

    def tables(self, code: Tensor, size: Sequence[int], samples: int = 1,
               generator: torch.Generator | None = None) -> Tables:
        """code (N,) ascending -> all that depends on where the points are. generator: draws tiles."""
        found = tables_of(code, size, samples)
        found = sparse_tables.with_cuts(found, self.cfg.attention, self.cfg.window)
        if self.mode != "tile":
            return found
        halos = halo_of(ENCODER_CONVOLUTIONS, False), halo_of(DECODER_CONVOLUTIONS, True)
        pick = self.pick if self.training else None
        return sparse_tables.with_tiles(found, self.tile_tokens, *halos, pick, generator)

    def forward(self, feats: Tensor, tables: Tables,
                generators: Sequence[torch.Generator] | None = None) -> SparseVQOutput | SparseKLOutput:
        """feats (N, C) in the order of the tables. generators: one for each sample, on the CPU."""
        z, kept = self.bottleneck(feats, tables, generators)
        recon, occupancy, rows = self.rebuild(z, tables)
        output = SparseKLOutput if self.quantizer is None else SparseVQOutput
        return output(recon, occupancy, rows, *kept)

    def bottleneck(self, feats: Tensor, tables: Tables,
                   generators: Sequence[torch.Generator] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """feats (N, C) -> z (T, Z), and what is kept of it: (vq_loss, index) or (mu, logvar)."""
        latent = self.latent(feats, tables)
        if self.quantizer is not None:
            z, loss, index = self.quantizer(latent, generators, tables.per_sample)
            return z, (loss, index)
        mu, logvar = latent.chunk(2, 1)
        logvar = logvar.clamp(-30, 20)
        noise = torch.cat([torch.randn(count, mu.shape[1], generator=generator) for count, generator in
                           zip(tables.per_sample, generators or [None] * tables.samples)])
        return mu + (0.5 * logvar).exp() * noise.to(mu), (mu, logvar)

    def latent(self, feats: Tensor, tables: Tables) -> Tensor:
        """feats (N, C) -> (T, Z) before the quantiser, or (T, 2 Z): mu and logvar. Float32 or wider."""
        feats, seen = self.shown(feats)
        deep = self.encoder(feats, tables, self.mode)
        with torch.autocast(feats.device.type, enabled=False):
            dtype = self.lin_in.weight.dtype
            linear = self.lin_in(patches(feats.to(dtype), tables, seen))
            deep = deep.to(dtype)
            return deep + F.pad(linear, (0, deep.shape[1] - linear.shape[1]))

    def shown(self, feats: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder sees: values within the input band, 0 elsewhere, and where they are (N,) bool."""
        seen = (feats.abs() <= self.cfg.input_band).any(1)
        return feats * seen[:, None], seen

    def rebuild(self, z: Tensor, tables: Tables) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
        """z (T, Z) -> values (N, C), logits of levels 3, 2, 1, and rows as in the outputs."""
        h = self.decoder.mix(z, tables, self.mode)
        if self.mode != "tile" or not tables.decoder_tiles:
            values, logits = self.decoder.grow(h, self.linear_values(z, tables.place), tables, self.mode)
            return values, logits, ()

        # Tile by tile, each computed again in backward: what is kept is what the tokens hold.
        def one(z: Tensor, h: Tensor, tile: sparse_tables.Tile) -> tuple[Tensor, ...]:
            part, rows = restricted(tables, tile, DECODER_TABLES), tile.rows(LEVELS)
            values, logits = self.decoder.grow(h[rows], self.linear_values(z[rows], part.place), part, "none")
            levels = values, *reversed(logits)                   # of levels 0, 1, 2, 3
            return tuple(x[low:high] for x, (low, high) in zip(levels, tile.own))
        parts = [maybe_checkpoint(True, one, z, h, tile) for tile in tables.decoder_tiles]
        joined = [torch.cat(level) for level in zip(*parts)]
        rows = ()
        if tables.tile_weight > 1:
            rows = tuple(owned_rows(tables.decoder_tiles, level) for level in (0, 3, 2, 1))
        return joined[0], tuple(reversed(joined[1:])), rows

    def linear_values(self, z: Tensor, place: Tensor) -> Tensor:
        """z (T, Z), place (N,) -> what the linear path says of each point (N, C)."""
        with torch.autocast(z.device.type, enabled=False):
            every = self.lin_out(z.to(self.lin_out.weight.dtype))     # (T, 512 C)
        return Pick.apply(every.view(-1, self.cfg.in_channels), place)

    # ---------------------------------------------------------------------------- tokens

    def tokenize(self, feats: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """feats (N, C) -> codes of the tokens (T,) and their indices (T,) or (T, Q); KL: their mu (T, Z)."""
        latent = self.latent(feats, tables)
        if self.quantizer is None:
            return tables.code[-1], latent.chunk(2, 1)[0]
        return tables.code[-1], self.quantizer(latent, None, tables.per_sample).index

    def lookup(self, index: Tensor) -> Tensor:
        """What `tokenize` gives beside the codes -> z (T, Z)."""
        if self.quantizer is None:
            return index
        return self.quantizer.lookup(index).to(self.lin_out.weight.dtype)

    @torch.no_grad()
    def decode(self, code: Tensor, z: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Codes (T,) ascending and latents (T, Z) of tokens -> codes (N,) and values (N, C) in [-1, 1] of the
        points that they stand for, in a grid of `size`. Memory follows the number of points.
        """
        bits = sparse_tables.grid_bits(size)
        level_bits = bits - LEVELS
        around = sparse_tables.neighbours(code, level_bits)
        coords = sparse_tables.coords_of(code, level_bits)
        token = Tables(tuple(size), bits, 1, (code,), (), (around,), code, coords, (len(code),))
        token = sparse_tables.with_cuts(token, self.cfg.attention, self.cfg.window)
        h = self.decoder.mix(z, token, "none")
        place = torch.arange(len(code), device=code.device)
        for number, up in enumerate(self.decoder.ups):
            exists = likely(up.occupancy(h))
            kin, code, around = grown(code, exists, level_bits)
            place = place[kin.slot // 8] * 8 + kin.slot % 8
            level_bits += 1
            value = self.linear_values(z, place) if number == LEVELS - 1 else None
            h = up(h, kin, around, value)
        return code, self.decoder.values(h, value).clamp(-1, 1)

    # ---------------------------------------------------------------------------- start of the linear path

    @torch.no_grad()
    def start_linear(self, rows: Tensor) -> None:
        """Begin the linear path as principal components. rows (T, 512 C): `patches` of training tokens.

        With V the first Z eigenvectors of their second moments and s the root of the mean of the Z
        eigenvalues, lin_in = [V^T / s, 0] and lin_out = V s: latents have about unit size.
        """
        rows = rows.cpu().double()                                                # MPS has none
        values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))            # ascending
        count = min(self.cfg.z_channels, len(values))
        first = vectors[:, -count:].flip(1)                                       # (512 C, Z)
        scale = values[-count:].clamp_min(1e-12).mean().sqrt()
        for parameter in (*self.lin_in.parameters(), *self.lin_out.parameters()):
            parameter.zero_()
        self.lin_in.weight[:count, :len(first)] = (first.T / scale).to(self.lin_in.weight)
        self.lin_out.weight[:, :count] = (first * scale).to(self.lin_out.weight)
        self.components[:, :count] = first.to(self.components)

    def principal(self, feats: Tensor, tables: Tables) -> Tensor:
        """feats (N, C) -> what the principal components of `start_linear` alone give back (N, C)."""
        components = self.components.float()
        rows = patches(feats.float(), tables) @ components @ components.T
        return rows.view(-1, self.cfg.in_channels)[tables.place]


def quantizer(cfg: SparseConfig) -> nn.Module:
    """The codebook of a config. Raises ImportError where quantize.py does not lie beside this file."""
    try:
        quantize = importlib.import_module("quantize")
    except ImportError:
        raise ImportError(f"sparse.bottleneck={cfg.bottleneck}: copy quantize.py beside sparse.py") from None
    if cfg.bottleneck == "fsq" or cfg.codebooks == 1:
        return quantize.from_config(cfg)
    return quantize.ResidualQuantizer([quantize.from_config(cfg) for _ in range(cfg.codebooks)])


def patches(feats: Tensor, tables: Tables, seen: Tensor | None = None) -> Tensor:
    """feats (N, C) -> (T, 512 C): the values of each token's voxels in Z-order, 0 where there is no point.

    seen (N,) bool: (T, 512 (C + 1)), the values and after them which of the points are seen.
    """
    if seen is not None:
        values, is_there = patches(feats, tables), patches(seen[:, None].to(feats), tables)
        return torch.cat([values, is_there], 1)
    grid = feats.new_zeros(tables.tokens * VOLUME, feats.shape[1])
    grid[tables.place] = feats
    return grid.view(tables.tokens, VOLUME * feats.shape[1])


def likely(logits: Tensor) -> Tensor:
    """logits (M, 8) -> (M, 8) bool: children whose logit is above 0, and of each parent at least the most
    likely one.
    """
    best = F.one_hot(logits.argmax(1), 8).bool()
    return (logits > 0) | best


def owned_rows(tiles: Sequence[sparse_tables.Tile], level: int) -> Tensor:
    """Rows of a level for which the tiles are responsible (n,)."""
    return torch.cat([tile.rows(level)[slice(*tile.own[level])] for tile in tiles])


def maybe_checkpoint(active: bool, run: Callable, *inputs):
    if active and torch.is_grad_enabled():
        return checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    return run(*inputs)


class Pick(torch.autograd.Function):
    """x[rows], with rows that differ: the gradient is an assignment, and not a sum by atomics."""
    @staticmethod
    def forward(ctx, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.length = len(x)
        return x[rows]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        rows, = ctx.saved_tensors
        return grad.new_zeros(ctx.length, grad.shape[1]).index_copy_(0, rows, grad), None


# -------------------------------------------------------------------------------- blocks

class ResConv(nn.Module):
    """x + conv(silu(norm(x))) on points: x (N, C), table (N, 27)."""
    def __init__(self, width: int, norm: str):
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm == "layer" else nn.Identity()
        self.conv = SubMConv3d(width, width)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        # Under autocast the norm is in float32; what backward keeps of it need not be.
        return x + self.conv(self.norm(x).to(x.dtype), table, activate=True)


class Down(nn.Module):
    """Eight children side by side, and which of them exist -> their parent; then two residual convolutions.

    x (N, C) -> (M, O).
    """
    def __init__(self, width: int, out: int, norm: str):
        super().__init__()
        self.pool = nn.Linear(8 * width + 8, out)
        self.res = nn.ModuleList([ResConv(out, norm), ResConv(out, norm)])

    def forward(self, x: Tensor, kin: sparse_tables.Family, table: Tensor) -> Tensor:
        side_by_side = take(x, kin.children.flatten().long(), kin.slot).view(len(kin.parent), 8 * x.shape[1])
        exists = (kin.children < len(x)).to(x)
        h = self.pool(torch.cat([side_by_side, exists], 1))
        for res in self.res:
            h = res(h, table)
        return h


class Up(nn.Module):
    """A parent -> logits of its children, and those of them that exist; then one residual convolution.

    x (M, C) -> (N, O). value (N, V), of the last level: what the linear path says, added through a layer.
    """
    def __init__(self, width: int, out: int, norm: str, values: int = 0):
        super().__init__()
        self.occupancy = nn.Linear(width, 8)
        self.divide = nn.Linear(width, 8 * out)
        self.value = nn.Linear(values, out) if values else None
        self.res = ResConv(out, norm)

    def forward(self, x: Tensor, kin: sparse_tables.Family, table: Tensor, value: Tensor | None) -> Tensor:
        children = self.divide(x).view(8 * len(x), self.res.conv.in_channels)
        h = take(children, kin.slot, kin.children.flatten().long())
        if self.value is not None:
            h = h + self.value(value.to(h.dtype))
        return self.res(h, table)


class Encoder(nn.Module):
    """Points (N, C) -> tokens (T, Z), or (T, 2 Z) of a Gaussian: mean and logvar."""
    def __init__(self, cfg: SparseConfig):
        super().__init__()
        width = cfg.model_channels
        widths = [width // 16, width // 8, width // 4, width]
        self.stem = nn.Linear(cfg.in_channels, widths[0])
        self.downs = nn.ModuleList([Down(a, b, cfg.norm) for a, b in zip(widths, widths[1:])])
        self.transformer = blocks(cfg)
        self.positions = cfg.positions
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.out = nn.Linear(width, cfg.z_channels)
        # A layer of its own, so that a codebook can take the place of the Gaussian and the rest fits.
        self.logvar = nn.Linear(width, cfg.z_channels) if cfg.bottleneck == "kl" else None
        with torch.no_grad():
            self.out.weight *= START

    def forward(self, feats: Tensor, tables: Tables, mode: str) -> Tensor:
        if mode == "tile" and tables.encoder_tiles:
            def one(feats: Tensor, tile: sparse_tables.Tile) -> Tensor:
                part = self.pooled(feats[tile.rows(0)], restricted(tables, tile, ENCODER_TABLES), "none")
                return part[slice(*tile.own[-1])]
            h = torch.cat([maybe_checkpoint(True, one, feats, tile) for tile in tables.encoder_tiles])
        else:
            h = self.pooled(feats, tables, mode)
        h = self.norm(run_blocks(self, h, tables, mode))
        return self.out(h) if self.logvar is None else torch.cat([self.out(h), self.logvar(h)], 1)

    def pooled(self, feats: Tensor, tables: Tables, mode: str) -> Tensor:
        h = self.stem(feats)
        for down, kin, table in zip(self.downs, tables.families, tables.neighbours[1:]):
            h = maybe_checkpoint(mode == "checkpoint", down, h, kin, table)
        return h


class Decoder(nn.Module):
    """Tokens (T, Z) -> tokens (T, width) (`mix`) -> points (`grow`)."""
    def __init__(self, cfg: SparseConfig):
        super().__init__()
        width = cfg.model_channels
        widths = [width, width // 4, width // 8, width // 16]
        self.stem = nn.Linear(cfg.z_channels, width)
        self.transformer = blocks(cfg)
        self.positions = cfg.positions
        values = [0] * (LEVELS - 1) + [cfg.in_channels]
        self.ups = nn.ModuleList([Up(a, b, cfg.norm, v) for a, b, v in zip(widths, widths[1:], values)])
        self.out = nn.Linear(widths[-1], cfg.in_channels)
        with torch.no_grad():
            self.out.weight *= START
            self.out.bias.zero_()

    def mix(self, z: Tensor, tables: Tables, mode: str) -> Tensor:
        # Codes are float32 or wider, also where the weights have 16 bits.
        return run_blocks(self, self.stem(z.to(self.stem.weight.dtype)), tables, mode)

    def grow(self, h: Tensor, value: Tensor, tables: Tables,
             mode: str) -> tuple[Tensor, tuple[Tensor, ...]]:
        """h (T, width), value (N, C) of the linear path -> values (N, C), logits of levels 3, 2, 1."""
        logits = []
        for up, level in zip(self.ups, reversed(range(LEVELS))):
            logits.append(up.occupancy(h))
            given = value if level == 0 else None
            kin, table = tables.families[level], tables.neighbours[level]
            h = maybe_checkpoint(mode == "checkpoint", up, h, kin, table, given)
        return self.values(h, value), tuple(logits)

    def values(self, h: Tensor, value: Tensor) -> Tensor:
        return self.out(h).to(value.dtype) + value


def blocks(cfg: SparseConfig) -> nn.ModuleList:
    return nn.ModuleList([Block(cfg.model_channels, cfg.heads, cfg.mlp_ratio, cfg.positions, cfg.qk_norm)
                          for _ in range(cfg.num_blocks)])


def run_blocks(part: Encoder | Decoder, h: Tensor, tables: Tables, mode: str) -> Tensor:
    """h (T, width) through the transformer blocks, whose windows take turns."""
    if part.positions == "ape":
        h = h + sine_positions(tables.coords, h.shape[1]).to(h.dtype)
    for number, block in enumerate(part.transformer):
        cut = tables.cuts[number % len(tables.cuts)]
        h = maybe_checkpoint(mode != "none", block, h, cut, tables.coords)
    return h
