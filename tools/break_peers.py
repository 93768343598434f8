"""Breaks collectives in many ways, ours and others', and prints what a user sees of it. See --help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tasp_coll
from break_peers_cases import CASES, RANKS, SYSTEMS, Case
from break_peers_job import TOPOLOGY, Limits, run
from break_peers_verdict import HEADER, Verdict, judge, line
from perf_launch import can_write
from perf_options import size
from perf_report import write_json
from vcluster_job import Stopped, signals_stop

ABOUT = f"""\
What does a program see when a link is cut, when a rank is stopped or killed, when ranks call what does not fit? Each
case is a job of its own, {RANKS} ranks in shared memory or, where links matter, on a virtual cluster ({TOPOLOGY})."""


def _list(about: dict[str, str]) -> str:
    return "\n".join(f"  {name:13} {told}" for name, told in about.items())


EPILOG = f"""\
cases
{_list({case.name: case.about for case in CASES.values()})}

systems
{_list(SYSTEMS)}

the table
  seen    error: on all ranks that could have one. some: only on some, others do not answer. WRONG: a result that is
          not right, without an error. hang: no answer within --limit. ended: by the launcher. right
  named   whether each error, or warning, says which rank it was, or which link
  send    whether what was passed to the call that failed is as it was before
--json writes {{"tool", "version", "world_size", "transport", "topology", "timeout", "limit", "results": [{{"case",
  "about", "system", "kind", "text", "seconds", "named", "intact", "messages": {{rank: message}}, "log"}}]}}

exit status
  0: all was seen, or skipped as this machine cannot do it. 1: a job did not start. 2: wrong usage
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        "break_peers.py", description=ABOUT, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = made.add_argument
    add("--only", type=_names("case", CASES), default=tuple(CASES), metavar="CASE,..", help="default: all")
    add("--systems", type=_names("system", SYSTEMS), default=tuple(SYSTEMS), metavar="SYSTEM,..", help="default: all")
    add("--timeout", type=_seconds, default=3.0, metavar="S", help="given to those that take one (default 3)")
    add("--limit", type=_seconds, default=15.0, metavar="S", help="then a rank is said to hang (default 15)")
    add("-b", "--bytes", type=size, default=64 << 10, metavar="SIZE", help="of each rank, where calls differ (64K)")
    add("--json", type=Path, metavar="PATH", help="write all that was seen for programs")
    return made


def _names(kind: str, known: Sequence[str] | dict[str, Any]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        given = tuple(text.split(","))
        for name in given:
            if name not in known:
                raise argparse.ArgumentTypeError(f"a {kind} is one of {', '.join(known)}, got {name!r}")
        return given

    return names


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"must be seconds in 0.1..3600, got {text!r}")
    return value


def _shown(jobs: Sequence[tuple[Case, str]]) -> Iterator[tuple[Case, str]]:
    """The jobs, with a progress bar on a terminal, if tqdm is there."""
    if not sys.stderr.isatty():
        return iter(jobs)
    try:
        from tqdm import tqdm
    except ImportError:
        return iter(jobs)
    return iter(tqdm(jobs, unit="job", leave=False))


@dataclass(frozen=True)
class Result:
    """What one job showed. messages: of errors and warnings, by rank. log: what it printed, if it was ended."""

    case: Case
    system: str
    verdict: Verdict
    messages: dict[int, str]
    log: str

    def record(self) -> dict[str, Any]:
        """For programs."""
        head = {"case": self.case.name, "about": self.case.about, "system": self.system}
        return {**head, **asdict(self.verdict), "messages": self.messages, "log": self.log}


def look(asked: argparse.Namespace) -> Iterator[Result]:
    """Run all jobs that were asked for; what each showed."""
    cases = [case for name, case in CASES.items() if name in asked.only]
    jobs = [(case, system) for case in cases for system in case.systems if system in asked.systems]
    for case, system in _shown(jobs):
        limits = Limits(asked.timeout, asked.limit * case.patience, asked.bytes)
        ran = run(case, system, limits)
        messages = {seen.rank: seen.message for seen in ran.seen if seen.message}
        yield Result(case, system, judge(case, ran, limits.limit), messages, "" if ran.ended is None else ran.log)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    command = parser()
    asked = command.parse_args(argv)
    if asked.json is not None and not can_write(asked.json):
        command.error(f"--json must be a file in a directory that can be written to, got {str(asked.json)!r}")
    print(HEADER, flush=True)
    results = []
    try:
        with signals_stop():
            for result in look(asked):
                results.append(result)
                print(line(result.case.name, result.system, result.verdict), flush=True)
    except Stopped as stopped:
        return stopped.status
    if asked.json is not None:
        head = {"tool": command.prog, "version": tasp_coll.__version__, "world_size": RANKS, "transport": "mpi, gloo"}
        limits = {"topology": TOPOLOGY, "timeout": asked.timeout, "limit": asked.limit}
        write_json(asked.json, {**head, **limits}, results)
    return 1 if any(result.verdict.kind == "broken" for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
