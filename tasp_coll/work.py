"""An operation under way: what the engine runs, the handle that callers wait with, and the end of waiting in vain."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from typing import Any, Protocol

from tasp_coll.errors import CollectiveError, PeerTimeoutError
from tasp_coll.transport import Transport

CHECK_POLLS = 64  # idle polls between looks at the clock, and
_CHECK_NAPS = 8  # naps: peers that wait in vain want an answer within a second
_EAGER_POLLS = 256
_NAP_SECONDS, _LONGEST_NAP_SECONDS = 5e-5, 5e-3
_NAP_SHARE = 1 / 16
_CALM_NAP_SECONDS = 5e-2  # where what comes is early anyway


class Operation(Protocol):
    """What the engine runs."""

    name: str
    phase: str  # what it is at, for messages: "agreeing on the call"

    def quick(self) -> bool:
        """Try to be done at once; if not, `run` goes on from there."""

    def result(self) -> Any:
        """After `quick` said that it is done."""

    def run(self) -> Generator[bool, None, Any]:
        """Yields whether progress was made since the last yield; returns the result."""

    def pending(self) -> tuple[set[int], int | None]:
        """Peers that are waited for, and the step (None where there are none)."""

    def hand_over(self) -> None:
        """Called in the thread of whoever waited for it, which uses the result from now on."""


class Once:
    """What operations share that run once, and hand nothing over."""

    def quick(self) -> bool:
        """Never."""
        return False

    def result(self) -> None:
        """Of `quick`, so never asked for."""

    def hand_over(self) -> None:
        """Nothing."""


class Driver(Protocol):
    """What works need of the engine."""

    timeout: float
    transport: Transport
    broken: str | None

    def drive(self, until: Callable[[], bool], operation: Operation, *, patient: bool = False) -> None:
        """Make progress until then."""

    def nudge(self) -> None:
        """One poll of everything."""

    def judge(self, error: BaseException, operation: Operation) -> BaseException:
        """What to raise for an error."""

    def timed_out(self, operation: Operation, waited: float) -> PeerTimeoutError:
        """The error for a wait that was in vain."""


class Work:
    """An operation under way. `wait()` gives its result; buffers belong to it until then."""

    def __init__(self, engine: Driver, operation: Operation) -> None:
        self._engine, self.operation = engine, operation
        self.generator = operation.run()
        self.done = False
        self.watch = Watch(engine, operation)
        self._value: Any = None
        self._error: BaseException | None = None

    def wait(self) -> Any:
        """Wait until the collective is complete; the result that a blocking call would return.

        Raises what the blocking call would raise, PeerTimeoutError included, each time it is called.
        """
        try:
            self._engine.drive(lambda: self.done, self.operation)
        except CollectiveError as error:
            self.fail(error)
        if self._error is not None:
            raise self._error
        self.operation.hand_over()
        return self._value

    def test(self) -> bool:
        """Make progress; whether the collective is complete, with a result or an error that `wait` will raise."""
        self._engine.nudge()
        return self.done

    def advance(self) -> bool:
        """One poll; for the engine."""
        try:
            moved = next(self.generator)
            if moved:
                self.watch = Watch(self._engine, self.operation)
            return moved
        except StopIteration as stop:
            self._value = stop.value
        except BaseException as error:
            self._error, self.done = self._engine.judge(error, self.operation), True
            if not isinstance(error, Exception):  # Ctrl-C is for whoever is waiting, not for this work alone
                raise
        self.done = True
        return True

    def fail(self, error: BaseException) -> None:
        """End with an error; for the engine."""
        self._error, self.done = error, True


class Patience:
    """How long to sleep between polls: a share of the time that nothing has come, so that waiting costs little of
    either time or cores, which others may need to compute."""

    def __init__(self) -> None:
        self._since: float | None = None

    def nap(self, slack: float = 0.0) -> float:
        """Seconds, after a poll without progress. slack: by how many what came before was early.

        Each poll takes the core from whoever computes on it, and what it has in its caches.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        calm = min(slack * _NAP_SHARE, _CALM_NAP_SECONDS)
        nap = max((now - self._since) * _NAP_SHARE, _NAP_SECONDS, calm)
        return min(nap, max(calm, _LONGEST_NAP_SECONDS))

    def end(self) -> None:
        """Something came."""
        self._since = None


class Watch:
    """Ends a wait without progress: by the timeout, or when a peer's alarm says that it has given up.

    patient: what is waited for takes its time, and other ranks may be computing on this core meanwhile.
    """

    def __init__(self, engine: Driver, operation: Operation, *, patient: bool = False) -> None:
        self._engine, self.operation, self._patient = engine, operation, patient
        self._patience = Patience()
        self.idle = 0
        self._since = 0.0

    def wait(self) -> None:
        """After a poll without progress."""
        self.idle += 1
        napping = self._patient and self.idle > _EAGER_POLLS
        if self.idle % (_CHECK_NAPS if napping else CHECK_POLLS) == 0:
            self.look(restart=self.idle == CHECK_POLLS)
        if self.idle == 1:
            self._patience.end()
        if napping:
            time.sleep(self._patience.nap())
        else:
            self._engine.transport.pause(self.idle)

    def look(self, restart: bool = False) -> None:
        """Raise PeerTimeoutError if it is time, CollectiveError if another thread has given up."""
        if self._engine.broken:
            raise CollectiveError(self._engine.broken)
        now = time.monotonic()
        if restart or not self._since:
            self._since = now
        self._since = max(self._since, self._engine.transport.last_event)
        waited = now - self._since
        if waited > self._engine.timeout or self._engine.transport.alarms():
            raise self._engine.timed_out(self.operation, waited)
