"""Break a rank at random moments, time and again, and see that the others are told in time and nothing stays behind."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import tasp_coll
from break_job import HOWS, LAUNCHERS, Case, Outcome, break_one
from perf_options import integer, seconds_of
from perf_report import write_json
from vcluster_job import Stopped, signals_stop
from vcluster_room import MissingError

TOOL = "break_ranks"
_LATEST_MOMENT = 1.0  # seconds
_RIGHT = f"{'raised s':>8} {'over s':>7} {'wrong':>5}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run; the exit status. argv: None for the process's own."""
    options = parser().parse_args(argv)
    cases = [case for launcher in options.launcher for how in options.how for case in _cases(options, launcher, how)]
    outcomes: list[Outcome] = []
    about = f"{options.ranks} ranks, timeout {options.timeout:g} s"
    print(f"# {TOOL}, tasp-coll {tasp_coll.__version__}, {about}", flush=True)
    try:
        with signals_stop():  # the job under way is ended, and what was seen is told
            for case in _bar(cases):
                outcomes.append(break_one(case))
                if outcomes[-1].fault or options.verbose:
                    print(_line(outcomes[-1]), flush=True)
    except Stopped as stopped:
        print(f"{TOOL}: {stopped} after {len(outcomes)} of {len(cases)} jobs", file=sys.stderr)
    except MissingError as error:
        print(f"{TOOL}: {error}", file=sys.stderr)
        return 2
    print("\n".join(_table(outcomes)), flush=True)
    if options.json is not None:
        head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": options.ranks, "seed": options.seed}
        write_json(options.json, head, outcomes)
    return int(len(outcomes) < len(cases) or any(outcome.fault for outcome in outcomes))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{TOOL}.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--how", type=_names(HOWS), default=HOWS, metavar="A,B", help=f"any of {', '.join(HOWS)} (all)")
    parser.add_argument(
        "--launcher", type=_names(LAUNCHERS), default=("mpiexec",), metavar="A,B", help=f"any of {', '.join(LAUNCHERS)}"
    )
    parser.add_argument("-n", "--times", type=integer(1), default=3, metavar="N", help="moments of each (default 3)")
    parser.add_argument("--ranks", type=integer(2), default=3, metavar="N", help="default 3")
    parser.add_argument("--timeout", type=seconds_of, default=2.0, metavar="S", help="of the communicators (default 2)")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of moments and calls (default 0)")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each job, not only for faults")
    parser.add_argument("-J", "--json", type=Path, metavar="PATH", help="write all outcomes")
    return parser


def _names(known: Sequence[str]) -> Any:
    """The type of a list of known names."""

    def checked(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"must be names of {', '.join(known)}, got {unknown[0]!r}")
        return names

    return checked


def _cases(options: argparse.Namespace, launcher: str, how: str) -> Iterator[Case]:
    rng = random.Random(f"{options.seed}/{launcher}/{how}")
    for number in range(options.times):
        victim, moment = rng.randrange(options.ranks), rng.uniform(0, _LATEST_MOMENT)
        yield Case(launcher, how, options.ranks, victim, moment, 1000 * options.seed + number, options.timeout)


def _bar(cases: Sequence[Case]) -> Iterator[Case]:
    """With a progress bar, on a terminal, if tqdm is there."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            return iter(tqdm(cases, unit="job", leave=False))
    return iter(cases)


def _line(outcome: Outcome) -> str:
    case = outcome.case
    what = f"{case.launcher}, {case.how} rank {case.victim} after {case.moment:.3f} s (seed {case.seed})"
    return f"{what}: {outcome.ending}, over after {outcome.ended_s:.1f} s: {outcome.fault or outcome.says or 'ended'}"


def _table(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """A line for each launcher and mishap."""
    yield f"{'launcher':<9} {'how':<10} {'times':>5} {'all raised':>10} {'ended first':>11} {_RIGHT}"
    groups = dict.fromkeys((each.case.launcher, each.case.how) for each in outcomes)
    for launcher, how in groups:
        mine = [each for each in outcomes if (each.case.launcher, each.case.how) == (launcher, how)]
        raised = [each for each in mine if each.ending == "raised"]
        waits = [each.raised_s for each in mine if each.raised_s is not None]
        slowest = f"{max(waits):.2f}" if waits else "-"
        yield (
            f"{launcher:<9} {how:<10} {len(mine):>5} {len(raised):>10} {len(mine) - len(raised):>11} {slowest:>8} "
            f"{max(each.ended_s for each in mine):>7.1f} {sum(bool(each.fault) for each in mine):>5}"
        )


_EPILOG = f"""\
what is done to one rank, drawn each time, while all make random collectives (those of soak.py)
  stop       SIGSTOP. The others must raise PeerTimeoutError, naming it, within the timeout and 2 s
  silent     it makes no further call. The same
  kill       SIGKILL. The same, or the launcher ends the job at once
  raise      it raises between two calls. The same
  interrupt  Ctrl-C. KeyboardInterrupt comes out; its communicator can be used, or says why not
  In every case the job ends with a failure status, and no process is left.

launchers
  mpiexec   ends the job when a rank leaves without MPI_Finalize
  torchrun  ends all ranks when one fails; one that is stopped gets 30 s
  none      ranks that nobody looks after, on Gloo, through a file: survivors are on their own

columns
  all raised   jobs in which every survivor raised;  ended first: the launcher was faster
  raised s     the longest that a survivor waited, from the beginning of its call;  over s: until the job was over

exit status
  0 all as it must be; 1 something is not; 2 the command line, or no launcher

examples
  python tools/{TOOL}.py --how stop,kill -n 20 --json broken.json
  python tools/{TOOL}.py --launcher torchrun,none --how stop,kill -n 20
"""

if __name__ == "__main__":
    sys.exit(main())
