"""One command for a machine with GPUs: runs tests/gpu, measures what the README wants to know, and prints it as tables.

    python tools/gpu_report.py --json report.json --markdown

Every step is a process of its own with a time limit; what has been found is written after each, so that nothing is
lost whatever happens to the next one. One GPU is enough: the ranks share it. On several it also compares all
algorithms by NCCL and CUDA IPC, and attention's methods, with a GPU for each rank.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_report_steps import Step, carry_out, steps
from gpu_report_text import markdown
from perf_options import integer, seconds_of
from tasp_coll.files import writing

_PROBE = """
import json, cupy
runtime = cupy.cuda.runtime
count = runtime.getDeviceCount()
name = runtime.getDeviceProperties(0)["name"].decode()
cupy.zeros(1)
print(json.dumps({"gpus": count, "name": name, "cupy": cupy.__version__, "driver": runtime.driverGetVersion()}))
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Leave with status 0 if all steps were well, 1 if not, 2 if there is no GPU."""
    given = parser().parse_args(argv)
    machine = _machine()
    if isinstance(machine, str):
        print(f"gpu_report: no GPU that CuPy can use: {machine}", file=sys.stderr)
        sys.exit(2)
    chosen = [step for step in steps(machine["gpus"], given.ranks) if not given.only or given.only in step.name]
    report = run(chosen, given.budget, lambda found: _write(given.json, {"machine": machine, "steps": found}))
    if given.markdown:
        print(markdown({"machine": machine, "steps": report}))
    sys.exit(0 if all(each["status"] == "ok" for each in report.values()) else 1)


def run(chosen: Sequence[Step], budget_s: float, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All steps, one after another, as long as there is time: by name how each ended, and what it found.

    save: is called after each with all so far.
    """
    deadline, report = time.monotonic() + budget_s, dict[str, Any]()
    with tempfile.TemporaryDirectory() as directory:
        for number, step in enumerate(chosen):
            path = Path(directory) / f"{number}.json"
            outcome = carry_out(step, path, deadline - time.monotonic())
            found = json.loads(path.read_text()) if path.exists() else None
            report[step.name] = {**vars(outcome), "command": step.shown(), "found": found}
            print(f"# {step.name}: {outcome.status}, {outcome.seconds:.0f} s", file=sys.stderr, flush=True)
            save(report)
    return report


def _machine() -> dict[str, Any] | str:
    """What is there; or why nothing can be used. In a process of its own, which leaves the GPU alone afterwards."""
    try:
        ended = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "it does not answer within 60 s"
    if ended.returncode:
        return ended.stderr.strip().splitlines()[-1] if ended.stderr.strip() else f"status {ended.returncode}"
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        with writing(path) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_report.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-J", "--json", type=Path, metavar="PATH", help="write everything, after each step")
    parser.add_argument("--markdown", action="store_true", help="print tables for a README")
    parser.add_argument(
        "--budget", type=seconds_of, default=460.0, metavar="S", help="seconds for all steps together (default 460)"
    )
    parser.add_argument(
        "--ranks",
        type=lambda text: [integer(1)(part) for part in text.split(",")],
        default=[2, 4, 8],
        metavar="N,M",
        help="world sizes on one GPU (default 2,4,8)",
    )
    parser.add_argument("--only", metavar="TEXT", help="steps whose name has this in it, such as share or attention")
    return parser


if __name__ == "__main__":
    main()
