"""Which method is fastest here: the cost model's time for the links, the kernel's measured speed for the computation.

Ranks must choose alike, so all of them go by rank 0's figure; the model gives the same on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attention.forecast import Measured, Problem, Travel, forecast, operations, pairs
from attention.kernels import kernel_for
from attention.kv_bits import Bits
from attention.partition import Partition

_PROBE_TOKENS = 256
_TIE = 1.02  # who is not faster than that by the model is not taken instead of a simpler one
_GATHERED_BYTES = 64 << 20  # "allgather" only where all keys and values take no more

Model = Callable[[int, str], float | None]  # (shard bytes, algorithm) -> seconds of an allgather


@lru_cache(maxsize=32)
def _rate(dtype: torch.dtype, device: torch.device, dim: int) -> float:
    """Floating point operations per second of the forward kernel, from a short run."""
    x = torch.zeros((1, 2, _PROBE_TOKENS, dim), dtype=dtype, device=device)
    kernel, best = kernel_for(x), float("inf")
    for _ in range(3):
        begun = time.perf_counter()
        kernel.forward(x, x, x, causal=False, scale=1.0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return operations(1, 2, dim, _PROBE_TOKENS**2) / best


def rate_of(query: Tensor) -> float:
    """`_rate` for such queries (B, H, L, D)."""
    return _rate(query.dtype, query.device, query.shape[3])


def choose(
    comm: Any,
    partition: Partition,
    window: int | None,
    query: Tensor,
    key: Tensor,
    rate: float,
    bits: Bits | None = None,
) -> str:
    """The method for this call. Where no topology is named there is no model: one ring, which nothing disturbs."""
    batch, heads, _, dim = query.shape
    problem = Problem(
        *(comm.size, partition.total, batch, heads, key.shape[1], dim, key.element_size(), partition.causal),
        window=window,
        kv_bits=None if bits is None else bits.on_wire(dim),
    )
    work = operations(batch, heads, dim, pairs(partition.documents, partition.causal, window))
    found = seconds(comm.predicted_seconds, problem, work / comm.size / max(rate, 1.0))
    if not found:
        return "ring"
    least = min(found.values())
    return next(method for method, taken in found.items() if taken <= least * _TIE)


def seconds(model: Model, problem: Problem, compute: float) -> dict[str, float]:
    """Time of each method, simple ones first. compute: of one rank."""
    if problem.ranks == 1:
        return {}

    def links(nbytes: int, algorithm: str, collective: str) -> Travel | None:
        taken = model(nbytes, algorithm)
        return None if taken is None else Travel(taken, problem.ranks - 1)

    gathers = problem.shard_bytes * problem.ranks <= _GATHERED_BYTES
    methods = ("ring", "tasp", "ulysses", *(("allgather",) if gathers else ()))
    found = {method: forecast(problem, method, links, Measured(compute)) for method in methods}
    return {method: estimate.seconds for method, estimate in found.items() if estimate is not None}
