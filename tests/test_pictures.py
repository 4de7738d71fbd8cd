"""pictures.py: slices are square in mm and the right way up, PNG files hold what was drawn."""
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch

import pictures

ROOT = Path(__file__).parents[1]


def test_png_is_what_was_drawn():
    image = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    raw = pictures.png(image)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", raw[16:24]) == (7, 5)
    start = raw.index(b"IDAT")
    length = struct.unpack(">I", raw[start - 4:start])[0]
    lines = zlib.decompress(raw[start + 4:start + 4 + length])
    assert lines == b"".join(b"\0" + row.numpy().tobytes() for row in image)
    assert struct.unpack(">I", raw[start + 4 + length:start + 8 + length])[0] == zlib.crc32(raw[start:start + 4 + length])


def test_comparison_shows_input_reconstruction_and_error_in_square_millimetres():
    image = torch.full((1, 4, 8, 8), -1.0)
    image[0, 2, 1, 6] = 1.0
    picture = pictures.comparison(image, image.clone(), (4.0, 1.0, 1.0), -1.0)
    height, width, _ = picture.shape
    assert (height, width) == (3 * 260, 3 * 260)                 # axial 8 x 8 mm at 32 pixels a mm, the others 16 x 8 mm at 16
    assert picture[:260, :260].max() == 255 and picture[2:258, 522:778].max() == 0


def test_the_error_runs_from_black_over_red_to_yellow():
    assert pictures.error(torch.tensor([0.0, 0.25, 0.5, 2.0]), torch.zeros(4)).tolist() == [
        [0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 0]]
    assert pictures.grey(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist() == [[0] * 3, [0] * 3, [127.5] * 3, [255] * 3]


def test_slices_look_from_above_from_the_front_and_from_the_side():
    """One bright voxel high up, at the back, on the patient's right (RAS: low index along W): of each axis its slice is shown."""
    volume, spacing = torch.full((4, 6, 8), -1.0), (3.0, 1.0, 1.0)
    volume[3, 1, 2] = 1.0                                        # high, low along D,H,W = head, back, right
    axial, coronal, sagittal = pictures.slices([volume], volume + 1, spacing, pictures.grey)
    assert [image.shape for image in (axial, coronal, sagittal)] == [(6 * 32, 8 * 32, 3), (12 * 21, 8 * 21, 3), (12 * 21, 6 * 21, 3)]
    for image, row, column in ((axial, 4 / 6, 5 / 8), (coronal, 0, 5 / 8), (sagittal, 0, 4 / 6)):
        lit = image[..., 0].nonzero().double()                   # head and front up; right on the left, so low W on the right
        assert lit.min(0).values.tolist() == pytest.approx([row * image.shape[0], column * image.shape[1]])


@pytest.mark.parametrize("spacing", [(1e-6, 1.0, 1e6), (1e3, 1e-3, 1.0), (0.1, 0.1, 100.0)])
def test_a_spacing_that_cannot_be_meant_makes_no_giant_picture(spacing):
    volume = torch.zeros(4, 6, 8)
    for image in pictures.slices([volume], volume, spacing, pictures.grey):
        assert 200 <= max(image.shape[:2]) <= pictures.LARGEST and min(image.shape) >= 1


def test_a_flat_volume_is_one_picture_and_a_picture_is_not_turned():
    plane = torch.zeros(1, 5, 7)
    plane[0, 0, 0] = 1.0
    for shape in ((1, 5, 7), (5, 1, 7), (5, 7, 1)):
        [image] = pictures.slices([plane.reshape(shape)], plane.reshape(shape), (1.0, 1.0, 1.0), pictures.grey, is_picture=True)
        assert image[0, 0, 0] == 255 and image[-1, -1, 0] == 127.5 and image.shape == (5 * 36, 7 * 36, 3)
    assert len(pictures.slices([torch.zeros(1, 1, 1)], torch.zeros(1, 1, 1), (1.0, 1.0, 1.0), pictures.grey)) == 3


def test_labels_are_coloured_apart_and_the_background_stays_grey():
    label = torch.arange(8).reshape(1, 2, 4)
    image = pictures.coloured(torch.zeros(1, 2, 4), label).reshape(8, 3)
    assert image[0].tolist() == [127.5] * 3
    assert torch.cdist(image, image).add(torch.eye(8) * 1e3).min() > 20, image
    sheet = pictures.label_comparison(torch.zeros(1, 2, 8, 8), [torch.ones(2, 8, 8), torch.zeros(2, 8, 8)], (1.0, 1.0, 1.0))
    assert sheet.dtype == torch.uint8 and sheet.shape[1] == 3 * 260
    assert not (sheet[:260, 260:520] == sheet[:260, :260]).all() and (sheet[:260, 520:] == sheet[:260, :260]).all()


def test_it_works_alone(tmp_path):
    shutil.copy(ROOT / "pictures.py", tmp_path)
    code = "import sys; sys.path.insert(0, '.'); import torch, pictures; x = torch.zeros(1, 4, 4, 4); " \
           "open('a.png', 'wb').write(pictures.png(pictures.comparison(x, x, (1, 1, 1), -1.0)))"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "a.png").stat().st_size > 100
