"""The bandwidth tests of tools/: their checking of data, their figures, files and exit statuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import perf_data
import perf_options
from all_gather_perf import AllGather
from all_reduce_perf import AllReduce
from launch import REPOSITORY
from perf_collective import Collective
from perf_data import Dtype, NDArray, Pattern
from perf_measure import turns
from perf_report import Timing, figure
from reduce_scatter_perf import ReduceScatter
from tasp_coll import Link, Topology

MpiRun = Callable[..., CompletedProcess[str]]
COLLECTIVES: tuple[Collective, ...] = (AllGather(), ReduceScatter(), AllReduce())
TYPES = ("int8", "uint64", "half", "bfloat16", "float", "double")
FIELDS = {
    "size_bytes",
    "count",
    "dtype",
    "algorithm",
    "chosen",
    "rings",
    "time_us",
    "in_place",
    "algbw_GBps",
    "busbw_GBps",
    "wrong",
    "bound_GBps",
    "predicted_us",
}
TINY = ["-n", "3", "-w", "1"]


# --- data


def numbers(dtype: Dtype, memory: NDArray) -> NDArray:
    """The elements as float64 or as integers."""
    if dtype.name == "bfloat16":
        return (memory.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    values = memory.view(dtype.name)
    return values.astype(np.float64) if dtype.digits else values


def contributions(collective: Collective, pattern: Pattern, count: int) -> list[NDArray]:
    extent = collective.extent(count * pattern.ranks * pattern.dtype.itemsize, pattern.dtype.itemsize, pattern.ranks)
    return [collective.sent(pattern, extent, rank)(0, extent.sent) for rank in range(pattern.ranks)]


def results(collective: Collective, dtype: Dtype, sent: list[NDArray]) -> list[NDArray]:
    """The collective itself, done by NumPy: what each rank receives."""
    if not collective.reduces:
        return [np.concatenate(sent)] * len(sent)
    with np.errstate(over="raise"):
        total = np.sum([numbers(dtype, each) for each in sent], axis=0, dtype=None if dtype.digits else dtype.name)
    bits = dtype.encode(total) if dtype.digits else total.view(dtype.bits)
    return [bits] * len(sent) if collective.gathers else np.split(bits, len(sent))


def wrong(collective: Collective, pattern: Pattern, count: int, received: list[NDArray]) -> int:
    extent = collective.extent(count * pattern.ranks * pattern.dtype.itemsize, pattern.dtype.itemsize, pattern.ranks)
    sources = [collective.received(pattern, extent, rank) for rank in range(pattern.ranks)]
    return sum(map(perf_data.count_wrong, received, sources))


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.name)
@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=30)
@given(ranks=st.integers(1, 9), count=st.integers(1, 300), seed=st.integers(0, 50))
def test_what_is_right_passes_and_what_is_left_from_another_call_does_not(
    collective: Collective, name: str, ranks: int, count: int, seed: int
) -> None:
    dtype = perf_data.dtype(name)
    pattern, before = (Pattern(dtype, ranks, number, collective.reduces) for number in (seed, seed + 1))
    right = results(collective, dtype, contributions(collective, pattern, count))
    assert wrong(collective, pattern, count, right) == 0
    if collective.name == "allgather" or count >= 64:
        stale = results(collective, dtype, contributions(collective, before, count))
        assert wrong(collective, pattern, count, stale) > 0


@pytest.mark.parametrize("name", TYPES)
@settings(max_examples=30)
@given(ranks=st.integers(2, 9), count=st.integers(1, 300), data=st.data())
def test_shards_of_two_ranks_in_each_others_place_are_all_wrong(
    name: str, ranks: int, count: int, data: st.DataObject
) -> None:
    collective, pattern = AllGather(), Pattern(perf_data.dtype(name), ranks, 3, False)
    a, b = data.draw(st.lists(st.integers(0, ranks - 1), min_size=2, max_size=2, unique=True))
    sent = contributions(collective, pattern, count)
    sent[a], sent[b] = sent[b], sent[a]
    assert wrong(collective, pattern, count, [np.concatenate(sent)]) == 2 * count


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.name)
@pytest.mark.parametrize("name", TYPES)
def test_a_chunk_in_the_wrong_place_and_a_rank_that_counts_twice_are_wrong(collective: Collective, name: str) -> None:
    dtype, ranks, count = perf_data.dtype(name), 4, 256
    pattern = Pattern(dtype, ranks, 1, collective.reduces)
    sent = contributions(collective, pattern, count)
    moved = [np.roll(each, 64) for each in results(collective, dtype, sent)]
    assert wrong(collective, pattern, count, moved) > 0
    twice = results(collective, dtype, [sent[0], sent[1], sent[1], sent[3]])
    assert wrong(collective, pattern, count, twice) > 0


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.name)
@pytest.mark.parametrize("name", TYPES)
def test_memory_that_is_spoilt_is_all_wrong(collective: Collective, name: str) -> None:
    pattern = Pattern(perf_data.dtype(name), 3, 0, collective.reduces)
    extent = collective.extent(3 << 18, pattern.dtype.itemsize, 3)
    source = collective.received(pattern, extent, 1)
    memory = np.empty(extent.received, pattern.dtype.bits)
    perf_data.spoil(memory, source)
    assert perf_data.count_wrong(memory, source) == extent.received
    perf_data.fill(memory, source)
    memory[-1] ^= 1
    assert perf_data.count_wrong(memory, source) == 1


def test_sums_are_exact_in_any_type_up_to_the_most_ranks_that_it_can_count() -> None:
    for name, most in (("bfloat16", 128), ("half", 1024), ("float", 1024)):
        pattern = Pattern(perf_data.dtype(name), most, 7, True)
        assert pattern.width >= 1
        received = results(AllReduce(), pattern.dtype, contributions(AllReduce(), pattern, 1))
        assert wrong(AllReduce(), pattern, 1, received[:1]) == 0
    assert Pattern(perf_data.dtype("bfloat16"), 129, 7, True).width < 1


# --- figures


@given(
    size_bytes=st.integers(1, 1 << 40),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    ranks=st.integers(1, 5000),
    collective=st.sampled_from(COLLECTIVES),
)
def test_a_size_is_rounded_down_to_whole_elements(
    collective: Collective, size_bytes: int, itemsize: int, ranks: int
) -> None:
    extent = collective.extent(size_bytes, itemsize, ranks)
    assert extent.size_bytes == max(extent.sent, extent.received) * itemsize
    unit = itemsize * (1 if collective.name == "allreduce" else ranks)
    assert extent.count >= 1
    assert size_bytes - unit < extent.size_bytes <= max(size_bytes, unit)


def test_a_reduce_scatter_is_bound_by_the_links_turned_round() -> None:
    slow_in, slow_out = 0.5, 0.25  # of rank 0: all-gather waits for what goes out of it, and what must come in
    links = [Link(a, b, 1.0) for a in range(3) for b in range(3) if a != b and 0 not in (a, b)]
    links += [Link(0, b, slow_out) for b in (1, 2)] + [Link(b, 0, slow_in) for b in (1, 2)]
    topology = Topology("uneven", 3, (), tuple(links))
    gather, scatter, both = (collective.bound_seconds(topology, 3_000_000_000) for collective in COLLECTIVES)
    assert gather == pytest.approx(1 / (2 * slow_out)) == 2.0  # 1 GB leaves rank 0, 2 GB come in at 1 GB/s
    assert scatter == pytest.approx(2 / (2 * slow_out)) == 4.0  # 2 GB leave it
    assert both == gather + scatter


@given(st.integers(1, 8))
def test_every_algorithm_is_in_every_place_equally_often(count: int) -> None:
    orders = [turns(count, iteration) for iteration in range(-count, count)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert all(sorted(places) == sorted(2 * list(range(count))) for places in zip(*orders, strict=True))


@given(st.lists(st.floats(1e-3, 1e7), min_size=1, max_size=300))
def test_statistics_of_times(times: list[float]) -> None:
    timing = Timing(tuple(times), None)
    low, middle, high = (timing.record()[key] for key in ("min", "median", "max"))
    assert low <= middle <= timing.p99 or len(times) < 3
    assert (low, middle, high) == (min(times), median(times), max(times))
    assert sum(time <= timing.p99 for time in times) >= 0.99 * len(times)
    assert timing.variation >= 0


@given(st.floats(0, 1e12), st.sampled_from([6, 8]))
def test_figures_fit_their_columns_and_are_near(value: float, width: int) -> None:
    text = figure(value, width, 4)
    assert len(text) <= max(width, 7)
    assert float(text) == pytest.approx(value, rel=0.05, abs=5.1e-5)


# --- command line


@pytest.mark.parametrize(
    "text, expected", [("8", 8), ("64K", 65536), ("1m", 1 << 20), ("2G", 2 << 30), ("1.5K", 1536), ("4KiB", 4096)]
)
def test_sizes(text: str, expected: int) -> None:
    assert perf_options.size(text) == expected


@pytest.mark.parametrize(
    "flags, told",
    [
        ("-b 0", "number of bytes"),
        ("-b 1X", "1X"),
        ("-b 2M -e 1M", "-b must be at most -e"),
        ("-f 1", "-f/--stepfactor"),
        ("-f 2 -i 8", "not allowed with"),
        ("-n 0", "integer >= 1"),
        ("-c 2", "-c/--check"),
        ("-d quad", "quad"),
        ("--algo rings,rail", "rail"),
        ("--algo ring --rings 2", "--rings"),
        ("--algo ring,mpi4py -m 2", "add -z 1"),
        ("--timeout 0", "> 0"),
        ("-G 2", "-G is for --device cuda"),
        ("--gpu-transport ipc", "--gpu-transport is for --device cuda"),
        ("--device cuda --algo ring,gloo", "gloo is for --device cpu"),
        ("--device cuda -G 2 -z 1", "leave out -z 1"),
        ("--device cuda -d bfloat16", "--arrays torch"),
        ("--nope", "--nope"),
    ],
)
def test_bad_flags_are_named_by_one_rank_and_end_all_alike(
    flags: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet in (False, True):
        with pytest.raises(SystemExit) as ended:
            perf_options.parse("tool", "about", flags.split(), quiet=quiet)
        assert ended.value.code == 2
        heard = capsys.readouterr()
        assert (heard.out, heard.err) == ("", "") if quiet else told in heard.err


def test_sizes_go_up_by_a_factor_or_by_steps() -> None:
    by_factor = perf_options.parse("tool", None, ["-b", "3", "-e", "1K", "-f", "4"], quiet=True)
    assert by_factor.sizes() == [3, 12, 48, 192, 768]
    by_steps = perf_options.parse("tool", None, ["-b", "1K", "-e", "4K", "-i", "1K"], quiet=True)
    assert by_steps.sizes() == [1024, 2048, 3072, 4096]


# --- whole runs


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(REPOSITORY), str(REPOSITORY / "tools"), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "TASP_COLL_TOPOLOGY": "", "TASP_COLL_CACHE": "/nonexistent", **more}


def measured(mpirun: MpiRun, ranks: int, collective: Collective, flags: list[str], path: Path) -> tuple[Any, str]:
    """What the tool wrote, and what it printed."""
    script = REPOSITORY / "tools" / f"{collective.tool}.py"
    ended = mpirun(ranks, [script, *TINY, *flags, "--json", path], env=environment())
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("# Out of bounds values : 0 OK") == 1, "rank 0, and no other, reports"
    assert [*path.parent.glob(f".{path.name}*")] == []
    return json.loads(path.read_text()), ended.stdout


def check_record(record: dict[str, Any], ranks: int, factor: float) -> None:
    assert set(record) == FIELDS
    assert record["wrong"] == 0
    times = record["time_us"]
    assert set(times) == {"min", "median", "max"}
    assert 0 < times["min"] <= times["median"] <= times["max"]
    assert record["algbw_GBps"] == pytest.approx(record["size_bytes"] / times["median"] / 1e3)
    assert record["busbw_GBps"] == pytest.approx(record["algbw_GBps"] * factor)
    assert record["in_place"] is None or set(record["in_place"]) == set(times)


def test_all_gather_beside_all_peers(mpirun: MpiRun, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("matplotlib")
    names = ["auto", "rings", "ring", "direct", "native", "native", "mpi4py", "gloo"]
    flags = ["-b", "8", "-e", "64K", "-f", "8192", "--algo", ",".join(names), "--topology", "full_mesh:3", "-I"]
    found, printed = measured(
        mpirun, 3, AllGather(), [*flags, "--plot", str(tmp_path / "busbw.png")], tmp_path / "found.json"
    )
    assert {key: found[key] for key in ("tool", "world_size", "transport", "topology")} == {
        "tool": "all_gather_perf",
        "world_size": 3,
        "transport": "mpi",
        "topology": "full_mesh:3",
    }
    assert [record["algorithm"] for record in found["results"]] == 2 * names
    for record in found["results"]:
        check_record(record, 3, 2 / 3)
        assert record["size_bytes"] == 3 * 4 * record["count"]
        assert record["dtype"] == "float32"
        assert record["bound_GBps"] == pytest.approx(2.0)  # two links of 1 GB/s into every rank
        assert record["rings"] == {"rings": 2, "ring": 1}.get(record["chosen"])
        assert record["chosen"] == record["algorithm"] or record["algorithm"] == "auto"
        assert (record["in_place"] is None) == (record["algorithm"] == "gloo")
        assert (record["predicted_us"] is None) == (record["algorithm"] == "gloo")
        least = (3 - 1) / 3 * record["size_bytes"] / (record["bound_GBps"] * 1e3)
        assert record["predicted_us"] is None or record["predicted_us"] >= least
    assert [record["count"] for record in found["results"]][:: len(names)] == [1, 65536 // 12]
    assert (tmp_path / "busbw.png").read_bytes().startswith(b"\x89PNG")
    rows = [line.split() for line in printed.splitlines() if line and not line.startswith("#")]
    assert len(rows) == 2 * len(names)
    assert {len(row) for row in rows} == {6 + 8 + 8 + 3}, "size .. algorithm, two sets of times, ratio, model, %bound"
    assert {row[-3] for row in rows[:: len(names)]} == {"1.00"}


@pytest.mark.parametrize(
    "collective, ranks, flags",
    [
        (AllGather(), 2, []),
        (AllGather(), 2, ["-m", "3", "-d", "int8", "--algo", "rings,direct"]),
        (ReduceScatter(), 3, ["-d", "double", "--algo", "ring,native,mpi4py"]),
        (AllReduce(), 2, ["-d", "int32", "--algo", "rings,native,mpi4py", "-m", "2", "-z", "1"]),
        (AllReduce(), 3, ["-d", "half"]),
    ],
)
def test_small_runs(mpirun: MpiRun, tmp_path: Path, collective: Collective, ranks: int, flags: list[str]) -> None:
    sizes = ["-b", "1K", "-e", "3K", "-i", "2K"]
    found, printed = measured(mpirun, ranks, collective, [*sizes, *flags], tmp_path / "found.json")
    for record in found["results"]:
        check_record(record, ranks, collective.factor(ranks))
        assert record["bound_GBps"] is record["predicted_us"] is None
    left_out = "native is left out" in printed
    assert left_out == ("half" in flags), "MPI has no sums of half"
    assert not left_out or {record["algorithm"] for record in found["results"]} == {"rings", "ring", "direct"}


def test_without_a_check_nothing_is_said_of_wrong_elements(mpirun: MpiRun, tmp_path: Path) -> None:
    script, path = REPOSITORY / "tools" / "all_reduce_perf.py", tmp_path / "found.json"
    flags = ["-c", "0", "-b", "8", "-e", "8", "--algo", "auto", "--json", path]
    ended = mpirun(1, [script, *TINY, *flags], env=environment())
    assert ended.returncode == 0, ended.stderr
    assert "N/A" in ended.stdout
    assert [record["wrong"] for record in json.loads(path.read_text())["results"]] == [None]


def test_what_is_done_in_place_can_be_left_out(mpirun: MpiRun, tmp_path: Path) -> None:
    flags = ["-b", "1K", "-e", "1K", "--algo", "ring,direct", "--out-of-place"]
    found, _ = measured(mpirun, 2, AllGather(), flags, tmp_path / "found.json")
    assert [record["in_place"] for record in found["results"]] == [None, None]


@pytest.mark.parametrize("flags", [["-G", "3", "-m", "2"], ["-z", "1", "-d", "half", "--algo", "native,rings"]])
def test_memory_of_gpus_on_doubles(tmp_path: Path, flags: list[str]) -> None:
    path, here = tmp_path / "result.json", Path(__file__).parent
    command = [sys.executable, str(here / "perf_on_double.py"), "all_gather_perf", "--device", "cuda", "-J", str(path)]
    ended = subprocess.run(
        [*command, "-b", "64K", "-e", "64K", *TINY, *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment(), "PYTHONPATH": os.pathsep.join([str(REPOSITORY / "tools"), str(here), str(REPOSITORY)])},
    )
    assert ended.returncode == 0, ended.stderr
    written = json.loads(path.read_text())
    assert (written["transport"], written["device"], written["ranks_per_gpu"]) == ("nccl", "a double", 1)
    for record in written["results"]:
        assert set(record) == FIELDS | {"host_us", "copy_share"}
        assert record["wrong"] == 0
        assert record["time_us"]["median"] == pytest.approx(250 / (6 if "-G" in flags else 1))  # by the double's clock


def script_with(directory: Path, call: str) -> Path:
    """all_gather_perf with another `mpi4py`, which is the line `call`."""
    path = directory / "odd_perf.py"
    path.write_text(
        "import sys\nimport perf\nfrom all_gather_perf import AllGather\n\n"
        "class Odd(AllGather):\n"
        "    def mpi4py(self, comm, place):\n"
        "        def odd():\n"
        "            right()\n"
        f"            {call}\n"
        "        right = super().mpi4py(comm, place)\n"
        "        return odd\n\n"
        "perf.main(Odd(), 'odd')\n"
    )
    return path


def test_wrong_elements_are_counted_over_all_ranks_and_fail_the_run(mpirun: MpiRun, tmp_path: Path) -> None:
    script, path = script_with(tmp_path, "place.recv[-2:] ^= comm.rank"), tmp_path / "found.json"
    flags = ["-b", "1K", "-e", "1K", "--algo", "direct,mpi4py", "--json", path]
    ended = mpirun(3, [script, *TINY, *flags], env=environment())
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert "# Out of bounds values : 8 FAILED" in ended.stdout  # two on ranks 1 and 2, out of place and in place
    assert [record["wrong"] for record in json.loads(path.read_text())["results"]] == [0, 8]


def test_an_error_on_one_rank_ends_the_job(mpirun: MpiRun, tmp_path: Path) -> None:
    script = script_with(tmp_path, "assert comm.rank != 1, 'no luck'")
    ended = mpirun(3, [script, *TINY, "--algo", "mpi4py"], env=environment(), timeout=60)
    assert ended.returncode not in (0, 2)
    assert "rank 1 of 3 failed" in ended.stderr
    assert "no luck" in ended.stderr


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--topology", "full_mesh:5"], "has 5 ranks, but 2 take part"),
        (["--rings", "7"], "--algo rings: rings must be an integer from 1 to 1"),
        (["--json", "/nonexistent/found.json"], "--json must be"),
    ],
)
def test_what_is_impossible_is_said_once_before_anything_is_measured(
    mpirun: MpiRun, flags: list[str], told: str
) -> None:
    ended = mpirun(2, [REPOSITORY / "tools" / "all_gather_perf.py", *flags], env=environment())
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.count(told) == 1, ended.stderr


def test_ranks_that_are_alone_in_their_worlds_say_so() -> None:
    """What a launcher of another MPI does: it sets its variable, and MPI sees one rank."""
    here = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))}
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "tools" / "all_gather_perf.py"],
        env={**here, **environment(), "MV2_COMM_WORLD_SIZE": "4"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2
    assert "WARNING: 4 ranks were started" in ended.stderr
    assert ended.stdout == ""
