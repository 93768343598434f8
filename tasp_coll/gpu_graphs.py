"""Calls that are repeated with the same arrays, as CUDA graphs: captured at the second, launched as one from then on.

The agreement stays: each rank says with it whether it has seen the call's addresses before, or has the graph already.
All ranks replay, or all capture, or none does, so that a graph never meets single launches; and a wrong call is
an error on all ranks, never a hang. What a replay saves is all that comes after: Python, and a launch for each step.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Hashable
from typing import Any

from tasp_coll.agreement import Header
from tasp_coll.core import Core
from tasp_coll.device import OnGpu
from tasp_coll.graphs import NEW, SEEN

_SAY = b"captured".ljust(16)
Give = Callable[[Any, Callable[[int], int]], None]  # to a stream, with a function that makes staging memory


def launch(core: Core, gpu: OnGpu, key: Hashable, give: Give) -> Generator[bool, None, bool]:
    """Launch the call as a graph if all ranks can; whether they could. Collective, after the agreement."""
    graphs = core.graphs
    ready = min(header.place for header in core.rounds.headers())
    if ready == NEW:
        graphs.note(key)
        return False
    if ready == SEEN and not (yield from _capture(core, gpu, key, give)):
        return False
    with gpu.device.giving():
        graphs[key].launch(gpu.stream)
    return True


def _capture(core: Core, gpu: OnGpu, key: Hashable, give: Give) -> Generator[bool, None, bool]:
    """Capture where that has not been done; whether it went well on all ranks. If not, nobody tries again."""
    graphs = core.graphs
    why: BaseException | None = None
    if key not in graphs:
        try:
            graphs.keep(key, gpu.device.capture(lambda stream: _give_once(give, gpu, stream)))
        except Exception as error:  # of CUDA or of NCCL, whatever the driver says
            why = error
    core.rounds.post(Header(_SAY, place=int(why is None)).packed())
    while not core.rounds.poll():
        yield False
    refused = [rank for rank, header in enumerate(core.rounds.headers()) if header.place != 1]
    if refused:
        graphs.off = True
        graphs.clear()
        told = f"rank {refused[0]}" if why is None else f"this rank: {why}"
        warnings.warn(f"tasp_coll: no CUDA graphs, calls are launched step by step (refused on {told})", stacklevel=2)
    return not refused


def _give_once(give: Give, gpu: OnGpu, stream: Any) -> None:
    """With staging memory from the graph's own pool, which stays its own once it is given back there."""
    held: list[Any] = []

    def stage(nbytes: int) -> int:
        held.append(gpu.device.memory(nbytes, stream))
        return int(held[-1].address)

    give(stream, stage)
