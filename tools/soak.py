"""Random collectives for as long as you like: every element checked, and nothing used up on the way."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import tasp_coll
from perf_launch import check_outputs, check_world, communicator, launch, library
from perf_options import Parser, integer, seconds_of
from perf_report import write_json
from soak_calls import Call, draw
from soak_plot import plot
from soak_run import Runner
from soak_watch import JUDGED_CALLS, REGISTRATIONS, Drift, Sample, drifts, sample, steady
from tasp_coll import checksums

if TYPE_CHECKING:
    from mpi4py import MPI

TOOL = "soak"
_ERA = 200  # calls between two sets of communicators
_LOOKS = 50  # calls between looks at the clock
_SAMPLES = 400
_LINE_SECONDS = 60.0  # between signs of life where there is no bar


@dataclass(frozen=True)
class Options:
    """What the user asked for. calls and seconds: whichever is reached first."""

    calls: int | None
    seconds: float | None
    seed: int
    first: int
    topology: str | None
    timeout: float | None
    json: Path | None
    plot: Path | None


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run, and leave with an exit status, the same on all ranks. argv: None for the process's own."""
    steady()
    launch(TOOL, lambda quiet: parse(argv, quiet=quiet), _soak)


def parse(argv: Sequence[str] | None, *, quiet: bool) -> Options:
    """Options from the command line."""
    parser = Parser(
        quiet,
        prog=f"{TOOL}.py",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-n", "--calls", type=integer(1), metavar="N", help="calls (default 2000)")
    parser.add_argument("-t", "--seconds", type=seconds_of, metavar="S", help="or seconds, whichever is over first")
    parser.add_argument("--seed", type=integer(0), default=0, metavar="N", help="of all that is drawn (default 0)")
    parser.add_argument("--first", type=integer(0), default=0, metavar="N", help="number of the first call (default 0)")
    parser.add_argument("--topology", metavar="SPEC", help="of the communicator that lives for the whole run")
    parser.add_argument("--timeout", type=seconds_of, default=60.0, metavar="S", help="of every wait (default 60)")
    parser.add_argument("-J", "--json", type=Path, metavar="PATH", help="write samples and verdicts")
    parser.add_argument("--plot", type=Path, metavar="PATH", help="draw memory over calls, as .png, .svg or .pdf")
    given = parser.parse_args(argv)
    if given.calls is None and given.seconds is None:
        given.calls = 2000
    return Options(**vars(given))


class _Pool:
    """The communicators: one that lasts, and of each era a duplicate of the world and the parts of a split."""

    def __init__(self, world: MPI.Intracomm, options: Options) -> None:
        self._world, self._options, self._era = world, options, -1
        self._lasting = communicator(options.topology, options.timeout)
        self._young: list[tuple[tasp_coll.Communicator, int]] = []

    def at(self, call: Call) -> tuple[tasp_coll.Communicator, int]:
        """The one for this call, and the colour of the part that this rank is in."""
        era = call.number // _ERA
        if era != self._era:
            self._renew(era)
        every = [(self._lasting, 0), *self._young]
        return every[int(call.place * len(every))]

    def _renew(self, era: int) -> None:
        self._end_era()
        self._era, world, timeout = era, self._world, self._options.timeout
        colour = (world.rank + era) % 2
        part = world.Split(colour, -world.rank if era % 3 == 0 else world.rank)
        self._young = [
            (tasp_coll.Communicator(world, topology=f"nvswitch:{world.size}", timeout=timeout), 0),
            (tasp_coll.Communicator(part, topology=f"full_mesh:{part.size}", timeout=timeout), colour),
        ]
        part.Free()

    def _end_era(self) -> None:
        for comm, _ in self._young:
            comm.close()
        self._young = []

    def close(self) -> None:
        """All of them."""
        self._end_era()
        self._lasting.close()


def _soak(world: MPI.Intracomm, options: Options) -> int:
    check_world(world)
    check_outputs(world, {"--json": options.json, "--plot": options.plot})
    report = _Report(world, options)
    pool = _Pool(world, options)
    begun, samples, faults, number = time.perf_counter(), [], 0, options.first
    with_torch = _has_torch(world)
    report.begin(with_torch)
    apart = max(_ERA, (options.calls or 0) // _SAMPLES // _ERA * _ERA)
    while not _over(world, options, number - options.first, begun):
        if (number - options.first) % apart == 0:
            samples.append(sample(number - options.first, time.perf_counter() - begun))
        call = draw(options.seed, number, world.size, with_torch, with_native=not checksums.wanted())
        faults += _one(pool, call, options)
        number += 1
        report.advance(number - options.first, time.perf_counter() - begun)
    pool.close()
    samples.append(sample(number - options.first, time.perf_counter() - begun))
    return report.end(world.allgather(samples), world.allreduce(faults))


def _over(world: MPI.Intracomm, options: Options, done: int, begun: float) -> bool:
    """The same on all ranks, whose clocks differ."""
    if options.calls is not None and done >= options.calls:
        return True
    if options.seconds is None or done % _LOOKS:
        return False
    return bool(world.bcast(time.perf_counter() - begun >= options.seconds))


def _one(pool: _Pool, call: Call, options: Options) -> bool:
    """Whether the call went wrong; an error ends the run."""
    comm, colour = pool.at(call)
    again = f"seed {options.seed}, call {call.number}: repeat it with --seed {options.seed} --first {call.number} -n 1"
    try:
        fault = Runner(comm, colour, options.seed, call).run()
    except Exception as error:
        print(f"{TOOL}: rank {comm.rank} of {comm}: {again}: {call}", file=sys.stderr, flush=True)
        raise error
    if fault:
        print(f"{TOOL}: WRONG on {comm}: {fault}; {again}: {call}", file=sys.stderr, flush=True)
    return bool(fault)


def _has_torch(world: MPI.Intracomm) -> bool:
    """On all ranks."""
    try:
        import torch

        torch.set_num_threads(1)
        found = True
    except ImportError:
        found = False
    return bool(world.allreduce(int(found)) == world.size)


class _Report:
    """What rank 0 tells."""

    def __init__(self, world: MPI.Intracomm, options: Options) -> None:
        self._world, self._options, self._bar = world, options, _bar(world, options)
        self._next = _LINE_SECONDS

    def begin(self, with_torch: bool) -> None:
        """Before the first call."""
        options = self._options
        limits = (options.calls, "calls"), (options.seconds, "s")
        limit = ", ".join(f"{value} {unit}" for value, unit in limits if value)
        arrays = "NumPy and torch arrays" if with_torch else "NumPy arrays"
        self._say(f"# {TOOL}, tasp-coll {tasp_coll.__version__}, {library()}, {self._world.size} ranks, {arrays}")
        self._say(f"# seed {options.seed}, {limit} from call {options.first} on")

    def advance(self, calls: int, seconds: float) -> None:
        """After each call."""
        if self._bar is not None:
            done = calls if self._options.calls else min(seconds, self._bar.total)
            self._bar.update(done - self._bar.n)
        elif seconds > self._next:
            self._say(f"# {calls} calls in {seconds:.0f} s")
            self._next = seconds + _LINE_SECONDS

    def end(self, samples: Sequence[Sequence[Sample]], faults: int) -> int:
        """Tables and files; the exit status."""
        if self._bar is not None:
            self._bar.close()
        found = [drifts(mine) for mine in samples]
        failed = faults or any(not drift.flat for mine in found for drift in mine)
        if self._world.rank == 0:
            self._table(samples, found)
            last = samples[0][-1]
            rate = last.calls / max(last.seconds, 1e-9)
            verdict = "FAILED" if failed else "OK"
            self._say(f"# {last.calls} calls in {last.seconds:.0f} s ({rate:.0f}/s), {faults} wrong: {verdict}")
            self._write(samples, found, faults)
        return int(bool(failed))

    def _table(self, samples: Sequence[Sequence[Sample]], found: Sequence[Sequence[Drift]]) -> None:
        if not found[0]:
            self._say(f"# fewer than {JUDGED_CALLS} calls: nothing is said about growth")
            return
        self._say(
            f"{'rank':>4} {'what':<12} {'half-way':>12} {'end':>12} {'per 1000 calls':>15} {'rise':>10} {'+-':>9} "
            f"{'later':>10} {'+-':>9}"
        )
        for rank, mine in enumerate(found):
            for drift in mine:
                verdict = "" if drift.flat else "  GROWS"
                self._say(
                    f"{rank:>4} {drift.what:<12} {drift.first:>12.0f} {drift.last:>12.0f} "
                    f"{1000 * drift.slope:>15.2f} {drift.rise:>10.1f} {drift.uncertain:>9.1f} "
                    f"{drift.later_rise:>10.1f} {drift.later_uncertain:>9.1f}{verdict}"
                )

    def _write(self, samples: Sequence[Sequence[Sample]], found: Sequence[Sequence[Drift]], faults: int) -> None:
        options = self._options
        if options.json is not None:
            head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": self._world.size, "transport": "mpi"}
            head |= {"seed": options.seed, "first": options.first, "wrong": faults}
            write_json(options.json, head, [_Rank(*each) for each in enumerate(zip(samples, found, strict=True))])
        if options.plot is not None:
            plot(options.plot, f"{TOOL}: {self._world.size} ranks, seed {options.seed}", samples)

    def _say(self, line: str) -> None:
        if self._world.rank == 0:
            print(line, flush=True)


@dataclass(frozen=True)
class _Rank:
    rank: int
    told: tuple[Sequence[Sample], Sequence[Drift]]

    def record(self) -> dict[str, Any]:
        samples, found = self.told
        return {
            "rank": self.rank,
            "drifts": [drift.record() for drift in found],
            "samples": [each.record() for each in samples],
        }


def _bar(world: MPI.Intracomm, options: Options) -> Any:
    """A progress bar, on a terminal, if tqdm is there."""
    if world.rank != 0 or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit} [{elapsed}<{remaining}]"
    unit = "call" if options.calls else "s"
    return tqdm(total=options.calls or options.seconds, unit=unit, bar_format=form, delay=1, leave=False)


_EPILOG = f"""\
what is drawn
  All collectives, blocking, asynchronous (several under way), into given memory, in place, and repeated with the same
  arrays; streams of steps in both directions, left early, with calls beside them; sizes, uneven rows, no rows at all;
  dtypes, NumPy (strided too) and torch arrays, algorithms, operations; calls on which one rank disagrees, which all
  must hear of. They run on a communicator that lasts, and on others that are made, duplicated and split off the world,
  and closed every {_ERA} calls. Call number N of a seed is always the same.

what is judged
  Every element. From {JUDGED_CALLS} calls on also whether resident memory less staging (rest_bytes: staging is that of
  the plans used last, at most 64 of a communicator), descriptors, threads or prepared MPI requests rise over the
  second half of the run, beyond twice the standard error of the line through it (+-), and memory over the last quarter
  too (later): an allocator that comes to need more makes a step, a leak goes on.
  {REGISTRATIONS}=n is set, unless you set it: UCX, which carries the messages of PyPI's MPICH, otherwise remembers
  every address that it was given, some 100 bytes of each call where arrays are always new ones, and never lets go.
  Without RDMA there is nothing in that cache, so you may want it off in your own long runs too.

exit status
  0 all is well; 1 an element is wrong, a call failed, or something grows; 2 the command line

examples
  mpiexec -n 3 python tools/{TOOL}.py --seconds 600 --plot memory.png
  mpiexec -n 3 python tools/{TOOL}.py --calls 100000 --json soak.json
"""

if __name__ == "__main__":
    main()
