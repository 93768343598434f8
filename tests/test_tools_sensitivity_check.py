"""tools/sensitivity_check.py on a few images made up here: what it measures, and what it says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import dynasty
import sensitivity_check
from sensitivity_figures import Measured, Moment, Seen, faults, figures, reliability, spearman
from sensitivity_truth import Spot, first_order, in_float32
from test_tools_train_dynasty_sets import write_idx

SMALL = ("--images", "128", "--batch", "16", "--epochs", "1", "--early", "4,6", "--blocks", "8", "--batches", "3")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Classes are bars at different heights, with noise."""
    rng = np.random.default_rng(1)
    for part, count in (("train", 256), ("t10k", 32)):
        labels = rng.integers(0, 10, count)
        images = rng.integers(0, 40, (count, 28, 28))
        for image, label in zip(images, labels, strict=True):
            image[2 * label : 2 * label + 4] += 200
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", labels)
    return tmp_path


@pytest.mark.parametrize("model", ["cnn", "resnet"])
def test_it_measures(model: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, picture = tmp_path / "seen.json", tmp_path / "seen.png"
    given = ("--model", model, "--data", str(data), "--json", str(path), "--plot", str(picture), *SMALL)
    status = sensitivity_check.main(given)
    told = capsys.readouterr().out
    assert status == int("must be" in told)
    found: list[dict[str, Any]] = json.loads(path.read_text())["results"]
    assert [each["step"] for each in found] == [4, 6, 8]
    assert picture.stat().st_size
    for each in found:
        (moment,) = each["seeds"]
        assert moment["figures"] == each["figures"]
        whole = moment["figures"][0]
        assert whole["title"] == "all"
        assert whole["blocks"] == len(moment["blocks"])
        # Slopes on the very batches explain what dithers do there; an estimate from a few steps does in part.
        assert whole["first_order"] > 0.8
        assert whole["estimate"] > 0.3
        assert whole["step_before"] > 0.6
        ratios = [block["first_order"] / block["truth"] for block in moment["blocks"] if block["truth"] > 0]
        assert 0.5 < float(np.median(ratios)) < 2


def test_several_seeds_at_a_time(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each as by itself; figures are the means."""
    found: list[list[dict[str, Any]]] = []
    for given in (("--seeds", "4,5", "--jobs", "2"), ("--seed", "5")):
        path = tmp_path / f"{len(found)}.json"
        sensitivity_check.main(("--model", "cnn", "--data", str(data), "--json", str(path), *given, *SMALL))
        found.append(json.loads(path.read_text())["results"])
    assert "cnn after 8 steps, 2 seeds, loss" in capsys.readouterr().out
    for both, one in zip(*found, strict=True):
        assert [moment["seed"] for moment in both["seeds"]] == [4, 5]
        assert both["seeds"][1] == one["seeds"][0]
        whole, first, second = (of["figures"][0] for of in (both, *both["seeds"]))
        assert whole["estimate"] == pytest.approx((first["estimate"] + second["estimate"]) / 2)
        assert whole["half"] == pytest.approx(12.706 * abs(first["estimate"] - second["estimate"]) / 2, rel=1e-3)
        assert whole["blocks"] == first["blocks"] + second["blocks"]


def test_too_few_images(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--data", str(data), *SMALL[2:], "--images", "224")
    assert sensitivity_check.main(given) == 2
    assert "--images and --batches need 272 images, and there are 256" in capsys.readouterr().err


def test_ranks_and_their_reliability() -> None:
    assert spearman(np.array([1.0, 5, 9, 9]), np.array([0.0, 1, 7, 7])) == pytest.approx(1)
    assert spearman(np.array([3.0, 2, 1]), np.array([1.0, 2, 3])) == pytest.approx(-1)
    assert np.isnan(spearman(np.ones(3), np.arange(3.0)))
    rng = np.random.default_rng(2)
    sizes, noise = np.arange(40.0)[:, None], rng.standard_normal((40, 20))
    assert reliability(sizes + 0.01 * noise) == pytest.approx(1, abs=1e-3)
    assert abs(reliability(noise)) < 0.5


def test_what_does_not_hold_is_told() -> None:
    """Estimates in the opposite order, in a layer whose truth is certain."""
    changes = np.arange(1.0, 11)[:, None] * np.ones(4)
    blocks = [Measured("a", "weights", i, changes[i], -float(i), float(i), float(i), -float(i)) for i in range(10)]
    assert figures("all", blocks).first_order == pytest.approx(1)
    assert figures("all", blocks).step_before == pytest.approx(-1)
    bad = Moment("cnn", 0, 7, 0.5, 0.05, tuple(blocks))
    told = faults(Seen((bad,)), late=True)
    assert [line.split(":")[1].split("'")[0].strip() for line in told[:2]] == ["all blocks", "layer a"]
    assert told[2] == "cnn, step 7: analytics must be <= 3%, got 5.00%"
    blocks = [Measured("a", "weights", i, changes[i], float(i), -float(i), float(i), float(i)) for i in range(10)]
    good = Moment("cnn", 0, 7, 0.5, 0.01, tuple(blocks))
    assert not faults(Seen((good,)), late=True)
    assert [line.split(": ")[1].split(" must")[0] for line in faults(Seen((good, bad)), late=False)] == [
        "all blocks' 0.000",
        "layer a's 0.000",
    ]


def test_first_order_leaves_batches_as_they_are() -> None:
    torch.manual_seed(0)
    model = in_float32(
        dynasty.convert(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 10)), dynasty.Config())
    )
    batches = [(torch.randn(8, 20), torch.arange(8))]
    spots = [Spot("0", "activations", 1), Spot("0", "weights", 0), Spot("2", "activations", 0)]
    found = [first_order(model, spots, batches, 4, 1) for _ in range(2)]
    assert (found[0] == found[1]).all()
    assert not batches[0][0].requires_grad
