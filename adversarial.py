"""A PatchGAN discriminator for volumes, the losses of a GAN, and what steadies them. Needs torch alone.

    logits_fake, features = PatchDiscriminator3d(in_channels=1)(recon)
    loss = loss + 0.05 * generator_loss(logits_fake, "hinge")                  # the autoencoder's
    disc_loss = discriminator_loss(logits_real, logits_fake, "hinge")          # the discriminator's

Follows: pix2pix (arXiv:1611.07004), VQGAN (arXiv:2012.09841), R1 (arXiv:1801.04406), LeCam
(arXiv:2104.03310), spectral norm (arXiv:1802.05957). Losses are computed in float32 or wider, also under
autocast. Networks see sub-crops where memory is short (perceptual.sub_crop).

Shapes: B batch, C channels, D H W depth height width; logits (B, 1, d, h, w), one for each patch.
In formulas r and f are logits of real samples and of reconstructions, E the mean over samples and patches.
Version 0.3 (2026-11).
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ADVERSARIAL = ("hinge", "lsgan", "bce")                    # same as losses.ADVERSARIAL
DISC_NORMS = ("none", "group", "instance", "spectral")     # same as losses.DISC_NORMS
SLAB_VOXELS = 1 << 21        # elements widened to float32 at a time: 8 MiB a temporary


class PatchDiscriminator3d(nn.Module):
    """PatchGAN discriminator (pix2pix, arXiv:1611.07004, Sec. 3.2): a logit for each of overlapping patches.

    x (B, C, D, H, W) -> logits (B, 1, d, h, w), and the activations of each hidden layer, highest resolution
    first, for feature matching. `layers` downsampling convolutions with `strides` (D, H, W), one triple for
    all or one for each; then a convolution of stride 1, then the logits. Width doubles with every layer;
    LeakyReLU 0.2; zero padding of (kernel - 1) // 2, so that an even kernel loses a voxel at stride 1.
    norm, on all hidden layers but the first: none; group (up to 32 groups); instance; spectral (of every
    convolution, arXiv:1802.05957). No BatchNorm: its statistics would tie the samples of a micro-batch
    together, and differ with accumulation and with ranks.
    The layout is that of MONAI's PatchDiscriminator: 1 channel, channels=32 and layers=3 have its 2,771,873
    parameters with norm group or instance (scale and shift, convolutions without bias), and 2,771,425 with
    none or spectral (biases instead). Deviation: He initialisation, not N(0, 0.02), because without
    normalisation the signal would depend on the width.
    Raises ValueError for a wrong channel count, and for inputs below `least_size`, of which no logit would be
    left (24^3 by default).
    """
    def __init__(self, in_channels: int, channels: int = 32, layers: int = 3, strides: Sequence = (2, 2, 2),
                 norm: str = "none", kernel: int | tuple[int, int, int] = 4):
        super().__init__()
        if norm not in DISC_NORMS:
            raise ValueError(f"PatchDiscriminator3d: norm must be one of {', '.join(DISC_NORMS)}, "
                             f"got {norm!r}")
        self.in_channels, self.norm = in_channels, norm
        self.kernel = (kernel,) * 3 if isinstance(kernel, int) else tuple(kernel)
        down = layer_strides(strides, layers, "PatchDiscriminator3d: strides")
        self.strides = (*down, (1, 1, 1), (1, 1, 1))
        padding = tuple((k - 1) // 2 for k in self.kernel)
        conv = SpectralConv3d if norm == "spectral" else nn.Conv3d

        # the hidden layers: convolution, perhaps a norm, LeakyReLU
        widths = [in_channels, *(channels * 2 ** i for i in range(layers + 1))]
        self.hidden = nn.ModuleList()
        for i, (width, out, stride) in enumerate(zip(widths, widths[1:], self.strides)):
            normed = i > 0 and norm in ("group", "instance")
            block = [conv(width, out, self.kernel, stride, padding, bias=not normed)]
            if normed:
                # instance norm is a group per channel; a group of GroupNorm has 2 channels at least
                groups = max(g for g in range(1, min(32, out // 2) + 1) if out % g == 0)
                block.append(nn.GroupNorm(out if norm == "instance" else groups, out))
            self.hidden.append(nn.Sequential(*block, nn.LeakyReLU(0.2)))
        self.logits = conv(widths[-1], 1, self.kernel, 1, padding)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, a=0.2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

        # the smallest input that leaves one logit: from the last convolution back to the first
        least = [1, 1, 1]
        for stride in reversed(self.strides):
            sizes = zip(least, stride, self.kernel, padding)
            least = [max(1, (n - 1) * s + k - 2 * p) for n, s, k, p in sizes]
        self.least_size = tuple(least)                     # (D, H, W)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        if x.dim() != 5 or x.shape[1] != self.in_channels:
            raise ValueError(f"PatchDiscriminator3d: needs (B, {self.in_channels}, D, H, W), "
                             f"got {tuple(x.shape)}")
        if any(n < least for n, least in zip(x.shape[2:], self.least_size)):
            size, least = (",".join(map(str, sizes)) for sizes in (x.shape[2:], self.least_size))
            raise ValueError(f"PatchDiscriminator3d: the input is {size}, but {len(self.hidden) - 1} layers "
                             f"of strides {self.strides[:-2]} need at least {least}; use larger crops, "
                             f"fewer loss.disc_layers or loss.disc_strides of 1 on the short axis")
        features = []
        for block in self.hidden:
            x = block[0](x)
            if self.norm == "instance" and len(block) == 3 and x[0, 0].numel() == 1:
                raise ValueError("PatchDiscriminator3d: instance norm of a map of one voxel is 0 whatever "
                                 "the input; use larger crops, fewer loss.disc_layers or another "
                                 "loss.disc_norm")
            x = block[1:](x)
            features.append(x)
        return self.logits(x), features


class SpectralConv3d(nn.Conv3d):
    """Convolution by W / sigma(W), W the weight as (out, in * kernel) (arXiv:1802.05957, Eqs. 8-12).

    Deviation: the singular vectors come from the eigenvectors of the small (out, out) Gram matrix in each
    forward, not from a power iteration kept in a buffer: they are exact, and no state moves, so that
    repeated, accumulated and resumed steps are the same step.
    """
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            matrix = wide(self.weight).flatten(1)
            with torch.no_grad():
                u = torch.linalg.eigh(matrix @ matrix.T)[1][:, -1]
                v = F.normalize(u @ matrix, dim=0)
            # sigma = u' W v, with u and v held fixed in the gradient
            weight = self.weight / (u @ matrix @ v).to(self.weight.dtype)
        return self._conv_forward(x, weight, self.bias)


# same as losses.layer_strides
def layer_strides(strides: Sequence, layers: int, name: str) -> tuple[tuple[int, int, int], ...]:
    """One (D, H, W) triple for each of `layers`, from one for all or one for each; ValueError for others."""
    given = (strides,) if all(isinstance(s, int) for s in strides) else strides
    given = tuple(tuple(s) for s in given)
    if any(len(s) != 3 or min(s) < 1 for s in given) or len(given) not in (1, layers):
        raise ValueError(f"{name} needs one D,H,W triple of 1 or more, or one for each of the {layers} "
                         f"layers, got {strides}")
    return given * layers if len(given) == 1 else given


# -------------------------------------------------------------------------------------------------- losses


def generator_loss(logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the autoencoder minimises: logits (B, 1, d, h, w) of reconstructions -> () float32 or wider.

    hinge -E[f] (arXiv:1705.02894); lsgan 1/2 E[(f - 1)^2] (arXiv:1611.04076, Eq. 9); bce -E[log sigmoid(f)],
    the non-saturating loss (arXiv:1406.2661). Raises ValueError for another kind.
    """
    check_adversarial(kind)
    fake = wide(logits_fake)
    with torch.autocast(fake.device.type, enabled=False):
        if kind == "hinge":
            return -fake.mean()
        if kind == "lsgan":
            return (fake - 1).square().mean() / 2
        return F.softplus(-fake).mean()


def discriminator_loss(logits_real: Tensor, logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """What the discriminator minimises: logits (B, 1, d, h, w) -> () float32 or wider, half from each side.

    hinge 1/2 E[max(0, 1 - r)] + 1/2 E[max(0, 1 + f)]; lsgan 1/2 E[(r - 1)^2] + 1/2 E[f^2]
    (arXiv:1611.04076, Eq. 9); bce -1/2 E[log sigmoid(r)] - 1/2 E[log(1 - sigmoid(f))]. The halves of hinge
    and bce are VQGAN's. Raises ValueError for another kind.
    """
    check_adversarial(kind)
    real, fake = wide(logits_real), wide(logits_fake)
    with torch.autocast(real.device.type, enabled=False):
        if kind == "hinge":
            return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2
        if kind == "lsgan":
            return ((real - 1).square().mean() + fake.square().mean()) / 2
        return (F.softplus(-real).mean() + F.softplus(fake).mean()) / 2


def check_adversarial(kind: str) -> None:
    if kind not in ADVERSARIAL:
        raise ValueError(f"adversarial loss must be one of {', '.join(ADVERSARIAL)}, got {kind!r}")


def feature_matching_loss(features_real: Sequence[Tensor], features_fake: Sequence[Tensor]) -> Tensor:
    """Mean over layers of the mean |difference| (pix2pixHD, arXiv:1711.11585, Eq. 4: the sum over layers).

    Lists of (B, C_i, d, h, w) -> () float32 or wider. The gradient reaches features_fake only.
    Raises ValueError when they do not match.
    """
    if len(features_real) != len(features_fake) or not features_real:
        raise ValueError(f"feature_matching_loss: needs as many real as fake features, "
                         f"got {len(features_real)} and {len(features_fake)}")
    total = 0
    for real, fake in zip(features_real, features_fake):
        check_pair("feature_matching_loss", fake, real)
        total = total + _AbsoluteDifference.apply(fake, real.detach())
    return total / len(features_real)


class _AbsoluteDifference(torch.autograd.Function):
    """Mean |fake - real|: what losses.reconstruction_loss("l1") gives without weights, to the bit.

    Keeps the two, which live anyway, and nothing else; plain autograd keeps the difference in float32 too.
    """
    @staticmethod
    def forward(ctx, fake, real):
        ctx.save_for_backward(fake, real)
        total = fake.new_zeros((), dtype=torch.promote_types(fake.dtype, torch.float32))
        for part in slabs(fake):
            total += (wide(fake[part]) - wide(real[part])).abs().sum()
        return total / fake.numel()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        fake, real = ctx.saved_tensors
        grad = torch.empty_like(fake)
        for part in slabs(fake):
            grad[part] = (wide(fake[part]) - wide(real[part])).sign() * (grad_loss / fake.numel())
        return grad, None


# ------------------------------------------------------------------------------------------ regularisation


def r1_penalty(logits_real: Tensor, real: Tensor) -> Tensor:
    """1/2 E[|dD/dx|^2] at real samples (arXiv:1801.04406, Eq. 9, without gamma).

    logits_real (B, 1, d, h, w) computed from real (B, C, D, H, W), which requires grad -> () float32 or
    wider, differentiable. The gradient is that of the sum over patches; its square is summed over elements
    and divided by B * d * h * w. For one patch this is the paper's formula, and it stays the same when a
    volume is tiled from crops; a mean over the logits would fall with the volume. Raises ValueError for
    logits of 16 bits (run the discriminator outside autocast: the squares underflow) and for a real without
    gradient.
    """
    if not real.requires_grad:
        raise ValueError("r1_penalty: real does not require grad; call real.requires_grad_() before the "
                         "discriminator sees it")
    if logits_real.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"r1_penalty: needs float32 logits, got {logits_real.dtype}; run the discriminator "
                         f"with autocast off here")
    with torch.autocast(real.device.type, enabled=False):
        grad, = torch.autograd.grad(logits_real.sum(), real, create_graph=True)
        return wide(grad).square().sum() / (2 * logits_real.numel())


class LeCam(nn.Module):
    """LeCam regulariser of the discriminator: E[(r - anchor_fake)^2] + E[(f - anchor_real)^2].

    After arXiv:2104.03310; the anchors are moving averages of the mean logits.
    forward(logits_real, logits_fake) -> () float32 or wider, 0 before the first update; it never changes the
    anchors. update(logits_real, logits_fake) moves them. Call it once per optimizer step with the logits (or
    their means, of any shape) of the whole step, after the step succeeded: a repeated or skipped one then
    leaves no trace. The first update sets the anchors, so that they need no correction for their start. They
    are buffers, saved in the state dict.
    """
    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer("anchor_real", torch.zeros(()))
        self.register_buffer("anchor_fake", torch.zeros(()))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, logits_real: Tensor, logits_fake: Tensor) -> None:
        share = torch.where(self.updates == 0, 1.0, 1 - self.decay)
        for anchor, logits in ((self.anchor_real, logits_real), (self.anchor_fake, logits_fake)):
            anchor += share * (logits.to(anchor.dtype).mean() - anchor)
        self.updates += 1

    def forward(self, logits_real: Tensor, logits_fake: Tensor) -> Tensor:
        real, fake = wide(logits_real), wide(logits_fake)
        with torch.autocast(real.device.type, enabled=False):
            penalty = (real - self.anchor_fake).square().mean() + (fake - self.anchor_real).square().mean()
            return penalty * (self.updates > 0)


def adaptive_weight(recon_loss: Tensor, adv_loss: Tensor, shared: Tensor, limit: float = 1e4,
                    scale: float | Tensor = 1.0) -> Tensor:
    """|d recon_loss / d shared| / (|d adv_loss / d shared| + 1e-6), at most `limit`.

    Two () losses and a tensor that both depend on -> () float32 or wider, without gradient. VQGAN
    (arXiv:2012.09841, Eq. 7) takes the weight of the decoder's last layer for it. The graphs are kept for
    the backward that follows. `scale`: the GradScaler's, so that 16-bit gradients do not underflow; it
    cancels.
    """
    norms = []
    for loss in (recon_loss, adv_loss):
        grad, = torch.autograd.grad(loss * scale, shared, retain_graph=True)
        norms.append(wide(grad).norm() / scale)
    ratio = (norms[0] / (norms[1] + 1e-6)).clamp(0, limit).detach()
    # 0 where 16-bit gradients overflow: the backward that follows finds out
    return torch.where(ratio.isfinite(), ratio, 0)


# ------------------------------------------------------------------------------------------------- helpers


# same as losses.slabs
def slabs(x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Index tuples that cut (B, C, D, H, W) along B and D into parts of about SLAB_VOXELS elements."""
    depth = max(1, SLAB_VOXELS // max(1, x[0, :, 0].numel()))
    for b in range(x.shape[0]):
        for d in range(0, x.shape[2], depth):
            yield slice(b, b + 1), slice(None), slice(d, d + depth)


# same as losses.check_pair
def check_pair(name: str, recon: Tensor, target: Tensor) -> None:
    if recon.shape != target.shape or recon.dim() != 5:
        raise ValueError(f"{name}: needs two tensors of one shape (B, C, D, H, W), "
                         f"got {tuple(recon.shape)} and {tuple(target.shape)}")


# same as losses.wide
def wide(x: Tensor) -> Tensor:
    """x in float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
