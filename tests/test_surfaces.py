"""volumes/surfaces.py: distances against brute force, boxes against counting."""
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from volumes import surfaces
from volumes.config import DataConfig
from volumes.files import DataError
from volumes.surfaces import Surface


def brute(inside, spacing, band):
    """Every voxel against every voxel of the other side."""
    unit = np.array(spacing) / min(spacing)
    places = np.stack(np.meshgrid(*map(np.arange, inside.shape), indexing="ij"), -1) * unit
    out = np.zeros(inside.shape)
    for index in np.ndindex(inside.shape):
        others = places[inside != inside[index]]
        if len(others):
            distance = np.sqrt(((others - places[index]) ** 2).sum(1).min()) - .5
            if distance <= band + 1e-6:
                out[index] = (-1 if inside[index] else 1) * distance / band
    return out


@pytest.mark.parametrize("spacing, band", [((1, 1, 1), 2), ((1, 1, 1), 4), ((3.27, .98, .98), 2),
                                           ((1, 2.5, 1.5), 3), ((2, 2, 2), 0.5), ((1, 1, 1), 12)])
def test_distances_equal_brute_force(spacing, band, monkeypatch):
    monkeypatch.setattr(surfaces, "SLAB", 5)          # several slabs, with what lies around them
    source = np.random.default_rng(0)
    for fill in (.02, .3, .9):
        inside = source.random((13, 9, 11)) < fill
        found = surfaces.signed_distance(inside, spacing, band)
        np.testing.assert_allclose(found, brute(inside, spacing, band), atol=2e-6)
        assert np.abs(found).max() <= 1 + 1e-6


def test_a_plane_by_hand():
    array = np.full((1, 8, 4, 4), -1000, np.float32)
    array[:, 4:] = 50
    found = surfaces.surface_points(array, (1, 1, 1), Surface(-500, np.inf, 2, 0))
    # Slices 2..5 are .5 and 1.5 voxels from the plane; the band is 2.
    want = [0, 0, .75, .25, -.25, -.75, 0, 0]
    np.testing.assert_allclose(found[0, :, 1, 2], want)
    window = surfaces.surface_points(array, (1, 1, 1), Surface(-1350, 0, 2, 0))
    np.testing.assert_allclose(window, -found)        # inside of a window: the other side
    with pytest.raises(DataError, match="no surface at 300 HU"):
        surfaces.surface_points(array, (1, 1, 1), Surface(300, np.inf, 2, 0))


def test_several_surfaces_are_channels_of_the_same_points():
    """HU rise along an axis; 300 is crossed five voxels after -500."""
    hu = np.broadcast_to(np.linspace(-1000, 1000, 21, dtype=np.float32), (1, 4, 4, 21))
    cfg = DataConfig(surface="-500,300", smooth=0.0, modality="ct")
    assert cfg.surface_of().more == (300.0,)
    found = surfaces.surface_points(hu, (1, 1, 1), cfg.surface_of())
    assert found.shape == (2, 4, 4, 21)
    low, high = found[:, 0, 0]
    # Inside lies above: from voxel 6 (-400) and from voxel 14 (400); a band of 2 to either side.
    assert np.allclose(low[4:8], [.75, .25, -.25, -.75]) and np.allclose(high[12:16], [.75, .25, -.25, -.75])
    assert np.allclose(high[4:8], 1) and np.allclose(low[12:16], -1)
    assert not found[..., 8:12].any() and not found[..., :4].any() and not found[..., 16:].any()
    with pytest.raises(ValueError, match="or several such as -500,300"):
        DataConfig(surface="-500,x")


def test_smoothing_is_a_gaussian_with_repeated_borders():
    array = np.zeros((15, 3, 3), np.float32)
    array[7] = 1
    found = surfaces.smoothed(array, 1.0)[:, 1, 1]
    weights = np.exp(-.5 * np.arange(-3, 4) ** 2.0)
    np.testing.assert_allclose(found[4:11], weights / weights.sum(), atol=1e-6)
    np.testing.assert_allclose(surfaces.smoothed(np.ones((4, 5, 6), np.float32), 2.0), 1, atol=1e-5)


def test_beyond_the_band_the_side_is_that_of_the_nearest_points():
    grid = np.stack(np.meshgrid(*[np.arange(24)] * 3, indexing="ij"), -1) - 11.5
    inside = np.linalg.norm(grid, axis=-1) < 9
    distance = surfaces.signed_distance(inside, (1, 1, 1), 2)[None]
    found = surfaces.filled(distance)
    assert np.array_equal(found[0] < 0, inside)
    far = distance == 0
    assert np.array_equal(found[~far], distance[~far]) and (np.abs(found[far]) == 1).all()
    # Some holes in the band and some wrong signs change nothing of the middle.
    source = np.random.default_rng(0)
    distance[source.random(distance.shape) < .1] = 0
    distance *= np.where(source.random(distance.shape) < .03, -1, 1)
    far = np.linalg.norm(grid, axis=-1) < 5
    assert (surfaces.filled(distance)[0][far] == -1).mean() > .97


def test_a_byte_keeps_every_point_and_its_sign():
    distance = np.array([-1, -.25, -1e-4, 0, 1e-4, .75, 1], np.float32)
    stored = surfaces.as_bytes(distance)
    assert stored.tolist() == [-127, -32, -1, 0, 1, 95, 127]
    assert (np.abs(stored / 127 - distance) <= .5 / 127 + 1e-2 * (np.abs(distance) < 1e-3)).all()


def test_tokens_are_counted_and_boxes_summed():
    source = np.random.default_rng(1)
    grid = source.random((2, 21, 16, 9)) < .1
    counts = surfaces.token_counts(grid)
    assert counts.shape == (3, 2, 2) and counts.sum() == grid.any(0).sum()
    assert counts[1, 0, 1] == grid.any(0)[8:16, :8, 8:].sum()
    total = surfaces.summed(counts)
    assert surfaces.points_in(total, (1, 0, 0), (3, 2, 1)) == counts[1:3, :, :1].sum()


def test_a_box_is_the_largest_that_holds_no_more():
    source = np.random.default_rng(2)
    counts = source.integers(0, 60, (9, 7, 8))
    total = surfaces.summed(counts)
    for _ in range(200):
        draw = source.random(3)
        limit = int(source.integers(1, 6000))
        first, end = surfaces.choose_box(total, (8, 8, 8), limit, draw)
        inside = counts[tuple(slice(a, b) for a, b in zip(first, end))]
        assert inside.sum() <= limit or inside.size == 1
        # One step larger holds too many, or is as large as may be.
        whole = [min(8, n) for n in counts.shape]
        sides = [b - a for a, b in zip(first, end)]
        if sides != whole:
            share = min(k / n for n in whole for k in range(1, n + 1)
                        if any(int(m * k / n + 1e-9) > s for m, s in zip(whole, sides)))
            more = [max(1, int(n * share + 1e-9)) for n in whole]
            start = [int(u * (n - m + 1)) + int(v * (m - s + 1))
                     for u, v, n, m, s in zip(draw, draw[::-1], counts.shape, whole, more)]
            box = counts[tuple(slice(a, a + s) for a, s in zip(start, more))]
            assert box.sum() > limit


def test_kept_points_keep_their_neighbours():
    """A box keeps 90 % of the neighbours of its points; as many points drawn at random a few per cent."""
    edge = 128
    place = np.stack(np.meshgrid(*[np.arange(edge)] * 3, indexing="ij"), -1) - edge / 2
    inside = np.linalg.norm(place, axis=-1) < 48
    near = surfaces.signed_distance(inside, (1, 1, 1), 2) != 0

    def neighbours(mask):
        padded = np.pad(mask, 1)
        total = sum(padded[1 + d:edge + 1 + d, 1 + h:edge + 1 + h, 1 + w:edge + 1 + w]
                    for d in (-1, 0, 1) for h in (-1, 0, 1) for w in (-1, 0, 1)) - mask
        return total[mask].mean()
    counts = surfaces.token_counts(near[None])
    first, end = surfaces.choose_box(surfaces.summed(counts), (16, 16, 16), near.sum() // 4, (.3, .6, .5))
    box = np.zeros_like(near)
    box[tuple(slice(8 * a, 8 * b) for a, b in zip(first, end))] = True
    kept = near & box
    drawn = near & (np.random.default_rng(0).random(near.shape) < kept.sum() / near.sum())
    assert neighbours(kept) >= .9 * neighbours(near)
    assert neighbours(drawn) < .3 * neighbours(near)


@pytest.mark.slow
def test_a_volume_of_512_takes_seconds_and_a_gibibyte():
    """At most 10 s of processor time, and 1 GiB beside the volume."""
    code = """
import numpy as np, resource, time
from volumes.surfaces import signed_distance
inside = np.zeros((512, 512, 512), bool)
inside[80:400, 100:360, 60:440] = True
inside[::7, ::5, ::11] ^= True
before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
signed_distance(inside, (1, 1, 1), 2)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parents[1])
    seconds, kib = map(float, done.stdout.split())
    assert seconds <= 10 and kib <= 2**20, (seconds, kib)
