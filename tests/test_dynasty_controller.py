"""What goes on beside training: when statistics are taken, maps are made, and how the budget is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dynasty
from dynasty import Chip, Config, Cost
from loopback_ranks import on_ranks


def make(config: Config | None = None, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return dynasty.convert(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)), config or Config())


def train(model: Any, steps: int, optimizer: Any = None, seed: int = 1, comm: Any = None) -> list[float]:
    """Losses of a regression; the data of a step are its number's."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), 0.02)
    losses = []
    for _ in range(steps):
        torch.manual_seed(1000 * seed + model.dynasty.report().step)
        x = torch.randn(32, 64)
        optimizer.zero_grad()
        loss = (model(x) - x[:, :32]).square().mean()
        loss.backward()
        optimizer.step()
        model.dynasty.step(loss, comm)
        losses.append(float(loss.detach()))
    return losses


def bits(model: Any) -> torch.Tensor:
    parts = [getattr(maps, o) for maps in model.dynasty.maps().values() for o in vars(maps)]
    return torch.cat([part.flatten() for part in parts])


def test_first_steps_have_8_bits_then_maps_are_refreshed() -> None:
    model = make(Config(warmup=4, refresh=5, observe=2))
    changed, observed = [], []
    for step in range(1, 16):
        before = bits(model)
        observed += [step] * model[0].observing
        train(model, 1)
        changed += [step] * (not torch.equal(bits(model), before))
        if step < 4:
            assert set(bits(model).tolist()) == {8}
    assert observed == [1, 2, 3, 4, 8, 9, 13, 14]
    assert changed[0] == 4
    assert set(changed) <= {4, 9, 14}
    assert int(model[0].seen) == len(observed)
    assert 0 <= model.dynasty.report().changed <= 1


def long(config: Config, steps: int) -> Any:
    """A model that was trained for a while; most steps only count, with the statistics that are there."""
    torch.manual_seed(0)
    layers = (nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 32))
    model: Any = dynasty.convert(nn.Sequential(*layers), config)
    for step in range(steps):
        if step < 8:
            model(torch.randn(64, 16)).square().mean().backward()
        model.dynasty.step(1.0)
    return model


@pytest.mark.parametrize("speedup", [2.0, 4.0])
def test_the_target_is_met(speedup: float) -> None:
    """First steps at 8 bits and analytics included."""
    model = long(Config(speedup=speedup, warmup=5), 600)
    cost, report = model.dynasty.cost(), model.dynasty.report()
    assert cost.speedup == pytest.approx(speedup, rel=0.03)
    assert cost.steps == report.step == 600
    assert 0 < report.analytics_share < 0.03
    assert report.analytics_share == cost.analytics_macs / cost.macs
    assert report.alarms == 0
    assert all(2 <= each <= 8 for each in report.mean_bits.values())


def test_a_ramp_gives_late_steps_more() -> None:
    config = Config(steps=600, ramp=0.3, warmup=5)
    half, whole = long(config, 300).dynasty.cost(), long(config, 600).dynasty.cost()
    assert whole.cycles - half.cycles > 1.15 * half.cycles
    assert whole.speedup == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("turnover", [0.04, 0.1])
def test_maps_change_little_after_the_first(turnover: float) -> None:
    model = make(Config(warmup=2, refresh=2, observe=1, turnover=turnover))
    train(model, 2)
    assert model.dynasty.report().changed > 0.5
    blocks = model.dynasty.layout.widths().blocks
    for _ in range(10):
        train(model, 2)
        assert model.dynasty.report().changed <= max(turnover, 1 / blocks)


def test_steps_before_any_training_make_no_map() -> None:
    model = make(Config(warmup=1, refresh=1, observe=1))
    model.dynasty.step(1.0)
    assert set(bits(model).tolist()) == {8}


def test_baselines() -> None:
    for config, speed, width in ((Config(method="equal"), 1, 8.0), (Config(method="equal", bits=4), 4, 4.0)):
        model = make(config)
        train(model, 3)
        assert model.dynasty.cost().speedup == speed
        assert set(model.dynasty.report().mean_bits.values()) == {width}
        assert not model[0].observing
    plain = make(Config(method="float32"))
    train(plain, 3)
    assert plain.dynasty.cost().cycles == 0


def test_an_exploding_loss_eases_the_budget_and_it_returns() -> None:
    model = make(Config(warmup=2, refresh=2, observe=1))
    train(model, 1)
    for _ in range(30):
        model.dynasty.step(1.0)
    assert model.dynasty.report().speedup == 4
    model.dynasty.step(float("nan"))
    eased = model.dynasty.report()
    assert (eased.alarms, eased.speedup) == (1, pytest.approx(4 / 1.5))
    for _ in range(8):
        model.dynasty.step(100.0)
    assert model.dynasty.report().speedup < eased.speedup
    assert model.dynasty.report().alarms > 1
    for _ in range(900):
        model.dynasty._judge(1.0)
    assert model.dynasty.report().speedup == 4


def test_a_training_goes_on_from_a_checkpoint() -> None:
    """Cut off between two refreshes, it has the maps and losses of one that was not."""
    whole, first, second = make(), make(), make(seed=9)
    sgd = [torch.optim.SGD(each.parameters(), 0.02, momentum=0.9) for each in (whole, first, second)]
    losses = train(whole, 35, sgd[0])
    train(first, 16, sgd[1])
    second.load_state_dict(first.state_dict())
    sgd[2].load_state_dict(sgd[1].state_dict())
    assert train(second, 19, sgd[2]) == losses[16:]
    assert torch.equal(bits(second), bits(whole))
    assert second.dynasty.report() == whole.dynasty.report()
    assert second.dynasty.cost() == whole.dynasty.cost()


def test_ranks_with_different_data_have_the_same_maps() -> None:
    def body(comm: Any) -> Any:
        torch.manual_seed(comm.rank)
        config = Config(warmup=3, refresh=3, observe=1)
        model = models[comm.rank] = dynasty.convert(nets[comm.rank], config)
        for step in range(10):
            x = torch.randn(16 + 8 * comm.rank, 64)
            model(x + comm.rank).square().mean().backward()
            # Between refreshes only one rank's loss goes wrong.
            model.dynasty.step(float("nan") if comm.rank and step == 4 else 1.0, comm)
        return bits(model), model[0].x_slope.clone()

    nets = [nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 16)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    models: dict[int, Any] = {}
    (one, slopes), (other, others) = on_ranks(2, body)
    assert torch.equal(one, other)
    assert len(set(one.tolist())) > 1
    assert slopes.shape == others.shape


@pytest.mark.parametrize(
    "wrong",
    [
        *({"method": "few"}, {"bits": 1}, {"bits": 9}, {"bits": 4.0}, {"speedup": 0.5}, {"speedup": 17}),
        *({"speedup": float("nan")}, {"speedup": "4"}, {"widths": (4,)}, {"widths": (4, 2)}, {"widths": (0, 1, 2)}),
        *({"widths": (2, 2, 4)}, {"refresh": 0}, {"warmup": True}, {"observe": 11}, {"decay": -0.1}, {"ramp": 0.2}),
        *(
            {"hysteresis": 2},
            {"turnover": -0.1},
            {"gradient_share": 0},
            {"storage": -1},
            {"alarm": 1},
            {"steps": 0},
            {"steps": True},
            {"steps": 5, "ramp": 1},
        ),
        *({"block": 16}, {"chip": None}, {"skip": "head"}, {"widths": 4}),
    ],
    ids=str,
)
def test_bad_configurations(wrong: dict[str, Any]) -> None:
    """The message names the argument, the rule and what came."""
    name = list(wrong)[-1]
    with pytest.raises(ValueError, match=rf"^{name} must .*, got "):
        Config(**wrong)


def test_good_configurations() -> None:
    assert Config(speedup=4).mean_width == 4
    assert Config(widths=(0, 4, 8), steps=10, ramp=0.5, chip=Chip(side=16)).ramp == 0.5


def test_every_use_of_a_layer_in_a_step_is_counted() -> None:
    def cost(passes: int, batches: int) -> Cost:
        layer = nn.Linear(32, 32)
        model = dynasty.convert(nn.Sequential(*[layer] * passes), Config(method="equal", bits=4))
        for _ in range(2):
            for _ in range(batches):
                model(torch.randn(16, 32)).sum().backward()
            model.dynasty.step(1.0)
        found: Cost = model.dynasty.cost()
        return found

    assert cost(1, 1).cycles == 2 * 3 * 16 * 32 * 32 / 4
    assert cost(2, 1).cycles == cost(1, 2).cycles == 2 * cost(1, 1).cycles
    assert cost(2, 1).macs == 2 * cost(1, 1).macs
