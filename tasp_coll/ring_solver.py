"""Hamiltonian cycles under capacities, by Google OR-Tools' CP-SAT: the optional extra `solver`.

CP-SAT has a constraint for circuits; one for each ring, and a limit for each link, are all there is to packing rings.
The same problem gives the same rings on every rank and machine with the same ortools: one worker, a fixed seed, limits
in deterministic time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tasp_coll.errors import TopologyError
from tasp_coll.hamilton import Cycle
from tasp_coll.hops import Hop, Hops, hops_of
from tasp_coll.rings import turned

# In CP-SAT's deterministic seconds, each some seconds of a core: of one call, and of all.
_PACKING_EFFORT, _ALL_PACKING = 0.4, 0.9
_PRICING_EFFORT, _ALL_PRICING = 0.1, 0.6
_LITERALS = 20_000  # of a packing that is worth trying
_SCALE = 10**6  # to which lengths are rounded


@dataclass
class _Effort:
    """What a call may cost, and what is left of what all may."""

    once: float
    left: float


def load() -> None:
    """Load the solver now, if there is one, where later others would wait for it."""
    with suppress(ImportError):
        from ortools.sat.python import cp_model  # noqa: F401


class RingSolver:
    """Finds rings of one topology, with a limited effort in all. TopologyError where ortools is missing."""

    def __init__(self, hops: Hops) -> None:
        try:
            from ortools.sat.python import cp_model
        except ImportError as error:
            raise TopologyError(
                f"topology {hops.topology.name!r}: rings for a topology of this form are found by a solver, which is "
                f"not here ({error}): pip install 'tasp-coll[solver]', or take one ring, algorithm 'ring'"
            ) from error
        self._cp_model: Any = cp_model
        self._hops = hops
        self._packing, self._pricing = _Effort(_PACKING_EFFORT, _ALL_PACKING), _Effort(_PRICING_EFFORT, _ALL_PRICING)

    def pack(self, capacities: Sequence[int], count: int, distinct: bool = False) -> list[Cycle] | None:
        """`count` rings of which no more than its capacity cross each link; None if none were found.

        distinct: no two rings are the same. Where rings can be turned round, pairs of a ring and its reverse are tried
        first: that is half the problem, and most symmetric graphs have such.
        """
        in_pairs = count % 2 == 0 and self._hops.ranks > 2 and self._hops.mirrored
        if in_pairs and (found := self._packed(capacities, count // 2, distinct, paired=True)):
            return found
        return self._packed(capacities, count, distinct, paired=False)

    def _packed(self, capacities: Sequence[int], count: int, distinct: bool, paired: bool) -> list[Cycle] | None:
        """`count` rings or, with `paired`, so many and the reverse of each."""
        routes, ranks = self._hops.routes, self._hops.ranks
        hops = [hop for hop, route in routes.items() if all(capacities[link] >= route.count(link) for link in route)]
        if count * len(hops) > _LITERALS or not len({u for u, _ in hops}) == len({v for _, v in hops}) == ranks:
            return None
        model = self._cp_model.CpModel()
        rings = [_new_ring(model, hops) for _ in range(count)]
        crossing: dict[int, list[Any]] = {}
        for ring in rings:
            for hop, taken in ring.items():
                for link in routes[hop] + (routes[hop[::-1]] if paired else ()):
                    crossing.setdefault(link, []).append(taken)
        for link, uses in crossing.items():
            model.add(sum(uses) <= capacities[link])
        if not paired:
            room = {hop: min((capacities[link] for link in routes[hop]), default=0) for hop in hops if hop[0] == 0}
            _break_symmetry(model, rings, room)
        while found := self._solved(model, rings, self._packing):
            every = [both for ring in found for both in (ring, turned(ring))[: 1 + paired]]
            twins = _twins(every) if distinct else None
            if twins is None:
                return every
            ours = [index // (1 + paired) for index in twins]
            same = [rings[index][hop] for index in ours for hop in hops_of(found[index])]
            model.add(sum(same) < len(same))
        return None

    def cheapest(self, prices: Mapping[int, float]) -> Cycle | None:
        """A ring whose links cost little in all, if possible the least. prices: of links, others cost nothing."""
        model = self._cp_model.CpModel()
        ring = _new_ring(model, self._hops.routes)
        costs = {
            hop: round(_SCALE * sum(prices.get(link, 0) for link in route)) for hop, route in self._hops.routes.items()
        }
        model.minimize(sum(cost * ring[hop] for hop, cost in costs.items()))
        # Cheap rings need linear relaxations; packings are found faster by far without them.
        found = self._solved(model, [ring], self._pricing, linearization=2)
        return found[0] if found else None

    def _solved(
        self, model: Any, rings: Sequence[Mapping[Hop, Any]], effort: _Effort, linearization: int = 0
    ) -> list[Cycle] | None:
        if effort.left <= 0:
            return None
        solver = self._cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.random_seed = 1
        solver.parameters.max_deterministic_time = min(effort.once, effort.left)
        solver.parameters.linearization_level = linearization
        status = solver.solve(model)
        effort.left -= solver.response_proto.deterministic_time
        if status not in (self._cp_model.OPTIMAL, self._cp_model.FEASIBLE):
            return None
        taken = [[hop for hop, literal in ring.items() if solver.boolean_value(literal)] for ring in rings]
        return [_cycle(dict(hops)) for hops in taken]


def _new_ring(model: Any, hops: Iterable[Hop]) -> dict[Hop, Any]:
    ring = {hop: model.new_bool_var("") for hop in hops}
    model.add_circuit([(*hop, taken) for hop, taken in ring.items()])
    return ring


def _break_symmetry(model: Any, rings: list[dict[Hop, Any]], room: Mapping[Hop, int]) -> None:
    """Rings are interchangeable: put them in the order of where they go from rank 0. room: of its hops, for rings."""
    if sum(room.values()) == len(rings):  # all of it is needed
        ways = [hop for hop, times in room.items() for _ in range(times)]
        for ring, hop in zip(rings, ways, strict=True):
            model.add(ring[hop] == 1)
        return
    places = [sum(place * ring[hop] for place, hop in enumerate(room)) for ring in rings]
    for this, following in pairwise(places):
        model.add(this <= following)


def _cycle(following: Mapping[int, int]) -> Cycle:
    cycle = [0]
    while (rank := following[cycle[-1]]) != 0:
        cycle.append(rank)
    return tuple(cycle)


def _twins(cycles: Sequence[Cycle]) -> tuple[int, int] | None:
    first: dict[Cycle, int] = {}
    for index, cycle in enumerate(cycles):
        if first.setdefault(cycle, index) != index:
            return first[cycle], index
    return None
