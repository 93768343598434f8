"""One adapter for each kernel, so that all give the same for a block: layout, base and padding are settled in them.

kernel = kernel_for(query)
out, lse = kernel.forward(query, key, value, causal=False, scale=scale)
"""

from __future__ import annotations

import os
import time
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from attention.kernel_parts import DTYPES, HALVES
from attention.kernels_cuda import CudnnKernel, EfficientKernel, FlashKernel
from attention.kernels_flash_attn import installed
from attention.kernels_host import CpuKernel, MathKernel
from tasp_coll import ArgumentError

ENVIRONMENT = "TASP_COLL_KERNEL"
_TOLERANCE = {torch.float32: 1e-2, torch.bfloat16: 6e-2, torch.float16: 2e-2}  # float32: some GPUs multiply in TF32


class Kernel(Protocol):
    """Attention of a block of queries to a block of keys.

    near: bytes of a result that are best merged before more is computed; None: a block's whole result.
    """

    @property
    def name(self) -> str: ...

    @property
    def near(self) -> int | None: ...

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """query (B, H, Sq, D), key and value (B, Hkv, Sk, D) with H % Hkv == 0; any strides; causal: Sq == Sk.

        Returns out (B, H, Sq, D) in query's dtype and lse (B, H, Sq), the logarithm (natural) of the sum of exponents
        of the scores, in float32 (float64 for float64); new memory. ArgumentError for an empty or uneven block.
        """

    def backward(
        self,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        *,
        causal: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """This block's part of the gradients of query, key and value, in their shapes, in their dtype or a wider one.

        grad (B, H, Sq, D), out and lse: of the whole attention, of which this block may be a part.
        """


def kernel_for(query: Tensor) -> Kernel:
    """The kernel for such queries (B, H, S, D): by device, dtype and head_dim.

    On CUDA those that agree with plain products are measured once, and the fastest is taken; elsewhere there is no
    choice. TASP_COLL_KERNEL names one instead (cpu, flash_attn_4, flash_attn_3, flash_attn, flash, cudnn, efficient,
    math), for instance where runs must not differ by what was measured. ArgumentError for a dtype that is not float64,
    float32, bfloat16 or float16.
    """
    if query.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ArgumentError(f"query must be of {known}, got {query.dtype}")
    return _choose(query.device, query.dtype, query.shape[-1], os.environ.get(ENVIRONMENT, ""))


@lru_cache(maxsize=256)
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int, name: str) -> Kernel:
    found = candidates(device, dtype, head_dim)
    if name:
        named = [kernel for kernel in found if kernel.name == name]
        if not named:
            names = ", ".join(kernel.name for kernel in found)
            raise ArgumentError(
                f"{ENVIRONMENT} must be one of {names} for {dtype}, head_dim {head_dim} on {device}, got {name!r}"
            )
        return named[0]
    return found[0] if device.type != "cuda" else _fastest(found, device, dtype, head_dim)


def candidates(device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Kernel]:
    """Those that may run there, the last one always can."""
    found: list[Kernel] = []
    if device.type == "cpu":
        found.append(CpuKernel())
    elif device.type == "cuda" and dtype in HALVES:
        if head_dim <= 256:
            found += [*installed(), FlashKernel(), CudnnKernel()]
        found.append(EfficientKernel())
    elif device.type == "cuda" and dtype == torch.float32:
        found.append(EfficientKernel())
    return [*found, MathKernel()]


@torch.no_grad()
def _fastest(kernels: list[Kernel], device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """Of those that agree with the last one, which does without any trick."""
    agreeing = [kernel for kernel in kernels[:-1] if agrees(kernel, kernels[-1], device, dtype, head_dim)]
    if len(agreeing) < 2:
        return [*agreeing, kernels[-1]][0]
    return min(agreeing, key=lambda kernel: _seconds(kernel, device, dtype, head_dim))


def agrees(kernel: Kernel, plain: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it runs, and gives what plain products give, on blocks with grouped heads and uneven lengths."""
    for rows, keys, causal in ((40, 40, True), (33, 70, False)):
        try:
            found = _round_trip(kernel, _random(rows, keys, device, dtype, head_dim), causal)
        except (AssertionError, RuntimeError, TypeError, ValueError):  # how kernels say what they do not support
            return False
        wanted = _round_trip(plain, _random(rows, keys, device, dtype, head_dim), causal)
        for a, b in zip(found, wanted, strict=True):
            if a.shape != b.shape or not _close(a, b, _TOLERANCE.get(dtype, 1e-9)):
                return False
    return True


def _close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    difference = (a.double() - b.double()).abs().max()
    return bool(difference <= tolerance * b.double().abs().max().clamp_min(1))  # False for NaN


def _random(rows: int, keys: int, device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[Tensor, ...]:
    """grad, query, key, value."""
    random = torch.Generator().manual_seed(1)
    shapes = ((2, 4, rows), (2, 4, rows), (2, 2, keys), (2, 2, keys))
    return tuple(torch.randn((*shape, head_dim), generator=random).to(device, dtype) for shape in shapes)


def _round_trip(kernel: Kernel, tensors: tuple[Tensor, ...], causal: bool) -> tuple[Tensor, ...]:
    """out, lse and the gradients."""
    grad, query, key, value = tensors
    scale = query.shape[-1] ** -0.5
    out, lse = kernel.forward(query, key, value, causal=causal, scale=scale)
    return out, lse, *kernel.backward(grad, query, key, value, out, lse, causal=causal, scale=scale)


def _seconds(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> float:
    """Of a round trip over a block of usual size, the best of a few."""
    x = torch.zeros((1, 8, 2048, head_dim), dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        _round_trip(kernel, (x, x, x, x), causal=False)
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begun)
    return best
