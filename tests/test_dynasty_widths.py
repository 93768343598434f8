"""Widths within a budget: against brute force, and what they are for blocks of a vector."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynasty.widths import CANDIDATES, HEAD_BITS, allocate, widths_within
from tasp_coll import ArgumentError


def least(errors: Tensor, costs: Tensor, budget: float) -> float:
    """The least total error within a budget, by trying everything."""
    blocks, choices = errors.shape
    tried = [list(enumerate(way)) for way in product(range(choices), repeat=blocks)]
    return min(
        sum(float(errors[at]) for at in way) for way in tried if sum(float(costs[at]) for at in way) <= budget + 1e-9
    )


def totals(errors: Tensor, costs: Tensor, chosen: Tensor) -> tuple[float, float]:
    at = chosen.unsqueeze(-1)
    return float(errors.double().gather(-1, at).sum()), float(costs.double().gather(-1, at).sum())


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.floats(0, 1), st.booleans())
def test_nothing_else_leaves_less_at_the_same_cost(
    seed: int, blocks: int, choices: int, share: float, even: bool
) -> None:
    """Curves of any shape, with ties; where curves are convex and steps even, nothing better fits the budget at all."""
    generator = torch.Generator().manual_seed(seed)
    errors = torch.randint(0, 9, (blocks, choices), generator=generator)
    costs = torch.randint(1, 6, (blocks, choices), generator=generator).cumsum(-1)
    if even:
        falls = errors.sort(-1, descending=True).values
        errors = falls.flip(-1).cumsum(-1).flip(-1)
        costs = (2 * torch.arange(choices) + 3).expand(blocks, choices)
    lowest, highest = float(costs[:, 0].sum()), float(costs[:, -1].sum())
    budget = lowest + share * (highest - lowest)
    error, cost = totals(errors, costs, allocate(errors, costs, budget))
    assert cost <= budget
    assert error == least(errors, costs, budget if even else cost)


def test_what_is_left_is_less_than_the_next_step() -> None:
    errors, costs = torch.tensor([[8.0, 1, 0], [90.0, 4, 0]]), torch.tensor([0.0, 2, 3])
    assert allocate(errors, costs, 4.5).tolist() == [0, 2]
    assert allocate(errors, costs, 5).tolist() == [1, 2]
    assert allocate(errors, costs, 2.9).tolist() == [0, 1]


def test_leading_dimensions_are_problems_of_their_own() -> None:
    errors = torch.rand(3, 2, 50, 4, generator=torch.Generator().manual_seed(0)).cumsum(-1).flip(-1)
    costs = torch.tensor([1.0, 2, 4, 8])
    together = allocate(errors, costs, 170)
    assert together.shape == (3, 2, 50)
    for i, j in product(range(3), range(2)):
        assert torch.equal(together[i, j], allocate(errors[i, j], costs, 170))
    assert allocate(errors[:, :, :0], costs, 0).shape == (3, 2, 0)


def test_what_cannot_be_is_refused() -> None:
    errors = torch.tensor([[2.0, 1], [2.0, 1]])
    with pytest.raises(ArgumentError, match=r"budget must be at least 2\.0.*got 1"):
        allocate(errors, torch.tensor([1.0, 2]), 1)
    with pytest.raises(ArgumentError, match="costs must rise"):
        allocate(errors, torch.tensor([1.0, 1]), 4)
    with pytest.raises(ArgumentError, match="rounding must be one of"):
        widths_within(torch.ones(3), torch.ones(3), 256, 4, "up")
    with pytest.raises(ArgumentError, match="budget must be at least"):
        widths_within(torch.ones(3), torch.ones(3), 256, 0.01)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_blocks_get_bits_by_their_energy(rounding: str) -> None:
    scale = 2.0 ** torch.arange(-8.0, 8).repeat(40)
    peaks, squares = 3 * scale, scale.square()
    for mean_bits in (1.5, 3, 4, 6, 8):
        if rounding == "stochastic" and mean_bits < 3:
            continue
        widths = widths_within(peaks, squares, 256, mean_bits, rounding)
        assert set(widths.tolist()) <= set(CANDIDATES)
        spent = float(widths.double().mean()) + HEAD_BITS / 256
        assert mean_bits - 3 / len(peaks) < spent <= mean_bits
        order = widths[peaks.argsort()].float().view(-1, 40).mean(1)
        assert bool((order.diff() >= -1e-6).all())
        assert rounding == "nearest" or int(widths.min()) >= 2


def test_zeros_and_what_is_not_finite_take_no_bits() -> None:
    peaks = torch.tensor([1.0, 0, torch.inf, torch.nan, 2])
    for rounding in ("nearest", "stochastic"):
        widths = widths_within(peaks, peaks.square() / 9, 256, 3, rounding)
        assert widths[1:4].tolist() == [0, 0, 0]
        assert int(widths.sum()) == 14
