"""Results: the table for people, the file for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any, Protocol

from perf_collective import Extent
from perf_data import Dtype
from tasp_coll.files import writing


@dataclass(frozen=True)
class Timing:
    """Microseconds per call of each iteration, on its slowest rank; wrong elements, None if not checked; and how many
    microseconds of it the host was held."""

    times_us: tuple[float, ...]
    wrong: int | None
    host_us: tuple[float, ...] = ()

    @property
    def median(self) -> float:
        """The time that counts."""
        return median(self.times_us)

    @property
    def p99(self) -> float:
        """The shortest time that 99 % of the iterations do not exceed."""
        return sorted(self.times_us)[math.ceil(0.99 * len(self.times_us)) - 1]

    @property
    def variation(self) -> float:
        """Standard deviation over mean, in percent."""
        return 100 * pstdev(self.times_us) / fmean(self.times_us)

    def record(self) -> dict[str, float]:
        """For programs."""
        return {"min": min(self.times_us), "median": self.median, "max": max(self.times_us)}


@dataclass(frozen=True)
class Result:
    """One algorithm at one size."""

    extent: Extent
    dtype: Dtype
    algorithm: str
    chosen: str
    rings: int | None
    factor: float  # busbw / algbw
    out: Timing
    within: Timing | None
    ratio: float
    bound: float | None  # busbw
    predicted_us: float | None
    copied: float | None = None  # on GPUs: bytes that all ranks of a GPU receive, over those it copies in the same time

    def algbw(self, timing: Timing) -> float:
        """GB/s."""
        return self.extent.size_bytes / timing.median / 1e3

    def busbw(self, timing: Timing) -> float:
        """GB/s."""
        return self.algbw(timing) * self.factor

    @property
    def wrong(self) -> int | None:
        """Out of place and in place; None if not checked."""
        if self.out.wrong is None:
            return None
        return self.out.wrong + ((self.within.wrong or 0) if self.within else 0)

    @property
    def label(self) -> str:
        """The algorithm, and what it came to."""
        return self.algorithm if self.chosen == self.algorithm else f"{self.algorithm}:{self.chosen}"

    def record(self) -> dict[str, Any]:
        """For programs."""
        on_gpu = {} if self.copied is None else {"host_us": median(self.out.host_us), "copy_share": self.copied}
        return {
            "size_bytes": self.extent.size_bytes,
            "count": self.extent.count,
            "dtype": self.dtype.name,
            "algorithm": self.algorithm,
            "chosen": self.chosen,
            "rings": self.rings,
            "time_us": self.out.record(),
            "in_place": self.within.record() if self.within else None,
            "algbw_GBps": self.algbw(self.out),
            "busbw_GBps": self.busbw(self.out),
            "wrong": self.wrong,
            "bound_GBps": self.bound,
            "predicted_us": self.predicted_us,
            **on_gpu,
        }


@dataclass(frozen=True)
class Table:
    """Lines of text in nccl-tests' order of columns, the algorithm between root and times."""

    redop: str
    statistics: bool
    bounded: bool
    on_gpu: bool = False

    def head(self) -> list[str]:
        """Titles and units."""
        times = [("time", "(us)", 8), ("algbw", "(GB/s)", 6), ("busbw", "(GB/s)", 6), ("#wrong", "", 6)]
        if self.statistics:
            times += [("min", "(us)", 8), ("max", "(us)", 8), ("p99", "(us)", 8), ("vari.", "(%)", 6)]
        left = [("size", "(B)", 10), ("count", "(elements)", 10), ("type", "", 8), ("redop", "", 5), ("root", "", 4)]
        right = [("ratio", "", 6), *([("model", "(us)", 8), ("%bound", "", 6)] if self.bounded else [])]
        right += [("host", "(us)", 8), ("%copy", "", 6)] if self.on_gpu else []
        columns = [*left, ("algorithm", "", -11), *times, *times, *right]
        span = sum(abs(width) + 1 for _, _, width in times)
        before = sum(abs(width) + 1 for _, _, width in columns[:6])
        return [
            "#" + " " * before + "out-of-place".center(span) + "in-place".center(span).rstrip(),
            "#" + line([title for title, _, _ in columns], [width for _, _, width in columns]),
            "#" + line([unit for _, unit, _ in columns], [width for _, _, width in columns]),
        ]

    def row(self, result: Result) -> str:
        """One result."""
        extent = result.extent
        left = [str(extent.size_bytes), str(extent.count), result.dtype.nccl, self.redop, "-1"]
        right = [figure(result.ratio, 6)]
        if self.bounded:
            right.append("-" if result.predicted_us is None else figure(result.predicted_us, 8))
            right.append(_percent(result.busbw(result.out), result.bound))
        if self.on_gpu:
            right += [figure(median(result.out.host_us), 8), _percent(result.copied or 0.0, 1.0)]
        out, within = self._times(result, result.out), self._times(result, result.within)
        widths = [10, 10, 8, 5, 4, -11, *self._widths(), *self._widths(), *self._right_widths()]
        return " " + line([*left, result.label, *out, *within, *right], widths)

    def _right_widths(self) -> list[int]:
        return [6, *([8, 6] if self.bounded else []), *([8, 6] if self.on_gpu else [])]

    def _widths(self) -> list[int]:
        return [8, 6, 6, 6, *([8, 8, 8, 6] if self.statistics else [])]

    def _times(self, result: Result, timing: Timing | None) -> list[str]:
        if timing is None:
            return ["-"] * len(self._widths())
        wrong = "N/A" if timing.wrong is None else str(timing.wrong)
        rates = [figure(rate, 6, 4) for rate in (result.algbw(timing), result.busbw(timing))]
        cells = [figure(timing.median, 8), *rates, wrong]
        if self.statistics:
            cells += [figure(time, 8) for time in (min(timing.times_us), max(timing.times_us), timing.p99)]
            cells.append(figure(timing.variation, 6))
        return cells


def foot(results: Sequence[Result], algorithms: Sequence[str]) -> list[str]:
    """nccl-tests' last lines; `results` has those of each algorithm in turn."""
    checked = [result.wrong for result in results if result.wrong is not None]
    verdict = f"{sum(checked)} {'FAILED' if sum(checked) else 'OK'}" if checked else "N/A, not checked"
    lines = [f"# Out of bounds values : {verdict}"]
    for position, name in enumerate(algorithms):
        mine = results[position :: len(algorithms)]
        busbw = [each.busbw(timing) for each in mine for timing in (each.out, each.within) if timing]
        lines.append(f"# Avg bus bandwidth    : {fmean(busbw):<8.6g} {name}")
    return lines


def figure(value: float, width: int, decimals: int = 2) -> str:
    """A number with as many decimals, up to `decimals`, as fit."""
    for places in range(decimals, -1, -1):
        text = f"{value:.{places}f}"
        if len(text) <= width:
            return text
    return f"{value:.1e}"


class Recorded(Protocol):
    """What has a form for programs."""

    def record(self) -> dict[str, Any]:
        """That form."""


def write_json(path: Path, head: Mapping[str, Any], results: Sequence[Recorded]) -> None:
    """Write the file; readers see all of it or nothing."""
    told = json.dumps({**head, "results": [each.record() for each in results]}, indent=1)
    with writing(path) as partial:
        partial.write_text(told + "\n", encoding="utf-8")


def line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Cells to the right; to the left where the width is negative."""
    padded = (text.ljust(-width) if width < 0 else text.rjust(width) for text, width in zip(cells, widths, strict=True))
    return " ".join(padded).rstrip()


def _percent(busbw: float, bound: float | None) -> str:
    return f"{100 * busbw / bound:.1f}" if bound else "-"
