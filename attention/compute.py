"""Runs planned blocks on a kernel: forward into a running result, backward into gradients that add up."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attention.blocks import FULL, TURNED, Block, Keys, places
from attention.kernel_parts import tiles
from attention.kernels import Kernel
from attention.merge import Partial
from attention.partition import Indices
from attention.tracing import span

Gradients = tuple[Tensor, Tensor, Tensor]  # of query, key and value, in the wide dtype, added to


@dataclass(frozen=True)
class Place:
    """Where a block's operands are cut out of longer ones: tokens along dimension 2, tiles to the batch's dimension."""

    keys: Keys
    tiles: int
    turned: bool

    @classmethod
    def rows(cls, block: Block) -> Place:
        """Of the queries."""
        return cls(block.rows, block.tiles, block.kind == TURNED)

    @classmethod
    def columns(cls, block: Block) -> Place:
        """Of the keys."""
        return cls(block.keys, block.tiles, block.kind == TURNED)

    def take(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) -> (B * tiles, H, side, ...), a view where that can be."""
        if isinstance(self.keys, slice):
            x = x[:, :, self.keys]
        else:
            x = x.index_select(2, torch.from_numpy(self.keys).to(x.device))
        if self.tiles > 1:
            x = x.unflatten(2, (self.tiles, -1)).movedim(2, 1).flatten(0, 1)
        return x.flip(2) if self.turned else x

    def back(self, x: Tensor) -> Tensor:
        """What `take` did, undone: (B * tiles, H, side, ...) -> (B, H, tokens, ...)."""
        if self.turned:
            x = x.flip(2)
        return x.unflatten(0, (-1, self.tiles)).movedim(1, 2).flatten(2, 3) if self.tiles > 1 else x

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add what `back` gives to the tokens of `total` (B, H, S, ...)."""
        x = self.back(x)
        if isinstance(self.keys, slice):
            total[:, :, self.keys].add_(x)
        else:
            total.index_add_(2, torch.from_numpy(self.keys).to(x.device), x.to(total.dtype))


@dataclass(frozen=True)
class Compute:
    """A kernel and the scale of the scores."""

    kernel: Kernel
    scale: float

    def forward(
        self, blocks: Iterable[Block], query: Tensor, key: Tensor, value: Tensor, into: Partial, step: int = 0
    ) -> None:
        """query (B, H, L, D), key and value (B, Hkv, S, D): merges each block's result into the running one."""
        for block in blocks:
            rows = Place.rows(block)
            for heads, (keys, values), _ in self._tiles(block, query, key, value, step):
                with span("compute", step):
                    out, lse = self.kernel.forward(
                        rows.take(query[:, heads]), keys, values, causal=block.kind != FULL, scale=self.scale
                    )
                with span("merge", step):
                    into.add(block.rows, rows.back(out), rows.back(lse), heads)

    def backward(
        self, blocks: Iterable[Block], saved: Saved, key: Tensor, value: Tensor, into: Gradients, step: int = 0
    ) -> None:
        """Adds each block's part to the gradients of the queries and of these keys and values."""
        for part in self.parts(blocks, saved, key, value, into[0], step):
            part.add(into[1:], step)

    def parts(
        self, blocks: Iterable[Block], saved: Saved, key: Tensor, value: Tensor, dquery: Tensor, step: int = 0
    ) -> list[Part]:
        """Each block's part of the gradients of keys and values; that of queries is added to `dquery`."""
        return [part for block in blocks for part in self._parts(block, saved, key, value, dquery, step)]

    def _parts(
        self, block: Block, saved: Saved, key: Tensor, value: Tensor, dquery: Tensor, step: int
    ) -> Iterator[Part]:
        """One for each tile of heads of keys."""
        rows, part = Place.rows(block), None
        for heads, keys_values, shared in self._tiles(block, saved.query, key, value, step):
            grad, query, out, lse = (rows.take(x[:, heads]) for x in (saved.grad, saved.query, saved.out, saved.lse))
            with span("compute", step):
                found = self.kernel.backward(
                    grad, query, *keys_values, out, lse, causal=block.kind != FULL, scale=self.scale
                )
            with span("merge", step):
                rows.add(dquery[:, heads], found[0])
                if part is not None and part.heads == shared:
                    part.join(*found[1:])
                    continue
            if part is not None:
                yield part
            part = Part(Place.columns(block), shared, found[1], found[2])
        if part is not None:
            yield part

    def _tiles(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, step: int
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor], slice]]:
        """Heads of queries, the block's keys and values for them, and the heads of these; cut out tile by tile, as
        what does not lie evenly is copied."""
        columns, last, cut = Place.columns(block), None, (key, value)
        for heads, shared in tiles(query[:, :, block.rows], key.shape[1], self.kernel.near):
            if shared != last:
                with span("compute", step):
                    last, cut = shared, (columns.take(key[:, shared]), columns.take(value[:, shared]))
            yield heads, cut, shared


@dataclass(frozen=True)
class Saved:
    """What backward knows of the queries' side: (B, H, L, D), and lse (B, H, L); out and lse of the whole attention."""

    grad: Tensor
    query: Tensor
    out: Tensor
    lse: Tensor


@dataclass(frozen=True)
class Part:
    """A block's part of the gradients of some heads' keys and values, and where it belongs."""

    columns: Place
    heads: slice
    dkey: Tensor
    dvalue: Tensor

    def join(self, dkey: Tensor, dvalue: Tensor) -> None:
        """What other queries add."""
        self.dkey.add_(dkey)
        self.dvalue.add_(dvalue)

    def add(self, into: tuple[Tensor, ...], step: int = 0, moved: Indices | None = None) -> None:
        """into: of keys and values. moved: where in it the gradient of each key is, if not where the key was."""
        columns = self.columns if moved is None else replace(self.columns, keys=moved[places(self.columns.keys)])
        with span("merge", step):
            for total, part in zip(into, (self.dkey, self.dvalue), strict=True):
                columns.add(total[:, self.heads], part)
