"""The measuring loop: all algorithms in one process, iteration by iteration in rotating order, and the check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import perf_data
from perf_algorithms import Algorithm, Ran
from perf_collective import Collective, Extent, Place
from perf_data import Dtype, NDArray, Pattern
from perf_options import Options
from perf_report import Timing

if TYPE_CHECKING:
    from mpi4py import MPI

Call = Callable[[], Any]


@dataclass(frozen=True)
class Trial:
    """One algorithm at one size: what carried it out, and its times."""

    ran: Ran
    timing: Timing


@dataclass
class Bench:
    """Memory for the largest size, and the loops. What it does is collective."""

    collective: Collective
    world: MPI.Intracomm
    options: Options
    dtype: Dtype
    extents: Sequence[Extent]
    progress: Callable[[], object] = lambda: None  # called after every round of the algorithms
    _send: NDArray = field(init=False, repr=False)
    _recv: NDArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._send = np.zeros(max(extent.sent for extent in self.extents), self.dtype.bits)
        self._recv = np.zeros(max(extent.received for extent in self.extents), self.dtype.bits)

    def rounds(self) -> int:
        """How often `progress` will be called, at most."""
        return (1 + self.options.in_place) * len(self.extents) * (self.options.warmup + self.options.iters)

    def place(self, extent: Extent, in_place: bool) -> Place:
        """Memory for one size."""
        send, recv = self._send[: extent.sent], self._recv[: extent.received]
        if in_place:
            send, recv = self.collective.within(send, recv, self.world.rank, extent.count)
        return Place(self.dtype, send, recv, in_place)

    def once(self, call: Call) -> None:
        """One call, to its end."""
        work = call()
        if self.options.queued:
            work.wait()

    def measure(self, number: int, in_place: bool, algorithms: Sequence[Algorithm]) -> dict[int, Trial]:
        """Extent `number`, by position in `algorithms`, less those that cannot work in place."""
        place = self.place(self.extents[number], in_place)
        bound = enumerate(algorithm.bind(place) for algorithm in algorithms)
        calls = {position: call for position, call in bound if call is not None}
        if in_place and self.collective.reduces:
            place.send.fill(0)  # sums of sums would grow until they overflow
        else:
            perf_data.fill(place.send, self._sent(number, 0))
        ran: dict[int, Ran] = {}
        for position, call in calls.items():
            self.once(call)
            ran[position] = algorithms[position].ran()
        times = self._time(list(calls.values()))
        trials: dict[int, Trial] = {}
        for (position, call), seen in zip(calls.items(), times, strict=True):
            wrong = self._check(number, place, call) if self.options.check else None
            trials[position] = Trial(ran[position], Timing(seen, wrong))
        return trials

    def _time(self, calls: Sequence[Call]) -> list[tuple[float, ...]]:
        """Microseconds of a call: of each of `calls` and iteration, on the slowest rank."""
        from mpi4py import MPI

        seconds = np.empty((len(calls), self.options.iters))
        for iteration in range(-self.options.warmup, self.options.iters):
            for position in turns(len(calls), iteration):
                self.world.Barrier()
                begun = perf_counter()
                self._run(calls[position])
                ended = perf_counter()
                if iteration >= 0:
                    seconds[position, iteration] = ended - begun
            self.progress()
        self.world.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        return [tuple(row) for row in (seconds * (1e6 / self.options.aggregate)).tolist()]

    def _run(self, call: Call) -> None:
        """One iteration."""
        if self.options.queued:
            for work in [call() for _ in range(self.options.aggregate)]:
                work.wait()
        else:
            for _ in range(self.options.aggregate):
                call()

    def _check(self, number: int, place: Place, call: Call) -> int:
        """Wrong elements of one more call, over all ranks. Other data than before: what is left of that is wrong."""
        from mpi4py import MPI

        seed = 2 if place.in_place else 1
        pattern, extent, rank = self._pattern(number, seed), self.extents[number], self.world.rank
        expected = self.collective.received(pattern, extent, rank)
        perf_data.spoil(place.recv, expected)
        perf_data.fill(place.send, self._sent(number, seed))  # last: in place, it lies in recv or recv in it
        self.once(call)
        return self.world.allreduce(perf_data.count_wrong(place.recv, expected), MPI.SUM)

    def _pattern(self, number: int, seed: int) -> Pattern:
        return Pattern(self.dtype, self.world.size, 3 * number + seed, self.collective.reduces)

    def _sent(self, number: int, seed: int) -> perf_data.Source:
        return self.collective.sent(self._pattern(number, seed), self.extents[number], self.world.rank)


def turns(count: int, iteration: int) -> list[int]:
    """The order of `count` algorithms in an iteration: each is first, second ... last equally often.

    The stride changes from round to round, so that none always follows the same other one, whose threads may still
    be at work, or whose data is in the caches.
    """
    strides = [stride for stride in range(1, count + 1) if gcd(stride, count) == 1]
    stride = strides[iteration // count % len(strides)]
    return [(turn * stride + iteration) % count for turn in range(count)]
