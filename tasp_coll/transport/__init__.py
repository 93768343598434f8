"""What carries bytes between ranks.

A transport prepares a batch of operations once (addresses, lengths, peers) and starts them as often as wanted, each
when the executor says so. Messages of one lane from one rank to another match in the order in which they were
started; lanes do not disturb each other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, Protocol

Alarms = dict[int, frozenset[int] | None]  # by peer: whom it does not hear; None: it has not told yet


class Op(NamedTuple):
    """One message: `nbytes` bytes at `address` to (send) or from (receive: at most `nbytes`) `peer` on `lane`."""

    send: bool
    peer: int
    lane: int
    address: int
    nbytes: int


class Batch(Protocol):
    """Prepared operations, numbered as they were given to `Transport.prepare`. Restartable when complete."""

    def start(self, indices: Sequence[int]) -> None:
        """Start these operations; their memory belongs to the transport until they complete."""

    def start_all(self) -> None:
        """Start every operation."""

    def test_some(self) -> list[int]:
        """Make progress; the started operations that completed since the last call."""

    def test_all(self) -> bool:
        """Make progress; whether all started operations are complete. Do not mix with `test_some` in one run."""

    def pending(self) -> list[int]:
        """The started operations that are not complete, for a message about who is waited for."""

    def free(self) -> None:
        """Give back what the transport holds for this batch. Only when nothing is started."""


class Pool(Protocol):
    """Single messages, numbered as they were started, each started once and all polled together."""

    def start(self, op: Op) -> int:
        """Start a message; its number. Its memory belongs to the transport until it completes."""

    def test(self) -> list[int]:
        """Make progress; the messages that completed since the last call."""

    def close(self) -> bool:
        """Take back what has not come; whether nothing is left that may still touch memory."""


class NativeCall(Protocol):
    """A collective of the underlying library under way."""

    def test(self) -> bool:
        """Make progress; whether it is complete."""


class NativeRequest(NamedTuple):
    """What a library's own collective needs. Sizes in elements of `dtype`, or in bytes where dtype is None."""

    collective: str
    send: int
    recv: int
    counts: tuple[int, ...]  # per rank: what it contributes to a gather, what it receives of a reduce-scatter
    dtype: str | None
    itemsize: int
    op: str | None


class Transport(Protocol):
    """Messages between `size` ranks, of which this one is `rank`."""

    name: str
    rank: int
    size: int
    background: bool  # may another thread drive it while the caller computes?
    last_event: float  # `time.monotonic()` when it last had to find another way; waits begin anew then

    def prepare(self, ops: Sequence[Op]) -> Batch:
        """Prepare operations for repeated use."""

    def pool(self) -> Pool:
        """Messages that are started one by one."""

    def pause(self, idle: int) -> None:
        """Called after the `idle`-th poll in a row without progress: let others use the core."""

    def has_native(self, request: NativeRequest) -> bool:
        """Whether the library has a collective of its own for this request (addresses do not matter)."""

    def native(self, request: NativeRequest) -> NativeCall:
        """Start the library's own collective."""

    def alarm(self, missing: Collection[int] | None = None) -> None:
        """Tell every peer that this rank waited too long; then, once it is known, whom it misses. Never blocks."""

    def alarms(self) -> Alarms:
        """The alarms that have come."""

    def abandon(self, *keep: Any, lost: bool = False) -> None:
        """Give up after a failure: `keep` and all memory in use stay alive, and leaving the process will not block.

        lost: peers do not answer any more.
        """

    def close(self) -> None:
        """Release the transport. Not collective in effect: never waits for peers."""
