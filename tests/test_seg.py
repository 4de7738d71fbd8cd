"""tasks/seg.py: a U-Net on whole volumes, in windows; classes on the source's grid."""
import types
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import predict
import unet
from predictions import ct_file, failed_line, use
from tasks import TASKS, seg
from training.config import TrainConfig, changed
from training.devices import to_device
from training.facts import open_data
from training.ready import Ready, load
from training.task import named
from volume_files import pair_like, quiet, save
from volumes import loading
from volumes.config import DataConfig
from volumes.find import Item


def segmenter(logits_of, out_channels=3, patch=(4, 8, 8)):
    """A checkpoint whose network is a function."""
    model = torch.nn.Conv3d(1, 1, 1)
    model.forward = lambda x: types.SimpleNamespace(logits=logits_of(x))
    cfg = types.SimpleNamespace(data=types.SimpleNamespace(patch=patch),
                                unet=unet.UNetConfig(out_channels=out_channels))
    return Ready(Path(), cfg, named(TASKS, "seg"), model, {}, None, "float32", "")


def on_a_pair(folder, values):
    """The config of a segmentation whose data, written here, are one pair with these values in its label."""
    image, label = pair_like((9, 10, 11))
    save(folder / "in" / "a_image.nii.gz", image)
    save(folder / "in" / "a_label.nii.gz", np.array(values, np.uint8)[label])
    fields = {"path": str(folder / "in"), "cache_dir": str(folder / "cache"), "patch": (4, 4, 4)}
    return changed(TrainConfig(task="seg", preset="unet_light"), data=fields)


def test_the_legend_names_the_value_that_a_class_has_in_the_files(tmp_path):
    cfg = on_a_pair(tmp_path, [0, 1, 5, 9])
    cfg, dataset = open_data(cfg, named(TASKS, "seg"), quiet, None)
    entry = dataset.train[0]
    crop = types.SimpleNamespace(image=torch.from_numpy(entry.read()), entry=entry,
                                 label=torch.from_numpy(entry.read_label()))
    right = torch.nn.functional.one_hot(crop.label, 4).movedim(-1, 0)[None].float()
    legend = seg.picture(cfg, crop, types.SimpleNamespace(logits=right)).note["legend"]
    assert [name for name, _ in legend] == [
        "class 1: Dice 1.000", "class 2 (value 5): Dice 1.000", "class 3 (value 9): Dice 1.000"]


def test_a_run_from_before_gaps_were_closed_goes_on_with_its_classes(tmp_path):
    cfg = on_a_pair(tmp_path, [0, 3, 5, 9])
    for known, classes in ((None, 4), ({"classes": 10, "label_values": None}, 10),
                           ({"classes": 4, "label_values": [0, 3, 5, 9]}, 4)):
        settled, dataset = open_data(cfg, named(TASKS, "seg"), quiet, known)
        assert dataset.classes == settled.unet.out_channels == classes
        assert settled.data.classes is None and dataset.cfg.classes is None
        assert dataset.train[0].read_label().max() == (9 if classes == 10 else 3)


@pytest.mark.parametrize("size, window, overlap", [
    ((9, 17, 20), (4, 8, 8), 0.5), ((4, 30, 8), (4, 8, 8), 0.0), ((13, 7, 9), (5, 9, 4), 0.75)])
def test_windows_of_a_local_network_give_the_whole_volumes_logits(size, window, overlap):
    """Weights sum to one everywhere, so what does not depend on the window comes through."""
    x = np.random.default_rng(0).standard_normal((1, *size)).astype(np.float32)
    ready = segmenter(lambda t: torch.cat([t, 0 * t + 2.5], 1), 2)
    ticks = []
    slabs = seg.window_logits(ready, x, window, overlap, 0.0, lambda *told: ticks.append(told))
    found = torch.cat(list(slabs), 1)
    assert (found[0] - torch.from_numpy(x[0])).abs().max() < 1e-5 and (found[1] - 2.5).abs().max() < 1e-5
    assert found.shape == (2, *size) and ticks[-1][0] == ticks[-1][1] == len(ticks)


def test_one_window_is_one_plain_forward_pass(runs):
    ready = load(runs("seg"), TASKS, device="cpu")
    x = np.random.default_rng(0).standard_normal((1, 8, 16, 16)).astype(np.float32)
    found, = seg.window_logits(ready, x, (8, 16, 16))
    with torch.no_grad():
        wanted = ready.model(to_device(torch.from_numpy(x)[None], torch.device("cpu"))).logits[0]
    assert torch.equal(found, wanted)
    assert np.array_equal(seg.segment(ready, x, (8, 16, 16)), wanted.argmax(0).numpy())


def test_threshold_decides_between_two_classes():
    x = np.linspace(-3, 3, 64, dtype=np.float32).reshape(1, 4, 4, 4)
    p = 1 / (1 + np.exp(-x[0]))
    for threshold in (None, 0.2, 0.5, 0.9):
        wanted = p > (threshold or 0.5)
        one, two = segmenter(lambda t: t, 1), segmenter(lambda t: torch.cat([-t, 0 * t], 1), 2)
        for ready in (one, two):
            assert (seg.segment(ready, x, (4, 4, 4), threshold=threshold) == wanted).all()
    with pytest.raises(ValueError, match="decides between two"):
        seg.segment(segmenter(lambda t: torch.cat([t, t, t], 1)), x, (4, 4, 4), threshold=0.5)


def test_segment_command(tmp_path, runs, capsys):
    """Several inputs, odd orientations, overlay, class numbers on the source's grid; --no-save: none."""
    folder = tmp_path / "in"
    paths = [ct_file(folder / f"{codes}.nii.gz", codes, shape=(20, 18, 9)) for codes in ("LPS", "AIL")]
    common = ["segment", "--checkpoint", str(runs("seg")), "--input", *map(str, paths), "--output",
              str(tmp_path / "o"), "--viz"]
    assert predict.main([*common, "--no-save"]) == 0
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == ["AIL_viz.png", "LPS_viz.png"]
    assert predict.main([*common, "--window", "4,8,8", "--overlap", "0.25"]) == 0
    for path in paths:
        a, b = nib.load(path), nib.load(tmp_path / "o" / path.name)
        assert a.shape == b.shape and np.allclose(a.affine, b.affine, atol=1e-5)
        assert b.get_data_dtype() == np.uint8
        assert set(np.unique(b.dataobj)) <= set(range(4))
    assert (tmp_path / "o" / "LPS_viz.png").read_bytes().startswith(b"\x89PNG")
    capsys.readouterr()
    assert predict.main([*common, "--mask-threshold", "0.5"]) == 2
    failed_line(capsys, "4 classes", "--mask-threshold")


def test_labels_go_back_to_a_finer_grid_and_to_their_stored_values(tmp_path, runs):
    """A network that finds what is above 0 HU, at 3 mm; the source has 1 mm and the values 0 and 7."""
    values = np.full((30, 30, 30), -500, dtype=np.int16)
    values[8:22, 10:20, 6:24] = 500
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "a.nii.gz")
    content = torch.load(runs("seg") / "best.pt", weights_only=True)
    content["config"]["data"] |= {"spacing": "3,3,3", "label_values": [0, 5, 6, 7]}
    content["data"]["label_values"] = [0, 5, 6, 7]
    for value in content["model"].values():
        value.zero_()
    content["model"]["head.bias"][3] = 1.0
    torch.save(content, tmp_path / "seg.pt")
    assert use("segment", tmp_path / "seg.pt", "--input", tmp_path / "a.nii.gz", "--output",
               tmp_path / "o") == 0
    found = nib.load(tmp_path / "o" / "a.nii.gz")
    assert found.shape == values.shape and np.unique(found.dataobj).tolist() == [7]
    x = loading.load(Item(tmp_path / "a.nii.gz"), DataConfig(modality="ct", spacing="3,3,3")).volumes[0][0]
    labels = seg.segment(segmenter(lambda t: torch.cat([0 * t, t], 1), 2), x, (10, 10, 10), size=(30, 30, 30))
    assert (labels.T != (values > 0)).mean() < 0.02
