"""train_lm.py: it learns, a resumed run goes on as one, and plain models load what it saves."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mpi4py import MPI
from transformers import LlamaForCausalLM

import train_lm
import train_lm_options

WORLD = MPI.COMM_WORLD
SMALL = ["--width", "32", "--depth", "1", "--heads", "2", "--kv-heads", "1"]


@pytest.fixture
def directory() -> Iterator[Path]:
    """The same on all ranks."""
    made = tempfile.TemporaryDirectory() if WORLD.rank == 0 else None
    yield Path(WORLD.bcast(made.name if made else ""))
    WORLD.barrier()
    if made:
        made.cleanup()


def train(*arguments: str | Path) -> None:
    with pytest.raises(SystemExit) as left:
        train_lm.main(["--timeout", "60", *map(str, arguments)])
    assert left.value.code == 0


def losses(path: Path) -> list[float]:
    return [each["loss"] for each in json.loads(path.read_text())["results"]]


def test_a_run_learns_goes_on_and_is_loaded_by_plain_models(directory: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text, saved, picture = directory / "text", directory / "saved", directory / "loss.png"
    if WORLD.rank == 0:
        text.write_bytes(b"to be or not to be, " * 40)
    WORLD.barrier()
    whole, first, second = (directory / f"{name}.json" for name in ("whole", "first", "second"))
    how: list[str | Path] = ["--text", text, "--seq-len", "96", "--lr", "0.01", "--warmup", "2"]
    train(*how, *SMALL, "--steps", "14", "--json", whole, "--plot", picture)
    train(*how, *SMALL, "--steps", "8", "--json", first, "--save", saved)
    train(*how, "--resume", saved, "--steps", "6", "--json", second)
    told = capfd.readouterr()
    assert told.out.count("tokens/s") == (3 if WORLD.rank == 0 else 0)
    assert not told.err, "no progress bar where there is no terminal"
    if WORLD.rank != 0:
        return
    assert picture.stat().st_size > 1000
    found = losses(first) + losses(second)
    assert found == pytest.approx(losses(whole), rel=1e-4), "resumed or not"
    assert found[-1] < 0.8 * found[0]
    plain = LlamaForCausalLM.from_pretrained(saved)
    assert plain.config._attn_implementation != "tasp"
    options = train_lm_options.parse(None, ["--seq-len", "96"], quiet=True)
    ids = train_lm.contexts(torch.frombuffer(bytearray(text.read_bytes()), dtype=torch.uint8), options, 9)
    assert float(plain(ids, labels=ids).loss.detach()) == pytest.approx(losses(second)[0], rel=1e-4)


def test_a_window_in_bfloat16(directory: Path) -> None:
    path = directory / "losses.json"
    train(
        "--seq-len", "64", *SMALL, "--window", "16", "--dtype", "bfloat16", "--batch", "2", "--steps", "2", "-J", path
    )
    assert WORLD.rank != 0 or len(losses(path)) == 2
