"""How much each link of a topology carries in a step of a schedule."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tasp_coll.patterns import Rows
from tasp_coll.schedule import Schedule
from tasp_coll.topology import Node, Topology


@dataclass(frozen=True)
class StepLoad:
    """Loads of the links that a step uses, in units of 1/`unit` of a shard; `rows[i]` are the transfers counted."""

    links: list[tuple[Node, Node]]
    load: NDArray[np.int64]
    users: NDArray[np.int64]

    def worst(self, limit: NDArray[np.float64]) -> tuple[int, int] | None:
        """(link index, transfer index) of a link that carries more than its limit."""
        over = np.flatnonzero(self.load > limit * (1 + 1e-9))
        return (int(over[0]), int(self.users[over[0]])) if len(over) else None


def chunk_units(schedule: Schedule) -> tuple[int, NDArray[np.int64]]:
    """A common denominator of the weights and each chunk's weight in that unit."""
    unit = int(np.lcm.reduce([weight.denominator for weight in schedule.weights]))
    return unit, np.array([int(weight * unit) for weight in schedule.weights], dtype=np.int64)


def step_load(topology: Topology, rows: Rows, amount: NDArray[np.int64]) -> StepLoad:
    """Add `amount` of each transfer to every link on its path. Raises ScheduleError where there is no path."""
    if topology.is_full_mesh:
        codes = rows[:, 0] * topology.ranks + rows[:, 1]
        used, first, where = np.unique(codes, return_index=True, return_inverse=True)
        links: list[tuple[Node, Node]] = [divmod(code, topology.ranks) for code in used.tolist()]
        return StepLoad(links, np.bincount(where, amount, len(used)).astype(np.int64), first)
    total: dict[tuple[Node, Node], int] = {}
    user: dict[tuple[Node, Node], int] = {}
    for index, ((src, dst, *_), part) in enumerate(zip(rows.tolist(), amount.tolist(), strict=True)):
        for link in topology.path(src, dst):
            total[link] = total.get(link, 0) + part
            user.setdefault(link, index)
    return StepLoad(list(total), np.array(list(total.values()), np.int64), np.array(list(user.values()), np.int64))


def link_limits(topology: Topology, links: list[tuple[Node, Node]], share: float) -> NDArray[np.float64]:
    """`share` of a shard for links of the highest rate in use, less in proportion for slower ones."""
    if topology.is_full_mesh or topology.is_single_switch:
        return np.full(len(links), share)
    rates = np.array([topology.GBps(u, v) for u, v in links])
    return share * rates / max(link.GBps for link in topology.links)
