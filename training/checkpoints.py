"""The files of a run folder: how they are written, read, and kept to one process at a time.

They are written so that a kill at any moment leaves the old file or the new one, and read so that nothing in
them can do harm. A checkpoint is a file of torch.save with tensors and plain values only. Its `kind` and
`version` say what it is, and equal contents give equal bytes. Version 0.1 (2026-11).
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import pickle
import re
import shutil
import sys
import types
import typing
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from tiles import is_out_of_memory
from volumes.files import brief, one_line, write_atomic

Weights = dict[str, Tensor]


# -------------------------------------------------------------------------------- what is in them

class TrainingFile(TypedDict):
    """One file that the run was trained on."""
    name: str                                 # its path below the data's root, without its ending
    path: str                                 # where it lay
    digest: str                               # of its bytes (volumes.files.digest_of)


class LaterFacts(TypedDict, total=False):
    """What a file from before it came in lacks."""
    files: list[TrainingFile]
    class_names: list[str]                    # of dataset.json


class Facts(LaterFacts):
    """What predict.py must know about the data."""
    modality: str
    channels: int
    classes: int
    label_values: list[int] | None
    background: float
    spacing: list[float]                      # mm, D H W
    training: list[str]                       # names of the volumes


class Latent(TypedDict):
    """What is known of the latent of training crops."""
    mean: Tensor                              # (Z,)
    std: Tensor                               # (Z,)
    scale_factor: float                       # 1 / std over all channels


class Rate(TypedDict):
    """Of one part of the weights; what else an optimizer stores of it is the config's."""
    lr: float


class Optimizer(TypedDict):
    """Its moments and rates."""
    state: dict[int, dict[str, Any]]          # number of a weight -> name of a moment -> tensor
    param_groups: list[Rate]


class Train(TypedDict):
    """last.pt: all that a run needs to go on to the bit.

    Where a feature network is used, it holds `features` (Features) too. `reference` (float or None) and
    `edges` (list of int) came later and may be missing.
    """
    config: dict[str, Any]                    # section -> field -> value
    data: Facts
    model: Weights
    ema: list[Weights]
    disc: Weights | None
    lecam: Weights | None
    optimizer: Optimizer
    disc_optimizer: Optimizer | None
    scaler: dict[str, Any]
    # What follows are fields of training.state.State.
    step: int
    best: float | None
    best_loss: float
    bad_validations: int
    plateau: list[float]
    bad_steps: int
    finished: bool
    validated: int
    sampled: int
    latent: Latent | None
    usage: Tensor | None
    norms: list[float]
    log_scale: float
    global_batch: int


class Shipped(TypedDict):
    """best.pt: what predict.py and --init need.

    It holds `metrics` too, of the validation that made it the best.
    """
    config: dict[str, Any]
    data: Facts
    step: int
    latent: Latent | None                     # None until the run has ended
    model: Weights


class Channels(TypedDict):
    """Config of a feature network: the widths of its levels."""
    channels: list[int]


class Features(TypedDict):
    """best.pt of --task features."""
    config: Channels
    model: Weights


# kind -> what such a file holds; the version that this code reads; what a user should give instead.
CONTENT = {"vae3d.train": Train, "vae3d.weights": Shipped, "vae3d.features": Features}
VERSIONS = {"vae3d.train": 3, "vae3d.weights": 1, "vae3d.features": 1}
TAKES = {
    "vae3d.train": "--resume takes a run folder or its last.pt",
    "vae3d.weights": "it takes a run folder, its best.pt or last.pt",
    "vae3d.features": "train.py --task features writes one as best.pt",
}
# What came into last.pt later.
LATER = {"reference": float | None, "edges": list[int]}
# Names of unfinished files that a killed run may leave in its folder.
TEMPORARY = re.compile(
    r"((last|last\.prev|last\.next|best(_[A-Za-z0-9-]+)?|ema_[\d.e-]+|(nan_)?step_\d+)\.pt"
    r"|log\.jsonl|config\.yaml)\.tmp"
    r"|last\.next\.pt"
    # And those of pictures and volumes in samples/.
    r"|\.?step_\d{6,}_.*\.tmp"
)
# Errors that say nothing about a file's content: the disk, rights, memory, too many open files.
PASSING = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE)


# -------------------------------------------------------------------------------- writing

def place(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, atomically.

    By a hard link, or by a copy where the file system has no hard links.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        return copy(source, target)
    os.replace(temporary, target)
    # Where target was this file already, rename() has done nothing and the temporary is still there.
    temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original:
        write_atomic(target, lambda file: shutil.copyfileobj(original, file))


def save(path: Path, content: dict) -> None:
    """Atomically, and equal contents give equal bytes.

    torch.save is given a file object, so that the archive does not hold the path.
    """
    def write(file: typing.BinaryIO) -> None:
        try:
            torch.save(canonical(content), file)
        # After an error torch closes its archive, which fails too. The first error is the one to tell: a
        # full disk, or a DataLoader's worker whose death is raised here.
        except RuntimeError as error:
            raise error.__context__ or error from None
    write_atomic(path, write)


def canonical(value: Any) -> Any:
    """The same value in plain dicts and lists, in which equal strings are one object.

    pickle writes an object that it has met before as a reference. Which strings are one object differs
    between a run and a resumed one, and so would their bytes.
    """
    if isinstance(value, dict):
        return {canonical(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    if isinstance(value, str):
        return sys.intern(value)
    return value


# -------------------------------------------------------------------------------- reading

class Damaged(ValueError):
    """A checkpoint that is missing, cut short or changed on the disk."""


class OtherKind(ValueError):
    """A file that can be read and is no checkpoint of the kind that is wanted.

    What it holds instead goes with the error, for whoever can tell what that is.
    """
    def __init__(self, path: Path, content: Any, text: str):
        super().__init__(f"{path}: {text}")
        self.path, self.content = path, content


def load(path: str | Path, *kinds: str) -> dict:
    """A checkpoint of ours, of one of `kinds`, as plain values and CPU tensors.

    ValueError in one line; code in the file is never run.
    """
    path = Path(path)
    content = read(path)

    # First what the file says that it is.
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    if not isinstance(found, str):
        found = brief(found, 200)
    if found not in kinds:
        raise OtherKind(path, content, f"is no checkpoint of kind {' or '.join(kinds)}, found {found!r}; "
                                       f"{TAKES.get(kinds[0], '')}")
    version = content.get("version")
    if type(version) is not int or version != VERSIONS[found]:
        raise ValueError(f"{path}: is a {found} checkpoint of version {brief(version)}, this code reads "
                         f"{VERSIONS[found]}; use the code that wrote it")

    # Then whether it holds what such a file must hold.
    wanted = typing.get_type_hints(CONTENT[found])
    if "features" in content:
        wanted["features"] = Features
    for name, kind in (LATER.items() if found == "vae3d.train" else ()):
        if name in content:
            wanted[name] = kind
    lacking = [name for name in wanted if name not in content]
    if lacking:
        raise ValueError(f"{path}: holds no {', no '.join(lacking[:5])}; use the file as train.py wrote it")
    for name, kind in wanted.items():
        if not is_a(content[name], kind):
            raise ValueError(f"{path}: its {name} is not what train.py writes there, found "
                             f"{brief(content[name])}; use the file as train.py wrote it")
    return content


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a file is of a type.

    The types: a TypedDict, X | None, dict[X, Y], list[X], Tensor (dense and real), Any, float (an int is
    one too), and other plain ones.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        if type(value) is not dict:
            return False
        fields = typing.get_type_hints(kind)
        if not all(name in value for name in kind.__required_keys__):
            return False
        return all(is_a(value[name], k) for name, k in fields.items() if name in value)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, k) for k in inner)
    if origin is dict:
        if not isinstance(value, dict):
            return False
        return all(is_a(k, inner[0]) and is_a(v, inner[1]) for k, v in value.items())
    if origin is list:
        return isinstance(value, list) and all(is_a(v, inner[0]) for v in value)
    if kind is Tensor:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return False
        return not (value.is_complex() or value.is_quantized or value.is_meta)
    if kind is float and type(value) is int:
        return True
    return kind is Any or type(value) is kind


def is_like(value: Any, ours: Any) -> bool:
    """Whether a value of a file has the structure of one of ours: keys, lengths, shapes, kinds of number."""
    if isinstance(ours, dict):
        if not isinstance(value, dict) or value.keys() != ours.keys():
            return False
        return all(is_like(value[k], v) for k, v in ours.items())
    if isinstance(ours, (list, tuple)):
        if not isinstance(value, (list, tuple)) or len(value) != len(ours):
            return False
        return all(map(is_like, value, ours))
    if isinstance(ours, Tensor):
        if not is_a(value, Tensor) or value.shape != ours.shape:
            return False
        # Weights may come in another precision, but not as whole numbers.
        both_floating = value.is_floating_point() and ours.is_floating_point()
        return value.dtype == ours.dtype or both_floating
    return type(value) is type(ours) or {type(value), type(ours)} == {int, float}


def read(path: str | Path) -> Any:
    """A file of torch.save as plain values and CPU tensors.

    Damaged or ValueError in one line, OSError where the file may be good; code in the file is never run.
    """
    path = Path(path)
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # a crafted file would print them
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Damaged(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: refused, it holds objects other than tensors and plain values: "
                         f"{one_line(error, 120)}") from None
    except Damaged:
        raise
    # A damaged pickle may raise anything at all.
    except Exception as error:
        # But where memory or the disk failed, the file may be good: then nothing falls back to another.
        ran_out = isinstance(error, RuntimeError) and is_out_of_memory(error)
        if ran_out or isinstance(error, MemoryError):
            raise OSError(errno.ENOMEM, "not enough memory to read it", str(path)) from None
        if isinstance(error, OSError) and error.errno in PASSING:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise Damaged(f"{path}: cannot be read as a checkpoint, it may be cut short: "
                      f"{one_line(error, 120)}") from None


def check_archive(path: Path) -> None:
    """Raises Damaged where a checksum is wrong, ValueError for what torch.save does not write.

    torch.load reads no checksum: it would take flipped bits for weights.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")

    # torch's old format is a pickle, which has no checksums.
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            if file.read(1) != b"\x80":
                raise ValueError("not a file of torch.save")
        return

    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        # Compressed parts could fill the memory when they are read.
        if any(entry.compress_type or entry.file_size != entry.compress_size for entry in entries):
            raise ValueError("its parts are compressed, which torch.save does not do")
        # An entry with attributes may be a folder. For such torch returns memory as it happens to be.
        odd = [entry.filename for entry in entries if entry.external_attr]
        broken = next(iter(odd), None) or archive.testzip()
    if broken is not None:
        raise Damaged(f"{path}: damaged, the checksum or entry of {broken} in it is wrong")


class Resumed(NamedTuple):
    """A checkpoint that a run goes on from."""
    path: Path
    content: dict
    stamp: tuple[int, int]                    # of the file when it was read


def stamp(path: Path) -> tuple[int, int]:
    """What changes when another file takes the place of this one: its number and its time in ns."""
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def load_resumed(path: Path, say: Callable[[str], None]) -> Resumed:
    """The checkpoint of a run folder or file; where a last.pt is damaged, the one before it, which is said.

    ValueError where none can be read.
    """
    if path.is_dir():
        path = path / "last.pt"
    try:
        before = stamp(path) if path.exists() else (0, 0)
        return Resumed(path, load(path, "vae3d.train"), before)
    except Damaged as error:
        previous = path.with_name("last.prev.pt")
        if path.name != "last.pt" or not previous.is_file():
            raise
        before = stamp(previous)
        content = load(previous, "vae3d.train")
        say(f"{error}; going on from the one before it, {previous}, step {content['step']}")
        return Resumed(previous, content, before)


# -------------------------------------------------------------------------------- one process a folder

@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """The run folder for this process alone; on a file system without locks, for anyone.

    ValueError where another process has it. The lock goes with the process, however that ends. Its
    DataLoader workers, who may outlive it by seconds, have no part in it (a lock of flock() they would
    have too).
    """
    # The file is never opened twice: closing any handle of it would give the lock up.
    with open(out / ".lock", "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"{out}: another process is training there (it holds {out / '.lock'}); wait "
                             "for its end or stop it") from None
        except OSError:
            pass
        yield


def remove_temporaries(out: Path) -> None:
    """What a killed run was writing."""
    for folder in (out, out / "samples"):
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
