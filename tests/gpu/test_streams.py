"""Order on streams: long kernels before and after a call, calls on several streams, and the caller's own graphs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import tasp_coll
from gpu.test_collectives import everything, shard
from gpu_arrays import Array, Place

ROWS = 70_001
_SLEEP = """extern "C" __global__ void wait_for(long long cycles) {
    long long begun = clock64();
    while (clock64() - begun < cycles) {}
}"""


@pytest.fixture
def cupy(place: Place) -> Any:
    if not place.on_gpu:
        pytest.skip("host memory has no streams")
    return place.numbers


def long_kernel(cupy: Any, cycles: int = 100_000_000) -> None:
    """Keeps the current stream busy for about 50 ms."""
    cupy.RawKernel(_SLEEP, "wait_for")((1,), (1,), (np.int64(cycles),))


def gathered(comm: tasp_coll.Communicator, call: int = 0) -> Array:
    return everything(comm, ROWS, call=call).reshape(-1, 2)


@pytest.mark.parametrize("algorithm", ["rings", "direct", "auto"])
def test_between_long_kernels(comm: tasp_coll.Communicator, cupy: Any, algorithm: str) -> None:
    """What is written late is sent, and what is overwritten late was sent before; the host waits for nothing."""
    sources = [cupy.array(shard(comm.rank, ROWS, call=call)) for call in range(3)]
    send, out = cupy.zeros((ROWS, 2), np.float32), cupy.zeros((comm.size * ROWS, 2), np.float32)
    comm.decomposed_allgather(send, out, algorithm=algorithm)
    found = []
    with cupy.cuda.Stream(non_blocking=True) as stream:
        for source in sources:
            long_kernel(cupy)
            send[...] = source
            comm.decomposed_allgather(send, out, algorithm=algorithm)
            long_kernel(cupy)
            found.append(out.copy())
            out.fill(-1)
            send.fill(-2)
        assert not stream.done
        stream.synchronize()
    for call, each in enumerate(found):
        assert np.array_equal(each.get(), gathered(comm, call))


def test_one_stream_after_another(comm: tasp_coll.Communicator, cupy: Any) -> None:
    """Calls keep their order between ranks, whatever stream each is on."""
    send = cupy.array(shard(comm.rank, ROWS))
    found = []
    for number in range(6):
        with cupy.cuda.Stream(non_blocking=True) as stream:
            if (number + comm.rank) % 2:
                long_kernel(cupy, 20_000_000)
            found.append((stream, comm.decomposed_allgather(send, algorithm="rings")))
    for stream, out in found:
        stream.synchronize()
        assert np.array_equal(out.get(), gathered(comm))


def test_beside_the_callers_stream(comm: tasp_coll.Communicator, cupy: Any) -> None:
    with cupy.cuda.Stream(non_blocking=True) as stream:
        long_kernel(cupy)
        send = cupy.array(shard(comm.rank, ROWS))
        work = comm.decomposed_allgather(send, algorithm="rings", async_op=True)
        long_kernel(cupy)
        out = work.wait().copy()
        stream.synchronize()
    assert np.array_equal(out.get(), gathered(comm))


def test_captured_by_the_caller(comm: tasp_coll.Communicator, cupy: Any) -> None:
    send = cupy.array(shard(comm.rank, ROWS))
    out = cupy.zeros((comm.size * ROWS, 2), np.float32)
    comm.decomposed_allgather(send, out, algorithm="rings")
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.synchronize()
        stream.begin_capture()
        comm.decomposed_allgather(send, out, algorithm="rings")
        graph = stream.end_capture()
        for call in range(3):
            send[...] = cupy.array(shard(comm.rank, ROWS, call=call))
            out.fill(-1)
            graph.launch(stream)
            stream.synchronize()
            assert np.array_equal(out.get(), gathered(comm, call))
