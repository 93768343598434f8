"""Quantizing and packing: exact inverses where they must be, within bounds and unbiased where they say so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynasty import Block, pack, packed_bytes, quantize, unpack
from dynasty.integers import STEP_BITS, WIDTHS
from dynasty.vectors import Format
from tasp_coll import ArgumentError, ArgumentTypeError

BLOCKS = st.sampled_from([Block(), Block(1, 256), Block(4, 2), Block(3, 8), Block(8, 1)])


def drawn(seed: int, shape: tuple[int, ...], block: Block, signed: bool) -> tuple[Tensor, Tensor]:
    """A matrix whose blocks differ widely, and widths for them."""
    generator = torch.Generator().manual_seed(seed)
    grid = (*shape[:-2], *block.grid(*shape[-2:]))
    widths = torch.tensor([0, *WIDTHS])[torch.randint(8, grid, generator=generator)]
    matrix = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    return matrix if signed else matrix.abs(), widths


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**31),
    st.lists(st.integers(1, 3), max_size=1),
    st.integers(1, 40),
    st.integers(1, 40),
    BLOCKS,
    st.booleans(),
    st.sampled_from(["nearest", "stochastic"]),
    st.booleans(),
)
def test_what_is_packed_comes_back(
    seed: int, lead: list[int], rows: int, columns: int, block: Block, signed: bool, rounding: str, shared: bool
) -> None:
    shape = (*lead, rows, columns)
    matrix, widths = drawn(seed, shape, block, signed)
    quantized = quantize(matrix, widths, block=block, signed=signed, rounding=rounding, shared=shared)
    packed = pack(quantized)
    assert len(packed) == packed_bytes(quantized.bits, block)
    back = unpack(torch.cat([packed, packed[:3]]), shape, block=block, signed=signed)
    assert torch.equal(back.bits, widths.to(torch.uint8))
    assert torch.equal(back.steps, quantized.steps)
    assert torch.equal(back.dequantize(), quantized.dequantize())
    assert torch.equal(pack(back), packed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 3), max_size=1), st.integers(1, 40), st.integers(1, 40), BLOCKS)
def test_means_are_of_what_blocks_hold(lead: list[int], rows: int, columns: int, block: Block) -> None:
    matrix = torch.rand(*lead, rows, columns)
    means = block.means(block.strips(matrix), rows, columns)
    assert means.shape == (*lead, *block.grid(rows, columns))
    for down in range(means.shape[-2]):
        for across in range(means.shape[-1]):
            held = matrix[..., down * block.rows :, across * block.columns :][..., : block.rows, : block.columns]
            assert torch.allclose(means[..., down, across], held.mean((-2, -1)))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 40), BLOCKS, st.booleans(), st.booleans())
def test_nearest_is_off_by_half_a_step_at_most(
    seed: int, rows: int, columns: int, block: Block, signed: bool, shared: bool
) -> None:
    matrix, widths = drawn(seed, (rows, columns), block, signed)
    quantized = quantize(matrix, widths, block=block, signed=signed, shared=shared)
    steps = block.matrix(block.along(quantized.steps).expand_as(quantized.codes), rows, columns)
    kept = block.matrix(block.along(quantized.bits).expand_as(quantized.codes), rows, columns) > 0
    found = quantized.dequantize()
    off = (found.double() - matrix.double()).abs()
    assert bool((off <= 0.5000001 * steps.double())[kept].all())
    assert bool((found[~kept] == 0).all())
    assert signed or bool((found >= 0).all())
    assert bool((found.abs() <= (1.065 if shared else 1.008) * matrix.abs().amax()).all())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 60), BLOCKS, st.booleans())
def test_shared_steps_are_integers_under_one_power_of_two(
    seed: int, rows: int, columns: int, block: Block, signed: bool
) -> None:
    """And, next to a block's own, coarser by a unit of the largest at most."""
    matrix, widths = drawn(seed, (rows, columns), block, signed)
    own, shared = (quantize(matrix, widths, block=block, signed=signed, shared=each).steps for each in (False, True))
    places = torch.exp2(widths.double() - int(signed))
    scaled = shared.double() * places
    largest = float(scaled.max())
    if not largest:
        assert not bool(own.any())
        return
    unit = 2.0 ** (math.frexp(largest)[1] - STEP_BITS)
    counts = scaled / unit
    assert bool((counts == counts.round()).all())
    assert 2**STEP_BITS / 2 <= float(counts.max()) < 2**STEP_BITS
    assert bool((scaled <= (own.double() * places * (1 + 1e-6) + 2 * unit)).all())
    assert bool((scaled * (1 + 2**-7) >= own.double() * places)[widths > 0].all())


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_stochastic_rounding_has_the_value_for_its_mean(bits: int, signed: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    matrix = torch.randn(16, 32, generator=generator)
    matrix = matrix if signed else matrix.abs()
    draws = 4000
    many = matrix.expand(draws, 16, 32)
    quantized = quantize(many, bits, rounding="stochastic", signed=signed, generator=generator)
    found = quantized.dequantize().double()
    steps = Block().matrix(Block().along(quantized.steps[0]).expand(1, 16, 32), 16, 32).double()
    off = (found.mean(0) - matrix.double()) / (steps / 2) * draws**0.5  # the spread of one draw is half a step at most
    assert float(off.abs().max()) < 5
    assert float(off.sum() / off.numel() ** 0.5) < 5
    assert bool(((found - matrix).abs() < 1.0001 * steps).all())


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("bits", [0, 2, 5, 8])
def test_what_is_not_finite_spoils_its_block_alone(bits: int, bad: float) -> None:
    matrix = torch.ones(20, 40)
    matrix[17, 3] = bad
    quantized = quantize(matrix, bits)
    found = unpack(pack(quantized), (20, 40)).dequantize()
    assert bool(found[16:, :16].isnan().all())
    found[16:, :16] = 0
    assert bool(found.isfinite().all())


@pytest.mark.parametrize("shared", [True, False])
def test_extremes(shared: bool) -> None:
    for value in (0.0, 3.4028234e38, *((1e-34,) if shared else (1e-45, 1e-38))):
        matrix = torch.full((16, 16), value)
        found = quantize(matrix, 8, shared=shared).dequantize()
        assert bool(found.isfinite().all())
        assert bool(((found - matrix).abs() <= max(0.01 * value, 1e-40)).all()), value


@pytest.mark.parametrize(
    "arguments, told",
    [
        ({"bits": 1}, "bits must be 0 or 2 to 8, got 1"),
        ({"bits": torch.tensor([[9]])}, r"got \[9\]"),
        ({"bits": 2.5}, "bits must be"),
        ({"bits": torch.zeros(3, 5, dtype=torch.int64)}, r"bits must fit the blocks \(1, 1\), got \(3, 5\)"),
        ({"bits": 4, "rounding": "up"}, "rounding must be one of nearest, stochastic, got 'up'"),
        ({"bits": 4, "matrix": torch.ones(3)}, r"matrix must be a floating-point tensor"),
        ({"bits": 4, "matrix": torch.ones(3, 3).int()}, r"matrix must be a floating-point tensor"),
        ({"bits": 4, "matrix": [[1.0]]}, "got list"),
    ],
)
def test_what_quantize_refuses(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        quantize(arguments.pop("matrix", torch.ones(4, 4)), **arguments)


def test_what_packing_refuses() -> None:
    with pytest.raises(ArgumentError, match="block must have a multiple of 8"):
        pack(quantize(torch.ones(4, 4), 4, block=Block(3, 3)))
    packed = pack(quantize(torch.ones(16, 16), 4))
    for wrong, told in ((packed[:2], "3 bytes of 1 blocks' heads"), (packed[:-1], "must have 131 bytes by its widths")):
        with pytest.raises(ArgumentError, match=told):
            unpack(wrong, (16, 16))
    packed[0] = 9
    with pytest.raises(ArgumentError, match="must begin with blocks' widths"):
        unpack(packed, (16, 16))
    for size in (0, -1, 2.0, True):
        with pytest.raises(ArgumentError, match="of a block must be an integer >= 1"):
            Block(size, 4)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**31),
    st.integers(0, 30),
    st.sampled_from(["dynamic", *WIDTHS, "bfloat16", "float32"]),
    st.floats(1, 8),
    st.booleans(),
)
def test_rows_on_the_wire(seed: int, rows: int, bits: int | str, mean_bits: float, stochastic: bool) -> None:
    """What arrives and what was lost are what was sent; the room for it suffices."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, 256, generator=generator) * torch.randn(rows, 1, generator=generator).mul(4).exp()
    form = Format(bits, max(mean_bits, 2.2) if stochastic else mean_bits)
    lost = values.clone()
    (packed,) = form.encode(lost.unsqueeze(0), generator if stochastic else None)
    assert len(packed) <= form.room(rows)
    assert bits == "dynamic" or len(packed) == form.room(rows)
    found, taken = form.decode(torch.cat([packed, packed[:5]]), rows)
    assert taken == len(packed)
    if rows:
        assert bool(((found + lost - values).abs() <= 1e-6 * values.abs().amax(1, keepdim=True)).all())


def test_what_a_format_refuses() -> None:
    for bits in (1, 9, "int8", None, True, 4.0):
        with pytest.raises(ArgumentError, match="bits must be"):
            Format(bits)  # type: ignore[arg-type]
    for mean in (0.5, 9, "4", float("nan"), True):
        with pytest.raises(ArgumentError, match="mean_bits must be a number from 1 to 8"):
            Format("dynamic", mean)  # type: ignore[arg-type]
    assert issubclass(ArgumentTypeError, ArgumentError)
