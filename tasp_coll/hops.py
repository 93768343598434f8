"""What rings can be made of: hops from rank to rank, and the links that each loads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property

from tasp_coll.cutbound import ring_width_bound, whole_rates
from tasp_coll.links import breadth_first, neighbours, order
from tasp_coll.topology import Topology

Hop = tuple[int, int]


_NOISE = Fraction(103, 100)  # the two directions of a link are taken for equal up to this ratio


class Hops:
    """The hops of a topology, and its links by number.

    rates: of the links, in whole numbers of 1/unit GB/s; where no two directions differ by more than noise, the lower
    of both, so that rings can be turned round. highest: the topology's highest rate.
    """

    def __init__(self, topology: Topology) -> None:
        self.topology, self.ranks = topology, topology.ranks
        self.unit, self._arcs = whole_rates(topology)
        self.rates = _both_ways(self._arcs)
        self.highest = max(self._arcs.values())
        self._number = {(link.source, link.target): index for index, link in enumerate(topology.links)}
        self._routes: dict[Hop, tuple[int, ...]] = {}

    def route(self, hop: Hop) -> tuple[int, ...]:
        """The numbers of the links that a hop crosses."""
        if hop not in self._routes:
            self._routes[hop] = tuple(self._number[link] for link in self.topology.path(*hop))
        return self._routes[hop]

    @cached_property
    def routes(self) -> dict[Hop, tuple[int, ...]]:
        """The hops that rings should take: over one link or over switches, over other ranks only if they must."""
        near = [hop for hop in self._candidates() if self.is_near(hop)]
        if not _is_connected(self.ranks, near):
            near = [(src, dst) for src in range(self.ranks) for dst in range(self.ranks) if src != dst]
        return {hop: self.route(hop) for hop in near}

    def _candidates(self) -> Iterator[Hop]:
        """Pairs of ranks between which there may be a route over links and switches alone."""
        if not self.topology.switches:
            return ((u, v) for u, v in self._arcs)
        return ((src, dst) for src in range(self.ranks) for dst in range(self.ranks) if src != dst)

    @cached_property
    def after(self) -> list[list[int]]:
        """The ranks that each rank has hops to."""
        table: list[list[int]] = [[] for _ in range(self.ranks)]
        for src, dst in self.routes:
            table[src].append(dst)
        return table

    @cached_property
    def width_bound(self) -> int:
        """What the widths of rings cannot exceed in all, in the unit of the rates."""
        return self.bound_within(self.rates)

    def bound_within(self, capacities: Sequence[int]) -> int:
        """The same where links have other capacities."""
        arcs = dict(zip(self._arcs, capacities, strict=True))
        return ring_width_bound(self.ranks, self.ranks + len(self.topology.switches), arcs)

    def loads(self, cycle: Sequence[int]) -> Counter[int]:
        """How often a ring crosses each link."""
        return Counter(link for hop in hops_of(cycle) for link in self.route(hop))

    def width(self, cycle: Sequence[int]) -> Fraction:
        """What a ring alone can carry: as much as its tightest link allows, in the unit of the rates."""
        return min(Fraction(self.rates[link], times) for link, times in self.loads(cycle).items())

    def can_turn(self, cycles: Iterable[Sequence[int]]) -> bool:
        """Whether the same rings in the opposite direction load equal links alike."""
        return all(self._is_mirrored(hop) for hop in {hop for cycle in cycles for hop in hops_of(cycle)})

    @cached_property
    def mirrored(self) -> bool:
        """Whether all rings can be turned round."""
        return all(self._is_mirrored(hop) for hop in self.routes)

    def _is_mirrored(self, hop: Hop) -> bool:
        ends = [(link.target, link.source) for link in map(self.topology.links.__getitem__, self.route(hop))]
        back = [self._number.get(pair) for pair in reversed(ends)]
        there = [self.rates[link] for link in reversed(self.route(hop))]
        return tuple(back) == self.route(hop[::-1]) and [self.rates[link] for link in back if link is not None] == there

    def is_near(self, hop: Hop) -> bool:
        """Whether a hop crosses one link, or switches alone."""
        return all(isinstance(node, str) for _, node in self.topology.path(*hop)[:-1])


def _both_ways(arcs: Mapping[tuple[int, int], int]) -> tuple[int, ...]:
    lower = tuple(min(rate, arcs.get((v, u), 0)) for (u, v), rate in arcs.items())
    alike = all(rate <= low * _NOISE for rate, low in zip(arcs.values(), lower, strict=True))
    return lower if alike else tuple(arcs.values())


def hops_of(cycle: Sequence[int]) -> Iterator[Hop]:
    """The hops of a ring."""
    return zip(cycle, [*cycle[1:], cycle[0]], strict=True)


def _is_connected(ranks: int, hops: Sequence[Hop]) -> bool:
    """Whether hops lead from rank 0 to all others and back."""
    ways = hops, [hop[::-1] for hop in hops]
    return all(len(breadth_first(neighbours(way), 0, order, through_ranks=True)) == ranks for way in ways)
