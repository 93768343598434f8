"""Attention on GPUs, on doubles: through the streams of steps, with every kernel after the arrival that it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attention
import cupy_double
import torch_double
from attention.compute import Saved
from attention.methods import Rings
from attention_cases import Case
from cupy_double import Device
from loopback_ranks import on_ranks
from nccl_double import Fabric, check_memory, check_records
from tasp_coll import Communicator
from torch_double import cast, on_gpu, on_host


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ranks are threads, so torch has one of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch_double.install(monkeypatch)
    backward = Rings.backward

    def on_gpu_again(self: Rings, job: Any, saved: Saved, key: torch.Tensor, value: torch.Tensor) -> Any:
        saved = Saved(*(cast(x) for x in (saved.grad, saved.query, saved.out, saved.lse)))
        with torch._C._EnableTorchFunction():  # which autograd has switched off
            return backward(self, job, saved, cast(key), cast(value))

    monkeypatch.setattr(Rings, "backward", on_gpu_again)
    yield cupy_double.install(monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("method", ["tasp", "ring"])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_forward_and_backward(fabric: Fabric, ranks: int, method: str) -> None:
    case = Case(61 + ranks, is_causal=ranks % 2 == 0, head_dim=8)

    def body(comm: Communicator) -> None:
        with Device(comm.rank):
            *inputs, grad = (on_gpu(case.shard(comm, x)) for x in case.tensors())
            inputs = [x.requires_grad_() for x in inputs]
            out = attention.context_parallel_attention(
                *inputs, is_causal=case.is_causal, enable_gqa=True, comm=comm, method=method
            )
            assert out.is_cuda
            out.backward(grad)
            found = [on_host(out), *(on_host(x.grad) for x in inputs)]  # type: ignore[arg-type]
        for mine, whole in zip(found, case.dense(), strict=True):
            assert torch.allclose(mine, case.shard(comm, whole), atol=1e-10)

    on_ranks(ranks, body)
    fabric.run()
    check_records(fabric.records)
    check_memory(fabric.entries)
    for rank in range(ranks):
        transfers = {group.stream for group in fabric.records[rank][1:]}
        assert len(transfers) == 1
        # Keys there, keys back, gradients home: torch's allocator knows of each.
        assert [(number, stream in transfers) for number, _, stream in torch_double.told if number == rank] == (
            [(rank, True)] * 3
        )
