"""What one training showed, as train_dynasty.py keeps it in files, and what the trainings of a row show together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import results_file
from results_file import Entry, ResultsError

OPERANDS = ("activations", "weights", "gradients")
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Outcome:
    """One training.

    accuracy, loss: held-out; loss None where not finite. diverged: why it is called so, or empty. bits: mean width
    by operand, after the warm-up. cost: of dynasty's model, None for float32. changed: mean and highest share of blocks
    that changed at a refresh. exchange: bytes and seconds of gradients, a step. tests: step, accuracy and loss on the
    way; history: what the loss and the controller did; maps: {layer: {operand: rows of digits}} at the end.
    """

    config: str
    grads: str | None
    seed: int
    accuracy: float
    loss: float | None
    diverged: str
    steps: int
    seconds: float
    bits: Mapping[str, float] | None = None
    cost: Mapping[str, Any] | None = None
    changed: Mapping[str, float] | None = None
    analytics_share: float | None = None
    exchange: Mapping[str, float] | None = None
    tests: Sequence[Mapping[str, Any]] = ()
    history: Sequence[Mapping[str, Any]] = ()
    maps: Mapping[str, Mapping[str, Sequence[str]]] | None = None

    @property
    def key(self) -> tuple[str, str | None, int]:
        """Which training of a command it is."""
        return self.config, self.grads, self.seed

    def record(self) -> dict[str, Any]:
        """For the file."""
        return asdict(self)

    @property
    def ratios(self) -> Mapping[str, float] | None:
        """What all in 8 bits would have cost over what this one did: of modelled cycles and energy."""
        if not self.cost:
            return None
        return {name: self.cost[f"{name}_8bit"] / self.cost[name] for name in ("cycles", "energy_pj")}


@dataclass(frozen=True)
class Estimate:
    """A mean, and half of its 95 % confidence interval; None of one value."""

    mean: float
    half: float | None

    def told(self, digits: int, scale: float = 1.0, sign: str = "") -> str:
        """As in a table."""
        half = "" if self.half is None else f" +-{self.half * scale:.{digits}f}"
        return f"{self.mean * scale:{sign}.{digits}f}{half}"


@dataclass(frozen=True)
class Row:
    """The trainings of one configuration, in the order of their seeds; against: seed by seed, that row's."""

    config: str
    grads: str | None
    runs: Sequence[Outcome]
    against: Sequence[Outcome]

    def estimate(self, name: str) -> Estimate | None:
        """Over seeds; of those that have the value."""
        return estimate([value for run in self.runs if (value := getattr(run, name)) is not None])

    def difference(self, name: str) -> Estimate | None:
        """Paired by seed, of those that both have; None for the row itself."""
        if self.runs == self.against:
            return None
        theirs = {run.seed: getattr(run, name) for run in self.against}
        pairs = [(getattr(run, name), theirs.get(run.seed)) for run in self.runs]
        return estimate([mine - other for mine, other in pairs if mine is not None and other is not None])

    def mean(self, name: str, part: str) -> float | None:
        """Over seeds, of a part of what has several."""
        found = [group[part] for run in self.runs if (group := getattr(run, name)) is not None]
        return mean(found) if found else None


def rows(outcomes: Sequence[Outcome], against: str) -> list[Row]:
    """By configuration, in the order of their first runs; each against the first row of the configuration `against`."""
    kinds = list(dict.fromkeys((run.config, run.grads) for run in outcomes))
    runs = {kind: sorted((run for run in outcomes if run.key[:2] == kind), key=lambda run: run.seed) for kind in kinds}
    base = next((runs[kind] for kind in kinds if kind[0] == against), [])
    return [Row(*kind, runs[kind], base) for kind in kinds]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Of independent values; None of none."""
    if len(values) < 2:
        return Estimate(values[0], None) if values else None
    half = student_t(_CONFIDENCE, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean(values), half)


def student_t(confidence: float, freedom: int) -> float:
    """How many standard errors of a mean its confidence interval reaches, with so many degrees of freedom (>= 1)."""
    low, high = 0.0, math.pi / 2
    while high - low > 1e-14:  # by angle, in which all of t is finite
        middle = (low + high) / 2
        low, high = (low, middle) if _within(middle, freedom) > confidence else (middle, high)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """Probability that |t| is below tan(angle) * sqrt(freedom) (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    term, total = 1.0, 0.0
    if freedom % 2:
        term = math.cos(angle)
    for number in range(freedom % 2, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (number + 1) / (number + 2)
    if freedom % 2:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total


# --- files


def read(path: Path, setting: Mapping[str, Any]) -> list[Outcome]:
    """The runs of a file; ResultsError for one of another setting or tool, OSError."""
    top, results = results_file.read(path)
    if top.value.get("tool") != "train_dynasty":
        raise ResultsError(f"{path} is no result of train_dynasty.py")
    found = top.entry("setting").value
    for name in sorted(setting.keys() | found.keys()):
        if found.get(name) != setting.get(name):
            raise ResultsError(f"{path} has runs with {name} {found.get(name)!r}, not {setting.get(name)!r}")
    return [_outcome(entry) for entry in results]


def _outcome(entry: Entry) -> Outcome:
    """A run, checked as far as the table needs it."""
    known = {each.name for each in fields(Outcome)}
    if strange := entry.value.keys() ^ known:
        raise ResultsError(f"{entry.where} must have the entries of a run: {sorted(strange)[0]} is missing or too many")
    entry.text("config")
    entry.count("seed", 0)
    entry.count("steps", 0)
    entry.number("accuracy", -1)
    entry.number("seconds", -1)
    if entry.value["grads"] is not None:
        entry.text("grads")
    if entry.value["loss"] is not None:
        entry.number("loss", -1)
    if not isinstance(entry.value["diverged"], str):
        raise ResultsError(f"{entry.where}.diverged must be a text")
    numbers = {"bits": OPERANDS, "changed": ("mean", "max"), "cost": _COSTS, "exchange": _EXCHANGE}
    for name, keys in numbers.items():
        if entry.value[name] is not None:
            for key in keys:
                entry.entry(name).number(key, -1)
    kept = {name: tuple(_listed(entry, name, keys)) for name, keys in (("tests", _TESTS), ("history", _HISTORY))}
    return Outcome(**{**entry.value, **kept})


def _listed(entry: Entry, name: str, keys: Sequence[str]) -> list[Mapping[str, Any]]:
    """Records under a name, whose entries are numbers or null."""
    found = entry.value[name]
    if not isinstance(found, list):
        raise ResultsError(f"{entry.where}.{name} must be a list")
    each = [Entry(f"{entry.where}.{name}[{at}]", value) for at, value in enumerate(found)]
    for one in each:
        for key in keys:
            if one.value.get(key) is not None:
                one.number(key, -1)
    return [one.value for one in each]


_COSTS = ("cycles", "cycles_8bit", "energy_pj", "energy_pj_8bit", "macs")
_TESTS = ("step", "accuracy", "loss")
_HISTORY = ("step", "loss", *OPERANDS, "cycles", "cycles_8bit", "changed", "speedup")
_EXCHANGE = ("bytes", "float32_bytes", "seconds", "step_seconds")
