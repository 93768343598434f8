"""What sensitivity_check.py draws: every block's estimate over its truth, a panel for each model, early and late."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sensitivity_figures import Seen
from tasp_coll.files import writing

_MARKS = {"activations": "o", "weights": "x"}


def draw(path: Path, seen: Sequence[Seen]) -> None:
    """Write the picture. Blocks without any effect have no place on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    across = min(2, len(seen))
    down = -(-len(seen) // across)
    drawing = Figure(figsize=(6 * across, 5 * down), layout="constrained")
    FigureCanvasAgg(drawing)
    for axes, each in zip(drawing.subplots(down, across, squeeze=False).flat, seen, strict=False):
        layers = list(dict.fromkeys(block.layer for block in each.blocks))
        for operand, mark in _MARKS.items():
            for number, layer in enumerate(layers):
                blocks = [block for block in each.blocks if (block.layer, block.operand) == (layer, operand)]
                points = [(block.truth, block.estimate) for block in blocks if min(block.truth, block.estimate) > 0]
                if points:
                    label = f"{layer} {operand}"
                    axes.scatter(*zip(*points, strict=True), s=14, marker=mark, color=f"C{number}", label=label)
        low, high = axes.get_xlim()
        axes.plot((low, high), (low, high), color="grey", linewidth=0.8)
        whole = each.figures[0]
        axes.set(
            xscale="log",
            yscale="log",
            xlabel="mean squared change of the loss, measured",
            ylabel="estimate",
            title=f"{each.model}, step {each.step}: Spearman {whole.estimate:.3f} over {whole.blocks} blocks",
        )
        axes.legend(fontsize=6)
        axes.grid(alpha=0.3)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)
