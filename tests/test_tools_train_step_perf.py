"""The training steps' measurement: what it tells, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

from launch import REPOSITORY

MpiRun = Callable[..., CompletedProcess[str]]
TOOL = REPOSITORY / "tools" / "train_step_perf.py"


def test_both_back_ends_train_alike(mpirun: MpiRun, tmp_path: Path) -> None:
    file = tmp_path / "steps.json"
    flags = ["--width", "16", "--depth", "1", "-n", "2", "-w", "1", "--json", file]
    ended = mpirun(2, [TOOL, *flags])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = json.loads(file.read_text())["results"]
    assert [(row["kind"], row["backend"]) for row in rows] == [
        ("fsdp2", "tasp"),
        ("fsdp2", "gloo"),
        ("ddp", "tasp"),
        ("ddp", "gloo"),
    ]
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows)
    assert max(row["loss"] for row in rows) - min(row["loss"] for row in rows) < 1e-4


def test_what_cannot_be_done_is_told_once(mpirun: MpiRun) -> None:
    for flags, told in (
        (["--backend", "mpi"], "--backend must be of tasp, gloo"),
        (["--width", "12"], "multiple of 8"),
    ):
        ended = mpirun(2, [TOOL, *flags])
        assert ended.returncode == 2
        assert ended.stderr.count(told) == 1, ended.stderr
