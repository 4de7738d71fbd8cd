"""MetaImage, NRRD and DICOM that are damaged or lie, for fuzz_data.py. SimpleITK writes them whole; what is
done to them is done to their bytes.

A file is a function of the random state it is given.
"""
import random
import re
import struct
import tempfile
from pathlib import Path

import numpy as np

from fuzz_volumes import common, flip

ENDINGS = (".mha", ".mhd", ".nrrd", ".nhdr", ".dcm", "")
NUMBERS = (b"0", b"-1", b"1", b"3", b"255", b"99999", b"2147483648", b"99999999999999999999", b"nan", b"inf",
           b"1e300", b"-1e-300", b"", b"x")


def make_sitk(rng: random.Random, folder: Path, name: str) -> Path:
    """One file; a header with its voxels beside it; or up to four slices of a series."""
    ending = rng.choice(ENDINGS)
    if ending in (".dcm", ""):
        return make_series(rng, folder, name, ending)
    parts = written(rng, ending)
    # Half of the time the header's words alone, since most changed bytes of voxels are no fault.
    header = next(iter(parts))
    kind = rng.random()
    if kind < 0.5:
        parts[header] = reworded(rng, parts[header])
    elif kind < 0.75:
        victim = rng.choice(list(parts))
        parts[victim] = common(rng, parts[victim])
    elif kind < 0.85 and len(parts) > 1:
        del parts[list(parts)[1]]
    for part, content in parts.items():
        (folder / part).write_bytes(content)
    path = folder / f"{name}{ending}"
    (folder / header).rename(path)
    return path


def written(rng: random.Random, ending: str) -> dict[str, bytes]:
    """Name -> content of the files of a whole volume, the header first."""
    import SimpleITK as sitk
    shape = [rng.randrange(1, 7) for _ in range(rng.choice((2, 3, 3, 3, 4)))]
    dtype = rng.choice(("u1", "i2", "u2", "i4", "f4", "f8"))
    state = np.random.default_rng(rng.randrange(2**32))
    components = rng.choice((1, 1, 1, 3)) if len(shape) < 4 else 1
    array = state.integers(0, 200, (*shape, components) if components > 1 else shape).astype(dtype)
    image = sitk.GetImageFromArray(array, isVector=components > 1)
    image.SetSpacing([rng.choice((1.0, 0.5, 3.27)) for _ in shape])
    with tempfile.TemporaryDirectory() as place:
        sitk.WriteImage(image, str(Path(place) / f"whole{ending}"), useCompression=rng.random() < 0.5)
        files = sorted(Path(place).iterdir(), key=lambda file: file.suffix != ending)
        return {file.name: file.read_bytes() for file in files}


def reworded(rng: random.Random, content: bytes) -> bytes:
    """One line of a text header left out, said twice, emptied or with another number; where the text ends is
    where the first byte of voxels may stand.
    """
    lines = content.split(b"\n")
    text = [number for number, line in enumerate(lines[:25]) if re.fullmatch(rb"[ -~]*\r?", line)]
    number = rng.choice(text)
    line, what = lines[number], rng.random()
    if what < 0.15:
        del lines[number]
    elif what < 0.25:
        lines.insert(number, line)
    elif what < 0.35:
        lines[number] = re.split(rb"[=:]", line)[0] + rng.choice((b"=", b": ", b""))
    elif what < 0.9:
        found = list(re.finditer(rb"-?\d+(\.\d+)?(e[-+]?\d+)?", line))
        if not found:
            for old, new in ((b"SHORT", b"FLOAT"), (b"True", b"False"), (b"gzip", b"raw")):
                line = line.replace(old, new)
            lines[number] = line
        else:
            place = rng.choice(found)
            lines[number] = line[:place.start()] + rng.choice(NUMBERS) + line[place.end():]
    else:
        lines[number] = flip(rng, line)
    return b"\n".join(lines)


def make_series(rng: random.Random, folder: Path, name: str, ending: str) -> Path:
    """Slices of one series in a folder, one of them damaged. Explicit VR, little endian, by hand."""
    count, rows, columns = rng.choice((1, 1, 3, 4)), rng.randrange(1, 6), rng.randrange(1, 6)
    paths = []
    for number in range(count):
        content = dicom(rng, number, rows, columns)
        if number == 0 and rng.random() < 0.85:
            content = common(rng, content) if rng.random() < 0.4 else other_element(rng, content)
        path = folder / (f"{name}{number if number else ''}{ending}")
        path.write_bytes(content)
        paths.append(path)
    if not ending and b"DICM" != paths[0].read_bytes()[128:132]:
        named = paths[0].with_name(paths[0].name + ".dcm")
        return paths[0].rename(named)
    return paths[0]


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    value += (b"\0" if kind == b"UI" else b" ") * (len(value) % 2)
    head = struct.pack("<HH", group, number) + kind
    if kind == b"OW":
        return head + struct.pack("<HI", 0, len(value)) + value
    return head + struct.pack("<H", len(value)) + value


def dicom(rng: random.Random, number: int, rows: int, columns: int) -> bytes:
    """A slice of CT, as small as the standard lets it be (PS3.10, PS3.5)."""
    meta = (element(2, 2, b"UI", b"1.2.840.10008.5.1.4.1.1.2") + element(2, 3, b"UI", b"1.2.3.%d" % number)
            + element(2, 0x10, b"UI", b"1.2.840.10008.1.2.1"))
    voxels = np.random.default_rng(number).integers(0, 2000, rows * columns).astype("<i2").tobytes()
    body = [
        (8, 0x16, b"UI", b"1.2.840.10008.5.1.4.1.1.2"), (8, 0x18, b"UI", b"1.2.3.%d" % number),
        (8, 0x60, b"CS", b"CT"), (0x20, 0xD, b"UI", b"1.2.4"), (0x20, 0xE, b"UI", b"1.2.5"),
        (0x20, 0x13, b"IS", b"%d" % number), (0x20, 0x32, b"DS", b"0\\0\\%d" % (2 * number)),
        (0x20, 0x37, b"DS", b"1\\0\\0\\0\\1\\0"), (0x28, 2, b"US", struct.pack("<H", 1)),
        (0x28, 4, b"CS", b"MONOCHROME2"), (0x28, 0x10, b"US", struct.pack("<H", rows)),
        (0x28, 0x11, b"US", struct.pack("<H", columns)), (0x28, 0x30, b"DS", b"0.98\\0.98"),
        (0x28, 0x100, b"US", struct.pack("<H", 16)), (0x28, 0x101, b"US", struct.pack("<H", 16)),
        (0x28, 0x102, b"US", struct.pack("<H", 15)), (0x28, 0x103, b"US", struct.pack("<H", 1)),
        (0x28, 0x1052, b"DS", b"-1024"), (0x28, 0x1053, b"DS", b"1"), (0x7FE0, 0x10, b"OW", voxels)]
    return (b"\0" * 128 + b"DICM" + element(2, 0, b"UL", struct.pack("<I", len(meta))) + meta
            + b"".join(element(*row) for row in body))


def other_element(rng: random.Random, content: bytes) -> bytes:
    """The value, the length or the kind of one element changed."""
    starts = [m.start() for m in re.finditer(rb"[\x08\x20\x28\xe0][\0\x7f]..(UI|CS|IS|DS|US|OW)", content)]
    if not starts:
        return common(rng, content)
    place, out = rng.choice(starts), bytearray(content)
    what = rng.random()
    if what < 0.5:
        length = max(1, struct.unpack("<H", content[place + 6:place + 8])[0])
        for byte in range(place + 8, min(place + 8 + length, len(out))):
            out[byte] = rng.choice((out[byte], 0, 255, *b"0129-.e\\x"))
    elif what < 0.75:
        out[place + 6:place + 8] = struct.pack("<H", rng.choice((0, 1, 2, 4, 255, 65534, 65535)))
    else:
        out[place + 4:place + 6] = rng.choice((b"UI", b"US", b"DS", b"OW", b"SQ", b"??"))
    return bytes(out)
