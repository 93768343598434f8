"""`context_parallel_attention`: what users call in place of torch's `scaled_dot_product_attention`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention import choice
from attention.agreement import agree, refuse
from attention.blocks import Task
from attention.compute import Compute, Saved
from attention.kernels import kernel_for
from attention.kv_bits import Bits
from attention.kv_widths import codec_for
from attention.methods import Gather, Job, Local, Method, Rings
from attention.partition import Partition, partition_of
from attention.sequence import boundaries, check_tokens, checked
from attention.tracing import span
from attention.ulysses import Exchange, ToHeads, ToTokens, check_heads
from tasp_coll import ArgumentError, ArgumentTypeError, Communicator

METHODS = ("auto", "tasp", "ring", "allgather", "ulysses")
_STEPWISE: dict[str, Method] = {"tasp": Rings("rings"), "ring": Rings("ring"), "allgather": Gather()}
_CALL = "context_parallel_attention"


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    comm: Communicator,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    window: int | None = None,
    method: str = "auto",
    kv_bits: int | str | None = None,
) -> Tensor:
    """Attention of this rank's queries over all ranks' keys: `scaled_dot_product_attention` of a sequence in shards.

    query: (B, H, L, D), key, value: (B, Hkv, L, D): this rank's L tokens, those of `sequence_indices` in that order, L
        differing by rank (0 allowed); all else the same on all ranks. float64, float32, bfloat16 or float16; value's
        head_dim equals query's. Hkv < H (grouped queries; keys travel as they are) needs enable_gqa=True.
    attn_mask: None, or a bool mask (..., L, total) that says no more than is_causal, cu_seqlens and window do.
    dropout_p: 0. is_causal: a token sees those up to itself, by position in the whole sequence.
    scale: of the scores, None: 1 / sqrt(D).
    comm: a `tasp_coll.Communicator`. The call is collective, and so is its backward.
    cu_seqlens: boundaries of packed documents in the whole sequence, (documents + 1,), from 0 to total; a token sees
        its own document only. The same for every sequence of the batch.
    window: a token sees the `window` latest keys, itself among them (causal), or those closer than that (not causal).
    method: "tasp" (all link-disjoint rings), "ring" (one), "allgather" (all keys at once, memory grows with the total),
        "ulysses" (heads over ranks), or "auto", which takes the fastest by the cost model and the measured speed of
        the kernel. On rings step t+1 travels while step t is computed.
    kv_bits: None: keys and values travel as they are. 2 to 8: as integers of so many bits, with a scale of 8 more bits
        for each 32 channels of a token (16 or 8 where head_dim is no multiple of 32); "dynamic": as integers of 0 and
        2 to 8 bits, 4 in the mean, "dynamic:5" of 5, channels getting more by what an error there costs
        (`attention.kv_widths`). A rank's own keys and values are exact; gradients travel in float32 and belong to
        what arrived. Not for "ulysses". `attention.kv_error` tells what it costs.

    Returns (B, H, L, D) in query's dtype; differentiable once. Results do not change from run to run. Beyond inputs and
    results, "tasp" and "ring" hold two steps of keys and values forward (and copy a head of what a causal step needs);
    backward two more steps of gradients in float32.
    Raises ArgumentError if all ranks' arguments are bad alike, else MismatchError on every rank, before any key moves.
    """
    if not isinstance(comm, Communicator):
        raise ArgumentTypeError(f"comm must be a tasp_coll.Communicator, got {type(comm).__name__}")
    described, bounds, error = {}, None, None
    request = Request(query, key, value, bool(is_causal), scale, window, method, kv_bits)
    try:
        request.check(attn_mask, dropout_p, enable_gqa, comm.size)
        bounds = boundaries(cu_seqlens)
        described = {**request.described(bounds), "attn_mask": attn_mask is not None}
    except ArgumentError as bad:
        error = bad
    tokens = query.shape[2] if error is None else 0
    rate = choice.rate_of(query) if method == "auto" and error is None else 0.0
    peak = choice.peak_of(query) if error is None else 0.0
    agreed = agree(comm, _CALL, described, error, tokens, (rate, peak))
    partition = checked(sum(agreed.tokens), comm.size, is_causal, bounds)
    check_tokens(agreed.tokens, partition, "query")
    if attn_mask is not None:
        _check_mask(comm, attn_mask, Task(partition, window, comm.rank))
    rate, peak = agreed.figures
    call = choice.Call.of(comm, partition, window, query, key, Bits.of(kv_bits))
    name = call.method(rate) if method == "auto" else method
    return _attend(comm, partition, request, name, call.stretch(name, peak, described["grad"] is True))


@dataclass(frozen=True)
class Request:
    """What a caller wants, and its checks."""

    query: Tensor
    key: Tensor
    value: Tensor
    is_causal: bool
    scale: float | None
    window: int | None
    method: str
    kv_bits: int | str | None = None

    def check(self, attn_mask: object, dropout_p: float, enable_gqa: bool, ranks: int) -> None:
        """ArgumentError for what this rank can see to be wrong."""
        self._check_tensors(enable_gqa)
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise refuse("method", f"be one of {', '.join(METHODS)}", repr(self.method))
        if Bits.of(self.kv_bits) and self.method == "ulysses":
            raise refuse("kv_bits", "be None with method 'ulysses': take 'tasp', 'ring' or 'allgather'", self.kv_bits)
        if self.method == "ulysses":
            check_heads(self.query.shape[1], self.key.shape[1], ranks)
        if dropout_p:
            rule = (
                "be 0: drop whole outputs after the attention instead, as blocks on several ranks draw no common mask"
            )
            raise refuse("dropout_p", rule, repr(dropout_p))
        if attn_mask is not None and not (isinstance(attn_mask, Tensor) and attn_mask.dtype == torch.bool):
            raise refuse(
                "attn_mask", f"be None or bool; {_INSTEAD}", f"a mask of {getattr(attn_mask, 'dtype', attn_mask)}"
            )
        if self.window is not None and (
            isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1
        ):
            raise refuse("window", "be an integer >= 1 or None", repr(self.window))
        if self.scale is not None and not (isinstance(self.scale, (int, float)) and math.isfinite(self.scale)):
            raise refuse("scale", "be a finite number or None", repr(self.scale))

    def _check_tensors(self, enable_gqa: bool) -> None:
        for name, x in (("query", self.query), ("key", self.key), ("value", self.value)):
            if not isinstance(x, Tensor) or x.ndim != 4:
                came = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
                raise refuse(name, "be a tensor (batch, heads, local tokens, head_dim)", came)
            if x.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
                raise refuse(name, "be of float64, float32, bfloat16 or float16", x.dtype)
            if (x.dtype, x.device) != (self.query.dtype, self.query.device):
                raise refuse(
                    name,
                    f"be of query's dtype and device, {self.query.dtype} on {self.query.device}",
                    f"{x.dtype} on {x.device}",
                )
        (batch, heads, tokens, dim), kv = self.query.shape, self.key.shape
        if not batch or not heads or not dim or not kv[1]:
            raise refuse(
                "query, key", "have at least one sequence, head and element", f"{tuple(self.query.shape)}, {tuple(kv)}"
            )
        if self.value.shape != kv:
            raise refuse("value", f"have key's shape {tuple(kv)}", tuple(self.value.shape))
        if (kv[0], kv[2], kv[3]) != (batch, tokens, dim):
            raise refuse(
                "key", f"have query's batch, tokens and head_dim, ({batch}, heads, {tokens}, {dim})", tuple(kv)
            )
        if heads % kv[1]:
            raise refuse("key", f"have a number of heads that divides query's {heads}", kv[1])
        if heads != kv[1] and not enable_gqa:
            raise refuse("enable_gqa", f"be True for {kv[1]} heads of keys and {heads} of queries", enable_gqa)

    def described(self, bounds: tuple[int, ...] | None) -> dict[str, object]:
        """What must be the same on all ranks."""
        batch, heads, _, dim = self.query.shape
        return {
            "batch": batch,
            "heads": heads,
            "kv_heads": self.key.shape[1],
            "head_dim": dim,
            "dtype": self.query.dtype,
            "is_causal": self.is_causal,
            "scale": self.scale,
            "cu_seqlens": bounds,
            "window": self.window,
            "method": self.method,
            "kv_bits": self.kv_bits,
            "grad": torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value)),
        }


def _attend(comm: Any, partition: Partition, request: Request, method: str, stretch: float) -> Tensor:
    query, key, value = request.query, request.key, request.value
    scale = 1 / math.sqrt(query.shape[3]) if request.scale is None else float(request.scale)
    compute = Compute(kernel_for(query), scale)
    if method != "ulysses" or comm.size == 1:
        bits = Bits.of(request.kv_bits) if comm.size > 1 else None
        codec = None
        if bits is not None:
            with torch.no_grad(), span("pack"):
                codec = codec_for(comm, bits, query, key, value, scale, partition.total)
        job = Job(comm, Task(partition, request.window, comm.rank), compute, codec, stretch)
        return _Attention.apply(query, key, value, job, Local() if comm.size == 1 else _STEPWISE[method])
    exchange = Exchange(comm, partition)
    bounds = partition.documents if len(partition.documents) > 2 else None
    whole = partition_of(partition.total, 1, partition.causal, bounds)
    job = Job(comm, Task(whole, request.window, 0), compute)
    per_head = [ToHeads.apply(x, exchange) for x in (query, key, value)]
    return ToTokens.apply(_Attention.apply(*per_head, job, Local()), exchange)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, job: Job, method: Method) -> Tensor:
        query, key, value = (x.detach() for x in (query, key, value))
        out, lse = method.forward(job, query, key, value)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.job, ctx.method = job, method
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, out, lse = ctx.saved_tensors
        found = ctx.method.backward(ctx.job, Saved(grad, query, out, lse), key, value)
        return *(gradient.to(x.dtype) for gradient, x in zip(found, (query, key, value), strict=True)), None, None


_INSTEAD = "use is_causal, cu_seqlens (documents) and window, and leave padding out of the sequence"


def _check_mask(comm: Any, mask: Tensor, task: Task) -> None:
    """A mask may say what the other arguments say. Collective."""
    error, total = None, task.partition.total
    rows = torch.from_numpy(task.partition.positions(task.rank))
    try:
        allowed = torch.from_numpy(task.allowed(rows.numpy()))
        if mask.ndim < 2 or mask.shape[-2:] != allowed.shape:
            raise refuse("attn_mask", f"be (..., {len(rows)}, {total}): this rank's tokens by all", tuple(mask.shape))
        if not (mask.cpu() == allowed).all():
            raise refuse("attn_mask", f"say no more than the other arguments; {_INSTEAD}", "one that does")
    except ArgumentError as bad:
        error = bad
    agree(comm, _CALL, {}, error)
