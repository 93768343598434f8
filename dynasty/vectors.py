"""Vectors on a wire: rows of 256 elements, each a block, as bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynasty.integers import WIDTHS, Quantized, levels, rounded, steps_for
from dynasty.packing import pack, packed_bytes, unpack
from dynasty.tiles import Block
from dynasty.widths import widths_within
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

    def encode(self, parts: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """Each part as bytes of its own, (at most room(rows),) uint8.

        parts: (n, rows, 256) float32, left holding what was lost. generator: of stochastic rounding; None: to nearest.
        Rows that are not finite arrive as NaN, or as they are where nothing is quantized, and lose nothing.
        """
        if self.bits in _PLAIN:
            sent = parts.to(_PLAIN[str(self.bits)], copy=True).contiguous()
            parts -= sent
            parts[~sent.isfinite().all(-1)] = 0
            return [part.view(torch.uint8).flatten() for part in sent]
        rounding = "nearest" if generator is None else "stochastic"
        peaks = parts.abs().amax(-1)
        bits = self._widths(parts, peaks, rounding)
        steps = steps_for(peaks, bits, True).unsqueeze(-1)
        spoilt = ~steps.isfinite()
        finite = torch.where(spoilt, 0, steps)
        codes = rounded(parts, finite, rounding, generator)
        parts.addcmul_(codes, finite, value=-1)
        if bool(spoilt.any()):
            codes[spoilt.squeeze(-1)] = 0
            parts[spoilt.squeeze(-1)] = 0
        codes += levels(bits, signed=True).unsqueeze(-1)
        shape, numbers = (
            tuple(parts.shape[1:]),
            codes.to(torch.uint8, memory_format=torch.contiguous_format).unsqueeze(-2),
        )
        each = zip(numbers, steps, bits.unsqueeze(-1), strict=True)
        return [pack(Quantized(*part, shape, BLOCK)) for part in each]

    def decode(self, packed: Tensor, rows: int) -> tuple[Tensor, int]:
        """The way back, (rows, 256) float32, and how many bytes they took; what follows is left alone."""
        if self.bits in _PLAIN:
            taken = self.room(rows)
            return packed[:taken].clone().view(_PLAIN[str(self.bits)]).view(rows, ROW).float(), taken
        found = unpack(packed, (rows, ROW), block=BLOCK)
        return found.dequantize(), packed_bytes(found.bits, BLOCK)

    def _widths(self, parts: Tensor, peaks: Tensor, rounding: str) -> Tensor:
        if self.bits != "dynamic":
            return torch.full_like(peaks, int(self.bits), dtype=torch.uint8)
        squares = torch.linalg.vector_norm(parts, dim=-1).square_() / ROW
        return widths_within(peaks, squares, ROW, self.mean_bits, rounding)
