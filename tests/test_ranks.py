"""training/ranks.py: what one process can say of it. test_distributed.py runs many."""
import pytest

from training import ranks


@pytest.mark.parametrize("count", [0, 1, 2, 5, 6, 7])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_shares_are_stretches_that_cover_all(monkeypatch, count, world):
    monkeypatch.setattr(ranks, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(list(ranks.shared(count)))
    largest = max(map(len, shares))
    assert [k for share in shares for k in share] == list(range(count)) and largest == -(-count // world)
    assert len(shares[0]) == largest                             # the first rank has work wherever one has
