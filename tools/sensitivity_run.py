"""The trainings of sensitivity_check.py, and what is seen of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import dynasty
from dynasty.layers import Quantizing
from dynasty.layout import Layout
from dynasty.sensitivity import activation_curves, weight_curves
from sensitivity_figures import Floats, Measured, Moment
from sensitivity_options import Options
from sensitivity_truth import Batch, Spot, changes, first_order, in_float32
from train_dynasty_data import DataSet
from train_dynasty_models import Convnet, ResNet, logits
from train_dynasty_sets import load

_WIDTH, _DEPTH = 16, {"cnn": 3, "resnet": 1}
_RATE = {"cnn": 0.05, "resnet": 0.1}
_RISE = 20  # steps up to the highest rate
_CURVES: dict[str, Callable[[Quantizing, Tensor], Tensor]] = {
    "activations": activation_curves,
    "weights": weight_curves,
}


def moments(options: Options, name: str, seed: int) -> list[Moment]:
    """A model early and late in its training, in the order of steps. Raises train_dynasty_sets.DataError."""
    torch.set_num_threads(options.threads)
    data = load("fashion-mnist", options.data)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(data.train))
    seen, unseen = order[: options.images], order[options.images :]
    batches = [
        data.train.batch(unseen[at * options.batch :][: options.batch].tolist(), None) for at in range(options.batches)
    ]
    kind = Convnet if name == "cnn" else ResNet
    model = dynasty.convert(kind(data.shape, data.classes, _WIDTH, _DEPTH[name]), dynasty.Config())
    last = options.epochs * (options.images // options.batch)
    losses: list[float] = []
    found = []
    looks = {*options.early, last}
    before = np.zeros((0, 0))
    for step, loss in enumerate(_train(model, data, seen, options, seed, _RATE[name], last), 1):
        losses.append(loss)
        if step in looks:
            blocks = _measured(options, seed, model, batches, before)
            share = model.dynasty.report().analytics_share
            found.append(Moment(name, seed, step, float(np.mean(losses[-20:])), share, blocks))
        if step + 1 in looks:
            before = first_order(in_float32(model), _spots(model, options.blocks, seed), batches, options.bits, seed)
    return found


def _train(
    model: Any, data: DataSet, seen: np.ndarray[Any, Any], options: Options, seed: int, rate: float, last: int
) -> Iterator[float]:
    """Losses, step by step."""
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=5e-4)
    shape = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / _RISE) * (1 + math.cos(math.pi * step / last)) / 2
    )
    rng = np.random.default_rng(seed + 1)
    per_epoch = options.images // options.batch
    order = seen
    for step in range(last):
        if step % per_epoch == 0:
            order = rng.permutation(seen)
        at = step % per_epoch * options.batch
        inputs, targets = data.train.batch(order[at : at + options.batch].tolist(), rng)
        optimizer.zero_grad()
        loss = cross_entropy(logits(model, inputs), targets)
        loss.backward()
        optimizer.step()
        shape.step()
        model.dynasty.step(loss)
        yield float(loss.detach())


def _measured(options: Options, seed: int, model: Any, batches: list[Batch], before: Floats) -> tuple[Measured, ...]:
    """before: `first_order` of a step before, (spots, batches)."""
    plain = in_float32(model)
    spots = _spots(model, options.blocks, seed)
    estimates = _estimates(model, options.bits)
    for layer in Layout.of(plain).layers:
        layer.x_slope.fill_(1)
        layer.w_slope.fill_(1)
    errors = _estimates(plain, options.bits)
    found = changes(plain, spots, batches, options.bits, options.dithers, seed)
    known = first_order(plain, spots, batches, options.bits, seed).mean(1).tolist()
    return tuple(
        Measured(
            *(spot.layer, spot.operand, spot.number, row),
            float(estimates[spot.layer, spot.operand][spot.number]),
            float(errors[spot.layer, spot.operand][spot.number]),
            exact,
            past,
        )
        for spot, row, exact, past in zip(spots, found, known, before.mean(1).tolist(), strict=True)
    )


def _spots(model: nn.Module, most: int, seed: int) -> list[Spot]:
    """The blocks that are measured, drawn where there are more than were asked for."""
    rng = np.random.default_rng(seed)
    spots = []
    layout = Layout.of(model)
    for name, layer in zip(layout.names, layout.layers, strict=True):
        for operand, bits in (("activations", layer.x_bits), ("weights", layer.w_bits)):
            chosen = np.sort(rng.permutation(bits.numel())[:most])
            spots += [Spot(name, operand, int(number)) for number in chosen]
    return spots


def _estimates(model: nn.Module, bits: int) -> dict[tuple[str, str], Tensor]:
    """By layer and operand: (blocks,)."""
    layout, widths = Layout.of(model), torch.tensor([float(bits)])
    pairs = zip(layout.names, layout.layers, strict=True)
    return {
        (name, operand): curves(layer, widths)[:, 0] for name, layer in pairs for operand, curves in _CURVES.items()
    }
