"""One rank of a job that is going to be broken: random collectives until something happens, and notes of what did.

Notes are lines of JSON in a file of its own, so that nothing of them is lost when the job is ended.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

import tasp_coll
from soak_calls import draw
from soak_run import Runner

WARM_CALLS = 5  # before the rank says that it is ready
_TELL_SECONDS = 4.0  # for the other survivors to raise too: the job ends with the first that leaves


class Mishap(Exception):
    """What goes wrong between two collectives."""


def main() -> None:
    """Run this rank."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("room", type=Path, help="a directory for the notes of all ranks")
    parser.add_argument("--how", required=True)
    parser.add_argument("--victim", type=int, required=True)
    parser.add_argument("--launcher", required=True)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--timeout", type=float, required=True)
    given = parser.parse_args()
    comm = _communicator(given)
    notes = Notes(given.room / f"rank{comm.rank}")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells may start ranks with SIGINT ignored
    signal.signal(signal.SIGUSR1, lambda *_: wanted.append(True))
    wanted: list[bool] = []
    began = time.monotonic()
    try:
        for number in itertools.count():
            if number == WARM_CALLS:
                notes.add(ready=os.getpid())
            if wanted and given.how == "silent":
                time.sleep(600)
            if wanted:
                raise Mishap("out of luck")
            call = draw(given.seed, number, comm.size, with_torch=False, with_native=given.launcher == "mpiexec")
            began = time.monotonic()
            if fault := Runner(comm, 0, given.seed, call).run():
                notes.add(wrong=f"{call}: {fault}")
    except BaseException as error:
        notes.add(**_told(error, time.monotonic() - began), **_afterwards(comm))
        if comm.rank != given.victim:
            _wait_for_others(given.room, comm.size, given.victim)
        raise


def _communicator(given: argparse.Namespace) -> tasp_coll.Communicator:
    if given.launcher == "mpiexec":
        return tasp_coll.Communicator(timeout=given.timeout)
    import torch.distributed as dist

    if given.launcher == "torchrun":
        dist.init_process_group("gloo")
    else:  # no launcher: nobody looks after the ranks
        rank, size = int(os.environ["BREAK_RANK"]), int(os.environ["BREAK_SIZE"])
        store = dist.FileStore(str(given.room / "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    return tasp_coll.Communicator(dist.group.WORLD, timeout=given.timeout)


class Notes:
    """What a rank tells."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def add(self, **what: Any) -> None:
        """A line, in one piece."""
        os.write(self._file, (json.dumps(what) + "\n").encode())


def _told(error: BaseException, took: float) -> dict[str, Any]:
    peers, step = getattr(error, "peers", ()), getattr(error, "step", None)
    return {"error": type(error).__name__, "message": str(error), "peers": list(peers), "step": step, "took": took}


def _afterwards(comm: tasp_coll.Communicator) -> dict[str, Any]:
    """Whether the communicator can be used, or what it says."""
    if comm.usable:
        return {"usable": True}
    try:
        comm.decomposed_allreduce(np.ones(3))
    except tasp_coll.CollectiveError as error:
        return {"usable": False, "says": str(error)}
    return {"usable": False}


def _wait_for_others(room: Path, size: int, victim: int) -> None:
    until = time.monotonic() + _TELL_SECONDS
    others = [room / f"rank{rank}" for rank in range(size) if rank != victim]
    while time.monotonic() < until and not all('"error"' in each.read_text() for each in others):
        time.sleep(0.02)


if __name__ == "__main__":
    main()
