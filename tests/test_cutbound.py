"""The cut bound against brute force over all cuts, the table of known values, and its own closed forms."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasp_coll.cutbound import allgather_bound_shares
from tasp_coll.links import Link, Node
from tasp_coll.topology import Topology

NIC = 50  # GB/s, the unit of the table's multi-node rows

RATES = st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0, 7.0, 450.0])


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Up to 5 ranks and 3 switches: a cycle through a random order of all nodes and any other links."""
    n = draw(st.integers(2, 5))
    nodes: list[Node] = [*range(n), *(f"s{i}" for i in range(draw(st.integers(0, 7 - n))))]
    order = draw(st.permutations(nodes))
    arcs = set(zip(order, [*order[1:], order[0]], strict=True))
    arcs |= draw(st.sets(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes)), max_size=20))
    links = [Link(u, v, draw(RATES)) for u, v in sorted(arcs, key=str) if u != v]
    return Topology("random", n, tuple(nodes[n:]), tuple(links))  # type: ignore[arg-type]


def every_cut(topology: Topology) -> Fraction:
    """T* by its definition."""
    nodes: list[Node] = [*range(topology.ranks), *topology.switches]
    worst = Fraction(0)
    for inside in map(set, chain.from_iterable(combinations(nodes, size) for size in range(1, len(nodes)))):
        held = sum(rank in inside for rank in range(topology.ranks))
        leaving = [link for link in topology.links if link.source in inside and link.target not in inside]
        if 0 < held < topology.ranks:
            worst = max(worst, Fraction(held) / sum((Fraction(str(link.GBps)) for link in leaving), Fraction(0)))
    return worst


@given(topologies())
def test_bound_is_the_worst_of_all_cuts(topology: Topology) -> None:
    assert allgather_bound_shares(topology) == every_cut(topology)


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("full_mesh:8", Fraction(1)),
        ("nvswitch:8", Fraction(7, 450)),
        ("mi300x", Fraction(1, 64)),
        ("dgx_h100:2", Fraction(3, 2) / NIC),
        ("dgx_h100:4", Fraction(31, 10) / NIC),
        ("cluster:2x4", Fraction(1) / NIC),
        ("torus:4x4", Fraction(15, 4)),
        ("torus:3x5", Fraction(14, 4)),
        ("hypercube:3", Fraction(7, 3)),
        ("hypercube:6", Fraction(63, 6)),
        ("full_mesh:4098", Fraction(1)),
        ("nvswitch:1026", Fraction(1025, 450)),
        ("full_mesh:1", Fraction(0)),
        ("nvswitch:1", Fraction(0)),
    ],
)
def test_known_values(spec: str, expected: Fraction) -> None:
    assert allgather_bound_shares(Topology.preset(spec)) == expected


@pytest.mark.parametrize("n", [4, 8, 13])
def test_a_dead_link_of_a_mesh_costs_one_link_of_a_rank(n: int) -> None:
    dead = Topology.preset(f"full_mesh:{n}").without_link(1, n - 1)
    assert allgather_bound_shares(dead) == Fraction(n - 1, n - 2)


@pytest.mark.parametrize("spec", ["full_mesh:2", "full_mesh:9", "nvswitch:2", "nvswitch:9", "mi300x"])
def test_closed_forms_agree_with_flows(spec: str) -> None:
    plain = Topology.preset(spec)
    # A switch that nothing is linked to changes no cut, and makes the topology irregular.
    odd = Topology("odd", plain.ranks, (*plain.switches, "unused"), tuple(plain.links))
    assert not odd.is_full_mesh
    assert not odd.is_single_switch
    assert allgather_bound_shares(odd) == allgather_bound_shares(plain)


@given(topologies())
def test_four_times_the_rates_take_a_quarter_of_the_time(topology: Topology) -> None:
    links = tuple(Link(link.source, link.target, 4 * link.GBps) for link in topology.links)
    faster = Topology("faster", topology.ranks, topology.switches, links)
    assert allgather_bound_shares(faster) == allgather_bound_shares(topology) / 4


def test_measured_rates_stay_exact() -> None:
    """Decimals that no float holds, some 15 digits long, do not blur the bound."""
    rates = [0.957123456789012, 0.1, 1e-05, 123456.789]
    links = [Link(rank, (rank + 1) % 4, rate) for rank, rate in enumerate(rates)]
    assert allgather_bound_shares(Topology("ring", 4, (), tuple(links))) == 3 * 10**5


def test_hundreds_of_ranks_take_less_than_seconds() -> None:
    assert allgather_bound_shares(Topology.preset("torus:16x16")) == Fraction(255, 4)
    assert allgather_bound_shares(Topology.preset("cluster:32x8")) == Fraction(31) / NIC
