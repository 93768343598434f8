"""Starts a job, breaks one of its ranks at some moment, and judges what became of the others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from break_peers_verdict import names
from vcluster_job import mpiexec

HOWS = ("stop", "kill", "raise", "silent", "interrupt")
LAUNCHERS = ("mpiexec", "torchrun", "none")
_SIGNALS = {
    "stop": signal.SIGSTOP,
    "kill": signal.SIGKILL,
    "raise": signal.SIGUSR1,
    "silent": signal.SIGUSR1,
    "interrupt": signal.SIGINT,
}
_WORKER = Path(__file__).with_name("break_worker.py")
_START_SECONDS = 120.0
_MARGIN_SECONDS = 2.0  # beyond the timeout
_AT_ONCE_SECONDS = 10.0  # for a launcher that ends the job, on a busy machine
_STUBBORN_SECONDS = 120.0  # torchrun gives a stopped rank 30 s before it kills it
_GONE_SECONDS = 5.0


@dataclass(frozen=True)
class Case:
    """What is to be done to a job. moment: seconds after all its ranks are at work."""

    launcher: str
    how: str
    ranks: int
    victim: int
    moment: float
    seed: int
    timeout: float


@dataclass(frozen=True)
class Outcome:
    """What came of it. raised_s: the longest that a survivor waited until it raised; ended_s: until all was over."""

    case: Case
    ending: str  # "raised": every survivor did; "ended": the launcher ended the job first
    raised_s: float | None
    ended_s: float
    status: int
    says: str  # one survivor's, or for "interrupt" the victim's, words
    fault: str  # what is not as it must be

    def record(self) -> dict[str, Any]:
        """For JSON."""
        told = asdict(self)
        return {**told.pop("case"), **told}


def break_one(case: Case) -> Outcome:
    """Run a job, and do it."""
    with tempfile.TemporaryDirectory() as place:
        job = _Job(case, Path(place))
        try:
            return _broken(job)
        finally:
            job.end()


class _Job:
    """The processes, and what they noted."""

    def __init__(self, case: Case, room: Path) -> None:
        self.case, self.room = case, room
        self._out = open(room / "out", "w+")  # noqa: SIM115 - closed by `end`
        options = ["--how", case.how, "--victim", case.victim, "--launcher", case.launcher, "--seed", case.seed]
        work = [sys.executable, _WORKER, room, *options, "--timeout", case.timeout]
        self._processes = [
            subprocess.Popen(
                [str(part) for part in (*launch, *work)],
                env={**_environment(), **more},
                stdin=subprocess.DEVNULL,
                stdout=self._out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for launch, more in _launches(case)
        ]

    def notes(self, rank: int) -> list[dict[str, Any]]:
        """What a rank has told so far; it may be in the middle of a line."""
        path = self.room / f"rank{rank}"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def noted(self, rank: int, key: str) -> dict[str, Any] | None:
        """The first note of that kind."""
        return next((note for note in self.notes(rank) if key in note), None)

    def pids(self) -> list[int]:
        """Of the ranks, when all are at work."""
        return [note["ready"] for rank in range(self.case.ranks) if (note := self.noted(rank, "ready"))]

    def over(self) -> bool:
        """Whether all that was started directly has ended; without a launcher: but the victim."""
        left = [process for process in self._processes if process.poll() is None]
        return not left or (self.case.launcher == "none" and left == [self._processes[self.case.victim]])

    def status(self) -> int:
        """The launcher's exit status; without one that of a survivor."""
        last = self._processes[-1 if self.case.victim != self.case.ranks - 1 else 0]
        return last.poll() or 0

    def printed(self) -> str:
        """By anyone."""
        self._out.seek(0)
        return self._out.read()

    def end(self) -> None:
        """Leave nothing running."""
        for pid in (*self.pids(), *(process.pid for process in self._processes if process.poll() is None)):
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()
        self._out.close()


def _launches(case: Case) -> list[tuple[Sequence[str], dict[str, str]]]:
    """What starts ranks, and with which variables."""
    if case.launcher == "mpiexec":
        return [((mpiexec(), "-n", str(case.ranks)), {})]
    if case.launcher == "torchrun":
        run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
        return [([*run, "--no-python"], {})]
    return [((), {"BREAK_RANK": str(rank), "BREAK_SIZE": str(case.ranks)}) for rank in range(case.ranks)]


def _environment() -> dict[str, str]:
    """Ranks outnumber cores: one thread each, and an MPICH rank that waits gives its core away."""
    ours = {"OMP_NUM_THREADS": "1", "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1"}
    outer = ("PMI_", "TORCHELASTIC_", "OMPI_", "TASP_COLL_TOPOLOGY")
    return {**ours, **{name: value for name, value in os.environ.items() if not name.startswith(outer)}}


def alive(pid: int) -> bool:
    """Whether a process runs, or is stopped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _broken(job: _Job) -> Outcome:
    case = job.case
    _until(lambda: len(job.pids()) == case.ranks or job.over(), _START_SECONDS)
    pids = job.pids()
    if len(pids) < case.ranks:
        raise RuntimeError(f"the job did not start: {job.printed()}")
    time.sleep(case.moment)
    begun = time.monotonic()
    os.kill(pids[case.victim], _SIGNALS[case.how])
    survivors = [rank for rank in range(case.ranks) if rank != case.victim]
    limit = case.timeout + _MARGIN_SECONDS + _AT_ONCE_SECONDS
    _until(lambda: job.over() or all(job.noted(rank, "error") for rank in survivors), limit)
    in_time = _until(job.over, _STUBBORN_SECONDS)
    ended = time.monotonic() - begun
    gone = _until(lambda: not any(alive(pids[rank]) for rank in _left(case)), _GONE_SECONDS)
    errors = {rank: note for rank in survivors if (note := job.noted(rank, "error"))}
    raised = max((note["took"] for note in errors.values()), default=None)
    told = (job.noted(case.victim, "error") if case.how == "interrupt" else None) or next(iter(errors.values()), {})
    stays = "" if in_time and gone else "ranks are left" if in_time else "the job did not end"
    return Outcome(
        case,
        "raised" if len(errors) == len(survivors) else "ended",
        raised,
        ended,
        job.status(),
        str(told.get("message", "")),
        stays or _fault(job, errors, ended),
    )


def _left(case: Case) -> list[int]:
    """The ranks that must be gone at the end: without a launcher nobody ends one that is stopped or asleep."""
    return [rank for rank in range(case.ranks) if case.launcher != "none" or rank != case.victim]


def _fault(job: _Job, errors: dict[int, dict[str, Any]], ended: float) -> str:
    case = job.case
    for rank in range(case.ranks):
        if wrong := job.noted(rank, "wrong"):
            return f"rank {rank} got wrong data: {wrong['wrong']}"
    if not job.status():
        return "the exit status says that all is well"
    for rank, note in errors.items():
        late = case.timeout + _MARGIN_SECONDS
        if case.how in ("stop", "silent") and (note["error"] != "PeerTimeoutError" or note["peers"] != [case.victim]):
            return f"rank {rank} does not blame rank {case.victim}: {note['error']}: {note['message']}"
        if note["error"] not in ("PeerTimeoutError", "CollectiveError") or note["usable"]:
            return f"rank {rank} raised {note['error']}: {note['message']}"
        if note["took"] > late:
            return f"rank {rank} waited for {note['took']:.1f} s"
        if not names(note["message"], [case.victim]) and case.how != "interrupt":
            return f"rank {rank} does not name rank {case.victim}: {note['message']}"
    if len(errors) < case.ranks - 1 and (case.how in ("stop", "silent") or ended > _AT_ONCE_SECONDS):
        return f"{case.ranks - 1 - len(errors)} survivors raised nothing, and the job ended after {ended:.1f} s"
    return _interrupted(job) if case.how == "interrupt" else ""


def _interrupted(job: _Job) -> str:
    """What must be so at the rank that got Ctrl-C."""
    note = job.noted(job.case.victim, "error")
    if note is None:
        return "" if job.status() else "nothing came of the interrupt"
    if note["error"] != "KeyboardInterrupt" and "KeyboardInterrupt" not in note["message"]:
        return f"the interrupt came out as {note['error']}: {note['message']}"
    if not note["usable"] and "cannot be used any more" not in note.get("says", ""):
        return f"the communicator does not say why it cannot be used: {note}"
    return ""


def _until(done: Any, limit: float) -> bool:
    """Wait; whether it came true in time."""
    deadline = time.monotonic() + limit
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True
