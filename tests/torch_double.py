"""torch tensors "on GPUs" for the doubles of CuPy: CPU tensors of a class that says so.

Kernels run when torch calls them. On a GPU they would run in the order of the current stream: so each waits here until
all that the stream was given before is done, and is noted there, with the memory that it reads and writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch

from cupy_double import Runtime, drain
from tasp_coll.arrays import memory_at

_STREAMS = 1_000_000  # handles, one for each GPU
_LOOKS = {  # at a tensor, not at its elements
    *("__get__", "__set__", "__len__", "size", "stride", "numel", "dim", "element_size", "data_ptr", "storage_offset"),
    *("is_contiguous", "is_conj", "is_neg", "detach", "as_subclass"),
    *("view", "permute", "flatten", "unflatten", "movedim"),
}


class GpuTensor(torch.Tensor):
    """A tensor on this thread's current GPU."""

    is_cuda, is_cpu = True, False

    def get_device(self) -> int:
        return Runtime.here().number

    def record_stream(self, stream: Any) -> None:
        told.append((self.get_device(), self.data_ptr(), stream.handle))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name not in _LOOKS:
            _settle(name, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})


told: list[tuple[int, int, int]] = []  # GPU, address, stream


def _settle(name: str, args: Any, kwargs: Any) -> None:
    rank = Runtime.here().number
    stream = torch.cuda.current_stream(rank).cuda_stream
    drain(rank, stream)
    in_place = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    for place, x in enumerate(_tensors(args)):
        _note(rank, stream, x, in_place and place == 0)
    for x in _tensors(kwargs.get("out", ())):
        _note(rank, stream, x, True)


def _tensors(args: Any) -> Iterator[torch.Tensor]:
    for x in args if isinstance(args, (tuple, list)) else (args,):
        if isinstance(x, GpuTensor):
            yield x
        elif isinstance(x, (tuple, list)):
            yield from _tensors(x)


def _note(rank: int, stream: int, x: torch.Tensor, written: bool) -> None:
    with torch._C.DisableTorchFunctionSubclass():
        if x.numel():
            span = 1 + sum((count - 1) * step for count, step in zip(x.shape, x.stride(), strict=True))
            Runtime.fabric.note(rank, stream, x.data_ptr(), span * x.element_size(), written)


def install(monkeypatch: Any) -> None:
    """Make torch's CUDA functions that tasp_coll calls find the double."""
    told.clear()
    real = torch.as_tensor

    def as_tensor(data: Any, **options: Any) -> torch.Tensor:
        interface = getattr(data, "__cuda_array_interface__", None)
        if interface is None:
            return real(data, **options)
        memory = memory_at(interface["data"][0], interface["shape"][0], data)
        return torch.frombuffer(memory, dtype=torch.uint8).as_subclass(GpuTensor)

    monkeypatch.setattr(torch, "as_tensor", as_tensor)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: SimpleNamespace(cuda_stream=_STREAMS + number))
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: SimpleNamespace(handle=handle))


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """A copy on this thread's current GPU."""
    return cast(x.clone())


def cast(x: torch.Tensor) -> Any:
    """The same memory as a tensor on a GPU: autograd hands back plain ones."""
    return x.as_subclass(GpuTensor)


def on_host(x: torch.Tensor) -> torch.Tensor:
    """A copy that is a plain tensor."""
    drain(Runtime.here().number, torch.cuda.current_stream(Runtime.here().number).cuda_stream)
    return x.detach().as_subclass(torch.Tensor).clone()
