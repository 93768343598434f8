"""Which rows come, or are asked for, at each step of a collective that goes step by step; nothing is run for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tasp_coll.patterns import Pattern

Key = tuple[int, int]  # origin, chunk


class Rows(NamedTuple):
    """Rows `start` to `stop` of rank `source`'s shard, on ring `ring` (0 where there are no rings)."""

    source: int
    ring: int
    start: int
    stop: int


Layout = tuple[tuple[Rows, ...], ...]  # per step


def chunks_by_step(pattern: Pattern, rank: int, chunks: int, gather: bool) -> list[list[Key]]:
    """The chunks that a rank handles at each step, sorted, one step more than the pattern has.

    gather: its own first, then what each step brings; else what each step sends, and its own last.
    """
    sends, receives = pattern.moves(rank)
    found: list[list[Key]] = [[] for _ in range(pattern.steps + 1)]
    for step, _, origin, chunk, _ in (receives if gather else sends).tolist():
        found[step + gather].append((origin, chunk))
    found[0 if gather else -1] += [(rank, chunk) for chunk in range(chunks)]
    return [sorted(keys) for keys in found]


def layout_of(steps: Sequence[Sequence[Key]], bounds: Sequence[Sequence[int]], ringed: bool) -> Layout:
    """The rows of those chunks, empty ones left out. bounds: where the chunks of each rank's shard begin."""
    found = []
    for keys in steps:
        rows = (Rows(o, chunk if ringed else 0, bounds[o][chunk], bounds[o][chunk + 1]) for o, chunk in keys)
        found.append(tuple(row for row in rows if row.start < row.stop))
    return tuple(found)
