"""tools/gpu_report.py without a GPU: how steps end, what is kept, the tables; attention's step loop on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_report_steps
from gpu_report import run
from gpu_report_steps import JSON, Step, steps
from gpu_report_text import markdown
from launch import REPOSITORY

SAYS = "import json, sys; json.dump({'copy_GBps': 1000.0, 'results': [ROW]}, open(sys.argv[1], 'w'))"
ROW = {"size_bytes": 1 << 20, "algorithm": "rings", "time_us": {"median": 10.0}, "busbw_GBps": 90.0, "copy_share": 0.5}


def python(source: str, *arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-c", source, *arguments)


def test_steps_end_in_time_and_what_was_found_is_kept() -> None:
    found = SAYS.replace("ROW", str(ROW))
    chosen = [
        Step("share: 2 ranks", python(found, JSON), 20),
        Step("hangs", python(f"{found}\nimport time; time.sleep(60)", JSON), 2),
        Step("fails", python("raise SystemExit('no luck')"), 20),
        Step("is not there", ("/nonexistent",), 20),
    ]
    saved: list[list[str]] = []
    begun = time.monotonic()
    report = run(chosen, 100, lambda sofar: saved.append(list(sofar)))
    assert time.monotonic() - begun < 50
    assert [each["status"] for each in report.values()] == ["ok", "timeout", "failed", "failed"]
    assert report["hangs"]["found"]["results"] == [ROW]  # what it had written before
    assert [len(names) for names in saved] == [1, 2, 3, 4]
    assert "no luck" in report["fails"]["tail"]


def test_without_time_nothing_is_begun() -> None:
    report = run([Step("late", python("raise SystemExit(1)"), 20)], 0.5, lambda sofar: None)
    assert report["late"]["status"] == "skipped"


def test_tables() -> None:
    loop = {
        "local_tokens": 8192,
        "causal": True,
        "kernel": "cudnn",
        "forward": {"share": 0.97},
        "backward": {"share": 0.9},
    }
    wide = [{**ROW, "algorithm": name, "host_us": 12.25} for name in ("rings", "native")]
    method = {"method": "tasp", "time_us": {"median": 2000.0}}
    found: dict[str, tuple[list[Any], str]] = {
        "share: 4 ranks": ([ROW], "| 1 MiB | rings | 10.0 | 90.0 | 0.50 |"),
        "overhead: ipc, graphs": (wide, "| 1 MiB | native | 12.2 | 10.0 |"),
        "busbw: nccl": (wide, "| 1 MiB | 90.0 | 90.0 |"),
        "attention: step loop": ([loop], "| 8192 | causal | cudnn | 0.970 | 0.900 |"),
        "attention: full": ([method], "| tasp | 2.00 |"),
    }
    ended = {"status": "ok", "seconds": 3.0, "tail": "", "command": "a command"}
    machine = {"gpus": 1, "name": "a GPU", "cupy": "14.0", "driver": 12080}
    report = {name: {**ended, "found": {"copy_GBps": 1000.0, "results": rows}} for name, (rows, _) in found.items()}
    skipped = {**ended, "tail": "12 skipped in 1 s", "found": None}
    text = markdown({"machine": machine, "steps": {**report, "tests: ipc, 2 ranks": skipped}})
    for name, (_, row) in found.items():
        assert f"**{name}**: `a command`" in text
        assert row in text
    assert "| tests: ipc, 2 ranks | all tests skipped | 3 |" in text


def test_the_plan_for_one_and_for_several_gpus(monkeypatch: Any) -> None:
    monkeypatch.setattr(gpu_report_steps, "mpiexec", lambda: ("mpiexec",))
    one, several = ({step.name: step for step in steps(gpus, [2, 4, 8])} for gpus in (1, 8))
    assert set(several) - set(one) == {"busbw: nccl", "busbw: ipc", "attention: full", "attention: causal"}
    assert {"share: 2 ranks", "share: 4 ranks", "attention: step loop", "overhead: ipc, no graphs"} <= set(one)
    shown = several["busbw: ipc"].shown()
    assert shown.startswith("mpiexec -n 8 python")
    assert "tools/all_gather_perf.py --device cuda" in shown
    for step in several.values():  # as the tools themselves read them
        script = next((word for word in step.command if word.startswith("tools/")), "pytest")
        assert script == "pytest" or (REPOSITORY / script).exists()


def test_without_a_gpu_it_says_so() -> None:
    ended = subprocess.run([sys.executable, "tools/gpu_report.py"], cwd=REPOSITORY, capture_output=True, text=True)
    if ended.returncode != 2:
        return  # there is one: the command is its own test
    assert "no GPU that CuPy can use" in ended.stderr


def test_attentions_step_loop_without_a_gpu(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    flags = "--device cpu -d float32 --local-tokens 34 --ranks 3 --heads 2 --head-dim 16 -n 1 -w 0"
    command = [sys.executable, "tools/attention_steps_perf.py", *flags.split(), "--json", str(path)]
    ended = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(path.read_text())["results"]
    assert [(row["local_tokens"], row["causal"], row["ranks"]) for row in rows] == [(34, False, 3), (34, True, 3)]
    assert all(row[part]["share"] > 0 for row in rows for part in ("forward", "backward"))
