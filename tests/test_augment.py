"""augment.py: each change by hand; crops that are functions of (seed, index), with their labels."""
import math

import numpy as np
import pytest
import torch

import augment
from augment import Strengths, change_intensities
from data import Crops
from pieces import run_alone
from runs import load_config
from test_imports import ROOT
from volume_files import matches, pair_like, said_and_data, save
from volumes.config import DataConfig

ALL = {"gamma": (0.5, 2.0), "bias_field": 0.3, "blur": 1.0, "low_resolution": 2.0, "noise": 0.1,
       "augment_share": 0.5}


def test_turns_by_hand():
    """A quarter turn in the plane of H and W takes the first row, from left to right, to the first column,
    from the bottom up."""
    x = torch.tensor([[[[1, 2, 3], [4, 5, 6]]]])                 # (C, D, H, W) = (1, 1, 2, 3)
    assert augment.turn(x, (1, 2), 1).tolist() == [[[[3, 6], [2, 5], [1, 4]]]]
    assert augment.turn(x, (1, 2), 2).tolist() == [[[[6, 5, 4], [3, 2, 1]]]]
    assert augment.size_before((4, 2, 3), (1, 2), 1) == (4, 3, 2)
    assert augment.size_before((4, 2, 3), (0, 2), 2) == (4, 2, 3)
    # the draws: plane, then quarters; a picture turns in its own plane alone
    assert augment.choose_turn("HW", (4, 8, 8), 0.9, 0.99) == ((1, 2), 3)
    assert augment.choose_turn("DHW", (4, 8, 8), 0.0, 0.5) == ((0, 1), 2)
    assert augment.choose_turn("DHW", (1, 8, 8), 0.0, 0.3) == ((1, 2), 1)
    assert augment.choose_turn("none", (4, 8, 8), 0.9, 0.99)[1] == 0


def test_gamma_by_hand():
    x = torch.tensor([-1.0, -0.5, 0.0, 1.0, 3.0])
    # (x + 1) / 2 = 0, 1/4, 1/2, 1, 2; squared 0, 1/16, 1/4, 1, 4
    assert torch.allclose(augment.apply_gamma(x, 2.0, -1.0), torch.tensor([-1, -0.875, -0.5, 1, 7.0]))
    signed = torch.tensor([-1.0, -0.5, 0.0, 0.5])
    assert torch.allclose(augment.apply_gamma(signed, 2.0, 0.0), torch.tensor([-1, -0.25, 0, 0.25]))


def test_bias_field_by_hand():
    """exp of one Legendre polynomial: P_1 = t, P_2 = (3 t^2 - 1) / 2, P_3 = (5 t^3 - 3 t) / 2."""
    degrees = augment.field_degrees()
    assert len(degrees) == 19 and (0, 0, 0) not in degrees
    for term, along_w in (((0, 0, 1), [-1, 0, 1]), ((0, 0, 2), [1, -0.5, 1]), ((0, 0, 3), [-1, 0, 1])):
        coefficients = torch.tensor([0.5 * (degree == term) for degree in degrees])
        field = augment.bias_field((2, 2, 3), coefficients)
        assert torch.allclose(field.log() * 2, torch.tensor(along_w).float().expand(2, 2, 3), atol=1e-6)
    mixed = torch.tensor([1.0 * (degree == (1, 1, 0)) for degree in degrees])
    crossed = augment.bias_field((2, 2, 1), mixed).log()[..., 0]
    assert torch.allclose(crossed, torch.tensor([[1.0, -1], [-1, 1]]))


def test_blur_and_coarser_voxels_by_hand():
    x = torch.zeros(1, 1, 1, 21)
    x[..., 10] = 1.0
    weights = torch.tensor([math.exp(-n * n / (2 * 1.2**2)) for n in range(-4, 5)])
    assert torch.allclose(augment.blurred(x, 1.2)[0, 0, 0, 6:15], weights / weights.sum(), atol=1e-6)
    flat = torch.full((2, 5, 6, 7), 0.3)                         # what is flat stays so, up to the border
    assert torch.allclose(augment.blurred(flat, 2.0), flat)
    assert torch.allclose(augment.coarser(flat, 1.7), flat)
    # pairs 1 3, 5 7 have the means 2, 6; between their centres a quarter and three quarters of the way
    steps = torch.tensor([1.0, 3, 5, 7]).view(1, 1, 1, 4)
    assert torch.allclose(augment.coarser(steps, 2.0)[0, 0, 0], torch.tensor([2.0, 3, 5, 6]))


def test_noise_leaves_padding_and_changes_do_not_move_one_another():
    x = torch.rand(1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    x[:, :4] = -1
    noisy = change_intensities(x, Strengths(noise=0.1), 7)
    assert torch.equal(noisy[:, :4], x[:, :4]) and 0 < (noisy - x)[:, 4:].std() < 0.1
    # gamma and a bias field keep the background too; with gamma on, the noise is the same
    kept = change_intensities(x, Strengths(gamma=(0.5, 2.0), bias_field=0.3), 7)
    assert torch.equal(kept[:, :4], x[:, :4]) and not torch.allclose(kept[:, 4:], x[:, 4:])
    bent = change_intensities(x, Strengths(gamma=(0.5, 2.0)), 7)
    both = change_intensities(x, Strengths(gamma=(0.5, 2.0), noise=0.1), 7)
    assert torch.allclose(both - bent, noisy - x, atol=1e-6)
    off = Strengths()
    assert not off.is_on and torch.equal(change_intensities(x, off, 7), x)
    changed = [not torch.equal(change_intensities(x, Strengths(noise=0.1, augment_share=0.3), s), x)
               for s in range(300)]
    assert 60 < sum(changed) < 120                               # 90 expected, 8 the standard deviation


@pytest.fixture
def folder(tmp_path):
    for number, shape in enumerate(((13, 14, 15), (20, 9, 12), (16, 16, 16))):
        image, label = pair_like(shape, number)
        save(tmp_path / "in" / f"{number}_image.nii.gz", image)
        save(tmp_path / "in" / f"{number}_label.nii.gz", label)
    return tmp_path / "in"


@pytest.mark.parametrize("fields", [{"turn": "HW"}, {"turn": "DHW", "flip": "DHW", "foreground": 0.5},
                                    {"turn": "DHW", "patch": (14, 6, 20)},
                                    {"turn": "HW", "spacing": "random", "zoom": (1.0, 1.0)}], ids=str)
def test_labels_follow_turns_exactly(fields, folder, tmp_path):
    """Images that equal their labels still do, in crops of three unequal edges, beyond the border too."""
    _, opened = said_and_data(folder, tmp_path, **fields)
    _, plain = said_and_data(folder, tmp_path, **(fields | {"turn": "none"}))
    turned = 0
    for i in range(20):
        image, label, number = Crops(opened, 0)[i]
        assert image.shape[1:] == label.shape == opened.patch and matches(image, label), f"item {i}"
        turned += not torch.equal(label, Crops(plain, 0)[i][1])
    assert 5 < turned < 20                                       # 3 of 4 draws turn


def test_intensities_leave_labels_alone(folder, tmp_path):
    _, plain = said_and_data(folder, tmp_path)
    _, opened = said_and_data(folder, tmp_path, **ALL)
    pairs = [(Crops(plain, 0)[i], Crops(opened, 0)[i]) for i in range(20)]
    assert all(torch.equal(a[1], b[1]) for a, b in pairs)
    assert sum(not torch.equal(a[0], b[0]) for a, b in pairs) > 10


def test_a_crop_is_a_function_of_seed_and_place(folder, tmp_path):
    """Item i is step x global batch + place: the same whichever rank asks, in whatever order, after a resume,
    and another for another seed."""
    _, opened = said_and_data(folder, tmp_path, **ALL, turn="DHW", flip="DHW")
    first = [Crops(opened, 3)[i] for i in range(24)]
    resumed, ranks = Crops(opened, 3), [Crops(opened, 3) for _ in range(2)]
    for i in (17, 4, 23, 0, 18):
        for again in (resumed[i], ranks[i % 2][i]):
            assert all(torch.equal(a, b) for a, b in zip(first[i][:2], again[:2]))
    other = [Crops(opened, 4)[i] for i in range(24)]
    assert not any(torch.equal(a[0], b[0]) for a, b in zip(first, other))


def test_a_ct_stays_within_its_range(tmp_path):
    hu = np.random.default_rng(0).integers(-1000, 1000, (12, 12, 12)).astype(np.int16)
    for name, fields in (("a", {"modality": "ct"}), ("b", {"modality": "mr"})):
        save(tmp_path / name / "x.nii.gz", hu + 1000 * (name == "b"))
        _, opened = said_and_data(tmp_path / name, tmp_path, labels=False, **ALL | fields | {"noise": 0.5})
        crops = torch.stack([Crops(opened, 0)[i][0] for i in range(12)])
        assert crops.min() == -1 and (crops.max() == 1 if name == "a" else crops.max() > 1.1)


@pytest.mark.parametrize("fields, says", [
    ({"turn": "X"}, "data.turn"), ({"turn": "H"}, "data.turn"), ({"gamma": (0, 1)}, "data.gamma"),
    ({"gamma": (2, 1)}, "data.gamma"), ({"noise": -1}, "data.noise"), ({"blur": math.nan}, "data.blur"),
    ({"low_resolution": 0.5}, "data.low_resolution"), ({"bias_field": math.inf}, "data.bias_field"),
    ({"augment_share": 1.1}, "data.augment_share")], ids=str)
def test_what_cannot_be_meant_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        DataConfig(**fields)


def test_configs_change_what_maisi_changes():
    """Its random_aug turns and flips both, and bends intensities of MR alone. Organs with sides are not
    mirrored here.
    """
    for name, flip, bends in (("ct_vae", "DHW", False), ("seg_ct", "none", False), ("mr_vae", "DHW", True)):
        cfg = load_config(["--config", str(ROOT / "config" / f"{name}.yaml")]).data
        assert cfg.turn == "HW" and cfg.flip == flip and Strengths.of(cfg).is_on == bends


def test_works_copied_alone(tmp_path):
    said = run_alone(tmp_path, ["augment.py"], """
import torch, augment
x = augment.turn(torch.zeros(1, 2, 3, 4), (1, 2), 1)
print(tuple(augment.change_intensities(x, augment.Strengths(noise=1.0), 0).shape))""")
    assert said.strip() == "(1, 2, 4, 3)"
