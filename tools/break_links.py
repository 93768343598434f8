"""Breaks links under running collectives, on a virtual cluster, and judges whether what is promised is kept.

    python tools/break_links.py                                      # all scenarios, full_mesh:8: an hour
    python tools/break_links.py --scenario cut --rounds 20 --json cut.json --plot cut.png
    python tools/break_links.py --scenario cut --no-heal --rounds 5  # without self_heal: an error that names the link

A job of one MPI rank per host makes the same call again and again, each time on other data, and checks every element
of every result, and that what was sent is unchanged. At a random moment of a call a link between two ranks is broken:

  cut                goes down. The call ends within its usual time + --timeout + 3 s; later ones, without that link,
                     reach 0.9 of the cut bound of what is left
  cut_and_restored   goes down for a quarter of --timeout, and for one and a half. The same, but for the bound
  slow               delivers a tenth. Once the ranks have noticed, calls reach 0.8 of the new cut bound
  loss               loses 1 % and 5 % of its packets; then all links do, from the start
  delay, jitter      delivers 20 ms later; 10 to 30 ms later
  all of them        every result exact, `send` unchanged, on all ranks the same plan, the job ends with status 0 and
                     leaves no process
  cut, --no-heal     the call raises PeerTimeoutError within --timeout + 2 s on every rank, naming the link

A run that a signal ends still tells what it has seen. Exit status: 0 if every promise was kept, 1 if not, 2 for wrong
usage, 125 if the cluster could not be built, 128 + the signal's number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import vcluster_job
from break_links_cases import cases
from break_links_options import parse
from break_links_report import Result, draw, heading
from break_links_run import Stage, cuttable, staged
from break_links_seen import Seen
from perf_report import write_json
from tasp_coll import ArgumentError, TopologyError
from vcluster_job import Stopped
from vcluster_options import FAILED
from vcluster_room import MissingError, RoomError

TOOL = "break_links"


class _Progress(Protocol):
    def update(self) -> object: ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit status."""
    asked = parse(TOOL, __doc__, argv)
    found: list[Result] = []
    status = 0
    try:
        play(asked, found)
    except Stopped as stopped:
        status = stopped.status
    except (ArgumentError, TopologyError, MissingError, RoomError, OSError) as error:
        ended = vcluster_job.stopped_by(error)
        status = ended.status if ended else FAILED
        if not ended:
            print(f"{TOOL}.py: error: {error}", file=sys.stderr)
    if not found:
        return status
    kept, jobs = sum(each.kept for each in found), sum(len(each.seen) for each in found)
    print(f"# promises were kept in {kept} of {jobs} jobs")
    if asked.json:
        told = {"tool": TOOL, "topology": asked.topology, "link_mbit": asked.link_mbit, "timeout": asked.timeout}
        write_json(asked.json, {**told, "self_heal": asked.heal, "seed": asked.seed}, found)
    if asked.plot:
        draw(asked.plot, f"{asked.topology}, {asked.link_mbit:g} Mbit/s, timeout {asked.timeout:g} s", found)
    return status or int(kept < jobs)


def play(asked: argparse.Namespace, found: list[Result]) -> None:
    """Play all that is asked for, and print it; `found` has what there is when it is cut short, too."""
    launcher = vcluster_job.mpiexec()
    todo = list(cases(asked.scenario, asked.rounds, asked.timeout))
    with staged(asked.topology, asked.link_mbit) as (cluster, room, topology):
        cuttable(topology)  # else an error, before the time is spent
        print(heading(), flush=True)
        with _progress(sum(case.jobs for case in todo) * len(asked.workload)) as progress:
            for workload in asked.workload:
                stage = Stage(cluster, room, topology, launcher, workload, asked.timeout, asked.heal, asked.seed)
                for case in todo:
                    seen: list[Seen] = []
                    try:
                        for job in range(case.jobs):
                            seen.append(stage.play(case, job))
                            progress.update()
                    finally:
                        if seen:
                            found.append(Result(workload, case, tuple(seen)))
                            print(found[-1], flush=True)


@contextmanager
def _progress(jobs: int) -> Iterator[_Progress]:
    """A bar, on a terminal, if tqdm is there."""

    class Nothing:
        def update(self) -> None:
            pass

    try:
        from tqdm import tqdm
    except ImportError:
        yield Nothing()
        return
    with tqdm(total=jobs, unit="job", leave=False, disable=not sys.stderr.isatty()) as bar:
        yield bar


if __name__ == "__main__":
    sys.exit(main())
