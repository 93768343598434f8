"""From a schedule to one rank's program: which bytes each message takes, and what has to happen before it.

Four programs: a gather straight into the result, a reduce-scatter through staging memory, and the two step-wise
forms in which the caller consumes what arrives, or fills what leaves, one step at a time. A received chunk is sent on
from where it lies. Staging is two chunks for each lane: one in use, one arriving.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from tasp_coll.executor import Action, Builder, Exchange, Node, Piece, Place, Program
from tasp_coll.reduction import Reduction
from tasp_coll.schedule import Schedule, cut

ALIGN = 64  # bytes: a cache line, and a multiple of every item size that can be reduced
WINDOW = 8  # receives posted ahead on a lane; more only lengthen MPI's queues

Key = tuple[int, int]  # origin, chunk


@dataclass(frozen=True)
class Cuts:
    """Where each origin's shard begins in a rank-major buffer, and where its chunks are, in bytes."""

    starts: tuple[int, ...]
    bounds: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, schedule: Schedule, sizes: Sequence[int], unit: int, align: int) -> Cuts:
        """sizes: units (elements, rows) of each rank's shard, `unit` bytes each; chunks begin at multiples of align."""
        known = {size: tuple(at * unit for at in cut(size, schedule.weights, align)) for size in set(sizes)}
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


def _moves(schedule: Schedule, rank: int, cuts: Cuts) -> list[tuple[int, bool, int, Key, int]]:
    """The rank's messages that are not empty, in the order of steps: (step, send, peer, key, lane)."""
    found = []
    for is_send, rows in zip((True, False), schedule.pattern.moves(rank), strict=True):
        for step, peer, origin, chunk, ring in rows.tolist():
            if cuts.nbytes((origin, chunk)):
                found.append((step, is_send, peer, (origin, chunk), ring))
    found.sort(key=lambda move: move[0])
    return found


def gather_program(schedule: Schedule, rank: int, sizes: Sequence[int]) -> Program:
    """AllGather from "send" (this rank's shard) into "recv" (all shards, rank-major). sizes: bytes of each shard.

    The rank's own shard is not copied: that is the caller's, while messages travel.
    """
    cuts = Cuts.of(schedule, sizes, 1, ALIGN)
    builder = Builder()
    arrived: dict[Key, int] = {}
    lanes: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step, is_send, peer, key, lane in _moves(schedule, rank, cuts):
        place = cuts.in_shard("send", key) if key[0] == rank else cuts.in_all("recv", key)
        node = Node(step, peer, lane, is_send, place)
        if is_send:
            builder.add(node, () if key[0] == rank else (arrived[key],))
            continue
        earlier = lanes[peer, lane]
        arrived[key] = builder.add(node, earlier[-WINDOW : 1 - WINDOW] if len(earlier) >= WINDOW else ())
        earlier.append(arrived[key])
    return builder.build()


def all_to_all_program(schedule: Schedule, rank: int, block: int) -> Program:
    """Block d of "send" goes to rank d; "recv" gets rank o's block at place o. block: bytes. Own block: the caller's."""
    builder = Builder()
    arrived: dict[Key, tuple[int, Place]] = {}
    cuts = Cuts.of(schedule, [block * schedule.ranks] * schedule.ranks, 1, 1)
    for step, is_send, peer, key, lane in _moves(schedule, rank, cuts):
        origin, target = key
        if not is_send:
            here = target == rank
            place = Place("recv", origin * block, block) if here else Place("stage", builder.stage(block), block)
            arrived[key] = builder.add(Node(step, peer, lane, False, place)), place
        elif origin == rank:
            builder.add(Node(step, peer, lane, True, Place("send", target * block, block)))
        else:
            source, place = arrived[key]
            builder.add(Node(step, peer, lane, True, place), (source,))
    return builder.build()


def gather_steps_program(schedule: Schedule, rank: int, rows: Sequence[int], row_bytes: int) -> Program:
    """AllGather whose arrivals lie in "stage" until the caller opens gate ("release", step). rows: of each shard.

    Mark ("arrived", step) holds the receives of a step. The layout has the rank's own shard first, then what each
    step brings.
    """
    cuts = Cuts.of(schedule, rows, row_bytes, 1)
    builder = Builder()
    arrived: dict[Key, tuple[int, Place]] = {}
    forwards: dict[Key, int] = {}
    layout: list[list[Piece]] = [[] for _ in range(schedule.pattern.steps + 1)]
    for key in _own_keys(schedule, rank, cuts):
        layout[0].append(_piece(schedule, cuts, row_bytes, key, cuts.in_shard("send", key)))
    moves = _moves(schedule, rank, cuts)
    slots = _Slots(builder, [(p, lane, cuts.nbytes(key)) for _, send, p, key, lane in moves if not send], 2)
    for step, is_send, peer, key, lane in moves:
        if is_send:
            own = key[0] == rank
            place = cuts.in_shard("send", key) if own else arrived[key][1]
            node = builder.add(Node(step, peer, lane, True, place), () if own else (arrived[key][0],))
            forwards[key] = node
            continue
        offset, before = slots.take(peer, lane, (step, key))
        place = Place("stage", offset, cuts.nbytes(key))
        after = []
        if before is not None:
            old_step, old_key = before
            after = [builder.gate(("release", old_step), old_step)]
            after += [forwards[old_key]] if old_key in forwards else []
        arrived[key] = builder.add(Node(step, peer, lane, False, place), after), place
        builder.mark(("arrived", step), arrived[key][0])
        layout[step + 1].append(_piece(schedule, cuts, row_bytes, key, place))
    return builder.build(layout)


def _own_keys(schedule: Schedule, rank: int, cuts: Cuts) -> list[Key]:
    return [(rank, chunk) for chunk in range(schedule.chunks) if cuts.nbytes((rank, chunk))]


def _piece(schedule: Schedule, cuts: Cuts, row_bytes: int, key: Key, place: Place) -> Piece:
    origin, chunk = key
    start, stop = (at // row_bytes for at in cuts.bounds[origin][chunk : chunk + 2])
    return Piece(origin, chunk if schedule.rings else 0, start, stop, place)


class _Slots:
    """Staging for receives: `window` slots for each lane in turn, as large as its largest message; None: one each."""

    def __init__(self, builder: Builder, messages: Sequence[tuple[int, int, int]], window: int | None) -> None:
        largest: dict[tuple[int, int], list[int]] = defaultdict(list)
        for peer, lane, nbytes in messages:
            largest[peer, lane].append(nbytes)
        self._offsets = {
            lane: [builder.stage(max(sizes)) for _ in range(min(window or len(sizes), len(sizes)))]
            for lane, sizes in largest.items()
        }
        self._users: dict[tuple[int, int], list[object]] = defaultdict(list)

    def take(self, peer: int, lane: int, user: object) -> tuple[int, object | None]:
        """The next slot's offset for `user`, and who had it before."""
        offsets, users = self._offsets[peer, lane], self._users[peer, lane]
        users.append(user)
        place = len(users) - 1
        before = users[place - len(offsets)] if place >= len(offsets) else None
        return offsets[place % len(offsets)], before


@dataclass
class _Target:
    """A sum that this rank takes part in: what it receives for it, and the send that passes it on (None: it is ours)."""

    receives: list[tuple[int, Place]] = field(default_factory=list)
    send: tuple[int, int, int] | None = None  # step, peer, lane


@dataclass(frozen=True)
class Own:
    """This rank's contribution to a sum: where it is, and the step that the caller fills it in (None: it is there)."""

    place: Place
    step: int | None = None


def reduce_program(schedule: Schedule, rank: int, counts: Sequence[int], how: Reduction) -> Program:
    """ReduceScatter of "send" (all ranks' shards, rank-major) into "recv" (this rank's). counts: elements of shards."""
    cuts = Cuts.of(schedule, counts, how.itemsize, max(ALIGN // how.itemsize, 1))
    return _ReduceCompiler(schedule, rank, cuts, how, lambda key: Own(cuts.in_all("send", key))).compile()


def reduce_steps_program(
    schedule: Schedule, rank: int, rows: Sequence[int], row_elements: int, how: Reduction
) -> Program:
    """ReduceScatter into "recv" whose contributions the caller writes into "stage", step by step, as the layout says.

    Gate ("fill", step) says that those of a step are there; mark ("used", step) that their memory is free again, for
    the next step but one. The last step, one more than the schedule has, is the rank's own shard.
    """
    row_bytes = row_elements * how.itemsize
    cuts = Cuts.of(schedule, rows, row_bytes, 1)
    steps: list[list[Key]] = [[] for _ in range(schedule.pattern.steps + 1)]
    for step, is_send, _, key, _ in _moves(schedule, rank, cuts):
        if is_send:
            steps[step].append(key)
    steps[-1] += _own_keys(schedule, rank, cuts)
    filled = {key: step for step, keys in enumerate(steps) for key in keys}
    half = max(sum(_aligned(cuts.nbytes(key)) for key in keys) for keys in steps)
    places: dict[Key, Place] = {}
    for step, keys in enumerate(steps):
        at = step % 2 * half
        for key in keys:
            places[key] = Place("stage", at, cuts.nbytes(key))
            at += _aligned(cuts.nbytes(key))
    compiler = _ReduceCompiler(schedule, rank, cuts, how, lambda key: Own(places[key], filled[key]))
    compiler.builder.stage(2 * half)  # first, so that the places above begin at 0
    return compiler.compile([[_piece(schedule, cuts, row_bytes, key, places[key]) for key in keys] for keys in steps])


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


class _ReduceCompiler:
    """Builds a reduce-scatter's program; `own` tells where this rank's contributions are."""

    def __init__(
        self, schedule: Schedule, rank: int, cuts: Cuts, how: Reduction, own: Callable[[Key], Own]
    ) -> None:
        self.schedule, self.rank, self.cuts, self.how, self.own = schedule, rank, cuts, how, own
        self.builder = Builder()
        # In a direct exchange contributions travel as they are; elsewhere partial sums do, in the wire's dtype.
        self.direct = schedule.algorithm == "direct"
        self.widening = how.itemsize != how.wire_itemsize
        self._used_by: dict[int, int] = {}  # receive -> node after which its slot is free

    def compile(self, layout: Sequence[Sequence[Piece]] = ()) -> Program:
        """The program."""
        targets: dict[Key, _Target] = defaultdict(_Target)
        for key in _own_keys(self.schedule, self.rank, self.cuts):
            targets[key] = _Target()
        reuse = self._add_receives(targets)
        for key, target in sorted(targets.items(), key=lambda item: self._order(item[1])):
            self._add_target(key, target)
        for receive, before in reuse:
            self.builder.wait(receive, self._used_by[before])
        return self.builder.build(layout)

    def _order(self, target: _Target) -> int:
        return self.schedule.pattern.steps if target.send is None else target.send[0]

    def _wire(self, key: Key) -> int:
        """Bytes of a chunk as it travels."""
        nbytes = self.cuts.nbytes(key)
        return nbytes if self.direct else nbytes // self.how.itemsize * self.how.wire_itemsize

    def _add_receives(self, targets: dict[Key, _Target]) -> list[tuple[int, int]]:
        """Add the receives, each with its slot; pairs (receive, the one that had its slot before)."""
        moves = _moves(self.schedule, self.rank, self.cuts)
        window = None if self.schedule.algorithm == "custom" else 2
        sizes = [(peer, lane, self._wire(key)) for _, is_send, peer, key, lane in moves if not is_send]
        slots = _Slots(self.builder, sizes, window)
        reuse = []
        for step, is_send, peer, key, lane in moves:
            if is_send:
                targets[key].send = (step, peer, lane)
                continue
            number = len(self.builder.nodes)
            offset, before = slots.take(peer, lane, number)
            place = Place("stage", offset, self._wire(key))
            self.builder.add(Node(step, peer, lane, False, place))
            targets[key].receives.append((number, place))
            if isinstance(before, int):
                reuse.append((number, before))
        return reuse

    def _add_target(self, key: Key, target: _Target) -> None:
        own = self.own(key)
        ready = [] if own.step is None else [self.builder.gate(("fill", own.step), own.step)]
        if target.send is None:
            self._add_owned(key, target, own, ready)
        elif target.receives:
            last = self._accumulate(target, own, ready)
            self._send_on(key, target, target.receives[0][1], last)
            if own.step is not None:
                self.builder.mark(("used", own.step), last[0])
        else:
            self._send_first(key, target, own, ready)

    def _send_first(self, key: Key, target: _Target, own: Own, ready: list[int]) -> None:
        """Nothing was received: what leaves is this rank's contribution alone."""
        place, after = own.place, ready
        if self.widening and not self.direct:
            place = Place("stage", self.builder.stage(self._wire(key)), self._wire(key))
            after = [self._act(ready, self._widen(place, own.place))]
        node = self._send_on(key, target, place, after)
        if own.step is not None:
            self.builder.mark(("used", own.step), node)

    def _send_on(self, key: Key, target: _Target, place: Place, after: list[int]) -> int:
        assert target.send is not None
        step, peer, lane = target.send
        node = self.builder.add(Node(step, peer, lane, True, Place(place.region, place.offset, self._wire(key))), after)
        if target.receives:
            self._used_by[target.receives[0][0]] = node
        return node

    def _accumulate(self, target: _Target, own: Own, ready: list[int]) -> list[int]:
        """Sum up in the slot of the first receive, in the order of the schedule; the node after which it is whole."""
        first, total = target.receives[0]
        last = self._act([first, *ready], self._combine(total, own.place))
        for receive, place in target.receives[1:]:
            last = self._act([last, receive], self._merge(total, place))
            self._used_by[receive] = last
        return [last]

    def _add_owned(self, key: Key, target: _Target, own: Own, ready: list[int]) -> None:
        result = self.cuts.in_shard("recv", key)
        if not target.receives:
            self._act(ready, self._copy(result, own.place))
            return
        if not self.direct:
            last = self._accumulate(target, own, ready)
            self._used_by[target.receives[0][0]] = self._act(last, self._finish(result, target.receives[0][1]))
            return
        # Direct: every peer's contribution is merged as soon as its turn comes, so that slots are free early.
        total = result
        if self.widening or own.step is not None:
            nbytes = self.cuts.nbytes(key) // self.how.itemsize * self.how.wire_itemsize
            total = Place("stage", self.builder.stage(nbytes), nbytes)
        pieces = [(place, [receive], receive) for receive, place in target.receives]
        # Last where the caller has yet to fill it, else first: the result may lie on it.
        mine = (own.place, ready, -1)
        pieces = [*pieces, mine] if own.step is not None else [mine, *pieces]
        last: list[int] = []
        for number, (place, after, receive) in enumerate(pieces):
            action = self._combine(total, place) if number else self._widen(total, place)
            last = [self._act([*last, *after], action)]
            if receive >= 0:
                self._used_by[receive] = last[0]
        self._act(last, self._finish(result, total))

    def _act(self, after: Sequence[int], action: Action) -> int:
        return self.builder.add(Node(self.schedule.pattern.steps, action=action), after)

    def _combine(self, total: Place, contribution: Place) -> Action:
        how, count = self.how, contribution.nbytes // self.how.itemsize
        return lambda at: how.combine(at.address(total), at.address(contribution), count)

    def _merge(self, total: Place, partial: Place) -> Action:
        how, count = self.how, partial.nbytes // self.how.wire_itemsize
        return lambda at: how.merge(at.address(total), at.address(partial), count)

    def _widen(self, total: Place, contribution: Place) -> Action:
        how, count = self.how, contribution.nbytes // self.how.itemsize
        return lambda at: how.widen(at.address(total), at.address(contribution), count)

    def _finish(self, result: Place, total: Place) -> Action:
        how, count = self.how, result.nbytes // self.how.itemsize
        return lambda at: how.finish(at.address(result), at.address(total), count)

    def _copy(self, result: Place, contribution: Place) -> Action:
        """The sum over one rank."""
        
        def act(at: Exchange) -> None:
            ctypes.memmove(at.address(result), at.address(contribution), result.nbytes)

        return act
