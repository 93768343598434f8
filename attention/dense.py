"""The reference: softmax attention over the whole sequence, in float64, as the formula says."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool,
    scale: float | None = None,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """query (B, H, S, D), key and value (B, Hkv, S, D), of the whole sequence in order -> (B, H, S, D) in float64.

    Arguments as in `context_parallel_attention`. Differentiable; holds all (B, H, S, S) scores.
    """
    queries, keys, values = (x.double() for x in (query, key, value))
    queries = queries.unflatten(1, (key.shape[1], -1))  # (B, Hkv, groups, S, D)
    scores = queries @ keys[:, :, None].mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    seen = visible(query.shape[2], is_causal, cu_seqlens, window).to(query.device)
    return (scores.masked_fill(~seen, -math.inf).softmax(-1) @ values[:, :, None]).flatten(1, 2)


def visible(
    total: int, is_causal: bool, cu_seqlens: Sequence[int] | Tensor | None = None, window: int | None = None
) -> Tensor:
    """(total, total) of bool: which key (column) each query (row) sees; itself always."""
    position = torch.arange(total)
    distance = position[:, None] - position
    seen = distance >= 0 if is_causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        seen &= distance.abs() < window
    if cu_seqlens is not None:
        bounds = torch.as_tensor(cu_seqlens, dtype=torch.int64).cpu()
        document = torch.bucketize(position, bounds, right=True)
        seen &= document[:, None] == document
    return seen
