"""Which block gets how many bits.

Every block has a curve: what each width costs, and the error that it leaves. The least total error within a budget
gives each block the width at which one more unit of cost would save less than a common multiplier (Everett 1963;
Shoham and Gersho 1988, for bits). As savings per cost fall along a convex curve, taking the greatest ones of all blocks
first, while they can be paid, finds it.
"""

from __future__ import annotations

from itertools import combinations, product

import torch
from torch import Tensor

from dynasty.integers import ROUNDINGS, WIDTHS, levels
from tasp_coll import ArgumentError

CANDIDATES = (0, *WIDTHS)
HEAD_BITS = 20  # a packed block's width and step
_LEADING = 46  # of float64: sign, exponent and 6 bits stay
_NEVER = 1e6  # times the worst that can be saved otherwise


def allocate(errors: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The choice for each block with the least total error that costs no more than the budget: (..., blocks) int64.

    errors: (..., blocks, W) finite, what each of W choices leaves. costs: (W,) or as errors, rising along W.
    budget: of each (..., ): leading dimensions are problems of their own.

    Choices above a curve's lower convex hull are never taken. No other choice leaves less error at the same cost or
    less; what is left of the budget is less than the next step would cost, so where all steps cost the same, nothing
    better can be had for the budget.

    Raises ArgumentError if even the cheapest choices cost more than the budget.
    """
    errors, costs = (x.double().movedim(-1, 0) for x in torch.broadcast_tensors(errors, costs))
    if not bool((costs[1:] > costs[:-1]).all()):
        raise ArgumentError("costs must rise from choice to choice")
    spare = budget - costs[0].sum(-1, keepdim=True)
    if not bool((spare >= 0).all()):
        raise ArgumentError(f"budget must be at least {budget - float(spare.min())}, the cheapest, got {budget}")
    gains, on_hull = _hull(errors.contiguous(), costs)
    so_far = torch.where(on_hull, costs, costs[0]).cummax(0).values
    steps = costs[1:] - so_far[:-1]
    taken = on_hull[1:].clone()
    for problem in product(*map(range, spare.shape[:-1])):
        here = (slice(None), *problem)
        mine = on_hull[1:][here]
        taken[here][mine] = _affordable(gains[1:][here][mine], steps[here][mine], float(spare[problem]))
    chosen = torch.zeros_like(on_hull[0], dtype=torch.int64)
    for choice, those in enumerate(taken, 1):
        chosen[those] = choice
    return chosen


def widths_within(
    peaks: Tensor, mean_squares: Tensor, size: int, mean_bits: float, rounding: str = "nearest"
) -> Tensor:
    """Widths, 0 or 2 to 8, with the least expected squared error: (..., blocks) uint8.

    peaks, mean_squares: (..., blocks), of blocks of `size` elements; those that are not finite get 0 bits. mean_bits:
    per element, widths and steps included, for each of (...). An integer is expected to be off by step^2 / 12 if
    rounded to nearest, though never by more than the value itself, and by step^2 / 6 if stochastic, where blocks are
    not dropped, so that the mean stays the value.

    Raises ArgumentError if the budget is too small.
    """
    if rounding not in ROUNDINGS:
        raise ArgumentError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")
    widths = torch.tensor(CANDIDATES, device=peaks.device)
    finite = peaks.isfinite() & mean_squares.isfinite()
    peaks, mean_squares = (torch.where(finite, x.double(), 0).unsqueeze(-1) for x in (peaks, mean_squares))
    steps = peaks / levels(widths, signed=True).clamp_min(1)
    if rounding == "nearest":
        errors = torch.minimum(torch.where(widths > 0, steps.square() / 12, torch.inf), mean_squares)
    else:
        never = _NEVER * peaks.square().sum(-2, keepdim=True)
        errors = torch.where((widths > 0) | (peaks == 0), steps.square() / 6, never)
    budget = (mean_bits * size - HEAD_BITS) * peaks.shape[-2]
    return widths.to(torch.uint8)[allocate(errors, widths * size, budget)]


def _affordable(gains: Tensor, steps: Tensor, spare: float) -> Tensor:
    """Which of the steps (n,) to take, the greatest gains first, the first ones among equals: (n,) bool.

    Gains are positive, so that their bits rise with them: only those are sorted that agree in the leading bits with
    the one at which the budget ends.
    """
    if not len(gains):
        return gains.bool()
    bits = gains.view(torch.int64) >> _LEADING
    rank = bits.max() - bits
    spent = torch.bincount(rank, steps).cumsum(0)
    end = int((spent <= spare).sum())
    paid = rank < end
    last = (rank == end).nonzero().squeeze(1)
    last = last[gains[last].argsort(dim=0, descending=True, stable=True)]
    before = float(spent[end - 1]) if end else 0.0
    paid[last] = before + steps[last].cumsum(0) <= spare
    return paid


def _hull(errors: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """What each choice saves per cost over the best way to it, and whether it is on its curve's lower convex hull.

    It is if every way to it saves something, and no less per cost than any way on from it. All (W, ..., blocks).
    """
    arriving, leaving = torch.full_like(errors, torch.inf), torch.zeros_like(errors)
    for i, j in combinations(range(len(errors)), 2):
        saved = (errors[i] - errors[j]) / (costs[j] - costs[i])
        torch.minimum(arriving[j], saved, out=arriving[j])
        torch.maximum(leaving[i], saved, out=leaving[i])
    return arriving, (arriving >= leaving) & (arriving > 0)
