"""What one looks at: slices of volumes side by side as PNG, bars as SVG. Needs torch and nothing else.

    open("a.png", "wb").write(png(comparison(image, recon, spacing=(1, 1, 1), background=-1)))
    open("a.svg", "w").write(bars(["AMP none"], {"predicted": [5.6], "measured": [5.5]}, "Peak memory"))

Both kinds of file are written with the standard library alone, so that no plotting package is needed.

Shapes: volumes are (D, H, W), pictures (height, width, 3) in [0, 255]. Spacing is in mm along D, H, W.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from html import escape

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME = 64                       # the grey around and between the slices
LARGEST = 4096                   # pixels of a slice's longer side, whatever spacing a header claims


# ------------------------------------------------------------------------------------------------ slices


def comparison(
    image: Tensor, recon: Tensor, spacing: Sequence[float], background: float, is_picture: bool = False
) -> Tensor:
    """Input, reconstruction and error (columns) in axial, coronal and sagittal slices (rows).

    image, recon (C, D, H, W) -> (height, width, 3) uint8. The first channel is shown, and of each axis the
    slice with the most foreground. Grey is -1 to 1; the error runs from black (0) over red to yellow (0.5).
    """
    image, recon = image[0], recon[0]
    weight = (image - background).abs()
    columns = [
        slices([image], weight, spacing, grey, is_picture),
        slices([recon], weight, spacing, grey, is_picture),
        slices([recon, image], weight, spacing, error, is_picture),
    ]
    return sheet(columns)


def label_comparison(
    image: Tensor, labels: Sequence[Tensor], spacing: Sequence[float], is_picture: bool = False
) -> Tensor:
    """Input and, for each of labels, a colour per class over it (columns) in three slices (rows).

    image (C, D, H, W), labels (D, H, W) -> (height, width, 3) uint8. Of each axis the slice is shown that
    has the most voxels which the first of labels names.
    """
    plain = image[0]
    weight = (labels[0] > 0).float()
    columns = [slices([plain], weight, spacing, grey, is_picture)]
    for label in labels:
        columns.append(slices([plain, label], weight, spacing, coloured, is_picture))
    return sheet(columns)


def points_comparison(image: Tensor, recon: Tensor, spacing: Sequence[float]) -> Tensor:
    """Points and those of a reconstruction (columns): distances in three slices, then the largest magnitude
    along each axis, which shows all points there are (rows).

    image, recon (C, D, H, W) in [-1, 1], 0 where there is no point: the mean of the channels is shown.
    """
    columns = []
    for grid in (image, recon):
        v = grid.float().mean(0)
        weight = (image != 0).any(0).float()
        columns.append(slices([v], weight, spacing, signed) + projections(v.abs(), spacing))
    return sheet(columns)


def projections(v: Tensor, spacing: Sequence[float]) -> list[Tensor]:
    """The maximum of v (D, H, W) in [0, 1] along each axis, as `slices` would show it."""
    found = []
    for axis in range(3):
        flat = v.amax(axis, keepdim=True).expand_as(v)
        found.append(slices([2 * flat - 1], torch.ones_like(v), spacing, grey)[axis])
    return found


def signed(v: Tensor) -> Tensor:
    """(...) in [-1, 1] -> (..., 3): blue below 0, red above, black where it is 0; brightest near 0, where the
    surface is.
    """
    light = 255 * (1.2 - v.abs()).clamp(0, 1)
    nothing = torch.zeros_like(v)
    return torch.stack([torch.where(v > 0, light, nothing), nothing, torch.where(v < 0, light, nothing)], -1)


def grey(v: Tensor) -> Tensor:
    """(...) in [-1, 1] -> (..., 3)."""
    level = (v.clamp(-1, 1) + 1) * 127.5
    return level[..., None].expand(*v.shape, 3)


def error(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| (...) -> (..., 3): black (0), red (0.25), yellow (0.5)."""
    far = (a - b).abs() / 0.5 * 2
    red, green, blue = far.clamp(0, 1), (far - 1).clamp(0, 1), torch.zeros_like(far)
    return torch.stack([red, green, blue], -1) * 255


def coloured(v: Tensor, label: Tensor) -> Tensor:
    """(...) in [-1, 1] -> (..., 3): grey, with a colour per class where label (...) is not 0.

    Each number turns the hue by the golden angle, so that neighbouring numbers get hues far apart.
    """
    hue = (label * 0.381966 % 1)[..., None] * 6                   # sixths of the colour circle
    # each of red, green and blue is a straight line of the hue's distance from a corner of the circle
    corner = torch.tensor([3.0, 2.0, 4.0])
    slope = torch.tensor([1.0, -1.0, -1.0])
    offset = torch.tensor([-1.0, 2.0, 2.0])
    colour = 255 * ((hue - corner).abs() * slope + offset).clamp(0, 1)
    return torch.where((label > 0)[..., None], 0.5 * grey(v) + 0.5 * colour, grey(v))


def slices(
    volumes: Sequence[Tensor],
    weight: Tensor,
    spacing: Sequence[float],
    colour: Callable[..., Tensor],
    is_picture: bool = False,
) -> list[Tensor]:
    """Axial, coronal and sagittal slice where weight (D, H, W) sums to most.

    Of a flat volume there is one slice alone, the one that is not seen edge-on. colour: makes slices (h, w)
    of the volumes (D, H, W) an image (h, w, 3). Pixels are square in mm, head and front are up, the patient's
    right is on the left; is_picture: the volume is the right way up already.
    """
    shape, found = volumes[0].shape, []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        edge_on = min(shape[a] for a in others) == 1 < sorted(shape)[1]
        if edge_on:
            continue
        # first the slice itself, in colours
        at = int(weight.sum(others).argmax())
        image = colour(*(volume.select(axis, at) for volume in volumes)).float()
        if not is_picture:
            image = image.flip(0, 1)                              # from RAS
        # then its size: square pixels as fine as the finer spacing, enlarged to about 256
        extent = [shape[a] * spacing[a] for a in others]          # mm
        pixel = max(min(spacing[a] for a in others), max(extent) / LARGEST)
        size = [max(1, round(mm / pixel)) for mm in extent]
        factor = max(1, 256 // max(size))
        size = [n * factor for n in size]
        image = F.interpolate(image.movedim(-1, 0)[None], size, mode="nearest")
        found.append(image[0].movedim(0, -1))
    return found


def sheet(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """One picture (height, width, 3) uint8 of columns of slices, each framed."""
    rows = []
    for row in zip(*columns):
        framed = [F.pad(panel, (0, 0, 2, 2, 2, 2), value=FRAME) for panel in row]
        rows.append(torch.cat(framed, 1))
    width = max(row.shape[1] for row in rows)
    rows = [F.pad(row, (0, 0, 0, width - row.shape[1]), value=FRAME) for row in rows]
    return torch.cat(rows).round().to(torch.uint8)


def png(image: Tensor) -> bytes:
    """(height, width, 3) uint8 -> the bytes of a PNG file (RFC 2083)."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, _ = image.shape
    # each line of pixels is preceded by the number of its filter: 0, none
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in image.contiguous())
    # 8 bits a channel, colour type 2 (red, green, blue), no interlacing
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 6)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


# ------------------------------------------------------------------------------------------------ bars

COLOURS = ("#568cc8", "#e69646", "#5aa469", "#b07aa1")            # of the series, first to last; then again
LETTER = 7.3                     # pixels a character of 12 pixels' height takes at most, on average
AXIS = 480                       # pixels of the axis
LINE, THICK = 20, 15             # pixels from bar to bar within a row, and of a bar


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    title: str,
    unit: str = "GiB",
    missing: str = "none",
) -> str:
    """Horizontal bars, one row a label and one bar a series in each, over a labelled axis -> SVG text.

    series: name -> one value of 0 or more for each label. A None draws no bar; a row of nothing but None says
    `missing`; a series of nothing but None is left out. The text is a whole file, for a browser.
    Raises ValueError where a series does not have as many values as there are labels.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"bars: {len(labels)} labels, {len(values)} values of {name}; give one for each")
    shown = {name: values for name, values in series.items() if any(v is not None for v in values)}
    known = [v for values in shown.values() for v in values if v is not None]
    ticks = axis_ticks(max(known, default=1.0))

    # first the places: labels on the left, the axis, room for a figure behind the longest bar
    left = 24 + LETTER * max(map(len, labels), default=0)
    top = 64
    row_height = LINE * max(1, len(shown)) + 12
    bottom = top + row_height * len(labels)
    width = max(left + AXIS + 100, 24 + LETTER * 1.4 * len(title))
    scale = AXIS / ticks[-1]

    # then what is drawn, from the back to the front
    parts = [rectangle(0, 0, width, bottom + 48, "white"), text(12, 26, title, 'font-size="16"')]
    for number, name in enumerate(shown):
        place = 12 + sum(34 + LETTER * len(other) for other in list(shown)[:number])
        parts.append(rectangle(place, 38, 12, 12, COLOURS[number % len(COLOURS)]))
        parts.append(text(place + 18, 48, name))
    for tick in ticks:
        x = left + scale * tick
        parts.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#d8d8d8"/>')
        parts.append(text(x, bottom + 16, f"{tick:g}", 'text-anchor="middle"'))
    parts.append(text(left + AXIS / 2, bottom + 36, unit, 'text-anchor="middle"'))
    for row, label in enumerate(labels):
        y = top + row_height * row
        parts.append(text(left - 10, y + row_height / 2 - 2, label, 'text-anchor="end"'))
        values = [shown[name][row] for name in shown]
        if all(value is None for value in values):
            parts.append(text(left + 6, y + row_height / 2 - 2, missing, 'font-style="italic"'))
        for number, value in enumerate(values):
            if value is None:
                continue
            length, place = max(1.0, scale * value), y + LINE * number
            parts.append(rectangle(left, place, length, THICK, COLOURS[number % len(COLOURS)]))
            parts.append(text(left + length + 6, place + 12, f"{figure(value)} {unit}"))

    size = f'width="{width:.0f}" height="{bottom + 48}" viewBox="0 0 {width:.0f} {bottom + 48}"'
    font = 'font-family="sans-serif" font-size="12" fill="#202020"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def axis_ticks(most: float) -> list[float]:
    """0 and four to ten more numbers, 1, 2 or 5 times a power of ten apart; the last is `most` or more."""
    if most <= 0:
        most = 1.0
    power = 10.0 ** math.floor(math.log10(most / 4))
    apart = max(factor * power for factor in (1, 2, 5) if factor * power <= most / 4 * (1 + 1e-9))
    return [round(n * apart, 12) for n in range(math.ceil(most / apart - 1e-9) + 1)]


def figure(value: float) -> str:
    """Two places behind the point, three digits below 0.1."""
    if value < 0.1:
        return f"{value:.3g}"
    return f"{value:.2f}"


def rectangle(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{colour}"/>'


def text(x: float, y: float, words: str, attributes: str = "") -> str:
    """A line of text, its baseline at y. What XML takes for markup is escaped, what it forbids becomes ?."""
    allowed = "".join(c if c.isprintable() else "?" for c in words)
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(allowed)}</text>'
