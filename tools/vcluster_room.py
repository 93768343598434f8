"""The room that a virtual cluster lives in: a mount, network and process namespace of its own.

All of a cluster is inside: its named network namespaces, its interfaces, its processes. The kernel clears everything
away when the room's first process ends, and that one ends when the runner closes a pipe to it, or is killed: nothing
can be left behind. Without root the room is in a user namespace as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# The first process. Its own number as others see it, while /proc is still theirs; a /run of its own, where ip keeps
# names; a /proc of its own (where forbidden, the old one will do). Then it waits, for "keep" or for the pipe's end.
_FIRST = """
read -r pid rest </proc/self/stat
mount -t tmpfs tmpfs /run || exit
mount -t proc proc /proc 2>/dev/null
echo "$pid"
read -r word
if [ "$word" = keep ]; then exec >/dev/null 2>&1; sleep infinity; fi
"""
_NAMESPACES = ("--net", "--mount", "--pid", "--fork")
_AS_ROOT = ("--user", "--map-root-user")
_SYSTEM = "/usr/sbin:/sbin:/usr/local/sbin"  # where ip and tc are, which users may not have on PATH
_TOOLS = {
    "unshare": "util-linux",
    "nsenter": "util-linux",
    "mount": "util-linux",
    "ip": "iproute2",
    "tc": "iproute2",
    "bridge": "iproute2",
}
CLOSE_S = 5.0


class MissingError(Exception):
    """This machine cannot hold a virtual cluster; the message says what is missing."""


class RoomError(Exception):
    """A command inside the room failed."""


@dataclass(frozen=True)
class Room:
    """A room by the number of its first process. `user`: it is in a user namespace."""

    pid: int
    user: bool

    def entering(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` inside."""
        user = ["--user", "--preserve-credentials"] if self.user else []
        return [tool("nsenter"), "--target", str(self.pid), *user, "--mount", "--net", "--pid", "--", *command]

    def entering_here(self, command: Sequence[str]) -> list[str]:
        """The same, in this process's working directory, which entering a mount namespace would leave."""
        return self.entering(["sh", "-c", 'cd -- "$0" && exec "$@"', os.getcwd(), *command])

    def call(self, command: Sequence[str], lines: str = "") -> str:
        """Run a command inside, with `lines` as its input; its output. RoomError says why it failed."""
        done = subprocess.run(self.entering(command), input=lines, capture_output=True, text=True)
        if done.returncode:
            raise RoomError(f"{' '.join(command)}: {done.stderr.strip() or f'status {done.returncode}'}")
        return done.stdout

    def batch(self, name: str, lines: Sequence[str], namespace: str | None = None) -> None:
        """Give lines to `ip -batch` or `tc -batch`, in a network namespace of the room."""
        if lines:
            where = ["-netns", namespace] if namespace else []
            self.call([tool(name), *where, "-batch", "-"], "\n".join(lines) + "\n")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all processes inside but the first."""
        with suppress(RoomError, MissingError):
            self.call(["sh", "-c", f"kill -{int(number)} -1"])

    def destroy(self) -> None:
        """End all that is inside, whoever started it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def tool(name: str) -> str:
    """Path of a system tool."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:{_SYSTEM}")
    if found is None:
        raise MissingError(f"there is no '{name}' on this machine: install {_TOOLS.get(name, name)}")
    return found


@contextmanager
def opened() -> Iterator[tuple[Room, subprocess.Popen[str]]]:
    """A new room, and the process that holds it: it ends with this context, and with this process, unless kept."""
    for name in _TOOLS:
        tool(name)
    denied = ""
    for user in (False, True) if os.geteuid() == 0 else (True,):
        holder = _hold(_AS_ROOT if user else ())
        told = holder.stdout.readline().strip() if holder.stdout else ""
        if told.isdecimal():
            room = Room(int(told), user)
            try:
                yield room, holder
            finally:
                _release(room, holder)
            return
        denied += f"; {'in a user namespace' if user else 'as root'}: {told}"
        with holder:
            pass
    raise MissingError(f"namespaces are forbidden here{denied}{_advice()}")


def keep(holder: subprocess.Popen[str]) -> None:
    """Let a room outlive this process."""
    if holder.stdin:
        holder.stdin.write("keep\n")
        holder.stdin.close()


def _hold(more: Sequence[str]) -> subprocess.Popen[str]:
    """Start a room. Its holder prints the number of the room's first process, or why there is none."""
    return subprocess.Popen(
        [tool("unshare"), *more, *_NAMESPACES, "sh", "-c", _FIRST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # Ctrl-C is for the runner, which then ends the room
    )


def _release(room: Room, holder: subprocess.Popen[str]) -> None:
    """End a room that is not kept."""
    if holder.stdin is None or holder.stdin.closed:
        return
    holder.stdin.close()
    try:
        holder.wait(CLOSE_S)
    except subprocess.TimeoutExpired:
        room.destroy()
        holder.wait()


def _advice() -> str:
    """What of this machine's settings forbids namespaces."""
    told = ""
    for name, wanted in (
        ("kernel/unprivileged_userns_clone", "1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "0"),
    ):
        with suppress(OSError):
            if (value := Path("/proc/sys", name).read_text().strip()) != wanted:
                told += f"; /proc/sys/{name} is {value}, {wanted} would allow them"
    with suppress(OSError):
        if Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0":
            told += "; /proc/sys/user/max_user_namespaces is 0, 1000 would allow them"
    return f"{told}; else run as root, in a container with --cap-add SYS_ADMIN --cap-add NET_ADMIN"


def python(script: Path) -> list[str]:
    """The command for a script of ours that needs nothing but the standard library."""
    return [sys.executable, "-I", "-S", str(script)]
