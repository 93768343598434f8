"""Tori, as the links tell them."""

from __future__ import annotations

import pytest

from tasp_coll.grids import arcs, sides_of
from tasp_coll.links import Link
from tasp_coll.topology import Topology


@pytest.mark.parametrize(
    "spec, sides",
    [
        ("torus:4x4", (4, 4)),
        ("torus:2x9", (2, 9)),
        ("torus:9x2", (9, 2)),
        ("torus:3x2x2", (3, 2, 2)),
        ("torus:2x3x4", (2, 3, 4)),
        ("torus:3x3x3", (3, 3, 3)),
        ("torus:1x7", (7,)),
        ("torus:5x1x4", (5, 4)),
        ("hypercube:4", (2, 2, 2, 2)),
    ],
)
def test_sides(spec: str, sides: tuple[int, ...]) -> None:
    torus = Topology.preset(spec)
    assert sides_of(torus) == sides
    assert sides_of(Topology("any name", torus.ranks, (), torus.links)) == sides
    assert arcs(sides).tolist() == [link.source * torus.ranks + link.target for link in torus.links]


@pytest.mark.parametrize("spec", ["full_mesh:4", "torus:1x1", "torus:1x3", "nvswitch:4", "cluster:2x2", "dgx_h100:2"])
def test_others_are_no_tori(spec: str) -> None:
    assert sides_of(Topology.preset(spec)) is None


def test_one_odd_link_makes_no_torus() -> None:
    torus = Topology.preset("torus:3x4")
    assert sides_of(torus.without_link(0, 1)) is None
    slow = [Link(link.source, link.target, 0.5 if link.source == 5 else 1.0) for link in torus.links]
    assert sides_of(Topology("slow", 12, (), slow)) is None
    swap = {3: 7, 7: 3}
    other = [Link(swap.get(link.source, link.source), swap.get(link.target, link.target), 1.0) for link in torus.links]
    assert sides_of(Topology("renumbered", 12, (), other)) is None
