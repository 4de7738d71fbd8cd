"""volumes/points.py: crops that are placed to hold foreground."""
import dataclasses
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from data import Crops, Data, open_data, val_crops
from volume_files import REAL, config, needs_real, quiet, said_and_data, save
from volumes import cache, points
from volumes.entries import Entry
from volumes.intensities import Intensity
from volumes.points import POINTS, choose_point, foreground_points


def sparse_grid(path: Path, seed: int, size: int = 40, points: int = 6) -> None:
    """A radar frame (2 channels) of which 99.99 % is empty: what lies in it lies close together."""
    rng = np.random.default_rng(seed)
    grid = np.zeros((size, size, size, 2), np.float32)
    place = rng.integers(0, size - 4, 3)
    grid[tuple((place + rng.integers(0, 4, (points, 3))).T)] = (1, 20)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, grid)


def test_foreground_crops_of_sparse_grids(tmp_path):
    for number in range(4):
        sparse_grid(tmp_path / "in" / f"{number}.npy", number)

    def crops(foreground: float) -> tuple[list[torch.Tensor], Data]:
        opened = open_data(
            config(tmp_path / "in", tmp_path, foreground=foreground, patch=(8, 8, 8), modality="radar"),
            0,
            quiet,
        )
        dataset = Crops(opened, 1)
        return [dataset[i][0] for i in range(200)], opened

    (never, plain), (half, _), (always, opened) = (crops(share) for share in (0.0, 0.5, 1.0))
    shares = [sum(bool(crop.any()) for crop in images) / 200 for images in (never, half, always)]
    assert shares[0] < 0.1 and 0.4 < shares[1] < 0.65 and shares[2] == 1, shares
    assert not all(crop.image.any() for crop in val_crops(plain, 0, 8))
    assert all(crop.image.any() for crop in val_crops(opened, 0, 8)), "an empty validation crop"
    places = np.array([np.argwhere(crop.numpy()[0])[0] for crop in always])
    assert places.min() == 0 and places.max() == 7, "the foreground lies anywhere in the crop"
    shuffled = Crops(opened, 1)
    assert all(torch.equal(shuffled[i][0], always[i]) for i in random.Random(0).sample(range(200), 30)), (
        "a function of (seed, index)"
    )


def test_crops_that_are_not_placed_stay_where_they_were(folder, tmp_path):
    never, some = (
        Crops(open_data(config(folder, tmp_path, foreground=share, flip="DHW", jitter=0.1), 0, quiet), 0)
        for share in (0.0, 0.3)
    )
    same = sum(torch.equal(never[i][0], some[i][0]) for i in range(100))
    assert 60 <= same <= 85, f"{same} of 100"


def test_foreground_places_are_bounded_even_and_kept(tmp_path, monkeypatch):
    array = np.zeros((30, 31, 32), np.float32)
    array[5:25, 3, 4], array[0, 0, 0] = 1, 0.04                # the second is too faint to count
    np.save(tmp_path / "a.npy", array)
    cfg = config(tmp_path / "a.npy", tmp_path, foreground=1, modality="voxel")
    entry = open_data(cfg, 0, quiet).train[0]
    assert sorted(map(tuple, np.load(entry.points)[0])) == [(4, 3, x) for x in range(5, 25)], (
        "each voxel once, D H W"
    )
    monkeypatch.setattr(cache, "foreground_points", lambda *_: pytest.fail("made again"))
    assert open_data(cfg, 0, quiet).train[0].points == entry.points
    monkeypatch.undo()
    os.truncate(entry.points, 50)
    assert np.load(open_data(cfg, 0, quiet).train[0].points).shape == (1, 20, 3), (
        "a damaged one is made again"
    )
    dense = Entry("dense", None, (1, 20, 50, 60), (1, 1, 1), np.eye(4), Intensity("voxel", (-1,), (1,)),
                       np.ones((1, 20, 50, 60), np.float32))
    points = foreground_points(dense)
    assert points.shape == (1, POINTS, 3) and len(np.unique(points[0], axis=0)) > 0.99 * POINTS
    np.testing.assert_allclose(points[0].mean(0), (9.5, 24.5, 29.5), atol=0.6)
    empty = dataclasses.replace(dense, store=dense.store * 0)
    assert choose_point(dataclasses.replace(empty, points=foreground_points(empty)), (0.5, 0.5)) is None


def test_foreground_places_do_not_depend_on_the_slabs(monkeypatch):
    rng = np.random.default_rng(0)
    array = (rng.random((1, 12, 9, 10)) < 0.3).astype(np.float32)
    entry = Entry("a", None, array.shape, (1, 1, 1), np.eye(4), Intensity("voxel", (-1,), (1,)), array)
    whole = foreground_points(entry)
    monkeypatch.setattr(points, "SLAB", 2 * 9 * 10)            # slabs of 2
    assert np.array_equal(foreground_points(entry), whole)


@needs_real
def test_held_out_crops_of_real_radar_are_not_empty(tmp_path):
    content = {"training": [str(REAL / "radar" / "tj4d_070070_voxel_dense.npz")], "validation": [
        str(REAL / "radar" / f"tj4d_0700{n}_voxel_sparse.npz") for n in (80, 90)]}
    (tmp_path / "list.json").write_text(json.dumps(content))
    opened = open_data(config(tmp_path / "list.json", tmp_path, foreground=0.5, patch=(16, 16, 16)), 0, quiet)
    filled = [bool(crop.image.any()) for crop in val_crops(opened, 0, 12)]
    assert all(filled), f"{12 - sum(filled)} of 12 are empty"


def test_foreground_crops_see_rare_classes(tmp_path):
    label = np.zeros((40, 40, 40), np.uint8)
    label[:20], label[30, 31, 32] = 1, 2                       # half of the volume, and one voxel
    save(tmp_path / "in" / "a_image.nii.gz", np.random.default_rng(0).random(label.shape).astype(np.float32))
    save(tmp_path / "in" / "a_label.nii.gz", label)
    rare = {}
    for share in (0.0, 0.6, 1.0):
        _, opened = said_and_data(
            tmp_path / "in", tmp_path, foreground=share, patch=(6, 6, 6), crops_per_volume=300
        )
        crops = Crops(opened, 0)
        rare[share] = sum(bool((crops[i][1] == 2).any()) for i in range(300)) / 300
    assert rare[0.0] < 0.03 and abs(rare[0.6] - 0.3) < 0.08 and abs(rare[1.0] - 0.5) < 0.08, rare
    assert all((crop.label > 0).any() for crop in val_crops(opened, 0, 10))
