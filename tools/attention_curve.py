"""Speedup over the computation-to-communication ratio, from runs of attention_perf.py at several of them.

    python tools/attention_curve.py full_*.json causal_*.json --plot speedup.png

prints a row for each run and draws them beside the ideal curve: what overlap can give where all links of a full mesh
carry data, against one ring.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import perf_plot
import results_file
from attention.forecast import overlapped
from tasp_coll.files import writing

_COLUMNS = (
    ("ccr", 7),
    ("mask", 8),
    ("ring", 8),
    ("allgather", 10),
    ("ulysses", 9),
    ("ideal", 7),
    ("of ideal", 9),
    ("ring/its ideal", 15),
)
_OTHERS = ("ring", "allgather", "ulysses")


class Point(NamedTuple):
    """One run: how many times as fast as `ring`, `allgather` and `ulysses` tasp was (None: not measured)."""

    ccr: float
    causal: bool
    ranks: int
    over: dict[str, float | None]
    ring_over_ideal: float

    @property
    def ideal(self) -> float:
        """Ring's ideal time over tasp's, on a full mesh of equal links."""
        return ideal(self.ccr, self.ranks)


def ideal(ccr: float, ranks: int) -> float:
    """One ring's time over that of n-1, if each hides the shorter one of computing and communicating."""
    return overlapped(ranks, ccr, 1.0) / overlapped(ranks, ccr, 1.0 / (ranks - 1))


def read(path: Path) -> Point:
    """A run's file; ValueError that says what is missing in it."""
    top, results = results_file.read(path)
    by_method = {result.text("method"): result for result in results if top.value.get("tool") == "attention_perf"}
    if not {"tasp", "ring"} <= by_method.keys():
        raise results_file.ResultsError(f"{path} is no result of attention_perf.py with tasp and ring")
    tasp, ring = by_method["tasp"], by_method["ring"]
    if not tasp.value.get("ccr") or not ring.value.get("ideal_us"):
        raise results_file.ResultsError(f"{path} has no communication in it")
    medians = {method: result.entry("time_us").number("median") for method, result in by_method.items()}
    over = {name: medians[name] / medians["tasp"] if name in medians else None for name in _OTHERS}
    causal = tasp.value.get("causal") is True
    ranks = top.count("world_size", 2)
    return Point(tasp.number("ccr"), causal, ranks, over, medians["ring"] / ring.number("ideal_us"))


def table(points: Sequence[Point]) -> str:
    """Rows for people."""
    lines = ["# tasp is so many times as fast as", "#" + "".join(f"{name:>{width}}" for name, width in _COLUMNS)]
    for point in points:
        found = point.over["ring"] or 0.0
        cells = [f"{point.ccr:.3g}", "causal" if point.causal else "full"]
        cells += ["-" if value is None else f"{value:.2f}" for value in point.over.values()]
        cells += [f"{point.ideal:.2f}", f"{found / point.ideal:.2f}", f"{point.ring_over_ideal:.2f}"]
        lines.append(" " + "".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True)))
    return "\n".join(lines)


def draw(path: Path, points: Sequence[Point]) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for causal, marker, colour in ((False, "o", "tab:blue"), (True, "s", "tab:orange")):
        mine = [point for point in points if point.causal is causal]
        if mine:
            label = f"over ring attention, {'causal' if causal else 'full'}"
            speedups = [point.over["ring"] or 0.0 for point in mine]
            axes.plot(
                [point.ccr for point in mine], speedups, marker=marker, color=colour, linestyle="none", label=label
            )
    low, high = min(point.ccr for point in points) / 1.2, max(point.ccr for point in points) * 1.2
    steps = [low * (high / low) ** (at / 200) for at in range(201)]
    for ranks in sorted({point.ranks for point in points}):
        axes.plot(steps, [ideal(at, ranks) for at in steps], "k--", linewidth=1, label=f"ideal on full_mesh:{ranks}")
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    shown = [at for at in (0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 1.5, 2, 4) if low <= at <= high]
    axes.set_xticks(shown, [f"{at:g}" for at in shown])
    axes.minorticks_off()
    axes.set(
        title="TASP: speedup over CCR", xlabel="CCR: computation over communication on one ring", ylabel="times as fast"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="attention_curve.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("runs", type=Path, nargs="+", metavar="RUN.json", help="written by attention_perf.py --json")
    command.add_argument(
        "--plot", type=perf_plot.picture, metavar="PATH", help="draw it (.png, .pdf, .svg); needs matplotlib"
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; its exit status. Wrong usage leaves by SystemExit(2)."""
    asked = parser().parse_args(argv)
    try:
        points = sorted((read(path) for path in asked.runs), key=lambda point: (point.ccr, point.causal))
    except (OSError, ValueError) as error:
        print(f"attention_curve.py: {error}", file=sys.stderr)
        return 2
    print(table(points))
    if asked.plot:
        draw(asked.plot, points)
    return 0


if __name__ == "__main__":
    sys.exit(main())
