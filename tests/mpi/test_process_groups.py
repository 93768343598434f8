"""Communicators on torch.distributed's groups. Collected under torchrun only."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tasp_coll
from tasp_coll import Communicator, MismatchError, PeerTimeoutError

RANK, SIZE = dist.get_rank(), dist.get_world_size()
several_ranks = pytest.mark.skipif(SIZE == 1, reason="one rank has no peers")


def check(comm: Communicator, members: list[int], rows: int = 3_000) -> None:
    """A few collectives on `comm`, whose ranks are these ranks of the world."""
    mine = members[comm.rank]
    for algorithm in ("rings", "ring", "direct"):
        got = comm.decomposed_allgather(torch.full((rows,), mine), algorithm=algorithm)
        assert got[::rows].tolist() == members
        assert (comm.decomposed_allreduce(torch.full((rows,), mine), algorithm=algorithm) == sum(members)).all()


def test_the_world_is_the_default() -> None:
    with Communicator(timeout=20) as comm:
        assert (comm.rank, comm.size, comm.transport) == (RANK, SIZE, "torch")
        check(comm, list(range(SIZE)))
    shared = tasp_coll.decomposed_allgather(np.int32(RANK))
    assert shared.tolist() == list(range(SIZE))


def test_groups_of_torch_beside_each_other() -> None:
    parts = [dist.new_group(list(range(first, SIZE, 2))) for first in range(min(2, SIZE))]
    members = list(range(RANK % 2, SIZE, 2))
    with Communicator(parts[RANK % 2], timeout=20) as part, Communicator(dist.group.WORLD, timeout=20) as comm:
        assert (part.rank, part.size) == (members.index(RANK), len(members))
        slow = comm.decomposed_allreduce(np.ones(200_000), async_op=True, algorithm="rings")
        check(part, members)
        assert (slow.wait() == SIZE).all()
    with Communicator(parts[RANK % 2], timeout=20) as again:
        check(again, members)


@several_ranks
def test_messages_of_the_users_own_pass_by() -> None:
    """Tags are ours to choose, since the connections are."""
    there, here = (RANK + 1) % SIZE, (RANK - 1) % SIZE
    received = torch.zeros(4)
    with Communicator(timeout=20) as comm:
        waiting = dist.irecv(received, here, tag=8)
        check(comm, list(range(SIZE)))
        dist.send(torch.full((4,), float(RANK)), there, tag=8)
        assert waiting is not None
        waiting.wait()
    assert (received == here).all()


@several_ranks
def test_ranks_that_disagree_are_named_and_go_on() -> None:
    odd = RANK == SIZE - 1
    with Communicator(timeout=20) as comm:
        with pytest.raises(MismatchError, match=r"disagree on shape"):
            comm.decomposed_allgather(np.zeros(4 + odd))
        check(comm, list(range(SIZE)))


@several_ranks
@pytest.mark.parametrize("algorithm", ["rings", "native"])
def test_a_silent_rank_is_named(algorithm: str) -> None:
    comm = Communicator(timeout=0.5)
    silent = SIZE - 1
    if silent != RANK:
        with pytest.raises(PeerTimeoutError, match=f"no answer from rank {silent}"):
            comm.decomposed_allgather(np.zeros(50_000), algorithm=algorithm)
        assert not comm.usable
    dist.barrier()


@several_ranks
def test_a_rank_that_does_not_come_is_named() -> None:
    if RANK:
        with pytest.raises(PeerTimeoutError, match=r"not all of ranks \[0\]"):
            Communicator(dist.group.WORLD, timeout=0.5)
    dist.barrier()
