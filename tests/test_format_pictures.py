"""volumes/format_pictures.py: pictures and masks are read as they are, and train."""
import sys

import numpy as np
import pytest

from data import Crops, open_data, read_volume
from volume_files import config, ct_like, one_line, pair_like, quiet, said_and_data, save
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.find import Item
from volumes.formats import read_source
from volumes.intensities import denormalise
from volumes.loading import load
from volumes.volume import Request


@pytest.fixture
def pictures(tmp_path):
    """imgs/ and masks/ as the common 2D set-up has them: JPEG-like colour images, masks of 0 and 255."""
    image_module = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for folder in ("imgs", "masks"):
        (tmp_path / "in" / folder).mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((30 + number, 40), np.uint8)
        mask[5:20, 8:30] = 255
        colour = np.stack([mask, mask // 2, rng.integers(0, 256, mask.shape).astype(np.uint8)], -1)
        image_module.fromarray(colour).save(tmp_path / "in" / "imgs" / f"p{number}.png")
        picture = image_module.fromarray(mask)
        if number == 1:                                        # palette values, an ending of its own
            picture = image_module.fromarray((mask > 0).astype(np.uint8) * 255).convert("P", palette=0)
        picture.save(tmp_path / "in" / "masks" / f"p{number}{'_mask.gif' if number == 2 else '.png'}")
    return tmp_path / "in"


def test_pictures_are_read_as_they_are(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    grey, colour = (
        rng.integers(0, 256, (5, 7)).astype(np.uint8),
        rng.integers(0, 256, (5, 7, 3)).astype(np.uint8),
    )
    deep = rng.integers(0, 65536, (5, 7)).astype(np.uint16)
    alpha = np.concatenate([colour, colour[..., :1]], -1)
    for name, array, expected in (
        ("g.png", grey, grey[None]),
        ("c.png", colour, colour.transpose(2, 0, 1)),
        ("d.png", deep, deep[None]),
        ("c.bmp", colour, colour.transpose(2, 0, 1)),
        ("c.tif", colour, colour.transpose(2, 0, 1)),
        ("a.png", alpha, colour.transpose(2, 0, 1)),
        ("b.png", grey > 99, (grey > 99)[None] * 255),
    ):
        image.fromarray(array).save(tmp_path / name)
        volume = read_volume(tmp_path / name)
        assert volume.array.dtype == np.float32 and np.array_equal(volume.array[:, 0], expected), name
        assert volume.spacing == (1, 1, 1) and np.array_equal(volume.affine, np.eye(4))
        item = load(Item(tmp_path / name), DataConfig())
        top = 65535 if name == "d.png" else 255
        normal, intensity = item.volumes[0]
        np.testing.assert_allclose(normal[:, 0], expected / top * 2 - 1, atol=1e-6)
        assert (intensity.modality, intensity.background, item.guessed) == ("picture", -1, False)
        np.testing.assert_allclose(denormalise(normal, intensity), volume.array, atol=0.01)
    smooth = np.broadcast_to(np.arange(0, 160, 5, dtype=np.uint8)[:, None, None], (32, 24, 3)).copy()
    image.fromarray(smooth).save(tmp_path / "c.jpg", quality=95)
    assert abs(read_volume(tmp_path / "c.jpg").array[:, 0] - smooth.transpose(2, 0, 1)).max() < 4
    (tmp_path / "broken.png").write_bytes((tmp_path / "c.png").read_bytes()[:60])
    (tmp_path / "text.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    image.fromarray(grey).save(tmp_path / "two.tif", save_all=True, append_images=[image.fromarray(grey)])
    image.fromarray(grey.astype(np.float32)).save(tmp_path / "f.tif")
    for name, word in (
        ("broken.png", "cannot be read"),
        ("text.png", "cannot be read"),
        ("two.tif", "2 frames"),
        ("f.tif", "floating"),
    ):
        with pytest.raises(DataError) as error:
            read_volume(tmp_path / name)
        one_line(error, name, word)
    with pytest.raises(DataError, match="data.max_gib"):
        read_volume(tmp_path / "c.png", max_gib=1e-7)


def test_picture_pairs_train(pictures, tmp_path):
    said, opened = said_and_data(pictures, tmp_path, modality="auto", patch=None, foreground=0.5)
    assert len(opened.train) + len(opened.val) == 4 and (
        opened.channels,
        opened.classes,
        opened.background,
    ) == (3, 2, -1)
    assert opened.label_values == (0, 255) and any("values 0,255" in line for line in said), said
    assert opened.patch == (1, 28, 40), "as large as the pictures, in multiples of 4"
    for entry in opened.train + opened.val:
        image, label = entry.read(), entry.read_label()
        assert image.shape[1] == 1 and np.array_equal(label, (image[0] > 0).astype(np.int64)), entry.name
    image, label, _ = Crops(opened, 0)[0]
    assert (
        image.shape == (3, *opened.patch)
        and label.shape == opened.patch
        and set(label.unique().tolist()) <= {0, 1}
    )
    _, again = said_and_data(pictures, tmp_path, modality="auto", label_values=opened.label_values)
    assert again.classes == 2 and np.array_equal(again.train[0].read_label(), opened.train[0].read_label())
    _, only = said_and_data(pictures, tmp_path, modality="auto", labels=False)
    assert {entry.name for entry in only.train + only.val} == {f"imgs/p{n}" for n in range(4)}, (
        "masks do not train a VAE"
    )
    zoomed = said_and_data(
        pictures, tmp_path, modality="auto", patch=(1, 12, 12), spacing="random", zoom=(0.4, 0.5)
    )[1]
    for i in range(4):
        image, label, _ = Crops(zoomed, 0)[i]
        sure = image[0].abs() > 0.99
        assert ((image[0] > 0).long() == label)[sure].all() and sure.float().mean() > 0.5


def test_palette_masks(tmp_path):
    image = pytest.importorskip("PIL.Image")
    index = np.array([[0, 7], [7, 0]], np.uint8)
    for name, palette, expected in (
        ("voc.png", [0, 0, 0, 128, 0, 0, *[0, 128, 0] * 5, 128, 128, 128], (0, 7)),  # class 7 of VOC is grey
        ("grey.png", [v for n in range(8) for v in (36 * n,) * 3], (0, 7)),
        ("black.png", [0] * 24, (0, 7)),
    ):
        picture = image.fromarray(index)
        picture.putpalette(palette)
        picture.save(tmp_path / name)
        found = read_source(tmp_path / name, Request(max_gib=1.0, label=True)).volume.array
        assert found.shape == (1, 1, 2, 2) and tuple(np.unique(found)) == expected, name
        assert len(read_volume(tmp_path / name).array) == 3, "as an image it is its colours"


def test_scale_shrinks_image_and_label(pictures, tmp_path):
    _, opened = said_and_data(pictures, tmp_path, modality="auto", scale=0.5, patch=(1, 8, 8))
    for entry in opened.train + opened.val:
        assert entry.shape[1:] == entry.read_label().shape and entry.shape[1] == 1 and entry.shape[3] == 20
        assert entry.shape[2] in (15, 16) and set(np.unique(entry.read_label())) == {0, 1}
        np.testing.assert_allclose(entry.spacing[2], 2)
    save(tmp_path / "vol" / "v.nii.gz", ct_like((20, 24, 12)), np.diag([1, 1, 3, 1.0]))
    half = open_data(config(tmp_path / "vol", tmp_path, scale=0.25), 0, quiet).train[0]
    assert half.shape == (1, 12, 6, 5) and half.spacing == (3, 4, 4)
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5), 0, quiet).train[0].shape == (
        1,
        12,
        12,
        10,
    )
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5, spacing="1,1,1"), 0, quiet).train[
        0
    ].shape == (1, 36, 12, 10)
    assert open_data(config(tmp_path / "vol", tmp_path, scale=0.5, resize=(5, 6, 7)), 0, quiet).train[
        0
    ].shape == (1, 5, 6, 7)


def test_masks_that_are_no_masks(pictures, tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    image.fromarray(rng.integers(0, 256, (30, 40, 3)).astype(np.uint8)).save(pictures / "masks" / "p0.png")
    said, opened = said_and_data(pictures, tmp_path, modality="auto")
    assert len(opened.train) + len(opened.val) == 3 and any(
        "p0.png" in line and "colour picture as label" in line for line in said
    )
    noise = rng.integers(0, 256, (30, 40, 1)).astype(np.uint8)  # grey, stored as colours
    image.fromarray(np.repeat(noise, 3, -1)).save(pictures / "masks" / "p0.png")
    with pytest.raises(DataError) as error:
        said_and_data(pictures, tmp_path, modality="auto")
    one_line(error, "different values", "PNG")
    image.fromarray(np.zeros((30, 40), np.uint8) + np.arange(40, dtype=np.uint8) % 3).save(
        pictures / "masks" / "p0.png"
    )
    said, opened = said_and_data(pictures, tmp_path, modality="auto")
    assert opened.label_values == (0, 1, 2, 255) and opened.classes == 4
    said, opened = said_and_data(pictures, tmp_path, modality="auto", ignore_label=255)
    assert opened.label_values is None and opened.classes == 3, (
        "0, 1, 2 and what is ignored are classes as they are"
    )
    with pytest.raises(DataError) as error:
        said_and_data(pictures, tmp_path, modality="auto", classes=3)
    one_line(error, "data.classes=3")


def test_pictures_among_volumes_are_no_data(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number in range(2):
        save(tmp_path / "in" / f"v{number}_image.nii.gz", *pair_like((9, 9, 9))[:1])
        save(tmp_path / "in" / f"v{number}_label.nii.gz", pair_like((9, 9, 9))[1])
    (tmp_path / "in" / "samples").mkdir()
    for name in ("samples/step_1.png", "page.jpg"):
        image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "in" / name)
    for labels in (False, True):
        said, opened = said_and_data(tmp_path / "in", tmp_path, labels=labels)
        assert {entry.name for entry in opened.train + opened.val} == {"v0_image", "v1_image"}
        assert sum("left out 2 pictures (page.jpg, step_1.png)" in line for line in said) == 1 and not any(
            "refused" in x for x in said
        )


def test_without_pillow_the_error_names_it(pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)              # import fails
    for call in (lambda: read_volume(pictures / "imgs" / "p0.png"), lambda: said_and_data(pictures, tmp_path),
                 lambda: said_and_data(pictures / "imgs", tmp_path, labels=False)):
        with pytest.raises(DataError) as error:
            call()
        one_line(error, "p0.png", "python -m pip install pillow")
