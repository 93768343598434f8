"""How fast links are, from messages that left one right behind the other.

The receiver notes when large messages came, by its own clock, and tells the sender with the acknowledgement; the sender
knows which of them it started together. What lies between the arrivals of two such messages is what the second one
took to cross the link; neither the sender's wait for something to send nor the way back is in it.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable
from typing import NamedTuple

SAMPLE_BYTES = 1 << 14  # of messages that tell something
_WINDOW = 8  # messages to a peer that count
_TOGETHER = 0.2  # of the time between two arrivals may lie between their starts


class Sample(NamedTuple):
    """What a rank's last messages to a peer took. best: bytes a second of the fastest; quickest: the shortest time."""

    peer: int
    messages: int
    nbytes: int
    seconds: float
    best: float
    quickest: float


class Note(NamedTuple):
    """Message `seq` of a lane came at `time`, by the receiver's clock."""

    lane: int
    seq: int
    time: float


class _Sent(NamedTuple):
    turn: int  # on its link
    began: float
    nbytes: int


class Rates:
    """The links of one rank, as sender and as receiver."""

    def __init__(self) -> None:
        self._turns: dict[int, int] = defaultdict(int)
        self._sent: dict[tuple[int, int, int], _Sent] = {}
        self._notes: dict[int, list[Note]] = defaultdict(list)
        self._last: dict[int, tuple[_Sent, float]] = {}
        self._seen: dict[int, deque[tuple[int, float]]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._fresh: set[int] = set()

    def sent(self, peer: int, lane: int, seq: int, nbytes: int, now: float) -> None:
        """A message was given to the link."""
        if nbytes >= SAMPLE_BYTES:
            self._sent[peer, lane, seq] = _Sent(self._turns[peer], now, nbytes)
            self._turns[peer] += 1

    def came(self, peer: int, lane: int, seq: int, now: float) -> None:
        """A large message came over the link."""
        self._notes[peer].append(Note(lane, seq, now))

    def take_notes(self, peer: int) -> list[Note]:
        """For the acknowledgement."""
        return self._notes.pop(peer, [])

    def noted(self, peer: int, notes: Iterable[Note]) -> None:
        """What the peer says of this rank's messages."""
        found = [(sent, note.time) for note in notes if (sent := self._sent.pop((peer, note.lane, note.seq), None))]
        for sent, time in sorted(found):
            before = self._last.get(peer)
            self._last[peer] = sent, time
            if before is None or before[0].turn + 1 != sent.turn:
                continue
            seconds = time - before[1]
            if seconds > 0 and sent.began - before[0].began <= _TOGETHER * seconds:
                self._seen[peer].append((sent.nbytes, seconds))
                self._fresh.add(peer)

    def forget(self) -> None:
        """Begin anew."""
        self._seen.clear()
        self._fresh.clear()

    def take(self) -> list[Sample]:
        """The last messages to each peer to which there were any since the last call."""
        found = []
        for peer in sorted(self._fresh):
            seen = self._seen[peer]
            nbytes, seconds = sum(size for size, _ in seen), sum(took for _, took in seen)
            best, quickest = max(size / took for size, took in seen), min(took for _, took in seen)
            found.append(Sample(peer, len(seen), nbytes, seconds, best, quickest))
        self._fresh.clear()
        return found
