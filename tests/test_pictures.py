"""pictures.py: slices are square in mm and the right way up, PNG and SVG files hold what was drawn."""
import struct
import zlib
from xml.etree import ElementTree

import pytest
import torch

import pictures
from pieces import run_alone
from training import views
from volumes.intensities import Intensity


def test_png_is_what_was_drawn():
    image = torch.randint(0, 256, (5, 7, 3), dtype=torch.uint8)
    raw = pictures.png(image)
    assert raw[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", raw[16:24]) == (7, 5)
    start = raw.index(b"IDAT")
    length = struct.unpack(">I", raw[start - 4:start])[0]
    lines = zlib.decompress(raw[start + 4:start + 4 + length])
    assert lines == b"".join(b"\0" + row.numpy().tobytes() for row in image)
    assert struct.unpack(">I", raw[start + 4 + length : start + 8 + length])[0] == zlib.crc32(
        raw[start : start + 4 + length]
    )


def test_comparison_shows_input_reconstruction_and_error_in_square_millimetres():
    image = torch.full((1, 4, 8, 8), -1.0)
    image[0, 2, 1, 6] = 1.0
    weight, spacing = image[0] + 1, (4.0, 1.0, 1.0)
    columns = [pictures.slices([image[0]], weight, spacing, pictures.grey)] * 2
    columns.append(pictures.slices([image[0], image[0]], weight, spacing, pictures.error))
    picture = pictures.sheet(columns)
    height, width, _ = picture.shape
    # axial 8 x 8 mm at 32 pixels a mm, the others 16 x 8 mm at 16
    assert (height, width) == (3 * 260, 3 * 260)
    assert picture[:260, :260].max() == 255 and picture[2:258, 522:778].max() == 0


def test_the_error_runs_from_black_over_red_to_yellow():
    assert pictures.error(torch.tensor([0.0, 0.25, 0.5, 2.0]), torch.zeros(4)).tolist() == [
        [0, 0, 0], [255, 0, 0], [255, 255, 0], [255, 255, 0]]
    assert pictures.grey(torch.tensor([-2.0, -1.0, 0.0, 1.0])).tolist() == [
        [0] * 3,
        [0] * 3,
        [127.5] * 3,
        [255] * 3,
    ]


def test_slices_look_from_above_from_the_front_and_from_the_side():
    """One bright voxel high up, at the back, on the patient's right (RAS: low index along W): of each
    axis its slice is shown."""
    volume, spacing = torch.full((4, 6, 8), -1.0), (3.0, 1.0, 1.0)
    volume[3, 1, 2] = 1.0                                        # high, low along D,H,W = head, back, right
    axial, coronal, sagittal = pictures.slices([volume], volume + 1, spacing, pictures.grey)
    assert [image.shape for image in (axial, coronal, sagittal)] == [
        (6 * 32, 8 * 32, 3),
        (12 * 21, 8 * 21, 3),
        (12 * 21, 6 * 21, 3),
    ]
    for image, row, column in ((axial, 4 / 6, 5 / 8), (coronal, 0, 5 / 8), (sagittal, 0, 4 / 6)):
        lit = image[..., 0].nonzero().double()  # head and front up; right on the left, so low W on the right
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
        [image] = pictures.slices(
            [plane.reshape(shape)], plane.reshape(shape), (1.0, 1.0, 1.0), pictures.grey, is_picture=True
        )
        assert image[0, 0, 0] == 255 and image[-1, -1, 0] == 127.5 and image.shape == (5 * 36, 7 * 36, 3)
    assert (
        len(pictures.slices([torch.zeros(1, 1, 1)], torch.zeros(1, 1, 1), (1.0, 1.0, 1.0), pictures.grey))
        == 3
    )


def test_labels_are_coloured_apart_and_the_background_stays_grey():
    label = torch.arange(8).reshape(1, 2, 4)
    image = pictures.coloured(torch.zeros(1, 2, 4), label).reshape(8, 3)
    assert image[0].tolist() == [127.5] * 3
    assert torch.cdist(image, image).add(torch.eye(8) * 1e3).min() > 20, image
    labels = {"full": torch.ones(2, 8, 8), "empty": torch.zeros(2, 8, 8)}
    ct = Intensity("ct", (-1000.0,), (1000.0,))
    sheet = views.of_labels(torch.zeros(1, 2, 8, 8), labels, (1.0, 1.0, 1.0), ct).sheet()
    assert sheet.dtype == torch.uint8 and sheet.shape[1] == 3 * 260
    assert (
        not (sheet[:260, 260:520] == sheet[:260, :260]).all()
        and (sheet[:260, 520:] == sheet[:260, :260]).all()
    )


def test_a_sheet_is_taken_apart_again_and_a_png_keeps_its_note():
    columns = [[torch.rand(h, w, 3).mul(255).round() for h, w in ((5, 7), (3, 9))] for _ in range(2)]
    image, note = pictures.read_png(pictures.png(pictures.sheet(columns), "a note"))
    assert note == "a note"
    for column, found in zip(columns, pictures.panels(image, 2, [(5, 7), (3, 9)])):
        assert all(torch.equal(a.to(torch.uint8), b) for a, b in zip(column, found))
    for content in (b"", b"\x89PNG\r\n\x1a\n", pictures.png(image)[:60]):
        with pytest.raises(ValueError, match="not a PNG of pictures.png"):
            pictures.read_png(content)


def test_a_class_has_a_contour_and_its_inside_stays_to_be_seen():
    label = torch.zeros(5, 5)
    label[1:4, 1:4] = 1
    image = pictures.coloured(torch.zeros(5, 5), label)
    colour = pictures.class_colour(torch.tensor(1.0))
    assert torch.equal(image[1, 1], colour) and torch.equal(image[3, 2], colour)
    assert image[2, 2].tolist() == pytest.approx((0.8 * 127.5 + 0.2 * colour).tolist())
    assert image[0, 0].tolist() == [127.5] * 3


def test_projections_show_the_one_occupied_voxel_from_above_and_from_the_front():
    volume = torch.zeros(4, 6, 8)
    volume[3, 1, 2] = 1.0
    above, front = pictures.projections([volume], (1.0, 1.0, 1.0), lambda v: pictures.grey(2 * v - 1))
    assert above.shape == (6 * 32, 8 * 32, 3) and front.shape == (4 * 32, 8 * 32, 3)
    for image, row in ((above, 4), (front, 0)):                  # H 1 of 6 from below, D 3 of 4 on top
        assert image[..., 0].nonzero().min(0).values.tolist() == [row * 32, 2 * 32]
    found, true = torch.tensor([[True, True, False, False], [True, False, True, False]])
    both = pictures.occupancy(found, true)
    assert both.tolist() == [list(pictures.BOTH), list(pictures.ADDED), list(pictures.MISSED), [0, 0, 0]]


SVG = "{http://www.w3.org/2000/svg}"


def drawn(svg: str):
    """Texts, lines as (x, y) of their lower end, and bars as (x, y, width, colour), of an SVG that must
    be well-formed."""
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    texts = [(e.text, float(e.get("x")), float(e.get("y"))) for e in root.iter(f"{SVG}text")]
    lines = [float(e.get("x1")) for e in root.iter(f"{SVG}line")]
    bars = [
        tuple(float(e.get(name)) for name in ("x", "y", "width")) + (e.get("fill"),)
        for e in root.iter(f"{SVG}rect")
        if float(e.get("height")) == pictures.THICK
    ]
    assert all(0 <= x <= width and 0 <= y <= height for _, x, y in texts)
    assert all(0 <= x and x + length <= width for x, _, length, _ in bars)
    return texts, lines, bars


def test_bars_are_as_long_as_their_values_and_stand_on_a_labelled_axis():
    series = {"predicted": [10.0, 5.0, None], "measured": [9.0, None, None]}
    texts, lines, bars = drawn(
        pictures.bars(["a", "b", "c"], series, "Peaks", "GiB", missing="no prediction")
    )
    words = [word for word, _, _ in texts]
    assert words[:3] == ["Peaks", "predicted", "measured"] and words.count("no prediction") == 1
    assert {"a", "b", "c", "GiB", "10.00 GiB", "9.00 GiB", "5.00 GiB"} <= set(words)
    ticks = [(float(word), x) for word, x, _ in texts if word.isdigit()]
    assert [number for number, _ in ticks] == [0, 2, 4, 6, 8, 10] and lines == pytest.approx(
        [x for _, x in ticks]
    )
    per_unit = (lines[-1] - lines[0]) / 10
    for (x, _, length, _), value in zip(bars, (10.0, 9.0, 5.0), strict=True):
        assert x == lines[0] and length == pytest.approx(value * per_unit, abs=0.1)
    assert bars[0][3] == bars[2][3] != bars[1][3]                # a colour per series
    assert bars[0][1] < bars[1][1] < bars[2][1]                  # from the top down, none over another
    assert min(b[1] - a[1] for a, b in zip(bars, bars[1:])) >= pictures.THICK


@pytest.mark.parametrize("words", ["<b>&amp;\"'", "a\x00b\x1b[1m", "\ud800", "umlaut \u00e4"])
def test_any_text_gives_a_well_formed_picture(words):
    texts, _, _ = drawn(pictures.bars([words], {words: [1.0]}, words, words, words))
    shown = "".join(c if c.isprintable() else "?" for c in words)
    assert [word for word, _, _ in texts].count(shown) == 4      # title, series, label, unit
    assert f"1.00 {shown}" in [word for word, _, _ in texts]


@pytest.mark.parametrize("values", [[], [None], [0.0], [0.0, None], [1e-9, 3e-9], [1e12]])
def test_few_tiny_and_missing_values_draw(values):
    _, _, bars = drawn(pictures.bars(["x"] * len(values), {"s": values}, "t"))
    assert len(bars) == sum(value is not None for value in values)


def test_marks_of_bars_stand_at_their_values_and_far_ones_are_left_out():
    marks = {"card of 8": (7.2, 8.0), "card of 12": (10.8, 12.0), "beyond": (32.0, 33.0)}
    svg = pictures.bars(["a"], {"s": [4.0]}, "t", "GiB", marks=marks, axis="GiB; dashed: cards")
    texts, lines, bars = drawn(svg)
    words = [word for word, _, _ in texts]
    assert "GiB; dashed: cards" in words and "beyond" not in words and "GiB" not in words
    zero = bars[0][0]
    per_unit = bars[0][2] / 4.0
    for name, (start, limit) in list(marks.items())[:2]:
        x = next(x for word, x, _ in texts if word == name)
        assert x in lines and x - zero == pytest.approx(limit * per_unit, abs=0.2)
        bands = [e for e in ElementTree.fromstring(svg).iter(f"{SVG}rect") if e.get("fill") == "#eeeeee"
                 and float(e.get("x")) - zero == pytest.approx(start * per_unit, abs=0.2)]
        assert float(bands[0].get("width")) == pytest.approx((limit - start) * per_unit, abs=0.2)
    # Names do not overlap: the second of two marks at nearly one place has none.
    close = {"12 GiB": (10.8, 12.0), "12.1 GiB": (11.0, 12.1)}
    words = [word for word, _, _ in drawn(pictures.bars(["a"], {"s": [400.0]}, "t", marks=close))[0]]
    assert "12 GiB" in words and "12.1 GiB" not in words


@pytest.mark.parametrize("most", [0.003, 0.09, 1, 3.99, 4, 7.2, 9.99, 10, 23.9, 100, 12345])
def test_axis_ticks_are_few_round_and_reach_the_largest_value(most):
    ticks = pictures.axis_ticks(most)
    assert ticks[0] == 0 and ticks[-2] < most <= ticks[-1] and 5 <= len(ticks) <= 11, ticks
    assert float(f"{ticks[1]:.0e}") == ticks[1] and f"{ticks[1]:.0e}"[0] in "125", ticks


def test_bars_need_a_value_for_each_label():
    with pytest.raises(ValueError, match="2 labels, 1 values of predicted; give one for each"):
        pictures.bars(["a", "b"], {"predicted": [1.0]}, "t")


def lines_of(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    found = [e.get("points").split() for e in ElementTree.fromstring(svg).iter(f"{SVG}polyline")]
    return [[tuple(map(float, point.split(","))) for point in points] for points in found]


def test_curves_lie_where_their_ticks_say():
    """y by the places of the ticks, linear and logarithmic; a gap at None, NaN and what has no logarithm."""
    points = [(0, 1.0), (50, 10.0), (60, None), (70, float("nan")), (80, 100.0), (100, 1000.0)]
    for is_log in (False, True):
        svg = pictures.curves({"a": points, "b": [(0, 2.0), (100, 4.0)]}, "loss", is_log)
        texts = [(e.text, float(e.get("x")), float(e.get("y")) - 4, e.get("text-anchor"))
                 for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]
        y = {float(word): y for word, _, y, anchor in texts if anchor == "end"}
        x = {float(word): x for word, x, y, anchor in texts if anchor == "middle" and word != "step"}
        first, second, other = lines_of(svg)
        assert len(first) == len(second) == 2 and {"a", "b", "loss", "step"} <= {word for word, *_ in texts}
        assert second[1] == pytest.approx((x[100.0], y[1000.0]), abs=0.1)
        if is_log:
            assert first[0] == pytest.approx((x[0.0], y[1.0]), abs=0.1)
            assert first[1][1] == pytest.approx(y[10.0], abs=0.1)
            assert second[0][1] == pytest.approx(y[100.0], abs=0.1)
        else:
            assert first[0][1] == pytest.approx(y[0.0] + (y[1000.0] - y[0.0]) / 1000, abs=0.1)
    assert len(lines_of(pictures.curves({"a": [(0, 1.0), (1, 2.0), (2, 0.0), (3, 1.0), (4, 2.0)]}, "l",
                                        is_log=True))) == 2


def test_of_a_long_curve_the_peaks_are_kept():
    points = [(x, 1.0) for x in range(100_000)]
    points[40_321], points[77] = (40_321, 9.0), (77, -3.0)
    [line] = lines_of(pictures.curves({"a": points}, "loss"))
    assert len(line) <= pictures.MOST_POINTS + 4
    tall = sorted(line, key=lambda point: point[1])
    assert tall[0][1] < tall[1][1] and tall[-1][1] > tall[-2][1]
    assert line == sorted(line, key=lambda point: point[0])


@pytest.mark.parametrize("values", [[], [None], [0.0], [5.0], [1e-12, 2e-12], [1e30], [-1.0, -1.0],
                                    [3e-5, 5e-5], [1.1761e-4, 1.1765e-4], [0.999, 1.001], [1e-320, 1.0]])
@pytest.mark.parametrize("is_log", [False, True])
def test_curves_of_few_and_of_odd_values_draw(values, is_log):
    svg = pictures.curves({"a<b&\x00": list(enumerate(values)), "long " * 60: []}, "t", is_log)
    root = ElementTree.fromstring(svg)
    for e in root.iter(f"{SVG}text"):
        assert 0 <= float(e.get("x")) <= pictures.PLOT[0] and 0 <= float(e.get("y")) <= pictures.PLOT[1]
    assert "nan" not in svg and "inf" not in svg
    labels = [e for e in root.iter(f"{SVG}text") if e.get("text-anchor") == "end"]
    assert all(len(e.text) * 6 <= float(e.get("x")) for e in labels)


@pytest.mark.slow
def test_works_copied_alone(tmp_path):
    run_alone(tmp_path, ["pictures.py"], """
import torch, pictures
x = torch.zeros(4, 4, 4)
open("a.png", "wb").write(pictures.png(pictures.sheet([pictures.slices([x], x, (1, 1, 1), pictures.grey)])))
open("a.svg", "w").write(pictures.bars(["a"], {"b": [1.0]}, "t"))""")
    assert (tmp_path / "a.png").stat().st_size > 100 and (tmp_path / "a.svg").read_text().startswith("<svg")
