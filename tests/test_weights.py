"""weights.py: the networks of others give the same results from our VAE3D, both ways and in tiles."""
import dataclasses
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import weights
from foreign_networks import Reference, close, monai_model, shaken
from vae3d import PRESETS, VAE3D, VAEConfig

ROOT = Path(__file__).resolve().parent.parent


def drawn(seed: int, layout: str) -> dict:
    """Constructor arguments drawn at random."""
    r = random.Random(f"{layout}{seed}")
    levels = r.randint(1, 3)
    channels = r.randint(1, 2)
    blocks = (
        r.randint(1, 2)
        if layout == "monai" and r.random() < 0.5
        else tuple(r.randint(1, 2) for _ in range(levels))
    )
    return dict(
        channels=tuple(r.choice((4, 8, 12)) for _ in range(levels)),
        num_res_blocks=blocks,
        in_channels=channels,
        out_channels=channels,
        attention_levels=tuple(r.random() < 0.4 for _ in range(levels)),
        latent_channels=r.randint(1, 3),
        norm_num_groups=r.choice((1, 2, 4)),
        norm_eps=r.choice((1e-6, 1e-3)),
        with_encoder_nonlocal_attn=r.random() < 0.5,
        with_decoder_nonlocal_attn=r.random() < 0.5,
        use_convtranspose=r.random() < 0.5,
        include_fc=r.random() < 0.7,
        use_combined_linear=r.random() < 0.5,
    )


def ours(state: dict, **hints) -> VAE3D:
    cfg, converted = weights.convert(state, **hints)
    vae = VAE3D(cfg).eval()
    vae.load_state_dict(converted)
    return vae


# ------------------------------------------------------------------------------------- layouts 1 and 2: MONAI

@pytest.mark.parametrize("layout", ["monai", "maisi"])
@pytest.mark.parametrize("seed", range(12))
def test_parity_of_random_configs(layout, seed):
    """Mean, log-variance, decoded latent, reconstruction, and every gradient of the reconstruction loss."""
    arguments = drawn(seed, layout)
    theirs = monai_model(layout, seed, **arguments)
    assert weights.is_foreign(theirs.state_dict()) == layout
    vae = ours(
        theirs.state_dict(),
        **{name: arguments[name] for name in ("norm_num_groups", "norm_eps", "use_convtranspose")},
    )
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
    cfg, mapped = weights.convert(
        {name: p.grad for name, p in theirs.named_parameters()},
        **{name: arguments[name] for name in ("norm_num_groups", "norm_eps", "use_convtranspose")},
    )
    # what they do not have has no gradient
    real = [name for name in mapped if arguments["include_fc"] or ".proj." not in name]
    scale = max(mapped[name].abs().max() for name in real)
    for name, p in vae.named_parameters():
        if name in real:  # a bias before a norm sums to 0: against a hundredth of the largest
            off = (
                (p.grad - mapped[name]).abs().max() / mapped[name].abs().max().clamp_min(1e-2 * scale)
            ).item()
            assert off <= 1e-4, f"gradient of {name} differs by {off:.2e}"


@pytest.mark.parametrize("layout", ["monai", "maisi"])
@pytest.mark.parametrize("seed", range(4))
def test_round_trip(layout, seed):
    """Theirs -> ours -> theirs: the same tensors.

    Loaded strictly into what the arguments build: the same reconstruction.
    """
    arguments = {**drawn(seed, layout), "include_fc": True, "use_combined_linear": False}
    theirs = monai_model(layout, seed, **arguments)
    vae = ours(
        theirs.state_dict(),
        norm_num_groups=arguments["norm_num_groups"],
        norm_eps=arguments["norm_eps"],
        use_convtranspose=arguments["use_convtranspose"],
    )
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
    """A config of ours that MONAI can build too, trained weights or not; the post-quant convolution it
    lacks is MONAI's identity."""
    torch.manual_seed(0)
    cfg = VAEConfig(
        base_channels=8,
        channel_mult=(1, 2),
        strides=((2, 2, 2),),
        norm="group",
        norm_groups=4,
        decoder_extra_blocks=0,
        encoder_middle="attention",
        decoder_middle="none",
        down_padding="end",
        head_act=False,
        quant_conv="split",
    )
    vae = shaken(VAE3D(cfg))
    state, arguments = weights.export(cfg, vae.state_dict())
    theirs = monai_model("monai", **arguments)
    theirs.load_state_dict(state, strict=True)
    x = torch.randn(1, 1, 8, 8, 8)
    with torch.no_grad():
        close(vae(x).recon, theirs.reconstruct(x), "reconstruction")


def test_export_says_why_not():
    vae = VAE3D(PRESETS["ultra_lightweight"])
    with pytest.raises(
        ValueError, match="no such network: vae.norm is none.*down_padding is both.*quant_conv is none"
    ) as error:
        weights.export(vae)
    assert "\n" not in str(error.value)
    theirs = monai_model("maisi")
    with pytest.raises(ValueError, match="vae.upsample is trilinear, not nearest or transposed"):
        weights.export(ours(theirs.state_dict(), norm_num_groups=4))
    with pytest.raises(ValueError, match="not of this config: decoder.head.conv.bias missing"):
        vae = ours(monai_model("monai").state_dict(), norm_num_groups=4)
        weights.export(
            vae.cfg,
            {name: value for name, value in vae.state_dict().items() if name != "decoder.head.conv.bias"},
        )


@pytest.mark.slow
@pytest.mark.parametrize("transposed", [False, True])
def test_a_maisi_network_tile_by_tile(transposed):
    """GroupNorm of the whole volume, trilinear or transposed upsampling, padding at the far end: exact
    for sizes that no tile divides."""
    theirs = monai_model(
        "maisi", channels=(4, 8, 8), use_convtranspose=transposed, num_res_blocks=1, norm_num_groups=2
    )
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


# --------------------------------------------------------------------------------- layout 3: MONAI generative

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
    theirs = monai_model(
        "monai",
        channels=(4, 8),
        attention_levels=(False, True),
        with_encoder_nonlocal_attn=True,
        norm_num_groups=2,
    )
    state = as_generative(theirs.state_dict(), projections, convolutions="q.conv" in projections.values())
    assert weights.is_foreign(state) == "monai-generative"
    vae, x = ours(state, norm_num_groups=2, num_channels=(4, 8)), torch.randn(1, 1, 4, 6, 4)
    with torch.no_grad():
        close(vae.encode(x).mu, theirs.encode(x)[0], "mu")
        close(vae(x).recon, theirs.reconstruct(x), "reconstruction")


def test_generative_transposed_upsampling_is_of_kernel_3():
    """Names and shapes are those of the interpolating network; the hint tells.

    MAISI's transposed upsampling is the same layer.
    """
    maisi = monai_model("maisi", channels=(4, 8), norm_num_groups=2, use_convtranspose=True)
    state = {
        re.sub(r"\.conv\.conv((\.conv)?\.(weight|bias))$", r".conv\1", key): value
        for key, value in maisi.state_dict().items()
    }
    assert weights.is_foreign(state) == "monai-generative"
    vae, x = ours(state, norm_num_groups=2, use_convtranspose=True), torch.randn(1, 1, 4, 4, 6)
    with torch.no_grad():
        close(vae(x).recon, maisi.reconstruct(x), "reconstruction")


# ---------------------------------------------------------------------- layout 4: radar, and diffusers' names


@pytest.mark.parametrize("layout", ["radar", "diffusers"])
@pytest.mark.parametrize("blocks, attention", [(1, False), (1, True), (2, True)])
def test_radar_and_diffusers_names(layout, blocks, attention):
    torch.manual_seed(blocks)
    theirs = shaken(Reference(layout == "diffusers", blocks=blocks, attention=attention))
    state = theirs.state_dict()
    assert (
        weights.is_foreign(
            {"step": 3, "model_state_dict": {f"module.{key}": value for key, value in state.items()}}
        )
        == layout
    )
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
    assert {**dict(VAE3D(preset).named_parameters())}.keys() == {
        name for name, _ in vae.named_parameters() if "post_quant" not in name
    }


def test_radar_strides_are_hints():
    state = Reference(False, blocks=1, attention=False).state_dict()
    cfg, _ = weights.convert(
        state,
        downsample_strides=[[2, 2, 2], [2, 2, 2]],
        upsample_scales=[[2, 2, 2], [2, 2, 2]],
        use_attention=False,
    )
    assert cfg.strides == ((2, 2, 2), (2, 2, 2)) and cfg.up_strides == ()
    cfg, _ = weights.convert(state)
    assert cfg.strides == ((1, 2, 2), (2, 2, 2)) and cfg.up_strides == ((2, 2, 2), (1, 2, 2))


# ----------------------------------------------------------------------------------------------------- errors

def broken(state: dict, how: str, key: str) -> dict:
    state = dict(state)
    if how == "missing":
        del state[key]
    elif how == "unexpected":
        state[f"{key}_copy"] = state[key]
    else:
        state[key] = torch.zeros(*(n + 1 for n in state[key].shape))
    return state


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["monai", "maisi", "radar", "diffusers"])
@pytest.mark.parametrize("how", ["missing", "unexpected", "reshaped"])
def test_every_wrong_key_is_named(layout, how):
    """Whichever key it is, alone or with another: the error names it and nothing is converted. Each key of a
    layout is broken in one of the three ways, so that the four layouts take seconds.
    """
    if layout in weights.BLOCKS:
        state = monai_model(
            layout, with_encoder_nonlocal_attn=True, with_decoder_nonlocal_attn=True, include_fc=True
        ).state_dict()
    else:
        state = Reference(layout == "diffusers").state_dict()
    hints = dict(norm_num_groups=4) if layout in weights.BLOCKS else {}
    first = ["missing", "unexpected", "reshaped"].index(how)
    for key in list(state)[first::3]:
        with pytest.raises(ValueError) as error:
            weights.convert(broken(state, how, key), **hints)
        assert f"{key}_copy" in str(error.value) if how == "unexpected" else key in str(error.value), (
            key,
            str(error.value),
        )
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
    assert (
        f"{len(lost)} missing" in text
        and "1 reshaped: quant_conv_mu.conv.weight (2, 2) for (2, 2, 1, 1, 1)" in text
    ), text


@pytest.mark.parametrize(
    "hints, message",
    [
        ({}, r"neither names nor shapes say norm_num_groups; pass it as a hint"),
        (dict(norm_num_groups=3), r"norm_num_groups=3 does not divide all of the channels \(8, 16\)"),
        (dict(norm_num_groups=4, channels=(8, 8)), r"hint channels=\(8, 8\), but the weights say \(8, 16\)"),
        (
            dict(norm_num_groups=4, num_res_blocks=2),
            r"hint num_res_blocks=\(2, 2\), but the weights say \(1, 1\)",
        ),
        (dict(norm_num_groups=4, norm_groups=4), "unknown hint norm_groups; did you mean norm_num_groups"),
        (dict(norm_num_groups=4, spatial_dims=2), "hint spatial_dims=2, but the weights say 3"),
    ],
)
def test_hints(hints, message):
    state = monai_model("monai").state_dict()
    with pytest.raises(ValueError, match=message) as error:
        weights.convert(state, **hints)
    assert "\n" not in str(error.value)


def test_a_whole_maisi_config_may_be_passed():
    arguments = dict(
        spatial_dims=3,
        in_channels=1,
        out_channels=1,
        latent_channels=2,
        num_channels=[8, 16],
        num_res_blocks=[1, 1],
        norm_num_groups=4,
        norm_eps=1e-6,
        attention_levels=[False, False],
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
        use_checkpointing=False,
        use_convtranspose=False,
        norm_float16=True,
        num_splits=8,
        dim_split=1,
    )
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
    with pytest.raises(
        ValueError,
        match=r"1 reshaped: encoder.blocks.0.conv.weight .*; 2 channels go out: VAE3D reconstructs its input",
    ):
        weights.convert(monai_model("monai", out_channels=2).state_dict(), norm_num_groups=4)
    with pytest.raises(ValueError, match="no known layout .*, such as encoder.conv_in.weight"):
        weights.convert(VAE3D(VAEConfig()).state_dict())
    with pytest.raises(ValueError, match="several networks, model, ema"):
        weights.convert(
            {name: monai_model("monai").state_dict() for name in ("model", "ema")}, norm_num_groups=4
        )
    assert weights.is_foreign(VAE3D(VAEConfig()).state_dict()) is None
    assert weights.is_foreign({"model": VAE3D(VAEConfig()).state_dict(), "step": 3}) is None
    assert weights.is_foreign({}) is None and weights.is_foreign([1]) is None


@pytest.mark.parametrize(
    "key", ["encoder.blocks.3000000.conv.weight", "encoder.down_blocks.3000000.0.conv1.weight"]
)
def test_a_damaged_number_of_blocks_is_refused_at_once(key):
    kind = "blocks" if ".blocks." in key else "down_blocks"
    state = {
        key: torch.zeros(4, 4, 3, 3, 3),
        f"encoder.{kind}.0.0.conv1.weight": torch.zeros(4, 4, 3, 3, 3),
        "decoder.blocks.0.conv.weight": torch.zeros(4, 4, 3, 3, 3),
        "decoder.up_blocks.0.0.conv1.weight": torch.zeros(4, 4, 3, 3, 3),
    }
    with pytest.raises(ValueError, match="3000000 in a file with 4 keys; it is damaged"):
        weights.convert(state, norm_num_groups=1)


# --------------------------------------------------------------------------------------------------- the file

def test_works_copied_with_vae3d_alone(tmp_path):
    """In an empty folder with vae3d.py, without MONAI; nothing random is drawn."""
    for name in ("vae3d.py", "weights.py"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    torch.save(monai_model("monai").state_dict(), tmp_path / "theirs.pt")
    code = (
        "import sys; sys.path.insert(0, '.'); import torch, weights, vae3d; before = torch.get_rng_state();"
        "cfg, state = weights.convert(torch.load('theirs.pt', weights_only=True), norm_num_groups=4);"
        "assert torch.equal(before, torch.get_rng_state());"
        "vae = vae3d.VAE3D(cfg); vae.load_state_dict(state);"
        "weights.export(vae); assert 'monai' not in sys.modules and 'yaml' not in sys.modules"
    )
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
