"""The cut bound against brute force over all cuts, the table of known values, and its own closed forms."""

from __future__ import annotations

from fractions import Fraction
from itertools import chain, combinations, permutations, product
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_topologies import RATES, topologies
from tasp_coll.cutbound import allgather_bound_shares, bound_by_flows
from tasp_coll.links import Link, Node
from tasp_coll.nodes import nodes_of
from tasp_coll.topology import Topology

NIC = 50  # GB/s, the unit of the table's multi-node rows


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


@settings(max_examples=15, deadline=None)
@given(topologies(ranks=12, switches=1, density=3))
def test_bound_is_the_worst_of_all_cuts_of_larger_graphs(topology: Topology) -> None:
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


def equal_nodes(u: int, m: int, inside: float, nic: float, switched: bool, rails: bool) -> Topology:
    """Full meshes or switches of m ranks, on one fabric or on m rails."""
    ends: list[tuple[Node, Node, float]] = [(r, f"rail{r % m}" if rails else "fabric", nic) for r in range(u * m)]
    if switched:
        ends += [(r, f"node{r // m}", inside) for r in range(u * m)]
    links = [Link(a, b, rate) for p, q, rate in ends for a, b in ((p, q), (q, p))]
    if not switched:
        links += [Link(m * a + p, m * a + q, inside) for a in range(u) for p, q in permutations(range(m), 2)]
    switches = {end for link in links for end in (link.source, link.target) if isinstance(end, str)}
    return Topology("nodes", u * m, tuple(sorted(switches)), tuple(links))


@pytest.mark.parametrize("switched", [False, True])
@pytest.mark.parametrize("rails", [False, True])
@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_closed_form_of_nodes_is_the_worst_of_all_cuts(switched: bool, rails: bool, data: st.DataObject) -> None:
    u, m = data.draw(st.integers(2, 4)), data.draw(st.integers(2, 5))
    inside, nic = data.draw(RATES), data.draw(RATES)
    topology = equal_nodes(u, m, inside, nic, switched, rails)
    assert nodes_of(topology) is not None or inside <= nic
    assert allgather_bound_shares(topology) == bound_by_flows(topology)


def test_each_of_the_cuts_of_nodes_may_be_the_tightest() -> None:
    """One rank, one node, one rail."""
    cuts = {(9.0, 1.0): Fraction(2), (9.0, 8.0): Fraction(11, 17), (1.0, 9.0): Fraction(3)}
    for (inside, nic), expected in cuts.items():
        topology = equal_nodes(3, 4, inside, nic, switched=True, rails=True)
        assert allgather_bound_shares(topology) == bound_by_flows(topology) == expected


SMALL_TORI = [sides for count in (1, 2, 3) for sides in product(range(2, 10), repeat=count) if 3 < prod(sides) <= 36]


@pytest.mark.parametrize("sides", SMALL_TORI, ids=str)
def test_the_closed_form_of_tori_is_the_worst_of_all_cuts(sides: tuple[int, ...]) -> None:
    """Long and thin ones too."""
    torus = Topology.preset("torus:" + "x".join(map(str, (*sides, 1, 1)[: max(2, len(sides))])))
    assert allgather_bound_shares(torus) == bound_by_flows(torus)


@pytest.mark.parametrize("spec", ["cluster:512x8", "dgx_h100:512", "nvl72:56", "torus:16x16x16"])
def test_thousands_of_ranks_need_no_flows(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasp_coll.cutbound.bound_by_flows", None)
    topology = Topology.preset(spec)
    slowest = min(Fraction(str(link.GBps)) for link in topology.links)
    assert allgather_bound_shares(topology) >= (topology.ranks - 1) / (slowest * 20)


def test_hundreds_of_ranks_take_less_than_seconds() -> None:
    assert allgather_bound_shares(Topology.preset("torus:16x16")) == Fraction(255, 4)
    assert allgather_bound_shares(Topology.preset("cluster:32x8")) == Fraction(31) / NIC
