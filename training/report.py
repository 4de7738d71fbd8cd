"""A page to look at in a browser: figures, pictures and tables in one HTML file that needs nothing beside it.

The first half makes any page (`page`, `table`, `views_html`), wherever its figures come from; the page of a
run (training/run_page.py) is made of it too. The second half is the page of an evaluation.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import pictures
from training.console import short_number
from training.evaluation import COLUMNS, FIDELITY, FIRST, cell, columns_of, heading, means_of, ranked_by
from training.ready import Ready, describe
from training.views import Views
from volumes.files import show
from volumes.told import counted

MOST_CARDS = 8                                                   # figures on top of the page

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --back: #f5f7f9; --card: #fff; --accent: #0b6bcb }
* { box-sizing: border-box }
body { margin: 0; background: var(--back); color: var(--ink);
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
main { max-width: 1180px; margin: 0 auto; padding: 28px 24px 60px }
h1 { font-size: 24px; margin: 0 0 4px }
h2 { font-size: 18px; margin: 34px 0 12px }
p { margin: 0 0 6px; color: var(--soft) }
.bad { color: #a4262c }

.cards { display: grid; gap: 12px; margin-top: 20px;
         grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)) }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; white-space: nowrap }
.card span { color: var(--soft); font-size: 13px }

section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px;
          margin-bottom: 18px }
section h3 { margin: 0; font-size: 16px; color: var(--accent) }
.file { color: var(--ink); font-weight: 600; overflow-wrap: anywhere }
.wide { overflow-x: auto; padding: 0 }

.figures { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
.figures th, .figures td { padding: 6px 12px; text-align: right; white-space: nowrap;
                           border-bottom: 1px solid var(--line) }
.figures th:first-child, .figures td:first-child { text-align: left; min-width: 220px;
                                                   white-space: normal; overflow-wrap: anywhere }
.figures thead th { background: #eef1f5 }
.figures .mean td { font-weight: 600; background: #f8fafc }

.slices { width: 100%; table-layout: fixed; border-spacing: 6px }
.slices th { font-weight: 500; color: var(--soft); font-size: 13px }
.slices th:first-child { width: 84px; text-align: left }
.slices td { background: #000; text-align: center; vertical-align: middle; border-radius: 4px; padding: 0 }
.slices img { display: block; margin: auto; width: 100%; max-height: 340px; object-fit: contain }
.bar { display: inline-block; width: 160px; height: 10px; vertical-align: middle; margin: 0 6px;
       background: linear-gradient(90deg, #000, #f00 50%, #ff0) }
.box { display: inline-block; width: 12px; height: 12px; margin-right: 5px; vertical-align: -1px }
.key { white-space: nowrap }
h4 { margin: 12px 0 0; font-size: 14px; font-weight: 600; color: var(--soft) }
.words { font-size: 13px; margin-top: 6px }
.words td { text-align: left; white-space: normal; overflow-wrap: anywhere }
.words td:first-child { min-width: 110px; width: 110px }
.curves { display: grid; gap: 12px; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)) }
.curves svg { width: 100%; height: auto; border: 1px solid var(--line); border-radius: 8px }
pre { font-size: 13px; overflow-x: auto }
"""


# -------------------------------------------------------------------------------- any page

def text(value: object) -> str:
    """Any text as HTML that shows it, whatever characters it has."""
    return html.escape(show(str(value)))


def page(title: str, headline: str, notes: Sequence[str], cards: Sequence[tuple[str, str]], body: str) -> str:
    """A whole page. All parts are HTML.

    notes: paragraphs. cards: a figure and what it is. body: what stands below them.
    """
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{headline}</h1>
{"".join(notes)}
<div class="cards">{boxes}</div>
{body}
</main></body></html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], means: int = 0) -> str:
    """Rows of cells under their heads, all of it HTML; the first `means` rows stand out.

    Heads that are all empty are left out.
    """
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="mean"' if number < means else ""
        cells = "".join(f"<td>{value}</td>" for value in row)
        lines.append(f"<tr{kind}>{cells}</tr>")
    top = "".join(f"<th>{head}</th>" for head in heads)
    top = f"<thead><tr>{top}</tr></thead>\n" if any(heads) else ""
    return (f'<section class="wide"><table class="figures">{top}'
            f'<tbody>{"".join(lines)}</tbody></table></section>')


def slices_table(columns: Mapping[str, Sequence[Tensor]], rows: Sequence[str], width: float = 1.0) -> str:
    """A row for each of `rows`. columns: heading -> pictures (height, width, 3), one a row.

    width: the share of the page's width that they take together.
    """
    lines = []
    for number, name in enumerate(rows):
        cells = "".join(picture(images[number], f"{kind}, {name}") for kind, images in columns.items())
        lines.append(f"<tr><th>{text(name)}</th>{cells}</tr>")
    heads = "".join(f"<th>{text(kind)}</th>" for kind in columns)
    style = f' style="width:{width:.0%}"' if width < 1 else ""
    return f'<table class="slices"{style}><tr><th></th>{heads}</tr>{"".join(lines)}</table>'


def views_html(shown: Views) -> str:
    """Pictures with their headings, then what their colours mean."""
    words = [text(line) for line in shown.words]
    if shown.error is not None:
        low, high = shown.error
        words.append(f'Error: {text(low)} <span class="bar"></span> {text(high)}.')
    for name, (red, green, blue) in shown.legend:
        box = f'<span class="box" style="background:rgb({red},{green},{blue})"></span>'
        words.append(f'<span class="key">{box}{text(name)}</span>')
    return slices_table(shown.columns, shown.rows) + f'<p class="words">{" &ensp; ".join(words)}</p>'


def picture(image: Tensor, what: str) -> str:
    """A cell with a picture, which stands in the page itself. image: (height, width, 3), 0 to 255."""
    content = base64.b64encode(pictures.png(image.round().to(torch.uint8))).decode()
    return f'<td><img alt="{what}" src="data:image/png;base64,{content}"></td>'


# -------------------------------------------------------------------------------- of an evaluation

def name_of(row: dict, name: str) -> str:
    """What a volume is called: its file's name or path, with its number where the file has several."""
    if "volume" in row:
        return f"{text(name)}, volume {row['volume']}"
    return text(name)


def shown_name(row: dict) -> str:
    """The file's own name, below the folders that are part of what it is known by."""
    folders = row.get("name", "").split("/")[:-1]
    return "/".join([*folders, Path(row["file"]).name])


def figure(row: dict, shown: Views) -> str:
    """One volume: its name, its figures, its slices."""
    figures = [f"{heading(name)} {cell(row, name)}" for name in FIRST if name in row]
    size = " &times; ".join(map(str, row["shape"]))
    line = " &middot; ".join([*figures, f"{size} voxels"])
    return f'<p class="file">{name_of(row, shown_name(row))}</p><p>{line}</p>{views_html(shown)}'


def evaluation_page(ready: Ready, result: dict, parts: dict[str, str], source: str) -> str:
    """The page of an evaluation.

    result: of evaluation.summary. parts: Worst, Median, Best -> `figure` of that volume. source: the data as
    the user named them.
    """
    names, means, volumes = columns_of(result), means_of(result), result["volumes"]

    # First the cards: means, speed, memory. Figures of classes and of HU windows are for the table.
    cards = []
    for name in names:
        if name in COLUMNS and not name.endswith("_16"):
            what = f"mean {heading(name)}" if name in result["mean"] else heading(name)
            cards.append((cell(means, name), what))
    cards = cards[:MOST_CARDS]
    cards.append((short_number(result["voxels_per_second"]), "voxels/s"))
    cards.append((f"{result['peak_gib']:.2f} GiB", "peak memory"))

    # Then the chosen volumes.
    what = "Segmentation" if ready.task.LABELS else "Reconstruction"
    # "Worst, median and best"
    chosen = " and ".join(", ".join(parts).rsplit(", ", 1)).capitalize()
    rank, _ = ranked_by(ready, volumes)
    body = [f"<h2>{chosen} volume by {heading(rank)}</h2>"]
    body += [f"<section><h3>{name}</h3>{part}</section>" for name, part in parts.items()]

    # Then the tables: channels, where there are several, and all volumes below their means.
    if "channels" in result["mean"]:
        rows = []
        for c, row in enumerate(result["mean"]["channels"]):
            rows.append([f"channel {c}", *(cell(row, name) for name in FIDELITY)])
        body.append("<h2>Means per channel</h2>" + table(["", *map(heading, FIDELITY)], rows))
    tops = {f"mean of {len(volumes)}": means}
    if "pooled" in result:
        tops["all voxels together"] = result["pooled"]
    rows = [[name, *(cell(row, key) for key in names)] for name, row in tops.items()]
    rows += [[name_of(row, row["file"]), *(cell(row, key) for key in names)] for row in volumes]
    body.append("<h2>Every volume</h2>" + table(["file", *map(heading, names)], rows, len(tops)))

    # Last the head of the page: the network, the data, and what failed.
    notes = [f"<p>{text(describe(ready))}</p>", f"<p>Data: {text(source)}</p>"]
    notes += [f'<p class="bad">{text(row["error"])}</p>' for row in result["failed"]]
    title = f"{html.escape(ready.cfg.preset)}: evaluation"
    return page(title, f"{what} of {counted(len(volumes), 'volume')}", notes, cards, "\n".join(body))
