"""Rank correlations of what sensitivity_check.py measured, and whether they are good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from sensitivity_options import ANALYTICS, FEWEST, OVERALL, WITHIN
from train_dynasty_results import estimate

Floats = NDArray[np.float64]
_SPLITS = 50
_MEANS = ("estimate", "error_only", "step_before", "first_order", "reliability")


@dataclass(frozen=True)
class Measured:
    """One block. operand: "activations" or "weights"; number: its place among the layer's; changes: mean squared
    changes of the loss, (batches,); estimate: of their mean; error: what rounding's error alone says; first_order: what
    the slopes on those batches say; step_before: what they said one step of training before.
    """

    layer: str
    operand: str
    number: int
    changes: Floats
    estimate: float
    error: float
    first_order: float
    step_before: float

    @property
    def truth(self) -> float:
        """Mean squared change of the loss."""
        return float(self.changes.mean())


@dataclass(frozen=True)
class Figures:
    """Of some blocks; NaN where all are the same. half: of the estimate's 95 % confidence interval, over seeds."""

    title: str
    blocks: int
    estimate: float
    error_only: float
    step_before: float
    first_order: float
    reliability: float
    half: float | None = None


@dataclass(frozen=True)
class Moment:
    """What was seen of a model at a step of one training."""

    model: str
    seed: int
    step: int
    loss: float
    analytics_share: float
    blocks: tuple[Measured, ...]

    @property
    def figures(self) -> tuple[Figures, ...]:
        """Of all blocks, each operand's, each layer's, and each layer's operand's, where there are enough."""
        layers = list(dict.fromkeys(block.layer for block in self.blocks))
        groups = [("all", self.blocks)]
        groups += [(operand, self._of(None, operand)) for operand in ("activations", "weights")]
        for layer in layers:
            groups.append((f"layer {layer}", self._of(layer, None)))
            groups += [(f"  {operand}", self._of(layer, operand)) for operand in ("activations", "weights")]
        return tuple(figures(title, blocks) for title, blocks in groups if len(blocks) >= FEWEST)

    def _of(self, layer: str | None, operand: str | None) -> tuple[Measured, ...]:
        asked = [block for block in self.blocks if layer in (None, block.layer)]
        return tuple(block for block in asked if operand in (None, block.operand))


@dataclass(frozen=True)
class Seen:
    """Of a model at a step of all its trainings; moments: one for each seed."""

    moments: tuple[Moment, ...]

    @property
    def model(self) -> str:
        return self.moments[0].model

    @property
    def step(self) -> int:
        return self.moments[0].step

    @property
    def loss(self) -> float:
        """Mean over seeds."""
        return float(np.mean([moment.loss for moment in self.moments]))

    @property
    def analytics_share(self) -> float:
        """The most of any seed."""
        return max(moment.analytics_share for moment in self.moments)

    @property
    def blocks(self) -> tuple[Measured, ...]:
        """Of all seeds."""
        return tuple(block for moment in self.moments for block in moment.blocks)

    @property
    def figures(self) -> tuple[Figures, ...]:
        """Means over seeds, whose trainings have the same layers; blocks: of all of them."""
        return tuple(_mean(of_seeds) for of_seeds in zip(*(moment.figures for moment in self.moments), strict=True))


def _mean(of_seeds: Sequence[Figures]) -> Figures:
    title = of_seeds[0].title
    held = {each.name: [getattr(figures, each.name) for figures in of_seeds] for each in fields(Figures)}
    means = {name: float(np.mean(held[name])) for name in _MEANS}
    spread = estimate(held["estimate"])
    return Figures(title, sum(held["blocks"]), **means, half=spread.half if spread is not None else None)


def figures(title: str, blocks: Sequence[Measured]) -> Figures:
    """Of these blocks."""
    changes = np.stack([block.changes for block in blocks])
    truth = changes.mean(1)
    estimate, error_only, step_before, first_order = (
        spearman(np.array([getattr(block, of) for block in blocks]), truth)
        for of in ("estimate", "error", "step_before", "first_order")
    )
    return Figures(title, len(blocks), estimate, error_only, step_before, first_order, reliability(changes))


def faults(seen: Seen, late: bool) -> list[str]:
    """What does not hold."""
    told = []
    where = f"{seen.model}, step {seen.step}"
    for each in seen.figures:
        if each.title == "all" and not (each.estimate >= OVERALL and each.estimate > each.error_only):
            told.append(f"{where}: all blocks' {each.estimate:.3f} must be >= {OVERALL} and > {each.error_only:.3f}")
        least = min(WITHIN, each.reliability)
        if each.title.startswith("layer") and not each.estimate >= least:
            told.append(f"{where}: {each.title}'s {each.estimate:.3f} must be >= {least:.3f}")
    if late and seen.analytics_share > ANALYTICS:
        told.append(f"{where}: analytics must be <= {ANALYTICS:.0%}, got {seen.analytics_share:.2%}")
    return told


def spearman(a: Floats, b: Floats) -> float:
    """Rank correlation of (n,) and (n,); NaN if one of them is constant."""
    a, b = _ranks(a), _ranks(b)
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else float("nan")


def reliability(changes: Floats) -> float:
    """Of the means over the batches of (blocks, batches): that of halves, stepped up (Spearman 1910, Brown 1910)."""
    rng = np.random.default_rng(0)
    batches = changes.shape[1]
    halves = []
    for _ in range(_SPLITS):
        order = rng.permutation(batches)
        first, second = order[: batches // 2], order[batches // 2 :]
        halves.append(spearman(changes[:, first].mean(1), changes[:, second].mean(1)))
    mean = float(np.mean(halves))
    return 2 * mean / (1 + mean)


def _ranks(values: Floats) -> Floats:
    """From 0; equal values have the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts) - 1
    ranks: Floats = (last - (counts - 1) / 2)[where]
    return ranks
