"""Results of blocks made one: each is weighed by how much of the softmax's sum it holds, known from its lse."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from attention.kernel_parts import wide

_NOTHING = -1e30  # lse so far of rows that saw nothing: with -inf, differences would not be numbers


def plain(so_far: Tensor, seen: Tensor, out: Tensor, lse: Tensor) -> None:
    """Merge out (B, H, rows, D) into `so_far`, and lse (B, H, rows) into `seen`, both in a wide dtype.

    Few operations, as each may have to wait for a core that a thread of the transport has just taken.
    """
    share = torch.sub(lse, seen).sigmoid_()  # one exponential a row
    so_far.lerp_(out.to(so_far.dtype), share.unsqueeze(-1))
    torch.logaddexp(seen, lse, out=seen)


@lru_cache(maxsize=8)
def merge_for(device: torch.device) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """`plain`, or on CUDA what does the same as one kernel, where Triton is there."""
    if device.type != "cuda":
        return plain
    try:
        from attention.merge_triton import merge
    except ImportError:
        return plain
    return merge


class Partial:
    """The running result of queries that see some keys now and others later.

        into = Partial(query)
        into.add(slice(0, 512), *kernel.forward(query[:, :, :512], key, value, causal=False, scale=scale))
        out, lse = into.finish()

    query: (B, H, L, D); only its shape, dtype and device count. Results add up in float32 (float64 for float64). The
    same blocks in the same order give the same bits.
    """

    def __init__(self, query: Tensor) -> None:
        self._like = query.detach()
        self._dtype = wide(query.dtype)
        self._out: Tensor | None = None
        self._lse: Tensor | None = None
        self._fresh = set(range(query.shape[1]))  # heads of which nothing has been told

    def add(self, rows: slice, out: Tensor, lse: Tensor, heads: slice = slice(None)) -> None:
        """Merge a block's result for these query rows and heads: out (B, heads, rows, D), lse (B, heads, rows). Both
        may be kept."""
        _, all_heads, length = self._like.shape[:3]
        whole = rows.step in (None, 1) and len(range(length)[rows]) == length
        told = set(range(all_heads)[heads])
        if whole and len(told) == all_heads and self._out is None:
            self._fresh.clear()
            self._out, self._lse = out.to(self._dtype), lse.to(self._dtype).clamp(min=_NOTHING)
            return
        first = whole and told <= self._fresh
        if first:
            self._fresh -= told
        so_far, seen = (x[:, heads] for x in self._state(told))
        if first:
            so_far.copy_(out)
            torch.clamp(lse, min=_NOTHING, out=seen)
            return
        if not whole:
            so_far, seen = so_far[:, :, rows], seen[:, :, rows]
        merge_for(so_far.device)(so_far, seen, out, lse)

    def finish(self) -> tuple[Tensor, Tensor]:
        """out (B, H, L, D) in query's dtype and lse (B, H, L); of rows that saw nothing out is 0 and lse -inf."""
        out, lse = self._state(set(self._fresh))
        return out.to(self._like.dtype), lse.masked_fill(lse <= _NOTHING / 2, -math.inf)

    def _state(self, told: set[int]) -> tuple[Tensor, Tensor]:
        """All of it, with something to add to in these heads."""
        if self._out is None or self._lse is None:
            like = self._like
            self._out = torch.empty(like.shape, dtype=self._dtype, device=like.device)
            self._lse = torch.empty(like.shape[:3], dtype=self._dtype, device=like.device)
        for head in told & self._fresh:
            self._out[:, head] = 0
            self._lse[:, head] = _NOTHING
        self._fresh -= told
        return self._out, self._lse
