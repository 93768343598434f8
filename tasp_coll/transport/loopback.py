"""All ranks in one process: each rank a thread, messages copied by whichever side comes second.

A send completes only when its receive has taken the bytes, the strictest of MPI's orders, so that a schedule which
runs here does not depend on buffering. Sources of the idea: msccl-tools' interpreter, httpx's in-process transport.
"""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tasp_coll.errors import CollectiveError
from tasp_coll.transport import Alarms, NativeCall, NativeRequest, Op, Pool
from tasp_coll.transport.pool import BatchPool

T = TypeVar("T")


@dataclass
class _Lane:
    sends: deque[tuple[_LoopbackBatch, int]] = field(default_factory=deque)
    receives: deque[tuple[_LoopbackBatch, int]] = field(default_factory=deque)


class LoopbackWorld:
    """`size` ranks in this process. `world.transports[r]` is rank r's; `world.run` runs a function on every rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.RLock()
        self.news = tuple(threading.Condition(self.lock) for _ in range(size))  # for each rank: others need not wake
        self.lanes: dict[tuple[int, int, int, int], _Lane] = defaultdict(_Lane)
        self._cuts: set[frozenset[int]] = set()
        self.kept: list[Any] = []  # what was in use when ranks gave up
        self.raised: dict[tuple[int, int], Alarms] = defaultdict(dict)
        self.transports = tuple(LoopbackTransport(self, rank) for rank in range(size))

    def cut(self, a: int, b: int) -> None:
        """Cut the link between two ranks: what either sends waits."""
        with self.lock:
            self._cuts.add(frozenset((a, b)))

    def mend(self, a: int, b: int) -> None:
        """The link is as new; what waited arrives."""
        with self.lock:
            self._cuts.discard(frozenset((a, b)))
            for (_, source, target, _), lane in list(self.lanes.items()):
                self.match(lane, source, target)

    def is_cut(self, a: int, b: int) -> bool:
        """Whether the link between two ranks is cut."""
        return frozenset((a, b)) in self._cuts

    def match(self, lane: _Lane, source: int, target: int) -> None:
        """Carry what has a sender and a receiver. The lock is held."""
        while lane.sends and lane.receives and not self.is_cut(source, target):
            (sender, i), (receiver, j) = lane.sends.popleft(), lane.receives.popleft()
            sent, expected = sender.ops[i], receiver.ops[j]
            if sent.nbytes > expected.nbytes:
                raise CollectiveError(f"{sent.nbytes} bytes came for a receive of {expected.nbytes}")
            ctypes.memmove(expected.address, sent.address, sent.nbytes)
            sender.end(i)
            receiver.end(j)
            self.news[source].notify_all()
            self.news[target].notify_all()

    def run(self, body: Callable[[LoopbackTransport], T]) -> list[T]:
        """body(transport) on every rank at once, each in a thread; the results by rank.

        If ranks raise, the exception of the lowest one that did is raised here after all have ended.
        """
        with ThreadPoolExecutor(self.size) as pool:
            futures = [pool.submit(body, transport) for transport in self.transports]
        return [future.result() for future in futures]


class LoopbackTransport:
    """One rank of a `LoopbackWorld`; pass it to `Communicator` as its group."""

    name = "loopback"
    background = True
    last_event = 0.0

    def __init__(self, world: LoopbackWorld, rank: int, number: int = 0) -> None:
        self.world, self.rank, self.size, self.number = world, rank, world.size, number
        self._duplicates = 0

    def duplicate(self) -> LoopbackTransport:
        """A transport whose messages never meet this one's; ranks make theirs in the same order."""
        self._duplicates += 1
        return LoopbackTransport(self.world, self.rank, self._duplicates)

    def prepare(self, ops: Sequence[Op]) -> _LoopbackBatch:
        return _LoopbackBatch(self, tuple(ops))

    def pool(self) -> Pool:
        return BatchPool(self.prepare)

    def pause(self, idle: int) -> None:
        news = self.world.news[self.rank]
        with news:
            news.wait(min(idle * 1e-4, 2e-3))

    def has_native(self, request: NativeRequest) -> bool:
        return False

    def native(self, request: NativeRequest) -> NativeCall:
        raise CollectiveError("the loopback transport has no collectives of its own")

    def alarm(self, missing: Collection[int] | None = None) -> None:
        told = None if missing is None else frozenset(missing)
        with self.world.lock:
            for rank in range(self.size):
                if rank != self.rank and not self.world.is_cut(rank, self.rank):
                    self.world.raised[rank, self.number][self.rank] = told
                    self.world.news[rank].notify_all()

    def alarms(self) -> Alarms:
        with self.world.lock:
            return dict(self.world.raised[self.rank, self.number])

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """Withdraw this rank's open messages, so that no peer writes to memory that its caller has back."""
        with self.world.lock:
            self.world.kept.extend(keep)
            for lane in self.world.lanes.values():
                for queue in (lane.sends, lane.receives):
                    mine = [entry for entry in queue if entry[0].transport is self]
                    for entry in mine:
                        queue.remove(entry)

    def close(self) -> None:
        """Nothing is held."""


class _LoopbackBatch:
    def __init__(self, transport: LoopbackTransport, ops: tuple[Op, ...]) -> None:
        self.transport, self.ops = transport, ops
        self._open: set[int] = set()
        self._done: list[int] = []

    def start(self, indices: Sequence[int]) -> None:
        world = self.transport.world
        with world.lock:
            self._open.update(indices)
            for index in indices:
                self._post(world, index)

    def start_all(self) -> None:
        self.start(range(len(self.ops)))

    def _post(self, world: LoopbackWorld, index: int) -> None:
        op, me = self.ops[index], self.transport.rank
        source, target = (me, op.peer) if op.send else (op.peer, me)
        lane = world.lanes[self.transport.number, source, target, op.lane]
        (lane.sends if op.send else lane.receives).append((self, index))
        world.match(lane, source, target)

    def end(self, index: int) -> None:
        """A message is complete. The lock is held."""
        self._done.append(index)

    def test_some(self) -> list[int]:
        with self.transport.world.lock:
            done, self._done = self._done, []
            self._open.difference_update(done)
        return done

    def test_all(self) -> bool:
        self.test_some()
        return not self._open

    def pending(self) -> list[int]:
        return sorted(self._open)

    def free(self) -> None:
        self._done.clear()
