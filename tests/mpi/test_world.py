from __future__ import annotations

import os

import pytest
from mpi4py import MPI


@pytest.mark.skipif("TASP_COLL_MPI_RANKS" not in os.environ, reason="started by hand: no world size was asked for")
def test_the_world_has_as_many_ranks_as_were_started() -> None:
    """An mpiexec of another MPI than the one mpi4py loads starts n worlds of one rank, and all would pass."""
    assert MPI.COMM_WORLD.size == int(os.environ["TASP_COLL_MPI_RANKS"])


def test_every_rank_is_there_once() -> None:
    world = MPI.COMM_WORLD
    assert world.allgather(world.rank) == list(range(world.size))
