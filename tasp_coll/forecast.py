"""What each algorithm would take on a topology, and which one to take: `auto` where nothing was measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from tasp_coll.agreement import HEADER_BYTES, inline_bytes
from tasp_coll.decomposition import decompose
from tasp_coll.errors import CollectiveError
from tasp_coll.hierarchical import slices_for
from tasp_coll.schedule import ALGORITHMS, Schedule, plan
from tasp_coll.simulate import LINKS_ALONE, Costs, Prediction, one_after_another, predict, predict_native
from tasp_coll.simulate_formulas import formula
from tasp_coll.topology import Topology

NATIVE = "native"
TIE = 0.02  # of two that are so close the simpler one is taken: the model knows no better
SIMULATED = 16  # ranks above which formulas do, where there are any
ROUTED = 128  # ranks above which the routes of all pairs are too many
# From simple to complicated.
_ORDER = ("ring", "rings", "direct", *(name for name in ALGORITHMS if name not in ("ring", "rings", "direct")), NATIVE)


class Choice(NamedTuple):
    """An algorithm and its parameters."""

    algorithm: str
    rings: int | None = None
    slices: int | None = None


class Forecast(NamedTuple):
    """What the model says of a choice."""

    choice: Choice
    prediction: Prediction


@dataclass(frozen=True)
class Case:
    """A collective with shards of `shard_bytes` bytes, and the algorithms that may be taken.

    half: a dtype whose sums travel in float32, twice as long, which only the direct exchange avoids.
    """

    topology: Topology
    collective: str
    shard_bytes: int
    algorithms: tuple[str, ...] = _ORDER
    half: bool = False
    costs: Costs = LINKS_ALONE


def direct(collective: str, ranks: int) -> Choice:
    """The direct exchange: whole shards, but slices where sums are staged, so that memory stays at two shards."""
    return Choice("direct", None, 1 if collective == "allgather" else max(ranks - 1, 1))


def choice_of(algorithm: str, collective: str, ranks: int, shard_bytes: int, rings: int | None = None) -> Choice:
    """An algorithm with the parameters that suit the size."""
    if algorithm == "direct":
        return direct(collective, ranks)
    if algorithm == "hierarchical":
        return Choice(algorithm, None, slices_for(shard_bytes))
    return Choice(algorithm, rings)


def ring_count(topology: Topology, choice: Choice) -> int | None:
    """On how many rings a choice runs; None if it has none."""
    if choice.algorithm == "rings":
        return len(decompose(topology, choice.rings))
    return 1 if choice.algorithm == "ring" else None


def forecasts(case: Case) -> tuple[Forecast, ...]:
    """All that can be planned, from simple to complicated."""
    found = ((choice, forecast(case, choice)) for choice in _choices(case))
    return tuple(Forecast(choice, prediction) for choice, prediction in found if prediction is not None)


def fastest(found: tuple[Forecast, ...]) -> Forecast:
    """The first that is as fast as any, but for a tie."""
    least = min(forecast.prediction.seconds for forecast in found)
    return next(forecast for forecast in found if forecast.prediction.seconds <= least * (1 + TIE))


def choose(case: Case) -> Choice:
    """The fastest for shards of the next power of two of bytes. The same on every rank that asks: no figure that goes
    into it depends on the machine."""
    return _choose(replace(case, shard_bytes=1 << max(case.shard_bytes - 1, 0).bit_length()))


@lru_cache(maxsize=512)
def _choose(case: Case) -> Choice:
    found = forecasts(case)
    if not found:  # thousands of ranks on a topology of no known form
        return direct(case.collective, case.topology.ranks)
    return fastest(found).choice


def call_seconds(case: Case, choice: Choice, asked: str) -> float | None:
    """What a communicator's call takes, `choice` being what it came to for `asked`; None as for `forecast`.

    Every call begins with an agreement, a message from each rank to each other; small payloads travel with it.
    """
    ranks = case.topology.ranks
    payload = case.shard_bytes * (1 if case.collective == "allgather" else ranks)
    small = asked in ("auto", "direct") and payload <= inline_bytes(ranks)
    header = replace(case, collective="allgather", shard_bytes=HEADER_BYTES + (payload if small else 0), half=False)
    agreed, moved = forecast(header, Choice("direct", None, 1)), None if small else forecast(case, choice)
    if agreed is None or (moved is None and not small):
        return None
    return agreed.seconds + (moved.seconds if moved else 0.0)


@lru_cache(maxsize=512)
def prediction_of(case: Case, algorithm: str) -> Prediction | None:
    """What the model says of one algorithm, or with "auto" of the fastest; None for what cannot be planned here."""
    if algorithm == "auto":
        found = forecasts(case)
        return fastest(found).prediction if found else None
    return forecast(case, choice_of(algorithm, case.collective, case.topology.ranks, case.shard_bytes))


def seconds_of(case: Case, algorithm: str) -> float | None:
    """The seconds of `prediction_of`."""
    prediction = prediction_of(case, algorithm)
    return None if prediction is None else prediction.seconds


def _choices(case: Case) -> list[Choice]:
    """Where messages cost something, with fewer rings or slices too: that pays where links are not all there is."""
    ranks, found = case.topology.ranks, []
    for name in (name for name in _ORDER if name in case.algorithms):
        usual = choice_of(name, case.collective, ranks, case.shard_bytes)
        found.append(usual)
        if name == "rings" and case.topology.is_full_mesh and case.costs.message_s:
            found += [Choice(name, count) for count in sorted({2, (ranks - 1) // 2}) if 2 <= count < ranks - 1]
        if name == "hierarchical" and case.costs.message_s:
            found += [Choice(name, None, slices) for slices in (4, 1) if slices < (usual.slices or 1)]
    return found


def forecast(case: Case, choice: Choice) -> Prediction | None:
    """What the model says of one choice; None for what cannot be planned here, or would take too long to look at."""
    ranks, phases = case.topology.ranks, ("reduce_scatter", "allgather")
    if choice.algorithm == NATIVE and ranks <= (SIMULATED if _regular(case.topology) else ROUTED):
        return predict_native(case.topology, case.collective, case.shard_bytes, costs=case.costs)
    found = []
    for phase in phases if case.collective == "allreduce" else (case.collective,):
        wide = 2 if case.half and phase == "reduce_scatter" and choice.algorithm != "direct" else 1
        found.append(_phase(case, choice, phase, wide * case.shard_bytes))
    whole = [prediction for prediction in found if prediction is not None]
    return one_after_another(whole) if len(whole) == len(found) else None


def _regular(topology: Topology) -> bool:
    return topology.is_full_mesh or topology.is_single_switch


def _phase(case: Case, choice: Choice, phase: str, nbytes: int) -> Prediction | None:
    topology, (algorithm, rings, slices) = case.topology, choice
    routed = algorithm == "direct" and not _regular(topology)
    if topology.ranks > (ROUTED if routed else SIMULATED):
        known = formula(topology, algorithm, nbytes, rings=rings, slices=slices or 1, costs=case.costs)
        if known is not None or algorithm == NATIVE or (algorithm == "direct" and topology.ranks > ROUTED):
            return known
    schedule = _planned(topology, phase, choice)
    return None if schedule is None else predict(schedule, nbytes, costs=case.costs)


@lru_cache(maxsize=32)
def _planned(topology: Topology, phase: str, choice: Choice) -> Schedule | None:
    try:
        return plan(topology, phase, choice.algorithm, choice.rings, slices=choice.slices)
    except CollectiveError:
        return None
