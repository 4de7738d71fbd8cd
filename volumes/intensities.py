"""Stored values to intensities in [-1, 1], and back.

CT: HU clipped to a range. MR (and any other positive scale, such as PET): two percentiles of the
foreground, per channel, clipped below only. Signed data (z-scores, phase, maps of t values): a percentile
of the magnitudes to 1, 0 stays 0, nothing is clipped. Voxel grids (radar, LiDAR): divided by the largest
magnitude per channel, 0 stays 0. Pictures: the range of their type, 0 to 255 or 65535.

Where a rule loses what may matter, `notes_of` says so in a line.

Arrays are (C, D, H, W): C channels, D H W depth height width. Version 1.2.
"""
from typing import NamedTuple

import numpy as np

from volumes.config import MODALITIES, DataConfig
from volumes.files import DataError
from volumes.surfaces import filled
from volumes.volume import Note

PADDINGS = 4       # values below air that a CT may hold: scanners and stitching pad with one each
SIGNED = 0.1       # of the high end of the values: a low end further below 0 is no noise or ringing
AT_LEAST = 0.02    # share of the voxels at the least value, from which on it is taken for the background
AIR = -1000.0      # HU
CT_AIR = -950.0    # HU below which nothing is told to be clipped: air, and padding
CLIPPED = 0.01     # share of the voxels that are no background; more than that is told when it is clipped
FEW = 10           # voxels that may be clipped in silence whatever their share, of a volume of 3,3,3 say
FAR_OUT = {"mr": 100.0, "signed": 100.0, "voxel": 1000.0}  # times the scale: a value beyond it is told


class Intensity(NamedTuple):
    """How stored values were mapped: per channel, `low` went to -1 and `high` to 1.

    Undone by `denormalise`.
    """
    modality: str  # ct | mr | signed | voxel | picture | surface (distances, of volumes/surfaces.py)
    low: tuple[float, ...]
    high: tuple[float, ...]

    @property
    def rule(self) -> str:
        """What data.modality calls it."""
        return "ct" if self.modality == "surface" else self.modality

    @property
    def background(self) -> float:
        """Normalised value of nothing: air, an empty voxel, the 0 of signed data, no point."""
        return 0.0 if self.modality in ("voxel", "signed", "surface") else -1.0


def guess_modality(array: np.ndarray) -> str:
    """Stored values -> "ct", "mr", "signed" or "voxel", from some 10^6 of them.

    voxel: 95 % are exactly 0, not all of them. ct: at least 0.5 % lie where air and lung do (-1250 to -400
    HU), what is below is a padding value or a few (scanners write -1500, -2000, -3024), and hardly anything
    is above 5000. signed: far below 0 too, without a background at the least value. Everything else is mr.
    """
    values = array.reshape(-1)[::max(1, array.size // 2**20) | 1]
    if values.min() < values.max() and np.mean(values == 0) >= 0.95:
        return "voxel"
    below = values[values < -1250]
    is_padding = len(below) < 1e-3 * len(values)
    if not is_padding:
        often = np.sort(np.unique(below, return_counts=True)[1])[-PADDINGS:]
        is_padding = often.sum() > 0.9 * len(below)
    has_air = np.mean((values >= -1250) & (values <= -400)) > 5e-3
    is_rarely_above = np.mean(values > 5000) < 1e-3
    if is_padding and has_air and is_rarely_above:
        return "ct"
    return "signed" if is_signed(values) and not has_floor(values) else "mr"


def fill(array: np.ndarray, bad: np.ndarray, modality: str) -> None:
    """Put background where `bad`, in place: air in a CT, 0 in others, of an MR no more than its least value.

    array (C, D, H, W) as stored; bad: a mask of it.
    """
    value = 0.0
    if modality == "ct":
        value = AIR
    elif modality == "mr" and not bad.all():
        value = min(0.0, float(array[~bad].min()))
    array[bad] = value


def is_signed(values: np.ndarray) -> bool:
    """Whether values reach so far below 0 that this is no noise, nor the ringing of a resampling."""
    present = values[values != 0]
    if not present.size:
        return False
    low, high = np.percentile(present, (0.5, 99.5))
    return bool(low < 0 and -low > SIGNED * high)


def has_floor(values: np.ndarray) -> bool:
    """Whether the least value is that of a background: many voxels have exactly it."""
    return bool(np.mean(values == values.min()) >= AT_LEAST)


def normalise(array: np.ndarray, modality: str = "auto",
              hu_range: tuple[float, float] = DataConfig.hu_range,
              voxel_scale: tuple[float, ...] | None = None, picture_max: float = 255.0,
              percentiles: tuple[float, float] = DataConfig.percentiles,
              percentiles_of: str = DataConfig.percentiles_of) -> tuple[np.ndarray, Intensity]:
    """(C, D, H, W) as stored -> (C, D, H, W) float32 in about [-1, 1], and the map that `denormalise` undoes.

    ct: hu_range to [-1, 1], clipped. mr: `percentiles` of the foreground (or of all voxels), clipped at -1
    but not above. signed: divided by the second percentile of the magnitudes above 0 (or of all). voxel:
    divided by voxel_scale, or by the largest magnitude of the channel, so that 0 stays 0.
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
    elif modality == "signed":
        scales = [magnitude_in(channel, percentiles[1], percentiles_of) for channel in array]
        limits = [(-scale, scale) for scale in scales]
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
    """Two percentiles of all voxels, or of the foreground: those above the background.

    That is 0, or the least value where none is above 0 or where the values go below 0 from a floor on, as
    z-scores of a whole volume and arrays in [-1, 1] do.
    """
    least = float(channel.min())
    foreground = channel
    if of != "all":
        is_on_floor = least < 0 and is_signed(channel) and has_floor(channel)
        background = least if is_on_floor or channel.max() <= 0 else 0.0
        foreground = channel[channel > background]
    if not foreground.size:
        return least, least + 1.0  # one empty channel of several
    low, high = (float(value) for value in np.percentile(foreground, wanted))
    if high > low:
        return low, high
    if high > least:
        return least, high
    return least, least + 1.0


def magnitude_in(channel: np.ndarray, wanted: float, of: str) -> float:
    """A percentile of the magnitudes of all voxels, or of those that are not 0; 1 of an empty channel."""
    present = np.abs(channel if of == "all" else channel[channel != 0])
    if not present.size:
        return 1.0
    return float(np.percentile(present, wanted)) or float(present.max()) or 1.0


def notes_of(array: np.ndarray, intensity: Intensity) -> list[Note]:
    """What a user should know about the rule: the share that it clips, and values far beyond all others.

    array (C, D, H, W) as stored. The background counts for nothing: air and padding of a CT, of others the
    voxels at 0 or at their least value.
    """
    notes, modality = [], intensity.modality
    clipped = max(clipped_share(channel, modality, low, high)
                  for channel, low, high in zip(array, intensity.low, intensity.high))
    low, high = intensity.low[0], intensity.high[0]
    if clipped > CLIPPED and modality == "ct":
        notes.append(Note("clipped ct", f"{clipped:.0%} of the voxels that are no air lie beyond {low:g} to "
                                        f"{high:g} HU and are clipped; data.window and data.hu_range decide"))
    if clipped > CLIPPED and modality == "mr":
        notes.append(Note("clipped mr", f"{clipped:.0%} of the voxels that are no background lie below "
                                        f"{low:g}, down to {array.min():g}, and are clipped to it; "
                                        f"data.percentiles decides, and data.modality=signed clips none"))
    for channel, high in zip(array, intensity.high):
        if modality not in FAR_OUT:
            break
        # Of a voxel grid the largest magnitude is the scale: what counts is how small the others become.
        scale = high if modality == "mr" else magnitude_in(channel, 99.5, "foreground")
        largest = float(channel.max() if modality == "mr" else np.abs(channel).max())
        if scale > 0 and largest > FAR_OUT[modality] * scale:
            place = np.unravel_index(np.abs(channel).argmax(), channel.shape)
            notes.append(Note("outlier", f"its largest value, {largest:g} at {tuple(map(int, place))} "
                                         f"(D,H,W), is {largest / scale:.0f} times the 99.5th percentile: an "
                                         f"error? Losses will be about it; repair the file"))
            break
    return notes


def clipped_share(channel: np.ndarray, modality: str, low: float, high: float) -> float:
    """Share of the voxels that are no background which a rule clips."""
    if modality == "ct":
        present = channel > CT_AIR
        lost = present & ((channel < low) | (channel > high))
    elif modality == "mr":
        background = float(channel.min()) if has_floor(channel) else 0.0
        present = channel != background
        lost = present & (channel < low)
    else:
        return 0.0
    count = np.count_nonzero(lost)
    return count / np.count_nonzero(present) if count > FEW else 0.0


def denormalise(array: np.ndarray, intensity: Intensity) -> np.ndarray:
    """(C, D, H, W) in [-1, 1] -> the scale of the file: HU come back as HU.

    What was clipped stays clipped. Distances come back in voxels (data.metric), and beyond their band as
    its width, negative inside.
    """
    if intensity.modality == "surface":
        array = filled(array)
    low = np.asarray(intensity.low, dtype=np.float64).reshape(-1, 1, 1, 1)
    high = np.asarray(intensity.high, dtype=np.float64).reshape(-1, 1, 1, 1)
    return (array * ((high - low) / 2) + (high + low) / 2).astype(np.float32)
