"""AllGather over several nodes: a ring of nodes along each rail, pipelined with the distribution inside the nodes.

Rank p of node a gathers the shards of the ranks p of all nodes on a ring of nodes (its rail), slice by slice, and
hands every slice on to its own node as soon as it has it. A shard crosses a NIC u-1 times for u nodes, which no
schedule betters, where rings over all ranks cross it (mu-1)/m times. It is NCCL's and MPI's two-level gather, with
both levels under way at once; derived here from the cut bound.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np

from tasp_coll.nodes import Nodes
from tasp_coll.patterns import Rows, as_rows

RAIL, OWN, OTHERS = range(3)  # the `ring` of its transfers: along the rail, a rank's own shard, what the rail brought
_SLICE = 1 << 15  # bytes below which a slice costs more than it hides
MOST_SLICES = 16


def slices_for(shard_bytes: int) -> int:
    """How many slices a shard is cut into: more hide the distribution better, until messages get small."""
    return min(max(shard_bytes // _SLICE, 1), MOST_SLICES)


@dataclass(frozen=True)
class HierarchicalPattern:
    """The AllGather; `groups[a][p]` is rank p of node a.

    At step t*slices + s every rank sends slice s of the shard that started t nodes before it to the next node of its
    rail, and one step later hands it on to its own node. Its own shard leaves for its node evenly over all steps.
    """

    groups: tuple[tuple[int, ...], ...]
    slices: int

    @property
    def steps(self) -> int:
        return (len(self.groups) - 1) * self.slices + 1

    @cached_property
    def grid(self) -> Rows:
        """The groups as an (u, m) array."""
        return np.array(self.groups, dtype=np.int64)

    @cached_property
    def place(self) -> Rows:
        """place[r]: node and position of rank r."""
        u, m = self.grid.shape
        found = np.empty((u * m, 2), np.int64)
        found[self.grid.ravel()] = np.indices((u, m)).reshape(2, -1).T
        return found

    @cached_property
    def moves_inside(self) -> Rows:
        """Rows (step, distance in positions, distance in nodes of the origin, slice, ring), by step: what a rank sends
        inside its node."""
        _, m = self.grid.shape
        ahead = np.arange(1, m)
        part = np.arange(self.slices)[:, None]
        number = part * (m - 1) + ahead - 1
        own = as_rows(number * self.steps // (self.slices * (m - 1)), ahead, 0, part, OWN)
        step = np.arange(self.steps - 1)[:, None]
        others = as_rows(step + 1, ahead, step // self.slices + 1, step % self.slices, OTHERS)
        both = np.concatenate([own, others])
        return both[np.argsort(both[:, 0], kind="stable")]

    @cached_property
    def moves_along(self) -> Rows:
        """Rows as of `moves_inside`: what a rank sends along its rail."""
        step = np.arange(self.steps - 1)
        return as_rows(step, 0, step // self.slices, step % self.slices, RAIL)

    def transfers(self, step: int) -> Rows:
        node, position = self.place.T[:, :, None]
        along = self.moves_along[step : step + 1]  # one in every step but the last
        first, last = np.searchsorted(self.moves_inside[:, 0], (step, step + 1))
        inside = self.moves_inside[first:last]
        return np.concatenate([self._sent(node, position, 1, along), self._sent(node, position, 0, inside)])

    def _sent(self, node: Rows, position: Rows, nodes_ahead: int, moves: Rows) -> Rows:
        """Rows (src, dst, origin, chunk, ring) of what the ranks at those places send."""
        u, m = self.grid.shape
        _, ahead, back, part, ring = moves.T
        to = self.grid[(node + nodes_ahead) % u, (position + ahead) % m]
        return as_rows(self.grid[node, position], to, self.grid[(node - back) % u, position], part, ring)

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        u, m = self.grid.shape
        a, p = self.place[rank]
        both = np.concatenate([np.insert(self.moves_along, 0, 1, axis=1), np.insert(self.moves_inside, 0, 0, axis=1)])
        both = both[np.argsort(both[:, 1], kind="stable")]
        nodes, step, ahead, back, part, ring = both.T
        sends = as_rows(step, self.grid[(a + nodes) % u, (p + ahead) % m], self.grid[(a - back) % u, p], part, ring)
        before, beside = (a - nodes) % u, (p - ahead) % m
        origin = self.grid[(before - back) % u, beside]
        return sends, as_rows(step, self.grid[before, beside], origin, part, ring)

    def kinds_of_steps(self) -> list[int]:
        """One step of each kind: steps that are alike in what they send inside and along load the links alike."""
        inside = np.stack([np.bincount(self._steps_of(ring), minlength=self.steps) for ring in (OWN, OTHERS)])
        along = np.arange(self.steps) < self.steps - 1
        _, first = np.unique(np.vstack([inside, along]), axis=1, return_index=True)
        return [int(step) for step in first]

    def _steps_of(self, ring: int) -> Rows:
        return self.moves_inside[self.moves_inside[:, 4] == ring, 0]


def capacity_share(nodes: Nodes, slices: int) -> Fraction:
    """What a link of the highest rate carries of a shard in a step, if each carries in proportion to its rate.

    In a step a NIC carries one slice; inside, a link of a mesh at most one of a rank's own and one that its rail
    brought, and a switch's port those for all peers.
    """
    u, m = nodes.count, nodes.size
    steps = (u - 1) * slices + 1
    own = -(-slices * (m - 1) // steps)
    inside = own + m - 1 if nodes.switched else min(own, 1) + 1
    rates = Fraction(nodes.inside_GBps), Fraction(nodes.nic_GBps)
    return Fraction(1, slices) * max(inside / rates[0], 1 / rates[1]) * max(rates)
