"""How much each link of a topology carries in a step of a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasp_coll.links import Node
from tasp_coll.patterns import Rows
from tasp_coll.schedule import Schedule
from tasp_coll.topology import Topology

Direction = tuple[Node, Node]


@dataclass(frozen=True)
class StepLoad:
    """Loads of the links that a step uses, in the unit of the amounts. Of a full mesh `names` are src * n + dst."""

    topology: Topology
    names: NDArray[np.int64] | tuple[Direction, ...]
    load: NDArray[np.int64]

    @property
    def links(self) -> tuple[Direction, ...]:
        """The links, in the order of `load`."""
        return tuple(self.link(index) for index in range(len(self.load)))

    def link(self, index: int) -> Direction:
        """One of the links."""
        if isinstance(self.names, tuple):
            return self.names[index]
        return divmod(int(self.names[index]), self.topology.ranks)

    def limits(self, share: float) -> NDArray[np.float64]:
        """`share` for links of the highest rate in the topology, less in proportion for slower ones."""
        if self.topology.is_full_mesh or self.topology.is_single_switch:
            return np.full(len(self.load), share)
        rates = np.array([self.topology.GBps(u, v) for u, v in self.links])
        return share * rates / max(link.GBps for link in self.topology.links)

    def worst(self, share: float) -> int | None:
        """Index of a link that carries more than its share, if there is one."""
        over = np.flatnonzero(self.load > self.limits(share) * (1 + 1e-9))
        return int(over[0]) if len(over) else None


def chunk_units(schedule: Schedule) -> tuple[int, NDArray[np.int64]]:
    """A common denominator of the weights, and each chunk's weight in that unit."""
    unit = min(math.lcm(*(weight.denominator for weight in set(schedule.weights))), 1 << 52)  # or as good as exact
    return unit, np.array([int(weight * unit) for weight in schedule.weights], np.int64)


def step_load(topology: Topology, rows: Rows, amount: NDArray[np.int64]) -> StepLoad:
    """Add `amount` of each transfer to every link on its path."""
    if topology.is_full_mesh:
        names = rows[:, 0] * topology.ranks + rows[:, 1]
        if 8 * len(rows) < topology.ranks**2:  # few links in use
            few, where = np.unique(names, return_inverse=True)
            return StepLoad(topology, few, np.bincount(where, amount, len(few)).astype(np.int64))
        dense = np.bincount(names, amount, topology.ranks**2)
        used = np.flatnonzero(dense)
        return StepLoad(topology, used, dense[used].astype(np.int64))
    total: dict[Direction, int] = {}
    for (src, dst), part in zip(rows[:, :2].tolist(), amount.tolist(), strict=True):
        for link in topology.path(src, dst):
            total[link] = total.get(link, 0) + part
    return StepLoad(topology, tuple(total), np.array(list(total.values()), np.int64))


def user_of(topology: Topology, rows: Rows, link: Direction) -> int:
    """Index of the first transfer whose path has the link."""
    return next(i for i, (src, dst, *_) in enumerate(rows.tolist()) if link in topology.path(src, dst))
