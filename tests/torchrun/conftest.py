"""torch.distributed over our backend; else as tests/mpi."""

from __future__ import annotations

import os

import torch.distributed as dist

import tasp_coll.torch_backend  # noqa: F401

assert "TORCHELASTIC_RUN_ID" in os.environ, "test_torch_backend.py starts these"
dist.init_process_group("cpu:tasp,cuda:tasp")

from mpi.conftest import pytest_collectreport, pytest_configure, pytest_runtest_logreport  # noqa: E402, F401
