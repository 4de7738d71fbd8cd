"""windows.py: windows cover a volume, and what a network says in each comes out where it was said."""
import pytest
import torch

import windows


def test_windows_cover_and_overlap():
    for n in range(1, 40):
        for w in range(1, 12):
            starts = windows.window_starts(n, min(n, w), 0.5)
            assert starts[0] == 0 and starts[-1] + min(n, w) == n
            assert all(b - a <= max(1, w / 2 + 0.5) for a, b in zip(starts, starts[1:]))


@pytest.mark.parametrize("size, window", [
    ((9, 17, 20), (4, 8, 8)), ((4, 30, 8), (6, 8, 9)), ((3, 3, 3), (4, 8, 8))])
def test_what_depends_on_its_voxel_alone_comes_through_in_slabs(size, window):
    """Weights sum to one everywhere, on axes shorter than the window too, whose filling is cut off again."""
    x, seen, ticks = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0)), [], []

    def network(part):
        seen.append(part.shape[2:])
        return torch.cat([part, part.square()], 1)
    slabs = list(windows.window_logits(network, x, window, 0.5, 7.0, lambda *told: ticks.append(told)))
    assert set(seen) == {window} and ticks == [(n + 1, len(seen)) for n in range(len(seen))]
    found = torch.cat(slabs, 1)
    assert found.shape == (4, *size)
    assert (found - torch.cat([x, x.square()], 1)[0]).abs().max() < 1e-5


def test_a_windows_middle_counts_more_than_its_border():
    """By hand: of two windows that share half, each says its number; a voxel hears more of the nearer one."""
    numbers = iter([0.0, 1.0])
    found, = torch.cat(list(windows.window_logits(
        lambda part: torch.full_like(part, next(numbers)), torch.zeros(1, 1, 12, 1, 1), (8, 1, 1))), 1)
    weight = torch.exp(-0.5 * (torch.arange(8) - 3.5).square())          # sigma = 8 / 8
    wanted = torch.zeros(12)
    wanted[8:] = 1
    wanted[4:8] = weight[:4] / (weight[:4] + weight[4:])
    assert (found[:, 0, 0] - wanted).abs().max() < 1e-6
