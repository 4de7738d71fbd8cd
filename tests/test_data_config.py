"""volumes/config.py: fields that are wrong, and which of them change voxels."""
import pytest

from volumes.config import DataConfig


@pytest.mark.parametrize("fields", [{"patch": (0, 8, 8)}, {"patch": (8, 8)}, {"synthetic": "pet"}, {"window": "liver"}, {"modality": "x"},
                                    {"val_fraction": 1.0}, {"spacing": "1,2"}, {"spacing": "fine"}, {"spacing": "1,0,1"}, {"flip": "X"},
                                    {"jitter": -0.1}, {"hu_range": (5, 5)}, {"zoom": (2, 1)}, {"nan": "ignore"}, {"four_d": "time"},
                                    {"crops_per_volume": 0}, {"workers": -1}, {"voxel_scale": (0.0,)}, {"max_gib": 0},
                                    {"resize": (1, 2, 0)}, {"foreground": 1.5}, {"scale": 0.0}, {"scale": 2.0},
                                    {"classes": 1}, {"label_values": (0, 0)}, {"label_values": (0, -4)}, {"ignore_label": 10**6},
                                    {"label_values": (0, 1), "classes": 3}])
def test_config_names_the_field_that_is_wrong(fields):
    with pytest.raises(ValueError, match=f"data.{next(iter(fields))} is .*; "):
        DataConfig(**fields)


def test_spacing_forms():
    assert DataConfig(spacing="3, 1,1").spacing_mm() == DataConfig(spacing=[3, 1, 1]).spacing_mm() == (3, 1, 1)
    assert DataConfig(spacing="[3, 1, 1]").spacing_mm() == (3, 1, 1) and DataConfig().spacing_mm() is None
