"""Who holds which tokens: all of them, once, evenly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.partition import Partition


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    total, ranks = draw(st.integers(0, 200)), draw(st.integers(1, 9))
    bounds = draw(st.none() | st.lists(st.integers(0, total), max_size=12).map(lambda cuts: sorted([0, *cuts, total])))
    return Partition.of(total, ranks, draw(st.booleans()), bounds)


@given(partitions())
@settings(deadline=None)
def test_every_token_is_on_one_rank_in_ascending_order(partition: Partition) -> None:
    held = [partition.positions(rank) for rank in range(partition.ranks)]
    assert all((np.diff(positions) > 0).all() for positions in held)
    assert sorted(np.concatenate(held)) == list(range(partition.total))
    assert partition.lengths == tuple(map(len, held))
    assert (partition.order[partition.inverse] == np.arange(partition.total)).all()


@given(partitions())
@settings(deadline=None)
def test_ranks_hold_equally_many(partition: Partition) -> None:
    """Of one document at most two tokens more, one more for the odd one; of many they even out."""
    assert max(partition.lengths) - min(partition.lengths) <= 3


@given(partitions(), st.data())
@settings(deadline=None)
def test_rows_on_the_wire_hold_each_token_once(partition: Partition, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, partition.ranks - 1))
    wire = partition.wire(rank)
    assert len(wire) == partition.rows(rank)
    assert sorted(wire[wire >= 0]) == list(range(partition.lengths[rank]))
    start = data.draw(st.integers(0, len(wire)))
    stop = data.draw(st.integers(start, len(wire)))
    cut, positions = wire[start:stop].reshape(-1), partition.positions(rank)
    found = []
    for segment, at in partition.pieces(rank, start, stop):
        tokens = cut[at :: partition.width][: segment.tokens]
        assert list(positions[tokens]) == list(range(segment.start, segment.stop))
        found += list(tokens)
    assert sorted(found) == sorted(cut[cut >= 0])


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_zigzag(ranks: int) -> None:
    """A rank holds the j-th of 2n pieces, and the j-th from the end."""
    partition = Partition.of(8 * ranks, ranks, True)
    for rank in range(ranks):
        front, back = range(4 * rank, 4 * rank + 4), range(8 * ranks - 4 * rank - 4, 8 * ranks - 4 * rank)
        assert list(partition.positions(rank)) == [*front, *back]


def test_without_a_mask_tokens_stay_together() -> None:
    partition = Partition.of(17, 4, False)
    assert [list(partition.positions(rank))[::3] for rank in range(4)] == [[0, 3], [4, 7], [8, 11], [12, 15]]


def test_pairs_need_no_filling_but_at_an_odd_length() -> None:
    for total in range(64):
        partition = Partition.of(total, 4, True)
        spare = sum((partition.wire(rank) < 0).sum() for rank in range(4))
        assert spare == total % 2


def test_many_short_documents_even_out() -> None:
    partition = Partition.of(101, 5, True, range(102))
    assert max(partition.lengths) - min(partition.lengths) == 1
