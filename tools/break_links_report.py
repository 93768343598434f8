"""Results of break_links.py: a row of the table, a record for programs, a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from break_links_cases import BreakCase
from break_links_seen import Seen
from perf_report import line

_MOST_TOLD = 10  # broken promises of a case
_COLUMNS = (
    *(("workload", -10), ("case", -22), ("jobs", 5), ("exact calls", 12), ("intact (s)", 11), ("longest (s)", 12)),
    *(("share of bound", 16), ("kept", 8)),
)


@dataclass(frozen=True)
class Result:
    """A case, and what was seen of each of its jobs. As text: its row, and the promises that were broken."""

    workload: str
    case: BreakCase
    seen: tuple[Seen, ...]

    @property
    def kept(self) -> int:
        """Jobs that kept all promises."""
        return sum(not each.broken for each in self.seen)

    @property
    def exact(self) -> tuple[int, int]:
        """Calls with the right result on all ranks, and calls that there should have been."""
        exact = [
            number
            for each in self.seen
            for number in each.seconds
            if not any(call.wrong or not call.unchanged for call in each.numbered[number])
        ]
        return len(exact), sum(each.due for each in self.seen)

    def __str__(self) -> str:
        shares = [each.share for each in self.seen if each.share is not None]
        intact = [each.intact_s for each in self.seen if each.intact_s is not None]
        cells = [
            self.workload,
            self.case.name,
            str(len(self.seen)),
            "{}/{}".format(*self.exact),
            f"{median(intact):.3g}" if intact else "-",
            f"{max((each.longest_s for each in self.seen), default=0.0):.3g}",
            f"{min(shares):.3f} {median(shares):.3f}" if shares else "-",
            f"{self.kept}/{len(self.seen)}",
        ]
        told = [f"    job {job}, {each.where}: {what}" for job, each in enumerate(self.seen) for what in each.broken]
        more = [f"    and {len(told) - _MOST_TOLD} more"] if len(told) > _MOST_TOLD else []
        return "\n".join([f"  {_row(cells)}", *told[:_MOST_TOLD], *more])

    def record(self) -> dict[str, Any]:
        """For programs."""
        exact, calls = self.exact
        head = {"workload": self.workload, **asdict(self.case), "calls": calls, "exact": exact, "kept": self.kept}
        return {**head, "jobs": [each.record() for each in self.seen]}


def heading() -> str:
    """The first line of the table. Shares are the worst job's and the median one's."""
    return f"# {_row([name for name, _ in _COLUMNS])}"


def draw(path: Path, title: str, results: Sequence[Result]) -> None:
    """How fast each call was, against those on intact links: the median job, and all of them in a band."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for result in results:
        speeds = _speeds(result)
        if speeds:
            numbers = sorted(speeds)
            (drawn,) = axes.plot(
                numbers,
                [median(speeds[number]) for number in numbers],
                marker="o",
                markersize=4,
                label=f"{result.workload}, {result.case.name}",
            )
            low, high = ([pick(speeds[number]) for number in numbers] for pick in (min, max))
            axes.fill_between(numbers, low, high, color=drawn.get_color(), alpha=0.15)
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    axes.set(title=title, xlabel="call, counted from the one whose link is broken", ylabel="speed, intact = 1")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawing.savefig(path, dpi=120)


def _speeds(result: Result) -> dict[int, list[float]]:
    """By the number of the call, 0 being that of the fault: the usual time over its time, in each job."""
    found: dict[int, list[float]] = {}
    for each in result.seen:
        for number, seconds in each.seconds.items():
            if each.intact_s and number:
                found.setdefault(number - result.case.before, []).append(each.intact_s / seconds)
    return found


def _row(cells: Sequence[str]) -> str:
    return line(cells, [width for _, width in _COLUMNS])
