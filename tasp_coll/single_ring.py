"""One good ring of any topology, without a solver."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from tasp_coll.hamilton import Cycle
from tasp_coll.hops import Hops, hops_of

_SEARCHED = 256  # ranks up to which rings are searched for
_STEPS = 40  # of a search, for each rank


def single_ring(hops: Hops, known: Iterable[Sequence[int]] = ()) -> Cycle:
    """The widest ring that a small search finds, of such the one that crosses least links; the same on every machine.

    Tried are the rings `known`, the ranks in order and in that of a Gray code, a depth-first search for rings whose
    hops all have a certain width (to ranks with few ways on first: Warnsdorff, "Des Roesselsprungs einfachste und
    allgemeinste Loesung", 1823), and the order in which such a search meets the ranks at all, whose hops may then lead
    through other ranks. Of hundreds of ranks only the orders.
    """

    def worth(cycle: Sequence[int]) -> tuple[Fraction, int]:
        return hops.width(cycle), -hops.loads(cycle).total()

    simple = [*known, *_orders(hops.ranks)]
    if hops.ranks > _SEARCHED:
        return tuple(next((cycle for cycle in simple if _is_near(hops, cycle)), range(hops.ranks)))
    best = max(simple, key=worth)
    best = max(best, _preorder(hops), key=worth)
    near = _is_near(hops, best)
    for width in sorted({min(hops.rates[link] for link in route) for route in hops.routes.values()}, reverse=True):
        if width < hops.width(best) or (near and width == hops.width(best)):
            break
        if found := _Search(hops, width).cycle():
            return found
    return tuple(best)


def _is_near(hops: Hops, cycle: Sequence[int]) -> bool:
    return all(hops.is_near(hop) for hop in hops_of(cycle))


def _orders(ranks: int) -> list[Sequence[int]]:
    gray = [rank ^ rank >> 1 for rank in range(ranks)]
    return [range(ranks), gray] if ranks & (ranks - 1) == 0 else [range(ranks)]


def _preorder(hops: Hops) -> list[int]:
    order, seen, stack = [], {0}, [0]
    while stack:
        rank = stack.pop()
        order.append(rank)
        fresh = [other for other in reversed(hops.after[rank]) if other not in seen]
        seen.update(fresh)
        stack += fresh
    return order


class _Search:
    """Depth first, for a ring of a width. A step is a rank put on the path or taken from it."""

    def __init__(self, hops: Hops, width: int) -> None:
        self._hops, self._steps = hops, _STEPS * hops.ranks
        self._room = [rate // width for rate in hops.rates]
        self._after: list[list[int]] = [[] for _ in range(hops.ranks)]
        self._before: list[list[int]] = [[] for _ in range(hops.ranks)]
        for (src, dst), route in hops.routes.items():
            if all(self._room[link] >= route.count(link) for link in route):
                self._after[src].append(dst)
                self._before[dst].append(src)

    def cycle(self) -> Cycle | None:
        """A ring, if the search finds one."""
        if not all(self._after) or not all(self._before):
            return None
        self._left = set(range(1, self._hops.ranks))
        path, turns = [0], [self._choices(0)]
        while path and self._steps:
            self._steps -= 1
            if not self._left and self._fits(path[-1], 0):
                return tuple(path)
            if turns[-1]:
                rank = turns[-1].pop()
                if self._fits(path[-1], rank):
                    self._load(path[-1], rank, -1)
                    self._left.discard(rank)
                    path.append(rank)
                    turns.append(self._choices(rank))
            else:
                rank = path.pop()
                turns.pop()
                if path:
                    self._left.add(rank)
                    self._load(path[-1], rank, 1)
        return None

    def _choices(self, rank: int) -> list[int]:
        """Where to go next, best last; nowhere if a rank is left that has no way in or out any more."""
        ends = {0, rank}
        for other in self._left:
            ahead = any(to in self._left or to == 0 for to in self._after[other])
            back = any(origin in self._left or origin in ends for origin in self._before[other])
            if not (ahead and back):
                return []
        options = [to for to in self._after[rank] if to in self._left]
        return sorted(options, key=lambda to: (-sum(on in self._left for on in self._after[to]), -to))

    def _fits(self, src: int, dst: int) -> bool:
        route = self._hops.routes.get((src, dst))
        return route is not None and all(self._room[link] >= route.count(link) for link in route)

    def _load(self, src: int, dst: int, sign: int) -> None:
        for link in self._hops.routes[src, dst]:
            self._room[link] += sign
