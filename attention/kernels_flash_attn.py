"""The package flash-attn, versions 2, 3 and 4, where it is installed. None has run on a GPU yet; see `kernels_cuda`.

Versions, and what they were built from, differ in arguments, so these are filled in by name: of version 2 (2.0 to 2.8)
`flash_attn.flash_attn_interface`, of 3, for Hopper, `flash_attn_interface`, of 4, in CuTe, `flash_attn.cute.interface`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attention.kernel_parts import check_block, padded

_LEAST = 4  # results of its forward where inputs are not handed back; the place of lse differs by one version
_FOUND = (  # name, module, forward, backward
    ("flash_attn_4", "flash_attn.cute.interface", "_flash_attn_fwd", "_flash_attn_bwd"),
    ("flash_attn_3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
    ("flash_attn", "flash_attn.flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
)
# What differs from a call's own defaults, and what to say for an argument that has none.
_SAID: dict[str, Any] = {"deterministic": True, "return_lse": True}
_UNSAID: dict[str, Any] = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
    "rng_state": None,
}


class FlashAttnKernel:
    """float16 and bfloat16, head_dim up to 256, grouped heads as they are, (B, S, H, D), the same bits on every run."""

    near = None

    def __init__(self, name: str, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
        self.name, self._forward, self._backward = name, forward, backward

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        check_block(query, key, value, causal)
        q, k, v = (padded(x.transpose(1, 2)) for x in (query, key, value))
        found = self._forward(**_filled(self._forward, {"q": q, "k": k, "v": v}, causal, scale))
        # (out, lse, ...), but before 2.7 (out, q, k, v, padded out, lse, ...)
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
        ours = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
        given = {"dout": dout, "q": q, "k": k, "v": v, "out": o}
        given |= {"softmax_lse": lse.contiguous(), "lse": lse.contiguous()}
        given |= dict(zip(("dq", "dk", "dv"), ours, strict=True))
        arguments = _filled(self._backward, given, causal, scale)
        told = self._backward(**arguments)
        found = ours if "dq" in arguments else told[:3]
        dquery, dkey, dvalue = (x.transpose(1, 2)[..., : query.shape[-1]] for x in found)
        return dquery, dkey, dvalue


def installed() -> Iterator[FlashAttnKernel]:
    """The versions that can be imported here, the newest first."""
    for name, module, forward, backward in _FOUND:
        try:
            interface = importlib.import_module(module)
            yield FlashAttnKernel(name, getattr(interface, forward), getattr(interface, backward))
        except (ImportError, AttributeError, OSError, RuntimeError):  # built for another torch, CUDA or GPU
            continue


def _filled(call: Callable[..., Any], tensors: dict[str, Tensor], causal: bool, scale: float) -> dict[str, Any]:
    """The arguments of this version's `call`: what it has no name for is not needed by it."""
    names = inspect.signature(getattr(call, "_init_fn", call)).parameters  # a torch custom op hides its function's
    said = {**tensors, **_SAID, "softmax_scale": scale, "causal": causal, "is_causal": causal}
    filled = {name: value for name, value in said.items() if name in names}
    unsaid = (name for name in _UNSAID if name in names and names[name].default is inspect.Parameter.empty)
    return filled | {name: _UNSAID[name] for name in unsaid}
