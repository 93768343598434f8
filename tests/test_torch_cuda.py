"""CUDA tensors in the "tasp" back end, on doubles: who carries them, and the order of streams."""

from __future__ import annotations

import threading
import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cupy_double
import torch_double
from cupy_double import Device, Runtime
from loopback_ranks import on_ranks
from nccl_double import check_memory, check_records
from tasp_coll import Communicator, torch_cuda, torch_forms
from tasp_coll.errors import CollectiveError
from torch_double import on_gpu, on_host


class Stream:
    """torch's, over the double's streams."""

    def __init__(self, device: int, made: Any = None) -> None:
        with Device(device):
            self.device, self.made = device, made or cupy_double.Stream()
        self.handle = self.cuda_stream = self.made.ptr

    def record_event(self) -> Any:
        event = cupy_double.Event()
        event.record(self.made)
        event.query = lambda: event.done  # type: ignore[attr-defined]
        return event

    def wait_event(self, event: Any) -> None:
        self.made.wait_event(event)

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch's current streams, one for each thread and GPU."""
    fabric = cupy_double.install(monkeypatch)
    torch_double.install(monkeypatch)
    local = threading.local()

    def current(device: int) -> Stream:
        if not hasattr(local, "stream"):
            local.stream = Stream(device)
        stream: Stream = local.stream
        return stream

    @contextmanager
    def entered(stream: Stream) -> Any:
        before, local.stream = current(stream.device), stream
        yield
        local.stream = before

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    return fabric


def test_a_collective_runs_beside_the_callers_stream(streams: Any) -> None:
    def body(comm: Communicator) -> tuple[int, int]:
        with Device(comm.rank):
            line, x = torch_cuda.CudaLine(), on_gpu(torch.full((1000,), 1.0 + comm.rank))
            for total in (6.0, 18.0, 54.0):
                work = line.start(lambda: torch_forms.reduce(comm, x, "sum"), [x], [x])
                assert work.wait()
                assert work.result() == [x]
                mine = torch.cuda.current_stream(comm.rank)
                cupy_double.drain(comm.rank, mine.handle)
                assert work.is_completed()
                assert on_host(x).tolist() == [total] * 1000
        return comm.rank, mine.handle

    callers = dict(on_ranks(3, body))
    streams.run()
    check_records(streams.records)
    check_memory(streams.entries)
    for rank, groups in streams.records.items():
        assert all(group.stream != callers[rank] for group in groups)
    assert {(rank, stream == callers[rank]) for rank, _, stream in torch_double.told} == {(r, False) for r in range(3)}


def test_all_ranks_have_cupy_or_none_is_ours(streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store, lacking = dist.HashStore(), {1}

    def load() -> None:
        if Runtime.here().number in lacking:
            raise CollectiveError("no CuPy")

    monkeypatch.setattr(torch_cuda, "load", load)

    def decided(comm: Communicator) -> bool:
        with Device(comm.rank):
            return torch_cuda.all_have_nccl(dist.PrefixStore(str(len(lacking)), store), comm.rank, comm.size)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert on_ranks(2, decided) == [False, False]
    assert ["as rank 1 says: no CuPy" in str(warning.message) for warning in caught] == [True, True]
    lacking.clear()
    assert on_ranks(2, decided) == [True, True]
