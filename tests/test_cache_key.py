"""volumes/cache.py: what was cached under another setting is not reused, for each that changes voxels."""
import dataclasses
import json

import numpy as np
import pytest

from data import open_data
from volume_files import config, ct_like, quiet, save
from volumes.config import NOT_OF_VOXELS, DataConfig
from volumes.files import DataError

CT = {"modality": "ct"}
MR = {"modality": "mr"}
GRID = {"modality": "voxel"}
# Setting -> file, what both runs have, the value of the first run, that of the second.
CASES = {
    "modality": ("scan.nii.gz", {}, "ct", "mr"),
    "window": ("scan.nii.gz", CT, "none", "lung"),
    "hu_range": ("scan.nii.gz", CT, (-1000.0, 1000.0), (-500.0, 500.0)),
    "percentiles": ("scan.nii.gz", MR, (0.5, 99.5), (0.5, 80.0)),
    "percentiles_of": ("scan.nii.gz", MR, "foreground", "all"),
    "voxel_scale": ("grid.npy", GRID, None, (50.0, 60.0, 70.0)),
    "spacing": ("scan.nii.gz", CT, "original", "2,2,2"),
    "resize": ("scan.nii.gz", CT, None, (9, 9, 9)),
    "scale": ("scan.nii.gz", CT, 1.0, 0.5),
    "surface": ("scan.nii.gz", CT, "none", "-200"),
    "band": ("scan.nii.gz", CT | {"surface": "-200"}, 2.0, 3.0),
    "metric": ("thick.nii.gz", CT | {"surface": "-200"}, "voxels", "mm"),
    "smooth": ("scan.nii.gz", CT | {"surface": "-200"}, 1.0, 0.0),
    "four_d": ("series.nii.gz", CT, "volumes", "channels"),
    "channel_axis": ("grid.npy", GRID, 0, 3),
    "select_channel": ("grid.npy", GRID, 0, 1),
}
TOLD_APART_BELOW = {"nan"}


@pytest.fixture
def files(tmp_path):
    folder, rng = tmp_path / "in", np.random.default_rng(0)
    save(folder / "scan.nii.gz", ct_like((12, 14, 16)))
    save(folder / "thick.nii.gz", ct_like((12, 14, 16)), np.diag([1, 1, 1.5, 1]))
    save(folder / "series.nii.gz", rng.integers(-900, 900, (8, 9, 10, 2)).astype(np.int16))
    np.save(folder / "grid.npy", rng.uniform(1, 40, (3, 8, 9, 3)).astype(np.float32))
    return folder


def voxels(path, cache, **fields) -> list[np.ndarray]:
    """Of all volumes, as training reads them, with the cache in the folder `cache`."""
    opened = open_data(config(path, cache, patch=(4, 4, 4), val_fraction=0, **fields), 0, quiet)
    return [entry.read() for entry in opened.train]


def are_same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return len(a) == len(b) and all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("name", CASES)
def test_a_setting_that_changes_voxels_does_not_find_those_of_another(name, files, tmp_path):
    """The second run, in the first one's cache, has what it would have in an empty one."""
    file, both, first, second = CASES[name]
    before = voxels(files / file, tmp_path / "shared", **both, **{name: first})
    after = voxels(files / file, tmp_path / "shared", **both, **{name: second})
    alone = voxels(files / file, tmp_path / "alone", **both, **{name: second})
    assert not are_same(before, after), "the second setting changes nothing here"
    assert are_same(after, alone)


def test_the_class_of_a_datalist_does_not_find_the_voxels_of_another(files, tmp_path):
    def of_class(kind, cache):
        path = files / f"{kind}.json"
        path.write_text(json.dumps({"training": [{"image": "scan.nii.gz", "class": kind}]}))
        return voxels(path, tmp_path / cache)
    before, after = of_class("ct", "shared"), of_class("mri", "shared")
    assert not are_same(before, after) and are_same(after, of_class("mri", "alone"))


def test_a_file_with_nan_that_was_cached_as_zero_is_refused_where_nan_is_an_error(tmp_path):
    path, array = tmp_path / "scan.nii.gz", ct_like((12, 14, 16)).astype(np.float32)
    array[3, 4, 5] = np.nan
    save(path, array)
    assert len(voxels(path, tmp_path / "shared", **CT, nan="zero")) == 1
    with pytest.raises(DataError, match="1 refused"):
        voxels(path, tmp_path / "shared", **CT, nan="error")


def test_every_field_is_tried_or_leaves_voxels_as_they_are():
    names = {field.name for field in dataclasses.fields(DataConfig)}
    assert names == set(CASES) | TOLD_APART_BELOW | set(NOT_OF_VOXELS)
