"""Foreign files in train.py --init and predict.py --checkpoint: as the original gives it, or one line."""
import dataclasses
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import nn

import data
import predict
import runs
import train
import training.facts
import training.foreign
import weights
from foreign_networks import Reference, close, monai_model
from tasks import TASKS
from training.task import of
from vae3d import VAEConfig

TINY = [
    "--data.synthetic_count",
    "4",
    "--data.synthetic_size",
    "8,16,16",
    "--patch",
    "4,8,8",
    "--data.crops_per_volume",
    "3",
    "--train.val_crops",
    "2",
    "--train.latent_crops",
    "2",
    "--device",
    "cpu",
    "--log.sample_every",
    "0",
    "--batch",
    "1",
]
HINTS = "norm_num_groups=4"


def saved(path: Path, layout: str = "maisi", **arguments) -> nn.Module:
    """A network of theirs whose state dict lies in the file, deep in a checkpoint where it ends in .ckpt."""
    theirs = monai_model(layout, **arguments)
    torch.save(
        {"epoch": 7, "state_dict": theirs.state_dict()} if path.suffix == ".ckpt" else theirs.state_dict(),
        path,
    )
    return theirs


def turned(volume: torch.Tensor) -> torch.Tensor:
    """z,y,x, as volumes lie here, to x,y,z, as MONAI reads them; and back."""
    return volume.permute(0, 1, 4, 3, 2)


def one_line(capsys, program: str) -> str:
    error = capsys.readouterr().err
    assert error.startswith(f"{program}: ") and error.count("\n") == 1, error
    return error


@pytest.mark.slow
@pytest.mark.parametrize("layout, low, high", [("monai", -1, 1), ("maisi", 0, 1)])
def test_training_starts_at_their_loss_and_goes_on_without_the_file(layout, low, high, tmp_path, capsys):
    """The validation at step 0 is that of MONAI's own network on the same crops, in the range that it
    knows."""
    file, out = tmp_path / "theirs.ckpt", tmp_path / "run"
    theirs = saved(file, layout, with_decoder_nonlocal_attn=True)
    hints = HINTS + f",intensity_range={low},{high}" * (layout == "monai")  # MAISI's is the default
    argv = [*TINY, "--init", str(file), "--train.init_hints", hints, "--steps", "2", "--out", str(out)]
    assert train.main(argv) == 0
    assert f"init: a {layout} network; it is given {low} to 1" in capsys.readouterr().out
    cfg = runs.load_config(argv)
    dataset = training.facts.open_data(cfg, of(TASKS, cfg), lambda text: None)[1]
    rows = []
    for crop in data.val_crops(dataset, cfg.train.seed, cfg.train.val_crops):
        x = turned((crop.image[None] + 1) * (high - low) / 2 + low)
        with torch.no_grad():
            mu, sigma = theirs.encode(x)
            off = (theirs.decode(mu) - x) * 2 / (high - low)     # both errors in units of [-1, 1]
        kl = 0.5 * (mu.square() + sigma.square() - 1 - 2 * sigma.log()).mean()
        rows.append(
            (
                off.abs().mean() + cfg.loss.kl_weight * kl,
                off.abs().mean(),
                10 * (4 / off.square().mean()).log10(),
            )
        )
    first = next(
        row for row in map(json.loads, (out / "log.jsonl").read_text().splitlines()) if row["split"] == "val"
    )
    for name, want in zip(("loss", "l1", "psnr"), torch.tensor(rows).mean(0).tolist()):
        assert first["step"] == 0 and abs(first[name] - want) <= 1e-5 * abs(want), (name, first[name], want)

    file.unlink()
    assert train.main(["--resume", str(out), "--steps", "3"]) == 0
    last = torch.load(out / "last.pt", weights_only=True)
    assert (
        last["step"] == 3
        and last["config"]["vae"]["intensity_range"] == [low, high]
        and last["config"]["preset"] == layout
    )
    assert (
        VAEConfig(**last["config"]["vae"])
        == cfg.vae
        == runs.load_config(["--config", str(out / "config.yaml"), "--train.init", "none", *TINY]).vae
    )


def test_flags_beat_the_file_as_far_as_weights_fit(tmp_path, capsys):
    """A codebook for a frozen network of theirs: the mean's half of the layer before it is taken, all
    else fits."""
    theirs = saved(tmp_path / "theirs.pt", "monai")
    flags = [
        *TINY,
        "--init",
        str(tmp_path / "theirs.pt"),
        "--train.init_hints",
        HINTS,
        "--steps",
        "1",
        "--out",
        str(tmp_path / "vq"),
    ]
    assert train.main([*flags, "--vae.bottleneck", "vq", "--vae.num_codes", "8", "--train.stage", "1"]) == 0
    said = capsys.readouterr().out
    assert (
        "3 missing there, left as new: quantizer.code_count; quantizer.code_sum; quantizer.codebook" in said
    )
    assert "encoder.quant_conv.weight (4, 2, 1, 1, 1) -> (2, 2, 1, 1, 1) (the mean's part taken)" in said
    model = torch.load(tmp_path / "vq" / "last.pt", weights_only=True)["model"]
    assert torch.equal(model["encoder.quant_conv.weight"], theirs.state_dict()["quant_conv_mu.conv.weight"])
    (tmp_path / "c.yaml").write_text("preset: base\nvae: {norm_eps: 1e-3, num_codes: 9}\n")
    cfg = runs.load_config([*flags, "--config", str(tmp_path / "c.yaml"), "--vae.num_codes", "7"])
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
        assert (
            predict.main(
                [
                    command,
                    "--checkpoint",
                    str(tmp_path / "theirs.pt"),
                    "--hints",
                    "norm_num_groups=2",
                    "--device",
                    "cpu",
                    "--data.modality",
                    "ct",
                    "--tile",
                    tile,
                    *flags,
                ]
            )
            == 0
        )
    for tile in ("none", "8,8,8"):
        out, latents, decoded = (tmp_path / f"{name}_{tile[0]}" for name in ("out", "latents", "decoded"))
        run("reconstruct", tile, "--input", source, "--output", str(out))
        close(read(out / "scan.nii.gz"), want * 2000 - 1000, f"reconstruction, tile {tile}")
        run("encode", tile, "--input", source, "--output", str(latents))
        close(torch.from_numpy(np.load(latents / "scan_latent.npz")["latent"]), mu, f"latent, tile {tile}")
        run("decode", tile, "--input", str(latents), "--output", str(decoded))
        assert torch.equal(read(decoded / "scan.nii.gz"), read(out / "scan.nii.gz"))
    run(
        "evaluate",
        "none",
        "--data",
        source,
        "--json",
        str(tmp_path / "out.json"),
        "--report",
        str(tmp_path / "out.html"),
    )
    psnr = -10 * (want - (hu + 1000) / 2000).square().mean().log10().item()
    assert abs(json.loads((tmp_path / "out.json").read_text())["mean"]["psnr"] - psnr) < 1e-3
    assert "for intensities of 0 to 1" in capsys.readouterr().out
    run(
        "decode",
        "none",
        "--input",
        str(tmp_path / "latents_n"),
        "--output",
        str(tmp_path / "other"),
        "--hints",
        "norm_num_groups=2,intensity_range=-1,1",
    )
    assert "was encoded with other weights" in capsys.readouterr().out


BUNDLE = {
    "image_channels": 1,
    "net": {"latent": 2},
    "latent_channels": 2,
    "autoencoder_def": {
        "_target_": "AutoencoderKlMaisi",
        "spatial_dims": 3,
        "in_channels": "@image_channels",
        "out_channels": "@image_channels",
        "latent_channels": "@net#latent",
        "num_channels": [8, 16],
        "num_res_blocks": [1, 1],
        "norm_num_groups": 4,
        "norm_eps": 1e-06,
        "attention_levels": [False, False],
        "with_encoder_nonlocal_attn": False,
        "use_convtranspose": False,
        "num_splits": 16,
    },
}
BUNDLE["mask_autoencoder_def"] = BUNDLE["autoencoder_def"] | {
    "in_channels": 8,
    "out_channels": 125,
    "num_channels": [32, 64],
}


def test_axes_are_turned_unless_a_hint_says_otherwise(tmp_path):
    theirs = saved(tmp_path / "theirs.pt", "monai")
    found = {
        hints: training.foreign.load_foreign(tmp_path / "theirs.pt", HINTS + hints, "--hints").weights
        for hints in ("", ",axes=zyx")
    }
    _, plain = weights.convert(theirs.state_dict(), norm_num_groups=4)
    name = "encoder.level0_block0.conv1.weight"
    assert torch.equal(found[",axes=zyx"][name], plain[name]) and torch.equal(
        found[""][name], turned(plain[name])
    )
    assert all(torch.equal(value, plain[key]) for key, value in weights.turn_axes(found[""]).items())
    with pytest.raises(ValueError, match="--hints: axes must be one of xyz, zyx, got 'yxz'"):
        training.foreign.load_foreign(tmp_path / "theirs.pt", HINTS + ",axes=yxz", "--hints")


def test_hints_are_values_and_the_config_of_the_original(tmp_path):
    saved(tmp_path / "theirs.pt")
    # the mask's comes first
    (tmp_path / "maisi.json").write_text(json.dumps(dict(reversed(BUNDLE.items())), indent="\t"))
    (tmp_path / "maisi.yaml").write_text(
        f"autoencoder: {json.dumps(BUNDLE['autoencoder_def'] | {'norm_eps': '1e-3'})}\n"
        "image_channels: 1\nnet: {latent: 2}\n"
    )
    found = {
        hints: training.foreign.load_foreign(
            tmp_path / "theirs.pt", hints.replace("maisi.", f"{tmp_path}/maisi."), "--hints"
        ).vae
        for hints in (HINTS, "maisi.json", "maisi.yaml", "maisi.yaml,norm_eps=1e-4 ,intensity_range=(-2, 2)")
    }
    assert [cfg.norm_eps for cfg in found.values()] == [1e-6, 1e-6, 1e-3, 1e-4]
    assert [cfg.intensity_range for cfg in found.values()] == [(0, 1)] * 3 + [(-2, 2)]
    assert (
        len({dataclasses.replace(cfg, norm_eps=1e-6, intensity_range=(0, 1)) for cfg in found.values()}) == 1
    )
    torch.save(
        {"ema": Reference(False).state_dict(), "model": Reference(False, base=16).state_dict()},
        tmp_path / "two.pt",
    )
    radar = training.foreign.load_foreign(
        tmp_path / "two.pt",
        "entry=model,num_heads=2,downsample_strides=[[2,2,2],[2,2,2]],upsample_scales=[[2,2,2],[2,2,2]]",
        "--hints",
    )
    assert radar.layout == "radar" and radar.vae.widths == (16, 32, 32) and radar.vae.head_channels == 16
    assert radar.vae.strides == ((2, 2, 2),) * 2 and radar.vae.intensity_range == (-1, 1)
    assert (
        training.foreign.load_foreign(tmp_path, None, "--hints") is None
        and training.foreign.load_foreign(tmp_path / "absent.pt", None, "--hints") is None
    )


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
        training.foreign.load_foreign("theirs.pt", hints, "--hints")
    assert says in str(error.value) and "\n" not in str(error.value), error.value


@pytest.mark.slow
def test_foreign_files_where_they_do_not_belong_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = saved(tmp_path / "theirs.pt")
    torch.save({"model": theirs.state_dict(), "ema": theirs.state_dict()}, "two.pt")
    torch.save(
        {key: value for key, value in theirs.state_dict().items() if not key.startswith("decoder.blocks.3")},
        "part.pt",
    )
    torch.save({"net.weight": torch.zeros(2, 2)}, "other.pt")
    init, flag = (
        ["--init", "theirs.pt", "--train.init_hints", HINTS],
        "=... (--{} NAME=VALUE,NAME=VALUE,... or the original's CONFIG.json)",
    )
    assert train.main([*TINY, "--vae.base_channels", "4", "--steps", "1", "--out", "ours"]) == 0
    capsys.readouterr()
    for flags, says in (
        (init[:2], "hint: norm_num_groups" + flag.format("train.init_hints")),
        (["--resume", "theirs.pt"], "made elsewhere (layout maisi); train.py --init takes it"),
        ([*init, "--resume", "ours"], "--init and --resume exclude one another"),
        (
            [*init, "--task", "seg"],
            "--init theirs.pt: is an autoencoder (layout maisi), for --task vae, not seg",
        ),
        (
            [*init, "--preset", "base"],
            "--init theirs.pt: says itself what the network is; leave --preset out",
        ),
        (
            [*init, "--data.synthetic", "radar"],
            "channels of the maisi network: 1, of the data: 4; use --data.select_channel N, or",
        ),
        (
            ["--init", "two.pt", *init[2:]],
            "two.pt: weights: the file holds several networks, model, ema; pass one as a hint: entry=",
        ),
        (
            ["--init", "part.pt", *init[2:]],
            "10 missing: decoder.blocks.3.norm1.weight, decoder.blocks.3.norm1.bias, decoder",
        ),
        (
            ["--init", "other.pt"],
            "or an autoencoder's weights named as by monai, maisi, monai-generative, radar, diffusers",
        ),
        (["--init", "ours", *init[2:]], "--init ours is none: its checkpoint says it all"),
        (init[2:], "there is no --init"),
        (["--preset", "maisi"], "preset must be one of ultra_lightweight"),
    ):
        assert train.main([*TINY, *flags] if "--resume" not in flags else flags) == 2
        assert says in one_line(capsys, "train.py"), (flags, says)
    ours = ["--checkpoint", "ours", "--input", "in", "--output", "out"]
    for flags, says in (
        (["decode", "--checkpoint", "theirs.pt", *ours[2:]], "hint: norm_num_groups" + flag.format("hints")),
        (["segment", "--checkpoint", "theirs.pt", *ours[2:]], "made elsewhere (layout maisi)"),
        (["decode", *ours, "--hints", HINTS], "a checkpoint of train.py, which says all that --hints could"),
        (["decode", "--checkpoint", "other.pt", *ours[2:]], "is no checkpoint of kind"),
    ):
        assert predict.main(flags) == 2
        assert says in one_line(capsys, "predict.py"), (flags, says)
    assert (
        train.main(
            [
                *TINY,
                *init,
                "--data.synthetic",
                "radar",
                "--vae.in_channels",
                "4",
                "--steps",
                "1",
                "--out",
                "four",
            ]
        )
        == 0
    )
    assert (
        "encoder.conv_in.weight (8, 1, 3, 3, 3) -> (8, 4, 3, 3, 3) (left as new)" in capsys.readouterr().out
    )
