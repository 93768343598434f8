"""Keys and values as they travel in few bits: of every token as many bytes, so that rows can still be cut anywhere.

Channels are divided by their root mean square over all tokens, sorted by what an error there costs (`kv_widths`), and
cut into groups of 8 to 32; a group has one width in the whole call, and one scale for each token. The scale is a byte:
a float of 5 exponent and 3 mantissa bits, rounded up, so that no integer exceeds its width. Keys have channels that are
much larger than others, which is why a scale over unlike channels costs so much (KIVI, arXiv 2402.02750): dividing by a
mean that all ranks share takes them out at the cost of no byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from attention.kv_bits import group_of, padded
from dynasty.integers import levels
from dynasty.packing import spread, squeeze
from dynasty.tiles import Block

# Of a scale: a float32's bits from the 20th on are its exponent and 3 bits of its mantissa, here counted from 2^-15.6.
# Peaks over a root mean square end at the root of the number of tokens: 2^16 is more than there will be.
_MANTISSA, _LOWEST, _BAD = 20, 890, 255


@dataclass(frozen=True, eq=False)
class Codec:
    """How keys and values of a call become bytes, the same on all ranks.

    heads, head_dim: of keys. order: which of the channels (2, heads, padded head_dim) stands where on the wire; what is
    not among them is dropped. widths: (width, groups) as they follow each other there. rms: of the channels on the
    wire, 1 where nothing is. Both (channels on the wire,), on the device of keys.

    An integer times its group's scale is the value, in float32. A token's group that holds infinities, NaN, or more
    than 2^16 times its channel's root mean square comes back as NaN; one below 2^-16 of it as 0.
    """

    heads: int
    head_dim: int
    order: Tensor
    widths: tuple[tuple[int, int], ...]
    rms: Tensor

    @property
    def bits(self) -> float:
        """Of an element, scales included."""
        return 8 * sum(self._split) / (2 * self.heads * self.head_dim)

    def encode(self, tokens: Tensor) -> Tensor:
        """(..., 2, B, Hkv, D) of any float dtype -> (..., bytes) uint8."""
        x = self._to_wire(tokens)
        scales = _scales(Block(1, self._group).peaks(x.unsqueeze(-2)))
        peaks = _peaks(scales)
        grouped = x.unflatten(1, (-1, self._group))
        grouped.mul_(torch.where(peaks > 0, self._levels / peaks, 0.0).unsqueeze(-1)).round_()
        codes = grouped.add_(self._levels.unsqueeze(-1)).to(torch.uint8).flatten(1)
        parts = codes.split([groups * self._group for _, groups in self.widths], 1)
        squeezed = (squeeze(part, width) for part, (width, _) in zip(parts, self.widths, strict=True))
        return torch.cat([scales, *squeezed], 1).view(*tokens.shape[:-4], tokens.shape[-3] * sum(self._split))

    def decode(self, packed: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., bytes) -> (..., 2, B, Hkv, D)."""
        each = sum(self._split)
        batch = packed.shape[-1] // each
        scales, *parts = packed.reshape(packed.shape[:-1].numel() * batch, each).split(self._split, 1)
        codes = torch.cat([spread(part, width) for part, (width, _) in zip(parts, self.widths, strict=True)], 1)
        grouped = codes.float().unflatten(1, (-1, self._group)).sub_(self._levels.unsqueeze(-1))
        grouped.mul_((_peaks(scales) / self._levels).unsqueeze(-1))
        tokens = pad(grouped.flatten(1).mul_(self.rms).to(dtype), (0, 1)).index_select(1, self._back)
        return tokens.view(*packed.shape[:-1], batch, 2, self.heads, self.head_dim).transpose(-4, -3)

    def _to_wire(self, tokens: Tensor) -> Tensor:
        """(..., 2, B, Hkv, D) -> (all of them, channels) float32 over their root mean square, memory of its own."""
        tokens = pad(tokens, (0, padded(self.head_dim) - self.head_dim)).transpose(-4, -3)
        flat = tokens.reshape(tokens.shape[:-3].numel(), tokens.shape[-3:].numel())
        return flat.index_select(1, self.order).float().div_(self.rms)

    @cached_property
    def _group(self) -> int:
        return group_of(self.head_dim)

    @cached_property
    def _levels(self) -> Tensor:
        """The largest integer of each group, (groups,)."""
        widths = torch.tensor([width for width, groups in self.widths for _ in range(groups)], dtype=torch.uint8)
        return levels(widths, signed=True).to(self.rms.device)

    @cached_property
    def _split(self) -> list[int]:
        """Bytes of a token of a sequence: scales, then the channels of each width."""
        return [len(self.order) // self._group, *(groups * self._group * width // 8 for width, groups in self.widths)]

    @cached_property
    def _back(self) -> Tensor:
        """Where on the wire each channel (2, heads, head_dim) stands; of the dropped ones, just behind."""
        places = self.order.new_full((2, self.heads, padded(self.head_dim)), len(self.order))
        places.view(-1)[self.order] = torch.arange(len(self.order), device=places.device)
        return places[..., : self.head_dim].reshape(-1)


def _scales(peaks: Tensor) -> Tensor:
    """Peaks >= 0 rounded up to a byte."""
    held = (peaks.contiguous().view(torch.int32) + (1 << _MANTISSA) - 1 >> _MANTISSA) - _LOWEST
    return held.clamp_(0, _BAD).to(torch.uint8)


def _peaks(scales: Tensor) -> Tensor:
    """What a byte of a scale says, float32."""
    peaks = (scales.int() + _LOWEST << _MANTISSA).view(torch.float32)
    return torch.where(scales == _BAD, torch.nan, torch.where(scales == 0, 0.0, peaks))
