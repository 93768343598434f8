"""Four panels: accuracy, mean bits and modelled cycles over the steps, and a bit map as a picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll.files import writing
from train_dynasty_results import OPERANDS, Outcome, Row

_STYLES = dict(zip(OPERANDS, ("-", "--", ":"), strict=True))
_NAMED = 30  # layers; more have no room for their names


def draw(path: Path, title: str, rows: Sequence[Row]) -> None:
    """Write the file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(13, 9), layout="constrained")
    FigureCanvasAgg(drawing)
    drawing.suptitle(title)
    (accuracy, bits), (cycles, picture) = drawing.subplots(2, 2)
    for number, row in enumerate(rows):
        colour, name = f"C{number % 10}", row.config if row.grads is None else f"{row.config}, grads {row.grads}"
        taken = _over_steps(row, lambda run: run.history, "cycles")
        accuracy.plot(*_over_steps(row, lambda run: run.tests, "accuracy", 100), color=colour, marker=".", label=name)
        cycles.plot(*taken, color=colour, label=name if taken[0] else None)
        for operand, style in _STYLES.items():
            bits.plot(*_over_steps(row, lambda run: run.history, operand), color=colour, linestyle=style)
    for operand, style in _STYLES.items():
        bits.plot([], [], color="black", linestyle=style, label=operand)
    accuracy.set(xlabel="step", ylabel="%")
    accuracy.set_title(
        "held-out accuracy, mean over seeds (the last on all examples, those before on some)", fontsize=10
    )
    bits.set(title="mean bits", xlabel="step", ylim=(0, 8.5))
    cycles.set(title="modelled cycles of a bit-scalable array (no wall-clock)", xlabel="step")
    for axes in (accuracy, bits, cycles):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    _draw_map(drawing, picture, [run for row in rows for run in row.runs if run.maps])
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def _over_steps(
    row: Row, records: Callable[[Outcome], Sequence[Mapping[str, Any]]], name: str, scale: float = 1.0
) -> tuple[list[int], list[float]]:
    """Steps, and the mean over seeds of what their records have of a name."""
    found: dict[int, list[float]] = {}
    for run in row.runs:
        for record in records(run):
            if record.get(name) is not None:
                found.setdefault(record["step"], []).append(record[name] * scale)
    steps = sorted(found)
    return steps, [mean(found[step]) for step in steps]


def _draw_map(drawing: Any, axes: Any, runs: Sequence[Outcome]) -> None:
    axes.set_axis_off()
    if not runs or not runs[0].maps:
        axes.set_title("no bit map: nothing was trained at dynamic precision")
        return
    run, maps = runs[0], runs[0].maps
    canvas, places = packed([tile(each) for each in maps.values()])
    shown = axes.imshow(canvas, vmin=-0.5, vmax=8.5, cmap=_colours(), interpolation="nearest", aspect="auto")
    for name, (top, left) in zip(maps, places, strict=True):
        if len(maps) <= _NAMED:
            axes.text(left - 0.5, top - 0.6, name, fontsize=5, verticalalignment="bottom")
    axes.set_title(
        f"bits of blocks at the end, {run.config} seed {run.seed}; per layer\nabove: activations, left: gradients, "
        "inside: weights (outputs down, inputs across)",
        fontsize=9,
    )
    drawing.colorbar(shown, ax=axes, ticks=range(9), label="bits")


def _colours() -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"].resampled(9)


def tile(held: Mapping[str, Sequence[str]]) -> NDArray[np.float64]:
    """A layer's map: weights (R, taps * C), its activations in a row above, its gradients in a column to the left.

    Between them is nothing (NaN). Fewer blocks of gradients than of weights are stretched.
    """
    weights = np.array([[int(digit) for digit in row] for row in held["weights"]], dtype=float)
    down, across = weights.shape
    above = [int(digit) for digit in held["activations"][0]]
    left = [int(digit) for digit in held["gradients"]]
    found = np.full((down + 2, across + 2), np.nan)
    found[2:, 2:] = weights
    found[0, 2:] = [above[at % len(above)] for at in range(across)]  # tap by tap
    found[2:, 0] = [left[at * len(left) // down] for at in range(down)]
    return found


def packed(tiles: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], list[tuple[int, int]]]:
    """All tiles on one canvas, in rows from left to right, and the place of each, (row, column)."""
    gap = 2
    widest = max(each.shape[1] for each in tiles)
    width = max(widest, math.ceil(math.sqrt(1.5 * sum((h + gap) * (w + gap) for h, w in (t.shape for t in tiles)))))
    places, top, left, height = [], gap, 0, 0
    for each in tiles:
        if left and left + each.shape[1] > width:
            top, left, height = top + height + gap, 0, 0
        places.append((top, left))
        left, height = left + each.shape[1] + gap, max(height, each.shape[0])
    canvas = np.full((top + height, width), np.nan)
    for each, (row, column) in zip(tiles, places, strict=True):
        canvas[row : row + each.shape[0], column : column + each.shape[1]] = each
    return canvas, places
