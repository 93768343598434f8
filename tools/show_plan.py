"""Show what a collective does on a topology: rings, steps, link loads, proof, and predicted times. Needs no MPI."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from perf_options import size
from plan_text import text_of
from plan_view import View, json_of, view_of
from tasp_coll import ArgumentError, ScheduleError, TopologyError, plan
from tasp_coll.files import writing
from tasp_coll.forecast import TIE
from tasp_coll.presets import KNOWN_SPECS
from tasp_coll.schedule import ALGORITHMS, COLLECTIVES
from tasp_coll.simulate import MESSAGE_US, Costs
from tasp_coll.topology import read_named

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
the link carries in any one step, "in all" the sum over the steps.

Times are those of the cost model: a chunk is sent on when it has arrived, what is under way at the same time shares a
link fairly, and a link has a rate and a latency (presets have none). Software is left out unless --message-us says what
a rank spends on every message that it sends or receives. On MPI, `auto` reckons with {MESSAGE_US:g} us, and more where
ranks share a core; it takes the first algorithm of the table that is within {100 * TIE:g} percent of the fastest. The
cut bound is the least time that any schedule needs; of an allreduce it is that of a reduce_scatter, then an allgather.
Of an all_to_all the shard is the n blocks that a rank sends.

--json writes {{"tool", "version", "world_size", "transport": null, "topology", "results": [{{...}}]}}; the result has
  collective, algorithm, steps, chunks, counts (null: equal)
  rings       [{{"ranks": [0, 3, ...], "weight": "1/7"}}], empty for direct
  rank, sends, receives   the moves of --rank: [{{"step", "peer", "origin", "chunk", "ring"}}]
  loads       [{{"from", "to", "step_max", "total"}}], links that carry something
  links, idle_links       numbers of links
  proof       {{"method": "replay" or "structure", "seconds"}}
  shard_bytes, message_us, bound_s        bound_s is null where no bound is known
  time_s, ratio       the predicted time, and that over the bound (or null)
  busiest     {{"from", "to", "utilisation"}} of the link that is busy for most of the time (of an allreduce, in its
              longer phase)
  rivals      [{{"algorithm", "rings", "slices", "auto", "time_s", "ratio", "busiest"}}], what else there is; empty with
              --counts and for all_to_all
Weights and loads are exact fractions in strings; times are unrounded.

exit status: 0 the plan is proved, 1 it fails its proof, 2 it cannot be made as asked
"""


MOST_ROWS = 1 << 32  # of a shard: so that all loads fit into 64 bits


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        forms = ", ".join(line.split()[0] for line in KNOWN_SPECS.splitlines())
        told = " ".join(message.replace(f"\n{KNOWN_SPECS}", f" {forms}").split())
        self.exit(2, f"{self.prog}: error: {told}\n")


def row_counts(text: str) -> tuple[int, ...]:
    """Row counts from a list with commas."""
    try:
        counts = tuple(int(part) for part in text.split(","))
    except ValueError:
        counts = (-1,)
    if not all(0 <= count < MOST_ROWS for count in counts):
        raise argparse.ArgumentTypeError(f"must be integers >= 0 with commas between, got {text!r}")
    return counts


def microseconds(text: str) -> float:
    """A number >= 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number >= 0, got {text!r}")
    return number


def picture(text: str) -> Path:
    """The path of a picture, whose name says its format."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text!r}")
    return path


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
    add("--counts", type=row_counts, metavar="4,0,7,...", help="rows of each rank's shard, default: all equal")
    add("--shard-bytes", type=size, default="1M", metavar="SIZE", help="for the times, default: %(default)s")
    add("--message-us", type=microseconds, default=0.0, metavar="US", help="of software, for the times, default: 0")
    add("--all", action="store_true", help="elide nothing")
    add("--json", type=Path, metavar="PATH", help="write the facts for programs too")
    add("--plot", type=picture, metavar="PATH", help="draw rings and steps (.png, .pdf, .svg); needs matplotlib")
    return command


def write(view: View, json_path: Path | None, picture_path: Path | None) -> Iterator[Path]:
    """Write the files asked for; the paths of those written."""
    if json_path is not None:
        with writing(json_path) as partial:
            partial.write_text(json.dumps(json_of(view)) + "\n", encoding="utf-8")
        yield json_path
    if picture_path is not None:
        try:
            from plan_picture import draw  # loads matplotlib
        except ImportError as error:
            raise ArgumentError(f"--plot needs matplotlib (pip install 'tasp-coll[plot]'): {error}") from error
        draw(view, picture_path)
        yield picture_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    command = parser()
    asked = command.parse_args(argv)
    algorithm = asked.algorithm or ("direct" if asked.collective == "all_to_all" else "rings")
    try:
        schedule = plan(read_named(asked.spec), asked.collective, algorithm, asked.rings, asked.counts)
        view = view_of(schedule, asked.rank, asked.shard_bytes, Costs(asked.message_us))
        print(text_of(view, asked.all), flush=True)
        for path in write(view, asked.json, asked.plot):
            print(f"\nwritten: {path}")
    except ScheduleError as error:
        print(f"{command.prog}: the plan fails its proof: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # head and its like have seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ArgumentError, TopologyError, OSError) as error:
        command.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
