"""tools/break_peers.py: what is seen is judged for what it is, and one case really runs, and leaves nothing running."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import break_peers
import break_peers_job
from break_peers_cases import CASES, ODD, RANKS, Call, Ran, Seen
from break_peers_verdict import judge, names
from launch import find_mpiexec

EVERY = range(RANKS)


def seen(outcome: str, *ranks: int, message: str = "", intact: bool = True) -> list[Seen]:
    return [Seen(rank, outcome, 11.5, message, intact) for rank in ranks]


@pytest.mark.parametrize(
    "ran, kind, told",
    [
        (Ran(seen("error", *EVERY), 10), "error", "error on all after 1.5 s"),
        (Ran(seen("error", 0, 3), 10), "some", "error on ranks 0, 3 after 1.5 s; NO ANSWER from ranks 1, 2 in 9 s"),
        (Ran(seen("right", *EVERY), 10), "right", "right on all"),
        (Ran(seen("wrong", 1) + seen("right", 0, 2, 3), 10), "wrong", "WRONG RESULT, no error, on rank 1; right on"),
        (Ran(seen("wrong", 1) + seen("error", 0, 2, 3), 10), "wrong", "error on ranks 0, 2, 3"),
        (Ran((), 10), "hang", "NO ANSWER from all in 9 s"),
        (Ran((), 10, ended=10.25, status=9), "ended", "job ended after 0.2 s with status 9"),
        (Ran(seen("error", *EVERY), 10, ended=12, status=1), "error", "error on all"),
        (Ran(trouble="no namespaces", skipped=True), "skipped", "no namespaces"),
        (Ran(trouble="no torch"), "broken", "no torch"),
    ],
)
def test_verdicts(ran: Ran, kind: str, told: str) -> None:
    verdict = judge(CASES["shapes"], ran, 9)
    assert (verdict.kind, told in verdict.text) == (kind, True), verdict


def test_only_witnesses_are_waited_for() -> None:
    survivors = [rank for rank in EVERY if rank != ODD]
    verdict = judge(CASES["stopped"], Ran(seen("error", *survivors, message=f"rank {ODD} did not answer"), 10), 9)
    assert (verdict.kind, verdict.named, verdict.intact, verdict.seconds) == ("error", True, True, 1.5)
    verdict = judge(CASES["stopped"], Ran(seen("error", *survivors, message="connection reset", intact=False), 10), 9)
    assert (verdict.named, verdict.intact) == (False, False)


@pytest.mark.parametrize(
    "message, culprits, named",
    [
        ("ranks 0 and 1 do not hear each other", (0, 1), True),
        ("the link from 1 to 0 delivers 0.1 of what is usual", (0, 1), True),
        ("Ranks 1, 2 failed to pass", (2,), True),
        ("[Rank 2]: mismatch", (2,), True),
        ("Read error [127.0.0.2]:2: reset by peer 2", (2,), False),
        ("rank 12 did not answer", (2,), False),
    ],
)
def test_names(message: str, culprits: tuple[int, ...], named: bool) -> None:
    assert names(message, culprits) is named


def test_what_would_be_right() -> None:
    assert CASES["shapes"].right(Call(), 64)[:, 0].tolist() == [1, 2, 3, 3, 4]
    assert (
        CASES["operations"].right(Call("allreduce"), 64)[0, 0]
        == CASES["dtypes"].right(Call("allreduce"), 64)[0, 0]
        == 10
    )
    assert CASES["redop"].right(Call("allreduce", op="max"), 64)[0, 0] == 4
    assert CASES["alike"].right(Call(key="b"), 64)[:, 0].tolist() == [11, 12, 13, 14]
    assert np.array_equal(CASES["never"].right(Call(), 64)[:, 0], [1, 2, 4])


@pytest.mark.skipif(find_mpiexec() is None, reason="no mpiexec")
def test_shapes_that_differ(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ours, as it is quick: a job, its end, the table and the file."""
    tokens: list[str] = []
    end = break_peers_job._end
    monkeypatch.setattr(break_peers_job, "_end", lambda job, token: (tokens.append(token), end(job, token)))
    at = tmp_path / "out.json"
    status = break_peers.main(["--only", "shapes", "--systems", "tasp", "--json", str(at)])
    (result,) = json.loads(at.read_text())["results"]
    if result["kind"] == "skipped":  # another MPI than MPICH
        pytest.skip(result["text"])
    assert (status, result["kind"], result["named"], result["intact"]) == (0, "error", True, True), result
    assert "error on all after" in capsys.readouterr().out
    assert all(f"rank {ODD} passed" in result["messages"][str(rank)] for rank in EVERY)
    assert [break_peers_job.processes(token) for token in tokens] == [[]]


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        break_peers.main(["--only", "shapes,shape"])
    assert "got 'shape'" in capsys.readouterr().err
