"""What a volume and what a network made of it look like: pictures under headings, and the words beside them.

The pictures of a run's held-out crops and those of `predict.py evaluate` are made here, so that both pages
(training/report.py) show the same. Shapes: C channels, D H W depth height width; pictures are
(height, width, 3) in [0, 255]. Intensities in [-1, 1]. Version 0.1 (2026-11).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import losses
import pictures
from volumes.config import WINDOWS
from volumes.intensities import Intensity

SOFT_TISSUE = "soft_tissue"
PATIENT = "head and front up, the patient's right on the left"
Window = tuple[str, tuple[float, float]]      # its name, and its limits in HU
GRID = "largest value along an axis; D and H grow upwards, W to the right"


@dataclass
class Views:
    """Pictures of one volume with their words."""
    columns: dict[str, list[Tensor]]          # heading -> a picture for each of `rows`
    rows: list[str]
    words: list[str]                          # what grey, colours and orientation mean, a sentence each
    legend: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)  # name and colour
    error: tuple[str, str] | None = None      # ends of the error's colour bar

    def sheet(self) -> Tensor:
        """All of them in one picture, plain pixels, (height, width, 3) uint8."""
        return pictures.sheet(list(self.columns.values()))

    def note(self) -> dict:
        """All but the pixels, as JSON has it; `from_sheet` undoes both."""
        first = next(iter(self.columns.values()))
        return {
            "columns": list(self.columns),
            "rows": self.rows,
            "sizes": [list(image.shape[:2]) for image in first],
            "words": self.words,
            "legend": [[name, list(colour)] for name, colour in self.legend],
            "error": self.error,
        }


def from_sheet(image: Tensor, note: Mapping) -> Views:
    """The pictures that `sheet` put together, by the note of that time."""
    sizes = [tuple(size) for size in note["sizes"]]
    parts = pictures.panels(image, len(note["columns"]), sizes)
    legend = [(name, tuple(colour)) for name, colour in note["legend"]]
    return Views(dict(zip(note["columns"], parts)), note["rows"], note["words"], legend, note["error"])


# -------------------------------------------------------------------------------- the window

def window_limits(name: str, data_window: str, intensity: Intensity) -> Window | None:
    """Name and limits (HU) of the window in which a CT is shown; None: from -1 to 1 as it is.

    name: log.window. `auto` is soft tissue, or as it is where the run itself trains in a window.
    """
    if intensity.modality != "ct":
        return None
    if name == "auto":
        name = SOFT_TISSUE if data_window == "none" else "none"
    return None if name == "none" else (name, WINDOWS[name])


def windowed(x: Tensor, intensity: Intensity, limits: tuple[float, float] | None) -> Tensor:
    """Intensities in [-1, 1] of the CT's own range -> such that -1 and 1 are the window's limits. Beyond them
    it goes on, so that an error there is seen too.
    """
    if limits is None:
        return x
    (low, high), (first, last) = limits, (intensity.low[0], intensity.high[0])
    hu = (x + 1) / 2 * (last - first) + first
    return 2 * (hu - low) / (high - low) - 1


def grey_words(window: Window | None, intensity: Intensity) -> str:
    """What black and white are."""
    if intensity.modality == "ct":
        name, (low, high) = window or ("the data's own range", (intensity.low[0], intensity.high[0]))
        return f"Black to white: {low:g} to {high:g} HU ({name.replace('_', ' ')})."
    if intensity.modality == "voxel":
        high = ", ".join(f"{value:.4g}" for value in intensity.high)
        of_channels = f" of channels 0 to {len(intensity.high) - 1}" if len(intensity.high) > 1 else ""
        return f"Black: 0; white: magnitude {high} as stored{of_channels} (1 of the network's range)."
    low, high = (", ".join(f"{value:.4g}" for value in ends) for ends in (intensity.low, intensity.high))
    return f"Black to white: {low} to {high} as stored (-1 to 1 of the network's range)."


# -------------------------------------------------------------------------------- the pictures

def of_reconstruction(image: Tensor, recon: Tensor, spacing: Sequence[float], intensity: Intensity,
                      window: Window | None = None,
                      is_picture: bool = False) -> Views:
    """image, recon (C, D, H, W) -> input, reconstruction and error of every channel.

    Slices where there is most foreground; of a voxel grid largest values along D and H, and which voxels are
    occupied in both, were missed, or were added.
    """
    if intensity.modality == "surface":
        return of_points(image, recon, spacing, intensity)
    if intensity.modality == "voxel" and min(image.shape[1:]) > 1:
        return of_grid(image, recon, spacing, intensity)
    limits = window[1] if window else None

    # Slices alone are put into the window: a whole volume may be large.
    def grey(v: Tensor) -> Tensor:
        return pictures.grey(windowed(v, intensity, limits))

    def error_of(a: Tensor, b: Tensor) -> Tensor:
        return pictures.error(windowed(a, intensity, limits), windowed(b, intensity, limits))

    columns: dict[str, list[Tensor]] = {"Input": [], "Reconstruction": [], "Error": []}
    rows: list[str] = []
    for c, (x, y) in enumerate(zip(image, recon, strict=True)):
        weight = (image[c] - intensity.background).abs()
        columns["Input"] += pictures.slices([x], weight, spacing, grey, is_picture)
        columns["Reconstruction"] += pictures.slices([y], weight, spacing, grey, is_picture)
        columns["Error"] += pictures.slices([y, x], weight, spacing, error_of, is_picture)
        rows += row_names(len(columns["Input"]) - len(rows), c, len(image))
    words = [grey_words(window, intensity)] + ([] if is_picture else [orientation()])
    error = ("0", "0.5 and more, of the range from -1 to 1")
    if intensity.modality == "ct":
        low, high = limits or (intensity.low[0], intensity.high[0])
        error = ("0", f"{(high - low) / 4:g} HU and more")
    return Views(columns, rows, words, [], error)


def of_points(image: Tensor, recon: Tensor, spacing: Sequence[float], intensity: Intensity) -> Views:
    """Of the points near a surface: signed distances in slices and which points there are, from two sides."""
    names = "Input", "Reconstruction", "Points"
    columns: dict[str, list[Tensor]] = {name: [] for name in names}
    rows = []
    for c, (x, y) in enumerate(zip(image, recon, strict=True)):
        weight, masks = (x != 0).float(), [(v != 0).float() for v in (y, x)]
        columns["Input"] += pictures.slices([x], weight, spacing, pictures.signed)
        columns["Input"] += pictures.projections([x.abs()], spacing, bright)
        columns["Reconstruction"] += pictures.slices([y], weight, spacing, pictures.signed)
        columns["Reconstruction"] += pictures.projections([y.abs()], spacing, bright)
        columns["Points"] += pictures.slices(masks, weight, spacing, occupied)
        columns["Points"] += pictures.projections(masks, spacing, occupied)
        suffix = f", channel {c}" if len(image) > 1 else ""
        slices = row_names(len(columns["Input"]) - 2 - len(rows), c, len(image))
        rows += [*slices, f"bird's-eye{suffix}", f"front{suffix}"]
    legend = [("inside", (0, 0, 255)), ("outside", (255, 0, 0)), ("point in both", pictures.BOTH),
              ("missed", pictures.MISSED), ("added", pictures.ADDED)]
    legend = [(name, tuple(map(int, colour))) for name, colour in legend]
    words = [f"Signed distances up to {intensity.high[0]:g} voxels, brightest at the surface; black: none.",
             f"Slices: {PATIENT}. The last two rows: {GRID}."]
    return Views(columns, rows, words, legend)


def bright(v: Tensor) -> Tensor:
    """Magnitudes, 0 black and 1 white."""
    return pictures.grey(2 * v - 1)


def of_grid(image: Tensor, recon: Tensor, spacing: Sequence[float], intensity: Intensity) -> Views:
    """Of a voxel grid, mostly empty."""
    columns: dict[str, list[Tensor]] = {"Input": [], "Reconstruction": [], "Error": [], "Occupied": []}
    rows = []

    def heat(v: Tensor) -> Tensor:
        return pictures.error(v, torch.zeros_like(v))

    for c in range(len(image)):
        x, y = image[c] - intensity.background, recon[c] - intensity.background
        columns["Input"] += pictures.projections([x.abs()], spacing, bright)
        columns["Reconstruction"] += pictures.projections([y.abs()], spacing, bright)
        columns["Error"] += pictures.projections([(x - y).abs()], spacing, heat)
        masks = [(v.abs() > losses.OCCUPIED).float() for v in (y, x)]
        columns["Occupied"] += pictures.projections(masks, spacing, occupied)
        suffix = f", channel {c}" if len(image) > 1 else ""
        rows += [f"bird's-eye{suffix}", f"front{suffix}"]
    legend = [("in both", pictures.BOTH), ("missed", pictures.MISSED), ("added", pictures.ADDED)]
    legend = [(name, tuple(map(int, colour))) for name, colour in legend]
    words = [grey_words(None, intensity), f"Views: {GRID}.",
             f"Occupied: magnitude above {losses.OCCUPIED:g}, of the projected voxels."]
    return Views(columns, rows, words, legend, ("0", "0.5 and more, of the range from -1 to 1"))


def occupied(found: Tensor, true: Tensor) -> Tensor:
    return pictures.occupancy(found > 0.5, true > 0.5)


def of_labels(image: Tensor, labels: Mapping[str, Tensor], spacing: Sequence[float], intensity: Intensity,
              window: Window | None = None, is_picture: bool = False,
              names: Mapping[int, str] | None = None) -> Views:
    """image (C, D, H, W), labels: heading -> (D, H, W) -> the first channel, with contours of each of labels.

    names: what the legend says of a class, in the place of its number. Slices where there is most of the
    first label.
    """
    x = windowed(image, intensity, window[1] if window else None)[0]
    # The first label decides, so that the slices stay the same as what is found changes.
    masks = [label > 0 for label in labels.values()]
    weight = (masks[0] if masks[0].any() else torch.stack(masks).any(0)).float()
    columns = {"Input": pictures.slices([x], weight, spacing, pictures.grey, is_picture)}
    for heading, label in labels.items():
        columns[heading] = pictures.slices([x, label], weight, spacing, pictures.coloured, is_picture)
    rows = row_names(len(columns["Input"]), 0, 1)
    present = sorted({int(k) for label in labels.values() for k in label.unique() if k > 0})
    names = names or {}
    legend = []
    for k in present:
        colour = tuple(int(v) for v in pictures.class_colour(torch.tensor(float(k))).round())
        legend.append((names.get(k, f"class {k}"), colour))
    words = [grey_words(window, intensity)] + ([] if is_picture else [orientation()])
    return Views(columns, rows, words, legend)


def row_names(count: int, channel: int, channels: int) -> list[str]:
    """Of the slices of one channel: three, or the one of a flat volume."""
    suffix = f"channel {channel}" if channels > 1 else ""
    if count == 1:
        return [suffix]
    return [f"{name}, {suffix}" if suffix else name for name in ("axial", "coronal", "sagittal")]


def orientation() -> str:
    return f"Orientation: {PATIENT}."
