"""Which method is fastest here: the cost model's time for the links, the kernel's measured speed for the computation.

Ranks must choose alike, so all of them go by rank 0's figure; the model gives the same on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from attention.kernels import kernel_for
from attention.partition import Partition
from attention.ulysses import deals

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
    return operations(x.shape, _PROBE_TOKENS**2) / best


def rate_of(query: Tensor) -> float:
    """`_rate` for such queries (B, H, L, D)."""
    return _rate(query.dtype, query.device, query.shape[3])


def operations(shape: tuple[int, ...], pairs: float) -> float:
    """Of a forward pass over so many (query, key) pairs in each head: two products, each to multiply and to add."""
    batch, heads, _, dim = shape
    return 4.0 * batch * heads * dim * pairs


def pairs(partition: Partition, window: int | None) -> float:
    """(query, key) pairs that may see each other in the whole sequence, but for what rounding leaves."""
    bounds, found = partition.documents, 0.0
    for length in (stop - start for start, stop in pairwise(bounds)):
        reach = length if window is None else min(window, length)
        below = reach * length - reach * (reach - 1) / 2  # itself and those before
        found += below if partition.causal else 2 * below - length
    return found


def choose(comm: Any, partition: Partition, window: int | None, query: Tensor, key: Tensor, rate: float) -> str:
    """The method for this call. Where no topology is named there is no model: one ring, which nothing disturbs."""
    ranks = comm.size
    batch, heads, _, dim = key.shape
    shard = 2 * batch * heads * dim * key.element_size() * max(partition.lengths)
    compute = operations(query.shape, pairs(partition, window)) / ranks / max(rate, 1.0)
    ours = 2 * batch * (query.shape[1] + heads) * dim * key.element_size() * max(partition.lengths)
    found = seconds(
        comm.predicted_seconds, ranks, shard, ours if deals(query.shape[1], heads, ranks) else None, compute
    )
    if not found:
        return "ring"
    least = min(found.values())
    return next(method for method, taken in found.items() if taken <= least * _TIE)


def seconds(model: Model, ranks: int, shard: int, dealt: float | None, compute: float) -> dict[str, float]:
    """Time of each method, simple ones first. shard: bytes of a rank's keys and values; dealt: bytes that a rank
    brings to the all-to-alls, None where heads cannot be dealt out; compute: of one rank."""
    if ranks == 1:
        return {}
    taken: dict[str, float | None] = {}
    for method, algorithm in (("ring", "ring"), ("tasp", "rings")):
        links = model(shard, algorithm)
        taken[method] = None if links is None else overlapped(ranks, compute, links)
    if dealt is not None and (links := model(int(dealt / ranks), "direct")) is not None:
        taken["ulysses"] = links + compute
    if shard * ranks <= _GATHERED_BYTES and (links := model(shard, "auto")) is not None:
        taken["allgather"] = links + compute
    return {method: time for method, time in taken.items() if time is not None}


def overlapped(ranks: int, compute: float, links: float) -> float:
    """One's own keys first, then n-1 steps, each as long as the longer of computing it and bringing the next."""
    if ranks == 1:
        return compute
    return compute / ranks + (ranks - 1) * max(compute / ranks, links / (ranks - 1))
