"""Which algorithm `auto` takes: built-in rules, or a table that `Communicator.tune` measured on this machine."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tasp_coll.decomposition import ring_neighbours
from tasp_coll.errors import ArgumentError
from tasp_coll.files import parse_json, read_bytes, writing
from tasp_coll.forecast import NATIVE, Case, Choice, choose, direct
from tasp_coll.hierarchical import MOST_SLICES
from tasp_coll.links import number_of
from tasp_coll.schedule import ALGORITHMS, plan
from tasp_coll.simulate import LINKS_ALONE, Costs
from tasp_coll.topology import Topology

TUNED_COLLECTIVES = ("allgather", "reduce_scatter", "allreduce")
_VERSION = 1
_SHARED = 8  # ranks on one host up to which the direct exchange was seen to win
_STEPWISE = 1 << 30  # bytes of a shard: so large that links decide alone


@dataclass(frozen=True)
class Situation:
    """What the built-in rules look at."""

    topology: Topology
    given: bool  # someone named the topology; else the full mesh is only a guess
    hosts: int
    native: bool  # has the transport collectives of its own
    shared: bool = False  # all ranks on one host, arrays in its memory


def rule(situation: Situation, collective: str, shard_bytes: int, half: bool, costs: Costs) -> Choice:
    """The built-in rule. half: a dtype whose sums travel in float32, which only the direct exchange avoids.

    On a topology that someone has described the model says what is fastest. Where nothing is known of the links the
    MPI library's own collective is the one to take. Between few ranks that share memory there are no links, and an
    allgather is copies that can go in any order: the direct exchange never waits for another rank's step. Small shards
    travel with the agreement, whatever this says.
    """
    topology, native = situation.topology, situation.native and not half
    if not situation.given:
        free = situation.shared and collective == "allgather" and topology.ranks <= _SHARED
        return Choice(NATIVE) if native and not free else direct(collective, topology.ranks)
    algorithms = (*ALGORITHMS, NATIVE) if native else ALGORITHMS
    return choose(Case(topology, collective, shard_bytes, algorithms, half, costs))


def stepwise(topology: Topology, algorithms: tuple[str, ...]) -> str:
    """The algorithm of collectives that go step by step: the best for the links, whatever the size and the direction.

    So an allgather in reverse and the reduce_scatter that is its mirror image agree on their steps, though their
    dtypes and sizes may differ.
    """
    known = tuple(name for name in algorithms if name in ALGORITHMS)
    return choose(Case(topology, "allgather", _STEPWISE, known)).algorithm


@dataclass(frozen=True)
class Chooser:
    """A measured table, the same on all ranks: per collective the shard sizes and the choice up to each of them.

    costs: what the model reckons with where nothing was measured.
    """

    table: tuple[tuple[str, int, Choice], ...] = ()
    costs: Costs = LINKS_ALONE

    def choose(self, situation: Situation, collective: str, shard_bytes: int, half: bool) -> Choice:
        """The measured choice for the nearest size not smaller, else the rule's."""
        rows = [row for row in self.table if row[0] == collective]
        if half or not rows:
            return rule(situation, collective, shard_bytes, half, self.costs)
        return next((choice for _, size, choice in rows if shard_bytes <= size), rows[-1][2])

    def dump(self) -> str:
        """As text. A cost without limit is left out: JSON has no infinity."""
        rows = [[collective, size, *choice] for collective, size, choice in self.table]
        costs = {name: value for name, value in asdict(self.costs).items() if math.isfinite(value)}
        return json.dumps({"version": _VERSION, "table": rows, "costs": costs})

    @classmethod
    def load(cls, text: str) -> Chooser:
        """From text; ArgumentError that says what is wrong with it."""
        try:
            found = parse_json(text)
            if found["version"] != _VERSION:
                raise ValueError(f"version {found['version']!r} is not {_VERSION}")
            return cls(tuple(_row(row) for row in found["table"]), _costs(found.get("costs", {})))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ArgumentError(f"the tuned table is not valid: {error}") from error


def _costs(told: dict[str, object]) -> Costs:
    numbers = {name: number_of(value) for name, value in told.items()}
    if None in numbers.values():
        raise ValueError(f"costs must be numbers, got {told!r}")
    return Costs(**numbers)  # type: ignore[arg-type]


def _row(row: Sequence[object]) -> tuple[str, int, Choice]:
    collective, size, algorithm, rings, slices = row
    numbers = (size, *(value for value in (rings, slices) if value is not None))
    if not all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in numbers):
        raise ValueError(f"numbers must be integers >= 0 in {row!r}")
    if collective not in TUNED_COLLECTIVES or algorithm not in (*ALGORITHMS, NATIVE):
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
        found = Chooser.load(read_bytes(path).decode("utf-8"))
        for choice in {choice for _, _, choice in found.table}:
            _check_choice(choice, topology)
        return found
    except (OSError, ValueError):  # ArgumentError, TopologyError and what is no UTF-8 are ValueErrors
        return Chooser()


def _check_choice(choice: Choice, topology: Topology) -> None:
    algorithm, rings, slices = choice
    if slices is not None and not 1 <= slices <= max(topology.ranks - 1, MOST_SLICES):
        raise ArgumentError(f"slices must be at least 1 and few, got {choice}")
    if algorithm in ("rings", "ring") and slices is None:
        ring_neighbours(topology, 0, rings)  # makes fewer rings than a plan would
    elif algorithm != NATIVE or (rings, slices) != (None, None):
        plan(topology, "allgather", algorithm, rings, slices=slices)


def write(path: Path, chooser: Chooser) -> None:
    """Keep a table; readers see all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with writing(path) as partial:
        partial.write_text(chooser.dump(), encoding="utf-8")
