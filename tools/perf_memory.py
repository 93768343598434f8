"""Where a bandwidth test keeps its elements and how it reads the clock: in host memory. `perf_device` is the GPU's."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any, NamedTuple, Protocol

import numpy as np

import perf_data
from perf_data import Dtype, NDArray, Source


class Elapsed(NamedTuple):
    """Seconds of an iteration: until its work was done, and until the host could go on."""

    total: float
    host: float


class Memory(Protocol):
    """What the loop needs of a kind of memory. Elements are unsigned integers of their width."""

    queues: bool  # calls come back before they are done, in the order in which they were made

    def zeros(self, count: int, bits: np.dtype[Any]) -> NDArray:
        """Fresh elements."""

    def face(self, dtype: Dtype, memory: NDArray) -> Any:
        """The memory as an array of this type, as a caller of tasp_coll has it."""

    def fill(self, memory: NDArray, source: Source) -> None:
        """Write the elements of `source`."""

    def spoil(self, memory: NDArray, source: Source) -> None:
        """Write elements of which each differs from the one in `source`."""

    def count_wrong(self, memory: NDArray, source: Source) -> int:
        """How many elements differ from those of `source`."""

    def settle(self) -> None:
        """Wait until all calls are done."""

    def repeated(self, run: Callable[[], None], times: int) -> Callable[[], None]:
        """`run` so often; where it can be, recorded now and repeated without the host."""

    def timed(self, run: Callable[[], None]) -> Elapsed:
        """One iteration."""


class HostMemory:
    """NumPy's."""

    queues = False

    def zeros(self, count: int, bits: np.dtype[Any]) -> NDArray:
        return np.zeros(count, bits)

    def face(self, dtype: Dtype, memory: NDArray) -> Any:
        return dtype.face(memory)

    def fill(self, memory: NDArray, source: Source) -> None:
        perf_data.fill(memory, source)

    def spoil(self, memory: NDArray, source: Source) -> None:
        perf_data.spoil(memory, source)

    def count_wrong(self, memory: NDArray, source: Source) -> int:
        return perf_data.count_wrong(memory, source)

    def settle(self) -> None:
        pass

    def repeated(self, run: Callable[[], None], times: int) -> Callable[[], None]:
        assert times == 1, "-G is for GPUs"
        return run

    def timed(self, run: Callable[[], None]) -> Elapsed:
        begun = perf_counter()
        run()
        seconds = perf_counter() - begun
        return Elapsed(seconds, seconds)
