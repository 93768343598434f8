"""tools/attention_curve.py on written results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import attention_curve


def run(path: Path, ccr: float, tasp: float, ring: float, causal: bool = False) -> str:
    methods = {"tasp": tasp, "ring": ring, "ulysses": 3 * tasp}
    results = [
        {"method": name, "ccr": ccr, "causal": causal, "ideal_us": 0.9 * time, "time_us": {"median": time}}
        for name, time in methods.items()
    ]
    path.write_text(json.dumps({"tool": "attention_perf", "world_size": 8, "results": results}))
    return str(path)


def test_the_ideal_is_the_published_one() -> None:
    wanted = {0.1: 6.5, 0.39: 2.69, 0.65: 1.66, 0.8: 1.38, 0.98: 1.15, 1.17: 1.0}
    for ccr, ratio in wanted.items():
        assert attention_curve.ideal(ccr, 8) == pytest.approx(ratio, abs=0.03)


def test_rows_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [run(tmp_path / "b.json", 0.8, 2.0, 2.5, causal=True), run(tmp_path / "a.json", 0.1, 1.0, 6.0)]
    assert attention_curve.main([*runs, "--plot", str(tmp_path / "curve.png")]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert rows == [
        ["0.1", "full", "6.00", "-", "3.00", "6.52", "0.92", "1.11"],
        ["0.8", "causal", "1.25", "-", "3.00", "1.38", "0.91", "1.11"],
    ]
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{}", "no json", '{"tool": "attention_perf", "results": []}'])
def test_what_is_no_run_is_named(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    assert attention_curve.main([str(path)]) == 2
    assert capsys.readouterr().err.startswith("attention_curve.py: ")
