"""Programs of collectives that go step by step, in which what one step brings lies together.

A chunk that comes at one step leaves at the next, or stays. So two slabs that take turns are enough, with the chunks
of a step one after another without gaps; the mirror image, in which sums come home, needs no more. What comes into a
slab waits for those who had just these bytes before, which are always those of earlier steps: nothing waits in a
circle.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tasp_coll.executor import Builder, Exchange, Node, Piece, Place, Program
from tasp_coll.layouts import Key, chunks_by_step
from tasp_coll.programs import Cuts, Move, kept_gather_program, moves, piece
from tasp_coll.reduction import HOST, Memory
from tasp_coll.schedule import ANYWHERE, Grain, Schedule

Keys = list[list[Key]]  # per step of the caller


@dataclass(frozen=True)
class Clear:
    """An action that sets a place to zero, whoever's memory it is in."""

    place: Place

    def __call__(self, at: Exchange) -> None:
        """In host memory."""
        self.run(at.address, HOST)

    def run(self, address: Callable[[Place], int], memory: Memory) -> None:
        """In the memory that `address` finds places in."""
        memory.clear(address(self.place), self.place.nbytes)


def gather_steps_program(
    schedule: Schedule, rank: int, rows: Sequence[int], row_bytes: int, donate: bool = False, grain: Grain = ANYWHERE
) -> Program:
    """AllGather whose arrivals lie in "stage" until the caller opens gate ("release", arrival). rows: of each shard.

    Mark ("arrived", arrival) holds the receives of an arrival. Arrival 0 is the rank's own shard, in "send", then
    comes what each step brings. donate: "send" is ours, so that the arrivals that it has room for lie there. grain:
    how shards are cut.
    """
    cuts = Cuts.of(schedule, rows, row_bytes, grain.cut)
    if schedule.algorithm == "hierarchical":  # chunks leave many steps later
        return kept_gather_program(schedule, rank, cuts, row_bytes)
    listed = moves(schedule, rank, cuts)
    leaves = {key: step for step, is_send, _, key, _ in listed if is_send}
    arrivals = handled(schedule, rank, cuts)
    regions = ["send"] + ["stage"] * (len(arrivals) - 1)
    if donate and all(leaves.get(key, 0) == 0 for key in arrivals[0]):
        room = _length(cuts, arrivals[0])
        if all(_length(cuts, keys) <= room for keys in arrivals[2::2]):
            regions[::2] = ["send"] * len(regions[::2])
    relay = _Relay(schedule, cuts, arrivals, regions)
    relay.carry(listed, "release")
    return relay.build(row_bytes)


def accumulate_steps_program(
    schedule: Schedule, rank: int, rows: Sequence[int], row_bytes: int, grain: Grain = ANYWHERE
) -> Program:
    """ReduceScatter on rings in which the caller adds to what came, in place, and the program only moves bytes.

    Request t lies in "stage", the last one in "recv"; mark ("arrived", t) says that what the ranks before added up is
    there, gate ("fill", t) that the caller has added its own. Request 0 begins with zeros: mark ("free", 0).
    """
    cuts = Cuts.of(schedule, rows, row_bytes, grain.cut)
    requests = handled(schedule, rank, cuts)
    relay = _Relay(schedule, cuts, requests, ["stage"] * (len(requests) - 1) + ["recv"])
    relay.clear(requests[0])
    relay.carry(moves(schedule, rank, cuts), "fill")
    return relay.build(row_bytes)


def handled(schedule: Schedule, rank: int, cuts: Cuts) -> Keys:
    """The chunks that the caller handles at each step, without empty ones, sorted."""
    steps = chunks_by_step(schedule.pattern, rank, schedule.chunks, schedule.collective == "allgather")
    return [[key for key in keys if cuts.nbytes(key)] for keys in steps]


def slabs(builder: Builder, cuts: Cuts, steps: Keys, regions: Sequence[str]) -> dict[Key, Place]:
    """Places of the chunks of each step, one after another: in two alternating slabs of "stage", or from the
    beginning of another region."""
    sizes = [0, 0]
    for step, keys in enumerate(steps):
        if regions[step] == "stage":
            sizes[step % 2] = max(sizes[step % 2], _length(cuts, keys))
    begin = [builder.stage(size) for size in sizes]
    places: dict[Key, Place] = {}
    for step, keys in enumerate(steps):
        at = begin[step % 2] if regions[step] == "stage" else 0
        for key in keys:
            places[key] = Place(regions[step], at, cuts.nbytes(key))
            at += cuts.nbytes(key)
    return places


def layout(schedule: Schedule, cuts: Cuts, row_bytes: int, steps: Keys, places: dict[Key, Place]) -> list[list[Piece]]:
    """What the caller sees of them."""
    return [[piece(schedule, cuts, row_bytes, key, places[key]) for key in keys] for keys in steps]


def _length(cuts: Cuts, keys: Sequence[Key]) -> int:
    return sum(cuts.nbytes(key) for key in keys)


class _Relay:
    """Builds a program in which what comes into a slab leaves at the next step, or stays."""

    def __init__(self, schedule: Schedule, cuts: Cuts, steps: Keys, regions: Sequence[str]) -> None:
        self.schedule, self.cuts, self.steps, self.regions = schedule, cuts, steps, regions
        self.builder = Builder()
        self.places = slabs(self.builder, cuts, steps, regions)
        self._writer: dict[Key, int] = {}
        self._readers: dict[Key, list[int]] = {}
        self._held: dict[tuple[str, int], list[tuple[int, Key]]] = {}  # of a slab: (offset, chunk), by offset
        self._settle(0)

    def clear(self, keys: Sequence[Key]) -> None:
        """Set chunks that lie together to zero, first of all."""
        if not keys:
            return
        region, offset, _ = self.places[keys[0]]
        node = self.builder.add(Node(0, action=Clear(Place(region, offset, _length(self.cuts, keys)))))
        self.builder.mark(("free", 0), node)
        self._writer.update((key, node) for key in keys)

    def carry(self, listed: Sequence[Move], gate: str) -> None:
        """Add the messages. gate: what the caller says, "release" of what came, or "fill", before it leaves."""
        builder = self.builder
        for number, (step, is_send, peer, key, lane) in enumerate(listed):
            if is_send:
                after = [self._writer[key]] if key in self._writer else []
                relays = self._writer.get(key)
                if gate == "fill":
                    after.append(builder.gate((gate, step), step))
                    relays = None  # the caller has added something
                node = Node(step, peer, lane, True, self.places[key], relays=relays)
                self._readers.setdefault(key, []).append(builder.add(node, after))
                continue
            before = self._before(step + 1, key)
            if before and gate == "release":
                before.append(builder.gate((gate, step - 1), step - 1))
            self._writer[key] = builder.add(Node(step, peer, lane, False, self.places[key]), before)
            builder.mark(("arrived", step + 1), self._writer[key])
            if number + 1 == len(listed) or listed[number + 1][:2] != (step, False):
                self._settle(step + 1)

    def _before(self, step: int, key: Key) -> list[int]:
        """Who reads, or else writes, what was in the chunk's place until now."""
        held, place = self._held.get(self._slab(step), []), self.places[key]
        found: list[int] = []
        first = bisect_right(held, place.offset, key=lambda entry: entry[0]) - 1
        for at in range(max(first, 0), len(held)):
            offset, old = held[at]
            if offset >= place.offset + place.nbytes:
                break
            if self._end(old) > place.offset:
                found += self._readers.get(old) or [self._writer[old]]
        return found

    def _settle(self, step: int) -> None:
        """The chunks of a step have its slab now; of those before it remains what lies further on."""
        new = [(self.places[key].offset, key) for key in self.steps[step]]
        if new:
            slab, end = self._slab(step), self._end(new[-1][1])
            old = [(max(at, end), key) for at, key in self._held.get(slab, []) if self._end(key) > end]
            self._held[slab] = new + old

    def build(self, row_bytes: int) -> Program:
        """The program."""
        return self.builder.build(layout(self.schedule, self.cuts, row_bytes, self.steps, self.places))

    def _slab(self, step: int) -> tuple[str, int]:
        region = self.regions[step]
        return region, step % 2 if region == "stage" else 0

    def _end(self, key: Key) -> int:
        return self.places[key].offset + self.places[key].nbytes
