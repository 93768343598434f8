"""What a rank computes at each step, planned beforehand: kernel calls on full blocks and causal squares.

A query may see the keys of its own document whose distance lies in a band: not below 0 under a causal mask, less than a
window where there is one. Between a run of queries and a run of keys the band leaves a polygon with sides of 45
degrees, which `band` cuts into rectangles and triangles. A kernel computes rectangles as they are, lower triangles as
causal squares, and upper triangles, the far end of a window, as causal squares with both sequences turned round.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attention.partition import Indices, Partition, Segment, ranges, spaced

FULL, CAUSAL, TURNED = "full", "causal", "turned"

Layout = tuple[tuple[int, int, int], ...]  # of a step: (source, start, stop) of each chunk, in order
Keys = slice | Indices


@dataclass(frozen=True, eq=False)
class Block:
    """One kernel call: query rows `rows` of this rank's against the keys at `keys`.

    kind: "full": every query sees every key; "causal": the i-th sees the first i + 1; "turned": all from the i-th on.
    tiles: that many squares of equal size, one after another along both.
    """

    kind: str
    rows: slice
    keys: Keys
    tiles: int = 1

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs."""
        queries, keys = self.rows.stop - self.rows.start, count(self.keys)
        side = queries // self.tiles
        return queries * keys if self.kind == FULL else self.tiles * (side * (side + 1) // 2)


class Run(NamedTuple):
    """Tokens that lie evenly: the first at `at`, the next `stride` places on."""

    segment: Segment
    at: int
    stride: int = 1


class Part(NamedTuple):
    """A rectangle or triangle between positions: queries a..b, keys c..d."""

    kind: str
    a: int
    b: int
    c: int
    d: int


@dataclass(frozen=True)
class Band:
    """Which distances (query minus key) are seen: low..high, both included; None: no limit."""

    low: int | None = None
    high: int | None = None

    @classmethod
    def of(cls, causal: bool, window: int | None) -> Band:
        """The band of a causal mask, and of a window."""
        reach = None if window is None else window - 1
        return cls(0 if causal else None if reach is None else -reach, reach)

    def bounds(self, a: int, b: int, c: int, d: int) -> tuple[int, int]:
        """Low and high with what a rectangle can have at most in place of None."""
        low, high = a - d, b - c
        return (low if self.low is None else self.low), (high if self.high is None else self.high)


def band(seen: Band, a: int, b: int, c: int, d: int) -> Iterator[Part]:
    """The parts of queries a..b and keys c..d that a band lets through; every pair in exactly one part."""
    low, high = seen.bounds(a, b, c, d)
    a, b = max(a, c + low), min(b, d + high)  # others see nothing here
    if low > high or a >= b:
        return
    # From query c + high + 1 on the far side leaves keys out, the near side does before query d - 1 + low, which still
    # makes the last row of a triangle.
    cuts = sorted({a, b, *(at for at in (c + high + 1, d + low) if a < at < b)})
    for start, stop in pairwise(cuts):
        far, near = start - high > c, start + 1 - low < d
        if not (far and near):
            yield from _one_side(start, stop, c, d, low if near else None, high if far else None)
            continue
        side = max(high - low, 1)
        for first in range(start, stop, side):
            yield from _both_sides(first, min(first + side, stop), low, high)


def _one_side(a: int, b: int, c: int, d: int, low: int | None, high: int | None) -> Iterator[Part]:
    if low is not None:  # the last key of query a is a - low
        yield from _part(FULL, a, b, c, a - low)
        yield _square(CAUSAL, a, b, a - low)
    elif high is not None:  # the first key of query a is a - high
        yield _square(TURNED, a, b, a - high)
        yield from _part(FULL, a, b, b - high, d)
    else:
        yield from _part(FULL, a, b, c, d)


def _both_sides(a: int, b: int, low: int, high: int) -> Iterator[Part]:
    """No more queries than the band is wide, less one: two triangles that do not meet, and what is between."""
    if high == low:
        yield _square(CAUSAL, a, b, a - low)  # a single pair
        return
    yield _square(TURNED, a, b, a - high)
    yield from _part(FULL, a, b, b - high, a - low)
    yield _square(CAUSAL, a, b, a - low)


def _part(kind: str, a: int, b: int, c: int, d: int) -> Iterator[Part]:
    if c < d:
        yield Part(kind, a, b, c, d)


def _square(kind: str, a: int, b: int, c: int) -> Part:
    return Part(kind, a, b, c, c + b - a)


def blocks(queries: Iterable[Run], keys: Iterable[Run], seen: Band) -> tuple[Block, ...]:
    """The kernel calls between runs of queries and runs of keys, as few as can be: full blocks are brought together."""
    by_document: dict[int, list[Run]] = defaultdict(list)
    for run in keys:
        by_document[run.segment.document].append(run)
    seen_by: dict[tuple[int, int, int], list[tuple[int, int]]] = defaultdict(list)  # keys at, stride, count -> rows
    squares: dict[tuple[int, int], list[Block]] = defaultdict(list)
    for query in queries:
        first = query.segment.start - query.at
        for run in by_document[query.segment.document]:
            for part in band(seen, *query.segment[1:3], *run.segment[1:3]):
                at = run.at + (part.c - run.segment.start) * run.stride
                rows = part.a - first, part.b - first
                if part.kind == FULL:
                    seen_by[at, run.stride, part.d - part.c].append(rows)
                else:
                    placed = spaced(at, part.d - part.c, run.stride)
                    squares[query.at, id(run)].append(Block(part.kind, slice(*rows), placed))
    full = (Block(FULL, slice(*rows), merged(found)) for rows, found in _by_rows(seen_by).items())
    return *full, *(tiled for found in squares.values() for tiled in _tiles(found))


def _by_rows(seen_by: dict[tuple[int, int, int], list[tuple[int, int]]]) -> dict[tuple[int, int], list[slice]]:
    """Rows are cut where what they see changes, so that each is in one block and is merged once."""
    turns: dict[int, list[tuple[bool, tuple[int, int, int]]]] = defaultdict(list)
    for keys, rows in seen_by.items():
        for start, stop in rows:
            turns[start].append((True, keys))
            turns[stop].append((False, keys))
    found: dict[tuple[int, int], list[slice]] = {}
    seen: set[tuple[int, int, int]] = set()
    since = 0
    for at in sorted(turns):
        before = frozenset(seen)
        for begins, keys in sorted(turns[at]):  # ends first: keys may go on to be seen
            seen.add(keys) if begins else seen.remove(keys)
        if seen == before:
            continue
        if before:
            found[since, at] = [spaced(first, tokens, stride) for first, stride, tokens in sorted(before)]
        since = at
    return found


def merged(parts: Sequence[slice]) -> Keys:
    """One slice where the places are evenly spaced, else all of them; in ascending order."""
    if len(parts) == 1:
        return parts[0]
    places = np.sort(np.concatenate([np.arange(part.start, part.stop, part.step) for part in parts]))
    stride = int(places[1] - places[0])
    if (np.diff(places) == stride).all():
        return slice(int(places[0]), int(places[-1]) + 1, stride)
    return places


def _tiles(found: Sequence[Block]) -> Iterator[Block]:
    """Squares of equal size and kind that follow each other, as one block."""
    for kind in (TURNED, CAUSAL):
        kept: list[Block] = []
        for block in (block for block in found if block.kind == kind):
            if kept and _continues(kept[-1], block):
                last = kept.pop()
                block = Block(
                    kind,
                    slice(last.rows.start, block.rows.stop),
                    slice(_placed(last).start, _placed(block).stop, _placed(last).step),
                    last.tiles + 1,
                )
            kept.append(block)
        yield from kept


def _continues(last: Block, block: Block) -> bool:
    side = (last.rows.stop - last.rows.start) // last.tiles
    return (
        block.rows.start == last.rows.stop
        and block.rows.stop - block.rows.start == side
        and _placed(block).start == _placed(last).stop - 1 + _placed(last).step
    )


def _placed(square: Block) -> slice:
    """Where its keys are: those of squares lie evenly."""
    assert isinstance(square.keys, slice)
    return square.keys


def count(keys: Keys) -> int:
    """How many keys."""
    return len(range(*keys.indices(keys.stop))) if isinstance(keys, slice) else len(keys)


def places(keys: Keys) -> Indices:
    """Where the keys are, one by one."""
    return np.arange(keys.start, keys.stop, keys.step) if isinstance(keys, slice) else keys


@dataclass(frozen=True)
class Task:
    """An attention over a partition, seen from one rank."""

    partition: Partition
    window: int | None
    rank: int

    @property
    def band(self) -> Band:
        """What a query may see."""
        return Band.of(self.partition.causal, self.window)

    def allowed(self, rows: Indices) -> NDArray[np.bool_]:
        """Which positions those at `rows` may see, (rows, total)."""
        partition, seen, columns = self.partition, self.band, np.arange(self.partition.total)
        document = np.searchsorted(partition.documents, columns, side="right")
        distance = rows[:, None] - columns
        found = document[rows][:, None] == document
        if seen.low is not None:
            found &= distance >= seen.low
        if seen.high is not None:
            found &= distance <= seen.high
        return found

    def queries(self) -> list[Run]:
        """This rank's tokens in held order."""
        return held(self.partition, self.rank)


def held(partition: Partition, rank: int, offset: int = 0) -> list[Run]:
    """A rank's tokens in held order, the first at `offset`; segments that meet are one run."""
    found: list[Run] = []
    for document, start, stop, _ in partition.segments(rank):
        at, offset = offset, offset + stop - start
        if found and found[-1].segment[::2] == (document, start):
            (_, start, _, _), at, _ = found.pop()
        found.append(Run(Segment(document, start, stop), at))
    return found


@lru_cache(maxsize=1024)
def local_blocks(task: Task) -> tuple[Block, ...]:
    """What a rank computes with its own keys, which lie in held order."""
    runs = task.queries()
    if task.window is None:
        # What counts is the order of tokens, so that a document's two segments are like one.
        runs = _joined(runs)
    return blocks(runs, runs, task.band)


def _joined(runs: Iterable[Run]) -> list[Run]:
    spans: dict[int, tuple[int, int]] = {}
    for segment, at, _ in runs:
        spans[segment.document] = spans.get(segment.document, (at,))[0], at + segment.tokens
    return [Run(Segment(document, start, stop), start) for document, (start, stop) in spans.items()]


@lru_cache(maxsize=1024)
def step_blocks(task: Task, layout: Layout) -> tuple[Block, ...]:
    """What a rank computes with the chunks of a step, which lie one after another; places count tokens."""
    partition, runs, rows = task.partition, [], 0
    for source, start, stop in layout:
        base = rows * partition.width
        runs += [Run(piece, base + at, partition.width) for piece, at in partition.pieces(source, start, stop)]
        rows += stop - start
    return blocks(task.queries(), runs, task.band)


@lru_cache(maxsize=64)
def gathered_blocks(task: Task) -> tuple[Block, ...]:
    """What a rank computes with all other ranks' keys at once, which lie rank after rank in held order."""
    offsets = np.cumsum([0, *task.partition.lengths]).tolist()
    others = (rank for rank in range(task.partition.ranks) if rank != task.rank)
    runs = [run for rank in others for run in held(task.partition, rank, offsets[rank])]
    return blocks(task.queries(), runs, task.band)


def positions_of(task: Task, layout: Layout) -> Indices:
    """Position in the sequence of each place of a step's chunks; -1: none. For the checker."""
    partition, found = task.partition, []
    for source, start, stop in layout:
        wire = partition.wire(source)[start:stop].reshape(-1)
        known = np.concatenate([partition.positions(source), [-1]])
        found.append(known[wire])
    return np.concatenate(found) if found else ranges(())
