"""predict.py evaluate --samples: files in, figures, JSON and a page out."""
import json

import nibabel as nib
import numpy as np
import pytest

import predict
from volumes.synthetic import synthetic_volume


def write_trunks(folder, numbers, noise=0.0, size=(12, 16, 16)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        trunk = synthetic_volume("ct", 0, number, size)
        values = trunk.array[0] + noise * np.random.default_rng(number).standard_normal(size)
        image = nib.Nifti1Image(values.T.astype(np.int16), trunk.affine)
        nib.save(image, folder / f"case{number:02d}.nii.gz")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    write_trunks(folder / "real", range(16))
    write_trunks(folder / "same", range(16, 24))
    write_trunks(folder / "noisy", range(16, 24), noise=200)
    write_trunks(folder / "copies", range(6))
    return folder


def evaluate(folders, name, out, *flags):
    words = ["evaluate", "--samples", folders / name, "--data", folders / "real", "--data.modality", "ct",
             "--json", out / f"{name}.json", *flags]
    assert predict.main([*map(str, words)]) == 0
    return json.loads((out / f"{name}.json").read_text())


def test_samples_of_the_same_kind_are_like_real_ones_and_others_are_not(folders, tmp_path, capsys):
    found = {name: evaluate(folders, name, tmp_path) for name in ("same", "noisy", "copies")}
    text = capsys.readouterr().out
    assert "random features" in text and "KID of 8, real against real" in text
    real = found["same"]["kid"]["real"]
    assert found["same"]["kid"]["samples"]["mean"] < real["high"] + 0.5 * (real["high"] - real["low"])
    assert found["noisy"]["kid"]["samples"]["mean"] > 3 * real["high"]
    assert found["noisy"]["tissue"]["gradient_energy"] > 1.2
    assert text.count("too few to judge by") == 3               # 8, 8 and 6 samples
    assert found["copies"]["memorisation"]["auc"] == 1 and found["same"]["memorisation"]["auc"] < 0.9
    assert found["same"]["samples"] == 8 and found["same"]["real"] == 16


def test_the_page_shows_pairs_and_samples(folders, tmp_path):
    page = tmp_path / "page.html"
    evaluate(folders, "copies", tmp_path, "--report", page)
    text = page.read_text()
    assert text.count("<img") == 3 * (4 * 2 + 6 + 6) and "case00 and case00" in text
    assert "Nearest training case" in text and "AUC of copies" in text


def test_what_cannot_be_compared_is_told_in_one_line(folders, tmp_path, capsys):
    write_trunks(tmp_path / "one", [0])
    for flags, words in (
        (["--samples", tmp_path / "one", "--data", folders / "real"], "needs at least two"),
        (["--samples", tmp_path / "none", "--data", folders / "real"], "no such file"),
        (["--samples", folders / "same", "--data", folders / "real", "--features", tmp_path], "best.pt"),
        (["--data", folders / "real"], "--checkpoint is needed"),
    ):
        capsys.readouterr()
        assert predict.main(["evaluate", *map(str, flags)]) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error


def test_training_cases_are_known_by_the_denoisers_checkpoint(folders):
    from training.sample_report import trained_on
    class Ready:
        path = "run"
        facts = {"data": {"files": [{"name": "sub/case01", "path": "", "digest": ""}]}}
    class Case:
        def __init__(self, name):
            self.name = name
    assert trained_on(Ready, [Case("case00"), Case("case01")]).tolist() == [False, True]
    assert trained_on(None, [Case("case00")]).tolist() == [True]
