"""The reference itself: against loops, and against torch's own attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from attention.dense import dense_attention, visible


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_it_is_torch_s_attention(is_causal: bool, kv_heads: int) -> None:
    query, key, value = random(2, 4, 9, 5), random(2, kv_heads, 9, 5, seed=1), random(2, kv_heads, 9, 5, seed=2)
    wanted = scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=True, scale=0.3)
    torch.testing.assert_close(dense_attention(query, key, value, is_causal=is_causal, scale=0.3), wanted)


def test_the_result_is_float64_and_the_scale_by_head_dim() -> None:
    query, key, value = (random(1, 1, 3, 16, seed=seed).float() for seed in range(3))
    found = dense_attention(query, key, value, is_causal=False)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, dense_attention(query, key, value, is_causal=False, scale=0.25))


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("bounds", [None, (0, 4, 4, 10), (0, 10)])
def test_who_sees_whom(is_causal: bool, window: int | None, bounds: tuple[int, ...] | None) -> None:
    """Pair by pair."""

    def document(position: int) -> int:
        return sum(position >= bound for bound in bounds or ())

    def sees(query: int, key: int) -> bool:
        near = window is None or abs(query - key) < window
        return near and document(query) == document(key) and (not is_causal or key <= query)

    wanted = [[sees(query, key) for key in range(10)] for query in range(10)]
    assert visible(10, is_causal, bounds, window).tolist() == wanted
    if bounds is not None:
        assert visible(10, is_causal, torch.tensor(bounds, dtype=torch.int32), window).tolist() == wanted


def test_documents_are_attentions_of_their_own() -> None:
    query, key, value = (random(1, 2, 10, 4, seed=seed) for seed in range(3))
    found = dense_attention(query, key, value, is_causal=True, cu_seqlens=(0, 3, 10))
    parts = [[x[:, :, start:stop] for x in (query, key, value)] for start, stop in ((0, 3), (3, 10))]
    torch.testing.assert_close(found, torch.cat([dense_attention(*part, is_causal=True) for part in parts], 2))


def test_a_window_of_one_gives_the_values() -> None:
    query, key, value = (random(1, 2, 7, 4, seed=seed) for seed in range(3))
    torch.testing.assert_close(dense_attention(query, key, value, is_causal=False, window=1), value)


def test_gradients() -> None:
    inputs = [random(1, heads, 4, 3, seed=heads).requires_grad_() for heads in (2, 1, 1)]
    assert torch.autograd.gradcheck(lambda q, k, v: dense_attention(q, k, v, is_causal=True, window=2), inputs)
