"""All collectives of arrays on GPUs by all algorithms against NumPy, blocking, asynchronous and step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tasp_coll
from gpu_arrays import Array, Interface, Kind, Place

ALGORITHMS = ("auto", "rings", "ring", "direct")
ROWS = {"small": 25, "large": 600_001}  # of 8 bytes; large: several rounds of CUDA IPC's slots at 8 ranks


def shard(rank: int, rows: int, dtype: Any = np.float32, call: int = 0) -> Array:
    """(rows, 2), small enough that sums over ranks are exact in every dtype."""
    return ((np.arange(rows * 2).reshape(rows, 2) * 7 + rank * 5 + call) % 11 - (rank % 2)).astype(dtype)


def everything(comm: tasp_coll.Communicator, rows: int, dtype: Any = np.float32, call: int = 0) -> Array:
    """(n, rows, 2): what all ranks have."""
    return np.stack([shard(rank, rows, dtype, call) for rank in range(comm.size)])


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allgather(comm: tasp_coll.Communicator, kind: Kind, algorithm: str, rows: int) -> None:
    send, expected = kind.of(shard(comm.rank, rows)), everything(comm, rows).reshape(-1, 2)
    assert np.array_equal(kind.host(comm.decomposed_allgather(send, algorithm=algorithm)), expected)
    given = kind.of(np.full_like(expected, -99))
    place = slice(comm.rank * rows, (comm.rank + 1) * rows)
    for call in range(5):  # the same arrays again with other values: known calls are repeated as CUDA graphs
        kind.set(send, shard(comm.rank, rows, call=call))
        assert comm.decomposed_allgather(send, given, algorithm=algorithm) is given
        assert np.array_equal(kind.host(given), everything(comm, rows, call=call).reshape(-1, 2))
    if not isinstance(given, Interface):
        assert comm.decomposed_allgather(given[place], given, algorithm=algorithm) is given
        assert np.array_equal(kind.host(given), everything(comm, rows, call=4).reshape(-1, 2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_allgatherv(comm: tasp_coll.Communicator, kind: Kind, algorithm: str) -> None:
    counts = [3_000 * (2 * rank % 3) + rank for rank in range(comm.size)]
    out = comm.decomposed_allgatherv(kind.of(shard(comm.rank, counts[comm.rank])), algorithm=algorithm)
    assert np.array_equal(kind.host(out), np.concatenate([shard(rank, rows) for rank, rows in enumerate(counts)]))


@pytest.mark.parametrize("dtype", ["float32", "float16", "int64"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_reductions(comm: tasp_coll.Communicator, kind: Kind, algorithm: str, dtype: str) -> None:
    rows = 4_000 * comm.size
    total = everything(comm, rows, dtype).sum(0, dtype=dtype)
    send = kind.of(shard(comm.rank, rows, dtype))
    mine = slice(comm.rank * 4_000, (comm.rank + 1) * 4_000)
    for _ in range(3):
        assert np.array_equal(kind.host(comm.decomposed_reduce_scatter(send, algorithm=algorithm)), total[mine])
        assert np.array_equal(kind.host(comm.decomposed_allreduce(send, algorithm=algorithm)), total)
    largest = everything(comm, rows, dtype).max(0)
    assert np.array_equal(kind.host(comm.decomposed_allreduce(send, send, op="max", algorithm=algorithm)), largest)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "bool", "complex64", "uint8"])
def test_dtypes_of_torch(comm: tasp_coll.Communicator, place: Place, name: str) -> None:
    import torch

    dtype, kind = getattr(torch, name), Kind("torch", place)
    bits = [(np.arange(40_003 * 8) * 31 + rank * 17) % 2 for rank in range(comm.size)]
    shards = [torch.from_numpy(each.astype(np.uint8)).view(dtype) for each in bits]
    out = comm.decomposed_allgather(shards[comm.rank].to(kind.place.torch_device), algorithm="rings")
    assert out.dtype == dtype
    assert torch.equal(out.cpu().view(torch.uint8), torch.cat(shards).view(torch.uint8))
    if name == "bfloat16":
        parts = [torch.from_numpy(shard(rank, 1_000)).to(dtype) for rank in range(comm.size)]
        total = comm.decomposed_allreduce(parts[comm.rank].to(kind.place.torch_device))
        assert torch.equal(total.cpu(), sum(part.float() for part in parts).to(dtype))  # type: ignore[union-attr]


def test_asynchronous(comm: tasp_coll.Communicator, kind: Kind) -> None:
    sends = [kind.of(shard(comm.rank, 50_000, call=call)) for call in range(4)]
    works = [comm.decomposed_allgather(send, algorithm="rings", async_op=True) for send in sends]
    total = comm.decomposed_allreduce(kind.of(shard(comm.rank, 999)))
    for call, work in enumerate(works):
        assert np.array_equal(kind.host(work.wait()), everything(comm, 50_000, call=call).reshape(-1, 2))
    assert np.array_equal(kind.host(total), everything(comm, 999).sum(0))


def test_host_and_gpu_in_one_program(comm: tasp_coll.Communicator, kind: Kind) -> None:
    for rows in (10, 30_000):
        there = comm.decomposed_allgather(kind.of(shard(comm.rank, rows)))
        here = comm.decomposed_allgather(shard(comm.rank, rows))
        assert np.array_equal(here, kind.host(there))


@pytest.mark.parametrize("reverse", [False, True])
def test_steps(comm: tasp_coll.Communicator, place: Place, reverse: bool) -> None:
    """An allgather step by step, and its mirror image, which sums what each rank makes of what came."""
    import torch

    kind = Kind("torch", place)
    rows = 5_003
    send = kind.of(shard(comm.rank, rows))
    found = torch.zeros((comm.size, rows, 2), device=place.torch_device)
    for arrival in comm.allgather_steps(send, algorithm="rings", reverse=reverse):
        for chunk in arrival.chunks:
            found[chunk.source, chunk.start : chunk.stop] = chunk.data
    assert np.array_equal(kind.host(found), everything(comm, rows))
    home = torch.zeros((rows, 2), device=place.torch_device)
    for request in comm.reduce_scatter_steps(home, algorithm="rings"):
        for chunk in request.chunks:
            chunk.data[...] = found[chunk.source, chunk.start : chunk.stop] + comm.rank
    expected = shard(comm.rank, rows) * comm.size + sum(range(comm.size))
    assert np.array_equal(kind.host(home), expected.astype(np.float32))


def test_ranks_that_disagree(comm: tasp_coll.Communicator, kind: Kind) -> None:
    rows = 101 if comm.rank else 100
    if comm.size > 1:
        with pytest.raises(tasp_coll.MismatchError):
            comm.decomposed_allgather(kind.of(shard(comm.rank, rows)))
    test_allgather(comm, kind, "rings", 100)
