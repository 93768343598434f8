"""Rings of any topology: what is packed, how near it comes to what links allow, and what holds without a solver."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from itertools import chain, combinations
from time import perf_counter

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from random_topologies import topologies
from tasp_coll import (
    ArgumentError,
    Link,
    Ring,
    ScheduleError,
    Topology,
    TopologyError,
    decompose,
    plan,
    ring_neighbours,
)
from tasp_coll.decomposition import check_decomposition, decomposition_of
from tasp_coll.hamilton import cycle_neighbours, is_hamiltonian_cycle
from tasp_coll.hops import Hops, hops_of
from tasp_coll.packing import LARGEST, largest_count, pack_all
from tasp_coll.single_ring import single_ring
from test_two_level import rail_cluster

slow = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
COLLECTIVES = ("allgather", "reduce_scatter", "allreduce")


def preset(spec: str, *dead: tuple[int, int]) -> Topology:
    topology = Topology.preset(spec)
    for pair in dead:
        topology = topology.without_link(*pair)
    return topology


def uneven(topology: Topology, *factors: float, both_ways: bool = True) -> Topology:
    """Rates times the factors in turn."""
    links: list[Link] = []
    for number, link in enumerate(topology.links):
        ends = {link.source, link.target} if both_ways else number
        place = sum(hash_free(end) for end in sorted(map(str, ends))) if both_ways else number
        links.append(Link(link.source, link.target, round(link.GBps * factors[place % len(factors)], 4)))
    return Topology(f"uneven {topology.name}", topology.ranks, topology.switches, tuple(links))


def hash_free(text: str) -> int:
    return sum(map(ord, text))


def slow_nics(spec: str, *ranks: int) -> Topology:
    topology = Topology.preset(spec)
    slow = {(rank, "fabric") for rank in ranks} | {("fabric", rank) for rank in ranks}
    links = [Link(u, v, 40.0 if (u, v) in slow else rate) for u, v, rate in map(ends, topology.links)]
    return Topology(f"slow NICs in {spec}", topology.ranks, topology.switches, tuple(links))


def ends(link: Link) -> tuple[int | str, int | str, float]:
    return link.source, link.target, link.GBps


def seconds(topology: Topology, share: Fraction) -> Fraction:
    """What an allgather of 1 GB takes in steps of that share."""
    return (topology.ranks - 1) * share / Fraction(str(max(link.GBps for link in topology.links)))


def needs_solver() -> None:
    pytest.importorskip("ortools", reason="ortools is not installed: pip install 'tasp-coll[solver]'")


# --- what is reached


@pytest.mark.parametrize(
    ("topology", "rings", "known"),
    [
        (preset("torus:4x4"), 4, Fraction(15, 4)),
        (preset("torus:3x5"), 4, Fraction(14, 4)),
        (preset("torus:2x3"), 6, Fraction(5, 3)),
        (preset("torus:1x5"), 2, Fraction(2)),
        (preset("torus:8x8"), 4, Fraction(63, 4)),
        (preset("hypercube:1"), 1, Fraction(1)),
        (preset("hypercube:2"), 2, Fraction(3, 2)),
        (preset("hypercube:3"), 6, Fraction(7, 3)),
        (preset("hypercube:4"), 4, Fraction(15, 4)),
        (preset("hypercube:6"), 6, Fraction(63, 6)),
        (preset("full_mesh:3", (0, 1)), 1, Fraction(2)),
        (preset("full_mesh:4", (0, 1)), 2, Fraction(3, 2)),
        (preset("full_mesh:6", (4, 5)), 4, Fraction(5, 4)),
        (preset("full_mesh:8", (0, 1)), 6, Fraction(7, 6)),
        (preset("full_mesh:8", (0, 1), (2, 3)), 6, Fraction(7, 6)),
        (preset("full_mesh:12", (3, 7)), 10, Fraction(11, 10)),
        (preset("torus:4x4", (0, 1)), 3, Fraction(5)),
    ],
    ids=lambda value: value.name if isinstance(value, Topology) else "",
)
def test_the_cut_bound_is_reached(topology: Topology, rings: int, known: Fraction) -> None:
    needs_solver()
    begun = perf_counter()
    found = decomposition_of(topology)
    assert perf_counter() - begun < 20  # a second or so where nothing else runs
    assert len(found.rings) == rings
    assert {ring.weight for ring in found.rings} == {Fraction(1, rings)}
    assert seconds(topology, found.share) == known
    assert float(known) == topology.allgather_bound(10**9)
    check_decomposition(topology, found.rings)
    assert found.reversible
    check_decomposition(topology, tuple(ring.reversed() for ring in found.rings))


@pytest.mark.parametrize("spec", ["torus:4x4", "torus:3x5", "torus:8x8"])
def test_the_solver_finds_rings_of_tori_too(spec: str) -> None:
    """They have closed forms, which it knows nothing of."""
    needs_solver()
    topology = Topology.preset(spec)
    found = pack_all(topology)
    assert found.share == Fraction(1, 4)
    check_decomposition(topology, found.rings, found.share)


UNEVEN = [
    slow_nics("cluster:2x4", 0),
    slow_nics("cluster:2x4", 0, 5),
    slow_nics("cluster:3x4", 0, 5, 6),
    slow_nics("dgx_h100:2", 3),
    preset("cluster:4x4", (0, 1)),
    preset("cluster:8x8", (9, 12)),
    uneven(Topology.preset("full_mesh:8"), 1.0, 0.995, 0.991),
    uneven(Topology.preset("full_mesh:6"), 1.0, 0.9, 0.8, 0.95),
    uneven(Topology.preset("torus:4x4"), 1.0, 0.98, 0.99),
    uneven(Topology.preset("torus:4x4"), 1.0, 0.9, 0.8),
    uneven(Topology.preset("torus:4x4"), 1.0, 0.9, 0.8, both_ways=False),
    uneven(Topology.preset("nvswitch:6"), 1.0, 0.9),
    uneven(Topology.preset("dgx_h100:2"), 1.0, 0.99, 0.98),
]


@pytest.mark.parametrize("topology", UNEVEN, ids=lambda topology: topology.name)
def test_weights_follow_unequal_links(topology: Topology) -> None:
    """Within 3% of the narrowest cut, which no rings can beat; chunks are as large as their ring is wide."""
    needs_solver()
    found = decomposition_of(topology)
    check_decomposition(topology, found.rings)
    hops = Hops(topology)
    width = hops.highest / found.share
    assert Fraction(95, 100) <= width / hops.width_bound <= 1
    assert len(found.rings) <= largest_count(topology.ranks)
    for collective in COLLECTIVES:
        schedule = plan(topology, collective)
        schedule.verify("replay")
        schedule.verify("structure")


def test_small_differences_of_rate_need_no_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured rates are never equal."""
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    for spec in ("full_mesh:8", "full_mesh:6", "nvswitch:8", "cluster:2x4", "cluster:3x3", "dgx_h100:2"):
        topology = uneven(Topology.preset(spec), 1.0, 0.997, 0.993, 0.999, both_ways=False)
        found = pack_all(topology)
        check_decomposition(topology, found.rings, found.share)
        assert found.reversible
        even = decomposition_of(Topology.preset(spec))
        assert even.share <= found.share <= even.share * Fraction(102, 100)


@pytest.mark.parametrize("share", [0.1, 0.0])
@pytest.mark.parametrize("spec", ["cluster:2x4", "dgx_h100:2", "cluster:34x8"])
def test_a_slow_or_dead_nic_costs_its_node_one_nic(spec: str, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And needs no solver on more ranks than it takes."""
    topology = with_nic(Topology.preset(spec), 3, share)
    if topology.ranks > LARGEST:
        monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    found, whole = pack_all(topology), decomposition_of(Topology.preset(spec))
    check_decomposition(topology, found.rings, found.share)
    per_node = 4 if spec == "cluster:2x4" else 8
    lost = 1 - whole.share / found.share
    assert (1 - share) / per_node * 0.98 <= lost <= (1 - share) / per_node * 2, "the narrowest cut, and two rings"


def with_nic(topology: Topology, rank: int, share: float) -> Topology:
    """The NIC of a rank has this share of its rate."""
    nic = {rank, "fabric"}
    links = [
        replace(link, GBps=link.GBps * share) if {link.source, link.target} == nic else link
        for link in topology.links
        if share or {link.source, link.target} != nic
    ]
    return Topology("a bad NIC", topology.ranks, topology.switches, tuple(links))


def test_directions_that_differ_keep_to_the_rings_that_fit() -> None:
    needs_solver()
    links = [Link(rank, (rank + 1) % 5, 4.0) for rank in range(5)] + [Link(rank, rank - 1, 1.0) for rank in range(1, 5)]
    topology = Topology("one way", 5, (), (*links, Link(0, 4, 1.0)))
    found = decomposition_of(topology)
    assert not found.reversible
    assert [ring.weight for ring in found.rings] == [Fraction(4, 5), Fraction(1, 5)]
    for collective in COLLECTIVES:
        schedule = plan(topology, collective)
        assert schedule.capacity_share == Fraction(4, 5)
        schedule.verify("replay")
        schedule.verify("structure")
    # Its transfers are the mirror image of the reduce-scatter's.
    backward, reduction = plan(topology, reverse=True), plan(topology, "reduce_scatter")
    backward.verify()
    links_used = [{(t.src, t.dst, t.ring) for t in schedule.steps[0]} for schedule in (backward, reduction)]
    assert links_used[0] == links_used[1]


def test_hops_lead_through_ranks_only_where_they_must() -> None:
    star = Topology("star", 4, (), tuple(Link(u, v, 1.0) for a in (1, 2, 3) for u, v in ((0, a), (a, 0))))
    for algorithm in ("ring", "rings"):
        schedule = plan(star, "allreduce", algorithm)
        schedule.verify("replay")
        assert len(schedule.rings) == 1
        assert schedule.capacity_share == 1  # each leaf has one link, and the centre is passed three times
    mixed = Topology.preset("torus:3x3")
    assert all(len(Hops(mixed).route(hop)) == 1 for ring in decompose(mixed, 1) for hop in hops_of(ring.ranks))


def test_rails_that_no_closed_form_keeps_to() -> None:
    """Three nodes of 2: each node swaps the rails, and three swaps do not cancel."""
    needs_solver()
    topology = rail_cluster(3, 2)
    found = decomposition_of(topology)
    check_decomposition(topology, found.rings)
    assert seconds(topology, found.share) == Fraction(10, 3)
    plan(topology, "allreduce").verify()


# --- any number of rings


@pytest.mark.parametrize(
    "topology", [preset("torus:2x4"), preset("hypercube:3"), preset("full_mesh:6", (0, 1)), slow_nics("cluster:2x4", 0)]
)
def test_any_number_of_rings(topology: Topology) -> None:
    needs_solver()
    n, every = topology.ranks, decompose(topology)
    for k in (1, 2, 3, len(every), min(largest_count(n), 12)):  # hypercube:3 has 12 rings
        found = decomposition_of(topology, k)
        assert len({ring.ranks for ring in found.rings}) == k
        check_decomposition(topology, found.rings)
        plan(topology, rings=k).verify("replay")
        for rank in (0, n - 1):
            around = tuple(cycle_neighbours(ring.ranks, rank) for ring in found.rings)
            assert ring_neighbours(topology, rank, k) == around
    assert decompose(topology, len(every)) is every
    with pytest.raises(ArgumentError, match=rf"^rings must be an integer from 1 to {2 * n - 2} for {n} ranks"):
        decompose(topology, 2 * n - 1)


def test_rings_are_disjoint_where_they_can_be() -> None:
    needs_solver()
    for spec, k in (("torus:4x4", 3), ("hypercube:3", 2), ("hypercube:4", 4), ("torus:2x5", 2)):
        rings = decompose(Topology.preset(spec), k)
        assert len({hop for ring in rings for hop in hops_of(ring.ranks)}) == k * len(rings[0].ranks)
        assert decomposition_of(Topology.preset(spec), k).share == Fraction(1, k)


def test_more_rings_than_there_are() -> None:
    needs_solver()
    one_way = Topology("one way", 5, (), tuple(Link(rank, (rank + 1) % 5, 1.0) for rank in range(5)))
    assert len(decompose(one_way)) == 1
    with pytest.raises(ArgumentError, match=r"^rings must be fewer for topology 'one way': no 2 were found"):
        decompose(one_way, 2)


# --- random topologies


def every_ring_cut(topology: Topology) -> Fraction:
    """The narrowest cut between ranks, by its definition."""
    nodes = [*range(topology.ranks), *topology.switches]
    narrowest = None
    for inside in map(set, chain.from_iterable(combinations(nodes, size) for size in range(1, len(nodes)))):
        if 0 < sum(rank in inside for rank in range(topology.ranks)) < topology.ranks:
            out = sum(
                (
                    Fraction(str(link.GBps))
                    for link in topology.links
                    if link.source in inside and link.target not in inside
                ),
                Fraction(0),
            )
            narrowest = out if narrowest is None else min(narrowest, out)
    assert narrowest is not None
    return narrowest


@given(topologies())
def test_ring_bound_is_the_narrowest_cut(topology: Topology) -> None:
    hops = Hops(topology)
    arcs_only = hops.bound_within([int(Fraction(str(link.GBps)) * hops.unit) for link in topology.links])
    assert Fraction(arcs_only, hops.unit) == every_ring_cut(topology)


@slow
@given(topologies(ranks=12), st.sampled_from([None, 2]))
def test_random_topologies_are_decomposed_and_proved(topology: Topology, k: int | None) -> None:
    needs_solver()
    try:
        found = decomposition_of(topology, k)
    except ArgumentError:
        assume(k is None)  # there are no two different rings
        raise
    assert len({ring.ranks for ring in found.rings}) == len(found.rings)
    check_decomposition(topology, found.rings)
    assert seconds(topology, found.share) >= topology.allgather_bound(10**9) * (1 - 1e-12)
    for collective in COLLECTIVES:
        schedule = plan(topology, collective, rings=k)
        schedule.verify("replay")
        schedule.verify("structure")
    backward = plan(topology, rings=k, reverse=True)
    backward.verify("replay")


@slow
@given(topologies(ranks=12))
def test_one_ring_needs_no_solver(topology: Topology) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ortools.sat.python", None)
        ring = single_ring(Hops(topology))
        assert is_hamiltonian_cycle(ring, topology.ranks)
        assert seconds(topology, decomposition_of(topology, 1).share) >= topology.allgather_bound(10**9) * (1 - 1e-12)
        for collective in COLLECTIVES:
            plan(topology, collective, "ring").verify("replay")


@pytest.mark.parametrize("spec", ["torus:4x4", "torus:9x9", "torus:2x3", "hypercube:5", "torus:5x7", "torus:16x16"])
def test_a_single_ring_takes_nearest_neighbours(spec: str) -> None:
    topology = Topology.preset(spec)
    (ring,) = decompose(topology, 1)
    assert all(topology.link(*hop) for hop in hops_of(ring.ranks))


# --- the solver itself


def test_without_the_solver_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    topology = Topology.preset("torus:2x7")
    for call in (lambda: decompose(topology), lambda: plan(topology), lambda: ring_neighbours(topology, 0, 2)):
        with pytest.raises(TopologyError, match=r"'torus:2x7'.*pip install 'tasp-coll\[solver\]'.*'ring'"):
            call()
    assert plan(topology, algorithm="ring").verify() == "replay"


def test_the_same_rings_in_every_process() -> None:
    needs_solver()
    code = (
        "from tasp_coll import Topology, decompose\n"
        "for spec in ('torus:2x4', 'hypercube:3', 'torus:2x5'): print(decompose(Topology.preset(spec)))\n"
        "print(decompose(Topology.preset('full_mesh:8').without_link(0, 1)))\n"
        "print(decompose(Topology.preset('hypercube:3'), 5))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.count(b"Ring(") > 20


def test_a_topology_is_worked_out_once() -> None:
    needs_solver()
    first = decompose(Topology.preset("torus:2x4"))
    plain = Topology.preset("torus:2x4")
    again = Topology("by another name", plain.ranks, plain.switches, tuple(plain.links))
    assert decompose(again) is decompose(again, len(first)) is first


def test_check_finds_an_overloaded_link() -> None:
    topology = Topology.preset("torus:4x4")
    (ring,) = decompose(topology, 1)
    back = ring.reversed()
    check_decomposition(topology, (Ring(ring.ranks, Fraction(1, 2)), Ring(back.ranks, Fraction(1, 2))), Fraction(1, 2))
    with pytest.raises(
        ScheduleError, match=r"link \d+ -> \d+ carries 2/3 of a shard, its share is 1/2: it is on rings \[1\]"
    ):
        check_decomposition(
            topology, (Ring(back.ranks, Fraction(1, 3)), Ring(ring.ranks, Fraction(2, 3))), Fraction(1, 2)
        )
