"""Training steps of a small transformer over "tasp", our back end of torch.distributed, beside gloo: FSDP2 and DDP,
step by step in one process, on the same numbers.

    mpiexec -n 4 python tools/train_step_perf.py --width 256
    python tools/virtual_cluster.py run --topology full_mesh:4 --link-mbit 100 -- python tools/train_step_perf.py

Rows: median, fastest and slowest step (as long as on the slowest rank), the first back end's median over this one's,
and the loss after the last step, the same but for rounding: the exit status is 1 if it is not.
"""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from perf_launch import check_outputs, check_world, launch
from perf_options import Parser, integer

if TYPE_CHECKING:
    from mpi4py import MPI

TOOL = "train_step_perf"
BACKENDS, KINDS = ("tasp", "gloo"), ("fsdp2", "ddp")


@dataclass(frozen=True)
class Options:
    """What the user asked for."""

    backends: tuple[str, ...]
    kinds: tuple[str, ...]
    width: int
    depth: int
    batch: int
    seq_len: int
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
    for flag, names in (("--backend", BACKENDS), ("--kind", KINDS)):
        parser.add_argument(flag, default=",".join(names), metavar="A,B", help=f"of {', '.join(names)} (default all)")
    parser.add_argument("--width", type=integer(8), default=128, metavar="N", help="d_model, of 8 heads (default 128)")
    parser.add_argument("--depth", type=integer(1), default=2, metavar="N", help="layers (default 2)")
    parser.add_argument("--batch", type=integer(1), default=1, metavar="N", help="sequences per rank (default 1)")
    parser.add_argument("-s", "--seq-len", type=integer(1), default=16, metavar="N", help="tokens each (default 16)")
    parser.add_argument("-n", "--iters", type=integer(1), default=10, metavar="N", help="timed (default 10)")
    parser.add_argument("-w", "--warmup", type=integer(0), default=2, metavar="N", help="untimed (default 2)")
    parser.add_argument("--timeout", type=integer(1), default=600, metavar="S", help="seconds (default 600)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows")
    given = vars(parser.parse_args(argv))
    lists: dict[str, Any] = {}
    for flag, names in (("backend", BACKENDS), ("kind", KINDS)):
        lists[f"{flag}s"] = tuple(given.pop(flag).split(","))
        if wrong := [name for name in lists[f"{flag}s"] if name not in names]:
            parser.error(f"--{flag} must be of {', '.join(names)}, got {wrong[0]!r}")
    if given["width"] % 8:
        parser.error(f"--width must be a multiple of 8, got {given['width']}")
    return Options(**lists, **given)


def _run(world: MPI.Intracomm, options: Options) -> int:
    """The run. torch takes seconds to load, which is too long for --help and what is wrong anyway."""
    check_world(world)
    check_outputs(world, {"--json": options.json})
    from train_step_run import run

    return run(world, options)


if __name__ == "__main__":
    main()
