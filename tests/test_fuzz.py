"""The inputs of tools/fuzz.py, some of them by hypothesis, which finds small ones; the cases of tools/prove.py."""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fuzz
import fuzz_cli
import fuzz_options
import prove
import prove_options
from fuzz_parsers import PARSERS
from launch import REPOSITORY

COUNTS = {"spec": 600, "topology": 400, "cache": 300, "cli": 300, "env": 150, "results": 80, "cluster": 80, "run": 5}


@pytest.mark.parametrize("name", PARSERS)
def test_only_documented_errors(name: str, tmp_path: Path) -> None:
    """As the tool draws them, from the same grammars."""
    for number in range(COUNTS.get(name, 12)):
        drawn = fuzz.drawn(name, 1, number)
        PARSERS[name].attempt(drawn, tmp_path)


@pytest.mark.parametrize("name", ["spec", "topology", "cache", "cluster"])
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(rng=st.randoms(use_true_random=False))
def test_only_documented_errors_by_hypothesis(name: str, rng: Random, tmp_path_factory: pytest.TempPathFactory) -> None:
    drawn = PARSERS[name].make(rng)
    PARSERS[name].attempt(drawn, tmp_path_factory.getbasetemp())


def test_every_tool_is_there() -> None:
    """Whoever writes a tool enters its command line in `fuzz_cli.TOOLS`."""
    tools = (REPOSITORY / "tools").glob("*.py")
    run = {path.stem for path in tools if re.search(r'^if __name__ == "__main__":', path.read_text(), re.MULTILINE)}
    inside = {"vcluster_inside", "vcluster_line", "doctor_probes"}  # which tools start themselves
    assert {name for name in run - inside if not name.endswith("_worker")} == fuzz_cli.TOOLS.keys()


def test_a_finding_is_told_and_can_be_seen_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def attempt(text: str, folder: Path) -> bool:
        if text.startswith("torus"):
            raise KeyError(text)
        return len(text) > 12

    monkeypatch.setitem(PARSERS, "spec", PARSERS["spec"]._replace(attempt=attempt))
    monkeypatch.setattr(fuzz, "_limit_memory", lambda gib: None)  # of this process
    out = tmp_path / "found.json"
    assert fuzz.main(["--parser", "spec", "--inputs", "60", "--json", str(out)]) == 1
    told = capsys.readouterr().out
    (row,) = json.loads(out.read_text())["results"]
    assert row["inputs"] == 60 == row["taken"] + row["refused"] + len(row["findings"])
    first = row["findings"][0]
    assert first["again"] in told
    assert fuzz.main(first["again"].split()[2:]) == 1
    assert first["input"] in capsys.readouterr().out


def test_an_input_that_hangs_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def attempt(given: object, folder: Path) -> bool:
        while True:
            pass

    monkeypatch.setitem(PARSERS, "spec", PARSERS["spec"]._replace(attempt=attempt))
    assert isinstance(fuzz.tried("spec", "", tmp_path, 0.01), fuzz.HangError)


def test_shares_are_kept_whatever_the_number() -> None:
    options = fuzz_options.parse(["--inputs", "1000", "--first", "5"])
    listed = fuzz.numbers(options)
    assert len(listed) == len(set(listed)) == 1000
    assert min(number for _, number in listed) == 5
    assert {name for name, _ in listed} == fuzz_options.SHARES.keys()


# --- proof and execution


def test_proof_and_execution_agree() -> None:
    tally = prove.Tally()
    prove.prove(prove_options.parse(["--cases", "100", "--ranks", "6", "--seed", "3"]), tally)
    assert not tally.disagreements, tally.disagreements[0]
    assert tally.cases == 100
    assert tally.mutants["refused, runs wrong"] > 100


def test_a_proof_that_proves_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_refusal", lambda schedule: None)
    tally = prove.Tally()
    prove.prove(prove_options.parse(["--cases", "10", "--ranks", "4"]), tally)
    assert any("is proved, and runs wrong" in told for told in tally.disagreements)


def test_a_proof_that_refuses_all_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prove, "_refusal", lambda schedule: prove.ScheduleError("no"))
    tally = prove.Tally()
    prove.prove(prove_options.parse(["--cases", "10", "--ranks", "4", "--mutants", "8"]), tally)
    assert any(": is refused" in told for told in tally.disagreements)
    assert any("is refused, and runs right" in told for told in tally.disagreements)
