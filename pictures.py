"""What one looks at: orthogonal slices of volumes side by side, and PNG files by the standard library.

Volumes are (D, H, W), pictures (height, width, 3) in [0, 255]. Works when it is copied alone. Version 0.1 (2026-11).
"""
from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

FRAME = 64                                                       # the grey around and between the slices
LARGEST = 4096                                                   # pixels of a slice's longer side, whatever spacing a header claims


def comparison(image: Tensor, recon: Tensor, spacing: Sequence[float], background: float, is_picture: bool = False) -> Tensor:
    """Input, reconstruction and error (columns) in axial, coronal and sagittal slices (rows).

    image, recon (C, D, H, W) -> (height, width, 3) uint8. First channel; of each axis the slice with the most foreground. Grey is -1 to 1;
    the error runs from black (0) over red to yellow (0.5).
    """
    image, recon = image[0], recon[0]
    weight, columns = (image - background).abs(), (([image], grey), ([recon], grey), ([recon, image], error))
    return sheet([slices(volumes, weight, spacing, colour, is_picture) for volumes, colour in columns])


def label_comparison(image: Tensor, labels: Sequence[Tensor], spacing: Sequence[float], is_picture: bool = False) -> Tensor:
    """Input and, for each of labels, a colour per class over it (columns) in axial, coronal and sagittal slices (rows).

    image (C, D, H, W), labels (D, H, W) -> (height, width, 3) uint8. Of each axis the slice with the most voxels that the first one labels.
    """
    plain, weight = image[0], (labels[0] > 0).float()
    return sheet([slices([plain], weight, spacing, grey, is_picture),
                  *(slices([plain, label], weight, spacing, coloured, is_picture) for label in labels)])


def grey(v: Tensor) -> Tensor:
    """(...) in [-1, 1] -> (..., 3)."""
    return ((v.clamp(-1, 1) + 1) * 127.5)[..., None].expand(*v.shape, 3)


def error(a: Tensor, b: Tensor) -> Tensor:
    """|a - b| (...) -> (..., 3): black (0), red (0.25), yellow (0.5)."""
    far = (a - b).abs() / 0.5 * 2
    return torch.stack([far.clamp(0, 1), (far - 1).clamp(0, 1), torch.zeros_like(far)], -1) * 255


def coloured(v: Tensor, label: Tensor) -> Tensor:
    """(...) in [-1, 1] -> (..., 3): grey, with a colour per class where label (...) is not 0; neighbouring numbers get hues far apart."""
    hue = (label * 0.381966 % 1)[..., None] * 6                  # golden-angle steps around the colour circle
    slope, offset = torch.tensor([1.0, -1.0, -1.0]), torch.tensor([-1.0, 2.0, 2.0])
    colour = 255 * ((hue - torch.tensor([3.0, 2.0, 4.0])).abs() * slope + offset).clamp(0, 1)
    return torch.where((label > 0)[..., None], 0.5 * grey(v) + 0.5 * colour, grey(v))


def slices(volumes: Sequence[Tensor], weight: Tensor, spacing: Sequence[float], colour: Callable[..., Tensor],
           is_picture: bool = False) -> list[Tensor]:
    """Axial, coronal and sagittal slice where weight (D, H, W) sums to most; of a flat volume the one that is not seen edge-on.

    colour: makes slices (h, w) of the volumes (D, H, W) an image (h, w, 3). Pixels are square in mm, head and front up, the patient's right
    on the left; a picture is the right way up already.
    """
    shape, found = volumes[0].shape, []
    for axis in range(3):
        others = [a for a in range(3) if a != axis]
        if min(shape[a] for a in others) == 1 < sorted(shape)[1]:  # edge-on
            continue
        at, extent = int(weight.sum(others).argmax()), [shape[a] * spacing[a] for a in others]       # mm
        image = colour(*(volume.select(axis, at) for volume in volumes)).float()
        image = image if is_picture else image.flip(0, 1)        # from RAS
        pixel = max(min(spacing[a] for a in others), max(extent) / LARGEST)
        size = [max(1, round(mm / pixel)) for mm in extent]
        factor = max(1, 256 // max(size))
        found.append(F.interpolate(image.movedim(-1, 0)[None], [n * factor for n in size], mode="nearest")[0].movedim(0, -1))
    return found


def sheet(columns: Sequence[Sequence[Tensor]]) -> Tensor:
    """One picture (height, width, 3) uint8 of columns of slices, each framed."""
    rows = [torch.cat([F.pad(panel, (0, 0, 2, 2, 2, 2), value=FRAME) for panel in row], 1) for row in zip(*columns)]
    width = max(row.shape[1] for row in rows)
    return torch.cat([F.pad(row, (0, 0, 0, width - row.shape[1]), value=FRAME) for row in rows]).round().to(torch.uint8)


def png(image: Tensor) -> bytes:
    """(height, width, 3) uint8 -> the bytes of a PNG file (RFC 2083)."""
    height, width, _ = image.shape
    raw = b"".join(b"\0" + row.numpy().tobytes() for row in image.contiguous())

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(raw, 6)) + chunk(b"IEND", b""))
