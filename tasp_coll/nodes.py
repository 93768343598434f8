"""Which ranks of a topology share a node: several equal nodes, each rank with a NIC of its own on a fabric."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from tasp_coll.links import Link, Node

if TYPE_CHECKING:
    from tasp_coll.topology import Topology


@dataclass(frozen=True)
class Nodes:
    """`groups[a][p]` is rank p of node a. Inside a node: a full mesh, or one switch where `switched`, of equal links.

    inside_GBps: rate of one link inside a node (0.0 for nodes of one rank). nic_GBps: rate of each rank's NIC, each
    way. rails: a NIC reaches only the ranks of the same p in other nodes.
    """

    groups: tuple[tuple[int, ...], ...]
    inside_GBps: float
    nic_GBps: float
    switched: bool
    rails: bool

    @property
    def count(self) -> int:
        """How many nodes, u."""
        return len(self.groups)

    @property
    def size(self) -> int:
        """Ranks of a node, m."""
        return len(self.groups[0])


@lru_cache(maxsize=8)
def nodes_of(topology: Topology) -> Nodes | None:
    """The nodes of a topology of two or more equal nodes of two or more ranks; None for any other topology.

    Seen from the links, whatever the topology's name: without the switches of the fabric the ranks fall apart into
    parts of one size, and every rank has one equal link to and from the fabric.
    """
    if topology.is_full_mesh or topology.is_single_switch:
        return None
    for fabric in _fabrics(topology):
        if found := _split(topology, fabric):
            return found
    return None


def _fabrics(topology: Topology) -> Iterator[frozenset[str]]:
    """Sets of switches that may join nodes: all with the slowest ports (one for each rail), then each one alone."""
    slowest = min(link.GBps for link in topology.links)
    ports = [link for link in topology.links if link.GBps == slowest]
    yield frozenset(end for link in ports for end in (link.source, link.target) if isinstance(end, str))
    ends = Counter(end for link in topology.links for end in (link.source, link.target))
    for switch in topology.switches:
        if ends[switch] == 2 * topology.ranks:
            yield frozenset((switch,))


def _split(topology: Topology, fabric: frozenset[str]) -> Nodes | None:
    inner = [link for link in topology.links if not {link.source, link.target} & fabric]
    nics = [link for link in topology.links if {link.source, link.target} & fabric]
    parts = connected_parts(topology.ranks, [switch for switch in topology.switches if switch not in fabric], inner)
    if len(parts) < 2 or len({len(part) for part in parts}) != 1 or len(parts[0]) < 2:
        return None
    rail = _rails(topology.ranks, nics)
    kinds = {_kind(part, links) for part, links in zip(parts, _by_part(parts, inner), strict=True)}
    if rail is None or len(kinds) != 1 or (kind := kinds.pop()) is None:
        return None
    rails = len(set(rail.values())) > 1
    groups = tuple(tuple(sorted(part, key=lambda rank: (rail[rank], rank))) for part in parts)
    if rails and any([rail[rank] for rank in group] != sorted(set(rail.values())) for group in groups):
        return None
    return Nodes(groups, kind[0], nics[0].GBps, kind[1], rails)


def connected_parts(ranks: int, switches: Sequence[str], links: Sequence[Link]) -> list[list[int]]:
    """The ranks of each connected part, by smallest rank."""
    near: dict[Node, list[Node]] = {node: [] for node in (*range(ranks), *switches)}
    for link in links:
        near[link.source].append(link.target)
        near[link.target].append(link.source)
    seen: set[Node] = set()
    parts = []
    for rank in range(ranks):
        if rank in seen:
            continue
        part: list[Node] = [rank]
        seen.add(rank)
        for node in part:
            fresh = [other for other in near[node] if other not in seen]
            seen.update(fresh)
            part += dict.fromkeys(fresh)
        parts.append(sorted(node for node in part if not isinstance(node, str)))
    return parts


def _rails(ranks: int, nics: list[Link]) -> dict[int, str] | None:
    """The fabric switch of each rank, if each has one, both ways, and all links are equal."""
    ends: defaultdict[int, list[tuple[str, bool]]] = defaultdict(list)
    for link in nics:
        if isinstance(link.source, str) and isinstance(link.target, int):
            ends[link.target].append((link.source, False))
        elif isinstance(link.target, str) and isinstance(link.source, int):
            ends[link.source].append((link.target, True))
        else:
            return None  # switches joined to switches
    if len({link.GBps for link in nics}) != 1:
        return None
    both_ways = all(len(ends[rank]) == 2 and ends[rank][0][0] == ends[rank][1][0] for rank in range(ranks))
    return {rank: ends[rank][0][0] for rank in range(ranks)} if both_ways else None


def _by_part(parts: list[list[int]], inner: list[Link]) -> list[list[Link]]:
    """The links with a rank of each part at an end."""
    home = {rank: number for number, part in enumerate(parts) for rank in part}
    found: list[list[Link]] = [[] for _ in parts]
    for link in inner:
        end = link.source if isinstance(link.source, int) else link.target
        if isinstance(end, int):
            found[home[end]].append(link)
    return found


def _kind(part: list[int], links: list[Link]) -> tuple[float, bool] | None:
    """Rate and form of a node: a full mesh (False) or a switch (True) of equal links; None for anything else."""
    m = len(part)
    rates = {link.GBps for link in links}
    switches = {end for link in links for end in (link.source, link.target) if isinstance(end, str)}
    if len(rates) != 1 or len(switches) > 1 or len(links) != (2 * m if switches else m * (m - 1)):
        return None
    if switches and any(isinstance(link.source, int) and isinstance(link.target, int) for link in links):
        return None
    return rates.pop(), bool(switches)
