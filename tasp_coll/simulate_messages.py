"""Messages and who waits for whom: a schedule as the executor runs it, or as a library that goes step by step would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

import numpy as np

from tasp_coll.patterns import DirectPattern, Pattern, ReversedPattern, Rows
from tasp_coll.schedule import Schedule
from tasp_coll.simulate_links import Floats, Ints, Routes, routes_of
from tasp_coll.topology import Topology

STEP, SRC, DST, ORIGIN, CHUNK, RING = range(6)  # columns of numbered rows


@dataclass(frozen=True, eq=False)
class Messages:
    """Messages in the order of their steps, empty ones left out.

    src, dst, step: of each message. share: its part of the largest shard. waits: for how many others each one waits;
    follows[first[i]:first[i + 1]]: those that wait for message i to have arrived. behind: the one that may start only
    after message i may, -1 if none.
    """

    topology: Topology
    src: Ints
    dst: Ints
    step: Ints
    share: Floats
    waits: Ints
    first: Ints
    follows: Ints
    behind: Ints

    @cached_property
    def _pairing(self) -> tuple[Ints, Ints]:
        return np.unique(self.src * self.topology.ranks + self.dst, return_inverse=True)

    @property
    def pair(self) -> Ints:
        """The pair of ranks of each message, by its number in `routes`."""
        return self._pairing[1]

    @cached_property
    def routes(self) -> Routes:
        """The paths of all pairs of ranks that send."""
        src, dst = np.divmod(self._pairing[0], self.topology.ranks)
        return routes_of(self.topology, src, dst)

    @cached_property
    def pair_share(self) -> Floats:
        """What each pair sends in all, as a part of the largest shard."""
        return np.bincount(self.pair, self.share, len(self._pairing[0])).astype(np.float64)

    @property
    def likeness(self) -> bytes:
        """Equal for messages of equal parts of a shard between the same ranks, whatever they wait for."""
        order = np.lexsort((self.share, self.dst, self.src))
        return b"".join(column[order].tobytes() for column in (self.src, self.dst, self.share))

    @cached_property
    def handled(self) -> tuple[int, float]:
        """The most messages, and parts of a shard, that a rank sends and receives."""
        ranks = self.topology.ranks
        messages = np.bincount(self.src, minlength=ranks) + np.bincount(self.dst, minlength=ranks)
        shares = np.bincount(self.src, self.share, ranks) + np.bincount(self.dst, self.share, ranks)
        return int(messages.max(initial=0)), float(shares.max(initial=0.0))


def messages_of(schedule: Schedule, steps: Iterable[int] | None = None) -> Messages:
    """The messages of a schedule of one phase, or of some of its steps.

    A chunk is sent on when all that its sender receives of it in earlier steps is there. Messages from one rank to
    another on one ring keep their order.
    """
    pattern, weights = schedule.pattern, np.array([float(weight) for weight in schedule.weights])
    counts = np.array(schedule.counts or (1,) * schedule.ranks, np.float64)
    rows = numbered([pattern.transfers(step) for step in (range(pattern.steps) if steps is None else steps)])
    share = weights[rows[:, CHUNK]] * (counts[rows[:, ORIGIN]] / max(counts.max(), 1.0))
    rows, share = rows[share > 0], share[share > 0]
    before, after = _handed_on(rows, schedule.ranks, len(weights))
    return _linked(schedule.topology, rows, share, before, after, _behind(rows))


def in_one(schedule: Schedule) -> tuple[Schedule, int]:
    """A direct exchange in one slice, and how many it had: slices wait for nothing. Other schedules as they are."""
    turned = isinstance(schedule.pattern, ReversedPattern)
    inner = schedule.pattern.forward if isinstance(schedule.pattern, ReversedPattern) else schedule.pattern
    if not isinstance(inner, DirectPattern) or inner.slices < 2 or not inner.steps:
        return schedule, 1
    whole = DirectPattern(inner.ranks, 1)
    pattern: Pattern = ReversedPattern(whole) if turned else whole
    return replace(schedule, pattern=pattern, weights=(Fraction(1),)), inner.slices


def step_by_step(topology: Topology, steps: Sequence[tuple[Ints, Ints, Floats]]) -> Messages:
    """Messages (src, dst, share) of steps that each rank begins when it is done with the one before."""
    parts = [np.stack([src, dst, src, src, src], axis=1) for src, dst, _ in steps]
    rows = numbered(parts)
    share = np.concatenate([share for *_, share in steps]) if steps else np.empty(0)
    who = np.concatenate([rows[:, [STEP, SRC]], rows[:, [STEP, DST]]])
    done = who[:, 0] * topology.ranks + who[:, 1]
    wanted = (rows[:, STEP] - 1) * topology.ranks + rows[:, SRC]
    before, after = _joined(done, wanted)
    none = np.full(len(rows), -1, np.int64)
    return _linked(topology, rows, share, before % max(len(rows), 1), after, none)


def numbered(parts: Sequence[Rows]) -> Rows:
    """The rows of all steps in one table, with the step in front."""
    tables = [np.insert(rows, 0, step, axis=1) for step, rows in enumerate(parts)]
    return np.concatenate(tables) if tables else np.empty((0, 6), np.int64)


def _handed_on(rows: Rows, ranks: int, chunks: int) -> tuple[Ints, Ints]:
    """Pairs (received, sent on) of messages."""
    what = rows[:, ORIGIN] * chunks + rows[:, CHUNK]
    received, sent = (rows[:, end] * (ranks * chunks) + what for end in (DST, SRC))
    before, after = _joined(received, sent)
    earlier = rows[before, STEP] < rows[after, STEP]
    return before[earlier], after[earlier]


def _joined(left: Ints, right: Ints) -> tuple[Ints, Ints]:
    """All (i, j) with left[i] == right[j]."""
    order = np.argsort(left, kind="stable")
    ordered = left[order]
    low, high = (np.searchsorted(ordered, right, side) for side in ("left", "right"))
    lengths = high - low
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return order[np.repeat(low, lengths) + within], np.repeat(np.arange(len(right)), lengths)


def _behind(rows: Rows) -> Ints:
    """The next message of the same lane: from the same rank to the same rank on the same ring."""
    order = np.lexsort((rows[:, STEP], rows[:, RING], rows[:, DST], rows[:, SRC]))
    lanes = rows[order][:, [SRC, DST, RING]]
    same = (lanes[1:] == lanes[:-1]).all(axis=1)
    behind = np.full(len(rows), -1, np.int64)
    behind[order[:-1][same]] = order[1:][same]
    return behind


def _linked(topology: Topology, rows: Rows, share: Floats, before: Ints, after: Ints, behind: Ints) -> Messages:
    count = len(rows)
    waits = np.bincount(after, minlength=count) + np.bincount(behind[behind >= 0], minlength=count)
    order = np.argsort(before, kind="stable")
    first = np.concatenate([[0], np.cumsum(np.bincount(before, minlength=count))])
    src, dst, step = (np.ascontiguousarray(rows[:, column]) for column in (SRC, DST, STEP))
    return Messages(topology, src, dst, step, share, waits, first, after[order], behind)
