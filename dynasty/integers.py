"""Integers of 0 to 8 bits with one step per block.

Symmetric: a value is an integer times its block's step, the integer between -qmax and qmax = 2^(bits-1) - 1, or between
0 and 2^bits - 1 where nothing is negative, as after a ReLU. 0 bits drop a block. A step is the block's peak over qmax,
rounded up to bfloat16, so that what is computed with is what can be stored and sent.

Where a matrix is multiplied its steps are `shared`: integers of 6 bits times a power of two that they have in common,
so that products of blocks of different steps and widths add up as integers. Two levels of scales, integers under one
number, are VS-Quant's (Dai et al., MLSys 2021, arXiv 2102.04503).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dynasty.tiles import Block
from tasp_coll import ArgumentError, ArgumentTypeError

WIDTHS = (2, 3, 4, 5, 6, 7, 8)
ROUNDINGS = ("nearest", "stochastic")
# The step of the uniform quantizer with 2^bits - 1 levels that suits a normal distribution, over its root mean square.
# Weights have outliers that are worth cutting off at few bits; activations lose accuracy by it even at 8.
NORMAL_STEPS = {2: 1.22, 3: 0.59}
STEP_BITS = 6  # of the integers that shared steps are
_LARGEST, _SMALLEST = torch.finfo(torch.bfloat16).max, torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Quantized:
    """A matrix in integers.

    codes: (..., R, rows, C * columns) uint8, integers plus `levels(bits)` where signed. steps: (..., R, C) float32,
    values of bfloat16. bits: (..., R, C) uint8, 0 or 2 to 8. shape: (..., M, K), the matrix. block: its cut.
    """

    codes: Tensor
    steps: Tensor
    bits: Tensor
    shape: tuple[int, ...]
    block: Block
    signed: bool = True

    def dequantize(self) -> Tensor:
        """(..., M, K) float32."""
        values = self.codes.float()
        if self.signed:
            values -= self.block.along(levels(self.bits, signed=True))
        values *= self.block.along(self.steps)
        return self.block.matrix(values, *self.shape[-2:])


def quantize(
    matrix: Tensor,
    bits: int | Tensor,
    *,
    block: Block | None = None,
    rounding: str = "nearest",
    signed: bool = True,
    generator: torch.Generator | None = None,
    shared: bool = False,
) -> Quantized:
    """A matrix in integers of few bits.

    matrix: (..., M, K) floating point, on any device; for signed=False without negative elements. bits: 0 or 2 to 8,
    one for all blocks or (..., R, C) integers, broadcast. block: default 16 x 16. rounding: "nearest", or "stochastic",
    whose mean over its noise is the value itself. generator: of that noise, on the matrix's device. shared: whether all
    steps of `matrix` are small integers times one power of two; those of blocks far below the others are coarser then.

    A block that holds infinities or NaN has a step that is not finite and comes back as NaN throughout.
    Raises ArgumentError for arguments that do not fit.
    """
    block = block or Block()
    widths = _checked(matrix, bits, block, rounding)
    strips = block.strips(matrix.detach().float())
    steps = steps_for(block.peaks(strips), widths, signed, shared=shared)
    codes = rounded(strips, block.along(steps), rounding, generator)
    codes = torch.where(block.along(steps.isfinite()), codes, 0)
    if signed:
        codes += block.along(levels(widths, signed=True))
    return Quantized(codes.to(torch.uint8), steps, widths, tuple(matrix.shape), block, signed)


def levels(bits: Tensor, signed: bool) -> Tensor:
    """qmax, the largest integer of so many bits, as float32; 0 for 0 bits."""
    width = bits.to(torch.float32)
    return torch.exp2(width - 1).floor() - 1 + (bits == 0) if signed else torch.exp2(width) - 1


def steps_for(
    peaks: Tensor, bits: Tensor, signed: bool, mean_squares: Tensor | None = None, *, shared: bool = False
) -> Tensor:
    """What an integer counts in each block: (..., R, C) float32.

    mean_squares: of blocks whose values may be cut off at 2 and 3 bits, as weights': see NORMAL_STEPS.
    """
    wanted = peaks / levels(bits, signed).clamp_min(1)
    if mean_squares is not None:
        root = mean_squares.sqrt()
        for width, factor in NORMAL_STEPS.items():
            wanted = torch.where(bits == width, torch.minimum(wanted, factor * root), wanted)
    dropped = (bits == 0) & wanted.isfinite()
    return torch.where(dropped, 0.0, _up_to_shared(wanted, bits, signed) if shared else _up_to_bfloat16(wanted))


def rounded(strips: Tensor, steps: Tensor, rounding: str, generator: torch.Generator | None = None) -> Tensor:
    """Strips over their steps, as integers in float32. steps: as `Block.along` lays them out."""
    counts = strips / torch.where(steps > 0, steps, torch.inf)
    if rounding == "nearest":
        return counts.round_()
    return counts.add_(torch.rand(counts.shape, device=counts.device, generator=generator)).floor_()


def _up_to_bfloat16(steps: Tensor) -> Tensor:
    """Steps are not negative, so their bits rise with their value; rounded up no integer exceeds qmax."""
    up = ((steps.contiguous().view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return torch.where(steps.isfinite(), up.clamp_max(_LARGEST), steps)


def _up_to_shared(steps: Tensor, bits: Tensor, signed: bool) -> Tensor:
    """Steps times 2^bits, in proportion to the peaks, as integers of `STEP_BITS` times one power of two."""
    if not steps.numel():
        return steps
    places = torch.exp2(bits.float() - int(signed) - STEP_BITS)  # below 1, so that nothing becomes infinite
    wanted = steps * places
    most = torch.where(wanted.isfinite() & (bits > 0), wanted, 0.0).amax()
    unit = torch.exp2(torch.frexp(most)[1].float() - STEP_BITS)  # most is half of 2^STEP_BITS, or more
    unit = torch.where(most > (2**STEP_BITS - 1) * unit, 2 * unit, unit).clamp_min(_SMALLEST)
    return torch.where(steps.isfinite(), (wanted / unit).ceil() * unit / places, steps)


def _checked(matrix: Tensor, bits: int | Tensor, block: Block, rounding: str) -> Tensor:
    """The widths of all blocks, (..., R, C) uint8, or what is wrong."""
    if not isinstance(matrix, Tensor) or not matrix.is_floating_point() or matrix.ndim < 2:
        came = f"{matrix.dtype}, {tuple(matrix.shape)}" if isinstance(matrix, Tensor) else type(matrix).__name__
        raise ArgumentTypeError(f"matrix must be a floating-point tensor (..., M, K), got {came}")
    if rounding not in ROUNDINGS:
        raise ArgumentError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    wanted = torch.as_tensor(bits, device=matrix.device)
    if wanted.is_floating_point() or not bool(((wanted == 0) | ((wanted >= 2) & (wanted <= 8))).all()):
        raise ArgumentError(
            f"bits must be 0 or 2 to 8, got {bits if wanted.ndim == 0 else sorted(set(wanted.flatten().tolist()))}"
        )
    grid = (*matrix.shape[:-2], *block.grid(*matrix.shape[-2:]))
    try:
        return wanted.to(torch.uint8).broadcast_to(grid).contiguous()
    except RuntimeError:
        raise ArgumentError(f"bits must fit the blocks {grid}, got {tuple(wanted.shape)}") from None
