"""The proof of a plan: every (query, key) pair that may be is computed exactly once, and by whom at which step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attention.blocks import FULL, TURNED, Block, Layout, Task, local_blocks, places, positions_of, step_blocks
from attention.partition import STRETCH, Indices
from attention.sequence import checked
from tasp_coll import Schedule, ScheduleError

_TILE = 1 << 24  # entries of the table that is looked at at once


@dataclass(frozen=True)
class Work:
    """Pairs that each rank computes at each step: (ranks, steps)."""

    pairs: NDArray[np.int64]

    @property
    def evenness(self) -> float:
        """Average over largest: of each step the largest over ranks, since they wait for each other. 1 is even."""
        slowest = int(self.pairs.max(axis=0).sum())
        return float(self.pairs.sum() / len(self.pairs) / slowest) if slowest else 1.0

    @property
    def balance(self) -> float:
        """Average over largest of the ranks' whole work."""
        whole = self.pairs.sum(axis=1)
        return float(whole.mean() / whole.max()) if whole.any() else 1.0


def check_work(
    total: int,
    schedule: Schedule,
    *,
    is_causal: bool = True,
    cu_seqlens: Sequence[int] | None = None,
    window: int | None = None,
    stretch: float = STRETCH,
) -> Work:
    """Replay what every rank computes on a schedule for allgather, with `total` tokens.

    The backward sweep's schedule is planned with reverse=True. stretch: as in `Communicator.allgather_steps`; attention
    takes more than the usual where computing hides longer chunks.

    Raises ScheduleError, naming rank and step, for a pair that is computed twice, or not at all, or must not be. Takes
    time and a table of total * total / ranks entries: for lengths up to some ten thousand.
    """
    partition = checked(total, schedule.ranks, is_causal, cu_seqlens)
    rows = [partition.rows(rank) for rank in range(schedule.ranks)]
    found = []
    for rank in range(schedule.ranks):
        task = Task(partition, window, rank)
        arrivals: Any = schedule.arrivals(rank, rows, partition.align, stretch)
        layouts = [tuple((row.source, row.start, row.stop) for row in step) for step in arrivals]
        found.append(check_rank(task, layouts))
    return Work(np.array(found))


def check_rank(task: Task, layouts: Sequence[Layout]) -> list[int]:
    """One rank's pairs by step; the first layout is its own shard. Raises as `check_work`."""
    steps = list(_steps(task, layouts))
    mine = task.partition.positions(task.rank)
    tile = max(_TILE // max(task.partition.total, 1), 1)
    for start in range(0, len(mine), tile):
        _check_tile(task, steps, mine[start : start + tile], start)
    return [sum(block.pairs for block in blocks) for blocks, _ in steps]


def _steps(task: Task, layouts: Sequence[Layout]) -> Iterator[tuple[tuple[Block, ...], Indices]]:
    yield local_blocks(task), task.partition.positions(task.rank)
    for layout in layouts[1:]:
        yield step_blocks(task, layout), positions_of(task, layout)


def _check_tile(task: Task, steps: list[tuple[tuple[Block, ...], Indices]], mine: Indices, start: int) -> None:
    seen = np.zeros((len(mine), task.partition.total + 1), np.int8)  # the last column: what is nobody's token
    allowed = task.allowed(mine)
    for step, (blocks, positions) in enumerate(steps):
        for block in blocks:
            _mark(seen, block, positions, start)
        if (seen[:, :-1] > allowed).any() or seen[:, -1].any():
            raise ScheduleError("a pair is computed that must not be, or again", step=step, rank=task.rank)
    if (seen[:, :-1] != allowed).any():
        query, key = np.argwhere(seen[:, :-1] != allowed)[0]
        raise ScheduleError(f"query {mine[query]} never sees key {key}", rank=task.rank)


def _mark(seen: NDArray[np.int8], block: Block, positions: Indices, start: int) -> None:
    columns = positions[places(block.keys)]
    side = (block.rows.stop - block.rows.start) // block.tiles
    for tile in range(block.tiles):
        first = block.rows.start + tile * side
        keys = columns if block.kind == FULL else columns[tile * side : (tile + 1) * side]
        low, high = max(first, start), min(first + side, start + len(seen))
        for row in range(low, high):
            at = row - first
            known = keys if block.kind == FULL else keys[at:] if block.kind == TURNED else keys[: at + 1]
            seen[row - start, known] += 1
