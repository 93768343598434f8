"""CUDA tensors of the "tasp" back end: whether they are ours, and how torch's streams see what we do with them.

A collective is given to a stream of ours, after what the caller's current stream was given before; `wait` lets the
caller's stream come after it, and no host waits for a GPU. It is given in the caller's thread, so that all ranks launch
ours and NCCL's collectives in one order.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tasp_coll.errors import CollectiveError
from tasp_coll.transport.nccl import load

_AS_LONG_AS_IT_TAKES = timedelta(0)


def all_have_nccl(store: dist.Store, rank: int, size: int) -> bool:
    """Whether every rank has CuPy and its NCCL, by which our CUDA collectives travel. Collective; says so where not."""
    missing = ""
    try:
        load()
    except CollectiveError as error:
        missing = str(error)
    store.set(f"nccl/{rank}", missing)
    told = {other: store.get(f"nccl/{other}").decode() for other in range(size)}
    lacking = {other: why for other, why in told.items() if why}
    if lacking:
        first = min(lacking)
        warnings.warn(
            f"tasp: CUDA tensors go to NCCL's own collectives, as rank {first} says: {lacking[first]}", stacklevel=2
        )
    return not lacking


class CudaWork(dist.Work):
    """A collective that a stream has been given. `outputs`: what it writes."""

    def __init__(self, stream: Any, outputs: list[Tensor]) -> None:
        super().__init__()
        self._stream, self._outputs = stream, outputs
        self._event = stream.record_event()
        self._future: torch.futures.Future[list[Tensor]] | None = None

    def wait(self, timeout: timedelta = _AS_LONG_AS_IT_TAKES) -> bool:
        """What the current stream is given from now on comes after it. The host does not wait, so never too long: the
        group's timeout ends what a GPU cannot finish."""
        torch.cuda.current_stream(self._stream.device).wait_event(self._event)
        return True

    def synchronize(self) -> None:
        """The same."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the GPU is done with it."""
        return bool(self._event.query())

    def is_success(self) -> bool:
        """The same: what fails, fails when it is called, or ends the group."""
        return self.is_completed()

    def exception(self) -> None:
        """None: see `is_success`."""

    def result(self) -> list[Tensor]:
        """What it writes."""
        self.wait()
        return self._outputs

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        """A future of the outputs; whoever waits for it has its current stream wait."""
        if self._future is None:
            self._future = torch.futures.Future(devices=[self._stream.device])
            with torch.cuda.stream(self._stream):
                self._future.set_result(self._outputs)
        return self._future


class CudaLine:
    """Gives a group's collectives to a stream beside the callers', one for each device, in the order of the calls."""

    def __init__(self) -> None:
        self._streams: dict[int, Any] = {}

    def start(self, action: Callable[[], None], tensors: Sequence[Tensor], outputs: list[Tensor]) -> CudaWork:
        """Carry out `action`, which gives to torch's current stream. tensors: all that it reads and writes."""
        device = tensors[0].get_device()
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            action()
        for tensor in tensors:
            tensor.record_stream(stream)
        return CudaWork(stream, outputs)
