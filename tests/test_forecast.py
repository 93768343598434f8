"""What `auto` takes where a topology is known: the fastest by the model, the simpler one of equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import tasp_coll.forecast
from tasp_coll import Link, Topology
from tasp_coll.forecast import TIE, Case, Choice, choose, fastest, forecasts
from tasp_coll.schedule import ALGORITHMS
from tasp_coll.simulate import LINKS_ALONE, Costs
from tasp_coll.tuning import Chooser, Situation, rule, stepwise

MIB = 1 << 20
TCP = Costs(message_us=50)
ALL = (*ALGORITHMS, "native")


def chosen(spec: str, shard_bytes: int, collective: str = "allgather", **options: Any) -> Choice:
    return choose(Case(Topology.preset(spec), collective, shard_bytes, **options))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[Any]]:
    """Counts the calls of a function of the module."""

    def count(name: str) -> list[Any]:
        calls: list[Any] = []
        real = getattr(tasp_coll.forecast, name)

        def spy(*args: Any, **options: Any) -> Any:
            calls.append(args)
            return real(*args, **options)

        monkeypatch.setattr(tasp_coll.forecast, name, spy)
        return calls

    return count


@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter", "allreduce"])
@pytest.mark.parametrize("size", [MIB, 64 * MIB])
def test_presets(collective: str, size: int) -> None:
    """By links alone."""
    assert chosen("nvswitch:8", size, collective) == Choice("ring")
    assert chosen("mi300x", size, collective) == Choice("rings")
    assert chosen("full_mesh:4", size, collective) == Choice("rings")
    for spec in ("cluster:2x4", "cluster:3x3", "dgx_h100:2"):
        assert chosen(spec, size, collective).algorithm == "hierarchical"


def test_two_ranks_and_one() -> None:
    assert chosen("full_mesh:2", MIB) == chosen("full_mesh:1", MIB) == Choice("ring")


def test_software_makes_few_messages_pay() -> None:
    """On a mesh a direct exchange has the fewest, until links take so long that messages do not matter."""
    slow = Topology("slow", 8, (), tuple(Link(a, b, 0.01) for a in range(8) for b in range(8) if a != b))
    found = [choose(Case(slow, "allgather", 4**power, costs=TCP)).algorithm for power in (7, 9, 11, 13)]
    assert found == ["direct", "direct", "rings", "rings"]


def test_small_shards_go_as_the_mpi_library_sends_them() -> None:
    """In log n messages."""
    assert chosen("nvswitch:8", 16_384, costs=TCP) == Choice("native")
    ours = chosen("nvswitch:8", 16_384, costs=TCP, algorithms=ALGORITHMS)
    assert ours.algorithm in ("ring", "direct")


def test_halves_are_sent_as_they_are_by_a_direct_exchange_only() -> None:
    for collective in ("reduce_scatter", "allreduce"):
        assert chosen("nvswitch:8", 64 * MIB, collective, algorithms=ALGORITHMS, half=True).algorithm == "direct"
    assert chosen("nvswitch:8", 64 * MIB, "allgather", half=True).algorithm == "ring"


@pytest.mark.parametrize("spec", ["full_mesh:8", "nvswitch:8", "torus:4x4", "hypercube:3", "cluster:2x4", "dgx_h100:2"])
@pytest.mark.parametrize("size", [1 << 10, 1 << 16, 1 << 22])
@pytest.mark.parametrize("costs", [LINKS_ALONE, TCP])
def test_the_choice_is_a_forecast_and_none_is_much_faster(spec: str, size: int, costs: Costs) -> None:
    case = Case(Topology.preset(spec), "allgather", size, ALL, costs=costs)
    found = forecasts(case)
    best = fastest(found)
    assert choose(case) == best.choice
    assert best.prediction.seconds <= (1 + TIE) * min(each.prediction.seconds for each in found)
    assert all(each.prediction.seconds >= case.topology.allgather_bound(size) * (1 - 1e-9) for each in found)
    assert all(each.prediction.seconds > best.prediction.seconds for each in found[: found.index(best)])


def test_what_cannot_be_planned_is_left_out() -> None:
    found = {each.choice.algorithm for each in forecasts(Case(Topology.preset("full_mesh:8"), "allgather", MIB))}
    assert found == {"ring", "rings", "direct", "native"}
    only = forecasts(Case(Topology.preset("cluster:2x4"), "allgather", MIB, ("hierarchical",)))
    assert [each.choice.algorithm for each in only] == ["hierarchical"]


# --- what it costs to ask


def test_a_size_is_looked_at_once_for_its_power_of_two(counted: Callable[[str], list[Any]]) -> None:
    calls, topology = counted("forecasts"), Topology.preset("torus:3x4")
    sizes = [2**20 + 1, 2**20 + 2, 3 * 2**19, 2**21]
    assert len({choose(Case(topology, "allgather", size)) for size in sizes}) == 1
    assert len(calls) == 1
    choose(Case(topology, "allgather", 2**21 + 1))
    assert len(calls) == 2


@pytest.mark.parametrize("spec", ["full_mesh:4098", "nvswitch:3000"])
@pytest.mark.parametrize("collective", ["allgather", "reduce_scatter", "allreduce"])
def test_thousands_of_ranks_make_no_plans(spec: str, collective: str, counted: Callable[[str], list[Any]]) -> None:
    plans, simulated = counted("plan"), [*map(counted, ("predict", "predict_native"))]
    topology = Topology.preset(spec)
    best = "ring" if topology.switches else "rings"
    assert choose(Case(topology, collective, 1 << 30, ("ring", "rings", "direct", "native"))).algorithm == best
    assert choose(Case(topology, collective, 64, ("ring", "rings", "direct", "native"), costs=TCP)).algorithm != "rings"
    assert plans == []
    assert simulated == [[], []]


@pytest.mark.parametrize("spec", ["cluster:256x8", "dgx_h100:256", "nvl72:28"])
def test_thousands_of_ranks_on_nodes_neither(spec: str, counted: Callable[[str], list[Any]]) -> None:
    plans, topology = counted("plan"), Topology.preset(spec)
    for collective in ("allgather", "reduce_scatter", "allreduce"):
        found = forecasts(Case(topology, collective, MIB, ALL))
        assert {each.choice.algorithm for each in found} == set(ALL)
        bound = topology.allgather_bound(MIB) * (2 if collective == "allreduce" else 1)
        assert all(each.prediction.seconds >= bound * (1 - 1e-9) for each in found)
        assert fastest(found).choice.algorithm in ("rings", "hierarchical")
    assert plans == []


def test_a_torus_of_thousands_of_ranks() -> None:
    """Rings on all links reach the bound; a direct exchange is nowhere near it."""
    topology = Topology.preset("torus:8x16x16")
    for collective, phases in (("allgather", 1), ("reduce_scatter", 1), ("allreduce", 2)):
        found = {each.choice.algorithm: each.prediction for each in forecasts(Case(topology, collective, MIB, ALL))}
        bound = phases * topology.allgather_bound(MIB)
        assert set(found) == {"ring", "rings", "direct", "native"}
        assert found["rings"].seconds == pytest.approx(bound)
        assert found["ring"].seconds == pytest.approx(6 * bound)
        assert found["native"].seconds >= found["ring"].seconds * (1 - 1e-9)
        assert found["direct"].seconds == pytest.approx(phases * 2048 / 16 * 64 / 2 * MIB / 1e9)


def test_where_nothing_can_be_said_the_exchange_is_direct() -> None:
    links = [Link(r, (r + step) % 200, 1.0 + r) for r in range(200) for step in (1, 7)]
    found = choose(Case(Topology("odd", 200, (), tuple(links)), "allgather", MIB, ("direct", "native")))
    assert found == Choice("direct", None, 1)


# --- the rule around it


def situation(spec: str, given: bool = True, native: bool = True) -> Situation:
    return Situation(Topology.preset(spec), given, 1, native)


def test_nothing_is_predicted_where_no_topology_is_known(counted: Callable[[str], list[Any]]) -> None:
    calls = counted("forecasts")
    for size in (1, MIB):
        assert rule(situation("full_mesh:8", given=False), "allgather", size, False, TCP) == Choice("native")
        assert rule(situation("full_mesh:8", False, False), "allgather", size, False, TCP) == Choice("direct", None, 1)
        assert rule(situation("full_mesh:8", False), "allreduce", size, True, TCP) == Choice("direct", None, 7)
    assert calls == []


def test_an_allgather_in_shared_memory_is_a_direct_exchange_between_few_ranks() -> None:
    few, many = (replace(situation(f"full_mesh:{n}", given=False), shared=True) for n in (4, 64))
    assert rule(few, "allgather", MIB, False, TCP) == Choice("direct", None, 1)
    assert rule(few, "allreduce", MIB, False, TCP) == Choice("native")
    assert rule(many, "allgather", MIB, False, TCP) == Choice("native")


def test_the_rule_does_without_what_the_transport_has_not() -> None:
    assert rule(situation("nvswitch:8"), "allgather", 16_384, False, TCP) == Choice("native")
    assert rule(situation("nvswitch:8", native=False), "allgather", 16_384, False, TCP).algorithm != "native"
    assert rule(situation("nvswitch:8"), "allreduce", 16_384, True, TCP).algorithm != "native"


def test_a_measured_table_wins_and_costs_travel_with_it() -> None:
    chooser = Chooser((("allgather", MIB, Choice("direct", None, 1)),), Costs(7.5, ranks_per_core=4))
    assert Chooser.load(chooser.dump()) == chooser
    assert chooser.choose(situation("nvswitch:8"), "allgather", MIB, False) == Choice("direct", None, 1)
    assert chooser.choose(situation("nvswitch:8"), "reduce_scatter", 64 * MIB, False) == Choice("ring")


@pytest.mark.parametrize(
    "spec, mirrored, forward",
    [
        ("full_mesh:8", "rings", "rings"),
        ("nvswitch:8", "ring", "ring"),
        ("cluster:2x4", None, "hierarchical"),
        ("torus:4x4", None, None),
    ],
)
def test_steps_go_by_the_links_alone(spec: str, mirrored: str | None, forward: str | None) -> None:
    both_ways = stepwise(Topology.preset(spec), ("auto", "rings", "ring", "direct"))
    assert both_ways == mirrored or (mirrored is None and both_ways in ("rings", "ring", "direct"))
    found = stepwise(Topology.preset(spec), ("auto", "rings", "ring", "direct", "hierarchical"))
    assert found == (forward or both_ways)
