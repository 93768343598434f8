"""Every schedule as NCCL would run it, on a double of CuPy's module: proved to end, and carried out."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import cupy_double
from loopback_ranks import attempt
from nccl_double import SIGNATURES, Fabric, Group, Message, Nccl, Stuck, check_records, ranks_of
from tasp_coll import CollectiveError, MismatchError, PeerTimeoutError, Schedule, Topology, plan
from tasp_coll.agreement import Rounds
from tasp_coll.engine import Engine
from tasp_coll.errors import ScheduleError
from tasp_coll.executor import Builder, Node, Place, Program
from tasp_coll.launches import launches
from tasp_coll.linkup import LinkUp
from tasp_coll.programs import all_to_all_program, gather_program
from tasp_coll.reduce_programs import Arithmetic, reduce_program
from tasp_coll.reduction import reduction
from tasp_coll.slabs import gather_steps_program
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld
from tasp_coll.transport.nccl import NcclLinks, new_id

SPECS = [
    *(f"full_mesh:{n}" for n in range(1, 10)),
    "nvswitch:8",
    "torus:3x3",
    "hypercube:3",
    "cluster:2x4",
    "cluster:2x3",
]
STREAM = 7
FLAT = [(spec, algorithm) for spec in SPECS for algorithm in ("rings", "ring", "direct")]
CASES = [*FLAT, ("cluster:2x4", "hierarchical"), ("cluster:2x3", "hierarchical")]


def schedule_of(spec: str, collective: str, algorithm: str) -> Schedule:
    return plan(Topology.preset(spec), collective, algorithm)


def linked(fabric: Fabric, size: int, ids: str = "bytes") -> list[NcclLinks]:
    modules = list(ranks_of(fabric, size, ids))
    identity = new_id(modules[0])
    return [NcclLinks.join(module, [identity], rank, size) for rank, module in enumerate(modules)]


class Strand:
    """One stream, as launches take streams."""

    handles = (STREAM,)

    def meet(self) -> None:
        """Nobody to meet."""


class Memory:
    """One rank's regions, and the stream that its actions join."""

    def __init__(self, fabric: Fabric, rank: int, program: Program, **regions: np.ndarray[Any, Any]) -> None:
        self.regions = {**regions, "stage": np.zeros(max(program.stage_bytes, 1), np.uint8)}
        self._queue = fabric.streams[rank, STREAM]

    def address(self, place: Place) -> int:
        return int(self.regions[place.region].ctypes.data) + place.offset

    def act(self, action: Any) -> None:
        assert isinstance(action, Arithmetic)  # what a device can do too
        self._queue.append(lambda: action(self))  # type: ignore[arg-type]


def carry_out(fabric: Fabric, links: list[NcclLinks], programs: list[Program], memories: list[Memory]) -> None:
    for link, program, memory in zip(links, programs, memories, strict=True):
        link.launch(launches(program), memory.address, memory.act, Strand())
    check_records(fabric.records)
    fabric.run()


@pytest.mark.parametrize("spec, algorithm", CASES)
def test_allgather(spec: str, algorithm: str) -> None:
    schedule = schedule_of(spec, "allgather", algorithm)
    n = schedule.ranks
    random = np.random.default_rng(0)
    for sizes in ([200_003] * n, [17 * (rank % 3) for rank in range(n)]):
        fabric = Fabric()
        shards = [random.integers(0, 256, size, np.uint8) for size in sizes]
        programs = [gather_program(schedule, rank, sizes) for rank in range(n)]
        whole = np.concatenate(shards)
        results = [np.zeros_like(whole) for _ in range(n)]
        memories = [Memory(fabric, rank, programs[rank], send=shards[rank], recv=results[rank]) for rank in range(n)]
        carry_out(fabric, linked(fabric, n), programs, memories)
        for rank, result in enumerate(results):
            result[sum(sizes[:rank]) : sum(sizes[: rank + 1])] = shards[rank]  # the own shard is the caller's
            assert np.array_equal(result, whole)


@pytest.mark.parametrize("spec, algorithm", CASES)
@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_reduce_scatter(spec: str, algorithm: str, dtype: str) -> None:
    schedule = schedule_of(spec, "reduce_scatter", algorithm)
    n = schedule.ranks
    counts = [1000 + 7 * (rank % 2) for rank in range(n)]
    how = reduction("sum", dtype, n)
    fabric = Fabric()
    inputs = [(np.arange(sum(counts)) * (rank + 1) % 13).astype(dtype) for rank in range(n)]
    outputs = [np.zeros(count, dtype) for count in counts]
    programs = [reduce_program(schedule, rank, counts, how) for rank in range(n)]
    memories = [Memory(fabric, rank, programs[rank], send=inputs[rank], recv=outputs[rank]) for rank in range(n)]
    carry_out(fabric, linked(fabric, n), programs, memories)
    total = np.sum(inputs, axis=0)
    for rank, output in enumerate(outputs):
        assert np.array_equal(output, total[sum(counts[:rank]) : sum(counts[: rank + 1])])


@pytest.mark.parametrize("n", range(2, 10))
def test_all_to_all(n: int) -> None:
    schedule = plan(Topology.preset(f"full_mesh:{n}"), "all_to_all", "direct")
    block, fabric = 96, Fabric()
    sends = [np.random.default_rng(rank).integers(0, 256, (n, block), np.uint8) for rank in range(n)]
    recvs = [np.zeros((n, block), np.uint8) for _ in range(n)]
    programs = [all_to_all_program(schedule, rank, block) for rank in range(n)]
    memories = [Memory(fabric, rank, programs[rank], send=sends[rank], recv=recvs[rank]) for rank in range(n)]
    carry_out(fabric, linked(fabric, n), programs, memories)
    for rank in range(n):
        for origin in set(range(n)) - {rank}:
            assert np.array_equal(recvs[rank][origin], sends[origin][rank])


@pytest.mark.parametrize("n", range(2, 10))
def test_a_step_of_all_rings_is_one_group(n: int) -> None:
    schedule = schedule_of(f"full_mesh:{n}", "allgather", "rings")
    given = launches(gather_program(schedule, 0, [1 << 12] * n))
    assert [len(launch.messages) for launch in given] == [2 * len(schedule.rings)] * (n - 1)


@pytest.mark.parametrize("ids", ["bytes", "tuple"])
def test_the_ids_of_both_cupys(ids: str) -> None:
    links = linked(Fabric(), 3, ids)
    assert [link.rank for link in links] == [0, 1, 2]


def test_the_librarys_own_allgather() -> None:
    fabric = Fabric()
    sends, recvs = np.arange(3 * 8, dtype=np.uint8).reshape(3, 8), np.zeros((3, 24), np.uint8)
    for rank, link in enumerate(linked(fabric, 3)):
        link.allgather(sends[rank].ctypes.data, recvs[rank].ctypes.data, 8, STREAM)
    fabric.run()
    assert (recvs == np.arange(24)).all()


# --- what the proof finds


def group(rank: int, *messages: tuple[bool, int, int, int]) -> Group:
    return Group(rank, b"", tuple(Message(*message) for message in messages))


SEND, RECV = True, False
BAD: dict[str, tuple[dict[int, list[Group]], str]] = {
    "a send alone": ({0: [group(0, (SEND, 1, 0, 8))], 1: []}, "without its receive"),
    "two sizes": ({0: [group(0, (SEND, 1, 0, 8))], 1: [group(1, (RECV, 0, 0, 9))]}, "do not pair up"),
    "a circle": (
        {
            0: [group(0, (SEND, 1, 0, 8)), group(0, (RECV, 1, 8, 8))],
            1: [group(1, (SEND, 0, 0, 8)), group(1, (RECV, 0, 8, 8))],
        },
        "wait for themselves",
    ),
    "memory used twice": (
        {0: [group(0, (SEND, 1, 0, 8), (RECV, 1, 4, 8))], 1: [group(1, (RECV, 0, 0, 8), (SEND, 0, 8, 8))]},
        "uses elsewhere",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_the_proof_refuses(case: str) -> None:
    records, told = BAD[case]
    with pytest.raises(AssertionError, match=told):
        check_records(records)


def test_a_circle_is_stuck_when_carried_out() -> None:
    fabric = Fabric()
    for rank, groups in BAD["a circle"][0].items():
        fabric.streams[rank, STREAM].extend(groups)
    with pytest.raises(Stuck):
        fabric.run()


def test_a_message_that_needs_its_own_step_is_refused() -> None:
    builder = Builder()
    came = builder.add(Node(2, 1, 0, False, Place("recv", 0, 8)))
    builder.add(Node(2, 1, 3, True, Place("recv", 0, 8)), [came])
    with pytest.raises(ScheduleError, match="step 2, ring 3"):
        launches(builder.build())


def test_programs_that_wait_for_their_caller_name_gates_and_marks() -> None:
    schedule = plan(Topology.preset("full_mesh:5"))
    given = launches(gather_steps_program(schedule, 0, [9] * 5, 4))
    assert [launch.step for launch in given] == [0, 1, 2, 3]
    assert [launch.gates for launch in given] == [(), (), (("release", 1),), (("release", 2),)]
    assert [launch.marks for launch in given] == [(("arrived", step),) for step in range(1, 5)]


# --- errors and ends


def test_an_asynchronous_error_aborts_and_stays() -> None:
    fabric = Fabric()
    (link,) = linked(fabric, 1)
    fabric.failed = "NCCL_ERROR_REMOTE_ERROR: remote process exited"
    for _ in range(2):
        with pytest.raises(CollectiveError, match="remote process exited"):
            link.launch((), lambda place: 0, lambda action: None, Strand())
    link.close()
    assert link._comms[0].state == "aborted"


def test_closing_twice_and_use_after_it() -> None:
    (link,) = linked(Fabric(), 1)
    link.close()
    link.close()
    assert link._comms[0].state == "destroyed"
    with pytest.raises(CollectiveError, match="closed"):
        link.check()


def test_a_group_that_fails_half_way_is_ended() -> None:
    fabric = Fabric()
    link = linked(fabric, 2)[0]
    with pytest.raises(AssertionError):
        link.greet([(SEND, 1, 0, 8), (SEND, 5, 0, 8)], STREAM)
    link._nccl.groupStart()  # not inside of another


# --- linking up


class FakeGpu:
    def __init__(self, fabric: Fabric, name: str, delay: float = 0.0) -> None:
        self._fabric, self._name, self._delay = fabric, name, delay

    def identity(self) -> str:
        return self._name

    def exclusive(self, job: Callable[[], NcclLinks]) -> NcclLinks:
        time.sleep(self._delay)
        return job()

    def greet(self, links: NcclLinks) -> Callable[[], bool]:
        peers = [peer for peer in range(links.size) if peer != links.rank]
        memory = np.zeros(2 * links.size, np.uint8)
        at = int(memory.ctypes.data)
        links.greet(
            [op for peer in peers for op in ((SEND, peer, at + peer, 1), (RECV, peer, at + links.size + peer, 1))], 1
        )
        return lambda: memory is not None


def link_up(size: int, gpus: Callable[[Fabric, int], Any], modules: Callable[[Fabric, int], Any]) -> list[Any]:
    fabric = Fabric()

    def body(transport: LoopbackTransport) -> Any:
        engine, rounds = Engine(transport, 0.4), Rounds(transport)
        rank = transport.rank
        linking = LinkUp(rounds, gpus(fabric, rank), "nccl", 0.4, lambda: given(modules(fabric, rank)))
        return attempt(lambda: found.append(engine.run(linking)))

    def given(module: Any) -> Any:
        if isinstance(module, CollectiveError):
            raise module
        return module

    found: list[NcclLinks] = []
    errors = LoopbackWorld(size).run(body)
    return [*errors, found, fabric]


def test_ranks_link_up_and_warm_every_edge() -> None:
    *errors, found, fabric = link_up(3, lambda fabric, rank: FakeGpu(fabric, f"gpu {rank}"), lambda f, rank: Nccl(f))
    assert errors == [None] * 3
    assert len(found) == 3
    check_records(fabric.records)
    edges = {(rank, message.peer) for rank, groups in fabric.records.items() for message in groups[0].messages}
    assert edges == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_a_rank_without_nccl_is_an_error_on_all() -> None:
    missing = CollectiveError("no CuPy")
    *errors, _, _ = link_up(3, lambda f, rank: FakeGpu(f, f"{rank}"), lambda f, rank: missing if rank == 1 else Nccl(f))
    assert all(isinstance(error, MismatchError) and error.ranks == (1,) for error in errors[:3])


def test_two_ranks_on_one_gpu_are_an_error_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_HOSTID", raising=False)
    *errors, _, _ = link_up(3, lambda f, rank: FakeGpu(f, f"{rank // 2}"), lambda f, rank: Nccl(f))
    assert all("ranks 0 and 1 both use 0" in str(error) for error in errors[:3])


def test_a_rank_that_does_not_join_ends_the_wait() -> None:
    """NCCL blocks where it is: the wait ends, and names the one that is late."""

    def slow(fabric: Fabric, rank: int) -> FakeGpu:
        return FakeGpu(fabric, f"{rank}", 1.5 if rank == 2 else 0.0)

    class Late(FakeGpu):
        def greet(self, links: NcclLinks) -> Callable[[], bool]:
            return lambda: False

    *errors, _, _ = link_up(2, lambda f, rank: Late(f, f"{rank}"), lambda f, rank: Nccl(f))
    assert all(isinstance(error, PeerTimeoutError) and "first bytes" in str(error) for error in errors[:2])
    *errors, _, _ = link_up(3, slow, lambda f, rank: Nccl(f))
    assert isinstance(errors[2], PeerTimeoutError)
    assert "joining NCCL" in str(errors[2])


# --- the real module


def test_the_double_has_the_real_modules_signatures() -> None:
    try:
        real = importlib.import_module("cupy.cuda.nccl")
    except ImportError as error:
        pytest.skip(f"CuPy or its NCCL is not installed here ({error}): pip install -e '.[cuda12]'")
    for name, signature in SIGNATURES.items():
        owner, _, method = name.rpartition(".")
        mine = getattr(Nccl, name) if not owner and hasattr(Nccl, name) else None
        thing = getattr(getattr(real, owner), method) if owner else getattr(real, name)
        told = (thing.__doc__ or "").splitlines()[0]
        assert told in (f"{name}({signature})", f"{name}({signature.removeprefix('self, ')})"), told
        if mine is not None:
            assert len(inspect.signature(mine).parameters) == 1
    assert isinstance(real.NCCL_UINT8, int)
    assert issubclass(real.NcclError, Exception)
    assert len(new_id(real)) == 128


@pytest.mark.parametrize("name", cupy_double.SIGNATURES)
def test_the_double_of_cupy_has_the_real_modules_signatures(name: str) -> None:
    try:
        thing: Any = importlib.import_module("cupy").cuda
    except ImportError as error:
        pytest.skip(f"CuPy is not installed here ({error}): pip install -e '.[cuda12]'")
    for part in name.split("."):
        thing = getattr(thing, part)
    assert thing.__doc__.strip().splitlines()[0] == cupy_double.SIGNATURES[name]
