"""AllReduce of a gradient-like vector at few bits beside float32: bytes, seconds with packing, and error.

    mpiexec -n 4 python tools/compressed_perf.py
    python tools/virtual_cluster.py run --topology full_mesh:4 --link-mbit 100 -- python tools/compressed_perf.py

The vector's blocks of 256 elements differ as layers' gradients do, and each rank adds noise of its own. The formats
take turns call by call, all but float32 with error feedback. Columns: what a rank sends, how many times less than
float32 over rings, median, fastest and slowest call (as long as on the slowest rank), the share of it that goes into
quantizing and packing, how many times as fast as the first format, and the relative error (L2) of one call's mean
without feedback. The exit status is 1 if ranks got different bits.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from perf_launch import check_outputs, check_world, launch
from perf_options import Parser, integer

if TYPE_CHECKING:
    from mpi4py import MPI

TOOL = "compressed_perf"
FORMATS = ("dynamic", "2", "3", "4", "5", "6", "7", "8", "bfloat16", "float32")


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    formats: tuple[str, ...]
    elements: int
    mean_bits: float
    iters: int
    warmup: int
    timeout: float
    json: Path | None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run on all ranks and leave with the exit status. argv: None for the process's own."""
    launch(TOOL, lambda quiet: parse(argv, quiet=quiet), _run)


def parse(argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    parser = Parser(quiet, prog=f"{TOOL}.py", description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    usual = "float32,bfloat16,8,dynamic"
    parser.add_argument("--formats", default=usual, metavar="A,B", help=f"of {', '.join(FORMATS)} (default {usual})")
    parser.add_argument("-e", "--elements", type=integer(1), default=2**20, metavar="N", help="default 1048576")
    parser.add_argument("--mean-bits", type=float, default=4.0, metavar="B", help="of dynamic, 1 to 8 (default 4)")
    parser.add_argument("-n", "--iters", type=integer(1), default=11, metavar="N", help="timed (default 11)")
    parser.add_argument("-w", "--warmup", type=integer(0), default=2, metavar="N", help="untimed (default 2)")
    parser.add_argument("--timeout", type=integer(1), default=600, metavar="S", help="seconds (default 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    given = vars(parser.parse_args(argv))
    formats = tuple(given.pop("formats").split(","))
    if wrong := [name for name in formats if name not in FORMATS]:
        parser.error(f"--formats must be of {', '.join(FORMATS)}, got {wrong[0]!r}")
    if not 1 <= given["mean_bits"] <= 8:
        parser.error(f"--mean-bits must be from 1 to 8, got {given['mean_bits']}")
    return Options(formats, **given)


def _run(world: MPI.Intracomm, options: Options) -> int:
    """The run. torch takes seconds to load, which is too long for --help and what is wrong anyway."""
    check_world(world)
    check_outputs(world, {"--json": options.json})
    from compressed_run import run

    return run(world, options)


if __name__ == "__main__":
    main()
