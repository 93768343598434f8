"""The test bodies of tests/mpi under torchrun, and what happens when its ranks go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from launch import REPOSITORY, UNCOUNTED, torchrun

SUITE = Path(__file__).parent / "mpi"
BODIES = ("test_process_groups.py", "test_collectives.py", "test_steps.py", "test_healing.py")

# Three ranks that no launcher looks after; the last one leaves in the middle.
LEAVES = """
import os, sys, numpy, torch.distributed as dist, tasp_coll
rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(path, 3), rank=rank, world_size=3)
comm = tasp_coll.Communicator(dist.group.WORLD, timeout=20)
comm.decomposed_allreduce(numpy.ones(9))
if rank == 2:
    os._exit(0)
try:
    comm.decomposed_allreduce(numpy.ones(100_000), algorithm="rings")
except tasp_coll.CollectiveError as error:
    print(error)
"""


@pytest.mark.parametrize("ranks, bodies", [(2, BODIES[:1]), (3, BODIES), (5, BODIES[:1])])
def test_suite_passes(ranks: int, bodies: tuple[str, ...]) -> None:
    options = ["-c", "pyproject.toml", "-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=60"]
    paths = [SUITE / body for body in bodies]
    env = {"TASP_COLL_MPI_RANKS": str(ranks), **({} if ranks == 3 else UNCOUNTED)}
    ended = torchrun(ranks, ["-m", "pytest", *paths, *options], timeout=200, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" passed") == 1, "rank 0, and no other, reports"


def test_a_rank_that_ends_is_named_at_once(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", LEAVES, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
        )
        for rank in range(3)
    ]
    ended = [rank.communicate(timeout=60) for rank in ranks]
    for number in (0, 1):
        assert "rank 2" in ended[number][0], ended
        assert ranks[number].returncode == 0, ended


def test_before_the_process_group_there_is_no_world() -> None:
    ended = torchrun(2, ["-c", "import tasp_coll; tasp_coll.Communicator()"])
    assert ended.returncode != 0
    assert "call torch.distributed.init_process_group() before" in ended.stderr
