"""What was seen of a job whose links were broken: read from the ranks' diaries, judged by what is promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from statistics import median
from typing import Any

from break_links_cases import BreakCase

GRACE_S = 3.0  # beyond the timeout, for a call whose link is cut
RAISE_S = 2.0  # beyond the timeout, for an error without self_heal
SHARES = {"cut": 0.9, "slow": 0.8}  # of the new cut bound, at least, once the ranks have planned anew


@dataclass(frozen=True)
class Call:
    """One rank's view of a call that gave a result. dead, slower: what has left the topology, or has a lower rate."""

    rank: int
    call: int
    began: float
    ended: float
    wrong: int
    unchanged: bool
    topology: str
    dead: tuple[tuple[int, int], ...]
    slower: tuple[tuple[int, int, float], ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Failure:
    """One rank's view of a call that raised."""

    rank: int
    call: int
    began: float
    ended: float
    kind: str
    links: tuple[tuple[int, int], ...]
    told: str


@dataclass(frozen=True)
class Bounds:
    """The cut bound of a call, seconds, on all links and on what the fault leaves of them; None: it has none."""

    whole: float | None
    left: float | None


@dataclass(frozen=True)
class Seen:
    """A job. fault: when it was being inflicted, from and to; link: None for all. left: processes that stayed."""

    case: BreakCase
    link: tuple[int, int] | None
    ranks: int
    timeout: float
    self_heal: bool
    bounds: Bounds
    fault: tuple[float, float] | None
    status: int
    hung: bool
    left: int
    calls: tuple[Call, ...]
    failures: tuple[Failure, ...]
    said: str  # by the job, to its terminal

    @cached_property
    def seconds(self) -> dict[int, float]:
        """Of each call that all ranks completed: from when the last rank made it until the last had its result."""
        return {
            number: max(each.ended for each in calls) - max(each.began for each in calls)
            for number, calls in self.numbered.items()
            if len(calls) == self.ranks
        }

    @cached_property
    def numbered(self) -> dict[int, list[Call]]:
        """The calls by their number."""
        found: dict[int, list[Call]] = {}
        for each in sorted(self.calls, key=lambda each: (each.call, each.rank)):
            found.setdefault(each.call, []).append(each)
        return found

    @cached_property
    def intact_s(self) -> float | None:
        """What a call takes on intact links: the median of those before the fault, without the first."""
        found = [self.seconds[number] for number in range(1, self.case.before) if number in self.seconds]
        return median(found) if found else None

    @cached_property
    def planned_anew(self) -> int | None:
        """The first call that began with the last plan; None if the topology is what it was."""
        names = [(number, calls[0].topology) for number, calls in self.numbered.items()]
        changes = [after for (_, a), (after, b) in pairwise(names) if a != b]
        return changes[-1] + 1 if changes else None

    @cached_property
    def share(self) -> float | None:
        """Of the cut bound of what is left: the median call with the last plan; None without a bound or such calls."""
        later = [seconds for number, seconds in self.seconds.items() if number >= (self.planned_anew or 1 << 30)]
        return self.bounds.left / median(later) if later and self.bounds.left else None

    @cached_property
    def longest_s(self) -> float:
        """The longest call from the fault on, those that raised included."""
        raised = [each.ended - each.began for each in self.failures]
        done = [seconds for number, seconds in self.seconds.items() if number >= self.case.before]
        return max((*raised, *done), default=0.0)

    @property
    def raises(self) -> bool:
        """Whether the call whose link is broken should raise."""
        return not self.self_heal and self.case.scenario == "cut"

    @property
    def due(self) -> int:
        """Calls that should give a result."""
        return self.case.before if self.raises else self.case.calls

    @cached_property
    def broken(self) -> tuple[str, ...]:
        """Promises that were not kept."""
        return tuple(_broken(self))

    @cached_property
    def moment_s(self) -> float | None:
        """When the fault came, from the start of its call."""
        views: tuple[Call | Failure, ...] = (*self.calls, *self.failures)
        began = [each.began for each in views if each.call == self.case.before]
        return self.fault[0] - max(began) if self.fault and began else None

    @property
    def last_words(self) -> str:
        """The last line that the ranks have said."""
        return self.said.splitlines()[-1] if self.said else "it said nothing"

    @property
    def where(self) -> str:
        """What was broken, and when."""
        link = "all links" if self.link is None else f"link {self.link[0]}-{self.link[1]}"
        return link if self.moment_s is None else f"{link} at {self.moment_s:.3g} s"

    def record(self) -> dict[str, Any]:
        """For programs."""
        return {
            "link": self.link,
            "moment_s": self.moment_s,
            "inflicting_s": self.fault[1] - self.fault[0] if self.fault else None,
            "status": self.status,
            "intact_s": self.intact_s,
            "bound_s": asdict(self.bounds),
            "share": self.share,
            "planned_anew": self.planned_anew,
            "seconds": self.seconds,
            "topology": self.calls[-1].topology if self.calls else None,
            "warnings": sorted({told for each in self.calls for told in each.warnings}),
            "said": self.said,
            "failures": [asdict(each) for each in self.failures],
            "broken": self.broken,
        }


def _broken(seen: Seen) -> Iterator[str]:
    """In the order of how bad it is."""
    if seen.hung:
        yield f"the job hung after call {max(seen.numbered, default=None)}, and was killed"
    for each in seen.calls:
        if each.wrong:
            yield f"call {each.call}: rank {each.rank} has {each.wrong} wrong elements"
        if not each.unchanged:
            yield f"call {each.call}: what rank {each.rank} sent has changed"
    for number, calls in seen.numbered.items():
        if len(plans := {each.topology for each in calls}) > 1:
            yield f"call {number}: ranks disagree about what is left: {', '.join(sorted(plans))}"
    if seen.left:
        yield f"{seen.left} processes are left"
    if not seen.raises or seen.fault is None:
        for raised in seen.failures:
            yield f"call {raised.call}: rank {raised.rank} raised {raised.kind}: {raised.told}"
    if seen.fault is None:
        yield f"the job ended before its link was broken, with status {seen.status}: {seen.last_words}"
    elif seen.raises:
        yield from _error_broken(seen, seen.fault[1])
    else:
        yield from _healing_broken(seen)


def _healing_broken(seen: Seen) -> Iterator[str]:
    case = seen.case
    if len(seen.calls) < seen.due * seen.ranks:
        yield f"{len(seen.calls)} of {seen.due * seen.ranks} results"
    if seen.status:
        yield f"the job ended with status {seen.status}: {seen.last_words}"
    if case.scenario in ("cut", "cut_and_restored") and seen.intact_s is not None:
        allowed = seen.intact_s + seen.timeout + GRACE_S
        for number, seconds in seen.seconds.items():
            if number >= case.before and seconds > allowed:
                yield f"call {number} took {seconds:.3g} s, more than {allowed:.3g} s"
    if case.scenario in SHARES:
        yield from _plan_broken(seen)


def _plan_broken(seen: Seen) -> Iterator[str]:
    """What became of the plan once a link is dead or slow."""
    last = seen.numbered.get(seen.case.calls - 1, [])
    for each in last:
        noted = {tuple(sorted(arc[:2])) for arc in (*each.dead, *each.slower)}
        if noted != {seen.link}:
            yield f"rank {each.rank} ends with {each.topology!r}, where {seen.link} was broken"
    least = SHARES[seen.case.scenario]
    if last and seen.bounds.left and (seen.share or 0.0) < least:
        share = "no call" if seen.share is None else f"{seen.share:.3f} of the cut bound"
        yield f"{share} with the new plan, less than {least}"


def _error_broken(seen: Seen, inflicted: float) -> Iterator[str]:
    """Without self_heal: an error on every rank, in time, that names the link."""
    told = {each.rank: each for each in seen.failures}
    for rank in range(seen.ranks):
        if rank not in told:
            yield f"rank {rank} raised nothing"
            continue
        each = told[rank]
        if each.kind != "PeerTimeoutError":
            yield f"rank {rank} raised {each.kind}: {each.told}"
        elif each.links != (seen.link,):
            yield f"rank {rank} names {each.links}, not {seen.link}: {each.told}"
        waited = each.ended - max(inflicted, each.began + (seen.intact_s or 0.0))
        if waited > seen.timeout + RAISE_S:
            yield f"rank {rank} raised {waited:.3g} s after all else was done, with a timeout of {seen.timeout:g} s"
    if not seen.status:
        yield "the job ended with status 0"
