"""Holds the cost model against measurements: collectives and attention on virtual clusters, predicted and measured.

    python tools/model_check.py                      # every case, each on a cluster of its own: about half an hour
    python tools/model_check.py --only full_mesh --json check.json --plot check.png
    python tools/model_check.py --results *.json     # of bandwidth tests and attention_perf.py, run elsewhere

A collective's prediction is made from the topology file with the rates that the cluster's links were measured to
deliver before any rank ran. Attention's takes, beside those, the computation measured with communication switched off.
Exit status: 0 if the median error is at most 5 % and none above 15 %, 1 if not, 2 if a case could not be run.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import perf_plot
import results_file
from model_check_cases import CASES, CheckCase
from perf_report import write_json
from tasp_coll.files import writing

TOOL = "model_check"
MEDIAN, WORST = 0.05, 0.15
_HERE = Path(__file__).resolve().parent
_COLUMNS = ("case", "what", "predicted", "measured", "error")


@dataclass(frozen=True)
class Check:
    """A prediction beside its measurement, microseconds."""

    case: str
    what: str
    predicted_us: float
    measured_us: float

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted_us / self.measured_us - 1

    def record(self) -> dict[str, Any]:
        """For programs."""
        return asdict(self) | {"error": self.error}


class CaseError(Exception):
    """A case that could not be run."""


def checks_of(path: Path, case: str) -> Iterator[Check]:
    """What a result file has of predictions."""
    for result in results_file.read(path)[1]:
        predicted = result.number_if_any("predicted_us")
        if predicted is None or not result.value.get("time_us"):
            continue
        name = result.text("method", "algorithm")
        size = (
            f" {result.number('size_bytes'):.0f}"
            if "size_bytes" in result.value
            else f" CCR {result.number('ccr'):.2f}"
        )
        yield Check(case, name + size, predicted, result.entry("time_us").number("median"))


def run(case: CheckCase, folder: Path) -> list[Check]:
    """Build the case's cluster, run its tool, read its file."""
    path = folder / f"{case.name.replace(' ', '_').replace(':', '_')}.json"
    cluster = [sys.executable, str(_HERE / "virtual_cluster.py"), "run", "--quiet", *case.cluster(folder)]
    ended = subprocess.run(
        [*cluster, "--", "python", str(_HERE / case.tool), *case.flags, "--json", str(path)],
        capture_output=True,
        text=True,
    )
    if ended.returncode:
        lines = (ended.stderr or ended.stdout).strip().splitlines()
        raise CaseError(f"{case.name}: exit status {ended.returncode}: {lines[-1] if lines else ''}")
    return list(checks_of(path, case.name))


def row(check: Check) -> str:
    """One line of the table."""
    times = f"{check.predicted_us / 1e3:>12.4g} {check.measured_us / 1e3:>12.4g}"
    return f"  {check.case:30} {check.what:24} {times} {100 * check.error:>+8.1f}%"


def foot(checks: Sequence[Check]) -> list[str]:
    """The median and the worst error."""
    errors = [abs(check.error) for check in checks]
    worst = max(checks, key=lambda check: abs(check.error))
    return [
        f"# {len(checks)} predictions: median error {100 * median(errors):.1f}%, "
        f"worst {100 * abs(worst.error):.1f}% ({worst.case}, {worst.what})"
    ]


def draw(path: Path, checks: Sequence[Check]) -> None:
    """Predicted over measured, a point for each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    for case in dict.fromkeys(check.case for check in checks):
        mine = [check for check in checks if check.case == case]
        xs, ys = ([getattr(check, name) / 1e3 for check in mine] for name in ("measured_us", "predicted_us"))
        axes.plot(xs, ys, "o", markersize=4, label=case)
    ends = [min(check.measured_us for check in checks) / 1.5e3, max(check.measured_us for check in checks) * 1.5e-3]
    axes.plot(ends, ends, "k--", linewidth=1)
    axes.fill_between(ends, [x * (1 - WORST) for x in ends], [x * (1 + WORST) for x in ends], color="grey", alpha=0.2)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(title="cost model against virtual clusters", xlabel="measured (ms)", ylabel="predicted (ms)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=6, ncols=2)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    asked = parser().parse_args(argv)
    print(f"# {_COLUMNS[0]:30} {_COLUMNS[1]:24} {'model (ms)':>12} {'seen (ms)':>12} {_COLUMNS[4]:>9}", flush=True)
    found: list[Check] = []
    try:
        for check in _read(asked.results) if asked.results else _measured(asked.only, asked.keep):
            found.append(check)
            print(row(check), flush=True)
    except (CaseError, OSError, ValueError) as error:
        print(f"{TOOL}.py: {error}", file=sys.stderr)
        return 2
    if not found:
        print(f"{TOOL}.py: nothing to check", file=sys.stderr)
        return 2
    print("\n".join(foot(found)))
    if asked.json:
        write_json(asked.json, {"tool": TOOL}, found)
    if asked.plot:
        draw(asked.plot, found)
    errors = [abs(check.error) for check in found]
    return 0 if median(errors) <= MEDIAN and max(errors) <= WORST else 1


def _read(paths: Sequence[Path]) -> Iterator[Check]:
    for path in paths:
        yield from checks_of(path, path.stem)


def _measured(only: Sequence[str] | None, keep: Path | None) -> Iterator[Check]:
    chosen = [case for case in CASES if not only or any(part in case.name for part in only)]
    with tempfile.TemporaryDirectory(prefix="tasp-coll-check-") as folder:
        for case in chosen:
            yield from run(case, keep or Path(folder))


def _folder(text: str) -> Path:
    if not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"must be a folder, got {text!r}")
    return Path(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    names = "\n".join(f"  {case.name:30} {case.command}" for case in CASES)
    command = argparse.ArgumentParser(
        prog=f"{TOOL}.py",
        description=__doc__,
        epilog=f"cases, each on tools/virtual_cluster.py\n{names}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = command.add_argument
    add("--only", action="append", metavar="PART", help="cases with this in their name; repeatable")
    add("--results", type=Path, nargs="+", metavar="RUN.json", help="run nothing, read these files instead")
    add("--keep", type=_folder, metavar="DIR", help="leave the results of the tools in this folder")
    add("-J", "--json", type=Path, metavar="PATH", help="write all of it")
    add("--plot", type=perf_plot.picture, metavar="PATH", help="draw it (.png, .pdf, .svg); needs matplotlib")
    return command


if __name__ == "__main__":
    sys.exit(main())
