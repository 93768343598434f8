"""Checkpoints of train_lm.py: tensors and JSON, nothing else, and nothing of another model or run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fuzz_checkpoint
from train_lm_checkpoint import MODEL, TRAINING, CheckpointError, load, new_model, save


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    for name, data in fuzz_checkpoint.sound().items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_what_was_saved_is_loaded(saved: Path) -> None:
    held = load(saved, "sdpa")
    assert held.step == 7
    optimizer = torch.optim.AdamW(held.model.parameters())
    held.restore(optimizer)
    again = saved / "again"
    save(again, held.model, optimizer, 8)
    assert sorted(path.suffix for path in again.iterdir()) == [".json", ".json", ".safetensors", ".safetensors"]
    assert len({path.stat().st_mode for path in again.iterdir()}) == 1
    assert [path.name for path in saved.iterdir() if path.name.startswith(".")] == []
    for name in (MODEL, TRAINING):
        first, second = load_file(saved / name), load_file(again / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def grown(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "intermediate_size": 1 << 30}))


def pickled(path: Path) -> None:
    torch.save(load_file(path / TRAINING), path / TRAINING)


def of_another_run(path: Path) -> None:
    save_file({name: value + 1 for name, value in load_file(path / MODEL).items()}, path / MODEL)


def without_memory(path: Path) -> None:
    save_file({}, path / TRAINING, metadata={"step": "7"})


@pytest.mark.parametrize(
    "change, told",
    [
        (grown, "must be floats of shape"),
        (pickled, ""),
        (of_another_run, "belongs to another"),
        (without_memory, "has no tensor"),
        (lambda path: (path / TRAINING).unlink(), "there is no file"),
        (lambda path: (path / "config.json").write_text('{"model_type": "gpt2"}'), "model_type"),
    ],
)
def test_what_is_no_checkpoint_of_ours(saved: Path, change: Callable[[Path], object], told: str) -> None:
    change(saved)
    with pytest.raises(CheckpointError) as caught:
        load(saved, "sdpa")
    assert told in str(caught.value)


def test_a_window_makes_a_mistral() -> None:
    sizes = dict.fromkeys(("hidden_size", "intermediate_size", "max_position_embeddings"), 8)
    sizes |= {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    assert new_model(sizes, 4, "sdpa").config.sliding_window == 4
