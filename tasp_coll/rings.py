"""What a decomposition is: weighted rings, and what they promise of every link."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True, slots=True)
class Ring:
    """One directed cycle over all ranks: each sends to the next in `ranks`, the last to the first.

    `weight` is the share of every rank's shard that travels on it; a decomposition's weights add up to 1.
    """

    ranks: tuple[int, ...]
    weight: Fraction

    def reversed(self) -> Ring:
        """The same ring in the opposite direction, from the same first rank."""
        return Ring(turned(self.ranks), self.weight)


@dataclass(frozen=True)
class Decomposition:
    """Rings of one topology. A step takes the time in which a link of the topology's highest rate moves `share` shards.

    share: the largest part of a shard that a link of the highest rate carries in a step, slower links in proportion.
    It follows from how the rings were made, and is what their proof then holds them to. reversible: the promise holds
    for the rings in the opposite direction too.
    """

    rings: tuple[Ring, ...]
    share: Fraction
    reversible: bool = True

    @property
    def backward(self) -> tuple[Ring, ...]:
        """Rings that keep the promise when their transfers are turned round, as a reduction's are."""
        return self.rings if self.reversible else tuple(ring.reversed() for ring in self.rings)


def turned(cycle: tuple[int, ...]) -> tuple[int, ...]:
    """A cycle in the opposite direction, from the same first rank."""
    return cycle[:1] + cycle[:0:-1]


def equal_rings(cycles: Iterable[Iterable[int]]) -> tuple[Ring, ...]:
    """The cycles as rings of equal weight."""
    orders = [tuple(cycle) for cycle in cycles]
    weight = Fraction(1, len(orders))
    return tuple(Ring(order, weight) for order in orders)
