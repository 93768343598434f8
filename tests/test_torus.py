"""Rings of tori: every link on one ring, for all small sides, and in thousands of ranks."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from itertools import product
from math import prod

import pytest

from tasp_coll import Topology, decompose, plan, ring_neighbours
from tasp_coll.decomposition import check_decomposition, decomposition_of
from tasp_coll.grids import arcs
from tasp_coll.hamilton import is_hamiltonian_cycle
from tasp_coll.rings import turned
from tasp_coll.torus import decompose_torus, hamiltonian_cycles, has_rings, largest_count

FLAT = [*product(range(3, 9), repeat=2), (3, 40), (31, 5), (16, 16)]
DEEP = [*product(range(3, 6), repeat=3), (3, 3, 3, 3), (8, 3, 6)]


@pytest.mark.parametrize("sides", [(4,), (7,), *FLAT, *DEEP], ids=str)
def test_every_link_is_on_one_ring(sides: tuple[int, ...]) -> None:
    n, cycles = prod(sides), hamiltonian_cycles(sides)
    assert len(cycles) == len(sides)
    assert all(is_hamiltonian_cycle(cycle, n) for cycle in cycles)
    rings = [ring for cycle in cycles for ring in (cycle, turned(cycle))]
    used = [src * n + dst for ring in rings for src, dst in zip(ring, ring[1:] + ring[:1], strict=True)]
    assert sorted(used) == arcs(sides).tolist()


@pytest.mark.parametrize("spec, count", [("torus:4x4", 4), ("torus:3x7", 4), ("torus:1x5", 2), ("torus:3x4x5", 6)])
def test_the_rings_are_proved_and_reach_the_bound(spec: str, count: int) -> None:
    topology = Topology.preset(spec)
    found = decomposition_of(topology)
    assert len(found.rings) == count
    assert found.reversible
    n = topology.ranks
    for rings in (found.rings, found.backward):
        check_decomposition(topology, rings)
    assert (n - 1) * found.share == Fraction(topology.allgather_bound(10**9)).limit_denominator(1000)
    for collective in ("allgather", "reduce_scatter"):
        schedule = plan(topology, collective)
        schedule.verify("replay")
        schedule.verify("structure")
        assert schedule.capacity_share == Fraction(1, count)


@pytest.mark.parametrize("rings", [1, 2, 3, 5, 6])
def test_some_of_them(rings: int) -> None:
    topology = Topology.preset("torus:3x3x4")
    found = decompose(topology, rings)
    assert len(found) == rings
    check_decomposition(topology, found, Fraction(1, rings))
    plan(topology, rings=rings).verify()


def test_neighbours() -> None:
    topology = Topology.preset("torus:3x4")
    for rank in range(12):
        near = ring_neighbours(topology, rank)
        assert sorted(after for _, after in near) == sorted(
            link.target for link in topology.links if link.source == rank
        )


def test_the_name_does_not_matter_and_rings_are_made_once() -> None:
    torus = Topology.preset("torus:5x4")
    other = Topology("another name", 20, (), torus.links)
    assert decompose(torus) is decompose(other)
    assert decompose_torus((5, 4), 4) is decompose_torus((5, 4), 4)


def test_sides_of_two_are_for_the_solver() -> None:
    assert has_rings((3, 4, 5))
    assert not has_rings((2, 4))
    assert largest_count((3, 4, 5)) == 6


def test_thousands_of_ranks() -> None:
    topology = Topology.preset("torus:12x14x16")
    found = decomposition_of(topology)
    assert len(found.rings) == 6
    check_decomposition(topology, found.rings)
    assert plan(topology).verify() == "structure"


def test_the_same_in_every_process() -> None:
    code = "from tasp_coll.torus import hamiltonian_cycles as h; print(hash((h((3, 5)), h((4, 3, 3)), h((6, 6)))))"
    here = hash((hamiltonian_cycles((3, 5)), hamiltonian_cycles((4, 3, 3)), hamiltonian_cycles((6, 6))))
    assert int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout) == here
