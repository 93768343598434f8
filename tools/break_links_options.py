"""The command line of break_links.py."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import perf_plot
from break_links_cases import NOTHING_TO_HEAL, SCENARIOS, WORKLOADS
from perf_launch import can_write


def parse(tool: str, about: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    """What is asked for. Wrong usage ends the process with status 2."""
    parser = argparse.ArgumentParser(
        prog=f"{tool}.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--topology", default="full_mesh:8", metavar="SPEC", help="a preset, or a topology file (default full_mesh:8)")
    add("--link-mbit", type=_positive(float), default=10.0, metavar="R", help="of the fastest link (default 10)")
    add("--scenario", type=_some_of(SCENARIOS), metavar="A,B,..", help=f"of {', '.join(SCENARIOS)} (default all)")
    add("--rounds", type=_positive(int), default=20, metavar="N", help="jobs of a cut, 5 calls of loss (default 20)")
    names = ", ".join(WORKLOADS)
    add("--workload", type=_some_of(WORKLOADS), default=("allgather",), metavar="A,B,..", help=f"of {names}")
    add("--timeout", type=_positive(float), default=3.0, metavar="S", help="the communicator's (default 3)")
    add("--no-heal", dest="heal", action="store_false", help="without self_heal; scenarios cut, loss, delay, jitter")
    add("--seed", type=int, default=0, metavar="N", help="of links, moments and data (default 0)")
    add("-J", "--json", type=_writable, metavar="PATH", help="write all of it")
    add("--plot", type=perf_plot.picture, metavar="PATH", help="draw it (.png, .pdf, .svg); needs matplotlib")
    asked = parser.parse_args(argv)
    possible = SCENARIOS if asked.heal else NOTHING_TO_HEAL
    asked.scenario = asked.scenario or possible
    if wrong := [name for name in asked.scenario if name not in possible]:
        parser.error(f"--no-heal leaves nothing to judge of {wrong[0]}")
    if asked.seed < 0:
        parser.error(f"--seed must be >= 0, got {asked.seed}")
    return asked


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def positive(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = -1
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be {'an integer' if kind is int else 'a number'} > 0, got {text!r}")
        return value

    return positive


def _some_of(names: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def some(text: str) -> tuple[str, ...]:
        chosen = tuple(text.split(","))
        for name in chosen:
            if name not in names:
                raise argparse.ArgumentTypeError(f"must be some of {', '.join(names)}, got {name!r}")
        return chosen

    return some


def _writable(text: str) -> Path:
    path = Path(text)
    if not can_write(path):
        raise argparse.ArgumentTypeError(f"must be a file in a directory that can be written to, got {text!r}")
    return path
