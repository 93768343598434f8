"""The measurement of all-reduce at few bits: what it tells, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import compressed_perf
from launch import REPOSITORY

MpiRun = Callable[..., CompletedProcess[str]]
TOOL = REPOSITORY / "tools" / "compressed_perf.py"


def test_formats_side_by_side(mpirun: MpiRun, tmp_path: Path) -> None:
    file = tmp_path / "formats.json"
    ended = mpirun(2, [TOOL, "-e", "70001", "-n", "1", "-w", "0", "--json", file])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = {row["format"]: row for row in json.loads(file.read_text())["results"]}
    assert [*rows] == ["float32", "bfloat16", "8", "dynamic"]
    assert rows["dynamic"]["less"] > 7.5 > rows["8"]["less"] > 3.8
    assert rows["float32"]["error"] < rows["bfloat16"]["error"] < rows["8"]["error"] < rows["dynamic"]["error"] < 0.1
    assert all(0 < row["min_s"] <= row["median_s"] <= row["max_s"] for row in rows.values())
    assert all(0 <= row["packing"] <= 1 for row in rows.values())


@pytest.mark.parametrize("flags, told", [(["--formats", "int8"], "--formats"), (["--mean-bits", "nan"], "--mean-bits")])
def test_what_cannot_be_done_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        compressed_perf.parse(flags, quiet=False)
    assert ended.value.code == 2
    assert f"{told} must be" in capsys.readouterr().err
