"""Figures of whole volumes: what a network gives back beside what it was given, over a data set.

A row is what is known of one volume: file, shape, figures, seconds. The result of an evaluation holds all rows, their means, and what the
task adds up over all voxels. Intensities in [-1, 1], so PSNR and SSIM have data range 2. Memory is in GiB. Version 0.3 (2026-11).
"""
from __future__ import annotations

import argparse
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import data
import losses
from data import Intensity
from training.cases import Case
from training.console import short_number
from training.devices import peak_gib
from training.ready import Ready
from training.task import Scored

COLUMNS = {                                                      # key of a row -> heading and format
    "psnr": ("PSNR", "{:.2f} dB"), "ssim": ("SSIM", "{:.4f}"), "l1": ("L1", "{:.4f}"), "sharpness": ("sharpness", "{:.3f}"),
    "iou": ("IoU", "{:.4f}"), "dice": ("Dice", "{:.4f}"),
    "bits_per_voxel": ("bits/voxel", "{:.3f}"), "compression": ("ratio", "{:.1f}"),
    "bits_per_voxel_16": ("bits/voxel, 16-bit", "{:.3f}"), "compression_16": ("ratio, 16-bit", "{:.1f}"),
    "codebook_usage": ("codes used", "{:.1%}"), "perplexity": ("perplexity", "{:.1f}")}
FIRST = ("psnr", "ssim", "l1", "iou", "dice")                    # in a volume's line
NOT_AVERAGED = ("file", "volume", "shape", "channels", "seconds", "voxels_per_second", "codebook_usage", "perplexity")
OVER_ALL = ("codebook_usage", "perplexity")                      # of all volumes together, beside the means


def held_out(items: Sequence[data.Item], ready: Ready) -> list[data.Item]:
    """Those that the run did not train on, told by their names. ValueError when there are none, or the checkpoint has no names."""
    names = ready.facts["data"].get("training")
    if names is None:
        raise ValueError(f"--split held-out: {ready.path} does not name its training files; leave the flag out")
    trained = {re.sub(r"_t\d{3,}$", "", name) for name in names} | set(names)  # volume 3 of a 4-D X is X_t003
    left = [item for item in items if data._stem(item.path) not in trained]
    if not left:
        raise ValueError(f"--split held-out: all of {len(items)} files were trained on; leave the flag out")
    return left


# ------------------------------------------------------------------------------------------------ one volume

def score_reconstruction(ready: Ready, case: Case, number: int, options: argparse.Namespace, tick: Callable | None) -> Scored:
    """What `reconstruct` gives back of volume `number`, for a task that does not say itself how it is evaluated."""
    volume, intensity = case.volumes[number]
    started = time.monotonic()
    recon = ready.task.reconstruct(ready, volume, tick)
    seconds = time.monotonic() - started
    return Scored(compared(recon, volume, intensity, ready.device), recon, seconds, {})


def compared(recon: np.ndarray, volume: np.ndarray, intensity: Intensity, device: torch.device) -> dict[str, Any]:
    """Figures of a reconstruction (C, D, H, W) of normalised intensities; iou where they are a voxel grid's."""
    a, b = (torch.from_numpy(array)[None].to(device) for array in (recon, volume))
    scores = fidelity(a, b) | {"sharpness": float(losses.sharpness(a, b))}
    if intensity.modality == "voxel":
        scores["iou"] = float(losses.occupancy_iou(a, b, intensity.background))
    if len(volume) > 1:
        scores["channels"] = [fidelity(a[:, c:c + 1], b[:, c:c + 1]) for c in range(len(volume))]
    return scores


def fidelity(recon: Tensor, target: Tensor) -> dict[str, float]:
    """(1, C, D, H, W) of normalised intensities, data range 2."""
    return {"psnr": float(losses.psnr(recon, target)), "ssim": float(losses.ssim(recon, target)),
            "l1": float(losses.reconstruction_loss(recon, target, "l1"))}


# ------------------------------------------------------------------------------------------------ all volumes

@dataclass
class Totals:
    """Over all volumes."""
    voxels: int = 0
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)        # of Scored.sums

    def add(self, volume: np.ndarray, scored: Scored) -> None:
        self.voxels, self.seconds = self.voxels + volume[0].size, self.seconds + scored.seconds
        for name, part in scored.sums.items():
            self.sums[name] = self.sums.get(name, 0) + part


def row_of(name: dict, volume: np.ndarray, scored: Scored) -> dict[str, Any]:
    """name: file, and which volume of it."""
    return name | {"shape": list(volume.shape[1:])} | scored.figures | {
        "seconds": scored.seconds, "voxels_per_second": volume[0].size / scored.seconds}


def summary(ready: Ready, rows: list[dict], failed: list[dict], totals: Totals) -> dict:
    """The content of --json. mean: over volumes, finite figures alone; pooled (seg): from all voxels together."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in NOT_AVERAGED]
    mean = {name: average([row[name] for row in rows if name in row]) for name in names}
    if rows and "channels" in rows[0]:
        mean["channels"] = [{name: average([row["channels"][c][name] for row in rows]) for name in ("psnr", "ssim", "l1")}
                            for c in range(len(rows[0]["channels"]))]
    result = {"volumes": rows, "mean": mean, "peak_gib": peak_gib(ready.device),
              "voxels_per_second": totals.voxels / totals.seconds if totals.seconds else None}
    return result | ready.task.pooled(totals.sums) | {"failed": failed}


def average(values: Sequence[float]) -> float:
    values = [value for value in values if math.isfinite(value)]
    return sum(values) / len(values) if values else math.nan


def finite(value):
    """JSON has no nan and no infinity: null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ranked_by(ready: Ready, rows: Sequence[dict]) -> tuple[str, bool]:
    """The figure by which volumes are called good or bad, the first of the task's that they have; and whether higher is better."""
    known = [name for name in ready.task.METRICS if name in rows[0]]
    name = known[0] if known else "psnr"
    return name, ready.task.METRICS.get(name, True)


def worst_median_best(rows: Sequence[dict], name: str, higher_is_better: bool = True) -> dict[str, int]:
    """Up to three row numbers, the worst first; equal ones are not repeated."""
    def goodness(number: int) -> float:
        value = rows[number][name]
        if math.isnan(value):
            return -math.inf
        return value if higher_is_better else -value
    order = sorted(range(len(rows)), key=goodness)
    if len(order) == 1:
        return {"The only": order[0]}
    chosen = {"Worst": order[0], "Median": order[(len(order) - 1) // 2], "Best": order[-1]}
    if len(order) == 2:
        del chosen["Median"]
    return chosen


# ------------------------------------------------------------------------------------------------ as text

def column(name: str) -> tuple[str, str]:
    return COLUMNS.get(name, (name.replace("dice_", "Dice "), "{:.4f}"))


def cell(row: dict, name: str) -> str:
    value = row.get(name)
    return "-" if value is None or not math.isfinite(value) else column(name)[1].format(value)


def columns_of(result: dict) -> list[str]:
    return [name for name in result["mean"] if name != "channels"] + [name for name in OVER_ALL if name in result]


def means_of(result: dict) -> dict:
    """The means, with what is known of all volumes together."""
    return result["mean"] | {name: result[name] for name in OVER_ALL if name in result}


def row_text(row: dict) -> str:
    figures = ", ".join(f"{column(name)[0]} {cell(row, name)}" for name in FIRST if name in row)
    return f"{data._sizes(row['shape'])}, {row['seconds']:.1f} s, {short_number(row['voxels_per_second'])} voxels/s, {figures}"


def print_table(result: dict) -> None:
    """Means and totals, as lines that fit a terminal."""
    names, rows, mean, pooled = columns_of(result), result["volumes"], means_of(result), result.get("pooled")
    width = max([len("all volumes"), *(len(column(name)[0]) for name in names)])

    def line(heading: str, *cells: str) -> None:
        print(f"{heading:{width}}" + "".join(f"  {text:>12}" for text in cells))
    print()
    line("", "mean", "least", "most", *(["pooled"] if pooled else []))
    for name in names:
        known = [row for row in rows if math.isfinite(row.get(name, math.nan))]
        least, most = "-", "-"
        if known:
            least = cell(min(known, key=lambda row, name=name: row[name]), name)
            most = cell(max(known, key=lambda row, name=name: row[name]), name)
        line(column(name)[0], cell(mean, name), least, most, *([cell(pooled, name)] if pooled else []))
    for c, row in enumerate(mean.get("channels", ())):
        print(f"{f'channel {c}':{width}}  " + ", ".join(f"{column(name)[0]} {cell(row, name)}" for name in row))

    last = [f"{len(rows)} volumes", f"peak {result['peak_gib']:.2f} GiB"]
    if result["voxels_per_second"]:
        last.insert(1, f"{short_number(result['voxels_per_second'])} voxels/s")
    if result["failed"]:
        last.append(f"{len(result['failed'])} files failed")
    print(", ".join(last))
