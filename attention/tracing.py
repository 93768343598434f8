"""Where the time goes: spans of computing, waiting, merging, packing and transfers, if somebody wants to know.

with attention.record() as recording:
    out = attention.context_parallel_attention(q, k, v, comm=comm)
recording.seconds("wait")
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

KINDS = ("compute", "wait", "merge", "pack", "transfer")
_NOTHING = nullcontext()


class Span(NamedTuple):
    """kind: one of KINDS. step: of the exchange, -1: of none. start and stop: seconds of `time.perf_counter`."""

    kind: str
    step: int
    start: float
    stop: float


@dataclass
class Recording:
    """What went on, in the order in which it ended. On a GPU a span is the time to queue work, not to do it."""

    spans: list[Span] = field(default_factory=list)

    def seconds(self, kind: str) -> float:
        """The sum over the spans of a kind."""
        return sum(span.stop - span.start for span in self.spans if span.kind == kind)


class _Mine(threading.local):
    """Open recordings of this thread, the innermost last."""

    def __init__(self) -> None:
        self.open: list[Recording] = []


_mine = _Mine()
_all: list[Recording] = []  # open ones of all threads


@contextmanager
def record() -> Iterator[Recording]:
    """Record what this thread's attention does, its backward too, until the context ends; the innermost one counts."""
    recording = Recording()
    _mine.open.append(recording)
    _all.append(recording)
    try:
        yield recording
    finally:
        _mine.open.pop()
        _all[:] = [each for each in _all if each is not recording]


def span(kind: str, step: int = -1) -> AbstractContextManager[None]:
    """Round a part of the work. Costs next to nothing while nobody records."""
    recording = _current()
    return _NOTHING if recording is None else _timed(recording, kind, step)


def note(kind: str, step: int, start: float, stop: float) -> None:
    """What was timed elsewhere, as a transfer by the transport's thread."""
    recording = _current()
    if recording is not None:
        recording.spans.append(Span(kind, step, start, stop))


def _current() -> Recording | None:
    """This thread's. Autograd runs backward on a GPU in threads of its own, not Python's: those see the only one."""
    if not _all:
        return None
    if _mine.open:
        return _mine.open[-1]
    foreign = isinstance(threading.current_thread(), threading._DummyThread)
    return _all[0] if foreign and len(_all) == 1 else None


@contextmanager
def _timed(recording: Recording, kind: str, step: int) -> Iterator[None]:
    start = time.perf_counter()
    try:
        yield
    finally:
        recording.spans.append(Span(kind, step, start, time.perf_counter()))


def write_chrome_trace(path: str | Path, recordings: Sequence[Sequence[Span]]) -> None:
    """Write spans of all ranks, by rank, for Perfetto (ui.perfetto.dev) or chrome://tracing.

    A rank is a process; "compute" and "transfer" are its threads, so that one is seen to run under the other. Clocks
    of ranks on several hosts must have been brought in line by the caller.
    """
    begun = min((span.start for spans in recordings for span in spans), default=0.0)
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(recordings):
        events.append({"ph": "M", "name": "process_name", "pid": rank, "tid": 0, "args": {"name": f"rank {rank}"}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "tid": 0, "args": {"sort_index": rank}})
        for lane, (name, mine) in enumerate(_lanes(spans)):
            events.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": lane, "args": {"name": name}})
            events += [_event(span, rank, lane, begun) for span in mine]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n")


def _lanes(spans: Sequence[Span]) -> list[tuple[str, list[Span]]]:
    """(name, spans): what the computing thread did, and transfers in as many rows as run side by side."""
    lanes: list[tuple[str, list[Span]]] = [("compute", [span for span in spans if span.kind != "transfer"])]
    transfers: list[list[Span]] = []
    for span in sorted((span for span in spans if span.kind == "transfer"), key=lambda span: span.start):
        free = next((lane for lane in transfers if lane[-1].stop <= span.start), None)
        if free is None:
            transfers.append([span])
        else:
            free.append(span)
    names = ("transfer", *(f"transfer {number}" for number in range(2, len(transfers) + 1)))
    return lanes + list(zip(names, transfers, strict=False))


def _event(span: Span, rank: int, lane: int, begun: float) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": span.kind if span.step < 0 else f"{span.kind} {span.step}",
        "cat": span.kind,
        "pid": rank,
        "tid": lane,
        "ts": (span.start - begun) * 1e6,
        "dur": (span.stop - span.start) * 1e6,
        "args": {"step": span.step},
    }
