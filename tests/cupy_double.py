"""A double of CuPy for ranks that are threads: "device" memory is the host's, streams are the queues of `nccl_double`.

What CuPy runs on a stream in its own time, the double does when it is given it, after all that the stream was given
before: the same order, seen from the stream.
"""

from __future__ import annotations

import ctypes
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from nccl_double import Entry, Fabric, Group, Nccl


class MemoryPointer:
    def __init__(self, mem: Any, offset: int) -> None:
        self.mem, self.ptr = mem, mem.ptr + offset


class ndarray(np.ndarray[Any, Any]):
    """On the device that is current when it is made."""

    def __new__(cls, shape: Any, dtype: Any, memptr: MemoryPointer | None = None) -> Any:
        dtype = np.dtype(dtype)
        nbytes = int(np.prod(shape)) * dtype.itemsize
        memptr = memptr or MemoryPointer(_Memory(nbytes), 0)
        made: Any = np.ndarray.__new__(cls, shape, dtype, (ctypes.c_char * nbytes).from_address(memptr.ptr))
        made.number = Runtime.here().number
        return made

    def __array_finalize__(self, parent: Any) -> None:
        self.number = getattr(parent, "number", 0)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: Any = None, **kwargs: Any) -> Any:
        """While a stream captures, arithmetic goes to the graph."""
        plain = [np.asarray(x) if isinstance(x, ndarray) else x for x in inputs]
        targets = None if out is None else tuple(np.asarray(x) for x in out)
        stream = current()
        if out is not None and stream.is_capturing():
            at, nbytes = out[0].ctypes.data, out[0].nbytes
            entry = Entry(stream.ptr, uses=((at, nbytes, True),))
            stream.give(lambda: getattr(ufunc, method)(*plain, out=targets, **kwargs), entry)
            return out[0]
        found = getattr(ufunc, method)(*plain, out=targets, **kwargs)
        return out[0] if out is not None else found

    @property
    def data(self) -> Any:  # type: ignore[override]
        pointer = type("Pointer", (), {})()
        pointer.ptr = self.ctypes.data
        return pointer

    @property
    def device(self) -> Any:  # type: ignore[override]
        return Device(self.number)


class Runtime:
    """What the threads share."""

    local = threading.local()
    fabric = Fabric()
    handles = count(16)
    graphs: ClassVar[list[Any]] = []
    refuse: ClassVar[set[int]] = set()  # the GPUs that will not capture

    @classmethod
    def stream_after(cls, before: Stream) -> Stream:
        """A fresh one, which begins where `before` is now."""
        event, made = Event(), Stream()
        event.record(before)
        made.wait_event(event)
        return made

    @classmethod
    def here(cls) -> Device:
        return getattr(cls.local, "device", None) or Device(0)


class Device:
    def __init__(self, number: int) -> None:
        self.number = self.id = number

    @property
    def pci_bus_id(self) -> str:
        return f"0000:{self.number:02x}:00.0"

    def __enter__(self) -> Device:
        Runtime.local.before = [*getattr(Runtime.local, "before", []), Runtime.here()]
        Runtime.local.device = self
        return self

    def __exit__(self, *exc: object) -> None:
        Runtime.local.device = Runtime.local.before.pop()

    def synchronize(self) -> None:
        for rank, handle in list(Runtime.fabric.streams):
            if rank == self.number:
                drain(rank, handle)


class Stream:
    def __init__(self, non_blocking: bool = False) -> None:
        self.ptr, self.number = next(Runtime.handles), Runtime.here().number

    def __enter__(self) -> Stream:
        Runtime.local.outer = [*getattr(Runtime.local, "outer", []), getattr(Runtime.local, "stream", None)]
        Runtime.local.stream = self
        return self

    def __exit__(self, *exc: object) -> None:
        Runtime.local.stream = Runtime.local.outer.pop()

    @property
    def done(self) -> bool:
        Runtime.fabric.pump()
        return not Runtime.fabric.streams[self.number, self.ptr]

    def wait_event(self, event: Event) -> None:
        if event.captured is not None:  # what one stream captures the other does too
            self.join(event.captured)
        mark = event.begun
        self.give(lambda: event.reached >= mark, Entry(self.ptr, event, waits=True))

    def give(self, item: Any, entry: Entry) -> None:
        Runtime.fabric.give(self.number, self.ptr, item, entry)

    # --- capture: what a capturing stream is given goes to the graph

    def begin_capture(self, mode: int | None = None) -> None:
        assert self.ptr not in (0, 1), "the default stream cannot be captured"
        if self.number in Runtime.refuse:
            raise RuntimeError("cudaErrorStreamCaptureUnsupported")
        with Runtime.fabric.lock:
            Runtime.fabric.captures[self.number, self.ptr] = []

    def join(self, capture: list[Any]) -> None:
        with Runtime.fabric.lock:
            Runtime.fabric.captures[self.number, self.ptr] = capture

    def end_capture(self) -> Graph:
        with Runtime.fabric.lock:
            given = Runtime.fabric.captures[self.number, self.ptr]
            for key in [key for key, capture in Runtime.fabric.captures.items() if capture is given]:
                del Runtime.fabric.captures[key]
        return Graph(self.number, given)

    def is_capturing(self) -> bool:
        return (self.number, self.ptr) in Runtime.fabric.captures


class Graph:
    """What a stream was given while it captured, once more. One stream's order stands for all of a graph."""

    def __init__(self, number: int, given: list[tuple[Any, Entry]]) -> None:
        self._number, self.given, self.launched, self.uploaded = number, given, 0, False
        Runtime.graphs.append(self)

    def upload(self, stream: Stream) -> None:
        self.uploaded = True

    def launch(self, stream: Stream) -> None:
        self.launched += 1
        with Runtime.fabric.lock:
            for item, entry in self.given:
                if isinstance(item, Group):
                    Runtime.fabric.give_group(Group(item.rank, item.comm, item.messages, stream.ptr))
                elif entry.event is None:  # within the graph, one after another
                    Runtime.fabric.give(self._number, stream.ptr, item, replace(entry, stream=stream.ptr))


class ExternalStream(Stream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.number = ptr, device_id


class Event:
    """Who waits for it waits for the latest record before that, or for nothing if there was none: as CUDA has it."""

    all: ClassVar[weakref.WeakValueDictionary[int, Event]] = weakref.WeakValueDictionary()

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = next(Runtime.handles)
        self.begun = self.reached = 0  # how often it was recorded, and how far the streams have come
        self.captured: list[Any] | None = None
        self.all[self.ptr] = self

    def record(self, stream: Any) -> None:
        mark = self.begin(stream.number, stream.ptr)
        stream.give(lambda: self.reach(mark), Entry(stream.ptr, self))

    @property
    def done(self) -> bool:
        assert self.captured is None, "an event of a capture cannot be asked"
        Runtime.fabric.pump()
        return self.reached >= self.begun

    def begin(self, number: int, stream: int) -> int:
        self.captured = Runtime.fabric.captures.get((number, stream))
        self.begun += 1
        return self.begun

    def reach(self, mark: int) -> None:
        self.reached = max(self.reached, mark)


class _Memory:
    """Never used again in a test: CuPy's pool gives it to none but what comes later in the same stream."""

    held: ClassVar[list[Any]] = []

    def __init__(self, nbytes: int) -> None:
        memory = np.zeros(max(nbytes, 1), np.uint8)
        self.held.append(memory)  # by all ranks' threads: what is last now may be another's
        self.ptr = int(memory.ctypes.data)


class MemoryPool:
    def malloc(self, size: int) -> MemoryPointer:
        return MemoryPointer(_Memory(size), 0)


@contextmanager
def using_allocator(allocator: Any) -> Iterator[None]:
    yield


class UnownedMemory:
    """Without an owner an action is about to use it, and may write: what the stream was given before comes first."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr = ptr
        stream = current()
        if owner is None and not stream.is_capturing():
            drain(Runtime.here().number, stream.ptr)
            Runtime.fabric.note(stream.number, stream.ptr, ptr, size, True)


def current() -> Any:
    return _default(Runtime.here().number)


def drain(rank: int, handle: int) -> None:
    """Wait until a stream has nothing left to do."""
    deadline = time.monotonic() + 10
    while Runtime.fabric.streams[rank, handle]:
        Runtime.fabric.pump()
        time.sleep(1e-4)
        assert time.monotonic() < deadline, f"stream {handle} of rank {rank} is stuck"


def _memcpy(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    uses = ((dst, size, True), (src, size, False))
    number = Runtime.here().number
    Runtime.fabric.give(number, stream, lambda: ctypes.memmove(dst, src, size), Entry(stream, uses=uses))


def _memset(ptr: int, value: int, size: int, stream: int) -> None:
    entry = Entry(stream, uses=((ptr, size, True),))
    Runtime.fabric.give(Runtime.here().number, stream, lambda: ctypes.memset(ptr, value, size), entry)


def _packed(array: ndarray) -> ndarray:
    made = ndarray(array.shape, array.dtype)
    made[...] = array
    return made


def _default(device_id: int = -1) -> Stream:
    """The thread's current stream."""
    if getattr(Runtime.local, "stream", None) is None:
        with Device(device_id):
            Runtime.local.stream = Stream()
    stream: Stream = Runtime.local.stream
    return stream


def modules(fabric: Fabric) -> tuple[Any, Any]:
    """CuPy, and its NCCL, which give their work to this fabric."""
    Runtime.fabric = fabric
    Runtime.graphs, Runtime.refuse = [], set()
    _Memory.held.clear()
    cupy: Any
    cuda: Any
    cupy, cuda = ModuleType("cupy"), ModuleType("cupy.cuda")
    nccl: Any = Nccl(fabric)
    parts: dict[str, Any] = {
        "Device": Device,
        "Stream": Stream,
        "ExternalStream": ExternalStream,
        "Event": Event,
        "UnownedMemory": UnownedMemory,
        "MemoryPointer": MemoryPointer,
        "alloc": lambda size: MemoryPointer(_Memory(size), 0),
        "get_current_stream": _default,
        "MemoryPool": MemoryPool,
        "using_allocator": using_allocator,
        "nccl": nccl,
    }
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.__dict__.update(memcpyAsync=_memcpy, memsetAsync=_memset, memcpyDeviceToDevice=3)
    cuda.__dict__.update(parts, runtime=runtime)
    cupy.__dict__.update(
        cuda=cuda,
        ndarray=ndarray,
        empty=lambda shape, dtype: ndarray(shape, dtype),
        ascontiguousarray=_packed,
    )
    return cupy, nccl


def install(monkeypatch: Any) -> Fabric:
    """Make `import cupy` find the double, with a fresh fabric."""
    fabric = Fabric()
    cupy, nccl = modules(fabric)
    for name, module in (("cupy", cupy), ("cupy.cuda", cupy.cuda), ("cupy.cuda.nccl", nccl)):
        monkeypatch.setitem(sys.modules, name, module)
    return fabric


SIGNATURES = {  # of what `tasp_coll.device` calls, as the docstrings of CuPy 14 have them
    "Stream.begin_capture": "_BaseStream.begin_capture(self, mode=None)",
    "Stream.end_capture": "_BaseStream.end_capture(self)",
    "Stream.is_capturing": "_BaseStream.is_capturing(self)",
    "Stream.wait_event": "_BaseStream.wait_event(self, event)",
    "Graph.launch": "Graph.launch(self, stream=None)",
    "Graph.upload": "Graph.upload(self, stream=None)",
    "Event.record": "Event.record(self, stream=None)",
    "MemoryPool.malloc": "MemoryPool.malloc(self, size_t size) -> MemoryPointer",
    "UnownedMemory": "UnownedMemory(intptr_t ptr, size_t size, owner, int device_id=-1)",
    "MemoryPointer": "MemoryPointer(BaseMemory mem, ptrdiff_t offset)",
    "alloc": "alloc(size) -> MemoryPointer",
    "get_current_stream": "get_current_stream(int device_id=-1)",
    "runtime.memsetAsync": "memsetAsync(intptr_t ptr, int value, size_t size, intptr_t stream)",
    "runtime.memcpyAsync": "memcpyAsync(intptr_t dst, intptr_t src, size_t size, int kind, intptr_t stream)",
}
