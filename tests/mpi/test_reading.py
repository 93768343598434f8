"""Ranks of one host read each other's shards where they lie; all do, or none."""

from __future__ import annotations

import gc
import os
import time
import weakref

import numpy as np
import pytest
from mpi4py import MPI

import tasp_coll
from tasp_coll import CollectiveError
from tasp_coll.transport.mpi import requests_alive
from tasp_coll.transport.peer_memory import PeerMemory

WORLD = MPI.COMM_WORLD
LAST = WORLD.size - 1
SECONDS = 40

pytestmark = [
    pytest.mark.skipif("TORCHELASTIC_RUN_ID" in os.environ, reason="only over MPI"),
    pytest.mark.skipif(WORLD.size == 1, reason="nobody to read from"),
]


def refuse(*_: object) -> int:
    raise CollectiveError("a device's memory")


def reading() -> tasp_coll.Communicator:
    """A communicator whose ranks read; skips where this system forbids it."""
    comm = tasp_coll.Communicator(timeout=SECONDS)
    can = comm._core.peer_memory is not None
    assert WORLD.allgather(can) == [can] * WORLD.size
    if not can:
        comm.close()
        pytest.skip("processes here cannot read each other's memory")
    return comm


@pytest.mark.parametrize("rows", [30_000, 70_000, 100_000, 1_500_000])
def test_what_all_have_is_there_and_nothing_is_sent(rows: int) -> None:
    """New results and given ones, in place, again and again; the first size comes with the agreement."""
    with reading() as comm:
        held = requests_alive()
        send = np.empty(rows, np.int32)
        recv = np.empty((WORLD.size, rows), np.int32)
        place = recv[WORLD.rank]
        for number in range(5):
            send[:] = 1000 * WORLD.rank + number
            expected = 1000 * np.arange(WORLD.size)[:, None] + number
            out = comm.decomposed_allgather(send, algorithm="direct")
            assert (out.reshape(WORLD.size, rows) == expected).all()
            assert (comm.decomposed_allgather(send, recv, algorithm="direct") == expected).all()
            recv[:] = 0
            place[:] = send
            assert (comm.decomposed_allgather(place, recv, algorithm="direct") == expected).all()
        work = comm.decomposed_allgather(send, algorithm="direct", async_op=True)
        assert (work.wait().reshape(WORLD.size, rows) == expected).all()
        assert requests_alive() == held


def test_shards_of_any_length() -> None:
    with reading() as comm:
        for rows in ([70_000 * rank for rank in range(WORLD.size)], [50_000] + [0] * LAST):
            out = comm.decomposed_allgatherv(np.full((rows[WORLD.rank], 3), WORLD.rank, np.int16), algorithm="direct")
            assert (out == np.repeat(np.arange(WORLD.size), rows)[:, None]).all()


@pytest.mark.parametrize("rows", [30_000, 70_000])
def test_who_goes_on_spoils_nothing(rows: int) -> None:
    """A rank that returns changes its shard at once, and others come late: none may read what is new."""
    rng = np.random.default_rng(WORLD.rank)
    with reading() as comm:
        send, recv = np.empty(rows, np.int32), np.empty((WORLD.size, rows), np.int32)
        for number in range(200):
            send[:] = 1000 * WORLD.rank + number
            if rng.random() < 0.1:
                time.sleep(rng.random() / 500)
            comm.decomposed_allgather(send, recv, algorithm="direct")
            send[:] = -1
            assert (recv == 1000 * np.arange(WORLD.size)[:, None] + number).all()


@pytest.mark.parametrize("rows", [40_000, 1_500_000])
@pytest.mark.parametrize("good", [0, 2])
def test_what_one_cannot_read_travels_by_messages(rows: int, good: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first call on, or after good ones; later ones are read again."""

    with reading() as comm:
        send, recv = np.full(rows, WORLD.rank), np.empty((WORLD.size, rows), np.int64)
        other, held = np.empty_like(recv), requests_alive()
        for number in range(good + 3):
            if number == good and WORLD.rank == LAST:
                monkeypatch.setattr(PeerMemory, "read", refuse)
            for result in (recv, other):
                comm.decomposed_allgather(send, result, algorithm="direct")
                assert (result == np.arange(WORLD.size)[:, None]).all()
                result[:] = -1
            assert (requests_alive() > held) == (number >= good)
        monkeypatch.undo()
        sent = requests_alive()
        for _ in range(3):
            comm.decomposed_allgather(send + 1, recv, algorithm="direct")
            assert (recv == np.arange(WORLD.size)[:, None] + 1).all()
        assert requests_alive() == sent


def test_calls_made_before_and_works_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call is remembered while another, which cannot be read, is under way."""
    with reading() as comm:
        send, recv = np.full(40_000, WORLD.rank), np.empty((WORLD.size, 40_000), np.int64)
        for _ in range(3):
            comm.decomposed_allgather(send, recv, algorithm="direct")
        if WORLD.rank == LAST:
            monkeypatch.setattr(PeerMemory, "read", refuse)
        work = comm.decomposed_allgather(send + 1, algorithm="direct", async_op=True)
        for _ in range(3):
            comm.decomposed_allgather(send, recv, algorithm="direct")
            assert (recv == np.arange(WORLD.size)[:, None]).all()
        assert work.wait()[::40_000].tolist() == list(range(1, WORLD.size + 1))


def test_no_array_is_kept_alive() -> None:
    gc.disable()
    try:
        with reading() as comm:
            for give in (True, False):
                send, recv = np.ones(70_000), np.empty(WORLD.size * 70_000)
                for _ in range(3):
                    found = comm.decomposed_allgather(send, recv if give else None, algorithm="direct")
                watched = [weakref.ref(array) for array in (send, recv, found)]
                del send, recv, found
                assert [ref() for ref in watched] == [None] * 3
    finally:
        gc.enable()


def test_one_that_cannot_from_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    reading().close()
    if WORLD.rank == LAST:
        monkeypatch.setattr(PeerMemory, "works", lambda *_: False)
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert comm._core.peer_memory is None
        out = comm.decomposed_allgather(np.full(50_000, WORLD.rank), algorithm="direct")
        assert out[::50_000].tolist() == list(range(WORLD.size))
