"""What train_lm.py tells while it trains, and the files that it writes besides checkpoints."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tasp_coll
from perf_report import write_json
from tasp_coll.files import writing
from train_lm_options import Options

TOOL = "train_lm"


@dataclass(frozen=True)
class Step:
    """What one step showed."""

    step: int
    loss: float
    gradient_norm: float
    seconds: float
    tokens_per_second: float

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Report:
    """What rank 0 tells, and the files that it writes; nothing on other ranks."""

    def __init__(self, comm: tasp_coll.Communicator, options: Options, model: Any) -> None:
        self._comm, self._options = comm, options
        self._bar: Any = None
        parameters = sum(parameter.numel() for parameter in model.parameters())
        chosen = {name: getattr(options, name) for name in ("seq_len", "batch", "dtype", "method", "kv_bits")}
        self._model = {"kind": type(model).__name__, "parameters": parameters, **chosen}
        self._rows = 0
        if comm.rank == 0:
            self._begin()

    def row(self, step: Step) -> None:
        """One step; of many only some are shown."""
        if self._comm.rank != 0:
            return
        self._rows += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {step.loss:.3f}", refresh=False)
            self._bar.update()
        if self._rows == 1 or self._rows % -(-self._options.steps // 20) == 0 or self._rows == self._options.steps:
            self._write(f"{step.step:>6} {step.loss:>9.4f} {step.gradient_norm:>9.3f} {step.tokens_per_second:>10.0f}")

    def end(self, results: Sequence[Step]) -> None:
        """Files."""
        if self._comm.rank != 0:
            return
        if self._bar is not None:
            self._bar.close()
        options, comm = self._options, self._comm
        if options.json is not None:
            head = {"tool": TOOL, "version": tasp_coll.__version__, "world_size": comm.size}
            head |= {"transport": comm.transport, "topology": comm.topology.name, "model": self._model}
            write_json(options.json, head, results)
        if options.plot is not None:
            _draw(options.plot, f"{TOOL}: {_ranks(comm)}, {options.seq_len} tokens", results)

    def _begin(self) -> None:
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm
            except ImportError:
                pass
            else:
                self._bar = tqdm(total=self._options.steps, unit="step", leave=False)
        model, comm = self._model, self._comm
        self._write(f"# {TOOL}, tasp-coll {tasp_coll.__version__}")
        self._write(f"# {model['kind']}, {model['parameters']} parameters, {model['dtype']}")
        self._write(
            f"# {model['batch']} x {model['seq_len']} tokens over {_ranks(comm)}, method {model['method']}, "
            f"transport {comm.transport}, topology {comm.topology.name}"
        )
        self._write(f"#{'step':>5} {'loss':>9} {'norm':>9} {'tokens/s':>10}")

    def _write(self, line: str) -> None:
        if self._bar is None:
            print(line, flush=True)
        else:
            self._bar.write(line, file=sys.stdout)


def _ranks(comm: tasp_coll.Communicator) -> str:
    return f"{comm.size} rank{'s' if comm.size > 1 else ''}"


def _draw(path: Path, title: str, results: Sequence[Step]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(drawing)
    axes = drawing.subplots()
    axes.plot([each.step for each in results], [each.loss for each in results])
    axes.set(title=title, xlabel="step", ylabel="loss (nats per byte)")
    axes.grid(alpha=0.3)
    with writing(path) as partial:
        drawing.savefig(partial, dpi=120)
