"""Frames: what ranks that heal links tell each other beside the messages, from any rank to any, through others."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

from tasp_coll.transport.rates import Note

PART_BYTES = 1 << 16  # of a message that goes through other ranks
_HEAD = struct.Struct("<BBxxiiI")
_PART = struct.Struct("<iQQQ")
_COUNT = struct.Struct("<iQ")
_LENGTH = struct.Struct("<I")
_NOTE = struct.Struct("<iQd")
_PAIR = struct.Struct("<ii")
FRAME_BYTES = _HEAD.size + _PART.size + PART_BYTES


class Kind(IntEnum):
    """What a frame says."""

    PING = 0  # over the link between two ranks: are you there?
    PONG = 1
    PING_AROUND = 2  # the same through others
    PONG_AROUND = 3
    ACK = 4  # how many messages of each lane have come
    PART = 5  # bytes of a message whose link is dead
    DEAD = 6  # pairs of ranks without a link
    ALARM = 7  # the sender waited too long, and whom it misses


STRAIGHT = (Kind.PING, Kind.PONG)  # over the link itself or not at all


class Frame(NamedTuple):
    """From rank `source` to rank `target`. hops: how many ranks may still pass it on."""

    kind: Kind
    source: int
    target: int
    body: bytes = b""
    hops: int = 8

    def packed(self) -> bytes:
        """As it travels."""
        return _HEAD.pack(self.kind, self.hops, self.source, self.target, len(self.body)) + self.body

    @classmethod
    def unpacked(cls, data: memoryview) -> Frame:
        """From what came, which may be followed by anything."""
        kind, hops, source, target, length = _HEAD.unpack_from(data)
        return cls(Kind(kind), source, target, bytes(data[_HEAD.size : _HEAD.size + length]), hops)


class Part(NamedTuple):
    """Bytes `offset`.. of the message number `seq` of a lane, which has `total` bytes."""

    lane: int
    seq: int
    total: int
    offset: int
    data: bytes

    def packed(self) -> bytes:
        """As a frame's body."""
        return _PART.pack(*self[:4]) + self.data

    @property
    def parts(self) -> int:
        """How many the message has."""
        return max(-(-self.total // PART_BYTES), 1)

    @classmethod
    def unpacked(cls, body: bytes) -> Part:
        """From a frame's body."""
        lane, seq, total, offset = _PART.unpack_from(body)
        return cls(lane, seq, total, offset, body[_PART.size :])


class Ack(NamedTuple):
    """counts: of each lane, how many messages have come. notes: when large ones did."""

    counts: Sequence[tuple[int, int]]
    notes: Sequence[Note]

    def packed(self) -> bytes:
        """As a frame's body."""
        counts = b"".join(_COUNT.pack(*count) for count in self.counts)
        return _LENGTH.pack(len(counts)) + counts + b"".join(_NOTE.pack(*note) for note in self.notes)

    @classmethod
    def unpacked(cls, body: bytes) -> Ack:
        """From a frame's body."""
        (length,) = _LENGTH.unpack_from(body)
        counts, notes = body[_LENGTH.size : _LENGTH.size + length], body[_LENGTH.size + length :]
        return cls(
            [(lane, came) for lane, came in _COUNT.iter_unpack(counts)],
            [Note(*note) for note in _NOTE.iter_unpack(notes)],
        )


def pack_pairs(pairs: Iterable[tuple[int, int]]) -> bytes:
    """Of a DEAD."""
    return b"".join(_PAIR.pack(*pair) for pair in pairs)


def unpack_pairs(body: bytes) -> Iterator[tuple[int, int]]:
    """Of a DEAD."""
    return _PAIR.iter_unpack(body)
