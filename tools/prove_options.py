"""The command line of prove.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_options import integer, seconds_of


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    cases: int
    mutants: int
    ranks: int
    seed: int
    first: int
    seconds: float | None
    json: Path | None


def parse(argv: Sequence[str] | None, about: str | None = None) -> Options:
    """Options from the command line; `--help` and bad flags end the process."""
    parser = argparse.ArgumentParser(
        prog="prove.py",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--cases", type=integer(1), default=1000, metavar="N", help="topologies with a schedule each (default 1000)")
    add("--mutants", type=integer(0), default=4, metavar="N", help="of each schedule (default 4)")
    add("--ranks", type=_ranks, default=9, metavar="N", help="at most, 2 to 64 (default 9)")
    add("--seed", type=integer(0), default=0, metavar="N", help="other seeds, other cases (default 0)")
    add("--first", type=integer(0), default=0, metavar="N", help="number of the first case (default 0)")
    add("--seconds", type=seconds_of, metavar="S", help="end after so long, whatever is left")
    add("-J", "--json", type=Path, metavar="PATH", help="write counts and disagreements")
    return Options(**vars(parser.parse_args(argv)))


def _ranks(text: str) -> int:
    ranks = int(integer(2)(text))
    if ranks > 64:
        raise argparse.ArgumentTypeError(f"must be 64 at most, got {text!r}")
    return ranks


_EPILOG = """\
Each case is a random topology (a preset, or a graph with switches, unequal rates, one-way and dead links), a
collective, an algorithm, row counts, and the schedule that is planned for them. It must pass its proof, and, carried
out by the executor over the in-process transport, give what a few lines of NumPy give. A mutant is the schedule with
transfers dropped, repeated, redirected, relabelled, exchanged or moved to another step. A mutant that passes its proof
must run as well as the schedule; one that runs wrong, or not to its end, must have been refused. What is refused and
would have run right breaks one of the rules that are stricter than the result: a link above its capacity share, a
chunk sent twice, or before the step after it came.

exit status: 0 proof and execution agree, 1 they do not somewhere, 2 wrong usage
"""
