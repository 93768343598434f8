"""How a model is to be trained."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from dynasty.chip import Chip
from dynasty.tiles import Block
from tasp_coll import ArgumentError

METHODS = ("dynamic", "equal", "float32")


@dataclass(frozen=True)
class Config:
    """What `convert` makes of a model.

    method: "dynamic" (a width per block), "equal" (`bits` for all blocks) or "float32" (nothing is quantized).
    bits: of "equal", and of "dynamic" during its first steps, 2 to 8.
    speedup: how many times fewer cycles than 8 bits "dynamic" may take, its first steps and its analytics included;
        >= 1, at most 16 (all blocks at 2 bits).
    widths: that blocks may have, rising; 0 lets a block be dropped.
    refresh, warmup: steps between new maps, and before the first. observe: steps before a refresh whose statistics are
        taken. decay: of their running means, of fourth roots, from an observation to the next; at first they forget
        faster.
    hysteresis: the share of its price that a block must save to change its width.
    turnover: the share of blocks that may change their width at a refresh, after the first map and while training goes
        well: those that gain most; at least one block.
    gradient_share: the mean width of gradients over that of a map of one width with the same cycles.
    storage: how many cycles are worth a bit less of each element that is stored: with 0 widths save cycles alone, and
        energy as it comes; about 15 where energy counts. It takes bits from what is used by few multiplications, as
        activations of narrow linear layers are.
    alarm: training goes wrong when the loss, smoothed, is so many times its best; then the budget grows.
    block: rows x columns of the matrices that a GEMM sees.
    steps: of the whole training, if known. ramp: from 0 to below 1; with steps, the budget of a step grows evenly from
        1 - ramp to 1 + ramp times its mean: late steps, with a small learning rate, gain most from precision.
    chip: the modelled accelerator.
    skip: names of modules that stay as they are.

    Raises ArgumentError for what does not fit.
    """

    method: str = "dynamic"
    bits: int = 8
    speedup: float = 4.0
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    refresh: int = 10
    warmup: int = 10
    observe: int = 2
    decay: float = 0.9
    hysteresis: float = 0.1
    turnover: float = 0.04
    gradient_share: float = 1.0
    storage: float = 0.0
    alarm: float = 1.5
    block: Block = field(default_factory=Block)
    steps: int | None = None
    ramp: float = 0.0
    chip: Chip = field(default_factory=Chip)
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _need("method", self.method in METHODS, f"be one of {', '.join(METHODS)}", self.method)
        for name, lowest in (("bits", 2), ("refresh", 1), ("warmup", 1), ("observe", 1)):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            _need(name, whole and value >= lowest, f"be an integer >= {lowest}", value)
        _need("bits", self.bits <= 8, "be 2 to 8", self.bits)
        _need("observe", self.observe <= self.refresh, f"be at most refresh, {self.refresh}", self.observe)
        shares = [(name, 0, 1) for name in ("decay", "hysteresis", "turnover")]
        for name, low, high in (("speedup", 1, 16), *shares, ("gradient_share", 0.25, 4), ("storage", 0, 1000)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and low <= value <= high
            _need(name, number, f"be a number from {low} to {high}", value)
        whole = isinstance(self.steps, int) and not isinstance(self.steps, bool) and self.steps >= 1
        _need("steps", self.steps is None or whole, "be None or an integer >= 1", self.steps)
        number = isinstance(self.ramp, (int, float)) and 0 <= self.ramp < 1
        _need("ramp", number and (self.steps is not None or not self.ramp), "be 0, or below 1 with steps", self.ramp)
        _need("alarm", isinstance(self.alarm, (int, float)) and self.alarm > 1, "be a number above 1", self.alarm)
        _need("widths", isinstance(self.widths, (tuple, list)), "be a tuple of integers", self.widths)
        known = all(width in (0, 2, 3, 4, 5, 6, 7, 8) for width in self.widths)
        rising = list(self.widths) == sorted(set(self.widths)) and len(self.widths) > 1
        _need("widths", known and rising and self.widths[-1] >= 2, "be rising, each 0 or 2 to 8", self.widths)
        _need("block", isinstance(self.block, Block), "be a dynasty.Block", self.block)
        _need("chip", isinstance(self.chip, Chip), "be a dynasty.Chip", self.chip)
        names = isinstance(self.skip, (tuple, list)) and all(isinstance(name, str) for name in self.skip)
        _need("skip", names, "be a tuple of names", self.skip)

    @property
    def mean_width(self) -> float:
        """The width that would take as many cycles if all blocks had it."""
        return 8 / math.sqrt(self.speedup)


def _need(name: str, holds: bool, rule: str, came: object) -> None:
    if not holds:
        raise ArgumentError(f"{name} must {rule}, got {came!r}")
