"""Ends what never ends on a GPU: its peers are gone, and it would wait for ever."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from tasp_coll.errors import CollectiveError
from tasp_coll.launches import Links

_LOOK_SECONDS, _IDLE_SECONDS = 0.1, 1.0


_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED


def _relax() -> None:
    """Let this thread ask for events while others capture graphs, which may forbid it to all threads."""
    try:
        exchange = ctypes.CDLL("libcuda.so.1").cuThreadExchangeStreamCaptureMode
    except (OSError, AttributeError):  # another driver
        return
    exchange(ctypes.byref(ctypes.c_int(_RELAXED)))


class Linked(Protocol):
    """What the guard needs of a device."""

    links: Links | None


@dataclass
class Pending:
    """A call, or a step of one, on its way through a stream. `deadline` is set once the stream has come to it."""

    name: str
    began: Any
    ended: Any
    keep: Any = None  # alive until it is done
    deadline: float | None = None


class Guard:
    """Aborts the links when something takes a GPU longer than the timeout."""

    def __init__(self, device: Linked, timeout: float, failed: Callable[[str], None]) -> None:
        """failed: is told why, from the guard's thread."""
        self._device, self._timeout, self._failed = device, timeout, failed
        self._calls: list[Pending] = []
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def watch(self, call: Pending) -> None:
        """Expect the end of a call."""
        with self._wake:
            self._calls.append(call)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="tasp_coll GPU guard", daemon=True)
                self._thread.start()
            self._wake.notify()

    def close(self) -> None:
        """End the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        _relax()
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._calls or self._closed, _IDLE_SECONDS)
                if self._closed:
                    return
            why = self._look()
            if why is not None:
                self._failed(why)
                return
            with self._wake:
                self._wake.wait_for(lambda: self._closed, _LOOK_SECONDS)

    def _look(self) -> str | None:
        """Forget what is done; why it is over, if it is."""
        links, now = self._device.links, time.monotonic()
        assert links is not None
        with self._wake:
            known = list(self._calls)
        done = {id(call) for call in known if call.ended.done}
        with self._wake:
            self._calls = [call for call in self._calls if id(call) not in done]
            known = list(self._calls)
        try:
            links.check()
        except CollectiveError as error:
            return str(error)
        for call in known:  # on several streams, so that none stands for those after it
            if call.deadline is None and call.began.done:
                call.deadline = now + self._timeout
            if call.deadline is not None and now > call.deadline:
                links.abort(f"{call.name}: not complete on the GPU within {self._timeout:.3g} s")
                return links.broken
        return None
