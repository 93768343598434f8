"""Ranks of one host meet on a board in memory that they share; all do, or none."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

import tasp_coll
from tasp_coll.board import ENVIRONMENT, Board, place

WORLD = MPI.COMM_WORLD
SECONDS = 40

pytestmark = pytest.mark.skipif("TORCHELASTIC_RUN_ID" in os.environ, reason="only over MPI")


def on_a_board(comm: tasp_coll.Communicator) -> bool:
    return isinstance(comm._core.rounds, Board)


def test_all_ranks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert WORLD.allgather(on_a_board(comm)) == [WORLD.size > 1 and bool(place())] * WORLD.size
    if WORLD.rank == WORLD.size - 1:
        monkeypatch.setenv(ENVIRONMENT, "0")
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert not on_a_board(comm)
        assert comm.decomposed_allgather(np.int64(WORLD.rank)).tolist() == list(range(WORLD.size))


def test_one_that_cannot_open_it_leaves_all_with_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no such memory here")

    if WORLD.rank == WORLD.size - 1:
        monkeypatch.setattr("tasp_coll.bootstrap.opened", refuse)
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert not on_a_board(comm)
        assert comm.decomposed_allgather(np.int64(WORLD.rank)).tolist() == list(range(WORLD.size))


def test_nothing_is_left_of_it() -> None:
    def held() -> tuple[int, int]:
        WORLD.barrier()
        mapped = Path("/proc/self/maps").read_text().count("/memfd:tasp_coll")
        return mapped, len(os.listdir("/proc/self/fd"))

    before, works = held(), []
    for _ in range(5):
        with tasp_coll.Communicator(timeout=SECONDS) as comm:
            for rows in (1, 100, 1, 5000):
                out = comm.decomposed_allgather(np.full(rows, WORLD.rank))
                assert out[::rows].tolist() == list(range(WORLD.size))
            works.append(comm.decomposed_allgather(np.int64(WORLD.rank), async_op=True))
            assert works[-1].wait().tolist() == list(range(WORLD.size))
    assert held() == before


def test_whoever_waits_there_still_serves_the_library() -> None:
    """A large message that its sender has begun moves on inside the collective that the sender waits in."""
    if WORLD.size == 1:
        pytest.skip("nobody to send to")
    big = np.full(4_000_000, WORLD.rank)
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        for _ in range(3):
            to, source = (WORLD.rank + 1) % WORLD.size, (WORLD.rank - 1) % WORLD.size
            if WORLD.rank % 2 == 0:
                request = WORLD.Isend(big, to)
                comm.decomposed_allgather(np.int64(WORLD.rank))
                room = np.empty_like(big)
                WORLD.Recv(room, source)
                request.Wait()
            else:
                room = np.empty_like(big)
                WORLD.Recv(room, source)
                comm.decomposed_allgather(np.int64(WORLD.rank))
                WORLD.Send(big, to)
            assert (room == source).all()
