"""Memory, requests and descriptors over the calls of a long run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soak_watch import Sample


def plot(path: Path, title: str, samples: Sequence[Sequence[Sample]]) -> None:
    """Write the file; a line for each rank."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(drawing)
    memory, counts = drawing.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for rank, mine in enumerate(samples):
        calls = [each.calls for each in mine]
        memory.plot(calls, [each.rss_bytes / 2**20 for each in mine], label=f"rank {rank}")
        counts.plot(calls, [each.requests for each in mine])
    memory.set(title=title, ylabel="resident memory (MiB)")
    memory.set_ylim(bottom=0)
    memory.legend()
    counts.set(xlabel="calls", ylabel="MPI requests")
    counts.set_ylim(bottom=0)
    for axes in (memory, counts):
        axes.grid(alpha=0.3)
    drawing.savefig(path, dpi=120)
