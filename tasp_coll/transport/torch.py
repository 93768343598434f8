"""Messages over torch.distributed's point-to-point, in host memory: for ranks that torchrun started.

Gloo tells that a message is complete only to whoever waits for it, so each lane has a thread that waits; it holds no
GIL meanwhile. torch is imported here and in `bootstrap` only, and by neither before a communicator is made.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Sequence
from datetime import timedelta
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist

from tasp_coll.errors import CollectiveError, PeerTimeoutError
from tasp_coll.forks import Origin
from tasp_coll.transport import Alarms, NativeCall, NativeRequest, Op, Pool
from tasp_coll.transport.pool import BatchPool

ORIGIN = Origin("torch.distributed")
_FOREVER = timedelta(days=365)  # Gloo's own limit would break its connections; the engine has the user's timeout
_LONGEST_PAUSE_S = 2e-3
_LEAVE_SECONDS = 2.0
_NEVER_SENT = 2**31 - 1  # a tag
_abandoned: list[tuple[TorchTransport, Any]] = []
_REDUCE_OPS = {
    "sum": dist.ReduceOp.SUM,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
_GLOO_REDUCES = {"float16", "float32", "float64", "int8", "uint8", "int32", "int64"}


class TorchTransport:
    """Gloo connections of our own between the ranks that share `store`, so that messages never meet the caller's.

    store: a torch.distributed store, of which this takes keys below a prefix that no one else uses.
    timeout: seconds to wait for the other ranks to come; PeerTimeoutError names those that do not.
    """

    name = "torch"
    background = True
    last_event = 0.0

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout = store, timeout
        _meet(store, rank, size, timeout)
        limit = timedelta(seconds=min(timeout, 1e6))
        self._gloo: Any = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, limit)
        self._board = _Board(dist.PrefixStore("alarms", store), rank, size)
        self._waiters: dict[tuple[bool, int, int], SimpleQueue[_Started | None]] = {}
        self._threads: list[threading.Thread] = []
        self._news = threading.Event()
        self._duplicates = 0

    def duplicate(self) -> TorchTransport:
        """A transport whose messages never meet this one's; ranks make theirs in the same order."""
        self._duplicates += 1
        store = dist.PrefixStore(f"duplicate/{self._duplicates}", self._store)
        return TorchTransport(store, self.rank, self.size, self._timeout)

    def prepare(self, ops: Sequence[Op]) -> _TorchBatch:
        return _TorchBatch(self, ops)

    def begin(self, op: Op, memory: torch.Tensor, batch: _TorchBatch, index: int) -> None:
        """Start a message; the batch hears of its end."""
        start = self._gloo.send if op.send else self._gloo.recv
        try:
            work = start([memory], op.peer, op.lane)
        except RuntimeError as error:
            raise _lost(op.peer, error) from error
        lane = (op.send, op.peer, op.lane)
        queue = self._waiters.get(lane)
        if queue is None:
            queue = self._waiters[lane] = SimpleQueue()
            name = f"tasp_coll {'to' if op.send else 'from'} {op.peer}"
            self._threads.append(threading.Thread(target=_wait, args=(queue, self._news), name=name, daemon=True))
            self._threads[-1].start()
        queue.put((work, batch, index))

    def pool(self) -> Pool:
        return BatchPool(self.prepare)

    def pause(self, idle: int) -> None:
        self._news.wait(min(idle * 1e-4, _LONGEST_PAUSE_S))
        self._news.clear()

    def has_native(self, request: NativeRequest) -> bool:
        if len(set(request.counts)) != 1 and request.collective != "allreduce":
            return False
        return request.op is None or (request.op in _REDUCE_OPS and request.dtype in _GLOO_REDUCES)

    def native(self, request: NativeRequest) -> NativeCall:
        counts, itemsize = request.counts, request.itemsize
        own, whole = counts[self.rank] * itemsize, sum(counts) * itemsize
        if request.collective == "allgather":
            send, recv = _tensor(request.send, own), _tensor(request.recv, whole)
            return self._call(self._gloo._allgather_base(recv, send), recv, send)
        dtype, op = getattr(torch, request.dtype or ""), _REDUCE_OPS[request.op or ""]
        if request.collective == "reduce_scatter":
            scattered = dist.ReduceScatterOptions()
            scattered.reduceOp = op
            send, recv = _tensor(request.send, whole).view(dtype), _tensor(request.recv, own).view(dtype)
            return self._call(self._gloo._reduce_scatter_base(recv, send, scattered), recv, send)
        reduced = dist.AllreduceOptions()
        reduced.reduceOp = op
        recv = _tensor(request.recv, whole).view(dtype)
        if request.send != request.recv:
            recv.copy_(_tensor(request.send, whole).view(dtype))
        return self._call(self._gloo.allreduce([recv], reduced), recv)

    def _call(self, work: Any, *tensors: torch.Tensor) -> _TorchCall:
        work.get_future().add_done_callback(lambda _: self._news.set())
        return _TorchCall(work, *tensors)

    def alarm(self, missing: Collection[int] | None = None) -> None:
        self._board.hang(missing)

    def alarms(self) -> Alarms:
        return self._board.read()

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """Gloo cannot take back a message: everything stays alive until the process ends."""
        _abandoned.append((self, keep))

    def end(self, seconds: float) -> bool:
        """Break all connections, so that the threads that wait on them end; whether they did in time."""
        with contextlib.suppress(RuntimeError):  # a message that came too late breaks the connections
            peer = (self.rank + 1) % self.size
            self._gloo.recv([torch.empty(1)], peer, _NEVER_SENT).wait(timedelta(milliseconds=1))
        self.close()
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def close(self) -> None:
        """End the threads, whose messages are complete, and give back the connections."""
        for queue in self._waiters.values():
            queue.put(None)
        self._waiters.clear()
        self._board.close()
        self._gloo = None


_Started = tuple[Any, "_TorchBatch", int]


class _TorchBatch:
    def __init__(self, transport: TorchTransport, ops: Sequence[Op]) -> None:
        self._transport, self._ops = transport, tuple(ops)
        self._memory = [_tensor(op.address, op.nbytes) for op in self._ops]
        self._open: set[int] = set()
        self._ended: deque[tuple[int, Exception | None]] = deque()

    def start(self, indices: Sequence[int]) -> None:
        self._open.update(indices)
        for index in indices:
            self._transport.begin(self._ops[index], self._memory[index], self, index)

    def start_all(self) -> None:
        self.start(range(len(self._ops)))

    def end(self, index: int, error: Exception | None) -> None:
        """A message is complete, or has failed. From a waiting thread."""
        self._ended.append((index, error))

    def test_some(self) -> list[int]:
        done = []
        while self._ended:
            index, error = self._ended.popleft()
            if error is not None:
                raise _lost(self._ops[index].peer, error) from error
            done.append(index)
        self._open.difference_update(done)
        return done

    def test_all(self) -> bool:
        self.test_some()
        return not self._open

    def pending(self) -> list[int]:
        return sorted(self._open)

    def free(self) -> None:
        self._memory = []


def _lost(peer: int, error: Exception) -> CollectiveError:
    return CollectiveError(f"the connection to rank {peer} failed, has it ended? ({error})")


class _TorchCall:
    """One of Gloo's collectives. The tensors live as long as it does."""

    def __init__(self, work: Any, *tensors: torch.Tensor) -> None:
        self._work, self._tensors = work, tensors

    def test(self) -> bool:
        if not self._work.is_completed():
            return False
        self._work.wait()  # raises what went wrong
        return True


class _Board:
    """Where ranks tell that they waited too long: keys of the store, read by a thread, since a store may block."""

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self._store, self._rank, self._size = store, rank, size
        self._heard: Alarms = {}
        self._errands: SimpleQueue[str | None] = SimpleQueue()
        self._reading = False
        self._thread: threading.Thread | None = None

    def hang(self, missing: Collection[int] | None) -> None:
        """Tell all that this rank waits, and, once it knows, whom it misses."""
        self._send("waiting" if missing is None else " ".join(map(str, ["missing", *sorted(missing)])))

    def read(self) -> Alarms:
        """Who has told what, as far as is known; asks anew."""
        if not self._reading:
            self._reading = True
            self._send("read")
        return dict(self._heard)

    def close(self) -> None:
        """End the thread."""
        self._errands.put(None)

    def _send(self, errand: str) -> None:
        self._errands.put(errand)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="tasp_coll alarms", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (errand := self._errands.get()) is not None:
            try:
                if errand != "read":
                    self._store.set(str(self._rank), errand)
                    self._store.set("any", "")
                elif self._store.check(["any"]):
                    others = [rank for rank in range(self._size) if rank != self._rank]
                    told = [rank for rank in others if self._store.check([str(rank)])]
                    self._heard |= {rank: _told(self._store.get(str(rank)).decode()) for rank in told}
            except RuntimeError:  # whoever held the store is gone
                return
            finally:
                self._reading = False


def _told(note: str) -> frozenset[int] | None:
    """Whom a rank misses, by its note on the board."""
    kind, *ranks = note.split()
    return frozenset(map(int, ranks)) if kind == "missing" else None


def _wait(queue: SimpleQueue[_Started | None], news: threading.Event) -> None:
    """The thread of a lane: waits for its messages in the order in which they were started."""
    while (started := queue.get()) is not None:
        work, batch, index = started
        del started
        try:
            work.wait(_FOREVER)
            batch.end(index, None)
        except Exception as error:
            batch.end(index, error)
        del work, batch
        news.set()


def _meet(store: dist.Store, rank: int, size: int, timeout: float) -> None:
    """Wait until all ranks are there, so that who is missing can be named; Gloo cannot."""
    store.set(f"here/{rank}", "")
    deadline = time.monotonic() + timeout
    while not store.check([f"here/{peer}" for peer in range(size)]):
        if time.monotonic() > deadline:
            store.set(f"left/{rank}", "")  # who gave up first was there
            store.delete_key(f"here/{rank}")
            ranks = [peer for peer in range(size) if not any(store.check([f"{at}/{peer}"]) for at in ("here", "left"))]
            raise PeerTimeoutError(
                f"Communicator: not all of ranks {ranks} made theirs within {timeout:.3g} s",
                peers=ranks,
                call="Communicator",
            )
        time.sleep(1e-3)


def _tensor(address: int, nbytes: int) -> torch.Tensor:
    """The bytes at an address. Keeps nothing alive: a prepared message must not hold on to a caller's array."""
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer((ctypes.c_char * nbytes).from_address(address), dtype=torch.uint8)


@atexit.register
def _leave() -> None:
    """After a failure: a thread that comes back from Gloo into an interpreter that is gone would abort the process."""
    ORIGIN.leave()
    ended = [transport.end(_LEAVE_SECONDS) for transport, _ in _abandoned]
    if not all(ended):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
