"""Attention over MPI: the same cases as in one process, fewer of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attention
from attention_cases import BASE, CASES, Case, check
from tasp_coll import Communicator


@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[5], CASES[9]], ids=repr)
def test_equals_the_dense_reference(case: Case) -> None:
    with Communicator() as comm:
        check(comm, replace(case, heads=8, head_dim=16))


def test_float32_on_awkward_lengths() -> None:
    with Communicator() as comm:
        for total in {1, max(comm.size - 1, 1), 97}:
            check(comm, Case(total, dtype=torch.float32))


def test_auto_takes_what_all_ranks_agree_on() -> None:
    case = replace(BASE, heads=8, kv_heads=8)
    for topology in (None, f"full_mesh:{Communicator().size}", f"nvswitch:{Communicator().size}"):
        with Communicator(topology=topology) as comm:
            check(comm, case, ("auto",))


def test_a_model_of_several_layers_learns_from_the_whole_sequence() -> None:
    """The gradient of a shared weight, summed over ranks, is that of the whole sequence on one rank."""
    with Communicator() as comm, Communicator(_alone()) as alone:
        found = [_weight_gradient(one) for one in (comm, alone)]
        total = comm.decomposed_allreduce(found[0])
        assert torch.allclose(total, found[1], atol=1e-9)


def _alone() -> object:
    from mpi4py import MPI

    return MPI.COMM_SELF


def _weight_gradient(comm: Communicator) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(16, 16, generator=random, dtype=torch.float64).requires_grad_()
    x = attention.shard_sequence(torch.randn(1, 2, 50, 16, generator=random, dtype=torch.float64), 2, comm=comm)
    for _ in range(3):
        x = x + attention.context_parallel_attention(x @ weight, x, x @ weight.T, is_causal=True, comm=comm)
    x.square().sum().backward()
    assert weight.grad is not None
    return weight.grad
