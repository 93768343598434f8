"""torch's fused kernels on CUDA. None has run on a GPU yet: their signatures are tested, on machines without one.

`kernels.kernel_for` compares each with plain products, forward and backward, before it takes one, so that a difference
in layout, base or padding leaves a kernel out instead of making results wrong. All give lse as natural logarithms.
Dropout is 0, so the random state that they pass from forward to backward holds nothing. Their backward adds up in an
order that may change from run to run unless `torch.use_deterministic_algorithms(True)` is set.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.kernel_parts import check_block, expanded, grouped, padded
from attention.kernels_host import MathKernel

_aten = torch.ops.aten


class FlashKernel:
    """Flash attention 2 as built into torch: float16 and bfloat16, head_dim up to 256, grouped heads as they are."""

    name = "flash"
    near = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        inputs = (padded(x) for x in (query, key, value))
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(*inputs, 0.0, causal, False, scale=scale)
        return out[..., : query.shape[-1]], lse

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
        inputs = (padded(x) for x in (grad, query, key, value, out))
        state = torch.zeros(2, dtype=torch.uint64, device=query.device), query.new_zeros((), dtype=torch.uint64)
        found = _aten._scaled_dot_product_flash_attention_backward(
            *inputs, lse.contiguous(), None, None, query.shape[2], key.shape[2], 0.0, causal, *state, scale=scale
        )
        return _cut(found, query)


class CudnnKernel:
    """cuDNN's attention: float16 and bfloat16. Its lse is (B, H, S, 1), heads are expanded, one token is too few."""

    name = "cudnn"
    near = None
    _small = MathKernel()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        if _single(query, key):
            return self._small.forward(query, key, value, causal=causal, scale=scale)
        check_block(query, key, value, causal)
        inputs = (padded(expanded(x, query.shape[1])) for x in (query, key, value))
        out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(*inputs, None, True, 0.0, causal, False, scale=scale)
        return out[..., : query.shape[-1]], lse.reshape(query.shape[:3])

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
        if _single(query, key):
            return self._small.backward(grad, query, key, value, out, lse, causal=causal, scale=scale)
        check_block(query, key, value, causal)
        inputs = (padded(expanded(x, query.shape[1])) for x in (grad, query, key, value, out))
        state = (query.new_zeros((), dtype=torch.int64) for _ in range(2))
        found = _aten._scaled_dot_product_cudnn_attention_backward(
            *inputs,
            lse.contiguous()[..., None],
            *state,
            None,  # bias
            None,  # boundaries of packed queries and keys
            None,
            query.shape[2],
            key.shape[2],
            0.0,
            causal,
            scale=scale,
        )
        return _cut(found, query, key.shape[1])


class EfficientKernel:
    """The memory-efficient kernel: float32 too, any head_dim. It pads lse to 32 rows by +inf; heads are expanded."""

    name = "efficient"
    near = None

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        inputs = (padded(expanded(x, query.shape[1])) for x in (query, key, value))
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(*inputs, None, True, 0.0, causal, scale=scale)
        return out[..., : query.shape[-1]], lse[..., : query.shape[2]]

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
        inputs = (padded(expanded(x, query.shape[1])) for x in (grad, query, key, value))
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf).contiguous()
        state = (query.new_zeros((), dtype=torch.int64) for _ in range(2))
        wanted = [True, True, True, False]  # the last: of a bias
        found = _aten._scaled_dot_product_efficient_attention_backward(
            *inputs, None, padded(out), lse, *state, 0.0, wanted, causal, scale=scale
        )
        return _cut(found, query, key.shape[1])


def _single(query: Tensor, key: Tensor) -> bool:
    return min(query.shape[2], key.shape[2]) == 1


def _cut(found: tuple[Tensor, ...], query: Tensor, kv_heads: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients without what was padded and expanded."""
    dquery, dkey, dvalue = (x[..., : query.shape[-1]] for x in found[:3])
    return (dquery, dkey, dvalue) if kv_heads is None else (dquery, grouped(dkey, kv_heads), grouped(dvalue, kv_heads))
