"""A data set: its files found, cached, split by file, its classes settled.

With labels each image has one, by class numbers that are the same in the whole set. Version 1.0.
"""
import contextlib
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from volumes.cache import cache_folder, cached
from volumes.config import MODALITIES, DataConfig
from volumes.entries import Entry, check_labels
from volumes.files import CacheError, DataError, PillowError, one_line, show, sizes
from volumes.find import Item, list_items
from volumes.formats import is_picture, known_endings
from volumes.points import with_points
from volumes.seeds import seeded
from volumes.synthetic import synthetic_entries


@dataclass
class Data:
    """What `open_data` found. train and val share no file, unless there is only one."""
    train: list[Entry]
    val: list[Entry]
    channels: int
    patch: tuple[int, int, int]  # crop, D H W
    background: float            # of the first training volume; a crop is padded with its own volume's
    cfg: DataConfig
    classes: int = 0             # of the labels; 0 without data.labels
    label_values: tuple[int, ...] | None = None  # stored values of class 0, 1, ...; None: as stored. Keep it to read more data alike


def open_data(cfg: DataConfig, seed: int, say: Callable[[str], object] = print, processes: int = 1) -> Data:
    """Find the volumes, build or reuse their cache, split them by file, seeded. `say` gets what a user should know, a line each.
    processes: how many do the same at this moment; they share the building.

    Raises DataError when nothing usable is left, when the cache cannot be written, or, with cfg.strict, for the first refused file.
    """
    classes, label_values = 0, None
    if cfg.path is None:
        training, held_out = [[entry] for entry in synthetic_entries(cfg, seed)], []
        say(f"data: {len(training)} synthetic {cfg.synthetic} volumes of {sizes(training[0][0].shape[1:])} voxels, seed {seed}; "
            "--data names real ones")
    else:
        training, held_out = open_files(cfg, say, processes)
    if cfg.labels:
        training, held_out, classes, label_values = settle_classes(training, held_out, cfg, say)
    if not held_out and len(training) > 1:
        count = min(len(training) - 1, max(1, round(cfg.val_fraction * len(training))))
        order = seeded(seed, "split").permutation(len(training)).tolist()
        held_out = [training[i] for i in sorted(order[:count])]
        training = [training[i] for i in sorted(order[count:])]
    elif not held_out:
        held_out = training
        say(f"data: one usable file only, {show(training[0][0].path or training[0][0].name)}: it serves for training and validation, "
            "so validation says nothing about other volumes")
    shared = {entry.path for group in training for entry in group if entry.path} & {entry.path for group in held_out for entry in group}
    if shared and held_out is not training:
        say(f"data: {len(shared)} files are in both training and validation, {show(min(shared))} for one; validation is no test of them")
    files = len(training), len(held_out)
    train, val = ([entry for group in groups for entry in group] for groups in (training, held_out))
    taken: dict[str, str | None] = {}
    train, val = ([with_unique_name(entry, taken) for entry in entries] for entries in (train, val))
    if cfg.foreground:
        train, val = ([with_points(entry) for entry in entries] for entries in (train, val))
    pictures = all(entry.intensity.modality == "picture" for entry in train)
    patch = cfg.patch or default_patch(train, (16, 48, 48) if cfg.path is None else (32, 256, 256) if pictures else (32, 64, 64))
    say(f"data: {len(train)} training volumes ({files[0]} files), {len(val)} held out ({files[1]}), {train[0].shape[0]} "
        f"channel{'s' * (train[0].shape[0] > 1)}, crops of {sizes(patch)}"
        f"{f', {classes} classes' * cfg.labels}")
    return Data(train, val, train[0].shape[0], patch, train[0].intensity.background, cfg, classes, label_values)


def settle_classes(training: list[list[Entry]], held_out: list[list[Entry]], cfg: DataConfig, say: Callable[[str], object],
                    ) -> tuple[list[list[Entry]], list[list[Entry]], int, tuple[int, ...] | None]:
    """The number of classes and what stored values they have, set in every entry; held-out files with other labels are refused.

    Values are classes as they are stored, except of pictures (masks of 0 and 255): where these are not 0, 1, ... in the training set, they
    are numbered in their order.
    """
    ids = sorted({value for group in training for entry in group for value in entry.label_ids} - {cfg.ignore_label})
    largest, values = max(ids, default=0), cfg.label_values
    pictures = all(entry.label_path and is_picture(entry.label_path) for group in training for entry in group)
    if values is None and pictures and ids != list(range(len(ids))) and largest >= (cfg.classes or 0):
        values = tuple(ids) if len(ids) > 1 else (0, *ids)
        if len(values) > 64 or len(values) > (cfg.classes or 64):
            raise DataError(f"{show(cfg.path)}: the label pictures hold {len(values)} different values, {sizes(values[:5])}, ..., "
                            f"{values[-1]}{f', and data.classes={cfg.classes}' * bool(cfg.classes)} (saved as JPEG, smoothed?); "
                            "save masks as PNG with one value per class, or set data.label_values")
        say(f"data: the label pictures hold the values {sizes(values)}: classes 0 to {len(values) - 1} (data.label_values names others)")
    classes = max(2, cfg.classes or (len(values) if values else largest + 1))
    if values and cfg.ignore_label in range(len(values)) and values[cfg.ignore_label] != cfg.ignore_label:
        raise DataError(f"{show(cfg.path or 'synthetic')}: data.ignore_label={cfg.ignore_label} is also the class of the stored value "
                        f"{values[cfg.ignore_label]}; choose a data.ignore_label of {classes} or more")

    def usable(group: list[Entry]) -> bool:
        try:
            if values is None:
                check_labels(group[0], classes, cfg)
            elif cfg.label_values is None and (others := set(group[0].label_ids) - {*values, cfg.ignore_label}):
                raise DataError(f"{show(group[0].label_path)}: labels {sizes(sorted(others)[:8])} besides the training set's "
                                f"{sizes(values[:8])}; repair the file or set data.label_values")
            return True
        except DataError as error:
            if cfg.strict:
                raise DataError(f"{error} (data.strict)") from None
            say(f"data: refused {error}")
            return False
    listed = bool(held_out)
    training, held_out = ([[dataclasses.replace(entry, label_values=values, ignore_label=cfg.ignore_label) for entry in group]
                           for group in groups if usable(group)] for groups in (training, held_out))
    if not training:
        raise DataError(f"{show(cfg.path or 'synthetic')}: no training volume has labels below data.classes={classes}; set data.classes")
    if listed and not held_out:
        say("data: no usable volume in the `validation` list; some of the training files are held out instead")
    return training, held_out, classes, values


def open_files(cfg: DataConfig, say: Callable[[str], object], processes: int) -> tuple[list[list[Entry]], list[list[Entry]]]:
    """Groups of entries, a group per file: training and held-out ones (the latter empty without a `validation` list)."""
    lists = list_items(cfg.path, cfg.labels, say)
    items = [(name, item) for name in ("training", "validation") for item in lists[name]]
    if not items:
        raise DataError(f"{show(cfg.path)}: no volumes found; looked for {known_endings()}")
    folder, groups, refused, channels, start = cache_folder(cfg), {"training": [], "validation": []}, 0, None, time.monotonic()
    for _, item in items if processes > 1 else ():               # leave out those that another one is at; refusals are told below
        with contextlib.suppress(DataError):
            cached(item, cfg, folder, wait=False)
    for number, (name, item) in enumerate(items):
        if time.monotonic() - start > 20:
            say(f"data: {number} of {len(items)} files read; their cache in {show(folder)} makes the next start quick")
            start = time.monotonic()
        try:
            entries = cached(item, cfg, folder)
            if cfg.labels and cfg.label_values is None and not is_picture(item.label):
                check_labels(entries[0], cfg.classes, cfg)
            channels = channels or entries[0].shape[0]
            check_channels(item, entries[0].shape[0], channels)
        except (CacheError, PillowError):
            raise
        except DataError as error:
            if cfg.strict:
                raise DataError(f"{error} (data.strict)") from None
            say(f"data: refused {error}")
            refused += 1
            continue
        groups[name].append(entries)
        if item.kind is not None and item.kind.lower() not in MODALITIES:
            say(f"data: {show(item.path)}: class {one_line(item.kind, 40)!r} names no intensity rule ({', '.join(MODALITIES)}); "
                f"took {entries[0].intensity.modality}")
    if not groups["training"]:
        raise DataError(f"{show(cfg.path)}: no usable training volume among {len(lists['training'])}, {refused} refused; "
                        f"see the lines above or run python data.py on it")
    if lists["validation"] and not groups["validation"]:
        say("data: no usable volume in the `validation` list; some of the training files are held out instead")
    if refused:
        say(f"data: {refused} of {len(items)} files refused, going on with the others; --data.strict makes that an error")
    guesses: dict[str, list[Entry]] = {}
    for entry in (group[0] for part in groups.values() for group in part):
        if entry.guessed:
            guesses.setdefault(entry.intensity.modality, []).append(entry)
    for modality, entries in guesses.items():
        names = f"{', '.join(entry.name for entry in entries[:4])}{', ...' * (len(entries) > 4)}"
        say(f"data: guessed {modality} from the values of {len(entries)} file{'s' * (len(entries) > 1)} ({names}); "
            "data.modality or a datalist's class says it")
    return groups["training"], groups["validation"]


def check_channels(item: Item, found: int, expected: int) -> None:
    if found != expected:
        raise DataError(f"{show(item.path)}: {found} channel{'s' * (found > 1)}, the first accepted volume has {expected}; "
                        "use data.select_channel to pick one of each, or another folder")


def with_unique_name(entry: Entry, taken: dict[str, str | None]) -> Entry:
    """Two files may share a name in different folders: the second becomes NAME-2. The same volume keeps its name."""
    name, number = entry.name, 2
    while taken.setdefault(name, f"{entry.path}/{entry.name}") != f"{entry.path}/{entry.name}":
        name, number = f"{entry.name}-{number}", number + 1
    return dataclasses.replace(entry, name=name)


def default_patch(entries: list[Entry], most: tuple[int, int, int]) -> tuple[int, int, int]:
    """`most`, or the extent of the middle volume, rounded down to a multiple of 4, where that is less."""
    middle = [sorted(entry.shape[axis] for entry in entries)[len(entries) // 2] for axis in (1, 2, 3)]
    return tuple(min(limit, n if n < 4 else n // 4 * 4) for limit, n in zip(most, middle))
