"""PNG, JPEG, BMP, TIFF and GIF through Pillow: a volume of 1 slice, its rows H from the top; PNG, written
back.

Pillow is asked for only where there is a picture. Version 1.0.
"""
from pathlib import Path
from typing import BinaryIO

import numpy as np

from volumes.files import DataError, PackageError
from volumes.volume import Origin, Request, Source, Volume, check_size

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".gif")
DECODERS = ("PNG", "JPEG", "BMP", "TIFF", "GIF")  # of Pillow; none of those that run another program


# ---------------------------------------------------------------------------------------------- reading
def read_picture(path: Path, request: Request) -> Source:
    """A picture as (C, 1, H, W): 1 channel when it is grey, else 3; alpha is dropped.

    Of a label see `label_values`.
    """
    try:
        from PIL import Image
    except ImportError:
        raise PackageError("pictures are read with Pillow, which is not installed: python -m pip install "
                          "pillow") from None
    with Image.open(path, formats=DECODERS) as picture:
        check_size((1, picture.height, picture.width, len(picture.getbands())), 1, request.max_gib)
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's JPEG with a preview
            raise DataError(f"holds {picture.n_frames} frames; store one picture per file")
        if picture.mode == "F":
            raise DataError("holds floating-point pixels; store it as .npy or NIfTI")
        if request.label:
            array = label_values(picture)
        else:
            array = intensities(picture)
    if array.ndim == 2:
        array = array[..., None]                                 # (H, W, C)
    if array.dtype.kind != "u" or array.dtype.itemsize > 1:
        if array.min() < 0 or array.max() > 65535:
            raise DataError(f"holds pixels from {array.min()} to {array.max()}; store what is no 8 or 16 "
                            f"bit picture as .npy or NIfTI")
        array = array.astype(np.uint16)
    if request.label and array.shape[-1] > 1:
        if (array != array[..., :1]).any():
            raise DataError("a colour picture as label; store one class number per pixel, as grey or "
                            "palette values")
        array = array[..., :1]
    voxels = np.ascontiguousarray(array.transpose(2, 0, 1)[:, None], dtype=np.float32)  # (C, 1, H, W)
    return Source(Volume(voxels, (1.0, 1.0, 1.0), np.eye(4)), False, str(array.dtype), "-")


def is_grey(mode: str) -> bool:
    return mode in ("1", "L", "LA", "I") or mode.startswith("I;16")


def intensities(picture) -> np.ndarray:
    """Grey values (H, W) or colours (H, W, 3)."""
    if picture.mode in ("1", "LA"):
        picture = picture.convert("L")
    elif not is_grey(picture.mode):
        picture = picture.convert("RGB")
    return np.asarray(picture)


def label_values(picture) -> np.ndarray:
    """Grey values or palette numbers (H, W), or the colours (H, W, 3) of a picture that has neither."""
    if picture.format == "GIF":                                  # nothing but palettes: masks are grey
        return np.asarray(picture.convert("L"))
    if picture.mode == "P":
        return np.asarray(picture)
    if picture.mode == "PA":
        return np.asarray(picture.getchannel("P"))
    if picture.mode == "1":
        return np.asarray(picture).astype(np.uint8)
    if picture.mode == "LA":
        return np.asarray(picture)[..., :1]
    if is_grey(picture.mode):
        return np.asarray(picture)
    return np.asarray(picture.convert("RGB"))


# ---------------------------------------------------------------------------------------------- writing
def write_png(file: BinaryIO, array: np.ndarray, origin: Origin, slope: float, inter: float) -> None:
    """(C, 1, H, W) as PNG of 8 or 16 bits."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError("pictures are written with Pillow: python -m pip install pillow") from None
    stored = array[:, 0].transpose(1, 2, 0)                      # (H, W, C)
    if len(array) == 1:
        stored = array[0, 0]                                     # (H, W)
    if stored.dtype != np.uint8:
        stored = stored.astype(np.uint16)
    Image.fromarray(np.ascontiguousarray(stored)).save(file, "PNG")
