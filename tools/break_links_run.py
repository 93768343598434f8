"""Runs jobs on a virtual cluster and breaks links under them."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import vcluster_faults
import vcluster_job
import virtual_cluster
from break_links_cases import BreakCase, Task
from break_links_diaries import Diaries
from break_links_seen import Bounds, Seen
from tasp_coll import ArgumentError, Topology, TopologyError
from tasp_coll.links import Node
from vcluster_options import parse
from vcluster_registry import Cluster
from vcluster_room import Room

_WORKER = Path(__file__).with_name("break_links_worker.py")
_LOOK_S = 0.005
_PATIENCE_S = 60.0  # with ranks that say nothing, beyond what their call may take
_CLEAR_S = 5.0  # for the processes of a job that has ended
_MOST_SAID = 3000
_RULE = "\n====="  # above mpiexec's own account of a job that failed
_ATTENTION_S = 0.5  # the longest call: dense attention on all tokens is what it is held to
Link = tuple[int, int]


class _HungError(Exception):
    """A job says nothing any more."""


@dataclass(frozen=True)
class Stage:
    """Where jobs run, and what is the same for all of them. topology: with the rates that links deliver."""

    cluster: Cluster
    room: Room
    topology: Topology
    launcher: str
    workload: str
    timeout: float
    self_heal: bool
    seed: int

    def play(self, case: BreakCase, job: int) -> Seen:
        """One job of a case."""
        chance = random.Random(f"{self.seed} {self.workload} {case.name} {job}")
        link, moment = chance.choice(cuttable(self.topology)), chance.random()
        broken = rank_links(self.topology) if case.everywhere else [link]
        task = Task(self.workload, self._nbytes(case), case.calls, self.timeout, self.self_heal, self.seed + job)
        fault: tuple[float, float] | None = None
        hung = False
        with tempfile.TemporaryDirectory(prefix="tasp-coll-break-") as name:
            folder = Path(name)
            diaries = Diaries(folder, self.topology.ranks)
            if case.everywhere:
                fault = self._inflict(case, broken)
            try:
                with self._running(folder, task) as running:
                    watch = _Watch(diaries, running, _PATIENCE_S + 20 * case.call_s + 2 * self.timeout)
                    fault = fault or self._break(case, broken, moment, watch)
                    watch.until(lambda: False)
            except _HungError:
                hung = True
            self._mend(broken)
            diaries.read()
            said = (folder / "said").read_text(encoding="utf-8", errors="replace").split(_RULE)[0].strip()[-_MOST_SAID:]
            left = _left(name)
        status = vcluster_job.exit_status(running.wait())
        told = None if case.everywhere else link
        bounds = self._bounds(case, link, task.nbytes)
        how = self.topology.ranks, self.timeout, self.self_heal, bounds, fault, status, hung, left
        return Seen(case, told, *how, diaries.calls(), diaries.failures(), said)

    @contextmanager
    def _running(self, folder: Path, task: Task) -> Iterator[subprocess.Popen[bytes]]:
        (folder / "task").write_text(json.dumps(asdict(task)), encoding="utf-8")
        wiring = self.cluster.wiring()
        worker = [sys.executable, str(_WORKER), str(folder / "task")]
        command = vcluster_job.command_of(self.launcher, wiring, worker)
        variables = vcluster_job.environment(wiring, self.cluster.topology_file)
        with (
            open(folder / "said", "wb") as output,
            vcluster_job.started(self.room, command, variables, output) as running,
        ):
            yield running

    def _break(self, case: BreakCase, broken: list[Link], moment: float, watch: _Watch) -> tuple[float, float] | None:
        """Break links at a moment of the call that is for it, given as its share; when. None: the job ended before."""
        if not watch.until(lambda: watch.diaries.begun(case.before)):
            return None
        time.sleep(moment * watch.diaries.usual_s(case.before))
        when = self._inflict(case, broken)
        if case.restored_s is not None:
            time.sleep(max(when[1] + case.restored_s - time.monotonic(), 0.0))
            self._mend(broken)
        return when

    def _inflict(self, case: BreakCase, broken: list[Link]) -> tuple[float, float]:
        began = time.monotonic()
        self._change(broken, case.fault, case.amount, case.jitter_ms)
        return began, time.monotonic()

    def _mend(self, broken: list[Link]) -> None:
        self._change(broken, "up")

    def _change(self, links: list[Link], fault: str, amount: float | None = None, jitter_ms: float = 0.0) -> None:
        with ThreadPoolExecutor(4) as pool:
            changes = [
                pool.submit(vcluster_faults.inflict, self.cluster, str(a), str(b), fault, amount, jitter_ms)
                for a, b in links
            ]
            for change in changes:
                change.result()

    def _nbytes(self, case: BreakCase) -> int:
        """Bytes with which a call takes as long as the case wants, by the cut bound."""
        second = 1e9 / self.topology.allgather_bound(1e9)  # bytes of a shard
        if self.workload == "allreduce":
            return round(second * case.call_s / 2 * self.topology.ranks)
        if self.workload == "attention":  # keys and values once forward, and backward with their gradients
            return round(second * min(case.call_s, _ATTENTION_S) / 3)
        return round(second * case.call_s)

    def _bounds(self, case: BreakCase, link: Link, nbytes: int) -> Bounds:
        left = None
        if case.scenario == "cut":
            left = self.topology.without_link(*link)
        elif case.scenario == "slow" and case.amount:
            arcs: tuple[tuple[Node, Node], ...] = (link, link[::-1])
            rates = {arc: self.topology.GBps(*arc) / case.amount for arc in arcs}
            left = self.topology.with_rates(rates)
        return Bounds(self._bound(self.topology, nbytes), self._bound(left, nbytes) if left else None)

    def _bound(self, topology: Topology, nbytes: int) -> float | None:
        if self.workload == "attention":
            return None
        if self.workload == "allreduce":  # a reduce-scatter and an all-gather of parts
            return 2 * topology.allgather_bound(nbytes / topology.ranks)
        return topology.allgather_bound(nbytes)


class _Watch:
    """Looks at a job until something happens."""

    def __init__(self, diaries: Diaries, job: subprocess.Popen[bytes], patience_s: float) -> None:
        self.diaries, self._job, self._patience_s = diaries, job, patience_s

    def until(self, happened: Callable[[], bool]) -> bool:
        """True once it has happened, False if the job ended before."""
        heard = time.monotonic()
        while not happened():
            if self._job.poll() is not None:
                return False
            if self.diaries.read():
                heard = time.monotonic()
            elif time.monotonic() > heard + self._patience_s:
                raise _HungError
            time.sleep(_LOOK_S)
        return True


@contextmanager
def staged(spec: str, link_mbit: float) -> Iterator[tuple[Cluster, Room, Topology]]:
    """A cluster for all jobs, and the topology with the rates that its links deliver."""
    asked, _ = parse(["run", "--topology", spec, "--link-mbit", str(link_mbit), "--", "true"])
    with virtual_cluster.built(asked, stays=False) as (cluster, room):
        yield cluster, room, Topology.from_file(cluster.topology_file)


def rank_links(topology: Topology) -> list[Link]:
    """Pairs of ranks with a link."""
    ends = {(link.source, link.target) for link in topology.links}
    return sorted((u, v) for u, v in ends if isinstance(u, int) and isinstance(v, int) and u < v)


def cuttable(topology: Topology) -> list[Link]:
    """Pairs of ranks with a link that others can do without."""

    def spare(link: Link) -> bool:
        try:
            topology.without_link(*link)
        except TopologyError:
            return False
        return True

    found = [link for link in rank_links(topology) if spare(link)]
    if not found:
        raise ArgumentError(
            f"--topology must have a link between ranks that they can do without, got {topology.name!r}"
        )
    return found


def _left(marker: str) -> int:
    """Processes with this in their command line, once they had time to go."""
    end = time.monotonic() + _CLEAR_S
    while (count := _count(marker)) and time.monotonic() < end:
        time.sleep(0.05)
    return count


def _count(marker: str) -> int:
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            count += marker.encode() in path.read_bytes()
        except OSError:  # it has just ended
            continue
    return count
