"""The command line of fuzz.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perf_options import integer, seconds_of

# Of a thousand inputs: what is read often, and fast, most.
SHARES = {
    "spec": 400,
    "topology": 160,
    "cache": 250,
    "cli": 90,
    "env": 60,
    "results": 20,
    "cluster": 17,
    "checkpoint": 2,
    "run": 1,
}


@dataclass(frozen=True)
class Options:
    """What the user asked for. parsers: with their shares of the inputs."""

    parsers: dict[str, int]
    inputs: int
    seconds: float | None
    seed: int
    first: int
    limit: float
    room: float  # GiB
    json: Path | None


def parse(argv: Sequence[str] | None, about: str | None = None) -> Options:
    """Options from the command line; `--help` and bad flags end the process."""
    parser = argparse.ArgumentParser(
        prog="fuzz.py",
        description=about,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--parser",
        dest="parsers",
        type=_parsers,
        default=SHARES,
        metavar="A,B,..",
        help=f"of {', '.join(SHARES)} (default all)",
    )
    add("--inputs", type=integer(1), default=10_000, metavar="N", help="over all parsers (default 10000)")
    add("--seconds", type=seconds_of, metavar="S", help="end after so long, whatever is left")
    add("--seed", type=integer(0), default=0, metavar="N", help="other seeds, other inputs (default 0)")
    add("--first", type=integer(0), default=0, metavar="N", help="number of each parser's first input (default 0)")
    add("--limit", type=seconds_of, default=60.0, metavar="S", help="an input that takes longer hangs (default 60)")
    add("--room", type=seconds_of, default=4.0, metavar="GIB", help="memory that an input may take (default 4)")
    add("-J", "--json", type=Path, metavar="PATH", help="write counts and findings")
    return Options(**vars(parser.parse_args(argv)))


def _parsers(text: str) -> dict[str, int]:
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in SHARES]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be of {', '.join(SHARES)}, got {unknown[0]!r}")
    return {name: SHARES[name] for name in names}


_EPILOG = """\
parsers
  spec        a preset's spec
  topology    a topology file: read, bound, routed, written and read again
  cache       a table that Communicator.tune keeps
  cli         the command line of every tool (nothing is run)
  env         TASP_COLL_TOPOLOGY, _TIMEOUT, _CACHE, _KERNEL and _CLUSTERS
  results     what attention_curve.py and model_check.py --results read
  cluster     what virtual_cluster.py notes of clusters and faults
  checkpoint  what train_lm.py --resume reads; needs torch, transformers and safetensors
  run         show_plan.py and simulate.py, run on such files

Inputs are valid ones and what becomes of them when bytes, tokens or parts of their structure are changed. An input may
be taken, or refused by a documented error: a CollectiveError that says what is wrong, or argparse's exit status 2 with
a message that names the argument. Anything else is a finding, as is an input that takes too long or too much memory.

exit status: 0 nothing was found, 1 something was, 2 wrong usage

examples
  python tools/fuzz.py --inputs 1000000
  python tools/fuzz.py --parser topology --seed 7 --first 123 --inputs 1      one input again, as a finding tells
"""
