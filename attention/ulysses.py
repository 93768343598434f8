"""Heads instead of tokens: an all-to-all gives every rank all tokens of some heads, and another one brings them back.

(DeepSpeed-Ulysses, arXiv 2309.14509.) Where there are fewer heads of keys than ranks, several ranks get the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attention.agreement import refuse
from attention.forecast import deals
from attention.partition import Partition
from attention.tracing import span


def check_heads(query_heads: int, heads: int, ranks: int) -> None:
    """ArgumentError if the heads cannot be dealt out."""
    if not deals(query_heads, heads, ranks):
        rule = f"be 'tasp', 'ring' or 'allgather' where heads cannot be dealt out to {ranks} ranks"
        raise refuse("method", rule, f"'ulysses' with {query_heads} heads of queries and {heads} of keys")


def dealt(heads: int, ranks: int) -> list[list[int]]:
    """Which heads each rank gets."""
    each = max(heads // ranks, 1)
    return [list(range(first := rank * heads // ranks, first + each)) for rank in range(ranks)]


@dataclass(frozen=True)
class Exchange:
    """Between (B, H, local tokens, D) and (B, heads of a rank, all tokens, D), the latter in the sequence's order."""

    comm: Any
    partition: Partition

    def to_heads(self, x: Tensor) -> Tensor:
        """All-to-all. Blocks must be equally long, so shorter shards travel with an unused token or two."""
        longest, ranks = max(self.partition.lengths), self.comm.size
        rows = x.permute(1, 2, 0, 3)  # heads, tokens, B, D
        heads = [rows[own] for own in dealt(x.shape[1], ranks)]
        send = x.new_zeros((ranks, len(heads[0]), longest, *rows.shape[2:]))
        for rank, own in enumerate(heads):
            send[rank, :, : x.shape[2]] = own
        found = self._exchanged(send)
        tokens = [found[rank, :, :count] for rank, count in enumerate(self.partition.lengths)]
        order = torch.from_numpy(self.partition.inverse).to(x.device)
        return torch.cat(tokens, 1).index_select(1, order).permute(2, 0, 1, 3)

    def to_tokens(self, x: Tensor, heads: int) -> Tensor:
        """The way back; what several ranks hold of the same head is added up."""
        ranks, lengths = self.comm.size, self.partition.lengths
        order = torch.from_numpy(self.partition.order).to(x.device)
        rows = x.permute(1, 2, 0, 3).index_select(1, order)
        send = x.new_zeros((ranks, x.shape[1], max(lengths), *rows.shape[2:]))
        for rank, part in enumerate(rows.split(lengths, 1)):
            send[rank, :, : lengths[rank]] = part
        found = self._exchanged(send)[:, :, : lengths[self.comm.rank]]
        whole = found.new_zeros((heads, *found.shape[2:]))
        for part, own in zip(found, dealt(heads, ranks), strict=True):
            whole[own] += part
        return whole.permute(2, 0, 1, 3)

    def _exchanged(self, send: Tensor) -> Tensor:
        with span("wait"):
            return self.comm.all_to_all(send)


class ToHeads(torch.autograd.Function):
    """`Exchange.to_heads`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.settings = exchange, x.shape[1]
        return exchange.to_heads(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        exchange, heads = ctx.settings
        return exchange.to_tokens(grads[0], heads), None


class ToTokens(torch.autograd.Function):
    """`Exchange.to_tokens` of as many heads as there are, each on one rank."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.to_tokens(x.detach(), x.shape[1] * exchange.comm.size)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.exchange.to_heads(grads[0]), None
