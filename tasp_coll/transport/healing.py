"""Messages that outlive their link, over any transport.

Every message is copied when it is sent, and kept until the receiver says that it has come; it lands in memory of our
own and is copied to where it belongs. So no memory of the caller is ever in the hands of a link that may be dead, or
that may come back to life later. A link is given up when a peer does not answer on it though it answers through other
ranks; what was not acknowledged then goes through them, and so does all that follows.

A thread answers and passes on while the program is elsewhere.
"""

from __future__ import annotations

import ctypes
import threading
import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from tasp_coll.errors import CollectiveError
from tasp_coll.transport import Alarms, NativeCall, NativeRequest, Op, Pool, Transport
from tasp_coll.transport.frames import Frame, Kind, Part, pack_counts, pack_pairs, unpack_counts, unpack_pairs
from tasp_coll.transport.pool import BatchPool
from tasp_coll.transport.relay import Pair, Relay, pair_of

DOUBT, VERDICT = 0.3, 0.6  # shares of the timeout: ask a silent peer; give up its link
_ACK_SECONDS = 5e-3  # acknowledgements of small messages may be put together
_LOOK_SHARE = 0.02  # of the timeout, between looks at silent peers
_SAMPLE_BYTES = 1 << 16  # messages that tell a link's rate, and are acknowledged at once
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 2e-3, 1e-2
_CLOSE_SECONDS = 5.0
_SPARE_BYTES = 1 << 26  # of memory that is kept for the next messages
_SAID_WHO = -1


class Sample(NamedTuple):
    """What this rank's messages to a peer took. best: bytes per second of the fastest; quickest: its shortest time."""

    peer: int
    messages: int
    nbytes: int
    seconds: float
    best: float
    quickest: float


@dataclass
class _Sent:
    """A message that its receiver has not acknowledged."""

    seq: int
    memory: Any  # np.ndarray
    began: float
    around: bool  # through other ranks
    flying: bool = False  # the transport has it
    acknowledged: bool = False


@dataclass(eq=False)
class _Expected:
    """A receive that was started, and what has come of it through other ranks."""

    op: Op
    batch: HealingBatch
    index: int
    offsets: set[int] = field(default_factory=set)
    done: bool = False


@dataclass
class _Early:
    """A message that came before its receive was started."""

    memory: bytearray
    offsets: set[int] = field(default_factory=set)
    left: int = 0


@dataclass
class _Doubt:
    """A peer that was asked whether it is there."""

    asked: float
    around: float | None = None  # when it answered through others


class HealingTransport:
    """See the module. base: carries the bytes. lane: one that nothing else uses.

    timeout: seconds within which a message must cross a link, several times over. derived: the pairs of ranks whose
    traffic crosses the link between a pair, that pair included; None: it alone.
    """

    background = True

    def __init__(
        self, base: Transport, timeout: float, lane: int, derived: Callable[[Pair], Iterable[Pair]] | None = None
    ) -> None:
        self.base, self.name, self.rank, self.size = base, base.name, base.rank, base.size
        self.dead: set[Pair] = set()
        self._timeout, self._derived = timeout, derived or (lambda pair: (pair,))
        self.lock = threading.RLock()
        self._pool = base.pool()
        self._ends: dict[int, Callable[[], None]] = {}
        self._spare = _Spare(_SPARE_BYTES)
        now = time.monotonic()
        self._sent: dict[tuple[int, int], int] = defaultdict(int)
        self._unacknowledged: dict[tuple[int, int], deque[_Sent]] = defaultdict(deque)
        self._expected: dict[tuple[int, int], deque[_Expected]] = defaultdict(deque)
        self._came: dict[tuple[int, int], int] = defaultdict(int)  # the number of the first expected message
        self._early: dict[tuple[int, int, int], _Early] = {}
        self._owed: dict[int, int] = defaultdict(int)  # messages to come from or to go to a peer
        self._due: dict[int, set[int]] = defaultdict(set)  # lanes to acknowledge, by peer
        self._due_since: dict[int, float] = {}
        self._heard: dict[int, float] = defaultdict(lambda: now)  # a link's last sign of life, or need of one
        self._doubts: dict[int, _Doubt] = {}
        self._acknowledged_at: dict[int, float] = defaultdict(float)
        self._samples: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self._alarms: Alarms = {}
        self._looked = self._polled = now
        self._closed = False
        self._relay = Relay(self.rank, self.size, lane, self._launch, self._frame)
        self._relay.open()
        self._thread = threading.Thread(target=_attend, args=(weakref.ref(self),), name="tasp_coll links", daemon=True)
        self._thread.start()

    # --- as a transport

    def duplicate(self) -> Transport:
        """A transport like the one below, for a communicator of its own."""
        made: Transport = self.base.duplicate()  # type: ignore[attr-defined]
        return made

    def prepare(self, ops: Sequence[Op]) -> HealingBatch:
        return HealingBatch(self, tuple(ops))

    def pool(self) -> Pool:
        return BatchPool(self.prepare)

    def pause(self, idle: int) -> None:
        self.base.pause(idle)

    def has_native(self, request: NativeRequest) -> bool:
        return False

    def native(self, request: NativeRequest) -> NativeCall:
        raise CollectiveError("the library's own collectives do not outlive a link")

    def alarm(self, missing: Collection[int] | None = None) -> None:
        told = () if missing is None else ((_SAID_WHO, _SAID_WHO), *((rank, rank) for rank in sorted(missing)))
        with self.lock:
            for peer in self._peers():
                self._relay.send(Kind.ALARM, peer, pack_pairs(told))
            self.progress()

    def alarms(self) -> Alarms:
        with self.lock:
            self.progress()
            return dict(self._alarms)

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        self._closed = True
        self.base.abandon(*keep, self, lost=lost)

    def close(self) -> None:
        """Waits, not for long, until peers have what was sent to them."""
        if not self._closed:
            deadline = time.monotonic() + min(self._timeout, _CLOSE_SECONDS)
            while not self._settled() and time.monotonic() < deadline:
                time.sleep(1e-4)
        with self.lock:
            if self._closed:
                return
            self._closed = True
            if self._pool.close():
                self.base.close()
            else:
                self.base.abandon(self)

    # --- what the communicator asks

    def avoid(self, pairs: Iterable[Pair]) -> None:
        """Use these pairs' links no more, nor those that derive from them; others are not told."""
        with self.lock:
            self._give_up(pairs)

    def take_samples(self, messages: int) -> list[Sample]:
        """What was learned of the rates of this rank's links with at least so many messages since the last call."""
        found = []
        with self.lock:
            for peer in sorted(peer for peer, seen in self._samples.items() if len(seen) >= messages):
                seen = self._samples.pop(peer)
                nbytes, seconds = (sum(column) for column in zip(*seen, strict=True))
                best = max(nbytes / seconds for nbytes, seconds in seen)
                found.append(Sample(peer, len(seen), nbytes, seconds, best, min(took for _, took in seen)))
        return found

    # --- messages

    def start(self, op: Op, batch: HealingBatch, index: int) -> None:
        """Start one message of a batch. The lock is held."""
        if op.send:
            self._send(op)
            batch.complete(index)
        else:
            self._receive(_Expected(op, batch, index))

    def _send(self, op: Op) -> None:
        key = op.peer, op.lane
        seq = self._sent[key]
        self._sent[key] = seq + 1
        memory = self._spare.take(op.nbytes)
        ctypes.memmove(memory.ctypes.data, op.address, op.nbytes)
        self._oblige(op.peer)
        around = self._is_dead(op.peer)
        sent = _Sent(seq, memory, time.monotonic(), around)
        self._unacknowledged[key].append(sent)
        if around:
            self._relay.send_message(op.peer, op.lane, seq, memory)
        else:
            sent.flying = True
            own = op._replace(address=memory.ctypes.data)
            self._launch(own, memory, lambda: self._landed(sent))

    def _landed(self, sent: _Sent) -> None:
        sent.flying = False
        if sent.acknowledged:
            self._spare.give(sent.memory)

    def _receive(self, expected: _Expected) -> None:
        op = expected.op
        key = op.peer, op.lane
        seq = self._came[key] + len(self._expected[key])
        self._expected[key].append(expected)
        self._oblige(op.peer)
        early = self._early.pop((op.peer, op.lane, seq), None)
        if early is not None:
            ctypes.memmove(op.address, (ctypes.c_char * len(early.memory)).from_buffer(early.memory), len(early.memory))
            expected.offsets = early.offsets
            if not early.left:
                self._arrived(expected, len(early.memory))
                return
        if not self._is_dead(op.peer):
            memory = self._spare.take(op.nbytes)
            own = op._replace(address=memory.ctypes.data)
            self._launch(own, memory, lambda: self._came_straight(expected, memory))

    def _came_straight(self, expected: _Expected, memory: Any) -> None:
        op = expected.op
        self._hear(op.peer)
        if not expected.done:
            ctypes.memmove(op.address, memory.ctypes.data, op.nbytes)
            self._arrived(expected, op.nbytes)
        self._spare.give(memory)

    def _came_around(self, source: int, part: Part) -> None:
        """Bytes of a message through other ranks; they may come twice."""
        key = source, part.lane
        place = part.seq - self._came[key]
        waiting = self._expected[key]
        if place < 0 or (place < len(waiting) and waiting[place].done):
            self._acknowledge_soon(*key, urgent=True)
        elif place < len(waiting):
            expected = waiting[place]
            if part.offset not in expected.offsets:
                expected.offsets.add(part.offset)
                ctypes.memmove(expected.op.address + part.offset, part.data, len(part.data))
                if len(expected.offsets) == part.parts:
                    self._arrived(expected, part.total)
        else:
            name = (source, part.lane, part.seq)
            early = self._early.get(name)
            if early is None:
                early = self._early[name] = _Early(bytearray(part.total), left=part.parts)
            if part.offset not in early.offsets:
                early.offsets.add(part.offset)
                early.left -= 1
                early.memory[part.offset : part.offset + len(part.data)] = part.data

    def _arrived(self, expected: _Expected, nbytes: int) -> None:
        """All of a message has come."""
        expected.done = True
        self._owed[expected.op.peer] -= 1
        expected.batch.complete(expected.index)
        key = expected.op.peer, expected.op.lane
        waiting = self._expected[key]
        while waiting and waiting[0].done:
            waiting.popleft()
            self._came[key] += 1
        self._acknowledge_soon(*key, urgent=nbytes >= _SAMPLE_BYTES)

    # --- acknowledgements

    def _acknowledge_soon(self, peer: int, lane: int, *, urgent: bool) -> None:
        self._due[peer].add(lane)
        self._due_since[peer] = min(self._due_since.get(peer, time.monotonic()), 0.0 if urgent else time.monotonic())

    def _acknowledge(self, now: float) -> None:
        for peer in [peer for peer, since in self._due_since.items() if now - since > _ACK_SECONDS]:
            del self._due_since[peer]
            counts = [(lane, self._came[peer, lane]) for lane in sorted(self._due.pop(peer))]
            self._relay.send(Kind.ACK, peer, pack_counts(counts))

    def _acknowledged(self, peer: int, lane: int, came: int, straight: bool) -> None:
        waiting, now = self._unacknowledged[peer, lane], time.monotonic()
        nbytes, began = 0, None
        while waiting and waiting[0].seq < came:
            sent = waiting.popleft()
            sent.acknowledged = True
            self._owed[peer] -= 1
            if straight and not sent.around and len(sent.memory) >= _SAMPLE_BYTES:
                nbytes += len(sent.memory)
                began = sent.began if began is None else began
            if not sent.flying:
                self._spare.give(sent.memory)
        if began is not None:
            seconds = now - max(began, self._acknowledged_at[peer])
            self._acknowledged_at[peer] = now
            if seconds > 0:
                self._samples[peer].append((nbytes, seconds))

    # --- links

    def _frame(self, frame: Frame, peer: int) -> None:
        """A frame for this rank, which came from `peer`."""
        self._hear(peer)
        kind, source = frame.kind, frame.source
        if kind == Kind.PING:
            self._relay.send(Kind.PONG, source)
        elif kind == Kind.PING_AROUND:
            self._relay.send_around(Kind.PONG_AROUND, source)
        elif kind == Kind.PONG_AROUND:
            if source in self._doubts and self._doubts[source].around is None:
                self._doubts[source].around = time.monotonic()
        elif kind == Kind.ACK:
            for lane, came in unpack_counts(frame.body):
                self._acknowledged(source, lane, came, peer == source)
        elif kind == Kind.PART:
            self._came_around(source, Part.unpacked(frame.body))
        elif kind == Kind.DEAD:
            self._give_up(unpack_pairs(frame.body))
        elif kind == Kind.ALARM:
            told = [rank for rank, _ in unpack_pairs(frame.body)]
            self._alarms[source] = frozenset(told[1:]) if told else None

    def _look(self, now: float) -> None:
        """Ask peers that are silent on their link though something is to come or to go; give up links."""
        if now - self._looked < self._timeout * _LOOK_SHARE:
            return
        self._looked = now
        for peer in self._peers():
            if self._is_dead(peer):
                continue
            if not self._owed[peer]:
                self._hear(peer)
            doubt = self._doubts.get(peer)
            if doubt is None and now - self._heard[peer] > DOUBT * self._timeout:
                self._doubts[peer] = _Doubt(now)
                self._relay.send(Kind.PING, peer)
                self._relay.send_around(Kind.PING_AROUND, peer)
            elif doubt is not None and doubt.around is not None and self._silent(doubt, now):
                self._give_up([pair_of(self.rank, peer)])
                self._tell()

    def _silent(self, doubt: _Doubt, now: float) -> bool:
        """Asked long enough ago, and the answer through others did not just come first."""
        assert doubt.around is not None
        share = (VERDICT - DOUBT) * self._timeout
        return now - doubt.asked > share and now - doubt.around > share / 3

    def _hear(self, peer: int) -> None:
        self._heard[peer] = time.monotonic()
        self._doubts.pop(peer, None)

    def _oblige(self, peer: int) -> None:
        """Something is to come or to go from now on; silence before was right."""
        if not self._owed[peer]:
            self._heard[peer] = time.monotonic()
        self._owed[peer] += 1

    def _give_up(self, pairs: Iterable[Pair]) -> None:
        fresh = {derived for pair in pairs for derived in self._derived(pair_of(*pair))} - self.dead
        if not fresh:
            return
        self.dead |= fresh
        self._relay.avoid(self.dead)
        for peer in self._peers():
            if self._is_dead(peer):  # also those given up before: a part may have been on a link that died now
                self._doubts.pop(peer, None)
                self._send_again(peer)

    def _send_again(self, peer: int) -> None:
        lanes = [lane for to, lane in self._unacknowledged if to == peer]
        for lane in lanes:
            for sent in self._unacknowledged[peer, lane]:
                sent.around = True
                self._relay.send_message(peer, lane, sent.seq, sent.memory)
        for of, lane in list(self._came):
            if of == peer:
                self._acknowledge_soon(peer, lane, urgent=True)

    def _tell(self) -> None:
        """Everyone hears of dead links from those at their ends."""
        for peer in self._peers():
            self._relay.send(Kind.DEAD, peer, pack_pairs(sorted(self.dead)))

    def _is_dead(self, peer: int) -> bool:
        return bool(self.dead) and pair_of(self.rank, peer) in self.dead

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    # --- progress

    def progress(self) -> None:
        """One poll of everything."""
        with self.lock:
            if self._closed:
                return
            for number in self._pool.test():
                self._ends.pop(number)()
            self._polled = now = time.monotonic()
            if self._due_since:
                self._acknowledge(now)
            self._look(now)

    def attend(self) -> float | None:
        """For the thread: make progress if nobody else did; how long to sleep, None: it is over."""
        if self._closed:
            return None
        if time.monotonic() - self._polled > _NAP_SECONDS / 2 and self.lock.acquire(blocking=False):
            try:
                self.progress()
            finally:
                self.lock.release()
        busy = self._due_since or self.dead or any(self._owed.values())
        return _NAP_SECONDS if busy else _LONGEST_NAP_SECONDS

    def _settled(self) -> bool:
        with self.lock:
            self.progress()
            owing = self._due_since or any(self._unacknowledged.values())
            return self._closed or (not owing and self._relay.idle)

    def _launch(self, op: Op, keep: Any, done: Callable[[], None]) -> None:
        def end(keep: Any = keep) -> None:
            done()

        self._ends[self._pool.start(op)] = end


class HealingBatch:
    """See `transport.Batch`. Sends complete at once: they were copied."""

    def __init__(self, transport: HealingTransport, ops: tuple[Op, ...]) -> None:
        self._transport, self.ops = transport, ops
        self._open: set[int] = set()
        self._done: list[int] = []

    def start(self, indices: Sequence[int]) -> None:
        with self._transport.lock:
            self._open.update(indices)
            for index in indices:
                self._transport.start(self.ops[index], self, index)

    def start_all(self) -> None:
        self.start(range(len(self.ops)))

    def complete(self, index: int) -> None:
        """The transport's word that a message is complete."""
        self._open.discard(index)
        self._done.append(index)

    def test_some(self) -> list[int]:
        with self._transport.lock:
            self._transport.progress()
            done, self._done = self._done, []
        return done

    def test_all(self) -> bool:
        self.test_some()
        return not self._open

    def pending(self) -> list[int]:
        return sorted(self._open)

    def free(self) -> None:
        self._done.clear()


class _Spare:
    """Memory for messages, in sizes that double."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
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
        if self._held + len(whole) <= self._limit:
            self._held += len(whole)
            self._free[len(whole)].append(whole)


def _attend(target: weakref.ref[HealingTransport]) -> None:
    while True:
        transport = target()
        nap = None if transport is None else transport.attend()
        if nap is None:
            return
        del transport
        time.sleep(nap)
