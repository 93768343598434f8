"""What the kernels' adapters share: the rules for a block, and the layouts that kernels ask for."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

from tasp_coll import ArgumentError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which results and gradients of blocks add up."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_block(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> None:
    """ArgumentError for a block that kernels disagree about, or that kills some of them."""
    (batch, heads, rows, dim), found = query.shape, tuple(key.shape)
    if value.shape != key.shape or key.shape[::3] != (batch, dim):
        raise ArgumentError(
            f"key and value must be ({batch}, heads, tokens, {dim}) both, as query is {tuple(query.shape)}, "
            f"got {found} and {tuple(value.shape)}"
        )
    if heads % found[1]:
        raise ArgumentError(f"key must have a number of heads that divides query's {heads}, got {found[1]}")
    if not rows or not found[2]:
        raise ArgumentError(f"a block must have queries and keys, got {rows} and {found[2]}: leave empty ones out")
    if causal and rows != found[2]:
        raise ArgumentError(
            f"a causal block must be square, got {rows} queries and {found[2]} keys: kernels differ in where the "
            "diagonal of others lies"
        )


def tiles(query: Tensor, kv_heads: int, nbytes: int | None) -> Iterator[tuple[slice, slice]]:
    """Heads of queries (B, H, S, D) whose result takes about `nbytes` (None: all), with the heads of keys they share.

    Where queries' heads share one of keys, no tile has more than these, if not all.
    """
    batch, heads, rows, dim = query.shape
    shared = heads // kv_heads
    each = max(batch * rows * dim * wide(query.dtype).itemsize, 1)
    if nbytes is None or each * heads <= nbytes:
        yield slice(0, heads), slice(0, kv_heads)
        return
    span = heads if shared == 1 else shared
    size = -(-span // -(-span // max(min(nbytes // each, span), 1)))  # as even as can be
    for first in range(0, heads, span):
        for start in range(first, first + span, size):
            stop = min(start + size, first + span)
            yield slice(start, stop), slice(start // shared, (stop - 1) // shared + 1)


def in_rows(x: Tensor) -> Tensor:
    """x with elements of a head side by side, copied only if they are not (a gradient expanded from a sum)."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(x: Tensor, multiple: int = 8) -> Tensor:
    """x (.., D) with D a multiple and rows at aligned places, by zeros; x itself where that is so already."""
    short = -x.shape[-1] % multiple
    if short:
        return pad(x, (0, short))
    aligned = x.stride(-1) == 1 and all(stride % multiple == 0 for stride in (*x.stride()[:-1], x.storage_offset()))
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def expanded(x: Tensor, heads: int) -> Tensor:
    """(B, Hkv, S, D) -> (B, heads, S, D), each head repeated for the queries that share it."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def grouped(x: Tensor, heads: int) -> Tensor:
    """The gradient of `expanded`: sums over the queries' heads that share one of `heads`."""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).sum(2, dtype=wide(x.dtype))
