"""Files as a ready checkpoint takes them: prepared as its run prepared its own.

A case keeps what it takes to write a result back onto the source's grid (origin).

Shapes: C channels, D H W depth height width, T volumes of a 4-D file. Version 0.3 (2026-11).
"""
from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np

from training.console import clear_line
from training.ready import Ready
from volumes import formats
from volumes.config import DataConfig
from volumes.files import DataError, show
from volumes.find import Item
from volumes.intensities import Intensity
from volumes.loading import load
from volumes.volume import Origin


class Case(NamedTuple):
    """A file, prepared as the checkpoint's run prepared its own."""
    volumes: list[tuple[np.ndarray, Intensity]]                  # each (C, D, H, W); T of a series
    affine: np.ndarray                                           # of the network's grid
    spacing: tuple[float, float, float]                          # mm, D H W
    labels: list[np.ndarray]                                     # (D, H, W) class numbers, on that grid
    origin: Origin
    numbers: tuple[int, ...] = ()                                # of the volumes, where the file has several

    @property
    def arrays(self) -> list[np.ndarray]:
        return [volume for volume, _ in self.volumes]

    @property
    def is_picture(self) -> bool:
        return self.origin.kind == ".png"


def read_case(item: Item, ready: Ready, cfg: DataConfig) -> Case:
    """Raises DataError, one line that names the file, where it cannot be read or does not fit the network."""
    loaded = load(item, cfg)
    first, intensity = loaded.volumes[0]
    if loaded.guessed and cfg.modality == "auto":
        clear_line()
        print(f"{show(item.path)}: taken for {intensity.rule} by its values; --data.modality says "
              f"otherwise")
    found, wanted = len(first), ready.task.channels(ready.cfg)
    if found != wanted:
        channels = "channel" if found == 1 else "channels"
        raise DataError(f"{item.path}: {found} {channels}, the checkpoint takes {wanted}; use "
                        f"--data.select_channel or --data.four_d, or a checkpoint for such files")
    labels = [class_numbers(label, item, ready, cfg) for label in loaded.labels]
    origin = formats.origin_of(item.path, loaded.source, cfg.channel_axis)
    origin = dataclasses.replace(origin, blank=loaded.blank)
    if item.more:                                                # their types and scales may differ
        shape = (*origin.shape, 1 + len(item.more))
        origin = dataclasses.replace(origin, shape=shape, dtype="float32", slope=1.0, inter=0.0)
    return Case(loaded.volumes, loaded.affine, loaded.spacing, labels, origin, loaded.numbers)


def class_numbers(label: np.ndarray, item: Item, ready: Ready, cfg: DataConfig) -> np.ndarray:
    """Values on disk (D, H, W) -> class numbers int64; the ignored value stays as it is.

    Raises DataError for a value that is no class.
    """
    classes, ignore = ready.classes, ready.cfg.data.ignore_label
    ignored = [] if ignore is None else [ignore]
    found = label.astype(np.int64)
    if cfg.label_values is not None:
        if ready.cfg.data.label_values is None:                  # so they are what the training labels held
            unknown = np.setdiff1d(np.unique(label), [*cfg.label_values, *ignored])
            if len(unknown):
                raise DataError(f"{item.label}: holds the label {unknown[0]:g}, the training labels held "
                                f"{list(cfg.label_values)}; give the stored value of each class, background "
                                f"first, as --data.label_values")
        found = np.zeros_like(found)
        for k, value in enumerate(cfg.label_values):
            found[label == value] = k
    if ignore is not None:
        found[label == ignore] = ignore
    wrong = np.setdiff1d(np.unique(found), [*range(classes), *ignored])
    if len(wrong):
        raise DataError(f"{item.label}: holds the label {wrong[0]}, the checkpoint's classes are 0 to "
                        f"{classes - 1}; give the stored value of each class, background first, as "
                        f"--data.label_values")
    return found


def label_of(case: Case, number: int) -> np.ndarray:
    """Of volume `number`: a series may have one label for all."""
    return case.labels[min(number, len(case.labels) - 1)]
