"""Attention over ranks in one process: results and gradients against the dense reference, and what is refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attention
from attention_cases import BASE, CASES, METHODS, Case, check, lengths
from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator, MismatchError


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    """Ranks are threads here; torch's own would only get in their way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_equals_the_dense_reference(ranks: int, case: Case) -> None:
    on_ranks(ranks, lambda comm: check(comm, case))


@pytest.mark.parametrize("near", [1, 4096])
def test_some_heads_at_a_time(near: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where results are large: a head at a time, and a few."""
    monkeypatch.setattr("attention.kernels_host._NEAR", near)
    for case in CASES:
        on_ranks(3, lambda comm, case=case: check(comm, case))  # type: ignore[misc]


@pytest.mark.parametrize("ranks", [5, 6, 7, 8, 9])
def test_any_number_of_ranks_and_any_length(ranks: int) -> None:
    def body(comm: Communicator) -> None:
        for total in lengths(ranks):
            for is_causal in (True, False):
                check(comm, replace(BASE, total=total, is_causal=is_causal, heads=8, kv_heads=2, head_dim=8))

    on_ranks(ranks, body)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim,is_causal", [(32, True), (64, False), (128, True), (256, True), (256, False)])
def test_precision(dtype: torch.dtype, head_dim: int, is_causal: bool) -> None:
    case = Case(254, dtype=dtype, head_dim=head_dim, is_causal=is_causal)
    on_ranks(4, lambda comm: check(comm, case))


@pytest.mark.parametrize("total", [997, 1024])
def test_long_sequences(total: int) -> None:
    on_ranks(8, lambda comm: check(comm, Case(total, heads=8, kv_heads=1), ("tasp", "ring")))
    on_ranks(3, lambda comm: check(comm, Case(total, is_causal=False, dtype=torch.float32), ("tasp", "allgather")))


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_change_from_run_to_run(method: str) -> None:
    case = Case(100, dtype=torch.float32)
    runs = [on_ranks(4, lambda comm: case.sharded(comm, method))[0] for _ in range(3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_gradcheck(method: str) -> None:
    """All ranks change the same element of the whole sequence; what all of them return counts once."""

    def body(comm: Communicator) -> bool:
        case = Case(5, heads=6, kv_heads=3, head_dim=1)

        def whole(*inputs: Tensor) -> Tensor:
            shards = [case.shard(comm, _Summed.apply(x, comm)) for x in inputs]  # type: ignore[no-untyped-call]
            out = attention.context_parallel_attention(
                *shards, is_causal=True, enable_gqa=True, comm=comm, method=method
            )
            return case.unshard(comm, out)

        return torch.autograd.gradcheck(whole, [x.requires_grad_() for x in case.tensors()[:3]])

    assert all(on_ranks(3, body))


class _Summed(torch.autograd.Function):
    """The same tensor on all ranks; its gradient is the mean of all ranks'."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.comm.decomposed_allreduce(grads[0].contiguous(), op="avg"), None


def test_inputs_may_be_strided_and_stay_as_they_are() -> None:
    def body(comm: Communicator) -> None:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        strided = [x.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_() for x in inputs]
        out = attention.context_parallel_attention(*strided, is_causal=True, enable_gqa=True, comm=comm, method="tasp")
        out.sum().backward()  # its gradient has strides of 0
        assert all(torch.equal(a, b) for a, b in zip(strided, inputs, strict=True))
        assert all(x.grad is not None for x in strided)

    on_ranks(3, body)


def test_scale() -> None:
    def body(comm: Communicator) -> None:
        query, key, value, _ = (BASE.shard(comm, x) for x in BASE.tensors())
        call = attention.context_parallel_attention
        a = call(query, key, value, is_causal=True, scale=0.3, enable_gqa=True, comm=comm, method="ring")
        b = call(query * 0.3 * 32**0.5, key, value, is_causal=True, enable_gqa=True, comm=comm, method="ring")
        assert torch.allclose(a, b, atol=1e-12)

    on_ranks(3, body)


def test_a_mask_that_says_nothing_more_is_accepted() -> None:
    def body(comm: Communicator) -> BaseException | None:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        positions = attention.sequence_indices(BASE.total, comm=comm)
        mask = positions[:, None] >= torch.arange(BASE.total)
        call = attention.context_parallel_attention
        plain = call(*inputs, is_causal=True, enable_gqa=True, comm=comm)
        masked = call(*inputs, mask, is_causal=True, enable_gqa=True, comm=comm)
        assert torch.equal(plain, masked)
        if comm.rank == 1:
            mask[0, 0] = False
        return attempt(lambda: call(*inputs, mask, is_causal=True, enable_gqa=True, comm=comm))

    for raised in on_ranks(2, body):
        assert isinstance(raised, MismatchError)
        assert "rank 1 was called with a bad argument: attn_mask must say no more than" in str(raised)


GOOD: dict[str, Any] = {"is_causal": True, "enable_gqa": True}
BAD: tuple[tuple[dict[str, Any], str], ...] = (
    ({"dropout_p": 0.1}, "dropout_p must be 0"),
    ({"method": "flash"}, "method must be one of auto, tasp"),
    ({"window": 0}, "window must be an integer >= 1 or None, got 0"),
    ({"scale": "big"}, "scale must be a finite number"),
    ({"enable_gqa": False}, "enable_gqa must be True"),
    ({"attn_mask": torch.zeros(3, 3)}, "attn_mask must be None or bool; use is_causal, cu_seqlens"),
    ({"cu_seqlens": [1, 61]}, "cu_seqlens must be integers that begin with 0"),
    ({"cu_seqlens": [0, 60]}, "cu_seqlens must end with the number of tokens, 61, got 60"),
    ({"key": torch.zeros(1, 3, 5, 32, dtype=torch.float64)}, "key"),
    ({"value": torch.zeros(1, 2, 5, 16, dtype=torch.float64)}, "value must have key's shape"),
    ({"query": torch.zeros(4, 5, 32)}, r"query must be a tensor \(batch, heads, local tokens, head_dim\), got shape"),
    ({"query": torch.zeros(1, 4, 5, 32, dtype=torch.int32)}, "query must be of float64"),
    ({"key": None}, "key must be a tensor"),
)


@pytest.mark.parametrize("changes,message", BAD, ids=str)
def test_bad_arguments_are_errors_on_every_rank(changes: dict[str, Any], message: str) -> None:
    def body(comm: Communicator) -> list[BaseException | None]:
        good = dict(zip(("query", "key", "value"), (BASE.shard(comm, x) for x in BASE.tensors()), strict=False), **GOOD)
        call = attention.context_parallel_attention
        everyone = attempt(lambda: call(**{**good, **changes}, comm=comm))
        one = attempt(lambda: call(**(good | changes if comm.rank == 1 else good), comm=comm))
        assert call(**good, comm=comm).shape == good["query"].shape, "the communicator stays usable"
        return [everyone, one]

    for everyone, one in on_ranks(3, body):
        assert isinstance(everyone, (ArgumentError, MismatchError))  # the latter where shapes in the words differ
        assert re.search(message, str(everyone))
        assert isinstance(one, MismatchError)
        assert "rank 1" in str(one)


def test_heads_that_do_not_divide() -> None:
    def body(comm: Communicator) -> BaseException | None:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        return attempt(
            lambda: attention.context_parallel_attention(*inputs, enable_gqa=True, comm=comm, method="ulysses")
        )

    for raised in on_ranks(3, body):
        assert isinstance(raised, ArgumentError)
        assert "method must be 'tasp', 'ring' or 'allgather'" in str(raised)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"is_causal": False}, "rank 1 passed is_causal=False"),
        ({"window": 3}, "rank 1 passed window=3, where others passed window=None"),
        ({"method": "ring"}, "rank 1 passed method=ring"),
        ({"scale": 2.0}, "rank 1 passed scale=2.0"),
    ],
)
def test_ranks_that_differ_are_named(changes: dict[str, Any], message: str) -> None:
    def body(comm: Communicator) -> BaseException | None:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        options = {"is_causal": True, "method": "tasp", **(changes if comm.rank == 1 else {})}
        return attempt(lambda: attention.context_parallel_attention(*inputs, enable_gqa=True, comm=comm, **options))

    for raised in on_ranks(4, body):
        assert isinstance(raised, MismatchError)
        assert message in str(raised)
        assert raised.ranks == (1,)


def test_tokens_that_are_not_this_ranks() -> None:
    def body(comm: Communicator) -> BaseException | None:
        tokens = 5 + (comm.rank == 0)
        inputs = [torch.zeros(1, 2, tokens, 4) for _ in range(3)]
        return attempt(lambda: attention.context_parallel_attention(*inputs, is_causal=True, comm=comm))

    for raised in on_ranks(3, body):
        assert isinstance(raised, ArgumentError)
        assert "query must have the tokens that sequence_indices gives each rank" in str(raised)
