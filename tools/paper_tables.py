"""The tables of the TASP paper (arXiv 2509.26541) beside what the cost model makes of public hardware figures.

    python tools/paper_tables.py [--json PATH] [--plot PATH]

Two parameters are fitted, each on one row; all other rows judge them:

  step_us      what each step of attention costs beside kernel and links: launches, synchronisation, Python. It bounds
               the best speedup where links are all that counts.
  send_share   what one point-to-point send gets of a rank's NVLink port. Through an NVSwitch a rank's port is its only
               link, so that with 1 one ring would fill it and nothing could be won; rings to seven peers fill it.

Nothing is measured here. Rows that the model misses by more than 15 % are told apart, with the likely reason.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from textwrap import fill
from typing import Any

import perf_plot
from attention.forecast import Links, Problem, Travel, ccr, forecast, overlapped
from paper_figures import (
    ASSUMPTIONS,
    BASE,
    BATCHES,
    CCR_BATCH,
    EXPLANATIONS,
    FIGURES,
    HEAD_DIM,
    HEADS,
    ITEMSIZE,
    LENGTHS,
    MI300X,
    MOST_TOKENS,
    OVER_CCR,
    Figure,
    Machine,
)
from perf_report import write_json
from tasp_coll import Topology, plan
from tasp_coll.files import writing
from tasp_coll.simulate import predict

TOOL = "paper_tables"
MISSED = 0.15
_UNIT = 1 << 30  # bytes; links have no latency here, so times are in proportion


@dataclass(frozen=True)
class Parameters:
    """What is fitted; see the module."""

    step_us: float
    send_share: float


@dataclass(frozen=True)
class Compared:
    """A row: a figure of the paper and the model's."""

    row: str
    paper: float
    ours: float
    fitted: str = ""

    @property
    def error(self) -> float:
        """Ours over the paper's, less one."""
        return self.ours / self.paper - 1

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"error": self.error}


@lru_cache
def _seconds(topology: str, algorithm: str, rings: str) -> float:
    """Of an allgather of shards of `_UNIT` bytes, by the links alone."""
    there = Topology.preset(topology)
    if algorithm == "rings" and rings == "mesh":
        meshed = plan(Topology.preset(f"full_mesh:{there.ranks}"), "allgather", "rings")
        return predict(replace(meshed, topology=there), _UNIT).seconds
    return predict(plan(there, "allgather", algorithm), _UNIT).seconds


def links_of(machine: Machine, rings: str, parameters: Parameters) -> Links:
    """The machine's links, for "ring" and "rings"."""
    ranks = Topology.preset(machine.topology).ranks

    def links(nbytes: int, algorithm: str, collective: str) -> Travel:
        one = algorithm == "ring" and machine.capped
        seconds = _seconds(machine.topology, algorithm, rings) / (parameters.send_share if one else 1.0)
        return Travel(seconds * nbytes / _UNIT, ranks - 1)

    return links


def speedups(figure: Figure, parameters: Parameters) -> list[float]:
    """TASP over ring attention, for all configurations."""
    machine, ranks = figure.machine, Topology.preset(figure.machine.topology).ranks
    links, device = links_of(machine, figure.rings, parameters), _device(machine, parameters)
    found = []
    for length in LENGTHS:
        for batch in BATCHES:
            if length * BASE * batch <= MOST_TOKENS:
                problem = Problem(ranks, length * BASE, batch, HEADS, HEADS, HEAD_DIM, ITEMSIZE, figure.causal)
                ring, tasp = (forecast(problem, method, links, device) for method in ("ring", "tasp"))
                assert ring is not None
                assert tasp is not None
                found.append(ring.seconds / tasp.seconds)
    return found


def _device(machine: Machine, parameters: Parameters) -> Any:
    return replace(machine.device, step_s=parameters.step_us * 1e-6)


def ours(figure: Figure, parameters: Parameters) -> float:
    """The model's figure."""
    found = speedups(figure, parameters)
    return fmean(found) if figure.statistic == "average" else max(found)


def fit() -> Parameters:
    """Each parameter from its row: of all on a fine scale, the one that comes nearest."""
    found = Parameters(step_us=10.0, send_share=1.0)
    scales = {"step_us": [10 ** (at / 40) for at in range(161)], "send_share": [at / 100 for at in range(10, 101)]}
    for name, scale in scales.items():
        (figure,) = (figure for figure in FIGURES if figure.fitted == name)
        found = min(
            (replace(found, **{name: value}) for value in scale),
            key=lambda parameters: abs(ours(figure, parameters) - figure.speedup),
        )
    return found


def compared(parameters: Parameters) -> list[Compared]:
    """All rows."""
    rows = [Compared(figure.name, figure.speedup, ours(figure, parameters), figure.fitted) for figure in FIGURES]
    for tokens, ratio, speedup in OVER_CCR:
        ideal = overlapped(8, ratio, 1.0) / overlapped(8, ratio, 1 / 7)
        rows.append(Compared(f"MI300X, batch {CCR_BATCH}, CCR {ratio} ({tokens // 1000}K)", speedup, ideal))
    links, device = links_of(MI300X, "all", parameters), _device(MI300X, parameters)
    for tokens, ratio, _ in OVER_CCR:
        mine = ccr(Problem(8, tokens, CCR_BATCH, HEADS, HEADS, HEAD_DIM, ITEMSIZE), links, device)
        rows.append(Compared(f"MI300X, batch {CCR_BATCH}, {tokens // 1000}K: the CCR itself", ratio, mine or 0.0))
    return rows


def table(rows: Sequence[Compared], parameters: Parameters) -> list[str]:
    """For people."""
    lines = [f"# {'speedup of TASP over ring attention':44} {'paper':>6} {'ours':>6} {'error':>7}"]
    for row in rows:
        how = f"fitted: {row.fitted}" if row.fitted else "judged"
        lines.append(f"  {row.row:44} {row.paper:>6.2f} {row.ours:>6.2f} {100 * row.error:>+6.0f}%  {how}")
    judged = [abs(row.error) for row in rows if not row.fitted]
    lines += [
        f"# fitted: step_us {parameters.step_us:.3g}, send_share {parameters.send_share:.2g}; "
        f"mean error of the {len(judged)} rows that judge: {100 * fmean(judged):.0f}%",
        ASSUMPTIONS,
    ]
    return lines + missed(rows)


def missed(rows: Sequence[Compared]) -> list[str]:
    """Rows that the model does not explain, and why that may be."""
    whys: dict[str, list[str]] = {}
    for row in rows:
        if abs(row.error) > MISSED and not row.fitted:
            why = next((why for part, why in EXPLANATIONS.items() if part in row.row), "unknown")
            whys.setdefault(why, []).append(row.row)
    told = (f"{'; '.join(names)}: {why}" for why, names in whys.items())
    lines = [fill(text, 118, initial_indent="  ", subsequent_indent="    ") for text in told]
    return ["not explained within 15 %", *lines] if lines else []


def draw(path: Path, rows: Sequence[Compared]) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Drawing

    shown = [row for row in rows if "CCR itself" not in row.row]
    drawing = Drawing(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    sides: tuple[tuple[float, str, Callable[[Compared], float]], ...] = (
        (-0.2, "paper", lambda row: row.paper),
        (0.2, "cost model", lambda row: row.ours),
    )
    for shift, label, value in sides:
        axes.barh([at + shift for at in range(len(shown))], [value(row) for row in shown], 0.4, label=label)
    names = [row.row + (" (fitted)" if row.fitted else "") for row in shown]
    axes.set_yticks(range(len(shown)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(xlabel="times as fast as ring attention")
    axes.legend()
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog=f"{TOOL}.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("-J", "--json", type=Path, metavar="PATH", help="write all of it")
    command.add_argument("--plot", type=perf_plot.picture, metavar="PATH", help="draw it (.png, .pdf, .svg)")
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    asked = parser().parse_args(argv)
    parameters = fit()
    rows = compared(parameters)
    print("\n".join(table(rows, parameters)))
    try:
        if asked.json:
            write_json(asked.json, {"tool": TOOL, "fitted": asdict(parameters)}, rows)
        if asked.plot:
            draw(asked.plot, rows)
    except OSError as error:
        print(f"{TOOL}.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
