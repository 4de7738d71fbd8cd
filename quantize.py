"""Vector and finite scalar quantisers on rows of numbers, with a thin form for volumes. Needs torch alone.

    vq = VectorQuantizer(num_codes=512, code_dim=4)
    z_q, vq_loss, index = vq(rows)               # rows (N, Z): tokens, points; add vq_loss to the loss
    vq.update()                                  # once after each optimizer.step(): moves the codebook
    vq.lookup(index)                             # the codes again, from their indices

    z_q, vq_loss, index = vq.quantize_volume(z)  # z (B, Z, d, h, w)
    vq.lookup_volume(index)                      # (B, Z, d, h, w)

Follows: VQ-VAE (arXiv:1711.00937), a codebook on the unit sphere (arXiv:2110.04627), FSQ (arXiv:2309.15505).
Deviations: dead codes start anew at latents far from every code; the search never holds the whole table of
distances.

Shapes: B batch, Z numbers of a latent, d h w latent depth height width, N latents, K codes.
A row is one latent.
Version 0.5 (2026-11).
"""
from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SEARCH_ELEMENTS = 1 << 24            # of the table latents x codes at a time: 64 MiB in float32
Generators = torch.Generator | Sequence[torch.Generator] | None


class Codes(NamedTuple):
    """Latents on the points of a codebook; the shapes are those of rows (N, Z) and of volumes."""
    z_q: Tensor                      # (N, Z) or (B, Z, d, h, w) float32; its gradient goes straight through
    vq_loss: Tensor                  # () float32, weighted, ready to be added; 0 with FSQ
    index: Tensor                    # (N,) or (B, d, h, w) int64 in [0, K)


class StraightThrough(torch.autograd.Function):
    """Value: code, to the bit, so that indices decode to the same volume.

    Gradient: that of x, unchanged (arXiv:1711.00937, Sec. 3.2).
    """
    @staticmethod
    def forward(ctx, x: Tensor, code: Tensor) -> Tensor:
        return code.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class Quantizer(nn.Module):
    """What both quantisers share: they work on rows, and this is their form for volumes."""
    gather = True                    # `update` sums over all processes; off where they share the same volumes

    def numbered(self, index: Tensor) -> Tensor:
        """Indices as numbers in [0, num_codes) that differ for all codes there are, to count them."""
        return index

    def quantize_volume(self, z: Tensor, generator: Generators = None) -> Codes:
        """z (B, Z, d, h, w) -> Codes of that layout. generator: see VectorQuantizer.forward."""
        rows = z.movedim(1, -1)      # (B, d, h, w, Z): a view
        samples = [prod(z.shape[2:])] * len(z)
        codes = self(rows, generator, samples)
        return codes._replace(z_q=codes.z_q.movedim(-1, 1))

    def lookup_volume(self, index: Tensor) -> Tensor:
        """index (B, d, h, w) -> z_q (B, Z, d, h, w)."""
        return self.lookup(index).movedim(-1, 1)


class VectorQuantizer(Quantizer):
    """Nearest-code quantiser with straight-through gradient (VQ-VAE, arXiv:1711.00937, Eqs. 1-3).

    rows (N, Z) -> Codes. With e the code of a latent z, and sg the stop-gradient,
    vq_loss = lambda_vq |sg[z] - e|^2 + lambda_commitment |z - sg[e]|^2, means over elements;
    the first term only where the codebook learns by gradient.
    Float32 or wider inside, also under autocast: bf16 loses half of the codes.

    In training mode a forward pass only collects what chose each code. `update`, to be called once an
    optimizer step, moves the codebook (App. A.1) and starts dead codes anew. So k micro-batches equal one
    batch, and a step that is repeated counts once.

    update: ema (codes follow the mean of the latents that chose them) | gradient.
    decay: of that running mean.
    cosine: latents and codes are compared on the unit sphere (arXiv:2110.04627, Sec. 3.2), as z_q is.
    restart: codes used less than this part of an equal share start anew; 0: none.
    """
    def __init__(self, num_codes: int, code_dim: int, update: str = "ema", decay: float = 0.95,
                 cosine: bool = False, restart: float = 0.25, lambda_vq: float = 1.0,
                 lambda_commitment: float = 0.25):
        super().__init__()
        self.learned = update == "gradient"
        self.decay, self.cosine, self.restart = decay, cosine, restart
        self.lambda_vq, self.lambda_commitment = lambda_vq, lambda_commitment
        codebook = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)  # (K, Z)
        codebook = self.on_sphere(codebook)
        if self.learned:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        # Running means over optimizer steps: (K,) latents that chose a code in a step, and (K, Z) their
        # sum.
        self.register_buffer("code_count", torch.ones(num_codes))
        self.register_buffer("code_sum", codebook.clone())
        # What the forward passes since the last update saw: counts (K,), sums (K, Z) and some latents.
        self.collected: list[tuple[Tensor, Tensor, Tensor]] = []

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    def on_sphere(self, rows: Tensor) -> Tensor:
        """Rows of Z numbers as unit vectors where the codebook is one of unit vectors, else as they are."""
        return F.normalize(rows, dim=-1) if self.cosine else rows

    def forward(self, rows: Tensor, generator: Generators = None,
                samples: Sequence[int] | None = None) -> Codes:
        """rows (N, Z), or (..., Z) with any axes before the last; index has the same axes without the last.

        samples: how many rows, in order, belong to each sample of the batch (None: all to one).
        generator: says in training mode which latents may replace dead codes: one for the batch or one per
        sample, on the CPU, so that every device draws the same; None: torch's global one.
        Raises ValueError where the rows are not of the codebook's width.
        """
        if rows.shape[-1] != self.codebook.shape[1]:
            raise ValueError(f"VectorQuantizer: codes of {self.codebook.shape[1]} numbers, got z with "
                             f"{rows.shape[-1]} channels; make vae.z_channels that of the codebook")
        with torch.autocast(rows.device.type, enabled=False):
            dtype = torch.promote_types(rows.dtype, torch.float32)
            x = self.on_sphere(rows.to(dtype))                   # (..., Z)
            e = self.on_sphere(self.codebook.to(dtype))          # (K, Z)
            with torch.no_grad():
                latents = x.flatten(0, -2)                       # (N, Z)
                index, count, total = nearest(latents, e, statistics=self.training)
                index = index.view(x.shape[:-1])
                if self.training:
                    self.collected.append((count, total, self.candidates(latents, generator, samples)))
            code = F.embedding(index, e)                         # (..., Z)
            loss = self.lambda_commitment * F.mse_loss(x, code.detach())
            if self.learned:
                loss = loss + self.lambda_vq * F.mse_loss(code, x.detach())
            z_q = StraightThrough.apply(x, code.detach())
        return Codes(z_q, loss, index)

    def candidates(self, latents: Tensor, generator: Generators, samples: Sequence[int] | None) -> Tensor:
        """Up to K latents of each sample, drawn with the sample's own generator: (N, Z) -> (R, Z)."""
        parts = latents.split(list(samples or [len(latents)]))
        generators = generator
        if generator is None or isinstance(generator, torch.Generator):
            generators = [generator] * len(parts)
        found = []
        for part, source in zip(parts, generators):
            amount = min(self.num_codes, len(part))
            drawn = torch.randint(len(part), (amount,), generator=source)
            found.append(part[drawn.to(part.device, non_blocking=True)])
        return torch.cat(found)

    @torch.no_grad()
    def update(self, generator: torch.Generator | None = None) -> None:
        """Move the codebook by what was collected since the last call, and start dead codes anew.

        What was collected is summed over all processes, unless `gather` is off: processes that share the
        tiles of the same volumes have each collected everything.

        A code is dead where its average count is below `restart` of the mean one. It moves to a latent
        drawn in proportion to its squared distance from its code (the seeding of k-means++, Arthur and
        Vassilvitskii 2007), with twice the count of death. `generator` must be the same in all processes.
        """
        # First what was collected, here and elsewhere; a process without samples takes part too.
        nothing = torch.zeros_like(self.code_count), torch.zeros_like(self.code_sum), self.code_sum[:0]
        counts, sums, latents = zip(*self.collected or [nothing])
        self.collected = []
        count, total, latents = sum(counts), sum(sums), torch.cat(latents)
        if self.gather:
            count, total, latents = gathered(count, total, latents)
        if not len(latents):
            return

        # Then the running means, and each code to the mean of its latents: e = code_sum / code_count.
        # Laplace smoothing of the counts, n -> (n + eps) / (whole + K eps) whole, keeps the division from
        # 0.
        self.code_count.lerp_(count.to(self.code_count.dtype), 1 - self.decay)
        if not self.learned:
            self.code_sum.lerp_(total.to(self.code_sum.dtype), 1 - self.decay)
            whole, eps = self.code_count.sum(), 1e-5
            smoothed = (self.code_count + eps) / (whole + len(count) * eps) * whole
            self.codebook.copy_(self.on_sphere(self.code_sum / smoothed[:, None]))

        # Last the dead codes, which move to latents that no code is near. Whether there are any is asked on a
        # CPU alone: elsewhere the answer would wait for the device, and the search that it saves looks at K
        # latents of a sample at most, where the forward pass has looked at all.
        mean = self.code_count.mean()
        dead = self.code_count < self.restart * mean
        if not self.restart or dead.device.type == "cpu" and not dead.any():
            return
        codes = self.on_sphere(self.codebook)
        fresh = far_rows(latents.to(self.codebook.dtype), codes, len(count), generator)
        self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
        self.code_count.copy_(torch.where(dead, 2 * self.restart * mean, self.code_count))
        self.code_sum.copy_(torch.where(dead[:, None], fresh * self.code_count[:, None], self.code_sum))

    @torch.no_grad()
    def fit(self, rows: Tensor, how: str = "kmeans", generator: torch.Generator | None = None,
            iterations: int = 10, per_step: int | None = None) -> None:
        """Start the codebook from latents (N, Z): samples of them, or the means that Lloyd's k-means finds
        from there.

        per_step: latents that an optimizer step will see (None: N), so that the averages begin where they
        will be.
        """
        rows = self.on_sphere(rows.to(self.codebook))
        order = torch.randperm(len(rows), generator=generator)
        first = order[torch.arange(self.num_codes) % len(rows)]  # again from the start where N < K
        codes = rows[first.to(rows.device)]
        if how == "kmeans":
            for _ in range(iterations):
                codes = self.lloyd(rows, codes, generator)
        _, count, _ = nearest(rows, codes, statistics=True)
        self.codebook.copy_(codes)
        self.code_count.copy_(count * ((per_step or len(rows)) / len(rows)))
        self.code_sum.copy_(codes * self.code_count[:, None])

    def lloyd(self, rows: Tensor, codes: Tensor, generator: torch.Generator | None) -> Tensor:
        """One iteration of k-means: each code to the mean of its rows; one without rows to a row that no
        code is near.
        """
        _, count, total = nearest(rows, codes, statistics=True)
        means = self.on_sphere(total / count.clamp_min(1)[:, None])
        if (count == 0).any():
            means = torch.where(count[:, None] > 0, means, far_rows(rows, codes, len(codes), generator))
        return means

    def lookup(self, index: Tensor) -> Tensor:
        """index (...) -> z_q (..., Z)."""
        return F.embedding(index, self.on_sphere(self.codebook))


class ResidualQuantizer(Quantizer):
    """Several codebooks in turn: each codes what the ones before it have left over (residual VQ,
    arXiv:2107.03312, Sec. III-C).

    rows (N, Z) -> Codes; index has an axis more, (N, Q) for Q codebooks, and z_q is the sum of their codes.
    vq_loss is the mean over the codebooks. quantizers: built by the caller, all of the same width.
    """
    def __init__(self, quantizers: Sequence[VectorQuantizer]):
        super().__init__()
        self.quantizers = nn.ModuleList(quantizers)

    @property
    def num_codes(self) -> int:
        """Of all codebooks together."""
        return sum(quantizer.num_codes for quantizer in self.quantizers)

    def numbered(self, index: Tensor) -> Tensor:
        """(..., Q): those of codebook q count from q K on."""
        each = self.quantizers[0].num_codes
        return index + each * torch.arange(len(self.quantizers), device=index.device)

    @property
    def collected(self) -> list:
        return [part for quantizer in self.quantizers for part in quantizer.collected]

    @collected.setter
    def collected(self, value: list) -> None:
        """What a step that failed had begun is dropped: only [] makes sense."""
        for quantizer in self.quantizers:
            quantizer.collected = list(value)

    def forward(self, rows: Tensor, generator: Generators = None,
                samples: Sequence[int] | None = None) -> Codes:
        """rows (N, Z); the rest as VectorQuantizer takes it."""
        rest, total, loss, index = rows, 0, 0, []
        for quantizer in self.quantizers:
            codes = quantizer(rest, generator, samples)
            # z_q has the value of the code, and the code no gradient: the rest keeps that of the rows.
            code = codes.z_q.detach()
            rest, total = rest - code, total + code
            loss = loss + codes.vq_loss / len(self.quantizers)
            index.append(codes.index)
        return Codes(StraightThrough.apply(rows.to(total.dtype), total), loss, torch.stack(index, -1))

    def update(self, generator: torch.Generator | None = None) -> None:
        """VectorQuantizer.update, of each codebook."""
        for quantizer in self.quantizers:
            quantizer.gather = self.gather
            quantizer.update(generator)

    @torch.no_grad()
    def fit(self, rows: Tensor, how: str = "kmeans", generator: torch.Generator | None = None,
            iterations: int = 10, per_step: int | None = None) -> None:
        """VectorQuantizer.fit, of each codebook from what the ones before it leave of rows (N, Z)."""
        for quantizer in self.quantizers:
            quantizer.fit(rows, how, generator, iterations, per_step)
            codes = quantizer.on_sphere(quantizer.codebook)
            index, _, _ = nearest(quantizer.on_sphere(rows.to(codes)), codes)
            rows = rows - codes[index]

    def lookup(self, index: Tensor) -> Tensor:
        """index (..., Q) -> z_q (..., Z)."""
        total = 0
        for quantizer, one in zip(self.quantizers, index.unbind(-1)):
            total = total + quantizer.lookup(one)
        return total


class FiniteScalarQuantizer(Quantizer):
    """Each latent channel bounded by tanh and rounded to one of `levels` values (FSQ, arXiv:2309.15505,
    Sec. 3.1, App. A.1).

    rows (N, Z) -> Codes, z_q in [-1, 1]. No codebook is learned, so none can collapse; vq_loss is 0.
    Float32 or wider inside.
    """
    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels = tuple(levels)
        self.num_codes = prod(levels)
        # An index is the sum of digit * base over the channels.
        self.bases = [prod(self.levels[:i]) for i in range(len(self.levels))]
        # The same on the device, so that no forward pass waits for a copy. They belong to no state dict.
        self.register_buffer("level_counts", torch.tensor(self.levels), persistent=False)
        self.register_buffer("digit_bases", torch.tensor(self.bases), persistent=False)

    def forward(self, rows: Tensor, generator: Generators = None,
                samples: Sequence[int] | None = None) -> Codes:
        """rows (N, Z), or (..., Z); `generator` and `samples` as VectorQuantizer takes them: nothing is
        drawn here.
        """
        if rows.shape[-1] != len(self.levels):
            raise ValueError(f"FiniteScalarQuantizer: {len(self.levels)} levels, got z with "
                             f"{rows.shape[-1]} channels; make vae.z_channels the number of vae.fsq_levels")
        with torch.autocast(rows.device.type, enabled=False):
            x = rows.to(torch.promote_types(rows.dtype, torch.float32))
            levels = self.level_counts.to(x.device, x.dtype)
            # bounded = tanh(x + atanh(offset / half)) half - offset; even numbers of levels lie half a
            # level aside.
            half = (levels - 1) * (1 + 1e-3) / 2
            offset = (1 - levels % 2) / 2
            bounded = (x + (offset / half).atanh()).tanh() * half - offset
            rounded = bounded.detach().round()
            # Levels count from -width; a digit from 0. A NaN has some index, and stays in z_q.
            width = levels.div(2, rounding_mode="floor")
            digits = (rounded + width).nan_to_num(0).long()
            index = (digits * self.digit_bases.to(x.device)).sum(-1)
            z_q = StraightThrough.apply(bounded / width, rounded / width)
        return Codes(z_q, z_q.new_zeros(()), index)

    def update(self, generator: torch.Generator | None = None) -> None:
        """Nothing to learn; the same call as VectorQuantizer's."""

    def lookup(self, index: Tensor) -> Tensor:
        """index (...) -> z_q (..., Z)."""
        values = []
        for base, n in zip(self.bases, self.levels):
            digit = index // base % n
            values.append((digit - n // 2) / (n // 2))
        return torch.stack(values, 1).movedim(1, -1)             # in memory channels come second: latents do


def from_config(cfg) -> VectorQuantizer | FiniteScalarQuantizer:
    """The quantiser of a config with the fields of vae3d.VAEConfig: bottleneck (vq or fsq) and the rest."""
    if cfg.bottleneck == "fsq":
        return FiniteScalarQuantizer(cfg.fsq_levels)
    return VectorQuantizer(
        cfg.num_codes, cfg.z_channels, cfg.codebook_update, cfg.codebook_decay, cfg.codebook_cosine,
        cfg.codebook_restart, cfg.lambda_vq, cfg.lambda_commitment)


def nearest(rows: Tensor, codes: Tensor,
            statistics: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Index (N,) of the nearest of codes (K, Z) for each of rows (N, Z).

    statistics: also the count (K,) and the sum (K, Z) of the rows of each code; None, None otherwise.

    |x - e|^2 = |x|^2 - 2 x e + |e|^2, without |x|^2, which is the same along a row. The table of N x K
    distances exists only SEARCH_ELEMENTS at a time: 408,576 x 8,192 would take 12.5 GiB. The sums are
    products with one-hot rows: unlike scatter_add on CUDA they come out the same each time.
    """
    square = codes.square().sum(1)
    found, count, total = [], None, None
    if statistics:
        count = rows.new_zeros(len(codes))
        total = torch.zeros_like(codes)
    for part in rows.split(max(1, SEARCH_ELEMENTS // len(codes))):
        table = torch.addmm(square, part, codes.T, alpha=-2)
        index = table.argmin(1)
        found.append(index)
        if statistics:
            one_hot = table.zero_().scatter_(1, index[:, None], 1)  # in the table's memory
            count += one_hot.sum(0)
            total.addmm_(one_hot.T, part)
            del one_hot
        del table                                # before the next one is made
    return torch.cat(found), count, total


def far_rows(rows: Tensor, codes: Tensor, amount: int, generator: torch.Generator | None) -> Tensor:
    """`amount` of rows (N, Z), drawn with probabilities in proportion to the squared distance from the
    nearest code.
    """
    index, _, _ = nearest(rows, codes)
    error = (rows - codes[index]).square().sum(1)
    # MPS has no float64. Other devices are not waited for: rows, numbers and sums stay there.
    error = (error.cpu() if error.device.type == "mps" else error).to(torch.float64)
    weight = error + 1e-12 + 1e-3 * error.mean()
    # Shares of 2^52, in whole numbers: CUDA's running sum of floats differs from run to run.
    edges = (weight / weight.sum() * 2.0 ** 52).long().cumsum(0)
    draw = (torch.rand(amount, generator=generator, dtype=torch.float64) * 2.0 ** 52).long()
    draw = draw.to(edges.device, non_blocking=True)
    drawn = torch.searchsorted(edges, draw, right=True).clamp_max(len(rows) - 1)
    return rows[drawn.to(rows.device)]


def gathered(count: Tensor, total: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all processes, and their latents in the order of the ranks; unchanged where there is one
    process.
    """
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count, total, latents
    dist.all_reduce(count)
    dist.all_reduce(total)
    # As objects, since the lengths differ where a rank's share is smaller.
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, latents.cpu())
    return count, total, torch.cat(every).to(latents.device)
