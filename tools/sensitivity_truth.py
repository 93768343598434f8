"""What one block at few bits does to the loss, measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dynasty.integers import steps_for
from dynasty.layers import Quantizing
from dynasty.layout import Layout
from dynasty.tiles import Block
from sensitivity_figures import Floats
from train_dynasty_models import ResNet, logits

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Spot:
    """A block: of a layer's activations, or weights; number: its place in the layer's vector of widths, flattened."""

    layer: str
    operand: str
    number: int


@dataclass(frozen=True)
class Stage:
    """A part of a model that is run by itself. name: of the module whose layers it holds."""

    name: str
    run: Callable[[Tensor], Tensor]


def in_float32(model: nn.Module) -> nn.Module:
    """A copy of a converted model whose layers quantize nothing."""
    copy = deepcopy(model)
    for layer in Layout.of(copy).layers:
        layer.config = replace(layer.config, method="float32")
    return copy


@torch.no_grad()
def changes(
    model: nn.Module, spots: Sequence[Spot], batches: Sequence[Batch], bits: int, dithers: int, seed: int
) -> Floats:
    """Mean squared changes of the loss over dithers of one block: (spots, batches). model: in float32."""
    generator = torch.Generator().manual_seed(seed)
    stages = _stages(model)
    layers = dict(model.named_modules())
    found = np.zeros((len(spots), len(batches)))
    for number, (inputs, targets) in enumerate(batches):
        held = [inputs]  # what enters each stage, and what leaves the last
        for stage in stages:
            held.append(stage.run(held[-1]))
        before = _loss(held[-1], targets)
        for row, spot in enumerate(spots):
            first = next(i for i, stage in enumerate(stages) if f"{spot.layer}.".startswith(f"{stage.name}."))
            layer = layers[spot.layer]
            for _ in range(dithers):
                with _dithered(layer, spot, bits, generator):
                    out = held[first]
                    for stage in stages[first:]:
                        out = stage.run(out)
                found[row, number] += (_loss(out, targets) - before) ** 2 / dithers
    return found


def first_order(model: nn.Module, spots: Sequence[Spot], batches: Sequence[Batch], bits: int, seed: int) -> Floats:
    """What who knew the slopes on these very batches would expect `changes` to be: (spots, batches).

    That is the sum over the block of (slope * error)^2, as errors of a dither are independent. model: in float32.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = dict(model.named_modules())
    found = np.zeros((len(spots), len(batches)))
    for number, (inputs, targets) in enumerate(batches):
        model.zero_grad()
        with _inputs({spot.layer: layers[spot.layer] for spot in spots}) as entered:
            cross_entropy(logits(model, inputs), targets).backward()
        for row, spot in enumerate(spots):
            layer = layers[spot.layer]
            held = entered[spot.layer] if spot.operand == "activations" else layer.weight
            assert held.grad is not None
            with torch.no_grad():
                error = _with_dither(layer, held, spot, bits, generator) - held
                found[row, number] = float((held.grad * error).double().square().sum())
    return found


@contextmanager
def _inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """What enters layers, with its gradient afterwards."""
    entered: dict[str, Tensor] = {}

    def enter(name: str, _: nn.Module, given: tuple[Tensor]) -> Tensor:
        # A batch is the caller's, and would add up the gradients of all calls.
        x = given[0] if given[0].requires_grad else given[0].detach().requires_grad_()
        x.retain_grad()
        entered[name] = x
        return x

    hooks = [layer.register_forward_pre_hook(partial(enter, name)) for name, layer in layers.items()]
    try:
        yield entered
    finally:
        for hook in hooks:
            hook.remove()


def dither(matrix: Tensor, bits: int, block: Block, signed: bool, generator: torch.Generator) -> Tensor:
    """(M, K) at so many bits, its error uniform over a step and independent of it (subtractive: Schuchman 1964)."""
    strips = block.strips(matrix)
    peaks = block.peaks(strips)
    steps = block.along(steps_for(peaks, torch.full_like(peaks, bits), signed))
    noise = torch.rand(strips.shape, generator=generator) - 0.5
    counts = strips / torch.where(steps > 0, steps, torch.inf)
    return block.matrix(((counts + noise).round() - noise) * steps, *matrix.shape)


@contextmanager
def _dithered(layer: Quantizing, spot: Spot, bits: int, generator: torch.Generator) -> Iterator[None]:
    """While one block is."""
    if spot.operand == "activations":

        def enter(_: nn.Module, given: tuple[Tensor]) -> Tensor:
            return _with_dither(layer, given[0], spot, bits, generator)

        with layer.register_forward_pre_hook(enter):
            yield
        return
    kept = layer.weight.data
    layer.weight.data = _with_dither(layer, kept, spot, bits, generator)
    try:
        yield
    finally:
        layer.weight.data = kept


def _with_dither(layer: Quantizing, held: Tensor, spot: Spot, bits: int, generator: torch.Generator) -> Tensor:
    """A layer's input, or its weights, with that block at so many bits."""
    quantized = _activations if spot.operand == "activations" else _weights
    return quantized(layer, held, spot.number, bits, generator)


def _activations(layer: Quantizing, x: Tensor, number: int, bits: int, generator: torch.Generator) -> Tensor:
    rows, block = layer.rows_of(x).clone(), layer.x_block
    columns = slice(number * block.columns, (number + 1) * block.columns)
    rows[:, columns] = dither(rows[:, columns], bits, block, bool(rows.amin() < 0), generator)
    return layer.back(rows, x.shape)


def _weights(layer: Quantizing, weight: Tensor, number: int, bits: int, generator: torch.Generator) -> Tensor:
    matrix, block = layer.to_matrix(weight).clone(), layer.config.block
    place, down, across = np.unravel_index(number, layer.w_bits.shape)
    rows = slice(down * block.rows, (down + 1) * block.rows)
    columns = slice(across * block.columns, (across + 1) * block.columns)
    part = matrix[place, rows, columns]
    matrix[place, rows, columns] = dither(part, bits, block, True, generator)
    return layer.from_matrix(matrix).contiguous()


def _stages(model: nn.Module) -> list[Stage]:
    """What follows a layer is run again for each dither, and what comes before it is not."""
    if not isinstance(model, ResNet):
        return [Stage(name, part) for name, part in model.named_children()]
    parts = {"stem": model.stem, "blocks": model.blocks}
    stages = [Stage(f"{of}.{name}", part) for of, parent in parts.items() for name, part in parent.named_children()]
    return [*stages, Stage("head", lambda images: model.head(images.mean((2, 3))))]


def _loss(scores: Tensor, targets: Tensor) -> float:
    """In float64: changes are small beside it."""
    return float(cross_entropy(scores.double(), targets))
