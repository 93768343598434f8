"""Results of blocks made one: each is weighed by how much of the softmax's sum it holds, known from its lse."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attention.kernel_parts import wide

_NOTHING = -1e30  # lse so far of rows that saw nothing: with -inf, differences would not be numbers


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

    def add(self, rows: slice, out: Tensor, lse: Tensor) -> None:
        """Merge a block's result for these query rows: out (B, H, rows, D), lse (B, H, rows). Both may be kept.

        Few operations, as each may have to wait for a core that a thread of the transport has just taken.
        """
        if out.dtype != self._dtype:
            out = out.to(self._dtype)
        length = self._like.shape[2]
        whole = rows.step in (None, 1) and len(range(length)[rows]) == length
        if whole and self._out is None:
            self._out, self._lse = out, lse.to(self._dtype).clamp(min=_NOTHING)
            return
        so_far, seen = self._state()
        if not whole:
            so_far, seen = so_far[:, :, rows], seen[:, :, rows]
        share = torch.sub(lse, seen).sigmoid_()  # one exponential a row
        so_far.lerp_(out, share.unsqueeze(-1))
        torch.logaddexp(seen, lse, out=seen)

    def finish(self) -> tuple[Tensor, Tensor]:
        """out (B, H, L, D) in query's dtype and lse (B, H, L); of rows that saw nothing out is 0 and lse -inf."""
        out, lse = self._state()
        return out.to(self._like.dtype), lse.masked_fill(lse <= _NOTHING / 2, -math.inf)

    def _state(self) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            like = self._like
            self._out = torch.zeros(like.shape, dtype=self._dtype, device=like.device)
            self._lse = torch.full(like.shape[:3], _NOTHING, dtype=self._dtype, device=like.device)
        return self._out, self._lse
