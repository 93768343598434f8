"""Integers of few bits as bytes, for wires and files.

What a packed matrix holds, in this order: a nibble per block with its width, two bytes per block with its step
(bfloat16), then the integers, blocks of 2 bits first. Blocks of one width stand together, so that all of them are
packed by one set of shifts: eight integers of b bits make one 64-bit word, of which the lowest b bytes are kept. In it
neighbours move together, then pairs, then fours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynasty.integers import WIDTHS, Quantized
from dynasty.tiles import Block
from tasp_coll import ArgumentError

_GROUP = 8  # integers that fill whole bytes at any width
_WORD = 64
_LANES = (8, 16, 32)  # bits from one integer, pair and four of a word to the next


def packed_bytes(bits: Tensor, block: Block) -> int:
    """Bytes of a packed matrix whose blocks have these widths. block.size must be a multiple of 8."""
    return -(-bits.numel() // 2) + 2 * bits.numel() + block.size // _GROUP * int(bits.sum())


def pack(matrix: Quantized) -> Tensor:
    """(bytes,) uint8 on the matrix's device. Raises ArgumentError for blocks whose size is no multiple of 8."""
    _check(matrix.block)
    bits = matrix.bits.reshape(-1)
    codes = _blocks(matrix.codes, matrix.block)
    parts = [_nibbles(bits), matrix.steps.reshape(-1).bfloat16().view(torch.uint8)]
    parts += [squeeze(codes[bits == width], width).reshape(-1) for width in WIDTHS]
    return torch.cat(parts)


def unpack(packed: Tensor, shape: tuple[int, ...], *, block: Block | None = None, signed: bool = True) -> Quantized:
    """The way back: what `pack` was given, exactly.

    packed: (bytes,) uint8, contiguous; what follows a packed matrix is left alone. shape: (..., M, K) of the matrix.
    Raises ArgumentError if the bytes cannot be of such a matrix.
    """
    block = block or Block()
    _check(block)
    grid = (*shape[:-2], *block.grid(*shape[-2:]))
    count = torch.Size(grid).numel()
    head = -(-count // 2)
    if len(packed) < head + 2 * count:
        raise ArgumentError(
            f"packed must have the {head + 2 * count} bytes of {count} blocks' heads, got {len(packed)}"
        )
    bits = _widths(packed[:head], count)
    if len(packed) < packed_bytes(bits, block):
        raise ArgumentError(f"packed must have {packed_bytes(bits, block)} bytes by its widths, got {len(packed)}")
    steps = packed[head : head + 2 * count].clone().view(torch.bfloat16).float()
    codes = packed.new_zeros((count, block.size))
    at = head + 2 * count
    for width in WIDTHS:
        chosen = (bits == width).nonzero().squeeze(1)
        end = at + len(chosen) * block.size // _GROUP * width
        codes[chosen] = spread(packed[at:end].view(len(chosen), block.size // _GROUP * width), width)
        at = end
    return Quantized(_strips(codes, grid, block), steps.view(grid), bits.view(grid), tuple(shape), block, signed)


def squeeze(codes: Tensor, width: int) -> Tensor:
    """(n, size) uint8 integers below 2^width -> (n, size * width / 8) bytes. size: a multiple of 8."""
    if width == WIDTHS[-1]:
        return codes
    rows, size = codes.shape
    words = codes.contiguous().view(torch.int64)
    for lane in _LANES:
        held = width * lane // _GROUP
        kept = _mask(held, 2 * lane)
        words = words & kept | words >> lane - held & kept << held
    return words.view(torch.uint8).view(-1, _GROUP)[:, :width].reshape(rows, size // _GROUP * width)


def spread(packed: Tensor, width: int) -> Tensor:
    """The way back: (n, bytes) -> (n, bytes * 8 / width) integers."""
    if width == WIDTHS[-1]:
        return packed
    rows, size = packed.shape
    padded = packed.new_zeros((rows * size // width, _GROUP))
    padded[:, :width] = packed.reshape(-1, width)
    words = padded.view(torch.int64)
    for lane in reversed(_LANES):
        held = width * lane // _GROUP
        kept = _mask(held, 2 * lane)
        words = words & kept | (words & kept << held) << lane - held
    return words.view(torch.uint8).view(rows, size // width * _GROUP)


def _mask(held: int, lane: int) -> int:
    """The lowest `held` bits of each `lane` bits of a word."""
    return sum((1 << held) - 1 << start for start in range(0, _WORD, lane))


def _nibbles(bits: Tensor) -> Tensor:
    even = torch.cat([bits, bits.new_zeros(len(bits) % 2)]).view(-1, 2)
    return even[:, 0] | even[:, 1] << 4


def _widths(nibbles: Tensor, count: int) -> Tensor:
    bits = torch.stack([nibbles & 15, nibbles >> 4], 1).view(-1)[:count]
    if bool(((bits == 1) | (bits > WIDTHS[-1])).any()):
        raise ArgumentError("packed must begin with blocks' widths, 0 or 2 to 8; these bytes do not")
    return bits


def _blocks(strips: Tensor, block: Block) -> Tensor:
    """(..., R, rows, C * columns) -> (blocks, size)."""
    return strips.unflatten(-1, (-1, block.columns)).transpose(-3, -2).reshape(-1, block.size)


def _strips(blocks: Tensor, grid: tuple[int, ...], block: Block) -> Tensor:
    return blocks.view(*grid, block.rows, block.columns).transpose(-3, -2).flatten(-2)


def _check(block: Block) -> None:
    if block.size % _GROUP:
        raise ArgumentError(
            f"block must have a multiple of {_GROUP} elements to be packed, got {block.rows} x {block.columns}"
        )
