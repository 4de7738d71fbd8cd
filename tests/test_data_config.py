"""volumes/config.py: fields that are wrong, and which of them change voxels."""
import dataclasses

import pytest

from volumes.cache import key_of
from volumes.config import NOT_OF_VOXELS, DataConfig, VoxelSettings


@pytest.mark.parametrize(
    "fields",
    [
        {"patch": (0, 8, 8)},
        {"patch": (8, 8)},
        {"synthetic": "pet"},
        {"window": "liver"},
        {"modality": "x"},
        {"val_fraction": 1.0},
        {"spacing": "1,2"},
        {"spacing": "fine"},
        {"spacing": "1,0,1"},
        {"flip": "X"},
        {"jitter": -0.1},
        {"hu_range": (5, 5)},
        {"zoom": (2, 1)},
        {"nan": "ignore"},
        {"four_d": "time"},
        {"crops_per_volume": 0},
        {"workers": -1},
        {"voxel_scale": (0.0,)},
        {"max_gib": 0},
        {"resize": (1, 2, 0)},
        {"foreground": 1.5},
        {"scale": 0.0},
        {"scale": 2.0},
        {"classes": 1},
        {"label_values": (0, 0)},
        {"label_values": (0, -4)},
        {"ignore_label": 10**6},
        {"label_values": (0, 1), "classes": 3},
    ],
)
def test_config_names_the_field_that_is_wrong(fields):
    with pytest.raises(ValueError, match=f"data.{next(iter(fields))} is .*; "):
        DataConfig(**fields)


def test_spacing_forms():
    assert (
        DataConfig(spacing="3, 1,1").spacing_mm() == DataConfig(spacing=[3, 1, 1]).spacing_mm() == (3, 1, 1)
    )
    assert DataConfig(spacing="[3, 1, 1]").spacing_mm() == (3, 1, 1) and DataConfig().spacing_mm() is None


def test_every_field_is_in_the_caches_key_or_changes_no_voxel():
    """A new field of section `data` fails here until somebody says which of the two it is: the key is made
    of VoxelSettings, and each field that changes voxels changes the key.
    """
    changes = {
        "modality": "ct", "window": "lung", "hu_range": (-500.0, 500.0), "percentiles": (1.0, 99.0),
        "percentiles_of": "all", "voxel_scale": (2.0,), "spacing": "1,1,1", "resize": (4, 4, 4),
        "scale": 0.5, "four_d": "channels", "nan": "zero", "channel_axis": 1, "select_channel": 1,
        "surface": "auto", "band": 3.0, "smooth": 0.0, "metric": "mm",
    }
    # These say more of a surface, and nothing without one.
    beside = {"band": {"surface": "auto"}, "smooth": {"surface": "auto"},
              "metric": {"surface": "auto"}}
    fields = {field.name for field in dataclasses.fields(DataConfig)}
    assert not changes.keys() & set(NOT_OF_VOXELS) and fields == changes.keys() | set(NOT_OF_VOXELS)
    stamps = [("scan.nii", 1, 2)]
    keys = {key_of(stamps, DataConfig().voxel_settings()), key_of(stamps, DataConfig().voxel_settings("mr"))}
    for name, value in changes.items():
        keys.add(key_of(stamps, DataConfig(**beside.get(name, {}) | {name: value}).voxel_settings()))
    keys.add(key_of([("scan.nii", 1, 3)], DataConfig().voxel_settings()))
    keys.add(key_of([*stamps, ("label.nii", 1, 2)], DataConfig().voxel_settings()))
    assert len(keys) == len(changes) + 4


def test_a_config_that_is_open_does_not_change():
    cfg = DataConfig(spacing=[3, 1, 1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        cfg.spacing = "original"
    with pytest.raises(ValueError, match="data.scale is 3"):     # and a changed copy is checked
        dataclasses.replace(cfg, scale=3)


def test_a_setting_that_comes_in_later_leaves_old_caches_as_they_are():
    """It counts where it is set."""
    stamps, settings = [[("/scan.nii.gz", 1, 2)]], DataConfig().voxel_settings()
    later = dataclasses.make_dataclass("Later", [("gamma", float, 1.0)], bases=(VoxelSettings,), frozen=True)
    values = dataclasses.astuple(settings)
    assert key_of(stamps, later(*values)) == key_of(stamps, settings) != key_of(stamps, later(*values, 2.0))
