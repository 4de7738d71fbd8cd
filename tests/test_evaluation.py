"""predict.py evaluate: figures against sums by hand, JSON, table and report."""
import json
import math
import re
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import predict
import train
from predictions import TINY, ct_file, use
from tasks import TASKS, vae
from training import evaluation
from training.cases import read_case
from training.ready import data_config, load
from training.task import Scored
from volumes.find import Item


def test_evaluate_json_table_and_report(tmp_path, runs, capsys):
    folder = tmp_path / "in"
    for i in range(4):
        ct_file(folder / (f"<b>{i}&.nii.gz" if i else "plain.nii.gz"), seed=i, shape=(9, 14 + i, 12))
    ct_file(folder / "broken.nii.gz").write_bytes(b"no NIfTI")
    assert use("evaluate", runs("kl"), "--data", folder, "--json", tmp_path / "o.json", "--report",
               tmp_path / "o.html") == 1
    result = json.loads((tmp_path / "o.json").read_text())
    assert list(result)[:4] == ["volumes", "mean", "peak_gib", "voxels_per_second"]
    assert len(result["volumes"]) == 4
    assert {"file", "psnr", "ssim", "l1", "sharpness", "bits_per_voxel", "compression", "ms_ssim", "mae_hu",
            "mae_hu_lung", "psnr_soft_tissue", "ssim_bone"} <= set(result["volumes"][0])
    # HU in [-1000, 1000]
    assert all(math.isclose(row["mae_hu"], 1000 * row["l1"], rel_tol=1e-4) for row in result["volumes"])
    for name in ("psnr", "ssim", "l1"):
        assert math.isclose(result["mean"][name], np.mean([row[name] for row in result["volumes"]]))
    assert "broken" in result["failed"][0]["file"]
    assert result["peak_gib"] > 0 and result["voxels_per_second"] > 0
    row = next(row for row in result["volumes"] if "plain" in row["file"])

    # 12,14,9 -> 6,4,3 of 4 channels at 32 bits.
    assert row["shape"] == [12, 14, 9]
    assert math.isclose(row["bits_per_voxel"], 6 * 4 * 3 * 4 * 32 / (12 * 14 * 9))
    assert math.isclose(row["compression"], 16 / row["bits_per_voxel"])
    assert math.isclose(row["compression_16"], 2 * row["compression"])
    ready = load(runs("kl"), TASKS, device="cpu")
    case = read_case(Item(folder / "plain.nii.gz"), ready, data_config(ready))
    x = torch.from_numpy(case.arrays[0])[None]
    recon = torch.from_numpy(vae.reconstruct(ready, x[0].numpy()))[None]
    assert math.isclose(row["psnr"], 10 * math.log10(4 / float((recon - x).square().mean())), abs_tol=1e-3)
    page = (tmp_path / "o.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img") == 27
    assert not re.search(r"https?://|<script|<link|<b>\d&", page)
    assert page.count("<h3>") == 3 and all(f"<h3>{name}</h3>" in page for name in ("Worst", "Median", "Best"))
    assert "&lt;b&gt;1&amp;" in page
    captured = capsys.readouterr()
    assert "PSNR" in captured.out and captured.err.count("\n") == 2 and "broken.nii.gz" in captured.err
    assert "1 of 5 failed" in captured.err


def test_held_out_files_are_those_that_the_run_did_not_train_on(tmp_path, capsys):
    for n in range(4):
        ct_file(tmp_path / "data" / f"case{n}.nii.gz", seed=n)
    assert train.main([*TINY, "--vae.base_channels", "4", "--data", str(tmp_path / "data"),
                       "--data.cache_dir", str(tmp_path / "cache"),
                       "--out", str(tmp_path / "run")]) == 0
    trained = torch.load(tmp_path / "run/best.pt", weights_only=True)["data"]["training"]
    argv = ["evaluate", "--checkpoint", str(tmp_path / "run"), "--split", "held-out", "--device", "cpu",
            "--json", str(tmp_path / "e.json")]
    assert predict.main([*argv, "--data", str(tmp_path / "data")]) == 0
    rows = json.loads((tmp_path / "e.json").read_text())["volumes"]
    seen = {Path(row["file"]).name.split(".")[0] for row in rows}
    assert seen == {f"case{n}" for n in range(4)} - set(trained) and len(seen) == 1
    capsys.readouterr()
    assert predict.main([*argv, "--data", str(tmp_path / "data" / f"{trained[0]}.nii.gz")]) == 2
    assert "all of 1 files were trained on" in capsys.readouterr().err


@pytest.mark.slow
def test_series_that_are_resampled_count_for_each_voxel_of_their_source_and_are_known_by_their_file(tmp_path):
    """A 4-D file of 1 mm slices in a run of 2 mm: the bits of its latent are set beside the source's voxels
    and bits, for each of its volumes. It was trained on, as two volumes; a file that came later was not.
    """
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    folder.mkdir()
    series = rng.integers(-1000, 1001, (12, 14, 10, 2)).astype(np.int16)
    nib.save(nib.Nifti1Image(series, np.eye(4)), folder / "series.nii.gz")
    assert train.main([*TINY, "--vae.base_channels", "4", "--data", str(folder), "--data.spacing", "2,1,1",
                       "--data.val_fraction", "0", "--data.cache_dir", str(tmp_path / "cache"),
                       "--out", str(tmp_path / "run")]) == 0
    assert use("evaluate", tmp_path / "run", "--data", folder, "--json", tmp_path / "a.json") == 0
    rows = json.loads((tmp_path / "a.json").read_text())["volumes"]

    # 10,14,12 -> 5,14,12 -> a latent of 3,4,3 of 4 channels at 32 bits; 16 bits a voxel on disk.
    bits = 3 * 4 * 3 * 4 * 32 / (10 * 14 * 12)
    assert [row["shape"] for row in rows] == [[5, 14, 12]] * 2
    assert all(math.isclose(row["bits_per_voxel"], bits) for row in rows)
    assert all(math.isclose(row["compression"], 16 / bits) for row in rows)

    ct_file(folder / "later.nii.gz", shape=(12, 14, 10))
    assert use("evaluate", tmp_path / "run", "--data", folder, "--split", "held-out",
               "--json", tmp_path / "b.json") == 0
    rows = json.loads((tmp_path / "b.json").read_text())["volumes"]
    assert [Path(row["file"]).name for row in rows] == ["later.nii.gz"]


def test_evaluate_counts_codes_and_channels(tmp_path, runs):
    path = ct_file(tmp_path / "a.nii.gz", shape=(16, 16, 8))
    assert use("evaluate", runs("vq"), "--data", path, "--json", tmp_path / "vq.json") == 0
    result = json.loads((tmp_path / "vq.json").read_text())
    assert 0 < result["codebook_usage"] <= 1 and 1 <= result["perplexity"] <= 300
    assert math.isclose(result["mean"]["bits_per_voxel"], 4 * 4 * 4 * math.log2(300) / (16 * 16 * 8))
    grid = np.zeros((8, 8, 8, 4), dtype=np.float32)
    grid[3, 3, 3], grid[1, 2, 3] = (1, 2, 3, 4), (1, 1, -2, 0)
    np.save(tmp_path / "g.npy", grid)
    assert use("evaluate", runs("radar"), "--data", tmp_path / "g.npy", "--json", tmp_path / "g.json",
               "--report", tmp_path / "g.html") == 0
    row, = json.loads((tmp_path / "g.json").read_text())["volumes"]
    assert 0 <= row["iou"] <= 1 and len(row["channels"]) == 4
    assert math.isclose(row["l1"], np.mean([channel["l1"] for channel in row["channels"]]), rel_tol=1e-4)
    assert "The only" in (tmp_path / "g.html").read_text()


def test_evaluate_segmentation(tmp_path, runs, capsys):
    """Dice by hand over a network of constant answer; a label that is no class is refused."""
    for i, codes in enumerate(("LPS", "PIR", "RAS")):
        image = ct_file(tmp_path / "d" / f"c{i}_image.nii.gz", codes, i)
        stored = nib.load(image)
        label = np.random.default_rng(i).integers(0, 4 if i < 2 else 9, stored.shape).astype(np.uint8)
        nib.save(nib.Nifti1Image(label, stored.affine), tmp_path / "d" / f"c{i}_label.nii.gz")
    content = torch.load(runs("seg") / "best.pt", weights_only=True)
    for value in content["model"].values():
        value.zero_()
    content["model"]["head.bias"][2] = 1.0
    torch.save(content, tmp_path / "seg.pt")
    assert use("evaluate", tmp_path / "seg.pt", "--data", tmp_path / "d", "--json", tmp_path / "o.json",
               "--report", tmp_path / "o.html") == 1
    result = json.loads((tmp_path / "o.json").read_text())
    label = np.asarray(nib.load(tmp_path / "d" / "c1_label.nii.gz").dataobj)
    row = next(row for row in result["volumes"] if "c1" in row["file"])
    share = (label == 2).mean()
    assert math.isclose(row["dice_2"], 2 * share / (1 + share), rel_tol=1e-5) and row["dice_1"] == 0
    assert "psnr" not in row
    assert math.isclose(row["dice"], row["dice_2"] / 3, rel_tol=1e-5)
    assert set(result["pooled"]) == {f"{name}{k}" for name in ("dice", "surface_dice")
                                     for k in ("", "_1", "_2", "_3")}
    # Classes 1 and 3 are never found: no distance, a surface Dice of 0, and two that are missed. The network
    # finds class 2 everywhere, so its surface is the volume's: of a label voxel, the way to the border.
    assert row["hd95_1"] is None and row["surface_dice_1"] == 0 and row["missed"] == 2
    assert row["hd95"] == row["hd95_2"] and row["surface_dice"] == pytest.approx(row["surface_dice_2"] / 3)
    affine = nib.as_closest_canonical(nib.load(tmp_path / "d" / "c1_label.nii.gz"))
    mm = nib.affines.voxel_sizes(affine.affine)
    there = np.argwhere(np.asarray(affine.dataobj) == 2)
    to_border = (np.minimum(there, np.array(affine.shape) - 1 - there) * mm).min(1)
    assert row["hd95_2"] >= np.percentile(to_border, 95) - 1e-3
    page = (tmp_path / "o.html").read_text()
    assert "HD95 2" in page and "surface Dice 3" in page
    assert (tmp_path / "o.html").read_text().count("<img") == 18
    assert "c2_label.nii.gz" in capsys.readouterr().err


def test_worst_median_and_best_by_a_figure_of_which_more_or_less_is_better():
    rows = [{"l1": value} for value in (0.2, float("nan"), 0.5, 0.1, 0.3)]
    assert evaluation.worst_median_best(rows, "l1") == {"Worst": 1, "Median": 0, "Best": 2}
    assert evaluation.worst_median_best(rows, "l1", False) == {"Worst": 1, "Median": 4, "Best": 3}
    assert evaluation.worst_median_best(rows[2:4], "l1", False) == {"Worst": 0, "Best": 1}
    assert evaluation.worst_median_best(rows[:1], "l1") == {"The only": 0}


def test_one_perfect_or_flat_volume_makes_no_mean():
    """A perfect reconstruction counts as 100 dB. Sharpness is a ratio of sums: 1 of a noisy volume that is
    given back and 0.25 of one at half its contrast, which has 4 times the gradient energy, are 0.4; a flat
    volume with noise adds next to nothing, and not a ratio of millions.
    """
    rng = np.random.default_rng(0)
    noise = (0.1 * rng.standard_normal((1, 8, 8, 8))).astype(np.float32)
    flat = np.full_like(noise, 0.5)
    pairs = [(noise, noise), (noise, 2 * noise), (flat + 1e-4 * noise, flat)]
    rows, totals = [], evaluation.Totals()
    for recon, volume in pairs:
        intensity = types.SimpleNamespace(modality="ct", low=(-1000.0,), high=(1000.0,))
        scores, sums = evaluation.compared(recon, volume, intensity, torch.device("cpu"))
        rows.append({"file": "x"} | scores)
        totals.add(volume, Scored(scores, recon, 1.0, sums))
    task = types.SimpleNamespace(pooled=lambda sums: {})
    ready = types.SimpleNamespace(device=torch.device("cpu"), task=task)
    mean = evaluation.summary(ready, rows, [], totals)["mean"]
    assert rows[0]["psnr"] == 100 and rows[2]["sharpness"] > 1e3
    assert math.isclose(mean["sharpness"], (1 + 1) / (1 + 4), rel_tol=1e-4)
    assert math.isclose(mean["psnr"], (100 + rows[1]["psnr"] + rows[2]["psnr"]) / 3)
    # The same in validation.
    counts, crop = [], types.SimpleNamespace(entry=types.SimpleNamespace(intensity=intensity))
    for recon, volume in pairs:
        out = types.SimpleNamespace(recon=torch.from_numpy(recon)[None])
        micro = types.SimpleNamespace(image=torch.from_numpy(volume)[None])
        found = vae.metrics(None, out, micro, crop)
        assert math.isclose(float(found["psnr"]), rows[len(counts)]["psnr"], rel_tol=1e-5)
        counts.append(vae.counts(None, out, micro, None)["energy"])
    assert math.isclose(vae.figures({"energy": sum(counts)})["sharpness"], 2 / 5, rel_tol=1e-4)


def test_figures_inside_of_hu_windows_by_hand():
    """Half the voxels at 0 HU, half at -800, given back 20 HU too high and 40 HU too low: the first are seen
    by the soft tissue's window (-150 to 250) and the bone's (-450 to 1050, cut at 1000), where the others are
    below the lower end; the lung's window (-1350 to 150) is cut at -1000, and sees both.
    """
    hu = torch.zeros(1, 1, 12, 12, 12)
    hu[..., 6:] = -800
    wrong = torch.where(hu == 0, hu + 20, hu - 40)
    found = evaluation.hu_figures(wrong / 1000, hu / 1000, (-1000.0, 1000.0))
    assert math.isclose(found["mae_hu"], 30, rel_tol=1e-4)
    assert math.isclose(found["mae_hu_lung"], 30, rel_tol=1e-4)
    for name, width in (("soft_tissue", 400), ("bone", 1450)):
        assert math.isclose(found[f"mae_hu_{name}"], 20, rel_tol=1e-4)
        # 20 HU in half of the voxels: 10 log10(width^2 / (20^2 / 2))
        assert math.isclose(found[f"psnr_{name}"], 10 * math.log10(width**2 / 200), rel_tol=1e-4)
    assert math.isclose(found["psnr_lung"], 10 * math.log10(1150**2 / 1000), rel_tol=1e-4)
    # A network that sees soft tissue alone has no other window, and knows the HU of its own numbers.
    narrow = evaluation.hu_figures(torch.full_like(hu, 0.1), torch.zeros_like(hu), (-150.0, 250.0))
    assert not {"psnr_lung", "psnr_bone"} & narrow.keys() and math.isclose(narrow["mae_hu"], 20, rel_tol=1e-4)
    assert evaluation.column("mae_hu_soft_tissue") == ("error soft tissue", "{:.1f} HU")
    assert evaluation.column("surface_dice_3")[0] == "surface Dice 3"


def test_means_are_of_finite_figures():
    assert evaluation.average([1.0, float("nan"), 3.0, float("inf")]) == 2.0
    assert evaluation.finite({"a": [float("nan"), 1.0]}) == {"a": [None, 1.0]}
    assert math.isnan(evaluation.average([]))
