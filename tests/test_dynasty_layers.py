"""Converted layers beside torch's own, and beside the same GEMMs of operands that were quantized by hand."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynasty
from dynasty import Block, Config, quantize
from dynasty.layers import DynamicConv2d, DynamicLinear
from dynasty.operands import channel_block

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(20, 33), (5, 20)),
    "linear of 3 axes, no bias": (lambda: nn.Linear(16, 8, bias=False), (2, 3, 16)),
    "linear of 1 axis": (lambda: nn.Linear(7, 3), (7,)),
    "conv": (lambda: nn.Conv2d(3, 20, 3, padding=1), (2, 3, 7, 6)),
    "conv, stride and dilation": (lambda: nn.Conv2d(18, 5, 3, stride=2, dilation=(1, 2)), (2, 18, 9, 9)),
    "conv, groups": (lambda: nn.Conv2d(32, 64, 3, groups=2, bias=False), (1, 32, 5, 5)),
    "conv, depthwise": (lambda: nn.Conv2d(20, 20, 3, groups=20, padding=1), (2, 20, 5, 5)),
    "conv, same": (lambda: nn.Conv2d(4, 6, (3, 4), padding="same"), (2, 4, 6, 7)),
    "conv, reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect"), (2, 4, 6, 7)),
    "conv, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 6, 7)),
    "conv, one image": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 7)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


def outcomes(layer: nn.Module, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """Output and gradients: of the input, then of each parameter."""
    x = x.clone().requires_grad_()
    out = layer(x)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)) if grad is None else grad
    return [out, *torch.autograd.grad(out, [x, *layer.parameters()], grad.to(out.dtype))]


@pytest.mark.parametrize("name", LAYERS)
def test_float32_is_torchs_own(name: str) -> None:
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape)
    converted = dynasty.convert(deepcopy(plain), Config(method="float32"))
    for found, wanted in zip(outcomes(converted, x), outcomes(plain, x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
def test_8_bits_are_close(name: str) -> None:
    make, shape = LAYERS[name]
    plain, x = make(), torch.randn(shape)
    converted = dynasty.convert(deepcopy(plain), Config(method="equal"))
    for found, wanted in zip(outcomes(converted, x), outcomes(plain, x), strict=True):
        assert (found - wanted).norm() < 0.03 * wanted.norm()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("positive", [False, True])
def test_a_linear_layer_is_gemms_of_quantized_operands(bits: int, positive: bool) -> None:
    """Where gradients need no rounding, as all have the magnitude of a block's peak, all three are exact."""
    layer, x = nn.Linear(36, 20, bias=False), torch.randn(40, 36)
    x = x.relu() if positive else x
    grad = torch.randn(40, 20).sign() * 0.5
    weight = quantize(layer.weight, bits, shared=True).dequantize()
    data = quantize(x, bits, signed=not positive, shared=True).dequantize()
    top = 2 ** (bits - 1) - 1
    # A step is rounded up, to an integer of 6 bits times a power of two.
    torch.testing.assert_close(quantize(grad, bits, shared=True).dequantize(), grad, rtol=1 / 16, atol=0)
    grad = grad.sign() * top / 16
    found = outcomes(dynasty.convert(layer, Config(method="equal", bits=bits)), x, grad)
    for value, wanted in zip(found, (data @ weight.T, grad @ weight, grad.T @ data), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-4)


def test_a_convolution_is_gemms_of_quantized_operands() -> None:
    """Activations in blocks of positions and channels, weights in blocks for each place of the kernel."""
    layer, x = nn.Conv2d(17, 18, 3, bias=False), torch.randn(2, 17, 6, 6)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 17)
    data = quantize(rows, 4, shared=True).dequantize().reshape(2, 6, 6, 17).permute(0, 3, 1, 2)
    places = quantize(layer.weight.permute(2, 3, 0, 1).reshape(9, 18, 17), 4, shared=True).dequantize()
    weight = places.permute(1, 2, 0).reshape(18, 17, 3, 3)
    wanted = nn.functional.conv2d(data, weight)
    torch.testing.assert_close(dynasty.convert(layer, Config(method="equal", bits=4))(x), wanted, rtol=1e-4, atol=1e-4)


def test_few_channels_share_blocks_with_more_positions() -> None:
    layer, x = nn.Conv2d(3, 4, 3, bias=False), torch.randn(2, 3, 9, 9)
    block = channel_block(3, Block())
    assert (block.rows, block.columns) == (86, 3)
    rows = x.permute(0, 2, 3, 1).reshape(-1, 3)
    data = quantize(rows, 4, block=block, shared=True).dequantize().reshape(2, 9, 9, 3).permute(0, 3, 1, 2)
    merged = quantize(layer.weight.permute(0, 2, 3, 1).reshape(4, 27), 4, shared=True).dequantize()
    wanted = nn.functional.conv2d(data, merged.reshape(4, 3, 3, 3).permute(0, 3, 1, 2))
    torch.testing.assert_close(dynasty.convert(layer, Config(method="equal", bits=4))(x), wanted, rtol=1e-4, atol=1e-4)


def test_weight_gradients_are_unbiased() -> None:
    """Each of many is within a step of what it should be; their mean is far nearer."""
    layer = nn.Linear(16, 16, bias=False)
    x, grad = torch.randn(16, 16), torch.randn(16, 16)
    data = quantize(x, 3, shared=True).dequantize()
    converted = dynasty.convert(layer, Config(method="equal", bits=3))
    times = 300
    found = torch.stack([outcomes(converted, x, grad)[2] for _ in range(times)])
    error = found.mean(0) - grad.T @ data
    assert (error.abs() < 5 * found.std(0) / times**0.5 + 1e-6).all()


def test_autocast_does_not_touch_the_operands() -> None:
    model = dynasty.convert(nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), Config(method="float32"))
    x = torch.randn(8, 16)
    wanted = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
        half = model[0](x.bfloat16())
    assert torch.equal(found, wanted)
    assert half.dtype is torch.bfloat16
    half.sum().backward()
    assert model[0].weight.grad.dtype is torch.float32


def test_an_image_of_no_rows() -> None:
    layer = dynasty.convert(nn.Linear(16, 4))
    out = layer(torch.zeros(0, 16, requires_grad=True))
    out.sum().backward()
    assert out.shape == (0, 4)
    assert torch.isfinite(layer.x_slope).all()
    assert torch.isfinite(layer.g_square).all()


def test_parameters_stay_the_same_tensors() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    before = list(model.parameters())
    converted = dynasty.convert(model)
    assert converted is model
    assert [id(each) for each in converted.parameters()] == [id(each) for each in before]
    assert isinstance(model[0], DynamicConv2d)
    assert isinstance(model[2], DynamicLinear)


def test_a_layer_as_root_and_layers_used_twice() -> None:
    layer = nn.Linear(16, 16)
    root = dynasty.convert(layer)
    assert isinstance(root, DynamicLinear)
    assert root.weight is layer.weight
    root.dynasty.step(1.0)
    shared = nn.Linear(16, 16)
    model = dynasty.convert(nn.Sequential(shared, nn.ReLU(), shared))
    assert model[0] is model[2]
    assert list(model.dynasty.maps()) == ["0"]


def test_skipped_and_unknown_layers_stay() -> None:
    class Own(nn.Linear):
        pass

    model = dynasty.convert(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Own(4, 4)), Config(skip=("1",)))
    assert [type(each) for each in model] == [DynamicLinear, nn.Linear, Own]


def trained(model: Any, steps: int) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 32)).square().mean()
        loss.backward()
        optimizer.step()
        model.dynasty.step(loss)
    return model


def test_state_is_in_checkpoints_and_copies() -> None:
    def make() -> Any:
        return dynasty.convert(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)), Config(warmup=2))

    model = trained(make(), 5)
    assert {int(each) for each in model[0].w_bits.flatten()} != {8}
    other = make()
    other.load_state_dict(model.state_dict())
    copy = deepcopy(model)
    for each in (other, copy):
        assert each.dynasty.report() == model.dynasty.report()
        assert each.dynasty.cost() == model.dynasty.cost()
        for name, maps in model.dynasty.maps().items():
            assert torch.equal(each.dynasty.maps()[name].weights, maps.weights)
        assert torch.equal(each[0].x_slope, model[0].x_slope)
        assert [layer.observing for layer in each.dynasty.layout.layers] == [False, False]
    trained(copy, 3)
    assert (copy.dynasty.report().step, model.dynasty.report().step) == (8, 5)


@pytest.mark.parametrize(
    "model, config, told",
    [
        (nn.ReLU(), None, "must have a Linear or Conv2d"),
        (nn.Sequential(nn.Linear(2, 2)), Config(skip=("0",)), "must have a Linear or Conv2d"),
        (nn.Sequential(nn.Linear(2, 2)), Config(skip=("7",)), "skip must name modules of the model, got 7"),
        (3, None, "model must be a torch.nn.Module, got int"),
        (dynasty.convert(nn.Linear(2, 2)), None, "must not have been converted before"),
    ],
)
def test_models_that_cannot_be_converted(model: Any, config: Config | None, told: str) -> None:
    with pytest.raises((ValueError, TypeError), match=told):
        dynasty.convert(model, config)


@pytest.mark.parametrize("period", [1, 7, 49, 64])
def test_statistics_of_some_strips_are_those_of_all(period: int) -> None:
    """Rows repeat as images do, and no sample falls into step with them; turns look at other strips."""
    block = Block()
    rows = torch.randn(period * 16, 32) * torch.linspace(0.1, 3, period * 16)[:, None]
    matrix = rows.repeat(-(-1024 // period), 1)
    strips = block.strips(matrix)
    samples = [block.sample(strips, turn) for turn in range(8)]
    assert {tuple(each.shape) for each in samples} == {(64, 16, 32)}
    assert block.seen_rows(strips.shape[0] * 16) == 1024
    wanted = block.means(strips.square(), *matrix.shape).mean()
    found = torch.stack([block.means(each.square(), *matrix.shape).mean() for each in samples])
    assert float((found / wanted - 1).abs().max()) < 0.25
    assert float(found.mean() / wanted - 1) == pytest.approx(0, abs=0.05)
    few = block.strips(rows[:16])
    assert block.sample(few, 3) is few
    assert block.seen_rows(16) == 16


def test_the_first_layers_slope_comes_from_a_part_of_the_batch() -> None:
    """Nothing else wants its input's gradient; where something does, it is of the whole."""
    layer: Any = dynasty.convert(nn.Sequential(nn.Conv2d(16, 16, 3)), Config())
    x, grad = torch.randn(64, 16, 6, 6), torch.randn(64, 16, 4, 4)
    slopes, macs = [], []
    for wanted in (False, True):
        layer[0].observing, layer[0].step_is_over = True, True
        layer[0].seen.zero_()
        layer(x.clone().requires_grad_(wanted)).backward(grad)
        slopes.append(float(layer[0].x_slope))
        macs.append(layer[0].extra_macs)
    assert macs == [16 * 16 * layer[0].weight.numel(), 0]
    assert slopes[0] == pytest.approx(slopes[1], rel=0.1)


def test_a_step_that_stands_out_does_not_drown_the_others() -> None:
    """Running means are of fourth roots."""
    layer: Any = dynasty.convert(nn.Sequential(nn.Linear(16, 16)), Config(decay=0.5))[0]
    layer.seen.fill_(1000)
    layer.x_slope.fill_(1)
    layer._note("x_slope", torch.full((1, 1), 81.0))
    assert float(layer.x_slope) == pytest.approx(2**4)
    layer._note("x_slope", torch.zeros(1, 1))
    assert float(layer.x_slope) == pytest.approx(1)


def test_what_was_seen_first_is_soon_forgotten() -> None:
    """Training begins with slopes of another size; later on `decay` says how long they are remembered."""
    layer: Any = dynasty.convert(nn.Sequential(nn.Linear(16, 16)), Config(decay=0.9))[0]
    weights = []
    for number in range(200):
        layer.x_slope.fill_(0)
        layer._note("x_slope", torch.ones(1, 1))
        weights.append(float(layer.x_slope) ** 0.25)
        layer.seen.fill_(number + 1)
    assert weights[:2] == pytest.approx([1, 13 / 14])
    assert weights == sorted(weights, reverse=True)
    assert weights[-1] == pytest.approx(0.1)
    held = 1.0
    for weight in weights[10:14]:  # steps 19, 20, 29 and 30 after the first 10
        held *= 1 - weight
    assert held < 0.1
