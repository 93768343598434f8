"""Bandwidth of AllReduce (sums): the decomposition into link-disjoint rings beside a single ring, a direct exchange,
MPI_Allreduce and others.

    mpiexec -n 4 python tools/all_reduce_perf.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import perf
from perf_collective import Collective, Extent, Place, gloo_numbers, mpi_numbers
from perf_data import NDArray, Pattern, Source, indices

if TYPE_CHECKING:
    from mpi4py import MPI


class AllReduce(Collective):
    """The sum of all ranks' arrays on every rank."""

    tool, name = "all_reduce_perf", "allreduce"
    redop = "sum"
    size_means = "array of a rank, count = its elements"
    formula = "algbw * 2(n-1)/n"
    gathers, reduces = True, True

    def extent(self, size_bytes: int, itemsize: int, ranks: int) -> Extent:
        count = max(size_bytes // itemsize, 1)
        return Extent(count * itemsize, count, sent=count, received=count)

    def factor(self, ranks: int) -> float:
        return 2 * (ranks - 1) / ranks

    def within(self, send: NDArray, recv: NDArray, rank: int, count: int) -> tuple[NDArray, NDArray]:
        return recv, recv

    def sent(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        return lambda start, stop: pattern.sent(rank, indices(start, stop))

    def received(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        return lambda start, stop: pattern.total(indices(start, stop))

    def ours(self, comm: Any) -> Callable[..., Any]:
        method: Callable[..., Any] = comm.decomposed_allreduce
        return method

    def mpi4py(self, comm: MPI.Intracomm, place: Place) -> Callable[[], Any]:
        from mpi4py import MPI

        numbers, recv = mpi_numbers(place)
        send = MPI.IN_PLACE if place.in_place else numbers
        return lambda: comm.Allreduce(send, recv)

    def gloo(self, distributed: Any, place: Place) -> Callable[[], Any]:
        """In place is all that torch.distributed has: out of place is a copy and then that."""
        send, recv = gloo_numbers(place)
        if place.in_place:
            return lambda: distributed.all_reduce(recv)

        def copied() -> None:
            recv.copy_(send)
            distributed.all_reduce(recv)

        return copied


if __name__ == "__main__":
    perf.main(AllReduce(), __doc__)
