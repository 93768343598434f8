"""The cut bound, which no all-gather of a topology beats, and the width that no rings exceed.

For a set S of nodes that does not hold every rank, the shards of the ranks in S must leave S through its
outgoing links, so T* = max over S of |S & ranks| / outcapacity(S). Zhao et al., "ForestColl"
(arXiv:2402.06787), show that some schedule reaches it, and find it by maximum flows and a binary search; here
Dinkelbach's steps ("On nonlinear fractional programming", 1967) find it in exact fractions.

Where symmetry tells which cut it is, no flow is looked for, so that 16384 ranks take no longer than their links do to
be read: see `_of_nodes` and `_of_torus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import lcm, prod
from typing import TYPE_CHECKING

from tasp_coll.grids import sides_of
from tasp_coll.nodes import Nodes, nodes_of

if TYPE_CHECKING:
    from tasp_coll.links import Node
    from tasp_coll.topology import Topology


def allgather_bound_shares(topology: Topology) -> Fraction:
    """T* in 1/(GB/s), exact: an all-gather of shards of b bytes takes T* * b / 1e9 seconds or more.

    Rates count as the decimals that they print as. 0 for one rank; in closed form for full meshes, single switches,
    equal nodes and tori.
    """
    n = topology.ranks
    if n == 1:
        return Fraction(0)
    if topology.is_full_mesh:
        return 1 / _exact(topology.links[0].GBps)
    if topology.is_single_switch:
        return (n - 1) / _exact(topology.links[0].GBps)
    if sides := sides_of(topology):
        return _of_torus(sides, _exact(topology.links[0].GBps))
    if nodes := nodes_of(topology):
        return _of_nodes(nodes)
    return bound_by_flows(topology)


def bound_by_flows(topology: Topology) -> Fraction:
    """The same of any topology of two or more ranks, by maximum flows: seconds for hundreds of ranks."""
    n = topology.ranks
    unit, arcs = whole_rates(topology)
    return unit / _broadcast_rate(n, n + len(topology.switches), arcs)


def _of_torus(sides: tuple[int, ...], rate: Fraction) -> Fraction:
    """All ranks but one must pass that one's links.

    No cut has fewer links, since every rank is as any other and each of them has that many (Mader, "Minimale n-fach
    kantenzusammenhaengende Graphen", 1971), and none has more ranks behind it.
    """
    return (prod(sides) - 1) / (rate * sum(min(side - 1, 2) for side in sides))


def _of_nodes(nodes: Nodes) -> Fraction:
    """All ranks but one, but one node, or but one rail: the tightest of three cuts.

    Let T be the ranks that a tightest cut leaves out, as few as there may be. What leaves the cut, plus 1/T* for each
    rank of T, is least for T among all sets with ranks; that sum is submodular and the same for every renumbering of
    nodes, and of the ranks of one node, that keeps the links. So the sets that T is mapped to are T itself or have no
    rank in common with it, and every rank is in one of them. With rails, where ranks can only be renumbered in all
    nodes alike, such sets are single ranks, nodes and rails, beside all ranks (and diagonals of 2 x 2, of which each
    half would do); with one fabric they are single ranks and nodes.
    """
    u, m, nic, inside = nodes.count, nodes.size, _exact(nodes.nic_GBps), _exact(nodes.inside_GBps)
    out = inside if nodes.switched else (m - 1) * inside
    rates = [(out + nic) / (u * m - 1), nic / (u - 1)]
    if nodes.rails:
        rates.append(out / (m - 1))
    return 1 / min(rates)


def ring_width_bound(ranks: int, nodes: int, arcs: Mapping[tuple[int, int], int]) -> int:
    """The most that the widths of rings over the ranks can add up to, in the unit of the capacities.

    Each ring leaves every set that holds some ranks and not all, so they fit through the narrowest such cut: the least
    maximum flow between two ranks. Nodes are numbered, ranks first.
    """
    width = sum(arcs.values())
    for forward in (True, False):
        network = _Network(nodes, {arc if forward else arc[::-1]: rate for arc, rate in arcs.items()}, ranks)
        for rank in range(1, ranks):
            width = network.flow(0, rank, width)
    return width


def whole_rates(topology: Topology) -> tuple[int, dict[tuple[int, int], int]]:
    """Rates as whole numbers, in 1/unit GB/s, by the numbers of the nodes: ranks, then switches as they are listed."""
    rates = {(link.source, link.target): _exact(link.GBps) for link in topology.links}
    unit = lcm(*(rate.denominator for rate in rates.values()))
    number: dict[Node, int] = {node: i for i, node in enumerate((*range(topology.ranks), *topology.switches))}
    return unit, {(number[u], number[v]): int(rate * unit) for (u, v), rate in rates.items()}


def _exact(rate: float) -> Fraction:
    return Fraction(str(rate))


def _broadcast_rate(n: int, nodes: int, arcs: dict[tuple[int, int], int]) -> Fraction:
    """The largest x such that outcapacity(S) >= x * |S & ranks| for every node set S without all of 0..n-1.

    Let a super-source feed x to every rank: all sets that miss rank v keep the rule if and only if n*x can
    flow to v, and a minimum cut below n*x breaks it, so x falls to what that cut allows. Once v has passed,
    only sets with v in them are left, so v may be fed without limit: later flows find what they need nearby.
    """
    incapacity = [0] * n
    for (_, v), capacity in arcs.items():
        if v < n:
            incapacity[v] += capacity
    x = Fraction(min(incapacity), n - 1)
    network = _Network(nodes, arcs, n)
    for v in range(n):
        while (cut := network.tight_cut(v, x)) is not None:
            out = sum(capacity for (a, b), capacity in arcs.items() if a in cut and b not in cut)
            x = Fraction(out, sum(rank in cut for rank in range(n)))
    return x


class _Network:
    """Flows from the super-source to one rank, found backwards from that rank, where they are short.

    Arc 2k is the graph's arc k turned round, arc 2k+1 its residual; the arcs from the super-source come last.
    """

    def __init__(self, nodes: int, arcs: dict[tuple[int, int], int], n: int) -> None:
        self.n, self.source = n, nodes
        self.heads: list[int] = []
        self.leaving: list[list[int]] = [[] for _ in range(nodes + 1)]
        for u, v in [*arcs, *((self.source, rank) for rank in range(n))]:
            self.leaving[v].append(len(self.heads))
            self.leaving[u].append(len(self.heads) + 1)
            self.heads += (u, v)
        self.capacities = list(arcs.values())

    def tight_cut(self, v: int, x: Fraction) -> set[int] | None:
        """Source side of a minimum cut if less than n*x can flow to `v`, ranks before v being fed freely."""
        demand = self.n * x.numerator
        room: list[int] = []
        for capacity in self.capacities:
            room += (capacity * x.denominator, 0)
        for rank in range(self.n):
            room += (demand if rank < v else x.numerator, 0)
        missing, level = self._push(v, room, demand)
        return set(range(self.source)) - level.keys() if missing else None

    def flow(self, u: int, v: int, enough: int) -> int:
        """How much can flow from rank `u` to rank `v`, or `enough` if it is that much."""
        room: list[int] = []
        for capacity in self.capacities:
            room += (capacity, 0)
        for rank in range(self.n):
            room += (enough if rank == u else 0, 0)
        return enough - self._push(v, room, enough)[0]

    def _push(self, v: int, room: list[int], demand: int) -> tuple[int, dict[int, int]]:
        """Flow up to `demand` from the super-source to `v`: how much is missing, and what then still leads to `v`."""
        level: dict[int, int] = {}
        while demand:
            level = self._levels(v, room)
            if self.source not in level:
                break
            demand -= self._blocking_flow(v, room, level, demand)
        return demand, level

    def _levels(self, v: int, room: list[int]) -> dict[int, int]:
        """Hops from `v` over arcs with room, as far as the super-source (Dinic's level graph)."""
        level = {v: 0}
        queue = [v]
        for node in queue:
            for arc in self.leaving[node]:
                head = self.heads[arc]
                if room[arc] and head not in level:
                    level[head] = level[node] + 1
                    if head == self.source:
                        return level
                    queue.append(head)
        return level

    def _blocking_flow(self, v: int, room: list[int], level: dict[int, int], demand: int) -> int:
        """Pushes up to `demand` from `v` to the super-source along shortest paths; returns how much."""
        pushed, node = 0, v
        path: list[int] = []
        turn = dict.fromkeys(level, 0)  # arcs of a node before its turn are full or lead nowhere
        while pushed < demand:
            if node == self.source:
                flow = min(demand - pushed, *(room[arc] for arc in path))
                for arc in path:
                    room[arc] -= flow
                    room[arc ^ 1] += flow
                pushed, node = pushed + flow, v
                path.clear()
            elif turn[node] < len(self.leaving[node]):
                arc = self.leaving[node][turn[node]]
                if room[arc] and level.get(self.heads[arc]) == level[node] + 1:
                    path.append(arc)
                    node = self.heads[arc]
                else:
                    turn[node] += 1
            elif path:
                node = self.heads[path.pop() ^ 1]
                turn[node] += 1
            else:
                break
        return pushed
