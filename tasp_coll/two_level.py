"""Rings for u equal nodes of m ranks, in closed form: every NIC and every link inside the nodes equally loaded.

A *path system* is m Hamiltonian paths of K*_m that use every arc once, each vertex the start of one and the end of
one. Ring p is path p of each node in turn, joined over the fabric: every NIC then carries one ring out and one in.
Path systems are the row-complete Latin squares of Williams ("Experimental designs balanced for the estimation of
residual effects of treatments", 1949), and the same as decompositions of K*_{m+1} with one vertex taken out, so there
are none for m = 3 and 5. There 2m paths use every arc twice, which is Williams's design for odd m: rings of half width,
two for each NIC.

Where every NIC has a fabric switch of its own (rails), a path must start where that of the node before ended. Every
other node takes its paths backwards; for an odd number of nodes three of them number their vertices so that the maps
from start to end cancel. For m = 2 they cannot, and for m = 10, 14, ... no such numbering is known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

from tasp_coll import hamilton
from tasp_coll.nodes import Nodes
from tasp_coll.rings import Decomposition, equal_rings

Paths = list[tuple[int, ...]]

# A path system of K*_6 whose map from start to end is two cycles of 3; found by search. Williams's is odd, so that no
# three of its kind cancel.
_SIX = ("045321", "140352", "234150", "305124", "431025", "542013")


def largest_count(nodes: Nodes) -> int:
    """How many rings use all links: one for each NIC, two where nodes have 3 or 5 ranks."""
    return nodes.size * _layers(nodes.size)


def decompose_nodes(nodes: Nodes, count: int) -> Decomposition | None:
    """`count` of the `largest_count(nodes)` rings, of equal weight; None if they cannot keep to the rails."""
    m, u = nodes.size, nodes.count
    routes = _along_rails(m, u)
    if routes is None:
        if nodes.rails:
            return None
        paths = path_system(m)
        routes = [[path] * u for path in paths]
    rings = [
        [group[v] for group, path in zip(nodes.groups, route, strict=True) for v in path] for route in routes[:count]
    ]
    return Decomposition(equal_rings(rings), _share(nodes, count))


def path_system(m: int) -> Paths:
    """m Hamiltonian paths of K*_m, m >= 2, that use every arc once; for m = 3 and 5, 2m that use every arc twice.

    Path p starts at vertex p modulo m, and of every m in turn each vertex is the end of one.

    >>> path_system(4)
    [(0, 1, 3, 2), (1, 2, 0, 3), (2, 3, 1, 0), (3, 0, 2, 1)]
    """
    if m % 2 and m > 5:
        # Where the last vertex is taken out of m+1, ends follow starts in one cycle of all m (`_cycles` checks it).
        cycles = (cycle * 2 for cycle in hamilton.directed_cycles(m + 1))
        return sorted(cycle[cycle.index(m) + 1 :][:m] for cycle in cycles)
    zigzag = [-(i // 2) if i % 2 == 0 else i // 2 + 1 for i in range(m)]
    return [tuple((sign * z + i) % m for z in zigzag) for sign in (1, -1)[: _layers(m)] for i in range(m)]


def is_path_system(paths: Sequence[Sequence[int]], m: int) -> bool:
    """Whether the paths are Hamiltonian, use all arcs of K*_m alike, and start and end everywhere alike."""
    times, rest = divmod(len(paths), m)
    arcs = sorted(arc for path in paths for arc in pairwise(path))
    everywhere = sorted(list(range(m)) * times)
    return (
        rest == 0
        and times > 0
        and all(hamilton.is_hamiltonian_cycle(path, m) for path in paths)
        and arcs == sorted([(a, b) for a in range(m) for b in range(m) if a != b] * times)
        and sorted(path[0] for path in paths) == sorted(path[-1] for path in paths) == everywhere
    )


def _layers(m: int) -> int:
    return 2 if m in (3, 5) else 1


def is_known(nodes: Nodes) -> bool:
    """Whether there are rings in closed form, which keep to the rails."""
    return not nodes.rails or _along_rails(nodes.size, nodes.count) is not None


def loads(nodes: Nodes, count: int) -> tuple[Fraction, Fraction]:
    """What a step of `count` rings brings of a shard over the busiest link, or port of a switch, inside and NIC."""
    m = nodes.size
    if nodes.switched:  # all rings but those that end at the rank
        inside = Fraction(count - count // m, count)
    else:
        inside = Fraction(min(count, _layers(m)), count)
    return inside, Fraction(-(-count // m), count)


def _share(nodes: Nodes, count: int) -> Fraction:
    """What a ring's width makes of the busiest links: a NIC, one link inside, or a port of the switch inside."""
    inside, nic = loads(nodes, count)
    rates = Fraction(str(nodes.nic_GBps)), Fraction(str(nodes.inside_GBps))
    return max(rates) * max(nic / rates[0], inside / rates[1])


def _along_rails(m: int, u: int) -> list[Paths] | None:
    """For each ring its path in every node, each starting where the one before ended; None: none known."""
    system, numberings = path_system(m), [list(range(m))] * u
    if u % 2:
        if m == 6:
            system = [tuple(map(int, path)) for path in _SIX]
        three = _cancelling(system, m)
        if three is None:
            return None
        numberings[:3] = three
    at = [p % m for p in range(len(system))]
    routes: list[Paths] = [[] for _ in system]
    for a, numbering in enumerate(numberings):
        backwards = (a if u % 2 == 0 else max(a - 2, 0)) % 2 == 1
        starting: dict[tuple[int, int], tuple[int, ...]] = {}
        for p, path in enumerate(system):
            numbered = tuple(numbering[v] for v in (reversed(path) if backwards else path))
            starting[p // m, numbered[0]] = numbered
        for p, route in enumerate(routes):
            route.append(starting[p // m, at[p]])
            at[p] = route[-1][-1]
    return routes


def _cancelling(system: Paths, m: int) -> list[list[int]] | None:
    """Three numberings of the vertices under which the maps from start to end, one after another, move nothing."""
    end = {path[0]: path[-1] for path in system[:m]}
    cycles = _cycles(end)
    length = len(cycles[0])
    if len(cycles) * length != m:
        return None
    if length % 2:  # steps of 1, 1 and -2 round each cycle
        steps = ({cycle[i]: cycle[i * step % length] for cycle in cycles for i in range(length)} for step in (1, 1, -2))
        return [[step[v] for v in range(m)] for step in steps]
    if length > 2 or m % 4:
        return None
    # Swaps of pairs: v with v ^ 1, then with v ^ 2, then with v ^ 3.
    numberings = []
    for mask in (1, 2, 3):
        numbering = [0] * m
        for (v, w), low in zip(cycles, (x for x in range(m) if x < x ^ mask), strict=True):
            numbering[v], numbering[w] = low, low ^ mask
        numberings.append(numbering)
    return numberings


def _cycles(mapping: dict[int, int]) -> list[list[int]]:
    """The cycles of a permutation."""
    left, cycles = dict(mapping), []
    while left:
        cycle = [next(iter(left))]
        while (after := left.pop(cycle[-1])) in left:
            cycle.append(after)
        cycles.append(cycle)
    return cycles
