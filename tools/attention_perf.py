"""Attention over a sequence in shards: TASP on all link-disjoint rings beside ring attention, gathering first, Ulysses
and other people's, on the same numbers in one run.

    mpiexec -n 4 python tools/attention_perf.py --causal --backward
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from attention_options import TOOL, Options, parse
from perf_launch import check_outputs, check_world, launch

if TYPE_CHECKING:
    from mpi4py import MPI


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the test on all ranks and leave with its exit status. argv: None for the process's own."""
    launch(TOOL, lambda quiet: parse(__doc__, argv, quiet=quiet), _run)


def _run(world: MPI.Intracomm, options: Options) -> int:
    """The run. torch takes seconds to load, which is too long for --help and what is wrong anyway."""
    check_world(world)
    check_outputs(world, {"--json": options.json, "--plot": options.plot, "--trace": options.trace})
    from attention_run import run

    return run(world, options)


if __name__ == "__main__":
    main()
