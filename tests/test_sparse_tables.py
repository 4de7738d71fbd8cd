"""sparse_tables.py: tokens, places and tiles, each worked out from coordinates."""
import pytest
import torch

import sparse_conv as sc
import sparse_tables as st


def scattered(size=(50, 40, 64), fill=.02, samples=2, seed=0):
    mask = torch.rand(samples, *size, generator=torch.Generator().manual_seed(seed)) < fill
    sample, *coords = mask.nonzero().unbind(1)
    code, _ = st.sorted_points(torch.stack(coords, 1), sample, torch.zeros(len(sample), 1), size)
    return st.tables_of(code, size, samples)


def test_tokens_and_places_are_those_of_the_coordinates():
    tables = scattered()
    coords = sc.coords_of(tables.code[0], tables.bits)
    sample = sc.sample_of(tables.code[0], tables.bits)
    token = torch.cat([sample[:, None], coords // 8], 1)
    found = torch.cat([sc.sample_of(tables.code[3], tables.bits - 3)[:, None], tables.coords], 1)
    assert torch.equal(found[tables.place // 512], token)
    inner = sc.coords_of(tables.place % 512, 3)
    assert torch.equal(inner, coords % 8)
    assert sum(tables.per_sample) == tables.tokens == len(torch.unique(token, dim=0))
    assert tables.per_sample[0] == (found[:, 0] == 0).sum()


@pytest.mark.parametrize("convolutions, decoder, halo", [
    ((0, 2, 2, 2), False, 4),        # 2 tokens + 2/2 + 2/4 = 3.5
    ((1, 1, 1, 0), True, 1),         # 1/8 + 1/4 + 1/2 = .875
    ((2, 2, 2, 1), True, 3),         # 2/8 + 2/4 + 2/2 + 1 = 2.75
    ((0, 0, 0, 0), True, 0), ((0, 0, 0, 0), False, 0), ((0, 0, 0, 3), False, 3)])
def test_a_halo_is_what_the_convolutions_see_rounded_up(convolutions, decoder, halo):
    assert st.halo_of(convolutions, decoder) == halo


@pytest.mark.parametrize("edge", [1, 2, 4, 64])
def test_tiles_own_every_row_once_and_their_tables_are_those_of_their_points(edge):
    tables = st.with_tiles(scattered(), edge, 2, 1)
    for level in range(4):
        owned = torch.cat([tile.rows(level)[slice(*tile.own[level])] for tile in tables.decoder_tiles])
        assert torch.equal(owned, torch.arange(len(tables.code[level])))
    for tile in tables.encoder_tiles[::7]:
        part = st.restricted(tables, tile, range(4))
        direct = st.tables_of(tables.code[0][tile.rows(0)], tables.size, tables.samples)
        for mine, theirs in zip(part.neighbours + sum(part.families, ()), direct.neighbours +
                                sum(direct.families, ())):
            assert torch.equal(mine, theirs)
        assert torch.equal(part.place, direct.place) and torch.equal(part.coords, direct.coords)
        # Every token within 2 of the tile's cube is there, and none of another sample.
        own = tile.rows(3)[slice(*tile.own[3])]
        corner = tables.coords[own[0]] // edge * edge
        sample = sc.sample_of(tables.code[3], tables.bits - 3)
        away = torch.maximum(corner - tables.coords, tables.coords - corner - edge + 1).clamp_min(0).amax(1)
        wanted = (away <= 2) & (sample == sample[own[0]])
        assert torch.equal(tile.rows(3), wanted.nonzero()[:, 0])


def test_drawn_tiles_make_up_for_the_others():
    tables = scattered()
    every = st.with_tiles(tables, 2, 1, 1)
    some = st.with_tiles(tables, 2, 1, 1, 3, torch.Generator().manual_seed(0))
    assert len(some.decoder_tiles) == 3 and some.encoder_tiles == () or len(some.encoder_tiles) > 3
    assert some.tile_weight == len(every.decoder_tiles) / 3
    again = st.with_tiles(tables, 2, 1, 1, 3, torch.Generator().manual_seed(0))
    assert [t.own for t in some.decoder_tiles] == [t.own for t in again.decoder_tiles]


def test_what_is_no_set_of_points_is_refused():
    feats = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="1 of 2 lie outside of the grid 4,4,4, the first at"):
        st.sorted_points(torch.tensor([[0, 0, 0], [0, 4, 0]]), 0, feats, (4, 4, 4))
    with pytest.raises(ValueError, match="two lie at the same voxel"):
        st.sorted_points(torch.tensor([[1, 0, 0], [1, 0, 0]]), 0, feats, (4, 4, 4))
    with pytest.raises(ValueError, match="take a power of two"):
        st.with_tiles(scattered(), 3, 1, 1)
