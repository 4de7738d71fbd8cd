"""Task `sparse`: an autoencoder of points near a surface, or of a sparse voxel grid (sparse.py).

loss = recon + occupancy_weight BCE(children) + the codebook's terms, or kl_weight KL. `recon` is the mean
over the points of a crop, the cross-entropy that over the eight children of each parent and three levels.
Every L1 stands beside two others: that of the crop's median, which knows nothing, and that of the principal
components of the training tokens, which nobody trained.

Crops come as grids (B, C, D, H, W), 0 where there is no point (volumes/surfaces.py), and go to the device as
points. What training/task.py asks of a task stands here; a name that is not here is filled in there.

Shapes: N points, T tokens, C channels, Z numbers of a latent, K codes, Q codebooks.
Version 0.1 (2026-11).
"""
from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

import data
import losses
import peaks
import sparse
import sparse_tables
from sparse import SparseConfig, SparseVAE
from training import ranks, views
from training.cases import Case
from training.config import TrainConfig, changed
from training.forward import forward
from training.latents import LatentKind
from training.log import codebook_use
from training.order import MicroBatch, seed_of
from training.ready import Ready
from training.run import Run, recovered, stop_if_signalled
from training.state import State
from training.task import Objective, Picture, Scored, of_codebook_stage
from volumes.boxes import BOX
from volumes.config import DataConfig

PRESETS = sparse.PRESETS
METRICS = {"iou": True, "l1": False, "sign": True, "surface_dice": True, "loss": False}
OPTIMIZER = "muon"                   # after 300 steps on CT: L1 .163, AdamW .198 (docs/LOG.md)
POINTS = True
# Share of the voxels that are points, where nothing else says how many (real CT: .04 to .11).
FILL = 0.06


# -------------------------------------------------------------------------------- the config

def sections(preset: SparseConfig) -> dict:
    return {"sparse": preset, "data": DataConfig(surface="auto", points=True)}


def resolve(cfg: TrainConfig, dataset: data.Data) -> TrainConfig:
    return changed(cfg, sparse={"in_channels": dataset.channels})


def channels(cfg: TrainConfig) -> int:
    return cfg.sparse.in_channels


def build(cfg: TrainConfig) -> SparseVAE:
    """Raises ValueError for a stage without a codebook. In stage 1 the codebook alone learns."""
    return of_codebook_stage(SparseVAE(cfg.sparse), cfg.train.stage, "sparse")


# -------------------------------------------------------------------------------- crops as points

class PointBatch(NamedTuple):
    """A batch of crops as points."""
    code: Tensor                     # (N,) int64, ascending
    feats: Tensor                    # (N, C) float32
    size: tuple[int, int, int]       # of the crops, voxels
    samples: int                     # B
    tables: sparse_tables.Tables | None = None  # of a prediction, which has no coordinates to make them of

    def __len__(self) -> int:
        return self.samples

    @property
    def shape(self) -> tuple[int, ...]:
        """(B, C, D, H, W) of the crops."""
        return (self.samples, self.feats.shape[1], *self.size)


def points_of(image: Tensor | PointBatch, device: torch.device) -> PointBatch:
    """Crops (B, C, D, H, W), 0 where there is no point -> their points, on the device."""
    if isinstance(image, PointBatch):
        return image
    sample, *coords = (image != 0).any(1).nonzero().unbind(1)
    d, h, w = coords
    feats = image[sample, :, d, h, w]
    size = tuple(image.shape[2:])
    code, feats = sparse.sorted_points(torch.stack(coords, 1), sample, feats, size)
    code, feats = code.to(device, non_blocking=True), feats.to(device, non_blocking=True)
    return PointBatch(code, feats, size, len(image))


def tables_of(model: SparseVAE, points: PointBatch, generators: Sequence[torch.Generator] | None = None):
    if points.tables is not None:
        return points.tables
    generator = generators[0] if generators else None
    return model.tables(points.code, points.size, points.samples, generator)


def stand_in(cfg: TrainConfig, network: SparseVAE, device: torch.device, rehearsal: bool) -> PointBatch:
    """Points of a prediction: as many as a batch may hold, on shells, with all tables.

    In a prediction tensors without data take their place. data.max_points a crop; without it those of
    data.patch at the fill that surfaces have.
    """
    size = tuple(-(-n // sparse_tables.TOKEN) * sparse_tables.TOKEN for n in cfg.data.patch or (BOX,) * 3)
    wanted = cfg.data.max_points or math.ceil(FILL * math.prod(size))
    with peaks.real_tensors():
        coords = shells(size, min(wanted, math.prod(size)))
        sample = torch.arange(cfg.train.batch).repeat_interleave(len(coords))
        code, _ = sparse.sorted_points(coords.repeat(cfg.train.batch, 1), sample, sample[:, None], size)
        tables = network.tables(code, size, cfg.train.batch)
    feats = torch.zeros(len(code), cfg.sparse.in_channels, device=device)
    made: dict[int, Tensor] = {}                                 # a tensor that stands twice stays one

    def placed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if id(x) not in made:
            made[id(x)] = torch.empty(x.shape, dtype=x.dtype, device=device)
            if type(made[id(x)]) is Tensor:                      # and none of a prediction, without data
                made[id(x)].copy_(x)
        return made[id(x)]
    tables = tree_map(placed, tables)
    return PointBatch(tables.code[0], feats, size, cfg.train.batch, tables)


def shells(size: Sequence[int], count: int) -> Tensor:
    """Coordinates (count, 3) of voxels on shells four voxels thick around the middle of a grid, which have
    about the tokens and neighbours that surfaces of organs have.
    """
    axes = [torch.arange(n) - (n - 1) / 2 for n in size]
    d, h, w = torch.meshgrid(*axes, indexing="ij")
    radius = (d.square() + h.square() + w.square()).sqrt()
    # First shells 16 voxels apart, from within; then what lies between them, where they do not suffice.
    order = ((radius % 16) // 4 * 1e4 + radius).flatten().argsort(stable=True)
    chosen = order[:count].sort().values
    return torch.stack(torch.unravel_index(chosen, tuple(size)), 1)


# -------------------------------------------------------------------------------- training and validation

def objective(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """What a training step lowers."""
    points = points_of(micro.image, state.device)
    tables = tables_of(state.model, points, generators)
    out = forward(state, network, points.feats, tables, generators)
    return Objective(out, reconstruction_terms(cfg, out, points.feats, tables))


def reconstruction_terms(
    cfg: TrainConfig, out: sparse.SparseVQOutput | sparse.SparseKLOutput, feats: Tensor,
    tables: sparse_tables.Tables
) -> dict[str, Tensor]:
    # First distances and children. Of drawn tiles the means are scaled by what they leave out: with n of N
    # rows in a 1/w-th of the tiles, w n / N x the mean over the n rows has the whole mean as expectation.
    exists = [kin.children < len(code) for kin, code in zip(tables.families, tables.code)][::-1]
    parents = [len(there) for there in exists]
    if out.rows:
        feats = feats[out.rows[0]]
        exists = [there[rows] for there, rows in zip(exists, out.rows[1:])]
    part = tables.tile_weight * len(feats) / max(tables.points, 1)
    # Points as a volume one voxel wide: (N, C) -> (1, C, N, 1, 1).
    rows = [x.T[None, :, :, None, None] for x in (out.recon, feats)]
    recon = losses.reconstruction_loss(*rows, cfg.loss.recon, cfg.loss.channel_weights) * part
    occupancy = 0
    for logits, there, count in zip(out.occupancy, exists, parents):
        bce = F.binary_cross_entropy_with_logits(logits.float(), there.float())
        occupancy = occupancy + bce * (tables.tile_weight * len(there) / max(count, 1)) / len(exists)

    # Then their sum with what the bottleneck asks for.
    terms = {"loss": recon + cfg.sparse.occupancy_weight * occupancy, cfg.loss.recon: recon,
             "occupancy": occupancy}
    if isinstance(out, sparse.SparseVQOutput):
        terms["vq"] = out.vq_loss
        terms["loss"] = terms["loss"] + out.vq_loss
    else:
        terms["kl"] = losses.kl_loss(out.mu, out.logvar)
        terms["loss"] = terms["loss"] + cfg.loss.kl_weight * terms["kl"]
    return terms


class Measured(NamedTuple):
    """What a validation has of a crop besides the network's output."""
    points: PointBatch
    out: sparse.SparseVQOutput | sparse.SparseKLOutput
    code: Tensor                     # (M,) of the points that the tokens alone give
    values: Tensor                   # (M, C) their values
    pca: Tensor                      # (N, C) what the principal components alone give


def criterion(
    cfg: TrainConfig,
    state: State,
    network: Callable,
    micro: MicroBatch,
    generators: Sequence[torch.Generator],
) -> Objective:
    """The same terms, and what the tokens alone give back."""
    points = points_of(micro.image, state.device)
    tables = tables_of(network, points)
    out = forward(state, network, points.feats, tables, generators)
    terms = reconstruction_terms(cfg, out, points.feats, tables)
    return Objective(measured(state, network, out, points, tables), terms)


def measured(state: State, network: SparseVAE, out, points: PointBatch,
             tables: sparse_tables.Tables) -> Measured:
    z = network.lookup(out.index) if network.quantizer is not None else out.mu

    def decoded(z: Tensor) -> tuple[Tensor, Tensor]:
        return network.decode(tables.code[-1], z, points.size)
    code, values = forward(state, decoded, z)
    pca = network.principal(points.feats, tables)
    return Measured(points, out, code, values, pca)


def metrics(cfg: TrainConfig, out: Measured, micro: MicroBatch, crop: data.Crop) -> dict[str, float]:
    """Of one crop; see `compared`."""
    return compared(out.points, out.code, out.values, out.out.recon, out.pca)


def compared(points: PointBatch, code: Tensor, values: Tensor, recon: Tensor,
             pca: Tensor) -> dict[str, float]:
    """points: one sample; code and values: decoded from tokens alone; recon (N, C): on the true coordinates.

    iou: of decoded and true points. l1 and sign (share of equal signs): on the true coordinates; l1_decoded:
    on those that both have. l1_constant and l1_pca: of the median and of the principal components.
    surface_dice: of the voxels at a change of sign, within one voxel, mean over the channels. L1 is in units
    of the band.
    """
    feats, recon = points.feats.float(), recon.float().clamp(-1, 1)
    if not len(feats):
        return {}
    both = torch.isin(code, points.code)
    shared = int(both.sum())
    found = {
        "iou": shared / (len(code) + len(feats) - shared),
        "l1": (recon - feats).abs().mean(),
        "sign": ((recon > 0) == (feats > 0)).float().mean(),
        "l1_constant": (feats - feats.median(0).values).abs().mean(),
        "l1_pca": (pca.float().clamp(-1, 1) - feats).abs().mean(),
    }
    if shared:
        truth = feats[torch.isin(points.code, code)]
        found["l1_decoded"] = (values.float()[both] - truth).abs().mean()
    mine, theirs = (grid_of(c, v, points.size) for c, v in ((code, values), (points.code, feats)))
    dice = [surface_dice(a, b) for a, b in zip(mine, theirs)]
    known = [value for value in dice if not math.isnan(value)]
    found["surface_dice"] = sum(known) / len(known) if known else math.nan
    return {name: float(value) for name, value in found.items()}


def grid_of(code: Tensor, values: Tensor, size: Sequence[int]) -> Tensor:
    """Points (N,), (N, C) of one sample -> (C, D, H, W) float32, 0 where there is none."""
    d, h, w = sparse_tables.coords_of(code, sparse_tables.grid_bits(size)).unbind(1)
    inside = (d < size[0]) & (h < size[1]) & (w < size[2])       # the last tokens may reach beyond the grid
    grid = values.new_zeros(values.shape[1], *size, dtype=torch.float32)
    grid[:, d[inside], h[inside], w[inside]] = values[inside].float().T
    return grid


def crossings(grid: Tensor) -> Tensor:
    """(D, H, W) distances, 0 for none -> (D, H, W) bool: inside, with a neighbour outside."""
    outside = F.pad(grid > 0, (1, 1, 1, 1, 1, 1))
    return (grid < 0) & neighbour(outside)


def neighbour(padded: Tensor) -> Tensor:
    """(D+2, H+2, W+2) bool -> (D, H, W): whether one of the six neighbours is set."""
    middle = slice(1, -1)
    found = torch.zeros_like(padded[middle, middle, middle])
    for shift in (slice(0, -2), slice(2, None)):
        found |= padded[shift, middle, middle] | padded[middle, shift, middle] | padded[middle, middle, shift]
    return found


def surface_dice(a: Tensor, b: Tensor) -> float:
    """Two grids of distances (D, H, W) -> the share of both surfaces that lies within a voxel of the other
    (arXiv:1809.04430, Eq. 5, tolerance one voxel, by counting voxels). nan where neither has one.
    """
    a, b = crossings(a), crossings(b)
    near_a, near_b = (x | neighbour(F.pad(x, (1, 1, 1, 1, 1, 1))) for x in (a, b))
    total = a.sum() + b.sum()
    if not total:
        return math.nan
    return float(((a & near_b).sum() + (b & near_a).sum()) / total)


def output(cfg: TrainConfig, state: State, network: SparseVAE, image: Tensor) -> Measured:
    points = points_of(image, state.device)
    tables = tables_of(network, points)
    out = forward(state, network, points.feats, tables, [torch.Generator().manual_seed(0)] * points.samples)
    return measured(state, network, out, points, tables)


def picture(cfg: TrainConfig, crop: data.Crop, out: Measured) -> Picture:
    """The points of a crop and those that its tokens give, with the figures of this crop."""
    size, intensity = tuple(crop.image.shape[1:]), crop.entry.intensity
    grid = grid_of(out.code.cpu(), out.values.cpu(), size)
    shown = views.of_reconstruction(crop.image, grid, crop.entry.spacing, intensity)
    scores = compared(out.points, out.code, out.values, out.out.recon, out.pca)
    figures = f"IoU {scores['iou']:.3f}, L1 {scores['l1']:.3f} of the band, signs {scores['sign']:.1%}"
    return Picture(shown.sheet(), grid.numpy(), "recon", note=shown.note() | {"figures": figures})


# -------------------------------------------------------------------------------- start of a run

@torch.no_grad()
def start(run: Run) -> None:
    """The linear path from the principal components of training tokens, then the first codes from latents."""
    vae, cfg = run.state.model, run.cfg
    crops = []
    for index in range(min(len(run.crops), cfg.train.latent_crops)):
        stop_if_signalled(run)
        crops.append(points_of(run.crops[index][0][None], run.device))
    if cfg.train.init is None:
        rows = [sparse.patches(points.feats, tables_of(vae, points)) for points in crops]
        vae.start_linear(torch.cat(rows))

    # Every rank computes all latents, so that all have the same codes.
    if cfg.sparse.bottleneck == "vq" and cfg.sparse.codebook_init != "uniform":
        rows = []
        for points in crops:
            def latent(points=points):
                return ranks.agreed(forward(run.state, vae.latent, points.feats, tables_of(vae, points)))
            rows.append(recovered(run, points.shape, latent))
        per_step = sum(map(len, rows)) // len(rows) * run.state.global_batch
        generator = torch.Generator().manual_seed(seed_of(cfg.train.seed, "codebook"))
        vae.quantizer.fit(torch.cat(rows), cfg.sparse.codebook_init, generator, per_step=per_step)
    for ema in run.state.emas:
        ema.load_state_dict(vae.state_dict())


# -------------------------------------------------------------------------------- use of a checkpoint

def describe(cfg: TrainConfig) -> str:
    return f"sparse autoencoder ({cfg.sparse.bottleneck})"


def encode(ready: Ready, array: np.ndarray, generator: torch.Generator | None = None,
           tick: Callable | None = None) -> np.ndarray:
    """(C, D, H, W), 0 for no point -> tokens on their own grid.

    With a codebook (Q, d, h, w) int64: 1 + the index of each codebook, 0 where there is no token. KL:
    (Z + 1, d, h, w) float32: the mean, and last 1 where there is a token.
    """
    if generator is not None:
        raise ValueError("--sample: the tokens of a sparse autoencoder are its means or codes; leave the "
                         "flag out")
    vae, size = ready.model, array.shape[1:]
    points = points_of(torch.from_numpy(array)[None], ready.device)
    with precision_of(ready):
        code, latent = vae.tokenize(points.feats, tables_of(vae, points))
    d, h, w = sparse_tables.coords_of(code, token_bits(size)).unbind(1)
    if vae.quantizer is not None:
        rows = 1 + latent.view(len(latent), -1)
    else:
        rows = F.pad(latent.float(), (0, 1), value=1.0)
    grid = rows.new_zeros(rows.shape[1], *token_size(size))
    grid[:, d, h, w] = rows.T
    return grid.cpu().numpy()


def decode(ready: Ready, latent: np.ndarray, size: Sequence[int], tick: Callable | None = None) -> np.ndarray:
    """What `encode` gave -> (C, D, H, W) float32, 0 where there is no point. Raises ValueError where the
    result is not finite.
    """
    code, z = tokens_in(ready, latent, size)
    with precision_of(ready):
        points, values = ready.model.decode(code, z, size)
    found = grid_of(points, values, size)
    if not bool(found.isfinite().all()):
        remedy = "" if ready.amp_dtype is None else "; leave --amp out"
        raise ValueError(f"the reconstruction is not finite{remedy}")
    return found.cpu().numpy()


def tokens_in(ready: Ready, latent: np.ndarray, size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What `encode` gave -> codes of the tokens (T,), ascending, and their latents (T, Z).

    Of residual codebooks the first ones alone may be given: a coarser latent of fewer bits.
    """
    cfg = ready.cfg.sparse
    grid = torch.from_numpy(latent).to(ready.device)
    is_token = grid[-1] > 0
    coords = is_token.nonzero()
    rows = grid[:, is_token].T
    code, order = sparse_tables.encode_coords(coords, 0, token_bits(size)).sort()
    rows = rows[order]
    if ready.model.quantizer is not None:
        rows = rows - 1
        is_residual = cfg.bottleneck == "vq" and cfg.codebooks > 1
        if not is_residual:
            rows = rows.squeeze(1)
    else:
        rows = rows[:, :-1]
    with precision_of(ready):
        return code, ready.model.lookup(rows)


@contextlib.contextmanager
def precision_of(ready: Ready) -> Iterator[None]:
    """No gradients, and the checkpoint's precision."""
    autocast = torch.autocast(ready.device.type, ready.amp_dtype, enabled=ready.amp_dtype is not None)
    with torch.no_grad(), autocast:
        yield


def token_bits(size: Sequence[int]) -> int:
    return sparse_tables.grid_bits(size) - sparse_tables.LEVELS


def token_size(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-n // sparse_tables.TOKEN) for n in size)


def reconstruct(ready: Ready, array: np.ndarray, tick: Callable | None = None) -> np.ndarray:
    """(C, D, H, W) -> the same shape; the very bits of `decode` after `encode`."""
    return decode(ready, encode(ready, array, tick=tick), array.shape[1:], tick)


def latent_kind(ready: Ready) -> LatentKind:
    cfg = ready.cfg.sparse
    if ready.model.quantizer is not None:
        rows = cfg.codebooks if cfg.bottleneck == "vq" else 1
        codes = 1 + codes_of(ready.model)
        return LatentKind(f"sparse {cfg.bottleneck}", codes, lambda size: (rows, *token_size(size)))
    return LatentKind("sparse kl", None, lambda size: (cfg.z_channels + 1, *token_size(size)))


def codes_of(vae: SparseVAE) -> int:
    """K, of each codebook."""
    return vae.quantizer.num_codes // (vae.cfg.codebooks if vae.cfg.bottleneck == "vq" else 1)


def evaluate(ready: Ready, case: Case, number: int, options: argparse.Namespace,
             tick: Callable | None) -> Scored:
    """Of one whole volume: the figures of `compared`, bits a voxel, and which codes it uses."""
    volume, _ = case.volumes[number]
    size = volume.shape[1:]
    started = time.monotonic()
    latent = encode(ready, volume, tick=tick)
    found = decode(ready, latent, size, tick)
    seconds = time.monotonic() - started

    # On the true coordinates too: the same tokens, whose children are known.
    vae, points = ready.model, points_of(torch.from_numpy(volume)[None], ready.device)
    tables = tables_of(vae, points)
    _, z = tokens_in(ready, latent, size)
    with precision_of(ready):
        recon, _, _ = vae.rebuild(z, tables)
        pca = vae.principal(points.feats, tables)
    decoded = points_of(torch.from_numpy(found)[None], ready.device)
    scores = compared(points, decoded.code, decoded.feats, recon, pca)

    usage = {}
    if vae.quantizer is not None:
        chosen = torch.from_numpy(latent[:, latent[-1] > 0]).T - 1
        numbered = vae.quantizer.numbered(chosen).flatten()
        usage = {"usage": torch.bincount(numbered, minlength=vae.quantizer.num_codes)}
    scores["bits_per_voxel"] = bits_of(ready, latent) / math.prod(size)
    scores["points"], scores["tokens"] = tables.points, tables.tokens
    return Scored(scores, found, seconds, usage)


def bits_of(ready: Ready, latent: np.ndarray) -> float:
    """What `encode` gave -> bits: of the codes (or 32 a number), and of which cells hold a token, which is
    log2 of (cells choose tokens).
    """
    tokens, cells = int((latent[-1] > 0).sum()), latent[-1].size
    where = math.lgamma(cells + 1) - math.lgamma(tokens + 1) - math.lgamma(cells - tokens + 1)
    each = 32 * ready.cfg.sparse.z_channels
    if ready.model.quantizer is not None:
        each = len(latent) * math.log2(codes_of(ready.model))
    return where / math.log(2) + tokens * each


def pooled(sums: dict[str, Tensor]) -> dict[str, float]:
    """Which codes are used by all volumes together."""
    return codebook_use(sums["usage"]) if "usage" in sums else {}
