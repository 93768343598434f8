"""Attention in shards beside the dense reference, on any communicator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import attention
from attention.dense import dense_attention
from tasp_coll import Communicator

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """An attention over a whole sequence, the same on every rank."""

    total: int
    is_causal: bool = True
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    batch: int = 1
    window: int | None = None
    documents: tuple[float, ...] | None = None  # where they begin, as shares of the sequence
    dtype: torch.dtype = torch.float64
    device: str = "cpu"

    @property
    def cu_seqlens(self) -> tuple[int, ...] | None:
        """Boundaries of the documents."""
        if self.documents is None:
            return None
        return (*(int(share * self.total) for share in self.documents), self.total)

    def tensors(self) -> Tensors:
        """query, key, value and the gradient of the result, whole."""
        random = torch.Generator().manual_seed(self.total)
        shapes = [(self.batch, heads, self.total, self.head_dim) for heads in (self.heads, self.kv_heads)]
        return tuple(
            torch.randn(shapes[kind], generator=random, dtype=torch.float64).to(self.device, self.dtype)
            for kind in (0, 1, 1, 0)
        )

    def dense(self, dtype: torch.dtype = torch.float64) -> Tensors:
        """Result and the three gradients, computed in float64 by the reference, in other dtypes by torch."""
        *inputs, grad = (x.to(dtype) for x in self.tensors())
        inputs = [x.detach().requires_grad_() for x in inputs]
        if dtype == torch.float64:
            out = dense_attention(*inputs, is_causal=self.is_causal, cu_seqlens=self.cu_seqlens, window=self.window)
        else:
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=self.is_causal, enable_gqa=True)
        out.backward(grad)
        return (out.detach(), *(x.grad for x in inputs))  # type: ignore[misc]

    def sharded(self, comm: Communicator, method: str, **options: Any) -> Tensors:
        """The same from shards, brought together again on every rank. options: of the call besides."""
        *inputs, grad = (self.shard(comm, x) for x in self.tensors())
        inputs = [x.requires_grad_() for x in inputs]
        out = attention.context_parallel_attention(
            *inputs,
            is_causal=self.is_causal,
            enable_gqa=True,
            comm=comm,
            cu_seqlens=self.cu_seqlens,
            window=self.window,
            method=method,
            **options,
        )
        assert out.dtype == self.dtype
        out.backward(grad)
        return tuple(self.unshard(comm, x) for x in (out.detach(), *(x.grad for x in inputs)))  # type: ignore[arg-type]

    def shard(self, comm: Communicator, x: Tensor) -> Tensor:
        """This rank's tokens."""
        return attention.shard_sequence(x, 2, comm=comm, is_causal=self.is_causal, cu_seqlens=self.cu_seqlens)

    def unshard(self, comm: Communicator, x: Tensor) -> Tensor:
        """All ranks' tokens."""
        return attention.unshard_sequence(x, 2, comm=comm, is_causal=self.is_causal, cu_seqlens=self.cu_seqlens)

    def usable(self, method: str, ranks: int) -> bool:
        """Whether the heads can be dealt out."""
        return method != "ulysses" or not (self.heads % ranks or (self.kv_heads % ranks and ranks % self.kv_heads))


def error(found: Tensors, wanted: Tensors) -> float:
    """The largest error of any element, relative to the largest of its tensor if that is not close to 0."""
    return max(
        float((a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(0.1)) if b.numel() else 0.0
        for a, b in zip(found, wanted, strict=True)
    )


METHODS = ("tasp", "ring", "allgather", "ulysses")
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def check(comm: Communicator, case: Case, methods: tuple[str, ...] = METHODS) -> None:
    """All methods against the dense reference in float64; half precision beside dense half precision."""
    wanted = case.dense()
    allowed = TOLERANCE.get(case.dtype) or 2 * error(case.dense(case.dtype), wanted)
    for method in methods:
        if case.usable(method, comm.size):
            found = error(case.sharded(comm, method), wanted)
            assert found <= allowed, f"{method} on {comm.size} ranks: {found} > {allowed}, {case}"


def lengths(ranks: int) -> tuple[int, ...]:
    """Lengths that are awkward, and one that is not."""
    return tuple(sorted({1, 7, max(ranks - 1, 1), 61, 128}))


BASE = Case(61)
CASES = tuple(
    replace(BASE, **changes)  # type: ignore[arg-type]
    for changes in (
        {},
        {"is_causal": False},
        {"batch": 2, "heads": 8, "kv_heads": 1},
        {"heads": 8, "kv_heads": 8, "is_causal": False, "batch": 3},
        {"window": 1},
        {"window": 9},
        {"window": 9, "is_causal": False},
        {"documents": (0, 0.1, 0.1, 0.7)},
        {"documents": (0, 0.3, 0.35), "is_causal": False},
        {"documents": (0, 0.3, 0.35), "window": 4, "batch": 2},
        {"head_dim": 80},
        {"head_dim": 1},
    )
)
