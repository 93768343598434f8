"""tools/show_plan.py: what it prints, writes and draws is what the plan is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import show_plan
import tasp_coll.verify
from plan_text import text_of
from plan_view import json_of, view_of
from tasp_coll import Link, Schedule, Topology, plan
from tasp_coll.hamilton import is_hamiltonian_cycle
from tasp_coll.simulate import predict

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
PLANS = [
    ("full_mesh:1", "allgather", "rings", None),
    ("full_mesh:2", "all_to_all", "direct", None),
    ("full_mesh:4", "allgather", "rings", None),
    ("full_mesh:4", "allgather", "rings", (4, 0, 7, 1)),
    ("full_mesh:4", "allgather", "rings", (0, 0, 0, 0)),
    ("full_mesh:5", "reduce_scatter", "direct", (1, 2, 3, 4, 5)),
    ("full_mesh:6", "allreduce", "rings", None),
    ("full_mesh:8", "reduce_scatter", "ring", None),
    ("nvswitch:4", "allreduce", "rings", (1, 0, 2, 3)),
    ("mi300x", "allgather", "direct", None),
    ("dgx_h100:2", "allgather", "direct", None),
    ("torus:3x3", "all_to_all", "direct", None),
    ("torus:2x4", "allreduce", "direct", None),
    ("torus:2x4", "allreduce", "ring", None),
    ("cluster:2x3", "allgather", "rings", None),
]


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """A file of a topology whose bounds differ by direction: rank 0 has little way out and a lot of way in."""
    rates = {(0, 1): 1, (1, 0): 4, (0, 2): 2, (2, 0): 4, (1, 2): 3, (2, 1): 3}
    path = tmp_path / "lopsided.json"
    Topology("lopsided", 3, (), tuple(Link(u, v, rate) for (u, v), rate in rates.items())).save(path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The text of a run that succeeds."""
    assert show_plan.main([str(word) for word in argv]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line of a run that leaves with status 2."""
    with pytest.raises(SystemExit) as exit_:
        show_plan.main([str(word) for word in argv])
    assert exit_.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("show_plan.py: error: ")
    assert line.count("\n") == 1
    return line


def rings_in(text: str) -> list[tuple[Fraction, tuple[int, ...]]]:
    """Weight and ranks of each ring, which must close."""
    found = []
    for weight, told in re.findall(r"^  ring +\d+ +(\S+) +(\d+(?: -> \d+)*)$", text, re.MULTILINE):
        *ranks, last = map(int, told.split(" -> "))
        assert last == ranks[0]
        found.append((Fraction(weight), tuple(ranks)))
    return found


def moves_in(text: str) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """(chunk, origin, peer) of each send and of each receive."""
    told = re.compile(r"(?:chunk|sum) (\d+) (?:of|for) (\d+) (to|from) (\d+)")
    sends: list[tuple[int, ...]] = []
    receives: list[tuple[int, ...]] = []
    for chunk, origin, way, peer in told.findall(text):
        (sends if way == "to" else receives).append((int(chunk), int(origin), int(peer)))
    return sends, receives


def walked(schedule: Schedule) -> list[dict[tuple[Any, Any], Fraction]]:
    """Per step the share of the largest shard on each link, transfer by transfer and hop by hop."""
    counts = schedule.counts or (1,) * schedule.ranks
    steps = []
    for step in schedule.steps:
        load: dict[tuple[Any, Any], Fraction] = {}
        for move in step:
            share = schedule.weights[move.chunk] * counts[move.origin] / max(*counts, 1)
            for link in schedule.topology.path(move.src, move.dst):
                load[link] = load.get(link, Fraction(0)) + share
        steps.append({link: share for link, share in load.items() if share})
    return steps


def check_loads(schedule: Schedule) -> None:
    """The view's loads and time against the walk."""
    steps = walked(schedule)
    view = view_of(schedule, shard_bytes=MIB)
    facts = json_of(view)["results"][0]
    found = {(e["from"], e["to"]): (Fraction(e["step_max"]), Fraction(e["total"])) for e in facts["loads"]}
    used = {link for step in steps for link in step}
    expected = {
        link: (max(step.get(link, Fraction(0)) for step in steps), sum(step.get(link, Fraction(0)) for step in steps))
        for link in used
    }
    assert found == expected
    assert facts["links"] == len(schedule.topology.links) == facts["idle_links"] + len(used)
    rate = schedule.topology.GBps
    busiest = max((float(total) / rate(*link) for link, (_, total) in expected.items()), default=0.0)
    assert facts["time_s"] >= busiest * MIB / 1e9 * (1 - 1e-9)
    assert facts["time_s"] == view.prediction.seconds == predict(schedule, MIB).seconds
    if facts["busiest"] is not None and facts["time_s"] and schedule.collective != "allreduce":
        assert facts["busiest"]["utilisation"] == pytest.approx(busiest * MIB / 1e9 / facts["time_s"])
    if view.bound is not None:
        assert view.prediction.seconds >= view.bound * (1 - 1e-9)


@pytest.mark.parametrize("argv", [("full_mesh:3",), ("full_mesh:4",), ("full_mesh:8", "--rings", 3), ("nvswitch:5",)])
def test_the_rings_printed_are_hamiltonian_cycles(capsys: pytest.CaptureFixture[str], argv: tuple[object, ...]) -> None:
    found = rings_in(shown(capsys, *argv))
    ranks = Topology.preset(str(argv[0])).ranks
    assert all(is_hamiltonian_cycle(ring, ranks) for _, ring in found)
    assert sum(weight for weight, _ in found) == 1
    schedule = plan(str(argv[0]), rings=int(str(argv[2])) if len(argv) > 1 else None)
    assert found == [(ring.weight, ring.ranks) for ring in schedule.rings]


@pytest.mark.parametrize("spec, collective, algorithm, counts", PLANS)
def test_loads_and_times_add_up(spec: str, collective: str, algorithm: str, counts: tuple[int, ...] | None) -> None:
    check_loads(plan(spec, collective, algorithm, counts=counts))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=6),
    st.sampled_from(["allgather", "reduce_scatter", "allreduce"]),
    st.sampled_from(["full_mesh", "nvswitch"]),
    st.sampled_from(["rings", "direct"]),
)
def test_loads_and_times_add_up_for_unequal_shards(counts: list[int], collective: str, kind: str, how: str) -> None:
    check_loads(plan(f"{kind}:{len(counts)}", collective, how, counts=counts))


@pytest.mark.parametrize("spec, collective, algorithm, counts", PLANS)
def test_the_moves_are_those_of_the_plan(
    spec: str, collective: str, algorithm: str, counts: tuple[int, ...] | None
) -> None:
    schedule = plan(spec, collective, algorithm, counts=counts)
    rank = schedule.ranks - 1
    view = view_of(schedule, rank)
    facts = json_of(view)["results"][0]
    keys = ("step", "peer", "origin", "chunk", "ring")
    for name, me, peer in (("sends", "src", "dst"), ("receives", "dst", "src")):
        expected = [
            (step, getattr(move, peer), move.origin, move.chunk, move.ring)
            for step, moves in enumerate(schedule.steps)
            for move in moves
            if getattr(move, me) == rank
        ]
        assert sorted(tuple(entry[key] for key in keys) for entry in facts[name]) == sorted(expected)
    sends, receives = moves_in(text_of(view, everything=True))
    assert sends == [(move.chunk, move.origin, move.peer) for move in view.sends]
    assert receives == [(move.chunk, move.origin, move.peer) for move in view.receives]


@pytest.mark.parametrize("spec, collective, algorithm, counts", PLANS)
def test_json_tells_the_plan(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    spec: str,
    collective: str,
    algorithm: str,
    counts: tuple[int, ...] | None,
) -> None:
    path = tmp_path / "plan.json"
    argv: list[object] = [spec, "--collective", collective, "--algorithm", algorithm, "--json", path]
    argv += ["--counts", ",".join(map(str, counts))] if counts else []
    shown(capsys, *argv)
    top = json.loads(path.read_text())
    schedule = plan(spec, collective, algorithm, counts=counts)
    assert (top["tool"], top["world_size"], top["topology"]) == ("show_plan", schedule.ranks, spec)
    (facts,) = top["results"]
    assert (facts["collective"], facts["algorithm"]) == (collective, algorithm)
    assert (facts["steps"], facts["chunks"]) == (len(schedule.steps), schedule.chunks)
    assert facts["counts"] == (None if counts is None else list(counts))
    rings = [(tuple(ring["ranks"]), Fraction(ring["weight"])) for ring in facts["rings"]]
    assert rings == [(ring.ranks, ring.weight) for ring in schedule.rings]
    assert facts["proof"]["method"] == "replay"
    assert facts["proof"]["seconds"] > 0


def test_the_matrix_is_that_of_the_loads(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "full_mesh:5", "--algorithm", "ring")
    head, *rows = text.split("blank: no link)\n")[1].split("\n\n")[0].splitlines()
    assert head.split() == list("01234")
    loads = {(link.source, link.target): link for link in view_of(plan("full_mesh:5", algorithm="ring")).loads.links}
    for u, row in enumerate(rows):
        name, *cells = row.split()
        assert int(name) == u
        expected = ["4" if (u, v) in loads else "-" for v in range(5) if v != u]
        assert cells == expected  # one ring carries all four other shards over each of its links
    assert f"{20 - 5} of 20 links" in text


def test_rings_fill_a_mesh_and_one_ring_does_not() -> None:
    every, one = (view_of(plan("full_mesh:7", algorithm=how)) for how in ("rings", "ring"))
    assert [every.ratio, one.ratio] == pytest.approx([1, 6])
    assert [every.idle, one.idle] == [0, 35]


def test_bounds_of_the_collectives(lopsided: Path) -> None:
    topology = Topology.from_file(lopsided)
    turned = Topology("turned", 3, (), tuple(Link(link.target, link.source, link.GBps) for link in topology.links))
    gather, scatter, both, exchange = (
        view_of(plan(topology, collective, "direct"), shard_bytes=MIB).bound
        for collective in ("allgather", "reduce_scatter", "allreduce", "all_to_all")
    )
    assert gather == topology.allgather_bound(MIB)
    assert scatter == turned.allgather_bound(MIB)
    assert gather != scatter
    assert both == pytest.approx(topology.allgather_bound(MIB) + turned.allgather_bound(MIB))
    assert exchange is None
    assert view_of(plan("full_mesh:3", counts=[5, 5, 5])).bound is not None
    assert view_of(plan("full_mesh:3", counts=[5, 5, 6])).bound is None


def test_times_follow_the_shard_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, "full_mesh:4", "--shard-bytes", "1.5G")
    assert "shards of 1.5 GiB" in text
    assert re.findall(r"(?:plan|cut bound)  +([\d.]+) s", text) == ["1.611", "1.611"]
    costly = shown(capsys, "full_mesh:4", "--shard-bytes", "1.5G", "--message-us", "1e4")
    assert "the links and 10000 us at each end of a message" in costly
    assert re.findall(r"(?:plan|cut bound)  +([\d.]+) s", costly)[0] > "1.611"


@pytest.mark.parametrize(
    "spec, collective, expected, best",
    [
        ("full_mesh:8", "allgather", {"ring": 7, "rings": 1, "direct": 1, "native": 7}, "rings"),
        ("nvswitch:8", "allreduce", {"ring": 1, "rings": 1, "direct": 1, "native": 1}, "ring"),
        ("cluster:2x4", "allgather", {"hierarchical": 1, "native": 7}, "hierarchical"),
    ],
)
def test_all_algorithms_are_predicted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spec: str, collective: str, expected: dict[str, int], best: str
) -> None:
    path = tmp_path / "plan.json"
    argv = (spec, "--algorithm", "direct", "--collective", collective, "--shard-bytes", "64M", "--json", path)
    table = shown(capsys, *argv).split("all algorithms")[1].splitlines()[2:]
    (facts,) = json.loads(path.read_text())["results"]
    told = {rival["algorithm"]: rival for rival in facts["rivals"]}
    for name, ratio in expected.items():
        assert told[name]["ratio"] == pytest.approx(ratio, rel=0.03)
        assert told[name]["time_s"] == pytest.approx(told[name]["ratio"] * facts["bound_s"])
        (line,) = [line for line in table if line.split()[:1] == [name]]
        assert f" {told[name]['ratio']:.3f}" in line
        assert line.endswith("<- auto") == (name == best)
    assert [name for name, rival in told.items() if rival["auto"]] == [best]


@pytest.mark.parametrize("argv", [("--counts", "4,0,7,1"), ("--collective", "all_to_all")])
def test_no_others_are_predicted_where_the_model_cannot(capsys: pytest.CaptureFixture[str], argv: tuple[str]) -> None:
    text = shown(capsys, "full_mesh:4", *argv)
    assert "busiest" in text
    assert "all algorithms" not in text


def test_many_ranks_are_elided_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    short = shown(capsys, "full_mesh:40")
    assert not rings_in(short)  # none is told whole
    assert len(short.splitlines()) < 70
    assert "35 more rings" in short
    assert "36 more steps" in short
    whole = shown(capsys, "full_mesh:40", "--all")
    assert len(rings_in(whole)) == 39
    assert len(moves_in(whole)[0]) == 39 * 39


def test_the_method_of_the_proof(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "proved by replay" in shown(capsys, "full_mesh:4")
    monkeypatch.setattr(tasp_coll.verify, "REPLAY_CELLS", 0)
    assert "proved by structure" in shown(capsys, "full_mesh:4")


def test_a_plan_that_fails_its_proof(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    topology = Topology.preset("full_mesh:3")
    broken = Schedule.from_steps(topology, "allgather", [[(0, 1, 0, 0, 0)]])
    monkeypatch.setattr(show_plan, "plan", lambda *args: broken)
    assert show_plan.main(["full_mesh:3"]) == 1
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"show_plan.py: the plan fails its proof: step 0, rank \d.*never receives.*\n", err)


@pytest.mark.parametrize(
    "argv, told",
    [
        (("nonsense",), "presets are: full_mesh:N, nvswitch:N"),
        (("full_mesh:x",), "full_mesh:x"),
        (("torus:4x4", "--rings", 31), "from 1 to 30"),
        (("full_mesh:4", "--rings", 7), "from 1 to 6"),
        (("full_mesh:4", "--rings", 1, "--algorithm", "direct"), "rings applies to"),
        (("full_mesh:4", "--collective", "all_to_all", "--algorithm", "rings"), "must be 'direct'"),
        (("full_mesh:4", "--rank", 4), "rank must be from 0 to 3, got 4"),
        (("full_mesh:4", "--rank=-1"), "got -1"),
        (("full_mesh:4", "--counts", "1,2"), "4 integers"),
        (("full_mesh:4", "--counts", "1,2,x,4"), "integers >= 0 with commas"),
        (("full_mesh:4", "--shard-bytes", "lots"), "number of bytes"),
        (("full_mesh:4", "--message-us", "-1"), "must be a number >= 0, got '-1'"),
        (("full_mesh:4", "--plot", "plan.doc"), ".png"),
        (("full_mesh:4", "--json", "/no/such/folder/x.json"), "No such file or directory: '/no/such/folder/"),
        (("full_mesh:4", "--colective", "allgather"), "--colective"),
        ((), "SPEC"),
    ],
)
def test_wrong_usage_is_told_in_a_line(capsys: pytest.CaptureFixture[str], argv: tuple[object, ...], told: str) -> None:
    assert told in refused(capsys, *argv)


def test_a_faulty_file_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "box.json"
    path.write_text('{"ranks": 2, "links": [{"from": 0, "to": 5, "GBps": 1}]}')
    line = refused(capsys, path)
    assert "box.json" in line
    assert "links[0]" in line


def test_a_topology_file(capsys: pytest.CaptureFixture[str], lopsided: Path) -> None:
    text = shown(capsys, lopsided, "--algorithm", "direct", "--rank", 2)
    assert "lopsided: 3 ranks, 6 links: 2 of 4 GB/s, 2 of 3 GB/s, 1 of 2 GB/s, 1 of 1 GB/s" in text
    assert "rank 2 step by step" in text


def test_help_explains_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        show_plan.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    top = json_of(view_of(plan("full_mesh:3")))
    missing = {key for key in (*top, *top["results"][0]) if not re.search(rf"\b{key}\b", text)}
    assert not missing
    for line in re.findall(r"^  show_plan.py (.*?)   ", text, re.MULTILINE):
        show_plan.parser().parse_args(line.split())


@pytest.mark.parametrize(
    "argv",
    [
        ("full_mesh:1",),
        ("full_mesh:4", "--collective", "allreduce"),
        ("full_mesh:70",),
        ("nvswitch:4",),
        ("dgx_h100:2", "--algorithm", "direct"),
        ("full_mesh:3", "--collective", "all_to_all"),
    ],
)
def test_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path, argv: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.svg"
    assert f"written: {path}" in shown(capsys, *argv, "--plot", path)
    drawn = path.read_text()
    assert "<svg" in drawn
    assert argv[0] in drawn  # matplotlib leaves each text as a comment beside its outline


def test_a_png(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    shown(capsys, "full_mesh:5", "--plot", path)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


def test_without_matplotlib(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "plan_picture", None)
    assert "pip install 'tasp-coll[plot]'" in refused(capsys, "full_mesh:3", "--plot", tmp_path / "plan.png")


@pytest.mark.parametrize("absent", [(), ("mpi4py", "matplotlib", "torch", "jax", "cupy")])
def test_as_a_command(absent: tuple[str, ...]) -> None:
    script = str(ROOT / "tools" / "show_plan.py")
    command = [sys.executable, script]
    if absent:
        without = f"import sys, runpy; sys.modules.update(dict.fromkeys({absent}))"
        start = f"sys.path[0] = {os.path.dirname(script)!r}; runpy.run_path({script!r}, run_name='__main__')"
        command = [sys.executable, "-c", f"{without}; {start}"]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.run(
        [*command, "full_mesh:4"], env=environment, capture_output=True, text=True, timeout=100, check=True
    )
    assert len(rings_in(run.stdout)) == 6
    assert not run.stderr
