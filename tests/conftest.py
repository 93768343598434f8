"""Shared by all tests: a launcher of MPI jobs, Hypothesis' settings, and what is not collected."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest
from hypothesis import settings

import launch

# Not the user's own tuned tables: what `auto` takes must be the same on every machine.
_cache = tempfile.TemporaryDirectory(prefix="tasp-coll-tests-")
os.environ["TASP_COLL_CACHE"] = _cache.name

# Written for the ranks of an MPI job: test_mpi.py, test_gpu.py and others start them at several world sizes.
collect_ignore = [] if "TASP_COLL_MPI_RANKS" in os.environ else ["gpu", "mpi", "mpi_transformers", "torchrun"]

# In CI the examples are the same every time, so that a failure is the change's; elsewhere they are new every time.
settings.register_profile("shared-machine", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("shared-machine")


@pytest.fixture
def mpirun() -> Callable[..., CompletedProcess[str]]:
    """`launch.mpirun`; the test is skipped where no MPI is installed."""
    if launch.find_mpiexec() is None:
        pytest.skip("no mpiexec in this environment or on PATH: pip install 'tasp-coll[mpich]'")
    return launch.mpirun
