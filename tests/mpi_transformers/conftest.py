"""As in tests/mpi; apart from it, since importing transformers takes longer than most tests there."""

from __future__ import annotations

from mpi.conftest import pytest_collectreport, pytest_configure, pytest_runtest_logreport

__all__ = ["pytest_collectreport", "pytest_configure", "pytest_runtest_logreport"]
