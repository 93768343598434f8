"""Linear and Conv2d whose three GEMMs see quantized operands.

Activations and weights are rounded to nearest, gradients stochastically, so that weight gradients stay unbiased. What
rounding does to a value is left out of the gradient ("straight through"). Widths are buffers, and so are the running
means that new widths are computed from: both are part of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dynasty.config import Config
from dynasty.operands import channel_block, channels_last, fake, images, kernel, kernel_matrix
from dynasty.tiles import Block

# Running means per block: of activations and gradients the squared peak (of gradients times the share of values that
# are not 0) and the square of a value; of gradients also the peak times the mean magnitude; of activations and weights
# the squared gradient that an element saw, which is what an error there does to the loss.
STATISTICS = ("x_peak", "x_square", "x_slope", "w_slope", "g_peak", "g_square", "g_mean")
_HASTE = 12  # how soon the first observations are forgotten


def _root(squares: Tensor) -> Tensor:
    return squares.sqrt().sqrt()


def _part(batch: int) -> int:
    """How much of a batch is enough for the statistics of a gradient that nothing else wants."""
    return -(-batch // 4)


class Quantizing(nn.Module):
    """What both layers share. `weight` and `bias` are those of the layer that was converted, float32 masters.

    Buffers: x_bits (C,), w_bits (places, R, C), g_bits (R,) uint8, the widths of blocks of input channels, weights and
    output channels; STATISTICS, float32, of the same shapes; seen (), observations so far; x_signed ().
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x_bits: Tensor
    w_bits: Tensor
    g_bits: Tensor
    x_signed: Tensor
    seen: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: Config, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.config, self.inputs, self.outputs = config, inputs, outputs
        self.observing = False
        self.rows = self.input_rows = 0  # of outputs' and inputs' matrices, in the last training step
        self.step_is_over = True  # the controller says so; until then uses of the layer add up
        self.noted = 0  # elements times sums of them that statistics took, if the step is observed
        self.extra_macs = 0  # of an input gradient that only the statistics need
        self.x_block, self.g_block = channel_block(inputs, config.block), channel_block(outputs, config.block)
        weights = self.to_matrix(self.weight)
        sizes = {
            "x": (self.x_block.grid(1, inputs)[1],),
            "w": (len(weights), *config.block.grid(*weights.shape[1:])),
            "g": (self.g_block.grid(1, outputs)[1],),
        }
        device = self.weight.device
        for operand, size in sizes.items():
            self.register_buffer(f"{operand}_bits", torch.full(size, config.bits, dtype=torch.uint8, device=device))
        for name in STATISTICS:
            self.register_buffer(name, torch.zeros(sizes[name[0]], device=device))
        self.register_buffer("x_signed", torch.tensor(True, device=device))
        self.register_buffer("seen", torch.tensor(0, device=device))

    # what a kind of layer says of itself

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The weights, or their gradient, as (places, out, K)."""
        raise NotImplementedError

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The way back."""
        raise NotImplementedError

    def rows_of(self, x: Tensor) -> Tensor:
        """Activations or gradients as (M, channels)."""
        raise NotImplementedError

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The way back of `rows_of`."""
        raise NotImplementedError

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """The first GEMM."""
        raise NotImplementedError

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        """The other two: the input's gradient and the weights'."""
        raise NotImplementedError

    def input_blocks(self) -> Tensor:
        """(places, R, C): which block of input channels each block of weights is multiplied with."""
        raise NotImplementedError

    def output_blocks(self) -> Tensor:
        """(places, R, C): which block of output channels each block of weights belongs to."""
        rows = torch.arange(self.w_bits.shape[1]) * self.config.block.rows // self.g_block.columns
        return rows.clamp_max(len(self.g_bits) - 1)[:, None].expand(self.w_bits.shape)

    # what both do

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the last training step's three GEMMs, without edges."""
        return 3 * self.rows * self.weight.numel()

    @property
    def observation_macs(self) -> int:
        """What an observed step's statistics take: a square for each element looked at of activations, gradients (and
        two sums) and weight gradient, and of the input's gradient, whose GEMM is counted where only they want it: of a
        quarter of the batch then.
        """
        return self.noted + self.weight.numel() + self.extra_macs

    def forward(self, x: Tensor) -> Tensor:
        """As the layer that was converted; the result has x's dtype."""
        out: Tensor = _Gemms.apply(x, self.weight, self)
        return out if self.bias is None else out + self._beside(self.bias.to(out.dtype), out)

    def quantized_input(self, x: Tensor) -> Tensor:
        if self.config.method == "float32":
            return x.float()
        rows = self.rows_of(x)
        signed = bool(rows.numel()) and bool(rows.amin() < 0)
        if self.observing and self.training and rows.numel():
            self.x_signed.fill_(signed)
            strips = self._some(self.x_block, rows)
            self._note("x_peak", self.x_block.peaks(strips).square())
            self._note("x_square", self.x_block.means(strips.square(), *rows.shape))
        return self.back(fake(rows, self.x_bits, self.x_block, signed=signed), x.shape)

    def quantized_weight(self) -> Tensor:
        if self.config.method == "float32":
            return self.weight.float()
        return self.from_matrix(fake(self.to_matrix(self.weight), self.w_bits, self.config.block, clip=True))

    def quantized_gradient(self, g: Tensor) -> Tensor:
        if self.config.method == "float32":
            return g.float()
        rows = self.rows_of(g)
        if self.observing and rows.numel():
            self._note_gradient(self._some(self.g_block, rows), rows.shape)
        return self.back(fake(rows, self.g_bits, self.g_block, rounding="stochastic"), g.shape)

    def observe(self, x_gradient: Tensor, w_gradient: Tensor) -> None:
        """The slopes; called last in an observed step."""
        slopes = self.rows_of(x_gradient)
        self._note("x_slope", self.x_block.means(self._some(self.x_block, slopes).square(), *slopes.shape))
        block, matrix = self.config.block, self.to_matrix(w_gradient)
        self._note("w_slope", block.means(block.strips(matrix).square(), *matrix.shape[1:]))
        self.seen += 1

    def get_extra_state(self) -> Tensor:
        """For checkpoints: how much there was to do, which the account of a training that goes on begins with."""
        return torch.tensor([self.rows, self.input_rows])

    def set_extra_state(self, state: Tensor) -> None:
        self.rows, self.input_rows = state.tolist()

    def count(self, rows: int, input_rows: int, first: bool) -> None:
        """Adds a use of the layer to the step's; first: only the statistics want the gradient of its input."""
        if self.step_is_over:
            self.rows = self.input_rows = self.extra_macs = self.noted = 0
            self.step_is_over = False
        self.rows, self.input_rows = self.rows + rows, self.input_rows + input_rows
        self.extra_macs += _part(rows) * self.weight.numel() if first else 0
        self.noted += 2 * self.x_block.seen_rows(input_rows) * self.inputs
        self.noted += 3 * self.g_block.seen_rows(rows) * self.outputs

    def statistics(self) -> Iterator[Tensor]:
        """The buffers that data-parallel ranks average."""
        return (getattr(self, name) for name in STATISTICS)

    def _some(self, block: Block, rows: Tensor) -> Tensor:
        """Strips of a matrix, enough of them for statistics."""
        return block.sample(block.strips(rows.float()), int(self.seen))

    def _note_gradient(self, strips: Tensor, shape: torch.Size) -> None:
        block, peaks = self.g_block, self.g_block.peaks(strips)
        self._note("g_peak", peaks.square() * block.means((strips != 0).float(), *shape))
        self._note("g_mean", peaks * block.means(strips.abs(), *shape))
        self._note("g_square", block.means(strips.square(), *shape))

    def _note(self, name: str, found: Tensor) -> None:
        held = getattr(self, name)
        found = found.mean(-2) if held.ndim == 1 else found
        # Weights grow as the _HASTE-th power of the observation's number (Shamir and Zhang 2013): what is remembered is
        # a part of the training so far, in whose beginning slopes change by orders of magnitude in a few steps.
        weight = max(1 - self.config.decay, (_HASTE + 1) / (int(self.seen) + 1 + _HASTE))
        # Of fourth roots: gradients of a single step stand out by factors of ten, and would drown those of all others.
        held.copy_(_root(held).lerp(_root(found.to(held.dtype)), weight).square().square())

    def _beside(self, bias: Tensor, out: Tensor) -> Tensor:
        return bias


class DynamicLinear(Quantizing):
    """`nn.Linear` at few bits: (..., in_features) -> (..., out_features)."""

    def __init__(self, layer: nn.Linear, config: Config) -> None:
        self.in_features, self.out_features = layer.in_features, layer.out_features
        super().__init__(layer, config, layer.in_features, layer.out_features)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return matrix.squeeze(0)

    def rows_of(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return matrix.reshape(shape)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        return g @ weight if wanted[0] else None, self.rows_of(g).T @ self.rows_of(x) if wanted[1] else None

    def input_blocks(self) -> Tensor:
        return torch.arange(self.w_bits.shape[2]).expand(self.w_bits.shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class DynamicConv2d(Quantizing):
    """`nn.Conv2d` at few bits: (N, in_channels, H, W) -> (N, out_channels, H', W')."""

    def __init__(self, layer: nn.Conv2d, config: Config) -> None:
        self.in_channels, self.out_channels, self.groups = layer.in_channels, layer.out_channels, layer.groups
        self.stride, self.dilation = list(layer.stride), list(layer.dilation)
        # Where padding is not of zeros, or not the same on both sides, the input is padded beforehand.
        zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        self.padding = [int(each) for each in layer.padding] if zeros else [0, 0]
        self.pad_mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self.pad_sides = [0, 0, 0, 0] if zeros else list(layer._reversed_padding_repeated_twice)
        self.merged = layer.in_channels // layer.groups < config.block.columns
        super().__init__(layer, config, layer.in_channels, layer.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:  # a single image, as nn.Conv2d takes it
            return self.forward(x.unsqueeze(0)).squeeze(0)
        if any(self.pad_sides):
            x = F.pad(x, self.pad_sides, self.pad_mode)
        return super().forward(x)

    def to_matrix(self, weight: Tensor) -> Tensor:
        return kernel_matrix(weight, self.merged)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        return kernel(matrix, self.weight.shape, self.merged)

    def rows_of(self, x: Tensor) -> Tensor:
        return channels_last(x)

    def back(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        return images(matrix, shape)

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def gradients(self, g: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Any, Any]:
        options = (self.stride, self.padding, self.dilation, False, [0, 0], self.groups)
        found = torch.ops.aten.convolution_backward(g, x, weight, None, *options, [*wanted, False])
        return found[0], found[1]

    def input_blocks(self) -> Tensor:
        places, down, across = self.w_bits.shape
        block, per_group = self.config.block, self.in_channels // self.groups
        first = torch.arange(down) * block.rows // (self.out_channels // self.groups) * per_group
        inside = torch.zeros(across, dtype=torch.long) if self.merged else torch.arange(across) * block.columns
        found = ((first[:, None] + inside) // self.x_block.columns).clamp_max(len(self.x_bits) - 1)
        return found.expand(places, down, across)

    def extra_repr(self) -> str:
        size = tuple(self.weight.shape[2:])
        return f"{self.in_channels}, {self.out_channels}, kernel_size={size}, stride={tuple(self.stride)}"

    def _beside(self, bias: Tensor, out: Tensor) -> Tensor:
        return bias.view(1, -1, 1, 1)


class _Gemms(torch.autograd.Function):
    """The three GEMMs of a layer. In float32, whatever autocast says: the operands' precision is our matter."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Quantizing) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            quantized, kernel_weight = layer.quantized_input(x), layer.quantized_weight()
            out = layer.product(quantized, kernel_weight)
        if layer.training:
            layer.count(out.numel() // layer.outputs, x.numel() // layer.inputs, not ctx.needs_input_grad[0])
        ctx.save_for_backward(quantized, kernel_weight)
        ctx.layer, ctx.dtypes = layer, (x.dtype, weight.dtype)
        return out.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        layer, (x, weight) = ctx.layer, ctx.saved_tensors
        wanted = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or layer.observing
        observed = layer.observing and grad.numel()
        with torch.autocast(grad.device.type, enabled=False):
            g = layer.quantized_gradient(grad)
            found = slope, _ = layer.gradients(g, x, weight, wanted)
            if observed and not wanted[0]:
                some = slice(_part(len(g)) if g.ndim > 1 else None)
                slope, _ = layer.gradients(g[some], x[some], weight, (True, False))
        if observed:
            layer.observe(slope, found[1])
        asked = zip(found, ctx.needs_input_grad[:2], ctx.dtypes, strict=True)
        return *(value.to(dtype) if needed else None for value, needed, dtype in asked), None
