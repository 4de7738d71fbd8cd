"""3D convolutional variational autoencoder for volumes (CT, MR, radar and other voxel grids). Needs torch and nothing else.

    vae = VAE3D.from_preset("ultra_lightweight", in_channels=1)
    recon, mu, logvar = vae(x)                    # x (B, 1, D, H, W) in [-1, 1], any size
    vae.memory("tile", (64, 64, 64))              # the memory dial: none | checkpoint | tile, all with the same result

    vae = VAE3D.from_preset("ultra_lightweight", bottleneck="vq", num_codes=512)
    recon, vq_loss, index = vae(x)                # add vq_loss to the loss; after optimizer.step(): vae.quantizer.update()
    vae.decode_indices(index, x.shape[2:])

Follows: VAE (arXiv:1312.6114), VQ-VAE (arXiv:1711.00937), FSQ (arXiv:2309.15505), residual autoencoder of latent diffusion
(arXiv:2112.10752, App. E.3) carried to 3D.
Deviations: presets without normalisation (they learn faster here, docs/LOG.md), a stride per level and per axis,
attention through scaled_dot_product_attention only, nearest interpolation before the upsampling convolution.
The network is two flat lists of layers, so that a stretch of them can be run tile by tile, exactly ("Exact tiled execution" below).

Shapes: B batch, C channels, D H W depth height width, Z latent channels, d h w latent depth height width, K codes.
Version 0.4 (2026-11).
"""
from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import gcd, inf, prod
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

NORMS = ("none", "group", "layer")
BOTTLENECKS = ("kl", "vq", "fsq")
MEMORY_MODES = ("none", "checkpoint", "tile")
UPSAMPLES = ("nearest", "trilinear", "transposed", "transposed3")
MIDDLES = ("none", "blocks", "attention")
LOGVAR_RANGE = (-30.0, 20.0)                                     # exp() of it stays finite in float32 and float16
SEARCH_ELEMENTS = 1 << 24                                        # of the table latents x codes at a time: 64 MiB in float32


@dataclass(frozen=True)
class VAEConfig:
    """Everything that fixes the network; two equal configs have equal parameter names and shapes."""
    in_channels: int = 1                                         # C of input and reconstruction; train.py sets it from the data
    base_channels: int = 16                                      # width of level l is base_channels * channel_mult[l]
    channel_mult: tuple[int, ...] = (1, 2, 2)                    # one entry a level, highest resolution first
    num_res_blocks: int = 1                                      # per encoder level (decoder: one more); 0 saves memory and quality
    strides: tuple[tuple[int, int, int], ...] = ((1, 2, 2), (2, 2, 2))  # between levels, (D, H, W); thick slices keep their depth first
    z_channels: int = 4                                          # Z, as in latent diffusion's f8d4 and MAISI
    norm: str = "none"                                           # none | group | layer (over channels, per voxel)
    norm_groups: int = 32                                        # group: at most so many; the largest that divides the width is taken
    attention: bool = False                                      # at the lowest level only: after its blocks and in both middles
    head_channels: int = 64                                      # attention: channels per head; gcd with the width where it does not divide
    bottleneck: str = "kl"                                       # kl (Gaussian) | vq (codebook) | fsq (grid of fsq_levels)
    num_codes: int = 512                                         # vq: K; a code has z_channels numbers
    codebook_update: str = "ema"                                 # vq: ema (of the latents that chose a code) | gradient
    codebook_decay: float = 0.95                                 # vq: of the averages (arXiv:1711.00937, App. A.1: 0.99; docs/LOG.md)
    codebook_init: str = "kmeans"                                # vq: kmeans | samples (both from the first latents) | uniform
    codebook_cosine: bool = False                                # vq: latents and codes on the unit sphere (arXiv:2110.04627, Sec. 3.2)
    codebook_restart: float = 0.25                               # vq: codes used less than this part of an equal share start anew; 0: none
    lambda_vq: float = 1.0                                       # vq: weight of |sg[z] - e|^2; of use with codebook_update gradient only
    lambda_commitment: float = 0.25                              # vq: weight of |z - sg[e]|^2, the paper's beta
    fsq_levels: tuple[int, ...] = (8, 5, 5, 5)                   # fsq: values of each latent channel; 1,000 codes (arXiv:2309.15505)
    # What networks made elsewhere do otherwise (weights.py converts them); the defaults are ours.
    norm_eps: float = 1e-6                                       # of every norm, as in latent diffusion; PyTorch's own default is 1e-5
    blocks_per_level: tuple[int, ...] = ()                       # encoder blocks of each level where they differ; (): num_res_blocks each
    decoder_extra_blocks: int = 1                                # blocks a level that the decoder has more; latent diffusion 1, MONAI 0
    attention_levels: tuple[bool, ...] = ()                      # levels with attention after each of their blocks (MONAI); (): none
    encoder_middle: str = "blocks"                               # none | blocks (with vae.attention: attention too) | attention
    decoder_middle: str = "blocks"                               # the same
    down_padding: str = "both"                                   # of down-convolutions: both ends | end (zeros where the stride needs them)
    upsample: str = "nearest"                                    # nearest | trilinear | transposed (kernel: stride) | transposed3 (of 3)
    up_narrows: bool = False                                     # up-convolutions change the width; off: the block behind does (MONAI, LDM)
    up_strides: tuple[tuple[int, int, int], ...] = ()            # of the decoder, highest resolution first as strides; (): those
    head_act: bool = True                                        # SiLU before the last convolution of encoder and decoder; MONAI: none
    quant_conv: str = "none"                                     # 1x1x1 behind the encoder: none | split (Z in, MONAI) | joint (2Z in)
    post_quant_conv: bool = False                                # 1x1x1 convolution before the decoder
    intensity_range: tuple[float, float] = (-1.0, 1.0)           # what stands for -1 and 1 inside; MONAI: 0,1. Volumes stay in [-1, 1]

    def __post_init__(self):
        for name in ("channel_mult", "fsq_levels", "blocks_per_level", "attention_levels", "intensity_range"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("strides", "up_strides"):
            object.__setattr__(self, name, tuple(tuple(s) for s in getattr(self, name)))
        for name, least in (("in_channels", 1), ("base_channels", 1), ("num_res_blocks", 0), ("z_channels", 1), ("norm_groups", 1),
                            ("head_channels", 1), ("num_codes", 2), ("codebook_restart", 0), ("lambda_vq", 0), ("lambda_commitment", 0),
                            ("decoder_extra_blocks", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"vae.{name} must be at least {least}, got {getattr(self, name)}")
        for name, allowed in (("norm", NORMS), ("bottleneck", BOTTLENECKS), ("codebook_update", ("ema", "gradient")),
                              ("codebook_init", ("kmeans", "samples", "uniform")), ("encoder_middle", MIDDLES), ("decoder_middle", MIDDLES),
                              ("down_padding", ("both", "end")), ("upsample", UPSAMPLES), ("quant_conv", ("none", "split", "joint"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"vae.{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        if not 0 <= self.codebook_decay < 1:
            raise ValueError(f"vae.codebook_decay is a decay in [0, 1), got {self.codebook_decay}")
        if self.bottleneck == "fsq" and (len(self.fsq_levels) != self.z_channels or min(self.fsq_levels) < 2):
            raise ValueError(f"vae.fsq_levels needs one number of 2 or more for each of vae.z_channels={self.z_channels}, "
                             f"got {self.fsq_levels}")
        if not self.channel_mult or min(self.channel_mult) < 1:
            raise ValueError(f"vae.channel_mult needs one positive entry a level, got {self.channel_mult}")
        if len(self.strides) != len(self.channel_mult) - 1:
            raise ValueError(f"vae.strides needs one D,H,W triple between levels: {len(self.channel_mult) - 1} for channel_mult="
                             f"{self.channel_mult}, got {len(self.strides)}: {self.strides}")
        for name in ("strides", "up_strides"):
            if any(len(s) != 3 or min(s) < 1 for s in getattr(self, name)):
                raise ValueError(f"vae.{name} entries are three positive integers (D, H, W), got {getattr(self, name)}")
        if self.up_strides and (len(self.up_strides) != len(self.strides)
                                or any(prod(up) != prod(down) for up, down in zip(zip(*self.up_strides), zip(*self.strides)))):
            raise ValueError(f"vae.up_strides must undo vae.strides={self.strides}: as many, with the same product along each axis; "
                             f"got {self.up_strides}")
        for name in ("blocks_per_level", "attention_levels"):
            if len(getattr(self, name)) not in (0, len(self.channel_mult)):
                raise ValueError(f"vae.{name} needs one entry for each of {len(self.channel_mult)} levels, got {getattr(self, name)}")
        if len(self.intensity_range) != 2 or not -inf < self.intensity_range[0] < self.intensity_range[1] < inf:
            raise ValueError(f"vae.intensity_range needs two numbers, the lower first, such as 0,1; got {self.intensity_range}")
        if not self.norm_eps > 0 or min(self.blocks_per_level, default=0) < 0:
            raise ValueError(f"vae.norm_eps must be above 0, vae.blocks_per_level 0 or more; got {self.norm_eps}, {self.blocks_per_level}")
        if not self.up_narrows and any(above != here and n + self.decoder_extra_blocks == 0
                                       for here, above, n in zip(self.channel_mult, self.channel_mult[1:], self.blocks)):
            raise ValueError("vae.decoder_extra_blocks=0 leaves a level of the decoder without a block to change the width; "
                             "make it 1, or vae.num_res_blocks at least 1, or set vae.up_narrows")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, highest resolution first."""
        return tuple(self.base_channels * m for m in self.channel_mult)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Residual blocks of each encoder level."""
        return self.blocks_per_level or (self.num_res_blocks,) * len(self.channel_mult)

    @property
    def normed(self) -> tuple[str, int, float]:
        """The norm of every layer, as make_norm takes it."""
        return self.norm, self.norm_groups, self.norm_eps

    @property
    def intensity_map(self) -> tuple[float, float]:
        """Scale and shift from [-1, 1] to intensity_range."""
        low, high = self.intensity_range
        return (high - low) / 2, (high + low) / 2

    @property
    def total_stride(self) -> tuple[int, int, int]:
        """Voxels per latent element along D, H, W."""
        return tuple(prod(s[axis] for s in self.strides) for axis in range(3))


PRESETS = {
    "ultra_lightweight": VAEConfig(),
    "lightweight": VAEConfig(base_channels=24, channel_mult=(1, 2, 3)),
    "base": VAEConfig(base_channels=32, channel_mult=(1, 2, 4)),
    "standard": VAEConfig(base_channels=64, channel_mult=(1, 2, 4), num_res_blocks=2, attention=True),
    "high_res": VAEConfig(channel_mult=(1, 2, 4), strides=((2, 2, 2), (2, 2, 2))),
    "fast": VAEConfig(channel_mult=(1, 2, 4), strides=((2, 2, 2), (2, 2, 2)), decoder_extra_blocks=0, encoder_middle="none",
                      decoder_middle="none", up_narrows=True),   # 0.64 M parameters; half a step's time of MONAI's 0.74 M (16,32,64)
}


class GroupNorm(nn.GroupNorm):
    """GroupNorm (arXiv:1803.08494) that keeps x.dtype also under autocast; the kernel's statistics are float32 or wider.

    CUDA's autocast would widen the whole tensor to float32 and keep both copies: +26 % of a training step's peak at (16,32,64).
    """
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type == "cpu" and x.dtype.itemsize == 2:  # in channels_last this backward takes ten times as long as both copies
                y = F.group_norm(x.contiguous(), self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)
                return y.contiguous(memory_format=torch.channels_last_3d) if x.stride(1) == 1 else y
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)

    def normalise(self, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The same with given statistics, mean and var (B, groups) in float32 or wider."""
        width = x.shape[1] // self.num_groups
        scale = (var + self.eps).rsqrt().repeat_interleave(width, 1) * weight                    # (B, C)
        shift = bias - mean.repeat_interleave(width, 1) * scale
        return torch.addcmul(shift[..., None, None, None], x, scale[..., None, None, None]).to(x.dtype)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm (arXiv:1607.06450) over the channels of each voxel: x (B, C, D, H, W) -> the same shape and dtype."""
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return self.normalise(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def normalise(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        rows = x.movedim(1, -1)                                  # (B, D, H, W, C), contiguous in channels_last_3d
        return F.layer_norm(rows, self.normalized_shape, weight, bias, self.eps).movedim(-1, 1)


def make_norm(norm: str, channels: int, groups: int, eps: float = 1e-6) -> nn.Module:
    """The normalisation of one width; `group` takes the largest group count up to `groups` that divides it."""
    if norm == "none":
        return nn.Identity()
    if norm == "layer":
        return ChannelNorm(channels, eps=eps)
    return GroupNorm(max(g for g in range(1, groups + 1) if channels % g == 0), channels, eps=eps)


class Lean(torch.autograd.Function):
    """conv(before(x)), of which x alone is kept: `before` (norm, SiLU, upsampling) runs again in backward.

    Plain autograd keeps its output for the convolution besides, and what lies between. The bits are the same as without. Parameters are
    inputs, so that their gradients take autograd's ordinary way.
    """
    @staticmethod
    def forward(ctx, conv: nn.Conv3d, before: nn.Sequential, x: Tensor, weight: Tensor, bias: Tensor | None, *parameters: Tensor) -> Tensor:
        ctx.conv, ctx.before = conv, before
        ctx.save_for_backward(x, weight, *parameters)
        return convolve(conv, prepared(before, x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        conv, (x, weight, *parameters), (x_needed, *weights_needed) = ctx.conv, ctx.saved_tensors, ctx.needs_input_grad[2:5]
        x = x.detach().requires_grad_(x_needed)
        parameters = [p.detach().requires_grad_(needed) for p, needed in zip(parameters, ctx.needs_input_grad[5:])]
        names = [name for name, _ in ctx.before.named_parameters()]
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            h = torch.func.functional_call(ctx.before, dict(zip(names, parameters)), (x,)) if names else ctx.before(x)
        edge, dtype = torch.autograd.graph.get_gradient_edge(h) if h.requires_grad else None, h.dtype
        h = h.detach().to(grad.dtype)
        pair = (grad.to_mkldnn(), h.to_mkldnn()) if slow_on_cpu(h) else (grad, h)
        grad_h, *found = (g if g is None or not g.is_mkldnn else g.to_dense() for g in torch.ops.aten.convolution_backward(
            *pair, weight.to(grad.dtype), None if conv.bias is None else [conv.out_channels], conv.stride, conv.padding, conv.dilation,
            False, (0, 0, 0), conv.groups, (edge is not None, *weights_needed)))
        del h, pair                                              # not needed for the gradient of SiLU, which looks at x
        inputs = [t for t in (x, *parameters) if t.requires_grad]
        before = dict(zip(map(id, inputs), torch.autograd.grad(edge, inputs, grad_h.to(dtype)))) if edge is not None else {}
        return (None, None, before.get(id(x)), *(g if g is None else g.to(weight.dtype) for g in found),
                *(before.get(id(p)) for p in parameters))


def prepared(before: nn.Module, x: Tensor) -> Tensor:
    """before(x) in x.dtype: CUDA's autocast would widen nearest upsampling to float32."""
    with torch.autocast(x.device.type, enabled=False):
        return before(x)


def plain(conv: nn.Module, x: Tensor, *before: nn.Module) -> Tensor:
    """conv(before(x)) as autograd does it."""
    return convolve(conv, prepared(nn.Sequential(*before), x))


def slow_on_cpu(x: Tensor) -> bool:
    """PyTorch leaves one small float32 sample to an im2col kernel (use_mkldnn in Convolution.cpp); oneDNN's takes a fifth of its time.

    Not where a mode watches the operators (fake tensors, memory counting): oneDNN's tensors have no storage to look at. So no memory figure
    has its reordered copies of these small tensors.
    """
    return (x.device.type == "cpu" and x.dtype is torch.float32 and len(x) == 1 and prod(x.shape[1:4]) <= 20480
            and not torch.is_autocast_enabled("cpu") and torch._C._get_mkldnn_enabled() and not torch._C._len_torch_dispatch_stack())


def convolve(conv: nn.Module, x: Tensor) -> Tensor:
    """conv(x), by oneDNN also where PyTorch would not choose it."""
    if not slow_on_cpu(x) or conv._forward_hooks or conv._forward_pre_hooks:
        return conv(x)
    dense = conv(x.to_mkldnn()).to_dense()
    return dense.contiguous(memory_format=torch.channels_last_3d) if x.stride(1) == 1 else dense


def lean(conv: nn.Module, x: Tensor, *before: nn.Module) -> Tensor:
    """conv(before(x)), by Lean where gradients are wanted; a compiler does the like by itself, and knows no more than plain modules."""
    layers = nn.Sequential(*before)
    if torch.compiler.is_compiling() or type(conv) is not nn.Conv3d or getattr(conv, "_is_replica", False):  # of DataParallel
        return conv(prepared(layers, x))
    if not torch.is_grad_enabled():
        return convolve(conv, prepared(layers, x))
    return Lean.apply(conv, layers, x, conv.weight, conv.bias, *layers.parameters())


class ResBlock3d(nn.Module):
    """Pre-activation residual block (arXiv:1603.05027): twice (norm, SiLU, 3x3x3 convolution), plus the input.

    x (B, C_in, D, H, W) -> (B, C_out, D, H, W). The skip is a 1x1x1 convolution where the width changes.
    """
    def __init__(self, in_channels: int, out_channels: int, norm: str = "none", norm_groups: int = 32, norm_eps: float = 1e-6):
        super().__init__()
        self.act = nn.SiLU()
        self.norm1 = make_norm(norm, in_channels, norm_groups, norm_eps)
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, padding=1)
        self.norm2 = make_norm(norm, out_channels, norm_groups, norm_eps)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, last: Callable[..., Tensor] | None = None) -> Tensor:
        """last: what runs the second convolution, `lean` unless another is given."""
        h = lean(self.conv1, x, self.norm1, self.act)
        return self.skip(x) + (last or lean)(self.conv2, h, self.norm2, self.act)


class Upsample3d(nn.Sequential):
    """Interpolation by an integer factor per axis, then a 3x3x3 convolution: (B, C_in, D, H, W) -> (B, C_out, D*s0, H*s1, W*s2).

    mode: nearest | trilinear | transposed: one transposed convolution instead, its kernel the stride | transposed3: of kernel 3.
    """
    def __init__(self, in_channels: int, out_channels: int, stride: tuple[int, int, int], mode: str = "nearest"):
        if mode == "transposed":
            layers = OrderedDict(conv=nn.ConvTranspose3d(in_channels, out_channels, stride, stride))
        elif mode == "transposed3":
            layers = OrderedDict(conv=nn.ConvTranspose3d(in_channels, out_channels, 3, stride, 1, tuple(s - 1 for s in stride)))
        else:
            layers = OrderedDict(up=nn.Upsample(scale_factor=tuple(stride), mode=mode),
                                 conv=nn.Conv3d(in_channels, out_channels, 3, padding=1))
        super().__init__(layers)

    def forward(self, x: Tensor) -> Tensor:
        return lean(self.conv, x, *list(self)[:-1])


def make_down(in_channels: int, out_channels: int, stride: tuple[int, int, int], padding: str = "both") -> nn.Module:
    """The strided 3x3x3 convolution between levels. padding `end`: at stride 2 a zero behind the far end and none before the near one."""
    if padding == "both":
        return nn.Conv3d(in_channels, out_channels, 3, stride, padding=1)
    ends = [pad for s in reversed(stride) for pad in (max(3 - s, 0) // 2, -(-max(3 - s, 0) // 2))]
    return nn.Sequential(OrderedDict(pad=nn.ConstantPad3d(ends, 0.0), conv=nn.Conv3d(in_channels, out_channels, 3, stride)))


class Attention3d(nn.Module):
    """Self-attention over all voxels of a level: x (B, C, D, H, W) -> the same shape, residual.

    Only scaled_dot_product_attention: its kernels never hold the N x N matrix (74 GiB against 5.7 at 64,256,256 elsewhere).
    With norm `none` the queries are normalised per voxel all the same, since their scale decides how sharp the softmax is.
    """
    def __init__(self, channels: int, norm: str = "none", norm_groups: int = 32, norm_eps: float = 1e-6, head_channels: int = 64):
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
    def __init__(self, in_channels: int, out_channels: int, norm: str, norm_groups: int, norm_eps: float = 1e-6, act: bool = True):
        super().__init__(OrderedDict(norm=make_norm(norm, in_channels, norm_groups, norm_eps), act=nn.SiLU() if act else nn.Identity(),
                                     conv=nn.Conv3d(in_channels, out_channels, 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        return lean(self.conv, x, self.norm, self.act)


def build_encoder(cfg: VAEConfig) -> nn.Sequential:
    """Layers in the order in which they run: (B, C, D, H, W) -> (B, 2Z, d, h, w), mean and log-variance; (B, Z, d, h, w) for codes."""
    widths, out = cfg.widths, (2 if cfg.bottleneck == "kl" else 1) * cfg.z_channels
    layers = OrderedDict(conv_in=nn.Conv3d(cfg.in_channels, widths[0], 3, padding=1))
    for level, width in enumerate(widths):
        add_level(layers, cfg, level, widths[max(level - 1, 0)], cfg.blocks[level])
        if level < len(cfg.strides):                             # before a level without blocks the down-convolution changes the width
            after = width if cfg.blocks[level + 1] else widths[level + 1]
            layers[f"level{level}_down"] = make_down(width, after, cfg.strides[level], cfg.down_padding)
    add_middle(layers, cfg, cfg.encoder_middle)
    layers["head"] = Head(widths[-1], cfg.z_channels if cfg.quant_conv == "split" else out, *cfg.normed, cfg.head_act)
    if cfg.quant_conv != "none":
        layers["quant_conv"] = nn.Conv3d(layers["head"].conv.out_channels, out, 1)
    return nn.Sequential(layers)


def build_decoder(cfg: VAEConfig) -> nn.Sequential:
    """Layers in the order in which they run: (B, Z, d, h, w) -> (B, C, D, H, W)."""
    widths, layers = cfg.widths, OrderedDict()
    if cfg.post_quant_conv:
        layers["post_quant_conv"] = nn.Conv3d(cfg.z_channels, cfg.z_channels, 1)
    layers["conv_in"] = nn.Conv3d(cfg.z_channels, widths[-1], 3, padding=1)
    add_middle(layers, cfg, cfg.decoder_middle)
    before = widths[-1]
    for level in reversed(range(len(widths))):
        add_level(layers, cfg, level, before, cfg.blocks[level] + cfg.decoder_extra_blocks)
        if level > 0:
            before = widths[level - 1] if cfg.up_narrows else widths[level]
            layers[f"level{level}_up"] = Upsample3d(widths[level], before, (cfg.up_strides or cfg.strides)[level - 1], cfg.upsample)
    layers["head"] = Head(widths[0], cfg.in_channels, *cfg.normed, cfg.head_act)
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


# ------------------------------------------------------------------------------------------------ Codebooks

class Codes(NamedTuple):
    """Latent on the points of a codebook."""
    z_q: Tensor                                                  # (B, Z, d, h, w) float32; its gradient goes straight to the encoder
    vq_loss: Tensor                                              # () float32, weighted, ready to be added; 0 with fsq
    index: Tensor                                                # (B, d, h, w) int64 in [0, K)


class StraightThrough(torch.autograd.Function):
    """Value: code, to the bit, so that indices decode to the same volume. Gradient: that of x, unchanged (arXiv:1711.00937, Sec. 3.2)."""
    @staticmethod
    def forward(ctx, x, code):
        return code.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class VectorQuantizer(nn.Module):
    """Nearest-code quantiser with straight-through gradient (VQ-VAE, arXiv:1711.00937, Eqs. 1-3).

    z (B, Z, d, h, w) -> Codes. vq_loss = lambda_vq |sg[z] - e|^2 + lambda_commitment |z - sg[e]|^2, means over elements; the first term
    only where the codebook learns by gradient. Float32 or wider inside, also under autocast: bf16 loses half of the codes.

    In training mode a forward pass only collects what chose each code; `update`, to be called once an optimizer step, moves the codebook
    (App. A.1) and starts dead codes anew, so that k micro-batches equal one batch and a step that is repeated counts once.
    cosine: z and codes are compared on the unit sphere, and z_q is a unit vector (arXiv:2110.04627, Sec. 3.2).
    """
    def __init__(self, num_codes: int, code_dim: int, update: str = "ema", decay: float = 0.95, cosine: bool = False, restart: float = 0.25,
                 lambda_vq: float = 1.0, lambda_commitment: float = 0.25):
        super().__init__()
        self.learned, self.decay, self.cosine, self.restart = update == "gradient", decay, cosine, restart
        self.lambda_vq, self.lambda_commitment = lambda_vq, lambda_commitment
        self.gather = True                                       # `update` sums over all processes; not where they share tiles
        codebook = torch.empty(num_codes, code_dim).uniform_(-1 / num_codes, 1 / num_codes)      # (K, Z)
        codebook = F.normalize(codebook, dim=1) if cosine else codebook
        if self.learned:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
        self.register_buffer("code_count", torch.ones(num_codes))                                # EMA of the latents a step that chose it
        self.register_buffer("code_sum", codebook.clone())                                       # EMA of their sum, (K, Z)
        self.collected: list[tuple[Tensor, Tensor, Tensor]] = []                                 # per forward: counts, sums, some latents

    @property
    def num_codes(self) -> int:
        return len(self.codebook)

    def forward(self, z: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Codes:
        """generator: says which latents may replace dead codes, in training mode; as in VAE3D.forward."""
        if z.shape[1] != self.codebook.shape[1]:
            raise ValueError(f"VectorQuantizer: codes of {self.codebook.shape[1]} numbers, got z with {z.shape[1]} channels; "
                             f"make vae.z_channels that of the codebook")
        with torch.autocast(z.device.type, enabled=False):
            dtype = torch.promote_types(z.dtype, torch.float32)
            x, e = z.to(dtype).movedim(1, -1), self.codebook.to(dtype)                           # (B, d, h, w, Z), (K, Z)
            if self.cosine:
                x, e = F.normalize(x, dim=-1), F.normalize(e, dim=-1)
            rows = x.detach().flatten(0, 3)                                                      # (N, Z)
            with torch.no_grad():
                index, count, total = nearest(rows, e, statistics=self.training)
                if self.training:
                    self.collected.append((count, total, self.candidates(x.detach(), generator)))
            code = F.embedding(index.view(x.shape[:-1]), e)                                      # (B, d, h, w, Z)
            loss = self.lambda_commitment * F.mse_loss(x, code.detach())
            if self.learned:
                loss = loss + self.lambda_vq * F.mse_loss(code, x.detach())
            z_q = StraightThrough.apply(x, code.detach()).movedim(-1, 1)
        return Codes(z_q, loss, index.view(x.shape[:-1]))

    def candidates(self, x: Tensor, generator) -> Tensor:
        """Up to K latents of each sample, drawn with the sample's own generator: x (B, d, h, w, Z) -> (B*R, Z)."""
        rows, drawn = x.flatten(1, 3), min(self.num_codes, x[0, ..., 0].numel())
        sources = [generator] * len(rows) if generator is None or isinstance(generator, torch.Generator) else generator
        return torch.cat([row[torch.randint(len(row), (drawn,), generator=g).to(row.device)] for row, g in zip(rows, sources)])

    @torch.no_grad()
    def update(self, generator: torch.Generator | None = None) -> None:
        """Move the codebook by what was collected since the last call, summed over all processes, and start dead codes anew.

        Where processes share the tiles of the same volumes (`VAE3D.memory`), each has collected everything, and nothing is summed.

        A code is dead where its average count is below `restart` of the mean one; it moves to a latent drawn in proportion to its squared
        distance from its code (the seeding of k-means++, Arthur and Vassilvitskii 2007), with twice the count of death. `generator` must be
        the same in all processes.
        """
        nothing = torch.zeros_like(self.code_count), torch.zeros_like(self.code_sum), self.code_sum[:0]
        counts, sums, latents = zip(*self.collected or [nothing])                                # a process without samples takes part too
        self.collected = []
        found = sum(counts), sum(sums), torch.cat(latents)
        count, total, latents = gathered(*found) if self.gather else found
        if not len(latents):
            return
        self.code_count.lerp_(count.to(self.code_count.dtype), 1 - self.decay)
        if not self.learned:
            self.code_sum.lerp_(total.to(self.code_sum.dtype), 1 - self.decay)
            whole, eps = self.code_count.sum(), 1e-5                                             # Laplace smoothing: no division by 0
            size = (self.code_count + eps) / (whole + len(count) * eps) * whole
            self.codebook.copy_(self.on_sphere(self.code_sum / size[:, None]))
        mean = self.code_count.mean()
        dead = self.code_count < self.restart * mean
        if dead.any():
            fresh = far_rows(latents.to(self.codebook.dtype), self.on_sphere(self.codebook), len(count), generator)
            self.codebook.copy_(torch.where(dead[:, None], fresh, self.codebook))
            self.code_count.copy_(torch.where(dead, 2 * self.restart * mean, self.code_count))
            self.code_sum.copy_(torch.where(dead[:, None], fresh * self.code_count[:, None], self.code_sum))

    @torch.no_grad()
    def fit(self, rows: Tensor, how: str = "kmeans", generator: torch.Generator | None = None, iterations: int = 10,
            per_step: int | None = None) -> None:
        """Start the codebook from latents (N, Z): samples of them, or the means that Lloyd's k-means finds from there.

        per_step: latents that an optimizer step will see (None: N), so that the averages begin where they will be.
        """
        rows = self.on_sphere(rows.to(self.codebook))
        order = torch.randperm(len(rows), generator=generator)
        codes = rows[order[torch.arange(self.num_codes) % len(rows)].to(rows.device)]
        for _ in range(iterations if how == "kmeans" else 0):
            _, count, total = nearest(rows, codes, statistics=True)
            means = self.on_sphere(total / count.clamp_min(1)[:, None])
            if (count == 0).any():
                means = torch.where(count[:, None] > 0, means, far_rows(rows, codes, len(codes), generator))
            codes = means
        _, count, _ = nearest(rows, codes, statistics=True)
        self.codebook.copy_(codes)
        self.code_count.copy_(count * ((per_step or len(rows)) / len(rows)))
        self.code_sum.copy_(codes * self.code_count[:, None])

    def on_sphere(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=1) if self.cosine else rows

    def lookup(self, index: Tensor) -> Tensor:
        """index (B, d, h, w) -> z_q (B, Z, d, h, w)."""
        return F.embedding(index, self.on_sphere(self.codebook)).movedim(-1, 1)


def nearest(rows: Tensor, codes: Tensor, statistics: bool = False) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Index (N,) of the nearest of codes (K, Z) for each of rows (N, Z); on request the count (K,) and sum (K, Z) of the rows of each code.

    The table of N x K distances exists only SEARCH_ELEMENTS at a time: 408,576 x 8,192 would take 12.5 GiB. |x|^2 is left out, being the
    same along a row. The sums are products with one-hot rows: unlike scatter_add on CUDA they come out the same each time.
    """
    square, found = codes.square().sum(1), []
    count = rows.new_zeros(len(codes)) if statistics else None
    total = torch.zeros_like(codes) if statistics else None
    for part in rows.split(max(1, SEARCH_ELEMENTS // len(codes))):
        table = torch.addmm(square, part, codes.T, alpha=-2)
        index = table.argmin(1)
        found.append(index)
        if statistics:
            table.zero_().scatter_(1, index[:, None], 1)
            count += table.sum(0)
            total.addmm_(table.T, part)
        del table                                                # before the next one is made
    return torch.cat(found), count, total


def far_rows(rows: Tensor, codes: Tensor, amount: int, generator: torch.Generator | None) -> Tensor:
    """`amount` of the rows (N, Z), drawn with probabilities in proportion to the squared distance from the nearest code."""
    error = (rows - codes[nearest(rows, codes)[0]]).square().sum(1).double()
    edges = (error + 1e-12 + 1e-3 * error.mean()).cpu().cumsum(0)                                # CUDA's differs from run to run
    draw = torch.rand(amount, generator=generator, dtype=torch.float64) * edges[-1]
    return rows[torch.searchsorted(edges, draw).clamp_max(len(rows) - 1).to(rows.device)]


def gathered(count: Tensor, total: Tensor, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over all processes, and their latents in the order of the ranks; the same again where there is one process."""
    dist = torch.distributed
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return count, total, latents
    dist.all_reduce(count)
    dist.all_reduce(total)
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, latents.cpu())                 # of different lengths where a rank's share is smaller
    return count, total, torch.cat(every).to(latents.device)


class FiniteScalarQuantizer(nn.Module):
    """Each latent channel bounded by tanh and rounded to one of `levels` values (FSQ, arXiv:2309.15505, Sec. 3.1 and App. A.1).

    z (B, Z, d, h, w) -> Codes, z_q in [-1, 1]. No codebook is learned, so none can collapse; vq_loss is 0. Float32 or wider inside.
    """
    def __init__(self, levels: Sequence[int]):
        super().__init__()
        self.levels, self.num_codes = tuple(levels), prod(levels)
        self.bases = [prod(self.levels[:i]) for i in range(len(self.levels))]

    def forward(self, z: Tensor, generator=None) -> Codes:
        if z.shape[1] != len(self.levels):
            raise ValueError(f"FiniteScalarQuantizer: {len(self.levels)} levels, got z with {z.shape[1]} channels; "
                             f"make vae.z_channels the number of vae.fsq_levels")
        with torch.autocast(z.device.type, enabled=False):
            x = z.to(torch.promote_types(z.dtype, torch.float32)).movedim(1, -1)                 # (B, d, h, w, Z)
            levels = torch.tensor(self.levels, dtype=x.dtype, device=x.device)
            half, offset = (levels - 1) * (1 + 1e-3) / 2, (1 - levels % 2) / 2                   # even numbers of levels: half a step aside
            bounded = (x + (offset / half).atanh()).tanh() * half - offset
            rounded, width = bounded.detach().round(), levels.div(2, rounding_mode="floor")
            index = ((rounded + width).long() * torch.tensor(self.bases, device=x.device)).sum(-1)
            z_q = StraightThrough.apply(bounded / width, rounded / width).movedim(-1, 1)
        return Codes(z_q, z_q.new_zeros(()), index)

    def update(self, generator=None) -> None:
        """Nothing to learn; the same call as VectorQuantizer's."""

    def lookup(self, index: Tensor) -> Tensor:
        """index (B, d, h, w) -> z_q (B, Z, d, h, w)."""
        digits = [index // base % n for base, n in zip(self.bases, self.levels)]
        return torch.stack([(digit - n // 2) / (n // 2) for digit, n in zip(digits, self.levels)], 1)


# ------------------------------------------------------------------------------------------------ Exact tiled execution
# A stretch is a run of local layers. It is unrolled into operations; from the operations' own attributes, interval
# arithmetic tells which input a tile of the output needs (`pull`), axis by axis; `Tiled` runs a stretch tile by tile,
# keeps its input alone, and computes each tile again in backward. A tile reads exactly its receptive field, zeros stand
# where the volume ends and nowhere else, so each voxel comes out as the untiled layers make it. Like checkpointing
# (arXiv:1604.06174) in time, but in space too; the halo is the receptive-field arithmetic of distill.pub/2019/computing-receptive-fields.
# The ranks of a process group may share the tiles: whatever a pass over the tiles adds up, or writes, is then summed over them.

class Fork(NamedTuple):
    """Remember the tensor here for the Join that closes the residual branch."""


class Join(NamedTuple):
    """Add skip(remembered tensor)."""
    skip: nn.Module


Op = nn.Module | Fork | Join
LOCAL = (nn.Conv3d, nn.ConvTranspose3d, nn.Upsample, nn.ConstantPad3d, nn.SiLU, ChannelNorm, GroupNorm)  # GroupNorm: given its statistics


def unroll(layer: nn.Module) -> list[Op] | None:
    """A layer as its operations in order; None when an output voxel may depend on the whole volume (attention, kinds not known here)."""
    if isinstance(layer, ResBlock3d):
        branch = nn.Sequential(layer.norm1, layer.act, layer.conv1, layer.norm2, layer.act, layer.conv2)
        return [Fork(), *unroll(branch), Join(layer.skip)]
    if isinstance(layer, nn.Sequential):
        parts = [unroll(child) for child in layer]
        return None if None in parts else sum(parts, [])
    if isinstance(layer, nn.Identity):
        return []
    return [layer] if isinstance(layer, LOCAL) else None


class Cut(NamedTuple):
    """One operation of one tile along one axis: zeros added at the volume's ends, then outputs [crop, crop + length) are kept."""
    pad: tuple[int, int]                                         # convolution: both sides by the first; transposed: (0, output_padding)
    crop: int
    length: int


class Span(NamedTuple):
    """One tile along one axis. Equal cuts and lengths mean equal work, wherever the tile lies."""
    source: tuple[int, int]                                      # interval read from the stretch's input
    target: tuple[int, int]                                      # interval written to its output; these partition the output
    cuts: tuple[Cut, ...]                                        # one an operation


def out_size(op: Op, axis: int, n: int) -> int:
    """Length of an operation's output along one axis, from its input's."""
    if isinstance(op, nn.Conv3d):
        return (n + 2 * op.padding[axis] - op.dilation[axis] * (op.kernel_size[axis] - 1) - 1) // op.stride[axis] + 1
    if isinstance(op, nn.ConvTranspose3d):
        return ((n - 1) * op.stride[axis] - 2 * op.padding[axis] + op.dilation[axis] * (op.kernel_size[axis] - 1)
                + op.output_padding[axis] + 1)
    if isinstance(op, nn.Upsample):
        return n * int(op.scale_factor[axis])
    return n + sum(pads(op, axis)) if isinstance(op, nn.ConstantPad3d) else n


def pads(op: nn.ConstantPad3d, axis: int) -> tuple[int, int]:
    return op.padding[4 - 2 * axis], op.padding[5 - 2 * axis]    # F.pad counts from the last axis


def pull(op: Op, axis: int, lo: int, hi: int, n: int) -> tuple[int, int, Cut]:
    """Input interval [start, stop) from which `op` makes its outputs [lo, hi) on an axis of n inputs, and how."""
    if isinstance(op, nn.Conv3d):
        stride, padding = op.stride[axis], op.padding[axis]
        start, stop = lo * stride - padding, (hi - 1) * stride - padding + op.dilation[axis] * (op.kernel_size[axis] - 1) + 1
        if start >= 0 and stop <= n:                             # inside the volume: no zeros, no waste
            return start, stop, Cut((0, 0), 0, hi - lo)
        start = max(0, start) // stride * stride                 # the padded convolution's outputs count from a multiple of the stride
        return start, min(n, stop), Cut((padding, padding), lo - start // stride, hi - lo)
    if isinstance(op, nn.ConvTranspose3d):                       # input i feeds outputs i * stride - padding + [0, reach]
        stride, padding, reach = op.stride[axis], op.padding[axis], op.dilation[axis] * (op.kernel_size[axis] - 1)
        start, stop = max(0, -(-(lo + padding - reach) // stride)), min(n, (hi - 1 + padding) // stride + 1)
        missing = max(0, hi - ((stop - 1) * stride - padding + reach + 1))
        return start, stop, Cut((0, missing), lo - (start * stride - padding), hi - lo)
    if isinstance(op, nn.Upsample):
        factor = int(op.scale_factor[axis])
        if op.mode == "nearest":
            return lo // factor, -(-hi // factor), Cut((0, 0), lo % factor, hi - lo)
        start = max(0, (2 * lo + 1 - factor) // (2 * factor))    # linear: output i lies at input (i + 1/2) / factor - 1/2
        stop = min(n, -(-(2 * hi - 1 - factor) // (2 * factor)) + 1)
        return start, stop, Cut((0, 0), lo - start * factor, hi - lo)
    if isinstance(op, nn.ConstantPad3d):
        before, _ = pads(op, axis)
        start, stop = max(0, lo - before), min(n, hi - before)
        return start, stop, Cut((start - lo + before, hi - before - stop), 0, hi - lo)
    return lo, hi, Cut((0, 0), 0, hi - lo)


def rates(ops: Sequence[Op], axis: int) -> list[int]:
    """Voxels per unit along one axis before each operation and after the last. A unit is as long as the stretch's strides need it."""
    found = [prod(op.stride[axis] for op in ops if isinstance(op, nn.Conv3d))]
    for op in ops:
        down = op.stride[axis] if isinstance(op, nn.Conv3d) else 1
        up = op.stride[axis] if isinstance(op, nn.ConvTranspose3d) else int(op.scale_factor[axis]) if isinstance(op, nn.Upsample) else 1
        found.append(found[-1] // down * up)
    return found


def spans(ops: Sequence[Op], axis: int, n: int, step: int, end: int) -> list[Span]:
    """Tiles of `step` units along an axis of n inputs, through ops[:end]: their targets partition what ops[:end] give."""
    rate, sizes = rates(ops, axis), [n]
    for op in ops[:end]:
        sizes.append(out_size(op, axis, sizes[-1]))
    edges = [e for e in range(0, -(-n // rate[0]) * rate[end], step * rate[end]) if e < sizes[-1]] + [sizes[-1]]
    found = []
    for target in zip(edges, edges[1:]):
        (lo, hi), cuts, branches = target, [], []
        for i in reversed(range(end)):
            if isinstance(ops[i], Fork) and branches:            # both branches read here; none is open if ops[:end] ends in a block
                join, skip = branches.pop()
                cut = Cut((0, 0), lo, hi - lo)
                lo, hi = min(lo, skip[0]), max(hi, skip[1])
                cuts[join] = cuts[join]._replace(crop=skip[0] - lo)
                cuts.append(cut._replace(crop=cut.crop - lo))
            else:
                if isinstance(ops[i], Join):
                    branches.append((len(cuts), (lo, hi)))
                lo, hi, cut = pull(ops[i], axis, lo, hi, sizes[i])
                cuts.append(cut)
        found.append(Span((lo, hi), target, tuple(reversed(cuts))))
    return found


class Stretch(NamedTuple):
    """Operations to run in tiles of `step` units (D, H, W); `tick` is told the share of the forward pass that is done."""
    ops: tuple[Op, ...]
    step: tuple[int, int, int]
    tick: Callable[[float], None] | None = None
    group: torch.distributed.ProcessGroup | None = None          # ranks that share the tiles; None: this process has them all

    def tiles(self, x: Tensor, end: int | None = None) -> Iterator[tuple[Span, Span, Span]]:
        """This rank's tiles through ops[:end]. On fake tensors (memory prediction) one of each kind: its repeats cost the same.

        The largest are dealt out first, so that no rank has more than another by more than the largest tile.
        """
        end = len(self.ops) if end is None else end
        axes = [spans(self.ops, axis, x.shape[2 + axis], self.step[axis], end) for axis in range(3)]
        if isinstance(x, torch._subclasses.FakeTensor):
            axes = [list({(s.source[1] - s.source[0], s.cuts): s for s in axis}.values()) for axis in axes]
        if self.group is None:
            return product(*axes)
        by_size = sorted(product(*axes), key=lambda tile: -prod(s.source[1] - s.source[0] for s in tile))
        return iter(by_size[self.group.rank()::self.group.size()])

    def size(self, x: Tensor, end: int | None = None) -> list[int]:
        """(D, H, W) of what ops[:end] give for x."""
        size = list(x.shape[2:])
        for op in self.ops[:end]:
            size = [out_size(op, axis, n) for axis, n in enumerate(size)]
        return size

    def blank(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Zeros for the stretch's output, in channels_last_3d where x or a weight is, as convolutions give it; the same on every rank."""
        convs, last = [op for op in self.ops if isinstance(op, (nn.Conv3d, nn.ConvTranspose3d))], torch.channels_last_3d
        found = any(t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in (x, *(op.weight for op in convs)))
        shape = x.shape[0], convs[-1].out_channels if convs else x.shape[1], *self.size(x)
        return torch.empty(shape, dtype=dtype, device=x.device, memory_format=last if found else torch.contiguous_format).zero_()

    def norms(self) -> list[int]:
        return [i for i, op in enumerate(self.ops) if isinstance(op, GroupNorm)]

    def parameters(self) -> list[nn.Parameter]:
        return [p for op in self.ops for m in (op, getattr(op, "skip", None)) if isinstance(m, nn.Module) for p in m.parameters()]


def window(x: Tensor, intervals: Sequence[tuple[int, int]]) -> Tensor:
    """View of (B, C, D, H, W) on an interval per axis."""
    for axis, (lo, hi) in enumerate(intervals):
        if (lo, hi) != (0, x.shape[2 + axis]):
            x = x.narrow(2 + axis, lo, hi - lo)
    return x


def run_tile(stretch: Stretch, tile: tuple[Span, Span, Span], x: Tensor, weights: dict, stats: dict) -> Tensor:
    """One tile through its operations: x is the window `source` of the input, the result the window `target` of the output.

    weights: parameter -> tensor to use for it. stats: index of a GroupNorm -> mean and variance (B, groups) of the whole volume.
    """
    remembered = []
    for i, (op, *cuts) in enumerate(zip(stretch.ops, *(span.cuts for span in tile))):
        crops = [(c.crop, c.crop + c.length) for c in cuts]
        if isinstance(op, Fork):
            remembered.append(x)
        elif isinstance(op, Join):
            skip = window(remembered.pop(), crops)
            if isinstance(op.skip, nn.Conv3d):
                skip = F.conv3d(skip, weights[op.skip.weight], weights.get(op.skip.bias))
            x = skip + x
            continue
        elif isinstance(op, nn.Conv3d):
            x = F.conv3d(x, weights[op.weight], weights.get(op.bias), op.stride, [c.pad[0] for c in cuts], op.dilation, op.groups)
        elif isinstance(op, nn.ConvTranspose3d):
            more = [c.pad[1] for c in cuts]
            x = F.conv_transpose3d(x, weights[op.weight], weights.get(op.bias), op.stride, 0, more, op.groups, op.dilation)
        elif isinstance(op, nn.ConstantPad3d):
            x = F.pad(x, [p for c in reversed(cuts) for p in c.pad], value=op.value)
        elif isinstance(op, GroupNorm):
            x = op.normalise(x, *stats[i], weights[op.weight], weights[op.bias])
        elif isinstance(op, ChannelNorm):
            x = op.normalise(x, weights[op.weight], weights[op.bias])
        else:
            x = op(x)
        x = window(x, crops)
    return x


@contextmanager
def together(group: torch.distributed.ProcessGroup | None, like: Tensor) -> Iterator[None]:
    """For what the ranks of a group do apart, before they meet in a collective: if it fails on one rank, it raises on all of them.

    The others would wait for ever. They raise torch.OutOfMemoryError where memory was short, so that all can turn the dial together, else
    RuntimeError. Costs one all_reduce of 4 bytes, on the device of `like`. May be nested: a failure is told once.
    """
    if group is None:
        yield
        return
    dist, told = torch.distributed, like.new_zeros((), dtype=torch.int32)                        # later there may be no room for it
    try:
        yield
    except Exception as error:
        if not getattr(error, "told", False):
            error.told = True
            dist.all_reduce(told.fill_((1 if is_out_of_memory(error) else 2) * group.size() + group.rank()), dist.ReduceOp.MAX, group)
        raise
    dist.all_reduce(told, dist.ReduceOp.MAX, group)
    kind, rank = divmod(int(told), group.size())
    if kind:
        error = (torch.OutOfMemoryError(f"out of memory on rank {rank} of those that share the tiles") if kind == 1 else
                 RuntimeError(f"rank {rank} of those that share the tiles failed; its own message says why"))
        error.told = True
        raise error


def is_out_of_memory(error: Exception) -> bool:
    """CUDA's error, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error) or "out of memory" in str(error)


def add_up(t: Tensor, group: torch.distributed.ProcessGroup | None) -> None:
    """t becomes the sum over the ranks, the same bits on each (torch promises that of all_reduce). Dense, its layout the same on all."""
    if group is not None:
        torch.distributed.all_reduce(t.as_strided((t.numel(),), (1,)), group=group)


def volume_statistics(parts: Iterator[Tensor], groups: int, group: torch.distributed.ProcessGroup | None = None,
                      zero: Tensor | int = 0, voxels: int = 0) -> tuple[Tensor, Tensor]:
    """Mean and variance (B, groups) of a volume that comes in tiles (B, C, d, h, w), merged stably (Chan et al. 1979), float32 or wider.

    With a group, `parts` are this rank's, perhaps none; zero: (B, C) in the result's type; voxels: of the whole volume, a channel.
    """
    count, mean, spread = 0, zero, zero                          # of each channel: (B, C); spread: sum of squared deviations
    with together(group, zero):
        for part in parts:
            n = part[0, 0].numel()
            var, centre = torch.var_mean(part.to(torch.promote_types(part.dtype, torch.float32)), (2, 3, 4), correction=0)
            apart = centre - mean
            spread = spread + var * n + apart.square() * (count * n / (count + n))
            mean, count = mean + apart * (n / (count + n)), count + n
    if group is not None:                                        # the mean first, then the deviations from it
        whole = mean * (count / voxels)
        add_up(whole, group)
        spread = spread + (mean - whole).square() * count
        add_up(spread, group)
        mean, count = whole, voxels
    mean, var = mean.unflatten(1, (groups, -1)), (spread / count).unflatten(1, (groups, -1))
    return mean.mean(2), var.mean(2) + mean.var(2, correction=0)


def activation_dtype(x: Tensor) -> torch.dtype:
    """What convolutions give for x here: autocast's type (it leaves float64 alone), else x's own."""
    lowered = torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    return torch.get_autocast_dtype(x.device.type) if lowered else x.dtype


def statistics_gradient(x: Tensor, target: object, mean: Tensor, grad_mean: Tensor, grad_var: Tensor, voxels: int) -> Tensor:
    """Gradient of a tile x (B, C, d, h, w) through mean and variance (B, groups) of a volume of `voxels` a channel."""
    width = x.shape[1] // mean.shape[1]
    m, gm, gv = (t.repeat_interleave(width, 1)[..., None, None, None] for t in (mean, grad_mean, grad_var))
    return ((gm + 2 * gv * (x - m)) / (width * voxels)).to(x.dtype)


class Tiled(torch.autograd.Function):
    """Run a stretch tile by tile. Kept for backward: its input, and mean and variance of each GroupNorm.

    GroupNorm's statistics are inputs of the tile's function. Forward gathers them in order, with one pass per norm over the
    operations before it. Backward goes over the whole stretch once, which gives the gradient of every statistic too; then, for
    the last norm first, a pass over the operations before it carries that gradient to the input, to the parameters and to
    earlier statistics: d mean / d x = 1 / n, d var / d x = 2 (x - mean) / n. Parameters are inputs of this function, so their
    gradients take autograd's ordinary way (DDP's hooks, accumulation). Inside, autocast is off and its casts are explicit, once a pass.

    With a group each rank runs its own tiles and ends with what one process alone has, the same bits on all ranks: the output and the
    gradients of input, parameters and statistics are sums over the ranks. Every rank must make the same calls with the same values.
    """
    @staticmethod
    def forward(ctx, stretch: Stretch, x: Tensor, *parameters: Tensor) -> Tensor:
        device, cast, dtype, group = x.device.type, torch.is_autocast_enabled(x.device.type), activation_dtype(x), stretch.group
        kept = []
        weights = {p: value.to(dtype) if cast else value for p, value in zip(stretch.parameters(), parameters)}
        stats = {}
        with torch.autocast(device, enabled=False):
            def read(tile):
                return window(x, [s.source for s in tile]).to(dtype)

            for i in stretch.norms():
                parts = (run_tile(stretch, tile, read(tile), weights, stats) for tile in stretch.tiles(x, i))
                zero = x.new_zeros(x.shape[0], stretch.ops[i].num_channels, dtype=torch.promote_types(dtype, torch.float32))
                stats[i] = volume_statistics(parts, stretch.ops[i].num_groups, group, zero, prod(stretch.size(x, i)))
                kept += stats[i]
            tiles = list(stretch.tiles(x))
            with together(group, x):
                out = stretch.blank(x, dtype)
                for number, tile in enumerate(tiles, 1):
                    window(out, [s.target for s in tile]).copy_(run_tile(stretch, tile, read(tile), weights, stats))
                    if stretch.tick is not None:
                        stretch.tick(number / len(tiles))
            add_up(out, group)                                   # zeros but for this rank's tiles, so nothing is rounded
        ctx.stretch, ctx.cast, ctx.dtype = stretch, cast, dtype
        ctx.save_for_backward(x, *kept, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        stretch, norms, group = ctx.stretch, ctx.stretch.norms(), ctx.stretch.group
        with together(group, grad_out):
            x, *rest = ctx.saved_tensors
            kept, values, needed = rest[:2 * len(norms)], rest[2 * len(norms):], ctx.needs_input_grad[2:]
            stats = {i: [t.detach().requires_grad_() for t in kept[2 * k:2 * k + 2]] for k, i in enumerate(norms)}
            weights = {p: (v.detach().to(ctx.dtype) if ctx.cast else v.detach()).requires_grad_(n)
                       for p, v, n in zip(stretch.parameters(), values, needed)}
            inputs = [w for w in weights.values() if w.requires_grad] + [s for pair in stats.values() for s in pair]
            sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in inputs]
            wider = torch.promote_types(x.dtype, torch.float32) if norms else x.dtype  # a norm's gradients nearly cancel: summed unrounded
            grad_x = torch.zeros_like(x, dtype=wider) if ctx.needs_input_grad[1] else None

        def one_pass(end, grad_of):
            """Recompute ops[:end] a tile at a time; add what `grad_of` its output gives to `sums` and `grad_x`."""
            for tile in stretch.tiles(x, end):
                source = [s.source for s in tile]
                part = window(x, source).detach().to(ctx.dtype).requires_grad_(grad_x is not None)
                with torch.enable_grad():
                    y = run_tile(stretch, tile, part, weights, stats)
                if y.requires_grad:
                    wanted = inputs if grad_x is None else [*inputs, part]
                    grads = torch.autograd.grad(y, wanted, grad_of(y.detach(), [s.target for s in tile]), allow_unused=True)
                    for total, grad in zip(sums, grads):
                        if grad is not None:
                            total += grad
                    if grad_x is not None:
                        window(grad_x, source).add_(grads[-1])   # halos overlap: add

        with torch.autocast(x.device.type, enabled=False):
            with together(group, grad_out):
                one_pass(len(stretch.ops), lambda y, target: window(grad_out, target))
            for k, i in reversed(list(enumerate(norms))):
                at = len(sums) + 2 * (k - len(norms))            # the last sums are the gradients of mean and variance
                grads = sums[at:at + 2]
                for each in grads:                               # whole: every pass that adds to them is over
                    add_up(each, group)
                mean, voxels = stats[i][0].detach(), prod(stretch.size(x, i))
                with together(group, grad_out):
                    one_pass(i, partial(statistics_gradient, mean=mean, grad_mean=grads[0], grad_var=grads[1], voxels=voxels))
        for each in sums[:len(sums) - 2 * len(norms)] + ([] if grad_x is None else [grad_x]):
            add_up(each, group)
        found = iter(sums)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        return None, grad_x, *(next(found).to(v.dtype) if n else None for v, n in zip(values, needed))


def run_tiled(layers: Sequence[nn.Module], step: tuple[int, int, int], x: Tensor, tick: Callable[[float], None] | None = None,
              group: torch.distributed.ProcessGroup | None = None) -> Tensor:
    """nn.Sequential(*layers)(x) in tiles of `step` units, without keeping what is between; shared among the ranks of a group."""
    stretch = Stretch(tuple(unroll(nn.Sequential(*layers))), step, tick, group)
    return Tiled.apply(stretch, x, *stretch.parameters())


# Which stretches, which tiles: a cost model made of the same spans.

KEEP_THEIR_INPUT = nn.Conv3d, Upsample3d, Head                   # and nothing else for backward: there is nothing to checkpoint


class Segment(NamedTuple):
    """layers[start:stop] of the encoder or decoder."""
    start: int
    stop: int
    step: tuple[int, int, int] | None                            # of a tiled stretch: units a tile; None: one checkpointed layer


class TilePlan(NamedTuple):
    """A setting of the dial, memory("tile", plan.tile, plan.stretch), and what it is expected to cost."""
    tile: tuple[int, int, int]                                   # (D, H, W) in voxels of the input
    stretch: str                                                 # levels a stretch, highest resolution first: "1", "2", "2+1"
    work: float                                                  # time of a training step over the checkpointed one's
    peak_bytes: int                                              # of a training step: weights, gradients, AdamW's moments, activations
    segments: tuple[tuple[Segment, ...], tuple[Segment, ...]]    # what to do with the layers of encoder and decoder


class Piece(NamedTuple):
    """layers[start:stop]: local ones to run as a stretch, or a single one to checkpoint (group None)."""
    start: int
    stop: int
    group: int | None                                            # which stretch of the setting
    ops: tuple[Op, ...] | None
    size: tuple[int, int, int]                                   # (D, H, W) of its input
    after: tuple[int, int, int]                                  # of its output
    held: tuple[int, int]                                        # elements of its input and of its output


class Tiling(NamedTuple):
    """What a piece costs in tiles of `step` units."""
    work: float                                                  # a quarter of a step's multiply-adds, halos and passes for norms included
    elements: float                                              # activations alive while one tile's gradient is computed
    step: tuple[int, int, int] | None


TILE_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)                     # tiles along an axis that `auto` tries
LEAST_TILE = 8                                                   # voxels of a piece's finest grid; below, nearly all is halo
WORK_BOUND = 1.4                                                 # without a budget: the least memory within this much time
MOVE_COST = 32                                                   # multiply-adds that reading and writing one element is worth


def levels(layers: Sequence[nn.Module]) -> list[int]:
    """Level of each layer by the finer of its two grids, 0 the finest: a down-convolution goes with what precedes it."""
    before, finest = (prod(rates(flatten(layers), axis)[0] for axis in range(3))), []
    for layer in layers:
        ops, after = flatten([layer]), before
        for axis in range(3):
            rate = rates(ops, axis)
            after = after * rate[-1] // rate[0]
        finest.append(max(before, after))
        before = after
    return [sorted(set(finest), reverse=True).index(f) for f in finest]


def flatten(layers: Sequence[nn.Module]) -> tuple[Op, ...]:
    """Operations of the local ones among `layers`."""
    return tuple(op for layer in layers for op in unroll(layer) or ())


def channels_in(layers: nn.Module) -> int:
    return next(m.in_channels for m in layers.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d)))


def pieces(layers: nn.Sequential, size: Sequence[int], groups: Sequence[int]) -> list[Piece]:
    """Cut the layers: groups[0] levels from the finest make a stretch, the next groups[1] another ...; the rest is checkpointed."""
    group_of = [g for g, count in enumerate(groups) for _ in range(count)]
    found: list[Piece] = []
    for i, (layer, level) in enumerate(zip(layers, levels(layers))):
        ops = unroll(layer)
        group = group_of[level] if ops is not None and level < len(group_of) else None
        after, width = size, [m.out_channels for m in layer.modules() if isinstance(m, (nn.Conv3d, nn.ConvTranspose3d))][-1]
        for op in ops or ():
            after = tuple(out_size(op, axis, n) for axis, n in enumerate(after))
        held = channels_in(layer) * prod(size), width * prod(after)
        if found and group is not None and found[-1].group == group:
            last = found.pop()
            found.append(last._replace(stop=i + 1, ops=(*last.ops, *ops), after=after, held=(last.held[0], held[1])))
        else:
            found.append(Piece(i, i + 1, group, None if ops is None else tuple(ops), tuple(size), tuple(after), held))
        size = after
    return found


def units(piece: Piece) -> list[int]:
    return [-(-n // rates(piece.ops, axis)[0]) for axis, n in enumerate(piece.size)]


def tiling(piece: Piece, step: tuple[int, int, int] | None, ranks: int = 1) -> Tiling:
    """Cost of a piece in tiles of `step` units, shared by so many ranks, or whole, as checkpointing runs it, where step is None."""
    if piece.ops is None:                                        # attention: its convolutions, q k^T and the product with v, flash
        voxels = prod(piece.size)
        return Tiling(piece.held[0] * (4 * piece.held[0] // voxels + 2 * voxels), 10 * piece.held[0], None)
    found = [spans(piece.ops, axis, n, step[axis] if step else n, len(piece.ops)) for axis, n in enumerate(piece.size)]
    lengths = [list(zip(*([cut.length for cut in span.cuts] for span in axis))) for axis in found]  # per axis, operation, tile
    norms = [i for i, op in enumerate(piece.ops) if step and isinstance(op, GroupNorm)]
    width, work, alive = piece.held[0] // prod(piece.size), 0.0, []
    for i, op in enumerate(piece.ops):
        taps = 0.0
        if isinstance(op, (nn.Conv3d, nn.ConvTranspose3d)):
            width, taps = op.out_channels, op.weight.numel() / op.out_channels
            done = work                                          # before the last convolution, when the loop is over
        passes = 1 + sum(i < norm for norm in norms)
        voxels, largest = prod(sum(axis[i]) for axis in lengths), prod(max(axis[i]) for axis in lengths)  # tiles are products of spans
        work += passes * voxels * width * (taps + MOVE_COST)
        alive.append(0 if isinstance(op, Fork) else width * largest)
    if step is None:                                             # of forward, again, backward twice as long, torch's checkpoint
        work -= (work - done) / 4                                # leaves out again what nothing is kept of: from the last convolution on
    else:
        tiles = prod(map(len, found))
        work *= -(-tiles // ranks) / tiles                       # of the rank that has most
    return Tiling(work, sum(alive) + 2 * max(alive), step)


def cheapest(costs: Sequence[Tiling], limit: float) -> Tiling:
    """Least work within `limit` elements; where nothing fits, the fewest elements."""
    return min((c for c in costs if c.elements <= limit), default=min(costs, key=lambda c: c.elements), key=lambda c: c.work)


def pareto(found: list, work, memory) -> list:
    """Those that nothing else beats in both, by rising work."""
    kept: list = []
    for item in sorted(found, key=lambda item: (work(item), memory(item))):
        if not kept or memory(item) < memory(kept[-1]):
            kept.append(item)
    return kept


def steps_of(piece: Piece, tile: Sequence[int]) -> tuple[int, ...]:
    """Units of a tile that is at most so many voxels of the piece's finer grid, all tiles as equal as units allow."""
    steps = []
    for axis, n in enumerate(units(piece)):
        count = -(-n // max(1, tile[axis] // max(rates(piece.ops, axis))))
        steps.append(-(-n // count))
    return tuple(steps)


def tile_ladder(fine: Sequence[int]) -> list[tuple[int, int, int]]:
    """Tiles that `auto` tries on a grid, from the whole of it down; each cuts the longest axis of the one before, for the least halo."""
    counts = [[n for n in TILE_COUNTS if n == 1 or size >= n * LEAST_TILE] for size in fine]
    at, found = [0, 0, 0], []
    while True:
        tile = tuple(-(-size // each[i]) for size, each, i in zip(fine, counts, at))
        found.append(tile)
        open_axes = [axis for axis in range(3) if at[axis] + 1 < len(counts[axis])]
        if not open_axes:
            return found
        at[max(open_axes, key=lambda axis: tile[axis])] += 1


def make_plans(sides: Sequence[nn.Sequential], sizes: Sequence[tuple[int, int, int]], batch_bytes: int, weights: int,
               tile: Sequence[int] | None, stretches: Sequence[str], ranks: int = 1) -> list[TilePlan]:
    """Every setting of the dial worth having, by rising work and falling peak.

    sides, sizes: encoder and decoder, (D, H, W) of their inputs. batch_bytes: of one activation over the batch. weights: their number.
    The tile is that of the stretches that reach the volume's own resolution. A stretch of lower levels takes the tile of least work
    that needs no more memory than theirs: no two are computed at once, so the largest decides.
    """
    tables: dict = {}                                            # the same piece occurs in several settings

    def cost(piece: Piece, step: tuple[int, int, int] | None) -> Tiling:
        key = piece.size, piece.held, piece.ops, step
        if key not in tables:
            tables[key] = tiling(piece, step, ranks)
        return tables[key]

    base = sum(cost(piece, None).work for side, size in zip(sides, sizes) for piece in pieces(side, size, ()))
    found = []
    for stretch in stretches:
        parts = [pieces(side, size, [int(n) for n in stretch.split("+")]) for side, size in zip(sides, sizes)]
        order = [piece for side in parts for piece in side]
        tiled = [piece for piece in order if piece.group is not None]
        top = [piece for piece in tiled if sizes[0] in (piece.size, piece.after)]
        lower = {id(piece): [cost(piece, steps_of(piece, t)) for t in tile_ladder([max(pair) for pair in zip(piece.size, piece.after)])]
                 for piece in tiled if piece not in top}
        for choice in [tuple(tile)] if tile else tile_ladder(sizes[0]):
            costs = {id(piece): cost(piece, steps_of(piece, choice) if piece in top else None) for piece in order if id(piece) not in lower}
            limit = max(costs[id(piece)].elements for piece in top)
            costs.update((key, cheapest(each, limit)) for key, each in lower.items())
            peak, kept, recon = 0.0, 0, order[-1].held[1]
            for piece in order:                                  # its backward: inputs up to here, reconstruction, two gradients
                kept += piece.held[0]
                peak = max(peak, kept + recon + sum(piece.held) + costs[id(piece)].elements)
            segments = tuple(tuple(Segment(p.start, p.stop, costs[id(p)].step) for p in side) for side in parts)
            work = sum(each.work for each in costs.values()) / base
            found.append(TilePlan(choice, stretch, work, int(peak * batch_bytes) + 16 * weights, segments))
    return pareto(found, lambda plan: plan.work, lambda plan: plan.peak_bytes)


def compositions(total: int) -> list[str]:
    """Every way to make stretches of the levels from the finest down: 2 -> "1", "1+1", "2"."""
    found = {1: ["1"]}
    for n in range(2, total + 1):
        found[n] = [str(n)] + [f"{first}+{rest}" for first in range(1, n) for rest in found[n - first]]
    return [each for n in range(1, total + 1) for each in found[n]]


class Posterior(NamedTuple):
    """Diagonal Gaussian over the latent."""
    mu: Tensor                                                   # (B, Z, d, h, w) float32
    logvar: Tensor                                               # (B, Z, d, h, w) float32, within LOGVAR_RANGE


class VAEOutput(NamedTuple):
    recon: Tensor                                                # (B, C, D, H, W), the input's size
    mu: Tensor                                                   # (B, Z, d, h, w) float32
    logvar: Tensor                                               # (B, Z, d, h, w) float32


class VQOutput(NamedTuple):
    recon: Tensor                                                # (B, C, D, H, W), the input's size
    vq_loss: Tensor                                              # () float32, weighted, ready to be added
    index: Tensor                                                # (B, d, h, w) int64 in [0, K)


@torch.no_grad()
def initialise(vae: VAE3D) -> None:
    """Start with a path on which the volume's signal reaches the reconstruction: variance-preserving where no branch goes around a layer.

    PyTorch's default divides the signal's scale by sqrt(3) at each convolution, and SiLU by 2 before each head, so that mu starts at 3 % of
    the volume's scale, under latent noise of scale 1. Here the straight path keeps the scale, the noise starts at exp(-3), and residual
    branches keep the default, which makes them small. CT crops, PSNR after 60 steps: 18.5 -> 22.2 dB (docs/LOG.md).
    """
    for layer in (*vae.encoder, *vae.decoder):
        if isinstance(layer, nn.Conv3d):
            layer.weight.mul_(3 ** 0.5)
        elif isinstance(getattr(layer, "conv", None), nn.ConvTranspose3d):
            layer.conv.weight.mul_((3 * prod(layer.conv.stride)) ** 0.5)                         # an output has 1 / stride of the taps
        elif isinstance(layer, nn.Sequential) and not isinstance(layer, Head):                   # between levels
            layer.conv.weight.mul_(3 ** 0.5)
        elif isinstance(layer, ResBlock3d) and isinstance(layer.skip, nn.Conv3d):
            layer.skip.weight.mul_(3 ** 0.5)
        elif isinstance(layer, Head):
            layer.conv.weight.mul_((2 if vae.cfg.head_act else 1) * 3 ** 0.5)
    head, z = getattr(vae.encoder, "quant_conv", vae.encoder.head.conv), vae.cfg.z_channels
    head.weight[z:].mul_(0.03)                                   # logvar (kl): nearly constant at first
    head.bias[z:].fill_(-6.0)


class VAE3D(nn.Module):
    """Encoder, bottleneck and decoder: x (B, C, D, H, W) in [-1, 1] -> VAEOutput(recon, mu, logvar), or VQOutput(recon, vq_loss, index).

    Any D, H, W >= 1: the input is padded at its far ends to the stride's multiple by repeating the border, and the reconstruction is
    cropped back.
    Raises ValueError when x is not 5D or its channels are not cfg.in_channels.
    """
    def __init__(self, cfg: VAEConfig):
        super().__init__()
        self.cfg = cfg
        self.encoder = build_encoder(cfg)
        self.decoder = build_decoder(cfg)
        self.quantizer: VectorQuantizer | FiniteScalarQuantizer | None = None
        if cfg.bottleneck == "vq":
            self.quantizer = VectorQuantizer(cfg.num_codes, cfg.z_channels, cfg.codebook_update, cfg.codebook_decay, cfg.codebook_cosine,
                                             cfg.codebook_restart, cfg.lambda_vq, cfg.lambda_commitment)
        elif cfg.bottleneck == "fsq":
            self.quantizer = FiniteScalarQuantizer(cfg.fsq_levels)
        self.progress: Callable[[float, int, str], None] | None = None  # (layers done, of how many, encoder | decoder), after each tile
        initialise(self)
        self.memory("none")

    @classmethod
    def from_preset(cls, name: str, **changes) -> VAE3D:
        """Build PRESETS[name] with some fields changed: VAE3D.from_preset("base", in_channels=4)."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
        return cls(dataclasses.replace(PRESETS[name], **changes))

    def memory(self, mode: str, tile: Sequence[int] | str | None = None, stretch: str = "auto", budget: float | None = None,
               group: torch.distributed.ProcessGroup | None = None, rehearsal: bool = False) -> VAE3D:
        """Set the memory dial and return self; may be called again at any time. It changes peak memory and time, never the result.

        none: what precedes a convolution (norm, SiLU, upsampling) is computed again in backward, everything else is kept. checkpoint:
        of each layer (block, up/down convolution, head) the input alone is kept (arXiv:1604.06174). tile: stretches of layers run tile by
        tile, exactly, and keep their input alone; the layers outside of them are checkpointed.

        tile: (D, H, W) in voxels of the input, at most; rounded down to the stretch's stride; an axis longer than the volume's is not
        cut (slabs). "auto" or None: chosen. Stretches of lower levels find their own tile within the same memory.
        stretch: levels a stretch, from the highest resolution down, the same for encoder and decoder: "1" tiles the top level, "2" the
        two upper ones together, "2+1" those and then the next apart, "3" three as one; levels that are not named are checkpointed.
        Attention is never tiled. "auto": chosen.
        budget: GiB that a whole training step may take. `tile_plans` lists the choices; what is left to "auto" is the one of least
        recomputation whose predicted peak fits, or the one of least memory where none does. Without a budget: with a tile given, the
        least memory; on CUDA 90 % of what is free at the first volume of a size; elsewhere the least memory whose step takes at most
        1.4 times as long as a checkpointed one.
        group: mode tile: the ranks of this torch.distributed process group share the tiles of the same volume, in forward, backward and
        inference; None: this process alone. Layers outside of stretches run on every rank alike, and a rank beyond the number of tiles
        idles, so what is left to "auto" counts the ranks. Every rank must have the same weights and dial and make the same calls in the
        same order with the same values: input, `generator` (None: each rank draws other noise), requires_grad, backward; a rank that does
        not leaves the others waiting. Each then ends with the same output and the same whole gradients, bit for bit where kernels are
        deterministic: a step must not sum or average them over the ranks again. Latents are collected alike too, so quantizer.update()
        sums nothing. Where the tiles of one rank fail, all raise, for want of memory torch.OutOfMemoryError (see `together`). A copy of
        the network runs alone until its own memory() is called.
        Raises ValueError for an unknown mode, a tile that is not three positive integers, a stretch that is not such a sum, or a group that
        this process does not belong to.
        """
        if mode not in MEMORY_MODES:
            raise ValueError(f"memory mode must be one of {', '.join(MEMORY_MODES)}, got {mode!r}")
        tile = None if tile is None or tile == "auto" else tuple(tile)
        if tile is not None and (len(tile) != 3 or not all(isinstance(n, int) and n > 0 for n in tile)):
            raise ValueError(f"memory tile must be three positive integers D,H,W in voxels of the input, or auto; got {tile}")
        if stretch != "auto" and not all(part.isdecimal() and int(part) > 0 for part in str(stretch).split("+")):
            raise ValueError(f"memory stretch must be auto or levels a stretch such as 1, 2 or 2+1; got {stretch!r}")
        if group is not None and not isinstance(group, getattr(torch.distributed, "ProcessGroup", ())):
            raise ValueError(f"memory group must be a process group of torch.distributed that this process belongs to, got {group!r}")
        self.memory_mode, self.tile, self.stretch, self.budget = mode, tile, str(stretch), budget
        self.group = group if group is not None and group.size() > 1 else None
        if isinstance(self.quantizer, VectorQuantizer):
            self.quantizer.gather = self.group is None
        self._plans: dict = {}                                   # (size, batch, dtype, device) -> TilePlan
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"group": None}                   # for copy and pickle, which know no process groups

    @property
    def last_weight(self) -> nn.Parameter:
        """Of the last convolution: where gradients of reconstruction terms are compared (losses.adaptive_weight)."""
        return self.decoder.head.conv.weight

    def tile_plans(self, size: Sequence[int], batch: int = 1, dtype: torch.dtype = torch.float32) -> list[TilePlan]:
        """Settings of the tile mode for inputs (batch, C, *size), by rising work and falling predicted peak; what was set stays.

        dtype: of the activations; bfloat16 under AMP. The prediction counts live tensors of one training step with AdamW, for planning, and
        is an upper estimate, up to 40 % high; memtest.py has the true one.
        """
        size = tuple(-(-n // s) * s for n, s in zip(size, self.cfg.total_stride))
        stretches = compositions(max(levels(self.encoder)) + 1) if self.stretch == "auto" else [self.stretch]
        return make_plans((self.encoder, self.decoder), (size, self.latent_size(size)), batch * dtype.itemsize,
                          sum(p.numel() for p in self.parameters()), self.tile, stretches, self.group.size() if self.group else 1)

    def tile_plan(self, size: Sequence[int], batch: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> TilePlan:
        """The setting that the tile mode uses for such an input; kept until memory() is called again."""
        key = tuple(size), batch, dtype, str(device)
        if key not in self._plans:
            plans, budget = self.tile_plans(size, batch, dtype), self.budget
            if budget is None and self.tile is None and torch.device(device).type == "cuda" and torch.cuda.is_available():
                free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
                budget = 0.9 * free / 2 ** 30
                if self.group is not None:                       # the ranks need the same tiles
                    least = torch.tensor(budget, device=device)
                    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, self.group)
                    budget = float(least)
            if budget is not None:                               # plans rise in work and fall in memory
                fit = [plan for plan in plans if plan.peak_bytes <= budget * 2 ** 30][:1]
            else:
                bound = WORK_BOUND * min(1.0, plans[0].work)     # below 1 where ranks share the work
                fit = [plan for plan in plans if plan.work <= bound or self.tile][-1:]
            self._plans[key] = (fit or plans[-1:])[0]
        return self._plans[key]

    def latent_size(self, size: Sequence[int]) -> tuple[int, int, int]:
        """(D, H, W) of an input -> (d, h, w) of its latent."""
        return tuple(-(-n // s) for n, s in zip(size, self.cfg.total_stride))

    def encode(self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Posterior | Codes:
        """x (B, C, D, H, W) -> Posterior of the latent, or its Codes, float32 or wider. generator: see VectorQuantizer.forward."""
        z = self.latent(x)
        if self.quantizer is not None:
            return self.quantizer(z, generator)
        mu, logvar = z.chunk(2, dim=1)
        return Posterior(mu, logvar.clamp(*LOGVAR_RANGE))

    def latent(self, x: Tensor) -> Tensor:
        """The encoder's output, float32 or wider: (B, 2Z, d, h, w), or (B, Z, d, h, w) before it is quantised."""
        if x.dim() != 5 or x.shape[1] != self.cfg.in_channels:
            raise ValueError(f"VAE3D: built for (B, {self.cfg.in_channels}, D, H, W), got {tuple(x.shape)}; "
                             f"make vae.in_channels the number of channels of the data")
        x = pad_to_multiple(x, self.cfg.total_stride)
        if self.cfg.intensity_map != (1, 0):                     # not folded into the weights: zero padding is 0 of the inner range
            scale, shift = self.cfg.intensity_map
            x = x.mul(scale).add_(shift)
        z = self._run(self.encoder, x, x.shape[2:])
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def decode(self, z: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """z (B, Z, d, h, w) -> (B, C, D, H, W). `size` crops to the (D, H, W) of the volume that was encoded."""
        recon = self._run(self.decoder, z, [n * s for n, s in zip(z.shape[2:], self.cfg.total_stride)])
        if self.cfg.intensity_map != (1, 0):
            scale, shift = self.cfg.intensity_map
            recon = recon.sub_(shift).div_(scale)                # in place: no second volume; no convolution keeps its output
        return recon if size is None else recon[..., :size[0], :size[1], :size[2]]

    def decode_indices(self, index: Tensor, size: Sequence[int] | None = None) -> Tensor:
        """Codes (B, d, h, w) as `encode` gave them -> (B, C, D, H, W), as decode(z_q) gives it. ValueError without a codebook."""
        if self.quantizer is None:
            raise ValueError("decode_indices: vae.bottleneck is kl, which has no codes; use decode, or build with vq or fsq")
        return self.decode(self.quantizer.lookup(index), size)

    def forward(self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> VAEOutput | VQOutput:
        """Reconstruct x: through a sampled latent in training mode and through the mean in eval mode, or through its codes.

        generator: source of the latent noise (kl) or of replacements for dead codes (vq), one for the batch or one per sample (on the
        CPU, so that every device draws the same); None: torch's global one.
        """
        if self.quantizer is not None:
            z_q, vq_loss, index = self.encode(x, generator)
            return VQOutput(self.decode(z_q, x.shape[2:]), vq_loss, index)
        mu, logvar = self.encode(x)
        z = sample_posterior(mu, logvar, generator) if self.training else mu
        return VAEOutput(self.decode(z, x.shape[2:]), mu, logvar)

    def _run(self, layers: nn.Sequential, x: Tensor, size: Sequence[int]) -> Tensor:
        """x through `layers` as the dial says; size: (D, H, W) of the volume that x is or stands for."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(layers[0].weight.dtype)                     # 16-bit weights take float32 volumes and latents
        segments, group = [(i, i + 1, None) for i in range(len(layers))], self.group
        if self.memory_mode == "tile":
            device = x.device
            if isinstance(x, torch._subclasses.FakeTensor):      # memory prediction: other ranks may not take part
                device, group = torch.device("cpu"), None
            segments = self.tile_plan(size, x.shape[0], activation_dtype(x), device).segments[layers is self.decoder]
        for start, stop, step in segments:
            def tick(share: float, start=start, stop=stop) -> None:
                self.progress(start + share * (stop - start), len(layers), "decoder" if layers is self.decoder else "encoder")
            if step is not None:
                x = run_tiled(layers[start:stop], step, x, self.progress and tick, group)
            elif self.memory_mode != "none" and torch.is_grad_enabled() and not isinstance(layers[start], KEEP_THEIR_INPUT):
                last = (plain,) if isinstance(layers[start], ResBlock3d) else ()  # torch's checkpoint leaves that out again, Lean would not
                x = checkpoint(layers[start], x, *last, use_reentrant=False, preserve_rng_state=False)  # no layer draws random numbers
            else:
                x = layers[start](x)
        return x


def pad_to_multiple(x: Tensor, multiple: Sequence[int]) -> Tensor:
    """Repeat the far border of (B, C, D, H, W) until D, H, W are multiples of `multiple`."""
    d, h, w = ((-n) % m for n, m in zip(x.shape[2:], multiple))
    return F.pad(x, (0, w, 0, h, 0, d), mode="replicate") if d or h or w else x


def sample_posterior(mu: Tensor, logvar: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
    """z = mu + exp(logvar / 2) * noise (arXiv:1312.6114, Eq. 10), in mu's dtype; all three (B, Z, d, h, w)."""
    if generator is None or isinstance(generator, torch.Generator):
        noise = torch.randn(mu.shape, generator=generator, dtype=mu.dtype)
    else:
        noise = torch.stack([torch.randn(mu.shape[1:], generator=g, dtype=mu.dtype) for g in generator])
    with torch.autocast(mu.device.type, enabled=False):          # float32 island: exp overflows in float16
        return mu + (0.5 * logvar).exp() * noise.to(mu.device, non_blocking=True)
