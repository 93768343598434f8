"""A bandwidth test on doubles of CuPy and NCCL, as a script: `python perf_on_double.py all_gather_perf FLAGS`.

It is a world of one rank, as what the doubles are to several ranks is threads.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

import cupy_double
from nccl_double import Fabric


class Graph:
    """What a stream was given while it was captured: here, the very calls."""

    def __init__(self, calls: list[Callable[[], object]]) -> None:
        self._calls = calls

    def launch(self, stream: Any) -> None:
        cupy_double.Runtime.fabric.streams[stream.number, stream.ptr].extend(self._calls)


class Stream(cupy_double.Stream):
    def use(self) -> Stream:
        cupy_double.Runtime.local.stream = self
        return self

    def synchronize(self) -> None:
        cupy_double.drain(self.number, self.ptr)

    def begin_capture(self) -> None:
        self.synchronize()

    def end_capture(self) -> Graph:
        queue = cupy_double.Runtime.fabric.streams[self.number, self.ptr]
        calls = list(queue)
        queue.clear()
        return Graph(calls)  # type: ignore[arg-type]


class Event(cupy_double.Event):
    def synchronize(self) -> None:
        while not self.done:
            pass


def install() -> None:
    fabric = Fabric()
    cupy, nccl = cupy_double.modules(fabric)
    cupy_double.ndarray.set = lambda self, host: np.copyto(self, host)  # type: ignore[attr-defined]
    cupy_double.ndarray.get = lambda self: np.array(self)  # type: ignore[attr-defined]
    cupy_double.Device.use = lambda self: self.__enter__()  # type: ignore[attr-defined]
    cupy.zeros = lambda shape, dtype: cupy.empty(shape, dtype)
    cupy.cuda.__dict__.update(Stream=Stream, Event=Event, get_elapsed_time=lambda first, last: 0.25)
    cupy.cuda.runtime.__dict__.update(
        getDeviceCount=lambda: 1, getDeviceProperties=lambda number: {"name": b"a double"}
    )
    sys.modules.update({"cupy": cupy, "cupy.cuda": cupy.cuda, "cupy.cuda.nccl": nccl})


if __name__ == "__main__":
    install()
    tool = importlib.import_module(sys.argv[1])
    kind = next(kind for kind in vars(tool).values() if getattr(kind, "tool", "") == sys.argv[1])
    tool.perf.main(kind(), tool.__doc__, sys.argv[2:])
