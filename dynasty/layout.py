"""All quantizing layers of a model side by side: one vector of blocks for each kind of operand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynasty.layers import Quantizing
from dynasty.maps import Curves, Meetings, Widths
from dynasty.sensitivity import activation_curves, gradient_curves, weight_curves


@dataclass(frozen=True)
class Maps:
    """A layer's widths, uint8: activations (C,), weights (places, R, C), gradients (R,)."""

    activations: Tensor
    weights: Tensor
    gradients: Tensor


@dataclass(frozen=True)
class Layout:
    """names: of the layers, as in `model.named_modules()`; layers in that order."""

    names: tuple[str, ...]
    layers: tuple[Quantizing, ...]

    @classmethod
    def of(cls, model: nn.Module) -> Layout:
        """All that `model` has."""
        found = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Quantizing)]
        return cls(tuple(name for name, _ in found), tuple(layer for _, layer in found))

    def widths(self) -> Widths:
        """Those in force."""
        each = ([getattr(layer, f"{operand}_bits").flatten().float() for layer in self.layers] for operand in "xwg")
        return Widths(*map(torch.cat, each))

    def put(self, widths: Widths) -> None:
        """Puts widths in force."""
        for operand, bits in zip("xwg", widths, strict=True):
            buffers = [getattr(layer, f"{operand}_bits") for layer in self.layers]
            for buffer, part in zip(buffers, bits.split([buffer.numel() for buffer in buffers]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def maps(self) -> dict[str, Maps]:
        """Per layer's name."""
        held = ((layer.x_bits, layer.w_bits, layer.g_bits) for layer in self.layers)
        return {name: Maps(*(bits.clone() for bits in each)) for name, each in zip(self.names, held, strict=True)}

    def curves(self, choice: tuple[int, ...]) -> Curves:
        """Of all blocks, for these widths."""
        widths = torch.tensor(choice, dtype=torch.float32, device=self.layers[0].x_bits.device)
        x, w = ([kind(layer, widths) for layer in self.layers] for kind in (activation_curves, weight_curves))
        return Curves(widths, *map(torch.cat, (x, w, gradient_curves(self.layers, widths))))

    def meetings(self) -> Meetings:
        """Of a step like the last one."""
        x, g, u, elements = [], [], [], []
        inputs, outputs = 0, 0
        for layer in self.layers:
            block, (places, down, across) = layer.config.block, layer.w_bits.shape
            x.append(layer.input_blocks().to(layer.w_bits.device).flatten() + inputs)
            g.append(layer.output_blocks().to(layer.w_bits.device).flatten() + outputs)
            rows = -(-layer.rows // block.rows) * block.rows
            u.append(torch.full((places * down * across,), rows * block.size / 64, device=layer.w_bits.device))
            elements.append(_elements(layer))
            inputs, outputs = inputs + len(layer.x_bits), outputs + len(layer.g_bits)
        sums = Widths(*(torch.cat([getattr(each, o) for each in elements]) for o in "xwg"))
        return Meetings(torch.cat(x), torch.cat(g), torch.cat(u), sums, float(sum(layer.macs for layer in self.layers)))


def _elements(layer: Quantizing) -> Widths:
    """Of each block, evenly: the last of a row may have fewer than the others."""
    held = layer.input_rows * layer.inputs, layer.weight.numel(), layer.rows * layer.outputs
    buffers = layer.x_bits, layer.w_bits, layer.g_bits
    shared = zip(held, buffers, strict=True)
    return Widths(*(torch.full((b.numel(),), n / b.numel(), device=b.device) for n, b in shared))
