"""Which block gets how many bits.

A GEMM of b_a by b_b bits takes b_a * b_b cycles per multiply-accumulate of a bit-scalable array, over the 64 of 8 by 8.
Each block w of weights meets one block x of input channels and one block g of output channels, so that all three GEMMs
of all layers together take

    sum over blocks of weights of   u * (w * x + w * g + g * x)        u: multiply-accumulates / 64

cycles. Widths minimise what they do to the loss plus lambda times their cycles, and lambda is found by bisection so
that the cycles fit: for convex curves that is optimal for the partners' widths that it was priced with (it equals
taking the best ratio of gain and cycles again and again).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_OCTAVES = 40.0  # of rates, up and down
_HALVINGS = 24
_ROUNDS = 2  # of pricing by the partners' widths
_TINY = 1e-30


@dataclass(frozen=True)
class Widths:
    """Bits of all blocks of a model, layer after layer, float32: x of input channels, w of weights, g of outputs."""

    x: Tensor
    w: Tensor
    g: Tensor

    @property
    def total(self) -> float:
        """The sum over all blocks."""
        return float(self.x.double().sum() + self.w.double().sum() + self.g.double().sum())

    def all_at(self, bits: int) -> Widths:
        """The same blocks, of so many bits each."""
        return Widths(*(torch.full_like(each, bits) for each in (self.x, self.w, self.g)))

    def changed(self, other: Widths) -> float:
        """The share of blocks that differ."""
        pairs = zip((self.x, self.w, self.g), (other.x, other.w, other.g), strict=True)
        differing, blocks = 0, 0
        for mine, theirs in pairs:
            differing += int((mine != theirs).sum())
            blocks += mine.numel()
        return differing / max(1, blocks)


@dataclass(frozen=True)
class Meetings:
    """Which blocks meet in a training step, and how much there is to do.

    x, g, u: (blocks of weights,), for each its partners' places, and its multiply-accumulates of one GEMM over 64, with
    edges. elements: of each block of activations, weights and gradients. macs: of all three GEMMs, without edges.
    """

    x: Tensor
    g: Tensor
    u: Tensor
    elements: Widths
    macs: float

    def cycles(self, widths: Widths) -> float:
        """Of one step."""
        x, g = widths.x[self.x], widths.g[self.g]
        return float((self.u.double() * (widths.w * x + widths.w * g + g * x)).sum())

    def price_w(self, widths: Widths) -> Tensor:
        """Cycles of a bit more, per block of weights."""
        return self.u * (widths.x[self.x] + widths.g[self.g])

    def price_x(self, widths: Widths) -> Tensor:
        """The same per block of input channels."""
        return torch.zeros_like(widths.x).index_add_(0, self.x, self.u * (widths.w + widths.g[self.g]))

    def price_g(self, widths: Widths) -> Tensor:
        """The same per block of output channels."""
        return torch.zeros_like(widths.g).index_add_(0, self.g, self.u * (widths.w + widths.x[self.x]))


@dataclass(frozen=True)
class Curves:
    """What each width of the choice costs, per block: (blocks, widths) each, in the order of `Widths`."""

    choice: Tensor  # (widths,) float32, rising
    x: Tensor
    w: Tensor
    g: Tensor


def assign(
    curves: Curves, meetings: Meetings, old: Widths, budget: float, gradient_width: float, hysteresis: float
) -> Widths:
    """New widths of at most `budget` cycles, as far as the narrowest choice allows it.

    Gradients have a budget of their own, the cycles of `gradient_width` bits on average. A block keeps its old width
    unless a change saves `hysteresis` of its price.
    """
    widths = old
    for _ in range(_ROUNDS):
        widths = _gradients(curves, meetings, widths, old, gradient_width, hysteresis)
        widths = _others(curves, meetings, widths, old, budget, hysteresis)
    return widths


def _gradients(
    curves: Curves, meetings: Meetings, widths: Widths, old: Widths, mean: float, hysteresis: float
) -> Widths:
    price = meetings.price_g(widths)

    def at(rate: float) -> Widths:
        return replace(widths, g=_cheapest(curves.g, curves.choice, price * rate, old.g, hysteresis))

    return _within(at, lambda found: float(((found.g - mean) * price).sum()) <= 0, _scale(curves.g, price))


def _others(
    curves: Curves, meetings: Meetings, widths: Widths, old: Widths, budget: float, hysteresis: float
) -> Widths:
    x_price, w_price = meetings.price_x(widths), meetings.price_w(widths)

    def at(rate: float) -> Widths:
        x = _cheapest(curves.x, curves.choice, x_price * rate, old.x, hysteresis)
        return Widths(x, _cheapest(curves.w, curves.choice, w_price * rate, old.w, hysteresis), widths.g)

    return _within(at, lambda found: meetings.cycles(found) <= budget, _scale(curves.w, w_price))


def _cheapest(curves: Tensor, choice: Tensor, rates: Tensor, old: Tensor, hysteresis: float) -> Tensor:
    """Per block the width with the least loss plus rated cycles, or the old one where that is hardly dearer."""
    prices = curves + rates[:, None] * choice
    least, at = prices.min(1)
    held = torch.searchsorted(choice, old).clamp_max(len(choice) - 1)
    kept = prices.gather(1, held[:, None]).squeeze(1)
    # A width that the choice does not have, as that of the first steps may be, cannot be kept.
    keep = (kept - least <= hysteresis * kept) & (choice[held] == old)
    return torch.where(keep, old, choice[at])


def _within(at: Callable[[float], Widths], fits: Callable[[Widths], bool], scale: float) -> Widths:
    """What the lowest rate gives that fits, or the highest rate if none does. scale: a rate of the right size."""
    free = at(0.0)
    if fits(free):
        return free
    low, high = -_OCTAVES, _OCTAVES
    best = at(scale * 2.0**high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(scale * 2.0**middle)
        if fits(found):
            best, high = found, middle
        else:
            low = middle
    return best


def _scale(curves: Tensor, price: Tensor) -> float:
    return max(float((curves[:, 0] - curves[:, -1]).sum()), _TINY) / max(float(price.sum()), _TINY)
