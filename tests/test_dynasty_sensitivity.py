"""What errors of gradients are expected to do, beside what they do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynasty
from dynasty import Config
from dynasty.layout import Layout
from dynasty.operands import fake
from dynasty.sensitivity import activation_curves, gradient_curves, weight_curves
from dynasty.tiles import Block


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("zeros", [0.0, 0.5, 0.9])
def test_stochastic_rounding_errs_as_expected(bits: int, zeros: float) -> None:
    """Also where most values are 0, as behind a ReLU."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(256, 16, generator=generator) * (torch.rand(256, 16, generator=generator) >= zeros)
    layer: Any = dynasty.convert(nn.Sequential(nn.Linear(16, 16)), Config())[0]
    layer.observing = True
    layer.quantized_gradient(rows)
    layer.rows, layer.x_square[:], layer.w_slope[:] = 1, 1.0, 1.0
    expected, dropped = gradient_curves([layer], torch.tensor([float(bits), 0.0]))[0][0].tolist()
    assert dropped == pytest.approx(float(rows.square().mean()))
    torch.manual_seed(2)
    rounded = torch.stack([fake(rows, torch.tensor(bits), Block(), rounding="stochastic") for _ in range(20)])
    measured = float((rounded - rows).square().mean())
    assert measured / 2 <= expected <= measured * 2


def weight_gradients(model: Any, x: Tensor, y: Tensor) -> list[Tensor]:
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()
    return [layer.weight.grad.clone() for layer in Layout.of(model).layers]


def test_an_error_reaches_the_layers_before() -> None:
    """Gradients of the last, the middle or the first layer at 3 bits, all else at 8."""
    torch.manual_seed(0)
    parts = nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)
    model = dynasty.convert(nn.Sequential(*parts), Config())
    x, y = torch.randn(512, 48), torch.randn(512, 32) + 1
    layers = Layout.of(model).layers
    for layer in layers:
        layer.observing = True
    exact = weight_gradients(model, x, y)
    curves = gradient_curves(layers, torch.tensor([3.0]))
    for layer, curve in zip(layers, curves, strict=True):
        layer.observing = False
        layer.g_bits.fill_(3)
        runs = [weight_gradients(model, x, y) for _ in range(20)]
        layer.g_bits.fill_(8)
        errors = [
            sum(float((a - b).square().mean() / b.square().mean()) for a, b in zip(run, exact, strict=True))
            for run in runs
        ]
        measured, expected = sum(errors) / len(errors), float(curve.sum())
        assert measured / 2.5 <= expected <= measured * 2.5


def test_blocks_at_the_edges_are_judged_by_what_they_hold() -> None:
    """20 inputs and 10 outputs in blocks of 16: the zeros around them neither lower means nor count as elements."""
    torch.manual_seed(0)
    layer: Any = dynasty.convert(nn.Sequential(nn.Linear(20, 10)), Config())[0]
    layer.observing = True
    x = torch.randn(24, 20, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    widths, parts = torch.tensor([4.0]), (slice(0, 16), slice(16, 20))
    weights = layer.weight.detach()
    errors = (fake(weights, torch.full((1, 2), 4), Block(), clip=True) - weights).square()
    for block, part in enumerate(parts):
        slopes = layer.weight.grad[:, part].square()
        assert float(layer.w_slope[0, 0, block]) == pytest.approx(float(slopes.mean()), rel=0.05)
        expected = float(slopes.mean() * errors[:, part].sum())
        assert float(weight_curves(layer, widths)[block]) == pytest.approx(expected, rel=0.05)
        # The strip of 16 rows and that of 8 count alike.
        squares = [float(x.grad[rows, part].square().mean()) for rows in (slice(0, 16), slice(16, 24))]
        assert float(layer.x_slope[block]) == pytest.approx(sum(squares) / 2, rel=0.05)
        error = float(layer.x_peak[block]) / 7**2 / 12
        expected = 24 * (part.stop - part.start) * float(layer.x_slope[block]) * error
        assert float(activation_curves(layer, widths)[block]) == pytest.approx(expected, rel=1e-5)
