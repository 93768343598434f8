"""Measure the links between MPI ranks and tell what topology they form: full mesh, switch, or several nodes.

mpiexec -n 8 python tools/discover_topology.py --save my_cluster.json --plot links.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import perf_plot
import tasp_coll
from perf_options import Parser, integer, seconds_of
from tasp_coll.discovery import Measured, infer
from tasp_coll.files import writing
from tasp_coll.probe import Work, measure
from tasp_coll.topology import Topology

EPILOG = """
Each pair of ranks is measured while nothing else moves ("alone"), while its source sends to all ranks at once
("together"), and while all ranks send to all ("everyone"). A pair that keeps its rate together with others has a link
of its own; pairs that divide one rate share a port: a switch's, or a node's NIC. What comes out is a topology file:
hand it to --topology of the bandwidth tests, to tools/show_plan.py, or to all of your program's ranks in
TASP_COLL_TOPOLOGY.

Rates are those of MPI messages in host memory, one rank to one rank. Ranks of one machine talk through its memory,
which has no links: there the answer says little. Run one rank per host, with nothing else on the network.

--json writes {"tool", "version", "world_size", "transport", "topology", "results": [{"alone_GBps", "together_GBps",
  "everyone_GBps", "latency_us"}]}: matrices by source and target; topology is null where none was recognised.

exit status: 0 a topology was found, 1 the figures fit none that is known (they are shown and written all the same),
  2 wrong usage
"""
_FIGURES = (
    ("alone", "alone, GB/s"),
    ("together", "its source sends to all, GB/s"),
    ("everyone", "all send to all, GB/s"),
    ("latency_us", "latency, us"),
)


def parser(quiet: bool = False) -> argparse.ArgumentParser:
    """The command line, without a word if `quiet`."""
    command = Parser(
        quiet,
        prog="discover_topology.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("--repeats", type=integer(1), default=3, metavar="N", help="take medians of N figures, default: %(default)s")
    add("--timeout", type=seconds_of, metavar="SECONDS", help="without progress, default: TASP_COLL_TIMEOUT or 600")
    add("--save", type=Path, metavar="PATH", help="write the topology file")
    add("--json", "-J", type=Path, metavar="PATH", help="write the figures for programs")
    add("--plot", type=perf_plot.picture, metavar="PATH", help="draw heat maps (.png, .pdf, .svg); needs matplotlib")
    return command


def matrix(name: str, figure: np.ndarray[Any, Any]) -> str:
    """A table of one figure, by source (rows) and target."""
    n = len(figure)
    cells = [["", *map(str, range(n))]]
    cells += [[str(a), *("-" if a == b else f"{figure[a, b]:.3g}" for b in range(n))] for a in range(n)]
    width = max(len(cell) for row in cells for cell in row)
    return "\n".join([name, *("  " + " ".join(cell.rjust(width) for cell in row) for row in cells)])


def describe(topology: Topology) -> str:
    """The topology in a few lines, with its cut bound."""
    kinds = sorted({(link.GBps, link.latency_us) for link in topology.links}, reverse=True)
    links = ", ".join(f"{rate:.4g} GB/s ({latency:.3g} us)" for rate, latency in kinds[:4])
    bound = topology.allgather_bound(1 << 20) * 1e3
    return f"{topology.name}; links: {links}\nan all-gather of 1 MiB per rank takes {bound:.4g} ms at least"


def draw(path: Path, title: str, measured: Measured) -> None:
    """Heat maps of all figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 9), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, (field, name) in zip(drawing.subplots(2, 2).flat, _FIGURES, strict=True):
        figure = np.where(np.eye(measured.ranks, dtype=bool), np.nan, getattr(measured, field))
        shown = axes.imshow(figure, cmap="magma_r" if field == "latency_us" else "viridis", vmin=0)
        drawing.colorbar(shown, ax=axes, shrink=0.8)
        axes.set(title=name, xlabel="target rank", ylabel="source rank")
    drawing.suptitle(title)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def bar(work: list[Work]) -> Iterable[Work]:
    """A progress bar, on a terminal, if tqdm is there."""
    if not sys.stderr.isatty():
        return work
    try:
        from tqdm import tqdm
    except ImportError:
        return work
    return iter(tqdm(work, unit="plan", delay=2, leave=False))


def facts(comm: tasp_coll.Communicator, measured: Measured, topology: Topology | None) -> dict[str, Any]:
    """The figures for programs, as `--help` describes them."""
    names = {field: field if field == "latency_us" else f"{field}_GBps" for field, _ in _FIGURES}
    return {
        "tool": "discover_topology",
        "version": tasp_coll.__version__,
        "world_size": comm.size,
        "transport": comm.transport,
        "topology": None if topology is None else topology.name,
        "results": [{names[field]: getattr(measured, field).tolist() for field, _ in _FIGURES}],
    }


def report(asked: argparse.Namespace, comm: tasp_coll.Communicator, measured: Measured) -> int:
    """On rank 0: tell and write what was found; the exit status."""
    for field, name in _FIGURES:
        print(matrix(name, getattr(measured, field)), end="\n\n")
    topology: Topology | None = None
    try:
        topology = infer(measured)
        print(describe(topology))
    except tasp_coll.TopologyError as error:
        print(f"discover_topology.py: {error}", file=sys.stderr)
    if asked.json is not None:
        with writing(asked.json) as partial:
            partial.write_text(json.dumps(facts(comm, measured, topology)) + "\n", encoding="utf-8")
    if asked.plot is not None:
        draw(asked.plot, topology.name if topology else f"{comm.size} ranks, no topology recognised", measured)
    if asked.save is not None and topology is not None:
        topology.save(asked.save)
    for path in (asked.json, asked.plot, asked.save if topology else None):
        if path is not None:
            print(f"written: {path}")
    return 0 if topology else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command on every rank; its exit status, the same on all. Wrong usage leaves by SystemExit(2)."""
    try:
        from mpi4py import MPI

        quiet = MPI.COMM_WORLD.rank != 0
    except (ImportError, RuntimeError) as error:  # mpi4py without an MPI library is the latter
        parser().parse_args(argv)
        print(f"discover_topology.py: {error}: pip install 'tasp-coll[mpich]'", file=sys.stderr)
        return 2
    asked = parser(quiet).parse_args(argv)
    with tasp_coll.Communicator(timeout=asked.timeout) as comm:
        measured = measure(comm, repeats=asked.repeats, progress=bar if comm.rank == 0 else lambda work: work)
        status = report(asked, comm, measured) if comm.rank == 0 else 0
        return int(comm.decomposed_allreduce(np.array([status]), op="max")[0])


if __name__ == "__main__":
    sys.exit(main())
