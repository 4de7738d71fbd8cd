"""sparse_attention.py: every way to cut against a mask that is worked out point by point."""
import itertools

import pytest
import torch

import sparse_attention as sa
import sparse_conv as sc


def points(count=200, edge=16, samples=2, seed=0):
    source = torch.Generator().manual_seed(seed)
    bits = sc.bits_for(edge)
    found = []
    for sample in range(samples):
        places = torch.randperm(edge ** 3, generator=source)[:count + 7 * sample]
        coords = torch.stack([places // edge ** 2, places // edge % edge, places % edge], 1)
        found.append(sc.encode_coords(coords, sample, bits))
    return torch.cat(found).sort().values, bits


def group_of(code, bits, mode, size, turn):
    """The window of each point, by plain loops over the definition in the module's first lines."""
    sample, coords = sc.sample_of(code, bits).tolist(), sc.coords_of(code, bits).tolist()
    if mode == "full":
        return sample
    if mode == "swin":
        shift = size // 2 if turn % 2 else 0
        return [(s, *((x + shift) // size for x in c)) for s, c in zip(sample, coords)]

    def morton(c):
        return int("".join(f"{d:020b}"[i] + f"{h:020b}"[i] + f"{w:020b}"[i]
                           for d, h, w in [c] for i in range(20)), 2)
    if mode == "shift_window" and turn % 2:
        half = max(1, round(size ** (1 / 3) / 2))
        keys = [morton([x + half for x in c]) for c in coords]
    elif mode == "shift_order" and turn % 4 == 1:
        keys = [morton(c[::-1]) for c in coords]
    elif mode == "shift_order" and turn % 4 >= 2:
        turned = torch.tensor([c[::-1] if turn % 4 == 3 else c for c in coords])
        keys = sa.hilbert(turned, torch.zeros(len(turned), dtype=torch.int64), bits).tolist()
    else:
        keys = [morton(c) for c in coords]
    group = {}
    for s in set(sample):
        rows = sorted((i for i in range(len(code)) if sample[i] == s), key=lambda i: keys[i])
        n, k = len(rows), -(-len(rows) // size)
        for rank, i in enumerate(rows):
            late = 0.5 if mode == "shift_sequence" and turn % 2 else 0
            group[i] = s, int(rank * k / n + late + 1e-9)
    return [group[i] for i in range(len(code))]


@pytest.mark.parametrize("mode, turn", [(m, t) for m in sa.MODES for t in range(sa.TURNS[m])])
def test_each_mode_equals_attention_with_a_mask_of_blocks(mode, turn):
    code, bits = points()
    size = 5 if mode == "swin" else 32
    source = torch.Generator().manual_seed(1)
    q, k, v, pull = (torch.randn(len(code), 2, 4, generator=source, dtype=torch.float64) for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    y = sa.attend(q, k, v, sa.windows(code, bits, mode, size, turn)).view_as(q)
    found = torch.autograd.grad(y, (q, k, v), pull)

    group = group_of(code, bits, mode, size, turn)
    number = {g: i for i, g in enumerate(dict.fromkeys(group))}
    same = torch.tensor([number[g] for g in group])
    score = torch.einsum("nhc,mhc->hnm", q, k) / 2
    score = score.masked_fill(same[:, None] != same[None], -torch.inf)
    want = torch.einsum("hnm,mhc->nhc", score.softmax(-1), v)
    wanted = torch.autograd.grad(want, (q, k, v), pull)
    assert (y - want).abs().max() < 1e-12
    for mine, theirs in zip(found, wanted):
        assert (mine - theirs).abs().max() < 1e-12


@pytest.mark.parametrize("mode", ["shift_window", "shift_sequence", "shift_order"])
def test_windows_along_a_curve_are_equal_and_turns_differ(mode):
    code, bits = points(count=333, samples=1)
    cuts = []
    for turn in range(sa.TURNS[mode]):
        group = group_of(code, bits, mode, 32, turn)
        lengths = [group.count(g) for g in dict.fromkeys(group)]
        if not (mode == "shift_sequence" and turn):
            assert max(lengths) - min(lengths) <= 1 and max(lengths) <= 32
        cuts.append(sa.windows(code, bits, mode, 32, turn))
    for a, b in itertools.combinations(cuts, 2):
        assert not torch.equal(a.there, b.there)


def test_one_window_is_full_attention_and_a_swin_cube_of_the_grid_too():
    code, bits = points(count=60, edge=8, samples=1)
    q, k, v = torch.randn(3, 60, 1, 8, generator=torch.Generator().manual_seed(0))
    full = sa.attend(q, k, v, sa.windows(code, bits, "full"))
    for mode, size in [("swin", 8), ("shift_window", 60), ("shift_sequence", 60), ("shift_order", 99)]:
        assert (sa.attend(q, k, v, sa.windows(code, bits, mode, size)) - full).abs().max() < 1e-6


def test_hilbert_neighbours_are_at_distance_one():
    edge, bits = 16, 4
    cells = torch.tensor(list(itertools.product(range(edge), repeat=3)))
    key = sa.hilbert(cells, torch.zeros(len(cells), dtype=torch.int64), bits)
    assert sorted(key.tolist()) == list(range(edge ** 3))
    walk = cells[key.argsort()]
    assert ((walk[1:] - walk[:-1]).abs().sum(1) == 1).all()


def test_rope_depends_on_differences_alone_and_uses_every_axis():
    q, k = torch.randn(2, 5, 2, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    coords = torch.randint(0, 20, (5, 3))

    def scores(coords):
        turn = sa.rotations(coords, 16)
        return torch.einsum("nhc,mhc->hnm", sa.rotate(q, turn), sa.rotate(k, turn))
    here = scores(coords)
    assert (here - scores(coords + torch.tensor([3, 5, 7]))).abs().max() < 1e-5
    for axis in range(3):
        moved = coords.clone()
        moved[0, axis] += 1
        assert (here - scores(moved)).abs().max() > 1e-3


def test_ape_is_sines_and_cosines_by_axis():
    wave = sa.sine_positions(torch.tensor([[3, 5, 7]]), 14)       # 2 frequencies an axis, 2 zeros
    assert wave.shape == (1, 14) and torch.equal(wave[0, 12:], torch.zeros(2))
    f = torch.tensor([1, 10000.0 ** -.5])
    assert torch.allclose(wave[0, 4:8], torch.cat([(5 * f).sin(), (5 * f).cos()]))


@pytest.mark.parametrize("positions", ["ape", "rope"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_block_takes_every_setting_and_no_point(positions, qk_norm):
    code, bits = points(count=50)
    block = sa.Block(24, 2, positions=positions, qk_norm=qk_norm)
    x = torch.randn(len(code), 24, requires_grad=True)
    coords = sc.coords_of(code, bits)
    y = block(x, sa.windows(code, bits, "swin", 4, 1), coords)
    y.sum().backward()
    assert y.shape == x.shape
    assert all(p.grad.abs().sum() > 0 for name, p in block.named_parameters() if "norm" in name)
    none = block(x[:0], sa.windows(code[:0], bits, "swin", 4), coords[:0])
    assert none.shape == (0, 24)


def test_an_unknown_mode_is_named():
    with pytest.raises(ValueError, match="attention=window; choose one of full, swin"):
        sa.windows(torch.zeros(1, dtype=torch.int64), 3, "window")
