"""The command line of simulate.py, and its help."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import perf_plot
from attention.forecast import Device
from perf_options import LARGEST, integer
from tasp_coll.links import Node
from tasp_coll.presets import KNOWN_SPECS
from tasp_coll.simulate import Costs

T = TypeVar("T")
COLLECTIVES = ("allgather", "reduce_scatter", "allreduce")
PICTURES = ("speedup", "map", "timeline")
ITEMSIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}
# What forward kernels reach with head_dim 128, 16-bit, long blocks, from their authors' figures: FlashAttention-3
# (arXiv 2407.08608) on H100 SXM, AMD's Composable Kernel on MI300X, FlashAttention-4 on B200; memory from data sheets.
DEVICES = {
    "h100": Device(640e12, half=300, step_s=10e-6, memory_GBps=3350),
    "mi300x": Device(450e12, half=300, step_s=10e-6, memory_GBps=5300),
    "b200": Device(1500e12, half=500, step_s=10e-6, memory_GBps=8000),
}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)([KMG]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Fault:
    """A link between nodes `a` and `b`, both ways, that has `share` of its rate; 0 is dead."""

    a: Node
    b: Node
    share: float

    def __str__(self) -> str:
        return f"{self.a}-{self.b} dead" if not self.share else f"{self.a}-{self.b} at {self.share:g} of its rate"


@dataclass(frozen=True)
class Options:
    """What the user asked for. tokens: of the whole sequence, None for what suits the ranks."""

    topology: str
    collectives: tuple[str, ...]
    sizes: tuple[int, ...]
    tokens: tuple[int, ...] | None
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    itemsize: int
    causal: bool
    backward: bool
    window: int | None
    device: Device
    room: float  # bytes
    interference: float
    link_share: float
    costs: Costs
    faults: tuple[Fault, ...]
    json: Path | None
    plot: Path | None
    picture: str


def parse(about: str | None, argv: Sequence[str] | None) -> Options:
    """Options from the command line; `--help` and bad flags end the process."""
    parser = argparse.ArgumentParser(
        prog="simulate.py",
        description=about,
        epilog=_EPILOG.format(specs=KNOWN_SPECS),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_links(parser.add_argument_group("the links"))
    _add_attention(parser.add_argument_group("the attention"))
    _add_computing(parser.add_argument_group("the computation"))
    _add_output(parser.add_argument_group("output"))
    given = parser.parse_args(argv)
    if given.heads % given.kv_heads:
        parser.error(f"--kv-heads must divide --heads, got {given.kv_heads} and {given.heads}")
    known = DEVICES[given.device or _device_of(given.topology)]
    device = Device(
        known.flops if given.tflops is None else given.tflops * 1e12,
        known.half if given.half_tokens is None else given.half_tokens,
        known.backward,
        known.step_s if given.step_us is None else given.step_us * 1e-6,
        known.memory_GBps,
    )
    return Options(
        topology=given.topology,
        collectives=given.collective,
        sizes=given.sizes,
        tokens=given.seq_len,
        batch=given.batch,
        heads=given.heads,
        kv_heads=given.kv_heads,
        head_dim=given.head_dim,
        itemsize=ITEMSIZES[given.dtype],
        causal=given.causal,
        backward=given.backward,
        window=given.window,
        device=device,
        room=given.room * 2**30,
        interference=given.interference,
        link_share=given.link_share,
        costs=Costs(given.message_us),
        faults=(*(given.dead or ()), *(given.slow or ())),
        json=given.json,
        plot=given.plot,
        picture=given.picture,
    )


def _add_links(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-t", "--topology", required=True, metavar="SPEC", help="a preset or a topology file")
    add(
        *("-c", "--collective"),
        type=_several(_one_of(COLLECTIVES)),
        default=COLLECTIVES[:1],
        metavar="A,B,..",
        help=f"any of {', '.join(COLLECTIVES)} (default allgather)",
    )
    add(
        *("-b", "--sizes"),
        type=_several(count),
        default=(1 << 16, 1 << 20, 1 << 24, 1 << 28),
        metavar="N,N,..",
        help="bytes per rank, such as 64K,16M (default 64K,1M,16M,256M)",
    )
    add("--link-share", type=_real(0, 1), default=1.0, metavar="X", help="what data gets of a link's rate (default 1)")
    add("--message-us", type=_real(), default=0.0, metavar="US", help="of a rank's software per message and end")
    add("--dead", action="append", type=_dead, metavar="A:B", help="the link between A and B is dead; repeatable")
    add("--slow", action="append", type=_slow, metavar="A:B:X", help="it has X of its rate, such as 0:fabric:0.1")


def _add_attention(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        *("-s", "--seq-len"),
        type=_several(count),
        metavar="N,N,..",
        help="tokens of the whole sequence, such as 64K,1M (default 1K, 4K, 16K and 64K for each rank)",
    )
    add("--batch", type=integer(1), default=1, metavar="N", help="sequences (default 1)")
    add("--heads", type=integer(1), default=32, metavar="N", help="heads of queries (default 32)")
    add("--kv-heads", type=integer(1), default=8, metavar="N", help="heads of keys (default 8)")
    add("--head-dim", type=integer(1), default=128, metavar="N", help="elements of a head (default 128)")
    add("-d", "--dtype", choices=tuple(ITEMSIZES), default="bfloat16", help="of all tensors (default bfloat16)")
    add("--causal", action="store_true", help="a token sees those up to itself")
    add("--backward", action="store_true", help="forward and backward; else forward alone")
    add("--window", type=integer(1), metavar="N", help="a token sees the N latest, itself among them")


def _add_computing(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    help_ = "whose kernels compute (default: mi300x and b200 on mi300x and nvl72:U, else h100)"
    add("--device", choices=tuple(DEVICES), help=help_)
    add("--tflops", type=_real(), metavar="X", help="what the forward kernel reaches on long blocks, instead")
    add("--half-tokens", type=_real(), metavar="N", help="tokens of a block with which it reaches half of that")
    add("--step-us", type=_real(), metavar="US", help="what each step costs beside: launches (default 10)")
    add("--room", type=_real(), default=32.0, metavar="GIB", help="memory that a rank can spare (default 32)")
    add(
        "--interference",
        type=_real(0, 1),
        default=0.0,
        metavar="X",
        help="what of a second's computing a second of transfers costs: SMs or cores that copy (default 0)",
    )


def _add_output(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("-J", "--json", type=Path, metavar="PATH", help="write the results, unrounded")
    add("--plot", type=perf_plot.picture, metavar="PATH", help="draw (.png, .svg, .pdf); needs matplotlib")
    add("--picture", choices=PICTURES, default=PICTURES[0], help="what is drawn (default speedup): see below")


def count(text: str) -> int:
    """1000, 64K, 1M, 2G; K is 1024."""
    found = _NUMBER.fullmatch(text.strip())
    number = float(found[1]) * _UNITS[found[2].upper()] if found else 0.0
    if not 1 <= number < LARGEST or number != int(number):
        raise argparse.ArgumentTypeError(f"must be a whole number >= 1 such as 1000, 64K or 1M, got {text!r}")
    return int(number)


def _device_of(topology: str) -> str:
    """The accelerator of a preset."""
    return {"mi300x": "mi300x", "nvl72": "b200"}.get(topology.partition(":")[0], "h100")


def _several(one: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(one(part.strip()) for part in text.split(","))


def _one_of(names: Sequence[str]) -> Callable[[str], str]:
    def name(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be of {', '.join(names)}, got {text!r}")
        return text

    return name


def _real(low: float = 0.0, high: float = 1e12) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}, got {text!r}")
        return value

    return number


def _node(text: str) -> Node:
    return int(text) if text.isdigit() else text


def _dead(text: str) -> Fault:
    if len(ends := text.split(":")) != 2 or not all(ends):
        raise argparse.ArgumentTypeError(f"must be A:B, the ends of a link, such as 0:1, got {text!r}")
    return Fault(_node(ends[0]), _node(ends[1]), 0.0)


def _slow(text: str) -> Fault:
    if len(parts := text.split(":")) != 3 or not all(parts):
        raise argparse.ArgumentTypeError(f"must be A:B:X, such as 0:fabric:0.1, got {text!r}")
    share = _real(0, 1)(parts[2])
    if not share:
        raise argparse.ArgumentTypeError(f"must leave something of the rate (--dead leaves nothing), got {text!r}")
    return Fault(_node(parts[0]), _node(parts[1]), share)


_EPILOG = """\
Nothing is run: every figure is the cost model's, which tools/model_check.py holds against measurements.

collectives
  for each size: time, algbw, busbw, and the time over the cut bound, which no schedule beats. `auto` marks what a
  communicator on this topology would take. native: an MPI library's own, by MPICH's published algorithms.
attention, by method
  tasp          keys and values travel on all link-disjoint rings while the step before is computed
  ring          the same on one ring: ring attention; with --causal zigzag
  hierarchical  the same along rails and inside nodes
  allgather     all keys and values first, then one computation
  ulysses       heads over ranks: all-to-all, attention over the whole sequence, all-to-all back
  exposed is what communication adds to computing; CCR is computing over communicating on one ring; memory is what
  a rank needs beyond inputs and results, roughly; what needs more than --room is not taken for the fastest.
--dead, --slow
  add a table: what is lost if the plan stays (data takes the next shortest way), and if rings are planned anew. For
  up to 1024 ranks.
--picture
  speedup       how many times as fast as ring attention each method is, over CCR, for growing sequences
  map           which method is fastest, by sequence length and batch
  timeline      the steps of each method, links above computation, for the first --seq-len

examples
  python tools/simulate.py --topology mi300x --seq-len 16K,64K,256K --batch 8
  python tools/simulate.py --topology cluster:2048x8 --json out.json
  python tools/simulate.py --topology dgx_h100:8 --causal --backward --plot map.png --picture map
  python tools/simulate.py --topology full_mesh:8 --dead 0:1 --slow 2:3:0.1

presets of --topology
{specs}
"""
