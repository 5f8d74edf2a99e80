"""The cache alone: where keys and values go, and debts that follow their rows."""

import pytest
import torch

from nanoexit.cache import Cache

D = 3  # width of the residuals


def cache_of(rows: int, capacity: int = 6) -> Cache:
    return Cache(4, rows, 2, capacity, 5, torch.device("cpu"), torch.float32)


def owe(cache: Cache, depth: int, row: int, position: int) -> None:
    """A residual that says whose it is."""
    h = torch.full((1, D), 10.0 * row + position)
    cache.owe(depth, h, torch.tensor([row]), torch.tensor([position]))


def owed(cache: Cache, layer: int) -> set[tuple[float, int, int]]:
    due = cache.due(layer)
    return (
        set() if due is None else set(zip(due.h[:, 0].tolist(), *map(torch.Tensor.tolist, due[1:])))
    )


def test_rows_at_one_position_and_at_many_are_stored_alike():
    """Catches: keys taken for values, a row's entries written to another row or position."""
    k, v = torch.randn(2, 3, 2, 1, 5, generator=torch.Generator().manual_seed(0))
    for positions in ([2, 2, 2], [4, 0, 2]):
        cache, at = cache_of(3), torch.tensor(positions)
        cache.place(2 if positions == [2, 2, 2] else None, 5)
        keys, values = cache.write(1, at[:, None], k, v)
        assert keys.shape == values.shape == (3, 2, 5, 5)
        for row, position in enumerate(positions):
            assert torch.equal(keys[row, :, position], k[row, :, 0])
            assert torch.equal(values[row, :, position], v[row, :, 0])
        assert keys.count_nonzero() + values.count_nonzero() == 2 * k.numel()
        assert not cache.kv[[0, 2, 3]].any(), "other blocks stay unset"


def test_a_debt_is_due_until_it_is_paid_and_never_twice():
    """Catches: a debt that is dropped, paid twice, asked for by a block that has its keys, or kept
    beyond the last block."""
    cache = cache_of(2)
    owe(cache, 1, 0, 3)
    owe(cache, 2, 1, 4)
    owe(cache, 4, 1, 5)  # at full depth: no block is left
    assert owed(cache, 0) == set() and owed(cache, 1) == {(3.0, 0, 3)}
    cache.paid(cache.due(1), 2)
    assert owed(cache, 1) == set() and owed(cache, 2) == {(3.0, 0, 3), (14.0, 1, 4)}
    cache.paid(cache.due(2), 4)
    assert not cache.debts


def test_paying_a_debt_sets_its_places_alone():
    """Catches: keys of a debt written to another row, position or block."""
    cache, k, v = cache_of(3), torch.ones(1, 2, 5), torch.full((1, 2, 5), 2.0)
    owe(cache, 1, 2, 4)
    cache.write_due(3, cache.due(3), k, v)
    assert (cache.kv[3, 2, 0, :, 4] == 1).all() and (cache.kv[3, 2, 1, :, 4] == 2).all()
    assert cache.kv.count_nonzero() == 20


@pytest.mark.parametrize("way", ["select", "admit"])
def test_debts_follow_their_rows(way):
    """Catches: a debt paid into the row that took the place of the one that left."""
    cache = cache_of(4)
    cache.kv += torch.arange(4.0).view(4, 1, 1, 1, 1)  # entries that say whose they are
    for row in range(4):
        owe(cache, 1 + row % 2, row, row)
    if way == "select":
        cache.select(torch.tensor([3, 1]))
        assert owed(cache, 3) == {(33.0, 0, 3), (11.0, 1, 1)}
        assert cache.kv[:, :, 0, 0, 0, 0].tolist() == [[3.0, 1.0]] * 4
    else:
        new = cache_of(2, capacity=3)
        new.kv += 9
        new.place(0, 3)
        cache.admit(torch.tensor([0, 2]), new)
        assert owed(cache, 3) == {(11.0, 1, 1), (33.0, 3, 3)}
        assert cache.kv[0, :, 0, 0, 2, 0].tolist() == [9.0, 1.0, 9.0, 3.0]
