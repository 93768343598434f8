"""Cycle constructions: the properties that make them decompositions, at every size a test can afford."""

from __future__ import annotations

from itertools import chain, combinations, pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasp_coll import hamilton
from tasp_coll.errors import ArgumentError, ScheduleError
from tasp_coll.hamilton import (
    arc_counts,
    arc_multiplicity,
    are_arc_disjoint,
    cycle_neighbours,
    directed_cycles,
    double_cover,
    is_hamiltonian_cycle,
    max_disjoint,
    neighbours,
)

EXCEPTIONS = (4, 6)
SMALL = [n for n in range(2, 131) if n not in EXCEPTIONS]
LARGE = [*range(258, 261), *range(510, 515), 1026]


def arcs(cycle: tuple[int, ...]) -> set[tuple[int, int]]:
    return set(zip(cycle, cycle[1:] + cycle[:1], strict=True))


def sizes(largest: int) -> st.SearchStrategy[int]:
    return st.integers(2, largest).filter(lambda n: n not in EXCEPTIONS)


@pytest.mark.parametrize("n", SMALL + LARGE)
def test_cycles_decompose_the_complete_digraph(n: int) -> None:
    cycles = directed_cycles(n)
    assert len(cycles) == n - 1 == max_disjoint(n)
    assert all(is_hamiltonian_cycle(cycle, n) for cycle in cycles)
    counts = arc_counts(cycles, n)
    assert counts.sum() == n * (n - 1)
    assert counts.trace() == 0
    assert are_arc_disjoint(cycles, n)


@given(sizes(300), st.data())
def test_first_cycles_are_a_prefix(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n - 1))
    assert directed_cycles(n, count) == directed_cycles(n)[:count]


@pytest.mark.parametrize("n", [n for n in SMALL if n < 60])
def test_neighbours_agree_with_the_cycles(n: int) -> None:
    cycles = directed_cycles(n)
    for vertex in range(n):
        assert neighbours(n, vertex) == [cycle_neighbours(cycle, vertex) for cycle in cycles]


@given(sizes(600), st.data())
def test_neighbours_agree_with_the_first_cycles(n: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, n - 1))
    vertex = data.draw(st.integers(0, n - 1))
    expected = [cycle_neighbours(cycle, vertex) for cycle in directed_cycles(n, count)]
    assert neighbours(n, vertex, count) == expected


@pytest.mark.parametrize("n", [4095, 4096, 4097, 4098])
def test_neighbours_of_a_large_mesh_are_all_others(n: int) -> None:
    for vertex in (0, 1, n // 2, n - 2, n - 1):
        others = set(range(n)) - {vertex}
        before, after = zip(*neighbours(n, vertex), strict=True)
        assert len(before) == n - 1
        assert set(before) == others == set(after)


def test_prefix_of_an_even_mesh_does_not_build_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamilton, "_last_cycle", lambda n: pytest.fail("the last cycle was not asked for"))
    assert len(neighbours(1026, 3, 1024)) == 1024
    assert len(directed_cycles(1026, 1)) == 1


@pytest.mark.parametrize("n", EXCEPTIONS)
def test_double_cover_uses_every_arc_twice(n: int) -> None:
    cover = double_cover(n)
    assert len(cover) == len(set(cover)) == 2 * (n - 1)
    assert all(cycle[0] == 0 and is_hamiltonian_cycle(cycle, n) for cycle in cover)
    counts = arc_counts(cover, n)
    assert all(counts[a, b] == (0 if a == b else 2) for a in range(n) for b in range(n))
    assert are_arc_disjoint(cover[: max_disjoint(n)], n)


@pytest.mark.parametrize("n", EXCEPTIONS)
def test_exceptions_have_no_more_disjoint_cycles(n: int) -> None:
    """Exhaustive: of all directed Hamiltonian cycles, no n-1 are arc-disjoint."""
    cycles = [arcs((0, *rest)) for rest in permutations(range(1, n))]

    def extends(used: set[tuple[int, int]], chosen: int) -> bool:
        # The next cycle leaves 0 for the next head, so that each set of cycles is tried in one order only.
        if chosen == n - 1:
            return True
        free = (c for c in cycles if (0, chosen + 1) in c and not c & used)
        return any(extends(used | cycle, chosen + 1) for cycle in free)

    assert not extends(set(), 0)


@pytest.mark.parametrize("n", EXCEPTIONS)
def test_exceptions_are_refused_with_the_reason(n: int) -> None:
    for call in (lambda: directed_cycles(n), lambda: neighbours(n, 0), lambda: directed_cycles(n, 1)):
        with pytest.raises(ArgumentError, match=rf"only {n - 2} of {n - 1} arc-disjoint"):
            call()


@pytest.mark.parametrize("n", [-1, 0, 1])
def test_too_few_vertices(n: int) -> None:
    with pytest.raises(ArgumentError, match=rf"n must be at least 2.*got {n}"):
        directed_cycles(n)


@pytest.mark.parametrize("count", [-1, 0, 8])
def test_count_out_of_range(count: int) -> None:
    with pytest.raises(ArgumentError, match=rf"count must be in 1\.\.7.*got {count}"):
        directed_cycles(8, count)


@pytest.mark.parametrize("vertex", [-1, 8])
def test_vertex_out_of_range(vertex: int) -> None:
    with pytest.raises(ArgumentError, match=rf"vertex must be in 0\.\.7.*got {vertex}"):
        neighbours(8, vertex)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 12])
def test_double_cover_is_for_the_exceptions(n: int) -> None:
    with pytest.raises(ArgumentError, match=rf"n must be 4 or 6.*got {n}"):
        double_cover(n)


@pytest.mark.parametrize("n", [8, 10, 24, 26])
def test_wrong_detours_are_caught(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    detours = hamilton._detours(n)
    detours[1] = detours[1] % (n - 2) + 1
    monkeypatch.setattr(hamilton, "_detours", lambda n: detours)
    for call in (lambda: directed_cycles(n), lambda: neighbours(n, 0)):
        with pytest.raises(ScheduleError, match=f"Hamiltonian path on {n - 1} vertices"):
            call()


@pytest.mark.parametrize(
    ("tails", "heads"),
    [
        ([0, 1, 2], [1, 2, 0]),  # a cycle and a vertex alone
        ([0, 1, 3], [1, 0, 2]),  # a cycle and a path
        ([0, 0, 1], [1, 2, 3]),  # a fork
        ([0, 1, 2], [3, 3, 3]),  # a sink
    ],
)
def test_arcs_that_form_no_path_are_refused(tails: list[int], heads: list[int]) -> None:
    with pytest.raises(ScheduleError, match="Hamiltonian path on 4 vertices"):
        hamilton._hamiltonian_path(tails, heads)


@given(st.permutations(range(9)))
def test_arcs_of_a_path_are_put_in_order(path: list[int]) -> None:
    links = sorted(pairwise(path))
    assert hamilton._hamiltonian_path([a for a, _ in links], [b for _, b in links]) == path


@pytest.mark.parametrize("cycle", [(0, 1), (0, 1, 1), (0, 1, 3), (0, 1, 2, 2), (-1, 0, 1), ()])
def test_not_a_hamiltonian_cycle(cycle: tuple[int, ...]) -> None:
    assert not is_hamiltonian_cycle(cycle, 3)


@given(st.integers(2, 12), st.data())
def test_predicates_agree_with_sets_of_arcs(n: int, data: st.DataObject) -> None:
    cycles = [tuple(c) for c in data.draw(st.lists(st.permutations(range(n)), max_size=5))]
    found = list(chain.from_iterable(map(arcs, cycles)))
    assert arc_multiplicity(cycles, n) == max(map(found.count, found), default=0)
    disjoint = all(not arcs(a) & arcs(b) for a, b in combinations(cycles, 2))
    assert are_arc_disjoint(cycles, n) == disjoint


def test_counting_refuses_what_it_cannot_count() -> None:
    with pytest.raises(ArgumentError, match="n = 3 vertices each, got one of 2"):
        arc_counts([(0, 1, 2), (0, 1)], 3)
    for stray in (-1, 3):
        with pytest.raises(ArgumentError, match=r"vertices in 0\.\.2, got"):
            arc_multiplicity([(0, 1, stray)], 3)
