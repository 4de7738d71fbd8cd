"""sparse_conv.py: codes, neighbours and families against dense grids; convolution against dense conv3d."""
import pytest
import torch
import torch.nn.functional as F

import sparse_conv as sc


def scattered(sizes, fill, seed, channels=3, bits=None):
    """Random points of one grid per sample: codes, features float64, sizes as a mask (B, D, H, W)."""
    source = torch.Generator().manual_seed(seed)
    whole = [max(axis) for axis in zip(*sizes)]
    mask = torch.zeros(len(sizes), *whole, dtype=torch.bool)
    for number, (d, h, w) in enumerate(sizes):
        mask[number, :d, :h, :w] = torch.rand(d, h, w, generator=source) < fill
    bits = bits or sc.bits_for(max(whole))
    sample, *coords = mask.nonzero().unbind(1)
    code, _ = sc.encode_coords(torch.stack(coords, 1), sample, bits).sort()
    feats = torch.randn(len(code), channels, generator=source, dtype=torch.float64)
    return code, feats, mask, bits


def dense_of(code, feats, mask, bits):
    """Features laid out on the grid (B, C, D, H, W), by an assignment a point."""
    out = feats.new_zeros(*mask.shape, feats.shape[1])
    sample, coords = sc.sample_of(code, bits), sc.coords_of(code, bits)
    for number, (d, h, w), row in zip(sample.tolist(), coords.tolist(), feats):
        out[number, d, h, w] = row
    return out.movedim(-1, 1)


def at_points(dense, code, bits):
    d, h, w = sc.coords_of(code, bits).unbind(1)
    return dense[sc.sample_of(code, bits), :, d, h, w]


def test_a_code_interleaves_bits_and_gives_its_coordinates_back():
    # d = 01, h = 10, w = 11 in two bits: 011 above 101 is 0b011101, and sample 3 lies above six bits.
    assert sc.encode_coords(torch.tensor([[1, 2, 3]]), 3, 2).item() == 3 * 64 + 0b011101
    coords = torch.randint(1 << 20, (1000, 3), generator=torch.Generator().manual_seed(0))
    code = sc.encode_coords(coords, torch.arange(1000) % 7, 20)
    assert torch.equal(sc.coords_of(code, 20), coords)
    assert torch.equal(sc.sample_of(code, 20), torch.arange(1000) % 7)
    with pytest.raises(ValueError, match="cut the volume"):
        sc.bits_for((1 << 20) + 1)


def test_a_full_grid_has_the_neighbours_of_a_grid():
    code, _, mask, bits = scattered([(4, 4, 4)], 2.0, 0)
    table = sc.neighbours(code, bits)
    coords = sc.coords_of(code, bits)
    for k, offset in enumerate(sc.OFFSETS):
        wanted = coords + torch.tensor(offset)
        inside = ((wanted >= 0) & (wanted < 4)).all(1)
        assert torch.equal(table[:, k] < 64, inside)
        assert torch.equal(coords[table[inside, k].long()], wanted[inside])


@pytest.mark.parametrize("sizes, fill", [([(12, 12, 12), (12, 12, 12)], .3), ([(5, 7, 11)], .5),
                                         ([(8, 8, 8), (8, 8, 8)], 1.0), ([(1, 1, 9)], .6)])
def test_convolution_equals_the_masked_dense_one(sizes, fill):
    code, x, mask, bits = scattered(sizes, fill, 1, channels=5)
    table = sc.neighbours(code, bits)
    conv = sc.SubMConv3d(5, 7).double()
    x.requires_grad_()
    y = conv(x, table)
    pull = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    y.backward(pull)
    found = x.grad, conv.weight.grad.clone(), conv.bias.grad.clone()

    conv.zero_grad()
    flat = x.detach().clone().requires_grad_()
    dense = F.conv3d(dense_of(code, flat, mask, bits), conv.weight, conv.bias, padding=1)
    want = at_points(dense, code, bits)
    want.backward(pull)
    assert (y - want).abs().max() <= 1e-12
    for mine, theirs in zip(found, (flat.grad, conv.weight.grad, conv.bias.grad)):
        assert (mine - theirs).abs().max() <= 1e-12
    assert (conv.float()(flat.float(), table) - want).norm() <= 1e-5 * want.norm()


def test_gradcheck_and_chunks(monkeypatch):
    code, x, _, bits = scattered([(3, 3, 3)], .5, 3, channels=2)
    table = sc.neighbours(code, bits)
    weight = torch.randn(3, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    x.requires_grad_()
    monkeypatch.setattr(sc, "CHUNK", 4 * 27 * 2)       # four points forward, two backward
    for activate in (False, True):
        def conv(*tensors, activate=activate):
            return sc.SubmanifoldConv.apply(*tensors, table, activate)
        assert torch.autograd.gradcheck(conv, (x, weight, bias))
    plain = sc.SubmanifoldConv.apply(F.silu(x), weight, bias, table)
    assert (conv(x, weight, bias) - plain).abs().max() < 1e-14


@pytest.mark.parametrize("count", [0, 1])
def test_no_point_and_one_point(count):
    code = torch.full((count,), 5)
    table = sc.neighbours(code, 2)
    conv = sc.SubMConv3d(2, 3)
    x = torch.randn(count, 2, requires_grad=True)
    y = conv(x, table)
    y.sum().backward()
    assert y.shape == (count, 3) and x.grad.shape == (count, 2)
    want = x @ conv.weight[:, :, 1, 1, 1].T + conv.bias      # alone: the kernel's middle
    assert (y - want).abs().sum() < 1e-6


def test_two_runs_give_the_same_bits_and_a_permuted_input_a_permuted_output():
    code, x, _, bits = scattered([(20, 20, 20)], .2, 4)
    conv = sc.SubMConv3d(3, 8)
    x = x.float()

    def run(code, x):
        order = code.argsort()
        table = sc.neighbours(code[order], bits)
        rows = x[order].requires_grad_()
        conv.zero_grad()
        y = conv(rows, table)
        y.square().sum().backward()
        back = order.argsort()
        return y.detach()[back], rows.grad[back], conv.weight.grad.clone()
    first, again = run(code, x), run(code, x)
    shuffled = torch.randperm(len(code), generator=torch.Generator().manual_seed(5))
    moved = run(code[shuffled], x[shuffled])
    for a, b in zip(first, again):
        assert torch.equal(a, b)
    assert torch.equal(first[0][shuffled], moved[0]) and torch.equal(first[1][shuffled], moved[1])


def test_a_family_is_that_of_a_dense_grid():
    code, x, mask, bits = scattered([(6, 8, 4), (6, 8, 4)], .3, 6, channels=1)
    kin = sc.family(code)
    # Parents: the cells of 2 that hold a point, by max pooling of the mask.
    pooled = F.max_pool3d(mask[:, None].float(), 2)[:, 0] > 0
    coords, sample = sc.coords_of(kin.parent, bits - 1), sc.sample_of(kin.parent, bits - 1)
    found = torch.cat([sample[:, None], coords], 1).tolist()
    assert sorted(found) == sorted(pooled.nonzero().tolist())
    # Means over occupied children equal the dense average pooling over occupied voxels.
    rows = sc.take(x, kin.children.flatten().long(), kin.slot).view(-1, 8)
    exists = kin.children < len(code)
    mean = rows.sum(1) / exists.sum(1)
    total = F.avg_pool3d(dense_of(code, x, mask, bits), 2)
    share = F.avg_pool3d(mask[:, None].double(), 2)
    want = at_points(total / share, kin.parent, bits - 1)[:, 0]
    assert (mean - want).abs().max() < 1e-12
    # Children of the parents, in order: the codes again.
    assert torch.equal(sc.children_of(kin.parent, exists), code)
    assert torch.equal(kin.children.flatten()[kin.slot], torch.arange(len(code)).int())


def test_take_has_the_gradient_of_indexing():
    there, back = torch.tensor([2, 4, 0, 4]), torch.tensor([2, 4, 0, 4])     # 4: nothing; rows 1 and 3 stay
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: sc.take(t, there, back), (x,))
    assert torch.equal(sc.take(x, there, back)[[1, 3]], torch.zeros(2, 2, dtype=torch.float64))


def test_what_is_kept_for_backward_is_the_input_and_the_kernel():
    code, x, _, bits = scattered([(24, 24, 24)], .3, 7, channels=16)
    table = sc.neighbours(code, bits)
    conv, x = sc.SubMConv3d(16, 16), x.float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        conv(x, table)
    numbers = [t for t in kept if t.is_floating_point()]
    bytes_kept = sum(t.nbytes for t in numbers)
    assert bytes_kept <= 1.1 * (x.nbytes + conv.weight.nbytes)
    assert [t for t in kept if not t.is_floating_point()][0] is table or len(kept) - len(numbers) == 1


def test_under_autocast_the_work_is_done_in_bfloat16():
    code, x, _, bits = scattered([(8, 8, 8)], .4, 8)
    table = sc.neighbours(code, bits)
    conv, x = sc.SubMConv3d(3, 4), x.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = conv(x, table)
    assert y.dtype == torch.bfloat16
    assert (y.float() - conv(x, table)).abs().max() < .05
