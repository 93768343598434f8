"""From measured bandwidths to a topology: which ranks have links of their own, and which share a port.

Two figures of each pair tell it: the rate while nothing else moves, and the rate while the sender sends to everyone
at once. A link of its own keeps its rate; ranks behind one port divide it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tasp_coll.errors import TopologyError
from tasp_coll.links import Link, MeshLinks
from tasp_coll.topology import Topology

_OWN = 0.7  # of its rate alone: a link that keeps as much while all others are busy is not shared
_NEARLY_ALL = 0.95  # of the pairs: a rank that was not running for a moment spoils a figure
_ALIKE = 1.25  # rates within this factor are one rate, measured twice
_APART = 1.5  # and beyond this they cannot be
Rates = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured between n ranks, all (n, n) by source and target, diagonals 0.

    alone: GB/s of a pair while no other uses the same ports. together: GB/s while its source sends to all ranks at
    once. everyone: GB/s while all ranks do so. latency_us: time of a message of a few bytes, one way.
    """

    alone: Rates
    together: Rates
    everyone: Rates
    latency_us: Rates

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.alone)

    @property
    def pairs(self) -> NDArray[np.bool_]:
        """Where the figures of pairs are: everywhere but on the diagonal."""
        return ~np.eye(self.ranks, dtype=bool)


def infer(measured: Measured) -> Topology:
    """The topology that explains the figures: a full mesh, one switch, or several equal nodes of either kind.

    Rates that are alike become their median, so that regular topologies come out regular; a mesh whose links differ
    keeps a rate for each class. Latencies are medians; through a switch each of the two links has half.

    Raises TopologyError, with what was seen, where none of these explains the figures.
    """
    n = measured.ranks
    if n == 1:
        return Topology("discovered: one rank", 1)
    pairs = measured.pairs
    own = measured.together >= _OWN * measured.alone
    if n == 2 or own[pairs].mean() >= _NEARLY_ALL:  # two ranks have no other pair to share with, only noise
        return _mesh(measured)
    if own[pairs].mean() <= 1 - _NEARLY_ALL and _spread(measured.alone[pairs]) < _APART:
        return _switch(measured)
    groups = _groups(measured, own)
    if groups is None:
        shared = int(pairs.sum() - own[pairs].sum())
        raise TopologyError(
            f"the measured bandwidths are not those of a full mesh, one switch or several equal nodes: {shared} of "
            f"{int(pairs.sum())} pairs share links, and rates of pairs alone go from {measured.alone[pairs].min():.4g} "
            f"to {measured.alone[pairs].max():.4g} GB/s; write a topology file"
        )
    return _nodes(measured, own, groups)


def _spread(rates: Rates) -> float:
    return float(rates.max() / rates.min())


def _median(values: Rates) -> float:
    return float(np.median(values))


def _mesh(measured: Measured) -> Topology:
    n = measured.ranks
    pairs = measured.pairs
    latency = _median(measured.latency_us[pairs])
    rates = _classes(measured.alone, pairs)
    if len(np.unique(rates[pairs])) == 1:
        return Topology(f"discovered: full mesh of {n}", n, (), MeshLinks(n, float(rates[0, 1]), latency))
    links = tuple(Link(a, b, float(rates[a, b]), latency) for a, b in np.argwhere(pairs).tolist())
    return Topology(f"discovered: full mesh of {n}, unequal links", n, (), links)


def _classes(rates: Rates, pairs: NDArray[np.bool_]) -> Rates:
    """Each rate replaced by the median of those like it: sorted, a new class begins where there is a jump."""
    found = rates.copy()
    flat = np.sort(rates[pairs])
    starts = [0, *(np.flatnonzero(flat[1:] > _ALIKE * flat[:-1]) + 1), len(flat)]
    for start, stop in pairwise(starts):
        members = pairs & (rates >= flat[start]) & (rates <= flat[stop - 1])
        found[members] = _median(flat[start:stop])
    return found


def _switch(measured: Measured) -> Topology:
    n = measured.ranks
    pairs = measured.pairs
    rate, latency = _port(measured, pairs), _median(measured.latency_us[pairs]) / 2
    links = tuple(_star("switch0", range(n), rate, latency))
    return Topology(f"discovered: {n} on one switch", n, ("switch0",), links)


def _port(measured: Measured, among: NDArray[np.bool_]) -> float:
    """Rate of the ports through which the pairs `among` go, if these divide it; TopologyError if they do not."""
    alone = _median(measured.alone[among])
    shared = _median(np.array([row[mask].sum() for row, mask in zip(measured.together, among, strict=True)]))
    if not 1 / _APART < shared / alone < _APART:
        raise TopologyError(
            f"the measured bandwidths fit no topology known here: one rank alone reaches {alone:.4g} GB/s to a peer, "
            f"{shared:.4g} GB/s to all that seem to share its port; write a topology file"
        )
    return alone


def _star(switch: str, ranks: Sequence[int], rate: float, latency: float) -> list[Link]:
    ends = [(rank, switch) for rank in ranks] + [(switch, rank) for rank in ranks]
    return [Link(u, v, rate, latency) for u, v in ends]


def _groups(measured: Measured, own: NDArray[np.bool_]) -> list[list[int]] | None:
    """Equal parts of the ranks, inside which pairs are close: faster by a clear step, or with links of their own."""
    n = measured.ranks
    pairs = measured.pairs
    step = math.sqrt(float(measured.alone[pairs].min() * measured.alone[pairs].max()))
    for close in (measured.alone > step, own & pairs):
        parts: list[list[int]] = []
        for rank in range(n):
            part = next((part for part in parts if close[rank, part[0]]), None)
            if part is None:
                parts.append([rank])
            else:
                part.append(rank)
        inside = np.zeros((n, n), bool)
        for part in parts:
            inside[np.ix_(part, part)] = True
        equal = len(parts) > 1 and len({len(part) for part in parts}) == 1 and len(parts[0]) > 1
        if equal and (close == (inside & pairs))[pairs].all():
            return parts
    return None


def _nodes(measured: Measured, own: NDArray[np.bool_], groups: list[list[int]]) -> Topology:
    n, u, m = measured.ranks, len(groups), len(groups[0])
    inside = np.zeros((n, n), bool)
    for group in groups:
        inside[np.ix_(group, group)] = True
    outside = ~inside
    inside &= measured.pairs
    nic, far = _port(measured, outside), _median(measured.latency_us[outside]) / 2
    near = _median(measured.latency_us[inside])
    switches: tuple[str, ...] = ()
    if m == 2 or own[inside].mean() > 0.5:  # of two ranks a switch and a link are the same
        rate = _median(measured.alone[inside])
        links = [Link(a, b, rate, near) for a, b in np.argwhere(inside).tolist()]
    else:
        rate = _port(measured, inside)
        switches = tuple(f"switch{a}" for a in range(u))
        links = [link for a, group in enumerate(groups) for link in _star(switches[a], group, rate, near / 2)]
    links += _star("fabric", range(n), nic, far)
    kind = "a switch each" if switches else "a full mesh each"
    return Topology(f"discovered: {u} nodes of {m}, {kind}", n, (*switches, "fabric"), tuple(links))
