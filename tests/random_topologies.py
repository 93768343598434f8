"""Random topologies for hypothesis: connected, with switches, links of unequal rates, one way or both."""

from __future__ import annotations

from hypothesis import strategies as st

from tasp_coll.links import Link, Node
from tasp_coll.topology import Topology

RATES = st.sampled_from([0.1, 0.25, 1.0, 1.5, 3.0, 7.0, 450.0])


@st.composite
def topologies(draw: st.DrawFn, ranks: int = 5, switches: int = 3, density: int = 4) -> Topology:
    """Up to so many ranks and switches: a cycle through a random order of all nodes and any other links."""
    n = draw(st.integers(2, ranks))
    nodes: list[Node] = [*range(n), *(f"s{i}" for i in range(draw(st.integers(0, switches))))]
    order = draw(st.permutations(nodes))
    arcs = set(zip(order, [*order[1:], order[0]], strict=True))
    arcs |= draw(st.sets(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes)), max_size=density * n))
    if draw(st.booleans()):
        arcs |= {(v, u) for u, v in arcs}
    rates = RATES if draw(st.booleans()) else st.just(1.0)
    links = [Link(u, v, draw(rates)) for u, v in sorted(arcs, key=str) if u != v]
    return Topology("random", n, tuple(nodes[n:]), tuple(links))  # type: ignore[arg-type]
