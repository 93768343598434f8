"""Which method is fastest here: the cost model's time for the links, the kernel's measured speed for the computation.
And how unequal its chunks may be, by the same model and nominal speeds.

Ranks must choose alike, so all of them go by rank 0's figure; the model gives the same on all.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attention.forecast import BACKWARD, Measured, Problem, Travel, forecast, operations, pairs
from attention.kernels import kernel_for
from attention.kv_bits import Bits
from attention.partition import STRETCH, Partition

_PROBE_TOKENS = 256
_TIE = 1.02  # who is not faster than that by the model is not taken instead of a simpler one
_CORE_PEAK, _CORE_HALF_PEAK, _GPU_PEAK = 2.0**37, 2.0**40, 2.0**51  # of a core, in 4 bytes and 2; of a GPU
_STRETCHES = (0.125, 0.25, 0.5, 1.0)
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


def peak_of(query: Tensor) -> float:
    """Floating point operations per second that a kernel hardly reaches: nominal, so that runs do not differ."""
    if query.device.type != "cpu":
        return _GPU_PEAK
    return torch.get_num_threads() * (_CORE_PEAK if query.element_size() >= 4 else _CORE_HALF_PEAK)


@dataclass(frozen=True)
class Call:
    """An attention on the communicator's links."""

    comm: Any  # tasp_coll.Communicator
    partition: Partition
    problem: Problem

    @classmethod
    def of(
        cls, comm: Any, partition: Partition, window: int | None, query: Tensor, key: Tensor, bits: Bits | None
    ) -> Call:
        """query (B, H, L, D) and key (B, Hkv, L, D)."""
        batch, heads, _, dim = query.shape
        problem = Problem(
            *(comm.size, partition.total, batch, heads, key.shape[1], dim, key.element_size(), partition.causal),
            window=window,
            kv_bits=None if bits is None else bits.on_wire(dim),
        )
        return cls(comm, partition, problem)

    @property
    def operations(self) -> float:
        """Of one rank."""
        problem = self.problem
        seen = pairs(self.partition.documents, problem.causal, problem.window)
        return operations(problem.batch, problem.heads, problem.head_dim, seen) / problem.ranks

    def method(self, rate: float) -> str:
        """The fastest one. Where no topology is named there is no model: one ring, which nothing disturbs."""
        found = seconds(self.comm.predicted_seconds, self.problem, self.operations / max(rate, 1.0))
        if not found:
            return "ring"
        least = min(found.values())
        return next(method for method, taken in found.items() if taken <= least * _TIE)

    def stretch(self, method: str, peak: float, backward: bool) -> float:
        """What share of its length a chunk may be longer by, so that it begins where the kernel likes it.

        As far as computing surely hides the transfer, one of few shares, as plans are made for each. That decides in
        which order keys are added up, so it must be the same in every run: it goes by `peak_of`, not by a measured
        speed. backward: that one's transfers must be hidden too.
        """
        problem = self.problem
        # One ring carries whole shards; under a window most pairs are a rank's own, and steps have little to compute.
        if method != "tasp" or problem.ranks == 1 or self.partition.align == 1 or problem.window is not None:
            return STRETCH
        keys = self.comm.predicted_seconds(problem.wire_bytes, "rings")
        if not keys:
            return STRETCH
        hides = self._hides(peak, 1.0, keys)
        if backward:
            home = self.comm.predicted_seconds(problem.gradient_bytes, "rings", collective="reduce_scatter")
            hides = min(hides, self._hides(peak, BACKWARD, keys + (home or 0.0)))
        return max((share for share in _STRETCHES if share <= hides - 1), default=STRETCH)

    def _hides(self, peak: float, work: float, moved: float) -> float:
        """How often the transfer of a step fits into its computation. work: forwards. moved: seconds of all steps."""
        ranks = self.problem.ranks
        return work * self.operations / ranks / peak / (moved / (ranks - 1))


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
