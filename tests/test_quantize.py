"""quantize.py: codebooks and grids, alone and in the autoencoder."""
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import quantize
from networks import (
    CODEBOOK_FIELDS,
    build,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------- codebooks

def quantizer(num_codes=16, code_dim=3, dtype=torch.float32, **options) -> quantize.VectorQuantizer:
    torch.manual_seed(1)
    vq = quantize.VectorQuantizer(num_codes, code_dim, **options).to(dtype)
    with torch.no_grad():
        vq.codebook.copy_(vq.on_sphere(torch.randn_like(vq.codebook)))
        vq.code_sum.copy_(vq.codebook)
    return vq


def slow_index(rows: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    return torch.stack([(row - codes).square().sum(1).argmin() for row in rows])


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_is_the_papers_formula_term_by_term(cosine):
    """arXiv:1711.00937, Eq. 3, with its stop-gradients written out; the gradient of a later loss goes
    straight through.
    """
    vq = quantizer(
        dtype=torch.float64, update="gradient", lambda_vq=0.7, lambda_commitment=0.3, cosine=cosine
    )
    z = torch.randn(2, 3, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)
    codes = vq.quantize_volume(z)
    (codes.vq_loss + (codes.z_q * weight).sum()).backward()

    z2, e = z.detach().clone().requires_grad_(), vq.codebook.detach().clone().requires_grad_()
    x, book = (F.normalize(z2, dim=1), F.normalize(e, dim=1)) if cosine else (z2, e)
    index = slow_index(x.detach().movedim(1, -1).reshape(-1, 3), book.detach())
    code = book[index].view(2, 2, 3, 2, 3).movedim(-1, 1)
    loss = 0.7 * (x.detach() - code).square().mean() + 0.3 * (x - code.detach()).square().mean()
    (loss + (x * weight).sum()).backward()
    assert torch.equal(codes.index.flatten(), index) and torch.equal(codes.z_q, code)
    torch.testing.assert_close(codes.vq_loss, loss)
    torch.testing.assert_close(z.grad, z2.grad)
    torch.testing.assert_close(vq.codebook.grad, e.grad)


@pytest.mark.parametrize("cosine", [False, True])
def test_vq_agrees_with_vector_quantize_pytorch(cosine):
    """The same indices, and the same codebook after three EMA updates."""
    reference = pytest.importorskip("vector_quantize_pytorch")
    vq = quantizer(64, 4, cosine=cosine, decay=0.8, restart=0.0).train()
    theirs = reference.VectorQuantize(
        4, codebook_size=64, decay=0.8, use_cosine_sim=cosine, threshold_ema_dead_code=0, kmeans_init=False
    )
    book = theirs._codebook
    book.embed.data.copy_(vq.codebook[None])
    book.embed_avg.data.copy_(vq.code_sum[None])
    book.cluster_size.data.copy_(vq.code_count[None])
    theirs.train()
    for step in range(3):
        z = torch.randn(2, 4, 3, 5, 4)
        index = theirs(z.movedim(1, -1).flatten(1, 3))[1]
        codes = vq.quantize_volume(z)
        vq.update()
        assert torch.equal(codes.index.flatten(), index.flatten()), step
        difference = (vq.codebook - book.embed[0]).abs().max().item()
        assert difference < 1e-5, difference


def test_search_equals_argmin_and_is_chunked(monkeypatch):
    rows, codes = torch.randn(700, 4, dtype=torch.float64), torch.randn(90, 4, dtype=torch.float64)
    whole = quantize.nearest(rows, codes, statistics=True)
    assert torch.equal(whole[0], slow_index(rows, codes))
    assert torch.equal(whole[1], torch.bincount(whole[0], minlength=90).double())
    torch.testing.assert_close(whole[2], torch.zeros_like(codes).index_add_(0, whole[0], rows))
    monkeypatch.setattr(quantize, "SEARCH_ELEMENTS", 90 * 33)
    for a, b in zip(quantize.nearest(rows, codes, statistics=True), whole):
        torch.testing.assert_close(a, b)


def test_search_of_a_radar_volume_stays_within_a_quarter_gib():
    """408,576 latents x 8,192 codes: peak above inputs and outputs, on fake tensors (the same storages as
    real ones).
    """
    from peaks import LiveStorages
    with FakeTensorMode():
        counter = LiveStorages("cpu")
        rows, codes = torch.empty(408_576, 4), torch.empty(8192, 4)
        with counter:
            found = quantize.nearest(rows, codes, statistics=True)
            outputs = sum(t.untyped_storage().nbytes() for t in found)
        peak = counter.peak()[0]
    assert 2 ** 26 < peak - outputs <= 0.25 * 2 ** 30, (peak - outputs) / 2 ** 30


def test_micro_batches_and_repeated_forwards_move_the_codebook_as_one_batch():
    z = torch.randn(4, 3, 2, 3, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(4)]
    states = []
    for parts in ([4], [1, 3], [2, 2]):
        vq = quantizer(restart=0.5).train()
        for g, seed in zip(generators, range(4)):
            g.manual_seed(seed)
        at = 0
        for n in parts:
            vq.quantize_volume(z[at:at + n], generators[at:at + n])
            at += n
        vq.update(torch.Generator().manual_seed(5))
        states.append(vq.state_dict())
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, msg=name)
    vq = quantizer()
    before = vq.codebook.clone()
    vq.eval().quantize_volume(z)
    vq.update()
    assert torch.equal(vq.codebook, before), "an evaluation moved the codebook"


def test_dead_codes_revive():
    """The defect: 13 of 8192 codes in use. Here all latents lie far from a codebook in one corner."""
    torch.manual_seed(0)
    with_restart, without = quantizer(64, 2), quantizer(64, 2, restart=0.0)
    for vq in (with_restart, without):
        vq.codebook.mul_(0.01).sub_(5)
        vq.code_sum.copy_(vq.codebook)
        for step in range(150):
            z = torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(step))
            vq.quantize_volume(z, torch.Generator().manual_seed(step))
            vq.update(torch.Generator().manual_seed(step))
    z = torch.randn(1, 2, 16, 16, 16)
    used = [len(vq.eval().quantize_volume(z).index.unique()) for vq in (with_restart, without)]
    assert used[0] >= 60 and used[1] < 20, used


def test_a_restarted_code_has_twice_the_count_of_death():
    """By hand: after 8 latents at code 0 the counts are .5 (1 + 8) and .5, their mean 1.5; below .5 x 1.5 a
    code is dead, and begins anew with 2 x .5 x 1.5.
    """
    vq = quantizer(4, 1, decay=0.5, restart=0.5).train()
    vq.codebook.copy_(torch.tensor([[0.0], [10.0], [20.0], [30.0]]))
    vq.quantize_volume(torch.full((1, 1, 2, 2, 2), 1.0))
    vq.update(torch.Generator().manual_seed(0))
    torch.testing.assert_close(vq.code_count, torch.tensor([4.5, 1.5, 1.5, 1.5]))
    torch.testing.assert_close(vq.code_sum[1:], torch.full((3, 1), 1.5))


def test_far_rows_are_drawn_in_proportion_to_the_squared_distance():
    """Rows at 0, 1, 2 and 3 from the only code: squares 0, 1, 4, 9 of 14."""
    rows, codes = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.zeros(1, 1)
    drawn = quantize.far_rows(rows, codes, 20_000, torch.Generator().manual_seed(0))
    shares = torch.bincount(drawn[:, 0].long(), minlength=4) / len(drawn)
    assert (shares - torch.tensor([0, 1, 4, 9]) / 14).abs().max() < 0.015, shares


def test_counts_begin_as_one_step_will_have_them():
    """400 latents, 100 at each of 4 centres, and steps of 40: each code begins with a count of 10."""
    rows = torch.tensor([[-3.0, 0], [3, 0], [0, 4], [0, -4]]).repeat(100, 1)
    vq = quantizer(4, 2)
    vq.fit(rows, "kmeans", torch.Generator().manual_seed(0), per_step=40)
    torch.testing.assert_close(vq.code_count, torch.full((4,), 10.0))
    torch.testing.assert_close(vq.code_sum, 10 * vq.codebook)
    vq.fit(rows, "kmeans", torch.Generator().manual_seed(0))
    torch.testing.assert_close(vq.code_count, torch.full((4,), 100.0))


@pytest.mark.parametrize("how", ["kmeans", "samples"])
def test_codebook_starts_from_data(how):
    centres = torch.tensor([[-3.0, 0], [3, 0], [0, 4], [0, -4]])
    rows = centres.repeat(100, 1) + 0.1 * torch.randn(400, 2)
    vq = quantizer(4, 2)
    vq.fit(rows, how, torch.Generator().manual_seed(0))
    # A code is where data are.
    assert (rows[:, None] - vq.codebook).norm(dim=-1).min(0).values.max() < 0.2
    if how == "kmeans":
        assert torch.cdist(centres, vq.codebook).min(1).values.max() < 0.1


def test_codes_keep_float32_under_autocast():
    vq = quantizer(512, 4)
    z = torch.randn(1, 4, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        codes = vq.quantize_volume(z)
    assert codes.z_q.dtype == torch.float32 and torch.equal(codes.index, vq.quantize_volume(z).index)
    assert torch.equal(vq.quantize_volume(z.bfloat16()).index, vq.quantize_volume(z.bfloat16().float()).index)


def test_fsq_is_the_papers_formula_and_every_code_is_reached():
    """arXiv:2309.15505: values of each channel are the levels, evenly spaced; index <-> code is a bijection.
    """
    for levels in ((8, 5, 5, 5), (4, 3), (2, 7)):
        fsq = quantize.FiniteScalarQuantizer(levels)
        z = (4 * torch.randn(1, len(levels), 20, 20, 20, dtype=torch.float64)).requires_grad_()
        codes = fsq.quantize_volume(z)
        for channel, n in enumerate(levels):
            assert len(codes.z_q[:, channel].unique()) == n
        every = torch.arange(fsq.num_codes).view(1, -1, 1, 1)
        points = fsq.lookup_volume(every)
        assert (
            len({tuple(p.tolist()) for p in points[0, :, :, 0, 0].T}) == fsq.num_codes
            and points.abs().max() <= 1
        )
        assert torch.equal(fsq.lookup_volume(codes.index), codes.z_q.float())
        codes.z_q.sum().backward()
        # The gradient is that of the bounding function.
        for channel, n in enumerate(levels):
            half, offset = (n - 1) * (1 + 1e-3) / 2, 0.5 if n % 2 == 0 else 0.0
            shifted = z[:, channel].detach() + torch.atanh(torch.tensor(offset / half, dtype=torch.float64))
            torch.testing.assert_close(z.grad[:, channel], (1 - shifted.tanh() ** 2) * half / (n // 2))


@pytest.mark.parametrize(
    "fields",
    [
        dict(bottleneck="vq", num_codes=32),
        dict(bottleneck="vq", num_codes=32, codebook_cosine=True),
        dict(bottleneck="fsq", fsq_levels=(5, 4)),
    ],
    ids=str,
)
def test_network_with_codes(fields):
    vae = build(torch.float32, **fields)
    x = torch.randn(2, 1, 5, 9, 12)
    recon, vq_loss, index = vae(x, [torch.Generator().manual_seed(i) for i in range(2)])
    assert (
        recon.shape == x.shape and vq_loss.shape == () and index.shape == (2, *vae.latent_size(x.shape[2:]))
    )
    (recon.square().mean() + vq_loss).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.encoder.parameters())
    z_q, vq_loss, index = vae.eval().encode(x)
    assert torch.equal(vae.decode_indices(index, x.shape[2:]), vae.decode(z_q, x.shape[2:]))
    assert torch.equal(vae.decode_indices(index, x.shape[2:]), vae(x).recon)
    vae.memory("tile", (4, 4, 4))
    torch.testing.assert_close(vae.encode(x).z_q, z_q)
    with pytest.raises(ValueError, match="vae.bottleneck is kl"):
        build().decode_indices(index)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [dict(bottleneck="vq", num_codes=32), dict(bottleneck="fsq", fsq_levels=(5, 4))], ids=str
)
def test_tiles_are_exact_through_a_codebook(fields):
    x, results = torch.randn(1, 1, 11, 14, 13, dtype=torch.float64), []
    for setting in (("none",), ("checkpoint",), ("tile", (4, 8, 4), "2"), ("tile", (4, 8, 4), "1+1")):
        vae = build(**fields).memory(*setting)
        out = vae(x, torch.Generator().manual_seed(1))
        (out.recon.square().mean() + out.vq_loss).backward()
        results.append(
            (out, [p.grad for p in vae.encoder.parameters()] + [p.grad for p in vae.decoder.parameters()])
        )
    for out, gradients in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradients, results[0][1], rtol=1e-8, atol=1e-9)


def test_learned_codebook_and_other_fields_change_something():
    """The fields of the codebook act in training: the codebook after one step differs for each of them."""
    def codebook(**fields):
        vae = build(
            torch.float32, **{"bottleneck": "vq", "num_codes": 8, "codebook_update": "ema", **fields}
        ).train()
        rows = (
            vae.latent(torch.linspace(-1, 1, 8 * 16 * 16).view(1, 1, 8, 16, 16).sin())
            .detach()
            .movedim(1, -1)
            .flatten(0, 3)
        )
        if vae.cfg.codebook_init != "uniform":
            vae.quantizer.fit(rows, vae.cfg.codebook_init, torch.Generator().manual_seed(0))
        optimizer = torch.optim.SGD(vae.parameters(), lr=0.1)
        for step in range(3):
            out = vae(
                torch.linspace(-1, 1, 8 * 16 * 16).view(1, 1, 8, 16, 16).sin(),
                torch.Generator().manual_seed(step),
            )
            optimizer.zero_grad()
            (out.recon.square().mean() + out.vq_loss).backward()
            optimizer.step()
            vae.quantizer.update(torch.Generator().manual_seed(step))
        return [round(v, 6) for v in vae.quantizer.codebook.detach().flatten().tolist()]

    plain = codebook()
    for change in CODEBOOK_FIELDS:
        before = (
            codebook(codebook_update="gradient")
            if change == dict(codebook_update="gradient", lambda_vq=3.0)
            else plain
        )
        assert codebook(**change) != before, change


def codebook_of_rank(folder: Path) -> None:
    """One of two processes, each with half of the batch; it saves what came out."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    vq = quantizer(16, 3, torch.float64, restart=0.5).train()
    for step in range(3):
        z = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        vq.quantize_volume(
            z[2 * rank : 2 * rank + 2],
            [torch.Generator().manual_seed(10 * step + 2 * rank + i) for i in range(2)],
        )
        vq.update(torch.Generator().manual_seed(step))
    torch.save(vq.state_dict(), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_codebook_is_the_same_on_two_processes_as_on_one(pool, tmp_path):
    pool(2, codebook_of_rank, tmp_path)
    vq = quantizer(16, 3, torch.float64, restart=0.5).train()
    for step in range(3):
        z = torch.randn(4, 3, 2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        vq.quantize_volume(z, [torch.Generator().manual_seed(10 * step + i) for i in range(4)])
        vq.update(torch.Generator().manual_seed(step))
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name, value in vq.state_dict().items():
        assert torch.equal(ranks[0][name], ranks[1][name])
        torch.testing.assert_close(ranks[0][name], value)


# ------------------------------------------------------------------------------------------- residual ones

def test_residual_codebooks_code_what_is_left():
    torch.manual_seed(0)
    rvq = quantize.ResidualQuantizer([quantize.VectorQuantizer(8, 3).double() for _ in range(3)])
    z = torch.randn(200, 3, dtype=torch.float64)
    rvq.fit(z, generator=torch.Generator().manual_seed(0))
    rows = z.clone().requires_grad_()
    codes = rvq(rows)
    (codes.z_q * 2).sum().backward(retain_graph=True)

    # By hand: the nearest code of what is left, three times; 0.25 |rest - code|^2, mean of three.
    rest, total, loss = z, 0, 0
    for number, vq in enumerate(rvq.quantizers):
        index = slow_index(rest, vq.codebook)
        assert torch.equal(index, codes.index[:, number])
        loss = loss + 0.25 * (rest - vq.codebook[index]).square().mean() / 3
        rest, total = rest - vq.codebook[index], total + vq.codebook[index]
    assert torch.equal(codes.z_q, total) and torch.equal(rvq.lookup(codes.index), total)
    torch.testing.assert_close(codes.vq_loss, loss)
    # Straight through: the gradient of z_q is that of the rows; that of the loss 2 x .25 / 3 x rest / size.
    torch.testing.assert_close(rows.grad, torch.full_like(rows, 2))
    grad, = torch.autograd.grad(codes.vq_loss, rows)
    left, want = z, 0
    for vq, index in zip(rvq.quantizers, codes.index.unbind(-1)):
        left = left - vq.codebook[index]
        want = want + 2 * 0.25 / 3 * left / z.numel()
    torch.testing.assert_close(grad, want)


def test_each_residual_codebook_lowers_the_error_and_keeps_its_codes_alive():
    torch.manual_seed(0)
    errors = []
    z = torch.randn(4000, 4)
    for count in (1, 2, 4):
        rvq = quantize.ResidualQuantizer([quantize.VectorQuantizer(32, 4) for _ in range(count)])
        rvq.fit(z, generator=torch.Generator().manual_seed(0))
        for step in range(20):
            rvq(z)
            rvq.update(torch.Generator().manual_seed(step))
        codes = rvq(z)
        errors.append((codes.z_q - z).square().mean().item())
        assert all(len(one.unique()) > 28 for one in codes.index.unbind(-1))
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.3 * errors[1]


def test_dead_codes_draw_by_the_squared_distance():
    """The draw in whole numbers against its definition: inverse sampling of the running sum, by numpy."""
    rows = torch.randn(3000, 2, generator=torch.Generator().manual_seed(1))
    codes = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    drawn = quantize.far_rows(rows, codes, 500, torch.Generator().manual_seed(2))
    distance = (rows.numpy()[:, None] - codes.numpy()[None]).astype(np.float64)
    error = (distance ** 2).sum(2).min(1)
    edges = np.cumsum(error + 1e-3 * error.mean())
    generator = torch.Generator().manual_seed(2)
    number = torch.rand(500, generator=generator, dtype=torch.float64).numpy() * edges[-1]
    # Float32 distances may move an edge past a number, at most in a few of 500.
    expected = torch.from_numpy(np.searchsorted(edges, number))
    assert (drawn == rows[expected]).all(dim=1).sum() >= 498


def test_levels_on_the_device_belong_to_no_state_dict_and_keep_their_values_in_16_bits():
    """Old checkpoints load, and a network that is turned into float16 counts its codes as before."""
    plain, rows = quantize.FiniteScalarQuantizer((8, 5, 2051)), torch.randn(64, 3)
    assert not plain.state_dict()
    halved = quantize.FiniteScalarQuantizer((8, 5, 2051)).half()
    halved.load_state_dict({})
    assert torch.equal(plain(rows).index, halved(rows).index)


def test_fsq_of_a_nan_has_an_index_and_keeps_the_nan():
    """Its index once lay outside of the codes, so that a step which is not finite ended the run."""
    rows = torch.tensor([[float("nan"), 0.1, 0.2], [0.3, 0.1, 0.2]])
    found = quantize.FiniteScalarQuantizer((8, 5, 5))(rows)
    assert 0 <= int(found.index.min()) and int(found.index.max()) < 200
    assert found.z_q[0].isnan().any() and found.z_q[1].isfinite().all()
