"""Kernels that need no GPU: torch's flash attention on the CPU, and plain products on any device."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from attention.kernel_parts import check_block, expanded, grouped, in_rows, wide

# Before, the CPU kernel read keys that are not there, and wrote over memory that is not its own.
_SHARES_HEADS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9)
_NEAR = 1 << 22  # bytes a thread: with fewer, calls cost more than merging out of a nearer cache saves (measured)
_SCORES = 1 << 22  # elements of a block of scores that the plain kernel holds at a time


class CpuKernel:
    """torch's flash attention on the CPU.

    It takes any strides, and grouped heads as they are from torch 2.9 on; for an older one keys are expanded. A causal
    block that is not square would be masked from the top left, and an empty one kills the process. float16 is computed
    in float32, and so is bfloat16 backward: the kernel's own ways were measured to be 2 times slower (forward) and 8 to
    15 times (backward), and are less exact. Queries of heads that share keys are one long run to it where no mask keeps
    them apart: it works on more rows at a time then, and reads keys less often.
    """

    name = "cpu"

    @property
    def near(self) -> int:
        """What of a result is merged while the cores have it at hand."""
        return _NEAR * torch.get_num_threads()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        key, value = (x if _SHARES_HEADS else expanded(x, query.shape[1]) for x in (key, value))
        dtype = torch.float32 if query.dtype == torch.float16 else query.dtype
        kv_heads = query.shape[1] if causal else key.shape[1]
        inputs = (in_rows(x.to(dtype)) for x in (_joined(query, kv_heads), key, value))
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, 0.0, causal, scale=scale)
        return _parted(out.to(query.dtype), query), _parted(lse, query)

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
        check_block(query, key, value, causal)
        kv_heads = key.shape[1]
        key, value = (x if _SHARES_HEADS else expanded(x, query.shape[1]) for x in (key, value))
        alike = query.shape[1] if causal else key.shape[1]
        rows = (_joined(x.to(wide(query.dtype)), alike) for x in (grad, query, out))
        grads, queries, outs = (in_rows(x) for x in rows)
        keys, values = (in_rows(x.to(wide(query.dtype))) for x in (key, value))
        dquery, dkey, dvalue = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, queries, keys, values, outs, _joined(lse, alike), 0.0, causal, scale=scale
        )
        return _parted(dquery, query), grouped(dkey, kv_heads), grouped(dvalue, kv_heads)


def _joined(x: Tensor, kv_heads: int) -> Tensor:
    """(B, H, S, ...) -> (B, kv heads, H / kv heads * S, ...)."""
    return x if x.shape[1] == kv_heads else x.unflatten(1, (kv_heads, -1)).flatten(2, 3)


def _parted(x: Tensor, query: Tensor) -> Tensor:
    """What `_joined` did, undone: (B, kv heads, H / kv heads * S, ...) -> (B, H, S, ...)."""
    return x if x.shape[1] == query.shape[1] else x.unflatten(2, (-1, query.shape[2])).flatten(1, 2)


class MathKernel:
    """Plain products, some rows of scores at a time, in float64 or float32: any device, any head_dim."""

    name = "math"
    near = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        queries, keys, values = _groups(query, key), _wide(key), _wide(value)
        out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:-1])
        for rows in _pieces(query, key):
            scores = _scores(queries, keys, rows, causal, scale)
            lse[..., rows] = scores.logsumexp(-1)
            out[..., rows, :] = scores.sub_(lse[..., rows, None]).exp_() @ values[:, :, None]
        return out.flatten(1, 2).to(query.dtype), lse.flatten(1, 2)

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
        check_block(query, key, value, causal)
        queries, grads = _groups(query, key), _groups(grad, key)
        keys, values = _wide(key), _wide(value)
        lse, delta = lse.unflatten(1, (key.shape[1], -1)), (grads * _groups(out, key)).sum(-1)
        dquery, dkey, dvalue = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(values)
        for rows in _pieces(query, key):
            scores = _scores(queries, keys, rows, causal, scale).sub_(lse[..., rows, None]).exp_()
            dvalue += (scores.mT @ grads[..., rows, :]).sum(2)
            slopes = grads[..., rows, :] @ values[:, :, None].mT
            slopes = slopes.sub_(delta[..., rows, None]).mul_(scores).mul_(scale)
            dquery[..., rows, :] = slopes @ keys[:, :, None]
            dkey += (slopes.mT @ queries[..., rows, :]).sum(2)
        return dquery.flatten(1, 2), dkey, dvalue


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x.dtype)).contiguous()


def _groups(x: Tensor, key: Tensor) -> Tensor:
    """(B, H, S, D) -> (B, Hkv, H / Hkv, S, D) in the wide dtype."""
    return _wide(x).unflatten(1, (key.shape[1], -1))


def _pieces(query: Tensor, key: Tensor) -> Iterator[slice]:
    batch, heads, rows, _ = query.shape
    step = max(_SCORES // (batch * heads * key.shape[2]), 1)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _scores(queries: Tensor, keys: Tensor, rows: slice, causal: bool, scale: float) -> Tensor:
    """(B, Hkv, groups, rows, keys), -inf where a query does not see a key."""
    scores = queries[..., rows, :] @ keys[:, :, None].mT
    scores *= scale
    if causal:
        hidden = scores.new_ones(scores.shape[-2:], dtype=torch.bool).triu(rows.start + 1)
        scores.masked_fill_(hidden, -math.inf)
    return scores
