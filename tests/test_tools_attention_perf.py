"""tools/attention_perf.py: its figures, checks, files and exit statuses. Nothing here asserts a time."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tasp_coll import Communicator, Link, MismatchError, Topology
from tasp_coll.transport.loopback import LoopbackWorld

torch = pytest.importorskip("torch")

import attention_check  # noqa: E402
import attention_memory  # noqa: E402
import attention_options  # noqa: E402
from attention.dense import dense_attention  # noqa: E402
from attention.forecast import Problem, overlapped  # noqa: E402
from attention_measure import Parts, _times  # noqa: E402
from attention_report import Common, Errors, Result, ratio, rings_gain, row  # noqa: E402
from attention_silent import SilentTransport  # noqa: E402

MpiRun = Callable[..., CompletedProcess[str]]
TOOL = "tools/attention_perf.py"
TINY = ["--heads", "4", "--kv-heads", "2", "--head-dim", "8", "-n", "2", "-w", "1"]
FIELDS = {
    *("method", "time_us", "compute_us", "exposed_us", "merge_us", "ratio", "ccr", "comm_us", "alone_us", "ideal_us"),
    "predicted_us",
    *(
        "kv_bits",
        "rms_error",
        "error",
        "peak_bytes",
        "kernel",
        "seq_len",
        "batch",
        "heads",
        "kv_heads",
        "head_dim",
        "dtype",
        "causal",
    ),
    *("backward", "window"),
}


# --- runs


def test_all_of_it_on_three_ranks(mpirun: MpiRun, tmp_path: Path) -> None:
    """Fields of the results, errors against the reference, the picture and the trace."""
    files = {flag: tmp_path / name for flag, name in (("json", "o.json"), ("plot", "o.svg"), ("trace", "t.json"))}
    flags = [part for flag, path in files.items() for part in (f"--{flag}", str(path))]
    names = ["tasp", "ring", "allgather", "compute", "sdpa"]
    shape = ["--seq-len", "96", "--batch", "2", "--causal", "--backward", "--check"]
    ended = mpirun(3, [TOOL, *TINY, *shape, "--method", ",".join(names), *flags])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads(files["json"].read_text())
    head = {key: report[key] for key in report if key != "results"}
    assert set(head) == {"tool", "version", "world_size", "transport", "topology"}
    assert (head["tool"], head["world_size"], head["transport"]) == ("attention_perf", 3, "mpi")
    assert [result["method"] for result in report["results"]] == names
    for result in report["results"]:
        assert set(result) == FIELDS
        times = result["time_us"]
        assert 0 < times["min"] <= times["median"] <= times["max"]
        shown = [result[key] for key in ("seq_len", "batch", "heads", "kv_heads", "head_dim", "dtype", "causal")]
        assert shown == [96, 2, 4, 2, 8, "float32", True]
        assert result["backward"] is True
        assert (result["error"] is None) == (result["method"] == "compute")
        assert result["error"] is None or result["error"] < 1e-5
        assert (result["ideal_us"] is not None) == (result["method"] in ("tasp", "ring"))
        assert (result["compute_us"] is None) == (result["method"] == "sdpa")
        assert result["ccr"] > 0
        assert result["ccr"] == pytest.approx(result["alone_us"] / result["comm_us"])
    assert all(name in ended.stdout for name in names)
    assert files["plot"].read_text().startswith("<?xml")
    events = json.loads(files["trace"].read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2}
    shown = {event["name"] for event in events if event["ph"] == "X" and event["pid"] == 2}
    assert {*names, "compute alone", "exchange alone"} <= shown
    assert any(event.get("cat") == "compute" for event in events)


def test_lengths_that_do_not_divide_and_a_window(mpirun: MpiRun, tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    flags = ["--seq-len", "61", "--window", "9", "--dtype", "float64", "--check", "--json", str(path)]
    ended = mpirun(2, [TOOL, *TINY, *flags])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    results = json.loads(path.read_text())["results"]
    assert [result["method"] for result in results] == list(attention_options.DEFAULT)
    assert all(result["error"] < 1e-10 for result in results)


def test_few_bits_side_by_side(mpirun: MpiRun, tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    flags = ["--seq-len", "61", "--causal", "--check", "--kv-bits", "none,8,dynamic", "--json", str(path)]
    ended = mpirun(2, [TOOL, *TINY, "--method", "tasp,compute", *flags])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    *results, compute = json.loads(path.read_text())["results"]
    assert [result["kv_bits"] for result in results] == [None, 8, "dynamic"]
    assert compute["kv_bits"] is None
    exact, eight, dynamic = (result["rms_error"] for result in results)
    assert exact < 1e-6 < eight < 0.01 < dynamic < 0.2
    assert "tasp/dynamic" in ended.stdout


def test_one_rank_has_no_communication(mpirun: MpiRun, tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    ended = mpirun(1, [TOOL, *TINY, "--seq-len", "20", "--method", "tasp", "--json", str(path)])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert json.loads(path.read_text())["results"][0]["ccr"] is None


def test_without_communication(mpirun: MpiRun) -> None:
    ended = mpirun(2, [TOOL, *TINY, "--seq-len", "40", "--no-comm", "--backward", "--causal"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "communication off" in ended.stdout


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--method", "tasp,flash"], "must be names of tasp, ring, .*, got 'flash'"),
        (["--seq-len", "many"], "must be a number of tokens >= 1 such as 1000, 64K or 1M, got 'many'"),
        (["--seq-len", "0.3K"], "got '0.3K'"),
        (["--heads", "3"], "--kv-heads must divide --heads, got 2 and 3"),
        (["--no-comm", "--check"], "--check needs data"),
        (["--no-comm", "--method", "sdpa"], "sdpa does not communicate"),
        (["--meth", "tasp"], "unrecognized arguments"),
        (["--kv-bits", "none,9"], "must be none, 2 to 8, dynamic or dynamic:MEAN, got '9'"),
    ],
)
def test_wrong_flags(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (True, False):
        with pytest.raises(SystemExit) as left:
            attention_options.parse(None, [*TINY, *flags], quiet=quiet)
        assert left.value.code == 2
        told = capsys.readouterr().err
        assert not told if quiet else re.search(said, told)


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--dtype", "int8"], "invalid choice"),
        (["--method", "ulysses", "--heads", "2"], "--method ulysses: "),
        (["--method", "sdpa", "--seq-len", "10"], "multiple of 3 ranks, got 10"),
        (["--trace", "/nowhere/o.json"], "--trace must be a file"),
    ],
)
def test_what_cannot_be_done_is_said_once_and_ends_every_rank(mpirun: MpiRun, flags: list[str], said: str) -> None:
    ended = mpirun(3, [TOOL, *TINY, "--seq-len", "12", *flags])
    assert ended.returncode == 2, ended.stdout + ended.stderr
    lines = [line for line in ended.stderr.splitlines() if "attention_perf" in line and "usage:" not in line]
    assert len(lines) == 1, ended.stderr
    assert said in lines[0]


def test_a_method_of_the_default_list_that_cannot_run_is_left_out(mpirun: MpiRun) -> None:
    ended = mpirun(3, [TOOL, "--heads", "2", "--head-dim", "8", "-n", "1", "-w", "0", "--seq-len", "12"])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "# ulysses is left out: " in ended.stdout


def test_a_wrong_result_fails_the_run(mpirun: MpiRun, tmp_path: Path) -> None:
    source = (
        "import attention, attention_perf, torch\n"
        "right = attention.context_parallel_attention\n"
        "attention.context_parallel_attention = lambda *a, **k: right(*a, **k) * 1.001\n"
        "attention_perf.main()\n"
    )
    script = tmp_path / "wrong.py"
    script.write_text(f"import sys; sys.path.insert(0, 'tools')\n{source}")
    ended = mpirun(2, [script, *TINY, "--seq-len", "12", "--method", "tasp", "--check"])
    assert ended.returncode == 1, ended.stdout + ended.stderr


def test_help_teaches_with_an_example_on_a_virtual_cluster(mpirun: MpiRun) -> None:
    ended = mpirun(1, [TOOL, "--help"])
    assert ended.returncode == 0
    assert "tools/virtual_cluster.py run --topology full_mesh:8 --link-mbit 50 -- \\" in ended.stdout


@pytest.mark.skipif(importlib.util.find_spec("ringmaster") is None, reason="axolotl-ringmaster is not installed")
def test_ringmaster_beside_ours(mpirun: MpiRun, tmp_path: Path) -> None:
    path = tmp_path / "o.json"
    flags = ["--seq-len", "24", "--causal", "--backward", "--check", "--json", str(path)]
    flags += ["--method", "tasp,ringmaster,ringmaster-zigzag"]
    ended = mpirun(3, [TOOL, *TINY, *flags])
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert all(result["error"] < 1e-5 for result in json.loads(path.read_text())["results"])


def test_ringmaster_that_is_not_there_is_said_to_be_missing(mpirun: MpiRun, tmp_path: Path) -> None:
    (tmp_path / "ringmaster.py").write_text("")  # a module of that name, without the parts
    ended = mpirun(
        2,
        [TOOL, *TINY, "--method", "ringmaster"],
        env={"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "pip install axolotl-ringmaster" in ended.stderr


# --- figures


@pytest.mark.parametrize(
    "ccr, speedup", [(0.1, 6.5), (0.39, 2.69), (0.65, 1.66), (0.80, 1.38), (0.98, 1.15), (1.17, 1.0)]
)
def test_the_ideal_curve_on_eight_ranks(ccr: float, speedup: float) -> None:
    gain = rings_gain(Topology.preset("full_mesh:8"), 1 << 20)
    assert gain == pytest.approx(7)
    found = overlapped(8, ccr, 1) / overlapped(8, ccr, 1 / gain)
    assert found == pytest.approx(speedup, abs=0.02)


def test_all_rings_gain_nothing_where_there_is_one() -> None:
    one_way = Topology("circle", 4, links=[Link(rank, (rank + 1) % 4, 1.0) for rank in range(4)])
    assert rings_gain(one_way, 1 << 20) == pytest.approx(1)


def test_of_each_iteration_the_slowest_rank_counts() -> None:
    figures = np.zeros((2, 4, 1, 7))  # ranks; a method, computing alone, two exchanges
    figures[:, 0, 0, 0] = 3.0, 5.0
    figures[0, 0, 0, 1:] = 9.0
    figures[1, 0, 0, 1:] = 1.0, 2.0, 0.5, 0.25, 0.125, 0.0625
    figures[:, 2, 0, 0] = 7.0, 6.0
    times = _times(figures, ["compute"])
    (parts,) = times.methods[0]
    assert parts == Parts(5.0, (1.0, 2.0, 0.5), (0.25, 0.125, 0.0625))
    assert (parts.seconds("wait"), parts.work()) == (2.125, (1.5, 0.3125))
    assert times.exchange[0] == (7.0,)


def result(method: str, error: float | None = None, named: bool = True, kv_bits: int | str | None = None) -> Result:
    options = attention_options.parse(None, ["--backward"], quiet=True)
    mesh = Topology.preset("full_mesh:8")
    problem = Problem(8, 4096, heads=8, kv_heads=8, head_dim=64, itemsize=4, backward=True)
    common = Common(
        options, 8, "cpu", {"compute": (2.0, 4.0), "allgather": (1.0, 2.0)}, (4.0, 8.0), mesh, named, problem
    )
    parts = (Parts(3.0, (1.0, 1.0, 0.5), (0.0, 0.0, 0.0)), Parts(5.0, (2.0, 1.0, 1.5), (1.0, 0.0, 0.0)))
    errors = None if error is None else Errors(error, error)
    return Result(common, method, kv_bits, True, parts, 1.0, errors, None)


def test_figures_of_a_result() -> None:
    found = result("ring").record()
    assert set(found) == FIELDS
    assert found["time_us"] == {"min": 3e6, "median": 4e6, "max": 5e6}
    assert (found["compute_us"], found["exposed_us"], found["merge_us"]) == (2e6, 1e6, 1e6)
    assert found["ccr"] == 0.5
    assert found["ideal_us"] == pytest.approx((4 + 0.25 + 8 + 0.5) * 1e6)
    assert result("tasp").record()["ideal_us"] == pytest.approx(6e6)
    assert found["predicted_us"] == pytest.approx(6e6, rel=0.01), "links of 1 GB/s are no limit"
    assert result("ring", named=False).record()["predicted_us"] is None, "nobody said what the links are"
    assert result("allgather").record()["predicted_us"] == pytest.approx(3e6, rel=0.01), "by its own computation"
    assert len(row(result("tasp", 1e-7)).split()) == 13
    few = result("ring", kv_bits=8).record()
    share = 8.25 / 32
    assert few["ideal_us"] == pytest.approx((7 * max(0.25, 4 * share / 7) + 0.25 + 4 * (1 + share) + 0.5) * 1e6)
    assert row(result("tasp", kv_bits="dynamic")).split()[0] == "tasp/dynamic"


def test_ratios_are_taken_within_iterations() -> None:
    first = [Parts(seconds, (), ()) for seconds in (1.0, 2.0, 10.0)]
    mine = [Parts(seconds, (), ()) for seconds in (2.0, 4.0, 10.0)]
    assert ratio(mine, first) == 2.0


@pytest.mark.parametrize("text, tokens", [("1000", 1000), ("64K", 65536), ("1.5k", 1536), ("1M", 1 << 20)])
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert attention_options.count(text) == tokens


# --- parts


def test_the_reference_goes_by_heads_of_keys() -> None:
    """And gives what it gives for all at once."""
    options = SimpleNamespace(heads=4, kv_heads=2, batch=2, causal=True, window=3, backward=True)
    random = torch.Generator().manual_seed(0)
    shapes = ((2, heads, 6, 4) for heads in (4, 2, 2, 4))
    inputs = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    bench: Any = SimpleNamespace(options=options)
    found = attention_check._dense(bench, inputs)
    leaves = [x.clone().requires_grad_() for x in inputs[:3]]
    out = dense_attention(*leaves, is_causal=True, window=3)
    out.backward(inputs[3])
    torch.testing.assert_close(found, [out.detach(), *(x.grad for x in leaves)])


def test_peak_memory_counts_what_was_given_back() -> None:
    if attention_memory.peak_bytes(lambda: None) is None:
        pytest.skip("this system does not tell")

    def call() -> Any:
        np.ones(4 << 20)  # 32 MiB, dropped at once
        return np.ones(1 << 20)

    found = attention_memory.peak_bytes(call)
    assert found is not None
    assert 31 << 20 <= found < 60 << 20  # the system counts in batches of pages


def test_a_silent_transport_agrees_and_carries_nothing() -> None:
    """Mismatches are still found; data does not come, so what is not one's own is zeros."""

    def body(transport: Any) -> tuple[float, list[float], str]:
        with Communicator(SilentTransport(transport.duplicate()), timeout=20) as comm:
            send = np.full(5000, comm.rank + 1.0)
            gathered = comm.decomposed_allgather(send, algorithm="rings")
            own = gathered[comm.rank * 5000 :][:5000]
            others = float(gathered.sum() - own.sum())
            steps = [len(arrival.chunks) for arrival in comm.allgather_steps(send, algorithm="ring")]
            comm.decomposed_reduce_scatter(np.ones(15000), algorithm="rings")
            with pytest.raises(MismatchError, match="disagree on shape"):
                comm.decomposed_allgather(np.ones(5000 + comm.rank), algorithm="rings")
            return others, steps, comm.transport

    for others, steps, name in LoopbackWorld(3).run(body):
        assert others == 0
        assert steps == [1, 1, 1]
        assert name == "loopback, silent"
