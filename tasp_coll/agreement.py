"""Rounds: every call begins with one small message from each rank to each other.

It carries a signature of the call and, if the payload is small, the payload itself. Ranks whose signatures are equal
may move data; if they are not, a second round brings what each rank passed, and all raise the same error. Since any
call of any rank sends exactly this message, ranks that have drifted apart, or that have a bad argument of their own,
are found out without a message ever meeting the wrong receive.
"""

from __future__ import annotations

import ctypes
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tasp_coll.errors import MismatchError, name_ranks
from tasp_coll.transport import Batch, Op, Transport

SIGNATURE_BYTES = 16
HEADER_BYTES = 64  # one cache line, so that payloads are aligned
NOT_INLINE = -1
CONTROL_LANE = 0  # where no data travels
_LAYOUT = struct.Struct(f"<{SIGNATURE_BYTES}sqqqqQ")
_ADDRESS = slice(_LAYOUT.size - 8, _LAYOUT.size)
_PREPARED = 32


class Header(NamedTuple):
    """What a rank says of its call; -1 where there is nothing. Streams use `room` and `place` in their own way."""

    signature: bytes
    payload: int = NOT_INLINE  # bytes that follow
    rows: int = -1  # of its shard, where ranks may differ
    room: int = -1  # rows of the `recv` that it was given
    place: int = -1  # row of `recv` at which its `send` lies
    address: int = 0  # of its shard, where others may read that

    def packed(self) -> bytes:
        """As it travels."""
        return _LAYOUT.pack(*self)


def inline_bytes(ranks: int) -> int:
    """How large a payload may be to travel with the agreement: ranks share nothing but their number.

    It shrinks where many add up.
    """
    return max(1024, min(8192, (4 << 20) // ranks // 64 * 64))


class Rounds:
    """Exchange of headers and small payloads between all ranks of a transport."""

    def __init__(self, transport: Transport, capacity: int | None = None) -> None:
        """capacity: how large a payload may be, if not as large as `inline_bytes` says."""
        self._transport, self.rank, self.size = transport, transport.rank, transport.size
        self.capacity = inline_bytes(self.size) if capacity is None else capacity
        self.stride = HEADER_BYTES + self.capacity
        self._memory = np.zeros((self.size, self.stride), np.uint8)
        self._base = self._memory.ctypes.data
        self._own = self._base + self.rank * self.stride
        self._signatures = self._memory[:, :SIGNATURE_BYTES]
        self._header = self._memory[self.rank].data[: _LAYOUT.size]
        self._peers = [peer for peer in range(self.size) if peer != self.rank]
        self._prepared: dict[int, tuple[Batch, memoryview]] = {}
        self._batch: Batch | None = None
        self._said: bytes | None = None

    def post(self, header: bytes, payload: bytes | memoryview = b"") -> None:
        """Send this rank's packed header and the bytes of `payload` to all, and expect theirs."""
        nbytes = len(payload)
        if header is not self._said:  # as in a call repeated
            self._header[:] = header
            self._said = header
        batch, room = self._prepared.get(nbytes) or self._prepare(nbytes)
        room[:] = payload
        self._batch = batch
        batch.start_all()

    def poll(self) -> bool:
        """Whether the round is complete."""
        assert self._batch is not None
        return self._batch.test_all()

    def pending(self) -> set[int]:
        """Peers whose message has not come, or has not left."""
        assert self._batch is not None
        return {self._peers[index % len(self._peers)] for index in self._batch.pending()}

    def same(self, signature: bytes) -> bool:
        """Whether every rank sent this signature."""
        return self._signatures.tobytes() == signature * self.size

    def header(self, rank: int) -> Header:
        """What `rank` sent."""
        return Header(*_LAYOUT.unpack_from(self._memory[rank].data))

    def headers(self) -> list[Header]:
        """What each rank sent."""
        return [self.header(rank) for rank in range(self.size)]

    def addresses(self) -> list[int]:
        """What each rank said of where its shard lies."""
        found: list[int] = self._memory[:, _ADDRESS].view(np.uint64)[:, 0].tolist()
        return found

    def payload(self, rank: int) -> int:
        """Address of the payload that `rank` sent, valid until the next round."""
        return self._base + rank * self.stride + HEADER_BYTES

    def payloads(self, nbytes: int) -> NDArray[np.uint8]:
        """The first bytes of every rank's payload, (size, nbytes), a view."""
        return self._memory[:, HEADER_BYTES : HEADER_BYTES + nbytes]

    def text(self, rank: int) -> str:
        """The payload that `rank` sent, as text."""
        return ctypes.string_at(self.payload(rank), self.header(rank).payload).decode("utf-8", "replace")

    def _prepare(self, payload: int) -> tuple[Batch, memoryview]:
        """The messages with payloads of so many bytes, and where this rank's lies."""
        slot = self.stride
        receives = [Op(False, peer, CONTROL_LANE, self._base + peer * slot, slot) for peer in self._peers]
        sends = [Op(True, peer, CONTROL_LANE, self._own, HEADER_BYTES + payload) for peer in self._peers]
        if len(self._prepared) == _PREPARED:
            self._prepared.pop(next(iter(self._prepared)))[0].free()
        room = self._memory[self.rank, HEADER_BYTES : HEADER_BYTES + payload].data
        made = self._prepared[payload] = self._transport.prepare(receives + sends), room
        return made

    def leave(self) -> None:
        """After a failure: peers must not take what this rank said for a word that still holds."""

    def close(self) -> None:
        """Free what was prepared. Nothing may be under way."""
        while self._prepared:
            self._prepared.popitem()[1][0].free()


def encode(description: Mapping[str, object], limit: int) -> bytes:
    """A call's description as a message of at most `limit` bytes."""
    text = json.dumps(description, default=str)
    if len(text.encode()) > limit:
        longest = max(description, key=lambda key: len(str(description[key])))
        over = len(text.encode()) - limit + 8
        text = json.dumps({**description, longest: str(description[longest])[: -over or None] + "..."}, default=str)
    return text.encode()[:limit]


def disagreement(texts: Sequence[str]) -> MismatchError:
    """The error for ranks that passed different things; it names the odd ones and what each of them passed."""
    passed = [_decode(text) for text in texts]
    failed = [rank for rank, said in enumerate(passed) if "error" in said]
    if failed:
        told = "; ".join(f"rank {rank}: {passed[rank]['error']}" for rank in failed)
        return MismatchError(f"{_calls(passed)}: {name_ranks(failed)} could not take part: {told}", failed)
    groups: dict[str, list[int]] = {}
    for rank, said in enumerate(passed):
        groups.setdefault(json.dumps(said, sort_keys=True), []).append(rank)
    ordered = sorted(groups.values(), key=lambda ranks: (-len(ranks), ranks))
    majority = ordered[0] if len(ordered) == 1 or len(ordered[0]) > len(ordered[1]) else []
    odd = sorted(rank for rank in range(len(texts)) if rank not in majority)
    differing = [key for key in _keys(passed) if len({json.dumps(said.get(key)) for said in passed}) > 1]
    told = "; ".join(f"{name_ranks(ranks)} passed {_said(passed[ranks[0]], differing)}" for ranks in reversed(ordered))
    return MismatchError(f"{_calls(passed)}: ranks disagree on {', '.join(differing) or 'the call'}: {told}", odd)


def _decode(text: str) -> dict[str, object]:
    try:
        said = json.loads(text)
    except ValueError:  # cut off to fit
        return {"call": text}
    return said if isinstance(said, dict) else {"call": text}


def _keys(passed: Sequence[Mapping[str, object]]) -> Iterator[str]:
    yield from dict.fromkeys(key for said in passed for key in said)


def _calls(passed: Sequence[Mapping[str, object]]) -> str:
    return " / ".join(dict.fromkeys(str(said.get("call")) for said in passed))


def _said(said: Mapping[str, object], keys: Sequence[str]) -> str:
    return ", ".join(f"{key} {_plain(said[key])}" for key in keys if key in said) or "nothing of the kind"


def _plain(value: object) -> str:
    return f"({', '.join(map(str, value))})" if isinstance(value, list) else str(value)
