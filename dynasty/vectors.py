"""Vectors on a wire: rows of 256 elements, each a block, as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynasty.integers import WIDTHS, Quantized, levels, rounded, steps_for
from dynasty.packing import pack, packed_bytes, unpack
from dynasty.tiles import Block
from dynasty.widths import HEAD_BITS, widths_within
from tasp_coll import ArgumentError

ROW = 256
BLOCK = Block(1, ROW)
_PLAIN = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Format:
    """How rows travel. bits: "dynamic", 2 to 8, "bfloat16" or "float32". mean_bits: of "dynamic", per element, all in.

    Raises ArgumentError for anything else.
    """

    bits: int | str = "dynamic"
    mean_bits: float = 4.0

    def __post_init__(self) -> None:
        bits, mean = self.bits, self.mean_bits
        known = bits in WIDTHS if isinstance(bits, int) and not isinstance(bits, bool) else bits in ("dynamic", *_PLAIN)
        if not known:
            raise ArgumentError(f'bits must be "dynamic", 2 to 8, "bfloat16" or "float32", got {bits!r}')
        if isinstance(mean, bool) or not isinstance(mean, (int, float)) or not 1 <= mean <= 8:
            raise ArgumentError(f"mean_bits must be a number from 1 to 8, got {mean!r}")

    def room(self, rows: int) -> int:
        """The most bytes that so many rows take."""
        if self.bits in _PLAIN:
            return rows * ROW * _PLAIN[str(self.bits)].itemsize
        if self.bits == "dynamic":  # a nibble for the width may be left over
            return int(self.mean_bits * ROW * rows) // 8 + rows % 2
        return packed_bytes(torch.full((rows,), self.bits), BLOCK)

    def encode(self, rows: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Rows as bytes, (at most room(rows),) uint8; rows (R, 256) float32 are left holding what was lost.

        generator: of stochastic rounding; None: to nearest. Rows that are not finite arrive as NaN and lose nothing.
        """
        if self.bits in _PLAIN:
            sent = rows.to(_PLAIN[str(self.bits)], copy=True)
            _lose(rows, sent.float(), rows.isfinite().all(1))
            return sent.view(torch.uint8).flatten()
        rounding = "nearest" if generator is None else "stochastic"
        peaks = rows.abs().amax(1)
        bits = self._widths(rows, peaks, rounding)
        steps = steps_for(peaks, bits, True).unsqueeze(1)
        codes = rounded(rows, steps, rounding, generator)
        finite = steps.isfinite().squeeze(1)
        codes[~finite] = 0
        rows.addcmul_(codes, torch.where(steps.isfinite(), steps, 0), value=-1)
        rows[~finite] = 0
        codes += levels(bits, signed=True).unsqueeze(1)
        shape = tuple(rows.shape)
        return pack(Quantized(codes.to(torch.uint8).unsqueeze(1), steps, bits.unsqueeze(1), shape, BLOCK))

    def decode(self, packed: Tensor, rows: int) -> tuple[Tensor, int]:
        """The way back, (rows, 256) float32, and how many bytes they took; what follows is left alone."""
        if self.bits in _PLAIN:
            taken = self.room(rows)
            return packed[:taken].clone().view(_PLAIN[str(self.bits)]).view(rows, ROW).float(), taken
        found = unpack(packed, (rows, ROW), block=BLOCK)
        return found.dequantize(), packed_bytes(found.bits, BLOCK)

    def _widths(self, rows: Tensor, peaks: Tensor, rounding: str) -> Tensor:
        if self.bits != "dynamic":
            return torch.full_like(peaks, self.bits, dtype=torch.uint8)
        squares = torch.linalg.vector_norm(rows, dim=1).square_() / ROW
        return widths_within(peaks, squares, ROW, self.mean_bits, rounding)


def _lose(rows: Tensor, sent: Tensor, finite: Tensor) -> None:
    """What is left of rows once `sent` of them has gone; nothing where they are not finite."""
    rows -= sent
    rows[~finite] = 0


__all__ = ["BLOCK", "HEAD_BITS", "ROW", "Format"]
