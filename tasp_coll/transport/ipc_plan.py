"""How launches go through outboxes: who lays what where, and who fetches it from there.

A rank lays what it sends into its outbox, memory that its peers have open, and they fetch it. What goes to several
peers is laid down once. The outbox has slots; the data of a launch is cut into rounds, each as large as a slot, and
rounds take the slots in turn, so that one is laid down while another is fetched. Only the sender knows where it lays
things: it tells its peers once, when a plan is made (`told`), and after that both sides know every address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

import numpy as np

from tasp_coll.errors import ScheduleError
from tasp_coll.executor import Place
from tasp_coll.launches import Launch

SLOTS = 2
_ALIGNMENT = 256  # bytes: what copies like best
_FIELDS = 7  # of a told piece: receiver, step, round, slot, offset, message, start; and its length
Laid = tuple[Place, int]  # bytes of ours, and where in an outbox they are copied to or from


@dataclass(frozen=True)
class Round:
    """Copies into one slot of this rank's outbox, and the peers that they are for."""

    slot: int
    copies: tuple[Laid, ...]
    peers: tuple[int, ...]


@dataclass(frozen=True)
class Fetch:
    """Copies from one slot of a peer's outbox."""

    peer: int
    slot: int
    copies: tuple[Laid, ...]


@dataclass(frozen=True)
class PlannedLaunch(Launch):
    """A launch with its rounds. `fetches[i]`: from all peers' round i, each after that peer has laid it down."""

    rounds: tuple[Round, ...] = ()
    fetches: tuple[tuple[Fetch, ...], ...] = ()


@dataclass
class Outgoing:
    """What one rank lays down, launch by launch. `pieces`: what its peers must be told, `_FIELDS` + 1 numbers each."""

    slot_bytes: int
    rounds: dict[int, tuple[Round, ...]] = field(default_factory=dict)  # by step
    pieces: list[tuple[int, ...]] = field(default_factory=list)
    _begun: int = 0

    def add(self, launch: Launch) -> None:
        """Lay out the sends of a launch."""
        starts, end = self._starts(launch)
        copies: dict[int, dict[Laid, None]] = defaultdict(dict)
        peers: dict[int, set[int]] = defaultdict(set)
        sent: dict[int, int] = defaultdict(int)
        for node in launch.messages:
            if not node.send or node.place is None:
                continue
            message, sent[node.peer] = sent[node.peer], sent[node.peer] + 1
            for number, start, stop in self._cuts(starts[node.place], node.place.nbytes):
                slot = (self._begun + number) % SLOTS
                offset = slot * self.slot_bytes + (starts[node.place] + start) % self.slot_bytes
                copies[number][_part(node.place, start, stop), offset] = None
                peers[number].add(node.peer)
                self.pieces.append((node.peer, launch.step, number, slot, offset, message, start, stop - start))
        count = -(-end // self.slot_bytes)
        self.rounds[launch.step] = tuple(
            Round((self._begun + number) % SLOTS, tuple(copies[number]), tuple(sorted(peers[number])))
            for number in range(count)
        )
        self._begun += count

    def _starts(self, launch: Launch) -> tuple[dict[Place, int], int]:
        """Where each place that is sent begins, if all lay one after another, each once; and where they end."""
        starts: dict[Place, int] = {}
        end = 0
        for node in launch.messages:
            if node.send and node.place is not None and node.place not in starts:
                starts[node.place] = end
                end += -(-node.place.nbytes // _ALIGNMENT) * _ALIGNMENT
        return starts, end

    def _cuts(self, begin: int, nbytes: int) -> list[tuple[int, int, int]]:
        """Round, first and last byte of each part of what begins there."""
        found, at = [], 0
        while at < nbytes:
            number = (begin + at) // self.slot_bytes
            stop = min(nbytes, (number + 1) * self.slot_bytes - begin)
            found.append((number, at, stop))
            at = stop
        return found

    def told(self) -> bytes:
        """For all peers to read."""
        return np.array(self.pieces, np.int64).tobytes()


def planned(
    launches: Sequence[Launch], rank: int, outgoing: Outgoing, told: Sequence[bytes]
) -> tuple[PlannedLaunch, ...]:
    """The launches with their rounds. told: what each rank has told.

    ScheduleError: a peer sends what is not received here, or the other way round.
    """
    found: dict[tuple[int, int, int], list[tuple[int, ...]]] = defaultdict(list)  # by step, round, peer
    for peer, text in enumerate(told):
        for receiver, step, number, *rest in np.frombuffer(text, np.int64).reshape(-1, _FIELDS + 1).tolist():
            if receiver == rank:
                found[step, number, peer].append(tuple(rest))
    launched = tuple(_planned(launch, outgoing.rounds[launch.step], found) for launch in launches)
    if found:
        step, _, peer = min(found)
        raise ScheduleError(f"rank {peer} sends to rank {rank} what that does not receive", step=step)
    return launched


def _planned(
    launch: Launch, rounds: tuple[Round, ...], found: dict[tuple[int, int, int], list[tuple[int, ...]]]
) -> PlannedLaunch:
    """Takes its own out of `found`."""
    receives: dict[int, list[Place]] = defaultdict(list)
    for node in launch.messages:
        if not node.send and node.place is not None:
            receives[node.peer].append(node.place)
    mine = sorted(key for key in found if key[0] == launch.step)
    fetches: dict[int, list[Fetch]] = defaultdict(list)
    came: dict[tuple[int, int], int] = defaultdict(int)
    for key in mine:
        _, number, peer = key
        copies = []
        pieces = found.pop(key)
        for _, offset, message, start, nbytes in pieces:
            if message >= len(receives[peer]) or start + nbytes > receives[peer][message].nbytes:
                raise ScheduleError(f"rank {peer} sends more than is received from it", step=launch.step)
            came[peer, message] += nbytes
            copies.append((_part(receives[peer][message], start, start + nbytes), offset))
        fetches[number].append(Fetch(peer, pieces[0][0], tuple(copies)))
    for peer, places in receives.items():
        if any(came[peer, message] != place.nbytes for message, place in enumerate(places)):
            raise ScheduleError(f"rank {peer} sends less than is received from it", step=launch.step)
    count = max(fetches, default=-1) + 1
    as_it_is = {each.name: getattr(launch, each.name) for each in fields(launch)}
    return PlannedLaunch(**as_it_is, rounds=rounds, fetches=tuple(tuple(fetches[number]) for number in range(count)))


def _part(place: Place, start: int, stop: int) -> Place:
    return Place(place.region, place.offset + start, stop - start)
