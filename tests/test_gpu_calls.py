"""Collectives of arrays on GPUs, from the call to NCCL's groups, on doubles of CuPy and its NCCL; ranks are threads."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

import ipc_double
from cupy_double import Device, Runtime, install
from loopback_ranks import attempt, on_ranks
from nccl_double import Fabric, check_records
from tasp_coll import ArgumentError, ArgumentTypeError, CollectiveError, Communicator, MismatchError, PeerTimeoutError

N = 4
Array = np.ndarray[Any, Any]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    monkeypatch.delenv("TASP_COLL_GPU_TRANSPORT", raising=False)
    return install(monkeypatch)


@pytest.fixture
def ipc(monkeypatch: pytest.MonkeyPatch) -> ipc_double.Ipc:
    """Arrays on GPUs travel by CUDA IPC."""
    monkeypatch.setenv("TASP_COLL_GPU_TRANSPORT", "ipc")
    return ipc_double.install(monkeypatch)


def on_gpu(comm: Communicator, values: Array, number: int | None = None) -> Any:
    """A copy on this rank's GPU."""
    with Device(comm.rank if number is None else number):
        made = sys.modules["cupy"].empty(values.shape, values.dtype)
    made[...] = values
    return made


def settled(comm: Communicator) -> None:
    """What a user does before reading on the host."""
    Device(comm.rank).synchronize()


def shard(rank: int, rows: int = 3000, dtype: Any = np.float32) -> Array:
    return (np.arange(rows * 2).reshape(rows, 2) % 97 + rank).astype(dtype)


@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct", "native"])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
def test_allgather(fabric: Fabric, n: int, algorithm: str) -> None:
    def body(comm: Communicator) -> None:
        expected = np.concatenate([shard(rank) for rank in range(n)])
        send = on_gpu(comm, shard(comm.rank))
        for _ in range(2):
            out = comm.decomposed_allgather(send, algorithm=algorithm)
            settled(comm)
            assert type(out) is sys.modules["cupy"].ndarray
            assert np.array_equal(out, expected)
        whole = on_gpu(comm, np.zeros_like(expected))
        place = whole[comm.rank * 3000 : (comm.rank + 1) * 3000]
        place[...] = send
        assert comm.decomposed_allgather(place, whole, algorithm=algorithm) is whole
        settled(comm)
        assert np.array_equal(whole, expected)

    on_ranks(n, body)
    check_records(fabric.records)


def test_ranks_that_read_each_others_host_memory_do_not_read_that_of_gpus(fabric: Fabric) -> None:
    def body(comm: Communicator) -> None:
        comm._core.peer_memory = object()  # type: ignore[assignment]
        for _ in range(2):
            out = comm.decomposed_allgather(on_gpu(comm, shard(comm.rank)), algorithm="direct")
            settled(comm)
            assert np.array_equal(out, np.concatenate([shard(rank) for rank in range(N)]))

    on_ranks(N, body)
    check_records(fabric.records)


@pytest.mark.parametrize("algorithm", ["auto", "rings", "direct"])
def test_allgatherv_and_all_to_all(fabric: Fabric, algorithm: str) -> None:
    def body(comm: Communicator) -> None:
        rows = [100 * rank for rank in range(N)]
        out = comm.decomposed_allgatherv(on_gpu(comm, shard(comm.rank, rows[comm.rank])), algorithm=algorithm)
        swapped = comm.all_to_all(on_gpu(comm, shard(comm.rank, 8 * N)))
        settled(comm)
        assert np.array_equal(out, np.concatenate([shard(rank, count) for rank, count in enumerate(rows)]))
        parts = [shard(rank, 8 * N)[8 * comm.rank : 8 * comm.rank + 8] for rank in range(N)]
        assert np.array_equal(swapped, np.concatenate(parts))

    on_ranks(N, body)
    check_records(fabric.records)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
@pytest.mark.parametrize("algorithm", ["auto", "rings", "ring", "direct"])
def test_reductions(fabric: Fabric, algorithm: str, dtype: str) -> None:
    def body(comm: Communicator) -> None:
        total = sum(shard(rank, 40 * N, dtype) for rank in range(N))
        send = on_gpu(comm, shard(comm.rank, 40 * N, dtype))
        part = comm.decomposed_reduce_scatter(send, algorithm=algorithm)
        whole = comm.decomposed_allreduce(send, algorithm=algorithm)
        comm.decomposed_allreduce(send, send, algorithm=algorithm)
        settled(comm)
        assert np.array_equal(part, total[comm.rank * 40 : (comm.rank + 1) * 40])
        assert np.array_equal(whole, total)
        assert np.array_equal(send, total)

    on_ranks(N, body)
    check_records(fabric.records)


def test_host_and_gpu_in_one_program(fabric: Fabric) -> None:
    def body(comm: Communicator) -> None:
        here = comm.decomposed_allgather(shard(comm.rank))
        there = comm.decomposed_allgather(on_gpu(comm, shard(comm.rank)))
        settled(comm)
        assert type(here) is np.ndarray
        assert np.array_equal(here, there)

    on_ranks(N, body)


def test_nothing_is_planned_twice(fabric: Fabric) -> None:
    def body(comm: Communicator) -> None:
        send = on_gpu(comm, shard(comm.rank))
        comm.decomposed_allgather(send)
        before = comm._core.planned
        for _ in range(3):
            comm.decomposed_allgather(send)
        assert comm._core.planned == before

    on_ranks(N, body)


def test_beside_the_callers_stream(fabric: Fabric) -> None:
    """What the caller gives to its stream meanwhile does not wait for it; what comes after `wait` does."""

    def body(comm: Communicator) -> None:
        send = on_gpu(comm, shard(comm.rank))
        work = comm.decomposed_allgather(send, algorithm="rings", async_op=True)
        out = work.wait()
        stream = Runtime.local.stream
        event = sys.modules["cupy"].cuda.Event()
        event.record(stream)
        while not event.done:
            time.sleep(1e-3)
        assert np.array_equal(out, np.concatenate([shard(rank) for rank in range(N)]))

    on_ranks(N, body)
    streams = {key[1] for key, _ in fabric.streams.items() if key[0] == 0}
    assert len(streams) >= 2


def test_on_a_stream_that_was_given(fabric: Fabric) -> None:
    class Wanted:
        cuda_stream = 4711

    def body(comm: Communicator) -> None:
        out = comm.decomposed_allgather(on_gpu(comm, shard(comm.rank)), algorithm="ring")
        settled(comm)
        assert np.array_equal(out, np.concatenate([shard(rank) for rank in range(N)]))

    on_ranks(N, body, stream=Wanted())
    assert {(rank, 4711) for rank in range(N)} <= set(fabric.streams)


def test_what_is_no_stream(fabric: Fabric) -> None:
    with pytest.raises(ArgumentTypeError, match="stream must be a CUDA stream"):
        on_ranks(2, lambda comm: None, stream="0")


def test_a_strided_array_is_packed(fabric: Fabric) -> None:
    def body(comm: Communicator) -> None:
        send = on_gpu(comm, shard(comm.rank, 64))[::2]
        out = comm.decomposed_allgather(send, algorithm="ring")
        settled(comm)
        assert np.array_equal(out, np.concatenate([shard(rank, 64)[::2] for rank in range(N)]))

    on_ranks(N, body)


# --- what cannot be


def test_host_here_and_gpu_there(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        send = shard(comm.rank) if comm.rank == 2 else on_gpu(comm, shard(comm.rank))
        error = attempt(lambda: comm.decomposed_allgather(send))
        comm.decomposed_allgather(shard(comm.rank))
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (2,)
        assert "where" in str(error)


@pytest.mark.parametrize(
    "call, kind, told",
    [
        (
            lambda comm, x: comm.decomposed_allgather(x, np.zeros((4 * 3000, 2), np.float32)),
            ArgumentError,
            "where send",
        ),
        (lambda comm, x: comm.decomposed_allreduce(x, algorithm="native"), ArgumentError, "allgather of equal shards"),
    ],
)
def test_refused_on_all_ranks(fabric: Fabric, call: Any, kind: type, told: str) -> None:
    def body(comm: Communicator) -> BaseException | None:
        error = attempt(lambda: call(comm, on_gpu(comm, shard(comm.rank))))
        comm.decomposed_allgather(shard(comm.rank))
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, kind)
        assert told in str(error)


def test_another_gpu_than_before(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        comm.decomposed_allgather(on_gpu(comm, shard(comm.rank)))
        return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank), comm.rank + 8)))

    for rank, error in enumerate(on_ranks(N, body)):
        assert f"must be on GPU {rank}, where this communicator began, got one on GPU {rank + 8}" in str(error)


def test_two_ranks_on_one_gpu(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank), 0)))

    for error in on_ranks(2, body, gpu_transport="nccl"):
        assert "ranks 0 and 1 both use" in str(error)
    for error in on_ranks(2, body):  # and without a driver there is no CUDA IPC either
        assert "CUDA 11.7" in str(error)
        assert "ranks 0 and 1 both use" in str(error)


def test_an_error_on_the_gpu_ends_the_communicator(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        send = on_gpu(comm, shard(comm.rank))
        comm.decomposed_allgather(send)
        settled(comm)
        fabric.failed = "NCCL_ERROR_REMOTE_ERROR"
        deadline = time.monotonic() + 10
        while comm.usable and time.monotonic() < deadline:
            time.sleep(0.01)
        return attempt(lambda: comm.decomposed_allgather(send))

    for error in on_ranks(N, body):
        assert isinstance(error, CollectiveError)
        assert "NCCL_ERROR_REMOTE_ERROR" in str(error)


def test_what_never_ends_on_the_gpu_is_aborted(fabric: Fabric) -> None:
    """A peer's GPU is still at something else: the host has long gone on, the guard ends the wait."""

    def body(comm: Communicator) -> BaseException | None:
        send = on_gpu(comm, shard(comm.rank))
        comm.decomposed_allgather(send)
        settled(comm)
        if comm.rank == 1:
            with fabric.lock:
                fabric.streams[1, Runtime.local.stream.ptr].append(lambda: False)
        attempt(lambda: comm.decomposed_allgather(send))
        deadline = time.monotonic() + 1.5
        while comm.usable and time.monotonic() < deadline:
            time.sleep(0.01)
        return attempt(lambda: comm.decomposed_allgather(send))

    waited, busy = on_ranks(2, body, timeout=0.5)
    assert "not complete on the GPU within 0.5 s" in str(waited)
    assert isinstance(busy, PeerTimeoutError)
    assert busy.peers == (0,)


# --- by CUDA IPC


def whole_life(comm: Communicator, number: int | None) -> None:
    """A bit of everything, in the order of streams and beside them."""
    n, rank = comm.size, comm.rank
    send = on_gpu(comm, shard(rank), number)
    expected = np.concatenate([shard(each) for each in range(n)])
    works = [comm.decomposed_allgather(send, algorithm="rings", async_op=True) for _ in range(2)]
    results = [comm.decomposed_allgather(send, algorithm=name) for name in ("auto", "ring", "direct")]
    results += [work.wait() for work in works]
    total = comm.decomposed_allreduce(on_gpu(comm, shard(rank, 40 * n), number), algorithm="rings")
    swapped = comm.all_to_all(on_gpu(comm, shard(rank, 8 * n), number))
    Device(rank if number is None else number).synchronize()
    assert all(np.array_equal(result, expected) for result in results)
    assert np.array_equal(total, sum(shard(each, 40 * n) for each in range(n)))
    parts = [shard(each, 8 * n)[8 * rank : 8 * rank + 8] for each in range(n)]
    assert np.array_equal(swapped, np.concatenate(parts))


@pytest.mark.parametrize("shared", [False, True], ids=["a GPU each", "one GPU"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_by_ipc(ipc: ipc_double.Ipc, n: int, shared: bool) -> None:
    on_ranks(n, lambda comm: whole_life(comm, 0 if shared else None))
    assert not ipc.memory
    assert not ipc.opened


def test_auto_is_ipc_where_ranks_share_a_gpu(ipc: ipc_double.Ipc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_GPU_TRANSPORT", "auto")
    on_ranks(2, lambda comm: whole_life(comm, 0))
    assert not ipc.fabric.records  # of NCCL


def test_native_needs_nccl(ipc: ipc_double.Ipc) -> None:
    def body(comm: Communicator) -> BaseException | None:
        return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank)), algorithm="native"))

    for error in on_ranks(2, body):
        assert isinstance(error, ArgumentError)
        assert "CUDA IPC" in str(error)


def test_a_peer_that_gives_up_ends_the_communicator(ipc: ipc_double.Ipc) -> None:
    def body(comm: Communicator) -> BaseException | None:
        send = on_gpu(comm, shard(comm.rank))
        comm.decomposed_allgather(send)
        settled(comm)
        device, _ = comm._core.gpu(comm.rank)
        assert device.links is not None
        if comm.rank == 1:
            device.links.abort("no more")
        deadline = time.monotonic() + 10
        while comm.usable and time.monotonic() < deadline:
            time.sleep(0.01)
        return attempt(lambda: comm.decomposed_allgather(send))

    waited, gave_up = on_ranks(2, body)
    assert "rank 1 gave up" in str(waited)
    assert "no more" in str(gave_up)


def test_ranks_that_ask_for_different_transports(ipc: ipc_double.Ipc) -> None:
    def body(comm: Communicator) -> BaseException | None:
        comm._core.gpu_transport = ("nccl", "ipc")[comm.rank]
        return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank))))

    for error in on_ranks(2, body):
        assert "rank 0 'nccl', rank 1 'ipc'" in str(error)


def test_ranks_on_different_hosts(ipc: ipc_double.Ipc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasp_coll.linkup.machine", lambda: threading.current_thread().name)

    def body(comm: Communicator) -> BaseException | None:
        return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank))))

    for error in on_ranks(2, body):
        assert "links ranks of one host" in str(error)
        assert "rank 1" in str(error)


def test_what_is_no_transport() -> None:
    with pytest.raises(ArgumentError, match="gpu_transport must be one of auto, nccl, ipc, got 'mpi'"):
        on_ranks(2, lambda comm: None, gpu_transport="mpi")


def test_repeated_calls_and_steps_by_ipc(ipc: ipc_double.Ipc) -> None:
    """A graph of copies and flags can be launched as often as wanted, between calls and steps that are not graphs."""

    def body(comm: Communicator) -> None:
        send, out = on_gpu(comm, shard(comm.rank)), on_gpu(comm, np.zeros((3 * 3000, 2), np.float32))
        expected = np.concatenate([shard(rank) for rank in range(3)])
        for call in range(4):
            out[...] = -1
            comm.decomposed_allgather(send, out, algorithm="rings")
            other = comm.decomposed_allgather(send, algorithm="direct")
            found = {}
            for arrival in comm.allgather_steps(send, algorithm="rings"):
                settled(comm)
                found |= {(chunk.source, chunk.start): np.array(chunk.data) for chunk in arrival.chunks}
            settled(comm)
            assert np.array_equal(out, expected), call
            assert np.array_equal(other, expected)
            assert np.array_equal(np.concatenate([found[key] for key in sorted(found)]), expected)

    on_ranks(3, body)
    assert sum(graph.launched for graph in Runtime.graphs) >= 3 * 3
