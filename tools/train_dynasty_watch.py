"""What train_dynasty.py writes down while a model trains: whether it diverges, and what its controller does."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean
from typing import Any

from train_dynasty_options import Options
from train_dynasty_results import OPERANDS
from train_dynasty_tasks import LONG, Precision

_SMOOTH = 0.9  # what a step leaves of the running mean
_LEARNT = 0.97  # of the loss's start: above it nothing has been learnt
_SHOWN = 200  # records of the history that are kept


@dataclass
class Watch:
    """Calls it a divergence when the loss is not finite, or for LONG steps in a row not below its start."""

    diverged: str = ""
    _start: float = math.nan
    _smooth: float = math.nan
    _above: int = 0

    def see(self, step: int, loss: float) -> None:
        """A step's loss."""
        if not math.isfinite(loss):
            self.diverged = f"loss not finite at step {step}"
            return
        if math.isnan(self._start):
            self._start = self._smooth = loss
        self._smooth += (1 - _SMOOTH) * (loss - self._smooth)
        self._above = self._above + 1 if self._smooth > _LEARNT * self._start else 0
        if self._above == LONG:
            self.diverged = self.diverged or f"loss not below {_LEARNT} of its start for {LONG} steps up to {step}"

    @property
    def lost(self) -> bool:
        """Whether no step can help any more."""
        return "finite" in self.diverged


@dataclass
class Diary:
    """Of one training: a record at each refresh, that of the controller among them unless all is in float32."""

    options: Options
    precision: Precision
    history: list[dict[str, Any]] = field(default_factory=list)
    tests: list[dict[str, Any]] = field(default_factory=list)
    _losses: list[float] = field(default_factory=list)

    def see(self, step: int, loss: float, controller: Any) -> None:
        """A step's loss; the controller after it."""
        self._losses.append(loss)
        done = step - self.options.warmup
        if done < 0 or done % self.options.refresh:
            return
        average = mean(self._losses)
        record: dict[str, Any] = {"step": step, "loss": average if math.isfinite(average) else None}
        if self.precision.method != "float32":
            seen, cost = controller.report(), controller.cost()
            record |= {**seen.mean_bits, "cycles": cost.cycles, "cycles_8bit": cost.cycles_8bit}
            record |= {"changed": seen.changed, "speedup": seen.speedup}
        self.history.append(record)
        self._losses.clear()

    def bits(self) -> dict[str, float] | None:
        """Mean widths by operand, over the steps after the warm-up."""
        if self.precision.method == "float32" or not self.history:
            return None
        return {name: mean(record[name] for record in self.history) for name in OPERANDS}

    def changed(self) -> dict[str, float] | None:
        """Mean and highest share of blocks that changed at a refresh, but the first: that one ends the warm-up."""
        if self.precision.method != "dynamic" or len(self.history) < 2:
            return None
        shares = [record["changed"] for record in self.history[1:]]
        return {"mean": mean(shares), "max": max(shares)}

    def shown(self) -> list[dict[str, Any]]:
        """The history, thinned out evenly where it is long; its last record is always there."""
        stride = -(-len(self.history) // _SHOWN)
        return self.history[::-1][:: max(1, stride)][::-1]


def costs(controller: Any) -> dict[str, Any]:
    """Of dynasty's model, for a file."""
    cost = controller.cost()
    names = ("cycles", "cycles_8bit", "energy_pj", "energy_pj_8bit", "macs")
    return {**{name: getattr(cost, name) for name in names}, "parts": dict(cost.parts)}


def drawn(maps: Mapping[str, Any]) -> dict[str, dict[str, Sequence[str]]]:
    """Widths as rows of digits: of activations one row, of gradients one digit each, of weights those of all taps."""
    return {
        name: {
            "activations": ["".join(map(str, held.activations.tolist()))],
            # (taps, R, C): the taps side by side, as the matrix of a GEMM has them
            "weights": ["".join(map(str, row)) for row in held.weights.transpose(0, 1).flatten(1).tolist()],
            "gradients": [str(width) for width in held.gradients.tolist()],
        }
        for name, held in maps.items()
    }
