"""Plan once: a call like one before makes no plan, prepares no messages and takes no memory but its result's."""

from __future__ import annotations

import gc
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loopback_ranks import on_ranks
from own_schedules import trees
from recording import RecordingTransport, RecordingWorld
from tasp_coll import CollectiveError, Communicator
from tasp_coll.transport.loopback import LoopbackWorld

N = 3
Call = Callable[[Communicator, Any, Any], Any]
CALLS: dict[str, tuple[Call, int, int]] = {  # call, and rows of send and recv for each rank
    "allgather": (lambda comm, s, r: comm.decomposed_allgather(s, r, algorithm="rings"), 1, N),
    "allgatherv": (lambda comm, s, r: comm.decomposed_allgatherv(s, r, algorithm="ring"), 1, N),
    "reduce_scatter": (lambda comm, s, r: comm.decomposed_reduce_scatter(s, r, algorithm="rings"), N, 1),
    "allreduce": (lambda comm, s, r: comm.decomposed_allreduce(s, r, algorithm="rings"), N, N),
    "direct allreduce": (lambda comm, s, r: comm.decomposed_allreduce(s, r, algorithm="direct"), N, N),
    "all_to_all": (lambda comm, s, r: comm.all_to_all(s, r), N, N),
    "small": (lambda comm, s, r: comm.decomposed_allreduce(s[:64], None if r is None else r[:64]), N, N),
}
calls = pytest.mark.parametrize("name", list(CALLS))


def recorded(body: Callable[[Communicator, RecordingTransport], None]) -> None:
    def one(transport: Any) -> BaseException | None:
        try:
            with Communicator(transport, timeout=20) as comm:
                body(comm, transport)
        except BaseException as error:
            transport.alarm()
            return error
        return None

    for error in RecordingWorld(N).run(one):
        if error is not None:
            raise error


def arrays(name: str, rows: int) -> tuple[Any, Any]:
    _, sends, receives = CALLS[name]
    return np.ones(sends * rows, np.float32), np.empty(receives * rows, np.float32)


@calls
def test_a_second_call_plans_and_prepares_nothing(name: str) -> None:
    call = CALLS[name][0]

    def body(comm: Communicator, transport: RecordingTransport) -> None:
        send, recv = arrays(name, 5000)
        call(comm, send, recv)
        planned, prepared = comm._core.planned, transport.prepared
        assert planned or name == "small"
        for _ in range(3):
            call(comm, send, recv)
        assert (comm._core.planned, transport.prepared) == (planned, prepared)
        call(comm, *arrays(name, 5000))  # elsewhere in memory: other messages, the same plan
        assert comm._core.planned == planned

    recorded(body)


def test_a_few_addresses_in_turn_prepare_nothing() -> None:
    """Double buffering, say."""

    def body(comm: Communicator, transport: RecordingTransport) -> None:
        pairs = [arrays("allgather", 5000) for _ in range(4)]
        for send, recv in pairs:
            comm.decomposed_allgather(send, recv, algorithm="rings")
        prepared = transport.prepared
        for send, recv in 3 * pairs:
            comm.decomposed_allgather(send, recv, algorithm="rings")
        assert transport.prepared == prepared

    recorded(body)


def test_async_operations_and_streams_use_the_same_plans() -> None:
    def body(comm: Communicator, transport: RecordingTransport) -> None:
        send, recv = arrays("allgather", 5000)

        def turn() -> tuple[int, int]:
            comm.decomposed_allgather(send, recv, algorithm="rings", async_op=True).wait()
            for _arrival in comm.allgather_steps(send):
                pass
            for _request in comm.reduce_scatter_steps(recv):
                pass
            return comm._core.planned, transport.prepared

        assert turn() == turn()

    recorded(body)


def test_a_users_schedule_is_proved_once() -> None:
    def body(comm: Communicator, transport: RecordingTransport) -> None:
        send, recv = arrays("allreduce", 5000)
        comm.decomposed_allreduce(send, recv, algorithm=trees(comm.topology, "allreduce"))
        planned, prepared = comm._core.planned, transport.prepared
        comm.decomposed_allreduce(send, recv, algorithm=trees(comm.topology, "allreduce"))  # an equal one
        assert (comm._core.planned, transport.prepared) == (planned, prepared)

    recorded(body)


@pytest.mark.parametrize("with_recv", [True, False])
@calls
def test_a_call_takes_no_memory_but_its_results(name: str, with_recv: bool) -> None:
    """Peak over all ranks, which share this process."""
    call, _, receives = CALLS[name]
    rows = 100_000
    result = 0 if with_recv else (64 if name == "small" else receives * rows) * 4
    barrier = threading.Barrier(N)
    peaks: list[int] = []

    def body(comm: Communicator) -> None:
        send, recv = arrays(name, rows)
        if not with_recv:
            recv = None
        for _ in range(3):
            call(comm, send, recv)
        if barrier.wait() == 0:
            gc.collect()
            tracemalloc.start()
        barrier.wait()
        found = call(comm, send, recv)
        if barrier.wait() == 0:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert found is not None

    on_ranks(N, body)
    assert peaks[0] < N * (result + 32_000)


def test_no_array_is_kept_alive() -> None:
    """Not by cycles either, until the collector comes."""

    def body(comm: Communicator) -> None:
        for name, (call, _, _) in CALLS.items():
            for give in (True, False):
                send, recv = arrays(name, 5000)
                for _ in range(3):
                    found = call(comm, send, recv if give else None)
                watched = [weakref.ref(array) for array in (send, recv, found) if array.base is None]
                del send, recv, found
                assert not any(ref() is not None for ref in watched)

    gc.disable()
    try:
        on_ranks(N, body)
    finally:
        gc.enable()


def test_repeated_calls_see_what_the_arrays_hold_now() -> None:
    """The same objects, with other contents, another shape or type, or another array at the same place."""

    def body(comm: Communicator) -> None:
        send = np.zeros(6)
        for turn in range(4):
            send[:] = comm.rank + turn
            assert (comm.decomposed_allreduce(send) == sum(range(N)) + N * turn).all()
        assert comm.decomposed_allgather(send).shape == (18,)
        send.shape = (2, 3)
        assert comm.decomposed_allgather(send).shape == (6, 3)
        setattr(send, "dtype", np.int64)  # noqa: B010
        assert comm.decomposed_allgather(send).dtype == np.int64
        assert comm.decomposed_allreduce(send, op="max").dtype == np.int64
        for turn in range(30):
            fresh = np.full(5 + turn % 2, comm.rank)  # often at the address, and with the id, of the last
            assert comm.decomposed_allgather(fresh).tolist() == np.repeat(range(N), 5 + turn % 2).tolist()

    on_ranks(N, body)


def test_results_are_fresh_each_time() -> None:
    def body(comm: Communicator) -> None:
        send = np.array([comm.rank])
        results = [comm.decomposed_allgather(send) for _ in range(3)]
        results[0][:] = -1
        assert [result.tolist() for result in results[1:]] == 2 * [list(range(N))]

    on_ranks(N, body)


def test_caches_are_bounded() -> None:
    """Hundreds of shapes: what is kept does not grow, and what leaves is freed."""

    def body(comm: Communicator, transport: RecordingTransport) -> None:
        core, held = comm._core, []
        for turn in range(150):
            for name in ("allgather", "allreduce"):
                CALLS[name][0](comm, *arrays(name, 100 + turn))
            held.append(transport.held)
        assert transport.prepared >= 300
        assert held[-1] == held[-50] <= 200
        assert len(core.calls) <= 256
        assert len(core.compiled) <= 64

    recorded(body)


def test_many_addresses_are_bounded_too() -> None:
    def body(comm: Communicator, transport: RecordingTransport) -> None:
        keep = [arrays("allgather", 5000) for _ in range(40)]
        for send, recv in keep:
            comm.decomposed_allgather(send, recv, algorithm="ring")
        assert transport.held <= 16

    recorded(body)


def test_close_frees_everything() -> None:
    def body(comm: Communicator, transport: RecordingTransport) -> None:
        for name, (call, _, _) in CALLS.items():
            call(comm, *arrays(name, 5000))
        for _arrival in comm.allgather_steps(np.zeros(100)):
            pass
        assert transport.held
        comm.close()
        assert transport.held == 0
        assert len(comm._core.compiled) == len(comm._core.calls) == 0
        comm.close()

    recorded(body)


def test_use_after_close() -> None:
    def body(comm: Communicator) -> None:
        comm.close()
        assert not comm.usable
        x = np.zeros(N)
        for call in (
            comm.decomposed_allgather,
            comm.decomposed_allgatherv,
            comm.decomposed_reduce_scatter,
            comm.decomposed_allreduce,
            comm.all_to_all,
            comm.allgather_steps,
            comm.reduce_scatter_steps,
            lambda x: comm.decomposed_allgather(x, async_op=True),
        ):
            with pytest.raises(CollectiveError, match="closed"):
                call(x)
        assert (comm.rank, comm.size, comm.topology.ranks) == (comm.rank, N, N)

    on_ranks(N, body)


def test_a_new_communicator_on_the_same_transport() -> None:
    def one(transport: Any) -> list[Any]:
        found = []
        for turn in range(3):
            with Communicator(transport, timeout=20) as comm:
                found.append(comm.decomposed_allgather(np.array([comm.rank + turn]), algorithm="rings").tolist())
        return found

    assert LoopbackWorld(N).run(one) == [[[0, 1, 2], [1, 2, 3], [2, 3, 4]]] * N
