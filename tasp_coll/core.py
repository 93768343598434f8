"""What a communicator holds: transport, rounds, engine, and the plans it has made, each bounded."""

from __future__ import annotations

import contextlib
import math
import mmap
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from tasp_coll.agreement import Rounds
from tasp_coll.device import Device
from tasp_coll.engine import Engine
from tasp_coll.errors import ArgumentError
from tasp_coll.executor import Exchange, Program
from tasp_coll.forecast import Choice
from tasp_coll.graphs import Graphs
from tasp_coll.guard import Guard
from tasp_coll.memos import Memos
from tasp_coll.schedule import Schedule, plan
from tasp_coll.topology import Topology
from tasp_coll.transport import Transport
from tasp_coll.transport.peer_memory import PeerMemory
from tasp_coll.tuning import Chooser, Situation

if TYPE_CHECKING:
    from tasp_coll.healing import Healer

SLOTS = 8  # lanes are numbered lane * SLOTS + slot: slot 0 for calls, the others for streams of steps
_PLANS = 64
_ADDRESSES = 8
_MAPPED_BYTES, _HUGE_BYTES = 1 << 16, 1 << 22
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def lanes(ranks: int) -> int:
    """How many lanes a communicator of so many ranks uses: one more than this is free for its links."""
    return (max_rings(ranks) + 1) * SLOTS


def max_rings(ranks: int) -> int:
    """How many rings a schedule on so many ranks may number: a decomposition has no more than 2 for every peer."""
    return max(2 * ranks, 10)


class Cache(Generic[K, V]):
    """The `limit` values used last; `drop` is called with those that leave."""

    def __init__(self, limit: int, drop: Callable[[V], None] = lambda value: None) -> None:
        self._limit, self._drop = limit, drop
        self._kept: OrderedDict[K, V] = OrderedDict()
        self._lock = threading.RLock()  # callers make operations while a background thread runs others

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: K) -> V | None:
        """The value, which is now the last used."""
        with self._lock:
            value = self._kept.get(key)
            if value is not None:
                self._kept.move_to_end(key)
            return value

    def put(self, key: K, value: V) -> V:
        """Keep a value."""
        with self._lock:
            self._kept[key] = value
            if len(self._kept) > self._limit:
                self._drop(self._kept.popitem(last=False)[1])
        return value

    def remove(self, key: K) -> None:
        """Forget a key, if it is there."""
        with self._lock:
            if key in self._kept:
                self._drop(self._kept.pop(key))

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            while self._kept:
                self._drop(self._kept.popitem()[1])


class Arena:
    """Staging memory, as large as the largest request so far."""

    _alive: ClassVar[weakref.WeakSet[Arena]] = weakref.WeakSet()

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)
        self._alive.add(self)

    def address(self, nbytes: int) -> int:
        """Where at least so many bytes are. What was handed out before is void once this has grown."""
        if nbytes > len(self.memory):
            self.memory = np.empty(0, np.uint8)  # first give back what there is
            self.memory = _memory(nbytes)
        return int(self.memory.ctypes.data)

    @classmethod
    def all_bytes(cls) -> int:
        """What this process holds for staging, of all communicators."""
        return sum(len(arena.memory) for arena in list(cls._alive))


def _memory(nbytes: int) -> NDArray[np.uint8]:
    """So many bytes; if they are many, pages of their own.

    Staging comes and goes with plans, in whichever thread: from the allocator, what is given back between smaller
    things would stay with the process.
    """
    if nbytes < _MAPPED_BYTES:
        return np.empty(nbytes, np.uint8)
    try:
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{nbytes} bytes of staging: {error}") from error
    if nbytes >= _HUGE_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # as NumPy asks for, where the system knows them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(pages, np.uint8)


class Compiled:
    """Programs of one plan, and their exchanges for the addresses seen last. The arena is shared with other plans."""

    def __init__(self, transport: Transport, programs: tuple[Program, ...], arena: Arena, slot: int = 0) -> None:
        self._transport, self.programs, self._slot = transport, programs, slot
        self.held = False  # by a stream, which outlives the call that opened it
        self._unwanted = False
        self.arena = arena
        arena.address(max((program.stage_bytes for program in programs), default=0))  # fails now if it must
        self._exchanges: Cache[tuple[Hashable, ...], Exchange] = Cache(_ADDRESSES, Exchange.free)

    def exchange(self, index: int, bases: Mapping[str, int]) -> Exchange:
        """Program `index` bound to where the caller's memory is."""
        stage_bytes = self.programs[index].stage_bytes
        stage = self.arena.address(stage_bytes) if stage_bytes else 0
        key = (index, stage, *bases.values())
        found = self._exchanges.get(key)
        if found is None:
            places = {**bases, "stage": stage}
            found = Exchange(self.programs[index], self._transport, places, self._slot, SLOTS)
            self._exchanges.put(key, found)
        return found

    def release(self) -> None:
        """No stream uses it any more."""
        self.held = False
        if self._unwanted:
            self.free()

    def free(self) -> None:
        """Release its requests, now or when no stream uses them any more."""
        if self.held:
            self._unwanted = True
            return
        self._exchanges.clear()


class Core:
    """Shared by the operations of one communicator."""

    def __init__(
        self, transport: Transport, topology: Topology, situation: Situation, rounds: Rounds, engine: Engine
    ) -> None:
        self.transport, self.topology, self.situation = transport, topology, situation
        self.rank, self.size = transport.rank, transport.size
        self.rounds, self.engine = rounds, engine
        self.chooser = Chooser()
        self.calls: Cache[Hashable, object] = Cache(4 * _PLANS)
        self.compiled: Cache[Hashable, Compiled] = Cache(_PLANS, Compiled.free)
        self.launches: Cache[Hashable, Any] = Cache(_PLANS)
        self._schedules: Cache[Hashable, Schedule] = Cache(_PLANS)
        self.arena = Arena()  # of calls, which run one after another; a stream has its own
        self.memos = Memos()
        self.planned = 0  # how many schedules were planned and proved, programs compiled
        self.streams: set[int] = set()
        self.peer_memory: PeerMemory | None = None  # where all ranks can read each other's
        self.checksums = False  # all ranks' messages of data carry one, see `checksums`
        self.stream: int | None = None  # that the user wants for arrays on a GPU
        self.gpu_transport = "auto"  # by which those travel, as the user wants it
        self.graphs = Graphs()
        self.gpu_streams: list[Any] = []  # open ones, which must end before the links do
        self._gpu: tuple[Device, Guard] | None = None
        self.last_choice: Choice | None = None
        self.healer: Healer | None = None

    def adopt(self, topology: Topology) -> None:
        """Plan for another topology from now on."""
        self.topology = topology
        self.situation = replace(self.situation, topology=topology, given=True)
        self.chooser = replace(self.chooser, table=())  # measured on the one before
        for cache in (self.compiled, self.launches, self.calls, self._schedules):
            cache.clear()
        self.memos.clear()

    def schedule(self, collective: str, choice: Choice, reverse: bool = False) -> Schedule:
        """The proved schedule of a choice."""
        key = (collective, choice, reverse)
        found = self._schedules.get(key)
        if found is None:
            found = plan(
                self.topology,
                collective,
                choice.algorithm,
                choice.rings,
                slices=choice.slices,
                reverse=reverse,
            )
            found.verify()
            self.planned += 1
            self._schedules.put(key, found)
        return found

    def proved(self, schedule: Schedule) -> Schedule:
        """A user's schedule, proved before its first run."""
        key = ("custom", schedule.fingerprint)
        if self._schedules.get(key) is None:
            schedule.verify()
            self.planned += 1
            self._schedules.put(key, schedule)
        return schedule

    def gpu(self, number: int) -> tuple[Device, Guard]:
        """This rank's GPU, and what guards it; the first array on one decides which it is."""
        if self._gpu is None:
            device = Device(number, self.stream)
            self._gpu = device, Guard(device, self.engine.timeout, self.engine.abandon)
        if self._gpu[0].number != number:
            raise ArgumentError(
                f"arrays must be on GPU {self._gpu[0].number}, where this communicator began, got one on GPU {number}"
            )
        return self._gpu

    @property
    def gpu_carrier(self) -> str | None:
        """Name of what links the GPUs, once it does."""
        links = self._gpu[0].links if self._gpu is not None else None
        return None if links is None else links.name

    def close(self) -> None:
        """Finish what is under way and free everything; after a failure everything stays as it is."""
        for stream in list(self.gpu_streams):
            stream.finish()
        try:
            closed = self.engine.close()
        finally:
            if self._gpu is not None:
                device, guard = self._gpu
                self.graphs.clear()  # before the links, which wait for them
                device.close(self.engine.broken)
                guard.close()
        if closed and not self.engine.broken:
            self.compiled.clear()
            self.launches.clear()
            self.calls.clear()
            self.memos.clear()
            self._schedules.clear()
            self.arena = Arena()
            self.rounds.close()
            self.transport.close()


class Shape(NamedTuple):
    """Rows along axis 0 and the shape of a row; a 0-d array is one row."""

    rows: int
    rest: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> Shape:
        """Split an array's shape."""
        return cls(shape[0], shape[1:]) if shape else cls(1, ())

    @property
    def row_elements(self) -> int:
        """Elements of a row."""
        return math.prod(self.rest)
