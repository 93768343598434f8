"""From a schedule to one rank's program: which bytes each message takes, and what has to happen before it.

A gather goes straight into the result, a reduce-scatter (`reduce_programs`) through staging memory; in the step-wise
forms (`slabs`) the caller consumes what arrives, or fills what leaves, one step at a time. A received chunk is sent on
from where it lies.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import accumulate
from typing import Generic, NamedTuple, TypeVar

from tasp_coll.executor import Builder, Node, Piece, Place, Program
from tasp_coll.layouts import Key
from tasp_coll.schedule import Schedule, cut

ALIGN = 64  # bytes: a cache line, and a multiple of every item size that can be reduced
HALVED = 1 << 16  # bytes from which a chunk on a ring travels as two messages
WINDOW = 8  # receives posted ahead on a lane; more only lengthen MPI's queues

Move = tuple[int, bool, int, Key, int]  # step, send, peer, key, lane
U = TypeVar("U")


@dataclass(frozen=True)
class Cuts:
    """Where each origin's shard begins in a rank-major buffer, and where its chunks are, in bytes."""

    starts: tuple[int, ...]
    bounds: tuple[tuple[int, ...], ...]

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        sizes: Sequence[int],
        unit: int,
        rule: Callable[[int, Sequence[Fraction]], tuple[int, ...]],
    ) -> Cuts:
        """sizes: units (elements, rows) of each rank's shard, `unit` bytes each; `rule` cuts them by weights."""
        known = {size: tuple(at * unit for at in rule(size, schedule.weights)) for size in set(sizes)}
        return cls((0, *accumulate(size * unit for size in sizes)), tuple(known[size] for size in sizes))

    def nbytes(self, key: Key) -> int:
        """Length of a chunk."""
        origin, chunk = key
        return self.bounds[origin][chunk + 1] - self.bounds[origin][chunk]

    def in_shard(self, region: str, key: Key) -> Place:
        """The chunk's place in a region that holds its origin's shard alone."""
        origin, chunk = key
        return Place(region, self.bounds[origin][chunk], self.nbytes(key))

    def in_all(self, region: str, key: Key) -> Place:
        """The chunk's place in a region that holds all shards."""
        origin, chunk = key
        return Place(region, self.starts[origin] + self.bounds[origin][chunk], self.nbytes(key))


def moves(schedule: Schedule, rank: int, cuts: Cuts) -> list[Move]:
    """The rank's messages that are not empty, in the order of steps."""
    found = []
    sends, receives = schedule.pattern.moves(rank)
    for is_send, rows in ((False, receives), (True, sends)):  # what is expected when it comes need not be put aside
        for step, peer, origin, chunk, ring in rows.tolist():
            if cuts.nbytes((origin, chunk)):
                found.append((step, is_send, peer, (origin, chunk), ring))
    found.sort(key=lambda move: move[0])
    return found


def gather_program(schedule: Schedule, rank: int, sizes: Sequence[int]) -> Program:
    """AllGather from "send" (this rank's shard) into "recv" (all shards, rank-major). sizes: bytes of each shard.

    The rank's own shard is not copied: that is the caller's.
    """
    cuts = Cuts.of(schedule, sizes, 1, partial(cut, align=ALIGN))
    builder = Builder()
    arrived: dict[Place, int] = {}
    lanes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step, is_send, peer, key, lane in moves(schedule, rank, cuts):
        whole = cuts.in_shard("send", key) if key[0] == rank else cuts.in_all("recv", key)
        for place in _halves(whole) if schedule.rings else (whole,):
            if is_send:
                source = None if key[0] == rank else arrived[place]
                node = Node(step, peer, lane, True, place, relays=source)
                builder.add(node, () if source is None else (source,))
                continue
            earlier = lanes[peer, lane]
            node = Node(step, peer, lane, False, place)
            arrived[place] = builder.add(node, earlier[-WINDOW : 1 - WINDOW] if len(earlier) >= WINDOW else ())
            earlier.append(arrived[place])
    return builder.build()


def _halves(whole: Place) -> tuple[Place, ...]:
    """A large chunk as two messages: on a ring one is handed on while the other arrives, so that no link has to wait
    for the software between two steps."""
    if whole.nbytes < HALVED:
        return (whole,)
    half = whole.nbytes // 2 // ALIGN * ALIGN
    region, offset, nbytes = whole
    return Place(region, offset, half), Place(region, offset + half, nbytes - half)


def all_to_all_program(schedule: Schedule, rank: int, block: int) -> Program:
    """Block d of "send" goes to rank d; "recv" gets rank o's at place o. block: bytes. The own block: the caller's."""
    builder = Builder()
    arrived: dict[Key, tuple[int, Place]] = {}
    cuts = Cuts.of(schedule, [block * schedule.ranks] * schedule.ranks, 1, cut)
    for step, is_send, peer, key, lane in moves(schedule, rank, cuts):
        origin, target = key
        if not is_send:
            here = target == rank
            place = Place("recv", origin * block, block) if here else Place("stage", builder.stage(block), block)
            arrived[key] = builder.add(Node(step, peer, lane, False, place)), place
        elif origin == rank:
            builder.add(Node(step, peer, lane, True, Place("send", target * block, block)))
        else:
            source, place = arrived[key]
            builder.add(Node(step, peer, lane, True, place, relays=source), (source,))
    return builder.build()


def kept_gather_program(schedule: Schedule, rank: int, cuts: Cuts, row_bytes: int) -> Program:
    """AllGather step by step, as `slabs.gather_steps_program`, of chunks that are wanted for many steps."""
    builder = Builder()
    arrived: dict[Key, tuple[int, Place]] = {}
    forwards: dict[Key, list[int]] = defaultdict(list)
    layout: list[list[Piece]] = [[] for _ in range(schedule.pattern.steps + 1)]
    for key in own_keys(schedule, rank, cuts):
        layout[0].append(piece(schedule, cuts, row_bytes, key, cuts.in_shard("send", key)))
    listed = moves(schedule, rank, cuts)
    last = {key: step for step, is_send, _, key, _ in listed if is_send}
    slots: Slots[tuple[int, Key]] = Slots(
        builder,
        (
            Use(peer, lane, step, last.get(key, step), cuts.nbytes(key))
            for step, is_send, peer, key, lane in listed
            if not is_send
        ),
    )
    for step, is_send, peer, key, lane in listed:
        if is_send:
            own = key[0] == rank
            source, place = (None, cuts.in_shard("send", key)) if own else arrived[key]
            node = Node(step, peer, lane, True, place, relays=source)
            forwards[key].append(builder.add(node, () if source is None else (source,)))
            continue
        offset, before = slots.take(peer, lane, step, (step, key))
        place = Place("stage", offset, cuts.nbytes(key))
        after = []
        if before is not None:
            old_step, old_key = before
            after = [builder.gate(("release", old_step + 1), old_step), *forwards[old_key]]
        arrived[key] = builder.add(Node(step, peer, lane, False, place), after), place
        builder.mark(("arrived", step + 1), arrived[key][0])
        layout[step + 1].append(piece(schedule, cuts, row_bytes, key, place))
    return builder.build(layout)


def own_keys(schedule: Schedule, rank: int, cuts: Cuts) -> list[Key]:
    """The chunks of the rank's own shard that are not empty."""
    return [(rank, chunk) for chunk in range(schedule.chunks) if cuts.nbytes((rank, chunk))]


def piece(schedule: Schedule, cuts: Cuts, row_bytes: int, key: Key, place: Place) -> Piece:
    """A chunk as callers see it: rows, and where they lie."""
    origin, chunk = key
    start, stop = (at // row_bytes for at in cuts.bounds[origin][chunk : chunk + 2])
    return Piece(origin, chunk if schedule.rings else 0, start, stop, place)


class Use(NamedTuple):
    """A receive that is staged: from whom, on which lane, at which step; after step `last` nobody wants it."""

    peer: int
    lane: int
    step: int
    last: int
    nbytes: int


class Slots(Generic[U]):
    """Staging for receives. Each lane has slots of its own, as few as do.

    A receive takes a slot over from one that is two or more steps older, so that one can arrive while the caller has
    the other, and that is not wanted from its own step on. What waits for what then never goes back in steps, so that
    nothing waits in a circle.
    """

    def __init__(self, builder: Builder, uses: Iterable[Use]) -> None:
        lanes: dict[tuple[int, int], list[list[Use]]] = defaultdict(list)
        for use in sorted(uses, key=lambda use: use.step):
            slots = lanes[use.peer, use.lane]
            idle = [slot for slot in slots if slot[-1].last < use.step and slot[-1].step <= use.step - 2]
            slot = min(idle, key=lambda slot: slot[-1].step, default=None)
            if slot is None:
                slots.append([use])
            else:
                slot.append(use)
        self._places: dict[tuple[int, int, int], tuple[int, int | None]] = {}
        for (peer, lane), slots in lanes.items():
            for slot in slots:
                offset, before = builder.stage(max(use.nbytes for use in slot)), None
                for use in slot:
                    self._places[peer, lane, use.step] = offset, before
                    before = use.step
        self._users: dict[tuple[int, int, int], U] = {}

    def take(self, peer: int, lane: int, step: int, user: U) -> tuple[int, U | None]:
        """The offset of a receive's slot, and the `user` given for the receive that had it before."""
        self._users[peer, lane, step] = user
        offset, before = self._places[peer, lane, step]
        return offset, None if before is None else self._users[peer, lane, before]
