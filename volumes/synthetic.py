"""Volumes made up from a seed, with their labels: trunks in HU, or streets as a radar sees them.

Number i is a function of (seed, i) alone. Shapes: C channels, D H W depth height width. Version 1.1.
"""
import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F

from volumes.config import MODALITIES, DataConfig
from volumes.entries import Entry
from volumes.files import DataError
from volumes.grids import resample_label
from volumes.loading import finish
from volumes.seeds import seeded
from volumes.volume import Volume, spacing_of

MODALITY = {"ct": "ct", "radar": "voxel"}
CLASSES = {"ct": 4, "radar": 3}
# mm, D H W; a radar grid is in metres, as arrays on disk carry no unit.
EXTENT = {"ct": (320.0, 320.0, 320.0), "radar": (12.0, 48.0, 48.0)}


def synthetic_entries(cfg: DataConfig, seed: int) -> list[Entry]:
    """cfg.synthetic_count volumes in memory, normalised and resampled as files are."""
    entries, settings = [], cfg.voxel_settings()
    modality = MODALITY[cfg.synthetic]
    if settings.modality != "auto":
        modality = MODALITIES[settings.modality]
    for number in range(cfg.synthetic_count):
        volume, label = synthetic_pair(cfg.synthetic, seed, number, cfg.synthetic_size)
        kept, channel = volume.array, settings.select_channel
        if channel is not None:
            kept = kept[channel:channel + 1]
        if not len(kept):
            raise DataError(f"synthetic {cfg.synthetic} volumes have {len(volume.array)} channels, "
                            f"data.select_channel={channel} counts from 0; choose another")
        array, intensity, affine = finish(volume._replace(array=kept), modality, settings, cfg.max_gib)
        name = f"synthetic_{cfg.synthetic}_{number:03d}"
        entry = Entry(name, None, array.shape, spacing_of(affine), affine, intensity, array)
        if cfg.labels:
            ids = tuple(range(CLASSES[cfg.synthetic]))
            label = resample_label(label, array.shape[1:])
            entry = dataclasses.replace(entry, label=label, label_ids=ids)
        entries.append(entry)
    return entries


def synthetic_volume(kind: str, seed: int, number: int, size: tuple[int, int, int]) -> Volume:
    """Volume `number` of a seed.

    ct: (1, D, H, W) in HU; radar: (4, D, H, W) occupancy, power (dB), velocity and its variance.
    """
    return synthetic_pair(kind, seed, number, size)[0]


def synthetic_pair(kind: str, seed: int, number: int,
                   size: tuple[int, int, int]) -> tuple[Volume, np.ndarray]:
    """The volume and its labels (D, H, W) uint8: see phantom and radar_scene."""
    rng = seeded(seed, f"synthetic {kind}", number)
    if kind == "ct":
        array, label = phantom(rng, size)
    else:
        array, label = radar_scene(rng, size)
    spacing = tuple(length / n for length, n in zip(EXTENT[kind], size))
    return Volume(array, spacing, np.diag([*spacing[::-1], 1.0])), label


# -------------------------------------------------------------------------------------- what both use
def axes(size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """z (D, 1, 1), y (1, H, 1) and x (1, 1, W), each from -1 to 1."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in size)
    return z[:, None, None], y[None, :, None], x[None, None, :]


def texture(rng: np.random.Generator, size: tuple[int, int, int], grain: float) -> np.ndarray:
    """Smooth noise of unit variance or a little less; grain: voxels per bump."""
    bumps = [max(2, math.ceil(n / grain)) for n in size]
    coarse = torch.from_numpy(rng.standard_normal(bumps, dtype=np.float32))
    return F.interpolate(coarse[None, None], size=size, mode="trilinear")[0, 0].numpy()


def tree(rng: np.random.Generator, size: tuple[int, int, int], root: tuple[float, ...],
         direction: tuple[float, ...], radius: float, branches: int, length: float) -> np.ndarray:
    """Branching tubes (vessels, airways) as a mask (D, H, W).

    Root and length in half extents, radius in voxels; it thins out.
    """
    mask, half = np.zeros(size, dtype=bool), np.array(size) / 2
    stack = [(np.array(root), np.array(direction, dtype=float), radius, branches)]
    while stack:
        place, heading, r, left = stack.pop()
        # A tube: balls along a path that wanders.
        for _ in range(max(2, int(length * half.min() / max(r, 1)))):
            heading += 0.25 * rng.standard_normal(3)
            heading /= np.linalg.norm(heading)
            place = place + heading * max(r, 1) / half
            centre = (place + 1) * half - 0.5
            box = tuple(slice(max(0, int(c - r)), max(0, int(c + r) + 2)) for c in centre)
            z, y, x = (np.arange(s.start, min(s.stop, n)) - c for s, n, c in zip(box, size, centre))
            mask[box] |= z[:, None, None]**2 + y[:, None]**2 + x**2 <= r * r
        # At its end it becomes two.
        if left:
            for _ in range(2):
                stack.append((place, heading + 0.8 * rng.standard_normal(3), r * 0.78, left - 1))
    return mask


# -------------------------------------------------------------------------------------------- a trunk
def phantom(rng: np.random.Generator, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A trunk in HU, (1, D, H, W): body of fat and muscle, lungs with vessels and airways, heart, liver,
    kidneys, spine, ribs, couch.

    Labels: 0 air outside and couch, 1 soft tissue, 2 lungs, airways and gas, 3 bone.
    """
    z, y, x = axes(size)        # y grows towards the front
    scale = min(size[1:]) / 96  # voxels per voxel of the default size: tubes keep their share of the picture

    def vary(value: float, share: float = 0.12) -> float:
        return value * float(rng.uniform(1 - share, 1 + share))

    def ellipsoid(cz: float, cy: float, cx: float, rz: float, ry: float, rx: float) -> np.ndarray:
        """Below 1 inside."""
        cz, cy, cx = (c + float(rng.normal(0, 0.03)) for c in (cz, cy, cx))
        return ((z - cz) / vary(rz))**2 + ((y - cy) / vary(ry))**2 + ((x - cx) / vary(rx))**2

    # The couch, skin and fat, muscle.
    fine, middle, large = (texture(rng, size, grain) for grain in (1.5, 5 * scale, 16 * scale))
    hu = np.full(size, -1000, dtype=np.float32)
    body = (y / vary(0.68, 0.06))**2 + (x / vary(0.88, 0.06))**2
    body = body + 0.06 * np.sin(vary(3, 0.5) * z + rng.uniform(0, 6)) + 0.05 * large
    couch = np.abs(y + 0.88 - 0.12 * x**2) < 0.025
    hu[np.broadcast_to(couch & (np.abs(x) < 0.8), size)] = vary(-300)
    label = np.zeros(size, dtype=np.uint8)
    skin = body < 1
    label[skin] = 1
    hu[skin] = (-100 + 15 * middle)[skin]
    muscle = body < vary(0.80, 0.05)
    hu[muscle] = (50 + 22 * middle + 12 * fine)[muscle]

    # The lungs, with vessels and airways.
    top = vary(0.1, 1.0)  # the lungs' lower end; the belly is below
    right = ellipsoid(0.65, 0.05, -0.40, 0.85, 0.42, 0.27) < 1
    left = ellipsoid(0.65, 0.05, 0.42, 0.85, 0.42, 0.26) < 1
    lungs = (right | left) & (z > top - 0.3)
    lungs &= body < 0.62
    hu[lungs] = (-840 + 40 * large + 25 * middle)[lungs]
    label[lungs] = 2
    for side in (-1, 1):
        vessels = np.zeros(size, dtype=bool)
        for _ in range(3):
            root = (rng.uniform(0.2, 0.9), 0.05, side * 0.16)
            heading = (rng.normal(), rng.normal(), 2 * side)
            vessels |= tree(rng, size, root, heading, 2.2 * scale, 4, 0.3)
        airways = tree(rng, size, (0.95, 0.05, 0.02 * side), (-1, 0, side * 0.8), 2.8 * scale, 3, 0.28)
        hu[vessels & lungs] = 40
        hu[airways & muscle] = -980
        label[vessels & lungs], label[airways & muscle] = 1, 2

    def organ(mask: np.ndarray, value: float) -> np.ndarray:
        mask = mask & muscle
        hu[mask] = (value + 14 * middle + 10 * large + 8 * fine)[mask]
        label[mask] = 1
        return mask

    # The heart, and blood with contrast in it.
    shape = ellipsoid(top + 0.15, 0.18, -0.10, 0.36, 0.30, 0.27)
    organ(shape < 1, 60)
    organ(shape < 0.45, vary(210, 0.3))

    # The liver, with vessels and lesions.
    shape = ellipsoid(top - 0.55, 0.10, 0.34, 0.45, 0.42, 0.42) + 0.15 * large
    liver = organ((shape < 1) & ~lungs, vary(105))
    veins = tree(rng, size, (top - 0.5, 0.0, 0.15), (rng.normal(), 0.3, 1), 2.2 * scale, 4, 0.22)
    hu[veins & liver] = vary(180)
    for _ in range(rng.integers(0, 4)):
        cz = top - 0.55 + rng.normal(0, 0.2)
        cy = 0.1 + rng.normal(0, 0.15)
        cx = 0.34 + rng.normal(0, 0.15)
        hu[(ellipsoid(cz, cy, cx, 0.1, 0.08, 0.08) < 1) & liver] = vary(40)

    # The kidneys, and the gut with gas in it.
    for side in (-1, 1):
        kidney = ellipsoid(top - 0.75, -0.28, side * 0.36, 0.24, 0.13, 0.10)
        organ(kidney < 1, vary(170))
        organ(kidney < 0.3, 20)
    gut = tree(rng, size, (top - 0.9, 0.2, -0.3), (-0.2, 0.2, 1), 4.5 * scale, 2, 0.5)
    gut = gut & muscle & ~liver & (z < top - 0.1)
    hu[gut] = (30 + 60 * large)[gut]
    hu[gut & (large > 0.5)] = -900
    label[gut] = np.where(large > 0.5, 2, 1)[gut]

    # The ribs.
    angle, period = np.arctan2(y, x), vary(14, 0.2)
    waves = np.sin(period * z + 2.5 * np.abs(np.cos(angle)) + rng.uniform(0, 6))
    ribs = (np.abs(body - 0.70) < 0.05) & (waves > 0.45) & (z > top - 0.6)
    hu[ribs] = (550 + 200 * middle)[ribs]
    label[ribs] = 3

    # The spine: vertebrae with marrow, discs, arches, the canal; the aorta in front of it.
    spine = ((y + 0.42) / 0.13)**2 + ((x - rng.normal(0, 0.01)) / 0.13)**2
    disc = np.sin(period * z) < -0.8
    hu[(spine < 1) & ~disc] = (650 + 90 * middle)[(spine < 1) & ~disc]
    marrow = (spine < 0.62) & (np.sin(period * z) > -0.6)
    hu[marrow] = (230 + 90 * fine + 40 * middle)[marrow]
    hu[(spine < 1) & disc] = 80
    label[(spine < 1) & ~disc], label[(spine < 1) & disc] = 3, 1
    label[marrow] = 3
    arch = np.broadcast_to(((y + 0.62) / 0.10)**2 + (x / 0.035)**2 < 1, size) & (np.sin(period * z) > 0)
    hu[arch] = 500
    label[arch] = 3
    canal = np.broadcast_to(((y + 0.585) / 0.04)**2 + (x / 0.05)**2 < 1, size)
    hu[canal] = 20
    label[canal] = 1
    aorta = ((y + 0.22 - 0.03 * np.sin(3 * z)) / 0.065)**2 + ((x + 0.12) / 0.065)**2 < 1
    hu[aorta & muscle] = vary(260, 0.3)
    label[aorta & muscle] = 1

    # The scanner's point spread, and its noise.
    for axis in range(3):
        if size[axis] > 2:
            hu = 0.8 * hu + 0.1 * (np.roll(hu, 1, axis) + np.roll(hu, -1, axis))
    return (hu + 12 * rng.standard_normal(size, dtype=np.float32))[None], label


# ------------------------------------------------------------------------------------------- a street
def radar_scene(rng: np.random.Generator, size: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A street, (4, D, H, W): ground clutter, walls, poles and moving boxes.

    A few per cent of the voxels are occupied, the rest is 0. Labels: 0 empty, 1 what stands, 2 cars.
    """
    z, y, x = axes(size)
    hit, cars = np.zeros(size, dtype=bool), np.zeros(size, dtype=bool)
    velocity = np.zeros(size, dtype=np.float32)
    thick = [2.5 / n for n in size]
    bearing = np.arctan2(y, x + 1.2)
    ego = float(rng.uniform(0, 15))

    # The ground; walls along and across the street; poles.
    hit |= (z < -0.9 + thick[0]) & (texture(rng, size, 3) > 0.9)
    for _ in range(rng.integers(2, 5)):
        slope, offset, height = rng.normal(0, 0.25), rng.uniform(-0.9, 0.9), rng.uniform(-0.3, 0.8)
        if rng.random() < 0.7:
            line = np.abs(y - offset - slope * x)
        else:
            line = np.abs(x - offset - slope * y)
        hit |= (line < max(thick[1:]) / 2) & (z < height) & (texture(rng, size, 4) > 0.1)
    for _ in range(rng.integers(3, 9)):
        cy, cx = rng.uniform(-0.9, 0.9, 2)
        hit |= ((y - cy)**2 + (x - cx)**2 < max(thick[1:])**2) & (z < rng.uniform(-0.2, 0.9))
    velocity += -ego * np.cos(bearing)

    # Cars: the faces of boxes, each with its own speed.
    for _ in range(rng.integers(4, 10)):
        cy, cx = rng.uniform(-0.85, 0.85, 2)
        ry, rx, rz = rng.uniform(0.05, 0.1), rng.uniform(0.1, 0.22), rng.uniform(0.15, 0.4)
        turn = rng.choice([0.0, np.pi / 2]) + rng.normal(0, 0.1)
        u = (x - cx) * np.cos(turn) + (y - cy) * np.sin(turn)
        v = (y - cy) * np.cos(turn) - (x - cx) * np.sin(turn)
        inside = (np.abs(u) < rx) & (np.abs(v) < ry) & (z < -0.9 + rz)
        core = (np.abs(u) < rx - thick[2]) & (np.abs(v) < ry - thick[1]) & (z < -0.9 + rz - thick[0])
        hit, cars = (hit & ~inside) | (inside & ~core), cars | inside
        velocity = np.where(inside, (rng.uniform(-15, 15) - ego) * np.cos(bearing + turn), velocity)

    # What the radar says of what it hits.
    distance = np.sqrt((x + 1.2)**2 + y**2)
    power = 24 - 7 * distance + 2.5 * texture(rng, size, 4) + 0 * z
    variance = np.abs(0.3 * texture(rng, size, 2)) + 0.02 * np.abs(velocity)
    channels = np.stack([hit, hit * power, hit * velocity, hit * variance]).astype(np.float32)
    return channels, (hit * (1 + cars)).astype(np.uint8)
