"""Starts one MPI rank on each host of a virtual cluster, and waits for them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import IO

from tasp_coll import ArgumentError
from tasp_coll.topology import ENVIRONMENT
from vcluster_room import MissingError, Room, tool
from vcluster_wiring import RANK_DEVICE, Wiring

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_S = 3.0  # what ranks get to clean up after a signal
# MPICH over TCP between hosts that it must not take for one. Ranks outnumber cores: one that waits gives its core away.
_SETTINGS = {
    "MPIR_CVAR_NOLOCAL": "1",
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "MPIR_CVAR_POLLS_BEFORE_YIELD": "1",
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    "FI_PROVIDER": "tcp",
    "OMP_NUM_THREADS": "1",
}


class Stopped(Exception):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        self.number = number
        super().__init__(signal.Signals(number).name)

    @property
    def status(self) -> int:
        """The exit status of a process that a signal ended, as shells give it."""
        return 128 + self.number


@contextmanager
def signals_stop() -> Iterator[None]:
    """The first signal to end raises Stopped; later ones are ignored, as all is being taken down."""

    def stop(number: int, _: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stopped_by(error: BaseException | None) -> Stopped | None:
    """The signal during whose handling an error came up, if there was one."""
    while error is not None and not isinstance(error, Stopped):
        error = error.__context__
    return error


def mpiexec() -> str:
    """The mpiexec of this interpreter's environment, else the first on PATH; MissingError unless it is MPICH's."""
    beside = Path(sys.executable).parent / "mpiexec"
    found = str(beside) if beside.exists() else shutil.which("mpiexec")
    if found is None:
        raise MissingError(f"no mpiexec beside {sys.executable} and none on PATH: pip install 'tasp-coll[mpich]'")
    version = subprocess.run([found, "--version"], capture_output=True, text=True)
    if "HYDRA" not in version.stdout:
        raise MissingError(f"{found} is not MPICH's, which alone comes up across namespaces: pip install mpich")
    return found


def command_of(launcher: str, wiring: Wiring, command: Sequence[str]) -> list[str]:
    """The command that starts `command` on every host, for running in the room."""
    if ":" in command:
        raise ArgumentError("COMMAND must not have ':' as an argument: mpiexec takes it as the end of the command")
    ranks: list[str] = []
    for rank in range(wiring.topology.ranks):
        ranks += [":"] if ranks else []
        ranks += ["-n", "1", *on_host(wiring, rank, command)]
    return [launcher, "-launcher", "fork", *ranks]


def on_host(wiring: Wiring, rank: int, command: Sequence[str]) -> list[str]:
    """The command that runs `command` on a host, from within the room."""
    return [tool("ip"), "netns", "exec", wiring.namespace(rank), *command]


def environment(wiring: Wiring, topology_file: Path) -> dict[str, str]:
    """What ranks find in their environment: this process's own, which wins, and what MPI needs here."""
    devices = {"FI_TCP_IFACE": RANK_DEVICE, "GLOO_SOCKET_IFNAME": RANK_DEVICE}
    settings = {**_SETTINGS, **devices, "MPIR_CVAR_NUM_CLIQUES": str(wiring.topology.ranks)}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return {**settings, **os.environ, "PATH": path, ENVIRONMENT: str(topology_file)}


def run(room: Room, command: Sequence[str], variables: dict[str, str]) -> int:
    """Run a command in the room; its exit status. Stopped: after the ranks got the signal and some time."""
    with started(room, command, variables) as job:
        return exit_status(job.wait())


@contextmanager
def started(
    room: Room, command: Sequence[str], variables: dict[str, str], output: IO[bytes] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command that runs in the room. What is left of it when this context ends, by an error, is ended too; by
    Stopped, after the ranks got the signal and some time. output: what it prints goes there."""
    job = subprocess.Popen(
        room.entering_here(command), env=variables, stdout=output, stderr=output, start_new_session=True
    )
    try:
        yield job
    except BaseException as reason:
        room.signal(signal.Signals(reason.number) if isinstance(reason, Stopped) else signal.SIGKILL)
        try:
            job.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            job.kill()
            job.wait()
        raise


def exit_status(returned: int) -> int:
    """What Popen returned, as shells give it."""
    return returned if returned >= 0 else 128 - returned
