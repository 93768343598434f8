"""How wide rings may be side by side: the linear program "maximise the sum of widths, no link above its rate", exact.

The simplex method on whole numbers with a common denominator (Edmonds's integral pivoting; Bareiss, "Sylvester's
identity and multistep integer-preserving Gaussian elimination", 1968): no rounding, so that every machine finds the
same widths. Rings can be added later, and the prices of the links say which rings would help: those whose links cost
less than 1 in all (column generation; Dantzig and Wolfe, 1960).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


class Widths:
    """Widths of rings that share links. `rates`: of the links, whole numbers."""

    def __init__(self, rates: Sequence[int]) -> None:
        links = len(rates)
        # Rows: links, then the objective. Columns: what is not in the basis, then what the basic ones are worth.
        self._table: NDArray[np.object_] = np.array([[rate] for rate in (*rates, 0)], dtype=object)
        self._denominator = 1
        self._basic = [~link for link in range(links)]  # ring i, or ~i: what is left of link i
        self._free: list[int] = []
        self.rings = 0

    def add(self, loads: Mapping[int, int]) -> None:
        """One more ring; loads: how often it crosses each link."""
        column = np.zeros(len(self._table), dtype=object)
        column[-1] = -self._denominator
        row_of = {name: row for row, name in enumerate(self._basic)}
        column_of = {name: place for place, name in enumerate(self._free)}
        for link, times in loads.items():
            if (row := row_of.get(~link)) is not None:
                column[row] += times * self._denominator
            else:
                column += times * self._table[:, column_of[~link]]
        self._table = np.insert(self._table, len(self._free), column, axis=1)
        self._free.append(self.rings)
        self.rings += 1

    def solve(self) -> None:
        """Make the sum of the widths as large as it can be."""
        stuck = False
        while (place := self._entering(stuck)) is not None:
            before = Fraction(self._table[-1, -1], self._denominator)
            self._pivot(self._leaving(place), place)
            # Bland's rule ("New finite pivoting rules for the simplex method", 1977) leads out of any circle.
            stuck = Fraction(self._table[-1, -1], self._denominator) == before

    @property
    def total(self) -> Fraction:
        """The sum of the widths: by duality that of rates times prices."""
        return Fraction(self._table[-1, -1], self._denominator)

    def widths(self) -> list[Fraction]:
        """Of each ring, in the order in which they were added."""
        found = [Fraction(0)] * self.rings
        for row, name in enumerate(self._basic):
            if name >= 0:
                found[name] = Fraction(self._table[row, -1], self._denominator)
        return found

    def prices(self) -> dict[int, Fraction]:
        """What a bit more of each link would add to the sum, where it would add anything."""
        worth = ((name, value) for name, value in zip(self._free, self._table[-1], strict=False) if name < 0)
        return {~name: Fraction(value, self._denominator) for name, value in worth if value}

    def _entering(self, stuck: bool) -> int | None:
        gains = self._table[-1, :-1]
        places = [place for place, gain in enumerate(gains) if gain < 0]
        if not places:
            return None
        if stuck:
            return min(places, key=lambda place: _rank(self._free[place]))
        return min(places, key=lambda place: (gains[place], _rank(self._free[place])))

    def _leaving(self, place: int) -> int:
        worth, column = self._table[:-1, -1].tolist(), self._table[:-1, place].tolist()
        rows = [row for row, value in enumerate(column) if value > 0]
        return min(rows, key=lambda row: (Fraction(worth[row], column[row]), _rank(self._basic[row])))

    def _pivot(self, row: int, place: int) -> None:
        table, old = self._table, self._denominator
        pivot = table[row, place]
        kept, column = table[row].copy(), table[:, place].copy()
        table = (table * pivot - np.outer(column, kept)) // old
        table[row] = kept
        table[:, place] = -column
        table[row, place] = old
        self._table, self._denominator = table, pivot
        self._basic[row], self._free[place] = self._free[place], self._basic[row]


def _rank(name: int) -> tuple[bool, int]:
    """A fixed order of all names: rings first."""
    return name < 0, abs(name)


def best_widths(rates: Sequence[int], loads: Sequence[Mapping[int, int]]) -> tuple[list[Fraction], Fraction]:
    """The widths of rings with these loads, and their sum."""
    program = Widths(rates)
    for load in loads:
        program.add(load)
    program.solve()
    return program.widths(), program.total
