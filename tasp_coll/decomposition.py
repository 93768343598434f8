"""Topology -> rings: directed Hamiltonian cycles of the ranks that share the links evenly.

On a full mesh of n ranks the rings are link-disjoint directed Hamiltonian cycles ("orthogonal rings", TASP,
arXiv 2509.26541): n-1 of them use every link. n = 4 and 6 have no such n-1 cycles; there 2(n-1) rings of
half width use every link exactly twice. Behind a single switch a rank's own link is all it has, and one ring
fills it. Equal nodes are taken in turn, one ring for each NIC (`two_level`). The links of a torus whose sides are 3
or more make as many rings as a rank has links (`torus`). For any other topology a solver packs rings into the links
(`packing`).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from threading import Lock

import numpy as np

from tasp_coll import hamilton, packing, torus, two_level
from tasp_coll.errors import ArgumentError, ArgumentTypeError, ScheduleError, TopologyError
from tasp_coll.grids import sides_of
from tasp_coll.links import Node
from tasp_coll.nodes import Nodes, nodes_of
from tasp_coll.rings import Decomposition, Ring, equal_rings
from tasp_coll.topology import Topology

_MOST_PLACES = 1 << 25  # in all rings of a mesh: 5793 ranks on all of theirs, some GB


def decompose(topology: Topology, rings: int | None = None) -> tuple[Ring, ...]:
    """Rings that share the links of a topology as evenly as they can.

    `rings=None` uses all links: on a full mesh of n ranks n-1 disjoint rings (for n = 4 six and for n = 6
    ten, with every link on exactly two); behind a single switch one ring, which is already optimal, since a
    rank has one link out and the ring keeps it full at every step; on equal nodes of m ranks one ring for each
    NIC of a node (two for m = 3 and 5); on a torus of sides >= 3 one for each link of a rank. On any other topology
    rings are packed until they come within 2% (beyond 24 ranks 5%) of the narrowest cut between ranks, which no rings
    can beat, or the effort is spent; where links differ, each ring's weight is what its links can carry beside the
    others. At most 2(n-1) rings; hops lead over one link or over switches, over other ranks only where there is no
    other way. That needs the extra `solver`, unless one ring fills the narrowest cut, or the links differ from the
    forms above by little.

    `rings=k` takes k distinct rings, on a mesh, a switch, equal nodes, and a torus (there up to as many as None gives)
    of weight 1/k: disjoint where k disjoint ones exist (on a mesh up to n-1, but 2 for n = 4 and 4 for n = 6), else
    with at most two over one link of a mesh; elsewhere the best k that were found. One ring never needs the solver.
    Only those asked for are built, but for a torus.

    The same topology gives the same rings on every rank and machine (with the same release of ortools), and is
    worked out once in a process. Sources: see `tasp_coll.hamilton`, `two_level`, `torus`, `packing`, `ring_solver`,
    `widths` and `single_ring`.

    Raises ArgumentError for `rings` that is not an integer from 1 to the largest number (on a mesh and a switch n-1;
    6, 10 and 1 for n = 4, 6 and 1; on nodes what None gives; else 2(n-1)) or of which there are not so many,
    TopologyError where the solver is needed and missing, or where the rings of a mesh would not fit into memory.
    """
    return decomposition_of(topology, rings).rings


def ring_neighbours(topology: Topology, rank: int, rings: int | None = None) -> tuple[tuple[int, int], ...]:
    """(previous, next) of `rank` on each ring of `decompose(topology, rings)`.

    On a full mesh or a switch O(n + rings) for n ranks, without building all rings, against O(n * rings) for
    `decompose`. Raises as `decompose`, and ArgumentError for a rank that is not an integer from 0 to n-1.
    """
    n = topology.ranks
    count = _ring_count(topology, rings) if _is_even(topology) else 0
    rank = _checked_integer("rank", rank, 0, n - 1)
    if count and n not in (1, 4, 6):
        return tuple(hamilton.neighbours(n, rank, count))
    return tuple(hamilton.cycle_neighbours(ring.ranks, rank) for ring in decompose(topology, rings))


def decomposition_of(topology: Topology, rings: int | None = None) -> Decomposition:
    """`decompose(topology, rings)` with what it promises of the links. Raises as `decompose`."""
    if not _is_even(topology):
        return _uneven(topology, rings)
    n, count = topology.ranks, _ring_count(topology, rings)
    if n * count > _MOST_PLACES:
        raise TopologyError(f"{count} rings of {n} ranks are too many to hold: ask for at most {_MOST_PLACES // n}")
    if topology.is_single_switch:
        share = Fraction(1)  # every ring passes every port
    else:
        share = Fraction(1 if count <= max(hamilton.max_disjoint(n), 1) else 2, count)
    return Decomposition(_rings(n, count), share)


def check_decomposition(topology: Topology, rings: Sequence[Ring], share: Fraction | None = None) -> None:
    """Prove that `rings` decompose `topology`; ScheduleError names the first ring or link that breaks a rule.

    Every ring is a Hamiltonian cycle of the ranks, the weights are positive and add up to exactly 1, and no link is
    loaded above the promise: on a full mesh of n ranks it is on no more rings than k rings need (one where k disjoint
    rings exist, else the larger of two and k/(n-1) rounded up); elsewhere a link of the highest rate carries no
    more than `share` of a shard in a step, slower links in proportion. share: None for what `decompose` promises for
    so many rings, which raises as `decompose`.
    """
    n = topology.ranks
    for index, ring in enumerate(rings):
        if not hamilton.is_hamiltonian_cycle(ring.ranks, n):
            raise ScheduleError(f"a ring must visit each of the {n} ranks exactly once", ring=index)
        if ring.weight <= 0:
            raise ScheduleError(f"a ring's weight must be positive, got {ring.weight}", ring=index)
    total = sum((ring.weight for ring in rings), Fraction(0))
    if total != 1:
        raise ScheduleError(f"the weights of {len(rings)} rings must add up to 1, got {total}")
    if n == 1 or topology.is_single_switch:
        return  # any ring loads every port alike
    if topology.is_full_mesh:
        _check_links(n, [ring.ranks for ring in rings])
    else:
        _check_loads(topology, rings, decomposition_of(topology, len(rings)).share if share is None else share)


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


def _check_loads(topology: Topology, rings: Sequence[Ring], share: Fraction) -> None:
    """ScheduleError where a link carries more than its part of `share` in a step."""
    users: dict[tuple[Node, Node], list[int]] = {}
    for index, ring in enumerate(rings):
        for src, dst in zip(ring.ranks, ring.ranks[1:] + ring.ranks[:1], strict=True):
            for link in topology.path(src, dst):
                users.setdefault(link, []).append(index)
    highest = max(link.GBps for link in topology.links)
    for (u, v), used in users.items():
        load = sum((rings[index].weight for index in used), Fraction(0))
        limit = share * Fraction(str(topology.GBps(u, v))) / Fraction(str(highest))
        if load > limit:
            raise ScheduleError(
                f"link {u} -> {v} carries {load} of a shard, its share is {limit}: it is on rings {used}", ring=used[0]
            )


def _is_even(topology: Topology) -> bool:
    """All links alike, from each rank to each: a full mesh, a single switch, or one rank alone."""
    return topology.ranks == 1 or topology.is_full_mesh or topology.is_single_switch


def _ring_count(topology: Topology, rings: int | None) -> int:
    """How many rings a full mesh or a single switch gets."""
    n = topology.ranks
    # A full mesh of 4 or 6 has a double cover in place of n-1 disjoint rings; one rank alone is a ring.
    limit = 2 * n - 2 if n in (4, 6) else max(n - 1, 1)
    if rings is None:
        return limit if topology.is_full_mesh else 1
    return _checked_count(topology, rings, limit)


def _checked_count(topology: Topology, rings: int, limit: int) -> int:
    return _checked_integer("rings", rings, 1, limit, f" for {topology.ranks} ranks, or None")


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


@lru_cache(maxsize=4)
def _rings(n: int, count: int) -> tuple[Ring, ...]:
    if n == 1:
        return equal_rings([(0,)])
    return equal_rings(hamilton.double_cover(n)[:count] if n in (4, 6) else hamilton.directed_cycles(n, count))


def _uneven(topology: Topology, rings: int | None) -> Decomposition:
    """Of any topology but a full mesh or a single switch; each is worked out once, ranks in threads wait for it."""
    known = _Known(topology.fingerprint, topology)
    with _LOCK:
        nodes = _nodes(known)
        limit = two_level.largest_count(nodes) if nodes else packing.largest_count(topology.ranks)
        count = None if rings is None else _checked_count(topology, rings, limit)
        if nodes:
            return _two_level(known, limit if count is None else count)
        sides = _sides(known)
        if sides and (count is None or count <= torus.largest_count(sides)):
            found = torus.decompose_torus(sides, count or torus.largest_count(sides))
            if found is not None:
                return found
        if count is None or (count > 1 and len(_packed(known, None).rings) == count):
            return _packed(known, None)
        return _packed(known, count)


@dataclass(frozen=True)
class _Known:
    """A topology as a key: what it is called does not matter."""

    fingerprint: str
    topology: Topology = field(compare=False)


_LOCK = Lock()


@lru_cache(maxsize=64)
def _nodes(known: _Known) -> Nodes | None:
    """The nodes of a topology whose rings have a closed form."""
    nodes = nodes_of(known.topology)
    return nodes if nodes and two_level.decompose_nodes(nodes, 1) else None


@lru_cache(maxsize=64)
def _sides(known: _Known) -> tuple[int, ...] | None:
    """The sides of a torus whose rings are known."""
    sides = sides_of(known.topology)
    return sides if sides and torus.has_rings(sides) else None


@lru_cache(maxsize=64)
def _two_level(known: _Known, count: int) -> Decomposition:
    nodes = _nodes(known)
    found = two_level.decompose_nodes(nodes, count) if nodes else None
    assert found is not None
    return found


@lru_cache(maxsize=64)
def _packed(known: _Known, count: int | None) -> Decomposition:
    return packing.pack_all(known.topology) if count is None else packing.pack_some(known.topology, count)
