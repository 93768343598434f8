"""The same times in closed form where every rank and every link is like the others: for thousands of ranks."""

from __future__ import annotations

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
    """An allgather, or a reduce-scatter, of equal shards by "rings", "ring" or "direct"; None where it is not known.

    Known for full meshes, with disjoint rings (so not for more than 2 and 4 of 4 and 6 ranks), and single switches.
    What `predict` says of the plan, which need not be made. "native" is the ring in rank order of large messages.
    """
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
    return Prediction(seconds, "steady", link, used, ends, software)


def _latency(topology: Topology) -> float:
    """Seconds on the longest way from one rank to another."""
    if topology.is_full_mesh and not isinstance(topology.links, tuple):
        return topology.links[0].latency_us * 1e-6
    longest = {True: 0.0, False: 0.0}  # from a rank, and from a switch
    for link in topology.links:
        up = isinstance(link.source, int)
        longest[up] = max(longest[up], link.latency_us * 1e-6)
    return sum(longest.values())
