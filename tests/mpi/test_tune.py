"""Measured tables: written, read, followed, and never trusted."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from mpi4py import MPI

from tasp_coll import ArgumentError, Communicator, tuning

WORLD = MPI.COMM_WORLD
SIZES = [256, 65_536]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One empty directory for all ranks."""
    shared = Path(WORLD.bcast(str(tmp_path)))
    monkeypatch.setenv("TASP_COLL_CACHE", str(shared))
    return shared


def tables(cache: Path) -> list[Path]:
    """The files in the cache, once rank 0 has written them and before anyone goes on."""
    WORLD.barrier()
    found = sorted(cache.iterdir())
    WORLD.barrier()
    return found


def test_a_table_is_written_read_and_followed(cache: Path) -> None:
    with Communicator(timeout=30) as comm:
        found = comm.tune(SIZES, repeats=2)
        assert found.keys() == set(tuning.TUNED_COLLECTIVES)
        assert all([size for size, _ in rows] == SIZES for rows in found.values())
        assert len(set(WORLD.allgather(str(found)))) == 1, "the same on all ranks"
        table = comm._core.chooser.table
    (file,) = tables(cache)
    assert tuning.read(file, comm.topology).table == table
    with Communicator(timeout=30) as later:
        assert later._core.chooser.table == table
        for size, algorithm in found["allgather"]:
            later.decomposed_allgather(np.zeros(size, np.uint8))
            inline = size <= later._core.rounds.capacity
            assert later.last_choice is not None
            assert inline or later.last_choice.algorithm == algorithm


@pytest.mark.parametrize("algorithm", ["rings", "ring", "direct", "native"])
def test_auto_goes_by_the_table(cache: Path, algorithm: str) -> None:
    with Communicator(timeout=30) as comm:
        file = tuning.cache_file(comm._core.situation, comm.transport)
    rows = tuple((name, 1 << 20, tuning.Choice(algorithm)) for name in tuning.TUNED_COLLECTIVES)
    if WORLD.rank == 0:
        tuning.write(file, tuning.Chooser(rows))
    assert tables(cache) == [file]
    with Communicator(timeout=30) as comm:
        for call in (comm.decomposed_allgather, comm.decomposed_reduce_scatter, comm.decomposed_allreduce):
            call(np.zeros(comm.size * 40_000))
            assert comm.last_choice is not None
            assert comm.last_choice.algorithm == algorithm
        half = comm.decomposed_allreduce(np.ones(20_000, np.float16))  # which native does not do
        assert half[0] == comm.size


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "\x00\xff",
        '{"version": 1}',
        '{"version": 999, "table": []}',
        '{"version": 1, "table": [["allgather", 1024, "magic", null, null]]}',
        '{"version": 1, "table": [["allgather", -1, "ring", null, null]]}',
        '{"version": 1, "table": [["allgather", 1024, "ring"]]}',
        '{"version": 1, "table": [["allgather", 1048576, "rings", 1000, null]]}',
    ],
)
def test_a_file_that_is_no_table_is_ignored(cache: Path, text: str) -> None:
    with Communicator(timeout=30) as comm:
        file = tuning.cache_file(comm._core.situation, comm.transport)
    if WORLD.rank == 0:
        file.write_text(text, encoding="latin-1")
    assert tables(cache) == [file]
    with Communicator(timeout=30) as comm:
        assert comm.decomposed_allgather(np.full(30_000, comm.rank))[-1] == comm.size - 1
        assert comm.decomposed_allreduce(np.ones(30_000))[-1] == comm.size


def test_only_rank_0_needs_the_file(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Communicator(timeout=30) as comm:
        comm.tune([1_024], repeats=1)
        table = comm._core.chooser.table
    tables(cache)
    if WORLD.rank:
        monkeypatch.setenv("TASP_COLL_CACHE", str(tmp_path / "elsewhere"))
    with Communicator(timeout=30) as comm:
        assert comm._core.chooser.table == table


def test_a_cache_that_cannot_be_written(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table holds for this communicator, and rank 0 does not leave the others waiting."""
    if WORLD.rank == 0:
        (cache / "file").write_text("in the way")
    monkeypatch.setenv("TASP_COLL_CACHE", str(cache / "file" / "below"))
    tables(cache)
    with Communicator(timeout=30) as comm:
        if comm.rank == 0:
            with pytest.warns(UserWarning, match="cannot be kept for other runs"):
                comm.tune([1_024], repeats=1)
        else:
            comm.tune([1_024], repeats=1)
        assert comm._core.chooser.table
        assert comm.decomposed_allreduce(np.ones(30_000))[-1] == comm.size


def test_sizes_must_make_sense(cache: Path) -> None:
    with Communicator(timeout=30) as comm:
        for sizes, repeats in (([], 1), ([0], 1), (["big"], 1), ([1_024], 0)):
            with pytest.raises(ArgumentError):
                comm.tune(sizes, repeats=repeats)  # type: ignore[arg-type]
        assert comm.decomposed_allreduce(np.ones(3))[0] == comm.size
