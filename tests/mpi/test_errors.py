"""Ranks that pass different things all get the same error, and can go on afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

import tasp_coll
from tasp_coll import Communicator, MismatchError
from tasp_coll.transport import Op, mpi
from tasp_coll.transport.mpi import MpiTransport

RANK, N = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
ODD = N - 1  # the rank that does something else
Call = Callable[[Communicator, bool], Any]
several_ranks = pytest.mark.skipif(N == 1, reason="one rank cannot disagree")


@pytest.fixture
def comm() -> Iterator[Communicator]:
    with Communicator(timeout=20) as made:
        yield made


def gather(comm: Communicator, *args: Any, **options: Any) -> Any:
    return comm.decomposed_allgather(*args, **options)


# What the ranks pass: the last argument says whether this one is the odd one out; what the error has to name.
CALLS: dict[str, tuple[Call, str]] = {
    "shape": (lambda comm, odd: gather(comm, np.zeros(4 + odd)), "shape"),
    "large shape": (lambda comm, odd: gather(comm, np.zeros(40_000 + odd)), "shape"),
    "inline and not": (lambda comm, odd: gather(comm, np.zeros(40_000 if odd else 4)), "shape"),
    "same bytes": (lambda comm, odd: gather(comm, np.zeros((2, 6) if odd else (3, 4))), "shape"),
    "dtype": (lambda comm, odd: gather(comm, np.zeros(4, np.int64 if odd else np.float64)), "dtype"),
    "algorithm": (lambda comm, odd: gather(comm, np.zeros(4), algorithm="ring" if odd else "direct"), "algorithm"),
    "rings": (lambda comm, odd: gather(comm, np.zeros(4), rings=1 if odd else None), "rings"),
    "op": (lambda comm, odd: comm.decomposed_allreduce(np.zeros(4), op="max" if odd else "sum"), "op"),
    "counts": (
        lambda comm, odd: comm.decomposed_reduce_scatter(np.zeros(N), counts=[N, *[0] * (N - 1)] if odd else [1] * N),
        "counts",
    ),
    "row shape": (lambda comm, odd: comm.decomposed_allgatherv(np.zeros((RANK, 3 + odd))), "row_shape"),
    "collective": (
        lambda comm, odd: comm.decomposed_allreduce(np.zeros(4)) if odd else gather(comm, np.zeros(4)),
        "decomposed_allreduce",
    ),
    "call and stream": (
        lambda comm, odd: next(comm.allgather_steps(np.zeros(4))) if odd else comm.all_to_all(np.zeros(N)),
        "all_to_all",
    ),
    "direction": (lambda comm, odd: next(comm.allgather_steps(np.zeros(4), reverse=odd)), "reverse"),
    "accumulating": (
        lambda comm, odd: next(comm.reduce_scatter_steps(np.zeros(4), algorithm="ring", accumulate=odd)),
        "accumulate",
    ),
    "donated": (
        lambda comm, odd: next(comm.allgather_steps(np.zeros(8)[:: 1 + odd], donate=True)),
        "send must be contiguous to be donated",
    ),
    "streams": (
        lambda comm, odd: next(comm.reduce_scatter_steps(np.zeros(4)) if odd else comm.allgather_steps(np.zeros(4))),
        "reduce_scatter_steps",
    ),
    "schedule": (
        lambda comm, odd: gather(
            comm, np.zeros(4), algorithm=tasp_coll.plan(comm.topology, "allgather", "ring") if odd else "ring"
        ),
        "algorithm",
    ),
    # arguments that are bad in themselves, on one rank
    "recv's shape": (lambda comm, odd: gather(comm, np.zeros(4), np.zeros(4 * N + odd)), "recv must have shape"),
    "recv's dtype": (
        lambda comm, odd: gather(comm, np.zeros(4), np.zeros(4 * N, "f4" if odd else "f8")),
        "recv must have send's dtype",
    ),
    "recv's rows": (
        lambda comm, odd: comm.decomposed_allgatherv(np.zeros((RANK, 2)), np.zeros((N * (N - 1) // 2 + odd, 2))),
        "recv must have",
    ),
    "send's kind": (lambda comm, odd: gather(comm, "text" if odd else np.zeros(4)), "send must be"),
    "objects": (lambda comm, odd: gather(comm, np.array([None] * 4) if odd else np.zeros(4)), "plain bytes"),
    "unknown algorithm": (
        lambda comm, odd: gather(comm, np.zeros(4), algorithm="fastest" if odd else "auto"),
        "algorithm must be one of",
    ),
    "unknown op": (
        lambda comm, odd: comm.decomposed_allreduce(np.zeros(4), op="xor" if odd else "sum"),
        "op must be one of",
    ),
    "too many rings": (lambda comm, odd: gather(comm, np.zeros(4), rings=10_000 if odd else 1), "10000"),
    "overlap": (
        lambda comm, odd: comm.all_to_all(x := np.zeros(N), x if odd else np.zeros(N)),
        "recv must not overlap send",
    ),
    "unreducible": (
        lambda comm, odd: comm.decomposed_allreduce(np.zeros(4, "S3") if odd else np.zeros(4)),
        "dtype must be reducible",
    ),
    "indivisible": (
        lambda comm, odd: comm.all_to_all(np.zeros(N + 1 if odd else N)),
        f"{N} ranks divide",
    ),
    "stream of scalars": (
        lambda comm, odd: next(comm.allgather_steps(np.float64(1) if odd else np.zeros(4))),
        "axis 0",
    ),
}


def works(comm: Communicator) -> None:
    """The communicator is as good as new."""
    for rows in (3, 30_000):
        assert gather(comm, np.full(rows, RANK))[::rows].tolist() == list(range(N))
        assert comm.decomposed_allreduce(np.ones(rows), algorithm="ring")[-1] == N
    assert sum(1 for _ in comm.allgather_steps(np.zeros(40))) == N


@several_ranks
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("what", CALLS)
def test_all_ranks_hear_of_it_and_can_go_on(comm: Communicator, what: str, later: bool) -> None:
    call, named = CALLS[what]
    if later:
        works(comm)
    with pytest.raises(MismatchError) as caught:
        call(comm, RANK == ODD)
    assert named in str(caught.value)
    assert ODD in caught.value.ranks
    if N > 2:
        assert caught.value.ranks == (ODD,)
        assert f"rank {ODD}" in str(caught.value)
    told = MPI.COMM_WORLD.allgather(str(caught.value))
    assert len(set(told)) == 1, "every rank says the same"
    works(comm)


@several_ranks
def test_later_calls_in_the_background_still_run(comm: Communicator) -> None:
    before = comm.decomposed_allreduce(np.ones(50_000), async_op=True)
    wrong = comm.decomposed_allgather(np.zeros(4 + (RANK == ODD)), async_op=True)
    after = comm.decomposed_allreduce(np.ones(50_000), async_op=True)
    assert after.wait()[0] == before.wait()[0] == N
    assert wrong.test()
    for _ in range(2):
        with pytest.raises(MismatchError, match="shape"):
            wrong.wait()


def repeated(comm: Communicator) -> dict[str, Callable[[], Any]]:
    """Calls that use the same arrays each time, so that their data may set out before ranks have agreed."""
    x, y, z = np.full(20_000, RANK), np.full(50_000, RANK), np.full(20_000 * N, RANK)
    into_x, into_y, into_z, total = (np.empty(size, int) for size in (x.size * N, y.size * N, z.size, x.size - 1))
    everyone = list(range(N))

    def gathered(result: Any, rows: int) -> None:
        assert result[::rows].tolist() == result[rows - 1 :: rows].tolist() == everyone

    return {
        "short": lambda: gathered(gather(comm, x, into_x, algorithm="direct"), x.size),
        "long": lambda: gathered(gather(comm, y, into_y, algorithm="direct"), y.size),
        "made": lambda: gathered(gather(comm, x, algorithm="direct"), x.size),
        "exchange": lambda: gathered(comm.all_to_all(z, into_z), x.size),
        "sum": lambda: comm.decomposed_allreduce(y, into_y[: y.size], algorithm="ring"),
        "inline": lambda: gathered(gather(comm, x[:9]), 9),
        "bad": lambda: gather(comm, x, total),
        "stream": lambda: sum(1 for _ in comm.allgather_steps(x, algorithm="ring")),
    }


@several_ranks
def test_what_set_out_early_is_withdrawn(comm: Communicator) -> None:
    """Every pair of calls that could meet, time and again, with no message left behind."""
    calls = repeated(comm)
    good = [name for name in calls if name != "bad"]
    for name in good * 3:
        calls[name]()
    for usual in good:
        for other in calls:
            if usual != other and {usual, other} != {"short", "made"}:
                for _ in range(2):
                    with pytest.raises(MismatchError):
                        calls[other if RANK == ODD else usual]()
                calls[usual]()
    for turn in range(40):
        mine = list(calls)[(turn * (RANK + 1) + RANK) % len(calls)]
        names = MPI.COMM_WORLD.allgather(mine)
        if set(names) <= {"short", "made"} or set(names) == {mine} != {"bad"}:
            calls[mine]()
        else:
            with pytest.raises((MismatchError, tasp_coll.ArgumentError)):
                calls[mine]()
    for name in good:
        calls[name]()


@several_ranks
def test_ranks_may_repeat_a_call_with_other_arrays(comm: Communicator) -> None:
    """One rank's data sets out early, another's does not; both are the same call."""
    x, into = np.empty(30_000), np.empty(30_000 * N)
    for turn in range(12):
        fresh = turn > 2 and (turn + RANK) % 3 == 0
        send, recv = (np.empty_like(x), np.empty_like(into)) if fresh else (x, into)
        send[:] = RANK + turn / 100
        recv[:] = -1
        got = gather(comm, send, recv, algorithm="direct").reshape(N, -1)
        assert (got == np.arange(N)[:, None] + turn / 100).all()


@several_ranks
def test_an_open_stream_survives(comm: Communicator) -> None:
    stream = comm.allgather_steps(np.full(4_000, RANK))
    next(stream)
    with pytest.raises(MismatchError):
        gather(comm, np.zeros(4 + (RANK == ODD)))
    for arrival in stream:
        assert all((chunk.data == chunk.source).all() for chunk in arrival.chunks)


@pytest.mark.parametrize("rows", [4, 40_000])
def test_arguments_that_are_bad_on_all_ranks(comm: Communicator, rows: int) -> None:
    for call in (
        lambda: gather(comm, np.zeros(rows), np.zeros(rows * N + 1)),
        lambda: gather(comm, np.zeros(rows), algorithm="fastest"),
        lambda: comm.decomposed_allreduce(np.zeros(rows), op="xor"),
        lambda: comm.decomposed_allreduce(np.zeros(rows, np.int32), op="avg"),
        lambda: comm.decomposed_allreduce(np.zeros(rows, np.float16), algorithm="native"),
        lambda: comm.decomposed_allreduce(np.zeros(rows), op="avg", algorithm="native"),
        lambda: comm.decomposed_reduce_scatter(np.zeros(rows), counts=[rows + 1, *[0] * (N - 1)]),
        lambda: next(comm.allgather_steps(np.zeros(rows), algorithm="native")),
    ):
        with pytest.raises(tasp_coll.ArgumentError):
            call()
    works(comm)


# --- making a communicator


def test_topologies_of_the_wrong_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for topology in (f"full_mesh:{N + 1}", tasp_coll.Topology.preset(f"full_mesh:{N + 1}")):
        with pytest.raises(tasp_coll.TopologyError, match=str(N + 1)):
            Communicator(topology=topology)
    monkeypatch.setenv("TASP_COLL_TOPOLOGY", f"full_mesh:{N + 1}")
    with pytest.raises(tasp_coll.TopologyError, match=str(N + 1)):
        Communicator()
    file = tmp_path / "topology.json"
    file.write_text(json.dumps({"name": "none", "ranks": N, "links": "many"}))
    with pytest.raises(tasp_coll.TopologyError):
        Communicator(topology=file)
    monkeypatch.delenv("TASP_COLL_TOPOLOGY")
    with Communicator(topology=f"full_mesh:{N}") as comm:
        works(comm)


@several_ranks
@pytest.mark.parametrize(
    "topologies",
    [
        (f"full_mesh:{N}", f"full_mesh:{N + 1}"),
        (f"full_mesh:{N}", "no such preset"),
        (f"full_mesh:{N}", f"nvswitch:{N}"),
        (f"full_mesh:{N}", None),
        (None, "/no/such/file.json"),
    ],
    ids=str,
)
def test_topologies_that_differ(topologies: tuple[str | None, str | None]) -> None:
    with pytest.raises(MismatchError) as caught:
        Communicator(topology=topologies[RANK == ODD], timeout=20)
    assert ODD in caught.value.ranks
    assert len(set(MPI.COMM_WORLD.allgather(str(caught.value)))) == 1


def test_options_of_the_communicator() -> None:
    for options in ({"timeout": 0}, {"timeout": "soon"}, {"stream": object()}, {"self_heal": 2}):
        with pytest.raises(tasp_coll.ArgumentError, match=next(iter(options))):
            Communicator(**options)


@several_ranks
def test_an_option_that_is_bad_on_one_rank() -> None:
    with pytest.raises(MismatchError, match=f"rank {ODD}"):
        Communicator(timeout=-1 if RANK == ODD else 20)


def test_a_closed_communicator_says_so() -> None:
    comm = Communicator(timeout=20)
    comm.close()
    comm.close()
    for call in (comm.decomposed_allgather, comm.decomposed_allreduce, comm.all_to_all, comm.allgather_steps):
        with pytest.raises(tasp_coll.CollectiveError, match="closed"):
            call(np.zeros(N))


@pytest.mark.parametrize("whole", [False, True], ids=["some", "all"])
def test_what_was_under_way_when_mpi_failed(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI says that there was an error, and not with whom; what failed counts as done then."""

    def fails(requests: object) -> None:
        MPI.Request.Waitall(requests)  # type: ignore[arg-type]
        raise MPI.Exception(MPI.ERR_IN_STATUS)

    x, y = np.ones(3), np.zeros(3)
    transport = MpiTransport(MPI.COMM_SELF.Dup(), 1)
    batch = transport.prepare([Op(True, 0, 0, x.ctypes.data, x.nbytes), Op(False, 0, 0, y.ctypes.data, y.nbytes)])
    with monkeypatch.context() as patch:
        patch.setattr(mpi, "_test_all" if whole else "_test_some", fails)
        if whole:
            batch.start_all()
        else:
            batch.start([0, 1])
        with pytest.raises(MPI.Exception):
            batch.test_all() if whole else batch.test_some()
    assert batch.pending() == [0, 1]
    transport.close()
