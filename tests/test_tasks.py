"""tasks/: what is particular to the autoencoder, the U-Net and the feature network while they train."""
import math
import subprocess

import pytest
import torch

import data
import losses
import quantize
import unet
import vae3d
from runs import SEG, TINY, command, load_config, resume, rows, run
from tasks import seg

# -------------------------------------------------------------------------------------------- tasks/vae.py

def test_latent_statistics_are_stored(tmp_path):
    assert run("--steps", "2", out=tmp_path / "r") == 0
    cfg = load_config(TINY)
    crops = data.Crops(data.open_data(cfg.data, 0, say=lambda _: None), 0)
    best = torch.load(tmp_path / "r/best.pt", weights_only=True)
    vae = vae3d.VAE3D(cfg.vae).eval()
    vae.load_state_dict(best["model"])
    with torch.no_grad():
        mu = torch.cat([vae.encode(crops[i][0][None]).mu for i in range(2)])
    mean, std, scale_factor = (best["latent"][name] for name in ("mean", "std", "scale_factor"))
    assert (mean - mu.mean((0, 2, 3, 4))).abs().max() < 1e-5
    assert (std - mu.transpose(0, 1).flatten(1).std(1, correction=0)).abs().max() < 1e-5
    assert abs(scale_factor * float(mu.std(correction=0)) - 1) < 1e-4


def test_a_codebook_from_data_is_kept_by_the_first_steps():
    """Its averages begin where they will be: a code that two crops do not use is not dead."""
    torch.manual_seed(0)
    latents = torch.randn(20_000, 2)
    vq = quantize.VectorQuantizer(128, 2).train()
    vq.fit(latents, "kmeans", torch.Generator().manual_seed(0), per_step=500)

    def error():
        index = quantize.nearest(latents, vq.codebook)[0]
        return float((latents - vq.codebook[index]).square().mean())
    start = error()
    for step in range(3):
        part = latents[500 * step:500 * step + 500]
        vq.quantize_volume(part.T.reshape(1, 2, 500, 1, 1), torch.Generator().manual_seed(step))
        vq.update(torch.Generator().manual_seed(step))
        assert error() < 1.15 * start


# --------------------------------------------------------------------------------------- tasks/features.py

@pytest.mark.slow
def test_features_are_trained_and_used(tmp_path, capsys):
    """`--task features` learns to tell how a crop was degraded; its best.pt serves as
    loss.perceptual_features.
    """
    flags = ["--task", "features", "--patch", "8,16,16", "--steps", "60", "--train.val_every", "60",
             "--batch", "4", "--optim.lr", "3e-3"]
    assert run(*flags, out=tmp_path / "features") == 0
    explained = [r["explained"] for r in rows(tmp_path / "features", "val")]
    assert explained[-1] > explained[0]
    best = tmp_path / "features/best.pt"
    use = ["--loss.perceptual_weight", "1", "--steps", "2"]
    assert run(*use, "--loss.perceptual_features", str(best), out=tmp_path / "file") == 0
    assert run(*use, out=tmp_path / "random") == 0
    terms = [[r["perceptual"] for r in rows(tmp_path / name, "train")] for name in ("file", "random")]
    assert terms[0][0] != terms[1][0] and all(math.isfinite(v) for v in terms[0] + terms[1])
    assert run("--task", "features", "--memory.mode", "tile", out=tmp_path / "no") == 2
    capsys.readouterr()
    other = str(tmp_path / "file/last.pt")
    assert run(*use, "--loss.perceptual_features", other, out=tmp_path / "no") == 2
    assert "--task features writes one" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------- tasks/seg.py

@pytest.mark.slow
def test_segmentation_learns_validates_and_resumes_to_the_bit(tmp_path):
    flags = [*SEG, "--steps", "30", "--train.val_every", "10", "--train.save_every", "7",
             "--log.sample_every", "30", "--log.every", "1"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(*flags, out=whole) == 0
    val = rows(whole, "val")
    assert val[-1]["dice"] > val[0]["dice"] + 0.05
    assert {"dice_1", "loss", "ce", "dice_loss"} <= val[-1].keys()
    assert list((whole / "samples").glob("*_pred.nii.gz")) and list((whole / "samples").glob("*.png"))
    process = subprocess.Popen(command(*flags, "--out", str(cut)), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 12/"):
            process.kill()
            break
    process.wait()
    assert resume(cut) == 0
    assert (whole / "last.pt").read_bytes() == (cut / "last.pt").read_bytes()


@pytest.mark.parametrize("flags", [
    ["--loss.dice_share", "1"],
    ["--loss.class_weights", "1,5,1,1"],
    ["--data.ignore_label", "0"],
    ["--unet.deep_supervision", "1", "--unet.channels", "4,8,8"],
], ids=" ".join)
def test_segmentation_fields_reach_the_loss(flags, tmp_path):
    first = []
    for number, extra in enumerate(([], flags)):
        assert run(*SEG, "--steps", "1", *extra, out=tmp_path / str(number)) == 0
        first.append(rows(tmp_path / str(number), "train")[0]["loss"])
    assert first[0] != first[1]


def test_deep_supervision_below_the_stride_sees_the_label_that_the_network_saw(monkeypatch):
    cfg = load_config([*TINY, "--task", "seg", "--unet.channels", "4,8,8,8", "--unet.deep_supervision", "1",
                       "--patch", "4,16,16"])
    label = torch.arange(4).view(1, 4, 1, 1).expand(1, 4, 16, 16)
    out = unet.UNetOutput(torch.zeros(1, 2, 4, 16, 16), (torch.zeros(1, 2, 4, 8, 8),))
    seen, original = [], losses.segmentation_loss

    def noted(logits, y, *options):
        seen.append(y)
        return original(logits, y.clamp(0, 1), *options)
    monkeypatch.setattr(losses, "segmentation_loss", noted)
    seg.segmentation_terms(cfg, out, label)
    assert seen[1][0, :, 0, 0].tolist() == [0, 2, 3, 3]          # 0 1 2 3 3 3 3 3, every other one


@pytest.mark.parametrize("flags,says", [
    (["--memory.mode", "tile"], "has no exact tiles"),
    (["--loss.class_weights", "1,2"], "classes"),
    (["--preset", "high_res"], "unet3d"),
    (["--train.metric", "psnr"], "dice"),
])
def test_bad_segmentation_settings_are_one_line(flags, says, tmp_path, capsys):
    assert run(*SEG, *flags, out=tmp_path / "r") == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
