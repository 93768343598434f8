"""The cost model: closed forms, a bound that nothing beats, and ways to the time that agree with each other."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tasp_coll.simulate
from tasp_coll import ArgumentError, Link, Schedule, Topology, plan
from tasp_coll.nodes import nodes_of
from tasp_coll.simulate import Costs, Prediction, predict, predict_native
from tasp_coll.simulate_events import simulate
from tasp_coll.simulate_formulas import formula
from tasp_coll.simulate_links import routes_of
from tasp_coll.simulate_messages import messages_of
from tasp_coll.simulate_native import native_steps
from test_cutbound import topologies
from test_two_level import rail_cluster

GB = 1e9
NIC = 50
Steps = Iterable[Iterable[tuple[int, int, int, int, int]]]

# (topology, collective, algorithm, options, shards of the unit's link that it takes, GB/s of that link): a line for
# whatever has a known time.
KNOWN = [
    ("full_mesh:8", "allgather", "rings", {}, 1, 1),
    ("full_mesh:8", "allgather", "direct", {}, 1, 1),
    ("full_mesh:8", "allgather", "ring", {}, 7, 1),
    ("full_mesh:8", "allgather", "rings", {"rings": 3}, Fraction(7, 3), 1),
    ("full_mesh:8", "reduce_scatter", "rings", {}, 1, 1),
    ("full_mesh:8", "allreduce", "rings", {}, 2, 1),
    ("full_mesh:8", "all_to_all", "direct", {}, Fraction(1, 8), 1),
    ("full_mesh:4", "allgather", "rings", {}, 1, 1),  # two rings on every link
    ("full_mesh:6", "allgather", "rings", {}, 1, 1),
    ("full_mesh:64", "allgather", "rings", {}, 1, 1),
    ("mi300x", "allgather", "rings", {}, 1, 64),
    ("nvswitch:8", "allgather", "ring", {}, 7, 450),
    ("nvswitch:8", "allgather", "rings", {"rings": 7}, 7, 450),
    ("nvswitch:8", "allgather", "direct", {}, 7, 450),
    ("torus:4x4", "allgather", "direct", {}, 8, 1),
    ("hypercube:3", "allgather", "direct", {}, 4, 1),
    ("dgx_h100:2", "allgather", "direct", {}, 8, NIC),
    ("dgx_h100:4", "allgather", "direct", {}, 24, NIC),
    ("dgx_h100:2", "allgather", "hierarchical", {}, Fraction(14, 9), NIC),
    ("dgx_h100:4", "allgather", "hierarchical", {}, Fraction(28, 9), NIC),
    ("cluster:2x4", "allgather", "hierarchical", {}, 1 + Fraction(1, 9 * 8), NIC),  # the last slice, inside a node
    ("cluster:2x4", "allgather", "rings", {}, Fraction(7, 4), NIC),
    ("dgx_h100:2", "allgather", "rings", {}, Fraction(15, 8), NIC),
    ("dgx_h100:4", "allgather", "rings", {}, Fraction(31, 8), NIC),
    ("cluster:2x3", "allgather", "rings", {}, Fraction(5, 3), NIC),
]


def of_steps(topology: Topology, steps: Steps, **options: object) -> Schedule:
    return Schedule.from_steps(topology, "allgather", steps, **options)  # type: ignore[arg-type]


def line(n: int, GBps: float = 1.0, latency_us: float = 0.0) -> Topology:
    """Ranks in a row."""
    pairs = [(r, r + 1) for r in range(n - 1)]
    links = [Link(a, b, GBps, latency_us) for u, v in pairs for a, b in ((u, v), (v, u))]
    return Topology("line", n, (), tuple(links))


def star(n: int, GBps: float = 1.0, latency_us: float = 0.0) -> Topology:
    """Ranks behind one switch."""
    links = [Link(a, b, GBps, latency_us) for r in range(n) for a, b in ((r, "s"), ("s", r))]
    return Topology("star", n, ("s",), tuple(links))  # type: ignore[arg-type]


@pytest.mark.parametrize("spec, collective, algorithm, options, shards, rate", KNOWN)
def test_known_times(
    spec: str, collective: str, algorithm: str, options: dict[str, int], shards: Fraction | int, rate: int
) -> None:
    found = predict(plan(spec, collective, algorithm, **options), GB)  # type: ignore[arg-type]
    assert found.seconds == pytest.approx(float(shards) / rate)
    assert found.utilisation <= 1 + 1e-9
    assert found.steps[-1] == pytest.approx(found.seconds)


@pytest.mark.parametrize(
    "spec, collective, shard_bytes, shards, rate",
    [
        ("full_mesh:8", "allgather", 10**6, 7, 1),  # a ring
        ("full_mesh:8", "allgather", 1000, 7, 1),  # recursive doubling
        ("full_mesh:7", "allgather", 1000, 1 + 2 + 3, 1),  # Bruck
        ("nvswitch:8", "allgather", 10**6, 7, 450),
        ("cluster:2x4", "allgather", 10**6, 7, NIC),  # two NICs carry a shard at each step
        ("full_mesh:8", "reduce_scatter", 1000, 7, 1),  # recursive halving
        ("full_mesh:8", "reduce_scatter", 10**6, 7, 1),  # pairwise exchange
        ("full_mesh:8", "allreduce", 10**6, 14, 1),
        ("full_mesh:8", "allreduce", 100, 3 * 8, 1),  # all of it, three times
    ],
)
def test_known_times_of_the_mpi_library(spec: str, collective: str, shard_bytes: int, shards: int, rate: int) -> None:
    found = predict_native(Topology.preset(spec), collective, shard_bytes)
    assert found.seconds == pytest.approx(shards * shard_bytes / GB / rate)


@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter", "allreduce"])
@pytest.mark.parametrize("shard_bytes", [10, 1000, 20_000, 10**6])
@pytest.mark.parametrize("n", [2, 3, 5, 7, 8, 12, 16])
def test_the_mpi_library_brings_everything(collective: str, shard_bytes: int, n: int) -> None:
    """What comes in is enough for the result, and no step has a rank send twice."""
    steps, alike = native_steps(collective, n, shard_bytes)
    received = np.zeros(n)
    for src, dst, share in steps:
        assert len(set(src.tolist())) == len(src) == len(dst) == len(set(dst.tolist()))
        np.add.at(received, dst, share)
    assert (received >= n - 1 - 1e-9).all() or (collective == "reduce_scatter" and (received >= 1 - 1e-9).all())
    assert not alike or all(np.array_equal(step, steps[0]) for step in steps)


# --- sharing and order, by hand


def test_two_flows_into_one_port_share_it_and_the_longer_one_then_has_it_alone() -> None:
    schedule = of_steps(star(3), [[(0, 2, 0, 0, 0), (1, 2, 1, 1, 0)]], weights=[Fraction(1, 3), Fraction(2, 3)])
    found = simulate(messages_of(schedule), GB, 0.0)
    assert found.arrived.tolist() == pytest.approx([2 / 3, 1])


def test_a_flow_gets_what_others_cannot_use() -> None:
    """Max-min fairness: 0->1 shares its narrow end with two others, so that 0->2 has the rest of 0's port."""
    links = [Link(0, "s", 3), Link("s", 1, 1), Link("s", 2, 9), Link(3, "s", 9), Link(4, "s", 9)]
    links += [Link(1, "s", 1), Link(2, "s", 1), Link("s", 0, 1), Link("s", 3, 1), Link("s", 4, 1)]
    topology = Topology("odd", 5, ("s",), tuple(links))
    routes = routes_of(topology, np.array([0, 0, 3, 4]), np.array([1, 2, 1, 1]))
    rates = routes.fair_rates(np.ones(4, np.bool_))
    assert rates.tolist() == pytest.approx([GB / 3, 8 * GB / 3, GB / 3, GB / 3])


def test_chunks_are_handed_on_as_they_arrive() -> None:
    """Two hops in k chunks take k + 1 chunk times, whatever the steps say."""
    k = 5
    steps = [[(0, 1, 0, c, 0)] for c in range(k)] + [[(1, 2, 0, c, 0)] for c in range(k)]
    assert predict(of_steps(line(3), steps), GB).seconds == pytest.approx((k + 1) / k)


def test_messages_between_two_ranks_go_one_after_another() -> None:
    steps = [[(0, 1, 0, 0, 0), (0, 1, 0, 1, 1), (0, 1, 0, 2, 2)]]
    found = simulate(messages_of(of_steps(line(2), steps)), GB, 0.0)
    assert found.arrived.tolist() == pytest.approx([1 / 3, 2 / 3, 1])


def test_a_lane_keeps_its_order_and_others_pass() -> None:
    """1->2 has a chunk from 0 first on ring 0: its own chunk there waits for that, the one on ring 1 does not."""
    steps = [[(0, 1, 0, 0, 0)], [(1, 2, 0, 0, 0)], [(1, 2, 1, 0, 0)], [(1, 2, 1, 1, 1)]]
    found = simulate(messages_of(of_steps(line(3), steps)), GB, 0.0)
    assert found.arrived.tolist() == pytest.approx([0.5, 1.0, 1.5, 0.5])


def test_a_sum_waits_for_all_that_goes_into_it() -> None:
    steps = [[(0, 1, 3, 0, 0), (2, 1, 3, 0, 0)], [(1, 3, 3, 0, 0)]]
    schedule = Schedule.from_steps(Topology.preset("full_mesh:4"), "reduce_scatter", steps)
    assert predict(schedule, GB).seconds == pytest.approx(2)


def test_latencies_add_up_along_the_way_and_from_step_to_step() -> None:
    ring = plan(star(5, latency_us=3), algorithm="ring")
    assert predict(ring, 0).seconds == pytest.approx(4 * 6e-6)
    assert predict(ring, 1000).seconds == pytest.approx(4 * (6e-6 + 1e-6))
    assert predict(plan(star(5, latency_us=3), algorithm="direct"), 0).seconds == pytest.approx(6e-6)
    far = of_steps(line(4, latency_us=2), [[(0, 3, 0, 0, 0)]])
    assert predict(far, 1000).seconds == pytest.approx(3 * 2e-6 + 1e-6)


def test_a_message_does_not_wait_for_the_one_before_to_arrive() -> None:
    steps = [[(0, 1, 0, 0, 0)], [(0, 1, 0, 1, 0)]]
    assert predict(of_steps(line(2, latency_us=100), steps), 1000).seconds == pytest.approx(101e-6)


def test_software_counts_for_every_message_and_byte() -> None:
    mesh = Topology.preset("full_mesh:8")
    costs = Costs(message_us=5)
    assert predict(plan(mesh, algorithm="ring"), 0, costs=costs).seconds == pytest.approx(7 * 10e-6)
    assert predict(plan(mesh, algorithm="direct", slices=1), 0, costs=costs).seconds == pytest.approx(14 * 5e-6)
    every = predict(plan(mesh, algorithm="rings"), 0, costs=costs)
    assert every.seconds == every.software_s == pytest.approx(7 * 14 * 5e-6)
    sliced = predict(plan(mesh, algorithm="direct", slices=7), 0, costs=costs)
    assert sliced.seconds == pytest.approx(every.seconds)
    shared = Costs(message_us=5, GBps=2, ranks_per_core=3)
    assert predict(plan(mesh, algorithm="ring"), 0, costs=shared).seconds == pytest.approx(7 * 30e-6)
    assert predict(plan(mesh, algorithm="direct"), GB, costs=shared).seconds == pytest.approx(14 * 3 / 2, rel=1e-3)
    assert Costs(message_us=5, ranks_per_core=0.5).message_s == pytest.approx(5e-6)  # a rank has one core at most


# --- what must hold everywhere


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A proved all-gather on a random topology: direct, one ring in any order, or anything at all in random chunks."""
    topology, seed = draw(topologies()), draw(st.integers(0, 2**20))
    n, rng = topology.ranks, random.Random(seed)
    kind = draw(st.sampled_from(["direct", "ring", "any"]))
    if kind == "direct":
        counts = draw(st.none() | st.lists(st.integers(0, 5), min_size=n, max_size=n))
        return plan(topology, algorithm="direct", slices=draw(st.integers(1, 4)), counts=counts)
    if kind == "ring":
        order = rng.sample(range(n), n)
        return of_steps(
            topology, [[(order[i], order[(i + 1) % n], order[i - t], 0, 0) for i in range(n)] for t in range(n - 1)]
        )
    chunks = draw(st.integers(1, 3))
    steps, held = [], {(o, c): [o] for o in range(n) for c in range(chunks)}
    while any(len(ranks) < n for ranks in held.values()):
        step = []
        for (origin, chunk), ranks in held.items():
            missing = [rank for rank in range(n) if rank not in ranks]
            if missing and rng.random() < 0.7:
                dst = rng.choice(missing)
                step.append((rng.choice(ranks), dst, origin, chunk, origin * chunks + chunk))
        steps.append(step)
        for _, dst, origin, chunk, _ in step:
            held[origin, chunk].append(dst)
    return of_steps(topology, steps)


def check(found: Prediction, bound: float) -> None:
    assert found.seconds >= bound * (1 - 1e-9)
    assert found.utilisation <= 1 + 1e-9
    assert list(found.steps) == sorted(found.steps)


@given(schedules())
@settings(max_examples=150)
def test_nothing_beats_the_bound(schedule: Schedule) -> None:
    schedule.verify()
    equal = len(set(schedule.counts or (1,))) == 1 and any(schedule.counts or (1,))
    bound = schedule.topology.allgather_bound(GB) if equal else 0.0
    check(predict(schedule, GB), bound)


@given(topologies(), st.sampled_from([100, 20_000, 10**6]))
def test_the_mpi_librarys_own_does_not_either(topology: Topology, shard_bytes: int) -> None:
    check(predict_native(topology, "allgather", shard_bytes), topology.allgather_bound(shard_bytes))


@given(schedules(), st.floats(0, 1e3), st.sampled_from([0, 7, 10**4, 10**8]), st.floats(1, 10))
def test_times_grow_with_bytes_and_with_software(schedule: Schedule, message_us: float, size: int, more: float) -> None:
    costs = Costs(message_us=message_us)
    base = predict(schedule, size)
    assert predict(schedule, size * more).seconds == pytest.approx(base.seconds * more)  # no latencies: in proportion
    late = predict(schedule, size, costs=costs)
    assert late.seconds >= late.software_s
    carries = size and any(schedule.counts or (1,)) and len(schedule.pattern.transfers(0))
    assert late.seconds >= 2 * costs.message_s * bool(carries)


@pytest.mark.parametrize(
    "spec, algorithm",
    [
        ("full_mesh:8", "rings"),
        ("torus:4x4", "direct"),
        ("nvswitch:8", "ring"),
        ("cluster:2x4", "hierarchical"),
        ("full_mesh:6", "rings"),
    ],
)
def test_a_larger_shard_takes_longer(spec: str, algorithm: str) -> None:
    schedule, costs = plan(spec, algorithm=algorithm), Costs(message_us=10)
    times = [predict(schedule, 4**power, costs=costs).seconds for power in range(15)]
    assert times == sorted(times)
    assert times[0] < 3 * times[2]  # latencies
    assert times[-1] > 3.5 * times[-2]  # bandwidth


# --- ways to the same time


@pytest.mark.parametrize("spec", ["full_mesh:2", "full_mesh:5", "full_mesh:8", "nvswitch:6", "mi300x"])
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("rings", [None, 1, 2])
def test_steady_steps_come_to_what_the_events_do(spec: str, collective: str, rings: int | None) -> None:
    topology, costs = Topology.preset(spec), Costs(message_us=3)
    schedule = plan(topology, collective, rings=min(rings or 99, topology.ranks - 1) if rings else None)
    listed = Schedule.from_steps(topology, collective, schedule.steps, weights=schedule.weights)
    short, long = (predict(each, 10**6, costs=costs) for each in (schedule, listed))
    assert (short.method, long.method) == ("steady", "events")
    assert long.events == len(schedule.steps) * short.events
    assert short.seconds == pytest.approx(long.seconds)
    assert short.steps == pytest.approx(long.steps)
    assert (short.link, short.utilisation) == (long.link, pytest.approx(long.utilisation))


@pytest.mark.parametrize("spec", ["full_mesh:5", "nvswitch:6", "torus:3x3", "cluster:2x3"])
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter"])
def test_slices_in_one_come_to_what_they_do_apart(spec: str, collective: str) -> None:
    schedule = plan(spec, collective, "direct", slices=3)
    listed = Schedule.from_steps(schedule.topology, collective, schedule.steps)
    whole, apart = (predict(each, 10**6) for each in (schedule, listed))
    assert whole.events < apart.events
    assert whole.seconds == pytest.approx(apart.seconds)
    assert whole.utilisation == pytest.approx(apart.utilisation)


@pytest.mark.parametrize("spec", ["full_mesh:2", "full_mesh:5", "full_mesh:8", "nvswitch:6"])
@pytest.mark.parametrize(
    "algorithm, rings, slices",
    [("rings", None, 1), ("rings", 1, 1), ("ring", None, 1), ("direct", None, 1), ("direct", None, 3)],
)
def test_formulas_come_to_what_is_simulated(spec: str, algorithm: str, rings: int | None, slices: int) -> None:
    topology, costs = Topology.preset(spec), Costs(message_us=3, GBps=20)
    sliced = slices if algorithm == "direct" else None
    for size in (0, 1000, 10**8):
        found = predict(plan(topology, algorithm=algorithm, rings=rings, slices=sliced), size, costs=costs)
        closed = formula(topology, algorithm, size, rings=rings, slices=slices, costs=costs)
        assert closed is not None
        assert closed.seconds == pytest.approx(found.seconds)
        assert closed.software_s == pytest.approx(found.software_s)
        assert closed.utilisation == pytest.approx(found.utilisation)


@pytest.mark.parametrize("spec", ["cluster:2x4", "cluster:3x3", "dgx_h100:2", "dgx_h100:4", "dgx_h100:8"])
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter"])
def test_the_formula_of_nodes_comes_close(spec: str, collective: str) -> None:
    topology, costs = Topology.preset(spec), Costs(message_us=3)
    for size in (0, 10**4, 10**6, 10**8):
        found = predict(plan(topology, collective, "hierarchical", slices=8), size, costs=costs)
        closed = formula(topology, "hierarchical", size, slices=8, costs=costs)
        assert closed is not None
        assert closed.seconds == pytest.approx(found.seconds, rel=0.08)
        assert closed.software_s == pytest.approx(found.software_s)
        assert closed.utilisation == pytest.approx(found.utilisation, rel=0.08)
        assert closed.seconds >= topology.allgather_bound(size)


@pytest.mark.parametrize("spec", ["cluster:2x4", "cluster:2x3", "dgx_h100:2", "cluster:3x3"])
def test_a_link_that_is_always_busy_is_the_events_time(spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = plan(spec)
    short = predict(schedule, 10**8)
    monkeypatch.setattr(tasp_coll.simulate, "_alike", lambda schedule: False)
    long = predict(schedule, 10**8)
    assert (short.method, long.method) == ("steady", "events")
    assert short.seconds == pytest.approx(long.seconds, rel=1e-3)


def test_formulas_know_latencies_and_their_limits() -> None:
    ports = star(5, latency_us=3)
    closed = formula(ports, "ring", 1000)
    assert closed is not None
    assert closed.seconds == pytest.approx(predict(plan(ports, algorithm="ring"), 1000).seconds)
    assert formula(Topology.preset("torus:3x3"), "rings", 1) is None
    assert formula(Topology.preset("hypercube:9"), "native", 1) is None
    assert formula(Topology.preset("full_mesh:3"), "hierarchical", 1) is None
    assert formula(Topology.preset("cluster:2x4"), "rings", 1, rings=5) is None
    assert formula(rail_cluster(3, 2), "rings", 1) is None  # no rings in closed form
    assert formula(Topology.preset("torus:3x3").without_link(0, 1), "direct", 1) is None


def late(topology: Topology, inside_us: float, nic_us: float) -> Topology:
    """Nodes with latencies: of the NICs, and of all other links."""
    nic = nodes_of(topology).nic_GBps
    links = [replace(link, latency_us=nic_us if link.GBps == nic else inside_us) for link in topology.links]
    return Topology(f"{topology.name} late", topology.ranks, topology.switches, links)


NODES = [
    *map(Topology.preset, ("cluster:2x4", "cluster:3x3", "cluster:3x2:2", "dgx_h100:2", "cluster:2x4:0.25")),
    *(rail_cluster(4, 4, True), rail_cluster(3, 4), rail_cluster(2, 6)),
    *(late(Topology.preset("cluster:3x3"), 2, 5), late(Topology.preset("dgx_h100:2"), 5, 1)),
]


@pytest.mark.parametrize("topology", NODES, ids=lambda topology: topology.name)
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter"])
@pytest.mark.parametrize("rings", [None, 1, 2])
@pytest.mark.parametrize("message_us", [0, 3, 30])
def test_the_formula_of_rings_on_nodes(
    topology: Topology, collective: str, rings: int | None, message_us: float
) -> None:
    """As exact as a simulation that may stop after the first step, but for where latencies come close to bandwidth."""
    near = 0.1 if topology.name.endswith("late") else 0.03
    costs, schedule = Costs(message_us, GBps=200), plan(topology, collective, rings=rings)
    for size in (0, 10**4, 10**6, 10**8):
        found = predict(schedule, size, costs=costs)
        closed = formula(topology, "rings", size, rings=rings, costs=costs)
        assert closed is not None
        assert closed.seconds == pytest.approx(found.seconds, rel=near)
        assert closed.software_s == pytest.approx(found.software_s)
        assert closed.utilisation == pytest.approx(found.utilisation, rel=near)
        assert closed.seconds >= topology.allgather_bound(size) * (1 - 1e-9)
        assert closed.steps[-1] <= closed.seconds * (1 + 1e-9)
        if rings == 1:
            assert closed == formula(topology, "ring", size, costs=costs)


@pytest.mark.parametrize("topology", NODES, ids=lambda topology: topology.name)
def test_the_formulas_of_one_message_for_each_pair_on_nodes(topology: Topology) -> None:
    costs, rails = Costs(3, GBps=200), nodes_of(topology).rails
    for size in (0, 10**6):
        found = predict(plan(topology, algorithm="direct", slices=2), size, costs=costs)
        closed = formula(topology, "direct", size, slices=2, costs=costs)
        assert closed is not None
        assert closed.software_s == pytest.approx(found.software_s)
        # Routes do not spread as evenly over rails as the formula has it.
        assert found.seconds * (0.5 if rails else 1 - 1e-9) <= closed.seconds <= found.seconds * (1 + 1e-9)


@pytest.mark.parametrize("topology", NODES, ids=lambda topology: topology.name)
def test_the_formula_of_the_mpi_librarys_ring_on_nodes(topology: Topology) -> None:
    for costs in (Costs(), Costs(3)):
        found = predict_native(topology, "allgather", 10**7, costs=costs, in_order=True)
        closed = formula(topology, "native", 10**7, costs=costs)
        assert closed is not None
        assert closed.seconds == pytest.approx(found.seconds, rel=0.03)
        assert closed.software_s == pytest.approx(found.software_s)


@pytest.mark.parametrize("spec", ["torus:4x4", "torus:4x8", "hypercube:4", "torus:2x4x4", "torus:3x5", "torus:3x4"])
def test_the_formula_of_the_direct_exchange_on_tori(spec: str) -> None:
    topology, costs = Topology.preset(spec), Costs(3)
    found = predict(plan(topology, algorithm="direct", slices=1), GB, costs=costs)
    closed = formula(topology, "direct", GB, costs=costs)
    assert closed is not None
    even = set(map(int, spec.split(":")[1].split("x"))) <= {2, 4, 8}
    assert found.seconds * (1 - 1e-9 if even else 0.5) <= closed.seconds <= found.seconds * (1 + 1e-9)
    assert closed.seconds >= topology.allgather_bound(GB)
    native = formula(topology, "native", GB, costs=costs)
    assert native == predict_native(topology, "allgather", GB, costs=costs)


@pytest.mark.parametrize("spec, algorithm", [("cluster:2x4", "hierarchical"), ("torus:3x5", "direct")])
def test_steps_one_after_another_are_an_upper_estimate(
    spec: str, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = plan(spec, algorithm=algorithm)
    exact = predict(schedule, GB)
    monkeypatch.setattr(tasp_coll.simulate, "MESSAGES", 0)
    rough = predict(schedule, GB)
    assert (exact.method, rough.method) == ("events", "steps")
    assert exact.seconds <= rough.seconds * (1 + 1e-9) <= 1.3 * exact.seconds
    assert rough.utilisation <= exact.utilisation * (1 + 1e-9)
    monkeypatch.undo()
    monkeypatch.setattr(tasp_coll.simulate, "MOMENTS", 1)
    assert predict(schedule, GB).seconds == pytest.approx(rough.seconds)


# --- what it costs


@pytest.mark.parametrize(
    "spec, algorithm, most",
    [
        ("full_mesh:64", "rings", 1),
        ("nvswitch:64", "ring", 1),
        ("torus:8x8", "direct", 1),
        ("dgx_h100:8", "direct", 2),
        ("dgx_h100:8", "rings", 2),
        ("cluster:2x4", "hierarchical", 40),
        ("dgx_h100:4", "hierarchical", 80),
    ],
)
def test_symmetry_leaves_few_moments_to_simulate(spec: str, algorithm: str, most: int) -> None:
    assert predict(plan(spec, algorithm=algorithm), GB).events <= most


# --- bad input, and nothing to do


def test_nothing_to_move_takes_no_time() -> None:
    assert predict(plan("full_mesh:1"), GB) == Prediction(0.0)
    assert predict_native(Topology.preset("full_mesh:1"), "allgather", GB) == Prediction(0.0)
    assert predict(plan("full_mesh:3", counts=[0, 0, 0]), GB).seconds == 0.0
    assert predict(plan("full_mesh:3"), 0).seconds == 0.0


@pytest.mark.parametrize("size", [-1, float("nan"), float("inf"), "many", None])
def test_bytes_must_be_a_number(size: object) -> None:
    with pytest.raises(ArgumentError, match=r"shard_bytes must be .*, got"):
        predict(plan("full_mesh:3"), size)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "field, value",
    [
        ("message_us", -1),
        ("message_us", float("inf")),
        ("GBps", 0),
        ("ranks_per_core", 0),
        ("ranks_per_core", float("nan")),
    ],
)
def test_costs_must_make_sense(field: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"{field} must be"):
        Costs(**{field: value})
