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
from itertools import count
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from nccl_double import Fabric, Nccl


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
    handles = count(1)

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
        self._before = getattr(Runtime.local, "stream", None)
        Runtime.local.stream = self
        return self

    def __exit__(self, *exc: object) -> None:
        Runtime.local.stream = self._before

    @property
    def done(self) -> bool:
        Runtime.fabric.pump()
        return not Runtime.fabric.streams[self.number, self.ptr]

    def wait_event(self, event: Event) -> None:
        mark = event.begun
        with Runtime.fabric.lock:
            Runtime.fabric.streams[self.number, self.ptr].append(lambda: event.reached >= mark)


class ExternalStream(Stream):
    def __init__(self, ptr: int, device_id: int = -1) -> None:
        self.ptr, self.number = ptr, device_id


class Event:
    """Who waits for it waits for the latest record before that, or for nothing if there was none: as CUDA has it."""

    all: ClassVar[weakref.WeakValueDictionary[int, Event]] = weakref.WeakValueDictionary()

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False) -> None:
        self.ptr = next(Runtime.handles)
        self.begun = self.reached = 0  # how often it was recorded, and how far the streams have come
        self.all[self.ptr] = self

    def record(self, stream: Any) -> None:
        mark = self.begin()
        with Runtime.fabric.lock:
            Runtime.fabric.streams[stream.number, stream.ptr].append(lambda: self.reach(mark))

    @property
    def done(self) -> bool:
        Runtime.fabric.pump()
        return self.reached >= self.begun

    def begin(self) -> int:
        self.begun += 1
        return self.begun

    def reach(self, mark: int) -> None:
        self.reached = max(self.reached, mark)


class _Memory:
    """Never used again in a test: CuPy's pool gives it to none but what comes later in the same stream."""

    held: ClassVar[list[Any]] = []

    def __init__(self, nbytes: int) -> None:
        self.held.append(np.zeros(max(nbytes, 1), np.uint8))
        self.ptr = int(self.held[-1].ctypes.data)


class UnownedMemory:
    """An action is about to use it: what the stream was given before comes first."""

    def __init__(self, ptr: int, size: int, owner: Any, device_id: int = -1) -> None:
        self.ptr = ptr
        drain(Runtime.here().number, current().ptr)


def current() -> Any:
    return Runtime.local.stream


def drain(rank: int, handle: int) -> None:
    """Wait until a stream has nothing left to do."""
    deadline = time.monotonic() + 10
    while Runtime.fabric.streams[rank, handle]:
        Runtime.fabric.pump()
        time.sleep(1e-4)
        assert time.monotonic() < deadline, f"stream {handle} of rank {rank} is stuck"


def _memcpy(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    with Runtime.fabric.lock:
        Runtime.fabric.streams[Runtime.here().number, stream].append(lambda: ctypes.memmove(dst, src, size))


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
        "nccl": nccl,
    }
    runtime = ModuleType("cupy.cuda.runtime")
    runtime.__dict__.update(memcpyAsync=_memcpy, memcpyDeviceToDevice=3)
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
