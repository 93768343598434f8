"""What is computed at each step: every pair that may be, once, in few kernel calls."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention.blocks import CAUSAL, FULL, TURNED, Band, Block, Task, band, count, local_blocks, merged, step_blocks
from attention.check import check_rank, check_work
from attention.partition import Partition
from tasp_coll import ScheduleError, plan


def replayed(parts: object, size: int) -> np.ndarray:
    seen = np.zeros((size, size), int)
    for kind, a, b, c, d in parts:  # type: ignore[attr-defined]
        for query in range(a, b):
            first = c + query - a if kind == TURNED else c
            last = c + query - a + 1 if kind == CAUSAL else d
            seen[query, first:last] += 1
    return seen


@given(st.data())
@settings(deadline=None, max_examples=150)
def test_a_band_is_cut_into_rectangles_and_triangles(data: st.DataObject) -> None:
    number = st.integers(0, 14)
    (a, b), (c, d) = (sorted(data.draw(st.tuples(number, number))) for _ in range(2))
    low = data.draw(st.none() | st.integers(-4, 4))
    high = data.draw(st.none() | st.integers(-4 if low is None else low, 9))
    distance = np.arange(15)[:, None] - np.arange(15)
    wanted = np.zeros((15, 15), int)
    wanted[a:b, c:d] = 1
    if low is not None:
        wanted[distance < low] = 0
    if high is not None:
        wanted[distance > high] = 0
    assert (replayed(band(Band(low, high), a, b, c, d), 15) == wanted).all()


def shares(ranks: int, rows: int) -> list[tuple[int, int]]:
    """A shard's rows cut into ranks - 1 chunks."""
    cuts = [rows * at // (ranks - 1) for at in range(ranks)]
    return list(pairwise(cuts))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
@pytest.mark.parametrize("total", [7, 64, 97])
@pytest.mark.parametrize("window", [None, 1, 17])
@pytest.mark.parametrize("causal", [True, False])
def test_every_pair_is_computed_once(ranks: int, total: int, window: int | None, causal: bool) -> None:
    for bounds in (None, (0, total // 5, total // 5 + 1, total), (*range(0, total, 3), total)):
        for reverse in (False, True):
            schedule = plan(f"full_mesh:{ranks}", "allgather", "rings", reverse=reverse)
            for stretch in (0.05, 1):
                check_work(total, schedule, is_causal=causal, cu_seqlens=bounds, window=window, stretch=stretch)


@pytest.mark.parametrize("ranks", [3, 4, 5, 8])
@pytest.mark.parametrize("algorithm", ["ring", "rings"])
def test_causal_work_is_even_at_every_step(ranks: int, algorithm: str) -> None:
    work = check_work(2 * ranks * (ranks - 1) * 6, plan(f"full_mesh:{ranks}", "allgather", algorithm))
    assert work.evenness == 1
    assert work.balance == 1
    assert work.pairs.shape == (ranks, ranks)


def test_causal_work_is_even_with_longer_chunks() -> None:
    work = check_work(4096, schedule := plan("full_mesh:8", "allgather", "rings"), stretch=1)
    assert {row.start % 16 for step in schedule.arrivals(1, [256] * 8, 16, 1) for row in step} == {0}
    assert work.evenness > 0.99
    assert work.balance == 1


def test_uneven_lengths_stay_nearly_even() -> None:
    work = check_work(997, plan("full_mesh:8", "allgather", "rings"))
    assert work.balance > 0.97
    packed = check_work(997, plan("full_mesh:8", "allgather", "rings"), cu_seqlens=(0, 100, 101, 350, 900, 997))
    assert packed.balance > 0.95


@pytest.mark.parametrize("total", [8 * 2 * 7 * 5, 997])
def test_two_kernel_calls_a_step(total: int) -> None:
    partition = Partition.of(total, 8, True)
    schedule = plan("full_mesh:8", "allgather", "rings")
    rows = [partition.rows(rank) for rank in range(8)]
    for rank in range(8):
        task = Task(partition, None, rank)
        assert [block.kind for block in local_blocks(task)] == [CAUSAL]
        for step in schedule.arrivals(rank, rows)[1:]:
            found = step_blocks(task, tuple((row.source, row.start, row.stop) for row in step))
            assert len(found) <= 2
            assert {block.kind for block in found} <= {FULL}
            rows_of = [row for block in found for row in range(block.rows.start, block.rows.stop)]
            assert len(set(rows_of)) == len(rows_of), "each query is in one call, and merged once"


def test_no_mask_is_one_call_a_step_without_a_copy() -> None:
    task = Task(Partition.of(997, 5, False), None, 2)
    (block,) = step_blocks(task, ((0, 3, 50), (3, 0, 60), (4, 150, 199)))
    assert block.kind == FULL
    assert block.keys == slice(0, 156, 1)


def test_a_window_is_computed_in_tiles() -> None:
    task = Task(Partition.of(4096, 1, True), 65, 0)
    assert sum(block.pairs for block in local_blocks(task)) == 65 * 4096 - 65 * 32
    assert len(local_blocks(task)) <= 8


def test_what_is_wrong_is_named() -> None:
    task = Task(Partition.of(64, 4, True), None, 1)
    rows = task.partition.rows(1)
    whole = [((source, 0, rows),) for source in (1, 0, 2, 3)]
    assert sum(check_rank(task, whole)) == task.allowed(task.partition.positions(1)).sum()
    with pytest.raises(ScheduleError, match=r"rank 1: query \d+ never sees key \d+"):
        check_rank(task, whole[:-1])
    with pytest.raises(ScheduleError, match="step 4, rank 1: a pair is computed that must not be, or again"):
        check_rank(task, [*whole, whole[1]])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 5)), min_size=1, max_size=5), st.integers(1, 3))
@settings(deadline=None)
def test_keys_are_merged_into_one_slice_where_they_lie_evenly(gaps: list[tuple[int, int]], stride: int) -> None:
    parts, at = [], 0
    for gap, tokens in gaps:
        parts.append(slice(at + gap, at + gap + (tokens - 1) * stride + 1, stride))
        at += gap + tokens * stride
    keys = merged(parts)
    wanted = [place for part in parts for place in range(part.start, part.stop, part.step)]
    found = list(range(keys.start, keys.stop, keys.step)) if isinstance(keys, slice) else list(keys)
    assert found == wanted
    assert count(keys) == len(wanted)


def test_pairs_of_tiles() -> None:
    assert Block(CAUSAL, slice(0, 12), slice(0, 12, 1), 3).pairs == 30
    assert Block(FULL, slice(2, 4), slice(0, 10, 2)).pairs == 10
