"""data.py: splits by file, crops that are functions of (seed, index), the command line."""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
from data import Crops, open_data, val_crops
from volume_files import REAL, ROOT, config, ct_like, needs_real, one_line, pair_like, quiet, save
from volumes.config import DataConfig
from volumes.files import DataError


def test_split_is_by_file_seeded_and_complete(tmp_path):
    for number in range(6):
        series = (
            np.stack([ct_like((8, 8, 8), 10 * number + t) for t in range(3)], -1)
            if number % 2
            else ct_like((8, 8, 8), number)
        )
        save(tmp_path / "in" / f"{number}.nii.gz", series)
    splits = {}
    for seed in range(8):
        opened = open_data(config(tmp_path / "in", tmp_path, val_fraction=0.4), seed, quiet)
        train, val = ({entry.path for entry in entries} for entries in (opened.train, opened.val))
        assert not train & val and len(train | val) == 6 and len(val) == 2, (
            "all volumes of a 4-D file on one side"
        )
        assert len(opened.train) + len(opened.val) == 12
        names = [entry.name for entry in opened.train + opened.val]
        assert len(set(names)) == 12 and {"1_t000", "1_t002", "2"} <= set(names)
        splits[seed] = sorted(val)
        again = open_data(config(tmp_path / "in", tmp_path, val_fraction=0.4), seed, quiet)
        assert [e.name for e in again.train] == [e.name for e in opened.train]
    assert len({tuple(val) for val in splits.values()}) > 1, "the seed does not matter"
    channels = open_data(config(tmp_path / "in" / "1.nii.gz", tmp_path, four_d="channels"), 0, quiet)
    assert channels.channels == 3 and channels.train == channels.val
    picked = open_data(
        config(tmp_path / "in" / "1.nii.gz", tmp_path, four_d="channels", select_channel=2), 0, quiet
    )
    assert np.array_equal(picked.train[0].read(), channels.train[0].read()[2:])


def test_one_file_serves_for_both_and_says_so(folder, tmp_path):
    said = []
    opened = open_data(config(folder / "case0.nii.gz", tmp_path), 0, said.append)
    assert opened.train == opened.val and any("training and validation" in line for line in said)
    assert any("guessed ct" in line for line in said)


def test_names_are_unique_and_fit_for_files(tmp_path):
    for name in ("a/img.nii.gz", "b/img.nii.gz", "c/im:g é.nii"):
        save(tmp_path / "in" / name, ct_like((6, 6, 6), len(name)))
    opened = open_data(config(tmp_path / "in", tmp_path), 0, quiet)
    assert sorted(entry.name for entry in opened.train + opened.val) == ["a/img", "b/img", "c/im_g_é"]


def test_one_bad_file_among_good_ones(folder, tmp_path):
    (folder / "broken.nii.gz").write_bytes((folder / "case0.nii.gz").read_bytes()[:900])
    np.save(folder / "zz_two_channels.npy", np.random.default_rng(0).random((9, 9, 9, 2)))
    said = []
    opened = open_data(config(folder, tmp_path), 0, said.append)
    assert len(opened.train) + len(opened.val) == 5
    refused = [line for line in said if line.startswith("data: refused")]
    assert (
        len(refused) == 2
        and "broken.nii.gz" in refused[0]
        and "2 channels, the first accepted volume has 1" in refused[1]
    )
    with pytest.raises(DataError) as error:
        open_data(config(folder, tmp_path, strict=True), 0, quiet)
    one_line(error, "broken.nii.gz", "strict")
    with pytest.raises(DataError) as error:
        open_data(config(folder / "broken.nii.gz", tmp_path), 0, quiet)
    one_line(error, "broken.nii.gz", "no usable")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError) as error:
        open_data(config(tmp_path / "empty", tmp_path), 0, quiet)
    one_line(error, "no volumes found")


def test_class_beats_modality_beats_the_guess(folder, tmp_path):
    items = [
        {"image": "case0.nii.gz", "class": "MRI"},
        {"image": "case1.nii.gz"},
        {"image": "case3.nii.gz", "class": "liver"},
    ]
    (folder / "list.json").write_text(json.dumps({"training": items, "validation": ["case4.nii.gz"]}))
    said = []
    opened = open_data(config(folder / "list.json", tmp_path), 0, said.append)
    assert [entry.intensity.modality for entry in opened.train] == ["mr", "ct", "ct"]
    assert any("'liver' names no intensity rule" in line for line in said)
    opened = open_data(config(folder / "list.json", tmp_path, modality="voxel"), 0, quiet)
    assert [entry.intensity.modality for entry in opened.train] == ["mr", "voxel", "voxel"]
    assert open_data(config(folder / "case1.nii.gz", tmp_path, modality="radar"), 0, quiet).background == 0


@needs_real
def test_radar_folder_trains_on_its_grids(tmp_path):
    said = []
    names = (
        "fmcw_cube_complex.npz",
        "radhar_boxing_points.npy",
        "radhar_boxing_voxel_4d.npz",
        "tj4d_070070.bin",
        "tj4d_070070_voxel_dense.npz",
        "tj4d_070070_voxel_small.npy",
    )
    for name in names:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(REAL / "radar" / name, tmp_path / "in" / name)
    opened = open_data(config(tmp_path / "in", tmp_path), 0, said.append)
    assert opened.channels == 4 and opened.background == 0
    assert {entry.name for entry in opened.train + opened.val} == {
        "tj4d_070070_voxel_dense",
        "tj4d_070070_voxel_small",
    }
    assert sum(line.startswith("data: refused") for line in said) == 4


def same_items(a: list, b: list) -> bool:
    return all(torch.equal(x, y) and m == n for (x, m), (y, n) in zip(a, b, strict=True))


def test_an_item_is_a_function_of_seed_and_index(folder, tmp_path):
    cfg = config(folder, tmp_path, flip="DHW", jitter=0.2, spacing="random")
    opened = open_data(cfg, 3, quiet)
    indices = list(range(45))
    expected = [Crops(opened, 5)[i] for i in indices]
    assert same_items(expected, [Crops(open_data(cfg, 3, quiet), 5)[i] for i in indices])
    crops, shuffled = Crops(opened, 5), random.Random(0).sample(indices, len(indices))
    items = {i: crops[i] for i in shuffled}
    assert same_items(expected, [items[i] for i in indices]), "the order of access matters"
    assert not same_items(expected, [Crops(opened, 6)[i] for i in indices])
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(
            Crops(opened, 5), sampler=indices, batch_size=None, num_workers=workers
        )
        assert same_items(expected, list(loader)), f"{workers} workers"
    assert len({image.numpy().tobytes() for image, _ in expected}) == len(expected)
    assert all(image.shape == (1, 8, 10, 12) and image.dtype == torch.float32 for image, _ in expected)


def test_an_epoch_covers_every_volume_exactly(opened):
    crops = Crops(opened, 0)
    assert len(crops) == len(opened.train) * opened.cfg.crops_per_volume
    epochs = [[crops[epoch * len(crops) + i][1] for i in range(len(crops))] for epoch in range(3)]
    for epoch in epochs:
        assert np.bincount(epoch).tolist() == [opened.cfg.crops_per_volume] * len(opened.train)
    assert epochs[0] != epochs[1] != epochs[2]


def test_crops_are_regions_of_their_volume_and_reach_both_ends(tmp_path):
    array = np.arange(9 * 8 * 7, dtype=np.float32).reshape(9, 8, 7)       # every value tells its place
    save(tmp_path / "a.nii", array)
    opened = open_data(
        config(tmp_path / "a.nii", tmp_path, patch=(4, 4, 4), modality="voxel", crops_per_volume=300),
        0,
        quiet,
    )
    crops, starts = Crops(opened, 1), set()
    whole = opened.train[0].read()[0]
    for i in range(300):
        crop = crops[i][0][0].numpy()
        place = tuple(int(v[0]) for v in np.where(whole == crop[0, 0, 0]))
        assert np.array_equal(crop, whole[tuple(slice(p, p + 4) for p in place)])
        starts.add(place)
    for axis, last in enumerate((3, 4, 5)):                    # D, H, W = 7, 8, 9
        assert {place[axis] for place in starts} == set(range(last + 1))


def test_small_volumes_lie_centred_in_their_background(tmp_path):
    array = ct_like((5, 4, 6), 2)                              # X, Y, Z
    save(tmp_path / "a.nii", array)
    opened = open_data(config(tmp_path / "a.nii", tmp_path, patch=(8, 9, 10), modality="ct"), 0, quiet)
    crop = Crops(opened, 0)[0][0][0].numpy()
    expected = np.full((8, 9, 10), -1, np.float32)
    expected[1:7, 2:6, 2:7] = opened.train[0].read()[0]
    assert np.array_equal(crop, expected)


def shrunk(array: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """(D, H, W) -> size by a triangle as wide as a new voxel, one row of weights at a time."""
    for axis, new in enumerate(size):
        old = array.shape[axis]
        ratio, rows = old / new, []
        for i in range(new):
            centre = (i + 0.5) * ratio - 0.5
            weights = np.maximum(0, 1 - np.abs(np.arange(old) - centre) / max(1, ratio))
            rows.append(np.tensordot(weights / weights.sum(), array, (0, axis)))
        array = np.stack(rows, axis)
    return array


def test_a_crop_that_is_zoomed_out_does_not_alias(tmp_path):
    """Slices of -1000 and 1000 HU in turn, a third of their size: 1/9 of the contrast is left by the wider
    kernel; it was once all of it, where a new voxel's centre is an old one's.
    """
    array = np.empty((48, 48, 48), np.int16)
    array[:] = np.where(np.arange(48) % 2, 1000, -1000)
    save(tmp_path / "in" / "a.nii.gz", array)
    cfg = config(tmp_path / "in", tmp_path, patch=(12, 12, 12), spacing="random", zoom=(1 / 3, 1 / 3),
                 val_fraction=0, modality="ct")
    crops = Crops(open_data(cfg, 0, quiet), 0)
    volume = crops.data.train[0].read()[0]
    crop = crops[0][0][0].numpy()
    assert 0.1 < np.abs(crop[1:-1]).max() < 0.12
    # The crop is 36 of 48 voxels wide, so only its start along D is to be found.
    far = [np.abs(crop - shrunk(volume[start:start + 36, :36, :36], (12, 12, 12))).max() for start in (0, 1)]
    assert min(far) < 1e-5, far


def test_augmentations_change_only_what_they_say(folder, tmp_path):
    def crops(**fields) -> list[np.ndarray]:
        return [
            Crops(open_data(config(folder, tmp_path, **fields), 0, quiet), 0)[i][0].numpy() for i in range(24)
        ]

    plain, flipped, jittered, zoomed = (
        crops(),
        crops(flip="W"),
        crops(jitter=0.3),
        crops(spacing="random", zoom=(0.5, 0.7)),
    )
    changed = [not np.array_equal(a, b) for a, b in zip(plain, flipped)]
    assert 0 < sum(changed) < 24 and all(
        np.array_equal(a[..., ::-1], b) for a, b, c in zip(plain, flipped, changed) if c
    )
    for a, b in zip(plain, jittered):
        factors = ((b + 1)[a > -1] / (a + 1)[a > -1])[b[a > -1] < 1]
        assert (
            0.69 < factors.min()
            and factors.max() < 1.31
            and np.ptp(factors) < 1e-2
            and ((b == -1) | (a > -1)).all()
        )
    assert len({round(float(b.mean()), 4) for b in jittered}) > 20
    assert not any(np.array_equal(a, b) for a, b in zip(plain, zoomed)) and {b.shape for b in zoomed} == {
        (1, 8, 10, 12)
    }


def test_validation_crops_are_fixed_and_spread(folder, tmp_path):
    cfg = config(folder, tmp_path, val_fraction=0.5, flip="DHW", jitter=0.3, spacing="random")
    opened = open_data(cfg, 0, quiet)
    few, many = val_crops(opened, 4, 3), val_crops(opened, 4, 8)
    assert all(torch.equal(a.image, b.image) and a.entry is b.entry for a, b in zip(few, many))
    assert {crop.entry.name for crop in many} == {entry.name for entry in opened.val}
    for crop in many:  # never augmented: the affine says where in the volume it lies
        start = np.round(np.linalg.inv(crop.entry.affine) @ crop.affine[:, 3])[:3].astype(int)[::-1]
        whole = crop.entry.read()[0]
        box = tuple(slice(max(0, s), min(s + n, m)) for s, n, m in zip(start, opened.patch, whole.shape))
        inside = tuple(slice(b.start - s, b.stop - s) for b, s in zip(box, start))
        assert np.array_equal(crop.image[0].numpy()[inside], whole[box])
        assert (crop.image == -1).sum() >= crop.image.numel() - whole[box].size


def digest(arrays: list[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def test_crops_of_a_seed_are_those_of_version_1(folder, tmp_path):
    """Recorded before foreground crops, labels and pictures came in; IEEE operations voxel by voxel, so the
    same on any machine.
    """
    for fields, expected in (({}, "93d8ec7bf8418041"), ({"flip": "DHW", "jitter": 0.2}, "4f0ba9bf5faf76e0")):
        opened = open_data(config(folder, tmp_path, **fields), 3, quiet)
        crops = Crops(opened, 5)
        images = [crops[i][0].numpy() for i in range(40)] + [
            crop.image.numpy() for crop in val_crops(opened, 5, 6)
        ]
        assert digest(images) == expected, fields
    for kind, sums in (("ct", (-24561.74, -25629.18)), ("radar", (5194.166, 5227.592))):
        opened = open_data(
            DataConfig(synthetic=kind, synthetic_count=3, synthetic_size=(24, 48, 40)), 0, quiet
        )
        np.testing.assert_allclose(
            [entry.read().sum(dtype=np.float64) for entry in opened.train], sums, rtol=1e-5
        )


def run(capfd, *arguments: object) -> tuple[int, list[str], str]:
    """Exit code, lines of standard output, standard error of `python data.py ...`, in this process: importing
    torch takes seconds.
    """
    try:
        code = data.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    out, err = capfd.readouterr()
    return code, out.splitlines(), err


@pytest.mark.slow
def test_command_line(folder, tmp_path, capfd):
    code, rows, err = run(capfd, folder)
    assert (code, len(rows), err) == (0, 7, "")
    assert all(
        word in rows[1] for word in ("12,24,20", "2,1.5,1", "RAS", "int16", "ct", "-1000 .. 899", "ok")
    )
    os.rename(folder / "case0.nii.gz", folder / "a\nb.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"not gzip")
    np.save(folder / "two.npy", np.random.default_rng(0).random((9, 9, 9, 2)))
    code, rows, err = run(capfd, folder)
    assert (code, len(rows), err) == (1, 9, "")
    assert sum("refused: " in row for row in rows) == 2 and r"a\nb.nii.gz" in rows[1]
    (tmp_path / "empty").mkdir()
    for arguments in ((), (tmp_path / "absent",), (folder, tmp_path / "absent"), (tmp_path / "empty",)):
        code, rows, err = run(capfd, *arguments)
        assert code == 2 and rows == [] and err and "Traceback" not in err
    done = subprocess.run(
        [sys.executable, "data.py", folder], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stderr == "" and len(done.stdout.splitlines()) == 9


@needs_real
def test_command_line_on_pairs(capfd, tmp_path):
    code, rows, err = run(capfd, REAL / "seg")
    assert (code, err, len(rows)) == (0, "", 10) and "left out 9 label files" in rows[0]
    assert sum("ok, 2 labels 0 .. 1" in row for row in rows) == 4 and any(
        "ok, 32 labels 0 .. 117" in row for row in rows
    )
    image, label = pair_like((9, 9, 9))
    save(tmp_path / "a_image.nii.gz", image)
    save(tmp_path / "a_label.nii.gz", label + 0.5)
    code, rows, err = run(capfd, tmp_path)
    assert code == 1 and err == "" and "its label is refused" in rows[2] and "no whole numbers" in rows[2]


@needs_real
def test_command_line_on_the_odd_files(capfd):
    code, rows, err = run(capfd, REAL / "odd")
    assert code == 1 and err == "" and len(rows) == 46
    assert (
        sum(row.rstrip().endswith("  ok") for row in rows) == 33
        and sum("  refused: " in row for row in rows) == 10
    )


@pytest.mark.slow
def test_works_copied_with_its_folder(tmp_path):
    for name in ("data.py", "augment.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "volumes", tmp_path / "volumes")
    script = (
        "import data; d = data.open_data(data.DataConfig(synthetic_count=2, synthetic_size=(8, 16, 16)), 0); "
        "print(data.Crops(d, 0)[0][0].shape)"
    )
    env = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, env=env
    )
    assert done.returncode == 0 and "torch.Size([1, 8, 16, 16])" in done.stdout, done.stderr
