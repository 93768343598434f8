"""Topologies told from what was measured on them, here by a model that divides shared ports, with noise."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback_ranks import on_ranks
from tasp_coll import ArgumentError, Communicator, Link, Topology, TopologyError
from tasp_coll.discovery import Measured, infer
from tasp_coll.nodes import nodes_of
from tasp_coll.probe import _matchings, measure

SPECS = ("full_mesh:2", "full_mesh:5", "mi300x", "nvswitch:3", "nvswitch:8", "cluster:2x2", "cluster:2x4:1")
NODES = ("cluster:2x4", "cluster:3x3:2", "cluster:4x2:0.5", "dgx_h100:2", "dgx_h100:3")


def rates(topology: Topology, pairs: list[tuple[int, int]]) -> dict[tuple[int, int], float]:
    """Each pair gets the least share of a link on its way, links being divided evenly."""
    users = Counter(link for pair in pairs for link in topology.path(*pair))
    return {pair: min(topology.GBps(*link) / users[link] for link in topology.path(*pair)) for pair in pairs}


def model(topology: Topology, noise: float = 0.0, seed: int = 0) -> Measured:
    n = topology.ranks
    pairs = [(a, b) for a in range(n) for b in range(n) if a != b]
    alone, together, everyone, latency = np.zeros((4, n, n))
    for pair in pairs:
        alone[pair] = rates(topology, [pair])[pair]
        latency[pair] = sum(topology.link(*link).latency_us for link in topology.path(*pair))
    for source in range(n):
        for pair, rate in rates(topology, [pair for pair in pairs if pair[0] == source]).items():
            together[pair] = rate
    for pair, rate in rates(topology, pairs).items():
        everyone[pair] = rate
    chance = np.random.default_rng(seed)
    figures = (alone, together, everyone, latency)
    return Measured(*(figure * chance.uniform(1 - noise, 1 + noise, (n, n)) for figure in figures))


def shape(topology: Topology) -> tuple[Any, ...]:
    """What kind of thing it is, and its rates."""
    if topology.is_full_mesh or topology.is_single_switch:
        return topology.is_full_mesh, topology.ranks, topology.links[0].GBps
    nodes = nodes_of(topology)
    assert nodes is not None
    return nodes.groups, nodes.switched, nodes.inside_GBps, nodes.nic_GBps


@pytest.mark.parametrize("spec", SPECS + NODES)
def test_presets_are_recognised(spec: str) -> None:
    topology = Topology.preset(spec)
    assert shape(infer(model(topology))) == shape(topology)


@given(spec=st.sampled_from(SPECS + NODES), seed=st.integers(0, 1000))
@settings(max_examples=60)
def test_noise_changes_rates_a_little_and_nothing_else(spec: str, seed: int) -> None:
    topology = Topology.preset(spec)
    found, expected = shape(infer(model(topology, 0.1, seed))), shape(topology)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == (pytest.approx(theirs, rel=0.11) if isinstance(theirs, float) else theirs)


def test_unequal_links_keep_their_classes() -> None:
    links = [Link(a, b, 4.0 if {a, b} == {0, 3} else 1.0, 5.0) for a in range(4) for b in range(4) if a != b]
    found = infer(model(Topology("one fast pair", 4, (), links), 0.05))
    assert found.GBps(0, 3) == found.GBps(3, 0) == pytest.approx(4, rel=0.06)
    assert len({link.GBps for link in found.links}) == 2
    assert all(link.latency_us == pytest.approx(5, rel=0.06) for link in found.links)


def test_latencies_are_divided_among_the_links_of_a_way() -> None:
    ports = [Link(*ends, 1.0, 2.0) for rank in range(3) for ends in ((rank, "s"), ("s", rank))]
    switch = Topology("s", 3, ("s",), ports)
    assert {link.latency_us for link in infer(model(switch)).links} == {2.0}


@pytest.mark.parametrize("spec", ["torus:4x4", "hypercube:3"])
def test_what_is_not_known_is_an_error(spec: str) -> None:
    with pytest.raises(TopologyError, match="write a topology file"):
        infer(model(Topology.preset(spec)))


@pytest.mark.parametrize("n", range(1, 10))
def test_matchings_cover_all_pairs_once(n: int) -> None:
    rounds = list(_matchings(n))
    assert Counter(frozenset(pair) for pairs in rounds for pair in pairs) == Counter(
        frozenset((a, b)) for a in range(n) for b in range(a)
    )
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds)
    assert len(rounds) <= n


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_measuring_gives_all_ranks_the_same_figures(n: int) -> None:
    done: list[int] = []

    def body(comm: Communicator) -> bytes:
        def progress(work: list[Any]) -> list[Any]:
            done.append(len(work))
            return work

        found = measure(comm, repeats=1, progress=progress)
        pairs = ~np.eye(n, dtype=bool)
        for figure in (found.alone, found.together, found.everyone, found.latency_us):
            assert (figure[pairs] > 0).all()
            assert (figure[~pairs] == 0).all()
        assert comm.decomposed_allgather(np.zeros(1)).shape == (n,)
        return found.alone.tobytes() + found.latency_us.tobytes()

    assert len(set(on_ranks(n, body))) == 1
    assert len(done) == 4 * n


def test_one_rank_is_a_topology_too() -> None:
    def body(comm: Communicator) -> Topology:
        return Topology.discover(comm, repeats=1)

    assert on_ranks(1, body)[0].ranks == 1


@pytest.mark.parametrize("repeats", [0, True, 1.5, "3"])
def test_bad_repeats(repeats: Any) -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(ArgumentError, match="repeats must be an integer >= 1"):
            Topology.discover(comm, repeats=repeats)

    on_ranks(1, body)


def test_two_ranks_are_a_mesh_whatever_the_noise() -> None:
    alone = np.array([[0.0, 7.853], [15.35, 0.0]])
    for share in (1.0, 0.4, np.array([[0.0, 1.0], [0.4, 0.0]])):
        found = infer(Measured(alone, alone * share, alone * share, np.array([[0.0, 2.0], [2.0, 0.0]])))
        assert (found.ranks, found.switches) == (2, ())
        assert found.GBps(0, 1) == pytest.approx(7.853)
        assert found.GBps(1, 0) == pytest.approx(15.35)
