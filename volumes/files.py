"""Text of messages, errors, names of files, and files that are written whole or not at all. Imports no
other room.

One line of text names what is wrong with a file: `show`, `one_line`, `brief` and `sizes` make the parts of
it. `write_atomic` is the one way in which this repository writes a file that a reader may look for. Version
1.0.
"""
import contextlib
import hashlib
import logging
import os
import re
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

Say = Callable[[str], object]                       # takes what a user should know, a line each
COMPRESSED = (".gz", ".bz2", ".zst")                # endings that may follow the ending of a format
LONGEST = 180                                       # bytes of a name that is derived from another
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # what `write_atomic` writes as a shared file


# ------------------------------------------------------------------------------------------------ errors
class DataError(ValueError):
    """A file, folder or datalist that cannot be used.

    Its text is one line: it names the file, says what was found there and what to do about it.
    """


class PackageError(DataError):
    """A package that reads files of a kind is not installed: no fault of the file, and the end of the run."""


class CacheError(DataError):
    """The cache cannot be written: no fault of the volume at hand, and the end of the run."""


class StoreError(DataError):
    """Voxels in the cache that were there at the start and are there no more: the end of the run."""


def refuse(error: DataError, strict: bool, say: Say) -> None:
    """Tell that a file is left out; with `strict` that is an error."""
    if strict:
        raise DataError(f"{error} (data.strict)") from None
    say(f"data: refused {error}")


# ------------------------------------------------------------------------------------- text of messages
def show(path: str | os.PathLike) -> str:
    """A path as one printable line, whatever bytes its name holds."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in os.fspath(path))


def one_line(message: object, limit: int = 200) -> str:
    """A message without line breaks, cut at `limit` characters."""
    text = show(" ".join(str(message).split()))
    if len(text) <= limit:
        return text
    return text[:limit - 3] + "..."


def brief(value: object, limit: int = 80) -> str:
    """A value as one short line, also one that is nested too deep, or too long a number, to be written."""
    try:
        return one_line(repr(value), limit)
    except (RecursionError, ValueError):
        return f"a {type(value).__name__}"


def sizes(size: tuple[int, ...]) -> str:
    """(1, 2, 3) -> "1,2,3", as on a command line."""
    return ",".join(map(str, size))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """nibabel logs and warns about headers that it then reads or refuses; the line that matters is ours."""
    logger = logging.getLogger("nibabel.global")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -------------------------------------------------------------------------------------- names of files
def split_ending(name: str | os.PathLike) -> tuple[str, str]:
    """The kind of file and its compression, lower case.

    "a.NII.gz" -> (".nii", ".gz"); "a.npy" -> (".npy", "").
    """
    stem, last = os.path.splitext(os.path.basename(name).lower())
    if last in COMPRESSED:
        return os.path.splitext(stem)[1], last
    return last, ""


def bare_name(name: str) -> str:
    """The name of a file without its kind and compression, as it is written: "a.NII.gz" -> "a"."""
    return name[:len(name) - len("".join(split_ending(name)))]


def cut(name: str, of: str | None = None) -> str:
    """A name of LONGEST bytes at most, so that endings and numbers may follow where names have 255.

    What is cut ends in 8 digits of the whole name, so two that begin alike stay two. of: what is told apart,
    where `name` is made of it.
    """
    content = name.encode(errors="surrogateescape")
    if len(content) <= LONGEST:
        return name
    kept = content[:LONGEST - 9].decode(errors="ignore")
    return f"{kept}-{short_digest(os.fsencode(name if of is None else of).hex())[:8]}"


def stem_of(path: Path) -> str:
    """The name of a file without its ending, printable and fit for the name of another file."""
    stem = bare_name(path.name) or path.name
    return cut(re.sub(r"[^\w.-]", "_", stem), stem)


def name_below(root: Path, path: Path) -> str:
    """What a file is known by: its path below the data's root, without its ending, `/` between the folders.

    Printable and fit for the names of other files. A file that is not below `root` has its own name alone.
    """
    path, root = Path(os.path.abspath(path)), Path(os.path.abspath(root))
    folders = ()
    if path.parent.is_relative_to(root):
        folders = path.parent.relative_to(root).parts
    return "/".join([*(cut(re.sub(r"[^\w. -]", "_", folder), folder) for folder in folders), stem_of(path)])


def unique_name(name: str, thing: object, taken: dict[str, object]) -> str:
    """`name`, or name-2, name-3 ... where another thing has it. taken: name -> thing, filled here."""
    found, number = name, 2
    while taken.setdefault(found, thing) != thing:
        found, number = f"{name}-{number}", number + 1
    return found


def digest_of(paths: Sequence[str | os.PathLike]) -> str:
    """`BYTES-DIGITS` of what files hold: how many bytes, and 32 hexadecimal digits of them."""
    digest, total = hashlib.blake2b(digest_size=16), 0
    for path in paths:
        with open(path, "rb") as stream:
            while part := stream.read(2**22):
                digest.update(part)
                total += len(part)
    return f"{total}-{digest.hexdigest()}"


def short_digest(text: str) -> str:
    """16 hexadecimal digits of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def halves(path: Path, header_of: Mapping[str, str]) -> list[str]:
    """The file, and those of its other half where the voxels lie apart from their header.

    header_of: ending of the voxels -> ending of their header.
    """
    kind, packed = split_ending(path)
    partners = {**header_of, **{header: voxels for voxels, header in header_of.items()}}
    names = [str(path)]
    if kind in partners:
        stem = names[0][:len(names[0]) - len(kind + packed)]
        for ending in (partners[kind], partners[kind].upper()):
            names += [stem + ending + more for more in ("", *COMPRESSED)]
    return [name for name in names if os.path.exists(name)]


def check_is_file(path: Path) -> None:
    """Raises DataError, without the name, for what is no file that can be opened and read to its end."""
    if os.path.isfile(path):
        return
    if os.path.exists(path):
        raise DataError("not a regular file")
    raise DataError("no such file, or no permission to see it")


# ----------------------------------------------------------------------- written whole or not at all
def write_atomic(path: Path, write: Callable[[BinaryIO], object], shared: bool = False) -> int:
    """What `write` puts into a file becomes `path` when it is complete. Returns its bytes.

    It is written beside `path` and renamed: a reader sees the old file or the new one, whenever this
    process is killed. Where it fails, or is stopped by an exception, nothing is left beside them. An
    OSError names `path`.

    Not shared: flushed to the disk before it is renamed, so that this holds for a loss of power too; what a
    killed process left is replaced by the next one that writes `path`. shared: other processes may write
    the same file at this moment, so each has a name of its own beside it (no name of mkstemp, whose files
    only their owner may read), for `remove_temporaries`. Not flushed: for what can be made again, and whose
    bytes a reader knows.
    """
    temporary = path.with_name(path.name + ".tmp")
    if shared:
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with naming(path):
            with open(temporary, "xb" if shared else "wb") as file:
                write(file)
                file.flush()
                if not shared:
                    os.fsync(file.fileno())
            size = os.path.getsize(temporary)
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # a vanished folder, a disk that is read-only by now
            temporary.unlink()
        raise
    return size


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError leaves with the file's name: that of a full disk has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or one_line(error), str(path)) from None


def remove_temporaries(folder: Path, older_than: float) -> None:
    """Remove what killed processes were writing as `shared` files in `folder`.

    older_than: seconds; what is younger may still be written by another process.
    """
    for file in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if TEMPORARY.fullmatch(file.name) and time.time() - file.stat().st_mtime > older_than:
                file.unlink()
