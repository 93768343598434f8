"""Runs tests/gpu under mpiexec at several world sizes on this machine's GPUs; one is enough, as ranks share it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from launch import REPOSITORY

MpiRun = Callable[..., CompletedProcess[str]]
SUITE = Path(__file__).parent / "gpu"
TRANSPORTS = ("nccl", "ipc")

# Three ranks on one GPU that no launcher looks after; the last one is killed between two calls.
KILLED = """
import os, signal, sys, time, cupy, torch.distributed as dist, tasp_coll
rank, path = int(sys.argv[1]), sys.argv[2]
os.environ["NCCL_HOSTID"] = f"rank {rank}"
dist.init_process_group("gloo", store=dist.FileStore(path, 3), rank=rank, world_size=3)
cupy.cuda.Device(0).use()
comm = tasp_coll.Communicator(dist.group.WORLD, timeout=10)
send = cupy.ones(1 << 20, cupy.float32)
comm.decomposed_allgather(send, algorithm="rings")
cupy.cuda.Device().synchronize()
if rank == 2:
    os.kill(os.getpid(), signal.SIGKILL)
begun = time.monotonic()
try:
    while time.monotonic() < begun + 30:
        comm.decomposed_allgather(send, algorithm="rings")
        time.sleep(0.05)
except tasp_coll.CollectiveError as error:
    print(f"{time.monotonic() - begun:.3g} s: {error}", flush=True)
    os._exit(0)
"""


@cache
def missing() -> str | None:
    """Why nothing can run on a GPU here."""
    probe = "import cupy; assert cupy.cuda.runtime.getDeviceCount() > 0, 'no GPU'; cupy.zeros(1)"
    ended = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=120)
    return None if ended.returncode == 0 else ended.stderr.strip().splitlines()[-1]


@pytest.fixture
def gpu() -> None:
    if (why := missing()) is not None:
        pytest.skip(f"no GPU that CuPy can use: {why}")


def run_suite(mpirun: MpiRun, ranks: int, env: dict[str, str], *selected: str) -> CompletedProcess[str]:
    options = ["-c", "pyproject.toml", "-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0", "-rs"]
    options += ["-o", "faulthandler_timeout=100", "-o", "faulthandler_exit_on_timeout=true", *selected]
    where = {"TASP_COLL_MPI_RANKS": str(ranks), **env}
    return mpirun(ranks, ["-m", "pytest", SUITE, *options], timeout=280, env=where)


def passed(ended: CompletedProcess[str]) -> None:
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" passed") == 1, "rank 0, and no other, reports"


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_suite_passes(gpu: None, mpirun: MpiRun, transport: str, ranks: int) -> None:
    passed(run_suite(mpirun, ranks, {"TASP_COLL_GPU_TRANSPORT": transport}))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_without_graphs(gpu: None, mpirun: MpiRun, transport: str) -> None:
    env = {"TASP_COLL_GPU_TRANSPORT": transport, "TASP_COLL_CUDA_GRAPHS": "0"}
    passed(run_suite(mpirun, 2, env, "-k", "allgather or steps"))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_survivors_of_a_killed_rank_raise_in_time(gpu: None, tmp_path: Path, transport: str) -> None:
    command, env = [sys.executable, "-c", KILLED], {"TASP_COLL_GPU_TRANSPORT": transport}
    ranks = _start(command, tmp_path / "store", env)
    try:
        for rank in ranks[:2]:
            out, err = rank.communicate(timeout=90)
            assert rank.returncode == 0, out + err
            assert float(out.split(" s:")[0]) < 20, out
    finally:
        for rank in ranks:
            rank.kill()


def _start(command: list[str], store: Path, env: dict[str, str]) -> list[subprocess.Popen[str]]:
    import os

    where = {**os.environ, **env, "PYTHONPATH": str(REPOSITORY)}
    return [
        subprocess.Popen(
            [*command, str(rank), str(store)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=where
        )
        for rank in range(3)
    ]


def test_the_bodies_on_host_memory(mpirun: MpiRun) -> None:
    """They are right wherever the arrays are, but for the order on streams, which host memory has not."""
    passed(run_suite(mpirun, 2, {"TASP_COLL_GPU_STAND_IN": "1"}, "-k", "not large and not half and not Case"))
