"""Stored values to intensities in [-1, 1], and back.

CT: HU clipped to a range. MR (and any other positive scale, such as PET): two percentiles of the
foreground, per channel, clipped below only. Voxel grids (radar, LiDAR): divided by the largest magnitude
per channel, 0 stays 0. Pictures: the range of their type, 0 to 255 or 65535.

Arrays are (C, D, H, W): C channels, D H W depth height width. Version 1.1.
"""
from typing import NamedTuple

import numpy as np

from volumes.config import MODALITIES, DataConfig
from volumes.files import DataError


class Intensity(NamedTuple):
    """How stored values were mapped: per channel, `low` went to -1 and `high` to 1.

    Undone by `denormalise`.
    """
    modality: str  # ct | mr | voxel | picture
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def background(self) -> float:
        """Normalised value of nothing: air, or an empty voxel."""
        return 0.0 if self.modality == "voxel" else -1.0


def guess_modality(array: np.ndarray) -> str:
    """Stored values -> "ct", "mr" or "voxel", from some 10^6 of them.

    voxel: 95 % are exactly 0, not all of them. ct: at least 0.5 % lie where air and lung do (-1250 to -400
    HU), what is below is one padding value (scanners write -1500, -2000, -3024), and hardly anything is
    above 5000. Everything else is mr.
    """
    values = array.reshape(-1)[::max(1, array.size // 2**20) | 1]
    if values.min() < values.max() and np.mean(values == 0) >= 0.95:
        return "voxel"
    below = values[values < -1250]
    is_padding = len(below) < 1e-3 * len(values) or np.mean(below == below.min()) > 0.9
    has_air = np.mean((values >= -1250) & (values <= -400)) > 5e-3
    is_rarely_above = np.mean(values > 5000) < 1e-3
    return "ct" if is_padding and has_air and is_rarely_above else "mr"


def normalise(array: np.ndarray, modality: str = "auto",
              hu_range: tuple[float, float] = DataConfig.hu_range,
              voxel_scale: tuple[float, ...] | None = None, picture_max: float = 255.0,
              percentiles: tuple[float, float] = DataConfig.percentiles,
              percentiles_of: str = DataConfig.percentiles_of) -> tuple[np.ndarray, Intensity]:
    """(C, D, H, W) as stored -> (C, D, H, W) float32 in about [-1, 1], and the map that `denormalise` undoes.

    ct: hu_range to [-1, 1], clipped. mr: `percentiles` of the voxels above 0 (or of all), clipped at -1 but
    not above. voxel: divided by voxel_scale, or by the largest magnitude of the channel, so that 0 stays 0.
    picture: 0 to picture_max, clipped. Raises DataError for a volume that is constant (unless it is a voxel
    grid, which may be empty) or whose values float32 cannot scale.
    """
    if modality == "auto":
        modality = guess_modality(array)
    else:
        modality = MODALITIES[modality]
    if modality != "voxel" and all(channel.min() == channel.max() for channel in array):
        raise DataError(f"every voxel is {array.flat[0]:g}: nothing to learn from; take the file out of the "
                        f"data")

    # First the two values of each channel that become -1 and 1.
    if modality == "ct":
        limits = [tuple(map(float, hu_range))] * len(array)
    elif modality == "picture":
        limits = [(0.0, float(picture_max))] * len(array)
    elif modality == "mr":
        limits = [percentiles_in(channel, percentiles, percentiles_of) for channel in array]
    else:
        scales = voxel_scale or [float(np.abs(channel).max()) or 1.0 for channel in array]
        if len(scales) != len(array):
            raise DataError(f"has {len(array)} channels, data.voxel_scale has {len(scales)}; give one per "
                            f"channel")
        limits = [(-float(scale), float(scale)) for scale in scales]

    # Then the map: (value - middle) / half the distance.
    highest = {"ct": 1, "picture": 1, "mr": None}  # what is clipped
    out = np.empty(array.shape, dtype=np.float32)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        for channel, result, (low, high) in zip(array, out, limits):
            np.subtract(channel, (high + low) / 2, out=result, casting="same_kind")
            result /= (high - low) / 2
            if modality in highest:
                np.clip(result, -1, highest[modality], out=result)
    if not (np.isfinite(out.min()) and np.isfinite(out.max())):
        raise DataError(f"values from {array.min():.3g} to {array.max():.3g} cannot be scaled in float32; "
                        f"repair the file")
    return out, Intensity(modality, tuple(low for low, _ in limits), tuple(high for _, high in limits))


def percentiles_in(channel: np.ndarray, wanted: tuple[float, float], of: str) -> tuple[float, float]:
    """Two percentiles of all voxels, or of the foreground: those above 0, or above the least if none is."""
    least = float(channel.min())
    foreground = channel
    if of != "all":
        foreground = channel[channel > 0] if channel.max() > 0 else channel[channel > least]
    if not foreground.size:
        return least, least + 1.0  # one empty channel of several
    low, high = (float(value) for value in np.percentile(foreground, wanted))
    if high > low:
        return low, high
    if high > least:
        return least, high
    return least, least + 1.0


def denormalise(array: np.ndarray, intensity: Intensity) -> np.ndarray:
    """(C, D, H, W) in [-1, 1] -> the scale of the file: HU come back as HU.

    What was clipped stays clipped.
    """
    low = np.asarray(intensity.low, dtype=np.float64).reshape(-1, 1, 1, 1)
    high = np.asarray(intensity.high, dtype=np.float64).reshape(-1, 1, 1, 1)
    return (array * ((high - low) / 2) + (high + low) / 2).astype(np.float32)
