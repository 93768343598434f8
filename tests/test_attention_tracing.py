"""Recording: what is counted to whom, and the trace for Perfetto."""

from __future__ import annotations

import _thread
import json
import threading
from pathlib import Path
from typing import Any

from attention import record
from attention.tracing import Recording, Span, note, span, write_chrome_trace


def kinds(recording: Recording) -> list[tuple[str, int]]:
    return [(each.kind, each.step) for each in recording.spans]


def test_spans_are_recorded_in_the_order_in_which_they_end() -> None:
    with record() as recording:
        with span("compute", 3), span("merge"):
            pass
        note("transfer", 1, 2.0, 5.5)
    assert kinds(recording) == [("merge", -1), ("compute", 3), ("transfer", 1)]
    merge, compute, _ = recording.spans
    assert compute.start <= merge.start <= merge.stop <= compute.stop


def test_seconds_are_summed_by_kind() -> None:
    with record() as recording:
        for start in (1.0, 10.0):
            note("wait", 0, start, start + 0.5)
        note("compute", 0, 0.0, 4.0)
    assert (recording.seconds("wait"), recording.seconds("compute"), recording.seconds("pack")) == (1.0, 4.0, 0.0)


def test_nothing_is_recorded_outside() -> None:
    with record() as recording:
        pass
    with span("compute"):
        note("wait", 0, 0.0, 1.0)
    assert recording.spans == []


def test_the_innermost_recording_counts() -> None:
    with record() as outer:
        with record() as inner, span("wait"):
            pass
        with span("merge"):
            pass
    assert (kinds(inner), kinds(outer)) == ([("wait", -1)], [("merge", -1)])


def test_a_span_that_raises_is_recorded_and_the_recording_ends() -> None:
    try:
        with record() as recording, span("compute"):
            raise KeyError
    except KeyError:
        pass
    note("wait", 0, 0.0, 1.0)
    assert kinds(recording) == [("compute", -1)]


def test_ranks_in_threads_record_their_own() -> None:
    """As the ranks of a loopback world do; one that does not record leaves the others' recordings alone."""
    ready, found = threading.Barrier(3), {}

    def rank(number: int) -> None:
        with record() as recording:
            ready.wait()
            note("compute", number, 0.0, 1.0)
            ready.wait()
        found[number] = kinds(recording)

    def silent() -> None:
        ready.wait()
        note("compute", 9, 0.0, 1.0)
        ready.wait()

    threads = [*(threading.Thread(target=rank, args=(number,)) for number in (0, 1)), threading.Thread(target=silent)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [("compute", 0)], 1: [("compute", 1)]}


def test_threads_that_are_not_python_s_count_to_the_only_recording() -> None:
    """Autograd's own threads run backward on a GPU."""
    done = threading.Event()

    def foreign() -> None:
        with span("compute", 4):
            pass
        done.set()

    with record() as recording:
        _thread.start_new_thread(foreign, ())
        assert done.wait(10)
    assert kinds(recording) == [("compute", 4)]


def trace(path: Path, *recordings: list[Span]) -> list[dict[str, Any]]:
    write_chrome_trace(path, recordings)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_a_rank_is_a_process_with_rows_for_computing_and_transfers(tmp_path: Path) -> None:
    mine = [Span("transfer", 1, 10.0, 12.0), Span("compute", 0, 10.5, 11.0), Span("wait", -1, 11.0, 12.0)]
    events = trace(tmp_path / "trace.json", mine, [Span("compute", 0, 9.0, 10.0)])
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "compute", (0, 1): "transfer", (1, 0): "compute"}
    assert [e["args"]["name"] for e in events if e["name"] == "process_name"] == ["rank 0", "rank 1"]
    shown = {(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"}
    assert shown == {
        (0, 1, "transfer 1", 1e6, 2e6),
        (0, 0, "compute 0", 1.5e6, 0.5e6),
        (0, 0, "wait", 2e6, 1e6),
        (1, 0, "compute 0", 0.0, 1e6),
    }


def test_transfers_at_the_same_time_have_rows_of_their_own(tmp_path: Path) -> None:
    spans = [Span("transfer", step, *times) for step, times in enumerate(((0.0, 2.0), (1.0, 3.0), (2.0, 4.0)))]
    events = [e for e in trace(tmp_path / "trace.json", spans) if e["ph"] == "X"]
    assert {e["args"]["step"]: e["tid"] for e in events} == {0: 1, 1: 2, 2: 1}


def test_a_trace_of_nothing(tmp_path: Path) -> None:
    assert [e for e in trace(tmp_path / "trace.json", []) if e["ph"] == "X"] == []
