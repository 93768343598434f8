"""The package flash-attn, version 2, where it is installed. It has not run on a GPU yet; see `kernels_cuda`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attention.kernel_parts import check_block, padded

_LEAST = 4  # results of its forward where inputs are not handed back; the place of lse differs by one version


class FlashAttnKernel:
    """float16 and bfloat16, head_dim up to 256, grouped heads as they are, (B, S, H, D), the same bits on every run.

    interface: `flash_attn.flash_attn_interface`. Arguments differ between versions, so they are filled in by name.
    """

    name = "flash_attn"

    def __init__(self, interface: Any) -> None:
        self._forward, self._backward = interface._flash_attn_forward, interface._flash_attn_backward

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        q, k, v = (padded(x.transpose(1, 2)) for x in (query, key, value))
        found = self._forward(**_filled(self._forward, {"q": q, "k": k, "v": v}, causal, scale))
        # From 2.7 on (out, lse, ...); before, (out, q, k, v, padded out, lse, ...)
        lse = found[1] if len(found) <= _LEAST else found[5]
        return found[0].transpose(1, 2)[..., : query.shape[-1]], lse[..., : query.shape[2]]

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
        q, k, v, dout, o = (padded(x.transpose(1, 2)) for x in (query, key, value, grad, out))
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        given = {"dout": dout, "q": q, "k": k, "v": v, "out": o, "softmax_lse": lse.contiguous()}
        given |= dict(zip(("dq", "dk", "dv"), found, strict=True))
        self._backward(**_filled(self._backward, given, causal, scale))
        dquery, dkey, dvalue = (x.transpose(1, 2)[..., : query.shape[-1]] for x in found)
        return dquery, dkey, dvalue


def _filled(call: Callable[..., Any], tensors: dict[str, Tensor], causal: bool, scale: float) -> dict[str, Any]:
    """The arguments of this version's `call`: what it has no name for is not needed by it."""
    known = {
        "dropout_p": 0.0,
        "softmax_scale": scale,
        "causal": causal,
        "window_size": (-1, -1),
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": True,
        "return_softmax": False,
        "rng_state": None,
    }
    names = inspect.signature(getattr(call, "_init_fn", call)).parameters  # a torch custom op hides its function's
    return tensors | {name: value for name, value in known.items() if name in names}
