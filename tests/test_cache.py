"""The cache alone: where keys and values go, and debts that follow their rows."""

import torch

from nanoexit.cache import Cache


def cache_of(rows: int, capacity: int = 6) -> Cache:
    return Cache(4, rows, 2, capacity, 5, torch.device("cpu"), torch.float32)


def owe(cache: Cache, depth: int, row: int, position: int) -> None:
    """A residual that says whose it is."""
    h = torch.full((1, 3), 10.0 * row + position)
    cache.owe(depth, h, torch.tensor([row]), torch.tensor([position]))


def paid(cache: Cache, start: int, end: int) -> list[list[float]]:
    """What is paid, as (residual, row, position)."""
    due = cache.pay(start, end)
    return [] if due is None else sorted(torch.stack([due.h[:, 0], *due[1:]], 1).tolist())


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
    assert paid(cache, 0, 1) == [] and paid(cache, 1, 2) == [[3, 0, 3]]
    assert paid(cache, 1, 2) == [] and paid(cache, 2, 4) == [[3, 0, 3], [14, 1, 4]]
    assert not cache.debts


def test_debts_follow_their_rows():
    """Catches: a debt paid into the row that took the place of the one that left."""
    cache = cache_of(4)
    cache.kv += torch.arange(4.0).view(4, 1, 1, 1, 1)  # entries that say whose they are
    for row in range(4):
        owe(cache, 1 + row % 2, row, row)
    new = cache_of(2, capacity=3)
    new.kv += 9
    new.place(0, 3)
    cache.admit(torch.tensor([0, 2]), new)
    assert paid(cache, 2, 3) == [[11, 1, 1], [33, 3, 3]]
    cache.select(torch.tensor([3, 1, 0]))
    assert paid(cache, 3, 4) == [[11, 1, 1], [33, 0, 3]]
    assert cache.kv[:, :, 0, 0, 2, 0].tolist() == [[3, 1, 9]] * 4
