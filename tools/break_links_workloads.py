"""What runs while break_links.py breaks links: inputs from a seed, and the results that every element is held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Protocol, TypeAlias

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

import tasp_coll

Arrays: TypeAlias = "Sequence[NDArray[Any]]"
_HEADS, _HEAD_DIM = 2, 64
_TOKEN_BYTES = 2 * _HEADS * _HEAD_DIM * 4  # of keys and values in float32
_TOLERANCE = 1e-5  # of the largest element, beside dense attention in float64


class Workload(Protocol):
    """A call that can be repeated, each time on other data."""

    def inputs(self, number: int) -> Arrays:
        """What this rank passes to call `number`."""
        ...

    def run(self, send: Arrays) -> Arrays:
        """The call."""
        ...

    def wrong(self, found: Arrays, number: int) -> int:
        """Elements of what call `number` found that are not what they should be."""
        ...


class AllGather:
    """`decomposed_allgather` of bytes."""

    def __init__(self, comm: tasp_coll.Communicator, nbytes: int, seed: int) -> None:
        self._comm, self._nbytes, self._seed = comm, nbytes, seed

    def inputs(self, number: int) -> Arrays:
        return [self._shard(number, self._comm.rank)]

    def run(self, send: Arrays) -> Arrays:
        return [self._comm.decomposed_allgather(send[0])]

    def wrong(self, found: Arrays, number: int) -> int:
        shards = found[0].reshape(self._comm.size, -1)
        return sum(int((shard != self._shard(number, rank)).sum()) for rank, shard in enumerate(shards))

    def _shard(self, number: int, rank: int) -> NDArray[Any]:
        random = np.random.default_rng((self._seed, number, rank))
        return np.frombuffer(bytearray(random.bytes(self._nbytes)), np.uint8)


class Steps(AllGather):
    """The same, step by step."""

    def run(self, send: Arrays) -> Arrays:
        found = np.empty((self._comm.size, len(send[0])), np.uint8)
        for arrival in self._comm.allgather_steps(send[0]):
            for chunk in arrival.chunks:
                found[chunk.source, chunk.start : chunk.stop] = chunk.data
        return [found]


class AllReduce(AllGather):
    """`decomposed_allreduce` of integers, whose sums are exact."""

    def run(self, send: Arrays) -> Arrays:
        return [self._comm.decomposed_allreduce(send[0])]

    def wrong(self, found: Arrays, number: int) -> int:
        total = reduce(np.add, (self._shard(number, rank) for rank in range(self._comm.size)))
        return int((found[0] != total).sum())

    def _shard(self, number: int, rank: int) -> NDArray[Any]:
        return super()._shard(number, rank)[: self._nbytes // 8 * 8].view(np.int64) >> 16


class Attention:
    """Causal attention by "tasp", forward and backward, beside dense attention in float64. The same data each time."""

    def __init__(self, comm: tasp_coll.Communicator, nbytes: int, seed: int) -> None:
        import torch

        import attention
        from attention.dense import dense_attention

        self._comm, self._torch, self._attention = comm, torch, attention
        shape = 1, _HEADS, max(nbytes // _TOKEN_BYTES, 1) * comm.size, _HEAD_DIM
        random = np.random.default_rng(seed)
        whole = [random.standard_normal(shape, np.float32) for _ in range(4)]
        wanted = None
        if comm.rank == 0:
            q, k, v, grad = (torch.from_numpy(x).double().requires_grad_() for x in whole)
            out = dense_attention(q, k, v, is_causal=True)
            wanted = [x.detach().numpy() for x in (out, *torch.autograd.grad(out, (q, k, v), grad))]
        wanted = MPI.COMM_WORLD.bcast(wanted)
        assert wanted is not None
        self._scales = [np.abs(x).max() for x in wanted]
        self._send, self._wanted = self._shards(whole), self._shards(wanted)

    def inputs(self, number: int) -> Arrays:
        return self._send

    def run(self, send: Arrays) -> Arrays:
        q, k, v, grad = (self._torch.from_numpy(x).requires_grad_() for x in send)
        out = self._attention.context_parallel_attention(q, k, v, is_causal=True, comm=self._comm, method="tasp")
        found = out, *self._torch.autograd.grad(out, (q, k, v), grad)
        return [x.detach().numpy() for x in found]

    def wrong(self, found: Arrays, number: int) -> int:
        parts = zip(found, self._wanted, self._scales, strict=True)
        return sum(int((~(np.abs(x - wanted) <= _TOLERANCE * scale)).sum()) for x, wanted, scale in parts)

    def _shards(self, whole: Arrays) -> Arrays:
        tensors = [self._torch.from_numpy(x) for x in whole]
        return [self._attention.shard_sequence(x, 2, comm=self._comm).numpy() for x in tensors]


WORKLOADS: dict[str, Callable[[tasp_coll.Communicator, int, int], Workload]] = {
    "allgather": AllGather,
    "allreduce": AllReduce,
    "steps": Steps,
    "attention": Attention,
}
