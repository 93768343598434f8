"""Programs of torch.distributed over "tasp" do what they do over Gloo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from tasp_coll.torch_backend import TaspGroup

RANK, SIZE = dist.get_rank(), dist.get_world_size()
Group = dist.ProcessGroup
OPS = [dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]


@pytest.fixture(scope="module")
def gloo() -> Group:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, Group)
    return group


def values(rows: int = 6, dtype: torch.dtype = torch.float32, rank: int = RANK) -> Tensor:
    return (torch.arange(rows * 3).view(rows, 3) * (rank + 2) % 7).to(dtype)


def both(gloo: Group, call: Callable[[Group | None], Tensor]) -> tuple[Tensor, Tensor]:
    return call(None), call(gloo)


def test_the_backend_is_ours() -> None:
    assert dist.get_backend() == "cpu:tasp,cuda:tasp"
    assert isinstance(dist.group.WORLD, TaspGroup)
    assert (dist.get_rank(), dist.get_world_size()) == (RANK, SIZE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_gather(dtype: torch.dtype) -> None:
    expected = torch.cat([values(dtype=dtype, rank=rank) for rank in range(SIZE)])
    whole = torch.empty_like(expected)
    dist.all_gather_into_tensor(whole, values(dtype=dtype))
    assert torch.equal(whole, expected)
    parts = [torch.empty(6, 3, dtype=dtype) for _ in range(SIZE)]
    dist.all_gather(parts, values(dtype=dtype))
    assert torch.equal(torch.cat(parts), expected)
    own = whole.zero_()[RANK * 6 : RANK * 6 + 6].copy_(values(dtype=dtype))
    dist.all_gather_into_tensor(whole, own)
    assert torch.equal(whole, expected)


def test_all_gather_of_uneven_parts_and_strided_tensors() -> None:
    parts = [torch.empty(rank, 3) for rank in range(SIZE)]
    dist.all_gather(parts, values(RANK))
    for rank, part in enumerate(parts):
        assert torch.equal(part, values(rank, rank=rank))
    strided = torch.empty(3, 6 * SIZE).t()
    dist.all_gather_into_tensor(strided, torch.empty(3, 6).t().copy_(values()))
    assert torch.equal(strided, torch.cat([values(rank=rank) for rank in range(SIZE)]))
    total = torch.empty(3, 6).t().copy_(values())
    dist.all_reduce(total)
    assert torch.equal(total, sum(values(rank=rank) for rank in range(SIZE)))


@pytest.mark.parametrize(
    "op", [dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_reductions(gloo: Group, dtype: torch.dtype, op: Any) -> None:
    def reduced(group: Group | None) -> Tensor:
        tensor = values(dtype=dtype)
        dist.all_reduce(tensor, op, group=group)
        return tensor

    def scattered(group: Group | None) -> Tensor:
        output = torch.empty(6, 3, dtype=dtype)
        dist.reduce_scatter_tensor(output, values(6 * SIZE, dtype), op, group=group)
        return output

    for call in (reduced, scattered):
        ours, theirs = both(gloo, call)
        assert torch.equal(ours, theirs)
    output = torch.empty(RANK + 1, 3, dtype=dtype)
    dist.reduce_scatter(output, [values(rank + 1, dtype) for rank in range(SIZE)], op)
    everyone = torch.stack([values(RANK + 1, dtype, rank) for rank in range(SIZE)])
    numbers = {"SUM": everyone.sum(0), "MIN": everyone.amin(0), "MAX": everyone.amax(0), "PRODUCT": everyone.prod(0)}
    assert torch.equal(output, numbers[str(op).rpartition(".")[2]])


def test_averages_which_gloo_has_not() -> None:
    tensor = values()
    dist.all_reduce(tensor, dist.ReduceOp.AVG)
    assert torch.allclose(tensor, sum(values(rank=rank) for rank in range(SIZE)) / SIZE)


def test_asynchronous_ones_overlap_and_end_in_order() -> None:
    tensors = [values(4000 + number) for number in range(6)]
    works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
    for work, tensor in zip(reversed(works), reversed(tensors), strict=True):
        assert work is not None
        work.wait()
        assert work.is_completed()
        assert torch.equal(tensor, sum(values(len(tensor), rank=rank) for rank in range(SIZE)))
    work = dist.all_reduce(tensors[0].clone(), async_op=True)
    assert work is not None
    (result,) = work.get_future().wait()
    assert torch.equal(result, tensors[0] * SIZE)


def test_coalesced() -> None:
    outputs = [torch.empty(6 * SIZE, 3) for _ in range(3)]
    with dist._coalescing_manager():
        for output in outputs:
            dist.all_gather_into_tensor(output, values())
    for output in outputs:
        assert torch.equal(output, torch.cat([values(rank=rank) for rank in range(SIZE)]))
    sums = [values(), values(9)]
    with dist._coalescing_manager():
        for tensor in sums:
            dist.all_reduce(tensor)
    for tensor in sums:
        assert torch.equal(tensor, sum(values(len(tensor), rank=rank) for rank in range(SIZE)))
    outputs = [torch.empty(6, 3) for _ in range(2)]
    with dist._coalescing_manager():
        for output in outputs:
            dist.reduce_scatter_tensor(output, values(6 * SIZE))
    total = sum(values(6 * SIZE, rank=rank) for rank in range(SIZE))
    for output in outputs:
        assert torch.equal(output, total[RANK * 6 : RANK * 6 + 6])


def test_what_is_delegated() -> None:
    dist.barrier()
    tensor = torch.full((3,), float(RANK))
    dist.broadcast(tensor, SIZE - 1)
    assert (tensor == SIZE - 1).all()
    told: list[Any] = [None] * SIZE
    dist.all_gather_object(told, {"rank": RANK})
    assert told == [{"rank": rank} for rank in range(SIZE)]
    swapped = torch.empty(SIZE)
    dist.all_to_all_single(swapped, torch.arange(SIZE) + 10.0 * RANK)
    assert swapped.tolist() == [RANK + 10.0 * rank for rank in range(SIZE)]
    bits = torch.tensor([1 << RANK])
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    assert bits.item() == 2**SIZE - 1
    if RANK < 2:
        other = torch.zeros(2)
        works = [dist.isend(torch.full((2,), float(RANK)), 1 - RANK), dist.irecv(other, 1 - RANK)]
        for work in works:
            assert work is not None
            work.wait()
        assert (other == 1 - RANK).all()


def test_groups() -> None:
    evens = dist.new_group(list(range(0, SIZE, 2)))
    if RANK % 2 == 0:
        tensor = torch.ones(5)
        dist.all_reduce(tensor, group=evens)
        assert (tensor == (SIZE + 1) // 2).all()
    alone = dist.new_group([0])
    if RANK == 0:
        tensor = torch.ones(5)
        dist.all_reduce(tensor, group=alone)
        assert (tensor == 1).all()
    dist.barrier()


def test_functional_collectives_and_dtensor() -> None:
    everyone = torch.cat([values(rank=rank) for rank in range(SIZE)])
    assert torch.equal(functional.all_gather_tensor(values(), 0, dist.group.WORLD) + 0, everyone)
    assert torch.equal(functional.all_reduce(values(), "sum", dist.group.WORLD) + 0, everyone.view(SIZE, 6, 3).sum(0))
    total = sum(values(6 * SIZE, rank=rank) for rank in range(SIZE))
    part = functional.reduce_scatter_tensor(values(6 * SIZE), "sum", 0, dist.group.WORLD) + 0
    assert torch.equal(part, total[RANK * 6 : RANK * 6 + 6])
    mesh = DeviceMesh("cpu", list(range(SIZE)))
    whole = torch.arange(4.0 * SIZE).view(2 * SIZE, 2)
    sharded = distribute_tensor(whole, mesh, [Shard(0)])
    assert torch.equal(sharded.redistribute(mesh, [Replicate()]).to_local(), whole)
    pieces = DTensor.from_local(values(6 * SIZE), mesh, [Partial()])
    assert torch.equal(pieces.redistribute(mesh, [Replicate()]).to_local(), total)
    assert torch.equal(pieces.redistribute(mesh, [Shard(0)]).to_local(), total[RANK * 6 : RANK * 6 + 6])


def transformer() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0) for _ in range(2)]
    return nn.Sequential(nn.Embedding(50, 32), *layers, nn.Linear(32, 50))


def replicated(model: nn.Module, group: Group | None) -> nn.Module:
    return DistributedDataParallel(model, process_group=group)


def sharded(model: nn.Module, group: Group | None) -> nn.Module:
    mesh = DeviceMesh.from_group(group or dist.group.WORLD, "cpu")
    for layer in list(model.children())[1:3]:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


@pytest.mark.parametrize("spread", [replicated, sharded])
def test_training(gloo: Group, spread: Callable[[nn.Module, Group | None], nn.Module]) -> None:
    def train(group: Group | None) -> Tensor:
        model = spread(transformer(), group)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        torch.manual_seed(RANK)
        losses = []
        for _ in range(4):
            ids = torch.randint(0, 50, (4, 16))
            loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        weights = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in model.parameters()]
        return torch.cat([torch.stack(losses), *(weight.flatten() for weight in weights)])

    ours, theirs = both(gloo, train)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_what_ranks_disagree_on_is_raised() -> None:
    group = dist.new_group()
    with pytest.raises(RuntimeError, match=r"disagree on shape"):
        dist.all_reduce(torch.ones(3 + (RANK == SIZE - 1)), group=group)
    tensor = torch.ones(3)
    dist.all_reduce(tensor, group=group)
    assert (tensor == SIZE).all()


def test_the_end() -> None:
    dist.destroy_process_group()
    assert not dist.is_initialized()
