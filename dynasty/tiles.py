"""How matrices are cut into blocks.

A matrix (..., M, K) is cut into blocks of `rows` x `columns`. Where they do not fit, zeros are added at the end; they
never raise a peak. It is held as strips (..., R, rows, C * columns), which is the matrix itself where nothing had to be
added: operations on it run along whole rows, many times faster than on small square tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from tasp_coll import ArgumentError

_SAMPLE = 64  # strips
_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Block:
    """rows x columns elements that share a scale and a width."""

    rows: int = 16
    columns: int = 16

    def __post_init__(self) -> None:
        for name, value in (("rows", self.rows), ("columns", self.columns)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ArgumentError(f"{name} of a block must be an integer >= 1, got {value!r}")

    @property
    def size(self) -> int:
        """Elements of a block."""
        return self.rows * self.columns

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """Blocks along the rows and the columns of a matrix."""
        return -(-rows // self.rows), -(-columns // self.columns)

    def strips(self, matrix: Tensor) -> Tensor:
        """(..., M, K) -> (..., R, rows, C * columns), a view if the blocks fit."""
        down, across = self.grid(*matrix.shape[-2:])
        spare_rows, spare_columns = down * self.rows - matrix.shape[-2], across * self.columns - matrix.shape[-1]
        if spare_rows or spare_columns:
            matrix = pad(matrix, (0, spare_columns, 0, spare_rows))
        return matrix.unflatten(-2, (down, self.rows))

    def seen_rows(self, rows: int) -> int:
        """How many rows of so many `sample` looks at."""
        return _SAMPLE * self.rows if _many(self.grid(rows, 1)[0]) else rows

    @staticmethod
    def sample(strips: Tensor, turn: int) -> Tensor:
        """Some of many strips (R, rows, C * columns), spread evenly: enough for a mean. Others at each turn."""
        count = len(strips)
        if not _many(count):
            return strips
        numbers = torch.arange(turn * _SAMPLE, (turn + 1) * _SAMPLE, dtype=torch.float64, device=strips.device)
        # Multiples of the golden section never fall into step with what repeats in the rows, as images do.
        return strips[(numbers * _GOLDEN % 1 * count).long()]

    def matrix(self, strips: Tensor, rows: int, columns: int) -> Tensor:
        """The way back: (..., R, rows, C * columns) -> (..., M, K), a view."""
        return strips.flatten(-3, -2)[..., :rows, :columns]

    def along(self, per_block: Tensor) -> Tensor:
        """A value per block (..., R, C) as it stands beside strips, (..., R, 1, C * columns), a view if C is 1."""
        if per_block.shape[-1] == 1:
            return per_block.unsqueeze(-2).expand(*per_block.shape[:-1], 1, self.columns)
        return per_block.repeat_interleave(self.columns, -1).unsqueeze(-2)

    def peaks(self, strips: Tensor) -> Tensor:
        """The largest magnitude in each block, (..., R, C). NaN and infinity stay what they are."""
        return _halves(_halves(strips.abs(), -2).squeeze(-2).unflatten(-1, (-1, self.columns)), -1).squeeze(-1)

    def means(self, strips: Tensor, rows: int, columns: int) -> Tensor:
        """Of each block's elements, (..., R, C), the zeros that were added left out. strips: of a matrix of that size.

        Of strips that are a `sample` the last is taken for a full one: there are many.
        """
        sums, down = self.sums(strips), strips.shape[-3]
        if down < self.grid(rows, columns)[0]:
            rows = down * self.rows
        if rows % self.rows or columns % self.columns:
            device = sums.device
            return sums / torch.outer(_held(rows, self.rows, device), self.column_counts(columns, device))
        return sums / self.size

    def column_counts(self, columns: int, device: torch.device) -> Tensor:
        """(C,): how many columns each block of so many has."""
        return _held(columns, self.columns, device)

    def sums(self, strips: Tensor) -> Tensor:
        """The sum of each block, (..., R, C)."""
        return strips.sum(-2).unflatten(-1, (-1, self.columns)).sum(-1)


def _held(total: int, side: int, device: torch.device) -> Tensor:
    """How much of `total` each part of length `side` has: the last one what is left."""
    return (total - torch.arange(0, total, side, device=device)).clamp_max(side)


def _many(strips: int) -> bool:
    """Whether some are enough."""
    return strips >= 2 * _SAMPLE


def _halves(values: Tensor, dim: int) -> Tensor:
    """The largest along a dimension, which is kept: torch's own `amax` of short dimensions is several times slower."""
    while (length := values.shape[dim]) > 1:
        half = length // 2
        larger = torch.maximum(values.narrow(dim, 0, half), values.narrow(dim, half, half))
        values = torch.cat([larger, values.narrow(dim, length - 1, 1)], dim) if length % 2 else larger
    return values
