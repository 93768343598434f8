"""Streams of steps on GPUs, on doubles of CuPy and NCCL: what arrives, and that no memory is used before its event."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import numpy as np
import pytest

from cupy_double import Device, Runtime, current, drain, install
from loopback_ranks import attempt, on_ranks
from nccl_double import Entry, Fabric, check_memory, check_records
from tasp_coll import ArgumentError, Communicator, Topology

Array = np.ndarray[Any, Any]
OPTIONS = [("rings", False, False), ("ring", True, False), ("rings", True, True), ("direct", False, False)]


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    return install(monkeypatch)


def use(fabric: Fabric, comm: Communicator, array: Any, written: bool = False) -> Any:
    """The caller's kernel on its current stream, after what that was given before."""
    with Device(comm.rank):
        stream = current()
    drain(comm.rank, stream.ptr)
    fabric.note(comm.rank, stream.ptr, array.ctypes.data, array.nbytes, written)
    return array


def on_gpu(fabric: Fabric, comm: Communicator, values: Array) -> Any:
    """A copy on this rank's GPU."""
    with Device(comm.rank):
        made = sys.modules["cupy"].empty(values.shape, values.dtype)
    use(fabric, comm, made, written=True)[...] = values
    return made


def shard(rank: int, rows: int) -> Array:
    return (np.arange(rows * 3).reshape(rows, 3) % 89 + 100 * rank).astype(np.int32)


def rows_of(n: int, even: bool) -> list[int]:
    return [24] * n if even else [7 * (rank % 4) + rank for rank in range(n)]


def proved(fabric: Fabric) -> None:
    """All ranks' groups pair up and end, and all memory is used in the order of events."""
    fabric.run()
    check_records(fabric.records)
    check_memory(fabric.entries)


def gathered(fabric: Fabric, comm: Communicator, rows: list[int], steps: Any) -> None:
    """Look at all arrivals of a stream."""
    seen = [np.zeros(count, bool) for count in rows]
    for arrival in steps:
        assert (arrival.began, arrival.ended) == (None, None)
        if arrival.data is not None:
            assert type(arrival.data) is sys.modules["cupy"].ndarray
            assert len(arrival.data) == sum(chunk.stop - chunk.start for chunk in arrival.chunks)
        for chunk in arrival.chunks:
            found = use(fabric, comm, chunk.data)
            assert np.array_equal(found, shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop])
            seen[chunk.source][chunk.start : chunk.stop] = True
    assert all(each.all() for each in seen)


@pytest.mark.parametrize("algorithm, reverse, donate", OPTIONS)
@pytest.mark.parametrize("n", range(1, 10))
def test_allgather_steps(fabric: Fabric, n: int, algorithm: str, reverse: bool, donate: bool) -> None:
    for even in (True, False) if n < 7 else (False,):
        rows = rows_of(n, even)

        def body(comm: Communicator, rows: list[int] = rows) -> None:
            for _ in range(2 if n < 5 else 1):
                send = on_gpu(fabric, comm, shard(comm.rank, rows[comm.rank]))
                steps = comm.allgather_steps(send, algorithm=algorithm, reverse=reverse, donate=donate)
                gathered(fabric, comm, rows, steps)

        on_ranks(n, body)
        proved(fabric)


@pytest.mark.parametrize("topology", ["cluster:2x4", "cluster:2x3"])
def test_hierarchical_steps(fabric: Fabric, topology: str) -> None:
    n = Topology.preset(topology).ranks
    rows = rows_of(n, False)

    def body(comm: Communicator) -> None:
        send = on_gpu(fabric, comm, shard(comm.rank, rows[comm.rank]))
        gathered(fabric, comm, rows, comm.allgather_steps(send, algorithm="hierarchical"))

    on_ranks(n, body, topology=topology)
    proved(fabric)


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct"])
@pytest.mark.parametrize("n", range(1, 10))
def test_reduce_scatter_steps(fabric: Fabric, n: int, algorithm: str, accumulate: bool) -> None:
    if accumulate and algorithm == "direct":
        return
    for even in (True, False) if n < 5 else (False,):
        rows = rows_of(n, even)

        def body(comm: Communicator, rows: list[int] = rows) -> None:
            for _ in range(2 if n < 5 else 1):
                recv = on_gpu(fabric, comm, np.full((rows[comm.rank], 3), -1, np.int32))
                for request in comm.reduce_scatter_steps(recv, algorithm=algorithm, accumulate=accumulate):
                    for chunk in request.chunks:
                        part = shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop] + comm.rank
                        data = use(fabric, comm, chunk.data, written=True)
                        data[...] = data + part if accumulate else part
                Device(comm.rank).synchronize()
                use(fabric, comm, recv)
                assert np.array_equal(recv, n * shard(comm.rank, rows[comm.rank]) + n * (n - 1) // 2)

        on_ranks(n, body)
        proved(fabric)


def test_both_at_once_and_calls_between(fabric: Fabric) -> None:
    """As in attention's backward; all ranks give their groups in one order, though some have nothing to send."""
    rows = [0, 7, 30, 1, 12]

    def body(comm: Communicator) -> None:
        n, mine = comm.size, rows[comm.rank]
        recv = on_gpu(fabric, comm, np.zeros((mine, 3), np.int32))
        arrivals = iter(
            comm.allgather_steps(on_gpu(fabric, comm, shard(comm.rank, mine)), algorithm="rings", reverse=True)
        )
        next(arrivals)
        with comm.reduce_scatter_steps(recv, algorithm="rings", accumulate=True) as requests:
            for arrival in arrivals:
                found = {(chunk.source, chunk.start): use(fabric, comm, chunk.data) for chunk in arrival.chunks}
                work = comm.decomposed_allreduce(on_gpu(fabric, comm, np.ones(5000, np.float32)), async_op=True)
                for chunk in next(requests).chunks:
                    use(fabric, comm, chunk.data, written=True)[...] += found[chunk.source, chunk.start]
                work.wait()
            for chunk in next(requests).chunks:
                use(fabric, comm, chunk.data, written=True)[...] += shard(comm.rank, mine)[chunk.start : chunk.stop]
        Device(comm.rank).synchronize()
        assert np.array_equal(recv, n * shard(comm.rank, mine))

    on_ranks(len(rows), body)
    proved(fabric)


@pytest.mark.parametrize("accumulate", [None, False, True])
def test_the_caller_changes_streams(fabric: Fabric, accumulate: bool | None) -> None:
    """The staging of a stream of steps serves the next one, from wherever the caller opens that."""
    rows = [20] * 4

    def body(comm: Communicator) -> None:
        send, recv = (on_gpu(fabric, comm, shard(comm.rank, 20)) for _ in range(2))
        for _ in range(3):
            with Device(comm.rank):
                other = Runtime.stream_after(current())
            with other:
                if accumulate is None:
                    gathered(fabric, comm, rows, comm.allgather_steps(send))
                    continue
                for request in comm.reduce_scatter_steps(recv, accumulate=accumulate):
                    for chunk in request.chunks:
                        use(fabric, comm, chunk.data, written=True)

    on_ranks(4, body)
    proved(fabric)


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_leaving_early_drains(fabric: Fabric, leave: str) -> None:
    rows = [20] * 5

    def body(comm: Communicator) -> None:
        send = on_gpu(fabric, comm, shard(comm.rank, 20))
        stream = comm.allgather_steps(send, algorithm="rings")
        for _ in range(1 + comm.rank % 3):
            next(stream)
        if leave == "close":
            stream.close()
            assert next(stream, None) is None
        del stream
        gathered(fabric, comm, rows, comm.allgather_steps(send, algorithm="rings"))
        assert not comm._core.streams

    on_ranks(5, body)
    proved(fabric)


def test_a_stream_that_is_open_at_the_end(fabric: Fabric) -> None:
    kept = []

    def body(comm: Communicator) -> None:
        kept.append(stream := comm.allgather_steps(on_gpu(fabric, comm, shard(comm.rank, 20)), algorithm="ring"))
        next(stream)

    on_ranks(3, body)
    proved(fabric)


def test_it_is_planned_once_and_stays_off_the_callers_stream(fabric: Fabric) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        send = on_gpu(fabric, comm, shard(comm.rank, 20))
        gathered(fabric, comm, [20] * 4, comm.allgather_steps(send))
        before = comm._core.planned
        gathered(fabric, comm, [20] * 4, comm.allgather_steps(send))
        assert comm._core.planned == before
        return comm.rank, current().ptr

    mine = dict(on_ranks(4, body))
    for rank, groups in fabric.records.items():
        assert all(group.stream != mine[rank] for group in groups)


def test_a_strided_array_and_what_cannot_be(fabric: Fabric) -> None:
    def body(comm: Communicator) -> BaseException | None:
        send = on_gpu(fabric, comm, shard(comm.rank, 40))[::2]
        for arrival in comm.allgather_steps(send, algorithm="ring"):
            for chunk in arrival.chunks:
                assert np.array_equal(
                    use(fabric, comm, chunk.data), shard(chunk.source, 40)[::2][chunk.start : chunk.stop]
                )
        return attempt(lambda: comm.allgather_steps(send, donate=True))

    for error in on_ranks(3, body):
        assert isinstance(error, ArgumentError)
        assert "contiguous" in str(error)


def test_a_step_that_never_ends_is_aborted(fabric: Fabric) -> None:
    given_up = threading.Event()

    def body(comm: Communicator) -> BaseException | None:
        send = on_gpu(fabric, comm, shard(comm.rank, 20))
        comm.decomposed_allgather(send)
        Device(comm.rank).synchronize()
        if comm.rank == 1:  # its GPU is busy with something else
            fabric.give(1, comm._core.gpu(1)[0].side_stream().ptr, given_up.is_set, Entry(0))
        stream = comm.allgather_steps(send, algorithm="ring")
        next(stream)
        while comm.usable and not given_up.is_set():
            time.sleep(0.01)
            fabric.pump()
        given_up.set()
        return attempt(lambda: next(stream)) if comm.rank == 0 else None

    waited, _ = on_ranks(2, body, timeout=0.5)
    assert "allgather_steps, step 0: not complete on the GPU within 0.5 s" in str(waited)


# --- what the proof finds


def entry(stream: int, *uses: tuple[int, int, bool], event: object = None, waits: bool = False) -> Entry:
    return Entry(stream, event, waits, uses)


def test_the_proof_of_memory_refuses() -> None:
    event = Runtime  # any object
    ordered = [
        entry(1, (0, 8, True)),
        entry(1, event=event),
        entry(2, event=event, waits=True),
        entry(2, (4, 8, False)),
    ]
    check_memory({0: ordered})
    check_memory({0: [entry(1, (0, 8, False)), entry(2, (4, 8, False))]})
    with pytest.raises(AssertionError, match="before its event"):
        check_memory({0: [ordered[0], ordered[3]]})
    with pytest.raises(AssertionError, match="before its event"):
        check_memory({0: [ordered[1], ordered[0], ordered[2], ordered[3]]})
    with pytest.raises(AssertionError, match="nobody recorded"):
        check_memory({0: ordered[2:]})
