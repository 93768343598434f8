"""A group's collectives in the order of the calls: blocking ones in the caller's thread, others in their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from queue import SimpleQueue

import torch
import torch.distributed as dist
from torch import Tensor

from tasp_coll.errors import CollectiveError

_AS_LONG_AS_IT_TAKES = timedelta(0)  # how torch says so: the collective has a timeout itself


class TaspWork(dist.Work):
    """A collective under way, as torch knows it. `outputs`: what it writes."""

    def __init__(self, action: Callable[[], None], outputs: list[Tensor]) -> None:
        super().__init__()
        self._action: Callable[[], None] | None = action
        self._outputs = outputs
        self._ended = threading.Event()
        self._error: Exception | None = None
        self._lock = threading.Lock()
        self._base: torch.futures.Future[list[Tensor]] | None = None
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def carry(self) -> Exception | None:
        """Do it; for the line. What went wrong."""
        action, self._action = self._action, None
        assert action is not None
        try:
            action()
        except Exception as error:
            return error
        return None

    def end(self, error: Exception | None) -> None:
        """It is done, or has failed."""
        with self._lock:
            self._error = error
            self._ended.set()
            base = self._base
        if base is not None:
            self._settle(base)

    def wait(self, timeout: timedelta = _AS_LONG_AS_IT_TAKES) -> bool:
        """Wait until the result is there; CollectiveError if it never will be, or not within a `timeout` > 0."""
        limit = timeout.total_seconds()
        if not self._ended.wait(limit if limit > 0 else None):
            raise CollectiveError(f"wait: the collective was not complete within timeout={limit:.3g} s")
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """Wait."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it has ended, well or not."""
        return self._ended.is_set()

    def is_success(self) -> bool:
        """Whether it has ended well."""
        return self._ended.is_set() and self._error is None

    def exception(self) -> Exception | None:
        """What went wrong."""
        return self._error

    def result(self) -> list[Tensor]:
        """What it wrote."""
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the outputs. Callbacks run in the thread that carries out the group's collectives."""
        with self._lock:
            if self._future is not None:
                return self._future
            base: torch.futures.Future[list[Tensor]] = torch.futures.Future()
            # torch's C++ knows of an exception only if a callback raised it.
            self._future = base.then(lambda done: done.value())
            self._base = base
            ended = self._ended.is_set()
        if ended:
            self._settle(base)
        return self._future

    def _settle(self, base: torch.futures.Future[list[Tensor]]) -> None:
        if self._error is None:
            base.set_result(self._outputs)
        else:
            base.set_exception(self._error)


class Line:
    """Carries out works one after another. `name`: of the thread, which starts with the first asynchronous one."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._turn = threading.Lock()  # held while a work is carried out
        self._waiting = 0  # queued and not yet ended
        self._queue: SimpleQueue[TaspWork | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False

    def start(self, action: Callable[[], None], outputs: list[Tensor], *, blocking: bool) -> TaspWork:
        """Carry out `action` after all before it. blocking: it has ended when this returns."""
        work = TaspWork(action, outputs)
        with self._lock:
            if self._closed:
                raise CollectiveError("this process group is closed: it was shut down or aborted")
            direct = blocking and not self._waiting and self._turn.acquire(blocking=False)
            if not direct:
                self._enqueue(work)
        if direct:
            try:
                error = work.carry()
            finally:
                self._turn.release()
            work.end(error)
        if blocking:
            work.wait()
        return work

    def close(self, patience: float) -> None:
        """No more works. Waits `patience` seconds for those that are queued."""
        with self._lock:
            self._closed = True
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            if thread is not threading.current_thread():
                thread.join(patience)

    def _enqueue(self, work: TaspWork) -> None:
        self._waiting += 1
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            with self._turn:
                error = work.carry()
            with self._lock:
                self._waiting -= 1  # before anyone hears of it: a blocking call that comes then need not queue
            work.end(error)
            del work, error  # and with them the caller's tensors, while the next is awaited
