"""Calls on GPUs that repeat, as CUDA graphs, and several communicators, on doubles of CuPy and NCCL."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import pytest

from cupy_double import Device, Runtime, Stream, install
from loopback_ranks import attempt, on_ranks
from nccl_double import Fabric, check_memory, check_records
from tasp_coll import ArgumentError, Communicator, MismatchError

N = 4
Array = np.ndarray[Any, Any]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    return install(monkeypatch)


def on_gpu(comm: Communicator, values: Array) -> Any:
    with Device(comm.rank):
        made = sys.modules["cupy"].empty(values.shape, values.dtype)
    made[...] = values
    return made


def shard(rank: int, salt: int) -> Array:
    return (np.arange(1200).reshape(400, 3) % 97 + 10 * rank + salt).astype(np.float32)


def repeated(comm: Communicator, call: str, times: int, **options: Any) -> None:
    """The same call with the same arrays, whose contents change."""
    send, salts = on_gpu(comm, shard(comm.rank, 0)), range(times)
    recv = on_gpu(comm, np.zeros((N * 400 if "gather" in call else 100 if "scatter" in call else 400, 3), np.float32))
    for salt in salts:
        send[...] = shard(comm.rank, salt)
        assert getattr(comm, call)(send, recv, **options) is recv
        Device(comm.rank).synchronize()
        every = [shard(rank, salt) for rank in range(N)]
        total = np.sum(every, axis=0)
        mine = slice(100 * comm.rank, 100 * comm.rank + 100)
        expected = {"allgather": np.concatenate(every), "allreduce": total, "reduce_scatter": total[mine]}
        if call == "all_to_all":
            assert np.array_equal(recv, np.concatenate([each[mine] for each in every]))
        else:
            assert np.array_equal(recv, expected[call.removeprefix("decomposed_")])


def launched() -> list[int]:
    return [graph.launched for graph in Runtime.graphs]


def proved(fabric: Fabric) -> None:
    check_records(fabric.records)
    check_memory(fabric.entries)


@pytest.mark.parametrize(
    "call, options",
    [
        ("decomposed_allgather", {"algorithm": "rings"}),
        ("decomposed_allgather", {"algorithm": "native"}),
        ("decomposed_reduce_scatter", {"algorithm": "rings"}),
        ("decomposed_allreduce", {}),
        ("all_to_all", {}),
    ],
)
def test_captured_at_the_second_call_and_replayed_from_then_on(fabric: Fabric, call: str, options: Any) -> None:
    on_ranks(N, lambda comm: repeated(comm, call, 5, **options))
    assert launched() == [4] * N
    assert all(graph.uploaded for graph in Runtime.graphs)
    proved(fabric)


def test_other_arrays_on_one_rank_are_no_repetition_on_any(fabric: Fabric) -> None:
    def body(comm: Communicator) -> None:
        send = on_gpu(comm, shard(comm.rank, 0))
        for _ in range(4):
            recv = on_gpu(comm, np.zeros((N * 400, 3), np.float32)) if comm.rank == 2 else None
            out = comm.decomposed_allgather(send, recv, algorithm="rings")
            Device(comm.rank).synchronize()
            assert np.array_equal(out, np.concatenate([shard(rank, 0) for rank in range(N)]))

    on_ranks(N, body)
    assert not launched()


def test_a_driver_that_refuses_says_so_once(fabric: Fabric) -> None:
    Runtime.refuse = {1}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_ranks(N, lambda comm: [repeated(comm, "decomposed_allgather", 4, algorithm="rings") for _ in range(2)])
    told = [str(warning.message) for warning in caught]
    assert len(told) == N
    assert sum("this rank: cudaErrorStreamCaptureUnsupported" in text for text in told) == 1
    assert sum("refused on rank 1" in text for text in told) == N - 1
    assert not any(launched())
    proved(fabric)


def test_switched_off(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_CUDA_GRAPHS", "0")
    on_ranks(N, lambda comm: repeated(comm, "decomposed_allgather", 4, algorithm="rings"))
    assert not launched()


def test_a_wrong_call_after_replays_is_an_error_on_all(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        send, recv = on_gpu(comm, shard(comm.rank, 0)), on_gpu(comm, np.zeros((N * 400, 3), np.float32))
        for _ in range(3):
            comm.decomposed_allgather(send, recv)
        wrong = send[:7] if comm.rank == 1 else send
        error = attempt(lambda: comm.decomposed_allgather(wrong, None if comm.rank == 1 else recv))
        comm.decomposed_allgather(send, recv)
        return error

    for error in on_ranks(N, body):
        assert isinstance(error, MismatchError)
        assert error.ranks == (1,)


# --- where the caller captures


def test_captured_by_the_caller(fabric: Fabric) -> None:
    """The agreement was at the capture; the caller's graph has the rest, with memory that stays its own."""

    def body(comm: Communicator) -> None:
        send, recv = on_gpu(comm, shard(comm.rank, 0)), on_gpu(comm, np.zeros((100, 3), np.float32))
        comm.decomposed_reduce_scatter(send, recv, algorithm="rings")
        with Device(comm.rank):
            stream = Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            comm.decomposed_reduce_scatter(send, recv, algorithm="rings")
            work = comm.decomposed_allgather(send, algorithm="rings", async_op=True)
            out = work.wait()
            steps = attempt(lambda: comm.allgather_steps(send))
            graph = stream.end_capture()
        assert isinstance(steps, ArgumentError)
        assert "cannot be captured" in str(steps)
        for salt in range(3):
            send[...] = shard(comm.rank, salt)
            graph.launch(stream)
            Device(comm.rank).synchronize()
            every = [shard(rank, salt) for rank in range(N)]
            assert np.array_equal(recv, np.sum(every, axis=0)[100 * comm.rank : 100 * comm.rank + 100])
            assert np.array_equal(out, np.concatenate(every))

    on_ranks(N, body)
    check_records(fabric.records)


def test_the_first_call_cannot_be_captured_nor_one_ranks_alone(fabric: Fabric) -> None:
    def body(comm: Communicator) -> list[BaseException | None]:
        send, errors = on_gpu(comm, shard(comm.rank, 0)), []
        with Device(comm.rank):
            stream = Stream(non_blocking=True)
        for capturing in (True, comm.rank == 0):
            with stream:
                if capturing:
                    stream.begin_capture()
                errors.append(attempt(lambda: comm.decomposed_allgather(send)))
                if capturing:
                    stream.end_capture()
        return errors

    for first, second in on_ranks(2, body):
        assert isinstance(first, ArgumentError)
        assert "call it once before" in str(first)
        assert isinstance(second, MismatchError)
        assert "captured" in str(second)


# --- several communicators


@pytest.mark.parametrize("n", range(1, 10))
def test_several_communicators(fabric: Fabric, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """On streams of their own, launched in one order everywhere; each edge of each is warm."""
    monkeypatch.setenv("TASP_COLL_NCCL_COMMUNICATORS", "3")

    def body(comm: Communicator) -> None:
        send = on_gpu(comm, shard(comm.rank, 0))
        every = [shard(rank, 0) for rank in range(n)]
        for _ in range(3 if n < 5 else 1):
            out = comm.decomposed_allgather(send, algorithm="rings")
            total = comm.decomposed_allreduce(send, algorithm="rings")
            Device(comm.rank).synchronize()
            assert np.array_equal(out, np.concatenate(every))
            assert np.array_equal(total, np.sum(every, axis=0))
        for arrival in comm.allgather_steps(send, algorithm="rings"):
            Device(comm.rank).synchronize()
            for chunk in arrival.chunks:
                assert np.array_equal(chunk.data, every[chunk.source][chunk.start : chunk.stop])

    on_ranks(n, body)
    proved(fabric)
    for rank in range(n if n > 1 else 0):
        comms = [group.comm for group in fabric.records[rank][:3]]
        assert len(set(comms)) == 3
        assert all(len(group.messages) == 2 * (n - 1) for group in fabric.records[rank][:3])


def test_rings_on_streams_of_their_own_do_not_meet(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_NCCL_COMMUNICATORS", "4")
    on_ranks(5, lambda comm: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank, 0)), algorithm="rings"))
    groups = fabric.records[0][4:]
    assert len({group.stream for group in groups}) == 4
    waits = [entry for entry in fabric.entries[0] if entry.waits]
    assert len(waits) == 3 * 4  # all for all, before and after, whatever the number of steps


def test_a_bad_number_of_communicators(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TASP_COLL_NCCL_COMMUNICATORS", "0")
    call = lambda comm: attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank, 0))))  # noqa: E731
    for error in on_ranks(2, call):
        assert isinstance(error, MismatchError)
        assert "TASP_COLL_NCCL_COMMUNICATORS must be an integer from 1 to 32, got '0'" in str(error)


def test_ranks_with_different_numbers_of_communicators(fabric: Fabric, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasp_coll.linkup.communicators", lambda: 1 + Runtime.here().number)

    def body(comm: Communicator) -> BaseException | None:
        with Device(comm.rank):  # a rank is a thread here, and knows itself by its device
            return attempt(lambda: comm.decomposed_allgather(on_gpu(comm, shard(comm.rank, 0))))

    for error in on_ranks(2, body):
        assert isinstance(error, MismatchError)
        assert "the same TASP_COLL_NCCL_COMMUNICATORS, got rank 0 1, rank 1 2" in str(error)
