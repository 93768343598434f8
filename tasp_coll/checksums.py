"""An end-to-end checksum for every message of data, which names the ring, the link and the step of a corrupted one.

The rank that a chunk comes from seals it; the seal travels behind the chunk, on the same lane, hop by hop, and every
rank that gets the chunk compares. What was spoilt on the way, or in the memory of a rank that handed it on, is thus
found at the first link behind. A seal also says what was found before: whatever is passed on, or summed up, after a
fault carries it, so that nobody takes spoilt data for good. The checksum is CRC-32: every flipped bit is noticed, and
every burst of up to 32 bits; of other damage one in 2^32 cases is not.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from tasp_coll.arrays import memory_at
from tasp_coll.errors import ArgumentError, CorruptionError
from tasp_coll.executor import Builder, Exchange, Node, Place, Program

ENVIRONMENT = "TASP_COLL_CHECKSUM"
_SEAL = struct.Struct("<Iiiii")  # CRC-32 of the data, and the first fault that is known; behind it its own CRC-32
_SEAL_BYTES = _SEAL.size + 4


class Fault(NamedTuple):
    """Where something was spoilt. Of two the smaller one comes first."""

    step: int
    ring: int
    source: int
    target: int


_NONE = Fault(-1, -1, -1, -1)


def wanted() -> bool:
    """Whether TASP_COLL_CHECKSUM asks for checksums; ArgumentError for what it cannot mean."""
    text = os.environ.get(ENVIRONMENT, "")
    if text not in ("", "0", "1"):
        raise ArgumentError(f"environment variable {ENVIRONMENT} must be 0 or 1, got {text!r}")
    return text == "1"


def checked(program: Program, rank: int) -> Program:
    """The program of `rank` with a seal behind each message. What waited for a message waits until it is compared."""
    return _Checker(program, rank).build()


class _Checker:
    """Builds the program anew."""

    def __init__(self, program: Program, rank: int) -> None:
        self._program, self._rank = program, rank
        self._builder = Builder()
        self._builder.stage(program.stage_bytes)  # as it was, and seals behind it
        self._gates = {index: name for name, index in program.gates.items()}
        self._sources = _sources(program)
        self._begin: list[int] = []  # of each node of the program: what must wait for its sources
        self._end: list[int] = []  # and what those who waited for it wait for now
        self._sealing: dict[tuple[Place, tuple[int, ...]], tuple[int, Place]] = {}
        self._waits: list[tuple[int, tuple[int, ...]]] = []  # new node, old sources
        self._came: dict[int, tuple[int, Place]] = {}  # by receive: the node that compared its seal, and where that is

    def build(self) -> Program:
        """The program."""
        for index, node in enumerate(self._program.nodes):
            if node.place is None:
                self._keep(index, node)
            elif node.send:
                self._send(index, node, node.place)
            else:
                self._receive(index, node, node.place)
        for node_number, sources in self._waits:
            for source in sources:
                self._builder.wait(node_number, self._end[source])
        for name, group in self._program.marks.items():
            for number in sorted({each for index in group for each in (self._begin[index], self._end[index])}):
                self._builder.mark(name, number)
        return self._builder.build(self._program.layout)

    def _add(self, index: int, node: Node) -> int:
        """A node of the program, with its sources."""
        number = self._builder.add(node)
        self._waits.append((number, self._sources[index]))
        self._begin.append(number)
        return number

    def _keep(self, index: int, node: Node) -> None:
        if index in self._gates:
            self._begin.append(self._builder.gate(self._gates[index], node.step))
        else:
            self._add(index, node)
        self._end.append(self._begin[-1])

    def _send(self, index: int, node: Node, place: Place) -> None:
        number = self._add(index, node)
        self._end.append(number)
        if node.relays is not None:
            ready, seal = self._came[node.relays]
        else:
            ready, seal = self._sealed(place, self._sources[index])
            self._builder.wait(number, ready)  # once it has left, others may write there
        self._builder.add(Node(node.step, node.peer, node.lane, True, seal), (ready,))

    def _sealed(self, place: Place, sources: tuple[int, ...]) -> tuple[int, Place]:
        """The node that seals a place, the same for all messages that leave from there at once; and the seal."""
        found = self._sealing.get((place, sources))
        if found is None:
            seal = Place("stage", self._builder.stage(_SEAL_BYTES), _SEAL_BYTES)
            number = self._builder.add(Node(-1, action=_Sealing(place, seal)))
            self._waits.append((number, sources))
            found = self._sealing[place, sources] = number, seal
        return found

    def _receive(self, index: int, node: Node, place: Place) -> None:
        number = self._add(index, node)
        seal = Place("stage", self._builder.stage(_SEAL_BYTES), _SEAL_BYTES)
        came = self._builder.add(Node(node.step, node.peer, node.lane, False, seal))
        compare = _Comparing(place, seal, Fault(node.step, node.lane, node.peer, self._rank))
        self._end.append(self._builder.add(Node(node.step, action=compare), (number, came)))
        self._came[index] = self._end[-1], seal


def _sources(program: Program) -> list[tuple[int, ...]]:
    """What each node waits for."""
    found: list[list[int]] = [[] for _ in program.nodes]
    for source, followers in enumerate(program.feeds):
        for follower in followers:
            found[follower].append(source)
    return [tuple(each) for each in found]


@dataclass(frozen=True)
class _Sealing:
    """Writes the seal of what begins its way here."""

    place: Place
    seal: Place

    def __call__(self, at: Exchange) -> None:
        _write(at, self.seal, _crc(at, self.place), min(at.faults, default=_NONE))


@dataclass(frozen=True)
class _Comparing:
    """Compares what came with its seal; a fault is noted, and written into the seal, which may travel on."""

    place: Place
    seal: Place
    fault: Fault  # if it is one

    def __call__(self, at: Exchange) -> None:
        seal = memory_at(at.address(self.seal), _SEAL_BYTES).tobytes()
        crc, *told = _SEAL.unpack_from(seal)
        if zlib.crc32(seal[: _SEAL.size]).to_bytes(4, "little") != seal[_SEAL.size :]:
            fault = self.fault
        elif tuple(told) != _NONE:
            fault = Fault(*told)
        elif _crc(at, self.place) != crc:
            fault = self.fault
        else:
            return
        at.faults.append(fault)
        _write(at, self.seal, crc, fault)


def _crc(at: Exchange, place: Place) -> int:
    return zlib.crc32(memory_at(at.address(place), place.nbytes).data)


def _write(at: Exchange, place: Place, crc: int, fault: tuple[int, ...]) -> None:
    seal = _SEAL.pack(crc, *fault)
    memory_at(at.address(place), _SEAL_BYTES).data[:] = seal + zlib.crc32(seal).to_bytes(4, "little")


def encode(faults: Sequence[tuple[int, ...]]) -> bytes:
    """The first fault that a rank knows of, for the others."""
    return json.dumps(min(faults)).encode() if faults else b""


def corruption(call: str, told: Sequence[str]) -> CorruptionError:
    """The error for what ranks have told each other, some of them nothing."""
    *part, step, ring, source, target = min(json.loads(text) for text in told if text)
    where = f"on ring {ring}, from rank {source} to rank {target}, at step {step}"
    phase = ("", " of its allgather")[part[0]] if part else ""
    return CorruptionError(f"{call}: data was corrupted {where}{phase}", ring=ring, link=(source, target), step=step)
