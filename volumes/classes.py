"""What the values of label files mean: how many classes there are, and which stored value each has.

Values are classes as they are stored where they are 0, 1, 2, ...; where some are missing between them
(masks of 0 and 255, atlases) they are numbered in their order, whatever the format. Version 1.2.
"""
import dataclasses
from collections.abc import Sequence

from volumes import formats
from volumes.config import MAX_CLASSES, DataConfig
from volumes.entries import Entry, Groups
from volumes.files import DataError, Say, refuse, show, sizes
from volumes.splits import NONE_HELD_OUT

MAX_VALUES = 64   # of label pictures that are numbered in their order
MAX_GAPPED = 256  # of a file whose largest value is no class number
SHOWN = 16        # values that the line about them names


def settle_classes(training: Groups, held_out: Groups, cfg: DataConfig, say: Say,
                   declared: int = 0) -> tuple[Groups, Groups, int, tuple[int, ...] | None]:
    """The number of classes and what stored values they have, set in every entry.

    Values are classes as they are stored where they are 0, 1, ... in the training set, or where data.classes
    says that there are more than the largest; else they are numbered in their order, and a line says so.
    Held-out files with other labels are refused. declared: how many classes a dataset.json names, from 0 on;
    it counts where no label lies beyond.
    """
    # First which stored values are classes.
    found = {value for group in training for entry in group for value in entry.label_ids}
    largest, values = max(found - {cfg.ignore_label}, default=0), cfg.label_values
    if cfg.classes is None and values is None and declared > largest:
        cfg = dataclasses.replace(cfg, classes=declared)
    # A value that is missing between the training set's may stand in a held-out file.
    found |= {value for group in held_out for entry in group for value in entry.label_ids if value < largest}
    ids = sorted(found - {cfg.ignore_label})
    if values is None and largest >= (cfg.classes or 0):
        values = numbered_in_order(ids, are_all_pictures(training), cfg)
        if values is not None:
            more = ", ..." if len(values) > SHOWN else ""
            as_stored = ""
            if largest < MAX_CLASSES:
                as_stored = f", data.classes={largest + 1} takes them as they are"
            say(f"data: the labels hold the values {sizes(values[:SHOWN])}{more}: classes 0 to "
                f"{len(values) - 1}, in their order (data.label_values names others{as_stored})")
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
    tell_flip(cfg, classes, say)
    return training, held_out, classes, values


def with_ignored(cfg: DataConfig, ignored: int | None, say: Say) -> DataConfig:
    """The config with the ignored value of a dataset.json, where it names none itself."""
    if ignored is not None and cfg.ignore_label is None:
        say(f"data: dataset.json has an `ignore` label: {ignored} is left out of the loss "
            f"(data.ignore_label)")
        cfg = dataclasses.replace(cfg, ignore_label=ignored)
    return cfg


def tell_regions(regions: dict[str, tuple[int, ...]], say: Say) -> None:
    """A line where a dataset.json declares regions, which overlap, while classes do not."""
    if regions:
        shown = []
        for name, values in list(regions.items())[:SHOWN]:
            more = " + ..." if len(values) > SHOWN else ""
            shown.append(f"{name} = {' + '.join(map(str, values[:SHOWN]))}{more}")
        listed = "; ".join(shown)
        say(f"data: dataset.json declares regions ({listed}): they are not trained as such; each stored "
            f"value is a class of its own, and a region is the union of its classes")


def class_names(names: dict[int, str], classes: int, values: Sequence[int] | None,
                say: Say) -> tuple[str, ...]:
    """The name of each class; empty where dataset.json names none. Said in a line."""
    if not names:
        return ()
    found = tuple(names.get(value, str(value)) for value in (values or range(classes)))
    listed = ", ".join(f"{number} {name}" for number, name in enumerate(found[:SHOWN]))
    say(f"data: classes of dataset.json: {listed}{', ...' if len(found) > SHOWN else ''}")
    return found


def tell_flip(cfg: DataConfig, classes: int, say: Say) -> None:
    """A line where crops are mirrored left to right and labels may name sides."""
    if cfg.flip != "none" and "W" in cfg.flip.upper() and classes > 2:
        say(f"data: data.flip={cfg.flip} exchanges left and right in {classes} classes; if some are of one "
            f"side (left kidney, right lung), leave W out")


def are_all_pictures(groups: Groups) -> bool:
    return all(entry.label_path and formats.is_picture(entry.label_path)
               for group in groups for entry in group)


def numbered_in_order(ids: Sequence[int], are_pictures: bool, cfg: DataConfig) -> tuple[int, ...] | None:
    """Stored values of the classes, for labels that hold `ids`; None where these are classes as they are.

    0 is the background of volumes, whether it occurs or not. Raises DataError for pictures of many values.
    """
    values = tuple(sorted({0, *ids}))
    if are_pictures and len(ids) > 1:
        values = tuple(ids)
    if list(values) == list(range(len(values))):
        return None
    # An ignored value among the numbers: they are taken as they are, for it lies between them on purpose.
    ignored = cfg.ignore_label
    if ignored in range(len(values)) and values[ignored] != ignored:
        return None
    if are_pictures and (len(values) > MAX_VALUES or len(values) > (cfg.classes or MAX_VALUES)):
        and_classes = f", and data.classes={cfg.classes}" if cfg.classes else ""
        raise DataError(f"{show(cfg.path)}: the label pictures hold {len(values)} different values, "
                        f"{sizes(values[:5])}, ..., {values[-1]}{and_classes} (saved as JPEG, smoothed?); "
                        f"save masks as PNG with one value per class, or set data.label_values")
    # Of volumes a number of classes that they do not have means that some file is wrong, not all.
    if not are_pictures and len(values) != (cfg.classes or len(values)):
        return None
    return values


def check_labels(entry: Entry, classes: int | None, cfg: DataConfig) -> None:
    """Raises DataError when a label lies outside of [0, classes).

    While the number of classes is not known: when it lies below 0, or when there are too many for an atlas
    whose numbers have gaps.
    """
    ids = [value for value in entry.label_ids if value != cfg.ignore_label]
    if classes:
        what, is_beyond = f"with {classes} classes they lie in 0 to {classes - 1}", ids[-1:] >= [classes]
    else:
        what, is_beyond = f"they lie in 0 to {MAX_CLASSES - 1}", ids[-1:] >= [MAX_CLASSES]
        is_beyond = is_beyond and len(ids) > MAX_GAPPED
    if ids and (ids[0] < 0 or is_beyond):
        raise DataError(f"{show(entry.label_path or entry.name)}: labels from {ids[0]} to {ids[-1]}; "
                        f"{what}: set data.classes, data.ignore_label or data.label_values, or repair the "
                        f"file")


def check_values(entry: Entry, values: Sequence[int], cfg: DataConfig) -> None:
    """Raises DataError when a file holds other values than the training set does."""
    others = set(entry.label_ids) - {*values, cfg.ignore_label}
    if others:
        raise DataError(f"{show(entry.label_path)}: labels {sizes(sorted(others)[:8])} besides the training "
                        f"set's {sizes(values[:8])}; repair the file or set data.label_values")
