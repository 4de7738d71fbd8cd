"""Samples as files: geometry, HU, the same whatever the count, and what is refused."""
import json

import nibabel as nib
import numpy as np
import pytest
import torch

import diffusion
import predict
import train
from predictions import TINY, ct_file, use
from tasks import TASKS, vae
from tasks import diffusion as task
from training import sampling
from training.ready import load


@pytest.fixture(scope="module")
def made(tmp_path_factory, runs):
    """Folder with an autoencoder's run, latents of four volumes and a denoiser's run."""
    folder = tmp_path_factory.mktemp("ldm")
    entries = []
    for number in range(4):
        ct_file(folder / f"in/case{number}.nii.gz", seed=number, shape=(16, 16, 8))
        entries.append({"image": f"in/case{number}.nii.gz", "class": "ct", "region": "chest-abdomen"})
    (folder / "list.json").write_text(json.dumps({"training": entries}))
    assert use("encode", runs("kl"), "--input", folder / "list.json", "--output", folder / "z") == 0
    flags = ["--task", "diffusion", "--data", str(folder / "z"), "--unet.channels", "8,16", "--batch", "2",
             "--unet.time_channels", "16", "--steps", "3", "--device", "cpu", "--log.sample_every", "2",
             "--diffusion.steps", "3", "--cond.region", "true", "--cond.vae", str(runs("kl"))]
    assert train.main([*flags, "--out", str(folder / "run")]) == 0
    return folder


def sample(folder, runs, *flags):
    words = ["--checkpoint", folder / "run", "--vae", runs("kl"), "--device", "cpu", *flags]
    return predict.main(["sample", *map(str, words)])


def test_sample_i_depends_on_seed_and_i_alone(made, tmp_path, runs):
    for name, flags in (("one", ["--count", 1]), ("three", ["--count", 3]), ("later", ["--first", 2]),
                        ("other", ["--seed", 1])):
        assert sample(made, runs, "--output", tmp_path / name, *flags) == 0
    def voxels(name, number):
        return np.asarray(nib.load(tmp_path / name / f"sample_{number:04d}.nii.gz").dataobj)
    assert np.array_equal(voxels("one", 0), voxels("three", 0))
    assert np.array_equal(voxels("later", 2), voxels("three", 2))
    assert not np.array_equal(voxels("three", 0), voxels("three", 1))
    assert not np.array_equal(voxels("one", 0), voxels("other", 0))


def test_a_sample_is_what_the_networks_make_of_its_noise(made, tmp_path, runs):
    """Geometry of the flags, HU of the autoencoder's range, mean and std undone; by the networks directly."""
    flags = ["--size", "10,20,14", "--spacing", "3,1,2", "--class", "ct", "--region", "chest", "--seed", 7,
             "--steps", 2, "--solver", "euler", "--guidance", 2]
    assert sample(made, runs, "--output", tmp_path, *flags) == 0
    image = nib.load(tmp_path / "sample_0000.nii.gz")
    assert image.shape == (14, 20, 10) and image.get_data_dtype() == np.int16
    assert np.allclose(image.header.get_zooms(), (2, 1, 3)) and nib.aff2axcodes(image.affine) == tuple("RAS")
    middle = image.affine @ [6.5, 9.5, 4.5, 1]
    assert np.allclose(middle[:3], 0)

    denoiser, vae = (load(path, TASKS, device="cpu") for path in (made / "run", runs("kl")))
    size = vae.model.latent_size((10, 20, 14))
    noise = sampling.noise_of(7, 0, (4, *size))
    told = torch.tensor([[1, np.log2(3), 0, 1, 1, *np.log2(np.array([10, 20, 14]) / 128),
                          0, 1, 0, 0, 0, 1, 0, 0, 1]], dtype=torch.float32)
    cfg = diffusion.DiffusionConfig(steps=2, solver="euler", guidance=2.0)
    def network(x, t, vector):
        return denoiser.model(x, t, vector).logits
    found = diffusion.sample(cfg, network, noise, {"vector": told}, {"vector": torch.zeros_like(told)})
    known = denoiser.facts["latent"]
    z = found * known["std"].view(1, 4, 1, 1, 1) + known["mean"].view(1, 4, 1, 1, 1)
    with torch.no_grad():
        hu = vae.model.decode(z, (10, 20, 14))[0, 0].numpy() * 1000
    assert np.abs(np.asarray(image.dataobj).transpose(2, 1, 0) - hu).max() <= 0.51


def test_tiles_of_decoding_leave_no_seams(made, tmp_path, runs, monkeypatch):
    """In one piece and in tiles the HU are the same, all over the volume: nothing is blended."""
    asked, for_volumes = [], vae.for_volumes

    def noted(network, tile, budget):
        asked.append(tile)
        return for_volumes(network, tile, budget)
    monkeypatch.setattr(vae, "for_volumes", noted)
    for name, tile in (("whole", "none"), ("tiles", "8,16,8")):
        flags = ["--size", "16,32,24", "--tile", tile, "--output", tmp_path / name]
        assert sample(made, runs, *flags) == 0
    found = [np.asarray(nib.load(tmp_path / name / "sample_0000.nii.gz").dataobj).astype(int)
             for name in ("whole", "tiles")]
    assert asked == ["none", (8, 16, 8)] and found[0].std() > 1
    # rounding to whole HU may fall either way
    assert np.abs(found[0] - found[1]).max() <= 1 and (found[0] != found[1]).mean() < 0.01


def test_a_denoiser_that_knows_no_scale_is_refused(made, tmp_path, runs, capsys):
    """Elsewhere such a checkpoint samples on with a scale factor of 1."""
    content = torch.load(made / "run/best.pt", weights_only=True)
    torch.save(content | {"latent": None}, tmp_path / "unscaled.pt")
    words = ["--checkpoint", tmp_path / "unscaled.pt", "--output", tmp_path / "o"]
    assert sample(made, runs, *words) == 2
    error = capsys.readouterr().err
    assert "no mean and std" in error and error.count("\n") == 1, error


def test_what_is_there_is_kept_unless_it_is_of_other_flags(made, tmp_path, runs, capsys):
    assert sample(made, runs, "--output", tmp_path, "--count", 2) == 0
    (tmp_path / "sample_0001.nii.gz").unlink()
    capsys.readouterr()
    assert sample(made, runs, "--output", tmp_path, "--count", 2) == 0
    assert capsys.readouterr().out.count("skipped") == 1
    assert sample(made, runs, "--output", tmp_path, "--steps", 1) == 2
    assert "other flags" in capsys.readouterr().err
    assert sample(made, runs, "--output", tmp_path, "--steps", 1, "--overwrite") == 0
    assert [path.name for path in tmp_path.glob("*.nii.gz")] == ["sample_0000.nii.gz"]


def test_what_cannot_be_meant_is_told_in_one_line(made, tmp_path, runs, capsys):
    other = tmp_path / "other"
    assert train.main([*TINY, "--vae.base_channels", "4", "--seed", "3", "--out", str(other)]) == 0
    capsys.readouterr()
    for flags, words in (
        (["--vae", other], "another autoencoder"), (["--class", "mr"], "'mr' is none"),
        (["--region", "knee"], "'knee' is none"), (["--size", "1,2"], "--size"),
        (["--spacing", "0,1,1"], "above 0"), (["--concat", "x"], "takes no --concat"),
        (["--control", "x"], "takes no --control"), (["--steps", 0], "diffusion.steps"),
        (["--checkpoint", runs("kl")], "this command needs one for diffusion"),
    ):
        assert sample(made, runs, "--output", tmp_path / "o", *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_pictures_of_training_are_decoded_on_the_volumes_grid(made):
    (path, *_) = sorted((made / "run/samples").glob("*_sample.nii.gz"))
    image = nib.load(path)
    zooms = image.header.get_zooms()
    source = nib.load(made / "in/case0.nii.gz")
    assert image.shape == source.shape and np.allclose(zooms, source.header.get_zooms(), atol=1e-4)
    assert np.allclose(image.affine, source.affine, atol=1e-3)


def test_control_and_concat_are_taken_as_training_takes_them():
    """The label map and the latent beside, raw from disk, give the network the tensors of a training step."""
    from runs import load_config, new_state
    cfg = load_config(["--task", "diffusion", "--unet.channels", "8,16", "--unet.in_channels", "6",
                       "--unet.time_channels", "16", "--cond.concat_channels", "2", "--cond.concat", "x",
                       "--cond.control", "x", "--init", "x", "--device", "cpu", "--cond.stride", "2,4,4"])
    state, seen = new_state(cfg), []
    rng = np.random.default_rng(0)
    label = rng.integers(0, 9, (7, 14, 16)).astype(np.float32)
    z, beside = torch.randn(1, 4, 4, 4, 4), torch.randn(1, 2, 4, 4, 4)
    from training.latent_data import fold
    folded = torch.from_numpy(fold(label, (2, 4, 4), (4, 4, 4)))[None]
    _, cond = task.prepared(cfg, state.latent, torch.cat([z, beside, folded], 1), None)

    class Spy:
        model = staticmethod(lambda *inputs: seen.append(inputs) or state.model(*inputs))
    Spy.cfg = cfg
    ask = task.denoise(Spy)
    ask(z, torch.zeros(1), concat=beside, hint=torch.from_numpy(label)[None, None])
    x, _, _, hint = seen[0]
    assert torch.equal(x[:, 4:], cond["concat"]) and torch.equal(hint, cond["hint"])
    assert hint.shape == (1, 8, 8, 16, 16)
