"""Which method `auto` takes."""

from __future__ import annotations

import pytest
import torch

from attention.choice import choose, rate_of, seconds
from attention.forecast import Problem
from attention.kv_bits import Bits
from attention.partition import Partition
from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator


def chosen(topology: str | None, rate: float, total: int = 1 << 18, heads: int = 7, kv_bits: str | None = None) -> str:
    ranks = 8

    def body(comm: Communicator) -> str:
        query = torch.empty(1, 1, 1, 1).expand(1, heads, total // ranks, 64)
        return choose(comm, Partition.of(total, ranks, True), None, query, query, rate, Bits.of(kv_bits))

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
