"""Merging results of blocks: any split gives what is computed at once."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention.kernels_host import MathKernel
from attention.merge import Partial, merge_for, plain

KERNEL = MathKernel()
TOLERANCES = ((torch.float64, 1e-10), (torch.float32, 1e-6))


def random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def block(query: Tensor, key: Tensor, value: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    return KERNEL.forward(query, key, value, causal=causal, scale=0.4)


def cuts(draw: st.DataObject, length: int) -> list[slice]:
    """All of 0..length, in pieces and in any order."""
    inner = draw.draw(st.lists(st.integers(1, length - 1), max_size=4, unique=True).map(sorted))
    bounds = [0, *inner, length]
    return draw.draw(st.permutations([slice(*pair) for pair in pairwise(bounds)]))


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES, ids=str)
@settings(max_examples=50)
@given(draw=st.data())
def test_any_split_of_rows_and_keys_gives_the_whole(dtype: torch.dtype, tolerance: float, draw: st.DataObject) -> None:
    # 30: single keys take nearly all; the rounding of such scores in float32 would be all there is to see.
    spread = draw.draw(st.sampled_from([0.01, 1.0, 30.0][: 3 if dtype == torch.float64 else 2]), label="spread")
    query = random(2, 3, 12, 8, seed=0, dtype=dtype) * spread
    key, value = (random(2, 3, 17, 8, seed=seed, dtype=dtype) for seed in (1, 2))
    into = Partial(query)
    for keys in cuts(draw, 17):
        for rows in cuts(draw, 12):
            into.add(rows, *block(query[:, :, rows], key[:, :, keys], value[:, :, keys]))
    out, lse = into.finish()
    wanted, wanted_lse = block(query.double(), key.double(), value.double())
    torch.testing.assert_close(out.double(), wanted, rtol=0, atol=tolerance * wanted.abs().max().item())
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=tolerance, atol=tolerance)
    assert out.dtype == dtype


def test_many_blocks_do_not_add_up_errors() -> None:
    """In float32, as errors that grow with the number of ranks are what users of others met."""
    query, key, value = (random(1, 2, 64, 16, seed=seed, dtype=torch.float32) for seed in range(3))
    key, value = (x.repeat(1, 1, 8, 1) + 0.1 * torch.arange(512)[:, None] / 512 for x in (key, value))
    into = Partial(query)
    for start in range(0, 512, 4):
        into.add(slice(0, 64), *block(query, key[:, :, start : start + 4], value[:, :, start : start + 4]))
    wanted, _ = block(query.double(), key.double(), value.double())
    assert float((into.finish()[0] - wanted).abs().max()) < 2e-6


def test_rows_that_saw_nothing_are_0_and_their_lse_says_so() -> None:
    query, key, value = (random(1, 2, 5, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    into = Partial(query)
    into.add(slice(3, 5), *block(query[:, :, 3:], key, value))
    out, lse = into.finish()
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == -math.inf).all()
    torch.testing.assert_close((out[:, :, 3:], lse[:, :, 3:]), block(query[:, :, 3:], key, value))


def test_nothing_at_all() -> None:
    query = torch.zeros(2, 3, 4, 5, dtype=torch.bfloat16)
    out, lse = Partial(query).finish()
    assert out.shape == query.shape
    assert out.dtype == torch.bfloat16
    assert lse.dtype == torch.float32
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_a_block_that_saw_nothing_changes_nothing() -> None:
    """Its lse is -inf: before anything else, after it, and where both have seen nothing."""
    query, key, value = (random(1, 1, 4, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    some = block(query, key, value)
    for order in ((0, 1, 0), (1, 0, 0), (0, 0, 1)):
        into = Partial(query)
        for what in order:
            blank = torch.zeros_like(some[0]), torch.full_like(some[1], -math.inf)
            into.add(slice(0, 4), *((x.clone() for x in some) if what else blank))
        torch.testing.assert_close(into.finish(), some, rtol=0, atol=0)


def test_nan_is_not_lost() -> None:
    query, key, value = (random(1, 1, 4, 4, seed=seed, dtype=torch.float32) for seed in range(3))
    for bad in (0, 1):
        into = Partial(query)
        for turn in (0, 1):
            into.add(slice(0, 4), *block(query, key * math.nan if turn == bad else key, value))
        assert into.finish()[0].isnan().all()


def test_scores_beyond_what_exponentials_hold() -> None:
    query = torch.full((1, 1, 2, 4), 1.0)
    key, value = torch.full((1, 1, 3, 4), 100.0), random(1, 1, 3, 4, seed=0, dtype=torch.float32)
    into = Partial(query)
    for sign in (1, -1, 1):
        into.add(slice(0, 2), *block(query, sign * key, value))
    torch.testing.assert_close(into.finish()[0], value.mean(2, keepdim=True).expand(1, 1, 2, 4))


def test_the_first_block_over_all_rows_is_kept_not_copied() -> None:
    query = torch.zeros(1, 2, 3, 4)
    out, lse = torch.ones(1, 2, 3, 4), torch.zeros(1, 2, 3)
    into = Partial(query)
    into.add(slice(0, 3), out, lse)
    assert into.finish()[0].data_ptr() == out.data_ptr()


def test_the_same_bits_every_time() -> None:
    query, key, value = (random(1, 2, 40, 16, seed=seed, dtype=torch.float32) for seed in range(3))

    def once() -> Tensor:
        into = Partial(query)
        for start in range(0, 40, 7):
            into.add(slice(0, 40), *block(query, key[:, :, start : start + 7], value[:, :, start : start + 7]))
        return into.finish()[0]

    assert torch.equal(once(), once())


def test_half_precision_adds_up_in_float32() -> None:
    query, key, value = (random(1, 1, 8, 4, seed=seed, dtype=torch.bfloat16) for seed in range(3))
    into = Partial(query)
    for start in range(0, 8, 2):
        keys = slice(start, start + 2)
        into.add(slice(0, 8), *block(query.float(), key[:, :, keys].float(), value[:, :, keys].float()))
    wanted, _ = block(query.float(), key.float(), value.float())
    out, _ = into.finish()
    assert out.dtype == torch.bfloat16
    assert float((out.float() - wanted).abs().max()) <= 2**-8 * float(wanted.abs().max())


def test_heads_may_come_one_after_another() -> None:
    """In tiles that differ from block to block, with rows of their own: the same as all at once."""
    query, key, value = (random(2, 4, 6, 8, seed=seed, dtype=torch.float64) for seed in range(3))
    rows = (slice(0, 6), slice(2, 6), slice(0, 3))
    tiles = ((slice(0, 3), slice(3, 4)), (slice(0, 2), slice(2, 4)), (slice(0, 4),))
    for order in ((0, 1, 2), (1, 0, 2), (2, 1, 0)):
        whole, parts = Partial(query), Partial(query)
        for which in order:
            found = block(query[:, :, rows[which]], key, value)
            whole.add(rows[which], *(x.clone() for x in found))
            for heads in tiles[which]:
                parts.add(rows[which], *(x[:, heads] for x in found), heads)
        torch.testing.assert_close(parts.finish(), whole.finish(), rtol=0, atol=1e-14)


def test_heads_of_which_nothing_came() -> None:
    query, key, value = (random(1, 3, 4, 4, seed=seed, dtype=torch.float64) for seed in range(3))
    into = Partial(query)
    some = block(query[:, 1:2], key[:, 1:2], value[:, 1:2])
    into.add(slice(0, 4), *some, slice(1, 2))
    out, lse = into.finish()
    torch.testing.assert_close((out[:, 1:2], lse[:, 1:2]), some, rtol=0, atol=0)
    assert (out[:, ::2] == 0).all()
    assert (lse[:, ::2] == -math.inf).all()


def test_without_triton_the_plain_merge_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "attention.merge_triton", raising=False)
    merge_for.cache_clear()
    assert merge_for(torch.device("cpu")) is merge_for(torch.device("cuda")) is plain
    merge_for.cache_clear()


def test_the_merge_for_gpus_in_triton_s_interpreter() -> None:
    """In a process of its own: Triton asks once whether to interpret."""
    pytest.importorskip("triton")
    source = """
import math, torch
from attention.merge import plain
from attention.merge_triton import merge
def rows(*shape): return torch.randn(shape, generator=random, dtype=torch.float64)
random = torch.Generator().manual_seed(0)
for dtype, wide in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
    for dim in (1, 64, 80):
        so_far, seen = rows(2, 3, 70, dim).to(wide)[:, :, 3:], 5 * rows(2, 3, 70).to(wide)[:, :, 3:]
        out, lse = rows(2, 67, 3, dim).to(dtype).transpose(1, 2), 5 * rows(2, 67, 3).to(wide).transpose(1, 2)
        seen[:, :, 5:7], lse[:, :, 6:8], lse[:, :, 9] = -1e30, -math.inf, math.nan
        wanted, found = ((so_far.clone(), seen.clone()) for _ in range(2))
        plain(*wanted, out, lse)
        merge(*found, out, lse)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6, equal_nan=True)
"""
    subprocess.run([sys.executable, "-c", source], check=True, env=os.environ | {"TRITON_INTERPRET": "1"}, timeout=120)
