"""Which virtual clusters there are: a directory for each, with what is needed to enter, change and end it.

A cluster whose room is gone is garbage, and so is one whose runner is gone; whoever looks next clears it away.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tasp_coll import ArgumentError, Topology
from tasp_coll.files import read_json, writing
from vcluster_room import Room
from vcluster_wiring import Settings, Wiring

_STATE, _NOMINAL, DELIVERED = "cluster.json", "nominal.json", "topology.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_FIRST_NAMES = 10_000


@dataclass(frozen=True)
class Process:
    """A process by its number and the time of its start, which tell it from a later one of the same number."""

    pid: int
    started: int

    def __post_init__(self) -> None:
        if not all(type(number) is int and number > 0 for number in (self.pid, self.started)):
            raise ArgumentError(f"a process has a number and a time of start, got {self.pid!r} and {self.started!r}")

    @staticmethod
    def of(pid: int) -> Process | None:
        """The process of this number, if it is alive."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else Process(pid, int(fields[19]))

    @property
    def alive(self) -> bool:
        """Whether it still runs."""
        return Process.of(self.pid) == self


@dataclass(frozen=True)
class Cluster:
    """One virtual cluster. `owner`: its runner, None once it stands by itself; `room`: None while it is made."""

    name: str
    spec: str
    settings: Settings
    owner: Process | None
    room: Process | None = None
    user: bool = False

    @property
    def directory(self) -> Path:
        """Where its files are."""
        return directory() / self.name

    @property
    def topology_file(self) -> Path:
        """The file that ranks are given: the topology with the rates that its links deliver."""
        return self.directory / DELIVERED

    @property
    def alive(self) -> bool:
        """Whether it is there, or being made; False: garbage."""
        if self.owner is not None:
            return self.owner.alive
        return self.room is not None and self.room.alive

    def wiring(self) -> Wiring:
        """What it is made of."""
        return Wiring(Topology.from_file(self.directory / _NOMINAL), self.settings)

    def enter(self) -> Room:
        """Its room; ArgumentError if it is still being made."""
        if self.room is None:
            raise ArgumentError(f"cluster {self.name!r} is not ready yet")
        return Room(self.room.pid, self.user)

    def moved_in(self, room: Room, *, stays: bool) -> Cluster:
        """Note the room; a cluster that stays has no owner from now on."""
        changed = replace(self, room=Process.of(room.pid), user=room.user, owner=None if stays else self.owner)
        changed._write(changed.directory)
        return changed

    def remove(self) -> None:
        """End what is still alive of it, and forget it."""
        if self.room is not None and self.room.alive:
            self.enter().destroy()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write(self, where: Path) -> None:
        with writing(where / _STATE) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")


def directory() -> Path:
    """Where all clusters of this user are noted; TASP_COLL_CLUSTERS names another place."""
    # Not XDG_RUNTIME_DIR: a room has a /run of its own, and the ranks need the topology file.
    default = Path(tempfile.gettempdir()) / f"tasp-coll-clusters-{os.getuid()}"
    path = Path(os.environ.get("TASP_COLL_CLUSTERS") or default)
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.is_symlink() or path.stat().st_uid != os.getuid():
        raise ArgumentError(f"{path} must be a directory of user {os.getuid()}: remove it, or set TASP_COLL_CLUSTERS")
    return path.resolve()


def claim(name: str | None, topology: Topology, settings: Settings) -> Cluster:
    """A new entry, owned by this process. A name that is taken is an error; without one the next free is found."""
    if name is not None and not _NAME.fullmatch(name):
        raise ArgumentError(f"--name must be letters, digits, '_', '-' and '.', 64 at most, got {name!r}")
    clusters()  # clear garbage, which may hold the name
    for candidate in [name] if name is not None else (f"c{number}" for number in range(1, _FIRST_NAMES)):
        cluster = Cluster(candidate, topology.name, settings, Process.of(os.getpid()))
        entered = False
        try:
            with tempfile.TemporaryDirectory(prefix=".new-", dir=directory()) as partial, suppress(OSError):
                cluster._write(Path(partial))
                topology.save(Path(partial) / _NOMINAL)
                os.rename(partial, cluster.directory)  # fails where there is one
                entered = True
                os.mkdir(partial)  # for the context to remove
            if entered:
                return cluster
        except BaseException:  # a signal, before anybody else could remove it
            if entered:
                cluster.remove()
            raise
    raise ArgumentError(f"there is a cluster {name!r} already: 'list' shows it, 'down {name}' ends it")


def clusters() -> list[Cluster]:
    """All clusters, by name; garbage is cleared away."""
    found = []
    for path in sorted(directory().iterdir()):
        if not (path / _STATE).exists():
            continue
        # Gone: another process has just removed it. Unreadable: another version of this tool made it.
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            cluster = _read(path / _STATE)
            if cluster.alive:
                found.append(cluster)
            else:
                cluster.remove()
    return found


def find(name: str | None) -> Cluster:
    """The cluster of this name, or the only one; ArgumentError says which there are."""
    there = clusters()
    chosen = [cluster for cluster in there if name in (None, cluster.name)]
    if len(chosen) == 1:
        return chosen[0]
    names = ", ".join(cluster.name for cluster in there) or "none"
    what = "--on must say which cluster is meant" if name is None and there else f"there is no cluster {name or ''}"
    raise ArgumentError(f"{what.strip()}; there are: {names}")


def _read(path: Path) -> Cluster:
    value = read_json(path)
    if value["name"] != path.parent.name:  # of which the directory is removed in the end
        raise ValueError(f"{path} is of another cluster, {value['name']!r}")
    owner, room = (Process(**value[key]) if value[key] else None for key in ("owner", "room"))
    return Cluster(**{**value, "settings": Settings(**value["settings"]), "owner": owner, "room": room})
