"""tools/paper_tables.py: every figure has its row, two parameters, and what they do."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

import paper_tables
from paper_figures import EXPLANATIONS, FIGURES, H100, MI300X, OVER_CCR
from paper_tables import MISSED, Parameters, compared, fit, main, ours, speedups


def test_the_papers_figures_are_all_there() -> None:
    one_node = {(figure.machine, figure.causal, figure.statistic) for figure in FIGURES[:8]}
    assert one_node == {(m, c, s) for m in (H100, MI300X) for c in (True, False) for s in ("average", "best")}
    assert len(FIGURES) == 12
    assert len(OVER_CCR) == 5
    assert {figure.fitted for figure in FIGURES} - {""} == {field.name for field in fields(Parameters)}


def test_where_one_send_fills_the_port_nothing_is_won_behind_a_switch() -> None:
    assert all(speedup == pytest.approx(1) for speedup in speedups(FIGURES[0], Parameters(10.0, 1.0)))


def test_the_cost_of_a_step_bounds_what_links_give() -> None:
    best = next(figure for figure in FIGURES if figure.fitted == "step_us")
    free, dear = (ours(best, Parameters(step, 1.0)) for step in (0.0, 1000.0))
    assert 1 < dear < free < 7


def test_the_fit_meets_its_rows_and_every_miss_is_explained() -> None:
    rows = compared(fit())
    for row in rows:
        if row.fitted:
            assert abs(row.error) < 0.02
        elif abs(row.error) > MISSED:
            assert any(part in row.row for part in EXPLANATIONS), row
    over_ccr = [row for row in rows if ", CCR " in row.row]
    assert len(over_ccr) == len(OVER_CCR)
    assert all(abs(row.error) < MISSED for row in over_ccr)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, plot = tmp_path / "o.json", tmp_path / "o.svg"
    assert main(["--json", str(path), "--plot", str(plot)]) == 0
    said = capsys.readouterr().out
    assert all(figure.name in said for figure in FIGURES)
    assert "not explained within 15 %" in said
    told = json.loads(path.read_text())
    assert set(told["fitted"]) == {"step_us", "send_share"}
    assert len(told["results"]) == len(FIGURES) + 2 * len(OVER_CCR)
    assert plot.stat().st_size > 1000
    assert main(["--json", str(tmp_path / "none" / "o.json")]) == 2
    with pytest.raises(SystemExit):
        paper_tables.main(["--plot", "o.txt"])
