"""Whole documents in rows of one length: nothing lost, nothing twice, and masks where they belong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siliconlm.data.batches import IGNORED
from siliconlm.data.packing import Packed, best_fit
from siliconlm.data.shards import Shard, ShardWriter

EOS = 0
Opener = Callable[[list[int], str], Shard]


@pytest.fixture(scope="module")
def shard_of(tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """A shard with the given tokens."""

    def open_shard(tokens: list[int], dtype: str = "uint16") -> Shard:
        path: Path = tmp_path_factory.mktemp("shard") / "train.bin"
        with ShardWriter(path, dtype, "t") as writer:
            writer.write(np.array(tokens))
        return Shard.open(path)

    return open_shard


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=60))
def test_best_fit_uses_every_piece_once_and_overfills_no_row(lengths: list[int]) -> None:
    order, rows = best_fit(np.array(lengths), 20)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    filled = [sum(lengths[n] for n in order[rows[i] : rows[i + 1]]) for i in range(len(rows) - 1)]
    assert sum(filled) == sum(lengths) and min(filled) > 0 and max(filled) <= 20
    assert len(filled) <= 11 / 9 * -(-sum(lengths) // 20) + 1 + len([n for n in lengths if n > 10])  # Johnson 1973


def test_best_fit_takes_the_fullest_row_that_holds_a_piece() -> None:
    order, rows = best_fit(np.array([3, 6, 5, 4, 2]), 10)
    packed = [sorted(order[rows[i] : rows[i + 1]].tolist()) for i in range(len(rows) - 1)]
    assert packed == [[1, 3], [0, 2, 4]]  # 6 + 4, then 5 + 3 + 2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 25), min_size=1, max_size=20), st.integers(4, 16), st.integers(0, 99))
def test_an_epoch_learns_every_token_of_a_text_once(
    shard_of: Opener, sizes: list[int], context: int, seed: int
) -> None:
    tokens = [token for size in sizes for token in (EOS, *range(1, size + 1))]
    packed = Packed.of(shard_of(tokens, "uint16"), context, seed, EOS)
    batch = packed.take(3 * packed.windows, packed.windows)
    learned = Counter(batch.targets[batch.targets != IGNORED].tolist())
    assert learned == Counter([*tokens[1:], EOS])  # the first separator follows nothing; the last document ends, too
    seen = batch.targets != IGNORED
    assert np.all((batch.targets == batch.inputs + 1)[seen] | (batch.targets == EOS)[seen])
    assert batch.documents is not None and np.all(batch.documents[~seen] == -1)


def test_documents_of_a_row_are_numbered(shard_of: Opener) -> None:
    packed = Packed.of(shard_of([EOS, 1, 2, EOS, 3, EOS, 4, 5, 6], "uint16"), 9, 1, EOS)
    batch = packed.take(0, 1)
    assert batch.documents is not None
    rows = {int(number): batch.inputs[batch.documents == number].tolist() for number in np.unique(batch.documents)}
    assert sorted(rows.values()) == [[EOS, 1, 2], [EOS, 3], [EOS, 4, 5, 6]]


def test_of_conversations_only_marked_tokens_are_learned(shard_of: Opener) -> None:
    tokens, mask = [EOS, 7, 8, 9, 10, EOS, 5, 6], [0, 0, 0, 1, 1, 0, 0, 1]
    packed = Packed.of(shard_of(tokens, "uint16"), 8, 1, EOS, shard_of(mask, "uint8"))
    batch = packed.take(0, 1)
    assert batch.inputs.tolist() == [[7, 8, 9, 10, 5, 6, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 9, 10, IGNORED, 6, IGNORED, IGNORED, IGNORED]]
    assert batch.learned == 3 and packed.cut == 0


def test_a_conversation_that_is_too_long_loses_its_end_and_is_counted(shard_of: Opener) -> None:
    packed = Packed.of(shard_of([EOS, *range(1, 9)], "uint16"), 5, 1, EOS, shard_of([0] * 4 + [1] * 5, "uint8"))
    assert packed.cut == 1 and packed.take(0, 1).inputs.tolist() == [[1, 2, 3, 4, 5]]


def test_no_splitting_into_calls_shows(shard_of: Opener) -> None:
    tokens = [token for size in range(1, 12) for token in (EOS, *range(1, size + 1))]
    packed = Packed.of(shard_of(tokens, "uint16"), 12, 4, EOS)
    whole = packed.take(5, 20)
    parts = [packed.take(5 + at, 4) for at in range(0, 20, 4)]
    assert np.array_equal(whole.inputs, np.concatenate([part.inputs for part in parts]))
    assert np.array_equal(whole.targets, np.concatenate([part.targets for part in parts]))


def test_an_evaluation_sees_every_row_once_in_batches_of_one_shape(shard_of: Opener) -> None:
    tokens = [token for size in range(1, 12) for token in (EOS, *range(1, size + 1))]
    packed = Packed.of(shard_of(tokens, "uint16"), 12, 4, EOS)
    batches = list(packed.evaluation(3))
    assert {batch.inputs.shape for batch in batches} == {(3, 12)}
    assert sum(batch.learned for batch in batches) == len(tokens)
