"""A backend of torch.distributed: unchanged DDP, FSDP2 and DTensor programs over tasp-coll's collectives.

    import tasp_coll.torch_backend                       # registers "tasp"
    torch.distributed.init_process_group("cpu:tasp,cuda:tasp")

AllGather, ReduceScatter and AllReduce of tensors in host memory are ours (single, list and coalesced forms, blocking
and not); all else goes to Gloo, and everything on a GPU to NCCL. So do dtypes and operations that ours do not reduce.
The topology is the one that TASP_COLL_TOPOLOGY names where a group has its number of ranks, else a full mesh.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tasp_coll.communicator import Communicator
from tasp_coll.errors import TopologyError
from tasp_coll.reduction import DTYPES
from tasp_coll.topology import Topology
from tasp_coll.transport.torch import TorchTransport
from tasp_coll.work import Work

NAME = "tasp"
_OPS = {
    "sum": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.AVG,
    "prod": dist.ReduceOp.PRODUCT,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
}
Finish = Callable[[], None]


class TaspGroup(dist.ProcessGroup):
    """One group of torch.distributed. Its communicator is made at the first collective that is ours."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self._ours, self._timeout = dist.PrefixStore(NAME, store), timeout
        # What is not overridden below goes to these by itself; what turns out not to be ours, by way of the second.
        self._others = dist.ProcessGroup(store, rank, size)
        for device, kind, backend in _backends(dist.PrefixStore("others", store), rank, size, timeout):
            for group in (self, self._others):
                group._register_backend(torch.device(device), kind, backend)
        for group in (self, self._others):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        self._comm: Communicator | None = None
        self._runner = _Runner()

    def getBackendName(self) -> str:
        return NAME

    # --- ours

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllreduceOptions()
        op = _name(opts.reduceOp)
        if not _all_ours(tensors, op):
            return self._others.allreduce(tensors, opts)
        return self._run(tensors, *(self._reduced(tensor, op) for tensor in tensors))

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.AllreduceCoalescedOptions()
        op = _name(opts.reduceOp)
        if not _all_ours(tensors, op):
            return self._others.allreduce_coalesced(tensors, opts)
        return self._run(tensors, *(self._reduced(tensor, op) for tensor in tensors))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self.all_gather_single_coalesced([output], [input], opts)

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        if not _all_ours(inputs):
            return self._others.allgather_into_tensor_coalesced(outputs, inputs, opts or dist.AllgatherOptions())
        pairs = zip(outputs, inputs, strict=True)
        return self._run(outputs, *(self._gathered(output, given) for output, given in pairs))

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        if not _all_ours(inputs):
            return self._others.allgather(outputs, inputs, opts or dist.AllgatherOptions())
        pairs = zip(outputs, inputs, strict=True)
        return self._run(outputs, *(self._gathered_apart(parts, given) for parts, given in pairs))

    def allgather_coalesced(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        """Here outputs are by rank, then by input."""
        if not _all_ours(inputs):
            return self._others.allgather_coalesced(outputs, inputs, opts or dist.AllgatherOptions())
        pairs = zip(zip(*outputs, strict=True), inputs, strict=True)
        return self._run(outputs, *(self._gathered_apart(parts, given) for parts, given in pairs))

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self.reduce_scatter_single_coalesced([output], [input], opts)

    def reduce_scatter_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        op = _name(opts.reduceOp)
        if not _all_ours(inputs, op):
            return self._others.reduce_scatter_tensor_coalesced(outputs, inputs, opts)
        pairs = zip(outputs, inputs, strict=True)
        return self._run(outputs, *(self._scattered(output, _flat(given), op) for output, given in pairs))

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        opts = opts or dist.ReduceScatterOptions()
        op = _name(opts.reduceOp)
        if not all(_all_ours(parts, op) for parts in inputs):
            return self._others.reduce_scatter(outputs, inputs, opts)
        started = []
        for output, parts in zip(outputs, inputs, strict=True):
            counts = [part.numel() for part in parts]
            whole = torch.cat([_flat(part) for part in parts])
            started.append(self._scattered(output, whole, op, counts))
        return self._run(outputs, *started)

    # The names before torch 2.13.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced

    def shutdown(self) -> None:
        """End the communicator; what is under way ends first."""
        self._runner.close()
        if self._comm is not None:
            self._comm.close()

    def abort(self) -> None:
        """As `shutdown`: our waits end by their timeout."""
        self.shutdown()

    # --- how

    def _run(self, value: Any, *started: tuple[Work, Finish | None]) -> Any:
        """The work that is complete when all that was started is, with `value` as its result."""
        return TaspWork(self._runner.expect(value, started))

    def _reduced(self, tensor: Tensor, op: str) -> tuple[Work, Finish | None]:
        memory = _flat(tensor)
        work = self._communicator().decomposed_allreduce(memory, memory, op=op, async_op=True)
        return work, _back(tensor, memory)

    def _gathered(self, output: Tensor, given: Tensor) -> tuple[Work, Finish | None]:
        memory = _flat(output)
        work = self._communicator().decomposed_allgather(_flat(given), memory, async_op=True)
        return work, _back(output, memory)

    def _gathered_apart(self, parts: Sequence[Tensor], given: Tensor) -> tuple[Work, Finish | None]:
        bounds = [0]
        for part in parts:
            bounds.append(bounds[-1] + part.numel())
        memory = given.new_empty(bounds[-1])
        work = self._communicator().decomposed_allgatherv(_flat(given), memory, async_op=True)

        def finish() -> None:
            for part, (start, stop) in zip(parts, pairwise(bounds), strict=True):
                part.detach().copy_(memory[start:stop].view(part.shape))

        return work, finish

    def _scattered(
        self, output: Tensor, whole: Tensor, op: str, counts: Sequence[int] | None = None
    ) -> tuple[Work, Finish | None]:
        memory = _flat(output)
        comm = self._communicator()
        work = comm.decomposed_reduce_scatter(whole, memory, op=op, counts=counts, async_op=True)
        return work, _back(output, memory)

    def _communicator(self) -> Communicator:
        if self._comm is None:
            rank, size, seconds = self.rank(), self.size(), self._timeout.total_seconds()
            start = _Start(lambda: TorchTransport(self._ours, rank, size, seconds))
            self._comm = Communicator(start, topology=_topology(size), timeout=seconds)
        return self._comm


class TaspWork(dist.Work):
    """One of ours under way. (torch's own wrapper of a future does not raise what went wrong.)"""

    def __init__(self, future: torch.futures.Future[Any]) -> None:
        super().__init__()
        self._future = future

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait for the result; raises what went wrong. Ours has the group's timeout, whatever is asked for here."""
        self._future.wait()
        return True

    def is_completed(self) -> bool:
        """Whether it has ended, in whatever way."""
        return self._future.done()

    def get_future(self) -> torch.futures.Future[Any]:
        """Of the tensors that were written."""
        return self._future


class _Start:
    """What `Communicator` makes its transport of."""

    def __init__(self, make: Callable[[], TorchTransport]) -> None:
        self.duplicate = make


class _Runner:
    """Completes futures, in the order of the calls, which is the order in which they end."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[tuple[torch.futures.Future[Any], Any, Sequence[tuple[Work, Finish | None]]] | None]
        self._queue = SimpleQueue()
        self._thread = threading.Thread(target=self._complete, name="tasp_coll torch works", daemon=True)
        self._thread.start()

    def expect(self, value: Any, started: Sequence[tuple[Work, Finish | None]]) -> torch.futures.Future[Any]:
        """A future that gets `value` when all is done and finished."""
        future: torch.futures.Future[Any] = torch.futures.Future()
        # C++ takes an exception that Python sets for a value; one that comes out of `then` it raises.
        checked: torch.futures.Future[Any] = future.then(lambda done: done.wait())
        self._queue.put((future, value, started))
        return checked

    def close(self) -> None:
        """When all that is expected is done."""
        self._queue.put(None)
        self._thread.join()

    def _complete(self) -> None:
        while (expected := self._queue.get()) is not None:
            future, value, started = expected
            try:
                for work, finish in started:
                    work.wait()
                    if finish is not None:
                        finish()
                future.set_result(value)
            except Exception as error:
                future.set_exception(error)
            del expected, future, value, started


def _backends(store: dist.Store, rank: int, size: int, timeout: timedelta) -> Iterator[tuple[str, Any, Any]]:
    """Gloo in host memory, NCCL on GPUs where torch has it: (device, kind, backend) each."""
    kinds = dist.ProcessGroup.BackendType
    yield "cpu", kinds.GLOO, dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, size, timeout)
    if torch.cuda.is_available() and dist.is_nccl_available():
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        yield "cuda", kinds.NCCL, dist.ProcessGroupNCCL(dist.PrefixStore("nccl", store), rank, size, options)


def _topology(size: int) -> Topology:
    """The one that the environment names, where it is for so many ranks."""
    try:
        return Topology.resolve(None, size)
    except TopologyError:
        return Topology.preset(f"full_mesh:{size}")


def _name(op: Any) -> str:
    """Our name of torch's operation; empty if we have none."""
    return next((name for name, theirs in _OPS.items() if op == theirs), "")


def _all_ours(tensors: Sequence[Tensor], op: str | None = None) -> bool:
    """Whether these can be ours. op: None where nothing is reduced."""
    return all(_is_ours(tensor, op) for tensor in tensors)


def _is_ours(tensor: Tensor, op: str | None) -> bool:
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return False
    if op is None:
        return True
    dtype = tensor.dtype
    if (op == "avg" and not (dtype.is_floating_point or dtype.is_complex)) or (
        op in ("min", "max") and dtype.is_complex
    ):
        return False
    return bool(op) and str(dtype).removeprefix("torch.") in DTYPES


def _flat(tensor: Tensor) -> Tensor:
    """(elements,), the tensor's own memory if it is contiguous."""
    return tensor.detach().contiguous().view(-1)


def _back(tensor: Tensor, memory: Tensor) -> Finish | None:
    """Bring back what could not be written in place."""
    if not tensor.numel() or memory.data_ptr() == tensor.data_ptr():
        return None

    def finish() -> None:
        tensor.detach().copy_(memory.view(tensor.shape))

    return finish


dist.Backend.register_backend(NAME, TaspGroup, devices=["cpu", "cuda"])
