"""The command line of train_lm.py; tests/mpi_transformers trains with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import train_lm_options
from launch import REPOSITORY

MpiRun = Callable[..., CompletedProcess[str]]


def test_what_cannot_be_done_is_told_once_and_soon(mpirun: MpiRun, tmp_path: Path) -> None:
    tool = REPOSITORY / "tools" / "train_lm.py"
    cases: tuple[tuple[list[str | Path], str], ...] = (
        (["--resume", tmp_path / "none"], "--resume must be a checkpoint of --save"),
        (["--width", "30", "--heads", "4"], "--width must be an even multiple of --heads, got 30 and 4"),
        (["--resume", tmp_path, "--depth", "3"], "--depth comes from the checkpoint"),
        (["--text", __file__, "--seq-len", "1000000"], "--text must have --seq-len 1000000 bytes"),
        (["--plot", tmp_path / "loss.txt"], "--plot must end in"),
    )
    for flags, told in cases:
        ended = mpirun(2, [tool, *flags])
        assert ended.returncode == 2, ended.stderr
        assert ended.stderr.count(told) == 1, ended.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        train_lm_options.parse("about", ["--help"], quiet=False)
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert all(word in told for word in ("mpiexec -n 4", "from_pretrained", "tokens/s", "exit status"))
