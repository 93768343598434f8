"""The tool that measures links, run as users run it; what the figures mean is tested in test_discovery."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from launch import mpirun
from tasp_coll import Topology
from tasp_coll.discovery import Measured, infer

TOOL = "tools/discover_topology.py"


def test_figures_are_told_written_and_drawn(tmp_path: Path) -> None:
    """Two ranks are always joined by a link, whatever the machine's load."""
    paths = {flag: tmp_path / f"found{suffix}" for flag, suffix in (("--json", ".json"), ("--plot", ".png"))}
    saved = tmp_path / "topology.json"
    flags = [str(part) for item in (*paths.items(), ("--save", saved)) for part in item]
    ended = mpirun(2, [TOOL, "--repeats", "1", *flags])
    assert ended.returncode == 0, ended.stderr
    record = json.loads(paths["--json"].read_text())
    assert (record["tool"], record["world_size"], record["transport"]) == ("discover_topology", 2, "mpi")
    figures = record["results"][0]
    assert set(figures) == {"alone_GBps", "together_GBps", "everyone_GBps", "latency_us"}
    assert all(rows[0][0] == 0 and rows[0][1] > 0 for rows in figures.values())
    assert paths["--plot"].read_bytes().startswith(b"\x89PNG")
    topology = Topology.from_file(saved)
    assert topology.ranks == 2
    # Noise may make the two directions differ by more than one rate measured twice would: then each keeps its own.
    names = ("alone_GBps", "together_GBps", "everyone_GBps", "latency_us")
    assert topology == infer(Measured(*(np.array(figures[name]) for name in names)))
    assert "latency, us" in ended.stdout
    assert topology.name in ended.stdout


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--repeats", "0"], "argument --repeats: must be an integer >= 1, got '0'"),
        (["--plot", "links.bmp"], "argument --plot: must end in .png, .svg, .pdf, got 'links.bmp'"),
    ],
)
def test_wrong_usage_is_told_once(flags: list[str], told: str) -> None:
    ended = mpirun(2, [TOOL, *flags])
    assert ended.returncode == 2
    assert ended.stderr.count(told) == 1


def test_help_teaches() -> None:
    ended = mpirun(1, [TOOL, "--help"])
    assert ended.returncode == 0
    assert "TASP_COLL_TOPOLOGY" in ended.stdout
