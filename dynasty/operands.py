"""The three operands of a layer's GEMMs as matrices, and what they become at few bits.

A linear layer or convolution is three GEMMs: output = activations x weights, input gradient = gradients x weights,
weight gradient = gradients x activations. Each operand is quantized once and used in two of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynasty.integers import levels, rounded, steps_for
from dynasty.tiles import Block


def fake(
    matrix: Tensor, bits: Tensor, block: Block, *, rounding: str = "nearest", signed: bool = True, clip: bool = False
) -> Tensor:
    """`quantize(..., shared=True).dequantize()` without the integers: (..., M, K) -> (..., M, K) float32.

    clip: cut off what lies outside the best 2 and 3 bits of a normal distribution (see `integers.NORMAL_STEPS`).
    """
    strips = block.strips(matrix.float())
    squares = block.means(strips.square(), *matrix.shape[-2:]) if clip else None
    steps = steps_for(block.peaks(strips), bits, signed, squares, shared=True)
    beside = block.along(steps)
    counts = rounded(strips, beside, rounding)
    if clip:
        counts = counts.clamp_(-(most := block.along(levels(bits, signed=True))), most)
    return block.matrix(counts.mul_(beside), *matrix.shape[-2:])


def channel_block(channels: int, block: Block) -> Block:
    """Blocks of activations and gradients: fewer channels than a block is wide are all in one."""
    return block if channels >= block.columns else Block(-(-block.size // channels), channels)


def channels_last(x: Tensor) -> Tensor:
    """Images as the matrix that a GEMM sees, a row per position: (N, C, H, W) -> (M, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def images(matrix: Tensor, shape: torch.Size) -> Tensor:
    """The way back: (M, C) -> (N, C, H, W), channels last in memory."""
    batch, channels, height, width = shape
    return matrix.reshape(batch, height, width, channels).permute(0, 3, 1, 2)


def kernel_matrix(weight: Tensor, merged: bool) -> Tensor:
    """(out, in, h, w) -> (h * w, out, in): a matrix for each place of the kernel; merged: (1, out, h * w * in).

    Merged where the input has fewer channels than a block is wide: one block then spans several places.
    """
    out = weight.shape[0]
    if merged:
        return weight.permute(0, 2, 3, 1).reshape(1, out, -1)
    return weight.permute(2, 3, 0, 1).reshape(-1, out, weight.shape[1])


def kernel(matrix: Tensor, shape: torch.Size, merged: bool) -> Tensor:
    """The way back: to (out, in, h, w)."""
    out, channels, height, width = shape
    if merged:
        return matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
    return matrix.reshape(height, width, out, channels).permute(2, 3, 0, 1)
