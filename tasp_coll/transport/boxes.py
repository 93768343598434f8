"""One rank's messages while they are under way: those that left and were not acknowledged, those that are to come.

Both are copied through memory of our own, which a link that is dead may keep for ever.
"""

from __future__ import annotations

import ctypes
import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tasp_coll.transport import Op
from tasp_coll.transport.doubts import Doubts
from tasp_coll.transport.frames import Part
from tasp_coll.transport.rates import SAMPLE_BYTES, Rates
from tasp_coll.transport.relay import Launch, Relay

_SPARE_BYTES = 1 << 26  # of memory that is kept for the next messages


class Spare:
    """Memory for messages, in sizes that double."""

    def __init__(self) -> None:
        self._held = 0
        self._free: dict[int, list[Any]] = defaultdict(list)

    def take(self, nbytes: int) -> Any:
        """An array of so many bytes."""
        size = 1 << max(nbytes - 1, 63).bit_length()
        if self._free[size]:
            self._held -= size
            return self._free[size].pop()[:nbytes]
        return np.empty(size, np.uint8)[:nbytes]

    def give(self, memory: Any) -> None:
        """Take it back."""
        whole = memory.base
        if self._held + len(whole) <= _SPARE_BYTES:
            self._held += len(whole)
            self._free[len(whole)].append(whole)


@dataclass
class _Sent:
    """A message that its receiver has not acknowledged."""

    seq: int
    memory: Any  # np.ndarray
    around: bool  # through other ranks
    flying: bool = False  # the transport has it
    acknowledged: bool = False


class Outbox:
    """What this rank sent, kept until its receiver has it."""

    def __init__(self, launch: Launch, relay: Relay, spare: Spare, doubts: Doubts, rates: Rates) -> None:
        self._launch, self._relay, self._spare, self._doubts, self._rates = launch, relay, spare, doubts, rates
        self._sent: dict[tuple[int, int], int] = defaultdict(int)
        self._kept: dict[tuple[int, int], deque[_Sent]] = defaultdict(deque)
        self.moved = 0.0  # when the last message was acknowledged

    @property
    def empty(self) -> bool:
        """Whether all was acknowledged."""
        return not any(self._kept.values())

    def send(self, op: Op, around: bool) -> None:
        """Copy a message and send it, over the link or around it. Its memory is free when this returns."""
        key, now = (op.peer, op.lane), time.monotonic()
        seq = self._sent[key]
        self._sent[key] = seq + 1
        memory = self._spare.take(op.nbytes)
        ctypes.memmove(memory.ctypes.data, op.address, op.nbytes)
        self._doubts.owe(op.peer, now)
        sent = _Sent(seq, memory, around)
        self._kept[key].append(sent)
        if around:
            self._relay.send_message(op.peer, op.lane, seq, memory)
        else:
            sent.flying = True
            self._rates.sent(op.peer, op.lane, seq, op.nbytes, now)
            self._launch(op._replace(address=memory.ctypes.data), memory, lambda: self._landed(sent))

    def acknowledged(self, peer: int, lane: int, came: int) -> None:
        """The first `came` messages of a lane have come."""
        kept = self._kept[peer, lane]
        while kept and kept[0].seq < came:
            sent = kept.popleft()
            sent.acknowledged, self.moved = True, time.monotonic()
            self._doubts.settle(peer)
            if not sent.flying:
                self._spare.give(sent.memory)

    def send_again(self, peer: int) -> None:
        """Send around the link what was not acknowledged."""
        for (to, lane), kept in self._kept.items():
            if to == peer:
                for sent in kept:
                    sent.around = True
                    self._relay.send_message(peer, lane, sent.seq, sent.memory)

    def _landed(self, sent: _Sent) -> None:
        sent.flying = False
        if sent.acknowledged:
            self._spare.give(sent.memory)


@dataclass(eq=False)
class Expected:
    """A receive that was started, what to call at its end, and what has come of it through other ranks."""

    op: Op
    end: Callable[[], None]
    offsets: set[int] = field(default_factory=set)
    done: bool = False


@dataclass
class _Early:
    """A message that came before its receive was started."""

    memory: bytearray
    left: int
    offsets: set[int] = field(default_factory=set)


class Inbox:
    """What this rank is to receive."""

    def __init__(
        self,
        launch: Launch,
        spare: Spare,
        doubts: Doubts,
        rates: Rates,
        acknowledge: Callable[[int, int, bool], None],
    ) -> None:
        """acknowledge(peer, lane, urgent): is told of lanes of which something came."""
        self._launch, self._spare, self._doubts, self._rates = launch, spare, doubts, rates
        self._acknowledge = acknowledge
        self._expected: dict[tuple[int, int], deque[Expected]] = defaultdict(deque)
        self._came: dict[tuple[int, int], int] = defaultdict(int)
        self._early: dict[tuple[int, int, int], _Early] = {}
        self.moved = 0.0  # when the last message came

    def came(self, peer: int, lane: int) -> int:
        """How many messages of a lane have come, one after another."""
        return self._came[peer, lane]

    def lanes(self, peer: int) -> list[int]:
        """The lanes on which a peer has sent."""
        return [lane for of, lane in self._came if of == peer]

    def receive(self, expected: Expected, around: bool) -> None:
        """Start a receive, over the link or around it."""
        op = expected.op
        key = op.peer, op.lane
        seq = self._came[key] + len(self._expected[key])
        self._expected[key].append(expected)
        self._doubts.owe(op.peer, time.monotonic())
        early = self._early.pop((op.peer, op.lane, seq), None)
        if early is not None:
            ctypes.memmove(op.address, (ctypes.c_char * len(early.memory)).from_buffer(early.memory), len(early.memory))
            expected.offsets = early.offsets
            if not early.left:
                self._complete(expected, len(early.memory))
                return
        if not around:
            memory = self._spare.take(op.nbytes)
            own = op._replace(address=memory.ctypes.data)
            self._launch(own, memory, lambda: self._came_straight(expected, seq, memory))

    def _came_straight(self, expected: Expected, seq: int, memory: Any) -> None:
        op, now = expected.op, time.monotonic()
        self._doubts.hear(op.peer, now)
        if op.nbytes >= SAMPLE_BYTES:
            self._rates.came(op.peer, op.lane, seq, now)
        if not expected.done:
            ctypes.memmove(op.address, memory.ctypes.data, op.nbytes)
            self._complete(expected, op.nbytes)
        self._spare.give(memory)

    def came_around(self, source: int, part: Part) -> None:
        """Bytes of a message through other ranks; they may come twice."""
        key = source, part.lane
        place = part.seq - self._came[key]
        waiting = self._expected[key]
        if place < 0 or (place < len(waiting) and waiting[place].done):
            self._acknowledge(source, part.lane, True)
        elif place >= len(waiting):
            self._keep(source, part)
        elif part.offset not in waiting[place].offsets:
            expected = waiting[place]
            expected.offsets.add(part.offset)
            ctypes.memmove(expected.op.address + part.offset, part.data, len(part.data))
            if len(expected.offsets) == part.parts:
                self._complete(expected, part.total)

    def _keep(self, source: int, part: Part) -> None:
        name = source, part.lane, part.seq
        early = self._early.get(name)
        if early is None:
            early = self._early[name] = _Early(bytearray(part.total), part.parts)
        if part.offset not in early.offsets:
            early.offsets.add(part.offset)
            early.left -= 1
            early.memory[part.offset : part.offset + len(part.data)] = part.data

    def _complete(self, expected: Expected, nbytes: int) -> None:
        """All of a message has come."""
        key = expected.op.peer, expected.op.lane
        expected.done, self.moved = True, time.monotonic()
        self._doubts.settle(key[0])
        expected.end()
        waiting = self._expected[key]
        while waiting and waiting[0].done:
            waiting.popleft()
            self._came[key] += 1
        self._acknowledge(*key, nbytes >= SAMPLE_BYTES)
