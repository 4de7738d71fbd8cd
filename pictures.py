"""What one looks at: slices of volumes side by side as PNG, bars and curves as SVG. Needs torch and nothing
else.

    open("a.png", "wb").write(png(sheet([slices([x], x + 1, (1, 1, 1), grey)])))
    open("a.svg", "w").write(bars(["AMP none"], {"predicted": [5.6], "measured": [5.5]}, "Peak memory"))
    open("b.svg", "w").write(curves({"run": [(1, 0.5), (2, 0.3)]}, "loss", is_log=True))

Both kinds of file are written with the standard library alone, so that no plotting package is needed.

Shapes: volumes are (D, H, W), pictures (height, width, 3) in [0, 255]. Spacing is in mm along D, H, W.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from html import escape

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME = 64                       # the grey around and between the slices
LARGEST = 4096                   # pixels of a slice's longer side, whatever spacing a header claims


# ------------------------------------------------------------------------------------------------ slices


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
    """(..., h, w) in [-1, 1] -> (..., h, w, 3): grey, and where label is not 0 its class: a contour in the
    class's colour, and inside of it a tint that leaves the image to be seen.
    """
    colour, plain = class_colour(label), grey(v)
    # A pixel is of the contour when one of its four neighbours is of another class.
    padded = F.pad(label.float().reshape(1, -1, *label.shape[-2:]), (1, 1, 1, 1), mode="replicate")[0]
    middle = padded[..., 1:-1, 1:-1]
    around = padded[..., :-2, 1:-1], padded[..., 2:, 1:-1], padded[..., 1:-1, :-2], padded[..., 1:-1, 2:]
    is_edge = torch.stack([other != middle for other in around]).any(0).reshape(label.shape)
    share = torch.where(is_edge, 1.0, 0.2)[..., None]
    return torch.where((label > 0)[..., None], (1 - share) * plain + share * colour, plain)


def class_colour(label: Tensor) -> Tensor:
    """Class numbers (...) -> (..., 3). Each number turns the hue by the golden angle, so that neighbouring
    numbers get hues far apart.
    """
    hue = (label * 0.381966 % 1)[..., None] * 6                   # sixths of the colour circle
    # each of red, green and blue is a straight line of the hue's distance from a corner of the circle
    corner = torch.tensor([3.0, 2.0, 4.0])
    slope = torch.tensor([1.0, -1.0, -1.0])
    offset = torch.tensor([-1.0, 2.0, 2.0])
    return 255 * ((hue - corner).abs() * slope + offset).clamp(0, 1)


BOTH, MISSED, ADDED = (230.0, 230.0, 230.0), (230.0, 70.0, 60.0), (70.0, 130.0, 240.0)


def occupancy(found: Tensor, true: Tensor) -> Tensor:
    """Two masks (...) -> (..., 3): what both hold, what was missed and what was added; else black."""
    image = torch.zeros(*true.shape, 3)
    for mask, colour in ((found & true, BOTH), (true & ~found, MISSED), (found & ~true, ADDED)):
        image[mask] = torch.tensor(colour)
    return image


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
        found.append(enlarged(image, [spacing[a] for a in others]))
    return found


def projections(
    volumes: Sequence[Tensor], spacing: Sequence[float], colour: Callable[..., Tensor]
) -> list[Tensor]:
    """Largest value along D (bird's-eye) and along H (front) of each of volumes (D, H, W), as `colour` shows
    them. For grids whose few occupied voxels no slice shows. D and H grow upwards, W to the right.
    """
    found = []
    for axis in (0, 1):
        image = colour(*(volume.amax(axis) for volume in volumes)).float()
        found.append(enlarged(image.flip(0), [spacing[a] for a in range(3) if a != axis]))
    return found


def enlarged(image: Tensor, spacing: Sequence[float]) -> Tensor:
    """(h, w, 3) with pixels of spacing mm -> square pixels as fine as the finer spacing, about 256 a side."""
    extent = [n * mm for n, mm in zip(image.shape, spacing)]      # mm
    pixel = max(min(spacing), max(extent) / LARGEST)
    size = [max(1, round(mm / pixel)) for mm in extent]
    factor = max(1, 256 // max(size))
    size = [n * factor for n in size]
    image = F.interpolate(image.movedim(-1, 0)[None], size, mode="nearest")
    return image[0].movedim(0, -1)


def sheet(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """One picture (height, width, 3) uint8 of columns of slices, each framed."""
    rows = []
    for row in zip(*columns):
        framed = [F.pad(panel, (0, 0, 2, 2, 2, 2), value=FRAME) for panel in row]
        rows.append(torch.cat(framed, 1))
    width = max(row.shape[1] for row in rows)
    rows = [F.pad(row, (0, 0, 0, width - row.shape[1]), value=FRAME) for row in rows]
    return torch.cat(rows).round().to(torch.uint8)


def panels(image: Tensor, columns: int, sizes: Sequence[tuple[int, int]]) -> list[list[Tensor]]:
    """What `sheet` put together, column by column. sizes: height and width of the slices of each row."""
    found: list[list[Tensor]] = [[] for _ in range(columns)]
    y = 2
    for height, width in sizes:
        for number, column in enumerate(found):
            x = 2 + number * (width + 4)
            column.append(image[y:y + height, x:x + width])
        y += height + 4
    return found


def png(image: Tensor, note: str = "") -> bytes:
    """(height, width, 3) uint8 -> the bytes of a PNG file (RFC 2083). note: ASCII, kept in it as `Comment`,
    which changes no pixel.
    """

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, _ = image.shape
    # each line of pixels is preceded by the number of its filter: 0, none
    lines = b"".join(b"\0" + row.numpy().tobytes() for row in image.contiguous())
    # 8 bits a channel, colour type 2 (red, green, blue), no interlacing
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    comment = chunk(b"tEXt", b"Comment\0" + note.encode("ascii")) if note else b""
    content = comment + chunk(b"IDAT", zlib.compress(lines, 6))
    parts = chunk(b"IHDR", header), content, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def read_png(content: bytes) -> tuple[Tensor, str]:
    """What `png` made -> the image (height, width, 3) uint8 and the note. ValueError for any other file."""
    start, note, lines, size = 8, b"", b"", None
    while content[:8] == b"\x89PNG\r\n\x1a\n" and start + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[start:start + 8])
        body = content[start + 8:start + 8 + length]
        if kind == b"IHDR" and body[8:] == bytes([8, 2, 0, 0, 0]):
            width, height = struct.unpack(">II", body[:8])
            size = height, width
        elif kind == b"tEXt":
            note = body.partition(b"\0")[2]
        elif kind == b"IDAT":
            lines += body
        start += length + 12
    try:
        pixels = torch.frombuffer(bytearray(zlib.decompress(lines)), dtype=torch.uint8)
        height, width = size
        image = pixels.reshape(height, 1 + 3 * width)
    except (zlib.error, TypeError, RuntimeError, ValueError):
        raise ValueError("not a PNG of pictures.png: cut, or of another program") from None
    if image[:, 0].any():
        raise ValueError("not a PNG of pictures.png: its lines are filtered")
    return image[:, 1:].reshape(height, width, 3), note.decode("ascii", "replace")


# ------------------------------------------------------------------------------------------------ bars

COLOURS = ("#568cc8", "#e69646", "#5aa469", "#b07aa1")            # of the series, first to last; then again
LETTER = 7.3                     # pixels a character of 12 pixels' height takes at most, on average
AXIS = 480                       # pixels of the axis
LINE, THICK = 20, 15             # pixels from bar to bar within a row, and of a bar
FARTHEST = 8                     # times the longest bar: marks beyond would leave no room for the bars


def bars(
    labels: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    title: str,
    unit: str = "GiB",
    missing: str = "none",
    marks: Mapping[str, tuple[float, float]] | None = None,
    axis: str = "",
) -> str:
    """Horizontal bars, one row a label and one bar a series in each, over a labelled axis -> SVG text.

    series: name -> one value of 0 or more for each label. A None draws no bar; a row of nothing but None says
    `missing`; a series of nothing but None is left out. The text is a whole file, for a browser.
    marks: name -> (start, limit): a dashed line at the limit with the name on top, and a grey band from the
    start to it. The axis reaches every mark but those beyond FARTHEST times the longest bar.
    axis: the words below the axis, the unit where there are none.
    Raises ValueError where a series does not have as many values as there are labels.
    """
    for name, values in series.items():
        if len(values) != len(labels):
            raise ValueError(f"bars: {len(labels)} labels, {len(values)} values of {name}; give one for each")
    shown = {name: values for name, values in series.items() if any(v is not None for v in values)}
    known = [v for values in shown.values() for v in values if v is not None]
    longest = max(known, default=1.0)
    marks = {name: ends for name, ends in (marks or {}).items() if ends[1] <= FARTHEST * longest}
    ticks = axis_ticks(max([longest, *(limit for _, limit in marks.values())]))

    # first the places: labels on the left, the axis, room for a figure behind the longest bar
    left = 24 + LETTER * max(map(len, labels), default=0)
    top = 84 if marks else 64
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
    for start, limit in marks.values():
        wide = scale * (limit - start)
        parts.append(rectangle(left + scale * start, top - 6, wide, bottom - top + 6, "#eeeeee"))
    for tick in ticks:
        x = left + scale * tick
        parts.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#d8d8d8"/>')
        parts.append(text(x, bottom + 16, f"{tick:g}", 'text-anchor="middle"'))
    free = 0.0                                # the end of the last mark's name: names do not overlap
    for name, (_, limit) in sorted(marks.items(), key=lambda mark: mark[1]):
        x = left + scale * limit
        parts.append(f'<line x1="{x:.1f}" y1="{top - 6}" x2="{x:.1f}" y2="{bottom}" stroke="#a4262c" '
                     'stroke-dasharray="5 4"/>')
        if x - LETTER * len(name) / 2 > free:
            parts.append(text(x, top - 11, name, 'text-anchor="middle" fill="#a4262c"'))
            free = x + LETTER * len(name) / 2
    parts.append(text(left + AXIS / 2, bottom + 36, axis or unit, 'text-anchor="middle"'))
    axes = f"M{left:.1f} {top - 6}V{bottom}H{left + AXIS:.1f}"
    parts.append(f'<path d="{axes}" fill="none" stroke="#606060"/>')
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

    return drawing(width, bottom + 48, parts)


def drawing(width: float, height: float, parts: Sequence[str]) -> str:
    """The parts as the text of a whole SVG file."""
    size = f'width="{width:.0f}" height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"'
    font = 'font-family="sans-serif" font-size="12" fill="#202020"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>'
    return "\n".join([head, *parts, "</svg>"]) + "\n"


def axis_ticks(most: float) -> list[float]:
    """0 and four to ten more numbers, 1, 2 or 5 times a power of ten apart; the last is `most` or more."""
    if most <= 0:
        most = 1.0
    power = 10.0 ** math.floor(math.log10(most / 4))
    apart = max(factor * power for factor in (1, 2, 5) if factor * power <= most / 4 * (1 + 1e-9))
    return [float(f"{n * apart:.12g}") for n in range(math.ceil(most / apart - 1e-9) + 1)]


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


# ------------------------------------------------------------------------------------------------ curves

Points = Sequence[tuple[float, float | None]]                    # of a curve, in the order of their x
MOST_POINTS = 500                # of a curve as it is drawn
PLOT = (440, 250)                # pixels of the whole drawing
MARGINS = (56, 14, 34, 38)       # of them left, right, above and below the axes


def curves(series: Mapping[str, Points], title: str, is_log: bool = False, x_name: str = "step",
           looks: Mapping[str, tuple[int, float]] | None = None) -> str:
    """Lines over one pair of axes, a colour and a row of the legend each -> SVG text, a whole file.

    A y of None or NaN, or infinite, leaves a gap; on a logarithmic axis one of 0 or less does too. Of a
    long curve each stretch of points is drawn as its least and its largest, so that no peak is lost. Where no
    curve has a point, the drawing says so.
    looks: name -> number of its colour and opacity (0 to 1), so that several drawings have one colour for one
    thing; with it even a single curve is named. Else colours go by the order.
    """
    shown = {name: thinned(list(stretches(points, is_log))) for name, points in series.items()}
    known = [point for parts in shown.values() for part in parts for point in part]
    width, height = PLOT
    left, right, above, below = MARGINS
    rows = legend_rows(list(shown), width) if len(shown) > 1 or looks else []
    look = [(looks or {}).get(name, (number, 1.0)) for number, name in enumerate(shown)]
    above += 18 * len(rows)
    height += 18 * max(0, len(rows) - 2)                         # a long legend takes no room from the curves
    bottom = height - below
    parts = [rectangle(0, 0, width, height, "white"),
             text(12, 20, title, 'font-size="14" font-weight="600"')]
    for row, names in enumerate(rows):
        for place, number, name in names:
            colour, opacity = look[number]
            box = rectangle(place, 30 + 18 * row, 12, 12, colour_of(colour))
            parts.append(f'<g opacity="{opacity:g}">{box}</g>' if opacity < 1 else box)
            parts.append(text(place + 17, 40 + 18 * row, name))
    if not known:
        parts.append(text(width / 2, height / 2, "no values yet", 'text-anchor="middle"'))
        return drawing(width, height, parts)

    # First the ends of both axes: at the outermost ticks upwards, at the last points to the sides.
    x_low, x_high = min(x for x, _ in known), max(x for x, _ in known)
    low, high = min(y for _, y in known), max(y for _, y in known)
    # Of values that lie close together, powers of ten would show a flat line.
    is_log = is_log and high >= 3 * low
    ticks = log_ticks(low, high) if is_log else range_ticks(low, high)
    low, high = ticks[0], ticks[-1]
    left = max(left, 12 + LETTER * max(len(f"{tick:.6g}") for tick in ticks))

    def place_of(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        upwards = (y - low) / (high - low)
        if is_log:
            upwards = math.log(y / low) / math.log(high / low)
        return left + across * (width - left - right), bottom - upwards * (bottom - above)

    # Then the axes with their ticks, then the curves.
    for tick in ticks:
        _, y = place_of(x_low, tick)
        ends = f'x1="{left:.1f}" y1="{y:.1f}" x2="{width - right}" y2="{y:.1f}"'
        parts.append(f'<line {ends} stroke="#d8d8d8"/>')
        parts.append(text(left - 6, y + 4, f"{tick:.6g}", 'text-anchor="end"'))
    for tick in range_ticks(x_low, x_high):
        if x_low <= tick <= x_high:
            x, _ = place_of(tick, low)
            ends = f'x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"'
            parts.append(f'<line {ends} stroke="#808080"/>')
            parts.append(text(x, bottom + 17, f"{tick:.6g}", 'text-anchor="middle"'))
    parts.append(text((left + width - right) / 2, height - 4, x_name, 'text-anchor="middle"'))
    for (number, opacity), stretch in zip(look, shown.values()):
        faint = f' opacity="{opacity:g}"' if opacity < 1 else ""
        for points in stretch:
            places = [place_of(x, y) for x, y in points]
            if len(places) == 1:
                x, y = places[0]
                parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour_of(number)}"{faint}/>')
                continue
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour_of(number)}" '
                         f'stroke-width="1.5"{faint}/>')
    return drawing(width, height, parts)


def colour_of(number: int) -> str:
    """Of series `number`: the four colours of bars, then hues turned by the golden angle."""
    if number < len(COLOURS):
        return COLOURS[number]
    return f"hsl({137.5 * number % 360:.0f}, 55%, 45%)"


def legend_rows(names: Sequence[str], width: float) -> list[list[tuple[float, int, str]]]:
    """(place, number, name) of each series, as many in a row as fit."""
    rows: list[list[tuple[float, int, str]]] = [[]]
    place = 12.0
    for number, name in enumerate(names):
        # A name that is too long for a whole row keeps its end, by which runs differ.
        most = int((width - 60) / LETTER)
        if len(name) > most:
            name = "..." + name[3 - most:]
        needed = 32 + LETTER * len(name)
        if rows[-1] and place + needed > width:
            rows.append([])
            place = 12.0
        rows[-1].append((place, number, name))
        place += needed
    return rows


def stretches(points: Points, is_log: bool) -> Iterator[list[tuple[float, float]]]:
    """The curve without what cannot be drawn, cut where that was."""
    part: list[tuple[float, float]] = []
    for x, y in points:
        # Below 1e-300 a quotient of two values may be infinite.
        if y is not None and math.isfinite(y) and (y > 1e-300 or not is_log):
            part.append((x, y))
        elif part:
            yield part
            part = []
    if part:
        yield part


def thinned(parts: list[list[tuple[float, float]]]) -> list[list[tuple[float, float]]]:
    """At most about MOST_POINTS points of all stretches: of neighbours the least and the largest."""
    total = sum(map(len, parts))
    if total <= MOST_POINTS:
        return parts
    size = math.ceil(2 * total / MOST_POINTS)
    found = []
    for part in parts:
        kept = []
        for start in range(0, len(part), size):
            block = part[start:start + size]
            ends = {min(block, key=lambda point: point[1]), max(block, key=lambda point: point[1])}
            kept += sorted(ends)
        # The first and the last point keep the curve's length.
        found.append(sorted({part[0], *kept, part[-1]}))
    return found


def range_ticks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 or 5 times a power of ten apart, from `low` or less to `high` or more."""
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        room = abs(low) / 10
        low, high = (low - room, high + room) if room else (0.0, 1.0)
    apart = axis_ticks(high - low)[1]
    first, last = math.floor(low / apart), math.ceil(high / apart)
    return [float(f"{n * apart:.12g}") for n in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten from `low` or less to `high` or more; with their 2 and 5 folds where those are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, (last - first) // 6)
    factors = (1, 2, 5) if high < 500 * low else (1,)
    ticks = [factor * 10.0 ** power for power in range(first, last + every, every) for factor in factors]
    # What lies outside the first tick below and the first above is not needed.
    start = max((n for n, tick in enumerate(ticks) if tick <= low * (1 + 1e-9)), default=0)
    end = min((n for n, tick in enumerate(ticks) if tick >= high * (1 - 1e-9)), default=len(ticks) - 1)
    if end == start:
        end = start + 1
        ticks.append(10.0 * ticks[-1])
    return [float(f"{tick:.6g}") for tick in ticks[start:end + 1]]
