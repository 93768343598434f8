"""Collectives that carry few bits.

An all-reduce is two exchanges. Rows of 256 elements are dealt out to the ranks in turn, so that all parts are alike;
each rank packs every other rank's part within the same number of bytes and sends it there; each adds up in float32
what came, and the sums, packed again, travel over the decomposed rings. What packing loses can be kept and added to the
next call's: see `Feedback`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from attention.agreement import agree, refuse
from dynasty.feedback import Feedback
from dynasty.vectors import ROW, Format
from tasp_coll import ArgumentTypeError, CollectiveError

OPS = ("mean", "sum")


@dataclass(frozen=True)
class Sent:
    """What a call took on this rank.

    bytes: what this rank packed, times the ranks that it went to. float32_bytes: what an all-reduce, or an all-gather,
    of the same over rings sends per rank in float32. seconds: of the whole call; pack_seconds: of quantizing, packing
    and the ways back (on a GPU: until its work was given out). mean_bits: per element that travelled, everything
    included. error: what quantizing this rank's own part of the call lost, over what there was, both in the L2 norm.
    """

    bytes: int
    float32_bytes: int
    seconds: float
    pack_seconds: float
    mean_bits: float
    error: float


@dataclass
class _Count:
    """A call in progress."""

    began: float = field(default_factory=perf_counter)
    bytes: int = 0
    packing: float = 0.0
    lost: float = 0.0
    had: float = 0.0

    @contextmanager
    def pack(self) -> Iterator[None]:
        began = perf_counter()
        yield
        self.packing += perf_counter() - began

    def sent(self, float32_bytes: float) -> Sent:
        mean_bits = 32 * self.bytes / float32_bytes if float32_bytes else 0.0
        error = math.sqrt(self.lost / self.had) if self.had else 0.0
        return Sent(self.bytes, round(float32_bytes), perf_counter() - self.began, self.packing, mean_bits, error)


def all_reduce(
    grads: Tensor | Sequence[Tensor],
    comm: Any,
    *,
    op: str = "mean",
    bits: int | str = "dynamic",
    mean_bits: float = 4.0,
    feedback: Feedback | None = None,
    generator: torch.Generator | None = None,
) -> Sent:
    """The mean, or the sum, of all ranks' tensors in place, bit for bit the same on all ranks.

    grads: floating-point tensors of any shapes, on one device, as many elements on all ranks. They are changed once
    everything has arrived: a call that fails leaves them, and the feedback, as they were.
    bits: "dynamic" (each block of 256 elements has the width that makes the total error least, within `mean_bits` per
    element, everything included), 2 to 8 for all blocks, "bfloat16", or "float32" (`comm.decomposed_allreduce`).
    feedback: keeps what is lost for the next call. generator: rounds stochastically, so that the mean over its noise
    is the value (dropping no block); None: to nearest.

    A block in which some rank has an infinity or NaN is NaN on all ranks, so that who scales losses sees it. With one
    rank nothing travels and nothing is changed. Memory: the elements three times in float32,
    with feedback four times. It has run on tensors in host memory only; those of a GPU go through the same code.

    Raises ArgumentError if all ranks' arguments are bad, MismatchError on all ranks if they differ, before data moves;
    then what tasp_coll's collectives raise.
    """
    count = _Count()
    tensors = [grads] if isinstance(grads, Tensor) else grads
    described, error, form = {}, None, Format()
    try:
        form = _checked(tensors, op, bits, mean_bits)
        described = {"elements": sum(x.numel() for x in tensors), "op": op, **_described(form)}
    except CollectiveError as bad:
        error = bad
    if comm.size == 1 and error is not None:
        raise error
    if comm.size > 1:
        agree(comm, "all_reduce", described, error)
    elements = sum(x.numel() for x in tensors)
    if comm.size == 1 or not elements:
        return count.sent(0)
    of = f"all_reduce {op} of {elements} on rank {comm.rank} of {comm.size}"
    parts = _dealt(tensors, elements, comm.size)
    if feedback is not None:
        feedback.add(of, parts)
    if form.bits == "float32":
        result = comm.decomposed_allreduce(parts.view(-1)[:elements], op="avg" if op == "mean" else op)
        count.bytes = round(_ring_bytes(elements, comm.size))
        parts.zero_()
    else:
        result = _reduced(parts, comm, comm.size if op == "mean" else 1, form, generator, count)
    if feedback is not None:
        feedback.keep(of, parts)
    _written(result.view(-1), tensors)
    return count.sent(_ring_bytes(elements, comm.size))


def all_gather(
    params: Tensor,
    comm: Any,
    *,
    bits: int | str = "dynamic",
    mean_bits: float = 4.0,
    feedback: Feedback | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Sent]:
    """All ranks' shards one after another along axis 0, in params' dtype, bit for bit the same on all ranks.

    params: (rows, *rest) floating-point, rows may differ by rank and be 0; a 0-d tensor counts as (1,). This rank's own
    shard comes back as the others see it. With one rank it is a copy. Else as `all_reduce`.
    """
    count = _Count()
    described, error, form, shard, rows = {}, None, Format(), params, 0
    try:
        form = _checked([params], "mean", bits, mean_bits)
        shard = params.detach().reshape(1) if params.ndim == 0 else params.detach()
        rows = len(shard)
        described = {"rest of shape": tuple(shard.shape[1:]), "dtype": str(params.dtype), **_described(form)}
    except CollectiveError as bad:
        error = bad
    if comm.size == 1:
        if error is not None:
            raise error
        return shard.clone(), count.sent(0)
    lengths = agree(comm, "all_gather", described, error, tokens=rows).tokens
    width = math.prod(shard.shape[1:])
    of = f"all_gather of {shard.numel()} on rank {comm.rank} of {comm.size}"
    own = _dealt([shard], shard.numel(), 1)[:, 0]
    if feedback is not None:
        feedback.add(of, own)
    (packed,) = _packed(own.unsqueeze(0), form, generator, count)
    count.bytes = (comm.size - 1) * len(packed)
    gathered = comm.decomposed_allgatherv(packed)
    result = shard.new_empty((sum(lengths), *shard.shape[1:]))
    with count.pack():
        at = 0
        for part in result.split(lengths):
            found, taken = form.decode(gathered[at:], -(-part.numel() // ROW))
            part.copy_(found.view(-1)[: part.numel()].view_as(part))
            at += taken
    if feedback is not None:
        feedback.keep(of, own)
    return result, count.sent(4 * (comm.size - 1) * sum(lengths) * width / comm.size)


def _reduced(
    parts: Tensor, comm: Any, over: int, form: Format, generator: torch.Generator | None, count: _Count
) -> Tensor:
    """(rows, n, 256), of which part d is rank d's to add up -> all ranks' sums over `over`; parts hold what was lost.

    What the sums lost stands in this rank's own part, which is never packed itself.
    """
    rows, n = len(parts), comm.size
    send = torch.zeros((n, form.room(rows)), dtype=torch.uint8, device=parts.device)
    total = parts[:, comm.rank].clone()
    parts[:, comm.rank] = 0
    for row, packed in zip(send, _packed(parts.transpose(0, 1), form, generator, count), strict=True):
        row[: len(packed)] = packed
    received = comm.all_to_all(send)
    with count.pack():
        for rank in range(n):
            if rank != comm.rank:
                total += form.decode(received[rank], rows)[0]
        total /= over
        (packed,) = form.encode(total.unsqueeze(0), generator)
        torch.mul(total, over, out=parts[:, comm.rank])
    count.bytes = (n - 1) * (send.shape[1] + len(packed))
    gathered = comm.decomposed_allgatherv(packed)
    result, at = torch.empty_like(parts), 0
    with count.pack():
        for rank in range(n):
            result[:, rank], taken = form.decode(gathered[at:], rows)
            at += taken
    return result


def _packed(parts: Tensor, form: Format, generator: torch.Generator | None, count: _Count) -> list[Tensor]:
    """Parts (n, rows, 256) as bytes; what they had and lost is counted, where it is finite."""
    had = torch.linalg.vector_norm(parts, dim=-1).double().square()
    with count.pack():
        packed = form.encode(parts, generator)
    count.had += float(torch.where(had.isfinite(), had, 0).sum())
    count.lost += float(torch.linalg.vector_norm(parts, dim=-1).double().square().sum())
    return packed


def _ring_bytes(elements: int, ranks: int) -> float:
    return 2 * (ranks - 1) / ranks * 4 * elements


def _dealt(tensors: Sequence[Tensor], elements: int, parts: int) -> Tensor:
    """All elements in a copy of rows dealt out in turn, (rows, parts, 256) float32, zeros behind them."""
    rows = -(-elements // (ROW * parts))
    flat = tensors[0].new_empty(rows * parts * ROW, dtype=torch.float32)
    at = 0
    for tensor in tensors:
        flat[at : at + tensor.numel()].view(tensor.shape).copy_(tensor.detach())
        at += tensor.numel()
    flat[at:] = 0
    return flat.view(rows, parts, ROW)


def _written(flat: Tensor, tensors: Sequence[Tensor]) -> None:
    at = 0
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(flat[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()


def _described(form: Format) -> dict[str, object]:
    return {"bits": form.bits, **({"mean_bits": float(form.mean_bits)} if form.bits == "dynamic" else {})}


def _checked(tensors: Sequence[Tensor], op: str, bits: int | str, mean_bits: float) -> Format:
    """The format, or what is wrong with a call."""
    if not isinstance(tensors, (list, tuple)):
        raise ArgumentTypeError(f"grads must be tensors, a list or a tuple of them, got {type(tensors).__name__}")
    for odd in (x for x in tensors if not isinstance(x, Tensor) or not x.is_floating_point()):
        came = str(odd.dtype) if isinstance(odd, Tensor) else type(odd).__name__
        raise ArgumentTypeError(f"grads must be floating-point tensors, got {came}")
    if len(devices := {str(x.device) for x in tensors}) > 1:
        raise refuse("grads", "be on one device", ", ".join(sorted(devices)))
    if any(x.layout != torch.strided for x in tensors):
        raise refuse("grads", "be dense tensors", "a sparse one")
    if op not in OPS:
        raise refuse("op", f"be one of {', '.join(OPS)}", repr(op))
    return Format(bits, mean_bits)
