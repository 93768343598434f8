"""Rings for any topology: as many and as wide as its links hold.

What rings can reach is bounded by the narrowest cut between ranks (`Hops.width_bound`), and for most regular
graphs that is the cut bound of an all-gather. Tried are, in this order, and until 0.98 of it is reached:

1. a single ring both ways round and, where links are alike but for small differences or a dead one, the rings of the
   topology without these;
2. k rings of equal width that fill the bound exactly, for the few k where the links hold so many: with k twice as
   large rings have half the width, so that 3 links of a rank that 3 rings cannot share may be shared by 6;
3. more rings, one at a time: each the ring that would widen the whole most (`widths`, column generation), then the
   widest 2(n-1) of them;
4. k rings of equal width that come near the bound, and then 3 from there.

The widths of unequal rings are those of a linear program, solved exactly, so that a shard's chunks follow what the
links carry.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import islice, permutations
from math import lcm
from typing import NamedTuple

from tasp_coll import hamilton, two_level
from tasp_coll.errors import ArgumentError
from tasp_coll.hamilton import Cycle
from tasp_coll.hops import Hops, hops_of
from tasp_coll.links import Link
from tasp_coll.nodes import connected_parts, nodes_of
from tasp_coll.ring_solver import RingSolver
from tasp_coll.rings import Decomposition, Ring, turned
from tasp_coll.single_ring import single_ring
from tasp_coll.topology import Topology
from tasp_coll.widths import Widths, best_widths

ENOUGH = Fraction(98, 100)  # of the bound: then the search is over
ENOUGH_OF_MANY = Fraction(95, 100)  # the same for more than MANY ranks
MANY = 24
GROWN = 40  # ranks up to which rings are added one at a time
LARGEST = 256  # ranks up to which rings are searched for
_TRIES = 3  # numbers of rings of equal width that are tried
_SLACK = (Fraction(97, 100), Fraction(93, 100), Fraction(88, 100))
_KEPT = Fraction(99, 100)
_MORE = 60  # rings that column generation adds
_DENSE = 0.8  # of the pairs of ranks must have a link for the others' to seem dead
_NUMBERINGS = 6  # where a link is dead: each has other rings that do not cross it
_ALIKE = (1.1, 2.0)  # links of no larger ratio are alike
_FINE = 1 << 20  # finer weights than this make no difference


class Packed(NamedTuple):
    """Rings side by side: widths, and `total`, which they were found to add up to, in the unit of the rates."""

    cycles: list[Cycle]
    widths: list[Fraction]
    total: Fraction


def pack_all(topology: Topology) -> Decomposition:
    """The rings of a topology, as wide in all as was found. TopologyError where a solver is needed and missing."""
    hops = Hops(topology)
    simple = _simple(hops)
    if hops.ranks > LARGEST:
        return _decomposition(hops, simple)
    target = (ENOUGH if hops.ranks <= MANY else ENOUGH_OF_MANY) * hops.width_bound
    if simple.total >= target:
        return _decomposition(hops, _thinned(hops, simple))
    solver = RingSolver(hops)
    if exact := _equal_widths(hops, solver):
        return _decomposition(hops, exact)
    best = simple
    for start in _starts(hops, solver, simple):
        best = max(best, _grown(hops, solver, start, target), key=lambda packed: packed.total)
        if best.total >= target:
            break
    return _decomposition(hops, _thinned(hops, best))


def pack_some(topology: Topology, count: int) -> Decomposition:
    """The best `count` distinct rings that were found. ArgumentError if there are not so many."""
    hops = Hops(topology)
    if count == 1:
        cycle = single_ring(hops, _forms(hops))
        width = hops.width(cycle)
        return _decomposition(hops, Packed([cycle], [width], width))
    solver = RingSolver(hops)
    found: list[Cycle] | None = None
    for width in islice(_ring_widths(hops, count), 2 * _TRIES):
        found = found or solver.pack(_capacities(hops, width), count, distinct=True)
    found = found or solver.pack([count * hops.ranks] * len(hops.rates), count, distinct=True)
    if found is None:
        raise ArgumentError(f"rings must be fewer for topology {topology.name!r}: no {count} were found, got {count}")
    return _decomposition(hops, _all_used(hops, found))


def _simple(hops: Hops) -> Packed:
    """What needs no solver."""
    forms = _forms(hops)
    single = single_ring(hops, forms)
    return _widened(hops, [*forms, single, turned(single)])


def _forms(hops: Hops) -> list[Cycle]:
    """Rings in closed form of the full mesh or the equal nodes that the topology nearly is, where it has their hops."""
    whole = len(hops.topology.links)
    nearly = [(even, 1 if len(even.links) == whole else _NUMBERINGS) for even in _alike(hops.topology)]
    for even, numberings in (*nearly, (_healed(hops.topology), _NUMBERINGS)):
        if rings := _known(even, numberings):
            return [ring for ring in rings if all(hops.is_near(hop) for hop in hops_of(ring))]
    return []


def _alike(topology: Topology) -> Iterator[Topology]:
    return (_evened(topology, ratio) for ratio in _ALIKE)


def _known(topology: Topology, numberings: int) -> list[Cycle]:
    """The rings of a full mesh, or of equal nodes: these for some ways to number the ranks of a node."""
    n, nodes = topology.ranks, nodes_of(topology)
    if topology.is_full_mesh and n > 2:
        return hamilton.double_cover(n) if n in (4, 6) else hamilton.directed_cycles(n)
    rings: list[Cycle] = []
    if nodes is None:
        return []
    for turn in range(min(numberings, nodes.size - 1)):
        groups = tuple((group[0], *group[1 + turn :], *group[1 : 1 + turn]) for group in nodes.groups)
        found = two_level.decompose_nodes(replace(nodes, groups=groups), two_level.largest_count(nodes))
        rings += [ring.ranks for ring in found.rings] if found else []
    return rings


def _evened(topology: Topology, ratio: float) -> Topology:
    """The topology with one rate, the lowest, for all links of a rate up to `ratio` times that, and dead links back.

    Links seem to be dead where most of the pairs of ranks in a part that no switch joins have one.
    """
    even: dict[float, float] = {}
    lowest = 0.0
    for rate in sorted({link.GBps for link in topology.links}):
        if rate > ratio * lowest:
            lowest = rate
        even[rate] = lowest
    links = [Link(link.source, link.target, even[link.GBps]) for link in topology.links]
    pairs = {(link.source, link.target): link.GBps for link in links}
    direct = {(u, v): rate for (u, v), rate in pairs.items() if isinstance(u, int) and isinstance(v, int)}
    parts = connected_parts(topology.ranks, (), [link for link in links if (link.source, link.target) in direct])
    home = {rank: number for number, part in enumerate(parts) for rank in part}
    rates: list[list[float]] = [[] for _ in parts]
    for (u, _), rate in direct.items():
        rates[home[u]].append(rate)
    for part, have in zip(parts, rates, strict=True):
        if len(part) * (len(part) - 1) > len(have) > len(part) * (len(part) - 1) * _DENSE:
            links += [Link(u, v, min(have)) for u, v in permutations(part, 2) if (u, v) not in direct]
    return Topology(topology.name, topology.ranks, topology.switches, tuple(links))


def _healed(topology: Topology) -> Topology:
    """The topology with the rate for each link that most of its kind have, as if none were slow, and ports back.

    Of a kind are the links between ranks, those from ranks to a switch, and those from it to them. A port seems to be
    dead where most ranks have one to this switch.
    """
    kinds: dict[tuple[str, bool], Counter[float]] = {}
    for link in topology.links:
        kinds.setdefault(_kind(link), Counter())[link.GBps] += 1
    usual = {kind: max(rates, key=lambda rate: (rates[rate], rate)) for kind, rates in kinds.items()}
    links = [Link(link.source, link.target, usual[_kind(link)]) for link in topology.links]
    there = {(link.source, link.target) for link in links}
    for (switch, up), rates in kinds.items():
        if switch and _DENSE * topology.ranks < rates.total() < topology.ranks:
            ends = [(rank, switch) if up else (switch, rank) for rank in range(topology.ranks)]
            links += [Link(a, b, usual[switch, up]) for a, b in ends if (a, b) not in there]
    return Topology(f"{topology.name} healed", topology.ranks, topology.switches, tuple(links))


def _kind(link: Link) -> tuple[str, bool]:
    """The switch of a port and whether the port leads up to it; no switch for a link between ranks."""
    if isinstance(link.target, str):
        return link.target, True
    return (link.source, False) if isinstance(link.source, str) else ("", True)


def _equal_widths(hops: Hops, solver: RingSolver) -> Packed | None:
    """Rings of equal width that reach the bound."""
    bound = Fraction(hops.width_bound)
    # Where rates differ, exact fits need many rings, and are rarely found.
    limit = largest_count(hops.ranks) if len(set(hops.rates)) == 1 else hops.ranks
    for count in islice(_counts(hops, bound, limit), _TRIES):
        cycles = solver.pack(_capacities(hops, bound / count), count)
        if cycles is not None:
            return Packed(cycles, [bound / count] * count, bound)
    return None


def _starts(hops: Hops, solver: RingSolver, simple: Packed) -> Iterator[Packed]:
    """Rings to which others may be added. Few of equal width are the better start where all links are nearly alike."""
    near = _nearly_equal_widths(hops, solver)
    if max(hops.rates) > _ALIKE[0] * min(hops.rates):
        yield simple
        yield from near
    else:
        yield from near
        yield simple


def _nearly_equal_widths(hops: Hops, solver: RingSolver) -> Iterator[Packed]:
    """Rings of equal width that come near the bound, and then as wide as each can be."""
    for slack in _SLACK:
        total = slack * hops.width_bound
        for count in islice(_counts(hops, total, largest_count(hops.ranks)), 1):
            cycles = solver.pack(_capacities(hops, total / count), count)
            if cycles is not None:
                yield _widened(hops, cycles)
                return


def _counts(hops: Hops, total: Fraction, limit: int) -> Iterator[int]:
    """Numbers of rings, from the smallest, of which as many as have that width in all may fit."""
    for count in range(1, limit + 1):
        if hops.bound_within(_capacities(hops, total / count)) >= count:
            yield count


def largest_count(ranks: int) -> int:
    """How many rings are looked for at most."""
    return max(2 * (ranks - 1), 1)


def _capacities(hops: Hops, width: Fraction) -> list[int]:
    return [int(rate // width) for rate in hops.rates]


def _ring_widths(hops: Hops, count: int) -> Iterator[Fraction]:
    """Widths of `count` equal rings that the narrowest cut holds, from the largest: all but full links are as good."""
    widest = Fraction(hops.width_bound, count)
    widths = {Fraction(rate, times) for rate in set(hops.rates) for times in range(1, count + 1)}
    for width in sorted((width for width in {*widths, widest} if width <= widest), reverse=True):
        if hops.bound_within(_capacities(hops, width)) >= count:
            yield width


def _widened(hops: Hops, cycles: Sequence[Cycle]) -> Packed:
    """The cycles with the widths that add up to most; the widest first, those that get none are out."""
    kept = list(dict.fromkeys(cycles))
    widths, total = best_widths(hops.rates, [hops.loads(cycle) for cycle in kept])
    order = sorted((index for index, width in enumerate(widths) if width), key=lambda index: -widths[index])
    limit = largest_count(hops.ranks)
    if len(order) > limit:
        return _widened(hops, [kept[index] for index in order[:limit]])
    return Packed([kept[index] for index in order], [widths[index] for index in order], total)


def _all_used(hops: Hops, cycles: list[Cycle]) -> Packed:
    """The same with a width for every cycle: the best, or else equal ones."""
    best = _widened(hops, cycles)
    if len(best.cycles) == len(cycles):
        return best
    loads: dict[int, int] = {}
    for cycle in cycles:
        for link, times in hops.loads(cycle).items():
            loads[link] = loads.get(link, 0) + times
    width = min(Fraction(hops.rates[link], times) for link, times in loads.items())
    return Packed(cycles, [width] * len(cycles), width * len(cycles))


def _grown(hops: Hops, solver: RingSolver, start: Packed, target: Fraction) -> Packed:
    """More and more rings, each the one that the links' prices ask for, until the target or no gain is in sight."""
    if start.total >= target or hops.ranks > GROWN:
        return start
    program = Widths(hops.rates)
    cycles = list(start.cycles)
    for cycle in cycles:
        program.add(hops.loads(cycle))
    program.solve()
    for _ in range(_MORE):
        prices = program.prices()
        fresh = solver.cheapest({link: float(price) for link, price in prices.items()})
        if fresh is None or fresh in cycles:
            break
        cost = sum(times * prices.get(link, Fraction(0)) for link, times in hops.loads(fresh).items())
        if cost >= ENOUGH:  # Farley, "A note on bounding a class of linear programming problems" (1990)
            break
        cycles.append(fresh)
        program.add(hops.loads(fresh))
        program.solve()
        if program.total >= target:
            break
    return _widened(hops, cycles)


def _thinned(hops: Hops, packed: Packed) -> Packed:
    """Without the narrowest rings, if that costs little: each is one more message in every step."""
    for part in (1, 2, 4):
        least = packed.total / (part * hops.ranks)
        wide = [cycle for cycle, width in zip(packed.cycles, packed.widths, strict=True) if width >= least]
        if wide and (fewer := _widened(hops, wide)).total >= _KEPT * packed.total:
            return fewer
    return packed


def _decomposition(hops: Hops, packed: Packed) -> Decomposition:
    """Widths as shares of a shard: a step takes one shard's time at the sum of the widths."""
    cycles, total = packed.cycles, packed.total
    shares = [width / total for width in packed.widths]
    if lcm(*(share.denominator for share in shares)) > _FINE:
        parts = [int(share * _FINE) for share in shares]
        cycles = [cycle for cycle, part in zip(cycles, parts, strict=True) if part]
        whole = sum(parts)
        shares = [Fraction(part, whole) for part in parts if part]
        total *= Fraction(whole, _FINE)
    rings: dict[Cycle, Fraction] = {}
    for cycle, share in zip(cycles, shares, strict=True):
        rings[cycle] = rings.get(cycle, Fraction(0)) + share
    found = tuple(Ring(cycle, share) for cycle, share in rings.items())
    return Decomposition(found, hops.highest / total, hops.can_turn(rings))
