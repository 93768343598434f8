"""Messages over MPI, in host memory: persistent requests, polled so that every wait can end.

mpi4py is imported here and in `bootstrap` only, and by neither before a communicator is made.
"""

from __future__ import annotations

import atexit
import faulthandler
import os
import sys
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from tasp_coll.errors import CollectiveError
from tasp_coll.forks import Origin
from tasp_coll.transport import Alarms, NativeRequest, Op

ORIGIN = Origin("MPI")
_ALARM_TAG = 0
_TOLD = -1  # begins an alarm that says who is missed
_CANCEL_SECONDS = 0.2
_FINALIZE_SECONDS = 2.0
_FIRST_TAG = 1
_SLEEP_POLLS = 5000  # some milliseconds of yielding without news
_OPS = {"sum": MPI.SUM, "prod": MPI.PROD, "min": MPI.MIN, "max": MPI.MAX}
_start_all, _test_all, _test_some = MPI.Prequest.Startall, MPI.Request.Testall, MPI.Request.Testsome
_open: set[MpiTransport] = set()  # also of communicators that were dropped: their requests are freed at exit
_abandoned: list[Any] = []
_peers_lost = False
_LARGEST = sys.maxsize if MPI.Get_version() >= (4, 0) else 2**31 - 1  # what a count can be
# Open MPI's sums of small integers saturate, ours and MPICH's wrap; halves are no types of MPI's.
_NOT_REDUCED = {"float16", "bfloat16"}
if MPI.get_vendor()[0] == "Open MPI":
    _NOT_REDUCED |= {"int8", "uint8", "int16", "uint16"}


class MpiTransport:
    """A duplicate of an MPI communicator, so that its messages never meet the caller's own."""

    name = "mpi"
    last_event = 0.0

    def __init__(self, comm: MPI.Intracomm, lanes: int) -> None:
        """comm: a communicator of our own, freed by `close`. lanes: how many tags are needed."""
        highest = comm.Get_attr(MPI.TAG_UB)
        if highest is not None and lanes + _FIRST_TAG > highest:
            raise CollectiveError(f"this MPI has tags up to {highest}, {lanes + _FIRST_TAG} are needed")
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.background = MPI.Query_thread() >= MPI.THREAD_MULTIPLE
        self._alarms: Alarms = {}
        self._lost = False
        self._batches: set[_MpiBatch] = set()
        _open.add(self)

    def prepare(self, ops: Sequence[Op]) -> _MpiBatch:
        batch = _MpiBatch([self._request(op) for op in ops], self._batches.discard)
        self._batches.add(batch)
        return batch

    def _request(self, op: Op) -> MPI.Prequest:
        return self._begin(op, self.comm.Send_init if op.send else self.comm.Recv_init)

    def single(self, op: Op) -> MPI.Request:
        """Start one message."""
        return self._begin(op, self.comm.Isend if op.send else self.comm.Irecv)

    def _begin(self, op: Op, make: Callable[..., Any]) -> Any:
        # A buffer by address keeps nothing alive: a cached request must not hold on to a caller's array.
        memory = MPI.buffer.fromaddress(op.address, op.nbytes)
        if op.nbytes <= _LARGEST:
            return make((memory, op.nbytes, MPI.BYTE), op.peer, _FIRST_TAG + op.lane)
        whole = _large_type(op.nbytes)
        try:
            return make((memory, 1, whole), op.peer, _FIRST_TAG + op.lane)
        finally:
            whole.Free()  # the request keeps it as long as it needs it

    def pool(self) -> _MpiPool:
        return _MpiPool(self)

    def pause(self, idle: int) -> None:
        if idle > _SLEEP_POLLS:
            time.sleep(5e-5)
        else:
            os.sched_yield()

    def has_native(self, request: NativeRequest) -> bool:
        counted = sum(request.counts) <= _LARGEST
        return request.collective in _NATIVE and counted and (request.op is None or _reducible(request))

    def native(self, request: NativeRequest) -> _MpiCall:
        return _MpiCall(_NATIVE[request.collective](self.comm, request))

    def alarm(self, missing: Collection[int] | None = None) -> None:
        told = np.array([] if missing is None else [_TOLD, *sorted(missing)], np.int32)
        for peer in range(self.size):
            if peer != self.rank:
                _abandoned.append((told, self.comm.Isend(told, peer, _ALARM_TAG)))

    def alarms(self) -> Alarms:
        status = MPI.Status()
        while self.comm.Iprobe(MPI.ANY_SOURCE, _ALARM_TAG, status):
            told = np.empty(status.Get_count(MPI.INT32_T), np.int32)
            self.comm.Recv(told, status.source, _ALARM_TAG)
            self._alarms[status.source] = frozenset(told[1:].tolist()) if len(told) else None
        return dict(self._alarms)

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """MPI cannot take back a send."""
        self._lost = True
        forsake(*keep, self, *self._batches, lost=lost)

    def close(self) -> None:
        _open.discard(self)
        if not (self._lost or MPI.Is_finalized()):
            for batch in list(self._batches):
                batch.free()
            self.comm.Free()


def forsake(*keep: Any, lost: bool) -> None:
    """Keep what is under way, and see to it that leaving the process ends. lost: peers do not answer any more."""
    global _peers_lost
    _peers_lost = _peers_lost or lost
    _abandoned.extend(keep)


def requests_alive() -> int:
    """Requests that this process holds prepared, of all communicators that are open."""
    return sum(len(batch.requests) for transport in list(_open) for batch in list(transport._batches))


class _MpiBatch:
    def __init__(self, requests: list[MPI.Prequest], freed: Callable[[_MpiBatch], None]) -> None:
        self.requests, self._freed = requests, freed
        self._active: list[MPI.Prequest] = []
        self._numbers: list[int] = []
        self._failed: list[int] = []  # what was under way when MPI gave an error, which does not say whose it is

    def start(self, indices: Sequence[int]) -> None:
        fresh = [self.requests[index] for index in indices]
        self._active += fresh
        self._numbers += indices
        _start_all(fresh)

    def start_all(self) -> None:
        _start_all(self.requests)

    def test_some(self) -> list[int]:
        try:
            found = _test_some(self._active) if self._active else None
        except MPI.Exception:
            self._failed = list(self._numbers)
            raise
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
        requests = self.requests
        try:
            return _test_all(requests) or _test_all(requests) or _test_all(requests)
        except MPI.Exception:
            self._failed = list(range(len(requests)))
            raise

    def pending(self) -> list[int]:
        return self._failed or [index for index, request in enumerate(self.requests) if not request.Get_status()]

    def free(self) -> None:
        for request in self.requests:
            if request != MPI.REQUEST_NULL:
                request.Free()
        self.requests, self._active, self._numbers = [], [], []
        self._freed(self)


class _MpiPool:
    def __init__(self, transport: MpiTransport) -> None:
        self._transport = transport
        self._requests: list[MPI.Request] = []
        self._numbers: list[int] = []
        self._receives: set[int] = set()
        self._next = 0

    def start(self, op: Op) -> int:
        number, self._next = self._next, self._next + 1
        self._requests.append(self._transport.single(op))
        self._numbers.append(number)
        if not op.send:
            self._receives.add(number)
        return number

    def test(self) -> list[int]:
        found = _test_some(self._requests) if self._requests else None
        if not found:
            return []
        done = [self._numbers[place] for place in found]
        for place in sorted(found, reverse=True):
            self._requests[place], self._numbers[place] = self._requests[-1], self._numbers[-1]
            self._requests.pop()
            self._numbers.pop()
        self._receives.difference_update(done)
        return done

    def close(self) -> bool:
        """A receive can be cancelled if nothing has come for it; a send cannot."""
        for number, request in zip(self._numbers, self._requests, strict=True):
            if number in self._receives:
                request.Cancel()
        deadline = time.monotonic() + _CANCEL_SECONDS
        while self._requests and time.monotonic() < deadline:
            self.test()
        return not self._requests


class _MpiCall:
    def __init__(self, request: MPI.Request) -> None:
        self._request = request

    def test(self) -> bool:
        return self._request.Test()


def _large_type(nbytes: int) -> MPI.Datatype:
    """One element of so many bytes, for MPI before version 4, which counts in C's int."""
    pieces = [MPI.BYTE.Create_contiguous(1 << 20), MPI.BYTE]
    whole, rest = divmod(nbytes, 1 << 20)
    made = MPI.Datatype.Create_struct([whole, rest], [0, nbytes - rest], pieces).Commit()
    pieces[0].Free()
    return made


def _reducible(request: NativeRequest) -> bool:
    return request.op in _OPS and request.dtype not in _NOT_REDUCED


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
    ORIGIN.leave()
    if not MPI.Is_initialized() or MPI.Is_finalized():
        return
    if not _abandoned:
        for transport in list(_open):
            transport.close()
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if not _peers_lost:  # let the others find out; with lost peers the launcher would wait for them in vain
        # MPI.Finalize keeps the interpreter to itself; only a C thread can end the process meanwhile.
        with open(os.devnull, "w") as nowhere:
            faulthandler.dump_traceback_later(_FINALIZE_SECONDS, exit=True, file=nowhere)
            MPI.Finalize()
            faulthandler.cancel_dump_traceback_later()
        return
    # A rank that leaves without MPI_Finalize has failed: launchers then end the job.
    os._exit(1)
