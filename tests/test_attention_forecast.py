"""The model of attention's methods."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attention.forecast import (
    METHODS,
    Device,
    Links,
    Measured,
    Problem,
    Travel,
    ccr,
    forecast,
    overlapped,
    pairs,
    pipelined,
)
from attention.partition import Partition


def mesh(ranks: int, GBps: float = 1.0) -> Links:
    """Links of a full mesh: all rings and the direct exchange are n-1 times as fast as one ring."""

    def links(nbytes: int, algorithm: str, collective: str) -> Travel | None:
        if algorithm == "hierarchical":
            return None
        ring = (ranks - 1) * nbytes / (GBps * 1e9)
        return Travel(ring if algorithm == "ring" else ring / (ranks - 1), ranks - 1)

    return links


def test_overlap() -> None:
    """The ideal of ring attention: n-1 steps, each as long as the longer of its halves, after one's own block."""
    assert overlapped(8, 0.0, 7.0) == 7.0
    assert overlapped(8, 8.0, 7.0) == 8.0
    assert overlapped(8, 16.0, 7.0) == 16.0
    assert overlapped(1, 3.0, 0.0) == 3.0


def test_interference_is_paid_while_both_are_under_way() -> None:
    assert pipelined(7, 16.0, 7.0, 0.5) == pytest.approx(16.0 + 3.5)
    assert pipelined(7, 0.0, 7.0, 0.5) == 7.0, "there is nothing to slow down"


@pytest.mark.parametrize("window", [None, 1, 5, 100])
@pytest.mark.parametrize("causal", [True, False])
def test_pairs_are_counted(window: int | None, causal: bool) -> None:
    partition = Partition.of(40, 1, causal, (0, 13, 40))
    found = 0
    for first, last in ((0, 13), (13, 40)):
        for query in range(first, last):
            for key in range(first, query + 1 if causal else last):
                found += window is None or abs(query - key) < window
    assert pairs(partition.documents, causal, window) == found


def test_figures_of_a_problem() -> None:
    problem = Problem(8, 8 * 1024, 2, heads=16, kv_heads=4, head_dim=64, itemsize=2)
    assert problem.shard_bytes == 2 * 2 * 4 * 1024 * 64 * 2
    assert problem.gradient_bytes == 2 * problem.shard_bytes, "they add up in float32"
    assert problem.query_bytes == 2 * 16 * 1024 * 64 * 2
    assert problem.dealt_bytes == 2 * (16 + 8) * 2 * 64 * 2 * 1024, "each rank gets a head of keys, so some go twice"
    assert Problem(3, 10, heads=16).dealt_bytes is None
    assert Problem(3, 10).local == 4


def test_the_ideal_speedup_over_one_ring() -> None:
    """Section 8 of the design: 6.5, 2.69, 1.66 and 1.38 at CCR 0.1, 0.39, 0.65 and 0.80 on 8 ranks."""
    problem, links = Problem(8, 1 << 16), mesh(8)
    ring = links(problem.shard_bytes, "ring", "allgather")
    assert ring is not None
    for ratio, gain in ((0.1, 6.5), (0.39, 2.69), (0.65, 1.66), (0.8, 1.38), (1.17, 1.0)):
        computing = Measured(ratio * ring.seconds)
        assert ccr(problem, links, computing) == pytest.approx(ratio)
        one, all_rings = (forecast(problem, name, links, computing) for name in ("ring", "tasp"))
        assert one is not None
        assert all_rings is not None
        assert one.seconds / all_rings.seconds == pytest.approx(gain, rel=0.015)


problems = st.builds(
    Problem,
    ranks=st.integers(1, 64),
    tokens=st.integers(1, 1 << 20),
    batch=st.integers(1, 4),
    heads=st.sampled_from([8, 32, 64]),
    kv_heads=st.sampled_from([1, 8]),
    causal=st.booleans(),
    backward=st.booleans(),
    window=st.none() | st.integers(1, 1 << 16),
)
devices = st.builds(
    Device,
    flops=st.floats(1e9, 1e15),
    half=st.floats(0, 1e4),
    step_s=st.floats(0, 1e-3),
    memory_GBps=st.floats(1, 1e4),
)


@given(problems, devices, st.sampled_from(METHODS), st.floats(0, 1))
def test_no_method_is_faster_than_its_parts(problem: Problem, device: Device, method: str, interference: float) -> None:
    found = forecast(problem, method, mesh(problem.ranks), device, interference)
    if found is None:
        assert method in ("hierarchical", "ulysses")
        return
    for phase in found.phases:
        assert phase.seconds >= max(phase.compute_s, phase.links_s) * (1 - 1e-9)
        slowed = phase.compute_s + (1 + interference) * phase.links_s
        assert phase.seconds <= slowed * (1 + 1e-9), "never slower than one after the other"
        assert phase.exposed_s >= -1e-9 * phase.seconds
    assert len(found.phases) == 1 + problem.backward
    assert found.memory_bytes >= 0


@given(problems.filter(lambda problem: problem.ranks > 1), devices)
def test_all_rings_are_never_slower_than_one(problem: Problem, device: Device) -> None:
    one, all_rings = (forecast(problem, name, mesh(problem.ranks), device) for name in ("ring", "tasp"))
    assert one is not None
    assert all_rings is not None
    assert all_rings.seconds <= one.seconds * (1 + 1e-9)


def test_gathering_holds_what_grows_with_ranks() -> None:
    def held(method: str, ranks: int, backward: bool) -> int:
        found = forecast(
            Problem(ranks, 4096 * ranks, heads=64, backward=backward), method, mesh(ranks), Measured(1.0, 2.0)
        )
        assert found is not None
        return found.memory_bytes

    for backward in (False, True):
        assert held("tasp", 64, backward) == held("tasp", 8, backward) == held("ring", 8, backward)
        assert held("allgather", 64, backward) > 3 * held("allgather", 8, backward)
    shard = Problem(8, 4096 * 8, heads=64).shard_bytes
    assert held("tasp", 8, True) - held("tasp", 8, False) == 4 * shard, "six steps of keys in all: gradients in float32"
