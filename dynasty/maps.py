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

from collections.abc import Callable, Iterator, Sequence
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

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.x, self.w, self.g))

    @property
    def blocks(self) -> int:
        """How many there are."""
        return sum(len(each) for each in self)

    @property
    def total(self) -> float:
        """The sum over all blocks."""
        return sum(float(each.double().sum()) for each in self)

    def all_at(self, bits: int) -> Widths:
        """The same blocks, of so many bits each."""
        return Widths(*(torch.full_like(each, bits) for each in self))

    def changed(self, other: Widths) -> float:
        """The share of blocks that differ."""
        differing = sum(int((mine != theirs).sum()) for mine, theirs in zip(self, other, strict=True))
        return differing / max(1, self.blocks)


@dataclass(frozen=True)
class Meetings:
    """Which blocks meet in a training step, and how much there is to do.

    x, g, u: (blocks of weights,), for each its partners' places, and its multiply-accumulates of one GEMM over 64, with
    edges. elements: of each block of activations, weights and gradients. macs: of all three GEMMs, without edges.
    storage: how many cycles are worth a bit less of each element that is stored.
    """

    x: Tensor
    g: Tensor
    u: Tensor
    elements: Widths
    macs: float
    storage: float = 0.0

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

    def rated(self, x: Tensor, w: Tensor, g: Tensor) -> Widths:
        """Prices with what storing a bit more is worth."""
        pairs = zip((x, w, g), self.elements, strict=True)
        return Widths(*(price + self.storage * elements for price, elements in pairs))


@dataclass(frozen=True)
class Curves:
    """What each width of the choice costs, per block: (blocks, widths) each, in the order of `Widths`."""

    choice: Tensor  # (widths,) float32, rising
    x: Tensor
    w: Tensor
    g: Tensor


def assign(
    curves: Curves,
    meetings: Meetings,
    old: Widths,
    budget: float,
    gradient_width: float,
    hysteresis: float,
    most: int | None = None,
) -> Widths:
    """New widths of at most `budget` cycles, as far as the narrowest choice and `most` allow it.

    Gradients have a budget of their own, the cycles of `gradient_width` bits on average. A block keeps its old width
    unless a change saves `hysteresis` of its price. most: how many blocks may change, those that gain most by it.
    """
    widths = old
    for _ in range(_ROUNDS):
        cycles = meetings.price_g(widths)
        price = meetings.rated(meetings.price_x(widths), meetings.price_w(widths), cycles)
        g_rate, widths = _gradients(curves, price.g, cycles, widths, old, gradient_width, hysteresis)
        price = meetings.rated(meetings.price_x(widths), meetings.price_w(widths), cycles)
        rate, widths = _others(curves, meetings, price, widths, old, budget, hysteresis)
    if most is None:
        return widths
    rates = rate, rate, g_rate
    losses = curves.x, curves.w, curves.g
    gains = [_gains(loss, curves.choice, *each) for loss, *each in zip(losses, price, rates, old, widths, strict=True)]
    calm = _best_changes(old, widths, gains, most)
    if meetings.cycles(calm) <= budget:
        return calm
    pairs = zip(gains, widths, old, strict=True)
    narrower = [gain.masked_fill((new > before) & gain.isfinite(), 0) for gain, new, before in pairs]
    return _best_changes(old, widths, narrower, most)


def _gradients(
    curves: Curves, price: Tensor, cycles: Tensor, widths: Widths, old: Widths, mean: float, hysteresis: float
) -> tuple[float, Widths]:
    def at(rate: float) -> Widths:
        return replace(widths, g=_cheapest(curves.g, curves.choice, price * rate, old.g, hysteresis))

    return _within(at, lambda found: float(((found.g - mean) * cycles).sum()) <= 0, _scale(curves.g, price))


def _others(
    curves: Curves, meetings: Meetings, price: Widths, widths: Widths, old: Widths, budget: float, hysteresis: float
) -> tuple[float, Widths]:
    def at(rate: float) -> Widths:
        x = _cheapest(curves.x, curves.choice, price.x * rate, old.x, hysteresis)
        return Widths(x, _cheapest(curves.w, curves.choice, price.w * rate, old.w, hysteresis), widths.g)

    return _within(at, lambda found: meetings.cycles(found) <= budget, _scale(curves.w, price.w))


def _gains(curves: Tensor, choice: Tensor, price: Tensor, rate: float, old: Tensor, new: Tensor) -> Tensor:
    """What a change saves, in rated cycles; infinite where the choice lacks the old width, 0 where nothing changes."""
    prices = curves / max(rate, _TINY) + price[:, None] * choice
    held, found = (torch.searchsorted(choice, each).clamp_max(len(choice) - 1)[:, None] for each in (old, new))
    saved = (prices.gather(1, held) - prices.gather(1, found)).squeeze(1).clamp_min(_TINY)
    return torch.where(choice[held.squeeze(1)] == old, saved, torch.inf).masked_fill(old == new, 0)


def _best_changes(old: Widths, new: Widths, gains: Sequence[Tensor], most: int) -> Widths:
    """The `most` changes that gain most, and all that must be made."""
    ranked = torch.cat(list(gains))
    least = ranked.topk(most + 1).values[-1] if most < len(ranked) else torch.zeros(())
    pairs = zip(gains, old, new, strict=True)
    return Widths(*(torch.where((gain > least) | gain.isinf(), after, before) for gain, before, after in pairs))


def _cheapest(curves: Tensor, choice: Tensor, rates: Tensor, old: Tensor, hysteresis: float) -> Tensor:
    """Per block the width with the least loss plus rated cycles, or the old one where that is hardly dearer."""
    prices = curves + rates[:, None] * choice
    least, at = prices.min(1)
    held = torch.searchsorted(choice, old).clamp_max(len(choice) - 1)
    kept = prices.gather(1, held[:, None]).squeeze(1)
    # A width that the choice does not have, as that of the first steps may be, cannot be kept.
    keep = (kept - least <= hysteresis * kept) & (choice[held] == old)
    return torch.where(keep, old, choice[at])


def _within(at: Callable[[float], Widths], fits: Callable[[Widths], bool], scale: float) -> tuple[float, Widths]:
    """The lowest rate that fits, or the highest if none does, and what it gives. scale: a rate of the right size."""
    free = at(0.0)
    if fits(free):
        return 0.0, free
    low, high = -_OCTAVES, _OCTAVES
    best = at(scale * 2.0**high)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = at(scale * 2.0**middle)
        if fits(found):
            best, high = found, middle
        else:
            low = middle
    return scale * 2.0**high, best


def _scale(curves: Tensor, price: Tensor) -> float:
    return max(float((curves[:, 0] - curves[:, -1]).sum()), _TINY) / max(float(price.sum()), _TINY)
