"""World sizes that the suite of tests/mpi does not run at: rings of odd and even numbers of ranks that need care."""

from __future__ import annotations

from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

BODY = """
import os

import numpy as np
import tasp_coll

with tasp_coll.Communicator(timeout=60) as comm:
    n, rank = comm.size, comm.rank
    for rows in (5, 7_001):
        send = np.arange(rows * 2.0).reshape(rows, 2) + 1_000 * rank
        every = np.stack([send + 1_000 * (other - rank) for other in range(n)])
        for algorithm in ("rings", "ring", "direct"):
            got = comm.decomposed_allgather(send, algorithm=algorithm)
            assert np.array_equal(got, every.reshape(-1, 2)), algorithm
            assert np.array_equal(comm.decomposed_allreduce(send, algorithm=algorithm), every.sum(0)), algorithm
            counts = [rows, *[0] * (n - 1)]
            part = comm.decomposed_reduce_scatter(send, counts=counts, algorithm=algorithm)
            assert np.array_equal(part, every.sum(0)[: counts[rank]]), algorithm
        for reverse in (False, True):
            seen = 0
            for arrival in comm.allgather_steps(send, algorithm="rings", reverse=reverse):
                for chunk in arrival.chunks:
                    assert np.array_equal(chunk.data, every[chunk.source, chunk.start : chunk.stop])
                    seen += len(chunk.data)
            assert seen == n * rows
        sums = np.empty_like(send)
        for request in comm.reduce_scatter_steps(sums, algorithm="rings"):
            for chunk in request.chunks:
                chunk.data[...] = every[rank, chunk.start : chunk.stop] * (chunk.source + 1)
        assert np.array_equal(sums, every.sum(0) * (rank + 1))
    os.write(1, b"right\\n")
"""


@pytest.mark.parametrize("ranks", [6, 7, 9])
def test_rings_are_right(mpirun: Callable[..., CompletedProcess[str]], ranks: int) -> None:
    ended = mpirun(ranks, ["-c", BODY], timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("right\n") == ranks
