"""Bandwidth of ReduceScatter (sums): the decomposition into link-disjoint rings beside a single ring, a direct
exchange, MPI_Reduce_scatter_block and others.

    mpiexec -n 4 python tools/reduce_scatter_perf.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import perf
from perf_collective import Collective, Extent, Place, gloo_numbers, mpi_numbers
from perf_data import NDArray, Pattern, Source, indices

if TYPE_CHECKING:
    from mpi4py import MPI


class ReduceScatter(Collective):
    """This rank's part of the sum over all ranks' arrays."""

    tool, name = "reduce_scatter_perf", "reduce_scatter"
    redop = "sum"
    size_means = "total input of a rank, count = elements of its result"
    formula = "algbw * (n-1)/n"
    gathers, reduces = False, True

    def extent(self, size_bytes: int, itemsize: int, ranks: int) -> Extent:
        count = max(size_bytes // (itemsize * ranks), 1)
        return Extent(count * ranks * itemsize, count, sent=count * ranks, received=count)

    def factor(self, ranks: int) -> float:
        return (ranks - 1) / ranks

    def within(self, send: NDArray, recv: NDArray, rank: int, count: int) -> tuple[NDArray, NDArray]:
        return send, send[rank * count : (rank + 1) * count]

    def sent(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        return lambda start, stop: pattern.sent(rank, indices(start, stop))

    def received(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        first = rank * extent.count
        return lambda start, stop: pattern.total(indices(first + start, first + stop))

    def ours(self, comm: Any) -> Callable[..., Any]:
        method: Callable[..., Any] = comm.decomposed_reduce_scatter
        return method

    def mpi4py(self, comm: MPI.Intracomm, place: Place) -> Callable[[], Any] | None:
        send, recv = mpi_numbers(place)
        if place.in_place:  # MPI's own puts the result at the start of the input
            return None
        return lambda: comm.Reduce_scatter_block(send, recv)

    def gloo(self, distributed: Any, place: Place) -> Callable[[], Any] | None:
        send, recv = gloo_numbers(place)
        if place.in_place:
            return None
        # The older name warns where the newer one is there.
        scatter = getattr(distributed, "reduce_scatter_single", None) or distributed.reduce_scatter_tensor
        return lambda: scatter(recv, send)


if __name__ == "__main__":
    perf.main(ReduceScatter(), __doc__)
