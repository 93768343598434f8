"""Directed Hamiltonian cycles of the complete digraph K*_n, each construction beside its predicate.

K*_n has one arc each way between every two of its n vertices 0..n-1: the links of a full mesh. Its n(n-1)
arcs split into n-1 directed Hamiltonian cycles for every n except 4 and 6 (Tillson, "A Hamiltonian
decomposition of K*_2m, 2m >= 8", J. Combin. Theory B 29, 1980; the two exceptions: Bermond and Faber,
"Decomposition of the complete directed graph into k-circuits", J. Combin. Theory B 21, 1976). TASP (arXiv
2509.26541) runs ring attention on such cycles.

Both constructions rotate a zigzag on Z_N, N even: z = 0, 1, -1, 2, -2, ..., N/2, whose N-1 differences are
all distinct (Walecki, in Lucas, "Recreations mathematiques" II, 1892; Alspach, "The wonderful Walecki
construction", 2008).

* n odd, N = n-1: *turn* i is the cycle A, z_0+i, ..., z_{N-1}+i with A = N. All N turns: that is it.
* n even, N = n-2: take the turns on Z_N and A = N. In each, one arc x -> y makes a detour x -> B -> y with
  B = N+1. The N arcs that this leaves free form a Hamiltonian path on the other n-1 vertices, which B closes
  to the last cycle. Which arc makes the detour is a rule that was found by search, not taken from Tillson;
  that its path is Hamiltonian, which proves the cycles disjoint, is checked whenever it is built.

*Place* p of a turn is its p-th vertex, counted from A at place 0; arc p leads from place p to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tasp_coll.errors import ArgumentError, ScheduleError

Cycle = tuple[int, ...]
Integers = NDArray[np.int64]

# Every arc lies on exactly two cycles; the first n-2 cycles are arc-disjoint, and no n-1 can be.
_DOUBLE_COVERS: dict[int, tuple[str, ...]] = {
    4: ("0123", "0321", "0132", "0231", "0213", "0312"),
    6: (
        *("012345", "031542", "043251", "052413"),
        *("013524", "023514", "025341", "032145", "042153", "054312"),
    ),
}


def max_disjoint(n: int) -> int:
    """The most arc-disjoint directed Hamiltonian cycles in K*_n, n >= 2: n-1; 2 for n = 4 and 4 for n = 6."""
    return n - 2 if n in _DOUBLE_COVERS else n - 1


def directed_cycles(n: int, count: int | None = None) -> list[Cycle]:
    """The first `count` (None: all n-1) of n-1 arc-disjoint directed Hamiltonian cycles of K*_n.

    >>> directed_cycles(5)
    [(4, 0, 1, 3, 2), (4, 1, 2, 0, 3), (4, 2, 3, 1, 0), (4, 3, 0, 2, 1)]

    Zigzag turns for odd n, turns with a detour for even n (see the module). Costs O(n) per cycle.
    ArgumentError: n < 2, n = 4 or 6 (use `double_cover`), or count not in 1..n-1.
    """
    count = _checked_count(n, count)
    if n == 2:
        return [(0, 1)]
    modulus = _modulus(n)
    half = modulus // 2
    # z_0+i, z_2+i, ... falls from i, z_1+i, z_3+i, ... rises from i+1: slices, which share their integers.
    rising = tuple(range(modulus)) * 2
    falling = rising[::-1]
    detours = _detours(n).tolist() if n % 2 == 0 else []
    cycles = []
    for turn in range(min(count, modulus)):
        cycle = [modulus] * (modulus + 1)
        cycle[1::2] = falling[modulus - 1 - turn : modulus - 1 - turn + half]
        cycle[2::2] = rising[turn + 1 : turn + 1 + half]
        if detours:
            cycle.insert(detours[turn] + 1, n - 1)
        cycles.append(tuple(cycle))
    if count > modulus:
        cycles.append(_last_cycle(n))
    return cycles


def neighbours(n: int, vertex: int, count: int | None = None) -> list[tuple[int, int]]:
    """(previous, next) of `vertex` on each cycle of `directed_cycles(n, count)`, without building the cycles.

    O(1) per cycle; for even n the last cycle, where asked for, costs O(n). ArgumentError as
    `directed_cycles`, and for a vertex not in 0..n-1.
    """
    count = _checked_count(n, count)
    if not 0 <= vertex < n:
        raise ArgumentError(f"vertex must be in 0..{n - 1} (n = {n}), got {vertex}")
    if n == 2:
        return [(1 - vertex, 1 - vertex)]
    modulus = _modulus(n)
    turns = np.arange(min(count, modulus))
    if vertex > modulus:  # B
        before, after = _detour_ends(n, turns)
    else:
        places = _place(modulus, turns, vertex)
        before, after = _at(modulus, turns, places - 1), _at(modulus, turns, places + 1)
        if n % 2 == 0:
            detours = _detours(n)[turns]
            before[(places - 1) % (modulus + 1) == detours] = n - 1
            after[places == detours] = n - 1
    pairs = list(zip(before.tolist(), after.tolist(), strict=True))
    if count > modulus:
        pairs.append(cycle_neighbours(_last_cycle(n), vertex))
    return pairs


def double_cover(n: int) -> list[Cycle]:
    """For n = 4 or 6: 2(n-1) distinct directed Hamiltonian cycles of K*_n, every arc on exactly two of them.

    At half the width each they load all arcs equally, which no n-1 cycles can. The first n-2 of them are
    arc-disjoint, the most there are. For n = 4 they are all there are. ArgumentError: any other n.
    """
    if n not in _DOUBLE_COVERS:
        raise ArgumentError(f"n must be 4 or 6 for a double cover (others have n-1 disjoint cycles), got {n}")
    return [tuple(map(int, cycle)) for cycle in _DOUBLE_COVERS[n]]


def is_hamiltonian_cycle(cycle: Sequence[int], n: int) -> bool:
    """Whether `cycle` names each of the vertices 0..n-1 exactly once (its last leads back to its first)."""
    return len(cycle) == n and set(cycle).issuperset(range(n))


def are_arc_disjoint(cycles: Sequence[Sequence[int]], n: int) -> bool:
    """Whether no arc lies on two of the cycles (or twice on one). ArgumentError as `arc_counts`."""
    return arc_multiplicity(cycles, n) <= 1


def arc_multiplicity(cycles: Sequence[Sequence[int]], n: int) -> int:
    """The largest number of cycles over one arc. ArgumentError as `arc_counts`."""
    return int(arc_counts(cycles, n).max(initial=0))


def arc_counts(cycles: Sequence[Sequence[int]], n: int) -> Integers:
    """An (n, n) array: how often the cycles, k sequences of n vertices each, use the arc from row to column.

    ArgumentError: a cycle that does not have n vertices, or a vertex not in 0..n-1.
    """
    wrong = next((len(cycle) for cycle in cycles if len(cycle) != n), n)
    if wrong != n:
        raise ArgumentError(f"cycles must have n = {n} vertices each, got one of {wrong}")
    tails = np.array(cycles, dtype=np.int64).reshape(len(cycles), n)
    if tails.size and not 0 <= tails.min() <= tails.max() < n:
        raise ArgumentError(f"cycles must name vertices in 0..{n - 1}, got {tails.min()}..{tails.max()}")
    arcs = tails * n + np.roll(tails, -1, axis=1)
    return np.bincount(arcs.ravel(), minlength=n * n).reshape(n, n)


def cycle_neighbours(cycle: Sequence[int], vertex: int) -> tuple[int, int]:
    """(previous, next) of `vertex` on a cycle that holds it once."""
    place = cycle.index(vertex)
    return cycle[place - 1], cycle[(place + 1) % len(cycle)]


def _checked_count(n: int, count: int | None) -> int:
    if n in _DOUBLE_COVERS:
        raise ArgumentError(
            f"n must not be 4 or 6: only {n - 2} of {n - 1} arc-disjoint directed Hamiltonian cycles exist "
            f"(Bermond and Faber 1976; double_cover gives {2 * n - 2} of half width), got {n}"
        )
    if n < 2:
        raise ArgumentError(f"n must be at least 2 for a directed cycle, got {n}")
    if count is not None and not 1 <= count < n:
        raise ArgumentError(f"count must be in 1..{n - 1} (n = {n}), got {count}")
    return n - 1 if count is None else count


def _modulus(n: int) -> int:
    """N: the zigzag takes all vertices but A, for even n all but A and B."""
    return n - 1 if n % 2 else n - 2


def _at(modulus: int, turns: Integers, places: Integers) -> Integers:
    """The vertex at a place (mod N+1) of each turn."""
    index = places % (modulus + 1) - 1  # of the zigzag; -1: A
    zigzag = np.where(index % 2 == 1, (index + 1) // 2, -(index // 2))
    return np.where(index < 0, modulus, (zigzag + turns) % modulus)


def _place(modulus: int, turns: Integers, vertex: int) -> Integers:
    """The place of a vertex other than B in each turn: the inverse of `_at`."""
    if vertex == modulus:
        return np.zeros_like(turns)
    value = (vertex - turns) % modulus
    return np.where((value > 0) & (value <= modulus // 2), 2 * value, 2 * (-value % modulus) + 1)


def _detours(n: int) -> Integers:
    """For even n >= 8, the arc of each turn that makes the detour through B."""
    modulus = n - 2
    half = modulus // 2
    if n % 4 == 0:
        q = (modulus - 2) // 4
        detours = np.full(modulus, 2 * q - 1)
        detours[[0, q + 1, half + 1, half + q + 1]] = 0, modulus - 1, 2, modulus - 3
    else:
        detours = np.tile([1, 5], half)
        detours[[0, 2, half, half + 1]] = modulus - 2, modulus - 4, modulus, modulus - 1
    return detours


def _detour_ends(n: int, turns: Integers) -> tuple[Integers, Integers]:
    """For even n >= 8, tails and heads of the arcs that make the detours of `turns`."""
    modulus, detours = _modulus(n), _detours(n)[turns]
    return _at(modulus, turns, detours), _at(modulus, turns, detours + 1)


def _last_cycle(n: int) -> Cycle:
    """For even n >= 8: B, then the path of the arcs that the detours leave free."""
    tails, heads = _detour_ends(n, np.arange(_modulus(n)))
    return (n - 1, *_hamiltonian_path(tails.tolist(), heads.tolist()))


def _hamiltonian_path(tails: list[int], heads: list[int]) -> list[int]:
    """The vertices 0..len(tails) in the order of the path that the arcs tail -> head form.

    ScheduleError: they do not form a Hamiltonian path. One start means that the heads are distinct, so that
    the walk meets no vertex twice: its length proves it.
    """
    size = len(tails) + 1
    follow = dict(zip(tails, heads, strict=True))
    starts = set(range(size)).difference(heads)
    path = [*starts]
    while len(starts) == 1 and path[-1] in follow:
        path.append(follow[path[-1]])
    if len(starts) != 1 or len(path) != size:
        raise ScheduleError(f"the free arcs must form a Hamiltonian path on {size} vertices, and do not")
    return path
