"""The files of a run folder: written so that a kill at any moment leaves the old file or the new one, read so
that nothing in them can do harm, for one process at a time.

A checkpoint is a file of torch.save with tensors and plain values only; its `kind` and `version` say what it
is, and equal contents give equal bytes. Version 0.1 (2026-11).
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

from data import brief, one_line
from tiles import is_out_of_memory

Weights = dict[str, Tensor]


class Facts(TypedDict):
    """What predict.py must know about the data."""
    modality: str
    channels: int
    classes: int
    label_values: list[int] | None
    background: float
    spacing: list[float]                      # mm, D H W
    training: list[str]                       # names of the volumes


class Latent(TypedDict):
    mean: Tensor                              # (Z,)
    std: Tensor                               # (Z,)
    scale_factor: float


class Rate(TypedDict):
    lr: float


class Optimizer(TypedDict):
    """The moments; of the groups' settings the rate alone is taken, the others are the config's."""
    state: dict[int, dict[str, Any]]          # number of a weight -> name of a moment -> tensor
    param_groups: list[Rate]


class Train(TypedDict):
    """last.pt: all that a run needs to go on to the bit; and `features` (Features) where a feature network is
    used.
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
    step: int                                 # this and what follows: fields of train.State
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
    """best.pt: what predict.py and --init need; and `metrics`, of the validation that made it the best."""
    config: dict[str, Any]
    data: Facts
    step: int
    latent: Latent | None                     # None until the run has ended
    model: Weights


class Channels(TypedDict):
    channels: list[int]


class Features(TypedDict):
    """best.pt of --task features."""
    config: Channels
    model: Weights


CONTENT = {"vae3d.train": Train, "vae3d.weights": Shipped, "vae3d.features": Features}
VERSIONS = {"vae3d.train": 3, "vae3d.weights": 1, "vae3d.features": 1}
TAKES = {"vae3d.train": "--resume takes a run folder or its last.pt",
         "vae3d.weights": "it takes a run folder, its best.pt or last.pt",
         "vae3d.features": "train.py --task features writes one as best.pt"}
TEMPORARY = re.compile(
    r"((last|last\.prev|last\.next|best|ema_[\d.e-]+|(nan_)?step_\d+)\.pt|log\.jsonl|config\.yaml)\.tmp"
    r"|last\.next\.pt"
    # The last: of pictures and volumes in samples/.
    r"|\.?step_\d{6,}_.*\.tmp"
)
# Errors that say nothing about a file's content.
PASSING = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENOMEM, errno.EMFILE)


# ----------------------------------------------------------------------------------------------- writing

def write_atomic(path: Path, write: Callable[[typing.BinaryIO], None]) -> None:
    """Write beside `path`, flush to the disk, then rename: a kill at any moment leaves the old file or the
    new one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with naming(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        # A vanished folder, a disk that is read-only by now.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError leaves with the file's name: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(path)) from None


def place(source: Path, target: Path) -> None:
    """`target` becomes the same file as `source`, atomically: by a hard link, by a copy where the file system
    has none.
    """
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        return copy(source, target)
    os.replace(temporary, target)
    # Rename() does nothing where both are one file already.
    temporary.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    with open(source, "rb") as original:
        write_atomic(target, lambda file: shutil.copyfileobj(original, file))


def save(path: Path, content: dict) -> None:
    """Atomically, and equal contents give equal bytes: a file object keeps the path out of the archive."""
    def write(file: typing.BinaryIO) -> None:
        try:
            torch.save(canonical(content), file)
        # Torch closes its archive after the first error (a full disk, a DataLoader.
        except RuntimeError as error:
            # Worker whose death raises here), and fails at that too.
            raise error.__context__ or error from None
    write_atomic(path, write)


def canonical(value: Any) -> Any:
    """Plain dicts and lists, equal strings one object: pickle marks what it met before by identity, which a
    resumed run does not share.
    """
    if isinstance(value, dict):
        return {canonical(k): canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [canonical(v) for v in value]
    return sys.intern(value) if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------------- reading

class Damaged(ValueError):
    """A checkpoint that is missing, cut short or changed on the disk."""


class OtherKind(ValueError):
    """A file that can be read and is no checkpoint of the kind that is wanted; what it holds instead goes
    with it.
    """
    def __init__(self, path: Path, content: Any, text: str):
        super().__init__(f"{path}: {text}")
        self.path, self.content = path, content


def load(path: str | Path, *kinds: str) -> dict:
    """A checkpoint of ours, of one of `kinds`, as plain values and CPU tensors. ValueError in one line; never
    runs code from the file.
    """
    path = Path(path)
    content = read(path)
    found = content.get("kind") if isinstance(content, dict) else type(content).__name__
    found = found if isinstance(found, str) else brief(found, 200)
    if found in kinds and (type(content.get("version")) is not int or content["version"] != VERSIONS[found]):
        raise ValueError(f"{path}: is a {found} checkpoint of version {brief(content.get('version'))}, this "
                         f"code reads {VERSIONS[found]}; use the code that wrote it")
    if found not in kinds:
        raise OtherKind(path, content, f"is no checkpoint of kind {' or '.join(kinds)}, found {found!r}; "
                                       f"{TAKES.get(kinds[0], '')}")
    wanted = typing.get_type_hints(CONTENT[found]) | ({"features": Features} if "features" in content else {})
    if lacking := [name for name in wanted if name not in content]:
        raise ValueError(f"{path}: holds no {', no '.join(lacking[:5])}; use the file as train.py wrote it")
    if wrong := [name for name, kind in wanted.items() if not is_a(content[name], kind)]:
        raise ValueError(f"{path}: its {wrong[0]} is not what train.py writes there, found "
                         f"{brief(content[wrong[0]])}; use the file as train.py wrote it")
    return content


def is_a(value: Any, kind: Any) -> bool:
    """Whether a value of a file is of a type: a TypedDict, X | None, dict[X, Y], list[X], Tensor (dense,
    real), float (or int) ...
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if typing.is_typeddict(kind):
        return type(value) is dict and all(
            name in value and is_a(value[name], k) for name, k in typing.get_type_hints(kind).items()
        )
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, k) for k in inner)
    if origin is dict:
        return isinstance(value, dict) and all(
            is_a(k, inner[0]) and is_a(v, inner[1]) for k, v in value.items()
        )
    if origin is list:
        return isinstance(value, list) and all(is_a(v, inner[0]) for v in value)
    if kind is Tensor:
        plain = isinstance(value, Tensor) and value.layout == torch.strided
        return plain and not (value.is_complex() or value.is_quantized or value.is_meta)
    return kind is Any or type(value) is kind or kind is float and type(value) is int


def is_like(value: Any, ours: Any) -> bool:
    """Whether a value of a file has the structure of one of ours: keys, lengths, shapes, kinds of number."""
    if isinstance(ours, dict):
        return (
            isinstance(value, dict)
            and value.keys() == ours.keys()
            and all(is_like(value[k], v) for k, v in ours.items())
        )
    if isinstance(ours, (list, tuple)):
        return isinstance(value, (list, tuple)) and len(value) == len(ours) and all(map(is_like, value, ours))
    if isinstance(ours, Tensor):
        real = is_a(value, Tensor) and value.shape == ours.shape
        return real and (value.dtype == ours.dtype or value.is_floating_point() and ours.is_floating_point())
    return type(value) is type(ours) or {type(value), type(ours)} == {int, float}


def read(path: str | Path) -> Any:
    """A file of torch.save as plain values and CPU tensors. Damaged or ValueError in one line; never runs
    code from the file.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("not a regular file")
        broken = None
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(
                    entry.compress_type or entry.file_size != entry.compress_size
                    for entry in archive.infolist()
                ):
                    # And which could fill the memory.
                    raise ValueError("its parts are compressed, which torch.save does not do")
                # Torch returns memory as it is for them.
                folders = (entry.filename for entry in archive.infolist() if entry.external_attr)
                # Torch.load takes flipped bits for weights: it reads no checksum.
                broken = next(folders, None) or archive.testzip()
        else:
            with path.open("rb") as file:
                if file.read(1) != b"\x80":                      # of a pickle, torch's old format
                    raise ValueError("not a file of torch.save")
        if broken is not None:
            raise Damaged(f"{path}: damaged, the checksum or entry of {broken} in it is wrong")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")                      # a crafted file would print them
            content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise Damaged(f"{path}: no such checkpoint") from None
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: refused, it holds objects other than tensors and plain values: {one_line(error, 120)}"
        ) from None
    except Damaged:
        raise
    except (OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise OSError(errno.ENOMEM, "not enough memory to read it", str(path)) from None
        if isinstance(error, OSError) and error.errno in PASSING:  # the file may be good: nothing falls back
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise Damaged(
            f"{path}: cannot be read as a checkpoint, it may be cut short: {one_line(error, 120)}"
        ) from None
    except Exception as error:  # a damaged pickle may raise anything at all
        raise Damaged(
            f"{path}: cannot be read as a checkpoint, it may be cut short: {one_line(error, 120)}"
        ) from None
    return content


class Resumed(NamedTuple):
    """A checkpoint that a run goes on from."""
    path: Path
    content: dict
    stamp: tuple[int, int]                    # of the file


def stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns


def load_resumed(path: Path, say: Callable[[str], None]) -> Resumed:
    """The checkpoint of a run folder or file; a damaged last.pt falls back to the one before it. ValueError
    where none can be read.
    """
    path = path / "last.pt" if path.is_dir() else path
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


# ------------------------------------------------------------------ one process a folder

@contextlib.contextmanager
def lock_folder(out: Path) -> Iterator[None]:
    """The run folder for this process alone. ValueError where another process has it; no lock on a file
    system without them.

    The lock goes with the process, however it ends; its DataLoader workers, who may outlive it by seconds,
    have no part in it (flock would be theirs too)."""
    # Never reopened: closing any handle of a file gives such a lock up.
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
        for path in folder.iterdir() if folder.is_dir() else ():
            if TEMPORARY.fullmatch(path.name):
                path.unlink()
