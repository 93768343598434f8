"""Makes pytest behave as one job on many ranks: rank 0 tells the progress, a failure on any rank ends all."""

from __future__ import annotations

import sys

import pytest
from hypothesis import settings
from mpi4py import MPI

WORLD = MPI.COMM_WORLD

# Every rank must draw the same examples, and none may replay one on its own.
settings.register_profile("same-on-all-ranks", deadline=None, derandomize=True, database=None)
settings.load_profile("same-on-all-ranks")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if WORLD.rank != 0:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _abort(f"{report.nodeid} ({report.when})", report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _abort(f"collecting {report.nodeid}", report)


def _abort(what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    """The other ranks may be waiting for this one, and would for ever."""
    sections = "".join(f"--- {title} ---\n{text}\n" for title, text in report.sections)
    sys.stdout.flush()
    print(
        f"\nrank {WORLD.rank} of {WORLD.size} FAILED {what}\n{report.longreprtext}\n{sections}",
        file=sys.stderr,
        flush=True,
    )
    WORLD.Abort(1)
