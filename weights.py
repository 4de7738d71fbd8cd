"""State dicts of other 3D autoencoders to and from `vae3d.VAE3D`. Needs torch, and vae3d.py copied beside it.

    content = torch.load("autoencoder.pt", weights_only=True)
    weights.is_foreign(content)                   # "maisi"; None for weights of ours or of nobody known
    cfg, state = weights.convert(content, norm_num_groups=32)
    vae = VAE3D(cfg).eval()
    vae.load_state_dict(state)                    # the same encode, decode and forward, in tiles too

    state, arguments = weights.export(vae, vae.state_dict())
    monai.networks.nets.AutoencoderKL(**arguments).load_state_dict(state)

Layouts, by what `is_foreign` calls them:
    monai             MONAI AutoencoderKL (1.4 and later): nearest or transposed upsampling, named apart
    maisi             MONAI AutoencoderKlMaisi, NV-Generate-CT / -MR: trilinear, or as use_convtranspose says
    monai-generative  AutoencoderKL of MONAI GenerativeModels: nearest, or as use_convtranspose says
    radar             VAE3D of the 4D-radar diffusion scripts: trilinear, up-strides in down-strides' order
    diffusers         AutoencoderKL as diffusers names it, with 3D convolutions

What names and shapes cannot say are hints, under the original constructor's names: `norm_num_groups` must
be given for the three MONAI layouts (radar and diffusers: 32 unless given); `norm_eps` (1e-6; radar 1e-5),
`use_convtranspose` (False; maisi and monai-generative), `downsample_strides`, `upsample_scales` and
`num_heads` (radar) are the original's defaults unless given. All other arguments of the constructor may be
passed too, a whole config as it stands: they are compared with what the weights say, and those that change
no result (num_splits, use_checkpoint ...) are left aside. Two hints are of no constructor:
`intensity_range`, the values that the original took for the darkest and the brightest, such as (0, 1);
VAE3D then takes and gives [-1, 1] all the same; left out, intensities go in as they are. And `entry`, which
of several networks in the file is meant.

Two inputs differ by design: an odd size, which MONAI's strided convolution cuts and VAE3D pads, and radar
latents, which are taken before the original's quant_conv here, since that convolution stands behind the
sampling there; it is folded into post_quant_conv, exactly.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from math import gcd, lcm
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vae3d import VAE3D, Attention3d, Head, ResBlock3d, Upsample3d, VAEConfig

BLOCKS = ("monai", "maisi", "monai-generative")            # layouts with one flat list of blocks
LAYOUTS = (*BLOCKS, "radar", "diffusers")
WRAPPERS = ("module.", "_orig_mod.", "model.", "vae.", "autoencoder.", "first_stage_model.")
# names that the projections of an attention go by: into it, and out of it
PROJECTIONS = (
    (("attn.to_q", "attn.to_k", "attn.to_v"), "attn.out_proj"), (("attn.qkv",), "attn.out_proj"),
    (("to_q", "to_k", "to_v"), "proj_attn"), (("to_q", "to_k", "to_v"), "to_out.0"),
    (("query", "key", "value"), "proj_attn"), (("q.conv", "k.conv", "v.conv"), "proj_out.conv"),
    (("qkv",), "proj"))
# constructor arguments that change no weight, and of the result at most the rounding
NO_EFFECT = ("spatial_dims", "dropout", "kl_weight", "use_checkpoint", "use_checkpointing",
             "use_flash_attention", "num_splits", "dim_split", "norm_float16", "print_info", "save_mem")


class HintError(ValueError):
    """A hint that is missing, unknown or denied by the weights."""


class Style(NamedTuple):
    """How a state dict spells what VAEConfig does not fix."""
    layout: str
    qkv: tuple[str, ...]         # of each attention
    proj: str | None             # None: no output projection (include_fc=False)
    norm_out: str = "norm_out"   # radar and diffusers: of the norm before conv_out


def is_foreign(state_dict: Mapping[str, Any]) -> str | None:
    """The layout's name, or None. Takes a state dict or a checkpoint that holds one."""
    found = candidates(state_dict)
    return layout_of(next(iter(found.values()))) if found else None


def candidates(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """State dicts of known layouts: the content itself, named "", or its entries; wrappers' prefixes go."""
    found = {}
    for name, entry in {"": content, **content}.items() if isinstance(content, Mapping) else ():
        if not isinstance(entry, Mapping) or not any(isinstance(v, Tensor) for v in entry.values()):
            continue
        while prefix := next((p for p in WRAPPERS if all(str(key).startswith(p) for key in entry)), None):
            entry = {key[len(prefix):]: value for key, value in entry.items()}
        if layout_of(entry):
            found[str(name)] = dict(entry)
    return {"": found[""]} if "" in found else found


def layout_of(state: Mapping[str, Any]) -> str | None:
    def any_key(pattern: str) -> bool:
        return any(re.search(pattern, str(key)) for key in state)

    if any_key(r"^encoder\.blocks\.\d+\.") and any_key(r"^decoder\.blocks\.\d+\."):
        if any_key(r"\.blocks\.\d+\.conv\d?\.conv\.conv\.|\.blocks\.0\.conv\.conv\."):
            return "maisi"
        if any_key(r"^decoder\.blocks\.\d+\.conv\.conv\."):
            return "monai-generative"
        older = any_key(r"\.blocks\.\d+\.(to_[qkv]|proj_attn|q|k|v|proj_out)\.")
        return "monai-generative" if older else "monai"
    if any_key(r"^encoder\.down_blocks\.\d+\.") and any_key(r"^decoder\.up_blocks\.\d+\."):
        return "diffusers" if any_key(r"\.resnets\.\d+\.") else "radar"
    return None


# ------------------------------------------------------------------------------------------------ convert

def convert(state_dict: Mapping[str, Any], **hints) -> tuple[VAEConfig, dict[str, Tensor]]:
    """A foreign state dict, or the checkpoint that holds it -> the same network's config and state dict here.

    Raises ValueError in one line: unknown layout; a hint that is missing, unknown or denied by the weights;
    every missing, unexpected and reshaped key; a network that VAE3D is not. Nothing is converted then.
    """
    state = chosen_entry(state_dict, hints.pop("entry", None))
    layout = layout_of(state)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    flat = [key for key, value in tensors.items() if value.dim() == 4]
    if flat and not any(value.dim() == 5 for value in tensors.values()):
        raise ValueError(f"weights: {flat[0]} has shape {tuple(state[flat[0]].shape)}, of a 2D network; "
                         f"VAE3D takes 3D ones")
    intensity_range = hints.pop("intensity_range", VAEConfig.intensity_range)
    is_pair = isinstance(intensity_range, (tuple, list)) and len(intensity_range) == 2
    if not is_pair or not all(type(value) in (int, float) for value in intensity_range):
        raise HintError(f"weights: hint intensity_range={intensity_range!r} is not two numbers, such as 0,1")

    style = style_of(state, layout)
    cfg = (infer_blocks if layout in BLOCKS else infer_down_up)(state, layout, hints)
    check_hints(hints, arguments(cfg, style), layout)
    return replace(cfg, intensity_range=intensity_range), translate(cfg, style, state)


def chosen_entry(content: Mapping[str, Any], entry: str | None) -> dict[str, Any]:
    """The one state dict of a known layout in the file, or that of several which `entry` names."""
    found = candidates(content)
    if not found:
        some = ", ".join(map(str, list(content)[:3])) or "none at all"
        raise ValueError(f"weights: names of no known layout ({', '.join(LAYOUTS)}), such as {some}")
    if entry in found:
        return found[entry]
    if len(found) == 1 and entry is None:
        return next(iter(found.values()))
    what = "several networks" if len(found) > 1 else "the network"
    text = f"weights: the file holds {what}, {', '.join(found) or 'itself'}; pass one as a hint: entry=..."
    if entry is not None:
        text += f", not {entry}"
    raise HintError(text)


def style_of(state: Mapping[str, Any], layout: str) -> Style:
    # the names of projections that occur most often; the first of PROJECTIONS where there is no attention
    scores = []
    for qkv, proj in PROJECTIONS:
        ends = tuple(f".{part}.weight" for part in (*qkv, proj))
        scores.append(sum(str(key).endswith(end) for key in state for end in ends))
    qkv, proj = PROJECTIONS[scores.index(max(scores))]
    has_proj = any(f".{proj}." in str(key) for key in state)
    norm_out = "conv_norm_out" if any(".conv_norm_out." in str(key) for key in state) else "norm_out"
    return Style(layout, qkv, proj if has_proj else None, norm_out)


def turn_axes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Ours for volumes whose axes come in the opposite order: kernels (O, I, k, k, k) are turned round.

    The same network, exactly, where every stride is a cube. Done twice it changes nothing.
    """
    turned = dict(state_dict)
    for name, value in state_dict.items():
        if isinstance(value, Tensor) and value.dim() == 5:
            turned[name] = value.permute(0, 1, 4, 3, 2).contiguous()
    return turned


def hint(hints: dict[str, Any], name: str, default: Any = None) -> Any:
    """The hint or its default. HintError where there is neither, or where a number above 0 is due."""
    if name not in hints and default is None:
        raise HintError(f"weights: neither names nor shapes say {name}; pass it as a hint: {name}=...")
    found = hints.get(name, default)
    kinds, what = ((int, float), "number") if isinstance(default, float) else (int, "whole number")
    if isinstance(default, (int, float)) and not (isinstance(found, kinds) and found > 0):
        raise HintError(f"weights: hint {name}={found!r} is no {what} above 0")
    return found


def groups_of(hints: dict[str, Any], widths: list[int], default: int | None, at_most: bool = False) -> int:
    """norm_num_groups; at_most: min(norm_num_groups, width) of each width."""
    groups = hint(hints, "norm_num_groups", default)
    is_count = type(groups) is int and groups >= 1
    if not is_count or any(w % (min(groups, w) if at_most else groups) for w in widths):
        raise HintError(f"weights: norm_num_groups={groups} does not divide all of the channels "
                        f"{tuple(widths)}")
    return groups


def vote(state: Mapping[str, Any], what: str, *places: tuple[str, int]) -> int:
    """The length that most tensors agree on, of those whose name matches a pattern, along its axis."""
    found = Counter(value.shape[axis] for pattern, axis in places for key, value in state.items()
                    if re.fullmatch(pattern, key) and isinstance(value, Tensor) and value.dim() > axis)
    if not found:
        patterns = " or ".join(pattern for pattern, _ in places)
        raise ValueError(f"weights: no key from which to read {what}: {patterns}")
    return found.most_common(1)[0][0]


KINDS = (("R", r"(norm|conv)[12]\.|nin_shortcut\."), ("A", r"norm\.|attn\.|to_[qkv]\.|[qkv]\.|qkv\.|proj"),
         ("S", r"(post|de)?conv\."), ("N", "weight|bias"))


def kind_of(tails: list[str]) -> str:
    """R residual block, A attention, S convolution that stands alone, N norm that does; ? without a key."""
    for kind, pattern in KINDS:
        if any(re.match(pattern, tail) for tail in tails):
            return kind
    return "?"


def level_fields(widths: list[int], counts: tuple[int, ...], attended: tuple[bool, ...]) -> dict[str, Any]:
    """Fields of VAEConfig that stand for widths, residual blocks and attention of each level."""
    base = gcd(*widths)
    fields = dict(base_channels=base, channel_mult=tuple(w // base for w in widths), num_res_blocks=counts[0],
                  head_channels=lcm(*widths))              # so that any width is one head
    fields["blocks_per_level"] = counts if len(set(counts)) > 1 else ()
    fields["attention_levels"] = attended if any(attended) else ()
    return fields


def infer_blocks(state: Mapping[str, Any], layout: str, hints: dict[str, Any]) -> VAEConfig:
    """The config of a MONAI autoencoder from its lists of blocks; missing keys are left to `translate`."""
    # first the kinds of the blocks between the first convolution and the head, a letter each
    sides = {}
    for side in ("encoder", "decoder"):
        tails: dict[int, list[str]] = {}
        for key in state:
            if match := re.match(side + r"\.blocks\.(\d+)\.(.*)", str(key)):
                tails.setdefault(int(match[1]), []).append(match[2])
        if max(tails) > 2 * len(state):          # a hostile number would be counted up to
            raise ValueError(f"weights: {side}.blocks.{max(tails)} in a file with {len(state)} keys; "
                             f"it is damaged")
        kinds = [kind_of(tails.get(i, [])) for i in range(max(tails) + 1)]
        end = len(kinds) - (kinds[-1] == "S")
        end -= kinds[end - 1] in "N?"            # the head: a norm and a convolution
        sides[side] = "".join(kinds[1:end]).replace("?", "R"), end
    (encoder, _), (decoder, last) = sides["encoder"], sides["decoder"]

    # then the encoder's levels, which its down-convolutions part, and the middles
    levels = encoder.split("S")
    encoder_attends = levels[-1].endswith("RAR")
    decoder_attends = decoder.startswith("RAR") and not decoder.startswith("RARA")
    levels[-1] = levels[-1].removesuffix("RAR")
    widths, at = [], 1
    for level in levels:
        own = "|".join(str(at + i) for i in range(len(level))) or "-"
        follows = at + len(level)                # down-convolution, middle or head
        convolutions = rf"encoder\.blocks\.({own})\.(norm2|conv1|conv2)(\.conv)*\.(weight|bias)"
        widths.append(vote(state, "channels", (convolutions, 0),
                           (rf"encoder\.blocks\.{follows}\..*(weight|bias)", 0)))
        at += len(level) + 1
    groups = groups_of(hints, widths, 1 if gcd(*widths) == 1 else None)
    is_transposed = hints.get("use_convtranspose", False)
    if layout == "monai" and len(widths) > 1:
        is_transposed = any(".deconv." in key for key in state)
    upsample = "trilinear" if layout == "maisi" else "nearest"
    if is_transposed:
        upsample = "transposed" if layout == "monai" else "transposed3"
    latent = r"(quant_conv_mu|quant_conv_log_sigma|post_quant_conv)(\.conv)+\.(weight|bias)"
    counts = tuple(level.count("R") for level in levels)
    attended = tuple("A" in level for level in levels)
    return VAEConfig(
        in_channels=vote(state, "in_channels", (rf"decoder\.blocks\.{last + 1}(\.conv)+\.(weight|bias)", 0),
                         (r"encoder\.blocks\.0(\.conv)+\.weight", 1)),
        z_channels=vote(state, "latent_channels", (latent, 0), (r"decoder\.blocks\.0(\.conv)+\.weight", 1)),
        **level_fields(widths, counts, attended), decoder_extra_blocks=0,
        norm="group", norm_groups=groups, norm_eps=hint(hints, "norm_eps", 1e-6),
        encoder_middle="attention" if encoder_attends else "none",
        decoder_middle="attention" if decoder_attends else "none",
        strides=((2, 2, 2),) * (len(widths) - 1), down_padding="end", upsample=upsample, head_act=False,
        quant_conv="split", post_quant_conv=True)


def infer_down_up(state: Mapping[str, Any], layout: str, hints: dict[str, Any]) -> VAEConfig:
    """The config of a network with down_blocks, mid_block and up_blocks."""
    def any_key(pattern: str) -> bool:
        return any(re.match(pattern, str(key)) for key in state)

    # first the residual blocks of each level, on both sides
    blocks = []
    for side in ("encoder.down", "decoder.up"):
        place = re.compile(side + r"_blocks\.(\d+)\.(\d+|resnets\.\d+)\.(.*)")
        matches = [place.match(str(key)) for key in state]
        found = {match.group(1, 2) for match in matches if match and kind_of([match[3]]) == "R"}
        blocks.append(Counter(int(level) for level, _ in found))
    down, up = blocks
    if max(down, default=0) > len(state):
        raise ValueError(f"weights: encoder.down_blocks.{max(down)} in a file with {len(state)} keys; it is "
                         f"damaged")
    levels = range(max(down, default=-1) + 1)
    counts = tuple(down[level] for level in levels)
    if not levels or 0 in counts:
        raise ValueError(f"weights: the encoder's down_blocks have {counts or 'no'} residual blocks a level; "
                         f"at least one each is needed")
    widths = []
    for level in levels:
        place = rf"encoder\.down_blocks\.{level}\.(resnets\.)?\d+\.(norm2|conv1|conv2)\.(weight|bias)"
        widths.append(vote(state, "channels", (place, 0)))
    extra = Counter(up[len(counts) - 1 - level] - counts[level] for level in levels).most_common(1)[0][0]

    # then what both layouts have, and what is of one alone
    is_radar = layout == "radar"
    groups = groups_of(hints, widths, 32, at_most=True)
    attended = ()
    if not is_radar:
        attended = tuple(any_key(rf"encoder\.down_blocks\.{level}\.attentions\.") for level in levels)
    fields = level_fields(widths, counts, attended)
    fields.update(decoder_extra_blocks=max(0, extra), post_quant_conv=any_key("(post_)?quant_conv"),
                  norm="group", norm_groups=groups,
                  norm_eps=hint(hints, "norm_eps", 1e-5 if is_radar else 1e-6))
    if is_radar:
        attention, heads = any_key(r".*\.qkv\."), hint(hints, "num_heads", 4)
        if attention and widths[-1] % heads:
            raise HintError(f"weights: num_heads={heads} does not divide the {widths[-1]} channels of the "
                            f"attention")
        usual, changes = [(1, 2, 2), (2, 2, 2)] + [(1, 2, 2)] * len(counts), len(counts) - 1
        strides, scales = (tuple(map(tuple, hint(hints, name, usual)))[:changes]
                           for name in ("downsample_strides", "upsample_scales"))
        fields.update(attention=attention, head_channels=max(1, widths[-1] // heads), strides=strides,
                      upsample="trilinear", up_strides=() if scales[::-1] == strides else scales[::-1])
    else:
        for side in ("encoder", "decoder"):
            attends = any_key(side + r"\.mid_block\.attentions\.")
            fields[f"{side}_middle"] = "attention" if attends else "blocks"
        fields.update(quant_conv="joint" if fields["post_quant_conv"] else "none",
                      strides=((2, 2, 2),) * (len(counts) - 1), down_padding="end")
    latent = vote(state, "latent_channels", (r"decoder\.conv_in\.weight", 1),
                  (r"post_quant_conv\.(weight|bias)", 0))
    channels = vote(state, "in_channels", (r"decoder\.conv_out\.(weight|bias)", 0),
                    (r"encoder\.conv_in\.weight", 1))
    return VAEConfig(in_channels=channels, z_channels=latent, **fields)


def arguments(cfg: VAEConfig, style: Style) -> dict[str, Any]:
    """What the original's constructor was told, as far as it shows in the config."""
    found = dict(in_channels=cfg.in_channels, out_channels=cfg.in_channels, norm_num_groups=cfg.norm_groups,
                 norm_eps=cfg.norm_eps)
    if style.layout == "radar":
        mult = tuple(w / cfg.widths[0] for w in cfg.widths)      # the original's first multiplier is 1
        return dict(**found, latent_dim=cfg.z_channels, base_channels=cfg.widths[0],
                    num_res_blocks=cfg.num_res_blocks, encoder_channel_mult=mult,
                    decoder_channel_mult=mult[::-1], use_attention=cfg.attention)
    if style.layout == "diffusers":
        return dict(**found, latent_channels=cfg.z_channels, block_out_channels=cfg.widths,
                    layers_per_block=cfg.num_res_blocks)
    found["num_channels" if style.layout == "maisi" else "channels"] = cfg.widths
    return dict(**found, spatial_dims=3, num_res_blocks=cfg.blocks, latent_channels=cfg.z_channels,
                attention_levels=cfg.attention_levels or (False,) * len(cfg.widths),
                with_encoder_nonlocal_attn=cfg.encoder_middle == "attention",
                with_decoder_nonlocal_attn=cfg.decoder_middle == "attention",
                use_convtranspose=cfg.upsample.startswith("transposed"),
                include_fc=style.proj is not None, use_combined_linear=len(style.qkv) == 1)


def check_hints(hints: dict[str, Any], known: dict[str, Any], layout: str) -> None:
    """Every hint is one that the layout knows and agrees with what was inferred."""
    if "channels" in known:
        known = {**known, "num_channels": known["channels"]}     # as the older one calls it
    # what was read from the hint itself, or of an attention that is not there, is not compared
    read = ("downsample_strides", "upsample_scales", "num_heads") if layout == "radar" else ()
    attends = [*known.get("attention_levels", ())]
    attends += [known.get(f"with_{side}_nonlocal_attn") for side in ("encoder", "decoder")]
    if not any(attends):
        read += ("include_fc", "use_combined_linear")
    for name, given in hints.items():
        if name in known and name not in read:
            found = known[name]
            if isinstance(found, tuple):
                given = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(found)
            if given != found:
                raise HintError(f"weights: hint {name}={given}, but the weights say {found}")
        elif name not in NO_EFFECT + read:
            names = [*known, *read, *NO_EFFECT, "intensity_range", "entry"]
            close = difflib.get_close_matches(name, names, 1)
            advice = f"; did you mean {close[0]}?" if close else f" for layout {layout}"
            raise HintError(f"weights: unknown hint {name}{advice}")


# ------------------------------------------------------------------------------ one table of names, both ways

def name_table(cfg: VAEConfig, style: Style) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
    """Each of our keys -> the foreign keys that make it, joined along output channels; and our shapes."""
    with torch.device("meta"):
        vae = VAE3D(cfg)
    table = {}
    for side, layers in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        index, seen = 0, Counter()
        for name, layer in layers.named_children():
            if name.endswith("quant_conv"):
                place = ""
            elif style.layout in BLOCKS:
                place = f"{side}.blocks.{index}"
                index += 2 if isinstance(layer, Head) else 1
            else:
                place = f"{side}.{down_up_place(name, side, len(cfg.widths), seen, style.layout)}"
            for ours, theirs in names_of(layer, name, side, place, cfg, style):
                for kind in ("weight", "bias"):
                    table[f"{side}.{name}{ours}.{kind}"] = [f"{part}.{kind}" for part in theirs]
    return table, {key: tuple(value.shape) for key, value in vae.state_dict().items()}


def names_of(layer: nn.Module, name: str, side: str, place: str, cfg: VAEConfig,
             style: Style) -> list[tuple[str, list[str]]]:
    """A layer's convolutions and norms: (what follows its name, foreign names); place: its foreign name."""
    layout, is_flat = style.layout, style.layout in BLOCKS
    conv = ""                                    # MONAI wraps a convolution, MAISI does so twice
    if is_flat:
        conv = ".conv.conv" if layout == "maisi" and not name.startswith("mid") else ".conv"
    if isinstance(layer, ResBlock3d):
        found = [(f".{part}", [f"{place}.{part}"]) for part in ("norm1", "norm2")]
        found += [(f".{part}", [f"{place}.{part}{conv}"]) for part in ("conv1", "conv2")]
        if isinstance(layer.skip, nn.Conv3d):
            skips = {"radar": ".skip", "diffusers": ".conv_shortcut"}
            found.append((".skip", [place + skips.get(layout, f".nin_shortcut{conv}")]))
        return found
    if isinstance(layer, Attention3d):
        norm = "group_norm" if layout == "diffusers" else "norm"
        proj = [f"{place}.{style.proj}"] if style.proj else []
        return [(".norm", [f"{place}.{norm}"]), (".qkv", [f"{place}.{part}" for part in style.qkv]),
                (".proj", proj)]
    if isinstance(layer, Head):                  # MONAI: two blocks, the norm and the convolution behind it
        if not is_flat:
            return [(".norm", [f"{side}.{style.norm_out}"]), (".conv", [f"{side}.conv_out"])]
        blocks, _, index = place.rpartition(".")
        return [(".norm", [place]), (".conv", [f"{blocks}.{int(index) + 1}{conv}"])]
    if isinstance(layer, Upsample3d):
        part = f".conv{conv}"
        if layout == "monai":
            part = ".deconv" if cfg.upsample == "transposed" else f".postconv{conv}"
        return [(".conv", [place + part])]
    if name.endswith("_down"):
        return [("" if isinstance(layer, nn.Conv3d) else ".conv", [f"{place}.conv{conv}"])]
    if name == "quant_conv":
        return [("", ["quant_conv_mu.conv", "quant_conv_log_sigma.conv"] if is_flat else ["quant_conv"])]
    if name == "post_quant_conv":
        return [("", ["post_quant_conv.conv" if is_flat else "post_quant_conv"])]
    return [("", [place + conv])]


RADAR_MIDDLE = {"mid_block0": "mid_block.0", "mid_attention": "mid_block.1", "mid_block1": "mid_block.2"}
DIFFUSERS_MIDDLE = {"mid_block0": "mid_block.resnets.0", "mid_attention": "mid_block.attentions.0",
                    "mid_block1": "mid_block.resnets.1"}


def down_up_place(name: str, side: str, levels: int, seen: Counter, layout: str) -> str:
    """Our layer's name -> its place in the encoder or decoder of the layouts with down and up blocks."""
    match = re.fullmatch(r"level(\d+)_(\D+)(\d*)", name)
    if not match:
        return (RADAR_MIDDLE if layout == "radar" else DIFFUSERS_MIDDLE).get(name, name)
    level, part, number = int(match[1]), match[2], match[3]
    block = f"down_blocks.{level}" if side == "encoder" else f"up_blocks.{levels - 1 - level}"
    if layout == "radar":                        # numbered through: blocks, attention, down or up
        seen[block] += 1
        return f"{block}.{seen[block] - 1}"
    parts = {"block": f"resnets.{number}", "attention": f"attentions.{number}", "down": "downsamplers.0",
             "up": "upsamplers.0"}
    return f"{block}.{parts[part]}"


def translate(cfg: VAEConfig, style: Style, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict. ValueError with every missing, unexpected and reshaped key."""
    table, shapes = name_table(cfg, style)
    # first the shapes that a foreign key may have; a linear layer is a 1x1x1 convolution
    wanted: dict[str, list[tuple[int, ...]]] = {}
    for ours, theirs in table.items():
        for key in theirs:
            shape = (shapes[ours][0] // len(theirs), *shapes[ours][1:])
            wanted[key] = [shape]
            if "attention" in ours and shape[2:] == (1, 1, 1):
                wanted[key].append(shape[:2])
    is_folded = style.layout == "radar" and cfg.post_quant_conv
    if is_folded:
        wanted |= {f"quant_conv.{kind}": wanted[f"post_quant_conv.{kind}"] for kind in ("weight", "bias")}
    check_keys(cfg, style, state, wanted, table["encoder.conv_in.weight"][0])

    # then the tensors
    state = dict(state)
    if is_folded:                                # both are 1x1x1; behind the sampling nothing lies between
        first, then = (state[f"{name}.weight"].flatten(1) for name in ("quant_conv", "post_quant_conv"))
        bias = then @ state["quant_conv.bias"] + state["post_quant_conv.bias"]
        state["post_quant_conv.weight"] = (then @ first)[..., None, None, None]
        state["post_quant_conv.bias"] = bias
    found, like = {}, next(iter(state.values()))
    for ours, theirs in table.items():
        if theirs:
            found[ours] = torch.cat([state[key] for key in theirs]).reshape(shapes[ours])
        else:                                    # no output projection: one that changes nothing
            make = torch.eye if ours.endswith("weight") else torch.zeros
            value = make(*shapes[ours][:2], dtype=like.dtype, device=like.device)
            found[ours] = value.reshape(shapes[ours])
    return found


def check_keys(cfg: VAEConfig, style: Style, state: Mapping[str, Any],
               wanted: dict[str, list[tuple[int, ...]]], first: str) -> None:
    """ValueError that names every key which is not as wanted; first: that of the first convolution."""
    def shape_of(key: str) -> tuple[int, ...]:
        return tuple(getattr(state[key], "shape", ()))

    missing = [key for key in wanted if key not in state]
    unexpected = [str(key) for key in state if key not in wanted]
    reshaped = []
    for key, shapes in wanted.items():
        if key in state and shape_of(key) not in shapes:
            reshaped.append(f"{key} {shape_of(key)} for {' or '.join(map(str, shapes))}")
    lists = {"missing": missing, "unexpected": unexpected, "reshaped": reshaped}
    wrong = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in lists.items() if keys]
    if first in state and shape_of(first) != wanted[first][0]:
        wrong.append(f"{cfg.in_channels} channels go out: VAE3D reconstructs its input, so that as many must "
                     f"come in")
    if wrong:
        raise ValueError(f"weights: the keys do not make a {style.layout} network with {len(cfg.widths)} "
                         f"levels of {cfg.widths} channels; {'; '.join(wrong)}")


# ------------------------------------------------------------------------------------------------ export

def export(vae: VAE3D | VAEConfig, state_dict: Mapping[str, Tensor] | None = None,
           layout: str = "monai") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our weights -> state dict of MONAI's AutoencoderKL (or AutoencoderKlMaisi), arguments that build it.

    state_dict: ours; left out, that of the model. ValueError that lists why, where MONAI has no such network.
    That takes and gives intensities as cfg.intensity_range has them.
    """
    cfg = vae if isinstance(vae, VAEConfig) else vae.cfg
    if layout not in ("monai", "maisi"):
        raise ValueError(f"weights: export knows the layouts monai and maisi, got {layout!r}")
    if state_dict is None and isinstance(vae, VAEConfig):
        raise ValueError("weights: export needs the state dict besides the config")
    ours = vae.state_dict() if state_dict is None else state_dict
    groups = {max(g for g in range(1, cfg.norm_groups + 1) if w % g == 0) for w in cfg.widths}
    reasons = reasons_against(cfg, groups, layout)
    if reasons:
        raise ValueError("weights: MONAI has no such network: " + "; ".join(reasons))

    style = Style(layout, ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.out_proj")
    table, shapes = name_table(cfg, style)
    wrong = []
    for key in {**shapes, **ours}:
        if key not in ours:
            wrong.append(f"{key} missing")
        elif key not in shapes:
            wrong.append(f"{key} unexpected")
        elif tuple(ours[key].shape) != shapes[key]:
            wrong.append(f"{key} reshaped")
    if wrong:
        raise ValueError(f"weights: the state dict is not of this config: {', '.join(wrong)}")

    found = {}
    for key, theirs in table.items():
        # MONAI's attention has linear layers where ours has 1x1x1 convolutions
        parts = ours[key].flatten(1) if "attention" in key and ours[key].dim() == 5 else ours[key]
        found.update(zip(theirs, (part.clone() for part in parts.chunk(len(theirs)))))
    if not cfg.post_quant_conv:                  # MONAI always has one: the one that changes nothing
        z, like = cfg.z_channels, next(iter(ours.values()))
        identity = torch.eye(z, dtype=like.dtype, device=like.device)
        found["post_quant_conv.conv.weight"] = identity[..., None, None, None]
        found["post_quant_conv.conv.bias"] = torch.zeros_like(identity[0])
    told = arguments(cfg, style) | {"norm_num_groups": groups.pop()}
    if layout == "maisi":
        told["num_splits"] = 1
    return found, told


def reasons_against(cfg: VAEConfig, groups: set[int], layout: str) -> list[str]:
    """Why MONAI has no network of this config; nothing where it has."""
    attended = {w for w, is_attended in zip(cfg.widths, cfg.attention_levels) if is_attended}
    middles = cfg.encoder_middle, cfg.decoder_middle
    if "attention" in middles:
        attended.add(cfg.widths[-1])
    upsamples = ("nearest", "transposed") if layout == "monai" else ("trilinear", "transposed3")
    table = (
        (cfg.bottleneck != "kl", f"vae.bottleneck is {cfg.bottleneck}, not kl"),
        (cfg.norm != "group", f"vae.norm is {cfg.norm}, not group"),
        (len(groups) > 1, f"vae.norm_groups={cfg.norm_groups} gives {sorted(groups)} groups for the widths "
                          f"{cfg.widths}, not one number"),
        (cfg.unshuffle != (1, 1, 1), f"vae.unshuffle is {cfg.unshuffle}, not 1,1,1"),
        ({*cfg.strides, *cfg.up_strides} - {(2, 2, 2)}, f"vae.strides are {cfg.strides}, not 2,2,2 each"),
        (cfg.down_padding != "end", f"vae.down_padding is {cfg.down_padding}, not end"),
        (cfg.upsample not in upsamples, f"vae.upsample is {cfg.upsample}, not {' or '.join(upsamples)}"),
        (cfg.up_narrows, "vae.up_narrows is set"),
        (cfg.head_act, "vae.head_act is on"),
        (cfg.decoder_extra_blocks != 0, f"vae.decoder_extra_blocks is {cfg.decoder_extra_blocks}, not 0"),
        (cfg.attention, "vae.attention is on; MONAI has attention after every block of a level "
                        "(vae.attention_levels) or none there"),
        ("blocks" in middles, "vae.encoder_middle or vae.decoder_middle is blocks, not attention or none"),
        (any(w != gcd(w, cfg.head_channels) for w in attended),
         f"vae.head_channels={cfg.head_channels} makes several attention heads"),
        (cfg.quant_conv != "split", f"vae.quant_conv is {cfg.quant_conv}, not split"),
    )
    return [reason for is_impossible, reason in table if is_impossible]
