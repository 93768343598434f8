"""The collectives as functions, on a communicator that is given or on the world of all MPI ranks."""

from __future__ import annotations

from typing import Any

from tasp_coll.communicator import Communicator
from tasp_coll.streams import GatherStream, ReduceStream

_world: Communicator | None = None


def world() -> Communicator:
    """The communicator of all MPI ranks that the functions use when they are given none."""
    global _world
    if _world is None or not _world.usable:
        _world = Communicator()
    return _world


def _of(comm: Communicator | None) -> Communicator:
    return world() if comm is None else comm


def decomposed_allgather(send: Any, recv: Any = None, *, comm: Communicator | None = None, **options: Any) -> Any:
    """`Communicator.decomposed_allgather` on `comm`; None is the world."""
    return _of(comm).decomposed_allgather(send, recv, **options)


def decomposed_allgatherv(send: Any, recv: Any = None, *, comm: Communicator | None = None, **options: Any) -> Any:
    """`Communicator.decomposed_allgatherv` on `comm`; None is the world."""
    return _of(comm).decomposed_allgatherv(send, recv, **options)


def decomposed_reduce_scatter(send: Any, recv: Any = None, *, comm: Communicator | None = None, **options: Any) -> Any:
    """`Communicator.decomposed_reduce_scatter` on `comm`; None is the world."""
    return _of(comm).decomposed_reduce_scatter(send, recv, **options)


def decomposed_allreduce(send: Any, recv: Any = None, *, comm: Communicator | None = None, **options: Any) -> Any:
    """`Communicator.decomposed_allreduce` on `comm`; None is the world."""
    return _of(comm).decomposed_allreduce(send, recv, **options)


def all_to_all(send: Any, recv: Any = None, *, comm: Communicator | None = None, **options: Any) -> Any:
    """`Communicator.all_to_all` on `comm`; None is the world."""
    return _of(comm).all_to_all(send, recv, **options)


def allgather_steps(send: Any, *, comm: Communicator | None = None, **options: Any) -> GatherStream:
    """`Communicator.allgather_steps` on `comm`; None is the world."""
    return _of(comm).allgather_steps(send, **options)


def reduce_scatter_steps(recv: Any, *, comm: Communicator | None = None, **options: Any) -> ReduceStream:
    """`Communicator.reduce_scatter_steps` on `comm`; None is the world."""
    return _of(comm).reduce_scatter_steps(recv, **options)
