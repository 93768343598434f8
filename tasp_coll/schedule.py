"""Schedules: who sends which chunk of whose shard to whom at each step.

A schedule is rings and a rule, not a list: a `Pattern` of an AllGather (or its reversal, which is a
ReduceScatter) makes the transfers of a step when they are asked for, and the transfers of one rank without
those of the others. Every shard is cut into as many chunks as there are weights.

Sources: ring pipelining as in NCCL and TASP (arXiv 2509.26541); reduce-scatter as time reversal of all-gather
is folklore, see e.g. ForestColl (arXiv 2402.06787).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, overload

import numpy as np

from tasp_coll.decomposition import decomposition_of
from tasp_coll.errors import ArgumentError, ScheduleError, TopologyError
from tasp_coll.hierarchical import OTHERS, HierarchicalPattern, capacity_share
from tasp_coll.layouts import Layout, chunks_by_step, layout_of
from tasp_coll.links import is_count, is_share
from tasp_coll.nodes import nodes_of
from tasp_coll.patterns import (
    AllToAllPattern,
    ChainedPattern,
    DirectPattern,
    ListedPattern,
    Pattern,
    ReversedPattern,
    RingPattern,
)
from tasp_coll.rings import Ring
from tasp_coll.topology import Topology

STRETCH = 0.05  # what alignment may add to a chunk's length

COLLECTIVES = ("allgather", "reduce_scatter", "allreduce", "all_to_all")
ALGORITHMS = ("rings", "ring", "direct", "hierarchical")
_SLICED = ("direct", "hierarchical")
_SLICES = 8  # of a hierarchical plan: 1/8 of a shard's time on the first NIC before anything can overlap


class Transfer(NamedTuple):
    """Chunk `chunk` of `origin`'s shard moves from rank `src` to rank `dst`, on ring `ring`.

    In a reduction the shard is the one that ends at `origin`, and what moves is the sum so far. Transfers from one
    rank to another on one ring arrive in the order of their steps.
    """

    src: int
    dst: int
    origin: int
    chunk: int
    ring: int


class Steps(Sequence[tuple[Transfer, ...]]):
    """The steps of a schedule, each made when it is asked for."""

    def __init__(self, pattern: Pattern) -> None:
        self._pattern = pattern

    def __len__(self) -> int:
        return self._pattern.steps

    @overload
    def __getitem__(self, index: int) -> tuple[Transfer, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[tuple[Transfer, ...], ...]: ...
    def __getitem__(self, index: int | slice) -> tuple[Transfer, ...] | tuple[tuple[Transfer, ...], ...]:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        step = range(len(self))[index]
        return tuple(Transfer(*row) for row in self._pattern.transfers(step).tolist())

    def __iter__(self) -> Iterator[tuple[Transfer, ...]]:
        return (self[step] for step in range(len(self)))


@dataclass(frozen=True, eq=False)
class Schedule:
    """A plan for one collective on one topology; make it with `plan` or `Schedule.from_steps`.

    weights: share of a shard in each chunk, they add up to 1. counts: rows of each rank's shard, None where all are
    equal. capacity_share: the largest part of a (largest) shard that a link of the topology's highest rate may carry
    in one step, slower links in proportion; None where nothing is claimed.
    """

    topology: Topology
    collective: str
    algorithm: str
    pattern: Pattern
    weights: tuple[Fraction, ...]
    rings: tuple[Ring, ...] = ()
    counts: tuple[int, ...] | None = None
    capacity_share: Fraction | None = None

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.topology.ranks

    @property
    def chunks(self) -> int:
        """Number of chunks into which each shard is cut."""
        return len(self.weights)

    @property
    def ring_count(self) -> int:
        """One more than the highest number of a ring in its transfers."""
        if self.algorithm == "hierarchical":
            return OTHERS + 1
        if isinstance(self.pattern, ListedPattern):
            return 1 + max((int(rows[:, 4].max()) for rows in self.pattern.rows if len(rows)), default=0)
        return max(len(self.rings), 1)

    @property
    def steps(self) -> Steps:
        """The steps, a sequence of tuples of `Transfer`."""
        return Steps(self.pattern)

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest, equal where two schedules move the same chunks in the same steps on equal topologies."""
        digest = hashlib.blake2b(digest_size=16)
        head = (self.topology.fingerprint, self.collective, self.weights, self.counts, self.pattern.steps)
        digest.update(repr(head).encode())
        for step in range(self.pattern.steps):
            rows = self.pattern.transfers(step).astype("<i8")
            digest.update(rows[np.lexsort(rows.T)].tobytes())
        return digest.hexdigest()

    def phases(self) -> tuple[Schedule, Schedule]:
        """An allreduce as the reduce-scatter and the allgather that it consists of."""
        if isinstance(self.pattern, ChainedPattern):
            first, second = self.pattern.first, self.pattern.second
        elif self.collective == "allreduce":
            from tasp_coll.verify import reduction_steps

            rows = [self.pattern.transfers(step) for step in range(self.pattern.steps)]
            head = reduction_steps(self)
            first = ListedPattern(self.ranks, tuple(rows[:head]))
            second = ListedPattern(self.ranks, tuple(rows[head:]))
        else:
            raise ScheduleError(f"only an allreduce has two phases, this is an {self.collective}")
        return (
            replace(self, collective="reduce_scatter", pattern=first),
            replace(self, collective="allgather", pattern=second),
        )

    def arrivals(self, rank: int, rows: Sequence[int], align: int = 1, stretch: float = STRETCH) -> Layout:
        """What each step brings to `rank`, its own chunks first: the `layout` of `Communicator.allgather_steps`.

        rows: of each rank's shard (rows of no bytes never travel). align, stretch: as there. Per step `Rows` (source,
        ring, start, stop), sorted; empty chunks are left out. For a reversed sweep ask the schedule that was planned
        with reverse=True; that of a reduce_scatter says what `reduce_scatter_steps` asks for, own chunks last: the same
        rows as in the reversed sweep, each one step earlier, where that comes from rings or slices.

        Raises ScheduleError for other collectives, and ArgumentError for bad arguments.
        """
        if self.collective not in ("allgather", "reduce_scatter"):
            raise ScheduleError(f"only allgather and reduce_scatter go step by step, this is an {self.collective}")
        if not 0 <= rank < self.ranks:
            raise ArgumentError(f"rank must be from 0 to {self.ranks - 1}, got {rank!r}")
        if not is_count(align):
            raise ArgumentError(f"align must be an integer >= 1, got {align!r}")
        if not is_share(stretch):
            raise ArgumentError(f"stretch must be a number >= 0, got {stretch!r}")
        grain = Grain(int(align), float(stretch))
        bounds = [grain.cut(count, self.weights) for count in _check_counts(rows, self.ranks, "rows")]
        steps = chunks_by_step(self.pattern, rank, self.chunks, self.collective == "allgather")
        return layout_of(steps, bounds, bool(self.rings))

    def verify(self, method: str = "auto") -> str:
        """Prove the schedule; raises `ScheduleError` that names step, rank, ring and chunk of the first fault.

        Returns the method that proved it.

        method: "replay" follows every chunk, "structure" argues from the rings (any size), "auto" takes replay
        while that is cheap. What is proved stands in `tasp_coll.verify`.
        """
        from tasp_coll.verify import verify

        return verify(self, method)

    @classmethod
    def from_steps(
        cls,
        topology: Topology,
        collective: str,
        steps: Iterable[Iterable[Sequence[int]]],
        *,
        weights: Sequence[Fraction | float] | None = None,
        capacity_share: Fraction | None = None,
    ) -> Schedule:
        """A user's own schedule, to be proved and run like ours: pass it as `algorithm`.

        steps: per step the transfers, `Transfer` or (src, dst, origin, chunk, ring). Chunks number 0 to k-1; their
        weights are equal unless `weights` says otherwise. For "allreduce" the steps begin with a reduce-scatter.
        In one step a ring carries at most one chunk from one rank to another: number the rings accordingly, from 0,
        and below max(2 * ranks, 10) if it is to run on a communicator.

        Raises ArgumentError for bad arguments and ScheduleError for a transfer that names no rank, or no chunk.
        The proof is a separate call, `verify()`; a communicator makes it before the first run.
        """
        _check_collective(collective)
        pattern = ListedPattern.from_steps(topology.ranks, steps)
        largest = max((int(rows[:, 3].max()) for rows in pattern.rows if len(rows)), default=0)
        transfers = sum(len(rows) for rows in pattern.rows)
        if collective != "all_to_all" and largest >= max(transfers, 1):
            raise ScheduleError(
                f"chunks are numbered from 0, and {transfers} transfers do not move so many", chunk=largest
            )
        chunks = topology.ranks if collective == "all_to_all" else largest + 1
        if weights is None:
            shares = uniform_weights(chunks)
        else:
            shares = tuple(Fraction(weight) for weight in weights)
            if len(shares) <= largest or sum(shares) != 1 or min(shares) < 0:
                raise ArgumentError(
                    f"weights must be {largest + 1} or more shares that add up to exactly 1, got {weights!r}"
                )
        if collective == "all_to_all" and largest >= topology.ranks:
            raise ScheduleError(
                f"an all_to_all has one chunk per destination, 0 to {topology.ranks - 1}", chunk=largest
            )
        return cls(topology, collective, "custom", pattern, shares, capacity_share=capacity_share)


def uniform_weights(chunks: int) -> tuple[Fraction, ...]:
    """`chunks` equal shares of 1."""
    return (Fraction(1, chunks),) * chunks


def cut(total: int, weights: Sequence[Fraction], align: int = 1) -> tuple[int, ...]:
    """Boundaries 0 = b[0] <= ... <= b[k] = total of k chunks in proportion to `weights`, multiples of `align`.

    They depend on nothing but the arguments. Chunks may be empty.
    """
    k = len(weights)
    if weights.count(weights[0]) == k:
        inner = [i * total // k for i in range(1, k)]
    else:
        inner, running = [], Fraction(0)
        for weight in weights[:-1]:
            running += weight
            inner.append(int(running * total))
    return (0, *(at // align * align for at in inner), total)


class Grain(NamedTuple):
    """How rows are cut: chunks begin at multiples of `align` where that makes none longer by more than `stretch` of
    its length, else anywhere."""

    align: int = 1
    stretch: float = STRETCH

    def cut(self, total: int, weights: Sequence[Fraction]) -> tuple[int, ...]:
        """As `cut`."""
        anywhere, aligned = cut(total, weights), cut(total, weights, self.align)
        most = 1 + Fraction(self.stretch)
        for (start, stop), (first, last) in zip(pairwise(anywhere), pairwise(aligned), strict=True):
            if last - first > (stop - start) * most:
                return anywhere
        return aligned


ANYWHERE = Grain()


def plan(
    topology: Topology | str,
    collective: str = "allgather",
    algorithm: str = "rings",
    rings: int | None = None,
    counts: Sequence[int] | None = None,
    *,
    slices: int | None = None,
    reverse: bool = False,
) -> Schedule:
    """The schedule of `collective` by `algorithm` on `topology`. It is not yet proved: see `Schedule.verify`.

    topology: a Topology or a preset's name. collective: "allgather", "reduce_scatter", "allreduce" or "all_to_all"
    (direct only). algorithm: "rings" (all link-disjoint rings, or `rings` of them), "ring" (one), "direct" (the
    sliced direct exchange: at step t every rank sends slice t of its own shard to every peer; `slices`, n-1 if left
    out) or "hierarchical" (several equal nodes, see `tasp_coll.hierarchical`; `slices`, 8 if left out). counts: rows
    of each rank's shard where they differ, 0 allowed. reverse: an allgather in the opposite direction round each
    ring, or with the slices in the opposite order; the mirror image of the reduce_scatter. Where links differ by
    direction, so that rings cannot be turned round, both keep to the rings' own direction.

    Raises ArgumentError or TopologyError that names the argument, the rule and what came.
    """
    if isinstance(topology, str):
        topology = Topology.preset(topology)
    _check_collective(collective)
    if algorithm not in ALGORITHMS:
        raise ArgumentError(f"algorithm must be one of {', '.join(ALGORITHMS)} to be planned, got {algorithm!r}")
    if rings is not None and algorithm != "rings":
        raise ArgumentError(f"rings applies to algorithm 'rings' only, got rings={rings!r} with {algorithm!r}")
    if slices is not None and (algorithm not in _SLICED or collective == "all_to_all"):
        raise ArgumentError(f"slices applies to {' and '.join(_SLICED)} only, got slices={slices!r} with {algorithm!r}")
    if reverse and (collective != "allgather" or algorithm == "hierarchical"):
        raise ArgumentError(
            f"reverse applies to collective 'allgather' by rings or direct only, got {collective!r} by {algorithm!r}"
        )
    rows = None if counts is None else _check_counts(counts, topology.ranks)
    if collective == "all_to_all":
        return _plan_all_to_all(topology, algorithm, rows)
    if algorithm == "direct":
        return _plan_direct(topology, collective, slices, rows, reverse)
    if algorithm == "hierarchical":
        return _plan_hierarchical(topology, collective, slices, rows)
    return _plan_rings(topology, collective, algorithm, 1 if algorithm == "ring" else rings, rows, reverse)


def _check_collective(collective: str) -> None:
    if collective not in COLLECTIVES:
        raise ArgumentError(f"collective must be one of {', '.join(COLLECTIVES)}, got {collective!r}")


def _check_counts(counts: Sequence[int], ranks: int, name: str = "counts") -> tuple[int, ...]:
    rows = tuple(counts)
    if len(rows) != ranks or not all(
        isinstance(row, (int, np.integer)) and not isinstance(row, bool) and row >= 0 for row in rows
    ):
        raise ArgumentError(f"{name} must be {ranks} integers >= 0, one per rank, got {counts!r}")
    return tuple(int(row) for row in rows)


def _directed(pattern: Pattern, collective: str, backward: Pattern | None = None) -> Pattern:
    """The collective's pattern from that of an allgather; `backward`: another to turn round for a reduction."""
    if collective == "allgather":
        return pattern
    back = ReversedPattern(pattern if backward is None else backward)
    return back if collective == "reduce_scatter" else ChainedPattern(back, pattern)


def _plan_rings(
    topology: Topology,
    collective: str,
    algorithm: str,
    count: int | None,
    counts: tuple[int, ...] | None,
    reverse: bool,
) -> Schedule:
    found = decomposition_of(topology, count)
    rings = tuple(ring.reversed() for ring in found.backward) if reverse else found.rings
    pattern = _ring_pattern(rings)
    back = pattern if found.reversible else _ring_pattern(found.backward)
    weights = tuple(ring.weight for ring in rings)
    directed = _directed(pattern, collective, back)
    return Schedule(topology, collective, algorithm, directed, weights, rings, counts, found.share)


def _ring_pattern(rings: Sequence[Ring]) -> RingPattern:
    return RingPattern(tuple(ring.ranks for ring in rings))


def _plan_direct(
    topology: Topology, collective: str, slices: int | None, counts: tuple[int, ...] | None, reverse: bool
) -> Schedule:
    n = topology.ranks
    slices = _check_slices(slices, max(n - 1, 1))
    pattern = _directed(DirectPattern(n, slices, reverse), collective)
    share = _direct_share(topology, Fraction(1, slices))
    return Schedule(topology, collective, "direct", pattern, uniform_weights(slices), (), counts, share)


def _plan_hierarchical(
    topology: Topology, collective: str, slices: int | None, counts: tuple[int, ...] | None
) -> Schedule:
    nodes = nodes_of(topology)
    if nodes is None:
        raise TopologyError(
            f"algorithm 'hierarchical' needs two or more equal nodes, each a full mesh or a switch of equal links, and "
            f"an equal NIC for every rank; topology {topology.name!r} is not of that form"
        )
    slices = _check_slices(slices, _SLICES)
    pattern = _directed(HierarchicalPattern(nodes.groups, slices), collective)
    share = capacity_share(nodes, slices)
    return Schedule(topology, collective, "hierarchical", pattern, uniform_weights(slices), (), counts, share)


def _check_slices(slices: int | None, default: int) -> int:
    if slices is None:
        return default
    if not isinstance(slices, int) or isinstance(slices, bool) or slices < 1:
        raise ArgumentError(f"slices must be an integer >= 1, got {slices!r}")
    return slices


def _plan_all_to_all(topology: Topology, algorithm: str, counts: tuple[int, ...] | None) -> Schedule:
    if algorithm != "direct":
        raise ArgumentError(f"all_to_all is a direct exchange: algorithm must be 'direct', got {algorithm!r}")
    if counts is not None:
        raise ArgumentError(f"counts does not apply to all_to_all, whose blocks are equal, got {counts!r}")
    n = topology.ranks
    share = _direct_share(topology, Fraction(1, n))
    return Schedule(topology, "all_to_all", "direct", AllToAllPattern(n), uniform_weights(n), capacity_share=share)


def _direct_share(topology: Topology, chunk: Fraction) -> Fraction | None:
    """A link of a full mesh carries one chunk in a step, a switch port one for each peer; else nothing is claimed."""
    if topology.is_full_mesh:
        return chunk
    return chunk * (topology.ranks - 1) if topology.is_single_switch else None
