"""Elements on this rank's GPU, times by CUDA events, calls repeated as CUDA graphs: `--device cuda`."""

from __future__ import annotations

import os
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

import perf_data
from perf_collective import Unsupported
from perf_data import Dtype, NDArray, Source
from perf_memory import Elapsed

if TYPE_CHECKING:
    from mpi4py import MPI

_COPY_BYTES, _COPIES = 256 << 20, 9


class DeviceMemory:
    """CuPy's, or torch's over the same memory. Everything is given to a stream of its own."""

    queues = True

    def __init__(self, cupy: Any, number: int, arrays: str) -> None:
        self._cupy, self.number, self._arrays = cupy, number, arrays
        cupy.cuda.Device(number).use()
        self.stream = cupy.cuda.Stream(non_blocking=True).use()
        self.name = str(cupy.cuda.runtime.getDeviceProperties(number)["name"], "ascii")
        if arrays == "torch":
            import torch

            torch.cuda.set_device(number)
            torch.cuda.set_stream(torch.cuda.ExternalStream(self.stream.ptr, device=number))

    def zeros(self, count: int, bits: np.dtype[Any]) -> NDArray:
        made: NDArray = self._cupy.zeros(count, bits)
        return made

    def face(self, dtype: Dtype, memory: NDArray) -> Any:
        if self._arrays == "torch":
            import torch

            return torch.as_tensor(memory.view(np.uint8), device=f"cuda:{self.number}").view(getattr(torch, dtype.name))
        return memory.view(dtype.name)

    def fill(self, memory: NDArray, source: Source) -> None:
        self._write(memory, source, perf_data.fill)

    def spoil(self, memory: NDArray, source: Source) -> None:
        self._write(memory, source, perf_data.spoil)

    def _write(self, memory: Any, source: Source, write: Callable[[NDArray, Source], None]) -> None:
        host = np.empty(memory.shape, memory.dtype)
        write(host, source)
        memory.set(host)
        self.settle()

    def count_wrong(self, memory: Any, source: Source) -> int:
        return perf_data.count_wrong(memory.get(), source)

    def settle(self) -> None:
        self.stream.synchronize()

    def repeated(self, run: Callable[[], None], times: int) -> Callable[[], None]:
        self.stream.begin_capture()
        try:
            run()
        finally:
            graph = self.stream.end_capture()

        def replay() -> None:
            for _ in range(times):
                graph.launch(self.stream)

        return replay

    def timed(self, run: Callable[[], None]) -> Elapsed:
        cuda = self._cupy.cuda
        first, last = cuda.Event(), cuda.Event()
        self.settle()
        first.record(self.stream)
        begun = perf_counter()
        run()
        host = perf_counter() - begun
        last.record(self.stream)
        last.synchronize()
        return Elapsed(cuda.get_elapsed_time(first, last) / 1e3, host)

    def copy_GBps(self) -> float:
        """Bytes copied within the GPU in a second, in 1e9; each is read once and written once."""
        runtime = self._cupy.cuda.runtime
        source, target = (self._cupy.zeros(_COPY_BYTES, np.uint8) for _ in range(2))

        def copy() -> None:
            kind = runtime.memcpyDeviceToDevice
            runtime.memcpyAsync(target.data.ptr, source.data.ptr, _COPY_BYTES, kind, self.stream.ptr)

        return _COPY_BYTES / median([self.timed(copy).total for _ in range(_COPIES)][1:]) / 1e9


def device_memory(world: MPI.Intracomm, arrays: str, gpu_transport: str | None) -> DeviceMemory:
    """This rank's. Ranks take the GPUs of their host in turn. Unsupported, on all ranks, if one has none.

    Where NCCL is asked for by name, it is made to take ranks that share a GPU: their data then goes through sockets.
    """
    fault, made, local = "", None, _local_rank(world)
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
        made = DeviceMemory(cupy, local % count, arrays)
    except Exception as error:  # CuPy's, torch's, the driver's
        fault = f"{type(error).__name__}: {error}"
    told = [(rank, text) for rank, text in enumerate(world.allgather(fault)) if text]
    if told or made is None:
        raise Unsupported(f"--device cuda: rank {told[0][0]} cannot use a GPU: {told[0][1]}")
    if max(world.allgather(ranks_on_gpu(world, made))) > 1 and gpu_transport == "nccl":
        os.environ.setdefault("NCCL_HOSTID", f"rank {world.rank}")
    return made


def _local_rank(world: MPI.Intracomm) -> int:
    """This rank's number on its host."""
    hosts = world.allgather(os.uname().nodename)
    return hosts[: world.rank].count(hosts[world.rank])


def ranks_on_gpu(world: MPI.Intracomm, memory: DeviceMemory) -> int:
    """How many ranks share this rank's GPU, itself among them."""
    here = os.uname().nodename, memory.number
    return world.allgather(here).count(here)
