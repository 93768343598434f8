"""The errors of tasp-coll, one small tree.

CollectiveError
├── ArgumentError (ValueError)          a bad argument: names it, the rule and what came
│   └── ArgumentTypeError (TypeError)   the same for an object of a kind that cannot be used
├── TopologyError (ValueError)          a topology, spec or file that makes no sense, or cannot do what was asked
├── ScheduleError                       a schedule that fails its proof
├── MismatchError                       ranks disagree about a call
├── CorruptionError                     data that arrived changed, with TASP_COLL_CHECKSUM=1
└── PeerTimeoutError (TimeoutError)     peers that did not answer in time

LinkWarning (UserWarning) is no error: it tells of a link that was left out, or is reckoned with as slower.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def name_ranks(ranks: Sequence[int]) -> str:
    """Ranks as messages name them: "rank 2", "ranks 0, 3"."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


class CollectiveError(Exception):
    """Root of all errors that tasp-coll raises on purpose."""


class ArgumentError(CollectiveError, ValueError):
    """An argument breaks a rule; the message names the argument, the rule and what came."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is an object of a kind that cannot be used here."""


class TopologyError(CollectiveError, ValueError):
    """A topology, its spec or its file is wrong, or it cannot be decomposed as asked."""


class ScheduleError(CollectiveError):
    """A schedule fails its proof. The place is in the message and in the attributes (None: does not apply)."""

    def __init__(
        self,
        rule: str,
        *,
        step: int | None = None,
        rank: int | None = None,
        ring: int | None = None,
        chunk: int | None = None,
    ) -> None:
        self.step, self.rank, self.ring, self.chunk = step, rank, ring, chunk
        place = {"step": step, "rank": rank, "ring": ring, "chunk": chunk}
        where = ", ".join(f"{name} {value}" for name, value in place.items() if value is not None)
        super().__init__(f"{where}: {rule}" if where else rule)


class MismatchError(CollectiveError):
    """Ranks disagree about a call. `ranks` are the odd ones; the message says what each of them passed."""

    def __init__(self, message: str, ranks: Iterable[int] = ()) -> None:
        self.ranks = tuple(ranks)
        super().__init__(message)


class CorruptionError(CollectiveError):
    """Data arrived changed. `ring`, `link` (from rank, to rank) and `step` say where that was first seen."""

    def __init__(self, message: str, *, ring: int, link: tuple[int, int], step: int) -> None:
        self.ring, self.link, self.step = ring, link, step
        super().__init__(message)


class PeerTimeoutError(CollectiveError, TimeoutError):
    """Peers did not answer in time. `peers` names them, `call` and `step` say what was waited for.

    links: pairs of ranks that do not hear each other though other ranks hear both, as far as that could be found out.
    """

    def __init__(
        self,
        message: str,
        *,
        peers: Iterable[int] = (),
        call: str = "",
        step: int | None = None,
        links: Iterable[tuple[int, int]] = (),
    ) -> None:
        self.peers, self.call, self.step, self.links = tuple(peers), call, step, tuple(links)
        super().__init__(message)


class LinkWarning(UserWarning):
    """A link was left out, or is reckoned with as slower: see `Communicator(self_heal=True)`. Not an error."""
