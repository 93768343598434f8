"""Every form of the collectives that are ours, against gloo on the same numbers, and what is delegated to it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor

from tasp_coll.torch_backend import TaspGroup

DTYPES = [torch.float32, torch.float64, torch.int64, torch.bfloat16]
SUMS = {"rtol": 1e-5, "atol": 1e-5}
Group = dist.ProcessGroup


def size() -> int:
    return dist.get_world_size()


def mine(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Other numbers on every rank, of which sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(100 * dist.get_rank() + seed)
    return torch.randint(-9, 10, shape, generator=generator).to(dtype)


def calls() -> int:
    """How many of ours the default group has carried out; 0 before the first."""
    group = dist.group.WORLD
    assert isinstance(group, TaspGroup)
    return group.carried


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool, torch.float8_e4m3fn])
def test_all_gather_into_tensor(dtype: torch.dtype) -> None:
    before, send = calls(), mine(3, 5).to(dtype)
    out = torch.empty(3 * size(), 5, dtype=dtype)
    dist.all_gather_into_tensor(out, send)
    parts = [torch.empty(3, 5, dtype=torch.float32) for _ in range(size())]
    dist.all_gather(parts, send.float())
    assert torch.equal(out.float(), torch.cat(parts))
    assert calls() == before + 2


def test_all_gather_in_place_and_large(gloo: Group) -> None:
    wanted, out = torch.empty(size() * 70000), torch.zeros(size() * 70000)
    own = out.narrow(0, dist.get_rank() * 70000, 70000)
    own.copy_(mine(70000))
    dist.all_gather_into_tensor(wanted, own.clone(), group=gloo)
    dist.all_gather_into_tensor(out, own)
    assert torch.equal(out, wanted)


def test_all_gather_of_views_scalars_and_nothing(gloo: Group) -> None:
    for send in (mine(4, 6).T, mine(1)[0], mine(0, 3)):
        found, wanted = ([torch.empty(send.shape) for _ in range(size())] for _ in range(2))
        dist.all_gather(found, send)
        dist.all_gather(wanted, send.contiguous(), group=gloo)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_all_gather_of_unequal_parts() -> None:
    found = [torch.empty(rank + 1) for rank in range(size())]
    dist.all_gather(found, torch.full((dist.get_rank() + 1,), float(dist.get_rank())))
    assert all(torch.equal(x, torch.full((rank + 1,), float(rank))) for rank, x in enumerate(found))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["SUM", "PRODUCT", "MIN", "MAX"])
def test_all_reduce(op: str, dtype: torch.dtype, gloo: Group) -> None:
    found, wanted = mine(7, 3, dtype=dtype), mine(7, 3, dtype=dtype)
    dist.all_reduce(found, getattr(dist.ReduceOp, op))
    dist.all_reduce(wanted, getattr(dist.ReduceOp, op), group=gloo)
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else SUMS
    torch.testing.assert_close(found, wanted, **tolerances)


def test_average_which_gloo_has_not(gloo: Group) -> None:
    found, wanted = mine(33), mine(33)
    dist.all_reduce(found, dist.ReduceOp.AVG)
    dist.all_reduce(wanted, group=gloo)
    torch.testing.assert_close(found, wanted / size())


def test_all_reduce_of_views_and_scalars(gloo: Group) -> None:
    found, wanted = mine(6, 4), mine(6, 4)
    dist.all_reduce(found.T[1:])
    rows = wanted.T[1:].contiguous()
    dist.all_reduce(rows, group=gloo)
    wanted.T[1:] = rows
    assert torch.equal(found, wanted)
    scalar = torch.tensor(1.0)
    dist.all_reduce(scalar)
    assert scalar == size()


def test_reduce_scatter(gloo: Group) -> None:
    send, out = mine(size() * 3, 5), torch.empty(3, 5)
    total = send.clone()
    dist.all_reduce(total, group=gloo)
    wanted = total.chunk(size())[dist.get_rank()]
    dist.reduce_scatter_tensor(out, send)
    assert torch.equal(out, wanted)
    dist.reduce_scatter(out.zero_(), list(send.chunk(size())))
    assert torch.equal(out, wanted)


def test_reduce_scatter_of_unequal_parts() -> None:
    out = torch.empty(dist.get_rank() + 1)
    dist.reduce_scatter(out, [torch.full((rank + 1,), float(rank)) for rank in range(size())])
    assert torch.equal(out, torch.full_like(out, float(dist.get_rank() * size())))


def test_coalesced_forms(gloo: Group) -> None:
    sends = [mine(4), mine(2, 3, dtype=torch.int64), mine(5, seed=1), mine(0, dtype=torch.float64)]
    before = calls()
    outs = [torch.empty(size() * x.shape[0], *x.shape[1:], dtype=x.dtype) for x in sends]
    with dist._coalescing_manager(async_ops=True) as works:
        for out, send in zip(outs, sends, strict=True):
            dist.all_gather_into_tensor(out, send)
    works.wait()
    sums = [out.clone() for out in outs]
    parts = [torch.empty_like(x) for x in sends]
    with dist._coalescing_manager():
        for part, whole in zip(parts, sums, strict=True):
            dist.reduce_scatter_tensor(part, whole)
    with dist._coalescing_manager():
        for send in sends:
            dist.all_reduce(send)
    assert calls() == before + 3
    for out, part, send, again in zip(outs, parts, sends, [mine(4), mine(2, 3), mine(5, seed=1), mine(0)], strict=True):
        wanted = torch.empty(size() * again.shape[0], *again.shape[1:])
        dist.all_gather_into_tensor(wanted, again.float(), group=gloo)
        assert torch.equal(out.float(), wanted)
        assert torch.equal(part.float(), again.float() * size())
        assert torch.equal(send.float(), wanted.view(size(), *again.shape).sum(0))


def test_old_coalesced_names() -> None:
    sends = [mine(3), mine(2, 2)]
    lists = [[torch.empty_like(x) for x in sends] for _ in range(size())]
    group = dist.group.WORLD
    group.allgather_coalesced(lists, sends).wait()
    for i, send in enumerate(sends):
        parts = [torch.empty_like(send) for _ in range(size())]
        dist.all_gather(parts, send)
        assert all(torch.equal(part, lists[rank][i]) for rank, part in enumerate(parts))


def test_asynchronous_works_end_in_order() -> None:
    tensors = [torch.full((1 << (4 * (i % 4)),), float(i)) for i in range(12)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]
    ended: list[int] = []
    for i, work in enumerate(works):
        work.get_future().then(lambda done, i=i: ended.append(i))
    blocking = torch.ones(3)
    dist.all_reduce(blocking)  # after all before it
    assert all(work.is_completed() for work in works)
    assert ended == list(range(12))
    assert works[3].wait()
    assert works[3].result()[0] is tensors[3]
    assert all(torch.equal(x, torch.full_like(x, float(i * size()))) for i, x in enumerate(tensors))


def test_asynchronous_calls_do_not_wait_for_other_ranks() -> None:
    """Each rank sends to the next between its call and the wait, also in a group that is used for the first time."""
    group = dist.new_group(list(range(size())))
    rank, value = dist.get_rank(), torch.ones(9)
    token = torch.zeros(1)
    if rank == 0:
        work = dist.all_reduce(value, group=group, async_op=True)
        dist.send(token, 1)
    else:
        dist.recv(token, rank - 1)
        if rank + 1 < size():
            dist.send(token, rank + 1)
        work = dist.all_reduce(value, group=group, async_op=True)
    work.wait()
    assert torch.equal(value, torch.full((9,), float(size())))
    dist.destroy_process_group(group)


def test_errors_reach_whoever_waits_and_leave_the_group_usable() -> None:
    out = torch.empty(size() * 4 + (dist.get_rank() == 0))  # fits on no rank but all others
    with pytest.raises(Exception, match="must"):
        dist.all_gather_into_tensor(out, torch.ones(4))
    work = dist.all_gather_into_tensor(out, torch.ones(4), async_op=True)
    with pytest.raises(RuntimeError, match="recv"):
        work.get_future().wait()
    assert isinstance(work.exception(), Exception)
    dist.all_reduce(torch.ones(1))


def test_delegated_operations() -> None:
    rank, before = dist.get_rank(), calls()
    dist.barrier()
    x = torch.full((3,), float(rank))
    dist.broadcast(x, 1)
    assert torch.equal(x, torch.ones(3))
    dist.reduce(x, 0)
    parts = [torch.empty(2) for _ in range(size())] if rank == 0 else None
    dist.gather(torch.full((2,), float(rank)), parts)
    assert parts is None or [part[0].item() for part in parts] == list(range(size()))
    got = torch.empty(2)
    dist.scatter(got, [torch.full((2,), float(i)) for i in range(size())] if rank == 0 else None)
    assert got[0] == rank
    dist.all_to_all_single(out := torch.empty(size()), torch.full((size(),), float(rank)))
    assert out.tolist() == list(range(size()))
    bits = torch.tensor([1 << rank])
    dist.all_reduce(bits, dist.ReduceOp.BOR)
    assert bits.item() == (1 << size()) - 1
    if rank == 0:
        dist.send(torch.ones(2), 1)
    elif rank == 1:
        assert dist.recv(got) == 0  # from anyone
    sparse = torch.eye(2).to_sparse()
    dist.all_reduce(sparse)
    assert torch.equal(sparse.to_dense(), size() * torch.eye(2))
    assert calls() == before
    objects: list[object] = [None] * size()
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": i} for i in range(size())]


def test_functional_collectives_are_ours() -> None:
    group, before = dist.group.WORLD, calls()
    whole = functional.all_gather_tensor(mine(2, 3), 0, group)
    part = functional.reduce_scatter_tensor(whole, "sum", 0, group)
    total = functional.all_reduce(mine(4), "avg", group)
    pair = functional.all_reduce_coalesced([mine(4), mine(2)], "sum", group)
    assert torch.equal(part + 0, size() * mine(2, 3))
    torch.testing.assert_close(total * size(), pair[0] + 0)
    assert torch.equal(pair[1] + 0, functional.all_reduce(mine(2), "sum", group) + 0)
    gathered = torch.ops._c10d_functional.all_gather_into_tensor_coalesced([mine(1), mine(2)], size(), group.group_name)
    assert [torch.ops._c10d_functional.wait_tensor(x).shape[0] for x in gathered] == [size(), 2 * size()]
    assert calls() == before + 6


def test_sub_groups() -> None:
    halves = [list(range(size()))[::2], list(range(size()))[1::2]]
    groups = [dist.new_group(ranks) for ranks in halves]
    for ranks, group in zip(halves, groups, strict=True):
        if dist.get_rank() in ranks:
            assert isinstance(group, TaspGroup)
            x = torch.tensor([float(dist.get_rank())])
            dist.all_reduce(x, group=group)
            assert x.item() == sum(ranks)
            out = torch.empty(len(ranks))
            dist.all_gather_into_tensor(out, torch.tensor([float(dist.get_rank())]), group=group)
            assert out.tolist() == ranks
            dist.destroy_process_group(group)
