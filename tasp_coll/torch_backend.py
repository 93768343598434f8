"""A back end of torch.distributed: `import tasp_coll.torch_backend` registers "tasp".

    torch.distributed.init_process_group("cpu:tasp,cuda:tasp")   # then FSDP2, DDP and DTensor as they are

AllGather, ReduceScatter and AllReduce are ours, in all their forms: into tensors or lists, coalesced, blocking or
asynchronous, of tensors in host memory, and of CUDA tensors where every rank has CuPy (`torch_cuda`). Everything else
is gloo's for tensors in host memory and NCCL's for CUDA tensors: other operations, other reductions (bitwise ones,
premultiplied sums, fp8) and sparse tensors.

The group is a Python subclass of ProcessGroup, because Backend cannot be subclassed from Python in torch 2.13. torch's
C++ reaches its Python methods for DDP and functional collectives, but not where it calls `torch.ops.c10d` or
`all_gather_into_tensor_out` itself: these are gloo's. Topology: TASP_COLL_TOPOLOGY describes the default group; smaller
groups have a full mesh. Connections are made at a group's first collective. A wait that fails raises a CollectiveError
from `wait`, and RuntimeError with its text from a future.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d

from tasp_coll import Communicator
from tasp_coll import torch_forms as forms
from tasp_coll.errors import ArgumentError
from tasp_coll.reduction import reduction
from tasp_coll.topology import ENVIRONMENT
from tasp_coll.torch_cuda import CudaLine, all_have_nccl
from tasp_coll.torch_forms import Tensors
from tasp_coll.torch_works import Line
from tasp_coll.transport.torch import TorchTransport

BACKEND = "tasp"
_OPS = {"SUM": "sum", "PRODUCT": "prod", "MIN": "min", "MAX": "max", "AVG": "avg"}


def _first_name(*names: str) -> str:
    """The one that this torch has: single-tensor collectives were renamed in 2.13."""
    return next(name for name in names if hasattr(dist.ProcessGroup, name))


_GATHER = _first_name("all_gather_single", "_allgather_base")
_GATHERS = _first_name("all_gather_single_coalesced", "allgather_into_tensor_coalesced")
_SCATTER = _first_name("reduce_scatter_single", "_reduce_scatter_base")
_EXCHANGE = _first_name("all_to_all_single", "alltoall_base")
_SCATTERS = _first_name("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced")


@dataclass(frozen=True)
class _Peers:
    """What a Communicator is made of: the ranks of one group, which meet in its store."""

    store: dist.Store
    rank: int
    size: int
    timeout: float
    prefix: str = "tasp_coll"

    def duplicate(self) -> TorchTransport:
        """Connections between them."""
        return TorchTransport(dist.PrefixStore(self.prefix, self.store), self.rank, self.size, self.timeout)


class TaspGroup(dist.ProcessGroup):
    """A process group of torch.distributed whose AllGather, ReduceScatter and AllReduce are tasp_coll's.

    options: what torch hands to the creator of a back end: store, rank, size, timeout, ranks. `carried`: how many
    collectives were ours so far.
    """

    def __init__(self, options: Any) -> None:
        rank, size = options.group_rank, options.group_size
        super().__init__(rank, size)
        self._store, self._ranks = options.store, tuple(options.global_ranks_in_group or ())
        self._peers = _Peers(options.store, rank, size, options.timeout.total_seconds())
        self._comm: Communicator | None = None
        self._cuda_comm: Communicator | None = None  # of its own: collectives in host memory have a thread of theirs
        self._cuda_line = CudaLine()
        self._cuda_ours: bool | None = None  # not known yet
        self.carried = 0  # calls that were ours
        self._line = Line(f"tasp_coll group {options.group_id}")
        # Methods that are not overridden look for their back end here, ours in a group of their own: a call of
        # the base class's method would come back to the override.
        self._others = dist.ProcessGroup(options.store, rank, size)
        for group in (self, self._others):
            group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        for device, kind, backend in _backends(options):
            for group in (self, self._others):
                group._register_backend(torch.device(device), kind, backend)

    def getBackendName(self) -> str:
        """For torch's messages."""
        return BACKEND

    def get_group_store(self) -> dist.Store:
        """The store that the group's ranks share."""
        return self._store

    @property
    def communicator(self) -> Communicator:
        """The group's own. Making it, at the first use, is collective."""
        if self._comm is None:
            self._comm = Communicator(self._peers, topology=self._topology(), timeout=self._peers.timeout)
        return self._comm

    @property
    def cuda_communicator(self) -> Communicator:
        """The same for CUDA tensors."""
        if self._cuda_comm is None:
            peers = replace(self._peers, prefix="tasp_coll/cuda")
            self._cuda_comm = Communicator(peers, topology=self._topology(), timeout=self._peers.timeout)
        return self._cuda_comm

    # --- AllGather

    def all_gather_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """Every rank's tensor, one after another, in `output`."""
        opts = opts or c10d.AllgatherOptions()
        if not self._carries([output, tensor]):
            return getattr(self._others, _GATHER)(output, tensor, opts)
        return self._start(lambda comm: forms.gather(comm, output, tensor), [output], [tensor], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, tensors: Tensors, opts: Any = None) -> Any:
        """`all_gather_single` of several tensors, of which those of one dtype travel together."""
        opts = opts or c10d.AllgatherOptions()
        if not self._carries([*outputs, *tensors]):
            return getattr(self._others, _GATHERS)(outputs, tensors, opts)
        return self._start(lambda comm: forms.gather_all(comm, outputs, tensors), outputs, tensors, opts)

    def allgather(self, output_lists: list[Tensors], tensors: Tensors, opts: Any = None) -> Any:
        """Every rank's tensor in the list's entry for that rank; ranks' sizes may differ."""
        opts = opts or c10d.AllgatherOptions()
        if len(tensors) != 1 or len(output_lists[0]) != self.size() or not self._carries([*output_lists[0], *tensors]):
            return self._others.allgather(output_lists, tensors, opts)
        return self._start(
            lambda comm: forms.gather_lists(comm, [[x] for x in output_lists[0]], tensors),
            output_lists[0],
            tensors,
            opts,
        )

    def allgather_coalesced(self, output_lists: list[Tensors], tensors: Tensors, opts: Any = None) -> Any:
        """Every rank's list of tensors in the entry for that rank."""
        opts = opts or c10d.AllgatherOptions()
        outputs = [x for one in output_lists for x in one]
        one_dtype = len({x.dtype for x in tensors}) == 1
        if not (one_dtype and len(output_lists) == self.size() and self._carries([*outputs, *tensors])):
            return self._others.allgather_coalesced(output_lists, tensors, opts)
        return self._start(lambda comm: forms.gather_lists(comm, output_lists, tensors), outputs, tensors, opts)

    # --- ReduceScatter

    def reduce_scatter_single(self, output: Tensor, tensor: Tensor, opts: Any = None) -> Any:
        """This rank's part of the sum, in `output`."""
        opts = opts or c10d.ReduceScatterOptions()
        if not self._carries([output, tensor], opts):
            return getattr(self._others, _SCATTER)(output, tensor, opts)
        return self._start(lambda comm: forms.scatter(comm, output, tensor, _op(opts)), [output], [tensor], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, tensors: Tensors, opts: Any = None) -> Any:
        """`reduce_scatter_single` of several tensors, of which those of one dtype travel together."""
        opts = opts or c10d.ReduceScatterOptions()
        if not self._carries([*outputs, *tensors], opts):
            return getattr(self._others, _SCATTERS)(outputs, tensors, opts)
        return self._start(lambda comm: forms.scatter_all(comm, outputs, tensors, _op(opts)), outputs, tensors, opts)

    def reduce_scatter(self, outputs: Tensors, input_lists: list[Tensors], opts: Any = None) -> Any:
        """This rank's entry of the sum of the ranks' lists; entries' sizes may differ."""
        opts = opts or c10d.ReduceScatterOptions()
        if len(outputs) != 1 or len(input_lists[0]) != self.size() or not self._carries(outputs + input_lists[0], opts):
            return self._others.reduce_scatter(outputs, input_lists, opts)
        return self._start(
            lambda comm: forms.scatter_list(comm, outputs[0], input_lists[0], _op(opts)),
            outputs,
            input_lists[0],
            opts,
        )

    # --- AllReduce

    def allreduce(self, tensors: Tensors | Tensor, opts: Any = None) -> Any:
        """The sum, in the tensor itself."""
        opts = opts or c10d.AllreduceOptions()
        tensors = [tensors] if isinstance(tensors, Tensor) else tensors
        if len(tensors) != 1 or not self._carries(tensors, opts):
            return self._others.allreduce(tensors, opts)
        return self._start(lambda comm: forms.reduce(comm, tensors[0], _op(opts)), tensors, [], opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:
        """The sums of several tensors, in themselves; those of one dtype travel together."""
        opts = opts or c10d.AllreduceCoalescedOptions()
        if not self._carries(tensors, opts):
            return self._others.allreduce_coalesced(tensors, opts)
        return self._start(lambda comm: forms.reduce_all(comm, tensors, _op(opts)), tensors, [], opts)

    # The names before torch 2.13.
    _allgather_base, allgather_into_tensor_coalesced = all_gather_single, all_gather_single_coalesced
    _reduce_scatter_base, reduce_scatter_tensor_coalesced = reduce_scatter_single, reduce_scatter_single_coalesced

    # --- what is gloo's or NCCL's in any case
    # torch's own way from a Python group to its back end holds the GIL, for which Gloo's threads may be waiting: it
    # hung once in some hundred calls. Operations that are not here go past Python.

    def broadcast(self, *args: Any, **kwargs: Any) -> Any:
        """Delegated."""
        return self._others.broadcast(*args, **kwargs)

    def barrier(self, *args: Any, **kwargs: Any) -> Any:
        """Delegated."""
        return self._others.barrier(*args, **kwargs)

    def send(self, *args: Any, **kwargs: Any) -> Any:
        """Delegated."""
        return self._others.send(*args, **kwargs)

    def recv(self, *args: Any, **kwargs: Any) -> Any:
        """Delegated."""
        return self._others.recv(*args, **kwargs)

    def all_to_all_single(self, *args: Any, **kwargs: Any) -> Any:
        """Delegated."""
        return getattr(self._others, _EXCHANGE)(*args, **kwargs)

    alltoall_base = all_to_all_single

    # --- upkeep

    def shutdown(self) -> None:
        """Finish what is under way and close the connections."""
        self._line.close(self._peers.timeout)
        for comm in (self._comm, self._cuda_comm):
            if comm is not None:
                comm.close()
        super().shutdown()

    def abort(self) -> None:
        """Wait for nothing."""
        self._line.close(0)
        super().abort()

    # --- how they are carried out, one after another

    def _start(self, action: Callable[[Communicator], None], outputs: Tensors, inputs: Tensors, opts: Any) -> Any:
        self.carried += 1
        if outputs[0].is_cuda:
            return self._cuda_line.start(lambda: action(self.cuda_communicator), [*outputs, *inputs], outputs)
        blocking = not getattr(opts, "asyncOp", True)
        return self._line.start(lambda: action(self.communicator), outputs, blocking=blocking)

    def _carries(self, tensors: Sequence[Tensor], reducing: Any = None) -> bool:
        """Whether these are for us: the same on all ranks, as they pass the same kinds of tensors."""
        if not tensors or not all(_carried(x) for x in tensors) or len({x.is_cuda for x in tensors}) > 1:
            return False
        if tensors[0].is_cuda and not self._carries_cuda():
            return False
        if reducing is None:
            return True
        op = _op(reducing)
        return all(_reducible(op, x.dtype, self.size()) for x in tensors)

    def _carries_cuda(self) -> bool:
        """Decided at the first CUDA tensor, for all ranks alike."""
        if self._cuda_ours is None:
            self._cuda_ours = all_have_nccl(dist.PrefixStore("tasp_coll_cuda", self._store), self.rank(), self.size())
        return self._cuda_ours

    def _topology(self) -> str | None:
        """None: what TASP_COLL_TOPOLOGY says, which is about the default group."""
        whole = not self._ranks or self._ranks == tuple(range(dist.get_world_size()))
        return None if whole or not os.environ.get(ENVIRONMENT) else f"full_mesh:{self.size()}"


def _carried(tensor: Tensor) -> bool:
    """Whether this tensor is ours at all."""
    return (
        (tensor.is_cpu or tensor.is_cuda)
        and tensor.layout is torch.strided
        and not (tensor.is_quantized or _lazy(tensor))
    )


def _lazy(tensor: Tensor) -> bool:
    return tensor.is_conj() or tensor.is_neg()


def _op(opts: Any) -> str:
    """Our name of the reduction, or "" where we have none."""
    return _OPS.get(opts.reduceOp.op.name, "")


@cache
def _reducible(op: str, dtype: torch.dtype, size: int) -> bool:
    try:
        reduction(op, str(dtype).removeprefix("torch."), size)
    except ArgumentError:
        return False
    return True


def _backends(options: Any) -> list[tuple[str, Any, Any]]:
    """Who does what we do not: device, type and back end. They connect when they are used."""
    kinds, rank, size = dist.ProcessGroup.BackendType, options.group_rank, options.group_size
    gloo = dist.ProcessGroupGloo(dist.PrefixStore("gloo", options.store), rank, size, options.timeout)
    gloo._set_sequence_number_for_group()
    found = [("cpu", kinds.GLOO, gloo)]
    if torch.cuda.is_available() and dist.is_nccl_available():
        settings = dist.ProcessGroupNCCL.Options()
        settings._timeout = options.timeout
        settings.global_ranks_in_group = list(options.global_ranks_in_group or ())
        settings.group_name = options.group_id
        nccl = dist.ProcessGroupNCCL(dist.PrefixStore("nccl", options.store), rank, size, settings)
        nccl._set_sequence_number_for_group()
        found.append(("cuda", kinds.NCCL, nccl))
    return found


def _create(options: Any, backend_options: Any = None) -> TaspGroup:
    """What torch calls for a group over "tasp"."""
    if backend_options is not None:
        raise ArgumentError(f"pg_options must be None for back end {BACKEND!r}, got {backend_options!r}")
    if not isinstance(options.timeout, timedelta):
        raise ArgumentError(f"timeout must be a timedelta, got {options.timeout!r}")
    return TaspGroup(options)


if BACKEND.upper() not in dist.Backend._plugins:
    dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu", "cuda"])
