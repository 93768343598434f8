"""A schedule carried out, proved or not: by the executor, over the in-process transport, against plain NumPy.

All ranks take turns in one thread, so that what waits in a circle is seen at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tasp_coll import Communicator, Schedule
from tasp_coll.core import SLOTS
from tasp_coll.executor import Exchange, Flow, Program
from tasp_coll.programs import ALIGN, all_to_all_program, gather_program
from tasp_coll.reduce_programs import reduce_program
from tasp_coll.reduction import reduction
from tasp_coll.transport.loopback import LoopbackTransport, LoopbackWorld

Memory = NDArray[Any]
_ITEM = 8  # bytes of an int64, whose sums are exact


class StuckError(Exception):
    """Ranks wait for each other in a circle, or for what nobody sends."""


def sizes_of(schedule: Schedule, rows: Sequence[int] | None = None) -> tuple[int, ...]:
    """Bytes of each rank's shard. rows None: as many for all, of which every chunk gets some."""
    least = 2 * ALIGN / float(min(weight for weight in schedule.weights if weight))
    unit = -(-int(least) // _ITEM) * _ITEM
    return (unit,) * schedule.ranks if rows is None else tuple(unit // 2 // _ITEM * _ITEM * row for row in rows)


def wrong(schedule: Schedule, sizes: Sequence[int]) -> str:
    """What is wrong with the results on all ranks; empty if nothing is."""
    try:
        given, expected = _data(schedule, sizes)
        results = _RUNS[schedule.collective](schedule, sizes, given)
    except Exception as error:  # of an unproved schedule anything may come
        return f"{type(error).__name__}: {error}"
    for rank, (found, right) in enumerate(zip(results, expected, strict=True)):
        if not np.array_equal(found, right):
            return f"rank {rank} has another result"
    return ""


def wrong_by_communicator(schedule: Schedule, sizes: Sequence[int]) -> str:
    """The same by what users call, each rank a thread, agreement and all."""
    given, expected = _data(schedule, sizes)
    collective = schedule.collective

    def one(transport: LoopbackTransport) -> Memory:
        with Communicator(transport, topology=schedule.topology, timeout=60) as comm:
            mine = given[comm.rank]
            if collective == "allgather":
                return np.asarray(comm.decomposed_allgatherv(mine, algorithm=schedule))
            if collective == "allreduce":
                return np.asarray(comm.decomposed_allreduce(mine, algorithm=schedule))
            counts = [size // _ITEM for size in sizes]
            return np.asarray(comm.decomposed_reduce_scatter(mine, counts=counts, algorithm=schedule))

    results = LoopbackWorld(schedule.ranks).run(one)
    same = all(np.array_equal(found, right) for found, right in zip(results, expected, strict=True))
    return "" if same else "a communicator has another result"


def _data(schedule: Schedule, sizes: Sequence[int]) -> tuple[list[Memory], list[Memory]]:
    """What each rank has, and what it must get: every element differs."""
    n, whole, collective = schedule.ranks, sum(sizes) // _ITEM, schedule.collective
    if collective == "allgather":
        mine = [np.arange(size // _ITEM) * n + rank + 1 for rank, size in enumerate(sizes)]
        return mine, [np.concatenate(mine)] * n
    if collective == "all_to_all":
        mine = [np.arange(whole) * n + rank + 1 for rank in range(n)]
        blocks = [each.reshape(n, -1) for each in mine]
        return mine, [np.concatenate([block[rank] for block in blocks]) for rank in range(n)]
    mine = [np.arange(whole) * 3 + (1 << (4 * rank)) for rank in range(n)]
    total = np.sum(mine, axis=0)
    if collective == "allreduce":
        return mine, [total] * n
    return mine, np.split(total, np.cumsum(sizes)[:-1] // _ITEM)


def _allgather(schedule: Schedule, sizes: Sequence[int], given: Sequence[Memory]) -> list[Memory]:
    out = [np.full(sum(sizes) // _ITEM, -1) for _ in given]
    _gather(schedule, sizes, given, out)
    return out


def _gather(schedule: Schedule, sizes: Sequence[int], given: Sequence[Memory], out: Sequence[Memory]) -> None:
    starts = (0, *accumulate(sizes))
    for rank, (mine, all_) in enumerate(zip(given, out, strict=True)):
        all_[starts[rank] // _ITEM : starts[rank + 1] // _ITEM] = mine
    programs = [gather_program(schedule, rank, sizes) for rank in range(schedule.ranks)]
    _together(programs, given, out)


def _reduce_scatter(schedule: Schedule, sizes: Sequence[int], given: Sequence[Memory]) -> list[Memory]:
    out = [np.full(size // _ITEM, -1) for size in sizes]
    how = reduction("sum", "int64", schedule.ranks)
    counts = [size // _ITEM for size in sizes]
    programs = [reduce_program(schedule, rank, counts, how) for rank in range(schedule.ranks)]
    _together(programs, given, out)
    return out


def _allreduce(schedule: Schedule, sizes: Sequence[int], given: Sequence[Memory]) -> list[Memory]:
    first, second = schedule.phases()
    return _allgather(second, sizes, _reduce_scatter(first, sizes, given))


def _all_to_all(schedule: Schedule, sizes: Sequence[int], given: Sequence[Memory]) -> list[Memory]:
    n = schedule.ranks
    out = [np.full_like(mine, -1) for mine in given]
    for rank in range(n):
        out[rank].reshape(n, -1)[rank] = given[rank].reshape(n, -1)[rank]
    block = given[0].nbytes // n
    _together([all_to_all_program(schedule, rank, block) for rank in range(n)], given, out)
    return out


_RUNS = {"allgather": _allgather, "reduce_scatter": _reduce_scatter, "allreduce": _allreduce, "all_to_all": _all_to_all}


def _together(programs: Sequence[Program], send: Sequence[Memory], recv: Sequence[Memory]) -> None:
    """Run one program on each rank to its end; StuckError if there is none."""
    world = LoopbackWorld(len(programs))
    flows, stages = [], []
    for transport, program, mine, out in zip(world.transports, programs, send, recv, strict=True):
        stages.append(np.full(program.stage_bytes, 0xA5, np.uint8))
        bases = {"send": mine.ctypes.data, "recv": out.ctypes.data, "stage": stages[-1].ctypes.data}
        flows.append(Flow(Exchange(program, transport, bases, 0, SLOTS)))
    open_ = [flow for flow in flows if not flow.done]
    while open_:
        moved = [flow.poll() or flow.done for flow in open_]
        open_ = [flow for flow in open_ if not flow.done]
        if not any(moved):
            raise StuckError(f"{len(open_)} of {len(flows)} ranks")
