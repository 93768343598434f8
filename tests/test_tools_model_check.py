"""tools/model_check.py: predictions beside measurements, from files and from clusters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import model_check
from model_check import Check, checks_of, main
from model_check_cases import CASES
from results_file import ResultsError
from tasp_coll import Topology


def told(*pairs: tuple[float | None, float]) -> dict[str, Any]:
    """A file of a bandwidth test."""
    return {
        "results": [
            {"algorithm": f"a{at}", "size_bytes": 8, "predicted_us": predicted, "time_us": {"median": measured}}
            for at, (predicted, measured) in enumerate(pairs)
        ]
    }


def test_cases_have_names_of_their_own_and_topologies_that_exist(tmp_path: Path) -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        flags = case.cluster(tmp_path)
        spec = flags[flags.index("--topology") + 1]
        found = Topology.from_file(spec) if case.dead else Topology.preset(spec)
        if case.dead:
            assert found.link(*case.dead) is None
        assert case.topology in case.command


def test_what_files_have(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps(told((110.0, 100.0), (None, 5.0))))
    assert list(checks_of(path, "x")) == [Check("x", "a0 8", 110.0, 100.0)]
    attention = {"method": "tasp", "ccr": 0.5, "predicted_us": 90.0, "time_us": {"median": 100.0}}
    path.write_text(json.dumps({"results": [attention]}))
    (check,) = checks_of(path, "y")
    assert check.error == pytest.approx(-0.1)
    assert check.what == "tasp CCR 0.50"
    for text, rule in (
        ("{}", "list of results"),
        ('{"results": [{"predicted_us": "1"}]}', r"\[0\].predicted_us must be"),
    ):
        path.write_text(text)
        with pytest.raises(ResultsError, match=rf"run\.json.*{rule}"):
            list(checks_of(path, "z"))


@pytest.mark.parametrize(
    "pairs, status",
    [
        ([(104.0, 100.0), (97.0, 100.0)], 0),
        ([(104.0, 100.0), (97.0, 100.0), (120.0, 100.0)], 1),
        ([(107.0, 100.0), (93.0, 100.0)], 1),
    ],
)
def test_the_verdict(
    pairs: list[tuple[float, float]], status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, plot = tmp_path / "run.json", tmp_path / "out.json", tmp_path / "out.svg"
    path.write_text(json.dumps(told(*pairs)))
    assert main(["--results", str(path), "--json", str(out), "--plot", str(plot)]) == status
    printed = capsys.readouterr().out
    assert f"{len(pairs)} predictions: median error" in printed
    assert len(json.loads(out.read_text())["results"]) == len(pairs)
    assert plot.stat().st_size > 1000


@pytest.mark.parametrize("text", ["", "[]", '{"results": [{}]}', '{"results": []}'])
def test_files_that_are_no_results(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    assert main(["--results", str(path)]) == 2
    assert "model_check.py:" in capsys.readouterr().err


def test_a_case_that_fails_is_told_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = model_check.CASES[0]
    monkeypatch.setattr(type(broken), "cluster", lambda self, folder: ["--topology", "nonsense", "--link-mbit", "1"])
    assert main(["--only", broken.name, "--keep", str(tmp_path)]) == 2
    assert f"{broken.name}: exit status" in capsys.readouterr().err
