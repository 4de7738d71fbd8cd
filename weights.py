"""State dicts of other 3D autoencoders to and from `vae3d.VAE3D`. Needs torch and vae3d.py and nothing else; copy the two together.

    content = torch.load("autoencoder.pt", weights_only=True)
    weights.is_foreign(content)                              # "maisi"; None for weights of ours or of nobody known
    cfg, state = weights.convert(content, norm_num_groups=32)
    vae = VAE3D(cfg).eval()
    vae.load_state_dict(state)                               # the same encode, decode and forward, in tiles too

    state, arguments = weights.export(vae, vae.state_dict())
    monai.networks.nets.AutoencoderKL(**arguments).load_state_dict(state)

Layouts, by what `is_foreign` calls them:
    monai             MONAI AutoencoderKL (1.4 and later): nearest or transposed upsampling, named apart
    maisi             MONAI AutoencoderKlMaisi, NV-Generate-CT / -MR: trilinear upsampling, or transposed where use_convtranspose says so
    monai-generative  AutoencoderKL of the older MONAI GenerativeModels: nearest, or transposed where use_convtranspose says so
    radar             VAE3D of the 4D-radar diffusion scripts: trilinear, upsampling strides in the order of the downsampling ones, 4 heads
    diffusers         AutoencoderKL as diffusers names it, with 3D convolutions

What names and shapes cannot say are hints, under the original constructor's names: `norm_num_groups` must be given for the three MONAI
layouts (radar and diffusers: 32 unless given); `norm_eps` (1e-6; radar 1e-5), `use_convtranspose` (False; maisi and monai-generative),
`downsample_strides`, `upsample_scales` and `num_heads` (radar) are the original's defaults unless given. All other arguments of the
constructor may be passed too, a whole config as it stands: they are compared with what the weights say, and those that change no result
(num_splits, use_checkpoint ...) are left aside. Two hints are of no constructor: `intensity_range`, the values that the original took
for the darkest and the brightest, such as (0, 1); VAE3D then takes and gives [-1, 1] all the same; left out, intensities go in as they
are. And `entry`, which of several networks in the file is meant.

Two inputs differ by design: an odd size, which MONAI's strided convolution cuts and VAE3D pads, and radar latents, which are taken before
the original's quant_conv here, since that convolution stands behind the sampling there; it is folded into post_quant_conv, exactly.
Version 0.1 (2026-11).
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

BLOCKS = ("monai", "maisi", "monai-generative")                  # layouts with one flat list of blocks
LAYOUTS = (*BLOCKS, "radar", "diffusers")
WRAPPERS = ("module.", "_orig_mod.", "model.", "vae.", "autoencoder.", "first_stage_model.")
PROJECTIONS = ((("attn.to_q", "attn.to_k", "attn.to_v"), "attn.out_proj"), (("attn.qkv",), "attn.out_proj"),
               (("to_q", "to_k", "to_v"), "proj_attn"), (("to_q", "to_k", "to_v"), "to_out.0"), (("query", "key", "value"), "proj_attn"),
               (("q.conv", "k.conv", "v.conv"), "proj_out.conv"), (("qkv",), "proj"))  # names an attention's projections go by
NO_EFFECT = ("spatial_dims", "dropout", "kl_weight", "use_checkpoint", "use_checkpointing", "use_flash_attention", "num_splits",
             "dim_split", "norm_float16", "print_info", "save_mem")  # constructor arguments that change no weight and at most rounding


class HintError(ValueError):
    """A hint that is missing, unknown or denied by the weights."""


class Style(NamedTuple):
    """How a state dict spells what VAEConfig does not fix."""
    layout: str
    qkv: tuple[str, ...]                                         # of each attention
    proj: str | None                                             # None: no output projection (include_fc=False)
    norm_out: str = "norm_out"                                   # radar and diffusers: of the norm before conv_out


# ------------------------------------------------------------------------------------------------ recognise

def is_foreign(state_dict: Mapping[str, Any]) -> str | None:
    """The layout's name, or None. Takes a state dict or a checkpoint that holds one."""
    found = candidates(state_dict)
    return layout_of(next(iter(found.values()))) if found else None


def candidates(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """State dicts of known layouts: the content itself (""), or those of its entries; wrappers' prefixes are taken off."""
    found = {}
    for name, entry in {"": content, **content}.items() if isinstance(content, Mapping) else ():
        if isinstance(entry, Mapping) and any(isinstance(value, Tensor) for value in entry.values()):
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
        older = any_key(r"^decoder\.blocks\.\d+\.conv\.conv\.|\.blocks\.\d+\.(to_q|to_k|to_v|proj_attn|q|k|v|proj_out)\.")
        return "monai-generative" if older else "monai"
    if any_key(r"^encoder\.down_blocks\.\d+\.") and any_key(r"^decoder\.up_blocks\.\d+\."):
        return "diffusers" if any_key(r"\.resnets\.\d+\.") else "radar"
    return None


# ------------------------------------------------------------------------------------------------ convert

def convert(state_dict: Mapping[str, Any], **hints) -> tuple[VAEConfig, dict[str, Tensor]]:
    """A foreign state dict, or the checkpoint that holds it -> the config of the same network and its state dict for VAE3D.

    Raises ValueError in one line: unknown layout; a hint that is missing, unknown or denied by the weights; every missing, unexpected and
    reshaped key; a network that VAE3D is not. Nothing is converted then.
    """
    found = candidates(state_dict)
    if not found:
        some = ", ".join(map(str, list(state_dict)[:3])) or "none at all"
        raise ValueError(f"weights: names of no known layout ({', '.join(LAYOUTS)}), such as {some}")
    entry = hints.pop("entry", None)
    if entry in found:
        found = {entry: found[entry]}
    elif len(found) > 1 or entry is not None:
        raise HintError(f"weights: the file holds {'several networks' if len(found) > 1 else 'the network'}, {', '.join(found) or 'itself'}"
                        f"; pass one as a hint: entry=..." + f", not {entry}" * (entry is not None))
    state, = found.values()
    layout, flat = layout_of(state), [key for key, value in state.items() if isinstance(value, Tensor) and value.dim() == 4]
    if flat and not any(isinstance(value, Tensor) and value.dim() == 5 for value in state.values()):
        raise ValueError(f"weights: {flat[0]} has shape {tuple(state[flat[0]].shape)}, of a 2D network; VAE3D takes 3D ones")
    score = [sum(str(key).endswith(f".{part}.weight") for key in state for part in (*qkv, proj)) for qkv, proj in PROJECTIONS]
    qkv, proj = PROJECTIONS[score.index(max(score))]
    norm_out = "conv_norm_out" if any(".conv_norm_out." in str(key) for key in state) else "norm_out"
    style = Style(layout, qkv, proj if any(f".{proj}." in str(key) for key in state) else None, norm_out)
    intensity_range = hints.pop("intensity_range", VAEConfig.intensity_range)
    if not (isinstance(intensity_range, (tuple, list)) and [type(value) in (int, float) for value in intensity_range] == [True, True]):
        raise HintError(f"weights: hint intensity_range={intensity_range!r} is not two numbers, such as 0,1")
    cfg = (infer_blocks if layout in BLOCKS else infer_down_up)(state, layout, hints)
    check_hints(hints, arguments(cfg, style), layout)
    return replace(cfg, intensity_range=intensity_range), translate(cfg, style, state)


def turn_axes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Ours for volumes whose axes come in the opposite order, x,y,z instead of z,y,x: its kernels (O, I, k, k, k) turned round.

    The same network, exactly, where every stride is a cube. Done twice it changes nothing.
    """
    return {name: value.permute(0, 1, 4, 3, 2).contiguous() if isinstance(value, Tensor) and value.dim() == 5 else value
            for name, value in state_dict.items()}


def hint(hints: dict[str, Any], name: str, default: Any = None) -> Any:
    if name not in hints and default is None:
        raise HintError(f"weights: neither names nor shapes say {name}; pass it as a hint: {name}=...")
    found, kind = hints.get(name, default), (int, float) if isinstance(default, float) else int
    if isinstance(default, (int, float)) and not (isinstance(found, kind) and found > 0):
        raise HintError(f"weights: hint {name}={found!r} is no {'whole ' * (kind is int)}number above 0")
    return found


def groups_of(hints: dict[str, Any], widths: list[int], default: int | None, at_most: bool = False) -> int:
    """norm_num_groups; at_most: min(norm_num_groups, width) of each width."""
    groups = hint(hints, "norm_num_groups", default)
    if type(groups) is not int or groups < 1 or any(w % (min(groups, w) if at_most else groups) for w in widths):
        raise HintError(f"weights: norm_num_groups={groups} does not divide all of the channels {tuple(widths)}")
    return groups


def vote(state: Mapping[str, Any], what: str, *places: tuple[str, int]) -> int:
    """The length that most tensors agree on, of those whose name matches a pattern, along the axis given with it."""
    found = Counter(value.shape[axis] for pattern, axis in places for key, value in state.items()
                    if re.fullmatch(pattern, key) and isinstance(value, Tensor) and value.dim() > axis)
    if not found:
        raise ValueError(f"weights: no key from which to read {what}: {' or '.join(pattern for pattern, _ in places)}")
    return found.most_common(1)[0][0]


def kind_of(tails: list[str]) -> str:
    """R residual block, A attention, S convolution that stands alone, N norm that does; ? where there is no key."""
    for kind, pattern in (("R", r"(norm|conv)[12]\.|nin_shortcut\."), ("A", r"norm\.|attn\.|to_[qkv]\.|[qkv]\.|qkv\.|proj"),
                          ("S", r"(post|de)?conv\."), ("N", "weight|bias")):
        if any(re.match(pattern, tail) for tail in tails):
            return kind
    return "?"


def level_fields(widths: list[int], counts: tuple[int, ...], attended: tuple[bool, ...] = ()) -> dict[str, Any]:
    base = gcd(*widths)
    return dict(base_channels=base, channel_mult=tuple(w // base for w in widths), num_res_blocks=counts[0],
                blocks_per_level=counts if len(set(counts)) > 1 else (), attention_levels=attended if any(attended) else (),
                head_channels=lcm(*widths))                      # so that any width is one head


def infer_blocks(state: Mapping[str, Any], layout: str, hints: dict[str, Any]) -> VAEConfig:
    """The config of a MONAI autoencoder from its two lists of blocks; names of missing keys are left to `translate`."""
    sides = {}
    for side in ("encoder", "decoder"):
        tails: dict[int, list[str]] = {}
        for key in state:
            if match := re.match(side + r"\.blocks\.(\d+)\.(.*)", str(key)):
                tails.setdefault(int(match[1]), []).append(match[2])
        if max(tails) > 2 * len(state):                          # a hostile number would be counted up to
            raise ValueError(f"weights: {side}.blocks.{max(tails)} in a file with {len(state)} keys; it is damaged")
        kinds = [kind_of(tails.get(i, [])) for i in range(max(tails) + 1)]
        end = len(kinds) - (kinds[-1] == "S")
        end -= kinds[end - 1] in "N?"                            # the head: a norm and a convolution
        sides[side] = "".join(kinds[1:end]).replace("?", "R"), end
    (encoder, _), (decoder, last) = sides["encoder"], sides["decoder"]
    levels = encoder.split("S")
    middles = levels[-1].endswith("RAR"), decoder.startswith("RAR") and not decoder.startswith("RARA")
    levels[-1] = levels[-1].removesuffix("RAR")
    widths, at = [], 1
    for level in levels:
        own = "|".join(str(at + i) for i in range(len(level))) or "-"  # and what follows: down-convolution, middle or head
        widths.append(vote(state, "channels", (rf"encoder\.blocks\.({own})\.(norm2|conv1|conv2)(\.conv)*\.(weight|bias)", 0),
                           (rf"encoder\.blocks\.{at + len(level)}\..*(weight|bias)", 0)))
        at += len(level) + 1
    groups = groups_of(hints, widths, 1 if gcd(*widths) == 1 else None)
    transposed = hints.get("use_convtranspose", False)
    latent = r"(quant_conv_mu|quant_conv_log_sigma|post_quant_conv)(\.conv)+\.(weight|bias)"
    if layout == "monai" and len(widths) > 1:
        transposed = any(".deconv." in key for key in state)
    plain, other = {"monai": ("nearest", "transposed"), "maisi": ("trilinear", "transposed3")}.get(layout, ("nearest", "transposed3"))
    counts = tuple(level.count("R") for level in levels)
    return VAEConfig(
        in_channels=vote(state, "in_channels", (rf"decoder\.blocks\.{last + 1}(\.conv)+\.(weight|bias)", 0),
                         (r"encoder\.blocks\.0(\.conv)+\.weight", 1)),
        z_channels=vote(state, "latent_channels", (latent, 0), (r"decoder\.blocks\.0(\.conv)+\.weight", 1)),
        **level_fields(widths, counts, tuple("A" in level for level in levels)), decoder_extra_blocks=0,
        norm="group", norm_groups=groups, norm_eps=hint(hints, "norm_eps", 1e-6),
        encoder_middle="attention" if middles[0] else "none", decoder_middle="attention" if middles[1] else "none",
        strides=((2, 2, 2),) * (len(widths) - 1), down_padding="end", upsample=other if transposed else plain, head_act=False,
        quant_conv="split", post_quant_conv=True)


def infer_down_up(state: Mapping[str, Any], layout: str, hints: dict[str, Any]) -> VAEConfig:
    """The config of a network with down_blocks, mid_block and up_blocks."""
    radar = layout == "radar"
    blocks = []
    for side in ("encoder.down", "decoder.up"):
        place = re.compile(side + r"_blocks\.(\d+)\.(\d+|resnets\.\d+)\.(.*)")
        found = {match.group(1, 2) for key in state if (match := place.match(str(key))) and kind_of([match[3]]) == "R"}
        blocks.append(Counter(int(level) for level, _ in found))
    if max(blocks[0], default=0) > len(state):
        raise ValueError(f"weights: encoder.down_blocks.{max(blocks[0])} in a file with {len(state)} keys; it is damaged")
    levels = range(max(blocks[0], default=-1) + 1)
    counts = tuple(blocks[0][level] for level in levels)
    if not levels or 0 in counts:
        raise ValueError(f"weights: the encoder's down_blocks have {counts or 'no'} residual blocks a level; at least one each is needed")
    widths = [vote(state, "channels", (rf"encoder\.down_blocks\.{level}\.(resnets\.)?\d+\.(norm2|conv1|conv2)\.(weight|bias)", 0))
              for level in levels]
    extra = Counter(blocks[1][len(counts) - 1 - level] - counts[level] for level in levels).most_common(1)[0][0]

    def any_key(pattern: str) -> bool:
        return any(re.match(pattern, str(key)) for key in state)

    groups = groups_of(hints, widths, 32, at_most=True)
    attended = () if radar else tuple(any_key(rf"encoder\.down_blocks\.{level}\.attentions\.") for level in levels)
    fields = dict(level_fields(widths, counts, attended), decoder_extra_blocks=max(0, extra), post_quant_conv=any_key("(post_)?quant_conv"),
                  norm="group", norm_groups=groups, norm_eps=hint(hints, "norm_eps", 1e-5 if radar else 1e-6))
    if radar:
        attention, heads = any_key(r".*\.qkv\."), hint(hints, "num_heads", 4)
        if attention and widths[-1] % heads:
            raise HintError(f"weights: num_heads={heads} does not divide the {widths[-1]} channels of the attention")
        default = [(1, 2, 2), (2, 2, 2)] + [(1, 2, 2)] * len(counts)
        down, up = (tuple(map(tuple, hint(hints, name, default)))[:len(counts) - 1] for name in ("downsample_strides", "upsample_scales"))
        fields.update(attention=attention, head_channels=max(1, widths[-1] // heads), strides=down, upsample="trilinear",
                      up_strides=() if up[::-1] == down else up[::-1])
    else:
        middles = ["attention" if any_key(side + r"\.mid_block\.attentions\.") else "blocks" for side in ("encoder", "decoder")]
        fields.update(encoder_middle=middles[0], decoder_middle=middles[1], quant_conv="joint" if fields["post_quant_conv"] else "none",
                      strides=((2, 2, 2),) * (len(counts) - 1), down_padding="end")
    latent = vote(state, "latent_channels", (r"decoder\.conv_in\.weight", 1), (r"post_quant_conv\.(weight|bias)", 0))
    channels = vote(state, "in_channels", (r"decoder\.conv_out\.(weight|bias)", 0), (r"encoder\.conv_in\.weight", 1))
    return VAEConfig(in_channels=channels, z_channels=latent, **fields)


def arguments(cfg: VAEConfig, style: Style) -> dict[str, Any]:
    """What the original's constructor was told, as far as it shows in the config."""
    both = dict(in_channels=cfg.in_channels, out_channels=cfg.in_channels)
    groups = dict(norm_num_groups=cfg.norm_groups, norm_eps=cfg.norm_eps)
    if style.layout == "radar":
        mult = tuple(w / cfg.widths[0] for w in cfg.widths)      # the original's first multiplier is 1
        return dict(**both, **groups, latent_dim=cfg.z_channels, base_channels=cfg.widths[0], num_res_blocks=cfg.num_res_blocks,
                    encoder_channel_mult=mult, decoder_channel_mult=mult[::-1], use_attention=cfg.attention)
    if style.layout == "diffusers":
        return dict(**both, **groups, latent_channels=cfg.z_channels, block_out_channels=cfg.widths, layers_per_block=cfg.num_res_blocks)
    return {"spatial_dims": 3, **both, "num_res_blocks": cfg.blocks, "num_channels" if style.layout == "maisi" else "channels": cfg.widths,
            "attention_levels": cfg.attention_levels or (False,) * len(cfg.widths), "latent_channels": cfg.z_channels, **groups,
            "with_encoder_nonlocal_attn": cfg.encoder_middle == "attention",
            "with_decoder_nonlocal_attn": cfg.decoder_middle == "attention", "use_convtranspose": cfg.upsample.startswith("transposed"),
            "include_fc": style.proj is not None, "use_combined_linear": len(style.qkv) == 1}


def check_hints(hints: dict[str, Any], known: dict[str, Any], layout: str) -> None:
    """Every hint is one that the layout knows and agrees with what was inferred."""
    if "channels" in known:
        known = {**known, "num_channels": known["channels"]}     # as the older one calls it
    read = ("downsample_strides", "upsample_scales", "num_heads") if layout == "radar" else ()
    if not any(known.get("attention_levels", ())) and not any(known.get(f"with_{side}_nonlocal_attn") for side in ("encoder", "decoder")):
        read += ("include_fc", "use_combined_linear")            # of attention, which there is none of
    for name, given in hints.items():
        if name in known and name not in read:
            found = known[name]
            if isinstance(found, tuple):
                given = tuple(given) if isinstance(given, (tuple, list)) else (given,) * len(found)
            if given != found:
                raise HintError(f"weights: hint {name}={given}, but the weights say {found}")
        elif name not in NO_EFFECT + read:
            close = difflib.get_close_matches(name, [*known, *read, *NO_EFFECT, "intensity_range", "entry"], 1)
            raise HintError(f"weights: unknown hint {name}" + (f"; did you mean {close[0]}?" if close else f" for layout {layout}"))


# ------------------------------------------------------------------------------------------------ one table of names, both ways

def name_table(cfg: VAEConfig, style: Style) -> tuple[dict[str, list[str]], dict[str, tuple[int, ...]]]:
    """Each of our keys -> the foreign keys that make it, joined along the output channels; and the shapes of ours."""
    layout, flat = style.layout, style.layout in BLOCKS
    with torch.device("meta"):
        vae = VAE3D(cfg)
    table: dict[str, list[str]] = {}

    def add(ours: str, *theirs: str) -> None:
        for kind in ("weight", "bias"):
            table[f"{ours}.{kind}"] = [f"{name}.{kind}" for name in theirs]

    for side, layers in (("encoder", vae.encoder), ("decoder", vae.decoder)):
        index, seen = 0, Counter()
        for name, layer in layers.named_children():
            ours = f"{side}.{name}"
            conv = {"maisi": ".conv" if name.startswith("mid") else ".conv.conv"}.get(layout, ".conv") if flat else ""
            if name.endswith("quant_conv"):
                theirs = ""
            elif flat:
                theirs = f"{side}.blocks.{index}"
                index += 2 if isinstance(layer, Head) else 1
            else:
                theirs = f"{side}.{down_up_place(name, side, len(cfg.widths), seen, layout)}"
            if isinstance(layer, ResBlock3d):
                for part in ("norm1", "norm2"):
                    add(f"{ours}.{part}", f"{theirs}.{part}")
                for part in ("conv1", "conv2"):
                    add(f"{ours}.{part}", f"{theirs}.{part}{conv}")
                if isinstance(layer.skip, nn.Conv3d):
                    add(f"{ours}.skip", theirs + {"radar": ".skip", "diffusers": ".conv_shortcut"}.get(layout, f".nin_shortcut{conv}"))
            elif isinstance(layer, Attention3d):
                add(f"{ours}.norm", f"{theirs}.group_norm" if layout == "diffusers" else f"{theirs}.norm")
                add(f"{ours}.qkv", *(f"{theirs}.{part}" for part in style.qkv))
                add(f"{ours}.proj", *([f"{theirs}.{style.proj}"] if style.proj else []))
            elif isinstance(layer, Head):
                add(f"{ours}.norm", theirs if flat else f"{side}.{style.norm_out}")
                add(f"{ours}.conv", f"{side}.blocks.{index - 1}{conv}" if flat else f"{side}.conv_out")
            elif isinstance(layer, Upsample3d):
                part = {"monai": ".deconv" if cfg.upsample == "transposed" else f".postconv{conv}"}.get(layout, f".conv{conv}")
                add(f"{ours}.conv", theirs + part)
            elif name.endswith("_down"):
                add(ours if isinstance(layer, nn.Conv3d) else f"{ours}.conv", f"{theirs}.conv{conv}")
            elif name == "quant_conv":
                add(ours, *(["quant_conv_mu.conv", "quant_conv_log_sigma.conv"] if flat else ["quant_conv"]))
            elif name == "post_quant_conv":
                add(ours, "post_quant_conv.conv" if flat else "post_quant_conv")
            else:
                add(ours, theirs + conv)
    return table, {key: tuple(value.shape) for key, value in vae.state_dict().items()}


def down_up_place(name: str, side: str, levels: int, seen: Counter, layout: str) -> str:
    """Our layer's name -> its place inside the encoder or decoder of the layouts with down_blocks and up_blocks."""
    if not (match := re.fullmatch(r"level(\d+)_(\D+)(\d*)", name)):
        radar = {"mid_block0": "mid_block.0", "mid_attention": "mid_block.1", "mid_block1": "mid_block.2"}
        other = {"mid_block0": "mid_block.resnets.0", "mid_attention": "mid_block.attentions.0", "mid_block1": "mid_block.resnets.1"}
        return (radar if layout == "radar" else other).get(name, name)
    level, part, number = int(match[1]), match[2], match[3]
    block = f"down_blocks.{level}" if side == "encoder" else f"up_blocks.{levels - 1 - level}"
    if layout == "radar":                                        # numbered through: blocks, attention, down or up
        seen[block] += 1
        return f"{block}.{seen[block] - 1}"
    parts = {"block": f"resnets.{number}", "attention": f"attentions.{number}", "down": "downsamplers.0", "up": "upsamplers.0"}
    return f"{block}.{parts[part]}"


def translate(cfg: VAEConfig, style: Style, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Our state dict. ValueError with every missing, unexpected and reshaped key."""
    table, shapes = name_table(cfg, style)
    wanted: dict[str, list[tuple[int, ...]]] = {}                # foreign key -> shapes that it may have
    for ours, theirs in table.items():
        for key in theirs:
            shape = (shapes[ours][0] // len(theirs), *shapes[ours][1:])
            wanted[key] = [shape] + [shape[:2]] * ("attention" in ours and shape[2:] == (1, 1, 1))  # a linear layer is a 1x1x1 convolution
    folded = style.layout == "radar" and cfg.post_quant_conv
    if folded:
        wanted.update({key.replace("post_", ""): shape for key, shape in wanted.items() if key.startswith("post_quant_conv.")})
    missing = [key for key in wanted if key not in state]
    unexpected = [str(key) for key in state if key not in wanted]
    reshaped = [f"{key} {tuple(getattr(state[key], 'shape', ()))} for {' or '.join(map(str, wanted[key]))}" for key in wanted
                if key in state and tuple(getattr(state[key], "shape", ())) not in wanted[key]]
    wrong = [f"{len(keys)} {what}: {', '.join(keys)}" for what, keys in
             (("missing", missing), ("unexpected", unexpected), ("reshaped", reshaped)) if keys]
    first = table["encoder.conv_in.weight"][0]
    if first in state and tuple(state[first].shape) != wanted[first][0]:
        wrong.append(f"{cfg.in_channels} channels go out: VAE3D reconstructs its input, so that as many must come in")
    if wrong:
        raise ValueError(f"weights: the keys do not make a {style.layout} network with {len(cfg.widths)} levels of {cfg.widths} channels; "
                         + "; ".join(wrong))
    state = dict(state)
    if folded:                                                   # both are 1x1x1 and nothing stands between them once z is sampled
        first, then = (state[f"{name}.weight"].flatten(1) for name in ("quant_conv", "post_quant_conv"))
        state["post_quant_conv.weight"] = (then @ first)[..., None, None, None]
        state["post_quant_conv.bias"] = then @ state["quant_conv.bias"] + state["post_quant_conv.bias"]
    found, like = {}, next(iter(state.values()))
    for ours, theirs in table.items():
        if theirs:
            found[ours] = torch.cat([state[key] for key in theirs]).reshape(shapes[ours])
        else:                                                    # no output projection: one that changes nothing
            make = torch.eye if ours.endswith("weight") else torch.zeros
            found[ours] = make(*shapes[ours][:2], dtype=like.dtype, device=like.device).reshape(shapes[ours])
    return found


# ------------------------------------------------------------------------------------------------ export

def export(vae: VAE3D | VAEConfig, state_dict: Mapping[str, Tensor] | None = None,
           layout: str = "monai") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Our weights -> state dict of MONAI's AutoencoderKL (or of AutoencoderKlMaisi: layout "maisi") and the arguments that build it.

    state_dict: ours; left out, that of the model. ValueError that lists why, where MONAI has no such network. MONAI's network takes and
    gives intensities as cfg.intensity_range has them.
    """
    cfg = vae if isinstance(vae, VAEConfig) else vae.cfg
    if layout not in ("monai", "maisi"):
        raise ValueError(f"weights: export knows the layouts monai and maisi, got {layout!r}")
    if state_dict is None and isinstance(vae, VAEConfig):
        raise ValueError("weights: export needs the state dict besides the config")
    ours = vae.state_dict() if state_dict is None else state_dict
    groups = {max(g for g in range(1, cfg.norm_groups + 1) if w % g == 0) for w in cfg.widths}
    attended = {w for w, yes in zip(cfg.widths, cfg.attention_levels) if yes}
    attended |= {cfg.widths[-1]} if "attention" in (cfg.encoder_middle, cfg.decoder_middle) else set()
    upsamples = ("nearest", "transposed") if layout == "monai" else ("trilinear", "transposed3")
    reasons = [reason for impossible, reason in (
        (cfg.bottleneck != "kl", f"vae.bottleneck is {cfg.bottleneck}, not kl"),
        (cfg.norm != "group", f"vae.norm is {cfg.norm}, not group"),
        (len(groups) > 1, f"vae.norm_groups={cfg.norm_groups} gives {sorted(groups)} groups for the widths {cfg.widths}, not one number"),
        (any(s != (2, 2, 2) for s in (*cfg.strides, *cfg.up_strides)), f"vae.strides are {cfg.strides}, not 2,2,2 each"),
        (cfg.down_padding != "end", f"vae.down_padding is {cfg.down_padding}, not end"),
        (cfg.upsample not in upsamples, f"vae.upsample is {cfg.upsample}, not {' or '.join(upsamples)}"),
        (cfg.up_narrows, "vae.up_narrows is set"),
        (cfg.head_act, "vae.head_act is on"),
        (cfg.decoder_extra_blocks != 0, f"vae.decoder_extra_blocks is {cfg.decoder_extra_blocks}, not 0"),
        (cfg.attention, "vae.attention is on; MONAI has attention after every block of a level (vae.attention_levels) or none there"),
        ("blocks" in (cfg.encoder_middle, cfg.decoder_middle), "vae.encoder_middle or vae.decoder_middle is blocks, not attention or none"),
        (any(w != gcd(w, cfg.head_channels) for w in attended), f"vae.head_channels={cfg.head_channels} makes several attention heads"),
        (cfg.quant_conv != "split", f"vae.quant_conv is {cfg.quant_conv}, not split")) if impossible]
    if reasons:
        raise ValueError("weights: MONAI has no such network: " + "; ".join(reasons))
    style = Style(layout, ("attn.to_q", "attn.to_k", "attn.to_v"), "attn.out_proj")
    table, shapes = name_table(cfg, style)
    wrong = [f"{key} {'missing' if key not in ours else 'unexpected' if key not in shapes else 'reshaped'}"
             for key in {**shapes, **ours} if key not in ours or key not in shapes or tuple(ours[key].shape) != shapes[key]]
    if wrong:
        raise ValueError(f"weights: the state dict is not of this config: {', '.join(wrong)}")
    found = {}
    for key, theirs in table.items():
        parts = ours[key].flatten(1) if "attention" in key and ours[key].dim() == 5 else ours[key]
        found.update(zip(theirs, (part.clone() for part in parts.chunk(len(theirs)))))
    if not cfg.post_quant_conv:                                  # MONAI always has one: the one that changes nothing
        z, like = cfg.z_channels, next(iter(ours.values()))
        found["post_quant_conv.conv.weight"] = torch.eye(z, dtype=like.dtype, device=like.device)[..., None, None, None]
        found["post_quant_conv.conv.bias"] = torch.zeros(z, dtype=like.dtype, device=like.device)
    return found, {**arguments(cfg, style), "norm_num_groups": groups.pop(), **({"num_splits": 1} if layout == "maisi" else {})}
