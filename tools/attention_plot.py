"""Where the time of each method goes, as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from attention_report import Result
from tasp_coll.files import writing

_PARTS = (
    ("compute", "compute", "tab:blue"),
    ("wait", "exposed communication", "tab:red"),
    ("merge", "merge", "tab:orange"),
)


def draw(path: Path, title: str, results: Sequence[Result]) -> None:
    """Write the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    places = range(len(results))
    tops = [0.0] * len(results)
    for kind, label, colour in _PARTS:
        heights = [(result.part_us(kind) or 0.0) / 1e3 for result in results]
        axes.bar(places, heights, bottom=tops, label=label, color=colour, width=0.6)
        tops = [top + height for top, height in zip(tops, heights, strict=True)]
    rest = [max(median(result.times_us) / 1e3 - top, 0.0) for result, top in zip(results, tops, strict=True)]
    axes.bar(places, rest, bottom=tops, label="rest (a peer: all)", color="lightgrey", width=0.6)
    for place, result in zip(places, results, strict=True):
        if result.ideal_us is not None:
            span = [place - 0.36, place + 0.36]
            axes.plot(
                span, [result.ideal_us / 1e3] * 2, color="black", linewidth=1.5, label="ideal" if not place else ""
            )
    axes.axhline(
        sum(results[0].common.compute) * 1e3, color="black", linestyle="--", linewidth=1, label="compute alone"
    )
    axes.set_xticks(places, [result.label for result in results])
    axes.set(title=title, ylabel="time (ms)")
    axes.grid(axis="y", alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    axes.legend(list(known.values()), list(known))
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)
