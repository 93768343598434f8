"""Schedules that are wrong in one place, each refused by name; and schedules of a user's own, accepted or refused.

A mutant is refused unless it is as right as what it was made from. Which mutants are is derived in `same_effect_*`
below, and that these are accepted is asserted too, so that the exceptions are exact in both directions.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cache
from itertools import combinations
from typing import TypeVar

import pytest

from own_schedules import backwards, doubling_allgather, tree_reduce_scatter, trees
from tasp_coll import ArgumentError, CollectiveError, Schedule, ScheduleError, Topology, Transfer, plan

Listed = list[list[Transfer]]
T = TypeVar("T")
COLLECTIVES = ("allgather", "reduce_scatter", "allreduce", "all_to_all")
PLANS = [
    (f"{spec}:{n}", collective, algorithm)
    for spec, sizes in (("full_mesh", (2, 3, 4, 5, 6, 8)), ("nvswitch", (2, 3, 5)))
    for n in sizes
    for collective in COLLECTIVES
    for algorithm in ("rings", "ring", "direct")
    if collective != "all_to_all" or algorithm == "direct"
]
TREES = [(spec, c, "hierarchical") for spec in ("cluster:2x2", "cluster:3x2", "dgx_h100:2") for c in COLLECTIVES[:3]]
every_plan = pytest.mark.parametrize("spec, collective, algorithm", PLANS + TREES)
uniform_plan = pytest.mark.parametrize("spec, collective, algorithm", PLANS)  # all steps of a phase are alike


@cache
def planned(spec: str, collective: str, algorithm: str) -> Schedule:
    return plan(spec, collective, algorithm)


def listed(schedule: Schedule) -> Listed:
    return [list(step) for step in schedule.steps]


def rebuilt(schedule: Schedule, steps: Sequence[Sequence[Transfer]]) -> Schedule:
    return Schedule.from_steps(schedule.topology, schedule.collective, steps, capacity_share=schedule.capacity_share)


def refused(schedule: Schedule, steps: Listed) -> None:
    """`verify` raises, and says where, in the bounds of the schedule."""
    mutant = rebuilt(schedule, steps)
    with pytest.raises(ScheduleError) as caught:
        mutant.verify()
    error = caught.value
    assert error.step is not None
    assert 0 <= error.step < len(steps)
    assert error.rank is not None
    assert 0 <= error.rank < schedule.ranks
    assert error.chunk is not None
    assert 0 <= error.chunk < schedule.chunks
    # The ring may be told only if a transfer of that chunk is left to tell it.
    carriers = {transfer.ring for step in steps for transfer in step if transfer.chunk == error.chunk}
    assert error.ring in carriers or (error.ring is None and not carriers)
    for name in ("step", "rank", "chunk"):
        assert f"{name} {getattr(error, name)}" in str(error)


def some(mutants: Iterable[T], schedule: Schedule) -> list[T]:
    """Mutants of one kind: all of small schedules, a sample (always the same) of large ones."""
    found = list(mutants)
    few = 40 if schedule.ranks <= 3 else 8
    return found if len(found) <= few else random.Random(len(found)).sample(found, few)


def places(steps: Listed) -> list[tuple[int, int]]:
    """(step, index) of every transfer."""
    return [(s, i) for s, step in enumerate(steps) for i in range(len(step))]


def replaced(steps: Listed, step: int, index: int, *instead: Transfer) -> Listed:
    """A copy with one transfer replaced by none or more."""
    copy = list(steps)
    copy[step] = [*steps[step][:index], *instead, *steps[step][index + 1 :]]
    return copy


# --- as they are


@every_plan
def test_listed_plans_pass(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    again = rebuilt(schedule, schedule.steps)
    again.verify()
    assert again.weights == schedule.weights
    assert again.algorithm == "custom"


@every_plan
def test_order_within_a_step_does_not_matter(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    rebuilt(schedule, [step[::-1] for step in schedule.steps]).verify()


# --- one transfer too few, too many, too early


@every_plan
def test_a_missing_transfer_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    for step, index in some(places(steps), schedule):
        refused(schedule, replaced(steps, step, index))


@every_plan
def test_a_transfer_made_twice_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    for step, index in some(places(steps), schedule):
        twice = steps[step][index]
        refused(schedule, replaced(steps, step, index, twice, twice))
        later = [*steps, [twice]]
        if collective != "allreduce" or step >= len(steps) // 2:
            refused(schedule, later)  # in a step of its own
        else:
            refused(schedule, [*steps[: len(steps) // 2], [twice], *steps[len(steps) // 2 :]])


@uniform_plan
def test_a_transfer_moved_to_an_earlier_step_is_refused(spec: str, collective: str, algorithm: str) -> None:
    """On rings it has not arrived by then; in a direct exchange its link is taken by another slice."""
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    moves = [(step, index, earlier) for step, index in places(steps) for earlier in range(step)]
    for step, index, earlier in some(moves, schedule):
        moved = replaced(steps, step, index)
        moved[earlier] = [*moved[earlier], steps[step][index]]
        refused(schedule, moved)


# --- the wrong peer


def ring_after(schedule: Schedule, transfer: Transfer) -> tuple[int, ...]:
    """The transfer's ring, from its origin on."""
    ranks = schedule.rings[transfer.chunk].ranks
    place = ranks.index(transfer.origin)
    return ranks[place:] + ranks[:place]


def spare_link(schedule: Schedule, step: Sequence[Transfer], mutant: Transfer) -> bool:
    """Whether the links that the mutant takes instead have room: on a full mesh, whether its own is idle.

    Behind a switch every port is full at every step: a rank that receives, or sends, one more overloads it.
    """
    if schedule.topology.is_single_switch:
        return False
    assert schedule.capacity_share is not None
    used = sum(schedule.weights[t.chunk] for t in step if (t.src, t.dst) == (mutant.src, mutant.dst))
    return used + schedule.weights[mutant.chunk] <= schedule.capacity_share


def in_first_phase(schedule: Schedule, step: int) -> bool:
    whole = len(schedule.steps)
    return schedule.collective == "reduce_scatter" or (schedule.collective == "allreduce" and step < whole // 2)


def same_effect_from(schedule: Schedule, steps: Listed, step: int, old: Transfer, new: Transfer) -> bool:
    """Whether `new`, with another sender than `old`, does as well.

    On a ring of a gather all ranks from the origin to the sender have the chunk: any of them can send it, if the
    link is idle. In a direct exchange only the origin has it. In a reduction each sends what no other has.
    """
    if not schedule.rings or in_first_phase(schedule, step):
        return False
    order = ring_after(schedule, old)
    return order.index(new.src) < order.index(old.src) and spare_link(schedule, steps[step], new)


def same_effect_to(schedule: Schedule, steps: Listed, step: int, old: Transfer, new: Transfer) -> bool:
    """Whether `new`, with another receiver than `old`, does as well.

    In a gather the rank that is passed over never gets the chunk. On a ring of a reduction the sums go down to the
    origin: any rank on the way can take this one along, if the link is idle. In a direct exchange all others hand
    in theirs in the same step, so that none can.
    """
    if not schedule.rings or not in_first_phase(schedule, step):
        return False
    order = ring_after(schedule, old)  # sums travel it backwards
    return order.index(new.dst) < order.index(old.dst) and spare_link(schedule, steps[step], new)


def with_a_third_rank(schedule: Schedule, steps: Listed) -> Iterator[tuple[int, int, Transfer, int]]:
    for step, index in places(steps):
        old = steps[step][index]
        for rank in set(range(schedule.ranks)) - {old.src, old.dst}:
            yield step, index, old, rank


@uniform_plan
def test_a_wrong_receiver_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    for step, index, old, dst in some(with_a_third_rank(schedule, steps), schedule):
        new = old._replace(dst=dst)
        mutant = replaced(steps, step, index, new)
        if same_effect_to(schedule, steps, step, old, new):
            rebuilt(schedule, mutant).verify()
        else:
            refused(schedule, mutant)


@uniform_plan
def test_a_wrong_sender_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    for step, index, old, src in some(with_a_third_rank(schedule, steps), schedule):
        new = old._replace(src=src)
        mutant = replaced(steps, step, index, new)
        if same_effect_from(schedule, steps, step, old, new):
            rebuilt(schedule, mutant).verify()
        else:
            refused(schedule, mutant)


@every_plan
def test_a_wrong_shard_or_chunk_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    wrong = []
    for step, index in places(steps):
        old = steps[step][index]
        news = [old._replace(origin=origin) for origin in range(schedule.ranks)]
        news += [old._replace(chunk=chunk) for chunk in range(schedule.chunks)]
        wrong += [(step, index, new) for new in news if new != old]
    for step, index, new in some(wrong, schedule):
        refused(schedule, replaced(steps, step, index, new))


# --- two transfers in each other's step


def exchanged(steps: Listed, s: int, i: int, t: int, j: int) -> Listed:
    return replaced(replaced(steps, s, i, steps[t][j]), t, j, steps[s][i])


def same_effect_swapped(schedule: Schedule, s: int, a: Transfer, t: int, b: Transfer) -> bool:
    """Whether a (step s) and b (a later step t) can be exchanged.

    On rings b is a chunk, or a sum, that its sender does not have before step t, in whatever order others come: no.
    In a direct exchange all slices are there from the start, and each link carries one in a step: two slices that
    cross the same link in the same phase may change places, others would leave one link idle and overload another.
    """
    if schedule.rings:
        return False
    same_phase = in_first_phase(schedule, s) == in_first_phase(schedule, t)
    return same_phase and (a.src, a.dst) == (b.src, b.dst)


@uniform_plan
def test_two_transfers_exchanged_are_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    pairs = ((a, b) for a, b in combinations(places(steps), 2) if a[0] < b[0])
    for (s, i), (t, j) in some(pairs, schedule):
        mutant = exchanged(steps, s, i, t, j)
        if same_effect_swapped(schedule, s, steps[s][i], t, steps[t][j]):
            rebuilt(schedule, mutant).verify()
        else:
            refused(schedule, mutant)


@uniform_plan
def test_two_steps_exchanged(spec: str, collective: str, algorithm: str) -> None:
    """Whole steps: only those of one phase of a direct exchange may change places."""
    schedule = planned(spec, collective, algorithm)
    steps = listed(schedule)
    for s, t in some(combinations(range(len(steps)), 2), schedule):
        mutant = list(steps)
        mutant[s], mutant[t] = steps[t], steps[s]
        if not schedule.rings and in_first_phase(schedule, s) == in_first_phase(schedule, t):
            rebuilt(schedule, mutant).verify()
        else:
            refused(schedule, mutant)


# --- capacity


@every_plan
def test_half_the_capacity_is_refused(spec: str, collective: str, algorithm: str) -> None:
    schedule = planned(spec, collective, algorithm)
    assert schedule.capacity_share is not None
    half = schedule.capacity_share / 2
    mutant = Schedule.from_steps(schedule.topology, collective, schedule.steps, capacity_share=half)
    with pytest.raises(ScheduleError, match=r"link .* -> .* carries") as caught:
        mutant.verify()
    assert caught.value.step == 0 or algorithm == "hierarchical"  # whose first step carries less than others


def test_a_slow_link_may_carry_less() -> None:
    """One way of one link at half the rate: what all the others may carry is too much for it."""
    mesh = Topology.preset("full_mesh:3")
    links = [link if (link.source, link.target) != (1, 2) else type(link)(1, 2, 0.5) for link in mesh.links]
    slow = Topology("slow", 3, (), links)
    steps = plan(mesh, "allgather", "direct").steps
    Schedule.from_steps(slow, "allgather", steps, capacity_share=Fraction(1)).verify()
    with pytest.raises(ScheduleError, match="link 1 -> 2 carries") as caught:
        Schedule.from_steps(slow, "allgather", steps, capacity_share=Fraction(1, 2)).verify()
    assert caught.value.rank == 1


def test_forwarded_data_counts_on_every_link_of_its_way() -> None:
    """On a path 0 - 1 - 2 the link 1 -> 2 carries what comes from 1 and from 0."""
    line = Topology.preset("full_mesh:3").without_link(0, 2)
    steps = plan("full_mesh:3", "allgather", "direct", slices=1).steps
    Schedule.from_steps(line, "allgather", steps, capacity_share=Fraction(2)).verify()
    with pytest.raises(ScheduleError, match="carries"):
        Schedule.from_steps(line, "allgather", steps, capacity_share=Fraction(3, 2)).verify()


# --- a user's own


@pytest.mark.parametrize("n", [1, 2, 4, 8, 16])
def test_recursive_doubling_and_halving(n: int) -> None:
    mesh = Topology.preset(f"full_mesh:{n}")
    for collective, steps in (
        ("allgather", doubling_allgather(n)),
        ("reduce_scatter", backwards(doubling_allgather(n))),
        ("allreduce", [*backwards(doubling_allgather(n)), *doubling_allgather(n)]),
        ("allreduce", [*tree_reduce_scatter(n), *doubling_allgather(n)]),
    ):
        schedule = Schedule.from_steps(mesh, collective, steps)
        schedule.verify()
        assert [len(step) for step in schedule.steps] == [len(step) for step in steps]


@pytest.mark.parametrize("n", range(1, 10))
def test_tree_reduce_scatter(n: int) -> None:
    mesh = Topology.preset(f"full_mesh:{n}")
    Schedule.from_steps(mesh, "reduce_scatter", tree_reduce_scatter(n)).verify()
    for collective in ("allgather", "reduce_scatter", "allreduce"):
        trees(mesh, collective).verify()


def test_an_allreduce_must_reduce_first() -> None:
    mesh = Topology.preset("full_mesh:4")
    with pytest.raises(ScheduleError):
        Schedule.from_steps(mesh, "allreduce", [*doubling_allgather(4), *backwards(doubling_allgather(4))]).verify()
    with pytest.raises(ScheduleError, match="never receives"):
        Schedule.from_steps(mesh, "allreduce", backwards(doubling_allgather(4))).verify()


def test_users_weights() -> None:
    """Two rings, the second twice as wide: each link carries a third, or two."""
    steps = plan("full_mesh:3").steps
    topology = Topology.preset("full_mesh:3")
    shares = (Fraction(1, 3), Fraction(2, 3))
    wide = Schedule.from_steps(topology, "allgather", steps, weights=shares, capacity_share=Fraction(2, 3))
    assert wide.weights == shares
    wide.verify()
    with pytest.raises(ScheduleError, match="carries 2/3 of a shard, its share is 1/2"):
        Schedule.from_steps(topology, "allgather", steps, weights=shares, capacity_share=Fraction(1, 2)).verify()
    Schedule.from_steps(topology, "allgather", steps, weights=[0.25, 0.75]).verify()


def test_weights_without_a_small_common_denominator() -> None:
    """The product of these denominators does not fit into 64 bits."""
    parts = [Fraction(1, 100 * p) for p in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61)]
    shares = [*parts, 1 - sum(parts)]
    steps = [[(src, 1 - src, src, chunk, chunk) for src in (0, 1) for chunk in range(len(shares))]]
    pair = Topology.preset("full_mesh:2")
    Schedule.from_steps(pair, "allgather", steps, weights=shares, capacity_share=Fraction(1)).verify()
    with pytest.raises(ScheduleError, match="carries"):
        Schedule.from_steps(pair, "allgather", steps, weights=shares, capacity_share=Fraction(99, 100)).verify()


def test_no_steps_at_all() -> None:
    Schedule.from_steps(Topology.preset("full_mesh:1"), "allgather", []).verify()
    with pytest.raises(ScheduleError, match="never receives") as caught:
        Schedule.from_steps(Topology.preset("full_mesh:2"), "allgather", []).verify()
    assert (caught.value.step, caught.value.rank, caught.value.chunk) == (0, 0, 0)


@pytest.mark.parametrize(
    "steps, message",
    [
        ([[(0, 3, 0, 0, 0)]], "dst 3 is not one of the ranks 0 to 2"),
        ([[(-1, 1, 0, 0, 0)]], "src -1 is not one of the ranks"),
        ([[(0, 1, 7, 0, 0)]], "origin 7 is not one of the ranks"),
        ([[(1, 1, 0, 0, 0)]], "rank 1 sends to itself"),
        ([[(0, 1, 0, -1, 0)]], "chunk and ring must be >= 0"),
        ([[(0, 1, 0, 0, -1)]], "chunk and ring must be >= 0"),
        ([[(0, 1, 0, 0)]], "a transfer is"),
    ],
)
def test_transfers_that_name_nothing(steps: list[list[tuple[int, ...]]], message: str) -> None:
    with pytest.raises(ScheduleError, match=message) as caught:
        Schedule.from_steps(Topology.preset("full_mesh:3"), "allgather", steps)
    assert caught.value.step == 0


def test_an_all_to_all_has_one_chunk_for_each_rank() -> None:
    with pytest.raises(ScheduleError, match="one chunk per destination, 0 to 2"):
        Schedule.from_steps(Topology.preset("full_mesh:3"), "all_to_all", [[(0, 1, 0, 3, 0)]])


@pytest.mark.parametrize(
    "weights",
    [(Fraction(1, 2),), (Fraction(1, 2), Fraction(1, 3)), (Fraction(3, 2), Fraction(-1, 2)), (0.1, 0.2)],
)
def test_bad_weights(weights: tuple[Fraction, ...]) -> None:
    with pytest.raises(ArgumentError, match="weights must be 2 or more shares that add up to exactly 1"):
        Schedule.from_steps(Topology.preset("full_mesh:3"), "allgather", plan("full_mesh:3").steps, weights=weights)


def test_unknown_collective() -> None:
    with pytest.raises(CollectiveError, match="collective must be one of"):
        Schedule.from_steps(Topology.preset("full_mesh:3"), "gossip", [])
