"""Plans: every one of them proved, the same on every machine, and made without listing what a rule can say."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasp_coll import ArgumentError, Schedule, ScheduleError, Topology, TopologyError, Transfer, decompose, plan
from tasp_coll.patterns import DirectPattern, RingPattern
from tasp_coll.schedule import Grain, cut, uniform_weights

REDUCIBLE = ("allgather", "reduce_scatter", "allreduce")
ALGORITHMS = ("rings", "ring", "direct")
REPLAYED = (*range(1, 33), 48, 63, 64)  # replay costs n^3; structure takes all the others
PLANS = [(collective, algorithm) for collective in REDUCIBLE for algorithm in ALGORITHMS]


def ring_counts(n: int) -> range:
    """How many rings a full mesh of n ranks can be asked for."""
    return range(1, (2 * n - 2 if n in (4, 6) else max(n - 1, 1)) + 1)


def replay(schedule: Schedule) -> None:
    """The proof once more, from first principles and sharing nothing with `verify`: sets of who contributed."""
    n = schedule.ranks
    if schedule.collective in ("allgather", "all_to_all"):
        gather(schedule, 0, schedule.steps)
        return
    keys = [(origin, chunk) for origin in range(n) for chunk in range(schedule.chunks)]
    sums = {(rank, key): {rank} for rank in range(n) for key in keys}
    done = 0
    for step in schedule.steps:
        if schedule.collective == "allreduce" and all(len(sums[key[0], key]) == n for key in keys):
            break
        done += 1
        moved = [(transfer, sums.pop((transfer.src, transfer[2:4]))) for transfer in step]
        for transfer, contributions in moved:
            assert not sums[transfer.dst, transfer[2:4]] & contributions, "counted twice"
            sums[transfer.dst, transfer[2:4]] |= contributions
    assert all(sums[key[0], key] == set(range(n)) for key in keys)
    if schedule.collective == "allreduce":
        gather(schedule, done, schedule.steps[done:])


def gather(schedule: Schedule, first: int, steps: object) -> None:
    n = schedule.ranks
    have = {rank: {(rank, chunk) for chunk in range(schedule.chunks)} for rank in range(n)}
    for transfers in steps:  # type: ignore[attr-defined]
        for transfer in transfers:
            assert transfer[2:4] in have[transfer.src], f"sent too early, steps from {first}"
        for transfer in transfers:
            assert transfer[2:4] not in have[transfer.dst]
            have[transfer.dst].add(transfer[2:4])
    for rank, keys in have.items():
        wanted = range(schedule.chunks) if schedule.collective != "all_to_all" else (rank,)
        assert keys >= {(origin, chunk) for origin in range(n) for chunk in wanted}


# --- proofs


@pytest.mark.parametrize("collective, algorithm", PLANS)
def test_full_meshes_are_proved_by_replay(collective: str, algorithm: str) -> None:
    for n in REPLAYED:
        plan(f"full_mesh:{n}", collective, algorithm).verify("replay")


@pytest.mark.parametrize("collective, algorithm", PLANS)
def test_full_meshes_are_proved_by_structure(collective: str, algorithm: str) -> None:
    for n in range(1, 65):
        plan(f"full_mesh:{n}", collective, algorithm).verify("structure")


@pytest.mark.parametrize("n", range(1, 65))
def test_every_full_mesh_passes_verify(n: int) -> None:
    plan(f"full_mesh:{n}").verify()
    plan(f"full_mesh:{n}", "all_to_all", "direct").verify()


@pytest.mark.parametrize("collective", REDUCIBLE)
@pytest.mark.parametrize("n", range(1, 10))
def test_any_number_of_rings_is_proved(n: int, collective: str) -> None:
    for spec in ("full_mesh", "nvswitch"):
        for k in ring_counts(n):
            schedule = plan(f"{spec}:{n}", collective, "rings", k)
            assert schedule.chunks == len(schedule.rings) == k
            schedule.verify("replay")
            schedule.verify("structure")


@pytest.mark.parametrize("collective, algorithm", PLANS)
def test_single_switches_are_proved(collective: str, algorithm: str) -> None:
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 16, 33):
        schedule = plan(f"nvswitch:{n}", collective, algorithm)
        schedule.verify("replay")
        schedule.verify("structure")
    plan("nvswitch:9", "all_to_all", "direct").verify()


@pytest.mark.parametrize("collective, algorithm", [*PLANS, ("all_to_all", "direct")])
@pytest.mark.parametrize("n", range(1, 8))
def test_plans_hold_from_first_principles(n: int, collective: str, algorithm: str) -> None:
    replay(plan(f"full_mesh:{n}", collective, algorithm))


@pytest.mark.parametrize("collective, algorithm", [*PLANS, ("all_to_all", "direct")])
def test_every_link_carries_the_same_in_every_step(collective: str, algorithm: str) -> None:
    """The point of a decomposition: no link is idle, none carries more than another, none more than was claimed."""
    for n in range(2, 10):
        schedule = plan(f"full_mesh:{n}", collective, algorithm)
        for step in schedule.steps:
            load: Counter[tuple[int, int]] = Counter()
            for transfer in step:
                load[transfer.src, transfer.dst] += schedule.weights[transfer.chunk]  # type: ignore[assignment]
            assert set(load.values()) == {schedule.capacity_share}
            assert len(load) == (n if algorithm == "ring" else n * (n - 1))


def test_any_graph_can_be_served_directly() -> None:
    for spec in ("hypercube:3", "torus:3x3", "cluster:2x2"):
        plan(spec, "allreduce", "direct").verify()
        plan(spec, "all_to_all", "direct").verify()


@pytest.mark.parametrize("spec", ["mi300x", "dgx_h100:2", "cluster:3x3", "torus:3x3", "hypercube:3"])
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter", "allreduce"])
def test_rings_of_every_preset(spec: str, collective: str) -> None:
    if spec.startswith("hypercube"):
        pytest.importorskip("ortools", reason="ortools is not installed: pip install 'tasp-coll[solver]'")
    for algorithm in ("rings", "ring"):
        schedule = plan(spec, collective, algorithm)
        replay(schedule)
        assert schedule.verify("replay") == "replay"
        assert schedule.verify("structure") == "structure"
        assert schedule.capacity_share


# --- what the proofs refuse, both ways alike


def broken_plans() -> list[tuple[str, Schedule]]:
    good, direct = plan("full_mesh:5"), plan("full_mesh:5", "allreduce", "direct")
    rings = [ring.ranks for ring in good.rings]
    assert good.capacity_share is not None
    assert direct.capacity_share is not None
    return [
        ("a ring that misses a rank", replace(good, pattern=RingPattern(((0, 1, 2, 3, 3), *rings[1:])))),
        ("two rings over one link", replace(good, pattern=RingPattern((rings[1], *rings[1:])))),
        ("less capacity than used", replace(good, capacity_share=good.capacity_share / 2)),
        ("a chunk without a ring", replace(good, weights=uniform_weights(5))),
        ("weights above 1", replace(good, weights=(*uniform_weights(3), Fraction(1, 3)))),
        ("less capacity than a slice", replace(direct, capacity_share=direct.capacity_share / 2)),
        ("a slice that stays", replace(direct, pattern=DirectPattern(5, 3), collective="allgather")),
    ]


@pytest.mark.parametrize("method", ["replay", "structure", "auto"])
@pytest.mark.parametrize("schedule", [pytest.param(schedule, id=name) for name, schedule in broken_plans()])
def test_replay_and_structure_refuse_the_same_plans(schedule: Schedule, method: str) -> None:
    with pytest.raises(ScheduleError):
        schedule.verify(method)


def test_unknown_method_of_proof() -> None:
    with pytest.raises(ArgumentError, match=r"method must be .* got 'hope'"):
        plan("full_mesh:3").verify("hope")


# --- steps


@pytest.mark.parametrize("collective, algorithm", [*PLANS, ("all_to_all", "direct")])
def test_steps_are_a_sequence(collective: str, algorithm: str) -> None:
    steps = plan("full_mesh:5", collective, algorithm).steps
    listed = list(steps)
    assert len(listed) == len(steps)
    assert all(isinstance(transfer, Transfer) for step in listed for transfer in step)
    assert all(type(value) is int for step in listed for transfer in step for value in transfer)
    assert steps[0] == listed[0] == steps[-len(steps)]
    assert steps[-1] == listed[-1]
    assert list(steps[:2]) == listed[:2]
    assert list(steps[::-1]) == listed[::-1] == list(reversed(steps))
    assert list(steps[-2:]) == listed[-2:]
    assert listed[0] in steps
    for index in (len(steps), -len(steps) - 1):
        with pytest.raises(IndexError):
            steps[index]


@pytest.mark.parametrize("n, collective, count", [(1, "allgather", 0), (2, "allgather", 1), (7, "allreduce", 12)])
def test_number_of_steps(n: int, collective: str, count: int) -> None:
    assert len(plan(f"full_mesh:{n}", collective).steps) == count


@pytest.mark.parametrize("collective, algorithm", [*PLANS, ("all_to_all", "direct")])
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8])
def test_a_ranks_moves_are_its_part_of_the_steps(n: int, collective: str, algorithm: str) -> None:
    schedule = plan(f"full_mesh:{n}", collective, algorithm)
    sends, receives = defaultdict(list), defaultdict(list)
    for step, transfers in enumerate(schedule.steps):
        for src, dst, *what in transfers:
            sends[src].append((step, dst, *what))
            receives[dst].append((step, src, *what))
    for rank in range(n):
        for rows, expected in zip(schedule.pattern.moves(rank), (sends, receives), strict=True):
            assert rows[:, 0].tolist() == sorted(rows[:, 0].tolist()), "in the order of steps"
            assert sorted(map(tuple, rows.tolist())) == sorted(expected[rank])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reduce_scatter_is_allgather_played_backwards(algorithm: str) -> None:
    for n in range(1, 10):
        forward = plan(f"full_mesh:{n}", "allgather", algorithm).steps
        back = plan(f"full_mesh:{n}", "reduce_scatter", algorithm).steps
        both = plan(f"full_mesh:{n}", "allreduce", algorithm).steps
        turned = [{(dst, src, *what) for src, dst, *what in step} for step in reversed(forward)]
        assert [set(step) for step in back] == turned
        assert list(both) == [*back, *forward]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reverse_brings_what_reduce_scatter_asks_for(algorithm: str) -> None:
    """What a rank sends in step t of the reduce-scatter, the reversed allgather brings it in step t."""
    for n in range(1, 10):
        reverse = plan(f"full_mesh:{n}", "allgather", algorithm, reverse=True)
        reverse.verify()
        reduce = plan(f"full_mesh:{n}", "reduce_scatter", algorithm)
        for rank in range(n):
            sent = {(step, origin, chunk) for step, _, origin, chunk, _ in reduce.pattern.moves(rank)[0].tolist()}
            came = {(step, origin, chunk) for step, _, origin, chunk, _ in reverse.pattern.moves(rank)[1].tolist()}
            assert sent == came


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_phases_of_an_allreduce(algorithm: str) -> None:
    schedule = plan("full_mesh:5", "allreduce", algorithm)
    for whole in (schedule, Schedule.from_steps(schedule.topology, "allreduce", schedule.steps)):
        first, second = whole.phases()
        assert (first.collective, second.collective) == ("reduce_scatter", "allgather")
        assert [*first.steps, *second.steps] == list(schedule.steps)
        first.verify()
        second.verify()
    with pytest.raises(ScheduleError, match="allreduce"):
        plan("full_mesh:5").phases()


# --- size


def test_256_ranks_are_planned_and_proved_in_little_memory() -> None:
    """Listed, these are 16.6 million transfers, more than 1 GB of objects."""
    tracemalloc.start()
    schedule = plan("full_mesh:256", "allreduce")
    schedule.verify()
    sends, receives = schedule.pattern.moves(17)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(sends) == len(receives) == 2 * 255 * 255
    assert peak < 64e6


def test_1026_ranks_are_proved_by_structure() -> None:
    schedule = plan("full_mesh:1026")
    schedule.verify()
    assert schedule.chunks == len(schedule.steps) == 1025


def test_4098_ranks_on_one_ring() -> None:
    tracemalloc.start()
    schedule = plan("full_mesh:4098", algorithm="ring")
    schedule.verify("structure")
    step = schedule.steps[4000]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len({transfer.dst for transfer in step}) == 4098
    assert peak < 200e6, "some bytes for each of 16.8 million links, never an object"


# --- arguments


@given(n=st.integers(1, 9), data=st.data())
@settings(max_examples=30)
def test_counts_may_differ_and_be_zero(n: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=n, max_size=n))
    collective, algorithm = data.draw(st.sampled_from(PLANS))
    schedule = plan(f"full_mesh:{n}", collective, algorithm, counts=counts)
    assert schedule.counts == tuple(counts)
    schedule.verify()


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3, 4), (1, -1, 2), (1, 2, 0.5), (True, 1, 1)])
def test_bad_counts(counts: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="counts must be 3 integers >= 0"):
        plan("full_mesh:3", counts=counts)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"collective": "broadcast"}, "collective must be one of .* got 'broadcast'"),
        ({"algorithm": "native"}, "algorithm must be one of .* got 'native'"),
        ({"algorithm": "ring", "rings": 2}, "rings applies to algorithm 'rings' only"),
        ({"rings": 4}, "rings must be an integer from 1 to 3"),
        ({"rings": 0}, "rings must be an integer from 1 to 3"),
        ({"rings": True}, "rings must be an integer"),
        ({"slices": 2}, "slices applies to direct and hierarchical only"),
        ({"algorithm": "direct", "slices": 0}, "slices must be an integer >= 1"),
        (
            {"collective": "allreduce", "reverse": True},
            "reverse applies to collective 'allgather' by rings or direct only",
        ),
        ({"collective": "all_to_all"}, "algorithm must be 'direct'"),
        ({"collective": "all_to_all", "algorithm": "direct", "counts": (1,) * 5}, "counts does not apply"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    n = 5 if "counts" in arguments else 4 if "rings" not in arguments else 7
    message = message.replace("from 1 to 3", f"from 1 to {n - 1}")
    if arguments.get("rings") == 4:
        arguments = {**arguments, "rings": n}
    with pytest.raises(ArgumentError, match=message):
        plan(f"full_mesh:{n}", **arguments)  # type: ignore[arg-type]


def test_a_topology_may_be_given_by_name_or_as_such() -> None:
    by_name, as_such = plan("full_mesh:4"), plan(Topology.preset("full_mesh:4"))
    assert by_name.fingerprint == as_such.fingerprint
    assert tuple(ring.ranks for ring in by_name.rings) == tuple(ring.ranks for ring in decompose(as_such.topology))
    with pytest.raises(TopologyError, match="no_such"):
        plan("no_such:4")


# --- cut


WEIGHTS = (
    st.lists(st.integers(0, 9), min_size=1, max_size=8)
    .filter(any)
    .map(lambda parts: tuple(Fraction(part, sum(parts)) for part in parts))
)


@given(total=st.integers(0, 10**12), weights=WEIGHTS, align=st.sampled_from([1, 2, 64]))
def test_cut_keeps_everything_in_order_and_proportion(total: int, weights: tuple[Fraction, ...], align: int) -> None:
    bounds = cut(total, weights, align)
    assert len(bounds) == len(weights) + 1
    assert bounds[0] == 0
    assert bounds[-1] == total
    assert list(bounds) == sorted(bounds)
    assert all(bound % align == 0 for bound in bounds[:-1])
    ideal = Fraction(0)
    for weight, bound in zip(weights, bounds[1:-1], strict=False):
        ideal += weight
        assert -align < bound - ideal * total <= 0, "at the last aligned place before the ideal one"


@given(
    total=st.integers(0, 10**5),
    weights=WEIGHTS,
    align=st.sampled_from([1, 2, 16, 64]),
    stretch=st.sampled_from([0, 0.05, 0.5, 1.0]),
)
def test_rows_are_aligned_where_that_costs_no_chunk_much(
    total: int, weights: tuple[Fraction, ...], align: int, stretch: float
) -> None:
    anywhere, bounds = cut(total, weights), Grain(align, stretch).cut(total, weights)
    sizes = zip(itertools.pairwise(bounds), itertools.pairwise(anywhere), strict=True)
    assert all(stop - start <= (b - a) * (1 + stretch) for (start, stop), (a, b) in sizes)
    assert bounds in (anywhere, cut(total, weights, align))


def test_cut_of_rows() -> None:
    sevenths = uniform_weights(7)
    assert Grain(16).cut(2048, sevenths) == cut(2048, sevenths, 16), "304 rows at most, not 293"
    assert Grain(16).cut(1024, sevenths) == cut(1024, sevenths), "160 would be too many for 147"
    assert Grain(16, 0.1).cut(1024, sevenths) == cut(1024, sevenths, 16), "unless a tenth more is allowed"


@given(total=st.integers(0, 10**6), k=st.integers(1, 40))
def test_cut_evenly(total: int, k: int) -> None:
    bounds = cut(total, uniform_weights(k))
    sizes = {stop - start for start, stop in itertools.pairwise(bounds)}
    assert max(sizes) - min(sizes) <= 1
    assert bounds == cut(total, list(uniform_weights(k))), "a list does as well"


# --- fingerprints


@pytest.mark.parametrize("collective, algorithm", [*PLANS, ("all_to_all", "direct")])
def test_fingerprint_depends_on_what_moves(collective: str, algorithm: str) -> None:
    schedule = plan("full_mesh:5", collective, algorithm)
    assert schedule.fingerprint == plan("full_mesh:5", collective, algorithm).fingerprint
    shuffled = [step[::-1] for step in schedule.steps]
    assert Schedule.from_steps(schedule.topology, collective, shuffled).fingerprint == schedule.fingerprint
    moved = [*shuffled[:-1], shuffled[-1][:-1]]
    assert Schedule.from_steps(schedule.topology, collective, moved).fingerprint != schedule.fingerprint


def test_fingerprints_of_different_plans_differ() -> None:
    plans = [plan(f"full_mesh:{n}", c, "rings", k) for n in (3, 5) for c in REDUCIBLE for k in (1, 2, None)]
    plans += [plan("full_mesh:5", c, "direct") for c in (*REDUCIBLE, "all_to_all")]
    plans += [plan("full_mesh:5", reverse=True), plan("full_mesh:5", counts=(1, 2, 3, 4, 5)), plan("nvswitch:5")]
    # k=2 and k=None are one and the same plan on 3 ranks
    assert len({schedule.fingerprint for schedule in plans}) == len(plans) - len(REDUCIBLE)


def test_fingerprint_is_the_same_in_another_process() -> None:
    """Ranks compare fingerprints, so nothing of one process may be in them, such as the seed of `hash`."""
    source = "import tasp_coll; print(tasp_coll.plan('full_mesh:6', 'allreduce').fingerprint)"
    found = {plan("full_mesh:6", "allreduce").fingerprint}
    for seed in ("1", "2"):
        ended = subprocess.run(
            [sys.executable, "-c", source],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        found.add(ended.stdout.strip())
    assert len(found) == 1
