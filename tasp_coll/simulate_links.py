"""The links that pairs of ranks use, and how they share them.

Transfers that cross a link at the same time share it fairly: rates are max-min fair, as long TCP flows or NCCL's
channels through one port come close to (Bertsekas and Gallager, "Data Networks", 1992, section 6.5.2).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tasp_coll.links import Node
from tasp_coll.topology import Topology

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_EQUAL = 1e-9  # relative: what floats may differ by and still be meant to be equal


@dataclass(frozen=True, eq=False)
class Routes:
    """The paths of some pairs of ranks, as a list of uses: pair `pairs[i]` crosses link `links[i]`, pairs ascending.

    capacity: of each link, bytes per second. delay: the sum of the latencies of each pair's path, seconds.
    name: the nodes that a link joins.
    """

    pairs: Ints
    links: Ints
    capacity: Floats
    delay: Floats
    name: Callable[[int], tuple[Node, Node]]

    @cached_property
    def _starts(self) -> Ints:
        """Where each pair's uses begin."""
        return np.flatnonzero(np.diff(self.pairs, prepend=-1))

    @cached_property
    def _by_link(self) -> Ints:
        return np.argsort(self.links, kind="stable")

    @cached_property
    def _link_starts(self) -> Ints:
        return np.flatnonzero(np.diff(self.links[self._by_link], prepend=-1))

    @cached_property
    def alone(self) -> Floats | None:
        """Each pair's rate where no two pairs share a link, bytes per second; None where some do."""
        if np.bincount(self.links).max(initial=0) > 1:
            return None
        return np.minimum.reduceat(self.capacity[self.links], self._starts) if len(self.links) else np.empty(0)

    def load(self, nbytes: Floats) -> Floats:
        """Bytes that cross each link when each pair sends so many."""
        return np.bincount(self.links, nbytes[self.pairs], len(self.capacity)).astype(np.float64)

    def fair_rates(self, active: NDArray[np.bool_]) -> Floats:
        """Max-min fair rates of the active pairs, bytes per second; 0 for the others.

        Rounds of progressive filling. In each, every link that is the tightest of all its pairs' paths gives them
        equal shares, and what they take elsewhere is gone.
        """
        if self.alone is not None:
            return np.where(active, self.alone, 0.0)
        rates, left, open_ = np.zeros(len(self.delay)), self.capacity.copy(), active.copy()
        while open_.any():
            users = np.bincount(self.links, open_[self.pairs], len(left))
            share = np.divide(left, users, out=np.full(len(left), np.inf), where=users > 0)
            narrowest = np.minimum.reduceat(share[self.links], self._starts)
            narrowest[~open_] = np.inf
            tightest = np.full(len(left), np.inf)
            order = self._by_link
            tightest[self.links[order[self._link_starts]]] = np.minimum.reduceat(
                narrowest[self.pairs[order]], self._link_starts
            )
            full = (users > 0) & (share <= tightest * (1 + _EQUAL))
            settled = np.zeros(len(rates), np.bool_)
            settled[self.pairs[full[self.links]]] = True
            settled &= open_
            rates[settled] = narrowest[settled]
            taken = np.bincount(self.links, np.where(settled, rates, 0.0)[self.pairs], len(left))
            left = np.maximum(left - taken, 0.0)
            open_ &= ~settled
        return rates


def routes_of(topology: Topology, src: Ints, dst: Ints) -> Routes:
    """The routes of the pairs (src[i], dst[i]), which are distinct; see `Topology.path`."""
    pairs = np.arange(len(src))
    if topology.is_full_mesh:
        rates, delays = _mesh_figures(topology, src, dst)
        return Routes(pairs, pairs, rates, delays, lambda link: (int(src[link]), int(dst[link])))
    if topology.is_single_switch:
        return _switch_routes(topology, src, dst)
    number: dict[tuple[Node, Node], int] = {}
    uses: list[tuple[int, int]] = []
    delay = np.zeros(len(src))
    for pair, ends in enumerate(zip(src.tolist(), dst.tolist(), strict=True)):
        for hop in topology.path(*ends):
            uses.append((pair, number.setdefault(hop, len(number))))
            link = topology.link(*hop)
            assert link is not None
            delay[pair] += link.latency_us * 1e-6
    names = list(number)
    capacity = np.array([topology.GBps(*hop) * 1e9 for hop in names])
    table = np.array(uses, np.int64).reshape(-1, 2)
    return Routes(table[:, 0], table[:, 1], capacity, delay, names.__getitem__)


def _mesh_figures(topology: Topology, src: Ints, dst: Ints) -> tuple[Floats, Floats]:
    """Rate of each pair's link, all equal, and its latency, which may differ."""
    rates = np.full(len(src), topology.links[0].GBps * 1e9 if topology.links else np.inf)
    if not isinstance(topology.links, tuple):
        return rates, np.full(len(src), topology.links[0].latency_us * 1e-6)
    latency = np.zeros((topology.ranks, topology.ranks))
    for link in topology.links:
        latency[link.source, link.target] = link.latency_us * 1e-6
    return rates, latency[src, dst]


def _switch_routes(topology: Topology, src: Ints, dst: Ints) -> Routes:
    """Up one port and down another: link r is up from rank r, link n + r down to it."""
    n, switch = topology.ranks, topology.switches[0]
    latency = np.zeros(2 * n)
    for link in topology.links:
        port = link.source if isinstance(link.source, int) else n + int(link.target)
        latency[port] = link.latency_us * 1e-6
    return Routes(
        np.repeat(np.arange(len(src)), 2),
        np.stack([src, n + dst], axis=1).ravel(),
        np.full(2 * n, topology.links[0].GBps * 1e9),
        latency[src] + latency[n + dst],
        lambda link: (link, switch) if link < n else (switch, link - n),
    )
