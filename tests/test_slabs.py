"""Programs of steps whose chunks lie together: what they stage, where, and that nothing is overwritten too early."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasp_coll import Schedule, plan
from tasp_coll.executor import Place, Program
from tasp_coll.reduce_programs import reduce_steps_program
from tasp_coll.reduction import reduction
from tasp_coll.slabs import accumulate_steps_program, gather_steps_program

ROW = 12  # bytes
KINDS = ("gather", "reverse", "donate", "accumulate", "fill")
every_kind = pytest.mark.parametrize("kind", KINDS)


def program_of(kind: str, schedule: Schedule, rank: int, rows: list[int]) -> Program:
    if kind == "accumulate":
        return accumulate_steps_program(schedule, rank, rows, ROW)
    if kind == "fill":
        return reduce_steps_program(schedule, rank, rows, ROW // 4, reduction("sum", "int32", schedule.ranks))
    return gather_steps_program(schedule, rank, rows, ROW, kind == "donate")


def schedule_of(kind: str, n: int, **options: Any) -> Schedule:
    collective = "reduce_scatter" if kind in ("accumulate", "fill") else "allgather"
    return plan(f"full_mesh:{n}", collective, reverse=kind == "reverse", **options)


@st.composite
def cases(draw: st.DrawFn, kind: str) -> tuple[Schedule, int, list[int]]:
    n = draw(st.integers(1, 5))
    most = 6 if n == 4 else max(n - 1, 1)
    options = [{"algorithm": "rings", "rings": k} for k in range(1, most + 1)] + [{"algorithm": "ring"}]
    if kind != "accumulate":
        options.append({"algorithm": "direct"})
    rows = draw(st.lists(st.sampled_from([0, 1, 5, 20, 33]), min_size=n, max_size=n))
    return schedule_of(kind, n, **draw(st.sampled_from(options))), draw(st.integers(0, n - 1)), rows


def ancestors(program: Program) -> list[int]:
    """Per node a bit for each node that is complete before it may start."""
    found, left = [0] * len(program.nodes), list(program.waits)
    ready = [index for index, waits in enumerate(left) if not waits]
    seen = 0
    while ready:
        index = ready.pop()
        seen += 1
        for follower in program.feeds[index]:
            found[follower] |= found[index] | 1 << index
            left[follower] -= 1
            if not left[follower]:
                ready.append(follower)
    assert seen == len(program.nodes), "a circle"
    return found


def overlap(a: Place, b: Place) -> bool:
    return a.region == b.region and a.offset < b.offset + b.nbytes and b.offset < a.offset + a.nbytes


def users_of(program: Program, place: Place) -> Iterator[int]:
    for index, node in enumerate(program.nodes):
        if node.place is not None and overlap(node.place, place):
            yield index


@every_kind
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_nothing_is_overwritten_too_early(kind: str, data: st.DataObject) -> None:
    """Two messages that share bytes, one of which writes them, never run together; nor does the caller's look."""
    schedule, rank, rows = data.draw(cases(kind))
    program = program_of(kind, schedule, rank, rows)
    before = ancestors(program)
    gate = "fill" if kind in ("accumulate", "fill") else "release"
    said = {index: name[1] for name, index in program.gates.items() if name[0] == gate}  # type: ignore[index]
    steps = {piece.place: step for step, pieces in enumerate(program.layout) for piece in pieces}
    for index, node in enumerate(program.nodes):
        if node.place is None or node.send:
            continue
        for other in users_of(program, node.place):
            assert other == index or before[index] >> other & 1 or before[other] >> index & 1
        if kind == "fill":
            continue
        for place, step in steps.items():
            if overlap(place, node.place) and step < node.step + 1:
                assert any(before[index] >> at & 1 and told >= step for at, told in said.items())


@pytest.mark.parametrize("kind", KINDS[:-1])
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_waits_only_go_back_in_steps(kind: str, data: st.DataObject) -> None:
    schedule, rank, rows = data.draw(cases(kind))
    program = program_of(kind, schedule, rank, rows)
    for index, node in enumerate(program.nodes):
        for follower in program.feeds[index]:
            after = program.nodes[follower]
            if after.place is not None and not after.send:
                assert node.step < after.step
            assert node.step <= after.step


@every_kind
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_steps_chunks_lie_together_in_order(kind: str, data: st.DataObject) -> None:
    schedule, rank, rows = data.draw(cases(kind))
    program = program_of(kind, schedule, rank, rows)
    for pieces, stretch in zip(program.layout, program.stretches, strict=True):
        assert stretch is not None
        assert list(pieces) == sorted(pieces)
        assert stretch.nbytes == ROW * sum(piece.stop - piece.start for piece in pieces)
        at = stretch.offset
        for piece in pieces:
            assert piece.place == (stretch.region, at, ROW * (piece.stop - piece.start))
            at += piece.place.nbytes
    assert tuple(tuple(piece[:4] for piece in pieces) for pieces in program.layout) == schedule.arrivals(rank, rows)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("rings", [1, None])
def test_staging_of_equal_shards(n: int, rings: int | None) -> None:
    """Two shards, one where `send` is given away, and as few as there are steps that need them."""
    shard = ROW * 16 * 60  # cut without remainder, and lines of the cache
    expected = {"gather": min(n - 1, 2), "reverse": min(n - 1, 2), "donate": min(n - 1, 1), "accumulate": min(n - 1, 2)}
    for kind, shards in expected.items():
        schedule = schedule_of(kind, n, algorithm="rings", rings=rings)
        for rank in range(n):
            assert program_of(kind, schedule, rank, [16 * 60] * n).stage_bytes == shards * shard, kind
    direct = gather_steps_program(schedule_of("gather", n, algorithm="direct"), 0, [16 * 60] * n, ROW)
    assert direct.stage_bytes == min(n - 1, 2) * shard


def test_a_donated_send_that_is_too_small_is_not_used() -> None:
    schedule, rows = plan("full_mesh:4", algorithm="ring"), [10, 40, 10, 40]
    regions = [
        {piece.place.region for pieces in program_of("donate", schedule, rank, rows).layout[2::2] for piece in pieces}
        for rank in range(4)
    ]
    assert sorted(rows[rank] for rank in range(4) if regions[rank] == {"send"}) in ([40, 40], [10, 10, 40, 40])
    uneven = [10, 40, 40, 10]
    ring = schedule.rings[0].ranks
    for at, rank in enumerate(ring):
        fits = uneven[ring[at - 2]] <= uneven[rank]
        found = program_of("donate", schedule, rank, uneven).layout[2]
        assert {piece.place.region for piece in found} == {"send" if fits else "stage"}


def test_the_last_sums_come_straight_into_recv() -> None:
    for rank in range(4):
        program = program_of("accumulate", plan("full_mesh:4", "reduce_scatter"), rank, [7] * 4)
        assert program.stretches[-1] == Place("recv", 0, 7 * ROW)
        assert all(stretch is not None and stretch.region == "stage" for stretch in program.stretches[:-1])
