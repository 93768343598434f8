"""The "tasp" back end of torch.distributed under torchrun: every form, and trainings that are gloo's."""

from __future__ import annotations

import pytest

from launch import REPOSITORY, UNCOUNTED, torchrun

ENDS = """
import threading, torch, torch.distributed as dist, tasp_coll.torch_backend
dist.init_process_group("cpu:tasp")
x = torch.ones(100000)
work = dist.all_reduce(x, async_op=True)
if {destroyed}:
    dist.destroy_process_group()  # what is under way is finished first
    assert x[0] == 2
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("tasp_coll group")]
    assert not names, names
else:
    work.wait()
print("left")
"""


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_the_suite_on_several_ranks(ranks: int) -> None:
    arguments = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", REPOSITORY / "tests" / "torchrun"]
    env = {"TASP_COLL_TIMEOUT": "60", "TASP_COLL_MPI_RANKS": str(ranks), **({} if ranks == 4 else UNCOUNTED)}
    ended = torchrun(ranks, arguments, timeout=120, env=env)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert " passed" in ended.stdout


@pytest.mark.parametrize("destroyed", [True, False])
def test_a_program_ends(destroyed: bool) -> None:
    ended = torchrun(2, ["-c", ENDS.format(destroyed=destroyed)], timeout=60)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("left") == 2


def test_a_rank_that_stays_away_is_named() -> None:
    source = """
import datetime, sys, time, torch, torch.distributed as dist, tasp_coll, tasp_coll.torch_backend
dist.init_process_group("cpu:tasp", timeout=datetime.timedelta(seconds=2))
dist.all_reduce(torch.ones(9))
if dist.get_rank() == 0:
    try:
        dist.all_reduce(torch.ones(9))
    except tasp_coll.PeerTimeoutError as error:
        print("peers", *error.peers, flush=True)
else:
    time.sleep(5)
import os; os._exit(0)
"""
    ended = torchrun(2, ["-c", source], timeout=60)
    assert "peers 1\n" in ended.stdout, ended.stdout + ended.stderr
