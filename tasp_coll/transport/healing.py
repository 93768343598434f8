"""Messages that outlive their link, over any transport.

Every message is copied when it is sent, and kept until the receiver says that it has come; it lands in memory of our
own and is copied to where it belongs. So no memory of the caller is ever in the hands of a link that may be dead, or
that may come back to life later. A link is given up when a peer does not answer on it though it answers through other
ranks; what was not acknowledged then goes through them, and so does all that follows.

A thread answers and passes on while the program is elsewhere.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from tasp_coll.errors import CollectiveError
from tasp_coll.transport import Alarms, NativeCall, NativeRequest, Op, Pool, Transport
from tasp_coll.transport.boxes import Expected, Inbox, Outbox, Spare
from tasp_coll.transport.doubts import Doubts
from tasp_coll.transport.frames import Ack, Frame, Kind, Part, pack_pairs, unpack_pairs
from tasp_coll.transport.pool import BatchPool
from tasp_coll.transport.rates import Rates, Sample
from tasp_coll.transport.relay import Pair, Relay, pair_of

_ACK_SECONDS = 5e-3  # acknowledgements of small messages may be put together
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 2e-3, 1e-2
_CLOSE_SECONDS = 5.0
_SAID_WHO = -1
_MOVING, _OF_LATE = b"moving", 0.3  # of the timeout


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
        now = time.monotonic()
        self._due: dict[int, set[int]] = defaultdict(set)  # lanes to acknowledge, by peer
        self._due_since: dict[int, float] = {}
        self._doubts, self._rates = Doubts(timeout, now), Rates()
        self._alarms: Alarms = {}
        self._polled = now
        self.last_event = 0.0
        self._closed = False
        self._relay = Relay(self.rank, self.size, lane, self._launch, self._frame)
        spare, doubts, rates = Spare(), self._doubts, self._rates
        self._outbox = Outbox(self._launch, self._relay, spare, doubts, rates)
        self._inbox = Inbox(self._launch, spare, doubts, rates, self._acknowledge_soon)
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

    def take_samples(self) -> list[Sample]:
        """What was learned of the rates of this rank's links since the last call."""
        with self.lock:
            return self._rates.take()

    def forget_samples(self) -> None:
        """What was learned is used up, or holds no more."""
        with self.lock:
            self._rates.forget()

    # --- messages

    def start(self, op: Op, batch: HealingBatch, index: int) -> None:
        """Start one message of a batch. The lock is held."""
        if op.send:
            self._outbox.send(op, self._is_dead(op.peer))
            batch.complete(index)
        else:
            self._inbox.receive(Expected(op, lambda: batch.complete(index)), self._is_dead(op.peer))

    def _acknowledge_soon(self, peer: int, lane: int, urgent: bool) -> None:
        self._due[peer].add(lane)
        now = time.monotonic()
        self._due_since[peer] = min(self._due_since.get(peer, now), 0.0 if urgent else now)

    def _acknowledge(self, now: float) -> None:
        for peer in [peer for peer, since in self._due_since.items() if now - since > _ACK_SECONDS]:
            del self._due_since[peer]
            counts = [(lane, self._inbox.came(peer, lane)) for lane in sorted(self._due.pop(peer))]
            self._relay.send(Kind.ACK, peer, Ack(counts, self._rates.take_notes(peer)).packed())

    # --- links

    def _frame(self, frame: Frame, peer: int) -> None:
        """A frame for this rank, which came from `peer`."""
        kind, source, now = frame.kind, frame.source, time.monotonic()
        self._doubts.hear(peer, now)
        if kind == Kind.PING:
            self._relay.send(Kind.PONG, source, self._doing(now))
        elif kind == Kind.PING_AROUND:
            self._relay.send_around(Kind.PONG_AROUND, source, self._doing(now))
        elif kind in (Kind.PONG, Kind.PONG_AROUND):
            if kind == Kind.PONG_AROUND:
                self._doubts.hear_around(source, now)
            if frame.body == _MOVING:  # whoever waits for it waits for what it does
                self.last_event = now
        elif kind == Kind.ACK:
            ack = Ack.unpacked(frame.body)
            self._rates.noted(source, ack.notes)
            for lane, came in ack.counts:
                self._outbox.acknowledged(source, lane, came)
        elif kind == Kind.PART:
            self.last_event = now
            self._inbox.came_around(source, Part.unpacked(frame.body))
        elif kind == Kind.DEAD:
            self._give_up(unpack_pairs(frame.body))
        elif kind == Kind.ALARM:
            told = [rank for rank, _ in unpack_pairs(frame.body)]
            self._alarms[source] = frozenset(told[1:]) if told else None

    def _doing(self, now: float) -> bytes:
        """What to answer: whether anything of this rank's moved of late."""
        moved = max(self._outbox.moved, self._inbox.moved)
        return _MOVING if now - moved < _OF_LATE * self._timeout else b""

    def _look(self, now: float) -> None:
        """Ask peers that are silent on their link though something is to come or to go; give up links."""
        ask, dead = self._doubts.look((peer for peer in self._peers() if not self._is_dead(peer)), now)
        for peer in ask:
            self._relay.send(Kind.PING, peer)
            self._relay.send_around(Kind.PING_AROUND, peer)
        if dead:
            self._give_up(pair_of(self.rank, peer) for peer in dead)
            for peer in self._peers():  # everyone hears of dead links from those at their ends
                self._relay.send(Kind.DEAD, peer, pack_pairs(sorted(self.dead)))

    def _give_up(self, pairs: Iterable[Pair]) -> None:
        fresh = {derived for pair in pairs for derived in self._derived(pair_of(*pair))} - self.dead
        if not fresh:
            return
        self.dead |= fresh
        self.last_event = time.monotonic()
        self._relay.avoid(self.dead)
        for peer in self._peers():
            if self._is_dead(peer):  # also those given up before: a part may have been on a link that died now
                self._doubts.drop(peer)
                self._outbox.send_again(peer)
                for lane in self._inbox.lanes(peer):
                    self._acknowledge_soon(peer, lane, True)

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
        if not self.lock.acquire(blocking=False):
            return _NAP_SECONDS
        try:
            if time.monotonic() - self._polled > _NAP_SECONDS / 2:
                self.progress()
            busy = self._due_since or self.dead or self._doubts.any_owed
            return _NAP_SECONDS if busy else _LONGEST_NAP_SECONDS
        finally:
            self.lock.release()

    def _settled(self) -> bool:
        with self.lock:
            self.progress()
            return self._closed or (not self._due_since and self._outbox.empty and self._relay.idle)

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


def _attend(target: weakref.ref[HealingTransport]) -> None:
    while True:
        transport = target()
        nap = None if transport is None else transport.attend()
        if nap is None:
            return
        del transport
        time.sleep(nap)
