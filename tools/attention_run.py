"""The run of `attention_perf.py` on every rank: what is made, measured, checked and told, in that order."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

import attention_memory
import attention_plot
import tasp_coll
from attention.kernels import kernel_for
from attention.tracing import Span, write_chrome_trace
from attention_check import errors, tolerance
from attention_measure import Bench, Times
from attention_methods import Method, Ours, assemble, dismiss
from attention_options import COMPUTE, DEFAULT, TOOL, WHOLE, Options
from attention_report import Common, Errors, Result, head, ratio, row
from attention_silent import SilentTransport, silenced
from perf_collective import Unsupported
from perf_launch import communicator, library
from perf_report import write_json
from tasp_coll.bootstrap import connect, timeout_seconds
from tasp_coll.files import writing

if TYPE_CHECKING:
    from mpi4py import MPI


def run(world: MPI.Intracomm, options: Options) -> int:
    """The test; its exit status, the same on all ranks. Unsupported for what cannot be done, raised on all of them."""
    device = _device(world, options)
    comm = communicator(options.topology, options.timeout)
    silent = _silent(options, device)
    bench = Bench(world, comm, options, device)
    methods, notes = _usable(bench, assemble(options, world, comm, silent))
    report = _Report(bench, comm, methods)
    report.begin(notes)
    named = {method.name for method in methods}
    alone = [Ours(name, options, silent) for name in (COMPUTE, *(name for name in WHOLE if name in named))]
    for method in alone:
        bench.once(method)
    times = bench.measure(methods, alone)
    trace = _gathered_spans(world, list(bench.spans))
    wrongs = errors(bench, methods) if options.check else [None] * len(methods)
    peaks = [_peak(bench, method) for method in methods]
    results = _results(bench, comm, methods, times, wrongs, peaks)
    report.end(results, trace)
    dismiss(methods)
    silent.close()
    comm.close()
    return 1 if any(_wrong(method, result) for method, result in zip(methods, results, strict=True)) else 0


def _usable(bench: Bench, methods: Sequence[Method]) -> tuple[list[Method], list[str]]:
    """Those that can run here, by one call, and notes on others of the default list."""
    usable, notes = [], []
    for method in methods:
        try:
            bench.once(method)
            usable.append(method)
        except (Unsupported, tasp_coll.ArgumentError, tasp_coll.TopologyError) as error:  # raised on all ranks
            if bench.options.named:
                raise Unsupported(f"--method {method.name}: {error}") from error
            notes.append(f"{method.name} is left out: {error}")
    if not usable:
        raise Unsupported(f"none of {', '.join(DEFAULT)} can run here: {'; '.join(notes)}")
    return usable, notes


def _gathered_spans(world: MPI.Intracomm, spans: list[Span]) -> list[list[Span]] | None:
    """By rank, on rank 0, on rank 0's clock: clocks of hosts are brought in line at a barrier."""
    hosts = world.allgather(os.uname().nodename)
    world.Barrier()
    now = perf_counter()
    shift = world.bcast(now) - now if len(set(hosts)) > 1 else 0.0
    return world.gather([Span(kind, step, start + shift, stop + shift) for kind, step, start, stop in spans])


def _peak(bench: Bench, method: Method) -> int | None:
    """Of the rank that takes most, less its result and gradients.

    By a communicator of its own, as one that has been used before holds the memory that it will use again.
    """
    options, (query, key, value, _) = bench.options, bench.inputs(method)
    kept = sum(x.numel() * x.element_size() for x in (query, *((query, key, value) if options.backward else ())))
    fresh = None
    if isinstance(method, Ours):
        silent = options.silent or method.name == COMPUTE
        fresh = _silent(options, bench.device) if silent else communicator(options.topology, options.timeout)
        method = Ours(method.name, options, fresh, method.kv_bits)
    bench.world.Barrier()
    grown = bench.world.allgather(attention_memory.peak_bytes(lambda: bench.once(method)))
    if fresh is not None:
        fresh.close()
    return None if None in grown else max(max(grown) - kept, 0)


def _device(world: MPI.Intracomm, options: Options) -> torch.device:
    """Where this rank's tensors are. Ranks take the GPUs of their host in turn."""
    if options.device == "cpu":
        return torch.device("cpu")
    if not all(world.allgather(torch.cuda.is_available())):
        raise Unsupported("--device cuda: not every rank's torch sees a GPU")
    hosts = world.allgather(os.uname().nodename)
    number = hosts[: world.rank].count(hosts[world.rank]) % torch.cuda.device_count()
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def _silent(options: Options, device: torch.device) -> tasp_coll.Communicator:
    """A communicator that carries no data."""
    inner = connect(None, timeout_seconds(options.timeout))
    made = communicator(options.topology, options.timeout, SilentTransport(inner))
    return silenced(made, device.index if device.type == "cuda" else None)


def _results(
    bench: Bench,
    comm: tasp_coll.Communicator,
    methods: Sequence[Method],
    times: Times,
    wrongs: Sequence[Errors | None],
    peaks: Sequence[int | None],
) -> list[Result]:
    """One for each method."""
    options = bench.options
    dtype = getattr(torch, options.dtype)
    kernel = kernel_for(torch.empty((1, 1, 1, options.head_dim), dtype=dtype, device=bench.device)).name
    common = Common.of(options, comm.topology, _named(options), kernel, dtype.itemsize, times)
    return [
        Result(common, method.name, method.kv_bits, method.recorded, mine, ratio(mine, times.methods[0]), wrong, peak)
        for method, mine, wrong, peak in zip(methods, times.methods, wrongs, peaks, strict=True)
    ]


def _named(options: Options) -> bool:
    """Whether somebody said what the links are."""
    return bool(options.topology or os.environ.get("TASP_COLL_TOPOLOGY"))


def _wrong(method: Method, result: Result) -> bool:
    """Whether ours is; a peer's error is shown, and is its own affair."""
    if result.error is None or not isinstance(method, Ours):
        return False
    return method.name != COMPUTE and not result.error.largest <= tolerance(result.common.options.dtype, method.kv_bits)


class _Report:
    """What rank 0 tells, and the files that it writes; nothing on other ranks."""

    def __init__(self, bench: Bench, comm: tasp_coll.Communicator, methods: Sequence[Method]) -> None:
        self._bench, self._comm, self._methods = bench, comm, methods
        self._speaks = comm.rank == 0
        self._bar: Any = None

    def begin(self, notes: Sequence[str]) -> None:
        """What is about to be measured."""
        hosts = Counter(self._bench.world.allgather(os.uname().nodename))
        if not self._speaks:
            return
        options, comm = self._bench.options, self._comm
        given = "" if _named(options) else " (assumed: --topology names yours)"
        kind = "causal" if options.causal else "full"
        kind += "" if options.window is None else f", window {options.window}"
        lines = [
            f"{TOOL}, tasp-coll {tasp_coll.__version__}",
            f"{options.seq_len} tokens, batch {options.batch}, {options.heads} heads on {options.kv_heads} of keys, "
            f"head_dim {options.head_dim}, {options.dtype}, {kind}, forward{' and backward' * options.backward}",
            f"warmup iters: {options.warmup} iters: {options.iters}{', communication off' * options.silent}",
            *([f"GPU: {torch.cuda.get_device_name(self._bench.device)}"] if options.device == "cuda" else []),
            f"world size {comm.size}: {', '.join(f'{count} on {host}' for host, count in hosts.items())}",
            f"MPI library: {library()}; torch {torch.__version__}, {torch.get_num_threads()} threads",
            f"transport {comm.gpu_transport or comm.transport}, topology {comm.topology.name}{given}",
            *notes,
        ]
        print("\n".join(f"# {line}" for line in lines), flush=True)
        self._show_progress()

    def end(self, results: Sequence[Result], trace: list[list[Span]] | None) -> None:
        """The table and the files."""
        if not self._speaks:
            return
        if self._bar is not None:
            self._bar.close()
        print("\n".join([*head(results[0].common), *(row(result) for result in results)]), flush=True)
        options, comm = self._bench.options, self._comm
        if options.json is not None:
            first = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": comm.size}
            write_json(
                options.json,
                {**first, "transport": comm.gpu_transport or comm.transport, "topology": comm.topology.name},
                results,
            )
        if options.plot is not None:
            kind = "causal" if options.causal else "full"
            attention_plot.draw(
                options.plot, f"{options.seq_len} tokens, {kind}, {comm.size} ranks, {comm.topology.name}", results
            )
        if options.trace is not None and trace is not None:
            with writing(options.trace) as partial:
                write_chrome_trace(partial, trace)

    def _show_progress(self) -> None:
        """A bar for what takes long, on a terminal, if tqdm is there."""
        if not sys.stderr.isatty():
            return
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=self._bench.rounds(), unit="round", delay=2, leave=False)
        update: Callable[[], object] = self._bar.update
        self._bench.progress = update
