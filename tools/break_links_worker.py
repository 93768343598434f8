"""One rank of a job under break_links.py: the same call again and again, every element of every result checked.

Its argument is a file with the task (JSON, of `Task`). What it sees goes to a diary, a file of JSON lines beside the
task, rank by rank, that the tool reads while the job runs:

    {"event": "begun", "call": number, "at": seconds}
    {"event": "done", "call": ..., "began": ..., "ended": ..., "wrong": elements, "unchanged": bool,
     "topology": name, "dead": [[u, v], ...], "slower": [[u, v, share of the rate], ...], "warnings": [text, ...]}
    {"event": "failed", "call": ..., "began": ..., "ended": ..., "kind": ..., "links": [[a, b], ...], "told": text}

Seconds are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from mpi4py import MPI

import tasp_coll
from break_links_cases import Task
from break_links_workloads import WORKLOADS, Workload

_FAILED = 3
_FAREWELL_S = 30.0  # what ranks that failed wait for others: mpiexec ends all when the first one leaves


class Diary:
    """What a rank tells."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._fd = os.open(folder / f"{rank}.diary", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)

    def tell(self, event: str, **what: Any) -> None:
        """A line, written at once."""
        os.write(self._fd, (json.dumps({"event": event, **what}) + "\n").encode())


def call(
    number: int, workload: Workload, comm: tasp_coll.Communicator, whole: tasp_coll.Topology, diary: Diary
) -> bool:
    """One call; whether it went well enough for another one."""
    send = workload.inputs(number)
    kept = [x.copy() for x in send]
    began = time.monotonic()
    diary.tell("begun", call=number, at=began)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = workload.run(send)
        except tasp_coll.CollectiveError as error:
            told = {"kind": type(error).__name__, "links": getattr(error, "links", ()), "told": str(error)}
            diary.tell("failed", call=number, began=began, ended=time.monotonic(), **told)
            return False
    ended = time.monotonic()
    dead, slower = changes(whole, comm.topology)
    diary.tell(
        "done",
        call=number,
        began=began,
        ended=ended,
        wrong=workload.wrong(found, number),
        unchanged=all(a.tobytes() == b.tobytes() for a, b in zip(send, kept, strict=True)),
        topology=comm.topology.name,
        dead=dead,
        slower=slower,
        warnings=[str(each.message) for each in heard if issubclass(each.category, tasp_coll.LinkWarning)],
    )
    return True


def changes(whole: tasp_coll.Topology, now: tasp_coll.Topology) -> tuple[list[Any], list[Any]]:
    """Directed links that are no longer there, and those with a lower rate, with their share of it."""
    if now is whole:
        return [], []
    dead, slower = [], []
    for link in whole.links:
        rate = now.GBps(link.source, link.target)
        if not rate:
            dead.append((link.source, link.target))
        elif rate < link.GBps:
            slower.append((link.source, link.target, rate / link.GBps))
    return dead, slower


def farewell(folder: Path, ranks: int) -> None:
    """Wait until all ranks have failed, so that each can say how."""
    end = time.monotonic() + _FAREWELL_S
    while time.monotonic() < end:
        told = [(folder / f"{rank}.diary").read_text(encoding="utf-8") for rank in range(ranks)]
        if all('"failed"' in diary for diary in told):
            return
        time.sleep(0.05)


def main() -> None:
    """Do the task."""
    path = Path(sys.argv[1])
    task = Task(**json.loads(path.read_text(encoding="utf-8")))
    diary = Diary(path.parent, MPI.COMM_WORLD.rank)
    with tasp_coll.Communicator(timeout=task.timeout, self_heal=task.self_heal) as comm:
        workload, whole = WORKLOADS[task.workload](comm, task.nbytes, task.seed), comm.topology
        MPI.COMM_WORLD.Barrier()
        for number in range(task.calls):
            if not call(number, workload, comm, whole, diary):
                farewell(path.parent, comm.size)
                os._exit(_FAILED)


if __name__ == "__main__":
    main()
