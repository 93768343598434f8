"""The facts about a plan: its proof, what each link carries, its time by the cost model, and one rank's moves."""

from __future__ import annotations

import time
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from tasp_coll import ArgumentError, Schedule, Topology, __version__
from tasp_coll.forecast import Case, Choice, fastest, forecasts, ring_count
from tasp_coll.links import Node, order
from tasp_coll.loads import chunk_units, step_load
from tasp_coll.patterns import Rows
from tasp_coll.simulate import LINKS_ALONE, Costs, Prediction, predict
from tasp_coll.topology import turned

MOST_CHUNKS = 1 << 22  # of all shards: 2048 ranks of a full mesh


class Move(NamedTuple):
    """What the chosen rank sends to, or receives from, `peer`: chunk `chunk` of `origin`'s shard."""

    step: int
    peer: int
    origin: int
    chunk: int
    ring: int


class LinkLoad(NamedTuple):
    """The most that a link carries in one step, and what it carries in all, in `Loads.unit`."""

    source: Node
    target: Node
    step_max: int
    total: int


@dataclass(frozen=True)
class Loads:
    """Loads in 1/unit of the largest shard, of the links that carry any."""

    unit: int
    links: tuple[LinkLoad, ...]


class Rival(NamedTuple):
    """An algorithm that could do the same. rings: None where it uses none; auto: `auto` would take it."""

    choice: Choice
    rings: int | None
    prediction: Prediction
    auto: bool


@dataclass(frozen=True)
class View:
    """All that is told of a proved schedule: what the text, the JSON and the picture are made from.

    sends and receives stand side by side, step by step and ring by ring. reduce_steps: how many steps, the first
    ones, move sums. bound: seconds, None where none is known. rivals: none for shards that differ, and of all_to_all.
    """

    schedule: Schedule
    rank: int
    sends: tuple[Move, ...]
    receives: tuple[Move, ...]
    reduce_steps: int
    loads: Loads
    proof: str
    proof_seconds: float
    shard_bytes: int
    costs: Costs
    prediction: Prediction
    bound: float | None
    rivals: tuple[Rival, ...]

    @property
    def topology(self) -> Topology:
        return self.schedule.topology

    @property
    def steps(self) -> int:
        return self.schedule.pattern.steps

    @property
    def ratio(self) -> float | None:
        """Time over bound, None where there is no bound to speak of."""
        return self.over_bound(self.prediction)

    def over_bound(self, prediction: Prediction) -> float | None:
        """A predicted time over the bound."""
        return prediction.seconds / self.bound if self.bound else None

    @property
    def idle(self) -> int:
        """Links that carry nothing."""
        return len(self.topology.links) - len(self.loads.links)

    def share(self, amount: int) -> Fraction:
        """A load as a share of the (largest) shard."""
        return Fraction(amount, self.loads.unit)


def view_of(schedule: Schedule, rank: int = 0, shard_bytes: int = 1 << 20, costs: Costs = LINKS_ALONE) -> View:
    """Prove a schedule made by `plan` and gather what is told of it. Raises ScheduleError if the proof fails."""
    if not 0 <= rank < schedule.ranks:
        raise ArgumentError(f"rank must be from 0 to {schedule.ranks - 1}, got {rank}")
    if schedule.ranks * schedule.chunks > MOST_CHUNKS:
        raise ArgumentError(
            f"{schedule.chunks} chunks of {schedule.ranks} ranks are too many to show: take fewer --rings"
        )
    method, proof_seconds = prove(schedule)
    sends, receives = map(_moves, schedule.pattern.moves(rank))
    return View(
        schedule=schedule,
        rank=rank,
        sends=sends,
        receives=receives,
        reduce_steps=_reduce_steps(schedule),
        loads=loads_of(schedule),
        proof=method,
        proof_seconds=proof_seconds,
        shard_bytes=shard_bytes,
        costs=costs,
        prediction=predict(schedule, shard_bytes, costs=costs),
        bound=_bound(schedule, shard_bytes),
        rivals=_rivals(schedule, shard_bytes, costs),
    )


def _rivals(schedule: Schedule, shard_bytes: int, costs: Costs) -> tuple[Rival, ...]:
    """What the model says of all algorithms, for equal shards."""
    if schedule.counts is not None or schedule.collective == "all_to_all" or schedule.ranks == 1:
        return ()
    case = Case(schedule.topology, schedule.collective, shard_bytes, costs=costs)
    found = forecasts(case)
    taken = fastest(found).choice if found else None
    return tuple(Rival(choice, ring_count(case.topology, choice), said, choice == taken) for choice, said in found)


def _moves(rows: Rows) -> tuple[Move, ...]:
    """By step, then by ring."""
    ordered = rows[np.lexsort((rows[:, 4], rows[:, 0]))]
    return tuple(Move(*row) for row in ordered.tolist())


def prove(schedule: Schedule) -> tuple[str, float]:
    """The method by which `schedule` is proved and the seconds that took; raises ScheduleError."""
    start = time.perf_counter()
    method = schedule.verify()
    return method, time.perf_counter() - start


def loads_of(schedule: Schedule) -> Loads:
    """What each link carries."""
    topology = schedule.topology
    unit, units = chunk_units(schedule)
    sizes = np.array(schedule.counts or (1,) * schedule.ranks, dtype=np.int64)
    unit *= max(int(sizes.max()), 1)
    peak: dict[tuple[Node, Node], int] = {}
    total: dict[tuple[Node, Node], int] = {}
    for step, repeats in _distinct_steps(schedule):
        rows = schedule.pattern.transfers(step)
        load = step_load(topology, rows, units[rows[:, 3]] * sizes[rows[:, 2]])
        for link, amount in zip(load.links, load.load.tolist(), strict=True):
            if amount:
                peak[link] = max(peak.get(link, 0), amount)
                total[link] = total.get(link, 0) + repeats * amount
    links = sorted(total, key=lambda link: (order(link[0]), order(link[1])))
    return Loads(unit, tuple(LinkLoad(*link, peak[link], total[link]) for link in links))


def _distinct_steps(schedule: Schedule) -> list[tuple[int, int]]:
    """(step, how many steps load the links as it does).

    With equal shards a ring turns on the same links, and a slice goes to every peer, at each step of a phase.
    """
    steps, head = schedule.pattern.steps, _reduce_steps(schedule)
    if schedule.counts is not None or schedule.algorithm == "hierarchical":
        return [(step, 1) for step in range(steps)]
    return [(first, repeats) for first, repeats in ((0, head), (head, steps - head)) if repeats]


def _reduce_steps(schedule: Schedule) -> int:
    if schedule.collective == "allreduce":
        return schedule.phases()[0].pattern.steps
    return schedule.pattern.steps if schedule.collective == "reduce_scatter" else 0


def _bound(schedule: Schedule, shard_bytes: float) -> float | None:
    """The cut bound in seconds; None for unequal shards and for all_to_all, of which it says nothing."""
    topology, collective = schedule.topology, schedule.collective
    if collective == "all_to_all" or len(set(schedule.counts or ())) > 1:
        return None
    if schedule.counts is not None and not any(schedule.counts):
        return 0.0
    # A reduce-scatter is an allgather run backwards, so it is bound by the links the other way round.
    gather = topology.allgather_bound(shard_bytes) if collective != "reduce_scatter" else 0.0
    scatter = turned(topology).allgather_bound(shard_bytes) if collective != "allgather" else 0.0
    return gather + scatter


def _timed(view: View, prediction: Prediction) -> dict[str, Any]:
    link, used = prediction.link, prediction.utilisation
    busiest = None if link is None else {"from": link[0], "to": link[1], "utilisation": used}
    return {"time_s": prediction.seconds, "ratio": view.over_bound(prediction), "busiest": busiest}


def json_of(view: View) -> dict[str, Any]:
    """The facts for programs, as `show_plan.py --help` describes them."""
    schedule, topology = view.schedule, view.topology
    result = {
        "collective": schedule.collective,
        "algorithm": schedule.algorithm,
        "steps": view.steps,
        "chunks": schedule.chunks,
        "counts": schedule.counts,
        "rings": [{"ranks": ring.ranks, "weight": str(ring.weight)} for ring in schedule.rings],
        "rank": view.rank,
        "sends": [move._asdict() for move in view.sends],
        "receives": [move._asdict() for move in view.receives],
        "loads": [
            {"from": u, "to": v, "step_max": str(view.share(step_max)), "total": str(view.share(total))}
            for u, v, step_max, total in view.loads.links
        ],
        "links": len(topology.links),
        "idle_links": view.idle,
        "proof": {"method": view.proof, "seconds": view.proof_seconds},
        "shard_bytes": view.shard_bytes,
        "message_us": view.costs.message_us,
        **_timed(view, view.prediction),
        "bound_s": view.bound,
        "rivals": [
            {**rival.choice._asdict(), "rings": rival.rings, "auto": rival.auto, **_timed(view, rival.prediction)}
            for rival in view.rivals
        ],
    }
    return {
        "tool": "show_plan",
        "version": __version__,
        "world_size": topology.ranks,
        "transport": None,
        "topology": topology.name,
        "results": [result],
    }
