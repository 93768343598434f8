from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

MpiRun = Callable[..., CompletedProcess[str]]
SMALL = ("--width", "16", "--depth", "1", "--seq-len", "4", "-n", "2", "-w", "1")


def test_backends_side_by_side(mpirun: MpiRun, tmp_path: Path) -> None:
    ended = mpirun(2, ["tools/train_step_perf.py", *SMALL, "--json", tmp_path / "out.json"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "backends agree" in ended.stdout
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["tool"], written["world_size"], written["width"]) == ("train_step_perf", 2, 16)
    rows = [(result["program"], result["backend"]) for result in written["results"]]
    assert rows == [("ddp", "tasp"), ("ddp", "gloo"), ("fsdp", "tasp"), ("fsdp", "gloo")]
    for result in written["results"]:
        assert 0 < result["time_us"]["min"] <= result["time_us"]["median"] <= result["time_us"]["max"]
        assert result["difference"] < 1e-4
        assert result["ratio"] > 0


def test_bad_flags(mpirun: MpiRun) -> None:
    ended = mpirun(1, ["tools/train_step_perf.py", "--backend", "tasp,mpi"])
    assert ended.returncode == 2
    assert "must be of tasp, gloo, got 'tasp,mpi'" in ended.stderr
