"""Makes pytest behave as one job on many ranks: rank 0 tells the progress, a failure on any rank ends all."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import settings

collect_ignore = [] if "TORCHELASTIC_RUN_ID" in os.environ else ["test_process_groups.py"]

if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun ends all ranks when one ends in failure
    import torch.distributed as dist

    if not dist.is_initialized():
        dist.init_process_group("gloo")
    RANK, SIZE, end_all = dist.get_rank(), dist.get_world_size(), os._exit
else:
    from mpi4py import MPI

    RANK, SIZE, end_all = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD.Abort

NATIVE = ("test_allgather", "test_allreduce", "test_a_silent_rank_is_named")

# Every rank must draw the same examples, and none may replay one on its own.
settings.register_profile("same-on-all-ranks", deadline=None, derandomize=True, database=None)
settings.load_profile("same-on-all-ranks")


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    if RANK != 0:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Gloo has collectives of its own for equal shards and some dtypes: these tests ask for no others."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        native = [item for item in items if "native" in item.nodeid.rpartition("[")[2]]
        items[:] = [item for item in items if item not in native or item.originalname in NATIVE]


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
        f"\nrank {RANK} of {SIZE} FAILED {what}\n{report.longreprtext}\n{sections}",
        file=sys.stderr,
        flush=True,
    )
    end_all(1)
