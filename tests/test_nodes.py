"""Which ranks share a node is read from the links, whatever the topology is called."""

from __future__ import annotations

from itertools import permutations

import pytest

from tasp_coll import Link, Topology
from tasp_coll.nodes import Nodes, nodes_of


def rail_cluster(nodes: int, m: int) -> Topology:
    """Full meshes of m, and one switch for each rail."""
    links = [Link(m * a + p, m * a + q, 9.0) for a in range(nodes) for p, q in permutations(range(m), 2)]
    for rank in range(nodes * m):
        links += [Link(rank, f"rail{rank % m}", 1.0), Link(f"rail{rank % m}", rank, 1.0)]
    return Topology("rails", nodes * m, tuple(f"rail{p}" for p in range(m)), tuple(links))


@pytest.mark.parametrize(
    ("spec", "groups", "rates", "switched"),
    [
        ("cluster:2x4", ((0, 1, 2, 3), (4, 5, 6, 7)), (450.0, 50.0), False),
        ("cluster:3x2:1", ((0, 1), (2, 3), (4, 5)), (50.0, 50.0), False),
        ("dgx_h100:2", (tuple(range(8)), tuple(range(8, 16))), (450.0, 50.0), True),
    ],
)
def test_nodes_of_presets(spec: str, groups: tuple[tuple[int, ...], ...], rates: tuple[float, float], switched: bool):
    assert nodes_of(Topology.preset(spec)) == Nodes(groups, *rates, switched, rails=False)


@pytest.mark.parametrize("spec", ["full_mesh:4", "nvswitch:8", "torus:4x4", "hypercube:3", "cluster:4x1", "mi300x"])
def test_one_node_is_not_several(spec: str):
    assert nodes_of(Topology.preset(spec)) is None


def test_rails():
    assert nodes_of(rail_cluster(3, 2)) == Nodes(((0, 1), (2, 3), (4, 5)), 9.0, 1.0, False, rails=True)


def test_irregular_nodes_are_none():
    assert nodes_of(Topology.preset("cluster:2x4").without_link(0, 1)) is None
    cluster = Topology.preset("cluster:2x3")
    slow = [Link(a, b, 40.0 if a == 0 and b == "fabric" else rate) for a, b, rate in map(_ends, cluster.links)]
    assert nodes_of(Topology("slow NIC", 6, cluster.switches, slow)) is None


def _ends(link: Link) -> tuple[object, object, float]:
    return link.source, link.target, link.GBps
