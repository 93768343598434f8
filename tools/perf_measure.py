"""The measuring loop: all algorithms in one process, iteration by iteration in rotating order, and the check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import gcd
from typing import TYPE_CHECKING, Any

import numpy as np

import perf_data
from perf_algorithms import Algorithm, Ran
from perf_collective import Collective, Extent, Place
from perf_data import Dtype, NDArray, Pattern
from perf_memory import Memory
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
    memory: Memory
    progress: Callable[[], object] = lambda: None  # called after every round of the algorithms
    _send: NDArray = field(init=False, repr=False)
    _recv: NDArray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._send = self.memory.zeros(max(extent.sent for extent in self.extents), self.dtype.bits)
        self._recv = self.memory.zeros(max(extent.received for extent in self.extents), self.dtype.bits)

    def rounds(self) -> int:
        """How often `progress` will be called, at most."""
        return (1 + self.options.in_place) * len(self.extents) * (self.options.warmup + self.options.iters)

    def place(self, extent: Extent, in_place: bool) -> Place:
        """Memory for one size."""
        send, recv = self._send[: extent.sent], self._recv[: extent.received]
        if in_place:
            send, recv = self.collective.within(send, recv, self.world.rank, extent.count)
        faces = self.memory.face(self.dtype, send), self.memory.face(self.dtype, recv)
        return Place(self.dtype, send, recv, in_place, faces)

    def once(self, call: Call) -> None:
        """One call, to its end."""
        work = call()
        if self.options.queued:
            work.wait()
        self.memory.settle()

    def measure(self, number: int, in_place: bool, algorithms: Sequence[Algorithm]) -> dict[int, Trial]:
        """Extent `number`, by position in `algorithms`, less those that cannot work in place."""
        place = self.place(self.extents[number], in_place)
        bound = enumerate(algorithm.bind(place) for algorithm in algorithms)
        calls = {position: call for position, call in bound if call is not None}
        if in_place and self.collective.reduces:
            place.send.fill(0)  # sums of sums would grow until they overflow
        else:
            self.memory.fill(place.send, self._sent(number, 0))
        ran: dict[int, Ran] = {}
        for position, call in calls.items():
            self.once(call)
            ran[position] = algorithms[position].ran()
        times, host = self._time(list(calls.values()))
        trials: dict[int, Trial] = {}
        for (position, call), seen, gone in zip(calls.items(), times, host, strict=True):
            wrong = self._check(number, place, call) if self.options.check else None
            trials[position] = Trial(ran[position], Timing(seen, wrong, gone))
        return trials

    def _time(self, calls: Sequence[Call]) -> list[list[tuple[float, ...]]]:
        """Microseconds of a call, by call and iteration, on the slowest rank: until it is done, and of the host."""
        from mpi4py import MPI

        runs = [self._repeated(call) for call in calls]
        seconds = np.empty((2, len(calls), self.options.iters))
        for iteration in range(-self.options.warmup, self.options.iters):
            for position in turns(len(calls), iteration):
                self.world.Barrier()
                elapsed = self.memory.timed(runs[position])
                if iteration >= 0:
                    seconds[:, position, iteration] = elapsed
            self.progress()
        self.world.Allreduce(MPI.IN_PLACE, seconds, MPI.MAX)
        seconds *= 1e6 / (self.options.aggregate * max(self.options.graphs, 1))
        return [[tuple(row) for row in rows] for rows in seconds.tolist()]

    def _repeated(self, call: Call) -> Callable[[], None]:
        """One iteration of a call."""
        if not self.options.graphs:
            return lambda: self._run(call)
        self.world.Barrier()
        return self.memory.repeated(lambda: self._run(call), self.options.graphs)

    def _run(self, call: Call) -> None:
        """The calls of -m."""
        if self.options.queued:
            for work in [call() for _ in range(self.options.aggregate)]:
                work.wait()
            return
        for _ in range(self.options.aggregate):
            call()
            if self.options.blocking:
                self.memory.settle()

    def _check(self, number: int, place: Place, call: Call) -> int:
        """Wrong elements of one more call, over all ranks. Other data than before: what is left of that is wrong."""
        from mpi4py import MPI

        seed = 2 if place.in_place else 1
        pattern, extent, rank = self._pattern(number, seed), self.extents[number], self.world.rank
        expected = self.collective.received(pattern, extent, rank)
        self.memory.spoil(place.recv, expected)
        self.memory.fill(place.send, self._sent(number, seed))  # last: in place, it lies in recv or recv in it
        self.once(call)
        return self.world.allreduce(self.memory.count_wrong(place.recv, expected), MPI.SUM)

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
