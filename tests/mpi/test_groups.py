"""Communicators on parts of the world and beside each other; none hears another's messages, or the user's."""

from __future__ import annotations

import gc
import time
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import tasp_coll

WORLD = MPI.COMM_WORLD
ALGORITHMS = ("auto", "rings", "ring", "direct", "native")
SECONDS = 40


def check(comm: tasp_coll.Communicator, members: list[int], rows: int = 5_000) -> None:
    """A few collectives on `comm`, whose ranks are these ranks of the world."""
    mine = members[comm.rank]
    for algorithm in ALGORITHMS:
        got = comm.decomposed_allgather(np.full(rows, mine), algorithm=algorithm)
        assert got[::rows].tolist() == members
        assert (comm.decomposed_allreduce(np.full(rows, mine), algorithm=algorithm) == sum(members)).all()
    for arrival in comm.allgather_steps(np.full(rows, mine)):
        for chunk in arrival.chunks:
            assert (chunk.data == members[chunk.source]).all()


def test_the_world_is_the_default() -> None:
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert (comm.rank, comm.size) == (WORLD.rank, WORLD.size)
        check(comm, list(range(WORLD.size)))
    shared = tasp_coll.decomposed_allgather(np.int32(WORLD.rank))
    assert shared.tolist() == list(range(WORLD.size))
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        assert tasp_coll.decomposed_allreduce(np.ones(3), comm=comm)[0] == WORLD.size


def test_one_rank_alone() -> None:
    with tasp_coll.Communicator(MPI.COMM_SELF, timeout=SECONDS) as comm:
        assert (comm.rank, comm.size) == (0, 1)
        check(comm, [WORLD.rank])


def test_duplicates() -> None:
    twin = WORLD.Dup()
    with tasp_coll.Communicator(twin, timeout=SECONDS) as comm:
        twin.Free()  # ours is a duplicate of its own
        check(comm, list(range(WORLD.size)))


@pytest.mark.parametrize("reverse", [False, True])
def test_parts_of_the_world(reverse: bool) -> None:
    """Odd and even ranks, in the order of the world or the other way round, at the same time."""
    part = WORLD.Split(WORLD.rank % 2, -WORLD.rank if reverse else WORLD.rank)
    members = [rank for rank in range(WORLD.size) if rank % 2 == WORLD.rank % 2]
    with tasp_coll.Communicator(part, timeout=SECONDS) as comm:
        assert (comm.rank, comm.size) == (part.rank, part.size)
        check(comm, members[::-1] if reverse else members)
    part.Free()


def test_ranks_that_are_not_in_the_group_take_no_part() -> None:
    chosen = WORLD.Split(0 if WORLD.rank else MPI.UNDEFINED, WORLD.rank)
    if WORLD.rank == 0:
        with pytest.raises(tasp_coll.ArgumentTypeError, match="group"):
            tasp_coll.Communicator(chosen, timeout=SECONDS)
        return
    with tasp_coll.Communicator(chosen, timeout=SECONDS) as comm:
        check(comm, list(range(1, WORLD.size)))
    chosen.Free()


def test_what_is_no_group_is_refused() -> None:
    for group in (3, "world", MPI.COMM_NULL, WORLD.Get_group()):
        with pytest.raises(tasp_coll.ArgumentTypeError, match="group must be"):
            tasp_coll.Communicator(group)


def test_two_communicators_interleaved() -> None:
    """The second has the ranks the other way round; both have calls and streams under way."""
    n, other = WORLD.size, WORLD.Split(0, -WORLD.rank)
    with (
        tasp_coll.Communicator(timeout=SECONDS) as first,
        tasp_coll.Communicator(other, timeout=SECONDS) as second,
    ):
        sizes = (10, 4_000, 60_000)
        works: list[tuple[Any, Any]] = []
        for turn, rows in enumerate(sizes * 3):
            mine = np.full(rows, WORLD.rank + turn)
            gathered = np.repeat(np.arange(n) + turn, rows)
            works.append((first.decomposed_allgather(mine, async_op=True, algorithm="rings"), gathered))
            works.append((second.decomposed_allgather(mine, async_op=True), gathered.reshape(n, -1)[::-1].ravel()))
            total = np.full(rows, sum(range(n)) + n * turn)
            works.append((second.decomposed_allreduce(mine, async_op=True, algorithm="ring"), total))
            works.append((first.decomposed_allreduce(mine, async_op=True), total))
        streams = first.allgather_steps(np.full(700, first.rank)), second.allgather_steps(np.full(900, second.rank))
        for arrivals in zip(*streams, strict=True):
            assert all((chunk.data == chunk.source).all() for arrival in arrivals for chunk in arrival.chunks)
        # The last call of one first, then the first call of the other: the order of waiting is free.
        for work, expected in works[::-2] + works[::2]:
            assert np.array_equal(work.wait(), expected)
    other.Free()


def test_the_users_own_messages_are_left_alone() -> None:
    """Receives with wildcards, on the communicator that was handed in, are open while our data moves."""
    n, rank = WORLD.size, WORLD.rank
    boxes = np.full((n, 1_000), -1.0)
    with tasp_coll.Communicator(timeout=SECONDS) as comm:
        pending = [WORLD.Irecv(box, MPI.ANY_SOURCE, MPI.ANY_TAG) for box in boxes]
        work = comm.decomposed_allreduce(np.full(100_000, 1.0), async_op=True)
        for algorithm in ALGORITHMS:
            assert comm.decomposed_allgather(np.full(9_000, rank), algorithm=algorithm)[-1] == n - 1
        stream = comm.allgather_steps(np.full(9_000, rank))
        next(stream)
        assert not any(request.Test() for request in pending)
        WORLD.barrier()
        sent = [WORLD.Isend(np.full(1_000, float(rank)), peer, tag=peer) for peer in range(n)]
        assert WORLD.allreduce(rank) == sum(range(n))
        assert sum(1 for _ in stream) == n - 1
        MPI.Request.Waitall(pending + sent)
        assert work.wait()[0] == n
    assert sorted(boxes[:, 0]) == list(range(n))
    assert (boxes == boxes[:, :1]).all()


def test_many_communicators_one_after_another() -> None:
    """More than MPICH has context ids (2048): closing gives them back."""
    for _ in range(2_200 if WORLD.size == 1 else 50):
        with tasp_coll.Communicator(timeout=SECONDS) as comm:
            assert comm.decomposed_allreduce(np.ones(1))[0] == WORLD.size


def test_a_communicator_that_is_dropped_harms_nobody() -> None:
    works = []
    for _ in range(5):
        comm = tasp_coll.Communicator(timeout=SECONDS)
        comm.decomposed_allgather(np.zeros(20_000))
        works.append(comm.decomposed_allreduce(np.ones(20_000), async_op=True))
    del comm
    gc.collect()
    assert all(work.wait()[-1] == WORLD.size for work in works)


def test_work_that_is_dropped_is_still_carried_out() -> None:
    """The other ranks need it, and its memory must last as long as messages are under way."""
    send = np.full(300_000, 1.0)
    comm = tasp_coll.Communicator(timeout=SECONDS)
    if WORLD.rank == 0:
        comm.decomposed_allreduce(send, async_op=True)
        del comm, send
        gc.collect()
        time.sleep(0.2)
        gc.collect()
    else:
        time.sleep(0.1)
        assert comm.decomposed_allreduce(send)[-1] == WORLD.size
    with tasp_coll.Communicator(timeout=SECONDS) as other:
        assert other.decomposed_allreduce(np.ones(100_000))[-1] == WORLD.size
