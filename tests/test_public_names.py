"""The public names and how they are called: what users may rely on. A change here is a change for them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tasp_coll
from loopback_ranks import on_ranks
from tasp_coll import Communicator, Link, Ring, Rows, Schedule, Topology, Transfer

NAMES = """
    ArgumentError ArgumentTypeError CollectiveError Communicator CorruptionError Link LinkWarning MismatchError
    PeerTimeoutError Ring Rows Schedule ScheduleError Topology TopologyError Transfer all_to_all allgather_steps
    decompose decomposed_allgather decomposed_allgatherv decomposed_allreduce decomposed_reduce_scatter plan
    reduce_scatter_steps ring_neighbours
"""
SIGNATURES: list[tuple[Callable[..., Any], str]] = [
    (Communicator, "(group=None, *, topology=None, timeout=None, stream=None, gpu_transport=None, self_heal=False)"),
    (
        Communicator.decomposed_allgather,
        "(self, send, recv=None, *, algorithm='auto', rings=None, async_op=False)",
    ),
    (
        Communicator.decomposed_allgatherv,
        "(self, send, recv=None, *, algorithm='auto', rings=None, async_op=False)",
    ),
    (
        Communicator.decomposed_reduce_scatter,
        "(self, send, recv=None, *, op='sum', counts=None, algorithm='auto', rings=None, async_op=False)",
    ),
    (
        Communicator.decomposed_allreduce,
        "(self, send, recv=None, *, op='sum', algorithm='auto', rings=None, async_op=False)",
    ),
    (Communicator.all_to_all, "(self, send, recv=None, *, async_op=False)"),
    (
        Communicator.allgather_steps,
        "(self, send, *, algorithm='auto', rings=None, reverse=False, donate=False, align=1, stretch=0.05)",
    ),
    (
        Communicator.reduce_scatter_steps,
        "(self, recv, *, algorithm='auto', rings=None, accumulate=False, align=1, stretch=0.05)",
    ),
    (Communicator.close, "(self)"),
    (tasp_coll.decomposed_allgather, "(send, recv=None, *, comm=None, **options)"),
    (tasp_coll.decomposed_allgatherv, "(send, recv=None, *, comm=None, **options)"),
    (tasp_coll.decomposed_reduce_scatter, "(send, recv=None, *, comm=None, **options)"),
    (tasp_coll.decomposed_allreduce, "(send, recv=None, *, comm=None, **options)"),
    (tasp_coll.all_to_all, "(send, recv=None, *, comm=None, **options)"),
    (tasp_coll.allgather_steps, "(send, *, comm=None, **options)"),
    (tasp_coll.reduce_scatter_steps, "(recv, *, comm=None, **options)"),
    (Topology.preset, "(spec)"),
    (Topology.from_file, "(path)"),
    (Topology.save, "(self, path)"),
    (Topology.without_link, "(self, a, b)"),
    (Topology.allgather_bound, "(self, shard_bytes)"),
    (tasp_coll.decompose, "(topology, rings=None)"),
    (tasp_coll.ring_neighbours, "(topology, rank, rings=None)"),
    (
        tasp_coll.plan,
        "(topology, collective='allgather', algorithm='rings', rings=None, counts=None, *, slices=None, reverse=False)",
    ),
    (Schedule.from_steps, "(topology, collective, steps, *, weights=None, capacity_share=None)"),
    (Schedule.arrivals, "(self, rank, rows, align=1, stretch=0.05)"),
    (Schedule.verify, "(self, method='auto')"),
]


def bare(function: Callable[..., Any]) -> str:
    """Its signature without annotations."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=inspect.Parameter.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_names() -> None:
    assert sorted(tasp_coll.__all__) == sorted(NAMES.split())
    assert set(tasp_coll.__all__) <= set(dir(tasp_coll))
    for name in tasp_coll.__all__:
        assert getattr(tasp_coll, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'allgather'"):
        tasp_coll.allgather  # noqa: B018
    assert tasp_coll.__version__.count(".") == 2


@pytest.mark.parametrize("function, expected", SIGNATURES, ids=lambda value: getattr(value, "__qualname__", ""))
def test_signature(function: Callable[..., Any], expected: str) -> None:
    assert bare(function) == expected


def test_everything_public_is_annotated_and_described() -> None:
    for function, _ in SIGNATURES:
        found = inspect.signature(function)
        parameters = [p for p in found.parameters.values() if p.name != "self"]
        assert all(p.annotation is not inspect.Parameter.empty for p in parameters), function
        assert inspect.getdoc(function), function


def test_values() -> None:
    assert Transfer._fields == ("src", "dst", "origin", "chunk", "ring")
    assert Rows._fields == ("source", "ring", "start", "stop")
    assert [*inspect.signature(Ring).parameters] == ["ranks", "weight"]
    assert [*inspect.signature(Link).parameters] == ["source", "target", "GBps", "latency_us"]
    schedule, topology = tasp_coll.plan("full_mesh:3"), Topology.preset("full_mesh:3")
    assert schedule.topology == topology
    assert len(schedule.steps[0]) == len(topology.links) == 6
    with pytest.raises(AttributeError):
        schedule.collective = "allreduce"  # type: ignore[misc]


def test_errors_are_one_tree_and_also_what_python_calls_them() -> None:
    tree = {
        tasp_coll.ArgumentError: (tasp_coll.CollectiveError, ValueError),
        tasp_coll.ArgumentTypeError: (tasp_coll.ArgumentError, TypeError),
        tasp_coll.TopologyError: (tasp_coll.CollectiveError, ValueError),
        tasp_coll.ScheduleError: (tasp_coll.CollectiveError,),
        tasp_coll.MismatchError: (tasp_coll.CollectiveError,),
        tasp_coll.CorruptionError: (tasp_coll.CollectiveError,),
        tasp_coll.PeerTimeoutError: (tasp_coll.CollectiveError, TimeoutError),
        tasp_coll.LinkWarning: (UserWarning,),
    }
    for error, parents in tree.items():
        assert error.__bases__ == parents
    known = {value for value in vars(tasp_coll.errors).values() if isinstance(value, type)}
    raised = {value for value in known if issubclass(value, Exception)}
    assert raised == {tasp_coll.CollectiveError, *tree}


def test_functions_take_a_communicator_and_the_methods_options() -> None:
    def body(comm: Communicator) -> None:
        x = np.arange(4.0) + comm.rank
        options: dict[str, Any] = {"comm": comm, "algorithm": "ring"}
        assert (tasp_coll.decomposed_allgather(x, **options) == comm.decomposed_allgather(x)).all()
        assert (tasp_coll.decomposed_allgatherv(x, **options) == comm.decomposed_allgatherv(x)).all()
        assert (tasp_coll.decomposed_allreduce(x, op="max", **options) == comm.decomposed_allreduce(x, op="max")).all()
        part = tasp_coll.decomposed_reduce_scatter(x, counts=[4, 0], **options)
        assert (part == comm.decomposed_reduce_scatter(x, counts=[4, 0])).all()
        assert (tasp_coll.all_to_all(x, comm=comm) == comm.all_to_all(x)).all()
        assert len(list(tasp_coll.allgather_steps(x, reverse=True, **options))) == 2
        for request in tasp_coll.reduce_scatter_steps(x, **options):
            for chunk in request.chunks:
                chunk.data[...] = 1
        assert (x == 2).all()
        with pytest.raises(TypeError):
            tasp_coll.decomposed_allgather(x, comm=comm, algorythm="ring")

    on_ranks(2, body)


def test_a_communicator_describes_itself() -> None:
    def body(comm: Communicator) -> None:
        assert comm.size == comm.topology.ranks == 2
        assert comm.transport == "loopback"
        assert comm.usable
        assert repr(comm) == f"<Communicator rank {comm.rank} of 2, full_mesh:2, loopback>"

    on_ranks(2, body)
