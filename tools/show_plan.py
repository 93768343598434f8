"""Show what a collective does on a topology: rings, steps, link loads, proof, and time by bandwidth. Needs no MPI."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from tasp_coll import ArgumentError, Link, Schedule, ScheduleError, Topology, TopologyError, __version__, plan
from tasp_coll.loads import chunk_units, step_load
from tasp_coll.presets import KNOWN_SPECS, is_preset
from tasp_coll.schedule import ALGORITHMS, COLLECTIVES
from tasp_coll.topology import Node
from tasp_coll.verify import REPLAY_CELLS

MANY_RANKS = 32  # above it rings are elided
FEW_RINGS = 4  # of those that are then shown
FEW_STOPS = 12  # ranks shown of each
MANY_MOVES = 40  # lines of the step table above which it is elided
FEW_MOVES = 8  # lines then shown of a step
MATRIX_RANKS = 8
SUFFIXES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

EXAMPLES = f"""
examples:
  %(prog)s full_mesh:8                                   all seven rings, and rank 0's steps
  %(prog)s full_mesh:8 --algorithm ring                  one ring: see how many links stay idle
  %(prog)s mi300x --rank 3 --shard-bytes 64M             rank 3's view; times at 64 MiB a shard
  %(prog)s nvswitch:8 --collective allreduce --all       every step, nothing left out
  %(prog)s torus:4x4 --algorithm direct                  what direct exchange costs where links are few
  %(prog)s full_mesh:4 --counts 4,0,7,1                  shards of unequal rows, as in allgatherv
  %(prog)s my_box.json --rings 2 --plot plan.png         your own topology file, and a picture
  %(prog)s full_mesh:8 --json plan.json                  the same facts for programs

presets:
{KNOWN_SPECS}

A load is the share of a shard that a link carries; with --counts, of the largest shard. "In a step" is the most that
the link carries in any one step, "in all" the sum over the steps. The time counts bandwidth only: at each step the link
that is busiest for its rate, added up. The cut bound is the least time that any schedule needs; of an allreduce it is
that of a reduce_scatter and an allgather together. Of an all_to_all the shard is the n blocks that a rank sends.

--json writes {{"tool", "version", "world_size", "transport": null, "topology", "results": [{{...}}]}} where the result has
  collective, algorithm, steps, chunks, counts (null: equal)
  rings       [{{"ranks": [0, 3, ...], "weight": "1/7"}}], empty for direct
  rank, sends, receives   the moves of --rank: [{{"step", "peer", "origin", "chunk", "ring"}}]
  loads       [{{"from", "to", "step_max", "total"}}], links that carry something
  links, idle_links       numbers of links
  proof       {{"method": "replay" or "structure", "seconds"}}
  shard_bytes, time_s, bound_s, ratio     bound_s and ratio are null where no bound is known
Weights and loads are exact fractions in strings; times are unrounded.

exit status: 0 the plan is proved, 1 it fails its proof, 2 it cannot be made as asked
"""


class Move(NamedTuple):
    """What the chosen rank sends to, or receives from, `peer`: chunk `chunk` of `origin`'s shard."""

    step: int
    peer: int
    origin: int
    chunk: int
    ring: int


class LinkLoad(NamedTuple):
    """The most that a link carries in one step, and what it carries in all, in `Loads.unit`."""

    source: Node
    target: Node
    step_max: int
    total: int


@dataclass(frozen=True)
class Loads:
    """Loads in 1/unit of the largest shard of the links that carry any; `seconds_per_byte` of such a shard."""

    unit: int
    links: tuple[LinkLoad, ...]
    seconds_per_byte: float


@dataclass(frozen=True)
class View:
    """All that is told of a proved schedule: what the text, the JSON and the picture are made from.

    sends and receives stand side by side, step by step and ring by ring. reduce_steps: how many steps, the first
    ones, move sums. bound: seconds, None where none is known.
    """

    schedule: Schedule
    rank: int
    sends: tuple[Move, ...]
    receives: tuple[Move, ...]
    reduce_steps: int
    loads: Loads
    proof: str
    proof_seconds: float
    shard_bytes: float
    seconds: float
    bound: float | None

    @property
    def topology(self) -> Topology:
        return self.schedule.topology

    @property
    def steps(self) -> int:
        return self.schedule.pattern.steps

    @property
    def ratio(self) -> float | None:
        """Time over bound, None where there is no bound to speak of."""
        return self.seconds / self.bound if self.bound else None

    @property
    def idle(self) -> int:
        """Links that carry nothing."""
        return len(self.topology.links) - len(self.loads.links)

    def share(self, amount: int) -> Fraction:
        """A load as a share of the (largest) shard."""
        return Fraction(amount, self.loads.unit)


# --- from a schedule to a view


def view_of(schedule: Schedule, rank: int = 0, shard_bytes: float = SUFFIXES["M"]) -> View:
    """Prove a schedule made by `plan` and gather what is told of it. Raises ScheduleError if the proof fails."""
    if not 0 <= rank < schedule.ranks:
        raise ArgumentError(f"rank must be from 0 to {schedule.ranks - 1}, got {rank}")
    method, proof_seconds = prove(schedule)
    loads = loads_of(schedule)
    sends, receives = (tuple(Move(*row) for row in rows.tolist()) for rows in schedule.pattern.moves(rank))
    return View(
        schedule,
        rank,
        sends,
        receives,
        _reduce_steps(schedule),
        loads,
        method,
        proof_seconds,
        shard_bytes,
        loads.seconds_per_byte * shard_bytes,
        _bound(schedule, shard_bytes),
    )


def prove(schedule: Schedule) -> tuple[str, float]:
    """The method by which `schedule` is proved and the seconds that took; raises ScheduleError."""
    cells = schedule.ranks**2 * schedule.chunks
    method = "replay" if cells <= REPLAY_CELLS else "structure"
    start = time.perf_counter()
    schedule.verify(method)
    return method, time.perf_counter() - start


def loads_of(schedule: Schedule) -> Loads:
    """What each link carries, and the time that takes by bandwidth alone."""
    unit, units = chunk_units(schedule)
    sizes = np.array(schedule.counts or (1,) * schedule.ranks, dtype=np.int64)
    unit *= max(int(sizes.max()), 1)
    peak: Counter[tuple[Node, Node]] = Counter()
    total: Counter[tuple[Node, Node]] = Counter()
    seconds = 0.0
    for step, repeats in _distinct_steps(schedule):
        rows = schedule.pattern.transfers(step)
        load = step_load(schedule.topology, rows, units[rows[:, 3]] * sizes[rows[:, 2]])
        for link, amount in zip(load.links, load.load.tolist(), strict=True):
            peak[link] = max(peak[link], amount)
            total[link] += repeats * amount
        if len(rows):
            rates = _rates(schedule.topology, load.links)
            seconds += repeats * float((load.load / rates).max()) / unit / 1e9
    busy = sorted((link for link in total if total[link]), key=lambda link: tuple(map(_order, link)))
    return Loads(unit, tuple(LinkLoad(*link, peak[link], total[link]) for link in busy), seconds)


def _order(node: Node) -> tuple[bool, int, str]:
    return (True, 0, node) if isinstance(node, str) else (False, node, "")


def _distinct_steps(schedule: Schedule) -> list[tuple[int, int]]:
    """(step, how many steps load the links as it does).

    With equal shards a ring turns on the same links, and a slice goes to every peer, at each step of a phase.
    """
    steps, head = schedule.pattern.steps, _reduce_steps(schedule)
    if schedule.counts is not None:
        return [(step, 1) for step in range(steps)]
    return [(first, repeats) for first, repeats in ((0, head), (head, steps - head)) if repeats]


def _reduce_steps(schedule: Schedule) -> int:
    if schedule.collective == "allreduce":
        return schedule.phases()[0].pattern.steps
    return schedule.pattern.steps if schedule.collective == "reduce_scatter" else 0


def _rates(topology: Topology, links: Sequence[tuple[Node, Node]]) -> Any:
    if topology.is_full_mesh or topology.is_single_switch:
        return topology.links[0].GBps
    return np.array([topology.GBps(u, v) for u, v in links])


def _bound(schedule: Schedule, shard_bytes: float) -> float | None:
    """The cut bound in seconds; None for unequal shards and for all_to_all, of which it says nothing."""
    topology, collective = schedule.topology, schedule.collective
    if collective == "all_to_all" or len(set(schedule.counts or ())) > 1:
        return None
    if schedule.counts is not None and not any(schedule.counts):
        return 0.0
    # A reduce-scatter is an allgather run backwards, so it is bound by the links the other way round.
    gather = topology.allgather_bound(shard_bytes) if collective != "reduce_scatter" else 0.0
    scatter = _turned(topology).allgather_bound(shard_bytes) if collective != "allgather" else 0.0
    return gather + scatter


def _turned(topology: Topology) -> Topology:
    """`topology` with every link the other way round."""
    if topology.is_full_mesh or topology.is_single_switch:
        return topology
    links = tuple(Link(link.target, link.source, link.GBps, link.latency_us) for link in topology.links)
    return Topology(topology.name, topology.ranks, topology.switches, links)


# --- from a view to text


def text_of(view: View, everything: bool = False) -> str:
    """The report for people; `everything`: nothing is elided."""
    parts = [_head(view), _rings(view, everything), _moves(view, everything), _loads(view), _times(view)]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _head(view: View) -> list[str]:
    schedule, topology = view.schedule, view.topology
    switches = f", {_count(len(topology.switches), 'switch')}".replace("switchs", "switches")
    rings = f"{_count(len(schedule.rings), 'ring')}, " if schedule.rings else ""
    lines = [
        f"topology  {topology.name}: {_count(topology.ranks, 'rank')}{switches if topology.switches else ''}, "
        f"{_links(topology)}",
        f"plan      {schedule.collective} by {schedule.algorithm}: {rings}{_count(view.steps, 'step')}, "
        f"every shard in {_count(schedule.chunks, 'chunk')}",
    ]
    if schedule.counts is not None:
        lines.append(f"rows      {', '.join(map(str, schedule.counts))}")
    how = {"replay": "every chunk followed through every step", "structure": "argued from its rule"}[view.proof]
    lines.append(f"proof     proved by {view.proof} ({how}) in {_seconds(view.proof_seconds)}")
    return lines


def _links(topology: Topology) -> str:
    if not topology.links:
        return "no links"
    if topology.is_full_mesh:
        return f"{_count(len(topology.links), 'link')} of {topology.links[0].GBps:g} GB/s"
    rates = sorted(Counter(link.GBps for link in topology.links).items(), reverse=True)
    many = _count(len(topology.links), "link")
    if len(rates) == 1:
        return f"{many} of {rates[0][0]:g} GB/s"
    if len(rates) > 4:
        return f"{many} of {rates[-1][0]:g} to {rates[0][0]:g} GB/s"
    return f"{many}: " + ", ".join(f"{number} of {rate:g} GB/s" for rate, number in rates)


def _rings(view: View, everything: bool) -> list[str]:
    rings = view.schedule.rings
    if not rings:
        return []
    elide = not everything and view.schedule.ranks > MANY_RANKS
    shown = rings[:FEW_RINGS] if elide else rings
    width = len(str(len(rings) - 1))
    lines = ["rings, each with the share of a shard that travels on it"]
    for number, ring in enumerate(shown):
        stops = [str(rank) for rank in ring.ranks]
        if elide:
            stops = [*stops[:FEW_STOPS], f"({len(stops) - FEW_STOPS} more)"]
        lines.append(f"  ring {number:{width}}  {ring.weight!s:>5}  {' -> '.join([*stops, str(ring.ranks[0])])}")
    if len(shown) < len(rings):
        lines.append(f"  and {_count(len(rings) - len(shown), 'more ring')}; --all shows them")
    return lines


def _moves(view: View, everything: bool) -> list[str]:
    """A line for each send and the receive beside it."""
    steps = [
        list(pairs)
        for _, pairs in groupby(zip(view.sends, view.receives, strict=True), lambda pair: pair[0].step)
    ]
    if not steps:
        return [f"rank {view.rank} has everything: no steps"]
    short = not everything and len(view.sends) > MANY_MOVES
    left_out = steps[2:-1] if short else []
    shown = [pairs[: FEW_MOVES if short else None] for pairs in steps if pairs not in left_out]
    width = max(len(_told(view, send, "to")) for pairs in shown for send, _ in pairs) + 2
    lines = [f"rank {view.rank} step by step", f"  step  ring  {'sends':{width}}receives"]
    for number, pairs in enumerate(shown):
        if left_out and number == 2:
            lines.append(f"   ...  {_count(len(left_out), 'more step')}; --all shows them")
        for send, receive in pairs:
            told = f"{_told(view, send, 'to'):{width}}{_told(view, receive, 'from')}"
            lines.append(f"  {send.step:4}  {send.ring:4}  {told}")
        if hidden := len(steps[pairs[0][0].step]) - len(pairs):
            lines.append(f"   ...  {hidden} more in this step")
    if view.reduce_steps:
        lines.append('  "sum c for r" is chunk c of the shard that ends at rank r, as added up so far')
    return lines


def _told(view: View, move: Move, way: str) -> str:
    kind = f"sum {move.chunk} for" if move.step < view.reduce_steps else f"chunk {move.chunk} of"
    return f"{kind} {move.origin} {way} {move.peer}"


def _loads(view: View) -> list[str]:
    links = len(view.topology.links)
    if not links:
        return []
    rows = [("", "min", "mean", "max")]
    for name, amounts in (
        ("in a step", [link.step_max for link in view.loads.links]),
        ("in all", [link.total for link in view.loads.links]),
    ):
        shares = [min(amounts, default=0) if not view.idle else 0, Fraction(sum(amounts), links), max(amounts, default=0)]
        rows.append((name, *(_share(Fraction(amount) / view.loads.unit) for amount in shares)))
    whose = "the largest shard" if view.schedule.counts else "a shard"
    lines = [f"loads of the links, as shares of {whose}"]
    lines += [f"  {name:9}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows]
    lines.append(f"  idle     {f'{view.idle} of {links} links':>9}")
    return lines + (_matrix(view) if view.schedule.ranks <= MATRIX_RANKS else [])


def _matrix(view: View) -> list[str]:
    """Each link's total, rows send to columns."""
    nodes: list[Node] = [*range(view.schedule.ranks), *view.topology.switches]
    total = {(link.source, link.target): _share(view.share(link.total)) for link in view.loads.links}
    cells = [[total.get((u, v), "-" if view.topology.link(u, v) else "") for v in nodes] for u in nodes]
    width = max(len(text) for text in (*map(str, nodes), *(cell for row in cells for cell in row))) + 2
    lines = ["  in all, from row to column (-: an idle link, blank: no link)", _row("", nodes, width)]
    return lines + [_row(u, row, width) for u, row in zip(nodes, cells, strict=True)]


def _row(head: object, cells: Iterable[object], width: int) -> str:
    return "".join(f"{cell!s:>{width}}" for cell in (head, *cells)).rstrip()


def _times(view: View) -> list[str]:
    bound = "known for equal shards only" if view.bound is None else _seconds(view.bound)
    if view.schedule.collective == "all_to_all":
        bound = "not known for all_to_all"
    return [
        f"time by bandwidth alone, {_bytes(view.shard_bytes)} a shard",
        f"  plan       {_seconds(view.seconds)}",
        f"  cut bound  {bound}",
        f"  ratio      {'-' if view.ratio is None else f'{view.ratio:.4g}'}",
    ]


def _share(share: Fraction) -> str:
    return str(share) if share.denominator < 1000 else f"{float(share):.4g}"


def _seconds(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-6:.4g} us"


def _bytes(number: float) -> str:
    for suffix, size in reversed(SUFFIXES.items()):
        if suffix and number >= size:
            return f"{number / size:.4g} {suffix}iB"
    return f"{number:.4g} bytes"


# --- from a view to JSON


def json_of(view: View) -> dict[str, Any]:
    """The facts of the report as `--help` describes them."""
    schedule, topology = view.schedule, view.topology
    result = {
        "collective": schedule.collective,
        "algorithm": schedule.algorithm,
        "steps": view.steps,
        "chunks": schedule.chunks,
        "counts": schedule.counts,
        "rings": [{"ranks": ring.ranks, "weight": str(ring.weight)} for ring in schedule.rings],
        "rank": view.rank,
        "sends": [move._asdict() for move in view.sends],
        "receives": [move._asdict() for move in view.receives],
        "loads": [
            {"from": u, "to": v, "step_max": str(view.share(step_max)), "total": str(view.share(total))}
            for u, v, step_max, total in view.loads.links
        ],
        "links": len(topology.links),
        "idle_links": view.idle,
        "proof": {"method": view.proof, "seconds": view.proof_seconds},
        "shard_bytes": view.shard_bytes,
        "time_s": view.seconds,
        "bound_s": view.bound,
        "ratio": view.ratio,
    }
    return {
        "tool": "show_plan",
        "version": __version__,
        "world_size": topology.ranks,
        "transport": None,
        "topology": topology.name,
        "results": [result],
    }


# --- the command


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        forms = ", ".join(line.split()[0] for line in KNOWN_SPECS.splitlines())
        told = " ".join(message.replace(f"\n{KNOWN_SPECS}", f" {forms}").split())
        self.exit(2, f"{self.prog}: error: {told}\n")


def size(text: str) -> float:
    """Bytes from a number with or without a suffix K, M, G or T, powers of 1024 as in nccl-tests."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([KMGT]?)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a number of bytes such as 4096, 64K or 1.5M, got {text!r}")
    return float(match[1]) * SUFFIXES[match[2]]


def rows(text: str) -> tuple[int, ...]:
    """Row counts from a list with commas."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas between, got {text!r}") from None


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = _Parser(
        prog="show_plan.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("spec", metavar="SPEC", help="a preset such as full_mesh:8, or a topology file (JSON)")
    add("--collective", choices=COLLECTIVES, default="allgather", help="default: %(default)s")
    add("--algorithm", choices=ALGORITHMS, help="default: rings; direct for all_to_all, which has no other")
    add("--rings", type=int, metavar="K", help="use K rings only")
    add("--rank", type=int, default=0, metavar="R", help="whose steps are shown, default: %(default)s")
    add("--counts", type=rows, metavar="4,0,7,...", help="rows of each rank's shard, default: all equal")
    add("--shard-bytes", type=size, default="1M", metavar="SIZE", help="for the times, default: %(default)s")
    add("--all", action="store_true", help="elide nothing")
    add("--json", type=Path, metavar="PATH", help="write the facts for programs too")
    add("--plot", type=Path, metavar="PATH", help="draw rings and steps (.png, .pdf, .svg); needs matplotlib")
    return command


def topology_of(spec: str) -> Topology:
    """The preset or the file that `spec` names."""
    if is_preset(spec):
        return Topology.preset(spec)
    if not os.path.exists(spec):
        raise TopologyError(f"topology {spec!r} is neither a file nor a preset; presets are:\n{KNOWN_SPECS}")
    return Topology.from_file(spec)


def write(view: View, json_path: Path | None, picture_path: Path | None) -> Iterator[Path]:
    """Write the files asked for; the paths of those written."""
    if json_path is not None:
        json_path.write_text(json.dumps(json_of(view), indent=1) + "\n", encoding="utf-8")
        yield json_path
    if picture_path is not None:
        from plan_picture import draw  # matplotlib is loaded only here

        draw(view, picture_path)
        yield picture_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    command = parser()
    asked = command.parse_args(argv)
    algorithm = asked.algorithm or ("direct" if asked.collective == "all_to_all" else "rings")
    try:
        schedule = plan(topology_of(asked.spec), asked.collective, algorithm, asked.rings, asked.counts)
        view = view_of(schedule, asked.rank, asked.shard_bytes)
        print(text_of(view, asked.all))
        for path in write(view, asked.json, asked.plot):
            print(f"\nwritten: {path}")
    except ScheduleError as error:
        print(f"{command.prog}: the plan fails its proof: {error}", file=sys.stderr)
        return 1
    except (ArgumentError, TopologyError, OSError) as error:
        command.error(str(error))
    except ImportError as error:
        command.error(f"--plot needs matplotlib (pip install 'tasp-coll[plot]'): {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
