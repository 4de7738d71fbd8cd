"""volumes/synthetic.py: volumes of a seed, and their labels."""
import numpy as np
import pytest

from data import Crops, open_data
from volume_files import quiet
from volumes.config import DataConfig


@pytest.mark.parametrize(("kind", "channels", "background"), [("ct", 1, -1), ("radar", 4, 0)])
def test_synthetic_volumes(kind, channels, background):
    cfg = DataConfig(synthetic=kind, synthetic_count=3, synthetic_size=(24, 48, 40))
    first, again, other = (open_data(cfg, seed, quiet) for seed in (0, 0, 1))
    assert (first.channels, first.background, len(first.train), len(first.val)) == (
        channels,
        background,
        2,
        1,
    )
    assert first.patch == (16, 48, 40)
    images = [entry.read() for entry in first.train + first.val]
    assert all(np.array_equal(image, entry.read()) for image, entry in zip(images, again.train + again.val))
    assert not any(
        np.array_equal(image, entry.read()) for image in images for entry in other.train + other.val
    )
    for image in images:
        assert (
            image.shape == (channels, 24, 48, 40)
            and np.isfinite(image).all()
            and -1 <= image.min()
            and image.max() <= 1
        )
        if kind == "radar":
            assert 0.005 < (image[0] != 0).mean() < 0.1 and not image[:, image[0] == 0].any()
        else:  # air, lung or fat, tissue, bone
            assert all(
                ((image > low) & (image < high)).mean() > 0.003
                for low, high in ((-1, -0.9), (-0.9, -0.5), (0, 0.15), (0.35, 1))
            )
    resized = open_data(
        DataConfig(synthetic=kind, synthetic_count=2, synthetic_size=(16, 16, 16), resize=(8, 9, 10)),
        0,
        quiet,
    )
    assert resized.train[0].shape == (channels, 8, 9, 10)


def test_synthetic_volumes_have_labels():
    for kind, classes in (("ct", 4), ("radar", 3)):
        fields = {"synthetic": kind, "synthetic_count": 3, "synthetic_size": (24, 48, 40)}
        plain, opened = (
            open_data(DataConfig(**fields, labels=on, foreground=0.5 * on), 0, quiet) for on in (False, True)
        )
        assert (plain.classes, opened.classes) == (0, classes)
        for a, b in zip(plain.train + plain.val, opened.train + opened.val):
            image, label = b.read(), b.read_label()
            assert np.array_equal(a.read(), image) and set(np.unique(label)) == set(range(classes))
            if kind == "ct":                                   # the means are those of what the labels name
                means = [float(image[0][label == c].mean()) for c in range(4)]
                assert (
                    means[0] < -0.9
                    and -0.1 < means[1] < 0.15
                    and -0.95 < means[2] < -0.5
                    and 0.25 < means[3] < 0.9
                ), means
            else:
                assert np.array_equal(label > 0, image[0] > 0)
        image, label, _ = Crops(opened, 0)[0]
        assert label.shape == opened.patch == image.shape[1:]
    small = open_data(
        DataConfig(synthetic_count=2, synthetic_size=(16, 16, 16), resize=(8, 9, 10), labels=True), 0, quiet
    )
    assert small.train[0].read_label().shape == (8, 9, 10)
