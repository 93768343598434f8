"""Messages over MPI, in host memory: persistent requests, polled so that every wait can end.

mpi4py is imported here and in `bootstrap` only, and by neither before a communicator is made.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tasp_coll.errors import CollectiveError
from tasp_coll.transport import NativeRequest, Op

_ALARM_TAG = 0
_FINALIZE_SECONDS = 2.0
_FIRST_TAG = 1
_SLEEP_POLLS = 5000  # some milliseconds of yielding without news
_OPS = {"sum": MPI.SUM, "prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX}
_open: set[MpiTransport] = set()  # also of communicators that were dropped: their requests are freed at exit
_abandoned: list[Any] = []
_peers_lost = False


class MpiTransport:
    """A duplicate of an MPI communicator, so that its messages never meet the caller's own."""

    name = "mpi"

    def __init__(self, comm: MPI.Intracomm, lanes: int) -> None:
        """comm: a communicator of our own, freed by `close`. lanes: how many tags are needed."""
        highest = comm.Get_attr(MPI.TAG_UB)
        if highest is not None and lanes + _FIRST_TAG > highest:
            raise CollectiveError(f"this MPI has tags up to {highest}, {lanes + _FIRST_TAG} are needed")
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.background = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self._alarms: set[int] = set()
        self._lost = False
        self._batches: set[_MpiBatch] = set()
        _open.add(self)

    def prepare(self, ops: Sequence[Op]) -> _MpiBatch:
        batch = _MpiBatch([self._request(op) for op in ops], self._batches.discard)
        self._batches.add(batch)
        return batch

    def _request(self, op: Op) -> MPI.Prequest:
        # A buffer by address keeps nothing alive: a cached request must not hold on to a caller's array.
        spec = (MPI.buffer.fromaddress(op.address, op.nbytes), op.nbytes, MPI.BYTE)
        make = self.comm.Send_init if op.send else self.comm.Recv_init
        return make(spec, op.peer, _FIRST_TAG + op.lane)

    def pause(self, idle: int) -> None:
        if idle > _SLEEP_POLLS:
            time.sleep(5e-5)
        else:
            os.sched_yield()

    def has_native(self, request: NativeRequest) -> bool:
        return request.collective in _NATIVE and (request.op is None or _reducible(request))

    def native(self, request: NativeRequest) -> _MpiCall:
        return _MpiCall(_NATIVE[request.collective](self.comm, request))

    def alarm(self) -> None:
        for peer in range(self.size):
            if peer != self.rank:
                _abandoned.append(self.comm.Isend((b"", 0, MPI.BYTE), peer, _ALARM_TAG))

    def alarms(self) -> set[int]:
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, _ALARM_TAG, status):
            self.comm.Recv((bytearray(0), 0, MPI.BYTE), status.source, _ALARM_TAG)
            self._alarms.add(status.source)
        return set(self._alarms)

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """MPI cannot take back a send: keep everything, and see to it that leaving the process ends."""
        global _peers_lost
        self._lost, _peers_lost = True, _peers_lost or lost
        _abandoned.extend([*keep, self, *self._batches])

    def close(self) -> None:
        _open.discard(self)
        if not (self._lost or MPI.Is_finalized()):
            for batch in list(self._batches):
                batch.free()
            self.comm.Free()


class _MpiBatch:
    def __init__(self, requests: list[MPI.Prequest], freed: Callable[[_MpiBatch], None]) -> None:
        self.requests, self._freed = requests, freed
        self._active: list[MPI.Prequest] = []
        self._numbers: list[int] = []
        self._settled: dict[int, bool] = {}  # after a cancel: whether a request ended without its message

    def start(self, indices: Sequence[int]) -> None:
        fresh = [self.requests[index] for index in indices]
        self._active += fresh
        self._numbers += indices
        MPI.Prequest.Startall(fresh)

    def start_all(self) -> None:
        self._active = self.requests
        MPI.Prequest.Startall(self.requests)

    def test_some(self) -> list[int]:
        found = MPI.Request.Testsome(self._active) if self._active else None
        if not found:
            return []
        done = [self._numbers[place] for place in found]
        for place in sorted(found, reverse=True):  # the last one takes the place of one that is done
            self._active[place], self._numbers[place] = self._active[-1], self._numbers[-1]
            self._active.pop()
            self._numbers.pop()
        return done

    def test_all(self) -> bool:
        # More ranks than cores: after a few tests the core is worth more to another rank.
        active, test = self._active, MPI.Request.Testall
        return test(active) or test(active) or test(active)

    def cancel(self, indices: Sequence[int]) -> None:
        for index in indices:
            self.requests[index].Cancel()

    def settle(self) -> list[int] | None:
        status = MPI.Status()
        for index, request in enumerate(self.requests):
            if index in self._settled:
                continue
            status.Set_cancelled(False)
            try:
                if not request.Test(status):
                    return None
                self._settled[index] = status.Is_cancelled()
            except MPI.Exception:  # a message too long for its receive, which has ended all the same
                self._settled[index] = False
        cancelled = [index for index, was in self._settled.items() if was]
        self._settled = {}
        return cancelled

    def pending(self) -> list[int]:
        return [index for index, request in enumerate(self.requests) if not request.Get_status()]

    def free(self) -> None:
        for request in self.requests:
            if request != MPI.REQUEST_NULL:
                request.Free()
        self.requests, self._active, self._numbers = [], [], []
        self._freed(self)


class _MpiCall:
    def __init__(self, request: MPI.Request) -> None:
        self._request = request

    def test(self) -> bool:
        return self._request.Test()


def _reducible(request: NativeRequest) -> bool:
    return request.op in _OPS and request.dtype not in ("float16", "bfloat16")


def _spec(request: NativeRequest, address: int, count: int) -> list[Any]:
    datatype = MPI.BYTE if request.dtype is None else MPI.Datatype.fromcode(np.dtype(request.dtype).char)
    return [MPI.buffer.fromaddress(address, count * request.itemsize), count, datatype]


def _allgather(comm: MPI.Intracomm, request: NativeRequest) -> MPI.Request:
    counts = request.counts
    in_place = request.send == request.recv + sum(counts[: comm.rank]) * request.itemsize
    send = MPI.IN_PLACE if in_place else _spec(request, request.send, counts[comm.rank])
    if len(set(counts)) == 1:
        recv = _spec(request, request.recv, sum(counts))
        recv[1] = counts[0]
        return comm.Iallgather(send, recv)
    recv = _spec(request, request.recv, sum(counts))
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    return comm.Iallgatherv(send, [recv[0], (counts, starts), recv[2]])


def _reduce_scatter(comm: MPI.Intracomm, request: NativeRequest) -> MPI.Request:
    send = _spec(request, request.send, sum(request.counts))
    recv = _spec(request, request.recv, request.counts[comm.rank])
    return comm.Ireduce_scatter(send, recv, request.counts, _OPS[request.op or ""])


def _allreduce(comm: MPI.Intracomm, request: NativeRequest) -> MPI.Request:
    count = sum(request.counts)
    recv = _spec(request, request.recv, count)
    send = MPI.IN_PLACE if request.send == request.recv else _spec(request, request.send, count)
    return comm.Iallreduce(send, recv, _OPS[request.op or ""])


_NATIVE = {"allgather": _allgather, "reduce_scatter": _reduce_scatter, "allreduce": _allreduce}


@atexit.register
def _leave() -> None:
    """At exit: free what is open, quietly; after a failure do not wait for anybody."""
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    if not _abandoned:
        for transport in list(_open):
            transport.close()
        return
    if not _peers_lost:  # let the others find out; with lost peers the launcher would wait for them in vain
        finalizer = threading.Thread(target=MPI.Finalize, daemon=True)
        finalizer.start()
        finalizer.join(_FINALIZE_SECONDS)
        if not finalizer.is_alive():
            return
    # A rank that leaves without MPI_Finalize has failed: launchers then end the job.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
