"""What train_dynasty.py tells while it trains and in the end, and the files that it writes besides checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

import tasp_coll
import train_dynasty_models
import train_dynasty_plot
from perf_report import line, write_json
from train_dynasty_data import DataSet, spread
from train_dynasty_options import Options
from train_dynasty_ranks import Ranks
from train_dynasty_results import OPERANDS, Outcome, Row, rows
from train_dynasty_run import steps_of
from train_dynasty_tasks import TOOL, Task

MODELLED = "speed and energy: modelled cycles and pJ of a bit-scalable array against all in 8 bits, no wall-clock"
_COLUMNS = (
    *(("config", -13), ("runs", 4), ("diverged", 8), ("accuracy %", 14), ("diff", 14), ("loss", 17), ("diff", 17)),
    *(("bits a/w/g", 14), ("speed", 6), ("energy", 6), ("changed %", 10), ("analytics %", 11)),
)
_EXCHANGED = (
    *(("config", -13), ("grads", -8), ("bytes/step", 11), ("float32/", 8), ("step s", 8), ("exchange s", 10)),
    *(("accuracy %", 14), ("diff", 14), ("loss", 17), ("diff", 17)),
)


class Report:
    """What rank 0 tells, and the files that it writes; nothing on other ranks. done: runs that were there before."""

    def __init__(
        self, options: Options, ranks: Ranks, data: DataSet, tasks: Sequence[Task], done: Sequence[Outcome]
    ) -> None:
        self._options, self._ranks, self._data, self._tasks = options, ranks, data, tasks
        self._outcomes = list(done)
        self._bar: Any = None
        if ranks.rank == 0:
            self._begin()

    def step(self, loss: float) -> None:
        """A step of a training in this process."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self._bar.update()

    def steps(self, count: int) -> None:
        """All of a training in another process."""
        if self._bar is not None:
            self._bar.update(count)

    def add(self, outcome: Outcome) -> None:
        """A run that has ended; the file is written anew."""
        self._outcomes.append(outcome)
        if self._ranks.rank != 0:
            return
        loss = "not finite" if outcome.loss is None else f"{outcome.loss:.4f}"
        kind = outcome.config if outcome.grads is None else f"{outcome.config} grads {outcome.grads}"
        told = f"# {kind} seed {outcome.seed}: accuracy {100 * outcome.accuracy:.2f} %, loss {loss}"
        self._write(f"{told}, {outcome.seconds:.1f} s{', DIVERGED' if outcome.diverged else ''}")
        if self._options.json is not None:
            head = {"tool": TOOL, "version": tasp_coll.__version__, "torch": torch.__version__}
            write_json(self._options.json, {**head, "setting": self._setting()}, self._outcomes)

    def end(self) -> None:
        """Tables and the picture, of the runs that were asked for."""
        if self._ranks.rank != 0:
            return
        if self._bar is not None:
            self._bar.close()
        asked = {(*task.row, task.seed) for task in self._tasks}
        found = rows([outcome for outcome in self._outcomes if outcome.key in asked], self._options.against)
        for told in tables(found, self._options.against):
            print(told, flush=True)
        if self._options.plot is not None:
            train_dynasty_plot.draw(self._options.plot, f"{TOOL}: {self._what()}", found)

    def _begin(self) -> None:
        options, left = self._options, len(self._tasks) - len(self._already())
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(total=left * steps_of(options, self._data), unit="step", leave=False)
        with torch.device("meta"):  # takes no memory
            model = train_dynasty_models.build(options, self._data)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        data, ranks = self._data, self._ranks.size
        halves = ((data.train, options.images), (data.test, options.test_images))
        trained, tested = (len(spread(len(half), wanted)) for half, wanted in halves)
        steps = steps_of(options, data) // options.epochs
        work = f"{ranks} rank{'s' if ranks > 1 else ''}; {left} of {len(self._tasks)} runs to do"
        made = f"{options.model} of {parameters} parameters"
        how = f"{options.optimizer}, lr {options.lr:g}"
        self._write(f"# {TOOL}, tasp-coll {tasp_coll.__version__}, torch {torch.__version__}")
        self._write(f"# {made}, {data.name}: {trained} to train on, {tested} to test on")
        self._write(f"# {options.epochs} x {steps} steps of {options.batch}, {how}; {work}")
        self._write(f"# {MODELLED}")

    def _already(self) -> list[Task]:
        known = {outcome.key for outcome in self._outcomes}
        return [task for task in self._tasks if (*task.row, task.seed) in known]

    def _setting(self) -> dict[str, Any]:
        return self._options.setting(self._ranks.size)

    def _what(self) -> str:
        return f"{self._options.model} on {self._data.name}"

    def _write(self, told: str) -> None:
        if self._bar is None:
            print(told, flush=True)
        else:
            self._bar.write(told, file=sys.stdout)


def tables(found: Sequence[Row], against: str) -> list[str]:
    """Lines: of all rows, of what travelled between ranks if anything did, and of what diverged."""
    exchanged = any(row.grads is not None for row in found)
    head, cells = (_EXCHANGED, _exchanged) if exchanged else (_COLUMNS, _cells)
    widths = [width for _, width in head]
    base = next((f"{row.config} grads {row.grads}" for row in found if exchanged and row.config == against), against)
    told = [f"# +-: half of the 95 % confidence interval over seeds; diff: to {base}, paired by seed"]
    told.append(f"# {MODELLED}")
    told.append("#" + line([name for name, _ in head], widths))
    told += [" " + line(cells(row), widths) for row in found]
    told += [
        f"# {run.config}{f' grads {run.grads}' if run.grads else ''} seed {run.seed} diverged: {run.diverged}"
        for row in found
        for run in row.runs
        if run.diverged
    ]
    return told


def _cells(row: Row) -> list[str]:
    bits = [row.mean("bits", name) for name in OPERANDS]
    changed = row.mean("changed", "mean")
    highest = max((run.changed["max"] for run in row.runs if run.changed), default=None)
    analytics = row.estimate("analytics_share")
    return [
        row.config,
        str(len(row.runs)),
        str(sum(bool(run.diverged) for run in row.runs)),
        *_learnt(row),
        "-" if None in bits else "/".join(f"{each:.2f}" for each in bits if each is not None),
        *(_told(row.mean("ratios", name), 2) for name in ("cycles", "energy_pj")),
        "-" if changed is None or highest is None else f"{100 * changed:.1f}/{100 * highest:.1f}",
        "-" if analytics is None else f"{100 * analytics.mean:.2f}",
    ]


def _exchanged(row: Row) -> list[str]:
    sent = {name: row.mean("exchange", name) for name in ("bytes", "float32_bytes", "step_seconds", "seconds")}
    ratio = sent["float32_bytes"] / sent["bytes"] if sent["bytes"] and sent["float32_bytes"] else None
    seconds = [_told(sent[name], 4) for name in ("step_seconds", "seconds")]
    return [row.config, row.grads or "", _told(sent["bytes"], 0), _told(ratio, 2), *seconds, *_learnt(row)]


def _learnt(row: Row) -> list[str]:
    """Accuracy and loss, and their differences."""
    cells = []
    for name, digits, scale in (("accuracy", 2, 100.0), ("loss", 4, 1.0)):
        for found, sign in ((row.estimate(name), ""), (row.difference(name), "+")):
            cells.append("-" if found is None else found.told(digits, scale, sign))
    return cells


def _told(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
