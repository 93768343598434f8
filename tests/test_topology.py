"""Topologies: their checks, files, presets and routes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasp_coll.errors import ArgumentError, ArgumentTypeError, TopologyError
from tasp_coll.links import Link, MeshLinks, Node
from tasp_coll.presets import KNOWN_SPECS
from tasp_coll.topology import Topology

RING = (Link(0, 1, 1.0), Link(1, 2, 1.0), Link(2, 0, 1.0))
SPECS = [
    *(
        "full_mesh:1",
        "full_mesh:2",
        "full_mesh:5",
        "nvswitch:1",
        "nvswitch:6",
        "mi300x",
        "dgx_h100:1",
        "dgx_h100:3",
    ),
    *(
        "cluster:1x1",
        "cluster:1x4",
        "cluster:3x1",
        "cluster:2x4",
        "cluster:2x3:0.5",
        "hypercube:0",
        "hypercube:4",
    ),
    *("torus:1x1", "torus:1x2", "torus:2x2", "torus:1x3", "torus:2x3", "torus:3x5", "torus:4x4"),
    *("torus:1x1x1", "torus:2x2x2", "torus:1x3x1", "torus:3x2x4", "nvl72:1", "nvl72:2"),
]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Up to 6 ranks and 3 switches; a cycle through a random order of the nodes and any other links."""
    n = draw(st.integers(1, 6))
    switches = tuple(f"s{i}" for i in range(draw(st.integers(0, 3))))
    nodes: list[Node] = [*range(n), *switches]
    order = draw(st.permutations(nodes))
    arcs = set(zip(order, [*order[1:], order[0]], strict=True))
    arcs |= draw(st.sets(st.tuples(st.sampled_from(nodes), st.sampled_from(nodes)), max_size=25))
    rate = st.floats(1e-3, 1e4)
    return Topology(
        draw(st.text(max_size=5)),
        n,
        switches,
        tuple(Link(u, v, draw(rate), draw(st.sampled_from([0.0, 2.5]))) for u, v in arcs if u != v),
    )


# --- links


@given(st.integers(1, 9), st.data())
def test_mesh_links_are_the_sequence_of_all_links(n: int, data: st.DataObject) -> None:
    lazy = MeshLinks(n, 2.0, 0.5)
    built = tuple(Link(u, v, 2.0, 0.5) for u in range(n) for v in range(n) if u != v)
    assert lazy == built
    assert built == lazy
    assert (len(lazy), list(lazy), list(reversed(lazy))) == (len(built), list(built), list(reversed(built)))
    piece = data.draw(st.slices(len(built)))
    assert lazy[piece] == built[piece]
    for index in range(-len(built), len(built)):
        assert lazy[index] == built[index]
    for index in (len(built), -len(built) - 1):
        with pytest.raises(IndexError):
            lazy[index]


def test_mesh_links_differ_by_size_rate_and_latency() -> None:
    different = [MeshLinks(3, 1), MeshLinks(4, 1), MeshLinks(3, 2), MeshLinks(3, 1, 1)]
    assert all((a == b) == (a is b) for a in different for b in different)
    assert MeshLinks(3, 1) != "links"


def test_a_mesh_of_4098_ranks_costs_no_memory() -> None:
    tracemalloc.start()
    mesh = Topology.preset("full_mesh:4098")
    assert len(mesh.links) == 4098 * 4097
    assert mesh.links[-1] == Link(4097, 4096, 1.0)
    assert mesh.is_full_mesh
    assert not mesh.is_single_switch
    assert mesh.path(17, 4097) == ((17, 4097),)
    assert (mesh.GBps(0, 4097), mesh.GBps(0, 4098), mesh.GBps(3, 3)) == (1.0, 0.0, 0.0)
    assert mesh.allgather_bound(5e8) == 0.5
    assert mesh.fingerprint == Topology.resolve(None, 4098).fingerprint
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@given(topologies(), st.randoms())
def test_order_of_links_and_kinds_of_numbers_do_not_matter(topology: Topology, random: Any) -> None:
    def wide(node: Node) -> Any:
        return node if isinstance(node, str) else np.int64(node)

    shuffled = [
        Link(wide(link.source), wide(link.target), np.float64(link.GBps), -0.0) if link.latency_us == 0 else link
        for link in topology.links
    ]
    random.shuffle(shuffled)
    again = Topology(topology.name, topology.ranks, topology.switches, shuffled)
    assert again == topology
    assert hash(again) == hash(topology)
    assert again.fingerprint == topology.fingerprint
    for link in again.links:
        assert {type(link.source), type(link.target)} <= {int, str}
        assert type(link.GBps) is type(link.latency_us) is float


@given(topologies())
def test_rates_are_those_of_the_links(topology: Topology) -> None:
    rates = {(link.source, link.target): link.GBps for link in topology.links}
    nodes: list[Node] = [*range(topology.ranks + 1), *topology.switches, "nobody"]
    assert all(topology.GBps(u, v) == rates.get((u, v), 0.0) for u in nodes for v in nodes)


# --- checks


@pytest.mark.parametrize(
    "change, named",
    [
        ({"name": 3}, "name"),
        ({"ranks": 0}, "ranks must be an integer >= 1, got 0"),
        ({"ranks": True}, "ranks"),
        ({"ranks": 3.0}, "ranks"),
        ({"switches": "s0"}, "switches"),
        ({"switches": ("s0", "")}, r"switches\[1\]"),
        ({"switches": ("s0", 1)}, r"switches\[1\]"),
        ({"switches": ("s0", "s1", "s0")}, r"switches\[2\].*'s0'"),
        ({"links": (*RING, Link(0, 3, 1.0))}, r"links\[3\]\.target .*3"),
        ({"links": (*RING, Link(-1, 0, 1.0))}, r"links\[3\]\.source .*-1"),
        ({"links": (*RING, Link("s0", 0, 1.0))}, r"links\[3\]\.source .*'s0'"),
        ({"links": (*RING, Link(True, 0, 1.0))}, r"links\[3\]\.source .*True"),
        ({"links": (*RING, Link(1, 1, 1.0))}, r"links\[3\] .*1 to itself"),
        ({"links": (*RING, Link(1, 2, 5.0))}, r"links\[3\] .*1 to 2.*added up"),
        ({"links": (*RING, Link(1, 0, 0.0))}, r"links\[3\]\.GBps .*> 0, got 0.0"),
        ({"links": (*RING, Link(1, 0, -4))}, r"links\[3\]\.GBps .*-4"),
        ({"links": (*RING, Link(1, 0, float("inf")))}, r"links\[3\]\.GBps .*inf"),
        ({"links": (*RING, Link(1, 0, 10**400))}, r"links\[3\]\.GBps"),
        ({"links": (*RING, Link(1, 0, "1"))}, r"links\[3\]\.GBps must be a number, got '1'"),  # type: ignore[arg-type]
        ({"links": (*RING, Link(1, 0, True))}, r"links\[3\]\.GBps must be a number, got True"),
        ({"links": (*RING, Link(1, 0, 1.0, -1.0))}, r"links\[3\]\.latency_us .*-1"),
        ({"links": (*RING, Link(1, 0, 1.0, float("nan")))}, r"links\[3\]\.latency_us .*nan"),
        ({"links": (*RING, (1, 0, 1.0))}, r"links\[3\] must be a Link"),
        ({"links": RING[:2]}, "none lead from 1 to 0"),
        ({"links": (Link(1, 0, 1.0), Link(1, 2, 1.0), Link(2, 1, 1.0))}, "none lead from 0 to 1"),
        ({"links": ()}, "none lead from 0 to 1"),
        ({"links": MeshLinks(4, 1.0)}, "3 ranks.*MeshLinks of 4"),
    ],
)
def test_a_bad_entry_is_named(change: dict[str, Any], named: str) -> None:
    good = {"name": "ring", "ranks": 3, "switches": (), "links": RING}
    with pytest.raises(TopologyError, match=named):
        Topology(**{**good, **change})


@pytest.mark.parametrize("arguments", [(0, 1.0), (True, 1.0), (3, 0.0), (3, "1"), (3, 1.0, -1.0)])
def test_bad_mesh_links(arguments: tuple[Any, ...]) -> None:
    with pytest.raises(TopologyError, match="MeshLinks"):
        MeshLinks(*arguments)


# --- kinds, fingerprint, bound


def test_kinds() -> None:
    meshes = {spec for spec in SPECS if Topology.preset(spec).is_full_mesh}
    single = {spec for spec in SPECS if Topology.preset(spec).is_single_switch}
    assert single == {"nvswitch:1", "nvswitch:6", "dgx_h100:1", "cluster:3x1", "nvl72:1"}
    ones = {"full_mesh:1", "cluster:1x1", "hypercube:0", "torus:1x1", "torus:1x1x1"}
    small = {"torus:1x2", "torus:1x3", "torus:1x3x1"}
    assert meshes == {*ones, *small, "full_mesh:2", "full_mesh:5", "mi300x", "cluster:1x4"}


def test_one_odd_link_makes_it_irregular() -> None:
    mesh, switch = Topology.preset("full_mesh:4"), Topology.preset("nvswitch:4")
    slow = Link(0, 1, 0.5)
    assert not Topology("slow", 4, (), (slow, *mesh.links[1:])).is_full_mesh
    assert not Topology("idle switch", 4, ("s0",), mesh.links).is_full_mesh
    assert not Topology("shortcut", 4, switch.switches, (*switch.links, slow)).is_single_switch
    first = Link(switch.links[0].source, switch.links[0].target, 1.0)
    assert not Topology("slow port", 4, switch.switches, (first, *switch.links[1:])).is_single_switch
    assert Topology("late", 4, (), (Link(0, 1, 1.0, 9.0), *mesh.links[1:])).is_full_mesh


def test_fingerprint_tells_what_differs_and_not_the_name() -> None:
    mesh = Topology.preset("full_mesh:4")
    same = [mesh, Topology("by hand", 4, (), tuple(mesh.links)), Topology("lazy", 4, (), MeshLinks(4, 1))]
    different = [
        mesh,
        mesh.without_link(0, 1),
        Topology.preset("full_mesh:5"),
        Topology("switch", 4, ("s0",), mesh.links),
        Topology("fast", 4, (), MeshLinks(4, 2.0)),
        Topology("late", 4, (), MeshLinks(4, 1.0, 1.0)),
        Topology("one late", 4, (), (Link(0, 1, 1.0, 1.0), *mesh.links[1:])),
    ]
    assert len({topology.fingerprint for topology in same}) == 1
    assert len({topology.fingerprint for topology in different}) == len(different)
    assert len(mesh.fingerprint) == 32


def test_fingerprint_and_routes_are_the_same_in_every_process() -> None:
    code = (
        "from tasp_coll.topology import Topology\n"
        "for spec in ('dgx_h100:2', 'torus:3x5'):\n"
        "    t = Topology.preset(spec)\n"
        "    print(t.fingerprint, [t.path(a, b) for a in range(t.ranks) for b in range(t.ranks)])"
    )
    root = str(Path(__file__).parents[1])
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    "shard_bytes, error",
    [
        (-1, ArgumentError),
        (float("nan"), ArgumentError),
        (10**400, ArgumentError),
        ("8", ArgumentTypeError),
        (True, ArgumentTypeError),
    ],
)
def test_bound_wants_a_number_of_bytes(shard_bytes: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="shard_bytes"):
        Topology.preset("full_mesh:2").allgather_bound(shard_bytes)


def test_bound_is_in_seconds() -> None:
    assert Topology.preset("dgx_h100:2").allgather_bound(100_000_000) == pytest.approx(0.003)
    assert Topology.preset("full_mesh:1").allgather_bound(1e9) == 0.0


# --- routes


def distances(topology: Topology, src: int, through_ranks: bool) -> dict[Node, int]:
    """Hops from `src` by relaxing every link until nothing changes."""
    hops: dict[Node, int] = {src: 0}
    changed = True
    while changed:
        changed = False
        for link in topology.links:
            forwards = through_ranks or link.source == src or isinstance(link.source, str)
            if forwards and hops.get(link.source, 99) + 1 < hops.get(link.target, 99):
                hops[link.target] = hops[link.source] + 1
                changed = True
    return hops


@given(topologies())
def test_routes_are_shortest_and_spare_other_ranks(topology: Topology) -> None:
    for src in range(topology.ranks):
        by_switch, by_any = distances(topology, src, False), distances(topology, src, True)
        for dst in range(topology.ranks):
            path = topology.path(src, dst)
            assert path == topology.path(src, dst)
            assert all(topology.GBps(u, v) > 0 for u, v in path)
            assert [u for u, _ in path] + [dst] == [src] + [v for _, v in path]
            assert len(path) == by_switch.get(dst, by_any[dst])
            if dst in by_switch:
                assert all(isinstance(u, str) for u, _ in path[1:])


@pytest.mark.parametrize("spec, load", [("hypercube:3", 4), ("hypercube:5", 16), ("torus:4x4", 8), ("torus:8x8", 64)])
def test_direct_exchange_loads_regular_graphs_evenly(spec: str, load: int) -> None:
    topology = Topology.preset(spec)
    ranks = range(topology.ranks)
    crossings = Counter(hop for src in ranks for dst in ranks for hop in topology.path(src, dst))
    assert set(crossings.values()) == {load}
    assert len(crossings) == len(topology.links)


def test_routes_of_two_nodes() -> None:
    dgx = Topology.preset("dgx_h100:2")
    assert dgx.path(1, 6) == ((1, "nvswitch0"), ("nvswitch0", 6))
    assert dgx.path(1, 9) == ((1, "fabric"), ("fabric", 9))
    assert Topology.preset("nvswitch:3").path(2, 0) == ((2, "nvswitch0"), ("nvswitch0", 0))


@pytest.mark.parametrize("src, dst, named", [(8, 0, "src"), (0, -1, "dst"), (0, "fabric", "dst"), (True, 0, "src")])
def test_routes_run_between_ranks(src: Any, dst: Any, named: str) -> None:
    for spec in ("full_mesh:8", "nvswitch:8", "torus:2x4"):
        with pytest.raises(ArgumentError, match=named):
            Topology.preset(spec).path(src, dst)


# --- a dead link


def test_without_link_takes_both_directions_and_no_more() -> None:
    mesh = Topology.preset("full_mesh:8")
    dead = mesh.without_link(5, 2)
    assert set(mesh.links) - set(dead.links) == {Link(2, 5, 1.0), Link(5, 2, 1.0)}
    assert not dead.is_full_mesh
    assert len(dead.path(5, 2)) == 2
    assert "5" in dead.name
    assert dead != mesh
    cluster = Topology.preset("cluster:2x4")
    assert cluster.without_link("fabric", 3).GBps(3, "fabric") == 0.0


def test_without_link_takes_a_one_way_link() -> None:
    links = (*RING, Link(1, 0, 1.0), Link(2, 1, 1.0))  # 0 <-> 1 <-> 2, and 2 -> 0
    for a, b in ((0, 2), (2, 0)):
        assert set(Topology("both", 3, (), links).without_link(a, b).links) == set(links) - {Link(2, 0, 1.0)}


@pytest.mark.parametrize("a, b", [(0, 5), (3, 3), (0, 99), ("fabric", "nvswitch0")])
def test_without_link_wants_a_link(a: Node, b: Node) -> None:
    with pytest.raises(TopologyError, match=rf"no link between {a!r} and {b!r}"):
        Topology.preset("torus:4x4").without_link(a, b)


def test_without_link_keeps_ranks_connected() -> None:
    with pytest.raises(TopologyError, match="from 0 to 3"):
        Topology.preset("nvswitch:4").without_link(3, "nvswitch0")


# --- files


@given(topologies())
def test_files_bring_back_what_was_saved(tmp_path_factory: pytest.TempPathFactory, topology: Topology) -> None:
    path = tmp_path_factory.mktemp("saved") / "topology.json"
    topology.save(path)
    again = Topology.from_file(path)
    assert again == topology
    assert again.fingerprint == topology.fingerprint
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("spec", SPECS)
def test_presets_survive_files_and_pickles(spec: str, tmp_path: Path) -> None:
    preset = Topology.preset(spec)
    preset.save(str(tmp_path / "preset.json"))
    for again in (Topology.from_file(str(tmp_path / "preset.json")), pickle.loads(pickle.dumps(preset))):
        assert again == preset
        assert again.fingerprint == preset.fingerprint
        assert again.is_full_mesh == preset.is_full_mesh


def test_a_save_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        Topology.preset("mi300x").save(tmp_path / "taken")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken"]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "fabric.json"
    path.write_text(text)
    return path


def test_a_short_file(tmp_path: Path) -> None:
    link = '{"from": 0, "to": 1, "GBps": 64, "duplex": true}'
    topology = Topology.from_file(written(tmp_path, f'{{"ranks": 2, "links": [{link}]}}'))
    assert (topology.name, topology.ranks, topology.switches) == ("fabric", 2, ())
    assert topology.links == (Link(0, 1, 64.0), Link(1, 0, 64.0))


def good_file() -> dict[str, Any]:
    link = {"GBps": 64, "latency_us": 1, "duplex": True}
    return {
        "name": "x",
        "ranks": 2,
        "switches": ["s0"],
        "links": [{"from": r, "to": "s0", **link} for r in (0, 1)],
    }


def put(*place: Any) -> Callable[[dict[str, Any]], None]:
    """Puts the last of `place` where the others lead."""
    *way, last, value = place

    def change(file: Any) -> None:
        for key in way:
            file = file[key]
        file[last] = value

    return change


def drop(*place: Any) -> Callable[[dict[str, Any]], None]:
    *way, last = place

    def change(file: Any) -> None:
        for key in way:
            file = file[key]
        del file[last]

    return change


BAD_FILES: Sequence[tuple[Callable[[dict[str, Any]], None], str]] = [
    (drop("ranks"), "'ranks'"),
    (drop("links"), "'links'"),
    (drop("links", 1, "from"), r"links\[1\] .*'from'"),
    (drop("links", 1, "to"), r"links\[1\] .*'to'"),
    (drop("links", 1, "GBps"), r"links\[1\] .*'GBps'"),
    (put("speed", 1), "unknown key 'speed'"),
    (put("links", 1, "gbps", 1), r"links\[1\] .*unknown key 'gbps'"),
    (put("name", None), "name"),
    (put("ranks", -2), "ranks"),
    (put("ranks", "2"), "ranks"),
    (put("ranks", 2.5), "ranks"),
    (put("ranks", 3), "from 0 to 2"),
    (put("switches", {"s0": 1}), "switches"),
    (put("switches", 0, ["s0"]), r"switches\[0\]"),
    (put("links", {}), "links must be a list"),
    (put("links", 1, 7), r"links\[1\] must be an object"),
    (put("links", 1, "from", 2), r"links\[1\]\.from .*got 2"),
    (put("links", 1, "to", "s1"), r"links\[1\]\.to .*'s1'"),
    (put("links", 1, "to", [0]), r"links\[1\]\.to"),
    (put("links", 1, "to", 1), r"links\[1\] .*itself"),
    (put("links", 1, "from", 0), r"links\[1\] .*added up"),
    (put("links", 1, "GBps", -64), r"links\[1\]\.GBps .*-64"),
    (put("links", 1, "GBps", False), r"links\[1\]\.GBps .*False"),
    (put("links", 1, "GBps", "fast"), r"links\[1\]\.GBps .*'fast'"),
    (put("links", 1, "GBps", float("nan")), r"links\[1\]\.GBps .*nan"),
    (put("links", 1, "latency_us", None), r"links\[1\]\.latency_us"),
    (put("links", 1, "latency_us", -1), r"links\[1\]\.latency_us"),
    (put("links", 1, "duplex", 1), r"links\[1\]\.duplex"),
]


@pytest.mark.parametrize("change, named", BAD_FILES)
def test_a_bad_file_and_its_entry_are_named(
    change: Callable[[dict[str, Any]], None], named: str, tmp_path: Path
) -> None:
    file = good_file()
    path = written(tmp_path, json.dumps(file))
    assert Topology.from_file(path).is_single_switch
    change(file)
    with pytest.raises(TopologyError, match=rf"fabric\.json.*{named}"):
        Topology.from_file(written(tmp_path, json.dumps(file)))


@pytest.mark.parametrize("text", ["", "{", "[]", "8", '{"ranks": 1, "links": [], "ranks": 1}', "[" * 100_000])
def test_a_file_that_is_no_topology_is_named(text: str, tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"fabric\.json"):
        Topology.from_file(written(tmp_path, text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("absent", "binary", "."):
        with pytest.raises(TopologyError, match="topology file"):
            Topology.from_file(tmp_path / name)


# --- what callers pass


def test_resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TASP_COLL_TOPOLOGY", raising=False)
    torus = Topology.preset("torus:2x4")
    torus.save(tmp_path / "torus.json")
    for value in (torus, "torus:2x4", tmp_path / "torus.json", str(tmp_path / "torus.json")):
        assert Topology.resolve(value, 8) == torus
        with pytest.raises(TopologyError, match=r"8 ranks.* 9 "):
            Topology.resolve(value, 9)
    assert Topology.resolve(None, 5) == Topology.preset("full_mesh:5")


def test_resolve_reads_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Topology.preset("torus:2x4").save(tmp_path / "torus.json")
    for value in ("torus:2x4", str(tmp_path / "torus.json")):
        monkeypatch.setenv("TASP_COLL_TOPOLOGY", value)
        assert Topology.resolve(None, 8).name == "torus:2x4"
        assert Topology.resolve("full_mesh:3", 3).name == "full_mesh:3"
        with pytest.raises(TopologyError, match=r"TASP_COLL_TOPOLOGY.*8 ranks.* 9 "):
            Topology.resolve(None, 9)
    monkeypatch.setenv("TASP_COLL_TOPOLOGY", "")
    assert Topology.resolve(None, 9).name == "full_mesh:9"


def test_resolve_names_what_it_does_not_know(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"(?s)'full_mash:8'.*hypercube:D"):
        Topology.resolve("full_mash:8", 8)
    with pytest.raises(TopologyError, match=r"(?s)'torus:8'.*torus:AxB"):
        Topology.resolve("torus:8", 8)
    with pytest.raises(TopologyError, match="absent"):
        Topology.resolve(tmp_path / "absent", 8)
    with pytest.raises(ArgumentTypeError, match=r"topology .*8"):
        Topology.resolve(8, 8)  # type: ignore[arg-type]


# --- presets


@pytest.mark.parametrize("spec", SPECS)
def test_presets_keep_their_names_and_go_both_ways(spec: str) -> None:
    preset = Topology.preset(spec)
    assert preset.name == spec
    assert all(preset.GBps(link.target, link.source) == link.GBps for link in preset.links)


@pytest.mark.parametrize(
    "spec, ranks, degrees",
    [
        ("mi300x", 8, {7}),
        ("nvswitch:6", 6, {1}),
        ("dgx_h100:3", 24, {2}),
        ("cluster:2x4", 8, {4}),
        ("cluster:3x1", 3, {1}),
        ("torus:3x5", 15, {4}),
        ("torus:2x4", 8, {3}),
        ("torus:2x2", 4, {2}),
        ("torus:1x5", 5, {2}),
        ("torus:3x4x5", 60, {6}),
        ("torus:2x3x4", 24, {5}),
        ("torus:1x2x5", 10, {3}),
        ("nvl72:1", 72, {1}),
        ("nvl72:3", 216, {2}),
        ("hypercube:4", 16, {4}),
    ],
)
def test_every_rank_has_the_links_it_should(spec: str, ranks: int, degrees: set[int]) -> None:
    preset = Topology.preset(spec)
    assert preset.ranks == ranks
    out = Counter(link.source for link in preset.links)
    assert {out[rank] for rank in range(ranks)} == degrees


@pytest.mark.parametrize("spec", ["torus:3x5", "nvl72:2", "torus:3x2x4"])
def test_paths_do_not_depend_on_what_was_asked_before(spec: str) -> None:
    near, far = Topology.preset(spec), Topology.preset(spec)
    ranks = range(1, near.ranks)
    assert [near.path(0, dst) for dst in ranks] == [far.path(0, dst) for dst in reversed(ranks)][::-1]
    assert near.path(5, near.ranks - 1) == Topology.preset(spec).path(5, near.ranks - 1)


def test_rates_of_nodes_and_nics() -> None:
    dgx, cluster = Topology.preset("dgx_h100:2"), Topology.preset("cluster:2x4:4.5")
    assert dgx.GBps(9, "nvswitch1") == 9 * dgx.GBps("fabric", 9) == 450.0
    assert dgx.GBps(9, "nvswitch0") == 0.0
    assert cluster.GBps(4, 7) == 4.5 * cluster.GBps(4, "fabric")
    assert cluster.GBps(3, 4) == 0.0
    assert Topology.preset("cluster:2x4").fingerprint == Topology.preset("cluster:2x4:9").fingerprint
    assert Topology.preset("mi300x").GBps(0, 7) == 64.0
    nvl = Topology.preset("nvl72:2")
    assert nvl.GBps(73, "nvswitch1") == 18 * nvl.GBps("rail1", 73) == 900.0
    assert nvl.GBps(73, "rail0") == 0.0
    assert nvl.path(1, 73) == ((1, "rail1"), ("rail1", 73))


def test_tori_are_numbered_row_by_row() -> None:
    torus = Topology.preset("torus:3x4x5")
    ends = {link.target for link in torus.links if link.source == 0}
    assert ends == {1, 4, 5, 15, 20, 40}
    assert Topology.preset("torus:2x2x2").fingerprint == Topology.preset("hypercube:3").fingerprint
    assert Topology.preset("torus:1x3x5").fingerprint == Topology.preset("torus:3x5").fingerprint


def test_known_specs_name_the_forms_that_work() -> None:
    small = {"N": "3", "U": "2", "M": "2", "[:R]": ":2.5", "A": "2", "B": "3", "[xC]": "x2", "D": "2"}
    for line in KNOWN_SPECS.splitlines():
        name, colon, sizes = line.split()[0].partition(":")
        for letter, number in small.items():
            sizes = sizes.replace(letter, number)
        assert Topology.preset(name + colon + sizes).ranks > 1


@pytest.mark.parametrize(
    "spec",
    [
        *(
            "",
            "mesh:8",
            "full_mesh",
            "full_mesh:",
            "full_mesh:0",
            "full_mesh:-1",
            "full_mesh:1.5",
            "full_mesh:8 ",
        ),
        *(
            "full_mesh:1e3",
            "full_mesh:1234567",
            "FULL_MESH:8",
            "mi300x:8",
            "dgx_h100:0",
            "cluster:2",
            "cluster:0x4",
        ),
        *(
            "cluster:2x4:",
            "cluster:2x4:0",
            "cluster:2x4:0.0",
            "cluster:2x4:-1",
            "cluster:2x4:nan",
            "cluster:2x4x2",
        ),
        *(
            "torus:4",
            "torus:4x0",
            "torus:2x2x0",
            "torus:2x2x2x2",
            "nvl72",
            "nvl72:0",
            "hypercube:17",
            "hypercube:-1",
            "full_mesh:\u0663",
            "full_mesh:8\n",
        ),
    ],
)
def test_bad_specs_are_answered_with_the_forms(spec: str) -> None:
    with pytest.raises(TopologyError) as caught:
        Topology.preset(spec)
    assert repr(spec) in str(caught.value)
    assert KNOWN_SPECS in str(caught.value)


def test_a_spec_is_a_string() -> None:
    with pytest.raises(ArgumentTypeError, match="spec must be a string"):
        Topology.preset(8)  # type: ignore[arg-type]
