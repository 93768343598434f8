"""Tensors in the forms that torch.distributed hands them over -> calls of a Communicator, which takes one array each.

Each waits for its result. Tensors need not be contiguous; lists are packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tasp_coll import Communicator

Tensors = list[Tensor]


def gather(comm: Communicator, output: Tensor, tensor: Tensor) -> None:
    """Every rank's tensor, one after another, in `output`."""
    with _Written(output) as flat:
        comm.decomposed_allgather(_flat(tensor), flat)


def gather_all(comm: Communicator, outputs: Tensors, tensors: Tensors) -> None:
    """`gather` of several tensors, of which those of one dtype travel together."""
    if len(tensors) == 1:
        return gather(comm, outputs[0], tensors[0])
    for places in _by_dtype(tensors):
        found = comm.decomposed_allgather(torch.cat([_flat(tensors[i]) for i in places]))
        parts = found.view(comm.size, len(found) // comm.size).split([tensors[i].numel() for i in places], 1)
        for i, part in zip(places, parts, strict=True):
            outputs[i].detach().copy_(part.reshape(outputs[i].shape))
    return None


def gather_lists(comm: Communicator, output_lists: list[Tensors], tensors: Tensors) -> None:
    """All ranks' lists of tensors. output_lists: by rank, then in the order of `tensors`, of one dtype."""
    counts = [sum(x.numel() for x in one) for one in output_lists]
    equal = len(set(counts)) == 1
    call = comm.decomposed_allgather if equal else comm.decomposed_allgatherv
    found = call(_flat(tensors[0]) if len(tensors) == 1 else torch.cat([_flat(x) for x in tensors]))
    _unpack(found, [x for one in output_lists for x in one])


def scatter(comm: Communicator, output: Tensor, tensor: Tensor, op: str) -> None:
    """This rank's part of the sum, in `output`."""
    with _Written(output) as flat:
        comm.decomposed_reduce_scatter(_flat(tensor), flat, op=op)


def scatter_all(comm: Communicator, outputs: Tensors, tensors: Tensors, op: str) -> None:
    """`scatter` of several tensors, of which those of one dtype travel together."""
    if len(tensors) == 1:
        return scatter(comm, outputs[0], tensors[0], op)
    for places in _by_dtype(tensors):
        packed = torch.cat([tensors[i].detach().reshape(comm.size, tensors[i].numel() // comm.size) for i in places], 1)
        _unpack(comm.decomposed_reduce_scatter(packed.view(-1), op=op), [outputs[i] for i in places])
    return None


def scatter_list(comm: Communicator, output: Tensor, tensors: Tensors, op: str) -> None:
    """This rank's entry of the sums, in `output`; entries' sizes may differ."""
    packed = torch.cat([_flat(x) for x in tensors])
    with _Written(output) as flat:
        comm.decomposed_reduce_scatter(packed, flat, op=op, counts=[x.numel() for x in tensors])


def reduce(comm: Communicator, tensor: Tensor, op: str) -> None:
    """The sum, in the tensor itself."""
    with _Written(tensor) as flat:
        comm.decomposed_allreduce(flat, flat, op=op)


def reduce_all(comm: Communicator, tensors: Tensors, op: str) -> None:
    """`reduce` of several tensors, of which those of one dtype travel together."""
    for places in _by_dtype(tensors):
        packed = torch.cat([_flat(tensors[i]) for i in places])
        _unpack(comm.decomposed_allreduce(packed, packed, op=op), [tensors[i] for i in places])


def _flat(tensor: Tensor) -> Tensor:
    """Its elements in one dimension, copied only if they do not lie together."""
    return tensor.detach().reshape(-1)


class _Written:
    """Memory for a tensor's elements in one dimension: its own, or a copy that goes back to it."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def __enter__(self) -> Tensor:
        self._memory = self._tensor.reshape(-1)
        return self._memory

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None and not self._tensor.is_contiguous():
            self._tensor.copy_(self._memory.view(self._tensor.shape))


def _unpack(packed: Tensor, tensors: Tensors) -> None:
    for part, tensor in zip(packed.split([x.numel() for x in tensors]), tensors, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


def _by_dtype(tensors: Tensors) -> list[list[int]]:
    """Indices of those of one dtype, in the order in which dtypes come up."""
    places: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        places.setdefault(tensor.dtype, []).append(i)
    return list(places.values())
