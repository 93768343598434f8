"""JAX's arrays on GPUs, on doubles of JAX, CuPy and NCCL: any dtype there and back."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from cupy_double import Device, current, drain, install
from loopback_ranks import attempt, on_ranks
from nccl_double import Fabric, check_memory, check_records
from tasp_coll import ArgumentTypeError, Communicator

N = 3


class JaxDevice:
    platform = "gpu"

    def __init__(self, number: int) -> None:
        self.local_hardware_id = number


class Array:
    """jax.Array, as far as it is looked at."""

    def __init__(self, values: Any, number: int) -> None:
        self.values, self._device, self.waited = values, JaxDevice(number), False
        self.dtype, self.shape, self.nbytes, self.ndim = values.dtype, values.shape, values.nbytes, values.ndim

    def devices(self) -> set[JaxDevice]:
        return {self._device}

    def is_deleted(self) -> bool:
        return False

    def block_until_ready(self) -> None:
        self.waited = True

    def unsafe_buffer_pointer(self) -> int:
        assert self.waited
        return int(self.values.ctypes.data)


def from_dlpack(array: Any) -> Array:
    """JAX comes after CuPy's current stream."""
    with Device(array.number):
        drain(array.number, current().ptr)
    return Array(np.array(array), array.number)


def bitcast(array: Array, dtype: Any) -> Array:
    assert array.dtype == np.uint8
    plain = array.values.view(dtype)
    return Array(plain[..., 0] if np.dtype(dtype).itemsize > 1 else plain, array._device.local_hardware_id)


@pytest.fixture
def fabric(monkeypatch: pytest.MonkeyPatch) -> Fabric:
    jax: Any = ModuleType("jax")
    jax.Array, jax.core, jax.dlpack, jax.lax = Array, ModuleType("core"), ModuleType("dlpack"), ModuleType("lax")
    jax.core.Tracer = type("Tracer", (), {})
    jax.dlpack.from_dlpack, jax.lax.bitcast_convert_type = from_dlpack, bitcast
    jax.enable_x64 = lambda on: nullcontext()
    monkeypatch.setitem(sys.modules, "jax", jax)
    return install(monkeypatch)


def shard(rank: int, dtype: Any) -> Any:
    return (np.arange(60).reshape(20, 3) % 7 + rank).astype(dtype)


@pytest.mark.parametrize(
    "dtype", [np.float32, np.int64, np.bool_, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=str
)
def test_there_and_back(fabric: Fabric, dtype: Any) -> None:
    def body(comm: Communicator) -> None:
        send = Array(shard(comm.rank, dtype), comm.rank)
        for asynchronous in (False, True):
            out = comm.decomposed_allgather(send, algorithm="rings", async_op=asynchronous)
            out = out.wait() if asynchronous else out
            assert isinstance(out, Array)
            assert out.dtype == dtype
            assert np.array_equal(out.values, np.concatenate([shard(rank, dtype) for rank in range(N)]))
        for arrival in comm.allgather_steps(send):
            with Device(comm.rank):
                drain(comm.rank, current().ptr)
            for chunk in arrival.chunks:
                assert chunk.data.dtype == dtype
                assert np.array_equal(chunk.data.values, shard(chunk.source, dtype)[chunk.start : chunk.stop])

    on_ranks(N, body)
    check_records(fabric.records)
    check_memory(fabric.entries)


def test_sums_and_what_cannot_be_written(fabric: Fabric) -> None:
    def body(comm: Communicator) -> list[BaseException | None]:
        send = Array(shard(comm.rank, ml_dtypes.bfloat16), comm.rank)
        total = comm.decomposed_allreduce(send)
        assert total.dtype == ml_dtypes.bfloat16
        assert np.array_equal(total.values, sum(shard(rank, np.float32) for rank in range(N)))
        return [
            attempt(lambda: comm.decomposed_allreduce(send, send)),
            attempt(lambda: comm.reduce_scatter_steps(send)),
        ]

    for errors in on_ranks(N, body):
        for error in errors:
            assert isinstance(error, ArgumentTypeError)
            assert "recv must be writable" in str(error)
