"""The same times in closed form where every rank is like the others: for thousands of ranks."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

from tasp_coll import two_level
from tasp_coll.grids import sides_of
from tasp_coll.links import Node
from tasp_coll.nodes import Nodes, nodes_of
from tasp_coll.simulate import LINKS_ALONE, Costs, Prediction, predict_native
from tasp_coll.topology import Topology

_SIDES = 8  # of a torus above which the next rank is so many hops away that routes take long to find


def formula(
    topology: Topology,
    algorithm: str,
    shard_bytes: float,
    *,
    rings: int | None = None,
    slices: int = 1,
    costs: Costs = LINKS_ALONE,
) -> Prediction | None:
    """An allgather, or a reduce-scatter, of equal shards; None where it is not known.

    Known of "rings", "ring", "direct" and "native" (the ring in rank order of large messages) on full meshes, with
    disjoint rings (so not for more than 2 and 4 of 4 and 6 ranks), and single switches: what `predict` says of the
    plan, which need not be made. On equal nodes the same, with their closed form of rings, and "hierarchical", both a
    few percent off where latencies count, the latter where slices are few, too. On tori "native", and "direct" as if
    the shortest ways were spread evenly over the links: so does `Topology.path` where sides are powers of two, else
    some links have up to twice as much to carry.
    """
    if nodes := nodes_of(topology):
        return _on_nodes(topology, nodes, algorithm, shard_bytes, rings, slices, costs)
    if algorithm in ("direct", "native") and (sides := sides_of(topology)):
        return _on_torus(topology, sides, algorithm, shard_bytes, slices, costs)
    n, mesh = topology.ranks, topology.is_full_mesh
    if not (mesh or topology.is_single_switch) or n < 2 or algorithm not in ("rings", "ring", "direct", "native"):
        return None
    rate, latency = topology.links[0].GBps * 1e9, _latency(topology)
    if algorithm == "direct":
        steps, messages, crossing = 1, slices, 1.0 if mesh else n - 1.0
    else:
        count = 1 if algorithm != "rings" or not (rings or mesh) else rings or n - 1
        steps, messages, crossing = n - 1, count, 1.0 / count if mesh else 1.0
    span = latency + 2 * costs.message_s + crossing * shard_bytes / rate
    software = costs.software_s(2 * (n - 1) * messages, 2 * (n - 1) * shard_bytes)
    link = (0, 1 if mesh else topology.switches[0])
    return _prediction(span, steps, steps * crossing * shard_bytes / rate, link, software)


class _Hop(NamedTuple):
    """A kind of hop: its first link, bytes over the link's rate for a whole shard, and latencies, seconds."""

    link: tuple[Node, Node]
    shard_s: float
    delay: float


def _on_nodes(
    topology: Topology,
    nodes: Nodes,
    algorithm: str,
    shard_bytes: float,
    rings: int | None,
    slices: int,
    costs: Costs,
) -> Prediction | None:
    inside = _hop(topology, nodes.groups[0][0], nodes.groups[0][1], nodes.inside_GBps, shard_bytes)
    across = _hop(topology, nodes.groups[0][0], nodes.groups[1][0], nodes.nic_GBps, shard_bytes)
    if algorithm == "hierarchical":
        return _hierarchical(topology, nodes, shard_bytes, slices, costs)
    if algorithm == "direct":
        return _direct_on_nodes(nodes, inside, across, shard_bytes, slices, costs)
    if algorithm == "native":
        return _native_on_nodes(nodes, inside, across, shard_bytes, costs)
    count = two_level.largest_count(nodes) if algorithm == "rings" and rings is None else rings or 1
    if algorithm not in ("rings", "ring") or count > two_level.largest_count(nodes) or not two_level.is_known(nodes):
        return None
    return _rings_on_nodes(nodes, inside, across, shard_bytes, count, costs)


def _hop(topology: Topology, src: int, dst: int, GBps: float, shard_bytes: float) -> _Hop:
    path = topology.path(src, dst)
    latencies = [link.latency_us for link in (topology.link(*hop) for hop in path) if link]
    return _Hop(path[0], shard_bytes / (GBps * 1e9), sum(latencies) * 1e-6)


def _rings_on_nodes(
    nodes: Nodes, inside: _Hop, across: _Hop, shard_bytes: float, count: int, costs: Costs
) -> Prediction:
    """The busiest links are busy all the time, or else a chunk's way round takes longer than they do."""
    n = nodes.count * nodes.size
    inner, outer = (float(part) for part in two_level.loads(nodes, count))
    inner, outer, message = inner * inside.shard_s, outer * across.shard_s, 2 * costs.message_s
    wide, delay = max((inner, inside.delay), (outer, across.delay))
    hops = inner + inside.delay + message, outer + across.delay + message
    around = (n - nodes.count) * hops[0] + nodes.count * hops[1] - min(hops)
    span = max((n - 1) * wide + delay + message, around) / (n - 1)
    software = costs.software_s(2 * (n - 1) * count, 2 * (n - 1) * shard_bytes)
    return _prediction(span, n - 1, (n - 1) * wide, across.link if outer >= inner else inside.link, software)


def _native_on_nodes(nodes: Nodes, inside: _Hop, across: _Hop, shard_bytes: float, costs: Costs) -> Prediction | None:
    """A ring in rank order, where nodes have ranks that follow each other. A rank ends a step before the next one."""
    if any(group[-1] - group[0] != nodes.size - 1 for group in map(sorted, nodes.groups)):
        return None
    # The next rank of the next node is on another rail: there is one more hop inside.
    out = across.shard_s + across.delay + (inside.delay if nodes.rails else 0.0)
    span = max(out, inside.shard_s + inside.delay) + 2 * costs.message_s
    n, busiest = nodes.count * nodes.size, max(across, inside, key=lambda hop: hop.shard_s)
    software = costs.software_s(2 * (n - 1), 2 * (n - 1) * shard_bytes)
    return _prediction(span, n - 1, (n - 1) * busiest.shard_s, busiest.link, software)


def _direct_on_nodes(
    nodes: Nodes, inside: _Hop, across: _Hop, shard_bytes: float, slices: int, costs: Costs
) -> Prediction:
    """A NIC carries a rank's shard to each rank of other nodes. With rails, shards change rails inside a node."""
    u, m = nodes.count, nodes.size
    outer = (u - 1) * m * across.shard_s
    inner = (m - 1 if nodes.switched else 1) * (u if nodes.rails else 1) * inside.shard_s
    delay = across.delay + (inside.delay if nodes.rails else 0.0)
    span = max(outer + delay, inner + inside.delay) + 2 * costs.message_s
    software = costs.software_s(2 * (u * m - 1) * slices, 2 * (u * m - 1) * shard_bytes)
    return _prediction(span, 1, max(inner, outer), across.link if outer >= inner else inside.link, software)


def _on_torus(
    topology: Topology, sides: tuple[int, ...], algorithm: str, shard_bytes: float, slices: int, costs: Costs
) -> Prediction | None:
    if algorithm == "native":
        if len(sides) > _SIDES:
            return None
        return predict_native(topology, "allgather", shard_bytes, costs=costs, in_order=True)
    n, rate = topology.ranks, topology.links[0].GBps * 1e9
    # Along a side of s, the ranks of a row are s*s//4 hops from any one of them in all, over two links (or one).
    shards = [n // side * (side * side // 4) / min(side - 1, 2) for side in sides]
    busiest = max(range(len(sides)), key=shards.__getitem__)
    busy = shards[busiest] * shard_bytes / rate
    hops = sum(side // 2 for side in sides)
    software = costs.software_s(2 * (n - 1) * slices, 2 * (n - 1) * shard_bytes)
    span = busy + hops * _latency(topology) + 2 * costs.message_s
    return _prediction(span, 1, busy, (0, prod(sides[busiest + 1 :])), software)


def _prediction(span: float, steps: int, busy: float, link: tuple[Node, Node], software: float) -> Prediction:
    """span: of a step; busy: what the bytes of the busiest link take in all, seconds."""
    seconds = max(steps * span, software)
    ends = tuple(span * (step + 1) for step in range(steps))
    return Prediction(seconds, "formula", link, busy / seconds if seconds else 0.0, ends, software)


def _hierarchical(topology: Topology, nodes: Nodes, shard_bytes: float, slices: int, costs: Costs) -> Prediction:
    """NICs are busy all the time and the last slice's way inside a node is left, or the links inside are busy."""
    u, m = nodes.count, nodes.size
    crossing = shard_bytes / (nodes.nic_GBps * 1e9)
    inside = (m - 1 if nodes.switched else 1) * shard_bytes / (nodes.inside_GBps * 1e9)
    delay = 2 * costs.message_s + _latency(topology)
    rail = (u - 1) * crossing
    busy = max(rail + inside / slices, u * inside)
    software = costs.software_s(2 * slices * (u - 1 + u * (m - 1)), 2 * (u * m - 1) * shard_bytes)
    seconds = max(busy + u * delay, software)
    rank = nodes.groups[0][0]
    link = topology.path(rank, nodes.groups[1][0] if rail > u * inside else nodes.groups[0][1])[0]
    steps = (u - 1) * slices + 1
    ends = tuple(seconds * (step + 1) / steps for step in range(steps))
    return Prediction(seconds, "formula", link, max(rail, u * inside) / seconds if seconds else 0.0, ends, software)


def _latency(topology: Topology) -> float:
    """Seconds on the longest way from one rank to another."""
    if topology.is_full_mesh and not isinstance(topology.links, tuple):
        return topology.links[0].latency_us * 1e-6
    longest = {True: 0.0, False: 0.0}  # from a rank, and from a switch
    for link in topology.links:
        up = isinstance(link.source, int)
        longest[up] = max(longest[up], link.latency_us * 1e-6)
    return sum(longest.values())
