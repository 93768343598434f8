"""A transport that carries agreements and no data: what remains of a method's time with communication switched off."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Sequence
from typing import Any

from tasp_coll import Communicator
from tasp_coll.agreement import CONTROL_LANE
from tasp_coll.executor import Action, Place
from tasp_coll.launches import Launch, Strands
from tasp_coll.transport import Alarms, Batch, NativeCall, NativeRequest, Op, Pool, Transport
from tasp_coll.transport.pool import BatchPool


class SilentTransport:
    """Stands before another transport. Messages with data are complete as soon as they are started.

    What should have come is zeros at first, and later what is left there: computing takes the same time on it.
    """

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.rank, self.size, self.background = inner.rank, inner.size, inner.background
        self.name = f"{inner.name}, silent"

    def duplicate(self) -> SilentTransport:
        """Itself, to make a communicator of."""
        return self

    def prepare(self, ops: Sequence[Op]) -> _SilentBatch:
        for op in ops:
            if op.lane != CONTROL_LANE and not op.send:
                ctypes.memset(op.address, 0, op.nbytes)
        spoken = [index for index, op in enumerate(ops) if op.lane == CONTROL_LANE]
        return _SilentBatch(self._inner.prepare([ops[index] for index in spoken]), spoken, len(ops))

    def has_native(self, request: NativeRequest) -> bool:
        """No: a library's own collective always carries data."""
        return False

    def native(self, request: NativeRequest) -> NativeCall:
        raise NotImplementedError("has_native says that there is none")

    def pause(self, idle: int) -> None:
        self._inner.pause(idle)

    def pool(self) -> Pool:
        return self._inner.pool()

    @property
    def last_event(self) -> float:
        return self._inner.last_event

    def alarm(self, missing: Collection[int] | None = None) -> None:
        self._inner.alarm(missing)

    def alarms(self) -> Alarms:
        return self._inner.alarms()

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        self._inner.abandon(*keep, lost=lost)

    def close(self) -> None:
        self._inner.close()


class _SilentBatch:
    def __init__(self, inner: Batch, spoken: Sequence[int], count: int) -> None:
        self._inner, self._spoken, self._count = inner, spoken, count
        self._places = {index: place for place, index in enumerate(spoken)}
        self._done: list[int] = []

    def start(self, indices: Sequence[int]) -> None:
        self._done += [index for index in indices if index not in self._places]
        if spoken := [self._places[index] for index in indices if index in self._places]:
            self._inner.start(spoken)

    def start_all(self) -> None:
        if self._spoken:
            self._inner.start_all()

    def test_some(self) -> list[int]:
        done, self._done = self._done, []
        return done + ([self._spoken[place] for place in self._inner.test_some()] if self._spoken else [])

    def test_all(self) -> bool:
        return not self._spoken or self._inner.test_all()

    def pending(self) -> list[int]:
        return [self._spoken[place] for place in self._inner.pending()]

    def free(self) -> None:
        self._inner.free()


class EchoTransport:
    """Ranks that are not there: whatever this rank says, each of them says too. For agreements alone."""

    name, background, last_event = "echo", False, 0.0

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def prepare(self, ops: Sequence[Op]) -> _EchoBatch:
        return _EchoBatch(ops)

    def has_native(self, request: NativeRequest) -> bool:
        """No."""
        return False

    def native(self, request: NativeRequest) -> NativeCall:
        raise NotImplementedError("has_native says that there is none")

    def pool(self) -> Pool:
        return BatchPool(self.prepare)

    def pause(self, idle: int) -> None:
        """Nobody else wants the core."""

    def alarm(self, missing: Collection[int] | None = None) -> None:
        """Nobody hears it."""

    def alarms(self) -> Alarms:
        return {}

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


class _EchoBatch:
    def __init__(self, ops: Sequence[Op]) -> None:
        said = {op.peer: op for op in ops if op.send}
        self._pairs = [(op, said[op.peer]) for op in ops if not op.send]

    def start(self, indices: Sequence[int]) -> None:
        raise NotImplementedError("agreements start all their messages together")

    def start_all(self) -> None:
        for heard, told in self._pairs:
            ctypes.memmove(heard.address, told.address, told.nbytes)

    def test_some(self) -> list[int]:
        return []

    def test_all(self) -> bool:
        return True

    def pending(self) -> list[int]:
        return []

    def free(self) -> None:
        """Nothing is held."""


class SilentLinks:
    """Between GPUs: launches without their messages."""

    name = "silent"
    broken: str | None = None
    has_allgather, orders_streams, communicators = False, True, 1

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def prepare(self, launches: Sequence[Launch]) -> tuple[Launch, ...]:
        return tuple(launches)

    def launch(
        self,
        launches: Sequence[Launch],
        address: Callable[[Place], int],
        act: Callable[[Action], None],
        strands: Strands,
    ) -> None:
        for launch in launches:
            for action in launch.actions:
                act(action)

    def greet(self, messages: Sequence[tuple[bool, int, int, int]], stream: int) -> None:
        """Nobody is greeted."""

    def check(self) -> None:
        """Nothing goes wrong."""

    def abort(self, why: str) -> None:
        """Nothing is under way."""

    def close(self) -> None:
        """Nothing is held."""


def alone(size: int, gpu: int | None) -> Communicator:
    """Rank 0 of `size` ranks of which there is no other one, and that carry no data. gpu: its number, or None."""
    return silenced(Communicator(SilentTransport(EchoTransport(0, size)), topology=f"full_mesh:{size}"), gpu)


def silenced(comm: Communicator, gpu: int | None) -> Communicator:
    """The communicator, which carries no data from this GPU either."""
    if gpu is not None:
        comm._core.gpu(gpu)[0].links = SilentLinks(comm.rank, comm.size)
    return comm
