"""Bandwidth of AllGather: the decomposition into link-disjoint rings beside a single ring, a direct exchange,
MPI_Allgather and others.

    mpiexec -n 4 python tools/all_gather_perf.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

import perf
from perf_collective import Collective, Extent, Place, gloo_bytes
from perf_data import NDArray, Pattern, Source, indices

if TYPE_CHECKING:
    from mpi4py import MPI


class AllGather(Collective):
    """Every rank's shard on every rank."""

    tool, name = "all_gather_perf", "allgather"
    size_means = "total output, count = elements per rank"
    formula = "algbw * (n-1)/n"
    gathers, reduces = True, False

    def extent(self, size_bytes: int, itemsize: int, ranks: int) -> Extent:
        count = max(size_bytes // (itemsize * ranks), 1)
        return Extent(count * ranks * itemsize, count, sent=count, received=count * ranks)

    def factor(self, ranks: int) -> float:
        return (ranks - 1) / ranks

    def within(self, send: NDArray, recv: NDArray, rank: int, count: int) -> tuple[NDArray, NDArray]:
        return recv[rank * count : (rank + 1) * count], recv

    def sent(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        return lambda start, stop: pattern.sent(rank, indices(start, stop))

    def received(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        def source(start: int, stop: int) -> NDArray:
            owners, index = np.divmod(indices(start, stop), np.uint64(extent.count))
            return pattern.sent(owners, index)

        return source

    def ours(self, comm: Any) -> Callable[..., Any]:
        method: Callable[..., Any] = comm.decomposed_allgather
        return method

    def mpi4py(self, comm: MPI.Intracomm, place: Place) -> Callable[[], Any]:
        from mpi4py import MPI

        send = MPI.IN_PLACE if place.in_place else place.send
        return lambda: comm.Allgather(send, place.recv)

    def gloo(self, distributed: Any, place: Place) -> Callable[[], Any] | None:
        if place.in_place:
            return None
        # The older name warns where the newer one is there.
        gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
        send, recv = gloo_bytes(place)
        return lambda: gather(recv, send)


if __name__ == "__main__":
    perf.main(AllGather(), __doc__)
