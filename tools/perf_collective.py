"""What a bandwidth test says of its collective; the rest is the same for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from perf_data import Dtype, NDArray, Pattern, Source
from tasp_coll import Topology
from tasp_coll.forecast import Case
from tasp_coll.simulate import Costs
from tasp_coll.topology import turned

if TYPE_CHECKING:
    from mpi4py import MPI


class Unsupported(Exception):
    """What was asked for is not possible here, known before any data moves and alike on all ranks."""


@dataclass(frozen=True)
class Extent:
    """One size: `size_bytes` and `count` as nccl-tests shows them, and the elements that a rank sends and receives."""

    size_bytes: int
    count: int
    sent: int
    received: int


@dataclass(frozen=True)
class Place:
    """Memory of one call on this rank, as unsigned integers of the element's width, and as our callers have it."""

    dtype: Dtype
    send: NDArray
    recv: NDArray
    in_place: bool
    faces: tuple[Any, Any]  # send and recv as arrays of the dtype


class Collective(ABC):
    """A collective: sizes, data, formula and calls."""

    tool: ClassVar[str]
    name: ClassVar[str]  # tasp_coll's word for it
    redop: ClassVar[str] = "none"
    size_means: ClassVar[str]
    formula: ClassVar[str]  # of busbw
    gathers: ClassVar[bool]  # an all-gather is, or is part of, what it does
    reduces: ClassVar[bool]  # so is a reduce-scatter

    @abstractmethod
    def extent(self, size_bytes: int, itemsize: int, ranks: int) -> Extent:
        """What a size in bytes means; rounded down, but not to nothing."""

    @abstractmethod
    def factor(self, ranks: int) -> float:
        """busbw / algbw."""

    @abstractmethod
    def within(self, send: NDArray, recv: NDArray, rank: int, count: int) -> tuple[NDArray, NDArray]:
        """send and recv of a call in place, in memory of the sizes of a call out of place."""

    @abstractmethod
    def sent(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        """What `rank` sends."""

    @abstractmethod
    def received(self, pattern: Pattern, extent: Extent, rank: int) -> Source:
        """What `rank` must receive."""

    @abstractmethod
    def ours(self, comm: Any) -> Callable[..., Any]:
        """The method of a tasp_coll.Communicator."""

    @abstractmethod
    def mpi4py(self, comm: MPI.Intracomm, place: Place) -> Callable[[], Any] | None:
        """The bare call; None if MPI cannot do it in this place. Unsupported for what MPI cannot do at all."""

    @abstractmethod
    def gloo(self, distributed: Any, place: Place) -> Callable[[], Any] | None:
        """The call of torch.distributed; None and Unsupported as above."""

    def case(self, topology: Topology, size_bytes: int, dtype: Dtype, costs: Costs) -> Case:
        """What the cost model is asked."""
        half = self.reduces and dtype.name in ("float16", "bfloat16")
        return Case(topology, self.name, size_bytes // topology.ranks, half=half, costs=costs)

    def bound_seconds(self, topology: Topology, size_bytes: int) -> float:
        """The least time that the links allow: a reduce-scatter is an all-gather with every link turned round."""
        shard = size_bytes / topology.ranks
        gathering = topology.allgather_bound(shard) if self.gathers else 0.0
        reducing = turned(topology).allgather_bound(shard) if self.reduces else 0.0
        return gathering + reducing


def mpi_numbers(place: Place) -> tuple[NDArray, NDArray]:
    """The memory as arrays of numbers that MPI can add up."""
    if place.dtype.name in ("float16", "bfloat16"):
        raise Unsupported(f"MPI has no sums of {place.dtype.name}")
    return place.send.view(place.dtype.name), place.recv.view(place.dtype.name)


def gloo_bytes(place: Place) -> tuple[Any, Any]:
    """The memory as tensors of bytes, which is all that a gather needs to know."""
    import torch

    return torch.from_numpy(place.send.view(np.uint8)), torch.from_numpy(place.recv.view(np.uint8))


def gloo_numbers(place: Place) -> tuple[Any, Any]:
    """The memory as tensors of numbers that gloo can add up."""
    if place.dtype.name in ("int16", "uint16", "uint32", "uint64"):
        raise Unsupported(f"gloo has no sums of {place.dtype.name}")
    return place.dtype.tensor(place.send), place.dtype.tensor(place.recv)
