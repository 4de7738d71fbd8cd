"""weights.py: the networks of others give the same results from our VAE3D, forwards and backwards, in tiles too."""
import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data
import predict
import train
import weights
from vae3d import PRESETS, VAE3D, VAEConfig

ROOT = Path(__file__).resolve().parent.parent


def monai_model(layout: str, seed: int = 0, **arguments) -> nn.Module:
    """MONAI's network with weights that are all at work."""
    pytest.importorskip("monai")
    from monai.apps.generation.maisi.networks.autoencoderkl_maisi import AutoencoderKlMaisi
    from monai.networks.nets import AutoencoderKL

    torch.manual_seed(seed)
    channels = arguments.pop("channels", (8, 16))
    fields = dict(spatial_dims=3, in_channels=1, out_channels=1, num_res_blocks=1, attention_levels=(False,) * len(channels),
                  latent_channels=2, norm_num_groups=4, with_encoder_nonlocal_attn=False, with_decoder_nonlocal_attn=False)
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


def drawn(seed: int, layout: str) -> dict:
    """Constructor arguments drawn at random."""
    r = random.Random(f"{layout}{seed}")
    levels = r.randint(1, 3)
    channels = r.randint(1, 2)
    blocks = r.randint(1, 2) if layout == "monai" and r.random() < 0.5 else tuple(r.randint(1, 2) for _ in range(levels))
    return dict(channels=tuple(r.choice((4, 8, 12)) for _ in range(levels)), num_res_blocks=blocks,
                in_channels=channels, out_channels=channels, attention_levels=tuple(r.random() < 0.4 for _ in range(levels)),
                latent_channels=r.randint(1, 3), norm_num_groups=r.choice((1, 2, 4)), norm_eps=r.choice((1e-6, 1e-3)),
                with_encoder_nonlocal_attn=r.random() < 0.5, with_decoder_nonlocal_attn=r.random() < 0.5,
                use_convtranspose=r.random() < 0.5, include_fc=r.random() < 0.7, use_combined_linear=r.random() < 0.5)


def ours(state: dict, **hints) -> VAE3D:
    cfg, converted = weights.convert(state, **hints)
    vae = VAE3D(cfg).eval()
    vae.load_state_dict(converted)
    return vae


def close(got: torch.Tensor, want: torch.Tensor, name: str, tolerance: float = 1e-4) -> None:
    """Relative to the largest value: 1e-4 is the issue's bound, float32 sums in another order give about 1e-6."""
    assert got.shape == want.shape, name
    worst = ((got - want).abs().max() / want.abs().max().clamp_min(1e-12)).item()
    assert worst <= tolerance, f"{name} differs by {worst:.2e}"


# ------------------------------------------------------------------------------------------------ layouts 1 and 2: MONAI

@pytest.mark.parametrize("layout", ["monai", "maisi"])
@pytest.mark.parametrize("seed", range(12))
def test_parity_of_random_configs(layout, seed):
    """Mean, log-variance, decoded latent, reconstruction, and every gradient of the reconstruction loss."""
    arguments = drawn(seed, layout)
    theirs = monai_model(layout, seed, **arguments)
    assert weights.is_foreign(theirs.state_dict()) == layout
    vae = ours(theirs.state_dict(), **{name: arguments[name] for name in ("norm_num_groups", "norm_eps", "use_convtranspose")})
    side = 2 ** (len(arguments["channels"]) - 1)
    x = torch.randn(2, arguments["in_channels"], 3 * side, 2 * side, 4 * side)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mu, sigma = theirs.encode(a)
    want, got = theirs.decode(mu), vae(b)
    close(got.mu, mu, "mu")
    close(got.logvar, 2 * sigma.log(), "logvar")
    close(got.recon, want, "reconstruction")
    z = torch.randn_like(mu)
    close(vae.decode(z), theirs.decode(z), "decode")
    for recon, p, ref, var in ((want, mu, x, sigma.log()), (got.recon, got.mu, x, got.logvar / 2)):
        (F.mse_loss(recon, ref) + 0.1 * p.square().mean() + 0.1 * var.square().mean()).backward()
    close(b.grad, a.grad, "gradient of the input")
    cfg, mapped = weights.convert({name: p.grad for name, p in theirs.named_parameters()},
                                  **{name: arguments[name] for name in ("norm_num_groups", "norm_eps", "use_convtranspose")})
    real = [name for name in mapped if arguments["include_fc"] or ".proj." not in name]  # what they do not have has no gradient
    scale = max(mapped[name].abs().max() for name in real)
    for name, p in vae.named_parameters():
        if name in real:                                         # a bias before a norm sums to 0: against a hundredth of the largest
            off = ((p.grad - mapped[name]).abs().max() / mapped[name].abs().max().clamp_min(1e-2 * scale)).item()
            assert off <= 1e-4, f"gradient of {name} differs by {off:.2e}"


@pytest.mark.parametrize("layout", ["monai", "maisi"])
@pytest.mark.parametrize("seed", range(4))
def test_round_trip(layout, seed):
    """Theirs -> ours -> theirs: the same tensors. Loaded strictly into what the arguments build: the same reconstruction."""
    arguments = {**drawn(seed, layout), "include_fc": True, "use_combined_linear": False}
    theirs = monai_model(layout, seed, **arguments)
    vae = ours(theirs.state_dict(), norm_num_groups=arguments["norm_num_groups"], norm_eps=arguments["norm_eps"],
               use_convtranspose=arguments["use_convtranspose"])
    state, built = weights.export(vae, layout=layout)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in theirs.state_dict().items())
    built.setdefault("channels", built.pop("num_channels", None))
    built.pop("num_splits", None)
    again = monai_model(layout, seed + 1, **built)
    again.load_state_dict(state, strict=True)
    x = torch.randn(1, arguments["in_channels"], 8, 8, 8)
    with torch.no_grad():
        close(again.reconstruct(x), vae(x).recon, "reconstruction")


def test_export_of_a_network_made_here():
    """A config of ours that MONAI can build too, trained weights or not; the post-quant convolution it lacks is MONAI's identity."""
    torch.manual_seed(0)
    cfg = VAEConfig(base_channels=8, channel_mult=(1, 2), strides=((2, 2, 2),), norm="group", norm_groups=4, decoder_extra_blocks=0,
                    encoder_middle="attention", decoder_middle="none", down_padding="end", head_act=False, quant_conv="split")
    vae = shaken(VAE3D(cfg))
    state, arguments = weights.export(cfg, vae.state_dict())
    theirs = monai_model("monai", **arguments)
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        close(vae(x).recon, theirs.reconstruct(x), "reconstruction")


def test_export_says_why_not():
    vae = VAE3D(PRESETS["ultra_lightweight"])
    with pytest.raises(ValueError, match="no such network: vae.norm is none.*down_padding is both.*quant_conv is none") as error:
        weights.export(vae)
    assert "\n" not in str(error.value)
    theirs = monai_model("maisi")
    with pytest.raises(ValueError, match="vae.upsample is trilinear, not nearest or transposed"):
        weights.export(ours(theirs.state_dict(), norm_num_groups=4))
    with pytest.raises(ValueError, match="not of this config: decoder.head.conv.bias missing"):
        vae = ours(monai_model("monai").state_dict(), norm_num_groups=4)
        weights.export(vae.cfg, {name: value for name, value in vae.state_dict().items() if name != "decoder.head.conv.bias"})


@pytest.mark.parametrize("transposed", [False, True])
def test_a_maisi_network_tile_by_tile(transposed):
    """GroupNorm of the whole volume, trilinear or transposed upsampling, padding at the far end: exact for sizes that no tile divides."""
    theirs = monai_model("maisi", channels=(4, 8, 8), use_convtranspose=transposed, num_res_blocks=1, norm_num_groups=2)
    vae = ours(theirs.state_dict(), norm_num_groups=2, use_convtranspose=transposed).double()
    x = torch.randn(1, 1, 24, 20, 28, dtype=torch.float64)
    with torch.no_grad():
        mu, sigma = theirs.encode(x.float())                     # MAISI's own norm works in float32
        want = theirs.decode(mu)
        for tile, stretch in (((8, 12, 8), "2"), ((16, 8, 8), "1+1"), ((8, 8, 8), "3")):
            vae.memory("tile", tile, stretch)
            out = vae(x)
            close(out.mu, mu, "mu", 1e-5)
            close(out.logvar, 2 * sigma.log(), "logvar", 1e-5)
            close(out.recon, want, "reconstruction", 1e-5)
            tiled, whole = vae.decode(out.mu), vae.memory("none").decode(out.mu)
            close(tiled, whole, "tiled decode", 1e-10)
            close(out.recon, vae(x).recon, "tiled reconstruction", 1e-10)


# ------------------------------------------------------------------------------------------------ layout 3: MONAI generative

def as_generative(state: dict, projections: dict[str, str], convolutions: bool = False) -> dict:
    """Keys of MONAI's AutoencoderKL -> as GenerativeModels wrote them."""
    renamed = {}
    for key, value in state.items():
        key = key.replace(".postconv.", ".conv.")
        for new, old in projections.items():
            if f".attn.{new}." in key:
                key = key.replace(f".attn.{new}.", f".{old}.")
                value = value[..., None, None, None] if convolutions and value.dim() == 2 else value
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("projections", [
    dict(to_q="to_q", to_k="to_k", to_v="to_v", out_proj="proj_attn"),
    dict(to_q="q.conv", to_k="k.conv", to_v="v.conv", out_proj="proj_out.conv")], ids=("to_q", "q"))
def test_generative_names(projections):
    theirs = monai_model("monai", channels=(4, 8), attention_levels=(False, True), with_encoder_nonlocal_attn=True, norm_num_groups=2)
    state = as_generative(theirs.state_dict(), projections, convolutions="q.conv" in projections.values())
    assert weights.is_foreign(state) == "monai-generative"
    vae, x = ours(state, norm_num_groups=2, num_channels=(4, 8)), torch.randn(1, 1, 4, 6, 4)
    with torch.no_grad():
        close(vae.encode(x).mu, theirs.encode(x)[0], "mu")
        close(vae(x).recon, theirs.reconstruct(x), "reconstruction")


def test_generative_transposed_upsampling_is_of_kernel_3():
    """Names and shapes are those of the interpolating network; the hint tells. MAISI's transposed upsampling is the same layer."""
    maisi = monai_model("maisi", channels=(4, 8), norm_num_groups=2, use_convtranspose=True)
    state = {re.sub(r"\.conv\.conv((\.conv)?\.(weight|bias))$", r".conv\1", key): value for key, value in maisi.state_dict().items()}
    assert weights.is_foreign(state) == "monai-generative"
    vae, x = ours(state, norm_num_groups=2, use_convtranspose=True), torch.randn(1, 1, 4, 4, 6)
    with torch.no_grad():
        close(vae(x).recon, maisi.reconstruct(x), "reconstruction")


# ------------------------------------------------------------------------------------------------ layout 4: radar, and diffusers' names

def grouped(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels), channels, eps=eps)


class Reference(nn.Module):
    """A slow, obvious network with the names of the 4D-radar VAE3D, or of diffusers' AutoencoderKL with 3D convolutions."""
    def __init__(self, diffusers: bool, mult=(1, 2, 2), blocks=1, attention=True, base=8, channels=3, z=2):
        super().__init__()
        self.diffusers, self.eps, self.z = diffusers, 1e-6 if diffusers else 1e-5, z
        widths = [base * m for m in mult]
        self.strides = [(2, 2, 2)] * 2 if diffusers else [(1, 2, 2), (2, 2, 2)]
        self.encoder = self.side([channels, *widths], blocks, attention, "down")
        self.decoder = self.side([z, *widths[::-1]], blocks + 1, attention, "up")
        self.encoder.conv_out, self.decoder.conv_out = nn.Conv3d(widths[-1], 2 * z, 3, padding=1), nn.Conv3d(base, channels, 3, padding=1)
        self.quant_conv = nn.Conv3d(2 * z, 2 * z, 1) if diffusers else nn.Conv3d(z, z, 1)
        self.post_quant_conv = nn.Conv3d(z, z, 1)

    def res(self, before: int, after: int) -> nn.Module:
        parts = dict(norm1=grouped(before, self.eps), conv1=nn.Conv3d(before, after, 3, padding=1), norm2=grouped(after, self.eps),
                     conv2=nn.Conv3d(after, after, 3, padding=1))
        if before != after:
            parts["conv_shortcut" if self.diffusers else "skip"] = nn.Conv3d(before, after, 1)
        return nn.ModuleDict(parts)

    def attend(self, width: int) -> nn.Module:
        if self.diffusers:
            parts = {name: nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")}
            return nn.ModuleDict(dict(group_norm=grouped(width, self.eps), to_out=nn.ModuleList([nn.Linear(width, width)]), **parts))
        return nn.ModuleDict(dict(norm=grouped(width, self.eps), qkv=nn.Conv3d(width, 3 * width, 1), proj=nn.Conv3d(width, width, 1)))

    def side(self, widths: list[int], blocks: int, attention: bool, way: str) -> nn.Module:
        side, before, low = nn.Module(), widths[1], widths[-1 if way == "down" else 1]
        side.conv_in, levels = nn.Conv3d(widths[0], widths[1], 3, padding=1), []
        for level, width in enumerate(widths[1:]):
            layers = [self.res(before if i == 0 else width, width) for i in range(blocks)]
            change = [nn.ModuleDict(dict(conv=nn.Conv3d(width, width, 3)))] if level < len(widths) - 2 else []
            if self.diffusers:
                names = dict(resnets=nn.ModuleList(layers))
                levels.append(nn.ModuleDict(dict(names, **({f"{way}samplers": nn.ModuleList(change)} if change else {}))))
            else:
                lowest = level == (len(widths) - 2 if way == "down" else 0)
                levels.append(nn.ModuleList([*layers, *([self.attend(width)] if attention and lowest else []), *change]))
            before = width
        setattr(side, f"{way}_blocks", nn.ModuleList(levels))
        middle = [self.res(low, low), self.attend(low) if attention else nn.Identity(), self.res(low, low)]
        side.mid_block = nn.ModuleList(middle) if not self.diffusers else nn.ModuleDict(dict(
            resnets=nn.ModuleList(middle[::2]), **({"attentions": nn.ModuleList(middle[1:2])} if attention else {})))
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
        return F.conv3d(F.pad(x, (0, 1) * 3) if self.diffusers else x, conv.weight, conv.bias, stride, 0 if self.diffusers else 1)

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
            parts = [parts["resnets"][0], *parts["attentions"], parts["resnets"][1]] if "attentions" in parts else parts["resnets"]
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


@pytest.mark.parametrize("layout", ["radar", "diffusers"])
@pytest.mark.parametrize("blocks, attention", [(1, False), (1, True), (2, True)])
def test_radar_and_diffusers_names(layout, blocks, attention):
    torch.manual_seed(blocks)
    theirs = shaken(Reference(layout == "diffusers", blocks=blocks, attention=attention))
    state = theirs.state_dict()
    assert weights.is_foreign({"step": 3, "model_state_dict": {f"module.{key}": value for key, value in state.items()}}) == layout
    vae = ours({"step": 3, "model_state_dict": {f"module.{key}": value for key, value in state.items()}})
    x, z = torch.randn(1, 3, 4, 8, 12), torch.randn(1, 2, 2, 2, 3)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    mu, logvar = theirs.encode(a)
    got, want = vae(b), theirs.decode_sample(mu)
    close(got.mu, mu, "mu")
    close(got.logvar, logvar, "logvar")
    close(got.recon, want, "reconstruction")
    close(vae.decode(z), theirs.decode_sample(z), "decode")
    for recon in (want, got.recon):
        F.mse_loss(recon, x).backward()
    close(b.grad, a.grad, "gradient of the input")
    vae.memory("tile", (2, 4, 4), "1")
    close(vae(x).recon, want, "reconstruction in tiles")


def test_radar_presets_have_the_counts_of_the_original():
    """694,788 parameters: ours and two 1x1x1 convolutions of 20, of which folding leaves one."""
    theirs = Reference(False, (1, 2, 2), 1, False, 16, 4, 4)
    assert sum(p.numel() for p in theirs.parameters()) == 694_788
    vae = ours(theirs.state_dict())
    assert sum(p.numel() for p in vae.parameters()) == 694_768
    preset = dataclasses.replace(PRESETS["ultra_lightweight"], in_channels=4, norm="group")
    assert {**dict(VAE3D(preset).named_parameters())}.keys() == {name for name, _ in vae.named_parameters() if "post_quant" not in name}


def test_radar_strides_are_hints():
    state = Reference(False, blocks=1, attention=False).state_dict()
    cfg, _ = weights.convert(state, downsample_strides=[[2, 2, 2], [2, 2, 2]], upsample_scales=[[2, 2, 2], [2, 2, 2]], use_attention=False)
    assert cfg.strides == ((2, 2, 2), (2, 2, 2)) and cfg.up_strides == ()
    cfg, _ = weights.convert(state)
    assert cfg.strides == ((1, 2, 2), (2, 2, 2)) and cfg.up_strides == ((2, 2, 2), (1, 2, 2))


# ------------------------------------------------------------------------------------------------ errors

def broken(state: dict, how: str, key: str) -> dict:
    state = dict(state)
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state[f"{key}_copy"] = state[key]
    else:
        state[key] = torch.zeros(*(n + 1 for n in state[key].shape))
    return state


@pytest.mark.parametrize("layout", ["monai", "maisi", "radar", "diffusers"])
@pytest.mark.parametrize("how", ["missing", "unexpected", "reshaped"])
def test_every_wrong_key_is_named(layout, how):
    """Whichever key it is, alone or with another: the error names it and nothing is converted."""
    if layout in weights.BLOCKS:
        state = monai_model(layout, with_encoder_nonlocal_attn=True, with_decoder_nonlocal_attn=True, include_fc=True).state_dict()
    else:
        state = Reference(layout == "diffusers").state_dict()
    hints = dict(norm_num_groups=4) if layout in weights.BLOCKS else {}
    for key in state:
        with pytest.raises(ValueError) as error:
            weights.convert(broken(state, how, key), **hints)
        assert f"{key}_copy" in str(error.value) if how == "unexpected" else key in str(error.value), (key, str(error.value))
        assert "\n" not in str(error.value)
    two = next(iter(state)), list(state)[-1]
    with pytest.raises(ValueError) as error:
        weights.convert(broken(broken(state, how, two[0]), how, two[1]), **hints)
    assert all(key in str(error.value) for key in two)


def test_all_kinds_of_wrong_keys_are_listed_at_once():
    state = monai_model("monai", channels=(8, 8, 16)).state_dict()
    lost = [key for key in state if key.startswith(("decoder.blocks.2.", "encoder.blocks.3."))]
    for key in lost:                                             # whole blocks
        del state[key]
    state["encoder.extra"] = torch.zeros(2)
    state["quant_conv_mu.conv.weight"] = torch.zeros(2, 2)
    with pytest.raises(ValueError) as error:
        weights.convert(state, norm_num_groups=4)
    text = str(error.value)
    assert all(key in text for key in lost) and "1 unexpected: encoder.extra" in text, text
    assert f"{len(lost)} missing" in text and "1 reshaped: quant_conv_mu.conv.weight (2, 2) for (2, 2, 1, 1, 1)" in text, text


@pytest.mark.parametrize("hints, message", [
    ({}, r"neither names nor shapes say norm_num_groups; pass it as a hint"),
    (dict(norm_num_groups=3), r"norm_num_groups=3 does not divide all of the channels \(8, 16\)"),
    (dict(norm_num_groups=4, channels=(8, 8)), r"hint channels=\(8, 8\), but the weights say \(8, 16\)"),
    (dict(norm_num_groups=4, num_res_blocks=2), r"hint num_res_blocks=\(2, 2\), but the weights say \(1, 1\)"),
    (dict(norm_num_groups=4, norm_groups=4), "unknown hint norm_groups; did you mean norm_num_groups"),
    (dict(norm_num_groups=4, spatial_dims=2), "hint spatial_dims=2, but the weights say 3")])
def test_hints(hints, message):
    state = monai_model("monai").state_dict()
    with pytest.raises(ValueError, match=message) as error:
        weights.convert(state, **hints)
    assert "\n" not in str(error.value)


def test_a_whole_maisi_config_may_be_passed():
    arguments = dict(spatial_dims=3, in_channels=1, out_channels=1, latent_channels=2, num_channels=[8, 16], num_res_blocks=[1, 1],
                     norm_num_groups=4, norm_eps=1e-6, attention_levels=[False, False], with_encoder_nonlocal_attn=False,
                     with_decoder_nonlocal_attn=False, use_checkpointing=False, use_convtranspose=False, norm_float16=True, num_splits=8,
                     dim_split=1)
    cfg, _ = weights.convert(monai_model("maisi").state_dict(), **arguments)
    assert cfg.widths == (8, 16) and cfg.upsample == "trilinear"


def test_the_published_maisi_network():
    """NV-Generate-CT's autoencoder by its config: every name and shape, nothing computed."""
    arguments = dict(num_res_blocks=(2, 2, 2), latent_channels=4, norm_num_groups=32)
    with torch.device("meta"):
        state = monai_model("maisi", channels=(64, 128, 256), **arguments).state_dict()
    cfg, converted = weights.convert(state, num_channels=[64, 128, 256], **arguments)
    assert cfg.widths == (64, 128, 256) and cfg.blocks == (2, 2, 2) and cfg.total_stride == (4, 4, 4)
    assert sum(v.numel() for v in converted.values()) == sum(v.numel() for v in state.values()) == 20_944_897


def test_what_is_refused():
    pytest.importorskip("monai")
    from monai.networks.nets import AutoencoderKL
    flat = AutoencoderKL(2, channels=(4,), attention_levels=(False,), num_res_blocks=1, norm_num_groups=2)
    with pytest.raises(ValueError, match="of a 2D network"):
        weights.convert(flat.state_dict(), norm_num_groups=2)
    with pytest.raises(ValueError, match=r"1 reshaped: encoder.blocks.0.conv.weight .*; 2 channels go out: VAE3D reconstructs its input"):
        weights.convert(monai_model("monai", out_channels=2).state_dict(), norm_num_groups=4)
    with pytest.raises(ValueError, match="no known layout .*, such as encoder.conv_in.weight"):
        weights.convert(VAE3D(VAEConfig()).state_dict())
    with pytest.raises(ValueError, match="several networks, model, ema"):
        weights.convert({name: monai_model("monai").state_dict() for name in ("model", "ema")}, norm_num_groups=4)
    assert weights.is_foreign(VAE3D(VAEConfig()).state_dict()) is None
    assert weights.is_foreign({"model": VAE3D(VAEConfig()).state_dict(), "step": 3}) is None
    assert weights.is_foreign({}) is None and weights.is_foreign([1]) is None


# ------------------------------------------------------------------------------------------------ the file

def test_works_copied_with_vae3d_alone(tmp_path):
    """In an empty folder with vae3d.py, without MONAI; nothing random is drawn."""
    for name in ("vae3d.py", "weights.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    torch.save(monai_model("monai").state_dict(), tmp_path / "theirs.pt")
    code = ("import sys; sys.path.insert(0, '.'); import torch, weights, vae3d; before = torch.get_rng_state();"
            "cfg, state = weights.convert(torch.load('theirs.pt', weights_only=True), norm_num_groups=4);"
            "assert torch.equal(before, torch.get_rng_state()); vae = vae3d.VAE3D(cfg); vae.load_state_dict(state);"
            "weights.export(vae); assert 'monai' not in sys.modules and 'yaml' not in sys.modules")
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


# ------------------------------------------------------------------------------------------------ train.py --init, predict.py --checkpoint

TINY = ["--data.synthetic_count", "4", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8", "--data.crops_per_volume", "3",
        "--train.val_crops", "2", "--train.latent_crops", "2", "--device", "cpu", "--log.sample_every", "0", "--batch", "1"]
HINTS = "norm_num_groups=4"


def saved(path: Path, layout: str = "maisi", **arguments) -> nn.Module:
    """A network of theirs whose state dict lies in the file, deep in a checkpoint where it ends in .ckpt."""
    theirs = monai_model(layout, **arguments)
    torch.save({"epoch": 7, "state_dict": theirs.state_dict()} if path.suffix == ".ckpt" else theirs.state_dict(), path)
    return theirs


def turned(volume: torch.Tensor) -> torch.Tensor:
    """z,y,x, as volumes lie here, to x,y,z, as MONAI reads them; and back."""
    return volume.permute(0, 1, 4, 3, 2)


def one_line(capsys, program: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: ") and error.count("\n") == 1, error
    return error


@pytest.mark.parametrize("layout, low, high", [("monai", -1, 1), ("maisi", 0, 1)])
def test_training_starts_at_their_loss_and_goes_on_without_the_file(layout, low, high, tmp_path, capsys):
    """The validation at step 0 is that of MONAI's own network on the same crops, in the range that it knows."""
    file, out = tmp_path / "theirs.ckpt", tmp_path / "run"
    theirs = saved(file, layout, with_decoder_nonlocal_attn=True)
    hints = HINTS + f",intensity_range={low},{high}" * (layout == "monai")  # MAISI's is the default
    argv = [*TINY, "--init", str(file), "--train.init_hints", hints, "--steps", "2", "--out", str(out)]
    assert train.main(argv) == 0
    assert f"init: a {layout} network; it is given {low} to 1" in capsys.readouterr().out
    cfg = train.load_config(argv)
    dataset = train.open_data(cfg, lambda text: None)
    rows = []
    for crop in data.val_crops(dataset, cfg.train.seed, cfg.train.val_crops):
        x = turned((crop.image[None] + 1) * (high - low) / 2 + low)
        with torch.no_grad():
            mu, sigma = theirs.encode(x)
            off = (theirs.decode(mu) - x) * 2 / (high - low)     # both errors in units of [-1, 1]
        kl = 0.5 * (mu.square() + sigma.square() - 1 - 2 * sigma.log()).mean()
        rows.append((off.abs().mean() + cfg.loss.kl_weight * kl, off.abs().mean(), 10 * (4 / off.square().mean()).log10()))
    first = next(row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["split"] == "val")
    for name, want in zip(("loss", "l1", "psnr"), torch.tensor(rows).mean(0).tolist()):
        assert first["step"] == 0 and abs(first[name] - want) <= 1e-5 * abs(want), (name, first[name], want)

    file.unlink()
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    assert last["step"] == 3 and last["config"]["vae"]["intensity_range"] == [low, high] and last["config"]["preset"] == layout
    assert VAEConfig(**last["config"]["vae"]) == cfg.vae == train.load_config(["--config", str(out / "config.yaml"), "--train.init", "none",
                                                                               *TINY]).vae


def test_flags_beat_the_file_as_far_as_weights_fit(tmp_path, capsys):
    """A codebook for a frozen network of theirs: the mean's half of the layer before it is taken, all else fits."""
    theirs = saved(tmp_path / "theirs.pt", "monai")
    flags = [*TINY, "--init", str(tmp_path / "theirs.pt"), "--train.init_hints", HINTS, "--steps", "1", "--out", str(tmp_path / "vq")]
    assert train.main([*flags, "--vae.bottleneck", "vq", "--vae.num_codes", "8", "--train.stage", "1"]) == 0
    said = capsys.readouterr().out
    assert "3 missing there, left as new: quantizer.code_count; quantizer.code_sum; quantizer.codebook" in said
    assert "encoder.quant_conv.weight (4, 2, 1, 1, 1) -> (2, 2, 1, 1, 1) (the mean's part taken)" in said
    model = torch.load(tmp_path / "vq" / "last.pt", weights_only=True)["model"]
    assert torch.equal(model["encoder.quant_conv.weight"], theirs.state_dict()["quant_conv_mu.conv.weight"])
    (tmp_path / "c.yaml").write_text("preset: base\nvae: {norm_eps: 1e-3, num_codes: 9}\n")
    cfg = train.load_config([*flags, "--config", str(tmp_path / "c.yaml"), "--vae.num_codes", "7"])
    assert (cfg.preset, cfg.vae.widths, cfg.vae.norm_eps, cfg.vae.num_codes) == ("monai", (8, 16), 1e-3, 7)


def ct_volume(path: Path, size=(12, 16, 8)) -> torch.Tensor:
    """A float32 file of HU; as (1, 1, D, H, W)."""
    path.parent.mkdir(exist_ok=True)
    hu = torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2000 - 1000
    nib.save(nib.Nifti1Image(hu.permute(2, 1, 0).numpy(), torch.eye(4).numpy()), path)
    return hu[None, None]


def read(path: Path) -> torch.Tensor:
    return torch.from_numpy(nib.load(path).get_fdata(dtype="float32")).permute(2, 1, 0)[None, None]


@pytest.mark.parametrize("layout", ["monai", "maisi"])
def test_predictions_are_theirs_untiled_and_in_tiles(layout, tmp_path, capsys):
    """HU in, HU out, of a whole volume by three ways; latents too; figures as MONAI's in [0, 1]."""
    theirs = saved(tmp_path / "theirs.pt", layout, channels=(4, 8, 8), norm_num_groups=2)
    hu, source = ct_volume(tmp_path / "in" / "scan.nii.gz"), str(tmp_path / "in")
    with torch.no_grad():
        mu, _ = theirs.encode(turned((hu + 1000) / 2000))
        mu, want = turned(mu), turned(theirs.decode(mu))

    def run(command: str, tile: str, *flags: str) -> None:
        assert predict.main([command, "--checkpoint", str(tmp_path / "theirs.pt"), "--hints", "norm_num_groups=2", "--device", "cpu",
                             "--data.modality", "ct", "--tile", tile, *flags]) == 0
    for tile in ("none", "8,8,8"):
        out, latents, decoded = (tmp_path / f"{name}_{tile[0]}" for name in ("out", "latents", "decoded"))
        run("reconstruct", tile, "--input", source, "--output", str(out))
        close(read(out / "scan.nii.gz"), want * 2000 - 1000, f"reconstruction, tile {tile}")
        run("encode", tile, "--input", source, "--output", str(latents))
        close(torch.from_numpy(np.load(latents / "scan_latent.npz")["latent"]), mu, f"latent, tile {tile}")
        run("decode", tile, "--input", str(latents), "--output", str(decoded))
        assert torch.equal(read(decoded / "scan.nii.gz"), read(out / "scan.nii.gz"))
    run("evaluate", "none", "--data", source, "--json", str(tmp_path / "out.json"), "--report", str(tmp_path / "out.html"))
    psnr = -10 * (want - (hu + 1000) / 2000).square().mean().log10().item()
    assert abs(json.loads((tmp_path / "out.json").read_text())["mean"]["psnr"] - psnr) < 1e-3
    assert "for intensities of 0 to 1" in capsys.readouterr().out
    run("decode", "none", "--input", str(tmp_path / "latents_n"), "--output", str(tmp_path / "other"), "--hints",
        "norm_num_groups=2,intensity_range=-1,1")
    assert "was encoded with other weights" in capsys.readouterr().out


BUNDLE = {"image_channels": 1, "net": {"latent": 2}, "latent_channels": 2, "autoencoder_def": {
    "_target_": "AutoencoderKlMaisi", "spatial_dims": 3, "in_channels": "@image_channels", "out_channels": "@image_channels",
    "latent_channels": "@net#latent", "num_channels": [8, 16], "num_res_blocks": [1, 1], "norm_num_groups": 4, "norm_eps": 1e-06,
    "attention_levels": [False, False], "with_encoder_nonlocal_attn": False, "use_convtranspose": False, "num_splits": 16}}
BUNDLE["mask_autoencoder_def"] = BUNDLE["autoencoder_def"] | {"in_channels": 8, "out_channels": 125, "num_channels": [32, 64]}


def test_axes_are_turned_unless_a_hint_says_otherwise(tmp_path):
    theirs = saved(tmp_path / "theirs.pt", "monai")
    found = {hints: train.load_foreign(tmp_path / "theirs.pt", HINTS + hints, "--hints").weights for hints in ("", ",axes=zyx")}
    _, plain = weights.convert(theirs.state_dict(), norm_num_groups=4)
    name = "encoder.level0_block0.conv1.weight"
    assert torch.equal(found[",axes=zyx"][name], plain[name]) and torch.equal(found[""][name], turned(plain[name]))
    assert all(torch.equal(value, plain[key]) for key, value in weights.turn_axes(found[""]).items())
    with pytest.raises(ValueError, match="--hints: axes must be one of xyz, zyx, got 'yxz'"):
        train.load_foreign(tmp_path / "theirs.pt", HINTS + ",axes=yxz", "--hints")


@pytest.mark.parametrize("key", ["encoder.blocks.3000000.conv.weight", "encoder.down_blocks.3000000.0.conv1.weight"])
def test_a_damaged_number_of_blocks_is_refused_at_once(key):
    kind = "blocks" if ".blocks." in key else "down_blocks"
    state = {key: torch.zeros(4, 4, 3, 3, 3), f"encoder.{kind}.0.0.conv1.weight": torch.zeros(4, 4, 3, 3, 3),
             "decoder.blocks.0.conv.weight": torch.zeros(4, 4, 3, 3, 3), "decoder.up_blocks.0.0.conv1.weight": torch.zeros(4, 4, 3, 3, 3)}
    with pytest.raises(ValueError, match="3000000 in a file with 4 keys; it is damaged"):
        weights.convert(state, norm_num_groups=1)


def test_hints_are_values_and_the_config_of_the_original(tmp_path):
    saved(tmp_path / "theirs.pt")
    (tmp_path / "maisi.json").write_text(json.dumps(dict(reversed(BUNDLE.items())), indent="\t"))  # the mask's comes first
    (tmp_path / "maisi.yaml").write_text(f"autoencoder: {json.dumps(BUNDLE['autoencoder_def'] | {'norm_eps': '1e-3'})}\n"
                                         "image_channels: 1\nnet: {latent: 2}\n")
    found = {hints: train.load_foreign(tmp_path / "theirs.pt", hints.replace("maisi.", f"{tmp_path}/maisi."), "--hints").vae
             for hints in (HINTS, "maisi.json", "maisi.yaml", "maisi.yaml,norm_eps=1e-4 ,intensity_range=(-2, 2)")}
    assert [cfg.norm_eps for cfg in found.values()] == [1e-6, 1e-6, 1e-3, 1e-4]
    assert [cfg.intensity_range for cfg in found.values()] == [(0, 1)] * 3 + [(-2, 2)]
    assert len({dataclasses.replace(cfg, norm_eps=1e-6, intensity_range=(0, 1)) for cfg in found.values()}) == 1
    torch.save({"ema": Reference(False).state_dict(), "model": Reference(False, base=16).state_dict()}, tmp_path / "two.pt")
    radar = train.load_foreign(tmp_path / "two.pt", "entry=model,num_heads=2,downsample_strides=[[2,2,2],[2,2,2]],"
                               "upsample_scales=[[2,2,2],[2,2,2]]", "--hints")
    assert radar.layout == "radar" and radar.vae.widths == (16, 32, 32) and radar.vae.head_channels == 16
    assert radar.vae.strides == ((2, 2, 2),) * 2 and radar.vae.intensity_range == (-1, 1)
    assert train.load_foreign(tmp_path, None, "--hints") is None and train.load_foreign(tmp_path / "absent.pt", None, "--hints") is None


@pytest.mark.parametrize("hints, says", [
    (None, "neither names nor shapes say norm_num_groups; pass it as a hint: norm_num_groups=... ("),
    ("norm_num_groups=3", "norm_num_groups=3 does not divide all of the channels (8, 16)"),
    ("norm_groups=4,norm_num_groups=4", "unknown hint norm_groups; did you mean norm_num_groups?"),
    ("norm_num_groups=4,norm_eps=small", "norm_eps='small' is no number above 0"),
    ("norm_num_groups=4,use_convtranspose=maybe", "use_convtranspose=maybe, but the weights say True"),
    ("norm_num_groups=4,intensity_range=1", "intensity_range=1 is not two numbers, such as 0,1"),
    ("norm_num_groups=4,intensity_range=1,0", "vae.intensity_range needs two numbers, the lower first"),
    ("norm_num_groups=4,entry=ema", "holds the network, itself; pass one as a hint: entry=..., not ema"),
    ("absent.json", "absent.json is neither NAME=VALUE nor a file"),
    ("norm_num_groups=[4", "norm_num_groups=[4 cannot be read"),
    ("bundle.json", "norm_num_groups: '@groups', which is not evaluated here; add norm_num_groups=VALUE"),
    ("broken.json", "broken.json: cannot be read"), ("none.yaml", "none.yaml: describes no autoencoder")])
def test_hints_that_do_not_do_are_one_line(hints, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "theirs.pt")
    unknown = BUNDLE["autoencoder_def"] | {"norm_num_groups": "@groups"}
    (tmp_path / "bundle.json").write_text(json.dumps(BUNDLE | {"autoencoder_def": unknown}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "none.yaml").write_text("latent_channels: 4\nunet: {channels: [8, 16]}\n")
    with pytest.raises(ValueError) as error:
        train.load_foreign("theirs.pt", hints, "--hints")
    assert says in str(error.value) and "\n" not in str(error.value), error.value


def test_foreign_files_where_they_do_not_belong_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = saved(tmp_path / "theirs.pt")
    torch.save({"model": theirs.state_dict(), "ema": theirs.state_dict()}, "two.pt")
    torch.save({key: value for key, value in theirs.state_dict().items() if not key.startswith("decoder.blocks.3")}, "part.pt")
    torch.save({"net.weight": torch.zeros(2, 2)}, "other.pt")
    init, flag = ["--init", "theirs.pt", "--train.init_hints", HINTS], "=... (--{} NAME=VALUE,NAME=VALUE,... or the original's CONFIG.json)"
    assert train.main([*TINY, "--vae.base_channels", "4", "--steps", "1", "--out", "ours"]) == 0
    capsys.readouterr()
    for flags, says in (
            (init[:2], "hint: norm_num_groups" + flag.format("train.init_hints")),
            (["--resume", "theirs.pt"], "made elsewhere (layout maisi); train.py --init takes it"),
            ([*init, "--resume", "ours"], "--init and --resume exclude one another"),
            ([*init, "--task", "seg"], "--init theirs.pt: is an autoencoder (layout maisi), for --task vae, not seg"),
            ([*init, "--preset", "base"], "--init theirs.pt: says itself what the network is; leave --preset out"),
            ([*init, "--data.synthetic", "radar"], "channels of the maisi network: 1, of the data: 4; use --data.select_channel N, or"),
            (["--init", "two.pt", *init[2:]], "two.pt: weights: the file holds several networks, model, ema; pass one as a hint: entry="),
            (["--init", "part.pt", *init[2:]], "10 missing: decoder.blocks.3.norm1.weight, decoder.blocks.3.norm1.bias, decoder"),
            (["--init", "other.pt"], "or an autoencoder's weights named as by monai, maisi, monai-generative, radar, diffusers"),
            (["--init", "ours", *init[2:]], "--init ours is none: its checkpoint says it all"),
            (init[2:], "there is no --init"),
            (["--preset", "maisi"], "preset must be one of ultra_lightweight")):
        assert train.main([*TINY, *flags] if "--resume" not in flags else flags) == 2
        assert says in one_line(capsys, "train.py"), (flags, says)
    ours = ["--checkpoint", "ours", "--input", "in", "--output", "out"]
    for flags, says in ((["decode", "--checkpoint", "theirs.pt", *ours[2:]], "hint: norm_num_groups" + flag.format("hints")),
                        (["segment", "--checkpoint", "theirs.pt", *ours[2:]], "made elsewhere (layout maisi)"),
                        (["decode", *ours, "--hints", HINTS], "a checkpoint of train.py, which says all that --hints could"),
                        (["decode", "--checkpoint", "other.pt", *ours[2:]], "is no checkpoint of kind")):
        assert predict.main(flags) == 2
        assert says in one_line(capsys, "predict.py"), (flags, says)
    assert train.main([*TINY, *init, "--data.synthetic", "radar", "--vae.in_channels", "4", "--steps", "1", "--out", "four"]) == 0
    assert "encoder.conv_in.weight (8, 1, 3, 3, 3) -> (8, 4, 3, 3, 3) (left as new)" in capsys.readouterr().out
