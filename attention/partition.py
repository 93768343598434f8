"""Who holds which tokens of a sequence: equal work for every rank under a causal mask, any length, nothing padded.

Under a causal mask later tokens have more to look at. So every document is cut into 2n pieces, and a rank holds two of
them, one as far from the start as the other is from the end ("zigzag"; on many rings at once: arXiv 2509.26541).
Without a mask n pieces do. Pieces begin at rounded boundaries, and the halves of a pair are equally long: of a document
of odd length one rank holds a token more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
STRETCH = 0.05  # how much longer a chunk may be to begin at a multiple of `align`, unless computing hides more


class Segment(NamedTuple):
    """Consecutive tokens start..stop of the sequence, all of one document; `back`: from the latter half of a pair."""

    document: int
    start: int
    stop: int
    back: bool = False

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.stop - self.start


@dataclass(frozen=True)
class Partition:
    """How `total` tokens lie on `ranks` ranks. documents: boundaries, from 0 to total (one document: (0, total))."""

    total: int
    ranks: int
    causal: bool
    documents: tuple[int, ...]

    @classmethod
    def of(cls, total: int, ranks: int, causal: bool, cu_seqlens: Sequence[int] | None = None) -> Partition:
        """cu_seqlens: boundaries of packed documents, empty ones allowed; None: one document."""
        bounds = (0, total) if cu_seqlens is None else tuple(sorted({0, *map(int, cu_seqlens)}))
        return cls(total, ranks, causal, bounds)

    @property
    def width(self) -> int:
        """Tokens in a row on the wire: a pair of one from the front and one from the back, or a single one."""
        return 2 if self.causal else 1

    @property
    def align(self) -> int:
        """Rows whose multiples chunks begin at, where that makes none much longer.

        Under a mask a block sees some chunks of a step only, and kernels on CPUs were measured to be up to a tenth
        faster where the number of keys is a multiple of 16. Without one it sees them all.
        """
        return 16 if self.causal else 1

    @cached_property
    def _segments(self) -> tuple[tuple[Segment, ...], ...]:
        held: list[list[Segment]] = [[] for _ in range(self.ranks)]
        load = np.zeros(self.ranks, np.int64)
        for document, (first, last) in enumerate(pairwise(self.documents)):
            parts = [self._part(document, first, last, index) for index in range(self.ranks)]
            tokens = np.array([sum(segment.tokens for segment in part) for part in parts])
            # What is a token longer goes to the ranks that have had least, so that many short documents even out.
            takers = np.arange(self.ranks) if not load.any() else np.empty(self.ranks, np.int64)
            if load.any():
                takers[np.argsort(-tokens, kind="stable")] = np.argsort(load, kind="stable")
            load[takers] += tokens
            for part, rank in zip(parts, takers.tolist(), strict=True):
                held[rank] += [segment for segment in part if segment.tokens]
        return tuple(tuple(segments) for segments in held)

    def _part(self, document: int, first: int, last: int, index: int) -> tuple[Segment, ...]:
        """The index-th of `ranks` parts of a document."""
        length, n = last - first, self.ranks
        if not self.causal:
            return (Segment(document, first + length * index // n, first + length * (index + 1) // n),)
        start, stop = (length * at // (2 * n) for at in (index, index + 1))
        middle = stop if index == n - 1 else length - stop  # the last pair has all that is left
        return (
            Segment(document, first + start, first + stop),
            Segment(document, first + middle, last - start, back=True),
        )

    def segments(self, rank: int) -> tuple[Segment, ...]:
        """What a rank holds, in the order in which it does: ascending."""
        return self._segments[rank]

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each rank."""
        return tuple(sum(segment.tokens for segment in segments) for segments in self._segments)

    def positions(self, rank: int) -> Indices:
        """Where in the sequence the rank's tokens are, (tokens,), ascending."""
        return ranges((segment.start, segment.stop) for segment in self._segments[rank])

    @cached_property
    def order(self) -> Indices:
        """Positions of all tokens as they lie rank after rank, (total,)."""
        return np.concatenate([self.positions(rank) for rank in range(self.ranks)])

    @cached_property
    def inverse(self) -> Indices:
        """Where each position is in `order`, (total,)."""
        inverse = np.empty(self.total, np.int64)
        inverse[self.order] = np.arange(self.total)
        return inverse

    def wire(self, rank: int) -> Indices:
        """Which of the rank's tokens stand in each row on the wire, (rows, width); -1: none.

        A row has one token of the front and one of the back, so that every cut by rows brings the same work to all
        ranks, at whatever step it comes.
        """
        segments = self._segments[rank]
        offsets = np.cumsum([0, *(segment.tokens for segment in segments)])
        sides: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
        for segment, offset in zip(segments, offsets.tolist(), strict=False):
            sides[segment.back].append((offset, offset + segment.tokens))
        columns = [ranges(side) for side in sides[: self.width]]
        rows = np.full((max(map(len, columns)), self.width), -1, np.int64)
        for column, tokens in enumerate(columns):
            rows[: len(tokens), column] = tokens
        return rows

    def rows(self, rank: int) -> int:
        """Rows of the rank on the wire."""
        tokens = [0, 0]
        for segment in self._segments[rank]:
            tokens[segment.back] += segment.tokens
        return max(tokens)

    def pieces(self, rank: int, start: int, stop: int) -> list[tuple[Segment, int]]:
        """The tokens in rows start..stop of a rank's wire, each run with the place of its first in those rows.

        Places count tokens, so a run's tokens are `width` places apart.
        """
        found, seen = [], [0, 0]
        for segment in self._segments[rank]:
            document, first, _, back = segment
            begin, seen[back] = seen[back], seen[back] + segment.tokens
            low, high = max(begin, start), min(seen[back], stop)
            if low < high:
                part = Segment(document, first + low - begin, first + high - begin, back)
                found.append((part, (low - start) * self.width + int(back)))
        return found


def ranges(bounds: Any) -> Indices:
    """All integers of start..stop ranges, one after another."""
    parts = [np.arange(start, stop) for start, stop in bounds]
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def spaced(at: int, count: int, stride: int) -> slice:
    """`count` places, the first at `at`, `stride` apart."""
    return slice(at, at + (count - 1) * stride + 1, stride)


@lru_cache(maxsize=128)
def partition_of(total: int, ranks: int, causal: bool, cu_seqlens: tuple[int, ...] | None = None) -> Partition:
    """`Partition.of`, kept for the next call: a model's layers all ask for the same."""
    return Partition.of(total, ranks, causal, cu_seqlens)
