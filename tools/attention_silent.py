"""A transport that carries agreements and no data: what remains of a method's time with communication switched off."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Sequence
from typing import Any

from tasp_coll.agreement import CONTROL_LANE
from tasp_coll.transport import Alarms, Batch, NativeCall, NativeRequest, Op, Pool, Transport


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
