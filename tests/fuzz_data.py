"""Hostile files through data.py's readers, train.py's configuration and its checkpoints.

    python tests/fuzz_data.py                                  # 5,000 mutated files of each format, some minutes
    python tests/fuzz_data.py --format nii.gz npz --count 300 --seed 7
    python tests/fuzz_data.py --format npz --seed 7 --case 41  # one case again, in this process; its files are kept

A case is a function of (seed, format, number). It must end as a volume (finite, and what an independent reading of the file finds) or a
config, or in one line that names the file: no other exception, no warning, no second line, nothing on standard error, within SECONDS and
MEMORY. Cases run in child processes, hundreds in each, so that a crash or a hang costs one child and is known by its number.
test_fuzz.py runs a few of each. Exit code 1 when a case failed.
"""
import argparse
import contextlib
import functools
import gzip
import io
import json
import math
import os
import pickle
import random
import resource
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import unittest.mock
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import nibabel as nib  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

import data  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
import training.config  # noqa: E402
import training.console  # noqa: E402
from training import checkpoints  # noqa: E402
from volumes.config import DataConfig  # noqa: E402
from volumes.files import DataError, show  # noqa: E402
from volumes.format_arrays import DENSE_KEYS  # noqa: E402
from volumes.volume import spacing_of  # noqa: E402

MAX_GIB = 1 / 32      # data.max_gib of every case
MEMORY = 200          # MiB that a case may take on top: six times what max_gib lets a volume have as float32
SECONDS = 5.0         # of the processor that a case may take; most take milliseconds
HANG = 120.0          # seconds without an answer after which a child is ended, its start included; a busy machine is no hang
BATCH = 500           # cases of one child
NAMES = ("a", "b c", "größe", "名前", "it's", "tab\there", "two\nlines", "a.b", "-x", "x" * 100, "%s{0}$HOME", "\udcff")
TEXTS = ("", "\0", "../..", "/dev/zero", "/dev/null", "~", "~root", "é", "\ud800", "x" * 5000, "a\nb", "\x1b[31m", "none", "nan", "1e400",
         "[1, 2", "${HOME}", "%n", "2001-13-99", "0x", "--data", "true", "-1", "1e-4", "16,64,64", "\u202e", "a/b/c.nii", ".", "..")
VALUES = (None, True, False, 0, -1, 1, 2**31, 2**63, -2**70, 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf, [], {}, [[]], [None],
          {"": {}}, [1, 2, 3], ["a"], {"a": [1]}, [[[[1]]]], list(range(300)))


class Failed(AssertionError):
    """What a case did that it must not."""


# ------------------------------------------------------------------------------------------------------------------ mutations
def flip(rng: random.Random, content: bytes, reach: int | None = None) -> bytes:
    """A few bytes changed, most often near the start, where headers are."""
    out, reach = bytearray(content), min(len(content), reach or len(content))
    for _ in range(rng.choice((1, 1, 2, 5, 30)) if reach else 0):
        place = rng.randrange(reach)
        out[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256), out[place] ^ 1 << rng.randrange(8)))
    return bytes(out)


def cut(rng: random.Random, content: bytes) -> bytes:
    places = (0, 1, 3, 4, 8, 40, 128, 344, 347, 348, 351, 352, 353, len(content) // 2, len(content) - 8, len(content) - 4, len(content) - 1)
    return content[:max(0, rng.choice((*places, rng.randrange(len(content) + 1))))]


def grow(rng: random.Random, content: bytes) -> bytes:
    return content + rng.choice((b"\0", b"\0" * 1000, rng.randbytes(rng.randrange(1, 2000)), content, b"\xff" * 7))


def overwrite(rng: random.Random, content: bytes) -> bytes:
    """What another program left: nothing, zeros, text, another format."""
    other = (b"", b"\0" * len(content), b"<html>404</html>", rng.randbytes(500), b"\x1f\x8b" + content, b"PK\3\4" + content, b"\x93NUMPY",
             gzip.compress(content), b"\x89PNG\r\n\x1a\n", b"version https://git-lfs.github.com/spec/v1\n", content[::-1])
    return rng.choice(other)


def common(rng: random.Random, content: bytes) -> bytes:
    return rng.choice((flip, flip, cut, grow, overwrite))(rng, content)


@functools.lru_cache(maxsize=4)
def zeros(mib: int) -> bytes:
    """A raw deflate stream of that many MiB, a thousandth of it long."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)  # may be repeated: nothing before it is referred to
    return first * mib + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def gzip_bomb(start: bytes, mib: int) -> bytes:
    return gzip.compress(start) + b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + zeros(mib) + struct.pack("<2I", 0, 0)


# --------------------------------------------------------------------------------------------------------------- NIfTI images
PAIR_HEADERS = {nib.Nifti1Header: nib.nifti1.Nifti1PairHeader, nib.Nifti2Header: nib.nifti2.Nifti2PairHeader}


def voxels(rng: random.Random, dtype: str, axes: int = 3) -> np.ndarray:
    noise = np.random.default_rng(rng.randrange(2**32))
    array = noise.integers(0, 200, [rng.randrange(1, 8) for _ in range(axes)]).astype(dtype)
    if array.dtype.kind in "fi":
        array = array * (5 if array.dtype.itemsize > 1 else 1) - 100
    if array.dtype.kind == "f" and rng.random() < 0.2:
        array.flat[rng.randrange(array.size)] = rng.choice((math.nan, math.inf, -math.inf, 6e4, np.finfo(array.dtype).max, 1e-39))
    return array.astype(dtype)


def header_value(rng: random.Random, dtype: np.dtype) -> object:
    if dtype.kind == "S":
        return rng.choice((b"n+1\0", b"ni1\0", b"n+2\0", b"", b"\0\0\0\0", b"n+1", b"\xff" * dtype.itemsize, rng.randbytes(dtype.itemsize)))
    if dtype.kind == "f":
        return rng.choice((0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-39, 1e-30, 3e38, -3e38, 352.0, 353.5, 1e6, 1e12, -352.0,
                           5e-324, rng.uniform(-10, 10)))
    info = np.iinfo(dtype)
    value = rng.choice((0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 255, 256, 348, 540, 1536, 1792, 2304, -1, 32767, info.min, info.max,
                        rng.randrange(info.min, info.max + 1)))
    return min(max(value, info.min), info.max)


def set_fields(rng: random.Random, content: bytes, header: nib.Nifti1Header) -> bytes:
    """One to four fields of the header set to extremes."""
    dtype = header.structarr.dtype
    fields, out = np.frombuffer(bytearray(content[:dtype.itemsize]), dtype).copy(), content[dtype.itemsize:]
    likely = ("dim", "dim", "dim", "pixdim", "pixdim", "datatype", "vox_offset", "scl_slope", "scl_inter", "magic", "sizeof_hdr",
              "sform_code", "qform_code", "srow_x", "quatern_b", "bitpix", "intent_code")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(likely) if rng.random() < 0.8 else rng.choice(dtype.names)
        target = fields[name]
        place = (0, *(rng.randrange(n) for n in target.shape[1:]))
        target[place] = header_value(rng, target.dtype)
    return fields.tobytes() + out


def nifti(rng: random.Random, pair: bool = False) -> tuple[bytes, bytes, nib.Nifti1Header]:
    """A small good image: header (with all that stands in front of the voxels), voxels, header as an object."""
    dtype = rng.choice(("int16", "int16", "uint8", "float32", "float64", "int32", "uint16", "int8", "uint32", "int64"))
    array = voxels(rng, dtype, rng.choice((2, 3, 3, 3, 3, 4)))
    affine = nib.affines.from_matvec(np.diag([rng.choice((-1, 1)) * rng.choice((0.5, 1.0, 3.0)) for _ in range(3)]), (1, 2, 3))
    kind = rng.choice((nib.Nifti1Header, nib.Nifti1Header, nib.Nifti1Header, nib.Nifti2Header))
    header = (kind if not pair else PAIR_HEADERS[kind])(
        endianness=rng.choice("<<>"))
    header.set_data_dtype(dtype)
    header.set_data_shape(array.shape)
    header.set_sform(affine, 1)
    if rng.random() < 0.3 and np.dtype(dtype).kind != "f":
        header.set_slope_inter(rng.choice((0.5, 2.0, 1e-3)), rng.choice((0.0, -10.0)))
    start = 0 if pair else 352 if kind is nib.Nifti1Header else 544
    header["vox_offset"] = start
    front = header.binaryblock + b"\0" * 4
    if rng.random() < 0.15:                                      # extensions, of which the sizes may lie
        front = front[:-4] + b"\1\0\0\0"
        for _ in range(rng.choice((1, 1, 3))):
            size = rng.choice((16, 32, 32, 48))
            said = rng.choice((size, size, 0, -16, 8, 15, 2**31 - 1, 2**20, -2**31))
            front += struct.pack(header.endianness + "2i", said, rng.choice((0, 2, 4, 6, 32, 99))) + rng.randbytes(size - 8)
        if not pair:
            header["vox_offset"] = len(front)
            front = header.binaryblock + front[header.sizeof_hdr:]
    return front, array.astype(np.dtype(dtype).newbyteorder(header.endianness)).tobytes(order="F"), header


def mutated_nifti(rng: random.Random) -> bytes:
    front, body, header = nifti(rng)
    content = front + body
    for _ in range(rng.choice((1, 1, 1, 2))):
        what = rng.random()
        if what < 0.65 and len(content) > 540:
            content = set_fields(rng, content, header)
        elif what < 0.8:
            content = flip(rng, content, 352)
        else:
            content = common(rng, content)
    return content


def make_nii(rng: random.Random, folder: Path, name: str) -> Path:
    path = folder / f"{name}.nii"
    path.write_bytes(mutated_nifti(rng))
    return path


def make_nii_gz(rng: random.Random, folder: Path, name: str) -> Path:
    path, what = folder / f"{name}{rng.choice(('.nii.gz', '.nii.gz', '.NII.GZ'))}", rng.random()
    content = mutated_nifti(rng) if what < 0.5 or rng.random() < 0.2 else b"".join(nifti(rng)[:2])
    packed = gzip.compress(content, rng.choice((1, 9)))
    if 0.5 <= what < 0.6:
        packed = cut(rng, packed)
    elif what < 0.65:                                            # checksum and length
        packed = packed[:-8] + flip(rng, packed[-8:]) if what >= 0.5 else packed
    elif what < 0.72:
        packed = packed[:10] + flip(rng, packed[10:])
    elif what < 0.76:
        packed = flip(rng, packed, 12)
    elif what < 0.82:                                            # several members are one stream
        middle = rng.randrange(len(content) + 1)
        packed = gzip.compress(content[:middle]) + rng.choice((b"", gzip.compress(b""))) + gzip.compress(content[middle:])
    elif what < 0.87:
        packed += rng.choice((b"\0" * 512, rng.randbytes(30), b"\x1f\x8b", packed, b"\x1f\x8b\x08" + b"\0" * 20))
    elif what < 0.90:
        packed = rng.choice((content, gzip.compress(packed), zlib.compress(content), b"BZh9" + packed))
    elif what < 0.93:                                            # inflates to GiB: behind the voxels, as extension, in front of the voxels
        front, body, header = nifti(rng)
        where = rng.randrange(3)
        if where == 1:
            front = front[:header.sizeof_hdr] + b"\1\0\0\0" + struct.pack(header.endianness + "2i", 2**31 - 16, 6)
        elif where == 2:
            header["vox_offset"] = rng.choice((2**24, 2**30, 2**31))
            front = header.binaryblock + front[header.sizeof_hdr:]
        packed = gzip_bomb(front + body * (where == 0), rng.choice((20, 300, 2048)))
    path.write_bytes(packed)
    return path


def make_pair(rng: random.Random, folder: Path, name: str) -> Path:
    front, body, header = nifti(rng, pair=True)
    what, tail = rng.random(), rng.choice(("", "", "", ".gz"))
    if what < 0.6:
        front = set_fields(rng, front, header)
    elif what < 0.75:
        front = rng.choice((flip, cut, grow, overwrite))(rng, front)
    elif what < 0.9:
        body = common(rng, body)
    else:
        front, body = flip(rng, front), common(rng, body)
    halves = {".hdr": front, ".img": body}
    if rng.random() < 0.05:
        del halves[rng.choice((".hdr", ".img"))]
    for end, content in halves.items():
        content = gzip.compress(content) if tail or rng.random() < 0.03 else content
        (folder / f"{name}{end}{tail}").write_bytes(cut(rng, content) if tail and rng.random() < 0.1 else content)
    if len(halves) == 1 and rng.random() < 0.5:
        other = folder / f"{name}{({'.hdr', '.img'} - set(halves)).pop()}{tail}"
        rng.choice((os.mkdir, os.mkfifo))(other)
    return folder / f"{name}{rng.choice(('.hdr', '.img'))}{tail}"


# ------------------------------------------------------------------------------------------------------------- numpy's arrays
SHAPES = ("(3, 4, 5)", "(0, 4, 5)", "(-1, 4, 5)", "(-3, -4, 5)", "(3, 4, 5, 2)", "(60,)", "()", "(99999, 99999, 99999)",
          "(1000, 1000, 1000)", f"({10**30}, 4, 5)", f"({10**400}, 1, 1)", f"({'1, ' * 70})", "(True, 4, 5)", "(3.0, 4, 5)", "('3', 4, 5)",
          "3", "None", "[3, 4, 5]", "(3, 4, 5) * 2", "(1j, 2, 3)", "(2**62, 4, 1)", "(4611686018427387904, 4, 4)", f"({'9' * 5000}, 1, 1)",
          "(3, (4,), 5)", "(60, 1, 1)")
DESCRS = ("'<f4'", "'>f4'", "'|O'", "'O'", "'<f2'", "'<f8'", "'<f16'", "'|b1'", "'<c8'", "'|V4'", "'|S4'", "'<U1'", "'<M8[s]'", "'<m8'",
          "[('a', '<f4')]", "[('a', '<f4', (1000000,))]", "'(2,2)<f4'", "('<f4', (2, 2))", "'|V0'", "'|S0'", "'f4,f4'", "'object'", "'<i3'",
          "''", "'<f4 '", "None", "42", "'__import__(\"os\").system(\"true\")'", "[('a', '|O')]", "[]", "('<f4',)",
          "{'names': ['a'], 'formats': ['<f4']}", "'x' * 10**9", "'<V999999999'", "'|S2147483647'")


def npy(rng: random.Random, hostile: bool = True) -> bytes:
    array = voxels(rng, rng.choice(("<i2", "<f4", ">f4", "<f8", "|u1", "<f2", "|b1", "<i8")), rng.choice((3, 3, 3, 3, 4, 2)))
    if rng.random() < 0.3:
        array = np.asfortranarray(array)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, rng.choice(((1, 0), (1, 0), (2, 0), (3, 0))) if hostile else (1, 0))
    content = stream.getvalue()
    if not hostile or rng.random() < 0.5:
        return content
    text = rng.choice(("{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}, }}", "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}}}",
                       "{{'descr': {d}, 'shape': {s}}}", "{{'descr': {d}, 'descr': {d}, 'fortran_order': {f}, 'shape': {s}, 'x': 1}}",
                       "{d}", "{s}", "({d}, {s})", "{{**{{}}, 'descr': {d}}}", "(lambda: 0)()", "__import__('os').system('true')",
                       "[" * 300, "(" * 5000 + ")" * 5000,
                       "-" * 3000 + "1", "{{" * 80, "'descr'" * 400, "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}L, }}",
                       "\udcff{d}"))
    text = text.format(d=rng.choice(DESCRS) if rng.random() < 0.6 else "'<f4'",
                       f=rng.choice(("False", "False", "True", "0", "None", "'x'")),
                       s=rng.choice(SHAPES)).encode("utf-8", "surrogateescape") + b" " * rng.randrange(20) + b"\n"
    version = rng.choice((1, 1, 2, 3, 9, 0))
    length = rng.choice((len(text), len(text), len(text), 0, len(text) + 7, 65535, 2**32 - 1))
    length = min(length, 65535) if version == 1 else length
    start = b"\x93NUMPY" + bytes((version, 0)) + struct.pack("<H" if version == 1 else "<I", length)
    return start + text + rng.choice((b"", bytes(240), bytes(960)))


def mutated_npy(rng: random.Random) -> bytes:
    content = npy(rng)
    what = rng.random()
    return flip(rng, content, 128) if what < 0.3 else common(rng, content) if what < 0.6 else content


def make_npy(rng: random.Random, folder: Path, name: str) -> Path:
    path = folder / f"{name}.npy"
    path.write_bytes(mutated_npy(rng))
    return path


def make_npz(rng: random.Random, folder: Path, name: str) -> Path:
    path, what = folder / f"{name}.npz", rng.random()
    packing = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
                         if rng.random() < 0.2 else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    good = functools.partial(npy, hostile=False)
    if what < 0.25:                                              # one array; the .npy may be bad
        members = [(rng.choice(("vol.npy", "volume.npy", "x.npy", "vol", "../vol.npy", "/etc/vol.npy", "vol/", "x/../vol.npy", ".npy",
                                "vol.npy\0x", "名.npy")),
                    mutated_npy(rng) if rng.random() < 0.7 else good(rng))]
    elif what < 0.45:                                            # sparse, with parts missing, of wrong type or out of the grid
        parts = {"shape": np.array(rng.choice(((4, 4, 4), (4, 4, 4, 2), (0, 4, 4), (2**40, 2**40, 2**40), (-4, 4, 4), (4, 4),
                                               (4.0, 4, 4)))),
                 "coords": np.array(rng.choice((((0, 1, 2), (3, 3, 3)), ((0, 1, 9), (3, 3, 3)), ((-1, 1, 2), (0, 0, 0)), (0, 1, 2), ()))),
                 "features": np.array(rng.choice((((1.0, 2), (3, 4)), (1.0, 2.0), (math.nan, 1), ("a", "b"), (1j, 2), ())))}
        parts = {key: part.astype("uint64") if key != "features" and rng.random() < 0.1 and part.size and part.min() >= 0 else part
                 for key, part in parts.items() if rng.random() < 0.95}
        members = [(f"{key}.npy", as_npy(part)) for key, part in parts.items()]
    elif what < 0.6:                                             # names twice, many arrays, other things
        names = rng.choices(("vol.npy", "vol", "volume.npy", "seg.npy", "a.npy", "b.npy", "a/b.npy", "../../x.npy", "readme.txt"),
                            k=rng.choice((0, 2, 3, 20)))
        members = [(name, good(rng)) for name in names]
    else:
        members = [("vol.npy", good(rng))]
    stream = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                          # a name twice is meant
        with zipfile.ZipFile(stream, "w", packing) as archive:
            for member, content in members:
                archive.writestr(member, content)
    content = stream.getvalue()
    if what >= 0.93:                                             # bombs: the directory's size is true, or a lie
        mib, header = rng.choice((20, 300, 2048)), as_npy(np.zeros((1, 1, 1), np.float32))[:-4]
        shape = rng.choice((f"({mib}, 512, 512)", "(64, 512, 512)", "(1, 1, 1)", "(4, 4, 4)"))
        start = header.replace(b"(1, 1, 1)", shape.encode()) if rng.random() < 0.7 else b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1)
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = deflate.compress(start) + deflate.flush(zlib.Z_FULL_FLUSH) + zeros(mib)
        content = one_member("vol.npy", body, rng.choice((mib * 2**20 + len(start), 2**32 - 2, 400, 0)))
    elif what >= 0.6:
        change = rng.random()
        if change < 0.4:                                         # flags (encrypted), method, checksum, sizes, name
            place = rng.choice((content.find(b"PK\1\2"), 0, 0))
            content = content[:place] + flip(rng, content[place:], 50)
        else:
            content = common(rng, content)
    path.write_bytes(content)
    return path


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def one_member(name: str, deflated: bytes, size: int) -> bytes:
    """A zip of one member that says it inflates to `size` bytes."""
    fields = struct.pack("<HHHHHIII", 20, 0, 8, 0, 0, 0, len(deflated), size & 2**32 - 1)[2:]
    local = b"PK\3\4" + struct.pack("<H", 20) + fields + struct.pack("<HH", len(name), 0) + name.encode() + deflated
    entry = b"PK\1\2" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0) + name.encode()
    return local + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)


# ------------------------------------------------------------------------------------------------- datalists, configs, weights
def volumes(folder: Path) -> Path:
    """Good and bad files that the datalists name, made once."""
    place = folder / "volumes"
    if not place.is_dir():
        place.mkdir()
        rng = np.random.default_rng(0)
        for name in ("a.nii.gz", "b ü.nii.gz"):
            nib.save(nib.Nifti1Image(rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16), np.eye(4)), place / name)
        np.save(place / "c.npy", rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16))
        np.savez(place / "d.npz", vol=rng.integers(-1000, 900, (9, 8, 7)).astype(np.int16), seg=rng.integers(0, 3, (9, 8, 7)))
        nib.save(nib.Nifti1Image(rng.integers(0, 3, (9, 8, 7)).astype(np.uint8), np.eye(4)), place / "label.nii.gz")
        (place / "empty.nii.gz").write_bytes(b"")
        (place / "folder.nii.gz").mkdir()
        (place / "loop.nii.gz").symlink_to("loop.nii.gz")
        os.mkfifo(place / "pipe.nii.gz")
    return place


def hostile(rng: random.Random) -> object:
    return rng.choice((rng.choice(VALUES), rng.choice(TEXTS)))


def changed(rng: random.Random, value: object, share: float = 0.15) -> object:
    """A tree of plain values with some of them replaced, doubled or left out."""
    if rng.random() < share:
        return hostile(rng)
    if isinstance(value, dict):
        out = {(rng.choice(TEXTS) if rng.random() < 0.03 else key[:-1] if rng.random() < 0.03 else key): changed(rng, part, share / 2)
               for key, part in value.items() if rng.random() > 0.03}
        return out | ({rng.choice(TEXTS): hostile(rng)} if rng.random() < 0.1 else {})
    if isinstance(value, list):
        return [changed(rng, part, share) for part in value if rng.random() > 0.05] + ([hostile(rng)] if rng.random() < 0.1 else [])
    return value


def nested(rng: random.Random, key: str) -> str:
    depth = rng.choice((50, 500, 900, 990, 1500, 20_000))
    first, last = rng.choice((("[", "]"), ('{"a":', "}"), ('[{"image":', "}]")))
    return f'{{"{key}": {first * depth}1{last * rng.choice((depth, depth, 0))}}}'


def make_json(rng: random.Random, folder: Path, name: str) -> Path:
    path, place = folder / f"{name}.json", f"../{volumes(folder.parent).name}/"
    files = ("a.nii.gz", "b ü.nii.gz", "c.npy", "d.npz", "empty.nii.gz", "folder.nii.gz", "loop.nii.gz", "pipe.nii.gz", "absent.nii.gz",
             "label.nii.gz")
    entries = [{"image": place + rng.choice(files)} for _ in range(rng.randrange(1, 5))]
    entries[0]["image"] = place + "a.nii.gz"
    for entry in entries:
        if rng.random() < 0.5:
            entry["label"] = place + rng.choice(("label.nii.gz", "label.nii.gz", "d.npz", "absent.nii.gz", "pipe.nii.gz"))
        if rng.random() < 0.4:
            entry["class"] = rng.choice(("ct", "CT", "mr", "radar", "liver", ""))
    entries = [entry["image"] if rng.random() < 0.2 else entry for entry in entries]
    content = {"name": "fuzz", "training": entries, "validation": [place + "c.npy"] if rng.random() < 0.5 else [], "testing": []}
    what = rng.random()
    if what < 0.6:
        content = changed(rng, content)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    if 0.6 <= what < 0.7:
        twice = text.replace("{", '{"training": [], ', rng.choice((1, 3)))
        text = nested(rng, rng.choice(("training", "x", "validation"))) if what < 0.64 else twice
    elif 0.7 <= what < 0.8:
        odd = ("9" * 5000, "1e999", "NaN", "-Infinity", "0x1", "'a'", "nul", "01", "[1,]", nested(rng, "training"))
        text = text.replace('"fuzz"', rng.choice(odd))
        text = text.replace(place, rng.choice((place, "9" * 5000, "\\ud800", "\\u0000")))
        text = text.replace('"ct"', rng.choice(("9" * 4000, nested(rng, "a"), '"\\udfff"')))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    packed = text.encode(encoding, "backslashreplace" if encoding != "utf-8" else "surrogatepass")
    path.write_bytes(flip(rng, packed) if what >= 0.9 else common(rng, packed) if what >= 0.8 else packed)
    return path


YAML_SCALARS = ("!!python/object/apply:os.system ['touch executed']", "!!timestamp x", "!!int ''", "!!int '-'", "!!float x", "!!bool maybe",
                "!!binary x", "!!set {a, a}", "!!omap [a]", "!!pairs 3", "2001-01-01", "2001-99-99", "2001-01-01 99:00:00",
                "0x" + "f" * 5000, "9" * 5000, "1:60:60", "0o8", ".nan", ".inf", "~", "? [a]", "{a: {b: 1}}", "&x [*x]", "*absent", "&a a",
                "<<: 3", "'\\0'", '"\\0"', '"\\ud800"', '"\\x1b[2J"', "|\n  two\n  lines", "null", "[" * 600, "- " * 300, "[1, [2, [3]]]",
                "1,2", "[1.5, 2, 3]", "-0", "1e400", "yes", "{}", "[]", "[null, null, null]", "{1: 2}", "[1, 2, 3, 4]", "!!str 3", "!x y",
                "%TAG", "@", "`", "\t")


@functools.cache
def config_texts() -> tuple[str, ...]:
    return (training.config.to_yaml(training.config.TrainConfig()), *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "config").glob("*.yaml"))))


def laughs(rng: random.Random) -> str:
    """A billion values in a few hundred bytes, by aliases or by merges."""
    merge, depth = rng.random() < 0.5, rng.choice((3, 9, 12))
    lines = ["a0: &a0 {k0: lol}" if merge else "a0: &a0 [lol, lol]"]
    for i in range(1, depth):
        many = ", ".join([f"*a{i - 1}"] * 9)
        lines.append(f"a{i}: &a{i} {{<<: [{many}], k{i}: lol}}" if merge else f"a{i}: &a{i} [{many}]")
    return "\n".join([*lines, f"{rng.choice(('data', 'train', 'x'))}: {rng.choice(('', '{patch: '))}*a{depth - 1}"]) + "\n"


def make_yaml(rng: random.Random, folder: Path, name: str) -> Path:
    path, what, text = folder / f"{name}.yaml", rng.random(), rng.choice(config_texts())
    lines = text.splitlines()
    if what < 0.5:                                               # values, keys, lines
        for _ in range(rng.choice((1, 1, 2, 5))):
            i = rng.randrange(len(lines))
            key, colon, value = lines[i].partition(":")
            new = rng.choice(YAML_SCALARS) if rng.random() < 0.5 else json.dumps(hostile(rng))
            lines[i] = rng.choice((f"{key}{colon} {new}", f"{key}{colon} {new}", f"{key[:-1]}{colon}{value}",
                                   f"{key}{colon}{value}\n{lines[i]}", f"  {lines[i]}", f"{lines[i]}  {new}",
                                   f"{rng.choice(TEXTS)}: {value}", f"{new}: {value}", ""))
        text = "\n".join(lines)
    elif what < 0.75:
        text = yaml.safe_dump(changed(rng, yaml.safe_load(text)), allow_unicode=rng.random() < 0.5)
    elif what < 0.8:
        text = laughs(rng)
    elif what < 0.85:
        text = rng.choice((nested(rng, "data"), "data: " + nested(rng, "patch"), "- " * 2000, "a: " + "x" * 400_000, "{" * 3000,
                           "? " * 2000, "x: |\n" + " y\n" * 90_000))
    elif what < 0.9:
        text = rng.choice(("", "null", "[]", "3", "data", "--- 1\n--- 2\n", "data: {path: a}\n" * 2, "%YAML 9.9\n---\n", "\0", "\t",
                           "data:\n\tpath: x", "&a [*a]"))
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "latin-1"))
    packed = text.encode(encoding, "backslashreplace" if encoding != "utf-8" else "surrogatepass")
    path.write_bytes(flip(rng, packed) if what >= 0.95 else common(rng, packed) if what >= 0.9 else packed)
    return path


class Evil:
    """Runs a command when it is unpickled by a loader that lets it."""
    def __reduce__(self):
        return os.system, ("touch executed",)


def make_pt(rng: random.Random, folder: Path, name: str) -> Path:
    path, what = folder / f"{name}.pt", rng.random()
    kind = rng.choice(("vae3d.train", "vae3d.weights"))
    content = {"kind": kind, "version": checkpoints.VERSIONS[kind], "config": {"train": {"seed": 0}}, "step": 3, "ema": [], "best": None,
               "model": {"w": torch.zeros(3, 4), "b": torch.ones(2, dtype=torch.float16)}, "disc": None, "lecam": None, "latent": None,
               "data": {"modality": "ct", "channels": 1, "classes": 0, "label_values": None, "background": -1.0, "spacing": [1, 1.0, 1.0],
                        "training": ["a"]}, "optimizer": {"state": {}, "param_groups": []}, "disc_optimizer": None, "scaler": {},
               "best_loss": 0.5, "bad_validations": 0, "plateau": [1.0, 1.0, 0], "bad_steps": 0, "finished": False, "validated": 0,
               "sampled": 0, "usage": torch.zeros(4), "norms": [0.5], "log_scale": 16.0, "global_batch": 2}
    if what < 0.15:
        place = rng.choice(("kind", "version", "config", "model", "step", "x"))
        content[place] = rng.choice((torch.zeros(3), Evil(), [Evil()], {"a": Evil()}, slice(1), np.float64(1), Path("x"),
                                     functools.partial(os.getcwd)))
    elif what < 0.35:
        content = changed(rng, {key: value for key, value in content.items() if key != "model"}) if what < 0.3 else hostile(rng)
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=rng.random() > 0.1)
    packed = stream.getvalue()
    if 0.35 <= what < 0.45:
        packed = pickle.dumps(content if what < 0.4 else Evil(), rng.choice((0, 2, 5)))
    elif 0.45 <= what < 0.6 and zipfile.is_zipfile(io.BytesIO(packed)):  # other members
        with zipfile.ZipFile(io.BytesIO(packed)) as archive:
            members = {info.filename: archive.read(info) for info in archive.infolist()}
        victim = rng.choice(list(members))
        if rng.random() < 0.5:
            del members[victim]
        else:
            members[rng.choice((victim, "../../x", "x/y"))] = rng.choice((b"", b"cos\nsystem\n(S'touch executed'\ntR.", rng.randbytes(100)))
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
            for member, part in members.items():
                archive.writestr(member, part)
        packed = stream.getvalue()
    elif 0.6 <= what < 0.65:
        packed = one_member("archive/data.pkl", zeros(2048), 2048 * 2**20)
    elif 0.65 <= what < 0.9:
        packed = common(rng, packed)
    path.write_bytes(packed)
    return path


@functools.cache
def finished_run() -> dict:
    """The last.pt of a small run with a codebook, a discriminator, a feature network and an average."""
    flags = ["--data.synthetic_count", "3", "--data.synthetic_size", "8,16,16", "--patch", "4,8,8", "--data.crops_per_volume", "3",
             "--batch", "1", "--vae.base_channels", "4", "--vae.bottleneck", "vq", "--vae.num_codes", "16", "--loss.adv_weight", "0.3",
             "--loss.disc_channels", "4", "--loss.disc_layers", "1", "--loss.disc_strides", "1,2,2", "--loss.lecam_weight", "0.1",
             "--optim.clip_percentile", "90", "--optim.clip_window", "3", "--train.ema", "0.9", "--train.val_crops", "1",
             "--optim.schedule", "plateau", "--loss.perceptual_weight", "0.1",
             "--train.latent_crops", "1", "--log.sample_every", "0", "--log.samples", "1", "--device", "cpu", "--steps", "2"]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        assert train.main([*flags, "--out", f"{folder}/run"]) == 0
        return checkpoints.read(Path(folder) / "run/last.pt")


def replaced(rng: random.Random, value: object) -> object:
    """A tree of plain values and tensors with one of them, at any depth, replaced, left out, doubled or changed within its type."""
    if isinstance(value, bool) and rng.random() < 0.5:
        return not value
    if isinstance(value, (int, float)) and rng.random() < 0.5:
        return rng.choice((0, -1, 10**9, 2**70) if isinstance(value, int) else (0.0, -1.0, 1e300, math.nan, math.inf))
    if isinstance(value, list) and rng.random() < 0.15:
        return value[:-1] if rng.random() < 0.5 else value * 2
    if isinstance(value, torch.Tensor) and value.layout == torch.strided and rng.random() < 0.5:
        return rng.choice((value.flatten(), value[None], value.to(torch.int8), value.to("meta"), value * math.nan, value.half()))
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.2:
        return rng.choice((hostile(rng), torch.zeros(()), torch.full((3,), math.nan), torch.zeros(0), torch.zeros(2, 2).to_sparse(),
                           torch.zeros(2, dtype=torch.complex64), torch.ones(1).expand(5), torch.ones(16, dtype=torch.int8), b"x", 7, 0.5))
    value, place = value.copy(), rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if rng.random() < 0.1:
        del value[place]
    elif rng.random() < 0.1 and isinstance(value, dict):
        value[rng.choice((*TEXTS, 7, None, 0.5))] = hostile(rng)
    else:
        value[place] = replaced(rng, value[place])
    return value


def make_run(rng: random.Random, folder: Path, name: str) -> Path:
    """A last.pt whose checksums are right and whose contents are not. Its config is left alone: that is the format yaml."""
    content = dict(finished_run())
    for _ in range(rng.choice((1, 1, 1, 2))):
        place = rng.choice([key for key in content if key != "config"])
        content |= {place: replaced(rng, content[place])}
    path = folder / name / "last.pt"
    shutil.rmtree(path.parent, ignore_errors=True)               # of a case that failed
    path.parent.mkdir()
    torch.save(content, path)
    return path


# -------------------------------------------------------------------------------------------------------------------- verdicts
def check_line(error: BaseException | str, *names: str, limit: int = 1500) -> None:
    text = str(error)
    if not text.isprintable() or not text.strip() or len(text) > limit:
        raise Failed(f"not one short printable line: {text[:2000]!r}")
    if names and not any(name in text for name in names):
        raise Failed(f"does not name {names[0]!r}: {text!r}")
    if "MemoryError" in text and "(MemoryError: )" not in text:
        raise Failed(f"ran out of memory: {text!r}")


def judge_volume(path: Path, rng: random.Random) -> str:
    shown = tuple(show(other) for other in (path, *path.parent.glob("*")))
    try:
        volume = data.read_volume(path, max_gib=MAX_GIB)
    except DataError as error:
        check_line(error, *shown)
        outcome = "refused"
    else:
        outcome = "accepted"
        if not np.isfinite(volume.array).all() or volume.array.dtype != np.float32 or volume.array.ndim != 4 or not volume.array.size:
            raise Failed(f"accepted {volume.array.dtype} {volume.array.shape}, finite: {np.isfinite(volume.array).all()}")
        sizes = all(0 < mm < math.inf for mm in volume.spacing)
        if not (sizes and np.isfinite(volume.affine).all() and np.linalg.det(volume.affine[:3, :3])):
            raise Failed(f"accepted spacing {volume.spacing}, affine {volume.affine.tolist()}")
        if np.abs(np.array(spacing_of(volume.affine)) / volume.spacing - 1).max() > 1e-6:
            raise Failed(f"spacing {volume.spacing} is not that of the affine {volume.affine.tolist()}")
        expected = reference(path)
        if expected is not None:
            found = np.sort(volume.array, None)
            expected = np.sort(expected.astype(np.float32), None)
            if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-5):
                raise Failed(f"accepted values {found[:3]} .. {found[-3:]} ({len(found)}), in the file are {expected[:3]} .. "
                             f"{expected[-3:]} ({len(expected)})")
    out, err = io.StringIO(), io.StringIO()
    config = functools.partial(DataConfig, max_gib=MAX_GIB)
    with unittest.mock.patch.object(data, "DataConfig", config), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = data.main(["--", str(path)])
    lines = out.getvalue().splitlines()
    if not os.path.isfile(path) and code == 2 and not lines:     # the half of a pair that is not there
        check_line(err.getvalue().removesuffix("\n"), *shown)
        return outcome
    if code not in (0, 1) or err.getvalue() or len(lines) != 3 or not all(line.isprintable() for line in lines):
        raise Failed(f"data.py ended with {code}: {lines} {err.getvalue()!r}")
    if code == 0 and (outcome == "refused" or any(word in lines[1].split(show(path))[-1].split() for word in ("nan", "inf"))):
        raise Failed(f"data.py took it: {lines[1]!r}")
    return outcome


def reference(path: Path) -> np.ndarray | None:
    """The voxels by another way of reading; None where there is none."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive:               # numpy's own reader wants the file to begin with it
                names = {member.removesuffix(".npy"): member for member in archive.namelist()}
                keys = [key for key in DENSE_KEYS if key in names] or list(names)[:len(names) == 1]
                return np.lib.format.read_array(archive.open(names[keys[0]]), allow_pickle=False) if keys else None
        stem = path.name.lower().removesuffix(".gz")
        other = {".hdr": ".img", ".img": ".hdr"}.get(stem[-4:])
        halves = [file for file in path.parent.iterdir() if other and file.name.lower().startswith(stem[:-4] + other)]
        second = halves[0] if halves else path
        header_file, voxel_file = (second, path) if stem.endswith(".img") else (path, second)
        opener = gzip.open if path.name.lower().endswith(".gz") else open
        with opener(header_file, "rb") as stream:
            return nifti_voxels(stream.read(544), lambda: opener(voxel_file, "rb"))


NIFTI_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}


def nifti_voxels(head: bytes, voxel_file: Callable) -> np.ndarray | None:
    """NIfTI-1 and NIfTI-2 by the standard's table of offsets."""
    for order in "<>":
        if struct.unpack(order + "i", head[:4])[0] == 540:
            dims, kind = struct.unpack(order + "8q", head[16:80]), struct.unpack(order + "h", head[12:14])[0]
            offset, slope, inter = struct.unpack(order + "q", head[168:176])[0], *struct.unpack(order + "2d", head[176:192])
            break
    else:
        if head[344:348] not in (b"n+1\0", b"ni1\0"):
            return None                                          # Analyze and others
        order = "<" if 1 <= struct.unpack("<h", head[40:42])[0] <= 7 else ">"
        dims, kind = struct.unpack(order + "8h", head[40:56]), struct.unpack(order + "h", head[70:72])[0]
        offset, slope, inter = struct.unpack(order + "3f", head[108:120])
    if kind not in NIFTI_TYPES or not 1 <= dims[0] <= 7:
        return None
    count, dtype = math.prod(dims[1:1 + dims[0]]), np.dtype(order + NIFTI_TYPES[kind])
    with voxel_file() as stream:
        stream.seek(int(offset))
        array = np.frombuffer(stream.read(count * dtype.itemsize), dtype)
    return array if slope == 0 or not math.isfinite(slope) else array * np.float64(slope) + inter


def judge_json(path: Path, rng: random.Random) -> str:
    said: list[str] = []
    cfg = DataConfig(path=str(path), cache_dir=str(path.parent.parent / "cache"), max_gib=MAX_GIB, patch=(4, 4, 4),
                          labels=rng.random() < 0.4, strict=rng.random() < 0.1, foreground=rng.choice((0.0, 0.5)))
    shown = (show(path), *(show(other) for other in (path.parent.parent / "volumes").glob("*")), show(path.parent),
             os.path.expanduser("~"), "/dev/")
    try:
        opened = data.open_data(cfg, 0, said.append)
    except DataError as error:
        check_line(error, *shown, limit=6000)                    # a path in the list may be long
        outcome = "refused"
    else:
        outcome = "accepted"
        for image, *_ in (data.Crops(opened, 0)[0], data.val_crops(opened, 0, 1)[0]):
            if image.shape[1:] != (4, 4, 4) or not torch.isfinite(image).all():
                raise Failed(f"crop {tuple(image.shape)}, finite: {bool(torch.isfinite(image).all())}")
    for line in said:
        check_line(line, limit=6000)
    return outcome


def judge_yaml(path: Path, rng: random.Random) -> str:
    try:
        cfg = runs.load_config(["--config", str(path)])
    except ValueError as error:
        check_line(training.console.line_of(error))                        # as main prints it
        return "refused"
    again = path.with_name("again.yaml")
    again.write_text(training.config.to_yaml(cfg), encoding="utf-8")
    if repr(runs.load_config(["--config", str(again)])) != repr(cfg):
        raise Failed("the resolved config is another one when it is read again")
    return "accepted"


def judge_pt(path: Path, rng: random.Random) -> str:
    try:
        content = checkpoints.load(path, "vae3d.train", "vae3d.weights")
    except ValueError as error:
        check_line(training.console.line_of(error), training.console.line_of(path))
        outcome = "refused"
    else:
        outcome = "accepted"
        if content.get("kind") not in checkpoints.VERSIONS:
            raise Failed(f"accepted kind {content.get('kind')!r}")
    if Path("executed").exists():
        raise Failed("it ran code")
    return outcome


def judge_run(path: Path, rng: random.Random) -> str:
    """train.py goes on from it by a step, or says in a line why not."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = train.main(["--resume", str(path), "--steps", "3"])
    if code == 0 and not errors.getvalue():
        outcome = "accepted"
    elif code in (1, 2) and errors.getvalue().count("\n") == 1:
        check_line(errors.getvalue().removesuffix("\n"))
        outcome = "refused"
    else:
        raise Failed(f"code {code}, stderr {errors.getvalue()[:2000]!r}")
    return outcome


class Format(NamedTuple):
    make: Callable[[random.Random, Path, str], Path]
    judge: Callable[[Path, random.Random], str]


FORMATS = {"nii": Format(make_nii, judge_volume), "nii.gz": Format(make_nii_gz, judge_volume), "pair": Format(make_pair, judge_volume),
           "npy": Format(make_npy, judge_volume), "npz": Format(make_npz, judge_volume), "json": Format(make_json, judge_json),
           "yaml": Format(make_yaml, judge_yaml), "pt": Format(make_pt, judge_pt), "run": Format(make_run, judge_run)}


class Result(NamedTuple):
    number: int
    outcome: str          # accepted | refused | the failure
    seconds: float
    mib: float            # that the case took on top of what the process had


def status(field: str) -> float:
    """MiB of this process, from /proc (Linux)."""
    with open("/proc/self/status") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith(field)) / 1024


def run_case(name: str, seed: int, number: int, folder: Path) -> Result:
    """Make and judge one case below `folder`, which keeps its files when it fails."""
    rng = random.Random(f"{seed} {name} {number}")
    place = folder / "case"
    place.mkdir(parents=True, exist_ok=True)
    linux = os.access("/proc/self/clear_refs", os.W_OK)
    try:
        path = FORMATS[name].make(rng, place, rng.choice(NAMES))
    except Exception:
        return Result(number, f"FAILED to make the file: {traceback.format_exc()}", 0.0, 0.0)
    if linux:
        Path("/proc/self/clear_refs").write_text("5")            # the peak begins anew
    before, start = status("VmRSS") if linux else 0.0, time.process_time()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            outcome = FORMATS[name].judge(path, rng)
        if caught:
            raise Failed(f"warned: {caught[0].message}")
    except Failed as error:
        outcome = f"FAILED {error}"
    except Exception:
        outcome = f"FAILED {traceback.format_exc()}"
    seconds, mib = time.process_time() - start, status("VmHWM") - before if linux else 0.0
    if not outcome.startswith("FAILED") and seconds > SECONDS:
        outcome = f"FAILED took {seconds:.1f} s"
    if not outcome.startswith("FAILED") and mib > MEMORY:
        outcome = f"FAILED took {mib:.0f} MiB"
    if not outcome.startswith("FAILED"):
        shutil.rmtree(place)
    return Result(number, outcome, seconds, mib)


# ------------------------------------------------------------------------------------------------------------------- processes
def child(name: str, seed: int, numbers: range) -> None:
    """Cases of one process, a line of JSON each. What goes to standard error counts as a failure."""
    limit = int(status("VmSize") * 2**20) + 2**32                # a bomb that goes off ends here, not in the machine
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "w")
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as sink:
        os.chdir(folder)
        os.dup2(sink.fileno(), 1)
        os.dup2(sink.fileno(), 2)
        for number in numbers:
            result, noise = run_case(name, seed, number, Path(folder)), os.fstat(2).st_size
            if noise:
                result = result._replace(outcome=f"FAILED printed {os.pread(2, 2000, 0)!r}")
                os.ftruncate(2, 0)
            print(json.dumps(result), file=out, flush=True)


def campaign(name: str, seed: int, count: int) -> tuple[list[Result], int]:
    """All cases of a format in as many children as it takes, and their number. A child that ends or hangs costs its case alone."""
    results: list[Result] = []
    children = 0
    while len(results) < count:
        numbers = range(len(results), min(count, len(results) + BATCH))
        command = [sys.executable, __file__, "--format", name, "--seed", str(seed), "--child", f"{numbers.start}:{numbers.stop}"]
        process, children = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE), children + 1
        buffer, why = b"", ""
        while True:
            ready = select.select([process.stdout], [], [], HANG)[0]
            part = os.read(process.stdout.fileno(), 2**16) if ready else b""
            if not part:
                why = "ended" if ready else f"gave no answer for {HANG:g} s and"
                break
            *lines, buffer = (buffer + part).split(b"\n")
            results += [Result(*json.loads(line)) for line in lines]
        if not ready:
            process.kill()
        stderr = process.communicate()[1].decode(errors="replace")
        if len(results) < numbers.stop:
            results.append(Result(len(results), f"FAILED the process {why} with {process.returncode}: {stderr[-500:]}", 0.0, 0.0))
        for result in results[numbers.start:]:
            if result.outcome.startswith("FAILED"):
                print(f"{name} --seed {seed} --case {result.number}: {result.outcome.strip()}", flush=True)
    return results, children


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS), metavar="NAME", help=" | ".join(FORMATS) + " [all]")
    parser.add_argument("--count", type=int, default=5000, help="cases of each format [5000]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one alone, here, and keep its files")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        child(options.format[0], options.seed, range(*map(int, options.child.split(":"))))
        return 0
    if options.case is not None:
        folder = Path(tempfile.mkdtemp())
        with unittest.mock.patch.object(Path, "unlink"), contextlib.chdir(folder):
            result = run_case(options.format[0], options.seed, options.case, folder)
        print(f"{result.outcome}\n{result.seconds:.2f} s, {result.mib:.0f} MiB; files in {folder}")
        return int(result.outcome.startswith("FAILED"))
    failed = 0
    print("format    cases accepted  refused failed processes  seconds  slowest most MiB")
    for name in options.format:
        start = time.monotonic()
        results, children = campaign(name, options.seed, options.count)
        counts = Counter(result.outcome.split()[0] for result in results)
        failed += counts["FAILED"]
        print(f"{name:8} {len(results):6} {counts['accepted']:8} {counts['refused']:8} {counts['FAILED']:6} {children:9} "
              f"{time.monotonic() - start:8.0f} {max(r.seconds for r in results):8.2f} {max(r.mib for r in results):8.0f}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
