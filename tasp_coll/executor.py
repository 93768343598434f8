"""One rank's side of a schedule: operations that start as soon as what they wait for has happened.

A `Program` is compiled once from a schedule and has places instead of addresses; bound to the addresses of a call it
is an `Exchange`, whose prepared operations are reused while addresses repeat; a `Flow` is one run of an exchange.
Rings move independently: an operation waits for the ones it depends on, never for a step of the whole schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter
from typing import NamedTuple

from tasp_coll.transport import Batch, Op, Transport

Action = Callable[["Exchange"], None]


class Place(NamedTuple):
    """`nbytes` bytes at `offset` of a memory region: the caller's "send" or "recv", or our own "stage"."""

    region: str
    offset: int
    nbytes: int


class Piece(NamedTuple):
    """Rows start..stop of a rank's shard, on a ring, and where they lie: what a caller gets or fills at a step."""

    source: int
    ring: int
    start: int
    stop: int
    place: Place


@dataclass(frozen=True)
class Node:
    """One thing that happens in a program: a message (`place` is set), or a point that others wait for."""

    step: int
    peer: int = -1
    lane: int = -1
    send: bool = False
    place: Place | None = None
    action: Action | None = None  # runs on completion, before those that wait for it may go on
    relays: int | None = None  # of a send: the receive whose bytes it passes on as they came


@dataclass(frozen=True)
class Program:
    """Nodes and who waits for whom. `waits[i]`: how many nodes i waits for; `feeds[i]`: who waits for i.

    `gates`: nodes that complete when the caller says so (`Flow.open`), by name. `marks`: groups of nodes that a
    caller may wait for, by name. `stage_bytes`: staging memory. `layout`: of step-wise programs, what the caller
    handles at each step.
    """

    nodes: tuple[Node, ...]
    waits: tuple[int, ...]
    feeds: tuple[tuple[int, ...], ...]
    stage_bytes: int = 0
    gates: dict[object, int] = field(default_factory=dict)
    marks: dict[object, tuple[int, ...]] = field(default_factory=dict)
    layout: tuple[tuple[Piece, ...], ...] = ()

    @cached_property
    def groups(self) -> dict[int, object]:
        """The mark that a node belongs to."""
        return {index: name for name, group in self.marks.items() for index in group}

    @cached_property
    def stretches(self) -> tuple[Place | None, ...]:
        """Where all that the caller handles at a step lies one after another; None where it does not."""
        return tuple(_together([piece.place for piece in pieces]) for pieces in self.layout)

    @cached_property
    def free_running(self) -> bool:
        """Nothing waits for anything, and nobody for a part: all operations can start at once."""
        return not self.gates and not self.marks and not any(self.waits) and all(n.action is None for n in self.nodes)


def _together(places: Sequence[Place]) -> Place | None:
    if not places:
        return Place("stage", 0, 0)
    region, at = places[0][:2]
    for place in places:
        if place[:2] != (region, at):
            return None
        at += place.nbytes
    return Place(region, places[0].offset, at - places[0].offset)


class Builder:
    """Collects nodes and edges. Messages of one lane are started in the order in which they are added."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self._after: list[list[int]] = []
        self._gates: dict[object, int] = {}
        self._marks: dict[object, list[int]] = {}
        self._staged = 0

    def add(self, node: Node, after: Iterable[int] = ()) -> int:
        """Add a node that waits for the nodes `after`; its number."""
        self.nodes.append(node)
        self._after.append(list(after))
        return len(self.nodes) - 1

    def wait(self, index: int, for_node: int) -> None:
        """Node `index` also waits for `for_node`."""
        self._after[index].append(for_node)

    def gate(self, name: object, step: int) -> int:
        """A node that completes when the caller opens it."""
        if name not in self._gates:
            self._gates[name] = self.add(Node(step))
        return self._gates[name]

    def mark(self, name: object, index: int) -> None:
        """Add a node to a group that the caller can wait for."""
        self._marks.setdefault(name, []).append(index)

    def stage(self, nbytes: int) -> int:
        """Reserve staging memory; its offset, aligned to cache lines."""
        offset = self._staged
        self._staged += -(-nbytes // 64) * 64
        return offset

    def build(self, layout: Sequence[Sequence[Piece]] = ()) -> Program:
        """The finished program."""
        feeds: list[list[int]] = [[] for _ in self.nodes]
        for index, sources in enumerate(self._after):
            for source in sources:
                feeds[source].append(index)
        waits = tuple(len(sources) for sources in self._after)
        marks = {name: tuple(group) for name, group in self._marks.items()}
        return Program(
            tuple(self.nodes),
            waits,
            tuple(map(tuple, feeds)),
            self._staged,
            dict(self._gates),
            marks,
            tuple(tuple(sorted(pieces)) for pieces in layout),
        )


class Exchange:
    """A program bound to addresses. `address(place)` tells where a place is; reusable, one flow at a time."""

    def __init__(self, program: Program, transport: Transport, bases: dict[str, int], slot: int, slots: int) -> None:
        self.program, self._bases = program, bases
        self.faults: list[tuple[int, ...]] = []  # that actions found in the run of now
        self.messages = [i for i, node in enumerate(program.nodes) if node.place is not None]
        ops = []
        for index in self.messages:
            node = program.nodes[index]
            assert node.place is not None
            lane = (node.lane + 1) * slots + slot  # below are the lanes of agreements
            ops.append(Op(node.send, node.peer, lane, self.address(node.place), node.place.nbytes))
        self.batch: Batch = transport.prepare(ops)
        self.number = {index: op for op, index in enumerate(self.messages)}

    def address(self, place: Place) -> int:
        """Where the place's first byte is."""
        return self._bases[place.region] + place.offset

    def free(self) -> None:
        """Release the prepared operations."""
        self.batch.free()


class Flow:
    """One run of an exchange. `poll` makes progress; `done` says that all nodes are complete.

    `began` and `ended`: by mark, `time.perf_counter()` when the first of its messages was started, and when all of its
    nodes were complete.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        program = exchange.program
        self.done = False
        self.began: dict[object, float] = {}
        self.ended: dict[object, float] = {}
        self._bulk = program.free_running
        self._under_way = 0  # messages
        if self._bulk:
            exchange.batch.start_all()
            return
        self.complete = [False] * len(program.nodes)
        self._waits = list(program.waits)
        exchange.faults.clear()
        self._left = len(program.nodes)
        self._groups = program.groups
        self._unmet = {name: len(group) for name, group in program.marks.items()}
        self._lanes = _lanes(program)
        self._ready: list[int] = []
        gates = set(program.gates.values())
        for index in [i for i, waits in enumerate(program.waits) if not waits and i not in gates]:
            self._reach(index)
        self._start()

    def open(self, gate: object) -> None:
        """Complete a gate, if the program has it."""
        index = self.exchange.program.gates.get(gate)
        if index is not None and not self.complete[index]:
            self._complete(index)
            self._start()

    def reached(self, mark: object) -> bool:
        """Whether all nodes of a group are complete."""
        return mark in self.ended or mark not in self.exchange.program.marks

    def early(self, *marks: object) -> float | None:
        """Seconds since all of these groups are complete: 0 if they are not; None where there is none of them."""
        if not all(map(self.reached, marks)):
            return 0.0
        ended = [self.ended[mark] for mark in marks if mark in self.ended]
        return perf_counter() - max(ended) if ended else None

    @property
    def resting(self) -> bool:
        """Whether nothing is under way until the caller opens a gate."""
        return not (self._bulk or self._under_way or self.done)

    def poll(self) -> bool:
        """Make progress; whether there was any."""
        if self._bulk:
            self.done = self.exchange.batch.test_all()
            return self.done
        found = self.exchange.batch.test_some()
        self._under_way -= len(found)
        for op in found:
            self._complete(self.exchange.messages[op])
        self._start()
        return bool(found)

    def pending(self) -> tuple[set[int], int | None]:
        """Peers of the messages that are under way, and the step of the earliest."""
        nodes = [self.exchange.program.nodes[self.exchange.messages[op]] for op in self.exchange.batch.pending()]
        return {node.peer for node in nodes}, min((node.step for node in nodes), default=None)

    def _reach(self, index: int) -> None:
        """All that node `index` waited for has happened."""
        node = self.exchange.program.nodes[index]
        if node.place is None:
            self._complete(index)
        else:
            lane = self._lanes[(node.send, node.peer, node.lane)]
            lane.allow(index, self._ready)

    def _complete(self, index: int) -> None:
        """A node has happened, and with it all points that waited for it alone: as many as there are ranks."""
        program, happened = self.exchange.program, [index]
        while happened:
            index = happened.pop()
            node = program.nodes[index]
            self.complete[index] = True
            self._left -= 1
            if index in self._groups:
                self._count(self._groups[index])
            if node.action is not None:
                node.action(self.exchange)
            for follower in program.feeds[index]:
                self._waits[follower] -= 1
                if not self._waits[follower]:
                    if program.nodes[follower].place is None:
                        happened.append(follower)
                    else:
                        self._reach(follower)
        self.done = not self._left

    def _count(self, mark: object) -> None:
        self._unmet[mark] -= 1
        if not self._unmet[mark]:
            self.ended[mark] = perf_counter()

    def _start(self) -> None:
        if self._ready:
            ready, self._ready = self._ready, []
            if self._groups:
                now = perf_counter()
                for index in ready:
                    self.began.setdefault(self._groups.get(index), now)
            self._under_way += len(ready)
            self.exchange.batch.start([self.exchange.number[index] for index in ready])


class _Lane:
    """Starts the messages of one lane in order."""

    def __init__(self) -> None:
        self.order: list[int] = []
        self._next = 0
        self._allowed: set[int] = set()

    def allow(self, index: int, ready: list[int]) -> None:
        self._allowed.add(index)
        while self._next < len(self.order) and self.order[self._next] in self._allowed:
            ready.append(self.order[self._next])
            self._next += 1


def _lanes(program: Program) -> dict[tuple[bool, int, int], _Lane]:
    lanes: dict[tuple[bool, int, int], _Lane] = {}
    for index, node in enumerate(program.nodes):
        if node.place is not None:
            lanes.setdefault((node.send, node.peer, node.lane), _Lane()).order.append(index)
    return lanes
