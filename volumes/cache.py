"""Entries of files from the cache folder, or built there.

A record is a JSON file beside the arrays that it names, written last: where it is, they are whole. Its name
has the key: the hash of the files' names, sizes and times and of VoxelSettings. Several processes may share
the folder. Version 1.1.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from volumes.config import DataConfig, VoxelSettings
from volumes.entries import Entry
from volumes.files import (
    CacheError,
    DataError,
    check_is_file,
    digest_of,
    remove_temporaries,
    show,
    stem_of,
    write_atomic,
)
from volumes.find import Item
from volumes.formats import stamp
from volumes.intensities import Intensity
from volumes.loading import check_pair, load
from volumes.points import foreground_points
from volumes.surfaces import as_bytes, summed, token_counts
from volumes.volume import Note

# Raise it whenever the cached voxels of the same file and settings would come out different.
CACHE_VERSION = 2
DAY = 86400  # seconds


def cache_folder(cfg: DataConfig) -> Path:
    """data.cache_dir, else vae3d under XDG_CACHE_HOME or ~/.cache; made if need be.

    Raises DataError where it cannot be written.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base, "vae3d")
    if cfg.cache_dir:
        folder = Path(os.path.expanduser(cfg.cache_dir))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); set "
                        f"data.cache_dir to a folder that can be written") from None
    remove_temporaries(folder, older_than=DAY)  # one that is still being written is younger
    return folder


def key_of(stamps: Sequence, settings: VoxelSettings) -> str:
    """The key of a record. stamps: of the image's file and, with labels, of the label's.

    A setting that has a default counts where it is another, so that a cache from before the setting came in
    still serves.
    """
    always, where_set = [], []
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.default is dataclasses.MISSING:
            always.append(value)
        elif value != field.default:
            where_set.append([field.name, value])
    key = [CACHE_VERSION, stamps[0], always, *where_set]
    if len(stamps) > 1:
        key.append(["labels", stamps[1:]])
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]


def cached_entries(item: Item, cfg: DataConfig, folder: Path, wait: bool = True) -> list[Entry]:
    """Entries of one file, from the cache or after building it.

    Where several processes want it, one builds and the others wait, or get none without `wait`.
    """
    check_pair(item, cfg)
    files, stamps = [(item.path, *item.more)], []
    if cfg.labels:
        files.append((item.label,))
    for paths in files:
        try:
            stamps.append(stamps_of(paths))
        except (DataError, OSError) as error:
            raise DataError(f"{show(paths[0])}: {error}") from None
    key = key_of(stamps, cfg.voxel_settings(item.kind))
    record = folder / f"{stem_of(item.path)[:40]}-{key}.json"
    entries = read_record(record, item)
    if entries is None:
        with one_at_a_time(record, wait) as is_mine:
            if not is_mine:
                return []
            entries = read_record(record, item) or build(item, cfg, record, files, stamps)
    return entries


def stamps_of(paths: Sequence[Path]) -> list:
    """Of all files of an image, or of a label."""
    found = []
    for path in paths:
        check_is_file(path)
        found += stamp(path)
    return found


@contextlib.contextmanager
def one_at_a_time(record: Path, wait: bool) -> Iterator[bool]:
    """Hold a lock that dies with its process; False where another has it and this one does not `wait`.

    Where there are no locks (system, disk) two may build the same content, and the last one's stays.
    """
    path = record.with_name(f".{record.stem}.lock")
    with contextlib.ExitStack() as stack:
        try:
            import fcntl
            file = stack.enter_context(open(path, "a"))
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            stack.callback(path.unlink, missing_ok=True)
        except BlockingIOError:
            yield False
            return
        except (OSError, ImportError):
            pass
        yield True


# ---------------------------------------------------------------------------------------------- writing
def build(item: Item, cfg: DataConfig, record: Path, files: Sequence[Sequence[Path]],
          stamps: Sequence) -> list[Entry]:
    """Read the volumes of one file and write them to the cache, unless it changed since it had `stamps`.

    files: those of the image and, with labels, those of the label.
    """
    folder, loaded = record.parent, load(item, cfg)
    if [stamps_of(paths) for paths in files] != stamps:
        raise DataError(f"{show(item.path)}: changed while it was being read; start again when it is "
                        f"complete")
    volumes = []
    try:
        for number, (array, intensity) in enumerate(loaded.volumes):
            stored = as_bytes(array) if intensity.modality == "surface" else array
            size = write_array(array_file(record, number), stored)
            volumes.append({"shape": array.shape, "intensity": intensity, "bytes": size})
        content = {"source": str(item.path), "spacing": loaded.spacing, "affine": loaded.affine.tolist(),
                   "guessed": loaded.guessed, "notes": loaded.notes, "volumes": volumes,
                   "numbers": loaded.numbers, "digest": digest_of(item.files)}
        if cfg.labels:
            content["labels"] = [write_array(label_file(record, number), array)
                                 for number, array in enumerate(loaded.labels)]
            content["label_ids"] = loaded.label_ids
        # Last: its presence says that the arrays are there.
        write_atomic(record, lambda file: file.write(json.dumps(content).encode()), shared=True)
    except OSError as error:
        raise cache_error(folder, error) from None
    entries = read_record(record, item)
    if entries is None:
        raise CacheError(f"{show(record)}: the cache vanished while it was written; let no other program "
                         f"clean {show(folder)}")
    return entries


def array_file(record: Path, number: int) -> Path:
    return record.with_name(f"{record.stem}-{number}.npy")


def label_file(record: Path, number: int) -> Path:
    return record.with_name(f"{record.stem}-label{number}.npy")


def write_array(path: Path, array: np.ndarray) -> int:
    """Returns the bytes of the file."""
    return write_atomic(path, functools.partial(np.save, arr=array), shared=True)


def cache_error(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); free some space "
                      f"or set data.cache_dir to another disk")


def with_points(entry: Entry) -> Entry:
    """The entry with its foreground places, which lie beside its voxels in the cache, made once."""
    meaning = ""  # what the stored labels mean
    if entry.label is not None:
        text = repr((entry.label_values, entry.ignore_label))
        meaning = "-" + hashlib.sha256(text.encode()).hexdigest()[:8]
    return dataclasses.replace(entry, points=beside(entry, f"points{meaning}", foreground_points))


def with_tokens(entry: Entry) -> Entry:
    """The entry with the sums of points over its tokens, likewise."""
    return dataclasses.replace(entry, tokens=beside(entry, "tokens", sums_over_tokens))


def sums_over_tokens(entry: Entry) -> np.ndarray:
    return summed(token_counts(entry.read()))


def beside(entry: Entry, name: str, make: Callable[[Entry], np.ndarray]) -> str | np.ndarray:
    """An array that follows from an entry's voxels: a file beside them, made once, or the array itself."""
    if not isinstance(entry.store, str):
        return make(entry)
    file = Path(f"{entry.store.removesuffix('.npy')}-{name}.npy")
    try:
        np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or damaged
        array = make(entry)
        try:
            write_array(file, array)
        except OSError as error:
            raise cache_error(file.parent, error) from None
    return str(file)


# ---------------------------------------------------------------------------------------------- reading
def read_record(record: Path, item: Item) -> list[Entry] | None:
    """Entries of a cache record; None where it is absent, damaged or of arrays that are not whole."""
    try:
        content = json.loads(record.read_bytes())
        label_bytes = content.get("labels", [])
        labels = [str(label_file(record, number)) for number in range(len(label_bytes))]
        if [os.path.getsize(file) for file in labels] != label_bytes:
            return None
        entries, notes = [], tuple(Note(*note) for note in content["notes"])
        # A record from before blank volumes were left out has all volumes of its file.
        count = len(content["volumes"])
        numbers = content.get("numbers", list(range(count)) if count > 1 else [])
        for number, volume in enumerate(content["volumes"]):
            file = str(array_file(record, number))
            if os.path.getsize(file) != volume["bytes"]:
                return None
            name = item.known_as
            volume_number = None
            if numbers:
                volume_number = numbers[number]
                name += f"_t{volume_number:03d}"
            modality, low, high = volume["intensity"]
            entry = Entry(name, str(item.path), tuple(volume["shape"]), tuple(content["spacing"]),
                          np.array(content["affine"]), Intensity(modality, tuple(low), tuple(high)), file,
                          content["guessed"], file=item.known_as, volume=volume_number,
                          digest=content["digest"], patient=item.patient, fold=item.fold,
                          notes=notes)
            if labels:
                entry = dataclasses.replace(entry, label=labels[min(number, len(labels) - 1)],
                                            label_path=str(item.label), label_ids=tuple(content["label_ids"]))
            entries.append(entry)
        return entries or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
