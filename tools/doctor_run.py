"""Runs the probes of doctor.py, all at once, each with a time limit, and finds what needs no probe."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import IO, Any

RANKS = 2
PACKAGES = ("tasp_coll", "numpy", "mpi4py", "torch", "cupy", "jax", "matplotlib", "tqdm")
_NAMES = {
    "tasp_coll": ("tasp-coll",),
    "cupy": ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-5-0", "cupy-rocm-7-0"),
}
_ALONE = ("imports", "mpi", "cupy", "torch", "smi", "nvml", "cluster")
_SCRIPT = Path(__file__).with_name("doctor_probes.py")
_RAISED = re.compile(r"[A-Za-z_][\w.]*(Error|Exception): ")
_FAILED = re.compile("error|abort", re.IGNORECASE)
_GRACE_S = 3.0  # what a probe gets to clean up after SIGTERM, before SIGKILL


@dataclass(frozen=True)
class Answer:
    """What a probe said: `said` has a dictionary from each of its processes. `fault`: why there is not more."""

    said: tuple[dict[str, Any], ...] = ()
    fault: str = ""

    @property
    def facts(self) -> dict[str, Any]:
        """Of a probe that is one process; empty if it failed."""
        return {} if self.fault or not self.said else self.said[0]

    @property
    def missing(self) -> str:
        """What the probe did not find; empty if it did, or failed."""
        return str(self.facts.get("missing", ""))

    @property
    def wrong(self) -> str:
        """What is broken, whether the probe died of it or told it."""
        return self.fault or str(self.facts.get("fault", ""))


@dataclass(frozen=True)
class Launcher:
    """A command that starts ranks, where it was found, and what the ranks that it started said.

    kind: whose it is, "Open MPI" or "MPICH" (or of its family); empty if it does not say.
    """

    path: str
    where: str
    answer: Answer = Answer()
    flags: tuple[str, ...] = ()
    kind: str = ""


@dataclass(frozen=True)
class Findings:
    """All that was found on this machine. packages: versions by name, several of a package that is there twice."""

    python: str
    executable: str
    packages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    answers: dict[str, Answer] = field(default_factory=dict)
    launchers: tuple[Launcher, ...] = ()
    torchrun: str | None = None
    srun: str | None = None

    def __getitem__(self, probe: str) -> Answer:
        return self.answers[probe]


def look(timeout: float) -> Findings:
    """Find out all there is to know, with `timeout` seconds for each probe."""
    launchers = find_launchers(timeout)
    python = [sys.executable, str(_SCRIPT)]
    commands = [[*python, name] for name in _ALONE]
    commands += [[each.path, *each.flags, "-n", str(RANKS), *python, "world"] for each in launchers]
    answers = ask(commands, timeout)
    worlds = answers[len(_ALONE) :]
    return Findings(
        python=sys.version.split()[0],
        executable=sys.executable,
        packages={name: versions(name) for name in PACKAGES},
        answers=dict(zip(_ALONE, answers, strict=False)),
        launchers=tuple(replace(each, answer=answer) for each, answer in zip(launchers, worlds, strict=True)),
        torchrun=_beside_python("torchrun") or shutil.which("torchrun"),
        srun=shutil.which("srun"),
    )


def versions(package: str) -> tuple[str, ...]:
    """The installed versions of a package, by its metadata: nothing is loaded."""
    found = []
    for name in _NAMES.get(package, (package,)):
        with suppress(metadata.PackageNotFoundError):
            version = metadata.version(name)
            found.append(f"{name} {version}" if package == "cupy" else version)
    return tuple(found)


def find_launchers(timeout: float) -> list[Launcher]:
    """The mpiexec of this interpreter's environment, and the one on PATH if that is another."""
    places = (("beside python", _beside_python), ("on PATH", shutil.which))
    found: list[Launcher] = []
    for where, search in places:
        path = search("mpiexec") or search("mpirun")
        if path is not None and not any(os.path.samefile(path, other.path) for other in found):
            kind = _kind(path, timeout)
            found.append(Launcher(path, where, flags=_flags(kind), kind=kind))
    return found


def ask(commands: Sequence[Sequence[str]], timeout: float) -> list[Answer]:
    """Run all commands at the same time; what each said. None outlives this call."""
    running: list[subprocess.Popen[str]] = []
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        pool = stack.enter_context(ThreadPoolExecutor(max(1, len(commands))))
        try:
            waiting = []
            for number, command in enumerate(commands):
                errors = stack.enter_context(open(Path(directory, str(number)), "w+", errors="replace"))
                running.append(_start(command, errors))
                waiting.append(pool.submit(_answer, running[-1], errors, timeout))
            return [each.result() for each in waiting]
        finally:  # before the pool waits for its threads
            for job in running:
                _kill(job)


def _start(command: Sequence[str], errors: IO[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        errors="replace",
        start_new_session=True,  # so that all that it starts can be ended with it
    )


def _answer(job: subprocess.Popen[str], errors: IO[str], timeout: float) -> Answer:
    """What a job said; why it failed is in its last line of stderr."""
    try:
        out = job.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        _kill(job)
        return Answer(fault=f"no answer within {timeout:g} s (--timeout)")
    said = tuple(each for line in out.splitlines() if (each := _parsed(line)) is not None)
    if job.returncode == 0 and said:
        return Answer(said)
    errors.seek(0)
    why, end = _last_line(errors.read()), _end(job.returncode)
    if not why:
        return Answer(said, end)
    return Answer(said, f"{why} ({end})" if job.returncode < 0 else why)


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of ours; launchers print lines of their own."""
    with suppress(ValueError, RecursionError):
        if isinstance(found := json.loads(line), dict):
            return found
    return None


def _last_line(text: str) -> str:
    """The last line; better the last that tells of an error, for launchers say more after it, and less."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" \t-=*")]
    raised = [line for line in lines if _RAISED.match(line)] or [line for line in lines if _FAILED.search(line)]
    return (raised or lines or [""])[-1]


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"ended by {signal.Signals(-status).name}"


def _kill(job: subprocess.Popen[str]) -> None:
    """End a job and all that it started: ranks have groups of their own, and go when their launcher does."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if job.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(job.pid, number)
        with suppress(subprocess.TimeoutExpired):
            job.wait(_GRACE_S)


def _beside_python(name: str) -> str | None:
    return shutil.which(name, path=str(Path(sys.executable).parent))


def _kind(mpiexec: str, timeout: float) -> str:
    """Whose launcher this is, as it says itself."""
    ask_it = [mpiexec, "--version"]
    try:
        told = subprocess.run(ask_it, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if "Open MPI" in told or "OpenRTE" in told:
        return "Open MPI"
    return "MPICH" if "hydra" in told.lower() else ""


def _flags(kind: str) -> tuple[str, ...]:
    """What Open MPI needs as root, and on fewer cores than ranks; the others need nothing."""
    if kind != "Open MPI":
        return ()
    root = ("--allow-run-as-root",) if os.geteuid() == 0 else ()
    return (*root, "--oversubscribe") if (os.cpu_count() or 1) < RANKS else root
