"""Attention whose keys and values travel in few bits: it computes exactly what it says, and its error is bounded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import attention
from attention.dense import dense_attention
from attention.kv_bits import Bits
from attention.kv_widths import allocated, codec_for
from attention.sequence import checked
from attention.wire_bits import Codec
from attention_cases import BASE, TOLERANCE, Case, Tensors, error
from loopback_ranks import attempt, on_ranks
from tasp_coll import ArgumentError, Communicator, MismatchError

STEPWISE = ("tasp", "ring", "allgather")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Few(Case):
    """A case in few bits, and what it must give: dense attention of each rank on the keys and values that it gets."""

    kv_bits: int | str = "dynamic"

    def found(self, comm: Communicator, method: str) -> Tensors:
        """Result and gradients, whole."""
        return self.sharded(comm, method, kv_bits=self.kv_bits)

    def wanted(self, comm: Communicator) -> Tensors:
        """The same by the dense reference in float64."""
        query, key, value, grad = (x.double().requires_grad_() for x in self.tensors())
        arrived = restored(self.codec(comm), key.to(self.dtype), value.to(self.dtype))
        total = torch.zeros_like(query)
        for rank in range(comm.size):
            mine = torch.from_numpy(checked(self.total, comm.size, self.is_causal, self.cu_seqlens).positions(rank))
            others = torch.ones(self.total, 1, dtype=torch.float64).index_fill(0, mine, 0)
            seen = [
                x + ((there.double() - x) * others).detach() for x, there in zip((key, value), arrived, strict=True)
            ]
            rule = {"is_causal": self.is_causal, "cu_seqlens": self.cu_seqlens, "window": self.window}
            total = total + dense_attention(query, *seen, **rule) * (1 - others)
        total.backward(grad.detach())
        return (total.detach(), query.grad, key.grad, value.grad)  # type: ignore[return-value]

    def codec(self, comm: Communicator) -> Codec:
        """What the ranks agree on."""
        bits = Bits.of(self.kv_bits)
        assert bits is not None
        inputs = (self.shard(comm, x) for x in self.tensors()[:3])
        return codec_for(comm, bits, *inputs, self.head_dim**-0.5, self.total)  # type: ignore[misc]


def restored(codec: Codec, key: Tensor, value: Tensor) -> Tensor:
    """Keys and values (B, Hkv, S, D) there and back: (2, B, Hkv, S, D)."""
    tokens = torch.stack([key, value]).permute(3, 0, 1, 2, 4).contiguous().detach()
    return codec.decode(codec.encode(tokens), key.dtype).permute(1, 2, 3, 0, 4)


CASES = (
    Few(61),
    Few(61, kv_bits=4, is_causal=False, batch=2),
    Few(40, kv_bits="dynamic:3", heads=6, kv_heads=3, head_dim=20),
    Few(37, kv_bits=8, window=9, heads=2, kv_heads=2, head_dim=64),
    Few(50, documents=(0, 0.1, 0.1, 0.7), dtype=torch.float32),
    Few(3, kv_bits=2, head_dim=1),
)


@pytest.mark.parametrize("case", CASES, ids=repr)
@pytest.mark.parametrize("ranks", [2, 4])
def test_computes_with_what_arrived(ranks: int, case: Few) -> None:
    """Gradients too: straight through, to where they came from."""

    def body(comm: Communicator) -> None:
        wanted = case.wanted(comm)
        for method in STEPWISE:
            assert error(case.found(comm, method), wanted) <= TOLERANCE[case.dtype], method

    on_ranks(ranks, body)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    case = Few(61, dtype=dtype)

    def body(comm: Communicator) -> None:
        allowed = 2 * error(case.dense(dtype), case.dense())
        assert error(case.found(comm, "tasp"), case.wanted(comm)) <= allowed

    on_ranks(3, body)


def test_one_rank_has_no_wire() -> None:
    (found,) = on_ranks(1, lambda comm: CASES[0].found(comm, "tasp"))
    assert error(found, CASES[0].dense()) <= TOLERANCE[CASES[0].dtype]


def test_more_bits_have_less_error_and_dynamic_ones_less_than_equal_ones() -> None:
    """On keys with a large channel, and heads that matter more than others."""
    random = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn((1, 4, 96, 64), generator=random) for _ in range(3))
    key[..., 5] *= 12
    query[:, 1] *= 3
    value[:, 2] *= 5

    def body(comm: Communicator) -> list[Any]:
        inputs = [attention.shard_sequence(x, 2, comm=comm, is_causal=True) for x in (query, key, value)]
        kinds = (2, 3, 4, 6, 8, "dynamic:3", "dynamic", "dynamic:6")
        return [attention.kv_error(*inputs, is_causal=True, comm=comm, kv_bits=kind) for kind in kinds]

    found = on_ranks(3, body)
    assert found[0] == found[1] == found[2]
    *equal, three, four, six = (each.outputs for each in found[0])
    assert equal == sorted(equal, reverse=True)
    assert equal[-1] < 0.01 < equal[0]
    assert (three, four, six) < (equal[1], equal[2], equal[3])
    bits = [each.bits for each in found[0]]
    assert bits[:5] == [2.25, 3.25, 4.25, 6.25, 8.25]
    assert all(mean - 0.2 < each <= mean + 0.25 for mean, each in zip((3, 4, 6), bits[5:], strict=True))


def test_what_is_not_finite_stays_so_and_spoils_no_neighbours() -> None:
    def body(comm: Communicator) -> None:
        key, value = (torch.randn((1, 1, 6, 64)) for _ in range(2))
        key[0, 0, 2, 0], value[0, 0, 4, 63] = torch.inf, torch.nan
        codec = codec_for(comm, Bits(4.0, dynamic=False), key, key, value, 0.1, 12)
        there = restored(codec, key, value)
        bad = there.isnan()
        assert bad[0, 0, 0, 2, :32].all()
        assert bad[1, 0, 0, 4, 32:].all()
        assert bad.sum() == 64
        tiny = restored(codec, torch.zeros_like(key), key.new_full(key.shape, 1e-30))
        assert not tiny.any()

    on_ranks(2, body)


def test_widths_are_the_best_for_their_bits() -> None:
    costs = np.array([4.0, 1.0, 1e-9, 0.0, 300.0, 1.0])
    for mean in (2.0, 3.0, 4.5, 8.0):
        widths = allocated(costs, mean)
        assert widths.sum() <= mean * len(costs) < widths.sum() + 2
        assert (np.diff(widths[np.argsort(costs, kind="stable")]) >= 0).sum() >= 4
    assert set(allocated(np.array([1e6, 1e6, 1e-9]), 4.0)) == {6, 0}


@pytest.mark.parametrize("kv_bits", [0, 1, 9, 4.0, True, "8", "dynamic:", "dynamic:9", "dynamic:1.5", "best"])
def test_other_bits_are_refused_on_every_rank(kv_bits: Any) -> None:
    def body(comm: Communicator) -> list[BaseException | None]:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        call = attention.context_parallel_attention
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "comm": comm}
        return [
            attempt(lambda: call(*inputs, **options, kv_bits=kv_bits)),
            attempt(lambda: call(*inputs, **options, kv_bits=kv_bits if comm.rank == 1 else 4)),
            attempt(lambda: call(*inputs, **options, kv_bits=3 if comm.rank == 1 else 4)),
        ]

    for bad, one, differing in on_ranks(2, body):
        assert isinstance(bad, ArgumentError)
        assert "kv_bits must be None, an integer from 2 to 8, 'dynamic' or 'dynamic:MEAN' with a mean" in str(bad)
        assert isinstance(one, MismatchError)
        assert "rank 1 was called with a bad argument: kv_bits" in str(one)
        assert isinstance(differing, MismatchError)
        assert "kv_bits=" in str(differing)


def test_heads_over_ranks_have_none() -> None:
    def body(comm: Communicator) -> BaseException | None:
        inputs = [BASE.shard(comm, x) for x in BASE.tensors()[:3]]
        options: dict[str, Any] = {"is_causal": True, "enable_gqa": True, "comm": comm, "kv_bits": 8}
        raised = attempt(lambda: attention.context_parallel_attention(*inputs, **options, method="ulysses"))
        attention.context_parallel_attention(*inputs, **options)  # "auto" takes another
        return raised

    for raised in on_ranks(2, body, topology="full_mesh:2"):
        assert "kv_bits must be None with method 'ulysses': take 'tasp', 'ring' or 'allgather', got 8" in str(raised)


def test_results_do_not_change_from_run_to_run() -> None:
    case = replace(CASES[0], dtype=torch.float32)
    runs = [on_ranks(3, lambda comm: case.found(comm, "tasp"))[0] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
