"""Starts Python on several ranks, by whichever MPI is there or by torchrun, and never leaves a rank behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TextIO

REPOSITORY = Path(__file__).resolve().parent.parent
# Ranks outnumber cores: one thread each, and an MPICH rank that waits gives its core away (halves 8 on 2).
SHARED_CORES = {"OMP_NUM_THREADS": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
# For ranks that run what others are counted at: tracing their lines takes as long as running them.
UNCOUNTED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
# Ranks write to files of their own accord: what mpiexec still had to forward when a job is aborted gets lost.
TO_FILES = 'exec "$@" >>"$0/out" 2>>"$0/err"'
GRACE_S = 5.0  # what a job gets to clean up after SIGTERM, before SIGKILL


def find_mpiexec() -> str | None:
    """The mpiexec of this interpreter's environment, else the first on PATH, else None."""
    beside = Path(sys.executable).parent / "mpiexec"
    return str(beside) if beside.exists() else shutil.which("mpiexec")


@cache
def mpiexec_flags(mpiexec: str) -> tuple[str, ...]:
    """What this MPI needs to start more ranks than there are cores, as root too (MPICH: nothing)."""
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, timeout=60)
    if "Open MPI" in version.stdout:
        return ("--oversubscribe", "--allow-run-as-root")
    return ()


def mpirun(
    ranks: int,
    arguments: Sequence[str | Path],
    *,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `python *arguments` on `ranks` ranks, from the repository's root.

    `env` is added to this process's environment. The result's `returncode` is mpiexec's own. A job that is
    not done after `timeout` seconds is killed, all ranks of it, and TimeoutError shows what it had printed.
    """
    mpiexec = find_mpiexec()
    if mpiexec is None:
        raise FileNotFoundError(f"no mpiexec beside {sys.executable} and none on PATH")
    return _job([mpiexec, *mpiexec_flags(mpiexec), "-n", str(ranks)], ranks, arguments, timeout, env)


def torchrun(
    ranks: int,
    arguments: Sequence[str | Path],
    *,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """`mpirun`, started by torchrun instead."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return _job([*launcher, "--no-python"], ranks, arguments, timeout, env)


def _job(
    launcher: Sequence[str],
    ranks: int,
    arguments: Sequence[str | Path],
    timeout: float,
    env: Mapping[str, str] | None,
) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, *map(str, arguments)]
    with (
        tempfile.TemporaryDirectory() as outputs,
        _appended(outputs, "out") as out,
        _appended(outputs, "err") as err,
    ):
        job = subprocess.Popen(
            [*launcher, "sh", "-c", TO_FILES, outputs, *arguments],
            cwd=REPOSITORY,
            env={**SHARED_CORES, **os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
        try:
            job.wait(timeout)
        except BaseException as reason:  # out of time, Ctrl-C, or a test's own time limit
            _kill(job)
            if isinstance(reason, subprocess.TimeoutExpired):
                printed = _content(out) + _content(err)
                raise TimeoutError(f"{ranks} ranks of {arguments} killed after {timeout} s\n{printed}") from None
            raise
        return subprocess.CompletedProcess(job.args, job.returncode, _content(out), _content(err))


def _kill(job: subprocess.Popen[bytes]) -> None:
    """End the launcher's process group. Ranks have groups of their own: they go when their launcher does."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(job.pid, number)
            job.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            break


def _appended(directory: str, name: str) -> TextIO:
    return open(Path(directory, name), "a+", errors="replace")


def _content(file: TextIO) -> str:
    file.seek(0)
    return file.read()
