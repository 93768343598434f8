"""Rounds in memory that all ranks share: each writes where all read, in place of a message to each of the others.

Round k is written on side k % 2 of the board. A rank writes it when round k - 1 is complete: then all have written
that, which they do when they need nothing of round k - 2 any more. The round's number is written last, and read first.
That is enough where others see stores and loads in the order in which they were made, as on x86.
"""

from __future__ import annotations

import os
import platform
import sys

import numpy as np
from numpy.typing import NDArray

from tasp_coll.agreement import HEADER_BYTES, SIGNATURE_BYTES, Rounds, inline_bytes
from tasp_coll.errors import ArgumentError
from tasp_coll.transport import Transport
from tasp_coll.transport.shared import machine

ENVIRONMENT = "TASP_COLL_SHARED_MEMORY"
_SIDES = 2
_NUMBER_BYTES = 8
_LEFT = -1  # in place of a number
_LINE = 64
_IN_ORDER = ("x86_64", "i686")
_LISTEN = 8  # rounds, and polls in vain
_SHARD_BYTES, _SIDE_BYTES = 1 << 18, 1 << 22  # at most, of a payload and of a side


class _Side:
    """Half of the board: all ranks' numbers, their signatures, and their slots of header and payload.

    Numbers and signatures lie close together, so that all of them are looked at in one go.
    """

    def __init__(self, memory: NDArray[np.uint8], rank: int, size: int, stride: int) -> None:
        numbers, signatures = memory[: _NUMBER_BYTES * size], memory[_lines(_NUMBER_BYTES * size) :]
        self.slots = memory[-size * stride :].reshape(size, stride)
        self.base = int(self.slots.ctypes.data)
        self.numbers, self.signatures = numbers.data, signatures[: SIGNATURE_BYTES * size].data
        self.number = numbers[_NUMBER_BYTES * rank :][:_NUMBER_BYTES].data.cast("q")
        self.signature = self.signatures[SIGNATURE_BYTES * rank :][:SIGNATURE_BYTES]
        self.own = self.slots[rank].data
        self.said = b""  # this rank's header that is there


def wanted() -> bool:
    """Whether TASP_COLL_SHARED_MEMORY lets ranks share a board; ArgumentError for what it cannot mean."""
    text = os.environ.get(ENVIRONMENT, "")
    if text not in ("", "0", "1"):
        raise ArgumentError(f"environment variable {ENVIRONMENT} must be 0 or 1, got {text!r}")
    return text != "0"


def place() -> str:
    """The same for ranks that can share a board, and for no others: "" where there can be none.

    Network namespaces are told apart because who has several on one machine wants them to act as several machines.
    """
    if sys.platform != "linux" or platform.machine() not in _IN_ORDER:
        return ""
    try:
        return f"{machine()} {os.readlink('/proc/self/ns/net')}"
    except OSError:
        return ""


def board_capacity(ranks: int) -> int:
    """How large a payload may be on a board: one that stays in caches until all have read it.

    Up to there two copies in memory that all share cost less than one out of another process's.
    """
    return max(inline_bytes(ranks), min(_SHARD_BYTES, _SIDE_BYTES // ranks // _LINE * _LINE))


def board_bytes(ranks: int) -> int:
    """What so many ranks need for a board."""
    numbers, signatures = _lines(_NUMBER_BYTES * ranks), _lines(SIGNATURE_BYTES * ranks)
    return _SIDES * (numbers + signatures + ranks * (HEADER_BYTES + board_capacity(ranks)))


def _lines(nbytes: int) -> int:
    """In whole cache lines."""
    return -(-nbytes // _LINE) * _LINE


class Board(Rounds):
    """Rounds of ranks whose memory is one. memory: `board_bytes`, zeros at first, the same for all."""

    def __init__(self, transport: Transport, memory: NDArray[np.uint8]) -> None:
        super().__init__(transport, board_capacity(transport.size))
        halves = memory.reshape(_SIDES, -1)
        self._sides = [_Side(half, self.rank, self.size, self.stride) for half in halves]
        self._side = self._sides[0]
        self._number = self._idle = 0
        self._wanted = b""

    def post(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        """As in `Rounds`."""
        self._number = number = self._number + 1
        self._side = side = self._sides[number % _SIDES]
        self._memory, self._base = side.slots, side.base
        if header is not side.said:  # as in a call repeated
            side.own[: len(header)], side.signature[:] = header, header[:SIGNATURE_BYTES]
            side.said = header
        side.own[HEADER_BYTES : HEADER_BYTES + len(payload)] = payload
        side.number[0] = number
        if number % _LISTEN == 0:
            self._listen()
        self._wanted = number.to_bytes(_NUMBER_BYTES, "little") * self.size

    def poll(self) -> bool:
        """As in `Rounds`."""
        numbers, wanted = self._side.numbers, self._wanted
        if numbers.tobytes() == wanted or numbers.tobytes() == wanted:
            return True
        self._idle += 1
        if self._idle % _LISTEN == 0:
            self._listen()
        return False

    def _listen(self) -> None:
        """Let the library make progress: it moves messages only inside its calls, and others may wait for some."""
        self._transport.alarms()

    def pending(self) -> set[int]:
        """As in `Rounds`."""
        return {rank for rank, number in enumerate(self._side.numbers.cast("q")) if number != self._number}

    def same(self, signature: bytes) -> bool:
        """As in `Rounds`."""
        return self._side.signatures.tobytes() == signature * self.size

    def leave(self) -> None:
        """As in `Rounds`: a round that others have still to take part in is never complete any more.

        Results of this rank may change from now on, and who comes late has perhaps still to read them.
        """
        if self.pending():
            self._side.number[0] = _LEFT

    def close(self) -> None:
        """Let go of the memory. Nothing may be under way."""
        super().close()
        self._sides = [_Side(np.zeros(board_bytes(self.size) // _SIDES, np.uint8), self.rank, self.size, self.stride)]
        self._side = self._sides[0]
        self._memory, self._base = self._side.slots, self._side.base
