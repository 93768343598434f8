"""Integers of few bits as bytes, for wires and files.

What a packed matrix holds, in this order: a nibble per block with its width, two bytes per block with its step
(bfloat16), then the integers, blocks of 2 bits first. Blocks of one width stand together; integer i of each eighth of
what they hold, b bits wide, one after another fill byte i of b planes, so that whole planes of bytes are shifted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynasty.integers import WIDTHS, Quantized
from dynasty.tiles import Block
from tasp_coll import ArgumentError

_GROUP = 8  # integers that fill whole bytes at any width


def packed_bytes(bits: Tensor, block: Block) -> int:
    """Bytes of a packed matrix whose blocks have these widths. block.size must be a multiple of 8."""
    return -(-bits.numel() // 2) + 2 * bits.numel() + block.size // _GROUP * int(bits.sum())


def pack(matrix: Quantized) -> Tensor:
    """(bytes,) uint8 on the matrix's device. Raises ArgumentError for blocks whose size is no multiple of 8."""
    _check(matrix.block)
    bits = matrix.bits.reshape(-1)
    order, counts = _by_width(bits)
    codes = _blocks(matrix.codes, matrix.block)
    if len(counts) > 1:
        codes = codes[order]
    parts = [_nibbles(bits), matrix.steps.reshape(-1).bfloat16().view(torch.uint8)]
    runs = codes.split(list(counts.values()))
    parts += [squeeze(run.view(1, -1), width).view(-1) for width, run in zip(counts, runs, strict=True) if width]
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
    order, counts = _by_width(bits)
    codes = packed.new_zeros((count, block.size))
    at = head + 2 * count
    for (width, many), run in zip(counts.items(), codes.split(list(counts.values())), strict=True):
        end = at + many * block.size // _GROUP * width
        if width:
            run.view(1, -1).copy_(spread(packed[at:end].view(1, -1), width))
        at = end
    if len(counts) > 1:
        codes = torch.empty_like(codes).index_copy_(0, order, codes)
    return Quantized(_strips(codes, grid, block), steps.view(grid), bits.view(grid), tuple(shape), block, signed)


def squeeze(codes: Tensor, width: int) -> Tensor:
    """(n, size) uint8 integers below 2^width -> (n, size * width / 8) bytes, row by row. size: a multiple of 8."""
    if width == WIDTHS[-1]:
        return codes
    eighths = codes.unflatten(-1, (_GROUP, codes.shape[-1] // _GROUP))
    planes = codes.new_zeros((len(codes), width, eighths.shape[-1]))
    for place, (plane, shift) in _places(width):
        planes[:, plane] |= eighths[:, place] << shift
        if shift + width > 8:
            planes[:, plane + 1] |= eighths[:, place] >> 8 - shift
    return planes.flatten(1)


def spread(packed: Tensor, width: int) -> Tensor:
    """The way back: (n, bytes) -> (n, bytes * 8 / width) integers."""
    if width == WIDTHS[-1]:
        return packed
    planes = packed.unflatten(-1, (width, packed.shape[-1] // width))
    eighths = packed.new_empty((len(packed), _GROUP, planes.shape[-1]))
    for place, (plane, shift) in _places(width):
        torch.bitwise_right_shift(planes[:, plane], shift, out=eighths[:, place])
        if shift + width > 8:
            eighths[:, place] |= planes[:, plane + 1] << 8 - shift
    return eighths.bitwise_and_((1 << width) - 1).flatten(1)


def _places(width: int) -> list[tuple[int, tuple[int, int]]]:
    """Where each of eight integers begins: plane and bit."""
    return [(place, divmod(place * width, 8)) for place in range(_GROUP)]


def _by_width(bits: Tensor) -> tuple[Tensor, dict[int, int]]:
    """Blocks in the order of their widths, those of a width as they come, and how many there are of each."""
    ordered, order = bits.sort(stable=True)
    widths, counts = ordered.unique_consecutive(return_counts=True)
    return order, dict(zip(widths.tolist(), counts.tolist(), strict=True))


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
