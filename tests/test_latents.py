"""Latent files: what they hold, and what is refused."""
import json
import math

import numpy as np
import torch

import data
from predictions import ct_file, use
from tasks import TASKS
from training.cases import read_case
from training.ready import data_config, load
from volumes.find import Item
from volumes.seeds import seeded


def test_encode_writes_the_mean_unless_asked_to_sample(tmp_path, runs):
    """No noise in what is stored. With what is needed besides: scale factor, affine, size; and no pickles."""
    path = ct_file(tmp_path / "a.nii.gz")
    for name, flags in (("z", []), ("s1", ["--sample"]), ("s2", ["--sample"])):
        assert use("encode", runs("kl"), "--input", path, "--output", tmp_path / name, *flags) == 0
    z, s1, s2 = (np.load(tmp_path / name / "a_latent.npz", allow_pickle=False) for name in ("z", "s1", "s2"))
    ready = load(runs("kl"), TASKS, device="cpu")
    case = read_case(Item(path), ready, data_config(ready))
    with torch.no_grad():
        mu = ready.model.encode(torch.from_numpy(case.volumes[0][0])[None]).mu
    assert np.abs(z["latent"] - mu.numpy()).max() < 1e-5 and z["latent"].dtype == np.float32
    assert not np.array_equal(z["latent"], s1["latent"]) and np.array_equal(s1["latent"], s2["latent"])
    assert z["size"].tolist() == [11, 14, 9] and np.allclose(z["affine"], data.read_volume(path).affine)
    best = torch.load(runs("kl") / "best.pt", weights_only=True)
    assert float(z["scale_factor"]) == best["latent"]["scale_factor"] > 0


def test_latents_that_lie_are_refused_in_one_line(tmp_path, runs, capsys):
    path = ct_file(tmp_path / "a.nii.gz")
    assert use("encode", runs("kl"), "--input", path, "--output", tmp_path) == 0
    with np.load(tmp_path / "a_latent.npz") as content:
        good = dict(content)
    about = json.loads(str(good["about"]))
    for number, (name, value, words) in enumerate([
            ("size", good["size"] + 0.5, "its size"),
            ("size", good["size"] * 10**6, "decode it with the checkpoint"),
            ("affine", good["affine"] * math.nan, "its affine"), ("affine", np.eye(3), "is no latent"),
            ("low", good["low"] * 1j, "its low"), ("low", good["low"][:0], "low and high"),
            ("high", good["high"].repeat(3, 1), "low and high"),
            ("high", good["high"] + math.inf, "its high"),
            ("latent", good["latent"] * math.nan, "NaN or infinite latents"),
            ("latent", np.array("x"), "decode it"), ("about", np.array("{"), "is no latent"),
            *(("about", np.array(json.dumps(about | {"origin": origin})), "is no latent")
              for origin in (3, {}, about["origin"] | {"dtype": "zz"}, about["origin"] | {"more": 1}))]):
        np.savez(tmp_path / f"{number}.npz", **good | {name: value})
        capsys.readouterr()
        path = tmp_path / f"{number}.npz"
        assert use("decode", runs("kl"), "--input", path, "--output", tmp_path / "o") == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 2 and f"{number}.npz" in lines[0] and words in lines[0], lines
        assert lines[1].endswith("1 of 1 failed"), lines


def test_encode_writes_what_training_asks_for(tmp_path, runs):
    """Spacing, size, class, region, patient and the autoencoder's digest; by hand from the datalist."""
    path = ct_file(tmp_path / "in/a.nii.gz")
    entry = {"image": "in/a.nii.gz", "class": "ct", "region": "chest-abdomen", "patient": 7, "fold": 1}
    listed = tmp_path / "list.json"
    listed.write_text(json.dumps({"training": [entry]}))
    assert use("encode", runs("kl"), "--input", listed, "--output", tmp_path / "z") == 0
    (file,) = (tmp_path / "z").rglob("*_latent.npz")
    content = np.load(file, allow_pickle=False)
    about = json.loads(str(content["about"]))
    ready = load(runs("kl"), TASKS, device="cpu")
    wanted = {"source": "in/a", "kind": "ct", "region": "chest-abdomen", "patient": "7", "fold": 1,
              "variant": 0, "weights": ready.fingerprint}
    assert {name: about[name] for name in wanted} == wanted
    assert np.allclose(about["spacing"], data.read_volume(path).spacing)
    assert content["size"].tolist() == list(data.read_volume(path).array.shape[1:])


def test_variants_are_augmented_before_encoding(tmp_path, runs, capsys):
    """Variant 2 is the encoded flip of its source, by the draws of (seed, name, 2); variant 0 the source."""
    path = ct_file(tmp_path / "a.nii.gz")
    flags = ["--input", path, "--data.flip", "DHW", "--variants", 3]
    for name, seed in (("z", 0), ("same", 0), ("other", 1)):
        assert use("encode", runs("kl"), *flags, "--seed", seed, "--output", tmp_path / name) == 0
    names = ["a_latent.npz", "a_v001_latent.npz", "a_v002_latent.npz"]
    assert sorted(file.name for file in (tmp_path / "z").glob("*.npz")) == names
    found = {folder: [np.load(tmp_path / folder / name)["latent"][0] for name in names]
             for folder in ("z", "same", "other")}
    assert all(np.array_equal(a, b) for a, b in zip(found["z"], found["same"]))
    assert not all(np.array_equal(a, b) for a, b in zip(found["z"], found["other"]))
    assert json.loads(str(np.load(tmp_path / "z" / names[2])["about"]))["variant"] == 2

    ready = load(runs("kl"), TASKS, device="cpu")
    volume = read_case(Item(path), ready, data_config(ready)).arrays[0]
    draw = seeded(0, "variant of a", 2).random(8)
    axes = [axis for axis in (1, 2, 3) if draw[3 + axis] < 0.5]
    flipped = np.ascontiguousarray(np.flip(volume, axes))
    with torch.no_grad():
        mu = ready.model.encode(torch.from_numpy(flipped)[None]).mu[0].numpy()
    assert np.abs(found["z"][2] - mu).max() < 1e-5
    assert use("encode", runs("kl"), "--input", path, "--output", tmp_path / "no", "--variants", 2) == 2
    assert "nothing varies" in capsys.readouterr().err
