"""busbw over size, a line for each algorithm."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from perf_report import Result
from tasp_coll.files import writing

_FORMATS = (".png", ".svg", ".pdf")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def fault(path: Path) -> str:
    """Why no plot can be drawn into this file; empty if it can."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"--plot: matplotlib cannot be imported ({error}): pip install 'tasp-coll[plot]'"
    return "" if path.suffix in _FORMATS else f"--plot must end in {', '.join(_FORMATS)}, got {path.name!r}"


def picture(text: str) -> Path:
    """The type of a flag --plot: the path of a picture that can be drawn."""
    path = Path(text)
    if why := fault(path):
        raise argparse.ArgumentTypeError(why.removeprefix("--plot "))
    return path


def draw(path: Path, title: str, size_means: str, results: Sequence[Result], algorithms: Sequence[str]) -> None:
    """Write the file. `results` has those of each algorithm in turn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for position, name in enumerate(algorithms):
        mine = results[position :: len(algorithms)]
        again = algorithms[:position].count(name) + 1
        label = name if again == 1 else f"{name} ({again})"
        sizes = [each.extent.size_bytes for each in mine]
        axes.plot(sizes, [each.busbw(each.out) for each in mine], marker="o", markersize=4, label=label)
    if results[0].bound is not None:  # the same at every size
        axes.axhline(results[0].bound, color="black", linestyle="--", linewidth=1, label="cut bound")
    sizes = sorted({each.extent.size_bytes for each in results})
    axes.set_xscale("log", base=2)
    shown = sizes[:: -(-len(sizes) // 12)]
    axes.set_xticks(shown, [_readable(each) for each in shown])
    axes.minorticks_off()
    axes.set(title=title, xlabel=f"size ({size_means.split(',')[0]})", ylabel="bus bandwidth (GB/s)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def _readable(size: int) -> str:
    """Bytes in the largest unit of which there is at least one."""
    power = min((size.bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / 1024**power:.4g} {_UNITS[power]}"
