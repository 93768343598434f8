"""Frames between any two ranks, along pairs of ranks whose link lives."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable
from itertools import count
from typing import Any

import numpy as np

from tasp_coll.transport import Op
from tasp_coll.transport.frames import FRAME_BYTES, PART_BYTES, STRAIGHT, Frame, Kind, Part

_WITNESSES = 2  # ways that a question takes: one may be dead too
_OUTSTANDING = 2  # messages to one rank that the transport has at a time; more wait here, where they can be rerouted
Launch = Callable[[Op, Any, Callable[[], None]], None]
Pair = tuple[int, int]


def pair_of(a: int, b: int) -> Pair:
    """The pair, whichever way round."""
    return (a, b) if a < b else (b, a)


class Relay:
    """One rank's post office: a receive from every peer is always open, and what is for others is passed on."""

    def __init__(self, rank: int, size: int, lane: int, launch: Launch, arrived: Callable[[Frame, int], None]) -> None:
        """launch(op, keep, done): starts a message and calls done() at its end. arrived(frame, peer): a frame for
        this rank, and from whom it came last."""
        self._rank, self._size, self._lane = rank, size, lane
        self._launch, self._arrived = launch, arrived
        self._dead: Collection[Pair] = ()
        self._queues: dict[int, deque[Callable[[], Frame]]] = defaultdict(deque)
        self._flying: dict[int, int] = defaultdict(int)
        self._turn = count()
        self._ways: dict[tuple[int, int], list[int]] = {}

    def open(self) -> None:
        """Begin to receive."""
        for peer in range(self._size):
            if peer != self._rank:
                self._receive(peer, np.zeros(FRAME_BYTES, np.uint8))

    def send(self, kind: Kind, target: int, body: bytes = b"") -> None:
        """Send a frame; where no way leads there, it is lost."""
        frame = Frame(kind, self._rank, target, body)
        self._post(frame, lambda: frame)

    def send_around(self, kind: Kind, target: int, body: bytes = b"") -> None:
        """Send a frame through others, though the link may live."""
        frame = Frame(kind, self._rank, target, body)
        for way in self._find_ways(target, self._rank, straight=False)[:_WITNESSES]:
            self._queues[way].append(lambda: frame)
            self._pump(way)

    def send_message(self, target: int, lane: int, seq: int, memory: np.ndarray[Any, Any]) -> None:
        """Send a message in parts, each on a way of its own. `memory` is read when a part's turn comes."""
        total = len(memory)
        for offset in range(0, max(total, 1), PART_BYTES):

            def part(offset: int = offset) -> Frame:
                data = memory[offset : offset + PART_BYTES].tobytes()
                return Frame(Kind.PART, self._rank, target, Part(lane, seq, total, offset, data).packed())

            self._post(Frame(Kind.PART, self._rank, target), part)

    def avoid(self, dead: Collection[Pair]) -> None:
        """These pairs have no link: what waits for one goes another way."""
        self._dead = dead
        self._ways.clear()
        for peer in [peer for peer in self._queues if pair_of(self._rank, peer) in dead]:
            waiting = self._queues.pop(peer)
            for make in waiting:
                frame = make()
                if frame.kind not in STRAIGHT:
                    self._post(frame, make)

    @property
    def idle(self) -> bool:
        """Nothing waits to be sent or is on its way out, but on dead links."""
        busy = (peer for peer, flying in self._flying.items() if flying)
        return not any(self._queues.values()) and all(pair_of(self._rank, peer) in self._dead for peer in busy)

    def _receive(self, peer: int, slot: np.ndarray[Any, Any]) -> None:
        op = Op(False, peer, self._lane, slot.ctypes.data, len(slot))
        self._launch(op, slot, lambda: self._received(peer, slot))

    def _received(self, peer: int, slot: np.ndarray[Any, Any]) -> None:
        frame = Frame.unpacked(slot.data)
        self._receive(peer, slot)
        if frame.target == self._rank:
            self._arrived(frame, peer)
        elif frame.hops:
            onward = frame._replace(hops=frame.hops - 1)
            self._post(onward, lambda: onward)

    def _post(self, frame: Frame, make: Callable[[], Frame]) -> None:
        # Whoever sends around a link must not get back what it sent, only to send it over that link.
        ways = [frame.target] if frame.kind in STRAIGHT else self._ways_to(frame.target, frame.source)
        if ways:
            way = ways[next(self._turn) % len(ways)]
            self._queues[way].append(make)
            self._pump(way)

    def _pump(self, peer: int) -> None:
        queue = self._queues[peer]
        while queue and self._flying[peer] < _OUTSTANDING:
            data = np.frombuffer(queue.popleft()().packed(), np.uint8)
            self._flying[peer] += 1
            self._launch(Op(True, peer, self._lane, data.ctypes.data, len(data)), data, lambda: self._sent(peer))

    def _sent(self, peer: int) -> None:
        self._flying[peer] -= 1
        self._pump(peer)

    def _ways_to(self, target: int, without: int) -> list[int]:
        """The ranks to give it to: the target itself if its link lives, else all that are one step closer."""
        if (target, without) not in self._ways:
            self._ways[target, without] = self._find_ways(target, without)
        return self._ways[target, without]

    def _find_ways(self, target: int, without: int, straight: bool = True) -> list[int]:
        """Breadth first, from the target, and not through `without`. straight: its own link will do."""
        others = set(range(self._size)) - {target, without}
        reached = {target}
        while reached:
            near = self._linked(self._rank, reached)
            if near and (straight or target not in reached):
                return near
            others -= reached
            reached = {rank for rank in others if rank != self._rank and self._linked(rank, reached)}
        return []

    def _linked(self, rank: int, ranks: Iterable[int]) -> list[int]:
        return sorted(other for other in ranks if other != rank and pair_of(rank, other) not in self._dead)
