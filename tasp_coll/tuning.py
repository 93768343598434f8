"""Which algorithm `auto` takes: built-in rules, or a table that `Communicator.tune` measured on this machine."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tasp_coll.decomposition import ring_neighbours
from tasp_coll.errors import ArgumentError, TopologyError
from tasp_coll.topology import Topology

TUNED_COLLECTIVES = ("allgather", "reduce_scatter", "allreduce")
_LARGE = 1 << 16  # bytes of a shard from which links, not latencies, decide
_VERSION = 1


class Choice(NamedTuple):
    """An algorithm and its parameters."""

    algorithm: str
    rings: int | None = None
    slices: int | None = None


@dataclass(frozen=True)
class Situation:
    """What the built-in rules look at."""

    topology: Topology
    given: bool  # someone named the topology; else the full mesh is only a guess
    hosts: int
    native: bool  # has the transport collectives of its own


def direct(collective: str, ranks: int) -> Choice:
    """The direct exchange: whole shards, but slices where sums are staged, so that memory stays at two shards."""
    return Choice("direct", None, 1 if collective == "allgather" else max(ranks - 1, 1))


def rule(situation: Situation, collective: str, shard_bytes: int, half: bool) -> Choice:
    """The built-in rule. half: a dtype whose sums travel in float32, which only the direct exchange avoids.

    On one switch a single ring is optimal. On a full mesh whose links someone has described rings use all of them.
    Where nothing is known of the links, or where there are none, as in shared memory, the MPI library's own collective
    is the one to take; small shards travel with the agreement, whatever this says.
    """
    ranks, topology = situation.topology.ranks, situation.topology
    plain = direct(collective, ranks)
    if not situation.given:
        return Choice("native") if situation.native and not half else plain
    if shard_bytes < _LARGE or half or ranks < 3:
        return plain
    if topology.is_single_switch:
        return Choice("ring")
    return Choice("rings") if topology.is_full_mesh else plain


@dataclass(frozen=True)
class Chooser:
    """A measured table, the same on all ranks: per collective the shard sizes and the choice up to each of them."""

    table: tuple[tuple[str, int, Choice], ...] = ()

    def choose(self, situation: Situation, collective: str, shard_bytes: int, half: bool) -> Choice:
        """The measured choice for the nearest size not smaller, else the rule's."""
        rows = [row for row in self.table if row[0] == collective]
        if half or not rows:
            return rule(situation, collective, shard_bytes, half)
        return next((choice for _, size, choice in rows if shard_bytes <= size), rows[-1][2])

    def dump(self) -> str:
        """As text."""
        rows = [[collective, size, *choice] for collective, size, choice in self.table]
        return json.dumps({"version": _VERSION, "table": rows})

    @classmethod
    def load(cls, text: str) -> Chooser:
        """From text; ArgumentError that says what is wrong with it."""
        try:
            found = json.loads(text)
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']!r} is not {_VERSION}")
            return cls(tuple(_row(row) for row in found["table"]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ArgumentError(f"the tuned table is not valid: {error}") from error


def _row(row: Sequence[object]) -> tuple[str, int, Choice]:
    collective, size, algorithm, rings, slices = row
    numbers = (size, *(value for value in (rings, slices) if value is not None))
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in numbers):
        raise ValueError(f"numbers must be integers >= 0 in {row!r}")
    if collective not in TUNED_COLLECTIVES or algorithm not in ("rings", "ring", "direct", "native"):
        raise ValueError(f"unknown collective or algorithm in {row!r}")
    return str(collective), int(str(size)), Choice(str(algorithm), rings, slices)  # type: ignore[arg-type]


def cache_file(situation: Situation, transport: str) -> Path:
    """Where the table for such a communicator is kept: TASP_COLL_CACHE, else the user's cache directory."""
    base = os.environ.get("TASP_COLL_CACHE") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"), "tasp_coll"
    )
    what = f"{situation.topology.fingerprint} {situation.given} {situation.hosts} {transport}"
    return Path(base) / f"tuned-{hashlib.blake2b(what.encode(), digest_size=8).hexdigest()}.json"


def read(path: Path, topology: Topology) -> Chooser:
    """The table in a file; an empty one if there is none, or if it cannot be used on this topology."""
    try:
        found = Chooser.load(path.read_text(encoding="utf-8"))
        for _, _, choice in found.table:
            _check_choice(choice, topology)
        return found
    except (OSError, ArgumentError, TopologyError, UnicodeError):
        return Chooser()


def _check_choice(choice: Choice, topology: Topology) -> None:
    algorithm, rings, slices = choice
    if algorithm in ("rings", "ring"):
        ring_neighbours(topology, 0, rings)
    elif rings is not None:
        raise ArgumentError(f"rings applies to algorithm 'rings' only, got {choice}")
    if slices is not None and not (algorithm == "direct" and 1 <= slices <= max(topology.ranks - 1, 1)):
        raise ArgumentError(f"slices applies to algorithm 'direct' only, up to one for each peer, got {choice}")


def write(path: Path, chooser: Chooser) -> None:
    """Keep a table; readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(chooser.dump(), encoding="utf-8")
    os.replace(partial, path)
