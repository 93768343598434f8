"""A direct allgather whose ranks fetch: each reads the others' shards where they lie, and sends nothing.

The round before has told that all may begin, and where the shards are; a round after it tells that all are done, as
shards stay until then.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from tasp_coll.transport.peer_memory import PeerMemory

PIECE = 4 << 20  # bytes in one go: between them others get their turn, and the clock is looked at


class Fetch(NamedTuple):
    """A peer's shard, of `nbytes` bytes, that belongs at `offset` of the result."""

    peer: int
    offset: int
    nbytes: int


def fetches(rank: int, sizes: Sequence[int]) -> tuple[Fetch, ...]:
    """What a rank reads, each rank's in another order, so that not all read the same. sizes: bytes of each shard."""
    starts, ranks = (0, *accumulate(sizes)), len(sizes)
    peers = ((rank - away) % ranks for away in range(1, ranks))
    return tuple(Fetch(peer, starts[peer], sizes[peer]) for peer in peers if sizes[peer])


class Reading:
    """One run, like a `Flow`. sources: where each rank's shard is; target: address of the result."""

    def __init__(self, memory: PeerMemory, wanted: Sequence[Fetch], sources: Sequence[int], target: int) -> None:
        self._memory, self._wanted, self._sources, self._target = memory, wanted, sources, target
        self._at = self._came = 0
        self.done = not wanted

    def poll(self) -> bool:
        """Read the next piece; whether there was any. A peer that has ended gives none, for ever."""
        (peer, offset, nbytes), came = self._wanted[self._at], self._came
        got = self._memory.read(
            peer, self._sources[peer] + came, self._target + offset + came, min(nbytes - came, PIECE)
        )
        self._came = came + got
        if self._came == nbytes:
            self._at, self._came = self._at + 1, 0
            self.done = self._at == len(self._wanted)
        return got > 0

    def pending(self) -> tuple[set[int], int | None]:
        """As of a `Flow`."""
        return {self._wanted[self._at].peer} if not self.done else set(), None
