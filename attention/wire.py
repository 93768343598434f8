"""Keys and values as they travel: rows of tokens, so that a shard can be cut by rows anywhere.

A row is (width, 2, batch, kv heads, head_dim): for each of its tokens (see `Partition.wire`) the key, then the value.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from attention.partition import Indices, Partition, spaced


def pack(partition: Partition, rank: int, key: Tensor, value: Tensor) -> Tensor:
    """key, value (B, Hkv, L, D) of a rank -> (rows, width, 2, B, Hkv, D)."""
    rows = empty(partition, rank, key, key.dtype)
    for (wire_key, wire_value), held in _runs(partition, rank, rows):
        wire_key.copy_(key[:, :, held])
        wire_value.copy_(value[:, :, held])
    return rows


def empty(partition: Partition, rank: int, key: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a rank's rows of keys like these (B, Hkv, L, D)."""
    batch, heads, _, dim = key.shape
    return key.new_empty((partition.rows(rank), partition.width, 2, batch, heads, dim), dtype=dtype)


def unpack(partition: Partition, rank: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
    """The way back: into key and value (B, Hkv, L, D)."""
    for (wire_key, wire_value), held in _runs(partition, rank, rows):
        key[:, :, held].copy_(wire_key)
        value[:, :, held].copy_(wire_value)


def places(partition: Partition, rank: int) -> Indices:
    """Where each of a rank's tokens is on the wire, (tokens,)."""
    wire = partition.wire(rank).reshape(-1)
    found = np.empty(partition.lengths[rank], np.int64)
    found[wire[wire >= 0]] = np.flatnonzero(wire >= 0)
    return found


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(rows, width, 2, B, Hkv, D) -> views of keys and values, (B, Hkv, rows * width, D)."""
    return token_sides(rows.flatten(0, 1))


def token_sides(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """(S, 2, B, Hkv, D) -> views of keys and values, (B, Hkv, S, D)."""
    return tokens[:, 0].permute(1, 2, 0, 3), tokens[:, 1].permute(1, 2, 0, 3)


def _runs(partition: Partition, rank: int, rows: Tensor) -> Iterator[tuple[tuple[Tensor, Tensor], slice]]:
    """For each segment: its keys and values on the wire, and where its tokens are held."""
    key, value = sides(rows)
    offset = 0
    for segment, at in partition.pieces(rank, 0, len(rows)):
        placed = spaced(at, segment.tokens, partition.width)
        yield (key[:, :, placed], value[:, :, placed]), slice(offset, offset + segment.tokens)
        offset += segment.tokens
