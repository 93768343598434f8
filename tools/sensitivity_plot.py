"""What sensitivity_check.py draws: every block's estimate over its truth, a panel for each moment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity_figures import Moment
from tasp_coll.files import writing

_MARKS = {"activations": "o", "weights": "x"}


def draw(path: Path, moments: Sequence[Moment]) -> None:
    """Write the picture. Blocks without any effect have no place on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(2, len(moments))
    down = -(-len(moments) // across)
    drawing = Figure(figsize=(6 * across, 5 * down), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, moment in zip(drawing.subplots(down, across, squeeze=False).flat, moments, strict=False):
        layers = list(dict.fromkeys(block.layer for block in moment.blocks))
        for operand, mark in _MARKS.items():
            for number, layer in enumerate(layers):
                blocks = [each for each in moment.blocks if (each.layer, each.operand) == (layer, operand)]
                points = [(each.truth, each.estimate) for each in blocks if each.truth > 0 and each.estimate > 0]
                if points:
                    label = f"{layer} {operand}"
                    axes.scatter(*zip(*points, strict=True), s=14, marker=mark, color=f"C{number}", label=label)
        low, high = axes.get_xlim()
        axes.plot((low, high), (low, high), color="grey", linewidth=0.8)
        whole = moment.figures[0]
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="mean squared change of the loss, measured",
            ylabel="estimate",
            title=f"{moment.model}, step {moment.step}: Spearman {whole.estimate:.3f} over {whole.blocks} blocks",
        )
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)
