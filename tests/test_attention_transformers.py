"""Hugging Face transformers over several ranks, and what needs no ranks: who sees what of a split cache."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from test_mpi import run_suite

MpiRun = Callable[..., CompletedProcess[str]]
SUITE = Path(__file__).parent / "mpi_transformers"


def test_models_are_those_of_one_process(mpirun: MpiRun) -> None:
    """On five ranks, and four of them: every rank imports transformers for seconds."""
    ended = run_suite(mpirun, 5, SUITE, limit_s=120)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count(" passed") == 1, "rank 0, and no other, reports"


@given(
    ranks=st.integers(1, 5),
    prompt=st.integers(0, 12),
    count=st.integers(1, 9),
    window=st.none() | st.integers(1, 12),
)
def test_each_new_token_sees_each_token_of_its_window_on_one_rank(
    ranks: int, prompt: int, count: int, window: int | None
) -> None:
    from attention.sharded_cache import Step, visible

    seen = np.zeros((count, prompt + count), int)
    for rank in range(ranks):
        kept = np.arange(rank, prompt + count, ranks)
        for rows, keys in visible(kept, Step(prompt, count, None, None), window):
            for row in range(rows.start, rows.stop):
                seen[row, kept[keys]] += 1
    places = np.arange(prompt + count)
    for row, place in enumerate(range(prompt, prompt + count)):
        first = 0 if window is None else place - window + 1
        assert (seen[row] == ((places >= first) & (places <= place))).all()
