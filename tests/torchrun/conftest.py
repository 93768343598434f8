"""As in tests/mpi, with our back end as the default group. `gloo`: the same ranks over gloo."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

import tasp_coll.torch_backend  # noqa: F401  (registers "tasp")

dist.init_process_group("cpu:tasp,cuda:tasp")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if dist.get_rank() != 0:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _end_all(report.nodeid, report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _end_all(report.nodeid, report)


def _end_all(what: str, report: pytest.TestReport | pytest.CollectReport) -> None:
    """torchrun ends all ranks when one ends in failure; they may be waiting for this one."""
    print(f"\nrank {dist.get_rank()} FAILED {what}\n{report.longreprtext}", file=sys.stderr, flush=True)
    os._exit(1)


@pytest.fixture(scope="session")
def gloo() -> Iterator[dist.ProcessGroup]:
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


def pytest_sessionfinish() -> None:
    dist.destroy_process_group()
