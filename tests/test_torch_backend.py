"""Runs tests/torchrun, torch.distributed over our backend, at several world sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch import torchrun

SUITE = Path(__file__).parent / "torchrun"


@pytest.mark.parametrize("ranks", [2, 4, 5])
def test_suite_passes(ranks: int) -> None:
    options = ["-c", "pyproject.toml", "-x", "-q", "-p", "no:cacheprovider", "-o", "timeout=60"]
    ended = torchrun(ranks, ["-m", "pytest", SUITE, *options], timeout=200, env={"TASP_COLL_MPI_RANKS": str(ranks)})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" passed") == 1, "rank 0, and no other, reports"
