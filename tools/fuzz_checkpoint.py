"""Checkpoints of train_lm.py, as input of the fuzzer: a small one, and what becomes of one of its files."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from random import Random

import fuzz_mutate
import train_lm_checkpoint

_SIZES = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
}


@cache
def sound() -> dict[str, bytes]:
    """The files of a checkpoint, by name."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = train_lm_checkpoint.new_model(_SIZES, None, "sdpa")
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 4, dtype=torch.long), labels=torch.zeros(1, 4, dtype=torch.long)).loss.backward()
    optimizer.step()
    with tempfile.TemporaryDirectory() as folder:
        train_lm_checkpoint.save(Path(folder, "checkpoint"), model, optimizer, 7)
        return {path.name: path.read_bytes() for path in sorted(Path(folder, "checkpoint").iterdir())}


def made(rng: Random) -> tuple[str, bytes]:
    """One file, changed: bytes, the JSON that it is or begins with, or its end."""
    name = rng.choice(("config.json", train_lm_checkpoint.MODEL, train_lm_checkpoint.TRAINING))
    data = sound()[name]
    if rng.random() < 0.3:
        return name, fuzz_mutate.bytes_of(rng, data)
    if name == "config.json":
        return name, fuzz_mutate.file_of(rng, lambda rng: json.loads(data))
    size = int.from_bytes(data[:8], "little")
    head = fuzz_mutate.file_of(rng, lambda rng: json.loads(data[8 : 8 + size]))
    told = len(head) if rng.random() < 0.9 else rng.choice((0, 1, 1 << 40, (1 << 64) - 1))
    return name, told.to_bytes(8, "little") + head + data[8 + size :]


def attempt(given: tuple[str, bytes], folder: Path) -> bool:
    """Read a checkpoint with this file in the place of its own."""
    place = folder / "checkpoint"
    place.mkdir(exist_ok=True)
    for name, data in {**sound(), given[0]: given[1]}.items():
        (place / name).write_bytes(data)
    try:
        return train_lm_checkpoint.load(place, "sdpa").step >= 0
    except train_lm_checkpoint.CheckpointError:
        return False
