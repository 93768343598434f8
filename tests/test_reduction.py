"""The arithmetic of reductions against NumPy's own, and bfloat16 against ml_dtypes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tasp_coll.errors import ArgumentError
from tasp_coll.reduction import DTYPES, HOST, OPS, Reduction, reduction

Array = np.ndarray[Any, Any]
FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
COMPLEX = ("complex64", "complex128")
SAME = [dtype for dtype in DTYPES if dtype not in ("float16", "bfloat16")]
FOLD = {"sum": np.add, "prod": np.multiply, "min": np.minimum, "max": np.maximum, "avg": np.add}


def allowed(op: str, dtype: str) -> bool:
    return dtype in FLOATS if op == "avg" else op not in ("min", "max") or dtype not in COMPLEX


CASES = [(op, dtype) for op in OPS for dtype in DTYPES if allowed(op, dtype)]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Overflow and NaN are the caller's values, not our news."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def stored(dtype: str) -> np.dtype[Any]:
    if dtype != "bfloat16":
        return np.dtype(dtype)
    return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)


def address(array: Array) -> int:
    return array.ctypes.data


def run(rule: Reduction, contributions: list[Array]) -> Array:
    """Reduce as one rank after the other does: the first widens, the others combine, the last finishes."""
    count = len(contributions[0])
    acc, out = np.empty(count, rule.wire_dtype), np.empty_like(contributions[0])
    rule.widen(address(acc), address(contributions[0]), count)
    for contribution in contributions[1:]:
        rule.combine(address(acc), address(contribution), count)
    rule.finish(address(out), address(acc), count)
    return out


def expected(rule: Reduction, contributions: list[Array]) -> Array:
    wide = [contribution.astype(rule.wire_dtype) for contribution in contributions]
    with np.errstate(all="ignore"):
        total = wide[0]
        for more in wide[1:]:
            total = FOLD[rule.op](total, more)
        if rule.op == "avg":
            total = (total / rule.ranks).astype(rule.wire_dtype)
        return total.astype(contributions[0].dtype)


def samples(dtype: str, ranks: int, count: int) -> list[Array]:
    random = np.random.default_rng(ranks * 1000 + count)
    values = random.integers(-100, 100, (ranks, count)) if dtype != "bool" else random.integers(0, 2, (ranks, count))
    parts: Array = values / 7 if dtype in FLOATS else values
    parts = parts * (1 + 2j) if dtype in COMPLEX else parts
    return [part.astype(stored(dtype)) for part in parts]


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_against_numpy(op: str, dtype: str, ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HOST, "block", 16)  # several blocks and a rest
    contributions = samples(dtype, ranks, 37)
    rule = reduction(op, dtype, ranks)
    got = run(rule, contributions)
    assert got.tobytes() == expected(rule, contributions).tobytes()


@pytest.mark.parametrize(("op", "dtype"), CASES)
def test_partial_results_merge(op: str, dtype: str) -> None:
    """(a op b) op (c op d) is the fold of all four, up to rounding."""
    rule, parts = reduction(op, dtype, 4), samples(dtype, 4, 11)
    left, right, out = (np.empty(11, rule.wire_dtype) for _ in range(3))
    for acc, (first, second) in ((left, parts[:2]), (right, parts[2:])):
        rule.widen(address(acc), address(first), 11)
        rule.combine(address(acc), address(second), 11)
    rule.merge(address(left), address(right), 11)
    done = np.empty(11, stored(dtype))
    rule.finish(address(done), address(left), 11)
    out = expected(rule, parts)
    if dtype in FLOATS:
        tolerance = 2.0**-7 if dtype == "bfloat16" else 2.0**-9 if dtype == "float16" else 1e-5
        wide = np.complex128 if dtype in COMPLEX else np.float64
        np.testing.assert_allclose(done.astype(wide), out.astype(wide), rtol=tolerance, atol=tolerance)
    else:
        assert np.array_equal(done, out)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_and_wire_dtype(dtype: str) -> None:
    rule = reduction("sum", dtype, 2)
    assert rule.itemsize == (2 if dtype == "bfloat16" else np.dtype(dtype).itemsize)
    assert rule.wire_dtype == ("float32" if dtype in ("bfloat16", "float16") else dtype)
    assert rule.wire_itemsize == np.dtype(rule.wire_dtype).itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_to_reduce(dtype: str) -> None:
    rule = reduction("sum", dtype, 2)
    for act in (rule.widen, rule.combine, rule.merge, rule.finish):
        act(0, 0, 0)


@pytest.mark.parametrize("dtype", SAME)
@pytest.mark.parametrize("op", OPS)
def test_finish_in_place(op: str, dtype: str) -> None:
    if not allowed(op, dtype):
        return
    (part,) = samples(dtype, 1, 9)
    before = part.copy()
    rule = reduction(op, dtype, 3)
    rule.widen(address(part), address(part), 9)
    rule.finish(address(part), address(part), 9)
    assert np.array_equal(part, (before / 3).astype(dtype) if op == "avg" else before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int64"])
def test_unaligned_memory_and_its_surroundings(dtype: str) -> None:
    rule = reduction("sum", dtype, 2)
    first, second = samples(dtype, 2, 5)
    memory = np.full(200, 0xAB, np.uint8)
    size, wire = 5 * rule.itemsize, 5 * rule.wire_itemsize
    memory[1 : 1 + size], memory[51 : 51 + size] = first.view(np.uint8), second.view(np.uint8)
    base = address(memory)
    rule.widen(base + 101, base + 1, 5)
    rule.combine(base + 101, base + 51, 5)
    rule.finish(base + 1, base + 101, 5)
    assert memory[1 : 1 + size].tobytes() == expected(rule, [first, second]).tobytes()
    untouched = np.r_[0, 1 + size : 51, 51 + size : 101, 101 + wire : 200]
    assert (memory[untouched] == 0xAB).all()


# ------------------------------------------------------------------------------------------- special values


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("op", OPS)
def test_nan_and_infinity(op: str, dtype: str) -> None:
    nan, inf = np.nan, np.inf
    parts = [np.array(row).astype(stored(dtype)) for row in ([nan, 1, inf, inf, -inf], [1, nan, inf, -inf, 1])]
    got = run(reduction(op, dtype, 2), parts).astype(np.float64)
    assert np.isnan(got[:2]).all()
    pairs = {
        "sum": [inf, nan, -inf],
        "prod": [inf, -inf, -inf],
        "min": [inf, -inf, -inf],
        "max": [inf, inf, 1],
    }
    assert np.array_equal(got[2:], pairs["sum" if op == "avg" else op], equal_nan=True)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_integers_wrap(dtype: str) -> None:
    limits = np.iinfo(dtype)
    parts = [np.array([limits.max], dtype), np.array([1], dtype)]
    assert run(reduction("sum", dtype, 2), parts)[0] == limits.min


def test_bool_is_logic() -> None:
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    for op, outcome in {"sum": a | b, "max": a | b, "prod": a & b, "min": a & b}.items():
        assert np.array_equal(run(reduction(op, "bool", 2), [a, b]), outcome)


def test_halves_are_accumulated_in_float32() -> None:
    """Adding 1 to 2048 (float16) or 256 (bfloat16) rounds away; 16 of them must not."""
    for dtype, start in (("float16", 2048), ("bfloat16", 256)):
        parts = [np.array([value]).astype(stored(dtype)) for value in [start, *[1] * 16]]
        assert float(run(reduction("sum", dtype, 17), parts)[0]) == start + 16


def test_averages_do_not_overflow_in_the_wire_dtype() -> None:
    parts = [np.array([60000], np.float16)] * 4
    assert run(reduction("avg", "float16", 4), parts)[0] == 60000
    assert np.isinf(run(reduction("sum", "float16", 4), parts)[0])


# ------------------------------------------------------------------------------------------------- rounding


def narrowed(dtype: str, wide: Array) -> Array:
    out = np.empty(len(wide), stored(dtype))
    reduction("sum", dtype, 1).finish(address(out), address(wide), len(wide))
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_half_survives_widening_and_narrowing(dtype: str) -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(stored(dtype))
    wide = np.empty(1 << 16, np.float32)
    reduction("sum", dtype, 1).widen(address(wide), address(halves), len(halves))
    assert np.array_equal(wide, halves.astype(np.float32), equal_nan=True)
    back, number = narrowed(dtype, wide), ~np.isnan(wide)
    assert np.array_equal(back.view(np.uint16)[number], halves.view(np.uint16)[number])
    assert np.isnan(back[~number].astype(np.float32)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(bits=hnp.arrays(np.uint32, st.integers(1, 20)))
def test_rounding_of_any_float32(dtype: str, bits: Array) -> None:
    wide = bits.view(np.float32)
    got = narrowed(dtype, wide)
    with np.errstate(all="ignore"):
        right = wide.astype(stored(dtype))
    nan = np.isnan(wide)
    assert np.array_equal(got.view(np.uint16)[~nan], right.view(np.uint16)[~nan])
    assert np.isnan(got[nan].astype(np.float32)).all()


@given(upper=st.integers(0, 0xFFFF), lower=st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF]))
def test_ties_of_bfloat16(upper: int, lower: int) -> None:
    wide = np.array([upper << 16 | lower], np.uint32).view(np.float32)
    if np.isnan(wide[0]):
        assert np.isnan(narrowed("bfloat16", wide).astype(np.float32))[0]
        return
    up = lower > 0x8000 or (lower == 0x8000 and upper % 2)
    assert narrowed("bfloat16", wide).view(np.uint16)[0] == upper + up


def test_bfloat16_rounds_like_torch() -> None:
    torch = pytest.importorskip("torch")
    wide = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    right = torch.from_numpy(wide).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    number = ~np.isnan(wide)
    assert np.array_equal(narrowed("bfloat16", wide).view(np.uint16)[number], right[number])


# ------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("op", "dtype", "ranks", "pattern"),
    [
        ("mean", "float32", 2, "^op must be one of sum, prod, min, max, avg; got 'mean'"),
        (["sum"], "float32", 2, "^op must be one of"),
        (None, "float32", 2, "^op must be one of"),
        ("sum", "float8_e4m3fn", 2, "^dtype must be reducible, one of bool, int8.*; got 'float8_e4m3fn'"),
        ("sum", "datetime64[ns]", 2, "^dtype must be reducible"),
        ("sum", ">f4", 2, "^dtype must be reducible"),
        ("max", "|S5", 2, "^dtype must be reducible"),
        ("sum", "float32", 0, "^ranks must be at least 1; got 0"),
        *[("avg", dtype, 2, f"^op 'avg' needs floating-point.*'{dtype}'") for dtype in DTYPES if dtype not in FLOATS],
        *[(op, dtype, 2, f"^op '{op}' needs elements with an order") for op in ("min", "max") for dtype in COMPLEX],
    ],
)
def test_refusals(op: Any, dtype: str, ranks: int, pattern: str) -> None:
    with pytest.raises(ArgumentError, match=pattern):
        reduction(op, dtype, ranks)


def test_equal_arguments_give_one_object() -> None:
    assert reduction("sum", "float32", 4) is reduction("sum", "float32", 4)
    assert reduction("sum", "float32", 4) != reduction("sum", "float32", 5)
