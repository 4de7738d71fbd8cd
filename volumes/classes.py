"""What the values of label files mean: how many classes there are, and which stored value each has.

Values are classes as they are stored, except of pictures (masks of 0 and 255). Version 1.1.
"""
import dataclasses
from collections.abc import Sequence

from volumes import formats
from volumes.config import MAX_CLASSES, DataConfig
from volumes.entries import Entry, Groups
from volumes.files import DataError, Say, refuse, show, sizes
from volumes.splits import NONE_HELD_OUT

MAX_VALUES = 64   # of label pictures that are numbered in their order


def settle_classes(training: Groups, held_out: Groups, cfg: DataConfig,
                   say: Say) -> tuple[Groups, Groups, int, tuple[int, ...] | None]:
    """The number of classes and what stored values they have, set in every entry.

    Held-out files with other labels are refused. Values are classes as they are stored, except of pictures
    (masks of 0 and 255): where these are not 0, 1, ... in the training set, they are numbered in their
    order.
    """
    # First which stored values are classes.
    found = {value for group in training for entry in group for value in entry.label_ids}
    ids = sorted(found - {cfg.ignore_label})
    largest, values = max(ids, default=0), cfg.label_values
    are_pictures = all(entry.label_path and formats.is_picture(entry.label_path)
                       for group in training for entry in group)
    is_in_order = ids == list(range(len(ids)))
    if values is None and are_pictures and not is_in_order and largest >= (cfg.classes or 0):
        values = numbered_in_order(ids, cfg)
        say(f"data: the label pictures hold the values {sizes(values)}: classes 0 to {len(values) - 1} "
            f"(data.label_values names others)")
    least = len(values) if values else largest + 1
    classes = max(2, cfg.classes or least)
    ignored = cfg.ignore_label
    if values and ignored in range(len(values)) and values[ignored] != ignored:
        raise DataError(f"{show(cfg.path or 'synthetic')}: data.ignore_label={ignored} is also the class of "
                        f"the stored value {values[ignored]}; choose a data.ignore_label of {classes} or "
                        f"more")

    # Then the files that hold no other ones.
    def usable(group: list[Entry]) -> bool:
        try:
            if values is None:
                check_labels(group[0], classes, cfg)
            elif cfg.label_values is None:
                check_values(group[0], values, cfg)
            return True
        except DataError as error:
            refuse(error, cfg.strict, say)
            return False

    def settled(groups: Groups) -> Groups:
        return [[dataclasses.replace(entry, label_values=values, ignore_label=ignored) for entry in group]
                for group in groups if usable(group)]
    was_listed = bool(held_out)
    training, held_out = settled(training), settled(held_out)
    if not training:
        raise DataError(f"{show(cfg.path or 'synthetic')}: no training volume has labels below "
                        f"data.classes={classes}; set data.classes")
    if was_listed and not held_out:
        say(NONE_HELD_OUT)
    return training, held_out, classes, values


def numbered_in_order(ids: Sequence[int], cfg: DataConfig) -> tuple[int, ...]:
    """Stored values of the classes, for label pictures that hold `ids`."""
    values = tuple(ids) if len(ids) > 1 else (0, *ids)
    if len(values) > MAX_VALUES or len(values) > (cfg.classes or MAX_VALUES):
        and_classes = f", and data.classes={cfg.classes}" if cfg.classes else ""
        raise DataError(f"{show(cfg.path)}: the label pictures hold {len(values)} different values, "
                        f"{sizes(values[:5])}, ..., {values[-1]}{and_classes} (saved as JPEG, smoothed?); "
                        f"save masks as PNG with one value per class, or set data.label_values")
    return values


def check_labels(entry: Entry, classes: int | None, cfg: DataConfig) -> None:
    """Raises DataError when a label lies outside of [0, classes).

    Below MAX_CLASSES while the number of classes is not known.
    """
    ids = [value for value in entry.label_ids if value != cfg.ignore_label]
    if ids and (ids[0] < 0 or ids[-1] >= (classes or MAX_CLASSES)):
        what = f"they lie in 0 to {MAX_CLASSES - 1}"
        if classes:
            what = f"with {classes} classes they lie in 0 to {classes - 1}"
        raise DataError(f"{show(entry.label_path or entry.name)}: labels from {ids[0]} to {ids[-1]}; "
                        f"{what}: set data.classes, data.ignore_label or data.label_values, or repair the "
                        f"file")


def check_values(entry: Entry, values: Sequence[int], cfg: DataConfig) -> None:
    """Raises DataError when a file holds other values than the training set does."""
    others = set(entry.label_ids) - {*values, cfg.ignore_label}
    if others:
        raise DataError(f"{show(entry.label_path)}: labels {sizes(sorted(others)[:8])} besides the training "
                        f"set's {sizes(values[:8])}; repair the file or set data.label_values")
