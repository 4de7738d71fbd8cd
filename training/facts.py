"""What the data say: put into the config once, before anything is built, and kept in the checkpoint.

Which files a run was trained on is known by their places, their names below the data's root, and their bytes.
Version 0.2 (2026-11).
"""
from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Sequence

import data
from training import ranks
from training.config import TrainConfig, changed
from training.task import Task
from volumes.entries import Entry
from volumes.files import digest_of, show, unique_name
from volumes.find import Item


def open_data(cfg: TrainConfig, task: Task, say: Callable[[str], None],
              known: dict | None = None) -> tuple[TrainConfig, data.Data]:
    """The data of the run, and the config with all that follows from them. Raises DataError, or ValueError
    where weights do not fit.

    known: the facts of the checkpoint that is resumed, whose labels may be from before gaps were closed.
    """
    cfg = changed(cfg, data={"labels": task.LABELS, "points": task.POINTS})
    if task.dataset is not None:
        dataset = task.dataset(cfg, say)
        return told_by(dataset, cfg, task), dataset
    wanted = cfg.data
    if known and known.get("classes") and known.get("label_values") is None and wanted.classes is None:
        wanted = dataclasses.replace(wanted, classes=known["classes"])
    dataset = data.open_data(wanted, cfg.train.seed, say, ranks.world())
    # What dataset.json says is ignored goes into the config, where the loss looks.
    cfg = changed(cfg, data={"ignore_label": dataset.cfg.ignore_label})
    dataset.cfg = cfg.data
    return told_by(dataset, cfg, task), dataset


def told_by(dataset: data.Data, cfg: TrainConfig, task: Task) -> TrainConfig:
    """The config with what the data say. Raises ValueError where weights do not fit."""
    cfg = task.resolve(cfg, dataset)
    cfg = changed(
        cfg,
        vae={"in_channels": dataset.channels},
        loss={"background": dataset.background},
        data={"patch": dataset.patch},
    )
    if cfg.loss.channel_weights is not None and len(cfg.loss.channel_weights) != dataset.channels:
        raise ValueError(f"loss.channel_weights has {len(cfg.loss.channel_weights)} factors, the data has "
                         f"{dataset.channels} channels; give one for each")
    return cfg


def facts_of(dataset: data.Data) -> dict:
    """What predict.py must know about the data to prepare others alike, and the names of the training
    volumes and files.
    """
    entry, modalities = dataset.train[0], {entry.intensity.rule for entry in dataset.train}
    values = dataset.label_values
    # A row for each file, whatever the number of its volumes.
    files = {}
    for each in dataset.train:
        if each.path is not None:
            files[each.path] = {"name": each.file, "path": os.path.realpath(each.path),
                                "digest": each.digest}
    named = {"class_names": list(dataset.class_names)} if dataset.class_names else {}
    return named | {
        "modality": modalities.pop() if len(modalities) == 1 else "auto",
        "channels": dataset.channels,
        "classes": dataset.classes,
        "label_values": None if values is None else list(values),
        "background": dataset.background,
        "spacing": list(entry.spacing),
        "training": [entry.name for entry in dataset.train],
        "files": list(files.values()),
    }


# -------------------------------------------------------------------------------- what was trained on

def is_same_training(known: dict, dataset: data.Data) -> bool:
    """Whether a checkpoint's facts name the training volumes of a data set, in their order.

    The data may lie elsewhere than they did. Facts without `files` name each volume by its file's own name.
    """
    if "files" not in known:
        return known["training"] == bare_names(dataset.train)
    now = facts_of(dataset)
    return known["training"] == now["training"] and digests(known) == digests(now)


def digests(facts: dict) -> list[str]:
    return [file["digest"] for file in facts["files"]]


def bare_names(entries: Sequence[Entry]) -> list[str]:
    """The names that checkpoints had before a file was known by its folders too."""
    taken: dict[str, tuple] = {}
    names = []
    for entry in entries:
        base = entry.file.rsplit("/", 1)[-1] or entry.name
        if entry.volume is not None:
            base += f"_t{entry.volume:03d}"
        names.append(unique_name(base, (entry.path, entry.volume, entry.file or entry.name), taken))
    return names


class Trained:
    """The files that a checkpoint was trained on: `item in trained`.

    A file was trained on when it lies where a training file lay, or holds the bytes of one; so data that
    were moved, or are named by another of their folders, are known again. Facts of an earlier version have
    bare names alone, which then decide.
    """
    def __init__(self, facts: dict):
        files = facts.get("files")
        self.is_known = facts.get("training") is not None
        self.by_bare_name = self.is_known and files is None
        self.paths = {file["path"] for file in files or ()}
        self.digests = {file["digest"] for file in files or ()}
        self.sizes = {digest.split("-")[0] for digest in self.digests}
        # Volume 3 of a 4-D file X was X_t003.
        names = facts.get("training") or ()
        self.names = set(names) | {re.sub(r"_t\d{3,}$", "", name) for name in names}

    def __contains__(self, item: Item) -> bool:
        if self.by_bare_name:
            return item.known_as.rsplit("/", 1)[-1] in self.names
        if os.path.realpath(item.path) in self.paths:
            return True
        try:
            # Only a file of the same length is read.
            size = sum(os.path.getsize(file) for file in item.files)
            return str(size) in self.sizes and digest_of(item.files) in self.digests
        except OSError:                       # it is told when its turn comes
            return False

    def tell(self, seen: int, total: int, path: object) -> None:
        """A line: how many of the files of an evaluation were trained on."""
        if not self.is_known:
            return
        how = ""
        if self.by_bare_name:
            how = (", by their bare names, which is all that this older checkpoint knows: of files that "
                   "share a name it cannot tell which one it was")
        print(f"{show(str(path))}: trained on {seen} of {total} files{how}", flush=True)
