"""Trainings of train_dynasty.py: paired, written down, resumed, drawn; what diverges is told."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import dynasty
import train_dynasty_models
import train_dynasty_options
import train_dynasty_plot
import train_dynasty_report
import train_dynasty_results
import train_dynasty_run
from launch import REPOSITORY
from train_dynasty_data import DataSet, Images
from train_dynasty_options import Options
from train_dynasty_ranks import Ranks
from train_dynasty_results import Outcome
from train_dynasty_tasks import LONG
from train_dynasty_watch import Watch

MpiRun = Callable[..., CompletedProcess[str]]
TOOL = REPOSITORY / "tools" / "train_dynasty.py"
SMALL = ["--width", "4", "--depth", "1", "--images", "192", "--batch", "16", "--refresh", "2", "--warmup", "3"]


def options(*argv: str) -> Options:
    return train_dynasty_options.parse("about", [*SMALL, *argv], quiet=False)


def made() -> DataSet:
    """Images of which the upper or the lower half is bright."""
    rng = np.random.default_rng(1)
    labels = torch.from_numpy(rng.integers(0, 2, 240).astype(np.uint8))
    pixels = torch.from_numpy(rng.integers(0, 100, (240, 1, 8, 8)).astype(np.uint8))
    for image, label in zip(pixels, labels.tolist(), strict=True):
        image[0, 4 * label : 4 * label + 4] += 100
    halves = [Images(pixels[part], labels[part], (0.3,), (0.3,), moved=False) for part in (slice(192), slice(192, 240))]
    return DataSet("made", 2, (1, 8, 8), *halves)


def outcomes(asked: Options) -> list[Outcome]:
    return [train_dynasty_run.run(asked, task, made(), Ranks()) for task in asked.tasks(1)]


def test_rows_begin_alike_and_all_learn(tmp_path: Path) -> None:
    asked = options("--configs", "float32,8,dynamic:4", "--evals", "3", "--checkpoint", str(tmp_path / "saved"))
    plain, eight, dynamic = found = outcomes(asked)
    assert all(run.accuracy > 0.9 and not run.diverged for run in found)
    assert [test["step"] for test in dynamic.tests] == [4, 8, 12]
    assert plain.history[0]["loss"] == pytest.approx(eight.history[0]["loss"], rel=0.05), "same weights, same images"
    assert (plain.bits, plain.cost, plain.maps, eight.maps) == (None, None, None, None)
    assert eight.bits == dict.fromkeys(train_dynasty_results.OPERANDS, 8.0)
    assert eight.ratios == {"cycles": 1.0, "energy_pj": 1.0}
    assert dynamic.ratios is not None
    assert dynamic.ratios["cycles"] > 1
    assert [record["step"] for record in dynamic.history] == [3, 5, 7, 9, 11]
    assert dynamic.maps is not None
    assert dynamic.maps["0"]["weights"][0].isdecimal()
    json.dumps(dynamic.record(), allow_nan=False)
    # What was saved is the whole state of a model that is made anew.
    state = load_file(tmp_path / "saved" / "dynamic4-seed1.safetensors")
    model: nn.Module = dynasty.convert(train_dynasty_models.build(asked, made()), asked.configs[2].config())
    model.load_state_dict(state)
    widths = "".join(map(str, model.dynasty.maps()["0"].weights.flatten().tolist()))
    assert widths == "".join(dynamic.maps["0"]["weights"])


def test_a_training_comes_out_the_same_again() -> None:
    asked = options("--configs", "dynamic:4", "--evals", "1")
    first, second = outcomes(asked), outcomes(asked)
    assert [replace(run, seconds=0) for run in first] == [replace(run, seconds=0) for run in second]


def test_what_diverges_is_told() -> None:
    (run,) = outcomes(options("--configs", "float32", "--lr", "1e30"))
    assert run.loss is None
    assert run.diverged.startswith("loss not finite at step")
    assert run.steps < 12, "no step could help any more"
    (row,) = train_dynasty_results.rows([run], "float32")
    told = train_dynasty_report.tables([row], "float32")
    assert any(line.startswith("# float32 seed 1 diverged: loss not finite") for line in told)
    assert json.loads(json.dumps(run.record(), allow_nan=False))["loss"] is None


def test_a_loss_that_stays_at_its_start_is_a_divergence() -> None:
    good, stuck, spiked = Watch(), Watch(), Watch()
    for step in range(1, LONG + 20):
        good.see(step, 2.3 * 0.99**step)
        stuck.see(step, 2.3)
        spiked.see(step, 9.0 if step == 50 else 1.0 if step > 1 else 2.3)
    assert (good.diverged, spiked.diverged) == ("", "")
    assert stuck.diverged == "loss not below 0.97 of its start for 100 steps up to 100"
    assert not stuck.lost
    stuck.see(LONG + 20, math.nan)
    assert stuck.lost


def test_rates_rise_and_fall() -> None:
    rates = [train_dynasty_run.schedule(step, 100) for step in range(1, 101)]
    assert rates[4] == 1
    assert rates[:5] == sorted(rates[:5])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[-1] == pytest.approx(0)
    assert train_dynasty_run.schedule(1, 1) == 1


def test_a_table_and_a_picture_of_made_up_runs(tmp_path: Path) -> None:
    history = [{"step": step, "loss": 1.0, "cycles": 10.0 * step, "activations": 4, "weights": 5} for step in (10, 20)]
    maps = {"a": {"activations": ["45"], "weights": ["4545", "3338"], "gradients": ["4"]}}
    cost = {"cycles": 10.0, "cycles_8bit": 45.0, "energy_pj": 2.0, "energy_pj_8bit": 5.0, "macs": 1.0, "parts": {}}
    base = [Outcome("8", None, seed, 0.8 + seed / 100, 0.5, "", 20, 1.0) for seed in (1, 2)]
    bits = dict.fromkeys(train_dynasty_results.OPERANDS, 4.0)
    seen = {"mean": 0.02, "max": 0.06}
    mine = [
        replace(
            run,
            config="dynamic:4.5",
            accuracy=run.accuracy - 0.01,
            bits=bits,
            cost=cost,
            changed=seen,
            analytics_share=0.012,
            history=history,
            tests=[{"step": 20, "accuracy": 0.7, "loss": None}],
            maps=maps,
        )
        for run in base
    ]
    rows = train_dynasty_results.rows([*base, *mine], "8")
    told = train_dynasty_report.tables(rows, "8")
    cells = told[-1].split()
    assert cells[:6] == ["dynamic:4.5", "2", "0", "80.50", "+-6.35", "-1.00"]
    assert cells[-5:] == ["4.00/4.00/4.00", "4.50", "2.50", "2.0/6.0", "1.20"]
    assert any("no wall-clock" in line for line in told)
    train_dynasty_plot.draw(tmp_path / "x.png", "title", rows)
    assert (tmp_path / "x.png").stat().st_size > 10_000
    tile = train_dynasty_plot.tile(maps["a"])
    assert tile[0, 2:].tolist() == [4, 5, 4, 5], "activations above each tap"
    assert tile[2:, 0].tolist() == [4, 4]
    canvas, places = train_dynasty_plot.packed([tile, tile.T, tile])
    for (top, left), each in zip(places, (tile, tile.T, tile), strict=True):
        np.testing.assert_array_equal(canvas[top : top + each.shape[0], left : left + each.shape[1]], each)
    assert np.isfinite(canvas).sum() == 3 * np.isfinite(tile).sum(), "nothing overlaps"


def test_a_command_that_was_cut_off_goes_on(mpirun: MpiRun, tmp_path: Path) -> None:
    text, runs = tmp_path / "text", tmp_path / "runs.json"
    text.write_bytes(b"to be or not to be, that is the question. " * 60)
    how = ["--model", "llama", "--width", "32", "--depth", "1", "--seq-len", "16", "--data", text, "--batch", "16"]
    how += ["--test-images", "4", "--json", runs, "--plot", tmp_path / "runs.svg", "--resume"]
    first = mpirun(1, [TOOL, *how, "--configs", "8"])
    assert first.returncode == 0, first.stderr
    assert not first.stderr, "no progress bar where there is no terminal"
    second = mpirun(1, [TOOL, *how, "--configs", "8,dynamic:4", "--jobs", "2"])
    assert second.returncode == 0, second.stderr
    assert "1 of 2 runs to do" in second.stdout
    results = json.loads(runs.read_text())["results"]
    assert [run["config"] for run in results] == ["8", "dynamic:4"]
    assert (tmp_path / "runs.svg").stat().st_size > 10_000


def test_ranks_share_a_training_and_their_gradients(mpirun: MpiRun, tmp_path: Path) -> None:
    text, runs = tmp_path / "text", tmp_path / "runs.json"
    text.write_bytes(b"to be or not to be, that is the question. " * 40)
    how: list[str | Path] = ["--model", "llama", "--width", "32", "--depth", "1", "--seq-len", "16", "--data", text]
    how += ["--batch", "16", "--refresh", "2", "--warmup", "2", "--configs", "dynamic:4", "--json", runs]
    done = mpirun(2, [TOOL, *how, "--grad-bits", "float32,8,dynamic", "--timeout", "60"])
    assert done.returncode == 0, done.stderr
    plain, eight, dynamic = json.loads(runs.read_text())["results"]
    assert plain["exchange"]["bytes"] == pytest.approx(plain["exchange"]["float32_bytes"], rel=0.05)
    assert eight["exchange"]["bytes"] < 0.3 * plain["exchange"]["bytes"]
    assert dynamic["exchange"]["bytes"] < 0.15 * plain["exchange"]["bytes"]
    assert dynamic["loss"] == pytest.approx(plain["loss"], rel=0.05)
    assert "diff: to dynamic:4 grads float32" in done.stdout


def test_what_cannot_be_done_is_told_once_and_soon(mpirun: MpiRun, tmp_path: Path) -> None:
    cases: tuple[tuple[int, list[str | Path], str], ...] = (
        (2, ["--batch", "63"], "--batch must be a multiple of the 2 ranks, got 63"),
        (2, ["--data", tmp_path], "apt-get install dataset-fashion-mnist"),
    )
    for ranks, flags, told in cases:
        ended = mpirun(ranks, [TOOL, *flags])
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count(told) == 1, ended.stderr


def test_workers_end_with_the_command_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "import train_dynasty_run\n"
        "if __name__ == '__main__':\n"
        "    begin = train_dynasty_run.leave_with\n"
        "    pool = ProcessPoolExecutor(1, get_context('spawn'), initializer=begin, initargs=(os.getpid(),))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    pool.submit(time.sleep, 600)\n"
        "    time.sleep(600)\n"
    )
    where = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TOOL.parent), str(REPOSITORY)])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=where) as parent:
        assert parent.stdout is not None
        worker = Path(f"/proc/{int(parent.stdout.readline())}")
        assert worker.exists()
        parent.kill()
    for _ in range(200):
        if not _runs(worker):
            return
        time.sleep(0.1)
    pytest.fail("the worker goes on")


def _runs(process: Path) -> bool:
    """Whether it is there and no zombie, which an init that reaps nothing leaves."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
