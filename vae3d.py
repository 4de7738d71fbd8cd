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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


KEEP_THEIR_INPUT = nn.Conv3d, Upsample3d, Head                   # and nothing else for backward: there is nothing to checkpoint


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
        self.quantizer: nn.Module | None = None
        if cfg.bottleneck != "kl":
            from quantize import FiniteScalarQuantizer, VectorQuantizer
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
               group: torch.distributed.ProcessGroup | None = None) -> VAE3D:
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
        if self.quantizer is not None:
            self.quantizer.gather = self.group is None
        self._plans: dict = {}                                   # (size, batch, dtype, device) -> TilePlan
        return self

    def __getstate__(self) -> dict:
        return self.__dict__ | {"group": None}                   # for copy and pickle, which know no process groups

    def tile_plans(self, size: Sequence[int], batch: int = 1, dtype: torch.dtype = torch.float32) -> list:
        """Settings of the tile mode for inputs (batch, C, *size), by rising work and falling predicted peak; what was set stays.

        dtype: of the activations; bfloat16 under AMP. The prediction counts live tensors of one training step with AdamW, for planning, and
        is an upper estimate, up to 40 % high; memtest.py has the true one.
        """
        from tile_plans import compositions, levels, make_plans
        size = tuple(-(-n // s) * s for n, s in zip(size, self.cfg.total_stride))
        stretches = compositions(max(levels(self.encoder)) + 1) if self.stretch == "auto" else [self.stretch]
        return make_plans((self.encoder, self.decoder), (size, self.latent_size(size)), batch * dtype.itemsize,
                          sum(p.numel() for p in self.parameters()), self.tile, stretches, self.group.size() if self.group else 1)

    def tile_plan(self, size: Sequence[int], batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        """The setting that the tile mode uses for such an input; kept until memory() is called again."""
        from tile_plans import WORK_BOUND
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

    def encode(self, x: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> tuple[Tensor, ...]:
        """x (B, C, D, H, W) -> Posterior of the latent, or its Codes, float32 or wider. generator: see VectorQuantizer.forward."""
        z = self.latent(x)
        if self.quantizer is not None:
            return self.quantizer.quantize_volume(z, generator)
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
        return self.decode(self.quantizer.lookup_volume(index), size)

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
            from tiles import activation_dtype, run_tiled
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
