"""Random topologies, and random schedules on them: planned, or a user's own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from random import Random

from tasp_coll import CollectiveError, Schedule, Topology, Transfer, plan
from tasp_coll.links import Link, Node
from tasp_coll.schedule import ALGORITHMS, COLLECTIVES

RATES = (0.1, 0.25, 1.0, 1.5, 3.0, 7.0, 450.0)
Steps = list[list[Transfer]]


@dataclass(frozen=True)
class Case:
    """A schedule and where it came from. rows: of each rank's shard, for a run with shards that differ."""

    told: str
    schedule: Schedule
    rows: tuple[int, ...]

    @cached_property
    def steps(self) -> Steps:
        """All its transfers."""
        return [list(step) for step in self.schedule.steps]


def random_topology(rng: Random, ranks: int, switches: int = 3, density: int = 4) -> Topology:
    """Up to so many ranks and switches: a cycle through a random order of all nodes and any other links."""
    n = rng.randint(2, ranks)
    nodes: list[Node] = [*range(n), *(f"s{i}" for i in range(rng.randint(0, switches)))]
    order = list(nodes)
    rng.shuffle(order)
    arcs = set(zip(order, [*order[1:], order[0]], strict=True))
    arcs |= {(rng.choice(nodes), rng.choice(nodes)) for _ in range(rng.randint(0, density * n))}
    if rng.random() < 0.5:
        arcs |= {(v, u) for u, v in arcs}
    rates = RATES if rng.random() < 0.5 else (1.0,)
    links = [Link(u, v, rng.choice(rates)) for u, v in sorted(arcs, key=str) if u != v]
    return Topology("random", n, tuple(str(node) for node in nodes[n:]), tuple(links))


def _preset(rng: Random, ranks: int) -> Topology:
    """A preset of up to so many ranks, now and then with a dead link."""
    n = rng.randint(2, ranks)
    inside = rng.randint(1, max(ranks // 2, 1))
    nodes = rng.randint(1, max(ranks // inside, 1))
    bits = rng.randint(1, ranks.bit_length() - 1)
    forms = (f"full_mesh:{n}", f"nvswitch:{n}", f"cluster:{nodes}x{inside}", f"torus:{nodes}x{inside}")
    found = Topology.preset(rng.choice((*forms, f"hypercube:{bits}")))
    if found.ranks > 1 and rng.random() < 0.3:
        dead = rng.choice(found.links)
        try:
            return found.without_link(dead.source, dead.target)
        except CollectiveError:  # ranks could not reach each other any more
            return found
    return found


def case_of(rng: Random, ranks: int) -> Case:
    """A topology of up to so many ranks and a schedule on it."""
    topology = random_topology(rng, min(ranks, 7)) if rng.random() < 0.5 else _preset(rng, ranks)
    collective = rng.choice(COLLECTIVES)
    rows = tuple(rng.choice((0, 1, 2, 3, 7)) for _ in range(topology.ranks))
    if collective != "all_to_all" and rng.random() < 0.25:
        schedule, how = _own(rng, topology, collective), "own steps"
    else:
        schedule, how = _planned(rng, topology, collective, rows)
    return Case(f"{collective} by {how} on {topology.name}", schedule, rows)


def _planned(rng: Random, topology: Topology, collective: str, rows: tuple[int, ...]) -> tuple[Schedule, str]:
    if collective == "all_to_all":
        return plan(topology, collective, "direct"), "direct"
    names = list(ALGORITHMS)
    rng.shuffle(names)
    for name in names:
        rings = rng.choice((None, 1, 2, 3)) if name == "rings" else None
        slices = rng.choice((None, 1, 3)) if name in ("direct", "hierarchical") else None
        counts = rows if rng.random() < 0.3 else None
        try:
            return plan(topology, collective, name, rings, counts, slices=slices), f"{name} {rings or slices or ''}"
        except CollectiveError:  # no equal nodes, or not so many rings
            continue
    return plan(topology, collective, "ring"), "ring"


def _own(rng: Random, topology: Topology, collective: str) -> Schedule:
    """A user's: in each step any ranks hand any chunks on to any that lack them; reductions are such in reverse."""
    chunks = rng.randint(1, 3)
    gather, before = (_gather(rng, topology.ranks, chunks) for _ in range(2))
    reduce = [[Transfer(dst, src, *what) for src, dst, *what in step] for step in reversed(before)]
    steps = {"allgather": gather, "reduce_scatter": reduce, "allreduce": [*reduce, *gather]}[collective]
    return Schedule.from_steps(topology, collective, steps)


def _gather(rng: Random, n: int, chunks: int) -> Steps:
    have = {(rank, rank, chunk) for rank in range(n) for chunk in range(chunks)}
    lacking = [(rank, o, chunk) for rank in range(n) for o in range(n) for chunk in range(chunks) if o != rank]
    steps: Steps = []
    while lacking:
        rng.shuffle(lacking)
        step: Steps = [[]]
        used: dict[tuple[int, int], int] = {}
        for dst, origin, chunk in lacking[: rng.randint(1, len(lacking))]:
            src = rng.choice([rank for rank in range(n) if (rank, origin, chunk) in have])
            ring = used[src, dst] = used.get((src, dst), -1) + 1
            step[0].append(Transfer(src, dst, origin, chunk, ring))
        have |= {(dst, origin, chunk) for _, dst, origin, chunk, _ in step[0]}
        lacking = [each for each in lacking if each not in have]
        steps += step
    return steps
