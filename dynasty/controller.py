"""What goes on beside training: statistics at the right steps, new maps, the budget, and the account of it all."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dynasty.config import Config
from dynasty.cost import Cost, Energy, analytics_cost, step_cost
from dynasty.layout import Layout, Maps
from dynasty.maps import Widths, assign

_FAST = 0.9  # of the loss's running mean
_EASE = 1.5  # how many times the budget grows when training goes wrong, and
_RETURN = 0.998  # how it shrinks again, per step
_PAY_BACK = 100  # steps over which the first steps and the analytics are paid back, and
_MOST = 1.25  # how much faster than the target it may become for that


@dataclass(frozen=True)
class Report:
    """How it stands.

    step: training steps so far. mean_bits: of "activations", "weights" and "gradients", over elements. changed: share
    of blocks that got another width at the last refresh. analytics_share: multiply-accumulates of statistics and maps
    over those of the GEMMs. speedup: the target in force. alarms: how often training went wrong.
    """

    step: int
    mean_bits: dict[str, float]
    changed: float
    analytics_share: float
    speedup: float
    alarms: int


class Controller:
    """`model.dynasty`. No module of the model, which may be a Sequential; its state is in buffers of the model's root.

    dynasty_counts: steps, refreshes, alarms. dynasty_figures: share of blocks changed, target in force, the smoothed
    loss, its best, its weight. dynasty_spent: the account.
    """

    def __init__(self, model: nn.Module, config: Config) -> None:
        self.config, self.model = config, model
        self.layout = Layout.of(model)
        model.register_buffer("dynasty_counts", torch.zeros(3, dtype=torch.int64))
        figures = [0.0, config.speedup, 0.0, math.inf, 0.0]
        model.register_buffer("dynasty_figures", torch.tensor(figures, dtype=torch.float64))
        model.register_buffer("dynasty_spent", torch.zeros(_SPENT, dtype=torch.float64))
        self._priced: dict[tuple[int, ...], Cost] = {}
        model.register_load_state_dict_post_hook(self._loaded)
        self._watch()

    def step(self, loss: float | Tensor, comm: Any = None) -> None:
        """After a training step: count it, and every `refresh` steps make new maps. Collective if comm is given.

        loss: of the step, to see whether training goes well: the mean over ranks. comm: a `tasp_coll.Communicator`
        whose ranks train the same model on different data; statistics are averaged at each refresh, so that all ranks
        have the same maps.
        """
        loss = float(loss.detach()) if isinstance(loss, Tensor) else float(loss)
        self.counts[0] += 1
        if self.layout.layers and self.config.method != "float32":
            self._count()
        if self.config.method == "dynamic":
            done = int(self.counts[0]) - self.config.warmup
            if done >= 0 and done % self.config.refresh == 0:
                self._refresh(loss, comm)
            else:
                self._judge(loss)
        for layer in self.layout.layers:
            layer.step_is_over = True
        self._watch()

    def report(self) -> Report:
        """How it stands."""
        step, _, alarms = self.counts.tolist()
        changed, target = self.figures[:2].tolist()
        cost = self.cost()
        share = cost.analytics_macs / cost.macs if cost.macs else 0.0
        return Report(step, self._mean_bits(), changed, share, target, alarms)

    def cost(self) -> Cost:
        """Of all steps so far, by the model of `dynasty.cost`."""
        return _cost(self.spent.tolist())

    def maps(self) -> dict[str, Maps]:
        """The widths in force, per layer."""
        return self.layout.maps()

    # --- inside

    @property
    def counts(self) -> Tensor:
        return self.model.get_buffer("dynasty_counts")

    @property
    def figures(self) -> Tensor:
        return self.model.get_buffer("dynasty_figures")

    @property
    def spent(self) -> Tensor:
        return self.model.get_buffer("dynasty_spent")

    def _loaded(self, *_: Any) -> None:
        """A checkpoint was read: it is at another step, with other widths."""
        self._priced.clear()
        self._watch()

    def _watch(self) -> None:
        """Whether the coming step's statistics are wanted: in the first steps and shortly before each refresh."""
        config, coming = self.config, int(self.counts[0]) + 1
        left = (config.warmup - coming) % config.refresh if coming > config.warmup else 0
        for layer in self.layout.layers:
            layer.observing = config.method == "dynamic" and left < config.observe

    def _count(self) -> None:
        """Adds the step that was made to the account."""
        rows = tuple(layer.rows for layer in self.layout.layers)
        if rows not in self._priced:
            self._priced[rows] = step_cost(
                self.layout.meetings(), self.layout.widths(), self.config.block, self.config.chip
            )
        self._spend(self._priced[rows])
        observed = [layer for layer in self.layout.layers if layer.observing]
        if observed:
            self._spend(analytics_cost(float(sum(layer.observation_macs for layer in observed))))

    def _spend(self, cost: Cost) -> None:
        self.spent.copy_(torch.tensor(_flat(self.cost().plus(cost)), dtype=torch.float64))

    def _refresh(self, loss: float, comm: Any) -> None:
        layout, config, old = self.layout, self.config, self.layout.widths()
        loss = self._share(loss, comm)
        self._judge(loss)
        meetings = replace(layout.meetings(), storage=config.storage)
        whole = meetings.cycles(old.all_at(8))
        if not whole:  # nothing was trained yet that a map could be made for
            return
        budget = self._budget(whole)
        curves = layout.curves(config.widths)
        width = 8 * math.sqrt(budget / whole) * config.gradient_share
        found = _of_rank_0(assign(curves, meetings, old, budget, width, config.hysteresis, self._most(old)), comm)
        layout.put(found)
        self._priced.clear()
        self._spend(analytics_cost(float(meetings.elements.w.sum()) * len(config.widths) + found.total))
        self.counts[1] += 1
        self.figures[0] = found.changed(old)

    def _most(self, widths: Widths) -> int | None:
        """How many blocks may change: all at the first map, and while the budget is eased."""
        settled = bool(self.counts[1]) and float(self.figures[1]) == self.config.speedup
        return max(1, int(self.config.turnover * widths.blocks)) if settled else None

    def _budget(self, whole: float) -> float:
        """Cycles of a step, whose 8 bits would take `whole`: the target's, less what is owed from steps before."""
        target, cost, ramp = float(self.figures[1]), self.cost(), self.config.ramp
        done = min(1.0, cost.steps / self.config.steps) if self.config.steps else 0.5
        planned = whole / target * (1 + ramp * (2 * done - 1))
        owed = max(0.0, cost.cycles - cost.cycles_8bit / target * (1 + ramp * (done - 1)))
        return max(planned - owed / _PAY_BACK, planned / _MOST)

    def _judge(self, loss: float) -> None:
        """Smooths the loss, and eases the budget while it is far above its best."""
        _, _, smooth, best, weight = self.figures.tolist()
        if math.isfinite(loss):
            weight = _FAST * weight + 1 - _FAST
            smooth += (1 - _FAST) / weight * (loss - smooth)
        target = float(self.figures[1])
        wrong = not math.isfinite(loss) or (weight > 0.5 and smooth > self.config.alarm * best)
        if wrong:
            self.counts[2] += 1
            target, best = max(1.0, target / _EASE), max(smooth, best if math.isfinite(best) else smooth)
        else:
            target = min(self.config.speedup, target / _RETURN)
            best = min(best, smooth) if weight > 0.5 else best
        self.figures[1:] = torch.tensor([target, smooth, best, weight], dtype=torch.float64)

    def _share(self, loss: float, comm: Any) -> float:
        """The mean over all ranks of the loss and of all statistics."""
        if comm is None or comm.size == 1:
            return loss
        held = [each for layer in self.layout.layers for each in layer.statistics()]
        flat = torch.cat([each.flatten().cpu() for each in held] + [torch.tensor([loss])])
        flat = comm.decomposed_allreduce(flat) / comm.size
        for each, part in zip(held, flat[:-1].split([each.numel() for each in held]), strict=True):
            each.copy_(part.view_as(each))
        return float(flat[-1])

    def _mean_bits(self) -> dict[str, float]:
        names = ("activations", "weights", "gradients")
        if self.config.method == "float32":
            return dict.fromkeys(names, 32.0)
        widths, elements = self.layout.widths(), self.layout.meetings().elements
        pairs = zip(widths, elements, strict=True)
        means = (float((bits * count).sum() / count.sum().clamp_min(1)) for bits, count in pairs)
        return dict(zip(names, means, strict=True))


def _of_rank_0(widths: Widths, comm: Any) -> Widths:
    """Losses between refreshes and the last batch's rows may differ by rank, and budgets with them; maps must not."""
    if comm is None or comm.size == 1:
        return widths
    flat = torch.cat(list(widths)).cpu()
    flat = comm.decomposed_allreduce(flat if comm.rank == 0 else torch.zeros_like(flat)).to(widths.x.device)
    return Widths(*flat.split([len(part) for part in widths]))


def _flat(cost: Cost) -> list[float]:
    numbers = [cost.steps, cost.macs, cost.analytics_macs, cost.cycles, cost.cycles_8bit]
    return [*map(float, numbers), *vars(cost.energy).values(), *vars(cost.energy_8bit).values()]


def _cost(numbers: list[float]) -> Cost:
    steps, macs, analytics, cycles, cycles_8bit = numbers[:5]
    half = 5 + (_SPENT - 5) // 2
    energies = Energy(*numbers[5:half]), Energy(*numbers[half:])
    return Cost(int(steps), macs, analytics, cycles, cycles_8bit, *energies)


_SPENT = len(_flat(Cost()))
