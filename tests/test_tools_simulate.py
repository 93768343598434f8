"""tools/simulate.py: figures that can be worked out by hand, faults, files, pictures, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import simulate
import simulate_model
from attention.forecast import METHODS
from launch import REPOSITORY
from simulate_options import DEVICES, Fault, count, parse
from tasp_coll import ArgumentError, Topology

SMALL = ["--sizes", "7M", "--seq-len", "64K"]


def rows(topology: str, *flags: str) -> list[dict[str, Any]]:
    """All rows of a run, as its file has them."""
    options = parse(None, ["--topology", topology, *flags])
    found = simulate_model.topology_of(options)
    collectives = simulate_model.collectives(options, found)
    attention = simulate_model.attention(options, found)
    losses = simulate_model.losses(options, found)
    return [row.record() for table in (collectives, attention, losses) for row in table]


def of(found: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The only row with these fields."""
    (row,) = (row for row in found if wanted.items() <= row.items())
    return row


def test_collectives_of_a_full_mesh() -> None:
    found = rows("full_mesh:8", *SMALL, "--collective", "allgather,allreduce")
    nbytes = 7 << 20
    ring = of(found, collective="allgather", algorithm="ring")
    assert ring["seconds"] == pytest.approx(7 * nbytes / 1e9)
    rings = of(found, collective="allgather", algorithm="rings")
    assert rings["seconds"] == pytest.approx(nbytes / 1e9)
    assert rings["bound"] == pytest.approx(rings["seconds"])
    assert rings["busbw"] == pytest.approx(7)
    assert rings["algbw"] == pytest.approx(8)
    assert rings["auto"]
    assert not ring["auto"]
    both = of(found, collective="allreduce", algorithm="rings")
    assert both["seconds"] == pytest.approx(2 * nbytes / 1e9)
    assert both["busbw"] == pytest.approx(7), "nccl-tests' factor of 2(n-1)/n"


@pytest.mark.parametrize("topology", ["full_mesh:5", "nvswitch:8", "cluster:2x4", "torus:3x3", "dgx_h100:2"])
def test_nothing_is_below_the_cut_bound(topology: str) -> None:
    every = "allgather,reduce_scatter,allreduce"
    for row in rows(topology, *SMALL, "--collective", every):
        if "bound" in row:
            assert row["seconds"] >= row["bound"] * (1 - 1e-9), row


def test_attention_of_all_methods() -> None:
    found = rows("cluster:2x4", *SMALL, "--causal")
    attention = [row for row in found if "method" in row and "tokens" in row]
    assert [row["method"] for row in attention] == list(METHODS)
    assert all(row["fastest"] == (row["seconds"] == min(x["seconds"] for x in attention)) for row in attention)
    scarce = rows("cluster:2x4", *SMALL, "--causal", "--room", "0.1")
    assert not of(scarce, method="allgather", tokens=1 << 16)["fits"]
    assert not of(scarce, method="allgather", tokens=1 << 16)["fastest"]
    ring, tasp = (of(found, method=method, tokens=1 << 16) for method in ("ring", "tasp"))
    assert tasp["seconds"] <= ring["seconds"]
    assert tasp["forward"]["exposed_s"] <= ring["forward"]["exposed_s"]
    assert of(rows("cluster:2x4", *SMALL, "--backward"), method="tasp", tokens=1 << 16)["backward"]["compute_s"] > 0


def test_links_that_give_less() -> None:
    whole, half = (
        of(rows("nvswitch:4", *SMALL, *flags), algorithm="ring")["seconds"] for flags in ([], ["--link-share", "0.5"])
    )
    assert half == pytest.approx(2 * whole)
    mesh = of(rows("full_mesh:4", *SMALL, "--link-share", "0.5"), algorithm="ring")["seconds"]
    assert mesh == pytest.approx(2 * 3 * (7 << 20) / 1e9)


def test_a_slow_link_costs_its_share_where_rings_are_planned_anew() -> None:
    found = rows("full_mesh:5", *SMALL, "--slow", "0:1:0.1")
    loss = of(found, algorithm="rings", healthy=pytest.approx((7 << 20) / 1e9))
    assert loss["kept"] == pytest.approx(10 * loss["healthy"], rel=0.01), "the slow link holds up its ring"
    assert loss["planned"] < 1.5 * loss["healthy"]


def test_a_dead_link_is_gone_both_ways() -> None:
    whole = Topology.preset("full_mesh:4")
    broken = simulate_model.degraded(whole, (Fault(0, 1, 0.0), Fault(2, 3, 0.5)))
    assert broken.link(0, 1) is None
    assert broken.link(1, 0) is None
    assert broken.GBps(2, 3) == broken.GBps(3, 2) == 0.5
    with pytest.raises(ArgumentError, match="must name links of full_mesh:4, got 0:9"):
        simulate_model.degraded(whole, (Fault(0, 9, 0.0),))


def test_the_file_and_the_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "o.json"
    for picture in ("speedup", "map", "timeline"):
        drawn = tmp_path / f"{picture}.svg"
        flags = ["--topology", "mi300x", *SMALL, "--plot", str(drawn), "--picture", picture]
        assert simulate.main([*flags, "--json", str(path)]) == 0
        assert drawn.stat().st_size > 1000
    told = json.loads(path.read_text())
    assert (told["tool"], told["ranks"]) == ("simulate", 8)
    assert {row["kind"] for row in told["results"]} == {"collective", "attention"}
    assert "640" not in capsys.readouterr().out, "an MI300X computes on an MI300X"


def test_ranks_above_what_is_simulated_message_by_message() -> None:
    found = rows("cluster:16x8", *SMALL)
    ring, all_rings, two_levels = (
        of(found, collective="allgather", algorithm=name)["seconds"] for name in ("ring", "rings", "hierarchical")
    )
    assert two_levels < all_rings < ring


def test_neither_mpi_nor_torch_is_loaded() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools'); import simulate\n"
        f"simulate.main(['-t', 'full_mesh:4', *{SMALL}])\n"
        "print([name for name in ('torch', 'mpi4py', 'matplotlib') if name in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.stdout.strip().endswith("[]"), ended.stderr


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "required"),
        (["-t", "mi300x", "--dead", "0"], "must be A:B"),
        (["-t", "mi300x", "--slow", "0:1"], "must be A:B:X"),
        (["-t", "mi300x", "--slow", "0:1:0"], "must leave something"),
        (["-t", "mi300x", "--slow", "0:1:2"], "number from 0 to 1"),
        (["-t", "mi300x", "--sizes", "1Q"], "whole number"),
        (["-t", "mi300x", "--collective", "gather"], "must be of allgather"),
        (["-t", "mi300x", "--kv-heads", "5"], "--kv-heads must divide --heads"),
        (["-t", "mi300x", "--link-share", "nan"], "number from 0 to 1"),
    ],
)
def test_bad_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        simulate.main(flags)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["-t", "mesh"], "neither a file nor a preset"),
        (["-t", "mi300x", "--dead", "0:s"], "must name links"),
        (["-t", "cluster:200x8", "--dead", "0:1"], "up to 1024 ranks, got 1600"),
        (["-t", "cluster:2x2", "--dead", "0:1", "--dead", "0:fabric"], "none lead from 0 to 1"),
    ],
)
def test_what_cannot_be_looked_at(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate.main([*flags, *SMALL]) == 2
    assert said in capsys.readouterr().err


def test_numbers_and_devices() -> None:
    assert [count(text) for text in ("1000", "64K", "1.5m", "2G")] == [1000, 65536, 3 << 19, 2 << 30]
    options = parse(None, ["-t", "nvswitch:8", "--tflops", "300", "--half-tokens", "0", "--step-us", "5"])
    assert (options.device.flops, options.device.half, options.device.step_s) == (300e12, 0, pytest.approx(5e-6))
    assert parse(None, ["-t", "mi300x"]).device == DEVICES["mi300x"]
    assert parse(None, ["-t", "mi300x", "--device", "h100"]).device == DEVICES["h100"]
