"""A double of CUDA IPC and of stream memory operations, beside `cupy_double`, that watches who touches which memory.

Ranks are threads and share their memory, so a handle is an address. Every copy, flag and event is one item of a
stream's queue. `Watch` follows what happens before what, with a clock for each stream that events and flags pass on,
and refuses two uses of the same memory, one of them a write, of which neither must happen before the other: reads
before the data is there, and data that is overwritten before its reader is done, whatever the timing of this run.
"""

from __future__ import annotations

import ctypes
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import cupy_double
import tasp_coll.linkup
from cupy_double import Event, Runtime
from nccl_double import Entry, Fabric
from tasp_coll.transport.stream_memory import StreamMemory

Key = tuple[int, int]  # of a stream: its GPU, its handle
_PAGE = 1 << 14
SIGNATURES = {  # as the docstrings of CuPy 14 have them
    "ipcGetMemHandle": "intptr_t devPtr",
    "ipcOpenMemHandle": "bytes handle, unsigned int flags=cudaIpcMemLazyEnablePeerAccess",
    "ipcCloseMemHandle": "intptr_t devPtr",
    "hostRegister": "intptr_t ptr, size_t size, unsigned int flags",
    "hostUnregister": "intptr_t ptr",
    "pointerGetAttributes": "intptr_t ptr",
    "malloc": "size_t size",
    "free": "intptr_t ptr",
    "eventRecord": "intptr_t event, intptr_t stream",
    "streamWaitEvent": "intptr_t stream, intptr_t event, unsigned int flags=0",
    "memcpyAsync": "intptr_t dst, intptr_t src, size_t size, int kind, intptr_t stream",
}


class Race(AssertionError):
    """Two uses of memory in no order."""


class Use(NamedTuple):
    stream: int
    time: int
    start: int
    stop: int
    write: bool


_STREAMS = 1024  # of one world, at most


@dataclass
class Watch:
    """What each stream knows of the others, and who used which memory last. A clock has a place for every stream."""

    numbers: dict[Key, int] = field(default_factory=dict)
    clocks: np.ndarray[Any, Any] = field(default_factory=lambda: np.zeros((_STREAMS, _STREAMS), np.int32))
    passed_on: dict[object, np.ndarray[Any, Any]] = field(default_factory=dict)  # by flag or event
    uses: dict[int, list[Use]] = field(default_factory=lambda: defaultdict(list))  # by page

    def clock(self, key: Key) -> tuple[int, np.ndarray[Any, Any]]:
        number = self.numbers.setdefault(key, len(self.numbers))
        return number, self.clocks[number]

    def release(self, key: Key, where: object) -> None:
        number, clock = self.clock(key)
        clock[number] += 1
        self.passed_on[where] = clock[: len(self.numbers)].copy()

    def acquire(self, key: Key, where: object) -> None:
        if (told := self.passed_on.get(where)) is not None:
            mine = self.clock(key)[1][: len(told)]
            np.maximum(mine, told, out=mine)

    def use(self, key: Key, start: int, nbytes: int, write: bool) -> None:
        (number, clock), stop = self.clock(key), start + nbytes
        clock[number] += 1
        use = Use(number, int(clock[number]), start, stop, write)
        for page in range(start // _PAGE, (stop - 1) // _PAGE + 1):
            kept = []
            for other in self.uses[page]:
                if other.start < stop and start < other.stop and (write or other.write):
                    if clock[other.stream] < other.time:
                        raise Race(f"{use} and {other} are in no order")
                    if write and start <= other.start and other.stop <= stop:
                        continue  # what comes after this write comes after that too
                kept.append(other)
            self.uses[page] = [*kept, use]


class Ipc:
    """Of one fabric: what the runtime and the driver do."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric, self.watch = fabric, Watch()
        self.serial = False  # whether a GPU carries out its streams as one, in the order in which it is given things
        self.memory: dict[int, np.ndarray[Any, Any]] = {}
        self.opened: list[int] = []
        self.registered: set[int] = set()

    def key(self, stream: int | None) -> Key:
        return Runtime.here().number, 0 if self.serial else stream or 0

    def give(self, key: Key, item: Any, event: Event | None = None, waits: bool = False) -> None:
        self.fabric.give(*key, item, Entry(key[1], event, waits))

    # --- cupy.cuda.runtime

    def malloc(self, size: int) -> int:
        memory = np.zeros(size, np.uint8)
        self.memory[int(memory.ctypes.data)] = memory
        return int(memory.ctypes.data)

    def free(self, ptr: int) -> None:
        del self.memory[ptr]

    def ipcGetMemHandle(self, devPtr: int) -> bytes:
        assert devPtr in self.memory, "handles are for whole allocations"
        return devPtr.to_bytes(64, "little")

    def ipcOpenMemHandle(self, handle: bytes, flags: int = 1) -> int:
        self.opened.append(ptr := int.from_bytes(handle, "little"))
        return ptr

    def ipcCloseMemHandle(self, devPtr: int) -> None:
        self.opened.remove(devPtr)

    def hostRegister(self, ptr: int, size: int, flags: int) -> None:
        assert ptr % 4096 == size % 4096 == 0
        self.registered.add(ptr)

    def hostUnregister(self, ptr: int) -> None:
        self.registered.remove(ptr)

    def pointerGetAttributes(self, ptr: int) -> Any:
        assert ptr in self.registered
        attributes = type("PointerAttributes", (), {})()
        attributes.devicePointer = ptr
        return attributes

    def memcpyAsync(self, dst: int, src: int, size: int, kind: int, stream: int) -> None:
        def copy() -> None:
            self.watch.use(self.fabric.running, src, size, False)
            self.watch.use(self.fabric.running, dst, size, True)
            ctypes.memmove(dst, src, size)

        self.give(self.key(stream), copy)

    def eventRecord(self, event: int, stream: int) -> None:
        key, recorded = self.key(stream), Event.all[event]
        mark = recorded.begin(*key)

        def record() -> None:
            self.watch.release(self.fabric.running, (event, mark))
            recorded.reach(mark)

        self.give(key, record, recorded)

    def streamWaitEvent(self, stream: int, event: int, flags: int = 0) -> None:
        key, awaited = self.key(stream), Event.all[event]
        mark = awaited.begun
        if awaited.captured is not None:  # what one stream captures the other does too
            with self.fabric.lock:
                self.fabric.captures[key] = awaited.captured

        def wait() -> bool:
            if not awaited.reached >= mark:
                return False
            self.watch.acquire(self.fabric.running, (event, mark))
            return True

        self.give(key, wait, awaited, waits=True)

    # --- libcuda

    def cuStreamBatchMemOp_v2(self, stream: int | None, count: int, address: int, flags: int) -> int:
        words = np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_uint64)), (count, 6))
        key = self.key(stream)
        for kind, at, value, condition, *_ in words.tolist():
            self.give(key, {1: self._wait, 2: self._write}[kind](at, value, condition))
        return 0

    def _wait(self, at: int, bit: int, condition: int) -> Any:
        assert condition == 2, "only waits for a bit are used"

        def wait() -> bool:
            if not ctypes.c_uint32.from_address(at).value & bit:
                return False
            self.watch.acquire(self.fabric.running, self.flag(at))
            return True

        return wait

    def _write(self, at: int, value: int, condition: int) -> Any:
        assert condition == 0, "with a barrier before"

        def write() -> None:
            self.watch.release(self.fabric.running, self.flag(at))
            ctypes.c_uint32.from_address(at).value = value

        return write

    def flag(self, at: int) -> int:
        """The same for all ranks, who see shared memory at different addresses."""
        base = max(ptr for ptr in self.registered if ptr <= at)
        return at - base


class Library:
    """As ctypes has one."""

    def __init__(self, ipc: Ipc) -> None:
        def call(*arguments: Any) -> int:
            return ipc.cuStreamBatchMemOp_v2(*arguments)

        self.cuStreamBatchMemOp_v2 = call


def attach(cupy: Any, fabric: Fabric) -> Ipc:
    """Give the double of CuPy what CUDA IPC needs."""
    ipc, runtime = Ipc(fabric), cupy.cuda.runtime
    for name in SIGNATURES:
        setattr(runtime, name, getattr(ipc, name))
    runtime.__dict__.update(memcpyDefault=4, hostAllocMapped=2, hostAllocPortable=1)
    return ipc


def install(monkeypatch: Any) -> Ipc:
    """Make `import cupy` find the doubles, and the driver's calls too."""
    fabric = cupy_double.install(monkeypatch)
    ipc = attach(sys.modules["cupy"], fabric)
    monkeypatch.setattr(tasp_coll.linkup, "load_driver", lambda: StreamMemory(Library(ipc)))
    return ipc
