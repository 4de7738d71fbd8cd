"""Entries from the cache folder, or built there.

A record (JSON) names the arrays of a file and is written last: its presence says that they are there. Its name holds the hash
of the file's stamp and of all that changes voxels (config.VoxelSettings), so that nothing stale is ever used. Version 1.0.
"""
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from volumes.config import DataConfig, VoxelSettings
from volumes.entries import Entry
from volumes.files import (
    CacheError,
    DataError,
    check_is_file,
    remove_temporaries,
    show,
    stem_of,
    write_atomic,
)
from volumes.find import Item
from volumes.formats import stamp
from volumes.intensities import Intensity
from volumes.load import check_pair, load

CACHE_VERSION = 2  # raise it whenever the cached voxels of the same file and settings would come out different


def cache_folder(cfg: DataConfig) -> Path:
    """data.cache_dir, else vae3d under XDG_CACHE_HOME or ~/.cache; made if need be. Raises DataError where it cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(os.path.expanduser(cfg.cache_dir)) if cfg.cache_dir else Path(base, "vae3d")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); set data.cache_dir to a folder that can be "
                        "written") from None
    remove_temporaries(folder, older_than=86400)  # what is younger, another process may still be writing
    return folder


def cached(item: Item, cfg: DataConfig, folder: Path, wait: bool = True) -> list[Entry]:
    """Entries of one file, from the cache or after building it. Where several processes want it, one builds and the others wait, or get
    none without `wait`."""
    check_pair(item, cfg)
    files, stamps = [item.path, *([item.label] if cfg.labels else [])], []
    for file in files:
        try:
            check_is_file(file)
            stamps.append(stamp(file))
        except (DataError, OSError) as error:
            raise DataError(f"{show(file)}: {error}") from None
    settings = dataclasses.asdict(VoxelSettings.of(cfg, item.kind))
    key = hashlib.sha256(json.dumps([CACHE_VERSION, stamps, settings]).encode()).hexdigest()[:24]
    record = folder / f"{stem_of(item.path)[:40]}-{key}.json"
    entries = from_cache(record, item)
    if entries is None:
        with one_at_a_time(record, wait) as mine:
            entries = (from_cache(record, item) or build(item, cfg, record, files, stamps)) if mine else []
    return entries


def build(item: Item, cfg: DataConfig, record: Path, files: Sequence[Path], stamps: Sequence) -> list[Entry]:
    """Read the volumes of one file and write them to the cache, unless it changed since it had these stamps."""
    folder, loaded = record.parent, load(item, cfg)
    if [stamp(file) for file in files] != stamps:
        raise DataError(f"{show(item.path)}: changed while it was being read; start again when it is complete")
    volumes = []
    try:
        for number, (array, intensity) in enumerate(loaded.volumes):
            size = write_atomic(record.with_name(f"{record.stem}-{number}.npy"), functools.partial(np.save, arr=array), shared=True)
            volumes.append({"shape": array.shape, "intensity": intensity, "bytes": size})
        content = {"source": str(item.path), "spacing": loaded.spacing, "affine": loaded.affine.tolist(), "guessed": loaded.guessed,
                   "volumes": volumes}
        if cfg.labels:
            sizes = [write_atomic(record.with_name(f"{record.stem}-label{number}.npy"), functools.partial(np.save, arr=array), shared=True)
                     for number, array in enumerate(loaded.labels)]
            content |= {"labels": sizes, "label_ids": loaded.label_ids}
        write_atomic(record, lambda stream: stream.write(json.dumps(content).encode()), shared=True)  # last: its presence says that the arrays are there
    except OSError as error:
        raise cache_error(folder, error) from None
    entries = from_cache(record, item)
    if entries is None:
        raise CacheError(f"{show(record)}: the cache vanished while it was written; let no other program clean {show(folder)}")
    return entries


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


def cache_error(folder: Path, error: OSError) -> CacheError:
    return CacheError(f"{show(folder)}: cannot write the cache ({error.strerror or error}); free some space or set data.cache_dir to "
                      "another disk")


def from_cache(record: Path, item: Item) -> list[Entry] | None:
    """Entries of a cache record; None where it is absent, damaged or of arrays that are not whole."""
    try:
        content = json.loads(record.read_bytes())
        entries, sizes = [], content.get("labels", [])
        labels = [str(record.with_name(f"{record.stem}-label{number}.npy")) for number in range(len(sizes))]
        if [os.path.getsize(file) for file in labels] != sizes:
            return None
        for number, volume in enumerate(content["volumes"]):
            file = str(record.with_name(f"{record.stem}-{number}.npy"))
            modality, low, high = volume["intensity"]
            if os.path.getsize(file) != volume["bytes"]:
                return None
            suffix = f"_t{number:03d}" if len(content["volumes"]) > 1 else ""
            entries.append(Entry(stem_of(item.path) + suffix, str(item.path), tuple(volume["shape"]), tuple(content["spacing"]),
                                 np.array(content["affine"]), Intensity(modality, tuple(low), tuple(high)), file, content["guessed"]))
            if labels:
                entries[-1] = dataclasses.replace(entries[-1], label=labels[min(number, len(labels) - 1)], label_path=str(item.label),
                                                  label_ids=tuple(content["label_ids"]))
        return entries or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
