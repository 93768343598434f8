"""As in tests/mpi, with our back end as the default group. `gloo`: the same ranks over gloo."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch.distributed as dist

import tasp_coll.torch_backend  # noqa: F401  (registers "tasp")

dist.init_process_group("cpu:tasp,cuda:tasp")

# After that: it would make the default group itself.
from mpi.conftest import pytest_collectreport, pytest_configure, pytest_runtest_logreport  # noqa: E402

__all__ = ["pytest_collectreport", "pytest_configure", "pytest_runtest_logreport"]


@pytest.fixture(scope="session")
def gloo() -> Iterator[dist.ProcessGroup]:
    group = dist.new_group(backend="gloo")
    yield group
    dist.destroy_process_group(group)


def pytest_sessionfinish() -> None:
    dist.destroy_process_group()
