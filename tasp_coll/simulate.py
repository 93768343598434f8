"""How long a schedule takes on a topology: a model of links that have a rate and a latency and are shared fairly.

Execution is not lock-step: a chunk is sent on as soon as it has arrived, messages between the same two ranks go one
after another, and all transfers under way share links and switch ports fairly. Three ways lead to the time, with the
same physics:

- *steady*: every step is as the first one, and either all messages of a step arrive at the same moment, or the step
  lasts for as long as its busiest link is busy; the time is that of one step times their number, which is what the
  events would come to;
- *events*: a fluid simulation from one arrival to the next (`simulate_events`);
- *steps*: where that would be too many messages, the steps one after another, each as long as its last message.

Beside the links there is the software of each rank, which handles one message after another (`Costs`).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from tasp_coll.errors import ArgumentError, ArgumentTypeError
from tasp_coll.links import Node
from tasp_coll.patterns import ReversedPattern, RingPattern
from tasp_coll.schedule import Schedule
from tasp_coll.simulate_events import simulate
from tasp_coll.simulate_messages import Messages, in_one, messages_of, step_by_step
from tasp_coll.simulate_native import native_steps
from tasp_coll.topology import Topology

MESSAGES = 4_000  # above it steps are taken one after another
MOMENTS = 2_000  # likewise, of the events of all messages
_EQUAL = 1e-9
_NEARLY = 0.03  # what latencies may add to the time of a link that is always busy


@dataclass(frozen=True)
class Costs:
    """What software adds to the links.

    message_us: what a rank spends on each message that it sends or receives. GBps: what a rank's software can move,
    sent and received together. ranks_per_core: ranks that share a core take turns, so both count that much more.
    """

    message_us: float = 0.0
    GBps: float = math.inf
    ranks_per_core: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.message_us < math.inf:
            raise ArgumentError(f"message_us must be a finite number >= 0, got {self.message_us!r}")
        if not self.GBps > 0:
            raise ArgumentError(f"GBps must be a number > 0, got {self.GBps!r}")
        if not 0 < self.ranks_per_core < math.inf:
            raise ArgumentError(f"ranks_per_core must be a finite number > 0, got {self.ranks_per_core!r}")

    @property
    def message_s(self) -> float:
        """Seconds that a message takes at one of its ends."""
        return self.message_us * max(self.ranks_per_core, 1.0) * 1e-6

    def software_s(self, messages: int, nbytes: float) -> float:
        """Seconds that a rank needs for so many messages and bytes."""
        return messages * self.message_s + nbytes * max(self.ranks_per_core, 1.0) / (self.GBps * 1e9)


LINKS_ALONE = Costs()
# What a small message takes at each end, of MPICH over TCP on virtual clusters (tools/virtual_cluster.py) of 4 and 8
# hosts on 2 cores.
MESSAGE_US = 45.0


def software_costs(ranks_on_host: int) -> Costs:
    """What this library's own software costs on a host like this one."""
    return Costs(MESSAGE_US, ranks_per_core=ranks_on_host / (os.cpu_count() or 1))


@dataclass(frozen=True)
class Prediction:
    """The time of a schedule, and what explains it.

    method: how it was found, "steady", "events", "steps" or, elsewhere, "formula". link: the busiest one, None if
    nothing moves; utilisation: the part of the time for which its bytes keep it busy (both of an allreduce's longer
    phase). steps: when the last message of each step has arrived, seconds. software_s: what the busiest rank's
    software takes; `seconds` is at least that. events: how many moments were simulated.
    """

    seconds: float
    method: str = "steady"
    link: tuple[Node, Node] | None = None
    utilisation: float = 0.0
    steps: tuple[float, ...] = ()
    software_s: float = 0.0
    events: int = 0


def predict(schedule: Schedule, shard_bytes: float, *, costs: Costs = LINKS_ALONE) -> Prediction:
    """The time of `schedule` with shards of `shard_bytes` bytes, the largest one where they differ.

    Of an all_to_all the shard is the n blocks that a rank sends. Sums themselves cost nothing. Never below the cut
    bound, if the schedule is proved. Raises ArgumentError for bytes that are no finite number >= 0.
    """
    nbytes = _checked(shard_bytes)
    if schedule.collective == "allreduce":
        return one_after_another([predict(phase, nbytes, costs=costs) for phase in schedule.phases()])
    schedule, slices = in_one(schedule)
    steps = schedule.pattern.steps
    if not steps:
        return Prediction(0.0)
    size = len(schedule.pattern.transfers(0)) * steps
    whole, step = partial(messages_of, schedule), lambda number: messages_of(schedule, [number])
    run = _simulated(_Job(steps, _alike(schedule), size, whole, step), nbytes, costs)
    found = _prediction(run, slices, nbytes, costs)
    if slices == 1:
        return found
    return replace(found, steps=tuple(found.seconds * (number + 1) / slices for number in range(slices)))


def predict_native(
    topology: Topology,
    collective: str,
    shard_bytes: float,
    *,
    costs: Costs = LINKS_ALONE,
    in_order: bool = False,
) -> Prediction:
    """The time of an MPI library's own "allgather", "reduce_scatter" or "allreduce", by the algorithms of MPICH.

    shard_bytes: a rank's part of the whole. in_order: by a ring in rank order, whatever the size; that needs the paths
    of n pairs only. See `simulate_native`. Raises as `predict`.
    """
    nbytes = _checked(shard_bytes)
    if topology.ranks == 1:
        return Prediction(0.0)
    steps, alike = native_steps(collective, topology.ranks, math.inf if in_order else nbytes)
    size = sum(len(src) for src, *_ in steps)
    whole, step = partial(step_by_step, topology, steps), lambda number: step_by_step(topology, [steps[number]])
    return _prediction(_simulated(_Job(len(steps), alike, size, whole, step), nbytes, costs), 1, nbytes, costs)


def one_after_another(phases: Sequence[Prediction]) -> Prediction:
    """Phases of which each begins when the one before is done everywhere."""
    longest = max(phases, key=lambda phase: phase.seconds)
    before, steps = 0.0, []
    for phase in phases:
        steps += [before + end for end in phase.steps]
        before += phase.seconds
    software, events = sum(phase.software_s for phase in phases), sum(phase.events for phase in phases)
    return replace(longest, seconds=before, steps=tuple(steps), software_s=software, events=events)


class _Job(NamedTuple):
    """What there is to simulate: number of steps, whether all are as the first, messages in all, ways to get them."""

    steps: int
    alike: bool
    size: int
    whole: Callable[[], Messages]
    step: Callable[[int], Messages]


class _Run(NamedTuple):
    """What was simulated: messages, and how often they are sent. spans: what each step adds, seconds."""

    method: str
    parts: list[tuple[Messages, int]]
    spans: list[float]
    events: int


def _simulated(job: _Job, nbytes: float, costs: Costs) -> _Run:
    """The cheapest exact way, or the steps one after another."""
    delay = 2 * costs.message_s
    if job.alike:
        first = job.step(0)
        arrived, events, _ = simulate(first, nbytes, delay)
        longest = float(arrived.max(initial=0.0))
        together = bool((arrived >= longest * (1 - _EQUAL)).all())
        if together or _busiest([(first, 1)])[1] * nbytes >= longest * (1 - _NEARLY):
            return _Run("steady", [(first, job.steps)], [longest] * job.steps, events)
    if job.size <= MESSAGES:
        whole = job.whole()
        arrived, events, complete = simulate(whole, nbytes, delay, MOMENTS)
        if complete:
            ends = np.zeros(job.steps)
            np.maximum.at(ends, whole.step, arrived)
            return _Run("events", [(whole, 1)], np.diff(np.maximum.accumulate(ends), prepend=0.0).tolist(), events)
    return _one_by_one(job, nbytes, delay)


def _one_by_one(job: _Job, nbytes: float, delay: float) -> _Run:
    """The steps one after another; of those that move as much between the same ranks one is simulated."""
    kinds: dict[bytes, list[int]] = {}
    steps = [job.step(0)] if job.alike else [job.step(number) for number in range(job.steps)]
    for number, step in enumerate(steps):
        kinds.setdefault(step.likeness, []).append(number)
    spans, total, parts = [0.0] * len(steps), 0, []
    for numbers in kinds.values():
        part = steps[numbers[0]]
        arrived, events, _ = simulate(part, nbytes, delay)
        total += events
        parts.append((part, job.steps if job.alike else len(numbers)))
        for number in numbers:
            spans[number] = float(arrived.max(initial=0.0))
    return _Run("steps", parts, spans * job.steps if job.alike else spans, total)


def _prediction(run: _Run, many: int, nbytes: float, costs: Costs) -> Prediction:
    """many: for how many messages each of the simulated ones stands."""
    software = 0.0
    for part, times in run.parts:
        messages, shares = part.handled
        software += costs.software_s(times * many * messages, times * shares * nbytes)
    ends = tuple(accumulate(run.spans))
    seconds = max(ends[-1], software)
    link, busy = _busiest(run.parts)
    return Prediction(
        seconds, run.method, link, busy * nbytes / seconds if seconds else 0.0, ends, software, run.events
    )


def _busiest(parts: Sequence[tuple[Messages, int]]) -> tuple[tuple[Node, Node] | None, float]:
    """The link that takes longest for its bytes, and the seconds for shards of one byte."""
    total: dict[tuple[Node, Node], float] = {}
    for part, times in parts:
        routes = part.routes
        spent = times * routes.load(part.pair_share) / routes.capacity
        if len(parts) == 1:
            return (routes.name(int(spent.argmax())), float(spent.max())) if len(spent) else (None, 0.0)
        for number, amount in enumerate(spent.tolist()):
            total[routes.name(number)] = total.get(routes.name(number), 0.0) + amount
    link = max(total, key=total.__getitem__, default=None)
    return link, 0.0 if link is None else total[link]


def _alike(schedule: Schedule) -> bool:
    """Whether every step moves as much as the first over the same links: rings turn, with shards that are equal."""
    pattern = schedule.pattern
    inner = pattern.forward if isinstance(pattern, ReversedPattern) else pattern
    return schedule.counts is None and isinstance(inner, RingPattern)


def _checked(shard_bytes: float) -> float:
    try:
        number = float(shard_bytes)
    except (TypeError, ValueError):
        raise ArgumentTypeError(f"shard_bytes must be a number of bytes, got {shard_bytes!r}") from None
    if not 0 <= number < math.inf:
        raise ArgumentError(f"shard_bytes must be a finite number >= 0, got {shard_bytes!r}")
    return number
