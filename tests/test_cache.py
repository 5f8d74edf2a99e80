"""The cache alone: where keys and values go, and rows that move."""

import torch

from nanoexit.cache import Cache


def cache_of(rows: int, capacity: int = 6) -> Cache:
    return Cache(torch.zeros(4, rows, 2, 2, capacity, 5))


def test_rows_at_one_position_and_at_many_are_stored_alike():
    """Catches: keys mistaken for values; a row's entries written to another row or position."""
    k, v = torch.randn(2, 3, 2, 1, 5, generator=torch.Generator().manual_seed(0))
    for positions in ([2, 2, 2], [4, 0, 2]):
        cache, at = cache_of(3), torch.tensor(positions)
        cache.span = 5
        keys, values = cache.write(1, at[:, None], k, v)
        assert keys.shape == values.shape == (3, 2, 5, 5)
        for row, position in enumerate(positions):
            assert torch.equal(keys[row, :, position], k[row, :, 0])
            assert torch.equal(values[row, :, position], v[row, :, 0])
        assert keys.count_nonzero() + values.count_nonzero() == 2 * k.numel()
        assert not cache.kv[[0, 2, 3]].any(), "other blocks stay unset"


def test_rows_move_and_are_replaced():
    """Catches: entries of another row; a row that inherits the name of the one it replaced."""
    cache, new = cache_of(4), cache_of(2, capacity=3)
    cache.kv += torch.arange(4.0).view(4, 1, 1, 1, 1)  # entries that say whose they are
    new.kv += torch.tensor([8.0, 9.0]).view(2, 1, 1, 1, 1)
    before = cache.names
    new.select(torch.tensor([1, 1]))
    cache.admit(torch.tensor([0, 2]), new)
    assert len({*before.tolist(), *cache.names.tolist()}) == 6
    assert (cache.names == before)[1::2].all()
    names = cache.names
    cache.select(torch.tensor([3, 1, 0]))
    assert cache.names.tolist() == names[[3, 1, 0]].tolist()
    assert cache.kv[:, :, 0, 0, 2, 0].tolist() == [[3, 1, 9]] * 4
    assert cache.kv[:, :, 0, 0, 3, 0].tolist() == [[3, 1, 0]] * 4
