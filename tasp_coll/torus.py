"""Rings of tori: as many as a rank has links, each link on exactly one of them.

A torus of d sides of 3 or more ranks decomposes into d undirected Hamiltonian cycles: Kotzig, "Every Cartesian product
of two circuits is decomposable into two Hamiltonian circuits" (1973) for two sides, Foregger, "Hamiltonian
decompositions of products of cycles" (1978) for three, Aubert and Schneider (1982) for any number. Each cycle is a ring
either way round.

They are found here by swaps. At first cycle family i is all links along side i, many short cycles. Where a square of
two links along one side and two along another belongs to two families, two links each, the families swap their links:
every rank still has two of each family. That joins two cycles of a family into one, turns a part of a cycle round, or
splits a cycle, and only swaps that leave fewer cycles in all are made, but for a few at random where there are none.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import prod

import numpy as np
from numpy.typing import NDArray

from tasp_coll.hamilton import Cycle
from tasp_coll.rings import Decomposition, equal_rings, turned

Ints = NDArray[np.int64]
_PATIENCE = 400  # swaps in a row that bring nothing, after which the search begins anew
_ATTEMPTS = 50


def has_rings(sides: Sequence[int]) -> bool:
    """Whether there are such rings for a torus of these sides: along one of 2 ranks there is only one link."""
    return min(sides) >= 3


def largest_count(sides: Sequence[int]) -> int:
    """How many rings use all links."""
    return 2 * len(sides)


@lru_cache(maxsize=16)
def decompose_torus(sides: tuple[int, ...], count: int) -> Decomposition | None:
    """`count` of the `largest_count(sides)` rings, of equal weight: no two over one link. None: none were found."""
    rings = [ring for cycle in hamiltonian_cycles(sides) for ring in (cycle, turned(cycle))]
    if not rings:
        return None
    return Decomposition(equal_rings(rings[:count]), Fraction(1, count))


@lru_cache(maxsize=8)
def hamiltonian_cycles(sides: tuple[int, ...]) -> tuple[Cycle, ...]:
    """As many undirected Hamiltonian cycles as there are sides, all >= 3; every link is on one. Ranks row by row.

    The same on every machine. None at all if the search gives up, which no sides are known to make it do.
    """
    for seed in range(_ATTEMPTS):
        families = _Families(sides, random.Random(seed))
        families.join()
        if families.finish():
            return tuple(families.cycle(family) for family in range(len(sides)))
    return ()


class _Families:
    """Links by family. Link `side * n + rank` leads from `rank` to the next one along `side`.

    links[f][r]: the two of family f at rank r. family: of each link. cycle_of: the number of each link's cycle; sense:
    whether a walk round that cycle takes it forwards.
    """

    def __init__(self, sides: tuple[int, ...], chance: random.Random) -> None:
        self.n, self.sides, self._lengths, self._chance = prod(sides), len(sides), sides, chance
        n, rank = self.n, np.arange(self.n)
        self.ahead = np.empty((self.sides, n), np.int64)
        stride = n
        for i, side in enumerate(sides):
            stride //= side
            at = rank // stride % side
            self.ahead[i] = rank + ((at + 1) % side - at) * stride
        self.to: list[int] = self.ahead.ravel().tolist()
        self.links = [[[0, 0] for _ in range(n)] for _ in range(self.sides)]
        for link, end in enumerate(self.to):
            family, start = divmod(link, n)
            self.links[family][start][0] = self.links[family][end][1] = link
        self.family = np.repeat(np.arange(self.sides), n)
        self.cycle_of, self.sense = np.zeros(self.sides * n, np.int64), np.zeros(self.sides * n, np.bool_)
        self._numbers = 0
        pairs = [(i, j) for i in range(self.sides) for j in range(i + 1, self.sides)]
        # Rows of links: two along one side, then two along the other.
        rows = [(i * n + rank, i * n + self.ahead[j], j * n + rank, j * n + self.ahead[i]) for i, j in pairs]
        self.squares = np.concatenate([np.stack(row, axis=1) for row in rows]) if rows else np.empty((0, 4), np.int64)

    def join(self) -> None:
        """Swaps that join cycles of both families, as long as there are any: cycles are sets of ranks for that."""
        n, family = self.n, self.family.tolist()
        root = list(range(self.sides * n))

        def find(place: int) -> int:
            while root[place] != place:
                root[place] = root[root[place]]
                place = root[place]
            return place

        for link, end in enumerate(self.to):
            side, start = divmod(link, n)
            root[find(side * n + start)] = find(side * n + end)
        counts = [n // side for side in self._lengths]
        order = self.squares.tolist()
        order = [order[place] for place in np.argsort(self._draw(len(order)), kind="stable").tolist()]
        for any_two in (False, False, True):  # the family with most cycles first, so that it does not stay behind
            for a, b, c, d in order:
                f, g = family[a], family[c]
                if f == g or family[b] != f or family[d] != g or not (any_two or max(counts) in (counts[f], counts[g])):
                    continue
                ends = [find(which * n + link % n) for which, link in ((f, a), (f, b), (g, c), (g, d))]
                if ends[0] != ends[1] and ends[2] != ends[3]:
                    root[ends[0]], root[ends[2]] = ends[1], ends[3]
                    self._swap((a, b, c, d), f, g)
                    family[a], family[b], family[c], family[d] = g, g, f, f
                    counts[f], counts[g] = counts[f] - 1, counts[g] - 1

    def finish(self) -> bool:
        """Swaps that join cycles of one family and split none of the other, until each has one; False if stuck."""
        counts = [self._walk(family, range(self.n)) for family in range(self.sides)]
        idle = 0
        while sum(counts) > self.sides:
            squares, changes = self._changes()
            least = int(changes.min(initial=1))
            idle = 0 if least < 0 else idle + 1
            if least > 0 or idle > _PATIENCE:
                return False
            best = np.flatnonzero(changes == least)
            square = squares[best[int(self._draw(1)[0] * len(best))]].tolist()
            f, g = int(self.family[square[0]]), int(self.family[square[2]])
            before = [len(set(self.cycle_of[square[:2]].tolist())), len(set(self.cycle_of[square[2:]].tolist()))]
            self._swap(square, f, g)
            corners = sorted({end for link in square for end in (link % self.n, self.to[link])})
            for which, had in ((f, before[0]), (g, before[1])):
                counts[which] += self._walk(which, corners) - had
        return True

    def _draw(self, count: int) -> list[float]:
        """Numbers from 0 to 1, the same on every machine and release of Python."""
        return [self._chance.random() for _ in range(count)]

    def cycle(self, family: int) -> Cycle:
        """The ranks of a family's one cycle, from rank 0."""
        return tuple(link % self.n if ahead else self.to[link] for link, ahead in self._round(family, 0))

    def _changes(self) -> tuple[Ints, Ints]:
        """The squares that two families may swap, and how many cycles more there are then."""
        family = self.family[self.squares]
        a, b, c, d = family.T
        squares = self.squares[(a == b) & (c == d) & (a != c)]
        cycles, sense = self.cycle_of[squares], self.sense[squares]
        total = np.zeros(len(squares), np.int64)
        for x, y in ((0, 1), (2, 3)):
            split = np.where(sense[:, x] == sense[:, y], 0, 1)  # links that are passed the same way turn a part round
            total += np.where(cycles[:, x] != cycles[:, y], -1, split)
        return squares, total

    def _swap(self, square: Sequence[int], f: int, g: int) -> None:
        """Give the first two links of a square, which are f's, to g, and the other two to f."""
        a, b, c, d = square
        for one, other in ((a, c), (a, d), (b, c), (b, d)):
            corner = self._common(one, other)
            for links, old, new in ((self.links[f][corner], one, other), (self.links[g][corner], other, one)):
                links[links.index(old)] = new
        self.family[[a, b]], self.family[[c, d]] = g, f

    def _common(self, one: int, other: int) -> int:
        ends = (other % self.n, self.to[other])
        return one % self.n if one % self.n in ends else self.to[one]

    def _round(self, family: int, start: int) -> list[tuple[int, bool]]:
        """The links of the cycle through a rank, each with whether it is passed forwards."""
        links, to, n = self.links[family], self.to, self.n
        rank, link, passed = start, links[start][0], []
        while True:
            ahead = link % n == rank
            passed.append((link, ahead))
            rank = to[link] if ahead else link % n
            if rank == start:
                return passed
            one, other = links[rank]
            link = other if one == link else one

    def _walk(self, family: int, ranks: Sequence[int]) -> int:
        """Number anew the cycles through these ranks; how many there are."""
        first = self._numbers
        for rank in ranks:
            if self.cycle_of[self.links[family][rank][0]] > first:
                continue
            self._numbers += 1
            passed = np.array(self._round(family, rank), np.int64)
            self.cycle_of[passed[:, 0]], self.sense[passed[:, 0]] = self._numbers, passed[:, 1]
        return self._numbers - first
