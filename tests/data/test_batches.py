"""The order is a bijection, a pure function of (seed, epoch), and no call's size shows in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siliconlm.data.batches import IGNORED, Batch, Batches, evaluation_windows, permuted
from siliconlm.data.shards import Shard, ShardWriter
from siliconlm.errors import SiliconError

Opener = Callable[[int], Shard]


@pytest.fixture(scope="module")
def shard_of(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """A shard of n tokens, token i being i, so that a window tells where it came from."""
    folder = tmp_path_factory.mktemp("shards")
    made: dict[int, Shard] = {}

    def open_shard(n: int) -> Shard:
        if n not in made:
            path = folder / f"{n}.bin"
            with ShardWriter(path, "uint32", "") as shard:
                shard.write(np.arange(n))
            made[n] = Shard.open(path)
        return made[n]

    return open_shard


def order(n: int, seed: int = 1, epoch: int = 0) -> np.ndarray:
    return permuted(np.arange(n, dtype=np.uint64), n, seed, epoch)


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4095, 4097, 65_537, 1_000_003])
def test_the_order_is_a_bijection(n: int) -> None:
    assert np.array_equal(np.sort(order(n)), np.arange(n))


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    assert np.array_equal(order(1000), order(1000))
    orders = [order(1000, seed, epoch).tobytes() for seed in (0, 1, 2, -1, 2**40) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


def test_the_order_of_a_part_is_a_part_of_the_order() -> None:
    index = np.array([5, 77, 999], dtype=np.uint64)
    assert np.array_equal(permuted(index, 1000, 3, 4), order(1000, 3, 4)[[5, 77, 999]])


def test_the_order_looks_random() -> None:
    n, epochs = 64, 2000
    orders = np.stack([order(n, 7, epoch) for epoch in range(epochs)]).astype(np.int64)
    # Every window comes first about equally often: chi-squared with 63 degrees of freedom, mean 63, deviation 11.
    counts = np.bincount(orders[:, 0], minlength=n)
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < 63 + 5 * 11
    # Neighbours follow each other as often as chance has it (about once an epoch).
    assert 0.8 < (np.diff(orders, axis=1) == 1).sum() / epochs < 1.2
    assert abs(np.corrcoef(np.arange(n), orders.mean(axis=0))[0, 1]) < 0.5


def whole(batch: Batch) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The sequences [N, T + 1] that inputs and targets were cut from."""
    assert np.array_equal(batch.inputs[:, 1:], batch.targets[:, :-1]) and batch.documents is None
    return np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)


def test_an_epoch_visits_every_window_once(shard_of: Opener) -> None:
    batches = Batches(shard_of(1003), 10, seed=5)
    for epoch in range(20):
        taken = whole(batches.take(epoch * batches.windows, batches.windows))
        assert taken.shape == (batches.windows, 11) and taken.dtype == np.int64
        starts = np.sort(taken[:, 0])
        assert np.array_equal(np.diff(starts), np.full(batches.windows - 1, 10))
        assert np.array_equal(taken, taken[:, :1] + np.arange(11))
        left_over = int(starts[0]) + 1003 - 11 - int(starts[-1])
        assert starts[0] >= 0 and 0 <= left_over < 20


def test_the_borders_move(shard_of: Opener) -> None:
    batches = Batches(shard_of(1003), 10, seed=5)
    first = [int(batches.take(epoch * batches.windows, batches.windows).inputs.min()) for epoch in range(200)]
    assert {start % 10 for start in first} == set(range(10))


@settings(max_examples=50, deadline=None)
@given(st.integers(12, 300), st.integers(0, 10_000), st.lists(st.integers(0, 40), max_size=6), st.integers())
def test_no_splitting_into_calls_shows(shard_of: Opener, n: int, cursor: int, sizes: list[int], seed: int) -> None:
    batches = Batches(shard_of(n), 10, seed)
    straight = whole(batches.take(cursor, sum(sizes)))
    parts = [whole(batches.take(cursor + sum(sizes[:index]), size)) for index, size in enumerate(sizes)]
    assert np.array_equal(straight, np.concatenate([np.empty((0, 11), dtype=np.int64), *parts]))


def test_seeds_differ(shard_of: Opener) -> None:
    first, second = (whole(Batches(shard_of(1003), 10, seed).take(0, 50)) for seed in (1, 2))
    assert not np.array_equal(first, second)


def test_a_shard_of_one_window(shard_of: Opener) -> None:
    batches = Batches(shard_of(11), 10, 1)
    assert batches.windows == 1
    assert np.array_equal(whole(batches.take(7, 3)), np.tile(np.arange(11), (3, 1)))


@pytest.mark.parametrize(
    ("count", "advice"), [(101, "=64,"), (256, "=128,"), (6, "=4,"), (3, "=2,"), (2, "Give"), (1, "Give")]
)
def test_a_context_that_is_too_long_says_what_fits(shard_of: Opener, count: int, advice: str) -> None:
    with pytest.raises(SiliconError, match=f"longer than the training data \\({count} tokens\\)") as caught:
        Batches(shard_of(count), 256, 1)
    assert advice in caught.value.fix
    if advice.startswith("="):
        Batches(shard_of(count), int(advice[1:-1]), 1)


# --- evaluation ------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 200), st.integers(1, 50), st.integers(1, 9))
def test_every_token_but_the_first_is_scored_once(shard_of: Opener, n: int, context: int, batch: int) -> None:
    found: Counter[int] = Counter()
    shapes = set()
    for part in evaluation_windows(shard_of(n), context, batch):
        inputs, targets = part.inputs, part.targets
        shapes.add((inputs.shape, targets.shape))
        scored = targets != IGNORED
        assert np.array_equal(inputs[scored] + 1, targets[scored])  # each is predicted from the token before it
        found.update(targets[scored].tolist())
    assert found == Counter(range(1, n))
    assert len(shapes) == 1 and shapes.pop()[0][0] <= batch


def test_a_limit_is_spread_over_the_shard(shard_of: Opener) -> None:
    def starts(limit: int | None) -> list[int]:
        found = evaluation_windows(shard_of(1001), 10, 4, limit)
        return [
            int(row[0])
            for part in found
            for row, scored in zip(part.inputs, part.targets, strict=True)
            if scored[0] > 0
        ]

    assert starts(None) == starts(100) == starts(1000) == list(range(0, 1000, 10))
    assert starts(5) == [100, 300, 500, 700, 900]
    assert len(set(starts(33))) == 33 and starts(33) == sorted(starts(33))


def test_a_shard_of_one_token_has_nothing_to_score(shard_of: Opener) -> None:
    assert list(evaluation_windows(shard_of(1), 8, 2)) == []
