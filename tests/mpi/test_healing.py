"""Communicators whose links heal, where no link dies: all calls as ever, and an end without a word."""

from __future__ import annotations

import numpy as np
import pytest

import tasp_coll


@pytest.mark.parametrize("algorithm", ["auto", "rings", "direct"])
def test_collectives(algorithm: str) -> None:
    with tasp_coll.Communicator(timeout=60, self_heal=True) as comm:
        n, mine = comm.size, np.arange(5000.0) + comm.rank
        for rows in (3, 5000):
            gathered = comm.decomposed_allgather(mine[:rows], algorithm=algorithm)
            assert (gathered.reshape(n, rows) == np.arange(rows) + np.arange(n)[:, None]).all()
        total = comm.decomposed_allreduce(mine, algorithm=algorithm)
        assert (total == np.arange(5000.0) * n + n * (n - 1) / 2).all()
        uneven = comm.decomposed_allgatherv(np.full(comm.rank * 1000, comm.rank), algorithm=algorithm)
        assert (uneven == np.repeat(np.arange(n), np.arange(n) * 1000)).all()
        assert comm.topology.name == f"full_mesh:{n}"


def test_streams_and_calls_in_the_background() -> None:
    with tasp_coll.Communicator(timeout=60, self_heal=True) as comm:
        mine = np.full((70, 3), comm.rank)
        work = comm.all_to_all(np.full((comm.size, 9), comm.rank), async_op=True)
        seen = np.full(comm.size, -1)
        for arrival in comm.allgather_steps(mine):
            for chunk in arrival.chunks:
                assert (chunk.data == chunk.source).all()
                seen[chunk.source] = chunk.source
        assert (seen == np.arange(comm.size)).all()
        assert (work.wait() == np.arange(comm.size)[:, None]).all()


def test_native_is_not_to_be_had() -> None:
    with tasp_coll.Communicator(timeout=60, self_heal=True) as comm:
        if comm.size > 1:
            with pytest.raises(tasp_coll.ArgumentError, match="native"):
                comm.decomposed_allgather(np.ones(50_000), algorithm="native")
        assert (comm.decomposed_allgather(np.ones(3)) == 1).all()
