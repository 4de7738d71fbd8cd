"""volumes/boxes.py: crops of points, through data.open_data, on phantoms with a known surface."""
import types

import numpy as np
import pytest
import torch

from data import Crops, main, open_data, read_volume, val_crops
from volume_files import config, quiet, save
from volumes import surfaces
from volumes.boxes import most_points, sums_of, together, tokens_of
from volumes.files import DataError

SPARSE = {"points": True, "surface": "0", "smooth": 0.0, "modality": "ct", "val_fraction": 0.34,
          "patch": None}


@pytest.fixture
def folder(tmp_path):
    """Three balls of soft tissue (40 HU) in air, of 40^3 voxels."""
    grid = np.stack(np.meshgrid(*[np.arange(40)] * 3, indexing="ij"), -1)
    for number, radius in enumerate((9, 12, 15)):
        inside = np.linalg.norm(grid - 19.5, axis=-1) < radius
        save(tmp_path / "in" / f"ball{number}.nii.gz", np.where(inside, 40, -1000).astype(np.int16))
    return tmp_path


def opened(folder, say=quiet, **fields):
    return open_data(config(folder / "in", folder / "cache", **SPARSE | fields), 0, say)


def test_voxels_are_distances_in_bytes_and_0_is_no_point(folder):
    dataset = opened(folder)
    entry = dataset.train[0]
    stored = np.load(entry.store)
    assert stored.dtype == np.int8 and entry.intensity.modality == "surface"
    assert dataset.background == 0
    values = entry.read()
    assert values.dtype == np.float32 and np.array_equal(values, stored / np.float32(127))
    # The middle of the ball is far from its surface; a voxel just outside has .5 of a band of 2.
    assert values[0, 20, 20, 20] == 0
    assert np.abs(values[values != 0]).min() >= .24 and np.abs(values).max() <= 1


def test_crops_are_boxes_of_tokens_that_hold_no_more_than_asked(folder):
    dataset = opened(folder, max_points=1500)
    assert dataset.patch == (40, 40, 40)
    crops = Crops(dataset, 0)
    sizes = set()
    for index in range(24):
        image, number = crops[index]
        sizes.add(tuple(image.shape[1:]))
        assert all(n % 8 == 0 for n in image.shape[1:])
        assert 100 <= (image != 0).any(0).sum() <= 1500
        # The very voxels of the volume, at a place on the tokens' grid.
        whole = dataset.train[number].read()
        places = [whole[:, d:d + image.shape[1], h:h + image.shape[2], w:w + image.shape[3]]
                  for d in range(0, 40, 8) for h in range(0, 40, 8) for w in range(0, 40, 8)]
        assert any(np.array_equal(place, image) for place in places)
    assert len(sizes) > 1


def test_a_crop_is_a_function_of_seed_and_number_alone(folder):
    dataset = opened(folder, max_points=1500)
    a, b = Crops(dataset, 3), Crops(dataset, 3)
    for index in (17, 2, 5):
        assert torch.equal(a[index][0], b[index][0])
    assert any(not torch.equal(Crops(dataset, 4)[k][0], a[k][0]) for k in range(3))
    held = [crop.image for crop in val_crops(dataset, 0, 3)]
    assert all(torch.equal(x, crop.image) for x, crop in zip(held, val_crops(dataset, 0, 3)))


def test_boxes_without_a_limit_have_the_size_of_the_patch(folder):
    dataset = opened(folder, patch=(16, 24, 21))
    assert dataset.patch == (16, 24, 24)                        # whole tokens
    assert {tuple(Crops(dataset, 0)[k][0].shape) for k in range(8)} == {(1, 16, 24, 24)}


def test_a_volume_of_few_points_is_refused_by_name(folder):
    with pytest.raises(DataError, match=r"ball\d.nii.gz: \d+ points, data.min_points is 90000"):
        opened(folder, min_points=90000)


def test_boxes_of_several_sizes_are_filled_up_with_nothing():
    a, b = torch.ones(1, 8, 16, 8), 2 * torch.ones(1, 16, 8, 8)
    batch, numbers = together([(a, 4), (b, 2)])
    assert batch.shape == (2, 1, 16, 16, 8) and numbers.tolist() == [4, 2]
    assert batch[0].sum() == a.sum() and batch[1].sum() == b.sum() and (batch[0, :, 8:] == 0).all()


def test_points_and_tokens_are_told_and_where_sparse_does_not_pay(folder):
    said = []
    dataset = opened(folder, said.append)
    line = next(text for text in said if "tokens" in text)
    points = sum(int((entry.read() != 0).sum()) for entry in dataset.train)
    assert f"{points:,} points" in line
    entry = dataset.train[0]
    cells = torch.nn.functional.max_pool3d(torch.from_numpy((entry.read() != 0).astype(np.float32)), 8)
    assert tokens_of(sums_of(entry)) == cells.sum()
    said.clear()
    noise = np.random.default_rng(0).integers(-1000, 1000, (40, 40, 40)).astype(np.int16)
    save(folder / "in" / "noise.nii.gz", noise)
    opened(folder, said.append, val_fraction=0)
    assert "is no slower" in "\n".join(said)


def test_data_py_prints_points_tokens_and_fill(folder, capsys):
    assert main([str(folder / "in" / "ball2.nii.gz"), "--data.surface", "0", "--data.smooth", "0"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    dataset = opened(folder)
    values = next(e for e in (*dataset.train, *dataset.val) if e.name == "ball2").read()
    tokens = torch.nn.functional.max_pool3d(torch.from_numpy((values != 0).astype(np.float32)), 8).sum()
    assert f"{(values != 0).sum():,} points in {int(tokens)} tokens" in row and " ct " in row
    assert main([str(folder / "in"), "--data.surface", "here"]) == 2
    assert "a level in HU such as -500" in capsys.readouterr().err
    assert main([str(folder / "in" / "ball0.nii.gz")]) == 0 and "tokens" not in capsys.readouterr().out


def test_point_files_in_the_guides_form_are_grids(tmp_path):
    """Places x, y, z and one value a point; a distance of 0 is a point too."""
    index = np.array([[0, 1, 2, 3], [0, 9, 8, 7], [0, 4, 4, 4]], np.int32)       # sample, x, y, z
    values = np.array([0.5, -0.25, 0.0], np.float32)
    np.savez(tmp_path / "points.npz", sparse_index=index, sparse_sdf=values, resolution=16)
    array = read_volume(tmp_path / "points.npz").array
    assert array.shape == (1, 16, 16, 16) and np.count_nonzero(array) == 3
    assert array[0, 3, 2, 1] == .5 and array[0, 7, 8, 9] == -.25 and 0 < array[0, 4, 4, 4] < 1e-5


def test_the_densest_box_by_looking_at_all():
    counts = np.random.default_rng(0).integers(0, 9, (5, 4, 3)).astype(np.int32)
    entry = types.SimpleNamespace(tokens=surfaces.summed(counts))
    for sides in ((2, 3, 1), (9, 2, 3), (5, 4, 3)):
        d, h, w = (min(n, side) for n, side in zip(counts.shape, sides))
        every = [counts[i:i + d, j:j + h, k:k + w].sum()
                 for i in range(6 - d) for j in range(5 - h) for k in range(4 - w)]
        assert most_points([entry, entry], [8 * side for side in sides]) == max(every)
