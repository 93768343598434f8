"""Widths of rings that share links: the exact linear program, proved by its own prices."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from tasp_coll.widths import Widths, best_widths

RATES = st.lists(st.sampled_from([1, 2, 3, 40, 957, 1001]), min_size=1, max_size=12)


@st.composite
def programs(draw: st.DrawFn) -> tuple[list[int], list[dict[int, int]]]:
    """Rates of links, and how often each ring crosses some of them."""
    rates = draw(RATES)
    links = st.integers(0, len(rates) - 1)
    loads = st.dictionaries(links, st.integers(1, 3), min_size=1)
    return rates, draw(st.lists(loads, min_size=1, max_size=12))


@given(programs(), st.sets(st.integers(0, 11)))
def test_widths_fit_and_prices_prove_that_no_others_are_better(
    program: tuple[list[int], list[dict[int, int]]], stops: set[int]
) -> None:
    rates, loads = program
    widths = Widths(rates)
    for number, load in enumerate(loads):
        widths.add(load)
        if number in stops:  # rings may be added to what is solved already
            widths.solve()
    widths.solve()
    found, prices = widths.widths(), widths.prices()
    assert min(found) >= 0
    for link, rate in enumerate(rates):
        assert sum(width * load.get(link, 0) for width, load in zip(found, loads, strict=True)) <= rate
    # Weak duality: links at these prices cost every ring 1 or more, so that no widths add up to more than their worth.
    assert min(prices.values()) > 0
    assert all(sum(times * prices.get(link, 0) for link, times in load.items()) >= 1 for load in loads)
    assert sum(found) == widths.total == sum(rates[link] * price for link, price in prices.items())
    assert best_widths(rates, loads)[1] == widths.total


def test_disjoint_rings_are_as_wide_as_their_slowest_links() -> None:
    assert best_widths([5, 7, 4, 9], [{0: 1, 1: 1}, {2: 2, 3: 1}]) == ([Fraction(5), Fraction(2)], Fraction(7))


def test_a_ring_that_only_stands_in_the_way_gets_nothing() -> None:
    assert best_widths([1, 1], [{0: 1}, {1: 1}, {0: 1, 1: 1}]) == ([Fraction(1), Fraction(1), Fraction(0)], Fraction(2))
