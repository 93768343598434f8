"""tools/soak.py: what is drawn does not change, a short run on ranks is right, and what grows is seen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest

from soak_calls import FORMS, KINDS, STREAM_FORMS, Numbers, draw
from soak_watch import JUDGED_CALLS, REGISTRATIONS, Sample, drifts

ROOT = Path(__file__).parents[1]


def test_a_call_is_known_by_its_number() -> None:
    """And every kind and form is drawn."""
    calls = [draw(7, number, 3, True) for number in range(600)]
    assert calls == [draw(7, number, 3, True) for number in range(600)]
    assert calls != [draw(8, number, 3, True) for number in range(600)]
    assert {call.kind for call in calls} == set(KINDS)
    assert {call.form for call in calls} == {*FORMS, *STREAM_FORMS}
    assert {0} < {rows for call in calls for rows in call.rows}
    assert not any(call.algorithm == "native" for call in (draw(7, n, 3, True, with_native=False) for n in range(300)))


def test_what_ranks_must_get() -> None:
    """The oracle, against sums that are made in another way."""
    call = replace(draw(1, 0, 3, False), kind="reduce_scatter", flag=True, rows=(2, 0, 5), rest=(3,), dtype="double")
    for op, reduce in (("sum", np.add), ("prod", np.multiply), ("max", np.maximum)):
        numbers = Numbers(1, replace(call, op=op), 3, 0)
        every = [numbers.sent(rank).view(np.float64) for rank in range(3)]
        got = np.concatenate([numbers.expected(rank).view(np.float64) for rank in range(3)])
        assert np.array_equal(got, reduce.reduce(every))
        assert [len(numbers.expected(rank)) for rank in range(3)] == [6, 0, 15]
    assert not np.array_equal(Numbers(1, call, 3, 0).sent(0), Numbers(1, call, 3, 1).sent(0)), "colours differ"


def test_growth_is_seen() -> None:
    flat = [Sample(n * 1000, n, 10**8 + 4096 * (n % 3) + (n << 20), n << 20, 20, 4, 500 + n % 7) for n in range(60)]
    assert all(drift.flat for drift in drifts(flat))
    assert len(drifts(flat)) == 4
    leaks = [replace(each, rss_bytes=each.rss_bytes + 200 * each.calls) for each in flat]
    opens = [replace(each, descriptors=20 + each.calls // 10_000) for each in flat]
    assert [drift.what for drift in drifts(leaks) if not drift.flat] == ["rest_bytes"]
    assert [drift.what for drift in drifts(opens) if not drift.flat] == ["descriptors"]
    step = [replace(each, rss_bytes=each.rss_bytes + (8 << 20) * (each.calls > 42_000)) for each in flat]
    assert all(drift.flat for drift in drifts(step)), "an allocator's, not a leak"
    lost = [replace(each, descriptors=20 + (each.calls > 42_000)) for each in flat]
    assert [drift.what for drift in drifts(lost) if not drift.flat] == ["descriptors"]
    assert not drifts([each for each in flat if each.calls < JUDGED_CALLS]), "too short to tell"


def test_settings_come_before_mpi() -> None:
    """UCX reads its own when MPI begins, which is when mpi4py is first imported."""
    script = (
        "import sys, soak, soak_watch as w, os; w.steady(); print('mpi4py' in sys.modules, os.environ[w.REGISTRATIONS])"
    )
    for given, seen in (("", "n"), ("y", "y")):
        env = {**os.environ, "PYTHONPATH": "tools:.", REGISTRATIONS: given}
        if not given:
            del env[REGISTRATIONS]
        done = subprocess.run(
            [sys.executable, "-c", script], env=env, cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split() == ["False", seen], done.stderr


@pytest.mark.parametrize("checksums, calls", [("0", 220), ("1", 40)])
def test_a_short_run(mpirun: Callable[..., CompletedProcess[str]], tmp_path: Path, checksums: str, calls: int) -> None:
    arguments = ["tools/soak.py", "-n", calls, "--seed", "11", "--json", tmp_path / "soak.json"]
    arguments += ["--plot", tmp_path / "soak.png"] if checksums == "0" else []
    ended = mpirun(3, arguments, env={"TASP_COLL_CHECKSUM": checksums})
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"{calls} calls" in ended.stdout
    assert "0 wrong: OK" in ended.stdout
    told = json.loads((tmp_path / "soak.json").read_text())
    assert told["tool"] == "soak"
    assert told["wrong"] == 0
    assert [each["rank"] for each in told["results"]] == [0, 1, 2]
    last = told["results"][0]["samples"][-1]
    assert last["calls"] == calls
    assert last["requests"] == 0, "all communicators are closed"
    assert (tmp_path / "soak.png").exists() == (checksums == "0")


def test_what_cannot_run_is_told(mpirun: Callable[..., CompletedProcess[str]]) -> None:
    ended = mpirun(2, ["tools/soak.py", "-n", "50", "--topology", "full_mesh:3"])
    assert ended.returncode == 2
    assert "full_mesh:3" in ended.stderr
