"""From a reduce-scatter's schedule to one rank's program: sums in staging memory, passed on as soon as they are whole.

The order in which contributions are added is that of the schedule, never that of arrival, so that results do not
change from run to run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

from tasp_coll.executor import Action, Builder, Exchange, Node, Piece, Place, Program
from tasp_coll.layouts import Key
from tasp_coll.programs import ALIGN, Cuts, Move, Slots, Use, moves, own_keys
from tasp_coll.reduction import HOST, Memory, Reduction
from tasp_coll.schedule import ANYWHERE, Grain, Schedule, cut
from tasp_coll.slabs import handled, layout, slabs


@dataclass
class _Target:
    """A sum that this rank takes part in: what it receives for it, and the send that passes it on (None: ours)."""

    receives: list[tuple[int, Place]] = field(default_factory=list)
    send: tuple[int, int, int] | None = None  # step, peer, lane


@dataclass(frozen=True)
class Arithmetic:
    """One action of a reduction: `kind` names the method of `how`, whoever's memory the places are in."""

    kind: Literal["combine", "merge", "widen", "finish", "copy"]
    target: Place
    source: Place
    count: int
    how: Reduction

    def __call__(self, at: Exchange) -> None:
        """In host memory."""
        self.run(at.address, HOST)

    def run(self, address: Callable[[Place], int], memory: Memory) -> None:
        """In the memory that `address` finds places in."""
        getattr(self.how, self.kind)(address(self.target), address(self.source), self.count, memory)


@dataclass(frozen=True)
class Own:
    """This rank's contribution to a sum: where it is, and the step that the caller fills it in (None: it is there)."""

    place: Place
    step: int | None = None


def reduce_program(schedule: Schedule, rank: int, counts: Sequence[int], how: Reduction) -> Program:
    """ReduceScatter of "send" (all ranks' shards, rank-major) into "recv" (this rank's). counts: elements of shards."""
    cuts = Cuts.of(schedule, counts, how.itemsize, partial(cut, align=max(ALIGN // how.itemsize, 1)))
    return _ReduceCompiler(schedule, rank, cuts, how, lambda key: Own(cuts.in_all("send", key))).compile()


def reduce_steps_program(
    schedule: Schedule, rank: int, rows: Sequence[int], row_elements: int, how: Reduction, grain: Grain = ANYWHERE
) -> Program:
    """ReduceScatter into "recv" whose contributions the caller writes into "stage", step by step, as the layout says.

    Gate ("fill", step) says that those of a step are there; mark ("free", step + 2) that their memory is free
    again, for the next step but one. The last step, one more than the schedule has, is the rank's own shard.
    """
    row_bytes = row_elements * how.itemsize
    cuts = Cuts.of(schedule, rows, row_bytes, grain.cut)
    requests = handled(schedule, rank, cuts)
    filled = {key: step for step, keys in enumerate(requests) for key in keys}
    builder = Builder()
    places = slabs(builder, cuts, requests, ["stage"] * len(requests))
    own = {key: Own(place, filled[key]) for key, place in places.items()}
    compiler = _ReduceCompiler(schedule, rank, cuts, how, own.__getitem__, builder)
    return compiler.compile(layout(schedule, cuts, row_bytes, requests, places))


class _ReduceCompiler:
    """Builds a reduce-scatter's program; `own` tells where this rank's contributions are."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        cuts: Cuts,
        how: Reduction,
        own: Callable[[Key], Own],
        builder: Builder | None = None,
    ) -> None:
        self.schedule, self.rank, self.cuts, self.how, self.own = schedule, rank, cuts, how, own
        self.builder = builder or Builder()
        # In a direct exchange contributions travel as they are; elsewhere partial sums do, in the wire's dtype.
        self.direct = schedule.algorithm == "direct"
        self.widening = how.itemsize != how.wire_itemsize
        self._used_by: dict[int, int] = {}  # receive -> node after which its slot is free

    def compile(self, layout: Sequence[Sequence[Piece]] = ()) -> Program:
        """The program."""
        targets: dict[Key, _Target] = defaultdict(_Target)
        for key in own_keys(self.schedule, self.rank, self.cuts):
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
        listed = moves(self.schedule, self.rank, self.cuts)
        slots: Slots[int] = Slots(self.builder, self._uses(listed))
        reuse = []
        for step, is_send, peer, key, lane in listed:
            if is_send:
                targets[key].send = (step, peer, lane)
                continue
            number = len(self.builder.nodes)
            offset, before = slots.take(peer, lane, step, number)
            place = Place("stage", offset, self._wire(key))
            self.builder.add(Node(step, peer, lane, False, place))
            targets[key].receives.append((number, place))
            if before is not None:
                reuse.append((number, before))
        return reuse

    def _uses(self, listed: Sequence[Move]) -> Iterator[Use]:
        """How long each receive is wanted: the first of a sum, where that is added up, until the sum leaves.

        The others too, since the caller may fill in the own contribution, which comes before them, only then.
        """
        leaves = {key: step for step, is_send, _, key, _ in listed if is_send}
        begun: set[Key] = set()
        for step, is_send, peer, key, lane in listed:
            if is_send:
                continue
            owned_first = key not in begun and not self.direct
            begun.add(key)
            last = leaves.get(key, self.schedule.pattern.steps if owned_first else step)
            yield Use(peer, lane, step, last, self._wire(key))

    def _add_target(self, key: Key, target: _Target) -> None:
        own = self.own(key)
        ready = [] if own.step is None else [self.builder.gate(("fill", own.step), own.step)]
        if target.send is None:
            self._add_owned(key, target, own, ready)
        elif target.receives:
            last = self._accumulate(target, own, ready)
            self._send_on(key, target, target.receives[0][1], last)
            if own.step is not None:
                self.builder.mark(("free", own.step + 2), last[0])
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
            self.builder.mark(("free", own.step + 2), node)

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
        """The sum is this rank's: it ends in "recv"."""
        result = self.cuts.in_shard("recv", key)
        if not target.receives:
            self._act(ready, Arithmetic("copy", result, own.place, result.nbytes // self.how.itemsize, self.how))
        elif self.direct:
            self._add_gathered(key, target, own, ready, result)
        else:
            first, total = target.receives[0]
            whole = self._accumulate(target, own, ready)
            self._used_by[first] = self._act(whole, self._finish(result, total))

    def _add_gathered(self, key: Key, target: _Target, own: Own, ready: list[int], result: Place) -> None:
        """Direct: every peer's contribution is merged as soon as its turn comes, so that slots are free early."""
        total = result
        if self.widening or own.step is not None:
            nbytes = self.cuts.nbytes(key) // self.how.itemsize * self.how.wire_itemsize
            total = Place("stage", self.builder.stage(nbytes), nbytes)
        theirs = [(place, [receive], receive) for receive, place in target.receives]
        # Last where the caller has yet to fill it, else first: the result may lie on it.
        mine = [(own.place, ready, -1)]
        last: list[int] = []
        for number, (place, after, receive) in enumerate(theirs + mine if own.step is not None else mine + theirs):
            action = self._combine(total, place) if number else self._widen(total, place)
            last = [self._act([*last, *after], action)]
            if receive >= 0:
                self._used_by[receive] = last[0]
        self._act(last, self._finish(result, total))

    def _act(self, after: Sequence[int], action: Action) -> int:
        return self.builder.add(Node(self.schedule.pattern.steps, action=action), after)

    def _combine(self, total: Place, contribution: Place) -> Action:
        return Arithmetic("combine", total, contribution, contribution.nbytes // self.how.itemsize, self.how)

    def _merge(self, total: Place, partial: Place) -> Action:
        return Arithmetic("merge", total, partial, partial.nbytes // self.how.wire_itemsize, self.how)

    def _widen(self, total: Place, contribution: Place) -> Action:
        return Arithmetic("widen", total, contribution, contribution.nbytes // self.how.itemsize, self.how)

    def _finish(self, result: Place, total: Place) -> Action:
        return Arithmetic("finish", result, total, result.nbytes // self.how.itemsize, self.how)
