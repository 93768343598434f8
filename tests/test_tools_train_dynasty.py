"""The command line of train_dynasty.py, its models and statistics."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import train_dynasty_data
import train_dynasty_models
import train_dynasty_options
import train_dynasty_results
from perf_report import write_json
from train_dynasty_options import Options
from train_dynasty_results import Outcome


def options(*argv: str) -> Options:
    return train_dynasty_options.parse("about", argv, quiet=False)


def test_defaults_are_those_of_the_model() -> None:
    found = options("--model", "llama")
    assert (found.data_set, found.optimizer, found.width, found.against) == ("text", "adamw", 64, "8")
    found = options("--model", "resnet", "--width", "8", "--lr", "0.5", "--configs", "4,dynamic:5")
    assert (found.data_set, found.optimizer, found.width, found.depth, found.lr) == ("fashion-mnist", "sgd", 8, 3, 0.5)
    assert found.against == "4"


def test_trainings_go_seed_by_seed() -> None:
    tasks = options("--configs", "float32,dynamic:4.7", "--seeds", "3,1", "--grad-bits", "8,dynamic").tasks(2)
    told = [str(task) for task in tasks]
    assert told[:3] == ["float32 grads 8 seed 3", "float32 grads dynamic seed 3", "dynamic:4.7 grads 8 seed 3"]
    assert [task.seed for task in tasks] == [3] * 4 + [1] * 4
    assert options("--configs", "8").tasks(1)[0].grads is None


@pytest.mark.parametrize(
    "argv, told",
    [
        (["--configs", "9"], "must be float32, bits from 2 to 8, or dynamic:S with S from 1 to 16, got '9'"),
        (["--configs", "dynamic:17"], "S from 1 to 16"),
        (["--configs", "8,8"], "must have each value once"),
        (["--seeds", "1,-2"], "must be an integer >= 0"),
        (["--model", "cnn", "--data-set", "text"], "--data-set text is for --model llama"),
        (["--model", "llama", "--width", "40"], "--width must be a multiple of 32"),
        (["--against", "6"], "--against must be one of --configs, got '6'"),
        (["--images", "10"], "--images must be at least --batch 64"),
        (["--grad-bits", "fp8"], "must be of float32, bfloat16, 8, dynamic"),
        (["--resume"], "--resume needs --json PATH"),
        (["--lr", "0"], "must be a number > 0"),
        (["--storage", "1e4"], "--storage must be at most 1000, got 10000"),
    ],
)
def test_wrong_usage(argv: Sequence[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        options(*argv)
    assert left.value.code == 2
    assert told in capsys.readouterr().err


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        options("--help")
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(
        word in told for word in ("no wall-clock time", "for 100 steps", "mpiexec -n 4", "exit status", '{"tool"')
    )


@pytest.mark.parametrize(
    "argv, shape, classes",
    [
        (["--model", "cnn"], (1, 28, 28), 10),
        (["--model", "cnn", "--depth", "4", "--width", "4"], (3, 32, 32), 7),
        (["--model", "resnet", "--width", "4"], (1, 28, 28), 10),
        (["--model", "resnet", "--width", "4", "--depth", "1"], (3, 32, 32), 100),
        (["--model", "resnet", "--width", "4", "--depth", "2"], (3, 224, 224), 1000),
        (["--model", "llama", "--width", "32", "--depth", "1"], (16,), 256),
    ],
)
def test_models_fit_their_data(argv: Sequence[str], shape: tuple[int, ...], classes: int) -> None:
    nothing = train_dynasty_data.Images(torch.zeros(0), torch.zeros(0), (), (), moved=False)
    torch.manual_seed(1)
    data = train_dynasty_data.DataSet("made", classes, shape, nothing, nothing)
    model = train_dynasty_models.build(options(*argv), data)
    inputs = torch.zeros(2, *shape, dtype=torch.long if len(shape) == 1 else torch.float32)
    found = train_dynasty_models.logits(model, inputs)
    assert found.shape == (2 * (shape[0] if len(shape) == 1 else 1), classes)
    convolutions = sum(isinstance(module, torch.nn.Conv2d) for module in model.modules())
    assert "resnet" not in argv or shape[1] == 28 or convolutions in (9, 20), (
        "ResNets of 8 and 18 layers, and their shortcuts"
    )


@pytest.mark.parametrize("freedom, wanted", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (19, 2.093)])
def test_student_t_is_that_of_the_tables(freedom: int, wanted: float) -> None:
    assert train_dynasty_results.student_t(0.95, freedom) == pytest.approx(wanted, abs=6e-4)


def outcome(config: str, seed: int, accuracy: float, loss: float | None = 0.5, grads: str | None = None) -> Outcome:
    return Outcome(config, grads, seed, accuracy, loss, "" if loss else "loss not finite at step 3", 9, 1.0)


def test_rows_are_paired_by_seed() -> None:
    runs = [
        *(outcome("8", 1, 0.80), outcome("dynamic:4.7", 1, 0.81, None)),
        *(outcome("8", 2, 0.90), outcome("dynamic:4.7", 2, 0.93)),
        *(outcome("8", 3, 0.70), outcome("dynamic:4.7", 3, 0.72)),
    ]
    base, dynamic = train_dynasty_results.rows(runs, "8")
    found = dynamic.difference("accuracy")
    assert found is not None
    assert found.told(2, 100, "+") == "+2.00 +-2.48"
    accuracy = base.estimate("accuracy")
    assert accuracy is not None
    assert accuracy.told(1, 100) == "80.0 +-24.8"
    loss = dynamic.estimate("loss")
    assert loss == train_dynasty_results.Estimate(0.5, 0.0), "of the two that have one"
    single = train_dynasty_results.rows(runs[:1], "8")[0].estimate("accuracy")
    assert single is not None
    assert single.told(1, 100) == "80.0"


def test_runs_come_back_from_their_file(tmp_path: Path) -> None:
    path = tmp_path / "runs.json"
    setting = options("--seeds", "1,2").setting(1)
    runs = [outcome("8", 1, 0.8), outcome("4", 1, 0.7, None)]
    write_json(path, {"tool": "train_dynasty", "setting": setting}, runs)
    assert train_dynasty_results.read(path, setting) == runs
    with pytest.raises(train_dynasty_results.ResultsError, match="has runs with batch 64, not 32"):
        train_dynasty_results.read(path, {**setting, "batch": 32})
    path.write_text(path.read_text().replace('"accuracy": 0.7', '"accuracy": NaN'))
    with pytest.raises(train_dynasty_results.ResultsError, match=r"results\[1\].accuracy must be a number"):
        train_dynasty_results.read(path, setting)
