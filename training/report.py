"""A page that one opens in a browser: figures, pictures and tables in one HTML file that needs nothing beside it.

`page`, `table`, `panels` and what is above the line in the middle know nothing of where the figures come from; what
follows it is the page of an evaluation. Version 0.1 (2026-11).
"""
from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import data
import pictures
from data import Intensity
from training.console import short_number
from training.evaluation import FIRST, cell, column, columns_of, means_of, ranked_by
from training.ready import Ready, describe

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

.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(125px, 1fr)); gap: 12px; margin-top: 20px }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px }
.card b { display: block; font-size: 22px; font-variant-numeric: tabular-nums; white-space: nowrap }
.card span { color: var(--soft); font-size: 13px }

section { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 18px; margin-bottom: 18px }
section h3 { margin: 0; font-size: 16px; color: var(--accent) }
.file { color: var(--ink); font-weight: 600; overflow-wrap: anywhere }
.wide { overflow-x: auto; padding: 0 }

.figures { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px }
.figures th, .figures td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
.figures th:first-child, .figures td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere;
                                                   min-width: 180px }
.figures thead th { background: #eef1f5 }
.figures .mean td { font-weight: 600; background: #f8fafc }

.slices { width: 100%; table-layout: fixed; border-spacing: 6px }
.slices th { font-weight: 500; color: var(--soft); font-size: 13px }
.slices th:first-child { width: 68px; text-align: left }
.slices td { background: #000; text-align: center; vertical-align: middle; border-radius: 4px; padding: 0 }
.slices img { display: block; margin: auto; width: 100%; max-height: 340px; object-fit: contain }
.bar { display: inline-block; width: 160px; height: 10px; vertical-align: middle; margin: 0 6px;
       background: linear-gradient(90deg, #000, #f00 50%, #ff0) }
"""


# ------------------------------------------------------------------------------------------------ any page

def text(value: object) -> str:
    """As it is, whatever characters it has."""
    return html.escape(data.show(str(value)))


def page(title: str, heading: str, notes: Sequence[str], cards: Sequence[tuple[str, str]], body: str) -> str:
    """notes: paragraphs below the heading, `body`: what follows the cards (figure, what it is), all of it HTML."""
    boxes = "".join(f'<div class="card"><b>{value}</b><span>{name}</span></div>' for value, name in cards)
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{STYLE}</style></head><body><main>
<h1>{heading}</h1>
{"".join(notes)}
<div class="cards">{boxes}</div>
{body}
</main></body></html>
"""


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], means: int = 0) -> str:
    """Rows of cells under their heads; the first `means` rows stand out."""
    lines = []
    for number, row in enumerate(rows):
        kind = ' class="mean"' if number < means else ""
        lines.append(f"<tr{kind}>" + "".join(f"<td>{value}</td>" for value in row) + "</tr>")
    top = "".join(f"<th>{head}</th>" for head in heads)
    return (f'<section class="wide"><table class="figures"><thead><tr>{top}</tr></thead>\n'
            f'<tbody>{"".join(lines)}</tbody></table></section>')


def panels(columns: dict[str, list[Tensor]]) -> str:
    """Heading -> slices (height, width, 3) of one volume, the pictures inside the page: a row for each slice."""
    count = len(next(iter(columns.values())))
    names = ("axial", "coronal", "sagittal") if count > 1 else ("",)
    rows = []
    for number, name in enumerate(names):
        cells = "".join(picture(images[number], f"{kind}, {name}") for kind, images in columns.items())
        rows.append(f"<tr><th>{name}</th>{cells}</tr>")
    heads = "".join(f"<th>{kind}</th>" for kind in columns)
    return f'<table class="slices"><tr><th></th>{heads}</tr>{"".join(rows)}</table>'


def picture(image: Tensor, what: str) -> str:
    content = base64.b64encode(pictures.png(image.round().to(torch.uint8))).decode()
    return f'<td><img alt="{what}" src="data:image/png;base64,{content}"></td>'


# ------------------------------------------------------------------------------------------------ of an evaluation

def slices_of(volume: np.ndarray, found: np.ndarray, label: np.ndarray | None, intensity: Intensity,
              spacing: Sequence[float], is_picture: bool) -> dict[str, list[Tensor]]:
    """Heading -> three orthogonal slices: input, reconstruction, error; or, where there is a label: input, label, found."""
    x = torch.from_numpy(volume[0])
    if label is None:
        y = torch.from_numpy(found[0])
        weight = (x - intensity.background).abs()
        columns = {"Input": ([x], pictures.grey), "Reconstruction": ([y], pictures.grey), "Error": ([y, x], pictures.error)}
    else:
        y, truth = torch.from_numpy(found), torch.from_numpy(label)
        weight = ((truth > 0) | (y > 0)).float()
        columns = {"Input": ([x], pictures.grey), "Label": ([x, truth], pictures.coloured),
                   "Found": ([x, y], pictures.coloured)}
    return {name: pictures.slices(volumes, weight, spacing, colour, is_picture) for name, (volumes, colour) in columns.items()}


def volume_name(row: dict, name: str) -> str:
    return text(name) + (f", volume {row['volume']}" if "volume" in row else "")


def figure(row: dict, columns: dict[str, list[Tensor]]) -> str:
    """One volume: its name, its figures, its slices."""
    figures = " &middot; ".join(f"{column(name)[0]} {cell(row, name)}" for name in FIRST if name in row)
    size = " &times; ".join(map(str, row["shape"]))
    return (f'<p class="file">{volume_name(row, Path(row["file"]).name)}</p><p>{figures} &middot; {size} voxels</p>'
            f"{panels(columns)}")


def evaluation_page(ready: Ready, result: dict, figures: dict[str, str], source: str) -> str:
    """Cards with the means, the volumes chosen (worst, median, best -> `figure` of it), and a row per volume."""
    names, means, count = columns_of(result), means_of(result), len(result["volumes"])

    # First the cards.
    cards = []
    for name in names:
        if not name.endswith("_16"):
            mean = "mean " if name in result["mean"] else ""
            cards.append((cell(means, name), f"{mean}{column(name)[0]}"))
    cards = cards[:8] + [(short_number(result["voxels_per_second"]), "voxels/s"), (f"{result['peak_gib']:.2f} GiB", "peak memory")]

    # Then the chosen volumes.
    what, legend = "Reconstruction", ('Grey from -1 to 1; error 0 <span class="bar"></span> 0.5 and more, of the intensity '
                                      "range [-1, 1]. First channel.")
    if ready.task.LABELS:
        what, legend = "Segmentation", "A colour for each class; 0 is left as it is."
    chosen = " and ".join(", ".join(figures).rsplit(", ", 1)).capitalize()
    ranked, _ = ranked_by(ready, result["volumes"])
    parts = "".join(f"<section><h3>{name}</h3>{figure}</section>" for name, figure in figures.items())
    body = [f"<h2>{chosen} volume by {column(ranked)[0]}</h2><p>{legend}</p>", parts]

    # Then the tables: means for each channel, and all volumes below their means.
    if "channels" in result["mean"]:
        rows = [[f"channel {c}", *(cell(row, name) for name in row)] for c, row in enumerate(result["mean"]["channels"])]
        body += ["<h2>Means per channel</h2>" + table(["", "PSNR", "SSIM", "L1"], rows)]
    rows = [[f"mean of {count}", *(cell(means, name) for name in names)]]
    if "pooled" in result:
        rows.append(["all voxels together", *(cell(result["pooled"], name) for name in names)])
    top = len(rows)
    rows += [[volume_name(row, row["file"]), *(cell(row, name) for name in names)] for row in result["volumes"]]
    body += ["<h2>Every volume</h2>", table(["file", *(column(name)[0] for name in names)], rows, top)]

    notes = [f"<p>{text(describe(ready))}</p>", f"<p>Data: {text(source)}</p>"]
    notes += [f'<p class="bad">{text(row["error"])}</p>' for row in result["failed"]]
    return page(f"{html.escape(ready.cfg.preset)}: evaluation", f"{what} of {count} volumes", notes, cards, "\n".join(body))
