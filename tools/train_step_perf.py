"""Training steps of unchanged torch programs, DDP and FSDP2, over tasp-coll's backend beside Gloo's, in one run.

    mpiexec -n 4 python tools/train_step_perf.py
    python tools/virtual_cluster.py run --topology full_mesh:4 --link-mbit 100 -- python tools/train_step_perf.py

The model is a small transformer with random weights; every rank has data of its own. Each backend trains a copy, step
by step in turn, and at the end their losses and weights are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from perf_launch import check_outputs, check_world, launch
from perf_options import Parser, integer, seconds_of

if TYPE_CHECKING:
    from mpi4py import MPI

TOOL = "train_step_perf"
BACKENDS = ("tasp", "gloo")
PROGRAMS = ("ddp", "fsdp")


@dataclass(frozen=True)
class Options:
    """What the user asked for. Sizes of the model: layers of `width`, `seq_len` tokens, `batch` sequences a rank."""

    backends: tuple[str, ...]
    programs: tuple[str, ...]
    width: int
    depth: int
    seq_len: int
    batch: int
    iters: int
    warmup: int
    timeout: float | None
    json: Path | None

    def shapes(self) -> dict[str, int]:
        """The model, for the report."""
        return {name: value for name, value in asdict(self).items() if name in ("width", "depth", "seq_len", "batch")}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run on all ranks and leave with the exit status. argv: None for the process's own."""
    launch(TOOL, lambda quiet: parse(argv, quiet=quiet), _run, "pip install 'tasp-coll[mpich,attention]'")


def parse(argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(quiet, prog=f"{TOOL}.py", description=__doc__, formatter_class=form, allow_abbrev=False)
    add = parser.add_argument
    add("--backend", dest="backends", type=_names(BACKENDS), default=BACKENDS, metavar="A,B", help="tasp,gloo")
    add("--program", dest="programs", type=_names(PROGRAMS), default=PROGRAMS, metavar="A,B", help="ddp,fsdp")
    add("--width", type=integer(8), default=256, metavar="N", help="features, a multiple of 8 (256)")
    add("--depth", type=integer(1), default=4, metavar="N", help="layers (4)")
    add("--seq-len", type=integer(1), default=32, metavar="N", help="tokens of a sequence (32)")
    add("--batch", type=integer(1), default=1, metavar="N", help="sequences a rank has in a step (1)")
    add("-n", "--iters", dest="iters", type=integer(1), default=7, metavar="N", help="timed steps (7)")
    add("-w", "--warmup", dest="warmup", type=integer(0), default=2, metavar="N", help="untimed steps before (2)")
    add("--timeout", type=seconds_of, metavar="SECONDS", help="for each wait (TASP_COLL_TIMEOUT, else 600)")
    add("-J", "--json", type=Path, metavar="PATH", help="rank 0 writes the results there")
    options = Options(**vars(parser.parse_args(argv)))
    if options.width % 8:
        parser.error(f"--width must be a multiple of 8, got {options.width}")
    return options


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"must be of {', '.join(known)}, got {text!r}")
        return found

    return names


def _run(world: MPI.Intracomm, options: Options) -> int:
    """The run. torch takes seconds to load, which is too long for --help and what is wrong anyway."""
    check_world(world)
    check_outputs(world, {"--json": options.json})
    from train_step_run import run

    return run(world, options)


if __name__ == "__main__":
    main()
