"""Runs a communicator's operations: one after another in the order of the calls, streams of steps beside them.

An operation is a generator that yields whether it made progress. A blocking call drives it from the caller's thread.
While asynchronous operations or streams are open, a background thread drives them as well, because MPI moves data
only inside its calls; a caller that waits takes over from it.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from tasp_coll.errors import (
    ArgumentError,
    CollectiveError,
    CorruptionError,
    MismatchError,
    PeerTimeoutError,
    ScheduleError,
    TopologyError,
    name_ranks,
)
from tasp_coll.transport import Alarms, Transport
from tasp_coll.work import CHECK_POLLS, Operation, Patience, Watch, Work

_GRACE_SECONDS = 1.0  # for peers to say that they are waiting too
_TELL_SECONDS = 1.5  # and whom they do not hear, which those that miss one know after the grace
_REST_SECONDS = 5e-2  # between polls while all streams wait for their callers: a library may still have to send
_LEAVE_SECONDS = 1.0  # for a thread that waits to notice that the process is leaving
# Raised before any data moved, or after all of it, on all ranks alike: the communicator can go on.
_HARMLESS = (ArgumentError, CorruptionError, MismatchError, ScheduleError, TopologyError)

_busy: set[Engine] = set()  # dropped or not: peers wait for what is under way
_all: weakref.WeakSet[Engine] = weakref.WeakSet()


class Pollable(Protocol):
    """A stream's side of the engine. slack: seconds by which what its caller asked for last was early."""

    slack: float

    @property
    def resting(self) -> bool:
        """Whether nothing can come before its caller does something."""

    def poll(self) -> bool:
        """Make progress; whether there was any."""

    def finish(self) -> None:
        """Bring what is under way to its end."""


class Engine:
    """One communicator's operations, over one transport."""

    def __init__(self, transport: Transport, timeout: float) -> None:
        self.transport, self.timeout = transport, timeout
        self.lock = threading.RLock()  # held by whoever drives
        self._wake = threading.Condition()
        self._queue: deque[Work] = deque()
        self._streams: dict[Pollable, Operation] = {}
        self._waiters: set[int] = set()  # threads
        self._driver: int | None = None  # the thread inside _advance
        self._thread: threading.Thread | None = None
        self._closed = False
        self.broken: str | None = None
        self.farewell: Callable[[], None] = lambda: None  # told before anything is given up
        _all.add(self)

    def run(self, operation: Operation) -> Any:
        """Run to the end, after everything submitted earlier; the result."""
        with self.lock:
            if self.broken or self._closed:
                self.check()
            if self._queue or self._streams:
                return self.submit(operation).wait()
            try:
                if operation.quick():
                    return operation.result()
                generator, idle, watch = operation.run(), 0, None
                pause = self.transport.pause
                while True:
                    if next(generator):
                        idle = 0
                        continue
                    idle += 1
                    pause(idle)
                    if idle % CHECK_POLLS == 0:
                        watch = watch or Watch(self, operation)
                        watch.look(restart=idle == CHECK_POLLS)
            except StopIteration as stop:
                return stop.value
            except BaseException as error:
                told = self.judge(error, operation)
                raise told from told.__cause__

    def submit(self, operation: Operation) -> Work:
        """Queue an operation; it goes on in the background where the transport allows."""
        self.check()
        work = Work(self, operation)
        with self.lock:
            _busy.add(self)
            self._queue.append(work)
            self._advance()
        self.rouse()
        return work

    def attach(self, stream: Pollable, operation: Operation) -> None:
        """Drive a stream beside the operations until it is detached."""
        with self.lock:
            _busy.add(self)
            self._streams[stream] = operation
        self.rouse()

    def detach(self, stream: Pollable) -> None:
        """No longer drive a stream."""
        with self.lock:
            self._streams.pop(stream, None)
            if not self.busy:
                _busy.discard(self)

    def drive(self, until: Callable[[], bool], operation: Operation, *, patient: bool = False) -> None:
        """Make progress until `until()`, with the timeout; for callers that wait. patient: see `Watch`."""
        me = threading.get_ident()
        try:
            self._waiters.add(me)
            with self.lock:
                watch = Watch(self, operation, patient=patient)
                while not until():
                    if self.broken:
                        raise CollectiveError(self.broken)
                    if self._advance():
                        watch.idle = 0
                    else:
                        watch.wait()
        except BaseException as error:
            told = self.judge(error, operation)
            raise told from told.__cause__
        finally:
            self._waiters.discard(me)
            with self._wake:
                self._wake.notify_all()

    def settle(self, operation: Operation) -> None:
        """Carry out what is queued, so that what the caller does next comes after it, on every rank alike."""
        if self._queue:
            self.drive(lambda: not self._queue, operation)

    def nudge(self) -> None:
        """One poll of everything."""
        if self.broken:
            self._fail_all()
        elif self.lock.acquire(blocking=False):
            try:
                if not self._advance() and self._queue:
                    self._look(self._queue[0])
            finally:
                self.lock.release()

    def check(self) -> None:
        """Raise if the communicator cannot be used."""
        if self.broken:
            raise CollectiveError(self.broken)
        if self._closed:
            raise CollectiveError("this communicator is closed")

    def judge(self, error: BaseException, operation: Operation) -> BaseException:
        """What to raise for an error; if it leaves messages in flight: no further use, and nothing is freed."""
        if isinstance(error, _HARMLESS) or self.broken:
            return error
        whose = "" if _tells(error) else _whose(operation)
        self.broken = f"this communicator cannot be used any more: {operation.name} failed earlier{whose}: {error!r}"
        lost = isinstance(error, PeerTimeoutError)
        self.farewell()
        self.transport.abandon(operation, list(self._queue), list(self._streams), lost=lost)
        self._fail_all(but=operation)
        if _tells(error):
            return error
        told = CollectiveError(f"{operation.name} failed in the {self.transport.name} transport{whose}: {error}")
        told.__cause__ = error
        return told

    def timed_out(self, operation: Operation, waited: float) -> PeerTimeoutError:
        """Call the roll: ranks that wait too say so within the grace time, the silent ones are to blame.

        Then all tell whom they do not hear. A rank that others hear is there, and its link is to blame.
        """
        peers, step = operation.pending()
        told = self.transport.alarms()
        self.transport.alarm()
        everyone = frozenset(range(self.transport.size)) - {self.transport.rank}
        self._hear(lambda heard: heard.keys() == everyone, _GRACE_SECONDS)
        missing = everyone - self.transport.alarms().keys()
        self.transport.alarm(missing)
        heard = self._hear(lambda heard: None not in heard.values(), _TELL_SECONDS)
        links = _dead_links({**heard, self.transport.rank: missing})
        ends = {rank for link in links for rank in link}
        silent = sorted(ends or missing or peers or everyone)
        at = f"while {operation.phase}" if step is None else f"at step {step}"
        why = f"within {waited:.3g} s" if not told else f"when rank {min(told)} gave up waiting"
        fault = f"no answer from {name_ranks(silent)}" if not links else f"no progress: {_told(links)}"
        return PeerTimeoutError(
            f"{operation.name}: {fault} {why}, {at}", peers=silent, call=operation.name, step=step, links=links
        )

    def _hear(self, enough: Callable[[Alarms], bool], seconds: float) -> Alarms:
        """The alarms that come in that time."""
        deadline = time.monotonic() + seconds
        while not enough(heard := self.transport.alarms()) and time.monotonic() < deadline:
            time.sleep(1e-3)
        return heard

    @property
    def busy(self) -> bool:
        """Whether operations or streams are under way."""
        return bool(self._queue or self._streams)

    @property
    def usable(self) -> bool:
        """Neither broken nor closed."""
        return not (self.broken or self._closed)

    def abandon(self, why: str) -> None:
        """Give up what is under way, in whichever thread."""
        self.broken = f"this communicator cannot be used any more: {why}"
        alone = self.lock.acquire(timeout=_LEAVE_SECONDS)  # not while another thread is in the middle of a poll
        try:
            self.farewell()
            self.transport.abandon(list(self._queue), list(self._streams))
            self._fail_all()
        finally:
            if alone:
                self.lock.release()

    def interrupted(self, kind: type[BaseException] | None) -> None:
        """When a block is left by an exception: after Ctrl-C nobody should have to wait for peers."""
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.usable and self.occupied():
            self.abandon(f"{kind.__name__} came while it was busy")

    def _fail_all(self, but: Operation | None = None) -> None:
        """What is queued has no result any more."""
        for work in list(self._queue):
            if work.operation is not but and not work.done:
                work.fail(CollectiveError(self.broken))

    def disown(self) -> None:
        """In a forked process: all belongs to the parent, and its threads, which may hold locks, are not here."""
        self.lock, self._wake = threading.RLock(), threading.Condition()
        self.broken = (
            "this communicator cannot be used in a process that was forked from the one that made it: what travels on "
            "its connections is the parent's; start processes with multiprocessing's 'spawn', and make one there"
        )
        self._driver, self._thread = None, None
        self._waiters.clear()
        self._fail_all()
        self._queue.clear()
        self._streams.clear()

    def close(self) -> bool:
        """Wait for what is under way, then stop the background thread; whether it was open."""
        if self._closed:
            return False
        if not self.broken:
            for stream in list(self._streams):
                stream.finish()
            while self._queue:
                work = self._queue[0]
                self.drive(lambda work=work: work.done, work.operation)  # type: ignore[misc]
            with self.lock:  # after the call of another thread
                self._closed = True
        self._closed = True
        with self._wake:
            self._wake.notify_all()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)
        return True

    def _advance(self) -> bool:
        """Poll the first operation and all streams; whether anything moved. The lock is held."""
        progress = False
        self._driver = threading.get_ident()
        try:
            while self._queue and self._queue[0].done:
                self._queue.popleft()
            if self._queue:
                progress = self._queue[0].advance()
                if self._queue[0].done:
                    self._queue.popleft()
            for stream in list(self._streams):
                progress |= stream.poll()
            if not self.busy:
                _busy.discard(self)
        finally:
            self._driver = None
        return progress

    def occupied(self) -> bool:
        """Whether anything is under way, a call of another thread included."""
        if self.busy or not self.lock.acquire(blocking=False):
            return True
        self.lock.release()
        return False

    @property
    def inside(self) -> bool:
        """Whether this very thread is polling: then it must not wait (as in a destructor)."""
        return self._driver == threading.get_ident()

    # --- the background thread

    def rouse(self) -> None:
        """Let the background thread look at once."""
        if not self.transport.background:
            return
        with self._wake:
            if self._thread is None:
                target = weakref.ref(self, _waker(self._wake))
                self._thread = threading.Thread(
                    target=_background, args=(target, self._wake), name="tasp_coll", daemon=True
                )
                self._thread.start()
            self._wake.notify_all()

    @property
    def wants_attention(self) -> bool:
        """Whether the background thread has something to do, be it to end."""
        return not self.usable or not self._idle()

    @property
    def resting(self) -> bool:
        """Whether all that is under way waits for its caller."""
        return not self._queue and all(stream.resting for stream in list(self._streams))

    @property
    def slack(self) -> float:
        """Seconds by which all that callers waited for last was early."""
        return 0.0 if self._queue else min((stream.slack for stream in list(self._streams)), default=0.0)

    def _idle(self) -> bool:
        return bool(self._waiters or self.broken or not (self._queue or self._streams))

    def background_turn(self) -> bool:
        """For the background thread: one poll of everything; whether to poll again at once."""
        with self.lock:
            if self._idle() or self._closed:
                return True
            moved = self._advance()
            if self._queue and not moved:
                self._look(self._queue[0])
            return moved

    def _look(self, head: Work) -> None:
        try:
            head.watch.look()
        except Exception as error:
            head.fail(self.judge(error, head.operation))


def _tells(error: BaseException) -> bool:
    """Whether an error says by itself what there is to know; else it is a library's."""
    return isinstance(error, (CollectiveError, MemoryError)) or not isinstance(error, Exception)


def _whose(operation: Operation) -> str:
    """Whose messages were under way when a library failed that does not say whom it failed with."""
    try:
        peers, _ = operation.pending()
    except Exception:  # it asks the library, which may fail once more
        return ""
    return f" with messages of {name_ranks(sorted(peers))} under way" if peers else ""


def _dead_links(alarms: Alarms) -> tuple[tuple[int, int], ...]:
    """Pairs of ranks that do not hear each other though another rank hears both. A rank that is gone, all miss."""
    misses = {rank: lost for rank, lost in alarms.items() if lost is not None}
    pairs = {(min(a, b), max(a, b)) for a, lost in misses.items() for b in lost}
    return tuple(
        (a, b)
        for a, b in sorted(pairs)
        if b in misses.get(a, {b})
        and a in misses.get(b, {a})
        and any(not {a, b} & {c, *lost} for c, lost in misses.items())
    )


def _told(links: Sequence[tuple[int, int]]) -> str:
    pairs = "; ".join(f"ranks {a} and {b} do not hear each other over their link" for a, b in links)
    return f"{pairs}, though others hear both,"


def abandon_busy(why: str) -> None:
    """Give up what is under way on any communicator, before what carries it is gone."""
    for engine in {*_busy, *_all}:
        if engine.usable and engine.occupied():
            engine.abandon(why)


def _disown_all() -> None:
    for engine in {*_busy, *_all}:
        engine.disown()
    _busy.clear()


os.register_at_fork(after_in_child=_disown_all)


def _waker(wake: threading.Condition) -> Callable[[object], None]:
    """Wakes the background thread when its engine is gone, so that it can end."""

    def notify(_: object) -> None:
        with wake:
            wake.notify_all()

    return notify


def _background(target: weakref.ref[Engine], wake: threading.Condition) -> None:
    """The background thread. It does not keep a forgotten communicator alive."""
    patience = Patience()
    while True:
        with wake:
            wake.wait_for(lambda: (engine := target()) is None or engine.wants_attention)
        engine = target()
        if engine is None or not engine.usable:
            return
        moved, resting, slack = engine.background_turn(), engine.resting, engine.slack
        del engine
        if moved or resting:
            patience.end()
        if not moved:
            with wake:
                wake.wait(_REST_SECONDS if resting else patience.nap(slack))
