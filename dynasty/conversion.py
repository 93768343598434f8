"""`convert`: an unchanged torch model trains at few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from dynasty.config import Config
from dynasty.controller import Controller
from dynasty.layers import DynamicConv2d, DynamicLinear, Quantizing
from tasp_coll import ArgumentError, ArgumentTypeError

_KINDS: dict[type[nn.Module], Callable[[Any, Config], Quantizing]] = {
    nn.Linear: DynamicLinear,
    nn.Conv2d: DynamicConv2d,
}


def convert(model: nn.Module, config: Config | None = None) -> nn.Module:
    """Makes the three GEMMs of every Linear and Conv2d see quantized operands.

        model = dynasty.convert(model)
        for x, y in batches:
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            model.dynasty.step(loss)

    The layers are replaced in place, their parameters stay the very same tensors, float32 masters, so that an optimizer
    made before goes on with them. `model.dynasty` is the `Controller`; maps, statistics and its account are buffers in
    `state_dict()`. Parametrized layers, subclasses of Linear and Conv2d, and modules in `config.skip` are left alone.

    Returns the model, or the new layer if model is itself a Linear or Conv2d.
    Raises ArgumentError for a model that has nothing to convert, or that was converted before.
    """
    config = config or Config()
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(isinstance(module, Quantizing) for module in model.modules()):
        raise ArgumentError("model must not have been converted before; this one was")
    unknown = set(config.skip) - {name for name, _ in model.named_modules()}
    if unknown:
        raise ArgumentError(f"skip must name modules of the model, got {', '.join(sorted(unknown))}")
    if hasattr(model, "dynasty"):
        raise ArgumentError("model must have no attribute dynasty of its own, got one that has")
    model = _replaced(model, config, "", {})
    if not any(isinstance(module, Quantizing) for module in model.modules()):
        raise ArgumentError("model must have a Linear or Conv2d to convert, got none that is not skipped")
    object.__setattr__(model, "dynasty", Controller(model, config))
    return model


def _replaced(module: nn.Module, config: Config, name: str, made: dict[nn.Module, Quantizing]) -> nn.Module:
    """The module, or what takes its place. made: one layer used twice stays one."""
    if name in config.skip and name:
        return module
    kind = _KINDS.get(type(module))
    if kind is not None:
        if module not in made:
            made[module] = kind(module, config).train(module.training)
        return made[module]
    for child, part in list(module._modules.items()):  # named_children() tells of a layer used twice only once
        if part is None:
            continue
        new = _replaced(part, config, f"{name}.{child}" if name else child, made)
        if new is not part:
            setattr(module, child, new)
    return module
