"""Results of `attention_perf.py`: the table for people, the form for programs, and the ideal that they are held to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, NamedTuple

from attention.forecast import METHODS, Measured, Problem, forecast, overlapped
from attention.kv_bits import Bits
from attention_measure import Parts, Times
from attention_options import COMPUTE, Options, label
from links_model import links_on
from perf_report import figure
from tasp_coll import Topology

_COLUMNS = (
    *(("method", "", -17), ("time", "(us)", 9), ("min", "(us)", 9), ("max", "(us)", 9), ("compute", "(us)", 9)),
    *(("exposed", "(us)", 9), ("merge", "(us)", 9), ("ratio", "", 6), ("ideal", "(us)", 9), ("model", "(us)", 9)),
    ("peak", "(MiB)", 8),
    *(("error", "", 8), ("rms", "", 8)),
)


class Errors(NamedTuple):
    """Of a method. largest: of any element over the largest of its tensor, result and gradients, the worst tensor's.

    rms: the root mean square of the result's errors over that of the result.
    """

    largest: float
    rms: float


@dataclass(frozen=True)
class Common:
    """What all results of a run share. Seconds are forward and backward, the latter 0 without --backward."""

    options: Options
    ranks: int
    kernel: str
    works: dict[str, tuple[float, float]]  # with communication switched off: kernels and merging, by `COMPUTE`, `WHOLE`
    exchange: tuple[float, float]  # on one ring, alone
    topology: Topology
    named: bool  # else the links are assumed, and nothing can be predicted
    problem: Problem

    @classmethod
    def of(cls, options: Options, topology: Topology, named: bool, kernel: str, itemsize: int, times: Times) -> Common:
        """From what was measured."""
        works = {name: _work(found) for name, found in times.compute.items()}
        exchange = median(times.exchange[0]), median(times.exchange[1])
        shape = options.batch, options.heads, options.kv_heads, options.head_dim
        problem = Problem(
            topology.ranks, options.seq_len, *shape, itemsize, options.causal, options.backward, options.window
        )
        return cls(options, topology.ranks, kernel, works, exchange, topology, named, problem)

    @property
    def compute(self) -> tuple[float, float]:
        """Of the computation step by step."""
        return self.works[COMPUTE]

    @property
    def gain(self) -> float:
        """How much shorter the exchange is on all rings than on one, by the links alone."""
        return rings_gain(self.topology, self.problem.shard_bytes)

    def travelling(self, bits: Bits | None) -> Problem:
        """The problem with keys and values in few bits."""
        return self.problem if bits is None else replace(self.problem, kv_bits=bits.on_wire(self.problem.head_dim))

    def predicted(self, method: str, bits: Bits | None) -> float | None:
        """Seconds by the cost model, from the topology's links and the computation that was measured alone."""
        if method not in METHODS or not self.named:
            return None
        problem = self.travelling(bits)
        found = forecast(problem, method, links_on(self.topology), Measured(*self.works.get(method, self.compute)))
        return None if found is None else found.seconds

    @property
    def ccr(self) -> float | None:
        """Computation over communication on one ring; None if there is none."""
        return sum(self.compute) / sum(self.exchange) if self.ranks > 1 else None

    def ideal(self, method: str, bits: Bits | None) -> float | None:
        """Seconds, if the shorter one of computing and communicating is hidden at each step."""
        if method not in ("tasp", "ring"):
            return None
        gain = self.gain if method == "tasp" else 1.0
        problem = self.travelling(bits)
        keys, wire, gradients = problem.shard_bytes, problem.wire_bytes, problem.gradient_bytes
        less = wire / keys, (wire + gradients) / (keys + gradients)  # forward, backward
        parts = zip(self.compute, self.exchange, less, strict=True)
        return sum(overlapped(self.ranks, compute, exchange * share / gain) for compute, exchange, share in parts)


def _work(iterations: Sequence[Parts]) -> tuple[float, float]:
    forward, backward = zip(*(parts.work() for parts in iterations), strict=True)
    return median(forward), median(backward)


def rings_gain(topology: Topology, shard_bytes: int) -> float:
    """How much faster than one ring all rings are, by the links alone; n-1 on a full mesh of equal ones."""
    links = links_on(topology)
    one, all_rings = (links(max(shard_bytes, 1 << 20), name, "allgather") for name in ("ring", "rings"))
    return one.seconds / all_rings.seconds if one and all_rings and all_rings.seconds else 1.0


@dataclass(frozen=True)
class Result:
    """One method."""

    common: Common
    method: str
    kv_bits: int | str | None
    recorded: bool  # it told where its time went
    iterations: tuple[Parts, ...]
    ratio: float
    error: Errors | None
    peak_bytes: int | None

    @property
    def label(self) -> str:
        """The method with its bits."""
        return label(self.method, self.kv_bits)

    @property
    def times_us(self) -> list[float]:
        """Of the slowest rank of each iteration."""
        return [parts.total * 1e6 for parts in self.iterations]

    def part_us(self, kind: str) -> float | None:
        """The median time of a kind of spans."""
        return median(parts.seconds(kind) for parts in self.iterations) * 1e6 if self.recorded else None

    @property
    def ideal_us(self) -> float | None:
        """See `Common.ideal`."""
        ideal = self.common.ideal(self.method, Bits.of(self.kv_bits))
        return None if ideal is None else ideal * 1e6

    @property
    def predicted_us(self) -> float | None:
        """See `Common.predicted`."""
        predicted = self.common.predicted(self.method, Bits.of(self.kv_bits))
        return None if predicted is None else predicted * 1e6

    def record(self) -> dict[str, Any]:
        """For programs."""
        options, common, times = self.common.options, self.common, self.times_us
        return {
            "method": self.method,
            "kv_bits": self.kv_bits,
            "time_us": {"min": min(times), "median": median(times), "max": max(times)},
            "compute_us": self.part_us("compute"),
            "exposed_us": self.part_us("wait"),
            "merge_us": self.part_us("merge"),
            "ratio": self.ratio,
            "ccr": common.ccr,
            "comm_us": sum(common.exchange) * 1e6,
            "alone_us": sum(common.compute) * 1e6,
            "ideal_us": self.ideal_us,
            "predicted_us": self.predicted_us,
            "error": None if self.error is None else self.error.largest,
            "rms_error": None if self.error is None else self.error.rms,
            "peak_bytes": self.peak_bytes,
            "kernel": common.kernel,
            "seq_len": options.seq_len,
            "batch": options.batch,
            "heads": options.heads,
            "kv_heads": options.kv_heads,
            "head_dim": options.head_dim,
            "dtype": options.dtype,
            "causal": options.causal,
            "backward": options.backward,
            "window": options.window,
        }


def ratio(mine: Sequence[Parts], first: Sequence[Parts]) -> float:
    """Time over that of the first method: the median of the ratios within the iterations."""
    return median(a.total / b.total for a, b in zip(mine, first, strict=True))


def head(common: Common) -> list[str]:
    """What was measured beside the methods, and the titles of the columns."""
    alone, exchange = sum(common.compute), sum(common.exchange)
    facts = f"# computation alone {alone * 1e3:.4g} ms"
    if common.ccr is not None:
        facts += f", exchange on one ring alone {exchange * 1e3:.4g} ms: CCR {common.ccr:.3g}"
        facts += f"; all rings are {common.gain:.3g} times as fast by the cost model"
    titles = [_line([title for title, _, _ in _COLUMNS]), _line([unit for _, unit, _ in _COLUMNS])]
    return [facts, "#", *(f"# {line}".rstrip() for line in titles)]


def row(result: Result) -> str:
    """One line of the table."""
    times, parts = result.times_us, [result.part_us(kind) for kind in ("compute", "wait", "merge")]
    figures = [median(times), min(times), max(times), *parts]
    cells = [
        result.label,
        *(_cell(value, 9) for value in figures),
        _cell(result.ratio, 6),
        _cell(result.ideal_us, 9),
    ]
    cells.append(_cell(result.predicted_us, 9))
    peak = None if result.peak_bytes is None else result.peak_bytes / 2**20
    errors = ("-", "-") if result.error is None else (f"{error:.1e}" for error in result.error)
    return f"  {_line([*cells, _cell(peak, 8), *errors])}"


def _cell(value: float | None, width: int) -> str:
    return "-" if value is None else figure(value, width)


def _line(cells: Sequence[str]) -> str:
    padded = (
        text.ljust(-width) if width < 0 else text.rjust(width)
        for text, (_, _, width) in zip(cells, _COLUMNS, strict=True)
    )
    return " ".join(padded).rstrip()
