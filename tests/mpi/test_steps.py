"""Streams whose steps lie together, donated and accumulating, on every number of ranks that the suite runs on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import tasp_coll

Array = np.ndarray[Any, Any]
ALGORITHMS = ("rings", "ring", "direct")


@pytest.fixture(scope="module")
def comm() -> Iterator[tasp_coll.Communicator]:
    with tasp_coll.Communicator(timeout=40) as made:
        yield made


def shard(rank: int, rows: int) -> Array:
    return (100 * rank + np.arange(rows * 3) % 97).reshape(rows, 3)


def several_rows(comm: tasp_coll.Communicator) -> list[list[int]]:
    """Equal, odd, uneven with zeros, hardly any, none."""
    n = comm.size
    uneven = [401 * (rank % 3) + rank if rank or n == 1 else 0 for rank in range(n)]
    return [[6_000] * n, [7] * n, uneven, uneven[::-1], [1] * n, [0] * n]


def all_chunks(arrival: Any, rows: list[int]) -> Array:
    """What `data` should be."""
    parts = [shard(chunk.source, rows[chunk.source])[chunk.start : chunk.stop] for chunk in arrival.chunks]
    return np.concatenate([*parts, shard(0, 0)])


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("donate", ["none", "all", "odd"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gathering(comm: tasp_coll.Communicator, algorithm: str, donate: str, reverse: bool) -> None:
    schedule = tasp_coll.plan(comm.topology, "allgather", algorithm, reverse=reverse)
    donor = donate == "all" or (donate == "odd" and comm.rank % 2 == 1)
    for rows in several_rows(comm):
        send = shard(comm.rank, rows[comm.rank])
        stream = comm.allgather_steps(send, algorithm=algorithm, reverse=reverse, donate=donor)
        assert stream.layout == schedule.arrivals(comm.rank, rows)
        for arrival in stream:
            time.sleep(0.001 * ((arrival.step + comm.rank) % 3))
            found = [(chunk.source, chunk.ring, chunk.start, chunk.stop) for chunk in arrival.chunks]
            assert found == sorted(found) == list(stream.layout[arrival.step])
            assert np.array_equal(arrival.data, all_chunks(arrival, rows))
            assert (arrival.ended is None) == (arrival.step == 0 or not arrival.chunks)
        assert donor or np.array_equal(send, shard(comm.rank, rows[comm.rank]))


@pytest.mark.parametrize("dtype", ["i8", "f4", "f8"])
@pytest.mark.parametrize("rings", [1, None])
def test_gradients_go_home(comm: tasp_coll.Communicator, rings: int | None, dtype: str) -> None:
    for rows in several_rows(comm):
        kv, grad = shard(comm.rank, rows[comm.rank]), np.full((rows[comm.rank], 3), 77, dtype)
        stream = comm.allgather_steps(kv.copy(), algorithm="rings", rings=rings, reverse=True, donate=True)
        next(stream)
        for request in comm.reduce_scatter_steps(grad, algorithm="rings", rings=rings, accumulate=True):
            came = kv if request.step == comm.size - 1 else next(stream).data
            assert np.array_equal(came, all_chunks(request, rows))
            request.data[...] += ((comm.rank + 1) * came).astype(dtype)
        assert next(stream, None) is None
        assert np.array_equal(grad, kv * sum(range(1, comm.size + 1)))


@pytest.mark.parametrize("algorithm", ["rings", "ring"])
def test_leaving_early(comm: tasp_coll.Communicator, algorithm: str) -> None:
    for turn in range(9):
        for arrival in comm.allgather_steps(shard(comm.rank, 3_000), algorithm=algorithm, donate=True):
            assert np.array_equal(arrival.data, all_chunks(arrival, [3_000] * comm.size))
            if arrival.step == (turn + comm.rank) % 3:
                break
        sums = np.zeros((500, 2))
        for request in comm.reduce_scatter_steps(sums, algorithm=algorithm, accumulate=True):
            request.data[...] += 1
            if turn % 2 and comm.rank == 0:
                break
        assert turn % 2 or (sums == comm.size).all()
        assert comm.decomposed_allreduce(np.ones(4_000))[-1] == comm.size
