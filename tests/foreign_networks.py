"""Networks of others to compare with: MONAI's, and slow ones under the names of radar and diffusers."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn


def monai_model(layout: str, seed: int = 0, **arguments) -> nn.Module:
    """MONAI's network with weights that are all at work."""
    pytest.importorskip("monai")
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(seed)
    channels = arguments.pop("channels", (8, 16))
    fields = dict(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        num_res_blocks=1,
        attention_levels=(False,) * len(channels),
        latent_channels=2,
        norm_num_groups=4,
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    fields.update(arguments)
    if layout == "maisi":
        if isinstance(fields["num_res_blocks"], int):
            fields["num_res_blocks"] = (fields["num_res_blocks"],) * len(channels)
        model = AutoencoderKlMaisi(num_channels=channels, num_splits=1, **fields)
    else:
        model = AutoencoderKL(channels=channels, **fields)
    return shaken(model)


def shaken(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def close(got: torch.Tensor, want: torch.Tensor, name: str, tolerance: float = 1e-4) -> None:
    """Relative to the largest value; float32 sums in another order give about 1e-6."""
    assert got.shape == want.shape, name
    worst = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
    assert worst <= tolerance, f"{name} differs by {worst:.2e}"


def grouped(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=eps)


class Reference(nn.Module):
    """A slow, obvious network with the names of the 4D-radar VAE3D, or of diffusers' AutoencoderKL with
    3D convolutions."""
    def __init__(self, diffusers: bool, mult=(1, 2, 2), blocks=1, attention=True, base=8, channels=3, z=2):
        super().__init__()
        self.diffusers, self.eps, self.z = diffusers, 1e-6 if diffusers else 1e-5, z
        widths = [base * m for m in mult]
        self.strides = [(2, 2, 2)] * 2 if diffusers else [(1, 2, 2), (2, 2, 2)]
        self.encoder = self.side([channels, *widths], blocks, attention, "down")
        self.decoder = self.side([z, *widths[::-1]], blocks + 1, attention, "up")
        self.encoder.conv_out, self.decoder.conv_out = (
            nn.Conv3d(widths[-1], 2 * z, 3, padding=1),
            nn.Conv3d(base, channels, 3, padding=1),
        )
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1) if diffusers else nn.Conv3d(z, z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)

    def res(self, before: int, after: int) -> nn.Module:
        parts = dict(
            norm1=grouped(before, self.eps),
            conv1=nn.Conv3d(before, after, 3, padding=1),
            norm2=grouped(after, self.eps),
            conv2=nn.Conv3d(after, after, 3, padding=1),
        )
        if before != after:
            parts["conv_shortcut" if self.diffusers else "skip"] = nn.Conv3d(before, after, 1)
        return nn.ModuleDict(parts)

    def attend(self, width: int) -> nn.Module:
        if self.diffusers:
            parts = {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")}
            return nn.ModuleDict(
                dict(
                    group_norm=grouped(width, self.eps),
                    to_out=nn.ModuleList([nn.Linear(width, width)]),
                    **parts,
                )
            )
        return nn.ModuleDict(
            dict(
                norm=grouped(width, self.eps),
                qkv=nn.Conv3d(width, 3 * width, 1),
                proj=nn.Conv3d(width, width, 1),
            )
        )

    def side(self, widths: list[int], blocks: int, attention: bool, way: str) -> nn.Module:
        side, before, low = nn.Module(), widths[1], widths[-1 if way == "down" else 1]
        side.conv_in, levels = nn.Conv3d(widths[0], widths[1], 3, padding=1), []
        for level, width in enumerate(widths[1:]):
            layers = [self.res(before if i == 0 else width, width) for i in range(blocks)]
            change = [nn.ModuleDict(dict(conv=nn.Conv3d(width, width, 3)))] if level < len(widths) - 2 else []
            if self.diffusers:
                names = dict(resnets=nn.ModuleList(layers))
                levels.append(
                    nn.ModuleDict(
                        dict(names, **({f"{way}samplers": nn.ModuleList(change)} if change else {}))
                    )
                )
            else:
                lowest = level == (len(widths) - 2 if way == "down" else 0)
                levels.append(
                    nn.ModuleList([*layers, *([self.attend(width)] if attention and lowest else []), *change])
                )
            before = width
        setattr(side, f"{way}_blocks", nn.ModuleList(levels))
        middle = [self.res(low, low), self.attend(low) if attention else nn.Identity(), self.res(low, low)]
        side.mid_block = (
            nn.ModuleList(middle)
            if not self.diffusers
            else nn.ModuleDict(
                dict(
                    resnets=nn.ModuleList(middle[::2]),
                    **({"attentions": nn.ModuleList(middle[1:2])} if attention else {}),
                )
            )
        )
        side.norm_out = grouped(widths[-1], self.eps)
        return side

    def run(self, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(layer, nn.ModuleDict):
            return layer(x)
        if "conv1" in layer:
            h = layer["conv2"](F.silu(layer["norm2"](layer["conv1"](F.silu(layer["norm1"](x))))))
            skip = [layer[name] for name in ("conv_shortcut", "skip") if name in layer]
            return h + (skip[0](x) if skip else x)
        heads = 1 if self.diffusers else 4
        if self.diffusers:
            h = layer["group_norm"](x).flatten(2).transpose(1, 2)
            q, k, v = (layer[name](h) for name in ("to_q", "to_k", "to_v"))
        else:
            q, k, v = layer["qkv"](layer["norm"](x)).flatten(2).transpose(1, 2).chunk(3, dim=2)
        q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = ((q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
        if self.diffusers:
            return x + layer["to_out"][0](h).transpose(1, 2).view_as(x)
        return x + layer["proj"](h.transpose(1, 2).reshape(x.shape))

    def down(self, conv: nn.Module, x: torch.Tensor, stride) -> torch.Tensor:
        return F.conv3d(
            F.pad(x, (0, 1) * 3) if self.diffusers else x,
            conv.weight,
            conv.bias,
            stride,
            0 if self.diffusers else 1,
        )

    def up(self, conv: nn.Module, x: torch.Tensor, stride) -> torch.Tensor:
        x = F.interpolate(x, scale_factor=stride, mode="nearest" if self.diffusers else "trilinear")
        return F.conv3d(x, conv.weight, conv.bias, padding=1)

    def walk(self, side: nn.Module, x: torch.Tensor, levels: nn.ModuleList, change) -> torch.Tensor:
        strides = iter(self.strides)
        for level in levels:
            for layer in [layer for group in level.values() for layer in group] if self.diffusers else level:
                x = change(layer["conv"], x, next(strides)) if set(layer) == {"conv"} else self.run(layer, x)
        return x

    def middle(self, side: nn.Module, x: torch.Tensor) -> torch.Tensor:
        parts = side.mid_block
        if self.diffusers:
            parts = (
                [parts["resnets"][0], *parts["attentions"], parts["resnets"][1]]
                if "attentions" in parts
                else parts["resnets"]
            )
        for layer in parts:
            x = self.run(layer, x)
        return x

    def encode(self, x: torch.Tensor):
        side = self.encoder
        x = self.middle(side, self.walk(side, side.conv_in(x), side.down_blocks, self.down))
        x = side.conv_out(F.silu(side.norm_out(x)))
        return (self.quant_conv(x) if self.diffusers else x).chunk(2, dim=1)

    def decode_sample(self, z: torch.Tensor) -> torch.Tensor:
        """From the sampled latent; the radar network puts its quant_conv here."""
        side = self.decoder
        z = self.post_quant_conv(z if self.diffusers else self.quant_conv(z))
        x = self.walk(side, self.middle(side, side.conv_in(z)), side.up_blocks, self.up)
        return side.conv_out(F.silu(side.norm_out(x)))
