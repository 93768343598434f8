"""The account of a step, by hand."""

from __future__ import annotations

import pytest
import torch

from dynasty import Block, Chip, Cost
from dynasty.cost import ADD_32, BUFFER_BIT, DRAM_BIT, SRAM_BIT, analytics_cost, step_cost
from dynasty.maps import Meetings, Widths

BLOCK, LARGE = Block(), Chip(side=32, buffer_bytes=1 << 30)


def widths(x: float, w: float, g: float) -> Widths:
    return Widths(torch.tensor([x]), torch.tensor([w]), torch.tensor([g]))


def one() -> Meetings:
    """One block of weights, 16 x 16, and 32 rows: 8192 multiply-accumulates of a GEMM."""
    at = torch.tensor([0])
    return Meetings(at, at, torch.tensor([8192 / 64]), widths(512, 256, 512), 3 * 8192.0)


def test_8_bits_are_themselves() -> None:
    cost = step_cost(one(), widths(8, 8, 8), BLOCK, LARGE)
    assert cost.cycles == cost.cycles_8bit == cost.macs == 3 * 8192
    assert (cost.speedup, cost.energy_ratio) == (1, 1)
    assert cost.energy == cost.energy_8bit


def test_4_bits_take_a_quarter() -> None:
    cost = step_cost(one(), widths(4, 4, 4), BLOCK, LARGE)
    assert cost.speedup == 4
    assert cost.energy.multipliers == cost.energy_8bit.multipliers / 4
    assert cost.energy.adders == cost.energy_8bit.adders / 2
    assert cost.energy.operands == cost.energy_8bit.operands / 2
    assert cost.energy.optimizer == cost.energy_8bit.optimizer
    assert 1 < cost.energy_ratio < 4


def test_every_part_by_hand() -> None:
    x, w, g = 4, 2, 6
    cost = step_cost(one(), widths(x, w, g), BLOCK, LARGE)
    assert cost.cycles == 8192 / 64 * (w * x + w * g + g * x)
    bits = 8192 * 2 * (x + w + g)  # of both operands of all products: a width of a sum of two, three GEMMs
    sums = 3 * 8192 / 16
    sum_bits = bits / 16 + 4 * sums
    held = 512 * x + 256 * w + 512 * g + (6 + 4) * (512 + 256 + 512) / 256
    masters = 2 * 32 * 256
    energy = cost.energy
    assert energy.multipliers == pytest.approx(0.2 * cost.cycles)
    assert energy.adders == pytest.approx(0.1 * bits / 32)
    assert energy.scales == pytest.approx(0.2 * 12 / 64 * sum_bits + ADD_32 * 44 / 32 * sums)
    assert energy.operands == pytest.approx(SRAM_BIT * bits / 32)
    assert energy.memory == pytest.approx(BUFFER_BIT * 3 * held)
    assert energy.optimizer == pytest.approx(BUFFER_BIT * 2 * masters)
    assert energy.analytics == 0
    assert cost.energy_pj == pytest.approx(sum(cost.parts.values()))


@pytest.mark.parametrize("buffer, share", [(0, 1.0), (1, None)])
def test_what_does_not_fit_goes_to_dram(buffer: int, share: float | None) -> None:
    inside = step_cost(one(), widths(8, 8, 8), BLOCK, LARGE).energy
    held = inside.memory / BUFFER_BIT / 3 + inside.optimizer / BUFFER_BIT / 2
    if share is None:  # half of it fits
        buffer, share = int(held / 16), 1 - 8 * int(held / 16) / held
    outside = step_cost(one(), widths(8, 8, 8), BLOCK, Chip(buffer_bytes=buffer)).energy
    assert outside.memory == pytest.approx(inside.memory * (1 + share * DRAM_BIT / BUFFER_BIT))
    assert outside.optimizer == pytest.approx(inside.optimizer * (1 + share * DRAM_BIT / BUFFER_BIT))
    assert outside.multipliers == inside.multipliers


def test_analytics_and_sums() -> None:
    step, analytics = step_cost(one(), widths(4, 4, 4), BLOCK, LARGE), analytics_cost(100)
    assert (analytics.cycles, analytics.cycles_8bit, analytics.energy_pj) == (100, 0, pytest.approx(200))
    both = step.plus(step).plus(analytics)
    assert both.steps == 2
    assert both.cycles == 2 * step.cycles + 100
    assert both.speedup < 4
    assert both.energy_pj == pytest.approx(2 * step.energy_pj + 200)
    assert (Cost().speedup, Cost().energy_ratio) == (1, 1)


@pytest.mark.parametrize("wrong", [{"side": 0}, {"side": 2.5}, {"side": True}, {"buffer_bytes": -1}])
def test_bad_chips(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} of a chip must be an integer >= "):
        Chip(**wrong)
