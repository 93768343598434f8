"""A direct allgather by reads, as rounds and what is done between them.

Each rank copies its own shard into its result and tells where that is; when all have, it reads the others' from
theirs, which as a rule have larger pages than what was sent; and when all have read, results belong to the callers.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, Protocol

from tasp_coll.agreement import Header
from tasp_coll.arrays import Buffer
from tasp_coll.core import Core
from tasp_coll.errors import CollectiveError
from tasp_coll.reading import PIECE, Fetch, Reading, fetches

_OFFER, _READ, _UNREAD = b"offer".ljust(16), b"read".ljust(16), b"unread".ljust(16)
_ALL_READ = Header(_READ).packed()
MOVING, CLOSING = "moving data", "closing the call"
_NEW, _OFFERED, _FETCHED = range(3)


class Reader(Protocol):
    """What a collective call says of itself; `operations.Collective` documents each."""

    core: Core
    out: Buffer | None
    flow: Any
    phase: str
    repeatable: bool

    def sizes(self) -> tuple[int, ...]: ...
    def home(self) -> int: ...
    def copy_own(self) -> None: ...
    def heard(self, signature: bytes) -> bool: ...


class PeerReads:
    """What a call keeps of its reads from one run to the next. `known`: made before, and short enough for `quick`.

    It does not keep the call, which keeps it: arrays go when the last reference does, not when cycles are looked for.
    """

    def __init__(self) -> None:
        self._known: tuple[Fetch, ...] = ()
        self._offer: tuple[int, bytes] = (0, b"")  # where others may read, and the header that says so
        self._reached = _NEW

    @property
    def known(self) -> bool:
        return bool(self._known)

    @property
    def begun(self) -> bool:
        """By a `quick` that did not end."""
        return self._reached != _NEW

    def quick(self, call: Reader) -> bool:
        """All at once, if nobody is late; whether it was. What is not done `run` does."""
        self._post_offer(call)
        if not call.heard(_OFFER):
            return False
        reading = _reading(call, self._known)
        try:
            while not reading.done:
                if not reading.poll():
                    return False
        except CollectiveError:  # comes again in `run`
            return False
        call.core.rounds.post(_ALL_READ)
        self._reached = _FETCHED
        if not call.heard(_READ):
            return False
        self._reached = _NEW
        return True

    def run(self, call: Reader) -> Generator[bool, None, bool]:
        """Whether all could read all: device drivers may have mapped memory that cannot be read so."""
        rounds = call.core.rounds
        if self._reached == _NEW:
            self._post_offer(call)
        if self._reached == _OFFERED:
            while not rounds.poll():
                yield False
            wanted = fetches(call.core.rank, call.sizes())
            call.flow = flow = _reading(call, wanted)
            call.phase = MOVING
            try:
                while not flow.done:
                    yield flow.poll()
                self._known = wanted if call.repeatable and max(call.sizes()) <= PIECE else ()
                rounds.post(_ALL_READ)
            except CollectiveError:
                rounds.post(Header(_UNREAD).packed())
            call.flow = None
        self._reached, call.phase = _NEW, CLOSING
        while not rounds.poll():
            yield False
        self._known = self._known if rounds.same(_READ) else ()
        return rounds.same(_READ)

    def _post_offer(self, call: Reader) -> None:
        call.copy_own()
        address = call.home()
        if self._offer[0] != address:
            self._offer = address, Header(_OFFER, address=address).packed()
        call.core.rounds.post(self._offer[1])
        self._reached = _OFFERED


def _reading(call: Reader, wanted: tuple[Fetch, ...]) -> Reading:
    assert call.core.peer_memory is not None
    assert call.out is not None
    return Reading(call.core.peer_memory, wanted, call.core.rounds.addresses(), call.out.address)
