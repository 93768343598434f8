"""One rank's GPU through CuPy: streams, events, memory, graphs, and what runs on it beside messages.

Nothing here waits for the GPU. Work goes to the stream that is the caller's current one, so it comes after what the
caller gave to it before, and before what the caller gives to it next; memory of torch and of CuPy is theirs to reuse
in that same order.
"""

from __future__ import annotations

import socket
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np

from tasp_coll.arrays import DeviceBytes
from tasp_coll.errors import ArgumentTypeError, CollectiveError
from tasp_coll.executor import Action, Place
from tasp_coll.launches import Launch, Links
from tasp_coll.reduction import Memory

T = TypeVar("T")
_DEFAULT_STREAMS = (0, 1)  # handles of the default stream, which nobody can capture


class DeviceAction(Protocol):
    """An action of a program that a device can carry out too."""

    def run(self, address: Callable[[Place], int], memory: Memory) -> None: ...


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

    def clear(self, dst: int, nbytes: int) -> None:
        if nbytes:
            self._cupy.cuda.runtime.memsetAsync(dst, 0, nbytes, self._stream.ptr)


@dataclass(frozen=True)
class Graph:
    """A captured call. pool: its memory, which nobody else gets."""

    graph: Any
    pool: Any

    def launch(self, stream: Any) -> None:
        """Give it to a stream, all of it at once."""
        self.graph.launch(stream)


class Device:
    """A GPU, and the links from it once they are up."""

    def __init__(self, number: int, handle: int | None = None) -> None:
        """handle: of the stream that the user wants; None: the current one of each call."""
        self.cupy = cupy = load_cupy()
        self.number, self._handle = number, handle
        self._device = cupy.cuda.Device(number)
        self._stage: dict[int, tuple[int, Any]] = {}  # by stream: bytes, memory
        self._foreign: dict[int, Any] = {}  # streams, by handle
        self._greeting: Any = None
        self._sides: list[Any] = []
        self._captured: Any = None  # a pool for what callers capture, and who holds its memory
        self._lock = threading.RLock()
        self._giver: int | None = None
        self._late: deque[Callable[[], None]] = deque()
        self._last: tuple[int, Any] | None = None  # the stream that launches were given to last, and an event after
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
        with self.giving():
            stream, memory, event = cuda.Stream(non_blocking=True), cuda.alloc(2 * links.size), cuda.Event()
            self._greeting = stream, memory  # until the last call
            peers = [peer for peer in range(links.size) if peer != links.rank]
            sends = [(True, peer, memory.ptr + peer, 1) for peer in peers]
            receives = [(False, peer, memory.ptr + links.size + peer, 1) for peer in peers]
            links.greet(sends + receives, stream.ptr)
            event.record(stream)
            self._last = stream.ptr, event
        return lambda: bool(event.done)

    # --- streams and events

    def stream(self, framework: str) -> Any:
        """The user's stream, or the current one of the framework whose arrays come in, as CuPy's."""
        if self._handle is not None:
            return self._external(self._handle)
        torch = sys.modules.get("torch")
        if framework == "torch" and torch is not None:
            return self._external(torch.cuda.current_stream(self.number).cuda_stream)
        return self.cupy.cuda.get_current_stream(self.number)

    def _external(self, handle: int) -> Any:
        """A stream of somebody else. CuPy 14 would have `Stream.from_external`, but destroys the stream in the end."""
        if handle not in self._foreign:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                self._foreign[handle] = self.cupy.cuda.ExternalStream(handle, self.number)
        return self._foreign[handle]

    def side_stream(self, number: int = 0) -> Any:
        """A stream of our own, the same for all calls, which keep their order on it."""
        while len(self._sides) <= number:
            with self._device:
                self._sides.append(self.cupy.cuda.Stream(non_blocking=True))
        return self._sides[number]

    @contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """With the stream as CuPy's current one."""
        with self._device, stream:
            yield

    def event(self, stream: Any) -> Any:
        """Recorded now: done when all that the stream was given is."""
        with self._device:
            made = self.cupy.cuda.Event(disable_timing=True)
            made.record(stream)
        return made

    def follow(self, stream: Any) -> None:
        """Launches that the stream is given from now on come after those before, where the links need that."""
        if self.links is not None and not self.links.orders_streams and self._last is not None:
            last, event = self._last
            if last != stream.ptr:
                stream.wait_event(event)

    def passed(self, stream: Any) -> Any:
        """The stream has been given launches: the event after them."""
        event = self.event(stream)
        self._last = stream.ptr, event
        return event

    # --- giving work to a stream

    @contextmanager
    def giving(self) -> Iterator[None]:
        """One thread at a time gives, on this GPU. What the garbage collector wants to give in between comes after."""
        with self._lock, self._device:
            outer, self._giver = self._giver, threading.get_ident()
            try:
                yield
            finally:
                self._giver = outer
                while outer is None and self._late:
                    self._late.popleft()()

    def later(self, job: Callable[[], None]) -> None:
        """Do it now, or when this very thread has given what it is just giving."""
        if self._giver == threading.get_ident():
            self._late.append(job)
        else:
            job()

    def run(self, steps: Sequence[Launch], places: dict[str, int], stream: Any) -> None:
        """Give launches to a stream. places: where the regions of the program are."""
        assert self.links is not None
        with self.giving(), stream:
            memory = GpuMemory(self.cupy, stream)

            def address(place: Place) -> int:
                return places[place.region] + place.offset

            def act(action: Action | DeviceAction) -> None:
                assert hasattr(action, "run"), action
                action.run(address, memory)

            self.links.launch(steps, address, act, _Strands(self, stream, self.links.communicators))

    def copy(self, moves: Sequence[tuple[int, int, int]], stream: Any) -> None:
        """Copy bytes within the GPU: (to, from, bytes) each."""
        with self.giving(), stream:
            memory = GpuMemory(self.cupy, stream)
            for dst, src, nbytes in moves:
                memory.move(dst, src, nbytes)

    # --- memory

    def staged(self, nbytes: int, stream: Any) -> int:
        """Where staging memory is, which calls on one stream use one after another."""
        held, memory = self._stage.get(stream.ptr, (0, None))
        if nbytes > held:
            memory = self.memory(nbytes, stream)
            self._stage[stream.ptr] = nbytes, memory
        return int(memory.address) if memory is not None else 0

    def memory(self, nbytes: int, stream: Any) -> DeviceBytes:
        """Memory for what a stream is given; given back, it is for the same stream again."""
        if not nbytes:
            return DeviceBytes(0, 0, None)
        with self._device, stream:
            made = self.cupy.cuda.alloc(nbytes)
        return DeviceBytes(int(made.ptr), nbytes, made)

    # --- graphs

    def is_capturing(self, stream: Any) -> bool:
        """Whether the caller is capturing what the stream is given."""
        return stream.ptr not in _DEFAULT_STREAMS and bool(stream.is_capturing())

    def capture(self, give: Callable[[Any], None]) -> Graph:
        """What `give` gives to the stream that it is called with, as a graph. Raises what CUDA or NCCL say against it.

        Its memory comes from a pool of its own, as a graph uses the same at each launch.
        """
        cuda = self.cupy.cuda
        pool = cuda.MemoryPool()
        with self.giving():
            stream = cuda.Stream(non_blocking=True)  # the caller's may be the default one, which cannot be captured
            with stream, cuda.using_allocator(pool.malloc):
                stream.begin_capture()
                try:
                    give(stream)
                except BaseException:
                    with suppress(Exception):
                        stream.end_capture()
                    raise
                graph = stream.end_capture()
            graph.upload(stream)
        return Graph(graph, pool)

    @contextmanager
    def captured(self) -> Iterator[list[Any]]:
        """While the caller captures: allocations are from a pool that nobody else gets, as the caller's graph will use
        the same memory whenever it is launched. What is put into the list stays until the end."""
        if self._captured is None:
            self._captured = self.cupy.cuda.MemoryPool(), []
        pool, held = self._captured
        with self._device, self.cupy.cuda.using_allocator(pool.malloc):
            yield held

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
        self._captured = None


class _Strands:
    """The streams of a launch: one, or with it as many as there are communicators beside the first."""

    def __init__(self, device: Device, stream: Any, count: int) -> None:
        self._device = device
        self._streams = [stream, *(device.side_stream(number) for number in range(1, count))]
        self.handles = [each.ptr for each in self._streams]

    def meet(self) -> None:
        """What any of them is given from now on comes after all that any was given until now."""
        first, *others = self._streams
        for other in others:
            first.wait_event(self._device.event(other))
        now = self._device.event(first) if others else None
        for other in others:
            other.wait_event(now)


class OnGpu:
    """Where a call runs: on the caller's current stream, or, if the caller goes on meanwhile, on one beside it."""

    def __init__(self, device: Device, framework: str) -> None:
        self.device, self._framework = device, framework
        self.stream = device.stream(framework)
        self.capturing = device.is_capturing(self.stream)
        self.beside = False
        self._ended: Any = None

    def aside(self) -> None:
        """Run on a stream beside the caller's, after all that the caller's has been given until now."""
        now = self.device.event(self.stream)
        self.stream, self.beside = self.device.side_stream(), True
        self.stream.wait_event(now)

    def current(self) -> Any:
        """The caller's stream now."""
        return self.device.stream(self._framework)

    def end(self) -> Any:
        """All has been given; the event of its end."""
        self._ended = self.device.event(self.stream) if self.capturing else self.device.passed(self.stream)
        return self._ended

    def hand_over(self) -> None:
        """What the waiting caller's current stream is given from now on comes after the call."""
        if self._ended is not None:
            self.current().wait_event(self._ended)


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
