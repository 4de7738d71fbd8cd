"""predict.py: its commands from end to end; what goes wrong in one line."""
import json
import math
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import peaks
import predict
import toy_task
import train
import vae3d
from predictions import ROOT, TINY, ct_file, failed_line, oriented, same_grid, use
from tasks import TASKS, vae
from training import latents
from training.cases import read_case
from training.plan import BUDGET, for_volumes
from training.ready import Ready, data_config, load
from training.task import named
from volumes.find import Item


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["kl", "vq", "fsq"])
def test_decode_of_encode_equals_reconstruct_to_the_bit(tmp_path, runs, kind):
    path = ct_file(tmp_path / "in" / "a.nii.gz", "PIR", shape=(19, 26, 13))
    tile = ["--tile", "8,16,8"]
    assert use("reconstruct", runs(kind), *tile, "--input", path, "--output", tmp_path / "r") == 0
    assert use("encode", runs(kind), *tile, "--input", path, "--output", tmp_path / "z") == 0
    assert [p.name for p in (tmp_path / "z").glob("*.npz")] == ["a_latent.npz"]
    assert use("decode", runs(kind), *tile, "--input", tmp_path / "z", "--output", tmp_path / "d") == 0
    same_grid(path, tmp_path / "r" / "a.nii.gz")
    assert (tmp_path / "r" / "a.nii.gz").read_bytes() == (tmp_path / "d" / "a.nii.gz").read_bytes()
    ready = load(runs(kind), TASKS, device="cpu")  # before the rounding to int16 too
    volume = read_case(Item(path), ready, data_config(ready)).volumes[0][0]
    for_volumes(ready.model, (8, 16, 8))
    found = latents.read(tmp_path / "z" / "a_latent.npz", ready)
    recon = vae.reconstruct(ready, volume)
    assert np.array_equal(vae.decode(ready, found.arrays[0], found.size), recon)
    with torch.no_grad():
        plain = ready.model.memory("none")(torch.from_numpy(volume)[None]).recon[0].numpy()
    assert np.abs(plain - recon).max() < 1e-5


def test_series_keeps_its_volumes(tmp_path, runs):
    """A 4-D image: each volume by itself, 4-D again on the way out, through latents too."""
    affine, shape = oriented("LPS")
    values = np.random.default_rng(0).integers(-1000, 1000, (*shape, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(values, affine), tmp_path / "t.nii.gz")
    steps = (("reconstruct", "t.nii.gz", "r"), ("encode", "t.nii.gz", "z"), ("decode", "z", "d"))
    for command, source, out in steps:
        assert use(command, runs("kl"), "--input", tmp_path / source, "--output", tmp_path / out) == 0
    assert nib.load(tmp_path / "r" / "t.nii.gz").shape == values.shape
    assert (tmp_path / "r" / "t.nii.gz").read_bytes() == (tmp_path / "d" / "t.nii.gz").read_bytes()


def test_radar_grids_keep_their_channels_and_layout(tmp_path, runs):
    array = np.zeros((10, 9, 8, 4), dtype=np.float32)
    array[2, 3, 4] = (1, 20, -3, 0.5)
    np.savez_compressed(tmp_path / "grid.npz", voxel=array)
    assert use("reconstruct", runs("radar"), "--input", tmp_path / "grid.npz", "--output",
               tmp_path / "o") == 0
    found = np.load(tmp_path / "o" / "grid.npz")
    assert found.files == ["voxel"] and found["voxel"].shape == array.shape
    assert found["voxel"].dtype == np.float32


@pytest.mark.slow
def test_tiles_equal_the_untiled_volume_and_bound_the_peak():
    """Five times the volume takes less than one and a half times the peak; untiled it takes five times it."""
    torch.manual_seed(0)
    network = vae3d.VAE3D(vae3d.VAEConfig(base_channels=8)).eval()
    ready = Ready(Path(), None, named(TASKS, "vae"), network, {}, None, "float32", "")
    found, results = {}, {}
    for tile, depth in (("none", 24), ("none", 120), ((8, 16, 32), 24), ((8, 16, 32), 120)):
        x = np.random.default_rng(0).standard_normal((1, depth, 32, 32)).astype(np.float32)
        for_volumes(network, tile)
        with peaks.LiveStorages("cpu") as log:
            results[tile, depth] = vae.reconstruct(ready, x)
        found[tile, depth] = log.peak()[0]
        assert results[tile, depth].shape == x.shape
    whole, tiled = (results[tile, 120] for tile in ("none", (8, 16, 32)))
    difference, scale = np.abs(whole - tiled).max(), np.abs(whole).max()
    assert difference < 1e-5 * scale, f"{difference} of {scale}: more than float32 sums in another order"
    assert found["none", 120] > 4.5 * found["none", 24], found
    assert found[(8, 16, 32), 120] < 1.5 * found[(8, 16, 32), 24], found


@pytest.mark.slow
def test_default_tiles_depend_on_the_size_alone(monkeypatch):
    """So that encode and decode, run apart, compute the same bits; and a large volume is cut."""
    network = for_volumes(vae3d.VAE3D.from_preset("ultra_lightweight"))
    plan = network.tiling().plan((160, 512, 512), 1, torch.float32)
    assert plan.peak_bytes <= BUDGET * 2 ** 30
    # And not on what a card has free.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 ** 20, 2 ** 20))
    again = for_volumes(vae3d.VAE3D.from_preset("ultra_lightweight"))
    assert plan == again.tiling().plan((160, 512, 512), 1, torch.float32)


def test_what_cannot_start_is_one_line(tmp_path, runs, capsys):
    path = ct_file(tmp_path / "a.nii.gz")
    runs("kl"), runs("seg")
    torch.save({"kind": "vae3d.other", "version": 1}, tmp_path / "other.pt")
    torch.save({"kind": "vae3d.weights", "version": 1}, tmp_path / "empty.pt")
    torch.save(torch.nn.Conv3d(1, 1, 1), tmp_path / "code.pt")
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "nothing").mkdir()
    capsys.readouterr()

    def refused(command, checkpoint, *flags, words, source=path):
        assert use(command, checkpoint, "--input", source, "--output", tmp_path / "o", *flags) == 2
        failed_line(capsys, *words)
    refused("reconstruct", tmp_path / "other.pt", words=["other.pt", "vae3d.other"])
    refused("reconstruct", tmp_path / "empty.pt", words=["empty.pt", "holds no config"])
    refused("reconstruct", tmp_path / "code.pt", words=["code.pt", "objects"])  # runs no code
    refused("reconstruct", tmp_path / "text.pt", words=["text.pt"])
    refused("reconstruct", tmp_path / "absent.pt", words=["no such checkpoint"])
    refused("reconstruct", tmp_path / "nothing", words=["neither best.pt nor last.pt"])
    refused("segment", runs("kl"), words=["--task vae"])
    refused("encode", runs("seg"), words=["--task seg"])
    refused("reconstruct", runs("kl"), words=["no volumes"], source=tmp_path / "nothing")
    refused("reconstruct", runs("kl"), words=["no such file"], source=tmp_path / "absent.nii")
    refused("reconstruct", runs("kl"), "--tile", "8,8", words=["--tile", "3 values"])
    refused("reconstruct", runs("kl"), "--memory", "-1", words=["--memory", "0"])
    refused("reconstruct", runs("kl"), "--device", "tpu", words=["tpu"])
    refused("reconstruct", runs("kl"), "--overwrit", words=["did you mean --overwrite"])
    refused("encode", runs("vq"), "--sample", words=["--sample", "vq"])
    refused("reconstruct", runs("kl"), "--mask", words=["--mask", "data.surface"])
    refused("decode", runs("kl"), words=["_latent.npz"], source=tmp_path / "nothing")
    assert use("reconstruct", runs("kl"), "--input", path, "--output", tmp_path) == 2
    failed_line(capsys, "a.nii.gz", "overwritten")
    assert use("evaluate", runs("kl"), "--data", path, "--json", tmp_path / "no" / "o.json") == 2
    failed_line(capsys, "folder does not exist")
    refused("segment", runs("seg"), "--data.label_values", "0,1", words=["2 values", "4 classes"])
    refused("segment", runs("seg"), "--overlap", "1", words=["--overlap", "between 0 and 1"])
    assert predict.main([]) == 2
    failed_line(capsys)
    assert not (tmp_path / "o" / "a.nii.gz").exists()


def test_a_reconstruction_that_is_not_finite_is_a_failure(tmp_path, runs, capsys):
    """No number that stands for NaN is written."""
    content = torch.load(runs("kl") / "best.pt", weights_only=True)
    content["model"]["decoder.head.conv.bias"].fill_(math.nan)
    torch.save(content, tmp_path / "nan.pt")
    path, out = ct_file(tmp_path / "a.nii.gz"), str(tmp_path / "o")
    assert use("reconstruct", tmp_path / "nan.pt", "--input", path, "--output", out) == 1
    assert "not finite" in capsys.readouterr().err and not list((tmp_path / "o").iterdir())


@pytest.mark.parametrize("command", ["", *predict.COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        predict.main([command, "--help"] if command else ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and (f"predict.py {command}".strip() in text) and len(text.splitlines()) > 8


@pytest.mark.slow
def test_as_a_script_piped(tmp_path, runs):
    """Plain lines, no tracebacks, exit code of the process."""
    path = ct_file(tmp_path / "a.nii.gz")
    done = subprocess.run([sys.executable, str(ROOT / "predict.py"), "reconstruct", "--checkpoint",
                           str(runs("kl")), "--input", str(path),
                           str(path), "--output", str(tmp_path / "o")], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and "\r" not in done.stdout, done
    # The network, that it is the untrained one, and the file.
    assert done.stdout.count("\n") == 3 and "untrained" in done.stdout, done


def test_a_task_that_no_room_knows_is_used(tmp_path, monkeypatch, capsys):
    """toy_task.py: reconstructed, evaluated by its own figure, less is better; the rest is refused."""
    monkeypatch.setitem(TASKS, "toy", toy_task)
    run, folder = tmp_path / "run", tmp_path / "in"
    assert train.main([*TINY, "--task", "toy", "--out", str(run)]) == 0
    paths = [ct_file(folder / f"{name}.nii.gz", seed=seed) for seed, name in enumerate("abc")]
    assert use("reconstruct", run, "--input", folder, "--output", tmp_path / "o") == 0
    same_grid(paths[0], tmp_path / "o" / "a.nii.gz")
    capsys.readouterr()
    result, report = tmp_path / "e.json", tmp_path / "e.html"
    assert use("evaluate", run, "--data", folder, "--json", result, "--report", report) == 0
    assert "network ultra_lightweight" in capsys.readouterr().out
    worst = max(json.loads(result.read_text())["volumes"], key=lambda row: row["l1"])
    page = report.read_text()
    shown = page[page.index("<h3>Worst</h3>"):page.index("<h3>Median</h3>")]
    assert Path(worst["file"]).name in shown and "volume by L1" in page
    assert use("encode", run, "--input", folder, "--output", tmp_path / "z") == 2
    failed_line(capsys, "--task toy", "this command needs one for vae")
