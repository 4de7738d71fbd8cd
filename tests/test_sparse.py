"""sparse.py: tiles and checkpoints against the whole, tokens alone, every field."""
import dataclasses

import pytest
import torch
import torch.nn.functional as F

import quantize
import sparse
import sparse_conv as sc
import sparse_tables as st

SMALL = dict(model_channels=32, head_channels=8, num_blocks=2, z_channels=4, num_codes=16, codebooks=2)


def spheres(edge=40, samples=1, channels=1, seed=0):
    """Voxels within 2 of a sphere's surface, with their distance / 2: codes, features, size."""
    source = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.arange(edge)] * 3, indexing="ij"), -1).float()
    coords, feats, sample = [], [], []
    for number in range(samples):
        middle = edge / 2 + 2 * torch.rand(3, generator=source)
        distance = (grid - middle).norm(dim=-1) - edge / 3
        near = distance.abs() < 2
        coords.append(near.nonzero())
        feats.append(distance[near] / 2)
        sample.append(torch.full((int(near.sum()),), number))
    feats = torch.stack([torch.cat(feats)] + [torch.cat(feats) ** 2] * (channels - 1), 1)
    size = (edge, edge, edge)
    return *sparse.sorted_points(torch.cat(coords), torch.cat(sample), feats, size), size


def network(**changes):
    torch.manual_seed(0)
    return sparse.SparseVAE(sparse.SparseConfig(**SMALL | changes))


def step(vae, mode, code, feats, size, samples=1, tile=(16, 16, 16), seed=0):
    """Output and gradients of one pass; the quantiser's notes are dropped."""
    vae.memory(mode, tile)
    vae.zero_grad()
    generators = [torch.Generator().manual_seed(seed + n) for n in range(samples)]
    tables = vae.tables(code, size, samples)
    out = vae(feats, tables, generators)
    loss = (out.recon - feats).abs().mean() + sum(x.square().mean() for x in out.occupancy)
    loss = loss + (out.vq_loss if hasattr(out, "vq_loss") else out.mu.square().mean() + out.logvar.mean())
    loss.backward()
    return out, {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("bottleneck", ["vq", "fsq", "kl"])
def test_checkpoints_and_tiles_equal_the_whole(bottleneck):
    code, feats, size = spheres(edge=24, samples=2)
    vae = network(bottleneck=bottleneck, fsq_levels=(5, 5, 5, 5)).double()
    feats = feats.double()
    whole, grads = step(vae, "none", code, feats, size, samples=2)
    for mode, tile in [("checkpoint", None), ("tile", (8, 8, 8)), ("tile", (16, 24, 40))]:
        out, found = step(vae, mode, code, feats, size, 2, tile)
        assert (out.recon - whole.recon).abs().max() <= 1e-14
        for mine, theirs in zip(out.occupancy, whole.occupancy):
            assert (mine - theirs).abs().max() <= 1e-14
        assert found.keys() == grads.keys()
        assert max((found[name] - grads[name]).abs().max().item() for name in grads) <= 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_halo_one_token_less_gives_another_result(part, monkeypatch):
    code, feats, size = spheres(edge=48)
    vae, feats = network(bottleneck="kl").double(), feats.double()
    whole, _ = step(vae, "none", code, feats, size)
    right = sparse.halo_of

    def less(convolutions, decoder):
        return right(convolutions, decoder) - (decoder == (part == "decoder"))
    monkeypatch.setattr(sparse, "halo_of", less)
    out, _ = step(vae, "tile", code, feats, size, tile=(8, 8, 8))
    assert (out.recon - whole.recon).abs().max() > 1e-6


@pytest.mark.slow
def test_drawn_tiles_are_those_of_the_whole_and_unbiased():
    code, feats, size = spheres(edge=32)
    vae, feats = network().double(), feats.double()
    vae.memory("tile", (16, 16, 16))
    whole = vae(feats, vae.tables(code, size))
    count = len(vae.tables(code, size).decoder_tiles)
    vae.memory("tile", (16, 16, 16), pick=3)
    total = 0
    for seed in range(200):
        tables = vae.tables(code, size, generator=torch.Generator().manual_seed(seed))
        rows = sparse.owned_rows(tables.decoder_tiles, 0)
        error = (whole.recon[rows] - feats[rows]).abs().sum() * tables.tile_weight / len(feats)
        total = total + error.item() / 200
    assert tables.tile_weight == count / 3
    want = (whole.recon - feats).abs().mean().item()
    assert abs(total - want) < .03 * want
    out = vae(feats, tables)
    assert torch.equal(out.rows[0], rows) and (out.recon - whole.recon[rows]).abs().max() <= 1e-14
    for logits, level_rows, full in zip(out.occupancy, out.rows[1:], whole.occupancy):
        assert (logits - full[level_rows]).abs().max() <= 1e-14
    vae.eval()
    assert vae.tables(code, size).tile_weight == 1


@pytest.mark.parametrize("bottleneck", ["vq", "fsq", "kl"])
def test_tokens_alone_give_the_reconstruction(bottleneck):
    """With occupancy that is certain of the true children, decode finds the points and the values of the
    forward pass, to rounding; the numbers of tokens go through a file."""
    code, feats, size = spheres()
    vae = network(bottleneck=bottleneck, fsq_levels=(5, 5, 5, 5)).double().eval()
    feats = feats.double()
    tables = vae.tables(code, size)
    token, index = vae.tokenize(feats, tables)
    z = vae.lookup(index)

    # Force the true children: what the occupancy layers say is replaced level by level.
    exists = [kin.children < len(c) for kin, c in zip(tables.families, tables.code)][::-1]
    for up, there in zip(vae.decoder.ups, exists):
        up.occupancy.forward = lambda h, there=there: there.double() * 2 - 1
    points, recon = vae.decode(token, z, size)
    assert torch.equal(points, code)
    values, _, _ = vae.rebuild(z, tables)
    assert (recon - values.clamp(-1, 1)).abs().max() < 1e-12


def test_decode_never_leaves_a_parent_without_a_child():
    code, feats, size = spheres()
    vae = network().eval()
    token, index = vae.tokenize(feats, vae.tables(code, size))
    for up in vae.decoder.ups:
        torch.nn.init.constant_(up.occupancy.bias, -100.0)
    points, recon = vae.decode(token, vae.lookup(index), size)
    assert len(points) == len(token) == len(recon)
    assert torch.equal(points >> 9, token)


def test_two_samples_side_by_side_are_two_runs():
    code, feats, size = spheres(samples=2)
    vae = network().double().eval()
    feats = feats.double()
    both = vae(feats, vae.tables(code, size, 2))
    bits = st.grid_bits(size)
    found = []
    for number in range(2):
        mine = sc.sample_of(code, bits) == number
        alone = code[mine] - (number << 3 * bits)
        found.append(vae(feats[mine], vae.tables(alone, size)).recon)
    assert (torch.cat(found) - both.recon).abs().max() <= 1e-13


def test_the_linear_path_begins_as_principal_components():
    """Its reconstruction is the projection on the first Z singular vectors, worked out by SVD."""
    code, feats, size = spheres()
    vae = network(z_channels=6, bottleneck="kl").double().eval()
    feats = feats.double()
    tables = vae.tables(code, size)
    rows = sparse.patches(feats, tables)
    vae.start_linear(rows)
    _, _, right = torch.linalg.svd(rows, full_matrices=False)
    want = rows @ right[:6].T @ right[:6]
    z = vae.lin_in(sparse.patches(feats, tables, torch.ones(len(feats), dtype=torch.bool)))
    found = vae.linear_values(z, tables.place)
    assert (found - want.flatten()[tables.place, None]).abs().max() < 1e-9
    assert abs(z.square().mean().item() - 1) < 1e-6


def test_patches_hold_each_value_at_its_place_by_a_loop():
    code, feats, size = spheres(edge=20, channels=2)
    tables = st.tables_of(code, size)
    rows = sparse.patches(feats, tables, feats[:, 0] > 0)
    want = torch.zeros(tables.tokens, 512, 2)
    seen = torch.zeros(tables.tokens, 512)
    token = {tuple(c): n for n, c in enumerate(tables.coords.tolist())}
    for c, f in zip(sc.coords_of(code, tables.bits), feats):
        place = sc.encode_coords(c[None] % 8, 0, 3).item()
        want[token[tuple((c // 8).tolist())], place] = f
        seen[token[tuple((c // 8).tolist())], place] = f[0] > 0
    assert torch.equal(rows[:, :1024], want.flatten(1)) and torch.equal(rows[:, 1024:], seen)


CHANGES = {
    "model_channels": 48, "z_channels": 6, "num_blocks": 1, "num_heads": 2, "head_channels": 16,
    "mlp_ratio": 2.0, "attention": "shift_sequence", "window": 2, "positions": "rope", "qk_norm": True,
    "norm": "none",
    "input_band": 0.5, "bottleneck": "kl", "num_codes": 8, "codebooks": 1, "in_channels": 2,
    "codebook_cosine": True, "lambda_commitment": 0.5,
}
# These act in training, where tasks/sparse.py and quantize.py read them; their tests stand there.
ELSEWHERE = {"codebook_update", "codebook_decay", "codebook_restart", "codebook_init", "lambda_vq",
             "fsq_levels", "occupancy_weight"}


def test_every_field_is_known_here_or_elsewhere():
    assert {f.name for f in dataclasses.fields(sparse.SparseConfig)} == set(CHANGES) | ELSEWHERE


@pytest.mark.parametrize("name", CHANGES)
def test_every_field_changes_something(name):
    def fingerprint(vae):
        code, feats, size = spheres(edge=32, channels=vae.cfg.in_channels)
        out = vae(feats, vae.tables(code, size), [torch.Generator().manual_seed(0)])
        return [p.shape for p in vae.parameters()], out.recon, out[-2]
    before, after = fingerprint(network()), fingerprint(network(**{name: CHANGES[name]}))
    same = before[0] == after[0] and torch.equal(before[1], after[1]) and torch.equal(before[2], after[2])
    assert not same


@pytest.mark.parametrize("change, line", [
    ({"attention": "all"}, "sparse.attention=all; choose one of full, swin"),
    ({"model_channels": 40}, "sparse.model_channels=40; take a multiple of 16"),
    ({"head_channels": 12}, "no multiple of sparse.head_channels=12"),
    ({"num_heads": 5}, "no multiple of sparse.num_heads=5"),
    ({"bottleneck": "fsq"}, "needs sparse.fsq_levels"),
    ({"norm": "group"}, "sparse.norm=group; choose one of layer, none")])
def test_a_config_that_cannot_be_meant_is_refused(change, line):
    with pytest.raises(ValueError, match=line):
        network(**change)


def test_presets_have_their_sizes_and_codebooks():
    light, large = (sparse.SparseVAE.from_preset(name) for name in ("sparse_light", "sparse_512"))
    assert sum(p.numel() for p in light.parameters()) < 3e6
    assert 6e7 < sum(p.numel() for p in large.parameters()) < 7e7
    assert isinstance(light.quantizer, quantize.ResidualQuantizer)
    assert isinstance(sparse.SparseVAE.from_preset("sparse_light", codebooks=1).quantizer,
                      quantize.VectorQuantizer)
    with pytest.raises(ValueError, match="there are sparse_512, sparse_light"):
        sparse.SparseVAE.from_preset("sparse_64")


@pytest.mark.slow
def test_one_crop_is_learnt_by_heart():
    """IoU of decoded points at least .98, distance within .05 of the band."""
    torch.manual_seed(0)
    code, feats, size = spheres(edge=32)
    cfg = sparse.SparseConfig(model_channels=64, num_blocks=2, z_channels=16, bottleneck="kl")
    vae = sparse.SparseVAE(cfg)
    tables = vae.tables(code, size)
    vae.start_linear(sparse.patches(feats, tables))
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    exists = [(kin.children < len(c)).float() for kin, c in zip(tables.families, tables.code)][::-1]
    for _ in range(120):
        z, _ = vae.latent(feats, tables).chunk(2, 1)
        recon, occupancy, _ = vae.rebuild(z, tables)
        bce = sum(F.binary_cross_entropy_with_logits(a, b) for a, b in zip(occupancy, exists))
        loss = (recon - feats).abs().mean() + bce / 3
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    vae.eval()
    with torch.no_grad():
        points, values = vae.decode(*vae.tokenize(feats, tables), size)
    found, wanted = set(points.tolist()), set(code.tolist())
    iou = len(found & wanted) / len(found | wanted)
    both = torch.isin(points, code)
    l1 = (values[both] - feats[torch.isin(code, points)]).abs().mean().item()
    assert iou >= .98 and l1 <= .05, (iou, l1)
