"""Maps of widths beside brute force, and cycles beside plain loops over the blocks of three GEMMs."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dynasty
from dynasty import Config
from dynasty.layout import Layout
from dynasty.maps import Curves, Meetings, Widths, assign

CHOICE = torch.tensor([2.0, 3, 4, 8])


def meetings(seed: int) -> Meetings:
    """Two layers: one of 2 x 1 blocks of weights, one of 1 x 2."""
    u = 1 + torch.rand(4, generator=torch.Generator().manual_seed(seed))
    nothing = Widths(torch.zeros(3), torch.zeros(4), torch.zeros(3))
    return Meetings(torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 2, 2]), u, nothing, 0.0)


def curves(seed: int) -> Curves:
    """Convex and falling, of blocks that differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(seed + 100)
    sizes = [10 ** (3 * torch.rand(n, 1, generator=generator)) for n in (3, 4, 3)]
    return Curves(CHOICE, *(size * 4.0**-CHOICE for size in sizes))


def eights() -> Widths:
    return Widths(torch.full((3,), 8.0), torch.full((4,), 8.0), torch.full((3,), 8.0))


def loss(of: Curves, widths: Widths) -> float:
    """Of activations and weights."""
    pairs = ((of.x, widths.x), (of.w, widths.w))
    return sum(float(c.gather(1, torch.searchsorted(CHOICE, b)[:, None]).sum()) for c, b in pairs)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.12, 0.25, 0.5])
def test_as_good_as_all_maps_together(seed: int, share: float) -> None:
    """Within what steps of widths leave unused, and what partners' prices of the round before cost."""
    meet, of = meetings(seed), curves(seed)
    budget = share * meet.cycles(eights())
    found = assign(of, meet, eights(), budget, 8 * share**0.5, 0.0)
    places = torch.cartesian_prod(*[torch.arange(len(CHOICE))] * 7)
    bits, blocks = CHOICE[places], torch.cat([of.x, of.w])
    x, w, g = bits[:, meet.x], bits[:, 3:], found.g[meet.g]
    fit = (meet.u * (w * x + w * g + g * x)).sum(1) <= budget
    best = float(blocks[torch.arange(7), places][fit].sum(1).min())
    assert meet.cycles(found) <= budget
    assert loss(of, found) <= 4 * best  # a width less in one block is a factor of 4 of its part


def test_more_cycles_never_cost_loss() -> None:
    meet, of = meetings(1), curves(1)
    whole = meet.cycles(eights())
    losses = [loss(of, assign(of, meet, eights(), share * whole, 4.0, 0.0)) for share in (0.15, 0.25, 0.4, 0.7, 1)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_a_budget_that_nothing_meets_takes_the_narrowest() -> None:
    found = assign(curves(2), meetings(2), eights(), 0.0, 2.0, 0.0)
    assert all((each == 2).all() for each in (found.x, found.w, found.g))


def test_gradients_keep_to_their_mean() -> None:
    meet = meetings(3)
    found = assign(curves(3), meet, eights(), 0.3 * meet.cycles(eights()), 4.0, 0.0)
    price = meet.price_g(found)
    assert float((found.g * price).sum() / price.sum()) <= 4.2  # was priced by the widths of the round before


@pytest.mark.parametrize("hysteresis, share", [(0.0, 1), (0.5, 0.34)])
def test_hysteresis_keeps_widths(hysteresis: float, share: float) -> None:
    """Sensitivities that flutter by a third change fewer blocks, and the budget is met all the same."""
    generator = torch.Generator().manual_seed(5)
    wide = Widths(*(torch.full((300,), 8.0) for _ in "xwg"))
    meet = Meetings(torch.arange(300), torch.arange(300), torch.ones(300), wide, 0.0)
    sizes = [10 ** (3 * torch.rand(300, 1, generator=generator)) for _ in "xwg"]
    budget = 0.25 * meet.cycles(wide)

    def step(old: Widths) -> Widths:
        noisy = (size * (1 + 0.3 * torch.rand(300, 1, generator=generator)) * 4.0**-CHOICE for size in sizes)
        return assign(Curves(CHOICE, *noisy), meet, old, budget, 4.0, hysteresis)

    first = step(wide)
    second = step(first)
    assert meet.cycles(second) <= budget
    if hysteresis:
        assert second.changed(first) < 0.03
    else:
        assert second.changed(first) > 0.03
    assert 0 <= second.changed(first) <= share


@pytest.mark.parametrize("share", [0.5, 0.2, 0.1])
def test_few_changes_are_those_that_gain_most(share: float) -> None:
    """From a map that suits a quarter of the cycles, to another budget and other sensitivities, a tenth at a time."""
    generator = torch.Generator().manual_seed(6)
    wide = Widths(*(torch.full((100,), 8.0) for _ in "xwg"))
    meet = Meetings(torch.arange(100), torch.arange(100), torch.ones(100), wide, 0.0)
    before, after = (
        Curves(CHOICE, *(10 ** (3 * torch.rand(100, 1, generator=generator)) * 4.0**-CHOICE for _ in "xwg"))
        for _ in range(2)
    )
    whole = meet.cycles(wide)
    held = assign(before, meet, wide, 0.25 * whole, 4.0, 0.1)
    free = assign(after, meet, held, share * whole, 8 * share**0.5, 0.1)
    losses, cycles = [loss(after, held)], [meet.cycles(held)]
    for _ in range(30):
        new = assign(after, meet, held, share * whole, 8 * share**0.5, 0.1, most=30)
        assert new.changed(held) <= 0.1
        held = new
        losses.append(loss(after, held))
        cycles.append(meet.cycles(held))
    assert losses[-1] <= 1.3 * loss(after, free)
    assert cycles[-1] <= 1.02 * share * whole
    if share <= 0.25:  # until the budget is met nothing gets wider
        over = [at for at, each in enumerate(cycles) if each > share * whole]
        assert all(cycles[at + 1] < cycles[at] for at in over[:-1])


def test_few_changes_give_up_what_the_choice_lacks() -> None:
    sevens = Widths(torch.full((3,), 7.0), torch.full((4,), 7.0), torch.full((3,), 7.0))
    found = assign(curves(4), meetings(4), sevens, 1e9, 8.0, 0.1, most=1)
    assert found.changed(sevens) == 1


def test_what_the_choice_lacks_is_given_up_over_budget_too() -> None:
    """Of the others only those change that get narrower."""
    meet = meetings(4)
    held = Widths(torch.tensor([8.0, 7, 8]), torch.full((4,), 8.0), torch.full((3,), 8.0))
    found = assign(curves(4), meet, held, 0.0, 2.0, 0.1, most=1)
    assert found.changed(held) == 0.1
    assert found.x[1] in CHOICE
    assert meet.cycles(found) < meet.cycles(held)


def test_storage_takes_bits_from_blocks_of_many_elements() -> None:
    """The cycles are the same, the bits that are stored fewer."""
    generator = torch.Generator().manual_seed(7)
    wide = Widths(*(torch.full((200,), 8.0) for _ in "xwg"))
    elements = Widths(*(10 ** (2 * torch.rand(200, generator=generator)) for _ in "xwg"))
    of = Curves(CHOICE, *(10 ** (3 * torch.rand(200, 1, generator=generator)) * 4.0**-CHOICE for _ in "xwg"))
    stored, cycles = [], []
    for storage in (0.0, 0.05, 0.5):
        meet = Meetings(torch.arange(200), torch.arange(200), torch.ones(200), elements, 0.0, storage)
        found = assign(of, meet, wide, 0.25 * meet.cycles(wide), 4.0, 0.0)
        stored.append(sum(float((bits * each).sum()) for bits, each in zip(found, elements, strict=True)))
        cycles.append(meet.cycles(found) / meet.cycles(wide))
    assert stored[0] > stored[1] > stored[2]
    assert stored[2] < 0.9 * stored[0]
    assert all(0.23 < each <= 0.25 for each in cycles)


def test_a_width_that_the_choice_lacks_is_given_up() -> None:
    sevens = Widths(torch.full((3,), 7.0), torch.full((4,), 7.0), torch.full((3,), 7.0))
    found = assign(curves(4), meetings(4), sevens, 1e9, 8.0, 1.0)
    assert all((each == 8).all() for each in (found.x, found.w, found.g))


# --- cycles of real layers


def loops(layer: Any, bits: dict[str, Tensor], rows: int, side: int = 16) -> float:
    """All three GEMMs, product by product of blocks; a linear layer's, or a convolution's place by place."""
    places, down, across = bits["w"].shape
    cycles = 0.0
    for place, r, c in itertools.product(range(places), range(down), range(across)):
        w, x, g = (float(bits[o][at]) for o, at in (("w", (place, r, c)), ("x", c), ("g", r)))
        for _ in range(-(-rows // side)):
            cycles += side**3 * (w * x + w * g + g * x) / 64
    return cycles


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_cycles_are_those_of_the_blocks(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(40, 36) if kind == "linear" else nn.Conv2d(40, 36, 2)
    model = dynasty.convert(nn.Sequential(layer), Config())
    model(torch.randn(19, 40) if kind == "linear" else torch.randn(2, 40, 4, 4))
    rows = 19 if kind == "linear" else 2 * 3 * 3
    layer = model[0]
    bits = {o: torch.randint(2, 9, getattr(layer, f"{o}_bits").shape) for o in "xwg"}
    layout = Layout.of(model)
    layout.put(Widths(*(bits[o].flatten().float() for o in "xwg")))
    meet = layout.meetings()
    assert meet.cycles(layout.widths()) == pytest.approx(loops(layer, bits, rows))
    assert meet.macs == 3 * rows * layer.weight.numel()
    assert torch.equal(model.dynasty.maps()["0"].weights.long(), bits["w"])


def test_groups_meet_their_own_channels() -> None:
    layer = dynasty.convert(nn.Conv2d(64, 32, 1, groups=2))
    assert layer.input_blocks().tolist() == [[[0, 1], [2, 3]]]
    assert layer.output_blocks().tolist() == [[[0, 0], [1, 1]]]
    few = dynasty.convert(nn.Conv2d(3, 8, 3))
    assert few.input_blocks().flatten().unique().tolist() == [0]
    assert few.output_blocks().flatten().unique().tolist() == [0]
