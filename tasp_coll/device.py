"""One rank's GPU through CuPy: streams, memory, and what runs on it beside the messages.

Nothing here waits for the GPU. Work goes to the stream that is the caller's current one, so it comes after what the
caller gave to it before, and before what the caller gives to it next; memory of torch and of CuPy is theirs to reuse
in that same order.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from tasp_coll.errors import ArgumentTypeError, CollectiveError
from tasp_coll.executor import Action, Place
from tasp_coll.launches import Launch, Links
from tasp_coll.reduce_programs import Arithmetic

_LOOK_SECONDS, _IDLE_SECONDS = 0.1, 1.0
T = TypeVar("T")


class GpuMemory:
    """Arrays of CuPy over addresses of the current device; see `reduction.Memory`."""

    block = 1 << 26  # kernels are launched for each, so they are large

    def __init__(self, cupy: Any, stream: Any) -> None:
        self._cupy, self._stream = cupy, stream

    def array(self, address: int, dtype: np.dtype[Any], count: int) -> Any:
        cuda = self._cupy.cuda
        memory = cuda.UnownedMemory(address, count * dtype.itemsize, None)
        return self._cupy.ndarray((count,), dtype, cuda.MemoryPointer(memory, 0))

    def empty(self, count: int, dtype: np.dtype[Any]) -> Any:
        return self._cupy.empty(count, dtype)

    def move(self, dst: int, src: int, nbytes: int) -> None:
        if nbytes and dst != src:
            runtime = self._cupy.cuda.runtime
            runtime.memcpyAsync(dst, src, nbytes, runtime.memcpyDeviceToDevice, self._stream.ptr)


class Device:
    """A GPU, and the links from it once they are up."""

    def __init__(self, number: int, handle: int | None = None) -> None:
        """handle: of the stream that the user wants; None: the current one of each call."""
        self.cupy = cupy = load_cupy()
        self.number, self._handle = number, handle
        self._device = cupy.cuda.Device(number)
        self._stage: dict[int, tuple[int, Any]] = {}  # by stream: bytes, memory
        self._greeting: Any = None
        self._side: Any = None
        self._last: tuple[int, Any] | None = None  # the latest call's stream, and the event at its end
        self.links: Links | None = None

    def identity(self) -> str:
        """Host and PCI bus: the same for ranks that share the GPU, and for no others."""
        return f"{socket.gethostname()}:{self._device.pci_bus_id}"

    def exclusive(self, job: Callable[[], T]) -> T:
        """Run the job with this GPU as the thread's current one."""
        with self._device:
            return job()

    def greet(self, links: Links) -> Callable[[], bool]:
        """Send a byte to every peer; the function that is returned says whether all have come and gone."""
        self.links = links
        cuda = self.cupy.cuda
        with self._device:
            stream, memory, event = cuda.Stream(non_blocking=True), cuda.alloc(2 * links.size), cuda.Event()
            self._greeting = stream, memory  # until the last call
            peers = [peer for peer in range(links.size) if peer != links.rank]
            if peers:
                sends = [(True, peer, memory.ptr + peer, 1) for peer in peers]
                receives = [(False, peer, memory.ptr + links.size + peer, 1) for peer in peers]
                links.group(sends + receives, stream.ptr)
            event.record(stream)
            self._last = stream.ptr, event
        return lambda: bool(event.done)

    def stream(self, framework: str) -> Any:
        """The user's stream, or the current one of the framework whose arrays come in, as CuPy's."""
        cuda = self.cupy.cuda
        if self._handle is not None:
            return cuda.ExternalStream(self._handle, self.number)
        torch = sys.modules.get("torch")
        if framework == "torch" and torch is not None:
            handle = torch.cuda.current_stream(self.number).cuda_stream
            return cuda.ExternalStream(handle, self.number)
        return cuda.get_current_stream(self.number)

    def run(self, steps: Sequence[Launch], bases: dict[str, int], stage_bytes: int, stream: Any) -> None:
        """Give launches to a stream. bases: where the regions of the caller are."""
        assert self.links is not None
        with self._device, stream:
            places = {**bases, "stage": self._staged(stage_bytes, stream)}
            memory = GpuMemory(self.cupy, stream)

            def address(place: Place) -> int:
                return places[place.region] + place.offset

            def act(action: Action) -> None:
                assert isinstance(action, Arithmetic)
                action.run(address, memory)

            self.links.launch(steps, address, act, stream.ptr)

    def copy(self, moves: Sequence[tuple[int, int, int]], stream: Any) -> None:
        """Copy bytes within the GPU: (to, from, bytes) each."""
        with self._device, stream:
            memory = GpuMemory(self.cupy, stream)
            for dst, src, nbytes in moves:
                memory.move(dst, src, nbytes)

    def follow(self, stream: Any) -> None:
        """What the stream is given from now on comes after all calls so far, whatever stream they are on."""
        if self._last is not None and self._last[0] != stream.ptr:
            stream.wait_event(self._last[1])

    def passed(self, stream: Any) -> Any:
        """A call has been given to the stream: the event at its end."""
        ended = self.event(stream)
        self._last = stream.ptr, ended
        return ended

    def side_stream(self) -> Any:
        """A stream of our own, the same for all calls, which keep their order on it."""
        if self._side is None:
            with self._device:
                self._side = self.cupy.cuda.Stream(non_blocking=True)
        return self._side

    def event(self, stream: Any) -> Any:
        """Recorded now: done when all that the stream was given is."""
        with self._device:
            made = self.cupy.cuda.Event(disable_timing=True)
            made.record(stream)
        return made

    def _staged(self, nbytes: int, stream: Any) -> int:
        """Staging memory, which calls on one stream use one after another."""
        held, memory = self._stage.get(stream.ptr, (0, None))
        if nbytes > held:
            memory = self.cupy.cuda.alloc(nbytes)
            self._stage[stream.ptr] = nbytes, memory
        return int(memory.ptr) if memory is not None else 0

    def close(self, failure: str | None) -> None:
        """Finish what is under way, and give links and memory back. failure: why that is not to be waited for."""
        if self.links is not None:
            with self._device:
                if failure is not None:
                    self.links.abort(failure)
                elif not self.links.broken:
                    self._device.synchronize()
                self.links.close()
        self._stage.clear()


@dataclass
class Pending:
    """A call on its way through a stream. `deadline` is set once the stream has come to it."""

    name: str
    began: Any
    ended: Any
    keep: Any  # alive until it is done
    deadline: float | None = None


class OnGpu:
    """Where a call runs: on the caller's current stream, or, if the caller goes on meanwhile, on one beside it."""

    def __init__(self, device: Device, framework: str) -> None:
        self.device, self._framework = device, framework
        self.stream = device.stream(framework)
        self._aside = False
        self._began: Any = None
        self._ended: Any = None

    def aside(self) -> None:
        """Run on a stream beside the caller's, after all that the caller's has been given until now."""
        now = self.device.event(self.stream)
        self.stream, self._aside = self.device.side_stream(), True
        self.stream.wait_event(now)

    def begin(self) -> None:
        """From here on the stream is given the call."""
        self.device.follow(self.stream)
        self._began = self.device.event(self.stream)

    def end(self, name: str, *arrays: Any) -> Pending:
        """All has been given. On the caller's own stream its allocator knows when memory is free; beside it, we do."""
        self._ended = self.device.passed(self.stream)
        return Pending(name, self._began, self._ended, arrays if self._aside else None)

    def hand_over(self) -> None:
        """What the waiting caller's current stream is given from now on comes after the call."""
        if self._ended is not None:
            self.device.stream(self._framework).wait_event(self._ended)


class Guard:
    """Ends a call that a GPU has been at for longer than the timeout: its peers are gone, it would go on for ever."""

    def __init__(self, device: Device, timeout: float, failed: Callable[[str], None]) -> None:
        """failed: is told why, from the guard's thread."""
        self._device, self._timeout, self._failed = device, timeout, failed
        self._calls: deque[Pending] = deque()
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
        while self._calls and self._calls[0].ended.done:
            self._calls.popleft()
        try:
            links.check()
        except CollectiveError as error:
            return str(error)
        if not self._calls:
            return None
        first = self._calls[0]
        if first.deadline is None and first.began.done:
            first.deadline = now + self._timeout
        if first.deadline is not None and now > first.deadline:
            links.abort(f"{first.name}: not complete on the GPU within {self._timeout:.3g} s")
            return links.broken
        return None


def load_cupy() -> Any:
    """CuPy. CollectiveError says what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise CollectiveError(
            f"arrays on a GPU need CuPy ({error}): pip install 'tasp-coll[cuda12]' or 'tasp-coll[cuda13]'"
        ) from error
    return cupy


def stream_handle(stream: Any) -> int | None:
    """The CUDA stream that a user means: CuPy's, torch's, any with `__cuda_stream__`, or a handle; None: the current.

    ArgumentTypeError for anything else.
    """
    if stream is None or (isinstance(stream, int) and not isinstance(stream, bool)):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        found = stream.__cuda_stream__()
        return int((found() if callable(found) else found)[1])
    for name in ("ptr", "cuda_stream"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return handle
    raise ArgumentTypeError(f"stream must be a CUDA stream of CuPy or torch, its handle, or None, got {stream!r}")
