"""What simulate.py works out: collectives, attention, and what faults cost, as frozen rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from attention.forecast import METHODS, Estimate, Problem, ccr, forecast
from links_model import links_on
from perf_report import Recorded
from simulate_options import Fault, Options
from tasp_coll import ArgumentError, Link, Topology, plan
from tasp_coll.forecast import Case, choice_of, choose, prediction_of
from tasp_coll.links import MeshLinks
from tasp_coll.schedule import Schedule
from tasp_coll.simulate import one_after_another, predict
from tasp_coll.topology import read_named, turned

ALGORITHMS = ("rings", "hierarchical", "ring", "direct", "native")
_FACTOR = {"allgather": 1.0, "reduce_scatter": 1.0, "allreduce": 2.0}  # busbw / algbw, times n/(n-1)
_FOLLOWED = 128  # ranks above which, with faults, no schedule of n^2 messages is followed
_FAULTS_OF = 1024  # ranks above which a topology with faults takes minutes to plan for


@dataclass(frozen=True)
class Collective:
    """One algorithm at one size; bound: the least possible, seconds; auto: a communicator would take it."""

    ranks: int
    collective: str
    shard_bytes: int
    algorithm: str
    seconds: float
    bound: float
    busbw: float
    method: str
    auto: bool

    @property
    def algbw(self) -> float:
        """GB/s, nccl-tests' definition: all ranks' shards over the time."""
        return self.ranks * self.shard_bytes / self.seconds / 1e9

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"algbw": self.algbw}


@dataclass(frozen=True)
class Attention:
    """One method at one length. fits: its memory is there; fastest: of those that fit."""

    problem: Problem
    estimate: Estimate
    ccr: float | None
    fits: bool
    fastest: bool

    def record(self) -> dict[str, Any]:
        """For programs."""
        phases = {
            name: asdict(phase) | {"exposed_s": phase.exposed_s}
            for name, phase in (("forward", self.estimate.forward), ("backward", self.estimate.backward))
            if phase is not None
        }
        return {
            "method": self.estimate.method,
            "tokens": self.problem.tokens,
            "batch": self.problem.batch,
            "seconds": self.estimate.seconds,
            "memory_bytes": self.estimate.memory_bytes,
            "ccr": self.ccr,
            "fits": self.fits,
            "fastest": self.fastest,
            **phases,
        }


@dataclass(frozen=True)
class Loss:
    """What faults do to an algorithm: seconds before, after with the old plan, and after with a new one."""

    collective: str
    algorithm: str
    shard_bytes: int
    healthy: float
    kept: float | None
    planned: float | None

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self)


def topology_of(options: Options) -> Topology:
    """The topology as it is meant to be, its rates scaled by what data gets of them."""
    topology = read_named(options.topology)
    return topology if options.link_share == 1 else _scaled(topology, options.link_share)


def collectives(options: Options, topology: Topology) -> list[Collective]:
    """All algorithms that can run, at all sizes."""
    rows = []
    for collective in options.collectives:
        for nbytes in options.sizes:
            case = Case(topology, collective, nbytes, costs=options.costs)
            taken = choose(case).algorithm
            for algorithm in ALGORITHMS:
                if row := _collective(case, algorithm, taken):
                    rows.append(row)
    return rows


def _collective(case: Case, algorithm: str, taken: str) -> Collective | None:
    found = prediction_of(case, algorithm)
    if found is None or not found.seconds:
        return None
    n, factor = case.topology.ranks, _FACTOR[case.collective]
    busbw = factor * (n - 1) * case.shard_bytes / found.seconds / 1e9
    return Collective(
        *(n, case.collective, case.shard_bytes, algorithm, found.seconds, _bound(case), busbw, found.method),
        auto=algorithm == taken,
    )


def _bound(case: Case) -> float:
    forward, back = case.topology.allgather_bound, turned(case.topology).allgather_bound
    ways = {"allgather": (forward,), "reduce_scatter": (back,), "allreduce": (back, forward)}[case.collective]
    return sum(way(case.shard_bytes) for way in ways)


def attention(options: Options, topology: Topology) -> list[Attention]:
    """All methods that can run, at all lengths."""
    rows = []
    for tokens in options.tokens or tuple(topology.ranks * each << 10 for each in (1, 4, 16, 64)):
        problem = problem_of(options, topology.ranks, tokens, options.batch)
        rows += attention_at(options, topology, problem)
    return rows


def problem_of(options: Options, ranks: int, tokens: int, batch: int) -> Problem:
    """The attention that was asked for, at a length and batch."""
    shape = options.heads, options.kv_heads, options.head_dim, options.itemsize
    return Problem(ranks, tokens, batch, *shape, options.causal, options.backward, options.window)


def attention_at(options: Options, topology: Topology, problem: Problem) -> list[Attention]:
    """All methods that can run."""
    links = links_on(topology, options.costs)
    found = [forecast(problem, method, links, options.device, options.interference) for method in METHODS]
    there = [estimate for estimate in found if estimate is not None]
    fitting = [estimate.seconds for estimate in there if estimate.memory_bytes <= options.room]
    ratio, least = ccr(problem, links, options.device), min(fitting, default=0.0)
    return [
        Attention(problem, estimate, ratio, fits, fits and estimate.seconds == least)
        for estimate, fits in ((estimate, estimate.memory_bytes <= options.room) for estimate in there)
    ]


def losses(options: Options, topology: Topology) -> list[Loss]:
    """With the faults that were asked for, at the largest size. TopologyError if ranks are cut off.

    ArgumentError for so many ranks that a new plan takes minutes.
    """
    if not options.faults:
        return []
    if topology.ranks > _FAULTS_OF:
        raise ArgumentError(
            f"--dead and --slow must be on a topology of up to {_FAULTS_OF} ranks, got {topology.ranks}"
        )
    broken, nbytes, rows = degraded(topology, options.faults), max(options.sizes), []
    for collective in options.collectives:
        healthy = Case(topology, collective, nbytes, costs=options.costs)
        for algorithm in ALGORITHMS[:-1]:
            before, after = (prediction_of(replace(healthy, topology=each), algorithm) for each in (topology, broken))
            if before is not None:
                kept = _kept(healthy, algorithm, broken)
                rows.append(Loss(collective, algorithm, nbytes, before.seconds, kept, after.seconds if after else None))
    return rows


def _kept(case: Case, algorithm: str, broken: Topology) -> float | None:
    """Seconds of the plan for the whole topology on the broken one; None where that takes too long to look at."""
    if case.topology.ranks > _FOLLOWED and algorithm not in ("ring", "rings"):
        return None
    choice = choice_of(algorithm, case.collective, case.topology.ranks, case.shard_bytes)
    phases = ("reduce_scatter", "allgather") if case.collective == "allreduce" else (case.collective,)
    found = []
    for phase in phases:
        schedule = _planned(case.topology, phase, algorithm, choice.slices)
        found.append(predict(replace(schedule, topology=broken), case.shard_bytes, costs=case.costs))
    return one_after_another(found).seconds


@lru_cache(maxsize=16)
def _planned(topology: Topology, phase: str, algorithm: str, slices: int | None) -> Schedule:
    return plan(topology, phase, algorithm, slices=slices)


def degraded(topology: Topology, faults: tuple[Fault, ...]) -> Topology:
    """The topology with links that are dead or slow. ArgumentError for a link that is not there."""
    links = {(link.source, link.target): link for link in topology.links}
    for fault in faults:
        ways = [way for way in ((fault.a, fault.b), (fault.b, fault.a)) if way in links]
        if not ways:
            raise ArgumentError(f"--dead and --slow must name links of {topology.name}, got {fault.a}:{fault.b}")
        for way in ways:
            link = links.pop(way)
            if fault.share:
                links[way] = replace(link, GBps=link.GBps * fault.share)
    name = f"{topology.name} with {', '.join(map(str, faults))}"
    return Topology(name, topology.ranks, topology.switches, tuple(links.values()))


def _scaled(topology: Topology, share: float) -> Topology:
    if isinstance(topology.links, MeshLinks):
        mesh = MeshLinks(topology.ranks, topology.links.GBps * share, topology.links.latency_us)
        return Topology(topology.name, topology.ranks, (), mesh)
    links = tuple(Link(link.source, link.target, link.GBps * share, link.latency_us) for link in topology.links)
    return Topology(topology.name, topology.ranks, topology.switches, links)


@dataclass(frozen=True)
class Row:
    """A row of any table, as files have it."""

    kind: str
    row: Recorded

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {"kind": self.kind, **self.row.record()}
