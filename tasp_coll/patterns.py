"""Patterns: the rules behind schedules, as integer arrays made on demand.

A pattern answers two questions without knowing bytes or dtypes: all transfers of one step (rows of src, dst, origin,
chunk, ring), and all transfers of one rank (rows of step, peer, origin, chunk, ring, sends and receives apart, in
the order of steps). The second costs no more than the rank's own transfers.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tasp_coll.errors import ScheduleError

Rows = NDArray[np.int64]


class Pattern(Protocol):
    """What every pattern offers."""

    @property
    def steps(self) -> int:
        """Number of steps."""

    def transfers(self, step: int) -> Rows:
        """Rows (src, dst, origin, chunk, ring) of one step."""

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        """One rank's sends and receives: rows (step, peer, origin, chunk, ring) in the order of steps."""


def as_rows(*columns: NDArray[np.int64] | int) -> Rows:
    """Columns, broadcast against each other, as rows."""
    return np.stack([column.ravel() for column in np.broadcast_arrays(*columns)], axis=1).astype(np.int64)


@dataclass(frozen=True)
class RingPattern:
    """AllGather on rings: at step t each rank hands on, on every ring, the chunk that started t ranks before it."""

    rings: tuple[tuple[int, ...], ...]

    @property
    def steps(self) -> int:
        return len(self.rings[0]) - 1

    @cached_property
    def order(self) -> Rows:
        """The rings as a (k, n) array."""
        return np.array(self.rings, dtype=np.int64)

    @cached_property
    def position(self) -> Rows:
        """position[i, r]: where rank r stands on ring i."""
        return np.argsort(self.order, axis=1)

    def transfers(self, step: int) -> Rows:
        order = self.order
        ring = np.arange(len(order))[:, None]
        return as_rows(order, np.roll(order, -1, axis=1), np.roll(order, step, axis=1), ring, ring)

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        k, n = self.order.shape
        ring = np.arange(k)[None, :]
        at = self.position[:, rank][None, :]
        step = np.arange(n - 1)[:, None]
        here, before = (at - step) % n, (at - 1 - step) % n
        sends = as_rows(step, self.order[ring, (at + 1) % n], self.order[ring, here], ring, ring)
        receives = as_rows(step, self.order[ring, (at - 1) % n], self.order[ring, before], ring, ring)
        return sends, receives


@dataclass(frozen=True)
class DirectPattern:
    """AllGather by direct exchange: at step t every rank sends slice t of its own shard to every peer.

    `descending`: the last slice first.
    """

    ranks: int
    slices: int
    descending: bool = False

    @property
    def steps(self) -> int:
        return self.slices if self.ranks > 1 else 0

    def transfers(self, step: int) -> Rows:
        src = np.arange(self.ranks)[:, None]
        dst = (src + np.arange(1, self.ranks)[None, :]) % self.ranks
        return as_rows(src, dst, src, self._slice(step), 0)

    def _slice(self, step: int | Rows) -> int | Rows:
        return self.slices - 1 - step if self.descending else step

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        step = np.arange(self.steps)[:, None]
        away = np.arange(1, self.ranks)[None, :]
        to, source = (rank + away) % self.ranks, (rank - away) % self.ranks
        part = self._slice(step)
        return as_rows(step, to, rank, part, 0), as_rows(step, source, source, part, 0)


@dataclass(frozen=True)
class AllToAllPattern:
    """Direct exchange of blocks: chunk d of every shard goes to rank d, all in one step."""

    ranks: int

    @property
    def steps(self) -> int:
        return 1 if self.ranks > 1 else 0

    def transfers(self, step: int) -> Rows:
        src = np.arange(self.ranks)[:, None]
        dst = (src + np.arange(1, self.ranks)[None, :]) % self.ranks
        return as_rows(src, dst, src, dst, 0)

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        away = np.arange(1, self.ranks) if self.ranks > 1 else np.arange(0)
        to, source = (rank + away) % self.ranks, (rank - away) % self.ranks
        return as_rows(0, to, rank, to, 0), as_rows(0, source, source, rank, 0)


@dataclass(frozen=True, eq=False)
class ListedPattern:
    """A user's own steps, held as rows."""

    ranks: int
    rows: tuple[Rows, ...]

    @classmethod
    def from_steps(cls, ranks: int, steps: Iterable[Iterable[Sequence[int]]]) -> ListedPattern:
        """Checks that ranks exist and numbers are not negative; the rest is for `verify`."""
        table = []
        for number, step in enumerate(steps):
            listed = [_checked_transfer(transfer, number, ranks) for transfer in step]
            table.append(np.array(listed, dtype=np.int64).reshape(-1, 5))
        return cls(ranks, tuple(table))

    @property
    def steps(self) -> int:
        return len(self.rows)

    def transfers(self, step: int) -> Rows:
        return self.rows[step]

    @cached_property
    def _numbered(self) -> Rows:
        parts = [np.insert(rows, 0, step, axis=1) for step, rows in enumerate(self.rows)]
        return np.concatenate(parts) if parts else np.empty((0, 6), dtype=np.int64)

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        rows = self._numbered
        return rows[rows[:, 1] == rank][:, [0, 2, 3, 4, 5]], rows[rows[:, 2] == rank][:, [0, 1, 3, 4, 5]]


def _checked_transfer(given: Sequence[int], step: int, ranks: int) -> tuple[int, ...]:
    try:
        transfer = tuple(operator.index(number) for number in given)
        src, dst, origin, chunk, ring = transfer
    except (TypeError, ValueError):
        rule = f"a transfer is five integers, src, dst, origin, chunk, ring; got {given!r}"
        raise ScheduleError(rule, step=step) from None
    place = {"step": step, "rank": src, "ring": ring, "chunk": chunk}
    for name, value in (("src", src), ("dst", dst), ("origin", origin)):
        if not 0 <= value < ranks:
            raise ScheduleError(f"{name} {value} is not one of the ranks 0 to {ranks - 1}", **place)
    if src == dst:
        raise ScheduleError(f"rank {src} sends to itself", **place)
    if chunk < 0 or ring < 0:
        raise ScheduleError(f"chunk and ring must be >= 0, got {transfer!r}", **place)
    return transfer


@dataclass(frozen=True, eq=False)
class ReversedPattern:
    """Time reversal: what was received is sent back, last step first. Turns an allgather into a reduce-scatter."""

    forward: Pattern

    @property
    def steps(self) -> int:
        return self.forward.steps

    def transfers(self, step: int) -> Rows:
        return self.forward.transfers(self.steps - 1 - step)[:, [1, 0, 2, 3, 4]]

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        sends, receives = self.forward.moves(rank)
        return self._back(receives), self._back(sends)

    def _back(self, rows: Rows) -> Rows:
        turned = rows[::-1].copy()
        turned[:, 0] = self.steps - 1 - turned[:, 0]
        return turned


@dataclass(frozen=True, eq=False)
class ChainedPattern:
    """One pattern after another."""

    first: Pattern
    second: Pattern

    @property
    def steps(self) -> int:
        return self.first.steps + self.second.steps

    def transfers(self, step: int) -> Rows:
        head = self.first.steps
        return self.first.transfers(step) if step < head else self.second.transfers(step - head)

    def moves(self, rank: int) -> tuple[Rows, Rows]:
        shift = np.array([self.first.steps, 0, 0, 0, 0])
        first, second = self.first.moves(rank), self.second.moves(rank)
        sends, receives = (np.concatenate([a, b + shift]) for a, b in zip(first, second, strict=True))
        return sends, receives
