"""Which method `auto` takes."""

from __future__ import annotations

import pytest
import torch

import tasp_coll
from attention.choice import Call, peak_of, rate_of, seconds
from attention.forecast import Problem
from attention.kv_bits import Bits
from attention.partition import STRETCH, Partition
from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator


def call(
    comm: Communicator,
    total: int,
    heads: int = 7,
    kv_bits: str | None = None,
    causal: bool = True,
    window: int | None = None,
) -> Call:
    query = torch.empty(1, 1, 1, 1).expand(1, heads, total // comm.size, 64)
    return Call.of(comm, Partition.of(total, comm.size, causal), window, query, query, Bits.of(kv_bits))


def chosen(topology: str | None, rate: float, total: int = 1 << 18, heads: int = 7, kv_bits: str | None = None) -> str:
    ranks = 8

    def body(comm: Communicator) -> str:
        return call(comm, total, heads, kv_bits).method(rate)

    found = on_ranks(ranks, body, topology=topology)
    assert len(set(found)) == 1, "all ranks alike"
    return found[0]


def test_all_rings_where_links_are_the_limit() -> None:
    assert chosen("full_mesh:8", 1e16) == "tasp"
    assert chosen("full_mesh:8", 1e16, heads=8) == "ulysses", "which moves less where heads divide"


def test_one_ring_where_it_hides_or_nothing_is_faster() -> None:
    assert chosen("full_mesh:8", 1e12) == "ring"
    assert chosen("nvswitch:8", 1e16) == "ring"


def test_few_bits_are_hidden_sooner_and_heads_are_not_dealt_out() -> None:
    assert chosen("full_mesh:8", 1e16, heads=8, kv_bits="dynamic") == "tasp"
    assert chosen("full_mesh:8", 5e13) == "tasp"
    assert chosen("full_mesh:8", 5e13, kv_bits="dynamic") == "ring"


def test_without_a_topology_nothing_is_known_of_links() -> None:
    assert chosen(None, 1e16) == "ring"


def test_gathering_is_for_short_sequences() -> None:
    def model(nbytes: int, algorithm: str) -> float:
        return 1.0

    def methods(ranks: int, tokens: int, heads: int) -> set[str]:
        return set(seconds(model, Problem(ranks, tokens, heads=heads, kv_heads=heads), 1.0))

    assert methods(4, 1 << 10, 7) == {"ring", "tasp", "allgather"}
    assert methods(4, 1 << 20, 8) == {"ring", "tasp", "ulysses"}
    assert methods(1, 1 << 20, 8) == set()


@pytest.mark.parametrize(
    "topology, method, peak, stretch",
    [
        ("full_mesh:8", "tasp", 1e15, 0.05),
        ("full_mesh:8", "tasp", 1e8, 1.0),
        ("full_mesh:8", "ring", 1e8, 0.05),
        (None, "tasp", 1e8, 0.05),
    ],
    ids=["links are the limit", "hidden", "whole shards", "unknown links"],
)
def test_chunks_are_longer_where_computing_hides_it(
    topology: str | None, method: str, peak: float, stretch: float
) -> None:
    found = on_ranks(8, lambda comm: call(comm, 1 << 12).stretch(method, peak, False), topology=topology)
    assert found == [stretch] * 8


def test_chunks_are_longer_by_as_much_as_is_hidden() -> None:
    def body(comm: Communicator) -> tuple[float, ...]:
        asked = call(comm, 1 << 18)
        moved = comm.predicted_seconds(asked.problem.wire_bytes, "rings")
        assert moved is not None
        peak = asked.operations / comm.size / (1.5 * moved / (comm.size - 1))  # computing a step takes half longer
        found = [asked.stretch("tasp", peak / factor, False) for factor in (0.5, 0.99, 1.01, 2)]
        others = call(comm, 1 << 18, causal=False), call(comm, 1 << 18, window=1 << 18)
        found += [other.stretch("tasp", peak / 2, False) for other in others]
        # Few bits forward, float32 backward.
        few = call(comm, 1 << 18, kv_bits="dynamic:2")
        return (*found, *(few.stretch("tasp", 2 * peak, backward) for backward in (False, True)))

    assert on_ranks(4, body, topology="full_mesh:4") == [(0.05, 0.25, 0.5, 1.0, 0.05, 0.05, 1.0, 0.5)] * 4
    assert on_ranks(1, lambda comm: call(comm, 8).stretch("tasp", 1.0, True)) == [0.05]


def test_the_usual_stretch_is_that_of_streams() -> None:
    assert STRETCH == tasp_coll.schedule.STRETCH


def test_peaks_are_not_measured() -> None:
    query = torch.zeros(1, 1, 4, 16)
    assert peak_of(query) == torch.get_num_threads() * 2**37 > rate_of(query)
    assert peak_of(query.to(torch.bfloat16)) > peak_of(query)
    assert peak_of(query.to("meta")) > 1e15


def test_rate_is_measured_once() -> None:
    query = torch.zeros(1, 1, 4, 16)
    assert rate_of(query) == rate_of(query) > 0


def test_predicted_seconds() -> None:
    def body(comm: Communicator) -> None:
        ring, rings = (comm.predicted_seconds(7 << 20, name) for name in ("ring", "rings"))
        assert ring is not None
        assert rings is not None
        assert ring / rings == pytest.approx(comm.size - 1, rel=0.05)
        assert comm.predicted_seconds(7 << 20) == pytest.approx(rings, rel=0.05)
        assert comm.predicted_seconds(7 << 20, "hierarchical") is None
        both = comm.predicted_seconds(7 << 20, "rings", collective="allreduce")
        assert both == pytest.approx(2 * rings, rel=0.05)
        for arguments in ((-1,), (1.5,), (1, "best")):
            assert isinstance(attempt(lambda arguments=arguments: comm.predicted_seconds(*arguments)), ArgumentError)

    on_ranks(4, body, topology="full_mesh:4")
    assert on_ranks(2, lambda comm: comm.predicted_seconds(1)) == [None, None]
