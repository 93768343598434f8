"""The same times in closed form where every rank is like the others: for thousands of ranks."""

from __future__ import annotations

from tasp_coll.nodes import nodes_of
from tasp_coll.simulate import LINKS_ALONE, Costs, Prediction
from tasp_coll.topology import Topology


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
    plan, which need not be made. Of "hierarchical", a few percent off where slices are few and latencies count.
    """
    if algorithm == "hierarchical":
        return _hierarchical(topology, shard_bytes, slices, costs)
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
    seconds = max(steps * span, software)
    link = (0, 1 if mesh else topology.switches[0])
    used = steps * crossing * shard_bytes / rate / seconds if seconds else 0.0
    ends = tuple(span * (step + 1) for step in range(steps))
    return Prediction(seconds, "formula", link, used, ends, software)


def _hierarchical(topology: Topology, shard_bytes: float, slices: int, costs: Costs) -> Prediction | None:
    """NICs are busy all the time and the last slice's way inside a node is left, or the links inside are busy."""
    nodes = nodes_of(topology)
    if nodes is None:
        return None
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
