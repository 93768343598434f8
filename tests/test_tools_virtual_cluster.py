"""tools/virtual_cluster.py: what is wired is the topology, what runs on it runs, and nothing is left of it."""

from __future__ import annotations

import ipaddress
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import launch
import model_check
import vcluster_build
import vcluster_job
import vcluster_registry
import vcluster_room
import virtual_cluster
from launch import REPOSITORY
from model_check_cases import CheckCase
from tasp_coll import Link, Topology
from tasp_coll.links import Node
from tasp_coll.nodes import nodes_of
from vcluster_conditions import Condition, impose
from vcluster_options import EXAMPLES, FAILED, parse
from vcluster_wiring import Settings, Wiring

TOOL = REPOSITORY / "tools" / "virtual_cluster.py"
PRESETS = ("full_mesh:5", "nvswitch:4", "dgx_h100:2", "cluster:2x3", "torus:3x4", "hypercube:3")


def duplex(*pairs: tuple[Node, Node, float]) -> tuple[Link, ...]:
    return tuple(Link(*ends, rate) for a, b, rate in pairs for ends in ((a, b), (b, a)))


# Two spines between two leaves: a loop, in which bridges would not do.
LEAVES = Topology(
    "leaves",
    4,
    ("leaf0", "leaf1", "spine0", "spine1"),
    duplex(
        *((rank, f"leaf{rank // 2}", 4) for rank in range(4)),
        *((f"leaf{a}", f"spine{b}", 2) for a in (0, 1) for b in (0, 1)),
    ),
)
ONE_WAY = Topology("one way", 4, (), tuple(Link(rank, (rank + 1) % 4, 1) for rank in range(4)))
MIXED = Topology(
    "mixed",
    5,
    ("; rm -rf $HOME",),
    duplex((0, "; rm -rf $HOME", 2), (1, "; rm -rf $HOME", 2), (1, 2, 1), (2, 3, 4), (3, 4, 1), (4, 2, 3)),
)
IRREGULAR = (LEAVES, ONE_WAY, MIXED)


def wired(topology: Topology | str, mbit: float = 100) -> Wiring:
    topology = Topology.preset(topology) if isinstance(topology, str) else topology
    return Wiring(topology, Settings(mbit, Settings.suited_mtu(topology, mbit)))


# --- wiring


class Net:
    """A network that obeys the lines given to ip and bridge, read as text: an independent reading of the wiring."""

    def __init__(self, wiring: Wiring) -> None:
        self.wiring = wiring
        self.cable: dict[tuple[str, str], tuple[str, str]] = {}
        self.owner: dict[str, tuple[str, str]] = {}  # MAC -> namespace, device
        for line in wiring.plugging():
            ends = re.findall(r"name (\S+) address (\S+) mtu \d+ netns (\S+)", line)
            (a, mac_a, in_a), (b, mac_b, in_b) = ends
            self.cable[in_a, a], self.cable[in_b, b] = (in_b, b), (in_a, a)
            self.owner[mac_a], self.owner[mac_b] = (in_a, a), (in_b, b)
        spaces = {wiring.namespace(node): node for node in wiring.nodes}
        self.spaces = spaces
        self.lines = {space: "\n".join(wiring.interfaces(node)) for space, node in spaces.items()}
        self.behind = {
            space: dict(re.findall(r"fdb add (\S+) dev (\S+)", "\n".join(wiring.stations(node))))
            for space, node in spaces.items()
            if isinstance(node, str)
        }

    def step(self, space: str, src: str, dst: str) -> tuple[str, str]:
        """Device by which a packet leaves a namespace, and the MAC that it goes to."""
        lines = self.lines[space]
        rule = re.search(rf"^rule add pref 100 from {re.escape(src)} lookup (\d+)$", lines, re.M)
        table = f"table {rule[1]}" if rule else f"src {re.escape(src)}"
        routes = re.findall(rf"^route add {re.escape(dst)}/32 via (\S+) dev (\S+) onlink {table}$", lines, re.M)
        ((via, device),) = routes
        (mac,) = re.findall(rf"^neigh add {re.escape(via)} lladdr (\S+) dev {device}$", lines, re.M)
        return device, mac

    def way(self, src: int, dst: int) -> tuple[tuple[Node, Node], ...]:
        """Links that a packet crosses from one rank to another."""
        addresses = self.wiring.address(src), self.wiring.address(dst)
        space, crossed = self.wiring.namespace(src), []
        while space != self.wiring.namespace(dst):
            device, mac = self.step(space, *addresses)
            there, port = self.cable[space, device]
            crossed.append((self.spaces[space], self.spaces[there]))
            if mac in self.behind.get(there, ()) and self.owner[mac] != (there, port):  # a bridge
                space, device = there, self.behind[there][mac]
                there, port = self.cable[space, device]
                crossed.append((self.spaces[space], self.spaces[there]))
            assert self.owner[mac] == (there, port)
            space = there
            assert len(crossed) < 100
        return tuple(crossed)


def check_ways(topology: Topology) -> None:
    net = Net(wired(topology))
    for src in range(topology.ranks):
        for dst in range(topology.ranks):
            assert net.way(src, dst) == topology.path(src, dst)


@pytest.mark.parametrize("spec", PRESETS)
def test_packets_take_the_topologys_path(spec: str) -> None:
    check_ways(Topology.preset(spec))


@pytest.mark.parametrize("topology", IRREGULAR, ids=lambda topology: topology.name)
def test_packets_take_the_topologys_path_where_it_is_irregular(topology: Topology) -> None:
    check_ways(topology)


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    ranks = draw(st.integers(2, 6))
    switches = tuple(f"s{i}" for i in range(draw(st.integers(0, 3))))
    nodes = (*range(ranks), *switches)
    ends = [(a, b) for a in nodes for b in nodes if a != b]
    chosen = draw(st.lists(st.sampled_from(ends), unique=True, min_size=ranks))
    ring = [(rank, (rank + 1) % ranks) for rank in range(ranks)]
    return Topology(
        "any", ranks, switches, tuple(Link(a, b, draw(st.sampled_from((1, 2, 9)))) for a, b in {*chosen, *ring})
    )


@given(topologies())
@settings(max_examples=60)
def test_packets_take_the_topologys_path_on_any_topology(topology: Topology) -> None:
    check_ways(topology)


@pytest.mark.parametrize("spec", PRESETS)
def test_every_link_is_shaped_to_its_share(spec: str) -> None:
    wiring = wired(spec, 90)
    fastest = max(link.GBps for link in wiring.topology.links)
    for link in wiring.topology.links:
        (line,) = [line for line in wiring.shapers(link.source) if f"dev {wiring.namespace(link.target)} " in line]
        rate, burst = re.findall(r"tbf rate (\d+)bit burst (\d+) ", line)[0]
        assert int(rate) == round(90e6 * link.GBps / fastest)
        assert int(burst) >= 2 * wiring.settings.mtu


def test_addresses_and_names_are_distinct_and_short() -> None:
    wiring = wired("full_mesh:300")
    addresses = [ipaddress.ip_address(wiring.address(rank)) for rank in range(300)]
    assert len(set(addresses)) == 300
    assert all(address in ipaddress.ip_network("10.0.0.0/8") for address in addresses)
    assert all(str(address).rpartition(".")[2] != "0" or int(address) & 255 == 0 for address in addresses)
    ports = [port for cable in wired("full_mesh:30").cables for port in cable]
    assert len({port.mac for port in ports}) == len(ports) == 30 * 29
    assert max(len(wiring.namespace(rank)) for rank in range(300)) <= 15, "a device's name"


def test_no_name_of_the_topology_reaches_a_command() -> None:
    wiring = wired(MIXED)
    lines = [*wiring.namespaces(), *wiring.plugging()]
    for node in wiring.nodes:
        lines += [*wiring.interfaces(node), *wiring.shapers(node)]
    lines += wiring.stations(MIXED.switches[0])
    assert all(re.fullmatch(r"[a-z0-9 :./_-]+", line) for line in lines)


def test_regular_topologies_stay_regular() -> None:
    def delivered(spec: str) -> Topology:
        wiring = wired(spec)
        return wiring.delivered({link.GBps: 0.957 * link.GBps for link in wiring.topology.links})

    assert delivered("full_mesh:6").is_full_mesh
    assert delivered("nvswitch:4").is_single_switch
    nodes = nodes_of(delivered("cluster:2x4"))
    assert nodes is not None
    assert (nodes.count, nodes.size) == (2, 4)
    assert nodes.inside_GBps / nodes.nic_GBps == pytest.approx(9)


@pytest.mark.parametrize("topology", [*map(Topology.preset, PRESETS), *IRREGULAR], ids=lambda topology: topology.name)
def test_what_is_measured_of_a_rate_has_no_slower_link_on_its_way(topology: Topology) -> None:
    samples = vcluster_build._samples(topology)
    for GBps, pairs in samples.items():
        assert min(topology.GBps(u, v) for src, dst in pairs for u, v in topology.path(src, dst)) == GBps
        assert len({rank for pair in pairs for rank in pair}) == 2 * len(pairs), "no host is measured twice at a time"
    assert samples


# --- the command line


def lines_of_help() -> list[str]:
    found = [line.strip().replace("%%", "%") for line in EXAMPLES.splitlines() if line.startswith("  %(prog)s ")]
    return [re.split(r" {3,}", line)[0] for line in found]


@pytest.mark.parametrize("line", lines_of_help())
def test_examples_of_the_help_are_right(line: str) -> None:
    asked, command = parse(shlex.split(line)[1:])
    assert asked.action in virtual_cluster.ACTIONS
    assert bool(command) == (asked.action in ("run", "exec"))


@pytest.mark.parametrize(
    "line, told",
    [
        ("run --topology full_mesh:4 --link-mbit 10", "run needs -- COMMAND"),
        ("run --link-mbit 10 -- true", "either --topology"),
        ("run --topology full_mesh:4 --on c1 --link-mbit 10 -- true", "either --topology"),
        ("run --topology full_mesh:4 -- true", "needs --link-mbit"),
        ("run --topology full_mesh:4 --link-mbit -1 -- true", "must be a number >= 0, got '-1'"),
        ("run --topology full_mesh:4 --link-mbit nan -- true", "got 'nan'"),
        ("run --topology full_mesh:4 --link-mbit 1 --kernel kernel.panic=1 -- true", "got 'kernel.panic=1'"),
        ("run --topology full_mesh:4 --link-mbit 1 --kernel net/../x=1 -- true", "must be net.NAME=VALUE"),
        ("list -- true", "list takes no COMMAND"),
        ("down", "names of clusters, or --all"),
        ("fault 0 1 slower", "slower takes an amount"),
        ("fault 0 1 down 3", "down takes no amount"),
        ("fault 0 1 broken", "invalid choice"),
        ("fault 0 1 lossy 3 --jitter 1", "lossy takes no --jitter"),
    ],
)
def test_wrong_usage_is_told(line: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        parse(shlex.split(line))
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], line: str) -> str:
    """What the tool says where it cannot do what the line asks for."""
    assert virtual_cluster.main(shlex.split(line)) == FAILED
    return capsys.readouterr().err


@pytest.mark.parametrize(
    "line, told",
    [
        ("run --topology full_house:4 --link-mbit 10 -- true", "'full_house:4' is neither a file nor a preset"),
        ("run --topology full_mesh:4 --link-mbit 0 -- true", "link_mbit must be in 0.01..100000, got 0.0"),
        ("run --topology full_mesh:4 --link-mbit 9 --mtu 70000 -- true", "mtu must be in 1280..65000, got 70000"),
        ("up --topology full_mesh:4 --link-mbit 9 --name ../x", "--name must be letters"),
        ("exec 0 -- true", "there are: none"),
        ("fault --on nobody 0 1 down", "there is no cluster nobody; there are: none"),
        ("down nobody", "there is no cluster nobody"),
    ],
)
def test_what_makes_no_sense_is_refused(
    line: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TASP_COLL_CLUSTERS", str(tmp_path))
    monkeypatch.setattr(virtual_cluster.vcluster_job, "mpiexec", lambda: "mpiexec")
    assert told in refused(capsys, line)
    assert not list(tmp_path.iterdir())


def test_faults_add_up_and_up_clears_them() -> None:
    worse = Condition().after("slower", 4).after("lossy", 2).after("delayed", 20, 10).after("down", None)
    assert worse == Condition(down=True, slower=4, lossy=0.02, delayed_ms=20, jitter_ms=10)
    assert str(worse) == "down, 4 times slower, 2 % lost, 20 +- 10 ms later"
    assert worse.after("up", None) == Condition()
    for fault, amount, told in (("slower", 0.5, "slower"), ("lossy", 101, "lossy"), ("delayed", 4, "jitter")):
        with pytest.raises(ValueError, match=told):
            Condition().after(fault, amount, 5)


# --- on this machine


@pytest.fixture(scope="module")
def able() -> None:
    """Skips, with the reason, where namespaces cannot be had."""
    try:
        with vcluster_room.opened() as (room, _):
            vcluster_build.check(room, wired("nvswitch:2"))
    except vcluster_room.MissingError as error:
        pytest.skip(f"no virtual clusters on this machine: {error}")


@pytest.fixture
def clusters(able: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of this test's clusters, none of which outlives it."""
    directory = tmp_path / "clusters"
    monkeypatch.setenv("TASP_COLL_CLUSTERS", str(directory))
    yield directory
    for cluster in vcluster_registry.clusters():
        cluster.remove()


@pytest.fixture
def mpi(clusters: Path) -> None:
    """For tests that start ranks."""
    try:
        virtual_cluster.vcluster_job.mpiexec()
    except vcluster_room.MissingError as error:
        pytest.skip(str(error))


def call(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the tool."""
    command = [sys.executable, TOOL, *arguments]
    settings = {"capture_output": True, "text": True, "timeout": 60, "cwd": REPOSITORY, "stdin": subprocess.DEVNULL}
    return subprocess.run(list(map(str, command)), **{**settings, **options})


def new(topology: object, mbit: float = 50, *more: object) -> list[object]:
    """Options of a cluster that is quick to build."""
    return ["--topology", topology, "--link-mbit", mbit, "--goodput", 0.99, *more]


def eventually(happens: Callable[[], object], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not (done := bool(happens())) and time.monotonic() < end:
        time.sleep(0.02)
    return done


def test_a_command_runs_on_every_host(mpi: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = 'pwd >"$PMI_RANK"; ip -oneline address show rank >>"$PMI_RANK"; echo "$TASP_COLL_TOPOLOGY"; exit 7'
    ended = call("run", *new("full_mesh:3"), "--", "sh", "-c", script, cwd=tmp_path)
    assert ended.returncode == 7, ended.stderr
    assert "full_mesh:3: 3 hosts, 3 cables, links up to 50 Mbit/s" in ended.stderr
    assert len(set(ended.stdout.split())) == 1, "all ranks have the same topology"
    for rank in range(3):
        told = (tmp_path / str(rank)).read_text()
        assert told.startswith(f"{tmp_path}\n")
        assert f"inet 10.77.0.{rank + 1}/32" in told


COLLECTIVES = """
import numpy as np, tasp_coll, sys
with tasp_coll.Communicator(timeout=30) as comm:
    send = np.full(1000, comm.rank, np.int32)
    for algorithm in sys.argv[1:]:
        assert (comm.decomposed_allgather(send, algorithm=algorithm) == np.repeat(np.arange(comm.size), 1000)).all()
    if comm.rank == 0:
        print(comm.topology.name, comm.topology.links[0].GBps)
"""


def test_hosts_share_no_memory(mpi: None) -> None:
    """All of them are processes of one machine, and ranks of one host meet in memory."""
    asked = "import tasp_coll as t; c = t.Communicator(); print(type(c._core.rounds).__name__)"
    ended = call("run", *new("full_mesh:3"), "--", "python", "-c", asked)
    assert ended.returncode == 0, ended.stderr
    assert "".join(ended.stdout.split()) == 3 * "Rounds"  # lines of several ranks may run into each other


def test_gloo_finds_its_way_between_hosts(mpi: None, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    found = tmp_path / "found.json"
    flags = ["-b", "16K", "-e", "16K", "-n", "1", "-w", "0", "--algo", "ring,gloo", "--json", found]
    ended = call("run", *new("full_mesh:3"), "--", "python", REPOSITORY / "tools/all_gather_perf.py", *flags)
    assert ended.returncode == 0, ended.stderr
    assert [result["wrong"] for result in json.loads(found.read_text())["results"]] == [0, 0]


def test_predictions_beside_measurements(mpi: None, tmp_path: Path) -> None:
    flags = ("-b", "192K", "-e", "192K", "-n", "1", "-w", "0", "--out-of-place", "--algo", "ring,rings")
    case = CheckCase("small", "full_mesh:3", 20, "all_gather_perf.py", flags)
    found = model_check.run(case, tmp_path)
    assert [check.what for check in found] == ["ring 196608", "rings 196608"]
    assert found[0].predicted_us == pytest.approx(2 * found[1].predicted_us, rel=0.1)
    assert all(check.measured_us > 0 for check in found)


@pytest.mark.parametrize(
    "topology", ["full_mesh:4", "nvswitch:3", "cluster:2x2", "torus:2x3", LEAVES, ONE_WAY], ids=str
)
def test_collectives_on_every_kind_of_topology(mpi: None, topology: Topology | str, tmp_path: Path) -> None:
    spec, algorithms = topology, ["rings", "ring", "direct", "native", "auto"]
    if isinstance(topology, Topology):  # a ring of these is a matter for the solver
        spec, algorithms = tmp_path / "own.json", ["direct", "native"]
        topology.save(spec)
    ended = call("run", *new(spec), "--", "python", "-c", COLLECTIVES, *algorithms)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith(topology.name if isinstance(topology, Topology) else topology)


def test_what_the_links_deliver_is_measured(mpi: None) -> None:
    show = "import os, json; print(open(os.environ['TASP_COLL_TOPOLOGY']).read())"
    ended = call("run", "--topology", "cluster:2x2:4", "--link-mbit", 40, "--", "python", "-c", show)
    assert ended.returncode == 0, ended.stderr
    described = json.loads(ended.stdout[: ended.stdout.index("]}") + 2])
    rates = sorted({link["GBps"] for link in described["links"]})
    assert len(rates) == 2, "one figure for each nominal rate"
    assert rates[1] * 8e3 == pytest.approx(40, rel=0.06)
    assert rates[0] * 8e3 == pytest.approx(10, rel=0.06)
    assert all(rate * 8e3 < nominal for rate, nominal in zip(rates, (10, 40), strict=True))


def carried(room: vcluster_room.Room, wiring: Wiring) -> dict[tuple[Node, Node], int]:
    """Bytes that each direction of each cable has carried."""
    found = {}
    for node in wiring.nodes:
        links = json.loads(room.call(["ip", "-netns", wiring.namespace(node), "-json", "-stats", "link"]))
        sent = {link["ifname"]: link["stats64"]["tx"]["bytes"] for link in links}
        found |= {(u, v): sent[port.device] for (u, v), port in wiring.ports.items() if u == node}
    return found


def at_rest(room: vcluster_room.Room, wiring: Wiring) -> dict[tuple[Node, Node], int]:
    """The same, once nothing is under way."""
    seen = [carried(room, wiring)]

    def quiet() -> bool:
        time.sleep(0.05)
        seen.append(carried(room, wiring))
        return seen[-1] == seen[-2]

    assert eventually(quiet)
    return seen[-1]


@pytest.mark.parametrize("topology", [LEAVES, ONE_WAY, MIXED], ids=lambda topology: topology.name)
def test_data_is_on_the_topologys_path_and_nowhere_else(able: None, topology: Topology) -> None:
    wiring = wired(topology, 200)
    with vcluster_room.opened() as (room, _):
        vcluster_build.build(room, wiring)
        before = at_rest(room, wiring)
        for src, dst in [(0, 1), (0, 2), (1, 3), (2, 0), (3, 1), (3, 2)]:
            stream = (wiring.namespace(src), wiring.namespace(dst), wiring.address(dst), 0.0, 0.05)
            assert vcluster_build.inside(room, streams=[[stream]])[0][0] > 0
            after = at_rest(room, wiring)
            more = {ends: after[ends] - before[ends] for ends in after}
            data, replies = topology.path(src, dst), topology.path(dst, src)
            assert min(more[ends] for ends in data) > 10 * max(more[ends] for ends in replies)
            assert all(count == 0 for ends, count in more.items() if ends not in (*data, *replies))
            before = after


@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL", "mpiexec", "rank"])
def test_nothing_is_left_however_it_ends(mpi: None, clusters: Path, tmp_path: Path, how: str) -> None:
    marker = f"{os.getpid()}.{abs(hash(how)) % 10**6}"  # of seconds: sleep's argument, found in no other process
    links = subprocess.run([vcluster_room.tool("ip"), "link"], capture_output=True, text=True).stdout
    command = [sys.executable, TOOL, "run", "-q", *new("nvswitch:3"), "--name", "x", "--"]
    command += ["sh", "-c", f'touch "{tmp_path}/$PMI_RANK"; exec sleep {marker}']
    job = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, start_new_session=True, stderr=subprocess.DEVNULL)
    try:
        assert eventually(lambda: all((tmp_path / str(rank)).exists() for rank in range(3)))
        assert eventually(lambda: len(processes(marker, "sleep")) == 3)
        if how in ("mpiexec", "rank"):
            victims = processes(marker, "sleep" if how == "rank" else "mpiexec")
            os.kill(victims[0], signal.SIGKILL)
        else:
            os.kill(job.pid, getattr(signal, how))
        status = job.wait(15)
    finally:
        job.kill()
        job.wait()
    assert status in {"SIGKILL": (-9,), "mpiexec": (137,), "rank": (9, 137)}.get(how, (128 + getattr(signal, how, 0),))
    assert eventually(lambda: not processes(marker)), "a process is left"
    assert call("list").stdout == ""
    assert not list(clusters.iterdir())
    assert subprocess.run([vcluster_room.tool("ip"), "link"], capture_output=True, text=True).stdout == links


def processes(marker: str, program: str = "") -> list[int]:
    """Processes with the marker in their command line that begins with this program's path; youngest last."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended
            continue
        if any(marker in word for word in words) and words[0].endswith(program):
            found.append(int(path.parent.name))
    return sorted(found)


def test_a_signal_while_it_is_built_ends_it_too(mpi: None, clusters: Path) -> None:
    command = [sys.executable, TOOL, "run", "--topology", "full_mesh:16", "--link-mbit", 10, "--", "true"]
    job = subprocess.Popen(list(map(str, command)), cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    assert eventually(lambda: clusters.exists() and any(path.name == "c1" for path in clusters.iterdir()))
    job.terminate()
    assert job.wait(15) == 128 + signal.SIGTERM
    assert not list(clusters.iterdir())


def test_an_error_while_a_signal_ends_it_does_not_hide_the_signal() -> None:
    error = OSError("in the way")
    error.__context__ = RuntimeError("on the way out")
    error.__context__.__context__ = vcluster_job.Stopped(signal.SIGTERM)
    stopped = vcluster_job.stopped_by(error)
    assert stopped is not None
    assert stopped.status == 128 + signal.SIGTERM
    assert vcluster_job.stopped_by(OSError("alone")) is None


def test_several_clusters_at_once(mpi: None, tmp_path: Path) -> None:
    """Each waits until all three are there."""
    wait = 'touch "$0/$1"; until test -e "$0/1" -a -e "$0/2" -a -e "$0/3"; do sleep 0.02; done'
    command = [sys.executable, TOOL, "run", "-q", *new("full_mesh:2"), "--", "sh", "-c", wait, tmp_path]
    jobs = [subprocess.Popen([*map(str, command), str(number)], cwd=REPOSITORY) for number in (1, 2, 3)]
    assert [job.wait(30) for job in jobs] == [0, 0, 0]


def delivers(cluster: vcluster_registry.Cluster, src: int, dst: int) -> float:
    """Mbit/s of payload from one rank to another, now; 0 if nothing comes through."""
    wiring = cluster.wiring()
    stream = wiring.namespace(src), wiring.namespace(dst), wiring.address(dst), 0.15, 0.3
    try:
        ((rate,),) = vcluster_build.inside(cluster.enter(), streams=[[stream]])
    except vcluster_room.RoomError:  # no connection
        return 0.0
    return 8e-6 * float(rate)


def test_a_cluster_that_stays(clusters: Path) -> None:
    made = call("up", "-q", *new("torus:2x3", 40, "--name", "t"))
    assert (made.returncode, made.stdout) == (0, "t\n"), made.stderr
    again = call("up", *new("full_mesh:2", 40, "--name", "t"))
    assert again.returncode == FAILED
    assert "there is a cluster 't' already" in again.stderr
    assert call("list").stdout == "t          torus:2x3, links up to 40 Mbit/s, up\n"
    inside = call("exec", 4, "--", "sh", "-c", "ip -oneline address show rank; exit 3")
    assert inside.returncode == 3
    assert "10.77.0.5/32" in inside.stdout
    assert call("exec", 6, "--", "true").returncode == FAILED
    (cluster,) = vcluster_registry.clusters()
    as_new = delivers(cluster, 0, 1)
    assert as_new == pytest.approx(40, rel=0.15)

    assert "4 times slower" in call("fault", 0, 1, "slower", 4, "--one-way").stderr
    assert delivers(cluster, 0, 1) == pytest.approx(as_new / 4, rel=0.15)
    assert delivers(cluster, 1, 0) == pytest.approx(as_new, rel=0.15)
    assert call("list").stdout.endswith("0 -> 1: 4 times slower\n")
    assert call("fault", 1, 0, "up").returncode == 0
    assert call("fault", "--on", "t", 0, 1, "lossy", 30, "--one-way").returncode == 0
    assert delivers(cluster, 0, 1) < as_new / 2
    assert call("fault", 0, 1, "up").returncode == 0
    assert delivers(cluster, 0, 1) == pytest.approx(as_new, rel=0.15)
    assert call("list").stdout.count("\n") == 1
    wrong = call("fault", 0, 5, "down")
    assert wrong.returncode == FAILED
    assert "no link between 0 and 5" in wrong.stderr

    assert call("down", "t").returncode == 0
    assert eventually(lambda: cluster.room is not None and not cluster.room.alive)
    assert not list(clusters.iterdir())


def test_a_link_that_is_down_carries_nothing_until_it_is_up(clusters: Path) -> None:
    assert call("up", "-q", *new("nvswitch:3", 40)).returncode == 0
    (cluster,) = vcluster_registry.clusters()
    wiring = cluster.wiring()
    ping = "import socket, sys; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind((sys.argv[1], 9)); "
    hear = "s.settimeout(30); print(s.recv(9)); s.settimeout(0.5); print(s.recv(9))"
    listen = cluster.enter().entering(
        [vcluster_room.tool("ip"), "netns", "exec", "r1", sys.executable, "-c", ping + hear, wiring.address(1)]
    )
    send = ping + "s.sendto(sys.argv[3].encode(), (sys.argv[2], 9))"
    hearing = subprocess.Popen(listen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(0.5)
    for state, word in (("down", "lost"), ("up", "heard")):
        assert call("fault", 0, "nvswitch0", state).returncode == 0
        said = call("exec", 0, "--", "python", "-c", send, wiring.address(0), wiring.address(1), word)
        assert said.returncode == 0, said.stderr
    out, err = hearing.communicate(timeout=60)
    assert out == "b'heard'\n", out + err
    assert call("down", "--all").returncode == 0


def test_latencies_of_the_topology(mpi: None, tmp_path: Path) -> None:
    far = Topology("far", 2, (), (Link(0, 1, 1, 10_000), Link(1, 0, 1, 10_000)))
    far.save(tmp_path / "far.json")
    timed = (
        "from mpi4py import MPI; import time; w = MPI.COMM_WORLD; p = 1 - w.rank; w.sendrecv(0, p, source=p);"
        "t = time.time(); [w.send(0, p) or w.recv(source=p) if w.rank else (w.recv(source=p), w.send(0, p))"
        " for _ in range(5)]; print((time.time() - t) / 5)"
    )
    ended = call("run", *new(tmp_path / "far.json", 50, "--latency-scale", 2), "--", "python", "-c", timed)
    if "CONFIG_NET_SCH_NETEM" in ended.stderr:
        pytest.skip(ended.stderr)
    assert ended.returncode == 0, ended.stderr
    # Five times there and back take 200 ms; the rank that answers may begin, and be done, 20 ms earlier or later.
    assert max(map(float, ended.stdout.split())) > 0.04, ended.stdout
    assert min(map(float, ended.stdout.split())) > 0.03, ended.stdout


DATAGRAMS = """
import json, socket, sys, time
sys.path.insert(0, sys.argv[1])
from vcluster_inside import namespace
with namespace("r0"):
    out = socket.socket(type=socket.SOCK_DGRAM)
with namespace("r1"):
    into = socket.socket(type=socket.SOCK_DGRAM)
    into.bind((sys.argv[2], 0))
into.settimeout(1)
sent, seen = [], []
for number in range(60):
    sent.append(time.monotonic())
    out.sendto(bytes([number]), into.getsockname())
try:
    while len(seen) < 60:
        number = into.recv(9)[0]
        seen.append((number, time.monotonic() - sent[number]))
except TimeoutError:
    pass
print(json.dumps(seen))
"""


@pytest.mark.parametrize("spec", ["full_mesh:2", "nvswitch:2"])
def test_packets_come_later_and_in_order(able: None, spec: str) -> None:
    wiring = wired(spec)
    (there, back), *_ = [(port, wiring.ports[v, u]) for (u, v), port in wiring.ports.items() if u == 0]

    def datagrams(condition: Condition) -> tuple[list[int], list[float]]:
        try:
            impose(room, wiring, there, back, condition)
        except vcluster_room.MissingError as error:
            pytest.skip(str(error))
        script = [sys.executable, "-c", DATAGRAMS, str(REPOSITORY / "tools"), wiring.address(1)]
        numbers, seconds = zip(*json.loads(room.call(script)), strict=True)
        return list(numbers), list(seconds)

    with vcluster_room.opened() as (room, _):
        vcluster_build.build(room, wiring)
        numbers, seconds = datagrams(Condition(delayed_ms=200, jitter_ms=100))
        assert numbers == list(range(60))
        assert min(seconds) >= 0.1
        assert max(seconds) > 0.25, "some of 60 wait longer than half of all would"
        numbers, seconds = datagrams(Condition(delayed_ms=200, lossy=0.5))
        assert numbers == sorted(numbers)
        assert 5 < len(numbers) < 55
        assert min(seconds) >= 0.2
        numbers, seconds = datagrams(Condition())
        assert numbers == list(range(60))
        assert min(seconds) < 0.1
        assert "-late" not in room.call(["ip", "-all", "netns", "exec", "ip", "link"])
        assert "vcluster_line" not in room.call(["sh", "-c", "cat /proc/[0-9]*/cmdline"])


def test_netem_keeps_the_order_too() -> None:
    """With a rate, each packet is due after the last one: the kernel's sch_netem.c, netem_enqueue."""
    wiring = wired("full_mesh:2")
    port = wiring.ports[0, 1]
    assert " netem delay 20000.000us limit " in wiring.delay(port, 20_000)
    assert " netem delay 20000.000us 5000.000us rate 100gbit limit " in wiring.delay(port, 20_000, 5000)


def test_ranks_on_a_cluster_that_is_up(mpi: None) -> None:
    assert call("up", "-q", *new("full_mesh:2")).returncode == 0
    for status in (0, 5):
        assert call("run", "--on", "c1", "--", "sh", "-c", f"exit {status}").returncode == status
    assert call("list").stdout.startswith("c1 ")


def test_garbage_is_cleared_and_its_name_is_free(clusters: Path) -> None:
    topology = Topology.preset("full_mesh:2")
    cluster = vcluster_registry.claim("x", topology, Settings(10, 1500))
    assert [other.name for other in vcluster_registry.clusters()] == ["x"]
    state = cluster.directory / "cluster.json"
    told = json.loads(state.read_text())
    told["owner"]["started"] -= 1  # its number has gone to another process
    state.write_text(json.dumps(told))
    assert vcluster_registry.claim("x", topology, Settings(20, 1500)).settings.link_mbit == 20
    (clusters / "c9").mkdir()
    (clusters / "c9" / "cluster.json").write_text('{"of": "another version"}')
    assert [other.name for other in vcluster_registry.clusters()] == ["x"]


# --- machines that cannot


@pytest.fixture
def crippled(clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """`crippled(tool, pattern, error)`: the tool fails with this error where arguments or input have the pattern."""

    def cripple(name: str, pattern: str, error: str) -> None:
        real = vcluster_room.tool(name)
        script = tmp_path / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(
            f'#!/bin/sh\nbatch=; case "$*" in *-batch*) batch=$(cat);; esac\n'
            f'case "$* $batch" in *"{pattern}"*) echo "{error}" >&2; exit 2;; esac\n'
            f'if [ -n "$batch" ]; then echo "$batch" | {real} "$@"; else exec {real} "$@"; fi\n'
        )
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")

    return cripple


@pytest.mark.parametrize(
    "name, pattern, error, told",
    [
        ("unshare", "--net", "unshare failed: Operation not permitted", "namespaces are forbidden here"),
        ("ip", "type veth", "Error: Unknown device type.", "CONFIG_VETH"),
        ("ip", "type bridge", "Error: Unknown device type.", "CONFIG_BRIDGE"),
        ("tc", "tbf", "Error: Specified qdisc kind is unknown.", "CONFIG_NET_SCH_TBF"),
    ],
)
def test_what_a_machine_lacks_is_named(
    crippled: Callable[[str, str, str], None],
    name: str,
    pattern: str,
    error: str,
    told: str,
    clusters: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    crippled(name, pattern, error)
    said = refused(capsys, "up --topology nvswitch:2 --link-mbit 10")
    assert told in said
    assert error in said, "and what the system says"
    assert not list(clusters.iterdir())


def test_a_machine_without_delays_says_so(
    crippled: Callable[[str, str, str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    crippled("tc", "netem", "Error: Specified qdisc kind is unknown.")
    crippled("ip", "vcluster_line", "[Errno 2] No such file or directory: '/dev/net/tun'")
    Topology("far", 2, (), (Link(0, 1, 1, 1), Link(1, 0, 1, 1))).save(tmp_path / "far.json")
    said = refused(capsys, f"up --topology {tmp_path / 'far.json'} --link-mbit 10")
    assert "CONFIG_NET_SCH_NETEM" in said
    assert "CONFIG_TUN" in said
    assert "--latency-scale 0 does without" in said


def test_a_missing_tool_is_named(
    clusters: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vcluster_room, "_SYSTEM", "")
    (clusters / "bin").mkdir(parents=True)
    for name in ("unshare", "nsenter", "mount", "ip"):
        (clusters / "bin" / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(clusters / "bin"))
    assert "no 'tc' on this machine: install iproute2" in refused(capsys, "up --topology nvswitch:2 --link-mbit 10")


def test_other_mpis_are_refused(clusters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "mpiexec"
    other.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 5.0'\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(vcluster_room.MissingError, match="is not MPICH's"):
        virtual_cluster.vcluster_job.mpiexec()


@pytest.mark.skipif(os.geteuid() != 0, reason="not root: all other tests show it")
def test_without_root(mpi: None) -> None:
    nobody = {"user": 65534, "group": 65534, "extra_groups": []}
    mpiexec = launch.find_mpiexec()
    assert mpiexec
    paths = [str(REPOSITORY), str(Path(np.__file__).parents[1])]  # for an interpreter outside of our environment
    environment = {
        "PATH": f"{Path(mpiexec).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
    }

    def as_nobody(python: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [python, TOOL, *arguments]
        options: dict[str, Any] = {**nobody, "env": environment, "capture_output": True, "text": True, "cwd": "/"}
        return subprocess.run(list(map(str, command)), timeout=60, **options)

    def runs(python: str) -> bool:
        try:
            return as_nobody(python, "--help").returncode == 0
        except OSError:
            return False

    pythons = [sys.executable, f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"]
    if not (able := [python for python in pythons if runs(python)]):
        pytest.skip(f"another user may not run {' or '.join(pythons)}")
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, 65534, 65534)
        environment["TASP_COLL_CLUSTERS"] = directory
        ended = as_nobody(able[0], "run", *new("dgx_h100:1"), "--", "sh", "-c", "id -u; ip route | wc -l")
        if "namespaces are forbidden here" in ended.stderr:
            pytest.skip(ended.stderr)
        assert ended.returncode == 0, ended.stderr
        assert sorted(ended.stdout.split()) == ["0"] * 8 + ["7"] * 8
        assert not list(Path(directory).iterdir())
