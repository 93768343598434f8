"""What a job of break_peers.py showed, in few words."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from break_peers_cases import RANKS, Case, Ran, Seen

_RANKS_SAID = re.compile(r"\branks?\W{1,3}(\d+(?:(?:, | and )\d+)*)", re.IGNORECASE)
_LINK_SAID = re.compile(r"\bfrom (\d+) to (\d+)\b")
_MANY_TIMES = 1.5  # from here on a call took longer than noise does


@dataclass(frozen=True)
class Verdict:
    """kind: "error" on all ranks; "some" have no error, and no answer either; "wrong" on some, without an error;
    "hang"; "ended", by the launcher, before all had spoken; "right"; "skipped"; "broken", could not start.

    seconds: until the last error, or the job's end. named: whether each error, or warning, names the culprit.
    intact: whether what the ranks passed was as before; None: nobody came back with an error to tell.
    """

    kind: str
    text: str
    seconds: float | None = None
    named: bool | None = None
    intact: bool | None = None


def names(message: str, culprits: Collection[int]) -> bool:
    """Whether a message says which ranks it is about, the culprits among them."""
    lists = _RANKS_SAID.findall(message) + [" ".join(ends) for ends in _LINK_SAID.findall(message)]
    said = {int(number) for each in lists for number in re.findall(r"\d+", each)}
    return said >= set(culprits)


def judge(case: Case, ran: Ran, limit: float) -> Verdict:
    """What a job's ranks saw, and its launcher."""
    if ran.trouble:
        return Verdict("skipped" if ran.skipped else "broken", ran.trouble)
    by = {outcome: [seen for seen in ran.seen if seen.outcome == outcome] for outcome in ("error", "wrong", "right")}
    silent = sorted(set(case.witnesses) - {seen.rank for seen in ran.seen})
    told = [seen for seen in ran.seen if seen.message]
    named = all(names(seen.message, case.culprits) for seen in told) if told else None
    intact = all(seen.intact for seen in by["error"]) if by["error"] else None
    spoken = [seen.at for seen in by["error"]] + ([ran.ended] if ran.ended is not None and silent else [])
    seconds = max(spoken) - ran.began if spoken else None
    text = "; ".join(_parts(case, ran, by, silent, limit))
    return Verdict(_kind(ran, by, silent), text, seconds, named, intact)


def _kind(ran: Ran, by: dict[str, list[Seen]], silent: Sequence[int]) -> str:
    if by["wrong"]:
        return "wrong"
    if silent and ran.ended is not None:
        return "ended"
    if not by["error"]:
        return "hang" if silent else "right"
    return "some" if silent or by["right"] else "error"


def _parts(case: Case, ran: Ran, by: dict[str, list[Seen]], silent: Sequence[int], limit: float) -> list[str]:
    """What there is to say of each group of ranks."""

    def who(ranks: Collection[int]) -> str:
        listed = ", ".join(map(str, sorted(ranks)))
        return "all" if len(ranks) == len(case.witnesses) else f"rank{'s' if len(ranks) > 1 else ''} {listed}"

    parts = []
    if by["error"]:
        last = max(seen.at for seen in by["error"]) - ran.began
        parts.append(f"error on {who([seen.rank for seen in by['error']])} after {last:.1f} s")
    if by["wrong"]:
        parts.append(f"WRONG RESULT, no error, on {who([seen.rank for seen in by['wrong']])}")
    if by["right"]:
        slowdown = max(seen.slowdown for seen in by["right"])
        took = f", the last call {slowdown:.1f} times as long" if slowdown > _MANY_TIMES else ""
        parts.append(f"right on {who([seen.rank for seen in by['right']])}{took}")
    if silent and ran.ended is not None:
        parts.append(f"job ended after {ran.ended - ran.began:.1f} s with status {ran.status}")
    elif silent:
        parts.append(f"NO ANSWER from {who(silent)} in {limit:g} s")
    return parts


def line(case: str, system: str, verdict: Verdict) -> str:
    """A row of the table."""
    named = {True: "yes", False: "no", None: ""}[verdict.named]
    intact = {True: "intact", False: "CHANGED", None: ""}[verdict.intact]
    return f"{case:13} {system:12} {verdict.kind:8} {named:6} {intact:8} {verdict.text}"


HEADER = f"{'case':13} {'system':12} {'seen':8} {'named':6} {'send':8} of {RANKS} ranks"
