"""The two-level gather: proved on every shape of nodes, each shard u-1 times over a NIC, and run by all collectives."""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopback_ranks import on_ranks
from tasp_coll import ArgumentError, Communicator, MismatchError, ScheduleError, TopologyError, plan
from tasp_coll.hierarchical import OWN, HierarchicalPattern, slices_for
from tasp_coll.loads import chunk_units, step_load
from tasp_coll.reduce_programs import reduce_program
from tasp_coll.reduction import reduction
from tasp_coll.schedule import Schedule
from tasp_coll.slabs import gather_steps_program
from test_nodes import rail_cluster
from test_schedule import replay

SPECS = ("cluster:2x2", "cluster:2x4", "cluster:3x3", "cluster:4x2:1", "cluster:5x3:0.5", "dgx_h100:2", "dgx_h100:3")
COLLECTIVES = ("allgather", "reduce_scatter", "allreduce")
SMALL = ("cluster:2x2", "cluster:2x3", "cluster:3x2", "dgx_h100:1", "cluster:4x2")
every_collective = pytest.mark.parametrize("collective", COLLECTIVES)


def hierarchical(spec: str, collective: str = "allgather", slices: int | None = None) -> Schedule:
    return plan(spec, collective, "hierarchical", slices=slices)


@every_collective
@pytest.mark.parametrize("slices", [1, 2, 3, 8, 13])
@pytest.mark.parametrize("spec", SPECS)
def test_every_plan_is_proved(spec: str, collective: str, slices: int) -> None:
    schedule = hierarchical(spec, collective, slices)
    assert schedule.verify("replay") == "replay"
    assert schedule.verify("structure") == "structure"
    if schedule.ranks <= 9 and slices <= 3:
        replay(schedule)


def test_large_plans_are_proved_by_structure() -> None:
    assert hierarchical("cluster:80x8").verify() == "structure"


def test_rails() -> None:
    """Nothing leaves its rail, so it runs where rails are switches of their own."""
    schedule = plan(rail_cluster(3, 4), "allgather", "hierarchical")
    schedule.verify()
    assert all(src % 4 == dst % 4 for step in schedule.steps for src, dst, *_ in step if src // 4 != dst // 4)


@pytest.mark.parametrize("spec", SPECS)
def test_a_shard_crosses_a_nic_once_for_each_other_node(spec: str) -> None:
    schedule = hierarchical(spec, slices=4)
    unit, units = chunk_units(schedule)
    load: Counter[object] = Counter()
    for step in range(schedule.pattern.steps):
        rows = schedule.pattern.transfers(step)
        found = step_load(schedule.topology, rows, units[rows[:, 3]])
        load.update(dict(zip(found.links, found.load.tolist(), strict=True)))
    nodes = int(re.findall(r"\d+", spec.removeprefix("dgx_h100"))[0])
    assert {amount for link, amount in load.items() if "fabric" in link} == {(nodes - 1) * unit}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("slices", [1, 5, 8])
def test_its_own_shard_leaves_evenly(spec: str, slices: int) -> None:
    schedule = hierarchical(spec, slices=slices)
    own = Counter(step for step, *_, ring in schedule.pattern.moves(0)[0].tolist() if ring == OWN)
    counts = [own[step] for step in range(schedule.pattern.steps)]
    assert max(counts) - min(counts) <= 1


def test_slices() -> None:
    assert [slices_for(size) for size in (0, 1 << 15, 1 << 17, 1 << 30)] == [1, 1, 4, 16]
    assert hierarchical("cluster:2x4").chunks == 8
    with pytest.raises(ArgumentError, match="slices must be an integer >= 1, got 0"):
        hierarchical("cluster:2x4", slices=0)


@pytest.mark.parametrize("spec", ["full_mesh:4", "nvswitch:8", "torus:4x4", "cluster:4x1"])
def test_topologies_without_nodes_are_refused(spec: str) -> None:
    with pytest.raises(TopologyError, match=f"algorithm 'hierarchical' needs two or more equal nodes.*'{spec}'"):
        hierarchical(spec)


def test_reverse_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"reverse applies to .* got 'allgather' by 'hierarchical'"):
        plan("cluster:2x2", "allgather", "hierarchical", reverse=True)


class Broken(HierarchicalPattern):
    """Sends from the rail before it was received."""

    @property
    def moves_along(self):  # type: ignore[override]
        return np.maximum(super().moves_along - [self.slices, 0, 0, 0, 0], 0)


def test_structure_finds_faults() -> None:
    good = hierarchical("cluster:3x2", slices=2)
    groups = ((0, 1), (2, 3), (4, 4))
    for pattern, told in (
        (HierarchicalPattern(groups, 2), "each of 6 ranks once"),
        (HierarchicalPattern(good.pattern.groups, 3), "3 slices move in 2 chunks"),
        (Broken(good.pattern.groups, 2), "sent before it was received|more than one chunk"),
    ):
        with pytest.raises(ScheduleError, match=told):
            replace(good, pattern=pattern).verify("structure")
    with pytest.raises(ScheduleError, match="its share is"):
        replace(good, capacity_share=good.capacity_share * Fraction(99, 100)).verify("structure")


def sound(schedule: Schedule) -> bool:
    """Whether it is right, from first principles: sets of chunks, and sums of loads on the way of each transfer."""
    for step in schedule.steps:
        load: Counter[object] = Counter()
        for src, dst, _, chunk, _ in step:
            load.update(dict.fromkeys(schedule.topology.path(src, dst), schedule.weights[chunk]))
        fastest = max(link.GBps for link in schedule.topology.links)
        if any(
            part * Fraction(fastest) > schedule.capacity_share * Fraction(schedule.topology.GBps(*link))
            for link, part in load.items()
        ):
            return False
        if len({(src, dst, ring) for src, dst, _, _, ring in step}) != len(step):
            return False
    try:
        replay(schedule)
    except (AssertionError, KeyError):
        return False
    return True


@every_collective
@pytest.mark.parametrize("spec", ["cluster:2x2", "cluster:3x2"])
def test_mutants_are_refused_if_and_only_if_they_are_wrong(spec: str, collective: str) -> None:
    good = hierarchical(spec, collective, 2)
    steps = [list(step) for step in good.steps]
    places = [(s, i) for s, step in enumerate(steps) for i in range(len(step))]
    chance, verdicts = random.Random(1), Counter()
    for _ in range(120):
        mutant = [list(step) for step in steps]
        (s, i), (t, j) = chance.sample(places, 2)
        kind = chance.choice(["exchanged", "moved", "sender", "receiver", "steps"])
        if kind == "exchanged":
            mutant[s][i], mutant[t][j] = steps[t][j], steps[s][i]
        elif kind == "moved":
            mutant[t].append(mutant[s].pop(i))
        elif kind == "steps":
            mutant[s], mutant[t] = steps[t], steps[s]
        else:
            end = {"sender": "src", "receiver": "dst"}[kind]
            other = chance.choice([rank for rank in range(good.ranks) if rank not in mutant[s][i][:2]])
            mutant[s][i] = mutant[s][i]._replace(**{end: other})
        schedule = Schedule.from_steps(good.topology, collective, mutant, capacity_share=good.capacity_share)
        verdicts[sound(schedule)] += 1
        if sound(schedule):
            schedule.verify()
        else:
            with pytest.raises(ScheduleError):
                schedule.verify()
    assert verdicts[False] > 60


# --- as it runs


@given(spec=st.sampled_from(SPECS[:4]), data=st.data())
@settings(max_examples=20)
def test_gathers_of_any_sizes(spec: str, data: st.DataObject) -> None:
    n = hierarchical(spec).ranks
    rows = data.draw(st.lists(st.sampled_from([0, 1, 40, 5000, 30_000]), min_size=n, max_size=n))

    def body(comm: Communicator) -> None:
        send = np.arange(rows[comm.rank]) * n + comm.rank
        expected = np.concatenate([np.arange(count) * n + rank for rank, count in enumerate(rows)])
        assert (comm.decomposed_allgatherv(send, algorithm="hierarchical") == expected).all()

    on_ranks(n, body, topology=spec)


@pytest.mark.parametrize("spec", SPECS[:5])
@pytest.mark.parametrize("dtype", ["int64", "float32", "bfloat16"])
def test_sums(spec: str, dtype: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))

    def body(comm: Communicator) -> None:
        n = comm.size
        send = (np.arange(n * 3000) % 7 + comm.rank).astype(kind)
        total = n * (np.arange(n * 3000) % 7) + n * (n - 1) // 2
        assert (comm.decomposed_allreduce(send, algorithm="hierarchical") == total.astype(kind)).all()
        part = comm.decomposed_reduce_scatter(send, algorithm="hierarchical")
        assert (part == total.astype(kind)[3000 * comm.rank :][:3000]).all()
        counts = [0, *range(1, n)]
        send = np.ones(sum(counts), kind)
        part = comm.decomposed_reduce_scatter(send, counts=counts, algorithm="hierarchical")
        assert part.shape == (comm.rank,)
        assert (part == n).all()

    on_ranks(hierarchical(spec).ranks, body, topology=spec)


@pytest.mark.parametrize("spec", SPECS[:5])
@pytest.mark.parametrize("rows", [3, 30_000])
def test_step_by_step(spec: str, rows: int) -> None:
    def body(comm: Communicator) -> None:
        found = np.full((comm.size, rows), -1.0)
        for arrival in comm.allgather_steps(np.arange(rows) + 0.5 * comm.rank, algorithm="hierarchical"):
            for chunk in arrival.chunks:
                assert arrival.step or chunk.source == comm.rank
                assert (found[chunk.source, chunk.start : chunk.stop] == -1).all()
                found[chunk.source, chunk.start : chunk.stop] = chunk.data
        assert (found == np.arange(rows) + 0.5 * np.arange(comm.size)[:, None]).all()

    on_ranks(hierarchical(spec).ranks, body, topology=spec)


def test_what_it_cannot_do_step_by_step_is_refused() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises((ArgumentError, MismatchError), match="step by step in reverse, got 'hierarchical'"):
            comm.allgather_steps(np.zeros(4), algorithm="hierarchical", reverse=True)
        with pytest.raises((ArgumentError, MismatchError), match="step by step, got 'hierarchical'"):
            comm.reduce_scatter_steps(np.zeros(4), algorithm="hierarchical")

    on_ranks(4, body, topology="cluster:2x2")


def test_other_topologies_say_so_on_every_rank() -> None:
    def body(comm: Communicator) -> None:
        with pytest.raises(TopologyError, match="needs two or more equal nodes"):
            comm.decomposed_allgather(np.zeros(4), algorithm="hierarchical")
        assert comm.decomposed_allgather(np.zeros(4)).shape == (16,)

    on_ranks(4, body, topology="full_mesh:4")


def test_staging_is_a_few_shards_not_all_of_them() -> None:
    """What a rank holds step by step is the shard that its rail carries, and two slices from each neighbour."""
    u, m, slices, shard = 8, 4, 8, 1 << 16
    schedule = hierarchical(f"cluster:{u}x{m}", slices=slices)
    program = gather_steps_program(schedule, 0, [shard] * (u * m), 1)
    assert program.stage_bytes <= 1.2 * shard + 4 * (m - 1) * shard // slices
    back = hierarchical(f"cluster:{u}x{m}", "reduce_scatter", slices)
    assert reduce_program(back, 0, [shard] * (u * m), reduction("sum", "int8", u * m)).stage_bytes <= 2 * m * shard
