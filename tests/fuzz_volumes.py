"""Volumes that are damaged or lie: NIfTI images and numpy's arrays, for fuzz_data.py.

A file is a function of the random state it is given.
"""
import functools
import gzip
import io
import math
import os
import random
import struct
import warnings
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np


# -------------------------------------------------------------------------------------------------- mutations
def flip(rng: random.Random, content: bytes, reach: int | None = None) -> bytes:
    """A few bytes changed, most often near the start, where headers are."""
    out, reach = bytearray(content), min(len(content), reach or len(content))
    for _ in range(rng.choice((1, 1, 2, 5, 30)) if reach else 0):
        place = rng.randrange(reach)
        out[place] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256), out[place] ^ 1 << rng.randrange(8)))
    return bytes(out)


def cut(rng: random.Random, content: bytes) -> bytes:
    places = (
        0, 1, 3, 4, 8, 40, 128, 344, 347, 348, 351, 352, 353, len(content) // 2, len(content) - 8,
        len(content) - 4, len(content) - 1)
    return content[:max(0, rng.choice((*places, rng.randrange(len(content) + 1))))]


def grow(rng: random.Random, content: bytes) -> bytes:
    return content + rng.choice(
        (b"\0", b"\0" * 1000, rng.randbytes(rng.randrange(1, 2000)), content, b"\xff" * 7))


def overwrite(rng: random.Random, content: bytes) -> bytes:
    """What another program left: nothing, zeros, text, another format."""
    other = (
        b"", b"\0" * len(content), b"<html>404</html>", rng.randbytes(500), b"\x1f\x8b" + content,
        b"PK\3\4" + content, b"\x93NUMPY", gzip.compress(content), b"\x89PNG\r\n\x1a\n",
        b"version https://git-lfs.github.com/spec/v1\n", content[::-1])
    return rng.choice(other)


def common(rng: random.Random, content: bytes) -> bytes:
    return rng.choice((flip, flip, cut, grow, overwrite))(rng, content)


@functools.lru_cache(maxsize=4)
def zeros(mib: int) -> bytes:
    """A raw deflate stream of that many MiB, a thousandth of it long."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    # After a full flush nothing before it is referred to, so the part may be repeated.
    first = deflate.compress(bytes(2**20)) + deflate.flush(zlib.Z_FULL_FLUSH)
    return first * mib + zlib.compressobj(9, zlib.DEFLATED, -15).flush()


def gzip_bomb(start: bytes, mib: int) -> bytes:
    return gzip.compress(start) + b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + zeros(mib) + struct.pack("<2I", 0, 0)


# ----------------------------------------------------------------------------------------------- NIfTI images
PAIR_HEADERS = {nib.Nifti1Header: nib.nifti1.Nifti1PairHeader, nib.Nifti2Header: nib.nifti2.Nifti2PairHeader}


def voxels(rng: random.Random, dtype: str, axes: int = 3) -> np.ndarray:
    noise = np.random.default_rng(rng.randrange(2**32))
    array = noise.integers(0, 200, [rng.randrange(1, 8) for _ in range(axes)]).astype(dtype)
    if array.dtype.kind in "fi":
        array = array * (5 if array.dtype.itemsize > 1 else 1) - 100
    if array.dtype.kind == "f" and rng.random() < 0.2:
        array.flat[rng.randrange(array.size)] = rng.choice(
            (math.nan, math.inf, -math.inf, 6e4, np.finfo(array.dtype).max, 1e-39))
    return array.astype(dtype)


def header_value(rng: random.Random, dtype: np.dtype) -> object:
    if dtype.kind == "S":
        return rng.choice((
            b"n+1\0", b"ni1\0", b"n+2\0", b"", b"\0\0\0\0", b"n+1", b"\xff" * dtype.itemsize,
            rng.randbytes(dtype.itemsize)))
    if dtype.kind == "f":
        return rng.choice((
            0.0, -0.0, 1.0, -1.0, math.nan, math.inf, -math.inf, 1e-39, 1e-30, 3e38, -3e38, 352.0, 353.5,
            1e6, 1e12, -352.0, 5e-324, rng.uniform(-10, 10)))
    info = np.iinfo(dtype)
    value = rng.choice((
        0, 1, 2, 3, 4, 5, 7, 8, 16, 64, 128, 255, 256, 348, 540, 1536, 1792, 2304, -1, 32767, info.min,
        info.max, rng.randrange(info.min, info.max + 1)))
    return min(max(value, info.min), info.max)


def set_fields(rng: random.Random, content: bytes, header: nib.Nifti1Header) -> bytes:
    """One to four fields of the header set to extremes."""
    dtype = header.structarr.dtype
    fields, out = np.frombuffer(bytearray(content[:dtype.itemsize]), dtype).copy(), content[dtype.itemsize:]
    likely = (
        "dim", "dim", "dim", "pixdim", "pixdim", "datatype", "vox_offset", "scl_slope", "scl_inter", "magic",
        "sizeof_hdr", "sform_code", "qform_code", "srow_x", "quatern_b", "bitpix", "intent_code")
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(likely) if rng.random() < 0.8 else rng.choice(dtype.names)
        target = fields[name]
        place = (0, *(rng.randrange(n) for n in target.shape[1:]))
        target[place] = header_value(rng, target.dtype)
    return fields.tobytes() + out


def nifti(rng: random.Random, pair: bool = False) -> tuple[bytes, bytes, nib.Nifti1Header]:
    """A small good image: header (with all that stands before the voxels), voxels, header as an object."""
    dtype = rng.choice(
        ("int16", "int16", "uint8", "float32", "float64", "int32", "uint16", "int8", "uint32", "int64"))
    array = voxels(rng, dtype, rng.choice((2, 3, 3, 3, 3, 4)))
    affine = nib.affines.from_matvec(
        np.diag([rng.choice((-1, 1)) * rng.choice((0.5, 1.0, 3.0)) for _ in range(3)]), (1, 2, 3))
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
            front += struct.pack(
                header.endianness + "2i", said, rng.choice((0, 2, 4, 6, 32, 99))) + rng.randbytes(size - 8)
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
        packed = (
            gzip.compress(content[:middle]) + rng.choice((b"", gzip.compress(b"")))
            + gzip.compress(content[middle:]))
    elif what < 0.87:
        packed += rng.choice(
            (b"\0" * 512, rng.randbytes(30), b"\x1f\x8b", packed, b"\x1f\x8b\x08" + b"\0" * 20))
    elif what < 0.90:
        packed = rng.choice((content, gzip.compress(packed), zlib.compress(content), b"BZh9" + packed))
    elif what < 0.93:
        # inflates to GiB: behind the voxels, as an extension, or in front of the voxels
        front, body, header = nifti(rng)
        where = rng.randrange(3)
        if where == 1:
            front = (
                front[:header.sizeof_hdr] + b"\1\0\0\0"
                + struct.pack(header.endianness + "2i", 2**31 - 16, 6))
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
        (folder / f"{name}{end}{tail}").write_bytes(
            cut(rng, content) if tail and rng.random() < 0.1 else content)
    if len(halves) == 1 and rng.random() < 0.5:
        other = folder / f"{name}{({'.hdr', '.img'} - set(halves)).pop()}{tail}"
        rng.choice((os.mkdir, os.mkfifo))(other)
    return folder / f"{name}{rng.choice(('.hdr', '.img'))}{tail}"


# --------------------------------------------------------------------------------------------- numpy's arrays
SHAPES = (
    "(3, 4, 5)", "(0, 4, 5)", "(-1, 4, 5)", "(-3, -4, 5)", "(3, 4, 5, 2)", "(60,)", "()",
    "(99999, 99999, 99999)", "(1000, 1000, 1000)", f"({10**30}, 4, 5)", f"({10**400}, 1, 1)",
    f"({'1, ' * 70})", "(True, 4, 5)", "(3.0, 4, 5)", "('3', 4, 5)", "3", "None", "[3, 4, 5]",
    "(3, 4, 5) * 2", "(1j, 2, 3)", "(2**62, 4, 1)", "(4611686018427387904, 4, 4)", f"({'9' * 5000}, 1, 1)",
    "(3, (4,), 5)", "(60, 1, 1)")
DESCRS = (
    "'<f4'", "'>f4'", "'|O'", "'O'", "'<f2'", "'<f8'", "'<f16'", "'|b1'", "'<c8'", "'|V4'", "'|S4'", "'<U1'",
    "'<M8[s]'", "'<m8'", "[('a', '<f4')]", "[('a', '<f4', (1000000,))]", "'(2,2)<f4'", "('<f4', (2, 2))",
    "'|V0'", "'|S0'", "'f4,f4'", "'object'", "'<i3'", "''", "'<f4 '", "None", "42",
    '\'__import__("os").system("true")\'', "[('a', '|O')]", "[]", "('<f4',)",
    "{'names': ['a'], 'formats': ['<f4']}", "'x' * 10**9", "'<V999999999'", "'|S2147483647'")


def npy(rng: random.Random, hostile: bool = True) -> bytes:
    array = voxels(
        rng, rng.choice(("<i2", "<f4", ">f4", "<f8", "|u1", "<f2", "|b1", "<i8")),
        rng.choice((3, 3, 3, 3, 4, 2)))
    if rng.random() < 0.3:
        array = np.asfortranarray(array)
    stream = io.BytesIO()
    np.lib.format.write_array(
        stream, array, rng.choice(((1, 0), (1, 0), (2, 0), (3, 0))) if hostile else (1, 0))
    content = stream.getvalue()
    if not hostile or rng.random() < 0.5:
        return content
    text = rng.choice((
        "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}, }}",
        "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}}}", "{{'descr': {d}, 'shape': {s}}}",
        "{{'descr': {d}, 'descr': {d}, 'fortran_order': {f}, 'shape': {s}, 'x': 1}}", "{d}", "{s}",
        "({d}, {s})", "{{**{{}}, 'descr': {d}}}", "(lambda: 0)()", "__import__('os').system('true')",
        "[" * 300, "(" * 5000 + ")" * 5000, "-" * 3000 + "1", "{{" * 80, "'descr'" * 400,
        "{{'descr': {d}, 'fortran_order': {f}, 'shape': {s}L, }}", "\udcff{d}"))
    text = (
        text.format(
            d=rng.choice(DESCRS) if rng.random() < 0.6 else "'<f4'",
            f=rng.choice(("False", "False", "True", "0", "None", "'x'")),
            s=rng.choice(SHAPES)).encode("utf-8", "surrogateescape")
        + b" " * rng.randrange(20) + b"\n")
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
    packing = rng.choice(
        (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
        if rng.random() < 0.2 else (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    good = functools.partial(npy, hostile=False)
    if what < 0.25:                                              # one array; the .npy may be bad
        members = [
            (
                rng.choice((
                    "vol.npy", "volume.npy", "x.npy", "vol", "../vol.npy", "/etc/vol.npy", "vol/",
                    "x/../vol.npy", ".npy", "vol.npy\0x", "名.npy")),
                mutated_npy(rng) if rng.random() < 0.7 else good(rng))]
    elif what < 0.45:                                            # sparse: parts missing, of wrong type
        parts = {
            "shape": np.array(
                rng.choice((
                    (4, 4, 4), (4, 4, 4, 2), (0, 4, 4), (2**40, 2**40, 2**40), (-4, 4, 4), (4, 4),
                    (4.0, 4, 4)))),
            "coords": np.array(
                rng.choice(
                    (((0, 1, 2), (3, 3, 3)), ((0, 1, 9), (3, 3, 3)), ((-1, 1, 2), (0, 0, 0)), (0, 1, 2), ()))
            ),
            "features": np.array(
                rng.choice((((1.0, 2), (3, 4)), (1.0, 2.0), (math.nan, 1), ("a", "b"), (1j, 2), ())))}
        parts = {
            key: part.astype("uint64")
            if key != "features" and rng.random() < 0.1 and part.size and part.min() >= 0 else part
            for key, part in parts.items() if rng.random() < 0.95}
        members = [(f"{key}.npy", as_npy(part)) for key, part in parts.items()]
    elif what < 0.6:                                             # names twice, many arrays, other things
        names = rng.choices(
            (
                "vol.npy", "vol", "volume.npy", "seg.npy", "a.npy", "b.npy", "a/b.npy", "../../x.npy",
                "readme.txt"),
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
    if what >= 0.93:                                             # bombs: the size in the directory may lie
        mib, header = rng.choice((20, 300, 2048)), as_npy(np.zeros((1, 1, 1), np.float32))[:-4]
        shape = rng.choice((f"({mib}, 512, 512)", "(64, 512, 512)", "(1, 1, 1)", "(4, 4, 4)"))
        start = (
            header.replace(b"(1, 1, 1)", shape.encode()) if rng.random() < 0.7
            else b"\x93NUMPY\x02\0" + struct.pack("<I", 2**32 - 1))
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        body = deflate.compress(start) + deflate.flush(zlib.Z_FULL_FLUSH) + zeros(mib)
        content = one_member("vol.npy", body, rng.choice((mib * 2**20 + len(start), 2**32 - 2, 400, 0)))
    elif what >= 0.6:
        change = rng.random()
        if change < 0.4:                                         # flags, method, checksum, sizes, name
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
    local = (
        b"PK\3\4" + struct.pack("<H", 20) + fields + struct.pack("<HH", len(name), 0) + name.encode()
        + deflated)
    entry = (
        b"PK\1\2" + struct.pack("<HH", 20, 20) + fields + struct.pack("<HHHHHII", len(name), 0, 0, 0, 0, 0, 0)
        + name.encode())
    return local + entry + b"PK\5\6" + struct.pack("<HHHHIIH", 0, 0, 1, 1, len(entry), len(local), 0)
