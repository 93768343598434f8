"""As in tests/mpi, with arrays on GPUs, which the ranks take in turn: all share one where there is no more.

TASP_COLL_GPU_STAND_IN=1 puts host memory in the GPU's place, so that the bodies themselves can be tried anywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import tasp_coll
from gpu_arrays import KINDS, Kind, Place
from mpi.conftest import RANK, pytest_collectreport, pytest_configure, pytest_runtest_logreport

__all__ = ["pytest_collectreport", "pytest_configure", "pytest_runtest_logreport"]

os.environ.setdefault("NCCL_HOSTID", f"rank {RANK}")  # or NCCL refuses ranks that share a GPU


@pytest.fixture(scope="session")
def place() -> Place:
    return Place(None if os.environ.get("TASP_COLL_GPU_STAND_IN") == "1" else RANK)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, place: Place) -> Kind:
    return Kind(request.param, place)


@pytest.fixture(scope="session")
def comm(place: Place) -> Iterator[tasp_coll.Communicator]:
    with tasp_coll.Communicator(timeout=60) as made:
        yield made
