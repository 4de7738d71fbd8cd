"""Figures of whole volumes: what a network gives back, compared with what it was given, over a data set.

A row is what is known of one volume: its file, its shape, its figures, how long it took. The result of an
evaluation holds all rows, their means, and what the task makes of its sums over all volumes.

Shapes: C channels, D H W depth height width. Intensities in [-1, 1], so PSNR and SSIM have data range 2.
Version 0.3 (2026-11).
"""
from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import losses
import metrics
from training.cases import Case
from training.console import short_number
from training.devices import peak_gib
from training.facts import Trained
from training.ready import Ready
from training.task import Scored
from volumes.config import WINDOWS
from volumes.files import sizes
from volumes.find import Item
from volumes.intensities import Intensity
from volumes.told import counted

# Key of a row -> heading and format.
COLUMNS = {
    "psnr": ("PSNR", "{:.2f} dB"),
    "ssim": ("SSIM", "{:.4f}"),
    "l1": ("L1", "{:.4f}"),
    "l1_l2": ("L1 + L2", "{:.4f}"),
    "ms_ssim": ("MS-SSIM", "{:.4f}"),
    "mae_hu": ("error", "{:.1f} HU"),
    "sharpness": ("sharpness", "{:.3f}"),
    "iou": ("IoU", "{:.4f}"),
    "dice": ("Dice", "{:.4f}"),
    "sign": ("signs", "{:.1%}"),
    "l1_decoded": ("L1 decoded", "{:.4f}"),
    "l1_constant": ("L1 of median", "{:.4f}"),
    "l1_pca": ("L1 of PCA", "{:.4f}"),
    "surface_dice": ("surface Dice", "{:.4f}"),
    "points": ("points", "{:,.0f}"),
    "tokens": ("tokens", "{:,.0f}"),
    "hd95": ("HD95", "{:.2f} mm"),
    "missed": ("classes missed", "{:.2f}"),
    "bits_per_voxel": ("bits/voxel", "{:.3f}"),
    "compression": ("compression", "{:.1f}x"),
    "bits_per_voxel_16": ("bits/voxel, 16-bit", "{:.3f}"),
    "compression_16": ("compression, 16-bit", "{:.1f}x"),
    "codebook_usage": ("codes used", "{:.1%}"),
    "perplexity": ("perplexity", "{:.1f}"),
}
FIDELITY = ("psnr", "ssim", "l1")
# What the line of one volume shows.
FIRST = (*FIDELITY, "mae_hu", "iou", "dice", "surface_dice", "hd95")
# HU windows inside which a CT's reconstruction is measured too; names of data.window.
HU_WINDOWS = ("lung", "soft_tissue", "bone")
# PSNR, in dB, that a perfect reconstruction counts with, and none more: infinity would be every mean.
MOST_PSNR = 100.0
# Figures that the task has of all volumes together, so that they are not averaged over the volumes.
OVER_ALL = ("codebook_usage", "perplexity")
NOT_AVERAGED = ("file", "name", "volume", "shape", "channels", "seconds", "voxels_per_second", *OVER_ALL)


def chosen(items: Sequence[Item], ready: Ready, is_held_out: bool) -> list[Item]:
    """The items to evaluate: all, or those that the run did not train on. Says how many it trained on.

    Raises ValueError when none is left, or where the checkpoint does not name its training files.
    """
    trained = Trained(ready.facts["data"])
    if is_held_out and not trained.is_known:
        raise ValueError(f"--split held-out: {ready.path} does not name its training files; leave the flag "
                         f"out")
    # A file of which one volume was trained on is not held out.
    left = [item for item in items if item not in trained]
    trained.tell(len(items) - len(left), len(items), ready.path)
    if not is_held_out:
        return list(items)
    if not left:
        raise ValueError(f"--split held-out: all of {len(items)} files were trained on; leave the flag out")
    return left


# -------------------------------------------------------------------------------- one volume

def score_reconstruction(ready: Ready, case: Case, number: int, options: argparse.Namespace,
                         tick: Callable | None) -> Scored:
    """How well `reconstruct` gives back volume `number`; for a task that does not say how it is evaluated."""
    volume, intensity = case.volumes[number]
    started = time.monotonic()
    recon = ready.task.reconstruct(ready, volume, tick)
    seconds = time.monotonic() - started
    scores, sums = compared(recon, volume, intensity, ready.device)
    return Scored(scores, recon, seconds, sums)


def compared(recon: np.ndarray, volume: np.ndarray, intensity: Intensity,
             device: torch.device) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures of a reconstruction, compared with its volume, both (C, D, H, W) of normalised intensities;
    and sums over voxels, whose ratio over all volumes is their sharpness.

    The figures are psnr, ssim, l1, ms_ssim and sharpness, for a CT those of `hu_figures`, and for voxel grids
    iou of the occupied voxels. Of several channels `channels` holds the first three for each.
    """
    found = torch.from_numpy(recon)[None].to(device)             # (1, C, D, H, W)
    target = torch.from_numpy(volume)[None].to(device)
    scores = fidelity(found, target) | {"ms_ssim": float(metrics.ms_ssim(found, target))}
    if intensity.modality == "ct":
        scores |= hu_figures(found, target, (intensity.low[0], intensity.high[0]))
    energy = losses.gradient_energy(found, target).cpu().double()
    scores["sharpness"] = float(energy[0] / energy[1])
    if intensity.modality == "voxel":
        scores["iou"] = float(losses.occupancy_iou(found, target, intensity.background))
    if len(volume) > 1:
        scores["channels"] = []
        for c in range(len(volume)):
            one = fidelity(found[:, c:c + 1], target[:, c:c + 1])
            scores["channels"].append(one)
    return scores, {"energy": energy}


def fidelity(recon: Tensor, target: Tensor) -> dict[str, float]:
    """psnr (MOST_PSNR at most), ssim and l1 of (1, C, D, H, W) of normalised intensities, data range 2."""
    return {
        "psnr": min(MOST_PSNR, float(losses.psnr(recon, target))),
        "ssim": float(losses.ssim(recon, target)),
        "l1": float(losses.reconstruction_loss(recon, target, "l1")),
    }


def hu_figures(recon: Tensor, target: Tensor, limits: tuple[float, float]) -> dict[str, float]:
    """mae_hu, the mean error in HU, and mae_hu, psnr and ssim inside of HU_WINDOWS.

    recon, target (1, C, D, H, W) normalised; limits: HU of -1 and 1. Inside a window is what a reader sees
    there: both are clipped to it, and its width is the data range of PSNR and SSIM. mae_hu_NAME is over the
    voxels whose target lies in the window. A window is cut where the network sees no HU, and left out where
    less than half of it is left.
    """
    low, high = limits
    per_unit = (high - low) / 2
    error = (recon - target).abs()
    scores = {"mae_hu": float(error.mean()) * per_unit}
    for name in HU_WINDOWS:
        least, most = WINDOWS[name]
        width = min(most, high) - max(least, low)
        if width < (most - least) / 2:
            continue
        # HU to [-1, 1] of the limits, and from there to [-1, 1] of the window.
        bottom, top = ((hu - low) / per_unit - 1 for hu in (max(least, low), min(most, high)))
        inside = (target >= bottom) & (target <= top)
        scores[f"mae_hu_{name}"] = float(error[inside].mean()) * per_unit
        seen = [(x.clamp(bottom, top) - bottom) * (2 / (top - bottom)) - 1 for x in (recon, target)]
        scores[f"psnr_{name}"] = min(MOST_PSNR, float(losses.psnr(*seen)))
        scores[f"ssim_{name}"] = float(losses.ssim(*seen))
    return scores


def row_of(item: Item, case: Case, number: int, scored: Scored) -> dict[str, Any]:
    """All that is known of volume `number` of a file; the number is named where the file has several."""
    volume = case.arrays[number]
    row = {"file": str(item.path), "name": item.known_as}
    if case.numbers:
        row["volume"] = case.numbers[number]
    speed = {"seconds": scored.seconds, "voxels_per_second": volume[0].size / scored.seconds}
    return row | {"shape": list(volume.shape[1:])} | scored.figures | speed


# -------------------------------------------------------------------------------- all volumes

@dataclass
class Totals:
    """What is added up over all volumes."""
    voxels: int = 0
    seconds: float = 0.0                                         # that the network took
    sums: dict[str, Tensor] = field(default_factory=dict)        # of what the task counts (Scored.sums)

    def add(self, volume: np.ndarray, scored: Scored) -> None:
        self.voxels += volume[0].size
        self.seconds += scored.seconds
        for name, part in scored.sums.items():
            self.sums[name] = self.sums.get(name, 0) + part


def summary(ready: Ready, rows: list[dict], failed: list[dict], totals: Totals) -> dict:
    """The content of --json: all rows, their means, speed, memory, what the task counted, failures."""
    # First the means, each over the rows that have the figure, in the order in which the figures appear.
    names = dict.fromkeys(name for row in rows for name in row)
    mean = {}
    for name in names:
        if name not in NOT_AVERAGED:
            mean[name] = average([row[name] for row in rows if name in row])
    if "energy" in totals.sums:
        # Not the mean of the ratios: a nearly flat volume alone would make it.
        recon, target = totals.sums["energy"].tolist()
        mean["sharpness"] = recon / target if target else math.nan
    if rows and "channels" in rows[0]:
        mean["channels"] = [mean_of_channel(rows, c) for c in range(len(rows[0]["channels"]))]

    # Then what is known of all volumes together.
    speed = totals.voxels / totals.seconds if totals.seconds else None
    result = {"volumes": rows, "mean": mean, "peak_gib": peak_gib(ready.device), "voxels_per_second": speed}
    return result | ready.task.pooled(totals.sums) | {"failed": failed}


def mean_of_channel(rows: Sequence[dict], channel: int) -> dict[str, float]:
    return {name: average([row["channels"][channel][name] for row in rows]) for name in FIDELITY}


def average(values: Sequence[float]) -> float:
    """The mean of the finite values; nan where there are none."""
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def finite(value: Any) -> Any:
    """The same with None in the place of nan and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def ranked_by(ready: Ready, rows: Sequence[dict]) -> tuple[str, bool]:
    """The figure that makes a volume good or bad, and whether higher is better.

    It is the first of the task's METRICS that the rows have, else their first figure.
    """
    for name, higher_is_better in ready.task.METRICS.items():
        if name in rows[0]:
            return name, higher_is_better
    return next(name for name in rows[0] if name not in NOT_AVERAGED), True


def worst_median_best(rows: Sequence[dict], name: str, higher_is_better: bool = True) -> dict[str, int]:
    """What -> number of the row, the worst first. Two rows have no median, one row is `The only`."""
    def goodness(number: int) -> float:
        value = rows[number][name]
        if math.isnan(value):
            return -math.inf
        return value if higher_is_better else -value
    order = sorted(range(len(rows)), key=goodness)
    if len(order) == 1:
        return {"The only": order[0]}
    if len(order) == 2:
        return {"Worst": order[0], "Best": order[1]}
    return {"Worst": order[0], "Median": order[(len(order) - 1) // 2], "Best": order[-1]}


# -------------------------------------------------------------------------------- as text

def column(name: str) -> tuple[str, str]:
    """Heading and format of a figure; those of dice_3 are `Dice 3` and Dice's."""
    if name in COLUMNS:
        return COLUMNS[name]
    # The figure of a class or of an HU window is named by the longest figure that its name begins with.
    for known in sorted(COLUMNS, key=len, reverse=True):
        if name.startswith(f"{known}_"):
            first, form = COLUMNS[known]
            return f"{first} {name.removeprefix(known)[1:].replace('_', ' ')}", form
    return name, "{:.4g}"


def heading(name: str) -> str:
    return column(name)[0]


def cell(row: dict, name: str) -> str:
    """A figure of a row as text; `-` where it has none, or one that is not finite."""
    value = row.get(name)
    if value is None or not math.isfinite(value):
        return "-"
    return column(name)[1].format(value)


def columns_of(result: dict) -> list[str]:
    """The figures of a result, in the order that they are shown in."""
    means = [name for name in result["mean"] if name != "channels"]
    return means + [name for name in OVER_ALL if name in result]


def means_of(result: dict) -> dict:
    """The means, with what is known of all volumes together."""
    return result["mean"] | {name: result[name] for name in OVER_ALL if name in result}


def row_text(row: dict) -> str:
    """One volume in one line."""
    pace = short_number(row["voxels_per_second"])
    parts = [sizes(row["shape"]), f"{row['seconds']:.1f} s", f"{pace} voxels/s"]
    parts += [f"{heading(name)} {cell(row, name)}" for name in FIRST if name in row]
    return ", ".join(parts)


def print_table(result: dict) -> None:
    """Means and totals, as lines that fit a terminal."""
    names, rows, means, pooled = columns_of(result), result["volumes"], means_of(result), result.get("pooled")
    width = max([len("all volumes"), *(len(heading(name)) for name in names)])

    def line(first: str, *cells: str) -> None:
        print(f"{first:{width}}" + "".join(f"  {text:>12}" for text in cells))

    # A line for each figure: the mean, the least and the most of any volume, and of all voxels together.
    print()
    line("", "mean", "least", "most", *(["pooled"] if pooled else []))
    for name in names:
        known = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        known.sort(key=lambda row, name=name: row[name])
        least, most = "-", "-"
        if known:
            least, most = cell(known[0], name), cell(known[-1], name)
        line(heading(name), cell(means, name), least, most, *([cell(pooled, name)] if pooled else []))

    # A line for each channel, and one for all.
    for c, row in enumerate(means.get("channels", ())):
        figures = ", ".join(f"{heading(name)} {cell(row, name)}" for name in row)
        print(f"{f'channel {c}':{width}}  {figures}")
    parts = [counted(len(rows), "volume")]
    if result["voxels_per_second"]:
        parts.append(f"{short_number(result['voxels_per_second'])} voxels/s")
    parts.append(f"peak {result['peak_gib']:.2f} GiB")
    if result["failed"]:
        parts.append(f"{len(result['failed'])} files failed")
    print(", ".join(parts))
