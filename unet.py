"""U-Net for volumes, with a kernel and a stride per level and axis: 2D is a case of 3D. Needs torch alone.

    unet = UNet.from_preset("unet3d", in_channels=1, out_channels=3)
    logits, deep = unet(x)                        # x (B, 1, D, H, W), any size -> (B, 3, D, H, W)
    unet.memory("checkpoint")                     # the memory dial: none | checkpoint, with the same result

Follows: U-Net (arXiv:1505.04597), 3D U-Net (arXiv:1606.06650); strided convolutions in place of pooling as
in V-Net (arXiv:1606.04797); kernels and strides per level, and deep supervision, as in nnU-Net
(arXiv:1904.08128); residual blocks, attention and conditions by scale and shift as in ADM
(arXiv:2105.05233), and control residuals (control.py), for denoisers. Deviations: padded convolutions, so
the logits have the input's size; group norm by default, for batches of one or two.
With kernel (1, 3, 3) and stride (1, 2, 2) no value passes from one slice to another: a 2D U-Net, slice by
slice (norm `batch` in eval mode, or `none`; `group` and `instance` take their statistics over the volume);
unet_weights.py reads the weights of the common one.

Shapes: B batch, C channels, D H W depth height width, E time embedding channels, V numbers of `vector`.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import gcd, log, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

try:
    from lean_norm import group_norm  # on CUDA by batch norm's kernels, where it lies beside
except ModuleNotFoundError:
    group_norm = F.group_norm

NORMS = ("none", "batch", "group", "instance")
ACTS, MEMORY_MODES = ("relu", "leaky_relu", "silu"), ("none", "checkpoint")
UPSAMPLINGS, DOWNSAMPLINGS = ("transposed", "interpolate"), ("pool", "conv")
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class UNetConfig:
    """Everything that fixes the network's shape; two equal configs have equal parameter names and shapes."""
    in_channels: int = 1                   # C of the input; train.py sets it from the data
    out_channels: int = 2                  # classes, background included; 1: one logit for a sigmoid
    channels: tuple[int, ...] = (16, 32, 64, 128)              # width per level, highest resolution first
    kernels: tuple[tuple[int, int, int], ...] = ((3, 3, 3),)   # D,H,W, odd; for all levels, or each
    strides: tuple[tuple[int, int, int], ...] = ((2, 2, 2),)   # D,H,W; for all levels, or between each two
    num_convs: int = 2                     # convolution blocks per level, on the way down and on the way up
    residual: bool = False                 # blocks of two convolutions and a shortcut (as in ADM)
    downsampling: str = "pool"             # pool (max, no weights) | conv (kernel = stride, as in V-Net)
    upsampling: str = "transposed"         # transposed (kernel = stride) | interpolate (linear)
    norm: str = "group"                    # none | batch (as in 3D U-Net) | group | instance (as in nnU-Net)
    norm_groups: int = 8                   # of group norm at most; the largest number that divides the width
    act: str = "relu"                      # relu | leaky_relu (slope 0.01, as in nnU-Net) | silu (as in ADM)
    deep_supervision: int = 0              # further logits in training, at levels 1, 2, ...; 0: off
    time_channels: int = 0                 # E, width of the time embedding, even; 0: no conditioning
    vector_channels: int = 0               # V, further numbers per sample, added to the time embedding
    attention: bool = False                # at the lowest level, after its blocks
    attention_levels: int = 0              # the same at so many of the lowest, down and up; 1: `attention`
    head_channels: int = 64                # of attention, per head; gcd with the width where that is less
    zero_head: bool = False                # logits begin at 0 (as in ADM)

    def __post_init__(self):
        for name in ("channels", "kernels", "strides"):
            value = getattr(self, name)
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise ValueError(f"unet.{name} must be a tuple with an entry a level, got {value!r}")
        object.__setattr__(self, "channels", tuple(self.channels))
        least = {"in_channels": 1, "out_channels": 1, "num_convs": 1, "norm_groups": 1, "deep_supervision": 0,
                 "time_channels": 0, "vector_channels": 0, "attention_levels": 0, "head_channels": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ValueError(f"unet.{name} must be at least {bound}, got {getattr(self, name)}")
        known = {"norm": NORMS, "act": ACTS, "upsampling": UPSAMPLINGS, "downsampling": DOWNSAMPLINGS}
        for name, choices in known.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"unet.{name} must be one of {', '.join(choices)}, got {value!r}")
        if not self.channels or min(self.channels) < 1:
            raise ValueError(f"unet.channels needs one positive width a level, got {self.channels}")
        for name, count in (("kernels", len(self.channels)), ("strides", len(self.channels) - 1)):
            triples = getattr(self, name)
            if not all(isinstance(t, Sequence) and len(t) == 3 and min(t) >= 1 for t in triples):
                raise ValueError(f"unet.{name} entries are three positive integers (D, H, W), got {triples}; "
                                 f"write ((3, 3, 3),), or 3,3,3 as a flag")
            object.__setattr__(self, name, tuple(tuple(t) for t in triples))
            if len(triples) not in (1, count):
                raise ValueError(f"unet.{name} needs one D,H,W triple for all or {count} for "
                                 f"channels={self.channels}, got {len(triples)}: {triples}")
        if any(k % 2 == 0 for kernel in self.kernels for k in kernel):
            raise ValueError(f"unet.kernels must be odd, so that sizes are kept; got {self.kernels}")
        most = max(len(self.channels) - 2, 0)
        if self.deep_supervision > most:
            raise ValueError(f"unet.deep_supervision is at most {most} with {len(self.channels)} levels (the "
                             f"top has the logits, the lowest none), got {self.deep_supervision}")
        if self.time_channels % 2:
            raise ValueError(f"unet.time_channels must be even (sines and cosines), got {self.time_channels}")
        if self.vector_channels and not self.time_channels:
            raise ValueError("unet.vector_channels is added to the time embedding; set unet.time_channels")
        if self.attention_levels > len(self.channels):
            raise ValueError(f"unet.attention_levels is at most {len(self.channels)}, the number of levels, "
                             f"got {self.attention_levels}")

    @property
    def level_kernels(self) -> tuple[Triple, ...]:
        """The kernel of each level, highest resolution first."""
        return self.kernels * len(self.channels) if len(self.kernels) == 1 else self.kernels

    @property
    def level_strides(self) -> tuple[Triple, ...]:
        """The stride between level l and level l + 1."""
        count = len(self.channels) - 1
        return self.strides * count if len(self.strides) == 1 else self.strides

    @property
    def total_stride(self) -> Triple:
        """Voxels per element of the lowest level along D, H, W."""
        return tuple(prod(s[axis] for s in self.level_strides) for axis in range(3))


PRESETS = {                      # to segment
    "unet3d": UNetConfig(),      # a quarter of 3D U-Net's widths
    "unet2d": UNetConfig(3, 2, (64, 128, 256, 512, 1024), ((1, 3, 3),), ((1, 2, 2),), norm="batch"),
    "unet_light": UNetConfig(channels=(8, 16, 32, 64), upsampling="interpolate"),
}
LIGHT = UNetConfig(4, 4, (64, 128, 256), num_convs=1, residual=True, downsampling="conv", norm_groups=32,
                   act="silu", time_channels=256, attention_levels=1, zero_head=True)
DENOISERS = {"denoiser_light": LIGHT, "denoiser": dataclasses.replace(LIGHT, channels=(64, 128, 256, 512))}


class GroupNorm(nn.GroupNorm):  # same as vae3d.GroupNorm
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


class ChannelNorm(nn.LayerNorm):  # same as vae3d.ChannelNorm
    """LayerNorm (arXiv:1607.06450) over the channels of each voxel of x (B, C, D, H, W)."""
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            rows = x.movedim(1, -1)              # (B, D, H, W, C), contiguous in channels_last_3d
            weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
            return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def make_norm(norm: str, channels: int, groups: int) -> nn.Module:
    """`group` takes the largest number up to `groups` that divides the width, `instance` one a channel."""
    if norm == "none":
        return nn.Identity()
    if norm == "batch":
        return nn.BatchNorm3d(channels)
    if norm == "instance":
        return GroupNorm(channels, channels)
    return GroupNorm(max(g for g in range(1, groups + 1) if channels % g == 0), channels)


def make_act(act: str, inplace: bool = True) -> nn.Module:
    """The nonlinearity, in place where backward does not need its input (saves one activation a block)."""
    if act == "relu":
        return nn.ReLU(inplace)
    if act == "leaky_relu":
        return nn.LeakyReLU(0.01, inplace)
    return nn.SiLU()


def check_values(norm: nn.Module, x: Tensor) -> None:
    """Raise ValueError when `norm` would take its statistics over a single value: nothing of x is left."""
    voxels = prod(x.shape[2:])
    if isinstance(norm, nn.BatchNorm3d):
        if norm.training and len(x) * voxels == 1:
            raise ValueError(f"UNet: batch norm in training needs more than one value per channel, got one "
                             f"in a level of shape {tuple(x.shape)}; use a larger crop or batch, fewer "
                             f"levels, or unet.norm=group")
    elif isinstance(norm, GroupNorm) and voxels * (norm.num_channels // norm.num_groups) == 1:
        raise ValueError(f"UNet: normalising each channel of a sample alone needs more than one voxel, got a "
                         f"level of shape {tuple(x.shape)}; use a larger crop, fewer levels, or "
                         f"unet.norm=group with unet.norm_groups below {x.shape[1]}")


def same_conv(in_channels: int, out_channels: int, kernel: Triple, bias: bool = True) -> nn.Conv3d:
    """A convolution of stride 1 that keeps the size."""
    return nn.Conv3d(in_channels, out_channels, kernel, padding=tuple(k // 2 for k in kernel), bias=bias)


class ConvBlock(nn.Module):
    """Convolution, norm, scale and shift by the time embedding where there is one, nonlinearity.

    x (B, C_in, D, H, W), embedding (B, E) or None -> (B, C_out, D, H, W). The convolution has a bias only
    where no norm follows. Raises ValueError when the norm would see a single value (check_values).
    """
    def __init__(self, in_channels: int, out_channels: int, kernel: Triple = (3, 3, 3), norm: str = "group",
                 norm_groups: int = 8, act: str = "relu", time_channels: int = 0):
        super().__init__()
        self.conv = same_conv(in_channels, out_channels, kernel, bias=norm == "none")
        self.norm = make_norm(norm, out_channels, norm_groups)
        self.act = make_act(act)
        self.time = nn.Linear(time_channels, 2 * out_channels) if time_channels else None
        # arXiv:1502.01852; with torch's own start the signal is lost where there is no norm
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        h = self.conv(x)
        check_values(self.norm, h)
        h = self.norm(h)
        if self.time is not None:
            both = self.time(embedding)[..., None, None, None].to(h.dtype)
            scale, shift = both.chunk(2, dim=1)            # each (B, C_out, 1, 1, 1)
            h = torch.addcmul(shift, h, 1 + scale)
        return self.act(h)


class ResidualBlock(nn.Module):
    """Norm, nonlinearity, ConvBlock, convolution; added to x, which a 1x1x1 convolution takes to the width.

    x (B, C_in, D, H, W), embedding (B, E) or None -> (B, C_out, D, H, W), as in ADM: starts as its shortcut.
    """
    def __init__(self, in_channels: int, out_channels: int, kernel: Triple = (3, 3, 3), norm: str = "group",
                 norm_groups: int = 8, act: str = "relu", time_channels: int = 0):
        super().__init__()
        self.norm = make_norm(norm, in_channels, norm_groups)
        self.act = make_act(act, inplace=norm != "none")       # without a norm its input is the shortcut's
        self.block = ConvBlock(in_channels, out_channels, kernel, norm, norm_groups, act, time_channels)
        self.conv = same_conv(out_channels, out_channels, kernel)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        is_widened = in_channels != out_channels
        self.shortcut = nn.Conv3d(in_channels, out_channels, 1) if is_widened else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        check_values(self.norm, x)
        h = self.block(self.act(self.norm(x)), embedding)
        return self.shortcut(x) + self.conv(h)


class DownBlock(nn.Module):
    """Downsampling, then a block: x (B, C_in, D, H, W) -> (B, C_out, D // s0, H // s1, W // s2)."""
    def __init__(self, down: nn.Module, block: nn.Module):
        super().__init__()
        self.down, self.block = down, block

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        return self.block(self.down(x), embedding)


class UpBlock(nn.Module):
    """Upsampling, zeros at the far ends up to the skip's size, [skip, upsampled], then a block.

    x (B, C_low, d, h, w), skip (B, C, D, H, W) -> (B, C_out, D, H, W). Checkpointing keeps nothing inside.
    """
    def __init__(self, up: nn.Module, block: nn.Module):
        super().__init__()
        self.up, self.block = up, block

    def forward(self, x: Tensor, skip: Tensor, embedding: Tensor | None = None) -> Tensor:
        x = self.up(x)
        d, h, w = (want - have for want, have in zip(skip.shape[2:], x.shape[2:]))
        if d or h or w:
            x = F.pad(x, (0, w, 0, h, 0, d))
        return self.block(torch.cat([skip, x], dim=1), embedding)


class Attention3d(nn.Module):
    """Self-attention over all voxels of a level: x (B, C, D, H, W) -> the same shape, residual.

    scaled_dot_product_attention never holds the N x N matrix. The norm is per voxel, whatever the network's.
    """
    def __init__(self, channels: int, head_channels: int = 64):
        super().__init__()
        self.heads = channels // gcd(channels, head_channels)
        self.norm = ChannelNorm(channels, eps=1e-6)
        self.qkv = nn.Conv3d(channels, 3 * channels, 1)
        self.proj = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # same as vae3d.Attention3d.forward
        b, c = x.shape[:2]
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, -1)
        q, k, v = qkv.transpose(-1, -2).unbind(1)                # each (B, heads, D*H*W, C/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(h.transpose(-1, -2).reshape(x.shape))


class TimeEmbedding(nn.Module):
    """Sines and cosines of a scalar per sample, then an MLP: t (B,) -> (B, E), in the dtype of the MLP.

    t in units in which 1 is much (diffusion.py). The angles are 1000 t / 10000^(i/n), n = E / 2 - 1, as in
    DDPM (arXiv:2006.11239), in float32 or wider, since in bfloat16 t = 0.999 is 1.
    """
    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels
        layers = nn.Linear(channels, channels), nn.SiLU(), nn.Linear(channels, channels), nn.SiLU()
        self.mlp = nn.Sequential(*layers)

    def forward(self, t: Tensor) -> Tensor:
        dtype, half = torch.promote_types(t.dtype, torch.float32), self.channels // 2
        places = torch.arange(half, dtype=dtype, device=t.device) / max(half - 1, 1)
        angles = 1000 * t.to(dtype)[:, None] * (-log(10000) * places).exp()              # (B, E / 2)
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1).to(self.mlp[0].weight.dtype))


class UNetOutput(NamedTuple):
    logits: Tensor               # (B, out_channels, D, H, W), the input's size
    deep: tuple[Tensor, ...]     # training with deep supervision: of levels 1, 2, ..., each at its own size


class UNet(nn.Module):
    """x (B, C, D, H, W), t (B,) with time_channels, vector (B, V) -> UNetOutput(logits, deep).

    Any D, H, W >= 1. A size that a stride does not divide is rounded down on the way down, and zeros stand
    at the far end on the way up, as in the common 2D U-Net; an axis shorter than the total stride is padded
    to it by repeating the border, and the logits are cropped back. Level l's logits in `deep` have the grid
    of that level: size // stride, level by level. With upsampling `interpolate` no convolution narrows on
    the way up, so the lowest level has half its width, and the last block of each other level but the top
    hands up half. Raises ValueError when x is not 5D or has other channels, when t or vector is missing, not
    wanted or not one per sample, and when a norm would take its statistics over a single value.
    """
    def __init__(self, cfg: UNetConfig):
        super().__init__()
        self.cfg = cfg
        self.total_stride = cfg.total_stride     # once: torch.compile does not trace its generators
        widths, strides, last = cfg.channels, cfg.level_strides, len(cfg.channels) - 1
        is_transposed = cfg.upsampling == "transposed"

        def block(before: int, width: int, level: int) -> nn.Module:
            kind, kernel = ResidualBlock if cfg.residual else ConvBlock, cfg.level_kernels[level]
            return kind(before, width, kernel, cfg.norm, cfg.norm_groups, cfg.act, cfg.time_channels)

        def half(width: int) -> int:
            return width if is_transposed else max(width // 2, 1)

        e, before = cfg.time_channels, cfg.in_channels
        self.time = TimeEmbedding(e) if e else None
        self.vector, self.stem = None, None
        if cfg.vector_channels:
            self.vector = nn.Sequential(nn.Linear(cfg.vector_channels, e), nn.SiLU(), nn.Linear(e, e))
        if cfg.residual:               # its blocks begin with a norm, which would take the input's amplitude
            self.stem, before = same_conv(cfg.in_channels, widths[0], cfg.level_kernels[0]), widths[0]

        # down: below the top, the first block of a level comes with its downsampling
        self.encoder = nn.ModuleList()           # level -> its blocks
        self.down_attention, self.up_attention = nn.ModuleDict(), nn.ModuleDict()     # above the lowest level
        for level, width in enumerate(widths):
            if level == last > 0:
                width = half(width)
            if level == 0:
                blocks = [block(before, width, 0)]
            else:
                before, stride = widths[level - 1], strides[level - 1]
                down = nn.MaxPool3d(stride)
                if cfg.downsampling == "conv":
                    down = nn.Conv3d(before, before, stride, stride)
                blocks = [DownBlock(down, block(before, width, level))]
            blocks += [block(width, width, level) for _ in range(cfg.num_convs - 1)]
            self.encoder.append(nn.ModuleList(blocks))
            if last - cfg.attention_levels < level < last:
                self.down_attention[str(level)] = Attention3d(width, cfg.head_channels)
        low = width
        is_low_on = cfg.attention or cfg.attention_levels > 0
        self.attention = Attention3d(low, cfg.head_channels) if is_low_on else None

        # up: from the lowest level, `low` channels wide, to the top
        decoder, handed_up = [], []
        for level in reversed(range(last)):
            width, stride = widths[level], strides[level]
            if is_transposed:
                up, joined = nn.ConvTranspose3d(low, width, stride, stride), width + width
            else:
                factors = tuple(float(s) for s in stride)
                up = nn.Upsample(scale_factor=factors, mode="trilinear", align_corners=True)
                joined = width + low
            outs = [width] * (cfg.num_convs - 1) + [half(width) if level else width]
            blocks = [UpBlock(up, block(joined, outs[0], level))]
            blocks += [block(before, after, level) for before, after in zip(outs, outs[1:])]
            decoder.append(nn.ModuleList(blocks))
            low = outs[-1]
            handed_up.append(low)
            if str(level) in self.down_attention:
                self.up_attention[str(level)] = Attention3d(low, cfg.head_channels)
        self.decoder = nn.ModuleList(reversed(decoder))    # level -> its blocks
        self.head = nn.Conv3d(low, cfg.out_channels, 1)
        if cfg.zero_head:
            nn.init.zeros_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if cfg.residual:
            norm = make_norm(cfg.norm, low, cfg.norm_groups)
            self.head = nn.Sequential(norm, make_act(cfg.act, cfg.norm != "none"), self.head)
        low_widths = handed_up[::-1][1:cfg.deep_supervision + 1]   # of levels 1, 2, ...
        self.deep_heads = nn.ModuleList(nn.Conv3d(w, cfg.out_channels, 1) for w in low_widths)
        self.memory("none")

    @classmethod
    def from_preset(cls, name: str, **changes) -> UNet:
        """Build a preset with some fields changed: UNet.from_preset("unet3d", out_channels=5)."""
        known = PRESETS | DENOISERS
        if name not in known:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(known)}")
        return cls(dataclasses.replace(known[name], **changes))

    def memory(self, mode: str) -> UNet:
        """Set the memory dial and return self; may be called again at any time.

        It changes peak memory and time, never the result. none: plain autograd keeps every activation.
        checkpoint: the input of each block is kept (skips are shared, upsampled and joined tensors never
        kept) and its inside is computed again in backward (arXiv:1604.06174). The running statistics of
        batch norm move once. Raises ValueError for another mode.
        """
        if mode not in MEMORY_MODES:
            raise ValueError(f"memory mode of a U-Net must be one of none, checkpoint, got {mode!r}; "
                             f"its lowest level sees the whole volume, so it has no exact tiles")
        self.memory_mode = mode
        return self

    def forward(self, x: Tensor, t: Tensor | None = None, vector: Tensor | None = None,
                control: Sequence[Tensor] | None = None) -> UNetOutput:
        """control: added to each level's output of `encode`, as control.ControlNet gives it."""
        levels, embedding = self.encode(x, t, vector)
        d, h, w = x.shape[2:]
        if control is not None:
            if len(control) != len(levels):
                raise ValueError(f"UNet: control has a tensor a level, {len(levels)}; got {len(control)}")
            levels = [level + extra for level, extra in zip(levels, control)]
        *skips, x = levels

        # up from the lowest level; in training the upper levels but the top give logits of their own
        deep = []
        for level, (first, *rest) in reversed([*enumerate(self.decoder)]):
            x = self._run(first, x, skips[level], embedding)
            for each in rest:
                x = self._run(each, x, embedding)
            if str(level) in self.up_attention:
                x = self._run(self.up_attention[str(level)], x)
            if self.training and 1 <= level <= len(self.deep_heads):
                deep.insert(0, self.deep_heads[level - 1](x))
        logits = self.head(x) if self.stem is None else self._run(self.head, x)
        return UNetOutput(logits[..., :d, :h, :w], tuple(deep))

    def encode(self, x: Tensor, t: Tensor | None = None, vector: Tensor | None = None,
               hint: Tensor | None = None) -> tuple[list[Tensor], Tensor | None]:
        """The way down: each level's last output, and the embedding (B, E) that the way up needs as well.

        hint: added to what the first block of the encoder sees (B, C, D, H, W), for control.ControlNet.
        """
        self.check_input(x, t, vector)
        embedding = None if t is None else self.time(t)
        if vector is not None:
            embedding = embedding + self.vector(vector.to(self.vector[0].weight.dtype))
        x = pad_to_least(x, self.total_stride)
        if self.stem is not None:
            x = self.stem(x)
        if hint is not None:
            x = x + pad_to_least(hint, self.total_stride)

        levels = []
        for level, blocks in enumerate(self.encoder):
            for each in blocks:
                x = self._run(each, x, embedding)
            if str(level) in self.down_attention:
                x = self._run(self.down_attention[str(level)], x)
            levels.append(x)
        if self.attention is not None:
            levels[-1] = self._run(self.attention, x)
        return levels, embedding

    def check_input(self, x: Tensor, t: Tensor | None, vector: Tensor | None = None) -> None:
        if x.dim() != 5 or x.shape[1] != self.cfg.in_channels or 0 in x.shape[2:]:
            raise ValueError(f"UNet: built for (B, {self.cfg.in_channels}, D, H, W), got {tuple(x.shape)}; "
                             f"make unet.in_channels the number of channels of the data")
        if (t is None) != (self.time is None):
            found = "none" if t is None else tuple(t.shape)
            raise ValueError(f"UNet: unet.time_channels={self.cfg.time_channels}, got t={found}; "
                             f"give t (B,) when and only when time_channels is not 0")
        if t is not None and t.shape != x.shape[:1]:
            raise ValueError(f"UNet: t is one scalar per sample, ({len(x)},) for this batch; "
                             f"got {tuple(t.shape)}")
        wanted = None if self.vector is None else (len(x), self.cfg.vector_channels)
        if (found := None if vector is None else tuple(vector.shape)) != wanted:
            raise ValueError(f"UNet: vector must be {wanted} with unet.vector_channels="
                             f"{self.cfg.vector_channels}, got {found}")

    def _run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """One block as the dial says."""
        if self.memory_mode == "none" or not torch.is_grad_enabled():
            return block(*inputs)
        options = {}
        has_buffers = any(True for _ in block.buffers())
        if has_buffers and not torch.compiler.is_compiling():      # compiled code updates them once anyway
            options["context_fn"] = lambda: (nullcontext(), BuffersKept(block))
        # no block draws random numbers, so that their state need not be kept
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


class BuffersKept:
    """Inside, `block` works on copies of its buffers: recomputation moves no running statistics again.

    Copies, not None: it must save tensors of the same number and shapes as the forward did. Also right for
    SyncBatchNorm. A class, not a generator: a retained graph enters it once per backward.
    """
    def __init__(self, block: nn.Module):
        self.block = block

    def __enter__(self) -> None:
        modules = [module for module in self.block.modules() if module._buffers]
        self.kept = [(module, dict(module._buffers)) for module in modules]
        for module, buffers in self.kept:
            module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *error) -> None:
        for module, buffers in self.kept:
            module._buffers.update(buffers)


def pad_to_least(x: Tensor, least: Sequence[int]) -> Tensor:
    """Repeat the far border of (B, C, D, H, W) until D, H, W are at least `least`."""
    d, h, w = (max(m - n, 0) for n, m in zip(x.shape[2:], least))
    if not (d or h or w):
        return x
    return F.pad(x, (0, w, 0, h, 0, d), mode="replicate")
