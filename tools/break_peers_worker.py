"""One rank of a job of break_peers.py: makes its calls, breaks what it is to break, and writes down what it saw.

It never ends by itself, so that no rank's end hides what another one sees; the runner ends it, and a timer if there
is no runner any more.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from datetime import timedelta
from itertools import cycle
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from break_peers_cases import CASES, DETAIL, FAULT_S, GLOO, HEAL, MPI, ODD, RANKS, TASP, Call, Case, Seen
from tasp_coll.files import writing

Array = NDArray[np.generic]
_POLL_S = 0.01


class Peer(Protocol):
    """A library under test."""

    def allgather(self, send: Array) -> Array: ...

    def allreduce(self, send: Array, op: str) -> Array: ...

    def progress(self) -> None:
        """What a program's next call would do for messages that are still under way."""


class Tasp:
    def __init__(self, timeout: float, heal: bool) -> None:
        import tasp_coll

        self._comm = tasp_coll.Communicator(timeout=timeout, self_heal=heal)

    def allgather(self, send: Array) -> Array:
        return self._comm.decomposed_allgather(send)

    def allreduce(self, send: Array, op: str) -> Array:
        return self._comm.decomposed_allreduce(send, op=op)

    def progress(self) -> None:
        from mpi4py import MPI

        MPI.COMM_WORLD.Iprobe()


class Mpi:
    def __init__(self) -> None:
        from mpi4py import MPI

        self._world, self._ops = MPI.COMM_WORLD, {"sum": MPI.SUM, "max": MPI.MAX}

    def allgather(self, send: Array) -> Array:
        recv = np.empty((RANKS * len(send), *send.shape[1:]), send.dtype)
        self._world.Allgather(send, recv)
        return recv

    def allreduce(self, send: Array, op: str) -> Array:
        recv = np.empty_like(send)
        self._world.Allreduce(send, recv, op=self._ops[op])
        return recv

    def progress(self) -> None:
        self._world.Iprobe()


class Gloo:
    """Its AllReduce has no other way than in place."""

    def __init__(self, timeout: float, rank: int, store: Path) -> None:
        import torch
        import torch.distributed as dist

        self._tensor, self._dist = torch.from_numpy, dist
        write(store.with_name(f"loaded.{rank}"), True)  # torch takes long to load, and connecting has the same timeout
        while len(list(store.parent.glob("loaded.*"))) < RANKS:
            time.sleep(_POLL_S)
        at, limit = f"file://{store}", timedelta(seconds=timeout)
        dist.init_process_group("gloo", init_method=at, rank=rank, world_size=RANKS, timeout=limit)

    def allgather(self, send: Array) -> Array:
        recv = np.empty((RANKS * len(send), *send.shape[1:]), send.dtype)
        self._dist.all_gather_into_tensor(self._tensor(recv), self._tensor(send))
        return recv

    def allreduce(self, send: Array, op: str) -> Array:
        ops = {"sum": self._dist.ReduceOp.SUM, "max": self._dist.ReduceOp.MAX}
        self._dist.all_reduce(self._tensor(send), ops[op])
        return send

    def progress(self) -> None:
        """Threads of its own do that."""


def peer(system: str, rank: int, timeout: float, place: Path) -> Peer:
    """The library, ready on this rank."""
    made: dict[str, Callable[[], Peer]] = {
        TASP: lambda: Tasp(timeout, heal=False),
        HEAL: lambda: Tasp(timeout, heal=True),
        MPI: Mpi,
        GLOO: lambda: Gloo(timeout, rank, place / "store"),
        DETAIL: lambda: Gloo(timeout, rank, place / "store"),
    }
    return made[system]()


def run(library: Peer, call: Call, send: Array) -> Array:
    """One call."""
    return library.allgather(send) if call.collective == "allgather" else library.allreduce(send, call.op)


def witness(library: Peer, case: Case, rank: int, nbytes: int, healthy: float, until: float) -> Seen:
    """Make all calls of a rank; what it saw of the last one, or of the first that was not right."""
    calls, slowdown = case.of(rank), 1.0
    for call in cycle(calls) if case.repeat else calls:
        send = case.send(rank, call, nbytes)
        before, begun = send.copy(), time.monotonic()
        try:
            result = run(library, call, send)
        except Exception as error:  # whatever a library raises
            at = time.monotonic()
            return Seen(rank, "error", at, f"{type(error).__name__}: {error}", np.array_equal(send, before))
        slowdown = (time.monotonic() - begun) / healthy
        if not np.array_equal(result, case.right(call, nbytes)):
            return Seen(rank, "wrong", time.monotonic(), intact=result is send or np.array_equal(send, before))
        if time.monotonic() > until:
            break
    return Seen(rank, "right", time.monotonic(), slowdown=slowdown)


def write(path: Path, content: Any) -> None:
    """A file that is there entirely or not at all."""
    with writing(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def main(system: str, name: str, at: str, nbytes: int, timeout: float, limit: float, patience: float) -> None:
    """Be a rank: ready, told to go, done. limit: of the calls; patience: of all that comes before."""
    faulthandler.dump_traceback_later(patience + limit, exit=True)
    rank, place, case = int(os.environ.get("RANK") or os.environ["PMI_RANK"]), Path(at), CASES[name]
    library = peer(system, rank, timeout, place)
    for _ in range(2):
        begun = time.monotonic()
        run(library, case.calls[0], case.send(rank, case.calls[0], nbytes))
        healthy = time.monotonic() - begun
    write(place / f"ready.{rank}", healthy)
    while not (place / "go").exists():
        time.sleep(_POLL_S)
    began = json.loads((place / "go").read_text())
    if case.fault in ("stop", "kill") and rank == ODD:
        number = signal.SIGSTOP if case.fault == "stop" else signal.SIGKILL
        wait = max(0.0, began + FAULT_S - time.monotonic())
        threading.Timer(wait, os.kill, (os.getpid(), number)).start()
    if case.fault == "slower":
        time.sleep(2 * FAULT_S)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        seen = asdict(witness(library, case, rank, nbytes, healthy, began + limit))
    if warned := [str(each.message) for each in told if each.category.__module__.startswith("tasp_coll")]:
        seen["message"] = seen["message"] or warned[-1]
    if rank in case.witnesses:
        write(place / f"seen.{rank}", seen)
    while True:
        if seen["outcome"] != "error" and case.of(rank):
            library.progress()
        time.sleep(_POLL_S)


if __name__ == "__main__":
    system, name, at, nbytes, *seconds = sys.argv[1:]
    main(system, name, at, int(nbytes), *map(float, seconds))
