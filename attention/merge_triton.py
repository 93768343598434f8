"""The merge of `merge.plain` as one kernel on a GPU: a result and what there is so far are read once, and written once.

It needs Triton, which torch brings along for CUDA. It has been run in Triton's interpreter only, not on a GPU yet.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096  # of a program's block of results


@triton.jit
def _merge(so_far, seen, out, lse, heads, rows, dim, a, b, c, d, e, f, g, h, i, j, k, m, n, o, ROWS: tl.constexpr, DIM: tl.constexpr):  # type: ignore[no-untyped-def] # fmt: skip # noqa: E501
    """a, b, c: strides of so_far; d, e, f: of seen; g, h, i, j: of out; k, m, n: of lse; o: of so_far's elements."""
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, DIM)
    here = row < rows
    inside = here[:, None] & (column < dim)[None, :]
    batch, head, row = batch.to(tl.int64), head.to(tl.int64), row.to(tl.int64)
    at_seen = seen + batch * d + head * e + row * f
    at_so_far = so_far + batch * a + head * b + row[:, None] * c + column[None, :] * o
    before = tl.load(at_seen, mask=here, other=0.0)
    new = tl.load(lse + batch * k + head * m + row * n, mask=here, other=0.0).to(before.dtype)
    x = tl.load(at_so_far, mask=inside, other=0.0)
    y = tl.load(out + batch * g + head * h + row[:, None] * i + column[None, :] * j, mask=inside, other=0.0).to(x.dtype)
    apart = new - before
    small = tl.exp(-tl.abs(apart))
    share = (tl.where(apart < 0, small, 1.0) / (1.0 + small))[:, None]
    merged = tl.where(share < 0.5, x + share * (y - x), y - (1.0 - share) * (y - x))
    tl.store(at_so_far, merged, mask=inside)
    tl.store(at_seen, tl.where(apart < 0, before, new) + tl.log(1.0 + small), mask=here)


def merge(so_far: Tensor, seen: Tensor, out: Tensor, lse: Tensor) -> None:
    """As `merge.plain`; any strides, out in a half precision too."""
    batch, heads, rows, dim = so_far.shape
    block = max(_ELEMENTS // triton.next_power_of_2(dim), 1)
    strides = *so_far.stride()[:3], *seen.stride(), *out.stride(), *lse.stride(), so_far.stride(3)
    with torch.cuda.device_of(so_far):
        _merge[triton.cdiv(rows, block), batch * heads](
            so_far, seen, out, lse, heads, rows, dim, *strides, ROWS=block, DIM=triton.next_power_of_2(dim)
        )
