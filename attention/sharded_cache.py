"""A key-value cache of transformers that is split over the ranks, and the attention of new tokens to it.

After the prefill each rank keeps the keys and values of its own tokens. A new token at position p is kept by rank
p mod n, so that the parts stay balanced. Its query, which all ranks have, attends to each part; the partial results
are merged by their log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

import tasp_coll
from attention.kernels import kernel_for
from attention.merge import Partial


@dataclass(frozen=True)
class Step:
    """One forward call: tokens start..start+count-1 of the sequence come in."""

    start: int
    count: int
    held: NDArray[np.int64] | None  # prefill: positions of this rank's tokens; None: all ranks have all tokens
    cache: ShardedCache | None

    @property
    def stop(self) -> int:
        """Tokens of the sequence after this call."""
        return self.start + self.count

    def layer(self, index: int) -> ShardedLayer | None:
        """That layer's part of the cache; None if there is none."""
        return None if self.cache is None else self.cache.layers[index]


class ShardedLayer(DynamicLayer):
    """One layer's part: keys and values (batch, kv heads, kept tokens, head_dim), and where those tokens are."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset()

    def reset(self) -> None:
        """Empty it."""
        self.keys: Any = None
        self.values: Any = None
        self.is_initialized = False
        self.positions = np.empty(0, np.int64)  # of the kept tokens, ascending
        self.seen = 0  # tokens of the sequence, over all ranks
        self.forgotten = 0  # those before have left the window

    def append(self, key: Tensor, value: Tensor, positions: NDArray[np.int64], seen: int) -> None:
        """Keep these tokens; the sequence has `seen` tokens now."""
        if not self.is_initialized:
            self.dtype, self.device = key.dtype, key.device
            self.keys, self.values = key.contiguous(), value.contiguous()
            self.is_initialized = True
        elif len(positions):
            self.keys = torch.cat([self.keys, key], dim=-2)
            self.values = torch.cat([self.values, value], dim=-2)
        self.positions = np.concatenate([self.positions, positions])
        self.seen = seen

    def forget(self, before: int) -> None:
        """Drop tokens at positions below `before`: no window will reach them again."""
        self.forgotten = max(self.forgotten, before)
        if gone := int(np.searchsorted(self.positions, before)):
            self.keys, self.values = self.keys[..., gone:, :].clone(), self.values[..., gone:, :].clone()
            self.positions = self.positions[gone:]

    def get_seq_length(self) -> int:
        """Tokens of the whole sequence, not of this rank's part."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask, of which none is made."""
        return self.seen + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the sequence; the argument is minus their number."""
        seen = self.seen - abs(tokens_to_remove)
        if self.forgotten and tokens_to_remove:
            raise tasp_coll.ArgumentError("crop: tokens that left the sliding window cannot come back into it")
        kept = int(np.searchsorted(self.positions, seen))
        self.keys, self.values = self.keys[..., :kept, :], self.values[..., :kept, :]
        self.positions, self.seen = self.positions[:kept], seen


class ShardedCache(Cache):
    """What `generate` passes on from step to step inside `sharded_generation`; its length is the whole sequence's."""

    def __init__(self, comm: tasp_coll.Communicator) -> None:
        super().__init__(layer_class_to_replicate=ShardedLayer)
        self.comm = comm
        self.step: Step | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep this rank's tokens of those that come in. Returns the latter: attention finds the rest in the layer."""
        if self.step is None:
            raise tasp_coll.ArgumentError("a ShardedCache takes tokens only inside sharded_generation(model)")
        while len(self.layers) <= layer_idx:
            self.layers.append(ShardedLayer())
        step, layer = self.step, self.layers[layer_idx]
        if step.held is not None:
            kept = len(step.held)  # none of them if this is the token of a rank that holds none
            layer.append(key_states[..., :kept, :], value_states[..., :kept, :], step.held, step.stop)
        else:
            turns = np.arange(step.start, step.stop)
            mine = turns[turns % self.comm.size == self.comm.rank]
            index = torch.from_numpy(mine - step.start).to(key_states.device)
            layer.append(key_states.index_select(-2, index), value_states.index_select(-2, index), mine, step.stop)
        return key_states, value_states


def decode(
    query: Tensor, layer: ShardedLayer, step: Step, *, window: int | None, scale: float, comm: tasp_coll.Communicator
) -> Tensor:
    """Attention of new tokens, (batch, heads, count, head_dim) and the same on all ranks, to all ranks' parts.

    Each partial result is packed with its log-sum-exp, so that one small allgather brings all. Not differentiable.
    """
    if torch.is_grad_enabled() and query.requires_grad:
        raise tasp_coll.ArgumentError("tokens after a prefill have no gradient here: use torch.no_grad()")
    partial = Partial(query)
    keys, values = layer.keys.to(query.dtype), layer.values.to(query.dtype)
    for rows, seen in visible(layer.positions, step, window):
        block = (query[:, :, rows], keys[:, :, seen], values[:, :, seen])
        partial.add(rows, *kernel_for(query).forward(*block, causal=False, scale=scale))
    out, lse = partial.finish()
    packed = torch.cat([out.to(lse.dtype), lse[..., None]], dim=-1)
    parts = comm.decomposed_allgather(packed[None])
    weights = parts[..., -1:].softmax(dim=0)  # a part that holds nothing has -inf there; one part at least has some
    merged: Tensor = (parts[..., :-1] * weights).sum(dim=0)
    return merged.to(query.dtype)


def visible(positions: NDArray[np.int64], step: Step, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Which of the kept tokens the new ones see, rows that see the same together; those that see none are left out."""
    places = np.arange(step.start, step.stop)
    last = np.searchsorted(positions, places, side="right")
    first = np.zeros_like(last) if window is None else np.searchsorted(positions, places - window, side="right")
    changes = np.flatnonzero((np.diff(first) != 0) | (np.diff(last) != 0)) + 1
    edges = [0, *changes.tolist(), step.count]
    for begin, end in pairwise(edges):
        if first[begin] < last[begin]:
            yield slice(begin, end), slice(int(first[begin]), int(last[begin]))
