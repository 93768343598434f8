"""A sequence and its shards: which positions a rank holds, and the way there and back."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attention.agreement import agree, refuse
from attention.partition import Partition, partition_of
from tasp_coll import ArgumentError


def sequence_indices(
    total: int, *, comm: Any, is_causal: bool = True, cu_seqlens: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Positions in the sequence of this rank's tokens, in the order in which it holds them: (local,) int64, ascending.

    The same for every method, so they are what RoPE needs as `position_ids` and what picks the labels. A pure function
    of its arguments, `comm.rank` and `comm.size`. total: tokens of the whole sequence. is_causal: as the attention will
    be; its work is then even. cu_seqlens: boundaries of packed documents, (documents + 1,), from 0 to total.
    Raises ArgumentError for a bad total or bad boundaries.
    """
    return torch.from_numpy(checked(total, comm.size, is_causal, cu_seqlens).positions(comm.rank))


def shard_sequence(
    x: Tensor, dim: int, *, comm: Any, is_causal: bool = True, cu_seqlens: Sequence[int] | Tensor | None = None
) -> Tensor:
    """This rank's tokens of a tensor that all ranks hold whole: dimension `dim`, of any length, shrinks to them.

    No communication; differentiable, the gradient being that of this rank's part alone. Arguments as for
    `sequence_indices`.
    """
    dim = _dimension(x, dim)
    held = sequence_indices(x.shape[dim], comm=comm, is_causal=is_causal, cu_seqlens=cu_seqlens)
    return x.index_select(dim, held.to(x.device))


def unshard_sequence(
    x: Tensor, dim: int, *, comm: Any, is_causal: bool = True, cu_seqlens: Sequence[int] | Tensor | None = None
) -> Tensor:
    """The way back, collective: all ranks' tokens in their places, on every rank.

    Differentiable: the gradient of a rank's tokens is the sum of what all ranks' results had. Raises MismatchError on
    every rank if the shards do not fit together.
    """
    error, lengths, described = None, 0, {}
    try:
        dim = _dimension(x, dim)
        lengths = x.shape[dim]
        rest = [*x.shape[:dim], "tokens", *x.shape[dim + 1 :]]
        bounds = boundaries(cu_seqlens)
        described = {"shape": rest, "dtype": x.dtype, "dim": dim, "is_causal": bool(is_causal), "cu_seqlens": bounds}
    except ArgumentError as bad:
        error = bad
    agreed = agree(comm, "unshard_sequence", described, error, lengths)
    partition = checked(sum(agreed.tokens), comm.size, is_causal, cu_seqlens)
    check_tokens(agreed.tokens, partition, "x")
    return _Unshard.apply(x, dim, comm, partition)


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, comm: Any, partition: Partition) -> Tensor:
        ctx.settings = dim, comm, partition
        gathered = comm.decomposed_allgatherv(x.detach().movedim(dim, 0).contiguous())
        whole: Tensor = gathered.index_select(0, torch.from_numpy(partition.inverse).to(x.device)).movedim(0, dim)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        dim, comm, partition = ctx.settings
        grad = grads[0].movedim(dim, 0).index_select(0, torch.from_numpy(partition.order).to(grads[0].device))
        own = comm.decomposed_reduce_scatter(grad.contiguous(), counts=partition.lengths)
        return own.movedim(0, dim), None, None, None


def checked(total: int, ranks: int, is_causal: bool, cu_seqlens: Sequence[int] | Tensor | None) -> Partition:
    """The partition; ArgumentError for what makes none."""
    if isinstance(total, bool) or not isinstance(total, (int, np.integer)) or total < 0:
        raise refuse("total", "be an integer >= 0", repr(total))
    bounds = boundaries(cu_seqlens)
    if bounds is not None and bounds[-1] != total:
        raise refuse("cu_seqlens", f"end with the number of tokens, {total}", bounds[-1])
    return partition_of(int(total), ranks, bool(is_causal), bounds)


def boundaries(cu_seqlens: Sequence[int] | Tensor | None) -> tuple[int, ...] | None:
    """Documents' boundaries as integers; ArgumentError if they make no sense."""
    if cu_seqlens is None:
        return None
    if isinstance(cu_seqlens, Tensor):
        cu_seqlens = cu_seqlens.tolist()
    try:
        return _boundaries(tuple(cu_seqlens))
    except TypeError:
        raise refuse("cu_seqlens", "be a sequence of integers", repr(cu_seqlens)) from None


@lru_cache(maxsize=64)
def _boundaries(given: tuple[Any, ...]) -> tuple[int, ...]:
    whole = all(isinstance(bound, (int, np.integer)) and not isinstance(bound, bool) for bound in given)
    if not (whole and given and given[0] == 0 and all(a <= b for a, b in pairwise(given))):
        shown = given if len(given) <= 10 else f"{len(given)} values, {str(given[:5])[:-1]}, ...)"
        raise refuse("cu_seqlens", "be integers that begin with 0 and never fall", shown)
    return tuple(int(bound) for bound in given)


def check_tokens(tokens: tuple[int, ...], partition: Partition, name: str) -> None:
    """ArgumentError, on all ranks, if ranks do not hold what the partition gives them."""
    odd = [rank for rank, count in enumerate(tokens) if count != partition.lengths[rank]]
    if odd:
        rank = odd[0]
        raise ArgumentError(
            f"{name} must have the tokens that sequence_indices gives each rank, {partition.lengths[rank]} of "
            f"{partition.total} on rank {rank}, got {tokens[rank]} (is_causal, cu_seqlens as for shard_sequence)"
        )


def _dimension(x: object, dim: int) -> int:
    if not isinstance(x, Tensor) or not x.ndim:
        raise refuse(
            "x", "be a tensor with at least one dimension", type(x).__name__ if not isinstance(x, Tensor) else "0-d"
        )
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise refuse("dim", f"be one of the {x.ndim} dimensions of x", repr(dim))
    return dim % x.ndim
