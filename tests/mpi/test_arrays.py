"""Arrays of every kind go through MPI, and what comes back is of the kind that was handed in."""

from __future__ import annotations

import array
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import tasp_coll

ALGORITHMS = ("auto", "rings", "direct", "native")


@pytest.fixture(scope="module")
def comm() -> Iterator[tasp_coll.Communicator]:
    with tasp_coll.Communicator(timeout=40) as made:
        yield made


@pytest.fixture
def torch() -> Any:
    """torch, which takes seconds to import, more where ranks share cores: at up to 3 ranks."""
    if MPI.COMM_WORLD.size > 3:
        pytest.skip("torch is slow to import on many ranks")
    return pytest.importorskip("torch")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", ["bfloat16", "float16", "bool", "complex64", "float8_e4m3fn", "int64"])
def test_torch(comm: tasp_coll.Communicator, torch: Any, name: str, algorithm: str) -> None:
    for rows in (10, 20_000):
        every = [torch.arange(rows * 2).reshape(rows, 2).add(rank).remainder(2 + rank) for rank in range(comm.size)]
        every = [one.to(getattr(torch, name)) for one in every]
        got = comm.decomposed_allgather(every[comm.rank], algorithm=algorithm)
        assert isinstance(got, torch.Tensor)
        assert got.dtype == every[0].dtype
        assert torch.equal(got.view(torch.uint8), torch.cat(every).view(torch.uint8))
        strided = comm.decomposed_allgather(every[comm.rank].T, algorithm=algorithm)
        assert torch.equal(strided.view(torch.uint8), torch.cat([one.T for one in every]).view(torch.uint8))


@pytest.mark.parametrize("algorithm", ["auto", "rings", "direct"])
def test_torch_bfloat16_is_summed_in_float32(comm: tasp_coll.Communicator, torch: Any, algorithm: str) -> None:
    """256 + 1 is 256 in bfloat16: adding ones to it one by one would lose them all."""
    for rows in (8, 30_000):
        send = torch.full((rows,), 256 if comm.rank == 0 else 1, dtype=torch.bfloat16)
        expected = torch.tensor(256.0 + comm.size - 1).bfloat16()
        got = comm.decomposed_allreduce(send, algorithm=algorithm)
        assert got.dtype == torch.bfloat16
        assert (got == expected).all()
        sums = torch.zeros(rows, dtype=torch.bfloat16)
        for request in comm.reduce_scatter_steps(sums, algorithm=algorithm):
            for chunk in request.chunks:
                assert chunk.data.dtype == torch.bfloat16
                chunk.data.copy_(send[chunk.start : chunk.stop])
        assert (sums == expected).all()


def test_torch_with_gradients(comm: tasp_coll.Communicator, torch: Any) -> None:
    """Values travel, gradients do not: results are leaves, and `send` keeps its own."""
    for rows in (5, 20_000):
        weight = torch.full((rows,), comm.rank + 1.0, requires_grad=True)
        got = comm.decomposed_allgather(weight)
        assert not got.requires_grad
        assert got.tolist()[::rows] == [rank + 1.0 for rank in range(comm.size)]
        into = torch.empty(rows * comm.size)
        assert comm.decomposed_allgather(weight.detach(), into) is into
        assert torch.equal(into, got)
        assert weight.requires_grad
        for arrival in comm.allgather_steps(weight):
            for chunk in arrival.chunks:
                assert (chunk.data == chunk.source + 1).all()


def test_jax(comm: tasp_coll.Communicator) -> None:
    if comm.size != 2:
        pytest.skip("JAX takes seconds to import: at 2 ranks only")
    jax = pytest.importorskip("jax")
    jnp = jax.numpy
    for dtype in (jnp.bfloat16, jnp.float32, jnp.bool_, jnp.complex64):
        for rows in (6, 20_000):
            send = (jnp.arange(rows * 2).reshape(rows, 2) + comm.rank).astype(dtype)
            got = comm.decomposed_allgather(send)
            assert isinstance(got, jax.Array)
            assert got.dtype == dtype
            expected = jnp.concatenate(
                [(jnp.arange(rows * 2).reshape(rows, 2) + rank).astype(dtype) for rank in range(2)]
            )
            assert (got == expected).all()
            assert isinstance(got.sum(), jax.Array)
    total = comm.decomposed_allreduce(jnp.full(30_000, comm.rank + 1.0), async_op=True).wait()
    assert isinstance(total, jax.Array)
    assert (total == 3).all()
    with pytest.raises(tasp_coll.ArgumentTypeError, match="recv"):
        comm.decomposed_allgather(jnp.zeros(3), jnp.zeros(6))


class Exporter:
    """Something that NumPy understands and that is not NumPy's."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._values.__array_interface__


def test_memory_of_the_standard_library(comm: tasp_coll.Communicator) -> None:
    ranks = range(comm.size)
    for count in (7, 30_000):
        got = comm.decomposed_allgather(bytearray([comm.rank]) * count)
        assert type(got) is bytearray
        assert got == b"".join(bytes([rank]) * count for rank in ranks)
        assert comm.decomposed_allgather(bytes([comm.rank]) * count) == got

        floats = comm.decomposed_allreduce(array.array("d", [comm.rank, 1.5] * count))
        assert type(floats) is array.array
        assert floats.typecode == "d"
        assert floats == array.array("d", [sum(ranks), 1.5 * comm.size] * count)

        packed = memoryview(struct.pack(f"{count}i", *[comm.rank] * count)).cast("i")
        ints = comm.decomposed_allgather(packed)
        assert isinstance(ints, np.ndarray)
        assert np.array_equal(ints, np.repeat(np.arange(comm.size, dtype=np.int32), count))

        exported = comm.decomposed_allgather(Exporter(np.full((count, 2), comm.rank, np.int16)))
        assert np.array_equal(exported[::count, 0], np.arange(comm.size))

        into = bytearray(count * comm.size)
        assert comm.decomposed_allgather(np.full(count, comm.rank, np.uint8), into) is into
        assert into == got


def test_results_may_be_of_another_kind_than_send(comm: tasp_coll.Communicator, torch: Any) -> None:
    for rows in (4, 40_000):
        into = torch.empty(rows * comm.size, dtype=torch.float64)
        assert comm.decomposed_allgather(np.full(rows, comm.rank + 0.5), into) is into
        assert into[::rows].tolist() == [rank + 0.5 for rank in range(comm.size)]


def test_ranks_may_hold_arrays_of_different_kinds(comm: tasp_coll.Communicator, torch: Any) -> None:
    for rows in (4, 40_000):
        values = np.full(rows, comm.rank + 0.5, np.float32)
        got = comm.decomposed_allgather(torch.from_numpy(values) if comm.rank % 2 else values)
        assert isinstance(got, torch.Tensor if comm.rank % 2 else np.ndarray)
        assert got[::rows].tolist() == [rank + 0.5 for rank in range(comm.size)]


def test_read_only_memory_can_be_sent_but_not_received_into(comm: tasp_coll.Communicator) -> None:
    send = np.arange(5.0)
    send.flags.writeable = False
    assert comm.decomposed_allreduce(send)[4] == 4 * comm.size
    with pytest.raises(tasp_coll.ArgumentTypeError, match="recv must be writable"):
        comm.decomposed_allreduce(send, send)
    for arrival in comm.allgather_steps(send):
        assert not any(chunk.data.flags.writeable for chunk in arrival.chunks)
