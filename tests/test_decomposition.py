"""decompose and ring_neighbours: rings that are even, disjoint where they can be, and the same from both."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasp_coll import decomposition, hamilton
from tasp_coll.decomposition import check_decomposition, decompose, ring_neighbours
from tasp_coll.errors import ArgumentError, ArgumentTypeError, ScheduleError, TopologyError
from tasp_coll.rings import Ring
from tasp_coll.topology import Topology

LARGEST = {1: 1, 2: 1, 4: 6, 6: 10}  # rings, where that is not n-1
DISJOINT = {4: 2, 6: 4}


def mesh(n: int) -> Topology:
    return Topology.preset(f"full_mesh:{n}")


def switch(n: int) -> Topology:
    return Topology.preset(f"nvswitch:{n}")


def largest(n: int) -> int:
    return LARGEST.get(n, n - 1)


def neighbours_by_ring(rings: tuple[Ring, ...], rank: int) -> tuple[tuple[int, int], ...]:
    return tuple(hamilton.cycle_neighbours(ring.ranks, rank) for ring in rings)


@pytest.mark.parametrize("n", [*range(1, 131), 258, 259, 260, 510, 513, 514])
def test_all_links_of_a_mesh_are_equally_loaded(n: int) -> None:
    rings = decompose(mesh(n))
    check_decomposition(mesh(n), rings)
    assert len(rings) == len(set(rings)) == largest(n)
    assert {ring.weight for ring in rings} == {Fraction(1, largest(n))}
    if n > 1:
        counts = hamilton.arc_counts([ring.ranks for ring in rings], n)
        assert set(counts[~np.eye(n, dtype=bool)]) == {2 if n in DISJOINT else 1}


def test_largest_mesh_is_checked_whole() -> None:
    rings = decompose(mesh(1026))
    assert len(rings) == 1025
    check_decomposition(mesh(1026), rings)


@pytest.mark.parametrize("n", range(1, 13))
@pytest.mark.parametrize("topology", [mesh, switch])
def test_any_number_of_rings(topology: Any, n: int) -> None:
    for k in range(1, largest(n) + 1):
        rings = decompose(topology(n), k)
        check_decomposition(topology(n), rings)
        assert len({ring.ranks for ring in rings}) == k
        assert {ring.weight for ring in rings} == {Fraction(1, k)}
        if n > 1:
            fewest = 1 if k <= DISJOINT.get(n, n - 1) else 2
            assert hamilton.arc_multiplicity([ring.ranks for ring in rings], n) == fewest
        assert rings == decompose(mesh(n), k)
        for rank in range(n):
            assert ring_neighbours(topology(n), rank, k) == neighbours_by_ring(rings, rank)


@given(st.integers(1, 400), st.data())
def test_neighbours_agree_with_the_rings(n: int, data: st.DataObject) -> None:
    k = data.draw(st.none() | st.integers(1, largest(n)))
    rank = data.draw(st.integers(0, n - 1))
    topology = data.draw(st.sampled_from([mesh, switch]))(n)
    assert ring_neighbours(topology, rank, k) == neighbours_by_ring(decompose(topology, k), rank)


@pytest.mark.parametrize("n", [1, 2, 4, 6, 7, 8, 64])
def test_one_ring_fills_a_switch(n: int) -> None:
    rings = decompose(switch(n))
    assert len(rings) == 1
    assert rings[0].weight == 1
    check_decomposition(switch(n), rings)
    assert len(ring_neighbours(switch(n), 0)) == 1


def test_only_the_rings_asked_for_are_built() -> None:
    assert len(decompose(mesh(50_000), 2)) == 2
    assert len(ring_neighbours(mesh(50_000), 7, 3)) == 3


def test_any_integer_counts_rings() -> None:
    assert decompose(mesh(8), np.int64(3)) == decompose(mesh(8), 3)
    assert ring_neighbours(mesh(8), np.int32(2)) == ring_neighbours(mesh(8), 2)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("topology", [mesh, switch])
def test_ring_count_out_of_range(topology: Any, n: int) -> None:
    for k in (-1, 0, largest(n) + 1):
        for call in (decompose, lambda t, k: ring_neighbours(t, 0, k)):
            with pytest.raises(ArgumentError, match=rf"^rings must be .* to {largest(n)} for {n} .*got {k}$"):
                call(topology(n), k)


@pytest.mark.parametrize("k", [True, False, 1.0, "2", (1,), np.bool_(True)])
def test_ring_count_of_a_wrong_kind(k: Any) -> None:
    with pytest.raises(ArgumentTypeError, match=r"^rings must be an integer from 1 to 7"):
        decompose(mesh(8), k)


@pytest.mark.parametrize("rank", [-1, 8, True, 0.0, None, "0"])
def test_wrong_rank(rank: Any) -> None:
    with pytest.raises(ArgumentError, match=r"^rank must be an integer from 0 to 7, got"):
        ring_neighbours(mesh(8), rank)


@pytest.mark.parametrize("spec", ["torus:4x4", "hypercube:3"])
def test_other_topologies_are_refused_by_name(spec: str) -> None:
    topology = Topology.preset(spec)
    for call in (
        lambda: decompose(topology),
        lambda: decompose(topology, 1),
        lambda: ring_neighbours(topology, 0),
    ):
        with pytest.raises(TopologyError, match=rf"'{spec}': only full meshes .* single switches"):
            call()


def test_mesh_with_a_dead_link_is_refused() -> None:
    with pytest.raises(TopologyError, match="full_mesh:8 without 0-1"):
        decompose(mesh(8).without_link(0, 1))


@given(st.permutations(range(7)), st.integers(1, 9))
def test_reversed_ring_swaps_the_neighbours(ranks: list[int], parts: int) -> None:
    ring = Ring(tuple(ranks), Fraction(1, parts))
    back = ring.reversed()
    assert back.reversed() == ring
    assert back.ranks[0] == ring.ranks[0]
    assert back.weight == ring.weight
    for rank in ranks:
        before, after = hamilton.cycle_neighbours(ring.ranks, rank)
        assert hamilton.cycle_neighbours(back.ranks, rank) == (after, before)


@given(st.integers(2, 12), st.integers(2, 6))
def test_reversed_decomposition_holds(n: int, k: int) -> None:
    rings = decompose(mesh(n), min(k, largest(n)))
    check_decomposition(mesh(n), tuple(ring.reversed() for ring in rings))


def test_check_names_a_broken_ring() -> None:
    rings = decompose(mesh(8))
    for ranks in ((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6, 6), (0, 1, 2, 3, 4, 5, 6, 8)):
        with pytest.raises(ScheduleError, match="each of the 8 ranks exactly once") as caught:
            check_decomposition(mesh(8), (*rings[:3], replace(rings[3], ranks=ranks), *rings[4:]))
        assert caught.value.ring == 3


@pytest.mark.parametrize("topology", [mesh, switch])
def test_check_adds_up_the_weights(topology: Any) -> None:
    rings = decompose(mesh(8))
    with pytest.raises(ScheduleError, match="6 rings must add up to 1, got 6/7"):
        check_decomposition(topology(8), rings[:-1])
    with pytest.raises(ScheduleError, match="0 rings must add up to 1, got 0"):
        check_decomposition(topology(8), ())
    idle = (replace(rings[0], weight=Fraction(1)), replace(rings[1], weight=Fraction(0)))
    with pytest.raises(ScheduleError, match="positive, got 0") as caught:
        check_decomposition(topology(8), idle)
    assert caught.value.ring == 1


@pytest.mark.parametrize(("n", "k"), [(8, 7), (9, 2), (4, 2), (6, 4), (6, 10)])
def test_check_finds_a_link_with_too_many_rings(n: int, k: int) -> None:
    rings = decompose(mesh(n), k)
    doubled = (*rings[:-1], rings[0])
    with pytest.raises(ScheduleError, match=r"link \d+ -> \d+ is on rings \[0, ") as caught:
        check_decomposition(mesh(n), doubled)
    assert caught.value.ring == k - 1
    check_decomposition(switch(n), doubled)  # behind a switch the rank's own link carries all the same


def test_equal_requests_share_a_result() -> None:
    decomposition._rings.cache_clear()
    assert decompose(mesh(9)) is decompose(mesh(9), 8) is decompose(switch(9), 8)
