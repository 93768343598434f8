"""The command line of `attention_perf.py`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from attention.kv_bits import Bits
from perf_options import LARGEST, Parser, integer, seconds_of
from tasp_coll import ArgumentError
from tasp_coll.presets import KNOWN_SPECS

TOOL = "attention_perf"
OURS = ("tasp", "ring", "allgather", "ulysses", "auto")
COMPUTE = "compute"
WHOLE = ("allgather", "ulysses")  # which do not compute step by step
QUANTIZED = ("tasp", "ring", "allgather", "auto")  # which can send keys and values in few bits
PEERS = ("sdpa", "ringmaster", "ringmaster-zigzag")
METHODS = (*OURS, COMPUTE, *PEERS)
DEFAULT = OURS[:4]
DTYPES = ("float64", "float32", "bfloat16", "float16")
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([KM]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}


@dataclass(frozen=True)
class Options:
    """What the user asked for. seq_len: tokens of the whole sequence."""

    methods: tuple[str, ...]
    kv_bits: tuple[int | str | None, ...]
    named: bool  # the user asked for these: one that cannot run is then an error
    seq_len: int
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: str
    causal: bool
    backward: bool
    window: int | None
    iters: int
    warmup: int
    check: bool
    silent: bool
    json: Path | None
    plot: Path | None
    trace: Path | None
    topology: str | None
    timeout: float | None
    device: str


def parse(about: str | None, argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line; `--help` and bad flags end the process, without a word if `quiet`."""
    parser = _parser(about, quiet)
    given = parser.parse_args(argv)
    kv_heads = given.kv_heads or given.heads
    if given.heads % kv_heads:
        parser.error(f"--kv-heads must divide --heads, got {kv_heads} and {given.heads}")
    if given.check and given.no_comm:
        parser.error("--check needs data, which --no-comm does not send")
    peers = [name for name in given.method or () if name in PEERS]
    if given.device == "cuda" and peers:
        parser.error(f"--device cuda: {peers[0]} is compared in host memory only")
    if given.no_comm and peers:
        parser.error(f"--no-comm silences tasp_coll, and {peers[0]} does not communicate by it")
    return Options(
        methods=given.method or DEFAULT,
        kv_bits=given.kv_bits,
        named=given.method is not None,
        seq_len=given.seq_len,
        batch=given.batch,
        heads=given.heads,
        kv_heads=kv_heads,
        head_dim=given.head_dim,
        dtype=given.dtype,
        causal=given.causal,
        backward=given.backward,
        window=given.window,
        iters=given.iters,
        warmup=given.warmup_iters,
        check=given.check,
        silent=given.no_comm,
        json=given.json,
        plot=given.plot,
        trace=given.trace,
        topology=given.topology,
        timeout=given.timeout,
        device=given.device,
    )


def _parser(about: str | None, quiet: bool) -> Parser:
    parser = Parser(
        quiet,
        prog=f"{TOOL}.py",
        description=about,
        epilog=_EPILOG.format(specs=KNOWN_SPECS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_attention(parser.add_argument_group("the attention"))
    _add_compared(parser.add_argument_group("what is compared"))
    _add_measuring(parser.add_argument_group("how it is measured"))
    _add_output(parser.add_argument_group("output"))
    return parser


def _add_attention(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        *("-s", "--seq-len"),
        type=count,
        default=4096,
        metavar="N",
        help="tokens of the whole sequence, any number, such as 1000, 64K, 1M (default 4K)",
    )
    group.add_argument("--batch", type=integer(1), default=1, metavar="N", help="sequences (default 1)")
    group.add_argument("--heads", type=integer(1), default=8, metavar="N", help="heads of queries (default 8)")
    group.add_argument("--kv-heads", type=integer(1), metavar="N", help="heads of keys (default: as --heads)")
    group.add_argument("--head-dim", type=integer(1), default=64, metavar="N", help="elements of a head (default 64)")
    group.add_argument("-d", "--dtype", choices=DTYPES, default="float32", help="of all tensors (default float32)")
    group.add_argument("--causal", action="store_true", help="a token sees those up to itself; work stays even")
    group.add_argument("--window", type=integer(1), metavar="N", help="a token sees the N latest, itself among them")
    group.add_argument("--backward", action="store_true", help="forward and backward; else forward alone")


def _add_compared(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        *("-m", "--method"),
        type=_methods,
        metavar="A,B,..",
        help=f"any of {', '.join(METHODS)}, also repeatedly (default {','.join(DEFAULT)}, less those that cannot run)",
    )
    group.add_argument(
        "--kv-bits",
        type=_kv_bits,
        default=(None,),
        metavar="A,B,..",
        help="tasp, ring, allgather and auto with keys and values that travel so, each in turn: none (as they are, the "
        "default), 2 to 8, dynamic, or dynamic:MEAN",
    )
    group.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="cuda: tensors on GPUs, which the ranks of a host take in turn; what is said of compute, wait and merge "
        "is then the time to queue them (default cpu)",
    )
    group.add_argument("--no-comm", action="store_true", help="carry no data: what the methods take without it")
    group.add_argument(
        "--topology",
        metavar="SPEC",
        help="a preset or a topology file (default: what TASP_COLL_TOPOLOGY names, else a full mesh)",
    )


def _add_measuring(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-n", "--iters", type=integer(1), default=10, metavar="N", help="timed (default 10)")
    group.add_argument("-w", "--warmup-iters", type=integer(0), default=2, metavar="N", help="untimed (default 2)")
    group.add_argument(
        *("-c", "--check"),
        action="store_true",
        help="compare with dense attention in float64 on rank 0, gradients too with --backward: it takes long, "
        "and a few times 8 bytes for each pair of tokens",
    )
    group.add_argument(
        "--timeout",
        type=seconds_of,
        metavar="S",
        help="seconds without an answer from other ranks that end the job (default: TASP_COLL_TIMEOUT, else 600)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-J", "--json", type=Path, metavar="PATH", help="write the results, unrounded")
    group.add_argument("--plot", type=Path, metavar="PATH", help="draw where the time goes, as .png, .svg or .pdf")
    group.add_argument(
        "--trace", type=Path, metavar="PATH", help="write the last iteration of all ranks for ui.perfetto.dev"
    )


def count(text: str) -> int:
    """Tokens: 1000, 64K, 1M; K is 1024."""
    found = _COUNT.fullmatch(text.strip())
    number = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if not 1 <= number < LARGEST or number != int(number):
        raise argparse.ArgumentTypeError(f"must be a number of tokens >= 1 such as 1000, 64K or 1M, got {text!r}")
    return int(number)


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise argparse.ArgumentTypeError(f"must be names of {', '.join(METHODS)}, got {unknown[0]!r}")
    return names


def kv_bits(text: str) -> int | str | None:
    """`kv_bits` of a call: none, 8, dynamic."""
    name = text.strip()
    found = None if name == "none" else int(name) if name.isdecimal() else name
    try:
        Bits.of(found)
    except ArgumentError:
        raise argparse.ArgumentTypeError(f"must be none, 2 to 8, dynamic or dynamic:MEAN, got {name!r}") from None
    return found


def label(method: str, bits: int | str | None) -> str:
    """A method with its bits, for tables."""
    return method if bits is None else f"{method}/{bits}"


def _kv_bits(text: str) -> tuple[int | str | None, ...]:
    return tuple(kv_bits(name) for name in text.split(","))


_EPILOG = """\
methods
  tasp       keys and values travel on all link-disjoint rings while the step before is computed
  ring       the same on one ring: ring attention; with --causal zigzag, so that work is even
  allgather  all keys and values first, then one computation
  ulysses    heads over ranks: all-to-all, attention over the whole sequence, all-to-all back
  auto       what context_parallel_attention takes by itself
  compute    tasp's blocks with communication switched off: agreements travel, data does not
  sdpa       torch alone: gloo gathers keys and values, scaled_dot_product_attention computes
  ringmaster axolotl-ringmaster's ring attention over gloo, if it is installed. On a CPU it multiplies whole blocks of
             scores in float32, and its causal shards are contiguous: the last rank has most of the work
  ringmaster-zigzag   its balanced one, for --causal; on a CPU it exists for packed documents, of which this makes one
  All run in one process, iteration by iteration in rotating order, so that what disturbs the machine disturbs all of
  them alike. Naming one twice ("ring,ring") shows how much of a difference is noise.

columns
  time     an iteration begins with a barrier and lasts until its slowest rank is done; the median of them counts.
           compute, exposed and merge are parts of it, on that rank; what is left is packing, agreement and Python
  compute  in kernels. Ranks that share cores slow each other down: then this is time, not work
  exposed  waiting for data that is not there yet
  merge    making one result of the blocks' results, and one gradient of theirs
  ratio    time over that of the first method: median of the ratios within the iterations
  ideal    (tasp, ring) the shorter one of computing and communicating is hidden: with T for the communication and C for
           the computation, n ranks: (n-1) * max(C/n, T/(n-1)) + C/n, forward, and the same for backward. T is
           measured on one ring, computing nothing; on all rings it is as much shorter as the cost model says
           (n-1 times, on a full mesh). C is measured with communication switched off, kernels and merging
  model    the cost model's time: from the links of the topology that was named and from C, not from T. For allgather
           and ulysses C is their own computation, which is not cut into steps
  CCR      C over T on one ring, in the head: below 1 communication takes longer
  peak     memory beyond inputs and results at the worst moment of a call, as the operating system saw it (Linux)
  error    of --check: the largest of any element, over the largest element of its tensor; the worst tensor counts
  rms      of --check: the root mean square of the result's errors over that of the result

exit status
  0 all is well; 1 an error of ours is above 1e-10 (float64), 1e-5 (float32), 4e-2 (bfloat16) or 5e-3 (float16), or a
  call failed; at --kv-bits B (dynamic: its mean) 2^(2-B) more is allowed
  2 the command line or what it asks for is not possible here

examples
  mpiexec -n 4 python tools/attention_perf.py --method tasp --kv-bits none,8,4,dynamic --dtype bfloat16 --check
  mpiexec -n 4 python tools/attention_perf.py --seq-len 8K --causal --backward --check
  mpiexec -n 4 python tools/attention_perf.py --method tasp,ring,compute --plot parts.png --trace trace.json
  On links that are the bottleneck, as between accelerators, only slower:
  tools/virtual_cluster.py run --topology full_mesh:8 --link-mbit 50 -- \\
    python tools/attention_perf.py --seq-len 4K --method tasp,ring,allgather,ulysses,compute --json out.json

presets of --topology
{specs}
"""
