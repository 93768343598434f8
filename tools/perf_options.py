"""The command line of the bandwidth tests: nccl-tests' letters, and the choice of algorithms."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import perf_data
from tasp_coll.presets import KNOWN_SPECS
from tasp_coll.schedule import ALGORITHMS

T = TypeVar("T")
OURS = ("auto", *ALGORITHMS, "native")
PEERS = ("mpi4py", "gloo")
HEALING = "healing"
NAMES = (*OURS, HEALING, *PEERS)
DEFAULT = (*ALGORITHMS, "native")
LARGEST = 1 << 63  # of any number: more does not fit into what counts bytes and calls
_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)(?:I?B)?", re.IGNORECASE)


@dataclass(frozen=True)
class Options:
    """What the user asked for. Sizes are in bytes; `step` multiplies if `multiply`, else it is added."""

    minbytes: int
    maxbytes: int
    step: int
    multiply: bool
    iters: int
    warmup: int
    check: bool
    dtype: str
    aggregate: int
    blocking: bool
    in_place: bool
    statistics: bool
    json: Path | None
    plot: Path | None
    algorithms: tuple[str, ...]
    named: bool  # the user asked for these algorithms: one that cannot run is then an error
    rings: int | None
    topology: str | None
    timeout: float | None
    device: str
    arrays: str
    gpu_transport: str | None
    graphs: int  # replays in an iteration; 0: calls are made, not replayed

    @property
    def queued(self) -> bool:
        """Whether the calls of one iteration are started together and waited for at its end. GPUs have streams."""
        return self.aggregate > 1 and not self.blocking and self.device == "cpu"

    def sizes(self) -> list[int]:
        """From `minbytes` up to `maxbytes`."""
        found = [self.minbytes]
        while (size := found[-1] * self.step if self.multiply else found[-1] + self.step) <= self.maxbytes:
            found.append(size)
        return found


def parse(tool: str, about: str | None, argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    parser = _parser(tool, about, quiet)
    given = parser.parse_args(argv)
    if given.minbytes > given.maxbytes:
        parser.error(f"-b must be at most -e, got {given.minbytes} > {given.maxbytes} bytes")
    algorithms = given.algo or DEFAULT
    queueless = [name for name in algorithms if name in PEERS]
    if given.agg_iters > 1 and not given.blocking and queueless and given.device == "cpu":
        parser.error(f"-m {given.agg_iters} queues its calls, and {queueless[0]} blocks in each: add -z 1")
    if fault := _device_fault(given, algorithms):
        parser.error(fault)
    if given.rings is not None and "rings" not in algorithms:
        parser.error(f"--rings applies to algorithm 'rings', which is not in --algo {','.join(algorithms)}")
    return Options(
        minbytes=given.minbytes,
        maxbytes=given.maxbytes,
        step=given.stepbytes or given.stepfactor or 8,
        multiply=given.stepbytes is None,
        iters=given.iters,
        warmup=given.warmup_iters,
        check=bool(given.check),
        dtype=given.datatype,
        aggregate=given.agg_iters,
        blocking=bool(given.blocking),
        in_place=not given.out_of_place,
        statistics=given.statistics,
        json=given.json,
        plot=given.plot,
        algorithms=algorithms,
        named=given.algo is not None or given.rings is not None,
        rings=given.rings,
        topology=given.topology,
        timeout=given.timeout,
        device=given.device,
        arrays=given.arrays,
        gpu_transport=given.gpu_transport,
        graphs=given.cudagraph,
    )


def _device_fault(given: argparse.Namespace, algorithms: Sequence[str]) -> str:
    """What does not go together with the kind of memory."""
    if given.device == "cpu":
        asked = {"--gpu-transport": given.gpu_transport, "-G": given.cudagraph}
        wrong = [flag for flag, value in asked.items() if value]
        return f"{wrong[0]} is for --device cuda" if wrong else ""
    hosts = [name for name in algorithms if name in PEERS]
    if hosts:
        return f"--algo {hosts[0]} is for --device cpu: on GPUs `native` is the library's own"
    if given.cudagraph and given.blocking:
        return "-G replays calls that nobody waits for in between: leave out -z 1"
    if given.datatype == "bfloat16" and given.arrays != "torch":
        return "-d bfloat16: CuPy has no such arrays: add --arrays torch"
    return ""


class Parser(argparse.ArgumentParser):
    """Of all ranks only one speaks."""

    def __init__(self, quiet: bool, **settings: Any) -> None:
        super().__init__(**settings)
        self._quiet = quiet

    def _print_message(self, message: str, file: Any = None) -> None:
        if not self._quiet:
            super()._print_message(message, file)


def _parser(tool: str, about: str | None, quiet: bool) -> Parser:
    parser = Parser(
        quiet,
        prog=f"{tool}.py",
        description=about,
        epilog=_EPILOG.format(tool=tool, specs=KNOWN_SPECS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_sizes(parser.add_argument_group("what is sent"))
    _add_algorithms(parser.add_argument_group("what is compared"))
    _add_measuring(parser.add_argument_group("how it is measured"))
    _add_device(parser.add_argument_group("memory of GPUs"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_sizes(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-b", "--minbytes", type=size, default=8, metavar="SIZE", help="first size (default 8)")
    group.add_argument("-e", "--maxbytes", type=size, default=16 << 20, metavar="SIZE", help="last (default 16M)")
    step = group.add_mutually_exclusive_group()
    step.add_argument("-f", "--stepfactor", type=integer(2), metavar="N", help="factor to the next (default 8)")
    step.add_argument("-i", "--stepbytes", type=size, metavar="SIZE", help="or what is added to get the next")
    names = ", ".join(perf_data.NAMES)
    group.add_argument(
        "-d", "--datatype", choices=perf_data.NAMES, default="float", metavar="TYPE", help=f"{names} (default float)"
    )


def _add_algorithms(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--algo",
        type=_algorithms,
        metavar="A,B,..",
        help=f"any of {', '.join(NAMES)}, also repeatedly (default {','.join(DEFAULT)}, less those that "
        "cannot run here)",
    )
    group.add_argument("--rings", type=integer(1), metavar="K", help="rings of algorithm 'rings' (default: all)")
    group.add_argument(
        "--topology",
        metavar="SPEC",
        help="a preset or a topology file; adds the bound (default: what TASP_COLL_TOPOLOGY names, else a full mesh)",
    )


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-n", "--iters", type=integer(1), default=20, metavar="N", help="timed (default 20)")
    group.add_argument("-w", "--warmup_iters", type=integer(0), default=5, metavar="N", help="untimed (default 5)")
    group.add_argument(
        "-m", "--agg_iters", type=integer(1), default=1, metavar="N", help="calls in an iteration (default 1)"
    )
    group.add_argument(
        "-z",
        "--blocking",
        type=int,
        choices=(0, 1),
        default=0,
        help="of the calls of -m: 0 starts all, then waits (default); 1 waits for each. With -m 1 they are the same, "
        "but that on GPUs the host's wait is then part of the time",
    )
    group.add_argument(
        "--out-of-place", action="store_true", help="leave out the calls in place: half the time, on slow links"
    )
    group.add_argument(
        "-c", "--check", type=int, choices=(0, 1), default=1, help="check every element of a result (default 1)"
    )
    group.add_argument(
        "--timeout",
        type=seconds_of,
        metavar="S",
        help="seconds without an answer from other ranks that end the job (default: TASP_COLL_TIMEOUT, else 600); "
        "mpi4py's own calls have none",
    )


def _add_device(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: arrays on GPUs, which the ranks of a host take in turn; time is then that of CUDA events around "
        "the calls of an iteration (default cpu)",
    )
    group.add_argument("--arrays", choices=("cupy", "torch"), default="cupy", help="whose arrays (default cupy)")
    group.add_argument(
        "--gpu-transport",
        choices=("auto", "nccl", "ipc"),
        help="what carries them (default: TASP_COLL_GPU_TRANSPORT, else auto)",
    )
    group.add_argument(
        *("-G", "--cudagraph"),
        type=integer(0),
        default=0,
        metavar="N",
        help="capture the calls of -m as a CUDA graph, and launch it N times in an iteration (default 0: make the "
        "calls; tasp_coll repeats those it knows as graphs of its own, unless TASP_COLL_CUDA_GRAPHS=0)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-I", dest="statistics", action="store_true", help="add columns min, max, p99 and variation of the times"
    )
    group.add_argument("-J", "--json", type=Path, metavar="PATH", help="write the results, unrounded")
    group.add_argument("--plot", type=Path, metavar="PATH", help="draw busbw over size, as .png, .svg or .pdf")


def size(text: str) -> int:
    """Bytes: 8, 64K, 1.5M, 2G; K is 1024."""
    found = _SIZE.fullmatch(text.strip())
    number = float(found[1]) * 1024 ** _UNITS[found[2].upper()] if found else 0.0
    if not 1 <= number < LARGEST or number != int(number):
        raise argparse.ArgumentTypeError(f"must be a number of bytes >= 1 such as 8, 64K, 1M or 2G, got {text!r}")
    return int(number)


def integer(low: int) -> Any:
    """The type of an integer of at least `low`."""

    def checked(text: str) -> int:
        if not re.fullmatch(r"\d{1,19}", text.strip()) or not low <= int(text) < LARGEST:
            raise argparse.ArgumentTypeError(f"must be an integer >= {low}, got {text!r}")
        return int(text)

    return checked


def several(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """The type of a list of different values."""

    def checked(text: str) -> tuple[T, ...]:
        found = tuple(kind(part.strip()) for part in text.split(","))
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"must have each value once, got {text!r}")
        return found

    return checked


def seconds_of(text: str) -> float:
    """A time limit."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds > 0, got {text!r}")
    return seconds


def _algorithms(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in NAMES]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be names of {', '.join(NAMES)}, got {unknown[0]!r}")
    return names


_EPILOG = """\
algorithms
  rings    every shard is cut over all link-disjoint Hamiltonian rings of the topology; --rings K takes K of them
  ring     one ring
  direct   everyone sends to everyone
  hierarchical   on several equal nodes: along rails from node to node, and from there inside the nodes
  native   the MPI library's own collective, called through tasp_coll
  auto     what tasp_coll takes if it is not told; the table shows which, as in auto:direct
  healing  the same on a Communicator(self_heal=True): what it costs that calls outlive a dead link
  mpi4py   the MPI library's own collective, called through mpi4py alone: the bare blocking call
  gloo     torch.distributed on its gloo back end, between the same ranks
  On GPUs `native` is NCCL's own; with CUDA IPC there is none.
  All run in one process, iteration by iteration in rotating order, so that what disturbs the machine disturbs all of
  them alike. Naming one twice ("native,native") shows how much of a difference is noise.

definitions, those of nccl-tests
  size     as the title says, rounded down to whole elements for every rank, one at least; equal sizes are shown once
  time     per call. An iteration begins with a barrier and lasts until its slowest rank is done; the median counts
  algbw    size / time, in 1e9 bytes per second
  busbw    algbw times what the links carry per byte of size: the formula is in the header
  #wrong   elements that differ from what they must be, over all ranks; memory of results is spoilt before the check
  ratio    time over that of the first algorithm, out of place: median of the ratios within the iterations
  %bound    busbw over busbw at the cut bound, which no algorithm exceeds on such links; if a topology is named
  model    time that the cost model predicts for the topology, with the agreement that begins every call
  p99      time that 99 % of the iterations do not exceed; variation: standard deviation over mean, in %
  in place: the input lies in the result (the result in the input, for reduce-scatter), at this rank's own part.
  One call before those of -w is never timed: it plans and connects.
  On GPUs: host    microseconds until a call has come back, on the slowest rank: what it costs to give it to a stream
  %copy    bytes that the ranks of a GPU receive in a second, over those that it copies within its own memory

exit status
  0 all is well; 1 an element is wrong, or a call failed; 2 the command line or what it asks for is not possible here

examples
  mpiexec -n 4 python tools/{tool}.py
  mpiexec -n 4 python tools/{tool}.py -b 1K -e 64M -f 4 --algo auto,native,mpi4py,gloo
  mpiexec -n 8 python tools/{tool}.py --topology mi300x -b 16M -e 16M --algo rings,ring -I --json result.json
  mpiexec -n 4 python tools/{tool}.py --algo native,native -n 100

presets of --topology
{specs}
"""
