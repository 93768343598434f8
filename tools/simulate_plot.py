"""What simulate.py draws: speedup over CCR, a map of the fastest methods, a timeline."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import simulate_text
from attention.forecast import METHODS, Phase
from simulate_model import attention_at, problem_of
from simulate_options import Options
from tasp_coll import Topology
from tasp_coll.files import writing

_COLOURS = dict(zip(METHODS, ("tab:orange", "tab:blue", "tab:green", "tab:red", "tab:purple"), strict=True))
_BATCHES = tuple(1 << power for power in range(8))
_LOCAL = tuple(1 << power for power in range(6, 18))  # tokens of a rank
_STEPS = 64  # of a timeline: more cannot be told apart


def draw(path: Path, options: Options, topology: Topology) -> None:
    """Write the picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    {"speedup": _speedup, "map": _map, "timeline": _timeline}[options.picture](drawing.subplots(), options, topology)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def _speedup(axes: Any, options: Options, topology: Topology) -> None:
    lines: dict[str, list[tuple[float, float]]] = {}
    for local in _LOCAL:
        problem = problem_of(options, topology.ranks, local * topology.ranks, options.batch)
        rows = {row.estimate.method: row for row in attention_at(options, topology, problem)}
        for method, row in rows.items():
            if "ring" in rows and row.ccr:
                gain = rows["ring"].estimate.seconds / row.estimate.seconds
                lines.setdefault(method, []).append((row.ccr, gain))
    for method, points in lines.items():
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, color=_COLOURS[method], label=method)
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    title = f"{topology.name}, {simulate_text.shape(problem)}"
    axes.set(title=title, xlabel="CCR: computation over communication on one ring", ylabel="times as fast as one ring")
    axes.title.set_fontsize(9)
    axes.grid(alpha=0.3)
    axes.legend()


def _map(axes: Any, options: Options, topology: Topology) -> None:
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    winners = []
    for batch in _BATCHES:
        line = []
        for local in _LOCAL:
            problem = problem_of(options, topology.ranks, local * topology.ranks, batch)
            best = [row.estimate.method for row in attention_at(options, topology, problem) if row.fastest]
            line.append(METHODS.index(best[0]) if best else len(METHODS))
        winners.append(line)
    colours, names = [*(_COLOURS[method] for method in METHODS), "white"], [*METHODS, "none fits"]
    axes.imshow(
        winners,
        cmap=ListedColormap(colours),
        vmin=-0.5,
        vmax=len(METHODS) + 0.5,
        origin="lower",
        aspect="auto",
    )
    axes.set_xticks(range(len(_LOCAL)), [simulate_text.number(each * topology.ranks) for each in _LOCAL])
    axes.set_yticks(range(len(_BATCHES)), [str(batch) for batch in _BATCHES])
    axes.set(title=f"the fastest method on {topology.name}", xlabel="tokens of the whole sequence", ylabel="batch")
    there = sorted({number for line in winners for number in line})
    handles = [Patch(facecolor=colours[at], edgecolor="grey", label=names[at]) for at in there]
    axes.legend(handles=handles, loc="upper right")


def _timeline(axes: Any, options: Options, topology: Topology) -> None:
    tokens = options.tokens[0] if options.tokens else topology.ranks << 14
    rows = attention_at(options, topology, problem_of(options, topology.ranks, tokens, options.batch))
    for place, row in enumerate(rows):
        method = row.estimate.method
        for lane, begun, lasts in _bars(row.estimate.forward, options.interference):
            at = place + (0.2 if lane == "links" else -0.2)
            colour = _COLOURS[method] if lane == "links" else "lightgrey"
            axes.barh(at, lasts * 1e3, 0.36, begun * 1e3, color=colour, edgecolor="black", linewidth=0.3)
    axes.set_yticks(range(len(rows)), [row.estimate.method for row in rows])
    title = f"{topology.name}, {simulate_text.number(tokens)} tokens, forward: links (coloured) above computation"
    axes.set(title=title, xlabel="ms")
    axes.grid(alpha=0.3, axis="x")


def _bars(phase: Phase, interference: float) -> Iterator[tuple[str, float, float]]:
    """(lane, begin, seconds) of each step; steps beyond `_STEPS` are drawn as one."""
    if not phase.stepwise:
        yield "links", 0.0, phase.links_s
        yield "compute", phase.links_s, phase.compute_s
        return
    computed, moved = phase.compute_s / phase.parts, phase.links_s / phase.steps
    together = max(1, phase.steps // _STEPS)
    span = max(computed + interference * moved, moved)
    for step in range(0, phase.steps, together):
        many = min(together, phase.steps - step)
        yield "links", step * span, moved if many == 1 else many * span * min(1.0, moved / span)
        yield "compute", step * span, computed if many == 1 else many * span * min(1.0, computed / span)
    yield "compute", phase.steps * span, computed
