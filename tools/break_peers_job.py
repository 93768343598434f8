"""Runs one case of break_peers.py in a job of its own, and leaves nothing of it behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import vcluster_faults
import vcluster_job
import virtual_cluster
from break_peers_cases import DETAIL, FAULT_S, GLOO, LINK, LINK_MBIT, RANKS, Case, Ran, Seen
from break_peers_worker import write
from vcluster_options import parse
from vcluster_room import MissingError, RoomError

TOPOLOGY = f"full_mesh:{RANKS}"
START_S = 120.0  # until all ranks are ready, on a machine that has other things to do
_POLL_S = 0.02
_LOG_CHARS = 2000
_SLOWER = 10.0
_TOKEN = "TASP_COLL_BREAK_PEERS"  # in the environment of all of a job's processes, by which they are found again
_WORKER = Path(__file__).with_name("break_peers_worker.py")
_SHARED_CORES = {"OMP_NUM_THREADS": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}


@dataclass(frozen=True)
class Limits:
    """timeout: given to the libraries that take one. limit: until a rank that has not answered is said to hang."""

    timeout: float
    limit: float
    nbytes: int


@dataclass(frozen=True)
class Site:
    """Where a job runs: its command and environment, and how its link is broken."""

    command: list[str]
    variables: dict[str, str]
    break_link: Callable[[], object]


def run(case: Case, system: str, limits: Limits) -> Ran:
    """Start the ranks, break what is to be broken, and wait until all witnesses have spoken or the time is up."""
    with tempfile.TemporaryDirectory(prefix="break_peers_") as at:
        place = Path(at)
        try:
            with _site(case, system, limits, place) as site, open(place / "log", "wb") as log:
                job = subprocess.Popen(
                    site.command,
                    env={**site.variables, _TOKEN: at},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that Ctrl-C is for this process, which then ends the job
                )
                try:
                    return _watch(job, case, site, limits, place)
                finally:
                    _end(job, at)
        except (MissingError, RoomError) as error:
            return Ran(trouble=str(error), skipped=True)


def _watch(job: subprocess.Popen[bytes], case: Case, site: Site, limits: Limits, place: Path) -> Ran:
    ready = [place / f"ready.{rank}" for rank in range(RANKS)]
    if not _wait(lambda: all(path.exists() for path in ready), job, START_S):
        return Ran(trouble=_log(place).rpartition("\n")[2] or "no rank was ready in time")
    began = time.monotonic()
    write(place / "go", began)
    if case.fault:
        began += FAULT_S
    if case.on_cluster:
        time.sleep(FAULT_S)
        site.break_link()
    seen = [place / f"seen.{rank}" for rank in case.witnesses]
    _wait(lambda: all(path.exists() for path in seen), job, limits.limit + FAULT_S)
    status = job.poll()
    told = [Seen(**json.loads(path.read_text())) for path in seen if path.exists()]
    ended = None if status is None else time.monotonic()
    return Ran(told, began, ended, status or 0, _log(place))


def _log(place: Path) -> str:
    return (place / "log").read_text(errors="replace").strip()[-_LOG_CHARS:]


def _wait(done: Callable[[], bool], job: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait until something is done; False if the job ended or the time is up before."""
    deadline = time.monotonic() + seconds
    while not done():
        if job.poll() is not None or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


@contextmanager
def _site(case: Case, system: str, limits: Limits, place: Path) -> Iterator[Site]:
    """Shared memory, or a cluster that ends with this context. MissingError: this machine cannot."""
    nbytes = limits.nbytes if case.nbytes is None else case.nbytes
    seconds = (limits.timeout, limits.limit, START_S)
    worker = [sys.executable, str(_WORKER), system, case.name, str(place), *map(str, (nbytes, *seconds))]
    detail = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"} if system == DETAIL else {}
    variables = {**_SHARED_CORES, **os.environ, **detail}
    if not case.on_cluster:
        yield Site([*_launcher(case, system), *worker], variables, lambda: None)
        return
    launcher = vcluster_job.mpiexec()
    wanted = ["up", "--topology", TOPOLOGY, "--link-mbit", f"{LINK_MBIT:g}", "--goodput", "0.98", "--quiet"]
    with virtual_cluster.built(parse(wanted)[0], stays=False) as (cluster, room):
        wiring, (a, b) = cluster.wiring(), map(str, LINK)
        fault, amount = case.fault, _SLOWER if case.fault == "slower" else None
        yield Site(
            room.entering_here(vcluster_job.command_of(launcher, wiring, worker)),
            {**vcluster_job.environment(wiring, cluster.topology_file), **detail},
            lambda: vcluster_faults.inflict(cluster, a, b, fault, amount, one_way=False),
        )


def _launcher(case: Case, system: str) -> Sequence[str]:
    """The launcher that users of a system have, where it matters: where a rank dies."""
    if system in (GLOO, DETAIL) and case.fault == "kill":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
        return [*torchrun, "--no-python"]
    return [vcluster_job.mpiexec(), "-n", str(RANKS)]


def _end(job: subprocess.Popen[bytes], token: str) -> None:
    """End all of a job's processes, also those whose launcher was killed, and those that are stopped."""
    with suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    while found := processes(token):
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    job.wait()


def processes(token: str) -> list[int]:
    """This user's processes that belong to a job; where there is no /proc, none are found, and launchers must do."""
    entry, found = f"{_TOKEN}={token}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found
