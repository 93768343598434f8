"""Arrays on GPUs by CUDA IPC: every schedule carried out, and no use of memory left to chance; ranks are threads."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

import cupy_double
import ipc_double
from cupy_double import Device, Runtime
from ipc_double import SIGNATURES, Ipc, Library, Race, Watch
from nccl_double import Fabric, Stuck
from tasp_coll import CollectiveError, PeerTimeoutError, ScheduleError, plan
from tasp_coll.executor import Node, Place, Program
from tasp_coll.launches import Launch, launches
from tasp_coll.programs import all_to_all_program, gather_program
from tasp_coll.reduce_programs import Arithmetic, reduce_program
from tasp_coll.reduction import reduction
from tasp_coll.topology import Topology
from tasp_coll.transport.ipc import EMPTY, FULL, IpcLinks
from tasp_coll.transport.ipc_plan import SLOTS
from tasp_coll.transport.shared import Shared
from tasp_coll.transport.stream_memory import StreamMemory, waits
from test_nccl_double import CASES, schedule_of

STREAM = 7
SLOT_BYTES = 4096  # so that messages take several rounds


class Alone:
    """One stream."""

    handles = (STREAM,)

    def meet(self) -> None:
        """It does not meet anyone."""


class World:
    """The links of n ranks, each with a GPU of its own."""

    def __init__(self, size: int, timeout: float = 20.0) -> None:
        self.size, self.fabric = size, Fabric()
        self.cupy, _ = cupy_double.modules(self.fabric)
        self.ipc: Ipc = ipc_double.attach(self.cupy, self.fabric)
        path = Shared.create(size, SLOTS, EMPTY)
        self.shared = [Shared(path, rank, size, SLOTS) for rank in range(size)]
        os.unlink(path)
        driver = StreamMemory(Library(self.ipc))
        self.links = self.on_ranks(
            lambda rank: IpcLinks.join(self.cupy, driver, self.shared[rank], timeout, SLOT_BYTES)
        )

    def on_ranks(self, body: Callable[[int], Any]) -> list[Any]:
        """body(rank) on all ranks at the same time."""
        Runtime.fabric = self.fabric

        def one(rank: int) -> Any:
            with Device(rank):
                return body(rank)

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(one, range(self.size)))

    def carry_out(self, programs: list[Program], regions: list[dict[str, np.ndarray[Any, Any]]]) -> None:
        """In small worlds twice, as a second call finds what the first one left behind."""
        memories = [Memory(self, rank, programs[rank], regions[rank]) for rank in range(self.size)]

        def body(rank: int) -> None:
            prepared = self.links[rank].prepare(launches(programs[rank]))
            for _ in range(2 if self.size < 6 else 1):
                self.links[rank].launch(prepared, memories[rank].address, memories[rank].act, Alone())

        self.on_ranks(body)
        self.fabric.run()
        self.ipc.watch.uses.clear()


class Memory:
    """One rank's regions, and the stream that its actions join."""

    def __init__(self, world: World, rank: int, program: Program, regions: dict[str, np.ndarray[Any, Any]]) -> None:
        self.regions = {**regions, "stage": np.zeros(max(program.stage_bytes, 1), np.uint8)}
        self._world, self._rank = world, rank

    def address(self, place: Place) -> int:
        return int(self.regions[place.region].ctypes.data) + place.offset

    def act(self, action: Any) -> None:
        assert isinstance(action, Arithmetic)
        key, watch = self._world.ipc.key(STREAM), self._world.ipc.watch

        def run() -> None:
            for place, write in ((action.source, False), (action.target, True)):
                watch.use(self._world.fabric.running, self.address(place), place.nbytes, write)
            action(self)  # type: ignore[arg-type]

        self._world.ipc.give(key, run)


@lru_cache(maxsize=1)
def world_of(size: int) -> World:
    return World(size)


def by_size(cases: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(cases, key=lambda case: Topology.preset(case[0]).ranks)


def gathered(world: World, spec: str, algorithm: str, serial: bool = False) -> None:
    """serial: all streams of a GPU are carried out as one, in the order in which it is given things."""
    world.ipc.serial = serial
    schedule = schedule_of(spec, "allgather", algorithm)
    n = schedule.ranks
    random = np.random.default_rng(0)
    for sizes in [[9_001] * n, [1700 * (rank % 3) for rank in range(n)]][: 1 if serial else 2]:
        shards = [random.integers(0, 256, size, np.uint8) for size in sizes]
        whole = np.concatenate(shards)
        results = [np.zeros_like(whole) for _ in range(n)]
        programs = [gather_program(schedule, rank, sizes) for rank in range(n)]
        world.carry_out(programs, [{"send": shards[rank], "recv": results[rank]} for rank in range(n)])
        for rank, result in enumerate(results):
            result[sum(sizes[:rank]) : sum(sizes[: rank + 1])] = shards[rank]  # the own shard is the caller's
            assert np.array_equal(result, whole)


@pytest.mark.parametrize("spec, algorithm", by_size(CASES))
def test_allgather(spec: str, algorithm: str) -> None:
    gathered(world_of(Topology.preset(spec).ranks), spec, algorithm)


@pytest.mark.parametrize("n", range(2, 10))
@pytest.mark.parametrize("algorithm", ["rings", "direct"])
def test_streams_that_the_gpu_carries_out_one_after_another(n: int, algorithm: str) -> None:
    gathered(world_of(n), f"full_mesh:{n}", algorithm, serial=True)


@pytest.mark.parametrize("spec, algorithm", by_size(CASES))
def test_reduce_scatter(spec: str, algorithm: str) -> None:
    schedule = schedule_of(spec, "reduce_scatter", algorithm)
    n = schedule.ranks
    world = world_of(n)
    world.ipc.serial = False
    counts = [1000 + 7 * (rank % 2) for rank in range(n)]
    how = reduction("sum", "float16", n)
    inputs = [(np.arange(sum(counts)) * (rank + 1) % 13).astype(np.float16) for rank in range(n)]
    outputs = [np.zeros(count, np.float16) for count in counts]
    programs = [reduce_program(schedule, rank, counts, how) for rank in range(n)]
    world.carry_out(programs, [{"send": inputs[rank], "recv": outputs[rank]} for rank in range(n)])
    total = np.sum(inputs, axis=0)
    for rank, output in enumerate(outputs):
        assert np.array_equal(output, total[sum(counts[:rank]) : sum(counts[: rank + 1])])


@pytest.mark.parametrize("n", range(2, 10))
def test_all_to_all(n: int) -> None:
    schedule = plan(Topology.preset(f"full_mesh:{n}"), "all_to_all", "direct")
    block, world = 4000, world_of(n)
    world.ipc.serial = False
    sends = [np.random.default_rng(rank).integers(0, 256, (n, block), np.uint8) for rank in range(n)]
    recvs = [np.zeros((n, block), np.uint8) for _ in range(n)]
    programs = [all_to_all_program(schedule, rank, block) for rank in range(n)]
    world.carry_out(programs, [{"send": sends[rank], "recv": recvs[rank]} for rank in range(n)])
    for rank in range(n):
        for origin in set(range(n)) - {rank}:
            assert np.array_equal(recvs[rank][origin], sends[origin][rank])


def test_what_goes_to_several_peers_is_laid_down_once() -> None:
    world = world_of(4)
    programs = [
        gather_program(schedule_of("full_mesh:4", "allgather", "direct"), rank, [9000] * 4) for rank in range(4)
    ]
    prepared = world.on_ranks(lambda rank: world.links[rank].prepare(launches(programs[rank])))
    laid = [place.nbytes for launch in prepared[0] for laying in launch.rounds for place, _ in laying.copies]
    fetched = [place.nbytes for launch in prepared[0] for each in launch.fetches for f in each for place, _ in f.copies]
    assert sum(laid) == 9000
    assert sum(fetched) == 3 * 9000


# --- what the watch finds


@pytest.mark.parametrize("missing", ["_until_empty", "_until_full", "_joins"])
def test_a_missing_wait_is_found(missing: str) -> None:
    world = World(3)
    for links in world.links:
        kept: Any = getattr(links, missing)
        if missing == "_joins":
            links._joins = dict.fromkeys(kept, links._event())
            links._runtime = Unjoined(links._runtime, links._joins)
        else:
            setattr(
                links,
                missing,
                {key: waits([], 0) for key in kept} if isinstance(kept, dict) else [waits([], 0)] * SLOTS,
            )
    with pytest.raises((Race, Stuck)):
        gathered(world, "full_mesh:3", "ring")


class Unjoined:
    """A runtime whose streams do not wait for these events."""

    def __init__(self, runtime: Any, joins: dict[int, Any]) -> None:
        self._runtime, self._joins = runtime, {event.ptr for event in joins.values()}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._runtime, name)

    def streamWaitEvent(self, stream: int, event: int) -> None:
        if event not in self._joins:
            self._runtime.streamWaitEvent(stream, event)


def test_a_rank_that_does_not_come_leaves_the_others_waiting() -> None:
    world = World(3)
    program = [gather_program(schedule_of("full_mesh:3", "allgather", "ring"), rank, [99] * 3) for rank in range(3)]
    memories = [
        Memory(world, rank, program[rank], {"send": np.zeros(99, np.uint8), "recv": np.zeros(3 * 99, np.uint8)})
        for rank in range(3)
    ]

    def body(rank: int) -> None:
        prepared = world.links[rank].prepare(launches(program[rank]))
        if rank != 2:
            world.links[rank].launch(prepared, memories[rank].address, memories[rank].act, Alone())

    world.on_ranks(body)
    with pytest.raises(Stuck):
        world.fabric.run()
    world.ipc.watch = Blind()
    world.links[1].abort("rank 2 does not come")
    with pytest.raises(CollectiveError, match="rank 1 gave up"):
        world.links[0].check()
    world.links[2].abort("nor does it go on")
    for _ in range(1000):  # streams that are freed run through
        world.fabric.pump()
        if not any(world.fabric.streams.values()):
            break
        threading.Event().wait(0.005)
    assert not any(world.fabric.streams.values())
    with pytest.raises(CollectiveError, match="rank 2 does not come"):
        world.links[1].launch((), lambda place: 0, lambda action: None, Alone())


class Blind(Watch):
    """What is received after a failure is undefined."""

    def use(self, key: tuple[int, int], start: int, nbytes: int, write: bool) -> None:
        pass


# --- planning, joining and closing


def test_sends_that_nobody_receives_are_refused() -> None:
    world = World(2)
    place = Place("send", 0, 8)
    sends = [(Launch(0, (), (Node(0, 1, 0, True, place),)),), ()]

    def body(rank: int) -> str:
        with pytest.raises(ScheduleError) as raised:
            world.links[rank].prepare(sends[rank])
        return str(raised.value)

    with ThreadPoolExecutor(1) as alone:
        told = alone.submit(
            lambda: world.on_ranks(lambda rank: body(rank) if rank else world.links[0].prepare(sends[0]))
        )
        assert "rank 0 sends to rank 1 what that does not receive" in told.result()[1]
    assert world.links[1].broken


def test_a_rank_that_cannot_open_memory_is_an_error_on_all() -> None:
    fabric = Fabric()
    cupy, _ = cupy_double.modules(fabric)
    ipc = ipc_double.attach(cupy, fabric)

    def refused(handle: bytes, flags: int = 1) -> int:
        if Runtime.here().number == 1:
            raise RuntimeError("cudaErrorPeerAccessUnsupported: peer access is not supported")
        return ipc.ipcOpenMemHandle(handle)

    cupy.cuda.runtime.ipcOpenMemHandle = refused
    path = Shared.create(2, SLOTS, EMPTY)

    def body(rank: int) -> str:
        with Device(rank), pytest.raises(CollectiveError) as raised:
            IpcLinks.join(cupy, StreamMemory(Library(ipc)), Shared(path, rank, 2, SLOTS), 5.0)
        return str(raised.value)

    with ThreadPoolExecutor(2) as pool:
        for told in pool.map(body, range(2)):
            assert "rank 1: cudaErrorPeerAccessUnsupported" in told
    os.unlink(path)


def test_closing_gives_everything_back() -> None:
    world = World(3)
    gathered(world, "full_mesh:3", "rings")
    world.on_ranks(lambda rank: world.links[rank].close())
    assert not world.ipc.memory
    assert not world.ipc.opened
    assert not world.ipc.registered
    with pytest.raises(CollectiveError, match="closed"):
        world.links[0].check()


def test_what_is_not_taken_yet_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasp_coll.transport.ipc._TAKEN_SECONDS", 0.01)
    world = World(2)
    world.shared[0].flags[0, 0, 1] = FULL
    world.on_ranks(lambda rank: world.links[rank].close())
    assert list(world.ipc.memory) == [world.links[0]._outbox]


# --- shared memory


def test_a_letter_that_does_not_come_names_its_writer() -> None:
    path = Shared.create(3, SLOTS, EMPTY)
    shared = [Shared(path, rank, 3, SLOTS) for rank in range(3)]
    os.unlink(path)
    with (
        ThreadPoolExecutor(2) as pool,
        pytest.raises(PeerTimeoutError, match="planning: no answer from rank 2") as raised,
    ):
        list(pool.map(lambda rank: shared[rank].exchange(b"here", 0.2, "planning"), (0, 1)))
    assert raised.value.peers == (2,)


def test_a_process_that_ends_is_noticed() -> None:
    path = Shared.create(2, SLOTS, EMPTY)
    shared = Shared(path, 0, 2, SLOTS)
    os.unlink(path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(writing)
        os.read(reading, 1)
        os._exit(0)
    shared.watch([os.getpid(), child])
    assert shared.trouble() is None
    os.close(writing)
    os.waitpid(child, 0)
    assert shared.trouble() == "the process of rank 1 has ended"
    shared.close()
    os.close(reading)


# --- the real modules


def test_the_double_has_the_real_modules_signatures() -> None:
    try:
        real: Any = importlib.import_module("cupy.cuda.runtime")
    except ImportError as error:
        pytest.skip(f"CuPy is not installed here ({error}): pip install -e '.[cuda12]'")
    for name, signature in SIGNATURES.items():
        told = (getattr(real, name).__doc__ or "").splitlines()[0].partition(" -> ")[0]
        assert told == f"{name}({signature})"
    assert (real.hostAllocPortable, real.hostAllocMapped, real.memcpyDefault) == (1, 2, 4)


def test_operations_as_the_driver_reads_them() -> None:
    """`CUstreamBatchMemOpParams` of cuda.h: 48 bytes, each field at its offset."""
    (words,) = waits([0x1234], FULL).memory.view(np.uint32)
    assert len(words) * 4 == 48
    assert (words[0], words[2], words[4], words[6]) == (1, 0x1234, FULL, 2)
