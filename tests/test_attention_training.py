"""Batches and gradients over ranks of one process; no model needed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention import sequence_indices
from attention.training import global_loss, shard_batch, sync_gradients
from loopback_ranks import on_ranks
from tasp_coll import Communicator


@given(st.data())
def test_every_token_is_on_one_rank_with_its_position_and_the_next_tokens_label(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 20))
    cuts = data.draw(st.none() | st.lists(st.integers(0, total), max_size=4).map(lambda c: [0, *sorted(c), total]))
    ids = torch.arange(100, 100 + 2 * total).reshape(2, total)
    labels = ids.clone()
    labels[0, :: data.draw(st.integers(1, 3))] = -100

    def body(comm: Communicator) -> tuple[torch.Tensor, dict[str, Any]]:
        mine = sequence_indices(total, comm=comm, cu_seqlens=None if cuts is None else torch.tensor(cuts))
        return mine, shard_batch(ids, labels, comm=comm, cu_seqlens=cuts)

    found = on_ranks(data.draw(st.integers(1, 5)), body)
    assert sorted(torch.cat([mine for mine, _ in found]).tolist()) == list(range(total))
    documents = [range(a, b) for a, b in pairwise(cuts or [0, total])]
    counted = 0
    for mine, batch in found:
        assert batch["held_tokens"] == len(mine)
        if not len(mine):
            assert (batch["labels"] == -100).all()
            continue
        assert torch.equal(batch["input_ids"], ids[:, mine])
        counted += int((batch["labels"] != -100).sum())
        for column, place in enumerate(mine.tolist()):
            inside = next(each for each in documents if place in each)
            assert (batch["position_ids"][:, column] == place - inside[0]).all()
            label = labels[:, place + 1] if place + 1 in inside else torch.tensor([-100, -100])
            assert torch.equal(batch["shift_labels"][:, column], label)
    assert {batch["num_items_in_batch"] for _, batch in found} == {max(1, counted)}


@pytest.mark.parametrize("bucket_bytes", [1, 100, 1 << 20])
def test_gradients_add_up_where_any_rank_has_one(bucket_bytes: int) -> None:
    def body(comm: Communicator) -> list[torch.Tensor | None]:
        model = torch.nn.ParameterList(torch.zeros(size, dtype=kind) for size, kind in SIZES)
        for index, parameter in enumerate(model):
            if index != 1 and (index != 2 or comm.rank == 1):
                parameter.grad = torch.full_like(parameter, comm.rank + 1.0)
        sync_gradients(model, comm=comm, bucket_bytes=bucket_bytes)
        return [parameter.grad for parameter in model]

    SIZES = [(7, torch.float32), (3, torch.float32), (5, torch.float64), ((2, 9), torch.float32), (4, torch.bfloat16)]
    for grads in on_ranks(3, body):
        assert grads[1] is None, "no rank had one"
        sums = [None if grad is None else set(grad.float().flatten().tolist()) for grad in grads]
        assert sums == [{6.0}, None, {2.0}, {6.0}, {6.0}]


def test_the_loss_is_the_sum_of_shares_and_its_gradient_stays_at_home() -> None:
    def body(comm: Communicator) -> tuple[float, float]:
        share = torch.tensor(0.1 * (comm.rank + 1), requires_grad=True)
        loss = global_loss(share, comm=comm)
        (3 * loss).backward()
        assert share.grad is not None
        return loss.item(), share.grad.item()

    found = on_ranks(4, body)
    assert len(set(found)) == 1
    assert found[0] == pytest.approx((1.0, 3.0))
