"""Measures the algorithms of a communicator against each other, for `Communicator.tune`."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tasp_coll.errors import ArgumentError, CollectiveError
from tasp_coll.forecast import NATIVE, Choice
from tasp_coll.schedule import ALGORITHMS
from tasp_coll.tuning import TUNED_COLLECTIVES, Chooser

if TYPE_CHECKING:
    from tasp_coll.communicator import Communicator

SIZES = (1 << 10, 1 << 13, 1 << 16, 1 << 19, 1 << 22)


def measure(comm: Communicator, sizes: Sequence[int] | None, repeats: int) -> Chooser:
    """Time every algorithm that runs here, interleaved, and keep the one with the least median of the slowest rank."""
    wanted = SIZES if sizes is None else tuple(sizes)
    if not wanted or not all(type(number) is int and number > 0 for number in (*wanted, repeats)):
        raise ArgumentError(f"sizes and repeats must be integers > 0, got {sizes!r} and {repeats!r}")
    wanted = tuple(sorted(wanted))
    table = []
    for collective in TUNED_COLLECTIVES:
        for size in wanted:
            table.append((collective, size, _fastest(comm, collective, size, repeats)))
    return Chooser(tuple(table))


def _fastest(comm: Communicator, collective: str, size: int, repeats: int) -> Choice:
    calls: dict[Choice, Callable[[], Any]] = {}
    for algorithm in (*ALGORITHMS, NATIVE):
        call = _call(comm, collective, size, algorithm)
        try:
            call()  # plans, and warms up; what cannot run here is refused on all ranks alike
        except CollectiveError:
            comm._core.engine.check()  # unless it broke the communicator
            continue
        choice = comm.last_choice
        assert choice is not None
        calls[choice] = call
    if not calls:
        raise CollectiveError(
            f"tune: no algorithm ran for {collective} of {size} bytes; were all ranks given this size?"
        )
    times: dict[Choice, list[float]] = {choice: [] for choice in calls}
    order = list(calls)
    for turn in range(repeats):
        for place in range(len(order)):
            choice = order[(turn + place) % len(order)]
            times[choice].append(_time(comm, calls[choice]))
    mine = np.array([times[choice] for choice in order])
    slowest = comm.decomposed_allreduce(mine, op="max", algorithm="direct")
    return order[int(np.median(slowest, axis=1).argmin())]  # the same figures on all ranks, so the same choice


def _call(comm: Communicator, collective: str, size: int, algorithm: str) -> Callable[[], Any]:
    count = max(size // 4, 1)
    shard, full = np.zeros(count, np.float32), np.zeros(count * comm.size, np.float32)
    method = getattr(comm, f"decomposed_{collective}")
    send, recv = {
        "allgather": (shard, full),
        "reduce_scatter": (full, shard),
        "allreduce": (full, full.copy()),
    }[collective]
    return lambda: method(send, recv, algorithm=algorithm)


def _time(comm: Communicator, call: Callable[[], Any]) -> float:
    comm.decomposed_allreduce(np.zeros(1, np.int8))
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
