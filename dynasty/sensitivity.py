"""What a width does to the loss, block by block, from statistics that training has at hand.

An error e at an element where the loss has the slope s changes the loss by s * e, to first order. Errors of rounding
have no preferred sign, so that what a block's errors do is expected to be, squared,

    elements * mean(s^2) * E(width)        E: mean squared error of an element

with the running mean of the squared gradient for mean(s^2). Errors of gradients do not change the loss of the step that
they are made in; they are priced by the error of the weight gradient that they cause, relative to that gradient.
Own derivation; the paper's analytics (arXiv 2210.17047) are not public.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dynasty.integers import levels
from dynasty.layers import Quantizing
from dynasty.operands import fake

_TINY = 1e-30


def activation_curves(layer: Quantizing, widths: Tensor) -> Tensor:
    """Expected squared change of the loss: (C, widths)."""
    elements = layer.input_rows * layer.inputs / len(layer.x_bits)
    signed = bool(layer.x_signed)
    return elements * layer.x_slope[:, None] * _rounding(layer.x_peak, layer.x_square, widths, signed, 12)


def weight_curves(layer: Quantizing, widths: Tensor) -> Tensor:
    """The same for blocks of weights, (places * R * C, widths). Their errors are measured: weights are few."""
    block, matrix = layer.config.block, layer.to_matrix(layer.weight.detach())
    strips = block.strips(matrix.float())
    errors = []
    for width in widths.tolist():
        bits = torch.full_like(layer.w_bits, width)
        errors.append(block.sums((block.strips(fake(matrix, bits, block, clip=True)) - strips).square()).flatten())
    return layer.w_slope.flatten()[:, None] * torch.stack(errors, 1)


def gradient_curves(layer: Quantizing, widths: Tensor) -> Tensor:
    """Squared error of the weight gradient over the mean square of that of the layer, (R, widths)."""
    inputs = layer.x_square.mean() * layer.w_bits.shape[0] * layer.rows
    noise = _rounding(layer.g_peak, layer.g_square, widths, True, 6, bounded=False)
    return noise * inputs / layer.w_slope.mean().clamp_min(_TINY)


def _rounding(peak: Tensor, square: Tensor, widths: Tensor, signed: bool, over: int, bounded: bool = True) -> Tensor:
    """E(width) of blocks with such mean squared peaks and mean squares: (blocks,) -> (blocks, widths).

    over: 12 for nearest, whose error is below the block's own square, 6 for stochastic rounding.
    """
    most = levels(widths, signed).square()
    error = peak[:, None] / most.clamp_min(1) / over
    if bounded:
        error = torch.minimum(error, square[:, None])
    return torch.where(most > 0, error, square[:, None])
