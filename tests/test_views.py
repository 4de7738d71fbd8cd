"""training/views.py: windows in HU, the words beside pictures, and pictures that come back from a sheet."""
import pytest
import torch

from training import views
from volumes.intensities import Intensity

CT = Intensity("ct", (-1000.0,), (1000.0,))


def test_the_window_of_a_ct_is_soft_tissue_unless_the_run_has_one():
    name, limits = views.window_limits("auto", "none", CT)
    assert name == "soft_tissue" and limits == (-150.0, 250.0)   # width 400, level 50
    assert views.window_limits("auto", "lung", CT) is None and views.window_limits("none", "none", CT) is None
    assert views.window_limits("auto", "none", Intensity("mr", (0.0,), (9.0,))) is None
    hu = torch.tensor([-1000.0, -150.0, 50.0, 250.0])
    shown = views.windowed(hu / 1000, CT, limits)
    assert shown.tolist() == pytest.approx([-5.25, -1.0, 0.0, 1.0])


def test_the_error_of_100_hu_is_yellow_in_soft_tissue_and_the_words_say_so():
    image = torch.zeros(1, 4, 6, 8)
    shown = views.of_reconstruction(image, image + 0.1, (1.0, 1.0, 1.0), CT,
                                    views.window_limits("auto", "none", CT))
    assert shown.columns["Error"][0][0, 0].tolist() == pytest.approx([255, 255, 0], abs=0.1)
    assert shown.error == ("0", "100 HU and more") and "-150 to 250 HU (soft tissue)" in shown.words[0]
    assert shown.rows == ["axial", "coronal", "sagittal"]


def test_all_channels_are_shown_and_a_sheet_gives_the_views_back():
    radar = Intensity("voxel", (-1.0, -2.0), (1.0, 2.0))
    image = torch.zeros(2, 4, 6, 8)
    image[1, 3, 1, 2] = 1.0
    shown = views.of_reconstruction(image, torch.zeros_like(image), (1.0, 1.0, 1.0), radar)
    assert shown.rows == ["bird's-eye, channel 0", "front, channel 0", "bird's-eye, channel 1",
                          "front, channel 1"]
    assert list(shown.columns) == ["Input", "Reconstruction", "Error", "Occupied"]
    assert [name for name, _ in shown.legend] == ["in both", "missed", "added"]
    again = views.from_sheet(shown.sheet(), shown.note())
    assert again.rows == shown.rows and again.words == shown.words and again.legend == shown.legend
    for name, images in shown.columns.items():
        for a, b in zip(images, again.columns[name], strict=True):
            assert torch.equal(a.round().to(torch.uint8), b)
    red = again.columns["Occupied"][2].reshape(-1, 3).unique(dim=0).tolist()
    assert red == [[0, 0, 0], [230, 70, 60]]                     # the one voxel was missed
