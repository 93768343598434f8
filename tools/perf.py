"""The bandwidth tests: every algorithm at every size, side by side, checked and reported.

A script says what its collective is (`perf_collective.Collective`) and calls `main`. Their parts: perf_options (the
command line), perf_data (elements), perf_algorithms (calls), perf_measure (the loop), perf_report and perf_plot.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, NoReturn

import perf_data
import perf_plot
import tasp_coll
from perf_algorithms import Algorithm, Ran, assemble, dismiss
from perf_collective import Collective, Extent, Unsupported
from perf_device import DeviceMemory, device_memory, ranks_on_gpu
from perf_launch import check_outputs, check_world, communicator, launch, library
from perf_measure import Bench, Trial
from perf_memory import HostMemory, Memory
from perf_options import Options, parse
from perf_report import Result, Table, foot, write_json
from tasp_coll.simulate import LINKS_ALONE, software_costs
from tasp_coll.topology import ENVIRONMENT

if TYPE_CHECKING:
    from mpi4py import MPI


def main(collective: Collective, about: str | None, argv: Sequence[str] | None = None) -> NoReturn:
    """Run a bandwidth test on all ranks and leave with its exit status, the same on all of them.

    about: for `--help`. argv: the command line, None for the process's own.
    """
    launch(collective.tool, lambda quiet: parse(collective.tool, about, argv, quiet=quiet), partial(_run, collective))


def _run(collective: Collective, world: MPI.Intracomm, options: Options) -> int:
    """The test; its exit status. Unsupported for what all ranks found to be impossible before they began."""
    check_world(world)
    check_outputs(world, {"--json": options.json, "--plot": options.plot})
    dtype = perf_data.dtype(options.dtype)
    if perf_data.Pattern(dtype, world.size, 0, collective.reduces).width < 1:
        raise Unsupported(f"-d {options.dtype} cannot hold exact sums over {world.size} ranks: take a wider type")
    memory: Memory = (
        HostMemory() if options.device == "cpu" else device_memory(world, options.arrays, options.gpu_transport)
    )
    comm = communicator(options.topology, options.timeout, gpu_transport=options.gpu_transport)
    found = (collective.extent(size, dtype.itemsize, world.size) for size in options.sizes())
    bench = Bench(collective, world, options, dtype, list(dict.fromkeys(found)), memory)
    algorithms, notes = _usable(bench, assemble(collective, comm, world, options))
    report = _Report(bench, comm, algorithms)
    report.begin(notes)
    results: list[Result] = []
    for number, extent in enumerate(bench.extents):
        out = bench.measure(number, False, algorithms)
        within = bench.measure(number, True, algorithms) if options.in_place else {}
        fresh = _results(bench, extent, algorithms, out, within, report)
        report.rows(fresh)
        results += fresh
    report.end(results)
    dismiss(algorithms)
    comm.close()
    return 1 if any(result.wrong for result in results) else 0


def _usable(bench: Bench, algorithms: Iterable[Algorithm]) -> tuple[list[Algorithm], list[str]]:
    """Those that can run here, by one call of the smallest size, and notes on others of the default list."""
    usable, notes = [], []
    place = bench.place(bench.extents[0], in_place=False)
    for algorithm in algorithms:
        try:
            call = algorithm.bind(place)
            assert call is not None  # None is for calls in place
            bench.once(call)
            usable.append(algorithm)
        except (Unsupported, tasp_coll.ArgumentError, tasp_coll.TopologyError) as error:  # raised on all ranks
            if bench.options.named:
                raise Unsupported(f"--algo {algorithm.name}: {error}") from error
            notes.append(f"{algorithm.name} is left out: {error}")
        except tasp_coll.MismatchError as error:  # GPUs that cannot be linked
            raise Unsupported(str(error)) from error
    return usable, notes


def _results(
    bench: Bench,
    extent: Extent,
    algorithms: Sequence[Algorithm],
    out: Mapping[int, Trial],
    within: Mapping[int, Trial],
    report: _Report,
) -> list[Result]:
    """One size's, in the order of the algorithms."""
    results, factor = [], bench.collective.factor(bench.world.size)
    for position, algorithm in enumerate(algorithms):
        trial, inner = out[position], within.get(position)
        pairs = zip(trial.timing.times_us, out[0].timing.times_us, strict=True)
        ratio = median(mine / first for mine, first in pairs)
        how = (algorithm.name, trial.ran.chosen, trial.ran.rings, factor)
        times = (trial.timing, inner.timing if inner else None, ratio)
        known = (report.bound(extent), report.predicted_us(extent, algorithm, trial.ran), report.copied(extent, trial))
        results.append(Result(extent, bench.dtype, *how, *times, *known))
    return results


class _Report:
    """What rank 0 tells, and the files that it writes; nothing on other ranks."""

    def __init__(self, bench: Bench, comm: tasp_coll.Communicator, algorithms: Sequence[Algorithm]) -> None:
        self._bench, self._comm, self._options = bench, comm, bench.options
        self._names = [algorithm.name for algorithm in algorithms]
        self._speaks = comm.rank == 0
        named = bool(self._options.topology or os.environ.get(ENVIRONMENT)) and comm.size > 1
        self._topology = comm.topology if named else None
        on_gpu = isinstance(bench.memory, DeviceMemory)
        self._table = Table(bench.collective.redop, self._options.statistics, named, on_gpu)
        self._copy_GBps = self._ranks_on_gpu = 0.0
        self._bar: Any = None
        self._costs = LINKS_ALONE

    def bound(self, extent: Extent) -> float | None:
        """busbw at the cut bound, if the user named a topology."""
        if self._topology is None:
            return None
        collective = self._bench.collective
        seconds = collective.bound_seconds(self._topology, extent.size_bytes)
        return extent.size_bytes / seconds / 1e9 * collective.factor(self._comm.size)

    def predicted_us(self, extent: Extent, algorithm: Algorithm, ran: Ran) -> float | None:
        """Microseconds by the cost model, if the user named a topology; on rank 0 alone."""
        if self._topology is None or not self._speaks:
            return None
        case = self._bench.collective.case(self._topology, extent.size_bytes, self._bench.dtype, self._costs)
        seconds = algorithm.predicted(case, ran)
        return None if seconds is None else seconds * 1e6

    def copied(self, extent: Extent, trial: Trial) -> float | None:
        """Share of the GPU's own copy bandwidth that what its ranks receive takes; in host memory None."""
        if not self._copy_GBps:
            return None
        moved = extent.size_bytes * self._bench.collective.factor(self._comm.size) * self._ranks_on_gpu
        return moved / trial.timing.median / 1e3 / self._copy_GBps

    @property
    def _transport(self) -> str:
        return self._comm.gpu_transport or self._comm.transport

    def begin(self, notes: Sequence[str]) -> None:
        """Head of the table."""
        hosts = Counter(self._bench.world.allgather(os.uname().nodename))
        self._costs = software_costs(hosts[os.uname().nodename])
        self._look_at_gpu()
        if not self._speaks:
            return
        self._show_progress()
        for line in (*self._facts(hosts), *(f"# {note}" for note in notes), "#", *self._table.head()):
            self._write(line)

    def _look_at_gpu(self) -> None:
        memory, world = self._bench.memory, self._bench.world
        if isinstance(memory, DeviceMemory):
            self._ranks_on_gpu = ranks_on_gpu(world, memory)
            self._copy_GBps = world.bcast(memory.copy_GBps() if world.rank == 0 else 0.0)

    def _facts(self, hosts: Counter[str]) -> list[str]:
        options, collective, comm = self._options, self._bench.collective, self._comm
        step = f"{options.step}({'factor' if options.multiply else 'bytes'})"
        flags = f"agg iters: {options.aggregate} validation: {int(options.check)} blocking: {int(options.blocking)}"
        assumed = "" if self._topology else " (assumed: --topology names yours)"
        facts = [
            f"# {collective.tool}, tasp-coll {tasp_coll.__version__}",
            f"# minBytes {options.minbytes} maxBytes {options.maxbytes} step: {step} "
            f"warmup iters: {options.warmup} iters: {options.iters} {flags}",
            f"# world size {comm.size}: {', '.join(f'{count} on {host}' for host, count in hosts.items())}",
            f"# MPI library: {library()}",
            f"# transport {self._transport}, topology {comm.topology.name}{assumed}",
            f"# size = {collective.size_means}; algbw = size / time, busbw = {collective.formula}",
            f"# time: slowest rank, median over iterations; ratio: time over that of {self._names[0]} (see --help)",
        ]
        memory = self._bench.memory
        if isinstance(memory, DeviceMemory):
            shared = f"{self._ranks_on_gpu:.0f} rank{'s' if self._ranks_on_gpu > 1 else ''} on each"
            facts.append(f"# GPU: {memory.name}, {shared}, copies {self._copy_GBps:.4g} GB/s within itself")
            facts.append(f"# {options.arrays} arrays, cudaGraphs: {options.graphs}")
        if comm.size == 1:
            facts.append("# WARNING: one rank has nobody to talk to; start more of them: mpiexec -n 4 python ...")
        return facts

    def rows(self, results: Sequence[Result]) -> None:
        """One size."""
        if self._speaks:
            for result in results:
                self._write(self._table.row(result))
            if len(results) > 1:
                self._write("")

    def end(self, results: Sequence[Result]) -> None:
        """Last lines and files."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.close()
        for line in foot(results, self._names):
            self._write(line)
        options, collective, comm = self._options, self._bench.collective, self._comm
        if options.json is not None:
            head = {"tool": collective.tool, "version": tasp_coll.__version__, "world_size": comm.size}
            write_json(
                options.json,
                {**head, "transport": self._transport, "topology": comm.topology.name, **self._gpu()},
                results,
            )
        if options.plot is not None:
            title = f"{collective.tool}: {comm.size} ranks, {comm.topology.name}"
            perf_plot.draw(options.plot, title, collective.size_means, results, self._names)

    def _gpu(self) -> dict[str, Any]:
        """Of the file's head."""
        memory = self._bench.memory
        if not isinstance(memory, DeviceMemory):
            return {}
        return {"device": memory.name, "copy_GBps": self._copy_GBps, "ranks_per_gpu": int(self._ranks_on_gpu)}

    def _show_progress(self) -> None:
        """A bar for what takes long, on a terminal, if tqdm is there."""
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=self._bench.rounds(), unit="round", delay=2, leave=False)
        self._bench.progress = self._bar.update

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)
