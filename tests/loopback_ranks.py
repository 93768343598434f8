"""Runs a function on every rank of a loopback world, as `mpiexec` would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from tasp_coll import CollectiveError, Communicator
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld

T = TypeVar("T")


def on_ranks(n: int, body: Callable[[Communicator], T], *, timeout: float = 20, **options: Any) -> list[T]:
    """body(communicator) on each of n ranks; the results by rank.

    If ranks raise, the others are told to stop waiting, and the cause is raised, not that they had to stop.
    """

    raised: list[BaseException] = []

    def one(transport: LoopbackTransport) -> T | None:
        try:
            with Communicator(transport, timeout=timeout, **options) as comm:
                return body(comm)
        except BaseException as error:
            raised.append(error)
            transport.alarm()
            return None

    found = LoopbackWorld(n).run(one)
    if raised:
        raise next((error for error in raised if not isinstance(error, CollectiveError)), raised[0])
    return found  # type: ignore[return-value]


def attempt(call: Callable[[], object]) -> BaseException | None:
    """What the call raised."""
    try:
        call()
    except Exception as error:
        return error
    return None
