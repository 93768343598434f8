"""Topology -> rings: directed Hamiltonian cycles of the ranks that share the links evenly.

On a full mesh of n ranks the rings are link-disjoint directed Hamiltonian cycles ("orthogonal rings", TASP,
arXiv 2509.26541): n-1 of them use every link. n = 4 and 6 have no such n-1 cycles; there 2(n-1) rings of
half width use every link exactly twice. Behind a single switch a rank's own link is all it has, and one ring
fills it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

from tasp_coll import hamilton
from tasp_coll.errors import ArgumentError, ArgumentTypeError, ScheduleError, TopologyError
from tasp_coll.topology import Topology


@dataclass(frozen=True, slots=True)
class Ring:
    """One directed cycle over all ranks: each sends to the next in `ranks`, the last to the first.

    `weight` is the share of every rank's shard that travels on it; a decomposition's weights add up to 1.
    """

    ranks: tuple[int, ...]
    weight: Fraction

    def reversed(self) -> Ring:
        """The same ring in the opposite direction, from the same first rank."""
        return Ring(self.ranks[:1] + self.ranks[:0:-1], self.weight)


def decompose(topology: Topology, rings: int | None = None) -> tuple[Ring, ...]:
    """Rings of equal weight for a full mesh of equal links or a single switch.

    `rings=None` uses all links: on a full mesh of n ranks n-1 disjoint rings (for n = 4 six and for n = 6
    ten, with every link on exactly two); behind a single switch one ring, which is already optimal, since a
    rank has one link out and the ring keeps it full at every step. `rings=k` takes k rings of weight 1/k, the
    same on a mesh and behind a switch: disjoint where k disjoint ones exist (up to n-1, but 2 for n = 4 and 4
    for n = 6), else distinct and at most two over one link. Only those asked for are built.

    Sources: see `tasp_coll.hamilton`. Raises ArgumentError for `rings` that is not an integer from 1 to the
    largest number (n-1; 6, 10 and 1 for n = 4, 6 and 1), TopologyError for any other kind of topology.
    """
    return _rings(topology.ranks, _ring_count(topology, rings))


def ring_neighbours(topology: Topology, rank: int, rings: int | None = None) -> tuple[tuple[int, int], ...]:
    """(previous, next) of `rank` on each ring of `decompose(topology, rings)`, without building all of them.

    O(n + rings) for n ranks, against O(n * rings) for `decompose`. Raises as `decompose`, and ArgumentError
    for a rank that is not an integer from 0 to n-1.
    """
    n, count = topology.ranks, _ring_count(topology, rings)
    rank = _checked_integer("rank", rank, 0, n - 1)
    if n in (1, 4, 6):
        return tuple(hamilton.cycle_neighbours(cycle, rank) for cycle in _cycles(n, count))
    return tuple(hamilton.neighbours(n, rank, count))


def check_decomposition(topology: Topology, rings: Sequence[Ring]) -> None:
    """Prove that `rings` decompose `topology`; ScheduleError names the first ring or link that breaks a rule.

    Every ring is a Hamiltonian cycle of the ranks, the weights are positive and add up to exactly 1, and on
    a full mesh of n ranks no link is on more rings than k rings need: one where k disjoint rings exist, else
    the larger of two and k/(n-1) rounded up. TopologyError for a topology that `decompose` refuses.
    """
    _require_known(topology)
    n = topology.ranks
    for index, ring in enumerate(rings):
        if not hamilton.is_hamiltonian_cycle(ring.ranks, n):
            raise ScheduleError(f"a ring must visit each of the {n} ranks exactly once", ring=index)
        if ring.weight <= 0:
            raise ScheduleError(f"a ring's weight must be positive, got {ring.weight}", ring=index)
    total = sum((ring.weight for ring in rings), Fraction(0))
    if total != 1:
        raise ScheduleError(f"the weights of {len(rings)} rings must add up to 1, got {total}")
    if topology.is_full_mesh and n > 1:
        _check_links(n, [ring.ranks for ring in rings])


def _check_links(n: int, cycles: list[tuple[int, ...]]) -> None:
    """ScheduleError where a link of a full mesh is on more of the cycles than that many cycles need."""
    k = len(cycles)
    allowed = 1 if k <= hamilton.max_disjoint(n) else max(2, -(-k // (n - 1)))
    counts = hamilton.arc_counts(cycles, n)
    tail, head = map(int, np.unravel_index(counts.argmax(), counts.shape))
    if counts[tail, head] > allowed:
        users = [i for i, cycle in enumerate(cycles) if hamilton.cycle_neighbours(cycle, tail)[1] == head]
        raise ScheduleError(
            f"link {tail} -> {head} is on rings {users}; of {k} at most {allowed} may be",
            rank=tail,
            ring=users[allowed],
        )


def _require_known(topology: Topology) -> None:
    if not (topology.ranks == 1 or topology.is_full_mesh or topology.is_single_switch):
        raise TopologyError(
            f"topology {topology.name!r}: only full meshes of equal links and single switches can be "
            "decomposed by this version"
        )


def _ring_count(topology: Topology, rings: int | None) -> int:
    """How many rings `decompose` gives; checks both arguments."""
    _require_known(topology)
    n = topology.ranks
    # A full mesh of 4 or 6 has a double cover in place of n-1 disjoint rings; one rank alone is a ring.
    limit = 2 * n - 2 if n in (4, 6) else max(n - 1, 1)
    if rings is None:
        return limit if topology.is_full_mesh else 1
    return _checked_integer("rings", rings, 1, limit, f" for {n} ranks, or None")


def _checked_integer(name: str, value: int, low: int, high: int, note: str = "") -> int:
    rule = f"{name} must be an integer from {low} to {high}{note}"
    if isinstance(value, bool):
        raise ArgumentTypeError(f"{rule}, got {value!r}")
    try:
        number = operator.index(value)
    except TypeError:
        raise ArgumentTypeError(f"{rule}, got {value!r}") from None
    if not low <= number <= high:
        raise ArgumentError(f"{rule}, got {number}")
    return number


def _cycles(n: int, count: int) -> list[tuple[int, ...]]:
    if n == 1:
        return [(0,)]
    return hamilton.double_cover(n)[:count] if n in (4, 6) else hamilton.directed_cycles(n, count)


@lru_cache(maxsize=4)
def _rings(n: int, count: int) -> tuple[Ring, ...]:
    weight = Fraction(1, count)
    return tuple(Ring(cycle, weight) for cycle in _cycles(n, count))
