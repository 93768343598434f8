"""Runs tests/mpi under mpiexec at several world sizes, and checks that what fails or hangs there is seen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from launch import UNCOUNTED

MpiRun = Callable[..., CompletedProcess[str]]
SUITE = Path(__file__).parent / "mpi"


def run_suite(
    mpirun: MpiRun, ranks: int, *suite: Path, limit_s: float = 60, counted: bool = True, board: bool = True
) -> CompletedProcess[str]:
    """A test gets `limit_s`: faulthandler's thread needs no GIL, so it ends a rank that hangs in MPI too.

    suite: tests/mpi, if none is given. counted: whether the ranks' lines count as covered. board: rounds in memory that
    ranks share.
    """
    options = ["-c", "pyproject.toml", "-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=0"]
    options += ["-o", f"faulthandler_timeout={limit_s}", "-o", "faulthandler_exit_on_timeout=true"]
    env = {"TASP_COLL_MPI_RANKS": str(ranks), "TASP_COLL_SHARED_MEMORY": str(int(board))}
    tests = suite or (SUITE,)
    return mpirun(ranks, ["-m", "pytest", *tests, *options], timeout=240, env=env | ({} if counted else UNCOUNTED))


def suite_of(directory: Path, body: str) -> Path:
    """A suite like tests/mpi with one test, whose body is given."""
    shutil.copy(SUITE / "conftest.py", directory)
    (directory / "test_one.py").write_text(f"from mpi4py import MPI\n\ndef test_one():\n    {body}\n")
    return directory


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_suite_passes(mpirun: MpiRun, ranks: int) -> None:
    ended = run_suite(mpirun, ranks, counted=ranks in (1, 4))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" passed") == 1, "rank 0, and no other, reports"


def test_suite_passes_by_messages(mpirun: MpiRun) -> None:
    """As on several hosts: no memory is shared."""
    bodies = [SUITE / f"test_{name}.py" for name in ("collectives", "errors", "groups")]
    ended = run_suite(mpirun, 3, *bodies, board=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_one_failing_rank_ends_the_job(mpirun: MpiRun, tmp_path: Path) -> None:
    """The ranks that do not fail wait for the one that does."""
    suite = suite_of(tmp_path, "assert MPI.COMM_WORLD.rank != 1; MPI.COMM_WORLD.barrier()")
    ended = run_suite(mpirun, 3, suite)
    assert ended.returncode != 0
    assert re.search(r"rank 1 of 3 FAILED \S*test_one\.py::test_one \(call\)", ended.stderr), ended.stderr


def test_a_wrong_world_size_is_a_failure(mpirun: MpiRun) -> None:
    arguments = ["-m", "pytest", SUITE / "test_world.py", "-q", "-p", "no:cacheprovider"]
    ended = mpirun(2, arguments, env={"TASP_COLL_MPI_RANKS": "3"})
    assert ended.returncode != 0


def test_a_hang_in_mpi_ends_the_job_and_shows_where(mpirun: MpiRun, tmp_path: Path) -> None:
    suite = suite_of(tmp_path, "MPI.COMM_WORLD.rank or MPI.COMM_WORLD.recv(source=0)")
    ended = run_suite(mpirun, 2, suite, limit_s=1)
    assert ended.returncode != 0
    assert "test_one.py" in ended.stderr


def test_a_job_past_its_time_is_killed_with_all_its_ranks(mpirun: MpiRun, tmp_path: Path) -> None:
    beat = "import pathlib, sys, time\nwhile True: pathlib.Path(sys.argv[1]).touch(); time.sleep(0.01)"
    with pytest.raises(TimeoutError, match="killed after 1 s"):
        mpirun(2, ["-c", beat, tmp_path / "alive"], timeout=1)
    time.sleep(0.5)
    (tmp_path / "alive").unlink()
    time.sleep(0.2)
    assert not (tmp_path / "alive").exists(), "a rank still runs"


def test_worlds_of_one_are_an_error_that_says_so() -> None:
    """As a launcher of another MPI starts them: each finds itself alone."""
    started = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "TORCHELASTIC"))}
    ended = subprocess.run(
        [sys.executable, "-c", "import tasp_coll; tasp_coll.Communicator()"],
        env={**started, "OMPI_COMM_WORLD_SIZE": "3"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode != 0
    assert "3 ranks were started, but each is a world of one" in ended.stderr
