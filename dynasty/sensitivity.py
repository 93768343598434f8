"""What a width does to the loss, block by block, from statistics that training has at hand.

An error e at an element where the loss has the slope s changes the loss by s * e, to first order. Errors of rounding
have no preferred sign, so that what a block's errors do is expected to be, squared,

    elements * mean(s^2) * E(width)        E: mean squared error of an element

with the running mean of the squared gradient for mean(s^2). Errors of gradients do not change the loss of the step that
they are made in; they are priced by the errors of weight gradients that they cause, relative to those gradients.
Own derivation; the paper's analytics (arXiv 2210.17047) are not public.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynasty.integers import levels
from dynasty.layers import Quantizing
from dynasty.operands import fake

_TINY = 1e-30


def activation_curves(layer: Quantizing, widths: Tensor) -> Tensor:
    """Expected squared change of the loss: (C, widths)."""
    elements = layer.input_rows * layer.x_block.column_counts(layer.inputs, widths.device)
    signed = bool(layer.x_signed)
    return (elements * layer.x_slope)[:, None] * _nearest(layer.x_peak, layer.x_square, widths, signed)


def weight_curves(layer: Quantizing, widths: Tensor) -> Tensor:
    """The same for blocks of weights, (places * R * C, widths). Their errors are measured: weights are few."""
    block, matrix = layer.config.block, layer.to_matrix(layer.weight.detach())
    strips = block.strips(matrix.float())
    errors = []
    for width in widths.tolist():
        bits = torch.full_like(layer.w_bits, width)
        errors.append(block.sums((block.strips(fake(matrix, bits, block, clip=True)) - strips).square()).flatten())
    return layer.w_slope.flatten()[:, None] * torch.stack(errors, 1)


def gradient_curves(layers: Sequence[Quantizing], widths: Tensor) -> list[Tensor]:
    """Expected squared error of weight gradients over their mean square, a sum over layers: (R, widths) of each layer.

    What rounding does to a gradient is in the weight gradient of its own layer and, by way of the input gradient, in
    those of all layers before: in proportion to the gradients there, as both pass through the same weights. layers: in
    the order of the forward.
    """
    found, reached = [], torch.zeros((), device=widths.device)
    for layer in layers:
        square = layer.g_square.mean().clamp_min(_TINY)
        # A weight gradient is a sum over rows, in which errors, unlike gradients, have no common sign.
        own = layer.rows * layer.x_square.mean() * square / layer.w_slope.mean().clamp_min(_TINY)
        reached = reached + own
        noise = _stochastic(layer.g_peak, layer.g_mean, layer.g_square, widths)
        found.append(noise * reached / (square * len(layer.g_bits)))
    return found


def _stochastic(peak: Tensor, mean: Tensor, square: Tensor, widths: Tensor) -> Tensor:
    """E(width) of stochastic rounding, (blocks, widths). peak, mean, square: (blocks,), see `layers.STATISTICS`.

    A value at v above the lower of two integers' values d apart has the variance v * (d - v): none at 0, where many
    gradients behind a ReLU are; a sixth of d^2 in the mean where values are spread evenly; at most v * d.
    """
    most = levels(widths, signed=True)
    some = most.clamp_min(1)
    return torch.where(
        most > 0, torch.minimum(peak[:, None] / some.square() / 6, mean[:, None] / some), square[:, None]
    )


def _nearest(peak: Tensor, square: Tensor, widths: Tensor, signed: bool) -> Tensor:
    """E(width) of rounding to nearest, of blocks with such mean squared peaks and mean squares: (blocks, widths)."""
    most = levels(widths, signed).square()
    error = torch.minimum(peak[:, None] / most.clamp_min(1) / 12, square[:, None])
    return torch.where(most > 0, error, square[:, None])
