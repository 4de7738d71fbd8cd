"""Latents as a data set: mapped files, conditions as numbers, and what is refused."""
import json

import numpy as np
import pytest

import data
from latent_files import write_latent, write_set
from runs import load_config
from training import conditions
from training.config import CondConfig
from training.latent_data import coarser, fold, mapped, open_latents
from volumes.files import DataError


def opened(folder, *flags, say=lambda line: None):
    return open_latents(load_config(["--task", "diffusion", "--data", str(folder), *flags]), say)


def test_conditions_are_these_numbers():
    """By hand: known, log2 mm; known, log2 of voxels / 128; top, bottom of four; one of the classes."""
    cond = CondConfig(region=True, classes=("ct", "mr"))
    found = conditions.vector(cond, (4, 1, 0.5), (128, 256, 64), "mr", "Thorax-Pelvis")
    wanted = [1, 2, 0, -1, 1, 0, 1, -1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert found.tolist() == wanted and conditions.width(cond) == len(wanted)
    assert not conditions.vector(cond, None, None, None, None).any()
    with pytest.raises(ValueError, match="'knee' is none of head"):
        conditions.vector(cond, None, None, None, "knee")
    with pytest.raises(ValueError, match="did you mean mr"):
        conditions.vector(cond, None, None, "mri", None)
    assert conditions.width(CondConfig(spacing=False, size=False, classes=("a",), by_class=False)) == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_latent_is_read_where_it_lies(tmp_path, save):
    latent = np.random.default_rng(0).standard_normal((2, 3, 4, 5, 6))
    path = write_latent(tmp_path / "a_latent.npz", latent, save=save)
    assert np.array_equal(mapped(str(path)), latent.astype(np.float32))
    assert isinstance(mapped(str(path)), np.memmap) == (save is np.savez)


def test_a_crop_is_of_the_latent_and_has_its_conditions(tmp_path):
    write_set(tmp_path, 3, kind="ct")
    found = opened(tmp_path, "--patch", "2,4,4")
    crops = data.Crops(found, 0)
    image, told, number = crops[1]
    whole = mapped(found.train[number].path)[0]
    places = [(z, y, x) for z in range(3) for y in range(5) for x in range(5)
              if np.array_equal(whole[:, z:z + 2, y:y + 4, x:x + 4], image.numpy())]
    assert len(places) == 1 and told.tolist() == found.train[number].label.tolist()
    assert found.cond.classes == ("ct",) and told[-1] == 1 and len(told) == 9
    assert found.train[0].spacing == (5.0, 8.0, 6.0)
    # the middle of the first element of 2,4,4 voxels lies between its voxels
    assert np.allclose((coarser((2, 4, 4)) @ [0, 0, 0, 1])[:3], (1.5, 1.5, 0.5))


def test_patch_is_the_smallest_latent_and_variants_are_not_held_out(tmp_path):
    for number in range(4):
        for variant in (0, 1):
            shape = (1, 4, 4 + number, 8, 6)
            path = tmp_path / f"c{number}{'_v001' if variant else ''}_latent.npz"
            write_latent(path, np.zeros(shape), variant=variant, source=f"c{number}")
    found = opened(tmp_path, "--data.val_fraction", "0.5")
    assert found.patch == (4, 8, 6) and len(found.train) == 4 and len(found.val) == 2
    assert not {entry.file for entry in found.train} & {entry.file for entry in found.val}
    with pytest.raises(DataError, match="smallest has 4,8,6"):
        opened(tmp_path, "--patch", "5,8,6")


def test_a_thin_latent_among_large_ones_is_named(tmp_path):
    """Its edge is that of every crop; nothing is said where most are alike, or where the crop was chosen."""
    for number, depth in enumerate((8, 8, 9, 3)):
        write_latent(tmp_path / f"c{number}_latent.npz", np.zeros((1, 4, depth, 8, 8)))
    told = []
    assert opened(tmp_path, say=told.append).patch == (3, 8, 8)
    (line,) = [line for line in told if "without those" in line]
    assert "3 elements along D" in line and "most latents have 8, for c3;" in line
    told.clear()
    opened(tmp_path, "--patch", "3,8,8", say=told.append)
    (tmp_path / "c3_latent.npz").unlink()
    opened(tmp_path, say=told.append)
    assert not any("without those" in line for line in told)


def test_what_stands_beside_is_cut_at_the_same_place(tmp_path):
    write_set(tmp_path / "dense", 3)
    write_set(tmp_path / "sparse", 3, shape=(2, 4, 8, 8), seed=1, weights="f" * 16)
    found = opened(tmp_path / "dense", "--cond.concat", str(tmp_path / "sparse"), "--patch", "2,2,2")
    entry = found.train[0]
    region = slice(1, 3), slice(2, 4), slice(5, 7)
    beside = mapped(str(tmp_path / "sparse" / f"{entry.name}_latent.npz"))[0]
    assert np.array_equal(entry.read(region)[4:], beside[(slice(None), *region)])
    assert found.cond.concat_channels == 2 and found.cond.concat_autoencoder == "f" * 16
    (tmp_path / "sparse/case1_latent.npz").unlink()
    with pytest.raises(DataError, match="case1_latent.npz: has no pair"):
        opened(tmp_path / "dense", "--cond.concat", str(tmp_path / "sparse"))


def test_a_label_map_is_folded_and_comes_back(tmp_path):
    label = np.random.default_rng(0).integers(0, 200, (3, 7, 8)).astype(np.float32)
    folded = fold(label, (2, 4, 4), (2, 2, 2))
    assert folded.shape == (32, 2, 2, 2)
    for z, y, x in ((0, 0, 0), (2, 6, 7), (1, 5, 2)):            # channel: place in the element, W fastest
        channel = (z % 2) * 16 + (y % 4) * 4 + x % 4
        assert folded[channel, z // 2, y // 4, x // 4] == label[z, y, x]
    assert folded.sum() == label.sum()


def test_what_cannot_be_trained_on_is_refused_in_one_line(tmp_path):
    good = write_set(tmp_path / "good", 2)
    with np.load(good / "case0_latent.npz") as content:
        content = dict(content)
    about = json.loads(str(content["about"]))
    cases = {
        "another autoencoder": {"about": np.array(json.dumps(about | {"weights": "1" * 16}))},
        "samples of the posterior": {"about": np.array(json.dumps(about | {"sampled": True}))},
        "an older predict.py encode": {"about": np.array(json.dumps({"weights": "0" * 16, "source": "x"}))},
        "is no latent": {"about": np.array("{")},
        "3 channels": {"latent": content["latent"][:, :3]},
        "is none of head": {"about": np.array(json.dumps(about | {"region": "knee"}))},
    }
    for words, change in cases.items():
        bad = tmp_path / words.replace(" ", "_")
        write_set(bad, 2)
        np.savez(bad / "zz_latent.npz", **content | change)
        with pytest.raises(DataError, match=words) as error:
            opened(bad, "--cond.region", "true")
        assert "\n" not in str(error.value) and "zz_latent.npz" in str(error.value)
    codes = {name: value for name, value in content.items() if name != "latent"}
    np.savez(tmp_path / "good/case1_latent.npz", **codes, index=np.zeros((1, 2, 2, 2), np.int64))
    with pytest.raises(DataError, match="indices of codes"):
        opened(good)
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="predict.py encode writes them"):
        opened(tmp_path / "none")
    with pytest.raises(DataError, match="comes before encoding"):
        opened(good, "--data.flip", "W")
